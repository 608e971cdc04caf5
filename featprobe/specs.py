"""Frozen values that stages hand to each other, and the keys made from them."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from featprobe.errors import DataError
from featprobe.geometry import IDENTITY, MOST_PIXELS, MOST_SIDE, Fit, Size
from featprobe.image_labels import LabelNames, tasks_served
from featprobe.intensity import Intensity
from featprobe.io.fields import Fault, limits, made, wrong
from featprobe.io.texts import WHOLE_TEXT, are_whole
from featprobe.levels import FeatureLevel
from featprobe.tiling import SETTINGS, Tiling, keeps_own_split, parse_views

CacheDtype = Literal["fp16", "fp32", "bf16", "int8"]
"""How a cache stores features. int8: a byte for each value, and for each channel of a row a scale and a zero."""
CachePrecision = Literal["fp32", "tf32", "amp"]
"""Precision of a backbone: float32, TF32 on CUDA, or autocast to fp16 on CUDA."""
Precision = Literal["fp32", "tf32", "amp", "bf16"]
"""fp32: float32 alone, no TF32. tf32: float32 whose factors are cut to 10 bits of fraction in matrix products and
convolutions on CUDA. amp, bf16: autocast to float16, bfloat16."""
CacheStore = Literal["maps", "pooled"]
"""What a cache keeps of each level: its map, or the mean and the maximum of each channel over the image's cells."""
Rows = NDArray[np.intp]
"""Indices of a cache's rows."""
RECIPE_VERSION = 2
"""Version of the recipe of a cache of tiles or views; that of whole images is 1. Part of its key."""

MODULE, PACKAGE = "module:", "package:"
"""What the model of a backbone begins with that is not timm's: an object's class, an entry point's name."""

BYTES_PER_VALUE: Mapping[str, int] = {"fp16": 2, "bf16": 2, "fp32": 4, "int8": 1}
BYTES_PER_CHANNEL: Mapping[str, int] = {"int8": 8}
"""Bytes per channel of a row, beside its values: scale and zero, float32."""
BYTES_PER_POOLED_CHANNEL = 8
"""Mean and maximum, float32."""
MOST_LEVELS, MOST_CHANNELS, MOST_STRIDE, MOST_CLASSES = 64, 2**16, 2**12, 255
"""Limits of what a file may claim: levels of a recipe, channels and stride of a level, classes of a set."""
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
    """A network and its weights.

    label: what the user calls it; it names files and table rows.
    model: timm's full model name; or `module:` and the class of an object, `package:` and the name of an entry point.
    source: "hub" (timm's own download), "embedded" (from the package index), "file", "random", or "own": as the module
    that is given, or that a package makes, has them.
    weights: the file's path where source is "file".
    final_norm: whether the last normalisation layer is applied; None: the default of the pretraining.
    arguments: of the command line, that name this very backbone.
    """

    label: str
    model: str
    source: Literal["hub", "embedded", "file", "random", "own"] = "hub"
    weights: str | None = None
    seed: int = 0
    final_norm: bool | None = None
    arguments: tuple[str, ...] = ()

    @property
    def is_own(self) -> bool:
        """Whether its network is not timm's."""
        return self.model.startswith((MODULE, PACKAGE))

    @property
    def network(self) -> str:
        """What messages call its network: timm's name, or what the user calls your own."""
        return self.label if self.is_own else self.model

    @property
    def words(self) -> tuple[str, ...]:
        """The words that name it on a command line."""
        return self.arguments or ("--backbone", self.label)

    @classmethod
    def from_json(cls, data: object) -> "BackboneSpec":
        """The spec that a cache or a card keeps; raises FieldError."""
        return made(cls, data, "What says where a backbone comes from")


