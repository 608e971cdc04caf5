"""Two towers of 3x3 convolutions over one map, on a CPU: one function with its gradient, a few images at a time.

What lies between the first convolutions and the outputs stays in memory that the next images use again, and normalised
maps, which are cheap, are computed again on the way back.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from featprobe.probes.operations.convolutions import (
    few_outputs,
    few_outputs_backward,
    input_gradient,
    weight_gradient,
)
from featprobe.probes.operations.norms import mask_of, norm_backward, normalised, rescaled, rows_of

CELLS = 4096  # of the images that go through the towers at a time


def towers(
    x: Tensor,
    inside: Tensor | None,
    places: Tensor,
    norms: Sequence[tuple[Tensor, Tensor]],
    convs: Sequence[Tensor],
    outs: tuple[Tensor, Tensor],
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Two towers side by side: steps of group norm and ReLU, 3x3 convolutions between these and after the last.

    x: (batch, channels of both, rows, columns), before the first norm. inside: (batch, rows, columns), bool, or None
    for all. places: (n,), cells, counted through the batch and in order, in which the second tower's outputs are
    wanted. norms: weight and bias of each step. convs: (channels of both, channels of one, 3, 3) each, one step fewer.
    outs: the last convolution of each, (outputs, channels of one, 3, 3). groups, eps: of the norms of both towers.
    Returns the outputs of the first in every cell, (batch, outputs, cells), and of the second, (n, outputs).
    """
    own = [*outs, *convs, *(v for norm in norms for v in norm)]
    return cast(tuple[Tensor, Tensor], _Towers.apply(x, inside, places, groups, eps, *own))


class _Towers(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, inside: Tensor | None, places: Tensor, groups: int, eps: float, *own: Tensor
    ) -> tuple[Tensor, Tensor]:
        named, placed, convs, norms = _parts(own)
        x = x.to(named.dtype).contiguous(memory_format=torch.channels_last)
        mask, cells = mask_of(inside, x), x.shape[2:].numel()
        in_all, at_places = x.new_empty(len(x), len(named), cells), x.new_empty(len(places), len(placed))
        kept: list[Tensor] = []  # of each piece and step: what is normalised, its mean, one over its deviation
        for images, wanted in _pieces(x, places):
            a = z = x[images]
            part = None if mask is None else mask[images]
            for step, norm in enumerate(norms):
                if step:
                    z = conv2d(a, convs[step - 1], padding=1, groups=2)
                a, mean, rstd = normalised(z, part, *norm, groups, eps)
                kept += [z, mean, rstd]
            few_outputs(a[:, : named.shape[1]], named, in_all[images])
            near, _, _ = _neighbours(a, places[wanted] - images.start * cells)
            torch.mm(near, _by_tap(placed), out=at_places[wanted])
        ctx.save_for_backward(x, mask, places, *own, *kept)
        ctx.weights = len(own)
        return in_all, at_places

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, places, *saved = ctx.saved_tensors
        own, kept = saved[: ctx.weights], iter(saved[ctx.weights :])
        outs, (_, _, convs, norms) = own[:2], _parts(own)
        found = [torch.zeros_like(weight) for weight in own]
        _, _, of_convs, of_norms = _parts(found)
        of_x = torch.empty_like(x)
        memory = [torch.empty_like(x[: _at_once(x)]) for _ in range(3)]
        for images, wanted in _pieces(x, places):
            part, at = None if mask is None else mask[images], places[wanted] - images.start * x.shape[2:].numel()
            states = [(next(kept), next(kept), next(kept)) for _ in norms]
            a, own_a, own_z = (m[: len(x[images])] for m in memory)
            of_z = own_z
            for step in reversed(range(len(norms))):
                (z, mean, rstd), (weight, bias) = states[step], norms[step]
                rescaled(z, part, weight, bias, mean, rstd, a)
                if step == len(convs):
                    above, of_a = (upstream[0][images], upstream[1][wanted]), own_a
                    _outputs_backward(a, at, above, outs, found[:2], of_a)
                else:
                    of_convs[step].add_(weight_gradient(a, of_z, 2))
                    of_a = input_gradient(a, convs[step], of_z, 2)
                torch.ops.aten.threshold_backward.grad_input(of_a, a, 0, grad_input=of_a)
                of_z = own_z if step else of_x[images]
                sums = norm_backward(rows_of(of_a), rows_of(z), part, weight, mean, rstd, rows_of(of_z))
                for total, one in zip(of_norms[step], sums.sum(1), strict=True):
                    total.add_(one)
        return of_x, None, None, None, None, *found


