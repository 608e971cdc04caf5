"""How features are made: what a caller says, and what featprobe.toml says where the caller does not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from featprobe.errors import DataError
from featprobe.geometry import Fit, Size, parse_size
from featprobe.intensity import Intensity
from featprobe.machine import usable_cores
from featprobe.specs import CacheDtype, CachePrecision
from featprobe.tiling import Tiling, parse_views

MOST_WORKERS = 16  # unasked


@dataclass(frozen=True)
class ExtractOptions:
    """How features are made; see `featprobe extract --help` for each.

    size: (height, width) in pixels. batch_size: images per block, the unit of resuming and sharding. workers: threads
    that decode images, by default one for each core that may be used, at most 16. precision: "auto" for that of the
    cache that is there, else amp on CUDA and fp32 elsewhere.
    shard: (i, n), 1 <= i <= n: this process makes the i-th of n parts. rehash: read every file of the data set, where
    sizes and times of files would say that nothing changed. format: of the data set, None to look.
    group_from, split_file: where its groups and splits are from, None for the set itself. images, masks: patterns that
    describe where they lie, see datasets.patterns.
    tile: side of the tiles that images are cut into, 0 for whole images; overlap: of neighbours, by default an eighth
    of a tile; both in pixels of the original image. empty_tiles: share of the training tiles without a defect that is
    kept, by default all. views: of training images, as `parse_views` gives them. What is None is as featprobe.toml
    says, where it names the set.
    """

    levels: tuple[str, ...] = ()
    size: Size | None = None
    fit: Fit | None = None
    intensity: str | None = None
    batch_size: int = 16
    workers: int = field(default_factory=lambda: min(MOST_WORKERS, usable_cores()))
    dtype: CacheDtype = "fp16"
    precision: CachePrecision | Literal["auto"] = "auto"
    device: str | None = None
    shard: tuple[int, int] | None = None
    skip_bad: bool = False
    quiet: bool = False
    rehash: bool = False
    format: str | None = None
    group_from: str | None = None
    split_file: str | None = None
    images: str | None = None
    masks: str | None = None
    tile: int | None = None
    overlap: int | None = None
    empty_tiles: float | None = None
    views: tuple[str, ...] | None = None

    @property
    def tiling(self) -> Tiling | None:
        """How images are cut; None for not at all. Raises DataError for what can't be."""
        return Tiling.of(self.tile, self.overlap, self.empty_tiles, self.fit)

    def check(self) -> None:
        """Raise DataError for what can't be had together, as far as it can be told without the images."""
        tiling, policy = self.tiling, Intensity.parse(self.intensity) if self.intensity else None
        if policy and policy.image and (tiling or self.views):
            raise DataError(
                f"--intensity {policy} would stretch each tile and view of an image in another way.\n"
                "Take a policy of the whole set (without :image), or whole images alone: --tile 0 --views none."
            )
        if self.size and not tiling:
            check_turns(self.views or (), self.size, self.fit or "resize")


def configured(options: ExtractOptions, table: Mapping[str, Any]) -> ExtractOptions:
    """Options with what featprobe.toml says of the data set, where the caller says nothing.

    What it says of size and fit is meant for its own tiles, or for whole images where it names none: it does not count
    where the caller wants others. Nor do overlap and empty tiles where the caller wants whole images.
    """
    tile = table.get("tile") if options.tile is None else options.tile
    idle = [] if (tile or 0) == table.get("tile", 0) else ["size", "fit"]
    idle += [] if tile else ["overlap", "empty_tiles"]
    table = {name: value for name, value in table.items() if name not in idle}
    views = parse_views(table["views"]) if options.views is None and "views" in table else options.views
    return replace(
        options,
        size=options.size or (parse_size(table["size"]) if "size" in table else None),
        tile=tile,
        overlap=table.get("overlap") if options.overlap is None else options.overlap,
        empty_tiles=table.get("empty_tiles") if options.empty_tiles is None else options.empty_tiles,
        views=views,
        fit=options.fit or table.get("fit"),
        intensity=options.intensity or table.get("intensity"),
        **read_as({name: getattr(options, name) for name in READ_AS}, table),
    )


READ_AS = ("format", "images", "masks", "group_from", "split_file")
"""Options that say how a data set is read, by their names in featprobe.toml."""


def read_as(given: Mapping[str, str | None], table: Mapping[str, Any]) -> dict[str, Any]:
    """How a data set is read: as the caller says, and as featprobe.toml does where the caller does not.

    A format and a description by images and masks exclude each other: the caller's takes the place of the table's.
    Raises DataError for an empty text.

    >>> {k: v for k, v in read_as({"images": "*.jpg", "masks": "{stem}_m.png"}, {"format": "coco"}).items() if v}
    {'images': '*.jpg', 'masks': '{stem}_m.png'}
    """
    empty = [f"--{name.replace('_', '-')}" for name in READ_AS if given.get(name) == ""]
    if empty:
        raise DataError(f"{' and '.join(empty)}: an empty text. Nothing was read. Write what is meant, or omit it.")
    described, named = given.get("images") or given.get("masks"), given.get("format")
    idle = {*(("format",) if described else ()), *(("images", "masks") if named not in (None, "pairs") else ())}
    found = {n: given.get(n) or (None if n in idle else table.get(n)) for n in READ_AS}
    pinned = found["split_file"]
    return found | {"split_file": str(Path(pinned).resolve()) if pinned else None}


def check_turns(views: Sequence[str], size: Size, fit: Fit) -> None:
    """Raise DataError where a quarter turn would not keep the image's shape."""
    if "rot90" in views and fit == "resize" and size[0] != size[1]:
        raise DataError(
            f"The view rot90 would be stretched to {size[0]}x{size[1]} pixels. Nothing was computed.\n"
            "Keep shapes with --fit letterbox, or choose a square --size."
        )
