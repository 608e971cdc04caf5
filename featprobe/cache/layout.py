"""The file: what stands where in it, how it is made, how its identity is read and checked.

The normative description is cache/README.md; this module is the only one that goes through HDF5.
"""

import errno
import hashlib
import itertools
import json
import os
import socket
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash
from numpy.typing import NDArray

from featprobe.errors import CacheError, ShapeError
from featprobe.geometry import Part, Placement, Size
from featprobe.machine import human_bytes
from featprobe.specs import CACHE_VERSION, DataInfo, FeatureRecipe

FORMAT = "featprobe-cache"
ALIGNMENT = 4096  # bytes: what O_DIRECT asks for
REASON_BYTES = 240
MISSING, WHOLE, UNREADABLE = 0, 1, 2
STORED_AS: Mapping[str, str] = {"fp16": "<f2", "fp32": "<f4", "bf16": "<u2"}
TARGET_KINDS = ("semantic", "instances")
TEXT_FIELDS = ("id", "group", "split", "image", "image_hash")


@dataclass(frozen=True)
class Row:
    """Who a row is: its sample, its image's bytes, its place in the frame, its labels.

    image: path below the data set's root. image_hash: xxh3_128 of the file. semantic: PNG bytes,
    instances: JSON bytes, each empty where the set has none. reason: why the row can't be read, or "".
    part: what the row shows of its image, None for all of it; placement and labels are the part's own then, and
    image_index says which of the cache's images it is a part of.
    """

    id: str
    group: str
    split: str
    image: str
    image_hash: str
    placement: Placement
    semantic: bytes = b""
    instances: bytes = b""
    reason: str = ""
    part: Part | None = None
    image_index: int = -1

    def show(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """What the row shows of its image's pixels, (height, width, …)."""
        return pixels if self.part is None else self.part.take(pixels)


@dataclass(frozen=True)
class Extent:
    """Where a dataset's bytes lie in the file: offset and bytes per row."""

    offset: int
    row_bytes: int
    rows: int


def identity_sha256(
    recipe: FeatureRecipe,
    data: DataInfo,
    rows: Sequence[Row],
    extents: Mapping[str, Extent],
    images: Sequence[Row] = (),
) -> str:
    """sha256 over all that is written once: recipe, data set, rows, targets, and where the rest has its place.

    The last because HDF5 does not guard its own bookkeeping: a flipped address would serve other rows.
    """
    running = hashlib.sha256()
    places = {name: asdict(extent) for name, extent in extents.items()}
    said = {name: value for name, value in asdict(data).items() if name != "bits" or value}  # older files lack it
    head = {"recipe": recipe.to_json(), "data": said, "extents": places}
    running.update(json.dumps(head, sort_keys=True, separators=(",", ":")).encode())
    for row in (*rows, *images):
        text = [getattr(row, name) for name in TEXT_FIELDS]
        sizes = [row.placement.original, row.placement.content, row.placement.frame]
        parts = [] if row.part is None else [astuple(row.part), row.image_index]
        running.update(json.dumps([text, sizes, *parts]).encode())
        for kind in TARGET_KINDS:
            blob = getattr(row, kind)
            running.update(len(blob).to_bytes(8, "little"))
            running.update(blob)
    return running.hexdigest()


def create_file(
    path: Path,
    recipe: FeatureRecipe,
    data: DataInfo,
    rows: Sequence[Row],
    provenance: Mapping,
    images: Sequence[Row] = (),
) -> bool:
    """Put a new cache in place, its features allocated and missing; False when the name is taken.

    images: the whole images that rows are parts of; none where rows are images.

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
    _sync_folder(path.parent)
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
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f".{path.stem}.{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    except OSError as error:
        raise CacheError(
            f"The cache {path} can't be made: its folder can't be written ({error.strerror}).\n"
            "Nothing was changed. Choose another place:  featprobe --workspace DIR extract …"
        ) from error
    try:
        _fill(temporary, recipe, data, rows, provenance, images)
        with temporary.open("r+b") as stream:
            _allocate_disk(stream.fileno(), temporary.stat().st_size)
            os.fsync(stream.fileno())
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
    _sync_folder(path.parent)


def remove_leftovers(path: Path) -> None:
    """Delete temporary files of this cache whose maker, on this host, is dead."""
    prefix = f".{path.stem}.{socket.gethostname()}-"
    for leftover in path.parent.glob(f".{path.stem}.*.tmp"):
        maker = leftover.name.removeprefix(prefix).split("-")[0]
        if leftover.name.startswith(prefix) and maker.isdigit() and not _alive(int(maker)):
            leftover.unlink(missing_ok=True)


def _fill(
    temporary: Path,
    recipe: FeatureRecipe,
    data: DataInfo,
    rows: Sequence[Row],
    provenance: Mapping,
    images: Sequence[Row],
) -> None:
    count = len(rows)
    with h5py.File(temporary, "w", locking=False, alignment_threshold=ALIGNMENT, alignment_interval=ALIGNMENT) as file:
        file.attrs["format"] = FORMAT
        file.attrs["version"] = recipe.version
        file.attrs["recipe"] = json.dumps(recipe.to_json())
        file.attrs["recipe_key"] = recipe.key
        file.attrs["data"] = json.dumps(asdict(data))
        file.attrs["provenance"] = json.dumps(dict(provenance))
        _write_texts(file, "rows", rows)
        file["rows/original_size"] = np.array([row.placement.original for row in rows], dtype="<i4").reshape(count, 2)
        file["rows/content_size"] = np.array([row.placement.content for row in rows], dtype="<i4").reshape(count, 2)
        file["rows/affine"] = np.array([row.placement.affine for row in rows], dtype="<f8").reshape(count, 2, 3)
        _write_blobs(file, "targets", rows)
        file["targets/checksum"] = np.array([target_checksums(row) for row in rows], dtype="<u8")
        if recipe.in_parts:
            _write_parts(file, rows, images)
        for level in recipe.levels:
            shape = (count, level.channels, *level.cells(recipe.frame))
            _contiguous(file, f"features/{level.name}", shape, STORED_AS[recipe.dtype])
            dataset = file[f"features/{level.name}"]
            dataset.attrs["stride"] = level.stride
            dataset.attrs["dtype"] = recipe.dtype
        _contiguous(file, "done", (count,), "u1")
        _contiguous(file, "checksum", (count, len(recipe.levels)), "<u8")
        _contiguous(file, "reason", (count,), f"S{REASON_BYTES}")
        file["done"][...] = np.array([UNREADABLE if row.reason else MISSING for row in rows], dtype="u1")
        file["checksum"][...] = 0
        file["reason"][...] = np.array([encode_reason(row.reason) for row in rows], dtype=f"S{REASON_BYTES}")
        file.attrs["identity_sha256"] = identity_sha256(recipe, data, rows, _extents(file, recipe), images)


def _write_texts(file: h5py.File, group: str, rows: Sequence[Row]) -> None:
    for name in TEXT_FIELDS:
        texts = [getattr(row, name) for row in rows]
        file.create_dataset(f"{group}/{name}", data=texts, dtype=h5py.string_dtype("utf-8"))


def _write_blobs(file: h5py.File, group: str, rows: Sequence[Row]) -> None:
    for kind in TARGET_KINDS:
        blobs = [getattr(row, kind) for row in rows]
        file[f"{group}/{kind}"] = np.frombuffer(b"".join(blobs), dtype="u1")
        file[f"{group}/{kind}_offset"] = np.cumsum([0, *map(len, blobs)], dtype="<u8")


def _write_parts(file: h5py.File, rows: Sequence[Row], images: Sequence[Row]) -> None:
    """What each row shows of which image, and the images themselves."""
    parts = [row.part for row in rows if row.part is not None]
    if len(parts) < len(rows) or any(not 0 <= row.image_index < len(images) for row in rows):
        raise ShapeError("Each row of a cache of tiles or views is a part of one of its images.")
    boxes = [(part.left, part.top, part.height, part.width) for part in parts]
    file["rows/part"] = np.array(boxes, dtype="<i4").reshape(len(rows), 4)
    file.create_dataset("rows/view", data=[part.view for part in parts], dtype=h5py.string_dtype("utf-8"))
    file["rows/image_index"] = np.array([row.image_index for row in rows], dtype="<i4")
    _write_texts(file, "images", images)
    file["images/size"] = np.array([row.placement.original for row in images], dtype="<i4").reshape(len(images), 2)
    _write_blobs(file, "images", images)


def _contiguous(file: h5py.File, name: str, shape: tuple[int, ...], dtype: str) -> None:
    """A dataset whose bytes have their place from the start and are never filled by HDF5."""
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_layout(h5py.h5d.CONTIGUOUS)
    plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    kind = h5py.h5t.py_create(np.dtype(dtype), logical=True)
    group, _, leaf = name.rpartition("/")
    parent = file.require_group(group) if group else file
    h5py.h5d.create(parent.id, leaf.encode(), kind, h5py.h5s.create_simple(shape), plist)


def target_checksums(row: Row) -> list[int]:
    """xxh3_64 of each kind of target's bytes."""
    return [xxhash.xxh3_64_intdigest(getattr(row, kind)) for kind in TARGET_KINDS]


def encode_reason(reason: str) -> bytes:
    """A reason cut to what its field holds, never within a character."""
    return reason.encode()[:REASON_BYTES].decode(errors="ignore").encode()


@dataclass(frozen=True)
class Contents:
    """All of a cache file but its features, as read once when it is opened.

    inode: which file it was. images: what the rows are parts of, placed as they are; none where rows are images.
    """

    recipe: FeatureRecipe
    data: DataInfo
    provenance: Mapping[str, Any]
    rows: tuple[Row, ...]
    extents: Mapping[str, Extent]
    identity_sha256: str
    target_checksum: NDArray[np.uint64]
    inode: int
    images: tuple[Row, ...] = ()

    @property
    def command(self) -> str:
        """The command line that makes this cache, and goes on with it or mends it."""
        short = f"featprobe extract --backbone {self.recipe.label} --data {self.data.name}"
        return str(self.provenance.get("command", short))

    def damaged_targets(self) -> list[int]:
        """Rows whose targets do not hash to what was written."""
        found = np.array([target_checksums(row) for row in self.rows], dtype=np.uint64).reshape(-1, len(TARGET_KINDS))
        return [int(i) for i in np.flatnonzero((found != self.target_checksum).any(axis=1))]

    def is_intact(self) -> bool:
        """Whether recipe, data set, rows and targets hash to what was written."""
        found = identity_sha256(self.recipe, self.data, self.rows, self.extents, self.images)
        return found == self.identity_sha256


def read_contents(path: Path) -> Contents:
    """Read a cache file's identity and where its bytes lie; raises CacheError.

    Whether the identity is intact is left to `Contents.is_intact`, so that a damaged file can be named
    and repaired.
    """
    if not path.is_file():
        raise CacheError(f"There is no cache {path}.")
    try:
        with h5py.File(path, "r", locking=False) as file:
            _check_version(path, file.attrs)
            return _read(file)
    except CacheError:
        raise
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, IndexError) as error:
        raise CacheError(
            f"{path} is not a feature cache that can be opened.\n"
            f"  wanted  HDF5, format {FORMAT}, version {CACHE_VERSION}\n"
            f"  found   {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}\n"
            "Nothing was changed. Remove it and extract again:  featprobe cache rm FILE"
        ) from error


