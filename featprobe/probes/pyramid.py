"""Feature pyramids of one fixed width: what every head but the linear one stands on.

All of them leave padding out: its cells are zero wherever a 3x3 convolution would look at them, as the outside of an
image is, and no normalisation counts them.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d

from featprobe.errors import ProbeError
from featprobe.features import Features
from featprobe.levels import FeatureLevel
from featprobe.probes.linear import LevelNorm

PyramidKind = Literal["auto", "levels", "simple"]
GROUPS = 16  # of GroupNorm, as many as divide the width
SIMPLE_FROM = 8  # pixels: levels of one stride at least this coarse get a simple pyramid


def cells_inside(content: Tensor | None, grid: tuple[int, int], stride: int) -> Tensor | None:
    """Which cells hold some image: (batch, rows, columns), bool; None when every image fills the frame.

    content: (batch, 2), pixels, see Features. grid: (rows, columns).
    """
    if content is None:
        return None
    row, column = (
        torch.arange(cells, device=content.device) * stride < content[:, axis, None] for axis, cells in enumerate(grid)
    )
    return row[:, :, None] & column[:, None, :]


class PaddedGroupNorm(nn.GroupNorm):
    """GroupNorm whose statistics leave cells of padding out."""

    def forward(self, x: Tensor, inside: Tensor | None = None) -> Tensor:
        """x: (batch, channels, rows, columns). inside: (batch, rows, columns), bool, or None for all."""
        if inside is None:
            return super().forward(x)
        mask = inside[:, None].to(x.dtype)
        count = inside.sum((1, 2)).clamp(min=1)[:, None] * (self.num_channels // self.num_groups)  # (batch, 1)
        mean = (x * mask).unflatten(1, (self.num_groups, -1)).sum((2, 3, 4)) / count  # (batch, groups)
        spread = mean.repeat_interleave(self.num_channels // self.num_groups, 1)[:, :, None, None]
        centred = (x - spread) * mask
        var = centred.square().unflatten(1, (self.num_groups, -1)).sum((2, 3, 4)) / count
        scale = (var + self.eps).rsqrt().repeat_interleave(self.num_channels // self.num_groups, 1)[:, :, None, None]
        return centred * scale * self.weight[:, None, None] + self.bias[:, None, None]


class ConvBlock(nn.Module):
    """3x3 convolution, GroupNorm, ReLU; cells of padding come out as 0.

    Channels last in memory: a quarter faster on CPUs, and what GPUs' half precision wants.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
        self.norm = PaddedGroupNorm(groups_of(width), width)

    def forward(self, x: Tensor, inside: Tensor | None) -> Tensor:
        """x: (batch, width, rows, columns). inside: (batch, rows, columns), bool, or None for all."""
        x = self.conv(x.contiguous(memory_format=torch.channels_last))
        return only_inside(self.norm(x, inside).relu(), inside)


def groups_of(width: int) -> int:
    """Number of groups of a GroupNorm over this many channels.

    >>> groups_of(128), groups_of(24), groups_of(7)
    (16, 12, 7)
    """
    return next(g for g in range(min(GROUPS, width), 0, -1) if width % g == 0)


def only_inside(x: Tensor, inside: Tensor | None) -> Tensor:
    """x with 0 in every cell of padding."""
    return x if inside is None else x * inside[:, None]


class Lateral(nn.Module):
    """BatchNorm of a level and a 1x1 convolution to a fixed width, folded into one product."""

    def __init__(self, level: FeatureLevel, width: int) -> None:
        super().__init__()
        self.stride = level.stride
        self.norm = LevelNorm(level.channels)
        self.weight = nn.Parameter(torch.randn(width, level.channels) * level.channels**-0.5)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, m: Tensor, features: Features) -> Tensor:
        """m: (batch, channels, rows, columns), of that level. Returns (batch, width, rows, columns)."""
        x = m.to(self.weight.dtype).flatten(2)
        share = features.valid_share(self.stride)
        scale, shift = self.norm(x, None if share is None else share.flatten(1))
        # bmm, not `@`: the latter copies the whole map to fold its batch into rows
        product = torch.bmm((self.weight * scale).expand(len(x), -1, -1), x).unflatten(2, m.shape[2:])
        return product + (self.weight @ shift + self.bias)[:, None, None]


