"""Files for all readers: text, tables, and paths that never lead out of the data folder."""

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from featprobe.datasets.images.pages import can_be_counted, opened_file, page_of, page_path, pages_of
from featprobe.datasets.images.reading import SUFFIXES
from featprobe.datasets.names import alike, as_on_disk, by_form, is_hidden, renamed, visible
from featprobe.datasets.samples import listed
from featprobe.datasets.values import Faults
from featprobe.errors import DataError, counted, looks_like
from featprobe.io.disk import parse_json
from featprobe.machine import available_memory, human_bytes

LONGEST, LONGEST_NAME = 2048, 255  # most bytes of a path (half of what systems allow), and of a name in it
IN_MEMORY = 8  # bytes of memory, about, per byte of annotations, once parsed
SMALL = 1 << 24  # bytes: a text up to this size may always be read
FOLLOW_LINKS = "--follow-links"
_FOLLOWED: ContextVar[bool] = ContextVar("links are followed", default=False)
MOST_NAMED = 24  # columns of a table in a message
ROWS_BETWEEN, LEAST_FREE = 1 << 17, 1 << 27  # rows between two looks at the free memory, and the bytes wanted then
SEPARATORS = (",", ";", "\t")  # of columns; spreadsheets write each of these


@contextmanager
def links_followed(wanted: bool) -> Iterator[None]:
    """Inside, links may (wanted) or may not lead out of the data folder when this thread reads a set or its labels."""
    token = _FOLLOWED.set(wanted)
    try:
        yield
    finally:
        _FOLLOWED.reset(token)


def leads_out(root: Path, path: Path) -> bool:
    """Whether a path leads out of a data folder by a link that may not be followed, or by a link to itself."""
    try:
        return not _FOLLOWED.get() and not path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):
        return True


def start_of(path: Path, count: int, root: Path | None = None) -> bytes:
    """The first bytes of a file, which show its kind; b"" where there is no file. Raises DataError.

    root: the data folder; a file outside of it is not read. None for a file that is known to be inside.
    """
    if not path.is_file() or (root is not None and leads_out(root, path)):
        return b""
    try:
        with opened_file(path) as stream:
            return stream.read(count)
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}.") from error


