"""Cache to scored heads: the frozen regime."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featprobe.backbones.given import at_hand
from featprobe.cache import Cache
from featprobe.errors import (
    DataError,
    counted,
)
from featprobe.kinds import TASKS
from featprobe.probes import HeadRecipe, build_head, make_folder
from featprobe.processes import is_main, pick_device, together
from featprobe.result_rows import ResultRow
from featprobe.scores import SCORES
from featprobe.splitting import SplitChoice
from featprobe.stages.extraction.extract_options import ExtractOptions
from featprobe.stages.extraction.missing import make_missing
from featprobe.stages.partition import Partition, single_splits, split_notes
from featprobe.stages.row_images import unreadable_images
from featprobe.stages.training.agenda import on_the_agenda
from featprobe.stages.training.asked import checked, find_caches, labels_for, reads_pooled
from featprobe.stages.training.ladder import Ladder, climb_all, left_behind
from featprobe.stages.training.logs import check_logs
from featprobe.stages.training.probe_options import ProbeOptions
from featprobe.stages.training.read_labels import classes_of
from featprobe.stages.training.run import Finished, Say, draw_sheet, run
from featprobe.stages.training.training import Training
from featprobe.stages.workspace import AnySet, Workspace

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ProbeReport:
    """Result rows, picture sheets, and what a user should know."""

    rows: tuple[dict[str, Any], ...]
    sheets: tuple[Path, ...]
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        rows, sheets, notes = (len(own) for own in (self.rows, self.sheets, self.notes))
        what = ", ".join(
            sorted({f"{row.task} of {row.backbone} on {row.data}" for row in map(ResultRow.from_json, self.rows)})[:3]
        )
        about = f" ({what})" if what else ""
        return f"ProbeReport({counted(rows, 'row')}{about}, {counted(sheets, 'sheet')}, {counted(notes, 'note')})"


def probe(
    workspace: Workspace,
    task: str = TASKS[0],
    data: AnySet | Sequence[AnySet] = (),
    backbones: "Sequence[str | nn.Module] | str | nn.Module" = (),
    options: ProbeOptions | None = None,
    say: Say = lambda line: None,
    *,
    extract: bool = False,
) -> ProbeReport:
    """Train and score heads on every complete cache that can serve a task, or on those asked for.

    data: names, paths or data sets. backbones: names, and modules of your own. say: gets, before each training starts,
    how long it will take. extract: make caches that are missing first, see `missing.make_missing`. Processes that
    torchrun started do this together, and all return the same rows; the main one alone says, writes and draws. Raises
    FeatprobeError when nothing fits, or when a cache that is asked for is not complete.
    """
    options, sets = checked(task, options or ProbeOptions()), workspace.sets_called(data)
    check_logs(options.log)
    with at_hand(backbones) as names, together(pick_device(options.device)):
        say = say if is_main() else lambda line: None
        if extract:
            how = extraction(options)
            needed, pooled = labels_for(task, options), reads_pooled(options)
            sets, names, _ = make_missing(workspace, sets, names, needed, how, say, pooled=pooled)
        return _probe(workspace, task, sets, names, options, say)


def extraction(options: ProbeOptions) -> ExtractOptions:
    """How features are made that a training finds missing: as `extract` makes them, on the same device."""
    return ExtractOptions(device=options.device, quiet=options.quiet or not is_main())


def _probe(
    workspace: Workspace, task: str, data: Sequence[str], backbones: Sequence[str], options: ProbeOptions, say: Say
) -> ProbeReport:
    caches, notes = find_caches(workspace, task, data, backbones, options.instances, pooled=reads_pooled(options))
    splits = single_splits(options.choice)
    caches = splittable(caches, options.choice, notes)
    for cache in caches:  # all of them, before the first is trained on
        for split in splits:
            _ = Partition(cache, split).rows  # refuses one that lacks a side
        classes = classes_of(task, cache, options)
        build_head(HeadRecipe(task, str(options.head), classes, options.levels, options.width, options.pyramid),
                   cache.levels)  # fmt: skip
    every = [(cache, fraction) for cache in caches for fraction in options.fractions]
    ladders = [
        Ladder(workspace, Partition(c, options.choice), task, options, fraction)
        for c, fraction in every
        if options.climbs(fraction)
    ]
    climb_all(ladders, say)
    found = {(ladder.cache.path, ladder.fraction): ladder.found() for ladder in ladders}
    notes += [f"{cache.data.name}: {note}" for cache in caches for note in notes_of(cache, task, options.choice)]
    trainings = [
        Training(workspace, Partition(cache, split), task, own, seeds, fraction)
        for cache, fraction in every
        for own in [found.get((cache.path, fraction), options)]
        for split, seeds in product(splits, own.passes(fraction))
    ]
    make_folder(workspace.probes)
    rows: list[dict[str, Any]] = []
    sheets: list[Path] = []
    shown: set[tuple[Path, float]] = set()
    for training, forecast in on_the_agenda(trainings, say):
        finished = run(training, say, forecast)
        rows += finished.rows
        notes += finished.notes
        place = training.partition.source.path, training.fraction
        if options.show and place not in shown and is_main():
            shown.add(place)
            show(finished, options.show, sheets, notes)
        del finished  # the next training needs its memory
    notes += left_behind(workspace, ladders)
    return ProbeReport(tuple(rows), tuple(sheets), tuple(dict.fromkeys(notes)))


def splittable(caches: Sequence[Cache], choice: SplitChoice, notes: list[str]) -> list[Cache]:
    """The caches less those of views or thinned tiles, where the split needs other rows and another cache serves it."""
    bound = [cache for cache in caches if cache.recipe.keeps_own_split]
    free = {cache.data.fingerprint for cache in caches if cache not in bound}
    aside = [c for c in bound if choice.by != "own" and c.data.fingerprint in free]
    notes += [f"left aside: {c.path.name} has views or few empty tiles, of its own split alone" for c in aside]
    return [cache for cache in caches if cache not in aside]


def show(finished: Finished, count: int, sheets: list[Path], notes: list[str]) -> None:
    """Add a training's picture sheet, or a note where its images are not here."""
    try:
        sheets.append(draw_sheet(finished, count))
    except DataError as error:
        name = finished.prepared.training.data.name
        notes.append(f"no picture sheet of {name}: its images are not here ({error})")


def notes_of(cache: Cache, task: str, choice: SplitChoice) -> list[str]:
    """Notes of a cache: on its data, without those that another split makes void, its split and unusable rows."""
    notes = [note for note in cache.data.notes if choice.by == "own" or "split" not in note]
    notes += split_notes(cache, choice)
    count = len(cache.images)
    groups = len(set(cache.images.column("group")))
    if choice.by == "image" and groups < count:
        notes.append(
            f"split by image: {counted(count, 'image')} of {counted(groups, 'group')}, so test holds parts that "
            "training saw"
        )
    if SCORES[task].objects and not cache.own_ids:
        notes.append("its files call several images by one id, so predictions.json counts the images from 1")
    if unreadable := unreadable_images(cache):
        all_of_them = f"of {counted(count, 'image')}"
        said = counted(unreadable, f"{all_of_them} takes no part: it", f"{all_of_them} take no part: they")
        notes.append(f"{said} or the labels can't be used")
    return notes
