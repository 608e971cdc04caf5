"""From images to rows of a cache: decoded ahead, computed on the device, written behind."""

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from featprobe.backbones.backbone import Backbone
from featprobe.backbones.precision import computing
from featprobe.cache import MISSING, UNREADABLE, Cache, CacheWriter, read_contents
from featprobe.cache.layout import row_tables
from featprobe.cache.quantised import TABLE_DTYPE, TORCH_DTYPE, coded
from featprobe.datasets.images.framing import ImageKind, Wanted
from featprobe.errors import DataError, OverflowsDtypeError
from featprobe.features import Features, pool
from featprobe.machine import available_memory, usable_cores
from featprobe.specs import FeatureRecipe
from featprobe.stages.extraction.decoding import DecodedAhead, Decoders
from featprobe.stages.extraction.extract_options import ExtractOptions
from featprobe.stages.extraction.frames import Framing, ImageBuffer
from featprobe.stages.extraction.job import Job
from featprobe.stages.extraction.survey import skippable
from featprobe.stages.memory import failing, largest_that_fits, too_small, with_batch_size
from featprobe.stages.progress import Progress

EXPONENT = {
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float32: (torch.int32, 0x7F800000),
}
"""Number format -> integers of its size, and the bits of its exponent."""
FINITE = "finite"  # beside the levels of a slot
BEHIND = 2  # blocks that may wait for the disk
LOCKED_SHARE = 0.2  # of the available memory, for features that come from a CUDA device
WRITERS = min(4, max(2, usable_cores() // 4))  # threads: one takes checksums while another writes
Block = tuple[int, int]


@dataclass
class Busy:
    """Seconds in which each part of the pipeline had work, those of all its threads together.

    copying: features from the device; 0 where none are copied.
    """

    network: float = 0.0
    decoding: float = 0.0
    copying: float = 0.0
    writing: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, part: str, seconds: float) -> None:
        """Count seconds of a part; any thread may."""
        with self._lock:
            setattr(self, part, getattr(self, part) + seconds)

    def alone(self, decoders: int) -> dict[str, float]:
        """Seconds that each part would have taken with nothing else to wait for, its threads all at work."""
        shared = {"network": 1, "decoding": decoders, "copying": 1, "writing": WRITERS}
        return {part: getattr(self, part) / threads for part, threads in shared.items()}

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Count the seconds that the block takes."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.add(part, time.perf_counter() - begun)


@dataclass
class Computed:
    """A block's features on the host. finite: of each row. slot, marks: where a CUDA device copies them, and when."""

    start: int
    wanted: NDArray[np.intp]
    maps: dict[str, torch.Tensor]
    finite: torch.Tensor
    slot: dict[str, torch.Tensor] | None = None
    marks: "_Marks | None" = None


class _Marks(NamedTuple):
    """Points in the work of a CUDA device: before and behind the network, before and behind the copy."""

    begun: torch.cuda.Event
    computed: torch.cuda.Event
    copied_from: torch.cuda.Event
    copied: torch.cuda.Event


class Filler:
    """Computes the missing rows of a range and counts what it waits for. decoders: None for threads."""

    def __init__(
        self,
        job: Job,
        writer: CacheWriter,
        backbone: Backbone,
        options: ExtractOptions,
        device: torch.device,
        decoders: Decoders | None = None,
    ) -> None:
        self.job, self.writer, self.backbone, self.options, self.device = job, writer, backbone, options, device
        self.done = Cache(job.path, read_contents(job.path)).done
        self.computed, self.waited_disk = 0, 0.0
        self.busy = Busy()
        self.framing = Framing(job.recipe, device)
        self.images = DecodedAhead(self.framing, options.workers, decoders)
        self._known: dict[ImageKind, ImageKind] = {}
        self._downloads = torch.cuda.Stream(device) if device.type == "cuda" else None

    def fill(self, start: int, stop: int) -> None:
        """Compute every block of [start, stop) that misses a row, and write the rows it misses.

        Raises BackboneError where the device fails, or its memory does not hold a block, with the size that it holds;
        rows that were whole stay whole.
        """
        size, kept = self.options.batch_size, "Rows that were whole stay whole. The same command continues:"
        try:
            with failing(self.device, f"{kept}  {self.job.command}"):
                return self._fill(start, stop)
        except torch.cuda.OutOfMemoryError as error:
            found = str(error)
        # out here nothing holds the tensors of the block that failed any more
        size = min(size, stop - start)
        fits = largest_that_fits(size, self._try)
        command = with_batch_size(self.job.command, fits)
        shards = ", in every shard alike" if self.options.shard else ""
        where = f"under {self.job.recipe.label}, at {self.job.recipe.frame[0]}x{self.job.recipe.frame[1]} pixels"
        raise too_small(self.device, where, size, found, fits, f"this goes on{shards}:  {command}")

    def _try(self, images: int) -> None:
        """Compute so many blank images, and forget them; those before are still on their way to the host."""
        with torch.inference_mode():
            blank = torch.zeros(images, 3, *self.job.recipe.frame, device=self.device)
            _ = [self._features(blank, (0, images)) for _ in range(2 if self.device.type == "cuda" else 1)]
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

    def _fill(self, start: int, stop: int) -> None:
        size = self.options.batch_size
        blocks = [(a, min(a + size, stop)) for a in range(start, stop, size)]
        blocks = [(a, b) for a, b in blocks if (self.done[a:b] == MISSING).any()]
        missing = sum(int((self.done[a:b] == MISSING).sum()) for a, b in blocks)
        bar = Progress(missing, self.job.recipe.label, "img", quiet=self.options.quiet, leave=True)
        kinds = [self._kinds(block) for block in blocks]
        layouts = [self.framing.layout([kind for kind in own if kind]) for own in kinds]
        images = (
            [self._wanted(row, kind) for row, kind in zip(range(*block), own, strict=True)]
            for block, own in zip(blocks, kinds, strict=True)
        )
        most = max((b - a for a, b in blocks), default=0)
        behind = _WriteBehind(self.writer, self.job, self.busy, self._slots(blocks))
        with bar, closing(self.images.batches(layouts, images, most)) as batches:
            try:
                for block, (buffer, failed) in zip(blocks, batches, strict=True):
                    for k, error in failed.items():
                        self._mark(block[0] + k, error)
                    computed = self._compute(block, buffer, behind)
                    begun = time.perf_counter()
                    behind.put(computed)
                    self.waited_disk += time.perf_counter() - begun
                    self.computed += len(computed.wanted)
                    bar.update(len(computed.wanted))
                    bar.note(f"{self.job.recipe.row_bytes * bar.rate / 1e6:.0f} MB/s")
                begun = time.perf_counter()
                behind.finish()
                self.waited_disk += time.perf_counter() - begun
            finally:
                self.busy.decoding = self.images.decoding
                behind.stop()

    def _slots(self, blocks: Sequence[Block]) -> list[dict[str, torch.Tensor]]:
        """Page-locked memory for the features of as many blocks as may be on their way from a CUDA device.

        Of large images there may be fewer: no other program can use what is locked, and torch rounds it up.
        """
        if self._downloads is None or not blocks:
            return []
        rows = max(b - a for a, b in blocks)
        fit = int(LOCKED_SHARE * available_memory()) // (rows * self.job.recipe.row_bytes)
        tables = [table for own in row_tables(self.job.recipe).values() for table in own]
        return [
            {t.key: torch.empty((rows, *t.shape), dtype=TABLE_DTYPE[t.dtype], pin_memory=True) for t in tables}
            | {FINITE: torch.empty(rows, dtype=torch.bool, pin_memory=True)}
            for _ in range(min(len(blocks), BEHIND + WRITERS + 1, max(2, fit)))
        ]

    def _kinds(self, block: Block) -> list[ImageKind | None]:
        """What the headers say of the images of a block; None for one that can't be read."""
        found = list[ImageKind | None]()
        for row in range(*block):
            if self.done[row] == UNREADABLE:
                found.append(None)
                continue
            kind = ImageKind.of(self.job.header_of(row), self.job.rows[row].placement)
            found.append(self._known.setdefault(kind, kind))
        return found

    def _wanted(self, row: int, kind: ImageKind | None) -> Wanted | None:
        """What a row shows; None, for a blank, so that its block stays what it is, where it can't be read."""
        if kind is None:
            return None
        own = self.job.rows[row]
        return Wanted(self.job.images[row], own.placement, self.job.size_of(row), kind, own.part)

    def _mark(self, row: int, error: DataError) -> None:
        """Raise the error of an image that can't be read, or have its row be omitted."""
        if not self.options.skip_bad:
            raise skippable(error) from error
        self.writer.mark_unreadable(row, str(error))
        self.done[row] = UNREADABLE

    @torch.inference_mode()
    def _compute(self, block: Block, buffer: ImageBuffer, behind: "_WriteBehind") -> Computed:
        """The features of a block in the stored dtype: on the host, or on their way there from a CUDA device."""
        start, stop = block
        wanted = np.flatnonzero(self.done[start:stop] == MISSING)
        if self._downloads is None:
            with self.busy.timing("network"):
                maps, finite = self._features(self.framing.images(buffer), block)
                computed = Computed(start, wanted, {n: m.cpu() for n, m in maps.items()}, finite.cpu())
            check_finite(self.job, computed)
            return computed
        images, stream = self.framing.images(buffer), torch.cuda.current_stream(self.device)
        marks = _Marks(*(torch.cuda.Event(enable_timing=True) for _ in _Marks._fields))
        marks.begun.record(stream)
        maps, finite = self._features(images, block)
        marks.computed.record(stream)
        begun = time.perf_counter()
        slot = behind.slots.get()
        self.waited_disk += time.perf_counter() - begun
        self._downloads.wait_event(marks.computed)
        host = {name: memory[: stop - start] for name, memory in slot.items()}
        with torch.cuda.stream(self._downloads):
            marks.copied_from.record(self._downloads)
            for name, m in {**maps, FINITE: finite}.items():
                host[name].copy_(m, non_blocking=True)
                m.record_stream(self._downloads)
            marks.copied.record(self._downloads)
        return Computed(start, wanted, host, host.pop(FINITE), slot, marks)

    def _features(self, images: torch.Tensor, block: Block) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Features of a block's images on the device as the cache stores them; whether each is finite, (images,)."""
        with computing(self.job.recipe.precision, self.device):
            features = self.backbone(images)
        if self.job.recipe.store == "pooled":
            sizes = [row.placement.content for row in self.job.rows[slice(*block)]]
            content = torch.tensor(sizes, pin_memory=self.device.type == "cuda")  # so that sending it waits for nothing
            features = replace(features, content=content.to(self.device, non_blocking=True))
        maps, finite = stored_features(features, self.job.recipe)
        if self._downloads is not None:  # a GPU puts channels first in no time; else the threads that write do it
            maps = {n: m.contiguous() for n, m in maps.items()}
        return maps, finite


def stored_features(features: Features, recipe: FeatureRecipe) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Features as a cache of this recipe stores them, by `Table.key`; whether each row is finite, (rows,)."""
    maps = {n: m.to(TORCH_DTYPE[recipe.dtype]) for n, m in features.maps.items()}
    finite = torch.stack([finite_rows(m) for m in maps.values()]).all(0)
    if recipe.store == "pooled":
        pooled = pool(replace(features, maps=maps), recipe.levels)
        maps = {n: torch.stack([m, pooled.maximum[n]], 1) for n, m in pooled.mean.items()}
        finite &= torch.stack([finite_rows(m) for m in maps.values()]).all(0)  # a sum may overflow
    return (coded(maps) if recipe.dtype == "int8" else maps), finite


def check_finite(job: Job, block: Computed) -> None:
    """Raise OverflowsDtypeError where a row that is to be written has a value that is not finite."""
    bad = [int(k) for k in block.wanted if not block.finite[k]]
    if bad:
        dtype, amp = job.recipe.dtype, job.recipe.precision == "amp"
        computed = "They were computed in fp16, too (--precision amp); more room has  --precision tf32   (or fp32)\n"
        raise OverflowsDtypeError(
            f"Features of {job.rows[block.start + bad[0]].id} are not finite in {dtype}"
            f"{', whose largest value is 65504' if dtype == 'fp16' else ''}"
            f"{', whose largest value is 65504, as that of fp16, which reading gives' if dtype == 'int8' else ''}.\n"
            f"Its block was not written; rows that were whole stay whole.\n{computed if amp else ''}"
            "Store them in a wider format:  featprobe extract … --dtype bf16   (or fp32)"
        )


class _WriteBehind:
    """Threads that write blocks while the device computes the next; their errors reach the caller.

    slots: memory that blocks from a CUDA device come in; it is free again when its block is written.
    Blocks are marked whole in groups, as large as the disk is behind: a thread that finds none waiting commits.
    """

    def __init__(
        self, writer: CacheWriter, job: Job, busy: Busy, slots: Sequence[dict[str, torch.Tensor]] = ()
    ) -> None:
        self.writer, self.job, self.busy = writer, job, busy
        self.slots: queue.SimpleQueue[dict[str, torch.Tensor]] = queue.SimpleQueue()
        for slot in slots:
            self.slots.put(slot)
        self.waiting: queue.Queue[Computed | None] = queue.Queue(maxsize=BEHIND)
        self.error: BaseException | None = None
        self.threads = [threading.Thread(target=self._work, name="cache-writer", daemon=True) for _ in range(WRITERS)]
        for thread in self.threads:
            thread.start()

    def put(self, block: Computed) -> None:
        """Hand a block over; waits when the disk is behind. Raises what writing an earlier one raised."""
        if self.error:
            raise self.error
        self.waiting.put(block)

    def finish(self) -> None:
        """Wait until all is written; raises what writing raised."""
        self.stop()
        if self.error:
            raise self.error
        self.writer.commit()

    def stop(self) -> None:
        """Write what was handed over, then end the threads."""
        for _ in self.threads:
            self.waiting.put(None)
        for thread in self.threads:
            thread.join()
        self.threads = []

    def _work(self) -> None:
        while (block := self.waiting.get()) is not None:
            try:
                if self.error is None:
                    self._write(block)
            except BaseException as error:  # kept for the thread that computes
                self.error = self.error or error
            finally:
                if block.slot is not None:
                    self.slots.put(block.slot)

    def _write(self, block: Computed) -> None:
        if block.marks is not None:
            block.marks.copied.synchronize()
            self.busy.add("network", block.marks.begun.elapsed_time(block.marks.computed) / 1000)
            self.busy.add("copying", block.marks.copied_from.elapsed_time(block.marks.copied) / 1000)
            check_finite(self.job, block)
        with self.busy.timing("writing"):
            arrays = {name: as_stored(m) for name, m in block.maps.items()}
            for a, b in runs(block.wanted):
                self.writer.write(block.start + a, {name: array[a:b] for name, array in arrays.items()})
            if self.waiting.empty():
                self.writer.commit()


def runs(indices: NDArray[np.intp], most: int | None = None) -> Iterator[tuple[int, int]]:
    """Consecutive runs [start, stop) of ascending indices, none longer than `most`.

    >>> list(runs(np.array([1, 2, 3, 7]), most=2))
    [(1, 3), (3, 4), (7, 8)]
    """
    for run in np.split(indices, np.flatnonzero(np.diff(indices) > 1) + 1):
        step = most or max(1, len(run))
        for first in range(0, len(run), step):
            part = run[first : first + step]
            yield int(part[0]), int(part[-1]) + 1


def finite_rows(m: torch.Tensor) -> torch.Tensor:
    """Whether each row holds finite values only: (rows,), bool.

    m: (rows, …), fp16, bf16 or fp32, in any order in memory. A value is infinite or nan when all
    bits of its exponent are set. Without their sign the bits of such are the largest integers, so that one pass looks
    for the largest: many times faster on CPUs than torch.isfinite.
    """
    integer, exponent = EXPONENT[m.dtype]
    return (m.view(integer) & torch.iinfo(integer).max).amax(tuple(range(1, m.ndim))) < exponent


def as_stored(m: torch.Tensor) -> NDArray:
    """A map as the cache stores it; bf16 as the 16 bits it is made of."""
    return (m.view(torch.int16) if m.dtype == torch.bfloat16 else m).numpy()
