"""Checks of files that users write against typed schemas: the annotations of dataclasses, read by pydantic.

Only this module imports pydantic. Types are exact, as in `fields.misfits`; the limits in `Field` are checked too.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from itertools import count
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic import Field as Field

from featprobe.errors import nearest
from featprobe.io.fields import LARGEST, MISSING_FIELD, NAMES, Fault, Place, unknown, wrong

NOTHING: Any = [[]]
"""A value that fits no field. It replaces values that JSON does not have."""
MOST_VALUES, MOST_ERRORS = 1 << 20, 10_000  # of a file
WANTED: Mapping[str, str] = {
    "string_type": NAMES[str],
    "string_too_short": "a text that is not empty",
    "bool_type": NAMES[bool],
    "float_type": NAMES[float],
    "finite_number": "a finite number",
    "tuple_type": "a list",
    "dict_type": "a table",
    "mapping_type": "a table",
    "dataclass_type": "a table",
    "none_required": "null",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "less_than": "less than {lt:g}",
    "less_than_equal": "{le:g} or less",
    "too_short": "at least {min_length} of them",
    "too_long": "at most {max_length} of them",
    "literal_error": "{expected}",
}
"""The wanted value per kind of pydantic error; whole numbers have several kinds."""


def check(kind: type, data: object, *, closed: bool = True, empty_texts: bool = False) -> list[Fault]:
    """The faults of a TOML or JSON value against a dataclass.

    closed: whether a key without a field is a fault; otherwise it is ignored. empty_texts: whether a text may be empty.
    """
    try:
        text = json.dumps([_plain(data, count())], ensure_ascii=False, default=lambda date: NOTHING)
        _adapter(kind, closed, empty_texts).validate_json(text.encode(errors="replace"))
    except ValidationError as error:
        if error.error_count() > MOST_ERRORS:  # each takes far more memory than its value
            return [Fault((), f"{error.error_count()} values in it are of wrong types, or unknown")]
        return _faults(kind, data, error.errors(include_url=False))
    except OverflowError:
        return [Fault((), f"it holds more than {MOST_VALUES} values")]
    except (ValueError, RecursionError):
        return [Fault((), "it holds lists nested too deeply")]
    return []


def _plain(value: Any, number: Iterator[int]) -> Any:
    """A value where whole numbers that are too large are replaced by a value that fits no field.

    number: counts values. Raises OverflowError for too many.
    """
    if next(number) > MOST_VALUES:
        raise OverflowError
    if isinstance(value, dict):
        return {key: _plain(item, number) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, number) for item in value]
    return NOTHING if isinstance(value, int) and abs(value) > LARGEST else value


@cache
def _adapter(kind: type, closed: bool, empty_texts: bool) -> TypeAdapter[Any]:
    settings = ConfigDict(
        strict=True,
        extra="forbid" if closed else "ignore",
        str_min_length=0 if empty_texts else 1,
        allow_inf_nan=False,
    )
    whole: Any = tuple.__class_getitem__(kind)
    return TypeAdapter(whole, config=settings)  # a tuple passes settings on to its parts, a dataclass does not


def _faults(kind: type, data: object, errors: list[Any]) -> list[Fault]:
    """Faults from pydantic's errors, one per value."""
    found: dict[Place, list[Any]] = {}
    strange: set[Place] = set()  # tables with unknown keys
    for error in errors:
        place = _place(data, error["loc"][1:], error["type"])
        if error["type"] == "unexpected_keyword_argument":
            strange.add(place[:-1])
        value = _at(data, place)
        enough = error.get("ctx", {}).get("min_length", 0)
        if not (error["type"] == "too_short" and isinstance(value, list) and len(value) >= enough):
            found.setdefault(place, []).append(error)  # pydantic does not count wrong entries
    said = {fault.place: fault for table in strange for fault in _unknown(kind, data, table)}
    return [said.get(place) or _fault(data, place, own) for place, own in found.items()]


def _unknown(kind: type, data: object, table: Place) -> list[Fault]:
    """The faults of the unknown keys of the table at a place."""
    held: Any = _at(data, table)
    return unknown(table, held, _known(kind, table))


def _place(data: object, steps: Place, error: str) -> Place:
    """The steps of an error that lead to its value, without steps that name a part of an annotation."""
    value: Any = data
    for i, step in enumerate(steps):
        inside = step in value if isinstance(value, dict) else isinstance(value, list) and isinstance(step, int)
        if not inside:
            return steps[: i + (error == "missing")]
        value = value[step]
    return steps


def _fault(data: object, place: Place, errors: list[Any]) -> Fault:
    if errors[0]["type"] == "missing":
        return Fault(place, MISSING_FIELD)
    value = _at(data, place)
    if not isinstance(value, (str, int, float, list, dict, type(None))):
        return wrong(place, "no date or time", value)
    if isinstance(value, int) and abs(value) > LARGEST:
        return wrong(place, f"a number of at most {LARGEST}", value)
    wanted = " or ".join(dict.fromkeys(_wanted(error) for error in errors))
    names = [
        name for error in errors if error["type"] == "literal_error" for name in re.split(", | or ", _wanted(error))
    ]
    guess = nearest(value, names).partition(" Known:")[0] if isinstance(value, str) and names else ""
    fault = wrong(place, wanted, value)
    return Fault(place, f"{fault.said}. {guess}") if guess.startswith("Did") else fault


def _wanted(error: Any) -> str:
    if error["type"].startswith("int_"):
        return NAMES[int]
    context = {
        name: str(own).replace("'", "") if name == "expected" else own for name, own in error.get("ctx", {}).items()
    }
    return WANTED.get(error["type"], error["msg"]).format(**context)


def _at(data: object, place: Place) -> object:
    """The value at a place; None where there is none."""
    value: Any = data
    for step in place:
        inside = isinstance(value, list) or (isinstance(value, dict) and step in value)
        value = value[step] if inside else None
    return value


def _known(kind: Any, place: Place) -> list[str]:
    """The field names of the dataclass at a place within another one."""
    if get_origin(kind) is Annotated:
        return _known(get_args(kind)[0], place)
    if is_dataclass(kind):
        if not place:
            return [field.name for field in fields(kind)]
        return _known(get_type_hints(kind)[str(place[0])], place[1:])
    inner = [part for part in get_args(kind) if part not in (str, type(None), ...)]
    return _known(inner[0], place if type(None) in get_args(kind) else place[1:]) if inner else []


def json_schema(kind: type) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of files without a fault by `check`, closed and without empty texts."""
    whole = _adapter(kind, True, False).json_schema()
    parts = whole["$defs"]
    own = parts.pop(whole["prefixItems"][0]["$ref"].rpartition("/")[2])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **own, "$defs": parts}