def read_text(path: Path, most: int | None = None) -> str:
    """The text of a UTF-8 file, without a byte order mark. Raises DataError, also for a file too large for the memory.

    most: the most bytes that such a file may have; None for no limit but the memory.
    """
    try:
        with opened_file(path) as stream:
            held = os.fstat(stream.fileno()).st_size
            if held > (most or SMALL) and held > (most or available_memory() // IN_MEMORY):
                limit = f"such a file may have ({human_bytes(most)})" if most else "fits the memory"
                raise DataError(f"{path} has {human_bytes(held)}, more than {limit}. It was not read.")
            with io.TextIOWrapper(stream, encoding="utf-8-sig") as text:
                return text.read()
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} can't be read as text: {error}. wanted: UTF-8.") from error


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises DataError."""
    text = read_text(path)
    try:
        value = parse_json(text)
    except ValueError as error:
        raise DataError(f"{path} can't be read as JSON: {error}.") from error
    if re.search(r"\\u[dD][89a-fA-F]", text):  # escapes that are a character only in pairs
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{path} holds a text with half a character, {error.object[error.start]!a}.") from error
    return value


def read_csv(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> list[dict[str, str]]:
    """The rows of a CSV file with these columns, as `rows_of` reads them. Raises DataError."""
    return rows_of(read_text(path), path, columns, optional)


def rows_of(text: str, path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> list[dict[str, str]]:
    """The rows of a CSV table, by column. It may come from a spreadsheet: comma, semicolon or tab separate cells.

    Blanks around a cell are removed, names of columns match in any case, and rows of empty cells are skipped. Raises
    DataError for a column that is missing, is there twice, or looks like a missing one, and for rows with more cells
    than columns.
    """
    first, _, rest = text.partition("\n")
    # Some spreadsheets name their separator in a first line.
    stated = first.strip().removeprefix("sep=") if first.startswith("sep=") else ""
    text, first = (rest, "") if stated else (text, first)
    separator = next((known for known in SEPARATORS if known in (stated or first)), ",")
    try:
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        header = _header([cell.strip() for cell in next(lines, [])], path, columns, optional)
        return _rows(lines, header, path, separator, columns, optional)
    except csv.Error as error:
        raise DataError(f"{path} can't be read as CSV: {error}.") from error


def _header(names: Sequence[str], path: Path, columns: Sequence[str], optional: Sequence[str]) -> list[str]:
    """The columns that the first row of a table names, known ones as they are called here. Raises DataError."""
    known = {name.casefold(): name for name in (*columns, *optional)}
    header = [known.get(name.casefold(), name) for name in names]
    alike = looks_like(header, tuple(known.values()))
    faults = [f"{name!r}, which looks like {column!r}" for name, column in alike.items()]
    faults += [f"{name!r} twice" for name, count in Counter(header).items() if name and count > 1]
    if faults or not set(columns) <= set(header):
        also = f"; optional: {', '.join(optional)}" if optional else ""
        raise DataError(
            f"{path} has the columns {listed(header, MOST_NAMED) or '(none)'}. wanted: {', '.join(columns)}{also}."
            + (f"\n  found   {'; '.join(faults[:MOST_NAMED])}\nRename these columns, or remove them." if faults else "")
        )
    return header


def _rows(
    lines: Iterable[list[str]], header: Sequence[str], path: Path, separator: str,
    columns: Sequence[str], optional: Sequence[str],
) -> list[dict[str, str]]:  # fmt: skip
    """The rows below the header: their known columns alone, since a wide header would be held in every row.

    Raises DataError.
    """
    width, needed = len(header), max(header.index(name) for name in columns)
    kept = [(name, i) for i, name in enumerate(header) if name in columns or name in optional]
    found: list[dict[str, str]] = []
    for number, line in enumerate(lines, start=2):
        row = [cell.strip() for cell in line]
        if any(row[width:]):
            raise DataError(
                f"{path}, row {number} has more cells than there are columns. Put a name with a {separator!r} in it in "
                f"quotes.\n  wanted  {listed(header, MOST_NAMED)}\n  found   {separator.join(row)[:200]}"
            )
        if not any(row):
            continue
        if len(row) <= needed:
            raise DataError(
                f"{path}, row {number} can't be read. wanted: {', '.join(columns)}. "
                f"found: {separator.join(row)[:200]!r}"
            )
        found.append({name: row[i] if i < len(row) else "" for name, i in kept})
        if len(found) % ROWS_BETWEEN == 0 and available_memory() < LEAST_FREE:
            raise DataError(f"{path} has more rows than fit the memory. It was not read beyond row {number}.")
    return found


@dataclass
class Table:
    """Rows of a table by the names of images. It remembers which rows were used and which images have no row.

    met: names of used rows. lacked: names of images without a row. lent: name of a row -> the differently written name
    (see `datasets.names`) of the image that uses it.
    """

    path: Path
    rows: Mapping[str, Mapping[str, str]]
    met: set[str] = field(default_factory=set)
    lacked: list[str] = field(default_factory=list)
    lent: dict[str, str] = field(default_factory=dict)

    @cached_property
    def forms(self) -> Mapping[str, Sequence[str]]:
        """The names of rows by their form, see `names.by_form`."""
        return by_form(self.rows)

    def row(self, *names: str) -> Mapping[str, str]:
        """The row of an image, by the first of its names that has a row; {} where none has.

        Blanks around a name are ignored. A row of exactly this name is preferred to one that differs in form alone.
        Raises DataError for a row that fits two images.
        """
        names = tuple(map(str.strip, names))
        asked_as = {name: name for name in names if name in self.rows}
        if not asked_as:
            found = {name: alike(name, self.forms) for name in names}
            asked_as = {row: name for name, row in found.items() if row and (row in self.lent or row not in self.met)}
            for row, name in asked_as.items():
                self.lent.setdefault(row, name)
        here = list(asked_as)
        self.met.update(here)
        twice = [row for row, name in asked_as.items() if self.lent.get(row, name) != name]
        if twice:
            raise DataError(f"{self.path} has a row for {twice[0]}, and two images have names that look like it.")
        if not here:
            self.lacked.append(names[0])
        return self.rows[here[0]] if here else {}

    def notes(self) -> list[str]:
        """Notes on rows without an image and images without a row, once all images were looked up.

        Raises DataError where no row belongs to an image here.
        """
        gone = [name for name in self.rows if name not in self.met]
        if gone and not self.met:
            raise DataError(
                f"{self.path} names no image of this data set.\n  wanted  {listed(self.lacked)}\n"
                f"  found   {listed(gone)}\nNothing was read. Correct the names, or remove the file."
            )
        bare = self.lacked if self.rows else []
        findings = (
            (gone, "names", counted(len(gone), "image that is not here", "images that are not here")),
            (bare, "has no row for", counted(len(bare), "image")),
        )
        return [f"{self.path.name} {verb} {count}: {listed(names)}" for names, verb, count in findings if names]


def read_table(path: Path) -> Table:
    """The table of a samples.csv (image,split,group); empty when there is no such file.

    Raises DataError for a row without an image, and for an image with two rows.
    """
    rows = [] if is_missing(path) else read_csv(path, ("image",), ("split", "group"))
    return Table(path, by_name(rows, "image", path))


def by_name(rows: Sequence[dict[str, str]], column: str, path: Path) -> dict[str, dict[str, str]]:
    """Rows by the image that a column names. Raises DataError for all rows that name none, or the image of another."""
    named: dict[str, dict[str, str]] = {}
    faults = Faults()
    called = "name" if column == "image" else column
    for number, row in enumerate(rows, start=1):
        name = row[column].replace("\\", "/") if column == "image" else row[column]
        if not name or name in named:
            said = f"{name} is there twice" if name else f"it has no {called}"
            faults.say(partial("{}, image {}: {}.".format, path, number, said))
        named[name] = row
    faults.raise_all()
    return named


def is_missing(path: Path) -> bool:
    """Whether there is nothing at a path, not even a pipe or a link that leads nowhere or to itself."""
    return not os.path.lexists(path)


def own_table(root: Path) -> Table:
    """The table of the samples.csv at the top of a data folder. Raises DataError."""
    return read_table(kept_below(root, root / "samples.csv"))


def below(root: Path, text: str, where: object, base: Path | None = None) -> Path:
    """The path that an annotation names, relative to `base` (else to `root`), always below `root`.

    Windows' separators are understood. Raises DataError, naming `where`, for an absolute path, for one that leads out
    of the data folder by `..` or by a link, and for a link to itself.
    """
    return kept_below(root, named_below(root, text, where, base))


def named_below(root: Path, text: str, where: object, base: Path | None = None) -> Path:
    """Like `below`, without reading the disk: links are not checked.

    Raises DataError, naming `where`, for a path that is absolute or leads out of the data folder by `..`.
    """
    plain = text.replace("\\", "/")
    absolute = plain.startswith("/") or plain[1:2] == ":"
    relative = Path(os.path.normpath((base or root).relative_to(root) / plain))
    names = [part.encode("utf-8", "replace") for part in relative.parts]
    if len(b"/".join(names)) > LONGEST or any(len(name) > LONGEST_NAME for name in names):
        raise DataError(
            f"{where} names a path that is too long for any file: {text[:80]!r}… of {len(text)} characters."
        )
    if absolute or not plain or "\0" in plain or relative.parts[:1] == ("..",):
        raise DataError(
            f"{where} names a path that is not below the data folder.\n"
            f"  wanted  a relative path below {root}\n  found   {text[:200]!r}\n"
            "It was not opened. Correct the annotation."
        )
    return root / relative


def kept_below(root: Path, path: Path) -> Path:
    """The path as it is written on the disk, see `names`. Raises DataError when it leads out of `root` by a link."""
    path = as_on_disk(root, path)
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path} can't be followed: it links to itself.") from error
    if not _FOLLOWED.get() and not real.is_relative_to(root.resolve()):
        raise DataError(
            f"{path} is a link out of the data folder {root}. It was not opened.\n  found   {real}\n"
            f"Put the files there, or follow such links:  {FOLLOW_LINKS}, or follow_links = true in featprobe.toml"
        )
    return path


def folders_in(folder: Path) -> list[Path]:
    """The folders in a folder, also linked ones, without hidden ones, sorted. Fast also beside thousands of files."""
    with os.scandir(folder) as entries:  # an entry that links to itself is tested as a path, which is no folder
        found = [folder / e.name for e in entries if (Path(e) if e.is_symlink() else e).is_dir()]
    return visible(folder, found)


def files_below(root: Path, folder: Path, suffixes: Collection[str] = SUFFIXES) -> list[Path]:
    """Files with these suffixes (lower case) in a folder and below, sorted; linked folders are not entered.

    Hidden files are skipped, see `names`. Raises DataError for a link out of `root`, or to itself.
    """
    kept_below(root, folder)
    chosen = [path for path in files_in(folder) if path.suffix.lower() in suffixes]
    return [kept_below(root, path) if path.is_symlink() else path for path in chosen]


def files_in(folder: Path) -> list[Path]:
    """All files in a folder and below, but hidden ones, sorted. Linked files count; linked folders are not entered."""
    found: list[Path] = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not is_hidden(name)]
        found += [Path(place, name) for name in names if not is_hidden(name)]
    return sorted(found)


def other_images(root: Path, read: Sequence[Path]) -> list[str]:
    """A note with the number, per folder, of images below `root` outside of the folders that were read; [] without any.

    Images count as read also where a link in a read folder leads to them.
    """
    folders = {*read}
    others = [p for p in files_in(root) if p.suffix.lower() in SUFFIXES and folders.isdisjoint(p.parents)]
    if not others:
        return []
    places = {folder.resolve() for folder in read}
    met = {path.resolve() for folder in read for path in files_in(folder)}
    real = {path: path.resolve() for path in others}
    left = Counter(
        path.parent.relative_to(root).as_posix()
        for path in others
        if real[path] not in met and places.isdisjoint(real[path].parents)
    )
    each = [f"{count} of {folder}/" for folder, count in sorted(left.items())]
    return [f"{counted(left.total(), 'other image was', 'other images were')} not read: {listed(each)}"] if left else []


def stem_of(path: Path, folder: Path) -> str:
    """An image's path below a folder without the suffix of its file: `a/stack/0003` for `a/stack.tif/0003`."""
    file, page = page_of(path)
    stem = file.relative_to(folder).with_suffix("").as_posix()
    return stem if page is None else f"{stem}/{path.name}"


