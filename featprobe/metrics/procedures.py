"""Whether two procedures differ: a backbone with its head and recipe, whatever the seed that trains it.

Two heads that differ by the seed alone do differ: a bootstrap over groups says so, and is right about these two heads.
Of the procedures that made them it says nothing: a difference of procedures has to hold the seeds, too. Seeds and
groups are crossed, all heads being scored on the same test groups:

    score(A, s, g) = mean(A) + seed(A, s) + group(g) + procedure x group(A, g) + seed x group(A, s, g)

What groups do to the difference of two means over seeds, V_g, the bootstrap over groups holds, and in it what seed x
group does. The variance between the scores of seeds, S2, holds that too: so much of it as seed x group explains, M.
Both are pooled over the results of a table, since few seeds say little of a variance. With c = 1/k_A + 1/k_B for k
seeds a side, the difference has the variance

    max(V_g - c M, 0) + c S2

The error of the second term is drawn from Student's t, since seeds are few; that of the first is drawn again with the
groups, and both are added (Behrens and Fisher's problem). Where seeds happen to agree that may come out surer than the
bootstrap over groups alone. Then the latter counts: nothing is surer of procedures than of the heads that they made.
benchmarks/coverage.py measures how often equals are found to differ.

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
    apart,
    can_be_resampled,
    check_paired,
    difference_of,
    distances_of,
    group_variances,
    mean_of,
    no_difference,
    resample,
    widest,
)


@dataclass(frozen=True)
class SeedVariance:
    """Variance between the scores of seeds of one procedure, and what it is made of.

    between: of the scores, each on all test groups. by_groups: what seed x group explains of it; it would vanish with
    ever more test groups. degrees: of freedom that both rest on; with 0 nothing is known of them.
    """

    between: float
    by_groups: float
    degrees: int

    @property
    def of_seeds(self) -> float:
        """What seeds would do on test splits without end, >= 0."""
        return max(self.between - self.by_groups, 0.0)


UNKNOWN, NO_VARIANCE = SeedVariance(np.nan, np.nan, 0), SeedVariance(0.0, 0.0, 1)


@dataclass(frozen=True)
class SeedSpread:
    """What seeds do to the results of one table.

    sets: of the groups that the results were scored on. own: of a result's seeds. shared: number of seeds -> of results
    that ran the same seeds, less what a seed does to all of them; where the seed picks the training images, that is
    much. Half the variance of a difference of two results with one and the same seed.
    """

    sets: tuple[Names, ...] = field(repr=False)
    own: SeedVariance
    shared: Mapping[int, SeedVariance]


def seed_spread(results: Sequence[Sequence[Statistic]]) -> SeedSpread:
    """The seed variance of results that share task, head, fraction and data, pooled.

    results: of each a statistic per seed, all over the same groups. One with one seed says nothing of seeds, and a seed
    without a score (nan) is left out. For `shared`, results with equally many seeds are taken to have run the same ones
    in the same order; where they did not, it is too large rather than too small.
    Raises ShapeError where there is no result, or where they were scored on other groups.
    """
    runs = [run for result in results for run in result]
    if not runs:
        raise ShapeError("There is no result whose seeds could be compared.")
    for run in runs[1:]:
        check_paired(runs[0], run)
    sizes = runs[0].sizes
    known = [_known_seeds(result) for result in results]
    own = [seeds - seeds.mean(0) for seeds in known if len(seeds) > 1]
    shared = {}
    for count in sorted({len(seeds) for seeds in own}):
        alike = np.stack([seeds for seeds in own if len(seeds) == count])  # (results, seeds, 1 + groups)
        shared[count] = _pooled(alike - alike.mean(0), (len(alike) - 1) * (count - 1), sizes)
    return SeedSpread(runs[0].sets, _pooled(own, sum(len(seeds) - 1 for seeds in own), sizes), shared)


def _known_seeds(result: Sequence[Statistic]) -> Floats:
    """Score and influences of each seed that has a score, (seeds, 1 + groups)."""
    ones = [np.ones((1, sum(run.sizes))) for run in result]
    every = [np.hstack([run.value(one)[:, None], run.influence(one)]) for run, one in zip(result, ones, strict=True)]
    return np.concatenate([seed for seed in every if not np.isnan(seed[0, 0])] or [np.empty((0, 1))])


def _pooled(deviations: Sequence[Floats] | Floats, degrees: int, sizes: Sequence[int]) -> SeedVariance:
    """From deviations of scores and influences, of each result (seeds, 1 + groups)."""
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
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """Mean over seeds of a less that of b, as other test groups and other seeds might have given it.

    a, b: a statistic per seed. spread: the seed_spread of their table; None where neither has seed variance (solved
    heads on all training images): then groups alone count, as in paired_difference. same_seeds: both ran the same
    seeds, in this order, and a seed does something to both (it picks the training images): what it does to both
    cancels. low, high and p_value are nan where nothing is known of seeds: no result of the table has two.
    Raises ShapeError where they were scored on other groups, or same_seeds have other numbers of seeds.
    """
    return _claim([_side(a, b, spread, same_seeds)], level, resamples, seed)


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
    """By how much more a procedure is ahead on a first test set than on a second; compare modality_gap.

    first, second: a and b on that set, a statistic per seed; the heads of the two sets were trained apart, so that
    neither groups nor seeds of one say anything of the other. spreads: of the table of each. Else as
    procedure_difference.
    """
    sides = [_side(*pair, spread, same_seeds) for pair, spread in zip((first, second), spreads, strict=True)]
    return _claim(sides, level, resamples, seed)


@dataclass(frozen=True)
class _Side:
    """A difference on one test set. seeds: variance of a seed's score; share: how much of it the difference has."""

    difference: Statistic
    seeds: SeedVariance
    share: float


