"""A bank of linear heads: many trials over the same batches as one computation."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from featprobe.errors import ShapeError
from featprobe.features import Features
from featprobe.probes import execution
from featprobe.probes.head import DenseHead
from featprobe.probes.linear import LinearHead, fold, logits_of
from featprobe.probes.losses import image_losses, level_loss, level_losses
from featprobe.processes import summed

LANES = 16  # a product's outputs come in multiples of these
LARGEST_SUM = (
    1e26  # of exp() of a cell's logits; beyond it float32 could overflow, so the largest logit is subtracted first
)


class LinearBank:
    """Linear heads of the same levels and classes, each with its own parameters, and with common statistics.

    All heads see the same batches, so the running statistics of their normalisation are the same tensors.
    """

    def __init__(self, heads: Sequence[LinearHead]) -> None:
        self.heads = tuple(heads)
        first = self.heads[0]
        if any(head.levels != first.levels or head.classes != first.classes for head in self.heads):
            raise ShapeError("The heads of a bank must have the same levels and classes.")
        for head in self.heads[1:]:
            for name, norm in head.norms.items():
                norm.running_mean = first.norms[name].running_mean
                norm.running_var = first.norms[name].running_var

    def logits(self, features: Features) -> Tensor:
        """The logits of every head: (heads, batch, classes, height / stride, width / stride)."""
        return self._logits(features).transpose(0, 1)

    def _logits(self, features: Features) -> Tensor:
        """(batch, heads, classes, rows, columns)."""
        return logits_of(self.heads, features).unflatten(1, (len(self.heads), -1))

    def image_loss(self, features: Features, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """image_loss of every head, (heads,). labels, weights: as image_loss takes them."""
        return image_losses(self._logits(features), labels, weights)

    def loss(self, features: Features, shares: Tensor, weights: Tensor | None = None) -> Tensor:
        """level_loss of every head, (heads,). shares, weights: as level_loss takes them.

        On a CPU gradients reach the heads' parameters, not the features: those of several heads are frozen.
        """
        if execution.whole_batches(shares.device):
            return level_losses(self._logits(features), shares, weights)
        levels = self.heads[0].levels
        if any(features.maps[level.name].requires_grad for level in levels):
            raise ShapeError("A bank trains on frozen features. Train heads one by one on a live backbone.")
        if features.content is not None:
            return torch.stack([level_loss(logits, shares, weights) for logits in self.logits(features)])
        maps, folded, shift = fold(self.heads, features)
        if weights is not None:
            shares = shares * weights[:, None, None]
        grids = [level.cells(features.frame) for level in levels]
        folded, shift = [self._arranged(w) for w in folded], self._arranged(shift)
        return _FusedLoss.apply(len(self.heads), grids, shares, shift, maps, *folded)

    def _arranged(self, x: Tensor) -> Tensor:
        """(heads * classes, …) as differences to each head's first class, ((classes - 1) * heads + padding, …)."""
        by_class = x.unflatten(0, (len(self.heads), -1)).transpose(0, 1)
        differences = (by_class[1:] - by_class[:1]).flatten(0, 1)
        return torch.cat([differences, x.new_zeros(-len(differences) % LANES, *x.shape[1:])])


def all_linear(heads: Sequence[DenseHead]) -> list[LinearHead]:
    """The heads, if all are exactly LinearHead, so that they can be computed together; else []."""
    found = [head for head in heads if type(head) is LinearHead]  # a subclass may compute something else
    return found if len(found) == len(heads) else []


def every_logits(heads: Sequence[DenseHead], features: Features) -> Tensor:
    """Logits of heads of one stride: (images, heads, classes, rows, columns).

    Linear heads that share their statistics are computed together.
    """
    linear = all_linear(heads)
    means = {id(norm.running_mean) for head in linear for norm in head.level_norms}
    if linear and len(means) == len(linear[0].levels):
        return logits_of(linear, features).unflatten(1, (len(heads), -1))
    if len(heads) == 1:
        return heads[0](features)[:, None]
    return torch.stack([head(features) for head in heads], 1)


