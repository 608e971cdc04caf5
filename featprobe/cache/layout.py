"""The layout of a cache file, and how a file is made.

The normative description is cache/README.md. Only this module makes files, through HDF5; reading needs no HDF5.
"""

import errno
import hashlib
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featprobe.cache import header
from featprobe.cache.header import FILE_VERSION, Entry, Index
from featprobe.cache.rows import TARGET_KINDS, TEXT_FIELDS, Row, target_checksums
from featprobe.errors import CacheError, ShapeError
from featprobe.image_labels import encode
from featprobe.io.disk import make_folders, sync_folder, temporary_name
from featprobe.levels import FeatureLevel
from featprobe.machine import human_bytes
from featprobe.specs import DataInfo, FeatureRecipe

if TYPE_CHECKING:
    import h5py

FORMAT = "featprobe-cache"
ALIGNMENT = 4096  # bytes: what O_DIRECT asks for
REASON_BYTES = 240
MISSING, WHOLE, UNREADABLE = 0, 1, 2
STORED_AS: Mapping[str, str] = {"fp16": "<f2", "fp32": "<f4", "bf16": "<u2", "int8": "u1"}
ESCAPED = {ord(mark): f"\\u{ord(mark):04x}" for mark in "[{,"}  # in texts of JSON
MOST_JSON, MOST_TEXT = 1 << 24, 1 << 16  # bytes of a JSON, and further bytes per row and per image
LABELS_PART = "labels"  # of whole images: the one part that a reader may ignore
FREE = -1  # a length that nothing else determines
Shapes = dict[str, tuple[str, tuple[int, ...]]]  # name -> dtype, shape


@dataclass(frozen=True)
class Extent:
    """The place of a dataset in the file, in bytes: its offset, the bytes per row, and the number of rows."""

    offset: int
    row_bytes: int
    rows: int


@dataclass(frozen=True)
class Table:
    """An array that holds one entry per row for a level. dtype, shape: of one row. key: its name in `maps`."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def key(self) -> str:
        """The level's name for a table of features, the table's name for others (scales)."""
        return self.name.removeprefix("features/")

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


def level_tables(recipe: FeatureRecipe, level: FeatureLevel) -> tuple[Table, ...]:
    """The tables of one level, features first, in the order in which a row's checksum covers them."""
    if recipe.store == "pooled":
        return (Table(f"features/{level.name}", STORED_AS["fp32"], (2, level.channels)),)
    features = Table(f"features/{level.name}", STORED_AS[recipe.dtype], (level.channels, *level.cells(recipe.frame)))
    if recipe.dtype != "int8":
        return (features,)
    return features, Table(f"scales/{level.name}", "<f4", (level.channels, 2))


def row_tables(recipe: FeatureRecipe) -> dict[str, tuple[Table, ...]]:
    """`level_tables` per level, by the level's name."""
    return {level.name: level_tables(recipe, level) for level in recipe.levels}


def table_shapes(recipe: FeatureRecipe, rows: int) -> Shapes:
    """Type and shape of every table of a file, by name. Tables are written row by row."""
    kept = [table for tables in row_tables(recipe).values() for table in tables]
    return {
        **{table.name: (table.dtype, (rows, *table.shape)) for table in kept},
        "done": ("u1", (rows,)),
        "checksum": ("<u8", (rows, len(recipe.levels))),
        "reason": (f"S{REASON_BYTES}", (rows,)),
    }


def part_shapes(recipe: FeatureRecipe, rows: int, images: int, labels: int = 0) -> Shapes:
    """Type and shape of every part of a file, by name. Parts are written once. FREE stands for a free length.

    labels: the number of names of labels of images; 0 where the set has no such labels.
    """
    shapes: Shapes = {
        "texts": ("u1", (FREE,)),
        "provenance": ("u1", (FREE,)),
        "rows/original_size": ("<i4", (rows, 2)),
        "rows/content_size": ("<i4", (rows, 2)),
        "rows/affine": ("<f8", (rows, 2, 3)),
        **_target_shapes("targets", rows),
    }
    if recipe.in_parts:
        shapes |= {"rows/part": ("<i4", (rows, 4)), "rows/image_index": ("<i4", (rows,))}
        shapes |= {"images/size": ("<i4", (images, 2)), **_target_shapes("images", images)}
    return shapes | ({LABELS_PART: ("u1", (images or rows, labels))} if labels else {})


