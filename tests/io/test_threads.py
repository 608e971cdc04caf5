"""Threads give what a loop would give: results in order, the first error, and context variables as they are here."""

import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featprobe.io import threads
from featprobe.io.threads import each, in_threads

HERE: ContextVar[int] = ContextVar("here", default=0)


@pytest.fixture(autouse=True, scope="module")
def many_cores() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setattr(threads, "usable_cores", lambda: 4)
    yield
    patch.undo()


@given(st.lists(st.integers(0, 9), max_size=200), st.integers(0, 9), st.integers(1, 9))
def test_results_and_errors_are_those_of_a_loop(items: list[int], bad: int, workers: int) -> None:
    def work(item: int) -> int:
        if item == bad:
            raise ValueError(item)
        return item + HERE.get()

    token = HERE.set(5)
    try:
        if bad in items:
            with pytest.raises(ValueError, match=str(bad)):
                each(work, items)
            with pytest.raises(ValueError, match=str(bad)), in_threads(work, items, workers) as results:
                list(results)
            return
        assert each(work, items) == [item + 5 for item in items]
        with in_threads(work, items, workers) as results:
            assert list(results) == [item + 5 for item in items]
    finally:
        HERE.reset(token)


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
