"""Feature levels: the common contract of backbones, caches and heads.

A backbone *has* levels, a cache *stores* levels, a head is *built from* levels and *fed* `Features`.
A head can't see whether its features come from a file or from a live network.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from featprobe.errors import ProbeError, nearest


@dataclass(frozen=True)
class FeatureLevel:
    """One feature map of a backbone: its name, its number of channels, its stride in frame pixels per cell."""

    name: str
    channels: int
    stride: int

    def cells(self, frame: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of this level for a frame of (height, width) pixels.

        >>> FeatureLevel("stride8", 192, 8).cells((256, 352))
        (32, 44)
        """
        return frame[0] // self.stride, frame[1] // self.stride


def choose_levels(levels: Sequence[FeatureLevel], names: Sequence[str]) -> tuple[FeatureLevel, ...]:
    """The levels with these names, finest first; all levels when no name is given.

    Raises KeyError with the first unknown name.
    """
    by_name = {level.name: level for level in levels}
    chosen = [by_name[name] for name in names] if names else list(levels)
    return tuple(sorted(set(chosen), key=lambda level: levels.index(level)))


def pick_levels(levels: Sequence[FeatureLevel], names: Sequence[str]) -> tuple[FeatureLevel, ...]:
    """The same, of the levels of a cache for a head; raises ProbeError, with the nearest name and what to do."""
    try:
        return choose_levels(levels, names)
    except KeyError as error:
        known = [level.name for level in levels]
        raise ProbeError(
            f"There is no level {error.args[0]!r} here. {nearest(error.args[0], known)}\n"
            "Extract it:  featprobe extract … --levels " + ",".join([*known, error.args[0]])
        ) from None
