"""Threads give what a loop would give: results in order, the first error, and context variables as they are here."""

import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featprobe.io import threads
from featprobe.io.threads import each, in_threads, single_threaded

HERE: ContextVar[int] = ContextVar("here", default=0)


@pytest.fixture(autouse=True, scope="module")
def many_cores() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setattr(threads, "usable_cores", lambda: 4)
    yield
    patch.undo()


@given(st.lists(st.integers(0, 9), max_size=200), st.integers(0, 9), st.integers(1, 9))
def test_results_and_errors_are_those_of_a_loop(items: list[int], bad: int, workers: int) -> None:
    def work(place: int) -> int:
        if items[place] == bad:
            raise ValueError(f"at {place}")
        return items[place] + HERE.get()

    places = range(len(items))
    token = HERE.set(5)
    try:
        if bad in items:
            first = f"^at {items.index(bad)}$"
            with pytest.raises(ValueError, match=first):
                each(work, places)
            with pytest.raises(ValueError, match=first), in_threads(work, places, workers) as results:
                list(results)
            return
        assert each(work, places) == [item + 5 for item in items]
        with in_threads(work, places, workers) as results:
            assert list(results) == [item + 5 for item in items]
    finally:
        HERE.reset(token)


def test_threads_that_wait_for_one_that_can_t_start_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start, begun = threading.Thread.start, list[threading.Thread]()

    def refusing(own: threading.Thread) -> None:
        if len(begun) == 2:
            raise RuntimeError("can't start new thread")
        begun.append(own)
        start(own)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refusing)
        with pytest.raises(RuntimeError, match="can't start"):
            single_threaded(4, "some")
    for own in begun:
        own.join(20)
        assert not own.is_alive()
    assert len(begun) == 2 and not caplog.records


def test_what_is_not_begun_is_dropped() -> None:
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        time.sleep(0.001)
        return item

    with in_threads(work, range(1000), 2) as results:
        assert next(results) == 0
    assert len(begun) < 1000


def test_few_items_stay_in_the_calling_thread() -> None:
    here = threading.get_ident()
    assert set(each(lambda _: threading.get_ident(), range(3))) == {here}
    assert here not in each(lambda _: threading.get_ident(), range(40))
