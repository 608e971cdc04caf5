"""What graphs of detection and instance heads give: a flat list of the objects of all images."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import box_iou

from featprobe.datasets.images.pixels import Levels
from featprobe.errors import ProbeError
from featprobe.features import Features
from featprobe.geometry import Placement
from featprobe.probes import Detections, ObjectHead, objects_at_original
from featprobe.probes.detections import MOST_DETECTIONS, Candidates
from featprobe.probes.fcos import NMS_IOU, SCORE_FLOOR, FcosHead
from featprobe.probes.rcnn import RcnnHead
from featprobe.stages.export.graph import NEAR, Differences, GraphOutput, compared_verdicts, reference
from featprobe.stages.export.regions import maps_by_stride, masks_of, region_candidates
from featprobe.stages.export.suppression import best_of
from featprobe.stages.predictor import Predictor
from featprobe.stages.stitch import Objects
from featprobe.targets import Instance, decode_rle

AT_LEAST = 0.5
"""The score of a detection from which on it is a finding, where no threshold is given."""
SAME_IOU = 0.99
"""Objects of a graph and of torch whose boxes, and masks, overlap so much may be one."""


class ObjectOutput(GraphOutput):
    """The objects of all images of a batch, image by image, best first; at most 100 of each.

    boxes (k, 4): x1 y1 x2 y2, pixels of the image as it is given. scores (k,), in [0, 1]. labels (k,), int64, from 1.
    image (k,), int64: the number of each one's image in the batch. With masks: masks (k, side, side), probabilities
    within each box; 0.5 and more is the object. score (n,): of each image's best object, 0 where there is none. verdict
    (n,), bool: whether that is at least the threshold.
    """

    def __init__(
        self, head: ObjectHead, card: Mapping[str, Any], placement: Placement, threshold: float | None
    ) -> None:
        super().__init__()
        if not isinstance(head, FcosHead | RcnnHead):
            raise ProbeError(
                f"A head of this kind can't be exported.\n  found   {type(head).__name__}\n"
                "  wanted  fcos, fasterrcnn or maskrcnn, whose suppression a graph can hold\n"
                "Use it with featprobe predict, or train one of these."
            )
        self.head: FcosHead | RcnnHead = head
        self.threshold = AT_LEAST if threshold is None else threshold
        self.overlap, self.floor = NMS_IOU, SCORE_FLOOR
        self.masks = False
        if isinstance(head, RcnnHead):
            self.overlap, self.floor = head.regions.nms_thresh, head.regions.score_thresh
            self.masks = head.regions.has_mask()
        self.placement = placement
        scales = [o / c for o, c in zip(placement.original, placement.content, strict=True)]
        self.register_buffer("scale", torch.tensor([*scales[::-1], *scales[::-1]], dtype=torch.float32))
        sides = [float(side) for side in placement.original[::-1]]
        self.register_buffer("ends", torch.tensor([*sides, *sides]))
        self._first()

    @property
    def names(self) -> tuple[str, ...]:  # type: ignore[override]
        """Of the outputs."""
        return ("boxes", "scores", "labels", "image", *(["masks"] if self.masks else []), "score", "verdict")

    @property
    def batched(self) -> tuple[str, ...]:
        """What there is one of for each image."""
        return ("score", "verdict")

    def forward(self, features: Features) -> tuple[Tensor, ...]:
        """See the class."""
        maps, candidates = self._candidates(features)
        values, where = best_of(candidates, self.head.classes - 1, MOST_DETECTIONS, self.overlap, self.floor)
        image, rank = (values > 0).nonzero(as_tuple=True)
        place, scores = where[image, rank], values[image, rank]
        boxes, labels = candidates.boxes[image, place], candidates.labels[image, place]
        masks = [masks_of(self.head, maps, boxes, image, labels)] if self.masks else []
        original = (boxes * self.scale).clamp(min=0).minimum(self.ends)
        score = values[:, 0]
        return (original, scores, labels, image, *masks, score, score >= self.threshold)

    @torch.no_grad()
    def _first(self) -> None:
        """One run before all others: what heads keep of a frame, as the places of its cells, must be no exporter's."""
        frame = self.placement.frame
        maps = {
            v.name: torch.zeros(1, v.channels, frame[0] // v.stride, frame[1] // v.stride) for v in self.head.levels
        }
        self.forward(Features(maps, frame, torch.tensor([self.placement.content], dtype=torch.int32)))

    def _candidates(self, features: Features) -> tuple[dict[str, Tensor], Candidates]:
        """Maps that masks are taken from, and candidates."""
        if isinstance(self.head, FcosHead):
            return {}, self.head.candidates(features)
        maps = maps_by_stride(self.head, features)
        return maps, region_candidates(self.head, maps, features)

    @torch.inference_mode()
    def compare(self, found: Mapping[str, NDArray[Any]], predictor: Predictor, levels: Sequence[Levels]) -> Differences:
        """Objects are compared with those that the head finds in torch, at the pixels of the image as it is given."""
        wanted = [objects_at_original(own, self.placement) for own in self.head(reference(predictor, levels))]
        scores = np.array([own[0][1] if own else 0.0 for own in wanted], dtype=np.float32)
        said, apart = found["verdict"], scores - np.float32(self.threshold)
        total = Differences(**compared_verdicts(said, scores >= np.float32(self.threshold), apart))
        for image, own in enumerate(wanted):
            total += matched(self._objects(found, image), own, self.threshold, self.floor)
        return total

    def _objects(self, found: Mapping[str, NDArray[Any]], image: int) -> Objects:
        """The objects of one image in a graph's outputs."""
        own = found["image"] == image
        values = [torch.from_numpy(found[name][own]) for name in self.names[:-2] if name != "image"]
        boxes, scores, labels, *masks = values
        as_given = replace(self.placement, content=self.placement.original)
        return objects_at_original(Detections(boxes, labels, scores, *masks), as_given)


def matched(found: Objects, wanted: Objects, threshold: float, floor: float) -> Differences:
    """How many objects of an image two programs agree on.

    Two are one where their class is the same, their boxes and masks overlap by SAME_IOU and their scores lie within
    NEAR. One that only one program has is counted apart where its score lies within NEAR of a threshold, or of the end
    of the list: `floor`, or the lowest score of as many as a list may hold.
    """
    pairs = _pairs(found, wanted)
    left = [score for i, (_, score) in enumerate(found) if i not in {f for f, _ in pairs}]
    left += [score for i, (_, score) in enumerate(wanted) if i not in {w for _, w in pairs}]
    ends = [own[-1][1] if len(own) == MOST_DETECTIONS else floor for own in (found, wanted)]
    near = sum(min(abs(score - end) for end in (threshold, *ends)) <= NEAR for score in left)
    return Differences(objects=len(pairs) + len(left) - near, equal_objects=len(pairs), near=near)


def _pairs(found: Objects, wanted: Objects) -> list[tuple[int, int]]:
    """Objects of two lists that are one: (place in the first, place in the second). None is in two pairs."""
    if not found or not wanted:
        return []
    boxes = [torch.tensor([one.box_xyxy for one, _ in own], dtype=torch.float64) for own in (found, wanted)]
    labels = [torch.tensor([one.category for one, _ in own]) for own in (found, wanted)]
    scores = [torch.tensor([score for _, score in own], dtype=torch.float64) for own in (found, wanted)]
    overlaps = box_iou(*boxes)
    same = (overlaps >= SAME_IOU) & (labels[0][:, None] == labels[1]) & ((scores[0][:, None] - scores[1]).abs() <= NEAR)
    order = sorted(map(tuple, same.nonzero().tolist()), key=lambda pair: -overlaps[pair])
    first, second, pairs = set[int](), set[int](), []
    for i, j in order:
        if i not in first and j not in second and _same_mask(found[i][0], wanted[j][0]):
            first.add(i)
            second.add(j)
            pairs.append((i, j))
    return pairs


def _same_mask(one: Instance, other: Instance) -> bool:
    if one.rle is None or other.rle is None:
        return one.rle is other.rle
    masks = [decode_rle(own.rle) for own in (one, other) if own.rle is not None]
    union = int((masks[0] | masks[1]).sum())
    return int((masks[0] & masks[1]).sum()) >= SAME_IOU * union
