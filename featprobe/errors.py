"""Every error that featprobe raises on purpose.

    FeatprobeError                exit code 1: one paragraph, no traceback
    ├── UsageError                exit code 2: a wrong value on the command line
    ├── DataError                 an image, a mask, an annotation, a split, a data set's name
    │   ├── LabelSizeError        labels of another size than their image
    │   └── OutOfImageError       a box or a polygon that is empty or leaves its image
    ├── BackboneError             a model name, weights, a device
    │   └── LacksError            exit code 2: a level or a layer that was asked for, which the model lacks
    ├── CacheError                a cache file: its place, version, identity, contents
    │   ├── CacheBusyError        another process or thread is writing the same rows
    │   ├── CacheIncompleteError  rows are missing
    │   ├── NoMapsError           pooled features alone, where maps are wanted
    │   └── OverflowsDtypeError   a feature does not fit the cache's number format
    ├── ProbeError                a head, a saved head, a training recipe
    │   └── DivergedError         a training whose loss is not finite any more
    ├── DiskError                 a disk that is full, read-only or failing
    ├── FieldError                a value in a file with a wrong type or out of its limits
    ├── FileKindError             a pipe, a device, a folder or too large a file, where a regular file is needed
    └── ShapeError                tensors that disagree (a caller's mistake)

A message says what is wrong, where, what was wanted, what was found, what featprobe did, and what to do
now. No error loses anything that was written before.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import islice
from typing import Any, ClassVar

MOST_COMPARED, LONGEST_COMPARED = 1000, 500  # unknown names, and characters of one, that are compared with known ones


class FeatprobeError(Exception):
    """Base of all errors of this package. Its text is meant for the user. exit_code: of a command that it ends."""

    exit_code: ClassVar[int] = 1


class UsageError(FeatprobeError):
    """A value on the command line is wrong: misspelt, out of its limits, or beside another that excludes it."""

    exit_code = 2


class DataError(FeatprobeError):
    """An image, a mask, an annotation, a split or a data set's name is not usable."""


class LabelSizeError(DataError):
    """A mask or an annotation has another size than its image."""


class OutOfImageError(DataError):
    """A box or a polygon is empty or leaves its image."""


class BackboneError(FeatprobeError):
    """A model name, its weights, a level or a device is not usable."""


class LacksError(BackboneError):
    """A level or a layer that was asked for, which the model does not have: a wrong value, known once it is loaded."""

    exit_code = 2


class CacheError(FeatprobeError):
    """A cache file is in the wrong place, of another version or identity, or damaged."""


class CacheBusyError(CacheError):
    """Another process or thread is writing the same rows of the same cache."""


class CacheIncompleteError(CacheError):
    """Rows of a cache are missing, so nothing can be trained from it yet."""


class NoMapsError(CacheError):
    """A cache holds pooled features alone, where maps are wanted."""


class OverflowsDtypeError(CacheError):
    """A feature value is not finite, or does not fit the cache's number format."""


class ProbeError(FeatprobeError):
    """A head, a saved head or a training recipe is not usable."""


class DivergedError(ProbeError):
    """The loss of every head of a training is not finite any more."""


class DiskError(FeatprobeError):
    """A disk is full, read-only or failing. What files held before is unchanged."""


class FileKindError(FeatprobeError):
    """A path leads to no regular file, or to one that is too large."""


class FieldError(FeatprobeError):
    """Values from a file have wrong types or are out of their limits. faults: one `fields.Fault` per value."""

    def __init__(self, text: str, faults: Sequence[Any]) -> None:
        super().__init__(text)
        self.faults = tuple(faults)


class ShapeError(FeatprobeError):
    """Tensors that belong together disagree in shape."""


@contextmanager
def as_usage() -> Iterator[None]:
    """Inside, an error is one of the values that the caller of a command gave: it becomes a UsageError.

    >>> with as_usage():
    ...     raise ProbeError("There is no task 'x'.")
    Traceback (most recent call last):
    featprobe.errors.UsageError: There is no task 'x'.
    """
    try:
        yield
    except UsageError:
        raise
    except FeatprobeError as error:
        raise UsageError(str(error)) from error


def counted(count: int, one: str, many: str = "") -> str:
    """A number with its noun: "3 groups", "1 group". The plural is `one` + "s" unless `many` is given.

    >>> counted(1, "group"), counted(0, "image stands", "images stand")
    ('1 group', '0 images stand')
    """
    return f"{count} {one if count == 1 else many or f'{one}s'}"


def figures(value: float, digits: int = 3) -> str:
    """A number with so many figures, never with an exponent for a large one.

    >>> figures(0.012345), figures(1234.5), figures(999.7), figures(150, 2)
    ('0.0123', '1234', '1000', '150')
    """
    return f"{value:.{digits}g}" if abs(value) < 10**digits - 0.5 else f"{value:.0f}"


def looks_like(names: Iterable[str], known: Collection[str]) -> dict[str, str]:
    """Unknown names that look like a missing known name, with that name: probable misspellings.

    No more than MOST_COMPARED unknown names are compared, as each takes its time.

    >>> looks_like(["image", "Spilt", "camera"], ["image", "split", "group"])
    {'Spilt': 'split'}
    """
    given = dict.fromkeys(names)
    missing = {name.casefold(): name for name in known if name not in given}
    wanted, found = set(known), {}
    for name in islice((name for name in given if name not in wanted), MOST_COMPARED if missing else 0):
        words = " ".join(name[:LONGEST_COMPARED].split()).casefold()
        close = get_close_matches(words, missing, n=1, cutoff=0.8)
        if close:
            found[name] = missing[close[0]]
    return found


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence with the known names nearest to `name`, or with all known names when they are few.

    >>> nearest("xrey", ["xray", "surface"])
    'Did you mean xray? Known: surface, xray.'
    """
    names = sorted(set(known))
    close = get_close_matches(name, names, n=3, cutoff=0.5) if len(name) <= LONGEST_COMPARED else []
    parts = [f"Did you mean {' or '.join(close)}?"] if close else []
    if 0 < len(names) <= 12:
        parts.append(f"Known: {', '.join(names)}.")
    return " ".join(parts)
