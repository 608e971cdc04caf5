"""Whether a straight line with even, normal scatter fits signals: what a signal response rests on."""

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_ndtr
from scipy.stats import chi2, shapiro

from featprobe.metrics.pod.censored import BELOW, MEASURED, CensoredLine, Floats
from featprobe.metrics.pod.concave import NoMaximumError

DOUBT = 0.05
MOST_FOR_NORMAL = 5000  # the test's p-value is not known for more


@dataclass(frozen=True)
class LineCheck:
    """One check. p: of the hypothesis that the line fits in this respect. fault: a sentence, true where it does not."""

    p: float
    fault: str


def checks_of(line: CensoredLine, best: Floats) -> tuple[LineCheck, ...]:
    """The checks of a fitted line with columns 1 and x; best: its parameters of largest likelihood.

    Likelihood ratio tests against a line that bends (x squared) and against a scatter that changes with x (its
    logarithm has a slope); without censored signals also Shapiro's and Wilk's test of the deviations.
    """
    found = [
        LineCheck(_bends(line, best), "The signal does not grow along a straight line."),
        LineCheck(_spreads(line, best), "The scatter of the signal changes with size."),
    ]
    if (line.known == MEASURED).all() and len(line.y) <= MOST_FOR_NORMAL:
        deviations = best[0] * line.y - line.columns @ best[1:]
        found.append(LineCheck(float(shapiro(deviations).pvalue), "The scatter of the signal is not normal."))
    return tuple(found)


def worst(checks: tuple[LineCheck, ...]) -> float:
    """The p-value of all checks together (Bonferroni)."""
    return min(1.0, len(checks) * min(check.p for check in checks))


def _bends(line: CensoredLine, best: Floats) -> float:
    bent = CensoredLine(np.column_stack([line.columns, line.columns[:, 1] ** 2]), line.y, line.known)
    try:
        gain = bent(bent.fitted())[0] - line(best)[0]
    except NoMaximumError:
        return 0.0
    return float(chi2.sf(2 * max(gain, 0.0), 1))


def _spreads(line: CensoredLine, best: Floats) -> float:
    measured, sign = line.known == MEASURED, np.where(line.known == BELOW, 1.0, -1.0)

    def minus(at: Floats) -> float:
        """Minus the log-likelihood: intercept, slope, ln sigma, and how ln sigma changes with x."""
        ln_sigma = at[2] + at[3] * line.columns[:, 1]
        deviation = (line.y - line.columns @ at[:2]) * np.exp(-np.clip(ln_sigma, -50, 50))
        each = np.where(measured, -ln_sigma - deviation**2 / 2 - math.log(2 * math.pi) / 2, log_ndtr(sign * deviation))
        return -float(each.sum())

    start = np.array([best[1] / best[0], best[2] / best[0], -math.log(best[0]), 0.0])
    return float(chi2.sf(2 * max(minus(start) - float(minimize(minus, start, method="BFGS").fun), 0.0), 1))
