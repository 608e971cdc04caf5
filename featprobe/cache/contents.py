"""Everything that a cache file holds beside its features, read and checked without HDF5.

No value of a file is trusted: each size, type and shape is compared with the file's length and with its recipe before
it is used. Files of versions 1 and 2 are read by featprobe.cache.legacy, which gives the same values.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featprobe.cache import header
from featprobe.cache.checked_values import check_objects, data_of, provenance_of, recipe_of
from featprobe.cache.header import FILE_VERSION, Entry, FormatFault, Index, NewerFormat, parse_json, short
from featprobe.cache.held_file import HeldFile, Span, removal, unknown
from featprobe.cache.layout import (
    FREE,
    LABELS_PART,
    UNREADABLE,
    Extent,
    Shapes,
    most_bytes,
    most_texts,
    part_shapes,
    table_shapes,
)
from featprobe.cache.rows import TARGET_KINDS, TEXT_FIELDS, Blob, RowTable, Targets
from featprobe.errors import CacheError
from featprobe.geometry import IDENTITY, MOST_SIDE, TURNS
from featprobe.image_labels import MOST_NAMES, UNKNOWN
from featprobe.io.packed_texts import Texts
from featprobe.specs import DataInfo, FeatureRecipe

HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
LABELS = {f"{group}/{kind}" for group in ("targets", "images") for kind in TARGET_KINDS}
"""Parts that are read row by row, when a row's labels are used."""
SINCE_VERSION_3 = {"rows/affine", "images/checksum"}  # parts that no reader needs of an older file, or it has not
VIEW = re.compile(rf"{IDENTITY}|{'|'.join(TURNS)}|crop\d+")
FAULTS = (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, OverflowError)


@dataclass(frozen=True)
class Contents:
    """Everything in a cache file but its features, read once when the file is opened.

    index: the values of its header; for a file of version 1 or 2 they are made from the file's structure.
    images: the whole images whose parts the rows show, with their placement; None where each row is an image.
    damaged: names of the damaged parts, among those that are hashed when the file is opened (all but labels).
    file: the open file. labels: per part of labels, where it lies and its sha256; empty for versions 1 and 2, whose
    labels are hashed when the file is opened. image_labels: (images, names), see `ImageTruth.values`; None where the
    set has no labels of images.
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
    image_labels: NDArray[np.uint8] | None = None

    def __repr__(self) -> str:
        damaged = f", damaged: {', '.join(self.damaged)}" if self.damaged else ""
        return f"Contents(version {self.version}, {self.rows!r}{damaged}; {str(self.file.path)!r})"

    @property
    def version(self) -> int:
        """The format version of the file."""
        return self.index.version

    @property
    def identity_sha256(self) -> str:
        """The sha256 over all that was written once, as the header states it."""
        return self.index.identity_sha256

    @property
    def inode(self) -> int:
        """The inode number of the open file."""
        return self.file.status.st_ino

    @property
    def command(self) -> str:
        """The command line that makes, completes or repairs this cache."""
        short = f"featprobe extract --backbone {self.recipe.label} --data {self.data.name}"
        return str(self.provenance.get("command", short))

    def damaged_targets(self) -> list[int]:
        """Indices of rows whose targets are not what was written, found by hashing them."""
        return self.rows.damaged()

    def damaged_parts(self) -> list[str]:
        """Names of the damaged parts among all that is written once. Hashes every part."""
        return [*self.damaged, *(name for name, (span, sha256) in self.labels.items() if span.sha256() != sha256)]

    def is_intact(self) -> bool:
        """Whether recipe, data set, rows and targets are what was written, found by hashing them."""
        return not self.damaged_parts()


def read_contents(path: Path) -> Contents:
    """Read everything in a cache file but its features. Raises CacheError.

    A damaged file is read too, so that it can be named and repaired: `Contents.damaged` and `Contents.is_intact` say
    whether it is what was written.
    """
    file = HeldFile(path)
    with _as_cache_error(path):
        if _is_old(file):
            from featprobe.cache.legacy import read_old

            values, parts = read_old(file)
            return _parse(file, Index.of(values, values["version"]), parts)
        index, sealed = _header(file)
        contents = _parse(file, index, {name: Span(file, entry) for name, entry in index.parts.items()})
        return contents if sealed else replace(contents, damaged=("header", *contents.damaged))


def read_states(path: Path) -> tuple[FeatureRecipe, NDArray[np.uint8], int]:
    """A cache's recipe, the stored state (`done`) of each row, and the format version. Reads little beside the header.

    Raises CacheError.
    """
    file = HeldFile(path)
    with _as_cache_error(path):
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
    """Whether HDF5 begins at the file's first byte, as in versions 1 and 2."""
    return file.read(0, min(len(HDF5_SIGNATURE), file.status.st_size)) == HDF5_SIGNATURE


def begins_as_cache(path: Path) -> bool:
    """Whether a file begins as caches of version 3 do, damaged ones too. Raises CacheError where there is no file."""
    file = HeldFile(path)
    return file.read(0, min(len(header.MAGIC), file.status.st_size)) == header.MAGIC


def _header(file: HeldFile) -> tuple[Index, bool]:
    """The index of a file of version 3, and whether its header is undamaged."""
    start = file.read(0, min(header.FIXED.size, file.status.st_size))
    return header.decode(start, file.read(header.FIXED.size, header.json_bytes(start)))


@contextmanager
def _as_cache_error(path: Path) -> Iterator[None]:
    """Turn any fault of a file into a CacheError that names the file."""
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
    except (OSError, MemoryError) as error:
        raise unknown(path, " ".join(str(error).split())[:200] or "no memory") from error
    except FAULTS as error:
        found = f"{type(error).__name__}: {short(str(error))}"
        raise _unopened(path, f"a file of version {FILE_VERSION} or older", found) from error


