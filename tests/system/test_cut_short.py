"""A cache that another process cuts short while a training reads it: whatever had returned stays, and words follow."""

import os
import resource
import signal
import threading
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from _commands import CONTEXT, PROBE, Bench, Fault, Ran, _main

from featprobe.cache.row_reader import RowReader

MORE = ["3" if word == "2" and before == "--seeds" else word for before, word in zip(["", *PROBE], PROBE, strict=False)]
"""One seed more than there is."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A workspace with a cache and two heads, and its state."""
    bench = Bench(tmp_path_factory.mktemp("bench") / "bench")
    bench.before("compare")
    return bench


def _train(root: Path, said: Path, line: Connection, *, within: bool) -> None:
    """Train one more seed. When features are first read, tell the other process, and wait until it cut the file.

    within: wait after the length was looked at, so that the cut falls into a touch of the map; else before.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    look = RowReader._check_length
    first = threading.Event()

    def looking(reader: RowReader) -> None:
        if within:
            look(reader)
        if not first.is_set() and threading.current_thread().name == "feature-reader":
            first.set()
            line.send("reading")
            line.recv()
        if not within:
            look(reader)

    RowReader._check_length = looking  # type: ignore[method-assign]
    _main(root, MORE, said, Fault(), 0o022)


def trained(bench: Bench, cut: str = "") -> Ran:
    """How that training ends. cut: where a cut of the cache falls, "within" a read or "between" two."""
    for path in bench.said.iterdir():
        path.unlink()
    (cache,) = bench.root.glob("cache/*/*.h5")
    ours, theirs = CONTEXT.Pipe()
    child = CONTEXT.Process(target=_train, args=(bench.root, bench.said, theirs), kwargs={"within": cut == "within"})
    child.start()
    if cut:
        assert ours.poll(120), "nothing was read"
        os.truncate(cache, 4096)
    ours.send("go")
    return bench.ended(child)


def heads_of(bench: Bench) -> dict[str, bytes]:
    """What had returned: the files of heads, and the rows."""
    return {name: data for name, data in whole(bench.root / "probes").items() if "/report/" not in name}


def whole(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("cut", ["between", "within"])
def test_what_had_returned_stays_and_the_same_command_refuses_until_the_cache_is_there_again(
    bench: Bench, cut: str
) -> None:
    bench.before("compare")
    before = heads_of(bench)
    ended = trained(bench, cut)
    if cut == "within":
        assert ended.code == -signal.SIGBUS, "the system ends the process: nothing of ours can run any more"
    else:
        assert ended.refused and "Was it cut short?" in ended.err
    assert heads_of(bench) == before
    again = trained(bench)
    assert again.refused and again.code == 1 and "cut short" in again.err
    assert bench.run("compare").code == 0
    for name in ("cache rm", "extract"):
        assert bench.run(name).code == 0
    assert trained(bench).code == 0
    rows = heads_of(bench)["results.jsonl"]
    assert rows.startswith(before["results.jsonl"]) and rows.count(b"\n") == 2 + 3, (
        "probe trains whatever it is asked for"
    )
