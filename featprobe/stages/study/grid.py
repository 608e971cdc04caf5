"""The trainings of a study, done one after another: what is missing is extracted, then trained."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from featprobe.cache import Cache, open_cache
from featprobe.errors import CacheError, CacheIncompleteError, FeatprobeError, counted
from featprobe.machine import minutes_text
from featprobe.processes import check_together
from featprobe.specs import Precision
from featprobe.splitting import SplitChoice
from featprobe.stages.extraction.extract import extract
from featprobe.stages.partition import Partition
from featprobe.stages.study.study import Cell, Place, Study, by_cache, cells_of, climbing, left_out
from featprobe.stages.training.agenda import Agenda
from featprobe.stages.training.forecast import Forecast
from featprobe.stages.training.ladder import Ladder, climb_all
from featprobe.stages.training.logs import check_logs
from featprobe.stages.training.probe import show
from featprobe.stages.training.run import Say, foreseen, forget, run
from featprobe.stages.training.training import Training
from featprobe.stages.workspace import Workspace, backbone_of


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
        counts = {"now": len(self.rows), "before": self.done, "missing": len(self.missing), "failed": len(self.failed)}
        states = ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "none done"
        return f"StudyReport({counted(len(self.cells), 'training')}: {states})"

    def __add__(self, other: "StudyReport") -> "StudyReport":
        return StudyReport(*(getattr(self, entry.name) + getattr(other, entry.name) for entry in fields(self)))


@dataclass(frozen=True)
class Due:
    """A training of a study that is to be done. forecast: None of one that is solved, which nothing foretells."""

    cell: Cell
    training: Training
    forecast: Forecast | None


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
    absent = [] if dry_run else [place for place in groups if _find(workspace, place, []) is None]
    first = f", of which {len(absent)} are made first: then the time is known" if absent else ""
    say(f"{counted(len(cells), 'training')} on {counted(len(groups), 'cache')}{first}")
    for reason in left_out(study, workspace):
        say(f"left out: {reason}")
    report, caches = StudyReport(tuple(cells)), dict[Place, Cache]()
    for place, own in groups.items():
        notes: list[str] = []
        try:
            if dry_run:
                cache = _find(workspace, place, notes)
            else:
                if place in absent:
                    say(f"[{absent.index(place) + 1}/{len(absent)}] extracting: {place}")
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
    every = list[Due]()
    for place, cache in caches.items():
        found, due = plan_cells(workspace, study, cache, groups[place], say, dry_run=dry_run, verify=verify)
        report, every = report + found, every + due
    report += _planned(every, say) if dry_run else run_due(study, every, say, verify=verify)
    if report.done:
        say(f"{counted(report.done, 'training is', 'trainings are')} there already")
    return replace(report, notes=tuple(dict.fromkeys(report.notes)))


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


def ladder_of(workspace: Workspace, study: Study, cache: Cache, cell: Cell) -> Ladder | None:
    """What finds the iterations of a training; None where the study says them."""
    options = study.options(cell.task, cell.head, cell.regime)
    if not options.climbs(cell.fraction):
        return None
    return Ladder(workspace, Partition(cache, cell.split), cell.task, options, cell.fraction)


def _planned(due: Sequence[Due], say: Say) -> StudyReport:
    """The plan of trainings, said; a head that is solved takes next to no time."""
    for one in due:
        seconds = one.forecast.seconds(one.training.recipe) if one.forecast else 0.0
        say(f"to train: {one.cell}, {minutes_text(seconds)}")
    notes = tuple(note for one in due for note in one.training.notes)
    return StudyReport(missing=tuple(one.cell for one in due), notes=notes)


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
    report, due = plan_cells(workspace, study, cache, cells, say, dry_run=dry_run, verify=verify)
    return report + (_planned(due, say) if dry_run else run_due(study, due, say, verify=verify))


def plan_cells(
    workspace: Workspace,
    study: Study,
    cache: Cache,
    cells: Sequence[Cell],
    say: Say,
    *,
    dry_run: bool = False,
    verify: bool = False,
) -> tuple[StudyReport, list[Due]]:
    """What is there, and what is missing, of the trainings on one cache, with the time that it will take."""
    report, due = StudyReport(), list[Due]()
    forecasts: dict[Cell, Forecast | None] = {}  # of trainings that differ in nothing but the seed
    ladders: dict[Cell, Ladder | None] = {}  # of the same
    partitions: dict[SplitChoice, Partition] = {}
    for cell in cells:
        if cell.task not in cache.data.serves:
            report += StudyReport(notes=(f"{cell.place.data} holds no labels for {cell.task}",))
            continue
        try:
            alike = replace(cell, seed=0)
            if alike not in ladders:
                ladders[alike] = ladder_of(workspace, study, cache, cell)
            ladder = ladders[alike]
            if dry_run and ladder and not ladder.is_climbed():
                report += StudyReport(missing=(cell,))
                say(f"to train: {cell}, once its iterations are found")
                continue
            options = ladder.found() if ladder else study.options(cell.task, cell.head, cell.regime)
            partition = partitions.setdefault(cell.split, Partition(cache, cell.split))
            training = Training(workspace, partition, cell.task, options, (cell.seed,), cell.fraction)
            if there := _done(training, verify):
                report += StudyReport(done=1, folders=tuple(there.folders), notes=tuple(training.notes))
                if not dry_run:
                    forget(training)
                continue
            if alike not in forecasts:
                forecasts[alike] = None if training.is_solved else foreseen(training)
            due.append(Due(cell, training, forecasts[alike]))
        except FeatprobeError as error:
            report += _failed(cell, error, say)
    return report, due


def run_due(study: Study, due: Sequence[Due], say: Say, *, verify: bool = False) -> StudyReport:
    """Do trainings, one after another: what is gone and left of the time is said before each."""
    of = [replace(one.cell, seed=0) for one in due]
    foretold: dict[Hashable, float] = {
        key: one.forecast.seconds(one.training.recipe) for key, one in zip(of, due, strict=True) if one.forecast
    }
    agenda, report = Agenda(of, foretold, say), StudyReport()
    if len(due) > 1:
        agenda.announce()
    for one in due:
        agenda.begin(str(one.cell))
        try:
            if not verify and (there := _done(one.training, verify)):  # another process was faster
                report += StudyReport(done=1, folders=tuple(there.folders))
                continue
            finished = run(one.training, say, one.forecast)
            notes = list(finished.notes)
            if study.show and one.cell.seed == 0:
                show(finished, study.show, [], notes)
            report += StudyReport((), tuple(finished.rows), notes=tuple(notes), folders=tuple(one.training.folders))
            del finished  # the next training needs its memory
            agenda.end()
        except FeatprobeError as error:
            report += _failed(one.cell, error, say)
    return report


def _failed(cell: Cell, error: FeatprobeError, say: Say) -> StudyReport:
    say(f"failed: {cell}: {str(error).splitlines()[0]}")
    return StudyReport(failed=((cell, str(error)),))


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
