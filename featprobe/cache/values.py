"""What the JSON in a cache file says, checked value by value: recipe, data set, provenance."""

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, get_args

from featprobe.cache.header import FormatFault, short
from featprobe.errors import DataError
from featprobe.geometry import IDENTITY, Fit
from featprobe.specs import (
    BYTES_PER_VALUE,
    CACHE_VERSION,
    BackboneSpec,
    CachePrecision,
    DataInfo,
    FeatureRecipe,
    Intensity,
    parse_views,
)

Rule = tuple[str, Callable[[Any], bool]]  # what is wanted, in words, and whether a value is that
MOST_SIDE = 1 << 24  # pixels
MOST_FRAME = 1 << 28  # pixels
MOST_CLASSES = 255  # the index 255 is what is ignored


def check_fields(what: str, value: Any, required: Mapping[str, Rule], optional: Mapping[str, Rule]) -> Any:
    """The value, an object with these fields; raises FormatFault with all that is wrong."""
    if not isinstance(value, dict):
        raise FormatFault(f"{what}: an object", short(value))
    rules = {**required, **optional}
    wrong = [n for n in rules if (n in value and not rules[n][1](value[n])) or (n in required and n not in value)]
    if wrong:
        wanted = ", ".join(f"{name}: {rules[name][0]}" for name in wrong)
        found = ", ".join(f"{name}: {short(value[name]) if name in value else 'nothing'}" for name in wrong)
        raise FormatFault(f"{what} with {wanted}", found)
    return value


def is_whole(value: Any, least: int = 0, most: int = (1 << 63) - 1) -> bool:
    """Whether a value is a whole number in these limits, and not true or false."""
    return type(value) is int and least <= value <= most


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _list_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _or_none(rule: Rule) -> Rule:
    return f"{rule[0]} or null", lambda value: value is None or rule[1](value)


TEXT: Rule = ("text", _is_text)
TEXTS: Rule = ("texts", _list_of(_is_text))
OBJECT: Rule = ("an object", lambda value: isinstance(value, dict))
FLAG: Rule = ("true or false", lambda value: isinstance(value, bool))
COUNT: Rule = ("a whole number from 0 on", is_whole)
NUMBER: Rule = ("a number", _is_number)
NUMBERS: Rule = ("numbers", _list_of(_is_number))
WINDOW: Rule = ("two numbers", lambda value: NUMBERS[1](value) and len(value) == 2)
SIZE: Rule = (
    "[height, width] in pixels",
    lambda value: isinstance(value, list) and len(value) == 2 and all(is_whole(side, 1, MOST_SIDE) for side in value),
)

