"""Augmented views of training images, with their masks and boxes: crops that hold defects, flips, grey levels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import box_area
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as v2

from featprobe.geometry import Placement, Size
from featprobe.probes import ObjectTarget
from featprobe.specs import FeatureRecipe
from featprobe.stages.extraction.crops import Augmentation, choose_crop, place_crop
from featprobe.targets import IGNORE, LEAST_VISIBLE, Instance, Labels, decode_rle

WHOLE_SHARE = 0.999  # share of a box from which on all of its object is in view
SMALLEST_SIDE = 1.0  # frame pixels, of a box that is an object


@dataclass(frozen=True)
class ViewPlan:
    """The part of an image that is shown, decided before a pixel is read.

    crop: top, left, height and width, pixels. placement: of the crop in the frame. hflip, vflip: whether it is turned
    over. contrast, brightness: changes of grey levels.
    """

    crop: tuple[int, int, int, int]
    placement: Placement
    hflip: bool
    vflip: bool
    contrast: float
    brightness: float

    def cut(self, plane: Any) -> Any:
        """The crop of an array of (height, width, …)."""
        top, left, height, width = self.crop
        return plane[top : top + height, left : left + width]

    def turned(self, x: Tensor) -> Tensor:
        """A crop, (…, height, width), at its size in the frame, turned over as planned."""
        for flip, planned in ((v2.hflip, self.hflip), (v2.vflip, self.vflip)):
            x = flip(x) if planned else x
        return x.as_subclass(Tensor)


@dataclass(frozen=True)
class FramedImage:
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
) -> FramedImage:
    """A random view of an image.

    unit: (height, width) or (height, width, 3), [0, 1], original size. labels: class indices of its pixels. instances:
    in its pixels. masks: whether the objects' masks are wanted.
    """
    size = (unit.shape[0], unit.shape[1])
    plan = plan_view(size, labels, instances, recipe, how, random)
    crop = plan.cut(unit)
    plane = torch.from_numpy(crop if crop.ndim == 3 else crop[:, :, None]).movedim(2, 0)  # (1 or 3, height, width)
    image = draw_image(plane, plan, recipe.interpolation, padding_of(recipe, plane.device))
    seen = None if labels is None else draw_labels(torch.tensor(plan.cut(labels)), plan)
    objects = None if instances is None else draw_objects(instances, size, plan, masks=masks)
    return FramedImage(image, plan.placement.content, seen, objects)


def plan_view(
    size: Size,
    labels: Labels | None,
    instances: Sequence[Instance] | None,
    recipe: FeatureRecipe,
    how: Augmentation,
    random: np.random.Generator,
) -> ViewPlan:
    """Draw a random view of an image of (height, width). Arguments as of `augment`."""
    crop = choose_crop(size, labels, instances, how, random)
    placement = place_crop(crop[2:], size, recipe)
    hflip, vflip = (bool(random.random() < p) for p in (how.hflip, how.vflip))
    contrast, brightness = random.uniform(-1, 1) * how.contrast, random.uniform(-1, 1) * how.brightness
    return ViewPlan(crop, placement, hflip, vflip, contrast, brightness)


def padding_of(recipe: FeatureRecipe, device: torch.device) -> Tensor:
    """The value of padding: (3, 1, 1)."""
    return torch.tensor(recipe.mean, dtype=torch.float32, device=device)[:, None, None]


def draw_image(crop: Tensor, plan: ViewPlan, interpolation: str, padding: Tensor) -> Tensor:
    """The planned view of an image in its frame: (3, frame height, frame width), float32, [0, 1].

    crop: (1 or 3, height, width), [0, 1], on any device. padding: see `mean_of`. Nothing here waits for the device.
    """
    size = list(plan.placement.content)
    image = plan.turned(v2.resize(tv_tensors.Image(crop), size, InterpolationMode(interpolation)))
    middle = image.mean()
    image = (middle + (image - middle) * (1 + plan.contrast) + plan.brightness).clamp(0, 1)
    framed = padding.repeat(1, *plan.placement.frame)
    framed[:, : size[0], : size[1]] = image
    return framed


def draw_labels(crop: Tensor, plan: ViewPlan, fill: int = IGNORE) -> Tensor:
    """The planned view of a mask in its frame: (frame height, frame width), uint8. crop: (height, width), uint8."""
    size = list(plan.placement.content)
    framed = torch.full(plan.placement.frame, fill, dtype=torch.uint8, device=crop.device)
    resized = v2.resize(tv_tensors.Mask(crop), size, InterpolationMode.NEAREST)
    framed[: size[0], : size[1]] = plan.turned(resized)
    return framed


def draw_objects(instances: Sequence[Instance], size: Size, plan: ViewPlan, *, masks: bool) -> ObjectTarget:
    """The objects of an image of (height, width) as the planned view shows them, in frame pixels, on the host.

    If an object has a mask, the mask decides what is seen of it: the box of a bent crack may be in view without it.
    """
    placement = plan.placement
    raw = torch.tensor([i.box_xyxy for i in instances], dtype=torch.float32).reshape(-1, 4)
    seen = tv_tensors.BoundingBoxes(raw, format="XYXY", canvas_size=size)
    boxes = plan.turned(v2.resized_crop(seen, *plan.crop, list(placement.content)))
    scale = float(np.prod(np.divide(placement.content, placement.original)))
    share = box_area(boxes) / (box_area(raw) * scale).clamp(min=1e-6)  # of each that is seen
    layers: list[Tensor] = []
    whole = torch.zeros(len(instances), dtype=torch.bool)
    for i, instance in enumerate(instances):
        if instance.rle is not None and share[i] > 0 and (masks or share[i] < WHOLE_SHARE):
            mask = decode_rle(instance.rle).astype(np.uint8)
            layer = draw_labels(torch.from_numpy(plan.cut(mask)), plan, 0)
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
