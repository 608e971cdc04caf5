"""One image of a set that is given as arrays: its levels, its labels, and what makes them unusable."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from featprobe.datasets.formats.labelled import SEVERAL
from featprobe.datasets.images.pixels import Levels
from featprobe.datasets.objects import box_instance, mask_instance
from featprobe.datasets.samples import listed
from featprobe.datasets.values import shown
from featprobe.errors import DataError, counted, nearest
from featprobe.geometry import Size
from featprobe.io.pictures import check_claim
from featprobe.targets import IGNORE, Instance, Labels, Target, values_in

Bits = Literal[8, 16, 32]
"""How many bits fractions stand for; 32: they are levels of their own, kept as float32."""
Kind = Literal["pixels", "objects", "images"]
"""What labels are of."""
MODES = ("L", "RGB", "I;16", "I;16L", "I;16B")
"""Modes of Pillow whose pixels are grey levels or red, green and blue."""
OFF = 0.25  # of a level by which a fraction may miss it, as rounding to float16 does
SHOWN = 8  # names in a message


class Given(NamedTuple):
    """What is given of one image. Fields that are None are not given."""

    image: Any
    mask: Any = None
    boxes: Any = None
    labels: Any = None
    crowd: Any = None
    group: Any = None
    split: Any = None
    name: Any = None


@dataclass(frozen=True)
class Wanted:
    """What the images of a set must be. classes: names, the background first unless labels are `of` images; of these
    it may be empty."""

    of: Kind
    classes: tuple[str, ...]
    bits: Bits | None

    def levels(self, image: Any, where: str) -> Levels:
        """Raw levels (height, width) or (height, width, 3), uint8, uint16 or float32. Raises DataError."""
        if isinstance(image, Image.Image) and image.mode not in MODES:
            raise DataError(
                f"{where}: an image of mode {image.mode}. wanted: L, RGB or I;16. Convert it: image.convert('RGB')"
            )
        values = _array(image, where)
        if values.dtype.kind not in "biufc":
            raise DataError(f"{where}: {type(image).__name__} {shown(image)}. wanted: an array of levels, or an image")
        if is_tensor(image) and values.ndim == 3:  # torch has the channels first
            values = np.moveaxis(values, 0, 2)
        if isinstance(values, np.ma.MaskedArray):
            raise DataError(f"{where}: a masked array. wanted: levels for all pixels. Fill it: image.filled(0)")
        if values.ndim == 3 and values.shape[2] == 1:
            values = values[:, :, 0]
        if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] != 3):
            first = " Its channels stand first: move them, np.moveaxis(image, 0, -1)."
            hint = first if values.ndim == 3 and values.shape[0] in (1, 3) else ""
            raise DataError(f"{where}: the shape {values.shape}. wanted: (height, width) or (height, width, 3).{hint}")
        check_claim(where, *values.shape[:2])
        return self._of_depth(np.ascontiguousarray(values), where)

    def _of_depth(self, values: Any, where: str) -> Levels:
        """The same values as uint8, uint16 or float32, none of them changed."""
        kind, size = values.dtype.kind, values.dtype.itemsize
        if kind == "u" and size in (1, 2):
            if self.bits not in (None, 8 * size):
                raise DataError(f"{where}: levels of {8 * size} bits. wanted: {self.bits}, as bits= says.")
            native: Levels = values.astype(values.dtype.newbyteorder("="), copy=False)
            return native
        if kind != "f":
            low, high = (f"{v:d}" if kind in "iu" else str(v) for v in (values.min(), values.max()))
            raise DataError(
                f"{where}: {values.dtype}, {low} to {high}. wanted: uint8 or uint16. "
                "Where these are levels from 0 on: image.astype(np.uint8) or np.uint16"
            )
        if not np.isfinite(values).all():
            raise DataError(f"{where}: pixels that are not finite.")
        span = f"{values.dtype}, {float(values.min()):g} to {float(values.max()):g}"
        if self.bits is None:
            raise DataError(
                f"{where}: {span}. wanted: uint8 or uint16, as a camera gives them. Give the levels from before they "
                "became fractions; or say what they were: bits=8 for level / 255, bits=16 for level / 65535, bits=32 "
                "for values that never were levels"
            )
        if self.bits == 32:
            largest = float(np.finfo(np.float32).max)
            if np.abs(values).max() > largest:
                raise DataError(f"{where}: {span}. wanted: values that float32 holds, up to {largest:.3g}")
            fractions: Levels = values.astype(np.float32)
            return fractions
        top = (1 << self.bits) - 1
        scaled = values.astype(np.float64) * top
        found: Any = np.rint(scaled)
        if found.min() < 0 or found.max() > top or np.abs(scaled - found).max() > OFF:
            raise DataError(
                f"{where}: {span}, which are not levels of {self.bits} bits divided by {top}. Normalised, resized or "
                "augmented images can't be turned back. Give them as they were before"
            )
        levels: Levels = found.astype(f"u{self.bits // 8}")
        return levels

    def target(self, given: Given, size: Size, where: str) -> Target:
        """The labels of pixels or of objects of an image of this size. Raises DataError."""
        if self.of == "pixels":
            return Target(self._mask(given.mask, size, where), None)
        return Target(None, self._objects(given, size, where))

    def _mask(self, mask: Any, size: Size, where: str) -> Labels:
        values = _whole(mask, f"{where}, mask")
        if values.shape != size:
            wanted = f"{size}, as its image"
            raise DataError(f"{where}: a mask of the shape {values.shape}. wanted: {wanted}.")
        fits = values.min() >= 0 and values.max() <= IGNORE
        held = values_in(values.astype(np.uint8)) if fits else np.unique(values).tolist()
        beyond = [v for v in held if not 0 <= v < len(self.classes) and v != IGNORE]
        if beyond:
            raise DataError(
                f"{where}: a mask with {listed(list(map(str, beyond)), SHOWN)}. wanted: 0 to {len(self.classes) - 1}, "
                f"one for each of the classes {listed(self.classes, SHOWN)}, or {IGNORE} for pixels that don't count"
            )
        return values.astype(np.uint8)

    def _objects(self, given: Given, size: Size, where: str) -> tuple[Instance, ...]:
        boxes = None if given.boxes is None else _numbers(given.boxes, f"{where}, boxes")
        masks = None if given.mask is None else _whole(given.mask, f"{where}, masks of objects")
        count = next(len(np.atleast_1d(own)) for own in (boxes, masks) if own is not None)
        if boxes is not None and count and boxes.shape != (count, 4):
            raise DataError(f"{where}: boxes of the shape {boxes.shape}. wanted: (objects, 4): x1, y1, x2, y2, pixels")
        if masks is not None and (len(np.atleast_1d(masks)) or count) and masks.shape != (count, *size):
            wanted = f"(objects, height, width), {(count, *size)}"
            raise DataError(f"{where}: masks of the shape {masks.shape}. wanted: {wanted}")
        labels = self._classes_of(given.labels, count, where)
        crowd = np.zeros(count) if given.crowd is None else _whole(given.crowd, f"{where}, crowds")
        if crowd.shape != (count,):
            raise DataError(f"{where}: marks of crowds of the shape {crowd.shape}. wanted: ({count},), one per object")
        found = []
        for i, label in enumerate(labels):
            own = f"{where}, object {i}"
            drawn = None if masks is None else masks[i] != 0
            if drawn is not None and not drawn.any():
                raise DataError(f"{own}: its mask is empty. wanted: one pixel or more")
            whole = None if drawn is None else mask_instance(label, drawn)
            if boxes is None and whole:
                found.append(replace(whole, crowd=bool(crowd[i])))
            elif boxes is not None:
                rle, area = (whole.rle, whole.area) if whole else (None, None)
                found.append(box_instance(label, boxes[i].tolist(), size, own, bool(crowd[i]), rle, area))
        return tuple(found)

    def _classes_of(self, labels: Any, count: int, where: str) -> list[int]:
        """The class of each object."""
        if labels is None and len(self.classes) == 2:
            return [1] * count
        if labels is None:
            found = counted(count, "object")
            raise DataError(f"{where}: no labels for its {found}. wanted: labels=, as there are several classes")
        values = _whole(labels, f"{where}, labels")
        if values.shape != (count,) and (values.size or count):
            raise DataError(f"{where}: labels of the shape {values.shape}. wanted: ({count},), one for each object")
        beyond = [v for v in values.ravel().tolist() if not 1 <= v < len(self.classes)]
        if beyond:
            raise DataError(
                f"{where}: objects of the classes {listed(list(map(str, dict.fromkeys(beyond))), SHOWN)}. wanted: 1 to "
                f"{len(self.classes) - 1} of {listed(self.classes, SHOWN)}"
            )
        return [int(v) for v in values.ravel()]

    def names(self, labels: Any, where: str) -> tuple[tuple[str, ...], bool]:
        """The labels of a whole image as names, and whether they are given as several. Raises DataError."""
        several = isinstance(labels, list | tuple | set | frozenset)
        each = list(labels) if several else [labels]
        return tuple(dict.fromkeys(self._name(label, where) for label in each)), several

    def _name(self, label: Any, where: str) -> str:
        if isinstance(label, str):
            if self.classes and label not in self.classes:
                raise DataError(f"{where}: the label {shown(label)}. {nearest(label, self.classes)}")
            return self._sound(str(label), where)
        value = _array(label, where)
        if value.ndim or value.dtype.kind not in "iub":
            raise DataError(f"{where}: the label {shown(label)}. wanted: a name, or the number of a class")
        if not self.classes:
            raise DataError(f"{where}: the label {value}, and no names of classes. wanted: names, or classes=")
        if not 0 <= value < len(self.classes):
            raise DataError(f"{where}: the label {value}. wanted: 0 to {len(self.classes) - 1}, as there are classes")
        return self._sound(self.classes[int(value)], where)

    def _sound(self, name: str, where: str) -> str:
        """A label, as long as a table can hold it. Raises DataError."""
        if not name.strip() or name != name.strip() or not name.isprintable() or SEVERAL in name:
            raise DataError(f"{where}: the label {shown(name)}. wanted: a name without {SEVERAL} and blanks around it")
        return name


def is_tensor(value: Any) -> bool:
    """Whether a value is a tensor of torch, which is not imported for that."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def plain(value: Any) -> NDArray[Any]:
    """A value as numpy has it; tensors may lie on any device. Raises ValueError for lists of uneven lengths."""
    if not is_tensor(value):
        return np.asanyarray(value)
    numbers = value.detach().cpu()
    found: NDArray[Any] = (numbers.float() if numbers.is_floating_point() else numbers).numpy()  # numpy has no bfloat16
    return found


