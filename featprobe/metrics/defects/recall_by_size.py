"""Recall by the size of defects, in octaves, with intervals that allow for parts with several defects."""

from dataclasses import dataclass
from math import inf, nan

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featprobe.errors import DataError
from featprobe.metrics.defects.records import Records, Size, Unit
from featprobe.metrics.defects.shares import clustered_interval
from featprobe.metrics.intervals import grouped


@dataclass(frozen=True)
class SizeBin:
    """Defects of a size of at least `least` and below `below`, and how many of them are found.

    low, high: the 95 % interval of the recall, see `clustered_interval`; nan without a defect. groups: those that hold
    such a defect.
    """

    least: float
    below: float
    defects: int
    found: int
    low: float
    high: float
    groups: int

    @property
    def recall(self) -> float:
        """Share of its defects that are found; nan without a defect."""
        return self.found / self.defects if self.defects else nan


def recall_by_size(
    records: Records, threshold: ArrayLike, size: Size = "root_area", unit: Unit = "px"
) -> tuple[SizeBin, ...]:
    """Recall in octaves of size at a threshold: of all images, or one for each, (images,).

    The octaves are from 2^k to 2^(k + 1), in the unit, from that of the smallest to that of the largest defect; none
    where there is no defect, or where images have one score, because no defect is found by itself then.
    Raises DataError where the size of a defect is not known in this unit, as in mm without a pixel size.
    """
    if records.about.pooled or not len(records.defects):
        return ()
    sizes = records.defects.size(size, unit).astype(float)
    unknown = ~(np.isfinite(sizes) & (sizes > 0))
    if unknown.any():
        images = sorted({records.images.ids[i] for i in records.defects.image[unknown]})
        raise DataError(
            f"The size of {unknown.sum()} of {len(sizes)} defects is not known in {unit}, first in {images[0]}.\n"
            + (
                "Give pixel_size in featprobe.toml, in mm, and inspect with --rescore; or omit the unit."
                if unit == "mm"
                else "Make the records anew with --rescore."
            )
        )
    octave = np.frexp(sizes)[1] - 1  # exact: 2^octave <= size < 2^(octave + 1)
    first = int(octave.min())
    ends = [(2.0**k, 2.0 ** (k + 1)) for k in range(first, int(octave.max()) + 1)]
    return _bins(records, threshold, octave - first, ends)


def recall_of(records: Records, threshold: ArrayLike) -> SizeBin:
    """Recall of the defects of all sizes at a threshold: of all images, or one for each, (images,).

    Where images have one score, the images with a defect stand for defects.
    """
    own = records.judged()
    return _bins(own, threshold, np.zeros(len(own.defects), dtype=int), [(0.0, inf)])[0]


def _bins(
    records: Records, threshold: ArrayLike, place: NDArray[np.int_], ends: list[tuple[float, float]]
) -> tuple[SizeBin, ...]:
    """place: the bin of each defect, (defects,)."""
    names, group = grouped(records.images.groups)
    shape = len(ends), len(names)
    cell = place * len(names) + group[records.defects.image]
    found = records.found(threshold)
    trials, hits = (
        np.bincount(own, minlength=shape[0] * shape[1]).reshape(shape).astype(float) for own in (cell, cell[found])
    )
    low, high = clustered_interval(hits, trials)
    return tuple(
        SizeBin(least, below, int(n.sum()), int(x.sum()), float(a), float(b), int(np.sum(n > 0)))
        for (least, below), x, n, a, b in zip(ends, hits, trials, low, high, strict=True)
    )
