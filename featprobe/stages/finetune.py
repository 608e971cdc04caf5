"""Images to scored heads and backbones: the full regime, and the frozen one on augmented images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from featprobe.cache import Cache, open_cache
from featprobe.errors import CacheError, ProbeError
from featprobe.probes import TrainRecipe
from featprobe.probes.saved import read_card, read_rows
from featprobe.stages.probe import ProbeReport, checked, find_caches, show
from featprobe.stages.trials import ProbeOptions, Run, Say, Tuning
from featprobe.stages.workspace import Workspace

CELL = ("backbone", "feature_key", "data_fingerprint", "task", "head", "split", "fraction", "instances", "seed")
"""What a frozen result and its counterpart in another regime agree in."""


@dataclass(frozen=True)
class Missing:
    """A counterpart that is to be trained, and the cache that names its images."""

    cache: Cache
    task: str
    options: ProbeOptions
    seed: int
    fraction: float


def finetune(
    workspace: Workspace,
    task: str | None = None,
    data: Sequence[str] = (),
    backbones: Sequence[str] = (),
    options: ProbeOptions | None = None,
    say: Say = lambda line: None,
    dry_run: bool = False,
) -> ProbeReport:
    """Train heads with a live backbone on the images that caches were made from; score and save them as `probe` does.

    With a task, data sets or backbones: on the caches that serve them. With none of these: the missing counterpart of
    every frozen result in probes/results.jsonl, with the head and the learning rate that were chosen there. options:
    their `tuning` says what moves; the default is the full regime. say: told the list with the predicted time first.
    dry_run: that list alone.
    Raises FeatprobeError when there is nothing to train, or images or weights are not here any more.
    """
    options = options or ProbeOptions()
    options = replace(options, tuning=options.tuning or Tuning())
    asked = bool(task or data or backbones)
    if asked:
        wanted, notes = _asked_for(workspace, task or "semseg", data, backbones, options)
    else:
        wanted, notes = missing_counterparts(workspace, options)
    runs = [Run(workspace, w.cache, w.task, w.options, [w.seed], w.fraction) for w in wanted]
    seconds = 0.0
    for run in runs:  # all of them are tried for a few steps, before the first is trained
        seconds += run.foresee()
        say(run.forecast_text)
    say(f"{len(runs)} trainings, about {seconds / 60:.1f} min in all")
    rows: list[dict[str, Any]] = []
    sheets: list[Path] = []
    for run in runs if not dry_run else ():
        rows += run.do(say)
        notes += run.notes
        if options.show:
            show(run, options.show, sheets, notes)
    return ProbeReport(tuple(rows), tuple(sheets), tuple(dict.fromkeys(notes)))


def _asked_for(
    workspace: Workspace, task: str, data: Sequence[str], backbones: Sequence[str], options: ProbeOptions
) -> tuple[list[Missing], list[str]]:
    options = checked(task, options)
    if options.head == "ridge":
        raise ProbeError("ridge is solved in closed form on frozen features: nothing of it can be fine-tuned.")
    if options.shared_order:
        raise ProbeError("Seeds share no pass where each has a backbone of its own. Leave --shared-order away.")
    caches, notes = find_caches(workspace, task, data, backbones, options.instances)
    seeds = range(options.seeds or 1)
    return [
        Missing(cache, task, options, seed, fraction)
        for cache in caches
        for fraction in options.fractions
        for seed in seeds
    ], notes


def missing_counterparts(workspace: Workspace, options: ProbeOptions) -> tuple[list[Missing], list[str]]:
    """What frozen results have no counterpart of in the regime that is asked for; raises ProbeError for none at all.

    Of several frozen results of one kind the last counts.
    """
    rows, notes = read_rows(workspace.probes / "results.jsonl")
    frozen = {cell_of(row): row for row in rows if row["regime"] == "frozen" and row["head"] != "ridge"}
    there = {cell_of(row) for row in rows if row["regime"] == options.regime}
    if not frozen:
        raise ProbeError(
            f"There is no frozen result in {workspace.probes} to compare with.\n"
            "Make one:  featprobe probe\nor name what to train:  featprobe finetune --task TASK --data NAME"
        )
    left = [row for cell, row in frozen.items() if cell not in there]
    if not left:
        raise ProbeError(f"Each of the {len(frozen)} frozen results has its counterpart ({options.regime}).")
    caches = _caches_by_key(workspace)
    found = []
    for row in left:
        cache = caches.get((row["feature_key"], row["data_fingerprint"]))
        if cache is None:
            notes.append(f"{row['folder']}: its cache is not here any more; it was left aside")
            continue
        found.append(Missing(cache, row["task"], _as_frozen(workspace, row, options), row["seed"], row["fraction"]))
    if not found:
        raise ProbeError("None of the frozen results can be repeated:\n" + "\n".join(notes))
    return found, notes


def cell_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a result and its counterparts in other regimes agree in."""
    return tuple(row[name] for name in CELL)


def _caches_by_key(workspace: Workspace) -> dict[tuple[str, str], Cache]:
    found = {}
    for path in workspace.cache_files():
        try:
            cache = open_cache(path)
        except CacheError:
            continue  # a row that needs it is told to be left aside
        found[cache.recipe.key, cache.data.fingerprint] = cache
    return found


def _as_frozen(workspace: Workspace, row: Mapping[str, Any], options: ProbeOptions) -> ProbeOptions:
    """The options that train what a frozen row trained, but for the regime."""
    head = read_card(workspace.probes / row["folder"])["head"]
    return replace(
        options,
        head=row["head"],
        levels=tuple(head["levels"]),
        width=head["width"],
        pyramid=head["pyramid"],
        recipe=TrainRecipe(**row["recipe"]),
        split=row["split"],
        instances=row["instances"],
        absent=row["absent_classes"],
        fractions=(row["fraction"],),
    )
