"""Which of two ways a head computes: in pieces that fit a CPU's caches, or in few large operations, as a GPU wants."""

import torch


def whole_batches(device: torch.device) -> bool:
    """Whether a batch goes through in few large operations; the one place that chooses between the two ways.

    Both compute the same function.
    """
    return device.type != "cpu"
