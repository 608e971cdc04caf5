"""Files that people and colleagues write: a value of any wrong type ends in one message with its path."""

import contextlib
import copy
import json
import re
import shutil
import subprocess
import sys
import tomllib
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers import data_info, no_plots, recipe_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from featprobe.cli.main import cli
from featprobe.errors import DataError, FeatprobeError, FieldError, ProbeError
from featprobe.geometry import IDENTITY
from featprobe.io.fields import path_text
from featprobe.kinds import KINDS, TASKS, TrainRecipe, kinds_of
from featprobe.probes import load_head
from featprobe.probes.saved import read_card, read_rows
from featprobe.report.tables import result_text
from featprobe.result_rows import LadderRow, ResultRow, ladder_faults, result_faults
from featprobe.specs import BackboneSpec, DataInfo, FeatureRecipe, digest
from featprobe.stages.commands import commands_of
from featprobe.stages.comparison.results import load_results
from featprobe.stages.extraction.extract import extract as run_extract
from featprobe.stages.extraction.extract_options import ExtractOptions, configured
from featprobe.stages.predictor import Predictor
from featprobe.stages.study.study import Study, cells_of, read_study
from featprobe.stages.study.study_file import faults_of, schema, template
from featprobe.stages.training.finetune import missing_counterparts
from featprobe.stages.training.probe import probe
from featprobe.stages.training.probe_options import ProbeOptions, Tuning
from featprobe.stages.workspace import Workspace, make_generated

ROOT = Path(__file__).parents[2]
BRIEF = TrainRecipe(iterations=2, batch_size=4, evaluations=1)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from(
        [0, -1, 1, 2, 2.5, 1e300, 10**12, 200_000, 10**400, "", "auto", "none", "own", "x" * 300, "\0", "../x"]
    )
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
    """A table of TOML; null, which it does not have, is a date."""

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
    "data": ["surface"], "backbones": ["test_efficientnet-random"], "tasks": ["semseg", "detect"],
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
        ("[train.all]\nlr = -1.0", "train.all.lr: This can't be trained: lr = -1.0."),
        ('[train.linear]\nloss = "cee"', "train.linear.loss: There is no loss 'cee'."),
        ('[train.linear]\nloss_at = "cells"', 'train.linear.loss_at: wanted level or image, found "cells"'),
        ("[train.lineer]\nlr = 0.1", "train.lineer: unknown. Did you mean linear?"),
        ('heads = ["fcos"]', 'heads[0]: wanted heads of the tasks of this study, of semseg: linear, upsample, ridge'),
        ("lr = [0.1, 0]", "lr[1]: wanted more than 0, found 0"),
        (f"seeds = 1{'0' * 30}", "seeds: wanted a number of at most 9223372036854775807, found 1000000000"),
        (f"[train.all]\nlr = 0x{'f' * 9000}", "train.all.lr: wanted a number of at most 9223372036854775807, found "),
        ("seeds = 0", "seeds: wanted 1 or more, found 0"),
    ("seeds = 1979-05-27", "seeds: wanted no date or time, found \"date 1979-05-27\""),
        ("fractions = []", "fractions: wanted at least 1 of them, found []"),
        ('log = ["tensorbord"]', 'log[0]: wanted tensorboard or wandb, found "tensorbord". Did you mean tensorboard?'),
        ("train = 3", "train: wanted a table, found 3"),
        ("tuning = [1]", "tuning: wanted a table, found [1]"),
        ('[tuning]\naugment = "yes"', 'tuning.augment: wanted true or false, found "yes"'),
        ("[tuning]\nlayer_decay = 2", "tuning.layer_decay: This can't be trained: layer_decay = 2"),
        ('split = "thirds"', "split: 'thirds' is not a split"),
    ],
)  # fmt: skip
def test_a_wrong_value_in_a_study_file_is_named_with_its_path(tmp_path: Path, lines: str, said: str) -> None:
    start = 'data = ["surface"]\nbackbones = ["test_efficientnet-random"]\n'
    assert read(tmp_path, start)
    with pytest.raises(DataError) as caught:
        read(tmp_path, start + lines + "\n")
    found = str(caught.value).splitlines()
    assert len(found) == 3 and found[1].startswith(f"  {said}"), found
    (tmp_path / "study.toml").write_text(start + lines + "\n")
    result = CliRunner().invoke(cli, ["--workspace", str(tmp_path), "study", str(tmp_path / "study.toml")])
    assert result.exit_code == 1 and said in result.output and "Traceback" not in result.output


