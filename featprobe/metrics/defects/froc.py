"""Share of defects found against false calls (FROC), with a band over groups."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Per = Literal["image", "part"]


@dataclass(frozen=True)
class Froc:
    """The curve of a test set, as steps: at each point it rises to that recall, and holds it up to the next.

    thresholds: (points,), falling; inf for the first point, where nothing is called. false_calls: (points,), mean per
    image or part. recall: (points,), share of the defects found; nan without a defect.
    rates: (k,), numbers of false calls at which the band is known. low, high: (k,), the band of the recall there; nan
    where there is none, with fewer than two groups or no defect.
    units: images or parts that false calls are divided by. without: share of them without a defect, which moves the
    curve. defects: their number. groups: of the band.
    """

    per: Per
    thresholds: NDArray[np.float32]
    false_calls: Floats
    recall: Floats
    rates: Floats
    low: Floats
    high: Floats
    units: int
    without: float
    defects: int
    groups: int

    def recall_at(self, rate: float) -> float:
        """The highest recall with no more than so many false calls per image or part."""
        return float(self.recall[np.searchsorted(self.false_calls, rate, side="right") - 1])
