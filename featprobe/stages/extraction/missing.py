"""Caches that a command needs and that are not there: made in the same process, before anything is trained."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from featprobe.backbones.given import modules_at_hand
from featprobe.cache import MISSING, Cache, open_cache
from featprobe.datasets import DataSet
from featprobe.errors import CacheError, ProbeError, counted
from featprobe.processes import from_main, gathered, pick_device
from featprobe.specs import MODULE, BackboneSpec
from featprobe.stages.extraction.extract_options import OF_ONE_RUN, ExtractOptions, configured
from featprobe.stages.extraction.origin import batch_size_of, read_as_of, spec_of
from featprobe.stages.workspace import CONFIG, Workspace, backbone_of, caches_of

Names = tuple[str, ...]


def make_missing(
    workspace: Workspace,
    data: Sequence[str],
    backbones: Sequence[str],
    task: str | None,
    options: ExtractOptions,
    say: Callable[[str], None],
    *,
    dry_run: bool = False,
    pooled: bool = True,
) -> tuple[Names, Names, bool]:
    """Complete the unfinished caches of these sets and backbones, and make that of each pair that has none.

    data, backbones: their names; empty for what featprobe.toml names, and, of unfinished caches, for all. An unfinished
    cache is completed as it was begun. task: whose labels a data set must hold, None for any; one that does not is
    passed over, and said. options: of extraction of a new cache, where featprobe.toml says nothing. say: gets a
    line for each. dry_run: only these lines. pooled: whether caches of pooled features do, too. Processes that compute
    together make a part of each cache each.

    Returns the data sets and the backbones as caches call them, empty where they were, and whether caches are still
    missing. Raises FeatprobeError.
    """
    sets = tuple(data) or tuple(workspace.config.get("data", {}))
    asked = tuple(backbones) or tuple(workspace.config.get("backbones", {}))
    begun, without = from_main(lambda: _begun(workspace, data, backbones, pooled))
    for path in without:
        say(f"left aside: {path} is not complete, and was made with a module that was given as an object")
    if not begun:
        _check_named(workspace, sets, asked)
    for path in begun:
        _complete(workspace, open_cache(path), options, say, dry_run)
    gathered([None])  # what is made next looks for complete caches
    labels, lacking = from_main(lambda: _lacking(workspace, sets, asked, pooled))
    useless = []
    for name in dict.fromkeys(own for own, _ in lacking):
        of = [backbone for own, backbone in lacking if own == name]
        if not _make(workspace, name, of, task, options, say, dry_run):
            useless.append(name)
    gathered([None])  # all parts are there when the last process comes here
    if useless and len(useless) == len(sets):
        raise ProbeError(
            f"No labels for the task {task}: {', '.join(sets)}. Nothing was extracted.\n"
            "If there are only masks of classes, use their connected parts:  --instances components"
        )
    able = tuple(name for name in data if name not in useless)
    return able, tuple(labels[name] for name in backbones), dry_run and bool(lacking or begun)


def _begun(
    workspace: Workspace, data: Sequence[str], backbones: Sequence[str], pooled: bool
) -> tuple[list[Path], list[Path]]:
    """Caches of these sets and backbones, or of any where none is named, that miss rows.

    Of them, those that can be completed, and those of modules that are not at hand.
    """
    found, there = [], {spec.model for spec, _ in modules_at_hand()}
    for path in workspace.cache_files():
        try:
            cache = open_cache(path)
            of_set = not data or any(caches_of(workspace, [cache], name) for name in data)
            of_set &= pooled or cache.recipe.store == "maps"
            if of_set and (not backbones or cache.recipe.label in backbones):
                found.append(cache)
        except CacheError:
            continue  # another is made beside it
    lacking = [cache for cache in found if bool((cache.done == MISSING).any())]
    without = [c.path for c in lacking if c.recipe.backbone.startswith(MODULE) and c.recipe.backbone not in there]
    return [cache.path for cache in lacking if cache.path not in without], without


def _complete(
    workspace: Workspace, cache: Cache, options: ExtractOptions, say: Callable[[str], None], dry_run: bool
) -> None:
    """Compute what an unfinished cache misses, as it was begun."""
    from featprobe.stages.extraction.job import read_set

    missing = int((cache.done == MISSING).sum())
    how = replace(
        ExtractOptions.making(cache.recipe.to_json()),
        batch_size=batch_size_of(cache),
        skip_bad=options.skip_bad,
        **{name: getattr(options, name) for name in OF_ONE_RUN},
        **read_as_of(cache),
    )
    say(f"{'to complete' if dry_run else 'completing'}: {cache.path}, {counted(missing, 'row')} of {len(cache)}")
    if not dry_run:
        name = workspace.data_argument(cache.data.name, Path(cache.data.root))
        _extract(workspace, read_set(workspace, name, how), spec_of(cache), how)


def _check_named(workspace: Workspace, data: Names, backbones: Names) -> None:
    """Raise ProbeError where nothing says which caches are wanted."""
    lacks = [side for side, given in (("data set", data), ("backbone", backbones)) if not given]
    if lacks:
        raise ProbeError(
            f"--extract has no {' and no '.join(lacks)} to make a cache of. Nothing was started.\n"
            f"  wanted  --data and --backbone, or [data.NAME] and [backbones.NAME] in {workspace.root / CONFIG}\n"
            "Name them:  --extract --data NAME --backbone NAME"
        )


def _lacking(
    workspace: Workspace, data: Names, backbones: Names, pooled: bool
) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """How caches call each backbone, and the pairs of a data set and a backbone that no complete cache serves."""
    complete = []
    for path in workspace.cache_files():
        try:
            cache = open_cache(path)
            cache.usable()
            if pooled or cache.recipe.store == "maps":
                complete.append(cache)
        except CacheError:
            continue  # it is to be completed, or another is made beside it
    here = {cache.recipe.label for cache in complete}
    labels = {name: name if name in here else backbone_of(workspace, name).label for name in backbones}
    served = {(name, cache.recipe.label) for name in data for cache in caches_of(workspace, complete, name)}
    return labels, [(name, own) for name in data for own in backbones if (name, labels[own]) not in served]


def _make(
    workspace: Workspace,
    name: str,
    backbones: Sequence[str],
    task: str | None,
    options: ExtractOptions,
    say: Callable[[str], None],
    dry_run: bool,
) -> bool:
    """Extract a data set under some backbones; False, and nothing is made, where it holds no labels for the task."""
    from featprobe.stages.extraction.job import read_set

    how = configured(options, workspace.data_options(name))
    data = read_set(workspace, name, how)
    if task is not None and task not in data.serves:
        say(f"left out: {name} holds no labels for {task}")
        return False
    for backbone in backbones:
        spec = backbone_of(workspace, backbone)
        verb, images = "to extract" if dry_run else "extracting", counted(len(data.samples), "image")
        size = f" at {how.size[0]}x{how.size[1]}" if how.size else ""
        say(f"{verb}: {spec.label} on {name}, {images}{size}")
        if not dry_run:
            _extract(workspace, data, spec, how)
    return True


def _extract(workspace: Workspace, data: DataSet, spec: BackboneSpec, how: ExtractOptions) -> None:
    from featprobe.backbones.backbone import load_backbone  # timm takes time, and most commands make nothing
    from featprobe.stages.extraction.make_cache import extract_with

    begun, device = time.perf_counter(), pick_device(how.device)
    model = load_backbone(spec, how.levels, device)
    extract_with(workspace, model, data, how, device, load_seconds=time.perf_counter() - begun)
