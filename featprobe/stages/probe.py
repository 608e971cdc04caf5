"""Cache to scored heads: the frozen regime."""

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

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
from featprobe.levels import Features
from featprobe.machine import pick_device
from featprobe.metrics.semantic import Absent
from featprobe.probes import (
    DEFAULT_RECIPES,
    CurvePoint,
    HeadRecipe,
    TrainRecipe,
    append_row,
    build_head,
    fingerprint,
    grid_of,
    kinds_of,
    make_folder,
    parameter_count,
    plain,
    save_head,
    train,
)
from featprobe.probes.pyramid import PyramidKind
from featprobe.probes.ridge import STRENGTHS, RidgeSums, choose
from featprobe.report.sheets import Panel, save_sheet
from featprobe.specs import digest
from featprobe.stages.detection import Detection
from featprobe.stages.outcome import Outcome, evaluation_batches, spread_over
from featprobe.stages.segmentation import Segmentation
from featprobe.stages.subset import training_subset
from featprobe.stages.workspace import Workspace

Rows = NDArray[np.intp]
Say = Callable[[str], None]
SHARED_ORDER = "initialisation"  # what the spread over seeds covers with a shared order of the rows
MOST_LOGITS = 1_000_000  # of validation cells that ridge's strengths and offsets are chosen on
REHEARSED = 3  # training steps that are timed before training starts, the first not counted


@dataclass(frozen=True)
class ProbeOptions:
    """How to probe; see `featprobe probe --help` for each.

    head: its kind, None for the task's default. recipe: None for the kind's default. lr, weight_decay: to try, all
    combinations; empty for the recipe's. seeds: None for 3 with trained dense heads, 1 otherwise. split: "own" as the
    cache holds it, "group" for featprobe's own split by group, or "image" for one by image, which leaks wherever a
    group has several images. fractions: of the training rows, each trained on apart. show: how many test images the
    picture sheet shows.
    """

    head: str | None = None
    levels: tuple[str, ...] = ()
    width: int | None = None
    pyramid: PyramidKind = "auto"
    recipe: TrainRecipe | None = None
    lr: tuple[float, ...] = ()
    weight_decay: tuple[float, ...] = ()
    seeds: int | None = None
    shared_order: bool = False
    fractions: tuple[float, ...] = (1.0,)
    split: str = "own"
    instances: Literal["own", "components"] = "own"
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
    say: Say = lambda line: None,
) -> ProbeReport:
    """Train and score heads on every complete cache that can serve a task, or on those asked for.

    say: told, before each training starts, how long it will take. Raises FeatprobeError when nothing fits, or when a
    cache that is asked for is not complete.
    """
    options = _checked(task, options or ProbeOptions())
    caches, notes = find_caches(workspace, task, data, backbones, options.instances)
    rows, sheets = [], []
    for cache in caches:
        notes += [f"{cache.data.name}: {note}" for note in _notes_of(cache, options.split)]
        for fraction in options.fractions:
            shown = False
            for seeds in _passes(options):
                run = _Run(workspace, cache, task, options, seeds, fraction)
                rows += run.do(say)
                notes += run.notes
                if options.show and not shown:
                    shown = True
                    try:
                        sheets.append(run.show(options.show))
                    except DataError as error:
                        notes.append(f"no picture sheet of {cache.data.name}: its images are not here ({error})")
    return ProbeReport(tuple(rows), tuple(sheets), tuple(dict.fromkeys(notes)))


def _checked(task: str, options: ProbeOptions) -> ProbeOptions:
    """The options with their defaults filled in; raises ProbeError for what can't be."""
    head = options.head or kinds_of(task)[0]
    if head not in kinds_of(task):
        raise ProbeError(f"There is no {task} head {head!r}. {nearest(head, kinds_of(task))}")
    recipe = options.recipe or DEFAULT_RECIPES[head]
    if head == "ridge":
        if options.lr or options.weight_decay:
            raise ProbeError("ridge is solved, not trained: it has no --lr and no --weight-decay to try.")
        recipe = replace(recipe, iterations=1, evaluations=1)
    grid_of(recipe, options.lr, options.weight_decay)  # refuses rates that make no sense
    seeds = options.seeds if options.seeds is not None else 3 if task == "semseg" and head != "ridge" else 1
    if seeds < 1:
        raise ProbeError(f"{seeds} seeds can't be trained. wanted: --seeds 1 or more.")
    wrong = [f for f in options.fractions if not 0 < f <= 1]
    if wrong or not options.fractions:
        raise ProbeError(f"{wrong or 'nothing'} is no fraction of the training split. wanted: 0 < F <= 1.")
    return replace(options, head=head, seeds=seeds, recipe=recipe)


