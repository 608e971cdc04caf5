"""Share of defects found against false calls (FROC), with a band over groups.

False calls are divided by all images, or by all parts, also those with defects: the share of those without moves the
curve, and is stated. Where images have one score, the images with a defect stand for defects, and false calls, which
only good images can give, are divided by those, or by the parts that hold one.

Chakraborty, Observer Performance Methods for Diagnostic Imaging (2017).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, stdtrit

from featprobe.errors import DataError
from featprobe.metrics.defects.records import DEFECT, GOOD, NOTHING, Records
from featprobe.metrics.defects.shares import clustered_interval
from featprobe.metrics.intervals import LEVEL, draw_weights, grouped

Floats = NDArray[np.float64]
Per = Literal["image", "part"]

RESAMPLES = 1000
STEPS = 256  # of the curve of a resample, at most
RATES = 40  # at which the band is computed, at most
AT_ONCE = 2**22  # weights of one step: 32 MiB
CLOSE = 1e-9  # rounding of a rate, or of its product with a number of images


@dataclass(frozen=True)
class Froc:
    """The curve of a test set, as steps: at each point it rises to that recall, and holds it up to the next.

    thresholds: (points,), falling; inf for the first point, where nothing is called. false_calls: (points,), mean per
    image or part. recall: (points,), share of the defects found; nan without a defect.
    rates: (k,), numbers of false calls at which the band is known. low, high: (k,), the band of the recall there; nan
    where there is none, with fewer than two groups or no defect.
    units: images or parts that false calls are divided by. without: share of them without a defect, which moves the
    curve. defects: their number. groups: of the band.
    """

    per: Per
    thresholds: NDArray[np.float32]
    false_calls: Floats
    recall: Floats
    rates: Floats
    low: Floats
    high: Floats
    units: int
    without: float
    defects: int
    groups: int

    def recall_at(self, rate: float) -> float:
        """The highest recall with no more than so many false calls per image or part; nan without a defect.

        Beyond the last false call the recall stays what it is there.
        """
        return float(self.recall[np.searchsorted(self.false_calls, rate + CLOSE, side="right") - 1])


def froc(records: Records, per: Per = "image", resamples: int = RESAMPLES, seed: int = 0) -> Froc:
    """The curve of some records, with the 95 % band of the recall at given numbers of false calls.

    The band is over groups, because images of one part resemble each other: groups are drawn anew, and of each resample
    the recall with no more than so many false calls is taken, so that the band also holds what the choice of the
    threshold adds. Its quantiles are set wider for few groups (Hesterberg, What Teachers Should Know about the
    Bootstrap, 2015). It is nowhere narrower than the interval of the recall at a fixed threshold
    (`clustered_interval`), because resamples of groups in which all is found show no misses. How often it covers:
    benchmarks/bands.py.
    Raises DataError for a curve per part where groups are not known to be parts.
    """
    check_per(records, per)
    own = records.judged()
    names, group = grouped(own.images.groups)
    units = units_of(own, per, group, len(names))
    total, false = int(units.sum()), own.calls.touched == NOTHING
    alarms, scores = np.sort(own.calls.score[false]), own.defects.score
    corners = np.unique(scores[scores > -np.inf])[::-1]  # falling
    thresholds = np.concatenate([np.array([np.inf], dtype=np.float32), corners])
    counts = len(alarms) - np.searchsorted(alarms, thresholds, "left")
    found = len(scores) - np.searchsorted(np.sort(scores), thresholds, "left")
    if counts[-1] < len(alarms):  # the curve ends where all is called
        thresholds = np.append(thresholds, alarms[0])
        counts, found = np.append(counts, len(alarms)), np.append(found, found[-1])
    steps = _Steps.of(own, group, len(names), false)
    at = _spread(len(alarms), RATES)
    low, high = steps.band(at / max(total, 1), units, resamples, seed)
    return Froc(
        per,
        thresholds,
        counts / max(total, 1),
        found / len(scores) if len(scores) else np.full(len(found), np.nan),
        at / max(total, 1),
        low,
        high,
        total,
        _without(own, per, group, len(names)),
        len(scores),
        len(names),
    )


def check_per(records: Records, per: Per) -> None:
    """Raise DataError for a rate per part where groups are not known to be parts."""
    if per == "part" and not records.about.parts:
        raise DataError(
            "False calls per part can't be counted: which images are of one part is not known.\n"
            "Name the groups of images in the data set, or ask for false calls per image."
        )


def units_of(records: Records, per: Per, group: NDArray[np.intp], groups: int) -> Floats:
    """What false calls are divided by, of each group, (groups,): its images, or 1 for a part.

    Where images have one score those that are good alone, and parts that hold one. group: of each image.
    """
    images = records.images.good == GOOD if records.about.pooled else np.ones(len(records.images), dtype=bool)
    held = np.bincount(group[images], minlength=groups).astype(float)
    return held if per == "image" else np.minimum(held, 1)


def _without(records: Records, per: Per, group: NDArray[np.intp], groups: int) -> float:
    """Share of images or parts without a defect; nan where there is none."""
    bad = records.images.good == DEFECT
    if not len(bad):
        return float("nan")
    return float(np.mean(~bad) if per == "image" else np.mean(np.bincount(group[bad], minlength=groups) == 0))


@dataclass(frozen=True)
class _Steps:
    """The curve of each group at some thresholds, so that the curve of a resample is a product of matrices.

    false, found: (groups, steps), false calls and found defects up to each step. A step ends before the next of some
    false calls: there the recall is highest for that number of false calls. defects: (groups,).
    """

    false: Floats
    found: Floats
    defects: Floats

    @classmethod
    def of(cls, records: Records, group: NDArray[np.intp], groups: int, false: NDArray[np.bool_]) -> "_Steps":
        """false: which calls are false, (calls,)."""
        alarms = records.calls.score[false]
        distinct = np.unique(alarms)
        if len(distinct) > STEPS:
            distinct = np.unique(np.sort(alarms)[-np.maximum(_spread(len(alarms), STEPS), 1)])
        defects, scores = group[records.defects.image], records.defects.score
        known = scores > -np.inf

        def steps(score: NDArray[np.float32], of: NDArray[np.intp]) -> Floats:
            shape = groups, len(distinct) + 1
            place = len(distinct) - np.searchsorted(distinct, score, "left")
            cells = np.bincount(of * shape[1] + place, minlength=shape[0] * shape[1])
            return cells.reshape(shape).cumsum(1).astype(float)

        return cls(
            steps(alarms, group[records.calls.image[false]]),
            steps(scores[known], defects[known]),
            np.bincount(defects, minlength=groups).astype(float),
        )

    def band(self, rates: Floats, units: Floats, resamples: int, seed: int) -> tuple[Floats, Floats]:
        """Ends of the band at each rate, (rates,)."""
        groups = len(units)
        if groups < 2 or not self.defects.sum():
            return np.full(len(rates), np.nan), np.full(len(rates), np.nan)
        values = np.concatenate(
            [self._recall(weights, rates, units) for weights in draw_weights((groups,), resamples, seed, AT_ONCE)]
        )  # (resamples, rates)
        tail = ndtr(np.sqrt(groups / (groups - 1)) * stdtrit(groups - 1, (1 - LEVEL) / 2))
        low, high = np.nanquantile(values, (tail, 1 - tail), axis=0)
        at = self._places(self.false.sum(0)[None], rates[None] * units.sum())[0]
        fixed_low, fixed_high = clustered_interval(
            self.found[:, at].T, np.broadcast_to(self.defects, (len(rates), groups))
        )
        return np.minimum(low, fixed_low), np.maximum(high, fixed_high)

    def _recall(self, weights: Floats, rates: Floats, units: Floats) -> Floats:
        """Recall at each rate of resamples, (resamples, rates); nan where a resample has no defect."""
        false, found, defects = weights @ self.false, weights @ self.found, weights @ self.defects
        at = self._places(false, rates * (weights @ units)[:, None])
        with np.errstate(invalid="ignore"):
            return np.take_along_axis(found, at, axis=1) / defects[:, None]

    @staticmethod
    def _places(false: Floats, allowed: Floats) -> NDArray[np.intp]:
        """The last step with no more false calls than allowed, (resamples, rates). false: (resamples, steps)."""
        last = [np.sum(false <= most[:, None] + CLOSE, axis=1) - 1 for most in allowed.T]
        return np.stack(last, axis=1)


def _spread(count: int, most: int) -> NDArray[np.intp]:
    """Whole numbers from 0 to a count: at most about so many, in equal steps of their logarithm."""
    spread = np.geomspace(1, count, most).round() if count else ()
    return np.unique(np.array([0, *spread], dtype=np.intp))
