"""Feature pyramids of one fixed width: the base of every head but the linear one.

They ignore padding: its cells are zero wherever a 3x3 convolution reads them, like cells outside of an image, and no
normalisation counts them.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d

from featprobe.errors import ProbeError
from featprobe.features import Features
from featprobe.kinds import PyramidKind
from featprobe.levels import FeatureLevel
from featprobe.probes import execution
from featprobe.probes.detections import detection_strides
from featprobe.probes.linear import LevelNorm, level_statistics
from featprobe.probes.operations.convolutions import add_upsampled_and_convolved, convolved
from featprobe.probes.operations.norms import PaddedGroupNorm

GROUPS = 16  # of GroupNorm, as many as divide the width
SIMPLE_FROM = 8  # pixels: levels of one stride at least this coarse get a simple pyramid


def cells_inside(content: Tensor | None, grid: tuple[int, int], stride: int) -> Tensor | None:
    """Whether each cell holds a part of its image: (batch, rows, columns), bool; None when every image fills the frame.

    content: (batch, 2), pixels, see Features. grid: (rows, columns).
    """
    if content is None:
        return None
    row, column = (
        torch.arange(cells, device=content.device) * stride < content[:, axis, None] for axis, cells in enumerate(grid)
    )
    return row[:, :, None] & column[:, None, :]


def cells_of_strides(features: Features, strides: Sequence[int]) -> list[Tensor | None]:
    """`cells_inside` of the maps of some strides, finest first; a coarser cell is what its first finest cell is."""
    finest, frame = strides[0], features.frame
    inside = cells_inside(features.content, (frame[0] // finest, frame[1] // finest), finest)
    if inside is None or any(stride % finest for stride in strides):
        return [cells_inside(features.content, (frame[0] // s, frame[1] // s), s) for s in strides]
    return [inside[:, :: stride // finest, :: stride // finest] for stride in strides]


class ConvBlock(nn.Module):
    """3x3 convolution, GroupNorm, ReLU; cells of padding come out as 0.

    Channels last in memory: a quarter faster on CPUs, and what GPUs' half precision wants.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
        self.norm = PaddedGroupNorm(groups_of(width), width)


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

    def folded(self, m: Tensor, features: Features) -> tuple[Tensor, Tensor, Tensor]:
        """The map in the weights' number format, weights (width, channels) and shift (width,) that it goes through."""
        x = m.to(self.weight.dtype)
        share = features.valid_share(self.stride)
        scale, shift = self.norm(x.flatten(2), None if share is None else share.flatten(1))
        return x, self.weight * scale, self.weight @ shift + self.bias

    def forward(self, m: Tensor, features: Features) -> Tensor:
        """m: (batch, channels, rows, columns), of that level. Returns (batch, width, rows, columns)."""
        return product(*self.folded(m, features))


