"""Sizes of defects and calls: area, its square root, longest and shortest caliper, in pixels and in millimetres."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, floor

import numpy as np
from numpy.typing import NDArray

from featprobe.geometry import Size, Spacing
from featprobe.metrics.defects.records import SIZES, Floats, Records
from featprobe.regions import Places, Runs, runs_of
from featprobe.targets import Instance, decode_window

Points = NDArray[np.float64]
UNKNOWN_SPACING: Spacing = (float("nan"), float("nan"))
PAIRS_AT_ONCE = 1 << 18  # of corners
Window = tuple[slice, slice]


@dataclass(frozen=True)
class Outlines:
    """What the sizes of objects follow from, at any spacing.

    area: (objects,), square pixels. corners: (objects,), how many points each has. points: (sum of corners, 2), x y of
    the corners of their convex hulls, in order; of a box two opposite corners, because nothing is known of the shape
    inside.
    """

    area: NDArray[np.float64]
    corners: NDArray[np.intp]
    points: Points

    def __len__(self) -> int:
        return len(self.area)

    def sizes(self, spacing: Spacing | NDArray[np.float64] = (1.0, 1.0)) -> Floats:
        """(objects, 4), in the order of SIZES, in the unit of the spacing; nan for an unknown one.

        Calipers of a mask are the largest and the smallest distance between two parallel lines that hold all its
        pixels, corners included; those of a box its longer and its shorter side. spacing: down and across, of all
        objects, or (objects, 2).
        """
        down, across = np.broadcast_to(np.asarray(spacing, np.float64), (len(self), 2)).T
        area = self.area * down * across
        scale = np.repeat(np.stack([across, down], axis=1), self.corners, axis=0)
        longest, shortest = _calipers(self.points * scale, self.corners)
        by_name = {"root_area": np.sqrt(area), "area": area, "longest": longest, "shortest": shortest}
        return np.stack([by_name[name] for name in SIZES], axis=1).astype(np.float32)


def outlines_of(objects: Sequence[Instance]) -> Outlines:
    """The outlines of objects: of their masks, else of their boxes. An empty mask counts as its box."""
    each = [_runs_in(one) for one in objects]
    owner = np.repeat(np.arange(len(each)), [len(runs.row) for runs in each])
    found = outlines_of_runs(Runs.joined(each), owner, len(each))
    bare = np.flatnonzero(found.corners == 0)
    boxes = np.array([objects[i].box_xyxy for i in bare.tolist()], np.float64).reshape(-1, 2, 2)
    found.area[bare] = (boxes[:, 1] - boxes[:, 0]).prod(1)
    places = np.repeat(np.cumsum(found.corners)[bare], 2)
    return Outlines(found.area, np.maximum(found.corners, 2), np.insert(found.points, places, boxes.reshape(-1, 2), 0))


def outlines_of_runs(runs: Runs, owner: Places, objects: int) -> Outlines:
    """The outlines of objects of pixels. owner: (runs,), the object of each; one without has no corner."""
    of, points = _hulls(runs, owner)
    area = np.bincount(owner, runs.right - runs.left, objects).astype(np.float64)
    return Outlines(area, np.bincount(of, minlength=objects), points)


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


def _runs_in(one: Instance) -> Runs:
    """The runs of an object's mask; none without a mask."""
    if one.rle is None:
        return Runs.joined([])
    (rows, columns), mask = decode_window(one.rle)
    return runs_of(mask)[0].moved(rows.start, columns.start)


def _hulls(runs: Runs, owner: Places) -> tuple[Places, Points]:
    """(points,), (points, 2), x y of the convex hulls of all corners of the pixels of objects, and whose each is.

    Of each object from the top down along its left side, then up along its right side.
    """
    order = np.lexsort((runs.row, owner))
    of, row, left, right = (own[order] for own in (owner, *runs))
    new = np.flatnonzero(_differs(of) | _differs(row))
    if len(new):
        left, right = np.minimum.reduceat(left, new), np.maximum.reduceat(right, new)
    of, row = of[new], row[new]
    of, y = np.repeat(of, 2), np.repeat(row, 2) + np.tile((0, 1), len(row))  # both edges of each row of pixels
    side = np.repeat((0, 1), len(y))
    of, side, y, x = _hull_sides(np.tile(of, 2), side, np.tile(y, 2), np.repeat([left, -right], 2))
    order = np.lexsort((np.where(side == 0, y, -y), side, of))
    return of[order], np.stack([np.where(side == 0, x, -x), y], axis=1)[order].astype(np.float64)


def _hull_sides(of: Places, side: Places, y: Places, x: Places) -> tuple[Places, ...]:
    """Those of some points that a string around the low side of x of each group touches, in any order: as given.

    A group has one `of` and one `side`, its points come one after another from the top down, and of equal y the least x
    counts. A point goes where it lies on, or behind, the line between those before and after it: then it is no corner
    of the hull, whether these are or not. A group that loses none has its hull.
    """
    new = np.flatnonzero(_differs(of) | _differs(side) | _differs(y))
    of, side, y = of[new], side[new], y[new]
    x = np.minimum.reduceat(x, new) if len(new) else x
    group = np.cumsum(_differs(of) | _differs(side)) - 1
    points, found = np.stack([group, of, side, y, x]), []
    while points.size:
        group, _, _, y, x = points
        back = (x[1:-1] - x[:-2]) * (y[2:] - y[:-2]) >= (x[2:] - x[:-2]) * (y[1:-1] - y[:-2])
        lost = np.zeros(len(x), bool)
        lost[1:-1] = (group[2:] == group[:-2]) & back
        changed = np.zeros(group[-1] + 1, bool)
        changed[group[lost]] = True
        found.append(points[1:, ~changed[group]])
        points = points[:, changed[group] & ~lost]
    return tuple(np.concatenate([np.zeros((4, 0), np.intp), *found], axis=1))


def _differs(values: Places) -> NDArray[np.bool_]:
    """Where a value is another than the one before it, or the first."""
    return np.diff(values, prepend=values[:1] - 1) != 0


def _calipers(points: Points, corners: NDArray[np.intp]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The longest and the shortest caliper of convex polygons, or the sides of boxes between two corners.

    (objects,) each. points, corners: see `Outlines`.
    """
    longest, shortest = np.empty(len(corners)), np.empty(len(corners))
    first = np.cumsum(corners) - corners
    for count in np.unique(corners).tolist():
        every = np.flatnonzero(corners == count)
        for which in np.array_split(every, 1 + len(every) * count**2 // PAIRS_AT_ONCE):
            own = points[first[which, None] + np.arange(count)]  # (some, count, 2)
            longest[which], shortest[which] = _calipers_of_equal(own)
    return longest, shortest


def _calipers_of_equal(points: Points) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of polygons of as many corners, (polygons, corners, 2)."""
    if points.shape[1] == 2:
        sides = np.abs(points[:, 1] - points[:, 0])
        return sides.max(1), sides.min(1)
    x, y = points[..., 0], points[..., 1]
    over, down = x[:, :, None] - x[:, None], y[:, :, None] - y[:, None]  # of all pairs
    edge_x, edge_y = np.roll(x, -1, axis=1) - x, np.roll(y, -1, axis=1) - y
    off = np.abs(edge_x[..., None] * down - edge_y[..., None] * over)  # from each edge, times its length
    return np.hypot(over, down).max((1, 2)), (off.max(2) / np.hypot(edge_x, edge_y)).min(1)
