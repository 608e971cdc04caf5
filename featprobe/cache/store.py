"""An open cache: its rows, their stored features and labels, and whether these are still what was written."""

import os
import shlex
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from featprobe.cache.contents import Contents, read_contents
from featprobe.cache.held_file import UnreadableError, was_closed
from featprobe.cache.layout import MISSING, UNREADABLE, WHOLE, Extent, level_tables
from featprobe.cache.level_array import decoded, level_array
from featprobe.cache.rows import Row, checksum
from featprobe.errors import CacheError, CacheIncompleteError, DataError, NoMapsError, nearest
from featprobe.levels import FeatureLevel
from featprobe.machine import human_bytes
from featprobe.targets import Instance, Labels, decode_image_id, decode_instances, decode_semantic

if TYPE_CHECKING:
    import torch

    from featprobe.cache.torch_rows import CachedRows, TargetKind

_files: WeakValueDictionary[tuple[Any, ...], NDArray[np.bool_]] = WeakValueDictionary()
"""Which rows and levels this process has hashed, (rows, levels), per open file: by device, inode, identity and shape.
Only open files hold them (`HeldFile.hashed`): the inode of a closed one may be another's."""
_one_at_a_time = threading.Lock()


class Cache:
    """A feature cache opened for reading.

    contents: recipe, data set, rows. images: the whole images; they are the rows unless rows show parts of images.
    image_of: (rows,), the index of the image that each row shows. levels: the stored levels, finest first. handle: the
    open file that the contents were read from, so that a newer file under the same name does not change what is read.
    The file is closed with the object, or by `with`.
    """

    def __init__(self, path: Path, contents: Contents) -> None:
        self.path = path
        self.contents = contents
        if not self.is_in_place():
            raise CacheError(f"{path} was replaced by a newer one while it was opened. Run the same command again.")
        self.recipe, self.data, self.rows = contents.recipe, contents.data, contents.rows
        self.images = contents.images or contents.rows
        image_of = np.arange(len(self.rows)) if self.rows.image_index is None else self.rows.image_index
        self.image_of = image_of.astype(np.intp)
        self._columns = {level.name: column for column, level in enumerate(self.levels)}

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        size = f"{human_bytes(len(self) * self.recipe.row_bytes)} of {self.recipe.kept_as}"
        of = f"{self.recipe.label} on {self.data.name}"
        return f"Cache({of}, {len(self)} rows, {', '.join(self._columns)}, {size}; {str(self.path)!r})"

    def __enter__(self) -> "Cache":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Arrays that are views of it stay; nothing else can be read."""
        self.contents.file.close()

    @property
    def handle(self) -> int:
        """The open file. Raises CacheError where it was closed."""
        self.contents.file.read(0, 0)
        return self.contents.file.handle

    @property
    def extents(self) -> Mapping[str, Extent]:
        """The place of each table in the file."""
        return self.contents.extents

    def is_in_place(self) -> bool:
        """Whether this very file still has its name."""
        try:
            return os.path.samestat(self.path.stat(), self.contents.file.status)
        except OSError:
            return False

    @property
    def levels(self) -> tuple[FeatureLevel, ...]:
        """The stored levels, finest first. Every row has all of them."""
        return self.recipe.levels

    @property
    def done(self) -> NDArray[np.uint8]:
        """(rows,), the present state of each row: 0 missing, 1 whole, 2 unreadable."""
        states = self._read_all("done", "u1")[:, 0]
        return np.where(states > UNREADABLE, np.uint8(MISSING), states)  # no writer writes such a state: damage

    def reason(self, row: int) -> str:
        """Why a row is unreadable."""
        return self._read_all("reason", "u1")[row].tobytes().rstrip(b"\0").decode(errors="replace")

    def usable(self, split: str | None = None) -> NDArray[np.intp]:
        """Indices of whole rows, of one split or of all, without the rows of images that have an unreadable part.

        Raises CacheIncompleteError when rows are missing.
        """
        done = self.done
        missing = int((done == MISSING).sum())
        if missing:
            raise CacheIncompleteError(
                f"{self.path} is not complete: {missing} of {len(self)} rows are missing.\n"
                f"To finish it, run:  {self.contents.command}"
            )
        wanted = np.array([split in (None, name) for name in self.rows.column("split")], dtype=bool)
        torn = np.isin(self.image_of, self.image_of[done == UNREADABLE])
        return np.flatnonzero((done == WHOLE) & wanted & ~torn)

    def semantic(self, row: int) -> Labels:
        """A row's mask at the size of the image or part: (height, width), uint8. Raises CacheError without a mask."""
        return self._semantic(self.rows[row])

    def instances(self, row: int) -> tuple[Instance, ...]:
        """A row's objects in pixels of the image or part. Raises CacheError where the set has no objects."""
        return self._instances(self.rows[row])

    def image_semantic(self, image: int) -> Labels:
        """A whole image's mask: (height, width), uint8. Raises CacheError without a mask."""
        return self._semantic(self.images[image]) if self.recipe.in_parts else self.semantic(image)

    def image_instances(self, image: int) -> tuple[Instance, ...]:
        """A whole image's objects in its pixels. Raises CacheError where the set has no objects."""
        return self._instances(self.images[image]) if self.recipe.in_parts else self.instances(image)

    @property
    def image_labels(self) -> NDArray[np.uint8] | None:
        """(images, names), the labels of whole images, see `ImageTruth.values`; None where the set has none."""
        return self.contents.image_labels

    def image_id(self, image: int) -> int | str:
        """The id of an image in the data set's annotation; its number, from 1 on, where `own_ids` is False."""
        return self._image_ids[image] if self.own_ids else image + 1

    @property
    def own_ids(self) -> bool:
        """Whether the annotation gives each image another id. Several annotation files may each count from 0."""
        return None not in self._image_ids and len(set(self._image_ids)) == len(self.images)

    @cached_property
    def _image_ids(self) -> list[Any]:
        return [self._image_id(image) if image.instances else None for image in self.images]

    def lacks_maps(self) -> NoMapsError:
        """The error that maps are wanted of a cache that keeps pooled features alone."""
        return NoMapsError(
            f"{self.path} holds pooled features alone. Nothing was computed.\n"
            "  wanted  maps\n  found   mean and maximum of each channel (--store pooled)\n"
            f"Make a cache of maps beside it:  {self.contents.command.replace(' --store pooled', '')}"
        )

    def _semantic(self, row: Row) -> Labels:
        if not row.semantic:
            raise CacheError(f"{self.path} holds no masks, only {', '.join(self.data.tasks)} targets.")
        try:
            return decode_semantic(row.semantic, row.placement.original, len(self.data.classes))
        except DataError as error:
            raise self._unlike(row, error) from error

    def _instances(self, row: Row) -> tuple[Instance, ...]:
        if not row.instances:
            raise CacheError(f"{self.path} holds no instances, only {', '.join(self.data.tasks)} targets.")
        try:
            return decode_instances(row.instances, row.placement.original, len(self.data.classes))[0]
        except DataError as error:
            raise self._unlike(row, error) from error

    def _image_id(self, row: Row) -> int | str | None:
        try:
            return decode_image_id(row.instances)
        except DataError as error:
            raise self._unlike(row, error) from error

    def _unlike(self, row: Row, error: DataError) -> CacheError:
        """The error for labels that featprobe can't have written."""
        return CacheError(f"{self.path}: featprobe never writes labels like those of {row.id!r}. {error}")

    def _read_all(self, name: str, dtype: str) -> NDArray:
        extent = self.contents.extents[name]
        data = self.contents.file.read(extent.offset, extent.row_bytes * extent.rows)
        return np.frombuffer(data, dtype=dtype).reshape(extent.rows, -1)

    def stored_checksums(self) -> NDArray[np.uint64]:
        """The stored xxh3_64 per row and level: (rows, levels)."""
        return self._read_all("checksum", "<u8")

    def stored(self, row: int, level: FeatureLevel) -> dict[str, NDArray]:
        """The stored arrays of one row for a level, unchecked, by the names that `CacheWriter.write` takes."""
        found = {}
        for table in level_tables(self.recipe, level):
            extent = self.contents.extents[table.name]
            data = self.contents.file.read(extent.offset + row * extent.row_bytes, extent.row_bytes)
            found[table.key] = np.frombuffer(data, dtype=table.dtype).reshape(table.shape)
        return found

    def read_row(self, row: int, level: FeatureLevel) -> NDArray:
        """One row of one level in its stored number format, (channels, height, width), or (2, channels) where it is
        pooled; int8 is decoded to fp16.

        Raises CacheError where the row is damaged or missing.
        """
        stored = self.stored(row, level)
        self.check(np.array([row]), level, *(values[None] for values in stored.values()))
        features, *scales = stored.values()
        return decoded(features, scales[0]) if scales else features

    def features(
        self, level: str | FeatureLevel, split: str | None = None, *, rows: Sequence[int] | None = None
    ) -> NDArray[Any]:
        """Features of one level as one array: (rows, channels, height, width), or (rows, 2, channels), mean and
        maximum, of a pooled cache.

        Row i is row `cache.usable(split)[i]` of the cache. split: one of the set's own; None for all. rows: others, in
        this order, as those of a `Partition`. The array has the stored number format; bfloat16, which numpy lacks,
        becomes float32, and int8 float16. Rows of float16 and float32 that follow one another in the file are a view of
        it, which takes no memory and may be larger than it; all others are copied. The array can't be written to. Every
        row is hashed when this process first reads it. Features of padding are there, too: `cache.rows.content` says
        what part of the frame each image fills.

        Raises CacheError for an unknown level or split, for a damaged row, and for a copy that the memory does not
        hold; CacheIncompleteError where rows are missing.
        """
        found = level_array(self, _level_of(self, level), _rows_of(self, split, rows))
        found.flags.writeable = False
        return found

    def tensor(
        self, level: str | FeatureLevel, split: str | None = None, *, rows: Sequence[int] | None = None
    ) -> "torch.Tensor":
        """The same as a tensor of torch, of bfloat16 too. Writing to a view changes no file."""
        import torch

        found = torch.from_numpy(level_array(self, _level_of(self, level), _rows_of(self, split, rows), bits=True))
        return found.view(torch.bfloat16) if found.dtype == torch.uint16 else found

    def torch_dataset(
        self,
        levels: Sequence[str | FeatureLevel] = (),
        split: str | None = None,
        *,
        rows: Sequence[int] | None = None,
        targets: "bool | TargetKind" = True,
    ) -> "CachedRows":
        """A dataset of torch whose items are (maps, target), for a DataLoader with or without workers.

        maps: level name -> (channels, height, width), or (2, channels) of a pooled cache, as stored; int8 as float16.
        levels: names; all by default. split, rows: see `features`. targets: one of these, or False for the maps alone;
        True for the first that the set has:

        - masks: (height, width) of the frame, uint8, classes; 255 for padding and pixels that don't count.
        - labels: of the whole image: its number among `cache.data.label_names.names`, int64, -100 where it is not
          known; where an image may have several, (names,), float32, 1 or 0, nan where they are not known.
        - objects: torchvision's dict of boxes (x1 y1 x2 y2, pixels of the frame), labels, iscrowd, image_id, and masks
          where each object has one. They differ in number: DataLoader(…, collate_fn=lambda items: tuple(zip(*items))).

        Raises CacheError as `features` does, and for targets that the set lacks.
        """
        from featprobe.cache.torch_rows import CachedRows

        chosen = tuple(_level_of(self, level) for level in levels) or self.levels
        return CachedRows(self, reopened, chosen, _rows_of(self, split, rows), targets)

    def check(self, rows: NDArray[np.intp], level: FeatureLevel, *stored: NDArray) -> None:
        """Check the values that were read for some rows of a level, each row once per process.

        stored: arrays (rows, …), one per table of `level_tables`, in that order. Any thread may call this. Raises
        CacheError for a damaged row, CacheIncompleteError for a missing one.
        """
        if self.checked(rows, level):
            return
        column, hashed = self._columns[level.name], _hashed(self)
        for row, *parts in zip(rows.tolist(), *stored, strict=True):
            if not hashed[row, column]:
                _compare(self, row, column, checksum(parts))
                hashed[row, column] = True

    def checked(self, rows: NDArray[np.intp], level: FeatureLevel) -> bool:
        """Whether this process has checked all of these rows of a level."""
        return bool(_hashed(self)[rows, self._columns[level.name]].all())


