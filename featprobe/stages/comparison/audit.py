"""What storing features in fewer bits costs: bytes, error, and the validation score of heads."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featprobe.cache import Cache, open_cache
from featprobe.cache.quantised import as_read
from featprobe.cache.reader import FeatureLoader
from featprobe.errors import CacheError, ProbeError, counted
from featprobe.kinds import SEEDS, SOLVED, TASKS, kind_of, kinds_of
from featprobe.metrics import Difference, Statistic, mean_of, paired_difference, pixel_statistic
from featprobe.processes import pick_device
from featprobe.specs import CacheDtype, Rows
from featprobe.stages.partition import Partition
from featprobe.stages.tasks.task import Outcome
from featprobe.stages.training.asked import checked
from featprobe.stages.training.probe_options import ProbeOptions
from featprobe.stages.training.run import judged
from featprobe.stages.training.training import Training
from featprobe.stages.workspace import Workspace

MOST_ROWS = 512  # that errors are measured on
ROWS_AT_ONCE = 8
HEADS = (kinds_of(TASKS[0])[0], *SOLVED)
SIZES: tuple[CacheDtype, ...] = ("fp32", "fp16", "int8")
Say = Callable[[str], None]


@dataclass(frozen=True)
class HeadCost:
    """A head's mean foreground IoU on validation, with features as fp16 and as int8 keep them, shares in [0, 1].

    difference: int8 - fp16, the same validation groups drawn for both; means over the seeds.
    """

    head: str
    seeds: int
    fp16: float
    int8: float
    difference: Difference


@dataclass(frozen=True)
class Audit:
    """What a dtype costs on the features of one cache.

    dtype: of the cache that was read, against whose values errors are. rows: that they were measured on. bytes_of: of
    all features, by dtype. errors: level -> dtype -> relative L2 error, |stored - exact| / |exact| over all values.
    """

    path: str
    dtype: CacheDtype
    rows: int
    bytes_of: dict[CacheDtype, int]
    errors: dict[str, dict[str, float]]
    heads: tuple[HeadCost, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class AuditOptions:
    """heads: kinds to train, of HEADS; none for errors alone. seeds: of the trained ones, which share their passes.

    iterations: None for the head's own.
    """

    heads: tuple[str, ...] = HEADS
    seeds: int = SEEDS
    iterations: int | None = None
    device: str | None = None
    quiet: bool = False


def audit(
    workspace: Workspace, paths: Sequence[Path], options: AuditOptions | None = None, say: Say = lambda line: None
) -> list[Audit]:
    """Bring complete caches' features to fewer bits, in memory, and say what that changes.

    Of a cache of int8, the one of the same recipe with more bits is taken, which must lie in the workspace. Validation
    is scored, never test. Raises CacheError where the features can't be had, ProbeError where heads can't be trained.
    """
    options = options or AuditOptions()
    unknown = [head for head in options.heads if head not in HEADS]
    if unknown:
        raise ProbeError(f"{unknown[0]!r} is not a head that an audit trains. wanted: {', '.join(HEADS)}, or none")
    caches: dict[Path, Cache] = {}
    for path in paths:
        cache = _exact(workspace, open_cache(path))
        caches.setdefault(cache.path, cache)
    return [_audit(workspace, cache, options, say) for cache in caches.values()]


def _audit(workspace: Workspace, cache: Cache, options: AuditOptions, say: Say) -> Audit:
    notes: list[str] = []
    rows = cache.usable()
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), MOST_ROWS)).astype(np.intp)]
    if not len(rows):
        raise CacheError(f"{cache.path} has no usable row. Nothing was measured.")
    errors = _errors(cache, rows, pick_device(options.device))
    heads = []
    if options.heads and TASKS[0] not in cache.data.tasks:
        notes.append(f"no heads: {cache.data.name} has no masks, which {' and '.join(HEADS)} are trained on")
    else:
        heads = [_head_cost(workspace, cache, head, options, say) for head in options.heads]
    every = {dtype: len(cache) * replace(cache.recipe, dtype=dtype).row_bytes for dtype in SIZES}
    return Audit(str(cache.path), cache.recipe.dtype, len(rows), every, errors, tuple(heads), tuple(notes))


def _exact(workspace: Workspace, cache: Cache) -> Cache:
    """The cache, or, of int8, one of more bits of the same recipe and data set. Raises CacheError."""
    if cache.recipe.store == "pooled":
        raise cache.lacks_maps()
    if cache.recipe.dtype != "int8":
        return cache
    wider: tuple[CacheDtype, ...] = ("fp32", "fp16", "bf16")
    for key in (replace(cache.recipe, dtype=dtype).key for dtype in wider):
        for path in workspace.cache_files():
            found = open_cache(path) if key[:8] in path.name else None
            if found and found.recipe.key == key and found.data.fingerprint == cache.data.fingerprint:
                return found
    command = cache.contents.command.replace("--dtype int8", "--dtype fp16")
    raise CacheError(
        f"{cache.path} holds only int8, so the cost of int8 can't be measured with it.\n"
        "  wanted  a cache of the same features in fp16 or fp32, in this workspace\n"
        f"Nothing was computed. Make one, then run the same command again:  {command}"
    )


@torch.inference_mode()
def _errors(cache: Cache, rows: Rows, device: torch.device) -> dict[str, dict[str, float]]:
    """level -> dtype -> relative L2 error of the rows' features in that dtype."""
    kinds: list[CacheDtype] = ["fp16", "bf16", "int8"]
    dtypes = [dtype for dtype in kinds if dtype != cache.recipe.dtype]
    squares = {level.name: dict.fromkeys((*dtypes, "exact"), 0.0) for level in cache.levels}
    with FeatureLoader(cache, device=device) as loader:
        batches = [rows[i : i + ROWS_AT_ONCE] for i in range(0, len(rows), ROWS_AT_ONCE)]
        for _, features in loader.batches(batches):
            _check_range(cache, features.maps)
            stored = {dtype: as_read(features.maps, dtype) for dtype in dtypes}
            for name, m in features.maps.items():
                squares[name]["exact"] += float(m.float().square().sum(dtype=torch.float64))
                for dtype, maps in stored.items():
                    off = (maps[name].float() - m.float()).square()
                    squares[name][dtype] += float(off.sum(dtype=torch.float64))
    return {
        name: {d: float(np.sqrt(own[d] / own["exact"])) if own["exact"] else 0.0 for d in dtypes}
        for name, own in squares.items()
    }


