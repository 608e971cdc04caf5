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
    """IoU in [0, 1]; nan for a class that takes no part.

    miou: mean over classes, the background counted. miou_foreground: mean without it.
    """

    miou: float
    miou_foreground: float
    per_class: tuple[float, ...]


def confusion_matrix(truth: Labels, predicted: Labels, classes: int) -> NDArray[np.int64]:
    """Pixels of each true class (row) that were given each class (column): (classes, classes).

    truth, predicted: (height, width), uint8. Pixels whose truth is 255 are left out.

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

    The classes are those of the truth with absent="ignore" (as Detectron2 counts them): one that is predicted but
    absent from the truth takes no part, and each of its pixels counts against the class that it was taken from. With
    "zero" (as DINOv3's evaluation has it) it scores 0, so that a single pixel can cost many points. A class in neither
    never takes part.
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
