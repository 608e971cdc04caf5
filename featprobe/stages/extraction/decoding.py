"""Images decoded before they are asked for: by threads, or for a GPU by processes.

All that is Python threads do in turn. With sixteen of them it takes a third of a millisecond per image, which is more
than the decoding that they do meanwhile.
"""

import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial

import torch
from torch import Tensor

from featprobe.datasets.images.decoder import LONGEST, Answer, Task
from featprobe.datasets.images.framing import Layout, Wanted
from featprobe.datasets.images.pixels import Levels
from featprobe.datasets.images.reading import read_levels
from featprobe.datasets.samples import listed
from featprobe.errors import BackboneError, DataError
from featprobe.machine import human_bytes
from featprobe.stages.extraction.extract_options import ExtractOptions
from featprobe.stages.extraction.frames import Framing, ImageBuffer

AHEAD = 3  # batches
IMAGES_KEPT = 4  # decoded, for their next tiles
Wait = Callable[[], float]
"""Waits for an image: seconds that it took, without waiting. Raises DataError."""
CODE = """
import sys
sys.path[:] = sys.argv[4:]
from featprobe.datasets.images.decoder import serve
serve(*map(int, sys.argv[1:4]))
"""
"""What a process runs. It finds modules where this process does."""
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
LOOKED_AFTER = 1.0  # seconds without an answer after which it is asked whether all processes live
PORTABLE = 1  # cudaHostRegisterPortable: for every device
HELD = 1 << 20  # bytes of messages that the system is asked to hold


def suit(options: ExtractOptions, device: torch.device) -> bool:
    """Whether processes are to decode: for a GPU. Elsewhere the network takes longer than decoding by threads.

    Parts of images are left to threads, which keep what they decoded for the next part.
    """
    whole = not options.tiling and not options.views
    return device.type == "cuda" and options.workers > 1 and whole and hasattr(os, "memfd_create")


class LockingError(Exception):
    """CUDA can't lock memory that processes share; the text is for people."""


