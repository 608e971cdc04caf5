"""The closed-form head: ridge regression of class shares on features, from one pass over the training cells."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from featprobe.features import Features
from featprobe.levels import FeatureLevel
from featprobe.probes.linear import EPSILON, LinearHead

STRENGTHS = tuple(10.0**k for k in range(-6, 2))
"""Regularisation strengths: multiples of the total weight, for features of variance 1."""
SMALLEST_VARIANCE = 1e-8
OFFSETS = torch.linspace(-0.3, 0.3, 31)  # tried for each class around what it has
ROUNDS = 3


class RidgeSums:
    """Sums over the training cells from which ridge regression is solved for any strength.

    The features of a cell of the finest grid are those of all levels there, coarse ones by nearest neighbour. A cell
    weighs sum_c w_c p_c, p being its class shares and w the class weights, and is to give the indicator of each class.
    Products of two levels are formed at the coarser one's grid, where the finer is summed up: that is exact, and the
    upsampled features are never made.

    levels: finest first. weights: (classes,), of the classes.
    """

    def __init__(self, levels: Sequence[FeatureLevel], classes: int, weights: Tensor) -> None:
        self.levels, self.classes, self.weights = tuple(levels), classes, weights
        ends = torch.tensor([level.channels for level in self.levels]).cumsum(0).tolist()
        self.parts = [slice(end - level.channels, end) for end, level in zip(ends, self.levels, strict=True)]
        wide, device = ends[-1], weights.device
        self.dtype = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        self.gram = torch.zeros(wide, wide, dtype=self.dtype, device=device)
        self.cross = torch.zeros(wide, classes, dtype=self.dtype, device=device)
        self.sums = torch.zeros(wide, dtype=self.dtype, device=device)
        self.class_totals = torch.zeros(classes, dtype=self.dtype, device=device)

    @torch.no_grad()
    def add(self, features: Features, shares: Tensor) -> None:
        """Add a batch. shares: (batch, classes, rows, columns) of the finest grid, see targets.cell_shares."""
        weighted = shares * self.weights[:, None, None]  # (batch, classes, rows, columns)
        self.class_totals += weighted.sum((0, 2, 3)).to(self.dtype)
        cell = weighted.sum(1, keepdim=True)  # (batch, 1, rows, columns)
        maps = [features.maps[level.name].float() for level in self.levels]
        heavy = [_summed(cell, m.shape[2:]) for m in maps]
        for j, (own, part) in enumerate(zip(maps, self.parts, strict=True)):
            grid = own.shape[2:]
            flat = own.flatten(2)  # (batch, channels, cells)
            classes = torch.cat([_summed(weighted, grid), heavy[j]], 1).flatten(2)
            found = torch.bmm(flat, classes.transpose(1, 2)).to(self.dtype).sum(0)  # (channels, classes + 1)
            self.cross[part] += found[:, :-1]
            self.sums[part] += found[:, -1]
            for i in range(j + 1):
                finer = _summed(maps[i] * heavy[i], grid)
                block = torch.bmm(finer.flatten(2), flat.transpose(1, 2)).to(self.dtype).sum(0)
                self.gram[self.parts[i], part] += block

    @torch.no_grad()
    def solve(self, strengths: Sequence[float] = STRENGTHS) -> list[LinearHead]:
        """The solution for each strength, as a linear head in eval mode.

        Minimises sum of weight x squared distance to the classes' indicators + strength x total weight x |W|^2, W
        acting on features of weighted mean 0 and variance 1; the intercept is free.
        """
        total = self.class_totals.sum().clamp(min=1e-12)
        mean = self.sums / total
        upper = torch.triu(self.gram)
        gram = (upper + torch.triu(self.gram, 1).T) / total - torch.outer(mean, mean)
        variance = gram.diagonal().clamp(min=0)
        scale = (variance + EPSILON).rsqrt() * (variance > SMALLEST_VARIANCE)
        wanted = self.class_totals / total  # (classes,)
        cross = (self.cross / total - torch.outer(mean, wanted)) * scale[:, None]
        values, vectors = torch.linalg.eigh(gram * torch.outer(scale, scale))
        projected = vectors.T @ cross
        return [
            self._head((vectors @ (projected / (values.clamp(min=0) + strength)[:, None])).T, mean, variance, wanted)
            for strength in strengths
        ]

    def _head(self, weight: Tensor, mean: Tensor, variance: Tensor, bias: Tensor) -> LinearHead:
        head = LinearHead(self.levels, self.classes).to(weight.device)
        head.bias.copy_(bias)
        for level, part in zip(self.levels, self.parts, strict=True):
            norm = head.norms[level.name]
            norm.running_mean.copy_(mean[part])  # type: ignore[operator]
            norm.running_var.copy_(variance[part])  # type: ignore[operator]
            head.weights[level.name].copy_(weight[:, part])
        return head.eval()


@torch.inference_mode()
def choose(
    heads: Sequence[LinearHead], batches: Iterable[tuple[Features, Tensor]], step: int = 1
) -> tuple[int, Tensor, float]:
    """The best of some heads on validation, and what to add to its classes' logits.

    batches: (features, class shares of the finest grid's cells). step: one cell in so many, at random, is looked at.
    Offsets are searched class by class for the highest mean foreground IoU of cells.
    Returns (index, offsets (classes,), that IoU).
    """
    kept: list[list[Tensor]] = [[] for _ in heads]
    cells: list[Tensor] = []
    classes = heads[0].classes
    random = torch.Generator().manual_seed(0)  # a regular pattern would meet the same columns in every row
    for features, shares in batches:
        truth = shares.movedim(1, -1).reshape(-1, classes)
        chosen = torch.randperm(len(truth), generator=random)[: -(-len(truth) // step)].to(truth.device)
        cells.append(truth[chosen])
        for own, head in zip(kept, heads, strict=True):
            own.append(head(features).movedim(1, -1).reshape(-1, classes)[chosen])
    truth = torch.cat(cells)  # (cells, classes)
    best = (-1, heads[0].bias.new_zeros(classes), -1.0)
    logits = [torch.cat(own) for own in kept]
    for index, cells_of_head in enumerate(logits):
        offsets, score = _offsets(cells_of_head, truth, torch.zeros_like(best[1]), 1)
        if score > best[2]:
            best = (index, offsets, score)
    return best[0], *_offsets(logits[best[0]], truth, best[1], ROUNDS)


def _offsets(logits: Tensor, truth: Tensor, offsets: Tensor, rounds: int) -> tuple[Tensor, float]:
    """Offsets of the classes (the background's stays) and the foreground IoU they give: a search along each in turn."""
    best = foreground_iou(logits + offsets, truth)
    for _ in range(rounds):
        before = best
        for index in range(1, logits.shape[1]):
            start = float(offsets[index])
            for change in OFFSETS.tolist():
                tried = offsets.clone()
                tried[index] = start + change
                score = foreground_iou(logits + tried, truth)
                if score > best:
                    best, offsets = score, tried
        if best == before:
            break
    return offsets, best


def foreground_iou(logits: Tensor, truth: Tensor) -> float:
    """Mean IoU of the classes but the background that validation holds; 0 where it holds none.

    logits: (cells, classes). truth: (cells, classes), shares, which count as parts of a pixel.
    """
    said = logits.argmax(1)
    classes = logits.shape[1]
    confusion = truth.new_zeros(classes, classes).index_add_(0, said, truth)  # (said, true)
    hit = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - hit
    present = confusion.sum(0)[1:] > 0
    scores = (hit / union.clamp(min=1e-12))[1:]
    return float(scores[present].mean()) if bool(present.any()) else 0.0


def _summed(x: Tensor, grid: Sequence[int]) -> Tensor:
    """Sums of x over the cells that make up each cell of a coarser grid: (batch, channels, rows, columns)."""
    if tuple(x.shape[2:]) == tuple(grid):
        return x
    rows, columns = x.shape[2] // grid[0], x.shape[3] // grid[1]
    return x.unflatten(3, (grid[1], columns)).unflatten(2, (grid[0], rows)).sum((3, 5))
