"""From logits on a grid of cells to the class of each pixel of the original image."""

from itertools import product

import torch
from torch import Tensor

from featprobe.geometry import Placement
from featprobe.probes import execution

VALUES_AT_ONCE = 2**26  # logits at the original size, or indicators of their classes, that a GPU holds


def logits_at_original(logits: Tensor, stride: int, placement: Placement) -> Tensor:
    """Logits of images of one placement, bilinearly at every pixel centre of the original images.

    logits: (…, classes, rows, columns) of the frame's cells, `stride` frame pixels each.
    Returns (…, classes, original height, original width). Cells of padding only do not count.
    """
    rows, columns = (-(-content // stride) for content in placement.content)
    scales = [o * stride / c for o, c in zip(placement.original, placement.content, strict=True)]  # pixels a cell
    shown = logits[..., :rows, :columns]
    images = shown.reshape(-1, *shown.shape[-3:])
    found = torch.ops.aten.upsample_bilinear2d(images, list(placement.original), False, *scales)
    return found.unflatten(0, shown.shape[:-3]) if logits.dim() > 3 else found[0]


def predict_classes(logits: Tensor, stride: int, placement: Placement) -> Tensor:
    """The class index of every pixel of the original image: (height, width), uint8; for equal logits the lowest."""
    return best_classes(logits_at_original(logits, stride, placement))


def best_classes(logits: Tensor) -> Tensor:
    """The class index of every pixel, uint8, from logits (classes, height, width); for equal logits the lowest.

    On a CPU it goes class by class, because torch's argmax over the first axis is thirty times slower there.
    """
    if execution.whole_batches(logits.device):
        return logits.argmax(0).to(torch.uint8)
    best = logits[0]
    classes = torch.zeros_like(best, dtype=torch.uint8)
    for index, own in enumerate(logits[1:], start=1):
        classes.masked_fill_(own > best, index)
        best = torch.maximum(best, own)
    return classes


def count_pairs(truth: Tensor, predicted: Tensor, index: Tensor, out: Tensor) -> None:
    """metrics.confusion_matrix of many images and heads, in few operations and without waiting for any.

    truth: (images, height, width), uint8; 255 is ignored. predicted: (images, heads, height, width), class indices.
    index: (classes,), the numbers of the classes. out: (images, classes, heads, classes), int64, is filled. Pairs are
    counted as a product of indicators, line by line: a line's counts are exact in float32, in whichever order it adds.
    Lines, and then heads, go in blocks where their indicators would be more than VALUES_AT_ONCE.
    """
    images, heads, height, width = predicted.shape
    of_line = images * max(width, len(index)) * len(index)  # values of one line and head
    beside = max(1, min(heads, VALUES_AT_ONCE // of_line))
    lines = max(1, min(height, VALUES_AT_ONCE // (of_line * beside)))
    for k, top in product(range(0, heads, beside), range(0, height, lines)):
        own = out[:, :, k : k + beside]
        block = predicted[:, k : k + beside, top : top + lines].permute(0, 2, 3, 1)
        true = (truth[:, top : top + lines, None] == index[:, None]).float()  # (images, lines, classes, width)
        said = (block[..., None] == index).float()  # (images, lines, width, heads, classes)
        of_lines = (true @ said.flatten(3)).unflatten(3, said.shape[3:])  # (images, lines, classes, heads, classes)
        if top == 0:
            torch.sum(of_lines, 1, dtype=torch.int64, out=own)
        else:
            own += of_lines.sum(1, dtype=torch.int64)
