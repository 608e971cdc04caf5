"""A training with its labels read: the rows it trains on, its heads before the first step, where features come from."""

import shlex
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from featprobe.backbones.precision import resolve
from featprobe.cache import Cache, open_cache
from featprobe.cache.reader import FeatureLoader
from featprobe.errors import CacheError, ProbeError
from featprobe.features import Features
from featprobe.kinds import TrainRecipe
from featprobe.levels import FeatureLevel
from featprobe.probes import Head, HeadRecipe, build_head, load_head, plain
from featprobe.probes.train import Tuned
from featprobe.processes import check_batch, check_together
from featprobe.result_rows import ResultRow
from featprobe.specs import CacheDtype, Rows
from featprobe.stages.extraction.origin import spec_of
from featprobe.stages.memory import Portions, fitting
from featprobe.stages.recording.watch import Watch
from featprobe.stages.tasks.task import EVALUATION_BATCH, Outcome, Solution, Source, Task, Views
from featprobe.stages.training.read_labels import classes_of, labelled, without_views
from featprobe.stages.training.training import Training

if TYPE_CHECKING:
    from featprobe.backbones.backbone import Backbone


@dataclass(frozen=True)
class Prepared:
    """A training whose labels are read.

    rows: of train, the part that is trained on, val and test. task: what heads are trained and scored on. solver: of a
    kind that is not trained, else None. head: how its heads are built. portions: how many images are scored at once.
    notes: what a user should know, which grows on the way.
    """

    training: Training
    rows: Mapping[str, Rows]
    task: Task[Any]
    solver: Callable[..., Solution] | None
    head: HeadRecipe
    portions: Portions
    notes: list[str]

    @property
    def cache(self) -> Cache:
        """Its cache, with the groups of its split."""
        return self.training.cache

    def evaluate(self, heads: Sequence[Head], source: Source, rows: Rows, watch: Watch | None = None) -> list[Outcome]:
        """Scores of each head on the images that the rows show; raises ProbeError where the memory is too small.

        watch: gets what each head finds.
        """
        return self.portions.do(lambda batches: self.task.evaluate(heads, batches, rows, watch), source.batches)


@dataclass(frozen=True)
class Trial:
    """One head of a pass: its seed, its recipe, the head."""

    seed: int
    recipe: TrainRecipe
    head: Head


def guarded(training: Training) -> AbstractContextManager[None]:
    """What turns trouble of the device into words."""
    goes_on = "goes on from its last state" if training.tuning else "begins this training again"
    left = f"{training.title}: results and heads that were written stay. The same command {goes_on}."
    return fitting(training.device, left)


def prepare(training: Training) -> Prepared:
    """Read the labels of a training; raises FeatprobeError where it can't be done."""
    check_together()
    rows = dict(training.partition.rows)
    if training.augmentation:  # takes the place of stored views
        rows["train"] = without_views(training.cache, rows["train"])
    found = labelled(training, rows)
    if found.solver is None:
        check_batch(min(training.recipe.batch_size, len(found.rows["train"])), training.parts)
    options, notes = training.options, [*training.notes, *found.notes]
    classes = classes_of(training.task, training.partition.source, options)
    head = HeadRecipe(
        training.task, training.kind.name, classes, options.levels, options.width, options.pyramid, found.task.sides
    )
    portions = Portions(training.device, EVALUATION_BATCH, training.title, notes.append)
    return Prepared(training, found.rows, found.task, found.solver, head, portions, notes)


def trials_of(prepared: Prepared) -> list[Trial]:
    """The heads before the first step, those of each seed together."""
    training, trials = prepared.training, []
    for seed in training.seeds:
        for recipe in training.grid:
            torch.manual_seed(seed)  # the trials of one seed begin alike
            head = build_head(prepared.head, prepared.cache.levels)
            if training.tuning and training.tuning.init_head:
                _begin_at(prepared, head, Path(training.tuning.init_head))
            trials.append(Trial(seed, recipe, head.to(training.device)))
    return trials


def _begin_at(prepared: Prepared, head: Head, folder: Path) -> None:
    """Give a head the weights of a saved one; raises ProbeError where the two are not of one kind."""
    saved, card = load_head(folder, prepared.training.features, whole=True)
    wanted = prepared.head.to_json()
    same = {**card["head"], "sides": None} == plain({**wanted, "sides": None})
    if not same or saved.assignment != head.assignment:  # levels follow sizes
        raise ProbeError(
            f"{folder} holds another head than is trained here. Nothing was trained.\n"
            f"  wanted  {plain(wanted)}\n  found   {card['head']}"
        )
    _check_unseen(prepared.training, folder, card)
    head.load_state_dict(saved.state_dict())


def _check_unseen(training: Training, folder: Path, card: Mapping[str, Any]) -> None:
    """Raise ProbeError for a head that was trained on another split of this set: it may know the test images."""
    data, choice = card["data"], ResultRow.from_checked(card["result"]).choice
    own = [training.data.fingerprint, training.choice.key, training.choice.fold or None]
    found = [data["fingerprint"], choice.key, choice.fold or None]
    same = data["root"] == training.data.root or data["fingerprint"] == training.data.fingerprint
    if same and found != own:
        raise ProbeError(
            f"{folder} was trained on another split or version of {training.data.name}, and may know its test "
            f"images. Nothing was trained.\n  wanted  fingerprint, split and fold {own}\n  found   {found}\n"
            "Take a head of the same split and fold, or omit --init-head."
        )