def product(x: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
    """A 1x1 convolution, channels last in memory whatever x is: (batch, width, rows, columns)."""
    rows = x.flatten(2).transpose(1, 2)  # (batch, cells, channels)
    # bmm, not `@`: the latter copies the whole map to fold its batch into rows
    found = torch.baddbmm(shift, rows, weight.T.expand(x.shape[0], -1, -1))
    return found.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


Maps = list[tuple[Tensor, Tensor | None]]
"""(map, cells inside) per stride, finest first: (batch, width, rows, columns), (batch, rows, columns)."""


class Pyramid(nn.Module):
    """Maps of one width at several strides, made from levels.

    levels: that it takes. strides: of what comes out, finest first.
    """

    levels: tuple[FeatureLevel, ...]
    strides: tuple[int, ...]

    def forward(self, features: Features) -> Maps:
        """All maps."""
        raise NotImplementedError

    def convolved(self, features: Features, weight: Tensor, strides: Sequence[int]) -> Maps:
        """The maps of these strides, each under a 3x3 convolution; in cells of padding stands anything.

        weight: (outputs, width, 3, 3).
        """
        found = dict(zip(self.strides, self(features), strict=True))
        return [(convolved(found[s][0], weight), found[s][1]) for s in strides]


class TopDown(Pyramid):
    """Lateral maps of every level, each with the coarser ones upsampled and added (FPN, Lin et al., 2017).

    Levels with the same stride are summed to one.
    """

    def __init__(self, levels: Sequence[FeatureLevel], width: int) -> None:
        super().__init__()
        self.levels = tuple(levels)
        self.strides = tuple(sorted({level.stride for level in self.levels}))
        self.laterals = nn.ModuleDict({level.name: Lateral(level, width) for level in self.levels})

    def forward(self, features: Features) -> Maps:
        """All maps."""
        return self._maps(features, self.strides, self.strides)

    def _maps(self, features: Features, strides: Sequence[int], wanted: Sequence[int]) -> Maps:
        """The maps of the coarsest strides, down to the first of these; padding is 0 in those that are wanted alone.

        The others are only upsampled: no cell that holds some image lies in a coarser one that holds none.
        """
        found: Maps = []
        levels = [level for level in self.levels if level.stride in strides]
        laterals = self._laterals(features, levels)
        insides = dict(zip(strides, cells_of_strides(features, strides), strict=True))
        for stride in reversed(strides):
            own = [laterals[level.name] for level in levels if level.stride == stride]
            if found:
                own.append(interpolate(found[0][0], own[0].shape[2:], mode="nearest"))
            total = own[0]
            for more in own[1:]:
                total = total + more
            inside = insides[stride]
            found.insert(0, (only_inside(total, inside) if stride in wanted else total, inside))
        return found

    def _lateral(self, level: FeatureLevel) -> Lateral:
        return cast(Lateral, self.laterals[level.name])

    def _laterals(self, features: Features, levels: Sequence[FeatureLevel]) -> dict[str, Tensor]:
        """The outputs of these levels' laterals: name -> (batch, width, rows, columns)."""
        laterals = [self._lateral(level) for level in levels]
        maps, first = [features.maps[level.name] for level in levels], laterals[0]
        if not execution.whole_batches(first.weight.device):
            found = [lateral(m, features) for lateral, m in zip(laterals, maps, strict=True)]
            return {level.name: own for level, own in zip(levels, found, strict=True)}
        dtype = first.weight.dtype
        if not (torch.is_autocast_enabled() and first.weight.is_cuda):  # there a product takes maps in half precision
            maps = [m.to(dtype) for m in maps]
        with execution.full_products(first.weight.device):  # of all levels at once, in few operations
            norms = [lateral.norm for lateral in laterals]
            mean, rstd = level_statistics(norms, [m.flatten(2) for m in maps], levels, features, dtype)
            scale = torch.cat([norm.weight for norm in norms]) * rstd
            channels = [level.channels for level in levels]
            shifts = torch.addcmul(torch.cat([norm.bias for norm in norms]), mean, scale, value=-1).split(channels)
            weights = torch.cat([lateral.weight for lateral in laterals], 1)
            folded = (weights * scale).split(channels, 1)
            shifts = [
                torch.addmv(lateral.bias, own, shift)
                for lateral, own, shift in zip(laterals, weights.split(channels, 1), shifts, strict=True)
            ]
        return {v.name: product(m, w, s) for v, m, w, s in zip(levels, maps, folded, shifts, strict=True)}

    def convolved(self, features: Features, weight: Tensor, strides: Sequence[int]) -> Maps:
        """The maps of these strides, each under a 3x3 convolution; in cells of padding stands anything.

        On a CPU, where it saves work, the finest map is never made: see `_at_finest`.
        """
        base = self._base(features, weight, strides)
        found = dict(zip(self.strides[base:], self._maps(features, self.strides[base:], strides), strict=True))
        joined = [] if base == 0 else [self._at_finest(features, weight, found[self.strides[base]], base)]
        return [*joined, *((convolved(found[s][0], weight), found[s][1]) for s in strides[len(joined) :])]

    def _at_finest(
        self, features: Features, weight: Tensor, above: tuple[Tensor, Tensor | None], base: int
    ) -> tuple[Tensor, Tensor | None]:
        """The finest map under a 3x3 convolution, from the map of a coarser stride and the levels below it.

        Each of these levels goes through the product of its lateral and the 3x3 convolution; both it and the coarser
        map at their own cells: see `add_upsampled_and_convolved`.
        """
        x, inside = above
        parts: list[tuple[Tensor, Tensor, int]] = []
        for level in self.levels:
            if level.stride < self.strides[base]:
                m, own, shift = self._lateral(level).folded(features.maps[level.name], features)
                m = only_inside(m, cells_inside(features.content, (m.shape[2], m.shape[3]), level.stride))
                parts.append((m, torch.einsum("owyx,wc->ocyx", weight, own), level.stride))
                x = x + shift[:, None, None]  # a constant stays what it is when it is upsampled
        parts.append((only_inside(x, inside), weight, self.strides[base]))
        total: Tensor | None = None
        for m, kernel, stride in sorted(parts, key=lambda part: part[2]):
            times = stride // self.strides[0]
            if total is None:  # the finest level, no cell of which is repeated
                total = convolved(m, kernel)
            elif times == 1:
                total = total.add_(convolved(m, kernel))
            else:
                total = add_upsampled_and_convolved(total, m, kernel, times)
        assert total is not None
        return total, cells_inside(features.content, (total.shape[2], total.shape[3]), self.strides[0])

    def _base(self, features: Features, weight: Tensor, strides: Sequence[int]) -> int:
        """The place of the finest stride whose map is made; those below it need not be. 0 where that saves nothing."""
        if execution.whole_batches(weight.device) or strides[0] != self.strides[0]:
            return 0
        needed = min(strides[1:], default=self.strides[-1])
        possible = [0]
        for base, stride in enumerate(self.strides[1:], start=1):
            whole = all(s % self.strides[0] == 0 for s in self.strides[: base + 1])
            ends = features.content is None or not (features.content % stride).any()  # no cell is part image
            possible += [base] if whole and ends and stride <= needed else []
        return min(possible, key=lambda base: self._products(features, weight, self.strides[base]))

    def _products(self, features: Features, weight: Tensor, base: int) -> float:
        """Products per cell of the finest map, forward and back, where the map of stride `base` is the finest made.

        As many as transposed convolutions would take; back, and over more than two cells, some of these are saved.
        """
        outputs, width = weight.shape[:2]
        total = 0.0
        for stride in self.strides:
            channels = [
                v.channels * (2 + features.maps[v.name].requires_grad) for v in self.levels if v.stride == stride
            ]
            cells = (self.strides[0] / stride) ** 2
            taps = (1 + 2 * self.strides[0] / stride) ** 2
            total += sum(channels) * (taps * outputs if stride < base else cells * width)
            total += 3 * taps * width * outputs if stride == base else 0
        return total


class SimplePyramid(Pyramid):
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

    def forward(self, features: Features) -> Maps:
        """All maps."""
        level = self.levels[0]
        x = self.lateral(features.maps[level.name], features)
        inside = cells_inside(features.content, (x.shape[2], x.shape[3]), level.stride)
        x = only_inside(x, inside)
        rows, columns = (min(2, side) for side in x.shape[2:])  # a runtime may refuse windows larger than the map
        coarse = max_pool2d(x, (rows, columns), 2, ceil_mode=True)
        maps = [
            (x, inside),
            (coarse, cells_inside(features.content, (coarse.shape[2], coarse.shape[3]), 2 * level.stride)),
        ]
        for step, (up, norm) in enumerate(zip(self.up, self.norms, strict=True), start=1):
            x = up(x)
            inside = cells_inside(features.content, (x.shape[2], x.shape[3]), level.stride // 2**step)
            x = cast(PaddedGroupNorm, norm).rectified(x, inside)
            maps.insert(0, (x, inside))
        return maps


def make_pyramid(levels: Sequence[FeatureLevel], width: int, kind: PyramidKind = "auto", finest: int = 0) -> Pyramid:
    """The pyramid of these levels: simple where all have one stride (as in a ViT), or where it is requested.

    finest: strides below it, in pixels, are not made; the coarsest always is. Raises ProbeError for a simple pyramid of
    levels with several strides.
    """
    strides = {level.stride for level in levels}
    if kind == "simple" and len(strides) > 1:
        raise ProbeError(
            f"A simple pyramid is made from one level, of a backbone with one stride.\n  found   strides "
            f"{sorted(strides)}\nOmit --pyramid, or name one level with --levels."
        )
    if kind == "simple" or (kind == "auto" and len(strides) == 1 and min(strides) >= SIMPLE_FROM):
        return SimplePyramid(levels, width, finest)
    kept = [level for level in levels if level.stride >= min(finest, max(strides))]
    return TopDown(kept, width)


def detection_pyramid(
    levels: Sequence[FeatureLevel], width: int, sides: Sequence[float], kind: PyramidKind
) -> tuple[tuple[int, ...], Pyramid]:
    """The strides at which objects of these sizes are searched, and a pyramid with these strides."""
    strides = detection_strides(make_pyramid(levels, width, kind).strides, sides)
    return strides, make_pyramid(levels, width, kind, strides[0])


def maps_of(pyramid: Pyramid, strides: Sequence[int], features: Features) -> Maps:
    """(map, cells inside) for only these strides, as the pyramid gives them."""
    found = dict(zip(pyramid.strides, pyramid(features), strict=True))
    return [found[stride] for stride in strides]
