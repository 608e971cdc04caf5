"""The kinds of heads, and how each is trained where the user says nothing.

A new kind is a row of the table here and a builder in `featprobe.probes.heads`; options, help and tests follow it. A
kind of your own is registered, or named by a package with an entry point. Tasks may have kinds of one name: a kind is
known by its task and its name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from keyword import iskeyword
from types import MappingProxyType
from typing import Any, Final, Literal

from featprobe.errors import ProbeError, nearest
from featprobe.io.fields import made
from featprobe.io.plugins import HEADS as PLUGINS
from featprobe.io.plugins import clash, loaded, names_in, points_of, refusal
from featprobe.scores import SCORES

PAGE = "docs/add-a-head.md has the contract."
Build = Callable[..., Any]
"""What builds a head: of the levels that it may take and a `probes.heads.HeadRecipe`."""
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
_OURS: Mapping[tuple[str, str], HeadKind] = {
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
_kinds = dict(_OURS)
_builders: dict[tuple[str, str], Build] = {}

KINDS: Mapping[tuple[str, str], HeadKind] = MappingProxyType(_kinds)
"""Kinds of heads by task and name, as far as they are loaded: featprobe's, and those of your own that are registered.

The first kind of a task is its default. Kinds that other packages name join when they are first asked for, see
`kind_of`: their names are known before, see `kinds_of`.
"""
TASKS: tuple[str, ...] = tuple(dict.fromkeys(task for task, _ in _OURS))
"""The first is the default."""
SOLVED: tuple[str, ...] = tuple(kind.name for kind in _OURS.values() if kind.task == TASKS[0] and kind.solved)
"""Kinds of the first task with a closed form."""


def kinds_of(task: str) -> list[str]:
    """The names of the kinds of heads for a task, the default first; those of other packages are not loaded for it.

    Raises ProbeError for a task that does not exist.

    >>> kinds_of("detect")
    ['fcos', 'fasterrcnn']
    """
    if task not in TASKS:
        raise ProbeError(f"There is no task {task!r}. {nearest(task, TASKS)}")
    return list(dict.fromkeys(name for own, name in names_of_kinds() if own == task))


def names_of_kinds() -> tuple[tuple[str, str], ...]:
    """Task and name of every kind of head, those of other packages too, which are not loaded for it.

    An entry point whose name can't be that of a head names none.
    """
    added = (tuple(point.partition("-")[::2]) for point in names_in(PLUGINS))
    return tuple(dict.fromkeys([*_kinds, *((task, name) for task, name in added if task in TASKS and _is_name(name))]))


def _is_name(name: object) -> bool:
    """Whether a head can be called so: a study has a section [train.NAME], and `all` there means every head."""
    is_text = isinstance(name, str) and name.isidentifier() and name.islower()
    return is_text and not iskeyword(str(name)) and name != "all"


def head_names() -> tuple[str, ...]:
    """Names of kinds of heads, each once."""
    return tuple(dict.fromkeys(name for _, name in names_of_kinds()))


def loaded_kinds(task: str) -> list[HeadKind]:
    """The kinds of heads for a task that are loaded."""
    return [kind for (own, _), kind in _kinds.items() if own == task]


def kind_of(task: str, name: str) -> HeadKind:
    """The kind of head of this name for a task; that of another package is loaded.

    Raises ProbeError for a task or a kind that does not exist, or that can't be loaded.
    """
    if (task, name) not in _kinds:
        kinds = kinds_of(task)
        if name not in kinds:
            raise ProbeError(f"There is no {task} head {name!r}. {nearest(name, kinds)}")
        _load(task, name)
    return _kinds[task, name]


def builder_of(task: str, name: str) -> Build | None:
    """What builds a head of your own; None for featprobe's."""
    return _builders.get((task, name))


# ---- heads of your own -----------------------------------------------------------------------------------------------


