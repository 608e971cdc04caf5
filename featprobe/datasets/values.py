"""Values of label files and tables: read where their meaning is clear, else refused with their place.

Exporters write numbers as texts, and true as 1, "1" or "true". A boolean, `1_000` and an empty text are no numbers, and
"0" is not true.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from reprlib import Repr
from typing import Any, TypeVar

from featprobe.errors import DataError, looks_like

T = TypeVar("T")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
DIGITS = re.compile(r"[+-]?\d{1,4000}", re.ASCII)
ENDLESS = re.compile(r"[+-]?(inf(inity)?|nan)", re.IGNORECASE)
TRUTH = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
NOTHING: tuple[Any, ...] = (None, "", [], {})
SHORT = Repr()
SHORT.maxstring = SHORT.maxother = 200


def shown(value: Any) -> str:
    """A value as text for an error message, shortened; a text is quoted, so that "1" differs from 1.

    It is shortened because a YAML value of a few lines can stand for a text of gigabytes.

    >>> shown("96"), shown(96)
    ("'96'", '96')
    """
    try:
        return SHORT.repr(value)
    except ValueError:  # Python refuses to write a number of thousands of digits
        return "a number of thousands of digits"


def to_number(value: Any, where: object, wanted: str = "a number") -> float:
    """The finite number that a number or a text states. Raises DataError, naming `where`.

    >>> to_number(" 1.5e1 ", "here"), to_number(7, "here")
    (15.0, 7.0)
    """
    plain = value.strip() if isinstance(value, str) else value
    written = isinstance(plain, str) and (NUMBER.fullmatch(plain) or ENDLESS.fullmatch(plain))
    if not written and (isinstance(plain, bool) or not isinstance(plain, int | float)):
        raise DataError(f"{where}: wanted {wanted}, found {shown(value)}.")
    try:
        number = float(plain)
    except OverflowError as error:
        raise DataError(f"{where}: wanted {wanted}, found {shown(value)}.") from error
    if not math.isfinite(number):
        raise DataError(f"{where}: wanted {wanted.replace('number', 'finite number')}, found {shown(value)}.")
    return number


def to_numbers(values: Any, where: object, count: int | None = None) -> list[float]:
    """The finite numbers of a list, which must have `count` where that is given. Raises DataError, naming `where`."""
    wanted = f"{count} numbers" if count else "numbers"
    if not isinstance(values, list | tuple) or (count and len(values) != count):
        raise DataError(f"{where}: wanted {wanted}, found {shown(values)}.")
    return [to_number(value, where, wanted) for value in values]


def to_whole(value: Any, where: object, least: int = 0, wanted: str = "") -> int:
    """The whole number >= `least` that a value states; 96.0 and "96" are 96. Raises DataError, naming `where`."""
    wanted = wanted or f"a whole number from {least} on"
    number = to_number(value, where, wanted)
    digits = isinstance(value, int) or (isinstance(value, str) and DIGITS.fullmatch(value.strip()))
    whole = int(value) if digits else int(number)  # the float of a large number may be another number
    if (not digits and number != whole) or whole < least:
        raise DataError(f"{where}: wanted {wanted}, found {shown(value)}.")
    return whole


def to_truth(value: Any, where: object, default: bool = False) -> bool:
    """True or false, stated by a number or a text; the default for null and an empty text. Raises DataError.

    >>> to_truth("0", "here"), to_truth("True", "here"), to_truth(None, "here")
    (False, True, False)
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return default
    word = str(int(value)) if isinstance(value, int | float) and value in (0, 1) else value
    found = TRUTH.get(word.strip().lower()) if isinstance(word, str) else None
    if found is None:
        raise DataError(f"{where}: wanted 0 or 1, true or false, found {shown(value)}.")
    return found


def to_name(value: Any, where: object) -> str:
    """A name as text: a whole number becomes its digits, null and blanks "". Raises DataError, naming `where`.

    >>> to_name(7.0, "here"), to_name(" 7 ", "here"), to_name(None, "here")
    ('7', '7', '')
    """
    if isinstance(value, str):
        return value.strip()
    return "" if value is None else str(to_whole(value, where, -(1 << 62), "a text or a whole number"))


def stated_side(value: Any, where: object) -> int | None:
    """The side of an image that its labels state, in pixels; None for 0 and null, which mean "unknown"."""
    return None if value in NOTHING else to_whole(value, where) or None


class Faults:
    """The faults of a file as one error. It holds no more of them than it reports: a file may have a million."""

    def __init__(self, most: int = 10) -> None:
        """most: how many are reported."""
        self.most, self.count = most, 0
        self.first: list[DataError] = []
        self.kinds: set[type[DataError]] = set()

    def add(self, fault: DataError) -> None:
        """Add an error."""
        self.count += 1
        self.kinds.add(type(fault))
        if self.count <= self.most:
            self.first.append(fault)

    def say(self, text: Callable[[], str]) -> None:
        """Add a DataError of this text, which is made only where it is reported."""
        self.add(DataError(text() if self.count < self.most else ""))

    def raise_all(self) -> None:
        """Raise all as one, of their class where all have the same; do nothing where there are none."""
        if self.count:
            more = [f"and {self.count - self.most} more"] if self.count > self.most else []
            kind = next(iter(self.kinds)) if len(self.kinds) == 1 else DataError
            raise kind("\n".join([*map(str, self.first), *more])) from self.first[0]


def gathered(makers: Iterable[Callable[[], T]]) -> list[T]:
    """The results of all makers. Raises their DataErrors as one, so that one message shows all faults of a file."""
    made: list[T] = []
    faults = Faults()
    for make in makers:
        try:
            made.append(make())
        except DataError as error:
            faults.add(error)
    faults.raise_all()
    return made


def check_names(entry: Mapping[Any, Any], known: Sequence[str], where: object) -> None:
    """Raise DataError where an entry has an unknown field that looks like a known field that it lacks.

    Other unknown fields are ignored.
    """
    alike = looks_like(map(str, entry), known)
    if alike:
        fields = ", ".join(f"{name!r} (did you mean {field!r}?)" for name, field in alike.items())
        raise DataError(f"{where} has an unknown field that looks like a known one: {fields}. Rename it.")
