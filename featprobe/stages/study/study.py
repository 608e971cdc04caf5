"""A study: a grid of data sets, backbones, their features, tasks, heads, regimes, seeds and fractions from one file."""

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from featprobe.errors import DataError
from featprobe.geometry import parse_size
from featprobe.image_labels import ImageLabels, Unit
from featprobe.io.disk import read_toml
from featprobe.io.fields import Fault, message, wrong
from featprobe.io.fields import Place as KeyPath
from featprobe.kinds import CORESET, FALSE_CALLS, FROZEN, KINDS, TASKS, HeadKind, TrainRecipe, kind_of, kinds_of
from featprobe.splitting import SplitChoice
from featprobe.stages.extraction.extract_options import ExtractOptions, configured
from featprobe.stages.partition import single_splits
from featprobe.stages.study.study_file import AUTO, faults_of
from featprobe.stages.training.asked import checked, refusal
from featprobe.stages.training.probe_options import SETTINGS, ProbeOptions, Tuning, settings_of
from featprobe.stages.workspace import Workspace, backbone_of
from featprobe.tiling import parse_views


@dataclass(frozen=True)
class Study:
    """The contents of a study file; each list is one side of the grid.

    heads: of any task; empty for each task's default. sizes, tiles, views: () for what featprobe.toml says of each data
    set; a tile of 0 is whole images, views "none" are none. labels, unit, false_calls, coreset, remove_position: as
    ProbeOptions has them, for the tasks and kinds that look at them. overlap, empty_tiles: of tiles, as ExtractOptions
    has them.
    train: fields of TrainRecipe by kind of head, "all" for every kind; iterations may be "auto", for a ladder. tuning:
    fields of Tuning. show: test images on the picture sheet of each first seed, 0 for no sheets. log: as ProbeOptions
    has it. no_verify: do not hash the features that are read.
    """

    data: tuple[str, ...]
    backbones: tuple[str, ...]
    tasks: tuple[str, ...] = TASKS[:1]
    heads: tuple[str, ...] = ()
    regimes: tuple[str, ...] = ("frozen", "full")
    seeds: int = 3
    fractions: tuple[float, ...] = (1.0,)
    sizes: tuple[str, ...] = ()
    tiles: tuple[int, ...] = ()
    overlap: int | None = None
    empty_tiles: float | None = None
    views: tuple[str, ...] = ()
    split: str = "own"
    labels: ImageLabels = "own"
    unit: Unit = "image"
    false_calls: float = FALSE_CALLS
    coreset: float = CORESET
    remove_position: bool = False
    lr: tuple[float, ...] = ()
    weight_decay: tuple[float, ...] = ()
    train: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tuning: Mapping[str, Any] = field(default_factory=dict)
    show: int = 4
    log: tuple[str, ...] = ()
    no_verify: bool = False

    @property
    def choice(self) -> SplitChoice:
        """The parsed `split`; raises DataError for a text that is not a split."""
        return SplitChoice.parse(self.split)

    def kinds(self, task: str) -> list[str]:
        """The heads of a task."""
        return [kind for kind in self.heads if kind in kinds_of(task)] or kinds_of(task)[:1]

    def said(self, kind: str) -> dict[str, Any]:
        """Settings of the study for the training of a kind of head."""
        return {**self.train.get("all", {}), **self.train.get(kind, {})}

    def recipe(self, kind: HeadKind) -> TrainRecipe:
        """How a kind of head is trained; with its usual iterations where a ladder is to find them."""
        said = self.said(kind.name)
        found = {"iterations"} if said.get("iterations") == AUTO else set()
        return replace(kind.recipe, **{name: v for name, v in said.items() if name not in found})

    def budget(self, kind: HeadKind) -> Literal["auto", "fixed"] | None:
        """Whether the study gives the iterations of a kind of head that is trained, or a ladder has to find them."""
        said = self.said(kind.name).get("iterations")
        return None if said is None else "auto" if said == AUTO else "fixed"

    def options(self, task: str, kind: str, regime: str) -> ProbeOptions:
        """How a head is probed in a regime; raises ProbeError for what can't be."""
        tuning = None if regime == "frozen" else Tuning(**{**self.tuning, "regime": regime})
        own = kind_of(task, kind)
        solved = own.is_solved(regime)
        recipe = own.recipe if solved else self.recipe(own)
        return checked(
            task,
            ProbeOptions(
                head=kind, recipe=recipe, lr=() if solved else self.lr,
                weight_decay=() if solved else self.weight_decay, budget=None if solved else self.budget(own),
                seeds=self.seeds, split=self.split, tuning=tuning, quiet=True, log=() if solved else self.log,
                verify=not self.no_verify, **{name: getattr(self, name) for name in settings_of(own)},
            ),
        )  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A cache that a study needs. options: from the study, and from featprobe.toml where the study says nothing."""

    data: str
    backbone: str
    options: ExtractOptions

    def __str__(self) -> str:
        options, text = self.options, f"{self.backbone} on {self.data}"
        text += f" at {options.size[0]}x{options.size[1]}" if options.size else ""
        text += f" in {options.tiling}" if options.tiling else ""
        return text + (f" with {', '.join(options.views)}" if options.views else "")


@dataclass(frozen=True)
class Cell:
    """One training of a study."""

    place: Place
    task: str
    head: str
    regime: str
    fraction: float
    seed: int
    split: SplitChoice

    def __str__(self) -> str:
        part = "" if self.fraction == 1 else f", {self.fraction:g} of train"
        part += f", fold {self.split.fold} of {self.split.folds}" if self.split.fold else ""
        return f"{self.place}: {self.task} {self.head}, {self.regime}{part}, seed {self.seed}"


def read_study(path: Path, workspace: Workspace) -> Study:
    """A study file, checked; raises DataError that lists everything in it that does not exist or makes no sense."""
    try:
        values = read_toml(path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} can't be read as a study: {error}.\n"
            "  wanted  a TOML file, as this prints:  featprobe study --template"
        ) from error
    faults = faults_of(Study, values)
    bad = {fault.place for fault in faults}
    sound = {} if () in bad else _sound(values, bad)
    sides: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in sound.items()}
    faults += _missing_names(sides, workspace) + _senseless(sides, {place[:1] for place in bad})
    wrong_keys = {str(step) for fault in faults for step in fault.place[:1]}
    good = {name: value for name, value in sides.items() if name not in wrong_keys}
    study = Study(**{"data": (), "backbones": (), **good})
    if () not in bad:
        faults += _untrainable(study, workspace, wrong_keys)
    if faults:
        to_do = "Correct it, then run the same command again. All keys and what they mean:  featprobe study --template"
        raise DataError(message(f"{path} can't be run. Nothing was computed.", faults, to_do))
    return study


def _sound(value: Any, bad: Collection[KeyPath], place: KeyPath = ()) -> Any:
    """A value of TOML without what stands at the bad places: a key is omitted, an entry of a list becomes None.

    >>> _sound({"seeds": "x", "lr": [0.1, "y"]}, [("seeds",), ("lr", 1)])
    {'lr': [0.1, None]}
    """
    if isinstance(value, dict):
        kept = {key: inner for key, inner in value.items() if (*place, key) not in bad}
        return {key: _sound(inner, bad, (*place, key)) for key, inner in kept.items()}
    if isinstance(value, list):
        return [None if (*place, i) in bad else _sound(inner, bad, (*place, i)) for i, inner in enumerate(value)]
    return value


def _missing_names(sides: Mapping[str, Any], workspace: Workspace) -> list[Fault]:
    """Names that stand for nothing, in the values of a study that are of the right type."""
    checks: Mapping[str, Callable[[str], object]] = {
        "data": workspace.check_set,
        "backbones": partial(backbone_of, workspace),
        "sizes": parse_size,
        "views": parse_views,
    }
    found = [
        Fault((side, i), said)
        for side, check in checks.items()
        for i, name in enumerate(sides.get(side, ()))
        if name is not None and (said := _refusal(partial(check, name)))
    ]
    said = _refusal(lambda: single_splits(SplitChoice.parse(sides["split"]))) if "split" in sides else ""
    return found + ([Fault(("split",), said)] if said else [])


def _senseless(sides: Mapping[str, Any], bad: Collection[KeyPath]) -> list[Fault]:
    """Heads that no task of a study has, and settings of trainings that can't be, in values of the right type.

    bad: keys with another fault; what depends on such a key is not judged.
    """
    tasks, found = sides.get("tasks", Study.tasks), []
    for i, kind in enumerate(() if ("tasks",) in bad else sides.get("heads", ())):
        if kind is not None and not any(kind in kinds_of(task) for task in tasks):
            known = "; ".join(f"of {task}: {', '.join(kinds_of(task))}" for task in tasks)
            found.append(wrong(("heads", i), f"heads of the tasks of this study, {known}", kind))
    for kind, values in sides.get("train", {}).items():
        usual = next((own.recipe for own in KINDS.values() if own.name == kind), TrainRecipe())
        settings = {name: value for name, value in values.items() if (name, value) != ("iterations", AUTO)}
        found += _wrong_settings(("train", kind), partial(replace, usual), settings)
    if "full" in sides.get("regimes", Study.regimes):
        settings = {name: value for name, value in sides.get("tuning", {}).items() if name != "regime"}
        found += _wrong_settings(("tuning",), Tuning, settings)
    return found


def _wrong_settings(place: KeyPath, make: Callable[..., object], settings: Mapping[str, Any]) -> list[Fault]:
    """Settings that can't be, each by itself; if there are none, those that can't be had together."""
    refusals = {name: _refusal(partial(make, **{name: value})) for name, value in settings.items()}
    found = [Fault((*place, name), said) for name, said in refusals.items() if said]
    together = "" if found else _refusal(partial(make, **settings))
    return [*found, Fault(place, together)] if together else found


def _refusal(check: Callable[[], object]) -> str:
    """The fault that a check finds, in one line; "" if there is none."""
    return refusal(check).partition("\n")[0]


OF_TRAININGS = {
    "tasks", "heads", "regimes", "seeds", "split", "lr", "weight_decay", "train", "tuning", "log", *SETTINGS,
}  # fmt: skip
OF_CACHES = {"data", "sizes", "tiles", "overlap", "empty_tiles", "views"}
"""Keys that say how heads are trained, and how features are made."""


def _untrainable(study: Study, workspace: Workspace, bad: Collection[str]) -> list[Fault]:
    """Faults of keys that are right alone but exclude each other. bad: keys that are wrong alone, and are omitted."""
    found = []
    if OF_TRAININGS.isdisjoint(bad):
        grid = itertools.product(study.tasks, study.regimes)
        cells = [(task, kind, regime) for task, regime in grid for kind in study.kinds(task)]
        found += [_refusal(partial(study.options, *cell)) for cell in cells]
    if OF_CACHES.isdisjoint(bad):
        for place in places_of(replace(study, backbones=("any",)), workspace):
            said = _refusal(place.options.check)
            found.append(f"{place.data}: {said}" if said else "")
    if not bad and not any(found):
        cells_left = cells_of(study, workspace)
        if study.choice.folds and climbing(study, cells_left):
            found = ["a cross-validation finds no number of iterations: add iterations = 400 under train.all"]
        elif not cells_left:
            found = [f"nothing is left to train: {reason}" for reason in left_out(study, workspace)]
    return [Fault((), said) for said in dict.fromkeys(found) if said]


def places_of(study: Study, workspace: Workspace) -> list[Place]:
    """Every cache that a study may need."""
    places = []
    sides = (study.data, study.backbones, study.sizes or (None,), study.tiles or (None,), study.views or (None,))
    for data, backbone, size, tile, views in itertools.product(*sides):
        asked = ExtractOptions(
            size=None if size is None else parse_size(size),
            tile=tile,
            overlap=None if tile == 0 else study.overlap,
            empty_tiles=None if tile == 0 else study.empty_tiles,
            views=None if views is None else parse_views(views),
            quiet=True,
        )
        places.append(Place(data, backbone, configured(asked, workspace.data_options(data))))
    return places


def _why_not(study: Study, place: Place, regime: str) -> str:
    """Why a study trains nothing on a cache in a regime; "" where it does."""
    options = place.options
    if study.split != "own" and options.keeps_own_split:
        return f"stored views and thinned tiles need the data set's own split, not split = {study.split!r}"
    fewest = min((parse_views(views) for views in study.views), key=len, default=options.views or ())
    if regime != "frozen" and study.tuning.get("augment", True) and (options.views or ()) != fewest:
        return f"{regime} augments images itself, whatever views are stored: it is trained once, with the fewest views"
    return ""


def left_out(study: Study, workspace: Workspace) -> list[str]:
    """The parts of the grid that are not trained, and why."""
    pairs = itertools.product(places_of(study, workspace), study.regimes)
    return list(dict.fromkeys(filter(None, (_why_not(study, place, regime) for place, regime in pairs))))


def cells_of(study: Study, workspace: Workspace) -> list[Cell]:
    """Every training of a study but those that are `left_out`; trainings on one cache stand together.

    A solved head is trained in the frozen regime only.
    """
    splits = single_splits(study.choice)
    return [
        Cell(place, task, kind, regime, float(fraction), seed, split)
        for place in places_of(study, workspace)
        for task, regime in itertools.product(study.tasks, study.regimes)
        for kind in study.kinds(task)
        for own in [kind_of(task, kind)]
        if (regime == FROZEN or own.live) and not _why_not(study, place, regime)
        for fraction, seed, split in itertools.product(study.fractions, range(study.seeds), splits)
        if seed == 0 or fraction < 1 or own.drawn or not own.is_solved(regime)
    ]


def by_cache(cells: Iterable[Cell]) -> dict[Place, list[Cell]]:
    """The trainings of each cache."""
    groups: dict[Place, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.place, []).append(cell)
    return groups


def climbing(study: Study, cells: Iterable[Cell]) -> list[Cell]:
    """The trainings of the first seed whose iterations a ladder finds."""
    return [
        cell
        for cell in cells
        if cell.seed == 0 and study.options(cell.task, cell.head, cell.regime).climbs(cell.fraction)
    ]
