"""A training, settled before anything is computed: what it is, where its results lie, and whether they are there."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch

from featprobe.cache import Cache
from featprobe.kinds import FROZEN, HeadKind, TrainRecipe, grid_of
from featprobe.probes.saved import read_card, read_results
from featprobe.processes import pick_device
from featprobe.result_rows import ResultRow
from featprobe.scores import SCORES, TaskScores
from featprobe.specs import DataInfo, FeatureRecipe, Precision, digest
from featprobe.splitting import SplitChoice
from featprobe.stages.extraction.crops import Augmentation
from featprobe.stages.partition import Partition
from featprobe.stages.training.probe_options import Budget, ProbeOptions, Regime, Tuning, settings_of
from featprobe.stages.training.saved_results import is_whole
from featprobe.stages.workspace import Workspace


@dataclass(frozen=True)
class Training:
    """The heads that share one pass over the rows of a cache. It computes nothing, and reads no label.

    partition: the cache under one split. options: with a head and a recipe, as `probe.checked` gives them; their split
    may have several folds; the partition has one of them. seeds: each has one head per recipe of the grid. fraction:
    the share of the training images that it uses.
    """

    workspace: Workspace
    partition: Partition
    task: str
    options: ProbeOptions
    seeds: tuple[int, ...]
    fraction: float = 1.0

    @property
    def recipe(self) -> TrainRecipe:
        """How its heads are trained."""
        assert self.options.recipe is not None  # filled in by probe.checked
        return self.options.recipe

    @property
    def kind(self) -> HeadKind:
        """The kind of its heads."""
        assert self.options.kind is not None  # filled in by probe.checked
        return self.options.kind

    @property
    def scores(self) -> TaskScores:
        """The scores of its task."""
        return SCORES[self.task]

    @property
    def chooses_by(self) -> str:
        """The validation score that trials and weights are chosen by."""
        return self.scores.main.name

    @property
    def tuning(self) -> Tuning | None:
        """What is done with images and a live backbone; None in the frozen regime."""
        return self.options.tuning

    @property
    def regime(self) -> Regime:
        """What moves, and what is looked at."""
        return self.options.regime

    @property
    def choice(self) -> SplitChoice:
        """Its split: one of the `single_splits`."""
        return self.partition.choice

    @property
    def cache(self) -> Cache:
        """Its cache, with the groups of its split."""
        return self.partition.cache

    @property
    def features(self) -> FeatureRecipe:
        """What its features are."""
        return self.partition.source.recipe

    @property
    def data(self) -> DataInfo:
        """What its cache says of the data set."""
        return self.partition.source.data

    @property
    def budget(self) -> Budget | None:
        """The result of its ladder; None where the number of iterations was given."""
        return self.options.budget if isinstance(self.options.budget, Budget) else None

    @property
    def grid(self) -> list[TrainRecipe]:
        """The recipes that each seed tries."""
        return grid_of(self.recipe, self.options.lr, self.options.weight_decay)

    @property
    def settings(self) -> dict[str, Any]:
        """The options that its task and its kind alone look at, as rows keep them; empty where there are none."""
        return {name: getattr(self.options, name) for name in settings_of(self.kind)}

    @property
    def is_solved(self) -> bool:
        """Whether its heads are solved, and not trained."""
        return self.kind.is_solved(self.regime)

    @property
    def draws(self) -> bool:
        """Whether its heads are solved, and what is solved depends on the seed."""
        return self.is_solved and self.kind.drawn

    @property
    def subset(self) -> str | None:
        """How a part of the training rows is drawn; None for all of them, or one part for all seeds."""
        return "by seed" if self.fraction < 1 and not self.options.shared_order else None

    @property
    def parts(self) -> int:
        """Parts of a batch that go forward one after another."""
        return self.tuning.accumulate if self.tuning else 1

    @property
    def is_fresh(self) -> bool:
        """Whether heads begin at random."""
        return not (self.tuning and self.tuning.init_head)

    @cached_property
    def device(self) -> torch.device:
        """Where it computes."""
        return pick_device(self.options.device)

    @property
    def precision(self) -> Precision:
        """What a live backbone computes in; a frozen one as extraction did, unless it is asked for."""
        if self.tuning and self.tuning.precision:
            return self.tuning.precision
        if self.device.type != "cuda":
            return "fp32"
        if self.regime != "full":
            return self.features.precision
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"

    @property
    def augmentation(self) -> Augmentation | None:
        """How training images vary; None for not at all."""
        return Augmentation() if self.tuning and self.tuning.augment else None

    @property
    def variation(self) -> dict[str, Any] | None:
        """The same as rows keep it, with the views that the cache holds; None for images as they are."""
        if self.augmentation:
            return self.augmentation.to_json()
        stored = self.features.further_views
        return {"views": list(stored)} if stored else None

    @cached_property
    def treatment(self) -> dict[str, Any] | None:
        """How images and backbone are treated, with all that decides the result; None in the frozen regime."""
        if self.tuning is None:
            return None
        start = self.tuning.init_head and read_card(Path(self.tuning.init_head))["head_sha256"]
        return self.tuning.to_json() | {"precision": self.precision, "init_head": start}

    @cached_property
    def key(self) -> str:
        """64 hex digits over all that decides a result, but for the cache, the seeds and the fold."""
        options, loop = self.options, self.recipe.to_json()
        rates, decays = options.chosen_from or (options.lr, options.weight_decay)
        if options.chosen_from:  # what was chosen may differ from seed to seed
            loop = {name: value for name, value in loop.items() if name not in ("lr", "weight_decay")}
        how = [
            options.shared_order, self.fraction, self.choice.key, options.instances, options.absent,
            *([self.treatment] if self.treatment else []), *([self.subset] if self.subset else []),
            *(["chosen by AP50"] if self.scores.objects else []), *(["ladder"] if self.budget else []),
            *([self.settings] if self.settings else []),
        ]  # fmt: skip
        asked = [options.levels, options.width, options.pyramid]
        return digest([self.task, self.kind.name, *asked, loop, rates, decays, *how])

    @property
    def recipe_key(self) -> str:
        """The first digits of `key`, as rows keep them."""
        return self.key[:8]

    @cached_property
    def comparison(self) -> str:
        """The same for trainings of all backbones that are compared, on whatever device: for a search for iterations.

        They agree in all that decides a training but the backbone, its levels and its input size.
        """
        options, features = self.options, self.features
        loop = {k: v for k, v in self.recipe.to_json().items() if k not in ("lr", "weight_decay")}
        tried = options.chosen_from or (
            options.lr or (self.recipe.lr,), options.weight_decay or (self.recipe.weight_decay,)
        )  # fmt: skip
        asked = self.treatment and {**self.treatment, "precision": self.tuning and self.tuning.precision}
        return digest([
            self.task, self.kind.name, options.width, options.pyramid, loop, tried, options.shared_order, self.fraction,
            self.choice.key, options.instances, options.absent, asked, self.subset, self.data.fingerprint,
            *features.shown, *([self.settings] if self.settings else []),
        ])  # fmt: skip

    @cached_property
    def folder(self) -> Path:
        """The folder of its heads, which holds one folder per seed."""
        own = digest([self.key, self.data.fingerprint])[:8]  # a set under other labels or splits has heads of its own
        name = "-".join([self.task, self.kind.name, *([] if self.regime == "frozen" else [self.regime]), own])
        fold = f"fold{self.choice.fold}" if self.choice.fold else ""
        path = self.partition.source.path
        return self.workspace.probes / path.parent.name / path.stem / name / fold

    @property
    def folders(self) -> list[str]:
        """The folder of each seed below probes/, as result rows name it."""
        own = self.folder.relative_to(self.workspace.probes)
        return [(own / f"seed{seed}").as_posix() for seed in self.seeds]

    @property
    def title(self) -> str:
        """Backbone, data, share, fold and seeds, for a person."""
        share = "" if self.fraction == 1 else f", {self.fraction:g} of train"
        fold = f", fold {self.choice.fold} of {self.choice.folds}" if self.choice.fold else ""
        seeds = ", ".join(map(str, self.seeds))
        return f"{self.features.label} on {self.data.name}{share}{fold}, seed {seeds}"

    @property
    def label(self) -> str:
        """The same with the task, the kind of head and the regime, where it is not the frozen one."""
        regime = "" if self.regime == FROZEN else f", {self.regime}"
        return f"{self.title}: {self.task} {self.kind.name}{regime}"

    @property
    def notes(self) -> list[str]:
        """What a user should know about its options."""
        if self.options.verify or self.regime != "frozen":
            return []
        return [f"{self.partition.source.path}: features are not hashed when they are read (no verify)"]

    def is_done(self, *, hashes: bool = False) -> bool:
        """Whether results.jsonl and the folders hold this very training, with files that are what their cards say.

        hashes: compare all bytes of the files, beside their sizes.
        """
        probes = self.workspace.probes
        last = _last_rows(probes / "results.jsonl", state_of(probes / "results.jsonl"))
        rows = [last.get((folder, self.data.fingerprint)) for folder in self.folders]
        return all(row is not None and is_whole(probes, row, hashes=hashes) for row in rows)


def state_of(path: Path) -> tuple[int, ...]:
    """What differs where a file, or the one behind a link, was written again, or grew: its inode, bytes and time.

    () where there is none.
    """
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


@lru_cache(1)
def _last_rows(path: Path, state: tuple[int, ...]) -> Mapping[tuple[str, str], ResultRow]:
    """The last row of each folder and data set of a file of results, parsed once as long as its state is the same."""
    return {(row.folder, row.data_fingerprint): row for row in read_results(path)[0]}