@dataclass(frozen=True)
class FeatureRecipe:
    """Everything that decides a cached feature's value, apart from the image itself.

    Its `key` names the cache file. `label` is how people call the backbone; it is not part of the key.
    window: the raw levels that become 0 and 1, where the intensity policy resolved to one for the whole set.
    precision: what the backbone computed in; see backbones.precision.
    tile, overlap, empty_tiles: see Tiling; a tile of None stands for whole images. views: of the training images; the
    first is the image as it is.
    empty_pixels: what pixels become that a header calls empty, `0`; "" for a set that has no such headers.
    sized: whether timm built the network for the frame, since as it was it would have computed something else.
    store: what rows keep of each level. Maps are rounded to `dtype` before they are pooled.
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
    store: CacheStore = "maps"

    @property
    def key(self) -> str:
        """64 hex digits over every field but the label."""
        return digest({k: v for k, v in self.to_json().items() if k != "label"})

    @property
    def in_parts(self) -> bool:
        """Whether rows show tiles or views of images, so that they are not the images themselves."""
        return self.tile is not None or len(self.views) > 1

    @property
    def tiling(self) -> Tiling | None:
        """How images were cut; None for whole images."""
        return None if self.tile is None else Tiling(self.tile, self.overlap, self.empty_tiles)

    @property
    def further_views(self) -> tuple[str, ...]:
        """Views of training images that are stored beside the images as they are."""
        return self.views[1:]

    @property
    def keeps_own_split(self) -> bool:
        """Whether rows serve the set's own split alone: its training images have more rows than others, or fewer."""
        return keeps_own_split(self.tiling, self.further_views)

    @property
    def shown(self) -> tuple[object, ...]:
        """The parts of images that the rows show, for keys of comparisons: further views, and the settings of tiles."""
        return (self.further_views, *(getattr(self, name) for name in SETTINGS))

    @property
    def policy(self) -> Intensity:
        """How raw levels become [0, 1], together with `window`."""
        return Intensity.parse(self.intensity)

    @property
    def row_bytes(self) -> int:
        """Bytes that one image's features take."""
        values = sum(lv.channels * lv.cells(self.frame)[0] * lv.cells(self.frame)[1] for lv in self.levels)
        channels = sum(level.channels for level in self.levels)
        if self.store == "pooled":
            return channels * BYTES_PER_POOLED_CHANNEL
        return values * BYTES_PER_VALUE[self.dtype] + channels * BYTES_PER_CHANNEL.get(self.dtype, 0)

    @property
    def kept_as(self) -> str:
        """The number format of a row's maps, for people; or that they are pooled."""
        return self.dtype if self.store == "maps" else f"{self.store} from {self.dtype}"

    def to_json(self) -> dict[str, Any]:
        """Plain values, as caches and cards keep them; of tiles, empty pixels, `sized`, `store` only what holds."""
        idle = [name for name in ("empty_pixels", "sized", "store") if getattr(self, name) == getattr(type(self), name)]
        idle += SETTINGS if self.tile is None else ()
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
            "version": (1 <= self.version <= RECIPE_VERSION, f"1 to {RECIPE_VERSION}", self.version),
            "views": (self.views[:1] == (IDENTITY,), f"{IDENTITY}, then others", self.views),
            "store": (self.store == "maps" or self.dtype != "int8", "maps beside dtype int8", self.store),
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
            "views": lambda: parse_views(",".join(self.further_views) or "none"),
        }
        for name, parse in parsers.items():
            try:
                parse()
            except DataError:
                found.append(wrong((name,), "what extract takes", getattr(self, name)))
        return found


@dataclass(frozen=True)
class DataInfo:
    """The facts about its data set that a cache keeps.

    fingerprint: over ids, image hashes, groups, splits, classes and targets.
    clipped: share of annotated foreground pixels outside the intensity window, None without a window.
    category_ids: what the set's own annotations call each class but the background; empty where nothing.
    bits: of a channel of its images, 8, 16, or 32 for fractions; None where that was not kept.
    label_names: the labels of its images as a whole; None where they have none.
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
    label_names: LabelNames | None = None

    @property
    def serves(self) -> tuple[str, ...]:
        """The tasks that all its labels can serve: `tasks`, and those of whole images."""
        return tasks_served(self.tasks, self.label_names)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as caches and cards keep them; labels of images only where there are some."""
        return {name: value for name, value in asdict(self).items() if name != "label_names" or value}

    @classmethod
    def from_json(cls, data: object) -> "DataInfo":
        """Parse the facts that a cache or card keeps of a data set; raises FieldError that names every wrong field."""
        return made(cls, data, "The description of a data set")

    def faults(self) -> list[Fault]:
        """Values that no data set has: see `from_json`."""
        own = limits({
            "name": (are_whole(self.name), WHOLE_TEXT, self.name),
            "root": (are_whole(self.root) and "\0" not in self.root, "a path", self.root),
            "notes": (are_whole(*self.notes), WHOLE_TEXT, self.notes),
            "classes": (1 <= len(self.classes) <= MOST_CLASSES and are_whole(*self.classes),
                        f"1 to {MOST_CLASSES} names", self.classes),
            "category_ids": (len(self.category_ids) in (0, len(self.classes) - 1),
                             "none, or one for each class but the background", self.category_ids),
            "bits": (self.bits is None or 1 <= self.bits <= 64, "1 to 64", self.bits),
        })  # fmt: skip
        return own + [fault.below("label_names") for fault in (self.label_names.faults() if self.label_names else ())]
