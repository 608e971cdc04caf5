"""How images are cut into tiles, and which further views of training images are cached."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import xxhash

from featprobe.errors import DataError, nearest
from featprobe.geometry import MOST_SIDE, TURNS, Fit


@dataclass(frozen=True)
class Tiling:
    """How images are cut into tiles; raises DataError for what can't be.

    tile: side, and overlap: of neighbours, at least, pixels of the original image. empty_tiles: share of the training
    tiles without a defect that is kept.
    """

    tile: int
    overlap: int
    empty_tiles: float = 1.0

    def __post_init__(self) -> None:
        if not (1 <= self.tile <= MOST_SIDE and 0 <= self.overlap < self.tile and 0 <= self.empty_tiles <= 1):
            raise DataError(
                f"Images can't be cut into tiles of {self.tile} pixels that overlap by {self.overlap}, with "
                f"{self.empty_tiles:g} of the empty ones. Nothing was computed.\n"
                "  wanted  --tile T of 1 pixel or more, 0 <= --overlap < T, 0 <= --empty-tiles <= 1\n"
                f"  found   --tile {self.tile} --overlap {self.overlap} --empty-tiles {self.empty_tiles:g}"
            )

    @classmethod
    def of(
        cls, tile: int | None, overlap: int | None = None, empty_tiles: float | None = None, fit: Fit | None = None
    ) -> "Tiling | None":
        """The tiling that settings mean, where None stands for the default; no tile, or a tile of 0, is whole images.

        Raises DataError for what can't be had together.

        >>> Tiling.of(512), Tiling.of(0)
        (Tiling(tile=512, overlap=64, empty_tiles=1.0), None)
        """
        if not tile:
            if overlap is not None or empty_tiles is not None:
                raise DataError("--overlap and --empty-tiles say how tiles are cut. Add --tile, or omit them.")
            return None
        if fit == "resize":
            raise DataError(
                "Tiles keep their scale and shape, so --fit resize can't be used with --tile. Omit it, or use whole "
                "images with --tile 0."
            )
        return cls(tile, tile // 8 if overlap is None else overlap, 1.0 if empty_tiles is None else float(empty_tiles))

    @classmethod
    def in_json(cls, recipe: Mapping[str, Any]) -> "Tiling | None":
        """How the images of a recipe were cut, as caches and cards keep it; None for whole images."""
        return cls(**{name: recipe[name] for name in SETTINGS}) if recipe.get("tile") else None

    @property
    def thinned(self) -> bool:
        """Whether not all training tiles are kept."""
        return self.empty_tiles < 1

    def keeps(self, empty: str) -> bool:
        """Whether a training tile without a defect, of this id, is kept; it follows from the id alone."""
        return xxhash.xxh3_64_intdigest(empty.encode()) / 2**64 < self.empty_tiles

    @property
    def manner(self) -> tuple[str, ...]:
        """How tiles of one side may differ, for people: their overlap, and the share that is kept if not all are.

        >>> Tiling(512, 64, 0.1).manner
        ('overlap 64', '10% of the empty')
        """
        return (f"overlap {self.overlap}", *([f"{self.empty_tiles:.0%} of the empty"] if self.thinned else []))

    @property
    def text(self) -> str:
        """All of it, for people."""
        return f"tiles of {self.tile} pixels, overlap {self.overlap}, {self.empty_tiles:.0%} of the empty"

    def __str__(self) -> str:
        """In short, for people."""
        return f"tiles of {self.tile} ({', '.join(self.manner)})"


SETTINGS = tuple(setting.name for setting in fields(Tiling))
"""Names of the settings of a tiling in recipes, options and files."""


def keeps_own_split(tiling: Tiling | None, views: Sequence[str]) -> bool:
    """Whether features of such tiles and further views serve the set's own split alone.

    Then training images have views that others lack, or not all of their tiles are kept.
    """
    return bool(views) or (tiling is not None and tiling.thinned)


def parse_views(text: str) -> tuple[str, ...]:
    """Names of views of training images, as `hflip,vflip,rot90,crop:4`, or `none`; raises DataError.

    >>> parse_views("hflip, crop:2"), parse_views("none")
    (('hflip', 'crop:2'), ())
    """
    views = tuple(part.strip() for part in text.split(",") if part.strip())
    if views == ("none",):
        return ()
    wrong = [view for view in views if view not in TURNS and not re.fullmatch(r"crop:[1-9]\d{0,3}", view)]
    kinds = [view.split(":")[0] for view in views]
    if wrong or not views or len(set(kinds)) < len(kinds):
        guesses = [nearest(view, [*TURNS, "crop:N", "none"]).partition("Known:")[0].strip() for view in wrong]
        close = " ".join(guess for guess in guesses if guess)
        raise DataError(
            f"{text!r} is not a list of views of training images.{f' {close}' if close else ''}\n"
            f"  wanted  none, or each at most once: {', '.join(TURNS)}, and crop:N for N random crops\n"
            f"  found   {', '.join(wrong or kinds) or 'nothing'}"
        )
    return views