def _target_shapes(group: str, rows: int) -> Shapes:
    shapes: Shapes = {f"{group}/{kind}": ("u1", (FREE,)) for kind in TARGET_KINDS}
    shapes |= {f"{group}/{kind}_offset": ("<u8", (rows + 1,)) for kind in TARGET_KINDS}
    return shapes | {f"{group}/checksum": ("<u8", (rows, len(TARGET_KINDS)))}


def most_bytes(rows: int, images: int) -> dict[str, int]:
    """The most bytes that each JSON part may have. Parsed JSON takes several times as much memory."""
    return {"texts": MOST_JSON + MOST_TEXT * (rows + images), "provenance": MOST_JSON}


def most_texts(rows: int, images: int) -> int:
    """The most values that the JSON of a file's texts may hold."""
    return header.MOST_VALUES + (len(TEXT_FIELDS) + 1) * (rows + images)


def create_file(
    path: Path,
    recipe: FeatureRecipe,
    data: DataInfo,
    rows: Sequence[Row],
    provenance: Mapping,
    images: Sequence[Row] = (),
) -> bool:
    """Put a new cache in place, with space for its features and all rows missing; False when the name is taken.

    images: the whole images whose parts the rows show; empty where each row is an image.

    The file appears under its name whole or not at all. Raises CacheError when the folder can't be
    written or the disk can't hold it; no part of it is left behind then.
    """
    temporary = make_temporary(path, recipe, data, rows, provenance, images)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        raise CacheError(
            f"The cache {path} can't be put in place: the file system of its folder makes no hard links "
            f"({error.strerror}).\nNothing was changed. Choose another disk:  featprobe --workspace DIR extract …"
        ) from error
    finally:
        temporary.unlink()
    sync_folder(path.parent)
    return True


def make_temporary(
    path: Path,
    recipe: FeatureRecipe,
    data: DataInfo,
    rows: Sequence[Row],
    provenance: Mapping,
    images: Sequence[Row] = (),
) -> Path:
    """A complete cache file without features, under a unique name beside `path`; see create_file."""
    try:
        make_folders(path.parent)
        temporary = path.parent / temporary_name(path.stem)
        handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except OSError as error:
        raise CacheError(
            f"The cache {path} can't be made: its folder can't be written ({error.strerror}).\n"
            "Nothing was changed. Choose another place:  featprobe --workspace DIR extract …"
        ) from error
    try:
        with open(handle, "wb", buffering=0) as stream:
            _fill(stream, recipe, data, rows, provenance, images)
            os.fsync(handle)
    except OSError as error:
        temporary.unlink()
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        wanted = f"\n  wanted  {human_bytes(recipe.row_bytes * len(rows))} of free disk" if full else ""
        raise CacheError(
            f"The cache {path} can't be made: {error.strerror or error}.{wanted}\nNothing was changed."
        ) from error
    except BaseException:
        temporary.unlink()
        raise
    return temporary


def replace_file(temporary: Path, path: Path) -> None:
    """Swap a finished temporary file in; readers that hold the old file keep it."""
    os.replace(temporary, path)
    sync_folder(path.parent)


