"""Records at operating points: what counts there as called and as found, also where each fold has a point of its own."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from featprobe.metrics.defects.operating import OperatingPoint
from featprobe.metrics.defects.records import GOOD, NOTHING, Calls, Defects, Images, Objects, Records

DECIDED = 0.5
"""The threshold of records that are decided: calls that count score 1, as do defects that are found and images that are
called."""
Own = TypeVar("Own", bound=Objects)


def decided(records: Records, point: OperatingPoint) -> Records:
    """Records with the scores of DECIDED instead of their own; calls below the point's least area are dropped."""
    kept = records.with_least_area(point.least_area)

    def called(scores: NDArray[np.float32]) -> NDArray[np.float32]:
        return (scores >= np.float32(point.threshold)).astype(np.float32)

    images = replace(kept.images, score=np.where(np.isnan(kept.images.score), np.nan, called(kept.images.score)))
    defects, calls = (replace(own, score=called(own.score)) for own in (kept.defects, kept.calls))
    return replace(kept, images=images, defects=defects, calls=calls)


def joined(each: Sequence[Records]) -> Records:
    """Records of several heads on different images as those of one test set. about: that of the first."""
    if len(each) == 1:
        return each[0]
    starts = np.cumsum([0, *(len(own.images) for own in each)])[:-1]
    defects = np.cumsum([0, *(len(own.defects) for own in each)])[:-1]
    calls = np.cumsum([0, *(len(own.calls) for own in each)])[:-1]
    finds = [own.finds + (call, defect) for own, call, defect in zip(each, calls, defects, strict=True)]
    return Records(
        each[0].about,
        _together(Images, [own.images for own in each]),
        _moved(Defects, [own.defects for own in each], starts),
        _moved(Calls, [own.calls for own in each], starts),
        np.concatenate(finds),
    )


def _moved(kind: type[Own], each: Sequence[Own], starts: Sequence[int]) -> Own:
    """Objects of several records, whose images are counted from these numbers on."""
    return _together(kind, [replace(own, image=own.image + start) for own, start in zip(each, starts, strict=True)])


def _together(kind: type[Own] | type[Images], each: Sequence[Own] | Sequence[Images]):
    """Columns of several tables, one below the other."""
    columns = {field.name: [getattr(own, field.name) for own in each] for field in fields(kind)}
    return kind(**{
        name: tuple(value for own in column for value in own) if isinstance(column[0], tuple) else np.concatenate(column)
        for name, column in columns.items()
    })  # fmt: skip


def stray_calls(verdicts: Records) -> int:
    """False calls on good parts, of records that are decided; where images have one score, good images that are called.

    A part is good if all its images are.
    """
    names, group = np.unique(np.asarray(verdicts.images.groups, dtype=str), return_inverse=True)
    mixed = np.bincount(group, verdicts.images.good != GOOD, len(names)) > 0
    if verdicts.about.pooled:
        return int(np.sum(~mixed[group] & (verdicts.images.score >= DECIDED)))
    calls = verdicts.calls
    return int(np.sum((calls.score >= DECIDED) & (calls.touched == NOTHING) & ~mixed[group][calls.image]))


def missed_by_class(records: Records, found: NDArray[np.bool_]) -> list[tuple[str, int, int]]:
    """Each class that has defects: its name, their number, and how many are missed; the largest share missed first."""
    categories = records.defects.category
    every, missed = (np.bincount(own, minlength=256) for own in (categories, categories[~found]))
    there = sorted(
        np.flatnonzero(every).tolist(), key=lambda index: (-missed[index] / every[index], -every[index], index)
    )
    return [(_name(records, index), int(every[index]), int(missed[index])) for index in there]


def _name(records: Records, index: int) -> str:
    """The name of a class; 0 stands for one that is not known."""
    return records.about.classes[index] if 0 < index < len(records.about.classes) else "defect"
