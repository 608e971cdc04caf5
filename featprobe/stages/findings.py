"""What makes an image a defect image, in one place for `predict`, for services and for exported graphs.

Pixels: a finding is a connected component (pixels that touch at a corner are connected) of one class but the background
of the class map; with a given threshold, of the pixels whose largest probability of a class but the background reaches
it, each of that class. Objects: a finding is a detection whose score reaches the threshold, AT_LEAST where none is
given. Such an image is called if there is a finding. Labels of images and anomalies: an image is called if its score is
above the threshold, the head's own where none is given; a finding is a tile that is called, of heads that judge tiles.

An operating point, which `inspect` keeps beside a head, takes the place of these rules where no threshold is given, and
then calls are what they are in the records of the head. Of maps of pixels, also those of anomaly heads, a finding is a
connected component of the pixels that reach the base threshold, each of one class, if its largest value reaches the
threshold; the score of the image is the largest value. Objects and tiles, and images with one score, need to reach the
threshold. A finding has at least so many pixels as the least area says.

A given threshold is rounded to float32, the number format of the scores, so that every program that follows these
rules says the same.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf, isnan, nan
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featprobe.geometry import Part
from featprobe.metrics.defects.operating import OperatingPoint
from featprobe.stages.recording.map_calls import calls_of_map
from featprobe.stages.stitch import Objects
from featprobe.stages.tasks.settle import CALLED, PASSED, verdict
from featprobe.targets import Instance, Labels, Rle, components, decode_window

AT_LEAST = 0.5
"""The score of a detection from which on it is a finding, where no threshold is given."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Threshold:
    """A threshold as it was given or found. value: nan for none.

    source: "given" by the user; "operating_point" for one that was chosen on validation and is kept beside the head;
    "head" for one that was set on good validation images and is kept with the head; "default" for the rule of the task;
    "none" where there is no rule without one. base, least_area: of an operating point.
    """

    value: float
    source: Literal["given", "operating_point", "head", "default", "none"]
    base: float = nan
    least_area: int = 1

    @classmethod
    def given(cls, value: float) -> "Threshold":
        """A threshold by the user, rounded to float32; infinite where that can't hold it."""
        with np.errstate(over="ignore"):
            return cls(float(np.float32(value)), "given")

    @classmethod
    def of_head(cls, value: float) -> "Threshold":
        """The one that a head keeps; nan for none."""
        return cls(value, "none" if isnan(value) else "head")

    @classmethod
    def of_point(cls, point: OperatingPoint) -> "Threshold":
        """One that was chosen on validation."""
        return cls(point.threshold, "operating_point", point.base, point.least_area)

    @property
    def is_point(self) -> bool:
        """Whether it is an operating point, which scores need to reach."""
        return self.source == "operating_point"

    @property
    def on_maps(self) -> bool:
        """Whether findings are components of the pixels of maps at a base threshold."""
        return not isnan(self.base)

    @property
    def in_graphs(self) -> bool:
        """Whether a graph, which joins no pixels, can tell whether a map has a finding."""
        return not self.on_maps or self.least_area <= 1

    @property
    def above(self) -> float:
        """The number above which a score of float32 is called."""
        return float(np.nextafter(np.float32(self.value), np.float32(-np.inf))) if self.is_point else self.value

    def verdict(self, score: float, area: float = inf) -> str:
        """CALLED or PASSED, of an image or of a tile of so many pixels by its score; "" without a threshold."""
        said = verdict(float(np.float32(score)) if self.is_point else score, self.above)
        return PASSED if said == CALLED and area < self.least_area else said

    @property
    def said(self) -> str | float | None:
        """What a summary says of it: "default", its value, or None."""
        return "default" if self.source == "default" else None if isnan(self.value) else self.value


def point_note(point: OperatingPoint | None) -> list[str]:
    """A note on the operating point that verdicts are at, where there is one."""
    if point is None:
        return []
    least = f", findings of {point.least_area} pixels or more" if point.least_area > 1 else ""
    return [
        f"verdicts at the operating point that was chosen on validation for {point.wanted}: threshold "
        f"{point.threshold:.6g}{least}; --threshold takes another"
    ]


@dataclass(frozen=True)
class Finding:
    """One thing found in an image, in pixels of the original image.

    category: index of its class; 0, the background, for a tile, which has none. box: x1, y1, x2, y2. area: pixels of
    its mask, or of its box where it has no mask. score: the highest in it. rle: its mask as compressed COCO RLE.
    """

    category: int
    box: Box
    area: float
    score: float
    rle: Rle | None = None

    @property
    def instance(self) -> Instance:
        """The same as a labelled object."""
        return Instance(self.category, self.box, self.rle, area=self.area)


@dataclass(frozen=True)
class Judged:
    """What is said of an image.

    verdict: CALLED, PASSED, or "" where there is no threshold. score: the highest in the image, also below the
    threshold; None where nothing has one. findings: highest score first; None where the image is judged as a whole.
    """

    verdict: str
    score: float | None
    findings: tuple[Finding, ...] | None = None

    @property
    def area(self) -> float | None:
        """The sum of the areas of all findings, pixels; those that overlap count twice."""
        return None if self.findings is None else sum(finding.area for finding in self.findings)


