"""Scores of dense heads from one confusion matrix over a whole split. PIXEL_SCORES names them all."""

from collections.abc import Callable, Mapping
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


@dataclass(frozen=True)
class PixelScore:
    """A score of dense heads: the mean over classes of a ratio of pixels. background: whether it counts as a class."""

    ratio: Ratio
    background: bool


PIXEL_SCORES: Mapping[str, PixelScore] = {
    "miou": PixelScore(iou_counts, background=True),
    "miou_foreground": PixelScore(iou_counts, background=False),
}
"""By name, as featprobe.scores has it. The value in a result row and the interval of a comparison come from here."""


def pixel_scores(matrix: Counts, absent: Absent = "ignore") -> dict[str, float]:
    """Each score of PIXEL_SCORES, in [0, 1], from a confusion matrix; nan where no class takes part.

    absent: as iou_scores takes it.

    >>> pixel_scores(np.array([[3, 1], [0, 4]]))
    {'miou': 0.775, 'miou_foreground': 0.8}
    """
    every = {name: _per_class(matrix, score.ratio, absent) for name, score in PIXEL_SCORES.items()}
    return {name: _mean(own if PIXEL_SCORES[name].background else own[1:]) for name, own in every.items()}


def iou_scores(matrix: Counts, absent: Absent = "ignore") -> IouScores:
    """IoU per class and their means, from a confusion matrix.

    With absent="ignore" (as in Detectron2) the classes of the truth count: a class that is predicted but not in the
    truth does not count, and its pixels count against the classes that they truly belong to. With "zero" (as in
    DINOv3's evaluation) it scores 0, so a single pixel can cost many points. A class in neither never counts.
    """
    per_class = _per_class(matrix, iou_counts, absent)
    return IouScores(_mean(per_class), _mean(per_class[1:]), tuple(per_class.tolist()))


def takes_part(matrix: Counts, absent: Absent) -> NDArray[np.bool_]:
    """Whether each class does, (classes,), by the rule of iou_scores; matrix: of a whole split."""
    truth = matrix.sum(1)
    return np.asarray((truth + matrix.sum(0) if absent == "zero" else truth) > 0)


def _per_class(matrix: Counts, ratio: Ratio, absent: Absent) -> NDArray[np.float64]:
    """The ratio of each class, (classes,); nan for one that takes no part."""
    part, whole = ratio(matrix)
    counted = takes_part(matrix, absent)
    found = np.full(len(matrix), np.nan)
    found[counted] = part[counted] / np.maximum(whole[counted], 1)
    return found


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
