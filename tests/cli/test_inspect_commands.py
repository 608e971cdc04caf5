"""What `featprobe inspect` prints, writes and ends with; neither it nor `compare` loads torch."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from inspected_space import drawn, keep, rows_of, stored_space, with_images

from featprobe.cli.main import cli
from featprobe.metrics.defects.records import GOOD
from featprobe.stages.workspace import Workspace

ARCHIVES = Path(__file__).parents[1] / "archives"
CODE = """
import sys
from click.testing import CliRunner
from featprobe.cli.main import cli
done = CliRunner().invoke(cli, ['inspect', *sys.argv[2:]])
print(done.exit_code, sorted({'torch', 'timm', 'matplotlib'} & set(sys.modules)), done.output)
done = CliRunner().invoke(cli, ['--workspace', sys.argv[1], 'compare'])
print(done.exit_code, sorted({'torch', 'timm'} & set(sys.modules)), done.output)
"""


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return stored_space(tmp_path_factory.mktemp("space"))


def said(space: Workspace, *words: object) -> Result:
    """What the command prints."""
    return CliRunner().invoke(cli, ["--workspace", str(space.root), "inspect", *map(str, words)])


def test_a_head_is_described_in_defects_and_parts(space: Workspace) -> None:
    folder = space.probes / rows_of(space)[0].folder
    text = said(space, folder).output
    (own,) = json.loads(said(space, folder, "--json").output)["inspections"]
    assert f"Found {own['found']} of {own['defects']} defects, {100 * own['recall']:.1f} %" in text
    assert f"False calls: {own['false_calls']} on {own['images']} images" in text
    assert f"{100 * own['false_calls_on_good_parts'] / own['good_parts']:.3g} per 100 good parts" in text
    assert f"Escapes: {own['escaped']} of {own['bad_parts']} bad parts without any call" in text
    assert f"Overkill: {own['stopped']} of {own['good_parts']} good parts stopped" in text
    assert f"Validation had said: {own['validation_found']} of {own['validation_defects']} defects found" in text
    assert "; not kept, as" in text and "center covered" in text and str(folder) in text
    assert len(own["missed"]) == own["defects"] - own["found"]
    assert sum(each["defects"] for each in own["by_size"]) == own["defects"]


def test_all_results_stand_side_by_side(space: Workspace) -> None:
    text = said(space).output
    shown = json.loads(said(space, "--json").output)["inspections"]
    assert len(shown) > 1 and all(f"{own['found']}/{own['defects']}" in text for own in shown)
    assert all(own["folder"] in text for own in shown) and "featprobe inspect HEAD" in text
    assert f"{shown[0]['seed']} of {shown[0]['seeds']}" in text


def test_an_operating_point_is_kept_and_said(tmp_path: Path) -> None:
    space = stored_space(tmp_path)
    head = space.probes / rows_of(space)[0].folder
    first = said(space, head, "--false-calls", "0.2/part", "--min-area", 20, "--out", tmp_path / "tables")
    assert first.exit_code == 0 and "; kept beside the head, for predict and export" in first.output
    assert "calls of 20 pixels or more, chosen on validation for at most 0.2 false calls per part" in first.output
    assert f"table: {tmp_path / 'tables' / 'heads.csv'}" in first.output
    (own,) = json.loads(said(space, head, "--json").output)["inspections"]
    assert f"; {own['false_calls_per_part']:.3g} per part (" in first.output, "the rate that was asked for"
    again = said(space, head).output
    assert again.split("table:")[0].strip() == first.output.split("table:")[0].strip()
    refusal = said(space, head, "--min-area", 7)
    assert refusal.exit_code == 2 and "--min-area 7 with --false-calls" in refusal.output


def test_heads_of_whole_images_speak_of_images(space: Workspace, tmp_path: Path) -> None:
    space = stored_space(tmp_path)
    folder = space.probes / rows_of(space)[0].folder
    keep(folder, drawn(4, "val", pooled=True), drawn(3, "test", pooled=True))
    text = said(space, folder).output
    assert "images with a defect, " in text and "per good image" in text and "A defect counts as found" not in text
    assert "By size" not in text and "Missed" not in text


def test_a_test_split_without_defects_or_without_good_images_says_so(tmp_path: Path) -> None:
    space = stored_space(tmp_path)
    folder = space.probes / rows_of(space)[0].folder
    test = drawn(3, "test", most_defects=0)
    keep(folder, drawn(4, "val"), with_images(test, good=np.full(len(test.images), GOOD, np.uint8)))
    text = said(space, folder).output
    assert "Found 0 of 0 defects." in text and "hold no defect: nothing can be said" in text and "nan" not in text
    assert "Escapes" not in text and "Overkill" in text


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("--unit", "mm"), 1, "sizes in mm need the size of a pixel"),
        (("--found", "iou:0.5"), 1, "another rule of what is found"),
        (("--false-calls", "0.001"), 1, "wanted  1000 or more"),
        (("--data", "parts"), 2, "Omit them, or omit HEAD"),
    ],
)
def test_refusals_are_one_paragraph_and_keep_nothing(
    space: Workspace, words: tuple[str, ...], code: int, told: str
) -> None:
    done = said(space, space.probes / rows_of(space)[0].folder, *words)
    assert done.exit_code == code and told in done.output and "Traceback" not in done.output
    assert not list(space.probes.rglob("operating.json"))


def test_no_torch_is_loaded(space: Workspace, tmp_path: Path) -> None:
    archive = shutil.copytree(ARCHIVES / "images-8775eda", tmp_path / "old")
    folder = space.probes / rows_of(space)[0].folder
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(archive), str(folder), "--json"],
        capture_output=True, text=True, timeout=60, check=True,
        env={**os.environ, "FEATPROBE_WORKSPACE": str(space.root)},
    )  # fmt: skip
    assert done.stdout.startswith("0 [] {"), done.stdout[:300]
    compared = done.stdout[done.stdout.rindex("\n0 [] ") :]
    assert "report: " in compared, done.stdout[-1000:]
