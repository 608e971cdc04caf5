"""The scores of image labels, each a Statistic over groups; IMAGE_SCORES names them. A score is its value.

A unit is an image, or a tile. Labels that the truth lacks take no part, and which take part is decided on the whole
test split, as for pixels. Of two exclusive labels of which one says "good" only the other is ranked: a high average
precision of good units says nothing where most are good. A resample with no defect unit, or no good one, has no score
that needs both, see ranked.py.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray

from featprobe.errors import ShapeError
from featprobe.metrics.dense import mean_ratio
from featprobe.metrics.intervals import Floats, Names, Statistic, grouped, mean_of
from featprobe.metrics.ranked import Ranking, precision_curve

Groups = tuple[Names, NDArray[np.intp]]
"""Distinct names of groups, and the index of each unit's group among them, (units,)."""
ARRAYS = ("probabilities", "truth", "decided", "threshold", "good", "multi", "ids", "groups")
"""Names of what scores.npz of a classification head holds."""
MOST_CONFUSED = 100  # labels: a row of results is one line of text


def defect_scores(probabilities: NDArray[Any], multi: bool, good: int | None) -> Floats | None:
    """The score of each unit that says how surely it is not good, (units,); None where nothing is known of good.

    probabilities: (units, names). multi: the labels do not exclude each other, and a unit without any is good; then the
    largest probability, else 1 - that of the good label. good: the index of that label.
    """
    if multi:
        return probabilities.max(1, initial=0).astype(float)
    return None if good is None else 1 - probabilities[:, good].astype(float)


def decide(probabilities: NDArray[Any], prior: NDArray[Any], multi: bool) -> NDArray[np.uint8]:
    """Which labels are said to hold, (units, names): the Bayes rule of balanced accuracy.

    prior: (names,), the share of training units that have each. Of exclusive labels the one whose probability is the
    largest multiple of its prior; of others each with a probability of its prior or more. A label that no training unit
    has is never said, and of others one that all of them have always is.

    >>> decide(np.array([[0.8, 0.2], [0.95, 0.05]]), np.array([0.9, 0.1]), multi=False).tolist()
    [[0, 1], [1, 0]]
    """
    prior = np.asarray(prior)
    lift = np.divide(probabilities, prior, out=np.zeros(probabilities.shape), where=prior > 0)
    said = (lift >= 1) | (prior >= 1) if multi else np.arange(lift.shape[1]) == lift.argmax(1, keepdims=True)
    return said.astype(np.uint8)


@dataclass(frozen=True)
class ScoredImages:
    """What a classification head says of test units, and the truth.

    ids, groups: of each unit. probabilities: (units, names), float32. truth, decided: (units, names), uint8, 1 where
    the label holds, or is said to; 0 where not. thresholds: (units,), the score of `defect_scores` above which a unit
    is called; nan where there is none. multi, good: as defect_scores takes them.
    Raises ShapeError when they disagree.
    """

    ids: tuple[str, ...]
    groups: tuple[str, ...]
    probabilities: NDArray[np.float32]
    truth: NDArray[np.uint8]
    decided: NDArray[np.uint8]
    thresholds: Floats
    multi: bool = False
    good: int | None = None

    def __post_init__(self) -> None:
        units, shape = len(self.ids), self.probabilities.shape
        alike = {(units,), self.thresholds.shape, (len(self.groups),)}
        if len(alike) > 1 or shape[:1] != (units,) or {self.truth.shape, self.decided.shape} != {shape} or not units:
            raise ShapeError("Probabilities, truth, decisions, thresholds, ids and groups are of different units.")
        if max(self.truth.max(initial=0), self.decided.max(initial=0)) > 1:
            raise ShapeError("Truth and decisions are not all 0 or 1: units without known labels can't be scored.")
        if not self.multi and not all((labels.sum(1) == 1).all() for labels in (self.truth, self.decided)):
            raise ShapeError("Exclusive labels, but some unit has not one label in truth and one in decisions.")
        if self.good is not None and not (0 <= self.good < shape[1] and not self.multi):
            raise ShapeError(f"There is no label {self.good} that says good.")

    @cached_property
    def is_good(self) -> NDArray[np.bool_] | None:
        """Whether each unit is good, (units,); None where nothing is known of that."""
        if self.multi:
            return np.asarray(self.truth.sum(1) == 0)
        return None if self.good is None else self.truth[:, self.good] > 0

    @cached_property
    def called(self) -> NDArray[np.bool_] | None:
        """Whether each unit is called, (units,); None without thresholds."""
        scores = defect_scores(self.probabilities, self.multi, self.good)
        return None if scores is None or np.isnan(self.thresholds).any() else scores > self.thresholds

    @property
    def ranked(self) -> list[int]:
        """The labels that take part in rankings: some units have them and some do not."""
        held = self.truth.sum(0)
        known = np.flatnonzero((held > 0) & (held < len(self.truth))).tolist()
        return [label for label in known if self.multi or len(held) > 2 or label != self.good]

    def to_npz(self) -> bytes:
        """The file scores.npz; raises ShapeError where units have several thresholds."""
        return packed(
            probabilities=self.probabilities.astype(np.float32),
            truth=self.truth.astype(np.uint8),
            decided=self.decided.astype(np.uint8),
            threshold=np.float64(only_one(self.thresholds)),
            good=np.int64(-1 if self.good is None else self.good),
            multi=np.uint8(self.multi),
            ids=np.array(self.ids),
            groups=np.array(self.groups),
        )

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> "ScoredImages":
        """What `to_npz` packed; raises KeyError, TypeError, ValueError or ShapeError for other arrays."""
        ids = tuple(map(str, arrays["ids"].tolist()))
        good = int(arrays["good"])
        return cls(
            ids,
            tuple(map(str, arrays["groups"].tolist())),
            finite(arrays["probabilities"], 2).astype(np.float32),
            flags(arrays["truth"]),
            flags(arrays["decided"]),
            np.full(len(ids), float(arrays["threshold"])),
            bool(arrays["multi"]),
            None if good < 0 else good,
        )

    @classmethod
    def joined(cls, parts: Sequence["ScoredImages"]) -> "ScoredImages":
        """The units of several heads as one test set."""
        first = parts[0]
        return cls(
            tuple(name for part in parts for name in part.ids),
            tuple(name for part in parts for name in part.groups),
            np.concatenate([part.probabilities for part in parts]),
            np.concatenate([part.truth for part in parts]),
            np.concatenate([part.decided for part in parts]),
            np.concatenate([part.thresholds for part in parts]),
            first.multi,
            first.good,
        )


