"""Batches of cached features on the device that trains, read before the training needs them."""

import mmap
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray

from featprobe.cache.quantised import SCALES, as_read, decode
from featprobe.cache.row_reader import Mode, RowReader, choose_mode
from featprobe.cache.store import Cache
from featprobe.features import Features
from featprobe.levels import FeatureLevel
from featprobe.machine import human_bytes, usable_cores
from featprobe.processes import own_part
from featprobe.specs import CacheDtype

RING = 3  # batches: one in use, one ready, one being read
STAGED_RING = 2  # batches on their way to another device: one in use there, one being read and copied
READERS = 4  # threads that read rows from a disk, or for another device
DECODERS = min(4, usable_cores())  # threads that read rows of int8 from memory and decode them, on a CPU
DEVICE_SHARE = 0.5  # of a GPU's free memory that rows may take; the rest is for the training
CONTENT = ""  # name of the buffer of content sizes: no level has it
PIECE = 64 * 2**20  # bytes, about, that are read at once when a split's rows move to a GPU


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
        except torch.cuda.OutOfMemoryError:
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
    return torch.cuda.mem_get_info(device.index)[0] + cached


def free_memory() -> None:
    """Give unused memory that torch keeps back to the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
