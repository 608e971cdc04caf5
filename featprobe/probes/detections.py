"""Common parts of detection and instance heads: targets, detections, levels chosen by the objects' sizes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import log2

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

MOST_DETECTIONS = 100  # per image, as in COCO
CELLS_PER_OBJECT = 2.0  # how many cells the side of a small object should span
BEST_FIRST = 1024  # candidates of an image; the others are compared only where too few of these stay
PAIRED_AT_ONCE = 16384  # candidates of a batch; where there are more, each image's are compared by themselves
ROUNDS_AT_ONCE = 8  # of suppression, before it is asked whether all boxes are settled
CELLS_AT_BORDER = 8  # an object whose side spans more cells of a level goes to the next (FCOS: 64 pixels at stride 8)


@dataclass(frozen=True)
class ObjectTarget:
    """The labelled objects of one image, in frame pixels.

    boxes: (objects, 4), float32, x1 y1 x2 y2. labels: (objects,), int64, >= 1. masks: (objects, height, width) of the
    frame, uint8, or None. crowds: (regions, 4), boxes: cells in them are neither object nor background.
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
class ObjectBatch:
    """The labelled objects of several images in tensors of one shape, so that a batch takes few operations.

    boxes: (images, most objects, 4). labels: (images, most objects), int64, 0 where an image has no more objects.
    crowds: (images, most regions, 4), infinite where an image has no more. masks: (masks, height, bytes a row), as
    `packed` gives them, of these images and perhaps of others, or None. places: (images, most objects), int64, of the
    objects' masks among these, or None.
    """

    boxes: Tensor
    labels: Tensor
    crowds: Tensor
    masks: Tensor | None = None
    places: Tensor | None = None
    drawn: dict[tuple[str, tuple[int, ...]], Tensor] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, targets: Sequence[ObjectTarget], masks: Sequence[Tensor] | None = None) -> "ObjectBatch":
        """The batch of these images' objects, on the device of their tensors.

        masks: of each image's objects, as `packed` gives them; None to take those of the targets, if they have some.
        """
        boxes = pad_sequence([t.boxes for t in targets], batch_first=True)
        labels = pad_sequence([t.labels for t in targets], batch_first=True)
        crowds = pad_sequence([t.crowds for t in targets], batch_first=True, padding_value=float("inf"))
        if not boxes.shape[1]:
            boxes, labels = pad(boxes, (0, 0, 0, 1)), pad(labels, (0, 1))
        own = [packed(t.masks) for t in targets if t.masks is not None] if masks is None else masks
        if not own:
            return cls(boxes, labels, crowds)
        joined, counts = torch.cat(list(own)), torch.tensor([len(m) for m in own])
        joined = joined if len(joined) else pad(joined, (0, 0, 0, 0, 0, 1))
        first = (counts.cumsum(0) - counts).to(labels.device, non_blocking=True)
        places = first[:, None] + torch.arange(labels.shape[1], device=labels.device)
        return cls(boxes, labels, crowds, joined, places.clamp(max=len(joined) - 1))

    def to(self, device: torch.device) -> "ObjectBatch":
        """The same objects on another device."""
        boxes, labels, crowds = (v.to(device, non_blocking=True) for v in (self.boxes, self.labels, self.crowds))
        if self.masks is None or self.places is None:
            return ObjectBatch(boxes, labels, crowds)
        masks, places = (v.to(device, non_blocking=True) for v in (self.masks, self.places))
        return ObjectBatch(boxes, labels, crowds, masks, places)

    def at(self, images: Tensor) -> "ObjectBatch":
        """The objects of some of the images. images: (batch,), int64, on the same device."""
        boxes, labels, crowds = (v.index_select(0, images) for v in (self.boxes, self.labels, self.crowds))
        places = None if self.places is None else self.places.index_select(0, images)
        return ObjectBatch(boxes, labels, crowds, self.masks, places)

    def keys(self, name: str, *shape: int) -> Tensor:
        """Random numbers in [0, 1), float32, of this shape. Whoever asks for a name gets the same: all heads that train
        on a batch draw the same samples."""
        if (name, shape) not in self.drawn:
            self.drawn[name, shape] = torch.rand(shape, device=self.boxes.device)
        return self.drawn[name, shape]


