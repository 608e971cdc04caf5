"""Resizing as two matrix products: Pillow's own weights, one matrix for each axis.

Every runtime of ONNX multiplies matrices alike, while `Resize` differs between them: OpenVINO ignores its `antialias`.
"""

from collections.abc import Callable, Mapping
from math import cos, pi, sin

import numpy as np
from numpy.typing import NDArray

BICUBIC = -0.5  # Pillow's parameter of the cubic convolution


def _sinc(x: float) -> float:
    return 1.0 if x == 0 else sin(pi * x) / (pi * x)


def _box(x: float) -> float:
    return 1.0 if -0.5 < x <= 0.5 else 0.0


def _triangle(x: float) -> float:
    return max(0.0, 1.0 - abs(x))


def _hamming(x: float) -> float:
    return _sinc(x) * (0.54 + 0.46 * cos(pi * x)) if abs(x) < 1 else 0.0


def _cubic(x: float) -> float:
    x = abs(x)
    if x < 1:
        return ((BICUBIC + 2) * x - (BICUBIC + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * BICUBIC if x < 2 else 0.0


def _lanczos(x: float) -> float:
    return _sinc(x) * _sinc(x / 3) if -3 <= x < 3 else 0.0


FILTERS: Mapping[str, tuple[float, Callable[[float], float]]] = {
    "box": (0.5, _box),
    "bilinear": (1.0, _triangle),
    "hamming": (1.0, _hamming),
    "bicubic": (2.0, _cubic),
    "lanczos": (3.0, _lanczos),
}
"""Name -> half of its width in pixels, and its weight at a distance; Pillow's `Resample.c`."""


def weights_of(length: int, wanted: int, name: str) -> NDArray[np.float64]:
    """What a line of `length` pixels becomes when Pillow resizes it to `wanted`: (wanted, length), float64.

    name: one of FILTERS, or nearest. A smaller image is averaged over the filter, widened by the scale.

    >>> weights_of(4, 2, "box").tolist()
    [[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]
    """
    found = np.zeros((wanted, length))
    scale = length / wanted
    if name == "nearest":
        places = np.cumsum(np.r_[scale * 0.5, np.full(wanted - 1, scale)])  # added up one by one, as Pillow does
        found[np.arange(wanted), np.minimum(np.floor(places).astype(int), length - 1)] = 1
        return found
    half, weight = FILTERS[name]
    wide = max(scale, 1.0)
    for place in range(wanted):
        centre = (place + 0.5) * scale
        first, end = max(0, int(centre - half * wide + 0.5)), min(length, int(centre + half * wide + 0.5))
        own = np.array([weight((pixel - centre + 0.5) / wide) for pixel in range(first, end)])
        found[place, first:end] = own / own.sum()
    return found