def _unopened(path: Path, wanted: str, found: str) -> CacheError:
    other = "Nothing was changed. It does not begin as a cache does: is it another file?  featprobe cache ls"
    advice = removal(path) if begins_as_cache(path) or _is_old(HeldFile(path)) else other
    return CacheError(
        f"{path} is not a feature cache that can be opened.\n  wanted  {wanted}\n  found   {found}\n{advice}"
    )


def _parse(file: HeldFile, index: Index, parts: Mapping[str, Blob]) -> Contents:
    """The contents of a file, from its index and the bytes of its parts. Labels are read later, when they are used.

    Raises FormatFault for all that differs from cache/README.md.
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
    return _with_mending(_of_old_identity(made) if old else made)


def _checked(file: HeldFile, index: Index) -> tuple[FeatureRecipe, Shapes]:
    """The recipe, and the type and shape of each part, once the index agrees with the file's length and the recipe."""
    index.check_places(file.status.st_size)
    recipe, old = recipe_of(index.recipe), index.version < FILE_VERSION
    if recipe.key != index.recipe_key and not old:
        raise FormatFault(f"the recipe's own key, {recipe.key}", short(index.recipe_key))
    if index.rows < 1 or (index.images > 0) != recipe.in_parts:
        raise FormatFault("rows, and images where rows are parts of them", f"{index.rows} and {index.images}")
    shapes = part_shapes(recipe, index.rows, index.images, _label_count(index))
    shapes = {name: shape for name, shape in shapes.items() if not (old and name in SINCE_VERSION_3)}
    _check_entries(index.parts, shapes)
    _check_entries(index.tables, table_shapes(recipe, index.rows))
    return recipe, shapes


def _made(
    file: HeldFile, index: Index, recipe: FeatureRecipe, shapes: Shapes, read: Mapping[str, bytes],
    parts: Mapping[str, Blob], damaged: tuple[str, ...],
) -> Contents:  # fmt: skip
    """`_parse`, where types and shapes are known to be right. read: the bytes of the parts that are read at once."""
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
    extents = {name: Extent(table.offset, table.size // index.rows, index.rows) for name, table in index.tables.items()}
    hashed = LABELS if index.version == FILE_VERSION else set()  # older files have hashes of rows alone
    labels = {n: (part, index.parts[n].sha256) for n, part in parts.items() if n in hashed and isinstance(part, Span)}
    data = data_of(texts["data"])
    own = _image_labels(data, arrays.get(LABELS_PART))
    return Contents(index, recipe, data, provenance, rows, images, extents, damaged, file, labels, own)


def _with_mending(contents: Contents) -> Contents:
    """The same contents, whose rows can say how damaged labels are repaired."""
    mending = (
        f"  file    {contents.file.path}\nNothing was changed. See what is bad:  featprobe cache verify FILE\n"
        f"and repair it from the images:  {contents.command}"
    )
    images = contents.images and replace(contents.images, mending=mending)
    return replace(contents, rows=replace(contents.rows, mending=mending), images=images)


def _of_old_identity(contents: Contents) -> Contents:
    """The contents of a file of version 1 or 2, whose identity covers all rows and labels."""
    from featprobe.cache.legacy import old_identity

    tables = [contents.rows, *([contents.images] if contents.images else [])]
    found = old_identity(contents.recipe, contents.data, contents.extents, tables)
    return contents if found == contents.identity_sha256 else replace(contents, damaged=("identity",))


def _label_count(index: Index) -> int:
    """The number of names of labels of images that a file's part claims; 0 without such a part. Raises FormatFault."""
    if LABELS_PART not in index.parts or index.version < FILE_VERSION:
        return 0
    shape = index.parts[LABELS_PART].shape
    if len(shape) != 2 or not 1 <= shape[1] <= MOST_NAMES:
        raise FormatFault(f"{LABELS_PART} of 1 to {MOST_NAMES} names", f"the shape {list(shape)}")
    return shape[1]


def _image_labels(data: DataInfo, stored: NDArray[np.uint8] | None) -> NDArray[np.uint8] | None:
    """The labels of images, where the set's names and the file's values fit each other. Raises FormatFault."""
    names, columns = data.label_names, 0 if stored is None else stored.shape[1]
    if (len(names.names) if names else 0) != columns:
        raise FormatFault(f"{LABELS_PART} for each name of label_names", f"{columns} for {short(names)}")
    if names is None or stored is None:
        return None
    unknown, held = (stored == UNKNOWN).sum(1), (stored == 1).sum(1)
    strange = ((stored > 1) & (stored != UNKNOWN)).any() or ((unknown > 0) & (unknown < columns)).any()
    if strange or (not names.multi and ((held != 1) & (unknown == 0)).any()):
        one = "" if names.multi else ", one of them 1"
        raise FormatFault(f"{LABELS_PART}: 0 and 1{one}, or {UNKNOWN} alone, for each image", "other values")
    return stored


def _check_entries(entries: Mapping[str, Entry], shapes: Shapes) -> None:
    """Raise FormatFault unless each name has an entry of its type and shape, and no other entry is required."""
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
    """The texts of rows or of images by field, one text per row or image in each field."""
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
    """Raise FormatFault unless each row is a part of its image, has its group and split, and rows of one image follow
    each other."""
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
        of_images = images.column(name)
        if [of_images[image] for image in index.tolist()] != rows.column(name):
            raise FormatFault(f"rows of the {name} of their images", "others")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
