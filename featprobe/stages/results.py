"""Scored heads as a comparison takes them: the rows that count, what each test image contributed, validation curves."""

import hashlib
import io
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from featprobe.errors import FeatprobeError, ProbeError
from featprobe.metrics import (
    ResampledAp,
    Statistic,
    average_precision,
    grouped,
    iou_scores,
    iou_statistic,
    jackknifed,
    mean_of,
)
from featprobe.metrics.intervals import Floats
from featprobe.metrics.resampled import ScoreName
from featprobe.probes.saved import read_card, read_rows
from featprobe.specs import DEFAULT_16BIT, SplitChoice, digest
from featprobe.stages.convergence import Curve, curve_of, mean_curve

RUN = (
    "backbone", "weights_sha256", "feature_key", "head", "regime", "augmentation", "fraction", "recipe_key",
    "data_fingerprint", "split", "task", "absent_classes", "instances", "classes",
)  # fmt: skip
"""What the seeds of one result agree in; with the seed, what a repeated run agrees in."""
NEEDED = ("seed", "folder", "test", "val", "trials", "seconds", "data", "images", "parameters", "backbone_parameters",
          "recipe", "grid", "spread", "tuning", "device")  # fmt: skip
"""What else a row must hold."""
SAME_TEST = RUN[-6:]
"""What results must agree in to be compared, beside the test images."""
SCORES: Mapping[str, tuple[str, ...]] = {
    "semseg": ("miou_foreground", "miou"),
    "detect": ("box_ap50", "box_ap"),
    "instseg": ("mask_ap50", "mask_ap"),
}
"""Scores of each task; the first, the main one, decides, and is what validation curves are read for."""
PARTS: Mapping[str, tuple[str, Literal["bbox", "segm"]]] = {"detect": ("box", "bbox"), "instseg": ("mask", "segm")}
"""What each task's own scores are of: in rows, and as pycocotools calls it."""
REGIMES = {"full": 2, "frozen-online": 1, "frozen": 0}  # by how much is trained or varied
ROUNDING = 1e-6  # how far a row's score may lie from the one that its files give


