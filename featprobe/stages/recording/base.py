"""The base threshold at which pixels of maps are joined to calls, chosen on validation before test is looked at."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from featprobe.metrics.defects.overlaps import finds
from featprobe.metrics.defects.records import NOTHING, About, Floats, FoundRule, Records, found_scores
from featprobe.probes import Head
from featprobe.processes import gathered
from featprobe.stages.recording.handed import Findings
from featprobe.stages.recording.map_calls import calls_at_bases
from featprobe.stages.recording.meetings import overlaps_of_map
from featprobe.stages.recording.recorder import Recorder, SplitTruth
from featprobe.stages.recording.watch import Watch
from featprobe.stages.row_images import images_of
from featprobe.stages.tasks.task import Source
from featprobe.stages.training.prepared import Prepared
from featprobe.stages.workspace import pixel_size_of
from featprobe.targets import Labels

PROBABILITIES, USUAL_PROBABILITY = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7), 0.5
"""Bases that are tried for maps of probabilities, and the one without a defect in validation."""
QUANTILES, USUAL_QUANTILE = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999), 0.99
"""The same for maps of anomalies and of heads that are solved, whose values are no probabilities: as quantiles of the
pixels of validation."""
SAMPLED = 1 << 22  # pixels that quantiles are taken of, at most
TIMES_DEFECT, SHARE_OF_IMAGE = 10, 0.01
ROUNDING = 1e-9  # of areas
USUAL_RULE = FoundRule()
Bases = tuple[float, ...]


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
        return [Records.joined([val, test]) for val, test in zip(self.validation, found, strict=True)]


def record_validation(
    prepared: Prepared, heads: Sequence[Head], source: Source, rule: FoundRule = USUAL_RULE
) -> Recording | None:
    """Choose each head's base, record what it finds on validation, and make ready for test; None without any score.

    The features of validation are read once more where memory holds the maps of its images, else for maps of
    probabilities twice, and for other maps three times.
    """
    if prepared.task.handed == "nothing":
        return None
    val, test = (_truth(prepared, split) for split in ("val", "test"))
    found = Findings(prepared, heads, source, "val")
    bases, come_from = _bases(found, val, rule)
    notes = [*val.table.notes, *test.table.notes]
    if come_from == "default":
        said = ", ".join(f"{base:.3g}" for base in dict.fromkeys(bases))
        notes.append(
            f"{prepared.cache.data.name}: validation has no defect, so pixels over the usual base threshold ({said}) "
            "are joined to calls"
        )
    watch = Recorder(val, bases, rule)
    found.hand_to(watch, last=True)
    records = watch.records([_about(prepared, rule, base, come_from) for base in bases])
    return Recording(tuple(records), Recorder(test, bases, rule), tuple(dict.fromkeys(notes)))


def _truth(prepared: Prepared, split: str) -> SplitTruth:
    cache, options = prepared.cache, prepared.training.options
    size = pixel_size_of(prepared.training.workspace, cache.data.name, Path(cache.data.root))
    images = images_of(cache, prepared.rows[split])
    return SplitTruth(cache, images, split, options.instances, pixel_size=size, quiet=options.quiet)


def _about(prepared: Prepared, rule: FoundRule, base: float, come_from: Literal["validation", "default", ""]) -> About:
    texts = prepared.cache.images.texts
    return About(
        prepared.training.task, prepared.training.kind.name, "", prepared.cache.data.classes, rule, base, come_from,
        parts=texts["id"] != texts["group"],
    )  # fmt: skip


def _bases(found: Findings, truth: SplitTruth, rule: FoundRule) -> tuple[Bases, Literal["validation", "default", ""]]:
    """The base of each head, nan for one without maps; and where they come from. truth: of validation."""
    tried, usual = _tried(found)
    if not tried:
        return (float("nan"),) * len(found.heads), ""
    if not len(truth.table.defects):
        return tuple(own[usual] for own in tried), "default"
    trials = Trials(truth, tried, rule)
    found.hand_to(trials)
    return trials.best(), "validation"


def _tried(found: Findings) -> tuple[list[Bases], int]:
    """The bases to try for each head, float32, rising, none without maps; and the place of the usual one."""
    prepared, heads = found.prepared, len(found.heads)
    handed = prepared.task.handed
    if handed == "probabilities" and prepared.solver is None:
        bases = tuple(float(np.float32(value)) for value in PROBABILITIES)
        return [bases] * heads, PROBABILITIES.index(USUAL_PROBABILITY)
    if handed in ("probabilities", "values"):
        sample = _Sample(len(images_of(prepared.cache, found.rows)))
        found.hand_to(sample)
        return sample.quantiles(heads), QUANTILES.index(USUAL_QUANTILE)
    return [], 0


class Trials(Watch):
    """The scores of defects and of false calls that maps give at several bases. tried: the bases of each head.

    By the usual rule a call that covers the image finds all defects in it. Here a call must also show where they are:
    it is at most TIMES_DEFECT as large as the defect, or takes at most SHARE_OF_IMAGE of the image.
    """

    def __init__(self, truth: SplitTruth, tried: Sequence[Bases], rule: FoundRule) -> None:
        self.truth, self.tried, self.rule = truth, tried, rule
        self.found: dict[tuple[int, int], tuple[Floats, Floats, NDArray[np.uint8]]] = {}

    def pixels(self, head: int, image: int, values: Floats, classes: Labels | None) -> None:
        """See `Watch`."""
        calls = calls_at_bases(values, self.tried[head], classes)
        overlaps = overlaps_of_map(calls, self.truth.ground(image))
        most = np.maximum(TIMES_DEFECT * overlaps.defect_area, SHARE_OF_IMAGE * values.size)
        placed = overlaps.some(overlaps.call_area <= most)
        defects = found_scores(finds(placed, self.rule), calls.score, len(overlaps.defect_class))
        false_call = self.truth.judged(image, overlaps) == NOTHING
        false_layer = calls.layer[false_call].astype(np.uint8)
        self.found[head, image] = defects.reshape(calls.layers, -1), calls.score[false_call], false_layer

    def best(self) -> Bases:
        """The base of each head by the areas under its curves; all processes ask for them together."""
        every = {key: own for part in gathered([self.found]) for key, own in part.items()}
        best = []
        for head, bases in enumerate(self.tried):
            own = [every[key] for key in sorted(every) if key[0] == head]
            areas = []
            for k in range(len(bases)):
                defects = np.concatenate([found[k] for found, _, _ in own])
                false_calls = np.concatenate([score[layer == k] for _, score, layer in own])
                areas.append(area_under_froc(defects, false_calls, len(own)))
            best.append(middle_of_best(areas, bases))
        return tuple(best)


def middle_of_best(areas: Sequence[float], bases: Bases) -> float:
    """The base with the largest area; of equal ones the middle, and of two in the middle the lower.

    A higher one loses defects that are fainter than those of validation; a lower one joins what lies apart. bases:
    rising.

    >>> middle_of_best([0.5, 0.75, 0.75, 0.75, 0.7], (0.1, 0.2, 0.3, 0.5, 0.7))
    0.3
    """
    equal = [base for area, base in zip(areas, bases, strict=True) if area >= max(areas) - ROUNDING]
    return equal[(len(equal) - 1) // 2]


def area_under_froc(defects: Floats, false_calls: Floats, images: int) -> float:
    """The area under the share of defects found against false calls per image, from 0 to 1 false call.

    That is the mean share found with no more than 0, 1, ..., images - 1 false calls. defects, false_calls: scores, of
    a defect that is never found -inf. Of one defect and one image at least.

    >>> area_under_froc(np.float32([0.9, 0.5]), np.float32([0.7]), 2)
    0.75
    """
    falling = np.sort(false_calls)[::-1][:images]
    too_many = np.concatenate([falling, np.full(images - len(falling), -np.inf, np.float32)])
    found = 1 - np.searchsorted(np.sort(defects), too_many, side="right") / len(defects)
    return float(found.mean())


class _Sample(Watch):
    """Some pixels of each map, drawn by the number of its image, so that all processes draw alike.

    Those of a head lie in one array: many small ones would have to be joined, in as much memory again.
    """

    def __init__(self, images: int) -> None:
        self.images, self.each = images, max(1, SAMPLED // max(1, images))
        self._drawn: dict[int, Floats] = {}  # by head; what is behind `_ends` is not filled
        self._ends: dict[int, int] = {}
        self._places: dict[tuple[int, int], slice] = {}  # of each head and image

    def pixels(self, head: int, image: int, values: Floats, classes: Labels | None) -> None:
        """See `Watch`."""
        flat, random = values.ravel(), np.random.default_rng(image)
        some = flat if len(flat) <= self.each else flat[random.integers(len(flat), size=self.each)]
        if head not in self._drawn:
            self._drawn[head], self._ends[head] = np.empty(self.images * self.each, np.float32), 0
        if (head, image) not in self._places:
            start = self._ends[head]
            self._ends[head] = start + len(some)
            self._places[head, image] = slice(start, self._ends[head])
        self._drawn[head][self._places[head, image]] = some

    def quantiles(self, heads: int) -> list[Bases]:
        """QUANTILES of the pixels of all images, of each head, once; all processes ask for them together."""
        parts = gathered([{head: own[: self._ends[head]] for head, own in self._drawn.items()}])
        found = []
        for head in range(heads):
            own = [part[head] for part in parts if head in part]
            pixels = own[0] if len(own) == 1 else np.concatenate(own)
            found.append(tuple(np.quantile(pixels, QUANTILES, method="higher", overwrite_input=True).tolist()))
        return found
