"""Labels of images, or of tiles: the task of heads that read one vector per image."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from featprobe.cache import Cache
from featprobe.errors import ProbeError, counted
from featprobe.features import Features, pool
from featprobe.geometry import Part
from featprobe.image_labels import ImageLabels, ImageTruth, LabelNames, Unit
from featprobe.levels import FeatureLevel
from featprobe.metrics.images import (
    IMAGE_SCORES,
    ScoredImages,
    decide,
    defect_scores,
    image_scores,
    one_group,
    value_of,
)
from featprobe.probes.head import ImageHead
from featprobe.probes.train import Feed
from featprobe.processes import from_main, gathered, is_main, summed
from featprobe.report.sheets import Panel
from featprobe.scores import TaskScores
from featprobe.specs import Rows
from featprobe.stages.image_truth import defect_regions, says_good, truth_of, unit_names, units_of
from featprobe.stages.memory import Batches
from featprobe.stages.pooled import pooled_vectors
from featprobe.stages.recording.watch import Handed, Watch
from featprobe.stages.row_images import images_of
from featprobe.stages.tasks.seen import hand_over
from featprobe.stages.tasks.settle import settled
from featprobe.stages.tasks.task import (
    Batch,
    Draw,
    Outcome,
    Solution,
    Truth,
    Views,
    evaluation_batches,
    scored_here,
)
from featprobe.targets import IGNORE, Instance, Labels

Shares = NDArray[np.float32]
"""(units, names), in [0, 1]."""
LIKELIEST = 3  # labels in a picture's text, where no more are decided


@dataclass(frozen=True)
class LabelsAsked:
    """Which labels of a set heads are trained on, and how: as `stages.training.probe_options` has them.

    scores: of the task. live: whether heads are trained on what a feed brings, and not on the cache's pooled features.
    quiet: show no progress while features are pooled.
    """

    labels: ImageLabels
    unit: Unit
    false_calls: float
    scores: TaskScores
    live: bool
    quiet: bool = False


class Classification:
    """The labels of a cache's units as heads of pooled features are trained and scored on them.

    train: rows that heads are trained on; those of a live backbone show a unit each. notes: what pooling has to say;
    `settle` returns it. See `task.Task`.
    """

    masks = False
    sides: tuple[float, ...] = ()

    def __init__(self, cache: Cache, train: Rows, device: torch.device, asked: LabelsAsked) -> None:
        self.cache, self.train, self.device, self.asked = cache, train, device, asked
        self.truth: ImageTruth = truth_of(cache, asked.labels, asked.unit)
        self.names = self.truth.names
        self.notes: list[str] = []

    def labels_of(self, row: int) -> list[int]:
        """Which labels the unit that a row shows has."""
        (unit,) = units_of(self.cache, np.array([row]), self.asked.unit)
        return np.flatnonzero(self.truth.values[unit] == 1).tolist()

    def train_counts(self, head: ImageHead) -> dict[str, int]:
        """Training units that have each label."""
        held = self._labels(self._units(self.train)).sum(0, dtype=torch.int64)
        return dict(zip(self.names.names, held.tolist(), strict=True))

    def truth_of(self, row: int) -> Truth:
        """The mask of a row where its labels follow from masks: a view of it has the labels of what it shows.

        Else nothing: a view has the labels of its image.
        """
        return (self.cache.semantic(row) if self._of_masks else None), None

    @cached_property
    def _of_masks(self) -> bool:
        """Whether the labels of all training rows follow from their masks."""
        own = self.asked.labels == "own" or says_good(self.cache, self.asked.labels, self.asked.unit)
        return not own and all(self.cache.rows[row].semantic for row in self.train.tolist())

    def check_trainable(self) -> None:
        """Raise ProbeError where all training units have the same labels."""
        labels = self._labels(self._units(self.train))
        if bool((labels != labels[:1]).any()):
            return
        raise ProbeError(_one_kind(self.cache, labels, self.names.names, self.asked.unit))

    def solve(self, head: ImageHead, seed: int, batches: Batches, train: Rows, val: Rows) -> Solution:
        """The head that its kind solves for on the training units; what it chooses is chosen on validation."""
        units, vectors = self._vectors(head.levels, batches, train)
        others, shown = self._vectors(head.levels, batches, val)
        scores, found = self.asked.scores, list[float]()

        def judge(logits: Tensor) -> float:
            scored = self._scored(head, others, probabilities_of(logits, self.names))
            found.append(value_of(IMAGE_SCORES[scores.main.name](scored, one_group(len(others)))))
            return found[-1]

        chosen = head.solve(vectors, self._labels(units), shown, judge, multi=self.names.multi)
        if np.isnan(found).all():
            self.notes.append(f"{self.cache.data.name}: {_not_chosen(scores)}")
        return Solution({name: value.cpu() for name, value in head.state_dict().items()}, chosen)

    def start(self, heads: Sequence[ImageHead], *, fresh: bool = True) -> Callable[[Features, Batch], Tensor]:
        """Let heads begin at the training units' prior, fresh ones at mean and scale, too; returns their losses."""
        levels, labels = heads[0].levels, self._labels(self._units(self.train))
        if fresh:
            vectors = from_main(lambda: self._stored(levels, self.train)).to(self.device)
            for head in heads:
                head.begin(vectors, labels, multi=self.names.multi)
        for head in heads:  # what one is saved with may be of other images
            head.prior.copy_(labels.float().mean(0))
        every = self._labels(np.arange(len(self.truth.values)))

        def loss(features: Features, batch: Batch) -> Tensor:
            match batch:
                case Tensor():
                    raise TypeError("The loss of these heads takes rows, not their places: see `fixed`.")
                case Views():
                    rows, seen = batch.rows, batch.labels
                case rows:
                    seen = None
            wanted = every[torch.from_numpy(units_of(self.cache, rows, self.asked.unit)).to(self.device)]
            if seen is not None:
                wanted = labels_seen(seen.to(self.device), wanted, len(self.cache.data.classes), self.names)
            vectors = pool(features, levels).vectors(levels)
            return torch.stack([cross_entropy(head(vectors), wanted.float(), multi=self.names.multi) for head in heads])

        return loss

    def fixed(self, head: ImageHead) -> bool:
        """Whether the loss of such a head also takes places of rows: it does not."""
        return False

    def evaluate(self, heads: Sequence[ImageHead], feed: Feed, rows: Rows, watch: Watch | None = None) -> list[Outcome]:
        """Scores of each head on the units that the rows show, which several processes share out among them.

        watch: gets what `handed` says.
        """
        units, found = self._probabilities(heads, feed, rows)
        if watch is not None and self.handed != "nothing" and is_main():
            hand_over(self.cache, units.tolist(), _scores(found, self.names, self._good), self.asked.unit, watch)
        return from_main(lambda: [self._outcome(head, units, p) for head, p in zip(heads, found, strict=True)])

    def settle(self, heads: Sequence[ImageHead], feed: Feed, val: Rows) -> list[str]:
        """Set each head's threshold from the good units of validation; returns notes."""
        name = self.cache.data.name
        if not self.names.says_good:
            return [*self.notes, f"{name}: no label says which images are good, so there is no threshold and no recall"]
        units, found = self._probabilities(heads, feed, val)
        good, notes = self.truth.good[units] == 1, dict.fromkeys(self.notes)
        for head, probabilities in zip(heads, found, strict=True):
            scores = defect_scores(probabilities[good], self.names.multi, self._good)
            known = [] if scores is None else scores.tolist()
            threshold, note = settled(known, self.asked.false_calls, self.asked.unit)
            head.threshold.fill_(threshold)
            notes |= {f"{name}: {note}": None} if note else {}
        return list(notes)

    def shown(self, head: ImageHead, feed: Feed, rows: Rows, count: int) -> Rows:
        """Some of the images that the rows show, from the worst mistake on; first one of each group, then more."""
        units, (found,) = self._said([head], feed, rows)
        true = self.truth.values[units]
        share = balanced(found, head.prior.cpu().numpy(), self.names)
        worst = np.abs(true - share).max(1)
        order = units[np.argsort(-worst, kind="stable")]
        images = list(dict.fromkeys((order if self.asked.unit == "image" else self.cache.image_of[order]).tolist()))
        groups, seen = self.cache.images.column("group"), dict[str, int]()
        for image in images:
            seen.setdefault(groups[image], image)
        first = list(seen.values())
        return np.array([*first, *(image for image in images if image not in first)][:count], dtype=np.intp)

    def panels(self, head: ImageHead, feed: Feed, rows: Rows) -> Iterable[tuple[int, Draw]]:
        """(image, what draws truth and prediction over it) for each image that the rows show."""
        units, (found,) = self._said([head], feed, rows)
        prior, true = head.prior.cpu().numpy(), self.truth.values[units]
        said, shares = decide(found, prior, self.names.multi), balanced(found, prior, self.names)
        shows = units if self.asked.unit == "image" else self.cache.image_of[units]
        for image in images_of(self.cache, rows).tolist():
            own = np.flatnonzero(shows == image)
            if self.asked.unit == "image":
                wrong = bool((true[own] != said[own]).any())
                truth = label_text(true[own[0]], None, self.names)
                text = label_text(said[own[0]], shares[own[0]], self.names, true[own[0]])
                yield image, partial(_captioned, _defects(self.cache, image), (truth, text), wrong)
            else:
                parts = [self.cache.rows.part_of(unit) for unit in units[own].tolist()]
                boxes = [tile_boxes(list(zip(parts, labels[own], strict=True)), self.names) for labels in (true, said)]
                yield image, partial(_boxed, boxes)

    @property
    def handed(self) -> Handed:
        """The score of a defect of each tile or image, where the labels say which are good."""
        return "nothing" if not self.names.says_good else "objects" if self.asked.unit == "tile" else "scores"

    @property
    def colours(self) -> tuple[str, ...]:
        """What pictures have colours for, the good label or none first; of whole images nothing."""
        return colours_of(self.names) if self.asked.unit == "tile" else ()

    @property
    def _good(self) -> int | None:
        """The place of the label that says good."""
        return None if self.names.good is None else self.names.names.index(self.names.good)

    def _units(self, rows: Rows) -> Rows:
        """The units that rows show, ascending."""
        return np.unique(units_of(self.cache, rows, self.asked.unit))

    def _labels(self, units: Rows) -> Tensor:
        """(units, names), uint8, on the device."""
        return torch.from_numpy(self.truth.values[units]).to(self.device)

    def _vectors(self, levels: Sequence[FeatureLevel], feed: Feed, rows: Rows) -> tuple[Rows, Tensor]:
        """(the units that rows show, ascending; the vector of each, on the device)."""
        units = units_of(self.cache, rows, self.asked.unit)
        if not self.asked.live:
            return np.unique(units), self._stored(levels, rows).to(self.device)
        found = [pool(features, levels).vectors(levels) for _, features in feed(evaluation_batches(rows))]
        empty = torch.zeros(0, sum(2 * level.channels for level in levels), device=self.device)
        order = np.argsort(units, kind="stable")
        return units[order], torch.cat([empty, *found])[torch.from_numpy(order).to(self.device)]

    def _stored(self, levels: Sequence[FeatureLevel], rows: Rows) -> Tensor:
        """The vectors of the units that rows show, ascending, from the cache's features."""
        unit, quiet = self.asked.unit, self.asked.quiet
        return torch.from_numpy(pooled_vectors(self.cache, levels, unit, rows, quiet=quiet, say=self.notes.append))

    @torch.inference_mode()
    def _said(self, heads: Sequence[ImageHead], feed: Feed, rows: Rows) -> tuple[Rows, list[Shares]]:
        """(the units that rows show, ascending; what each head says of them). This process alone computes it."""
        units, vectors = self._vectors(heads[0].levels, feed, rows)
        return units, [probabilities_of(head(vectors), self.names) for head in heads]

    def _probabilities(self, heads: Sequence[ImageHead], feed: Feed, rows: Rows) -> tuple[Rows, list[Shares]]:
        """The same, which all processes ask for together, and get."""
        if not self.asked.live:
            return from_main(lambda: self._said(heads, feed, rows))
        parts = gathered([self._said(heads, feed, scored_here(self.cache, rows))])
        units = np.concatenate([own for own, _ in parts])
        order = np.argsort(units, kind="stable")
        return units[order], [np.concatenate([p[i] for _, p in parts])[order] for i in range(len(heads))]

    def _scored(self, head: ImageHead, units: Rows, probabilities: Shares) -> ScoredImages:
        ids, groups = unit_names(self.cache, units, self.asked.unit)
        said = decide(probabilities, head.prior.cpu().numpy(), self.names.multi)
        thresholds = np.full(len(units), float(head.threshold))
        return ScoredImages(
            tuple(ids), tuple(groups), probabilities, self.truth.values[units], said, thresholds, self.names.multi,
            self._good,
        )  # fmt: skip

    def _outcome(self, head: ImageHead, units: Rows, probabilities: Shares) -> Outcome:
        scored = self._scored(head, units, probabilities)
        scores = image_scores(scored, self.names.names)
        brief = {score.name: scores[score.name] for score in self.asked.scores.compared}
        return Outcome(scores, brief, {"scores.npz": scored.to_npz()})


