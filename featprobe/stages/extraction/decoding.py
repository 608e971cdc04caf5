"""Images decoded before they are asked for: by threads, or for a GPU by processes.

Threads run Python code one after the other. Where sixteen of them decode, that takes a third of a millisecond per
image: longer than their decoding, which they do at the same time.
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
from contextlib import ExitStack, suppress
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from featprobe.datasets.images.decoder import LONGEST, NUMBER, Answer, Task
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
PATH = [os.path.abspath(place) for place in sys.path]  # before a program goes to another folder
CHILD = """
import sys
sys.path[:] = sys.argv[5:]
from featprobe.datasets.images.decoder import serve
serve(*map(int, sys.argv[1:5]))
"""
"""What a process runs. It finds modules where this process does."""
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
LOOKED_AFTER = 1.0  # seconds without an answer after which it is asked whether all processes live
IDLE_LOOKS = 10  # after which a task that nobody works on is lost
PORTABLE = 1  # cudaHostRegisterPortable: for every device
HELD = 1 << 20  # bytes of messages that the system is asked to hold


def processes_decode(options: ExtractOptions, device: torch.device) -> bool:
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
        self._number, self._idle_looks = 0, 0
        self._locked: tuple[Tensor, torch.device] | None = None
        self._unsent: deque[bytes] = deque()
        self._asked: dict[int, Wanted] = {}
        self._found: dict[int, Answer] = {}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._open = ExitStack()
        try:
            self._start(count)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise BackboneError(
                    f"{count} processes that decode images can't be started: {error.strerror or error}.\n"
                    "Take fewer (--workers), or 1 for a thread."
                ) from error
            raise

    def _start(self, count: int) -> None:
        self._handle = os.memfd_create("featprobe-images")
        self._open.callback(os.close, self._handle)
        self._size = self._first = -(-count * NUMBER.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
        os.ftruncate(self._handle, self._size)
        self._at = np.frombuffer(mmap.mmap(self._handle, self._size), NUMBER)  # the task of each process
        with ExitStack() as theirs:
            (self._tasks, asked), (self._answers, answered) = (
                socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)
            )
            for own, other in ((self._tasks, asked), (self._answers, answered)):
                self._open.enter_context(own)
                theirs.enter_context(other).setblocking(True)  # whatever a program has made the default
            for own in (self._tasks, answered):
                own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, HELD)
            self._tasks.setblocking(False)
            self._answers.settimeout(LOOKED_AFTER)
            passed = (asked.fileno(), answered.fileno(), self._handle)
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C is for this process alone
            try:
                for k in range(count):
                    command = [sys.executable, "-c", CHILD, *map(str, passed), str(k), *PATH]
                    self._processes.append(
                        subprocess.Popen(
                            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=passed,
                            env=os.environ | ONE_THREAD,
                        )
                    )  # fmt: skip
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def buffers(self, framing: Framing, count: int, images: int, image_bytes: int) -> list[ImageBuffer]:
        """Buffers that all share, for so many images each, page-locked for a CUDA device; earlier ones are given up.

        Raises LockingError where CUDA can't lock memory that processes share.
        """
        for number in list(self._asked):  # they would write to the same places
            with suppress(DataError, RuntimeError):
                self.seconds(number)
        self._found.clear()
        self._unlock()
        self._recipe = json.dumps(framing.recipe.to_json())
        size = -(-ImageBuffer.bytes_of(images, image_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._size = max(self._size, self._first + count * size)  # what a process sees of it stays there
        os.ftruncate(self._handle, self._size)
        memory = torch.frombuffer(mmap.mmap(self._handle, self._size), dtype=torch.uint8)
        if framing.device.type == "cuda":
            self._lock(memory, framing.device)
        starts = range(self._first, self._first + count * size, size)
        return [ImageBuffer(images, image_bytes, framing.device, memory, start) for start in starts]

    def submit(self, buffer: ImageBuffer, k: int, wanted: Wanted) -> int:
        """Have a whole image decoded to place k of a buffer; the number of the task."""
        assert wanted.part is None
        self._number += 1
        task = Task(
            self._number, self._recipe, buffer.start, buffer.capacity, len(buffer.levels), buffer.layout, k, wanted
        )
        message = task.encode()
        if len(message) > LONGEST:
            raise DataError(f"{wanted.path} and its recipe take {len(message)} bytes of names. wanted: {LONGEST}.")
        self._asked[self._number] = wanted
        self._unsent.append(message)
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
            if not message:  # all have ended
                for process in self._processes:
                    process.wait()
                self._look_after()
            self._idle_looks = 0
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
        for process in self._processes:
            process.wait()
        self._open.close()
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
        self._locked = None
        with suppress(RuntimeError), torch.cuda.device(device):  # a device that failed gives back nothing
            torch.cuda.synchronize(device)
            torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())

    def _send(self) -> None:
        """Send tasks, as many as the system holds; never wait, or both ends might."""
        with suppress(BlockingIOError, ConnectionError):  # who waits for the answers sees that all have ended
            while self._unsent:
                self._tasks.send(self._unsent[0])
                self._unsent.popleft()

    def _look_after(self) -> None:
        """Raise BackboneError where a process has ended, and with it the work on a task."""
        ended = [k for k, process in enumerate(self._processes) if process.poll() is not None]
        at_work = {k: number for k, number in enumerate(self._at.tolist()) if number in self._asked}
        lost = [self._asked[at_work[k]] for k in ended if k in at_work]
        if ended and not lost:
            if len(ended) < len(self._processes) and (at_work or self._idle_looks < IDLE_LOOKS):
                self._idle_looks += not at_work
                return
            lost = list(self._asked.values())[: len(ended)]  # they take tasks in order
        if not lost:
            return
        code = self._processes[ended[0]].returncode
        by = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        cause = {
            -signal.SIGKILL: "Most likely memory is short: take fewer (--workers).\n",
            1: "What it said stands above.\n",
        }
        raise BackboneError(
            f"{len(ended)} of {len(self._processes)} processes that decode images ended ({by}).\n"
            f"  at      {listed([str(wanted.path) for wanted in lost])}\n"
            f"{cause.get(code, '')}Rows that were whole stay whole. The same command continues."
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
