"""Verdicts of whole parts: a part is rejected when any of its images holds a call."""

from dataclasses import dataclass
from math import nan

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featprobe.metrics.defects.records import DEFECT, GOOD, UNKNOWN, Records
from featprobe.metrics.defects.shares import exact_interval
from featprobe.metrics.intervals import grouped


@dataclass(frozen=True)
class PartVerdicts:
    """Parts by what is known of them and what is said. A part is bad if any image holds a defect, good if all are good,
    else unknown, and then it takes part in no rate.

    bad, good, unknown: their numbers. escaped: bad parts without a call. stopped: good parts with one. escapes_low,
    escapes_high, overkill_low, overkill_high: exact 95 % intervals of both rates; nan where there is no such part.
    escaped_parts, stopped_parts: their names, in alphabetical order.
    """

    bad: int
    good: int
    unknown: int
    escaped: int
    stopped: int
    escapes_low: float
    escapes_high: float
    overkill_low: float
    overkill_high: float
    escaped_parts: tuple[str, ...]
    stopped_parts: tuple[str, ...]

    @property
    def escapes(self) -> float:
        """Share of the bad parts that have no call; nan without a bad part."""
        return self.escaped / self.bad if self.bad else nan

    @property
    def overkill(self) -> float:
        """Share of the good parts that have a call; nan without a good part."""
        return self.stopped / self.good if self.good else nan


def part_verdicts(records: Records, threshold: ArrayLike) -> PartVerdicts:
    """What is said of each part at a threshold: of all images, or one for each, (images,).

    Any call rejects a part, whatever it touches. Where groups are not known to be parts, they are judged all the same:
    see `About.parts`.
    """
    own = records.judged()
    names, part = grouped(own.images.groups)
    rejected = _any(part[own.calls.image[own.called(threshold)]], len(names))
    known = states(own.images.good, part, len(names))
    escaped, stopped = (np.flatnonzero(own) for own in ((known == DEFECT) & ~rejected, (known == GOOD) & rejected))
    bad, good, unknown = (int(np.sum(known == state)) for state in (DEFECT, GOOD, UNKNOWN))
    (escapes_low, overkill_low), (escapes_high, overkill_high) = (
        end.tolist() for end in exact_interval([len(escaped), len(stopped)], [bad, good])
    )
    return PartVerdicts(
        bad,
        good,
        unknown,
        len(escaped),
        len(stopped),
        escapes_low,
        escapes_high,
        overkill_low,
        overkill_high,
        tuple(names[i] for i in escaped),
        tuple(names[i] for i in stopped),
    )


def states(good: NDArray[np.uint8], part: NDArray[np.intp], parts: int) -> NDArray[np.uint8]:
    """What is known of each part, (parts,): DEFECT, GOOD or UNKNOWN. good: of its images; part: the index of each."""
    bad, unsure = _any(part[good == DEFECT], parts), _any(part[good != GOOD], parts)
    return np.where(bad, DEFECT, np.where(unsure, UNKNOWN, GOOD)).astype(np.uint8)


def _any(members: NDArray[np.intp], parts: int) -> NDArray[np.bool_]:
    """Whether a part is among some, (parts,)."""
    return np.bincount(members, minlength=parts) > 0
