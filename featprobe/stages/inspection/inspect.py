"""From the records of scored heads to what an inspection asks: defects found, false calls, parts, by size, POD.

An operating point is chosen on the validation images alone, and then scored on the test images. Nothing here loads
torch, or looks at an image.
"""

import os
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
from featprobe.metrics.thresholds import units_needed
from featprobe.result_rows import ResultRow
from featprobe.stages.inspection.asking import Asked, check_parts, check_points, check_rule, check_rules, check_size
from featprobe.stages.inspection.scored_heads import (
    ScoredHead,
    by_run,
    check_here,
    folds_of,
    head_in,
    head_of,
    one_of_each,
    rows_asked,
    rows_below,
    validation_of,
)
from featprobe.stages.recording.operating_file import read_point, write_point
from featprobe.stages.recording.record_file import RECORDS, read_records
from featprobe.stages.recording.sizes import in_millimetres
from featprobe.stages.workspace import Workspace, pixel_size_of

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

    heads: their folders. A folder above heads stands for the results below it, and no folder for all of the workspace:
    of each result the seed that is best on validation, and all its folds.
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
    folders = [Path(folder) for folder in heads]
    below = [rows_below(workspace, folder) for folder in folders]
    named = [head_in(folder) for folder, rows in zip(folders, below, strict=True) if not rows]
    several = [row for rows in below for row in rows] if folders else rows_asked(workspace, only or {})
    results = by_run(one_of_each(several))
    made = _Made()
    if rescore:
        check_here(workspace, named)
        rows = [head.row for head in named] + [row for seeds in results for own in seeds for row in own]
        made = _rescored(workspace, rows, rule, device, quiet)
        made.check(head.row for head in named)
    each, left = [_kept(workspace, [head], asked) for head in named], list[Left]()
    for seeds in results:
        try:
            each.append(_best(workspace, seeds, asked, made))
        except UsageError:
            raise
        except FeatprobeError as error:
            left.append(Left(seeds[0][0].folder, str(error)))
    if not each:
        reasons = "\n".join(f"  {own.folder}: {own.reason}" for own in left)
        raise ProbeError(f"None of the results in {workspace.probes} can be inspected.\n{reasons}")
    return Inspections(tuple(each), tuple(left), made.others)


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


@dataclass(frozen=True)
class _Made:
    """What came of making records anew. unmade: folders of rows that have none, or only those from before."""

    notes: tuple[str, ...] = ()
    unmade: frozenset[str] = frozenset()

    @property
    def others(self) -> tuple[str, ...]:
        """The notes that are not on heads without new records."""
        return tuple(note for note in self.notes if not _is_of(note, self.unmade))

    def check(self, rows: Iterable[ResultRow]) -> None:
        """Raise ProbeError where one of these has no new records, so that nobody takes the old ones for them."""
        failed = [row.folder for row in rows if row.folder in self.unmade]
        if failed:
            why = [note for note in self.notes if _is_of(note, failed)]
            raise ProbeError("\n".join(["Its records were not made anew. Those from before were left alone.", *why]))


def _is_of(note: str, folders: Iterable[str]) -> bool:
    """Whether a note says why one of some folders has no new records."""
    return any(f" {folder}:" in note for folder in folders)


def _rescored(
    workspace: Workspace, rows: Sequence[ResultRow], rule: FoundRule | None, device: str | None, quiet: bool
) -> _Made:
    from featprobe.stages.recording.rescore import rescore  # which loads torch

    before = {row.folder: _file_of(workspace, row) for row in rows}
    notes = rescore(workspace, rows, rule, device=device, quiet=quiet)
    return _Made(tuple(notes), frozenset(row.folder for row in rows if _file_of(workspace, row) == before[row.folder]))


def _file_of(workspace: Workspace, row: ResultRow) -> int | None:
    """The number that the file system gives the records of a row; None where there are none."""
    try:
        return os.stat(workspace.probes / row.folder / RECORDS).st_ino
    except OSError:
        return None


def _best(workspace: Workspace, seeds: Sequence[Sequence[ResultRow]], asked: Asked, made: _Made) -> Inspection:
    """What the best seed on validation finds. An operating point that is asked for is kept beside all seeds."""
    best, *others = sorted(seeds, key=lambda rows: (-validation_of(rows), rows[0].seed))
    heads = _heads(workspace, best, made)
    found = _kept(workspace, heads, asked, len(seeds))
    notes = [_kept_too(workspace, rows, asked, made) for rows in others if asked.wanted]
    return replace(found, notes=(*found.notes, *filter(None, notes)))