def _fill(
    stream: io.RawIOBase,
    recipe: FeatureRecipe,
    data: DataInfo,
    rows: Sequence[Row],
    provenance: Mapping,
    images: Sequence[Row],
) -> None:
    """Write a new file: HDF5's structure, the parts, the first state of each row, and last the header."""
    parts = _parts(recipe, data, rows, provenance, images)
    index, drawn = _drawn(recipe, _index(recipe, parts, len(rows), len(images)))
    states = np.array([UNREADABLE if row.reason else MISSING for row in rows], dtype="u1")
    reasons = np.array([encode_reason(row.reason) for row in rows], dtype=f"S{REASON_BYTES}")
    _allocate_disk(stream.fileno(), drawn.size)
    for offset, piece in drawn.pieces:
        _put(stream, offset, piece)
    for name, array in {**parts, "done": states, "reason": reasons}.items():
        _put(stream, {**index.parts, **index.tables}[name].offset, array.tobytes())
    _put(stream, 0, header.encode(index))


def _put(stream: io.RawIOBase, offset: int, data: bytes) -> None:
    stream.seek(offset)
    view = memoryview(data)
    while view:
        view = view[stream.write(view) or 0 :]


class _Drawing(io.RawIOBase):
    """A file in memory that holds only the pieces that were written, as (offset, bytes), in the order of writing.

    HDF5 writes into it, and never to a disk, because it gives no clear error when a disk refuses.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[tuple[int, bytes]] = []
        self.size = self.place = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self.place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.size}[whence]
        return self.place

    def tell(self) -> int:
        return self.place

    def truncate(self, size: int | None = None, /) -> int:
        self.size = self.place if size is None else size
        return self.size

    def write(self, data: Any, /) -> int:
        self.pieces.append((self.place, bytes(data)))
        self.place += len(data)
        self.size = max(self.size, self.place)
        return len(data)

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        view[:] = bytes(len(view))
        for offset, piece in self.pieces:
            start, stop = max(offset, self.place), min(offset + len(piece), self.place + len(view))
            if start < stop:
                view[start - self.place : stop - self.place] = piece[start - offset : stop - offset]
        self.place += len(view)
        return len(view)


def _drawn(recipe: FeatureRecipe, index: Index) -> tuple[Index, _Drawing]:
    """The index with the place of each array, and HDF5's structure of a file that holds them, without their values."""
    import h5py

    drawing, how = _Drawing(), {"alignment_threshold": ALIGNMENT, "alignment_interval": ALIGNMENT}
    with h5py.File(drawing, "w", userblock_size=index.block, **how) as file:
        file.attrs["format"] = np.bytes_(FORMAT)
        file.attrs["version"] = FILE_VERSION
        file.attrs["recipe"] = np.bytes_(json.dumps(recipe.to_json()))
        file.attrs["recipe_key"] = np.bytes_(recipe.key)
        file.attrs["identity_sha256"] = np.bytes_(index.identity_sha256)
        parts = {name: _placed(file, name, entry) for name, entry in index.parts.items()}
        tables = {name: _placed(file, name, entry) for name, entry in index.tables.items()}
        for level in recipe.levels:
            dataset = file[f"features/{level.name}"]
            dataset.attrs["stride"] = level.stride
            dataset.attrs["dtype"] = np.bytes_("fp32" if recipe.store == "pooled" else recipe.dtype)
    return replace(index, parts=parts, tables=tables), drawing


def _index(recipe: FeatureRecipe, parts: Mapping[str, NDArray], rows: int, images: int) -> Index:
    """The index of a new file, still without the places of parts and tables."""
    labels = parts[LABELS_PART].shape[1] if LABELS_PART in parts else 0
    entries = {}
    for name, (dtype, _) in part_shapes(recipe, rows, images, labels).items():
        array, required = parts[name], name != LABELS_PART
        entries[name] = Entry(0, array.nbytes, dtype, array.shape, hashlib.sha256(array.data).hexdigest(), required)
    tables = {
        name: Entry(0, int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize, dtype, shape)
        for name, (dtype, shape) in table_shapes(recipe, rows).items()
    }
    index = Index(FILE_VERSION, recipe.to_json(), recipe.key, "0" * 64, rows, images, entries, tables)
    return replace(index, identity_sha256=index.identity(), block=header.block_for(index))


