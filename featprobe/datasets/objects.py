"""Labels for all readers: objects from boxes, polygons and masks, sizes, pixels of masks, class names."""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from featprobe.datasets.files import is_missing, kept_below, read_text, start_of
from featprobe.datasets.images.decode import NPY_START, stored_array, stored_page
from featprobe.datasets.images.pages import count_pages, page_of
from featprobe.datasets.images.tiff import NODATA
from featprobe.datasets.samples import listed
from featprobe.datasets.values import stated_side
from featprobe.datasets.values import to_numbers as to_numbers  # readers of other packages import it from here
from featprobe.errors import DataError, LabelSizeError, OutOfImageError, counted
from featprobe.geometry import Size
from featprobe.io.pictures import MASK_FORMATS, picture
from featprobe.targets import IGNORE, Instance, Labels, Rle, encode_rle

LONGEST_OUTLINE = 1 << 22  # pixels, of all polygons of an object
MERGED = 64  # masks that are joined at once
SHOWN = 3  # most places of objects in a note
SLACK = 1.0  # pixels by which a coordinate may pass the image's edge, because common exporters round


def box_instance(
    category: int,
    box: Sequence[float],
    size: Size,
    where: object,
    crowd: bool = False,
    rle: Rle | None = None,
    area: float | None = None,
) -> Instance:
    """An object from a box x1 y1 x2 y2 in pixels, clipped to the image; it may pass the image's edge by a pixel.

    rle, area: its mask and the mask's area, as in Instance. Raises OutOfImageError, naming `where`, for a box that is
    empty or leaves the image, and for a mask without a pixel: no prediction could ever match such an object.
    """
    if rle is not None and not coco_mask.area(rle):
        raise OutOfImageError(f"{where}: the mask is empty, so nothing can match it. wanted: one pixel or more.")
    height, width = size
    x1, y1, x2, y2 = box
    clipped = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
    if not (_is_inside(box, size) and clipped[0] < clipped[2] and clipped[1] < clipped[3]):
        raise OutOfImageError(
            f"{where}: the box is empty or leaves the image.\n"
            f"  wanted  0 <= x1 < x2 <= {width}, 0 <= y1 < y2 <= {height} pixels\n"
            f"  found   x1, y1, x2, y2 = {', '.join(f'{v:g}' for v in box)}"
        )
    return Instance(category, clipped, rle, crowd, area)


def polygon_instance(category: int, parts: Sequence[NDArray[np.float64]], size: Size, where: object) -> Instance:
    """An object from polygons, each (points, 2), x y in pixels; they may pass the image's edge by a pixel.

    Raises DataError, naming `where`, for fewer than three points; OutOfImageError for polygons that leave the image or
    cover no pixel.
    """
    short = [len(part) for part in parts if len(part) < 3]
    if short:
        raise DataError(f"{where}: a polygon of {short[0]} points. wanted: three or more.")
    height, width = size
    flat = [part.ravel().tolist() for part in parts]
    xs, ys = ([value for part in flat for value in part[axis::2]] for axis in (0, 1))
    box = (min(xs), min(ys), max(xs), max(ys))
    if math.isnan(sum(xs) + sum(ys)) or not _is_inside(box, size):  # nan has no smallest value
        raise OutOfImageError(
            f"{where}: the polygon leaves the image.\n"
            f"  wanted  0 <= x <= {width}, 0 <= y <= {height} pixels\n"
            f"  found   x {box[0]:g} to {box[2]:g}, y {box[1]:g} to {box[3]:g}"
        )
    clipped = (max(box[0], 0.0), max(box[1], 0.0), min(box[2], float(width)), min(box[3], float(height)))
    if clipped != box:
        flat = [part.clip(0, (width, height)).ravel().tolist() for part in parts]
    rle = _text_rle(drawn(flat, size, where))
    if not coco_mask.area(rle):
        raise OutOfImageError(
            f"{where}: the polygon covers no pixel.\n"
            f"  wanted  three distinct points or more around the middle of a pixel\n"
            f"  found   {len(set(zip(xs, ys, strict=True)))} distinct points, x {box[0]:g} to {box[2]:g}, "
            f"y {box[1]:g} to {box[3]:g}"
        )
    return Instance(category, clipped, rle)


def drawn(polygons: Sequence[Sequence[float]], size: Size, where: object) -> Any:
    """The union of polygons, each x y x y …, as pycocotools draws it. Raises DataError for outlines of absurd length.

    pycocotools takes memory for each pixel of an outline, and ends the process where it gets none. It joins masks one
    after another, in the square of their number, so they are joined by MERGED here, and these again.
    """
    outline = sum(_outline(polygon) for polygon in polygons)
    if outline > LONGEST_OUTLINE:
        raise DataError(
            f"{where}: the outline is {outline:.0f} pixels long. wanted: at most {LONGEST_OUTLINE}. It was not drawn."
        )
    parts = coco_mask.frPyObjects(polygons, *size)
    while len(parts) > MERGED:
        parts = [coco_mask.merge(parts[i : i + MERGED]) for i in range(0, len(parts), MERGED)]
    return coco_mask.merge(parts)


def _outline(polygon: Sequence[float]) -> float:
    """The steps that drawing a polygon takes, in pixels: of each side the longer of its width and its height."""
    points = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
    return float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum())


def _is_inside(box: Sequence[float], size: Size) -> bool:
    """Whether a box x1 y1 x2 y2 lies in an image of (height, width), up to a pixel."""
    x1, y1, x2, y2 = box
    return -SLACK <= x1 and x2 <= size[1] + SLACK and -SLACK <= y1 and y2 <= size[0] + SLACK


