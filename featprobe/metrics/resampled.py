"""COCO average precision of many resamples of the images, from one matching of predictions to truth.

Whether a prediction is a hit depends only on its image. So pycocotools matches each image once, and a resample only
changes how often its hits and false alarms count when precision is accumulated. Many resamples are computed at a time.
The envelope of precision is computed only at hits, because it is constant between two hits.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pycocotools.cocoeval import COCOeval

from featprobe.errors import ShapeError
from featprobe.metrics.boxes import ApKind, unmatched

AbsentClass = Literal["ignore", "hold"]
OfGroups = Callable[[ArrayLike], NDArray[np.float64]]  # weights (resamples, groups) -> (resamples,)

THRESHOLDS: Mapping[str, slice] = {"ap": slice(0, 10), "ap50": slice(0, 1), "ap75": slice(5, 6)}  # of IoU
RECALLS = np.linspace(0, 1, 101)  # equal to pycocotools' to the last bit
AT_ONCE = 2**19  # detections times resamples of one step: 4 MiB of counts, which stay in a processor's cache


@dataclass(frozen=True)
class ResampledScores:
    """COCO's numbers per resample, in [0, 1].

    ap, ap50, ap75: (resamples,), mean over classes; nan where no class has a score.
    per_class, per_class_50: (resamples, classes), ap and ap50 in the order of the truth's `categories`; nan where the
    resample holds no object of that class.
    """

    ap: NDArray[np.float64]
    ap50: NDArray[np.float64]
    ap75: NDArray[np.float64]
    per_class: NDArray[np.float64]
    per_class_50: NDArray[np.float64]


class ResampledAp:
    """Average precision with weights on images: with weight 3 an image, with all its objects, counts three times.

    truth, predictions, kind: see average_precision, which raises the same errors; they are not changed or kept.

    The scores are those of pycocotools (area "all", at most 100 predictions per class and image) on a data set that
    holds each image as often as its weight. Where scores tie, pycocotools goes by the order of the images, which it
    sorts by id: here all copies of an image are at the place of its id. With all weights 1 the scores are those of
    average_precision. All weights times an integer >= 1 give the same scores, unless a hit and a false alarm of one
    class tie in one image: then pycocotools ranks the false alarm of the first copy before the hit of the second, and
    so does this class. For such ties time and memory grow with the largest weight.

    >>> box = {"category_id": 1, "bbox": [2.0, 3.0, 4.0, 5.0]}
    >>> objects = [box | {"id": i, "image_id": i, "area": 20.0, "iscrowd": 0} for i in (1, 2)]
    >>> truth = {"images": [{"id": 1}, {"id": 2}], "categories": [{"id": 1}], "annotations": objects}
    >>> ap = ResampledAp(truth, [box | {"image_id": 1, "score": 0.9}], "bbox")
    >>> ap.scores([[1, 1], [2, 0], [0, 2], [0, 0]]).ap50.round(2).tolist()
    [0.5, 1.0, 0.0, nan]
    """

    def __init__(self, truth: Mapping[str, Any], predictions: Sequence[Mapping[str, Any]], kind: ApKind) -> None:
        evaluation = unmatched(truth, predictions, kind)
        evaluation.params.areaRng, evaluation.params.areaRngLbl = evaluation.params.areaRng[:1], ["all"]
        with redirect_stdout(StringIO()):
            evaluation.evaluate()
        self.images = len(truth["images"])
        column = {image["id"]: i for i, image in enumerate(truth["images"])}
        matches = dict(zip(evaluation.params.catIds, _matches(evaluation, column), strict=True))
        self._classes = [matches[category["id"]] for category in truth["categories"]]
        self._whole = self._per_class(np.ones((1, self.images), dtype=np.int64), np.arange(self.images), "ap")

    def scores(self, weights: ArrayLike, absent: AbsentClass = "ignore") -> ResampledScores:
        """The scores of each resample.

        weights: (resamples, images), whole numbers >= 0 of any dtype, in the order of the truth's `images`: how often
        each image counts. 0 leaves an image out, as the jackknife does; fractions have no meaning here.
        absent: how to treat a class without an object in a resample. "ignore": the mean is over the other classes, as
        in pycocotools, so it jumps where an easy or a hard class is missing. "hold": the classes are fixed on the whole
        data set, and the class enters the mean with its score there. The mean does not jump, but such resamples say
        nothing about the spread of that class: count the nan of `per_class` before you rely on an interval with a class
        that few groups hold. A class without an object in the whole data set is in neither mean.
        Raises ShapeError when weights are not of that shape, or not whole numbers >= 0.
        """
        images = np.arange(self.images)
        by_threshold = self._per_class(_whole_numbers(weights, self.images), images, "ap")
        return ResampledScores(
            **{name: self._mean(by_threshold[:, :, part], absent, part) for name, part in THRESHOLDS.items()},
            per_class=by_threshold.mean(2),
            per_class_50=by_threshold[:, :, 0],
        )

    def by_group(self, score: str, groups: ArrayLike, absent: AbsentClass = "ignore") -> OfGroups:
        """A function from weights of groups, (resamples, groups), to one score per resample, (resamples,).

        groups: (images,), the index of each image's group, in the order of the truth's `images`; the largest index
        gives the number of groups. All images of a group get its weight. Weights and `absent` are as in `scores`. Only
        the IoU thresholds of the score are computed.
        Raises ShapeError when groups do not fit the images; the function raises it when weights do not fit the groups.
        """
        group = np.asarray(groups)
        if group.shape != (self.images,) or group.dtype.kind not in "iu" or group.min(initial=0) < 0:
            raise ShapeError(f"Groups of shape {group.shape} are not an index >= 0 for each of {self.images} images.")
        columns = int(group.max(initial=-1)) + 1

        def values(weights: ArrayLike) -> NDArray[np.float64]:
            by_threshold = self._per_class(_whole_numbers(weights, columns), group, score)
            return self._mean(by_threshold, absent, THRESHOLDS[score])

        return values

    def _per_class(self, weights: NDArray[np.int64], group: NDArray[np.intp], score: str) -> NDArray[np.float64]:
        """Average precision at each IoU threshold of a score: (resamples, classes, thresholds), nan without truth.

        weights: (resamples, groups); group: (images,), the column of each image.
        """
        every = np.arange(10)[THRESHOLDS[score]]
        result = np.empty((len(weights), len(self._classes), len(every)))
        for i, matches in enumerate(self._classes):
            line = matches.line(int(weights.max(initial=0)))
            step = max(1, AT_ONCE // max(1, len(line.image)))
            for begin in range(0, len(weights), step):
                part = weights[begin : begin + step]
                truths = part @ np.bincount(group, matches.truths, part.shape[1]).astype(np.int64)  # (resamples,)
                result[begin : begin + step, i] = _average(line, part[:, group[line.image]], truths, every)
        return result

    def _mean(self, by_threshold: NDArray[np.float64], absent: AbsentClass, part: slice) -> NDArray[np.float64]:
        """Mean over classes and thresholds, (resamples,); nan where no class has a score."""
        per_class = by_threshold.mean(2)  # (resamples, classes)
        if absent == "hold":
            per_class = np.where(np.isnan(per_class), self._whole[:, :, part].mean(2), per_class)
        known = ~np.isnan(per_class)
        total, count = np.where(known, per_class, 0).sum(1), known.sum(1)
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)


@dataclass(frozen=True)
class _Line:
    """Detections of a class in the order of pycocotools for a resample.

    image: (entries,), the index of the image. copy: (entries,), to which copy of the image the entry belongs, from 0;
    -1 where one entry stands for all copies. hit, ignored: (thresholds, entries); an entry that is neither is a false
    alarm.
    """

    image: NDArray[np.intp]
    copy: NDArray[np.intp]
    hit: NDArray[np.bool_]
    ignored: NDArray[np.bool_]


@dataclass(frozen=True)
class _Matches:
    """pycocotools' matches of one class; detections are sorted by falling score and then by image.

    image: (detections,), index of the image. tie: (detections,), numbers ascending from 0, the same for detections of
    one image with one score. mixed: (detections,), whether such a tie has both hits and false alarms, at any threshold.
    hit, ignored: (thresholds, detections). truths: (images,), the number of objects to find.
    """

    image: NDArray[np.intp]
    tie: NDArray[np.intp]
    mixed: NDArray[np.bool_]
    hit: NDArray[np.bool_]
    ignored: NDArray[np.bool_]
    truths: NDArray[np.int64]

    def line(self, copies: int) -> _Line:
        """The detections for resamples that hold an image at most `most` times.

        The copies of a detection are neighbours and count as one entry: in a run of hits precision is highest at the
        end, and all recalls within the run get that precision. Where hits and false alarms of one image tie, the false
        alarm of the first copy comes before the hit of the second, so each copy has its own entries.
        """
        if copies < 2 or not self.mixed.any():
            return _Line(self.image, np.full(len(self.image), -1), self.hit, self.ignored)
        single, mixed = np.flatnonzero(~self.mixed), np.flatnonzero(self.mixed)
        entry = np.concatenate([single, np.tile(mixed, copies)])
        copy = np.concatenate([np.full(len(single), -1), np.repeat(np.arange(copies), len(mixed))])
        order = np.lexsort((entry, copy, self.tie[entry]))
        entry = entry[order]
        return _Line(self.image[entry], copy[order], self.hit[:, entry], self.ignored[:, entry])


def _matches(evaluation: COCOeval, column: Mapping[Any, int]) -> list[_Matches]:
    """The matches per category, in the order of evaluation.params.catIds. column: image id -> index of the image."""
    images, categories = len(evaluation.params.imgIds), len(evaluation.params.catIds)
    every = [evaluation.evalImgs[i * images : (i + 1) * images] for i in range(categories)]
    return [_of_class([image for image in images if image is not None], column) for images in every]


def _of_class(found: Sequence[Mapping[str, Any]], column: Mapping[Any, int]) -> _Matches:
    """The matches from pycocotools' records of the images with truth or detections of a class, in the order of ids."""
    index = np.array([column[image["image_id"]] for image in found], dtype=np.intp)
    truths = np.zeros(len(column), dtype=np.int64)
    truths[index] = [np.count_nonzero(image["gtIgnore"] == 0) for image in found]
    score = np.concatenate([np.empty(0), *(image["dtScores"] for image in found)])
    order = np.argsort(-score, kind="mergesort")  # as in pycocotools: with equal scores the images keep their order
    none = np.empty((10, 0), dtype=bool)  # (thresholds, detections)
    matched, ignored = (
        np.concatenate([none, *(image[part] != 0 for image in found)], axis=1)[:, order]
        for part in ("dtMatches", "dtIgnore")
    )
    image_of = index.repeat(np.array([len(image["dtScores"]) for image in found], dtype=np.intp))[order]
    tie, hit = _ties(image_of, score[order]), matched & ~ignored
    return _Matches(image_of, tie, _mixed(tie, hit, ~matched & ~ignored), hit, ignored, truths)