@dataclass(frozen=True)
class PixelTest:
    """What a segmentation head gave for its test images. confusions: (images, classes, classes), pixels."""

    ids: list[str]
    groups: list[str]
    confusions: NDArray[np.int64]

    @classmethod
    def read(cls, folder: Path) -> "PixelTest":
        """What lies beside a head."""
        with np.load(io.BytesIO((folder / "scores.npz").read_bytes()), allow_pickle=False) as kept:
            if not {"ids", "groups"} <= set(kept.files):
                raise ProbeError("scores.npz names no images and groups: an older featprobe wrote it. Run it again")
            return cls(kept["ids"].tolist(), kept["groups"].tolist(), kept["confusion"])

    @classmethod
    def joined(cls, parts: Sequence[Any]) -> "PixelTest":
        """The test images of several heads as one test set."""
        ids, groups = ([name for part in parts for name in getattr(part, what)] for what in ("ids", "groups"))
        return cls(ids, groups, np.concatenate([part.confusions for part in parts]))

    def statistics(self, row: Mapping[str, Any]) -> dict[str, Statistic]:
        """The task's scores as functions of how often each group counts."""
        names: tuple[Literal["miou_foreground", "miou"], ...] = ("miou_foreground", "miou")
        return {name: iou_statistic(self.confusions, self.groups, name, row["absent_classes"]) for name in names}

    def scores(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The scores as a row's `test` holds them."""
        found = iou_scores(self.confusions.sum(0), row["absent_classes"])
        iou = dict(zip(row["classes"], found.per_class, strict=True))
        return {"miou": found.miou, "miou_foreground": found.miou_foreground, "iou": iou}


@dataclass(frozen=True)
class ObjectTest:
    """What is in the test images and what a detection head found there, as COCO JSON."""

    truth: dict[str, Any]
    predictions: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "ObjectTest":
        """What lies beside a head."""
        truth = json.loads((folder / "truth.json").read_text(encoding="utf-8"))
        predictions = json.loads((folder / "predictions.json").read_text(encoding="utf-8"))
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
        """Of the images."""
        return [str(image["file_name"]) for image in self.truth["images"]]

    @property
    def groups(self) -> list[str]:
        """Of each image."""
        return [str(image["group"]) for image in self.truth["images"]]

    def statistics(self, row: Mapping[str, Any]) -> dict[str, Statistic]:
        """The task's scores as functions of how often each group counts."""
        names, index = grouped(self.groups)
        part, kind = PARTS[row["task"]]
        matched = ResampledAp(self.truth, self.predictions, kind)

        def score(name: ScoreName) -> Statistic:
            return remembered(jackknifed(matched.by_group(name, index, "hold"), names))

        return {f"{part}_ap50": score("ap50"), f"{part}_ap": score("ap")}

    def scores(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The scores of the task's own kind as a row's `test` holds them."""
        part, kind = PARTS[row["task"]]
        found = average_precision(self.truth, self.predictions, kind)
        return {part: {**asdict(found), "per_class": dict(zip(row["classes"][1:], found.per_class, strict=True))}}


Tested = PixelTest | ObjectTest


@dataclass(frozen=True)
class Run:
    """One result row of one seed that can be used.

    test: what its test images gave. scores: name -> the score as a function of how often each
    group of test images counts. curve: the main score on validation, of the trial that was chosen.
    """

    row: Mapping[str, Any]
    card: Mapping[str, Any]
    test: Tested
    scores: Mapping[str, Statistic]
    curve: Curve

    @property
    def tested(self) -> str:
        """Digest over ids and groups of its test images."""
        return digest(sorted(zip(self.test.ids, self.test.groups, strict=True)))


@dataclass(frozen=True)
class Unusable:
    """A result row that no comparison can use, and why."""

    folder: str
    reason: str


@dataclass(frozen=True)
class Result:
    """The seeds of one run: what a line of the comparison stands for."""

    runs: tuple[Run, ...]

    @property
    def row(self) -> Mapping[str, Any]:
        """The row of the first seed; the others differ in seed, scores, and the trial that was chosen."""
        return self.runs[0].row

    @property
    def comparable(self) -> str:
        """The same for results that may stand in one table, as far as the names of their splits tell."""
        return digest([SplitChoice.parse(self.row["split"]).key, self.tested_alike])

    @property
    def tested_alike(self) -> str:
        """The same for results with the same test images, groups, labels and rules of scoring, whatever the split."""
        return digest([*(self.row[name] for name in SAME_TEST if name != "split"), self.runs[0].tested])

    @property
    def backbone(self) -> tuple[str, str]:
        """Short name and weights."""
        return self.row["backbone"], self.row["weights_sha256"]

    @property
    def augmented(self) -> bool:
        """Whether training looked at augmented images."""
        return self.row["augmentation"] is not None

    @property
    def variant(self) -> str:
        """The regime, and whether augmentation is as usual there: none in `frozen`, some in the others."""
        usual = self.augmented == (self.row["regime"] != "frozen")
        return f"{self.row['regime']}{'' if usual else ', augmented' if self.augmented else ', not augmented'}"

    @property
    def cell(self) -> tuple[Any, ...]:
        """What tells results of one table apart that differ in more than the recipe: backbone, variant, head, share."""
        return (*self.backbone, self.variant, self.row["head"], self.row["fraction"])

    @property
    def scale(self) -> str:
        """Height x width that images, or tiles of so many pixels, were brought to."""
        features = self.runs[0].card["features"]
        tiles = f" from tiles of {features['tile']}" if features.get("tile") else ""
        return "x".join(map(str, features["size"])) + tiles

    @property
    def size(self) -> str:
        """The scale, and what else tells results of one backbone apart: how tiles were cut, stored views, intensity."""
        features = self.runs[0].card["features"]
        parts = [self.scale]
        if features.get("tile"):
            parts += [f"overlap {features['overlap']}"]
            parts += [f"{features['empty_tiles']:.0%} of the empty"] if features["empty_tiles"] < 1 else []
        parts += (self.row["augmentation"] or {}).get("views", [])  # of the cache, where they were trained on
        usual = ("none", str(DEFAULT_16BIT))
        return ", ".join([*parts, *{features["intensity"]}.difference(usual)])

    @property
    def validation(self) -> float:
        """Mean over seeds of the main score on validation; -1 where there is none."""
        values = [run.row["val"].get(SCORES[self.row["task"]][0]) for run in self.runs]
        return float(np.mean([-1.0 if value is None else value for value in values]))

    @cached_property
    def curve(self) -> Curve:
        """Mean over seeds of the main score on validation."""
        return mean_curve([run.curve for run in self.runs])

    def score(self, name: str) -> Statistic:
        """Mean over seeds of a score."""
        return mean_of([run.scores[name] for run in self.runs])

    def seconds(self) -> tuple[float, float, float]:
        """Of training (mean over the seeds' passes), of extraction, and of both; nan where not kept.

        A live backbone needs no extraction.
        """
        train = float(np.mean([run.row["seconds"]["train"] for run in self.runs]))
        extract = self.row["seconds"].get("extract") if self.row["regime"] == "frozen" else 0.0
        taken = float("nan") if extract is None else float(extract)
        return train, taken, train + taken


def load_results(
    probes: Path, folders: Collection[str] | None = None
) -> tuple[list[Result], list[Unusable], list[str]]:
    """Results in a stable order, rows that can't be used, and what is wrong with lines of results.jsonl.

    Of rows that are the same run of the same seed the last counts. folders: of the rows that are looked at, None for
    all. Raises ProbeError where there is no row at all.
    """
    rows, notes = read_rows(probes / "results.jsonl")
    rows = [row for row in rows if folders is None or row.get("folder") in folders]
    last: dict[str, Mapping[str, Any]] = {}
    unusable, found = [], list[Run]()
    for row in rows:
        missing = [name for name in (*RUN, *NEEDED) if name not in row]
        if missing:
            folder = str(row.get("folder", "a row without a folder"))
            unusable.append(Unusable(folder, f"the row holds no {', '.join(missing)}: an older featprobe wrote it"))
        else:
            last[digest([[row[name] for name in RUN], row["seed"], row.get("fold")])] = row
    for counted in last.values():
        try:
            found.append(read_run(probes, counted))
        except FeatprobeError as error:
            unusable.append(Unusable(counted["folder"], str(error)))
    if not rows:
        raise ProbeError(
            f"There is no result in {probes} to compare.\n" + "".join(f"{note}\n" for note in notes)
            + "Make some:  featprobe extract --backbone embedded --data xray\n"
            "            featprobe probe --task semseg"
        )  # fmt: skip
    results: dict[tuple[str, str], list[Run]] = {}
    for run in _joined(found, unusable):
        results.setdefault((digest([run.row[name] for name in RUN]), run.tested), []).append(run)
    whole = [Result(tuple(sorted(runs, key=lambda run: run.row["seed"]))) for runs in results.values()]
    return sorted(whole, key=_order), unusable, notes


def _joined(runs: Sequence[Run], unusable: list[Unusable]) -> list[Run]:
    """Runs with the folds of each cross-validation and seed as one; those that lack a fold become unusable."""
    whole = [run for run in runs if run.row.get("fold") is None]
    validations: dict[str, dict[int, Run]] = {}
    for run in runs:
        if run.row.get("fold") is not None:
            key = digest([[run.row[name] for name in RUN], run.row["seed"]])
            validations.setdefault(key, {})[run.row["fold"]] = run
    for folds in validations.values():
        choice = SplitChoice.parse(next(iter(folds.values())).row["split"])
        missing = [str(fold) for fold in range(1, choice.folds + 1) if fold not in folds]
        if missing:
            reason = f"a cross-validation needs all {choice.folds} folds; without a usable result: {', '.join(missing)}"
            unusable += [Unusable(run.row["folder"], reason) for run in folds.values()]
        else:
            whole.append(joined([folds[fold] for fold in sorted(folds)]))
    return whole


def joined(folds: Sequence[Run]) -> Run:
    """All folds of a cross-validation as one run. Its test set is all images, each scored by the head of its own fold.

    Confusions are summed over all images, and objects found in any image are ranked together: a score is what it is on
    one test set, no mean over folds. Validation scores, curves and counts of training images are means over folds,
    seconds of training are sums.
    """
    row = folds[0].row
    every = [fold.row for fold in folds]
    test: Tested = type(folds[0].test).joined([fold.test for fold in folds])
    counts = {
        name: {split: sum(own[name][split] for own in every) // (1 if split == "test" else len(folds))
               for split in row[name]}
        for name in ("images", "groups")
    }  # fmt: skip
    seconds = {**row["seconds"], "train": sum(own["seconds"]["train"] for own in every)}
    val = {
        name: None if any(own["val"].get(name) is None for own in every)
        else float(np.mean([own["val"][name] for own in every]))
        for name in row["val"]
    }  # fmt: skip
    whole = {**row, **counts, "fold": None, "seconds": seconds, "val": val, "test": test.scores(row)}
    return Run(whole, folds[0].card, test, test.statistics(row), mean_curve([fold.curve for fold in folds]))


def _order(result: Result) -> tuple[Any, ...]:
    row = result.row
    return (row["data"], row["task"], row["split"], result.comparable, row["head"], row["backbone"], row["fraction"],
            REGIMES[row["regime"]], result.variant, result.size, row["recipe_key"])  # fmt: skip


def read_run(probes: Path, row: Mapping[str, Any]) -> Run:
    """A row with what lies in its folder; raises ProbeError, saying why, where it can't be used."""
    folder = probes / row["folder"]
    if row["task"] not in SCORES or row["regime"] not in REGIMES:
        raise ProbeError(f"{row['task']} in the regime {row['regime']} is not known here")
    if not (folder / "card.json").is_file():
        raise ProbeError("its folder is not here any more" if not folder.is_dir() else "its folder holds no card.json")
    card = read_card(folder)
    if {**card["result"], "version": None} != {**row, "version": None}:
        raise ProbeError("its folder was written again since, by another run")
    try:
        test: Tested = (PixelTest if row["task"] == "semseg" else ObjectTest).read(folder)
        scores = test.statistics(row)
        curves = json.loads((folder / "curves.json").read_text(encoding="utf-8"))
        (chosen,) = [trial["curve"] for trial in curves if trial["chosen"]]
        curve = curve_of(chosen, SCORES[row["task"]][0]) if row["head"] != "ridge" else Curve((), ())
    except FileNotFoundError as error:
        raise ProbeError(f"{Path(str(error.filename)).name} is not beside its head") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, BadZipFile) as error:
        raise ProbeError(f"what lies beside its head can't be read: {type(error).__name__}: {error}") from error
    _check_scores(row, scores)
    return Run(row, card, test, scores, curve)


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


def _check_scores(row: Mapping[str, Any], scores: Mapping[str, Statistic]) -> None:
    """Raise ProbeError where the files beside a head do not give the scores that its row states."""
    for name, statistic in scores.items():
        found = float(statistic.value(np.ones((1, sum(statistic.sizes))))[0])
        wanted = stated_score(row, name)
        same = np.isnan(found) if wanted is None else abs(found - wanted) <= ROUNDING
        if not same:
            raise ProbeError(f"what lies beside its head gives {name} {found:.6f}, its row says {wanted}")


def stated_score(row: Mapping[str, Any], name: str) -> float | None:
    """A score as a row states it for the test split; None where it has none."""
    part, _, rest = name.partition("_")
    value = row["test"][name] if row["task"] == "semseg" else row["test"][part][rest]
    return None if value is None else float(value)


def comparable_sets(results: Sequence[Result]) -> list[list[Result]]:
    """Results that may stand in one table, in their order."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.comparable, []).append(result)
    return list(found.values())


def representatives(results: Sequence[Result]) -> dict[tuple[Any, ...], Result]:
    """Of the results of each cell of a table, which differ in recipe or input size, one that stands for it.

    Results of one head and share are taken at the scale that most of their cells have, of several such scales the best
    on validation, so that backbones and regimes meet at one scale; of those, or where a cell has none, the best on
    validation.
    """
    cells: dict[tuple[Any, ...], dict[str, dict[tuple[Any, ...], Result]]] = {}  # by head and share, then by scale
    for result in results:
        own = cells.setdefault(result.cell[-2:], {}).setdefault(result.scale, {})
        if result.cell not in own or result.validation > own[result.cell].validation:
            own[result.cell] = result
    found: dict[tuple[Any, ...], Result] = {}
    for scales in cells.values():
        shared = max(scales.values(), key=lambda own: (len(own), np.mean([r.validation for r in own.values()])))
        others = [result for own in scales.values() for result in own.values() if result.cell not in shared]
        found |= {result.cell: result for result in sorted(others, key=lambda r: r.validation)} | shared
    return {result.cell: found[result.cell] for result in results}
