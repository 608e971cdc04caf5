"""Faster R-CNN and Mask R-CNN heads: torchvision's region proposals and region heads, light, on the shared pyramid."""

from collections.abc import Sequence
from functools import partial
from math import log
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    avg_pool2d,
    binary_cross_entropy_with_logits,
    conv2d,
    cross_entropy,
    pad,
    smooth_l1_loss,
)
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
from torchvision.ops import box_area, box_iou, roi_align

from featprobe.errors import ProbeError
from featprobe.features import Features
from featprobe.kinds import PyramidKind
from featprobe.levels import FeatureLevel
from featprobe.probes import execution
from featprobe.probes.detections import (
    MOST_DETECTIONS,
    Candidates,
    Detections,
    ObjectBatch,
    ObjectTarget,
    anchor_sizes,
    areas,
    best_of,
    clip_to,
    found_at_once,
    in_crowd,
    intersections,
    ious,
    sampled,
    survivors,
    unpacked,
)
from featprobe.probes.execution import full_products, half_products
from featprobe.probes.head import BatchedObjectHead
from featprobe.probes.pyramid import detection_pyramid, maps_of
from featprobe.processes import summed

ASPECT_RATIOS = (0.5, 1.0, 2.0)
HIDDEN_PER_WIDTH = 4  # of the two fully connected layers of the box head
MASK_CONVS = 2
MASK_SIDE = 28  # of the masks that are predicted, cells
LEAST_PROPOSAL, LEAST_BOX = 1e-3, 1e-2  # pixels of a side, torchvision's
CELLS_OF_REGION = 14  # a region spans about as many cells of the level that it is pooled from
ROUNDS = 63  # of suppression in a training step, see detections.survivors
LARGEST_DELTA = log(1000 / 16)  # of a logarithm of sides, torchvision's
BETA = 1 / 9  # of the smooth L1 losses, torchvision's
PAIRS_AT_ONCE = 2**25  # of objects and anchors that are compared, which bounds the memory


