"""Groups from links: items that are linked, directly or through others, are one group."""

from collections.abc import Iterable
from typing import Any, TypeVar

T = TypeVar("T", bound=Any)


def components(items: Iterable[T], links: Iterable[tuple[T, T]]) -> dict[T, T]:
    """For each item the smallest item that it is linked to, over any number of steps.

    >>> components([1, 2, 3, 4], [(1, 2), (2, 4)])
    {1: 1, 2: 1, 3: 3, 4: 1}
    """
    parent = {item: item for item in items}

    def root(item: T) -> T:
        while parent[item] != item:
            item = parent[item]
        return item

    for a, b in links:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    return {item: root(item) for item in parent}
