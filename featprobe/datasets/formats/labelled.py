"""Readers for images with labels of whole images: folders of classes, and tables of `image,label`.

Folders: CLASS/NAME.png, or {train,val,test}/CLASS/NAME.png, as torchvision's ImageFolder reads them. Tables: labels.csv
with the columns image and label, or metadata.csv with file_name and label, as in Hugging Face's imagefolder.
"""

import csv
import io
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from featprobe.datasets.files import (
    files_below,
    files_in,
    folders_in,
    kept_below,
    other_images,
    own_table,
    read_csv,
    start_of,
)
from featprobe.datasets.images.pages import group_of, page_of, pages_of
from featprobe.datasets.images.reading import SUFFIXES
from featprobe.datasets.label_sets import label_names, says_good
from featprobe.datasets.layouts import role_of
from featprobe.datasets.lookup import Lookup
from featprobe.datasets.names import is_hidden, visible
from featprobe.datasets.nearness import linked_folders
from featprobe.datasets.samples import SPLIT_WORDS, SPLITS, DataSet, Sample, listed, split_of, splits_below
from featprobe.datasets.values import Faults
from featprobe.errors import DataError, counted, nearest
from featprobe.geometry import Size
from featprobe.io.disk import write_whole
from featprobe.io.texts import cell, uncell
from featprobe.targets import Target

LABEL_FILES = (".json", ".xml", ".txt")  # beside an image of the same name they are labels of another format
TABLE, METADATA = "labels.csv", "metadata.csv"
OPTIONAL = ("split", "group")
HEAD = 4096  # bytes in which the header of a table is looked for
SEVERAL = "|"


# ---- folders of classes ----------------------------------------------------------------------------------------------


def find_classes(root: Path) -> dict[Path, tuple[str, str]]:
    """Folder of images -> (split or "", class); {} where no folders of classes are there.

    Class folders lie in the root, or in folders that all are called as splits are. There are two classes or more, or
    one that is called as good images are.
    """
    if not root.is_dir():
        return {}
    top = _holding_images(root)
    of_splits = bool(top) and all(folder.name.lower() in SPLIT_WORDS for folder in top)
    if of_splits:
        inner = {folder: (split_of(split.name), folder.name) for split in top for folder in _holding_images(split)}
        beside = any(path.suffix.lower() in SUFFIXES for split in top for path in visible(root, split.iterdir()))
        found = {} if beside else inner
    else:
        found = {folder: ("", folder.name) for folder in top}
    classes = {name for _, name in found.values()}
    enough = len(classes) > 1 or any(map(says_good, classes))
    return found if enough and not any(map(_says_else, classes)) and not _labelled_otherwise(found) else {}


def _says_else(folder: str) -> bool:
    """Whether the name of a folder says that it is no class: images, masks, or a split, as in train2017."""
    return bool(role_of(folder)) or folder.lower().rstrip("0123456789_-") in SPLIT_WORDS


def _holding_images(folder: Path) -> list[Path]:
    """The folders in a folder that hold images, in them or below; linked folders are not entered."""
    return [own for own in folders_in(folder) if not own.is_symlink() and _holds_images(own)]


def _holds_images(folder: Path) -> bool:
    for _, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not is_hidden(name)]
        if any(Path(name).suffix.lower() in SUFFIXES and not is_hidden(name) for name in names):
            return True
    return False


def _labelled_otherwise(folders: Iterable[Path]) -> bool:
    """Whether an image has a file of labels beside it, so that its folder says nothing."""
    for folder in folders:
        files = files_in(folder)
        images = {path.with_suffix("") for path in files if path.suffix.lower() in SUFFIXES}
        if any(path.suffix.lower() in LABEL_FILES and path.with_suffix("") in images for path in files):
            return True
    return False


def read_classes_of_folders(name: str, root: Path) -> DataSet:
    """The data set of folders of classes: an image's label is the name of its folder.

    samples.csv (image,split,group) is optional. Raises DataError where there is one class only.
    """
    folders = find_classes(root)
    table = own_table(root)
    found: list[Labelled] = []
    for folder, (split, label) in folders.items():
        for file in files_below(root, folder):
            for page in pages_of(file):
                identity = page.relative_to(root).as_posix()
                own = group_of(identity, page)
                row = table.row(identity, own)
                found.append(Labelled(page, (label,), row.get("group") or own, split or row.get("split") or ""))
    linked = linked_folders(root)
    notes = [f"linked folders are not entered: {listed(linked)}"] if linked else []
    notes += [*other_images(root, [*folders]), *table.notes()]
    return _labelled_set(name, root, found, notes, root, multi=False)


