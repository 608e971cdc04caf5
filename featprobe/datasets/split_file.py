"""A split in a file that people can edit: one row per image, with its group and its split or fold."""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from featprobe.datasets.files import by_name, read_csv
from featprobe.datasets.names import renamed
from featprobe.datasets.samples import SPLITS, DataSet, listed, split_of
from featprobe.errors import DataError, counted, nearest
from featprobe.io.disk import write_together
from featprobe.io.texts import cell, uncell
from featprobe.specs import digest

COLUMNS = ("id", "group", "split")
DIGITS = 8  # of the digest, in the name of a pinned split


@dataclass(frozen=True)
class SplitFile:
    """The content of a split file.

    places: id -> (group, split). A group is "" where the file names none. The split is train, val or test, or in every
    row the number of a fold, from 1 on. folds: the number of folds; 0 where splits are named.
    """

    path: Path
    places: Mapping[str, tuple[str, str]]
    folds: int

    @property
    def digest(self) -> str:
        """A digest that is equal for files with the same rows in any order."""
        return digest(sorted([name, *place] for name, place in self.places.items()))[:DIGITS]

    def placed(self, ids: Sequence[str], groups: Sequence[str]) -> tuple[list[str], list[str]]:
        """The group and the split of each image. `groups` are used where the file names no group.

        Raises DataError where the file's images are not those of `ids`.
        """
        names = [name.strip() for name in ids]
        places = renamed(self.places, names)
        unlisted = [name for name in names if name not in places]
        gone = sorted(places.keys() - set(names))
        if unlisted or gone:
            found = (
                [f"{counted(len(unlisted), 'image')} that the file does not list: {listed(unlisted)}"]
                if unlisted
                else []
            )
            found += [f"{counted(len(gone), 'image')} that it lists and the set lacks: {listed(gone)}"] if gone else []
            both = ";\n          ".join(found)
            raise DataError(
                f"{self.path} is not the split of these {len(ids)} images.\n"
                f"  wanted  a row for each image, and no other rows\n  found   {both}\n"
                "Nothing was done. Correct the file, or name its data set with --data NAME."
            )
        chosen = [places[name] for name in names]
        found = [named or group for (named, _), group in zip(chosen, groups, strict=True)]
        return found, [split for _, split in chosen]


def read_split_file(path: Path) -> SplitFile:
    """Read a CSV file with the columns id, split and optionally group, separated by comma, semicolon or tab.

    Raises DataError for a missing column, an id that is there twice, an unknown or empty split, and a mixture of splits
    and folds.
    """
    try:
        rows = read_csv(path, ("id", "split"), ("group",))
        if not rows:
            raise DataError(f"{path} has no rows. wanted: a row for each image.")
    except DataError as error:
        to_do = f"Write one:  featprobe data split NAME --out {path.name}"
        raise DataError(f"{path} is no split file. {error}\n{to_do}") from error
    rows = [{**row, "id": uncell(row["id"]).strip(), "group": uncell(row.get("group", ""))} for row in rows]
    named = by_name(rows, "id", path)
    places = {name: (row["group"], split_of(row["split"])) for name, row in named.items()}
    return SplitFile(path, places, _folds_of(path, [split for _, split in places.values()]))


def _folds_of(path: Path, splits: Sequence[str]) -> int:
    """The number of folds, 0 for named splits. Raises DataError for other words, and for a split without images."""
    known = set(splits)
    folds = {split for split in known if split.isascii() and split.isdigit()}
    unknown = sorted(known - set(SPLITS) - folds)
    if unknown or (folds and folds != known):
        wrong = unknown or sorted(folds)
        raise DataError(
            f"{path} names the splits {listed([split or '(empty)' for split in wrong])}. {nearest(wrong[0], SPLITS)}\n"
            f"  wanted  {', '.join(SPLITS)}; or in every row the number of a fold of a cross-validation: 1, 2, 3, …"
        )
    wanted = [str(fold) for fold in range(1, max(2, len(folds)) + 1)] if folds else ["train", "test"]
    empty = [split for split in wanted if split not in known]
    if empty:
        what = "fold" if folds else "split"
        raise DataError(f"{path} puts no image into the {what} {empty[0]}. Nothing could be trained and scored.")
    return len(folds)


def write_split_file(path: Path, ids: Sequence[str], groups: Sequence[str], splits: Sequence[str]) -> None:
    """Write a split file, with a byte order mark (for spreadsheets) where its text is not ASCII.

    Raises DataError where the path exists already, DiskError where nothing can be written.
    """
    stream = io.StringIO(newline="")
    csv.writer(stream, lineterminator="\n").writerows(
        [COLUMNS, *([cell(text) for text in row] for row in zip(ids, groups, splits, strict=True))]
    )
    text = stream.getvalue()
    if os.path.lexists(path):
        raise DataError(f"{path} is there already. Nothing was changed. Remove it, or name another file.")
    write_together({path: text.encode("utf-8" if text.isascii() else "utf-8-sig")}, fresh=True)


def pin(data: DataSet, file: SplitFile) -> DataSet:
    """A data set with the splits of a file, and with its groups where the file names them.

    Raises DataError where the file's images are not the set's, or the file holds folds.
    """
    if file.folds:
        raise DataError(
            f"{file.path} holds {file.folds} folds of a cross-validation. But features are extracted only once, for "
            "all folds.\n"
            f"  wanted  {', '.join(SPLITS)}\nGive it to the command that trains:  featprobe probe --split {file.path}"
        )
    groups, splits = file.placed([s.id for s in data.samples], [s.group for s in data.samples])
    samples = tuple(replace(s, group=g, split=p) for s, g, p in zip(data.samples, groups, splits, strict=True))
    return replace(data, samples=samples)
