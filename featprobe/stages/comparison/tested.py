"""The contribution of each test image to the scores of a head, as the files beside it keep it."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from featprobe.errors import ProbeError, ShapeError
from featprobe.io.disk import parse_json
from featprobe.metrics import (
    ResampledAp,
    ScoredAnomalies,
    ScoredImages,
    Statistic,
    anomaly_scores,
    anomaly_statistic,
    average_precision,
    grouped,
    image_scores,
    image_statistic,
    iou_scores,
    jackknifed,
    pixel_scores,
    pixel_statistic,
)
from featprobe.metrics.boxes import ApKind
from featprobe.metrics.images import label_auroc, value_of
from featprobe.metrics.intervals import Floats
from featprobe.probes.saved import read_files
from featprobe.result_rows import ResultRow
from featprobe.scores import On, Score
from featprobe.stages.training.saved_results import ARRAYS, read_arrays

AP_KINDS: Mapping[str, ApKind] = {"box": "bbox", "mask": "segm"}
"""Names of each kind of average precision in the `test` of a row, and in pycocotools."""
T = TypeVar("T")
ROUNDING = 1e-6  # how far a row's score may lie from the one that its files give


@dataclass(frozen=True)
class PixelTest:
    """The counts of a segmentation head on its test images. confusions: (images, classes, classes), pixels."""

    ids: list[str]
    groups: list[str]
    confusions: NDArray[np.int64]

    @classmethod
    def read(cls, folder: Path, card: Mapping[str, Any]) -> "PixelTest":
        """Read the file beside a head, if it is the one that the card describes."""
        (scores,) = read_files(folder, card, ["scores.npz"])
        kept = read_arrays(scores, ARRAYS["pixels"])
        if not {"ids", "groups"} <= kept.keys():
            raise ProbeError("scores.npz names no images and groups: an older featprobe wrote it. Run it again")
        confusions = kept["confusion"]
        if confusions.shape[:1] + kept["ids"].shape + kept["groups"].shape != (len(confusions),) * 3:
            raise ProbeError("scores.npz holds other images than groups and confusions. Run it again")
        return cls(kept["ids"].tolist(), kept["groups"].tolist(), confusions)

    @classmethod
    def joined(cls, parts: Sequence[Any]) -> "PixelTest":
        """The test images of several heads as one test set."""
        ids, groups = ([name for part in parts for name in getattr(part, what)] for what in ("ids", "groups"))
        return cls(ids, groups, np.concatenate([part.confusions for part in parts]))

    def statistics(self, row: ResultRow) -> dict[str, Statistic]:
        """The task's scores as functions of how often each group counts, over the classes of the truth."""
        names = (score.name for score in row.scores.compared)
        return {name: pixel_statistic(self.confusions, self.groups, name, "ignore") for name in names}

    def scores(self, row: ResultRow) -> dict[str, Any]:
        """The scores as a row's `test` holds them, with the row's own rule for classes that the truth lacks."""
        whole = self.confusions.sum(0)
        iou = dict(zip(row.classes, iou_scores(whole, row.absent_classes).per_class, strict=True))
        return {**pixel_scores(whole, row.absent_classes), "iou": iou}

    def value(self, row: ResultRow, score: Score, statistic: Statistic) -> float | None:
        """A score by the row's own rule."""
        return score.of(self.scores(row))

    def per_class(self, row: ResultRow) -> dict[str, float]:
        """IoU of each class; nan for one that the truth lacks."""
        return dict(zip(row.classes, iou_scores(self.confusions.sum(0), "ignore").per_class, strict=True))