def test_faults_of_types_and_of_values_come_in_one_message(tmp_path: Path) -> None:
    """Whatever else is wrong in the file, a value is judged if all that it depends on is right."""
    text = """
        data = ["surface", 3, "surfase"]
        backbones = ["embeded", 4]
        sizes = ["64", 64]
        tiles = [0, 32]
        overlap = 40
        views = ["hflipp", false]
        seeds = "three"
        heads = ["fcos", "liner"]
        [train.linear]
        iterations = "many"
        lr = -1.0
        loss = "ce+dise"
        [train.fcos]
        clip = -1
        [tuning]
        bn = "melt"
        ema = 1.5
    """
    with pytest.raises(DataError) as caught:
        read(tmp_path, text)
    found = [line.strip() for line in str(caught.value).splitlines()[1:-1]]
    assert any(
        line.startswith("views[0]: 'hflipp' is not a list of views") and "Did you mean hflip" in line for line in found
    )
    wanted = (
        "data[1]", "data[2]", "backbones[0]", "backbones[1]", "sizes[0]", "sizes[1]", "views[0]", "views[1]", "seeds",
        "heads[0]", "heads[1]", "train.linear.iterations", "train.linear.lr", "train.linear.loss", "train.fcos.clip",
        "tuning.bn", "tuning.ema",
    )  # fmt: skip
    assert sorted(line.partition(": ")[0] for line in found) == sorted(wanted)
    text = 'data = ["surface"]\nbackbones = ["embeded"]\nseeds = 0\ntiles = [32]\noverlap = 40\nviews = ["none"]\n'
    with pytest.raises(DataError, match=r"seeds: wanted 1(.|\n)*backbones\[0\]: (.|\n)*surface: Images can't be cut"):
        read(tmp_path, text)
    text = 'data = ["surfase"]\nbackbones = ["embedded"]\nregimes = ["full"]\n[tuning]\nprecision = "amp"\n'
    with pytest.raises(
        DataError, match=r"data\[0\]: (.|\n)*tuning.precision: --precision amp is for a frozen backbone"
    ):
        read(tmp_path, text)
    for tasks, sure in (('["semseg"]', True), ('["semseg", "segment"]', False), ('"detect"', False)):
        with pytest.raises(DataError) as caught:
            read(tmp_path, f'data = ["surface"]\nbackbones = ["embeded"]\ntasks = {tasks}\nheads = ["fcos"]\n')
        assert ("heads[0]" in str(caught.value)) == sure, "a head is not judged by tasks that are wrong themselves"


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
    (tasks,), (heads,) = (re.findall(rf"^# {key} = .*  # (.*)", text, re.MULTILINE) for key in ("tasks", "heads"))
    assert all(task in tasks and re.search(rf"\b{task}\b[/a-z]* {kinds_of(task)[0]}\b", heads) for task in TASKS)
    study = read(tmp_path, text)
    assert study == Study(("surface",), ("embedded",)) and cells_of(study, Workspace(tmp_path / "space"))
    whole = tomllib.loads(re.sub(r"^# (?=\[|\w+ = )", "", text, flags=re.MULTILINE))
    assert faults_of(Study, whole) == []
    assert list(whole) == [own.name for own in fields(Study) if own.name not in ("train", "tuning")] + [
        "train",
        "tuning",
    ]
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
        usual = plain.recipe(next(known for known in KINDS.values() if known.name == kind))
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
            "split_file": "mine.csv", "classes": ["background", "pore"], "overlap": 4, "empty_tiles": 0.5,
            "views": "hflip",
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


# ---- result rows -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with a dense head and a detection head of a small set."""
    space = Workspace(tmp_path_factory.mktemp("typed") / "space")
    make_generated("surface", space.data / "surface", images=24, size=(64, 64))
    spec = space.backbone("test_efficientnet", random_init=True)
    run_extract(space, spec, "surface", ExtractOptions(size=(64, 64), quiet=True))
    for task in ("semseg", "detect"):
        probe(space, task, options=ProbeOptions(recipe=BRIEF, seeds=1, quiet=True))
    return space


