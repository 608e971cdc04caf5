"""From detections in the frame to objects of the original image."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featprobe.geometry import Placement, Size
from featprobe.probes.detections import Detections
from featprobe.targets import Instance, encode_rle

MASK_THRESHOLD = 0.5


def objects_at_original(detections: Detections, placement: Placement) -> list[tuple[Instance, float]]:
    """(object, score) in pixels of the original image, best first; with masks where the head predicts them."""
    scale_y, scale_x = (o / c for o, c in zip(placement.original, placement.content, strict=True))
    boxes = detections.boxes.detach().cpu().double() * torch.tensor([scale_x, scale_y, scale_x, scale_y])
    height, width = placement.original
    boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))
    masks = None if detections.masks is None else detections.masks.detach().cpu().float()
    found = []
    for i, (box, label, score) in enumerate(
        zip(boxes.tolist(), detections.labels.tolist(), detections.scores.tolist(), strict=True)
    ):
        rle = None if masks is None else encode_rle(paste_mask(masks[i], box, placement.original))
        found.append((Instance(label, (box[0], box[1], box[2], box[3]), rle), score))
    return found


def paste_mask(probabilities: Tensor, box: list[float], size: Size) -> NDArray[np.bool_]:
    """A mask of the whole image from probabilities within a box, bilinear at pixel centres.

    probabilities: (side, side). box: x1 y1 x2 y2, pixels. Returns (height, width).
    """
    mask = np.zeros(size, dtype=bool)
    x1, y1, x2, y2 = box
    left, top = int(x1), int(y1)
    right, bottom = min(size[1], int(np.ceil(x2))), min(size[0], int(np.ceil(y2)))
    if right <= left or bottom <= top or x2 <= x1 or y2 <= y1:
        return mask
    side = probabilities.shape[-1]
    x = ((torch.arange(left, right) + 0.5 - x1) / (x2 - x1) * side - 0.5).clamp(0, side - 1)
    y = ((torch.arange(top, bottom) + 0.5 - y1) / (y2 - y1) * side - 0.5).clamp(0, side - 1)
    values = _lerp(_lerp(probabilities, y, 0), x, 1)
    mask[top:bottom, left:right] = (values >= MASK_THRESHOLD).numpy()
    return mask


def _lerp(values: Tensor, at: Tensor, axis: int) -> Tensor:
    low = at.floor().long()
    high = (low + 1).clamp(max=values.shape[axis] - 1)
    part = (at - low).to(values.dtype)
    part = part[:, None] if axis == 0 else part
    return torch.lerp(values.index_select(axis, low), values.index_select(axis, high), part)