def _placed(file: "h5py.File", name: str, entry: Entry) -> Entry:
    """Make a dataset whose place is fixed at once and whose bytes HDF5 never writes; return its header entry."""
    import h5py

    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_layout(h5py.h5d.CONTIGUOUS)
    plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    kind = h5py.h5t.py_create(np.dtype(entry.dtype), logical=True)
    group, _, leaf = name.rpartition("/")
    parent = file.require_group(group) if group else file
    dataset = h5py.h5d.create(parent.id, leaf.encode(), kind, h5py.h5s.create_simple(entry.shape), plist)
    return replace(entry, offset=dataset.get_offset() if entry.size else file.userblock_size)


def _parts(
    recipe: FeatureRecipe, data: DataInfo, rows: Sequence[Row], provenance: Mapping, images: Sequence[Row]
) -> dict[str, NDArray]:
    """The arrays that are written once, by the names of `part_shapes`."""
    parts: dict[str, Any] = {
        "texts": _texts(recipe, data, rows, images),
        "provenance": np.frombuffer(json.dumps(dict(provenance)).encode(), dtype="u1"),
        "rows/original_size": [row.placement.original for row in rows],
        "rows/content_size": [row.placement.content for row in rows],
        "rows/affine": [row.placement.affine for row in rows],
        **_target_parts("targets", rows),
    }
    if recipe.in_parts:
        shown = [row.part for row in rows if row.part is not None]
        if len(shown) < len(rows) or any(not 0 <= row.image_index < len(images) for row in rows):
            raise ShapeError("Each row of a cache of tiles or views is a part of one of its images.")
        parts["rows/part"] = [(part.left, part.top, part.height, part.width) for part in shown]
        parts["rows/image_index"] = [row.image_index for row in rows]
        parts["images/size"] = [row.placement.original for row in images]
        parts |= _target_parts("images", images)
    names = data.label_names.names if data.label_names else ()
    if names:
        parts[LABELS_PART] = encode([row.labels for row in images or rows], len(names))
    shapes = part_shapes(recipe, len(rows), len(images), len(names))
    return {name: np.ascontiguousarray(parts[name], dtype).reshape(shape) for name, (dtype, shape) in shapes.items()}


def _target_parts(group: str, rows: Sequence[Row]) -> dict[str, Any]:
    parts: dict[str, Any] = {f"{group}/checksum": [target_checksums(row) for row in rows]}
    for kind in TARGET_KINDS:
        blobs = [getattr(row, kind) for row in rows]
        parts[f"{group}/{kind}"] = np.frombuffer(b"".join(blobs), dtype="u1")
        parts[f"{group}/{kind}_offset"] = np.cumsum([0, *map(len, blobs)], dtype="<u8")
    return parts


def _texts(recipe: FeatureRecipe, data: DataInfo, rows: Sequence[Row], images: Sequence[Row]) -> NDArray[np.uint8]:
    """The data set and the texts of rows and images as UTF-8 JSON."""
    of_rows = {name: [getattr(row, name) for row in rows] for name in TEXT_FIELDS}
    if recipe.in_parts:
        of_rows["view"] = [row.part.view if row.part else "" for row in rows]
    whole = {name: [getattr(row, name) for row in images] for name in TEXT_FIELDS}
    texts = {"data": data.to_json(), "rows": of_rows, **({"images": whole} if recipe.in_parts else {})}
    text = json.dumps(texts, separators=(",", ":"), ensure_ascii=False)
    if sum(map(text.count, "[{,")) > most_texts(len(rows), len(images)):  # inside texts they are escaped, not counted
        text = re.sub(r'"(?:[^"\\]|\\.)*"', lambda found: found[0].translate(ESCAPED), text)
    return np.frombuffer(text.encode(), dtype="u1")


def encode_reason(reason: str) -> bytes:
    """A reason as UTF-8, cut to REASON_BYTES between two characters."""
    return reason.encode()[:REASON_BYTES].decode(errors="ignore").encode()


def _allocate_disk(handle: int, size: int) -> None:
    """Reserve the file's bytes on the disk, so that a full disk is noticed now and not while features are written."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
    else:
        os.ftruncate(handle, size)