def _hashed(cache: Cache) -> NDArray[np.bool_]:
    """Which rows and levels this process has hashed: one array for all Cache objects of the same file.

    Raises CacheError where the file was closed.
    """
    file = cache.contents.file
    known = file.hashed
    if known is not None:
        return known
    shape, status = (len(cache), len(cache.levels)), file.status
    with _one_at_a_time:
        if file.handle < 0:
            raise was_closed(cache.path)
        of = status.st_dev, status.st_ino, cache.contents.identity_sha256, shape
        file.hashed = found = _files.setdefault(of, np.zeros(shape, dtype=np.bool_))
        return found


def _level_of(cache: Cache, level: str | FeatureLevel) -> FeatureLevel:
    """The level that a caller names. Raises CacheError."""
    known = {own.name: own for own in cache.levels}
    name = level if isinstance(level, str) else level.name
    if name not in known:
        raise CacheError(f"{cache.path} has no level {name!r}. {nearest(name, known)}")
    return known[name]


def _rows_of(cache: Cache, split: str | None, rows: Sequence[int] | None) -> NDArray[np.intp]:
    """The rows that a caller names. Raises CacheError for an unknown split and for rows beyond the file."""
    if rows is None:
        known = set(cache.rows.column("split"))
        if split is not None and split not in known:
            raise CacheError(f"{cache.path} has no split {split!r}. {nearest(split, known)}")
        return cache.usable(split)
    found = np.asarray(rows)
    numbers = found.ndim == 1 and (not found.size or found.dtype.kind in "iu")
    if split is not None or not numbers or not ((found >= 0) & (found < len(cache))).all():
        raise CacheError(f"rows= takes numbers of rows from 0 to {len(cache) - 1}, without split=.")
    return found.astype(np.intp)


