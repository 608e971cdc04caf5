"""Result rows and rungs of ladders as typed values (probes/README.md): the one place that knows their fields.

A field with a default came later, or is not in every row: the default is what a row without it means.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

from featprobe.errors import DataError, FeatprobeError, FieldError, ProbeError
from featprobe.image_labels import ImageLabels, Unit
from featprobe.io.disk import parse_json
from featprobe.io.fields import MISSING_FIELD, Fault, built, message, misfits, plain, wrong
from featprobe.io.schemas import check
from featprobe.kinds import TASKS, HeadKind, TrainRecipe, kind_of, kinds_of
from featprobe.scores import SCORES, On, TaskScores, at
from featprobe.splitting import SplitChoice

Value = float | None
"""The value of a score, in [0, 1]; None if it does not exist."""
ROW_VERSION = 1  # of probes/README.md
SHARED_ORDER = "initialisation"  # what the spread over seeds covers with a shared order of the images
SHARED_NOTHING = "initialisation and order"
DRAWN = "what is drawn"  # the same of heads that are solved
RARE: Mapping[str, bool] = {"rare": True}
"""Marks the fields that rows hold only if they are unusual."""
LATER_IN_RECIPES = ("weights_from",)
"""Fields of a training recipe that older rows lack."""


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


@dataclass(frozen=True, kw_only=True)
class FoundBudget:
    """How a number of iterations was found, as `stages.training.probe_options.Budget` has it."""

    rule: str = "ladder"
    needed: int
    open: bool
    comparison: str = ""


@dataclass(frozen=True)
class Seconds:
    """Seconds of the whole training, of scoring the test split, of all runs of the cache."""

    train: float
    test: float | None = None
    extract: float | None = None


@dataclass(frozen=True, kw_only=True)
class Treatment:
    """How images and a live backbone were treated, as `stages.training.probe_options.Tuning` has it."""

    regime: str = "full"
    augment: bool
    backbone_lr: float = 0.1
    layer_decay: float = 1.0
    bn: str = "frozen"
    clip: float = 1.0
    accumulate: int = 1
    ema: float = 0.0
    precision: str
    init_head: str | None = None


@dataclass(frozen=True)
class AskedHead:
    """The options of a head. levels: names; empty for all. width: None for the default of the kind."""

    levels: tuple[str, ...]
    width: int | None
    pyramid: str


@dataclass(frozen=True)
class Solution:
    """How a closed-form head was solved."""

    strength: float
    offsets: tuple[float, ...]
    tried: int


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options that only some tasks and kinds look at, as `stages.training.probe_options` has them; None: others."""

    unit: Unit
    false_calls: float
    labels: ImageLabels | None = None
    coreset: float | None = None
    remove_position: bool | None = None

    @property
    def of_units(self) -> list[str]:
        """For people, what is labelled, where it is unusual."""
        labels = [f"labels: {self.labels}"] if self.labels not in (None, "own") else []
        return labels + ([f"each {self.unit}"] if self.unit != "image" else [])

    def options(self) -> dict[str, Any]:
        """Those that the task and the kind look at, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class PixelScores:
    """The least that the `test` of a dense head's row holds. iou: of each class."""

    miou: Value
    miou_foreground: Value
    iou: Mapping[str, Value]


@dataclass(frozen=True)
class Precision:
    """Average precision of boxes or masks, as COCO has it. per_class: AP of each class."""

    ap: Value
    ap50: Value
    per_class: Mapping[str, Value]
    ap75: Value = None
    ap_small: Value = None
    ap_medium: Value = None
    ap_large: Value = None
    ar1: Value = None
    ar10: Value = None
    ar100: Value = None
    ar_small: Value = None
    ar_medium: Value = None
    ar_large: Value = None


@dataclass(frozen=True)
class BoxScores:
    """The least that the `test` of a detection head's row holds."""

    box: Precision


@dataclass(frozen=True)
class MaskScores:
    """The same of a head that finds instances."""

    box: Precision
    mask: Precision


@dataclass(frozen=True)
class ImageScores:
    """The least that the `test` of a row of image labels holds. per_class: AUROC of each label."""

    auroc: Value
    per_class: Mapping[str, Value]


@dataclass(frozen=True)
class AnomalyScores:
    """The least that the `test` of an anomaly head's row holds."""

    image_auroc: Value