def _scores(found: Sequence[Shares], names: LabelNames, good: int | None) -> list[tuple[float, ...]]:
    """The score of a defect of each unit by each head. good: see `defect_scores`."""
    each = [defect_scores(own, names.multi, good) for own in found]
    return list(zip(*(own.tolist() for own in each if own is not None), strict=True))


def _one_kind(cache: Cache, labels: Tensor, names: Sequence[str], unit: Unit) -> str:
    """What to say where all training units have the same labels."""
    held = [name for name, own in zip(names, labels[0].tolist(), strict=True) if own]
    what = f"all of them {', '.join(held)}" if held else f"none of them {', '.join(names)}"
    return (
        f"{cache.path}: the training split shows one kind of image only. Nothing was trained.\n"
        f"  wanted  training images with different labels\n"
        f"  found   {counted(len(labels), unit)}, {what}\n"
        "Take another --split or --labels, or where all are good, a head of --task anomaly."
    )


def _not_chosen(scores: TaskScores) -> str:
    """What to say where validation has no main score."""
    return (
        f"the val split {scores.lacks}, so it has no {scores.main.label}, and the head was not chosen by it. Another "
        "--split may bring such images there"
    )


def known_rows(
    cache: Cache, rows: Mapping[str, Rows], labels: ImageLabels, unit: Unit
) -> tuple[dict[str, Rows], list[str]]:
    """Those rows of each split that show a unit of which something is known, and notes on the others.

    Raises ProbeError where a split has none.
    """
    known = truth_of(cache, labels, unit).known
    found = {split: own[known[units_of(cache, own, unit)]] for split, own in rows.items()}
    notes = []
    for split, own in rows.items():
        units = np.unique(units_of(cache, own, unit))
        unknown = int((~known[units]).sum())
        if unknown == len(units):
            raise ProbeError(
                f"{cache.path}: no image of the {split} split has a label that is known. Nothing was trained.\n"
                f"  wanted  one or more\n  found   {counted(unknown, unit)} without a label, or with an ignored "
                "region and no defect\nTake another --split, or label some of them."
            )
        if unknown:
            notes.append(f"{cache.data.name}: {counted(unknown, unit)} of {split} without a known label take no part")
    return found, notes


