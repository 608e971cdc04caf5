"""Files that people and colleagues write: a value of any wrong type ends in one message with its path."""

import copy
import json
import re
import shutil
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers import data_info, recipe_of, write_set
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from featprobe.cli.main import cli
from featprobe.errors import DataError, FeatprobeError, FieldError, ProbeError
from featprobe.geometry import IDENTITY
from featprobe.probes import TrainRecipe, append_row, load_head
from featprobe.probes.rows import LadderRow, ResultRow, ladder_faults, result_faults
from featprobe.probes.saved import read_card, read_rows
from featprobe.report.tables import result_text
from featprobe.specs import BackboneSpec, DataInfo, FeatureRecipe, digest
from featprobe.stages.commands import commands_of
from featprobe.stages.finetune import missing_counterparts
from featprobe.stages.options import ExtractOptions, configured
from featprobe.stages.probe import probe
from featprobe.stages.probe_options import ProbeOptions, Tuning
from featprobe.stages.results import load_results
from featprobe.stages.study import Study, cells_of, read_study
from featprobe.stages.study_file import faults_of, schema, template
from featprobe.stages.workspace import Workspace

ROOT = Path(__file__).parents[1]
BRIEF = TrainRecipe(iterations=2, batch_size=4, evaluations=1)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([0, -1, 1, 2, 2.5, 1e300, 10**12, 200_000, 10**400, "", "auto", "none", "own", "x" * 300, "\0", "../x"])
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every value within a value."""
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, own in steps:
        yield (*at, step)
        yield from places(own, (*at, step))


def changed(value: Any, place: Sequence[Any], new: Any) -> Any:
    """A copy with another value at a place."""
    made = copy.deepcopy(value)
    inner = made
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = new
    return made


def mutated(value: Any) -> st.SearchStrategy[Any]:
    """The value with one of its parts, or a key that is new, as any other value."""
    known = [*places(value), ("novel",)]
    return st.builds(lambda place, new: changed(value, place, new), st.sampled_from(known), VALUES)


def toml(value: Any) -> str:
    """A table of TOML, on lines of its own where it is the outermost; what TOML has no word for as another wrong type."""

    def inline(own: Any) -> str:
        if isinstance(own, dict):
            return "{" + ", ".join(f"{key_of(k)} = {inline(v)}" for k, v in own.items()) + "}"
        if isinstance(own, list):
            return "[" + ", ".join(map(inline, own)) + "]"
        if isinstance(own, str):
            return json.dumps(own, ensure_ascii=True) if own.isascii() and own.isprintable() else "'?'"
        return "1979-05-27" if own is None else json.dumps(own)

    def key_of(key: str) -> str:
        return json.dumps(key) if key.isascii() and key.isprintable() else "odd"

    return "\n".join(f"{key_of(key)} = {inline(own)}" for key, own in value.items()) + "\n"


# ---- study files -----------------------------------------------------------------------------------------------------

STUDY: dict[str, Any] = {
    "data": ["surface"], "backbones": ["tf_efficientnet_lite0-random"], "tasks": ["semseg", "detect"],
    "heads": ["linear", "fcos"], "regimes": ["frozen", "full"], "seeds": 2, "fractions": [0.5, 1.0],
    "sizes": ["64x64"], "tiles": [0, 32], "overlap": 4, "empty_tiles": 0.5, "views": ["none"], "split": "own",
    "lr": [0.001], "weight_decay": [0.001], "show": 2, "log": [],
    "train": {"all": {"iterations": 3, "batch_size": 4}, "linear": {"lr": 0.01, "loss": "ce", "clip": 1}},
    "tuning": {"augment": True, "backbone_lr": 0.2, "bn": "train"},
}  # fmt: skip


def read(folder: Path, text: str) -> Study:
    path = folder / "study.toml"
    path.write_text(text)
    return read_study(path, Workspace(folder / "space"))


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("[train.linear]\nlr = [0.1]", "train.linear.lr: wanted a number, found [0.1]"),
        ('[train.linear]\niterations = "100"', 'train.linear.iterations: wanted a whole number or auto, found "100"'),
        ("[train.linear]\nloss = 3", "train.linear.loss: wanted a text, found 3"),
        ("[train.all]\nbatch_size = 2.5", "train.all.batch_size: wanted a whole number, found 2.5"),
        ("[train.all]\nbatch_size = true", "train.all.batch_size: wanted a whole number, found true"),
        ("[train.all]\nlr = nan", "train.all.lr: wanted a finite number, found NaN"),
        ("[train.all]\nlr = -1.0", "train.all: This can't be trained: lr = -1.0."),
        ('[train.linear]\nloss = "cee"', "train.linear: "),
        ('[train.linear]\nloss_at = "cells"', 'train.linear.loss_at: wanted level or image, found "cells"'),
        ("[train.lineer]\nlr = 0.1", "train.lineer: unknown. Did you mean linear?"),
        ('heads = ["fcos"]', 'heads[0]: wanted heads of the tasks of this study, of semseg: linear, upsample, ridge, found "fcos"'),
        ("lr = [0.1, 0]", "lr[1]: wanted more than 0, found 0"),
        ("seeds = 0", "seeds: wanted 1 or more, found 0"),
    ("seeds = 1979-05-27", "seeds: wanted no date or time, found \"date 1979-05-27\""),
        ("fractions = []", "fractions: wanted at least 1 of them, found []"),
        ('log = ["tensorbord"]', 'log[0]: wanted tensorboard or wandb, found "tensorbord". Did you mean tensorboard?'),
        ("train = 3", "train: wanted a table, found 3"),
        ("tuning = [1]", "tuning: wanted a table, found [1]"),
        ('[tuning]\naugment = "yes"', 'tuning.augment: wanted true or false, found "yes"'),
        ("[tuning]\nlayer_decay = 2", "tuning: This can't be trained: layer_decay = 2"),
        ('split = "thirds"', "split: 'thirds' is not a split"),
    ],
)  # fmt: skip
def test_a_wrong_value_in_a_study_file_is_named_with_its_path(tmp_path: Path, lines: str, said: str) -> None:
    start = 'data = ["surface"]\nbackbones = ["tf_efficientnet_lite0-random"]\n'
    assert read(tmp_path, start)
    with pytest.raises(DataError) as caught:
        read(tmp_path, start + lines + "\n")
    found = str(caught.value).splitlines()
    assert len(found) == 3 and found[1].startswith(f"  {said}"), found
    (tmp_path / "study.toml").write_text(start + lines + "\n")
    result = CliRunner().invoke(cli, ["--workspace", str(tmp_path), "study", str(tmp_path / "study.toml")])
    assert result.exit_code == 1 and said in result.output and "Traceback" not in result.output


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=mutated(STUDY))
def test_any_study_file_is_read_or_refused_in_words(tmp_path: Path, values: dict[str, Any]) -> None:
    try:
        study = read(tmp_path, toml(values))
    except FeatprobeError as error:
        assert str(error).isprintable() or "\n" in str(error)
        return
    assert isinstance(study.seeds, int) and all(isinstance(name, str) for name in study.data)


def test_the_template_runs_as_it_is_and_knows_every_key(tmp_path: Path) -> None:
    text = CliRunner().invoke(cli, ["study", "--template"]).output
    assert text == template(Study) and max(map(len, text.splitlines())) <= 120
    study = read(tmp_path, text)
    assert study == Study(("surface",), ("embedded",)) and cells_of(study, Workspace(tmp_path / "space"))
    whole = tomllib.loads(re.sub(r"^# (?=\[|\w+ = )", "", text, flags=re.MULTILINE))
    assert faults_of(Study, whole) == []
    assert list(whole) == [own.name for own in fields(Study) if own.name not in ("train", "tuning")] + ["train", "tuning"]
    assert list(whole["train"]["linear"]) == [own.name for own in fields(TrainRecipe)]
    assert list(whole["tuning"]) == [own.name for own in fields(Tuning)]
    for line in text.splitlines():
        assert not re.match(r"(# )?\w+ = ", line) or "  # " in line or "[train." in text[: text.index(line)]


def test_what_the_template_calls_a_default_is_one(tmp_path: Path) -> None:
    """A study that says all of them trains what one that says none does."""
    text = template(Study)
    examples = ("heads", "sizes", "tiles", "overlap", "empty_tiles", "views", "lr", "weight_decay", "log", "precision",
                "init_head", "workers")  # fmt: skip
    head, tuning = text.split("# [train.linear]")[0], text.split("# [tuning]")[1]
    kept = [
        line.removeprefix("# ")
        for line in [*head.splitlines(), "# [tuning]", *tuning.splitlines()]
        if re.match(r"(# )?(\[|\w+ = )", line) and re.sub(r"^# | = .*", "", line) not in examples
    ]
    kept = [line for line in kept if "[train]" not in line or " = " in line]
    assert sum(" = " in line for line in kept) >= 17
    said, plain = read(tmp_path, "\n".join(kept)), Study(("surface",), ("embedded",))
    assert said.options("semseg", "linear", "full") == plain.options("semseg", "linear", "full")
    assert {name: getattr(said, name) for name in said.__dataclass_fields__ if name != "tuning"} == {
        name: getattr(plain, name) for name in plain.__dataclass_fields__ if name != "tuning"
    }
    for kind, own in tomllib.loads(re.sub(r"^# (?=\[|\w+ = )", "", text, flags=re.MULTILINE))["train"].items():
        usual = plain.recipe(kind)
        assert {name: getattr(usual, name) for name in own} == own


def test_the_schema_is_one_and_takes_what_is_taken(tmp_path: Path) -> None:
    found = json.loads(CliRunner().invoke(cli, ["study", "--schema"]).output)
    assert found == json.loads(json.dumps(schema(Study))) and found["$schema"].endswith("/draft/2020-12/schema")
    Draft202012Validator.check_schema(found)
    validator = Draft202012Validator(found)
    for path in [*(ROOT / "examples").glob("*.toml")]:
        validator.validate(tomllib.loads(path.read_text()))
    validator.validate(STUDY)
    wrong = [{"seeds": 2.5}, {"seeds": 0}, {"heads": ["lineer"]}, {"novel": 1}, {"train": {"linear": {"lr": [1]}}}]
    assert all(not validator.is_valid(STUDY | other) for other in wrong)


@settings(max_examples=200, deadline=None)
@given(values=mutated(STUDY))
def test_the_schema_refuses_nothing_that_the_reader_takes(values: dict[str, Any]) -> None:
    if not faults_of(Study, values):
        Draft202012Validator(schema(Study)).validate(values)


# ---- featprobe.toml --------------------------------------------------------------------------------------------------

CONFIG: dict[str, Any] = {
    "data": {
        "scans": {
            "path": "set", "size": "64x64", "intensity": "none", "format": "masks", "group_from": "(a)", "tile": 32,
            "split_file": "mine.csv", "classes": ["background", "pore"], "overlap": 4, "empty_tiles": 0.5, "views": "hflip",
        },
        "plain": {"path": "set", "images": "a/*.jpg", "masks": "b/{stem}.png", "fit": "resize"},
    },
    "backbones": {"ours": {"model": "resnet18", "weights": "a.pth", "random_init": False, "final_norm": True}},
}  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=mutated(CONFIG))
def test_any_configuration_is_read_or_refused_in_words(tmp_path: Path, values: dict[str, Any]) -> None:
    (tmp_path / "featprobe.toml").write_text(toml(values))
    try:
        space = Workspace(tmp_path)
        for name in space.config.get("data", {}):
            configured(ExtractOptions(quiet=True), space.data_options(name)).check()
        space.backbone_names()
        for name in space.config.get("backbones", {}):
            space.backbone(name)
    except FeatprobeError:
        return


def test_all_faults_of_a_configuration_stand_in_one_message(tmp_path: Path) -> None:
    values = changed(CONFIG, ("data", "scans", "classes"), ["background", 3, ""])
    values["backbones"]["ours"]["random_init"] = "no"
    values["data"]["plain"]["fit"] = "letterbx"
    (tmp_path / "featprobe.toml").write_text(toml(values))
    with pytest.raises(FeatprobeError) as caught:
        Workspace(tmp_path)
    for said in (
        "data.scans.classes[1]: wanted a text, found 3",
        'data.scans.classes[2]: wanted a text that is not empty, found ""',
        'data.plain.fit: wanted resize or letterbox, found "letterbx". Did you mean letterbox?',
        'backbones.ours.random_init: wanted true or false, found "no"',
    ):
        assert said in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'featprobe.toml'} can't be used.")
