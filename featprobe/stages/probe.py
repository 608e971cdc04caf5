"""Cache to scored heads: the frozen regime."""

import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from featprobe import __version__
from featprobe.cache import UNREADABLE, Cache, FeatureLoader, open_cache
from featprobe.datasets.images import read_levels, to_unit
from featprobe.datasets.splits import split_by_group
from featprobe.errors import CacheError, CacheIncompleteError, DataError, ProbeError, nearest
from featprobe.levels import FeatureLevel, choose_levels
from featprobe.machine import available_memory, pick_device
from featprobe.metrics import IouScores, confusion_matrix, iou_scores
from featprobe.metrics.semantic import Absent
from featprobe.probes import (
    CurvePoint,
    HeadRecipe,
    TrainRecipe,
    append_row,
    build_head,
    fingerprint,
    image_loss,
    inverse_sqrt_weights,
    level_loss,
    make_folder,
    parameter_count,
    predict_classes,
    save_head,
    start_at_prior,
    train,
)
from featprobe.report.sheets import Panel, save_sheet
from featprobe.specs import digest
from featprobe.stages.workspace import Workspace
from featprobe.targets import IGNORE, cell_shares, labels_in_frame

Rows = NDArray[np.intp]
EVALUATION_BATCH = 8
LABEL_MEMORY_SHARE = 0.3  # of the available memory, for labels kept ready


@dataclass(frozen=True)
class ProbeOptions:
    """How to probe; see `featprobe probe --help` for each.

    split: "own" as the cache holds it, "group" for featprobe's own split by group, or "image" for one by image,
    which leaks wherever a group has several images. show: how many test
    images the picture sheet shows.
    """

    head: str = "linear"
    levels: tuple[str, ...] = ()
    recipe: TrainRecipe = field(default_factory=TrainRecipe)
    seeds: int = 1
    split: str = "own"
    absent: Absent = "zero"
    device: str | None = None
    show: int = 0
    quiet: bool = False


@dataclass(frozen=True)
class ProbeReport:
    """Result rows, picture sheets, and what a user should know."""

    rows: tuple[dict[str, Any], ...]
    sheets: tuple[Path, ...]
    notes: tuple[str, ...]


def probe(
    workspace: Workspace,
    task: str = "semseg",
    data: Sequence[str] = (),
    backbones: Sequence[str] = (),
    options: ProbeOptions | None = None,
) -> ProbeReport:
    """Train and score heads on every complete cache that can serve a task, or on those asked for.

    Raises FeatprobeError when nothing fits, or when a cache that is asked for is not complete.
    """
    options = options or ProbeOptions()
    if options.seeds < 1:
        raise ProbeError(f"{options.seeds} seeds can't be trained. wanted: --seeds 1 or more.")
    caches, notes = find_caches(workspace, task, data, backbones)
    rows, sheets = [], []
    for cache in caches:
        for seed in range(options.seeds):
            run = _Run(workspace, cache, task, options, seed)
            rows.append(run.do())
            if options.show and seed == 0:
                try:
                    sheets.append(run.show(options.show))
                except DataError as error:
                    notes.append(f"no picture sheet of {cache.data.name}: its images are not here ({error})")
        notes += [f"{cache.data.name}: {note}" for note in _notes_of(cache, options.split)]
    return ProbeReport(tuple(rows), tuple(sheets), tuple(dict.fromkeys(notes)))


