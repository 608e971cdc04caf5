"""A data set from datasets of torch that give an image and a target."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from os import PathLike
from pathlib import Path
from typing import Any

from featprobe.datasets.given.from_arrays import wanted_of
from featprobe.datasets.given.one_image import Bits, Given, Kind, is_tensor, plain
from featprobe.datasets.given.writing import write_given
from featprobe.datasets.samples import DataSet
from featprobe.datasets.values import shown
from featprobe.errors import DataError

KEYS = {"boxes": "boxes", "labels": "labels", "masks": "mask", "iscrowd": "crowd"}
"""Fields of torchvision's targets of detection, and what `Given` calls them."""


def from_torch(
    folder: str | PathLike[str],
    dataset: Any,
    *,
    groups: Iterable[Any] | None = None,
    names: Iterable[Any] | None = None,
    classes: Sequence[str] | None = None,
    bits: Bits | None = None,
) -> DataSet:
    """Write a dataset of torch into a folder as a set that every command reads, and return it.

    dataset: gives (image, target); a mapping of train, val and test to such datasets gives their splits, too. Images
    are tensors (channels, height, width), arrays (height, width[, 3]) or images of Pillow, and are read once, one at a
    time, without workers: leave random transforms out. Targets are all of one kind:

    - the class of each pixel: (height, width) or (1, height, width), whole numbers; 255 doesn't count;
    - torchvision's dict of `boxes` (x1 y1 x2 y2, pixels), `labels` (from 1 on), and where they are known `masks` and
      `iscrowd`;
    - a label of the whole image: a name, or a number.

    groups, names: one for each image, over all datasets in their order. classes: see `DataSet.from_arrays`; by default
    those of the dataset's attribute `classes`, for labels of images. bits: see `DataSet.from_arrays`: a transform such
    as ToTensor makes fractions of 8-bit levels, which bits=8 turns back.

    Writing and errors are those of `DataSet.from_arrays`.
    """
    parts = dataset if isinstance(dataset, Mapping) else {None: dataset}
    rows = _rows(parts, groups, names)
    first = next(rows, None)
    if first is None:
        raise DataError(f"No image was given for {folder}. Nothing was written.")
    of = _kind(first)
    if classes is None and of == "images":
        classes = getattr(next(iter(parts.values())), "classes", None)
    return write_given(Path(folder), _of_one_kind(of, first, rows), wanted_of(of, classes, bits))


def _rows(parts: Mapping[Any, Any], groups: Iterable[Any] | None, names: Iterable[Any] | None) -> Iterator[Given]:
    more = {"group": None if groups is None else iter(groups), "name": None if names is None else iter(names)}
    for split, dataset in parts.items():
        for number, sample in enumerate(_samples(dataset)):
            if not isinstance(sample, tuple | list) or len(sample) != 2:
                raise DataError(
                    f"The dataset's sample {number} is {type(sample).__name__} {shown(sample)[:80]}. "
                    "wanted: (image, target). Nothing was written."
                )
            own = {name: _next(name, column) for name, column in more.items() if column is not None}
            yield Given(sample[0], split=split, **_target(sample[1]), **own)
    if over := [name for name, column in more.items() if column is not None and next(column, more) is not more]:
        raise DataError(f"There are more {over[0]}s than images. Nothing was written.")


def _next(name: str, column: Iterator[Any]) -> Any:
    try:
        return next(column)
    except StopIteration:
        raise DataError(f"There are fewer {name}s than images. Nothing was written.") from None


def _samples(dataset: Any) -> Iterator[Any]:
    """All samples; a dataset with a length is indexed, as torch's loaders do."""
    if isinstance(dataset, Sized) and hasattr(dataset, "__getitem__"):
        return (dataset[i] for i in range(len(dataset)))
    return iter(dataset)


def _target(target: Any) -> dict[str, Any]:
    """The fields of `Given` that a target fills."""
    if isinstance(target, Mapping):
        return {own: target[key] for key, own in KEYS.items() if target.get(key) is not None}
    if isinstance(target, str | list | tuple | set | frozenset):
        return {"labels": target}
    values = plain(target)
    if values.ndim == 3 and values.shape[0] == 1 and is_tensor(target):
        return {"mask": values[0]}
    return {"mask": values} if values.ndim > 1 else {"labels": target}


def _kind(given: Given) -> Kind:
    if given.boxes is not None or (given.mask is not None and plain(given.mask).ndim == 3):
        return "objects"
    if given.mask is not None:
        return "pixels"
    if given.labels is not None and not isinstance(given.labels, Mapping):
        return "images"
    raise DataError(
        "The dataset's targets name neither a class, nor boxes, nor masks. Nothing was written.\n"
        "  wanted  a label, a mask (height, width), or a dict of boxes and labels"
    )


def _of_one_kind(of: Kind, first: Given, rows: Iterator[Given]) -> Iterator[Given]:
    yield first
    for number, given in enumerate(rows, start=1):
        if _kind(given) != of:
            raise DataError(f"The dataset's targets 0 and {number} are of different kinds. Nothing was written.")
        yield given