def _check_range(cache: Cache, maps: Any) -> None:
    """Raise CacheError for features that fp16 and int8 can't hold."""
    if all(bool(m.half().isfinite().all()) for m in maps.values()):
        return
    raise CacheError(
        f"{cache.path} holds features beyond 65504, which fp16 and int8 can't hold. Nothing was measured: these "
        f"features need the {cache.recipe.dtype} that they have."
    )


def _head_cost(workspace: Workspace, cache: Cache, head: str, options: AuditOptions, say: Say) -> HeadCost:
    kind = kind_of(TASKS[0], head)
    task, recipe, solved = kind.task, kind.recipe, kind.solved
    if options.iterations and not solved:
        recipe = replace(recipe, iterations=options.iterations)
    how = checked(task, ProbeOptions(
        head=head, recipe=recipe, shared_order=True, device=options.device, quiet=options.quiet,
    ))  # fmt: skip
    seeds = tuple(range(1 if solved else options.seeds))
    scores: dict[str, Statistic] = {}
    dtypes: tuple[CacheDtype, ...] = ("fp16", "int8")
    for dtype in dtypes:
        training = Training(workspace, Partition(cache, how.choice), task, how, seeds)
        say(f"{training.title}: {head} on {dtype}, {counted(len(seeds), 'seed')}")
        scores[dtype] = mean_of([_statistic(outcome) for outcome in judged(training, dtype)])
    difference = paired_difference(scores["int8"], scores["fp16"])
    fp16, int8 = (float(scores[dtype].value(np.ones((1, sum(scores[dtype].sizes))))[0]) for dtype in dtypes)
    return HeadCost(head, len(seeds), fp16, int8, difference)


def _statistic(outcome: Outcome) -> Statistic:
    """Foreground mIoU of a head as a function of how often each group counts."""
    with np.load(io.BytesIO(outcome.files["scores.npz"]), allow_pickle=False) as file:
        return pixel_statistic(file["confusion"], file["groups"].tolist())
