"""What graphs of detection and instance heads give: a flat list of the objects of all images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import box_area, box_iou

from featprobe.datasets.images.pixels import Levels
from featprobe.features import Features
from featprobe.geometry import Placement
from featprobe.probes import Detections, ObjectHead, objects_at_original
from featprobe.probes.detections import MOST_DETECTIONS, Candidates, best_of
from featprobe.stages.export.graph import NEAR, Differences, GraphOutput, compared_verdicts, reference
from featprobe.stages.findings import AT_LEAST, Threshold
from featprobe.stages.predictor import Predictor

SAME_IOU = 0.99
"""Objects of a graph and of torch whose boxes overlap so much may be one."""


class ObjectOutput(GraphOutput):
    """The objects of all images of a batch, image by image, best first; at most 100 of each.

    boxes (k, 4): x1 y1 x2 y2, pixels of the image as it is given. scores (k,), in [0, 1]. labels (k,), int64, from 1.
    image (k,), int64: the number of each one's image in the batch. With masks: masks (k, side, side), probabilities
    within each box; 0.5 and more is the object. score (n,): of each image's best object, 0 where there is none. verdict
    (n,), bool: whether there is one whose score is at least the threshold. The least area of an operating point is that
    of the box; where objects have masks, it is that of the mask, and with one there is no verdict.
    """

    threshold: Threshold
    scale: Tensor
    ends: Tensor

    def __init__(
        self, head: ObjectHead, card: Mapping[str, Any], placement: Placement, threshold: Threshold | None
    ) -> None:
        super().__init__()
        self.head, self.classes = head, len(card["head"]["classes"]) - 1
        self.threshold = threshold or Threshold(AT_LEAST, "default")
        self.placement = placement
        scales = [o / c for o, c in zip(placement.original, placement.content, strict=True)]
        self.register_buffer("scale", torch.tensor([*scales[::-1], *scales[::-1]], dtype=torch.float32))
        sides = [float(side) for side in placement.original[::-1]]
        self.register_buffer("ends", torch.tensor([*sides, *sides]))
        first = self._first()
        self.floor, self.masks = first.floor, first.masks is not None
        self.least = self.threshold.least_area if self.threshold.is_point else None

    @property
    def names(self) -> tuple[str, ...]:  # type: ignore[override]
        """Of the outputs."""
        return ("boxes", "scores", "labels", "image", *(["masks"] if self.masks else []), *self.batched)

    @property
    def batched(self) -> tuple[str, ...]:
        """What there is one of for each image."""
        return ("score",) if self.masks and self.least is not None and self.least > 1 else ("score", "verdict")

    def forward(self, features: Features) -> tuple[Tensor, ...]:
        """See the class."""
        candidates = self.head.candidates(features)
        values, where = best_of(candidates, self.classes)
        image, rank = (values > 0).nonzero(as_tuple=True)
        place, scores = where[image, rank], values[image, rank]
        boxes, labels = candidates.boxes[image, place], candidates.labels[image, place]
        masks = [] if candidates.masks is None else [candidates.masks(boxes, image, labels)]
        original = (boxes * self.scale).clamp(min=0).minimum(self.ends)
        called = (values > 0) & (values >= self.threshold.value)
        if self.least is not None and not self.masks:
            every = candidates.boxes.gather(1, where[:, :, None].expand(-1, -1, 4)) * self.scale
            x1, y1, x2, y2 = every.clamp(min=0).minimum(self.ends).unbind(2)
            areas = (x2 - x1) * (y2 - y1)
            called = called & (areas >= self.least)
        verdict = (called.any(1),) if "verdict" in self.batched else ()
        return (original, scores, labels, image, *masks, values[:, 0], *verdict)

    @torch.no_grad()
    def _first(self) -> Candidates:
        """One run before all others: what heads keep of a frame, as the places of its cells, must be no exporter's."""
        frame = self.placement.frame
        maps = {v.name: torch.zeros(1, v.channels, *v.cells(frame)) for v in self.head.levels}
        return self.head.candidates(Features(maps, frame, torch.tensor([self.placement.content], dtype=torch.int32)))

    @torch.inference_mode()
    def compare(self, found: Mapping[str, NDArray[Any]], predictor: Predictor, levels: Sequence[Levels]) -> Differences:
        """Objects are compared with those that the head finds in torch, at the pixels of the image as it is given."""
        wanted = [at_original(own, self.placement) for own in self.head(reference(predictor, levels))]
        scores = np.array([float(own.scores.max()) if len(own.scores) else 0.0 for own in wanted], dtype=np.float32)
        total = Differences()
        if "verdict" in found:
            called = np.array([bool(self._called(own).any()) for own in wanted])
            total += Differences(
                **compared_verdicts(found["verdict"], called, np.asarray(scores - self.threshold.value))
            )
        for image, own in enumerate(wanted):
            total += matched(self.detections(found, image), own, self.threshold.value, self.floor)
        return total

    def _called(self, own: Detections) -> Tensor:
        """Which detections of an image are findings, as far as graphs know; boxes in pixels of the image as given."""
        reached = own.scores >= self.threshold.value
        return reached if self.least is None or self.masks else reached & (box_area(own.boxes) >= self.least)

    def detections(self, found: Mapping[str, NDArray[Any]], image: int) -> Detections:
        """The objects of one image in a graph's outputs, with boxes in pixels of the image as it is given."""
        own = found["image"] == image
        names = ("boxes", "labels", "scores", *(["masks"] if self.masks else []))
        return Detections(*(torch.from_numpy(found[name][own]) for name in names))


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What `torch.onnx.export` must know of our own operator: a `custom_translation_table`."""
    from onnxscript import opset18

    op: Any = opset18

    def suppressed(boxes: Any, scores: Any, most: int, iou: float, floor: float) -> Any:
        limits = op.Constant(value_float=iou), op.Constant(value_float=floor)
        return op.NonMaxSuppression(boxes, scores, op.Constant(value_int=most), *limits)

    return {torch.ops.featprobe.suppressed.default: suppressed}


def at_original(detections: Detections, placement: Placement) -> Detections:
    """Detections whose boxes are in pixels of the original image, as `objects_at_original` has them."""
    objects = objects_at_original(replace(detections, masks=None), placement)
    boxes = [one.box_xyxy for one, _ in objects]
    return replace(detections, boxes=torch.tensor(boxes, dtype=torch.float64).view(-1, 4))


def matched(found: Detections, wanted: Detections, threshold: float, floor: float) -> Differences:
    """How many objects of an image two programs agree on.

    Two are one where their class is the same, their boxes overlap by SAME_IOU, and their scores and the probabilities
    of their masks lie within NEAR. One that only one program has is counted apart where its score lies within NEAR of
    a threshold, or of the end of the list: `floor`, or the lowest score of as many as a list may hold.
    """
    pairs = _pairs(found, wanted)
    left, ends = list[float](), [threshold]
    for own, places in ((found, {f for f, _ in pairs}), (wanted, {w for _, w in pairs})):
        scores = own.scores.tolist()
        left += [score for i, score in enumerate(scores) if i not in places]
        ends.append(min(scores) if len(scores) == MOST_DETECTIONS else floor)
    near = sum(min(abs(score - end) for end in ends) <= NEAR for score in left)
    return Differences(objects=len(pairs) + len(left) - near, equal_objects=len(pairs), near=near)


def _pairs(found: Detections, wanted: Detections) -> list[tuple[int, int]]:
    """Objects of two lists that are one: (place in the first, place in the second). None is in two pairs."""
    overlaps = box_iou(found.boxes.double(), wanted.boxes.double())
    same = (overlaps >= SAME_IOU) & (found.labels[:, None] == wanted.labels)
    same &= (found.scores[:, None] - wanted.scores).abs() <= NEAR
    first, second, pairs = set[int](), set[int](), []
    for i, j in sorted(map(tuple, same.nonzero().tolist()), key=lambda pair: -float(overlaps[pair])):
        if i not in first and j not in second and _same_mask(found, i, wanted, j):
            first.add(i)
            second.add(j)
            pairs.append((i, j))
    return pairs


def _same_mask(found: Detections, i: int, wanted: Detections, j: int) -> bool:
    if found.masks is None or wanted.masks is None:
        return found.masks is wanted.masks
    return bool((found.masks[i] - wanted.masks[j]).abs().max() <= NEAR)