def register_head(kind: HeadKind, build: Build) -> None:
    """Let a head of your own be known by its name, in this process.

    kind: a row as those of KINDS: what the head is for, and how it is trained. build: makes a new head from the levels
    that it may take (a sequence of FeatureLevel, finest first) and a HeadRecipe; see `probes.head` for what a head must
    define, and `check_head`. The same head may be registered again, as when a cell of a notebook is run again. Raises
    ProbeError with all that is wrong.
    """
    faults = _faults_of(kind, build)
    if faults:
        raise ProbeError("\n  ".join(["This head can't be registered. Nothing was changed.", *faults]) + f"\n{PAGE}")
    _kinds[kind.task, kind.name], _builders[kind.task, kind.name] = kind, build


def how_known(task: str, name: str) -> str:
    """What makes a head of your own known, for messages on one that is not."""
    return (
        f"A head of your own is known once register_head(HeadKind({task!r}, {name!r}, …), build) was called in the "
        f"same process, or where a package with the entry point {task}-{name} of the group {PLUGINS} is installed."
    )


def _faults_of(kind: object, build: object, *, installed: bool = False) -> list[str]:
    """The faults of a kind that is to be registered. installed: by an entry point, which has its name."""
    faults = [] if callable(build) else [f"build: wanted a function of levels and a HeadRecipe, found {build!r}"]
    if not isinstance(kind, HeadKind):
        return [f"kind: wanted a HeadKind, found {kind!r}", *faults]
    faults += [] if kind.task in TASKS else [f"task: there is none called {kind.task!r}. {nearest(kind.task, TASKS)}"]
    name = kind.name
    if not _is_name(name):
        faults.append(f"name: wanted a lower-case identifier, as studies have a section [train.NAME]; found {name!r}")
    elif (kind.task, name) in _OURS:
        faults.append(f"name: featprobe has a {kind.task} head {name}")
    elif points_of(PLUGINS, f"{kind.task}-{name}") and not installed:
        faults.append(f"name: an installed package has a {kind.task} head {name}")
    elif (other := _builders.get((kind.task, name))) and _place(other) != _place(build):
        faults.append(f"name: {_place(other)} was registered as the {kind.task} head {name}")
    return faults + (_senseless(kind) if kind.task in TASKS else [])


def _place(build: object) -> str:
    return f"{getattr(build, '__module__', '?')}.{getattr(build, '__qualname__', type(build).__name__)}"


def _senseless(kind: HeadKind) -> list[str]:
    """What a kind says of itself that heads of its task can't be."""
    on = SCORES[kind.task].on
    fitted = on == "anomalies"
    checks = {
        "recipe: wanted a TrainRecipe": isinstance(kind.recipe, TrainRecipe),
        "width: wanted 0 or more channels": type(kind.width) is int and kind.width >= 0,
        "pyramid: a head on a pyramid needs the width of it": not kind.pyramid or bool(kind.width),
        f"solved: heads of {kind.task} are trained": not kind.solved or on in ("images", "anomalies"),
        f"solved, live: heads of {kind.task} are fitted to good images, never trained": not fitted
        or (kind.solved and not kind.live),
        "live: what is not solved is trained": kind.live or kind.solved,
        "drawn: it is said of what is solved": not kind.drawn or kind.solved,
        f"pooled: heads of {kind.task} read pooled features": kind.pooled or on != "images",
        f"pooled: heads of {kind.task} read maps": not kind.pooled or on in ("images", "anomalies"),
    }
    return [said for said, holds in checks.items() if not holds]


def _load(task: str, name: str) -> None:
    """Register the head that another package names; raises ProbeError where that can't be."""
    points, wanted = (
        points_of(PLUGINS, f"{task}-{name}"),
        "(HeadKind, build), or an object that has both by these names",
    )
    if len(points) > 1:
        raise ProbeError(clash(points, "head"))
    value = loaded(points[0], "head", wanted, ProbeError)
    pair = value if isinstance(value, tuple) else (getattr(value, "kind", None), getattr(value, "build", None))
    faults = _faults_of(*pair, installed=True) if len(pair) == 2 else [f"{len(pair)} values"]
    kind, build = pair if not faults else (None, None)
    if kind and (kind.task, kind.name) != (task, name):
        faults = [f"a {kind.task} head {kind.name}, under the name of a {task} head {name}"]
    if kind is None or build is None or faults:
        raise ProbeError(refusal(points[0], "head", "is no head", wanted, "; ".join(faults)))
    _kinds[task, name], _builders[task, name] = kind, build
