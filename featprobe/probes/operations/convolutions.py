"""3x3 convolutions of trained heads: what torch computes, with gradients that suit a CPU.

oneDNN computes the gradient of a convolution's weights at half the speed of a product of matrices, and that of a
transposed convolution's likewise. Here these gradients are products, of one image's neighbourhoods at a time, or fewer
products where a machine gains by them (`winograd`). All maps are channels last in memory.
"""

import itertools
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d, pad

from featprobe.probes import execution
from featprobe.probes.operations import winograd

CELLS = 256  # of an image, whose neighbourhoods lie in memory at a time


def convolved(x: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    """torch's conv2d with a kernel of 3x3 and a padding of 1.

    x: (batch, channels, rows, columns). weight: (outputs, channels / groups, 3, 3).
    """
    if execution.whole_batches(x.device) or not torch.is_grad_enabled():
        return conv2d(x, weight, padding=1, groups=groups)
    return cast(Tensor, _Convolution.apply(x, weight, groups))


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(x, weight)
        ctx.groups = groups
        return conv2d(x, weight.contiguous(memory_format=torch.channels_last), padding=1, groups=groups)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = upstream[0].contiguous(memory_format=torch.channels_last)
        of_x = input_gradient(x, weight, gradient, ctx.groups) if ctx.needs_input_grad[0] else None
        of_weight = weight_gradient(x, gradient, ctx.groups) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, None


def input_gradient(x: Tensor, weight: Tensor, gradient: Tensor, groups: int) -> Tensor:
    """The gradient of a 3x3 convolution's input, which is x. gradient: of its output."""
    given = (gradient, x, weight, None, (1, 1), (1, 1), (1, 1), False, (0, 0), groups, (True, False, False))
    return cast(Tensor, torch.ops.aten.convolution_backward(*given)[0])


def weight_gradient(x: Tensor, gradient: Tensor, groups: int = 1) -> Tensor:
    """The gradient of a 3x3 convolution's weights: (outputs, channels / groups, 3, 3).

    x: (batch, channels, rows, columns), its input. gradient: (batch, outputs, rows, columns), of its output.
    """
    if winograd.suits():
        return winograd.weight_gradient(x, gradient, groups)
    if groups > 1:
        pairs = zip(x.chunk(groups, 1), gradient.chunk(groups, 1), strict=True)
        return torch.cat([weight_gradient(*pair) for pair in pairs])
    if x.shape[1] <= gradient.shape[1]:
        return _correlated(x, gradient).permute(3, 2, 0, 1)
    return _correlated(gradient, x).flip(0, 1).permute(2, 3, 0, 1)


def _correlated(x: Tensor, other: Tensor) -> Tensor:
    """Sums of products of the values of each cell's neighbours with those of the other map at that cell.

    Returns (3, 3, channels of x, channels of the other).
    """
    found = x.new_zeros(9 * x.shape[1], other.shape[1])
    for image, rows in zip(x.permute(0, 2, 3, 1), other.permute(0, 2, 3, 1), strict=True):
        for part, near in _neighbourhoods(image):
            found.addmm_(near.T, rows[part].flatten(0, 1))
    return found.unflatten(0, (3, 3, -1))


def _neighbourhoods(image: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows, the 3x3 neighbours of their cells) of an image, which is (rows, columns, channels).

    Neighbours are (cells, 9 * channels), with 0 outside of the image, in memory that the next ones overwrite.
    """
    height, width, channels = image.shape
    step = max(1, CELLS // width)
    wide = pad(image, (0, 0, 1, 1, 1, 1)).contiguous()
    windows = wide.unfold(0, 3, 1).unfold(1, 3, 1).permute(0, 1, 3, 4, 2)  # (rows, columns, 3, 3, channels)
    memory = image.new_empty(min(step, height), width, 3, 3, channels)
    for start in range(0, height, step):
        part = slice(start, min(start + step, height))
        yield part, memory[: part.stop - start].copy_(windows[part]).view(-1, 9 * channels)


def few_outputs(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """A 3x3 convolution with a padding of 1 and few outputs.

    Cells go through the nine products of the kernel, whose results are moved and summed: they are few. x: (images,
    channels, rows, columns), channels last in memory. weight: (outputs, channels, 3, 3). out: filled, (images, outputs,
    rows * columns).
    """
    height, width = x.shape[2:]
    wide = x.new_zeros(len(weight), height + 2, width + 2)
    taps = weight.permute(2, 3, 0, 1).flatten(0, 2)  # (9 * outputs, channels)
    for image, own in zip(x.permute(0, 2, 3, 1).flatten(1, 2), out, strict=True):
        wide.zero_()
        near = torch.mm(taps, image.T).view(3, 3, -1, height, width)
        for row, column in itertools.product(range(3), range(3)):
            at = wide[:, 2 - row : 2 - row + height, 2 - column : 2 - column + width]
            at.add_(near[row, column])
        own.view(-1, height, width).copy_(wide[:, 1:-1, 1:-1])


def few_outputs_backward(x: Tensor, weight: Tensor, above: Tensor, of_x: Tensor) -> Tensor:
    """The gradient of such a convolution's weights; of_x, which is like x, is filled with that of its input.

    above: (images, outputs, rows * columns).
    """
    height, width = x.shape[2:]
    taps = weight.flip(2, 3).permute(2, 3, 0, 1).flatten(0, 2)
    found = torch.zeros_like(taps)
    rows = [m.permute(0, 2, 3, 1).flatten(1, 2) for m in (x, of_x)]  # (images, cells, channels)
    for image, own, gradient in zip(*rows, above.unflatten(2, (height, width)), strict=True):
        windows = pad(gradient, (1, 1, 1, 1)).unfold(1, height, 1).unfold(2, width, 1).permute(1, 2, 0, 3, 4)
        near = windows.reshape(len(taps), -1)  # (9 * outputs, cells)
        torch.mm(near.T, taps, out=own)
        found.addmm_(near, image)
    return found.unflatten(0, (3, 3, -1)).flip(0, 1).permute(2, 3, 0, 1)


def add_upsampled_and_convolved(total: Tensor, x: Tensor, weight: Tensor, times: int) -> Tensor:
    """Add x, with each cell repeated along both axes and under a 3x3 convolution with a padding of 1, to a total.

    total: (batch, outputs, times * rows, times * columns), channels last in memory; changed, and returned. x: (batch,
    channels, rows, columns). weight: (outputs, channels, 3, 3). times: of each cell along an axis, at least 2.
    """
    return cast(Tensor, _UpsampledConvolution.apply(total, x, weight, times))


class _UpsampledConvolution(torch.autograd.Function):
    """Cells go through the nine products of the kernel before they are repeated; back, sums of them do.

    Image by image: what is added lies in memory that the next image uses again.
    """

    @staticmethod
    def forward(ctx: Any, total: Tensor, x: Tensor, weight: Tensor, times: int) -> Tensor:
        cells = x.permute(0, 2, 3, 1).contiguous()  # (batch, rows, columns, channels)
        ctx.save_for_backward(cells, weight)
        ctx.times = times
        ctx.mark_dirty(total)
        if times == 2:  # torch's needs 16 products of a cell, but fewer passes over memory
            kernel = upsampling_kernel(weight, times)
            for image, own in zip(cells.permute(0, 3, 1, 2).split(1), total.split(1), strict=True):
                own.add_(conv_transpose2d(image, kernel, stride=times, padding=1))
            return total
        (height, width, channels), outputs = cells.shape[1:], len(weight)
        by_tap = weight.permute(1, 2, 3, 0).reshape(channels, -1)  # (channels, 9 * outputs)
        wide = x.new_empty(height, width, times, 3, outputs)
        found = x.new_empty(height, times, width * times, outputs)
        for image, own in zip(cells, total.permute(0, 2, 3, 1), strict=True):
            taps = (image.flatten(0, 1) @ by_tap).view(height, width, 3, 3, outputs)
            _spread(taps.movedim(3, 0), wide.movedim(2, 0), 1)
            _spread(wide.flatten(1, 2).movedim(2, 0), found.movedim(1, 0), 0)
            own.add_(found.flatten(0, 1))
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        cells, weight = ctx.saved_tensors
        (height, width, channels), outputs, times = cells.shape[1:], len(weight), ctx.times
        by_tap = weight.permute(2, 3, 0, 1).reshape(-1, channels)  # (9 * outputs, channels)
        of_x = torch.empty_like(cells) if ctx.needs_input_grad[1] else None
        of_taps = torch.zeros_like(by_tap)
        step = min(height, max(1, CELLS // width))
        rows = cells.new_empty(3, step, width * times + 2, outputs)
        taps = cells.new_empty(step, width, 3, 3, outputs)
        wide = cells.new_zeros(height * times + 2, width * times + 2, outputs)
        for i, image in enumerate(upstream[0].permute(0, 2, 3, 1)):
            wide[1:-1, 1:-1] = image
            for start in range(0, height, step):
                part = slice(start, min(start + step, height))
                count = part.stop - start
                _gather(wide, start, times, rows[:, :count], 0)
                _gather(rows[:, :count].movedim(0, 1), 0, times, taps[:count].permute(3, 0, 2, 1, 4), 2)
                sums, own = taps[:count].view(-1, 9 * outputs), cells[i, part].view(-1, channels)
                if of_x is not None:
                    torch.mm(sums, by_tap, out=of_x[i, part].view(-1, channels))
                of_taps.addmm_(sums.T, own)
        return (
            upstream[0],
            None if of_x is None else of_x.permute(0, 3, 1, 2),
            of_taps.view(3, 3, outputs, channels).permute(2, 3, 0, 1),
            None,
        )


def _spread(taps: Tensor, found: Tensor, axis: int) -> None:
    """Repeat cells along an axis, each under the three taps of a kernel, and sum what falls to one place.

    taps: (3, …), the products of cells with each tap. found: (times, …), filled: the places of one cell. axis: of
    cells, behind the first.
    """
    last = taps.shape[axis + 1] - 1
    torch.add(taps[1], taps[2], out=found[0])
    torch.add(taps[0], taps[1], out=found[-1])
    torch.add(found[-1], taps[2], out=found[1])
    found[2:-1] = found[1]
    found[0].narrow(axis, 1, last).add_(taps[0].narrow(axis, 0, last))
    found[-1].narrow(axis, 0, last).add_(taps[2].narrow(axis, 1, last))


def _gather(places: Tensor, start: int, times: int, taps: Tensor, axis: int) -> None:
    """The transpose of `_spread`, for some cells.

    places: a map, padded by 1 along this axis. start: the first of the cells. taps: (3, …), filled.
    """
    size = taps.shape[axis + 1] * times

    def of_cell(place: int) -> Tensor:  # what stands at this place of each cell, -1 and `times` being its neighbours'
        near = places.narrow(axis, start * times + 1 + place, size - times + 1)
        return near[(slice(None),) * axis + (slice(None, None, times),)]

    first, last = of_cell(0), of_cell(times - 1)
    without_last, without_first = first, last
    if times > 2:
        middle = sum((of_cell(place) for place in range(2, times - 1)), of_cell(1))
        without_last, without_first = first + middle, middle + last
    torch.add(of_cell(-1), without_last, out=taps[2])
    torch.add(without_last, last, out=taps[1])
    torch.add(without_first, of_cell(times), out=taps[0])


def upsampling_kernel(weight: Tensor, times: int) -> Tensor:
    """The weights that make a transposed convolution of this stride, padded by 1, equal upsampling and a 3x3 one.

    Upsampling repeats each cell `times` times along both axes. weight: (outputs, width, 3, 3). Returns (width, outputs,
    times + 2, times + 2), channels last in memory.

    >>> upsampling_kernel(torch.tensor([[[[1., 2., 3.], [0., 0., 0.], [0., 0., 0.]]]]), 2)[0, 0].int().tolist()
    [[0, 0, 0, 0], [0, 0, 0, 0], [3, 5, 3, 1], [3, 5, 3, 1]]
    """
    size = times + 2
    behind = torch.arange(size, device=weight.device)[:, None] - torch.arange(2, -1, -1, device=weight.device)
    along = ((behind >= 0) & (behind < times)).to(weight.dtype)  # (size, 3): which weights a row or column sums
    rows = weight.permute(1, 2, 3, 0).flatten(1, 2)  # (width, 9, outputs)
    found = torch.bmm(torch.kron(along, along).expand(len(rows), -1, -1), rows)
    return found.unflatten(1, (size, size)).permute(0, 3, 1, 2)