def find_caches(
    workspace: Workspace, task: str, data: Sequence[str], backbones: Sequence[str]
) -> tuple[list[Cache], list[str]]:
    """Complete caches that serve a task, and notes on those left aside.

    Raises CacheIncompleteError or ProbeError when all that was asked for falls away.
    """
    found, broken = [], []
    for path in workspace.cache_files():
        try:
            found.append(open_cache(path))
        except CacheError as error:
            broken.append(error)
    names = {cache.data.name for cache in found}
    labels = {cache.recipe.label for cache in found}
    wanted_data = [Path(name).resolve().name if name not in names else name for name in data]
    for asked, known, what in ((wanted_data, names, "data set"), (backbones, labels, "backbone")):
        unknown = [name for name in asked if name not in known]
        if unknown and broken:
            raise broken[0]
        if unknown:
            raise CacheError(
                f"There is no cache of the {what} {unknown[0]!r} in {workspace.cache}. {nearest(unknown[0], known)}\n"
                "Make one:  featprobe extract --backbone NAME --data NAME"
            )
    asked_for = [
        c for c in found if (not data or c.data.name in wanted_data) and (not backbones or c.recipe.label in backbones)
    ]
    if not asked_for and broken:
        raise broken[0]
    if not asked_for:
        raise CacheError(
            f"There is no feature cache in {workspace.cache} to probe.\n"
            "Make one:  featprobe extract --backbone embedded --data xray"
        )
    able = [cache for cache in asked_for if task in cache.data.tasks]
    if not able:
        holds = "; ".join(f"{c.data.name}: {', '.join(c.data.tasks)}" for c in asked_for[:5])
        raise ProbeError(
            f"No cache here can serve the task {task}.\n  wanted  labels for {task}\n  found   {holds}\n"
            "semseg and instseg need masks in the data set's files, detect needs boxes or instances."
        )
    notes = [f"{c.path} holds no labels for {task}" for c in asked_for if c not in able]
    notes += [f"left aside: {str(error).splitlines()[0]}" for error in broken]
    complete = []
    for cache in able:
        try:
            cache.usable()
            complete.append(cache)
        except CacheIncompleteError as error:
            if data or backbones or len(able) == 1:
                raise
            notes.append(f"left aside: {str(error).splitlines()[0]}")
    if not complete:
        raise CacheIncompleteError(f"None of the {len(able)} caches for {task} is complete.\n" + "\n".join(notes))
    return complete, notes


