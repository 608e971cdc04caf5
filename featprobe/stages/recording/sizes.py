"""Sizes of defects and calls: area, its square root, longest and shortest caliper, in pixels and in millimetres."""

from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, floor

import numpy as np
from numpy.typing import NDArray

from featprobe.geometry import Size, Spacing
from featprobe.metrics.defects.records import SIZES, Floats, Records
from featprobe.targets import Instance, decode_window

Points = NDArray[np.float64]
UNKNOWN_SPACING: Spacing = (float("nan"), float("nan"))
REMEMBERED = 4096  # outlines of small masks: components of a noisy map have few shapes
SMALL = 256  # pixels of the window of a small mask
Window = tuple[slice, slice]


@dataclass(frozen=True)
class Outline:
    """What the sizes of an object follow from, at any spacing.

    area: square pixels. points: (n, 2), x y of the corners of its convex hull, in order; of a box two opposite corners,
    because nothing is known of the shape inside.
    """

    area: float
    points: Points

    def sizes(self, spacing: Spacing = (1.0, 1.0)) -> Floats:
        """(4,), in the order of SIZES, in the unit of the spacing; nan for an unknown one.

        Calipers of a mask are the largest and the smallest distance between two parallel lines that hold all its
        pixels, corners included; those of a box its longer and its shorter side.
        """
        down, across = spacing
        area = self.area * down * across
        longest, shortest = _calipers(self.points * (across, down))
        by_name = {"root_area": area**0.5, "area": area, "longest": longest, "shortest": shortest}
        return np.array([by_name[name] for name in SIZES], np.float32)


def outline_of(instance: Instance) -> Outline:
    """The outline of an object: of its mask where it has one, else of its box. An empty mask counts as its box."""
    if instance.rle is not None:
        (rows, columns), mask = decode_window(instance.rle)
        if mask.any():
            return outline_of_mask(mask, (columns.start, rows.start))
    x1, y1, x2, y2 = instance.box_xyxy
    return Outline((x2 - x1) * (y2 - y1), np.array([(x1, y1), (x2, y2)]))


def outline_of_mask(mask: NDArray[np.bool_], corner: tuple[float, float] = (0.0, 0.0)) -> Outline:
    """The outline of the pixels of a (height, width) mask with a pixel. corner: x y of its upper left one.

    >>> outline_of_mask(np.array([[1, 1, 1, 1]], bool)).sizes((4.0, 0.75)).tolist()
    [3.464101552963257, 12.0, 5.0, 3.0]
    """
    small = mask.size <= SMALL
    points = _small_hull(mask.shape, mask.tobytes()) if small else _hull(mask)
    return Outline(float(np.count_nonzero(mask)), points + corner)


def in_millimetres(records: Records, pixel_size: Spacing) -> Records:
    """Records with sizes in millimetres as all their images have pixels of this size.

    Records keep no outlines: at pixels that are not square, calipers become nan, unless they were made at this size.
    """
    spacing = np.broadcast_to(np.array(pixel_size, np.float32), records.images.spacing.shape)
    if np.array_equal(records.images.spacing, spacing):
        return records
    down, across = pixel_size
    factors = {"root_area": (down * across) ** 0.5, "area": down * across}
    by = np.array([factors.get(name, down if down == across else np.nan) for name in SIZES], np.float32)
    return replace(
        records,
        images=replace(records.images, spacing=spacing.copy()),
        defects=replace(records.defects, millimetres=records.defects.pixels * by),
        calls=replace(records.calls, millimetres=records.calls.pixels * by),
    )


def is_cut(instance: Instance, size: Size) -> bool:
    """Whether an object reaches the border of an image of (height, width), to less than a pixel: it may go on there."""
    x1, y1, x2, y2 = instance.box_xyxy
    return x1 < 1 or y1 < 1 or x2 > size[1] - 1 or y2 > size[0] - 1


def pixels_of(instance: Instance, size: Size) -> tuple[Window, NDArray[np.bool_]]:
    """Rows and columns of an image of (height, width), and which pixels there are an object's: of its mask, or of its
    box, in which each pixel counts that the box touches."""
    if instance.rle is not None:
        return decode_window(instance.rle)
    x1, y1, x2, y2 = instance.box_xyxy
    window = slice(floor(y1), min(ceil(y2), size[0])), slice(floor(x1), min(ceil(x2), size[1]))
    return window, np.ones(tuple(max(0, one.stop - one.start) for one in window), bool)


@lru_cache(REMEMBERED)
def _small_hull(shape: Size, data: bytes) -> Points:
    return _hull(np.frombuffer(data, bool).reshape(shape))


def _hull(mask: NDArray[np.bool_]) -> Points:
    """(n, 2), x y of the convex hull of all corners of the pixels of a mask (Andrew's monotone chain, 1979)."""
    rows = np.flatnonzero(mask.any(axis=1))
    left = mask[rows].argmax(axis=1)
    right = mask.shape[1] - mask[rows, ::-1].argmax(axis=1)
    down = np.repeat(rows, 2) + np.tile((0, 1), len(rows))  # both edges of each row of pixels
    left_side = _turning(list(zip(down.tolist(), np.repeat(left, 2).tolist(), strict=True)), 1)
    right_side = _turning(list(zip(down.tolist(), np.repeat(right, 2).tolist(), strict=True)), -1)
    return np.array([(x, y) for y, x in [*left_side, *right_side[::-1]]], np.float64)


def _turning(points: list[tuple[int, int]], sign: int) -> list[tuple[int, int]]:
    """Those of some points (y, x), from the top down, that a string around one side of them touches.

    sign: 1 for the left side, where the least x of a y counts; -1 for the right side.
    """
    kept: list[tuple[int, int]] = []
    for y, x in points:
        if kept and kept[-1][0] == y:
            if sign * (x - kept[-1][1]) >= 0:
                continue
            kept.pop()
        while len(kept) > 1:
            (y0, x0), (y1, x1) = kept[-2:]
            if sign * ((x1 - x0) * (y - y0) - (x - x0) * (y1 - y0)) < 0:
                break
            kept.pop()
        kept.append((y, x))
    return kept


def _calipers(points: Points) -> tuple[float, float]:
    """The longest and the shortest caliper of a convex polygon, or the sides of a box between two corners."""
    if len(points) == 2:
        sides = np.abs(points[1] - points[0])
        return float(sides.max()), float(sides.min())
    apart = points[:, None] - points  # (n, n, 2)
    edges = np.roll(points, -1, axis=0) - points
    lengths = np.hypot(*edges.T)
    off = np.abs(
        edges[:, None, 0] * apart[..., 1] - edges[:, None, 1] * apart[..., 0]
    )  # from each edge, times its length
    return float(np.hypot(apart[..., 0], apart[..., 1]).max()), float((off.max(axis=1) / lengths).min())
