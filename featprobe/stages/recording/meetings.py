"""Where the calls and the defects of an image meet: overlaps of components of a map, and of detections."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from featprobe.metrics.defects.overlaps import Overlaps
from featprobe.metrics.defects.records import Indices
from featprobe.regions import Runs, runs_of
from featprobe.stages.recording.map_calls import MapCalls
from featprobe.targets import Instance, decode_window

Window = tuple[slice, slice]
Boxes = NDArray[np.float64]
PAIRS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Shape:
    """Where an object lies. box: x1, y1, x2, y2. mask: its pixels in `window`, the rows and columns that it covers;
    None for an object without a mask, or with an empty one.
    """

    box: tuple[float, float, float, float]
    window: Window = (slice(0, 0), slice(0, 0))
    mask: NDArray[np.bool_] | None = None

    @classmethod
    def of(cls, instance: Instance) -> "Shape":
        """The shape of an object."""
        if instance.rle is not None:
            window, mask = decode_window(instance.rle)
            if mask.any():
                return cls(instance.box_xyxy, window, mask)
        return cls(instance.box_xyxy)

    @property
    def pixels(self) -> NDArray[np.bool_]:
        """Its mask, which must be there."""
        if self.mask is None:
            raise TypeError("This shape has no mask.")
        return self.mask

    @cached_property
    def area(self) -> int:
        """Pixels of its mask."""
        return int(np.count_nonzero(self.pixels))

    @cached_property
    def runs(self) -> Runs:
        """The runs of its mask in the image."""
        return runs_of(self.pixels)[0].moved(self.window[0].start, self.window[1].start)

    @cached_property
    def center(self) -> tuple[int, int]:
        """Row and column of the pixel of its mask that is nearest to its centroid; of equals the first, row by row."""
        rows, columns = np.nonzero(self.pixels)
        nearest = int(np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2))
        return int(rows[nearest]) + self.window[0].start, int(columns[nearest]) + self.window[1].start


@dataclass(frozen=True)
class Ground:
    """The truth of an image, ready to be compared with calls. defects, ignored: shapes. category: (defects,)."""

    defects: tuple[Shape, ...]
    ignored: tuple[Shape, ...]
    category: NDArray[np.uint8]

    @classmethod
    def of(cls, objects: Sequence[Instance], ignored: Sequence[Instance]) -> "Ground":
        """That of an image with these objects, and these regions where nothing is known."""
        category = np.array([one.category for one in objects], np.uint8)
        return cls(tuple(map(Shape.of, objects)), tuple(map(Shape.of, ignored)), category)


def overlaps_of_map(calls: MapCalls, ground: Ground) -> Overlaps:
    """The overlaps of the calls of a map. Each of several layers has the defects for itself, in this order."""
    layers = np.arange(calls.layers)[:, None]

    def meet(shapes: Sequence[Shape]) -> _Met:
        masks, bare = _with_mask(shapes)
        found = _on_map(calls, [shapes[i] for i in masks]).of((layers * len(shapes) + masks).ravel())
        if not len(bare):
            return found
        boxes = calls.boxes.astype(np.float64) - (calls.layer * calls.rows)[:, None] * (0, 1, 0, 1)
        by_boxes = _boxes_meet(boxes, _boxes(shapes)[bare])
        return _joined(found, replace(by_boxes, other=calls.layer[by_boxes.call] * len(shapes) + bare[by_boxes.other]))

    category = np.tile(ground.category, calls.layers)
    return _overlaps(meet, calls.category, replace(ground, category=category))


def overlaps_of_objects(objects: Sequence[Instance], ground: Ground) -> Overlaps:
    """The overlaps of detections."""
    calls = [Shape.of(one) for one in objects]
    masked, _ = _with_mask(calls)

    def meet(shapes: Sequence[Shape]) -> _Met:
        masks, bare = _with_mask(shapes)
        near = _boxes_meet(_windows([calls[k] for k in masked]), _windows([shapes[i] for i in masks]))
        pairs = zip(masked[near.call].tolist(), masks[near.other].tolist(), strict=True)
        on_masks = [(k, i, *_masks_meet(calls[k], shapes[i])) for k, i in pairs]
        by_boxes = _boxes_meet(_boxes(calls), _boxes(shapes))
        without = ~np.isin(by_boxes.call, masked) | np.isin(by_boxes.other, bare)
        return _joined(_table([pair for pair in on_masks if pair[2]]), by_boxes.some(without))

    return _overlaps(meet, np.array([one.category for one in objects], np.uint8), ground)


@dataclass(frozen=True)
class _Met:
    """Pairs of a call and some other shape, as `Overlaps` has them."""

    call: Indices
    other: Indices
    shared: NDArray[np.float64]
    call_area: NDArray[np.float64]
    other_area: NDArray[np.float64]
    covers_center: NDArray[np.bool_]

    def of(self, others: Indices) -> "_Met":
        """The same, where the other shapes are those of these indices."""
        return replace(self, other=others[self.other])

    def some(self, which: NDArray[np.bool_]) -> "_Met":
        """Some of the pairs."""
        return _Met(*(getattr(self, field.name)[which] for field in fields(self)))


def _table(pairs: Sequence[tuple[int, int, float, float, float, bool]]) -> _Met:
    columns = list(zip(*pairs, strict=True)) or [()] * len(fields(_Met))
    kinds = (np.intp, np.intp, np.float64, np.float64, np.float64, np.bool_)
    return _Met(*(np.array(own, kind) for own, kind in zip(columns, kinds, strict=True)))


def _joined(*parts: _Met) -> _Met:
    return _Met(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(_Met)))


def _overlaps(meet: Callable[[Sequence[Shape]], _Met], category: NDArray[np.uint8], ground: Ground) -> Overlaps:
    met, ignored = meet(ground.defects), meet(ground.ignored)
    touches = np.zeros(len(category), bool)
    touches[ignored.call[ignored.shared > 0]] = True
    return Overlaps(
        met.call, met.other, met.shared, met.call_area, met.other_area, met.covers_center, category, ground.category,
        touches,
    )  # fmt: skip


def _with_mask(shapes: Sequence[Shape]) -> tuple[Indices, Indices]:
    """The indices of shapes with a mask, and of those without."""
    masked = np.array([shape.mask is not None for shape in shapes], bool)
    return np.flatnonzero(masked), np.flatnonzero(~masked)


def _boxes(shapes: Sequence[Shape]) -> Boxes:
    return np.array([shape.box for shape in shapes], np.float64).reshape(-1, 4)


def _windows(shapes: Sequence[Shape]) -> Boxes:
    """The boxes of the windows of masks."""
    edges = [(columns.start, rows.start, columns.stop, rows.stop) for rows, columns in (s.window for s in shapes)]
    return np.array(edges, np.float64).reshape(-1, 4)


def _on_map(calls: MapCalls, shapes: Sequence[Shape]) -> _Met:
    """Where the calls of a map meet masks, which are in each layer."""
    regions, area = calls.regions, calls.area.astype(np.float64)
    if not len(regions) or not shapes:
        return _table([])
    width, layers = regions.size[1], np.arange(calls.layers)[:, None]
    off = layers * calls.rows * width
    owner = np.repeat(np.arange(len(shapes)), [len(shape.runs.row) for shape in shapes])
    edges = Runs.joined([shape.runs for shape in shapes]).within(width)
    run, region, shared = regions.meet(*((own + off).ravel() for own in edges))
    pairs, place = np.unique((owner + layers * len(shapes)).ravel()[run] * len(regions) + region, return_inverse=True)
    other, call = np.divmod(pairs, len(regions))
    center = regions.at((np.array([shape.center for shape in shapes]) @ np.array((width, 1)) + off).ravel())
    other_area = np.tile([float(shape.area) for shape in shapes], calls.layers)
    both = np.bincount(place, shared, len(pairs)).astype(np.float64)
    return _Met(call, other, both, area[call], other_area[other], call == center[other])


def _masks_meet(call: Shape, other: Shape) -> tuple[int, int, int, bool]:
    """(pixels that two masks share, pixels of each, whether the first covers the center of the second)."""
    both = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(call.window, other.window, strict=True)]
    first, second = (
        shape.pixels[tuple(slice(s.start - w.start, s.stop - w.start) for s, w in zip(both, shape.window, strict=True))]
        for shape in (call, other)
    )
    inside = all(w.start <= at < w.stop for w, at in zip(call.window, other.center, strict=True))
    row, column = (at - w.start for w, at in zip(call.window, other.center, strict=True))
    return int(np.count_nonzero(first & second)), call.area, other.area, inside and bool(call.pixels[row, column])


def _boxes_meet(boxes: Boxes, others: Boxes) -> _Met:
    """Where boxes of calls, (calls, 4), meet other boxes, (others, 4)."""
    area, other_area = ((own[:, 2:] - own[:, :2]).prod(1) for own in (boxes, others))
    middle = (others[:, :2] + others[:, 2:]) / 2
    found = [_table([])]
    step = max(1, PAIRS_AT_ONCE // max(1, len(others)))
    for start in range(0, len(boxes) if len(others) else 0, step):
        part = boxes[start : start + step, None]
        sides = np.minimum(part[..., 2:], others[:, 2:]) - np.maximum(part[..., :2], others[:, :2])
        shared = sides.clip(min=0).prod(-1)  # (calls, others)
        covers: NDArray[np.bool_] = np.all((part[..., :2] <= middle) & (middle <= part[..., 2:]), axis=-1)
        call, other = np.nonzero((shared > 0) | covers)
        found.append(_Met(
            call + start, other, shared[call, other], area[call + start], other_area[other], covers[call, other]
        ))  # fmt: skip
    return _joined(*found)