def surest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest probability of a class but the background at each pixel, float32, and that class, uint8.

    logits: (classes, ..., height, width), the background first; of equal ones the lowest class is taken.
    """
    best, classes = _foreground(logits)
    return _share_of(best, logits), classes


def judged_pixels(logits: Tensor, threshold: Threshold) -> tuple[Labels, Judged]:
    """The class of each pixel that is part of a finding, 0 elsewhere, (height, width); and what is said of the image.

    logits: (classes, height, width), at the original image's pixels, the background first.
    """
    best, classes = _foreground(logits)
    shares = _share_of(best, logits)
    probabilities: NDArray[np.float32] = shares.cpu().numpy()
    if threshold.on_maps:
        labels = joined_pixels(probabilities, classes.cpu().numpy(), threshold)
    else:
        found = shares >= threshold.value if threshold.source == "given" else best > logits[0]
        labels = classes.mul_(found).cpu().numpy()
    findings = [_of_component(one, probabilities) for one in components(labels, len(logits))]
    return labels, _judged(findings, float(probabilities.max()))


def judged_map(values: NDArray[np.float32], threshold: Threshold) -> Judged:
    """What is said of an image by a map of one score for each pixel, (height, width), at an operating point."""
    labels = joined_pixels(values, None, threshold)
    findings = [replace(_of_component(one, values), category=0) for one in components(labels, 2)]
    return _judged(findings, float(values.max()))


def joined_pixels(values: NDArray[np.float32], classes: Labels | None, threshold: Threshold) -> Labels:
    """The class of each pixel that is part of a finding at an operating point, 0 elsewhere, (height, width).

    values: (height, width). classes: the same, of each pixel; None for a class 1 of all.
    """
    calls = calls_of_map(values, threshold.base, classes)
    kept = np.zeros(len(calls) + 1, dtype=bool)
    kept[1:] = (calls.score >= np.float32(threshold.value)) & (calls.area >= threshold.least_area)
    shown = kept[calls.labels]
    return shown.astype(np.uint8) if classes is None else np.where(shown, classes, 0).astype(np.uint8)


def judged_objects(objects: Objects, threshold: Threshold) -> Judged:
    """What is said of an image by the objects that were found in it, each with a score."""
    value = np.float32(threshold.value)
    reaching = [(one, _area_of(one), score) for one, score in objects if np.float32(score) >= value]
    findings = [
        Finding(one.category, one.box_xyxy, area, score, one.rle)
        for one, area, score in reaching
        if not threshold.is_point or (area or _area_of_box(one)) >= threshold.least_area  # as in records
    ]
    return _judged(findings, max((score for _, score in objects), default=None))


def judged_score(score: float | None, threshold: Threshold) -> Judged:
    """What is said of an image by one score of it as a whole; nothing where it is None."""
    return Judged("" if score is None else threshold.verdict(score), score)


def judged_tiles(tiles: Iterable[tuple[float | None, Part]], threshold: Threshold) -> Judged:
    """What is said of an image by the scores of its tiles: each that is called is a finding."""
    known = [(score, part) for score, part in tiles if score is not None]
    highest = max((score for score, _ in known), default=None)
    if highest is None or isnan(threshold.value):
        return Judged("", highest)
    called = [(score, part) for score, part in known if threshold.verdict(score, part.height * part.width) == CALLED]
    return _judged(
        [Finding(0, _box_of(part), float(part.height * part.width), score) for score, part in called], highest
    )


def _foreground(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of a class but the background at each pixel, and that class, uint8."""
    best, classes = logits[1].clone(), torch.ones_like(logits[0], dtype=torch.uint8)
    for index, own in enumerate(logits[2:], start=2):
        classes.masked_fill_(own > best, index)
        torch.maximum(best, own, out=best)
    return best, classes


def _share_of(best: Tensor, logits: Tensor) -> Tensor:
    """The probability of a class by its logit at each pixel; plane by plane, so that all logits are held once."""
    highest = torch.maximum(best, logits[0])
    total = torch.zeros_like(best)
    for own in logits:
        total += (own - highest).exp_()
    return (best - highest).exp_().div_(total)


def _judged(findings: Sequence[Finding], score: float | None) -> Judged:
    ordered = sorted(findings, key=lambda finding: -finding.score)
    return Judged(CALLED if ordered else PASSED, score, tuple(ordered))


def _of_component(one: Instance, probabilities: NDArray[np.float32]) -> Finding:
    assert one.rle is not None and one.area is not None  # a component has both
    window, mask = decode_window(one.rle)
    return Finding(one.category, one.box_xyxy, one.area, float(probabilities[window][mask].max()), one.rle)


def _area_of(one: Instance) -> float:
    if one.rle is not None:
        return float(decode_window(one.rle)[1].sum())
    return _area_of_box(one)


def _area_of_box(one: Instance) -> float:
    x1, y1, x2, y2 = one.box_xyxy
    return (x2 - x1) * (y2 - y1)


def _box_of(part: Part) -> Box:
    return float(part.left), float(part.top), float(part.left + part.width), float(part.top + part.height)