TESTS: Mapping[On, type] = {
    "pixels": PixelScores,
    "boxes": BoxScores,
    "masks": MaskScores,
    "images": ImageScores,
    "anomalies": AnomalyScores,
}


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """The record of a scored head of one seed: the fields of probes/README.md, in the order in which rows hold them.

    test: as `scores.Score.place` leads into it. time: UTC, ISO 8601. A value that is nan exists in no file: JSON has
    null there.
    """

    version: int = field(default=1, metadata=RARE)
    time: str = ""
    regime: str
    tuning: Treatment | None
    augmentation: Mapping[str, float | Sequence[str]] | None
    task: str
    backbone: str
    model: str | None = None
    weights_sha256: str
    data: str
    data_fingerprint: str
    feature_key: str
    tile: int | None = None
    head: str
    levels: tuple[str, ...] = ()
    asked: AskedHead | None = None
    parameters: int
    backbone_parameters: int
    recipe: TrainRecipe
    grid: Grid
    chosen_from: Grid | None = None
    chosen_by: str | None = None
    recipe_key: str
    seed: int
    spread: str
    trials: int
    budget: FoundBudget | None = None
    weights_from: str = "end of training"
    weights_at: int | None = None
    split: str
    fold: int | None = None
    fraction: float
    subset: str | None = None
    images: Counts
    groups: Counts | None = None
    absent_classes: Literal["ignore", "zero"]
    instances: Literal["own", "components"]
    classes: tuple[str, ...]
    train_counts: Mapping[str, int] | None = None
    val: Mapping[str, Value]
    test: Mapping[str, Any]
    seconds: Seconds
    device: str
    head_precision: str | None = None
    processes: int = 1
    folder: str
    unreadable: int = field(default=0, metadata=RARE)
    verified: bool = field(default=True, metadata=RARE)
    ridge: Solution | None = field(default=None, metadata=RARE)
    settings: Settings | None = field(default=None, metadata=RARE)
    solution: Mapping[str, Any] | None = field(default=None, metadata=RARE)

    @classmethod
    def from_json(cls, row: Mapping[str, Any], *, load: bool = True) -> "ResultRow":
        """The row that a line of results.jsonl or a card holds; raises FieldError, with all that `result_faults` finds.

        load: as there; without it, the row may have no `kind`. What an older featprobe did not write is as a row that
        lacks it is meant.
        """
        faults = result_faults(row, load=load)
        if faults:
            raise FieldError(message("A result row has wrong fields.", faults), faults)
        return cls.from_checked(row)

    @classmethod
    def from_checked(cls, row: Mapping[str, Any]) -> "ResultRow":
        """The same for a row in which `result_faults` has found nothing, as that of a card that was read."""
        made: ResultRow = built(cls, {**row, "recipe": TrainRecipe.from_json(row["recipe"])})
        return made

    def to_json(self) -> dict[str, Any]:
        """Plain values, as cards keep them; a line of results.jsonl has its `version` before them."""
        row = plain({**asdict(self), "recipe": self.recipe.to_json()})
        usual = {own.name: own.default for own in fields(self) if own.metadata == RARE}
        return {name: value for name, value in row.items() if name not in usual or value != usual[name]}

    @property
    def is_known(self) -> bool:
        """Whether it is of a task that this featprobe has; only then it has a kind and scores."""
        return self.task in TASKS

    @property
    def kind(self) -> HeadKind:
        """The kind of its head."""
        return kind_of(self.task, self.head)

    @property
    def scores(self) -> TaskScores:
        """The scores of its task."""
        return SCORES[self.task]

    @property
    def views(self) -> tuple[str, ...]:
        """Views of the training images that its cache stores."""
        stored = (self.augmentation or {}).get("views", ())
        return () if isinstance(stored, float | int) else tuple(stored)

    @property
    def test_set(self) -> tuple[Any, ...]:
        """The values in which results must agree to be compared, beside their split and the test images.

        Classes that the test split lacks take no part in any comparison, whatever `absent_classes` a row was scored
        with.
        """
        asked = (self.settings.unit, self.settings.labels) if self.settings else ()
        return self.data_fingerprint, self.task, self.instances, self.classes, *asked

    @property
    def run(self) -> tuple[Any, ...]:
        """The values that the seeds of one result share; with the seed, those that a repeated run shares."""
        trained = (self.backbone, self.weights_sha256, self.feature_key, self.head, self.regime, self.augmentation)
        return *trained, self.fraction, self.recipe_key, self.split, self.absent_classes, *self.test_set

    @cached_property
    def choice(self) -> SplitChoice:
        """The split, with the fold that it is of."""
        return replace(SplitChoice.parse(self.split), fold=self.fold or 0)

    @property
    def shared_order(self) -> bool:
        """Whether the seeds of its training saw the images in one order."""
        return self.spread == SHARED_ORDER

    @property
    def chosen_with(self) -> str:
        """The validation score that its trial was chosen by."""
        return self.chosen_by or self.scores.chosen_before

    @property
    def is_solved(self) -> bool:
        """Whether its head was solved, and not trained."""
        return self.kind.is_solved(self.regime)

    @property
    def iterations(self) -> int | None:
        """The iterations of its training; None for a head that is solved."""
        return None if self.is_solved else self.recipe.iterations

    @property
    def validation(self) -> float | None:
        """The main score on validation; None where there is none."""
        return self.val.get(self.scores.main.name)


