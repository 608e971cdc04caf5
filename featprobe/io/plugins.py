"""What other packages add, by entry points: their names from metadata alone, and the objects once they are needed."""

import sys
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from featprobe.errors import FeatprobeError

DATASETS, BACKBONES, HEADS = "featprobe.datasets", "featprobe.backbones", "featprobe.heads"
"""Groups of entry points."""


def names_in(group: str) -> tuple[str, ...]:
    """Names of a group's entry points, sorted, each once. Nothing of these packages is imported."""
    return tuple(sorted({point.name for point in _points(group, tuple(sys.path))}))


def points_of(group: str, name: str) -> list[EntryPoint]:
    """The entry points of a group with this name: none, one, or one of each package that took the name."""
    return [point for point in _points(group, tuple(sys.path)) if point.name == name]


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


@cache
def _points(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """The entry points of a group, once for each sys.path. A package that is seen twice there counts once."""
    found = {(point.name, point.value, package_of(point)): point for point in entry_points(group=group)}
    return tuple(found.values())
