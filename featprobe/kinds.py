"""The kinds of heads, and how each is trained where the user says nothing.

A new kind is a row of KINDS here and a builder in `featprobe.probes.heads`; options, help and tests follow the table.
Tasks may have kinds of one name: a kind is known by its task and its name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

from featprobe.errors import ProbeError, nearest
from featprobe.io.fields import made

PyramidKind = Literal["auto", "levels", "simple"]
LOSSES = ("ce", "dice", "focal")
MOST_STEPS, MOST_EVALUATIONS = 10**9, 10**4  # of a recipe
FROZEN: Final = "frozen"  # the regime of stored features
FALSE_CALLS = 0.05  # share of good units that a threshold lets be called, where the user says nothing
CORESET = 0.01  # share of patches that a memory of patches keeps, where the user says nothing
SEEDS = 3  # of every trained head, and of a solved one on a part of the training split, where the user says nothing


def parse_loss(text: str) -> tuple[str, ...]:
    """The terms of a loss written as a sum; raises ProbeError for one that does not exist.

    >>> parse_loss("ce+dice")
    ('ce', 'dice')
    """
    terms = tuple(part.strip() for part in text.split("+"))
    for term in terms:
        if term not in LOSSES:
            raise ProbeError(f"There is no loss {term!r}. {nearest(term, LOSSES)} Sums are written as ce+dice.")
    return terms


@dataclass(frozen=True)
class TrainRecipe:
    """How a head is trained; equal for every backbone that is compared.

    batch_size: images per step, over all processes. warmup: share of the iterations over which the learning rate
    rises from 0. loss, loss_at, class_weights: of dense heads. clip: largest L2 norm of a head's gradient, 0 for no
    limit. evaluations: how many points the validation curve has, see `probes.train.evaluation_points`. weights_from:
    the point of that curve whose weights are kept, the best or the last. Raises ProbeError for values out of range.
    """

    iterations: int = 1000
    batch_size: int = 16
    lr: float = 5e-3
    weight_decay: float = 1e-3
    warmup: float = 0.05
    loss: str = "ce"
    loss_at: Literal["level", "image"] = "level"
    class_weights: Literal["none", "inverse-sqrt"] = "inverse-sqrt"
    clip: float = 0.0
    evaluations: int = 8
    weights_from: Literal["best", "end"] = "best"

    def __post_init__(self) -> None:
        limits = {
            "iterations": 1 <= self.iterations <= MOST_STEPS,
            "batch_size": 1 <= self.batch_size <= MOST_STEPS,
            "warmup": 0 <= self.warmup < float("inf"),
            "lr": 0 < self.lr < float("inf"),
            "weight_decay": 0 <= self.weight_decay < float("inf"),
            "clip": 0 <= self.clip < float("inf"),
            "evaluations": 1 <= self.evaluations <= MOST_EVALUATIONS,
            "weights_from": self.weights_from in ("best", "end"),
        }
        wrong = [f"{name} = {getattr(self, name)}" for name, holds in limits.items() if not holds]
        if wrong:
            raise ProbeError(
                f"This can't be trained: {', '.join(wrong)}.\n"
                "wanted: at least one iteration, image and evaluation, positive rates, weights_from best or end."
            )
        parse_loss(self.loss)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as cards keep them. Weights of the end are not named, as in rows from before any choice."""
        values = asdict(self)
        return values if self.weights_from == "best" else {k: v for k, v in values.items() if k != "weights_from"}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TrainRecipe":
        """The recipe that a row or a card keeps; raises FieldError, or ProbeError for what can't be trained."""
        return made(cls, {"weights_from": "end", **values}, "A training recipe")


def grid_of(recipe: TrainRecipe, rates: Sequence[float], decays: Sequence[float]) -> list[TrainRecipe]:
    """The recipe with every combination of the given learning rates and weight decays; its own value if none is
    given."""
    return [
        replace(recipe, lr=lr, weight_decay=wd) for lr in rates or [recipe.lr] for wd in decays or [recipe.weight_decay]
    ]


