"""The closed-form head: ridge regression of class shares on features, from one pass over the training cells."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from featprobe.features import Features
from featprobe.levels import FeatureLevel
from featprobe.probes import execution
from featprobe.probes.linear import EPSILON, LinearHead

STRENGTHS = tuple(10.0**k for k in range(-6, 2))
"""Regularisation strengths: multiples of the total weight, for features of variance 1."""
SMALLEST_VARIANCE = 1e-8
OFFSETS = torch.linspace(-0.3, 0.3, 31)  # tried per class, added to its present offset
ROUNDS = 4
CELLS_AT_ONCE = 1 << 14  # that offsets are tried on, on a CPU: what its caches hold of all tries


class RidgeSums:
    """Sums over the training cells from which ridge regression is solved for any strength.

    The features of a cell of the finest grid are those of all levels there, coarse ones by nearest neighbour. A cell
    has the weight sum_c w_c p_c (p: its class shares, w: the class weights), and its targets are the classes'
    indicators. Products of two levels are computed on the coarser grid, where the finer level is summed: that is exact,
    and upsampled features are never made.

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
        """Add a batch. shares: (batch, classes, rows, columns) of the finest grid, see features.cell_shares."""
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
        for level, norm, part in zip(self.levels, head.level_norms, self.parts, strict=True):
            norm.running_mean.copy_(mean[part])
            norm.running_var.copy_(variance[part])
            head.weights[level.name].copy_(weight[:, part])
        return head.eval()


@torch.inference_mode()
def choose(
    heads: Sequence[LinearHead], batches: Iterable[tuple[Features, Tensor]], step: int = 1
) -> tuple[int, Tensor, float]:
    """The best of some heads on validation, and what to add to its classes' logits.

    batches: (features, class shares of the finest grid's cells). step: one cell of so many, drawn at random, is used.
    Offsets are searched class by class for the highest mean foreground IoU of cells, of each head to the end: after one
    round another head may be ahead.
    Returns (index, offsets (classes,), that IoU).
    """
    kept: list[list[Tensor]] = [[] for _ in heads]
    cells: list[Tensor] = []
    classes = heads[0].classes
    random = torch.Generator().manual_seed(0)  # a regular pattern would meet the same columns in every row
    for features, shares in batches:
        truth = shares.movedim(1, -1).reshape(-1, classes)
        chosen = torch.randperm(len(truth), generator=random)[: -(-len(truth) // step)]
        chosen = (chosen.pin_memory() if truth.is_cuda else chosen).to(truth.device, non_blocking=True)
        cells.append(truth[chosen])
        for own, head in zip(kept, heads, strict=True):
            own.append(head(features).movedim(1, -1).reshape(-1, classes)[chosen])
    truth = torch.cat(cells)  # (cells, classes)
    logits = [torch.cat(kept.pop(0)) for _ in heads]  # each head's pieces end with the pop
    none = heads[0].bias.new_zeros(classes)
    tried = [_offsets(own, truth, none, ROUNDS) for own in logits]
    scores = torch.stack([score for _, score in tried]).tolist()
    best = max(range(len(heads)), key=lambda index: scores[index])  # the first of equals
    return best, tried[best][0], scores[best]


def _offsets(logits: Tensor, truth: Tensor, offsets: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Offsets of the classes (the background's stays) and the foreground IoU they give: a search along each in turn.

    Nothing waits for a GPU: the better offset is chosen where the scores lie. After a round that finds nothing better
    no other does.
    """
    best = foreground_iou(logits + offsets, truth)
    for _ in range(rounds):
        before = best
        for index in range(1, logits.shape[1]):
            tried = offsets[index] + OFFSETS.to(offsets)
            scores = _scores_of(logits, offsets, tried, index, truth)
            first = scores.argmax()
            better = scores[first] > best
            best = torch.where(better, scores[first], best)
            offsets = offsets.clone()
            offsets[index] = torch.where(better, tried[first], offsets[index])
        if best.device.type == "cpu" and best == before:
            break
    return offsets, best


def _scores_of(logits: Tensor, offsets: Tensor, tried: Tensor, index: int, truth: Tensor) -> Tensor:
    """foreground_iou with each of some offsets for one class, beside those of the others: (tries,)."""
    classes = truth.shape[1]
    step = max(1, len(truth)) if execution.whole_batches(truth.device) else CELLS_AT_ONCE
    pieces = zip(logits.split(step), truth.split(step), strict=True)
    found = [_moved(own + offsets, own[:, index, None] + tried, index, labels) for own, labels in pieces]
    sums, lost = (torch.stack(own).sum(0) for own in zip(*found, strict=True))
    said, hit = (sums - lost[:, : 2 * classes]).unflatten(1, (2, classes)).unbind(1)
    is_own = torch.arange(classes, device=truth.device) == index
    said, hit = torch.where(is_own, lost[:, -2:-1], said), torch.where(is_own, lost[:, -1:], hit)
    return _foreground_mean(hit, said, truth.sum(0))


def _moved(logits: Tensor, own: Tensor, index: int, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Mass and hits of the classes where one class takes no cell, (2 * classes,), and what it takes from them.

    logits: (cells, classes), of which the column `index` is not looked at. own: (cells, tries), what stands there.
    What it takes: (tries, 2 * classes + 2), mass and hits of the others, then the mass and the hits it has there.
    """
    classes = truth.shape[1]
    others = logits.clone()
    others[:, index] = -torch.inf
    highest, other = others.max(1, keepdim=True)
    won = ((own > highest) | ((own == highest) & (index < other))).to(truth.dtype)  # the lowest of equals
    of_other = (other == torch.arange(classes, device=truth.device)).to(truth.dtype)  # (cells, classes)
    mass = truth.sum(1, keepdim=True)
    parts = torch.cat([of_other * mass, of_other * truth, mass, truth[:, index, None]], 1)
    return parts[:, : 2 * classes].sum(0), won.T @ parts


def foreground_iou(logits: Tensor, truth: Tensor) -> Tensor:
    """Mean IoU of the classes but the background that validation holds, a scalar; 0 where it holds none.

    logits: (cells, classes). truth: (cells, classes), shares, which count as parts of a pixel.
    """
    said = (logits.argmax(1, keepdim=True) == torch.arange(logits.shape[1], device=logits.device)).to(truth.dtype)
    confusion = said.T @ truth  # (said, true)
    return _foreground_mean(confusion.diagonal(), confusion.sum(1), confusion.sum(0))


def _foreground_mean(hit: Tensor, said: Tensor, true: Tensor) -> Tensor:
    """Mean IoU over the foreground classes that are there. hit, said: (…, classes). true: (classes,)."""
    scores = hit / (true + said - hit).clamp(min=1e-12)
    present = true > 0
    present[0] = False
    return (scores * present).sum(-1) / present.sum().clamp(min=1)


def _summed(x: Tensor, grid: Sequence[int]) -> Tensor:
    """Sums of x over the cells that make up each cell of a coarser grid: (batch, channels, rows, columns)."""
    if tuple(x.shape[2:]) == tuple(grid):
        return x
    rows, columns = x.shape[2] // grid[0], x.shape[3] // grid[1]
    return x.unflatten(3, (grid[1], columns)).unflatten(2, (grid[0], rows)).sum((3, 5))