def _passes(options: ProbeOptions) -> list[list[int]]:
    """The seeds that share one pass over the rows."""
    seeds = list(range(options.seeds or 1))
    return [seeds] if options.shared_order else [[seed] for seed in seeds]


def find_caches(
    workspace: Workspace, task: str, data: Sequence[str], backbones: Sequence[str], instances: str = "own"
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
    served = {task, "semseg"} if instances == "components" and task != "semseg" else {task}
    able = [cache for cache in asked_for if served & set(cache.data.tasks)]
    if not able:
        holds = "; ".join(f"{c.data.name}: {', '.join(c.data.tasks)}" for c in asked_for[:5])
        raise ProbeError(
            f"No cache here can serve the task {task}.\n  wanted  labels for {task}\n  found   {holds}\n"
            "semseg and instseg need masks in the data set's files, detect needs boxes or objects with "
            "masks. Where there are only masks of classes, their connected parts can serve:\n"
            "  featprobe probe … --instances components"
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


@dataclass(frozen=True)
class _Trial:
    """One head of a pass: its seed, its recipe, the head, its curve when it is trained."""

    seed: int
    recipe: TrainRecipe
    head: nn.Module


class _Run:
    """The heads of one pass over one cache: train, choose on validation, score on test, save."""

    def __init__(
        self,
        workspace: Workspace,
        cache: Cache,
        task: str,
        options: ProbeOptions,
        seeds: Sequence[int],
        fraction: float,
    ) -> None:
        self.workspace, self.cache, self.task_name, self.options, self.seeds = workspace, cache, task, options, seeds
        self.fraction, self.notes = fraction, list[str]()
        self.classes = cache.data.classes
        assert options.recipe is not None and options.head is not None  # filled in by _checked
        self.recipe, self.kind = options.recipe, options.head
        self.device = pick_device(options.device)
        key = digest([
            task, self.kind, options.levels, options.width, options.pyramid, self.recipe.to_json(), options.lr,
            options.weight_decay, options.shared_order, fraction, options.split, options.instances, options.absent,
        ])  # fmt: skip
        self.recipe_key = key[:8]
        name = f"{task}-{self.kind}-{self.recipe_key}"
        self.folder = workspace.probes / cache.path.parent.name / cache.path.stem / name
        for seed in seeds:
            make_folder(self.folder / f"seed{seed}")  # now, and not after an hour of training
        self.rows = split_rows(cache, options.split)
        self.task = self._task()
        sides = self.task.sides if isinstance(self.task, Detection) else ()
        self.head_recipe = HeadRecipe(
            task, self.kind, self.classes, options.levels, options.width, options.pyramid, sides
        )

    def do(self, say: Say) -> list[dict[str, Any]]:
        """Train on train, choose on val, score the chosen on test once; write heads, cards, curves, result rows."""
        begun = time.perf_counter()
        trials = self._trials()
        absent = [name for name, count in self._counts(trials[0].head).items() if not count]
        if absent:
            self.notes.append(f"{self.cache.data.name}: no training example of {', '.join(absent)}")
        levels: Any = trials[0].head.levels
        with FeatureLoader(self.cache, levels, self.device) as loader:
            loader.keep_on_device(np.sort(np.concatenate(list(self.rows.values()))))
            fit = self._solve if self.kind == "ridge" else self._train
            curves = fit(trials, loader, say)
            chosen = [self._best(trials, curves, seed) for seed in self.seeds]
            trained = time.perf_counter()
            outcomes = self.task.evaluate([trials[i].head for i in chosen], loader.batches, self.rows["test"])
        seconds = {
            "train": trained - begun,
            "test": time.perf_counter() - trained,
            "extract": extraction_seconds(self.cache),
        }
        self.head = trials[chosen[0]].head
        rows = []
        for seed, index, outcome in zip(self.seeds, chosen, outcomes, strict=True):
            row = self._row(trials[index], curves[index], outcome, len(curves) // len(self.seeds), seconds)
            own = [i for i, trial in enumerate(trials) if trial.seed == seed]
            kept = [_curve_json(trials[i].recipe, curves[i], i == index) for i in own]
            files = {**outcome.files, "curves.json": json.dumps(plain(kept)).encode()}
            save_head(self.folder / f"seed{seed}", trials[index].head, self._card(row, curves[index]), files)
            append_row(self.workspace.probes / "results.jsonl", row)
            rows.append(row)
        return rows

    def show(self, count: int) -> Path:
        """Write a sheet image | truth | prediction of test images, from those with most to see to those with least."""
        levels: Any = self.head.levels
        with FeatureLoader(self.cache, levels, self.device) as loader:
            chosen = spread_over(self.rows["test"], self.task.fullness, count)
            panels = []
            for row, draw in self.task.panels(self.head, loader.batches, chosen):
                path = Path(self.cache.data.root) / self.cache.rows[row].image
                image = to_unit(read_levels(path), self.cache.recipe.window)
                panels.append((self.cache.rows[row].id, [Panel(image), *draw(image)]))
        path = self.folder / f"seed{self.seeds[0]}" / "sheet.png"
        save_sheet(path, panels, ["image", "truth", f"prediction ({self.cache.recipe.label})"], self.classes)
        return path

    def _task(self) -> Segmentation | Detection:
        if self.task_name == "semseg":
            self._take_fraction(lambda row: np.unique(self.cache.semantic(row)).tolist())
            return Segmentation(self.cache, self.rows["train"], self.recipe, self.device, self.options.absent)
        masks, source = self.task_name == "instseg", self.options.instances
        everything = Detection(self.cache, self.rows["train"], self.device, masks=masks, source=source)
        self._take_fraction(lambda row: [i.category for i in everything.instances(row)])
        if self.fraction == 1:
            return everything
        return Detection(self.cache, self.rows["train"], self.device, masks=masks, source=source)

    def _take_fraction(self, classes_in: Callable[[int], list[int]]) -> None:
        train = self.rows["train"]
        if self.fraction < 1:
            groups = [self.cache.rows[r].group for r in train]
            ids = [self.cache.rows[r].id for r in train]
            kept = training_subset(ids, groups, [set(classes_in(r)) for r in train.tolist()], self.fraction)
            self.rows["train"] = train[kept]

    def _trials(self) -> list[_Trial]:
        recipes = grid_of(self.recipe, self.options.lr, self.options.weight_decay)
        trials = []
        for seed in self.seeds:
            for recipe in recipes:
                torch.manual_seed(seed)  # the trials of one seed begin alike
                trials.append(_Trial(seed, recipe, build_head(self.head_recipe, self.cache.levels).to(self.device)))
        return trials

    def _train(self, trials: Sequence[_Trial], loader: FeatureLoader, say: Say) -> list[list[CurvePoint]]:
        heads = [trial.head for trial in trials]
        loss = self.task.start(heads)
        say(self._prediction(heads, loss, loader))
        torch.manual_seed(self.seeds[0])
        bar = tqdm(total=self.recipe.iterations, desc=self._title(), unit="it", disable=self.options.quiet, leave=False)
        with bar:

            def counted(features: Features, rows: Rows) -> Tensor:
                bar.update()
                return loss(features, rows)

            def evaluate() -> list[dict[str, float]]:
                return [o.brief for o in self.task.evaluate(heads, loader.batches, self.rows["val"])]

            return train(
                heads, [trial.recipe for trial in trials], loader.batches, self.rows["train"], counted, self.seeds[0],
                evaluate, lambda step, mean: bar.set_postfix_str(f"loss {mean:.3f}"),
            )  # fmt: skip

    def _solve(self, trials: Sequence[_Trial], loader: FeatureLoader, say: Say) -> list[list[CurvePoint]]:
        """Solve for the ridge head, which is trained by no iteration; its strength and offsets come from validation."""
        task = self.task
        assert isinstance(task, Segmentation)
        head = trials[0].head
        levels: Any = head.levels
        stride = levels[0].stride
        weights = task.weights(stride)
        ones = torch.ones(len(self.classes), device=self.device)
        sums = RidgeSums(levels, len(self.classes), ones if weights is None else weights)
        for rows, features in loader.batches(evaluation_batches(self.rows["train"])):
            sums.add(features, task.shares(rows, stride))
        solved = sums.solve()

        val = self.rows["val"]
        batches = ((features, task.shares(rows, stride)) for rows, features in loader.batches(evaluation_batches(val)))
        cells = levels[0].cells(self.cache.recipe.frame)
        step = -(-len(val) * cells[0] * cells[1] * len(self.classes) // MOST_LOGITS)
        index, offsets, _ = choose(solved, batches, step)
        for trial in trials:
            trial.head.load_state_dict(solved[index].state_dict())
            with torch.no_grad():
                trial.head.get_parameter("bias").add_(offsets)
            trial.head.eval()
        self.ridge = {"strength": STRENGTHS[index], "offsets": offsets.tolist(), "tried": len(solved)}
        brief = task.evaluate([head], loader.batches, self.rows["val"])[0].brief
        return [[CurvePoint(1, 0.0, brief)] for _ in trials]

    def _prediction(
        self, heads: Sequence[nn.Module], loss: Callable[[Features, Rows], Tensor], loader: FeatureLoader
    ) -> str:
        """How long training will take, from a few steps whose effect is undone."""
        before = [{name: value.clone() for name, value in head.state_dict().items()} for head in heads]
        size = min(self.recipe.batch_size, len(self.rows["train"]))
        steps = []
        for rows, features in loader.batches([self.rows["train"][:size]] * REHEARSED):
            begun = time.perf_counter()
            self._rehearse(heads, loss, features, rows)
            steps.append(time.perf_counter() - begun)
        for head, state in zip(heads, before, strict=True):
            head.load_state_dict(state)
            head.zero_grad(set_to_none=True)
            head.eval()
        begun = time.perf_counter()
        few = self.rows["val"][:4]
        self.task.evaluate(heads, loader.batches, few)
        evaluation = (time.perf_counter() - begun) * len(self.rows["val"]) / len(few)
        for head in heads:
            head.train()
        seconds = float(np.mean(steps[1:])) * self.recipe.iterations + evaluation * self.recipe.evaluations
        many = f", {len(heads)} heads at once" if len(heads) > 1 else ""
        return (
            f"{self._title()}: {self.kind}{many}, {self.recipe.iterations} iterations, about {seconds / 60:.1f} min "
            f"on {self.device}"
        )

    def _rehearse(
        self, heads: Sequence[nn.Module], loss: Callable[[Features, Rows], Tensor], features: Features, rows: Rows
    ) -> None:
        """One step forward and back; raises ProbeError with a batch size that fits where this one does not."""
        for head in heads:
            head.train()
        try:
            loss(features, rows).sum().backward()
        except torch.OutOfMemoryError as error:
            fits = largest_that_fits(len(rows), lambda n: loss(_first(features, n), rows[:n]).sum().backward())
            advice = f"--batch-size {fits}" if fits else "fewer --levels, a smaller --width, or --device cpu"
            raise ProbeError(
                f"{self._title()}: the memory of {self.device} does not hold a training step.\n"
                f"  wanted  {len(rows)} images a step, {len(heads)} head(s)\n"
                f"  found   {str(error).splitlines()[0]}\nNothing was trained. What fits:  featprobe probe … {advice}"
            ) from error

    def _best(self, trials: Sequence[_Trial], curves: Sequence[list[CurvePoint]], seed: int) -> int:
        """The trial of a seed whose end scores highest on validation, the first of equals; raises ProbeError."""
        ends = {
            i: curves[i][-1].scores[self.task.chooses_by]
            for i, trial in enumerate(trials)
            if trial.seed == seed and curves[i] and curves[i][-1].iteration == self.recipe.iterations
        }
        if not ends:
            raise ProbeError(f"No trial of seed {seed} ended with a finite loss. Try smaller --lr.")
        return max(ends, key=lambda i: (-1.0 if np.isnan(ends[i]) else ends[i], -i))

    def _counts(self, head: nn.Module) -> dict[str, int]:
        if isinstance(self.task, Segmentation):
            return self.task.train_counts(head.stride)  # type: ignore[arg-type]
        return self.task.train_counts()

    def _title(self) -> str:
        share = "" if self.fraction == 1 else f", {self.fraction:g} of train"
        seeds = ", ".join(map(str, self.seeds))
        return f"{self.cache.recipe.label} on {self.cache.data.name}{share}, seed {seeds}"

    def _row(
        self, trial: _Trial, curve: list[CurvePoint], outcome: Outcome, trials: int, seconds: Mapping[str, Any]
    ) -> dict[str, Any]:
        cache, options, head = self.cache, self.options, trial.head
        row = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "regime": "frozen",
            "task": self.task_name,
            "backbone": cache.recipe.label,
            "model": cache.recipe.backbone,
            "weights_sha256": cache.recipe.weights_sha256,
            "data": cache.data.name,
            "data_fingerprint": cache.data.fingerprint,
            "feature_key": cache.recipe.key,
            "head": self.kind,
            "levels": [level.name for level in head.levels],  # type: ignore[union-attr]
            "parameters": parameter_count(head),
            "recipe": trial.recipe.to_json(),
            "grid": {"lr": list(options.lr), "weight_decay": list(options.weight_decay)},
            "recipe_key": self.recipe_key,
            "seed": trial.seed,
            "spread": SHARED_ORDER if options.shared_order else "initialisation and order",
            "trials": trials,
            "weights_from": "end of training",
            "split": options.split,
            "fraction": self.fraction,
            "images": {split: len(rows) for split, rows in self.rows.items()},
            "groups": {s: len({cache.rows[r].group for r in rows}) for s, rows in self.rows.items()},
            "absent_classes": options.absent,
            "instances": options.instances,
            "classes": list(self.classes),
            "train_counts": self._counts(head),
            "val": curve[-1].scores,
            "test": outcome.scores,
            "seconds": dict(seconds),
            "device": str(self.device),
            "folder": (self.folder / f"seed{trial.seed}").relative_to(self.workspace.probes).as_posix(),
        }
        if self.kind == "ridge":
            row |= {"ridge": self.ridge, "trials": self.ridge["tried"], "weights_from": "closed form"}
        return plain(row)

    def _card(self, row: dict[str, Any], curve: list[CurvePoint]) -> dict[str, Any]:
        packages = ("torch", "torchvision", "timm", "numpy")
        versions = {"featprobe": __version__, **{p: version(p) for p in packages}, "python": platform.python_version()}
        assignment = {} if isinstance(self.task, Segmentation) else {"assignment": self.head.assignment}
        return {
            "format": "featprobe-head",
            "version": 1,
            "head": self.head_recipe.to_json(),
            **assignment,
            "fingerprint": fingerprint(self.cache.recipe),
            "features": self.cache.recipe.to_json(),
            "backbone": self.cache.contents.provenance.get("backbone"),
            "data": asdict(self.cache.data),
            "result": row,
            "curve": [asdict(point) for point in curve],
            "versions": versions,
        }


def largest_that_fits(count: int, step: Callable[[int], None]) -> int:
    """The largest half, quarter, … of a batch of `count` images whose step does not run out of memory; 0 for none."""
    while count := count // 2:
        try:
            step(count)
            return count
        except torch.OutOfMemoryError:
            continue
    return 0


def _first(features: Features, count: int) -> Features:
    content = None if features.content is None else features.content[:count]
    return Features({name: m[:count] for name, m in features.maps.items()}, features.frame, content)


def _curve_json(recipe: TrainRecipe, curve: list[CurvePoint], chosen: bool) -> dict[str, Any]:
    return {
        "lr": recipe.lr,
        "weight_decay": recipe.weight_decay,
        "chosen": chosen,
        "curve": [asdict(point) for point in curve],
    }


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
