"""Writing a set that is given as arrays: images as TIFF, labels as COCO JSON or as a table, whole or not at all."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from featprobe.datasets.files import named_below
from featprobe.datasets.formats import read_data
from featprobe.datasets.formats.coco_files import CocoFiles, annotations_of
from featprobe.datasets.formats.labelled import TABLE, label_table
from featprobe.datasets.given.one_image import Given, Wanted
from featprobe.datasets.images.pixels import Levels
from featprobe.datasets.images.reading import SUFFIXES, read_levels, write_levels
from featprobe.datasets.names import is_hidden, name_of
from featprobe.datasets.samples import SPLITS, DataSet, listed, split_of
from featprobe.datasets.splits import complete_splits
from featprobe.datasets.values import shown
from featprobe.errors import DataError, FileKindError, counted, nearest
from featprobe.io.disk import new_folder, read_regular, write_whole
from featprobe.targets import IGNORE

SUFFIX = ".tif"
MOST_FAULTS = 10  # that a message shows
FORMATS = {"pixels": "coco", "objects": "coco", "images": "class-csv"}


class _Place(Protocol):
    """Where a set is put."""

    def image(self, path: str, levels: Levels) -> None: ...
    def file(self, path: str, data: bytes) -> None: ...


@dataclass(frozen=True)
class _New:
    """A folder that is being made."""

    folder: Path

    def image(self, path: str, levels: Levels) -> None:
        place = self.folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        write_levels(place, levels)

    def file(self, path: str, data: bytes) -> None:
        write_whole(self.folder / path, data)


@dataclass(frozen=True)
class _There:
    """A folder that is there, compared with what would be written. other: what differs."""

    folder: Path
    other: list[str] = field(default_factory=list)
    met: set[Path] = field(default_factory=set)

    def image(self, path: str, levels: Levels) -> None:
        place = self.folder / path
        self.met.add(place)
        same = False
        with suppress(DataError):
            found = read_levels(place)
            same = found.dtype == levels.dtype and np.array_equal(found, levels)
        if not same:
            self.other.append(path if place.exists() else f"{path} (not there)")

    def file(self, path: str, data: bytes) -> None:
        place = self.folder / path
        self.met.add(place)
        same = False
        with suppress(OSError, FileKindError):
            same = read_regular(place, len(data)) == data
        if not same:
            self.other.append(path if place.exists() else f"{path} (not there)")

    def check(self) -> None:
        """Raise DataError where the folder holds anything else."""
        more = (path for path in self.folder.rglob("*") if not path.is_dir() and path not in self.met)
        also = [f"{path.relative_to(self.folder)} (not given)" for path in more if not is_hidden(path.name)]
        if found := [*self.other, *also]:
            raise DataError(
                f"{self.folder} is there and holds another set. Nothing was changed.\n"
                f"  wanted  no such folder, or the same images and labels\n"
                f"  found   {counted(len(found), 'file differs', 'files differ')}: {listed(found, 8)}\n"
                "Name another folder, or remove this one."
            )


@dataclass
class _Filled:
    """The images that were checked so far, and their labels. faults: what is wrong, and with which images."""

    wanted: Wanted
    place: _Place
    files: CocoFiles = field(default_factory=lambda: CocoFiles(("",)))
    rows: list[tuple[str, tuple[str, ...], str, str]] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    faults: dict[str, list[int]] = field(default_factory=dict)
    several: bool = False
    drawn: bool = False  # whether a mask holds a class beside the background
    ignored: bool = False  # whether one holds 255

    def add(self, given: Given, number: int) -> None:
        """Check an image and put it where it belongs; once there is a fault, nothing more is put there."""
        where = f"images[{number}]"
        try:
            name = self._name(given.name, number, where)
            group, split = _text(given.group, f"{where}, group"), _split(given.split, f"{where}, split")
            levels = self.wanted.levels(given.image, where)
            labels: tuple[str, ...] = ()
            if self.wanted.of == "images":
                labels, several = self.wanted.names(given.labels, where)
                self.several |= several
                path = name
            else:
                path, size = f"images/{name}", (levels.shape[0], levels.shape[1])
                target = self.wanted.target(given, size, where)
                if target.semantic is not None:
                    self.ignored |= bool((target.semantic == IGNORE).any())
                    self.drawn |= bool(((target.semantic > 0) & (target.semantic < IGNORE)).any())
                self.files.add(name, size, annotations_of(target, size, where), split, group)
            self.rows.append((name, labels, split, group))
        except DataError as error:
            said = " ".join(str(error).removeprefix(where).split()).rstrip(".")
            self.faults.setdefault(said, []).append(number)
            return
        if not self.faults:
            self.place.image(path, levels)

    def finish(self) -> None:
        """Put the labels there."""
        if self.wanted.of == "images":
            self.place.file(TABLE, label_table(self.rows, multi=self.several))
            return
        if self.ignored and not self.drawn:
            raise DataError(
                f"The masks hold 0 and {IGNORE} alone, and {IGNORE} marks pixels that don't count: nothing could be "
                f"learnt.\n  wanted  the number of a class where it is drawn, 1 to {len(self.wanted.classes) - 1}\n"
                f"Nothing was written. Where {IGNORE} is the one class: masks == {IGNORE}"
            )
        for path, text in self.files.texts(self.wanted.classes, things=self.wanted.of == "objects").items():
            self.place.file(path, text.encode())

    def _name(self, name: Any, number: int, where: str) -> str:
        """The image's path; a known suffix gives way to that of the file which is written."""
        text = f"{number:06d}" if name is None else _text(name, f"{where}, name").replace("\\", "/")
        stem = Path(text)
        text = (str(stem.with_suffix("")) if stem.suffix.lower() in SUFFIXES else text) + SUFFIX
        named_below(Path("set"), text, where)
        if any(is_hidden(part) for part in Path(text).parts) or text != Path(text).as_posix():
            raise DataError(f"{where}: the name {shown(name)}. wanted: a name or path of a visible file")
        if text in self.names:
            raise DataError(f"{where}: the name {shown(name)}, which an image before it has")
        self.names.add(text)
        return text


