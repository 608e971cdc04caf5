"""Reading random rows at the speed of memory or of the disk, ahead of the one who needs them.

Measured against the alternatives in benchmarks/cache_read.py: a memory map with `np.take` when the
file fits the memory; else O_DIRECT, which leaves the page cache alone, or preadv where the file system
refuses it. No worker processes: they would copy every byte through a pipe.
"""

import mmap
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from featprobe.cache.layout import ALIGNMENT, Extent
from featprobe.cache.store import Cache
from featprobe.errors import CacheError
from featprobe.features import Features
from featprobe.levels import FeatureLevel
from featprobe.machine import available_memory

TORCH_DTYPE = {"fp16": torch.float16, "fp32": torch.float32, "bf16": torch.bfloat16}
Mode = Literal["memmap", "preadv", "direct"]
ReadRows = Callable[[NDArray[np.intp], NDArray[np.uint8]], None]
MEMORY_SHARE = 0.7  # of the available memory that a mapped file may take
RING = 3  # batches: one in use, one ready, one being read


def choose_mode(cache: Cache, levels: Sequence[FeatureLevel]) -> Mode:
    """How to read these levels of a cache on this machine: see the module's text."""
    wanted = sum(cache.contents.extents[f"features/{level.name}"].row_bytes for level in levels) * len(cache)
    if wanted <= MEMORY_SHARE * available_memory():
        return "memmap"
    return "direct" if _direct_works(cache) else "preadv"