@dataclass(frozen=True)
class LadderRow:
    """A rung of a ladder: a training scored on validation alone. score: mean over the seeds; None: it diverged."""

    ladder: str
    comparison: str
    iterations: int
    score: Value
    seed_scores: tuple[Value, ...] = ()
    backbone: str | None = None
    verified: bool = True


def _faults_of_head(task: str, head: str) -> list[Fault]:
    """The faults of the name of a head: it is not known here, or the package that names it is broken."""
    if head not in (kinds := kinds_of(task)):
        return [wrong(("head",), f"one of {', '.join(kinds)}; or one of your own, registered or installed", head)]
    try:
        kind_of(task, head)
    except ProbeError as error:
        return [Fault(("head",), " ".join(str(error).split()))]
    return []


def result_faults(row: Mapping[str, Any], *, load: bool = True) -> list[Fault]:
    """The faults that make a result row unreadable: fields of wrong types, out of their limits, or missing.

    load: whether its head must be known, and is loaded where another package names it. Fields that are not known here
    are ignored. A task of a newer featprobe has scores that are not known either.
    """
    own_recipe = isinstance(row.get("recipe"), Mapping)  # it is checked as what it is, below
    faults = check(ResultRow, {**row, "recipe": {}} if own_recipe else row, closed=False, empty_texts=True)
    if row.get("task") in TASKS and isinstance(row.get("test"), Mapping):
        faults += [fault.below("test") for fault in _test_faults(SCORES[row["task"]], row["test"])]
    if faults:
        return faults
    if load and row["task"] in TASKS:
        faults += _faults_of_head(row["task"], row["head"])
    of_images = row["task"] in TASKS and SCORES[row["task"]].on == "images"  # they may have one label, or not
    if len(set(row["classes"])) < max(1 if of_images else 2, len(row["classes"])):
        wanted = "labels, each once" if of_images else "the background and others, each once"
        faults.append(wrong(("classes",), wanted, row["classes"]))
    if not 0 < row["fraction"] <= 1:
        faults.append(wrong(("fraction",), "0 < fraction <= 1", row["fraction"]))
    settings = row.get("settings")
    if settings and not 0 <= settings["false_calls"] < 1:
        faults.append(wrong(("settings", "false_calls"), "0 <= false_calls < 1", settings["false_calls"]))
    if settings and not 0 < (settings.get("coreset") or 1) <= 1:
        faults.append(wrong(("settings", "coreset"), "0 < coreset <= 1", settings["coreset"]))
    if row.get("unreadable", 0) < 0:
        faults.append(wrong(("unreadable",), "0 or more", row["unreadable"]))
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


def _test_faults(scores: TaskScores, test: Mapping[str, Any]) -> list[Fault]:
    """The faults that make the scores of a task unreadable; scores that came later may be missing."""
    faults = check(TESTS[scores.on], test, closed=False, empty_texts=True)
    for score in scores.every if not faults else ():
        if score.is_stated(test):
            faults += misfits(at(test, score.place), Value, score.place)
    return faults


def ladder_faults(row: Mapping[str, Any]) -> list[Fault]:
    """The same of a rung of a ladder."""
    return check(LadderRow, row, closed=False, empty_texts=True)


def folder_of(line: bytes) -> Any:
    """The folder that a line of results.jsonl names; None where it is no row."""
    try:
        row = parse_json(line)
    except ValueError:
        return None
    return row.get("folder") if isinstance(row, dict) else None


def row_of(line: bytes) -> ResultRow | None:
    """The row of a line of results.jsonl; None where it holds none that can be read.

    Its head may be of a package that is broken or absent: nothing of other packages is imported.
    """
    try:
        row = parse_json(line)
        known = isinstance(row, dict) and row.get("version") == ROW_VERSION
        return ResultRow.from_json(row, load=False) if known else None
    except (ValueError, FeatprobeError):
        return None
