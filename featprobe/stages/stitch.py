"""From what heads say of tiles to what they say of the whole image."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor

from featprobe.geometry import Part, Placement, Size
from featprobe.probes import logits_at_original
from featprobe.targets import Instance, move_rle

T = TypeVar("T")
Objects = list[tuple[Instance, float]]
SAME_OBJECT_IOU = 0.5
"""From here on detections of one class in two tiles are one object."""
SAME_OBJECT_WITHIN = 0.7
"""Share of the smaller box within the larger from where on, in two tiles, it is a fragment of the same object."""
AT_EDGE = 2.0
"""Pixels from a tile's inner border within which a box is taken to be cut by it."""


def stitched_logits(
    pieces: Iterable[tuple[Sequence[Tensor], Placement, Part]], stride: int, size: Size
) -> list[Tensor]:
    """Logits of a whole image of (height, width), a head: (classes, height, width), the mean of the tiles at a pixel.

    pieces: of each tile the logits of one or several heads, as `logits_at_original` takes them, and where it lies. What
    is held in memory is one image's logits for each head.
    """
    sums: list[Tensor] = []
    shown = torch.empty(0)
    for logits, placement, part in pieces:
        window = (slice(part.top, part.top + part.height), slice(part.left, part.left + part.width))
        if not sums:
            sums = [own.new_zeros((own.shape[0], *size)) for own in logits]
            shown = logits[0].new_zeros(size)
        for total, own in zip(sums, logits, strict=True):
            total[:, *window] += logits_at_original(own, stride, placement)
        shown[window] += 1
    return [total.div_(shown) for total in sums]


def stitched_maps(pieces: Iterable[tuple[Tensor, Part | None]], size: Size) -> Tensor:
    """A map of a whole image of (height, width), float32: the mean of its tiles at a pixel, or the one piece as it is.

    pieces: of each tile its map, (height, width), at its own size, and where it lies; no part for all of the image.
    A pixel that no tile shows is 0.
    """
    total, shown = torch.zeros(()), torch.zeros(())
    for own, part in pieces:
        if part is None:
            return own
        if not total.dim():
            total, shown = own.new_zeros(size), own.new_zeros(size)
        window = (slice(part.top, part.top + part.height), slice(part.left, part.left + part.width))
        total[window] += own
        shown[window] += 1
    return total.div_(shown.clamp_(min=1))


def whole_logits(
    pieces: Iterable[tuple[Sequence[Tensor], Placement, Part | None]], stride: int, size: Size
) -> Iterator[Tensor]:
    """Logits of an image of (height, width), head by head: of its tiles, or of one piece that is all of it."""
    coming = iter(pieces)
    logits, placement, part = next(coming)
    if part is None:
        yield from (logits_at_original(own, stride, placement) for own in logits)
        return
    tiles = ((own, placed, shown) for own, placed, shown in chain([(logits, placement, part)], coming) if shown)
    yield from stitched_logits(tiles, stride, size)


def stitched_objects(pieces: Sequence[tuple[Objects, Part | None]], size: Size) -> Objects:
    """The objects of an image of (height, width), best first, from those that were found in its tiles.

    Of two detections of one class in two tiles that are one object (SAME_OBJECT_IOU, SAME_OBJECT_WITHIN) one is kept:
    first the one that no inner border of its tile cuts, then the one with the higher score. Within a tile nothing is
    dropped. An object that is larger than the overlap may stay in pieces.
    """
    if len(pieces) == 1 and pieces[0][1] is None:
        return pieces[0][0]
    found = [(instance, score, part) for objects, part in pieces for instance, score in objects if part is not None]
    if not found:
        return []
    shift = torch.tensor([(p.left, p.top, p.left, p.top) for _, _, p in found], dtype=torch.float64)
    boxes = torch.tensor([i.box_xyxy for i, _, _ in found], dtype=torch.float64) + shift
    kept = _one_of_each(boxes, found, size)
    whole = []
    for index in sorted(kept, key=lambda k: (-found[k][1], k)):
        instance, score, part = found[index]
        x1, y1, x2, y2 = boxes[index].tolist()
        rle = None if instance.rle is None else move_rle(instance.rle, part.left, part.top, size)
        whole.append((replace(instance, box_xyxy=(x1, y1, x2, y2), rle=rle), score))
    return whole


def _one_of_each(boxes: Tensor, found: Sequence[tuple[Instance, float, Part]], size: Size) -> list[int]:
    """Indices of the detections that stay; no more than one of them is held against the others at a time."""
    from torchvision.ops import box_area, box_iou

    tile = torch.tensor([(p.left, p.top) for _, _, p in found])
    category = torch.tensor([instance.category for instance, _, _ in found])
    area = box_area(boxes)
    order = sorted(range(len(found)), key=lambda i: (_is_cut(boxes[i].tolist(), found[i][2], size), -found[i][1], i))
    dropped = torch.zeros(len(found), dtype=torch.bool)
    kept = []
    for index in order:
        if dropped[index]:
            continue
        kept.append(index)
        iou = box_iou(boxes[index, None], boxes)[0]  # (found,)
        shared = iou / (1 + iou) * (area[index] + area)  # area of the intersection
        within = shared / area.clamp(min=1e-9, max=float(area[index].clamp(min=1e-9)))
        one = (iou > SAME_OBJECT_IOU) | (within > SAME_OBJECT_WITHIN)
        dropped |= one & (category == category[index]) & (tile != tile[index]).any(-1)
    return kept


def _is_cut(box: Sequence[float], part: Part, size: Size) -> bool:
    """Whether a box, pixels of the whole image, ends at a border of its tile that is none of the image."""
    right, bottom = part.left + part.width, part.top + part.height
    return (
        (part.left > 0 and box[0] < part.left + AT_EDGE)
        or (part.top > 0 and box[1] < part.top + AT_EDGE)
        or (right < size[1] and box[2] > right - AT_EDGE)
        or (bottom < size[0] and box[3] > bottom - AT_EDGE)
    )
