"""Faster R-CNN and Mask R-CNN heads: torchvision's region proposals and region heads, light, on the shared pyramid."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign, box_area, box_iou

from featprobe.levels import FeatureLevel, Features
from featprobe.probes.objects import (
    MOST_DETECTIONS,
    Detections,
    ObjectTarget,
    anchor_sizes,
    clip_to,
    detection_pyramid,
    in_crowd,
)
from featprobe.probes.pyramid import PyramidKind

ASPECT_RATIOS = (0.5, 1.0, 2.0)
HIDDEN_PER_WIDTH = 4  # of the two fully connected layers of the box head
MASK_CONVS = 2
CELLS_OF_REGION = 14  # a region spans about as many cells of the level that it is pooled from


class RcnnHead(nn.Module):
    """Region proposals, then a class, a box and, with `masks`, a mask for each region.

    levels: offered, finest first; those finer than its finest stride are not taken. classes: the background counted.
    width: channels. sides: see objects.detection_strides.
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
                "mask_roi_pool": _region_pool(self.strides, 14),
                "mask_head": MaskRCNNHeads(width, (width,) * MASK_CONVS, 1),
                "mask_predictor": MaskRCNNPredictor(width, width, classes),
            }
        self.regions = _Regions(
            _region_pool(self.strides, 7), TwoMLPHead(width * 49, hidden), FastRCNNPredictor(hidden, classes),
            fg_iou_thresh=0.5, bg_iou_thresh=0.5, batch_size_per_image=64, positive_fraction=0.25,
            bbox_reg_weights=None, score_thresh=0.01, nms_thresh=0.5, detections_per_img=MOST_DETECTIONS, **mask_parts,
        )  # fmt: skip

    @property
    def assignment(self) -> dict[str, str]:
        """Sides of the anchors of each stride, frame pixels."""
        return {
            f"stride {s}": f"anchors of {', '.join(map(str, sorted(set(own))))} px"
            for s, own in zip(self.strides, self.sizes, strict=True)
        }

    def forward(self, features: Features, targets: Sequence[ObjectTarget] | None = None) -> Tensor | list[Detections]:
        """The loss, a scalar, where targets are given; else what it finds in each image."""
        found = self.pyramid(features)[: len(self.strides)]
        maps = {str(stride): x for stride, (x, _) in zip(self.strides, found, strict=True)}
        contents = [features.frame] * features.batch
        if features.content is not None:
            contents = [(height, width) for height, width in features.content.tolist()]
        frames = [features.frame] * features.batch
        wanted = None if targets is None else [_as_torchvision(t, c) for t, c in zip(targets, contents, strict=True)]
        self.rpn.train(targets is not None)  # torchvision's parts go by their mode; ours by what they are given
        self.regions.train(targets is not None)
        images = ImageList(next(iter(maps.values())).new_empty(1).expand(1, 1, *features.frame), contents)
        proposals, losses = self.rpn(images, maps, wanted)
        self.regions.crowds = [t.crowds for t in targets or ()]
        results, more = self.regions(maps, proposals, frames, wanted)
        if targets is not None:
            return torch.stack([*losses.values(), *more.values()]).sum()
        return [
            Detections(
                clip_to(r["boxes"], None if features.content is None else features.content[i], features.frame),
                r["labels"], r["scores"], r["masks"][:, 0] if "masks" in r else None,
            )
            for i, r in enumerate(results)
        ]  # fmt: skip


class _Anchors(AnchorGenerator):
    """torchvision's anchors at strides that are known, and not guessed from the maps' sizes."""

    def __init__(self, strides: Sequence[int], sizes: Sequence[Sequence[int]]) -> None:
        super().__init__(tuple(tuple(own) for own in sizes), (ASPECT_RATIOS,) * len(sizes))
        self.strides = strides

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Anchors of each image, (anchors, 4), centred on the cells."""
        device = feature_maps[0].device
        self.set_cell_anchors(feature_maps[0].dtype, device)
        steps = [[torch.tensor(s, device=device)] * 2 for s in self.strides]
        grids = [[int(m.shape[-2]), int(m.shape[-1])] for m in feature_maps]
        parts = self.grid_anchors(grids, steps)
        shifted = [part + stride / 2 for part, stride in zip(parts, self.strides, strict=True)]
        return [torch.cat(shifted)] * len(image_list.image_sizes)


class _Proposals(RegionProposalNetwork):
    """torchvision's proposals; anchors centred in padding or in a crowd are neither object nor background."""

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        labels, boxes = super().assign_targets_to_anchors(anchors, targets)
        for own, label, target in zip(anchors, labels, targets, strict=True):
            centres = (own[:, :2] + own[:, 2:]) / 2
            left_out = (centres >= target["content"]).any(1) | in_crowd(centres, target["crowds"])
            label[left_out & (label <= 0)] = -1
        return labels, boxes


class _Regions(RoIHeads):
    """torchvision's region heads; proposals that lie half in a crowd or more are not taken for background."""

    crowds: list[Tensor]

    def assign_targets_to_proposals(
        self, proposals: list[Tensor], gt_boxes: list[Tensor], gt_labels: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        matched, labels = super().assign_targets_to_proposals(proposals, gt_boxes, gt_labels)
        for own, label, crowds in zip(proposals, labels, self.crowds, strict=True):
            if len(crowds):
                iou, area = box_iou(own, crowds), box_area(own)[:, None]
                shared = iou * (area + box_area(crowds)) / (1 + iou)
                label[((shared / area.clamp(min=1e-6)).amax(1) >= 0.5) & (label == 0)] = -1
        return matched, labels


def _region_pool(strides: Sequence[int], side: int) -> MultiScaleRoIAlign:
    """RoIAlign that takes a region from the level where it spans about 14 cells; by strides, whatever their ratio."""
    pool = MultiScaleRoIAlign([str(s) for s in strides], side, 2)
    pool.scales = [1 / s for s in strides]
    pool.map_levels = _level_of(strides)
    return pool


def _level_of(strides: Sequence[int]) -> Callable[[list[Tensor]], Tensor]:
    def level_of(boxes: list[Tensor]) -> Tensor:
        side = torch.cat([box_area(own) for own in boxes]).sqrt()
        borders = side.new_tensor([CELLS_OF_REGION * s for s in strides[1:]])
        return torch.bucketize(side, borders, right=True)

    return level_of


def _as_torchvision(target: ObjectTarget, content: tuple[int, int]) -> dict[str, Tensor]:
    values = {"boxes": target.boxes, "labels": target.labels, "crowds": target.crowds}
    values["content"] = target.boxes.new_tensor([content[1], content[0]])  # width, height
    return values if target.masks is None else values | {"masks": target.masks}
