"""Operating points: thresholds that are chosen on validation for what is wanted, and what a threshold gives."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, isfinite, nan
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featprobe.errors import DataError, UsageError, counted
from featprobe.metrics.defects.froc import CLOSE, Per, check_per, units_of
from featprobe.metrics.defects.part_verdicts import states
from featprobe.metrics.defects.records import GOOD, NOTHING, Records
from featprobe.metrics.intervals import grouped
from featprobe.metrics.thresholds import units_needed

Kind = Literal["false_calls", "recall", "cost"]
Floats = NDArray[np.float64]
OPTIONS: Mapping[Kind, str] = {"false_calls": "--false-calls", "recall": "--recall", "cost": "--cost"}


@dataclass(frozen=True)
class Counts:
    """What a threshold gives on some images.

    threshold: nan where images have several. images, good_images: all, and those known to hold no defect; parts,
    good_parts: the same of parts, of which a good one holds good images alone. found: of so many `defects`. calls,
    false_calls: all, and those that touch neither a defect nor an ignored region; stray: false calls in good parts.
    over_images, over_parts: by what false calls are divided: all; where images have one score, those that are good or
    hold a good image. There images with a defect stand for defects, and calls are of images.
    """

    threshold: float
    images: int
    good_images: int
    parts: int
    good_parts: int
    defects: int
    found: int
    calls: int
    false_calls: int
    stray: int
    over_images: int
    over_parts: int

    @property
    def recall(self) -> float:
        """Share of the defects that are found; nan without a defect."""
        return self.found / self.defects if self.defects else nan

    @property
    def missed(self) -> int:
        """Defects that are not found."""
        return self.defects - self.found

    def over(self, per: Per) -> int:
        """The number that false calls are divided by."""
        return self.over_images if per == "image" else self.over_parts

    def false_calls_per(self, per: Per) -> float:
        """False calls per image or per part; nan where there is none."""
        return self.false_calls / self.over(per) if self.over(per) else nan


@dataclass(frozen=True)
class Wanted:
    """What an operating point is chosen for.

    kind "false_calls": at most `rate` false calls per image or part. "recall": at least a share `rate` of the defects
    found. "cost": the least cost, where a missed defect costs `miss` and a false call costs `call`.
    Raises UsageError for values out of their limits.
    """

    kind: Kind
    rate: float = nan
    per: Per = "image"
    miss: float = nan
    call: float = nan

    def __post_init__(self) -> None:
        fits = {
            "false_calls": (0 <= self.rate < np.inf, "a number of false calls, 0 or more", self.rate),
            "recall": (0 < self.rate <= 1, "a share of the defects, above 0 and at most 1", self.rate),
            "cost": (
                all(0 < own < np.inf for own in (self.miss, self.call)),
                "a cost above 0 of a missed defect and of a false call",
                f"miss={self.miss:g},call={self.call:g}",
            ),
        }
        holds, wanted, found = fits[self.kind]
        if not holds:
            raise _refused(self.kind, wanted, found)

    @classmethod
    def parse(cls, text: str) -> "Wanted":
        """A number of false calls; per image where it is not said per what.

        >>> Wanted.parse("0.05/part")
        Wanted(kind='false_calls', rate=0.05, per='part', miss=nan, call=nan)
        """
        rate, slash, per = text.partition("/")
        unit = per.strip() if slash else "image"
        value = _number(rate)
        if value is None or unit not in ("image", "part"):
            raise _refused("false_calls", "a number of false calls per image or per part, like 0.05/part", text)
        return cls("false_calls", value, "image" if unit == "image" else "part")

    @classmethod
    def parse_recall(cls, text: str) -> "Wanted":
        """A share of the defects that must be found, like 0.95."""
        value = _number(text)
        if value is None:
            raise _refused("recall", "a share of the defects, like 0.95", text)
        return cls("recall", value)

    @classmethod
    def parse_cost(cls, text: str) -> "Wanted":
        """What a missed defect and a false call cost, in any unit; their ratio alone matters.

        >>> Wanted.parse_cost("miss=100,call=1")
        Wanted(kind='cost', rate=nan, per='image', miss=100.0, call=1.0)
        """
        sides = [side.partition("=") for side in text.split(",")]
        values = {name.strip(): _number(value) for name, _, value in sides}
        miss, call = values.get("miss"), values.get("call")
        if miss is None or call is None or len(sides) != 2:
            lacking = [name for name in ("miss", "call") if values.get(name) is None]
            said = f"{text} (no number for {' and '.join(lacking)})" if lacking else text
            raise _refused("cost", "what a missed defect and a false call cost, like miss=100,call=1", said)
        return cls("cost", miss=miss, call=call)

    def __str__(self) -> str:
        if self.kind == "false_calls":
            return f"at most {self.rate:g} false calls per {self.per}"
        if self.kind == "recall":
            return f"at least {100 * self.rate:g} % of the defects found"
        return f"least cost, where a missed defect costs {self.miss:g} and a false call {self.call:g}"


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


def counts_at(records: Records, threshold: ArrayLike) -> Counts:
    """What a threshold gives: one of all images, or one for each, (images,)."""
    own = records.judged()
    names, part = grouped(own.images.groups)
    called = own.called(threshold)
    false = called & (own.calls.touched == NOTHING)
    good_parts = states(own.images.good, part, len(names)) == GOOD
    several = np.unique(np.asarray(threshold, dtype=np.float32))
    over_images, over_parts = (int(units_of(own, per, part, len(names)).sum()) for per in ("image", "part"))
    return Counts(
        float(several[0]) if len(several) == 1 else nan,
        len(own.images),
        int(np.sum(own.images.good == GOOD)),
        len(names),
        int(good_parts.sum()),
        len(own.defects),
        int(own.found(threshold).sum()),
        int(called.sum()),
        int(false.sum()),
        int(good_parts[part[own.calls.image[false]]].sum()),
        over_images,
        over_parts,
    )


def choose(validation: Records, wanted: Wanted, least_area: int = 1) -> OperatingPoint:
    """The operating point for what is wanted: of false calls the lowest threshold that gives no more, of recall the
    highest that gives it, of cost the one that costs least, and of equal ones the highest.

    validation: records of validation images alone. The threshold lies between two scores of its calls, so that it makes
    no difference there whether a call needs to reach it or to exceed it; only where no other number lies between them
    it is the higher one, which counts.
    Raises DataError where these records can't carry it, and for records of test images.
    """
    if "test" in validation.images.splits:
        raise DataError("An operating point is chosen on validation images. These records hold test images.")
    if wanted.kind == "false_calls":
        check_per(validation, wanted.per)
    own = validation.with_least_area(least_area).judged()
    there = counts_at(own, np.inf)
    needed = _check_carries(wanted, there)
    scores = np.unique(own.calls.score)[::-1]  # falling
    alarms, finds = np.sort(own.calls.score[own.calls.touched == NOTHING]), np.sort(own.defects.score)
    false, found = (
        np.concatenate([[0], len(ends) - np.searchsorted(ends, scores, "left")]) for ends in (alarms, finds)
    )  # (scores + 1,), with none of the scores called, with the highest, ...
    threshold = _between(scores, _called(wanted, false, found, there), own.about.base)
    counts = counts_at(own, threshold)
    return OperatingPoint(
        threshold, own.about.base, least_area, wanted, counts, _carried(wanted, counts) >= needed, needed
    )


def _called(wanted: Wanted, false: NDArray[np.intp], found: NDArray[np.intp], there: Counts) -> int:
    """How many of the distinct scores are called. false, found: false calls and found defects for each number."""
    defects = there.defects
    if wanted.kind == "false_calls":
        return int(np.searchsorted(false, wanted.rate * there.over(wanted.per) + CLOSE, "right")) - 1
    if wanted.kind == "cost":
        return int(np.argmin(wanted.miss * (defects - found) + wanted.call * false))
    least = ceil(wanted.rate * defects - CLOSE)
    if found[-1] < least:
        raise DataError(
            f"A recall of {wanted.rate:g} can't be reached on validation.\n"
            f"  wanted  {least} or more of {counted(defects, 'defect')} found\n"
            f"  found   {found[-1]} at most, with all calls of this head\n"
            "Ask for a lower recall, for fewer false calls with --false-calls, or train another head."
        )
    return int(np.searchsorted(found, least, "left"))


def _between(scores: NDArray[np.float32], called: int, base: float) -> float:
    """A threshold that calls so many of the scores, which fall."""
    if not len(scores):
        if isfinite(base):
            return float(np.float32(base))
        raise DataError(
            "This head calls nothing on validation, so no threshold can be set there.\n"
            "Train another head, or give validation more images with defects."
        )
    if called == 0:
        return float(np.nextafter(scores[0], np.float32(np.inf)))
    lowest = scores[called - 1]
    if called == len(scores):  # all: of maps the base calls them too
        return float(np.float32(base) if isfinite(base) else np.nextafter(lowest, np.float32(-np.inf)))
    below = scores[called]
    middle = np.float32((float(lowest) + float(below)) / 2)
    return float(middle if below < middle else lowest)


def _carried(wanted: Wanted, counts: Counts) -> int:
    """How many units of validation say something about what is wanted."""
    return counts.over(wanted.per) if wanted.kind == "false_calls" else counts.defects


def _check_carries(wanted: Wanted, there: Counts) -> int:
    """How many units it takes to be 95 % sure of what is wanted; raises DataError where there are too few at all."""
    held, per = _carried(wanted, there), wanted.per
    if wanted.kind == "cost":
        if not held:
            raise DataError(
                "Validation holds no defect, so that no miss can be weighed against false calls.\n"
                "Give validation images with defects, or ask for a number of false calls with --false-calls."
            )
        return 1
    least, sure = units_needed(wanted.rate if wanted.kind == "false_calls" else 1 - wanted.rate)
    if held >= least:
        return sure
    if wanted.kind == "recall":
        raise DataError(
            f"A recall of {wanted.rate:g} can't be set with {counted(held, 'defect')} of validation.\n"
            f"  wanted  {least} or more (one miss among them), {sure} to be 95 % sure of it\n"
            "Give validation more defects, or ask for a lower recall."
        )
    good = there.good_images if per == "image" else there.good_parts
    raise DataError(
        f"{wanted.rate:g} false calls per {per} can't be set with {counted(held, f'{per}')} of validation.\n"
        f"  wanted  {least} or more (one false call among them), {sure} to be 95 % sure of it\n"
        f"  found   {held}, of which {good} are good\n"
        "Give validation more of them, or ask for a larger number with --false-calls."
    )


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if isfinite(value) else None


def _refused(kind: Kind, wanted: str, found: object) -> UsageError:
    return UsageError(f"{OPTIONS[kind]} can't be used.\n  wanted  {wanted}\n  found   {found}\nNothing was changed.")