def _heads(workspace: Workspace, rows: Sequence[ResultRow], made: _Made) -> list[ScoredHead]:
    """The heads of a seed, one or those of all folds; raises ProbeError where one lacks the new records asked for."""
    heads = [head_of(workspace, row) for row in folds_of(workspace, rows[0])]
    made.check(head.row for head in heads)
    return heads


def _kept_too(workspace: Workspace, rows: Sequence[ResultRow], asked: Asked, made: _Made) -> str:
    """Keep an operating point beside the heads of a seed that is not the best; returns a note where that can't be."""
    try:
        heads = _heads(workspace, rows, made)
        _keep(heads, [_chosen(head, _records(workspace, head, asked), asked).point for head in heads])
    except FeatprobeError as error:
        return f"no operating point was kept beside {rows[0].folder}: {' '.join(str(error).split())}"
    return ""


def _kept(workspace: Workspace, heads: Sequence[ScoredHead], asked: Asked, seeds: int = 1) -> Inspection:
    """What heads find; an operating point that is asked for is kept."""
    found = inspected(workspace, heads, asked, seeds)
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
    if stated := pixel_size_of(workspace, head.row.data, head.root):
        records = in_millimetres(records, stated)
    check_rule(head.folder, records, asked.rule)
    check_parts(head.folder, records, asked.wanted)
    return records


@dataclass(frozen=True)
class _Chosen:
    """An operating point. kept: whether it lies beside the head. note: for a user; "" for none."""

    point: OperatingPoint
    kept: bool = False
    note: str = ""


def _chosen(head: ScoredHead, records: Records, asked: Asked) -> _Chosen:
    """The operating point of a head: the one beside it, or one that is chosen now. It sees validation alone."""
    validation = records.of("val")
    kept = None if asked.wanted else read_point(head.folder, head.head_sha256)
    if kept is None:
        return _Chosen(_choose(head, validation, asked.wanted or USUAL, asked.least_area or 1))
    if asked.least_area not in (None, kept.least_area):
        raise UsageError(
            f"{head.folder} has an operating point for calls of {counted(kept.least_area, 'pixel')} or more, not "
            f"{asked.least_area}.\nThe least area is a part of it. Choose it anew:  --min-area {asked.least_area} with "
            "--false-calls, --recall or --cost."
        )
    same_base = kept.base == records.about.base or (isnan(kept.base) and isnan(records.about.base))
    if same_base and counts_at(validation.with_least_area(kept.least_area), kept.threshold) == kept.validation:
        return _Chosen(kept, kept=True)
    return _Chosen(
        _choose(head, validation, kept.wanted, kept.least_area),
        note=f"{head.folder}/operating.json was chosen from other records than those that are there now. Here the "
        f"threshold is chosen anew, for the same ({kept.wanted}); predict and export use the old one until you choose "
        "one with --false-calls, --recall or --cost",
    )


def _choose(head: ScoredHead, validation: Records, wanted: Wanted, least_area: int) -> OperatingPoint:
    try:
        return choose(validation, wanted, least_area)
    except FeatprobeError as error:
        raise ProbeError(f"{head.folder}: no operating point was chosen. {error}") from error


def inspected(workspace: Workspace, heads: Sequence[ScoredHead], asked: Asked, seeds: int = 1) -> Inspection:
    """What one head finds, or those of all folds of a cross-validation. Nothing is written."""
    every = [_records(workspace, head, asked) for head in heads]
    check_rules([head.folder for head in heads], every)
    chosen = [_chosen(head, own, asked) for head, own in zip(heads, every, strict=True)]
    points = tuple(own.point for own in chosen)
    check_points([head.folder for head in heads], points)
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
        kept=all(own.kept for own in chosen),
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
    return replace(result, notes=(*(own.note for own in chosen if own.note), *_notes(result)))


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
    if wanted.kind == "false_calls" and not about.pooled:
        good = min(getattr(point.validation, f"good_{wanted.per}s") for point in own.points)
        least, _ = units_needed(wanted.rate)
        if good < least:
            said.append(
                f"validation has {counted(good, f'good {wanted.per}')}, and {wanted} on good {wanted.per}s alone would "
                f"take {least}: here false calls beside defects count as well"
            )
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
        said.append(
            f"no verdict on {counted(own.parts.unknown, 'part')} without a known defect: not all of their images are "
            "known to be good"
        )
    if not own.parts.good:
        said.append("no part is known to be good in all its images: nothing can be said of good parts that are stopped")
    if not own.test.defects:
        said.append("the test images hold no defect: nothing can be said of what is found")
    if not own.test.good_images:
        said.append("no test image is known to be good: false calls are counted on images with defects alone")
    return tuple(said)
