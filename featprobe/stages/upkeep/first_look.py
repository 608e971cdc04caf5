"""What suits a data set first: a task with its head, its labels and a split, from what a check of the set found."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from featprobe.datasets import DataSet
from featprobe.errors import DataError, counted
from featprobe.image_labels import ImageLabels
from featprobe.kinds import KINDS, HeadKind
from featprobe.scores import FEW_GROUPS, SCORES, On
from featprobe.stages.upkeep.check import DataCheck

LEAK = "group_leak"  # the finding that groups stand in several splits
BY_GROUP = "stratified"  # the split by group that gives each part its share of every class
FOLDS = 5
LEAST_GROUPS = 2 * FOLDS  # with fewer, folds would hold next to nothing
WHOLE = "whole set"


@dataclass(frozen=True)
class Aim:
    """What a first study of a set learns.

    labels: of whole images, as `ProbeOptions` has them. split: as `SplitChoice` parses it. reasons: for the head, the
    labels and the split, for people.
    """

    kind: HeadKind
    labels: ImageLabels
    split: str
    reasons: tuple[str, ...]


def aim_at(checked: DataCheck, data: DataSet) -> Aim:
    """The first task, in the order of the tables, that the labels of a set can teach and test.

    Kinds of heads that are solved and draw nothing come first: one seed says it all, so that a verdict needs no others,
    and folds cost little. data: the set that was checked. Raises DataError where no task can be learned.
    """
    unsplit = next((finding.text for finding in checked.findings if finding.kind == "no_splits"), "")
    if unsplit:
        raise DataError(unsplit)
    trouble = _trouble(checked, data)
    held = {WHOLE: _joined(checked.splits.values())} if trouble else checked.splits
    labels = {WHOLE: _added(checked.labels.values())} if trouble and checked.labels else checked.labels
    able = {kind.task: labels_for(kind, data, held, labels) for kind in KINDS.values() if kind.task in data.serves}
    kinds = [kind for kind in KINDS.values() if able.get(kind.task)]
    quick = [kind for kind in kinds if kind.solved and not kind.drawn]
    if not kinds:
        raise DataError(_hopeless(checked))
    kind = (quick or kinds)[0]
    own: ImageLabels = able[kind.task] or "own"
    folds = f":{FOLDS}" if kind.solved else ""
    tested = f"in {FOLDS} folds, each group is tested once" if folds else "no group stands in two parts of this split"
    reasons = [
        f"{kind.name} is solved in one pass, so that its verdict needs no seeds"
        if quick
        else f"no head of {kind.task} is solved, so {kind.name} is trained, which takes longer",
        *([WHY_LABELS[own]] if own in WHY_LABELS else []),
        *([f"{trouble}; {tested}"] if trouble else []),
    ]
    return Aim(kind, own, f"{BY_GROUP}{folds}" if trouble else "own", tuple(reasons))


WHY_LABELS: Mapping[str, str] = {
    "defect": "the labels say whether an image shows a defect",
    "classes": "the labels say which classes an image shows",
}


def _trouble(checked: DataCheck, data: DataSet) -> str:
    """Why the set's own split is not taken; "" where it is, also where there are too few groups for another."""
    leak = next((finding for finding in checked.findings if finding.kind == LEAK), None)
    groups, tested = len({sample.group for sample in data.samples}), checked.splits["test"]["groups"]
    if groups < LEAST_GROUPS:
        return ""
    if leak:
        return f"{counted(len(leak.entries), 'group stands', 'groups stand')} in more than one part of its own split"
    if tested < FEW_GROUPS:
        return f"its own test part has {counted(tested, 'group')} of {groups}, and fewer than {FEW_GROUPS} show little"
    return ""


