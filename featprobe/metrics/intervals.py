"""Intervals of scores, and tests whether two systems differ: a bootstrap over the groups of a test split.

Images of one group (a part, a film, a series) resemble each other, so whole groups are resampled, not images. A score
is a `Statistic`: a function of how often each group counts. All intervals are made from this function alone, in the
same way for every score; differences and means of statistics are statistics too, over the same groups.

The default interval is the studentised one (see `studentised_interval`): among those compared in benchmarks/coverage.py
only it has its nominal coverage with a dozen groups, and only its test of a difference keeps its level. Seeds are
averaged here, not resampled: an interval shows what these trained heads would score on other test groups. What other
seeds would give is the subject of procedures.py.

Efron and Tibshirani, An Introduction to the Bootstrap (1993); Hall, The Bootstrap and Edgeworth Expansion (1992);
Field and Welsh, Bootstrapping clustered data (2007).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from featprobe.errors import DataError, ShapeError
from featprobe.scores import FEW_GROUPS

Floats = NDArray[np.float64]
Method = Literal["percentile", "bca", "studentised"]
Names = tuple[str, ...]  # of groups

LEVEL = 0.95
RESAMPLES = 10_000
AT_ONCE = 2**16  # weights of one step: 512 KiB, which stay in a processor's cache
SAME = 1e-12  # scores this near are equal: rounding leaves such differences between equal scores
EDGE = 1e-9  # least distance to 0 and 1 at which the logit is computed


@dataclass(frozen=True)
class Statistic:
    """A score as a function of how often each group of the test split counts.

    value: weights (resamples, groups) -> (resamples,). Weights are whole numbers >= 0, as float64; with all weights 1
    it is the score. nan where a resample has no score.
    influence: weights -> (resamples, groups), the derivative of the value by the weight of each group. In each
    resample the influences, times their weights, sum to 0.
    sets: names of the groups per test set, in the order of the columns. Test sets are resampled independently.
    bounds: the least and the largest possible value.
    """

    value: Callable[[Floats], Floats]
    influence: Callable[[Floats], Floats]
    sets: tuple[Names, ...]
    bounds: tuple[float, float] = (0.0, 1.0)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of groups of each test set."""
        return tuple(map(len, self.sets))


@dataclass(frozen=True)
class Resamples:
    """A statistic on the test split and on resamples of its groups: the input of every interval.

    estimate, standard_error: on the split. influence: (groups,), on the split.
    values, standard_errors: (resamples,). bounds: those of the statistic.
    """

    estimate: float
    standard_error: float
    influence: Floats
    values: Floats
    standard_errors: Floats
    bounds: tuple[float, float]


@dataclass(frozen=True)
class Interval:
    """A score and its interval; low and high are nan where there is none: one group, or no score.

    groups: the number of groups of the interval. bounds: the least and the largest possible score.
    """

    estimate: float
    low: float
    high: float
    groups: int
    bounds: tuple[float, float] = (0.0, 1.0)

    @property
    def few_groups(self) -> bool:
        """Whether it has fewer than FEW_GROUPS groups, too few to rely on."""
        return self.groups < FEW_GROUPS

    @property
    def has_interval(self) -> bool:
        """Whether low and high limit the score: both are known, and neither is a bound of the scale."""
        return _inside(self.low, self.high, self.bounds)


@dataclass(frozen=True)
class Difference:
    """A difference of scores, its interval, and the two-sided p-value of no difference; nan as in Interval.

    From 6 groups on the interval excludes 0 exactly when p_value <= 1 - level.
    groups: the number of groups; the smaller number for two test sets. bounds: the least and the largest possible
    difference.
    """

    estimate: float
    low: float
    high: float
    p_value: float
    groups: int
    bounds: tuple[float, float] = (-1.0, 1.0)

    @property
    def few_groups(self) -> bool:
        """Whether it has fewer than FEW_GROUPS groups, too few to rely on."""
        return self.groups < FEW_GROUPS

    @property
    def has_interval(self) -> bool:
        """Whether low and high limit the difference: both are known, and neither is a bound of the scale."""
        return _inside(self.low, self.high, self.bounds)


