"""A study: everything that does not exist is said at once, what is done is skipped, what fails stops nothing else."""

import fcntl
import json
import random
import re
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from _commands import CONTEXT
from click.testing import CliRunner
from helpers import find_file, write_set
from tqdm import tqdm

from featprobe.cache import WHOLE, Cache, read_contents
from featprobe.cli.main import cli
from featprobe.errors import DataError
from featprobe.probes import append_row
from featprobe.probes.saved import read_rows
from featprobe.report.tables import result_table
from featprobe.result_rows import ResultRow
from featprobe.stages.comparison.compare import compare
from featprobe.stages.study.grid import run_grid
from featprobe.stages.study.run_study import run_study
from featprobe.stages.study.study import Study, cells_of, left_out, read_study
from featprobe.stages.training import fit
from featprobe.stages.workspace import Workspace, make_generated

ROOT = Path(__file__).parents[3]
SMALL = """
data = ["surface"]
backbones = ["test_efficientnet-random"]
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


@pytest.mark.slow
def test_the_grid_is_run_once_and_what_is_missing_later(workspace: Workspace, tmp_path: Path) -> None:
    study = read_study(written(tmp_path, SMALL), workspace)
    cells = cells_of(study, workspace)
    said: list[str] = []
    plan = run_grid(workspace, study, said.append, dry_run=True)
    assert not plan.rows and any(line.startswith("to extract") for line in said)
    assert not workspace.cache_files() and not workspace.probes.exists(), "a plan leaves nothing behind"
    report = run_grid(workspace, study)
    assert not report.failed and len(report.rows) == len(cells) == 4 * 4 + (2 + 1)
    rows, _ = read_rows(workspace.probes / "results.jsonl")
    kinds = [(r["task"], r["head"], r["regime"], r["fraction"], r["seed"]) for r in rows]
    assert len(set(kinds)) == len(cells) and ("semseg", "ridge", "full", 1.0, 0) not in kinds
    lines = (workspace.probes / "results.jsonl").read_text().splitlines(keepends=True)
    (workspace.probes / "results.jsonl").write_text("".join(lines[:-2]) + lines[-2][:40])  # as a kill leaves it
    done = workspace.probes / next(row["folder"] for row in rows if row["regime"] == "full")
    (done / "checkpoint0.pt").write_bytes(b"of a training that was killed right after its end")
    again = run_grid(workspace, study)
    assert not list(workspace.probes.rglob("checkpoint*"))
    assert len(again.rows) == 2 and again.done == len(cells) - 2 and not again.failed
    after = [(r["task"], r["head"], r["regime"], r["fraction"], r["seed"]) for r in
             read_rows(workspace.probes / "results.jsonl")[0]]  # fmt: skip
    assert sorted(after) == sorted(kinds)
    assert sorted(again.folders) == sorted(row["folder"] for row in rows)
    part = run_grid(workspace, replace(study, tasks=("semseg",), heads=("ridge",), regimes=("frozen",)))
    assert part.done == len(part.cells) and not part.rows
    told = compare(workspace, tmp_path / "page", quiet=True, folders=part.folders)
    assert {line["head"] for item in told.sets for line in item.lines} == {"ridge"}, "a study answers of its own cells"


def test_all_that_does_not_exist_is_said_at_once_and_nothing_is_run(workspace: Workspace, tmp_path: Path) -> None:
    text = 'data = ["surfase"]\nbackbones = ["embeded"]\ntasks = ["segment"]\nheads = ["liner"]\nregimes = ["ful"]\n'
    text += (
        'sizes = ["64"]\nfractions = [2]\nsplits = ["own"]\n[train.linear]\nlearning_rate = 1\n[tuning]\nbackbone = 1\n'
    )
    with pytest.raises(DataError) as error:
        read_study(written(tmp_path, text), workspace)
    for said in (
        "data[0]: There is no data set 'surfase'. Did you mean surface?", "backbones[0]: ", "embeded",
        'tasks[0]: wanted semseg, detect, instseg, classify or anomaly, found "segment"',
        'found "liner". Did you mean linear?', 'regimes[0]: wanted frozen, frozen-online or full, found "ful"',
        "sizes[0]: '64' is not a size", "fractions[0]: wanted 1 or less, found 2",
        "splits: unknown. Did you mean split?",
        "train.linear.learning_rate: unknown.", "tuning.backbone: unknown.", "featprobe study --template",
    ):  # fmt: skip
        assert said in str(error.value)
    text = 'data = ["surface"]\nbackbones = ["embedded"]\niterations = 3\nbn = "train"\nclip = 1\n'
    text += '[train.linear]\nseeds = 2\nema = 0.5\n[tuning]\ndata = ["surface"]\n'
    with pytest.raises(DataError) as error:
        read_study(written(tmp_path, text), workspace)
    for said in (
        "train.linear.seeds: it is a key of the study itself", "tuning.data: it is a key of the study itself",
        "iterations: it belongs below [train.all]", "bn: it belongs below [tuning]",
        "linear.ema: it belongs below [tuning]",
        "clip: it belongs below [train.all] or [tuning]",
    ):  # fmt: skip
        assert said in str(error.value)
    with pytest.raises(DataError, match=r"can't be read as a study: (.|\n)*wanted  a TOML file"):
        read_study(written(tmp_path, "data: [surface]"), workspace)
    with pytest.raises(DataError, match=r"data: it is missing(.|\n)*backbone: unknown. Did you mean backbones?"):
        read_study(written(tmp_path, 'backbone = ["embedded"]'), workspace)
    assert not workspace.cache_files()


def test_a_task_that_a_set_has_no_labels_for_is_noted(tmp_path: Path) -> None:
    write_set(tmp_path / "masks", 12)
    workspace = Workspace(tmp_path / "space")
    text = SMALL.replace('["surface"]', f'["{tmp_path / "masks"}"]').replace('"frozen", "full"', '"frozen"')
    report = run_grid(workspace, read_study(written(tmp_path, text), workspace))
    assert not report.failed and {row["task"] for row in report.rows} == {"semseg"}
    assert any("no labels for detect" in note for note in report.notes)


def test_a_cell_that_fails_does_not_stop_the_others(workspace: Workspace, tmp_path: Path) -> None:
    text = SMALL.replace('tasks = ["semseg", "detect"]', 'tasks = ["semseg"]').replace("[0.5, 1.0]", "[1.0]")
    folder = tmp_path / "empty"
    (folder / "images").mkdir(parents=True)
    study = read_study(written(tmp_path, text.replace('["surface"]', f'["{folder}", "surface"]')), workspace)
    report = run_grid(workspace, study)
    assert {cell.place.data for cell, _ in report.failed} == {str(folder)}
    assert {row["data"] for row in report.rows} == {"surface"} and report.rows


def test_a_cell_that_another_device_trained_in_its_own_precision_is_done(workspace: Workspace, tmp_path: Path) -> None:
    text = SMALL.replace('["semseg", "detect"]', '["semseg"]').replace('"frozen", "full"', '"full"')
    text = (
        text.replace("seeds = 2", "seeds = 1").replace("[0.5, 1.0]", "[1.0]").replace('"linear", "ridge"', '"linear"')
    )
    on_gpu = read_study(written(tmp_path, text + '[tuning]\nprecision = "bf16"\n'), workspace)
    assert [row["tuning"]["precision"] for row in run_grid(workspace, on_gpu).rows] == ["bf16"]
    assert run_grid(workspace, read_study(written(tmp_path, text), workspace), dry_run=True).done == 1
    in_fp32 = read_study(written(tmp_path, text + '[tuning]\nprecision = "fp32"\n'), workspace)
    assert len(run_grid(workspace, in_fp32, dry_run=True).missing) == 1


def test_a_finished_study_says_its_answer_and_page_again(workspace: Workspace, tmp_path: Path) -> None:
    text = SMALL.replace('["semseg", "detect"]', '["semseg"]').replace('"frozen", "full"', '"frozen"')
    study = written(tmp_path, text.replace("seeds = 2", "seeds = 1").replace("[0.5, 1.0]", "[1.0]"))
    first, again = (CliRunner().invoke(cli, ["--workspace", str(workspace.root), "study", str(study)]) for _ in "ab")
    assert first.exit_code == again.exit_code == 0
    said = again.stdout.strip()
    assert "page: " in said and first.stdout.strip().endswith(said.splitlines()[-1])
    assert "there already" in again.stderr and len(said.splitlines()) > 2
    lines: list[str] = []
    answer = run_study(workspace, study, lines.append, quiet=True)
    assert answer.page == workspace.probes / "report" / "study" / "index.html" and answer.page.is_file()
    assert answer.comparison and str(answer.page) in said and "2 trainings are there already" in lines[-1]
    assert all(sentence in said for _, sentences in answer.comparison.answer for sentence in sentences)
    plan = run_study(workspace, study, dry_run=True)
    assert plan.report.done == 2 and plan.page is None and plan.submitted is None, "a plan writes no page"
    (workspace.root / "new.toml").write_text(study.read_text().replace("seeds = 1", "seeds = 2"))
    unfinished = run_study(workspace, workspace.root / "new.toml", dry_run=True)
    assert unfinished.report.missing and unfinished.page is None


@pytest.mark.slow
def test_a_plan_goes_past_a_damaged_cache(workspace: Workspace, tmp_path: Path) -> None:
    study = read_study(written(tmp_path, SMALL.replace('["semseg", "detect"]', '["semseg"]')), workspace)
    run_grid(workspace, study)
    whole = find_file(workspace.root)
    other = whole.with_name("other-00000000.h5")
    other.write_bytes(whole.read_bytes()[:-5000])
    said: list[str] = []
    plan = run_grid(workspace, study, said.append, dry_run=True)
    assert plan.done == len(plan.cells) and not plan.failed
    (note,) = plan.notes
    assert str(other) in note
    whole.write_bytes(b"this is no cache")
    said.clear()
    plan = run_grid(workspace, study, said.append, dry_run=True)
    assert any(line.startswith("to extract") for line in said) and not plan.failed and not plan.done
    assert {name for name in (str(whole), str(other)) for note in plan.notes if name in note} == {
        str(whole),
        str(other),
    }


# ---- tiles and views -------------------------------------------------------------------------------------------------

CUT = """
data = ["surface"]
backbones = ["test_efficientnet-random"]
heads = ["linear"]
regimes = ["frozen", "full"]
seeds = 1
sizes = ["32x32"]
tiles = [0, 32]
overlap = 4
empty_tiles = 0.5
views = ["none", "hflip, crop:1"]
show = 0
[train.all]
iterations = 2
batch_size = 4
evaluations = 1
loss_at = "level"
"""


def arms(workspace: Workspace) -> set[tuple[str, int | None, tuple[str, ...]]]:
    """(regime, tile, stored views that were trained on) of each result, each of which stands there once."""
    rows, _ = read_rows(workspace.probes / "results.jsonl")
    found = [(r["regime"], r["tile"], tuple((r["augmentation"] or {}).get("views", ()))) for r in rows]
    assert len(set(found)) == len(found)
    return set(found)


@pytest.mark.slow
def test_a_study_of_tiles_and_views_trains_each_arm_once_and_tells_them_apart(
    workspace: Workspace, tmp_path: Path
) -> None:
    study = read_study(written(tmp_path, CUT), workspace)
    said: list[str] = []
    plan = run_grid(workspace, study, said.append, dry_run=True)
    assert said[0] == "6 trainings on 4 caches" and said[1].startswith("left out: full augments images itself")
    assert sum("to extract" in line for line in said) == 4 and not plan.failed
    assert sum("tiles of 32 (overlap 4, 50% of the empty)" in line for line in said) == 2
    run_grid(workspace, replace(study, tiles=(0,), views=("none",)))
    said.clear()
    plan = run_grid(workspace, study, said.append, dry_run=True)
    assert plan.done == 2 and sum("to extract" in line for line in said) == 3, "no cache stands for another"
    report = run_grid(workspace, study)
    assert not report.failed and (report.done, len(report.rows)) == (2, 4)
    views = ("hflip", "crop:1")
    assert arms(workspace) == {
        ("frozen", None, ()), ("frozen", None, views), ("full", None, ()),
        ("frozen", 32, ()), ("frozen", 32, views), ("full", 32, ()),
    }  # fmt: skip
    for dry_run in (True, False):
        assert run_grid(workspace, study, dry_run=dry_run).done == 6
    assert len(run_grid(workspace, replace(study, overlap=8), dry_run=True).missing) == 3
    table = result_table([ResultRow.from_json(row) for row in report.rows])
    assert (
        table["cache"].str.contains("tiles of 32").sum() == 3
        and table["cache"].str.contains("hflip, crop:1").sum() == 2
    )
    compared = compare(workspace, quiet=True)
    (whole,) = compared.sets
    assert len({(line["regime"], line["size"]) for line in whole.lines}) == 6, "all see the same test images"
    assert {(d["a"], d["b"]) for d in whole.differences} == {
        ("frozen, augmented", "frozen"), ("full", "frozen"), ("full", "frozen, augmented")
    }  # fmt: skip
    assert not any(d["confounded"] for d in whole.differences)


def test_a_study_takes_tiles_and_views_of_the_configuration_unless_it_names_others(
    workspace: Workspace, tmp_path: Path
) -> None:
    (workspace.root / "featprobe.toml").write_text(
        f'[data.scans]\npath = "{workspace.data / "surface"}"\ntile = 32\nempty_tiles = 0.5\nviews = "hflip"\n'
    )
    space = Workspace(workspace.root)
    text = CUT.replace('"surface"', '"scans"').replace('"frozen", "full"', '"frozen"')
    for name in ("sizes", "tiles", "overlap", "empty_tiles", "views"):
        text = re.sub(rf"^{name} = .*\n", "", text, flags=re.MULTILINE)
    run_grid(space, read_study(written(tmp_path, text), space))
    assert arms(space) == {("frozen", 32, ("hflip",))}
    (path,) = space.cache_files()
    recipe = read_contents(path).recipe
    assert (recipe.size, recipe.overlap, recipe.empty_tiles) == ((32, 32), 4, 0.5)
    whole = read_study(written(tmp_path, 'tiles = [0]\nviews = ["none"]\nsizes = ["32x32"]\n' + text), space)
    assert run_grid(space, whole, dry_run=True).done == 0
    run_grid(space, whole)
    assert arms(space) == {("frozen", 32, ("hflip",)), ("frozen", None, ())}
    own = read_study(written(tmp_path, text), space)
    assert run_grid(space, own, dry_run=True).done == run_grid(space, whole, dry_run=True).done == 1


def test_full_on_stored_views_alone_or_without_augmentation(workspace: Workspace) -> None:
    study = Study(("surface",), ("test_efficientnet-random",), seeds=1, views=("hflip", "hflip,vflip"))

    def trained(asked: Study) -> list[tuple[str, int]]:
        return [(cell.regime, len(cell.place.options.views or ())) for cell in cells_of(asked, workspace)]

    assert trained(study) == [("frozen", 1), ("full", 1), ("frozen", 2)], "with the fewest views that there are"
    every = replace(study, tuning={"augment": False})
    assert trained(every) == [("frozen", 1), ("full", 1), ("frozen", 2), ("full", 2)], "stored views are looked at"
    assert left_out(study, workspace) and not left_out(every, workspace)


def test_views_and_thinned_tiles_are_left_out_of_another_split(workspace: Workspace, tmp_path: Path) -> None:
    text = CUT.replace("empty_tiles = 0.5", 'split = "group:3"')
    study = read_study(written(tmp_path, text), workspace)
    assert {cell.place.options.views for cell in cells_of(study, workspace)} == {()}
    assert any("the data set's own split" in reason for reason in left_out(study, workspace))
    with pytest.raises(DataError, match="nothing is left to train: stored views and thinned tiles"):
        read_study(written(tmp_path, text.replace('"none", ', "")), workspace)
    thinned = read_study(written(tmp_path, text + "\n"), workspace)
    thinned = replace(thinned, empty_tiles=0.5)
    assert {cell.place.options.tile for cell in cells_of(thinned, workspace)} == {0}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("tiles = [0, 32]", 'tiles = ["32/4"]', 'tiles[0]: wanted a whole number, found "32/4"'),
        ("tiles = [0, 32]", "tiles = 32", "tiles: wanted a list, found 32"),
        ("tiles = [0, 32]", "tiles = [-1]", "tiles[0]: wanted 0 or more, found -1"),
        ("tiles = [0, 32]", "", "surface: --overlap and --empty-tiles say how tiles are cut"),
        ("overlap = 4", "overlap = 32", "tiles of 32 pixels that overlap by 32"),
        ("overlap = 4", "overlap = [4]", "overlap: wanted a whole number, found [4]"),
        ("empty_tiles = 0.5", "empty_tiles = 1.5", "empty_tiles: wanted 1 or less, found 1.5"),
        ('"none", ', '"sideways", ', "'sideways' is not a list of views"),
        ('"none", ', "3, ", "views[0]: wanted a text, found 3"),
        ('"32x32"]\n', '"32x64"]\n', "The view rot90 would be stretched to 32x64"),
        ('"32x32"', "32", "sizes[0]: wanted a text, found 32"),
    ],
)
def test_what_can_not_be_cut_or_seen_is_told_when_the_study_is_read(
    old: str, new: str, said: str, workspace: Workspace, tmp_path: Path
) -> None:
    text = CUT.replace("crop:1", "rot90")
    assert old in text and read_study(written(tmp_path, text), workspace)
    with pytest.raises(DataError) as caught:
        read_study(written(tmp_path, text.replace(old, new)), workspace)
    assert said in str(caught.value)


def test_an_intensity_of_each_image_is_no_policy_for_tiles_and_views(workspace: Workspace, tmp_path: Path) -> None:
    (workspace.root / "featprobe.toml").write_text(
        f'[data.scans]\npath = "{workspace.data / "surface"}"\nintensity = "minmax:image"\n'
    )
    space = Workspace(workspace.root)
    with pytest.raises(DataError, match="scans: --intensity minmax:image would stretch"):
        read_study(written(tmp_path, CUT.replace('"surface"', '"scans"')), space)


# ---- several processes, and kills ------------------------------------------------------------------------------------


def append_rows(path: Path, writer: int, count: int) -> None:
    for number in range(count):
        append_row(path, {"writer": writer, "number": number, "filling": "x" * (number * 37 % 20_000)})


def test_processes_that_append_at_once_lose_and_mix_no_row(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append_row(path, {"writer": -1, "number": 0, "filling": ""})
    with path.open("a") as stream:
        stream.write('{"version": 1, "writer": -1, "num')  # as a kill leaves it
    doomed, *others = [CONTEXT.Process(target=append_rows, args=(path, w, 10**9 if w == 0 else 300)) for w in range(4)]
    for process in (doomed, *others):
        process.start()
    while sum(b'"writer":0' in line for line in path.read_bytes().splitlines()) < 50:
        time.sleep(0.01)
    assert doomed.is_alive() and any(process.is_alive() for process in others)
    doomed.kill()
    for process in (doomed, *others):
        process.join()
    rows, faults = read_rows(path)
    for writer, count in ((-1, 1), (1, 300), (2, 300), (3, 300)):
        assert [row["number"] for row in rows if row["writer"] == writer] == list(range(count))
    numbers = [row["number"] for row in rows if row["writer"] == 0]
    assert numbers == list(range(len(numbers))) and len(numbers) >= 50
    assert all(len(row["filling"]) == row["number"] * 37 % 20_000 for row in rows)
    assert 1 <= len(faults) <= 2 and "line 2 " in faults[0], "what was torn before, and perhaps by the kill"


def test_a_row_waits_for_one_that_another_process_is_writing(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    other = CONTEXT.Process(target=append_rows, args=(path, 0, 1))
    with path.open("a") as stream:
        fcntl.lockf(stream, fcntl.LOCK_EX)
        stream.write('{"version": 1, "wri')
        stream.flush()
        other.start()
        other.join(1.0)
        assert other.is_alive()
        stream.write('ter": 1}\n')
        stream.flush()
        fcntl.lockf(stream, fcntl.LOCK_UN)
        other.join()
    rows, faults = read_rows(path)
    assert [row["writer"] for row in rows] == [1, 0] and not faults


KILLED = """
data = ["surface"]
backbones = ["test_efficientnet-random"]
heads = ["linear"]
seeds = 2
sizes = ["64x64"]
[train.all]
iterations = 24
batch_size = 4
evaluations = 2
"""
KILLS = 10


def run_all(root: Path, study: Path) -> None:
    """A whole study in a process of its own, which keeps its state at every pass over the training images."""
    fit.CHECKPOINT_SECONDS = 0.0
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a kill would leave behind
    workspace = Workspace(root)
    run_grid(workspace, read_study(study, workspace))


def outcome(workspace: Workspace) -> dict[str, Any]:
    """Folder of each result -> its row less what differs from run to run, and the bytes of what was saved."""
    rows, _ = read_rows(workspace.probes / "results.jsonl")
    ended = {}
    for row in rows:
        assert row["folder"] not in ended, "a result stands there once"
        saved = sorted((workspace.probes / row["folder"]).glob("*.safetensors"))
        same = {name: value for name, value in row.items() if name not in ("time", "seconds")}
        ended[row["folder"]] = json.dumps(same), {path.name: path.read_bytes() for path in saved}
    return ended


def keeps_state(workspace: Workspace, since: int) -> bool:
    """Whether a training has kept its state since a time in nanoseconds."""
    try:
        return any(path.stat().st_mtime_ns > since for path in workspace.probes.rglob("checkpoint*.pt"))
    except FileNotFoundError:  # it has ended this very moment
        return False


def left_behind(workspace: Workspace) -> tuple[int, int, int]:
    """(whole rows of the cache, saved heads, steps of a training that was stopped)."""
    rows = sum(int((Cache(path, read_contents(path)).done == WHOLE).sum()) for path in workspace.cache_files())
    steps = [torch.load(path, weights_only=True)["state"]["step"] for path in workspace.probes.rglob("checkpoint*.pt")]
    return rows, len(list(workspace.probes.rglob("card.json"))), sum(steps)


@pytest.mark.slow
def test_a_study_that_is_killed_ten_times_ends_as_one_that_is_not(workspace: Workspace, tmp_path: Path) -> None:
    study = written(tmp_path, KILLED)
    whole = Workspace(tmp_path / "whole")
    shutil.copytree(workspace.data, whole.data)
    warm = CONTEXT.Process(target=len, args=((),))
    warm.start()
    warm.join()
    begun = time.monotonic()
    uninterrupted = CONTEXT.Process(target=run_all, args=(whole.root, study))
    uninterrupted.start()
    uninterrupted.join()
    seconds = time.monotonic() - begun
    moments = random.Random(0)
    alive, states = 0, []
    for kill in range(KILLS):  # the first ones early, while the cache is made
        begun_ns = time.time_ns()
        process = CONTEXT.Process(target=run_all, args=(workspace.root, study))
        process.start()
        while kill >= KILLS - 2 and not keeps_state(workspace, begun_ns) and process.is_alive():
            time.sleep(0.01)  # the last ones in a training that has kept its state
        process.join(
            seconds * moments.uniform(kill, kill + 1) / 4 / KILLS if kill < KILLS - 2 else moments.random() / 4
        )
        alive += process.is_alive()
        process.kill()
        process.join()
        states.append(left_behind(workspace))
    assert alive >= KILLS / 2, "most kills meet a study that runs"
    assert len(set(states)) >= 4 and any(0 < cards < 4 for _, cards, _ in states), states
    assert any(step for _, _, step in states), "and some meet a training that has kept its state"
    run_all(workspace.root, study)
    assert outcome(workspace) == outcome(whole) and len(outcome(whole)) == 4
    assert not list(workspace.probes.rglob("checkpoint*"))


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.toml")), ids=lambda p: p.name)
def test_the_examples_are_studies(path: Path, tmp_path: Path) -> None:
    text = path.read_text()
    for name in ("path/to/severstal", "path/to/gdxray"):
        (tmp_path / name).mkdir(parents=True)
        text = text.replace(name, str(tmp_path / name))
    workspace = Workspace(tmp_path)
    assert cells_of(read_study(written(tmp_path, text), workspace), workspace)
