"""Processes that train and score together, as torchrun and `accelerate launch` start them.

All of them hold the same weights, recipe and order of rows; what differs is the slice of each batch that a process
computes, so their number is no part of the result. DistributedDataParallel does not fit: heads are used through
functions over their parameters (folded into one convolution, many of them as one bank), not through one module's
forward. So losses, moments and gradients are summed here, in plain sight.

A process alone pays nothing: nothing is sent, and Accelerate is not imported. A process that fails ends with its error
and waits for no other; the launcher then ends the others.
"""

import atexit
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from featprobe.errors import BackboneError, ProbeError

LONGEST_WAIT = timedelta(hours=2)  # for the main process while it solves, scores or writes alone
T = TypeVar("T")

_rank, _count = 0, 1  # of the group that this process has joined


def pick_device(name: str | None) -> torch.device:
    """The device of this name, or the best there is; under torchrun, the GPU of the local rank.

    Raises BackboneError when the device that is asked for is not here.
    """
    kind = name or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not re.fullmatch(r"[a-z]+(:\d+)?", kind) or not present.get(kind.split(":")[0], False):
        raise BackboneError(
            f"There is no device {kind!r} here.\n"
            f"  wanted  one of {', '.join(k for k, here in present.items() if here)}\n"
            "Leave --device away to take the best there is."
        )
    if kind == "cuda" and "LOCAL_RANK" in os.environ:
        kind = f"cuda:{os.environ['LOCAL_RANK']}"
    return torch.device(kind)


def launched() -> tuple[int, int]:
    """(number of this process from 0, how many there are) as torchrun says; (0, 1) where it started none."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


@contextmanager
def together(device: torch.device) -> Iterator[None]:
    """Compute with the processes that were launched beside this one: NCCL on GPUs, gloo on CPUs.

    device: of this process. Where none was launched nothing happens. Raises BackboneError for a device that several
    processes can't compute on together.
    """
    global _rank, _count
    rank, count = launched()
    if count > 1 and _count == 1:
        _check_device(device)
        from accelerate import PartialState

        PartialState(cpu=device.type == "cpu", timeout=LONGEST_WAIT)
        _rank, _count = rank, count
    atexit.unregister(_leave)  # after an error it might wait for those that wait for this process
    yield
    if count > 1:
        atexit.register(_leave)


def _check_device(device: torch.device) -> None:
    own, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if device.type == "cpu" or (device.type == "cuda" and device.index == own < gpus):
        return
    raise BackboneError(
        f"Several processes can't compute on {device} together. Nothing was started.\n"
        f"  wanted  cpu, or cuda: each process takes the GPU of its number on its machine, this one cuda:{own}\n"
        f"  found   {gpus} GPUs\n"
        "Leave --device away, start as many processes as there are GPUs, or one."
    )


def _leave() -> None:
    from accelerate import PartialState

    PartialState().destroy_process_group()


def check_together() -> None:
    """Raise ProbeError where several processes were launched that would each do the whole job."""
    rank, started = launched()
    if started > _count:
        raise ProbeError(
            f"This is process {rank} of {started}, and each would train everything and write to the same files.\n"
            "Nothing was trained. `featprobe probe` and `featprobe finetune` train together. Start anything else once."
        )


def count() -> int:
    """How many processes compute together."""
    return _count


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return _rank == 0


def own_part(total: int) -> slice:
    """Which of `total` things in a row are this process's: consecutive ones, as even as can be.

    >>> own_part(7)
    slice(0, 7, None)
    """
    return slice(_rank * total // _count, (_rank + 1) * total // _count)


class _Sum(torch.autograd.Function):
    """A sum over processes, whose gradient is the sum of what all processes make of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _all_reduced(x)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        return _all_reduced(upstream[0])


def _all_reduced(x: Tensor) -> Tensor:
    from accelerate.utils import reduce

    return reduce(x.contiguous(), "sum")


def summed(x: Tensor) -> Tensor:
    """x added up over all processes, with its gradient: what every loss and every normalisation goes through.

    A loss is its own numerator over the denominator of all: `numerator / summed(denominator)`; such losses add up to
    the loss of the whole batch, and so do their gradients. Every process must come here equally often, whatever its
    slice of a batch holds.
    """
    return x if _count == 1 else _Sum.apply(x)


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all processes in place, in one message for each number format and device.

    A parameter that has no gradient in any process keeps none, so that an optimizer passes it over.
    """
    if _count == 1:
        return
    kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter in parameters:
        kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for (dtype, device), own in kinds.items():
        there = torch.tensor([p.grad is not None for p in own], dtype=dtype, device=device)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in own]
        total = summed(torch.cat([there, *(g.flatten() for g in gradients)]))
        sums = total[len(own) :].split([g.numel() for g in gradients])
        for p, gradient, found, anywhere in zip(own, gradients, sums, total.tolist()[: len(own)], strict=True):
            if anywhere:
                p.grad = gradient.copy_(found.view_as(gradient))  # which keeps its layout in memory


def gathered(own: Sequence[T]) -> list[T]:
    """The things of all processes, those of the first process first."""
    if _count == 1:
        return list(own)
    from accelerate.utils import gather_object

    return gather_object(list(own))


def from_main(make: Callable[[], T]) -> T:
    """What `make` gives in the main process, which alone calls it; the others wait for it."""
    if _count == 1:
        return make()
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([make() if is_main() else None])[0]


def check_batch(images: int, parts: int) -> None:
    """Raise ProbeError when a batch does not give each process an image of each of its parts."""
    if images < parts * _count:
        each = f"{_count} processes" if parts == 1 else f"{_count} processes in {parts} parts (--accumulate)"
        raise ProbeError(
            f"A batch of {images} images can't be cut for {each}. Nothing was trained.\n"
            f"  wanted  at least {parts * _count} images a step: --batch-size counts those of all processes together\n"
            "Raise --batch-size where the training split has as many images, or start fewer processes."
        )


def check_norms(module: nn.Module) -> None:
    """Raise ProbeError for a BatchNorm in training whose statistics would be those of one process alone."""
    if _count > 1 and any(
        isinstance(m, _BatchNorm) and m.training and not isinstance(m, nn.SyncBatchNorm) for m in module.modules()
    ):
        raise ProbeError(
            f"BatchNorm would be trained by {_count} processes, each on statistics of its own. Nothing was trained.\n"
            "  wanted  statistics of the whole batch, which torch.nn.SyncBatchNorm has on CUDA devices alone\n"
            "Take --bn frozen, one process, or GPUs."
        )