RECIPE: Mapping[str, Rule] = {
    "label": TEXT,
    "backbone": TEXT,
    "weights_sha256": TEXT,
    "levels": ("levels", lambda value: isinstance(value, list) and 0 < len(value) and all(map(_is_level, value))),
    "final_norm": FLAG,
    "size": SIZE,
    "frame": (SIZE[0], lambda value: SIZE[1](value) and value[0] * value[1] <= MOST_FRAME),
    "fit": (" or ".join(get_args(Fit)), lambda value: value in get_args(Fit)),
    "intensity": TEXT,
    "window": _or_none(WINDOW),
    "mean": NUMBERS,
    "std": NUMBERS,
    "interpolation": TEXT,
    "dtype": (" or ".join(BYTES_PER_VALUE), lambda value: _is_text(value) and value in BYTES_PER_VALUE),
}
RECIPE_TOO: Mapping[str, Rule] = {
    "precision": (" or ".join(get_args(CachePrecision)), lambda value: value in get_args(CachePrecision)),
    "channels": TEXT,
    "views": (f"{IDENTITY}, then views", lambda value: TEXTS[1](value) and value[:1] == [IDENTITY]),
    "version": (f"1 to {CACHE_VERSION}", lambda value: is_whole(value, 1, CACHE_VERSION)),
    "tile": _or_none(("pixels", lambda value: is_whole(value, 1, MOST_SIDE))),
    "overlap": COUNT,
    "empty_tiles": ("a share", lambda value: _is_number(value) and 0 <= value <= 1),
    "empty_pixels": TEXT,
    "sized": FLAG,
}
LEVEL: Mapping[str, Rule] = {
    "name": ("a name", lambda value: _is_text(value) and 0 < len(value) <= 255 and "/" not in value),
    "channels": ("a whole number from 1 on", lambda value: is_whole(value, 1)),
    "stride": ("a whole number from 1 on", lambda value: is_whole(value, 1, MOST_SIDE)),
}
DATA: Mapping[str, Rule] = {
    "name": TEXT,
    "root": TEXT,
    "classes": (f"1 to {MOST_CLASSES} texts", lambda value: TEXTS[1](value) and 1 <= len(value) <= MOST_CLASSES),
    "tasks": TEXTS,
    "fingerprint": TEXT,
}
DATA_TOO: Mapping[str, Rule] = {
    "clipped": _or_none(NUMBER),
    "notes": TEXTS,
    "category_ids": ("whole numbers", _list_of(lambda value: type(value) is int)),
    "bits": _or_none(COUNT),
}
PROVENANCE: Mapping[str, Rule] = {
    "command": TEXT,
    "read_as": ("texts by name", lambda value: isinstance(value, dict) and all(map(_is_text, value.values()))),
    "backbone": ("what names a backbone", lambda value: isinstance(value, dict) and _is_spec(value)),
    "device": TEXT,
    "tf32": FLAG,
    "may_hold_tf32": TEXT,
    "featprobe": TEXT,
    "created": TEXT,
}
SPEC: Mapping[str, Rule] = {
    "label": TEXT,
    "model": TEXT,
    "source": TEXT,
    "weights": _or_none(TEXT),
    "seed": COUNT,
    "final_norm": _or_none(FLAG),
    "arguments": TEXTS,
}


def recipe_of(value: Any) -> FeatureRecipe:
    """The recipe in a header. Raises FormatFault."""
    check_fields("the recipe", value, RECIPE, RECIPE_TOO)
    unknown = value.keys() - {field.name for field in fields(FeatureRecipe)}
    if unknown:
        raise FormatFault("a recipe of known fields", short(sorted(unknown)))
    recipe = FeatureRecipe.from_json({"views": [IDENTITY], **value})
    names = [level.name for level in recipe.levels]
    if len(set(names)) < len(names):
        raise FormatFault("levels of different names", short(names))
    for level in recipe.levels:
        if recipe.frame[0] % level.stride or recipe.frame[1] % level.stride:
            raise FormatFault(f"a frame that is a multiple of {level.name}'s stride", f"{recipe.frame}, {level.stride}")
    try:
        Intensity.parse(recipe.intensity)
        if recipe.views[1:]:
            parse_views(",".join(recipe.views[1:]))
    except DataError as error:
        raise FormatFault("an intensity and views of the recipe that are known", short(str(error))) from error
    return recipe


def data_of(value: Any) -> DataInfo:
    """What a file says of its data set; fields that are not known are ignored. Raises FormatFault."""
    check_fields("data", value, DATA, DATA_TOO)
    known = {field.name for field in fields(DataInfo)}
    said: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items() if k in known}
    return DataInfo(**said)


def provenance_of(value: Any) -> Mapping[str, Any]:
    """What a file says of its making. Raises FormatFault."""
    said: Mapping[str, Any] = check_fields("provenance", value, {}, PROVENANCE)
    return said


def _is_level(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == LEVEL.keys() and all(LEVEL[n][1](value[n]) for n in LEVEL)


def _is_spec(value: dict[str, Any]) -> bool:
    known = {field.name for field in fields(BackboneSpec)}
    named = {"label", "model"} <= value.keys() <= known
    return named and all(SPEC[name][1](own) for name, own in value.items())