def mask_instance(category: int, mask: NDArray[np.bool_]) -> Instance:
    """An object from a (height, width) mask, which must not be empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
    return Instance(category, box, encode_rle(mask), area=float(mask.sum()))


def _text_rle(rle: Any) -> Rle:
    return {"size": [int(s) for s in rle["size"]], "counts": rle["counts"].decode("ascii")}


def check_stated(height: Any, width: Any, size: Size, where: object) -> None:
    """Raise LabelSizeError, naming `where`, when labels state another size than that of their image.

    0 and null state no size. Raises DataError for a value that is no whole number.
    """
    stated = stated_side(height, where), stated_side(width, where)
    check_size((stated[0] or size[0], stated[1] or size[1]), size, where)


def check_size(found: Size, size: Size, where: object) -> None:
    """Raise LabelSizeError, naming `where`, when an annotation or mask has another (height, width) than its image."""
    if found != size:
        raise LabelSizeError(
            f"{where} has another size than its image.\n"
            f"  wanted  {size[0]}x{size[1]} pixels (height x width)\n  found   {found[0]}x{found[1]}"
        )


def stored_pixels(path: Path) -> tuple[str, NDArray[Any]]:
    """A mask's pixel format, by Pillow's name, and its stored values; numpy files must hold whole numbers.

    Raises DataError for a file that can't be read or holds several images.
    """
    file, page = page_of(path)
    if not file.is_file():
        raise DataError(f"There is no mask {path} for the image of that name.")
    if page is not None:
        return stored_page(path)
    if start_of(path, len(NPY_START)) == NPY_START:
        return stored_array(path)
    try:
        with picture(path, MASK_FORMATS) as image:
            if NODATA in getattr(image, "tag_v2", ()):
                return stored_page(path)
            count = count_pages(path) if image.format == "TIFF" else getattr(image, "n_frames", 1)
            if count > 1:
                raise DataError(f"{path} holds {count} images. wanted: one mask, or as many as its image has pages.")
            return image.mode, np.asarray(image)
    except (OSError, SyntaxError, ValueError, MemoryError) as error:
        raise DataError(f"{path} can't be read as a mask: {error}.") from error


def read_pixels(path: Path, modes: Sequence[str], wanted: str) -> NDArray[np.uint8]:
    """The stored values of an 8-bit mask, (height, width); a palette's indices. Raises DataError for other formats."""
    mode, values = stored_pixels(path)
    if mode not in modes:
        raise DataError(f"{path} is a mask of the pixel format {mode}. wanted: {wanted}.")
    return values.astype(np.uint8)


def read_binary(path: Path, above: int = 0) -> Labels:
    """A mask of 0 and 1 from a grey mask: 1 where it is brighter than `above`.

    Raises DataError for an unreadable mask, and for one that has levels above 0 but none above `above`.
    """
    values = read_pixels(path, ("L", "P", "1"), "8-bit grey")
    if 0 < values.max(initial=0) <= above:
        raise DataError(f"{path} is a mask with levels up to {values.max()}. wanted: 0 and 255, or only 0.")
    return (values > above).astype(np.uint8)  # (height, width)


def check_classes(classes: Sequence[str], where: object) -> tuple[str, ...]:
    """Class names, the background first, checked. Raises DataError for too many, too few, or equal names."""
    twice = [name for name, count in Counter(classes).items() if count > 1]
    if not 2 <= len(classes) < IGNORE or twice:
        said = f", of which several are called {listed(twice)}" if twice else ""
        raise DataError(
            f"{where} names {counted(len(classes), 'class', 'classes')} ({', '.join(classes[:200])[:200]}){said}.\n"
            f"  wanted  2 to {IGNORE - 1}, each once, the background first"
        )
    return tuple(classes)


def class_lines(root: Path, given: Sequence[str] | None = None) -> tuple[list[str], str] | None:
    """The lines that name a set's classes, and their place: the given lines, else those of classes.txt; None without.

    Raises DataError.
    """
    path = root / "classes.txt"
    if given is None and is_missing(path):
        return None
    lines = read_text(kept_below(root, path)).splitlines() if given is None else given
    where = f"{path}" if given is None else f"The list of classes of {root}"
    return [line.strip() for line in lines if line.strip()], where


def read_classes(root: Path, given: Sequence[str] | None = None) -> tuple[str, ...] | None:
    """Class names, one per line, the background first, as `class_lines` finds them. Raises DataError."""
    found = class_lines(root, given)
    return None if found is None else check_classes(*found)


def check_known(labels: Collection[str], classes: Sequence[str], root: Path) -> None:
    """Raise DataError where labels are not among the named classes."""
    unknown = sorted(set(labels) - set(classes))
    if unknown:
        raise DataError(
            f"The list of classes of {root} does not name {listed(unknown)}. It names: {', '.join(classes)}."
        )


@dataclass
class Tally:
    """How many objects are of one kind, and the places of the first of them."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, where: object) -> None:
        """Count one more object, whose place is `where`."""
        self.count += 1
        if self.count <= SHOWN:
            self.first.append(str(where))

    def __str__(self) -> str:
        more = f" and {self.count - SHOWN} more" if self.count > SHOWN else ""
        return ", ".join(self.first) + more


def partly(so: str, these: Tally, how: str, others: Tally) -> list[str]:
    """A note where some objects of a set are of another kind than the others, which decides how the whole set is read.

    so: the consequence. how: how these objects differ from the others. The note names the places of the fewer objects.

    >>> partly("boxes alone are read", Tally(1, ["a.txt, line 4"]), "as polygons", Tally(9))
    ['boxes alone are read: 1 of 10 objects as polygons (a.txt, line 4)']
    """
    if not these.count or not others.count:
        return []
    named = these if these.count <= others.count else f"all but {others}"
    return [f"{so}: {these.count} of {these.count + others.count} objects {how} ({named})"]
