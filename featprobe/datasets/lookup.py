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


@dataclass(frozen=True)
class _Listing:
    """The names in a folder. files: of regular files. forms: all names, in one form and case."""

    folder: Path
    files: frozenset[str]
    forms: frozenset[str]

    def lacks(self, name: str) -> bool:
        """Whether nothing there has this name, in whatever form or case."""
        return _form(name) not in self.forms


class Lookup:
    """The files that texts name, as `files.below` has them. It sees a folder as it was when it was first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._known: dict[tuple[Path, str], _Listing | None] = {}

    def path(self, text: str, where: object, base: Path | None = None) -> Path:
        """The path that a text names, whether or not something is there. Raises DataError as `files.below` does."""
        base = base or self.root
        found = self._found(text, base)
        return below(self.root, text, where, base) if found is None else found[0]

    def file(self, text: str, where: object, bases: Sequence[Path]) -> Path | None:
        """The file, or the page of one, that a text names in the first of these folders that has it; None without.

        Raises DataError as `files.below` does.
        """
        for base in bases:
            found = self._found(text, base)
            path = below(self.root, text, where, base) if found is None else found[0]
            if found[1] if found else (path.is_file() or page_of(path)[1] is not None):
                return path
        return None

    def exact(self, text: str, bases: Sequence[Path]) -> tuple[Path | None] | None:
        """The file of exactly this name in the first of these folders that has it; (None,) where none has a name that
        is like it. None where only the disk can tell."""
        for base in bases:
            found = self._found(text, base)
            if found is None:
                return None
            if found[1]:
                return (found[0],)
        return (None,)

    def _found(self, text: str, base: Path) -> tuple[Path, bool] | None:
        """A path, and whether a regular file is there; None where only the disk can tell."""
        text = text.replace("\\", "/").removeprefix("./")
        if len(text) > LONGEST or text.count("/") > DEEPEST:
            return None
        head, _, name = text.rpartition("/")
        if (not head and text.startswith("/")) or not _usual(name) or is_page_name(name):
            return None
        listing = self._listing(base, head)
        if listing is None:
            return None
        if name in listing.files:
            return listing.folder / name, True
        return (listing.folder / name, False) if listing.lacks(name) else None

    def _listing(self, base: Path, head: str) -> _Listing | None:
        """The names in a folder below `base`; none where there is no such folder. None where only the disk can tell."""
        key = base, head
        if key not in self._known:
            self._known[key] = self._listed(base, head)
        return self._known[key]

    def _listed(self, base: Path, head: str) -> _Listing | None:
        outer, _, own = head.rpartition("/")
        if head:
            around = self._listing(base, outer) if _usual(own) and (outer or head == own) else None
            if around is None:
                return None
            if around.lacks(own):
                return _Listing(around.folder / own, frozenset(), frozenset())
        try:
            folder = below(self.root, head, base, base) if head else kept_below(self.root, base)
            with os.scandir(folder) as entries:
                files = {entry.name: entry.is_file(follow_symlinks=False) for entry in entries}
        except (DataError, NotADirectoryError):
            return None
        except FileNotFoundError:
            return _Listing(base / head, frozenset(), frozenset())
        except OSError:
            return None
        regular = frozenset(name for name, is_file in files.items() if is_file)
        return _Listing(folder, regular, frozenset(map(_form, files)))


def _usual(name: str) -> bool:
    """Whether a part of a path can only be the name of what lies in a folder."""
    return (
        name not in ("", ".", "..")
        and not any(mark in name for mark in "\0:")
        and len(name.encode("utf-8", "replace")) <= LONGEST_NAME
    )


def _form(name: str) -> str:
    return plain(name).casefold()
