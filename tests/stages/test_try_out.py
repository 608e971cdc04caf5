"""From a folder to an answer: the plan first, then the page; what is there is not computed again."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import write_set
from hypothesis import given
from hypothesis import strategies as st
from test_cli import call, refusal
from test_first_look import of_boxes, of_labels

from featprobe.cli import start_commands
from featprobe.machine import time_text
from featprobe.stages import try_out as module
from featprobe.stages.try_out import Outline, TryOptions, candidates_of, try_out
from featprobe.stages.workspace import Workspace

Say = Callable[[str], None]
Agree = Callable[[float], bool]
NETWORKS = ("embedded", "embedded-random")
SMALL = ("--size", "64x64", "--quiet", "--no-open", "--device", "cpu")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images with masks."""
    return write_set(tmp_path_factory.mktemp("try") / "parts", 12, (48, 48))


def test_the_command_and_the_function_try_the_same_where_nothing_is_said() -> None:
    said = {param.name: param.default for param in start_commands.try_.params}
    assert (tuple(said["backbone"].split(",")), said["minutes"]) == (TryOptions().backbones, TryOptions().minutes)


def test_it_stops_and_goes_on_with_the_same_plan_to_the_same_page(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*given: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    options = TryOptions(NETWORKS, minutes=1, device="cpu", quiet=True)
    said: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(module, "compare", stopped)
        with pytest.raises(KeyboardInterrupt):
            try_out(Workspace(tmp_path), str(parts), options, said.append)
    assert said[0].startswith("Plan: ") and any("[10/10]" in line for line in said)
    rows = (tmp_path / "probes" / "results.jsonl").read_bytes()
    monkeypatch.setattr(module, "plan", stopped)  # nothing is timed again
    monkeypatch.setattr(module, "run", stopped)  # and nothing trained
    result = call(tmp_path, "try", parts, "--minutes", "1", "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    assert "since a part is there already" in result.stderr
    assert (tmp_path / "probes" / "results.jsonl").read_bytes() == rows and len(rows.splitlines()) == 10
    found = json.loads(result.stdout)
    assert Path(found["page"]).read_text().count("<html") == 1 and "embedded-random" in found["answer"]
    assert (found["plan"]["size"], found["plan"]["split"]) == ([48, 48], "stratified:5")
    assert [command.split()[1] for command in found["commands"]] == ["extract", "extract", "probe", "probe", "compare"]
    assert any("featprobe init" in own["command"] for own in found["next"])


def test_the_command_prints_the_page_the_answer_and_the_commands(tmp_path: Path) -> None:
    of_labels(tmp_path / "parts")
    result = call(tmp_path, "try", tmp_path / "parts", "--backbone", "embedded", *SMALL)
    assert result.exit_code == 0, result.output
    assert "learn      classify, head linear" in result.stdout and "--store pooled" in result.stdout
    page = tmp_path / result.stdout.partition("\npage: ")[2].split("  (")[0]
    assert page.is_file() and "\nanswer: " in result.stdout
    assert "\nThe same by hand:\n  featprobe extract --backbone embedded" in result.stdout


def test_who_says_no_gets_nothing_and_a_long_training_is_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_boxes(tmp_path / "parts")
    options = TryOptions(NETWORKS, size="64x64", device="cpu", quiet=True)
    asked: list[float] = []

    def no(seconds: float) -> bool:
        asked.append(seconds)
        return len(asked) == 2  # yes to the plan of the second try alone

    assert try_out(Workspace(tmp_path), str(tmp_path / "parts"), options, agree=no) is None
    assert not (tmp_path / "cache").exists() and not (tmp_path / "probes").exists()
    monkeypatch.setattr(module.Training, "is_done", lambda self: False)
    said: list[str] = []
    short = TryOptions(NETWORKS, minutes=1e-3, size="64x64", device="cpu", quiet=True)
    assert try_out(Workspace(tmp_path), str(tmp_path / "parts"), short, said.append, agree=no) is None
    assert len(asked) == 3 and asked[2] > 0, "the training is asked about, once its time is known"
    assert any(line.startswith("2 trainings, ") for line in said)
    assert len(list((tmp_path / "cache").glob("*/*.h5"))) == 2, "what was computed is kept"
    assert not (tmp_path / "probes" / "results.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "answer", "screen", "opened"),
    [
        ([], "y\n", {"DISPLAY": ":0"}, True),
        ([], "n\n", {"DISPLAY": ":0"}, False),
        (["--yes"], "", {"DISPLAY": ":0", "SSH_CONNECTION": "here"}, False),
        (["--yes"], "", {"WAYLAND_DISPLAY": "0"}, True),
        (["--yes", "--no-open"], "", {"DISPLAY": ":0"}, False),
        (["--yes"], "", {}, False),
    ],
)
def test_a_terminal_is_asked_and_a_screen_is_shown_the_page(
    parts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    answer: str,
    screen: dict[str, str],
    opened: bool,
) -> None:
    pages: list[str] = []

    def stand_in(workspace: Workspace, name: str, options: TryOptions, say: Say, agree: Agree, check: object) -> object:
        tried = SimpleNamespace(page=tmp_path / "index.html", commands=(), further=(), seconds=60.0, answer="so it is")
        return tried if agree(start_commands.LONG) and agree(start_commands.LONG + 1) else None

    monkeypatch.setattr(module, "try_out", stand_in)
    monkeypatch.setattr(start_commands, "_is_terminal", lambda: True)
    monkeypatch.setattr(start_commands.sys, "platform", "linux")
    monkeypatch.setattr(start_commands.webbrowser, "open", pages.append)
    environment = dict.fromkeys(("DISPLAY", "WAYLAND_DISPLAY", "SSH_CONNECTION")) | screen
    result = call(tmp_path, "try", parts, *words, input=answer, env=environment)
    assert result.exit_code == 0
    assert pages == [(tmp_path / "index.html").as_uri()] * opened
    assert result.stdout.count("Go on?") == bool(answer)
    assert ("so it is" in result.stdout) == (answer != "n\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--backbone", "embeded"], "Did you mean embedded"),
        (["--backbone", ","], "names no backbone"),
        (["--size", "64"], "is not a size"),
        (["--format", "cocoa"], "There is no format"),
        (["--minutes", "0"], "--minutes"),
    ],
)
def test_wrong_values_are_told_at_once(parts: Path, tmp_path: Path, words: list[str], said: str) -> None:
    assert said in refusal(tmp_path, "try", parts, *words, code=2)
    assert list(tmp_path.iterdir()) == []


SIDES = st.integers(1, 4000)


@given(st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=5))
def test_candidates_grow_smaller_from_the_median(sizes: list[tuple[int, int]]) -> None:
    found = candidates_of(sizes)
    areas = [math.prod(size) for size in found]
    assert areas == sorted(areas, reverse=True) and len(set(areas)) == len(areas)
    heights = [height for height, _ in sizes]
    assert min(heights) <= found[0][0] <= max(heights)
    assert all(side % 32 == 0 and side >= 64 for size in found[1:] for side in size)


def test_the_reason_of_a_size_compares_times_with_times() -> None:
    def outline(side: int, seconds: float) -> Outline:
        return Outline("", "semseg", "ridge", "own", "own", (side, side), "resize", "maps", 1, {"a": seconds}, ())

    near, larger = outline(64, 1), outline(160, 40)
    said = module._why_size(near, larger, [(300, 300)], 1e6, TryOptions(minutes=0.5))
    assert f"160x160 would take about {time_text(larger.seconds())}, more than --minutes 0.5 allows" in said
    said = module._why_size(near, larger, [(300, 300)], 100, TryOptions(minutes=0.5))
    assert said.endswith("160x160 would be more than the disk and the memory hold")