@pytest.fixture
def space(trained: Workspace, tmp_path: Path) -> Workspace:
    """A copy of it that may be spoiled; its caches and sets are links."""
    for path in ("cache", "data"):
        (tmp_path / path).symlink_to(getattr(trained, path))
    shutil.copytree(trained.probes, tmp_path / "probes")
    return Workspace(tmp_path)


def rows_in(space: Workspace) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (space.probes / "results.jsonl").read_text().splitlines()]


def card_in(folder: Path) -> dict[str, Any]:
    card: dict[str, Any] = json.loads((folder / "card.json").read_text())
    return card


def with_card(folder: Path, card: dict[str, Any]) -> None:
    """Write a card whose hash is right, whatever else is wrong in it."""
    card = {name: value for name, value in card.items() if name != "card_sha256"}
    (folder / "card.json").write_text(json.dumps({**card, "card_sha256": digest(card)}))


SOUND: list[dict[str, Any]] = []
"""The rows of the workspace that all tests share."""


@pytest.fixture(autouse=True)
def sound(request: pytest.FixtureRequest) -> None:
    if "space" in request.fixturenames and not SOUND:
        SOUND.extend(rows_in(request.getfixturevalue("trained")))


def used(space: Workspace) -> None:
    """Everything that reads rows and cards, short of training."""
    results, _, _ = load_results(space.probes)
    for result in results:
        row, card = result.row, result.runs[0].card
        commands_of(card, result.seeds, "surface"), result.size, result.variant, result.seconds(), result.validation
        assert all((result.comparable, result.shared_recipe, result.compared_budgets, result.tested_alike))
        result_text([row], 100)
    with contextlib.suppress(FeatprobeError):
        missing_counterparts(space, ProbeOptions(tuning=Tuning(regime="full")))


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("seconds", "train"), "long", 'seconds.train: wanted a number, found "long"'),
        (("images",), [1, 2, 3], "images: wanted a table, found [1, 2, 3]"),
        (("recipe", "iterations"), "100", 'recipe.iterations: wanted a whole number, found "100"'),
        (("recipe", "novel"), 1, "recipe.novel: unknown."),
        (("classes",), "background", 'classes: wanted a list, found "background"'),
        (("test", "iou"), None, "test.iou: wanted a table, found null"),
        (("test", "miou"), {}, "test.miou: wanted a number, found {}"),
        (("val", "miou_foreground"), [0.5], "val.miou_foreground: wanted a number, found [0.5]"),
        (("fraction",), 0, "fraction: wanted 0 < fraction <= 1, found 0"),
        (("fraction",), True, "fraction: wanted a number, found true"),
        (("seed",), 0.0, "seed: wanted a whole number, found 0.0"),
        (("split",), "thirds", "split: 'thirds' is not a split."),
        (("fold",), 3, "fold: wanted 1 to 0 of own, found 3"),
        (
            ("head",),
            "fcos",
            'head: wanted one of linear, upsample, ridge; or one of your own, registered or installed, found "fcos"',
        ),
        (("regime",), "full", "tuning: wanted a table, as the backbone was live, found null"),
        (("chosen_from",), {"lr": [0.1], "weight_decay": []}, "tuning: wanted a table, as the backbone was live"),
        (("budget",), {"needed": "many", "open": 1}, "budget.needed: wanted a whole number"),
        (("levels",), [["stride4"]], 'levels[0]: wanted a text, found ["stride4"]'),
    ],
)
def test_a_row_of_wrong_types_loses_only_itself(
    space: Workspace, place: tuple[str, ...], value: object, said: str
) -> None:
    good, *_ = rows = rows_in(space)
    lines = [json.dumps(row) for row in rows]
    wrong = changed(good, place, value)
    (space.probes / "results.jsonl").write_text(
        "\n".join([*lines, json.dumps(wrong), '{"version": 1, "to', "[" * 200_000])
    )
    found, faults = read_rows(space.probes / "results.jsonl", result_faults)
    assert found == rows and len(faults) == 3
    assert f"line {len(rows) + 1} has wrong fields" in faults[0] and said in faults[0]
    with no_plots():
        compared = CliRunner().invoke(cli, ["--workspace", str(space.root), "compare", "--quiet"])
    assert compared.exit_code == 0 and said in compared.output and "Traceback" not in compared.output
    assert all(f"line {number}" in compared.output for number in range(len(rows) + 1, len(rows) + 4))


