"""Reading rows in any order at the speed of memory or of the disk, into buffers of the caller.

Measured against the alternatives in benchmarks/cache_read.py: a memory map with `np.take` when the
file fits the memory; else O_DIRECT, which leaves the page cache alone, or preadv where the file system
refuses it. No worker processes: they would copy every byte through a pipe.
"""

import mmap
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from featprobe.cache.held_file import unreadable, was_closed
from featprobe.cache.layout import ALIGNMENT, Extent, level_tables
from featprobe.cache.level_array import map_rows
from featprobe.cache.quantised import TABLE_DTYPE, decode_parts
from featprobe.cache.store import Cache
from featprobe.errors import CacheError
from featprobe.io.threads import single_threaded
from featprobe.levels import FeatureLevel
from featprobe.machine import available_memory

Mode = Literal["memmap", "preadv", "direct"]
ReadRows = Callable[[NDArray[np.intp], NDArray[np.uint8]], None]
MEMORY_SHARE = 0.7  # of the available memory that a mapped file may take
SCRATCH = 1 << 18  # bytes of codes, about, that a thread decodes at once: they stay in its core's cache


def choose_mode(cache: Cache, levels: Sequence[FeatureLevel]) -> Mode:
    """The way to read these levels of a cache on this machine; this module's docstring says which is taken when."""
    wanted = sum(table.row_bytes for level in levels for table in level_tables(cache.recipe, level)) * len(cache)
    if wanted <= MEMORY_SHARE * available_memory():
        return "memmap"
    return "direct" if _direct_works(cache) else "preadv"


