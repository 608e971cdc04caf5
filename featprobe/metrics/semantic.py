"""Intersection over union from one confusion matrix over a whole split."""

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


def iou_scores(matrix: NDArray[np.int64], absent: Absent = "ignore") -> IouScores:
    """IoU per class and their means, from a confusion matrix.

    With absent="ignore" (as in Detectron2) the classes of the truth count: a class that is predicted but not in the
    truth does not count, and its pixels count against the classes that they truly belong to. With "zero" (as in
    DINOv3's evaluation) it scores 0, so a single pixel can cost many points. A class in neither never counts.
    """
    hit = np.diag(matrix).astype(float)
    truth, predicted = matrix.sum(1), matrix.sum(0)
    union = truth + predicted - hit
    counted = union > 0 if absent == "zero" else truth > 0
    per_class = np.full(len(matrix), np.nan)
    per_class[counted] = hit[counted] / union[counted]
    return IouScores(_mean(per_class), _mean(per_class[1:]), tuple(per_class.tolist()))


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
