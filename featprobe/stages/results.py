"""Scored heads as a comparison takes them: the rows that count, what each test image contributed, validation curves."""

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np

from featprobe.errors import FeatprobeError, ProbeError
from featprobe.metrics import ResampledAp, Statistic, grouped, iou_statistic, jackknifed, mean_of
from featprobe.metrics.intervals import Floats
from featprobe.metrics.resampled import ScoreName
from featprobe.probes.saved import read_card, read_rows
from featprobe.specs import digest
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
REGIMES = {"full": 2, "frozen-online": 1, "frozen": 0}  # by how much is trained or varied
ROUNDING = 1e-6  # how far a row's score may lie from the one that its files give


@dataclass(frozen=True)
class Run:
    """One result row of one seed that can be used.

    tested: digest over ids and groups of its test images. scores: name -> the score as a function of how often each
    group of test images counts. curve: the main score on validation, of the trial that was chosen.
    """

    row: Mapping[str, Any]
    card: Mapping[str, Any]
    tested: str
    scores: Mapping[str, Statistic]
    curve: Curve


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
        """The same for results that may stand in one table."""
        return digest([*(self.row[name] for name in SAME_TEST), self.runs[0].tested])

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
        plain = "" if self.augmented or self.row["regime"] == "frozen" else ", not augmented"
        return f"{self.row['regime']}{plain}"

    @property
    def cell(self) -> tuple[Any, ...]:
        """What tells results of one table apart that differ in more than the recipe: backbone, variant, head, share."""
        return (*self.backbone, self.variant, self.row["head"], self.row["fraction"])

    @property
    def size(self) -> str:
        """Height x width that images were brought to."""
        return "x".join(map(str, self.runs[0].card["features"]["size"]))

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


def load_results(probes: Path) -> tuple[list[Result], list[Unusable], list[str]]:
    """Results in a stable order, rows that can't be used, and what is wrong with lines of results.jsonl.

    Of rows that are the same run of the same seed the last counts. Raises ProbeError where there is no row at all.
    """
    rows, notes = read_rows(probes / "results.jsonl")
    last: dict[str, Mapping[str, Any]] = {}
    unusable, results = [], dict[tuple[str, str], list[Run]]()
    for row in rows:
        missing = [name for name in (*RUN, *NEEDED) if name not in row]
        if missing:
            folder = str(row.get("folder", "a row without a folder"))
            unusable.append(Unusable(folder, f"the row holds no {', '.join(missing)}: an older featprobe wrote it"))
        else:
            last[digest([[row[name] for name in RUN], row["seed"]])] = row
    for counted in last.values():
        try:
            run = read_run(probes, counted)
        except FeatprobeError as error:
            unusable.append(Unusable(counted["folder"], str(error)))
        else:
            results.setdefault((digest([counted[name] for name in RUN]), run.tested), []).append(run)
    if not rows:
        raise ProbeError(
            f"There is no result in {probes} to compare.\n" + "".join(f"{note}\n" for note in notes)
            + "Make some:  featprobe extract --backbone embedded --data xray\n"
            "            featprobe probe --task semseg"
        )  # fmt: skip
    whole = [Result(tuple(sorted(runs, key=lambda run: run.row["seed"]))) for runs in results.values()]
    return sorted(whole, key=_order), unusable, notes


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
        reading = _read_semantic if row["task"] == "semseg" else _read_objects
        ids, groups, scores = reading(folder, row)
        curves = json.loads((folder / "curves.json").read_text(encoding="utf-8"))
        (chosen,) = [trial["curve"] for trial in curves if trial["chosen"]]
        curve = curve_of(chosen, SCORES[row["task"]][0]) if row["head"] != "ridge" else Curve((), ())
    except FileNotFoundError as error:
        raise ProbeError(f"{Path(str(error.filename)).name} is not beside its head") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, BadZipFile) as error:
        raise ProbeError(f"what lies beside its head can't be read: {type(error).__name__}: {error}") from error
    _check_scores(row, scores)
    return Run(row, card, digest(sorted(zip(ids, groups, strict=True))), scores, curve)


Read = tuple[list[str], list[str], dict[str, Statistic]]


def _read_semantic(folder: Path, row: Mapping[str, Any]) -> Read:
    with np.load(io.BytesIO((folder / "scores.npz").read_bytes()), allow_pickle=False) as kept:
        if not {"ids", "groups"} <= set(kept.files):
            raise ProbeError("scores.npz names no images and groups: an older featprobe wrote it. Run it again")
        confusions, ids, groups = kept["confusion"], kept["ids"].tolist(), kept["groups"].tolist()
    names: tuple[Literal["miou_foreground", "miou"], ...] = ("miou_foreground", "miou")
    return ids, groups, {name: iou_statistic(confusions, groups, name, row["absent_classes"]) for name in names}


def _read_objects(folder: Path, row: Mapping[str, Any]) -> Read:
    truth = json.loads((folder / "truth.json").read_text(encoding="utf-8"))
    predictions = json.loads((folder / "predictions.json").read_text(encoding="utf-8"))
    if not all({"file_name", "group"} <= set(image) for image in truth["images"]):
        raise ProbeError("truth.json names no images and groups: an older featprobe wrote it. Run it again")
    ids, groups = ([str(image[key]) for image in truth["images"]] for key in ("file_name", "group"))
    names, index = grouped(groups)
    matched = ResampledAp(truth, predictions, "segm" if row["task"] == "instseg" else "bbox")

    def score(name: ScoreName) -> Statistic:
        return remembered(jackknifed(matched.by_group(name, index, "hold"), names))

    part = "mask" if row["task"] == "instseg" else "box"
    return ids, groups, {f"{part}_ap50": score("ap50"), f"{part}_ap": score("ap")}


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
    """Of the results of each cell of a table, which differ in recipe or input size, the best on validation."""
    found: dict[tuple[Any, ...], Result] = {}
    for result in results:
        if result.cell not in found or result.validation > found[result.cell].validation:
            found[result.cell] = result
    return found
