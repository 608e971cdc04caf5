"""A data set: samples with splits and groups, and a function that reads their labels."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from featprobe.errors import DataError, counted
from featprobe.geometry import Size
from featprobe.image_labels import LabelNames, tasks_served
from featprobe.io.texts import beyond_locale
from featprobe.scores import SCORES, On
from featprobe.targets import Target

GENERATED = ("xray", "surface")  # sets that featprobe generates, see datasets.generated
SPLITS = ("train", "val", "test")
SPLIT_WORDS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """One image. `id` is unique in its data set; images of one `group` should never be in two splits.

    labels: what its reader needs to find the labels: a path, or the labels themselves.
    """

    id: str
    image: Path
    group: str
    split: str = ""
    labels: str = ""


FIELDS = ("id", "image", "group", "split", "labels")
"""The fields of a Sample, in their order."""


class Samples(Sequence[Sample]):
    """Samples stored as one array of text per field. A Sample is made only when it is asked for.

    So the index of a large set takes its texts and 16 bytes per text; objects would take ten times as much.
    """

    def __init__(self, samples: Iterable[Sample]) -> None:
        """Raises DataError for a name that is no UTF-8 text."""
        rows = [(s.id, str(s.image), s.group, s.split, s.labels) for s in samples]
        self._columns = [_Column(texts) for texts in (zip(*rows, strict=True) if rows else [()] * 5)]

    def __len__(self) -> int:
        return len(self._columns[0].rest)

    def __repr__(self) -> str:
        return f"Samples({len(self)})"

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> "Samples":
        """These samples; themselves where they are stored so already."""
        return samples if isinstance(samples, cls) else cls(samples)

    def texts(self, name: Literal["id", "group", "split"]) -> list[str]:
        """A field of all samples, without making them."""
        column = self._columns[FIELDS.index(name)]
        return [column.shared + rest for rest in column.rest.tolist()]

    def with_splits(self, splits: Sequence[str]) -> "Samples":
        """The same samples in these splits."""
        found = copy(self)
        found._columns = [*self._columns]
        found._columns[FIELDS.index("split")] = _Column(splits)
        return found

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> "Samples": ...

    def __getitem__(self, index: int | slice) -> "Sample | Samples":
        if isinstance(index, slice):
            return Samples(self[i] for i in range(len(self))[index])
        identity, image, group, split, labels = (column[index] for column in self._columns)
        return Sample(identity, Path(image), group, split, labels)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Samples) and list(self) == list(other)


class _Column:
    """Texts, stored without the beginning that all of them share, as paths do."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.shared = os.path.commonprefix(texts)  # noqa: RUF071  # characters are meant, not folders
        try:
            self.rest = np.array([text[len(self.shared) :] for text in texts], dtype=np.dtypes.StringDType())
        except UnicodeEncodeError as error:
            raise _no_text(error.object) from error

    def __getitem__(self, index: int) -> str:
        return self.shared + self.rest[index]


def check_names(names: Iterable[str]) -> None:
    """Raise DataError for a name whose bytes are no UTF-8: caches and results can't hold it."""
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise _no_text(name) from error


def _no_text(name: str) -> DataError:
    to_do = beyond_locale() or " Rename the file or the folder."
    return DataError(f"The name {name!a} is no UTF-8 text. Nothing was computed.{to_do}")


class _Maker:
    """A function of `datasets.given` that makes data sets, imported when it is asked for: it needs all formats."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, instance: object, owner: type) -> Callable[..., "DataSet"]:
        make: Callable[..., DataSet] = getattr(import_module(f"featprobe.datasets.given.{self.name}"), self.name)
        return make


@dataclass(frozen=True)
class DataSet:
    """A data set, as a reader found it.

    classes: names by class index, the background first.
    samples: any sequence of Sample; kept as Samples.
    tasks: those that its masks and objects can serve.
    read_target: gives the labels of a sample whose image has this (height, width); raises DataError.
    notes: sentences for the user: leaks between splits, files that are not read.
    category_ids: the annotations' ids of all classes but the background; empty where they have none.
    description: the entries of featprobe.toml, beside the path, that read the set in the same way again.
    label_names: the labels of its images as a whole; None where they have none.
    from_arrays, from_torch: make a set of arrays, and of datasets of torch; see `datasets.given`.
    """

    from_arrays, from_torch = _Maker("from_arrays"), _Maker("from_torch")
    name: str
    root: Path
    classes: tuple[str, ...]
    samples: Sequence[Sample]
    tasks: tuple[str, ...]
    read_target: Callable[[Sample, Size], Target]
    notes: tuple[str, ...] = field(default=())
    category_ids: tuple[int, ...] = ()
    description: Mapping[str, Any] = field(default_factory=dict)
    label_names: LabelNames | None = None

    def __post_init__(self) -> None:
        check_names([os.path.abspath(self.root)])
        if not isinstance(self.samples, Samples):
            object.__setattr__(self, "samples", Samples(self.samples))
        notes = tuple(note.encode("utf-8", "backslashreplace").decode() for note in self.notes)
        object.__setattr__(self, "notes", notes)  # the name of a skipped file may be no UTF-8 text

    def __len__(self) -> int:
        return len(self.samples)

    def __repr__(self) -> str:
        splits = Counter(sample.split for sample in self.samples)
        each = ", ".join(f"{splits[split]} {split}" for split in SPLITS if splits[split])
        labels = self.label_names.names if self.label_names and not self.tasks else self.classes
        notes = f", {counted(len(self.notes), 'note')}" if self.notes else ""
        return f"DataSet({self.name!r}, {len(self)} images ({each}), {listed(labels)}{notes}; {str(self.root)!r})"

    @property
    def serves(self) -> tuple[str, ...]:
        """The tasks that all its labels can serve: `tasks`, and those of whole images."""
        return tasks_served(self.tasks, self.label_names)

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
    """The tasks that labels of these kinds can serve.

    >>> tasks_of(masks=True, instances=False)
    ('semseg',)
    """
    served: Mapping[On, bool] = {"pixels": masks, "boxes": instances, "masks": masks and instances}
    return tuple(task for task, scores in SCORES.items() if served.get(scores.on, False))


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first names of a list, and how many more there are, as one text."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def split_of(text: str) -> str:
    """The split that a word names, in any case; another text unchanged.

    >>> split_of("Train"), split_of("validation"), split_of("holdout")
    ('train', 'val', 'holdout')
    """
    return SPLIT_WORDS.get(text.strip().lower(), text)


def splits_below(images: Iterable[Path], folder: Path) -> dict[Path, str]:
    """The split of each image, where each lies in a folder below `folder` that names a split and there are two splits
    or more; else {}.

    >>> splits_below([Path("images/Train/a.png"), Path("images/testing/a.png")], Path("images")).values()
    dict_values(['train', 'test'])
    >>> splits_below([Path("images/train/a.png"), Path("images/site1/a.png")], Path("images"))
    {}
    """
    found = {image: split_of(image.relative_to(folder).parts[0]) for image in images}
    named = {*found.values()}
    return found if len(named) > 1 and named <= {*SPLITS} else {}
