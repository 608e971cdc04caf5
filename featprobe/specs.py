"""Frozen values that stages hand to each other, and the keys made from them."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from featprobe.errors import DataError, nearest
from featprobe.fields import Fault, limits, made, wrong
from featprobe.geometry import IDENTITY, TURNS, Fit, Size
from featprobe.levels import FeatureLevel

CacheDtype = Literal["fp16", "fp32", "bf16", "int8"]
"""How a cache stores features. int8: a byte for each value, and for each channel of a row a scale and a zero."""
CachePrecision = Literal["fp32", "tf32", "amp"]
"""What a backbone computed in: float32, TF32 on CUDA, or autocast to fp16 on CUDA."""
Rows = NDArray[np.intp]
"""Indices of a cache's rows."""
CACHE_VERSION = 2
"""Of the recipe of a cache of parts; that of a cache of whole images alone is 1. Part of its key."""
FILE_VERSION = 3
"""Of the files that are written, and the newest that is read; not part of any key."""

BYTES_PER_VALUE: Mapping[str, int] = {"fp16": 2, "bf16": 2, "fp32": 4, "int8": 1}
BYTES_PER_CHANNEL: Mapping[str, int] = {"int8": 8}
"""Of a row, beside its values: scale and zero, float32."""
MOST_LEVELS, MOST_CHANNELS, MOST_STRIDE, MOST_CLASSES = 64, 2**16, 2**12, 255
MOST_SIDE, MOST_PIXELS = 2**24, 2**28
"""Limits of what a file may claim: levels of a recipe, channels and stride of a level, classes of a set, pixels of a
side and of all of an image as a backbone sees it."""
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
SIZES = f"height and width in pixels, 1 to {MOST_SIDE} each, at most {MOST_PIXELS} together"


def _is_name(name: str) -> bool:
    return 0 < len(name) <= 255 and "/" not in name


def _is_size(size: Size) -> bool:
    return min(size) >= 1 and max(size) <= MOST_SIDE and size[0] * size[1] <= MOST_PIXELS


