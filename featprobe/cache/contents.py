"""What a cache file holds beside its features, read and checked without HDF5.

All that comes out of a file is taken for anybody's: each size, type and shape is held against the file's length and
against its recipe before it is used. Files of versions 1 and 2 go through featprobe.cache.legacy, which gives the same.
"""

import hashlib
import os
import re
import shlex
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featprobe.cache import header
from featprobe.cache.checked_values import check_objects, data_of, provenance_of, recipe_of
from featprobe.cache.header import Entry, FormatFault, Index, NewerFormat, parse_json, short
from featprobe.cache.layout import FREE, UNREADABLE, Extent, Shapes, most_bytes, most_texts, part_shapes, table_shapes
from featprobe.cache.rows import TARGET_KINDS, TEXT_FIELDS, Blob, RowTable, Targets, Texts
from featprobe.disk import open_regular
from featprobe.errors import CacheError, FileKindError
from featprobe.geometry import IDENTITY, TURNS
from featprobe.specs import FILE_VERSION, MOST_SIDE, DataInfo, FeatureRecipe

HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
LABELS = {f"{group}/{kind}" for group in ("targets", "images") for kind in TARGET_KINDS}
"""Parts that are read row by row, when labels are used."""
SINCE_VERSION_3 = {"rows/affine", "images/checksum"}  # parts that no reader needs of an older file, or it has not
PIECE = 1 << 22  # bytes that are hashed at once
VIEW = re.compile(rf"{IDENTITY}|{'|'.join(TURNS)}|crop\d+")
FAULTS = (
    OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, MemoryError, OverflowError,
)  # fmt: skip


class HeldFile:
    """A regular file, open for as long as this object lives, whatever its name comes to mean."""

    def __init__(self, path: Path) -> None:
        """Raises CacheError where there is none."""
        self.path = path
        try:
            self.handle = open_regular(path)
        except FileNotFoundError as error:
            raise CacheError(f"There is no cache {path}.") from error
        except (OSError, FileKindError) as error:
            raise CacheError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}") from error
        weakref.finalize(self, os.close, self.handle)
        self.status = os.fstat(self.handle)

    def read(self, offset: int, count: int) -> bytes:
        """So many bytes. Raises CacheError where the file has ended before."""
        data = os.pread(self.handle, count, offset)
        while len(data) < count:
            more = os.pread(self.handle, count - len(data), offset + len(data))
            if not more:
                end = offset + len(data)
                raise CacheError(
                    f"{self.path} ended while it was read, at byte {end}. Was it cut short?\n{_remove(self.path)}"
                )
            data += more
        return data


@dataclass(frozen=True)
class Span:
    """A part of a file, whose bytes are read when they are asked for."""

    file: HeldFile
    entry: Entry

    def __len__(self) -> int:
        return self.entry.size

    def __getitem__(self, index: slice, /) -> bytes:
        start, stop, _ = index.indices(self.entry.size)
        return self.file.read(self.entry.offset + start, max(0, stop - start))

    def sha256(self) -> str:
        """Of all of it, some at a time."""
        running = hashlib.sha256()
        for start in range(0, len(self), PIECE):
            running.update(self[start : start + PIECE])
        return running.hexdigest()


@dataclass(frozen=True)
class Contents:
    """All of a cache file but its features, as read once when it is opened.

    index: what its header says; that of an older file is made up. images: what the rows are parts of, placed as they
    are; None where rows are images.
    damaged: parts that are not what was written, of those that were hashed when the file was opened: all but labels.
    file: that very one, held open. labels: by part, where they lie and their sha256; none of an older file, all of
    which is hashed when it is opened.
    """

    index: Index
    recipe: FeatureRecipe
    data: DataInfo
    provenance: Mapping[str, Any]
    rows: RowTable
    images: RowTable | None
    extents: Mapping[str, Extent]
    damaged: tuple[str, ...]
    file: HeldFile
    labels: Mapping[str, tuple[Span, str]]

    @property
    def version(self) -> int:
        """Of the file."""
        return self.index.version

    @property
    def identity_sha256(self) -> str:
        """Over all that was written once, as the file says."""
        return self.index.identity_sha256

    @property
    def inode(self) -> int:
        """Of the file that was read."""
        return self.file.status.st_ino

    @property
    def command(self) -> str:
        """The command line that makes this cache, and goes on with it or mends it."""
        short = f"featprobe extract --backbone {self.recipe.label} --data {self.data.name}"
        return str(self.provenance.get("command", short))

    def damaged_targets(self) -> list[int]:
        """Rows whose targets do not hash to what was written."""
        return self.rows.damaged()

    def damaged_parts(self) -> list[str]:
        """Names of what was written once and is not what was written: all is hashed."""
        return [*self.damaged, *(name for name, (span, sha256) in self.labels.items() if span.sha256() != sha256)]

    def is_intact(self) -> bool:
        """Whether recipe, data set, rows and targets hash to what was written."""
        return not self.damaged_parts()