@dataclass(frozen=True)
class Detections:
    """The objects that a head found in one image, best first.

    boxes: (found, 4), frame pixels, x1 y1 x2 y2. labels: (found,), >= 1. scores: (found,), in [0, 1].
    masks: (found, side, side), probabilities within each box, or None.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    masks: Tensor | None = None


@dataclass(frozen=True)
class Candidates:
    """What a head could have found in the images of a batch, before overlapping ones are dropped; in no order.

    boxes: (batch, candidates, 4), frame pixels, x1 y1 x2 y2, within the images. labels: (batch, candidates), >= 1.
    scores: (batch, candidates), in [0, 1]. iou: of boxes of one class that overlap more, only the best is found.
    floor: what scores no more is not found. masks: gives the masks, (boxes, side, side), see Detections, of boxes
    (boxes, 4) from their images' numbers in the batch and their labels, (boxes,) each; None for a head without.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    iou: float
    floor: float
    masks: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None


def detection_strides(strides: Sequence[int], sides: Sequence[float]) -> tuple[int, ...]:
    """The strides at which a head searches for objects of these sizes, finest first.

    sides: 10th, 50th and 90th percentile of the training objects' sides (square root of the box's area), in frame
    pixels; empty if unknown, which gives all strides. The finest of the result is the coarsest stride at which a small
    object still spans two cells, else the finest of all; strides that are too coarse even for large objects are left
    out.

    >>> detection_strides((4, 8, 16, 32), (25.0, 33.0, 50.0)), detection_strides((4, 8, 16, 32), (6.0, 20.0, 200.0))
    ((8, 16), (4, 8, 16, 32))
    """
    if not sides:
        return tuple(strides)
    fine = [stride for stride in strides if CELLS_PER_OBJECT * stride <= sides[0]]
    finest = max(fine) if fine else min(strides)
    kept = [stride for stride in strides if stride >= finest]
    return tuple(s for i, s in enumerate(kept) if i == 0 or CELLS_AT_BORDER * kept[i - 1] < 1.5 * sides[2])


def object_sides(boxes: Tensor) -> tuple[float, ...]:
    """10th, 50th and 90th percentile of the sides (square root of the area) of boxes; empty without a box.

    boxes: (objects, 4), x1 y1 x2 y2.
    """
    if not len(boxes):
        return ()
    from torchvision.ops import box_area

    found = torch.quantile(box_area(boxes).sqrt(), torch.tensor([0.1, 0.5, 0.9]))
    return tuple(round(float(v), 2) for v in found)


def side_ranges(strides: Sequence[int]) -> list[tuple[float, float]]:
    """The range of sides per stride, low <= side < high in pixels; that of the last has no upper limit.

    >>> side_ranges((4, 8))
    [(0.0, 32.0), (32.0, inf)]
    """
    borders = [0.0, *(float(CELLS_AT_BORDER * s) for s in strides[:-1]), float("inf")]
    return list(pairwise(borders))


