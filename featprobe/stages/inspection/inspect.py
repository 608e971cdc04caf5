"""From the records of scored heads to what an inspection asks: defects found, false calls, parts, by size, POD.

An operating point is chosen on the validation images alone, and then scored on the test images. Nothing here loads
torch, or looks at an image.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan, nan
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from featprobe.errors import FeatprobeError, ProbeError, UsageError, counted
from featprobe.metrics.defects.froc import Froc, froc
from featprobe.metrics.defects.operating import Counts, OperatingPoint, Wanted, choose, counts_at
from featprobe.metrics.defects.part_verdicts import PartVerdicts, part_verdicts
from featprobe.metrics.defects.recall_by_size import SizeBin, recall_by_size, recall_of
from featprobe.metrics.defects.records import FoundRule, Records, Size, Unit
from featprobe.result_rows import ResultRow
from featprobe.stages.inspection.asking import Asked, check_parts, check_rule, check_size
from featprobe.stages.inspection.scored_heads import (
    ScoredHead,
    by_run,
    check_here,
    folds_of,
    head_in,
    head_of,
    one_of_each,
    rows_asked,
    validation_of,
)
from featprobe.stages.recording.operating_file import read_point, write_point
from featprobe.stages.recording.record_file import read_records
from featprobe.stages.recording.sizes import in_millimetres
from featprobe.stages.workspace import Workspace

if TYPE_CHECKING:
    from featprobe.stages.inspection.pod import PodAnswer

USUAL = Wanted("false_calls", 0.1, "image")
"""What an operating point is chosen for where none is kept and nothing is asked."""


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
    the test images, without calls below the least area; where the head gives each image one score, `Records.judged`.
    thresholds: (images,), of each test image. found: (defects,), whether each is found there. points: the operating
    point, one of each fold. kept: whether it lies beside the head. validation, test: what it gives, over all folds.
    recall: of all defects in test. froc: of the test images. by_size: sizes ascending; empty where the head gives each
    image one score. missed: by class, the one with the largest share missed first. seeds: of how many it is the best on
    validation; 1 where it was named. size, unit: what sizes are. pod: None where it was not asked for. notes: sentences
    for a user.
    """

    row: ResultRow
    folder: Path
    records: Records
    thresholds: NDArray[np.float32]
    found: NDArray[np.bool_]
    points: tuple[OperatingPoint, ...]
    kept: bool
    validation: Counts
    test: Counts
    recall: SizeBin
    froc: Froc
    by_size: tuple[SizeBin, ...]
    parts: PartVerdicts
    missed: tuple[Missed, ...]
    seeds: int
    size: Size
    unit: Unit
    pod: "PodAnswer | None" = None
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        test = self.test
        found = f"{test.found} of {counted(test.defects, 'defect')} found"
        return f"Inspection({str(self.folder)!r}, {found}, {counted(test.false_calls, 'false call')})"

    @property
    def point(self) -> OperatingPoint | None:
        """The operating point; None where each fold has its own."""
        return self.points[0] if len(self.points) == 1 else None


@dataclass(frozen=True)
class Left:
    """A head that could not be inspected, and why, with what to do."""

    folder: str
    reason: str


@dataclass(frozen=True)
class Inspections:
    """What an inspection of several heads found: one for each result, of its seeds the best on validation.

    left: heads that could not be inspected. notes: sentences for a user.
    """

    each: tuple[Inspection, ...]
    left: tuple[Left, ...] = ()
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        left = f", {len(self.left)} left" if self.left else ""
        return f"Inspections({counted(len(self.each), 'head')}{left})"


