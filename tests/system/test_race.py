"""Several processes on one cache at once: one file, every row right; and clear words where they collide."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from helpers import CONTEXT, PoolingBackbone, extract, find_file, opened, stored, write_set

import featprobe.stages.extraction.make_cache as stage
from featprobe.cache import RowLocks, create_file, verify
from featprobe.errors import CacheBusyError

PROCESSES = 8
RACES = 20
IMAGES = 17  # blocks of two: shards of one block and of two


@dataclass
class Racer:
    """A process that waits for work, and the line to it."""

    process: BaseProcess
    line: Connection


def race(line: Connection, barrier: Any) -> None:
    """What a racer does: for each task, wait for all others, extract a shard, tell how it went.

    Unlocked, it does not wait for another's creation, and all meet once more just before they create.
    """
    wait, check = RowLocks.wait_for_creation, stage.check_disk
    made: list[bool] = []

    def create_and_note(*args: Any) -> bool:
        made.append(create_file(*args))
        return made[-1]

    stage.create_file = create_and_note
    while (task := line.recv()) is not None:
        root, data, i, locked = task
        made.clear()
        RowLocks.wait_for_creation = wait if locked else lambda self: None
        stage.check_disk = check if locked else lambda job: barrier.wait(60)
        barrier.wait(60)
        try:
            line.send((extract(root, data, shard=(i, PROCESSES)).computed, *made))
        except BaseException as error:
            line.send((repr(error),))


@pytest.fixture(scope="module")
def racers() -> Iterator[list[Racer]]:
    barrier = CONTEXT.Barrier(PROCESSES)
    started = []
    for _ in range(PROCESSES):
        ours, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(target=race, args=(theirs, barrier), daemon=True)
        process.start()
        started.append(Racer(process, ours))
    yield started
    for racer in started:
        racer.line.send(None)
        racer.process.join(60)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("race") / "set", IMAGES, (16, 16))


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[str, bytes]:
    """What one process makes of the set."""
    return stored(extract(tmp_path_factory.mktemp("single"), data).path)


def run_race(racers: list[Racer], root: Path, data: Path, *, locked: bool = True) -> list[tuple]:
    """What each racer answers: how many rows it computed, and whether it put the file there, if it tried."""
    for i, racer in enumerate(racers, start=1):
        racer.line.send((root, data, i, locked))
    assert all(racer.line.poll(60) for racer in racers)
    return [racer.line.recv() for racer in racers]


def assert_one_right_file(root: Path, answers: list[tuple], single: dict[str, bytes]) -> None:
    assert sorted(str(answer[0]) for answer in answers) == ["2"] * (PROCESSES - 1) + ["3"]
    path = find_file(root)
    names = {path.name, f".{path.stem}.lock", f"{path.stem}.runs.jsonl"}
    assert {found.name for found in path.parent.iterdir()} == names
    assert stored(path) == single
    assert all(isinstance(found, int) for found in verify(path))


def test_eight_shards_that_start_at_once_make_one_right_file(racers, data, single, tmp_path):
    for n in range(RACES):
        answers = run_race(racers, tmp_path / str(n), data)
        assert_one_right_file(tmp_path / str(n), answers, single)


def test_of_eight_that_put_the_file_there_at_once_one_wins_and_all_use_it(racers, data, single, tmp_path):
    """Creation by link is exclusive by itself; the lock only spares the losers their work."""
    for n in range(5):
        answers = run_race(racers, tmp_path / str(n), data, locked=False)
        assert sorted(won for _, won in answers) == [False] * (PROCESSES - 1) + [True]
        assert_one_right_file(tmp_path / str(n), answers, single)


def extract_slowly(root: Path, data: Path) -> None:
    extract(root, data, PoolingBackbone(pause=0.3))


def test_a_second_process_on_the_same_rows_is_refused_at_once_and_the_first_goes_on(data, single, tmp_path):
    first = CONTEXT.Process(target=extract_slowly, args=(tmp_path, data))
    first.start()
    deadline = time.monotonic() + 60
    while not any(tmp_path.glob("cache/*/*.h5")) or not opened(find_file(tmp_path)).done.any():
        assert time.monotonic() < deadline and first.exitcode is None
        time.sleep(0.01)
    with pytest.raises(CacheBusyError) as caught:
        extract(tmp_path, data)
    assert first.is_alive()  # it has seconds to go, so the second did not wait for it
    text = str(caught.value)
    assert "Another extraction is writing" in text and str(find_file(tmp_path)) in text and "--shard 1/2" in text
    first.join(60)
    assert first.exitcode == 0
    assert stored(find_file(tmp_path)) == single
    assert extract(tmp_path, data).computed == 0


def test_a_changed_set_is_not_swapped_in_while_another_process_fills_the_old_file(tmp_path):
    data = write_set(tmp_path / "set", IMAGES, (16, 16))
    first = CONTEXT.Process(target=extract_slowly, args=(tmp_path, data))
    first.start()
    while not any(tmp_path.glob("cache/*/*.h5")) or not opened(find_file(tmp_path)).done.any():
        assert first.exitcode is None
        time.sleep(0.01)
    inode = os.stat(find_file(tmp_path)).st_ino
    write_set(data, IMAGES + 1, (16, 16))
    with pytest.raises(CacheBusyError):
        extract(tmp_path, data)
    assert os.stat(find_file(tmp_path)).st_ino == inode
    first.join(60)
    report = extract(tmp_path, data)
    assert (report.copied, report.computed, report.rows) == (IMAGES, 1, IMAGES + 1)


def keep_rows(path: Path, line: Connection) -> None:
    with RowLocks(path) as locks:
        locks.claim(2, 4)
        line.send("mine")
        time.sleep(60)


def test_rows_of_a_killed_process_are_free_again_and_other_rows_always_were(tmp_path):
    ours, theirs = CONTEXT.Pipe()
    child = CONTEXT.Process(target=keep_rows, args=(tmp_path / "cache.h5", theirs))
    child.start()
    assert ours.recv() == "mine"
    with RowLocks(tmp_path / "cache.h5") as locks:
        locks.claim(0, 2)
        locks.claim(4, 6)
        for refused in ((3, 5), (0, 3)):
            with pytest.raises(CacheBusyError):
                locks.claim(*refused)
        with pytest.raises(CacheBusyError):
            locks.claim_all()
        child.kill()
        child.join()
        locks.claim_all()


def in_threads(work: Callable[[int], Any], count: int) -> list[Any]:
    """What work gives in threads that begin at once, or the error that it ends in."""
    barrier = threading.Barrier(count)

    def begin(i: int) -> Any:
        barrier.wait(60)
        try:
            return work(i)
        except CacheBusyError as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


def test_of_two_threads_on_the_same_rows_one_is_refused_and_the_other_goes_on(data, single, tmp_path):
    answers = in_threads(lambda i: extract(tmp_path, data, PoolingBackbone(pause=0.3)), 2)
    assert sorted(isinstance(answer, CacheBusyError) for answer in answers) == [False, True]
    assert stored(find_file(tmp_path)) == single


def test_shards_in_threads_make_one_right_file(data, single, tmp_path):
    answers = in_threads(lambda i: extract(tmp_path, data, shard=(i + 1, 3)), 3)
    assert sum(answer.computed for answer in answers) == IMAGES
    assert stored(find_file(tmp_path)) == single
    assert all(isinstance(found, int) for found in verify(find_file(tmp_path)))
