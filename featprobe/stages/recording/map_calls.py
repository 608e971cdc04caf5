"""Calls of a map of pixels: its components at a base threshold, each with the largest value inside as its score.

A higher threshold drops whole calls, so the calls at the base hold those at every threshold above it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from featprobe.metrics.defects.records import Floats
from featprobe.regions import Places, Regions, regions_of
from featprobe.targets import Labels


@dataclass(frozen=True)
class MapCalls:
    """The calls of one image, by class and then in the order of their first pixels, row by row.

    regions: where each is. category: (n,), uint8; 0 where classes are not known. score: (n,), the largest value inside.
    layers: how many maps lie one under another, an empty row after each: the same at several bases.
    """

    regions: Regions
    category: NDArray[np.uint8]
    score: Floats
    layers: int = 1

    def __len__(self) -> int:
        return len(self.score)

    @property
    def area(self) -> NDArray[np.int64]:
        """(n,), pixels."""
        return self.regions.area

    @property
    def labels(self) -> NDArray[np.int32]:
        """(height, width), the number of a call from 1 on, 0 where there is none."""
        return self.regions.labels

    @property
    def boxes(self) -> Floats:
        """(n, 4), x1 y1 x2 y2, pixels."""
        return self.regions.boxes.astype(np.float32)

    @property
    def rows(self) -> int:
        """Rows from the first of a layer to the first of the next."""
        return self.regions.size[0] // self.layers

    @property
    def layer(self) -> Places:
        """(n,), which layer each is in."""
        return self.regions.first // (self.rows * self.regions.size[1])


def calls_of_map(values: Floats, base: float, classes: Labels | None = None) -> MapCalls:
    """The connected pixels (8 neighbours) of one class whose values reach the base, which is rounded to float32.

    values: (height, width); nan is below every base. classes: (height, width), the class of each pixel, >= 1; None for
    one class that is not known.

    >>> found = calls_of_map(np.array([[0.5, 0, 0.9], [0, 0.7, 0], [0, 0, 0]], np.float32), 0.5)
    >>> found.score.tolist(), found.area.tolist(), found.boxes.tolist()
    ([0.8999999761581421], [3], [[0.0, 0.0, 3.0, 2.0]])
    """
    above = values >= np.float32(base)
    regions = regions_of(above if classes is None else classes * above)
    return MapCalls(regions, _category(regions, classes), regions.highest(values))


def calls_at_bases(values: Floats, bases: Sequence[float], classes: Labels | None = None) -> MapCalls:
    """The same at several bases, rising, each in a layer of its own: at once is faster than one after another.

    >>> found = calls_at_bases(np.array([[0.5, 0, 0.9], [0.5, 0.2, 0.7]], np.float32), (0.1, 0.5))
    >>> found.score.tolist(), found.area.tolist(), found.layer.tolist()
    ([0.8999999761581421, 0.5, 0.8999999761581421], [5, 2, 2], [0, 1, 1])
    """
    height, width = values.shape
    shown = np.zeros((len(bases), height + 1, width), np.uint8)
    for layer, base in zip(shown, bases, strict=True):
        np.multiply(values >= np.float32(base), np.uint8(1) if classes is None else classes, out=layer[:-1])
    regions = regions_of(shown.reshape(-1, width))
    found = MapCalls(regions, _category(regions, classes), np.zeros(len(regions), np.float32), len(bases))
    layer, apart = found.layer, (height + 1) * width
    lower = regions.at(regions.first - apart)  # the call at the next lower base that holds each
    top = np.ones(len(regions), bool)
    top[lower[layer > 0]] = False
    score = regions.highest(values, top, layer * apart)
    for k in range(len(bases) - 1, 0, -1):
        own = layer == k
        np.maximum.at(score, lower[own], score[own])
    return replace(found, score=score)


def _category(regions: Regions, classes: Labels | None) -> NDArray[np.uint8]:
    return np.zeros_like(regions.value) if classes is None else regions.value
