"""FCOS, a light anchor-free detection head (Tian et al., 2019)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, conv2d, pad, softplus

from featprobe.features import Features
from featprobe.kinds import PyramidKind
from featprobe.levels import FeatureLevel
from featprobe.probes import execution
from featprobe.probes.detections import (
    Candidates,
    Detections,
    ObjectBatch,
    ObjectTarget,
    clip_to,
    found_at_once,
    in_crowd,
    side_ranges,
    suppress,
)
from featprobe.probes.execution import full_products, half_products
from featprobe.probes.head import BatchedObjectHead
from featprobe.probes.operations.convolutions import convolved, few_outputs
from featprobe.probes.operations.norms import joined, rectified
from featprobe.probes.operations.towers import towers
from featprobe.probes.pyramid import ConvBlock, Maps, detection_pyramid
from featprobe.processes import summed

CENTRE_RADIUS = 2.5  # cells around an object's centre that predict it; long thin cracks need more than FCOS's 1.5
PRIOR = 0.01  # probability of every class in each cell before training
CANDIDATES = 1000  # boxes per level that go into the suppression
SCORE_FLOOR = 0.01
NMS_IOU = 0.6  # of boxes of one class that overlap more, only the best is kept
LARGEST_EXPONENT = 6.0  # of a distance in cells
SMALLEST = 1e-7  # added to areas that are divided by


@dataclass(frozen=True)
class Grid:
    """All cells of the maps of one frame, level by level, finest first.

    counts: cells of each level. centres: (cells, 2), frame pixels, x y. level: (cells,), int64. sizes: (levels, 2),
    columns and rows. first: (levels,), the place of a level's first cell. strides: (levels,), pixels. borders:
    (levels - 1,): from this side on, in pixels, an object belongs to the next level.
    """

    counts: tuple[int, ...]
    centres: Tensor
    level: Tensor
    sizes: Tensor
    first: Tensor
    strides: Tensor
    borders: Tensor


@cache
def grid_of(strides: tuple[int, ...], frame: tuple[int, int], device: torch.device) -> Grid:
    """The cells of these strides in a frame of (height, width) pixels. They are kept: a recorded step must find its
    inputs in place."""
    with torch.inference_mode(mode=False):  # for training too
        sizes = [(-(-frame[1] // s), -(-frame[0] // s)) for s in strides]
        centres = []
        for stride, (columns, rows) in zip(strides, sizes, strict=True):
            y, x = ((torch.arange(n) + 0.5) * stride for n in (rows, columns))
            centres.append(torch.cartesian_prod(y, x).flip(1))
        counts = tuple(columns * rows for columns, rows in sizes)
        level = torch.arange(len(strides)).repeat_interleave(torch.tensor(counts))
        first = torch.tensor([sum(counts[:i]) for i in range(len(counts))])
        borders = torch.tensor([low for low, _ in side_ranges(strides)[1:]])
        parts = (torch.cat(centres), level, torch.tensor(sizes), first, torch.tensor(strides).float(), borders)
        return Grid(counts, *(part.to(device) for part in parts))


@dataclass(frozen=True)
class _Said:
    """The output of the head for each cell of a grid.

    logits: (batch, classes - 1, cells). sides: (batch, 4, cells), logarithms of the distances to left, top, right and
    bottom in cells. centrality: (batch, cells). inside: (batch, cells), bool: whether a cell holds some image; None for
    all. places: where boxes were wanted in some cells alone, their numbers, counted through the batch, (n,); then sides
    are (n, 4) and centrality is (n,).
    """

    grid: Grid
    logits: Tensor
    sides: Tensor
    centrality: Tensor
    inside: Tensor | None
    places: Tensor | None = None

    def boxes(self, sides: Tensor, cell: Tensor | None = None) -> Tensor:
        """Boxes around cells: (…, cells, 4), pixels. sides: (…, cells, 4). cell: (…, cells), None for all in order."""
        level = self.grid.level if cell is None else self.grid.level[cell]
        centres = self.grid.centres if cell is None else self.grid.centres[cell]
        distances = sides.clamp(max=LARGEST_EXPONENT).exp() * self.grid.strides[level][..., None]
        return torch.cat([centres - distances[..., :2], centres + distances[..., 2:]], -1)


class _Output(nn.Conv2d):
    """The last convolution of a tower, which has a bias."""

    bias: nn.Parameter


class FcosHead(BatchedObjectHead):
    """Boxes from every cell of a feature pyramid: class, distances to the four sides, centrality.

    levels: the available levels, finest first; it does not use levels finer than its finest stride. classes: their
    number, with the background.
    width: channels. convs: 3x3 convolutions before each output. sides: see detections.detection_strides.
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
        self.class_out = _Output(width, classes - 1, 3, padding=1).to(memory_format=last)
        self.box_out = _Output(width, 5, 3, padding=1).to(memory_format=last)  # four distances, centrality
        self.scales = nn.Parameter(torch.ones(len(self.strides)))
        for out in (self.class_out, self.box_out):
            nn.init.normal_(out.weight, std=0.01)
            nn.init.zeros_(out.bias)
        nn.init.constant_(self.class_out.bias, -torch.tensor((1 - PRIOR) / PRIOR, device="cpu").log().item())

    @property
    def assignment(self) -> dict[str, str]:
        """The range of objects' sides, in frame pixels, per stride."""
        return {
            f"stride {s}": f"{low:g} to {high:g} px" for s, (low, high) in zip(self.strides, self.ranges, strict=True)
        }

    def forward(self, features: Features, targets: Sequence[ObjectTarget] | None = None) -> Tensor | list[Detections]:
        """The loss, a scalar, if targets are given; else the detections per image."""
        if targets is None:
            return self._detections(features)
        return self.batch_loss(features, ObjectBatch.of(targets))

    def batch_loss(self, features: Features, targets: ObjectBatch) -> Tensor:
        """The loss of a batch, a scalar."""
        device = self.scales.device
        with full_products(device):
            grid = grid_of(self.strides, features.frame, device)
            index = assign(grid, targets.boxes, targets.labels > 0)  # (batch, cells), -1 for the background
        said = self._said(features) if execution.whole_batches(device) else self._said_of_objects(features, index >= 0)
        with full_products(device):
            return self._loss(said, targets, index)

    def _towers(self) -> tuple[list[list[ConvBlock]], list[Tensor]]:
        """The blocks of both towers, step by step, and the weights of each step's convolutions, joined."""
        pairs = zip(self.class_tower, self.box_tower, strict=True)
        steps = [[cast(ConvBlock, block) for block in pair] for pair in pairs]
        return steps, [torch.cat([block.conv.weight for block in pair]) for pair in steps]

    def _said(self, features: Features) -> _Said:
        """The outputs of both towers, computed together: first as one convolution, then as two groups of one."""
        device, width = self.scales.device, self.class_out.in_channels
        steps, weights = self._towers()
        with half_products(device, training=self.training):
            maps = self.pyramid.convolved(features, weights[0], self.strides)
            for step, pair in enumerate(steps):
                if step:
                    maps = [(convolved(x, weights[step], groups=2), inside) for x, inside in maps]
                maps = [(rectified([block.norm for block in pair], x, inside), inside) for x, inside in maps]
        outs = (self.class_out, self.box_out)
        bias = torch.cat([own.bias for own in outs])
        with full_products(device):
            if not execution.whole_batches(device):
                out = torch.cat([self._few(x) for x, _ in maps], 2) + bias[:, None]
            else:  # both at once, each blind to the other's tower: ten outputs cost as many as five
                named, placed = (
                    pad(own.weight, (0, 0, 0, 0, *side))
                    for own, side in zip(outs, ((0, width), (width, 0)), strict=True)
                )
                weight = torch.cat([named, placed]).contiguous(memory_format=torch.channels_last)
                out = torch.cat([conv2d(x.to(weight.dtype), weight, bias, padding=1).flatten(2) for x, _ in maps], 2)
        grid = grid_of(self.strides, features.frame, device)
        logits, sides, centrality = out.split([self.classes - 1, 4, 1], 1)
        return _Said(grid, logits, sides * self.scales[grid.level], centrality[:, 0], _cells_inside(maps))

    def _few(self, x: Tensor) -> Tensor:
        """The outputs of both last convolutions, without their bias: (batch, outputs, cells)."""
        named, placed = self.class_out.weight, self.box_out.weight
        out = x.new_empty(len(x), len(named) + len(placed), x.shape[2:].numel())
        for half, weight, own in zip(
            x.chunk(2, 1), (named, placed), out.split([len(named), len(placed)], 1), strict=True
        ):
            few_outputs(half, weight, own)
        return out

    def _said_of_objects(self, features: Features, found: Tensor) -> _Said:
        """On a CPU: the logits of all cells, the boxes of those that were found alone. found: (batch, cells), bool."""
        grid = grid_of(self.strides, features.frame, found.device)
        steps, weights = self._towers()
        norms = [[block.norm for block in pair] for pair in steps]
        joint = [(joined([n.weight for n in pair]), joined([n.bias for n in pair])) for pair in norms]
        shape = sum(norm.num_groups for norm in norms[0]), norms[0][0].eps
        outs = self.class_out.weight, self.box_out.weight
        maps = self.pyramid.convolved(features, weights[0], self.strides)
        logits, boxes, places = [], [], []
        for (x, inside), own, first in zip(maps, found.split(grid.counts, 1), grid.first.tolist(), strict=True):
            place = own.flatten().nonzero()[:, 0]
            named, placed = towers(x, inside, place, joint, weights[1:], outs, *shape)
            logits.append(named)
            boxes.append(placed)
            places.append(place // own.shape[1] * found.shape[1] + place % own.shape[1] + first)
        where = torch.cat(places)
        sides, centrality = (torch.cat(boxes) + self.box_out.bias).split([4, 1], 1)
        sides = sides * self.scales[grid.level[where % found.shape[1]]][:, None]
        named = torch.cat(logits, 2) + self.class_out.bias[:, None]
        return _Said(grid, named, sides, centrality[:, 0], _cells_inside(maps), where)

    def _loss(self, said: _Said, targets: ObjectBatch, index: Tensor) -> Tensor:
        """Focal loss of the classes, GIoU of the boxes weighted by centrality, cross-entropy of the centrality.

        index: (batch, cells), see `assign`.
        """
        grid = said.grid
        found, place = index >= 0, index.clamp(min=0)
        counted = found | ~in_crowd(grid.centres, targets.crowds)
        if said.inside is not None:
            counted = counted & said.inside
        count = summed(found.sum()).clamp(min=1)
        label = targets.labels.gather(1, place) * found  # (batch, cells), 0 for the background
        wanted = label[:, None] == torch.arange(1, self.classes, device=label.device)[:, None]
        total = (focal(said.logits, wanted) * counted[:, None]).sum() / count
        boxes = targets.boxes.gather(1, place[:, :, None].expand(-1, -1, 4))
        cell = torch.arange(found.shape[1], device=found.device).expand(len(found), -1)
        sides, said_centrality = said.sides, said.centrality
        true, cell, own = (part.flatten(0, 1) for part in (boxes, cell, found.to(total.dtype)))
        if said.places is None:  # the others' weight is 0
            sides, said_centrality = sides.transpose(1, 2).flatten(0, 1), said_centrality.flatten()
        else:
            true, cell, own = (part.index_select(0, said.places) for part in (true, cell, own))
        centrality = centrality_of(grid.centres[cell], true)
        giou = giou_losses(said.boxes(sides, cell), true)
        weight = (centrality + 1e-3) * own
        total = total + (giou * weight).sum() / summed(weight.sum()).clamp(min=1e-3)
        return total + binary_cross_entropy_with_logits(said_centrality, centrality, own, reduction="sum") / count

    def candidates(self, features: Features) -> Candidates:
        """The best cells of each level, before the suppression; as many for each image."""
        said = self._said(features)
        scores = (said.logits.sigmoid() * said.centrality.sigmoid()[:, None]).sqrt().transpose(1, 2)
        if said.inside is not None:
            scores = scores * said.inside[:, :, None]
        best, places, start = [], [], 0
        for count in said.grid.counts:
            own = scores[:, start : start + count].flatten(1)  # (batch, cells of this level * classes)
            values, where = own.topk(min(CANDIDATES, own.shape[1]))
            best.append(values)
            places.append(where + start * scores.shape[2])
            start += count
        score, place = torch.cat(best, 1), torch.cat(places, 1)  # (batch, candidates)
        cell, label = place // scores.shape[2], place % scores.shape[2]
        sides = said.sides.transpose(1, 2).gather(1, cell[:, :, None].expand(-1, -1, 4))
        boxes = clip_to(said.boxes(sides, cell), features.content, features.frame)
        return Candidates(boxes, label + 1, score, NMS_IOU, SCORE_FLOOR)

    def _detections(self, features: Features) -> list[Detections]:
        """The best boxes per image, among the best per level."""
        all_of = self.candidates(features)
        if execution.whole_batches(all_of.boxes.device):
            return found_at_once(all_of)
        found = []
        for boxes, score, label in zip(all_of.boxes, all_of.scores, all_of.labels, strict=True):
            kept = suppress(boxes, score, label, NMS_IOU, SCORE_FLOOR)
            found.append(Detections(boxes[kept], label[kept], score[kept]))
        return found


def _cells_inside(maps: Maps) -> Tensor | None:
    """Whether each cell of all maps holds some image, (batch, cells); None for all."""
    insides = [inside.flatten(1) for _, inside in maps if inside is not None]
    return torch.cat(insides, 1) if insides else None


def focal(logits: Tensor, wanted: Tensor) -> Tensor:
    """Focal loss of each logit (Lin et al., 2017, alpha 0.25 and gamma 2). wanted: bool, of the same shape."""
    against = torch.where(wanted, -logits, logits)
    return against.sigmoid().square() * softplus(against) * (0.75 - 0.5 * wanted)


def giou_losses(boxes: Tensor, others: Tensor) -> Tensor:
    """1 - GIoU of pairs of boxes (Rezatofighi et al., 2019), (n,); torchvision's waits for the device.

    boxes, others: (n, 4), x1 y1 x2 y2.
    """
    within = (torch.minimum(boxes[:, 2:], others[:, 2:]) - torch.maximum(boxes[:, :2], others[:, :2])).clamp(min=0)
    around = torch.maximum(boxes[:, 2:], others[:, 2:]) - torch.minimum(boxes[:, :2], others[:, :2])
    both, hull, own, other = (  # the gradient of prod() would wait for the device
        size[:, 0] * size[:, 1] for size in (within, around, boxes[:, 2:] - boxes[:, :2], others[:, 2:] - others[:, :2])
    )
    union = own + other - both
    return 1 - both / (union + SMALLEST) + (hull - union) / (hull + SMALLEST)


def centrality_of(centres: Tensor, boxes: Tensor) -> Tensor:
    """How central points are in their boxes, in [0, 1] (FCOS, equation 3). centres: (n, 2), x y. boxes: (n, 4)."""
    sides = torch.stack([centres - boxes[:, :2], boxes[:, 2:] - centres], 1).clamp(min=0)  # (n, [left top | …], 2)
    return (sides.amin(1) / sides.amax(1).clamp(min=1e-6)).prod(1).sqrt()


def assign(grid: Grid, boxes: Tensor, valid: Tensor) -> Tensor:
    """The box that each cell must predict: (batch, cells), an index into its image's boxes, -1 for none.

    A cell predicts a box whose side is in its level's range, whose centre is nearer than 2.5 cells along both axes, and
    which contains the cell's centre (a box smaller than a cell counts as one cell large, so that none is lost). Of
    several boxes it predicts the smallest, of equal ones the first. boxes: (batch, boxes, 4), pixels. valid: (batch,
    boxes), bool: False for padding. Only the 7x7 cells around a box's centre are tested.
    """
    batch, most = valid.shape
    cells, device = len(grid.level), boxes.device
    middle, half = (boxes[..., :2] + boxes[..., 2:]) / 2, (boxes[..., 2:] - boxes[..., :2]) / 2  # (batch, boxes, 2)
    area = (2 * half).prod(2)
    order = area.argsort(dim=1, stable=True)
    rank = order.argsort(1)
    level = torch.bucketize(area.sqrt(), grid.borders, right=True)
    stride = grid.strides[level][..., None]
    reach = torch.maximum(half, stride / 2).minimum(CENTRE_RADIUS * stride)
    start = ((middle - reach) / stride - 0.5).floor()
    at = start[..., None] + torch.arange(7, device=device)  # (batch, boxes, x y, 7), columns and rows
    near = ((at + 0.5) * stride[..., None] - middle[..., None]).abs() <= reach[..., None]
    sizes = grid.sizes[level]
    near = near & (at >= 0) & (at < sizes[..., None]) & valid[:, :, None, None]
    fits = near[:, :, 1, :, None] & near[:, :, 0, None]  # (batch, boxes, rows, columns)
    at = at.long()
    cell = grid.first[level][..., None, None] + at[:, :, 1, :, None] * sizes[:, :, 0, None, None] + at[:, :, 0, None]
    cell = torch.where(fits, cell, cells).flatten(1)  # the last of cells + 1 is no cell
    smallest = torch.full((batch, cells + 1), most, device=device)
    smallest.scatter_reduce_(1, cell, rank[:, :, None].expand(-1, -1, 49).flatten(1), "amin")
    smallest = smallest[:, :cells]
    return torch.where(smallest < most, order.gather(1, smallest.clamp(max=most - 1)), -1)