# ---- tables ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelTable:
    """A table of labels. column: the one that names an image, relative to the folder of the table; split: "" or that
    of the folder."""

    path: Path
    column: str
    split: str = ""


@dataclass(frozen=True)
class Labelled:
    """An image and its labels as names."""

    image: Path
    labels: tuple[str, ...]
    group: str
    split: str


def find_tables(root: Path) -> list[LabelTable]:
    """The tables of labels of a folder: labels.csv, else metadata.csv in it or in its folders of splits, else every
    other table there with the columns image and label."""
    if not root.is_dir():
        return []
    if (root / TABLE).is_file():
        return [LabelTable(root / TABLE, "image")]
    places = [(root, ""), *((f, split_of(f.name)) for f in folders_in(root) if f.name.lower() in SPLIT_WORDS)]
    found = [
        LabelTable(f / METADATA, "file_name", s) for f, s in places if {"file_name"} <= _columns(f / METADATA, root)
    ]
    if found:
        return found
    tables = [path for path in visible(root, root.glob("*.csv")) if {"image", "label"} <= _columns(path, root)]
    return [LabelTable(path, "image") for path in tables]


def _columns(path: Path, root: Path) -> set[str]:
    """The names of a table's columns in lower case, as far as its first bytes show them."""
    lines = start_of(path, HEAD, root).decode("utf-8-sig", "replace").splitlines()
    lines = lines[1:] if lines and lines[0].startswith("sep=") else lines
    cells = lines[0].replace(";", ",").replace("\t", ",").split(",") if lines else []
    return {cell.strip().strip('"').casefold() for cell in cells}


def read_labels(name: str, root: Path) -> DataSet:
    """The data set of a table of labels, with the optional columns split and group.

    Several labels of an image are separated by |. An image of such a set may have no label: it is good. An image
    that the table does not name is omitted, with a note. Raises DataError where several tables would serve, and for
    all faults of a table.
    """
    tables = find_tables(root)
    if len(tables) > 1 and tables[0].column == "image":
        raise DataError(
            f"{root} holds several tables of labels.\n  wanted  one, or one that is called {TABLE}\n"
            f"  found   {listed([table.path.name for table in tables])}\nNothing was read. Remove or rename the others."
        )
    rows = [(table, row) for table in tables for row in _rows(root, table)]
    multi = any(SEVERAL in row["label"] for _, row in rows)
    _check_rows(rows, multi)
    found, gone = [], []
    look = Lookup(root)
    places = {table: (table.path.parent, table.path.parent / "images") for table in tables}
    for table, row in rows:
        image = look.file(row[table.column], f"{table.path}, row {row['row']}", places[table])
        if image is None:
            gone.append(row[table.column])
            continue
        labels = tuple(dict.fromkeys(label.strip() for label in row["label"].split(SEVERAL) if label.strip()))
        for page in pages_of(image) if page_of(image)[1] is None else [image]:
            own = group_of(page.relative_to(root).as_posix(), page)
            split = table.split or split_of(row.get("split", ""))
            found.append(Labelled(page, labels, row.get("group") or own, split))
    where = " and ".join(str(table.path) for table in tables)
    held = {label for own in found for label in own.labels}
    if gone and len(held) < 2 - multi:
        missing = f"{counted(len(gone), 'image')} that can't be found"
        rest = f"names {missing}, and the others have {counted(len(held), 'label')}"
        raise DataError(
            f"{where} {rest if found else 'names no image that is there'}.\n"
            f"  wanted  paths of images below {tables[0].path.parent}\n"
            f"  found   {listed(gone)}\nNothing was read. Correct the names, or put the images there."
        )
    if found and not any(own.split for own in found):
        inner = splits_below([own.image for own in found], root)
        found = [Labelled(own.image, own.labels, own.group, inner.get(own.image, "")) for own in found]
    notes = (
        [f"{tables[0].path.name} names {counted(len(gone), 'image')} that can't be found: {listed(gone)}"]
        if gone
        else []
    )
    return _labelled_set(name, root, found, [*notes, *_bare(root, tables, found)], where, multi=multi)


def _rows(root: Path, table: LabelTable) -> list[dict[str, str]]:
    path = kept_below(root, table.path)
    rows = read_csv(path, (table.column, "label"), OPTIONAL)
    return [{name: uncell(text) for name, text in row.items()} | {"row": str(i)} for i, row in enumerate(rows, start=2)]


