"""What was pooled from a cache of maps, kept beside it (cache/README.md, Pooled features)."""

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featprobe.cache.store import Cache
from featprobe.errors import FileKindError
from featprobe.io.arrays import read_entry
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
            if len(set(there)) < len(there) or read_header(archive) != _header(cache, digest):
                return {}
            return {
                level.name: _read_array(archive, _entry(level), (len(cache), 2, level.channels))
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


def read_header(archive: zipfile.ZipFile) -> Any:
    """The JSON in the header of an archive that lies beside a cache; raises one of UNREADABLE for what is none."""
    said = read_entry(archive, "header.npy", "u1", (), rows=True) if _is_short(archive) else b""
    return parse_json(bytes(said))


def _is_short(archive: zipfile.ZipFile) -> bool:
    return archive.getinfo("header.npy").file_size <= MOST_HEADER


def _read_array(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Features of this shape; raises one of UNREADABLE for anything else."""
    values = read_entry(archive, name, "<f4", shape)
    if not np.isfinite(values).all():
        raise ValueError(f"{name} has values that are not finite")
    return values
