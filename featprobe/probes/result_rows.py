"""Result rows and rungs of ladders as typed values (probes/README.md): the one place that knows their fields.

A field with a default came later, or is not in every row: the default is what a row without it means.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from featprobe.errors import DataError, FieldError, ProbeError
from featprobe.fields import MISSING_FIELD, Fault, wrong
from featprobe.kinds import TrainRecipe, kinds_of
from featprobe.schemas import check
from featprobe.specs import SplitChoice

Score = float | None
"""In [0, 1]; None where it does not exist."""


@dataclass(frozen=True)
class Grid:
    """Learning rates and weight decays that were tried."""

    lr: tuple[float, ...]
    weight_decay: tuple[float, ...]


@dataclass(frozen=True)
class Counts:
    """How many in each part of a split."""

    train: int
    val: int
    test: int


@dataclass(frozen=True)
class FoundBudget:
    """How a number of iterations was found, as `stages.probe_options.Budget` has it."""

    needed: int
    open: bool
    rule: str = "ladder"
    comparison: str = ""


@dataclass(frozen=True)
class Seconds:
    """Of the whole training, of scoring the test split, of all runs of the cache."""

    train: float
    test: float | None = None
    extract: float | None = None


@dataclass(frozen=True)
class Treatment:
    """How images and a live backbone were treated, as `stages.probe_options.Tuning` has it."""

    augment: bool
    precision: str
    regime: str = "full"
    backbone_lr: float = 0.1
    layer_decay: float = 1.0
    bn: str = "frozen"
    clip: float = 1.0
    accumulate: int = 1
    ema: float = 0.0
    init_head: str | None = None


@dataclass(frozen=True)
class AskedHead:
    """What a head was asked for with. levels: names; empty for all. width: None for the kind's own."""

    levels: tuple[str, ...]
    width: int | None
    pyramid: str


@dataclass(frozen=True)
class Solution:
    """How a closed-form head was solved."""

    strength: float
    offsets: tuple[float, ...]
    tried: int


@dataclass(frozen=True)
class PixelScores:
    """Of a dense head. iou: of each class."""

    miou: Score
    miou_foreground: Score
    iou: Mapping[str, Score]


@dataclass(frozen=True)
class Precision:
    """Average precision of boxes or masks, as COCO has it. per_class: AP of each class."""

    ap: Score
    ap50: Score
    per_class: Mapping[str, Score]
    ap75: Score = None
    ap_small: Score = None
    ap_medium: Score = None
    ap_large: Score = None
    ar1: Score = None
    ar10: Score = None
    ar100: Score = None
    ar_small: Score = None
    ar_medium: Score = None
    ar_large: Score = None


@dataclass(frozen=True)
class BoxScores:
    """Of a detection head."""

    box: Precision


@dataclass(frozen=True)
class MaskScores:
    """Of a head that finds instances."""

    box: Precision
    mask: Precision


@dataclass(frozen=True)
class ResultRow:
    """What is kept of a scored head of one seed. recipe: as `TrainRecipe.from_json` takes it."""

    regime: str
    tuning: Treatment | None
    augmentation: Mapping[str, float | tuple[str, ...]] | None
    task: str
    head: str
    backbone: str
    weights_sha256: str
    feature_key: str
    data: str
    data_fingerprint: str
    split: str
    fraction: float
    classes: tuple[str, ...]
    parameters: int
    backbone_parameters: int
    recipe: Mapping[str, Any]
    grid: Grid
    recipe_key: str
    seed: int
    spread: str
    trials: int
    instances: str
    absent_classes: Literal["ignore", "zero"]
    images: Counts
    val: Mapping[str, Score]
    test: Any
    seconds: Seconds
    device: str
    folder: str
    time: str = ""
    version: int = 1
    model: str | None = None
    levels: tuple[str, ...] = ()
    tile: int | None = None
    fold: int | None = None
    groups: Counts | None = None
    train_counts: Mapping[str, int] | None = None
    chosen_from: Grid | None = None
    chosen_by: str | None = None
    budget: FoundBudget | None = None
    weights_from: str = "end of training"
    weights_at: int | None = None
    subset: str | None = None
    ridge: Solution | None = None
    head_precision: str | None = None
    processes: int = 1
    asked: AskedHead | None = None
    verified: bool = True


@dataclass(frozen=True)
class SegmentationRow(ResultRow):
    """Of a dense head."""

    test: PixelScores


@dataclass(frozen=True)
class DetectionRow(ResultRow):
    """Of a head that finds boxes."""

    test: BoxScores


@dataclass(frozen=True)
class InstanceRow(ResultRow):
    """Of a head that finds boxes with masks."""

    test: MaskScores


LATER_IN_RECIPES = ("weights_from",)
"""Fields of a training recipe that older rows lack."""
ROWS: Mapping[str, type[ResultRow]] = {"semseg": SegmentationRow, "detect": DetectionRow, "instseg": InstanceRow}


@dataclass(frozen=True)
class LadderRow:
    """A rung of a ladder: a training scored on validation alone. score: mean over the seeds; None: it diverged."""

    ladder: str
    comparison: str
    iterations: int
    score: Score
    seed_scores: tuple[Score, ...] = ()
    backbone: str | None = None
    verified: bool = True


def result_faults(row: Mapping[str, Any]) -> list[Fault]:
    """What keeps a result row from being read: fields of wrong types or out of their limits, or none that it needs.

    Fields that are not known here are ignored. A task of a newer featprobe has scores that are not known either.
    """
    task = row.get("task")
    faults = check(
        ROWS.get(task, ResultRow) if isinstance(task, str) else ResultRow, row, closed=False, empty_texts=True
    )
    if faults:
        return faults
    if task in ROWS and row["head"] not in kinds_of(str(task)):
        faults.append(wrong(("head",), f"one of {', '.join(kinds_of(row['task']))}", row["head"]))
    if len(set(row["classes"])) < max(2, len(row["classes"])):
        faults.append(wrong(("classes",), "the background and others, each once", row["classes"]))
    if not 0 < row["fraction"] <= 1:
        faults.append(wrong(("fraction",), "0 < fraction <= 1", row["fraction"]))
    if row["seed"] < 0:
        faults.append(wrong(("seed",), "0 or more", row["seed"]))
    if row["tuning"] is None and (row["regime"] != "frozen" or row.get("chosen_from")):
        faults.append(wrong(("tuning",), "a table, as the backbone was live", None))
    needed = [own.name for own in fields(TrainRecipe) if own.name not in LATER_IN_RECIPES]
    faults += [Fault(("recipe", name), MISSING_FIELD) for name in needed if name not in row["recipe"]]
    try:
        TrainRecipe.from_json(row["recipe"])
    except FieldError as error:
        faults += [fault.below("recipe") for fault in error.faults]
    except ProbeError as error:
        faults.append(Fault(("recipe",), str(error).splitlines()[0]))
    try:
        folds = SplitChoice.parse(row["split"]).folds
        if row.get("fold") is not None and not 1 <= row["fold"] <= folds:
            faults.append(wrong(("fold",), f"1 to {folds} of {row['split']}", row["fold"]))
    except DataError as error:
        faults.append(Fault(("split",), str(error).splitlines()[0]))
    return faults


def ladder_faults(row: Mapping[str, Any]) -> list[Fault]:
    """The same of a rung of a ladder."""
    return check(LadderRow, row, closed=False, empty_texts=True)
