"""Probability of detection from the strength of signals: ln signal = b0 + b1 ln a + e, found where it is at least a
threshold. e is normal, with the same scatter at every size. Signals at the noise or at the saturation of the system
are censored: they are known to be below or above a limit, and no more.

MIL-HDBK-1823A (2009), appendix G; Berens, NDE reliability data analysis (1989). The handbook bounds a90 by the delta
method; the bound here is the one-sided 95 % bound of the likelihood ratio, which follows the likelihood where it is not
symmetric, and the handbook's stands beside it. Both agree with the handbook's examples (tests/metrics/pod).
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import CubicSpline
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri
from scipy.stats import chi2, t

from featprobe.errors import ShapeError
from featprobe.metrics.pod.censored import ABOVE, BELOW, MEASURED, CensoredLine
from featprobe.metrics.pod.concave import NoMaximumError, least
from featprobe.metrics.pod.line_checks import DOUBT, checks_of, worst
from featprobe.metrics.pod.values import Curve, Pod, Refused

Floats = NDArray[np.float64]
Known = NDArray[np.int8]
LEAST_TARGETS = 40  # of the handbook, for signal response
LEAST_MEASURED = 10  # signals that are not censored: a line and its scatter need some
LEAST_SIZES = 3
CONFIDENCE = 0.95
HIGH = float(ndtri(0.9))  # standard deviations above the threshold at which 90 % are found
JOINT = float(chi2.ppf(0.95, 2))  # both parameters of the curve together (Cheng and Iles, 1983)
POINTS, KNOTS = 60, 10  # of the curve, and those of them at which its bounds are searched
FARTHEST = 50.0  # in ln size: a bound above this times the mean size is none


@dataclass(frozen=True, kw_only=True)
class SignalPod(Pod):
    """A POD curve of signals. delta_a90_95: the bound of a90 by the delta method, as the handbook computes it; None
    where `a90_95` is none. line: b0, b1 and the standard deviation of e, on the scale of the fit. below, above: numbers
    of signals that are censored at the noise and at the saturation.
    """

    delta_a90_95: float | None
    line: tuple[float, float, float]
    below: int
    above: int


def signal_response(
    sizes: ArrayLike,
    signals: ArrayLike,
    threshold: float,
    noise: float | None = None,
    saturation: float | None = None,
    clusters: ArrayLike | None = None,
    log: bool = True,
) -> SignalPod | Refused:
    """The POD of targets by their signals.

    sizes: (n,), > 0. signals: (n,); -inf where there was none, which `noise` must then stand for. threshold: a target
    is found if its signal is at least this. noise, saturation: signals at most, or at least, these are censored; None:
    none is. clusters: (n,), what targets of one part share; None: each is its own. log: whether the line is one of ln
    signal; else of the signal itself, for one that is a logarithm already.
    Raises ShapeError where the values can't be ones of signals and sizes.
    """
    a, y = np.asarray(sizes, dtype=float), np.asarray(signals, dtype=float)
    groups = np.arange(len(y)) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    _check(a, y, groups, noise, saturation)
    if log:
        if noise is None and not (y > 0).all():
            raise ShapeError("Signals that are not above 0 have no logarithm. Give `noise`, above 0, or log=False.")
        with np.errstate(divide="ignore", invalid="ignore"):
            y = np.log(np.maximum(y, 0.0))
        threshold, noise, saturation = _ln(threshold), noise and _ln(noise), saturation and _ln(saturation)
    known = np.full(len(y), MEASURED, np.int8)
    known[y <= (-math.inf if noise is None else noise)] = BELOW
    known[y >= (math.inf if saturation is None else saturation)] = ABOVE
    hits = int((y >= threshold).sum())
    reasons = _reasons(a, known, threshold, noise, saturation)
    if reasons:
        return _refused(reasons, len(y), hits)
    y = np.clip(y, noise, saturation)
    try:
        return _Fit.of(a, y, threshold, known, groups).pod(hits)
    except NoMaximumError:
        flat = ("The line has no scatter: all measured signals lie on it.", "signals that scatter")
        return _refused([flat], len(y), hits)
    except _NoGrowthError as error:
        return _refused([(str(error), "targets whose signal grows with their size")], len(y), hits)


class _NoGrowthError(ArithmeticError):
    """The line falls, or is level."""


@dataclass(frozen=True)
class _Fit:
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
    ) -> "_Fit":
        x = np.log(sizes)
        middle, unit = float(x.mean()), float(np.std(y)) or 1.0
        line = CensoredLine(np.column_stack([np.ones_like(x), x - middle]), (y - threshold) / unit, known)
        best = line.fitted()
        if not best[2] > 0:
            raise _NoGrowthError(f"Signals do not grow with size: the fitted slope is {best[2] / best[0] * unit:.3g}.")
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
        """Over the sizes of the targets, and on to a90."""
        sizes = np.geomspace(self.sizes.min(), max(self.sizes.max(), self.size(self.at(HIGH))), POINTS)
        at = np.log(sizes) - self.middle
        knots = np.linspace(at[0], at[-1], KNOTS)
        low, high = (CubicSpline(knots, [self.bound(x, side) for x in knots])(at) for side in (1.0, -1.0))
        return Curve(sizes, ndtr(self.best[1] + self.best[2] * at), ndtr(low), ndtr(high))

    def pod(self, hits: int) -> SignalPod:
        """The POD that follows from the line."""
        sigma, known = 1 / self.best[0], self.likelihood.known
        slope = float(self.best[2] * sigma * self.unit)
        intercept = float(self.best[1] * sigma * self.unit + self.threshold - slope * self.middle)
        a90, a90_95 = self.size(self.at(HIGH)), self.upper()
        checks = checks_of(self.likelihood, self.best)
        notes = [f"{check.fault} (p {check.p:.2g})" for check in checks if check.p < DOUBT]
        if a90 > self.sizes.max():
            notes.append(
                f"a90 lies above the largest target ({self.sizes.max():.4g}): there the curve is not measured."
            )
        elif a90 < self.sizes.min():
            notes.append(
                f"a90 lies below the smallest target ({self.sizes.min():.4g}): there the curve is not measured."
            )
        return SignalPod(
            kind="signal response",
            link="probit",
            intercept=float(self.best[1] - self.best[2] * self.middle),
            slope=float(self.best[2]),
            a50=self.size(self.at(0.0)),
            a90=a90,
            a90_95=a90_95,
            no_bound="",
            joint_a90_95=None if self.clustered else self.upper(JOINT),
            curve=self.curve(),
            lack_of_fit=worst(checks),
            targets=len(self.sizes),
            hits=hits,
            clusters=self.number,
            clustered=self.clustered,
            coverage=None,
            notes=tuple(notes),
            delta_a90_95=self.delta(),
            line=(intercept, slope, float(sigma * self.unit)),
            below=int((known == BELOW).sum()),
            above=int((known == ABOVE).sum()),
        )


def _ln(value: float) -> float:
    if not value > 0:
        raise ShapeError(f"The threshold and limits of signals whose logarithm is taken are above 0, found {value:g}.")
    return math.log(value)


def _check(a: Floats, y: Floats, groups: NDArray[np.intp], noise: float | None, saturation: float | None) -> None:
    if a.ndim != 1 or not a.shape == y.shape == groups.shape:
        raise ShapeError("Sizes, signals and clusters are lists of one length: one of each for every target.")
    if not (np.isfinite(a) & (a > 0)).all():
        raise ShapeError("Sizes of targets are finite and above 0.")
    if np.isnan(y).any() or (noise is None and (y == -np.inf).any()) or (saturation is None and (y == np.inf).any()):
        raise ShapeError("Signals are finite; where there was none, -inf and `noise` say so; inf wants `saturation`.")


def _reasons(
    a: Floats, known: Known, threshold: float, noise: float | None, saturation: float | None
) -> list[tuple[str, str]]:
    """Why there is no curve, each with what is missing."""
    found, measured = [], int((known == MEASURED).sum())
    if len(a) < LEAST_TARGETS:
        more = LEAST_TARGETS - len(a)
        found.append((f"{len(a)} targets; a signal response takes at least {LEAST_TARGETS}.", f"{more} more targets"))
    if measured < LEAST_MEASURED:
        low, high = int((known == BELOW).sum()), int((known == ABOVE).sum())
        found.append(
            (
                f"{measured} of {len(a)} signals are measured ({low} at the noise, {high} at the saturation); "
                f"a line takes at least {LEAST_MEASURED}.",
                f"{LEAST_MEASURED - measured} more targets whose signal is between noise and saturation",
            )
        )
    if (sizes := len(np.unique(a))) < LEAST_SIZES:
        found.append((f"{sizes} different sizes; a line takes at least {LEAST_SIZES}.", "targets of other sizes"))
    if noise is not None and threshold < noise:
        found.append(
            ("The threshold lies below the noise, where signals are not measured.", "a threshold at the noise or above")
        )
    if saturation is not None and threshold > saturation:
        found.append(
            ("The threshold lies above the saturation, where signals are not measured.", "a threshold below saturation")
        )
    return found


def _refused(reasons: list[tuple[str, str]], targets: int, hits: int) -> Refused:
    return Refused("signal response", tuple(r for r, _ in reasons), tuple(m for _, m in reasons), targets, hits)
