"""The two ways in which a head computes: in pieces that fit a CPU's caches, or in few large operations for a GPU."""

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor


def whole_batches(device: torch.device) -> bool:
    """Whether a batch is computed in few large operations. Only this function chooses between the two ways.

    Both compute the same function. A graph that leaves torch is written as whole batches: no step of it may depend on
    values.
    """
    return device.type != "cpu" or torch.compiler.is_compiling()


def half_products(device: torch.device, *, training: bool) -> AbstractContextManager[object]:
    """Inside, products and convolutions of a trained head use bfloat16, on GPUs that have it; elsewhere no effect.

    Weights are rounded again in each step: a recorded step must not keep those of an earlier one.
    """
    if not training or device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return nullcontext()
    return torch.autocast("cuda", torch.bfloat16, cache_enabled=False)


def full_products(device: torch.device) -> AbstractContextManager[object]:
    """Inside, products and convolutions use the format of their factors, also within `half_products`: for logits and
    losses."""
    return torch.autocast(device.type, enabled=False) if device.type in ("cpu", "cuda") else nullcontext()


def recorded(device: torch.device) -> bool:
    """Whether a training step of fixed shapes is recorded once, as a CUDA graph, and replayed.

    With FEATPROBE_RECORD=0 no step is recorded, and the training takes longer. The results are the same but for
    rounding, and for the samples of heads that draw some at random.
    """
    return device.type == "cuda" and os.environ.get("FEATPROBE_RECORD") != "0"


def mixed(device: torch.device) -> bool:
    """Whether the device can sum products of half-precision numbers in float32, and return float32."""
    return device.type == "cuda" and "dtype" in torch.ops.aten.bmm.overloads()


@cache
def repeated(parts: tuple[tuple[int, float], ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor with each value as often as its part says, in order. It is kept, because a recorded step must find its
    inputs in place."""
    with torch.inference_mode(False):
        values = [value for times, value in parts for _ in range(times)]
        return torch.tensor(values, dtype=dtype, device=device)