def _parts(own: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Both last convolutions, those before, weight and bias of each norm; see `towers`."""
    steps = len(own) // 3
    convs, norms = own[2 : steps + 1], own[steps + 1 :]
    return own[0], own[1], list(convs), list(zip(norms[::2], norms[1::2], strict=True))


def _at_once(x: Tensor) -> int:
    """Images of a piece."""
    return max(1, CELLS // x.shape[2:].numel())


def _pieces(x: Tensor, places: Tensor) -> Iterator[tuple[slice, slice]]:
    """(images of a piece, those of the places that lie in them)."""
    cells = x.shape[2:].numel()
    step = _at_once(x)
    counts = torch.bincount(places // (cells * step), minlength=-(-len(x) // step)).tolist()
    start = 0
    for piece, count in enumerate(counts):
        yield slice(piece * step, min((piece + 1) * step, len(x))), slice(start, start + count)
        start += count


def _neighbours(a: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The second tower's values around some cells: (n, 9 * channels of it), 0 outside of the image.

    a: (images, channels of both, rows, columns). Also where they stand, (n * 9,) in rows of one tower's channels, and
    whether they stand anywhere, (n, 9, 1).
    """
    height, width = a.shape[2:]
    near = torch.arange(-1, 2, device=a.device)
    row = (places % (height * width) // width)[:, None] + near.repeat_interleave(3)  # (n, 9)
    column = (places % width)[:, None] + near.repeat(3)
    valid = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    cell = (places // (height * width))[:, None] * (height * width) + row * width + column
    index = (2 * cell * valid + 1).flatten()
    values = _rows_of_one(a).index_select(0, index).unflatten(0, (-1, 9)) * valid[:, :, None]
    return values.flatten(1), index, valid[:, :, None]


def _rows_of_one(a: Tensor) -> Tensor:
    """Cells of both towers in turn: (images * cells * 2, channels of one), a view."""
    return rows_of(a).view(-1, a.shape[1] // 2)


def _by_tap(weight: Tensor) -> Tensor:
    """A kernel as the matrix that a cell's neighbours go through: (9 * channels, outputs)."""
    return weight.permute(2, 3, 1, 0).flatten(0, 2)


def _outputs_backward(
    a: Tensor,
    places: Tensor,
    above: tuple[Tensor, Tensor],
    outs: Sequence[Tensor],
    found: Sequence[Tensor],
    of_a: Tensor,
) -> None:
    """Fill the gradient of the last convolutions' input, `of_a`, and add that of their weights to what was found.

    a: as for `_neighbours`. above: the gradients of both outputs. outs: weights.
    """
    width = outs[0].shape[1]
    found[0].add_(few_outputs_backward(a[:, :width], outs[0], above[0], of_a[:, :width]))
    near, index, valid = _neighbours(a, places)
    found[1].add_((near.T @ above[1]).unflatten(0, (3, 3, -1)).permute(3, 2, 0, 1))
    rows_of(of_a)[..., width:] = 0
    of_near = (above[1] @ _by_tap(outs[1]).T).unflatten(1, (9, -1)) * valid
    _rows_of_one(of_a).index_add_(0, index, of_near.flatten(0, 1))
