"""Cache to scored heads: the frozen regime."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featprobe.backbones.given import at_hand
from featprobe.cache import UNREADABLE, Cache, open_cache
from featprobe.errors import (
    CacheError,
    CacheIncompleteError,
    DataError,
    NoMapsError,
    ProbeError,
    counted,
    nearest,
)
from featprobe.kinds import NOT_TRAINED, TASKS, HeadKind, TrainRecipe, kind_of, kinds_of
from featprobe.probes import HeadRecipe, build_head, grid_of
from featprobe.processes import is_main, pick_device, together
from featprobe.scores import SCORES
from featprobe.splitting import SplitChoice
from featprobe.stages.extraction.extract_options import ExtractOptions
from featprobe.stages.extraction.missing import caches_of, make_missing
from featprobe.stages.partition import Partition, single_splits, split_notes
from featprobe.stages.training.ladder import Ladder, climb_all, left_behind
from featprobe.stages.training.logs import check_logs
from featprobe.stages.training.probe_options import SETTINGS, ProbeOptions, settings_of
from featprobe.stages.training.read_labels import classes_of
from featprobe.stages.training.run import Finished, Say, draw_sheet, run
from featprobe.stages.training.training import Training
from featprobe.stages.workspace import AnySet, Workspace

if TYPE_CHECKING:
    from torch import nn

LET_IT = "Or let this command make it first:"
MASKS = next(task for task, scores in SCORES.items() if scores.dense)  # a task that every set with masks serves
DENSE_ONLY = ("loss", "loss_at", "class_weights")


@dataclass(frozen=True)
class ProbeReport:
    """Result rows, picture sheets, and what a user should know."""

    rows: tuple[dict[str, Any], ...]
    sheets: tuple[Path, ...]
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        rows, sheets, notes = (len(own) for own in (self.rows, self.sheets, self.notes))
        what = ", ".join(sorted({f"{row['task']} of {row['backbone']} on {row['data']}" for row in self.rows})[:3])
        about = f" ({what})" if what else ""
        return f"ProbeReport({counted(rows, 'row')}{about}, {counted(sheets, 'sheet')}, {counted(notes, 'note')})"


def probe(
    workspace: Workspace,
    task: str = TASKS[0],
    data: AnySet | Sequence[AnySet] = (),
    backbones: "Sequence[str | nn.Module]" = (),
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


def labels_for(task: str, options: ProbeOptions) -> str:
    """The task whose labels a data set must hold to serve a task."""
    return MASKS if options.instances == "components" else task


def reads_pooled(options: ProbeOptions) -> bool:
    """Whether caches of pooled features serve the head, too."""
    return options.kind is not None and options.kind.pooled


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
    rows: list[dict[str, Any]] = []
    sheets: list[Path] = []
    for cache in caches:
        notes += [f"{cache.data.name}: {note}" for note in notes_of(cache, task, options.choice)]
        for fraction in options.fractions:
            shown = False
            own = found.get((cache.path, fraction), options)
            for split, seeds in product(splits, own.passes(fraction)):
                finished = run(Training(workspace, Partition(cache, split), task, own, seeds, fraction), say)
                rows += finished.rows
                notes += finished.notes
                if options.show and not shown and is_main():
                    shown = True
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


def checked(task: str, options: ProbeOptions) -> ProbeOptions:
    """The options with their defaults filled in; raises ProbeError for what can't be."""
    head = options.head or kinds_of(task)[0]
    kind = kind_of(task, head)
    recipe = options.recipe or kind.recipe
    if kind.is_solved(options.regime):
        solved = f"{head} is solved, not trained"
        if options.lr or options.weight_decay:
            raise ProbeError(f"{solved}: it has no --lr and no --weight-decay to try.")
        if options.budget == "auto":
            raise ProbeError(f"{solved}: it has no iterations to look for. Omit --iterations auto.")
        recipe = replace(recipe, **NOT_TRAINED)
    _check_meaning(kind, options, recipe)
    check_logs(options.log)
    grid_of(recipe, options.lr, options.weight_decay)  # refuses rates that make no sense
    if options.seeds is not None and options.seeds < 1:
        raise ProbeError(f"{options.seeds} seeds can't be trained. wanted: --seeds 1 or more.")
    wrong = [f for f in options.fractions if not 0 < f <= 1]
    if wrong or not options.fractions:
        raise ProbeError(f"{wrong or 'nothing'} is not a fraction of the training split. wanted: 0 < F <= 1.")
    return replace(options, head=head, kind=kind, recipe=recipe)


