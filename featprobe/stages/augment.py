"""Augmented views of training images, with their masks and boxes: crops that hold defects, flips, grey levels."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import box_area
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as v2

from featprobe.geometry import Placement, Size, place, place_tile
from featprobe.probes import ObjectTarget
from featprobe.specs import FeatureRecipe
from featprobe.targets import IGNORE, LEAST_VISIBLE, Instance, Labels, decode_rle

WHOLE = 0.999  # share of a box from which on all of its object is in view
SMALLEST_SIDE = 1.0  # frame pixels, of a box that is an object
Warp = Callable[..., Any]


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


@dataclass(frozen=True)
class View:
    """An augmented image in its frame, and its labels there.

    image: (3, height, width), float32, [0, 1]. content: (height, width) of the image in the frame. labels: (height,
    width), uint8, padding 255. objects: in frame pixels. Each None where the task has none.
    """

    image: Tensor
    content: Size
    labels: Tensor | None
    objects: ObjectTarget | None


def augment(
    unit: NDArray[np.float32],
    labels: Labels | None,
    instances: Sequence[Instance] | None,
    recipe: FeatureRecipe,
    how: Augmentation,
    random: np.random.Generator,
    *,
    masks: bool = False,
) -> View:
    """A random view of an image.

    unit: (height, width) or (height, width, 3), [0, 1], original size. labels: class indices of its pixels. instances:
    in its pixels. masks: whether the objects' masks are wanted.
    """
    crop = choose_crop((unit.shape[0], unit.shape[1]), labels, instances, how, random)
    placement = place_crop(crop[2:], (unit.shape[0], unit.shape[1]), recipe)
    flips = [flip for flip, p in ((v2.hflip, how.hflip), (v2.vflip, how.vflip)) if random.random() < p]

    def warp(x: Tensor, interpolation: str = "nearest-exact") -> Tensor:
        x = v2.resized_crop(x, *crop, list(placement.content), InterpolationMode(interpolation))
        for flip in flips:
            x = flip(x)
        return x.as_subclass(Tensor)

    plane = torch.from_numpy(unit if unit.ndim == 3 else unit[:, :, None]).movedim(2, 0)  # (1 or 3, height, width)
    image = warp(tv_tensors.Image(plane), recipe.interpolation)
    middle = image.mean()
    contrast, brightness = random.uniform(-1, 1) * how.contrast, random.uniform(-1, 1) * how.brightness
    image = (middle + (image - middle) * (1 + contrast) + brightness).clamp(0, 1)
    framed = torch.tensor(recipe.mean, dtype=torch.float32)[:, None, None].repeat(1, *recipe.frame)
    framed[:, : placement.content[0], : placement.content[1]] = image
    seen = None if labels is None else _seen(labels, warp, placement, IGNORE)
    objects = None if instances is None else _objects(instances, (unit.shape[0], unit.shape[1]), warp, placement, masks)
    return View(framed, placement.content, seen, objects)


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


def _seen(mask: NDArray[np.uint8], warp: Warp, placement: Placement, fill: int) -> Tensor:
    """A mask as the view shows it: (frame height, frame width), uint8."""
    framed = torch.full(placement.frame, fill, dtype=torch.uint8)
    framed[: placement.content[0], : placement.content[1]] = warp(tv_tensors.Mask(torch.tensor(mask)))
    return framed


def _objects(instances: Sequence[Instance], size: Size, warp: Warp, placement: Placement, masks: bool) -> ObjectTarget:
    """The objects of an image of (height, width) as the view shows them, in frame pixels.

    What is seen of an object is told by its mask where it has one: the box of a bent crack may be in view without it.
    """
    raw = torch.tensor([i.box_xyxy for i in instances], dtype=torch.float32).reshape(-1, 4)
    boxes = warp(tv_tensors.BoundingBoxes(raw, format="XYXY", canvas_size=size))
    scale = float(np.prod(np.divide(placement.content, placement.original)))
    share = box_area(boxes) / (box_area(raw) * scale).clamp(min=1e-6)  # of each that is seen
    layers: list[Tensor] = []
    whole = torch.zeros(len(instances), dtype=torch.bool)
    for i, instance in enumerate(instances):
        if instance.rle is not None and share[i] > 0 and (masks or share[i] < WHOLE):
            mask = decode_rle(instance.rle).astype(np.uint8)
            layer = _seen(mask, warp, placement, 0)
            share[i] = float(layer.sum()) / max(mask.sum() * scale, 1e-6)
            boxes[i] = _box_of(layer)
        sized = bool((boxes[i, 2:] - boxes[i, :2] >= SMALLEST_SIDE).all())
        whole[i] = not instance.crowd and sized and bool(share[i] >= LEAST_VISIBLE)
        if masks and whole[i]:
            layers.append(layer)
    category = torch.tensor([instances[i].category for i in whole.nonzero()[:, 0].tolist()], dtype=torch.int64)
    drawn = (
        (torch.stack(layers) if layers else torch.zeros((0, *placement.frame), dtype=torch.uint8)) if masks else None
    )
    return ObjectTarget(boxes[whole], category, drawn, boxes[~whole & (share > 0)])


def _box_of(mask: Tensor) -> Tensor:
    """x1 y1 x2 y2 of a mask's pixels, (4,); zeros where it has none."""
    if not mask.any():
        return torch.zeros(4)
    (y1, y2), (x1, x2) = (mask.any(axis).nonzero()[[0, -1], 0].tolist() for axis in (1, 0))
    return torch.tensor([x1, y1, x2 + 1, y2 + 1], dtype=torch.float32)
