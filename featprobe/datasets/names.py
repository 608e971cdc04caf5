"""Names of files: which are no data, and which file a name means that is written in another form than on the disk."""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote

from featprobe.datasets.images.pages import misnamed, once_a_file
from featprobe.errors import DataError

T = TypeVar("T")

HIDDEN = ("__macosx", "thumbs.db", "desktop.ini", "@eadir")  # what macOS, Windows and Synology leave, in lower case


def is_hidden(name: str) -> bool:
    """Whether a file or a folder of this name is no data: dot files, as .ipynb_checkpoints and ._a.png, and HIDDEN."""
    return name.startswith(".") or name.lower() in HIDDEN


def visible(root: Path, paths: Iterable[Path]) -> list[Path]:
    """Those paths below a folder, sorted, that are not hidden and in no hidden folder of it."""
    return sorted(path for path in paths if not any(map(is_hidden, path.relative_to(root).parts)))


def as_on_disk(root: Path, path: Path) -> Path:
    """A path below `root`; where nothing is there, the file that is and whose name differs in form alone.

    Such forms are Unicode's (composed and decomposed) and percent-encoding. A name that differs in nothing comes first.
    Raises DataError where several files are meant.
    """
    if path == root or _is_there(path):
        return path
    folder = as_on_disk(root, path.parent)
    found = _inside(folder).get(plain(path.name), ())
    return folder / _only(found, f"{path} is not there, and") if found else path


def first_there(root: Path, places: Collection[Path]) -> Path | None:
    """The first of these paths below `root` that leads to a file, else the first that `as_on_disk` finds; or None."""
    found = (as_on_disk(root, place) for place in places)
    return next(filter(_leads_to_file, places), None) or next(filter(_leads_to_file, found), None)


def meant(names: Iterable[str], known: Collection[str]) -> dict[str, str]:
    """The known name that each name means: itself, else the one that differs in form alone; itself without such.

    A known name that is met as it is means nothing else. Raises DataError where several are meant, or by several.

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
    """The only name of `by_form` that looks like this one; None without. Raises DataError where several do."""
    found = forms.get(plain(name))
    return _only(found, f"There is no {name}, and") if found else None


def renamed(own: Mapping[str, T], known: Collection[str]) -> dict[str, T]:
    """Values by name, each under the known name that is `meant`."""
    known_as = meant(own, known)
    return {known_as[name]: value for name, value in own.items()}


def not_there(path: Path) -> str:
    """What is said of a path where no file is; "" where that is not what is wrong."""
    if (said := misnamed(path)) or _is_there(path) or not path.parent.is_dir():
        return said
    wanted = plain(path.name).casefold()
    alike = [name for form, own in _inside(path.parent).items() if form.casefold() == wanted for name in own]
    if not alike:
        return ""
    return f"There is no {path}. Did you mean {' or '.join(sorted(alike))}? Upper and lower case are told apart."


def _only(names: Collection[str], what: str) -> str:
    if len(names) > 1:
        raise DataError(f"{what} several names look like that: {', '.join(map(ascii, sorted(names)))}. Rename one.")
    return next(iter(names))


def _is_there(path: Path) -> bool:
    return os.path.lexists(path) or path.parent.is_file()  # what is below a file is a page, or is told to be none


def _leads_to_file(path: Path) -> bool:
    return path.is_file() or path.parent.is_file()


def plain(name: str) -> str:
    """The one form of all names that look alike.

    >>> plain("Pru\u0308f%201") == "Pr\xfcf 1"
    True
    """
    return unicodedata.normalize("NFC", unquote(name, errors="surrogateescape"))


def by_form(names: Iterable[str]) -> Mapping[str, list[str]]:
    """Names by the one form of all that look alike."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        found[plain(name)].append(name)
    return found


@once_a_file(64)
def _listing(folder: Path) -> Mapping[str, list[str]]:
    return by_form(os.listdir(folder))


def _inside(folder: Path) -> Mapping[str, list[str]]:
    """Names in a folder by their form; empty where that can't be told."""
    try:
        return _listing(folder) if folder.is_dir() else {}
    except OSError:
        return {}
