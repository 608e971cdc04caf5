"""Masks as polygons, for programs in which people correct labels: most of them import no run lengths."""

from collections.abc import Iterator

import numpy as np
import scipy
from numpy.typing import NDArray

from featprobe.targets import Rle, decode_window

TOLERANCE = 0.75
"""Pixels by which a shorter outline may pass a corner of the exact one: it makes slanted steps a line."""
AREA_TOLERANCE = 0.02
"""Largest share by which the area of a shorter outline may differ; else the exact one stays."""
STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))  # x, y of a step to the east, south, west and north

Ring = NDArray[np.float64]
"""Corners of a closed outline, (points, 2), x y in pixels; the first is not repeated."""


def polygons_of(rle: Rle) -> list[list[float]]:
    """The parts of a mask as COCO's polygons, [x1, y1, x2, y2, …] in pixels, the largest part first.

    rle: compressed COCO RLE. A part is a connected component, also over corners. A hole is joined to the outline by a
    cut without width, so that each part is one polygon. Outlines run along the edges of pixels, or within TOLERANCE of
    them where that takes fewer points. An empty mask has none.
    """
    (rows, columns), mask = decode_window(rle)
    if not mask.any():
        return []
    numbered, _ = scipy.ndimage.label(mask, structure=np.ones((3, 3)))
    parts = []
    for number, (down, across) in enumerate(scipy.ndimage.find_objects(numbered), start=1):
        own = numbered[down, across] == number
        ring = _joined([_shorter(ring) for ring in rings(own)])
        ring += (columns.start + across.start, rows.start + down.start)
        parts.append((int(own.sum()), ring))
    return [[float(v) for v in ring.ravel()] for _, ring in sorted(parts, key=lambda part: -part[0])]


def rings(mask: NDArray[np.bool_]) -> list[Ring]:
    """The outlines of a mask along the edges of its pixels: clockwise round its parts, the other way round its holes.

    Pixels that touch at a corner are connected.

    >>> [ring.tolist() for ring in rings(np.array([[1, 0], [0, 1]], dtype=bool))]
    [[[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [2.0, 1.0], [2.0, 2.0], [1.0, 2.0], [1.0, 1.0], [0.0, 1.0]]]
    """
    leaving, width = _edges(mask)
    found = []
    for start in np.flatnonzero(np.frombuffer(leaving, np.uint8) & 1).tolist():  # each ring has a step to the east
        if leaving[start] & 1:
            corners = np.array(list(_corners(leaving, start, width)))
            found.append(np.stack([corners % width, corners // width], axis=1).astype(np.float64))
    return found


def _edges(mask: NDArray[np.bool_]) -> tuple[bytearray, int]:
    """Of each corner of pixels, row by row, the directions in which an edge leaves it, as bits; and corners in a row.

    The mask lies to the right of each edge.
    """
    down = np.diff(np.pad(mask, 1).astype(np.int8), axis=0)[:, 1:-1]  # (height + 1, width)
    across = np.diff(np.pad(mask, 1).astype(np.int8), axis=1)[1:-1]  # (height, width + 1)
    leaving = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), dtype=np.uint8)
    leaving[:, :-1] |= (down == 1).astype(np.uint8)
    leaving[:-1] |= (across == -1).astype(np.uint8) << 1
    leaving[:, 1:] |= (down == -1).astype(np.uint8) << 2
    leaving[1:] |= (across == 1).astype(np.uint8) << 3
    return bytearray(leaving.tobytes()), leaving.shape[1]


def _corners(leaving: bytearray, start: int, width: int) -> Iterator[int]:
    """The corners of the ring that leaves a corner to the east, whose edges are taken out."""
    at, heading = start, 0
    yield start
    while True:
        leaving[at] &= ~(1 << heading)
        at += STEPS[heading][0] + STEPS[heading][1] * width
        turns = (heading - 1) % 4, heading, (heading + 1) % 4  # where pixels touch at a corner, on to the other one
        onward = next((turn for turn in turns if leaving[at] >> turn & 1), None)
        if onward is None:  # back at the start
            return
        if onward != heading:
            yield at
        heading = onward


def _shorter(ring: Ring) -> Ring:
    """A ring with fewer points, within TOLERANCE of the exact one and of about its area; else the ring itself."""
    first = int(((ring - ring[0]) ** 2).sum(1).argmax())  # far from the first point: both stay
    kept = np.zeros(len(ring) + 1, dtype=bool)
    kept[[0, first, len(ring)]] = True
    closed = np.concatenate([ring, ring[:1]])
    waiting = [(0, first), (first, len(ring))]
    while waiting:
        begin, end = waiting.pop()
        if end - begin < 2:
            continue
        off = _off(closed[begin + 1 : end], closed[begin], closed[end])
        if off.max() > TOLERANCE:
            middle = begin + 1 + int(off.argmax())
            kept[middle] = True
            waiting += [(begin, middle), (middle, end)]
    short = ring[kept[:-1]]
    exact = _area(ring)
    return short if abs(_area(short) - exact) <= AREA_TOLERANCE * abs(exact) else ring


def _off(points: Ring, begin: NDArray[np.float64], end: NDArray[np.float64]) -> NDArray[np.float64]:
    """The distance of points from the line between two, or from the one where both are the same."""
    (x, y), (across, down) = end - begin, (points - begin).T
    length = float(np.hypot(x, y))
    return np.abs(x * down - y * across) / length if length else np.hypot(across, down)


def _area(ring: Ring) -> float:
    """Square pixels, below 0 for a ring round a hole."""
    x, y = ring.T
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)


def _joined(parts: list[Ring]) -> Ring:
    """One ring of an outline and of those round its holes, each joined by a cut to the nearest corner."""
    whole = parts[0]
    for hole in parts[1:]:
        at = int(((whole - hole[0]) ** 2).sum(1).argmin())
        whole = np.concatenate([whole[: at + 1], hole, hole[:1], whole[at:]])
    return whole
