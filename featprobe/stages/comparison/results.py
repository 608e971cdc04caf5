"""Scored heads as a comparison takes them: the rows that count, what each test image contributed, validation curves."""

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from featprobe.disk import parse_json
from featprobe.errors import FeatprobeError, ProbeError
from featprobe.intensity import DEFAULT_16BIT
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
from featprobe.probes.saved import head_folder, read_files, read_rows
from featprobe.result_rows import result_faults
from featprobe.specs import digest
from featprobe.splitting import SplitChoice
from featprobe.stages.comparison.convergence import Curve, best_so_far, curve_of, mean_curve
from featprobe.stages.comparison.recipes import shared_recipe
from featprobe.stages.training.saved_results import UNREADABLE, card_beside, damaged, read_arrays
from featprobe.tiling import Tiling

RUN = (
    "backbone", "weights_sha256", "feature_key", "head", "regime", "augmentation", "fraction", "recipe_key",
    "data_fingerprint", "split", "task", "absent_classes", "instances", "classes",
)  # fmt: skip
"""What the seeds of one result agree in; with the seed, what a repeated run agrees in."""
SAME_TEST = ("data_fingerprint", "split", "task", "instances", "classes")
"""What results must agree in to be compared, beside the test images. Classes that the test split lacks take no part in
any comparison, whatever `absent_classes` a row was scored with."""
SCORES: Mapping[str, tuple[str, ...]] = {
    "semseg": ("miou_foreground", "miou"),
    "detect": ("box_ap50", "box_ap"),
    "instseg": ("mask_ap50", "mask_ap"),
}
"""Scores of each task. The first, the main one, is what trials are chosen by and what is compared, and what validation
curves are read for. Of objects it is AP50: inspection asks whether a flaw is found, and the labels of flaws that are a
few pixels wide do not tell outlines apart at an IoU of 0.75, so that AP over ten thresholds is also about the
labels."""
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
    def read(cls, folder: Path, card: Mapping[str, Any]) -> "PixelTest":
        """What lies beside a head, if it is what the card says."""
        (scores,) = read_files(folder, card, ["scores.npz"])
        kept = read_arrays(scores)
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

    def statistics(self, row: Mapping[str, Any]) -> dict[str, Statistic]:
        """The task's scores as functions of how often each group counts, over the classes of the truth."""
        names: tuple[Literal["miou_foreground", "miou"], ...] = ("miou_foreground", "miou")
        return {name: iou_statistic(self.confusions, self.groups, name, "ignore") for name in names}

    def scores(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The scores as a row's `test` holds them, with the row's own rule for classes that the truth lacks."""
        found = iou_scores(self.confusions.sum(0), row["absent_classes"])
        iou = dict(zip(row["classes"], found.per_class, strict=True))
        return {"miou": found.miou, "miou_foreground": found.miou_foreground, "iou": iou}

    def per_class(self, row: Mapping[str, Any]) -> dict[str, float]:
        """IoU of each class; nan for one that the truth lacks."""
        return dict(zip(row["classes"], iou_scores(self.confusions.sum(0), "ignore").per_class, strict=True))


@dataclass(frozen=True)
class ObjectTest:
    """What is in the test images and what a detection head found there, as COCO JSON."""

    truth: dict[str, Any]
    predictions: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path, card: Mapping[str, Any]) -> "ObjectTest":
        """What lies beside a head, if it is what the card says."""
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

    def per_class(self, row: Mapping[str, Any]) -> dict[str, float]:
        """AP of each class; nan for one that the truth lacks, as pycocotools takes it."""
        stated = row["test"][PARTS[row["task"]][0]]["per_class"]
        return {name: np.nan if value is None else value for name, value in stated.items()}


Tested = PixelTest | ObjectTest


@dataclass(frozen=True)
class Run:
    """One result row of one seed that can be used.

    test: what its test images gave. scores: name -> the score as a function of how often each group of test images
    counts, over the classes of the truth. curve: the main score on validation, of the trial that was chosen.
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


@dataclass(frozen=True, eq=False)
class Result:
    """The seeds of one run: what a line of the comparison stands for. Each is equal to itself alone."""

    runs: tuple[Run, ...]

    @property
    def row(self) -> Mapping[str, Any]:
        """The row of the first seed; the others differ in seed, scores, and the trial that was chosen."""
        return self.runs[0].row

    @cached_property
    def shared_recipe(self) -> str:
        """The same for results whose recipes meet, whatever the regime."""
        return shared_recipe(self.row, self.head)

    @property
    def head(self) -> Mapping[str, Any]:
        """The recipe of its head."""
        found: Mapping[str, Any] = self.runs[0].card["head"]
        return found

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
    def dtype(self) -> str:
        """In which its features were stored; "" where none were, as of a backbone that is trained."""
        return self.runs[0].card["features"].get("dtype", "") if self.row["regime"] == "frozen" else ""

    @property
    def size(self) -> str:
        """The scale, and what else tells results of one backbone apart: how tiles were cut, stored views, intensity."""
        features = self.runs[0].card["features"]
        tiling = Tiling.in_json(features)
        parts = [self.scale, *(tiling.manner if tiling else ())]
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

    @cached_property
    def kept(self) -> Curve:
        """The same of the weights that each seed would have kept if its training had ended at that point."""
        best = self.weights_from == "best validation"
        return mean_curve([best_so_far(run.curve) if best else run.curve for run in self.runs])

    @property
    def main(self) -> str:
        """The score that decides."""
        return SCORES[self.row["task"]][0]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Numbers of its seeds, ascending."""
        return tuple(run.row["seed"] for run in self.runs)

    @property
    def weights_from(self) -> str:
        """Of which point of the validation curve the weights are; rows of an older featprobe hold those of the end."""
        return str(self.row.get("weights_from", "end of training"))

    @property
    def own_subsets(self) -> bool:
        """Whether each seed was trained on a share of the training images of its own."""
        return self.row["fraction"] < 1 and self.row.get("subset") == "by seed"

    @property
    def solved(self) -> bool:
        """Whether another seed would give the same head: it has a closed form, and the same training images."""
        return self.row["head"] == "ridge" and self.row["fraction"] == 1

    @property
    def random_weights(self) -> bool:
        """Whether its backbone was never trained: a control."""
        spec = self.runs[0].card["backbone"] or {}
        return spec.get("source") == "random" or str(self.row["backbone"]).endswith("-random")

    @property
    def budget(self) -> Mapping[str, Any] | None:
        """How its number of iterations was found; None where it was fixed, and no one knows whether it is enough."""
        return self.row.get("budget")

    @property
    def compared_budgets(self) -> tuple[Any, ...]:
        """The same for results whose numbers of iterations were found for one comparison."""
        return (*self.cell[-2:], self.row["regime"], (self.budget or {}).get("comparison"))

    def each(self, name: str) -> list[Statistic]:
        """A score of each seed."""
        return [run.scores[name] for run in self.runs]

    def score(self, name: str) -> Statistic:
        """Mean over seeds of a score."""
        return mean_of(self.each(name))

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
    rows, notes = read_rows(probes / "results.jsonl", result_faults)
    rows = [row for row in rows if folders is None or row.get("folder") in folders]
    last: dict[str, Mapping[str, Any]] = {}
    unusable, found = [], list[Run]()
    for row in rows:
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
            REGIMES[row["regime"]], result.variant, result.size, result.dtype, row["recipe_key"])  # fmt: skip


def read_run(probes: Path, row: Mapping[str, Any]) -> Run:
    """A row with what lies in its folder; raises ProbeError, saying why, where it can't be used.

    What is read is what the card says, byte for byte.
    """
    folder = head_folder(probes, row)
    if row["task"] not in SCORES or row["regime"] not in REGIMES:
        raise ProbeError(f"{row['task']} in the regime {row['regime']} is not known here")
    card = card_beside(probes, row)
    try:
        test: Tested = (PixelTest if row["task"] == "semseg" else ObjectTest).read(folder, card)
        scores = test.statistics(row)
        (curves,) = map(parse_json, read_files(folder, card, ["curves.json"]))
        (chosen,) = [trial["curve"] for trial in curves if trial["chosen"]]
        curve = curve_of(chosen, SCORES[row["task"]][0]) if row["head"] != "ridge" else Curve((), ())
        _check_scores(row, test, scores)
    except ProbeError as error:
        raise damaged(row, str(error)) from error
    except UNREADABLE as error:
        raise damaged(row, f"what lies beside its head can't be read: {type(error).__name__}: {error}") from error
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


def _check_scores(row: Mapping[str, Any], test: Tested, scores: Mapping[str, Statistic]) -> None:
    """Raise ProbeError where the files beside a head do not give the scores that its row states, by the row's rule."""
    own = {**row, "test": test.scores(row)} if isinstance(test, PixelTest) else None
    for name, statistic in scores.items():
        found = stated_score(own, name) if own else float(statistic.value(np.ones((1, sum(statistic.sizes))))[0])
        known = [value for value in (found, stated_score(row, name)) if value is not None and not np.isnan(value)]
        if len(known) == 1 or (known and abs(known[0] - known[1]) > ROUNDING):
            raise ProbeError(f"what lies beside its head gives {name} {found}, its row says {stated_score(row, name)}")


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

    Backbones and regimes are to meet: results of one head and share are taken at the recipe and scale that most of
    their cells have, of several such the best on validation. Where a cell has none of these, one of that recipe comes
    before one of that scale; and of what is left the best on validation, a budget that was found small last.
    """
    found: dict[tuple[Any, ...], Result] = {}
    for part in dict.fromkeys(result.cell[-2:] for result in results):
        own = [result for result in results if result.cell[-2:] == part]
        recipe, scale = _meeting(own)
        short = shortfalls(own)

        def fit(result: Result, recipe: str = recipe, scale: str = scale, short: Any = short) -> tuple[Any, ...]:
            same = (result.shared_recipe == recipe, result.scale == scale)
            return (all(same), *same, result not in short, result.validation)

        for result in own:
            if result.cell not in found or fit(result) > fit(found[result.cell]):
                found[result.cell] = result
    return {result.cell: found[result.cell] for result in results}


def _meeting(results: Sequence[Result]) -> tuple[str, str]:
    """The recipe and scale that most cells of these results have, of several the best on validation."""
    places: dict[tuple[str, str], dict[tuple[Any, ...], float]] = {}
    for result in results:
        own = places.setdefault((result.shared_recipe, result.scale), {})
        own[result.cell] = max(own.get(result.cell, -1.0), result.validation)
    return max(places, key=lambda place: (len(places[place]), np.mean(list(places[place].values()))))


def shortfalls(results: Sequence[Result]) -> dict[Result, int]:
    """Results of a table whose number of iterations was found and is too small, and how many are known to be needed.

    Another backbone of the same head, share, regime and recipe needed more; or the search ended at its top, and more
    than that is needed: then the number is the one that was trained.
    """
    most: dict[tuple[Any, ...], int] = {}
    kinds = {result: result.compared_budgets for result in results if result.budget}
    for result, kind in kinds.items():
        most[kind] = max(most.get(kind, 0), int((result.budget or {})["needed"]))
    return {
        result: max(most[kind], result.row["recipe"]["iterations"])
        for result, kind in kinds.items()
        if result.row["recipe"]["iterations"] < most[kind] or (result.budget or {}).get("open")
    }
