"""Heat maps: a map's values as colours over a picture, on one scale that has the threshold in its middle."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

PLACES = (0.25, 0.5, 0.5 + 1e-9, 1.0)  # on the scale, whose first quarter is clear: good parts have such values too
COLOURS = ((25, 40, 110), (90, 180, 230), (255, 225, 90), (190, 20, 30))
"""At PLACES: blue below the threshold, yellow to red above it, told apart by people who see no red or green too."""
OPACITIES = (0.0, 0.5, 0.6, 0.75)  # at PLACES
BAR, HEIGHT, GAP = (160, 10), 18, 6  # pixels: width and height of the scale's bar, height of its strip


@dataclass(frozen=True)
class Heat:
    """A map to draw. values: (height, width), float32, >= 0, of the picture's pixels.

    threshold: in the middle of the scale, which goes from 0 to twice that; nan for none: then the scale goes to the
    largest value of this map.
    """

    values: NDArray[np.float32]
    threshold: float

    @property
    def top(self) -> float:
        """The value at the end of the scale."""
        top = float(self.values.max()) if np.isnan(self.threshold) else 2 * self.threshold
        return max(top, float(np.finfo(np.float32).tiny))

    @property
    def scale(self) -> str:
        """What the scale's bar shows, for people."""
        if np.isnan(self.threshold):
            return "pixels: 0 to the largest value of each map; no threshold"
        return f"pixels: 0 to {self.top:.3g} and more; colour changes at their own threshold, {self.threshold:.3g}"


def paint(picture: Image.Image, heat: Heat) -> Image.Image:
    """A picture, RGB of any size, under its heat map."""
    values = np.asarray(Image.fromarray(heat.values.astype(np.float32)).resize(picture.size, Image.Resampling.BILINEAR))
    colours, opacity = _of(values / heat.top)
    pixels = np.asarray(picture).astype(np.float32)
    mixed = pixels * (1 - opacity[..., None]) + colours * opacity[..., None]
    return Image.fromarray(mixed.round().astype(np.uint8))


def draw_scale(heat: Heat, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> Image.Image:
    """The colours of the scale and what they mean, on a white strip of this many pixels, or as many as it takes."""
    length = 3 * GAP + BAR[0] + int(font.getlength(heat.scale))
    strip = Image.new("RGB", (max(width, length), HEIGHT), "white")
    grey = Image.new("RGB", BAR, (190, 190, 190))
    ramp = Heat(np.broadcast_to(np.linspace(0, 2, BAR[0], dtype=np.float32), BAR[::-1]), 1.0)
    strip.paste(paint(grey, ramp), (GAP, (HEIGHT - BAR[1]) // 2))
    ImageDraw.Draw(strip).text((2 * GAP + BAR[0], 0), heat.scale, fill="black", font=font)
    return strip


def _of(shares: NDArray[np.floating]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Colours, (…, 3), in [0, 255], and opacities, (…), of places on the scale; those over its end have its colour."""
    found = [np.interp(shares, PLACES, own).astype(np.float32) for own in (*zip(*COLOURS, strict=True), OPACITIES)]
    return np.stack(found[:3], axis=-1), found[3]
