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
from scipy.stats import chi2

from featprobe.errors import ShapeError, counted
from featprobe.metrics.pod.censored import ABOVE, BELOW, MEASURED, Floats
from featprobe.metrics.pod.concave import NoMaximumError
from featprobe.metrics.pod.line_checks import DOUBT, checks_of, worst
from featprobe.metrics.pod.pod_values import Pod, Refused
from featprobe.metrics.pod.refusals import SAME, few_clusters
from featprobe.metrics.pod.signal_line import HIGH, NoGrowthError, SignalLine, fitted_line, knowledge

LEAST_TARGETS = 40  # of the handbook, for signal response
LEAST_MEASURED = 10  # signals that are not censored: a line and its scatter need some
LEAST_SIZES = 3
WIDER = "targets over a wider range of sizes, or a size that decides how strong a signal is"
FAR = 10.0  # times the largest target: a line that needs more to be found in 90 % does not grow
CLUSTERS = 25  # with fewer clusters the bound may cover a90 in less than 90 % of simulated sets
ALONE_COVERS = {40: 0.92, 120: 0.93, 300: 0.95}
CLUSTERED_COVERS = {CLUSTERS: 0.91, 40: 0.92, 100: 0.93}
FEW_CLUSTERS = (
    f"The targets lie in {{}}; with fewer than {CLUSTERS} the bound can cover a90 in less than 90 % of simulated sets. "
    "Inspect more parts."
)
"""Number of targets or of clusters from which on: share of simulated sets in which the bound was above the true a90, as
benchmarks/pod_signals.py measures it."""
JOINT = float(chi2.ppf(0.95, 2))  # both parameters of the curve together (Cheng and Iles, 1983)


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
        threshold = _ln(threshold)
        noise, saturation = (None if limit is None else _ln(limit) for limit in (noise, saturation))
    hits = int((y >= threshold).sum())
    reasons = _reasons(a, knowledge(y, noise, saturation), threshold, noise, saturation)
    number = len(np.unique(groups))
    reasons += few_clusters(number) if number < len(y) else []
    if reasons:
        return _refused(reasons, len(y), hits)
    try:
        line = fitted_line(a, y, threshold, noise, saturation, groups)
        if line.size(line.at(HIGH)) > FAR * a.max():
            raise NoGrowthError(f"Signals hardly grow with size: a90 would be over {FAR:g} times the largest target.")
        return _pod(line, hits)
    except NoMaximumError:
        flat = (
            "The line has no scatter to compute with: all measured signals lie on it, or nearly.",
            "signals that scatter",
        )
        return _refused([flat], len(y), hits)
    except NoGrowthError as error:
        return _refused([(str(error), WIDER)], len(y), hits)


def _pod(line: SignalLine, hits: int) -> SignalPod:
    """The POD that follows from the line."""
    sigma, known = 1 / line.best[0], line.likelihood.known
    slope = float(line.best[2] * sigma * line.unit)
    intercept = float(line.best[1] * sigma * line.unit + line.threshold - slope * line.middle)
    coverage, simulated = _coverage(line)
    a90, a90_95 = line.size(line.at(HIGH)), None if coverage is None else line.upper()
    checks = checks_of(line.likelihood, line.best)
    notes = [f"{check.fault} (p {check.p:.2g})" for check in checks if check.p < DOUBT]
    if a90_95 == math.inf:
        notes.append("The bound of a90 is infinite: the data do not show that any size is found in 90 % of all cases.")
    largest, smallest = line.sizes.max(), line.sizes.min()
    if a90 > largest or (a90_95 is not None and largest < a90_95 < math.inf):
        which = "a90 lies" if a90 > largest else "The bound of a90 lies"
        notes.append(f"{which} beyond the largest target ({largest:.4g}): it rests on the line alone.")
    elif a90 < smallest:
        notes.append(f"a90 lies below the smallest target ({smallest:.4g}): it rests on the line alone.")
    return SignalPod(
        kind="signal response",
        link="probit",
        intercept=float(line.best[1] - line.best[2] * line.middle),
        slope=float(line.best[2]),
        a50=line.size(line.at(0.0)),
        a90=a90,
        a90_95=a90_95,
        no_bound="" if coverage else FEW_CLUSTERS.format(counted(line.number, "cluster")),
        joint_a90_95=None if line.clustered else line.upper(JOINT),
        curve=line.curve(),
        lack_of_fit=worst(checks),
        targets=len(line.sizes),
        hits=hits,
        clusters=line.number,
        clustered=line.clustered,
        coverage=coverage,
        simulated=simulated,
        notes=tuple(notes),
        delta_a90_95=None if coverage is None else line.delta(),
        line=(intercept, slope, float(sigma * line.unit)),
        below=int((known == BELOW).sum()),
        above=int((known == ABOVE).sum()),
    )


def _coverage(line: SignalLine) -> tuple[float | None, str]:
    """What the bound of a90 covers, and in which sets; None where that is not known, or is too little."""
    table, there, unit = ALONE_COVERS, len(line.sizes), "targets"
    if line.clustered:
        table, there, unit = CLUSTERED_COVERS, line.number, "clusters"
    known = [least for least in table if least <= there]
    return (table[known[-1]], f"{known[-1]} {unit}") if known else (None, "")


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
    a: Floats, known: NDArray[np.int8], threshold: float, noise: float | None, saturation: float | None
) -> list[tuple[str, str]]:
    """Why there is no curve, each with what is missing."""
    found, measured = [], int((known == MEASURED).sum())
    if len(a) < LEAST_TARGETS:
        there = (
            f"There are {counted(len(a), 'target')}; a signal response needs {LEAST_TARGETS} or more (MIL-HDBK-1823A)."
        )
        found.append((there, counted(LEAST_TARGETS - len(a), "more target")))
    if measured < LEAST_MEASURED:
        low, high = int((known == BELOW).sum()), int((known == ABOVE).sum())
        found.append(
            (
                f"{measured} of {len(a)} signals are measured ({low} at the noise, {high} at the saturation); "
                f"a line takes at least {LEAST_MEASURED}.",
                f"{LEAST_MEASURED - measured} more targets whose signal is between noise and saturation",
            )
        )
    if (sizes := len(np.unique(np.round(np.log(a) / SAME)))) < LEAST_SIZES:
        found.append(
            (f"{counted(sizes, 'different size')}; a line takes at least {LEAST_SIZES}.", "targets of other sizes")
        )
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
