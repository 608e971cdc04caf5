"""From detections in the frame to objects of the original image."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featprobe.geometry import Placement, Size
from featprobe.probes.detections import Detections
from featprobe.targets import Instance, Rle, encode_window

MASK_THRESHOLD = 0.5
PIXELS_AT_ONCE = 2**20  # of masks that are pasted together


def objects_at_original(detections: Detections, placement: Placement) -> list[tuple[Instance, float]]:
    """(object, score) in pixels of the original image, best first; with masks where the head predicts them."""
    scale_y, scale_x = (o / c for o, c in zip(placement.original, placement.content, strict=True))
    boxes = detections.boxes.detach().cpu().double() * torch.tensor([scale_x, scale_y, scale_x, scale_y])
    height, width = placement.original
    boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))
    probabilities = None if detections.masks is None else detections.masks.detach().cpu().float()
    masks = [None] * len(boxes) if probabilities is None else rles_of(probabilities, boxes, placement.original)
    return [
        (Instance(label, (box[0], box[1], box[2], box[3]), rle), score)
        for box, label, score, rle in zip(
            boxes.tolist(), detections.labels.tolist(), detections.scores.tolist(), masks, strict=True
        )
    ]


def rles_of(probabilities: Tensor, boxes: Tensor, size: Size) -> list[Rle]:
    """The masks of an image from probabilities within boxes, as compressed RLE.

    probabilities: (boxes, side, side). boxes: (boxes, 4), float64, x1 y1 x2 y2, pixels. size: of the image.
    """
    return [encode_window(mask, top, left, size) for top, left, mask in pasted(probabilities, boxes, size)]


def paste_mask(probabilities: Tensor, box: list[float], size: Size) -> NDArray[np.bool_]:
    """A mask of the whole image from probabilities within a box: (height, width).

    probabilities: (side, side). box: x1 y1 x2 y2, pixels.
    """
    whole = np.zeros(size, dtype=bool)
    ((top, left, mask),) = pasted(probabilities[None], torch.tensor([box], dtype=torch.float64), size)
    whole[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
    return whole


def pasted(probabilities: Tensor, boxes: Tensor, size: Size) -> list[tuple[int, int, NDArray[np.bool_]]]:
    """(top, left, the mask from there on) of each box, bilinear at pixel centres; see `rles_of`."""
    empty = np.zeros((0, 0), dtype=bool)
    found = [(0, 0, empty)] * len(boxes)
    starts = boxes[:, :2].long()
    stops = boxes[:, 2:].ceil().long().minimum(torch.tensor(size).flip(0))
    sides = (stops - starts).clamp(min=0) * (boxes[:, 2:] > boxes[:, :2])
    areas = sides.prod(1)
    order = areas.argsort()[int((areas == 0).sum()) :]
    for own in _of_one_size(order, sides[order].tolist()):
        masks = _within(probabilities[own], boxes[own], starts[own], sides[own].amax(0).tolist())
        for i, mask, (left, top), (width, height) in zip(
            own.tolist(), masks, starts[own].tolist(), sides[own].tolist(), strict=True
        ):
            found[i] = top, left, mask[:height, :width]
    return found


def _of_one_size(order: Tensor, sides: list[list[int]]) -> Iterator[Tensor]:
    """Parts of some boxes, in order, that are pasted together: a window that holds each of a part is small enough for
    all of it. A part has one box at least. order: (boxes,). sides: width and height of each, in this order."""
    begin, most = 0, (0, 0)
    for end, (width, height) in enumerate(sides):
        wider = max(most[0], width), max(most[1], height)
        if end > begin and wider[0] * wider[1] * (end + 1 - begin) > PIXELS_AT_ONCE:
            yield order[begin:end]
            begin, wider = end, (width, height)
        most = wider
    if sides:
        yield order[begin:]


def _within(probabilities: Tensor, boxes: Tensor, starts: Tensor, most: list[int]) -> NDArray[np.bool_]:
    """The masks of boxes from their starts on, (boxes, most rows, most columns). most: columns and rows."""
    side = probabilities.shape[-1]
    first, extent = boxes[:, :2].float(), (boxes[:, 2:] - boxes[:, :2]).float()
    x, y = (
        ((starts[:, axis, None] + torch.arange(most[axis]) + 0.5 - first[:, axis, None]) / extent[:, axis, None] * side)
        .sub(0.5)
        .clamp(0, side - 1)
        for axis in (0, 1)
    )
    rows = _lerp(probabilities, y)
    return (_lerp(rows.mT.contiguous(), x).mT >= MASK_THRESHOLD).numpy()


def _lerp(values: Tensor, at: Tensor) -> Tensor:
    """Values between two neighbours: (boxes, places, columns). values: (boxes, rows, columns). at: (boxes, places)."""
    low = at.floor().long()
    high = (low + 1).clamp(max=values.shape[1] - 1)
    own = torch.arange(len(values))[:, None]
    return torch.lerp(values[own, low], values[own, high], (at - low)[:, :, None].to(values.dtype))