@dataclass(frozen=True)
class ObjectTest:
    """The objects in the test images, and those that a detection head found there, as COCO JSON."""

    truth: dict[str, Any]
    predictions: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path, card: Mapping[str, Any]) -> "ObjectTest":
        """Read the file beside a head, if it is the one that the card describes."""
        truth, predictions = map(parse_json, read_files(folder, card, ["truth.json", "predictions.json"]))
        if not all({"file_name", "group"} <= set(image) for image in truth["images"]):
            raise ProbeError("truth.json names no images and groups: an older featprobe wrote it. Run it again")
        return cls(truth, predictions)

    @classmethod
    def joined(cls, parts: Sequence[Any]) -> "ObjectTest":
        """The test images of several heads as one test set; objects are counted anew."""
        images = [image for part in parts for image in part.truth["images"]]
        objects = [annotation for part in parts for annotation in part.truth["annotations"]]
        numbered = [{**annotation, "id": number} for number, annotation in enumerate(objects, start=1)]
        truth = {**parts[0].truth, "images": images, "annotations": numbered}
        return cls(truth, [found for part in parts for found in part.predictions])

    @property
    def ids(self) -> list[str]:
        """Identifiers of the images."""
        return [str(image["file_name"]) for image in self.truth["images"]]

    @property
    def groups(self) -> list[str]:
        """The group of each image."""
        return [str(image["group"]) for image in self.truth["images"]]

    def statistics(self, row: ResultRow) -> dict[str, Statistic]:
        """The task's scores as functions of how often each group counts."""
        names, index = grouped(self.groups)
        part, *_ = row.scores.main.place
        matched = ResampledAp(self.truth, self.predictions, AP_KINDS[part])
        found = {score.name: matched.by_group(score.place[-1], index, "hold") for score in row.scores.compared}
        return {name: remembered(jackknifed(own, names)) for name, own in found.items()}

    def scores(self, row: ResultRow) -> dict[str, Any]:
        """The scores of the task's own kind as a row's `test` holds them."""
        part, *_ = row.scores.main.place
        found = average_precision(self.truth, self.predictions, AP_KINDS[part])
        return {part: {**asdict(found), "per_class": dict(zip(row.classes[1:], found.per_class, strict=True))}}

    def value(self, row: ResultRow, score: Score, statistic: Statistic) -> float:
        """A score, from what was matched already."""
        return value_of(statistic)

    def per_class(self, row: ResultRow) -> dict[str, float]:
        """AP of each class; nan for one that the truth lacks, as pycocotools takes it."""
        return {name: np.nan if value is None else value for name, value in row.scores.of_classes(row.test).items()}


@dataclass(frozen=True)
class ImageTest:
    """The probabilities of a classification head on its test units, and their labels."""

    images: ScoredImages

    @classmethod
    def read(cls, folder: Path, card: Mapping[str, Any]) -> "ImageTest":
        """Read the file beside a head, if it is the one that the card describes."""
        return cls(_unpacked(ScoredImages.from_arrays, folder, card, "images"))

    @classmethod
    def joined(cls, parts: Sequence[Any]) -> "ImageTest":
        """The test units of several heads as one test set, in one ranking."""
        return cls(ScoredImages.joined([part.images for part in parts]))

    @property
    def ids(self) -> list[str]:
        """Identifiers of the units."""
        return list(self.images.ids)

    @property
    def groups(self) -> list[str]:
        """The group of each unit."""
        return list(self.images.groups)

    def statistics(self, row: ResultRow) -> dict[str, Statistic]:
        """The task's scores as functions of how often each group counts, over the labels of the truth."""
        if self.images.truth.shape[1] != len(row.classes):
            raise ProbeError(f"scores.npz holds {self.images.truth.shape[1]} labels, its row {len(row.classes)}")
        return {score.name: image_statistic(self.images, score.name) for score in row.scores.compared}

    def scores(self, row: ResultRow) -> dict[str, Any]:
        """The scores as a row's `test` holds them."""
        return image_scores(self.images, row.classes)

    def value(self, row: ResultRow, score: Score, statistic: Statistic) -> float:
        """A score."""
        return value_of(statistic)

    def per_class(self, row: ResultRow) -> dict[str, float]:
        """AUROC of labels; nan for one that all units have, or none: see `label_auroc`."""
        return label_auroc(self.images, row.classes)


