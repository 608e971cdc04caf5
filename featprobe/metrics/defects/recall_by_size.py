"""Recall by the size of defects, in octaves."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SizeBin:
    """Defects of a size of at least `least` and below `below`, and how many of them are found.

    low, high: the 95 % interval of the recall. groups: those that hold such a defect.
    """

    least: float
    below: float
    defects: int
    found: int
    low: float
    high: float
    groups: int

    @property
    def recall(self) -> float:
        """Share of its defects that are found."""
        return self.found / self.defects
