"""Calls of a map of pixels: its components at a base threshold, each with the largest value inside as its score.

A higher threshold drops whole calls, so the calls at the base hold those at every threshold above it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featprobe.metrics.defects.records import Floats
from featprobe.regions import Regions, regions_of
from featprobe.targets import Labels


@dataclass(frozen=True)
class MapCalls:
    """The calls of one image, by class and then in the order of their first pixels, row by row.

    regions: where each is. category: (n,), uint8; 0 where classes are not known. score: (n,), the largest value inside.
    """

    regions: Regions
    category: NDArray[np.uint8]
    score: Floats

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


def calls_of_map(
    values: Floats, base: float, classes: Labels | None = None, higher: MapCalls | None = None
) -> MapCalls:
    """The connected pixels (8 neighbours) of one class whose values reach the base, which is rounded to float32.

    values: (height, width); nan is below every base. classes: (height, width), the class of each pixel, >= 1; None for
    one class that is not known. higher: the calls of the same map at a higher base, whose scores need no second search.

    >>> found = calls_of_map(np.array([[0.5, 0, 0.9], [0, 0.7, 0], [0, 0, 0]], np.float32), 0.5)
    >>> found.score.tolist(), found.area.tolist(), found.boxes.tolist()
    ([0.8999999761581421], [3], [[0.0, 0.0, 3.0, 2.0]])
    """
    above = values >= np.float32(base)
    regions = regions_of(above if classes is None else classes * above)
    known = np.full(len(regions), -np.inf, np.float32)
    if higher is not None:
        np.maximum.at(known, regions.at(higher.regions.first), higher.score)
    category = np.zeros_like(regions.value) if classes is None else regions.value
    return MapCalls(regions, category, regions.highest(values, known))
