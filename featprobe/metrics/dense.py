"""The scores of dense heads, each as a number and as a Statistic that intervals are made from; PIXEL_SCORES names them.

Both come from confusion matrices over all pixels of a split.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from featprobe.errors import ShapeError
from featprobe.metrics.intervals import Floats, Names, Statistic, grouped
from featprobe.metrics.semantic import Absent, Counts, Ratio, iou_counts, mean_of_known, ratio_of_each, takes_part


class PixelScore(Protocol):
    """A score of dense heads. Rows of a confusion matrix are the truth; absent: as iou_scores takes it."""

    def value(self, matrix: Counts, absent: Absent) -> float:
        """The score of a confusion matrix, (classes, classes): in [0, 1], nan where there is none."""
        ...

    def statistic(self, matrices: Counts, names: Names, absent: Absent) -> Statistic:
        """The same as a function of how often each group counts: (groups, classes, classes), in the order of names."""
        ...


@dataclass(frozen=True)
class ClassMean:
    """The mean over classes of a ratio of pixels. background: whether class 0 is one of them."""

    ratio: Ratio
    background: bool

    def value(self, matrix: Counts, absent: Absent) -> float:
        """As PixelScore has it."""
        every = ratio_of_each(matrix, self.ratio, absent)
        return mean_of_known(every if self.background else every[1:])

    def statistic(self, matrices: Counts, names: Names, absent: Absent) -> Statistic:
        """As PixelScore has it."""
        counted = takes_part(matrices.sum(0), absent)
        counted[0] &= self.background
        part, whole = (own[:, counted].astype(float) for own in self.ratio(matrices))  # (groups, classes)
        return Statistic(*mean_ratio(part, whole), (names,))


PIXEL_SCORES: Mapping[str, PixelScore] = {
    "miou": ClassMean(iou_counts, background=True),
    "miou_foreground": ClassMean(iou_counts, background=False),
}
"""Scores of dense heads, by their names in featprobe.scores."""


def pixel_scores(matrix: Counts, absent: Absent = "ignore") -> dict[str, float]:
    """Each of PIXEL_SCORES of a confusion matrix, (classes, classes); nan for one that does not exist.

    absent: as iou_scores takes it.

    >>> found = pixel_scores(np.array([[3, 1], [0, 4]]))
    >>> found["miou"], found["miou_foreground"]
    (0.775, 0.8)
    """
    return {name: score.value(matrix, absent) for name, score in PIXEL_SCORES.items()}


def pixel_statistic(
    confusions: NDArray[np.int64],
    groups: Sequence[str] | None = None,
    score: str = "miou_foreground",
    absent: Absent = "ignore",
) -> Statistic:
    """A score of dense heads, as pixel_scores gives it for the images of a resample.

    confusions: (images, classes, classes), pixels; rows are the truth. groups: the group of each image; None: each
    image is a group. score: a name of PIXEL_SCORES. absent: see iou_scores. It decides on the whole split which classes
    count, and these count in every resample, so the number of classes in the mean is fixed. A class that the truth of a
    resample lacks has the IoU 0 there if it is predicted; otherwise its IoU on the whole split is used, so that the
    mean does not jump. The same holds for other scores.
    Raises ShapeError when the arrays disagree, or hold no image.

    Using the IoU on the whole split also where the class is predicted would hide how little is known about a rare
    class: benchmarks/coverage.py measures it.
    """
    confusions = np.asarray(confusions)
    if confusions.ndim != 3 or confusions.shape[1] != confusions.shape[2] or not len(confusions):
        raise ShapeError(f"Confusions of shape {confusions.shape} are not (images, classes, classes) of some images.")
    names, sums = _sums(confusions, groups)
    return PIXEL_SCORES[score].statistic(sums, names, absent)


def _sums(confusions: NDArray[np.int64], groups: Sequence[str] | None) -> tuple[Names, NDArray[np.int64]]:
    """Names of the groups, and the confusion matrix per group: (groups, classes, classes)."""
    if groups is None:
        return tuple(map(str, range(len(confusions)))), confusions
    if len(groups) != len(confusions):
        raise ShapeError(f"{len(groups)} groups do not belong to {len(confusions)} images.")
    names, index = grouped(groups)
    sums = np.zeros((len(names), *confusions.shape[1:]), dtype=np.int64)
    np.add.at(sums, index, confusions)
    return names, sums


def mean_ratio(hit: Floats, union: Floats) -> tuple[Callable[[Floats], Floats], Callable[[Floats], Floats]]:
    """The statistic of the mean over classes of sum(hit) / sum(union) over groups; hit, union: (groups, classes)."""
    classes = hit.shape[1]
    whole = hit.sum(0) / np.maximum(union.sum(0), 1)  # (classes,)

    def ratio(weights: Floats) -> tuple[Floats, Floats]:
        """IoU, and its change per hit pixel: both (resamples, classes)."""
        unions = weights @ union  # (resamples, classes)
        known, divisor = unions > 0, np.maximum(unions, 1)  # pixels
        return np.where(known, weights @ hit / divisor, whole), known / divisor

    def value(weights: Floats) -> Floats:
        return ratio(weights)[0].mean(1) if classes else np.full(len(weights), np.nan)

    def influence(weights: Floats) -> Floats:
        iou, per_pixel = ratio(weights)
        slope = per_pixel / max(1, classes)
        return slope @ hit.T - (slope * iou) @ union.T

    return value, influence


def groups_with_truth(confusions: NDArray[np.int64], groups: Sequence[str] | None = None) -> tuple[int, ...]:
    """The number of groups whose truth holds each class, (classes,): on these the interval of its IoU rests.

    confusions, groups: see pixel_statistic. A class in only one group hardly widens an interval, because one group does
    not show how others would score.
    """
    return tuple((_sums(confusions, groups)[1].sum(2) > 0).sum(0).tolist())
