"""Feature levels: the one thing that backbones, caches and heads agree on.

A backbone *has* levels, a cache *stores* levels, a head is *built from* levels and *fed* `Features`.
Nothing behind a head's input tells whether a file or a live network stands there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from featprobe.errors import ShapeError


@dataclass(frozen=True)
class FeatureLevel:
    """One feature map of a backbone: its name, its channels, its stride in frame pixels per cell."""

    name: str
    channels: int
    stride: int

    def cells(self, frame: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of this level for a frame of (height, width) pixels.

        >>> FeatureLevel("stride8", 192, 8).cells((256, 352))
        (32, 44)
        """
        return frame[0] // self.stride, frame[1] // self.stride


@dataclass(frozen=True)
class Features:
    """Feature maps of a batch, as every head takes them.

    maps: level name -> (batch, channels, height / stride, width / stride).
    frame: (height, width) of the frame in pixels, padding included.
    content: (batch, 2), pixels: (height, width) of each image's own part of the frame, at its top
        left; None when every image fills the frame. Cells beyond it are padding.
    """

    maps: Mapping[str, Tensor]
    frame: tuple[int, int]
    content: Tensor | None = None

    def __post_init__(self) -> None:
        sizes = {name: tuple(m.shape[2:]) for name, m in self.maps.items()}
        for name, size in sizes.items():
            if 0 in size or self.frame[0] % size[0] or self.frame[1] % size[1]:
                raise ShapeError(f"Level {name} has {size} cells, which do not tile a frame of {self.frame} pixels.")

    @property
    def batch(self) -> int:
        """Number of images."""
        return next(iter(self.maps.values())).shape[0]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Features":
        """The same features on another device, and in another number format where one is given."""
        maps = {n: m.to(device=device, dtype=dtype, non_blocking=True) for n, m in self.maps.items()}
        content = None if self.content is None else self.content.to(device, non_blocking=True)
        return replace(self, maps=maps, content=content)

    def valid_share(self, stride: int) -> Tensor | None:
        """Share of each cell that is image and not padding: (batch, rows, columns) in [0, 1], float32.

        None when every image fills the frame.
        """
        if self.content is None:
            return None
        rows, columns = self.frame[0] // stride, self.frame[1] // stride
        content = self.content.to(torch.float32)
        row = (content[:, :1] / stride - torch.arange(rows, device=content.device)).clamp(0, 1)
        column = (content[:, 1:] / stride - torch.arange(columns, device=content.device)).clamp(0, 1)
        return row[:, :, None] * column[:, None, :]  # (batch, rows, columns)


def choose_levels(levels: Sequence[FeatureLevel], names: Sequence[str]) -> tuple[FeatureLevel, ...]:
    """The levels of these names, finest first; all of them when no name is given.

    Raises KeyError with the first name that does not exist.
    """
    by_name = {level.name: level for level in levels}
    chosen = [by_name[name] for name in names] if names else list(levels)
    return tuple(sorted(set(chosen), key=lambda level: levels.index(level)))
