"""Targets in clusters: several defects of a part are found or missed together, so they say less than as many parts.

The likelihood of independent targets still gives the curve. Its likelihood ratios are too large by about the factor by
which clusters inflate a variance (Rotnitzky and Jewell, 1990), so that more is allowed of them. benchmarks/pod.py
compares this bound with others.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from featprobe.metrics.pod.bounds import Inflation
from featprobe.metrics.pod.maximum_likelihood import Fit, Floats, Model, solved


@dataclass(frozen=True)
class Clusters:
    """Which targets belong together. order: (targets,), targets sorted by cluster. starts: (clusters,), where each
    begins in that order.
    """

    order: NDArray[np.intp]
    starts: NDArray[np.intp]

    @classmethod
    def of(cls, labels: Sequence[Hashable]) -> "Clusters":
        """labels: (targets,), equal for targets of one cluster."""
        numbers: dict[Hashable, int] = {}
        index = np.array([numbers.setdefault(label, len(numbers)) for label in labels])
        return cls(np.argsort(index, kind="stable"), np.r_[0, np.cumsum(np.bincount(index))[:-1]])

    def __len__(self) -> int:
        return len(self.starts)

    def sums(self, values: Floats) -> Floats:
        """Sums over each cluster, (..., clusters), of values (..., targets)."""
        return np.asarray(np.add.reduceat(values[..., self.order], self.starts, axis=-1))


def inflation_of(model: Model, fitted: Fit, clusters: Clusters) -> Inflation:
    """How much clusters inflate the variance of b0 d0 + b1 d1, at least 1.

    The variance between clusters is the jackknife's, each cluster left out by one step of Newton's method: with few
    clusters it is a little too large, where the usual sandwich is too small.
    """
    information = model.information(fitted.weights)
    scores = clusters.sums(model.scores(fitted.weights)[..., None, :] * model.columns)  # (..., 2, clusters)
    bend = model.link.bend(model.margins(fitted.weights))
    products = model.columns[..., :, None, :] * model.columns[..., None, :, :] * bend[..., None, None, :]
    parts = np.moveaxis(clusters.sums(products), -1, -3)  # (..., clusters, 2, 2)
    moved = solved(information[..., None, :, :] - parts, np.swapaxes(scores, -1, -2))  # (..., clusters, 2)
    between = np.swapaxes(moved, -1, -2) @ moved * (len(clusters) - 1) / len(clusters)

    def inflation(direction: Floats) -> Floats:
        alone = np.einsum("...k,...k->...", direction, solved(information, direction))
        together = np.einsum("...i,...ij,...j->...", direction, between, direction)
        return np.asarray(np.maximum(together / alone, 1))

    return inflation


def reaches(clusters: Clusters) -> tuple[float, float]:
    """What is allowed of twice a log likelihood ratio before inflation: of one parameter, one-sided, and of two; 95 %.

    Few clusters say little of the variance between them: Student's t and Hotelling's T² in place of chi-square.
    """
    free = len(clusters) - 1
    return float(stats.t.ppf(0.95, free)) ** 2, float(2 * free / (free - 1) * stats.f.ppf(0.95, 2, free - 1))
