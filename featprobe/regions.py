"""Connected regions of equal values in an image, kept as runs of pixels: a run is part of one row.

Most images have few runs, so that only finding them looks at every pixel.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Places = NDArray[np.intp]


class Runs(NamedTuple):
    """Runs of an image, row by row and from left to right: (runs,) each, the row, the first column, and that after the
    last."""

    row: Places
    left: Places
    right: Places

    def within(self, width: int) -> tuple[Places, Places]:
        """The first pixel of each and that after the last, as places in a flattened image of this width."""
        return self.row * width + self.left, self.row * width + self.right

    def moved(self, down: int, across: int) -> "Runs":
        """The same, further down and to the right."""
        return Runs(self.row + down, self.left + across, self.right + across)

    @classmethod
    def joined(cls, parts: Sequence["Runs"]) -> "Runs":
        """Those of several parts, one part after another."""
        return cls(*np.concatenate([np.zeros((3, 0), np.intp), *(np.stack(own) for own in parts)], axis=1))


def runs_of(shown: NDArray[np.uint8] | NDArray[np.bool_]) -> tuple[Runs, NDArray[np.uint8]]:
    """The runs of equal values but 0 of a (height, width) image, and the value of each.

    >>> runs, value = runs_of(np.array([[0, 3, 3], [4, 4, 5]], np.uint8))
    >>> runs.row.tolist(), runs.left.tolist(), runs.right.tolist(), value.tolist()
    ([0, 1, 1], [1, 0, 2], [3, 2, 3], [3, 4, 5])
    """
    height, width = shown.shape
    apart = width + 1  # a pixel of background after each row, so that every run ends in it
    flat = np.zeros(1 + height * apart, np.uint8)
    flat[1:].reshape(height, apart)[:, :-1] = shown
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    value = flat[1:][edges]
    some = np.flatnonzero(value)
    row = edges[some] // apart
    return Runs(row, edges[some] - row * apart, edges[some + 1] - row * apart), value[some]


@dataclass(frozen=True)
class Regions:
    """The regions of an image of `size`, (height, width), by value and then in the order of their first pixels.

    value: (regions,), uint8. runs: of all; region: (runs,), which each is part of.
    """

    size: tuple[int, int]
    value: NDArray[np.uint8]
    runs: Runs
    region: Places

    def __len__(self) -> int:
        return len(self.value)

    @cached_property
    def _edges(self) -> tuple[Places, Places]:
        return self.runs.within(self.size[1])

    @cached_property
    def area(self) -> NDArray[np.int64]:
        """(regions,), pixels."""
        return np.bincount(self.region, self.runs.right - self.runs.left, len(self)).astype(np.int64)

    @cached_property
    def first(self) -> Places:
        """(regions,), the place of the first pixel in the flattened image."""
        return _least(self.region, self._edges[0], len(self))

    @cached_property
    def boxes(self) -> Places:
        """(regions, 4), x1 y1 x2 y2, pixels."""
        row, left, right = self.runs
        ends = (-_least(self.region, -own, len(self)) for own in (right, row + 1))
        return np.stack([_least(self.region, left, len(self)), self.first // self.size[1], *ends], axis=1)

    @cached_property
    def labels(self) -> NDArray[np.int32]:
        """(height, width), the number of the region of each pixel from 1 on, 0 for none."""
        edges = np.stack(self._edges, axis=1).ravel()
        shown = np.zeros(len(edges) + 1, np.int32)
        shown[1::2] = self.region + 1
        return np.repeat(shown, np.diff(edges, prepend=0, append=self.size[0] * self.size[1])).reshape(self.size)

    def highest(
        self, values: NDArray[np.float32], which: NDArray[np.bool_] | None = None, off: Places | None = None
    ) -> NDArray[np.float32]:
        """(regions,), the largest of the values, (height, width), in each. None may be nan there.

        which: those that are asked for, (regions,); of the others it is -inf. off: (regions,), how much further on the
        places of each are than those of its values.
        """
        runs = np.arange(len(self.region)) if which is None else np.flatnonzero(which[self.region])
        region = self.region[runs]
        start, stop = (own[runs] - (0 if off is None else off[region]) for own in self._edges)
        found = np.full(len(self), -np.inf, np.float32)
        if len(runs):
            _, inside = _ranges(start, stop)
            of_runs = np.maximum.reduceat(values.ravel()[inside], np.cumsum(stop - start) - (stop - start))
            np.maximum.at(found, region, of_runs)
        return found

    def at(self, places: Places) -> Places:
        """The region at each of some places in the flattened image, -1 for none."""
        place, region, _ = self.meet(places, places + 1)
        found = np.full(len(places), -1, np.intp)
        found[place] = region
        return found

    def meet(self, start: Places, stop: Places) -> tuple[Places, Places, Places]:
        """Where intervals of places in the flattened image meet runs: the interval, the region, how many pixels meet.

        (meetings,) each, interval after interval; one may meet several runs of a region. start, stop: (intervals,).
        """
        first, last = np.searchsorted(self._edges[1], start, "right"), np.searchsorted(self._edges[0], stop)
        interval, run = _ranges(first, last)
        shared = np.minimum(self._edges[1][run], stop[interval]) - np.maximum(self._edges[0][run], start[interval])
        return interval, self.region[run], shared


def regions_of(shown: NDArray[np.uint8] | NDArray[np.bool_]) -> Regions:
    """The regions of equal values but 0 of a (height, width) image. Pixels that touch at a corner are connected.

    >>> found = regions_of(np.array([[2, 0, 1, 1], [0, 2, 0, 0], [0, 0, 0, 1]], np.uint8))
    >>> found.value.tolist(), found.area.tolist(), found.boxes.tolist()
    ([1, 1, 2], [2, 1, 2], [[2, 0, 4, 1], [3, 2, 4, 3], [0, 0, 2, 2]])
    """
    height, width = shown.shape
    return regions_of_runs((height, width), *runs_of(shown))


def regions_of_runs(size: tuple[int, int], runs: Runs, value: NDArray[np.uint8]) -> Regions:
    """The regions of an image of `size` by its runs, and the value of each run."""
    height, width = size
    apart = width + 1  # rows meet nowhere
    order = np.argsort(value, kind="stable")
    page = value[order].astype(np.intp) * (height + 1) * apart  # values are connected each for itself
    start, stop = (own[order] + page for own in runs.within(apart))
    found, count = _connected(start, stop, apart)
    region, of_value = np.empty_like(found), np.zeros(count, np.uint8)
    region[order] = found
    of_value[region] = value
    return Regions(size, of_value, runs, region)


def _connected(start: Places, stop: Places, apart: int) -> tuple[Places, int]:
    """The region of each run, (runs,), in the order of their first runs, and how many there are. apart: of two rows."""
    first, last = np.searchsorted(stop, start + apart), np.searchsorted(start, stop + apart, "right")
    run, below = _ranges(first, last)  # those that touch in the next row
    least = np.arange(len(start))  # of each run the least run that it is known to be connected to
    while not np.array_equal(one := least[run], other := least[below]):
        np.minimum.at(least, np.maximum(one, other), np.minimum(one, other))
        while not np.array_equal(further := least[least], least):
            least = further
    roots = np.flatnonzero(least == np.arange(len(start)))
    return np.searchsorted(roots, least), len(roots)


def _ranges(first: Places, last: Places) -> tuple[Places, Places]:
    """The numbers from each first to before its last, one range after another, and before them which range each is of.

    >>> _ranges(np.array([3, 9, 5]), np.array([5, 8, 6]))
    (array([0, 0, 2]), array([3, 4, 5]))
    """
    counts = np.maximum(last - first, 0)
    ends = np.cumsum(counts)
    own = np.repeat(np.arange(len(counts)), counts)
    return own, np.arange(len(own)) + (first - ends + counts)[own]


def _least(group: Places, values: Places, groups: int) -> Places:
    """(groups,), the least of the values of each group, of which none is empty."""
    found = np.full(groups, np.iinfo(np.intp).max)
    np.minimum.at(found, group, values)
    return found
