"""Work on many items in threads: decoding images leaves Python's lock alone."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import copy_context
from itertools import chain
from typing import TypeVar

from featprobe.machine import usable_cores

T = TypeVar("T")
R = TypeVar("R")
FEWEST = 4  # items that are worth a thread
SMALL_AT_ONCE, AT_ONCE = 16, 4  # most items that a thread is given together: small ones, and those of any size
SHARES = 8  # parts for each thread, so that all end at about the same time


@contextmanager
def in_threads(work: Callable[[T], R], items: Sequence[T], workers: int) -> Iterator[Iterator[R]]:
    """Results of `work` for every item, in order; what is not begun is dropped when the block ends.

    In each thread context variables have the values that they have here.
    """
    with _in_parts(work, items, max(1, workers), AT_ONCE) as parts:
        yield chain.from_iterable(parts)


def each(work: Callable[[T], R], items: Sequence[T], processes: int = 1) -> list[R]:
    """The same as a list, for items that take less than a millisecond, with a thread for each core that may be used.

    Few items, and all where there is one core, are worked on in the calling thread. processes: that do this together.
    """
    workers = usable_cores() // processes if len(items) >= FEWEST else 1
    if workers < 2:
        return [work(item) for item in items]
    with _in_parts(work, items, workers, SMALL_AT_ONCE) as parts:
        return list(chain.from_iterable(parts))


@contextmanager
def _in_parts(work: Callable[[T], R], items: Sequence[T], workers: int, most: int) -> Iterator[Iterator[list[R]]]:
    """Results of a few items at a time, at most `most`: threads that meet less often hold each other up less."""
    size = max(1, min(most, len(items) // (SHARES * workers)))
    here, pool = copy_context(), ThreadPoolExecutor(workers)

    def do(start: int) -> list[R]:
        return [here.copy().run(work, items[i]) for i in range(start, min(start + size, len(items)))]

    try:
        yield pool.map(do, range(0, len(items), size))
    finally:
        pool.shutdown(cancel_futures=True)


def single_threaded(threads: int, name: str) -> ThreadPoolExecutor:
    """Threads in which torch operations run in the calling thread only; nothing changes in other threads.

    Operations that wait for further threads stop for milliseconds whenever all cores are busy, as they are in training.
    """
    import torch  # which nothing needs that looks after data sets

    elsewhere, started = torch.get_num_threads(), threading.Barrier(threads + 1)

    def begin() -> None:
        torch.get_num_threads()  # once in a thread this takes what holds elsewhere
        torch.set_num_threads(1)
        with suppress(threading.BrokenBarrierError):
            started.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix=name, initializer=begin)
    try:
        for _ in range(threads):
            pool.submit(int)  # starts a thread, as long as no other is ready
        started.wait()
    except BaseException:  # no further thread can be started, or Ctrl-C: the others would wait for ever
        started.abort()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    torch.set_num_threads(elsewhere)  # for threads to come, and for MKL, which has one number for all
    return pool
