"""A data set: samples with splits and groups, and a way to read their labels."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np

from featprobe.errors import DataError
from featprobe.geometry import Size
from featprobe.scores import SCORES, On
from featprobe.targets import Target

GENERATED = ("xray", "surface")  # sets that featprobe draws itself, see datasets.generated
SPLITS = ("train", "val", "test")
SPLIT_WORDS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """One image. `id` is unique in its data set; images of one `group` never belong in two splits.

    labels: whatever its reader needs to find its labels: a path, or the labels themselves.
    """

    id: str
    image: Path
    group: str
    split: str = ""
    labels: str = ""


class Samples(Sequence[Sample]):
    """Samples as one array of text a field, from which each is made when it is asked for.

    So the index of a large set takes its texts and 16 bytes for each, where objects would take ten times that.
    """

    def __init__(self, samples: Iterable[Sample]) -> None:
        """Raises DataError for a name that is no text."""
        rows = [(s.id, str(s.image), s.group, s.split, s.labels) for s in samples]
        self._columns = [_Column(texts) for texts in (zip(*rows, strict=True) if rows else [()] * 5)]

    def __len__(self) -> int:
        return len(self._columns[0].rest)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> "Samples": ...

    def __getitem__(self, index: int | slice) -> "Sample | Samples":
        if isinstance(index, slice):
            return Samples(self[i] for i in range(len(self))[index])
        own, image, group, split, labels = (column[index] for column in self._columns)
        return Sample(own, Path(image), group, split, labels)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Samples) and list(self) == list(other)


class _Column:
    """Texts without the beginning that all of them share, which most paths have."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.shared = os.path.commonprefix(texts)  # noqa: RUF071  # characters are meant, not folders
        try:
            self.rest = np.array([text[len(self.shared) :] for text in texts], dtype=np.dtypes.StringDType())
        except UnicodeEncodeError as error:
            raise _no_text(error.object) from error

    def __getitem__(self, index: int) -> str:
        return self.shared + self.rest[index]


def check_names(names: Iterable[str]) -> None:
    """Raise DataError for a name whose bytes are no UTF-8, which neither caches nor results could hold."""
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise _no_text(name) from error


def _no_text(name: str) -> DataError:
    return DataError(f"The name {name!a} is no UTF-8 text. Rename the file or the folder. Nothing was computed.")


@dataclass(frozen=True)
class DataSet:
    """What a reader found.

    classes: names by class index, the background first.
    samples: any sequence of them; kept as Samples.
    tasks: which tasks its labels can serve.
    read_target: labels of a sample whose image has this (height, width); raises DataError.
    notes: what a user should know of it: leaks, files left aside.
    category_ids: what its annotations call each class but the background; empty where they call it nothing.
    description: what featprobe.toml would say beside its path, so that it is read in this very way.
    """

    name: str
    root: Path
    classes: tuple[str, ...]
    samples: Sequence[Sample]
    tasks: tuple[str, ...]
    read_target: Callable[[Sample, Size], Target]
    notes: tuple[str, ...] = field(default=())
    category_ids: tuple[int, ...] = ()
    description: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_names([os.path.abspath(self.root)])
        if not isinstance(self.samples, Samples):
            object.__setattr__(self, "samples", Samples(self.samples))
        told = tuple(note.encode("utf-8", "backslashreplace").decode() for note in self.notes)
        object.__setattr__(self, "notes", told)  # a file that is passed over may have a name that no text can hold

    @property
    def has_masks(self) -> bool:
        """Whether its labels say the class of each pixel."""
        return any(SCORES[task].dense for task in self.tasks)

    @property
    def has_objects(self) -> bool:
        """Whether its labels list the objects of each image."""
        return any(not SCORES[task].dense for task in self.tasks)

    def in_split(self, split: str) -> list[Sample]:
        """The samples of a split, in order."""
        return [sample for sample in self.samples if sample.split == split]


def tasks_of(*, masks: bool, instances: bool) -> tuple[str, ...]:
    """Which tasks labels of these kinds can serve.

    >>> tasks_of(masks=True, instances=False)
    ('semseg',)
    """
    served: Mapping[On, bool] = {"pixels": masks, "boxes": instances, "masks": masks and instances}
    return tuple(task for task, scores in SCORES.items() if served[scores.on])


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first few of a list of names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def split_of(text: str) -> str:
    """The split that a word names, in any case; the text itself where it names none.

    >>> split_of("Train"), split_of("validation"), split_of("holdout")
    ('train', 'val', 'holdout')
    """
    return SPLIT_WORDS.get(text.strip().lower(), text)


def splits_below(images: Iterable[Path], folder: Path) -> dict[Path, str]:
    """The split of each image, where each lies in a folder of `folder` that names one, and they are several; else none.

    >>> splits_below([Path("images/Train/a.png"), Path("images/testing/a.png")], Path("images")).values()
    dict_values(['train', 'test'])
    >>> splits_below([Path("images/train/a.png"), Path("images/site1/a.png")], Path("images"))
    {}
    """
    found = {image: split_of(image.relative_to(folder).parts[0]) for image in images}
    named = {*found.values()}
    return found if len(named) > 1 and named <= {*SPLITS} else {}
