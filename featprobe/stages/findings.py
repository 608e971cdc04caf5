"""What makes an image a defect image, in one place for `predict`, for services and for exported graphs.

Pixels: a finding is a connected component (pixels that touch at a corner are connected) of one class but the background
of the class map; with a given threshold, of the pixels whose largest probability of a class but the background reaches
it, each of that class. Objects: a finding is a detection whose score reaches the threshold, AT_LEAST where none is
given. Such an image is called if there is a finding. Labels of images and anomalies: an image is called if its score is
above the threshold, the head's own where none is given; a finding is a tile that is called, of heads that judge tiles.

A given threshold is rounded to float32, the number format of the scores, so that every program that follows these
rules says the same.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featprobe.geometry import Part
from featprobe.stages.stitch import Objects
from featprobe.stages.tasks.settle import CALLED, PASSED, verdict
from featprobe.targets import Instance, Labels, Rle, components, decode_window

AT_LEAST = 0.5
"""The score of a detection from which on it is a finding, where no threshold is given."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Threshold:
    """A threshold as it was given or found. value: nan for none.

    source: "given" by the user; "head" for one that was set on good validation images and is kept with the head;
    "default" for the rule of the task; "none" where there is no rule without one.
    """

    value: float
    source: Literal["given", "head", "default", "none"]

    @classmethod
    def given(cls, value: float) -> "Threshold":
        """A threshold by the user, rounded to float32; infinite where that can't hold it."""
        with np.errstate(over="ignore"):
            return cls(float(np.float32(value)), "given")

    @classmethod
    def of_head(cls, value: float) -> "Threshold":
        """The one that a head keeps; nan for none."""
        return cls(value, "none" if isnan(value) else "head")

    @property
    def said(self) -> str | float | None:
        """What a summary says of it: "default", its value, or None."""
        return "default" if self.source == "default" else None if isnan(self.value) else self.value


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

    logits: (classes, height, width), the background first; of equal ones the lowest class is taken.
    """
    best, classes = _foreground(logits)
    return _share_of(best, logits), classes


def judged_pixels(logits: Tensor, threshold: Threshold) -> tuple[Labels, Judged]:
    """The class of each pixel that is part of a finding, 0 elsewhere, (height, width); and what is said of the image.

    logits: (classes, height, width), at the original image's pixels, the background first.
    """
    best, classes = _foreground(logits)
    shares = _share_of(best, logits)
    found = shares >= threshold.value if threshold.source == "given" else best > logits[0]
    labels: Labels = classes.mul_(found).cpu().numpy()
    probabilities: NDArray[np.float32] = shares.cpu().numpy()
    findings = [_of_component(one, probabilities) for one in components(labels, len(logits))]
    return labels, _judged(findings, float(probabilities.max()))


def judged_objects(objects: Objects, threshold: Threshold) -> Judged:
    """What is said of an image by the objects that were found in it, each with a score."""
    value = np.float32(threshold.value)
    findings = [
        Finding(one.category, one.box_xyxy, _area_of(one), score, one.rle)
        for one, score in objects
        if np.float32(score) >= value
    ]
    return _judged(findings, max((score for _, score in objects), default=None))


def judged_score(score: float | None, threshold: Threshold) -> Judged:
    """What is said of an image by one score of it as a whole; nothing where it is None."""
    return Judged("" if score is None else verdict(score, threshold.value), score)


def judged_tiles(tiles: Iterable[tuple[float | None, Part]], threshold: Threshold) -> Judged:
    """What is said of an image by the scores of its tiles: each that is called is a finding."""
    known = [(score, part) for score, part in tiles if score is not None]
    highest = max((score for score, _ in known), default=None)
    if highest is None or isnan(threshold.value):
        return Judged("", highest)
    called = [(score, part) for score, part in known if verdict(score, threshold.value) == CALLED]
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
    x1, y1, x2, y2 = one.box_xyxy
    return (x2 - x1) * (y2 - y1)


def _box_of(part: Part) -> Box:
    return float(part.left), float(part.top), float(part.left + part.width), float(part.top + part.height)