class NoMaps(AbstractContextManager["NoMaps"]):
    """The source of heads that read pooled features, which their task takes from the cache: it gives no maps."""

    backbone = None

    def __exit__(self, *_: object) -> None:
        return None

    def batches(self, orders: Iterable[Rows]) -> Iterator[tuple[Rows, Features]]:
        """There are none."""
        raise TypeError("This source has no maps: heads of pooled features ask their task.")

    def training(self, orders: Iterable[Rows], first: int = 0) -> Generator[tuple[Rows | Views, Features]]:
        """There are none."""
        raise TypeError("This source has no maps: heads of pooled features ask their task.")

    def keep_on_device(self, splits: Mapping[str, Rows]) -> str:
        """Nothing is kept."""
        return ""

    def resident(self, rows: Rows) -> None:
        """No features lie on the device."""


def source_of(prepared: Prepared, head: Head, as_dtype: CacheDtype | None = None) -> AbstractContextManager[Source]:
    """Where the features for a head come from: the cache's file, or its images and a backbone.

    as_dtype: what stored features are brought to first; None for as they are.
    """
    training, tuning = prepared.training, prepared.training.tuning
    if tuning is None and training.kind.pooled:
        return NoMaps()
    if tuning is None:
        verify = training.options.verify
        return FeatureLoader(prepared.cache, head.levels, training.device, verify=verify, as_dtype=as_dtype)
    if tuning.precision:
        resolve(tuning.precision, training.device.type)  # refuses what this device can't compute
    from featprobe.stages.training.live import LiveFeatures  # torchvision takes time, and stored features need none

    return LiveFeatures(
        prepared.cache, _backbone(training, head.levels), training.device, prepared.task.truth_of,
        masks=prepared.task.masks, augmentation=training.augmentation, seed=training.seeds[0], workers=tuning.workers,
        precision=training.precision,
    )  # fmt: skip


def _backbone(training: Training, levels: Sequence[FeatureLevel]) -> "Backbone":
    """The backbone that the cache was made with, in evaluation mode; raises ProbeError when it can't be had."""
    from featprobe.backbones.backbone import load_backbone  # timm takes time, and features from a cache need none
    from featprobe.stages.extraction.same_network import check_same

    cache = training.partition.source
    spec = spec_of(cache)
    backbone = load_backbone(spec, [level.name for level in levels], training.device)
    if (backbone.identity, backbone.sha256) != (cache.recipe.backbone, cache.recipe.weights_sha256):
        raise _of_other_weights(cache, spec.label, backbone)
    backbone.fit(cache.recipe.frame, cache.recipe.sized)
    check_same(cache, backbone, training.device)
    backbone.compiled = bool(training.tuning and training.tuning.compile)
    return backbone


def _of_other_weights(cache: Cache, label: str, backbone: "Backbone") -> ProbeError:
    """The error for a cache whose label means another network, or other weights, by now."""
    recipe = cache.recipe
    remove = f"featprobe cache rm {shlex.quote(str(cache.path))} --yes"
    present = [other.path for other in _beside(cache) if other.recipe.weights_sha256 == backbone.sha256]
    if present:
        to_do = f"{present[0]} was made from what it is now. Remove the other file, then run the same command again:"
    else:
        to_do = f"Put the old weights back, or make a new file and remove this one:\n  {cache.contents.command}"
    return ProbeError(
        f"{cache.path} was made from other weights than {label} has now. Nothing was trained.\n"
        f"  wanted  {recipe.backbone}, sha256 {recipe.weights_sha256[:16]}…  (what the file was made from)\n"
        f"  found   {backbone.identity}, sha256 {backbone.sha256[:16]}…  (what {label} is now)\n"
        f"{to_do}\n  {remove}\nHeads on frozen features are trained from it as it is: featprobe probe"
    )


def _beside(cache: Cache) -> Iterator[Cache]:
    """The other caches of the same data set and label that can be opened."""
    for path in sorted(cache.path.parent.glob("*.h5")):
        with suppress(CacheError):
            other = open_cache(path)
            if path != cache.path and other.recipe.label == cache.recipe.label:
                yield other


def keep_on_device(prepared: Prepared, source: Source) -> str:
    """Move what fits to the GPU, the most used first; returns what lies there and what streams, "" for no GPU."""
    return source.keep_on_device({split: prepared.rows[split] for split in ("train", "val", "test")})


def placed(prepared: Prepared, source: Source, head: Head) -> dict[str, Any]:
    """Whether steps of a training find their batches on the device, and how: see `probes.train.train`."""
    if source.backbone is not None or not prepared.task.fixed(head):
        return {}
    return {"fixed": True, "resident": source.resident(prepared.rows["train"])}


def tuned(training: Training, source: Source, recipe: TrainRecipe) -> Tuned | None:
    """The backbone as training moves it; None where it is frozen."""
    backbone, how = source.backbone, training.tuning
    if how is None or training.regime != "full" or backbone is None:
        return None
    backbone.unfreeze(batch_norm=how.bn, checkpointing=how.checkpointing)
    groups = backbone.parameter_groups(how.backbone_lr * recipe.lr, recipe.weight_decay, how.layer_decay)
    return Tuned(backbone, groups, how.clip, how.accumulate, how.ema)