def inspect(
    workspace: Workspace,
    heads: Iterable[str | Path] = (),
    *,
    wanted: Wanted | None = None,
    size: Size = "root_area",
    unit: Unit = "px",
    least_area: int | None = None,
    rule: FoundRule | None = None,
    pod: bool = False,
    rescore: bool = False,
    only: Mapping[str, Sequence[str]] | None = None,
    device: str | None = None,
    quiet: bool = False,
) -> Inspections:
    """What scored heads find, by the records that lie beside them.

    heads: their folders; without any, all results of the workspace, of each the seed that is best on validation.
    wanted: what an operating point is chosen for on validation; it is then kept beside every head that is asked about,
    where `predict` and `export` find it. Without it, the one that is kept there, or 0.1 false calls per image, which is
    not kept. size, unit: of defects. least_area: pixels; calls below it do not count; None for that of the kept
    operating point, or 1. rule: when a call has found a defect; None for the rule of each record. pod: also a
    probability of detection. rescore: first make records anew, from cache and head, with `rule` if one is given, on
    this device, with a progress bar unless `quiet`. only: "task", "data" or "backbone" -> the values that results may
    have.
    Raises UsageError for values that can't be, ProbeError where a named head, or none of all, can be inspected.
    """
    asked = Asked(wanted, size, unit, least_area, rule, pod)
    named = [head_in(Path(folder)) for folder in heads]
    results = by_run(one_of_each(rows_asked(workspace, only or {}))) if not named else []
    notes = list[str]()
    if rescore:
        check_here(workspace, named)
        rows = [head.row for head in named] + [row for seeds in results for own in seeds for row in own]
        notes = _rescored(workspace, rows, rule, device, quiet)
    each, left = [_kept(workspace, [head], asked, 1, notes) for head in named], list[Left]()
    for seeds in results:
        try:
            each.append(_best(workspace, seeds, asked))
        except UsageError:
            raise
        except FeatprobeError as error:
            left.append(Left(seeds[0][0].folder, str(error)))
    if not each:
        reasons = "\n".join([*(f"  {own.folder}: {own.reason}" for own in left), *(f"  {note}" for note in notes)])
        raise ProbeError(f"None of the results in {workspace.probes} can be inspected.\n{reasons}")
    return Inspections(tuple(each), tuple(left), tuple(notes))


def inspect_head(
    workspace: Workspace,
    row: ResultRow,
    wanted: Wanted | None = None,
    size: Size = "root_area",
    unit: Unit = "px",
    least_area: int | None = None,
    rule: FoundRule | None = None,
    *,
    pod: bool = False,
) -> Inspection:
    """What the head of a result row finds; of a row of a fold, what the heads of all folds of its seed find.

    Arguments as of `inspect`; nothing is written. Raises ProbeError where there are no records, or they can't
    carry what is asked.
    """
    heads = [head_of(workspace, own) for own in folds_of(workspace, row)]
    return inspected(workspace, heads, Asked(wanted, size, unit, least_area, rule, pod))


def _rescored(
    workspace: Workspace, rows: Sequence[ResultRow], rule: FoundRule | None, device: str | None, quiet: bool
) -> list[str]:
    from featprobe.stages.recording.rescore import rescore  # which loads torch

    return rescore(workspace, rows, rule, device=device, quiet=quiet)


def _best(workspace: Workspace, seeds: Sequence[Sequence[ResultRow]], asked: Asked) -> Inspection:
    """What the best seed on validation finds. An operating point that is asked for is kept beside all seeds."""
    ranked = sorted(seeds, key=lambda rows: (-validation_of(rows), rows[0].seed))
    whole = [[head_of(workspace, row) for row in folds_of(workspace, rows[0])] for rows in ranked]
    for heads in whole[1:] if asked.wanted else ():
        _keep(heads, [_point(head, _records(workspace, head, asked), asked)[0] for head in heads])
    return _kept(workspace, whole[0], asked, len(seeds))


def _kept(
    workspace: Workspace, heads: Sequence[ScoredHead], asked: Asked, seeds: int = 1, notes: Sequence[str] = ()
) -> Inspection:
    """What heads find; an operating point that is asked for is kept. notes: on records that could not be made."""
    try:
        found = inspected(workspace, heads, asked, seeds)
    except ProbeError as error:
        if notes:
            raise ProbeError("\n".join([str(error), *notes])) from error
        raise
    if asked.wanted:
        _keep(heads, found.points)
        return replace(found, kept=True)
    return found


def _keep(heads: Sequence[ScoredHead], points: Sequence[OperatingPoint]) -> None:
    for head, point in zip(heads, points, strict=True):
        write_point(head.folder, head.head_sha256, point)


def _records(workspace: Workspace, head: ScoredHead, asked: Asked) -> Records:
    """The records beside a head, if they can carry what is asked."""
    records = read_records(head.folder, head.head_sha256)
    if stated := workspace.pixel_size(head.row.data, head.root):
        records = in_millimetres(records, stated)
    check_rule(head.folder, records, asked.rule)
    check_parts(head.folder, records, asked.wanted)
    return records


def _point(head: ScoredHead, records: Records, asked: Asked) -> tuple[OperatingPoint, bool]:
    """The operating point of a head, and whether it is the one that lies beside it. It sees validation alone."""
    kept = None if asked.wanted else read_point(head.folder, head.head_sha256)
    if kept is None:
        try:
            return choose(records.of("val"), asked.wanted or USUAL, asked.least_area or 1), False
        except FeatprobeError as error:
            raise ProbeError(f"{head.folder}: no operating point was chosen. {error}") from error
    if asked.least_area not in (None, kept.least_area):
        raise UsageError(
            f"{head.folder} has an operating point for calls of {kept.least_area} pixels or more, not "
            f"{asked.least_area}.\nThe least area is a part of it. Choose it anew:  --min-area {asked.least_area} with "
            "--false-calls, --recall or --cost."
        )
    if kept.base != records.about.base and not (isnan(kept.base) and isnan(records.about.base)):
        raise ProbeError(
            f"{head.folder}/operating.json was chosen from other records than those that are there now.\n"
            f"  wanted  calls at the base threshold {records.about.base:.6g}\n  found   {kept.base:.6g}\n"
            "Choose it anew with --false-calls, --recall or --cost; or remove the file."
        )
    return kept, True