def paired(
    images: Sequence[Path], image_folder: Path, masks: Sequence[Path], mask_folder: Path
) -> tuple[list[Path], dict[str, Path]]:
    """All images, page by page, and all masks by stem. Damaged files are kept: reading them later raises the error.

    Raises DataError where an image has a mask with another number of pages, and where a stem belongs to several files.
    """
    image_of, mask_files = _by_stem(images, image_folder), _by_stem(masks, mask_folder)
    pages = {file: pages_of(file) for file in image_of.values()}
    drawn = {stem: (file, pages_of(file)) for stem, file in renamed(mask_files, image_of).items()}
    for image, own_pages in pages.items():
        stem = stem_of(image, image_folder)
        mask, found = drawn.get(stem, (image, own_pages))
        if len(found) == len(own_pages) or not can_be_counted(image):
            continue
        if can_be_counted(mask):
            raise DataError(_of_other_pages(image, len(own_pages), mask, len(found)))
        drawn[stem] = mask, [page_path(mask, number) for number in range(len(own_pages))]
    mask_of = {
        stem if page == mask else f"{stem}/{page.name}": page for stem, (mask, found) in drawn.items() for page in found
    }
    return [page for found in pages.values() for page in found], mask_of


def _by_stem(files: Sequence[Path], folder: Path) -> dict[str, Path]:
    """Files by stem; a file with an image's suffix is preferred. Raises DataError for two such files of one stem."""
    found: dict[str, Path] = {}
    for file in files:
        stem = stem_of(file, folder)
        known, new = (path.suffix.lower() in SUFFIXES for path in (found.get(stem, Path()), file))
        if known and new:
            raise DataError(
                f"{found[stem]} and {file} have the same name, so images and masks can't be paired.\n"
                "Nothing was read. Rename one, or remove it."
            )
        if not known:
            found[stem] = file
    return found