def _compare(cache: Cache, row: int, column: int, found: int) -> None:
    """Raise CacheError where a row's stored checksum is not the one found."""
    extent = cache.contents.extents["checksum"]
    data = cache.contents.file.read(extent.offset + row * extent.row_bytes, extent.row_bytes)
    wanted = int(np.frombuffer(data, dtype="<u8")[column])
    if found == wanted:
        return
    name, state = f"row {row}, {cache.rows.texts['id'][row]!r}", cache.done[row]
    if state != WHOLE:  # as it is before its bytes change
        raise CacheIncompleteError(
            f"{cache.path}: {name}, is {'unreadable' if state == UNREADABLE else 'missing'} at the moment.\n"
            f"Finish the file, then run the same command again:  {cache.contents.command}"
        )
    raise CacheError(
        f"{cache.path} is damaged: the features of {name}, are not what was written.\n"
        f"  wanted  {cache.levels[column].name}, xxh3_64 {wanted:016x}\n  found   {found:016x}\n"
        "The file was not changed. List all damaged rows, then compute them again:\n"
        f"  featprobe cache verify {shlex.quote(str(cache.path))}\n  {cache.contents.command}"
    )


def open_cache(path: str | os.PathLike[str]) -> Cache:
    """Open a cache for reading and check all that is written once but the labels. Raises CacheError.

    Labels are checked when they are first used, features when they are read.
    """
    path = Path(path)
    contents = read_contents(path)
    if contents.damaged:
        raise CacheError(
            f"{path} is damaged: its rows or targets are not what was written ({', '.join(contents.damaged)}).\n"
            f"Nothing was changed. See what is bad:  featprobe cache verify {shlex.quote(str(path))}\n"
            f"and repair it from the images:  {contents.command}"
        )
    return Cache(path, contents)


