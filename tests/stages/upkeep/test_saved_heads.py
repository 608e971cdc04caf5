"""Removing saved heads: what was named goes, with its rows; everything else stays byte for byte."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers import stored_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import call, refusal

from featprobe.errors import ProbeError
from featprobe.io import disk
from featprobe.io.disk import append_line, filter_lines, in_use
from featprobe.stages.upkeep.saved_heads import find_heads, head_folders, remove_heads
from featprobe.stages.workspace import Workspace

HEADS = [f"parts-0123ab/some-{'0' * 8}/semseg-linear-{'1' * 8}/seed{i}" for i in range(3)]
FOLD = f"parts-0123ab/some-{'0' * 8}/semseg-linear-{'2' * 8}/fold1/seed0"
TORN = b'{"version": 1, "folder": "' + HEADS[0].encode()


def space(root: Path, heads: Sequence[str] = (*HEADS, FOLD)) -> Path:
    """A workspace with heads and their rows, and with lines that hold no row; returns its results.jsonl."""
    row = next(own for own in stored_rows() if own["task"] == "semseg" and own["regime"] == "frozen")
    results = root / "probes" / "results.jsonl"
    for name in heads:
        folder = root / "probes" / name
        (folder / "log").mkdir(parents=True)
        for file in ("card.json", "head.safetensors", "curves.json", "scores.npz", "log/events"):
            (folder / file).write_bytes(b"x" * 100)
        append_line(results, json.dumps({**row, "version": 1, "folder": name}).encode())
    append_line(results, b"[1, 2]")
    with results.open("ab") as stream:
        stream.write(TORN)
    return results


def test_the_named_heads_go_with_their_rows_and_nothing_else(tmp_path: Path) -> None:
    results = space(tmp_path)
    lines = results.read_bytes().split(b"\n")
    listed = call(tmp_path, "probes", "rm", "seed1", "fold1", "--dry-run").stdout
    assert "nothing was removed" in listed and results.read_bytes().split(b"\n") == lines
    assert call(tmp_path, "probes", "rm", "seed1", "fold1", "--yes").exit_code == 0
    assert results.read_bytes().split(b"\n") == [lines[0], lines[2], *lines[4:]]
    probes = tmp_path / "probes"
    assert [head.name for head in head_folders(Workspace(tmp_path))] == [HEADS[0], HEADS[2]]
    assert not (probes / FOLD).parents[1].exists(), "folders that are empty now go, too"
    assert [own["folder"] for own in json.loads(call(tmp_path, "probes", "ls", "--json").stdout)] == [
        HEADS[0],
        HEADS[2],
    ]


def test_a_path_means_the_heads_below_it(tmp_path: Path) -> None:
    space(tmp_path)
    workspace = Workspace(tmp_path)
    assert [h.name for h in find_heads(workspace, [str(tmp_path / "probes" / FOLD)])] == [FOLD]
    assert [h.name for h in find_heads(workspace, [str((tmp_path / "probes" / FOLD).parents[1])])] == [FOLD]
    for text in ("nothing", "", str(tmp_path / "probes" / "report")):
        with pytest.raises(ProbeError, match="is called"):
            find_heads(workspace, [text])


def test_a_folder_that_holds_more_than_heads_means_none_and_a_folder_elsewhere_is_no_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space(tmp_path)
    (tmp_path / "parts").mkdir()
    monkeypatch.chdir(tmp_path)
    for text in (".", "/", "./", "..", "probes", "./probes/", str(tmp_path)):
        assert "is called" in refusal(tmp_path, "probes", "rm", text, "--dry-run", code=2)
    assert [head.name for head in find_heads(Workspace(tmp_path), ["parts"])] == sorted([*HEADS, FOLD])


def test_it_asks_first_and_a_name_that_means_none_is_a_wrong_value(tmp_path: Path) -> None:
    results = space(tmp_path)
    before = results.read_bytes()
    assert call(tmp_path, "probes", "rm", "seed0", input="n\n").exit_code == 1
    assert results.read_bytes() == before and len(head_folders(Workspace(tmp_path))) == 4
    assert "Did you mean" in refusal(tmp_path, "probes", "rm", HEADS[0].replace("parts", "prats"), code=2)


def test_a_head_that_a_training_writes_is_refused_and_all_others_stay(tmp_path: Path) -> None:
    results = space(tmp_path)
    before = results.read_bytes()
    with in_use(tmp_path / "probes" / HEADS[1]), in_use(tmp_path / "probes" / HEADS[1]):
        said = call(tmp_path, "probes", "rm", "seed", "--yes")
    assert said.exit_code == 1 and f"A training is running in {tmp_path / 'probes' / HEADS[1]}" in said.stderr
    assert results.read_bytes() == before and len(head_folders(Workspace(tmp_path))) == 4
    assert call(tmp_path, "probes", "rm", "seed", "--yes").exit_code == 0


def test_files_of_the_user_are_never_removed(tmp_path: Path) -> None:
    space(tmp_path)
    (tmp_path / "probes" / HEADS[2] / "notes.txt").write_text("mine")
    said = refusal(tmp_path, "probes", "rm", "parts", "--yes")
    assert "notes.txt" in said and len(head_folders(Workspace(tmp_path))) == 4


def test_a_head_that_went_meanwhile_is_as_one_that_was_removed(tmp_path: Path) -> None:
    results = space(tmp_path, HEADS)
    heads = head_folders(Workspace(tmp_path))
    shutil.rmtree(heads[0].path)
    assert remove_heads(Workspace(tmp_path), heads) == sum(head.bytes for head in heads[1:])
    assert results.read_bytes() == b"[1, 2]\n" + TORN and not head_folders(Workspace(tmp_path))


@pytest.mark.skipif(os.getuid() != 0, reason="needs a user who can become another one")
def test_a_head_of_another_user_keeps_its_row(tmp_path: Path) -> None:
    results = space(tmp_path)
    before = results.read_bytes()
    tmp_path.chmod(0o755)
    code = (
        "import os, pathlib; from featprobe.stages.upkeep import saved_heads as own; from featprobe import Workspace\n"
        "os.setuid(65534); space = Workspace(pathlib.Path('.')); own.remove_heads(space, own.head_folders(space))"
    )
    command = [sys.executable, "-c", code]
    paths = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=paths)
    assert "ProbeError: You may not remove these heads" in done.stderr and results.read_bytes() == before


def test_heads_of_a_package_that_is_broken_are_listed_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = tmp_path / "site" / "broken-1.dist-info"
    about.mkdir(parents=True)
    (tmp_path / "site" / "broken.py").write_text("raise SystemExit('imported')")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[featprobe.heads]\nsemseg-broken = broken:HEAD\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    results = space(tmp_path, HEADS[:1])
    results.write_bytes(results.read_bytes().replace(b'"head": "linear"', b'"head": "broken"'))
    (head,) = head_folders(Workspace(tmp_path))
    assert head.row is not None and head.row.head == "broken"
    assert "fg mIoU" in call(tmp_path, "probes", "ls").stdout
    assert call(tmp_path, "probes", "rm", "parts", "--yes").exit_code == 0
    assert results.read_bytes() == b"[1, 2]\n" + TORN


def test_links_are_not_followed(tmp_path: Path) -> None:
    space(tmp_path / "space", HEADS[:1])
    outside = tmp_path / "outside"
    shutil.copytree(tmp_path / "space" / "probes" / HEADS[0], outside)
    (tmp_path / "space" / "probes" / HEADS[1]).symlink_to(outside)
    (tmp_path / "space" / "probes" / "linked-0123ab").symlink_to((tmp_path / "space" / "probes" / HEADS[0]).parents[2])
    (tmp_path / "space" / "probes" / HEADS[0] / "log" / "out").symlink_to(outside)
    assert [head.name for head in head_folders(Workspace(tmp_path / "space"))] == HEADS[:1]
    call(tmp_path / "space", "probes", "rm", "seed", "--yes")
    assert len(list(outside.rglob("*"))) == 6


def test_a_stop_in_between_leaves_folders_that_the_same_command_removes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = space(tmp_path, HEADS)
    workspace = Workspace(tmp_path)

    def stop(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("featprobe.stages.upkeep.saved_heads.shutil.rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            remove_heads(workspace, head_folders(workspace))
    assert results.read_bytes() == b"[1, 2]\n" + TORN
    assert [head.row for head in head_folders(workspace)] == [None] * 3
    remove_heads(workspace, head_folders(workspace))
    assert head_folders(workspace) == []


LINE = st.binary(max_size=20).map(lambda data: data.replace(b"\n", b""))


@settings(max_examples=30)  # each is brought to the disk
@given(st.lists(LINE, max_size=8), st.binary(max_size=1))
def test_kept_lines_stay_byte_for_byte(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], mark: bytes
) -> None:
    path = tmp_path_factory.mktemp("lines") / "results.jsonl"
    path.write_bytes(b"\n".join(lines))
    gone = filter_lines(path, lambda line: not line.startswith(mark))
    kept = [line for line in b"\n".join(lines).split(b"\n") if not line.strip() or not line.startswith(mark)]
    assert path.read_bytes().split(b"\n") == (kept or [b""])
    assert gone == len(b"\n".join(lines).split(b"\n")) - len(kept)


APPENDS = """
import json, sys
from pathlib import Path
from featprobe.io.disk import append_line
for i in range(int(sys.argv[3])):
    append_line(Path(sys.argv[1]), json.dumps({"folder": sys.argv[2], "number": i}).encode())
