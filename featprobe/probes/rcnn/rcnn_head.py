"""Faster R-CNN and Mask R-CNN heads: torchvision's region proposals and region heads, light, on the shared pyramid."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead, concat_box_prediction_layers

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
    best_of,
    clip_to,
    found_at_once,
)
from featprobe.probes.execution import full_products, half_products
from featprobe.probes.head import BatchedObjectHead
from featprobe.probes.pyramid import detection_pyramid, maps_of
from featprobe.probes.rcnn.proposals import (
    ASPECT_RATIOS,
    LEAST_PROPOSAL,
    Anchors,
    Proposals,
    decoded,
    large,
)
from featprobe.probes.rcnn.region_heads import MASK_SIDE, RegionPool, Regions, half_pixel_later

HIDDEN_PER_WIDTH = 4  # of the two fully connected layers of the box head
MASK_CONVS = 2
LEAST_BOX = 1e-2  # pixels of a side, torchvision's
ROUNDS = 63  # of suppression in a training step, see detections.survivors


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
        self.rpn = Proposals(
            Anchors(self.strides, self.sizes), RPNHead(width, count * len(ASPECT_RATIOS)),
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
        self.regions = Regions(
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
        scores = (logits.softmax(2)[:, :, 1:] * there[:, :, None]).flatten(1) * large(boxes, LEAST_BOX)
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
        scores = said.gather(1, place).sigmoid() * large(boxes, LEAST_PROPOSAL)
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


def _as_torchvision(target: ObjectTarget, features: Features, image: int) -> dict[str, Tensor]:
    values = {"boxes": target.boxes, "labels": target.labels, "crowds": target.crowds}
    if features.content is not None:
        values["content"] = features.content[image].flip(0)  # width, height
    return values if target.masks is None else values | {"masks": half_pixel_later(target.masks)}
