"""How features are made: what a caller says, and what featprobe.toml says where the caller does not."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from featprobe.datasets.patterns import Description, Pattern
from featprobe.datasets.samples import DataSet
from featprobe.datasets.splits import group_pattern
from featprobe.errors import DataError
from featprobe.geometry import Fit, Size, parse_size, spacing_of
from featprobe.intensity import Intensity
from featprobe.io.fields import Fault, shown
from featprobe.machine import usable_cores
from featprobe.specs import CacheDtype, CachePrecision, CacheStore, FeatureRecipe
from featprobe.tiling import SETTINGS, Tiling, keeps_own_split, parse_views

MOST_WORKERS = 16  # unasked


@dataclass(frozen=True)
class DataEntry:
    """A section [data.NAME] of featprobe.toml: where a set lies, and how it is read and framed.

    pixel_size: millimetres per pixel of the original images, or two such numbers, down and across.
    """

    path: str
    size: str | None = None
    fit: Fit | None = None
    intensity: str | None = None
    format: str | None = None
    images: str | None = None
    masks: str | None = None
    group_from: str | None = None
    split_file: str | None = None
    classes: tuple[str, ...] = ()
    good: str | None = None
    tile: int | None = None
    overlap: int | None = None
    empty_tiles: float | None = None
    views: str | None = None
    follow_links: bool = False
    pixel_size: float | tuple[float, ...] | None = None


@dataclass(frozen=True)
class ExtractOptions:
    """How features are made; see `featprobe extract --help` for each.

    size: (height, width) in pixels. format: of the data set, None to look. images, masks: patterns that describe where
    they lie, see datasets.patterns. group_from, split_file: where its groups and splits are from, None for the set
    itself. batch_size: images per block, the unit of resuming and sharding. store: see FeatureRecipe. precision: "auto"
    for that of the cache that is there, else amp on CUDA and fp32 elsewhere.
    tile: side of the tiles that images are cut into, 0 for whole images; overlap: of neighbours, by default an eighth
    of a tile; both in pixels of the original image. empty_tiles: share of the training tiles without a defect that is
    kept, by default all. views: of training images, as `parse_views` gives them. What is None is as featprobe.toml
    says, where it names the set.
    workers: threads, or for a GPU processes, that decode images, by default one for each core that may be used, at most
    16. shard: (i, n), 1 <= i <= n: this process makes the i-th of n parts. rehash: read every file of the data set,
    where sizes and times of files would say that nothing changed.
    """

    levels: tuple[str, ...] = ()
    size: Size | None = None
    format: str | None = None
    images: str | None = None
    masks: str | None = None
    group_from: str | None = None
    split_file: str | None = None
    fit: Fit | None = None
    intensity: str | None = None
    batch_size: int = 16
    dtype: CacheDtype = "fp16"
    store: CacheStore = "maps"
    precision: CachePrecision | Literal["auto"] = "auto"
    tile: int | None = None
    overlap: int | None = None
    empty_tiles: float | None = None
    views: tuple[str, ...] | None = None
    skip_bad: bool = False
    workers: int = field(default_factory=lambda: min(MOST_WORKERS, usable_cores()))
    device: str | None = None
    shard: tuple[int, int] | None = None
    quiet: bool = False
    rehash: bool = False

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> "ExtractOptions":
        """The options that a command line says, with size, levels and views as texts; other names are ignored.

        What is None, or not there, has its default. Raises DataError.

        >>> ExtractOptions.of({"size": "64x96", "views": "hflip,crop:2", "tile": None}).views
        ('hflip', 'crop:2')
        """
        given = {known.name: said[known.name] for known in fields(cls) if said.get(known.name) is not None}
        return cls(**{name: PARSERS[name](value) if name in PARSERS else value for name, value in given.items()})

    @classmethod
    def making(cls, features: Mapping[str, Any]) -> "ExtractOptions":
        """The options that make features of this recipe again, whatever featprobe.toml says.

        features: the recipe's JSON, as caches and cards keep it.
        """
        tiling = Tiling.in_json(features)
        return cls(
            levels=tuple(level["name"] for level in features["levels"]),
            size=(features["size"][0], features["size"][1]),
            views=tuple(features["views"][1:]),
            **{name: features[name] for name in ("fit", "intensity", "dtype", "precision")},
            store=features.get("store", cls.store),
            **(asdict(tiling) if tiling else {"tile": 0}),
        )

    @property
    def tiling(self) -> Tiling | None:
        """How images are cut; None for not at all. Raises DataError for what can't be."""
        return Tiling.of(**{name: getattr(self, name) for name in SETTINGS}, fit=self.fit)

    @property
    def policy(self) -> Intensity | None:
        """How raw levels become [0, 1]; None for what suits the images. Raises DataError."""
        return Intensity.parse(self.intensity) if self.intensity else None

    @property
    def fitted(self) -> Fit:
        """How images, or tiles, meet their size. Raises DataError."""
        return "letterbox" if self.tiling else self.fit or "resize"

    @property
    def keeps_own_split(self) -> bool:
        """Whether the features serve the set's own split alone; see FeatureRecipe. Raises DataError."""
        return keeps_own_split(self.tiling, self.views or ())

    def check(self) -> None:
        """Raise DataError for what can't be had together, as far as this is known without the images."""
        tiling, policy = self.tiling, self.policy
        if policy and policy.image and (tiling or self.views):
            raise DataError(
                f"--intensity {policy} would stretch each tile and view of an image differently.\n"
                "Take a policy of the whole set (without :image), or only whole images: --tile 0 --views none."
            )
        if self.store == "pooled" and self.dtype == "int8":
            raise DataError(
                "--dtype int8 stores maps, and --store pooled keeps none. Nothing was computed.\n"
                "Pooled features take 8 bytes per channel, whatever the --dtype. Omit one of the two."
            )
        if self.size and not tiling:
            check_turns(self.views or (), self.size, self.fitted)

    def gives(self, recipe: FeatureRecipe) -> bool:
        """Whether features are those that are asked for; of any size where neither size nor tile is said.

        Levels, dtype and precision are not looked at. Raises DataError.
        """
        tiling = self.tiling
        size = self.size or ((tiling.tile, tiling.tile) if tiling else recipe.size)
        asked = (size, self.fitted, self.policy or recipe.policy, tiling, self.views or (), self.store)
        return asked == (recipe.size, recipe.fit, recipe.policy, recipe.tiling, recipe.further_views, recipe.store)


