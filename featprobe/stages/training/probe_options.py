"""How heads are trained and scored: what a caller of `probe` and `finetune` says."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

from featprobe.errors import ProbeError
from featprobe.image_labels import ImageLabels, Unit
from featprobe.kinds import CORESET, FALSE_CALLS, FROZEN, SEEDS, HeadKind, PyramidKind, TrainRecipe
from featprobe.machine import usable_cores
from featprobe.scores import SCORES
from featprobe.specs import Precision
from featprobe.splitting import SplitChoice
from featprobe.stages.extraction.extract_options import MOST_WORKERS

if TYPE_CHECKING:
    from featprobe.metrics.semantic import Absent

Regime = Literal["frozen", "frozen-online", "full"]
REGIMES = get_args(Regime)
SETTINGS: Mapping[str, Callable[[HeadKind], bool]] = {
    "unit": lambda kind: SCORES[kind.task].on in ("images", "anomalies"),
    "false_calls": lambda kind: SCORES[kind.task].on in ("images", "anomalies"),
    "labels": lambda kind: SCORES[kind.task].on == "images",
    "coreset": lambda kind: kind.drawn,
    "remove_position": lambda kind: SCORES[kind.task].on == "anomalies" and not kind.pooled,
}
"""Fields of ProbeOptions that only some tasks and kinds look at, and whether a kind does."""
OF_THE_BACKBONE = ("backbone_lr", "layer_decay", "bn", "clip", "accumulate", "ema", "checkpointing", "compile")
OF_THE_MACHINE = ("workers", "checkpointing", "compile")
"""They change time and memory, and results by rounding alone."""


def settings_of(kind: HeadKind) -> tuple[str, ...]:
    """The names of SETTINGS that a kind looks at.

    >>> from featprobe.kinds import kind_of
    >>> settings_of(kind_of("classify", "linear")), settings_of(kind_of("semseg", "linear"))
    (('unit', 'false_calls', 'labels'), ())
    """
    return tuple(name for name, looks_at in SETTINGS.items() if looks_at(kind))


@dataclass(frozen=True)
class Tuning:
    """The treatment of images and a live backbone; see `featprobe finetune --help` for each.

    regime: "full" trains the backbone too; "frozen-online" does not, so that augmentation alone tells it from the
    frozen regime. backbone_lr: the backbone's learning rate, as a multiple of the head's. clip: largest L2 norm of the
    backbone's gradient. accumulate: parts of a batch. precision: None for bf16 on a GPU that has it, else fp32; of a
    frozen backbone, for what its cache was computed in. compile: let torch compile the backbone, which computes the
    same to rounding. init_head: folder of a saved head that training starts from. workers: threads that decode images.
    """

    regime: Literal["full", "frozen-online"] = "full"
    augment: bool = True
    backbone_lr: float = 0.1
    layer_decay: float = 1.0
    bn: Literal["frozen", "train"] = "frozen"
    clip: float = 1.0
    accumulate: int = 1
    ema: float = 0.0
    checkpointing: bool = False
    precision: Precision | None = None
    compile: bool = False
    init_head: str | None = None
    workers: int = field(default_factory=lambda: min(MOST_WORKERS, usable_cores()))

    def __post_init__(self) -> None:
        limits = {
            "backbone_lr": 0 < self.backbone_lr < float("inf"),
            "layer_decay": 0 < self.layer_decay <= 1,
            "clip": 0 <= self.clip < float("inf"),
            "accumulate": self.accumulate >= 1,
            "ema": 0 <= self.ema < 1,
        }
        wrong = [f"{name} = {getattr(self, name)}" for name, holds in limits.items() if not holds]
        if wrong:
            raise ProbeError(f"This can't be trained: {', '.join(wrong)}. See  featprobe finetune --help")
        if self.precision == "amp" and self.regime == "full":
            raise ProbeError(
                "--precision amp is for a frozen backbone: in float16 the gradients of one that is trained vanish.\n"
                "Nothing was trained. Take bf16, or omit --precision."
            )
        plain = {name: entry.default for name, entry in type(self).__dataclass_fields__.items()}
        idle = [name for name in OF_THE_BACKBONE if getattr(self, name) != plain[name]]
        if idle and self.regime == "frozen-online":
            raise ProbeError(f"{', '.join(idle)} would change nothing for a frozen backbone. Omit it.")

    def to_json(self) -> dict[str, Any]:
        """Plain values that decide the result, as rows keep them."""
        return {name: value for name, value in asdict(self).items() if name not in OF_THE_MACHINE}


@dataclass(frozen=True)
class Budget:
    """What a ladder of iterations found for one backbone, see `stages.training.ladder`.

    needed: iterations of the smallest rung that is as good as the best. open: the last rung there is still gained, so
    that more iterations might be better. comparison: the same for the ladders of all backbones that are compared.
    """

    needed: int
    open: bool
    comparison: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values, as rows keep them."""
        return {"rule": "ladder", **asdict(self)}