def test_a_row_may_hold_what_a_newer_featprobe_writes_and_lack_what_came_later(space: Workspace) -> None:
    later = [own.name for own in fields(ResultRow) if own.default is not MISSING]
    assert {"weights_from", "budget", "subset", "tile", "head_precision"} <= set(later)
    for row in rows_in(space):
        assert result_faults({**row, "novel": {"deep": [1]}}) == []
        assert set(row) <= {own.name for own in fields(ResultRow)}, "a new field of rows is one here too"
        assert result_faults({name: value for name, value in row.items() if name not in later}) == []
        for name in row.keys() - set(later):
            (fault,) = result_faults({own: value for own, value in row.items() if own != name})
            assert (fault.place, fault.said) == ((name,), "it is missing")


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_row_is_used_or_left_aside(space: Workspace, data: st.DataObject) -> None:
    sound = data.draw(st.sampled_from(SOUND))
    row, folder = data.draw(mutated(sound)), space.probes / sound["folder"]
    try:
        (space.probes / "results.jsonl").write_text(json.dumps(row) + "\n")
        with_card(folder, {**card_in(folder), "result": row})
    except ValueError:  # digits that no JSON of Python's has
        return
    with contextlib.suppress(FeatprobeError):
        used(space)


LADDER: dict[str, Any] = {
    "version": 1, "ladder": "a", "comparison": "b", "iterations": 10, "score": 0.5, "seed_scores": [0.5],
    "backbone": "c",
}  # fmt: skip


def test_rungs_of_ladders_are_typed_too() -> None:
    assert ladder_faults(LADDER | {"novel": 1}) == [] and ladder_faults({**LADDER, "score": None}) == []
    assert {own.name for own in fields(LadderRow)} == set(LADDER) - {"version"} | {"verified"}
    for wrong in ({"iterations": "10"}, {"score": "0.5"}, {"seed_scores": 0.5}, {"ladder": None}):
        assert len(ladder_faults(LADDER | wrong)) == 1


# ---- cards and recipes -----------------------------------------------------------------------------------------------

WRONG_IN_CARDS: list[tuple[tuple[str | int, ...], object]] = [
    (("features", "size"), [200_000, 200_000]),
    (("features", "frame"), [200_000, 200_000]),
    (("features", "frame"), "64x64"),
    (("features", "frame"), [64]),
    (("features", "levels", 0, "stride"), -4),
    (("features", "levels", 0, "channels"), 10**12),
    (("features", "levels"), "stride4"),
    (("features", "mean"), [None, 0.5, 0.5]),
    (("features", "std"), [0, 0, 0]),
    (("features", "window"), ["low", "high"]),
    (("features", "intensity"), 3),
    (("features", "interpolation"), "magic"),
    (("features", "dtype"), "fp99"),
    (("features", "fit"), "crop"),
    (("features", "tile"), -8),
    (("features", "sized"), "no"),
    (("fingerprint", "levels", 0, "stride"), 0.5),
    (("fingerprint", "mean"), [9, 9, 9]),
    (("head", "classes"), 7),
    (("head", "width"), 10**9),
    (("head", "task"), ["semseg"]),
    (("data", "bits"), "8"),
    (("data", "category_ids"), "12"),
    (("data", "classes"), ["x"] * 300),
    (("data", "root"), 5),
    (("backbone", "model"), None),
    (("backbone", "seed"), "0"),
    (("backbone", "arguments"), [1]),
    (("result", "instances"), 1),
    (("result", "seconds"), 3),
    (("curve", 0, "scores"), [1]),
    (("versions",), ["1"]),
    (("read_as",), {"format": 1}),
    (("head_sha256",), 1),
    (("features",), None),
    (("data",), []),
]


@pytest.mark.parametrize(("place", "value"), WRONG_IN_CARDS, ids=lambda own: str(own)[:40])
def test_a_card_of_wrong_types_is_refused_before_anything_is_made_of_it(
    space: Workspace, place: tuple[str | int, ...], value: object
) -> None:
    row = rows_in(space)[0]
    folder = space.probes / row["folder"]
    with_card(folder, changed(card_in(folder), place, value))
    tracemalloc.start()
    with pytest.raises(ProbeError) as caught:
        Predictor(folder)
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held < 1 << 24, "bytes"
    first, *lines, last = str(caught.value).splitlines()
    assert first.startswith(str(folder)) and "Train the head again" in last
    assert any(line.startswith(f"  {path_text(place)[:12]}") for line in lines), lines
    (_, unusable, _) = load_results(space.probes)
    assert [item.folder for item in unusable] == [row["folder"]], "and the other results are compared"


