"""How raw grey levels become numbers from 0 to 1."""

import math
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from featprobe.errors import DataError


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
    @lru_cache
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
            "          :log after window (0 < LO), percentile or minmax, :image after percentile, minmax or log"
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
