"""FCOS, a light anchor-free detection head (Tian et al., 2019)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from featprobe.features import Features
from featprobe.levels import FeatureLevel
from featprobe.probes.objects import (
    Detections,
    ObjectTarget,
    clip_to,
    detection_pyramid,
    in_crowd,
    maps_of,
    side_ranges,
    suppress,
)
from featprobe.probes.pyramid import ConvBlock, PyramidKind
from featprobe.processes import summed

CENTRE_RADIUS = 2.5  # cells around an object's centre that answer for it; long thin cracks need more than FCOS's 1.5
PRIOR = 0.01  # probability that a cell begins by giving to every class
CANDIDATES = 1000  # of each level, that go into the suppression
SCORE_FLOOR = 0.01
NMS_IOU = 0.6  # boxes of one class that overlap more are one
LARGEST_EXPONENT = 6.0  # of a distance in cells


@dataclass(frozen=True)
class _Cells:
    """All cells of all levels: what stands for them, and what the head says of each.

    counts: cells of each level. centres: (cells, 2), frame pixels, x y. stride, low, high: (cells,), pixels. logits:
    (batch, cells, classes - 1). distances: (batch, cells, 4), pixels: left, top, right, bottom. centrality: (batch,
    cells). inside: (batch, cells), bool: whether a cell holds some image.
    """

    counts: tuple[int, ...]
    centres: Tensor
    stride: Tensor
    low: Tensor
    high: Tensor
    logits: Tensor
    distances: Tensor
    centrality: Tensor
    inside: Tensor


class FcosHead(nn.Module):
    """Boxes from every cell of a feature pyramid: class, distances to the four sides, centrality.

    levels: offered, finest first; those finer than its finest stride are not taken. classes: the background counted.
    width: channels. convs: 3x3 convolutions before each output. sides: see objects.detection_strides.
    """

    def __init__(
        self,
        levels: Sequence[FeatureLevel],
        classes: int,
        width: int = 64,
        convs: int = 2,
        sides: Sequence[float] = (),
        pyramid: PyramidKind = "auto",
    ) -> None:
        super().__init__()
        self.strides, self.pyramid = detection_pyramid(levels, width, sides, pyramid)
        self.levels = self.pyramid.levels
        self.classes = classes
        self.ranges = side_ranges(self.strides)
        self.class_tower = nn.ModuleList(ConvBlock(width) for _ in range(convs))
        self.box_tower = nn.ModuleList(ConvBlock(width) for _ in range(convs))
        last = torch.channels_last
        self.class_out = nn.Conv2d(width, classes - 1, 3, padding=1).to(memory_format=last)
        self.box_out = nn.Conv2d(width, 5, 3, padding=1).to(memory_format=last)  # four distances, centrality
        self.scales = nn.Parameter(torch.ones(len(self.strides)))
        for out in (self.class_out, self.box_out):
            nn.init.normal_(out.weight, std=0.01)
            nn.init.zeros_(out.bias)  # type: ignore[arg-type]
        nn.init.constant_(self.class_out.bias, -torch.tensor((1 - PRIOR) / PRIOR).log().item())  # type: ignore[arg-type]

    @property
    def assignment(self) -> dict[str, str]:
        """Which objects, by side in frame pixels, belong to which stride."""
        return {
            f"stride {s}": f"{low:g} to {high:g} px" for s, (low, high) in zip(self.strides, self.ranges, strict=True)
        }

    def forward(self, features: Features, targets: Sequence[ObjectTarget] | None = None) -> Tensor | list[Detections]:
        """The loss, a scalar, where targets are given; else what it finds in each image."""
        cells = self._cells(features)
        if targets is not None:
            return self._loss(cells, targets)
        return [self._detections(cells, image, features) for image in range(features.batch)]

    def _cells(self, features: Features) -> _Cells:
        parts: list[list[Tensor]] = [[] for _ in range(8)]
        maps = maps_of(self.pyramid, self.strides, features)
        for index, ((x, inside), stride) in enumerate(zip(maps, self.strides, strict=True)):
            rows, columns = x.shape[2:]
            named = placed = x.contiguous(memory_format=torch.channels_last)
            for block in self.class_tower:
                named = block(named, inside)
            for block in self.box_tower:
                placed = block(placed, inside)
            out = self.box_out(placed).flatten(2)  # (batch, 5, cells)
            cells = (self.scales[index] * out[:, :4]).clamp(max=LARGEST_EXPONENT).exp().transpose(1, 2)
            y = (torch.arange(rows, device=x.device) + 0.5) * stride
            centres = torch.cartesian_prod(y, (torch.arange(columns, device=x.device) + 0.5) * stride).flip(1)
            ones = torch.ones(len(centres), device=x.device)
            low, high = self.ranges[index]
            whole = torch.ones((len(x), len(centres)), dtype=torch.bool, device=x.device)
            found = [
                centres, ones * stride, ones * low, ones * high,
                self.class_out(named).flatten(2).transpose(1, 2), cells * stride, out[:, 4],
                whole if inside is None else inside.flatten(1),
            ]  # fmt: skip
            for part, own in zip(parts, found, strict=True):
                part.append(own)
        counts = tuple(len(own) for own in parts[0])
        return _Cells(counts, *(torch.cat(part, dim=0 if i < 4 else 1) for i, part in enumerate(parts)))

    def _loss(self, cells: _Cells, targets: Sequence[ObjectTarget]) -> Tensor:
        """Focal loss of the classes, GIoU of the boxes weighted by centrality, cross-entropy of the centrality."""
        matched = [assign(cells.centres, cells.stride, cells.low, cells.high, t.boxes) for t in targets]
        index = torch.stack(matched)  # (batch, cells), -1 for the background
        found = index >= 0
        crowded = torch.stack([in_crowd(cells.centres, t.crowds) for t in targets])
        counted = cells.inside & (found | ~crowded)
        count = summed(found.sum()).clamp(min=1)
        wanted = torch.zeros_like(cells.logits)
        boxes = torch.zeros_like(cells.distances)
        for image, target in enumerate(targets):
            hit = found[image]
            wanted[image, hit, target.labels[index[image, hit]] - 1] = 1.0
            boxes[image, hit] = target.boxes[index[image, hit]]
        classes = sigmoid_focal_loss(cells.logits, wanted, reduction="none").sum(2)
        total = (classes * counted).sum() / count
        centres = cells.centres.expand(len(targets), -1, -1)[found]  # (found, 2)
        true, distances = boxes[found], cells.distances[found]
        sides = torch.cat([centres - true[:, :2], true[:, 2:] - centres], 1).clamp(min=0)  # left, top, right, bottom
        pairs = sides.view(-1, 2, 2)  # (found, [left top | right bottom], axis)
        shares = pairs.amin(1) / pairs.amax(1).clamp(min=1e-6)
        centrality = shares.prod(1).sqrt()
        predicted = torch.cat([centres - distances[:, :2], centres + distances[:, 2:]], 1)
        giou = generalized_box_iou_loss(predicted, true, reduction="none")
        weight = centrality + 1e-3
        total = total + (giou * weight).sum() / summed(weight.sum()).clamp(min=1e-3)
        said = cells.centrality[found]
        return total + binary_cross_entropy_with_logits(said, centrality, reduction="sum") / count

    def _detections(self, cells: _Cells, image: int, features: Features) -> Detections:
        scores = (cells.logits[image].sigmoid() * cells.centrality[image].sigmoid()[:, None]).sqrt()
        scores = scores * cells.inside[image][:, None]
        chosen, start = [], 0
        for count in cells.counts:
            own = scores[start : start + count].flatten()
            best, where = own.topk(min(CANDIDATES, len(own)))
            chosen.append(where[best > SCORE_FLOOR] + start * scores.shape[1])
            start += count
        flat = torch.cat(chosen)
        cell, label = flat // scores.shape[1], flat % scores.shape[1]
        centres, distances = cells.centres[cell], cells.distances[image, cell]
        boxes = torch.cat([centres - distances[:, :2], centres + distances[:, 2:]], 1)
        content = None if features.content is None else features.content[image]
        boxes = clip_to(boxes, content, features.frame)
        kept = suppress(boxes, scores[cell, label], label, NMS_IOU)
        return Detections(boxes[kept], label[kept] + 1, scores[cell, label][kept])


def assign(centres: Tensor, stride: Tensor, low: Tensor, high: Tensor, boxes: Tensor) -> Tensor:
    """Which box each cell answers for: (cells,), an index into the boxes, -1 for none.

    A cell answers for a box whose side is in its level's range, whose centre is nearer than 2.5 cells along both
    axes, and which holds the cell's centre (a box smaller than a cell counts as one cell large, so that none is
    lost); the smallest of several. centres: (cells, 2), pixels. stride, low, high: (cells,). boxes: (boxes, 4).
    """
    if not len(boxes):
        return torch.full((len(centres),), -1, dtype=torch.long, device=centres.device)
    middle, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    area = (2 * half).prod(1)
    side = area.sqrt()
    apart = (centres[:, None] - middle[None]).abs()  # (cells, boxes, 2)
    reach = torch.maximum(half[None], stride[:, None, None] / 2).minimum(CENTRE_RADIUS * stride[:, None, None])
    fits = (apart <= reach).all(2) & (side >= low[:, None]) & (side < high[:, None])
    cost = torch.where(fits, area[None], torch.inf)
    smallest, index = cost.min(1)
    return torch.where(smallest.isinf(), -1, index)
