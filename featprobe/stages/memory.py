"""What a stage does and reports if its device has too little memory, or is gone."""

import shlex
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from featprobe.cache.reader import free_memory
from featprobe.errors import BackboneError, ProbeError, counted
from featprobe.features import Features
from featprobe.machine import is_of_device
from featprobe.processes import count
from featprobe.specs import Rows

FULL = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUSOLVER_STATUS_ALLOC_FAILED")
"""What libraries say where the memory of a device is too small for theirs."""
Batches = Callable[[Iterable[Rows]], Iterator[tuple[Rows, Features]]]
T = TypeVar("T")


def device_failure(error: RuntimeError, device: object) -> str:
    """The report of an error that comes from a device, not from what it computed; "" for any other error."""
    text = str(error)
    if not is_of_device(error):
        return ""
    if "CUDA error: out of memory" in text:  # torch's own memory of the device says "CUDA out of memory"
        return (
            f"Memory could not be allocated: most likely the machine's page-locked memory, through which batches go to "
            f"the device {device}.\n  found   {text.splitlines()[0].strip()}\n"
            "Take a smaller --batch-size, or end other work on this machine."
        )
    return f"The device {device} failed and can't be used by this process any more: {text.splitlines()[0].strip()}"


def said_of(error: BaseException) -> str:
    """The report of an error of any device, where no stage reports it; "" for an error that is of none."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return (
            f"The memory of the device is too small.\n  found   {str(error).splitlines()[0]}\n"
            "Take a smaller --size, fewer --levels, a smaller --batch-size, or --device cpu."
        )
    return device_failure(error, "that computes") if isinstance(error, RuntimeError) else ""


@contextmanager
def filled() -> Iterator[None]:
    """Turn what a library says of a full memory of the device into what torch says of it."""
    try:
        yield
    except RuntimeError as error:
        if any(words in str(error) for words in FULL):
            raise torch.cuda.OutOfMemoryError(str(error)) from error
        raise


@contextmanager
def failing(device: torch.device, kept: str) -> Iterator[None]:
    """Turn the error of a device that failed into a BackboneError. kept: what is there still, and how to go on."""
    try:
        with filled():
            yield
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if failure := device_failure(error, device):
            raise BackboneError(f"{failure}\n{kept}") from error
        raise


@contextmanager
def fitting(device: torch.device, kept: str) -> Iterator[None]:
    """`failing`, and a ProbeError where the memory of the device is too small."""
    try:
        with failing(device, kept):
            yield
        return
    except torch.cuda.OutOfMemoryError as error:
        found = str(error).splitlines()[0]
    # out here nothing holds the tensors that did fit any more
    free_memory()
    raise ProbeError(
        f"The memory of {device} is too small.\n  found   {found}\n{kept}\n"
        "Take fewer --levels, a smaller --size or --batch-size, or --device cpu."
    )


def largest_that_fits(count: int, step: Callable[[int], object]) -> int:
    """The largest half, quarter, … of a batch of `count` images whose step does not run out of memory; 0 for none."""
    while count := count // 2:
        free_memory()
        try:
            with filled():
                step(count)
            return count
        except torch.cuda.OutOfMemoryError:
            continue
    return 0


def too_small(device: torch.device, what: str, images: int, found: str, fits: int, remedy: str) -> BackboneError:
    """The error of a batch that the memory of a device does not hold.

    what: was done with the images. found: what the device said. fits: images that it holds, 0 for not even one. remedy:
    how to go on with so many.
    """
    none = "Not even one image fits: take a smaller --size, fewer --levels, a smaller backbone, or --device cpu."
    return BackboneError(
        f"The memory of {device} does not hold {counted(images, 'image')} at once, {what}.\n"
        f"  wanted  memory for {images}\n  found   {found.splitlines()[0]}\n"
        f"What was complete is kept. {f'{fits} at once fit: {remedy}' if fits else none}"
    )


def with_batch_size(command: str, images: int) -> str:
    """A command line with another batch size.

    >>> with_batch_size("featprobe extract --data xray --batch-size 64 --dtype fp32", 8)
    'featprobe extract --data xray --dtype fp32 --batch-size 8'
    """
    words = shlex.split(command)
    if "--batch-size" in words:
        place = words.index("--batch-size")
        del words[place : place + 2]
    return shlex.join([*words, "--batch-size", str(images)])


class Portions:
    """The number of images that are scored, or summed up, at once. It shrinks if the memory of a device is too small.

    That changes no result but by rounding, so it is said and not asked for. say: gets the note. what: names the job.
    """

    def __init__(self, device: torch.device, most: int, what: str, say: Callable[[str], object]) -> None:
        self.device, self.images, self.whole, self.what, self.say = device, most, most, what, say

    def do(self, work: Callable[[Batches], T], batches: Batches) -> T:
        """The result of `work` on the batches; raises ProbeError if no image fits, or if several processes share."""
        while True:
            try:
                with filled():
                    return work(batches if self.images == self.whole else self._cut(batches))
            except torch.cuda.OutOfMemoryError as error:
                found = str(error).splitlines()[0]
            # out here nothing holds the tensors of the batch that failed any more
            if self.images == 1 or count() > 1:
                raise ProbeError(
                    f"{self.what}: the memory of {self.device} does not hold {counted(self.images, 'image')} at "
                    f"once, to score.\n  found   {found}\n"
                    "What was complete is kept. Take fewer --levels, a smaller --size, one process, or --device cpu."
                )
            free_memory()
            self.images //= 2
            self.say(
                f"{self.what}: the memory of {self.device} does not hold {2 * self.images} images at once; "
                f"they are scored {self.images} at a time"
            )

    def _cut(self, batches: Batches) -> Batches:
        def few(orders: Iterable[Rows]) -> Iterator[tuple[Rows, Features]]:
            size = self.images
            return batches(rows[i : i + size] for rows in orders for i in range(0, len(rows), size))

        return few