def _inside(low: float, high: float, bounds: tuple[float, float]) -> bool:
    edge = EDGE * (bounds[1] - bounds[0])
    return bounds[0] + edge < low and high < bounds[1] - edge  # False for nan


def grouped(groups: Sequence[str]) -> tuple[Names, NDArray[np.intp]]:
    """Distinct names of groups in alphabetical order, and the index of each image's group among them, (images,).

    >>> names, index = grouped(["b", "a", "b"])
    >>> names, index.tolist()
    (('a', 'b'), [1, 0, 1])
    """
    place = {name: i for i, name in enumerate(sorted(set(groups)))}  # an array of texts would be as wide as the longest
    return tuple(place), np.fromiter((place[name] for name in groups), np.intp, len(groups))


def jackknifed(
    value: Callable[[Floats], Floats], groups: Sequence[str], bounds: tuple[float, float] = (0.0, 1.0)
) -> Statistic:
    """A statistic of any score without a known influence: each group is left out once instead (the jackknife).

    value: weights (resamples, groups), whole numbers, -> (resamples,). groups: distinct names, in the order of the
    columns. A studentised interval then needs about 0.63 evaluations per resample and group: for an expensive score use
    fewer resamples, 1,000 instead of 10,000.
    """

    def influence(weights: Floats) -> Floats:
        return _left_out(value, weights)

    return Statistic(value, influence, (tuple(groups),), bounds)


