"""Region proposals as torchvision makes them: anchors, their losses, and the boxes that come of them."""

from collections.abc import Sequence
from math import log
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    conv2d,
    pad,
    smooth_l1_loss,
)
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork

from featprobe.features import Features
from featprobe.probes.detections import (
    ObjectBatch,
    clip_to,
    in_crowd,
    ious,
    sampled,
    survivors,
)
from featprobe.probes.execution import full_products
from featprobe.processes import summed

ASPECT_RATIOS = (0.5, 1.0, 2.0)
LEAST_PROPOSAL = 1e-3  # pixels of a side, torchvision's
LARGEST_DELTA = log(1000 / 16)  # of a logarithm of sides, torchvision's
BETA = 1 / 9  # of the smooth L1 losses, torchvision's
PAIRS_AT_ONCE = 2**25  # of objects and anchors that are compared, which bounds the memory


class Anchors(AnchorGenerator):
    """torchvision's anchors at strides that are known, and not guessed from the maps' sizes."""

    def __init__(self, strides: Sequence[int], sizes: Sequence[Sequence[int]]) -> None:
        super().__init__(tuple(tuple(own) for own in sizes), (ASPECT_RATIOS,) * len(sizes))
        self.strides = strides
        self.kept: tuple[Any, Tensor] | None = None

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Anchors of each image, (anchors, 4), centred on the cells."""
        return [self.of(feature_maps)] * len(image_list.image_sizes)

    def of(self, feature_maps: list[Tensor]) -> Tensor:
        """The anchors of every image of a frame, (anchors, 4), level by level."""
        first = feature_maps[0]
        key = tuple(m.shape[2:] for m in feature_maps), first.dtype, first.device
        if self.kept is None or self.kept[0] != key:  # they are the same for every batch of one frame
            with torch.inference_mode(mode=False):
                self.kept = key, self._made(feature_maps)
        return self.kept[1]

    def _made(self, feature_maps: list[Tensor]) -> Tensor:
        device = feature_maps[0].device
        self.set_cell_anchors(feature_maps[0].dtype, device)
        steps = [[torch.tensor(s, device=device)] * 2 for s in self.strides]
        grids = [[int(m.shape[-2]), int(m.shape[-1])] for m in feature_maps]
        parts = self.grid_anchors(grids, steps)
        return torch.cat([part + stride / 2 for part, stride in zip(parts, self.strides, strict=True)])


class Proposals(RegionProposalNetwork):
    """torchvision's proposals; anchors centred in padding or in a crowd are neither object nor background."""

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        labels, boxes = super().assign_targets_to_anchors(anchors, targets)
        for own, label, target in zip(anchors, labels, targets, strict=True):
            centres = (own[:, :2] + own[:, 2:]) / 2
            left_out = in_crowd(centres, target["crowds"])
            if "content" in target:
                left_out = left_out | (centres >= target["content"]).any(1)
            label.masked_fill_(left_out & (label <= 0), -1)
        return labels, boxes

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """torchvision's two losses, as parts of those of all processes' anchors; 0 where none is counted."""
        positive, negative = (torch.cat(own) for own in self.fg_bg_sampler(labels))  # 0 or 1
        goals = torch.cat(regression_targets).masked_fill((positive == 0)[:, None], 0)  # those of nothing are infinite
        of_box = smooth_l1_loss(pred_bbox_deltas, goals, beta=BETA, reduction="none").sum(1)
        said, wanted = objectness.flatten(), torch.cat(labels).clamp(min=0)
        of_object = binary_cross_entropy_with_logits(said, wanted.to(said.dtype), reduction="none")
        sampled = positive + negative
        count = summed(sampled.sum()).clamp(min=1)
        return (of_object * sampled).sum() / count, (of_box * positive).sum() / count

    def said(self, maps: list[Tensor]) -> Tensor:
        """What the head says of each anchor: a logit and four deltas, (batch, anchors, 5)."""
        logit, delta = self.head.cls_logits, self.head.bbox_pred
        count, width = logit.weight.shape[:2]
        weight = torch.cat([own.weight.view(count, -1, width) for own in (logit, delta)], 1).view(
            5 * count, width, 1, 1
        )
        bias = torch.cat([own.bias.view(count, -1) for own in (logit, delta)], 1).flatten()
        hidden = [self.head.conv(m) for m in maps]
        with full_products(weight.device):
            out = [conv2d(m.to(weight.dtype), weight, bias) for m in hidden]
        return torch.cat([m.permute(0, 2, 3, 1).reshape(len(m), -1, 5) for m in out], 1)

    @torch.no_grad()
    def proposed(
        self, said: Tensor, maps: list[Tensor], features: Features, rounds: int | None
    ) -> tuple[Tensor, Tensor]:
        """Regions that may hold an object, best first: boxes, (batch, most, 4), and whether each is one, (batch, most).

        said: see the method. rounds: of suppression, see detections.survivors.
        """
        cells = [m.shape[2] * m.shape[3] for m in maps]
        counts = [said.shape[1] // sum(cells) * own for own in cells]
        most = min(self.pre_nms_top_n(), max(counts))
        values, places, start = [], [], 0
        for count, own in zip(counts, said[..., 0].split(counts, 1), strict=True):
            value, place = own.topk(min(most, count))
            missing = (0, most - place.shape[1])
            values.append(pad(value, missing, value=-torch.inf) if missing[1] else value)
            places.append(pad(place + start, missing) if missing[1] else place + start)
            start += count
        place = torch.cat(places, 1)  # (batch, levels * most)
        deltas = said[..., 1:].gather(1, place[:, :, None].expand(-1, -1, 4))
        boxes = decoded(deltas, self.anchor_generator.of(maps)[place], self.box_coder.weights)
        boxes = clip_to(boxes, features.content, features.frame)
        scores = torch.cat(values, 1).sigmoid() * large(boxes, LEAST_PROPOSAL)
        groups = boxes.view(-1, most, 4)  # of each image and level
        stay = survivors(groups, scores.view(-1, most) > 0, self.nms_thresh, rounds)
        kept, where = (scores * stay.view_as(scores)).topk(min(self.post_nms_top_n(), scores.shape[1]))
        return boxes.gather(1, where[:, :, None].expand(-1, -1, 4)), kept > 0

    def batch_losses(
        self, said: Tensor, maps: list[Tensor], features: Features, targets: ObjectBatch
    ) -> tuple[Tensor, Tensor]:
        """The losses of `compute_loss`, of anchors that are sampled from all images at once."""
        anchors, sampler = self.anchor_generator.of(maps), self.fg_bg_sampler
        with torch.no_grad():
            valid = targets.labels > 0
            step = max(1, PAIRS_AT_ONCE // (valid.shape[1] * len(anchors)))
            parts = [
                self._assigned(anchors, *own) for own in zip(targets.boxes.split(step), valid.split(step), strict=True)
            ]
            positive, negative, index = (torch.cat(own) if len(own) > 1 else own[0] for own in zip(*parts, strict=True))
            centres = (anchors[:, :2] + anchors[:, 2:]) / 2
            if targets.crowds.shape[1]:
                negative = negative & ~in_crowd(centres, targets.crowds)
            if features.content is not None:
                negative = negative & (centres < features.content.flip(1)[:, None]).all(2)
            keys, most = targets.keys("anchors", *index.shape), sampler.batch_size_per_image
            most_positive = int(most * sampler.positive_fraction)
            place, is_object, counted = sampled(positive, negative, keys, most_positive, most)
            first = place[:, :most_positive]  # positive ones come first
            own = anchors[first]
            true = targets.boxes.gather(1, index.gather(1, first)[:, :, None].expand(-1, -1, 4))
            objects = is_object[:, :most_positive]
            goals = encoded(true, own, self.box_coder.weights).masked_fill(~objects[:, :, None], 0)
        out = said.gather(1, place[:, :, None].expand(-1, -1, 5))
        wanted, weight = is_object.to(out.dtype), counted.to(out.dtype)
        of_object = binary_cross_entropy_with_logits(out[..., 0], wanted, weight, reduction="sum")
        of_box = smooth_l1_loss(out[:, :most_positive, 1:], goals, beta=BETA, reduction="none")
        count = summed(weight.sum()).clamp(min=1)
        return of_object / count, (of_box * objects[:, :, None]).sum() / count

    def _assigned(self, anchors: Tensor, boxes: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Whether anchors are objects, or background, and of which object: (batch, anchors) each.

        boxes: (batch, objects, 4). valid: (batch, objects), bool: the others are none.
        """
        shared = ious(boxes, anchors[None]).masked_fill(~valid[:, :, None], -1)
        best, index = shared.max(1)
        nearest = ((shared == shared.amax(2, keepdim=True)) & valid[:, :, None]).any(1)  # to some object, however far
        positive = (best >= self.proposal_matcher.high_threshold) | nearest
        return positive, (best < self.proposal_matcher.low_threshold) & ~positive, index


def large(boxes: Tensor, least: float) -> Tensor:
    """Whether both sides of each box have this many pixels. boxes: (…, 4)."""
    return (boxes[..., 2:] - boxes[..., :2] >= least).all(-1)


def decoded(deltas: Tensor, boxes: Tensor, weights: Sequence[float]) -> Tensor:
    """Boxes that have moved, (…, 4), as torchvision's BoxCoder has it. deltas, boxes: (…, 4). weights: of x, y, w, h,
    the first two and the last two equal."""
    size = boxes[..., 2:] - boxes[..., :2]
    middle = deltas[..., :2] / weights[0] * size + (boxes[..., :2] + 0.5 * size)
    half = 0.5 * ((deltas[..., 2:] / weights[2]).clamp(max=LARGEST_DELTA).exp() * size)
    return torch.cat([middle - half, middle + half], -1)


def encoded(wanted: Tensor, boxes: Tensor, weights: Sequence[float]) -> Tensor:
    """The deltas that move boxes to those that are wanted, (…, 4); infinite for boxes without an area."""
    size, goal = boxes[..., 2:] - boxes[..., :2], wanted[..., 2:] - wanted[..., :2]
    way = (wanted[..., :2] + 0.5 * goal) - (boxes[..., :2] + 0.5 * size)
    return torch.cat([weights[0] * way / size, weights[2] * (goal / size).log()], -1)
