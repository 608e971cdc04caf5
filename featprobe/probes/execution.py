"""Which of two ways a head computes: in pieces that fit a CPU's caches, or in few large operations, as a GPU wants."""

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor


def whole_batches(device: torch.device) -> bool:
    """Whether a batch goes through in few large operations; the one place that chooses between the two ways.

    Both compute the same function.
    """
    return device.type != "cpu"


def half_products(device: torch.device, *, training: bool) -> AbstractContextManager[object]:
    """Products and convolutions of a head that is trained in bfloat16, on GPUs that have it; all else changes nothing.

    Weights are rounded anew each time: a captured step must not keep those of an earlier one.
    """
    if not training or device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return nullcontext()
    return torch.autocast("cuda", torch.bfloat16, cache_enabled=False)


def full_products(device: torch.device) -> AbstractContextManager[object]:
    """Products and convolutions in the format of their factors, whatever stands around them: for logits and losses."""
    return torch.autocast(device.type, enabled=False) if device.type in ("cpu", "cuda") else nullcontext()


def recorded(device: torch.device) -> bool:
    """Whether a training step of fixed shapes is recorded once, as a CUDA graph, and replayed.

    FEATPROBE_RECORD=0 takes every step anew, which gives the same and takes longer.
    """
    return device.type == "cuda" and os.environ.get("FEATPROBE_RECORD") != "0"


def mixed(device: torch.device) -> bool:
    """Whether the device sums products of half-precision numbers in float32, and gives them so."""
    return device.type == "cuda" and "dtype" in torch.ops.aten.bmm.overloads()


@cache
def repeated(parts: tuple[tuple[int, float], ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A value as often as each part says, in turn. Made once: what a recorded step reads must lie there before."""
    with torch.inference_mode(False):
        values = [value for times, value in parts for _ in range(times)]
        return torch.tensor(values, dtype=dtype, device=device)
