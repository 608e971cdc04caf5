"""How images are cut into tiles, and which further views of training images are cached."""

import re
from dataclasses import dataclass

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
                raise DataError("--overlap and --empty-tiles say how tiles are cut. Add --tile, or leave them away.")
            return None
        if fit == "resize":
            raise DataError(
                "Tiles keep their scale and shape: --fit resize can't be had with --tile. Leave it away, or take whole "
                "images with --tile 0."
            )
        return cls(tile, tile // 8 if overlap is None else overlap, 1.0 if empty_tiles is None else float(empty_tiles))

    def __str__(self) -> str:
        """For people."""
        empty = f", {self.empty_tiles:.0%} of the empty" if self.empty_tiles < 1 else ""
        return f"tiles of {self.tile} (overlap {self.overlap}{empty})"


def parse_views(text: str) -> tuple[str, ...]:
    """Names of views of training images, as `hflip,vflip,rot90,crop:4`, or `none`; raises DataError.

    >>> parse_views("hflip, crop:2"), parse_views("none")
    (('hflip', 'crop:2'), ())
    """
    views = tuple(part.strip() for part in text.split(",") if part.strip())
    if views == ("none",):
        return ()
    wrong = [view for view in views if view not in TURNS and not re.fullmatch(r"crop:[1-9]\d*", view)]
    kinds = [view.split(":")[0] for view in views]
    if wrong or not views or len(set(kinds)) < len(kinds):
        guesses = [nearest(view, [*TURNS, "crop:N", "none"]).partition("Known:")[0].strip() for view in wrong]
        close = " ".join(guess for guess in guesses if guess)
        raise DataError(
            f"{text!r} are no views of training images.{f' {close}' if close else ''}\n"
            f"  wanted  none, or each at most once: {', '.join(TURNS)}, and crop:N for N random crops\n"
            f"  found   {', '.join(wrong or kinds) or 'nothing'}"
        )
    return views