PARSERS: Mapping[str, Callable[[str], Any]] = {
    "levels": lambda text: tuple(part.strip() for part in text.split(",") if part.strip()),
    "size": lambda text: parse_size(text) if text else None,
    "views": parse_views,
}
"""Parsers of the options that are texts on the command line and in featprobe.toml, and values here."""
OF_ONE_RUN = ("workers", "device", "shard", "quiet", "rehash")
"""Options that say how one run computes, on one machine: they are no part of a command that is to repeat it."""


def configured(options: ExtractOptions, table: Mapping[str, Any]) -> ExtractOptions:
    """Options with what featprobe.toml says of the data set, where the caller says nothing.

    What it says of size and fit is meant for its own tiles, or for whole images where it names none: it does not count
    where the caller wants others. Nor do overlap and empty tiles where the caller wants whole images.
    """
    tile = table.get("tile") if options.tile is None else options.tile
    idle = [] if (tile or 0) == table.get("tile", 0) else ["size", "fit"]
    idle += [] if tile else [name for name in SETTINGS if name != "tile"]
    known = {own.name for own in fields(DataEntry)} & {own.name for own in fields(ExtractOptions)}
    found: dict[str, Any] = {}
    for name in known.difference(READ_AS, idle).intersection(table):
        if getattr(options, name) in (None, ""):
            found[name] = PARSERS[name](table[name]) if name in PARSERS else table[name]
    return replace(options, **found, **read_as({name: getattr(options, name) for name in READ_AS}, table))


READ_AS = ("format", "images", "masks", "group_from", "split_file")
"""Options that say how a data set is read, by their names in featprobe.toml."""


def check_given(given: Mapping[str, Any]) -> None:
    """Raise DataError for an empty text among options of how a set is read."""
    empty = [f"--{name.replace('_', '-')}" for name in READ_AS if given.get(name) == ""]
    if empty:
        raise DataError(f"{' and '.join(empty)}: an empty text. Nothing was read. Give a value, or omit it.")


