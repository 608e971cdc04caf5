"""The linear head: BatchNorm and a 1x1 convolution per level, summed at the finest level's grid."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from featprobe.features import Features
from featprobe.levels import FeatureLevel
from featprobe.processes import summed

MOMENTUM, EPSILON = 0.1, 1e-5  # of BatchNorm, as in torch.nn.BatchNorm2d


class LevelNorm(nn.Module):
    """BatchNorm of one level, as a scale and a shift for a convolution to take in.

    Its arithmetic is torch.nn.BatchNorm2d's, but padding takes no part in the statistics, and the
    normalised map is never written down: `forward` gives what folds into the weights that follow.
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
    """Mean and biased variance per channel, float64 where the device has it, and the number of cells they stand on.

    x: (batch, channels, cells), float32. share: (batch, cells), weights in [0, 1], or None for ones.

    Sums over cells are taken in x's own format in one pass each, then joined in float64: twice as fast
    as torch.var_mean on CPUs, and exact to far below the rounding of fp16 features. Of several processes all get the
    moments of the whole batch.
    """
    wide = torch.float32 if x.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    if share is None:
        count = torch.tensor(x.shape[0] * x.shape[2], dtype=wide, device=x.device)
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


def over_padding(logits: Tensor, content: Tensor | None, stride: int) -> Tensor:
    """Logits whose cells of nothing but padding repeat the nearest cell that holds some image.

    Else bilinear upsampling would mix padding into the image's last cells. logits: (batch, classes, rows,
    columns). content: (batch, 2), see Features; with None they are returned as they are.
    """
    if content is None:
        return logits
    for axis, cells in enumerate(logits.shape[2:]):
        last = (content[:, axis].long() - 1) // stride  # (batch,)
        index = torch.arange(cells, device=logits.device).minimum(last[:, None])  # (batch, cells)
        shape = (-1, 1, cells, 1) if axis == 0 else (-1, 1, 1, cells)
        logits = logits.gather(axis + 2, index.view(shape).expand_as(logits))
    return logits


class LinearHead(nn.Module):
    """Per-pixel class logits from a linear map of all levels.

    Equal to upsampling every level to the finest, concatenating them and convolving 1x1, since a 1x1
    convolution and bilinear upsampling commute; but each level is convolved at its own resolution. The
    normalisation is folded into the weights, so a level is read twice and never copied.

    levels: what it takes, finest first. classes: number of classes, the background counted.
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
        """Frame pixels per cell of the logits."""
        return self.levels[0].stride

    def forward(self, features: Features) -> Tensor:
        """Logits at the finest level's grid: (batch, classes, height / stride, width / stride)."""
        maps, weights, shift = fold([self], features)
        return sum_of_levels(maps, weights, features, self.levels) + shift[:, None, None]


def fold(heads: Sequence[LinearHead], features: Features) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Normalisation folded into the convolutions of heads of the same levels and classes, stacked.

    The first head's statistics serve them all. Returns each level's map, (batch, channels, cells), in the heads' number
    format; each level's weights, (heads * classes, channels); and what is added to the logits once, (heads * classes,).
    """
    first = heads[0]
    maps, weights, shift = [], [], torch.cat([head.bias for head in heads])
    for level in first.levels:
        x = features.maps[level.name].to(first.bias.dtype).flatten(2)
        share = features.valid_share(level.stride)
        norms: list[LevelNorm] = [head.norms[level.name] for head in heads]  # type: ignore[misc]
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
        own = torch.bmm(weight.expand(len(x), -1, -1), x).unflatten(2, level.cells(features.frame))
        own = over_padding(own, features.content, level.stride)
        if own.shape[2:] != grid:
            own = interpolate(own, grid, mode="bilinear", align_corners=False)
        total = own if total is None else total + own
    assert total is not None  # a head has at least one level
    return total
