"""A bank of linear heads: many trials over the same batches as one computation."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from featprobe.errors import ShapeError
from featprobe.levels import Features
from featprobe.probes.linear import LinearHead, fold, sum_of_levels
from featprobe.probes.losses import level_loss

LARGEST_LOGIT = 60.0  # beyond it exp() of float32 could overflow, so the largest of each cell is subtracted first


class LinearBank:
    """Linear heads of the same levels and classes, each with parameters of its own, and one set of statistics.

    All heads see the same batches, so the running statistics of their first normalisation are the same tensors.
    """

    def __init__(self, heads: Sequence[LinearHead]) -> None:
        self.heads = tuple(heads)
        first = self.heads[0]
        if any(head.levels != first.levels or head.classes != first.classes for head in self.heads):
            raise ShapeError("The heads of a bank take the same levels and classes.")
        for head in self.heads[1:]:
            for name, norm in head.norms.items():
                norm.running_mean = first.norms[name].running_mean
                norm.running_var = first.norms[name].running_var

    def logits(self, features: Features) -> Tensor:
        """Logits of every head: (heads, batch, classes, height / stride, width / stride)."""
        maps, weights, shift = fold(self.heads, features)
        logits = sum_of_levels(maps, weights, features, self.heads[0].levels) + shift[:, None, None]
        return logits.unflatten(1, (len(self.heads), -1)).transpose(0, 1)

    def loss(self, features: Features, shares: Tensor, weights: Tensor | None = None) -> Tensor:
        """level_loss of every head, (heads,). shares, weights: as level_loss takes them.

        Gradients reach the heads' parameters, not the features: those of a bank are frozen.
        """
        levels = self.heads[0].levels
        if any(features.maps[level.name].requires_grad for level in levels):
            raise ShapeError("A bank trains on frozen features. Train heads one by one on a live backbone.")
        if features.content is not None or shares.device.type != "cpu":
            return torch.stack([level_loss(logits, shares, weights) for logits in self.logits(features)])
        maps, folded, shift = fold(self.heads, features)
        if weights is not None:
            shares = shares * weights[:, None, None]
        grids = [level.cells(features.frame) for level in levels]
        return _FusedLoss.apply(len(self.heads), grids, shares, shift, maps, *folded)


class _FusedLoss(torch.autograd.Function):
    """Cross-entropy of a bank's logits against class shares, with its gradient, image by image.

    On CPUs what costs is not the products but what stands between them: logits of many heads do not fit the caches,
    and upsampling them in the channels-first order is slow. So an image at a time goes forward and straight back, with
    cells first and channels last, and only the small gradients of the folded weights are kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        heads: int,
        grids: Sequence[tuple[int, int]],
        shares: Tensor,
        shift: Tensor,
        maps: Sequence[Tensor],
        *weights: Tensor,
    ) -> Tensor:
        """shares: (batch, classes, rows, columns), weighted. Returns (heads,)."""
        outputs, classes = len(shift), shares.shape[1]
        total = shares.sum().clamp(min=1e-12)
        gradients = [torch.zeros_like(weight) for weight in weights]
        of_shift = torch.zeros_like(shift)
        losses = shares.new_zeros(heads)
        logits = shares.new_empty(outputs, grids[0][0] * grids[0][1])
        cells_first = shares.new_empty(logits.shape[1], outputs)
        for image, own in enumerate(shares):
            p = own.flatten(1)  # (classes, cells)
            mass = p.sum(0)  # (cells,)
            torch.addmm(shift[:, None], weights[0], maps[0][image], out=logits)
            added = None
            for x, weight, grid in zip(maps[1:], weights[1:], grids[1:], strict=True):
                coarse = _as_image((weight @ x[image]).t().contiguous(), grid)
                if grid != grids[0]:
                    coarse = interpolate(coarse, grids[0], mode="bilinear", align_corners=False)
                added = coarse if added is None else added.add_(coarse)
            if added is not None:
                logits += _as_cells(added).t()
            by_head = logits.view(heads, classes, -1)
            low, high = torch.aminmax(logits)
            if not float(torch.maximum(-low, high)) < LARGEST_LOGIT:
                by_head -= by_head.amax(1, keepdim=True)
            matched = (logits @ p.t()).view(heads, classes, classes).diagonal(dim1=1, dim2=2).sum(1)
            q = by_head.exp_()
            sums = q.sum(1)  # (heads, cells)
            losses += sums.log() @ mass - matched
            q *= (mass / sums)[:, None]
            q -= p  # the gradient of the logits, but for the common divisor
            of_shift += logits.sum(1)
            gradients[0].addmm_(logits, maps[0][image].t())
            if len(maps) > 1:
                upstream = _as_image(cells_first.copy_(logits.t()), grids[0])
            for x, gradient, grid in zip(maps[1:], gradients[1:], grids[1:], strict=True):
                own_upstream = upstream
                if grid != grids[0]:
                    size = [1, outputs, *grid]
                    own_upstream = torch.ops.aten.upsample_bilinear2d_backward(upstream, list(grids[0]), size, False)
                gradient.addmm_(_as_cells(own_upstream).t(), x[image].t())
        ctx.save_for_backward(of_shift / total, *(gradient / total for gradient in gradients))
        return losses / total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        """upstream: (heads,)."""
        of_shift, *gradients = ctx.saved_tensors
        each = upstream[0].repeat_interleave(len(of_shift) // len(upstream[0]))
        return None, None, None, of_shift * each, None, *(gradient * each[:, None] for gradient in gradients)


def _as_image(cells: Tensor, grid: tuple[int, int]) -> Tensor:
    """(cells, channels) as (1, channels, rows, columns), channels last in memory."""
    return cells.view(1, *grid, -1).permute(0, 3, 1, 2)


def _as_cells(image: Tensor) -> Tensor:
    """(1, channels, rows, columns) as (cells, channels)."""
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])
