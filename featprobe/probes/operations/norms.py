"""GroupNorm whose statistics leave padding out, alone or with a ReLU."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from featprobe.probes import execution


class PaddedGroupNorm(nn.GroupNorm):
    """GroupNorm whose statistics leave cells of padding out."""

    def forward(self, x: Tensor, inside: Tensor | None = None) -> Tensor:
        """x: (batch, channels, rows, columns). inside: (batch, rows, columns), bool, or None for all."""
        return group_norm(x, inside, self.num_groups, self.weight, self.bias, self.eps)

    def rectified(self, x: Tensor, inside: Tensor | None) -> Tensor:
        """The normalised map after a ReLU, with 0 in every cell of padding. x, inside: as for `forward`."""
        return rectified([self], x, inside)


def group_norm(
    x: Tensor, inside: Tensor | None, groups: int, weight: Tensor, bias: Tensor, eps: float, *, rectify: bool = False
) -> Tensor:
    """torch's group_norm of the cells inside, 0 in all others; with a ReLU where that is asked for."""
    if inside is None:
        if rectify and torch.is_grad_enabled() and not execution.whole_batches(x.device):
            return cast(Tensor, _RectifiedNorm.apply(x, weight, bias, groups, eps))
        # torch.nn.functional's refuses one image whose map is a single cell of as many groups as channels
        found = torch.group_norm(x, groups, weight, bias, eps)
        return found.relu_() if rectify else found
    rows = x.permute(0, 2, 3, 1).flatten(1, 2).to(weight.dtype)  # (batch, cells, channels)
    mask = inside.flatten(1)[:, :, None].to(rows.dtype)
    found = _InsideNorm.apply(rows, mask, weight, bias, groups, eps, rectify)
    return found.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


def rectified(norms: Sequence[PaddedGroupNorm], x: Tensor, inside: Tensor | None) -> Tensor:
    """Maps that lie one behind the other, each normalised by its own and through a ReLU; 0 in cells of padding.

    x: (batch, channels of all norms, rows, columns). inside: (batch, rows, columns), bool, or None for all.
    """
    weight, bias = joined([norm.weight for norm in norms]), joined([norm.bias for norm in norms])
    groups = sum(norm.num_groups for norm in norms)
    return group_norm(x, inside, groups, weight, bias, norms[0].eps, rectify=True)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Tensors one behind the other; one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class _InsideNorm(torch.autograd.Function):
    """GroupNorm over the cells that a mask names, 0 in all others, with or without a ReLU.

    Written out, since autograd would keep and pass five maps more. The variance is the mean square less the squared
    mean, as in torch's own kernel for channels last.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, rectified: bool
    ) -> Tensor:
        """x: (batch, cells, channels). mask: (batch, cells, 1), 0 or 1, of the same format."""
        own = x * mask
        sums = torch.stack([own.sum(1), (own * x).sum(1)])  # (2, batch, channels)
        share = (mask.sum((1, 2), keepdim=True).clamp(min=1) * (x.shape[2] // groups)).reciprocal()  # (batch, 1, 1)
        mean, square = sums.unflatten(2, (groups, -1)).sum(3, keepdim=True) * share  # (batch, groups, 1)
        rstd = (square - mean.square()).clamp(min=0).add(eps).rsqrt()
        scale = weight.view(groups, -1) * rstd  # (batch, groups, channels of one)
        shift = torch.addcmul(bias.view(groups, -1), mean, scale, value=-1)
        out = torch.addcmul(shift.flatten(1)[:, None], x, scale.flatten(1)[:, None])
        out = (out.relu_() if rectified else out).mul_(mask)
        ctx.save_for_backward(x, mask, weight, mean, rstd, share, out if rectified else mask)
        ctx.rectified = rectified
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, weight, mean, rstd, share, out = ctx.saved_tensors
        gradient = upstream[0] * (out > 0) if ctx.rectified else upstream[0] * mask
        groups = (mean.shape[1], -1)
        sums = torch.stack([gradient.sum(1), (gradient * x).sum(1)]).unflatten(2, groups)
        of_bias, of_product = sums  # (batch, groups, channels of one)
        of_weight = (of_product - mean * of_bias) * rstd
        own = weight.view(groups)
        slope = -(own * of_weight).sum(2, keepdim=True) * rstd.square() * share
        level = -(own * of_bias).sum(2, keepdim=True) * rstd * share - slope * mean
        wide = [v.expand_as(of_bias).flatten(1)[:, None] for v in (own * rstd, slope, level)]
        of_x = torch.addcmul(torch.addcmul(wide[2], x, wide[1]).mul_(mask), gradient, wide[0])
        return of_x, None, of_weight.sum(0).flatten(), of_bias.sum(0).flatten(), None, None, None


class _RectifiedNorm(torch.autograd.Function):
    """torch's group norm and a ReLU, with a gradient that goes image by image.

    torch's own gradient of maps that are channels last is slow where a group has few channels.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        """x: (batch, channels, rows, columns)."""
        batch, channels, cells = x.flatten(2).shape
        found, mean, rstd = torch.native_group_norm(x, weight, bias, batch, channels, cells, groups, eps)
        found.relu_()
        ctx.save_for_backward(x, weight, mean, rstd, found)
        return found

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd, found = ctx.saved_tensors
        of_x = torch.empty_like(x, memory_format=torch.channels_last)
        rows = [m.permute(0, 2, 3, 1).flatten(1, 2) for m in (upstream[0], found, x, of_x)]  # (batch, cells, channels)
        own, share = weight.view(mean.shape[1], -1), mean.shape[1] / x.shape[1:].numel()
        sums, gradient = x.new_empty(2, *x.shape[:2]), x.new_empty(rows[3].shape[1:])
        for i, (above, out, cells, of_cells) in enumerate(zip(*rows, strict=True)):
            torch.ops.aten.threshold_backward.grad_input(above, out, 0, grad_input=gradient)
            torch.sum(gradient, 0, out=sums[0, i])
            torch.sum(torch.mul(gradient, cells, out=of_cells), 0, out=sums[1, i])
            of_bias, of_product = sums[:, i].view(2, *own.shape)  # (groups, channels of one)
            of_weight = of_product.sub_(mean[i][:, None] * of_bias).mul_(rstd[i][:, None])
            slope = (own * of_weight).sum(1) * rstd[i].square() * -share
            level = (own * of_bias).sum(1) * rstd[i] * -share - slope * mean[i]
            scale, slope, level = (
                v.expand_as(own).flatten() for v in (own * rstd[i][:, None], slope[:, None], level[:, None])
            )
            torch.addcmul(level, cells, slope, out=of_cells)
            of_cells.addcmul_(gradient, scale)
        of_bias, of_weight = sums.sum(1)
        return of_x, of_weight, of_bias, None, None
