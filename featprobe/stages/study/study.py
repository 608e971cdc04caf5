"""A study: a grid of data sets, backbones, their features, tasks, heads, regimes, seeds and fractions from one file."""

import itertools
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from featprobe.backbones.precision import Precision
from featprobe.cache import Cache, open_cache
from featprobe.errors import CacheError, CacheIncompleteError, DataError, FeatprobeError, counted, nearest
from featprobe.geometry import parse_size
from featprobe.image_labels import ImageLabels, Unit
from featprobe.io.disk import read_toml
from featprobe.io.fields import Fault, message, wrong
from featprobe.io.fields import Place as KeyPath
from featprobe.kinds import CORESET, FALSE_CALLS, FROZEN, KINDS, TASKS, HeadKind, TrainRecipe, kind_of, kinds_of
from featprobe.machine import minutes_text
from featprobe.processes import check_together
from featprobe.splitting import SplitChoice
from featprobe.stages.extraction.extract import extract
from featprobe.stages.extraction.extract_options import ExtractOptions, configured
from featprobe.stages.extraction.missing import backbone_of
from featprobe.stages.partition import Partition, single_splits
from featprobe.stages.study.study_file import AUTO, faults_of
from featprobe.stages.training.ladder import Ladder, climb_all
from featprobe.stages.training.logs import check_logs
from featprobe.stages.training.probe import checked, show
from featprobe.stages.training.probe_options import SETTINGS, ProbeOptions, Tuning, settings_of
from featprobe.stages.training.run import Say, foreseen, forget, run
from featprobe.stages.training.training import Training
from featprobe.stages.workspace import Workspace
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


@dataclass(frozen=True)
class StudyReport:
    """What a study did.

    cells: its trainings. rows: of this run. done: how many trainings were there already. failed: (training, reason).
    missing: trainings that a plan found to be missing. ladders: trainings, of the first seed, whose iterations a plan
    found not to be known. folders: of the results that its trainings have, below probes/.
    """

    cells: tuple[Cell, ...] = ()
    rows: tuple[dict[str, Any], ...] = ()
    done: int = 0
    failed: tuple[tuple[Cell, str], ...] = ()
    notes: tuple[str, ...] = ()
    missing: tuple[Cell, ...] = ()
    ladders: tuple[Cell, ...] = ()
    folders: tuple[str, ...] = ()

    def __repr__(self) -> str:
        said = {"now": len(self.rows), "missing": len(self.missing), "failed": len(self.failed)}
        states = ", ".join(f"{count} {state}" for state, count in said.items() if count)
        return f"StudyReport({counted(len(self.cells), 'training')}, {self.done} done before{states and f', {states}'})"

    def __add__(self, other: "StudyReport") -> "StudyReport":
        return StudyReport(*(getattr(self, entry.name) + getattr(other, entry.name) for entry in fields(self)))


def read_study(path: Path, workspace: Workspace) -> Study:
    """A study file, checked; raises DataError that lists everything in it that does not exist or makes no sense."""
    try:
        values = read_toml(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} can't be read as a study: {error}.") from error
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
        "data": partial(_check_set, workspace),
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


def _check_set(workspace: Workspace, name: str) -> None:
    """Raise DataError if no data set has this name; unlike `data_root`, it generates none."""
    if name not in workspace.data_names() and not os.path.exists(name):
        raise DataError(f"there is no data set {name!r}. {nearest(name, workspace.data_names())}")


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
    try:
        check()
    except FeatprobeError as error:
        return str(error).splitlines()[0]
    return ""


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


def run_grid(
    workspace: Workspace,
    study: Study,
    say: Say = lambda line: None,
    *,
    dry_run: bool = False,
    verify: bool = False,
) -> StudyReport:
    """Extract and train what is missing of a study, one training after another.

    A training that fails is reported and the others go on. Run it again to continue after a stop. say: gets the plan
    first, then what is being done. dry_run: make the plan only, with predicted times where a cache exists. verify:
    check all bytes of the saved heads, not only the sizes of their files.
    """
    check_logs(study.log)
    check_together()
    cells = cells_of(study, workspace)
    groups = by_cache(cells)
    say(f"{counted(len(cells), 'training')} on {counted(len(groups), 'cache')}")
    for reason in left_out(study, workspace):
        say(f"left out: {reason}")
    report, caches = StudyReport(tuple(cells)), dict[Place, Cache]()
    for place, own in groups.items():
        notes: list[str] = []
        try:
            if dry_run:
                cache = _find(workspace, place, notes)
            else:
                cache = make_cache(workspace, place)
        except FeatprobeError as error:
            report += StudyReport(failed=tuple((cell, str(error)) for cell in own))
            say(f"failed: {place}: {str(error).splitlines()[0]}")
            continue
        report += StudyReport(notes=tuple(notes))
        if cache is None:
            unknown = climbing(study, own)
            report += StudyReport(missing=tuple(own), ladders=tuple(unknown))
            search = f"{counted(len(unknown), 'search', 'searches')} for iterations and " if unknown else ""
            say(f"to extract: {place}, then {search}{counted(len(own), 'training')}")
            continue
        caches[place] = cache
    for place, cache in caches.items():  # all of them, before the first training: backbones share the largest number
        report += climb_ladders(workspace, study, cache, groups[place], say, dry_run=dry_run)
    for place, cache in caches.items():
        report += run_cells(workspace, study, cache, groups[place], say, dry_run=dry_run, verify=verify)
    if report.done:
        say(f"{counted(report.done, 'training is', 'trainings are')} there already")
    return replace(report, notes=tuple(dict.fromkeys(report.notes)))


