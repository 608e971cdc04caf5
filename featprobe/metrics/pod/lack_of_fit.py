"""Whether a hit/miss curve fits: a score test against curves with other tails."""

import numpy as np
from scipy.stats import chi2

from featprobe.metrics.pod.clustered import Clusters
from featprobe.metrics.pod.maximum_likelihood import Fit, Floats, Model

NOTHING = 1e-9  # share of a tail's variance, below which the fitted columns explain all of it


def lack_of_fit(model: Model, fitted: Fit, clusters: Clusters | None = None) -> Floats:
    """P-values, (...,), of the test that both tails are as the link says (Stukel, 1988); nan where nothing is left to
    test, as with two sizes.

    Against it are curves that level off below 1 or above 0, or rise at another rate in one half. With clusters the
    distribution of the statistic is that of targets that resemble each other (Rao and Scott, 1984, second order).
    """
    each, variance = _tails(model, fitted)
    score = each.sum(-1)
    inverse = np.linalg.pinv(variance, rcond=NOTHING, hermitian=True)
    statistic = np.einsum("...i,...ij,...j->...", score, inverse, score)
    if clusters is None:
        freedom = np.linalg.matrix_rank(variance, tol=NOTHING, hermitian=True)
        return np.where(freedom > 0, chi2.sf(statistic, np.maximum(freedom, 1)), np.nan)
    sums = clusters.sums(each)
    inflated = inverse @ (sums @ np.swapaxes(sums, -1, -2))
    first, second = np.trace(inflated, axis1=-2, axis2=-1), np.trace(inflated @ inflated, axis1=-2, axis2=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(chi2.sf(statistic * first / second, first**2 / second))


def _tails(model: Model, fitted: Fit) -> tuple[Floats, Floats]:
    """Each target's score for a longer upper and lower tail, (..., 2, n), and their covariance, (..., 2, 2), both
    without what the fitted columns explain, in units in which each tail has the variance 1 with it.
    """
    z = model.arguments(fitted.weights)
    weight = model.expected(fitted.weights)[..., None, :]
    tails = np.stack([z**2 * (z > 0), z**2 * (z < 0)], -2)
    tails = tails / np.sqrt((tails**2 * weight).sum(-1, keepdims=True) + np.finfo(float).tiny)
    columns, transposed = model.columns, np.swapaxes(model.columns, -1, -2)
    explained = np.linalg.solve((columns * weight) @ transposed, (columns * weight) @ np.swapaxes(tails, -1, -2))
    beyond = tails - np.swapaxes(explained, -1, -2) @ columns
    return beyond * model.derivatives(fitted.weights)[0][..., None, :], (beyond * weight) @ np.swapaxes(beyond, -1, -2)
