"""Writes cache files of versions 1 and 2 as featprobe wrote them, for tests of reading them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash

from featprobe.cache import MISSING, UNREADABLE, Row, read_contents
from featprobe.cache.layout import ALIGNMENT, FORMAT, REASON_BYTES, encode_reason, table_shapes
from featprobe.cache.legacy import old_identity
from featprobe.cache.rows import TARGET_KINDS, TEXT_FIELDS
from featprobe.specs import DataInfo, FeatureRecipe

TEXT = h5py.string_dtype("utf-8")


def write_old(
    path: Path,
    recipe: FeatureRecipe,
    data: DataInfo,
    rows: Sequence[Row],
    provenance: Mapping[str, Any],
    images: Sequence[Row] = (),
) -> None:
    """A file of version 1, or of version 2 where rows are parts of images, without features."""
    how = {"alignment_threshold": ALIGNMENT, "alignment_interval": ALIGNMENT}
    with h5py.File(path, "w", locking=False, **how) as file:
        file.attrs["format"] = FORMAT
        file.attrs["version"] = recipe.version
        file.attrs["recipe"] = json.dumps(recipe.to_json())
        file.attrs["recipe_key"] = recipe.key
        file.attrs["data"] = json.dumps(asdict(data))
        file.attrs["provenance"] = json.dumps(dict(provenance))
        _write_texts(file, "rows", rows)
        places = [row.placement for row in rows]
        file["rows/original_size"] = np.array([place.original for place in places], dtype="<i4").reshape(-1, 2)
        file["rows/content_size"] = np.array([place.content for place in places], dtype="<i4").reshape(-1, 2)
        file["rows/affine"] = np.array([place.affine for place in places], dtype="<f8").reshape(-1, 2, 3)
        _write_blobs(file, "targets", rows)
        kinds = [[xxhash.xxh3_64_intdigest(getattr(row, kind)) for kind in TARGET_KINDS] for row in rows]
        file["targets/checksum"] = np.array(kinds, dtype="<u8")
        if recipe.in_parts:
            parts = [row.part for row in rows if row.part is not None]
            boxes = [(part.left, part.top, part.height, part.width) for part in parts]
            file["rows/part"] = np.array(boxes, dtype="<i4").reshape(len(rows), 4)
            file.create_dataset("rows/view", data=[part.view for part in parts], dtype=TEXT)
            file["rows/image_index"] = np.array([row.image_index for row in rows], dtype="<i4")
            _write_texts(file, "images", images)
            file["images/size"] = np.array([row.placement.original for row in images], dtype="<i4").reshape(-1, 2)
            _write_blobs(file, "images", images)
        for name, (dtype, shape) in table_shapes(recipe, len(rows)).items():
            _contiguous(file, name, shape, dtype)
        for level in recipe.levels:
            file[f"features/{level.name}"].attrs["stride"] = level.stride
            file[f"features/{level.name}"].attrs["dtype"] = recipe.dtype
        file["done"][...] = np.array([UNREADABLE if row.reason else MISSING for row in rows], dtype="u1")
        file["checksum"][...] = 0
        file["reason"][...] = np.array([encode_reason(row.reason) for row in rows], dtype=f"S{REASON_BYTES}")
        file.attrs["identity_sha256"] = ""  # last: it covers where the others have their places
    with h5py.File(path, "r+", locking=False) as file:
        file.attrs["identity_sha256"] = old_identity(read_contents(path))


def _write_texts(file: h5py.File, group: str, rows: Sequence[Row]) -> None:
    for name in TEXT_FIELDS:
        file.create_dataset(f"{group}/{name}", data=[getattr(row, name) for row in rows], dtype=TEXT)


def _write_blobs(file: h5py.File, group: str, rows: Sequence[Row]) -> None:
    for kind in TARGET_KINDS:
        blobs = [getattr(row, kind) for row in rows]
        file[f"{group}/{kind}"] = np.frombuffer(b"".join(blobs), dtype="u1")
        file[f"{group}/{kind}_offset"] = np.cumsum([0, *map(len, blobs)], dtype="<u8")


def _contiguous(file: h5py.File, name: str, shape: tuple[int, ...], dtype: str) -> None:
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_layout(h5py.h5d.CONTIGUOUS)
    plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    kind = h5py.h5t.py_create(np.dtype(dtype), logical=True)
    group, _, leaf = name.rpartition("/")
    parent = file.require_group(group) if group else file
    h5py.h5d.create(parent.id, leaf.encode(), kind, h5py.h5s.create_simple(shape), plist)