def _array(value: Any, where: str) -> NDArray[Any]:
    """The same. Raises DataError for what is no array."""
    try:
        return plain(value)
    except ValueError as error:
        raise DataError(f"{where}: lists of uneven lengths. wanted: an array") from error


def _whole(value: Any, where: str) -> NDArray[Any]:
    """Whole numbers. Raises DataError for others; an empty list has none."""
    if value is None:
        raise DataError(f"{where}: None. wanted: one for each image; empty, or zeros, where an image holds nothing")
    values = _array(value, where)
    if values.dtype.kind not in "iub" and values.size:
        raise DataError(f"{where}: {values.dtype}. wanted: whole numbers")
    return values


def _numbers(value: Any, where: str) -> NDArray[np.float64]:
    """Finite numbers. Raises DataError for others."""
    values = _array(value, where)
    if values.dtype.kind not in "iuf" or not np.isfinite(values).all():
        raise DataError(f"{where}: wanted finite numbers, found {shown(values.tolist())}")
    return values.astype(np.float64)


def check_several(images: Sequence[Any]) -> None:
    """Raise DataError for an array that is one image, and not images."""
    if isinstance(images, np.ndarray) or is_tensor(images):
        shape = tuple(images.shape)  # type: ignore[attr-defined]
        if len(shape) not in (3, 4) or (len(shape) == 3 and shape[-1] == 3):
            raise DataError(
                f"images has the shape {shape}, which looks like one image. Nothing was written.\n"
                "  wanted  (images, height, width) or (images, height, width, 3), or a list of images\n"
                "Give one image as a list: [image]"
            )