def labels_for(
    kind: HeadKind, data: DataSet, held: Mapping[str, Mapping[str, Any]], labels: Mapping[str, Mapping[str, int]] | None
) -> ImageLabels | None:
    """The labels of images that can teach and test a kind of head; `own` where it needs none; None where none can.

    held: of each part of the split, its counts as `DataCheck.splits` has them. labels: its images of each label.
    """
    on = SCORES[kind.task].on
    if on == "images":
        return next((own for own, can in _TEACHES.items() if can(data, held, labels)), None)
    if on == "anomalies":
        sides = _sides(data, held, labels)
        good = all(own[0] > 0 for own in sides.values())
        return "own" if sides and good and _of("test", sides)[1] > 0 else None
    shown = [_shown(_of(split, held)) for split in ("train", "test")]
    return "own" if shown[0] & shown[1] else None


def _of(split: str, parts: Mapping[str, Any]) -> Any:
    """What belongs to a part of the split, or to the whole set where that is not split yet."""
    return parts[split] if split in parts else parts[WHOLE]


def _shown(own: Mapping[str, Any]) -> set[str]:
    """Classes that some images of a part show."""
    return {name for name, counts in own["classes"].items() if counts["images"]}


def _sides(data: DataSet, held: Mapping[str, Any], labels: Mapping[str, Any] | None) -> dict[str, tuple[int, int]]:
    """Images without and with a defect, of each part; empty where the labels do not say."""
    names = data.label_names
    if labels and names and names.says_good:
        good = names.good or ""
        return {part: (own[good], sum(own.values()) - own[good]) for part, own in labels.items() if part in held}
    if not data.tasks:
        return {}
    return {part: (own["without_objects"], own["images"] - own["without_objects"]) for part, own in held.items()}


def _own_labels(data: DataSet, held: Mapping[str, Any], labels: Mapping[str, Any] | None) -> bool:
    if not labels:
        return False
    there = [{name for name, count in _of(part, labels).items() if count} for part in ("train", "test")]
    return len(there[0] & there[1]) > 1


def _defect_or_not(data: DataSet, held: Mapping[str, Any], labels: Mapping[str, Any] | None) -> bool:
    sides = _sides(data, held, labels)
    return bool(sides) and all(min(_of(part, sides)) > 0 for part in ("train", "test"))


def _classes_differ(data: DataSet, held: Mapping[str, Any], labels: Mapping[str, Any] | None) -> bool:
    def some(own: Mapping[str, Any]) -> set[str]:
        return {name for name, counts in own["classes"].items() if 0 < (counts["images"] or 0) < own["images"]}

    return bool(data.tasks) and bool(some(_of("train", held)) & some(_of("test", held)))


_TEACHES: Mapping[ImageLabels, Callable[..., bool]] = {
    "own": _own_labels,
    "defect": _defect_or_not,
    "classes": _classes_differ,
}
"""Whether labels of images of a kind differ between the images of a set, in the order in which they are preferred."""


def _joined(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The counts of all parts of a split together."""
    every = list(parts)
    names = every[0]["classes"]
    classes = {name: {"images": sum(own["classes"][name]["images"] or 0 for own in every)} for name in names}
    return {n: sum(own[n] for own in every) for n in ("images", "without_objects")} | {"classes": classes}


def _added(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for own in parts:
        found = {name: found.get(name, 0) + count for name, count in own.items()}
    return found


_WANTED: Mapping[On, str] = {
    "pixels": "masks with a class that both train and test show",
    "boxes": "boxes of a class that both train and test show",
    "images": "images with different labels in train and in test",
    "anomalies": "good images in every part, and images with a defect in test",
}


def _hopeless(checked: DataCheck) -> str:
    parts = "; ".join(f"{split or 'no split'} {own['images']}" for split, own in checked.splits.items())
    return (
        f"{checked.root} holds nothing that a head could learn and be tested on. Nothing was computed.\n"
        f"  wanted  {', or '.join(_WANTED.values())}\n"
        f"  found   {counted(checked.images, 'image')} ({parts}), labels for {', '.join(checked.serves) or 'no task'}\n"
        f"See what is there:  featprobe data check {checked.root}"
    )