def packed(**arrays: Any) -> bytes:
    """Arrays as a compressed .npz file."""
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def only_one(thresholds: Floats) -> float:
    """The threshold that all units have; raises ShapeError where they have several."""
    distinct = np.unique(thresholds)
    if len(distinct) != 1:
        raise ShapeError(f"A file of one head holds one threshold, found {len(distinct)}.")
    return float(distinct[0])


def finite(values: NDArray[Any], dimensions: int) -> NDArray[Any]:
    """The same array; raises ShapeError where it has other dimensions, or does not hold finite numbers."""
    if values.ndim != dimensions or values.dtype.kind not in "fiu" or not np.isfinite(values).all():
        raise ShapeError(f"An array of shape {values.shape} and type {values.dtype} is not {dimensions}-dimensional "
                         "and finite.")  # fmt: skip
    return values


def flags(values: NDArray[Any]) -> NDArray[np.uint8]:
    """The same array as uint8; raises ShapeError for another type."""
    if values.dtype.kind not in "bu" or values.dtype.itemsize > 1:
        raise ShapeError(f"An array of {values.dtype} holds no flags.")
    return values.astype(np.uint8)


# ---- one definition of each score ------------------------------------------------------------------------------------

ImageScore = Callable[[ScoredImages, Groups], Statistic]


def _ranked(images: ScoredImages, groups: Groups, label: int, precision: bool) -> Statistic:
    names, index = groups
    ranking = Ranking.of(images.probabilities[:, label], images.truth[:, label] > 0, index)
    return ranking.statistic(precision_curve, names) if precision else ranking.auroc(names)


def _auroc(images: ScoredImages, groups: Groups) -> Statistic:
    return mean_over_labels([_ranked(images, groups, label, precision=False) for label in images.ranked], groups)


def _average_precision(images: ScoredImages, groups: Groups) -> Statistic:
    return mean_over_labels([_ranked(images, groups, label, precision=True) for label in images.ranked], groups)


def mean_over_labels(every: Sequence[Statistic], groups: Groups) -> Statistic:
    """The mean over labels, all of which count in every resample: one that a resample lacks has its score on the split.

    A resample that lacks all of them has no score.
    """
    if len(every) < 2:
        return every[0] if every else no_score(groups)
    whole = np.array([value_of(own) for own in every])

    def value(weights: Floats) -> Floats:
        found = np.stack([own.value(weights) for own in every], axis=1)  # (resamples, labels)
        lacking = np.isnan(found)
        return np.where(lacking.all(1), np.nan, np.where(lacking, whole, found).mean(1))

    return Statistic(value, mean_of(every).influence, (groups[0],))


def _balanced_accuracy(images: ScoredImages, groups: Groups) -> Statistic:
    """The mean recall over labels; of labels that do not exclude each other, of having and of not having each."""
    hit, held, said, units = _counts(images, groups)
    if not images.multi:
        known = held.sum(0) > 0
        return ratios(hit[:, known], held[:, known], groups)
    known = (held.sum(0) > 0) & ((units - held).sum(0) > 0)
    right = np.hstack([hit[:, known], (units - held - said + hit)[:, known]])
    return ratios(right, np.hstack([held[:, known], (units - held)[:, known]]), groups)