def climbing(study: Study, cells: Iterable[Cell]) -> list[Cell]:
    """The trainings of the first seed whose iterations a ladder finds."""
    return [
        cell
        for cell in cells
        if cell.seed == 0 and study.options(cell.task, cell.head, cell.regime).climbs(cell.fraction)
    ]


def ladder_of(workspace: Workspace, study: Study, cache: Cache, cell: Cell) -> Ladder | None:
    """What finds the iterations of a training; None where the study says them."""
    options = study.options(cell.task, cell.head, cell.regime)
    if not options.climbs(cell.fraction):
        return None
    return Ladder(workspace, Partition(cache, cell.split), cell.task, options, cell.fraction)


def climb_ladders(
    workspace: Workspace, study: Study, cache: Cache, cells: Sequence[Cell], say: Say, *, dry_run: bool = False
) -> StudyReport:
    """Find the iterations of the trainings of one cache that are not known; a plan only lists these trainings."""
    unknown = []
    for cell in climbing(study, cells):
        try:
            ladder = ladder_of(workspace, study, cache, cell) if cell.task in cache.data.serves else None
            if ladder is not None and not ladder.is_climbed():
                unknown.append(cell)
                climb_all([ladder], say, dry_run)
        except FeatprobeError as error:  # its trainings fail, and the others go on
            say(f"failed: the iterations of {cell}: {str(error).splitlines()[0]}")
    return StudyReport(ladders=tuple(unknown))


def run_cells(
    workspace: Workspace,
    study: Study,
    cache: Cache,
    cells: Sequence[Cell],
    say: Say,
    *,
    dry_run: bool = False,
    verify: bool = False,
) -> StudyReport:
    """Do the missing trainings on one cache, one after another; see `run_grid`."""
    rows: list[dict[str, Any]] = []
    failed: list[tuple[Cell, str]] = []
    notes: list[str] = []
    missing: list[Cell] = []
    folders: list[str] = []
    seconds: dict[Cell, float] = {}  # of trainings that differ in nothing but the seed
    ladders: dict[Cell, Ladder | None] = {}  # of the same
    done = 0
    for cell in cells:
        if cell.task not in cache.data.serves:
            notes.append(f"{cell.place.data} holds no labels for {cell.task}")
            continue
        try:
            alike = replace(cell, seed=0)
            if alike not in ladders:
                ladders[alike] = ladder_of(workspace, study, cache, cell)
            ladder = ladders[alike]
            if dry_run and ladder and not ladder.is_climbed():
                missing.append(cell)
                say(f"to train: {cell}, once its iterations are found")
                continue
            options = ladder.found() if ladder else study.options(cell.task, cell.head, cell.regime)
            partition = Partition(cache, cell.split)
            training = Training(workspace, partition, cell.task, options, (cell.seed,), cell.fraction)
            own = training.notes
            if there := _done(training, verify):
                done += 1
                folders += there.folders
                if not dry_run:
                    forget(training)
            elif dry_run:
                missing.append(cell)
                if alike not in seconds:
                    seconds[alike] = _seconds(training)
                say(f"to train: {cell}, {minutes_text(seconds[alike])}")
            else:
                say(str(cell))
                finished = run(training)
                rows += finished.rows
                folders += training.folders
                own = finished.notes
                if study.show and cell.seed == 0:
                    show(finished, study.show, [], notes)
                del finished  # the next training needs its memory
            notes += own
        except FeatprobeError as error:
            failed.append((cell, str(error)))
            say(f"failed: {cell}: {str(error).splitlines()[0]}")
    return StudyReport((), tuple(rows), done, tuple(failed), tuple(notes), tuple(missing), folders=tuple(folders))


def _seconds(training: Training) -> float:
    """How long a training will take; a head that is solved takes next to no time."""
    return 0.0 if training.is_solved else foreseen(training).seconds(training.recipe)


def _done(training: Training, verify: bool) -> Training | None:
    """The finished training, or None. If the study names no precision, that of another device counts too."""
    tuning, found = training.tuning, [training]
    if tuning is not None and not tuning.precision:
        own: set[Precision] = {"bf16", "fp32", *([] if training.regime == "full" else [training.features.precision])}
        twins = [replace(tuning, precision=other) for other in sorted(own - {training.precision})]
        found += [replace(training, options=replace(training.options, tuning=twin)) for twin in twins]
    return next((one for one in found if one.is_done(hashes=verify)), None)


def make_cache(workspace: Workspace, place: Place) -> Cache:
    """The complete cache of a study's place, made where it is missing; raises FeatprobeError."""
    return open_cache(extract(workspace, backbone_of(workspace, place.backbone), place.data, place.options).path)


def _find(workspace: Workspace, place: Place, notes: list[str]) -> Cache | None:
    """The finished cache of a place, or None. Caches that can't be read are added to `notes`."""
    label, root = backbone_of(workspace, place.backbone).label, Path(place.data).resolve()
    found = []
    for path in workspace.cache_files():
        try:
            cache = open_cache(path)
            of_data = cache.data.name == place.data or Path(cache.data.root) == root
            if of_data and cache.recipe.label == label and place.options.gives(cache.recipe):
                cache.usable()
                found.append(cache)
        except CacheIncompleteError:
            continue  # it is to be completed
        except CacheError as error:
            notes.append(f"left aside: {' '.join(str(error).splitlines())}")
    return min(found, key=lambda cache: len(cache.contents.command), default=None)  # with the fewest options
