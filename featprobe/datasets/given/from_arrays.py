"""A data set from arrays in memory, or from anything that gives images one after another."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import zip_longest
from os import PathLike
from pathlib import Path
from typing import Any

from featprobe.datasets.given.one_image import Bits, Given, Kind, Wanted, check_several, plain
from featprobe.datasets.given.writing import write_given
from featprobe.datasets.objects import check_classes
from featprobe.datasets.samples import DataSet
from featprobe.datasets.values import shown
from featprobe.errors import DataError

ONE_CLASS = ("background", "defect")
ABSENT = object()  # beyond the end of what is shorter
FIELDS = {"images": "image", "masks": "mask", "groups": "group", "splits": "split", "names": "name"}
"""The field of `Given` for each argument, where it is called otherwise."""


def from_arrays(
    folder: str | PathLike[str],
    images: Iterable[Any],
    *,
    masks: Iterable[Any] | None = None,
    boxes: Iterable[Any] | None = None,
    labels: Iterable[Any] | None = None,
    groups: Iterable[Any] | None = None,
    splits: Iterable[Any] | None = None,
    names: Iterable[Any] | None = None,
    classes: Sequence[str] | None = None,
    bits: Bits | None = None,
) -> DataSet:
    """Write images and labels into a folder as a set that every command reads, and return it.

    images: one after another, each (height, width) or (height, width, 3), uint8 or uint16, of any sizes: an array, a
    list, or a generator, of which one image is held at a time. Their levels are kept exactly, as TIFF. All else has an
    entry for each image:

    - masks: (height, width), whole numbers, the class of each pixel; 255 for pixels that don't count.
    - boxes: (objects, 4), x1 y1 x2 y2 in pixels; labels: (objects,), the class of each object, from 1 on, needed where
      there are several classes; masks: (objects, height, width), the pixels of each object, beside boxes or alone.
    - labels, without masks and boxes: of the whole image, a name or the number of a class; several in a list, and none
      in an empty one. An image called `good` has no defect.
    - groups: what must not stand on both sides of a split, as the name of a part; else each image is a group.
    - splits: train, val or test; else they are made by group, 60/20/20. names: of the files; else numbers.

    classes: names by number. Of pixels and objects the background comes first; one class, `defect`, is the default.
    bits: of images that are fractions: 8 or 16 where they are a level divided by 255 or 65535, which is turned back
    exactly or refused; 32 for values that never were levels, kept as float32.

    The folder is written whole or not at all. Where it is there with the same images and labels it is only read. Raises
    DataError with the faults of all images, and for a folder that holds something else; DiskError.
    """
    if images is None:
        raise DataError("images=None. wanted: one entry for each image. Nothing was written.")
    check_several(images)  # type: ignore[arg-type]
    given = {"images": images, "masks": masks, "boxes": boxes, "labels": labels} | {
        "groups": groups, "splits": splits, "names": names,
    }  # fmt: skip
    columns = {name: column for name, column in given.items() if column is not None}
    _check_lengths(columns)
    rows = _rows(columns)
    first = next(rows, None)
    of = _kind(columns, first)
    return write_given(Path(folder), _from(first, rows), wanted_of(of, classes, bits))


def wanted_of(of: Kind, classes: Sequence[str] | None, bits: Bits | None) -> Wanted:
    """What each image must be. Raises DataError for names of classes that can't be used."""
    if bits not in (None, 8, 16, 32):
        raise DataError(f"bits={bits}. wanted: 8, 16, or 32. Nothing was written.")
    if isinstance(classes, str):
        raise DataError(f"classes={classes!r} is one text. wanted: a list of names. Nothing was written.")
    names = tuple(map(str, classes)) if classes is not None else ()
    if of == "images":
        return Wanted(of, names, bits)
    try:
        return Wanted(of, check_classes(names or ONE_CLASS, "classes="), bits)
    except DataError as error:
        raise DataError(f"{error}\nNothing was written.") from error


def _check_lengths(columns: Mapping[str, Iterable[Any]]) -> None:
    """Raise DataError where what has a length has different ones, before anything is read."""
    for name, column in columns.items():
        if isinstance(column, str | bytes | Mapping) or not isinstance(column, Iterable):
            raise DataError(f"{name}={shown(column)}. wanted: one entry for each image. Nothing was written.")
    known = {name: len(column) for name, column in columns.items() if isinstance(column, Sized)}
    if len(set(known.values())) > 1:
        raise _uneven(known)


def _uneven(known: Mapping[str, int]) -> DataError:
    found = ", ".join(f"{name} {count}" for name, count in known.items())
    return DataError(f"There is not one entry for each image. Nothing was written.\n  found   {found}")


def _rows(columns: Mapping[str, Iterable[Any]]) -> Iterator[Given]:
    """What is given of each image. Raises DataError where one of the columns ends before another."""
    fields = [FIELDS.get(name, name) for name in columns]
    for number, values in enumerate(zip_longest(*columns.values(), fillvalue=ABSENT)):
        ended = [name for name, value in zip(columns, values, strict=True) if value is ABSENT]
        if ended:
            others = [name for name in columns if name not in ended]
            raise DataError(
                f"There is not one entry for each image. Nothing was written.\n"
                f"  found   {number} of {', '.join(ended)}, and more of {', '.join(others)}"
            )
        yield Given(**dict(zip(fields, values, strict=True)))


def _kind(columns: Mapping[str, Any], first: Given | None) -> Kind:
    """What the labels are of, as the first image shows it. Raises DataError."""
    drawn = "masks" in columns and first is not None and _depth(first.mask) == 3
    if "boxes" in columns or drawn:
        if "masks" in columns and not drawn and first is not None:
            raise DataError(
                "masks beside boxes are those of objects. Nothing was written.\n"
                f"  wanted  (objects, height, width) for each image\n  found   {_depth(first.mask)} axes\n"
                "Where a mask says the class of each pixel, omit the boxes."
            )
        return "objects"
    if "masks" in columns:
        if "labels" in columns:
            raise DataError(
                "labels beside masks of pixels say nothing more. Nothing was written. Omit labels: whether an image is "
                "good follows from its mask (--labels defect)."
            )
        return "pixels"
    if "labels" in columns:
        return "images"
    raise DataError(
        "There are images and no labels. Nothing was written.\n  wanted  masks, boxes, or labels\n"
        "Where all images are good: labels=['good'] * len(images), which serves the task anomaly."
    )


def _depth(mask: Any) -> int:
    """The number of axes of a mask; 0 for what is none, which is refused with its image."""
    try:
        return plain(mask).ndim
    except ValueError:
        return 0


def _from(first: Given | None, rows: Iterator[Given]) -> Iterator[Given]:
    if first is not None:
        yield first
        yield from rows
