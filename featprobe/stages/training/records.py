"""What is written of a trained head: its result row, its card, its curves. Formats: probes/README.md."""

import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from featprobe import __version__
from featprobe.cache import Cache
from featprobe.disk import parse_json, read_regular
from featprobe.errors import FileKindError
from featprobe.kinds import TrainRecipe
from featprobe.probes import CurvePoint, fingerprint, parameter_count, plain
from featprobe.processes import count
from featprobe.result_rows import SHARED_ORDER
from featprobe.stages.row_images import images_of
from featprobe.stages.training.sources import spec_of
from featprobe.stages.training.task import Outcome

if TYPE_CHECKING:
    from featprobe.stages.training.trials import Run, Trial

LARGEST_LOG = 1 << 26  # bytes
WEIGHTS = {"best": "best validation", "end": "end of training"}


def row_of(
    run: "Run", trial: "Trial", curve: list[CurvePoint], outcome: Outcome, trials: int, seconds: Mapping[str, Any]
) -> dict[str, Any]:
    """The result row of a chosen trial. trials: how many its seed had."""
    cache, options, head = run.cache, run.options, trial.head
    kept = run.kept(trial, curve)
    groups = cache.rows.column("group")
    row: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "regime": run.regime,
        "tuning": run.treatment,
        "augmentation": run.variation,
        "task": run.task_name,
        "backbone": cache.recipe.label,
        "model": cache.recipe.backbone,
        "weights_sha256": cache.recipe.weights_sha256,
        "data": cache.data.name,
        "data_fingerprint": cache.data.fingerprint,
        "feature_key": cache.recipe.key,
        "tile": cache.recipe.tile,
        "head": run.kind,
        "levels": [level.name for level in head.levels],
        "asked": {"levels": list(options.levels), "width": options.width, "pyramid": options.pyramid},
        "parameters": parameter_count(head),
        "backbone_parameters": run.backbone_parameters,
        "recipe": trial.recipe.to_json(),
        "grid": {"lr": list(options.lr), "weight_decay": list(options.weight_decay)},
        "chosen_from": options.chosen_from and dict(zip(("lr", "weight_decay"), options.chosen_from, strict=True)),
        "chosen_by": run.chooses_by,
        "recipe_key": run.recipe_key,
        "seed": trial.seed,
        "spread": SHARED_ORDER if options.shared_order else "initialisation and order",
        "trials": trials,
        "budget": run.budget and run.budget.to_json(),
        "weights_from": WEIGHTS[trial.recipe.weights_from],
        "weights_at": kept.iteration,
        "split": run.choice.whole,
        "fold": run.choice.fold or None,
        "fraction": run.fraction,
        "subset": run.subset,
        "images": {split: len(images_of(cache, rows)) for split, rows in run.rows.items()},
        "groups": {s: len({groups[r] for r in rows.tolist()}) for s, rows in run.rows.items()},
        "absent_classes": options.absent,
        "instances": options.instances,
        "classes": list(run.classes),
        "train_counts": run.counts(head),
        "val": kept.scores,
        "test": outcome.scores,
        "seconds": dict(seconds),
        "device": str(run.device),
        "head_precision": "mixed" if run.device.type == "cuda" and run.kind != "ridge" else "fp32",
        "processes": count(),
        "folder": (run.folder / f"seed{trial.seed}").relative_to(run.workspace.probes).as_posix(),
    }
    if not options.verify and run.regime == "frozen":
        row["verified"] = False
    if run.kind == "ridge":
        row |= {"ridge": run.ridge, "trials": run.ridge["tried"], "weights_from": "closed form"}
    return plain(row)


def card_of(run: "Run", row: dict[str, Any], curve: list[CurvePoint]) -> dict[str, Any]:
    """The card of a saved head."""
    packages = ("torch", "torchvision", "timm", "numpy")
    versions = {"featprobe": __version__, **{p: version(p) for p in packages}, "python": platform.python_version()}
    assignment = {"assignment": run.head.assignment} if run.head.assignment else {}
    recipe, spec = run.cache.recipe, run.cache.contents.provenance.get("backbone")
    if run.weights:  # a backbone of its own, whose features no cache rounds
        recipe = replace(recipe, weights_sha256=run.tuned_sha256, dtype="fp32", precision="fp32")
        spec = asdict(replace(spec_of(run.cache), source="file", weights="backbone.safetensors"))
    return {
        "format": "featprobe-head",
        "version": 1,
        "head": run.head_recipe.to_json(),
        **assignment,
        "fingerprint": fingerprint(recipe),
        "features": recipe.to_json(),
        "backbone": spec,
        "data": asdict(run.cache.data),
        "read_as": run.cache.contents.provenance.get("read_as", {}),
        "result": row,
        "curve": [asdict(point) for point in curve],
        "versions": versions,
    }


def curve_json(recipe: TrainRecipe, curve: list[CurvePoint], chosen: bool) -> dict[str, Any]:
    """A trial's curve as curves.json keeps it."""
    return {
        "lr": recipe.lr,
        "weight_decay": recipe.weight_decay,
        "chosen": chosen,
        "curve": [asdict(point) for point in curve],
    }


def extraction_seconds(cache: Cache) -> float | None:
    """Seconds that extraction took over all its runs; None where they were not kept, or not all of them."""
    log = cache.path.with_suffix(".runs.jsonl")
    try:
        lines = read_regular(log, LARGEST_LOG).splitlines()
        return sum(parse_json(line)["seconds"]["run"] for line in lines)
    except (OSError, ValueError, KeyError, TypeError, FileKindError):  # a kill can tear a line
        return None
