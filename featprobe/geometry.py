"""The part of an image that is shown, and its place in the frame: resize or letterbox, then pad right and bottom.

Pixel coordinates are continuous, (x, y), with (0, 0) the top-left corner of the top-left pixel.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from featprobe.errors import DataError

Fit = Literal["resize", "letterbox"]
Size = tuple[int, int]
Box = tuple[float, float, float, float]
Spacing = tuple[float, float]
"""Size of a pixel of the original image in millimetres: down and across."""
LEAST_SPACING, MOST_SPACING = 1e-6, 1e4
"""Limits of what a file may claim of a pixel, in millimetres."""
MOST_SIDE, MOST_PIXELS = 2**24, 2**28
"""Limits of what a file may claim: pixels of a side and of all of an image as a backbone sees it."""
IDENTITY = "identity"
TURNS: Mapping[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "hflip": lambda pixels: pixels[:, ::-1],
    "vflip": lambda pixels: pixels[::-1],
    "rot90": np.rot90,
}
"""Views that turn an image: mirrored left to right, mirrored top to bottom, a quarter turn counter-clockwise."""


@dataclass(frozen=True)
class Placement:
    """An image's place in a frame; all sizes are (height, width) in pixels.

    original: the image on the disk; content: the same image after scaling, at the frame's
    top left; frame: content plus padding.
    """

    original: Size
    content: Size
    frame: Size

    @property
    def affine(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Rows of the 2x3 matrix that maps (x, y, 1) of the original image to (x, y) of the frame."""
        scale_y, scale_x = (c / o for c, o in zip(self.content, self.original, strict=True))
        return (scale_x, 0.0, 0.0), (0.0, scale_y, 0.0)


def place(original: Size, asked: Size, fit: Fit, multiple: int) -> Placement:
    """Place an image into the frame that the requested size and the backbone's largest stride give.

    resize stretches to the requested size; letterbox keeps the aspect ratio. The frame is the requested size
    rounded up to a multiple of `multiple`, the same for every image of a data set.

    >>> place((250, 330), (250, 330), "resize", 32).frame
    (256, 352)
    >>> place((100, 400), (256, 256), "letterbox", 32).content
    (64, 256)
    """
    content = asked
    if fit == "letterbox":
        scale = min(a / o for a, o in zip(asked, original, strict=True))
        content = (max(1, round(original[0] * scale)), max(1, round(original[1] * scale)))
    frame = (-(-asked[0] // multiple) * multiple, -(-asked[1] // multiple) * multiple)
    return Placement(original, content, frame)


@dataclass(frozen=True)
class Part:
    """The part of an image that is shown: a rectangle of its pixels, unchanged or turned.

    left, top, height, width: pixels of the image, before the turn. view: "identity", one of TURNS, or "crop" with a
    number.
    """

    left: int
    top: int
    height: int
    width: int
    view: str = IDENTITY

    @property
    def size(self) -> Size:
        """(height, width) of the part in pixels, after the turn."""
        return (self.width, self.height) if self.view == "rot90" else (self.height, self.width)

    def take(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """The part's pixels, cut from the image's pixels, (height, width, …), and turned.

        >>> Part(1, 0, 2, 2, "hflip").take(np.array([[1, 2, 3], [4, 5, 6]])).tolist()
        [[3, 2], [6, 5]]
        """
        cut = pixels[self.top : self.top + self.height, self.left : self.left + self.width]
        turned = TURNS[self.view](cut) if self.view in TURNS else cut
        return np.asanyarray(turned, order="C")  # a masked array stays one

    def take_box(self, box: Box) -> Box:
        """A box x1 y1 x2 y2 of the image in pixels of the part, clipped; without area where the part shows none of it.

        >>> Part(10, 0, 20, 30, "hflip").take_box((5, 2, 20, 8))
        (20, 2, 30, 8)
        """
        x1, x2 = (min(max(v - self.left, 0), self.width) for v in (box[0], box[2]))
        y1, y2 = (min(max(v - self.top, 0), self.height) for v in (box[1], box[3]))
        if self.view == "hflip":
            return self.width - x2, y1, self.width - x1, y2
        if self.view == "vflip":
            return x1, self.height - y2, x2, self.height - y1
        if self.view == "rot90":
            return y1, self.width - x2, y2, self.width - x1
        return x1, y1, x2, y2


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """The first pixels of the tiles along one side of an image: the fewest tiles with at least this overlap.

    The last tile is moved back to end at the border. A side no longer than a tile is a single tile of its own length.

    >>> tile_starts(1000, 512, 64)
    [0, 448, 488]
    """
    count = 1 + max(0, -(-(length - tile) // (tile - overlap)))
    return [min(i * (tile - overlap), max(0, length - tile)) for i in range(count)]


def tiles_of(size: Size, tile: int, overlap: int) -> list[Part]:
    """The tiles of an image of (height, width), row by row."""
    height, width = (min(tile, side) for side in size)
    return [
        Part(left, top, height, width)
        for top in tile_starts(size[0], tile, overlap)
        for left in tile_starts(size[1], tile, overlap)
    ]


def place_tile(part: Size, tile: int, asked: Size, multiple: int) -> Placement:
    """Place a tile, (height, width), so that all tiles of a data set have the same scale, also smaller ones.

    >>> place_tile((512, 300), 512, (256, 256), 32).content
    (256, 150)
    """
    scale = min(asked) / tile
    content = max(1, round(part[0] * scale)), max(1, round(part[1] * scale))
    return Placement(part, content, place(asked, asked, "letterbox", multiple).frame)


def default_size(originals: list[Size]) -> Size:
    """The size of the images if all have the same and no side is above 512 pixels, otherwise 512x512."""
    sizes = set(originals)
    if len(sizes) == 1 and max(originals[0]) <= 512:
        return originals[0]
    return 512, 512


def spacing_of(value: object) -> Spacing:
    """The size of a pixel from one number, or from two, down and across, in millimetres; raises DataError.

    >>> spacing_of(0.05), spacing_of([0.05, 0.1])
    ((0.05, 0.05), (0.05, 0.1))
    """
    both = list(value) if isinstance(value, list | tuple) else [value, value]
    numbers = [float(own) for own in both if isinstance(own, int | float) and not isinstance(own, bool)]
    if len(both) != 2 or len(numbers) != 2 or not all(LEAST_SPACING <= own <= MOST_SPACING for own in numbers):
        raise DataError(
            f"{value!r} is not the size of a pixel. wanted: millimetres, {LEAST_SPACING:g} to {MOST_SPACING:g}, "
            "or two such numbers, [down, across]."
        )
    return numbers[0], numbers[1]


def parse_size(text: str) -> Size:
    """(height, width) in pixels, written HxW; raises DataError.

    >>> parse_size("256x640")
    (256, 640)
    """
    found = re.fullmatch(r"(\d{1,9})x(\d{1,9})", text.strip())
    if not found or 0 in map(int, found.groups()):
        raise DataError(f"{text!r} is not a size. wanted: HxW in pixels, as 256x640 (height x width).")
    return int(found[1]), int(found[2])
