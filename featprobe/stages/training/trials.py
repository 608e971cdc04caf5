"""Trials of heads over one cache: train, choose on validation, score on test once, save. Every regime goes this way."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from featprobe.backbones.precision import Precision, resolve
from featprobe.cache import Cache
from featprobe.cache.reader import FeatureLoader
from featprobe.datasets.images.reading import hash_image, read_levels, to_unit
from featprobe.disk import remove_leftovers
from featprobe.errors import DataError, DivergedError, ProbeError, counted
from featprobe.geometry import IDENTITY
from featprobe.kinds import KINDS, TrainRecipe
from featprobe.levels import FeatureLevel
from featprobe.probes import (
    CurvePoint,
    Head,
    HeadRecipe,
    append_row,
    build_head,
    grid_of,
    kept_point,
    load_head,
    make_folder,
    parameter_count,
    plain,
    save_head,
    train,
)
from featprobe.probes.saved import Checkpoint, read_card, read_rows
from featprobe.probes.train import Tuned
from featprobe.processes import check_batch, check_together, from_main, is_main, pick_device
from featprobe.report.sheets import Panel, save_sheet
from featprobe.result_rows import result_faults
from featprobe.scores import SCORES
from featprobe.specs import CacheDtype, Rows, digest
from featprobe.splitting import SplitChoice
from featprobe.stages.extraction.augment import Augmentation
from featprobe.stages.memory import Portions, fitting
from featprobe.stages.partition import regrouped, split_rows
from featprobe.stages.row_images import images_of, rows_of
from featprobe.stages.training.detection import Detection
from featprobe.stages.training.forecast import Forecast, foresee
from featprobe.stages.training.labels import shelf_of
from featprobe.stages.training.live import LiveFeatures
from featprobe.stages.training.logs import Recorder
from featprobe.stages.training.probe_options import Budget, ProbeOptions
from featprobe.stages.training.records import card_of, curve_json, extraction_seconds, row_of
from featprobe.stages.training.saved_results import is_whole
from featprobe.stages.training.segmentation import Segmentation
from featprobe.stages.training.solve import Solution, solve
from featprobe.stages.training.sources import Source, spec_of
from featprobe.stages.training.subset import training_subset
from featprobe.stages.training.task import EVALUATION_BATCH, Outcome, Task, spread_over
from featprobe.stages.workspace import Workspace
from featprobe.texts import printable

if TYPE_CHECKING:
    from featprobe.backbones.backbone import Backbone

Say = Callable[[str], None]
LADDERS = "ladders"  # folder of the states of searches for iterations, below probes/
CHECKPOINT_SECONDS = 60.0  # at least, between two states that are kept


@dataclass(frozen=True)
class Trial:
    """One head of a pass: its seed, its recipe, the head."""

    seed: int
    recipe: TrainRecipe
    head: Head


class Run:
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
        self.workspace, self.task_name, self.options, self.seeds = workspace, task, options, seeds
        self.cache, self.choice = regrouped(cache, options.split), SplitChoice.parse(options.split)
        self.fraction, self.notes = fraction, list[str]()
        if not options.verify and options.regime == "frozen":
            self.notes.append(f"{cache.path}: features are not hashed when they are read (no verify)")
        check_together()
        self.forecast: Forecast | None = None
        self.rehearsal = False  # whether the heads are not to be kept
        self.as_dtype: CacheDtype | None = None  # what cached features are brought to first; None for as they are
        self.states = list[Path]()  # of a rehearsal, on the way
        self.weights: dict[int, dict[str, Tensor]] = {}  # of the best trial's own backbone
        self.tuned_sha256, self.backbone_parameters, self.seconds_before = "", 0, 0.0
        self.classes, self.tuning, self.regime = cache.data.classes, options.tuning, options.regime
        assert options.recipe is not None and options.head is not None  # filled in by _checked
        self.recipe, self.kind = options.recipe, options.head
        self.device = pick_device(options.device)
        self.treatment = self._treatment()
        self.subset = "by seed" if fraction < 1 and not options.shared_order else None
        loop = self.recipe.to_json()
        rates, decays = options.chosen_from or (options.lr, options.weight_decay)
        if options.chosen_from:  # what was chosen may differ from seed to seed
            loop = {name: value for name, value in loop.items() if name not in ("lr", "weight_decay")}
        how = [
            options.shared_order, fraction, self.choice.key, options.instances, options.absent,
            *([self.treatment] if self.treatment else []), *([self.subset] if self.subset else []),
            *([] if task == "semseg" else ["chosen by AP50"]), *(["ladder"] if self.budget else []),
        ]  # fmt: skip
        key = digest([task, self.kind, options.levels, options.width, options.pyramid, loop, rates, decays, *how])
        self.recipe_key = key[:8]
        own = digest([key, cache.data.fingerprint])[:8]  # a set under other labels or splits has heads of its own
        name = "-".join([task, self.kind, *([] if self.regime == "frozen" else [self.regime]), own])
        fold = f"fold{self.choice.fold}" if self.choice.fold else ""
        self.folder = workspace.probes / cache.path.parent.name / cache.path.stem / name / fold
        self.portions = Portions(self.device, EVALUATION_BATCH, self.title, self.notes.append)
        self.rows = split_rows(self.cache, options.split)
        if self.augmentation:  # takes the place of stored views
            self.rows["train"] = without_views(self.cache, self.rows["train"])
        self.solver: Callable[..., Solution] | None = None  # of a kind that is not trained
        self.task = self._task()
        if self.kind != "ridge":
            check_batch(min(self.recipe.batch_size, len(self.rows["train"])), self.parts)
        self.head_recipe = HeadRecipe(
            task, self.kind, self.classes, options.levels, options.width, options.pyramid, self.task.sides
        )

    def do(self, say: Say) -> list[dict[str, Any]]:
        """Train on train, choose on val, score the chosen on test once; write heads, cards, curves, result rows.

        Several processes do that together; the main one alone writes.
        """
        with self._guarded():
            return self._do(say)

    def _do(self, say: Say) -> list[dict[str, Any]]:
        begun = time.perf_counter()
        for seed in self.seeds if is_main() else ():
            make_folder(self.folder / f"seed{seed}")  # now, and not after an hour of training
        trials = self._trials()
        self._note_absent(trials[0].head)
        with self.source(trials[0].head) as source:
            curves = self._fit(trials, source, say)
            chosen = [self._best(trials, curves, seed) for seed in self.seeds]
            trained = time.perf_counter()
            self._take_backbone(source, chosen[0])
            outcomes = self.evaluate([trials[i].head for i in chosen], source, self.rows["test"])
        seconds = {
            "train": trained - begun + self.seconds_before,
            "test": time.perf_counter() - trained,
            "extract": extraction_seconds(self.cache) if self.regime == "frozen" else None,
        }
        self.head = trials[chosen[0]].head
        return from_main(lambda: self._keep(trials, curves, chosen, outcomes, seconds))

    def validated(self) -> list[float]:
        """Train, choose on validation, and return each seed's score there; keeps no head, scores nothing on test."""
        with self._guarded():
            return self._validated()

    def _guarded(self) -> AbstractContextManager[None]:
        """What turns trouble of the device into words."""
        return fitting(self.device, self._after_failure)

    @property
    def _after_failure(self) -> str:
        """What is left of a training whose device failed, and how to go on."""
        goes_on = "goes on from its last state" if self.tuning else "begins this training again"
        return f"{self.title}: results and heads that were written stay. The same command {goes_on}."

    def _validated(self) -> list[float]:
        self.rehearsal = True
        trials = self._trials()
        with self.source(trials[0].head) as source:
            curves = self._fit(trials, source, lambda line: None)
        chosen = [self._best(trials, curves, seed) for seed in self.seeds]
        for path in self.states if is_main() else ():
            path.unlink(missing_ok=True)
        return [self.kept(trials[i], curves[i]).scores[self.chooses_by] for i in chosen]

    def judged(self) -> list[Outcome]:
        """Train on cached features, choose on validation, and score each seed's head there, image by image.

        Keeps no head, and looks at no label of test.
        """
        with self._guarded():
            trials = self._trials()
            with self.source(trials[0].head) as source:
                curves = self._fit(trials, source, lambda line: None)
                heads = [trials[self._best(trials, curves, seed)].head for seed in self.seeds]
                return self.evaluate(heads, source, self.rows["val"])

    def evaluate(self, heads: Sequence[Head], source: Source, rows: Rows) -> list[Outcome]:
        """Scores of each head on the images that the rows show; raises ProbeError where the memory is too small."""
        return self.portions.do(lambda batches: self.task.evaluate(heads, batches, rows), source.batches)

    def kept(self, trial: Trial, curve: Sequence[CurvePoint]) -> CurvePoint:
        """The point of a trial's curve whose weights are kept."""
        return kept_point(curve, trial.recipe, self.chooses_by)

    @property
    def chooses_by(self) -> str:
        """The validation score that trials and weights are chosen by."""
        return SCORES[self.task_name].main.name

    @property
    def comparison(self) -> str:
        """The same for trainings of all backbones that are compared, on whatever device: for a search for iterations.

        They agree in all that decides a training but the backbone, its levels and its input size.
        """
        options, features = self.options, self.cache.recipe
        loop = {k: v for k, v in self.recipe.to_json().items() if k not in ("lr", "weight_decay")}
        tried = options.chosen_from or (
            options.lr or (self.recipe.lr,), options.weight_decay or (self.recipe.weight_decay,)
        )  # fmt: skip
        asked = self.treatment and {**self.treatment, "precision": self.tuning and self.tuning.precision}
        return digest([
            self.task_name, self.kind, options.width, options.pyramid, loop, tried, options.shared_order, self.fraction,
            self.choice.key, options.instances, options.absent, asked, self.subset, self.cache.data.fingerprint,
            *features.shown,
        ])  # fmt: skip

    @property
    def budget(self) -> Budget | None:
        """What a ladder found; None for a number of iterations that was given."""
        return self.options.budget if isinstance(self.options.budget, Budget) else None

    def _keep(
        self,
        trials: Sequence[Trial],
        curves: Sequence[list[CurvePoint]],
        chosen: Sequence[int],
        outcomes: Sequence[Outcome],
        seconds: Mapping[str, Any],
    ) -> list[dict[str, Any]]:
        """Write the chosen heads and their rows; returns the rows."""
        rows = []
        for seed, index, outcome in zip(self.seeds, chosen, outcomes, strict=True):
            row = row_of(self, trials[index], curves[index], outcome, len(curves) // len(self.seeds), seconds)
            own = [i for i, trial in enumerate(trials) if trial.seed == seed]
            kept = [curve_json(trials[i].recipe, curves[i], i == index) for i in own]
            files = {**outcome.files, "curves.json": json.dumps(plain(kept)).encode()}
            tensors = self.weights.get(index, {})
            save_head(
                self.folder / f"seed{seed}", trials[index].head, card_of(self, row, curves[index]), files, tensors
            )
            append_row(self.workspace.probes / "results.jsonl", row)
            rows.append(row)
        self.forget()
        return rows

    def forget(self) -> None:
        """Remove what a kill right after the end of trainings leaves: their state, and what was being written."""
        for path in (self.folder / f"seed{self.seeds[0]}").glob("checkpoint*"):
            path.unlink(missing_ok=True)
        for folder in self.folders:
            remove_leftovers(self.workspace.probes / folder)

    @property
    def folders(self) -> list[str]:
        """Of its results, one a seed, as rows name them."""
        own = self.folder.relative_to(self.workspace.probes)
        return [(own / f"seed{seed}").as_posix() for seed in self.seeds]

    def is_done(self, *, hashes: bool = False) -> bool:
        """Whether results.jsonl and the folders hold this very run, with files that are what their cards say.

        hashes: compare all bytes of the files, beside their sizes.
        """
        rows, _ = read_rows(self.workspace.probes / "results.jsonl", result_faults)
        last = {row["folder"]: row for row in rows if row["data_fingerprint"] == self.cache.data.fingerprint}
        probes = self.workspace.probes
        return all(folder in last and is_whole(probes, last[folder], hashes=hashes) for folder in self.folders)

    def show(self, count: int) -> Path:
        """Write a sheet image | truth | prediction of test images, from those with most to see to those with least."""
        with self._guarded(), self.source(self.head) as source:
            self._take_backbone(source, next(iter(self.weights), 0))
            test = self.rows["test"]
            chosen = spread_over(images_of(self.cache, test), self.task.fullness, count)
            panels = []
            for image, draw in self.task.panels(self.head, source.batches, rows_of(self.cache, test, chosen)):
                path = Path(self.cache.data.root) / self.cache.images.texts["image"][image]
                if hash_image(path) != self.cache.images.texts["image_hash"][image]:
                    raise DataError(f"{path} is not the image that {self.cache.path} was made from")
                pixels = to_unit(read_levels(path), self.cache.recipe.window, self.cache.recipe.policy)
                panels.append((self.cache.images.texts["id"][image], [Panel(pixels), *draw(pixels)]))
        path = self.folder / f"seed{self.seeds[0]}" / "sheet.png"
        save_sheet(path, panels, ["image", "truth", f"prediction ({self.cache.recipe.label})"], self.classes)
        return path

    def source(self, head: Head) -> AbstractContextManager[Source]:
        """Where the features for a head come from: the cache's file, or its images and a backbone."""
        if self.tuning is None:
            return FeatureLoader(
                self.cache, head.levels, self.device, verify=self.options.verify, as_dtype=self.as_dtype
            )
        if self.tuning.precision:
            resolve(self.tuning.precision, self.device)  # refuses what this device can't compute
        return LiveFeatures(
            self.cache, self._backbone(head.levels), self.device, self.task.truth_of, masks=self.task.masks,
            augmentation=self.augmentation, seed=self.seeds[0], workers=self.tuning.workers, precision=self.precision,
        )  # fmt: skip

    def _treatment(self) -> dict[str, Any] | None:
        """How images and backbone are treated, with all that decides the result; None in the frozen regime."""
        if self.tuning is None:
            return None
        start = self.tuning.init_head and read_card(Path(self.tuning.init_head))["head_sha256"]
        return self.tuning.to_json() | {"precision": self.precision, "init_head": start}

    @property
    def parts(self) -> int:
        """Parts of a batch that go forward one after another."""
        return self.tuning.accumulate if self.tuning else 1

    @property
    def augmentation(self) -> Augmentation | None:
        """How training images vary; None for not at all."""
        return Augmentation() if self.tuning and self.tuning.augment else None

    @property
    def variation(self) -> dict[str, Any] | None:
        """The same as rows keep it, with the views that the cache holds; None for images as they are."""
        if self.augmentation:
            return self.augmentation.to_json()
        stored = self.cache.recipe.further_views
        return {"views": list(stored)} if stored else None

    @property
    def precision(self) -> Precision:
        """What a live backbone computes in; a frozen one as extraction did, unless it is asked for."""
        if self.tuning and self.tuning.precision:
            return self.tuning.precision
        if self.device.type != "cuda":
            return "fp32"
        if self.regime != "full":
            return self.cache.recipe.precision
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"

    def _backbone(self, levels: Sequence[FeatureLevel]) -> "Backbone":
        """The backbone that the cache was made with, in evaluation mode; raises ProbeError when it can't be had."""
        from featprobe.backbones.backbone import load_backbone  # timm takes time, and features from a cache need none

        spec = spec_of(self.cache)
        backbone = load_backbone(spec, [level.name for level in levels], self.device)
        if backbone.sha256 != self.cache.recipe.weights_sha256:
            raise ProbeError(
                f"{self.cache.path} was made from other weights than {spec.label} has now. Nothing was trained.\n"
                f"  wanted  sha256 {self.cache.recipe.weights_sha256[:16]}…\n  found   sha256 {backbone.sha256[:16]}…"
            )
        backbone.fit(self.cache.recipe.frame, self.cache.recipe.sized)
        backbone.compiled = bool(self.tuning and self.tuning.compile)
        return backbone

    def _take_backbone(self, source: Source, index: int) -> None:
        """Let a source compute with the backbone of a trial, where trials have one of their own."""
        if source.backbone is not None and index in self.weights:
            from featprobe.backbones.weights import weights_sha256

            source.backbone.model.load_state_dict(self.weights[index])
            source.backbone.eval()
            self.tuned_sha256 = weights_sha256(source.backbone.model)

    def _task(self) -> Task[Any]:
        if self.task_name == "semseg":
            self._take_fraction(lambda row: shelf_of(self.cache).values(self.cache, row))
            views = self.augmentation is not None
            dense = Segmentation(
                self.cache, self.rows["train"], self.recipe, self.device, self.options.absent, views=views
            )
            self.solver = partial(solve, dense) if KINDS[self.kind].solved else None
            return dense
        masks, source = self.task_name == "instseg", self.options.instances
        everything = Detection(self.cache, self.rows["train"], self.device, masks=masks, source=source)
        self._take_fraction(lambda row: everything.targets[row].labels.tolist())
        if self.fraction == 1:
            return everything
        return Detection(self.cache, self.rows["train"], self.device, masks=masks, source=source)

    def _take_fraction(self, classes_in: Callable[[int], list[int]]) -> None:
        train = self.rows["train"]
        if self.fraction < 1:
            classes: dict[int, set[int]] = {}
            for row, image in zip(train.tolist(), self.cache.image_of[train].tolist(), strict=True):
                classes.setdefault(image, set()).update(classes_in(row))
            ids, groups = ([self.cache.images.texts[name][image] for image in classes] for name in ("id", "group"))
            seed = self.seeds[0] if self.subset else None
            kept = training_subset(ids, groups, list(classes.values()), self.fraction, seed)
            self.rows["train"] = rows_of(self.cache, train, np.array(list(classes), dtype=np.intp)[kept])

    def _trials(self) -> list[Trial]:
        recipes = grid_of(self.recipe, self.options.lr, self.options.weight_decay)
        trials = []
        for seed in self.seeds:
            for recipe in recipes:
                torch.manual_seed(seed)  # the trials of one seed begin alike
                head = build_head(self.head_recipe, self.cache.levels)
                if self.tuning and self.tuning.init_head:
                    self._begin_at(head, Path(self.tuning.init_head))
                trials.append(Trial(seed, recipe, head.to(self.device)))
        return trials

    def _begin_at(self, head: Head, folder: Path) -> None:
        """Give a head the weights of a saved one; raises ProbeError where the two are not of one kind."""
        saved, card = load_head(folder, self.cache.recipe, whole=True)
        same = {**card["head"], "sides": None} == plain({**self.head_recipe.to_json(), "sides": None})
        if not same or saved.assignment != head.assignment:  # levels follow sizes
            raise ProbeError(
                f"{folder} holds another head than is trained here. Nothing was trained.\n"
                f"  wanted  {plain(self.head_recipe.to_json())}\n  found   {card['head']}"
            )
        self._check_unseen(folder, card)
        head.load_state_dict(saved.state_dict())

    def _check_unseen(self, folder: Path, card: Mapping[str, Any]) -> None:
        """Raise ProbeError for a head that was trained on another split of this set: it may know the test images."""
        result, data = card["result"], card["data"]
        own = [self.cache.data.fingerprint, self.choice.key, self.choice.fold or None]
        found = [data["fingerprint"], SplitChoice.parse(result["split"]).key, result.get("fold")]
        same = data["root"] == self.cache.data.root or data["fingerprint"] == self.cache.data.fingerprint
        if same and found != own:
            raise ProbeError(
                f"{folder} was trained on another split or version of {self.cache.data.name}, and may know its test "
                f"images. Nothing was trained.\n  wanted  fingerprint, split and fold {own}\n  found   {found}\n"
                "Take a head of the same split and fold, or leave --init-head away."
            )

    @property
    def fresh(self) -> bool:
        """Whether heads begin at random."""
        return not (self.tuning and self.tuning.init_head)

    def _note_absent(self, head: Head) -> None:
        absent = [name for name, count in self.counts(head).items() if not count]
        if absent:
            self.notes.append(f"{self.cache.data.name}: no training example of {', '.join(absent)}")

    def _fit(self, trials: Sequence[Trial], source: Source, say: Say) -> list[list[CurvePoint]]:
        """The curve of every trial; all heads over the same features, or one after another with a backbone each."""
        where = self._settle(source)
        if self.solver is not None:
            if where:
                say(f"{self.title}: {where}")
            return self._solve(trials, source, self.solver)
        if self.forecast is None:
            self.forecast = foresee(self, trials, source)
            say(f"{self.forecast_text}; {where}" if where else self.forecast_text)
        backbone = source.backbone
        if self.regime != "full" or backbone is None:
            return self._train(trials, source)
        curves: list[list[CurvePoint]] = []
        fresh = backbone.tensors()
        for index, trial in enumerate(trials):
            backbone.model.load_state_dict(fresh)
            try:
                curves += self._train([trial], source, index)
            except DivergedError:
                curves.append([])
            if index in self._scores(trials, curves) and self._best(trials, curves, trial.seed) == index:
                self.weights = {index: backbone.tensors()}
        return curves

    def _settle(self, source: Source) -> str:
        """Move what fits to the GPU, the most used first; returns what lies there and what streams, "" for no GPU."""
        return source.keep_on_device({split: self.rows[split] for split in ("train", "val", "test")})

    def _train(self, trials: Sequence[Trial], source: Source, index: int = 0) -> list[list[CurvePoint]]:
        try:
            return self._trained(trials, source, index)
        except torch.OutOfMemoryError as error:  # of a batch that holds more than those of the forecast
            found = str(error).splitlines()[0]
        images, half = -(-self.recipe.batch_size // self.parts), self.recipe.batch_size // 2
        advice = f"--accumulate {2 * self.parts}" if self.regime == "full" else f"--batch-size {half}"
        few = "Take fewer --levels, a smaller --size, or --device cpu."
        raise ProbeError(
            f"{self.title}: the memory of {self.device} does not hold every training step, though the first ones fit.\n"
            f"  wanted  {counted(images, 'image')} at once\n  found   {found}\n"
            f"Heads that were written stay. {f'Half as many at once:  {advice}' if images > 1 else few}"
        )

    def _trained(self, trials: Sequence[Trial], source: Source, index: int) -> list[list[CurvePoint]]:
        heads = [trial.head for trial in trials]
        loss = self.task.start(heads, fresh=self.fresh)
        bar = tqdm(
            total=self.recipe.iterations, desc=printable(self.title), unit="it",
            disable=self.options.quiet or not is_main(), leave=False,
        )  # fmt: skip
        with bar, self._recorder(trials, index) as recorder:

            def taken(losses: Tensor) -> None:
                bar.update()
                recorder.take(losses)

            def evaluate() -> list[dict[str, float]]:
                scores = [o.brief for o in self.evaluate(heads, source, self.rows["val"])]
                recorder.scores = scores
                return scores

            def progress(step: int, mean: float) -> None:
                bar.set_postfix_str(f"loss {mean:.3f}")
                recorder.mark(step)

            checkpoint = self._checkpoint(index)
            curves = train(
                heads, [trial.recipe for trial in trials], source.training, self.rows["train"], loss, self.seeds[0],
                evaluate, progress, self.tuned(source, trials[0].recipe), checkpoint,
                self.chooses_by if self.recipe.weights_from == "best" else None, taken=taken,
                **self.placed(source, heads[0]),
            )  # fmt: skip
            self.seconds_before += checkpoint.before if checkpoint else 0.0
            return curves

    def placed(self, source: Source, head: Head) -> dict[str, Any]:
        """Whether steps of a training find their batches on the device, and how: see `probes.train.train`."""
        if source.backbone is not None or not self.task.fixed(head):
            return {}
        return {"fixed": True, "resident": source.resident(self.rows["train"])}

    def _recorder(self, trials: Sequence[Trial], first: int) -> Recorder:
        """What logs a training; each trial beside its head, in a folder of its own where there are several."""
        grid = len(grid_of(self.recipe, self.options.lr, self.options.weight_decay))
        places = []
        for index, trial in enumerate(trials, first):
            folder = self.folder / f"seed{trial.seed}" / "log" / (f"trial{index % grid}" if grid > 1 else "")
            what = {"task": self.task_name, "head": self.kind, "regime": self.regime, "fraction": self.fraction}
            config = {**what, "backbone": self.cache.recipe.label, "data": self.cache.data.name, "seed": trial.seed}
            name = f"{self.title}: {self.kind}, {self.regime}"
            places.append((folder, name, {**config, **trial.recipe.to_json(), "tuning": self.treatment}))
        return Recorder(self.options.log, places, [trial.recipe for trial in trials])

    def tuned(self, source: Source, recipe: TrainRecipe) -> Tuned | None:
        """The backbone as training moves it; None where it is frozen."""
        backbone, how = source.backbone, self.tuning
        if how is None or self.regime != "full" or backbone is None:
            return None
        backbone.unfreeze(batch_norm=how.bn, checkpointing=how.checkpointing)
        self.backbone_parameters = parameter_count(backbone)
        groups = backbone.parameter_groups(how.backbone_lr * recipe.lr, recipe.weight_decay, how.layer_decay)
        return Tuned(backbone, groups, how.clip, how.accumulate, how.ema)

    def _checkpoint(self, index: int) -> Checkpoint | None:
        """Where a training with a live backbone keeps its state, at the end of a pass over the training rows."""
        if self.tuning is None:
            return None
        identity = digest([self.recipe_key, self.cache.recipe.key, self.cache.data.fingerprint, self.seeds, index])
        every = max(1, len(self.rows["train"]) // self.recipe.batch_size)
        path = self.folder / f"seed{self.seeds[0]}" / f"checkpoint{index}.pt"
        if self.rehearsal:
            path = self.workspace.probes / LADDERS / f"checkpoint-{identity[:16]}.pt"
            self.states.append(path)
        return Checkpoint(path, identity, every, self.recipe.iterations, CHECKPOINT_SECONDS)

    def _solve(
        self, trials: Sequence[Trial], source: Source, solver: Callable[..., Solution]
    ) -> list[list[CurvePoint]]:
        """Solve for a head that is trained by no iteration; the main process does."""
        levels, train, val = trials[0].head.levels, self.rows["train"], self.rows["val"]
        solution = from_main(
            lambda: self.portions.do(lambda batches: solver(levels, batches, train, val), source.batches)
        )
        self.ridge = solution.chosen
        for trial in trials:
            trial.head.load_state_dict(solution.state)
            trial.head.eval()
        brief = self.evaluate([trials[0].head], source, self.rows["val"])[0].brief
        return [[CurvePoint(1, 0.0, brief)] for _ in trials]

    def foresee(self) -> Forecast:
        """How long training will take, from a few steps; raises ProbeError where one does not fit the memory."""
        with self._guarded():
            trials = self._trials()
            with self.source(trials[0].head) as source:
                self._settle(source)
                return foresee(self, trials, source)

    @property
    def forecast_text(self) -> str:
        """How long training will take, for a person."""
        count = len(self.seeds) * len(grid_of(self.recipe, self.options.lr, self.options.weight_decay))
        how = "one after another" if self.regime == "full" else "at once"
        many = f", {count} heads {how}" if count > 1 else ""
        regime = "" if self.regime == "frozen" else f", {self.regime}"
        split = "" if self.options.split == "own" or self.choice.fold else f", {self.choice.text}"
        minutes = "" if self.forecast is None else f", about {self.forecast.seconds(self.recipe) / 60:.1f} min"
        return (
            f"{self.title} ({self.cache.path}): {self.task_name} {self.kind}{regime}{many}{split}, "
            f"{self.recipe.iterations} iterations{minutes} on {self.device}"
        )

    def _scores(self, trials: Sequence[Trial], curves: Sequence[list[CurvePoint]]) -> dict[int, float]:
        """Validation score of the weights that are kept, of every trial that has ended so far."""
        return {
            i: self.kept(trials[i], curve).scores[self.chooses_by]
            for i, (_, curve) in enumerate(zip(trials, curves, strict=False))
            if curve and curve[-1].iteration == self.recipe.iterations
        }

    def _best(self, trials: Sequence[Trial], curves: Sequence[list[CurvePoint]], seed: int) -> int:
        """The trial of a seed that scores highest on validation, the first of equals; raises DivergedError."""
        scores = {i: score for i, score in self._scores(trials, curves).items() if trials[i].seed == seed}
        if not scores:
            raise DivergedError(f"No trial of seed {seed} ended with a finite loss. Try smaller --lr.")
        return max(scores, key=lambda i: (-1.0 if np.isnan(scores[i]) else scores[i], -i))

    def counts(self, head: Head) -> dict[str, int]:
        """Training examples of each class."""
        return self.task.train_counts(head)

    @property
    def title(self) -> str:
        """Backbone, data, share, fold and seeds, for a person."""
        share = "" if self.fraction == 1 else f", {self.fraction:g} of train"
        fold = f", fold {self.choice.fold} of {self.choice.folds}" if self.choice.fold else ""
        seeds = ", ".join(map(str, self.seeds))
        return f"{self.cache.recipe.label} on {self.cache.data.name}{share}{fold}, seed {seeds}"


def without_views(cache: Cache, rows: Rows) -> Rows:
    """Those of the rows that show an image, or a tile of one, as it is."""
    plain = [(part := cache.rows.part_of(row)) is None or part.view == IDENTITY for row in rows.tolist()]
    return rows[np.array(plain, dtype=bool)]