@dataclass(frozen=True)
class ProbeOptions:
    """How to probe; see `featprobe probe --help` for each.

    head: the name of its kind, None for the task's default. kind: what that name means, filled in by
    `probe.checked`. recipe: None for the kind's default. lr, weight_decay: to try, all combinations; empty for the
    recipe's. chosen_from: learning rates and weight decays that another regime chose the recipe's from; they stand
    for the recipe's own where results are compared. budget: "fixed" for the recipe's iterations, "auto" for those
    that a ladder around them finds, None for a ladder on parts of the training split where the recipe has its
    kind's usual iterations, and fixed otherwise; a Budget once it is found. seeds: None for 3; of the closed form
    1, as all are alike, but on a part of the training split, which follows the seed. split: "own" as the cache
    holds it, "group" for featprobe's own split by group, "stratified" for one that looks at the classes too,
    "image" for one by image, which leaks wherever a group has several images, or a split file's path; "group:5" for
    all five folds of a cross-validation, "group:5/2" for the second. fractions: of the training rows, each trained
    on apart. show: how many test images the picture sheet shows. tuning: None for the frozen regime. log:
    "tensorboard", "wandb" or both; it changes no result. verify: hash each row's features when they are first read,
    see `Cache.check`. labels: what images are classified by, see `image_labels.ImageLabels`. unit: what gets a
    verdict: an image, or each tile. false_calls: the wanted share of good units above the threshold, in [0, 1).
    coreset: the share of patches that a memory of patches keeps. remove_position: subtract the mean map of the good
    training images.
    """

    head: str | None = None
    levels: tuple[str, ...] = ()
    width: int | None = None
    pyramid: PyramidKind = "auto"
    recipe: TrainRecipe | None = None
    lr: tuple[float, ...] = ()
    weight_decay: tuple[float, ...] = ()
    chosen_from: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    budget: Literal["auto", "fixed"] | Budget | None = None
    seeds: int | None = None
    shared_order: bool = False
    fractions: tuple[float, ...] = (1.0,)
    split: str = "own"
    instances: Literal["own", "components"] = "own"
    absent: "Absent" = "ignore"
    device: str | None = None
    show: int = 0
    quiet: bool = False
    tuning: Tuning | None = None
    log: tuple[str, ...] = ()
    verify: bool = True
    labels: ImageLabels = "own"
    unit: Unit = "image"
    false_calls: float = FALSE_CALLS
    coreset: float = CORESET
    remove_position: bool = False
    kind: HeadKind | None = None

    @cached_property
    def choice(self) -> SplitChoice:
        """The parsed `split`; raises DataError for a text that is not a split."""
        return SplitChoice.parse(self.split)

    @property
    def regime(self) -> Regime:
        """The part that is trained, and the input: features or images."""
        return self.tuning.regime if self.tuning else FROZEN

    def seeds_at(self, fraction: float) -> int:
        """How many seeds are trained on a fraction of the training split."""
        once = self.is_solved and self.kind is not None and not self.kind.drawn and fraction == 1
        return self.seeds or (1 if once else SEEDS)

    def passes(self, fraction: float) -> list[tuple[int, ...]]:
        """The seeds that share one pass over the rows, at a fraction of the training split."""
        seeds = tuple(range(self.seeds_at(fraction)))
        return [seeds] if self.shared_order else [(seed,) for seed in seeds]

    @property
    def is_solved(self) -> bool:
        """Whether its head is solved, and not trained. Of options whose kind is filled in, as what follows."""
        return self.kind is not None and self.kind.is_solved(self.regime)

    def climbs(self, fraction: float) -> bool:
        """Whether a ladder is to find the iterations. Of options whose head and recipe are filled in."""
        usual = (
            self.kind is not None
            and self.recipe is not None
            and (self.recipe.iterations == self.kind.recipe.iterations)
        )
        return self.budget == "auto" or (self.budget is None and fraction < 1 and usual and not self.is_solved)
