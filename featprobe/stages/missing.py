"""Caches that a command needs and that are not there: made in the same process, before anything is trained."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from featprobe.cache import Cache, open_cache
from featprobe.errors import CacheError, ProbeError, counted
from featprobe.processes import from_main, gathered, pick_device
from featprobe.specs import BackboneSpec
from featprobe.stages.options import ExtractOptions, configured
from featprobe.stages.workspace import CONFIG, Workspace, name_of

RANDOM = "-random"  # ending of a backbone's name that means seeded random weights
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
) -> tuple[Names, Names, bool]:
    """Make the cache of each pair of a data set and a backbone that has no complete one; go on with unfinished ones.

    data, backbones: their names; empty for what featprobe.toml names. task: whose labels a data set must hold, None for
    any; one that does not is passed over, and said. options: of extraction, where featprobe.toml says nothing. say:
    told in a line what is made. dry_run: that alone. Processes that compute together make a part of each cache each.

    Returns the data sets and the backbones as caches call them, empty where they were, and whether caches are still
    missing. Raises FeatprobeError.
    """
    sets = tuple(data) or tuple(workspace.config.get("data", {}))
    asked = tuple(backbones) or tuple(workspace.config.get("backbones", {}))
    _check_named(workspace, sets, asked)
    labels, lacking = from_main(lambda: _lacking(workspace, sets, asked))
    useless = []
    for name in dict.fromkeys(own for own, _ in lacking):
        of = [backbone for own, backbone in lacking if own == name]
        if not _make(workspace, name, of, task, options, say, dry_run):
            useless.append(name)
    gathered([None])  # all parts are there when the last process comes here
    if len(useless) == len(sets):
        raise ProbeError(f"No labels for the task {task}: {', '.join(sets)}. Nothing was extracted.")
    able = tuple(name for name in data if name not in useless)
    return able, tuple(labels[name] for name in backbones), dry_run and bool(lacking)


def _check_named(workspace: Workspace, data: Names, backbones: Names) -> None:
    """Raise ProbeError where nothing says which caches are wanted."""
    lacks = [side for side, given in (("data set", data), ("backbone", backbones)) if not given]
    if lacks:
        raise ProbeError(
            f"--extract has no {' and no '.join(lacks)} to make a cache of. Nothing was started.\n"
            f"  wanted  --data and --backbone, or [data.NAME] and [backbones.NAME] in {workspace.root / CONFIG}\n"
            "Name them:  --extract --data NAME --backbone NAME"
        )


def _lacking(workspace: Workspace, data: Names, backbones: Names) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """How caches call each backbone, and the pairs of a data set and a backbone that no complete cache serves."""
    complete = []
    for path in workspace.cache_files():
        try:
            cache = open_cache(path)
            cache.usable()
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
    from featprobe.backbones.backbone import load_backbone  # timm takes time, and most commands make nothing
    from featprobe.stages.extract import extract_with
    from featprobe.stages.job import read_set

    how = configured(options, workspace.data_options(name))
    data = read_set(workspace, name, how)
    if task is not None and task not in data.tasks:
        say(f"left out: {name} holds no labels for {task}")
        return False
    for backbone in backbones:
        spec = backbone_of(workspace, backbone)
        verb, images = "to extract" if dry_run else "extracting", counted(len(data.samples), "image")
        say(f"{verb}: {spec.label} on {name}, {images}")
        if not dry_run:
            begun = time.perf_counter()
            device = pick_device(how.device)
            model = load_backbone(spec, how.levels, device)
            extract_with(workspace, model, data, how, device, load_seconds=time.perf_counter() - begun)
    return True


def caches_of(workspace: Workspace, caches: Sequence[Cache], name: str) -> list[Cache]:
    """Those of some caches that are of the data set at a path, or else of that name."""
    folder = workspace.cache_folder(name_of(Path(name)), Path(name)).name
    at_path = [cache for cache in caches if cache.path.parent.name == folder]
    return at_path or [cache for cache in caches if cache.data.name == name]


def backbone_of(workspace: Workspace, name: str) -> BackboneSpec:
    """The backbone of a name; with the ending -random, where no backbone has that name, its seeded random weights."""
    if name.endswith(RANDOM) and name not in workspace.backbone_names():
        return workspace.backbone(name.removesuffix(RANDOM), random_init=True)
    return workspace.backbone(name)
