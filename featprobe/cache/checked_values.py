"""The JSON in a cache file as typed values: recipe, data set, provenance."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from featprobe.cache.header import FormatFault, short
from featprobe.errors import FieldError
from featprobe.io.fields import made
from featprobe.specs import BackboneSpec, DataInfo, FeatureRecipe

T = TypeVar("T")


@dataclass(frozen=True)
class Provenance:
    """How a file was made: the fields of its provenance that featprobe reads again."""

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
    """The data set that a file names; unknown fields are ignored. Raises FormatFault."""
    return _typed(DataInfo, _known(DataInfo, value), "data set")


def provenance_of(value: Any) -> Mapping[str, Any]:
    """The provenance in a file, unchanged; unknown fields are ignored. Raises FormatFault."""
    _typed(Provenance, _known(Provenance, value), "provenance")
    said: Mapping[str, Any] = value
    return said


def check_objects(what: str, value: Any, names: Iterable[str]) -> None:
    """Raise FormatFault unless the value is a JSON object that holds a JSON object under each of these names."""
    wrong = [name for name in names if not (isinstance(value, dict) and isinstance(value.get(name), dict))]
    if wrong:
        raise FormatFault(f"{what} with the objects {', '.join(wrong)}", short(value))


def _typed(kind: type[T], value: Any, what: str) -> T:
    try:
        return made(kind, value, f"The {what}")
    except FieldError as error:
        raise FormatFault(f"the {what} as cache/README.md has it", "; ".join(map(str, error.faults))) from error


def _known(kind: Any, value: Any) -> Any:
    """The known fields of a JSON object."""
    names = {known.name for known in fields(kind)}
    return {name: item for name, item in value.items() if name in names} if isinstance(value, dict) else value
