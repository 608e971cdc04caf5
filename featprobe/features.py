"""Features of a batch of images (the input of heads), and labels on the same grid of cells (their targets)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from featprobe.errors import ShapeError

FEW_CLASSES = 8  # up to so many, comparing with each class is faster on a CPU than counting in slots
WIDEST_CELL = 181  # pixels; an int16 can count its square


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