@dataclass(frozen=True)
class AnomalyTest:
    """The scores of an anomaly head on its test units, how its maps score their pixels, and their truth."""

    found: ScoredAnomalies

    @classmethod
    def read(cls, folder: Path, card: Mapping[str, Any]) -> "AnomalyTest":
        """Read the file beside a head, if it is the one that the card describes."""
        return cls(_unpacked(ScoredAnomalies.from_arrays, folder, card, "anomalies"))

    @classmethod
    def joined(cls, parts: Sequence[Any]) -> "AnomalyTest":
        """The test units of several heads as one test set, in one ranking."""
        return cls(ScoredAnomalies.joined([part.found for part in parts]))

    @property
    def ids(self) -> list[str]:
        """Identifiers of the units."""
        return list(self.found.ids)

    @property
    def groups(self) -> list[str]:
        """The group of each unit."""
        return list(self.found.groups)

    def statistics(self, row: ResultRow) -> dict[str, Statistic]:
        """The task's scores as functions of how often each group counts."""
        return {score.name: anomaly_statistic(self.found, score.name) for score in row.scores.compared}

    def scores(self, row: ResultRow) -> dict[str, Any]:
        """The scores as a row's `test` holds them."""
        return anomaly_scores(self.found)

    def value(self, row: ResultRow, score: Score, statistic: Statistic) -> float:
        """A score."""
        return value_of(statistic)

    def per_class(self, row: ResultRow) -> dict[str, float]:
        """Nothing: defects are not told apart."""
        return {}


def _unpacked(make: Callable[[Mapping[str, NDArray[Any]]], T], folder: Path, card: Mapping[str, Any], on: On) -> T:
    """What scores.npz beside a head holds; raises ProbeError where its arrays do not fit together."""
    (scores,) = read_files(folder, card, ["scores.npz"])
    try:
        return make(read_arrays(scores, ARRAYS[on]))
    except ShapeError as error:
        raise ProbeError(f"scores.npz does not hold what a head scores: {error}") from error


Tested = PixelTest | ObjectTest | ImageTest | AnomalyTest
TESTS: Mapping[On, type[Tested]] = {
    "pixels": PixelTest,
    "boxes": ObjectTest,
    "masks": ObjectTest,
    "images": ImageTest,
    "anomalies": AnomalyTest,
}


def good_units(test: Tested) -> NDArray[np.bool_] | None:
    """Whether each test unit is good; None where nothing is known of that, or where pixels or objects are scored."""
    match test:
        case ImageTest(images):
            return images.is_good
        case AnomalyTest(found):
            return found.good
    return None


def read_test(folder: Path, card: Mapping[str, Any], row: ResultRow) -> tuple[Tested, dict[str, Statistic]]:
    """The test results beside the head of a row, and its scores as functions of how often each group counts.

    Raises ProbeError where that is not what the card says, or does not give the scores that the row states.
    """
    test = TESTS[row.scores.on].read(folder, card)
    statistics = test.statistics(row)
    for score in row.scores.compared:
        found, stated = test.value(row, score, statistics[score.name]), score.of(row.test)
        known = [value for value in (found, stated) if value is not None and not np.isnan(value)]
        differ = len(known) == 1 or (known and abs(known[0] - known[1]) > ROUNDING)
        if differ and score.is_stated(row.test):  # else the row is older than the score
            raise ProbeError(f"what lies beside its head gives {score.name} {found}, its row says {stated}")
    return test, statistics


def remembered(statistic: Statistic) -> Statistic:
    """A statistic that keeps what it gave for some weights: a dear one is asked for the same resamples many times."""
    return replace(statistic, value=_remembering(statistic.value), influence=_remembering(statistic.influence))


def _remembering(function: Callable[[Floats], Floats]) -> Callable[[Floats], Floats]:
    kept: dict[bytes, Floats] = {}

    def lookup(weights: Floats) -> Floats:
        key = hashlib.sha256(f"{weights.shape}".encode() + weights.tobytes()).digest()
        if key not in kept:
            kept[key] = function(weights)
        return kept[key]

    return lookup