"""
"""What a process does that trains heads meanwhile."""


def test_a_row_goes_into_a_new_file_where_the_old_one_is_removed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lock = tmp_path / "results.jsonl", disk.lock_bytes
    append_line(path, b"old")

    def late(*given: int) -> None:
        """The lock comes once another process has removed the file."""
        monkeypatch.setattr(disk, "lock_bytes", lock)
        path.unlink()
        lock(*given)

    monkeypatch.setattr(disk, "lock_bytes", late)
    append_line(path, b"new")
    assert path.read_bytes() == b"new\n"


def test_no_row_is_lost_while_others_are_removed(tmp_path: Path) -> None:
    path, count = tmp_path / "results.jsonl", 30
    append_line(path, b"{}")
    command = [sys.executable, "-c", APPENDS, str(path)]
    writers = [subprocess.Popen([*command, name, str(count)]) for name in ("keep", "also")]
    removed = 0
    while any(writer.poll() is None for writer in writers):
        append_line(path, b'{"folder": "old"}')
        removed += filter_lines(path, lambda line: b'"old"' not in line)
    assert [writer.wait() for writer in writers] == [0, 0]
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert removed > 0 and len(rows) == 1 + 2 * count
    for name in ("keep", "also"):
        assert [row["number"] for row in rows if row.get("folder") == name] == list(range(count))
