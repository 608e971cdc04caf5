"""Caches of versions 1 and 2 as they were made until version 3: small ones for tests, and their identity made anew."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash
from numpy.typing import NDArray

from featprobe.cache import MISSING, UNREADABLE, WHOLE, Row
from featprobe.specs import DataInfo, FeatureRecipe

TEXT_FIELDS = ("id", "group", "split", "image", "image_hash")
TARGET_KINDS = ("semantic", "instances")
STORED_AS = {"fp16": "<f2", "fp32": "<f4", "bf16": "<u2"}
ALIGNMENT = 4096


def write_old(
    path: Path,
    recipe: FeatureRecipe,
    data: DataInfo,
    rows: Sequence[Row],
    provenance: Mapping[str, Any],
    images: Sequence[Row] = (),
    maps: Mapping[str, NDArray] | None = None,
    missing: Sequence[int] = (),
) -> None:
    """A cache of version 1, or of version 2 where the recipe has parts. maps: level name -> (rows, channels, h, w).

    Rows with a reason are unreadable, those in `missing` missing, all others whole; without maps they are missing.
    """
    count = len(rows)
    missing = range(count) if maps is None else missing
    with h5py.File(path, "w", locking=False, alignment_threshold=ALIGNMENT, alignment_interval=ALIGNMENT) as file:
        file.attrs["format"] = "featprobe-cache"
        file.attrs["version"] = recipe.version
        file.attrs["recipe"] = json.dumps(recipe.to_json())
        file.attrs["recipe_key"] = recipe.key
        file.attrs["data"] = json.dumps(data.to_json())
        file.attrs["provenance"] = json.dumps(dict(provenance))
        _write_texts(file, "rows", rows)
        file["rows/original_size"] = np.array([row.placement.original for row in rows], dtype="<i4").reshape(count, 2)
        file["rows/content_size"] = np.array([row.placement.content for row in rows], dtype="<i4").reshape(count, 2)
        file["rows/affine"] = np.array([row.placement.affine for row in rows], dtype="<f8").reshape(count, 2, 3)
        _write_blobs(file, "targets", rows)
        checksums = [[xxhash.xxh3_64_intdigest(getattr(row, kind)) for kind in TARGET_KINDS] for row in rows]
        file["targets/checksum"] = np.array(checksums, dtype="<u8")
        if recipe.version == 2:
            parts = [(row.part.left, row.part.top, row.part.height, row.part.width) for row in rows if row.part]
            file["rows/part"] = np.array(parts, dtype="<i4").reshape(count, 4)
            views = [row.part.view for row in rows if row.part]
            file.create_dataset("rows/view", data=views, dtype=h5py.string_dtype("utf-8"))
            file["rows/image_index"] = np.array([row.image_index for row in rows], dtype="<i4")
            _write_texts(file, "images", images)
            sizes = [row.placement.original for row in images]
            file["images/size"] = np.array(sizes, dtype="<i4").reshape(len(images), 2)
            _write_blobs(file, "images", images)
        for level in recipe.levels:
            shape = (count, level.channels, *level.cells(recipe.frame))
            contiguous(file, f"features/{level.name}", shape, STORED_AS[recipe.dtype])
            dataset = file[f"features/{level.name}"]
            dataset.attrs["stride"], dataset.attrs["dtype"] = level.stride, recipe.dtype
            if maps is not None:
                dataset[...] = maps[level.name].view(STORED_AS[recipe.dtype])
        contiguous(file, "done", (count,), "u1")
        contiguous(file, "checksum", (count, len(recipe.levels)), "<u8")
        contiguous(file, "reason", (count,), "S240")
        states = [UNREADABLE if row.reason else MISSING if i in missing else WHOLE for i, row in enumerate(rows)]
        file["done"][...] = np.array(states, dtype="u1")
        file["checksum"][...] = 0
        for column, level in enumerate(recipe.levels if maps is not None else ()):
            sums = [xxhash.xxh3_64_intdigest(row.tobytes()) for row in maps[level.name]]
            file["checksum"][:, column] = np.array(sums, dtype="<u8")
        file["reason"][...] = np.array([row.reason.encode()[:240] for row in rows], dtype="S240")
    seal(path)


def _write_texts(file: h5py.File, group: str, rows: Sequence[Row]) -> None:
    for name in TEXT_FIELDS:
        texts = [getattr(row, name) for row in rows]
        file.create_dataset(f"{group}/{name}", data=texts, dtype=h5py.string_dtype("utf-8"))


def _write_blobs(file: h5py.File, group: str, rows: Sequence[Row]) -> None:
    for kind in TARGET_KINDS:
        blobs = [getattr(row, kind) for row in rows]
        file[f"{group}/{kind}"] = np.frombuffer(b"".join(blobs), dtype="u1")
        file[f"{group}/{kind}_offset"] = np.cumsum([0, *map(len, blobs)], dtype="<u8")


def contiguous(file: h5py.File, name: str, shape: tuple[int, ...], dtype: str) -> None:
    """A dataset whose bytes have their place from the start and are never filled by HDF5."""
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_layout(h5py.h5d.CONTIGUOUS)
    plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    kind = h5py.h5t.py_create(np.dtype(dtype), logical=True)
    group, _, leaf = name.rpartition("/")
    parent = file.require_group(group) if group else file
    h5py.h5d.create(parent.id, leaf.encode(), kind, h5py.h5s.create_simple(shape), plist)


def seal(path: Path) -> None:
    """Give a file the identity that what is in it has, as anybody can."""
    with h5py.File(path, "r+", locking=False) as file:
        file.attrs["identity_sha256"] = old_identity(file)


def old_identity(file: h5py.File) -> str:
    """sha256 over all that versions 1 and 2 wrote once, and where the rest has its place."""
    recipe, data = json.loads(file.attrs["recipe"]), json.loads(file.attrs["data"])
    names = [*(f"features/{level['name']}" for level in recipe["levels"]), "done", "checksum", "reason"]
    places = {}
    for name in dict.fromkeys(names):  # a hostile recipe names one level a hundred thousand times
        dataset = file[name]
        row_bytes = int(np.prod(dataset.shape[1:], dtype=np.int64)) * dataset.dtype.itemsize
        places[name] = {"offset": dataset.id.get_offset(), "row_bytes": row_bytes, "rows": dataset.shape[0]}
    said = {name: value for name, value in data.items() if name != "bits" or value}
    running = hashlib.sha256()
    head = {"recipe": recipe, "data": said, "extents": places}
    running.update(json.dumps(head, sort_keys=True, separators=(",", ":")).encode())
    originals, contents = file["rows/original_size"][...].tolist(), file["rows/content_size"][...].tolist()
    sizes = [[original, content, recipe["frame"]] for original, content in zip(originals, contents, strict=True)]
    shown: list[list[Any]] = [[] for _ in sizes]
    if "rows/part" in file:
        views, owners = file["rows/view"].asstr()[...].tolist(), file["rows/image_index"][...].tolist()
        boxes = file["rows/part"][...].tolist()
        shown = [[[*box, view], owner] for box, view, owner in zip(boxes, views, owners, strict=True)]
    _hash_rows(running, file, "rows", "targets", sizes, shown)
    if "images/size" in file:
        whole = [[size, size, size] for size in file["images/size"][...].tolist()]
        _hash_rows(running, file, "images", "images", whole, [[] for _ in whole])
    return running.hexdigest()


def _hash_rows(
    running: Any, file: h5py.File, group: str, targets: str, sizes: Sequence[Any], shown: Sequence[list[Any]]
) -> None:
    texts = zip(*(file[f"{group}/{name}"].asstr()[...].tolist() for name in TEXT_FIELDS), strict=True)
    blobs = zip(*(_blobs(file, f"{targets}/{kind}") for kind in TARGET_KINDS), strict=True)
    for text, size, parts, own in zip(texts, sizes, shown, blobs, strict=True):
        running.update(json.dumps([list(text), size, *parts]).encode())
        for blob in own:
            running.update(len(blob).to_bytes(8, "little"))
            running.update(blob)


def _blobs(file: h5py.File, name: str) -> list[bytes]:
    offsets = file[f"{name}_offset"][...].tolist()
    data = file[name][: max(offsets)].tobytes()  # a hostile file claims many bytes more
    return [data[start:stop] for start, stop in pairwise(offsets)]