def words_of(text: str, where: object, count: int) -> list[list[str]]:
    """The words of each line, separated by spaces or commas; empty lines are skipped.

    Raises DataError for a line with another number of words than `count`.
    """
    rows = [line.replace(",", " ").split() for line in text.splitlines() if line.strip()]
    for number, row in enumerate(rows, start=1):
        if len(row) != count:
            raise DataError(f"{where}, entry {number}: wanted {count} values, found {' '.join(row)[:200]!r}.")
    return rows


def mask_pages(image: Path, pages: Sequence[Path], mask: Path) -> list[Path]:
    """The pages of a mask, as many as its image has. A damaged file is kept: reading it later raises the error.

    Raises DataError for another number of pages.
    """
    found = pages_of(mask)
    if len(found) == len(pages) or not can_be_counted(image):
        return found
    if can_be_counted(mask):
        raise DataError(_of_other_pages(image, len(pages), mask, len(found)))
    return [page_path(mask, number) for number in range(len(pages))]


def _of_other_pages(image: Path, pages: int, mask: Path, found: int) -> str:
    return (
        f"{mask} is not the mask of {image}: each page of the image needs one page of the mask.\n"
        f"  wanted  {counted(pages, 'page')}, as the image has\n  found   {found}\n"
        "Nothing was read. Correct the mask or the image."
    )