def digest(value: object) -> str:
    """sha256 (64 hex digits) of a JSON value in canonical form: sorted keys, no spaces."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class BackboneSpec:
    """Which network and which weights.

    label: what the user calls it; it names files and table rows.
    model: timm's full model name.
    source: "hub" (timm's own download), "embedded" (from the package index), "file" or "random".
    weights: the file's path where source is "file".
    final_norm: whether the last normalisation layer is applied; None: the default of the pretraining.
    arguments: of the command line, that name this very backbone.
    """

    label: str
    model: str
    source: Literal["hub", "embedded", "file", "random"] = "hub"
    weights: str | None = None
    seed: int = 0
    final_norm: bool | None = None
    arguments: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, data: object) -> "BackboneSpec":
        """The spec that a cache or a card keeps; raises FieldError."""
        return made(cls, data, "What says where a backbone comes from")


@dataclass(frozen=True)
class Intensity:
    """How raw grey levels become [0, 1].

    kind "window": low and high are raw levels. "percentile": low and high are percent of all pixels of
    the training images, one window for the whole data set. "minmax": that window from their extremes.
    "none": divide by the largest value of the file's own number format.
    log: the logarithm of the levels is what is stretched from 0 to 1; percentiles are then of levels above 0.
    image: percentiles and extremes are each image's own, not the training images'.
    """

    kind: Literal["window", "percentile", "minmax", "none"]
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    image: bool = False

    @classmethod
    def parse(cls, text: str) -> "Intensity":
        """Read `window:LO:HI`, `percentile:LO:HI`, `minmax` or `none`, with `:log` or `:image` behind; or `log`.

        Raises DataError.

        >>> str(Intensity.parse("percentile:0.01:99.99"))
        'percentile:0.01:99.99'
        >>> str(Intensity.parse("log:image"))
        'percentile:0.01:99.99:log:image'
        """
        long = re.sub(r"^log(?=:image$|$)", f"{DEFAULT_16BIT}:log", text)
        found = re.fullmatch(r"(window|percentile|minmax|none)((?::[0-9.eE+-]+){2})?(:log)?(:image)?", long)
        with suppress(ValueError):  # of a text that is no number
            kind, limits, log, image = found.groups() if found else ("", None, None, None)
            low, high = (float(part) for part in limits[1:].split(":")) if limits else (0.0, 0.0)
            policy = cls(kind, low, high, bool(log), bool(image))  # type: ignore[arg-type]
            if kind and _makes_sense(policy, limits is not None):
                return policy
        raise DataError(
            f"{text!r} is not an intensity policy.\n"
            "  wanted  window:LO:HI (raw levels), percentile:LO:HI (0 <= LO < HI <= 100), minmax, none or log;\n"
            "          :log behind window (0 < LO), percentile or minmax, :image behind percentile, minmax or log"
        )

    @property
    def percent(self) -> tuple[float, float]:
        """The percentiles that become 0 and 1."""
        return (0.0, 100.0) if self.kind == "minmax" else (self.low, self.high)

    def __str__(self) -> str:
        words: list[str] = [self.kind]
        if self.kind in ("window", "percentile"):
            limits = [f"{self.low:g}", f"{self.high:g}"]
            exact = self.log or self.image or limits[0] == limits[1]  # of the others the window tells the rest
            words += [f"{float(v)!r}" for v in (self.low, self.high)] if exact else limits
        return ":".join(words + ["log"] * self.log + ["image"] * self.image)


def _makes_sense(policy: Intensity, limited: bool) -> bool:
    """Whether a policy's parts go together."""
    if limited != (policy.kind in ("window", "percentile")):
        return False
    if limited and not (policy.low < policy.high and math.isfinite(policy.high - policy.low)):
        return False
    if policy.kind == "percentile" and not 0 <= policy.low < policy.high <= 100:
        return False
    if policy.kind == "window" and (policy.image or (policy.log and policy.low <= 0)):
        return False
    return not (policy.kind == "none" and (policy.log or policy.image))


DEFAULT_16BIT = Intensity("percentile", 0.01, 99.99)


def default_intensity(bits: int) -> Intensity:
    """The policy for images of this many bits a channel where none is asked for."""
    return Intensity("none") if bits == 8 else DEFAULT_16BIT


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
        raise DataError(
            f"{text!r} are no views of training images.\n"
            f"  wanted  none, or each at most once: {', '.join(TURNS)}, and crop:N for N random crops\n"
            f"  found   {', '.join(wrong or kinds) or 'nothing'}"
        )
    return views


SPLITS_BY: Mapping[str, str] = {
    "own": "its own split",
    "group": "split by group",
    "image": "split by image",
    "stratified": "split by group, stratified",
}
"""What a split can be made by without a file, and how people call it."""
PINNED = re.compile(r"(.*\.csv)(?:#([0-9a-f]+))?", re.IGNORECASE | re.DOTALL)  # a split file, perhaps with its digest


@dataclass(frozen=True)
class SplitChoice:
    """What decides which images are trained on, chosen on and scored.

    by: a name of SPLITS_BY, or a split file's path with `#` and the first digits of its digest behind, where pinned.
    folds: K of a cross-validation, 0 for a single split. fold: the one meant, 1 <= fold <= folds; 0 for all of them.
    """

    by: str
    folds: int = 0
    fold: int = 0

    @classmethod
    def parse(cls, text: str) -> "SplitChoice":
        """Read `NAME`, `NAME:K` or `NAME:K/I`, where a name may be a CSV file's; raises DataError.

        >>> SplitChoice.parse("group:5/2")
        SplitChoice(by='group', folds=5, fold=2)
        >>> SplitChoice.parse("splits/mine.csv#1a2b3c4d").file
        'splits/mine.csv'
        """
        found = re.fullmatch(r"(.+?)(?::(\d+)(?:/(\d+))?)?", text, re.DOTALL)
        by, folds, fold = (found[1], int(found[2] or 0), int(found[3] or 0)) if found else (text, 0, 0)
        choice = cls(by, folds, fold)
        if fold > folds >= 2:
            raise DataError(
                f"{text!r} is not a split: there is no fold {fold} of {folds}.\n"
                f"  wanted  {by}:{folds}/1 to {by}:{folds}/{folds}, or {by}:{folds} for all of them"
            )
        counted = bool(found) and (found[2] is None or folds >= 2) and (found[3] is None or 1 <= fold <= folds)  # type: ignore[index]
        if not counted or not (choice.file or by in SPLITS_BY) or (folds and by == "own"):
            raise DataError(
                f"{text!r} is not a split. {nearest(by, SPLITS_BY)}\n"
                f"  wanted  {', '.join(SPLITS_BY)}, or a file FILE.csv (featprobe data split writes one);\n"
                "          group:K, stratified:K or image:K for a cross-validation of K >= 2 folds, group:K/I for one"
            )
        return choice

    @property
    def file(self) -> str:
        """The path of the split file; "" where there is none."""
        found = PINNED.fullmatch(self.by)
        return found[1] if found else ""

    @property
    def pinned(self) -> str:
        """First digits of the digest that the split file must have; "" where any will do."""
        found = PINNED.fullmatch(self.by)
        return (found[2] or "") if found else ""

    @property
    def whole(self) -> str:
        """The choice without its fold, as result rows keep it."""
        return f"{self.by}:{self.folds}" if self.folds else self.by

    @property
    def key(self) -> str:
        """The same for the same choice, wherever its file lies, and whatever it is called."""
        return re.sub(r".*(?=#[0-9a-f]+(:\d+)?$)", "", self.whole, flags=re.DOTALL) if self.pinned else self.whole

    def __str__(self) -> str:
        return f"{self.whole}/{self.fold}" if self.fold else self.whole

    @property
    def text(self) -> str:
        """For people.

        >>> SplitChoice.parse("group:5/2").text, SplitChoice.parse("stratified:5").text
        ('fold 2 of 5, split by group', '5 folds, split by group, stratified')
        """
        by = f"split of {self.file}" if self.file else SPLITS_BY[self.by]
        folds = f"fold {self.fold} of {self.folds}, " if self.fold else f"{self.folds} folds, " if self.folds else ""
        return folds + by


@dataclass(frozen=True)
class FeatureRecipe:
    """Everything that decides a cached feature's value, apart from the image itself.

    Its `key` names the cache file. `label` is how people call the backbone; it is not part of the key.
    window: the raw levels that become 0 and 1, where the intensity policy resolved to one for the whole set.
    precision: what the backbone computed in; see backbones.precision.
    tile, overlap: pixels of the original image; a tile of None stands for whole images. empty_tiles: share of the
    training tiles without a defect that is kept. views: of the training images; the first is the image as it is.
    empty_pixels: what pixels become that a header calls empty, `0`; "" for a set that has no such headers.
    sized: whether timm built the network for the frame, since as it was it would have computed something else.
    """

    label: str
    backbone: str
    weights_sha256: str
    levels: tuple[FeatureLevel, ...]
    final_norm: bool
    size: Size
    frame: Size
    fit: Fit
    intensity: str
    window: tuple[float, float] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    dtype: CacheDtype
    precision: CachePrecision = "fp32"
    channels: str = "rgb, grey replicated"
    views: tuple[str, ...] = ("identity",)
    version: int = 1
    tile: int | None = None
    overlap: int = 0
    empty_tiles: float = 1.0
    empty_pixels: str = ""
    sized: bool = False

    @property
    def key(self) -> str:
        """64 hex digits over every field but the label."""
        return digest({k: v for k, v in self.to_json().items() if k != "label"})

    @property
    def in_parts(self) -> bool:
        """Whether rows show tiles or views of images, so that they are not the images themselves."""
        return self.tile is not None or len(self.views) > 1

    @property
    def policy(self) -> Intensity:
        """How raw levels become [0, 1], together with `window`."""
        return Intensity.parse(self.intensity)

    @property
    def row_bytes(self) -> int:
        """Bytes that one image's features take."""
        values = sum(lv.channels * lv.cells(self.frame)[0] * lv.cells(self.frame)[1] for lv in self.levels)
        channels = sum(level.channels for level in self.levels)
        return values * BYTES_PER_VALUE[self.dtype] + channels * BYTES_PER_CHANNEL.get(self.dtype, 0)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as the cache and the cards keep them; of tiles, empty pixels, `sized` only what holds."""
        idle = [name for name in ("empty_pixels", "sized") if not getattr(self, name)]
        idle += ["tile", "overlap", "empty_tiles"] if self.tile is None else []
        return {name: value for name, value in asdict(self).items() if name not in idle}

    @classmethod
    def from_json(cls, data: object) -> "FeatureRecipe":
        """The recipe that `to_json` wrote; raises FieldError that names every field that is of a wrong type or out of
        its limits, so that nothing is allocated by what a file claims."""
        return made(cls, data, "A feature recipe")

    def faults(self) -> list[Fault]:
        """Values that no extraction gives: see `from_json`."""
        names = [level.name for level in self.levels]
        low, high = self.window or (0.0, 0.0)
        checks = {
            "levels": (0 < len(set(names)) == len(names) <= MOST_LEVELS and all(map(_is_name, names)),
                       f"1 to {MOST_LEVELS} levels, each with a name of its own", names),
            "size": (_is_size(self.size), SIZES, self.size),
            "frame": (_is_size(self.frame), SIZES, self.frame),
            "window": (low <= high, "low <= high", self.window),
            "mean": (len(self.mean) in (1, 3), "1 or 3 numbers", self.mean),
            "std": (len(self.std) == len(self.mean) and min(self.std, default=0) > 0, "above 0, as mean", self.std),
            "tile": (self.tile is None or 1 <= self.tile <= MOST_SIDE, f"1 to {MOST_SIDE} pixels", self.tile),
            "overlap": (0 <= self.overlap < (self.tile or 1), "0 <= overlap < tile", self.overlap),
            "empty_tiles": (0 <= self.empty_tiles <= 1, "a share from 0 to 1", self.empty_tiles),
            "interpolation": (self.interpolation in INTERPOLATIONS, " or ".join(INTERPOLATIONS), self.interpolation),
            "version": (1 <= self.version <= CACHE_VERSION, f"1 to {CACHE_VERSION}", self.version),
            "views": (self.views[:1] == (IDENTITY,), f"{IDENTITY}, then others", self.views),
        }  # fmt: skip
        found = limits(checks)
        for i, level in enumerate(self.levels):
            own = {
                "channels": (1 <= level.channels <= MOST_CHANNELS, f"1 to {MOST_CHANNELS}", level.channels),
                "stride": (1 <= level.stride <= MOST_STRIDE, f"1 to {MOST_STRIDE} pixels", level.stride),
            }
            found += [fault.below("levels", i) for fault in limits(own)]
        if not found and any(side > room for side, room in zip(self.size, self.frame, strict=True)):
            found = [wrong(("frame",), f"room for the size, {self.size[0]}x{self.size[1]}", self.frame)]
        if not found and any(side % level.stride for level in self.levels for side in self.frame):
            found = [wrong(("frame",), "a multiple of every stride", self.frame)]
        parsers: Mapping[str, Callable[[], object]] = {
            "intensity": lambda: self.policy,
            "views": lambda: parse_views(",".join(self.views[1:]) or "none"),
        }
        for name, parse in parsers.items():
            try:
                parse()
            except DataError:
                found.append(wrong((name,), "what extract takes", getattr(self, name)))
        return found


@dataclass(frozen=True)
class DataInfo:
    """What a cache says of the data set that it was made from.

    fingerprint: over ids, image hashes, groups, splits, classes and targets.
    clipped: share of annotated foreground pixels outside the intensity window, None without a window.
    category_ids: what the set's own annotations call each class but the background; empty where nothing.
    bits: of a channel of its images, 8, 16, or 32 for fractions; None where that was not kept.
    """

    name: str
    root: str
    classes: tuple[str, ...]
    tasks: tuple[str, ...]
    fingerprint: str
    clipped: float | None = None
    notes: tuple[str, ...] = field(default=())
    category_ids: tuple[int, ...] = ()
    bits: int | None = None

    @classmethod
    def from_json(cls, data: object) -> "DataInfo":
        """What a cache or a card keeps of a data set; raises FieldError that names every field that is wrong."""
        return made(cls, data, "What is said of a data set")

    def faults(self) -> list[Fault]:
        """Values that no data set has: see `from_json`."""
        return limits({
            "classes": (1 <= len(self.classes) <= MOST_CLASSES, f"1 to {MOST_CLASSES} names", self.classes),
            "category_ids": (len(self.category_ids) in (0, len(self.classes) - 1),
                             "none, or one for each class but the background", self.category_ids),
            "bits": (self.bits is None or 1 <= self.bits <= 64, "1 to 64", self.bits),
        })  # fmt: skip