def _check_meaning(kind: HeadKind, options: ProbeOptions, recipe: TrainRecipe) -> None:
    """Raise ProbeError for an option that the head would not look at."""
    scores, solved, plain = SCORES[kind.task], kind.is_solved(options.regime), ProbeOptions()
    is_dense, on_images = scores.dense, scores.on in ("images", "anomalies")
    dense = {f"--{n.replace('_', '-')}": getattr(recipe, n) != getattr(kind.recipe, n) for n in DENSE_ONLY}
    idle = {
        "--width": options.width is not None and not kind.width,
        "--pyramid": options.pyramid != "auto" and not kind.pyramid,
        "--log": bool(options.log) and solved,
        "--instances": options.instances != "own" and not scores.objects,
        **{name: given and not is_dense for name, given in dense.items()},
        **{name: dense[name] and solved for name in ("--loss", "--loss-at") if is_dense},
        "--absent-classes": options.absent != "ignore" and on_images,
        **{
            f"--{name.replace('_', '-')}": getattr(options, name) != getattr(plain, name)
            for name in SETTINGS
            if name not in settings_of(kind)
        },
    }
    given = [name for name, is_idle in idle.items() if is_idle]
    if given:
        raise ProbeError(f"{', '.join(given)} would change nothing for {kind.task} with the head {kind.name}. Omit it.")


def find_caches(
    workspace: Workspace,
    task: str,
    data: Sequence[str],
    backbones: Sequence[str],
    instances: str = "own",
    *,
    pooled: bool = False,
    live: bool = False,
) -> tuple[list[Cache], list[str]]:
    """Complete caches that serve a task, and notes on those left aside.

    live: whether a backbone is to be trained, too, so that errors advise what can be. pooled: whether caches of
    pooled features serve, too; of those, a cache of the same maps is taken instead where it is here. Raises
    CacheError for one where maps are wanted and no other cache has them; CacheIncompleteError where a data set, a
    backbone, or, where both are named, a pair of them has no complete cache, or where none is named and none is
    complete; ProbeError when all that was asked for falls away.
    """
    found, broken = [], []
    for path in workspace.cache_files():
        try:
            found.append(open_cache(path))
        except CacheError as error:
            broken.append(error)
    own = {name: {cache.path for cache in caches_of(workspace, found, name)} for name in data}
    sets = {cache.data.name for cache in found} | {name for name in data if own[name]}
    lacks = _lack(workspace, (data, sets, "data set"), (backbones, {c.recipe.label for c in found}, "backbone"))
    if lacks:
        raise broken[0] if broken else lacks

    def is_asked_for(cache: Cache) -> bool:
        by_data = not data or any(cache.path in paths for paths in own.values())
        return by_data and (not backbones or cache.recipe.label in backbones)

    asked_for = [cache for cache in found if is_asked_for(cache)]
    if not asked_for and broken:
        raise broken[0]
    if not asked_for:
        raise CacheError(
            f"There is no feature cache in {workspace.cache} to probe.\n"
            "Make one:  featprobe extract --backbone embedded --data xray\n"
            f"{LET_IT}  --extract --backbone embedded --data xray"
        )
    served = {MASKS} if instances == "components" else {task}
    able = [cache for cache in asked_for if served & set(cache.data.serves)]
    if not able:
        raise _unserved(asked_for, task, live)
    notes = [f"{c.path} holds no labels for {task}" for c in asked_for if c not in able]
    notes += [f"left aside: {' '.join(str(error).splitlines())}" for error in broken]
    complete, lacking = list[Cache](), list[tuple[Cache, CacheError]]()
    for cache in able:
        try:
            _check_usable(cache, task, pooled)
            complete.append(cache)
        except (CacheIncompleteError, NoMapsError) as error:
            lacking.append((cache, error))

    def named(cache: Cache) -> tuple[str, str]:
        return cache.data.name if data else "", cache.recipe.label if backbones else ""

    served_by = {named(cache) for cache in complete}
    for cache, lack in lacking:
        if named(cache) not in served_by:
            raise type(lack)(f"{lack}\n{LET_IT}  --extract") from lack
        no_maps = f"left aside: {cache.path.name} holds pooled features alone, and this head reads maps"
        notes.append(no_maps if isinstance(lack, NoMapsError) else left_aside(lack))
    return _without_twins(complete, notes), notes


