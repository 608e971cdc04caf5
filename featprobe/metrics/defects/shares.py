"""Intervals of shares of defects, images or parts: exact ones, and ones for defects that come in groups."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaincinv, stdtrit

from featprobe.metrics.intervals import LEVEL

Floats = NDArray[np.float64]

TINY = 1e-12  # instead of 0, which the beta distribution does not allow


def exact_interval(hits: ArrayLike, trials: ArrayLike, level: float = LEVEL) -> tuple[Floats, Floats]:
    """The exact binomial interval of a share; nan without a trial. Trials that are no whole numbers are allowed.

    Clopper and Pearson (1934), by quantiles of the beta distribution.

    >>> low, high = exact_interval([0, 5], [10, 10])
    >>> low.round(3).tolist(), high.round(3).tolist()
    ([0.0, 0.187], [0.308, 0.813])
    """
    x, n = np.asarray(hits, dtype=float), np.asarray(trials, dtype=float)
    tail = (1 - level) / 2
    low = np.where(x > 0, betaincinv(np.maximum(x, TINY), n - x + 1, tail), 0)
    high = np.where(x < n, betaincinv(x + 1, np.maximum(n - x, TINY), 1 - tail), 1)
    known = n > 0
    return np.where(known, low, np.nan), np.where(known, high, np.nan)


def clustered_interval(hits: Floats, trials: Floats, level: float = LEVEL) -> tuple[Floats, Floats]:
    """The interval of a share whose trials come in groups, each (sets,); nan without a trial.

    hits, trials: (sets, groups). Defects of one part are found or missed together, so that they say less than as many
    defects of different parts: the exact interval is taken of an effective number of trials. It is their number over
    the design effect, which is the variance of the share between groups over that of independent trials, but at
    least 1, and corrected for the few groups that it is known from. Where all are hits or none is, nothing is known of
    it, and each group counts as one trial.

    Korn and Graubard, Confidence intervals for proportions with small expected number of positive counts estimated
    from survey data (1998). How often it covers: benchmarks/bands.py.
    """
    n, x, groups = trials.sum(1), hits.sum(1), (trials > 0).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = x / n
        between = ((hits - share[:, None] * trials) ** 2).sum(1) / n**2 * groups / (groups - 1)
        effect = np.maximum(1, between / (share * (1 - share) / n))
        tail = (1 - level) / 2
        few = (stdtrit(n - 1, tail) / stdtrit(groups - 1, tail)) ** 2
        effective = np.where((x > 0) & (x < n) & (groups > 1), np.minimum(n, n / effect * few), groups)
        return exact_interval(np.where(n > 0, share * effective, 0), effective, level)
