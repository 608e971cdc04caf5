"""Crops of training images: how they vary, and where one goes so that it shows a defect."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from featprobe.geometry import Placement, Size, place, place_tile
from featprobe.specs import FeatureRecipe
from featprobe.targets import IGNORE, Instance, Labels, decode_rle


@dataclass(frozen=True)
class Augmentation:
    """How training images vary.

    smallest: least side of a crop, as a share of the image's; a crop is resized to the frame, which is the scale
    jitter. defect: probability that a crop is placed so that it holds a defect. hflip, vflip: probabilities. contrast,
    brightness: largest change, as a share and in units of the [0, 1] that the intensity policy makes of the raw
    levels, so that 16-bit images keep their depth.
    """

    smallest: float = 0.5
    defect: float = 0.7
    hflip: float = 0.5
    vflip: float = 0.5
    contrast: float = 0.2
    brightness: float = 0.1

    def to_json(self) -> dict[str, float]:
        """Plain values, as cards keep them."""
        return asdict(self)


def place_crop(crop: Size, shown: Size, recipe: FeatureRecipe) -> Placement:
    """Place a crop of (height, width) where the image, or the tile, of (height, width) that it is cut from lies.

    A tile that is smaller than others stays at their scale, so a crop of it fills no more than the tile does.
    """
    asked, fit = recipe.size, recipe.fit
    if recipe.tile:
        asked, fit = place_tile(shown, recipe.tile, recipe.size, 1).content, "letterbox"
    return replace(place(crop, asked, fit, 1), frame=recipe.frame)


def choose_crop(
    size: Size,
    labels: Labels | None,
    instances: Sequence[Instance] | None,
    how: Augmentation,
    random: np.random.Generator,
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop of an image of (height, width), pixels.

    Where it is to hold a defect, it shows one random object whole, or as much of it as fits.
    """
    share = random.uniform(how.smallest, 1.0)
    lengths = [max(1, round(share * side)) for side in size]
    wanted = _some_defect(labels, instances, (lengths[0], lengths[1]), random) if random.random() < how.defect else None
    corner = []
    for axis, (side, length) in enumerate(zip(size, lengths, strict=True)):
        first, last = 0, side - length
        if wanted is not None:
            begin, end = wanted[1 - axis], wanted[3 - axis]
            low, high = sorted((end - length, begin))  # whole within, or, where it is longer, nothing but it
            first, last = (int(np.clip(v, first, last)) for v in (np.ceil(low), np.floor(high)))
        corner.append(int(random.integers(first, max(first, last) + 1)))
    return corner[0], corner[1], lengths[0], lengths[1]


def _some_defect(
    labels: Labels | None, instances: Sequence[Instance] | None, crop: Size, random: np.random.Generator
) -> tuple[float, float, float, float] | None:
    """Box, x1 y1 x2 y2, of a random object, or of a random pixel of a defect; None where there is none.

    A pixel too where the object is larger than the crop, (height, width), and has a mask.
    """
    if instances is not None:
        own = [instance for instance in instances if not instance.crowd]
        if not own:
            return None
        chosen = own[random.integers(len(own))]
        x1, y1, x2, y2 = chosen.box_xyxy
        if chosen.rle is None or (x2 - x1 <= crop[1] and y2 - y1 <= crop[0]):
            return chosen.box_xyxy
        labels = decode_rle(chosen.rle).astype(np.uint8)
    where = np.flatnonzero((labels > 0) & (labels < IGNORE)) if labels is not None else ()
    if labels is None or not len(where):
        return None
    y, x = divmod(int(where[random.integers(len(where))]), labels.shape[1])
    return x, y, x + 1, y + 1
