"""What was pooled from a cache of maps, kept beside it (cache/README.md, Pooled features)."""

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from featprobe.cache.store import Cache
from featprobe.errors import FileKindError
from featprobe.io.arrays import array_header
from featprobe.io.disk import open_regular, parse_json, replacing
from featprobe.levels import FeatureLevel

VERSION = 1
MOST_HEADER, MOST_BESIDE = 1 << 12, 1 << 20  # bytes: of the header; of all but features
UNREADABLE = (
    OSError, EOFError, ValueError, KeyError, TypeError, RuntimeError, NotImplementedError, MemoryError, OverflowError,
    zipfile.BadZipFile, FileKindError,
)  # fmt: skip
"""Errors that a file raises which featprobe did not write, or which is damaged."""

Tables = Mapping[str, NDArray[np.float32]]
"""Level name -> (rows of the cache, 2, channels), float32: mean and maximum; zeros for rows that are not whole."""


def pooled_path(path: Path) -> Path:
    """The path of the file that keeps what was pooled from a cache."""
    return path.with_name(f"{path.stem}.pooled.npz")


def rows_digest(cache: Cache) -> str:
    """sha256 (64 hex digits) over the present states and checksums of all rows."""
    running = hashlib.sha256()
    for name in ("done", "checksum"):
        extent = cache.contents.extents[name]
        running.update(cache.contents.file.read(extent.offset, extent.row_bytes * extent.rows))
    return running.hexdigest()


def read_pooled(cache: Cache, levels: Sequence[FeatureLevel], digest: str) -> Tables:
    """The tables of those of some levels that are kept beside a cache whose rows have this `rows_digest`.

    Nothing is taken of a file that is damaged, of another version, or of another cache or state of it.
    """
    try:
        with open(pooled_path(cache.path), "rb", opener=open_regular) as stream:
            if os.fstat(stream.fileno()).st_size > _most_bytes(cache):
                return {}
            archive = zipfile.ZipFile(stream)
            there = archive.namelist()
            if len(set(there)) < len(there) or _read_header(archive) != _header(cache, digest):
                return {}
            return {
                level.name: _read_array(archive, _entry(level), "<f4", (len(cache), 2, level.channels))
                for level in levels
                if _entry(level) in there
            }
    except UNREADABLE:
        return {}


def write_pooled(cache: Cache, tables: Tables, digest: str) -> None:
    """Keep tables beside their cache, whole or not at all. Raises DiskError."""
    said = np.frombuffer(json.dumps(_header(cache, digest)).encode(), np.uint8)
    kept: dict[str, Any] = {f"features/{name}": own.astype("<f4", copy=False) for name, own in tables.items()}
    with replacing(pooled_path(cache.path)) as stream:
        np.savez(stream, header=said, **kept)


def _header(cache: Cache, digest: str) -> dict[str, Any]:
    return {"version": VERSION, "identity_sha256": cache.contents.identity_sha256, "rows_sha256": digest}


def _most_bytes(cache: Cache) -> int:
    """The most bytes of a file with all levels."""
    return len(cache) * replace(cache.recipe, store="pooled").row_bytes + MOST_BESIDE


def _entry(level: FeatureLevel) -> str:
    return f"features/{level.name}.npy"


def _read_header(archive: zipfile.ZipFile) -> Any:
    with _open(archive, "header.npy") as packed:
        (size,), _, dtype = array_header(packed)
        if dtype != np.uint8 or not 0 <= size <= MOST_HEADER:
            raise ValueError("a header of another type or shape is none")
        return parse_json(packed.read(size))


def _open(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    """An entry of an archive; raises ValueError for a packed one, which could take any memory."""
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is packed")
    return archive.open(name)


def _read_array(archive: zipfile.ZipFile, name: str, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """An array of this type and shape; raises one of UNREADABLE for any other, before memory is taken for it."""
    with _open(archive, name) as packed:
        if array_header(packed) != (shape, False, np.dtype(dtype)):
            raise ValueError(f"{name} is of another type or shape")
        data = packed.read(prod(shape) * np.dtype(dtype).itemsize)
        if len(data) < prod(shape) * np.dtype(dtype).itemsize or packed.read(1):  # reading to the end checks the CRC
            raise ValueError(f"{name} has another length")
    values = np.frombuffer(data, dtype).reshape(shape)
    if not np.isfinite(values).all():
        raise ValueError(f"{name} has values that are not finite")
    return values
