"""Reading rows in any order at the speed of memory or of the disk, before the training needs them.

Measured against the alternatives in benchmarks/cache_read.py: a memory map with `np.take` when the
file fits the memory; else O_DIRECT, which leaves the page cache alone, or preadv where the file system
refuses it. No worker processes: they would copy every byte through a pipe.
"""

import mmap
import os
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from featprobe.cache.layout import ALIGNMENT, Extent, level_tables
from featprobe.cache.quantised import SCALES, TABLE_DTYPE, as_read, decode, decode_parts
from featprobe.cache.store import Cache
from featprobe.errors import CacheError
from featprobe.features import Features
from featprobe.io.threads import single_threaded
from featprobe.levels import FeatureLevel
from featprobe.machine import available_memory, human_bytes, usable_cores
from featprobe.processes import own_part
from featprobe.specs import CacheDtype

Mode = Literal["memmap", "preadv", "direct"]
ReadRows = Callable[[NDArray[np.intp], NDArray[np.uint8]], None]
MEMORY_SHARE = 0.7  # of the available memory that a mapped file may take
RING = 3  # batches: one in use, one ready, one being read
STAGED_RING = 2  # batches on their way to another device: one in use there, one being read and copied
READERS = 4  # threads that read rows from a disk, or for another device
DECODERS = min(4, usable_cores())  # threads that read rows of int8 from memory and decode them, on a CPU
SCRATCH = 1 << 18  # bytes of codes, about, that a thread decodes at once: they stay in its core's cache
DEVICE_SHARE = 0.5  # of a GPU's free memory that rows may take; the rest is for the training
CONTENT = ""  # name of the buffer of content sizes: no level has it
PIECE = 64 * 2**20  # bytes, about, that are read at once when a split's rows move to a GPU


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
        """Close the file."""
        if self._pool is not None:
            self._pool.shutdown()
        os.close(self.handle)

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

        Raises CacheError for a damaged row, and for a file that was cut short.
        """
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
        self._check_length()
        for start in range(0, len(rows), few):
            part = rows[start : start + few]
            if few == 1 and self._maps and (known or self.cache.checked(part, level)):
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
        shape = (extent.rows, extent.row_bytes)
        with open(self.handle, "rb", closefd=False) as stream:
            mapped = np.memmap(stream, dtype=np.uint8, mode="r", offset=extent.offset, shape=shape)
        return mapped.view(np.ndarray)  # of which a row is taken in a tenth of the time

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
            raise CacheError(
                f"{self.cache.path} can't be read at byte {offset}: {error.strerror}. Nothing was changed.\n"
                f"If the disk is failing, make the file anew on another:  {self.cache.contents.command}"
            ) from error
        if count == 0:
            raise CacheError(f"{self.cache.path} ended while it was read, at byte {offset}. Was it cut short?")
        return count


@dataclass(frozen=True)
class Held:
    """Rows whose features lie on the device; int8 is decoded there when features are asked for.

    rows: indices of rows, ascending where rows are looked up. maps: level name -> (rows, channels, height, width), and
    for int8 codes SCALES + level name -> (rows, channels, 2), float32. content: (rows, 2), see Features. as_dtype: see
    FeatureLoader.
    """

    rows: NDArray[np.intp]
    maps: Mapping[str, torch.Tensor]
    frame: tuple[int, int]
    content: torch.Tensor | None
    as_dtype: CacheDtype | None = None

    def places(self, rows: NDArray[np.intp]) -> NDArray[np.intp] | None:
        """The places of some rows among these; None unless all of them are here."""
        places = np.searchsorted(self.rows, rows).clip(max=len(self.rows) - 1)
        return places if np.array_equal(self.rows[places], rows) else None

    def at(self, index: torch.Tensor) -> Features:
        """Features at some places: (batch,), int64, on the device. The work is done on the device alone."""
        return self._features(lambda m: m.index_select(0, index))

    def between(self, start: int, stop: int) -> Features:
        """Features at consecutive places. Nothing is copied; int8 is decoded."""
        return self._features(lambda m: m[start:stop])

    def _features(self, pick: Callable[[torch.Tensor], torch.Tensor]) -> Features:
        maps = {name: pick(m) for name, m in self.maps.items()}
        scales = {name: maps.pop(name) for name in self.maps if name.startswith(SCALES)}
        values = {name: decode(m, scales[SCALES + name]) if SCALES + name in scales else m for name, m in maps.items()}
        values = values if self.as_dtype is None else as_read(values, self.as_dtype)
        return Features(values, self.frame, None if self.content is None else pick(self.content))


class FeatureLoader:
    """Batches of cached maps, in any order of rows, on the device that trains. Raises CacheError for a pooled cache.

    verify: see RowReader. as_dtype: give the features that a cache of this dtype, made from this one, would give; None
    for the stored features.

    Rows that fit a GPU's memory move there once (`keep_on_device`). All others are read ahead by a thread into a ring
    of buffers. For CUDA the buffers are page-locked and a separate stream copies them, so that neither reading nor
    copying waits for what is computed.
    """

    def __init__(
        self,
        cache: Cache,
        levels: Sequence[FeatureLevel] = (),
        device: torch.device | str = "cpu",
        mode: Mode | None = None,
        *,
        verify: bool = True,
        as_dtype: CacheDtype | None = None,
    ) -> None:
        if cache.recipe.store == "pooled":
            raise cache.lacks_maps()
        self.cache, self.as_dtype = cache, as_dtype
        self.backbone: None = None  # nothing makes these features anew
        self.levels = tuple(levels) or cache.levels
        self.device = torch.device(device)
        self.staged = self.device.type == "cuda"  # threads of their own crash other GPUs
        mode = mode or choose_mode(cache, self.levels)
        few = DECODERS if cache.recipe.dtype == "int8" else 1
        threads = READERS if self.staged or mode != "memmap" else few  # a disk serves several at once
        self.reader = RowReader(cache, self.levels, mode, threads, verify=verify, decoding=not self.staged)
        sizes = torch.tensor(cache.rows.content, dtype=torch.int32)
        frame = torch.tensor(cache.recipe.frame, dtype=torch.int32)
        self.content = None if bool((sizes == frame).all()) else sizes  # (rows of the cache, 2)
        self.held: list[Held] = []

    def __enter__(self) -> "FeatureLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.close()

    def keep_on_device(self, splits: Mapping[str, NDArray[np.intp]]) -> str:
        """Move the rows of each split to the GPU, in the given order, as long as DEVICE_SHARE of its memory lasts.

        A split moves whole or not at all. Where less memory is left than was reported free, that split and all after it
        stream from the file. Returns a sentence on what moved and what streams; "" on a device without memory of its
        own.
        """
        room = device_room(self.device)
        if room is None:
            return ""
        left, moved, streamed = int(room * DEVICE_SHARE), list[str](), list[str]()
        for name, rows in splits.items():
            if not len(rows):
                continue
            wanted = len(rows) * sum(self.reader.row_bytes(level) for level in self.levels)
            if wanted <= left:
                left = left - wanted if self._keep(np.unique(rows)) else 0
            (moved if self.resident(rows) else streamed).append(name)
        taken = human_bytes(sum(m.nbytes for held in self.held for m in held.maps.values()))
        notes = [f"features of {', '.join(moved)} lie on {self.device} ({taken})"] if moved else []
        notes += [f"{', '.join(streamed)} streamed from the file"] if streamed else []
        return "; ".join(notes)

    def _keep(self, rows: NDArray[np.intp]) -> bool:
        """Move ascending rows to the device; returns whether its memory held them."""
        try:
            self.held.append(self._moved(rows))
            return True
        except torch.OutOfMemoryError:
            pass
        free_memory()  # out here nothing refers any more to the maps that did fit
        return False

    def _moved(self, rows: NDArray[np.intp]) -> Held:
        maps = {
            name: torch.empty((len(rows), *buffer.shape), dtype=buffer.dtype, device=self.device)
            for level in self.levels
            for name, buffer in self.reader.buffers(level).items()
        }
        step = max(1, PIECE // sum(self.reader.row_bytes(level) for level in self.levels))
        start = 0
        for part in self._ahead(rows[i : i + step] for i in range(0, len(rows), step)):
            for name, m in part.maps.items():
                maps[name][start : start + len(part.rows)].copy_(m)
            start += len(part.rows)
        content = None if self.content is None else self.content[torch.from_numpy(rows)].to(self.device)
        return Held(rows, maps, self.cache.recipe.frame, content, self.as_dtype)

    def resident(self, rows: NDArray[np.intp]) -> Callable[[torch.Tensor], Features] | None:
        """A function from places among a split's ascending rows to their features; None for a split that streams.

        The places are int64 on the device. The function works on the device alone: it reads nothing from the file,
        copies nothing from the CPU and does not wait.
        """
        ascending = np.unique(rows)
        return next((held.at for held in self.held if np.array_equal(held.rows, ascending)), None)

    def positions(self, rows: NDArray[np.intp]) -> torch.Tensor:
        """Places of rows, in the order given, among the rows of the split on the device that holds them.

        Returns int64 on the CPU. Raises ValueError for rows that no split on the device holds.
        """
        found = self._holding(rows)
        if found is None:
            raise ValueError("These rows do not lie on the device.")
        return torch.from_numpy(found[1].astype(np.int64))

    def _holding(self, rows: NDArray[np.intp]) -> tuple[Held, NDArray[np.intp]] | None:
        found = ((held, held.places(rows)) for held in self.held)
        return next(((held, places) for held, places in found if places is not None), None)

    def batches(self, orders: Iterable[NDArray[np.intp]]) -> Generator[tuple[NDArray[np.intp], Features]]:
        """Yields (rows, their features) for each array of row indices.

        A batch's tensors are valid until the next batch is taken, which uses their memory again. Do not write to them.
        """
        return self._from_device(orders) if self.held else self._streamed(orders)

    def training(
        self, orders: Iterable[NDArray[np.intp]], first: int = 0
    ) -> Generator[tuple[NDArray[np.intp], Features]]:
        """The same for a training: of several processes each gets its part of every batch.

        first: number of the first batch; stored features are the same in all of them.
        """
        return self.batches(rows[own_part(len(rows))] for rows in orders)

    def _streamed(self, orders: Iterable[NDArray[np.intp]]) -> Generator[tuple[NDArray[np.intp], Features]]:
        with closing(self._ahead(orders)) as batches:
            for held in batches:
                yield held.rows, held.between(0, len(held.rows)).to(self.device)

    def _from_device(self, orders: Iterable[NDArray[np.intp]]) -> Generator[tuple[NDArray[np.intp], Features]]:
        coming = iter(orders)
        for rows in coming:
            found = self._holding(rows)
            if found is None:  # a split that streams, and so do all that follow
                yield from self._streamed(chain([rows], coming))
                return
            held, places = found
            if len(places) and np.array_equal(places, np.arange(places[0], places[0] + len(places))):
                yield rows, held.between(int(places[0]), int(places[0]) + len(places))
            else:
                index = torch.from_numpy(places.astype(np.int64))
                index = index.pin_memory() if self.device.type == "cuda" else index
                yield rows, held.at(index.to(self.device, non_blocking=True))

    def _ahead(self, orders: Iterable[NDArray[np.intp]]) -> Generator[Held]:
        """Stored batches, read ahead; each lies in a slot of the ring until the next batch is taken."""
        free: queue.SimpleQueue[_Slot | None] = queue.SimpleQueue()
        stopped = threading.Event()
        full: queue.SimpleQueue[tuple[NDArray[np.intp], _Slot] | BaseException | None] = queue.SimpleQueue()
        copies = _Copies(self.device)
        for _ in range(STAGED_RING if self.staged else RING):
            free.put(_Slot(self, copies))

        def work() -> None:
            try:
                for rows in orders:
                    slot = free.get()
                    if slot is None or stopped.is_set():
                        return
                    slot.fill(rows)
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
                yield slot.held(rows)
                slot.release()
                free.put(slot)
        finally:
            stopped.set()
            free.put(None)  # wakes the thread if it waits
            thread.join()


class _Copies:
    """The CUDA stream that copies batches to a GPU while others are computed on; without effect on other devices."""

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self.device = device
        self.own = torch.cuda.Stream(device) if cuda else None
        self.computing = torch.cuda.current_stream(device) if cuda else None

    def empty(self, shape: tuple[int, int]) -> torch.Tensor:
        """Memory on the device that both streams may use."""
        if self.own is None or self.computing is None:
            return torch.empty(shape, dtype=torch.uint8, device=self.device)
        with torch.cuda.stream(self.computing):
            memory = torch.empty(shape, dtype=torch.uint8, device=self.device)
        memory.record_stream(self.own)
        self.own.wait_stream(self.computing)  # which may still be busy with what lay there before
        return memory

    @contextmanager
    def after(self, used: torch.cuda.Event | None) -> Iterator[None]:
        """Inside, work goes to the copying stream, and begins after an event."""
        if self.own is None or used is None:
            yield
            return
        with torch.cuda.stream(self.own):
            self.own.wait_event(used)
            yield


class _Slot:
    """Memory of one batch in the ring, and of its copy on the device; grown to the largest batch it has held."""

    def __init__(self, loader: FeatureLoader, copies: _Copies) -> None:
        self.loader, self.copies = loader, copies
        self.buffers = {name: b for level in loader.levels for name, b in loader.reader.buffers(level).items()}
        widths = {name: buffer.row_bytes for name, buffer in self.buffers.items()}
        self.widths = widths if loader.content is None else {**widths, CONTENT: loader.content.element_size() * 2}
        self.host: dict[str, torch.Tensor] = {}
        self.there: dict[str, torch.Tensor] = {}  # on the device; the same memory on a CPU
        events = copies.own is not None
        self.copied = torch.cuda.Event() if events else None
        self.used = torch.cuda.Event() if events else None

    def fill(self, rows: NDArray[np.intp]) -> None:
        """Read a batch, and begin to copy it to the device."""
        if self.copied is not None:
            self.copied.synchronize()  # the last copy out of the page-locked memory; only the reading thread waits
        for name, width in self.widths.items():
            if name not in self.host or self.host[name].shape[0] < len(rows):
                self.host[name] = _memory(len(rows), width, pinned=self.copied is not None)
                self.there[name] = self.copies.empty((len(rows), width)) if self.loader.staged else self.host[name]
        host = {name: memory[: len(rows)] for name, memory in self.host.items()}
        self.loader.reader.read(rows, {name: host[name].numpy() for name in self.buffers})
        if self.loader.content is not None:
            host[CONTENT].copy_(self.loader.content[torch.from_numpy(rows)].view(torch.uint8))
        if self.loader.staged:
            with self.copies.after(self.used):
                for name, memory in host.items():
                    self.there[name][: len(rows)].copy_(memory, non_blocking=self.copied is not None)
                if self.copied is not None:
                    self.copied.record()

    def held(self, rows: NDArray[np.intp]) -> Held:
        """The batch on the device. Later work on the device waits for the copy; the caller does not."""
        if self.copied is not None:
            torch.cuda.current_stream(self.copies.device).wait_event(self.copied)
        there = {name: memory[: len(rows)] for name, memory in self.there.items()}
        maps = {name: there[name].view(b.dtype).view(len(rows), *b.shape) for name, b in self.buffers.items()}
        content = there[CONTENT].view(torch.int32) if CONTENT in there else None
        return Held(rows, maps, self.loader.cache.recipe.frame, content, self.loader.as_dtype)

    def release(self) -> None:
        """Allow the memory to be used again once the device has done its work so far."""
        if self.used is not None:
            self.used.record(torch.cuda.current_stream(self.copies.device))


def _memory(rows: int, width: int, pinned: bool) -> torch.Tensor:
    """(rows, width) bytes that begin at a memory page, as O_DIRECT needs, in huge pages where the system has them."""
    if pinned:
        return torch.empty((rows, width), dtype=torch.uint8, pin_memory=True)
    held = mmap.mmap(-1, max(1, rows * width), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):  # where the system has none
        held.madvise(mmap.MADV_HUGEPAGE)
    return torch.from_numpy(np.frombuffer(held, dtype=np.uint8, count=rows * width).reshape(rows, width))


def device_room(device: torch.device) -> int | None:
    """Free bytes on a GPU; None on a device without memory of its own."""
    if device.type != "cuda":
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def free_memory() -> None:
    """Give unused memory that torch keeps back to the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
