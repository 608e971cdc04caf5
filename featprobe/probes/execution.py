"""Which of two ways a head computes: in pieces that fit a CPU's caches, or in few large operations, as a GPU wants."""

import os
from functools import cache

import torch
from torch import Tensor


def whole_batches(device: torch.device) -> bool:
    """Whether a batch goes through in few large operations; the one place that chooses between the two ways.

    Both compute the same function.
    """
    return device.type != "cpu"


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