def probabilities_of(logits: Tensor, names: LabelNames) -> Shares:
    """What logits say of each unit, (units, names): they sum to 1 unless a unit may have several labels."""
    wide = logits.cpu().double()
    shares = wide.sigmoid() if names.multi else wide.softmax(1)
    return shares.float().numpy()


def cross_entropy(logits: Tensor, wanted: Tensor, *, multi: bool) -> Tensor:
    """Its mean over the batch of all processes, a scalar. logits, wanted: (units, names); wanted are 0 or 1."""
    if multi:
        own = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(1)
    else:
        own = functional.cross_entropy(logits, wanted, reduction="none")
    return own.sum() / summed(torch.full((), float(len(own)), device=own.device))


def labels_seen(masks: Tensor, labels: Tensor, classes: int, names: LabelNames) -> Tensor:
    """The labels of views, of which a crop may have left a defect out: (views, names), uint8.

    masks: (views, height, width), uint8, of so many classes. labels: of their images, which stay where a view shows
    no defect, but an ignored region. names: the classes, or good and defect.
    """
    held = torch.stack([(masks == index).flatten(1).any(1) for index in range(1, classes)], 1)  # (views, classes - 1)
    some = held.any(1)
    unsure = (masks == IGNORE).flatten(1).any(1) & ~some
    found = held if names.multi else torch.stack([~some, some], 1)
    return torch.where(unsure[:, None], labels, found.to(labels.dtype))


