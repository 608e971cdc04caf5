"""A bank of linear heads: many trials over the same batches as one computation."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from featprobe.errors import ShapeError
from featprobe.levels import Features
from featprobe.probes.linear import LinearHead, fold, sum_of_levels
from featprobe.probes.losses import level_loss

LARGEST_SUM = (
    1e26  # of exp() of a cell's logits; beyond it float32 could overflow, so the largest logit is subtracted first
)


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
        folded, shift = [self._against_first(w) for w in folded], self._against_first(shift)
        return _FusedLoss.apply(len(self.heads), grids, shares, shift, maps, *folded)

    def _against_first(self, x: Tensor) -> Tensor:
        """(heads * classes, …) as differences to each head's first class, (heads * (classes - 1), …)."""
        by_head = x.unflatten(0, (len(self.heads), -1))
        return (by_head[:, 1:] - by_head[:, :1]).flatten(0, 1)


class _FusedLoss(torch.autograd.Function):
    """Cross-entropy of a bank's logits against class shares, with its gradient, image by image.

    On CPUs what costs is not the products but what stands between them: logits of many heads do not fit the caches,
    and upsampling them in the channels-first order is slow. So an image at a time goes forward and straight back, with
    cells first and channels last, and only the small gradients of the folded weights are kept. Softmax sees nothing but
    differences of logits, so those of the first class are taken as zero and never computed.
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
        """shares: (batch, classes, rows, columns), weighted. shift, weights: less the first class. Returns (heads,)."""
        outputs, classes = len(shift), shares.shape[1] - 1
        total = shares.sum().clamp(min=1e-12)
        gradients = [torch.zeros_like(weight) for weight in weights]
        of_shift = torch.zeros_like(shift)
        losses = shares.new_zeros(heads)
        step = min(len(shares), torch.get_num_threads())  # upsampling keeps one thread busy per image
        room = [shares.new_empty(step, *grids[0], outputs).permute(0, 3, 1, 2) for _ in range(2)]
        logits_room = shares.new_empty(step, outputs, grids[0][0] * grids[0][1])
        for start in range(0, len(shares), step):
            every = shares[start : start + step].flatten(2)  # (images, 1 + classes, cells)
            p, mass, images = every[:, 1:], every.sum(1), len(every)
            part = [x[start : start + step] for x in maps]
            logits, added, scratch = logits_room[:images], room[0][:images], room[1][:images]
            start_from = shift[:, None].expand(images, -1, 1)
            for index, (x, weight, grid) in enumerate(zip(part[1:], weights[1:], grids[1:], strict=True)):
                coarse = torch.bmm(weight.expand(images, -1, -1), x).unflatten(2, grid)
                if not index:
                    coarse += shift[:, None, None]  # upsampled, a constant stays what it is
                _upsample(coarse.contiguous(memory_format=torch.channels_last), scratch if index else added)
                if index:
                    added += scratch
                start_from = added.flatten(2)
            torch.baddbmm(start_from, weights[0].expand(images, -1, -1), part[0], out=logits)
            by_head = logits.view(images, heads, classes, -1)
            products = torch.bmm(logits, p.transpose(1, 2)).sum(0).view(heads, classes, classes)
            first: Tensor | float = 1.0  # exp of the first class's logit
            q = by_head.exp_()
            sums = q.sum(2) + first  # (images, heads, cells)
            if not float(sums.amax()) < LARGEST_SUM:
                torch.baddbmm(start_from, weights[0].expand(images, -1, -1), part[0], out=logits)
                peak = by_head.amax(2).clamp(min=0)  # (images, heads, cells)
                losses += (peak * mass[:, None]).sum((0, 2))
                by_head -= peak[:, :, None]
                q, first = by_head.exp_(), peak.neg_().exp_()
                sums = q.sum(2) + first
            losses += (sums.log() * mass[:, None]).sum((0, 2)) - products.diagonal(dim1=1, dim2=2).sum(1)
            ratio = (mass[:, None] / sums)[:, :, None]
            torch.addcmul(p.neg()[:, None], q, ratio, out=q)  # the gradient of the logits, but for the common divisor
            gradients[0] += torch.bmm(logits, part[0].transpose(1, 2)).sum(0)
            if len(maps) > 1:
                scratch.copy_(logits.unflatten(2, grids[0]))
            own = logits
            for x, gradient, grid in zip(part[1:], gradients[1:], grids[1:], strict=True):
                own = _upsample_adjoint(scratch, grid).flatten(2)
                gradient += torch.bmm(own, x.transpose(1, 2)).sum(0)
            of_shift += own.sum((0, 2))  # upsampling spreads a gradient and loses none, so the coarsest grid has it all
        ctx.save_for_backward(of_shift / total, *(gradient / total for gradient in gradients))
        return losses / total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        """upstream: (heads,)."""
        of_shift, *gradients = ctx.saved_tensors
        each = upstream[0].repeat_interleave(len(of_shift) // len(upstream[0]))
        return None, None, None, of_shift * each, None, *(gradient * each[:, None] for gradient in gradients)


def _upsample(x: Tensor, out: Tensor) -> None:
    """Bilinear upsampling of (images, channels, rows, columns) to the grid of `out`, both channels last in memory."""
    if x.shape == out.shape:
        out.copy_(x)
    else:
        torch.ops.aten.upsample_bilinear2d.out(x, list(out.shape[2:]), False, None, None, out=out)


def _upsample_adjoint(gradient: Tensor, grid: tuple[int, int]) -> Tensor:
    """What upsampling makes of a gradient: (images, channels, rows, columns) of the coarse grid."""
    size = list(gradient.shape[2:])
    if tuple(size) == tuple(grid):
        return gradient
    return torch.ops.aten.upsample_bilinear2d_backward(gradient, size, [*gradient.shape[:2], *grid], False)