def _ties(image: NDArray[np.intp], score: NDArray[np.float64]) -> NDArray[np.intp]:
    """Numbers ascending from 0, (detections,): equal for neighbours of the same image and score."""
    changes = (image[1:] != image[:-1]) | (score[1:] != score[:-1])
    return np.concatenate([np.zeros(min(1, len(image)), dtype=np.intp), changes.cumsum()])


def _mixed(tie: NDArray[np.intp], hit: NDArray[np.bool_], false: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(detections,): whether its tie has both hits and false alarms, (thresholds, detections), at any threshold."""
    if not len(tie):
        return np.empty(0, dtype=bool)
    first = np.flatnonzero(np.diff(tie, prepend=-1))
    hits, alarms = (np.logical_or.reduceat(part, first, axis=1) for part in (hit, false))  # (thresholds, ties)
    return np.logical_or.reduce(hits & alarms, axis=0)[tie]


def _average(
    line: _Line, copies: NDArray[np.int64], truths: NDArray[np.int64], thresholds: NDArray[np.intp]
) -> NDArray[np.float64]:
    """Average precision of one class: (resamples, thresholds); nan where there is no truth.

    copies: (resamples, entries), how often the entry's image counts; it is overwritten. truths: (resamples,), the
    number of objects to find.
    """
    single = np.flatnonzero(line.copy >= 0)
    copies[:, single] = copies[:, single] > line.copy[single]
    counted = copies.cumsum(1)  # (resamples, entries), detections up to here; floats would take eight times as long
    result = np.empty((len(copies), len(thresholds)))
    for i, threshold in enumerate(thresholds):
        at, out = np.flatnonzero(line.hit[threshold]), np.flatnonzero(line.ignored[threshold])
        before = counted[:, at]
        if len(out):
            left_out = np.concatenate([np.zeros_like(truths)[:, None], copies[:, out].cumsum(1)], axis=1)
            before -= left_out[:, np.searchsorted(out, at)]
        result[:, i] = _mean_precision(copies[:, at].cumsum(1), before, truths[:, None])
    result[truths == 0] = np.nan
    return result


def _mean_precision(
    hits: NDArray[np.int64], detections: NDArray[np.int64], truths: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Mean of the precision envelope at the 101 recalls, (resamples,).

    hits, detections: (resamples, entries), their numbers up to each entry that is a hit; truths: (resamples, 1).
    An entry stands for the recalls that it is the first to reach. Recall 0 belongs to the first entry, whatever its
    weight, and gets the highest precision of all. Any other entry of weight 0 reaches no new recall, and its precision
    is not above that of the hit before it, so it changes nothing.
    """
    precision = hits / (detections + np.spacing(1))
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    recall = hits / np.maximum(truths, 1)
    level = (recall * 100 + 1e-9).astype(np.intp)  # the last of RECALLS that may be reached; rounding as in pycocotools
    reached = level + (recall >= RECALLS[level])
    return np.einsum("re,re->r", envelope, np.diff(reached, axis=1, prepend=0)) / len(RECALLS)


def _whole_numbers(weights: ArrayLike, columns: int) -> NDArray[np.int64]:
    """Weights as integers of the wanted shape. Raises ShapeError for other values or another shape."""
    given = np.asarray(weights)
    if given.ndim != 2 or given.shape[1] != columns:
        raise ShapeError(f"Weights of shape {given.shape} are not (resamples, {columns}).")
    if not np.all(np.isfinite(given) & (given >= 0) & (given == np.floor(given))):
        raise ShapeError("Weights must be whole numbers >= 0: how often an image counts. Found others.")
    return given.astype(np.int64)