def _side(a: Sequence[Statistic], b: Sequence[Statistic], spread: SeedSpread | None, same_seeds: bool) -> _Side:
    difference = difference_of(mean_of(a), mean_of(b))
    if spread is None:
        return _Side(difference, NO_VARIANCE, 0.0)
    if spread.sets != difference.sets:
        raise ShapeError("The spread over seeds is of results on other test groups than those of the difference.")
    if same_seeds and len(a) != len(b):
        raise ShapeError(f"{len(a)} and {len(b)} seeds are not the same seeds.")
    seeds = spread.shared.get(len(a), UNKNOWN) if same_seeds else spread.own
    return _Side(difference, seeds, 1 / len(a) + 1 / len(b))


def _claim(sides: Sequence[_Side], level: float, resamples: int, seed: int) -> Difference:
    """The difference, or the difference of two differences, with an interval that holds groups and seeds."""
    statistic = sides[0].difference if len(sides) == 1 else apart(sides[0].difference, sides[1].difference)
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
    """What groups give to the variance beyond what the seeds' hold of it, and the seeds' of each side."""
    of_sets = group_variances(sample.influence[None], [size for side in sides for size in side.difference.sizes])[0]
    of_sides = np.split(of_sets, np.cumsum([len(side.difference.sizes) for side in sides])[:-1])
    groups = [
        max(float(own.sum()) - side.share * side.seeds.by_groups, 0.0)
        for own, side in zip(of_sides, sides, strict=True)
    ]
    return sum(groups), [side.share * side.seeds.between for side in sides]


def _seed_errors(sides: Sequence[_Side], seeds: Sequence[float], variance: float, resamples: int, seed: int) -> Floats:
    """Errors that the seeds of each side make, (resamples,): Student's t, since their variance is only estimated.

    The less of the variance they are, the less does doubt about their own matter: degrees of freedom grow with the
    ratio of both standard errors.
    """
    sets = sum(len(side.difference.sizes) for side in sides)  # which have random numbers of their own
    total = np.zeros(resamples)
    for i, (side, own) in enumerate(zip(sides, seeds, strict=True)):
        if own > SAME**2:
            degrees = side.seeds.degrees * np.sqrt(variance / own)
            total += np.sqrt(own) * np.random.default_rng([seed, sets + i]).standard_t(degrees, resamples)
    return total