def read_contents(path: Path) -> Contents:
    """Read a cache file's identity and where its bytes lie; raises CacheError.

    Whether all of it is what was written is left to `Contents.damaged` and `Contents.is_intact`, so that a damaged
    file can be named and repaired.
    """
    file = HeldFile(path)
    with _letters(path):
        if _is_old(file):
            from featprobe.cache.legacy import read_old

            values, parts = read_old(file)
            return _parse(file, Index.of(values, values["version"]), parts)
        index, sealed = _header(file)
        contents = _parse(file, index, {name: Span(file, entry) for name, entry in index.parts.items()})
        return contents if sealed else replace(contents, damaged=("header", *contents.damaged))


def read_states(path: Path) -> tuple[FeatureRecipe, NDArray[np.uint8], int]:
    """A cache's recipe, `done` of each row as it stands there, and the version, of its header alone.

    Raises CacheError.
    """
    file = HeldFile(path)
    with _letters(path):
        if _is_old(file):
            contents = read_contents(path)
            recipe, done = contents.recipe, contents.extents["done"]
            return recipe, np.frombuffer(contents.file.read(done.offset, done.rows), np.uint8), contents.version
        index, sealed = _header(file)
        recipe, _ = _checked(file, index)
        if not sealed:
            raise FormatFault("a header whose sha256 holds", "another sha256: it is damaged")
        return recipe, np.frombuffer(file.read(index.tables["done"].offset, index.rows), np.uint8), index.version


def _is_old(file: HeldFile) -> bool:
    """Whether a file is HDF5 from its first byte on, as versions 1 and 2 are."""
    return file.read(0, min(len(HDF5_SIGNATURE), file.status.st_size)) == HDF5_SIGNATURE


def _header(file: HeldFile) -> tuple[Index, bool]:
    """The index of a file of version 3, and whether its header is what was written."""
    start = file.read(0, min(header.FIXED.size, file.status.st_size))
    return header.decode(start, file.read(header.FIXED.size, header.json_bytes(start)))


@contextmanager
def _letters(path: Path) -> Iterator[None]:
    """Turn what is wrong with a file into a CacheError that names it."""
    try:
        yield
    except NewerFormat as error:
        raise CacheError(
            f"{path} is of a newer format than this featprobe reads.\n"
            f"  wanted  {error.wanted}\n  found   {error.found}\n"
            "Nothing was changed. Update featprobe:  pip install --upgrade featprobe"
        ) from error
    except FormatFault as error:
        raise _unopened(path, error.wanted, error.found) from error
    except FAULTS as error:
        found = f"{type(error).__name__}: {short(str(error))}"
        raise _unopened(path, f"a file of version {FILE_VERSION} or older", found) from error


def _unopened(path: Path, wanted: str, found: str) -> CacheError:
    return CacheError(
        f"{path} is not a feature cache that can be opened.\n  wanted  {wanted}\n  found   {found}\n{_remove(path)}"
    )


def _remove(path: Path) -> str:
    return f"Remove it: featprobe cache rm {shlex.quote(str(path))} --yes. Then run the extract command again."


def _parse(file: HeldFile, index: Index, parts: Mapping[str, Blob]) -> Contents:
    """The contents of a file, of its index and the bytes of its parts; those of labels are read when they are used.

    Raises FormatFault for what is not as cache/README.md says.
    """
    recipe, shapes = _checked(file, index)
    old = index.version < FILE_VERSION
    for name, most in most_bytes(index.rows, index.images).items():
        if len(parts[name]) > most:
            raise FormatFault(f"{name} of at most {most} bytes", f"{len(parts[name])} bytes")
    read = {name: parts[name][:] for name in shapes if name not in LABELS}
    damaged = [] if old else [name for name, data in read.items() if _sha256(data) != index.parts[name].sha256]
    if not old and index.identity() != index.identity_sha256:
        damaged.append("identity_sha256")
    try:
        made = _made(file, index, recipe, shapes, read, parts, tuple(damaged))
    except FormatFault as error:
        also = f"; {', '.join(damaged)} of the file is not what was written" if damaged else ""
        raise FormatFault(error.wanted, f"{error.found}{also}") from error
    return _told(_of_old_identity(made) if old else made)


