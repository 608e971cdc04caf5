"""Calls of a map of pixels: its components at a base threshold, each with the largest value inside as its score.

A higher threshold drops whole calls, so the calls at the base hold those at every threshold above it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featprobe.metrics.defects.records import Floats
from featprobe.targets import Labels

CORNERS = np.ones((3, 3), dtype=bool)  # pixels that touch at a corner are connected


@dataclass(frozen=True)
class MapCalls:
    """The calls of one image, by class and then in the order of their first pixels, row by row.

    labels: (height, width), int32; the number of a call from 1 on, 0 where there is none. windows: the rows and the
    columns that each covers. category: (n,), uint8; 0 where classes are not known. area: (n,), pixels. score: (n,),
    the largest value inside.
    """

    labels: NDArray[np.int32]
    windows: tuple[tuple[slice, slice], ...]
    category: NDArray[np.uint8]
    area: NDArray[np.int64]
    score: Floats

    def __len__(self) -> int:
        return len(self.score)

    @property
    def boxes(self) -> Floats:
        """(n, 4), x1 y1 x2 y2, pixels."""
        edges = [(columns.start, rows.start, columns.stop, rows.stop) for rows, columns in self.windows]
        return np.array(edges, dtype=np.float32).reshape(-1, 4)


def calls_of_map(values: Floats, base: float, classes: Labels | None = None) -> MapCalls:
    """The connected pixels (8 neighbours) of one class whose values reach the base, which is rounded to float32.

    values: (height, width); nan is below every base. classes: (height, width), the class of each pixel, >= 1; None for
    one class that is not known.

    >>> found = calls_of_map(np.array([[0.5, 0, 0.9], [0, 0.7, 0], [0, 0, 0]], np.float32), 0.5)
    >>> found.score.tolist(), found.area.tolist(), found.boxes.tolist()
    ([0.8999999761581421], [3], [[0.0, 0.0, 3.0, 2.0]])
    """
    from scipy import ndimage  # it takes time, and inspecting records needs none of it

    above = values >= np.float32(base)
    labels = np.zeros(values.shape, dtype=np.int32)
    shown = above.view(np.uint8) if classes is None else np.where(above, classes, 0)
    category: list[int] = []
    for index, window in enumerate(ndimage.find_objects(shown), start=1):
        if window is None:
            continue
        own = shown[window] == index
        numbered, count = ndimage.label(own, structure=CORNERS)
        np.copyto(labels[window], numbered + len(category), where=own)
        category += [0 if classes is None else index] * count
    inside = np.flatnonzero(labels)
    own_call = labels.ravel()[inside] - 1
    score = np.full(len(category), -np.inf, dtype=np.float32)
    np.maximum.at(score, own_call, values.ravel()[inside])
    return MapCalls(
        labels, tuple(ndimage.find_objects(labels)), np.array(category, dtype=np.uint8),
        np.bincount(own_call, minlength=len(category)), score,
    )  # fmt: skip
