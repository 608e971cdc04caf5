"""A training as a value: what it is and whether it is done are known without reading a label."""

import os
from collections import Counter
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
from helpers import PoolingBackbone, extract, training_of, watch_memory

from featprobe.cache import Cache, open_cache, store
from featprobe.kinds import kind_of
from featprobe.probes import saved
from featprobe.stages.study import grid as study_module
from featprobe.stages.study.grid import run_cells
from featprobe.stages.study.study import Cell, Study, cells_of
from featprobe.stages.training import probe as probe_module
from featprobe.stages.training.probe import checked, probe
from featprobe.stages.training.probe_options import ProbeOptions
from featprobe.stages.workspace import Workspace, make_generated

TASKS = ("semseg", "detect")
STUDY = Study(
    ("surface",), ("pooling",), TASKS, regimes=("frozen",), seeds=2, fractions=(0.5, 1.0), split="stratified", show=0,
    train={"all": {"iterations": 1, "batch_size": 2, "evaluations": 1}},
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, list[Cell]]:
    """A workspace in which every training of STUDY is done."""
    workspace = Workspace(tmp_path_factory.mktemp("space"))
    make_generated("surface", workspace.data / "surface", images=24, size=(64, 64))
    path = extract(workspace.root, workspace.data / "surface", PoolingBackbone()).path
    cells = cells_of(STUDY, workspace)
    report = run_cells(workspace, STUDY, open_cache(path), cells, lambda line: None)
    assert len(report.rows) == len(cells) == 8 and not report.failed
    return workspace, cells


def cache_of(workspace: Workspace) -> Cache:
    (path,) = workspace.cache_files()
    return open_cache(path)


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often labels are decoded, and files of results opened."""
    found: Counter[str] = Counter()

    def counting(module: Any, name: str) -> None:
        plain = getattr(module, name)

        def counted(what: Any, *more: Any) -> Any:
            found[what.name if isinstance(what, Path) else "label"] += 1
            return plain(what, *more)

        monkeypatch.setattr(module, name, counted)

    for name in ("decode_semantic", "decode_instances"):
        counting(store, name)
    counting(saved, "read_regular")
    return found


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_finished_study_is_resumed_without_a_label_and_reads_its_results_at_most_once(
    finished: tuple[Workspace, list[Cell]], met: Counter[str], dry_run: bool
) -> None:
    workspace, cells = finished
    log = workspace.probes / "results.jsonl"
    log.write_bytes(log.read_bytes())  # as another process may have written it
    report = run_cells(workspace, STUDY, cache_of(workspace), cells, lambda line: None, dry_run=dry_run)
    assert report.done == len(cells) and not report.rows and not report.missing
    assert met["label"] == 0 and met["results.jsonl"] == 1


def test_a_training_that_is_prepared_reads_labels(finished: tuple[Workspace, list[Cell]], met: Counter[str]) -> None:
    from featprobe.stages.training.prepared import prepare

    workspace, _ = finished
    options = checked("detect", ProbeOptions(quiet=True))
    prepare(training_of(workspace, cache_of(workspace), "detect", options))
    assert met["label"] > 0, "the counter counts"


def test_results_that_come_and_go_are_seen(finished: tuple[Workspace, list[Cell]]) -> None:
    workspace, cells = finished
    log = workspace.probes / "results.jsonl"
    whole = log.read_bytes()

    def done() -> int:
        report = run_cells(workspace, STUDY, cache_of(workspace), cells, lambda line: None, dry_run=True)
        return report.done

    log.write_bytes(b"".join(whole.splitlines(keepends=True)[:-2]))
    assert done() == len(cells) - 2
    log.write_bytes(whole)
    assert done() == len(cells)
    log.unlink()
    assert done() == 0
    log.write_bytes(whole)


def test_results_behind_a_link_that_grow_are_seen(finished: tuple[Workspace, list[Cell]], tmp_path: Path) -> None:
    """As of a workspace whose results another one writes."""
    workspace, cells = finished
    log, elsewhere = workspace.probes / "results.jsonl", tmp_path / "results.jsonl"
    first, *others = log.read_bytes().splitlines(keepends=True)
    os.rename(log, elsewhere)
    log.symlink_to(elsewhere)
    try:
        for lines in ([first], [first, *others]):
            elsewhere.write_bytes(b"".join(lines))
            report = run_cells(workspace, STUDY, cache_of(workspace), cells, lambda line: None, dry_run=True)
            assert report.done == len(lines)
    finally:
        log.unlink()
        os.rename(elsewhere, log)


def test_results_below_what_is_no_folder_are_none(tmp_path: Path, finished: tuple[Workspace, list[Cell]]) -> None:
    workspace, _ = finished
    (tmp_path / "probes").write_bytes(b"")
    options = checked("semseg", ProbeOptions(quiet=True))
    assert not training_of(Workspace(tmp_path), cache_of(workspace), "semseg", options).is_done()


def test_probe_holds_nothing_of_a_training_while_the_next_one_runs(
    finished: tuple[Workspace, list[Cell]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace(tmp_path)
    workspace.cache.symlink_to(finished[0].cache, target_is_directory=True)
    runs = watch_memory(monkeypatch, probe_module)
    options = ProbeOptions(recipe=STUDY.recipe(kind_of("semseg", "linear")), seeds=3, quiet=True, device="cpu")
    assert len(probe(workspace, "semseg", options=options).rows) == len(runs) == 3


def test_a_study_holds_nothing_of_a_training_while_the_next_one_runs(
    finished: tuple[Workspace, list[Cell]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace(tmp_path)
    runs = watch_memory(monkeypatch, study_module)
    study = replace(STUDY, fractions=(1.0,))
    report = run_cells(workspace, study, cache_of(finished[0]), cells_of(study, workspace), lambda line: None)
    assert len(report.rows) == len(runs) == 4 and not report.failed


def test_a_training_can_not_be_changed_and_says_the_same_in_every_process(
    finished: tuple[Workspace, list[Cell]],
) -> None:
    workspace, _ = finished
    options = checked("semseg", ProbeOptions(quiet=True))
    training = training_of(workspace, cache_of(workspace), "semseg", options)
    with pytest.raises(FrozenInstanceError):
        training.fraction = 0.5  # type: ignore[misc]
    again = training_of(workspace, cache_of(workspace), "semseg", options)
    assert (again.key, again.folder, again.title) == (training.key, training.folder, training.title)
    other = replace(training, seeds=(1,))
    assert other.key == training.key and other.folders != training.folders, "seeds lie side by side"