def read_as(given: Mapping[str, str | None], table: Mapping[str, Any]) -> dict[str, Any]:
    """How a data set is read: as the caller says, and as featprobe.toml does where the caller does not.

    A format and a description by images and masks exclude each other: the caller's takes the place of the table's.
    Raises DataError for an empty text.

    >>> {k: v for k, v in read_as({"images": "*.jpg", "masks": "{stem}_m.png"}, {"format": "coco"}).items() if v}
    {'images': '*.jpg', 'masks': '{stem}_m.png'}
    """
    check_given(given)
    described, named = given.get("images") or given.get("masks"), given.get("format")
    idle = {*(("format",) if described else ()), *(("images", "masks") if named not in (None, "pairs") else ())}
    found = {n: given.get(n) or (None if n in idle else table.get(n)) for n in READ_AS}
    pinned = found["split_file"]
    return found | {"split_file": str(Path(pinned).resolve()) if pinned else None}


def read_already(options: ExtractOptions, data: DataSet) -> ExtractOptions:
    """The options with how a set was read. Raises DataError where they ask for another reading."""
    other = [name for name in READ_AS if getattr(options, name) not in (None, data.description.get(name))]
    if other:
        raise DataError(
            f"{data.root} was read already, so {', '.join(other)} would change nothing. Nothing was computed.\n"
            "Give its path instead of the data set, or omit these options."
        )
    how: dict[str, Any] = {name: data.description.get(name) for name in READ_AS}
    return replace(options, **how)


def check_thinned(tiling: Tiling | None, data: DataSet) -> None:
    """Raise DataError where tiles without a defect are to be left out of a set that does not say where defects are."""
    if tiling and tiling.thinned and not data.tasks:
        raise DataError(
            f"--empty-tiles {tiling.empty_tiles:g} omits training tiles without a defect: none is known here.\n"
            f"  wanted  masks or objects\n  found   labels of whole images alone, in {data.root}\n"
            "Nothing was computed. Omit --empty-tiles."
        )


def check_turns(views: Sequence[str], size: Size, fit: Fit) -> None:
    """Raise DataError where a quarter turn would not keep the image's shape."""
    if "rot90" in views and fit == "resize" and size[0] != size[1]:
        raise DataError(
            f"The view rot90 would be stretched to {size[0]}x{size[1]} pixels. Nothing was computed.\n"
            "Keep shapes with --fit letterbox, or choose a square --size."
        )


def _described(entry: Mapping[str, Any]) -> str:
    """The fault in the description of a set, whatever its patterns are; "" if there is none."""
    there = [name for name in ("images", "masks") if name in entry]
    if len(there) == 1:
        return f"{there[0]} without {'masks' if there == ['images'] else 'images'}, which describe a set together"
    if there and entry.get("format", "pairs") != "pairs":
        return f"images and masks describe a set beside format = {shown(entry['format'])}; omit one of the two"
    return ""


def entry_faults(entry: Mapping[str, Any], whole: Mapping[str, Any]) -> list[Fault]:
    """Faults of values in a DataEntry whose types are right, as a table; whole: with the other values."""
    parsers: Mapping[str, Callable[[Any], object]] = {
        "size": parse_size,
        "intensity": Intensity.parse,
        "views": parse_views,
        "images": partial(Pattern, called="images"),
        "masks": partial(Pattern, called="masks"),
        "group_from": group_pattern,
        "pixel_size": spacing_of,
    }
    faults = {key: _fault(partial(parse, entry[key])) for key, parse in parsers.items() if key in entry}
    found = [Fault((key,), said) for key, said in faults.items() if said]
    found += [Fault((), said)] if (said := _described(whole)) else []
    if faults.get("images") == faults.get("masks") == "":
        found += [Fault((), said)] if (said := _fault(partial(Description.of, entry["images"], entry["masks"]))) else []
    cut = (*SETTINGS, "fit")
    if all(key in entry for key in cut if key in whole):
        found += [Fault((), said)] if (said := _fault(partial(Tiling.of, *map(entry.get, cut)))) else []
    return found


def _fault(check: Callable[[], object]) -> str:
    """The fault that a check finds; "" if there is none."""
    try:
        check()
    except DataError as error:
        return str(error)
    return ""