def test_a_card_is_refused_on_the_command_line_in_one_message(space: Workspace) -> None:
    folder = space.probes / rows_in(space)[0]["folder"]
    card = changed(card_in(folder), ("features", "size"), [0, "wide"])
    card["data"]["bits"], card["head"]["sides"] = True, [1]
    with_card(folder, card)
    arguments = ["predict", str(folder), str(space.data / "surface" / "images"), "--out", str(space.root / "out")]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 1 and not (space.root / "out").exists() and "Traceback" not in result.output
    for said in (
        'features.size[1]: wanted a whole number, found "wide"',
        "data.bits: wanted a whole number, found true",
        "head.sides: wanted 3 lengths, or none",
    ):
        assert said in result.output, result.output


def test_a_card_may_hold_what_a_newer_featprobe_writes_and_lack_what_came_later(space: Workspace) -> None:
    folder = space.probes / rows_in(space)[0]["folder"]
    card = card_in(folder)
    card["novel"], card["data"]["novel"], card["backbone"]["novel"] = 1, {}, []
    card["data"] = {
        name: value for name, value in card["data"].items() if name not in ("bits", "category_ids", "clipped")
    }
    with_card(folder, {name: value for name, value in card.items() if name not in ("read_as", "files")})
    assert read_card(folder, whole=True)["novel"] == 1 and load_head(folder)[1]["novel"] == 1
    with_card(folder, changed(card, ("features", "novel"), 1))
    with pytest.raises(FieldError, match=r"novel: unknown"):
        Predictor(folder)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_card_is_used_or_refused_in_words(space: Workspace, data: st.DataObject) -> None:
    row = data.draw(st.sampled_from(SOUND))
    folder = space.probes / row["folder"]
    sound = json.loads((folder / "sound.json").read_text()) if (folder / "sound.json").exists() else card_in(folder)
    (folder / "sound.json").write_text(json.dumps(sound))
    card = data.draw(mutated(sound))
    try:
        with_card(folder, card)
    except ValueError:
        return
    with_result = card.get("result") if isinstance(card.get("result"), dict) else row
    (space.probes / "results.jsonl").write_text(json.dumps(with_result) + "\n")
    for use in (
        lambda: used(space),
        lambda: load_head(folder, whole=True),
        lambda: FeatureRecipe.from_json(card["features"]),
    ):
        with contextlib.suppress(FeatprobeError, KeyError if "features" not in card else FeatprobeError):
            use()


RECIPE: dict[str, Any] = json.loads(json.dumps(recipe_of().to_json()))
DATA: dict[str, Any] = json.loads(json.dumps(asdict(data_info())))
SPEC: dict[str, Any] = json.loads(json.dumps(asdict(BackboneSpec("a", "resnet18", arguments=("--backbone", "a")))))


@settings(max_examples=300, deadline=None)
@given(case=st.sampled_from([(FeatureRecipe, RECIPE), (DataInfo, DATA), (BackboneSpec, SPEC)]), data=st.data())
def test_any_record_of_a_cache_is_read_or_refused(case: tuple[Any, dict[str, Any]], data: st.DataObject) -> None:
    kind, sound = case
    assert kind.from_json(sound)
    try:
        found = kind.from_json(data.draw(mutated(sound)))
    except FieldError as error:
        assert error.faults
        return
    assert kind.from_json(json.loads(json.dumps(asdict(found)))) == found
    if kind is FeatureRecipe:
        assert found.row_bytes < 1 << 60 and found.key and found.policy and found.views[0] == IDENTITY


def test_help_and_caches_are_seen_without_pydantic(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom featprobe.cli import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n    print('HEAVY', 'pydantic' in sys.modules)"
    )
    for arguments in (["--help"], ["study", "--help"], ["cache", "ls"], ["data"]):
        result = subprocess.run(
            [sys.executable, "-c", code, "--workspace", str(tmp_path), *arguments] if arguments[0] != "--help"
            else [sys.executable, "-c", code, *arguments],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert result.stdout.rstrip().endswith("HEAVY False"), arguments
