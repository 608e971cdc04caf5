"""What a training's heads are trained and scored on: its task with labels read, by what the task is scored on."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from featprobe.cache import Cache
from featprobe.errors import ProbeError
from featprobe.geometry import IDENTITY
from featprobe.image_labels import ImageLabels
from featprobe.scores import SCORES, On
from featprobe.specs import Rows
from featprobe.stages.image_truth import mask_values, names_of
from featprobe.stages.partition import training_subset
from featprobe.stages.row_images import rows_showing
from featprobe.stages.tasks.anomaly import Anomaly, AnomalyAsked, good_rows
from featprobe.stages.tasks.classification import Classification, LabelsAsked, known_rows
from featprobe.stages.tasks.detection import Detection
from featprobe.stages.tasks.segmentation import Segmentation
from featprobe.stages.tasks.solve import solve
from featprobe.stages.tasks.task import Solution, Task
from featprobe.stages.training.probe_options import ProbeOptions
from featprobe.stages.training.training import Training
from featprobe.targets import IGNORE

SplitRows = Mapping[str, Rows]
"""Rows of train, val and test."""


@dataclass(frozen=True)
class Labelled:
    """A training whose labels are read.

    task: what heads are trained and scored on. rows: of train, the part that is trained on, val and test. solver: of a
    kind that is not trained, else None. notes: what a user should know of the labels.
    """

    task: Task[Any]
    rows: SplitRows
    solver: Callable[..., Solution] | None = None
    notes: tuple[str, ...] = ()


def labelled(training: Training, rows: SplitRows) -> Labelled:
    """The labels of a training, read; raises FeatprobeError where they can't serve its task."""
    return READ[training.scores.on](training, rows)


def classes_of(task: str, cache: Cache, options: ProbeOptions) -> tuple[str, ...]:
    """What the heads of a task tell apart in a cache; raises ProbeError where it has no such labels."""
    if SCORES[task].on == "images":
        return names_of(cache, options.labels, options.unit).names
    if SCORES[task].on == "anomalies":
        return names_of(cache, "defect", options.unit).names
    return cache.data.classes


def check_live(task: str, cache: Cache, options: ProbeOptions) -> None:
    """Raise ProbeError for units that a live backbone can't be trained on: images of which batches show tiles."""
    on_images = SCORES[task].on == "images"
    if on_images and options.tuning and options.unit == "image" and cache.recipe.tile is not None:
        raise ProbeError(
            f"{cache.path} shows images in tiles, and a batch holds tiles of many images, of which none is whole.\n"
            "  wanted  a cache of whole images, or tiles with labels of their own\n"
            f"  found   tiles of {cache.recipe.tile} pixels, labels of images\n"
            "Nothing was trained. Take --unit tile, or extract whole images:  featprobe extract --tile 0"
        )


def without_views(cache: Cache, rows: Rows) -> Rows:
    """Those of the rows that show an image, or a tile of one, as it is."""
    plain = [(part := cache.rows.part_of(row)) is None or part.view == IDENTITY for row in rows.tolist()]
    return rows[np.array(plain, dtype=bool)]


def _pixels(training: Training, rows: SplitRows) -> Labelled:
    cache = training.cache
    train = part_of(training, rows["train"], lambda own: [set(v) - {IGNORE} for v in mask_values(cache, "rows", own)])
    views = training.augmentation is not None
    task = Segmentation(cache, train, training.recipe, training.device, training.options.absent, views=views)
    return Labelled(task, {**rows, "train": train}, partial(solve, task) if training.is_solved else None)


def _objects(training: Training, rows: SplitRows) -> Labelled:
    of = partial(
        Detection, training.cache, device=training.device, masks=training.scores.on == "masks",
        source=training.options.instances,
    )  # fmt: skip
    every = of(train=rows["train"])
    if training.fraction == 1:
        return Labelled(every, rows)
    train = part_of(training, rows["train"], lambda own: [every.targets[row].labels.tolist() for row in own])
    return Labelled(of(train=train), {**rows, "train": train})


def _images(training: Training, rows: SplitRows) -> Labelled:
    cache, options = training.cache, training.options
    check_live(training.task, cache, options)
    known, notes = _known(training, rows, options.labels)
    live, scores = training.tuning is not None, training.scores
    asked = LabelsAsked(options.labels, options.unit, options.false_calls, scores, live, options.quiet)
    every = Classification(cache, known["train"], training.device, asked)
    train = part_of(training, known["train"], lambda own: [every.labels_of(row) for row in own])
    task = Classification(cache, train, training.device, asked)
    task.check_trainable()
    return Labelled(task, {**known, "train": train}, task.solve if training.is_solved else None, tuple(notes))


def _anomalies(training: Training, rows: SplitRows) -> Labelled:
    cache, options, pooled = training.cache, training.options, training.kind.pooled
    known, notes = _known(training, rows, "defect")
    good, aside = good_rows(cache, known["train"], options.unit)
    train = part_of(training, good, lambda own: [()] * len(own))
    asked = AnomalyAsked(
        options.unit, options.false_calls, options.coreset, options.remove_position, training.scores, pooled
    )
    task = Anomaly(cache, train, training.device, asked)
    solver = task.solve_pooled if pooled else task.solve
    return Labelled(task, {**known, "train": train}, solver, (*notes, *aside))


def _known(training: Training, rows: SplitRows, labels: ImageLabels) -> tuple[dict[str, Rows], list[str]]:
    """Those of the rows that show a unit as it is, of which something is known, and notes on the others."""
    cache = training.cache
    plain = {split: without_views(cache, own) for split, own in rows.items()}
    known, notes = known_rows(cache, plain, labels, training.options.unit)
    if any(len(plain[split]) < len(own) for split, own in rows.items()):
        notes.append(f"{training.title}: views of images take no part, only the images as they are")
    return known, notes


READ: Mapping[On, Callable[[Training, SplitRows], Labelled]] = {
    "pixels": _pixels,
    "boxes": _objects,
    "masks": _objects,
    "images": _images,
    "anomalies": _anomalies,
}
"""What a task is scored on -> what reads its labels."""


def part_of(training: Training, train: Rows, classes_in: Callable[[list[int]], Sequence[Collection[int]]]) -> Rows:
    """The rows of the fraction of the images that is trained on. classes_in: those that each of some rows shows."""
    if training.fraction == 1:
        return train
    cache = training.cache
    classes: dict[int, set[int]] = {}
    for held, image in zip(classes_in(train.tolist()), cache.image_of[train].tolist(), strict=True):
        classes.setdefault(image, set()).update(held)
    ids, groups = ([cache.images.texts[name][image] for image in classes] for name in ("id", "group"))
    seed = training.seeds[0] if training.subset else None
    kept = training_subset(ids, groups, list(classes.values()), training.fraction, seed)
    return rows_showing(cache, train, np.array(list(classes), dtype=np.intp)[kept])
