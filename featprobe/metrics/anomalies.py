"""The scores of anomaly heads, each a Statistic over groups; ANOMALY_SCORES names them. A score is its value.

Of images: AUROC of defect against good ones, F1 and recall of defect ones and false calls at the threshold that was
set on good validation images. Of pixels, where their truth is known: AUROC of defect against good pixels of all images,
and AUPRO, the area under the per-region overlap against the share of good pixels called, up to a share of LIMIT, over
LIMIT. A region is a connected component of a unit's defects; each counts alike, whatever its size.

Bergmann et al., The MVTec Anomaly Detection Dataset (2021), for AUPRO.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray

from featprobe.errors import ShapeError
from featprobe.metrics.images import (
    Groups,
    called_of,
    finite,
    flags,
    members,
    no_score,
    one_group,
    only_one,
    packed,
    ratios,
    value_of,
)
from featprobe.metrics.intervals import Floats, Statistic, grouped
from featprobe.metrics.pixel_counts import LIMIT, TOUCHING, Mask, PixelHistograms
from featprobe.metrics.ranked import Ranking, area_to

PIXELS = ("normal", "defect", "overlap", "regions", "edges")
ARRAYS = ("scores", "good", "threshold", "ids", "groups", *PIXELS)
"""Names of what scores.npz of an anomaly head holds; those of pixels only where their truth is known."""


@dataclass(frozen=True)
class ScoredAnomalies:
    """What an anomaly head says of test units, and the truth.

    ids, groups: of each unit. scores: (units,), higher where it is less like good ones. good: (units,), whether it is.
    thresholds: (units,), the score above which a unit is called; nan where there is none. pixels: None where no truth
    of pixels is known. Raises ShapeError when they disagree.
    """

    ids: tuple[str, ...]
    groups: tuple[str, ...]
    scores: Floats
    good: NDArray[np.bool_]
    thresholds: Floats
    pixels: PixelHistograms | None = None

    def __post_init__(self) -> None:
        units = len(self.ids)
        shapes = {self.scores.shape, self.good.shape, self.thresholds.shape, (len(self.groups),)}
        shapes |= {self.pixels.regions.shape} if self.pixels else set()
        if shapes != {(units,)} or not units:
            raise ShapeError("Scores, truth, thresholds, pixels, ids and groups are of different units.")

    @cached_property
    def called(self) -> NDArray[np.bool_] | None:
        """Whether each unit is called, (units,); None without thresholds."""
        return None if np.isnan(self.thresholds).any() else self.scores > self.thresholds

    def to_npz(self) -> bytes:
        """The file scores.npz; raises ShapeError where units have several thresholds."""
        pixels = {name: getattr(self.pixels, name) for name in PIXELS} if self.pixels else {}
        return packed(
            scores=self.scores.astype(float),
            good=self.good.astype(np.uint8),
            threshold=np.float64(only_one(self.thresholds)),
            ids=np.array(self.ids),
            groups=np.array(self.groups),
            **pixels,
        )

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> "ScoredAnomalies":
        """What `to_npz` packed; raises KeyError, TypeError, ValueError or ShapeError for other arrays."""
        ids = tuple(map(str, arrays["ids"].tolist()))
        good = flags(arrays["good"])
        if good.max(initial=0) > 1:
            raise ShapeError("Truth is not all 0 or 1: units of which nothing is known can't be scored.")
        pixels = None
        if "normal" in arrays:
            pixels = PixelHistograms(
                finite(arrays["normal"], 2).astype(np.uint32),
                finite(arrays["defect"], 2).astype(np.uint32),
                finite(arrays["overlap"], 2).astype(float),
                finite(arrays["regions"], 1).astype(np.int32),
                finite(arrays["edges"], 1).astype(float),
            )
        return cls(
            ids,
            tuple(map(str, arrays["groups"].tolist())),
            finite(arrays["scores"], 1).astype(float),
            good > 0,
            np.full(len(ids), float(arrays["threshold"])),
            pixels,
        )

    @classmethod
    def joined(cls, parts: Sequence["ScoredAnomalies"]) -> "ScoredAnomalies":
        """The units of several heads as one test set; their scores are taken as they are."""
        pixels = [part.pixels for part in parts if part.pixels]
        return cls(
            tuple(name for part in parts for name in part.ids),
            tuple(name for part in parts for name in part.groups),
            np.concatenate([part.scores for part in parts]),
            np.concatenate([part.good for part in parts]),
            np.concatenate([part.thresholds for part in parts]),
            PixelHistograms.joined(pixels) if len(pixels) == len(parts) else None,
        )


# ---- one definition of each score ------------------------------------------------------------------------------------

AnomalyScore = Callable[[ScoredAnomalies, Groups], Statistic]


def _image_auroc(found: ScoredAnomalies, groups: Groups) -> Statistic:
    return Ranking.of(found.scores, ~found.good, groups[1]).auroc(groups[0])


def _pixel_auroc(found: ScoredAnomalies, groups: Groups) -> Statistic:
    if not found.pixels:
        return no_score(groups)
    return _pixels(found.pixels.defect, found.pixels.normal, groups).auroc(groups[0])


def _aupro(found: ScoredAnomalies, groups: Groups) -> Statistic:
    if not found.pixels:
        return no_score(groups)
    return _pixels(found.pixels.overlap, found.pixels.normal, groups).statistic(area_to(LIMIT), groups[0])


def _pixels(positive: NDArray[Any], negative: NDArray[Any], groups: Groups) -> Ranking:
    """The ranking of bins, the highest first; positive, negative: (units, bins)."""
    by_group = members(groups)
    return Ranking(*(by_group @ own[:, ::-1].astype(float) for own in (positive, negative)))


def _image_f1(found: ScoredAnomalies, groups: Groups) -> Statistic:
    """The F1 of calling defect images."""
    if found.called is None or found.good.all():
        return no_score(groups)
    every = (found.called & ~found.good, ~found.good, found.called)
    hit, defect, called = (members(groups) @ own.astype(float)[:, None] for own in every)
    f1 = ratios(2 * hit, defect + called, groups)
    return replace(f1, value=lambda weights: np.where((weights @ defect)[:, 0] > 0, f1.value(weights), np.nan))


def _image_recall(found: ScoredAnomalies, groups: Groups) -> Statistic:
    return called_of(~found.good, found.called, groups)


def _false_calls(found: ScoredAnomalies, groups: Groups) -> Statistic:
    return called_of(found.good, found.called, groups)


ANOMALY_SCORES: Mapping[str, AnomalyScore] = {
    "image_auroc": _image_auroc,
    "pixel_auroc": _pixel_auroc,
    "aupro": _aupro,
    "image_f1": _image_f1,
    "image_recall": _image_recall,
    "false_calls": _false_calls,
}
"""Scores of anomaly heads, by their names in featprobe.scores."""


def anomaly_statistic(found: ScoredAnomalies, score: str) -> Statistic:
    """A score of ANOMALY_SCORES as a function of how often each group counts."""
    return ANOMALY_SCORES[score](found, grouped(found.groups))


def anomaly_scores(found: ScoredAnomalies) -> dict[str, Any]:
    """Every score as a row's `test` holds it; nan for one that does not exist.

    confusion: images [[good and not called, called], [defect and not called, called]]; None without a threshold.
    regions: of all images; None where no truth of pixels is known. per_class: empty, as there are none.
    """
    every = one_group(len(found.ids))
    scores: dict[str, Any] = {name: value_of(score(found, every)) for name, score in ANOMALY_SCORES.items()}
    confusion = None
    if found.called is not None:
        confusion = np.bincount(2 * ~found.good + found.called, minlength=4).reshape(2, 2).tolist()
    regions = int(found.pixels.regions.sum()) if found.pixels else None
    return {**scores, "per_class": {}, "confusion": confusion, "regions": regions}


# ---- the same of whole maps ------------------------------------------------------------------------------------------


def pixel_auroc(maps: Sequence[NDArray[Any]], defects: Sequence[Mask]) -> float:
    """The AUROC of defect against good pixels of all maps, exactly; nan without the one or the other.

    maps: (height, width) each, sizes may differ. defects: of the same shapes.
    """
    scores, truth = (np.concatenate([own.ravel() for own in every]) for every in (maps, defects))
    return value_of(Ranking.of(scores, truth, np.zeros(len(scores), np.intp)).auroc(("all",)))


def aupro(maps: Sequence[NDArray[Any]], defects: Sequence[Mask], limit: float = LIMIT) -> float:
    """The area under the per-region overlap up to a share of good pixels called, over that limit, exactly.

    maps: (height, width) each, sizes may differ. defects: of the same shapes; regions are connected components, also
    over corners. nan without regions or good pixels.
    """
    share, good = [], []
    for defect in defects:
        numbered, regions = scipy.ndimage.label(defect, structure=TOUCHING)
        size = np.maximum(np.bincount(numbered.ravel(), minlength=regions + 1), 1)
        share.append(np.where(numbered > 0, 1 / size[numbered], 0).ravel())
        good.append(~defect.ravel())
    _, place = np.unique(-np.concatenate([own.ravel() for own in maps]), return_inverse=True)
    both = (np.bincount(place, np.concatenate(own))[None] for own in (share, good))
    return value_of(Ranking(*both).statistic(area_to(limit), ("all",)))
