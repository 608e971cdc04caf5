"""Region heads as torchvision makes them: regions that are sampled and pooled, and the losses of boxes and masks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    avg_pool2d,
    binary_cross_entropy_with_logits,
    cross_entropy,
    pad,
    smooth_l1_loss,
)
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import box_area, box_iou, roi_align

from featprobe.errors import ProbeError
from featprobe.probes import execution
from featprobe.probes.detections import (
    ObjectBatch,
    areas,
    intersections,
    ious,
    sampled,
    unpacked,
)
from featprobe.probes.rcnn.proposals import BETA, encoded
from featprobe.processes import summed

CELLS_OF_REGION = 14  # a region spans about as many cells of the level that it is pooled from
MASK_SIDE = 28  # of the masks that are predicted, cells


class Regions(RoIHeads):
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


def numbered(boxes: Tensor) -> Tensor:
    """Regions as RegionPool takes them, (batch * boxes, 5): the image's number, the box. boxes: (batch, boxes, 4)."""
    image = torch.arange(boxes.shape[0], dtype=boxes.dtype, device=boxes.device)[:, None, None]
    return torch.cat([image.expand(-1, boxes.shape[1], -1), boxes], 2).flatten(0, 1)


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
