"""Checks of JSON and TOML values against the annotations of dataclasses; each fault names the path to its value.

Only the standard library is used, so that commands on caches start fast. `schemas` checks whole files.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from featprobe.errors import FieldError, looks_like, nearest

T = TypeVar("T")
Place = tuple[str | int, ...]
"""Keys of tables and places in lists that lead to a value, from the outermost."""
MOST_SHOWN = 60  # characters of a value in a message
MOST_NAMED = 24  # known names in a message
MOST_SAID = 100  # faults in a message
MISSING_FIELD = "it is missing"
LARGEST = 2**63 - 1  # of a whole number
NAMES: Mapping[Any, str] = {
    str: "a text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null",
}  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """A wrong value. place: the path to it. said: what is wrong with it.

    >>> print(wrong(("train", "linear", "lr", 1), "a number", "fast"))
    train.linear.lr[1]: wanted a number, found "fast"
    """

    place: Place
    said: str

    def below(self, *outer: str | int) -> "Fault":
        """The same fault, where the value is part of another one at the path `outer`."""
        return Fault((*outer, *self.place), self.said)

    def __str__(self) -> str:
        said = self.said.replace("\n", "\n    ")
        return f"{path_text(self.place)}: {said}" if self.place else said


def path_text(place: Place) -> str:
    """The path to a value as text.

    >>> path_text(("data", "x y", "classes", 0))
    'data."x y".classes[0]'
    """
    text = ""
    for step in place:
        key = step if isinstance(step, str) and re.fullmatch(r"[\w-]+", step) else shown(step)
        text += f"[{step}]" if isinstance(step, int) else f".{key}" if text else key
    return text


def shown(value: object) -> str:
    """A value as JSON, shortened, on one line."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=lambda own: f"{type(own).__name__} {own}")
    except (ValueError, RecursionError):  # a number of thousands of digits, or lists nested too deeply
        text = f"a value that can't be shown ({type(value).__name__})"
    text = text[: MOST_SHOWN + 1]
    text = "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 1]}…"


def wrong(place: Place, wanted: str, found: object) -> Fault:
    """The fault of a value of a wrong type, or out of its limits."""
    return Fault(place, f"wanted {wanted}, found {shown(found)}")


def unknown(table: Place, keys: Iterable[str], known: Sequence[str]) -> list[Fault]:
    """The faults of the unknown keys of a table, each with the known key that looks like it. keys: all that it has."""
    given = list(keys)
    strange = [key for key in given if key not in known]
    close = looks_like(given, known)
    some = f"Known: {', '.join(sorted(known))}." if len(known) <= MOST_NAMED else ""
    faults = []
    for i, key in enumerate(strange):
        guess = f"Did you mean {close[key]}?" if key in close else nearest(key, known) if i < MOST_SAID else ""
        said = guess if "Known:" in guess else f"{guess} {some}".strip()
        faults.append(Fault((*table, key), f"unknown. {said}".strip()))
    return faults


def message(what: str, faults: Sequence[Fault], to_do: str = "") -> str:
    """The text of an error with the faults of one file: the first MOST_SAID, and how many more there are."""
    each = list(dict.fromkeys(faults))
    more = [f"  and {len(each) - MOST_SAID} more"] if len(each) > MOST_SAID else []
    return "\n".join([what, *(f"  {fault}" for fault in each[:MOST_SAID]), *more, *([to_do] if to_do else [])])


def limits(checks: Mapping[str, tuple[bool, str, object]]) -> list[Fault]:
    """The faults of fields out of their limits. checks: field -> (whether it holds, what is wanted, what was found)."""
    return [wrong((name,), wanted, found) for name, (holds, wanted, found) in checks.items() if not holds]