def balanced(probabilities: Shares, prior: NDArray[np.float32], names: LabelNames) -> Shares:
    """The probabilities as they were if all labels were equally frequent, (units, names).

    prior: (names,), the share of the training units that has each. A label that none of them has is never found.
    """
    ratio = np.divide(probabilities, prior, out=np.zeros_like(probabilities), where=prior > 0)
    if names.multi:  # against not having it
        against = np.divide(1 - probabilities, 1 - prior, out=np.zeros_like(probabilities), where=prior < 1)
        return ratio / np.maximum(ratio + against, np.finfo(np.float32).tiny)
    return ratio / np.maximum(ratio.sum(1, keepdims=True), np.finfo(np.float32).tiny)


def colours_of(names: LabelNames) -> tuple[str, ...]:
    """The labels that pictures have colours for, with the good one, or "good", first."""
    return (names.good or "good", *(name for name in names.names if name != names.good))


def tile_boxes(tiles: Sequence[tuple[Part | None, NDArray[np.uint8]]], names: LabelNames) -> tuple[Instance, ...]:
    """A box for each tile and each of its labels but the good one, as `colours_of` numbers these.

    tiles: where they lie in the image, and which labels they have, (names,). What is no tile has no box.
    """
    found = []
    for part, labels in tiles:
        if part is None:
            continue
        left, top = float(part.left), float(part.top)
        box = (left, top, left + part.width, top + part.height)
        held = [name for name, own in zip(names.names, labels.tolist(), strict=True) if own and name != names.good]
        found += [Instance(colours_of(names).index(name), box) for name in held]
    return tuple(found)