class _FusedLoss(torch.autograd.Function):
    """Cross-entropy of a bank's logits against class shares, with its gradient, a few images at a time.

    On CPUs what costs is not the products but what stands between them: logits of many heads do not fit the caches, and
    upsampling them in the channels-first order is slow. So as many images as threads go forward and straight back, with
    channels last from the first product to the last, and only the small gradients of the folded weights are kept.
    Softmax sees nothing but differences of logits, so those of the first class are taken as zero and never computed.
    Heads stand side by side within a class, and outputs of zero fill up the last vector: some products of a few outputs
    are many times slower than those of full vectors.
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
        """shares: (batch, classes, rows, columns), weighted. shift, weights: as arranged. Returns (heads,)."""
        classes = shares.shape[1] - 1
        total = summed(shares.sum()).clamp(min=1e-12)
        gradients = [torch.zeros_like(weight) for weight in weights]
        of_shift = torch.zeros_like(shift)
        losses = shares.new_zeros(heads)
        step = min(len(shares), torch.get_num_threads())  # upsampling keeps one thread busy per image
        room = [shares.new_empty(step, *grids[0], len(shift)) for _ in range(2)]
        for start in range(0, len(shares), step):
            every = shares[start : start + step].flatten(2)  # (images, 1 + classes, cells)
            p, mass = every[:, 1:], every.sum(1)[:, :, None]
            part = [x[start : start + step].transpose(1, 2) for x in maps]  # (images, cells, channels)
            logits, scratch = (own[: len(every)] for own in room)
            _sum_of_levels(part, weights, shift, grids, logits, scratch)
            q = logits.flatten(1, 2)  # (images, cells, outputs)
            by_class = q[:, :, : classes * heads].unflatten(2, (classes, heads))
            products = torch.bmm(p, q).sum(0)[:, : classes * heads].view(classes, classes, heads)
            first: Tensor | float = 1.0  # exp of the first class's logit
            q.exp_()
            sums = by_class.sum(2) + first  # (images, cells, heads)
            if not float(sums.amax()) < LARGEST_SUM:
                _sum_of_levels(part, weights, shift, grids, logits, scratch)
                peak = by_class.amax(2).clamp(min=0)  # (images, cells, heads)
                losses += (peak * mass).sum((0, 1))
                by_class -= peak[:, :, None]
                q.exp_()
                first = peak.neg_().exp_()
                sums = by_class.sum(2) + first
            losses += (sums.log() * mass).sum((0, 1)) - products.diagonal().sum(1)
            ratio = (mass / sums)[:, :, None]
            target = p.transpose(1, 2)[..., None]  # (images, cells, classes, 1)
            torch.addcmul(-target, by_class, ratio, out=by_class)  # gradient of the logits, but for the divisor
            gradients[0] += torch.bmm(q.transpose(1, 2), part[0]).sum(0)
            own = q
            for x, gradient, grid in zip(part[1:], gradients[1:], grids[1:], strict=True):
                own = _upsample_adjoint(logits, grid).flatten(1, 2)
                gradient += torch.bmm(own.transpose(1, 2), x).sum(0)
            of_shift += own.sum((0, 1))  # upsampling spreads a gradient and loses none, so the coarsest grid has it all
        ctx.save_for_backward(of_shift / total, *(gradient / total for gradient in gradients))
        return losses / total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        """upstream: (heads,)."""
        of_shift, *gradients = ctx.saved_tensors
        each = upstream[0].repeat(-(-len(of_shift) // len(upstream[0])))[: len(of_shift)]
        return None, None, None, of_shift * each, None, *(gradient * each[:, None] for gradient in gradients)


def _sum_of_levels(
    maps: Sequence[Tensor],
    weights: Sequence[Tensor],
    shift: Tensor,
    grids: Sequence[tuple[int, int]],
    out: Tensor,
    scratch: Tensor,
) -> Tensor:
    """Logits at the finest grid, into `out`: (images, rows, columns, outputs). maps: (images, cells, channels)."""
    for index, (x, weight, grid) in enumerate(zip(maps[1:], weights[1:], grids[1:], strict=True)):
        coarse = torch.bmm(x, weight.T.expand(len(x), -1, -1)).unflatten(1, grid)
        if not index:
            coarse += shift  # upsampled, a constant stays what it is
        _upsample(coarse, scratch if index else out)
        if index:
            out += scratch
    cells = out.flatten(1, 2)
    if len(maps) == 1:
        cells.copy_(shift.expand_as(cells))
    cells.baddbmm_(maps[0], weights[0].T.expand(len(out), -1, -1))
    return out


def _upsample(x: Tensor, out: Tensor) -> None:
    """Bilinear upsampling of (images, rows, columns, channels) to the grid of `out`."""
    if x.shape == out.shape:
        out.copy_(x)
    else:
        first = out.permute(0, 3, 1, 2)
        torch.ops.aten.upsample_bilinear2d.out(
            x.permute(0, 3, 1, 2), list(out.shape[1:3]), False, None, None, out=first
        )


def _upsample_adjoint(gradient: Tensor, grid: tuple[int, int]) -> Tensor:
    """The gradient before upsampling, from the one after it: (images, rows, columns, channels) of the coarse grid."""
    size = list(gradient.shape[1:3])
    if tuple(size) == tuple(grid):
        return gradient
    shape = [len(gradient), gradient.shape[3], *grid]
    own = torch.ops.aten.upsample_bilinear2d_backward(gradient.permute(0, 3, 1, 2), size, shape, False)
    return own.permute(0, 2, 3, 1)
