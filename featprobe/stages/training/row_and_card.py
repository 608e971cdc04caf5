"""The records of a trained head: its result row, its card, its curves. Formats: probes/README.md."""

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

from featprobe import __version__
from featprobe.kinds import TrainRecipe
from featprobe.probes import CurvePoint, fingerprint, parameter_count
from featprobe.processes import count
from featprobe.result_rows import (
    DRAWN,
    SHARED_NOTHING,
    SHARED_ORDER,
    AskedHead,
    Counts,
    FoundBudget,
    Grid,
    ResultRow,
    Seconds,
    Settings,
    Solution,
    Treatment,
)
from featprobe.stages.extraction.origin import spec_of
from featprobe.stages.row_images import images_of, unreadable_images
from featprobe.stages.tasks.task import Outcome
from featprobe.stages.training.fit import Fitted, kept
from featprobe.stages.training.prepared import Prepared

WEIGHTS = {"best": "best validation", "end": "end of training"}


def row_of(
    prepared: Prepared, fitted: Fitted, index: int, outcome: Outcome, seconds: Mapping[str, Any]
) -> dict[str, Any]:
    """The result row of a chosen trial, at its place among the trials. seconds: as `result_rows.Seconds` has them."""
    training, cache, trial = prepared.training, prepared.cache, fitted.trials[index]
    options, solution = training.options, fitted.solutions[index] if fitted.solutions else None
    best = kept(training, trial, fitted.curves[index])
    groups = cache.rows.column("group")
    row = ResultRow(
        time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        regime=training.regime,
        tuning=Treatment(**training.treatment) if training.treatment else None,
        augmentation=training.variation,
        task=training.task,
        backbone=cache.recipe.label,
        model=cache.recipe.backbone,
        weights_sha256=cache.recipe.weights_sha256,
        data=cache.data.name,
        data_fingerprint=cache.data.fingerprint,
        feature_key=cache.recipe.key,
        tile=cache.recipe.tile,
        head=training.kind.name,
        levels=tuple(level.name for level in trial.head.levels),
        asked=AskedHead(options.levels, options.width, options.pyramid),
        parameters=parameter_count(trial.head),
        backbone_parameters=fitted.backbone_parameters,
        recipe=trial.recipe,
        grid=Grid(options.lr, options.weight_decay),
        chosen_from=Grid(*options.chosen_from) if options.chosen_from else None,
        chosen_by=training.chooses_by,
        recipe_key=training.recipe_key,
        seed=trial.seed,
        spread=SHARED_ORDER if options.shared_order else DRAWN if training.draws else SHARED_NOTHING,
        trials=solution.get("tried", 1) if solution else len(training.grid),
        budget=FoundBudget(**training.budget.to_json()) if training.budget else None,
        weights_from="closed form" if solution else WEIGHTS[trial.recipe.weights_from],
        weights_at=best.iteration,
        split=training.choice.whole,
        fold=training.choice.fold or None,
        fraction=training.fraction,
        subset=training.subset,
        images=Counts(**{split: len(images_of(cache, rows)) for split, rows in prepared.rows.items()}),
        unreadable=unreadable_images(cache),
        groups=Counts(**{s: len({groups[r] for r in rows.tolist()}) for s, rows in prepared.rows.items()}),
        absent_classes=options.absent,
        instances=options.instances,
        classes=prepared.head.classes,
        train_counts=prepared.task.train_counts(trial.head),
        val=best.scores,
        test=outcome.scores,
        seconds=Seconds(**seconds),
        device=str(training.device),
        head_precision="mixed" if training.device.type == "cuda" and not solution else "fp32",
        processes=count(),
        folder=(training.folder / f"seed{trial.seed}").relative_to(training.workspace.probes).as_posix(),
        verified=options.verify or training.regime != "frozen",
        ridge=Solution(**solution) if solution and not training.settings else None,
        settings=Settings(**training.settings) if training.settings else None,
        solution=solution if training.settings else None,
    )
    return row.to_json()


def card_of(prepared: Prepared, fitted: Fitted, index: int, row: Mapping[str, Any], sha256: str) -> dict[str, Any]:
    """The card of a saved head. row: its result. sha256: of the backbone that was trained with it, "" for none."""
    packages = ("torch", "torchvision", "timm", "numpy")
    versions = {"featprobe": __version__, **{p: version(p) for p in packages}, "python": platform.python_version()}
    found = fitted.trials[index].head.assignment
    cache = prepared.cache
    recipe, spec = cache.recipe, cache.contents.provenance.get("backbone")
    if sha256:  # a backbone of its own, whose features no cache rounds
        recipe = replace(recipe, weights_sha256=sha256, dtype="fp32", precision="fp32")
        spec = asdict(replace(spec_of(cache), source="file", weights="backbone.safetensors"))
    return {
        "format": "featprobe-head",
        "version": 1,
        "head": prepared.head.to_json(),
        **({"assignment": found} if found else {}),
        "fingerprint": fingerprint(recipe),
        "features": recipe.to_json(),
        "backbone": spec,
        "data": cache.data.to_json(),
        "read_as": cache.contents.provenance.get("read_as", {}),
        "result": row,
        "curve": [asdict(point) for point in fitted.curves[index]],
        "versions": versions,
    }


def curve_json(recipe: TrainRecipe, curve: Sequence[CurvePoint], chosen: bool) -> dict[str, Any]:
    """A trial's curve as curves.json keeps it."""
    return {
        "lr": recipe.lr,
        "weight_decay": recipe.weight_decay,
        "chosen": chosen,
        "curve": [asdict(point) for point in curve],
    }