class TopDown(nn.Module):
    """Lateral maps of every level, each with the coarser ones upsampled and added (FPN, Lin et al., 2017).

    Of levels with one stride all are added up, and stand as one. strides: of what comes out, finest first.
    """

    def __init__(self, levels: Sequence[FeatureLevel], width: int) -> None:
        super().__init__()
        self.levels = tuple(levels)
        self.strides = tuple(sorted({level.stride for level in self.levels}))
        self.laterals = nn.ModuleDict({level.name: Lateral(level, width) for level in self.levels})

    def forward(self, features: Features) -> list[tuple[Tensor, Tensor | None]]:
        """(map, cells inside) per stride, finest first: (batch, width, rows, columns), (batch, rows, columns)."""
        found: list[tuple[Tensor, Tensor | None]] = []
        above: Tensor | None = None
        for stride in reversed(self.strides):
            here = [level for level in self.levels if level.stride == stride]
            total = torch.stack([self.laterals[v.name](features.maps[v.name], features) for v in here]).sum(0)
            if above is not None:
                total = total + interpolate(above, total.shape[2:], mode="nearest")
            inside = cells_inside(features.content, (total.shape[2], total.shape[3]), stride)
            above = only_inside(total, inside)
            found.insert(0, (above, inside))
        return found


class SimplePyramid(nn.Module):
    """Four resolutions from the last of levels with one stride (ViTDet, Li et al., 2022, at a fixed width).

    Transposed convolutions make strides of a quarter and a half where these are whole pixels, a maximum over 2x2
    cells makes twice the stride.
    """

    def __init__(self, levels: Sequence[FeatureLevel], width: int, finest: int = 0) -> None:
        super().__init__()
        self.levels = (levels[-1],)
        stride = levels[-1].stride
        self.lateral = Lateral(levels[-1], width)
        ups = tuple(stride // f for f in (4, 2) if stride % f == 0 and stride // f >= finest)
        self.strides = (*ups, stride, 2 * stride)
        self.up = nn.ModuleList(nn.ConvTranspose2d(width, width, 2, stride=2) for _ in range(len(self.strides) - 2))
        self.norms = nn.ModuleList(PaddedGroupNorm(groups_of(width), width) for _ in self.up)

    def forward(self, features: Features) -> list[tuple[Tensor, Tensor | None]]:
        """(map, cells inside) per stride, finest first, as TopDown gives them."""
        level = self.levels[0]
        x = self.lateral(features.maps[level.name], features)
        inside = cells_inside(features.content, (x.shape[2], x.shape[3]), level.stride)
        x = only_inside(x, inside)
        coarse = max_pool2d(x, 2, ceil_mode=True)
        maps = [
            (x, inside),
            (coarse, cells_inside(features.content, (coarse.shape[2], coarse.shape[3]), 2 * level.stride)),
        ]
        for step, (up, norm) in enumerate(zip(self.up, self.norms, strict=True), start=1):
            x = up(x)
            inside = cells_inside(features.content, (x.shape[2], x.shape[3]), level.stride // 2**step)
            x = only_inside(norm(x, inside).relu(), inside)
            maps.insert(0, (x, inside))
        return maps


def make_pyramid(
    levels: Sequence[FeatureLevel], width: int, kind: PyramidKind = "auto", finest: int = 0
) -> TopDown | SimplePyramid:
    """The pyramid of these levels: simple where all have one stride (as a ViT's), or where it is asked for.

    finest: strides below it, in pixels, are not made; the coarsest always is. Raises ProbeError for a simple one of
    levels with several strides.
    """
    strides = {level.stride for level in levels}
    if kind == "simple" and len(strides) > 1:
        raise ProbeError(
            f"A simple pyramid is made from one level, of a backbone with one stride.\n  found   strides "
            f"{sorted(strides)}\nLeave --pyramid away, or name one level with --levels."
        )
    if kind == "simple" or (kind == "auto" and len(strides) == 1 and min(strides) >= SIMPLE_FROM):
        return SimplePyramid(levels, width, finest)
    kept = [level for level in levels if level.stride >= min(finest, max(strides))]
    return TopDown(kept, width)
