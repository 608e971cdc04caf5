"""Verdicts of whole parts: a part is rejected when any of its images holds a call."""

from dataclasses import dataclass
from math import nan


@dataclass(frozen=True)
class PartVerdicts:
    """Parts by what is known of them and what is said. A part is bad if any image holds a defect, good if all are good,
    else unknown, and then it takes part in no rate.

    bad, good, unknown: their numbers. escaped: bad parts without a call. stopped: good parts with one. escapes_low,
    escapes_high, overkill_low, overkill_high: exact 95 % intervals of both rates; nan where there is no such part.
    escaped_parts, stopped_parts: their names.
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
