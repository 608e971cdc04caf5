"""Contrast to noise of defects: how clearly one stands out of what is around it, in the raw levels of its image."""

from collections.abc import Sequence
from math import ceil, nan

import numpy as np
from numpy.typing import NDArray

from featprobe.datasets.images.pixels import Levels
from featprobe.metrics.defects.records import Floats
from featprobe.stages.recording.sizes import Window, pixels_of
from featprobe.targets import Instance

GAP = 1
"""Pixels around a defect that count neither inside nor around it: its edge lies there."""
NARROWEST, WIDEST = 3, 32
"""Pixels, limits of the width of the ring around a defect, which is half the square root of its area."""
FEWEST = 20
"""Pixels that a ring needs, for its standard deviation to mean something."""
LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in grey (ITU-R BT.601)."""


def contrasts(levels: Levels, defects: Sequence[Instance], ignored: Sequence[Instance]) -> Floats:
    """Contrast to noise of each defect of an image, (defects,): |mean inside - mean of the ring| / its deviation.

    levels: (height, width), or (height, width, 3), of which the grey counts. The ring holds no pixel of another defect
    or of an ignored region, and pixels that the image's header calls empty count nowhere. nan where a ring has fewer
    than FEWEST pixels or one level alone, and where no pixel of a defect counts.
    """
    size = levels.shape[0], levels.shape[1]
    if not defects:
        return np.zeros(0, np.float32)
    taken = np.zeros(size, bool)
    if isinstance(levels, np.ma.MaskedArray):
        taken |= _any_channel(np.ma.getmaskarray(levels))
        levels = levels.data
    empty = taken.copy()
    shown = [pixels_of(defect, size) for defect in defects]
    for window, mask in [*shown, *(pixels_of(region, size) for region in ignored)]:
        taken[window] |= mask
    return np.array([_contrast(levels, taken, empty, *own) for own in shown], np.float32)


def _contrast(
    levels: Levels, taken: NDArray[np.bool_], empty: NDArray[np.bool_], window: Window, mask: NDArray[np.bool_]
) -> float:
    """Of one defect. taken: pixels of no ring, (height, width). empty: pixels without a level, (height, width)."""
    from scipy import ndimage  # it takes time, and most words of a command line need none of it

    width = min(max(NARROWEST, ceil(np.sqrt(mask.sum()) / 2)), WIDEST)
    margin = width + GAP
    rows, columns = (slice(max(0, one.start - margin), one.stop + margin) for one in window)  # ends at the image's own
    inside = np.zeros_like(taken[rows, columns])
    inside[window[0].start - rows.start :, window[1].start - columns.start :][: mask.shape[0], : mask.shape[1]] = mask
    if not inside.any():
        return nan
    near, far = (ndimage.maximum_filter(inside.view(np.uint8), 2 * reach + 1) > 0 for reach in (GAP, margin))
    ring = far & ~near & ~taken[rows, columns]
    inside &= ~empty[rows, columns]
    if ring.sum() < FEWEST or not inside.any():
        return nan
    around = _grey(levels[rows, columns][ring])
    noise = float(around.std())
    return abs(float(_grey(levels[rows, columns][inside]).mean() - around.mean())) / noise if noise else nan


def _grey(pixels: Levels) -> NDArray[np.float64]:
    """The grey of pixels of one or three channels, (pixels,)."""
    return pixels.astype(np.float64) if pixels.ndim == 1 else pixels.astype(np.float64) @ np.array(LUMA)


def _any_channel(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return np.logical_or.reduce(mask, axis=2) if mask.ndim == 3 else mask
