"""The linear head: BatchNorm and a 1x1 convolution per level, summed at the finest level's grid."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from featprobe.features import Features
from featprobe.levels import FeatureLevel
from featprobe.probes import execution
from featprobe.probes.head import DenseHead, over_padding
from featprobe.processes import count, summed

MOMENTUM, EPSILON = 0.1, 1e-5  # of BatchNorm, as in torch.nn.BatchNorm2d


class LevelNorm(nn.Module):
    """BatchNorm of one level, as a scale and a shift that are folded into the next convolution.

    Its arithmetic is that of torch.nn.BatchNorm2d, but padding does not count in the statistics, and the
    normalised map is never stored: `forward` returns scale and shift.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor, share: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scale and shift, each (channels,), so that scale * x + shift is the normalised map.

        x: (batch, channels, cells), float32. share: (batch, cells), share of image in each cell, or None.
        """
        mean, rstd = self.statistics(x, share)
        scale = self.weight * rstd
        return scale, self.bias - mean * scale

    def statistics(self, x: Tensor, share: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and 1 / standard deviation, each (channels,): of the batch in training, else the running ones."""
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var, count = weighted_moments(x, share)
            with torch.no_grad():
                unbiased = var * (count / (count - 1).clamp(min=1))
                self.running_mean.lerp_(mean.to(self.running_mean), MOMENTUM)
                self.running_var.lerp_(unbiased.to(self.running_var), MOMENTUM)
        return mean.to(x.dtype), (var + EPSILON).rsqrt().to(x.dtype)