def _check_version(path: Path, attrs: Mapping[str, Any]) -> None:
    kind, version = attrs.get("format"), attrs.get("version")
    if kind != FORMAT:
        raise CacheError(f"{path} is HDF5, but not a feature cache.\n  wanted  format {FORMAT}\n  found   {kind}")
    if int(version) > CACHE_VERSION:  # type: ignore[arg-type]
        raise CacheError(
            f"{path} is of a newer format than this featprobe reads.\n"
            f"  wanted  version {CACHE_VERSION} or older\n  found   version {version}\n"
            "Nothing was changed. Update featprobe:  pip install --upgrade featprobe"
        )


def _read(file: h5py.File) -> Contents:
    recipe = FeatureRecipe.from_json(json.loads(file.attrs["recipe"]))
    data: dict[str, Any] = json.loads(file.attrs["data"])
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    info = DataInfo(**values)
    originals, contents = file["rows/original_size"][...].tolist(), file["rows/content_size"][...].tolist()
    placements = [Placement(_size(o), _size(c), recipe.frame) for o, c in zip(originals, contents, strict=True)]
    rows = _read_rows(file, "rows", "targets", placements)
    images: tuple[Row, ...] = ()
    if recipe.in_parts:
        sizes = [_size(pair) for pair in file["images/size"][...].tolist()]
        images = _read_rows(file, "images", "images", [Placement(size, size, size) for size in sizes])
        rows = _with_parts(file, rows)
        if any(not 0 <= row.image_index < len(images) for row in rows):
            raise ValueError("a row is a part of no image")
    extents = _extents(file, recipe)
    status = os.fstat(file.id.get_vfd_handle())
    if any(extent.offset + extent.row_bytes * extent.rows > status.st_size for extent in extents.values()):
        raise ValueError(f"the file is cut short: {status.st_size} bytes")
    return Contents(
        recipe, info, json.loads(file.attrs["provenance"]), rows, extents,
        str(file.attrs["identity_sha256"]), file["targets/checksum"][...], status.st_ino, images,
    )  # fmt: skip


