"""A line fitted to signals, and bounds of what it says: the score at which the POD of a size is Phi(score)."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri
from scipy.stats import t

from featprobe.metrics.pod.censored import ABOVE, BELOW, MEASURED, CensoredLine, Floats
from featprobe.metrics.pod.concave import NoMaximumError, least
from featprobe.metrics.pod.pod_values import Curve

CONFIDENCE = 0.95
HIGH = float(ndtri(0.9))  # the score at which 90 % are found
POINTS, KNOTS = 60, 10  # of the curve, and those of them at which its bounds are searched
BEYOND = 2.0  # times the largest size, up to which a curve is drawn
LEAST_SCATTER = 1e-6  # of signals about the line, in their standard deviations: with less, rounding decides
FARTHEST = 50.0  # in ln size: a bound above this times the mean size is none


class NoGrowthError(ArithmeticError):
    """The line falls, or is level."""


@dataclass(frozen=True)
class SignalLine:
    """A fitted line. likelihood: of the signals minus the threshold, divided by `unit`; its columns are 1 and ln a
    minus `middle`. best: its maximum: 1 / sigma, then intercept and slope of the score t at which Phi(t) is the POD.
    covariance: of best; wide: the same, or the robust one over clusters. groups: (n,), the cluster of each."""

    sizes: Floats
    likelihood: CensoredLine
    threshold: float
    unit: float
    middle: float
    best: Floats
    covariance: Floats
    wide: Floats
    groups: NDArray[np.intp]

    @classmethod
    def of(
        cls, sizes: Floats, y: Floats, threshold: float, known: NDArray[np.int8], groups: NDArray[np.intp]
    ) -> "SignalLine":
        x = np.log(sizes)
        middle, unit = float(x.mean()), float(np.std(y)) or 1.0
        line = CensoredLine(np.column_stack([np.ones_like(x), x - middle]), (y - threshold) / unit, known)
        best = line.fitted()
        if best[0] * LEAST_SCATTER > 1:
            raise NoMaximumError
        if not best[2] > 0:
            raise NoGrowthError(f"Signals do not grow with size: the fitted slope is {best[2] / best[0] * unit:.3g}.")
        covariance = np.linalg.inv(-line(best)[2]).astype(np.float64)
        wide = covariance
        if (number := int(groups.max()) + 1) < len(y):
            sums = np.zeros((number, 3))
            np.add.at(sums, groups, line.scores(best))
            wide = covariance @ (sums.T @ sums) @ covariance * number / (number - 1)
        return cls(sizes, line, threshold, unit, middle, best, covariance, wide, groups)

    @property
    def number(self) -> int:
        return int(self.groups.max()) + 1

    @property
    def clustered(self) -> bool:
        return self.number < len(self.groups)

    def quantile(self) -> float:
        """Standard deviations of a one-sided bound: of Student's t over the clusters, where there are some."""
        return float(t.ppf(CONFIDENCE, self.number - 1) if self.clustered else ndtri(CONFIDENCE))

    def bound(self, x: float, side: float, square: float | None = None) -> float:
        """The bound of the score at ln size `x` - middle, from below (side 1) or above (-1). square: of the deviations
        that it may have; None for those of a one-sided bound."""
        direction = np.array([0.0, 1.0, x])
        if square is None:
            square = self.quantile() ** 2
            square *= float(direction @ self.wide @ direction) / float(direction @ self.covariance @ direction)
        return side * least(self.likelihood, self.best, side * direction, square / 2)

    def upper(self, square: float | None = None) -> float:
        """The size at which the bound of the score from below is that of 90 %; inf where it never is."""
        at = low = self.at(HIGH)
        while self.bound(at, 1.0, square) < HIGH:
            low, at = at, at + max(1.0, at - low)
            if at > FARTHEST:
                return math.inf
        return self.size(float(brentq(lambda x: self.bound(x, 1.0, square) - HIGH, low, at, xtol=1e-8)))

    def delta(self) -> float:
        """The bound of a90 by the delta method."""
        at = self.at(HIGH)
        slopes = -np.array([0.0, 1.0, at]) / self.best[2]
        return self.size(at + self.quantile() * math.sqrt(slopes @ self.wide @ slopes))

    def size(self, x: float) -> float:
        """The size at an ln size `x` - middle."""
        return math.exp(min(x + self.middle, 700.0))

    def at(self, score: float) -> float:
        """The ln size, minus middle, at which the fitted score is this."""
        return float((score - self.best[1]) / self.best[2])

    def curve(self) -> Curve:
        """Over the sizes of the targets, and as far as twice beyond them where that shows a90."""
        largest = self.sizes.max()
        sizes = np.geomspace(self.sizes.min(), max(largest, min(self.size(self.at(HIGH)), BEYOND * largest)), POINTS)
        at = np.log(sizes) - self.middle
        knots = np.linspace(at[0], at[-1], KNOTS)
        low, high = (CubicSpline(knots, [self.bound(x, side) for x in knots])(at) for side in (1.0, -1.0))
        return Curve(sizes, ndtr(self.best[1] + self.best[2] * at), ndtr(low), ndtr(high))


def fitted_line(
    sizes: Floats,
    signals: Floats,
    threshold: float,
    noise: float | None,
    saturation: float | None,
    groups: NDArray[np.intp],
) -> SignalLine:
    """The line of largest likelihood. signals, threshold, noise, saturation: on the scale of the line; those at or
    beyond the limits are censored. groups: (n,), the cluster of each, from 0 on.

    Raises NoMaximumError where all measured signals lie on a line, NoGrowthError where it does not rise.
    """
    known = knowledge(signals, noise, saturation)
    return SignalLine.of(sizes, np.clip(signals, noise, saturation), threshold, known, groups)


def knowledge(signals: Floats, noise: float | None, saturation: float | None) -> NDArray[np.int8]:
    """What is known of each signal: BELOW, MEASURED or ABOVE."""
    known = np.full(len(signals), MEASURED, np.int8)
    known[signals <= (-math.inf if noise is None else noise)] = BELOW
    known[signals >= (math.inf if saturation is None else saturation)] = ABOVE
    return known
