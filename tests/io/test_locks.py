"""Locks of bytes: threads exclude each other as processes do, and only who locked them ends them."""

import errno
import fcntl
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from featprobe.cache import RowLocks
from featprobe.errors import CacheBusyError, CacheError
from featprobe.io import locks
from featprobe.io.locks import lock_bytes, unlock_bytes

by_opening = pytest.mark.skipif(not locks._OWN, reason="this system's locks belong to processes alone")
ASKS = """
import fcntl, sys
handle = open(sys.argv[1], "r+b")
try:
    fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, int(sys.argv[3]), int(sys.argv[2]))
    print("free")
except OSError:
    print("held")
"""
"""Asks for bytes with a lock that belongs to the process."""
HOLDS = """
import fcntl, sys
handle = open(sys.argv[1], "r+b")
fcntl.lockf(handle, fcntl.LOCK_EX, 2, 4)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "locked"
    path.touch()
    return path


def asked(path: Path, start: int, length: int) -> str:
    """The answer to another process that asks for bytes."""
    command = [sys.executable, "-c", ASKS, str(path), str(start), str(length)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def opened(path: Path) -> int:
    return os.open(path, os.O_RDWR)


@by_opening
def test_two_openings_exclude_each_other_and_closing_one_does_not_free_the_other(path: Path) -> None:
    mine, other = opened(path), opened(path)
    lock_bytes(mine, 4, 2)
    with pytest.raises(BlockingIOError):
        lock_bytes(other, 5, 3, wait=False)
    lock_bytes(other, 6, 3, wait=False)
    os.close(other)
    assert asked(path, 4, 2) == "held" and asked(path, 6, 3) == "free"
    unlock_bytes(mine, 5, 1)
    assert asked(path, 4, 1) == "held" and asked(path, 5, 1) == "free"
    os.close(mine)
    assert asked(path, 0, 0) == "free"


def test_a_lock_of_a_process_excludes_this_one_until_the_process_ends(path: Path) -> None:
    mine = opened(path)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        lock_bytes(mine, 0, 4, wait=False)
        with pytest.raises(BlockingIOError):
            lock_bytes(mine, 4, 1, wait=False)
        threading.Timer(0.2, other.kill).start()
        lock_bytes(mine, 4, 1)  # waits
        assert other.wait(60) < 0
    os.close(mine)


@by_opening
def test_threads_never_hold_a_row_together(path: Path) -> None:
    rows, held, most = 40, [0] * 40, list[int]()

    def claims(seed: int) -> int:
        draw, won = random.Random(seed), 0
        for _ in range(150):
            start = draw.randrange(rows - 8)
            with RowLocks(path) as own:
                try:
                    own.claim(start, start + 8)
                except CacheBusyError:
                    continue
                for row in range(start, start + 8):
                    held[row] += 1
                most.append(max(held[start : start + 8]))
                time.sleep(0.0005)
                for row in range(start, start + 8):
                    held[row] -= 1
                won += 1
        return won

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(claims, range(8)))
    assert min(won) > 0 and sum(won) < 8 * 150, "some were refused"
    assert max(most) == 1


def test_rows_are_free_when_they_are_given_back_though_a_fork_lives_on(path: Path) -> None:
    read, write = os.pipe()
    with RowLocks(path) as own:
        own.claim(0, 4)
        child = os.fork()
        if child == 0:
            os.close(write)
            os.read(read, 1)  # until the parent closes its end
            os._exit(0)
    with RowLocks(path) as again:
        again.claim(0, 4)
    os.close(write)
    assert os.waitpid(child, 0)[1] == 0
    os.close(read)


def test_where_a_file_system_refuses_locks_of_an_opening_those_of_the_process_are_taken(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "fcntl", refusing(errno.EINVAL))
    mine, other = opened(path), opened(path)
    lock_bytes(mine, 4, 2)
    lock_bytes(other, 4, 2, wait=False)  # of the same process
    assert asked(path, 4, 1) == "held" and asked(path, 6, 1) == "free"
    unlock_bytes(mine, 4, 2)
    assert asked(path, 4, 1) == "free"
    for handle in (mine, other):
        os.close(handle)


def refusing(number: int) -> Callable[..., int]:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    return refuse


@by_opening
def test_rows_that_can_not_be_locked_are_not_said_to_be_taken(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RowLocks(path) as own:
        for number, kind in (
            (errno.EACCES, CacheBusyError),
            (errno.EAGAIN, CacheBusyError),
            (errno.ENOLCK, CacheError),
        ):
            monkeypatch.setattr(fcntl, "fcntl", refusing(number))
            for claim in (own.claim_all, lambda: own.claim(0, 2)):
                with pytest.raises(CacheError) as caught:
                    claim()
                assert type(caught.value) is kind
        assert os.strerror(errno.ENOLCK) in str(caught.value)
