"""Images to scored heads and backbones: the full regime, and the frozen one on augmented images."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featprobe.backbones.given import at_hand
from featprobe.backbones.precision import resolve
from featprobe.cache import Cache
from featprobe.errors import CacheError, CacheIncompleteError, FeatprobeError, ProbeError
from featprobe.kinds import FROZEN, TASKS
from featprobe.probes.saved import head_folder, make_folder, read_card, read_results
from featprobe.processes import is_main, pick_device, together
from featprobe.result_rows import ResultRow
from featprobe.stages.extraction.missing import make_missing
from featprobe.stages.partition import Partition, single_splits
from featprobe.stages.training.agenda import Agenda, alike, foreseen_each
from featprobe.stages.training.asked import (
    as_trained,
    caches_by_key,
    check_free,
    checked_live,
    find_caches,
    labels_for,
    left_aside,
    no_cache,
)
from featprobe.stages.training.forecast import Forecast, forecast_text
from featprobe.stages.training.ladder import Ladder, climb_all, left_behind
from featprobe.stages.training.logs import check_logs
from featprobe.stages.training.probe import ProbeReport, extraction, notes_of, show, splittable
from featprobe.stages.training.probe_options import ProbeOptions, Tuning
from featprobe.stages.training.read_labels import check_live
from featprobe.stages.training.run import Say, forget, forget_in, run
from featprobe.stages.training.saved_results import is_whole
from featprobe.stages.training.training import Training
from featprobe.stages.workspace import AnySet, Workspace

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Missing:
    """A counterpart that is to be trained, and the cache that names its images."""

    partition: Partition
    task: str
    options: ProbeOptions
    seed: int
    fraction: float

    def training(self, workspace: Workspace) -> Training:
        """The same, in a workspace."""
        return Training(workspace, self.partition, self.task, self.options, (self.seed,), self.fraction)

    @property
    def alike(self) -> tuple[Any, ...]:
        """The same for trainings that differ in nothing but the seed."""
        return self.partition.source.path, self.partition.choice, self.task, self.options, self.fraction

    def ladder(self, workspace: Workspace) -> Ladder | None:
        """The ladder that finds its iterations; None if they are given."""
        if not self.options.climbs(self.fraction):
            return None
        return Ladder(workspace, self.partition, self.task, self.options, self.fraction)


def finetune(
    workspace: Workspace,
    task: str | None = None,
    data: AnySet | Sequence[AnySet] = (),
    backbones: "Sequence[str | nn.Module] | str | nn.Module" = (),
    options: ProbeOptions | None = None,
    say: Say = lambda line: None,
    dry_run: bool = False,
    *,
    extract: bool = False,
) -> ProbeReport:
    """Train heads with a live backbone on the images that caches were made from; score and save them as `probe` does.

    With a task, data sets or backbones: on the caches that serve them, semseg where no task is named; what is there
    already is not trained again. data: names, paths or data sets. backbones: names, and modules of your own that caches
    were made with. With none of these: the missing counterpart of every frozen result in probes/results.jsonl, with the
    head and the learning rate that were chosen there. options: their `tuning` says what moves; the default is the full
    regime. say: gets the list with the predicted time first. dry_run: that list alone. extract: make caches that are
    missing first, as for `probe`. Processes that torchrun started do this together, as there. Raises FeatprobeError
    when there is nothing to train, or images or weights are not here any more.
    """
    options, sets = options or ProbeOptions(), workspace.sets_called(data)
    options = replace(options, tuning=options.tuning or Tuning())
    device = pick_device(options.device)
    if options.tuning and options.tuning.precision:
        resolve(options.tuning.precision, device.type)  # refuses what this device can't compute
    with at_hand(backbones) as names, together(device):
        say = say if is_main() else lambda line: None
        if extract:
            named = bool(task or sets or names)
            needed = labels_for(task or TASKS[0], checked_live(task or TASKS[0], options)) if named else None
            how = extraction(options)
            sets, names, lacking = make_missing(workspace, sets, names, needed, how, say, dry_run=dry_run)
            if lacking:
                say("their trainings are listed once they exist")
                return ProbeReport((), (), ())
        return _finetune(workspace, task, sets, names, options, say, dry_run)


def _finetune(
    workspace: Workspace,
    task: str | None,
    data: Sequence[str],
    backbones: Sequence[str],
    options: ProbeOptions,
    say: Say,
    dry_run: bool,
) -> ProbeReport:
    check_logs(options.log)
    if task or data or backbones:
        wanted, notes = _asked_for(workspace, task or TASKS[0], data, backbones, options, dry_run)
    else:
        wanted, notes = missing_counterparts(workspace, options, dry_run)
    searches = {one.alike: one.ladder(workspace) for one in wanted}
    ladders = [ladder for ladder in searches.values() if ladder]
    climb_all(ladders, say, dry_run)
    found = {how: ladder.found() for how, ladder in searches.items() if ladder and ladder.is_climbed()}
    wanted = [replace(one, options=found.get(one.alike, one.options)) for one in wanted]
    trainings = [one.training(workspace) for one in wanted if not one.options.climbs(one.fraction)]
    if not dry_run:
        make_folder(workspace.probes)
    later = [one.training(workspace) for one in wanted if one.options.climbs(one.fraction)]  # of a dry run alone
    rows: list[dict[str, Any]] = []
    sheets: list[Path] = []
    for training, forecast in _on_the_list(trainings, later, say, dry_run):
        finished = run(training, say, forecast)
        rows += finished.rows
        notes += finished.notes
        if options.show and is_main():
            show(finished, options.show, sheets, notes)
        del finished  # the next training needs its memory
    notes += left_behind(workspace, [ladder for ladder in ladders if ladder.is_climbed()])
    return ProbeReport(tuple(rows), tuple(sheets), tuple(dict.fromkeys(notes)))


def _on_the_list(
    trainings: Sequence[Training], later: Sequence[Training], say: Say, dry_run: bool
) -> Iterator[tuple[Training, Forecast | None]]:
    """Each training with its forecast, when its turn comes, after a list of all; one alone says itself how long it
    takes.

    later: those whose iterations are not found yet. dry_run: the list, and no training.
    """
    if len(trainings) == 1 and not dry_run:
        yield trainings[0], None
        return
    known = foreseen_each(trainings)  # all of them are tried for a few steps, before the first is trained
    for training in trainings:
        say(forecast_text(training, known[alike(training)]))
    for training in later:
        say(f"{training.label}, once its iterations are found")
    agenda = Agenda.of_trainings(trainings, known, say)
    agenda.announce(f" and {len(later)} whose iterations are not found yet" if later else "")
    for training in trainings if not dry_run else ():
        agenda.begin(training.label)
        yield training, known[alike(training)]
        agenda.end()


def _asked_for(
    workspace: Workspace, task: str, data: Sequence[str], backbones: Sequence[str], options: ProbeOptions, dry_run: bool
) -> tuple[list[Missing], list[str]]:
    options = checked_live(task, options)
    caches, notes = find_caches(workspace, task, data, backbones, options.instances, pooled=True, live=True)
    splits = single_splits(options.choice)
    found = []
    for cache in splittable(caches, options.choice, notes):
        notes += [f"{cache.data.name}: {note}" for note in notes_of(cache, task, options.choice)]
        for split, fraction in product(splits, options.fractions):
            first = Missing(Partition(cache, split), task, options, 0, fraction)
            ladder = first.ladder(workspace)
            own = ladder.found() if ladder and ladder.is_climbed() else first.options
            for seed in range(options.seeds_at(fraction)):
                one = replace(first, seed=seed)
                training = replace(one, options=own).training(workspace)
                if not own.climbs(fraction) and training.is_done():
                    notes.append(f"there already: {training.folder}/seed{seed} (remove it to train again)")
                    if is_main() and not dry_run:
                        forget(training)
                else:
                    found.append(one)
    return found, notes


def missing_counterparts(
    workspace: Workspace, options: ProbeOptions, dry_run: bool = True
) -> tuple[list[Missing], list[str]]:
    """The counterparts that frozen results lack in the regime of `options`; raises ProbeError if none is lacking.

    Of several frozen results of one kind the last counts. Where images are augmented anew, stored views make no kind of
    their own if the cache without them is here.
    """
    check_free(options)
    rows, notes = read_results(workspace.probes / "results.jsonl")
    assert options.tuning is not None
    caches = caches_by_key(workspace)
    if options.tuning.augment:
        rows = [replace(row, feature_key=_without_views(row, caches)) for row in rows]
    climbs = options.budget == "auto"
    frozen = {
        counterpart_of(row, climbs): row for row in rows if row.regime == FROZEN and row.is_known and row.kind.live
    }
    treated = (options.regime, options.tuning.augment)
    whole = [
        row
        for row in rows
        if (row.regime, bool(row.tuning and row.tuning.augment)) == treated and is_whole(workspace.probes, row)
    ]
    for row in whole if is_main() and not dry_run else ():
        forget_in(head_folder(workspace.probes, row))
    there = {counterpart_of(row) for row in whole}
    if not frozen:
        raise ProbeError(
            f"There is no frozen result in {workspace.probes} to compare with.\n"
            "Make one:  featprobe probe\nor name what to train:  featprobe finetune --task TASK --data NAME"
        )
    left = [row for cell, row in frozen.items() if cell not in there]
    if not left:
        raise ProbeError(f"Each of the {len(frozen)} frozen results has its counterpart ({options.regime}).")
    found = []
    for row in left:
        cache = caches.get((row.feature_key, row.data_fingerprint))
        try:
            if cache is None:
                raise CacheError(no_cache(workspace))
            cache.usable()
            if row.fraction < 1 and not row.subset:
                raise ProbeError("its part of the training split does not follow the seed: probe it again")
            own = _as_frozen(workspace, row, options)
            check_live(row.task, cache, own)
            if own.climbs(row.fraction) and row.fold is not None:
                raise ProbeError("no iterations can be looked for in a cross-validation; omit --iterations auto for it")
            found.append(Missing(Partition(cache, own.choice), row.task, own, row.seed, row.fraction))
        except CacheIncompleteError as error:
            notes.append(left_aside(error))
        except FeatprobeError as error:
            notes.append(f"{row.folder} was left aside: {str(error).splitlines()[0]}")
    if not found:
        raise ProbeError("None of the frozen results can be repeated:\n" + "\n".join(dict.fromkeys(notes)))
    for one in found:
        cache, choice = one.partition.source, one.partition.choice
        notes += [f"{cache.data.name}: {note}" for note in notes_of(cache, one.task, choice)]
    return found, notes


def counterpart_of(row: ResultRow, climbs: bool = False) -> tuple[Any, ...]:
    """The values in which a result and its counterparts in other regimes agree. Each regime has its own ladder.

    climbs: whether iterations are looked for, also where the row's own were given.
    """
    asked = (row.settings.unit, row.settings.labels) if row.settings else ()  # one cache has several kinds of labels
    data = (row.backbone, row.feature_key, row.data_fingerprint, row.task, row.split, row.fold, row.instances, *asked)
    head = (row.head, row.levels, row.fraction, row.subset, row.seed)
    if row.kind.solved:  # a frozen counterpart is not trained, so it says nothing of the training
        return *data, *head
    iterations = "ladder" if row.budget or climbs else row.recipe.iterations
    return *data, *head, iterations, row.recipe.batch_size, row.weights_from


def _without_views(row: ResultRow, caches: Mapping[tuple[str, str], Cache]) -> str:
    """The key of the features that a result is of, or of the same ones without stored views where they are here."""
    cache = caches.get((row.feature_key, row.data_fingerprint))
    if cache is not None:
        wanted = replace(cache.recipe, views=cache.recipe.views[:1], version=0)
        for (key, fingerprint), other in caches.items():
            if fingerprint == row.data_fingerprint and replace(other.recipe, version=0) == wanted:
                return key
    return row.feature_key


def _as_frozen(workspace: Workspace, row: ResultRow, options: ProbeOptions) -> ProbeOptions:
    """The options that train what a frozen row trained, but for the regime."""
    own = as_trained(row, read_card(head_folder(workspace.probes, row)), options)
    climbs, usual = bool(row.budget) or options.budget == "auto", row.kind.recipe.iterations
    recipe = row.kind.recipe if row.kind.solved else row.recipe
    return replace(
        own,
        recipe=replace(recipe, iterations=usual) if climbs else recipe,
        chosen_from=(row.grid.lr, row.grid.weight_decay) if row.grid.lr or row.grid.weight_decay else None,
        budget="auto" if climbs else "fixed",
    )
