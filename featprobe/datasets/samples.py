"""A data set: samples with splits and groups, and a way to read their labels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from featprobe.geometry import Size
from featprobe.targets import Target

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Sample:
    """One image. `id` is unique in its data set; images of one `group` never belong in two splits."""

    id: str
    image: Path
    group: str
    split: str = ""


@dataclass(frozen=True)
class DataSet:
    """What a reader found.

    classes: names by class index, the background first.
    tasks: which of semseg, detect, instseg its labels can serve.
    read_target: labels of a sample whose image has this (height, width); raises DataError.
    notes: what a user should know of it: leaks, files left aside.
    category_ids: what its annotations call each class but the background; empty where they call it nothing.
    """

    name: str
    root: Path
    classes: tuple[str, ...]
    samples: tuple[Sample, ...]
    tasks: tuple[str, ...]
    read_target: Callable[[Sample, Size], Target]
    notes: tuple[str, ...] = field(default=())
    category_ids: tuple[int, ...] = ()

    def in_split(self, split: str) -> list[Sample]:
        """The samples of a split, in order."""
        return [sample for sample in self.samples if sample.split == split]


def tasks_of(*, masks: bool, instances: bool) -> tuple[str, ...]:
    """Which tasks labels of these kinds can serve.

    >>> tasks_of(masks=True, instances=False)
    ('semseg',)
    """
    served = [("semseg", masks), ("detect", instances), ("instseg", masks and instances)]
    return tuple(task for task, possible in served if possible)


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first few of a list of names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