def _checked(file: HeldFile, index: Index) -> tuple[FeatureRecipe, Shapes]:
    """The recipe, and type and shape of each part, of an index that is right as far as the file's length tells."""
    index.check_places(file.status.st_size)
    recipe, old = recipe_of(index.recipe), index.version < FILE_VERSION
    if recipe.key != index.recipe_key and not old:
        raise FormatFault(f"the recipe's own key, {recipe.key}", short(index.recipe_key))
    if index.rows < 1 or (index.images > 0) != recipe.in_parts:
        raise FormatFault("rows, and images where rows are parts of them", f"{index.rows} and {index.images}")
    shapes = part_shapes(recipe, index.rows, index.images)
    shapes = {name: shape for name, shape in shapes.items() if not (old and name in SINCE_VERSION_3)}
    _check_entries(index.parts, shapes)
    _check_entries(index.tables, table_shapes(recipe, index.rows))
    return recipe, shapes


def _made(
    file: HeldFile, index: Index, recipe: FeatureRecipe, shapes: Shapes, read: Mapping[str, bytes],
    parts: Mapping[str, Blob], damaged: tuple[str, ...],
) -> Contents:  # fmt: skip
    """`_parse`, of parts whose types and shapes are known to be right. read: of those that are read at once."""
    texts = parse_json(read["texts"], most_texts(index.rows, index.images), "texts")
    check_objects("texts", texts, ("data", "rows", "images")[: 2 + recipe.in_parts])
    provenance = provenance_of(parse_json(read["provenance"], header.MOST_VALUES, "provenance"))
    arrays = {
        name: np.frombuffer(data, shapes[name][0]).reshape(index.parts[name].shape)
        for name, data in read.items()
        if name not in ("texts", "provenance")
    }
    done = np.frombuffer(file.read(index.tables["done"].offset, index.rows), np.uint8)
    rows = _rows(index, texts["rows"], arrays, parts, recipe, done)
    images = _images(index, texts["images"], arrays, parts) if recipe.in_parts else None
    if images is not None:
        _check_parts(arrays, rows, images)
    extents = {name: Extent(own.offset, own.size // index.rows, index.rows) for name, own in index.tables.items()}
    hashed = LABELS if index.version == FILE_VERSION else set()  # older files have hashes of rows alone
    labels = {n: (own, index.parts[n].sha256) for n, own in parts.items() if n in hashed and isinstance(own, Span)}
    return Contents(index, recipe, data_of(texts["data"]), provenance, rows, images, extents, damaged, file, labels)


def _told(contents: Contents) -> Contents:
    """The same contents, whose rows know what to say of labels that are damaged."""
    mending = (
        f"  file    {contents.file.path}\nNothing was changed. See what is bad:  featprobe cache verify FILE\n"
        f"and mend it from the images:  {contents.command}"
    )
    images = contents.images and replace(contents.images, mending=mending)
    return replace(contents, rows=replace(contents.rows, mending=mending), images=images)


def _of_old_identity(contents: Contents) -> Contents:
    """The contents of a file of version 1 or 2, whose identity covers all rows and labels."""
    from featprobe.cache.legacy import old_identity

    return contents if old_identity(contents) == contents.identity_sha256 else replace(contents, damaged=("identity",))


def _check_entries(entries: Mapping[str, Entry], shapes: Shapes) -> None:
    """Raise FormatFault unless there is an entry of each name, of its type and shape, and none else that is needed."""
    for name, (dtype, shape) in shapes.items():
        if name not in entries:
            raise FormatFault(f"{name}", "none")
        entry = entries[name]
        wanted = tuple(entry.size if own == FREE else own for own in shape)
        size = np.dtype(dtype).itemsize
        for own in wanted:
            size *= own
        if (entry.dtype, entry.shape, entry.size) != (dtype, wanted, size):
            found = f"{entry.dtype} of shape {list(entry.shape)} in {entry.size} bytes"
            raise FormatFault(f"{name}: {dtype} of shape {list(wanted)}", short(found))
    unknown = [name for name, entry in entries.items() if name not in shapes and entry.required]
    if unknown:
        raise NewerFormat("parts and tables that this featprobe knows", short(unknown))


def _rows(
    index: Index, texts: Any, arrays: Mapping[str, NDArray], parts: Mapping[str, Blob], recipe: FeatureRecipe,
    done: NDArray[np.uint8],
) -> RowTable:  # fmt: skip
    names = (*TEXT_FIELDS, "view") if recipe.in_parts else TEXT_FIELDS
    original, content = _sizes(arrays, "rows/original_size"), _sizes(arrays, "rows/content_size")
    outside = (content > np.array(recipe.frame)).any(1)
    if (outside & (done != UNREADABLE)).any():
        raise FormatFault(f"images scaled to at most the frame of {recipe.frame}", f"{content[outside][0].tolist()}")
    return RowTable(
        _columns(texts, names, index.rows, "rows"), original, content, recipe.frame,
        _targets(arrays, parts, "targets"), arrays["targets/checksum"], arrays.get("rows/part"),
        arrays.get("rows/image_index"),
    )  # fmt: skip


def _images(index: Index, texts: Any, arrays: Mapping[str, NDArray], parts: Mapping[str, Blob]) -> RowTable:
    size = _sizes(arrays, "images/size")
    columns, targets = _columns(texts, TEXT_FIELDS, index.images, "images"), _targets(arrays, parts, "images")
    return RowTable(columns, size, size, None, targets, arrays.get("images/checksum"))


def _columns(texts: Any, names: Sequence[str], count: int, what: str) -> dict[str, Texts]:
    """The texts of rows or images, as many of each as there are of these."""
    for name in names:
        column = texts.get(name)
        if not isinstance(column, list) or len(column) != count or set(map(type, column)) != {str}:
            raise FormatFault(f"{count} texts {name} of the {what}", short(column))
    if len(set(texts["id"])) < count:
        raise FormatFault(f"{count} different ids of the {what}", f"{len(set(texts['id']))} of them")
    return {name: Texts(texts[name]) for name in names}


def _sizes(arrays: Mapping[str, NDArray], name: str) -> NDArray[np.int32]:
    sizes = arrays[name]
    if sizes.min() < 1 or sizes.max() > MOST_SIDE:
        raise FormatFault(f"{name}: pixels from 1 to {MOST_SIDE}", f"{sizes.min()} to {sizes.max()}")
    return sizes


def _targets(arrays: Mapping[str, NDArray], parts: Mapping[str, Blob], group: str) -> dict[str, Targets]:
    found = {}
    for kind in TARGET_KINDS:
        blob, offsets = parts[f"{group}/{kind}"], arrays[f"{group}/{kind}_offset"]
        if offsets[0] != 0 or offsets[-1] != len(blob) or (offsets[1:] < offsets[:-1]).any():
            raise FormatFault(f"{group}/{kind}_offset: from 0 up to {len(blob)}", "other offsets")
        found[kind] = Targets(blob, offsets.astype(np.uint32) if len(blob) < 1 << 32 else offsets)
    return found


def _check_parts(arrays: Mapping[str, NDArray], rows: RowTable, images: RowTable) -> None:
    """Raise FormatFault unless each row is a part of its image, of its group and split, one image after another."""
    index, boxes = arrays["rows/image_index"], arrays["rows/part"].astype(np.int64)  # left, top, height, width
    if index.min() < 0 or index.max() >= len(images):
        raise FormatFault(f"rows that are parts of {len(images)} images", f"image {index.min()} to {index.max()}")
    if np.count_nonzero(np.diff(index)) + 1 != len(np.unique(index)):
        raise FormatFault("rows of an image that follow one another", "others between them")
    starts, sides = boxes[:, 1::-1], boxes[:, 2:]  # (rows, 2), as sizes are
    if (starts < 0).any() or (sides < 1).any() or (starts + sides > images.original[index]).any():
        raise FormatFault("rows/part: rectangles inside of their images", "others")
    views = rows.column("view")
    strange = sorted(view for view in set(views) if not VIEW.fullmatch(view))
    if strange:
        raise FormatFault("rows/view: views that are known", short(strange))
    turned = np.array([view == "rot90" for view in views])[:, None]
    if (np.where(turned, sides[:, ::-1], sides) != rows.original).any():
        raise FormatFault("rows/original_size: what rows/part and rows/view show", "other sizes")
    for name in ("group", "split"):
        own = images.column(name)
        if [own[image] for image in index.tolist()] != rows.column(name):
            raise FormatFault(f"rows of the {name} of their images", "others")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