def _lack(workspace: Workspace, *sides: tuple[Sequence[str], set[str], str]) -> CacheError | None:
    """The error for the first name that no cache has; None where all are known. sides: names, those known, of what."""
    for asked, known, what in sides:
        for name in asked:
            if name not in known:
                return CacheError(
                    f"There is no cache of the {what} {name!r} in {workspace.cache}. {nearest(name, known)}\n"
                    f"Make one:  featprobe extract --backbone NAME --data NAME\n{LET_IT}  --extract"
                )
    return None


def _check_usable(cache: Cache, task: str, pooled: bool) -> None:
    """Raise CacheIncompleteError where rows are missing, NoMapsError where maps are wanted that it does not hold."""
    if not pooled and cache.recipe.store == "pooled":
        able = [name for name in kinds_of(task) if kind_of(task, name).pooled]
        other = f"\nOr take a head that reads pooled features:  --head {' | '.join(able)}" if able else ""
        raise NoMapsError(f"{cache.lacks_maps()}{other}")
    cache.usable()


def _without_twins(caches: Sequence[Cache], notes: list[str]) -> list[Cache]:
    """The caches less those of pooled features whose maps are here as well."""
    keys = {(cache.recipe.key, cache.data.fingerprint) for cache in caches}
    twins = [
        cache
        for cache in caches
        if cache.recipe.store == "pooled" and (replace(cache.recipe, store="maps").key, cache.data.fingerprint) in keys
    ]
    notes += [f"left aside: {cache.path.name} holds pooled features, and its maps are here, too" for cache in twins]
    return [cache for cache in caches if cache not in twins]


def _unserved(caches: Sequence[Cache], task: str, live: bool) -> ProbeError:
    """The error that caches hold no labels for a task, with the tasks that they do hold labels for."""
    each = dict.fromkeys(f"{c.data.name}: {', '.join(c.data.tasks or c.data.serves) or 'none'}" for c in caches)
    command = f"featprobe {'finetune' if live else 'probe'}"
    serves = dict.fromkeys(other for cache in caches for other in cache.data.serves)
    others = [own for own in serves if not live or any(kind_of(own, name).live for name in kinds_of(own))]
    advice = f"Take a task that they serve:  {command} --task {' | '.join(others)}" if others else ""
    if any(cache.data.tasks for cache in caches):
        advice = f"If there are only masks of classes, use their connected parts:\n  {command} … --instances components"
    return ProbeError(
        f"No cache here can serve the task {task}.\n  wanted  labels for {task}\n"
        f"  found   {'; '.join(list(each)[:5])}\n"
        "semseg and instseg need masks in the data set's files, detect needs boxes or objects with masks, classify and "
        f"anomaly need labels of images or any of these. {advice}"
    )


def left_aside(error: CacheError) -> str:
    """A note on a cache that is passed over: what it lacks, and what to do."""
    return f"left aside: {' '.join(str(error).splitlines())}"


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
    unreadable = len(set(cache.image_of[cache.done == UNREADABLE].tolist()))
    if unreadable:
        notes.append(f"{unreadable} of {count} images can't be read and take no part")
    return notes
