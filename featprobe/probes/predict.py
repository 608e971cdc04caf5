"""From logits on a grid of cells to classes of the original image's pixels."""

import torch
from torch import Tensor

from featprobe.geometry import Placement


def logits_at_original(logits: Tensor, stride: int, placement: Placement) -> Tensor:
    """Logits of one image, bilinearly at every pixel centre of the original image.

    logits: (classes, rows, columns) of the frame's cells, `stride` frame pixels each.
    Returns (classes, original height, original width). Cells that hold nothing but padding take no part.
    """
    for axis, (original, content) in enumerate(zip(placement.original, placement.content, strict=True), start=1):
        centre = (torch.arange(original, device=logits.device, dtype=torch.float32) + 0.5) * (content / original)
        cell = (centre / stride - 0.5).clamp(0, -(-content // stride) - 1)
        low = cell.floor().long()
        high = (low + 1).clamp(max=-(-content // stride) - 1)
        part = (cell - low).to(logits.dtype).view([-1 if a == axis else 1 for a in range(3)])
        logits = torch.lerp(logits.index_select(axis, low), logits.index_select(axis, high), part)
    return logits


def predict_classes(logits: Tensor, stride: int, placement: Placement) -> Tensor:
    """Class index of every pixel of the original image: (height, width), uint8; the lowest of equals."""
    return best_classes(logits_at_original(logits, stride, placement))


def best_classes(logits: Tensor) -> Tensor:
    """Class index of every pixel, uint8, from logits of (classes, height, width); the lowest of equals.

    Class by class, since torch's argmax over the first axis is ten times slower on CPUs.
    """
    best = logits[0]
    classes = torch.zeros_like(best, dtype=torch.uint8)
    for index, own in enumerate(logits[1:], start=1):
        classes.masked_fill_(own > best, index)
        best = torch.maximum(best, own)
    return classes