def weighted_moments(x: Tensor, share: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance per channel, float64 where the device has it, and the number of cells.

    x: (batch, channels, cells), float32. share: (batch, cells), weights in [0, 1], or None for ones.

    Sums over cells are computed in the format of x in one pass each, then joined in float64: twice as fast as
    torch.var_mean on CPUs, with an error far below the rounding of fp16 features. With several processes all get the
    moments of the whole batch.
    """
    wide = torch.float32 if x.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    if share is None:
        count = torch.full((), x.shape[0] * x.shape[2], dtype=wide, device=x.device)
        total = x.mean(2).to(wide).sum(0) * x.shape[2]
        squares = torch.linalg.vector_norm(x, dim=2).to(wide).square().sum(0)
    else:
        weights = share.to(x.dtype).unsqueeze(2)  # (batch, cells, 1)
        count = share.sum(dtype=wide)
        total = (x @ weights).squeeze(2).to(wide).sum(0)
        squares = (x.square() @ weights).squeeze(2).to(wide).sum(0)
    count, total, squares = summed(torch.cat([count[None], total, squares])).split([1, len(total), len(squares)])
    mean = total / count
    return mean, (squares / count - mean.square()).clamp(min=0), count


class LinearHead(DenseHead):
    """Per-pixel class logits from a linear map of all levels.

    Equal to upsampling every level to the finest, concatenating them and convolving 1x1, since a 1x1
    convolution and bilinear upsampling commute; but each level is convolved at its own resolution. The
    normalisation is folded into the weights, so a level is read twice and never copied.

    levels: its inputs, finest first. classes: the number of classes, with the background.
    """

    def __init__(self, levels: Sequence[FeatureLevel], classes: int) -> None:
        super().__init__()
        self.levels = tuple(levels)
        self.classes = classes
        self.norms = nn.ModuleDict({level.name: LevelNorm(level.channels) for level in self.levels})
        self.weights = nn.ParameterDict(
            {level.name: nn.Parameter(torch.randn(classes, level.channels) * 0.01) for level in self.levels}
        )
        self.bias = nn.Parameter(torch.zeros(classes))

    @property
    def stride(self) -> int:
        """Frame pixels per cell of the logits: the stride of the finest level."""
        return self.levels[0].stride

    @property
    def level_norms(self) -> tuple[LevelNorm, ...]:
        """The normalisation of each level, finest first."""
        return tuple(cast(LevelNorm, self.norms[level.name]) for level in self.levels)

    def forward(self, features: Features) -> Tensor:
        """Logits at the finest level's grid: (batch, classes, height / stride, width / stride)."""
        return logits_of([self], features)


def logits_of(heads: Sequence[LinearHead], features: Features) -> Tensor:
    """The logits of heads of the same levels and classes: (batch, heads * classes, rows, columns).

    All heads use the first head's statistics.
    """
    device = heads[0].bias.device
    if execution.whole_batches(device) and not torch.compiler.is_compiling():  # it keeps tensors from call to call
        with execution.full_products(device):  # it has a precision of its own
            return _logits_at_once(heads, features)
    maps, weights, shift = fold(heads, features)
    return sum_of_levels(maps, weights, features, heads[0].levels) + shift[:, None, None]


def fold(heads: Sequence[LinearHead], features: Features) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Normalisation folded into the convolutions of heads of the same levels and classes, stacked.

    The first head's statistics serve them all. Returns each level's map, (batch, channels, cells), in the heads' number
    format; each level's weights, (heads * classes, channels); and what is added to the logits once, (heads * classes,).
    """
    first = heads[0]
    maps, weights, shift = [], [], torch.cat([head.bias for head in heads])
    for level, *norms in zip(first.levels, *(head.level_norms for head in heads), strict=True):
        x = features.maps[level.name].to(first.bias.dtype).flatten(2)
        share = features.valid_share(level.stride)
        mean, rstd = norms[0].statistics(x, None if share is None else share.flatten(1))
        weight = torch.stack([head.weights[level.name] for head in heads])  # (heads, classes, channels)
        scale = torch.stack([norm.weight for norm in norms]) * rstd  # (heads, channels)
        offset = torch.stack([norm.bias for norm in norms]) - mean * scale
        maps.append(x)
        weights.append((weight * scale[:, None]).flatten(0, 1))
        shift = shift + (weight @ offset[:, :, None]).flatten()  # once for all: a constant stays what it is upsampled
    return maps, weights, shift


def sum_of_levels(
    maps: Sequence[Tensor], weights: Sequence[Tensor], features: Features, levels: Sequence[FeatureLevel]
) -> Tensor:
    """Each level convolved at its own grid, upsampled to the finest and added: (batch, outputs, rows, columns).

    maps, weights: as `fold` gives them.
    """
    grid = levels[0].cells(features.frame)
    total: Tensor | None = None
    for x, weight, level in zip(maps, weights, levels, strict=True):
        # bmm, not `@`: the latter copies the whole map to fold its batch into rows
        own = torch.bmm(weight.expand(x.shape[0], -1, -1), x).unflatten(2, level.cells(features.frame))
        own = over_padding(own, features.content, level.stride)
        if own.shape[2:] != grid:
            own = interpolate(own, grid, mode="bilinear", align_corners=False)
        total = own if total is None else total + own
    assert total is not None  # a head has at least one level
    return total


# ---- in few large operations -----------------------------------------------------------------------------------------


def _logits_at_once(heads: Sequence[LinearHead], features: Features) -> Tensor:
    """The result of `fold` and `sum_of_levels`: all levels and heads in the same operations where possible.

    Maps in half precision stay so where the device sums their products in float32 (`execution.mixed`).
    """
    first = heads[0]
    levels, dtype = first.levels, first.bias.dtype
    maps = [features.maps[level.name].flatten(2) for level in levels]
    if not _mixed(maps[0]):
        maps = [x.to(dtype) for x in maps]
    mean, rstd = level_statistics(first.level_norms, maps, levels, features, dtype)
    weights, gamma, beta, bias = _stacked(heads)
    folded = weights * (gamma * rstd)[:, None]
    if _mixed(maps[0]):
        folded = _Rounded.apply(folded, maps[0].dtype)  # here, so that the mean is taken off with the same weights
    folded = folded.flatten(0, 1)  # (heads * classes, channels)
    shift = torch.baddbmm(bias[:, :, None], weights, beta[:, :, None]).flatten()
    shift = torch.addmv(shift, folded, mean, alpha=-1)
    grids = [level.cells(features.frame) for level in levels]
    return _SumOfLevels.apply(grids, _repeated_cells(levels, features), folded, shift, *maps)


def _stacked(heads: Sequence[LinearHead]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights (heads, classes, channels), gamma and beta (heads, channels) of all levels, bias (heads, classes).

    One copy of all parameters, cut in views: so is its gradient.
    """
    levels, many, classes = heads[0].levels, len(heads), heads[0].classes
    norms = [head.level_norms for head in heads]
    own = [[head.weights[level.name] for head in heads] for level in levels]
    parts = [
        *(weight.flatten() for weights in own for weight in weights),
        *(norm.weight for of_head in norms for norm in of_head), *(norm.bias for of_head in norms for norm in of_head),
        *(head.bias for head in heads),
    ]  # fmt: skip
    channels = [level.channels for level in levels]
    every, wide = sum(channels), many * sum(channels)
    cuts = [*(many * classes * c for c in channels), wide, wide, many * classes]
    *weights, gamma, beta, bias = torch.cat(parts).split(cuts)
    joined = torch.cat([w.view(many, classes, -1) for w in weights], 2)
    return joined, gamma.view(many, every), beta.view(many, every), bias.view(many, classes)


def level_statistics(
    norms: Sequence[LevelNorm],
    maps: Sequence[Tensor],
    levels: Sequence[FeatureLevel],
    features: Features,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """LevelNorm.statistics of all levels in turn, each (channels of all levels,). maps: (batch, channels, cells)."""
    if not norms[0].training:
        mean = torch.cat([norm.running_mean for norm in norms]).to(dtype)
        return mean, (torch.cat([norm.running_var for norm in norms]).to(dtype) + EPSILON).rsqrt()
    shares = _shares(levels, features)
    wide = torch.float32 if maps[0].device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    channels = [level.channels for level in levels]
    every = sum(channels)
    if shares is None:
        totals = [x.sum(2, dtype=dtype) for x in maps]  # (batch, channels), as the squares
        squares = [torch.linalg.vector_norm(x, dim=2, dtype=dtype) for x in maps]
        joined = torch.cat([*totals, *squares], 1).to(wide)
        joined[:, every:].square_()
        cells = tuple((x.shape[1], float(x.shape[0] * x.shape[2])) for x in maps)
        number = execution.repeated(cells * 2, wide, joined.device)
    else:
        weighted = [x * share.to(dtype)[:, None] for x, share in zip(maps, shares, strict=True)]
        totals = [x.sum(2) for x in weighted]
        joined = torch.cat([*totals, *((x * own).sum(2) for x, own in zip(weighted, maps, strict=True))], 1).to(wide)
        assert features.content is not None
        per_pixel = execution.repeated(tuple((v.channels, v.stride**-2) for v in levels) * 2, wide, joined.device)
        number = per_pixel * features.content.prod(1).sum()  # cells, parts counted as parts
    sums = joined.sum(0)  # over images in float64: what the mean takes off the squares may leave little
    if count() > 1:
        number, sums = summed(torch.stack([number, sums])).unbind()
    wide_mean, wide_square = (sums / number).split(every)
    var = torch.addcmul(wide_square, wide_mean, wide_mean, value=-1).to(dtype).clamp(min=0)
    mean = wide_mean.to(dtype)
    with torch.no_grad():
        if shares is None and count() == 1:
            factor = execution.repeated(tuple((c, n / max(n - 1, 1)) for c, n in cells), dtype, mean.device)
        else:
            own = number[:every].to(dtype)
            factor = own / (own - 1).clamp(min=1)
        unbiased = var * factor
        running = [*(norm.running_mean for norm in norms), *(norm.running_var for norm in norms)]
        found = [*mean.to(running[0]).split(channels), *unbiased.to(running[0]).split(channels)]
        torch._foreach_lerp_(running, found, MOMENTUM)
    return mean, (var + EPSILON).rsqrt()


def _shares(levels: Sequence[FeatureLevel], features: Features) -> list[Tensor] | None:
    """Features.valid_share of every level, (batch, cells)."""
    if features.content is None:
        return None
    ends, along = features.content.float(), []
    for axis in (0, 1):
        cells, strides = _axis(levels, features.frame, axis, ends.device)
        along.append((ends[:, axis, None] / strides - cells).clamp(0, 1))
    return [(row[:, :, None] * column[:, None]).flatten(1) for row, column in _by_level(along, levels, features)]


def _repeated_cells(levels: Sequence[FeatureLevel], features: Features) -> list[Tensor] | None:
    """For each level the cells that `over_padding` takes logits from, (batch, cells); None without padding."""
    if features.content is None:
        return None
    ends, along = features.content.long() - 1, []  # (batch, 2), pixels
    for axis in (0, 1):
        cells, strides = _axis(levels, features.frame, axis, ends.device)
        along.append((ends[:, axis, None] // strides).minimum(cells))
    grids = tuple(level.cells(features.frame) for level in levels)
    along[0] = along[0] * execution.repeated(grids, torch.long, ends.device)  # a row begins after so many cells
    return [(row[:, :, None] + column[:, None]).flatten(1) for row, column in _by_level(along, levels, features)]


def _axis(
    levels: Sequence[FeatureLevel], frame: tuple[int, int], axis: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Index of the cells of all levels in turn along an axis: (number in its level, stride)."""
    cells = [level.cells(frame)[axis] for level in levels]
    numbers = tuple((1, number) for own in cells for number in range(own))
    strides = tuple(zip(cells, (level.stride for level in levels), strict=True))
    return execution.repeated(numbers, torch.long, device), execution.repeated(strides, torch.long, device)


def _by_level(along: Sequence[Tensor], levels: Sequence[FeatureLevel], features: Features) -> list[tuple[Tensor, ...]]:
    """Values of rows and of columns, (batch, those of all levels in turn) each, as pairs of each level."""
    grids = [level.cells(features.frame) for level in levels]
    parts = [own.split([grid[axis] for grid in grids], 1) for axis, own in enumerate(along)]
    return list(zip(*parts, strict=True))


def _mixed(x: Tensor) -> bool:
    """Whether this map stays in half precision, its products summed in float32 by the device itself."""
    return x.dtype in (torch.float16, torch.bfloat16) and execution.mixed(x.device)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """torch.bmm with sums and result in `dtype`."""
    return torch.bmm(a, b) if a.dtype == dtype else torch.bmm(a, b, out_dtype=dtype)


class _Rounded(torch.autograd.Function):
    """Values as another number format has them, whose gradient passes through as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return upstream[0], None


class _SumOfLevels(torch.autograd.Function):
    """`sum_of_levels` of a whole batch with a shift, and its gradient, in half precision where maps have it.

    The gradient of an output is divided by its largest value before its products and multiplied after them: those of a
    mean over millions of pixels would vanish in float16.
    """

    @staticmethod
    def forward(
        ctx: Any,
        grids: Sequence[tuple[int, int]],
        places: Sequence[Tensor] | None,
        weights: Tensor,
        shift: Tensor,
        *maps: Tensor,
    ) -> Tensor:
        """weights: (outputs, channels of all levels in turn). shift: (outputs,). maps: (batch, channels, cells)."""
        ctx.grids, ctx.places = grids, places
        ctx.save_for_backward(weights, *maps)
        total = shift[:, None, None]
        own_weights = weights.to(maps[0].dtype).split([x.shape[1] for x in maps], 1)
        for level, (x, weight, grid) in enumerate(zip(maps, own_weights, grids, strict=True)):
            own = _product(weight.expand(x.shape[0], -1, -1), x, weights.dtype)  # (batch, outputs, cells)
            if places is not None:
                own = own.gather(2, places[level][:, None].expand_as(own))
            own = own.unflatten(2, grid)
            if grid != grids[0]:
                own = interpolate(own, grids[0], mode="bilinear", align_corners=False)
            total = total + own
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        """upstream: (batch, outputs, rows, columns)."""
        (gradient,) = upstream
        weights, *maps = ctx.saved_tensors
        mixed, largest = _mixed(maps[0]), None
        of_shift = gradient.sum((0, 2, 3))
        if mixed:
            largest = torch.linalg.vector_norm(gradient, torch.inf, dim=(0, 2, 3)).clamp(min=1e-30)
            gradient = gradient / largest[:, None, None]
        of_weights, of_maps = [], list[Tensor | None]()
        own_weights = weights.split([x.shape[1] for x in maps], 1)
        for level, (x, weight, grid) in enumerate(zip(maps, own_weights, ctx.grids, strict=True)):
            own = gradient
            if grid != ctx.grids[0]:
                size, shape = list(ctx.grids[0]), [*gradient.shape[:2], *grid]
                own = torch.ops.aten.upsample_bilinear2d_backward(gradient, size, shape, False)
            own = own.flatten(2)
            if ctx.places is not None:
                index = ctx.places[level][:, None].expand_as(own)
                own = torch.zeros_like(own).scatter_add_(2, index, own)
            of_weights.append(_product(own.to(x.dtype), x.transpose(1, 2), weights.dtype))
            back = weight.T if largest is None else weight.T * largest  # too small for half precision
            wanted = ctx.needs_input_grad[4 + level]
            of_maps.append(torch.bmm(back.expand(x.shape[0], -1, -1), own).to(x.dtype) if wanted else None)
        joined = torch.cat(of_weights, 2).sum(0)
        if largest is not None:
            joined = joined * largest[:, None]
        return None, None, joined, of_shift, *of_maps
