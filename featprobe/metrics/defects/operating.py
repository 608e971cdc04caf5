"""Operating points: thresholds that are chosen on validation for what is wanted, and what a threshold gives."""

from dataclasses import dataclass
from math import nan
from typing import Literal

from featprobe.metrics.defects.froc import Per

Kind = Literal["false_calls", "recall", "cost"]


@dataclass(frozen=True)
class Counts:
    """What a threshold gives on some images.

    found: of so many `defects`. false_calls: calls that touch nothing. images, parts: by which false calls are divided.
    good_images: those without a defect. Of heads that score whole images a defect is an image with one, a false call is
    a good image that is called, and images and parts are those that are good or hold a good image.
    """

    threshold: float
    found: int
    defects: int
    false_calls: int
    images: int
    good_images: int
    parts: int

    @property
    def recall(self) -> float:
        """Share of the defects that are found; nan without a defect."""
        return self.found / self.defects if self.defects else nan

    @property
    def missed(self) -> int:
        """Defects that are not found."""
        return self.defects - self.found

    def false_calls_per(self, per: Per) -> float:
        """False calls per image or per part; nan where there is none."""
        units = self.images if per == "image" else self.parts
        return self.false_calls / units if units else nan


@dataclass(frozen=True)
class Wanted:
    """What an operating point is chosen for.

    kind "false_calls": at most `rate` false calls per image or part. "recall": at least a share `rate` of the defects
    found. "cost": the least cost, where a missed defect costs `miss` and a false call costs `call`.
    """

    kind: Kind
    rate: float = nan
    per: Per = "image"
    miss: float = nan
    call: float = nan


@dataclass(frozen=True)
class OperatingPoint:
    """A threshold that was chosen on validation: a call counts from it on.

    base: of the pixels of a map that are joined to calls; nan where calls are detections or images have one score.
    least_area: pixels; smaller calls do not count. validation: what it gives there. sure: whether validation is large
    enough to be 95 % sure of what is wanted, which takes `needed` images, parts or defects (rule of three).
    """

    threshold: float
    base: float
    least_area: int
    wanted: Wanted
    validation: Counts
    sure: bool
    needed: int
