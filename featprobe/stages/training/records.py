"""What is written of a trained head: its result row, its card, its curves. Formats: probes/README.md."""

import io
import math
import platform
import time
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featprobe import __version__
from featprobe.disk import parse_json
from featprobe.errors import FileKindError, ProbeError
from featprobe.kinds import KINDS, TrainRecipe
from featprobe.machine import available_memory
from featprobe.probes import CurvePoint, fingerprint, parameter_count, plain
from featprobe.probes.saved import fault_of, head_folder, read_card, read_files
from featprobe.processes import count
from featprobe.stages.row_images import images_of
from featprobe.stages.training.commands import again_command
from featprobe.stages.training.outcome import Outcome
from featprobe.stages.training.segmentation import Segmentation
from featprobe.stages.training.sources import spec_of

if TYPE_CHECKING:
    from featprobe.stages.training.trials import Run, Trial

UNREADABLE = (
    OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, NotImplementedError,
    MemoryError, OverflowError, zipfile.BadZipFile, zlib.error, FileKindError,
)  # fmt: skip
"""What is raised by files beside a head that are none of ours."""
WEIGHTS = {"best": "best validation", "end": "end of training"}
SHARED_ORDER = "initialisation"  # what the spread over seeds covers with a shared order of the rows


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
        "levels": [level.name for level in head.levels],  # type: ignore[union-attr]
        "asked": {"levels": list(options.levels), "width": options.width, "pyramid": options.pyramid},
        "parameters": parameter_count(head),
        "backbone_parameters": run.backbone_parameters,
        "recipe": trial.recipe.to_json(),
        "grid": {"lr": list(options.lr), "weight_decay": list(options.weight_decay)},
        "chosen_from": options.chosen_from and dict(zip(("lr", "weight_decay"), options.chosen_from, strict=True)),
        "chosen_by": run.task.chooses_by,
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
    assignment = {} if isinstance(run.task, Segmentation) else {"assignment": run.head.assignment}
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


def card_beside(probes: Path, row: Mapping[str, Any], *, hashes: bool = False) -> dict[str, Any]:
    """The card of the head that a row is of; raises ProbeError, saying why, where that is not there as it was saved.

    The files of the head are looked at as `fault_of` does, with `hashes` as well.
    """
    folder = head_folder(probes, row)
    if not (folder / "card.json").is_file():
        gone = "its folder is not here any more" if not folder.is_dir() else "its folder holds no card.json"
        raise damaged(row, gone)
    try:
        card = read_card(folder, whole=True)
    except ProbeError as error:
        raise damaged(row, str(error)) from error
    if {**card["result"], "version": None} != {**row, "version": None}:
        raise ProbeError("its folder was written again since, by another run")
    fault = fault_of(folder, card, hashes=hashes)
    if not fault and "files" in card:
        missing = [name for name in ("head.safetensors", *_beside(row["task"])) if name not in card["files"]]
        fault = f"its card names no {', '.join(missing)}" if missing else ""
    fault = fault or ("" if "files" in card else _unreadable(folder, row["task"]))
    if fault:
        raise damaged(row, fault)
    return card


def damaged(row: Mapping[str, Any], reason: str) -> ProbeError:
    """That a row has no sound head any more, why, and the command that trains it again."""
    again = f" Train it again:  {again_command(row)}" if row["head"] in KINDS else ""
    return ProbeError(f"{reason.rstrip('.')}.{again}")


def is_whole(probes: Path, row: Mapping[str, Any], *, hashes: bool = False) -> bool:
    """Whether the head that a row is of is there as it was saved; see `card_beside`."""
    try:
        card_beside(probes, row, hashes=hashes)
    except ProbeError:
        return False
    return True


def _beside(task: str) -> tuple[str, ...]:
    """The files that lie beside each head of a task."""
    return "curves.json", *(("scores.npz",) if task == "semseg" else ("truth.json", "predictions.json"))


def _unreadable(folder: Path, task: str) -> str:
    """What can't be read of what lies beside a head of an older featprobe, whose card does not say; "" for nothing."""
    for name in _beside(task):
        try:
            (data,) = read_files(folder, {}, [name])
            if name.endswith(".json"):
                parse_json(data)
            else:
                read_arrays(data)
        except ProbeError as error:
            return str(error)
        except UNREADABLE:
            return f"{name} can't be read"
    return ""


def read_arrays(data: bytes) -> dict[str, NDArray[Any]]:
    """The arrays of scores.npz that are there, each of which holds what its header claims.

    Nothing is unpacked that claims more than a quarter of the memory. Raises ProbeError, or one of UNREADABLE.
    """
    most = available_memory() // 4
    found = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for entry in archive.infolist():
            name = entry.filename.removesuffix(".npy")
            if name not in ("ids", "groups", "confusion") or name in found:
                continue
            with archive.open(entry) as packed:
                one = np.lib.format.read_magic(packed) == (1, 0)
                header = np.lib.format.read_array_header_1_0 if one else np.lib.format.read_array_header_2_0
                shape, _, dtype = header(packed)
            claimed = math.prod(shape) * dtype.itemsize
            if dtype.hasobject or claimed > entry.file_size or entry.file_size > most:
                raise ProbeError(f"scores.npz claims {claimed} bytes of {name}, which it does not hold")
            most -= entry.file_size
            with archive.open(entry) as packed:
                found[name] = np.lib.format.read_array(packed, allow_pickle=False)
    return found


def curve_json(recipe: TrainRecipe, curve: list[CurvePoint], chosen: bool) -> dict[str, Any]:
    """A trial's curve as curves.json keeps it."""
    return {
        "lr": recipe.lr,
        "weight_decay": recipe.weight_decay,
        "chosen": chosen,
        "curve": [asdict(point) for point in curve],
    }
