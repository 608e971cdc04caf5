"""Rows are written in groups: what a group holds when, what a disk that refuses leaves, and threads that meet.

A killed process is test_kill.py's.
"""

import errno
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import make_cache, opened, random_maps, row_bytes, rows_of
from kill9 import BLOCK
from power_loss import run_losses

from featprobe.cache import UNREADABLE, WHOLE, Cache, CacheWriter, verify
from featprobe.cache import writer as writer_module
from featprobe.errors import CacheError

ROWS = 6


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """A cache whose rows are all missing."""
    return make_cache(tmp_path / "cache.h5", rows=rows_of(ROWS))


@pytest.fixture
def maps(cache: Cache) -> dict[str, np.ndarray]:
    return random_maps(cache.recipe, ROWS)


@pytest.fixture
def steps(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that fills with what is written, by its dataset, and with each sync."""
    happened: list[str] = []
    write, sync = writer_module.write_some, writer_module.sync

    def noting(handle: int, data: memoryview, offset: int) -> int:
        extents = cache.contents.extents.items()
        happened.extend(n for n, e in extents if e.offset <= offset < e.offset + e.row_bytes * e.rows)
        return write(handle, data, offset)

    monkeypatch.setattr(writer_module, "write_some", noting)
    monkeypatch.setattr(writer_module, "sync", lambda handle: happened.append("sync") or sync(handle))
    return happened


def part(maps: dict[str, np.ndarray], start: int, stop: int) -> dict[str, np.ndarray]:
    return {name: m[start:stop] for name, m in maps.items()}


def states(cache: Cache) -> list[int]:
    return cache.done.tolist()


def test_rows_are_whole_when_their_group_is_committed_and_not_before(cache, maps):
    with CacheWriter(cache.path) as writer:
        writer.write(0, part(maps, 0, 2))
        writer.write(4, part(maps, 4, 5))
        assert states(cache) == [0] * ROWS
        writer.commit()
        assert states(cache) == [1, 1, 0, 0, 1, 0]
        writer.write(2, part(maps, 2, 4))
        assert states(cache) == [1, 1, 0, 0, 1, 0]
    assert states(cache) == [1, 1, 1, 1, 1, 0]
    assert all(isinstance(found, int) for found in verify(cache.path))


def test_a_group_is_all_of_its_rows_then_one_sync_then_all_of_its_states(cache, maps, steps):
    block = ["features/stride4", "features/stride8", "checksum"]
    with CacheWriter(cache.path) as writer:
        for start in range(0, ROWS, 2):
            writer.write(start, part(maps, start, start + 2))
        writer.commit()
    assert steps == [*block * 3, "sync", "done"]


def test_an_unreadable_row_is_marked_after_its_reason_is_on_the_disk(cache, maps, steps):
    with CacheWriter(cache.path) as writer:
        writer.write(0, part(maps, 0, 2))
        steps.clear()
        writer.mark_unreadable(2, "it is cut short")
        assert steps == ["reason", "sync", "done"]
        assert states(cache) == [1, 1, 2, 0, 0, 0]
        assert cache.reason(2) == "it is cut short"


def test_a_group_that_is_full_commits_itself(cache, maps, monkeypatch):
    monkeypatch.setattr(writer_module, "GROUP_BYTES", 3 * cache.recipe.row_bytes)
    with CacheWriter(cache.path) as writer:
        writer.write(0, part(maps, 0, 2))
        assert states(cache) == [0] * ROWS
        writer.write(2, part(maps, 2, 3))
        assert states(cache) == [1, 1, 1, 0, 0, 0]
        writer.write(3, part(maps, 3, 4))
        assert states(cache) == [1, 1, 1, 0, 0, 0]  # a new group


def test_a_group_that_is_old_commits_itself(cache, maps, monkeypatch):
    monkeypatch.setattr(writer_module, "GROUP_SECONDS", 0.2)
    with CacheWriter(cache.path) as writer:
        writer.write(0, part(maps, 0, 2))
        assert states(cache) == [0] * ROWS
        time.sleep(0.3)
        writer.write(2, part(maps, 2, 3))
        assert states(cache) == [1, 1, 1, 0, 0, 0]


def test_the_last_state_that_a_row_of_a_group_is_given_counts(cache, maps):
    with CacheWriter(cache.path) as writer:
        writer.write(0, maps)
        writer.mark_missing(1)
        writer.mark_unreadable(2, "gone")
    assert states(cache) == [1, 0, 2, 1, 1, 1]


def test_a_whole_row_is_set_back_on_the_disk_before_its_bytes_change(cache, maps, steps):
    with CacheWriter(cache.path) as writer:
        writer.write(0, maps)
        writer.commit()
        steps.clear()
        writer.write(0, part(maps, 1, 3))
        assert steps == ["done", "sync", "features/stride4", "features/stride8", "checksum"]
        assert states(cache) == [0, 0, 1, 1, 1, 1]
    assert states(cache) == [1] * ROWS
    assert all(isinstance(found, int) for found in verify(cache.path))


def test_a_block_that_is_refused_leaves_the_rest_of_its_group(cache, maps, monkeypatch):
    write, extent = writer_module.write_some, cache.contents.extents["features/stride8"]

    def full(handle: int, data: memoryview, offset: int) -> int:
        if offset == extent.offset + 2 * extent.row_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, data, offset)

    monkeypatch.setattr(writer_module, "write_some", full)
    with CacheWriter(cache.path) as writer:
        writer.write(0, part(maps, 0, 2))
        with pytest.raises(CacheError, match="at row 2, features/stride8: No space left"):
            writer.write(2, part(maps, 2, 4))
        writer.write(4, part(maps, 4, 6))
    assert states(cache) == [1, 1, 0, 0, 1, 1]
    assert all(isinstance(found, int) for found in verify(cache.path))


def test_after_a_sync_that_failed_nothing_that_was_not_marked_is_ever_marked(cache, maps, monkeypatch):
    sync, results = writer_module.sync, iter([None, errno.EIO, None, None])

    def once(handle: int) -> None:
        if error := next(results):
            raise OSError(error, os.strerror(error))
        sync(handle)

    monkeypatch.setattr(writer_module, "sync", once)
    with CacheWriter(cache.path) as writer:
        writer.write(0, part(maps, 0, 2))
        writer.commit()
        writer.write(2, part(maps, 2, 4))
        with pytest.raises(CacheError, match=r"(?s)Input/output error.*Rows that were whole stay whole"):
            writer.commit()
        writer.write(4, part(maps, 4, 5))
        with pytest.raises(CacheError, match="Input/output error"):  # though the disk would say yes now
            writer.commit()
        with pytest.raises(CacheError, match="Input/output error"):
            writer.mark_unreadable(5, "gone")
        writer.write(2, part(maps, 2, 3))
    assert states(cache) == [1, 1, 0, 0, 0, 0]


def test_threads_that_wait_for_a_sync_share_the_next_one(cache, maps, monkeypatch):
    """Each row fills a group; while the first is synced three threads write: two groups are not marked, not four."""
    sync, begun, go_on, syncs = writer_module.sync, threading.Event(), threading.Event(), []

    def slow(handle: int) -> None:
        syncs.append(states(cache))
        begun.set()
        assert go_on.wait(60)
        sync(handle)

    monkeypatch.setattr(writer_module, "sync", slow)
    monkeypatch.setattr(writer_module, "GROUP_BYTES", 1)
    with CacheWriter(cache.path) as writer:
        threads = [threading.Thread(target=writer.write, args=(n, part(maps, n, n + 1))) for n in range(4)]
        threads[0].start()
        assert begun.wait(60)
        for thread in threads[1:]:
            thread.start()
        deadline = time.monotonic() + 10
        while len(writer._group) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        go_on.set()
        for thread in threads:
            thread.join(60)
        assert states(cache) == [1, 1, 1, 1, 0, 0]
    assert syncs == [[0] * ROWS, [1, 0, 0, 0, 0, 0]]


def test_threads_that_write_the_same_rows_never_leave_a_state_that_is_not_true(cache, monkeypatch):
    """Two features of one row in turn, by four threads; what is marked is one of the two, whole, at every mark."""
    versions = [random_maps(cache.recipe, ROWS, seed) for seed in (1, 2)]
    write, false = writer_module.write_some, []

    def torn(handle: int, data: memoryview, offset: int) -> int:
        time.sleep(1e-5)  # others come in between
        return write(handle, data[: len(data) // 2 + 1], offset)

    put = CacheWriter._put

    def watching(writer: CacheWriter, name: str, row: int, data: np.ndarray) -> None:
        put(writer, name, row, data)
        if name == "done":
            held = row_bytes(opened(cache.path))
            for marked in (row + np.flatnonzero(data == WHOLE)).tolist():
                shown = [all(bytes(held[n][marked]) == m[marked].tobytes() for n, m in v.items()) for v in versions]
                false.extend([] if any(shown) else [marked])

    monkeypatch.setattr(writer_module, "write_some", torn)
    monkeypatch.setattr(CacheWriter, "_put", watching)
    errors: list[BaseException] = []

    def work(number: int, writer: CacheWriter) -> None:
        rng = np.random.default_rng(number)
        try:
            for _ in range(25):
                start = int(rng.integers(ROWS))
                stop = int(rng.integers(start, ROWS)) + 1
                writer.write(start, part(versions[number % 2], start, stop))
                if rng.random() < 0.5:
                    writer.commit()
        except BaseException as error:
            errors.append(error)

    with CacheWriter(cache.path) as writer:
        threads = [threading.Thread(target=work, args=(n, writer)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert not errors and not false and UNREADABLE not in states(cache)
    assert all(isinstance(found, int) for found in verify(cache.path))


# Power is lost; the harness is the benchmark's, which tries more states: benchmarks/power_loss.py


def test_a_loss_of_power_leaves_rows_that_are_what_they_say_and_an_extraction_that_goes_on(tmp_path):
    recording, found = run_losses(tmp_path, states=30)
    assert max(recording.groups) > BLOCK
    assert (found.counts["wrong"], found.counts["not the same"]) == (0, 0), found.faults
    assert found.counts["right"] > 15 and found.counts["again"] > 2


def test_a_writer_that_does_not_sync_is_found_out(tmp_path):
    _, found = run_losses(tmp_path, states=15, syncs=False)
    assert found.counts["wrong"]