class RowReader:
    """Copies rows of some levels of a cache into buffers that the caller owns."""

    def __init__(self, cache: Cache, levels: Sequence[FeatureLevel] = (), mode: Mode | None = None) -> None:
        self.cache = cache
        self.levels = tuple(levels) or cache.levels
        self.mode: Mode = mode or choose_mode(cache, self.levels)
        self.handle = _open_direct(cache) if self.mode == "direct" else os.dup(cache.handle)
        extents = [cache.contents.extents[f"features/{level.name}"] for level in self.levels]
        self._end = max(extent.offset + extent.row_bytes * extent.rows for extent in extents)
        self._check_length()
        make = {"memmap": self._mapped, "preadv": self._positioned, "direct": self._direct}[self.mode]
        self._read: dict[str, ReadRows] = {
            level.name: make(extent) for level, extent in zip(self.levels, extents, strict=True)
        }

    def __enter__(self) -> "RowReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        os.close(self.handle)

    def row_bytes(self, level: FeatureLevel) -> int:
        """Bytes of one row of a level."""
        return self.cache.contents.extents[f"features/{level.name}"].row_bytes

    def read(self, rows: NDArray[np.intp], out: Mapping[str, NDArray[np.uint8]]) -> None:
        """Copy rows, in the order given, into `out`: level name -> (rows, row bytes), uint8."""
        self._check_length()
        for level in self.levels:
            self._read[level.name](rows, out[level.name])

    def _check_length(self) -> None:
        """Raise CacheError when the file was cut short: touching a map beyond its end would kill the process."""
        length = os.fstat(self.handle).st_size
        if length < self._end:
            raise CacheError(f"{self.cache.path} ends at byte {length}, before byte {self._end}. Was it cut short?")

    def _mapped(self, extent: Extent) -> ReadRows:
        shape = (extent.rows, extent.row_bytes)
        with open(self.handle, "rb", closefd=False) as stream:
            mapped = np.memmap(stream, dtype=np.uint8, mode="r", offset=extent.offset, shape=shape)

        def read(rows: NDArray[np.intp], out: NDArray[np.uint8]) -> None:
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
        """O_DIRECT wants aligned offsets and memory, so whole aligned spans are read and rows cut out."""
        spans = -(-extent.row_bytes // ALIGNMENT) + 1
        buffer = mmap.mmap(-1, spans * ALIGNMENT)
        scratch = np.frombuffer(buffer, dtype=np.uint8)

        def read(rows: NDArray[np.intp], out: NDArray[np.uint8]) -> None:
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
        count = os.preadv(self.handle, buffers, offset)
        if count == 0:
            raise CacheError(f"{self.cache.path} ended while it was read, at byte {offset}. Was it cut short?")
        return count


class FeatureLoader:
    """Batches of cached features, in any order asked for, on the device that trains.

    Where all the rows fit the device's own memory they move there once; else a thread reads ahead into
    a ring of buffers (pinned when the device is a GPU).
    """

    def __init__(
        self,
        cache: Cache,
        levels: Sequence[FeatureLevel] = (),
        device: torch.device | str = "cpu",
        mode: Mode | None = None,
    ) -> None:
        self.cache = cache
        self.levels = tuple(levels) or cache.levels
        self.device = torch.device(device)
        self.reader = RowReader(cache, self.levels, mode)
        self.dtype = TORCH_DTYPE[cache.recipe.dtype]
        sizes = torch.tensor([row.placement.content for row in cache.rows], dtype=torch.int32)
        frame = torch.tensor(cache.recipe.frame, dtype=torch.int32)
        self._content = None if bool((sizes == frame).all()) else sizes  # (rows of the cache, 2)
        self._resident: tuple[NDArray[np.intp], dict[str, torch.Tensor]] | None = None

    def __enter__(self) -> "FeatureLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.close()

    def keep_on_device(self, rows: NDArray[np.intp]) -> bool:
        """Move these rows to the GPU whole when they take at most half of its free memory."""
        if self.device.type != "cuda":
            return False
        wanted = len(rows) * sum(self.reader.row_bytes(level) for level in self.levels)
        if wanted > torch.cuda.mem_get_info(self.device)[0] // 2:
            return False
        parts = [rows[i : i + 64] for i in range(0, len(rows), 64)]
        maps: dict[str, list[torch.Tensor]] = {level.name: [] for level in self.levels}
        for _, features in self.batches(parts):
            for name, m in features.maps.items():
                maps[name].append(m.clone())
        self._resident = rows, {name: torch.cat(pieces) for name, pieces in maps.items()}
        return True

    def batches(self, orders: Iterable[NDArray[np.intp]]) -> Iterator[tuple[NDArray[np.intp], Features]]:
        """(rows, their features) for each array of row indices.

        A batch's tensors are valid until the next one is asked for: their memory is then used again.
        """
        if self._resident is not None:
            return self._from_device(orders)
        return self._ahead(orders)

    def _from_device(self, orders: Iterable[NDArray[np.intp]]) -> Iterator[tuple[NDArray[np.intp], Features]]:
        assert self._resident is not None
        held, maps = self._resident
        for rows in orders:
            index = torch.from_numpy(np.searchsorted(held, rows)).to(self.device)
            chosen = {name: m.index_select(0, index) for name, m in maps.items()}
            yield rows, self._features(rows, chosen).to(self.device)

    def _ahead(self, orders: Iterable[NDArray[np.intp]]) -> Iterator[tuple[NDArray[np.intp], Features]]:
        free: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        full: queue.SimpleQueue[tuple[NDArray[np.intp], _Slot] | BaseException | None] = queue.SimpleQueue()
        stopped = threading.Event()
        for _ in range(RING):
            free.put(_Slot(self.levels, self.reader, pinned=self.device.type == "cuda"))

        def work() -> None:
            try:
                for rows in orders:
                    slot = free.get()
                    if stopped.is_set():
                        return
                    self.reader.read(rows, slot.sized(len(rows)))
                    full.put((rows, slot))
                full.put(None)
            except BaseException as error:  # handed to the thread that asked
                full.put(error)

        thread = threading.Thread(target=work, name="feature-reader", daemon=True)
        thread.start()
        try:
            while (item := full.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                rows, slot = item
                features = self._features(rows, slot.tensors(len(rows), self.dtype, self.cache))
                yield rows, features.to(self.device)
                if self.device.type == "cuda":
                    torch.cuda.current_stream(self.device).synchronize()  # the copy out of the slot is over
                free.put(slot)
        finally:
            stopped.set()
            free.put(_Slot((), self.reader, pinned=False))  # wakes the thread if it waits
            thread.join()

    def _features(self, rows: NDArray[np.intp], maps: Mapping[str, torch.Tensor]) -> Features:
        content = None if self._content is None else self._content[torch.from_numpy(np.asarray(rows))]
        return Features(dict(maps), self.cache.recipe.frame, content)


class _Slot:
    """Memory of one batch in the ring, grown to the largest batch it has held."""

    def __init__(self, levels: Sequence[FeatureLevel], reader: RowReader, *, pinned: bool) -> None:
        self.levels, self.pinned = levels, pinned
        self.row_bytes = {level.name: reader.row_bytes(level) for level in levels}
        self.memory: dict[str, torch.Tensor] = {}

    def sized(self, rows: int) -> dict[str, NDArray[np.uint8]]:
        """Buffers for this many rows: level name -> (rows, row bytes)."""
        for name, width in self.row_bytes.items():
            if name not in self.memory or self.memory[name].shape[0] < rows:
                self.memory[name] = _memory(rows, width, self.pinned)
        return {name: memory[:rows].numpy() for name, memory in self.memory.items()}

    def tensors(self, rows: int, dtype: torch.dtype, cache: Cache) -> dict[str, torch.Tensor]:
        """The same buffers as maps: level name -> (rows, channels, height, width)."""
        frame = cache.recipe.frame
        return {
            level.name: self.memory[level.name][:rows].view(dtype).view(rows, level.channels, *level.cells(frame))
            for level in self.levels
        }


def _memory(rows: int, width: int, pinned: bool) -> torch.Tensor:
    """(rows, width) bytes. Where they need not be pinned numpy makes them: it asks for huge pages, torch does not."""
    if pinned:
        return torch.empty((rows, width), dtype=torch.uint8, pin_memory=True)
    return torch.from_numpy(np.empty((rows, width), dtype=np.uint8))


def _open_direct(cache: Cache) -> int:
    """Open the cache's very file once more, past the page cache (its name may mean a newer file by now)."""
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
