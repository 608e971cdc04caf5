"""Work on many items in threads: decoding images leaves Python's lock alone."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
AT_ONCE = 16  # items that a thread is given together


@contextmanager
def in_threads(work: Callable[[T], R], items: Sequence[T], workers: int) -> Iterator[Iterator[R]]:
    """Results of `work` for every item, in order; what is not begun is dropped when the block ends.

    In each thread context variables have the values that they have here.
    """
    here = copy_context()
    pool = ThreadPoolExecutor(max(1, workers))
    try:
        yield pool.map(lambda item: here.copy().run(work, item), items)
    finally:
        pool.shutdown(cancel_futures=True)


def each(work: Callable[[T], R], items: Sequence[T], workers: int) -> list[R]:
    """The same as a list, for items that take less than a millisecond. With one worker nothing leaves this thread."""
    if workers < 2 or len(items) < 2:
        return [work(item) for item in items]
    size = max(1, min(AT_ONCE, len(items) // workers))
    parts = [items[start : start + size] for start in range(0, len(items), size)]
    with in_threads(lambda part: [work(item) for item in part], parts, workers) as results:
        return [result for part in results for result in part]


def single_threaded(threads: int, name: str) -> ThreadPoolExecutor:
    """Threads in which torch operations run in the calling thread only; nothing changes in other threads.

    Operations that wait for further threads stop for milliseconds whenever all cores are busy, as they are in training.
    """
    import torch  # which nothing needs that looks after data sets

    elsewhere, started = torch.get_num_threads(), threading.Barrier(threads + 1)

    def begin() -> None:
        torch.get_num_threads()  # once in a thread this takes what holds elsewhere
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix=name, initializer=begin)
    for _ in range(threads):
        pool.submit(int)  # starts a thread, as long as no other is ready
    started.wait()
    torch.set_num_threads(elsewhere)  # for threads to come, and for MKL, which has one number for all
    return pool
