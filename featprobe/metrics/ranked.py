"""Areas under the curves of a ranking, as Statistics over groups: AUROC, part of it, average precision.

A ranking says, for each group, how much of what is to be found (positives) and of what is not (negatives) has each of
some distinct scores, the highest first: numbers of images or pixels, or shares of regions. Equal scores are one entry,
so ties count half in an area, and as one threshold in average precision. An area is a function of weighted sums over
groups; its derivatives by them are exact, and with them the influences of groups. A resample without positives or
without negatives has no area. With positives in one or two groups many resamples have none, and an interval from bound
to bound says that such groups show nothing of others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray

from featprobe.metrics.intervals import Floats, Names, Statistic

WORTH = 32  # squared groups per score, up to which pairs of groups are quicker than curves
AT_ONCE = 2**18  # values of one array in one step: 2 MiB, which stay in a processor's cache

Slopes = Callable[[], tuple[Floats, Floats]]
Curve = Callable[[Floats, Floats], tuple[Floats, Slopes]]
"""From positives and negatives of some resamples, both (scores, resamples), to the area of each, (resamples,), and what
gives its derivatives by both. Each resample holds some of both."""


@dataclass(frozen=True)
class Ranking:
    """Positives and negatives by group and score: both (groups, scores), the highest score first; dense or sparse."""

    positive: Any
    negative: Any

    @classmethod
    def of(cls, scores: NDArray[Any], positive: NDArray[np.bool_], group: NDArray[np.intp]) -> "Ranking":
        """The ranking of single units: their scores, whether each is to be found, and the index of its group."""
        distinct, place = np.unique(-scores, return_inverse=True)
        shape = (int(group.max(initial=-1)) + 1, len(distinct))
        return cls(*(
            scipy.sparse.coo_array((np.ones(side.sum()), (group[side], place[side])), shape).tocsr()
            for side in (positive, ~positive)
        ))  # fmt: skip

    def auroc(self, names: Names) -> Statistic:
        """The area to a share of negatives of 1, which is the AUROC, by the shorter of two ways.

        With few groups, pairs are counted once for each two groups: no curve is drawn for any resample.
        """
        groups, scores = self.positive.shape
        return self._of_pairs(names) if groups**2 <= WORTH * scores else self.statistic(area_to(1.0), names)

    def _of_pairs(self, names: Names) -> Statistic:
        """The AUROC from the pairs in which a group's positives have higher scores than another's negatives."""
        negative = self.negative if isinstance(self.negative, np.ndarray) else self.negative.toarray()
        below = negative.sum(1, keepdims=True) - negative.cumsum(1) + negative / 2  # (groups, scores), ties half
        pairs = self.positive @ below.T  # (groups with positives, groups with negatives)
        up, down = self.positive.sum(1), negative.sum(1)

        def value(weights: Floats) -> Floats:
            every = (weights @ up) * (weights @ down)
            return np.divide(
                ((weights @ pairs) * weights).sum(1), every, out=np.full(len(every), np.nan), where=every > 0
            )

        def influence(weights: Floats) -> Floats:
            ups, downs, area = weights @ up, weights @ down, value(weights)
            known = ups * downs > 0
            ups, downs = (np.where(known, part, np.inf)[:, None] for part in (ups, downs))  # inf: no influence
            moved = (weights @ pairs + weights @ pairs.T) / (ups * downs)
            return moved - np.where(known, area, 0)[:, None] * (up / ups + down / downs)

        return Statistic(value, influence, (names,))

    def statistic(self, curve: Curve, names: Names) -> Statistic:
        """The area under a curve as a function of how often each group counts; nan without positives or negatives."""
        up, down = self.positive.T, self.negative.T  # (scores, groups)
        step = max(1, AT_ONCE // max(1, up.shape[0]))

        def sums(weights: Floats) -> tuple[Floats, Floats, NDArray[np.bool_]]:
            """Positives and negatives, (scores, resamples), and which resamples hold both."""
            positive, negative = up @ weights.T, down @ weights.T
            return positive, negative, (positive.sum(0) > 0) & (negative.sum(0) > 0)

        def area(weights: Floats) -> Floats:
            positive, negative, known = sums(weights)
            found = np.full(len(weights), np.nan)
            if known.any():
                found[known] = curve(positive[:, known], negative[:, known])[0]
            return found

        def influence(weights: Floats) -> Floats:
            positive, negative, known = sums(weights)
            found = np.zeros(weights.shape)
            if known.any():
                by_positive, by_negative = curve(positive[:, known], negative[:, known])[1]()
                found[known] = (up.T @ by_positive + down.T @ by_negative).T
            return found

        def in_steps(function: Callable[[Floats], Floats]) -> Callable[[Floats], Floats]:
            return lambda weights: np.concatenate(
                [function(weights[:0]), *(function(weights[i : i + step]) for i in range(0, len(weights), step))]
            )

        return Statistic(in_steps(area), in_steps(influence), (names,))


def area_to(limit: float) -> Curve:
    """The area under positives found against negatives called, both as shares, up to a share of negatives; over limit.

    With limit 1 it is the AUROC: the share of pairs in which the positive has the higher score, ties counted half.
    Between two scores the curve is straight, and so it is cut where it passes the limit.
    """

    bound = limit if limit < 1 else np.inf  # at 1 nothing is cut

    def curve(positive: Floats, negative: Floats) -> tuple[Floats, Slopes]:
        y, total_y = _shares(positive)
        x, total_x = _shares(negative)
        start, end, low, high = x[:-1], x[1:], y[:-1], y[1:]  # of each segment, (scores, resamples)
        inside, full, rise = start < bound, end < bound, high - low
        width = np.where(full, end, limit) - start
        share = np.divide(width, end - start, out=np.ones_like(width), where=inside & ~full)
        width, share = np.where(inside, width, 0), np.where(inside, share, 0)
        area = (width * (low + rise * share / 2)).sum(0) / limit

        def slopes() -> tuple[Floats, Floats]:
            by_low, by_high = width * (1 - share / 2), width * share / 2
            by_start = np.where(inside, -(low + rise * share * (1 - share / 2)), 0)
            by_end = full * high - rise * share**2 / 2
            return (
                _by_each(by_high, by_low, y, total_y) / limit,
                _by_each(by_end, by_start, x, total_x) / limit,
            )

        return area, slopes

    return curve


def precision_curve(positive: Floats, negative: Floats) -> tuple[Floats, Slopes]:
    """Average precision without interpolation: the mean over positives of the precision at the score of each.

    As scikit-learn's average_precision_score.
    """
    hits, total = positive.cumsum(0), positive.sum(0)
    called = hits + negative.cumsum(0)
    precision = np.divide(hits, called, out=np.ones_like(hits), where=called > 0)
    area = (positive * precision).sum(0) / total

    def slopes() -> tuple[Floats, Floats]:
        per_call = np.divide(positive, called, out=np.zeros_like(hits), where=called > 0)
        by_positive = (precision + _from_here(per_call * (1 - precision)) - area) / total
        return by_positive, -_from_here(per_call * precision) / total

    return area, slopes


def _shares(counts: Floats) -> tuple[Floats, Floats]:
    """The shares at each score or above, from 0 to 1: (scores + 1, resamples); and the whole, (resamples,)."""
    summed = np.concatenate([np.zeros((1, counts.shape[1])), counts.cumsum(0)])
    return summed / summed[-1], summed[-1]


def _by_each(by_end: Floats, by_start: Floats, shares: Floats, total: Floats) -> Floats:
    """The derivative by the counts at each score, from those by both ends of each segment."""
    by_share = by_end.copy()
    by_share[:-1] += by_start[1:]
    return (_from_here(by_share) - (by_share * shares[1:]).sum(0)) / total


def _from_here(values: Floats) -> Floats:
    """The sum over each score and those below, (scores, resamples)."""
    return values[::-1].cumsum(0)[::-1]