class Decoders:
    """Processes that decode images into buffers. They start at once, and are ready a third of a second later.

    Only one thread may use this. `close` ends the processes; so does the end of this one, however it ends.
    """

    def __init__(self, count: int) -> None:
        self._number, self._size = 0, 0
        self._locked: tuple[Tensor, torch.device] | None = None
        self._unsent: deque[bytes] = deque()
        self._asked: dict[int, Wanted] = {}
        self._found: dict[int, Answer] = {}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._handle = os.memfd_create("featprobe-images")
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
        (self._tasks, asked), (self._answers, answered) = pairs
        for own in (self._tasks, answered):
            own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, HELD)
        self._tasks.setblocking(False)
        self._answers.settimeout(LOOKED_AFTER)
        passed = (asked.fileno(), answered.fileno(), self._handle)
        command = [sys.executable, "-c", CODE, *map(str, passed), *sys.path]
        try:
            for _ in range(count):
                self._processes.append(
                    subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=passed,
                        env=os.environ | ONE_THREAD,
                    )
                )  # fmt: skip
        except OSError as error:
            self.close()
            raise BackboneError(
                f"{count} processes that decode images can't be started: {error.strerror or error}.\n"
                "Take fewer (--workers), or 1 for a thread."
            ) from error
        finally:
            asked.close()
            answered.close()

    def buffers(self, framing: Framing, count: int, images: int, image_bytes: int) -> list[ImageBuffer]:
        """Buffers that all share, for so many images each, page-locked for a CUDA device; earlier ones end.

        Raises LockingError where CUDA can't lock memory that processes share.
        """
        self._unlock()
        self._recipe = json.dumps(framing.recipe.to_json())
        size = -(-ImageBuffer.bytes_of(images, image_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._size = max(self._size, count * size)  # what a process sees of it stays there
        os.ftruncate(self._handle, self._size)
        memory = torch.frombuffer(mmap.mmap(self._handle, self._size), dtype=torch.uint8)
        if framing.device.type == "cuda":
            self._lock(memory, framing.device)
        return [ImageBuffer(images, image_bytes, framing.device, memory, i * size) for i in range(count)]

    def submit(self, buffer: ImageBuffer, k: int, wanted: Wanted) -> int:
        """Have an image decoded to place k of a buffer; the number of the task."""
        self._number += 1
        task = Task(
            self._number, self._recipe, buffer.start, buffer.capacity, len(buffer.levels), buffer.layout, k, wanted
        )
        self._asked[self._number] = wanted
        self._unsent.append(task.encode())
        self._send()
        return self._number

    def seconds(self, number: int) -> float:
        """Wait for the end of a task; the seconds that it took. Raises DataError for an image that can't be decoded.

        Raises BackboneError where a process has ended.
        """
        while number not in self._found:
            self._send()
            try:
                message = self._answers.recv(LONGEST)
            except TimeoutError:
                self._look_after()
                continue
            if not message:
                for process in self._processes:
                    process.wait()
                self._look_after()
            answer = Answer.of(message)
            self._found[answer.number] = answer
            del self._asked[answer.number]
        answer = self._found.pop(number)
        if answer.error:
            raise (DataError if answer.is_data else RuntimeError)(answer.error)
        return answer.seconds

    def close(self) -> None:
        """End the processes, whatever they do."""
        for process in self._processes:
            process.kill()
            process.wait()
        self._tasks.close()
        self._answers.close()
        os.close(self._handle)
        self._unlock()

    def _lock(self, memory: Tensor, device: torch.device) -> None:
        with torch.cuda.device(device):
            cuda = torch.cuda.cudart()
            status = cuda.cudaHostRegister(memory.data_ptr(), memory.nbytes, PORTABLE)
            if status != cuda.cudaError.success:
                with suppress(RuntimeError):  # CUDA keeps the error for whoever asks next
                    torch.zeros(1, device=device)
                raise LockingError(
                    "images were decoded by threads, which is slower: CUDA can't lock "
                    f"{human_bytes(memory.nbytes)} that processes share ({cuda.cudaGetErrorString(status)})"
                )
        self._locked = memory, device

    def _unlock(self) -> None:
        """Give back page-locked memory; what a device still copies from it comes first."""
        if self._locked is None:
            return
        memory, device = self._locked
        with torch.cuda.device(device):
            with suppress(RuntimeError):  # of a device that failed
                torch.cuda.synchronize(device)
            torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
        self._locked = None

    def _send(self) -> None:
        """Send tasks, as many as the system holds; never wait, or both ends might."""
        with suppress(BlockingIOError, ConnectionError):  # who waits for the answers sees that all have ended
            while self._unsent:
                self._tasks.send(self._unsent[0])
                self._unsent.popleft()

    def _look_after(self) -> None:
        """Raise BackboneError where a process has ended."""
        ends = [code for process in self._processes if (code := process.poll()) is not None]
        if not ends:
            return
        by = signal.Signals(-ends[0]).name if ends[0] < 0 else f"exit status {ends[0]}"
        short = "Most likely memory is short: take fewer (--workers).\n" if ends[0] == -signal.SIGKILL else ""
        oldest = list(self._asked.values())[: len(self._processes)]  # they take tasks in order
        raise BackboneError(
            f"{len(ends)} of {len(self._processes)} processes that decode images ended ({by}), at one of these:\n"
            f"  {listed([str(wanted.path) for wanted in oldest])}\n"
            f"{short}Rows that were whole stay whole. The same command continues."
        )


class DecodedAhead:
    """Decodes batches into buffers that are used again. decoders: that do it, None for as many threads as workers.

    waited: seconds for which images that were asked for were not there yet; decoding: those of all workers together.
    notes: for people, on how it was done.
    """

    def __init__(self, framing: Framing, workers: int, decoders: Decoders | None) -> None:
        self.framing, self.workers, self.decoders = framing, max(1, workers), decoders
        self.waited = self.decoding = 0.0
        self.notes: tuple[str, ...] = ()
        self._read: Callable[..., Levels] = read_levels
        if framing.recipe.in_parts:
            self._read = lru_cache(maxsize=IMAGES_KEPT)(read_levels)

    def batches(
        self, layouts: Sequence[Layout], batches: Iterable[Sequence[Wanted | None]], most: int
    ) -> Generator[tuple[ImageBuffer, dict[int, DataError]]]:
        """Each batch in its buffer, which is used again when the next is asked for; what can't be decoded, by place.

        The frames of these, and of images that are None, are blank. layouts: of each batch. most: images of a batch.
        """
        frame, free = self.framing.frame, deque(self._buffers(layouts, most))
        ahead: deque[tuple[ImageBuffer, list[Wait]]] = deque()
        coming = zip(layouts, batches, strict=True)
        pool = ThreadPoolExecutor(self.workers)
        try:
            while True:
                while len(ahead) < AHEAD and (following := next(coming, None)) is not None:
                    layout, images = following
                    buffer = free.popleft()
                    buffer.begin(len(images), layout, frame)
                    ahead.append((buffer, [self._begin(buffer, k, wanted, pool) for k, wanted in enumerate(images)]))
                if not ahead:
                    return
                buffer, waits = ahead.popleft()
                yield buffer, self._finish(buffer, waits)
                free.append(buffer)
        finally:
            pool.shutdown(cancel_futures=True)

    def _buffers(self, layouts: Sequence[Layout], most: int) -> list[ImageBuffer]:
        if not layouts:
            return []
        count, image_bytes = min(AHEAD + 1, len(layouts)), max(own.image_bytes(self.framing.frame) for own in layouts)
        if self.decoders is not None:
            try:
                return self.decoders.buffers(self.framing, count, most, image_bytes)
            except LockingError as error:
                self.decoders, self.notes = None, (str(error),)
        return [ImageBuffer(most, image_bytes, self.framing.device) for _ in range(count)]

    def _begin(self, buffer: ImageBuffer, k: int, wanted: Wanted | None, pool: ThreadPoolExecutor) -> Wait:
        if wanted is None:
            return partial(self._blank, buffer, k)
        if self.decoders is not None:
            return partial(self.decoders.seconds, self.decoders.submit(buffer, k, wanted))
        return pool.submit(self._decode, buffer, k, wanted).result

    def _decode(self, buffer: ImageBuffer, k: int, wanted: Wanted) -> float:
        begun = time.perf_counter()
        self.framing.decode(buffer, k, wanted, self._read)
        return time.perf_counter() - begun

    def _blank(self, buffer: ImageBuffer, k: int) -> float:
        self.framing.blank(buffer, k)
        return 0.0

    def _finish(self, buffer: ImageBuffer, waits: Sequence[Wait]) -> dict[int, DataError]:
        """Wait for a batch; what can't be decoded, by place, where the frame is blank then."""
        begun, failed = time.perf_counter(), {}
        for k, wait in enumerate(waits):
            try:
                self.decoding += wait()
            except DataError as error:
                failed[k] = error
                self._blank(buffer, k)
        self.waited += time.perf_counter() - begun
        return failed
