"""What the JSON in a cache file says, as typed values: recipe, data set, provenance."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from featprobe.cache.header import FormatFault, short
from featprobe.errors import FieldError
from featprobe.fields import made
from featprobe.specs import BackboneSpec, DataInfo, FeatureRecipe

T = TypeVar("T")


@dataclass(frozen=True)
class Provenance:
    """What is kept of the making of a file, as far as it is read again."""

    command: str = ""
    read_as: Mapping[str, str] = field(default_factory=dict)
    backbone: BackboneSpec | None = None
    device: str = ""
    tf32: bool = False
    may_hold_tf32: str = ""
    featprobe: str = ""
    created: str = ""


def recipe_of(value: Any) -> FeatureRecipe:
    """The recipe in a header. Raises FormatFault."""
    return _typed(FeatureRecipe, value, "recipe")


def data_of(value: Any) -> DataInfo:
    """What a file says of its data set; fields that are not known are ignored. Raises FormatFault."""
    return _typed(DataInfo, _known(DataInfo, value), "data set")


def provenance_of(value: Any) -> Mapping[str, Any]:
    """What a file says of its making, as it is; fields that are not known are ignored. Raises FormatFault."""
    _typed(Provenance, _known(Provenance, value), "provenance")
    said: Mapping[str, Any] = value
    return said


def check_objects(what: str, value: Any, names: Iterable[str]) -> None:
    """Raise FormatFault where a value is no object that holds objects by these names."""
    wrong = [name for name in names if not (isinstance(value, dict) and isinstance(value.get(name), dict))]
    if wrong:
        raise FormatFault(f"{what} with the objects {', '.join(wrong)}", short(value))


def _typed(kind: type[T], value: Any, what: str) -> T:
    try:
        return made(kind, value, f"The {what}")
    except FieldError as error:
        raise FormatFault(f"the {what} as cache/README.md has it", "; ".join(map(str, error.faults))) from error


def _known(kind: Any, value: Any) -> Any:
    """The fields of an object that are known."""
    names = {own.name for own in fields(kind)}
    return {name: own for name, own in value.items() if name in names} if isinstance(value, dict) else value
