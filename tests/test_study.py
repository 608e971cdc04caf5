"""A study: everything that does not exist is said at once, what is done is skipped, what fails stops nothing else."""

from pathlib import Path

import pytest
from helpers import write_set

from featprobe.errors import DataError
from featprobe.probes.saved import read_rows
from featprobe.stages.study import cells_of, read_study, run_study
from featprobe.stages.workspace import Workspace, make_generated

ROOT = Path(__file__).parents[1]
SMALL = """
data = ["surface"]
backbones = ["tf_efficientnet_lite0-random"]
tasks = ["semseg", "detect"]
heads = ["linear", "ridge"]
regimes = ["frozen", "full"]
seeds = 2
fractions = [0.5, 1.0]
sizes = ["64x64"]
[train.all]
iterations = 3
batch_size = 4
evaluations = 1
"""


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    made = Workspace(tmp_path / "space")
    make_generated("surface", made.data / "surface", images=24, size=(64, 64))
    return made


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "study.toml"
    path.write_text(text)
    return path


def test_the_grid_is_run_once_and_what_is_missing_later(workspace: Workspace, tmp_path: Path) -> None:
    study = read_study(written(tmp_path, SMALL), workspace)
    cells = cells_of(study)
    said: list[str] = []
    plan = run_study(workspace, study, said.append, dry_run=True)
    assert not plan.rows and any(line.startswith("to extract") for line in said)
    assert not workspace.cache_files() and not workspace.probes.exists(), "a plan leaves nothing behind"
    report = run_study(workspace, study)
    assert not report.failed and len(report.rows) == len(cells) == 2 * (2 + 2 + 1) + 2 * (2 + 2)
    rows, _ = read_rows(workspace.probes / "results.jsonl")
    kinds = [(r["task"], r["head"], r["regime"], r["fraction"], r["seed"]) for r in rows]
    assert len(set(kinds)) == len(cells) and ("semseg", "ridge", "full", 1.0, 0) not in kinds
    lines = (workspace.probes / "results.jsonl").read_text().splitlines(keepends=True)
    (workspace.probes / "results.jsonl").write_text("".join(lines[:-2]) + lines[-2][:40])  # as a kill leaves it
    again = run_study(workspace, study)
    assert len(again.rows) == 2 and again.done == len(cells) - 2 and not again.failed
    after = [(r["task"], r["head"], r["regime"], r["fraction"], r["seed"]) for r in
             read_rows(workspace.probes / "results.jsonl")[0]]  # fmt: skip
    assert sorted(after) == sorted(kinds)


def test_all_that_does_not_exist_is_said_at_once_and_nothing_is_run(workspace: Workspace, tmp_path: Path) -> None:
    text = 'data = ["surfase"]\nbackbones = ["embeded"]\ntasks = ["segment"]\nheads = ["liner"]\nregimes = ["ful"]\n'
    text += 'sizes = ["64"]\n[train.linear]\nlearning_rate = 1\n[tuning]\nbackbone = 1\n'
    with pytest.raises(DataError) as error:
        read_study(written(tmp_path, text), workspace)
    for name in ("surfase", "embeded", "segment", "liner", "'ful'", "'64'", "learning_rate", "'backbone'"):
        assert name in str(error.value)
    with pytest.raises(DataError, match=r"no setting 'backbone'(.|\n)*data is missing"):
        read_study(written(tmp_path, 'backbone = ["embedded"]'), workspace)
    assert not workspace.cache_files()


def test_a_task_that_a_set_has_no_labels_for_is_noted(tmp_path: Path) -> None:
    write_set(tmp_path / "masks", 12)
    workspace = Workspace(tmp_path / "space")
    text = SMALL.replace('["surface"]', f'["{tmp_path / "masks"}"]').replace('"frozen", "full"', '"frozen"')
    report = run_study(workspace, read_study(written(tmp_path, text), workspace))
    assert not report.failed and {row["task"] for row in report.rows} == {"semseg"}
    assert any("no labels for detect" in note for note in report.notes)


def test_a_cell_that_fails_does_not_stop_the_others(workspace: Workspace, tmp_path: Path) -> None:
    text = SMALL.replace('tasks = ["semseg", "detect"]', 'tasks = ["semseg"]').replace("[0.5, 1.0]", "[1.0]")
    folder = tmp_path / "empty"
    (folder / "images").mkdir(parents=True)
    study = read_study(written(tmp_path, text.replace('["surface"]', f'["{folder}", "surface"]')), workspace)
    report = run_study(workspace, study)
    assert {cell.data for cell, _ in report.failed} == {str(folder)}
    assert {row["data"] for row in report.rows} == {"surface"} and report.rows


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.toml")), ids=lambda p: p.name)
def test_the_examples_are_studies(path: Path, tmp_path: Path) -> None:
    text = path.read_text()
    for name in ("path/to/severstal", "path/to/gdxray"):
        (tmp_path / name).mkdir(parents=True)
        text = text.replace(name, str(tmp_path / name))
    assert cells_of(read_study(written(tmp_path, text), Workspace(tmp_path)))