def misfits(value: object, wanted: Any, place: Place = ()) -> list[Fault]:
    """The faults of a value against an annotation.

    Types are exact: true is no number, 2.0 and "2" are no whole numbers; a whole number is also a number. Numbers must
    be finite. A dataclass stands for a table with its fields and no others.

    >>> [str(fault) for fault in misfits([1, 2.5, True], tuple[int, ...])]
    ['[1]: wanted a whole number, found 2.5', '[2]: wanted a whole number, found true']
    """
    if wanted is Any:
        return []
    if isinstance(wanted, type) and is_dataclass(wanted):
        return _misfits_of_table(value, wanted, place)
    origin, parts = get_origin(wanted), get_args(wanted)
    if origin is Literal:
        alike = any(type(value) is type(part) and value == part for part in parts)
        return [] if alike else [wrong(place, _listed(list(map(str, parts))), value)]
    if origin in (Union, UnionType):
        others = [part for part in parts if part is not type(None)]
        if len(others) == 1 and value is not None:
            return misfits(value, others[0], place)
        fits = any(not misfits(value, part) for part in parts)
        return [] if fits else [wrong(place, _listed([NAMES.get(part, "a table or a list") for part in parts]), value)]
    if origin is tuple:
        return _misfits_of_list(value, parts, place)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            return [wrong(place, "a table", value)]
        return [fault for key, item in value.items() for fault in misfits(item, parts[1], (*place, str(key)))]
    alike = type(value) is wanted or (wanted is float and type(value) is int)
    if alike and isinstance(value, (int, float)) and not (-LARGEST <= value <= LARGEST or isinstance(value, float)):
        return [wrong(place, f"a number of at most {LARGEST}", value)]
    if alike and isinstance(value, float) and not math.isfinite(value):
        return [wrong(place, "a finite number", value)]
    return [] if alike else [wrong(place, NAMES[wanted], value)]


def _listed(names: Sequence[str]) -> str:
    """Names joined as `a, b or c`."""
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _misfits_of_table(value: object, wanted: type, place: Place) -> list[Fault]:
    if not isinstance(value, Mapping):
        return [wrong(place, "a table", value)]
    hints = _hints(wanted)
    faults = unknown(place, map(str, value), list(hints))
    needed = [field.name for field in fields(wanted) if field.default is MISSING and field.default_factory is MISSING]
    faults += [Fault((*place, name), MISSING_FIELD) for name in needed if name not in value]
    for name, hint in hints.items():
        faults += misfits(value[name], hint, (*place, name)) if name in value else []
    return faults


def _misfits_of_list(value: object, parts: Sequence[Any], place: Place) -> list[Fault]:
    if not isinstance(value, (list, tuple)):
        return [wrong(place, "a list", value)]
    if parts[-1] is ...:
        return [fault for i, item in enumerate(value) for fault in misfits(item, parts[0], (*place, i))]
    if len(value) != len(parts):
        return [wrong(place, f"a list of {len(parts)}", value)]
    return [fault for i, item in enumerate(value) for fault in misfits(item, parts[i], (*place, i))]


def made(kind: type[T], data: object, called: str) -> T:
    """A dataclass from its JSON table. Raises FieldError, which names every wrong field.

    If the dataclass has a method `faults`, that checks the limits of its values. called: its name in the message.
    """
    faults = misfits(data, kind)
    if not faults:
        value: T = built(kind, data)
        faults = value.faults() if hasattr(value, "faults") else []
    if faults:
        raise FieldError(message(f"{called} has wrong fields.", faults), faults)
    return value


def built(wanted: Any, data: Any) -> Any:
    """A value that fits an annotation, with lists as tuples and tables as dataclasses; unknown keys are omitted."""
    own = [wanted, *(get_args(wanted) if get_origin(wanted) in (Union, UnionType) else ())]
    kind = next((part for part in own if isinstance(part, type) and is_dataclass(part)), None)
    if kind is not None and isinstance(data, Mapping):
        hints = _hints(kind)
        return kind(**{name: built(hints[name], value) for name, value in data.items() if name in hints})
    if isinstance(data, (list, tuple)):
        part = next(iter(get_args(wanted)), None)
        return tuple(built(part if is_dataclass(part) else None, value) for value in data)
    return data


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def plain(value: Any) -> Any:
    """A value as JSON can hold it, which has no nan: a score that does not exist is None."""
    if isinstance(value, Mapping):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
