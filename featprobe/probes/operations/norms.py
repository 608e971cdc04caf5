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
    if rectify and torch.is_grad_enabled() and not execution.whole_batches(x.device):
        return cast(Tensor, _RectifiedNorm.apply(x, inside, weight, bias, groups, eps))
    if inside is None:
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
    """Group norm and a ReLU on a CPU, image by image where cells of padding are left out; back always so.

    Memory is reused from image to image. torch's own gradient of maps that are channels last is slow where a group has
    few channels.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, inside: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float
    ) -> Tensor:
        """x: (batch, channels, rows, columns). inside: (batch, rows, columns), bool, or None for all."""
        x = x.to(weight.dtype).contiguous(memory_format=torch.channels_last)
        mask = mask_of(inside, x)
        if mask is None:
            found, mean, rstd = normalised(x, None, weight, bias, groups, eps)
        else:
            found = torch.empty_like(x)
            mean, rstd = x.new_empty(2, len(x), groups)
            for i in range(len(x)):
                one = slice(i, i + 1)
                _, mean[one], rstd[one] = normalised(x[one], mask[one], weight, bias, groups, eps, found[one])
        ctx.save_for_backward(x, mask, weight, mean, rstd, found)
        return found

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, weight, mean, rstd, found = ctx.saved_tensors
        of_x = torch.empty_like(x)
        above, out, x, own = (rows_of(m) for m in (upstream[0], found, x, of_x))
        sums, gradient = x.new_empty(2, len(x), x.shape[2]), x.new_empty(1, *x.shape[1:])
        for i in range(len(x)):
            one = slice(i, i + 1)
            torch.ops.aten.threshold_backward.grad_input(above[one], out[one], 0, grad_input=gradient)
            part = None if mask is None else mask[one]
            sums[:, one] = norm_backward(gradient, x[one], part, weight, mean[one], rstd[one], own[one])
        of_weight, of_bias = sums.sum(1)
        return of_x, None, of_weight, of_bias, None, None


def rows_of(x: Tensor) -> Tensor:
    """(images, channels, rows, columns) as (images, cells, channels), a view of maps that are channels last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def mask_of(inside: Tensor | None, x: Tensor) -> Tensor | None:
    """Cells inside as numbers of x's format, (images, cells, 1). inside: (images, rows, columns), bool."""
    return None if inside is None else inside.flatten(1)[:, :, None].to(x.dtype)


def normalised(
    x: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Group norm of the cells of a mask, with a ReLU, 0 in all others; mean and 1 / deviation, (images, groups).

    x: (images, channels, rows, columns), channels last. mask: see `mask_of`, None for all. out: where the map of a mask
    is written. The variance is the mean square less the squared mean, as in torch's own kernel for channels last.
    """
    if mask is None:
        images, channels, cells = x.flatten(2).shape
        found, mean, rstd = torch.native_group_norm(x, weight, bias, images, channels, cells, groups, eps)
        return found.relu_(), mean, rstd
    rows, out = rows_of(x), torch.empty_like(x) if out is None else out
    memory = torch.mul(rows, mask, out=rows_of(out))
    sums = [memory.sum(1), memory.mul_(rows).sum(1)]  # (images, channels)
    mean, square = torch.stack(sums).unflatten(2, (groups, -1)).sum(3) * share_of(mask, rows, groups)
    rstd = (square - mean.square()).clamp_(min=0).add_(eps).rsqrt_()
    return rescaled(x, mask, weight, bias, mean, rstd, out), mean, rstd


def rescaled(
    x: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, out: Tensor
) -> Tensor:
    """The map of `normalised`, from its mean and deviation, written to `out`."""
    groups = (mean.shape[1], -1)
    scale = weight.view(groups) * rstd[:, :, None]  # (images, groups, channels of one)
    shift = torch.addcmul(bias.view(groups), mean[:, :, None], scale, value=-1)
    rows = rows_of(out)
    torch.addcmul(shift.flatten(1)[:, None], rows_of(x), scale.flatten(1)[:, None], out=rows).relu_()
    if mask is not None:
        rows.mul_(mask)
    return out


def share_of(mask: Tensor | None, rows: Tensor, groups: int) -> Tensor | float:
    """One over the values of a group, of all images or of each, (images, 1). rows: (images, cells, channels)."""
    if mask is None:
        return groups / rows.shape[1:].numel()
    return (mask.sum(1).clamp_(min=1) * (rows.shape[2] // groups)).reciprocal_()


def norm_backward(
    gradient: Tensor, x: Tensor, mask: Tensor | None, weight: Tensor, mean: Tensor, rstd: Tensor, of_x: Tensor
) -> Tensor:
    """The gradient of a group norm: of its weight and bias per image, (2, images, channels).

    gradient, x, of_x: (images, cells, channels); of the map, 0 outside of the mask; the norm's input; filled with its
    gradient. The others are as in `rescaled`.
    """
    groups = (mean.shape[1], -1)
    own, mean, rstd = weight.view(groups), mean[:, :, None], rstd[:, :, None]
    of_bias = gradient.sum(1).unflatten(1, groups)  # (images, groups, channels of one)
    of_product = torch.mul(gradient, x, out=of_x).sum(1).unflatten(1, groups)
    of_weight = of_product.addcmul_(mean, of_bias, value=-1).mul_(rstd)
    share = share_of(mask, x, groups[0])
    slope = (own * of_weight).sum(2) * rstd[..., 0].square() * share * -1  # (images, groups)
    level = (own * of_bias).sum(2) * rstd[..., 0] * share * -1 - slope * mean[..., 0]
    wide = [v.expand_as(of_bias).flatten(1)[:, None] for v in (own * rstd, slope[..., None], level[..., None])]
    torch.addcmul(wide[2], x, wide[1], out=of_x)
    if mask is not None:
        of_x.mul_(mask)
    of_x.addcmul_(gradient, wide[0])
    return torch.stack([of_weight.flatten(1), of_bias.flatten(1)])