class Buffer(NamedTuple):
    """Number format and shape of one row of a reader, for one name."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return prod(self.shape) * self.dtype.itemsize


class RowReader:
    """Copies rows of some levels of a cache into buffers that the caller owns.

    threads: how many share the rows. verify: hash each row's level when this process first reads it (`Cache.check`).
    decoding: whether int8 is decoded to fp16 while it is copied; otherwise its codes and scales are copied.
    """

    def __init__(
        self,
        cache: Cache,
        levels: Sequence[FeatureLevel] = (),
        mode: Mode | None = None,
        threads: int = 1,
        *,
        verify: bool = True,
        decoding: bool = False,
    ) -> None:
        self.cache = cache
        self.levels = tuple(levels) or cache.levels
        self.mode: Mode = mode or choose_mode(cache, self.levels)
        self.handle = _open_direct(cache) if self.mode == "direct" else os.dup(cache.handle)
        self._open = weakref.finalize(self, os.close, self.handle)  # also where what follows fails
        self._tables = {level.name: level_tables(cache.recipe, level) for level in self.levels}
        extents = {t.key: cache.contents.extents[t.name] for tables in self._tables.values() for t in tables}
        self._end = max(extent.offset + extent.row_bytes * extent.rows for extent in extents.values())
        self._check_length()
        self._maps = {key: self._map(extent) for key, extent in extents.items()} if self.mode == "memmap" else {}
        make = self._direct if self.mode == "direct" else self._positioned
        self._read: dict[str, ReadRows] = {
            key: self._taking(self._maps[key]) if self._maps else make(extent) for key, extent in extents.items()
        }
        self.threads, self.verify = threads, verify
        self.decoding = decoding and cache.recipe.dtype == "int8"
        self._own = threading.local()
        self._pool: ThreadPoolExecutor | None = None
        if self.decoding:
            self._pool = single_threaded(threads, "row-decoder")
        elif threads > 1:
            self._pool = ThreadPoolExecutor(threads, thread_name_prefix="row-reader")

    def __enter__(self) -> "RowReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; a second time it does nothing."""
        if self._pool is not None:
            self._pool.shutdown()
        self._open()
        self.handle = -1  # the number may soon be another file's

    def buffers(self, level: FeatureLevel) -> dict[str, Buffer]:
        """Buffers of a level: features under its name, and scales under SCALES + name where codes are not decoded."""
        if self.decoding:
            return {level.name: Buffer(torch.float16, (level.channels, *level.cells(self.cache.recipe.frame)))}
        return {table.key: Buffer(TABLE_DTYPE[table.dtype], table.shape) for table in self._tables[level.name]}

    def row_bytes(self, level: FeatureLevel) -> int:
        """Bytes per row of a level, over all its buffers."""
        return sum(buffer.row_bytes for buffer in self.buffers(level).values())

    def read(self, rows: NDArray[np.intp], out: Mapping[str, NDArray[np.uint8]]) -> None:
        """Copy rows, in the order given, into `out`: name of a buffer -> (rows, row bytes), uint8.

        Raises CacheError for a damaged row, for a file that was cut short, and for a reader that was closed.
        """
        if self.handle < 0:
            raise was_closed(self.cache.path)
        if self._pool is None:
            for level in self.levels:
                self._read_level(level, rows, [out[name] for name in self.buffers(level)])
            return
        work = self._decode_level if self.decoding else self._read_level
        step = -(-len(rows) // self.threads) or 1
        parts = [slice(start, start + step) for start in range(0, len(rows), step)]
        jobs = [
            self._pool.submit(work, level, rows[part], [out[name][part] for name in self.buffers(level)])
            for level in self.levels
            for part in parts
        ]
        for job in jobs:
            job.result()

    def _read_level(self, level: FeatureLevel, rows: NDArray[np.intp], out: Sequence[NDArray[np.uint8]]) -> None:
        for table, target in zip(self._tables[level.name], out, strict=True):
            self._read[table.key](rows, target)
        if self.verify:  # what was copied, so that nothing can change between the check and the use
            self.cache.check(rows, level, *out)

    def _decode_level(self, level: FeatureLevel, rows: NDArray[np.intp], out: Sequence[NDArray[np.uint8]]) -> None:
        """Decode rows, one of them at least."""
        codes, scales = self._tables[level.name]
        numbers = np.empty((len(rows), scales.row_bytes), dtype=np.uint8)
        target = torch.from_numpy(out[0]).view(torch.float16).view(-1, *codes.shape)
        self._read[scales.key](rows, numbers)
        decode_parts(
            self._codes(level, rows, numbers),
            torch.from_numpy(numbers).view(torch.float32).view(-1, *scales.shape),
            target,
        )

    def _codes(
        self, level: FeatureLevel, rows: NDArray[np.intp], scales: NDArray[np.uint8]
    ) -> Iterator[NDArray[np.uint8]]:
        """Codes of a few rows at a time, copied into this thread's memory and checked.

        Those of a single large row that needs no check lie in the file's own memory where it is mapped: a copy would
        take a quarter of the time that decoding takes.
        """
        codes = self._tables[level.name][0]
        few = min(len(rows), max(1, SCRATCH // codes.row_bytes))
        known = not self.verify or self.cache.checked(rows, level)
        for start in range(0, len(rows), few):
            part = rows[start : start + few]
            if few == 1 and self._maps and (known or self.cache.checked(part, level)):
                self._check_length()
                yield self._maps[codes.key][part[0]]
                continue
            if getattr(self._own, "scratch", np.empty(0)).nbytes < few * codes.row_bytes:
                self._own.scratch = np.frombuffer(mmap.mmap(-1, few * codes.row_bytes), dtype=np.uint8)  # aligned
            copied = self._own.scratch[: len(part) * codes.row_bytes].reshape(len(part), -1)
            self._read[codes.key](part, copied)
            if self.verify:
                self.cache.check(part, level, copied, scales[start : start + few])
            yield copied

    def _check_length(self) -> None:
        """Raise CacheError when the file was cut short: touching a map beyond its end would kill the process.

        It is called before each touch, so that only a cut within one still does.
        """
        length = os.fstat(self.handle).st_size
        if length < self._end:
            raise CacheError(f"{self.cache.path} ends at byte {length}, before byte {self._end}. Was it cut short?")

    def _map(self, extent: Extent) -> NDArray[np.uint8]:
        return map_rows(self.cache.path, self.handle, extent, "u1", (extent.rows, extent.row_bytes))

    def _taking(self, mapped: NDArray[np.uint8]) -> ReadRows:
        def read(rows: NDArray[np.intp], out: NDArray[np.uint8]) -> None:
            self._check_length()
            np.take(mapped, rows, axis=0, out=out, mode="clip")  # any other mode goes through a second buffer

        return read

    def _positioned(self, extent: Extent) -> ReadRows:
        def read(rows: NDArray[np.intp], out: NDArray[np.uint8]) -> None:
            for row, target in zip(rows.tolist(), out, strict=True):
                view, offset = memoryview(target), extent.offset + row * extent.row_bytes
                while view:
                    count = self._some([view], offset)
                    view, offset = view[count:], offset + count

        return read

    def _direct(self, extent: Extent) -> ReadRows:
        """Read rows with O_DIRECT, which needs aligned offsets and memory: aligned spans are read, rows cut out."""
        aligned_rows = extent.offset % ALIGNMENT == extent.row_bytes % ALIGNMENT == 0
        straight = self._positioned(extent)
        spans = -(-extent.row_bytes // ALIGNMENT) + 1
        own = threading.local()

        def read(rows: NDArray[np.intp], out: NDArray[np.uint8]) -> None:
            if aligned_rows and out.ctypes.data % ALIGNMENT == 0:
                straight(rows, out)
                return
            if not hasattr(own, "buffer"):
                own.buffer = mmap.mmap(-1, spans * ALIGNMENT)
            buffer, scratch = own.buffer, np.frombuffer(own.buffer, dtype=np.uint8)
            for row, target in zip(rows.tolist(), out, strict=True):
                start = extent.offset + row * extent.row_bytes
                aligned = start // ALIGNMENT * ALIGNMENT
                wanted, held = start - aligned + extent.row_bytes, 0
                length = -(-wanted // ALIGNMENT) * ALIGNMENT
                while held < wanted:  # ends early only at the end of the file
                    held += self._some([memoryview(buffer)[held:length]], aligned + held)
                target[:] = scratch[start - aligned : wanted]

        return read

    def _some(self, buffers: list[memoryview], offset: int) -> int:
        try:
            count = os.preadv(self.handle, buffers, offset)
        except OSError as error:
            raise unreadable(self.cache.path, offset, error, self.cache.contents.command) from error
        if count == 0:
            raise CacheError(f"{self.cache.path} ended while it was read, at byte {offset}. Was it cut short?")
        return count


def _open_direct(cache: Cache) -> int:
    """Open the same file once more, past the page cache (its name may belong to a newer file by now)."""
    return os.open(f"/proc/self/fd/{cache.handle}", os.O_RDONLY | os.O_DIRECT)


def _direct_works(cache: Cache) -> bool:
    if not hasattr(os, "O_DIRECT"):
        return False
    try:
        handle = _open_direct(cache)
    except OSError:
        return False
    try:
        os.preadv(handle, [mmap.mmap(-1, ALIGNMENT)], 0)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True
