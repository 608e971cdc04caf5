"""Names of files: hidden files, which are no data, and names that are written in another form than on the disk."""

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote

from featprobe.datasets.images.pages import misnamed, once_a_file
from featprobe.errors import DataError

T = TypeVar("T")

HIDDEN = ("__macosx", "thumbs.db", "desktop.ini", "@eadir")  # left by macOS, Windows and Synology; in lower case


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is no data: dot files (.ipynb_checkpoints, ._a.png) and HIDDEN."""
    return name.startswith(".") or name.lower() in HIDDEN


def name_of(path: Path) -> str:
    """The name of a data set that is given by its path.

    >>> name_of(Path("/scans/new castings"))
    'new_castings'
    """
    return re.sub(r"[^\w.-]+", "_", path.resolve().name)


def visible(root: Path, paths: Iterable[Path]) -> list[Path]:
    """The paths that are not hidden and in no hidden folder below `root`, sorted."""
    return sorted(path for path in paths if not any(map(is_hidden, path.relative_to(root).parts)))


def as_on_disk(root: Path, path: Path) -> Path:
    """A path below `root` as it is written on the disk. Where nothing is there, a file whose name differs only in form.

    Forms are Unicode's (composed and decomposed) and percent-encoding. Exactly the same name is preferred. Raises
    DataError where several files fit.
    """
    if path == root or _is_there(path):
        return path
    folder = as_on_disk(root, path.parent)
    found = _inside(folder).get(plain(path.name), ())
    return folder / _only(found, f"{path} is not there, and") if found else path


def first_there(root: Path, places: Collection[Path]) -> Path | None:
    """The first of these paths below `root` that exists, else the first that `as_on_disk` finds, else None."""
    found = (as_on_disk(root, place) for place in places)
    return next(filter(_leads_to_file, places), None) or next(filter(_leads_to_file, found), None)


def meant(names: Iterable[str], known: Collection[str]) -> dict[str, str]:
    """The known name for each name: the same, else the known name that differs only in form, else the name itself.

    A known name that is used exactly stands for nothing else. Raises DataError where a name fits several known names,
    or several names fit one.

    >>> meant(["a%20b", "c"], ["a b", "d"])
    {'a%20b': 'a b', 'c': 'c'}
    """
    names, exact = list(names), set(known)
    if exact.issuperset(names):
        return {name: name for name in names}
    free = by_form(exact.difference(names))
    found = {n: n if n in exact else _only(free.get(plain(n)) or (n,), f"There is no {n}, and") for n in names}
    by: dict[str, list[str]] = defaultdict(list)
    for name, known_name in found.items():
        by[known_name].append(name)
    for known_name, several in by.items():
        _only(several, f"{known_name} has one place, and")
    return found


def alike(name: str, forms: Mapping[str, Sequence[str]]) -> str | None:
    """The name of `by_form` that differs from this one in form alone; None without. Raises DataError for several."""
    found = forms.get(plain(name))
    return _only(found, f"There is no {name}, and") if found else None


def renamed(values: Mapping[str, T], known: Collection[str]) -> dict[str, T]:
    """The same values by known names, see `meant`."""
    known_as = meant(values, known)
    return {known_as[name]: value for name, value in values.items()}


def not_there(path: Path) -> str:
    """The error text for a path without a file, where similar names exist or it names no page; else ""."""
    if (fault := misnamed(path)) or _is_there(path) or not path.parent.is_dir():
        return fault
    wanted = plain(path.name).casefold()
    alike = [name for form, names in _inside(path.parent).items() if form.casefold() == wanted for name in names]
    if not alike:
        return ""
    return f"There is no {path}. Did you mean {' or '.join(sorted(alike))}? Upper and lower case matter."


def _only(names: Collection[str], what: str) -> str:
    if len(names) > 1:
        raise DataError(f"{what} several names look like that: {', '.join(map(ascii, sorted(names)))}. Rename one.")
    return next(iter(names))


def _is_there(path: Path) -> bool:
    return os.path.lexists(path) or path.parent.is_file()  # a path below a file is a page, or misnamed


def _leads_to_file(path: Path) -> bool:
    return path.is_file() or path.parent.is_file()


def plain(name: str) -> str:
    """The common form of all names that differ in form alone.

    >>> plain("Pru\u0308f%201") == "Pr\xfcf 1"
    True
    """
    return unicodedata.normalize("NFC", unquote(name, errors="surrogateescape"))


def by_form(names: Iterable[str]) -> Mapping[str, list[str]]:
    """Names by their common form, see `plain`."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        found[plain(name)].append(name)
    return found


@once_a_file(64)
def _listing(folder: Path) -> Mapping[str, list[str]]:
    return by_form(os.listdir(folder))


def _inside(folder: Path) -> Mapping[str, list[str]]:
    """Names in a folder by their form; {} where the folder can't be read."""
    try:
        return _listing(folder) if folder.is_dir() else {}
    except OSError:
        return {}
