"""Intersection over union, and other ratios of each class, from one confusion matrix over a whole split."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from featprobe.errors import ShapeError
from featprobe.targets import IGNORE, Labels

Absent = Literal["zero", "ignore"]


@dataclass(frozen=True)
class IouScores:
    """IoU in [0, 1]; nan for a class that does not count.

    miou: mean over classes, with the background. miou_foreground: mean without the background.
    """

    miou: float
    miou_foreground: float
    per_class: tuple[float, ...]


def confusion_matrix(truth: Labels, predicted: Labels, classes: int) -> NDArray[np.int64]:
    """The number of pixels per true class (row) and predicted class (column): (classes, classes).

    truth, predicted: (height, width), uint8. Pixels with truth 255 are left out. Raises ShapeError where they differ in
    shape.

    >>> confusion_matrix(np.array([[0, 1, 255]], np.uint8), np.array([[0, 0, 1]], np.uint8), 2).tolist()
    [[1, 0], [1, 0]]
    """
    if truth.shape != predicted.shape:
        raise ShapeError(f"Truth {truth.shape} and prediction {predicted.shape} disagree.")
    counted = truth != IGNORE
    pairs = truth[counted].astype(np.intp) * classes + predicted[counted]
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


Counts = NDArray[np.int64]
Ratio = Callable[[Counts], tuple[Counts, Counts]]
"""Confusion matrices, (..., classes, classes), to a numerator and a denominator for each class, both (..., classes).

Each is a sum of entries of the matrix, so that the counts of several images are the sums of their counts."""


def iou_counts(matrix: Counts) -> tuple[Counts, Counts]:
    """Pixels that truth and prediction share, and pixels of either, of each class; see Ratio."""
    hit = np.diagonal(matrix, axis1=-2, axis2=-1)
    return hit, matrix.sum(-1) + matrix.sum(-2) - hit


def iou_scores(matrix: Counts, absent: Absent = "ignore") -> IouScores:
    """IoU per class and their means, from a confusion matrix.

    With absent="ignore" (as in Detectron2) the classes of the truth count: a class that is predicted but not in the
    truth does not count, and its pixels count against the classes that they truly belong to. With "zero" (as in
    DINOv3's evaluation) it scores 0, so a single pixel can cost many points. A class in neither never counts.
    """
    per_class = ratio_of_each(matrix, iou_counts, absent)
    return IouScores(mean_of_known(per_class), mean_of_known(per_class[1:]), tuple(per_class.tolist()))


def takes_part(matrix: Counts, absent: Absent) -> NDArray[np.bool_]:
    """Whether each class does, (classes,), by the rule of iou_scores; matrix: of a whole split."""
    truth = matrix.sum(1)
    return np.asarray((truth + matrix.sum(0) if absent == "zero" else truth) > 0)


def ratio_of_each(matrix: Counts, ratio: Ratio, absent: Absent) -> NDArray[np.float64]:
    """The ratio of each class, (classes,); nan for one that takes no part."""
    part, whole = ratio(matrix)
    counted = takes_part(matrix, absent)
    found = np.full(len(matrix), np.nan)
    found[counted] = part[counted] / np.maximum(whole[counted], 1)
    return found


def mean_of_known(values: NDArray[np.float64]) -> float:
    """Their mean without nan; nan where all are."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