NOT_TRAINED: Mapping[str, Any] = {"iterations": 1, "evaluations": 1, "weights_from": "end"}
"""The part of a recipe that is the same for all heads that are solved."""
SOLVED_ONCE = TrainRecipe(**NOT_TRAINED)


@dataclass(frozen=True)
class HeadKind:
    """A kind of head.

    task: what it is for. recipe: how it is trained where the user says nothing. width: channels of its pyramid or
    hidden layer where the user says nothing, 0 for a head that has neither. pyramid: it stands on a feature pyramid,
    whose form can be chosen. solved: on stored features it is solved and not trained: it has no iterations and no rates
    to try, and one seed says it all where nothing is drawn. live: it can be trained with a live backbone. drawn: what
    is solved depends on the seed. pooled: it reads one vector per image, and no maps.
    """

    task: str
    name: str
    recipe: TrainRecipe
    width: int = 0
    pyramid: bool = False
    solved: bool = False
    live: bool = True
    drawn: bool = False
    pooled: bool = False

    def is_solved(self, regime: str) -> bool:
        """Whether it is solved in this regime, and not trained."""
        return self.solved and (regime == FROZEN or not self.live)

    def recipe_in(self, regime: str) -> TrainRecipe:
        """How it is trained in this regime; of what is solved, a recipe that stands for none."""
        return replace(self.recipe, **NOT_TRAINED) if self.is_solved(regime) else self.recipe


OBJECTS = TrainRecipe(iterations=300, batch_size=4, lr=1e-3, clip=10.0, evaluations=4)
"""How heads that find objects are trained."""
KINDS: Mapping[tuple[str, str], HeadKind] = {
    (kind.task, kind.name): kind
    for kind in (
        HeadKind("semseg", "linear", TrainRecipe(loss_at="image")),
        HeadKind("semseg", "upsample", TrainRecipe(iterations=300, batch_size=8, lr=1e-3), 128, pyramid=True),
        HeadKind("semseg", "ridge", SOLVED_ONCE, solved=True, live=False),
        HeadKind("detect", "fcos", replace(OBJECTS, iterations=400, batch_size=8, lr=2e-3), 64, pyramid=True),
        HeadKind("detect", "fasterrcnn", OBJECTS, 64, pyramid=True),
        HeadKind("instseg", "maskrcnn", OBJECTS, 64, pyramid=True),
        HeadKind("classify", "linear", TrainRecipe(iterations=300, lr=1e-3), solved=True, pooled=True),
        HeadKind("classify", "knn", SOLVED_ONCE, solved=True, live=False, pooled=True),
        HeadKind("anomaly", "patchcore", SOLVED_ONCE, solved=True, live=False, drawn=True),
        HeadKind("anomaly", "gaussian", SOLVED_ONCE, solved=True, live=False),
        HeadKind("anomaly", "knn", SOLVED_ONCE, solved=True, live=False, pooled=True),
    )
}
"""Kinds of heads by task and name; the first kind of a task is its default."""
TASKS: tuple[str, ...] = tuple(dict.fromkeys(task for task, _ in KINDS))
"""The first is the default."""
HEADS: tuple[str, ...] = tuple(dict.fromkeys(name for _, name in KINDS))
"""Names of kinds, each once."""
SOLVED: tuple[str, ...] = tuple(kind.name for kind in KINDS.values() if kind.task == TASKS[0] and kind.solved)
"""Kinds of the first task with a closed form."""


def kinds_of(task: str) -> list[str]:
    """The kinds of heads for a task, the default first; raises ProbeError for a task that does not exist.

    >>> kinds_of("detect")
    ['fcos', 'fasterrcnn']
    """
    kinds = [name for own, name in KINDS if own == task]
    if not kinds:
        raise ProbeError(f"There is no task {task!r}. {nearest(task, TASKS)}")
    return kinds


def kind_of(task: str, name: str) -> HeadKind:
    """The kind of head of this name for a task; raises ProbeError for a task or a kind that does not exist."""
    kinds = kinds_of(task)
    if name not in kinds:
        raise ProbeError(f"There is no {task} head {name!r}. {nearest(name, kinds)}")
    return KINDS[task, name]