def _read_rows(file: h5py.File, group: str, targets: str, placements: Sequence[Placement]) -> tuple[Row, ...]:
    texts = [file[f"{group}/{name}"].asstr()[...].tolist() for name in TEXT_FIELDS]
    blobs = [_split_blobs(file, f"{targets}/{kind}") for kind in TARGET_KINDS]
    return tuple(
        Row(*text, placement, mask, objects)  # type: ignore[call-arg]
        for text, placement, mask, objects in zip(zip(*texts, strict=True), placements, *blobs, strict=True)
    )


def _with_parts(file: h5py.File, rows: Sequence[Row]) -> tuple[Row, ...]:
    parts = [
        Part(left, top, height, width, view)
        for (left, top, height, width), view in zip(
            file["rows/part"][...].tolist(), file["rows/view"].asstr()[...].tolist(), strict=True
        )
    ]
    indices = file["rows/image_index"][...].tolist()
    return tuple(
        replace(row, part=part, image_index=index) for row, part, index in zip(rows, parts, indices, strict=True)
    )


def _size(pair: Sequence[int]) -> Size:
    return pair[0], pair[1]


def _extents(file: h5py.File, recipe: FeatureRecipe) -> dict[str, Extent]:
    names = [*(f"features/{level.name}" for level in recipe.levels), "done", "checksum", "reason"]
    return {name: _extent(file[name]) for name in names}


def _extent(dataset: h5py.Dataset) -> Extent:
    offset = dataset.id.get_offset()
    if offset is None:
        raise ValueError(f"{dataset.name} is not contiguous")
    rows = dataset.shape[0]
    return Extent(offset, int(np.prod(dataset.shape[1:], dtype=np.int64)) * dataset.dtype.itemsize, rows)


def _split_blobs(file: h5py.File, name: str) -> list[bytes]:
    data = file[name][...].tobytes()
    offsets = file[f"{name}_offset"][...].tolist()
    return [data[start:stop] for start, stop in itertools.pairwise(offsets)]


def _allocate_disk(handle: int, size: int) -> None:
    """Reserve the file's bytes on the disk, so that a full disk is met here and not in the middle."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
    else:
        os.ftruncate(handle, size)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # alive, and another user's
    return True
