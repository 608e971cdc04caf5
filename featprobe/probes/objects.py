"""What the detection and instance heads share: targets, detections, levels that follow the objects' sizes."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log2

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_area

from featprobe.features import Features
from featprobe.levels import FeatureLevel
from featprobe.probes.pyramid import PyramidKind, SimplePyramid, TopDown, make_pyramid

MOST_DETECTIONS = 100  # an image, as COCO counts
CELLS_PER_OBJECT = 2.0  # how many cells the side of a small object should span
CELLS_AT_BORDER = 8  # an object whose side spans more cells of a level goes to the next (FCOS: 64 pixels at stride 8)


@dataclass(frozen=True)
class ObjectTarget:
    """The labelled objects of one image, in frame pixels.

    boxes: (objects, 4), float32, x1 y1 x2 y2. labels: (objects,), int64, >= 1. masks: (objects, height, width) of the
    frame, uint8, or None. crowds: (regions, 4): what lies in them is neither object nor background.
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor | None
    crowds: Tensor

    def to(self, device: torch.device) -> "ObjectTarget":
        """The same target on another device."""
        masks = None if self.masks is None else self.masks.to(device, non_blocking=True)
        moved = (v.to(device, non_blocking=True) for v in (self.boxes, self.labels, self.crowds))
        boxes, labels, crowds = moved
        return ObjectTarget(boxes, labels, masks, crowds)


@dataclass(frozen=True)
class Detections:
    """What a head found in one image, best first.

    boxes: (found, 4), frame pixels, x1 y1 x2 y2. labels: (found,), >= 1. scores: (found,), in [0, 1].
    masks: (found, side, side), probabilities within each box, or None.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    masks: Tensor | None = None


def detection_strides(strides: Sequence[int], sides: Sequence[float]) -> tuple[int, ...]:
    """Strides at which objects of these sizes are looked for, finest first.

    sides: 10th, 50th and 90th percentile of the training objects' sides (square root of the box's area), frame
    pixels; empty for no knowledge, which takes every stride. The finest is the coarsest whose cells a small object
    still spans twice, or the finest there is; levels that even the large objects do not reach are left out.

    >>> detection_strides((4, 8, 16, 32), (25.0, 33.0, 50.0)), detection_strides((4, 8, 16, 32), (6.0, 20.0, 200.0))
    ((8, 16), (4, 8, 16, 32))
    """
    if not sides:
        return tuple(strides)
    fine = [stride for stride in strides if CELLS_PER_OBJECT * stride <= sides[0]]
    finest = max(fine) if fine else min(strides)
    kept = [stride for stride in strides if stride >= finest]
    return tuple(s for i, s in enumerate(kept) if i == 0 or CELLS_AT_BORDER * kept[i - 1] < 1.5 * sides[2])


def detection_pyramid(
    levels: Sequence[FeatureLevel], width: int, sides: Sequence[float], kind: PyramidKind
) -> tuple[tuple[int, ...], TopDown | SimplePyramid]:
    """The strides at which objects of these sizes are looked for, and a pyramid that has them."""
    strides = detection_strides(make_pyramid(levels, width, kind).strides, sides)
    return strides, make_pyramid(levels, width, kind, strides[0])


def maps_of(
    pyramid: TopDown | SimplePyramid, strides: Sequence[int], features: Features
) -> list[tuple[Tensor, Tensor | None]]:
    """(map, cells inside) of these strides alone, as the pyramid gives them."""
    found = dict(zip(pyramid.strides, pyramid(features), strict=True))
    return [found[stride] for stride in strides]


def object_sides(boxes: Tensor) -> tuple[float, ...]:
    """10th, 50th and 90th percentile of the sides (square root of the area) of boxes; empty without a box.

    boxes: (objects, 4), x1 y1 x2 y2.
    """
    if not len(boxes):
        return ()
    found = torch.quantile(box_area(boxes).sqrt(), torch.tensor([0.1, 0.5, 0.9]))
    return tuple(round(float(v), 2) for v in found)


def side_ranges(strides: Sequence[int]) -> list[tuple[float, float]]:
    """Which sides, low <= side < high in pixels, belong to each stride; the last takes all that is larger.

    >>> side_ranges((4, 8))
    [(0.0, 32.0), (32.0, inf)]
    """
    borders = [0.0, *(float(CELLS_AT_BORDER * s) for s in strides[:-1]), float("inf")]
    return list(pairwise(borders))


def anchor_sizes(strides: Sequence[int], sides: Sequence[float]) -> list[tuple[int, ...]]:
    """Sides of the anchors of each stride, pixels: two an octave over the range of sides that belongs to it.

    The range is cut to that of the training objects where it is known.
    """
    found = []
    for stride, (low, high) in zip(strides, side_ranges(strides), strict=True):
        small = max(low, 2.0 * stride, 0.7 * sides[0] if sides else 0.0)
        large = min(high, max(2.0 * small, 1.4 * sides[2] if sides else 16.0 * stride))
        count = max(1, round(2 * log2(max(large / small, 1.0))))
        found.append(tuple(round(small * (large / small) ** ((k + 0.5) / count)) for k in range(count)))
    return found


def in_crowd(points: Tensor, crowds: Tensor) -> Tensor:
    """Whether each point lies in a crowd region: (points,), bool. points: (points, 2), x y."""
    if not len(crowds):
        return torch.zeros(len(points), dtype=torch.bool, device=points.device)
    low, high = points[:, None] >= crowds[None, :, :2], points[:, None] <= crowds[None, :, 2:]
    return (low & high).all(2).any(1)


def clip_to(boxes: Tensor, content: Tensor | None, frame: tuple[int, int]) -> Tensor:
    """Boxes cut to their image. content: (2,), (height, width) of the image in the frame, or None for the frame."""
    height, width = frame if content is None else (float(v) for v in content)
    return boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))


def suppress(boxes: Tensor, scores: Tensor, labels: Tensor, iou: float) -> Tensor:
    """Indices of the boxes kept by non-maximum suppression within each class, best first; not more than 100."""
    sized = ((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])).nonzero()[:, 0]
    return sized[batched_nms(boxes[sized], scores[sized], labels[sized], iou)[:MOST_DETECTIONS]]
