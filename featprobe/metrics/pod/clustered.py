"""Targets in clusters: several defects of a part are found or missed together, so they say less than as many parts.

The likelihood of independent targets still gives the curve. Its likelihood ratios are too large by about the factor by
which clusters inflate a variance (Rotnitzky and Jewell, 1990), so that more is allowed of them. benchmarks/pod.py
compares this bound with others.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from featprobe.metrics.pod.bounds import ALONE, DETECTED, Inflation, best_through
from featprobe.metrics.pod.maximum_likelihood import Fit, Floats, Model, fit, solved

FEW_STEPS = 12  # of Newton's method, from the fit of all targets


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


def inflation_of(model: Model, fitted: Fit, clusters: Clusters, drawn: Floats | None = None) -> Inflation:
    """How much clusters inflate the variance of b0 d0 + b1 d1, at least 1.

    The variance between clusters is the jackknife's, each cluster left out by one step of Newton's method: with few
    clusters it is a little too large, where the usual sandwich is too small. drawn: (..., clusters), how many times
    each cluster is there, of a resample whose model has these counts.
    """
    once = replace(model, counts=1.0)
    information = model.information(fitted.weights)
    scores = clusters.sums(once.scores(fitted.weights)[..., None, :] * model.columns)  # (..., 2, clusters)
    bend = model.link.bend(model.margins(fitted.weights))
    ones, x = model.columns[..., 0, :], model.columns[..., 1, :]
    parts = clusters.sums(np.stack([ones * ones * bend, ones * x * bend, x * x * bend], -2))
    parts = np.moveaxis(parts[..., [[0, 1], [1, 2]], :], -1, -3)  # (..., clusters, 2, 2)
    moved = solved(information[..., None, :, :] - parts, np.swapaxes(scores, -1, -2))  # (..., clusters, 2)
    times = np.ones(len(clusters)) if drawn is None else drawn
    between = (np.swapaxes(moved, -1, -2) * times[..., None, :]) @ moved * (len(clusters) - 1) / len(clusters)

    def inflation(direction: Floats) -> Floats:
        alone = np.einsum("...k,...k->...", direction, solved(information, direction))
        together = np.einsum("...i,...ij,...j->...", direction, between, direction)
        return np.asarray(np.maximum(together / alone, 1))

    return inflation


def calibrated_reach(model: Model, fitted: Fit, clusters: Clusters, draws: int, rng: np.random.Generator) -> Floats:
    """What is allowed of the inflated likelihood ratio of a90, (...,), after so many resamples of clusters.

    In each resample the a90 of all targets is the true one; its signed root of the likelihood ratio is looked at.
    """
    b0, b1 = np.moveaxis(fitted.weights, -1, 0)
    q = float(model.link.quantile(DETECTED))
    angle = np.arctan((q - b0) / b1)[..., None]
    sizes = np.diff(np.r_[clusters.starts, model.signs.shape[-1]])
    drawn = rng.multinomial(len(clusters), np.full(len(clusters), 1 / len(clusters)), (*b0.shape, draws)).astype(float)
    counts = np.empty((*drawn.shape[:-1], len(clusters.order)))
    counts[..., clusters.order] = np.repeat(drawn, sizes, -1)
    many = Model(model.link, model.signs[..., None, :], model.columns[..., None, :, :], 0.0, counts)
    start = np.broadcast_to(fitted.weights[..., None, :], (*drawn.shape[:-1], 2))
    again = fit(many, start, FEW_STEPS)
    best, _ = best_through(many, q, angle, np.broadcast_to(np.hypot(b1, q - b0)[..., None], drawn.shape[:-1]))
    direction = np.stack([np.cos(angle), np.sin(angle)], -1)
    with np.errstate(over="ignore", invalid="ignore"):  # resamples whose hits and misses don't overlap
        inflated = inflation_of(many, again, clusters, drawn)(direction)
    ratio = 2 * (again.log_likelihood - best) / np.where(np.isfinite(inflated), inflated, 1)
    above = np.einsum("...k,...k->...", again.weights, direction) < q * direction[..., 0]  # a90 is larger there
    roots = np.where(above, 1, -1) * np.sqrt(np.maximum(ratio, 0))
    return np.asarray(np.minimum(np.quantile(roots, 0.05, axis=-1), -np.sqrt(ALONE))) ** 2


def reaches(clusters: Clusters) -> tuple[float, float]:
    """What is allowed of twice a log likelihood ratio before inflation: of one parameter, one-sided, and of two; 95 %.

    Few clusters say little of the variance between them: Student's t and Hotelling's T² in place of chi-square.
    """
    free = len(clusters) - 1
    return float(stats.t.ppf(0.95, free)) ** 2, float(2 * free / (free - 1) * stats.f.ppf(0.95, 2, free - 1))
