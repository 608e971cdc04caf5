"""Features of many rows of a level as one array: a view of the file where that can be, else a copy in memory."""

import os
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from featprobe.cache.layout import STORED_AS, Extent, Table, level_tables
from featprobe.errors import CacheError
from featprobe.levels import FeatureLevel
from featprobe.machine import available_memory, human_bytes
from featprobe.specs import FeatureRecipe

AT_ONCE = 1 << 24  # bytes, about, that are hashed or decoded together
MEMORY_SHARE = 0.7  # of the available memory that a copy may take


class Source(Protocol):
    """What an open cache is here."""

    @property
    def handle(self) -> int: ...
    @property
    def path(self) -> Any: ...
    @property
    def recipe(self) -> FeatureRecipe: ...
    @property
    def extents(self) -> Mapping[str, Extent]: ...
    def check(self, rows: NDArray[np.intp], level: FeatureLevel, *stored: NDArray[Any]) -> None: ...


def level_array(cache: Source, level: FeatureLevel, rows: NDArray[np.intp], *, bits: bool = False) -> NDArray[Any]:
    """(rows, channels, height, width), or (rows, 2, channels) of a pooled cache; each row is checked.

    In the stored number format; int8 is decoded to float16. bits: whether bfloat16, which numpy lacks, comes as its
    bits, uint16; else as float32. Rows that follow one another in the file, and need no decoding, are a view of it:
    what is written there changes no file, and stays in this process. Raises CacheError for a damaged row, for a file
    that was cut short, and for a copy that the memory does not hold.
    """
    tables = level_tables(cache.recipe, level)
    stored = [_mapped(cache, table) for table in tables]
    step = max(1, AT_ONCE // tables[0].row_bytes)
    parts = [rows[start : start + step] for start in range(0, len(rows), step)]
    wide = tables[0].dtype == STORED_AS["bf16"] and not bits
    decode: Callable[..., NDArray[Any]] | None = _widened if wide else decoded if len(tables) > 1 else None
    if decode is None and len(rows) and np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):
        found = stored[0][rows[0] : rows[0] + len(rows)]
        for part in parts:
            _check_length(cache, tables)
            cache.check(part, level, stored[0][part[0] : part[0] + len(part)])
        return found
    dtype = np.dtype(np.float32 if wide else np.float16 if decode else tables[0].dtype)
    shape = (len(rows), *tables[0].shape)
    _check_room(cache, level, shape, dtype)
    try:
        copied = np.empty(shape, dtype)
    except MemoryError as error:
        raise _too_large(cache, level, shape, dtype) from error
    for i, part in enumerate(parts):
        _check_length(cache, tables)
        kept = [own[part] for own in stored]
        cache.check(part, level, *kept)
        copied[i * step : i * step + len(part)] = decode(*kept) if decode else kept[0]
    return copied


def decoded(codes: NDArray[Any], scales: NDArray[Any]) -> NDArray[np.float16]:
    """The values of codes of int8. codes: (…, channels, height, width); scales: (…, channels, 2)."""
    scale, zero = (scales[..., i, None, None] for i in (0, 1))
    return (zero + scale * codes).astype(np.float16)


def _widened(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The values of bfloat16, which are the upper halves of float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _mapped(cache: Source, table: Table) -> NDArray[Any]:
    """The rows of a table, mapped so that nothing that is written there reaches the file."""
    _check_length(cache, [table])
    extent = cache.extents[table.name]
    return map_rows(cache.path, cache.handle, extent, table.dtype, (extent.rows, *table.shape), private=True)


def map_rows(
    path: Path, handle: int, extent: Extent, dtype: str, shape: tuple[int, ...], *, private: bool = False
) -> NDArray[Any]:
    """A table of an open file as an array that is mapped. private: what is written to it stays in this process; else it
    can't be written to. Raises CacheError where the system has no room for it, and where the file was cut short."""
    try:
        with open(handle, "rb", closefd=False) as stream:
            return np.memmap(stream, dtype, "c" if private else "r", extent.offset, shape).view(np.ndarray)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise CacheError(
            f"{path} can't be mapped into memory: {why}. Nothing was changed.\n"
            "Allow the process more memory (ulimit -v), or make sure that nothing cuts the file."
        ) from error


def _check_length(cache: Source, tables: Sequence[Table]) -> None:
    """Raise CacheError when the file was cut short: touching a map beyond its end would kill the process."""
    extents = [cache.extents[table.name] for table in tables]
    end = max(extent.offset + extent.row_bytes * extent.rows for extent in extents)
    length = os.fstat(cache.handle).st_size
    if length < end:
        raise CacheError(f"{cache.path} ends at byte {length}, before byte {end}. Was it cut short?")


def _check_room(cache: Source, level: FeatureLevel, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if prod(shape) * dtype.itemsize > MEMORY_SHARE * available_memory():
        raise _too_large(cache, level, shape, dtype)


def _too_large(cache: Source, level: FeatureLevel, shape: tuple[int, ...], dtype: np.dtype[Any]) -> CacheError:
    wanted = prod(shape) * dtype.itemsize
    return CacheError(
        f"{cache.path}: {level.name} of {shape[0]} rows does not fit the memory. Nothing was read.\n"
        f"  wanted  {wanted} bytes ({human_bytes(wanted)})\n"
        f"  found   {human_bytes(available_memory())} free, of which {MEMORY_SHARE:.0%} may be taken\n"
        "Take fewer rows (rows=…), or read them as they are needed:  cache.torch_dataset()"
    )