def anchor_sizes(strides: Sequence[int], sides: Sequence[float]) -> list[tuple[int, ...]]:
    """The sides of the anchors per stride, in pixels: two per octave over the stride's range of sides.

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
    """Whether each point lies in a crowd region: (…, points), bool.

    points: (points, 2), x y. crowds: (…, regions, 4).
    """
    if not crowds.shape[-2]:
        return torch.zeros((*crowds.shape[:-2], len(points)), dtype=torch.bool, device=points.device)
    regions = crowds[..., None, :, :]
    return ((points[:, None] >= regions[..., :2]) & (points[:, None] <= regions[..., 2:])).all(-1).any(-1)


def clip_to(boxes: Tensor, content: Tensor | None, frame: tuple[int, int]) -> Tensor:
    """Boxes cut to their images. boxes: (batch, boxes, 4). content: (batch, 2), see Features, or None for the frame."""
    if content is None:
        x, y = (boxes[..., axis::2].clamp(0, frame[1 - axis]) for axis in (0, 1))
        return torch.stack([x, y], -1).flatten(-2)
    ends = content.flip(1).to(boxes.dtype).repeat(1, 2)  # (batch, 4): width, height, width, height
    return boxes.clamp(min=0).minimum(ends[:, None])


def suppress(boxes: Tensor, scores: Tensor, labels: Tensor, iou: float, floor: float) -> Tensor:
    """Indices of one image's boxes after non-maximum suppression per class, best first; at most 100.

    Boxes without an area, and boxes that score no more than the floor, are dropped.
    """
    from torchvision.ops import batched_nms

    real = (boxes[:, 2:] > boxes[:, :2]).all(1) & (scores > floor)
    chosen = real.nonzero()[:, 0]
    return chosen[batched_nms(boxes[chosen], scores[chosen], labels[chosen], iou)[:MOST_DETECTIONS]]


@torch.library.custom_op("featprobe::suppressed", mutates_args=())
def suppressed(boxes: Tensor, scores: Tensor, most: int, iou: float, floor: float) -> Tensor:
    """The boxes that stay: (kept, 3), int64, the image, the class and the box of each, as ONNX's NonMaxSuppression.

    boxes: (batch, boxes, 4), x1 y1 x2 y2. scores: (batch, classes, boxes); what scores no more than the floor is
    dropped, and of what overlaps by more than `iou` all but the best. most: of one class in one image.
    """
    from torchvision.ops import nms

    found = []
    for image in range(boxes.shape[0]):
        for category in range(scores.shape[1]):
            own = scores[image, category]
            chosen = (own > floor).nonzero()[:, 0]
            kept = chosen[nms(boxes[image][chosen], own[chosen], iou)[:most]]
            found.append(torch.stack([torch.full_like(kept, image), torch.full_like(kept, category), kept], 1))
    return torch.cat(found)


@suppressed.register_fake
def _(boxes: Tensor, scores: Tensor, most: int, iou: float, floor: float) -> Tensor:
    return boxes.new_empty((torch.library.get_ctx().new_dynamic_size(), 3), dtype=torch.int64)


def best_of(candidates: Candidates, classes: int, most: int = MOST_DETECTIONS) -> tuple[Tensor, Tensor]:
    """Scores and places of the candidates of each image that are found, best first: (batch, most) each.

    What `suppress` does for each image, for a batch of any size and in shapes that do not depend on values, as an
    exported graph needs it. A score of 0 stands where an image has no more. classes: labels run from 1 to `classes`.
    """
    boxes, labels = candidates.boxes, candidates.labels
    scores = candidates.scores * (boxes[..., 2:] > boxes[..., :2]).all(-1)
    most = min(most, scores.shape[1])
    every = torch.arange(1, classes + 1, device=labels.device)[:, None]
    of_class = scores[:, None] * (labels[:, None] == every)  # (batch, classes, candidates)
    stay = torch.ops.featprobe.suppressed(boxes, of_class, most, candidates.iou, candidates.floor)
    place = stay[:, 0] * scores.shape[1] + stay[:, 2]
    flat = scores.flatten()
    kept = torch.zeros_like(flat).scatter(0, place, flat[place]).view_as(scores)
    values, where = kept.topk(most)
    return values, where


def ious(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of all pairs: (batch, n, m), nan for two boxes without an area.

    boxes: (batch, n, 4). others: (batch, m, 4) or (1, m, 4); x1 y1 x2 y2.
    """
    shared = intersections(boxes, others)
    return shared / (areas(boxes)[..., None] + areas(others)[..., None, :] - shared)


def intersections(boxes: Tensor, others: Tensor) -> Tensor:
    """Areas that all pairs of boxes share, (batch, n, m); see `ious`."""
    start = torch.maximum(boxes[..., None, :2], others[..., None, :, :2])
    shared = (torch.minimum(boxes[..., None, 2:], others[..., None, :, 2:]) - start).clamp(min=0)
    return shared[..., 0] * shared[..., 1]


def areas(boxes: Tensor) -> Tensor:
    """The areas of boxes. boxes: (…, 4)."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def sampled(
    positive: Tensor, negative: Tensor, keys: Tensor, most_positive: int, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Some of each image's candidates at random, positive ones first: their places, (batch, most); whether each is
    positive; whether each counts at all, since there may be fewer.

    As torchvision's BalancedPositiveNegativeSampler draws them, in shapes that do not depend on values: at most so many
    positive ones, and negative ones up to `most`. positive, negative: (batch, candidates), bool. keys: of the same
    shape, in [0, 1), see ObjectBatch.keys; those with the largest keys are taken.
    """
    values, place = torch.where(positive, keys, -1.0).topk(min(most_positive, keys.shape[1]))
    every = torch.where(negative, keys, -1.0)
    every = every.scatter(1, place, torch.where(values >= 0, values + 1, every.gather(1, place)))
    values, place = every.topk(min(most, keys.shape[1]))
    return place, values >= 1, values >= 0


def survivors(boxes: Tensor, real: Tensor, iou: float, rounds: int | None) -> Tensor:
    """Which boxes stay after non-maximum suppression in each group: (groups, boxes), 1 or 0, of the boxes' type.

    boxes: (groups, boxes, 4), best first. real: (groups, boxes), bool: the others are none. A box stays where no better
    one that stays overlaps it by more than `iou`. In each round that is asked of all boxes at once, with what stayed in
    the round before; a box whose fate hangs on a chain of n better ones is settled after n + 1 rounds. rounds: an odd
    number, after which those that are not settled are dropped, and no step depends on values; None for as many as
    settle all.
    """
    alive = real.to(boxes.dtype)[:, None]  # (groups, 1, boxes)
    over = (ious(boxes, boxes) > iou).triu(1).to(boxes.dtype)
    stay = alive
    for number in range(boxes.shape[1] + 1 if rounds is None else rounds):
        before, stay = stay, torch.baddbmm(alive, stay, over, alpha=-1).gt_(0)
        if rounds is None and number % ROUNDS_AT_ONCE == ROUNDS_AT_ONCE - 1 and torch.equal(before, stay):
            break
    return stay[:, 0]


