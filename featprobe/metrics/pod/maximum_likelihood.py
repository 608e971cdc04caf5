"""Maximum likelihood of hit/miss models, many sets of targets at once.

In all functions the last axis of an array runs over targets; the axes before it, if any, over sets, and broadcast.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, log_expit, log_ndtr, logit, ndtr, ndtri

from featprobe.metrics.pod.pod_values import Link

Floats = NDArray[np.float64]
STEPS = 100  # of Newton's method; a set whose hits and misses overlap well takes less than ten
CLOSE = 1e-14  # gain in the log likelihood that the next step promises, below which a fit has converged
ROUNDING = 1e-9  # of a log likelihood
HALVINGS = 30  # of a step, after which no step helps
FAR = 5.0  # times 1 + the largest weight: no weight moves farther in a step
DAMPING = 1e-12  # of the information, so that it can always be solved


@dataclass(frozen=True)
class LinkFunction:
    """A symmetric distribution F, P(hit) = F(z). log_cdf: ln F. derivatives: the first of ln F, and minus the second,
    which is positive: the likelihood has one maximum.
    """

    cdf: Callable[[Floats], Floats]
    quantile: Callable[[float], float]
    log_cdf: Callable[[Floats], Floats]
    derivatives: Callable[[Floats], tuple[Floats, Floats]]


def _of_logistic(z: Floats) -> tuple[Floats, Floats]:
    slope = expit(-z)
    return slope, slope * (1 - slope)


def _of_normal(z: Floats) -> tuple[Floats, Floats]:
    slope = np.exp(-z * z / 2 - log_ndtr(z)) / np.sqrt(2 * np.pi)
    return slope, slope * (slope + z)


LINKS: dict[Link, LinkFunction] = {
    "logit": LinkFunction(expit, logit, log_expit, _of_logistic),
    "probit": LinkFunction(ndtr, ndtri, log_ndtr, _of_normal),
}


@dataclass(frozen=True)
class Model:
    """Targets of one or many sets, and how they are found: P(hit) = F(offset + weights of columns).

    signs: (..., n), 1 for a hit, -1 for a miss. columns: (..., k, n). offset: (..., n) or a number. counts: (..., n),
    how many times each target counts.
    """

    link: LinkFunction
    signs: Floats
    columns: Floats
    offset: Floats | float = 0.0
    counts: Floats | float = 1.0

    def arguments(self, weights: Floats) -> Floats:
        """The argument of F of each target, (..., n). weights: (..., k)."""
        return np.asarray(self.offset + np.einsum("...k,...kn->...n", weights, self.columns))

    def margins(self, weights: Floats) -> Floats:
        """The same, as the argument at which a target has the outcome that it has: F(margin) is its likelihood."""
        return np.asarray(self.signs * self.arguments(weights))

    def log_likelihood(self, weights: Floats) -> Floats:
        """(...,)."""
        return np.asarray(self.counts * self.link.log_cdf(self.margins(weights))).sum(-1)

    def derivatives(self, weights: Floats) -> tuple[Floats, Floats]:
        """Of each target's log likelihood by the argument of F: the first, and minus the second; (..., n) each."""
        slope, bend = self.link.derivatives(self.margins(weights))
        return np.asarray(self.counts * self.signs * slope), np.asarray(self.counts * bend)

    def expected(self, weights: Floats) -> Floats:
        """Expected information of each target on the argument of F, (..., n)."""
        z = self.arguments(weights)
        return np.asarray(self.counts * self.link.derivatives(z)[0] * self.link.derivatives(-z)[0])

    def information(self, bend: Floats) -> Floats:
        """On the weights, (..., k, k), from that of each target on the argument of F, (..., n)."""
        return np.asarray((self.columns * bend[..., None, :]) @ np.swapaxes(self.columns, -1, -2))


@dataclass(frozen=True)
class Fit:
    """weights: (..., k). log_likelihood, converged: (...,)."""

    weights: Floats
    log_likelihood: Floats
    converged: NDArray[np.bool_]


def fit(model: Model, start: Floats, steps: int = STEPS) -> Fit:
    """The weights of the highest likelihood, by Newton's method with halved steps, so many at most. start: (..., k)."""
    weights, best = start, model.log_likelihood(start)
    stuck = np.zeros(best.shape, bool)
    for _ in range(steps):
        scores, bend = model.derivatives(weights)
        gradient = np.einsum("...n,...kn->...k", scores, model.columns)
        step = solved(model.information(bend), gradient)
        gain = np.einsum("...k,...k->...", gradient, step)
        done = (gain < CLOSE) | stuck
        if done.all():
            break
        weights, best, stuck = _climbed(model, weights, best, np.where(done[..., None], 0, step))
    return Fit(weights, best, gain < CLOSE)


def _climbed(model: Model, weights: Floats, best: Floats, step: Floats) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """A step, halved in each set until the likelihood does not fall; and where no step helps."""
    step = np.nan_to_num(step)  # infinite where no target has any information left
    length = np.abs(step).max(-1, keepdims=True)
    longest = FAR * (1 + np.abs(weights).max(-1, keepdims=True))
    step = np.where(length > longest, step * (longest / np.maximum(length, longest)), step)
    for _ in range(HALVINGS):
        reached = model.log_likelihood(weights + step)
        falls = ~(reached >= best - ROUNDING)
        if not falls.any():
            break
        step = np.where(falls[..., None], step / 2, step)
    kept = np.where(falls[..., None], weights, weights + step)
    return kept, np.where(falls, best, reached), falls


def solved(information: Floats, right: Floats) -> Floats:
    """The solution of small symmetric systems, (..., k, k) and (..., k). None is singular: see DAMPING."""
    size = information.shape[-1]
    trace = np.trace(information, axis1=-2, axis2=-1)[..., None, None]
    damped = information + (DAMPING * trace + np.finfo(float).tiny) * np.eye(size)
    return np.asarray(np.linalg.solve(damped, right[..., None])[..., 0])
