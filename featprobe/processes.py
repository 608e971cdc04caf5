"""Processes that train and score together, as torchrun and `accelerate launch` start them.

All processes hold the same weights, recipe and order of rows; each computes another slice of every batch, so their
number does not change the result. DistributedDataParallel does not fit: heads are used through functions of their
parameters (folded into one convolution, many as one bank), not through the forward method of one module. So losses,
moments and gradients are summed here, explicitly.

A single process has no overhead: nothing is sent, and Accelerate is not imported. A process that fails ends with its
error and does not wait for others; the launcher then ends the others.
"""

import atexit
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from featprobe.errors import BackboneError, ProbeError
from featprobe.machine import DEVICES, check_device, launched, no_device

LONGEST_WAIT = timedelta(hours=2)  # the others wait so long for the main process, which solves, scores and writes alone
T = TypeVar("T")

_rank, _count = 0, 1  # this process's number, and the size of the group that it has joined


def pick_device(name: str | None) -> torch.device:
    """The device of this name, or the best available device; under torchrun the GPU of the local rank.

    Raises BackboneError when the requested device is not available.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = name or next(own for own in DEVICES if present[own])
    check_device(kind)
    family, _, number = kind.partition(":")
    if not present[family] or (family == "cuda" and int(number or 0) >= torch.cuda.device_count()):
        gpus = [f"cuda:{i}" for i in range(1, torch.cuda.device_count())] if present["cuda"] else []
        raise BackboneError(no_device(kind, ", ".join([*(k for k, here in present.items() if here), *gpus])))
    if kind == "cuda" and "LOCAL_RANK" in os.environ:
        kind = f"cuda:{os.environ['LOCAL_RANK']}"
    return torch.device(kind)


@contextmanager
def together(device: torch.device) -> Iterator[None]:
    """Inside, this process computes together with the processes launched beside it: NCCL on GPUs, gloo on CPUs.

    device: that of this process. Does nothing for a single process. Raises BackboneError for a device on which several
    processes can't compute together.
    """
    global _rank, _count
    rank, count = launched()
    if count > 1 and _count == 1:
        _check_device(device)
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise BackboneError(
                f"{count} processes can't compute together without Accelerate, which is not installed. Nothing was "
                "trained.\nInstall it:  pip install 'featprobe[processes]'"
            ) from error

        PartialState(cpu=device.type == "cpu", timeout=LONGEST_WAIT)
        _rank, _count = rank, count
    atexit.unregister(_leave)  # after an error it might wait for processes that wait for this one
    yield
    if count > 1:
        atexit.register(_leave)


def _check_device(device: torch.device) -> None:
    rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if device.type == "cpu" or (device.type == "cuda" and device.index == rank < gpus):
        return
    raise BackboneError(
        f"Several processes can't compute on {device} together. Nothing was started.\n"
        f"  wanted  cpu, or cuda: each process uses the GPU of its number on its machine, this one cuda:{rank}\n"
        f"  found   {gpus} GPUs\n"
        "Omit --device, and start as many processes as there are GPUs, or one."
    )


def _leave() -> None:
    from accelerate import PartialState

    PartialState().destroy_process_group()


def check_together() -> None:
    """Raise ProbeError where several processes were launched but each would do the whole job."""
    rank, started = launched()
    if started > _count:
        raise ProbeError(
            f"This is process {rank} of {started}, and each would train everything and write to the same files.\n"
            "Nothing was trained. `featprobe probe` and `featprobe finetune` train together. Start anything else once."
        )


def count() -> int:
    """The number of processes that compute together."""
    return _count


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return _rank == 0


def own_part(total: int) -> slice:
    """The slice of `total` items for this process: consecutive items, slices as equal as possible.

    >>> own_part(7)
    slice(0, 7, None)
    """
    return slice(_rank * total // _count, (_rank + 1) * total // _count)


class _Sum(torch.autograd.Function):
    """A sum over processes. Its gradient is the sum of the gradients of all processes."""

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
    """x summed over all processes, with its gradient. Every loss and every normalisation uses it.

    A process's loss is its numerator over the denominator of all processes: `numerator / summed(denominator)`. Such
    losses sum to the loss of the whole batch, and so do their gradients. Every process must call this equally often,
    whatever its slice of a batch holds.
    """
    return x if _count == 1 else _Sum.apply(x)


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum the gradients of all processes in place, with one message per number format and device.

    A parameter without a gradient in every process keeps none, so that an optimizer skips it.
    """
    if _count == 1:
        return
    kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter in parameters:
        kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for (dtype, device), alike in kinds.items():
        there = torch.tensor([p.grad is not None for p in alike], dtype=dtype, device=device)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in alike]
        total = summed(torch.cat([there, *(g.flatten() for g in gradients)]))
        sums = total[len(alike) :].split([g.numel() for g in gradients])
        for p, gradient, found, anywhere in zip(alike, gradients, sums, total.tolist()[: len(alike)], strict=True):
            if anywhere:
                p.grad = gradient.copy_(found.view_as(gradient))  # keeps its memory layout


def gathered(items: Sequence[T]) -> list[T]:
    """The items of all processes, in the order of the processes."""
    if _count == 1:
        return list(items)
    from accelerate.utils import gather_object

    return gather_object(list(items))


def from_main(make: Callable[[], T]) -> T:
    """The result of `make`, which only the main process calls; the other processes wait for it."""
    if _count == 1:
        return make()
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([make() if is_main() else None])[0]


def check_batch(images: int, parts: int) -> None:
    """Raise ProbeError when a batch has too few images for every process and every part of a step."""
    if images < parts * _count:
        each = f"{_count} processes" if parts == 1 else f"{_count} processes in {parts} parts (--accumulate)"
        raise ProbeError(
            f"A batch of {images} images can't be cut for {each}. Nothing was trained.\n"
            f"  wanted  at least {parts * _count} images per step: --batch-size counts the images of all processes\n"
            "Raise --batch-size if the training split has as many images, or start fewer processes."
        )


def check_norms(module: nn.Module) -> None:
    """Raise ProbeError for a BatchNorm in training that would use only the statistics of one process."""
    if _count > 1 and any(
        isinstance(m, _BatchNorm) and m.training and not isinstance(m, nn.SyncBatchNorm) for m in module.modules()
    ):
        raise ProbeError(
            f"BatchNorm would be trained by {_count} processes, each with its own statistics. Nothing was trained.\n"
            "  wanted  statistics of the whole batch, which torch.nn.SyncBatchNorm has only on CUDA devices\n"
            "Use --bn frozen, one process, or GPUs."
        )
