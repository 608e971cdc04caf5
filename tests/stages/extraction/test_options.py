"""An option of extraction is said once: the command line, featprobe.toml, recipes and commands know all of them."""

import shlex
from dataclasses import asdict, fields, replace
from typing import Any

import pytest
from helpers import recipe_of

from featprobe.cli.main import extract as extract_command
from featprobe.intensity import Intensity
from featprobe.specs import FeatureRecipe
from featprobe.stages.extraction.command_line import IN_COMMANDS, command_of, command_of_card
from featprobe.stages.extraction.extract_options import OF_ONE_RUN, DataEntry, ExtractOptions, configured
from featprobe.tiling import SETTINGS, Tiling

UNUSUAL: dict[str, Any] = {
    "levels": ("stride8", "stride16"), "size": (64, 96), "format": "coco", "images": "a b/*.png", "masks": "{stem}.png",
    "group_from": "{stem}", "split_file": "/there/split.csv", "fit": "letterbox", "intensity": "window:3:90.5",
    "batch_size": 4, "dtype": "int8", "store": "pooled", "precision": "tf32", "tile": 32, "overlap": 5,
    "empty_tiles": 0.123456789, "views": ("hflip", "crop:2"), "skip_bad": True,
}  # fmt: skip
"""A value of each option that a command says, other than its default."""
NAMES_A_BACKBONE = {"label", "backbone", "weights_sha256", "final_norm", "mean", "std", "interpolation", "sized"}
FOLLOWS = {"frame", "window", "channels", "version", "empty_pixels"}  # from the images and from the other fields
ANY_OTHER: dict[str, Any] = {
    "levels": recipe_of().levels[:1], "size": (16, 16), "fit": "resize", "intensity": "minmax", "dtype": "fp32",
    "precision": "amp", "store": "pooled", "views": ("identity", "vflip"), "tile": 64, "overlap": 3,
    "empty_tiles": 0.25,
}  # fmt: skip
"""Another value of each field of a recipe that an option decides."""
NOT_ASKED_FOR = {"levels", "dtype", "precision"}  # by a study, whose file says nothing of them
CUT = recipe_of(
    intensity="window:3:90.5", window=(3.0, 90.5), precision="tf32", tile=32, overlap=5, empty_tiles=0.5,
    views=("identity", "hflip"), version=2,
)  # fmt: skip


def read(command: str) -> ExtractOptions:
    """The options that featprobe makes of a command."""
    words = shlex.split(command)
    assert words[:2] == ["featprobe", "extract"]
    said = extract_command.make_context("extract", words[2:]).params
    return ExtractOptions.of({name: value for name, value in said.items() if name not in OF_ONE_RUN})


def same(found: ExtractOptions, wanted: ExtractOptions) -> bool:
    return all(getattr(found, name) == getattr(wanted, name) for name in IN_COMMANDS)


def test_every_option_comes_back_from_the_command_that_is_kept() -> None:
    assert set(UNUSUAL) == {option.name for option in fields(ExtractOptions)} - set(OF_ONE_RUN)
    every = ExtractOptions(**UNUSUAL)
    assert not any(getattr(every, name) == getattr(ExtractOptions, name) for name in UNUSUAL)
    for options in (every, ExtractOptions(), *(ExtractOptions(**{name: value}) for name, value in UNUSUAL.items())):
        assert same(read(command_of(("--backbone", "some"), "a set", options)), options)


def test_the_command_line_takes_every_option() -> None:
    names = {parameter.name for parameter in extract_command.params}
    assert {option.name for option in fields(ExtractOptions)} <= names


def test_every_setting_of_a_data_set_in_the_configuration_is_an_option() -> None:
    entry, options = ({known.name for known in fields(kind)} for kind in (DataEntry, ExtractOptions))
    assert entry - options == {"path", "classes", "good", "follow_links", "pixel_size"}
    of_the_cache = {"levels", "batch_size", "dtype", "store", "precision", "skip_bad"}
    assert options - entry == of_the_cache | set(OF_ONE_RUN)


def test_every_setting_of_the_configuration_counts_where_the_caller_says_nothing() -> None:
    table = {name: UNUSUAL[name] for name in {known.name for known in fields(DataEntry)} & set(UNUSUAL)}
    values = {**UNUSUAL, "format": "pairs"}  # which goes with patterns
    found = configured(ExtractOptions(), {**table, "size": "64x96", "format": "pairs", "views": "hflip,crop:2"})
    assert found == ExtractOptions(**{name: values[name] for name in table})


def test_every_field_of_a_recipe_follows_from_an_option_or_from_what_it_is_of() -> None:
    assert {known.name for known in fields(FeatureRecipe)} == {*NAMES_A_BACKBONE, *FOLLOWS, *ANY_OTHER}


@pytest.mark.parametrize("name", ANY_OTHER)
def test_no_field_of_a_recipe_is_forgotten_where_a_cache_is_completed_sought_or_repeated(name: str) -> None:
    """Forgotten, it would make or take a cache of other features."""
    other = replace(CUT, **{name: ANY_OTHER[name]})
    made, others = (ExtractOptions.making(recipe.to_json()) for recipe in (CUT, other))
    assert made != others and made.gives(CUT)
    assert made.gives(other) == (name in NOT_ASKED_FOR)
    commands = [command_of_card(card_of(recipe), "a set", {}) for recipe in (CUT, other)]
    assert [same(read(command), ExtractOptions.making(recipe.to_json())) for command, recipe in
            zip(commands, (CUT, other), strict=True)] == [True, True]  # fmt: skip


def card_of(recipe: FeatureRecipe) -> dict[str, Any]:
    return {"features": recipe.to_json(), "backbone": None, "result": {"regime": "frozen", "device": "cpu"}}


def test_the_command_of_a_card_overrides_the_configuration() -> None:
    whole = recipe_of(views=("identity",))
    for table in ({}, {"tile": 64, "views": "hflip", "fit": "resize", "overlap": 8}):
        asked = configured(read(command_of_card(card_of(whole), "a set", table)), table)
        assert asked.gives(whole) and not asked.gives(CUT)


@pytest.mark.parametrize("name", SETTINGS)
def test_people_are_shown_every_setting_of_tiles(name: str) -> None:
    one, other = Tiling(32, 5, 0.5), replace(Tiling(32, 5, 0.5), **{name: ANY_OTHER[name]})
    assert str(one) != str(other) and one.text != other.text
    assert asdict(one) == {setting: asdict(CUT)[setting] for setting in SETTINGS}


def test_a_policy_in_another_spelling_is_the_same() -> None:
    log = ExtractOptions(intensity="log")
    assert log.gives(recipe_of(intensity=str(Intensity.parse("log")), size=(32, 32), fit="resize"))