class _Run:
    """One head on one cache with one seed: train, score, save."""

    def __init__(self, workspace: Workspace, cache: Cache, task: str, options: ProbeOptions, seed: int) -> None:
        self.workspace, self.cache, self.task, self.options, self.seed = workspace, cache, task, options, seed
        self.classes = cache.data.classes
        self.head_recipe = HeadRecipe(task, options.head, self.classes, options.levels)
        self.rows = split_rows(cache, options.split)
        self.device = pick_device(options.device)
        key = digest([self.head_recipe.to_json(), options.recipe.to_json(), options.split, options.absent])
        self.recipe_key = key[:8]
        name = f"{task}-{options.head}-{self.recipe_key}"
        self.folder = workspace.probes / cache.path.parent.name / cache.path.stem / name / f"seed{seed}"

    def do(self) -> dict[str, Any]:
        """Train on train, follow on val, score on test once; write the head, its card and the result row."""
        begun = time.perf_counter()
        make_folder(self.folder)  # now, and not after an hour of training
        recipe = self.options.recipe
        torch.manual_seed(self.seed)
        head = build_head(self.head_recipe, self.cache.levels).to(self.device)
        self.head = head
        levels: tuple[FeatureLevel, ...] = choose_levels(self.cache.levels, self.options.levels)
        with FeatureLoader(self.cache, levels, self.device) as loader:
            loader.keep_on_device(np.sort(np.concatenate(list(self.rows.values()))))
            loss, pixels = self._loss(head)
            bar = tqdm(total=recipe.iterations, desc=self._title(), unit="it", disable=self.options.quiet, leave=False)
            with bar:

                def progress(step: int, mean: float) -> None:
                    bar.update(step - bar.n)
                    bar.set_postfix_str(f"loss {mean:.3f}")

                curve = train(
                    head, loader.batches, self.rows["train"], loss, recipe, self.seed,
                    lambda h: self._brief(self._scores(self._confusions(h, loader, "val").sum(0))), progress,
                )  # fmt: skip
            trained = time.perf_counter()
            confusions = self._confusions(head, loader, "test")
        seconds = {
            "train": trained - begun,
            "test": time.perf_counter() - trained,
            "extract": extraction_seconds(self.cache),
        }
        row = self._row(head, curve, self._scores(confusions.sum(0)), pixels, seconds)
        save_head(self.folder, head, self._card(row, curve), confusions)
        append_row(self.workspace.probes / "results.jsonl", row)
        return row

    def show(self, count: int) -> Path:
        """Write a sheet image | truth | prediction of test images, those with most foreground first."""
        with FeatureLoader(self.cache, self.head.levels, self.device) as loader:  # type: ignore[arg-type]
            foreground = {r: int(((m := self.cache.semantic(r)) > 0)[m != IGNORE].sum()) for r in self.rows["test"]}
            chosen = sorted(foreground, key=lambda r: (-foreground[r], r))
            chosen = chosen[:: max(1, len(chosen) // count)][:count]  # from the fullest to the emptiest
            panels = []
            for row, predicted in self._predictions(self.head, loader, np.array(chosen)):
                path = Path(self.cache.data.root) / self.cache.rows[row].image
                image = to_unit(read_levels(path), self.cache.recipe.window)
                truth = self.cache.semantic(row)
                panels.append((self.cache.rows[row].id, [Panel(image), Panel(image, truth), Panel(image, predicted)]))
        path = self.folder / "sheet.png"
        save_sheet(path, panels, ["image", "truth", f"prediction ({self.cache.recipe.label})"], self.classes)
        return path

    def _loss(self, head: nn.Module) -> tuple[Callable[[Tensor, Rows], Tensor], Tensor]:
        """The loss of a batch's logits, and the training split's labelled pixels per class."""
        recipe = self.options.recipe
        store = _LabelStore(self.cache, self.rows["train"], len(self.classes), recipe.loss_at, _stride(head))
        weights = None
        if recipe.class_weights == "inverse-sqrt":
            weights = inverse_sqrt_weights(store.pixels).to(self.device)
        start_at_prior(head, store.pixels, weights)
        function = level_loss if recipe.loss_at == "level" else image_loss
        return (lambda logits, rows: function(logits, store(rows).to(logits.device), weights)), store.pixels

    @torch.inference_mode()
    def _predictions(
        self, head: nn.Module, loader: FeatureLoader, rows: Rows
    ) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """(row, class of every pixel of the original image) for each row."""
        stride = _stride(head)
        for batch, features in loader.batches(
            [rows[i : i + EVALUATION_BATCH] for i in range(0, len(rows), EVALUATION_BATCH)]
        ):
            logits = head(features)
            for row, own in zip(batch.tolist(), logits, strict=True):
                yield row, predict_classes(own, stride, self.cache.rows[row].placement).cpu().numpy()

    def _confusions(self, head: nn.Module, loader: FeatureLoader, split: str) -> NDArray[np.int64]:
        """A confusion matrix per image of a split: (images, classes, classes)."""
        matrices = [
            confusion_matrix(self.cache.semantic(row), predicted, len(self.classes))
            for row, predicted in self._predictions(head, loader, self.rows[split])
        ]
        return np.stack(matrices)

    def _scores(self, matrix: NDArray[np.int64]) -> dict[str, Any]:
        scores: IouScores = iou_scores(matrix, self.options.absent)
        iou = dict(zip(self.classes, scores.per_class, strict=True))
        return {"miou": scores.miou, "miou_foreground": scores.miou_foreground, "iou": iou}

    def _brief(self, scores: dict[str, Any]) -> dict[str, float]:
        return {name: scores[name] for name in ("miou", "miou_foreground")}

    def _title(self) -> str:
        return f"{self.cache.recipe.label} on {self.cache.data.name}, seed {self.seed}"

    def _row(
        self, head: nn.Module, curve: list[CurvePoint], test: dict[str, Any], pixels: Tensor, seconds: dict[str, Any]
    ) -> dict[str, Any]:
        cache, options = self.cache, self.options
        return {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "regime": "frozen",
            "task": self.task,
            "backbone": cache.recipe.label,
            "model": cache.recipe.backbone,
            "weights_sha256": cache.recipe.weights_sha256,
            "data": cache.data.name,
            "data_fingerprint": cache.data.fingerprint,
            "feature_key": cache.recipe.key,
            "head": options.head,
            "levels": [level.name for level in head.levels],  # type: ignore[union-attr]
            "parameters": parameter_count(head),
            "recipe": options.recipe.to_json(),
            "recipe_key": self.recipe_key,
            "seed": self.seed,
            "trials": 1,
            "weights_from": "end of training",
            "split": options.split,
            "images": {split: len(rows) for split, rows in self.rows.items()},
            "groups": {s: len({cache.rows[r].group for r in rows}) for s, rows in self.rows.items()},
            "absent_classes": options.absent,
            "classes": list(self.classes),
            "train_pixels": dict(zip(self.classes, pixels.tolist(), strict=True)),
            "val": curve[-1].scores,
            "test": test,
            "seconds": seconds,
            "device": str(self.device),
            "folder": self.folder.relative_to(self.workspace.probes).as_posix(),
        }

    def _card(self, row: dict[str, Any], curve: list[CurvePoint]) -> dict[str, Any]:
        packages = ("torch", "timm", "numpy")
        versions = {"featprobe": __version__, **{p: version(p) for p in packages}, "python": platform.python_version()}
        return {
            "format": "featprobe-head",
            "version": 1,
            "head": self.head_recipe.to_json(),
            "fingerprint": fingerprint(self.cache.recipe),
            "features": self.cache.recipe.to_json(),
            "data": asdict(self.cache.data),
            "result": row,
            "curve": [asdict(point) for point in curve],
            "versions": versions,
        }


class _LabelStore:
    """Training labels as the loss wants them, kept ready in memory where they fit.

    loss_at "level": shares of each class per cell, float32 (batch, classes, rows, columns).
    loss_at "image": frame labels, uint8 (batch, height, width).
    """

    def __init__(self, cache: Cache, rows: Rows, classes: int, loss_at: str, stride: int) -> None:
        self.cache, self.classes, self.loss_at, self.stride = cache, classes, loss_at, stride
        self.pixels = torch.zeros(classes, dtype=torch.float64)
        frame = cache.recipe.frame
        per_row = frame[0] * frame[1] * (2 * classes / stride**2 if loss_at == "level" else 1)
        keep = per_row * len(rows) < LABEL_MEMORY_SHARE * available_memory()
        self.kept: dict[int, Tensor] = {}
        for row in rows.tolist():
            labels = self._labels(row)
            self.pixels += torch.bincount(labels.flatten().long(), minlength=256)[:classes]
            if keep:
                self.kept[row] = self._encode(labels)

    def __call__(self, rows: Rows) -> Tensor:
        encoded = [self.kept[r] if r in self.kept else self._encode(self._labels(r)) for r in rows.tolist()]
        stacked = torch.stack(encoded)
        return stacked.float() / self.stride**2 if self.loss_at == "level" else stacked

    def _labels(self, row: int) -> Tensor:
        labels = labels_in_frame(self.cache.semantic(row), self.cache.rows[row].placement)
        return torch.from_numpy(labels)

    def _encode(self, labels: Tensor) -> Tensor:
        if self.loss_at == "image":
            return labels
        counts = cell_shares(labels[None], self.classes, self.stride)[0] * self.stride**2
        return counts.to(torch.int16)  # pixels of each class in a cell, at most stride²


def split_rows(cache: Cache, split: str) -> dict[str, Rows]:
    """Usable rows of train, val and test: as the cache holds them, by group, or by image.

    Raises ProbeError when one of them is empty.
    """
    usable = cache.usable()
    if split in ("group", "image"):
        assigned = split_by_group([cache.rows[r].group if split == "group" else cache.rows[r].id for r in usable])
    else:
        assigned = [cache.rows[r].split for r in usable]
    rows = {s: usable[[a == s for a in assigned]] for s in ("train", "val", "test")}
    empty = [s for s, found in rows.items() if not len(found)]
    if empty:
        raise ProbeError(f"{cache.path}: the {', '.join(empty)} split has no usable image. Nothing was trained.")
    return rows


def extraction_seconds(cache: Cache) -> float | None:
    """Seconds that extraction took over all its runs; None where they were not kept, or not all of them."""
    log = cache.path.with_suffix(".runs.jsonl")
    try:
        return sum(json.loads(line)["seconds"]["run"] for line in log.read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError):  # a kill can tear a line
        return None


def _stride(head: nn.Module) -> int:
    stride = head.stride
    assert isinstance(stride, int)  # every dense head states it
    return stride


def _notes_of(cache: Cache, split: str) -> list[str]:
    """What a cache says of its data, less what the split by group mends, and the rows it can't use."""
    notes = [note for note in cache.data.notes if split == "own" or "split" not in note]
    groups = len({row.group for row in cache.rows})
    if split == "image" and groups < len(cache):
        notes.append(f"split by image: {len(cache)} images of {groups} groups, so test holds parts that training saw")
    unreadable = int((cache.done == UNREADABLE).sum())
    if unreadable:
        notes.append(f"{unreadable} of {len(cache)} images can't be read and take no part")
    return notes
