"""Tests whether two procedures differ. A procedure is a backbone with its head and recipe, for any seed.

Two heads from the same procedure with different seeds do differ: a bootstrap over groups finds it, and is right about
these two heads. But it says nothing about the procedures: a difference of procedures must include the variance of
seeds. Seeds and groups are crossed, because all heads are scored on the same test groups:

    score(A, s, g) = mean(A) + seed(A, s) + group(g) + procedure x group(A, g) + seed x group(A, s, g)

The bootstrap over groups gives V_g: the variance that groups cause in the difference of two means over seeds, with the
part of seed x group. The variance between the scores of seeds, S2, contains seed x group too: this part is M. S2 and M
are pooled over the results of a table, because few seeds say little about a variance. With c = 1/k_A + 1/k_B for k
seeds per side, the difference has the variance

    max(V_g - c M, 0) + c S2

The error of the second term is drawn from Student's t, because seeds are few; that of the first comes from the
resampled groups, and both are added (Behrens and Fisher's problem). Where seeds agree by chance, the result may be
surer than the bootstrap over groups alone. Then the bootstrap counts: procedures can't be known better than the heads
that they made. benchmarks/coverage.py measures how often equal procedures are found to differ.

Searle, Casella and McCulloch, Variance Components (1992); Fisher, The comparison of samples with possibly unequal
variances (1939).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from featprobe.errors import ShapeError
from featprobe.metrics.intervals import (
    LEVEL,
    RESAMPLES,
    SAME,
    Difference,
    Floats,
    Names,
    Resamples,
    Statistic,
    can_be_resampled,
    check_paired,
    difference_of,
    distances_of,
    group_variances,
    mean_of,
    no_difference,
    resample,
    unpaired_of,
    widest,
)


@dataclass(frozen=True)
class SeedVariance:
    """Variance between the scores of the seeds of one procedure, and its parts.

    between: variance of the scores, each on all test groups. by_groups: the part due to seed x group, which would
    vanish with infinitely many test groups. degrees: degrees of freedom of both; with 0 nothing is known about them.
    """

    between: float
    by_groups: float
    degrees: int

    @property
    def of_seeds(self) -> float:
        """The variance of seeds on an infinitely large test split, >= 0."""
        return max(self.between - self.by_groups, 0.0)


UNKNOWN, NO_VARIANCE = SeedVariance(np.nan, np.nan, 0), SeedVariance(0.0, 0.0, 1)


@dataclass(frozen=True)
class SeedSpread:
    """The variance of seeds in the results of one table.

    sets: names of the test groups of the results. own: variance between the seeds of one result. shared: number of
    seeds -> variance for results that ran the same seeds, without the common effect of a seed on all of them, which is
    large where the seed picks the training images. It is half the variance of a difference of two results with the same
    seed.
    """

    sets: tuple[Names, ...] = field(repr=False)
    own: SeedVariance
    shared: Mapping[int, SeedVariance]


def seed_spread(results: Sequence[Sequence[Statistic]]) -> SeedSpread:
    """The seed variance of results that share task, head, fraction and data, pooled.

    results: per result one statistic per seed, all over the same groups. A result with one seed says nothing about
    seeds, and a seed without a score (nan) is left out. For `shared`, results with the same number of seeds are assumed
    to have the same seeds in the same order; where they have not, the variance is too large rather than too small.
    Raises ShapeError where there is no result, or where results were scored on different groups.
    """
    runs = [run for result in results for run in result]
    if not runs:
        raise ShapeError("The spread over seeds needs one result or more, found none.")
    for run in runs[1:]:
        check_paired(runs[0], run)
    sizes = runs[0].sizes
    known = [_known_seeds(result) for result in results]
    deviations = [seeds - seeds.mean(0) for seeds in known if len(seeds) > 1]
    shared = {}
    for count in sorted({len(seeds) for seeds in deviations}):
        alike = np.stack([seeds for seeds in deviations if len(seeds) == count])  # (results, seeds, 1 + groups)
        shared[count] = _pooled(alike - alike.mean(0), (len(alike) - 1) * (count - 1), sizes)
    return SeedSpread(runs[0].sets, _pooled(deviations, sum(len(seeds) - 1 for seeds in deviations), sizes), shared)


def _known_seeds(result: Sequence[Statistic]) -> Floats:
    """Score and influences per seed, for the seeds with a score, (seeds, 1 + groups)."""
    ones = [np.ones((1, sum(run.sizes))) for run in result]
    every = [np.hstack([run.value(one)[:, None], run.influence(one)]) for run, one in zip(result, ones, strict=True)]
    return np.concatenate([seed for seed in every if not np.isnan(seed[0, 0])] or [np.empty((0, 1))])


def _pooled(deviations: Sequence[Floats] | Floats, degrees: int, sizes: Sequence[int]) -> SeedVariance:
    """The variance from deviations of scores and influences, (seeds, 1 + groups) per result."""
    if not degrees:
        return UNKNOWN
    every = np.concatenate(list(deviations))
    by_groups = group_variances(every[:, 1:], sizes).sum()
    return SeedVariance(float((every[:, 0] ** 2).sum() / degrees), float(by_groups / degrees), degrees)


def procedure_difference(
    a: Sequence[Statistic],
    b: Sequence[Statistic],
    spread: SeedSpread | None,
    *,
    same_seeds: bool = False,
    fixed: tuple[bool, bool] = (False, False),
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """Mean over seeds of a minus that of b, with an interval that covers other test groups and other seeds.

    a, b: a statistic per seed. spread: the seed_spread of their table; None where neither has seed variance (solved
    heads on all training images): then only groups count, as in paired_difference. same_seeds: both ran the same
    seeds, in this order, and a seed has an effect on both (it picks the training images): the common effect cancels.
    fixed: whether any seed would give the same on a side, as of a solved head: it adds nothing to the seeds' variance.
    low, high and p_value are nan where nothing is known about seeds, because no result of the table has two.
    Raises ShapeError where a and b were scored on different groups, or have different numbers of seeds with same_seeds.
    """
    return _claim([_side(a, b, spread, same_seeds, fixed)], level, resamples, seed)


def procedure_gap(
    first: tuple[Sequence[Statistic], Sequence[Statistic]],
    second: tuple[Sequence[Statistic], Sequence[Statistic]],
    spreads: tuple[SeedSpread | None, SeedSpread | None],
    *,
    same_seeds: bool = False,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """How much larger the lead of procedure a over b is on a first test set than on a second; compare modality_gap.

    first, second: a and b on that set, a statistic per seed. The heads of the two sets were trained independently, so
    neither groups nor seeds of one set say anything about the other. spreads: the seed_spread of each set's table. Else
    as procedure_difference.
    """
    sides = [_side(*pair, spread, same_seeds) for pair, spread in zip((first, second), spreads, strict=True)]
    return _claim(sides, level, resamples, seed)


@dataclass(frozen=True)
class _Side:
    """A difference on one test set. seeds: variance of a seed's score; share: its factor in the difference (c)."""

    difference: Statistic
    seeds: SeedVariance
    share: float


