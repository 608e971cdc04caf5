"""What readers share of labels: boxes and polygons that lie in their image, numbers, sizes, class names."""

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from featprobe.datasets.coco import SLACK
from featprobe.datasets.decode import stored_page
from featprobe.datasets.files import is_missing, kept_below, read_text
from featprobe.datasets.pages import count_pages, page_of
from featprobe.datasets.samples import listed
from featprobe.datasets.tiff import NODATA
from featprobe.errors import DataError, LabelSizeError, OutOfImageError
from featprobe.geometry import Size
from featprobe.targets import IGNORE, Instance, Labels, Rle, encode_rle


def to_numbers(values: Sequence[Any], where: object) -> list[float]:
    """Finite numbers. Raises DataError, naming `where`."""
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{where}: wanted numbers, found {str(list(values))[:200]}.") from error
    if not all(math.isfinite(number) for number in numbers):
        raise DataError(f"{where}: wanted finite numbers, found {str(list(values))[:200]}.")
    return numbers


def box_instance(category: int, box: Sequence[float], size: Size, where: object, crowd: bool = False) -> Instance:
    """An object of a box x1 y1 x2 y2, pixels; it may pass the image's edge by a pixel, which is clipped.

    Raises OutOfImageError, naming `where`, for a box that is empty or lies elsewhere.
    """
    height, width = size
    x1, y1, x2, y2 = box
    if not (-SLACK <= x1 < x2 <= width + SLACK and -SLACK <= y1 < y2 <= height + SLACK):
        raise OutOfImageError(
            f"{where}: the box is empty or leaves the image.\n"
            f"  wanted  0 <= x1 < x2 <= {width}, 0 <= y1 < y2 <= {height} pixels\n"
            f"  found   x1, y1, x2, y2 = {', '.join(f'{v:g}' for v in box)}"
        )
    clipped = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
    return Instance(category, clipped, crowd=crowd)


def polygon_instance(category: int, parts: Sequence[NDArray[np.float64]], size: Size, where: object) -> Instance:
    """An object of polygons, each (points, 2), pixels, x y; they may pass the image's edge by a pixel.

    Raises DataError, naming `where`, for fewer than three points; OutOfImageError for points elsewhere.
    """
    height, width = size
    short = [len(part) for part in parts if len(part) < 3]
    if short:
        raise DataError(f"{where}: a polygon of {short[0]} points. wanted: three or more.")
    flat = [part.ravel().tolist() for part in parts]
    xs, ys = ([value for part in flat for value in part[axis::2]] for axis in (0, 1))
    x1, x2, y1, y2 = min(xs), max(xs), min(ys), max(ys)
    inside = -SLACK <= x1 and x2 <= width + SLACK and -SLACK <= y1 and y2 <= height + SLACK
    if not inside or math.isnan(sum(xs) + sum(ys)):  # of nan there is no smallest, and pycocotools would never end
        raise OutOfImageError(
            f"{where}: the polygon leaves the image.\n"
            f"  wanted  0 <= x <= {width}, 0 <= y <= {height} pixels\n"
            f"  found   x {x1:g} to {x2:g}, y {y1:g} to {y2:g}"
        )
    box = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
    if box != (x1, y1, x2, y2):
        flat = [part.clip(0, (width, height)).ravel().tolist() for part in parts]
    rle = coco_mask.merge(coco_mask.frPyObjects(flat, height, width))
    return Instance(category, box, _text_rle(rle))


def mask_instance(category: int, mask: NDArray[np.bool_]) -> Instance:
    """An object of a (height, width) mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
    return Instance(category, box, encode_rle(mask), area=float(mask.sum()))


def _text_rle(rle: Any) -> Rle:
    return {"size": [int(s) for s in rle["size"]], "counts": rle["counts"].decode("ascii")}


def check_size(found: Size, size: Size, where: object) -> None:
    """Raise LabelSizeError, naming `where`, when an annotation or mask is of another (height, width) than its image."""
    if found != size:
        raise LabelSizeError(
            f"{where} is of another size than its image.\n"
            f"  wanted  {size[0]}x{size[1]} pixels (height x width)\n  found   {found[0]}x{found[1]}"
        )


def stored_pixels(path: Path) -> tuple[str, NDArray[Any]]:
    """A mask's pixel format, as Pillow calls it, and its values as stored.

    Raises DataError where it can't be read, and for a file of several images.
    """
    file, page = page_of(path)
    if not file.is_file():
        raise DataError(f"There is no mask {path} for the image of that name.")
    if page is not None:
        return stored_page(path)
    try:
        with Image.open(path) as image:
            if NODATA in getattr(image, "tag_v2", ()):
                return stored_page(path)
            count = count_pages(path) if image.format == "TIFF" else getattr(image, "n_frames", 1)
            if count > 1:
                raise DataError(f"{path} holds {count} images. wanted: one mask, or as many as its image has pages.")
            return image.mode, np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} can't be read as a mask: {error}.") from error


def read_pixels(path: Path, modes: Sequence[str], wanted: str) -> NDArray[np.uint8]:
    """An 8-bit mask's values as stored, indices for a palette. Raises DataError for another pixel format."""
    mode, values = stored_pixels(path)
    if mode not in modes:
        raise DataError(f"{path} is a mask of the pixel format {mode}. wanted: {wanted}.")
    return values.astype(np.uint8)


def read_binary(path: Path, above: int = 0) -> Labels:
    """A mask of 0 and 1 from a grey one: 1 where it is brighter than `above`. Raises DataError."""
    values = read_pixels(path, ("L", "P", "1"), "8-bit grey")
    return (values > above).astype(np.uint8)  # (height, width)


def check_classes(classes: Sequence[str], where: object) -> tuple[str, ...]:
    """Class names, the background first. Raises DataError when they are too many, too few, or not distinct."""
    if not 2 <= len(classes) < IGNORE or len(set(classes)) < len(classes):
        raise DataError(
            f"{where} names {len(classes)} classes ({', '.join(classes)[:200]}).\n"
            f"  wanted  2 to {IGNORE - 1}, each once, the background first"
        )
    return tuple(classes)


def class_lines(root: Path, given: Sequence[str] | None = None) -> tuple[list[str], str] | None:
    """The lines that name a set's classes and where they stand: those given, else of its classes.txt; None without.

    Raises DataError.
    """
    path = root / "classes.txt"
    if given is None and is_missing(path):
        return None
    lines = read_text(kept_below(root, path)).splitlines() if given is None else given
    where = f"{path}" if given is None else f"What names the classes of {root}"
    return [line.strip() for line in lines if line.strip()], where


def read_classes(root: Path, given: Sequence[str] | None = None) -> tuple[str, ...] | None:
    """Class names, one a line, the background first, as `class_lines` finds them. Raises DataError."""
    found = class_lines(root, given)
    return None if found is None else check_classes(*found)


def check_known(labels: Collection[str], classes: Sequence[str], root: Path) -> None:
    """Raise DataError where labels are none of the classes that were named."""
    unknown = sorted(set(labels) - set(classes))
    if unknown:
        raise DataError(
            f"What names the classes of {root} does not name {listed(unknown)}. It names: {', '.join(classes)}."
        )
