"""An open cache: who its rows are, what it holds for each, and whether that is still what was written."""

import os
import shlex
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from featprobe.cache.contents import Contents, read_contents
from featprobe.cache.layout import MISSING, UNREADABLE, WHOLE, level_tables
from featprobe.cache.rows import Row, checksum
from featprobe.errors import CacheError, CacheIncompleteError, DataError
from featprobe.levels import FeatureLevel
from featprobe.targets import Instance, Labels, decode_image_id, decode_instances, decode_semantic

_files: WeakValueDictionary[tuple[int, int], NDArray[np.bool_]] = WeakValueDictionary()
"""Which rows' levels this process has hashed, (rows, levels), of each file that it holds open, by device and inode."""
_one_at_a_time = threading.Lock()


class Cache:
    """A feature cache opened for reading.

    contents: recipe, data set, rows. images: the whole images, which are the rows unless those show parts; image_of:
    (rows,), which of them each row shows. levels: what it stores, finest first. handle: of the file that the contents
    were read from, so that a newer file under the same name does not change what is read.
    """

    def __init__(self, path: Path, contents: Contents) -> None:
        self.path = path
        self.contents = contents
        self.handle = contents.file.handle
        if not path.exists() or path.stat().st_ino != contents.inode:
            raise CacheError(f"{path} was replaced by a newer one while it was opened. Run the same command again.")
        self.recipe, self.data, self.rows = contents.recipe, contents.data, contents.rows
        self.images = contents.images or contents.rows
        own = np.arange(len(self.rows)) if self.rows.image_index is None else self.rows.image_index
        self.image_of = own.astype(np.intp)
        self._columns = {level.name: column for column, level in enumerate(self.levels)}

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"Cache({str(self.path)!r}, {len(self)} rows, {len(self.levels)} levels)"

    @property
    def levels(self) -> tuple[FeatureLevel, ...]:
        """The levels that every row holds, finest first."""
        return self.recipe.levels

    @property
    def done(self) -> NDArray[np.uint8]:
        """State of each row just now: 0 missing, 1 whole, 2 unreadable."""
        states = self._read_all("done", "u1")[:, 0]
        return np.where(states > UNREADABLE, np.uint8(MISSING), states)  # what no writer writes is damage

    def reason(self, row: int) -> str:
        """Why a row is unreadable."""
        return self._read_all("reason", "u1")[row].tobytes().rstrip(b"\0").decode(errors="replace")

    def usable(self, split: str | None = None) -> NDArray[np.intp]:
        """Indices of whole rows, of one split or of all; of an image with an unreadable part none is among them.

        Raises CacheIncompleteError when rows are missing.
        """
        done = self.done
        missing = int((done == MISSING).sum())
        if missing:
            raise CacheIncompleteError(
                f"{self.path} is not complete: {missing} of {len(self)} rows are missing.\n"
                f"Finish it, it goes on from there:  {self.contents.command}"
            )
        wanted = np.array([split in (None, own) for own in self.rows.column("split")], dtype=bool)
        torn = np.isin(self.image_of, self.image_of[done == UNREADABLE])
        return np.flatnonzero((done == WHOLE) & wanted & ~torn)

    def semantic(self, row: int) -> Labels:
        """A row's mask at the size of what it shows: (height, width), uint8; raises CacheError without one."""
        return self._semantic(self.rows[row])

    def instances(self, row: int) -> tuple[Instance, ...]:
        """A row's objects in pixels of what it shows; raises CacheError without any list."""
        return self._instances(self.rows[row])

    def image_semantic(self, image: int) -> Labels:
        """A whole image's mask: (height, width), uint8; raises CacheError without one."""
        return self._semantic(self.images[image]) if self.recipe.in_parts else self.semantic(image)

    def image_instances(self, image: int) -> tuple[Instance, ...]:
        """A whole image's objects in its pixels; raises CacheError without any list."""
        return self._instances(self.images[image]) if self.recipe.in_parts else self.instances(image)

    def image_id(self, image: int) -> int | str:
        """What the set's own annotation calls an image; its number from 1 where `own_ids` is False."""
        return self._image_ids[image] if self.own_ids else image + 1

    @property
    def own_ids(self) -> bool:
        """Whether the set's own annotation tells all images apart; not so where several files count from 0 each."""
        return None not in self._image_ids and len(set(self._image_ids)) == len(self.images)

    @cached_property
    def _image_ids(self) -> list[Any]:
        return [self._image_id(image) if image.instances else None for image in self.images]

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
        """What is said of labels that no featprobe wrote."""
        return CacheError(f"{self.path}: the labels of {row.id!r} are none that featprobe writes. {error}")

    def _read_all(self, name: str, dtype: str) -> NDArray:
        extent = self.contents.extents[name]
        data = self.contents.file.read(extent.offset, extent.row_bytes * extent.rows)
        return np.frombuffer(data, dtype=dtype).reshape(extent.rows, -1)

    def stored_checksums(self) -> NDArray[np.uint64]:
        """xxh3_64 of each row's level, as written: (rows, levels)."""
        return self._read_all("checksum", "<u8")

    def stored(self, row: int, level: FeatureLevel) -> dict[str, NDArray]:
        """All that is kept of a row for a level, as it lies there: what `CacheWriter.write` takes of one row."""
        found = {}
        for table in level_tables(self.recipe, level):
            extent = self.contents.extents[table.name]
            data = self.contents.file.read(extent.offset + row * extent.row_bytes, extent.row_bytes)
            found[table.key] = np.frombuffer(data, dtype=table.dtype).reshape(table.shape)
        return found

    def read_row(self, row: int, level: FeatureLevel) -> NDArray:
        """One row of one level in its stored format, (channels, height, width); of int8 the fp16 that it stands for.

        Raises CacheError for a bad one.
        """
        stored = self.stored(row, level)
        self.check(np.array([row]), level, *(own[None] for own in stored.values()))
        features, *scales = stored.values()
        if not scales:
            return features
        scale, zero = scales[0].T[..., None, None]
        return (zero + scale * features).astype(np.float16)

    def check(self, rows: NDArray[np.intp], level: FeatureLevel, *stored: NDArray) -> None:
        """Hash what was read of some rows of a level, each row the first time that this process reads it.

        stored: what `level_tables` names, in that order, (rows, …) each. Any thread may call it. Raises CacheError for
        a row that is not what was written, CacheIncompleteError for one that is missing.
        """
        column = self._columns[level.name]
        if self._hashed[rows, column].all():
            return
        for row, *parts in zip(rows.tolist(), *stored, strict=True):
            if not self._hashed[row, column]:
                self._compare(row, column, checksum(parts))
                self._hashed[row, column] = True

    @cached_property
    def _hashed(self) -> NDArray[np.bool_]:
        """Which rows' levels this process has hashed: the same array for all that hold the file open."""
        status = self.contents.file.status
        own = np.zeros((len(self), len(self.levels)), dtype=np.bool_)
        with _one_at_a_time:
            return _files.setdefault((status.st_dev, status.st_ino), own)

    def _compare(self, row: int, column: int, found: int) -> None:
        """Raise CacheError where a row's checksum, as it is just now, is not the one found."""
        extent = self.contents.extents["checksum"]
        data = self.contents.file.read(extent.offset + row * extent.row_bytes, extent.row_bytes)
        wanted = int(np.frombuffer(data, dtype="<u8")[column])
        if found == wanted:
            return
        name, state = f"row {row}, {self.rows.texts['id'][row]!r}", self.done[row]
        if state != WHOLE:  # as it is before its bytes change
            raise CacheIncompleteError(
                f"{self.path}: {name}, is {'unreadable' if state == UNREADABLE else 'missing'} just now.\n"
                f"Finish the file, then run the same command again:  {self.contents.command}"
            )
        raise CacheError(
            f"{self.path} is damaged: the features of {name}, are not what was written.\n"
            f"  wanted  {self.levels[column].name}, xxh3_64 {wanted:016x}\n  found   {found:016x}\n"
            "The file was not changed. See all that is bad in it, then have that computed again:\n"
            f"  featprobe cache verify {shlex.quote(str(self.path))}\n  {self.contents.command}"
        )


