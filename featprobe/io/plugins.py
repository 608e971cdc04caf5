"""What other packages add, by entry points: their names from metadata alone, and the objects once they are needed."""

import os
import sys
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from featprobe.errors import FeatprobeError

DATASETS, BACKBONES, HEADS = "featprobe.datasets", "featprobe.backbones", "featprobe.heads"
"""Groups of entry points."""


def names_in(group: str) -> tuple[str, ...]:
    """Names of a group's entry points, sorted, each once. Nothing of these packages is imported."""
    return tuple(sorted({point.name for point in _points(group, _installed())}))


def points_of(group: str, name: str) -> list[EntryPoint]:
    """The entry points of a group with this name: none, one, or one of each package that took the name."""
    return [point for point in _points(group, _installed()) if point.name == name]


def package_of(point: EntryPoint) -> str:
    """The package that an entry point belongs to."""
    return point.dist.name if point.dist else "?"


def loaded(point: EntryPoint, what: str, wanted: str, error: type[FeatprobeError]) -> Any:
    """The object of an entry point; its package is imported. what, wanted: words for the message of `error`."""
    try:
        return point.load()
    except Exception as cause:  # another package's import may raise anything
        raise error(refusal(point, what, "can't be loaded", wanted, f"{type(cause).__name__}: {cause}")) from cause


def refusal(point: EntryPoint, what: str, said: str, wanted: str, found: str) -> str:
    """The message on an entry point that can't be used."""
    return (
        f"The {what} {point.name} of the package {package_of(point)} {said}.\n"
        f"  wanted  {point.value}, {wanted}\n"
        f"  found   {found}\n"
        f"Repair that package, or remove it; every other {what} can be used without it."
    )


def clash(points: list[EntryPoint], what: str) -> str:
    """The message on a name that several packages took."""
    packages = " and ".join(sorted(map(package_of, points)))
    return f"The {what} {points[0].name} is named by several packages: {packages}.\nRemove all but one of them."


def _installed() -> tuple[tuple[str, int], ...]:
    """The folders that packages lie in, with the times at which packages were last added there or removed."""
    found = []
    for path in sys.path:
        with suppress(OSError):
            found.append((path, os.stat(path or ".").st_mtime_ns))
    return tuple(found)


@lru_cache(1)
def _all_points(installed: tuple[tuple[str, int], ...]) -> Any:  # its type depends on Python's version
    """The entry points of all groups: each look reads a file of every package."""
    return entry_points()


@lru_cache(16)
def _points(group: str, installed: tuple[tuple[str, int], ...]) -> tuple[EntryPoint, ...]:
    """The entry points of a group, looked for once as long as no package comes or goes.

    A package that is seen twice, as by two paths to its folder, counts once.
    """
    found = {
        (point.name, point.value, package_of(point)): point for point in _all_points(installed).select(group=group)
    }
    return tuple(found.values())