def _check_rows(rows: Sequence[tuple[LabelTable, Mapping[str, str]]], multi: bool) -> None:
    """Raise DataError for all rows that name no image, no label or an unknown split, or an image of another row."""
    faults = Faults()
    first: dict[tuple[Path, str], Mapping[str, str]] = {}
    for table, row in rows:
        where, named = f"{table.path}, row {row['row']}", row[table.column].replace("\\", "/").removeprefix("./")
        split = row.get("split", "")
        if not named:
            faults.say(partial("{}: it names no image.".format, where))
        if not row["label"].strip(f"{SEVERAL} ") and not multi:
            faults.say(partial(_bare_row, where, named))
        if split and split_of(split) not in SPLITS:
            faults.say(partial(_unknown_split, where, split))
        before = first.setdefault((table.path, named), row)
        if before is not row and named:
            faults.say(partial(_again, where, named, before, row))
    faults.raise_all()


def _bare_row(where: str, named: str) -> str:
    return (
        f"{where}: {named} has no label. wanted: one, such as good for an image without a defect. Only in a table "
        f"with several labels for an image (a{SEVERAL}b) an empty one means good."
    )


def _unknown_split(where: str, split: str) -> str:
    return f"{where}: the split {split!r} is unknown. {nearest(split, SPLITS)}"


def _again(where: str, named: str, before: Mapping[str, str], row: Mapping[str, str]) -> str:
    """The fault of a second row of an image."""
    both = {before["label"], row["label"]}
    said = f"as {' and as '.join(sorted(both))}: an image in two classes" if len(both) > 1 else "with one label"
    more = f" If both hold, write one row with {SEVERAL.join(sorted(both))}." if len(both) > 1 else ""
    return f"{where}: {named} is there twice, first in row {before['row']}, {said}. Keep one row.{more}"


def _bare(root: Path, tables: Sequence[LabelTable], found: Sequence[Labelled]) -> list[str]:
    """A note on images that are in no table."""
    named = {page_of(own.image)[0] for own in found}
    bare = [path for path in files_below(root, root) if path not in named]
    if not bare:
        return []
    shown = listed([path.relative_to(root).as_posix() for path in bare])
    count = counted(len(bare), "image, which was not read", "images, which were not read")
    return [f"{tables[0].path.name} has no row for {count}: {shown}"]


def write_labels(path: Path, rows: Sequence[tuple[str, Sequence[str], str, str]], *, multi: bool) -> None:
    """Write the table of `label_table`."""
    write_whole(path, label_table(rows, multi=multi))


def label_table(rows: Sequence[tuple[str, Sequence[str], str, str]], *, multi: bool) -> bytes:
    """The bytes of a table that `read_labels` reads. rows: the image's path below the table's folder, its labels, its
    split and its group. Texts that a spreadsheet would compute get a mark before them, as in a split file."""
    texts = [SEVERAL.join(labels) for _, labels, _, _ in rows]
    if multi and not any(SEVERAL in text for text in texts):  # so that it is read as one of several labels
        first = next((i for i, text in enumerate(texts) if text), 0)
        texts[first] += SEVERAL
    stream = io.StringIO(newline="")
    lines = [[own, text, split, group] for (own, _, split, group), text in zip(rows, texts, strict=True)]
    csv.writer(stream, lineterminator="\n").writerows(
        [("image", "label", *OPTIONAL), *([cell(text) for text in line] for line in lines)]
    )
    text = stream.getvalue()
    return text.encode("utf-8" if text.isascii() else "utf-8-sig")


# ---- both ------------------------------------------------------------------------------------------------------------


def _labelled_set(
    name: str, root: Path, found: Sequence[Labelled], notes: Sequence[str], where: object, *, multi: bool
) -> DataSet:
    """The data set of images with labels. An id is the path of an image. Raises DataError for labels that can't be."""
    held = Counter(label for own in found for label in own.labels)
    names = label_names(held, multi=multi, where=where)
    number = {label: i for i, label in enumerate(names.names)}
    twice: dict[Path, list[Labelled]] = defaultdict(list)
    for own in found:
        twice[own.image].append(own)
    several = [own for own in twice.values() if len(own) > 1]
    if several:
        shown = [
            f"{own[0].image.relative_to(root)} ({', '.join(SEVERAL.join(each.labels) for each in own)})"
            for own in several
        ]
        raise DataError(
            f"{where} gives {counted(len(several), 'image')} labels in several rows.\n  wanted  one row for an image\n"
            f"  found   {listed(shown)}\nNothing was read. Keep one row for each, with all its labels: a{SEVERAL}b."
        )
    samples = [
        Sample(own.image.relative_to(root).as_posix(), own.image, own.group, own.split,
               SEVERAL.join(str(number[label]) for label in own.labels))
        for own in found
    ]  # fmt: skip

    def read_target(sample: Sample, size: Size) -> Target:
        return Target(None, None, labels=tuple(int(text) for text in sample.labels.split(SEVERAL) if text))

    return DataSet(name, root, ("background",), samples, (), read_target, tuple(notes), label_names=names)