def label_text(
    labels: NDArray[np.uint8],
    shares: NDArray[np.float32] | None,
    names: LabelNames,
    truth: NDArray[np.uint8] | None = None,
) -> tuple[str, ...]:
    """The labels of a unit for people; with its shares of `balanced` these too, then of the true and likeliest others.

    labels, shares, truth: (names,).
    """
    held = [i for i, own in enumerate(labels.tolist()) if own]
    said = ", ".join(names.names[i] for i in held) or "good"
    if shares is None:
        return (said,)
    true = np.zeros_like(labels) if truth is None else truth
    others = [i for i in np.lexsort((-shares, -true.astype(int))).tolist() if i not in held]
    more = max(int(true[others].sum()), LIKELIEST - len(held))
    shown = [f"{names.names[i]} {100 * shares[i]:.0f}%" for i in [*held, *others[:more]]]
    return said, f"({', '.join(shown)})"


def _defects(cache: Cache, image: int) -> Labels | None:
    """Where an image has a defect, as 1, and what is ignored; None where only its label is known."""
    regions = defect_regions(cache, image, "image")
    return None if regions is None else np.where(regions[1], IGNORE, regions[0]).astype(np.uint8)


def _captioned(
    defects: Labels | None, texts: tuple[tuple[str, ...], tuple[str, ...]], wrong: bool, pixels: NDArray[np.float32]
) -> list[Panel]:
    truth, said = texts
    return [Panel(pixels, defects, text=truth), Panel(pixels, text=said, wrong=wrong)]


def _boxed(boxes: Sequence[tuple[Instance, ...]], pixels: NDArray[np.float32]) -> list[Panel]:
    return [Panel(pixels, instances=own) for own in boxes]