def open_cache(path: str | os.PathLike[str]) -> Cache:
    """Open a cache for reading and check what is written once; raises CacheError.

    Labels are checked when a row's are used first, features by whoever reads them.
    """
    path = Path(path)
    contents = read_contents(path)
    if contents.damaged:
        raise CacheError(
            f"{path} is damaged: its rows or targets are not what was written ({', '.join(contents.damaged)}).\n"
            f"Nothing was changed. See what is bad:  featprobe cache verify {shlex.quote(str(path))}\n"
            f"and mend it from the images:  {contents.command}"
        )
    return Cache(path, contents)


@dataclass(frozen=True)
class Damage:
    """What `verify` found: a row's level or target that does not hash to what was written; row -1: not of one row."""

    row: int
    id: str
    part: str


def verify(path: Path) -> Iterator[Damage | int]:
    """Hash every row, level and target again, and all else that is written once.

    Yields a Damage for each that is not what was written, and after each level's row its bytes.
    """
    contents = read_contents(path)
    parts = contents.damaged_parts()
    targets = [] if "targets/checksum" in parts else contents.damaged_targets()
    for row in targets:
        yield Damage(row, contents.rows.texts["id"][row], "targets")
    for part in parts:
        if not (targets and part in ("targets/semantic", "targets/instances", "identity")):  # rows say more
            yield Damage(-1, "", f"identity (recipe, data set, ids, splits or sizes): {part}")
    cache = Cache(path, contents)
    whole = np.flatnonzero(cache.done == WHOLE)
    expected, ids = cache.stored_checksums(), contents.rows.texts["id"]
    for column, level in enumerate(cache.levels):
        for row in whole.tolist():
            kept = list(cache.stored(row, level).values())
            if checksum(kept) != int(expected[row, column]):
                yield Damage(row, ids[row], f"features/{level.name}")
            yield sum(own.nbytes for own in kept)


def damaged_rows(found: Sequence[Damage]) -> list[int]:
    """Rows whose features must be computed again."""
    return sorted({damage.row for damage in found if damage.part.startswith("features/")})