def _left_out(value: Callable[[Floats], Floats], weights: Floats) -> Floats:
    """Influences with the jackknife's standard error, from leaving out one copy of each group in turn.

    Where the rest has no score (nan), leaving out the copy counts as no change.
    """
    row, column = np.nonzero(weights)
    drawn = weights.sum(1, keepdims=True)
    rest = np.repeat(value(weights)[:, None], weights.shape[1], axis=1)  # (resamples, groups), the score without
    step = max(1, AT_ONCE // weights.shape[1])
    for begin in range(0, len(row), step):
        part = slice(begin, begin + step)
        fewer = weights[row[part]]
        fewer[np.arange(len(fewer)), column[part]] -= 1
        without = value(fewer)
        rest[row[part], column[part]] = np.where(np.isnan(without), rest[row[part], column[part]], without)
    mean = (weights * rest).sum(1, keepdims=True) / drawn
    return (drawn - 1) / drawn * (mean - rest)


def mean_of(runs: Sequence[Statistic]) -> Statistic:
    """The mean over runs (seeds) of one system on one test split; each resample draws the same groups for all runs.

    Raises ShapeError when there is no run, or when runs were scored on different groups.
    """
    if not runs:
        raise ShapeError("The mean needs one run or more, found none.")
    for run in runs[1:]:
        check_paired(runs[0], run)
    return Statistic(
        lambda weights: np.mean([run.value(weights) for run in runs], axis=0),
        lambda weights: sum((run.influence(weights) for run in runs[1:]), runs[0].influence(weights)) / len(runs),
        runs[0].sets,
        runs[0].bounds,
    )


def difference_of(a: Statistic, b: Statistic) -> Statistic:
    """a - b of two systems on one test split; each resample draws the same groups for both.

    Raises ShapeError when they were scored on different groups.
    """
    check_paired(a, b)
    return Statistic(
        lambda weights: a.value(weights) - b.value(weights),
        lambda weights: a.influence(weights) - b.influence(weights),
        a.sets,
        (a.bounds[0] - b.bounds[1], a.bounds[1] - b.bounds[0]),
    )


def unpaired_of(a: Statistic, b: Statistic) -> Statistic:
    """a - b of one score on two test sets, whose groups are resampled independently."""
    end = sum(a.sizes)
    return Statistic(
        lambda weights: a.value(weights[:, :end]) - b.value(weights[:, end:]),
        lambda weights: np.hstack([a.influence(weights[:, :end]), -b.influence(weights[:, end:])]),
        (*a.sets, *b.sets),
        (a.bounds[0] - b.bounds[1], a.bounds[1] - b.bounds[0]),
    )


def check_paired(a: Statistic, b: Statistic) -> None:
    """Raise ShapeError when two systems were scored on different groups."""
    if a.sets != b.sets:
        raise ShapeError(
            f"Scores on {sum(a.sizes)} and on {sum(b.sizes)} groups can't be paired: the groups are not the same.\n"
            "Nothing was compared. Score both on the same images of the same test split."
        )


def resample(statistic: Statistic, resamples: int = RESAMPLES, seed: int = 0) -> Resamples:
    """Resample the groups of each test set, as many as it has, and compute the statistic for each resample.

    The same seed draws the same groups of a set for every statistic. Raises DataError for fewer than two groups in a
    set, because one group says nothing about others.
    """
    sizes = statistic.sizes
    if min(sizes) < 2:
        held = ", ".join(map(str, sizes))
        raise DataError(f"A test set of {held} group(s) has no interval. wanted: two groups or more in each set.")
    correction = np.concatenate([np.full(size, size / (size - 1)) for size in sizes])  # as for the variance of a sample

    def measured(weights: Floats) -> tuple[Floats, Floats, Floats]:
        influence = statistic.influence(weights)
        return statistic.value(weights), np.sqrt((weights * influence**2) @ correction), influence

    (estimate,), (standard_error,), (influence,) = measured(np.ones((1, sum(sizes))))
    blocks = [measured(weights)[:2] for weights in draw_weights(sizes, resamples, seed)]
    values, standard_errors = (np.concatenate(part) for part in zip(*blocks, strict=True))
    return Resamples(float(estimate), float(standard_error), influence, values, standard_errors, statistic.bounds)


def group_variances(influence: Floats, sizes: Sequence[int]) -> Floats:
    """Variance of statistics due to the groups of each set, (statistics, sets); influence: (statistics, groups).

    The variance of a set of one group is unknown, and counts as 0.
    """
    squares = np.split(influence**2, np.cumsum(sizes)[:-1], axis=1)
    pairs = zip(squares, sizes, strict=True)
    return np.stack([squares.sum(1) * size / max(1, size - 1) for squares, size in pairs], axis=1)


def draw_weights(sizes: Sequence[int], resamples: int, seed: int, at_once: int = AT_ONCE) -> Iterator[Floats]:
    """Yields how often each group is drawn, (some resamples, groups) at a time: a resample has as many draws per set as
    the set has groups.

    sizes: the number of groups per test set. Each set has its own random numbers, so that adding a set changes nothing
    in the others. at_once: weights of one step, which changes nothing but the speed.
    """
    streams = [np.random.default_rng([seed, i]) for i in range(len(sizes))]
    step = max(1, at_once // sum(sizes))
    for begin in range(0, resamples, step):
        rows = min(step, resamples - begin)
        yield np.hstack([_counts(stream, rows, size) for stream, size in zip(streams, sizes, strict=True)])


def _counts(stream: np.random.Generator, rows: int, size: int) -> Floats:
    cells = stream.integers(size, size=(rows, size)) + size * np.arange(rows)[:, None]
    return np.bincount(cells.ravel(), minlength=rows * size).reshape(rows, size).astype(float)


def percentile_interval(sample: Resamples, level: float = LEVEL) -> tuple[float, float]:
    """The interval between two quantiles of the resampled values. With few groups its coverage is too low.

    Efron and Tibshirani (1993), chapter 13.
    """
    return _quantiles(sample, np.array([1 - level, 1 + level]) / 2)


def bca_interval(sample: Resamples, level: float = LEVEL) -> tuple[float, float]:
    """The BCa interval: quantiles corrected for the bias of the resampled values and the skewness of the influences.

    Efron, Better Bootstrap Confidence Intervals (1987).
    """
    if sample.standard_error <= SAME:
        return sample.estimate, sample.estimate
    known = sample.values[~np.isnan(sample.values)]
    below = (np.sum(known < sample.estimate) + np.sum(known <= sample.estimate)) / 2
    bias = scipy.special.ndtri(np.clip(below, 0.5, len(known) - 0.5) / len(known)) if len(known) else np.nan
    influence = sample.influence
    acceleration = np.sum(influence**3) / np.sum(influence**2) ** 1.5 / 6
    moved = bias + scipy.special.ndtri(np.array([1 - level, 1 + level]) / 2)
    return _quantiles(sample, scipy.special.ndtr(bias + moved / (1 - acceleration * moved)))


def _quantiles(sample: Resamples, shares: Floats) -> tuple[float, float]:
    known = sample.values[~np.isnan(sample.values)]
    low, high = np.quantile(known, shares).tolist() if len(known) else (np.nan, np.nan)
    return low, high


def studentised_interval(sample: Resamples, level: float = LEVEL) -> tuple[float, float]:
    """The bootstrap-t interval, symmetric on the logit scale: it contains the estimate and stays within the bounds.

    The distance of each resampled value to the estimate is measured in the standard errors of that resample. The
    interval reaches as many standard errors of the estimate to both sides as contain a share `level` of the resamples.
    A resample without a standard error counts as infinitely far away: with too many of them the interval goes from
    bound to bound, because such groups show no more.

    Hall (1992), sections 3.5 and 3.6.
    """
    return _within(sample, sample.standard_error, _reach(distances_of(sample), level))


def _reach(distances: Floats, level: float) -> float:
    """The distance to the estimate, in standard errors, within which a share `level` of the draws is."""
    farther = np.sort(np.abs(distances))
    within = int(np.ceil(level * (len(farther) + 1) - SAME))  # the estimate itself counts as one of the draws
    return float(farther[within - 1]) if within <= len(farther) else np.inf


def _within(sample: Resamples, standard_error: float, reach: float) -> tuple[float, float]:
    """The interval of so many standard errors to both sides of the estimate, on the logit scale."""
    if standard_error <= SAME:
        return sample.estimate, sample.estimate
    centre, slope = _on_logit(np.array(sample.estimate), sample.bounds)
    ends = centre + np.array([-1, 1]) * reach * standard_error * slope
    lowest, highest = sample.bounds
    low, high = (lowest + (highest - lowest) * scipy.special.expit(ends)).tolist()
    return low, high


def distances_of(sample: Resamples) -> Floats:
    """Each resampled value minus the estimate, (resamples,), on the logit scale, in the standard errors of each."""
    estimate, _ = _on_logit(np.array(sample.estimate), sample.bounds)
    values, slopes = _on_logit(sample.values, sample.bounds)
    errors = sample.standard_errors * slopes
    known = sample.standard_errors > SAME  # False for nan
    distances = np.divide(values - estimate, errors, out=np.full(len(values), np.inf), where=known)
    return np.where(np.abs(sample.values - sample.estimate) <= SAME, 0, distances)


def _on_logit(values: Floats, bounds: tuple[float, float]) -> tuple[Floats, Floats]:
    """The logit of each value, scaled from the bounds to [0, 1], and its derivative by the value."""
    width = bounds[1] - bounds[0]
    place = np.clip((values - bounds[0]) / width, EDGE, 1 - EDGE)
    return scipy.special.logit(place), 1 / (width * place * (1 - place))


def _distance_of_zero(sample: Resamples, standard_error: float) -> float:
    """The distance of the estimate to 0, in standard errors, on the logit scale."""
    if abs(sample.estimate) <= SAME:
        return 0.0
    estimate, slope = _on_logit(np.array(sample.estimate), sample.bounds)
    zero, _ = _on_logit(np.array(0.0), sample.bounds)
    return float(np.abs(estimate - zero) / (standard_error * slope)) if standard_error > SAME else np.inf


def _share_beyond(distances: Floats, distance: float) -> float:
    """The share of draws at this distance from the estimate or farther; the estimate counts as one such draw."""
    return (1 + int(np.sum(np.abs(distances) >= distance))) / (1 + len(distances))


INTERVALS: dict[Method, Callable[[Resamples, float], tuple[float, float]]] = {
    "percentile": percentile_interval,
    "bca": bca_interval,
    "studentised": studentised_interval,
}


def score_interval(
    statistic: Statistic,
    method: Method = "studentised",
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """A score of one system, or the `mean_of` its runs, with its interval.

    >>> perfect, blind = [[50, 0], [0, 50]], [[50, 0], [50, 0]]  # pixels of the truth's class by the predicted one
    >>> from featprobe.metrics import pixel_statistic
    >>> score = pixel_statistic(np.array([perfect, blind] * 12), groups=[f"part{i:02}" for i in range(24)])
    >>> found = score_interval(score)
    >>> found.estimate, round(found.low, 2), round(found.high, 2), found.groups
    (0.5, 0.31, 0.69, 24)
    """
    groups = min(statistic.sizes)
    if not can_be_resampled(statistic):
        return Interval(_estimate(statistic), np.nan, np.nan, groups, statistic.bounds)
    sample = resample(statistic, resamples, seed)
    return Interval(sample.estimate, *INTERVALS[method](sample, level), groups, statistic.bounds)


def paired_difference(
    a: Statistic, b: Statistic, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """a - b of two systems scored on the same test images; each resample draws the same groups for both.

    Raises ShapeError when they were scored on different groups.
    """
    return _difference(difference_of(a, b), level, resamples, seed)


def modality_gap(
    first: tuple[Statistic, Statistic],
    second: tuple[Statistic, Statistic],
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """How much larger the lead of a over b is on a first test set than on a second: (a - b on RGB) - (a - b on X-ray).

    first, second: a and b on that set, paired; the two sets are resampled independently. Raises ShapeError when a and b
    of one set were scored on different groups.
    """
    return _difference(unpaired_of(difference_of(*first), difference_of(*second)), level, resamples, seed)


def _difference(statistic: Statistic, level: float, resamples: int, seed: int) -> Difference:
    """A difference, its interval, and its p-value: the share of resamples at least as far from it as 0 is.

    The p-value is the inverse of the studentised interval.
    """
    if not can_be_resampled(statistic):
        return no_difference(statistic)
    sample = resample(statistic, resamples, seed)
    return widest(statistic, sample, [(sample.standard_error, distances_of(sample))], level)


def widest(statistic: Statistic, sample: Resamples, errors: Sequence[tuple[float, Floats]], level: float) -> Difference:
    """A difference with the widest interval and the largest p-value of several estimates of its error.

    errors: a standard error and draws (as from distances_of, in any number) per estimate. No p-value is below
    2^(1 - groups): no test of differences that could have either sign in each group can reach less.
    """
    lows, highs = zip(*(_within(sample, error, _reach(draws, level)) for error, draws in errors), strict=True)
    shares = [_share_beyond(draws, _distance_of_zero(sample, error)) for error, draws in errors]
    p_value = max(*shares, 2.0 ** (1 - sum(statistic.sizes)))
    return Difference(sample.estimate, min(lows), max(highs), p_value, min(statistic.sizes), statistic.bounds)


def can_be_resampled(statistic: Statistic) -> bool:
    """Whether a statistic has a score, and each test set two groups or more."""
    return min(statistic.sizes) >= 2 and not np.isnan(_estimate(statistic))


def no_difference(statistic: Statistic) -> Difference:
    """A difference with only its estimate; interval and p-value are nan."""
    return Difference(_estimate(statistic), np.nan, np.nan, np.nan, min(statistic.sizes), statistic.bounds)


def _estimate(statistic: Statistic) -> float:
    return float(statistic.value(np.ones((1, sum(statistic.sizes))))[0])


def holm(p_values: ArrayLike) -> tuple[float, ...]:
    """P-values of a family of tests, corrected so that any false finding among all is as rare as each p-value says.

    nan, a test that could not be made, stays nan and does not count. Raises ShapeError for values that are no p-values.

    >>> holm([0.01, 0.04, 0.03])
    (0.03, 0.06, 0.06)

    Holm, A simple sequentially rejective multiple test procedure (1979).
    """
    given = np.asarray(p_values, dtype=float)
    if given.ndim != 1 or np.any((given < 0) | (given > 1)):
        raise ShapeError(f"{given.tolist()} are not p-values. wanted: a list of numbers 0 <= p <= 1.")
    known = np.flatnonzero(~np.isnan(given))
    order = known[np.argsort(given[known], kind="stable")]
    adjusted = np.full(len(given), np.nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(given[order] * np.arange(len(order), 0, -1)), 1)
    return tuple(adjusted.tolist())
