"""Files that many rows of a table name: each folder is listed once, instead of a question to the disk for each row."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from featprobe.datasets.files import LONGEST_NAME, below, kept_below
from featprobe.datasets.images.pages import is_page_name, page_of
from featprobe.datasets.names import plain
from featprobe.errors import DataError

DEEPEST, LONGEST = 32, 1000  # folders and characters of a text that are looked up here; others are asked of the disk
NONE = frozenset[str]()


@dataclass(frozen=True)
class _Listing:
    """The names in a folder. files: of regular files. forms: all names, in one form and case."""

    folder: Path
    files: frozenset[str]
    forms: frozenset[str]

    def tells(self, name: str, form: str) -> bool:
        """Whether it says if a regular file of this name is there: no link has it, and no other name of its form."""
        return name in self.files or form not in self.forms


class Lookup:
    """The files that texts name, as `files.below` has them. It sees a folder as it was when it was first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._known: dict[tuple[Path, str], _Listing | None] = {}

    def path(self, text: str, where: object, base: Path | None = None) -> Path:
        """The path that a text names, whether or not something is there. Raises DataError as `files.below` does."""
        base = base or self.root
        named = _named(text)
        listing = self._listing(base, named[0]) if named else None
        if named is None or listing is None or not listing.tells(*named[1:]):
            return below(self.root, text, where, base)
        return listing.folder / named[1]

    def file(self, text: str, where: object, bases: Sequence[Path]) -> Path | None:
        """The file, or the page of one, that a text names in the first of these folders that has it; None without.

        Raises DataError as `files.below` does.
        """
        found = self.exact(text, bases)
        if found is not None:
            return found[0] if found[1] else None
        for base in bases:
            path = below(self.root, text, where, base)
            if path.is_file() or page_of(path)[1] is not None:
                return path
        return None

    def exact(self, text: str, bases: Sequence[Path]) -> tuple[Path, bool] | None:
        """The file of exactly this name in the first of these folders that has it, and True; or where it would be in
        the first of them, and False, where none has a name that is like it. None where only the disk can tell."""
        named = _named(text)
        if named is None:
            return None
        head, name, form = named
        first = None
        for base in bases:
            listing = self._listing(base, head)
            if listing is None or not listing.tells(name, form):
                return None
            if name in listing.files:
                return listing.folder / name, True
            first = first or listing.folder
        return None if first is None else (first / name, False)

    def _listing(self, base: Path, head: str) -> _Listing | None:
        """The names in a folder below `base`; none where there is no such folder. None where only the disk can tell."""
        key = base, head
        if key not in self._known:
            self._known[key] = self._listed(base, head)
        return self._known[key]

    def _listed(self, base: Path, head: str) -> _Listing | None:
        if head:
            outer, _, own = head.rpartition("/")
            around = self._listing(base, outer)
            if around is None or not _usual(own):
                return None
            if _form(own) not in around.forms:
                return _Listing(around.folder / own, NONE, NONE)
        try:
            folder = below(self.root, head, base, base) if head else kept_below(self.root, base)
            with os.scandir(folder) as entries:
                files = {entry.name: entry.is_file(follow_symlinks=False) for entry in entries}
        except FileNotFoundError:
            return _Listing(base / head, NONE, NONE)
        except (DataError, OSError):
            return None
        regular = frozenset(name for name, is_file in files.items() if is_file)
        return _Listing(folder, regular, frozenset(map(_form, files)))


def _named(text: str) -> tuple[str, str, str] | None:
    """The folder and the name in a text, and the form of that name; None where only the disk can tell."""
    text = text.replace("\\", "/")
    if "./" in text or "//" in text:
        text = os.path.normpath(text)
    head, _, name = text.rpartition("/")
    unusual = len(text) > LONGEST or text.count("/") > DEEPEST or text.startswith(("/", "../"))
    return None if unusual or not _usual(name) or is_page_name(name) else (head, name, _form(name))


def _usual(name: str) -> bool:
    """Whether a part of a path can only be the name of what lies in a folder."""
    longest = len(name) if name.isascii() else len(name.encode("utf-8", "replace"))
    return name not in ("", ".", "..") and "\0" not in name and ":" not in name and longest <= LONGEST_NAME


def _form(name: str) -> str:
    return name.lower() if name.isascii() and "%" not in name else plain(name).casefold()
