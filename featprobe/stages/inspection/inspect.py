"""From the records of scored heads to what an inspection asks: defects found, false calls, parts, by size, POD.

An operating point is chosen on the validation images alone, and then scored on the test images.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from featprobe.metrics.defects.records import FoundRule, Records, Size, Unit
from featprobe.result_rows import ResultRow
from featprobe.stages.workspace import Workspace

if TYPE_CHECKING:
    from featprobe.metrics.defects.froc import Froc
    from featprobe.metrics.defects.operating import OperatingPoint, Wanted
    from featprobe.metrics.defects.part_verdicts import PartVerdicts
    from featprobe.metrics.defects.recall_by_size import SizeBin
    from featprobe.metrics.pod.values import Pod, Refused


@dataclass(frozen=True)
class Counts:
    """What a head said of the images of a split at its operating point.

    images: all of them, good: those known to hold no defect. parts, good_parts: the same of parts. defects, found:
    those of the truth, and those of them that are found. calls, false_calls: all, and those that touch neither a defect
    nor an ignored region. stray: false calls on good parts. Where a head gives each image one score, the images with a
    defect stand for defects, and calls are of images.
    """

    images: int
    good: int
    parts: int
    good_parts: int
    defects: int
    found: int
    calls: int
    false_calls: int
    stray: int


@dataclass(frozen=True)
class Missed:
    """How many defects of a class there are in test, and how many of them are missed."""

    name: str
    defects: int
    missed: int


@dataclass(frozen=True)
class Inspection:
    """What the records of one head say; of a cross-validation, those of the heads of all its folds.

    row: the result row of the head, folder: where it lies; of a cross-validation those of its first fold. records: of
    the test images, as they were kept; with calls below the least area dropped. found: (defects,), whether each is
    found at the operating point. points: the operating point, one of each fold. kept: whether it is the one that lies
    beside the head. validation, test: counts at that point, of all folds together. froc: of the test images.
    by_size: at the operating point, sizes ascending. parts: None where no image has a verdict. missed: by class, the
    one with the largest share missed first. seeds: of how many seeds it is the best on validation. size, unit: what
    sizes are. pod: None where it was not asked for. notes: sentences for a user.
    """

    row: ResultRow
    folder: Path
    records: Records
    points: "tuple[OperatingPoint, ...]"
    kept: bool
    validation: Counts
    test: Counts
    froc: "Froc | None"
    by_size: "tuple[SizeBin, ...]"
    parts: "PartVerdicts | None"
    missed: tuple[Missed, ...]
    seeds: int
    size: Size
    unit: Unit
    pod: "Pod | Refused | None" = None
    notes: tuple[str, ...] = field(default=())

    @property
    def point(self) -> "OperatingPoint | None":
        """The operating point; None where each fold has its own."""
        return self.points[0] if len(self.points) == 1 else None


@dataclass(frozen=True)
class Left:
    """A head that could not be inspected, and why; with what to do."""

    folder: str
    reason: str


@dataclass(frozen=True)
class Inspections:
    """What an inspection of several heads found: one for each result, the best seed on validation of each.

    left: heads that could not be inspected. notes: sentences for a user.
    """

    each: tuple[Inspection, ...]
    left: tuple[Left, ...]
    notes: tuple[str, ...]


def inspect_head(
    workspace: Workspace,
    row: ResultRow,
    wanted: "Wanted | None" = None,
    size: Size = "root_area",
    unit: Unit = "px",
    least_area: int | None = None,
    rule: FoundRule | None = None,
    *,
    pod: bool = False,
) -> Inspection:
    """What the head of a result row finds; of a row of a fold, what the heads of all folds of its seed find.

    wanted: what the operating point is chosen for; None for the one that is kept beside the head, or where there is
    none, 0.1 false calls per image. Nothing is written. least_area: pixels, calls below it are dropped; None for that
    of the kept operating point, or 1. rule: the rule of found that records must have; None for any.
    Raises ProbeError where there are no records, or they can't carry what is asked.
    """
    raise NotImplementedError