def _side(
    a: Sequence[Statistic],
    b: Sequence[Statistic],
    spread: SeedSpread | None,
    same_seeds: bool,
    fixed: tuple[bool, bool] = (False, False),
) -> _Side:
    difference = difference_of(mean_of(a), mean_of(b))
    if spread is None:
        return _Side(difference, NO_VARIANCE, 0.0)
    if spread.sets != difference.sets:
        raise ShapeError("The spread over seeds was computed on other test groups than the difference.")
    if same_seeds and len(a) != len(b):
        raise ShapeError(f"{len(a)} and {len(b)} seeds are not the same seeds.")
    seeds = spread.shared.get(len(a), UNKNOWN) if same_seeds else spread.own
    share = sum(1 / len(own) for own, alike in zip((a, b), fixed, strict=True) if not alike)
    return _Side(difference, seeds, share)


def _claim(sides: Sequence[_Side], level: float, resamples: int, seed: int) -> Difference:
    """The difference, or the difference of two differences, with an interval that covers groups and seeds."""
    statistic = sides[0].difference if len(sides) == 1 else unpaired_of(sides[0].difference, sides[1].difference)
    if not can_be_resampled(statistic) or any(not side.seeds.degrees for side in sides):
        return no_difference(statistic)
    sample = resample(statistic, resamples, seed)
    groups, seeds = _variances(sides, sample)
    variance = groups + sum(seeds)
    distances = distances_of(sample)
    views = [(sample.standard_error, distances)]
    if sum(seeds) > SAME**2:
        by_groups = distances * np.sqrt(groups / variance) if groups > SAME**2 else np.zeros(resamples)
        by_seeds = _seed_errors(sides, seeds, variance, resamples, seed) / np.sqrt(variance)
        either = np.concatenate([by_groups + by_seeds, by_groups - by_seeds])  # so that b - a mirrors a - b
        views.append((float(np.sqrt(variance)), either))
    return widest(statistic, sample, views, level)


def _variances(sides: Sequence[_Side], sample: Resamples) -> tuple[float, list[float]]:
    """The variance due to groups that is not in the seeds' variance, and the seeds' variance per side."""
    of_sets = group_variances(sample.influence[None], [size for side in sides for size in side.difference.sizes])[0]
    of_sides = np.split(of_sets, np.cumsum([len(side.difference.sizes) for side in sides])[:-1])
    groups = [
        max(float(of_groups.sum()) - side.share * side.seeds.by_groups, 0.0)
        for of_groups, side in zip(of_sides, sides, strict=True)
    ]
    return sum(groups), [side.share * side.seeds.between for side in sides]


def _seed_errors(sides: Sequence[_Side], seeds: Sequence[float], variance: float, resamples: int, seed: int) -> Floats:
    """Errors due to the seeds of all sides, (resamples,): from Student's t, because their variance is only estimated.

    The smaller their share of the variance, the less the doubt about it matters: degrees of freedom grow with the ratio
    of both standard errors.
    """
    sets = sum(len(side.difference.sizes) for side in sides)  # the sets use the random numbers before these
    total = np.zeros(resamples)
    for i, (side, of_seeds) in enumerate(zip(sides, seeds, strict=True)):
        if of_seeds > SAME**2:
            degrees = side.seeds.degrees * np.sqrt(variance / of_seeds)
            total += np.sqrt(of_seeds) * np.random.default_rng([seed, sets + i]).standard_t(degrees, resamples)
    return total