def write_given(folder: Path, given: Iterable[Given], wanted: Wanted) -> DataSet:
    """Write a set into a folder, whole or not at all, and read it back; where the same set is there, only read it.

    Raises DataError for all faults of what is given, and for a folder that holds something else; DiskError.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise DataError(f"{folder} is there and no folder. Nothing was changed. Name another one.")
    if not folder.exists() or not any(folder.iterdir()):
        with new_folder(folder) as temporary:
            _fill(temporary, given, wanted, _New(temporary), folder)
    else:
        there = _There(folder)
        labels = folder / (TABLE if wanted.of == "images" else "annotations")
        if not labels.exists():
            raise DataError(f"{folder} is there and holds something else. Nothing was changed. Name another folder.")
        _fill(folder, given, wanted, there, folder)
        there.check()
    return read_data(name_of(folder), folder, FORMATS[wanted.of])


def _fill(made: Path, given: Iterable[Given], wanted: Wanted, place: _Place, folder: Path) -> None:
    """Put all that is given at a place, once each fault is known. made: the folder as it is called while it is made."""
    filled = _Filled(wanted, place)
    count = 0
    for count, own in enumerate(given, start=1):
        filled.add(own, count - 1)
    if not count:
        raise DataError(f"No image was given for {folder}. Nothing was written.")
    if filled.faults:
        raise _unusable(folder, filled.faults, count)
    filled.finish()
    if made != folder:
        _check_reads(made, folder, filled)


def _unusable(folder: Path, faults: Mapping[str, Sequence[int]], count: int) -> DataError:
    """The error for all faults, each with the first image that has it. count: of all images."""
    lines = []
    for said, images in [*faults.items()][:MOST_FAULTS]:
        more = f" and {len(images) - 1} more" if len(images) > 1 else ""
        lines.append(f"  images[{images[0]}]{more}{'' if said[:1] in ':,' else ': '}{said}")
    lines += [f"  and {len(faults) - MOST_FAULTS} other faults"] if len(faults) > MOST_FAULTS else []
    bad = sum(map(len, faults.values()))
    return DataError(
        f"{folder} was not written: {bad} of {counted(count, 'image')} can't be used as given.\n"
        + "\n".join(lines) + "\nCorrect them, then run the same call again."
    )  # fmt: skip


def _check_reads(made: Path, folder: Path, filled: _Filled) -> None:
    """Raise DataError where the set that was made does not read as what was given, before it gets its name."""
    try:
        data = read_data(name_of(folder), made, FORMATS[filled.wanted.of], complete=False)
        complete_splits(data)
    except DataError as error:
        said = str(error).replace(str(made), str(folder)).replace("Nothing was read.", "Nothing was written.")
        raise DataError(f"The set for {folder} could not be read back, and was not kept.\n{said}") from error
    names = data.label_names.names if data.label_names else ()
    held = [data.read_target(s, (1, 1)).labels or () if names else () for s in data.samples]
    found = [
        (sample.id, tuple(names[i] for i in own), sample.split, sample.group)
        for sample, own in zip(data.samples, held, strict=True)
    ]
    wanted = [(*row[:3], row[3] or group) for row, (*_, group) in zip(filled.rows, found, strict=False)]
    if other := [pair for pair in zip_longest(wanted, found) if pair[0] != pair[1]]:
        raise DataError(
            f"The set for {folder} would not read as it was given, and was not kept.\n"
            f"  wanted  name, labels, split, group: {other[0][0]}\n  found   {other[0][1]}\nChoose plainer names."
        )


def _text(value: Any, where: str) -> str:
    """A group or a name as text; "" for None."""
    if value is None:
        return ""
    text = str(value)
    if not _equals_itself(value) or not text.strip() or not text.isprintable():
        raise DataError(f"{where}: {shown(value)}. wanted: a text that can be printed, or a number")
    return text


def _equals_itself(value: Any) -> bool:
    """Whether a value is one, and none that stands for none, as nan does."""
    try:
        return bool(value == value)
    except (TypeError, ValueError, RuntimeError):  # pandas' NA, arrays and tensors of several values
        return False


def _split(value: Any, where: str) -> str:
    if value is None:
        return ""
    found = split_of(_text(value, where))
    if found not in SPLITS:
        raise DataError(f"{where}: {shown(value)}. {nearest(str(value), SPLITS)}")
    return found