def found_at_once(candidates: Candidates) -> list[Detections]:
    """What `suppress` finds among each image's candidates, for all images together: with few stops of a device."""
    real = (candidates.boxes[..., 2:] > candidates.boxes[..., :2]).all(-1) & (candidates.scores > candidates.floor)
    scores, count = candidates.scores.where(real, 0.0), candidates.scores.shape[1]
    for most in sorted({min(BEST_FIRST, count), count}):  # no box suppresses a better one: mostly the best are enough
        best, place = scores.topk(most)
        boxes = candidates.boxes.gather(1, place[:, :, None].expand(-1, -1, 4))
        labels = candidates.labels.gather(1, place)
        kept = best * _kept(boxes, labels, best, candidates.iou)
        values, where = kept.topk(min(MOST_DETECTIONS, most))
        found, there = torch.stack([(values > 0).sum(1), real.sum(1)]).tolist()
        if all(own == MOST_DETECTIONS or number <= most for own, number in zip(found, there, strict=True)):
            break
    image = torch.arange(len(found), device=where.device)[:, None].expand_as(where)
    parts = image, boxes.gather(1, where[:, :, None].expand(-1, -1, 4)), labels.gather(1, where), values
    own = torch.cat([torch.arange(n, device=where.device) + i * where.shape[1] for i, n in enumerate(found)])
    image, boxes, labels, values = (part.flatten(0, 1).index_select(0, own) for part in parts)
    masks = [None] * len(found) if candidates.masks is None else candidates.masks(boxes, image, labels).split(found)
    split = (boxes.split(found), labels.split(found), values.split(found), masks)
    return [Detections(*each) for each in zip(*split, strict=True)]


def _kept(boxes: Tensor, labels: Tensor, scores: Tensor, iou: float) -> Tensor:
    """Which boxes of each image stay in non-maximum suppression per class: (batch, boxes), 1 or 0.

    boxes: (batch, boxes, 4). labels, scores: (batch, boxes); a score of 0 says that there is none.
    """
    from torchvision.ops import nms

    chosen = scores.flatten().nonzero()[:, 0]
    image, flat = chosen // scores.shape[1], boxes.flatten(0, 1)
    own = flat[chosen]
    parts = [chosen] if len(chosen) <= PAIRED_AT_ONCE else chosen.split(torch.bincount(image).tolist())
    apart = torch.stack([image, labels.flatten()[chosen]], 1) * (own.amax() + 1 if len(own) else 1)
    shifted = flat.index_copy(0, chosen, own + apart.repeat(1, 2))
    kept = torch.cat([part[nms(shifted[part], scores.flatten()[part], iou)] for part in parts])
    return torch.zeros_like(scores).flatten().index_fill_(0, kept, 1.0).view_as(scores)


def packed(masks: Tensor) -> Tensor:
    """Eight pixels a byte, the first in the lowest bit: (objects, height, width / 8), uint8.

    masks: (objects, height, width), uint8, 0 or 1.
    """
    if masks.device.type == "cpu":
        return torch.from_numpy(np.packbits(masks.numpy(), -1, bitorder="little"))
    bits = pad(masks, (0, -masks.shape[2] % 8)).unflatten(2, (-1, 8))
    return (bits << torch.arange(8, dtype=torch.uint8, device=masks.device)).sum(3, dtype=torch.uint8)


def unpacked(masks: Tensor, width: int) -> Tensor:
    """What `packed` has packed: (objects, height, width), uint8."""
    bits = masks[..., None] >> torch.arange(8, dtype=torch.uint8, device=masks.device)
    return (bits & 1).flatten(2)[..., :width]


def on_host(found: Sequence[Detections]) -> list[Detections]:
    """The same detections in the CPU's memory, moved in one copy as float32, in which labels are exact."""
    parts = [[v for v in (own.boxes, own.scores, own.labels, own.masks) if v is not None] for own in found]
    every = [v for own in parts for v in own]
    if not every:
        return []
    values = iter(torch.cat([v.flatten().float() for v in every]).cpu().split([v.numel() for v in every]))
    moved = [[next(values).view(v.shape) for v in own] for own in parts]
    return [Detections(boxes, labels.long(), scores, *masks) for boxes, scores, labels, *masks in moved]