class RcnnHead(BatchedObjectHead):
    """Region proposals, then a class, a box and, with `masks`, a mask for each region.

    levels: available, finest first; it uses none finer than its finest stride. classes: number with the background.
    width: channels. sides: see detections.detection_strides.
    """

    draws = True

    def __init__(
        self,
        levels: Sequence[FeatureLevel],
        classes: int,
        width: int = 64,
        sides: Sequence[float] = (),
        pyramid: PyramidKind = "auto",
        masks: bool = False,
    ) -> None:
        super().__init__()
        self.strides, self.pyramid = detection_pyramid(levels, width, sides, pyramid)
        self.levels = self.pyramid.levels
        self.classes = classes
        self.sizes = anchor_sizes(self.strides, sides)
        count = max(len(own) for own in self.sizes)
        self.sizes = [own + (own[-1],) * (count - len(own)) for own in self.sizes]  # one head serves all levels
        self.rpn = _Proposals(
            _Anchors(self.strides, self.sizes), RPNHead(width, count * len(ASPECT_RATIOS)),
            fg_iou_thresh=0.7, bg_iou_thresh=0.3, batch_size_per_image=128, positive_fraction=0.5,
            pre_nms_top_n={"training": 500, "testing": 500}, post_nms_top_n={"training": 250, "testing": 250},
            nms_thresh=0.7,
        )  # fmt: skip
        hidden = HIDDEN_PER_WIDTH * width
        mask_parts: dict[str, Any] = {}
        if masks:
            mask_parts = {
                "mask_roi_pool": RegionPool(self.strides, MASK_SIDE // 2),
                "mask_head": MaskRCNNHeads(width, (width,) * MASK_CONVS, 1),
                "mask_predictor": MaskRCNNPredictor(width, width, classes),
            }
        self.regions = _Regions(
            RegionPool(self.strides, 7), TwoMLPHead(width * 49, hidden), FastRCNNPredictor(hidden, classes),
            fg_iou_thresh=0.5, bg_iou_thresh=0.5, batch_size_per_image=64, positive_fraction=0.25,
            bbox_reg_weights=None, score_thresh=0.01, nms_thresh=0.5, detections_per_img=MOST_DETECTIONS, **mask_parts,
        )  # fmt: skip

    @property
    def assignment(self) -> dict[str, str]:
        """The sides of the anchors per stride, in frame pixels."""
        return {
            f"stride {s}": f"anchors of {', '.join(map(str, sorted(set(own))))} px"
            for s, own in zip(self.strides, self.sizes, strict=True)
        }

    def forward(self, features: Features, targets: Sequence[ObjectTarget] | None = None) -> Tensor | list[Detections]:
        """The loss, a scalar, if targets are given; else the detections per image."""
        if execution.whole_batches(self.rpn.head.cls_logits.weight.device):
            return self._found(features) if targets is None else self.batch_loss(features, ObjectBatch.of(targets))
        maps = self._maps(features)
        contents = [features.frame] * features.batch
        if features.content is not None:  # numbers of the host, as torchvision wants them
            contents = [(height, width) for height, width in features.content.tolist()]
        wanted = None if targets is None else [_as_torchvision(t, features, i) for i, t in enumerate(targets)]
        self.rpn.train(targets is not None)  # torchvision's parts go by their mode; ours by what they are given
        self.regions.train(targets is not None)
        images = ImageList(next(iter(maps.values())).new_empty(1).expand(1, 1, *features.frame), contents)
        proposals, losses = self.rpn(images, maps, wanted)
        self.regions.crowds = [t.crowds for t in targets or ()]
        results, more = self.regions(maps, proposals, contents, wanted)
        if targets is not None:
            counted = [*losses.values(), *self.regions.of_the_batch(more)]
            return torch.stack(counted).sum()
        return [
            Detections(r["boxes"], r["labels"], r["scores"], r["masks"][:, 0] if "masks" in r else None)
            for r in results
        ]

    def batch_loss(self, features: Features, targets: ObjectBatch) -> Tensor:
        """The loss that torchvision computes image by image, in few operations; no shape depends on values."""
        with half_products(targets.boxes.device, training=self.training):
            maps = self._maps(features)
            said = self.rpn.said(list(maps.values()))
        with full_products(targets.boxes.device):
            maps = {name: m.to(said.dtype) for name, m in maps.items()}
            proposals, there = self.rpn.proposed(said.detach(), list(maps.values()), features, ROUNDS)
            of_anchors = self.rpn.batch_losses(said, list(maps.values()), features, targets)
            of_regions = self.regions.batch_losses(maps, proposals, there, targets, features.frame[1])
            return torch.stack([*of_anchors, *of_regions]).sum()

    def _found(self, features: Features) -> list[Detections]:
        """The detections of each image, with few stops of a device."""
        maps = self._maps(features)
        levels = list(maps.values())
        proposals, there = self.rpn.proposed(self.rpn.said(levels), levels, features, None)
        return found_at_once(self._candidates(maps, proposals, there, features))

    def candidates(self, features: Features) -> Candidates:
        """A candidate for each proposal and each class, from torchvision's layers with its settings.

        torchvision goes through a batch image by image, which a graph for batches of any size can't.
        """
        maps = self._maps(features)
        return self._candidates(maps, *self._proposed(maps, features), features)

    def _candidates(self, maps: dict[str, Tensor], proposals: Tensor, there: Tensor, features: Features) -> Candidates:
        """A candidate for each class of each proposal. proposals: (batch, most, 4). there: (batch, most), which of them
        are some."""
        own = self.regions
        logits, deltas = own.said(maps, proposals)
        boxes = decoded(deltas, proposals[:, :, None], own.box_coder.weights)[:, :, 1:].flatten(1, 2)
        boxes = clip_to(boxes, features.content, features.frame)
        scores = (logits.softmax(2)[:, :, 1:] * there[:, :, None]).flatten(1) * _large(boxes, LEAST_BOX)
        labels = torch.arange(1, self.classes, device=boxes.device).repeat(there.shape[1]).expand_as(scores)
        masks = partial(self._masks, maps) if own.has_mask() else None
        return Candidates(boxes, labels, scores, own.nms_thresh, own.score_thresh, masks)

    def _maps(self, features: Features) -> dict[str, Tensor]:
        """The pyramid: "stride" -> (batch, width, rows, columns)."""
        found = maps_of(self.pyramid, self.strides, features)
        return {str(stride): x for stride, (x, _) in zip(self.strides, found, strict=True)}

    def _proposed(self, maps: dict[str, Tensor], features: Features) -> tuple[Tensor, Tensor]:
        """Regions that may hold an object: boxes, (batch, most, 4), and whether each is one, (batch, most)."""
        rpn, levels = self.rpn, list(maps.values())
        said, deltas = rpn.head(levels)
        counts = [m.shape[1] * m.shape[2] * m.shape[3] for m in said]
        anchors = rpn.anchor_generator(ImageList(levels[0], [features.frame]), levels)[0]  # (anchors, 4)
        said, deltas = concat_box_prediction_layers(said, deltas)
        batch, starts = levels[0].shape[0], [sum(counts[:i]) for i in range(len(counts))]
        said, deltas = said.view(batch, -1), deltas.view(batch, -1, 4)
        chosen = [
            said[:, start : start + count].topk(min(rpn.pre_nms_top_n(), count))[1] + start
            for start, count in zip(starts, counts, strict=True)
        ]
        place = torch.cat(chosen, 1)  # (batch, chosen)
        deltas = deltas.gather(1, place[:, :, None].expand(-1, -1, 4))
        boxes = rpn.box_coder.decode_single(deltas.flatten(0, 1), anchors[place.flatten()]).view(batch, -1, 4)
        boxes = clip_to(boxes, features.content, features.frame)
        level = torch.cat([torch.full_like(own, i) for i, own in enumerate(chosen, start=1)], 1)
        scores = said.gather(1, place).sigmoid() * _large(boxes, LEAST_PROPOSAL)
        some = Candidates(boxes, level, scores, rpn.nms_thresh, 0.0)
        values, where = best_of(some, len(chosen), rpn.post_nms_top_n())
        return boxes.gather(1, where[:, :, None].expand(-1, -1, 4)), values > 0

    def _masks(self, maps: dict[str, Tensor], boxes: Tensor, image: Tensor, labels: Tensor) -> Tensor:
        """See Candidates."""
        own = self.regions
        regions = torch.cat([image[:, None].to(boxes.dtype), boxes], 1)
        logits = own.mask_predictor(own.mask_head(own.mask_roi_pool.pooled(maps, regions)))
        which = labels[:, None, None, None].expand(-1, -1, *logits.shape[2:])
        return logits.sigmoid().gather(1, which)[:, 0]


def _large(boxes: Tensor, least: float) -> Tensor:
    """Whether both sides of each box have this many pixels. boxes: (…, 4)."""
    return (boxes[..., 2:] - boxes[..., :2] >= least).all(-1)


class _Anchors(AnchorGenerator):
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


class _Proposals(RegionProposalNetwork):
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
        scores = torch.cat(values, 1).sigmoid() * _large(boxes, LEAST_PROPOSAL)
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


class _Regions(RoIHeads):
    """torchvision's region heads; a proposal that is half in a crowd or more does not count as background.

    counts: the number of proposals in the last batch's losses, and how many of them are objects.
    """

    crowds: list[Tensor]
    counts: tuple[int, Tensor]

    def assign_targets_to_proposals(
        self, proposals: list[Tensor], gt_boxes: list[Tensor], gt_labels: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        matched, labels = super().assign_targets_to_proposals(proposals, gt_boxes, gt_labels)
        for own, label, crowds in zip(proposals, labels, self.crowds, strict=True):
            if len(crowds):
                iou, area = box_iou(own, crowds), box_area(own)[:, None]
                shared = iou * (area + box_area(crowds)) / (1 + iou)
                label.masked_fill_(((shared / area.clamp(min=1e-6)).amax(1) >= 0.5) & (label == 0), -1)
        return matched, labels

    def subsample(self, labels: list[Tensor]) -> list[Tensor]:
        chosen = super().subsample(labels)
        found = torch.cat([label[own] for label, own in zip(labels, chosen, strict=True)])
        self.counts = len(found), (found > 0).sum()
        return chosen

    def of_the_batch(self, losses: dict[str, Tensor]) -> list[Tensor]:
        """torchvision's means over the proposals of one process, as parts of those of all; none without a proposal."""
        own = torch.stack([torch.full_like(self.counts[1], self.counts[0]), self.counts[1]])
        proposals, objects = own / summed(own).clamp(min=1)
        shares = {"loss_classifier": proposals, "loss_box_reg": proposals, "loss_mask": objects}
        return [loss * shares[name] for name, loss in losses.items()] if self.counts[0] else []

    def said(self, maps: dict[str, Tensor], boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, (batch, boxes, classes), and deltas, (batch, boxes, classes, 4). boxes: (batch, boxes, 4)."""
        logits, deltas = self.box_predictor(self.box_head(self.box_roi_pool.pooled(maps, numbered(boxes))))
        return logits.view(*boxes.shape[:2], -1), deltas.view(*boxes.shape[:2], -1, 4)

    def batch_losses(
        self, maps: dict[str, Tensor], proposals: Tensor, there: Tensor, targets: ObjectBatch, width: int
    ) -> list[Tensor]:
        """The losses of classes, boxes and masks, of proposals that are sampled from all images at once.

        proposals: (batch, proposals, 4). there: (batch, proposals), bool: the others are none. width: of the frame.
        """
        most_positive = int(self.fg_bg_sampler.batch_size_per_image * self.fg_bg_sampler.positive_fraction)
        boxes, labels, index, counted = self._sampled(proposals, there, targets, most_positive)
        positive = labels[:, :most_positive] > 0  # they come first
        first, index, which = boxes[:, :most_positive], index[:, :most_positive], labels[:, :most_positive]
        true = targets.boxes.gather(1, index[:, :, None].expand(-1, -1, 4))
        goals = encoded(true, first, self.box_coder.weights).masked_fill(~positive[:, :, None], 0)
        logits, deltas = self.said(maps, boxes)
        own = deltas[:, :most_positive].gather(2, which[:, :, None, None].expand(-1, -1, 1, 4))[:, :, 0]
        of_box = smooth_l1_loss(own, goals, beta=BETA, reduction="none") * positive[:, :, None]
        of_class = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none") * counted.flatten()
        regions, objects = summed(torch.stack([counted.sum(), positive.sum()])).clamp(min=1)
        losses = [of_class.sum() / regions, of_box.sum() / regions]
        if self.has_mask():
            wanted = mask_targets(targets, first, index, width)
            losses.append((self._mask_losses(maps, first, which, wanted) * positive.flatten()).sum() / objects)
        return losses

    @torch.no_grad()
    def _sampled(
        self, proposals: Tensor, there: Tensor, targets: ObjectBatch, most_positive: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Regions that are learnt from, objects first: boxes, labels, the objects that they are, whether they count.

        boxes: (batch, most, 4), the others (batch, most).
        """
        valid = targets.labels > 0
        boxes, real = torch.cat([proposals, targets.boxes], 1), torch.cat([there, valid], 1)
        best, index = ious(targets.boxes, boxes).masked_fill(~valid[:, :, None], -1).max(1)
        near = best >= self.proposal_matcher.high_threshold
        negative = real & ~near
        if targets.crowds.shape[1]:
            shared = intersections(boxes, targets.crowds).amax(2) / areas(boxes).clamp(min=1e-6)
            negative = negative & (shared < 0.5)
        keys, most = targets.keys("regions", *index.shape), self.fg_bg_sampler.batch_size_per_image
        place, is_object, counted = sampled(near & real, negative, keys, most_positive, most)
        index = index.gather(1, place)
        labels = targets.labels.gather(1, index) * is_object
        return boxes.gather(1, place[:, :, None].expand(-1, -1, 4)), labels, index, counted

    def _mask_losses(self, maps: dict[str, Tensor], boxes: Tensor, labels: Tensor, wanted: Tensor) -> Tensor:
        """The mean over the pixels of each region's mask: (batch * regions,). boxes: (batch, regions, 4)."""
        logits = self.mask_predictor(self.mask_head(self.mask_roi_pool.pooled(maps, numbered(boxes))))
        which = labels.flatten()[:, None, None, None].expand(-1, -1, *logits.shape[2:])
        return binary_cross_entropy_with_logits(logits.gather(1, which)[:, 0], wanted, reduction="none").mean((1, 2))


class RegionPool(nn.Module):
    """A square of features for each region, from the level where it spans about 14 cells.

    torchvision's MultiScaleRoIAlign guesses strides from the maps' sizes and reads half a cell off, because it assumes
    a cell's centre at its corner. Here cell i of a map spans the pixels [i, i + 1) * stride.
    """

    borders: Tensor

    def __init__(self, strides: Sequence[int], side: int) -> None:
        super().__init__()
        self.strides, self.output_size = tuple(strides), (side, side)
        borders = torch.tensor([float(CELLS_OF_REGION * s) for s in strides[1:]])
        self.register_buffer("borders", borders, persistent=False)  # of the sides, between levels

    def forward(self, maps: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]) -> Tensor:
        """maps: "stride" -> (batch, channels, rows, columns). boxes: (regions, 4) of each image, frame pixels.

        Returns (all regions, channels, side, side). sizes: of the images, for torchvision's sake.
        """
        image = torch.cat([torch.full_like(own[:, :1], i) for i, own in enumerate(boxes)])
        return self.pooled(maps, torch.cat([image, torch.cat(boxes)], 1))

    def pooled(self, maps: dict[str, Tensor], regions: Tensor) -> Tensor:
        """The same of regions in any order. regions: (regions, 5), the number of the image in the batch, the box."""
        side = box_area(regions[:, 1:]).sqrt()
        level = torch.bucketize(side, self.borders, right=True)
        channels = maps[str(self.strides[0])].shape[1]
        pooled = regions.new_zeros((regions.shape[0], channels, *self.output_size))
        for index, stride in enumerate(self.strides):
            if execution.whole_batches(regions.device):  # more is pooled than is taken, and nothing waits
                found = roi_align(maps[str(stride)], regions, self.output_size, 1 / stride, 2, aligned=True)
                pooled = torch.where((level == index)[:, None, None, None], found, pooled)
                continue
            own = (level == index).nonzero()[:, 0]
            found = roi_align(maps[str(stride)], regions[own], self.output_size, 1 / stride, 2, aligned=True)
            pooled = pooled.index_copy(0, own, found)
        return pooled


def _as_torchvision(target: ObjectTarget, features: Features, image: int) -> dict[str, Tensor]:
    values = {"boxes": target.boxes, "labels": target.labels, "crowds": target.crowds}
    if features.content is not None:
        values["content"] = features.content[image].flip(0)  # width, height
    return values if target.masks is None else values | {"masks": half_pixel_later(target.masks)}


def numbered(boxes: Tensor) -> Tensor:
    """Regions as RegionPool takes them, (batch * boxes, 5): the image's number, the box. boxes: (batch, boxes, 4)."""
    image = torch.arange(boxes.shape[0], dtype=boxes.dtype, device=boxes.device)[:, None, None]
    return torch.cat([image.expand(-1, boxes.shape[1], -1), boxes], 2).flatten(0, 1)


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


@torch.no_grad()
def mask_targets(targets: ObjectBatch, boxes: Tensor, index: Tensor, width: int) -> Tensor:
    """The masks of objects within boxes, (batch * boxes, MASK_SIDE, MASK_SIDE), as torchvision cuts them out.

    boxes: (batch, boxes, 4), frame pixels. index: (batch, boxes), of each one's object. width: of the frame.
    """
    if targets.masks is None or targets.places is None:
        raise ProbeError("A head with masks learns from objects with masks; these have none.")
    batch, most = targets.places.shape
    if most <= index.shape[1]:  # each mask once
        places = targets.places.flatten()
        which = index + most * torch.arange(batch, device=index.device)[:, None]
    else:
        places = targets.places.gather(1, index).flatten()
        which = torch.arange(index.numel(), device=index.device)
    masks = half_pixel_later(unpacked(targets.masks.index_select(0, places), width)).to(boxes.dtype)
    regions = torch.cat([which.view(-1, 1).to(boxes.dtype), boxes.flatten(0, 1)], 1)
    return roi_align(masks[:, None], regions, (MASK_SIDE, MASK_SIDE), 1.0)[:, 0]


def half_pixel_later(masks: Tensor) -> Tensor:
    """Masks whose value at index i is that half a pixel before, (objects, height, width), float32.

    torchvision cuts the mask targets out with a RoIAlign that takes the centre of pixel i to lie at i, not at i + 0.5.
    """
    if not len(masks):
        return masks.float()
    padded = pad(masks[:, None].float(), (1, 0, 1, 0), mode="replicate")
    return avg_pool2d(padded, 2, 1)[:, 0]
