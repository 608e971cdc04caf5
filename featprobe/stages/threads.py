"""Work on many items in threads: decoding images leaves Python's lock alone."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def in_threads(work: Callable[[T], R], items: Sequence[T], workers: int) -> Iterator[Iterator[R]]:
    """Results of `work` for every item, in order; what is not begun is dropped when the block ends."""
    pool = ThreadPoolExecutor(max(1, workers))
    try:
        yield pool.map(work, items)
    finally:
        pool.shutdown(cancel_futures=True)
