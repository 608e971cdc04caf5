"""Targets in clusters: several defects of a part are found or missed together, so they say less than as many parts.

The likelihood of independent targets still gives the curve; its ratios are too large by about the factor by which
clusters inflate a variance (Rotnitzky and Jewell, 1990). What is allowed of them is set by a studentised bootstrap over
clusters, which covers best of the bounds in benchmarks/pod.py.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from featprobe.metrics.pod.bounds import DETECTED, Inflation, direction_of, ratio_at, upper_a90
from featprobe.metrics.pod.maximum_likelihood import Fit, Floats, Model, fit, solved

AT_ONCE = 2**20  # values of one array in one step
FEW_STEPS = 8  # of Newton's method, from the fit of all targets


@dataclass(frozen=True)
class Clusters:
    """Targets that stand in the order of their clusters. sizes: (clusters,), how many targets each has, > 0."""

    sizes: NDArray[np.intp]

    def __len__(self) -> int:
        return len(self.sizes)

    def sums(self, values: Floats) -> Floats:
        """Sums over each cluster, (..., clusters), of values (..., targets)."""
        return np.asarray(np.add.reduceat(values, np.cumsum(self.sizes) - self.sizes, axis=-1))


def between(model: Model, fitted: Fit, clusters: Clusters, drawn: Floats | float = 1.0) -> Floats:
    """The covariance of both weights when clusters vary, (..., 2, 2): the sandwich of Liang and Zeger (1986).

    drawn: (..., clusters), how many times each cluster is there, in a resample whose model has these counts.
    """
    bend = model.derivatives(fitted.weights)[1]
    scores = replace(model, counts=1.0).derivatives(fitted.weights)[0]
    sums = clusters.sums(scores[..., None, :] * model.columns)  # (..., 2, clusters)
    moved = np.swapaxes(solved(model.information(bend)[..., None, :, :], np.swapaxes(sums, -1, -2)), -1, -2)
    times = np.asarray(drawn)[..., None, :] if np.ndim(drawn) else drawn
    return np.asarray((moved * times) @ np.swapaxes(moved, -1, -2) * len(clusters) / (len(clusters) - 1))


def inflation_of(model: Model, fitted: Fit, clusters: Clusters) -> Inflation:
    """How much clusters inflate the variance of b0 d0 + b1 d1, at least 1."""
    information = model.information(model.derivatives(fitted.weights)[1])
    covariance = between(model, fitted, clusters)

    def inflation(direction: Floats) -> Floats:
        alone = np.einsum("...k,...k->...", direction, solved(information, direction))
        return np.asarray(np.maximum(_along(direction, covariance) / alone, 1))

    return inflation


def resampled_a90(
    model: Model, fitted: Fit, clusters: Clusters, draws: int, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """The x of a90 and its standard error in so many resamples of clusters, (..., draws) each: inf without growth."""
    share = np.full(len(clusters), 1 / len(clusters))
    at_once = max(1, AT_ONCE // model.signs.size)
    found = []
    for begin in range(0, draws, at_once):
        shape = (*fitted.log_likelihood.shape, min(at_once, draws - begin))
        drawn = rng.multinomial(len(clusters), share, shape).astype(float)
        counts = np.repeat(drawn, clusters.sizes, -1)
        many = Model(model.link, model.signs[..., None, :], model.columns[..., None, :, :], 0.0, counts)
        again = fit(many, np.broadcast_to(fitted.weights[..., None, :], (*shape, 2)), FEW_STEPS)
        found.append(a90_of(many, again, clusters, drawn))
    a90, errors = (np.concatenate(part, -1) for part in zip(*found, strict=True))
    return a90, errors


def studentised(a90: Floats, error: Floats, drawn: Floats, errors: Floats) -> Floats:
    """The one-sided 95 % bound of an x of a90, (...,), from that of resamples, (..., draws), and all errors."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        distances = np.where(np.isinf(drawn), np.inf, (drawn - a90[..., None]) / errors)
    distances = np.sort(np.where(np.isnan(distances), -np.inf, distances), -1)
    return np.asarray(a90 - distances[..., max(0, int(0.05 * (drawn.shape[-1] + 1)) - 1)] * error)


def a90_of(model: Model, fitted: Fit, clusters: Clusters, drawn: Floats | float = 1.0) -> tuple[Floats, Floats]:
    """The x of a90, and its standard error when clusters vary; infinite where the curve does not grow."""
    b0, b1 = np.moveaxis(fitted.weights, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        a90 = np.where(b1 > 0, (model.link.quantile(DETECTED) - b0) / b1, np.inf)
        direction = np.stack([np.ones_like(a90), np.where(np.isfinite(a90), a90, 0)], -1)
        return a90, np.sqrt(_along(direction, between(model, fitted, clusters, drawn))) / b1


def _along(direction: Floats, covariance: Floats) -> Floats:
    return np.asarray(np.einsum("...i,...ij,...j->...", direction, covariance, direction))


def robust_a90(model: Model, fitted: Fit, clusters: Clusters) -> tuple[Floats, float]:
    """The one-sided 95 % bound of the x of a90 from the likelihood ratio as clusters inflate it, and what that allows.

    Few clusters say little of the variance between them: Student's t in place of the normal distribution.
    """
    allowed = float(stats.t.ppf(0.95, len(clusters) - 1)) ** 2
    return upper_a90(model, fitted, allowed, inflation_of(model, fitted, clusters)), allowed


def clustered_a90(
    model: Model, fitted: Fit, clusters: Clusters, draws: int, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """The one-sided 95 % bound of the x of a90, and what it allows of the inflated likelihood ratio; (...,) each.

    It is the studentised bound; infinite where the likelihood ratio excludes no a90, which a resampled a90 can't know.
    """
    ratio, allowed = robust_a90(model, fitted, clusters)
    a90, error = a90_of(model, fitted, clusters)
    bound = np.maximum(a90, studentised(a90, error, *resampled_a90(model, fitted, clusters, draws, rng)))
    reach = ratio_at(model, fitted, bound) / inflation_of(model, fitted, clusters)(direction_of(bound))
    return np.where(np.isinf(ratio), np.inf, bound), np.where(np.isinf(ratio), allowed, reach)
