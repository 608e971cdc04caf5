"""Features of a batch of images (the input of heads), the same pooled, and labels on their grid of cells."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from featprobe.errors import ShapeError
from featprobe.levels import FeatureLevel

FEW_CLASSES = 8  # up to so many, comparing with each class is faster on a CPU than counting in slots
WIDEST_CELL = 181  # pixels; an int16 can count its square
POOLED_AT_ONCE = 1 << 17  # values, about, that a CPU pools together: they stay in its caches


@dataclass(frozen=True)
class Features:
    """Feature maps of a batch: the input of every head.

    maps: level name -> (batch, channels, height / stride, width / stride).
    frame: (height, width) of the frame in pixels, padding included.
    content: (batch, 2), pixels: (height, width) of each image in its frame, at the top left; None
        when every image fills the frame. Cells outside of it are padding.
    """

    maps: Mapping[str, Tensor]
    frame: tuple[int, int]
    content: Tensor | None = None

    def __post_init__(self) -> None:
        sizes = {name: tuple(m.shape[2:]) for name, m in self.maps.items()}
        for name, size in sizes.items():
            if 0 in size or self.frame[0] % size[0] or self.frame[1] % size[1]:
                raise ShapeError(f"Level {name} has {size} cells, which do not tile a frame of {self.frame} pixels.")

    def __repr__(self) -> str:
        maps = ", ".join(f"{name} {tuple(m.shape)}" for name, m in self.maps.items())
        first = next(iter(self.maps.values()))
        padding = "" if self.content is None else ", padded"
        return f"Features({maps}; {first.dtype} on {first.device}, frame {self.frame[0]}x{self.frame[1]}{padding})"

    @property
    def batch(self) -> int:
        """The number of images."""
        return next(iter(self.maps.values())).shape[0]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Features":
        """The same features on another device, and in another number format if one is given."""
        maps = {n: m.to(device=device, dtype=dtype, non_blocking=True) for n, m in self.maps.items()}
        content = None if self.content is None else self.content.to(device, non_blocking=True)
        return replace(self, maps=maps, content=content)

    def cut(self, content: tuple[int, int]) -> "Features":
        """The same features without cells of padding, for images that all fill the same part of their frame.

        content: (height, width) of that part in pixels. The remaining padding completes cells of the coarsest level.
        """
        if self.content is None:
            return self
        cells = {name: m.shape[2:] for name, m in self.maps.items()}
        frame = [
            min(side, -(-filled // step) * step)
            for axis, (side, filled) in enumerate(zip(self.frame, content, strict=True))
            for step in [max(side // size[axis] for size in cells.values())]
        ]
        maps = {
            name: m[:, :, : cells[name][0] * frame[0] // self.frame[0], : cells[name][1] * frame[1] // self.frame[1]]
            for name, m in self.maps.items()
        }
        return Features(maps, (frame[0], frame[1]), None if tuple(frame) == content else self.content)

    def valid_share(self, stride: int) -> Tensor | None:
        """The share of each cell that is image and not padding: (batch, rows, columns) in [0, 1], float32.

        None when every image fills the frame.
        """
        if self.content is None:
            return None
        rows, columns = self.frame[0] // stride, self.frame[1] // stride
        content = self.content.to(torch.float32)
        row = (content[:, :1] / stride - torch.arange(rows, device=content.device)).clamp(0, 1)
        column = (content[:, 1:] / stride - torch.arange(columns, device=content.device)).clamp(0, 1)
        return row[:, :, None] * column[:, None, :]  # (batch, rows, columns)


@dataclass(frozen=True)
class Pooled:
    """Features of images, or of their tiles, without their place in the image.

    mean, maximum: level name -> (batch, channels), float32, over the cells that hold a part of the image. The mean
    counts each cell by the share of it that is image. cells: level name -> (batch,), float32, how many cells the image
    fills, parts of cells included.
    """

    mean: Mapping[str, Tensor]
    maximum: Mapping[str, Tensor]
    cells: Mapping[str, Tensor]

    def __repr__(self) -> str:
        return f"Pooled({', '.join(f'{name} {tuple(m.shape)}' for name, m in self.mean.items())})"

    @classmethod
    def of_all(cls, parts: Sequence["Pooled"]) -> "Pooled":
        """The features of several batches, one after another."""
        first = parts[0]
        return cls(
            *({name: torch.cat([getattr(part, own)[name] for part in parts]) for name in getattr(first, own)}
              for own in ("mean", "maximum", "cells"))
        )  # fmt: skip

    def joined(self, index: Tensor, units: int) -> "Pooled":
        """The features of whole images, from those of their tiles.

        index: (batch,), int64, 0 <= index < units: the image that each tile shows; every image has a tile. The mean is
        weighted by `cells`, so that pixels count as often as tiles show them.
        """
        cells = {name: n.new_zeros(units).index_add(0, index, n) for name, n in self.cells.items()}
        mean = {
            name: m.new_zeros(units, m.shape[1]).index_add(0, index, m * self.cells[name][:, None])
            / cells[name][:, None]
            for name, m in self.mean.items()
        }
        maximum = {
            name: m.new_zeros(units, m.shape[1]).scatter_reduce(
                0, index[:, None].expand_as(m), m, "amax", include_self=False
            )
            for name, m in self.maximum.items()
        }
        return Pooled(mean, maximum, cells)

    def vectors(self, levels: Sequence[FeatureLevel]) -> Tensor:
        """(batch, 2 * channels of all levels), float32: mean, then maximum, level by level."""
        return torch.cat([own[level.name] for level in levels for own in (self.mean, self.maximum)], 1)


def pool(features: Features, levels: Sequence[FeatureLevel]) -> Pooled:
    """Mean and maximum of some levels over each image's own cells, computed in float32; see Pooled.

    A row's result does not depend on the rows beside it. Differentiable.

    >>> level = FeatureLevel("stride8", 1, 8)
    >>> features = Features({"stride8": torch.tensor([[[[1.0, 4.0, 9.0]]]])}, (8, 24), torch.tensor([[8, 12]]))
    >>> pool(features, [level]).vectors([level]).tolist()
    [[2.0, 4.0]]
    """
    mean, maximum, cells = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
    for level in levels:
        m, content = features.maps[level.name], features.content
        if content is None:
            content = torch.tensor([features.frame], device=m.device).expand(len(m), 2)
        cells[level.name] = filled_cells(content, level.stride)
        if m.device.type == "cpu" and not m.requires_grad:
            total, maximum[level.name] = _pooled_by_row(m, content.tolist(), level.stride)
        else:
            total, maximum[level.name] = _pooled_together(m, features.valid_share(level.stride))
        mean[level.name] = total / cells[level.name][:, None]
    return Pooled(mean, maximum, cells)


def filled_cells(content: Tensor, stride: int) -> Tensor:
    """How many cells of a level images fill, parts of cells included: (batch,), float32, the sum of `valid_share`.

    content: (batch, 2), pixels, see Features.
    """
    wide = torch.float32 if content.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    return (content.to(wide).prod(1) / stride**2).float()


def _pooled_together(m: Tensor, share: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weighted sum and maximum per channel, (batch, channels) each, float32: few operations, as a GPU wants.

    share: see Features.valid_share.
    """
    x = m.float().flatten(2)  # (batch, channels, cells)
    if share is None:
        return x.sum(2), x.amax(2)
    own = share.flatten(1)[:, None]
    return (x * own).sum(2), x.masked_fill(own == 0, -torch.inf).amax(2)


