"""What readers share of files: text, tables, and paths that never lead out of the data folder."""

import csv
import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from featprobe.datasets.images import SUFFIXES
from featprobe.datasets.pages import can_be_counted, page_of, page_path, pages_of
from featprobe.errors import DataError, counted


def start_of(path: Path, count: int) -> bytes:
    """The first bytes of a file, to tell its kind by; none where there is no file. Raises DataError."""
    if not path.is_file():
        return b""
    try:
        with path.open("rb") as stream:
            return stream.read(count)
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}.") from error


def read_text(path: Path) -> str:
    """A UTF-8 text, its byte order mark left away. Raises DataError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} can't be read as text: {error}. wanted: UTF-8.") from error


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises DataError."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} can't be read as JSON: {error}.") from error


def read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a CSV file that has these columns, all of them filled or empty texts. Raises DataError."""
    try:
        rows = list(csv.DictReader(read_text(path).splitlines()))
    except csv.Error as error:
        raise DataError(f"{path} can't be read as CSV: {error}.") from error
    for number, row in enumerate(rows, start=2):
        if any(not isinstance(row.get(column), str) for column in columns):
            raise DataError(f"{path}, row {number} can't be read. wanted: {', '.join(columns)}. found: {row}")
    return rows


def read_table(path: Path) -> dict[str, dict[str, str]]:
    """Rows of a samples.csv (image,split,group) by image; empty when there is none. Raises DataError."""
    if is_missing(path):
        return {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} can't be read as CSV: {error}.") from error
    if rows and "image" not in rows[0]:
        raise DataError(f"{path} has the columns {', '.join(map(str, rows[0]))}. wanted: image, and split or group.")
    return {row["image"]: row for row in rows}


def is_missing(path: Path) -> bool:
    """Whether there is nothing at a path, no link that leads nowhere or to itself either."""
    return not path.is_file() and not path.is_symlink()


def own_table(root: Path) -> dict[str, dict[str, str]]:
    """Rows of the samples.csv that lies in a data folder itself. Raises DataError."""
    return read_table(kept_below(root, root / "samples.csv"))


def below(root: Path, text: str, where: object, base: Path | None = None) -> Path:
    """The path that an annotation names, relative to `base` (else `root`), always below `root`.

    Windows' separators are taken as such. Raises DataError, naming `where`, for a path that is absolute,
    that leads out of the data folder by `..` or by a link, or that links to itself.
    """
    return kept_below(root, named_below(root, text, where, base))


def named_below(root: Path, text: str, where: object, base: Path | None = None) -> Path:
    """`below` without a look at the disk: links, which lie there by the user's own hand, are not followed.

    Raises DataError, naming `where`, for a path that is absolute or leads out of the data folder by `..`.
    """
    plain = text.replace("\\", "/")
    absolute = plain.startswith("/") or plain[1:2] == ":"
    relative = Path(os.path.normpath((base or root).relative_to(root) / plain))
    if absolute or not plain or "\0" in plain or relative.parts[:1] == ("..",):
        raise DataError(
            f"{where} names a path that is not below the data folder.\n"
            f"  wanted  a relative path below {root}\n  found   {text[:200]!r}\n"
            "It was not opened. Mend the annotation."
        )
    return root / relative


def kept_below(root: Path, path: Path) -> Path:
    """The same path. Raises DataError when a link on its way leads out of `root`, or to itself."""
    try:
        inside = path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path} can't be followed: it links to itself.") from error
    if not inside:
        raise DataError(f"{path} is a link out of the data folder {root}. It was not opened. Put the files there.")
    return path


def folders_in(folder: Path) -> list[Path]:
    """Folders in a folder, linked ones too, sorted. Quick where thousands of files lie beside them."""
    with os.scandir(folder) as entries:  # an entry that links to itself is asked as a path, which answers no
        return sorted(folder / e.name for e in entries if (Path(e) if e.is_symlink() else e).is_dir())


def files_below(root: Path, folder: Path, suffixes: Collection[str] = SUFFIXES) -> list[Path]:
    """Files of these suffixes (lower case) in a folder and the folders in it, sorted; linked folders are not entered.

    Raises DataError for a link out of `root`, or to itself.
    """
    kept_below(root, folder)
    found = [Path(place, name) for place, _, names in os.walk(folder) for name in names]
    chosen = sorted(path for path in found if path.suffix.lower() in suffixes)
    return [kept_below(root, path) if path.is_symlink() else path for path in chosen]


def stem_of(path: Path, folder: Path) -> str:
    """An image's path below a folder without its file's suffix: `a/stack/0003` of `a/stack.tif/0003`."""
    file, page = page_of(path)
    stem = file.relative_to(folder).with_suffix("").as_posix()
    return stem if page is None else f"{stem}/{path.name}"


def paired(
    images: Sequence[Path], image_folder: Path, masks: Sequence[Path], mask_folder: Path
) -> tuple[list[Path], dict[str, Path]]:
    """All images of files, page by page, and all masks of files by stem; damaged files are met again, by name.

    Raises DataError where a file of images has a mask of another number of pages.
    """
    pages = {file: pages_of(file) for file in images}
    drawn = {stem_of(file, mask_folder): (file, pages_of(file)) for file in masks}
    for image, own in pages.items():
        stem = stem_of(image, image_folder)
        mask, found = drawn.get(stem, (image, own))
        if len(found) == len(own) or not can_be_counted(image):
            continue
        if can_be_counted(mask):
            raise DataError(
                f"{mask} is not the mask of {image}: they go page by page.\n"
                f"  wanted  {counted(len(own), 'page')}, as the image has\n  found   {len(found)}\n"
                "Nothing was read. Mend the mask, or the image."
            )
        drawn[stem] = mask, [page_path(mask, number) for number in range(len(own))]
    mask_of = {stem_of(page, mask_folder): page for _, own in drawn.values() for page in own}
    return [page for own in pages.values() for page in own], mask_of


def words_of(text: str, where: object, count: int) -> list[list[str]]:
    """Words of each line that is not empty, separated by spaces or commas. Raises DataError for another number."""
    rows = [line.replace(",", " ").split() for line in text.splitlines() if line.strip()]
    for number, row in enumerate(rows, start=1):
        if len(row) != count:
            raise DataError(f"{where}, entry {number}: wanted {count} values, found {' '.join(row)[:200]!r}.")
    return rows
