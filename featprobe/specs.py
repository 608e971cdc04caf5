"""Frozen values that stages hand to each other, and the keys made from them."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from featprobe.errors import DataError
from featprobe.geometry import Fit, Size
from featprobe.levels import FeatureLevel

CacheDtype = Literal["fp16", "fp32", "bf16"]
CACHE_VERSION = 1

BYTES_PER_VALUE: Mapping[str, int] = {"fp16": 2, "bf16": 2, "fp32": 4}


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


@dataclass(frozen=True)
class Intensity:
    """How raw grey levels become [0, 1].

    kind "window": low and high are raw levels. "percentile": low and high are percent of all pixels of
    the training images, one window for the whole data set. "minmax": that window from their extremes.
    "none": divide by the largest value of the file's own number format.
    """

    kind: Literal["window", "percentile", "minmax", "none"]
    low: float = 0.0
    high: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "Intensity":
        """Read `window:LO:HI`, `percentile:LO:HI`, `minmax` or `none`; raises DataError.

        >>> str(Intensity.parse("percentile:0.01:99.99"))
        'percentile:0.01:99.99'
        """
        if text in ("minmax", "none"):
            return cls(text)  # type: ignore[arg-type]
        found = re.fullmatch(r"(window|percentile):([0-9.eE+-]+):([0-9.eE+-]+)", text)
        try:
            low, high = (float(found[2]), float(found[3])) if found else (0.0, 0.0)
        except ValueError:
            found = None
        if not found or not low < high or (found[1] == "percentile" and not 0 <= low < high <= 100):
            raise DataError(
                f"{text!r} is not an intensity policy.\n"
                "  wanted  window:LO:HI (raw levels), percentile:LO:HI (0 <= LO < HI <= 100), minmax or none"
            )
        return cls(found[1], low, high)  # type: ignore[arg-type]

    def __str__(self) -> str:
        if self.kind in ("minmax", "none"):
            return self.kind
        return f"{self.kind}:{self.low:g}:{self.high:g}"


DEFAULT_16BIT = Intensity("percentile", 0.01, 99.99)


@dataclass(frozen=True)
class FeatureRecipe:
    """Everything that decides a cached feature's value, apart from the image itself.

    Its `key` names the cache file. `label` is how people call the backbone; it is not part of the key.
    window: the raw levels that become 0 and 1, where the intensity policy resolved to a window.
    precision: "fp32", or "amp" for autocast to fp16 on the device that computes.
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
    precision: Literal["fp32", "amp"] = "fp32"
    channels: str = "rgb, grey replicated"
    views: tuple[str, ...] = ("identity",)
    version: int = CACHE_VERSION

    @property
    def key(self) -> str:
        """64 hex digits over every field but the label."""
        return digest({k: v for k, v in asdict(self).items() if k != "label"})

    @property
    def row_bytes(self) -> int:
        """Bytes that one image's features take."""
        values = sum(lv.channels * lv.cells(self.frame)[0] * lv.cells(self.frame)[1] for lv in self.levels)
        return values * BYTES_PER_VALUE[self.dtype]

    def to_json(self) -> dict[str, Any]:
        """Plain values, as the cache and the cards keep them."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "FeatureRecipe":
        """The recipe that `to_json` wrote."""
        values = dict(data)
        values["levels"] = tuple(FeatureLevel(**level) for level in data["levels"])
        for name in ("size", "frame", "mean", "std", "views", "window"):
            values[name] = None if data[name] is None else tuple(data[name])
        return cls(**values)


@dataclass(frozen=True)
class DataInfo:
    """What a cache says of the data set that it was made from.

    fingerprint: over ids, image hashes, groups, splits, classes and targets.
    clipped: share of annotated foreground pixels outside the intensity window, None without a window.
    category_ids: what the set's own annotations call each class but the background; empty where nothing.
    bits: of a channel of its images, 8 or 16; None where that was not kept.
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
