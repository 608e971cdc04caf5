"""Files of versions 1 and 2, read through HDF5 into the form of version 3."""

import hashlib
import json
import os
from dataclasses import asdict, astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featprobe.cache.header import FormatFault, NewerFormat, short
from featprobe.cache.layout import FORMAT, part_shapes, table_shapes
from featprobe.cache.rows import TARGET_KINDS, TEXT_FIELDS
from featprobe.errors import CacheError
from featprobe.specs import CACHE_VERSION, FILE_VERSION, FeatureRecipe

if TYPE_CHECKING:
    import h5py

    from featprobe.cache.contents import Contents


def read_old(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The header that the file would have in version 3, and the bytes of its parts.

    The header holds `version` and `inode` as well, and no place of any part. Raises FormatFault, NewerFormat,
    CacheError.
    """
    import h5py

    with h5py.File(path, "r", locking=False) as file:
        version = _check_version(path, file.attrs)
        said = json.loads(file.attrs["recipe"])
        recipe = FeatureRecipe.from_json(said)
        rows, images = file["done"].shape[0], file["images/size"].shape[0] if recipe.in_parts else 0
        texts = {"data": json.loads(file.attrs["data"]), "rows": _texts(file, "rows")}
        if recipe.in_parts:
            texts["rows"]["view"] = file["rows/view"].asstr()[...].tolist()
            texts["images"] = _texts(file, "images")
        parts = {"texts": json.dumps(texts).encode(), "provenance": str(file.attrs["provenance"]).encode()}
        names = [name for name in part_shapes(recipe, rows, images) if name in file]
        arrays = {name: file[name][...] for name in names}
        parts |= {name: array.tobytes() for name, array in arrays.items()}
        entries = {name: _part(array.dtype, array.shape) for name, array in arrays.items()}
        entries |= {name: _part(np.dtype("u1"), (len(parts[name]),)) for name in ("texts", "provenance")}
        header = {
            "version": version,
            "inode": os.fstat(file.id.get_vfd_handle()).st_ino,
            "recipe": said,
            "recipe_key": str(file.attrs["recipe_key"]),
            "identity_sha256": str(file.attrs["identity_sha256"]),
            "rows": rows,
            "images": images,
            "parts": entries,
            "tables": {name: _table(file[name]) for name in table_shapes(recipe, rows)},
        }
        return header, parts


def old_identity(contents: "Contents") -> str:
    """sha256 over all that is written once in versions 1 and 2, and where the rest has its place.

    The last because HDF5 does not guard its own bookkeeping: a flipped address would serve other rows.
    """
    running = hashlib.sha256()
    places = {name: asdict(extent) for name, extent in contents.extents.items()}
    said = {name: value for name, value in asdict(contents.data).items() if name != "bits" or value}  # older lack it
    head = {"recipe": contents.recipe.to_json(), "data": said, "extents": places}
    running.update(json.dumps(head, sort_keys=True, separators=(",", ":")).encode())
    tables = [contents.rows, *([contents.images] if contents.images else [])]
    for row in (table.unchecked(i) for table in tables for i in range(len(table))):
        text = [getattr(row, name) for name in TEXT_FIELDS]
        sizes = [row.placement.original, row.placement.content, row.placement.frame]
        parts = [] if row.part is None else [astuple(row.part), row.image_index]
        running.update(json.dumps([text, sizes, *parts]).encode())
        for kind in TARGET_KINDS:
            blob = getattr(row, kind)
            running.update(len(blob).to_bytes(8, "little"))
            running.update(blob)
    return running.hexdigest()


def _check_version(path: Path, attrs: Any) -> int:
    kind, version = attrs.get("format"), attrs.get("version")
    if kind != FORMAT:
        raise CacheError(
            f"{path} is HDF5, but not a feature cache.\n  wanted  format {FORMAT}\n  found   {short(kind)}"
        )
    if int(version) > CACHE_VERSION:
        raise NewerFormat(f"version {FILE_VERSION} or older", f"version {version}")
    return int(version)


def _texts(file: "h5py.File", group: str) -> dict[str, list[str]]:
    return {name: file[f"{group}/{name}"].asstr()[...].tolist() for name in TEXT_FIELDS}


def _part(dtype: np.dtype[Any], shape: tuple[int, ...]) -> dict[str, Any]:
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return {"offset": 0, "bytes": size, "dtype": _name(dtype), "shape": list(shape), "sha256": "", "required": False}


def _table(dataset: "h5py.Dataset") -> dict[str, Any]:
    offset = dataset.id.get_offset()
    if offset is None:
        raise FormatFault(f"{dataset.name} in one piece", "none, or several")
    rows, shape = dataset.shape[0], dataset.shape
    row_bytes = int(np.prod(shape[1:], dtype=np.int64)) * dataset.dtype.itemsize
    said = {"offset": offset, "rows": rows, "row_bytes": row_bytes, "dtype": _name(dataset.dtype)}
    return said | {"shape": list(shape), "required": True}


def _name(dtype: np.dtype[Any]) -> str:
    """A type as cache/README.md calls it."""
    return dtype.str.removeprefix("|")