def reopened(path: Path, identity_sha256: str) -> Cache:
    """The cache of this identity at a path. Raises CacheError where another has its place by now."""
    cache = open_cache(path)
    if cache.contents.identity_sha256 != identity_sha256:
        raise CacheError(f"{path} was replaced by another cache. Open it again in the process that began.")
    return cache


@dataclass(frozen=True)
class Damage:
    """A damaged level or target of a row, as `verify` finds it; row is -1 where the damage belongs to no single row."""

    row: int
    id: str
    part: str


def verify(path: Path) -> Iterator[Damage | int]:
    """Hash every level and target of every row again, and everything else that is written once.

    Yields a Damage per damaged part, and the number of bytes after each row of a level.
    """
    contents = read_contents(path)
    parts = contents.damaged_parts()
    targets = [] if "targets/checksum" in parts else contents.damaged_targets()
    for row in targets:
        yield Damage(row, contents.rows.texts["id"][row], "targets")
    for part in parts:
        if not (targets and part in ("targets/semantic", "targets/instances", "identity")):  # damaged rows say more
            yield Damage(-1, "", f"identity (recipe, data set, ids, splits or sizes): {part}")
    cache = Cache(path, contents)
    whole = np.flatnonzero(cache.done == WHOLE)
    expected, ids = cache.stored_checksums(), contents.rows.texts["id"]
    for column, level in enumerate(cache.levels):
        for row in whole.tolist():
            try:
                kept = list(cache.stored(row, level).values())
            except UnreadableError:
                yield Damage(row, ids[row], f"features/{level.name}, which the disk does not give")
                continue
            if checksum(kept) != int(expected[row, column]):
                yield Damage(row, ids[row], f"features/{level.name}")
            yield sum(values.nbytes for values in kept)


def damaged_rows(found: Sequence[Damage]) -> list[int]:
    """Indices of rows whose features must be computed again, ascending."""
    return sorted({damage.row for damage in found if damage.part.startswith("features/")})
