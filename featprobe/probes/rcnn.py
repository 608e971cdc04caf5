"""Faster R-CNN and Mask R-CNN heads: torchvision's region proposals and region heads, light, on the shared pyramid."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, binary_cross_entropy_with_logits, pad, smooth_l1_loss
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
from torchvision.ops import box_area, box_iou, roi_align

from featprobe.features import Features
from featprobe.kinds import PyramidKind
from featprobe.levels import FeatureLevel
from featprobe.probes import execution
from featprobe.probes.detections import (
    MOST_DETECTIONS,
    Candidates,
    Detections,
    ObjectTarget,
    anchor_sizes,
    best_of,
    clip_to,
    in_crowd,
)
from featprobe.probes.head import ObjectHead
from featprobe.probes.pyramid import detection_pyramid, maps_of
from featprobe.processes import summed

ASPECT_RATIOS = (0.5, 1.0, 2.0)
HIDDEN_PER_WIDTH = 4  # of the two fully connected layers of the box head
MASK_CONVS = 2
LEAST_PROPOSAL, LEAST_BOX = 1e-3, 1e-2  # pixels of a side, torchvision's
CELLS_OF_REGION = 14  # a region spans about as many cells of the level that it is pooled from


class RcnnHead(ObjectHead):
    """Region proposals, then a class, a box and, with `masks`, a mask for each region.

    levels: available, finest first; it uses none finer than its finest stride. classes: number with the background.
    width: channels. sides: see detections.detection_strides.
    """

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
                "mask_roi_pool": RegionPool(self.strides, 14),
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

    def candidates(self, features: Features) -> Candidates:
        """A candidate for each proposal and each class, from torchvision's layers with its settings.

        torchvision goes through a batch image by image, which a graph for batches of any size can't.
        """
        maps = self._maps(features)
        proposed, there = self._proposed(maps, features)
        batch, count = proposed.shape[:2]
        image = torch.arange(batch, device=proposed.device)[:, None, None].expand(-1, count, -1)
        regions = torch.cat([image.to(proposed.dtype), proposed], 2).flatten(0, 1)  # (batch * proposals, 5)
        own = self.regions
        logits, deltas = own.box_predictor(own.box_head(own.box_roi_pool.pooled(maps, regions)))
        decoded = own.box_coder.decode_single(deltas, regions[:, 1:])  # (batch * proposals, classes * 4)
        boxes = decoded.view(batch, count, self.classes, 4)[:, :, 1:].flatten(1, 2)
        boxes = clip_to(boxes, features.content, features.frame)
        scores = logits.softmax(1).view(batch, count, self.classes)[:, :, 1:] * there[:, :, None]
        labels = torch.arange(1, self.classes, device=boxes.device).repeat(count).expand(batch, -1)
        masks = partial(self._masks, maps) if own.has_mask() else None
        real = scores.flatten(1) * _large(boxes, LEAST_BOX)
        return Candidates(boxes, labels, real, own.nms_thresh, own.score_thresh, masks)

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
        first = feature_maps[0]
        key = tuple(m.shape[2:] for m in feature_maps), first.dtype, first.device
        if self.kept is None or self.kept[0] != key:  # they are the same for every batch of one frame
            with torch.inference_mode(mode=False):
                self.kept = key, self._made(feature_maps)
        return [self.kept[1]] * len(image_list.image_sizes)

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
        of_box = smooth_l1_loss(pred_bbox_deltas, goals, beta=1 / 9, reduction="none").sum(1)
        said, wanted = objectness.flatten(), torch.cat(labels).clamp(min=0)
        of_object = binary_cross_entropy_with_logits(said, wanted.to(said.dtype), reduction="none")
        sampled = positive + negative
        count = summed(sampled.sum()).clamp(min=1)
        return (of_object * sampled).sum() / count, (of_box * positive).sum() / count


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


class RegionPool(nn.Module):
    """A square of features for each region, from the level where it spans about 14 cells.

    torchvision's MultiScaleRoIAlign guesses strides from the maps' sizes and reads half a cell off, because it assumes
    a cell's centre at its corner. Here cell i of a map spans the pixels [i, i + 1) * stride.
    """

    def __init__(self, strides: Sequence[int], side: int) -> None:
        super().__init__()
        self.strides, self.output_size = tuple(strides), (side, side)

    def forward(self, maps: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]) -> Tensor:
        """maps: "stride" -> (batch, channels, rows, columns). boxes: (regions, 4) of each image, frame pixels.

        Returns (all regions, channels, side, side). sizes: of the images, for torchvision's sake.
        """
        image = torch.cat([torch.full_like(own[:, :1], i) for i, own in enumerate(boxes)])
        return self.pooled(maps, torch.cat([image, torch.cat(boxes)], 1))

    def pooled(self, maps: dict[str, Tensor], regions: Tensor) -> Tensor:
        """The same of regions in any order. regions: (regions, 5), the number of the image in the batch, the box."""
        side = box_area(regions[:, 1:]).sqrt()
        level = torch.bucketize(side, side.new_tensor([CELLS_OF_REGION * s for s in self.strides[1:]]), right=True)
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


def half_pixel_later(masks: Tensor) -> Tensor:
    """Masks whose value at index i is that half a pixel before, (objects, height, width), float32.

    torchvision cuts the mask targets out with a RoIAlign that takes the centre of pixel i to lie at i, not at i + 0.5.
    """
    if not len(masks):
        return masks.float()
    padded = pad(masks[:, None].float(), (1, 0, 1, 0), mode="replicate")
    return avg_pool2d(padded, 2, 1)[:, 0]