def _macro_f1(images: ScoredImages, groups: Groups) -> Statistic:
    hit, held, said, _ = _counts(images, groups)
    known = held.sum(0) > 0
    return ratios(2 * hit[:, known], (held + said)[:, known], groups)


def _recall(images: ScoredImages, groups: Groups) -> Statistic:
    return called_of(None if images.is_good is None else ~images.is_good, images.called, groups)


def _false_calls(images: ScoredImages, groups: Groups) -> Statistic:
    return called_of(images.is_good, images.called, groups)


IMAGE_SCORES: Mapping[str, ImageScore] = {
    "auroc": _auroc,
    "average_precision": _average_precision,
    "balanced_accuracy": _balanced_accuracy,
    "macro_f1": _macro_f1,
    "recall": _recall,
    "false_calls": _false_calls,
}
"""Scores of image labels, by their names in featprobe.scores."""


def _counts(images: ScoredImages, groups: Groups) -> tuple[Floats, Floats, Floats, Floats]:
    """Units of each group and label that have it and are said to, have it, are said to; and all, (groups, 1)."""
    truth, decided = images.truth.astype(float), images.decided.astype(float)
    by_group = members(groups)
    hit, held, said = (by_group @ part for part in (truth * decided, truth, decided))
    return hit, held, said, by_group @ np.ones((len(truth), 1))


def members(groups: Groups) -> Any:
    """Which units belong to each group, (groups, units), sparse: what sums over units of a group."""
    names, index = groups
    return scipy.sparse.csr_array((np.ones(len(index)), (index, np.arange(len(index)))), (len(names), len(index)))


def ratios(part: Floats, whole: Floats, groups: Groups) -> Statistic:
    """The mean of ratios of sums over groups, both (groups, ratios).

    A ratio that a resample lacks has its value on the whole split; one that lacks all of them has no score.
    """
    mean, influence = mean_ratio(part, whole)

    def value(weights: Floats) -> Floats:
        return np.where((weights @ whole > 0).any(1), mean(weights), np.nan)

    return Statistic(value, influence, (groups[0],))


def called_of(among: NDArray[np.bool_] | None, called: NDArray[np.bool_] | None, groups: Groups) -> Statistic:
    """The share of some units that is called; nan where there are none, or nothing is known."""
    if among is None or called is None or not among.any():
        return no_score(groups)
    part, whole = (members(groups) @ own.astype(float)[:, None] for own in (among & called, among))
    return ratios(part, whole, groups)


def no_score(groups: Groups) -> Statistic:
    """The statistic of a score that does not exist."""
    return Statistic(
        lambda weights: np.full(len(weights), np.nan), lambda weights: np.zeros(weights.shape), (groups[0],)
    )


def value_of(statistic: Statistic) -> float:
    """The score of a whole test split; nan where there is none."""
    return float(statistic.value(np.ones((1, sum(statistic.sizes))))[0])


def one_group(units: int) -> Groups:
    """All units as one group: a score of them alone needs no others."""
    return ("all",), np.zeros(units, dtype=np.intp)


def image_statistic(images: ScoredImages, score: str) -> Statistic:
    """A score of IMAGE_SCORES as a function of how often each group counts."""
    return IMAGE_SCORES[score](images, grouped(images.groups))


def label_auroc(images: ScoredImages, names: Sequence[str]) -> dict[str, float]:
    """The AUROC of each label against all others; nan for one that all units have, or none.

    Of two labels that exclude each other, of which one says good, that of the other alone: both are the same.
    """
    every = one_group(len(images.ids))
    same = images.good if len(names) == 2 and not images.multi else None
    ranked = {name: label for label, name in enumerate(names) if label != same}
    return {name: value_of(_ranked(images, every, label, precision=False)) for name, label in ranked.items()}


def image_scores(images: ScoredImages, names: Sequence[str]) -> dict[str, Any]:
    """Every score as a row's `test` holds it; nan for one that does not exist. names: of the labels.

    per_class: of `label_auroc`. confusion: of exclusive labels, units by true and decided label; of others, for
    each label [[right without, wrongly said], [missed, right with]]; None for more than MOST_CONFUSED labels.
    """
    every = one_group(len(images.ids))
    found: dict[str, Any] = {name: value_of(score(images, every)) for name, score in IMAGE_SCORES.items()}
    return {**found, "per_class": label_auroc(images, names), "confusion": confusion_of(images)}


def confusion_of(images: ScoredImages) -> list[Any] | None:
    """The confusion of image_scores."""
    if images.truth.shape[1] > MOST_CONFUSED:
        return None
    truth, decided = images.truth.astype(np.int64), images.decided.astype(np.int64)
    if not images.multi:
        return (truth.T @ decided).tolist()
    both = [(truth[:, label], decided[:, label]) for label in range(truth.shape[1])]
    return [np.bincount(2 * own + said, minlength=4).reshape(2, 2).tolist() for own, said in both]
