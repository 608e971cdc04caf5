"""The base threshold at which pixels of maps are joined to calls, chosen on validation before test is looked at."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from featprobe.metrics.defects.records import NOTHING, About, Floats, FoundRule, Records
from featprobe.probes import Head
from featprobe.processes import gathered
from featprobe.stages.recording.recorder import Recorder, SplitTruth, joined
from featprobe.stages.recording.watch import Watch
from featprobe.stages.row_images import images_of
from featprobe.stages.stitch import Objects
from featprobe.stages.tasks.anomaly import Anomaly
from featprobe.stages.tasks.classification import Classification
from featprobe.stages.tasks.segmentation import Segmentation
from featprobe.stages.tasks.task import Source
from featprobe.stages.training.prepared import Prepared
from featprobe.targets import Labels

PROBABILITIES, USUAL_PROBABILITY = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7), 0.5
"""Bases that are tried for maps of probabilities, and the one without a defect in validation."""
QUANTILES, USUAL_QUANTILE = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999), 0.99
"""The same for maps of anomalies, whose values have no limits: as quantiles of the pixels of validation."""
SAMPLED = 1 << 22  # pixels that quantiles are taken of, at most
USUAL_RULE = FoundRule()


@dataclass(frozen=True)
class Recording:
    """What heads found on validation, one after another, and the watch on the scoring of test.

    notes: what a user should know.
    """

    validation: tuple[Records, ...]
    test: Recorder
    notes: tuple[str, ...]

    def records(self) -> list[Records]:
        """The records of each head, once `test` has watched the scoring; all processes ask for them together."""
        found = self.test.records([own.about for own in self.validation])
        return [joined(val, test) for val, test in zip(self.validation, found, strict=True)]


def record_validation(
    prepared: Prepared, heads: Sequence[Head], source: Source, rule: FoundRule = USUAL_RULE
) -> Recording | None:
    """Choose each head's base, record what it finds on validation, and make ready for test; None without any score.

    The features of validation are read once more; those of anomaly maps twice.
    """
    task, training = prepared.task, prepared.training
    if isinstance(task, Classification) and not task.names.says_good:
        return None
    truths = {split: _truth(prepared, split) for split in ("val", "test")}
    tried, usual = _tried(prepared, heads, source)
    notes = [note for truth in truths.values() for note in truth.table.notes]
    chooses = len(tried[0]) > 1 and len(truths["val"].table.defects) > 0
    if len(tried[0]) > 1 and not chooses:
        tried = [(own[usual],) for own in tried]
        notes.append(
            f"{prepared.cache.data.name}: validation has no defect, so pixels are joined to calls at the usual base "
            f"threshold, {', '.join(f'{own:.3g}' for own in dict.fromkeys(base for (base,) in tried))}"
        )
    watches = [Recorder(truths["val"], bases, rule) for bases in zip(*tried, strict=True)]
    prepared.evaluate(heads, source, prepared.rows["val"], _Several(watches))
    come_from = "" if np.isnan(tried[0][0]) else "validation" if chooses else "default"
    abouts = [[_about(prepared, rule, base, come_from) for base in bases] for bases in zip(*tried, strict=True)]
    found = [watch.records(own) for watch, own in zip(watches, abouts, strict=True)]
    chosen = tuple(best(own) for own in zip(*found, strict=True))
    test = Recorder(truths["test"], [own.about.base for own in chosen], rule)
    return Recording(chosen, test, tuple(dict.fromkeys(notes)))


def best(found: Sequence[Records]) -> Records:
    """Of records of one head at several bases those with the largest area, of equal ones those at the highest base."""
    return max(found, key=lambda own: (area_under_froc(own), own.about.base))


def area_under_froc(records: Records) -> float:
    """The mean share of defects found with 0, 1, ... and one less than as many false calls as there are images.

    That is the area under the curve of the share found against false calls per image, from 0 to 1; nan without images
    or defects.
    """
    images, scores = len(records.images), np.sort(records.defects.score)
    if not images or not len(scores):
        return float("nan")
    false = np.sort(records.calls.score[records.calls.touched == NOTHING])[::-1][:images]
    last = np.concatenate([false, np.full(images - len(false), -np.inf, np.float32)])  # the first false call too many
    return float((1 - np.searchsorted(scores, last, side="right") / len(scores)).mean())


def _truth(prepared: Prepared, split: str) -> SplitTruth:
    options, images = prepared.training.options, images_of(prepared.cache, prepared.rows[split])
    return SplitTruth(prepared.cache, images, split, options.instances, quiet=options.quiet)


def _about(prepared: Prepared, rule: FoundRule, base: float, come_from: Any) -> About:
    ids, groups = (prepared.cache.images.column(name) for name in ("id", "group"))
    return About(
        prepared.training.task, prepared.training.kind.name, "", prepared.cache.data.classes, rule, base, come_from,
        parts=list(ids) != list(groups),
    )  # fmt: skip


def _tried(prepared: Prepared, heads: Sequence[Head], source: Source) -> tuple[list[tuple[float, ...]], int]:
    """The bases to try for each head, float32, rising; nan alone where it needs none. And the place of the usual one."""
    match prepared.task:
        case Segmentation():
            bases = tuple(float(np.float32(value)) for value in PROBABILITIES)
            return [bases] * len(heads), PROBABILITIES.index(USUAL_PROBABILITY)
        case Anomaly() as task if task.watched_by_maps:
            sample = _Sample(len(images_of(prepared.cache, prepared.rows["val"])))
            prepared.evaluate(heads, source, prepared.rows["val"], sample)
            return sample.quantiles(len(heads)), QUANTILES.index(USUAL_QUANTILE)
    return [(float("nan"),)] * len(heads), 0


class _Several(Watch):
    """Hands what it gets to several watches."""

    def __init__(self, watches: Sequence[Watch]) -> None:
        self.watches = watches

    def pixels(self, head: int, image: int, values: Floats, classes: Labels | None) -> None:
        for watch in self.watches:
            watch.pixels(head, image, values, classes)

    def objects(self, head: int, image: int, objects: Objects) -> None:
        for watch in self.watches:
            watch.objects(head, image, objects)

    def image_score(self, head: int, image: int, score: float) -> None:
        for watch in self.watches:
            watch.image_score(head, image, score)


class _Sample(Watch):
    """Some pixels of each map, drawn anew for each image from its number, so that all processes draw alike."""

    def __init__(self, images: int) -> None:
        self.each = max(1, SAMPLED // max(1, images))
        self.drawn: dict[tuple[int, int], Floats] = {}

    def pixels(self, head: int, image: int, values: Floats, classes: Labels | None) -> None:
        flat, random = values.ravel(), np.random.default_rng(image)
        some = flat if len(flat) <= self.each else flat[random.integers(len(flat), size=self.each)]
        self.drawn[head, image] = some.copy()

    def quantiles(self, heads: int) -> list[tuple[float, ...]]:
        """QUANTILES of the pixels of all images, of each head; all processes ask for them together."""
        every = {key: own for part in gathered([self.drawn]) for key, own in part.items()}
        found = []
        for head in range(heads):
            pixels = np.concatenate([every[key] for key in sorted(every) if key[0] == head])
            found.append(tuple(np.quantile(pixels, QUANTILES, method="higher").tolist()))
        return found