def inspected(workspace: Workspace, heads: Sequence[ScoredHead], asked: Asked, seeds: int = 1) -> Inspection:
    """What one head finds, or those of all folds of a cross-validation. Nothing is written."""
    every = [_records(workspace, head, asked) for head in heads]
    chosen = [_point(head, own, asked) for head, own in zip(heads, every, strict=True)]
    points = tuple(point for point, _ in chosen)
    parts = [own.with_least_area(point.least_area) for own, point in zip(every, points, strict=True)]
    tested = [own.of("test") for own in parts]
    records = Records.joined(tested).judged()
    check_size(heads[0].folder, records, asked.size, asked.unit)
    thresholds = np.repeat(np.array([p.threshold for p in points], np.float32), [len(own.images) for own in tested])
    found = records.found(thresholds)
    said = [counts_at(own.of("val"), point.threshold) for own, point in zip(parts, points, strict=True)]
    result = Inspection(
        row=heads[0].row,
        folder=heads[0].folder,
        records=records,
        thresholds=thresholds,
        found=found,
        points=points,
        kept=all(kept for _, kept in chosen),
        validation=said[0] if len(said) == 1 else _sum(said),
        test=counts_at(records, thresholds),
        recall=recall_of(records, thresholds),
        froc=froc(records, points[0].wanted.per),
        by_size=recall_by_size(records, thresholds, asked.size, asked.unit),
        parts=part_verdicts(records, thresholds),
        missed=_by_class(records, found),
        seeds=seeds,
        size=asked.size,
        unit=asked.unit,
        pod=_pod(records, found, points, asked) if asked.pod else None,
    )
    return replace(result, notes=_notes(result))


def _pod(records: Records, found: NDArray[np.bool_], points: Sequence[OperatingPoint], asked: Asked) -> "PodAnswer":
    from featprobe.stages.inspection.pod import pod_of  # fits take scipy, which most inspections do without

    return pod_of(records, found, tuple(point.threshold for point in points), asked.size, asked.unit)


def _sum(each: Sequence[Counts]) -> Counts:
    """Counts over the folds of a cross-validation."""
    whole = {name: sum(getattr(own, name) for own in each) for name in Counts.__dataclass_fields__}
    return Counts(**{**whole, "threshold": nan})


def _by_class(records: Records, found: NDArray[np.bool_]) -> tuple[Missed, ...]:
    """Each class that has defects, the largest share missed first; 0 stands for a class that is not known."""
    names, categories = records.about.classes, records.defects.category
    every, missed = (np.bincount(own, minlength=256) for own in (categories, categories[~found]))
    each = [
        Missed(names[i] if 0 < i < len(names) else "", int(every[i]), int(missed[i])) for i in np.flatnonzero(every)
    ]
    return tuple(sorted(each, key=lambda own: (-own.missed / own.defects, -own.defects, own.name)))


def _notes(own: Inspection) -> tuple[str, ...]:
    """What a reader should know before believing the figures."""
    about, wanted = own.records.about, own.points[0].wanted
    said = []
    if not all(point.sure for point in own.points):
        unit = "defects" if wanted.kind == "recall" else f"{wanted.per}s"
        needed = max(point.needed for point in own.points)
        said.append(f"validation is too small to be 95 % sure of {wanted}: that takes {needed} {unit}")
    if len(own.points) > 1:
        said.append(
            f"{len(own.points)} folds: each head decides at its own operating point, and all test images together are "
            "one test set; the FROC curve ranks what all heads found together"
        )
    elif own.row.fold:
        said.append(f"fold {own.row.fold} of {own.row.choice.folds} alone; without a folder all folds are inspected")
    if about.base_from == "default":
        said.append("calls are joined at a default threshold of pixels, as validation holds no defect to choose one by")
    if not about.parts:
        said.append("groups of images are not known to be parts, so each image counts as a part")
    if own.parts.unknown:
        said.append(f"{counted(own.parts.unknown, 'part')} with ignored regions and no defect have no verdict")
    if not own.test.defects:
        said.append("the test images hold no defect: nothing can be said of what is found")
    if not own.test.good_images:
        said.append("no test image is known to be good: false calls are counted on images with defects alone")
    return tuple(said)
