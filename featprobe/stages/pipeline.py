"""From images to rows of a cache: decoded ahead, computed on the device, written behind."""

import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from featprobe.backbones.backbone import Backbone
from featprobe.backbones.precision import computing
from featprobe.cache import MISSING, UNREADABLE, Cache, CacheWriter, read_contents
from featprobe.cache.reader import TORCH_DTYPE
from featprobe.datasets.images import frame_image, read_levels
from featprobe.errors import DataError, OverflowsDtypeError
from featprobe.stages.job import Job
from featprobe.stages.options import ExtractOptions
from featprobe.stages.survey import skippable

EXPONENT = {
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float32: (torch.int32, 0x7F800000),
}
"""Number format -> integers of its size, and the bits of its exponent."""
AHEAD = 3  # blocks that are decoded before they are needed
IMAGES_KEPT = 4  # decoded, for their next tiles
BEHIND = 2  # blocks that may wait for the disk
WRITERS = 2  # threads: one takes checksums while the other writes


class Filler:
    """Computes the missing rows of a range and counts what it waits for."""

    def __init__(
        self, job: Job, writer: CacheWriter, backbone: Backbone, options: ExtractOptions, device: torch.device
    ) -> None:
        self.job, self.writer, self.backbone, self.options, self.device = job, writer, backbone, options, device
        self.done = Cache(job.path, read_contents(job.path)).done
        self.computed, self.waited_images, self.waited_disk = 0, 0.0, 0.0
        self.read = lru_cache(maxsize=IMAGES_KEPT)(read_levels)

    def fill(self, start: int, stop: int) -> None:
        """Compute every block of [start, stop) that misses a row, and write the rows it misses."""
        size = self.options.batch_size
        blocks = [(a, min(a + size, stop)) for a in range(start, stop, size)]
        blocks = [(a, b) for a, b in blocks if (self.done[a:b] == MISSING).any()]
        missing = sum(int((self.done[a:b] == MISSING).sum()) for a, b in blocks)
        bar = tqdm(total=missing, desc=self.job.recipe.label, unit="img", disable=self.options.quiet or not missing)
        behind = _WriteBehind(self.writer, self.job)
        with bar, ThreadPoolExecutor(max(1, self.options.workers)) as pool:
            try:
                for (a, b), images in self._decoded(blocks, pool):
                    wanted = np.flatnonzero(self.done[a:b] == MISSING)
                    maps, finite, ready = self._compute(a, b, images)
                    begun = time.perf_counter()
                    behind.put(a, wanted, maps, finite, ready)
                    self.waited_disk += time.perf_counter() - begun
                    self.computed += len(wanted)
                    bar.update(len(wanted))
                    rate = self.job.recipe.row_bytes * (bar.format_dict["rate"] or 0.0)
                    bar.set_postfix_str(f"{rate / 1e6:.0f} MB/s", refresh=False)
                begun = time.perf_counter()
                behind.finish()
                self.waited_disk += time.perf_counter() - begun
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                behind.stop()

    def _decoded(
        self, blocks: Sequence[tuple[int, int]], pool: ThreadPoolExecutor
    ) -> Iterator[tuple[tuple[int, int], torch.Tensor]]:
        """Blocks with their images: (block, 3, frame height, frame width), decoded ahead."""
        ahead: deque[tuple[tuple[int, int], list[Future[NDArray[np.float32]]]]] = deque()
        coming = iter(blocks)
        while True:
            while len(ahead) < AHEAD and (block := next(coming, None)) is not None:
                ahead.append((block, [pool.submit(self._decode, row) for row in range(*block)]))
            if not ahead:
                return
            block, futures = ahead.popleft()
            begun = time.perf_counter()
            images = torch.from_numpy(np.stack([self._result(block[0] + k, f) for k, f in enumerate(futures)]))
            self.waited_images += time.perf_counter() - begun
            yield block, images

    def _decode(self, row: int) -> NDArray[np.float32]:
        recipe, placement = self.job.recipe, self.job.rows[row].placement
        if self.done[row] == UNREADABLE:
            return self._blank()
        levels = self.read(self.job.images[row])
        if levels.shape[:2] != self.job.size_of(row):
            raise DataError(f"{self.job.images[row]} changed while features were made. Run the same command again.")
        shown = self.job.rows[row].show(levels)
        return frame_image(shown, placement, recipe.window, recipe.interpolation, recipe.mean, recipe.policy)

    def _result(self, row: int, future: Future[NDArray[np.float32]]) -> NDArray[np.float32]:
        """An image, or a blank in its place (so that its block stays what it is) when it can't be read."""
        try:
            return future.result()
        except DataError as error:
            if not self.options.skip_bad:
                raise skippable(error) from error
            self.writer.mark_unreadable(row, str(error))
            self.done[row] = UNREADABLE
            return self._blank()

    def _blank(self) -> NDArray[np.float32]:
        return np.zeros((3, *self.job.recipe.frame), dtype=np.float32)

    @torch.inference_mode()
    def _compute(
        self, start: int, stop: int, images: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.cuda.Event | None]:
        """Maps of a block on the host in the stored dtype, whether each row is finite, and when they are there."""
        cuda = self.device.type == "cuda"
        if cuda:
            images = images.pin_memory().to(self.device, non_blocking=True)
        else:
            images = images.to(self.device)
        with computing(self.job.recipe.precision, self.device):
            features = self.backbone(images)
        dtype = TORCH_DTYPE[self.job.recipe.dtype]
        nchw = torch.contiguous_format
        maps = {n: m.to(dtype, memory_format=nchw).contiguous() for n, m in features.maps.items()}  # on the device
        finite = torch.stack([finite_rows(m) for m in maps.values()]).all(0)  # (block,)
        if not cuda:
            return {n: m.cpu() for n, m in maps.items()}, finite.cpu(), None
        host = {n: torch.empty(m.shape, dtype=dtype, pin_memory=True) for n, m in maps.items()}
        for name, m in maps.items():
            host[name].copy_(m, non_blocking=True)
        host_finite = torch.empty(finite.shape, dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return host, host_finite, ready


class _WriteBehind:
    """Threads that write blocks while the device computes the next; their errors reach the caller.

    Blocks are marked whole in groups, as large as the disk is behind: a thread that finds none waiting commits.
    """

    def __init__(self, writer: CacheWriter, job: Job) -> None:
        self.writer, self.job = writer, job
        self.waiting: queue.Queue[tuple | None] = queue.Queue(maxsize=BEHIND)
        self.error: BaseException | None = None
        self.threads = [threading.Thread(target=self._work, name="cache-writer", daemon=True) for _ in range(WRITERS)]
        for thread in self.threads:
            thread.start()

    def put(self, *block: Any) -> None:
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
            if self.error is None:
                try:
                    self._write(*block)
                    if self.waiting.empty():
                        self.writer.commit()
                except BaseException as error:  # kept for the thread that computes
                    self.error = self.error or error

    def _write(
        self,
        start: int,
        wanted: NDArray[np.intp],
        maps: dict[str, torch.Tensor],
        finite: torch.Tensor,
        ready: torch.cuda.Event | None,
    ) -> None:
        if ready is not None:
            ready.synchronize()
        bad = [int(k) for k in wanted if not finite[k]]
        if bad:
            dtype = self.job.recipe.dtype
            raise OverflowsDtypeError(
                f"Features of {self.job.rows[start + bad[0]].id} are not finite in {dtype}"
                f"{', whose largest value is 65504' if dtype == 'fp16' else ''}.\n"
                "Its block was not written; rows that were whole stay whole.\n"
                "Store them in a wider format:  featprobe extract … --dtype bf16   (or fp32)"
            )
        arrays = {name: stored_array(m) for name, m in maps.items()}
        for a, b in runs(wanted):
            self.writer.write(start + a, {name: array[a:b] for name, array in arrays.items()})


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

    m: (rows, …), fp16, bf16 or fp32. A value is infinite or nan when all bits of its exponent are set;
    testing them is several times faster on CPUs than torch.isfinite.
    """
    integer, exponent = EXPONENT[m.dtype]
    return ((m.view(integer) & exponent) != exponent).flatten(1).all(1)


def stored_array(m: torch.Tensor) -> NDArray:
    """A map as the cache stores it; bf16 as the 16 bits it is made of."""
    return (m.view(torch.int16) if m.dtype == torch.bfloat16 else m).numpy()