def _pooled_by_row(m: Tensor, content: list[list[int]], stride: int) -> tuple[Tensor, Tensor]:
    """The same in pieces that stay in a CPU's caches, of the cells that show the image alone; without gradients.

    content: per row, see Features.
    """
    totals, peaks = torch.empty(m.shape[:2]), torch.empty(m.shape[:2])
    for row, size in enumerate(content):
        rows, columns = (-(-side // stride) for side in size)
        lower, right = (1 - (-side % stride) / stride for side in size)  # share of the last row and column
        few = max(1, POOLED_AT_ONCE // (rows * columns))
        for start in range(0, m.shape[1], few):
            own = m[row, start : start + few, :rows, :columns]
            x = own.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            peaks[row, start : start + few] = x.flatten(1).amax(1)
            if lower < 1:
                x[:, -1] *= lower
            if right < 1:
                x[:, :, -1] *= right
            totals[row, start : start + few] = x.flatten(1).sum(1)
    return totals, peaks


def cell_shares(labels: Tensor, classes: int, stride: int) -> Tensor:
    """The area share of each class in each cell of a level.

    labels: (batch, height, width), uint8, frame pixels; 255 is ignored.
    Returns (batch, classes, height / stride, width / stride), float32, in [0, 1]. The shares of a
    cell sum to the share of its pixels that are not ignored: they are not renormalised.

    >>> cell_shares(torch.tensor([[[0, 1], [1, 255]]], dtype=torch.uint8), 2, 2).flatten().tolist()
    [0.25, 0.5]
    """
    height, width = labels.shape[1:]
    if height % stride or width % stride:
        raise ShapeError(f"Labels of {height}x{width} pixels do not tile into cells of {stride}.")
    return cell_counts(labels, classes, stride).to(torch.float32) / (stride * stride)


def cell_counts(labels: Tensor, classes: int, stride: int) -> Tensor:
    """The pixels of each class in each cell of a level: int16, or int64 for large cells and many classes.

    Arguments and shape are those of `cell_shares`. On a GPU it takes three operations and does not wait for a result.
    """
    batch, height, width = labels.shape
    rows, columns = height // stride, width // stride
    if (labels.device.type == "cpu" and classes > FEW_CLASSES) or stride > WIDEST_CELL:
        row = torch.arange(height, device=labels.device) // stride
        column = torch.arange(width, device=labels.device) // stride
        cell = row[:, None] * columns + column  # (height, width)
        image = torch.arange(batch, device=labels.device)[:, None, None] * (classes + 1)
        label = labels.long().clamp_(max=classes)  # the last slot collects ignored pixels
        slot = (image + label) * (rows * columns) + cell
        counts = torch.bincount(slot.flatten(), minlength=batch * (classes + 1) * rows * columns)
        return counts.view(batch, classes + 1, rows, columns)[:, :classes]
    of_class = labels[:, None] == torch.arange(classes, dtype=torch.uint8, device=labels.device)[:, None, None]
    lines = of_class.view(torch.uint8).unflatten(2, (rows, stride)).sum(3, dtype=torch.int16)
    return lines.unflatten(3, (columns, stride)).sum(4, dtype=torch.int16)
