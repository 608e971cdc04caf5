"""The labels of a sample: a mask of class indices, and objects.

Class indices count from 0, the background; 255 is ignored. RLE is COCO's: column-major run lengths that
begin with the background, as pycocotools writes them.
"""

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from featprobe.errors import DataError, ShapeError, counted
from featprobe.geometry import Part, Placement, Size
from featprobe.io.disk import parse_json
from featprobe.io.pictures import picture
from featprobe.regions import regions_of

IGNORE = 255
"""Pixels of this label count in no loss and no score."""

LEAST_VISIBLE = 0.25
"""Least share of an object that a part of its image must show; with less it is neither object nor background."""
LEAST_SIDE = 2.0
"""Least height and width in pixels of the shown part of an object, unless all of it is shown."""

Labels = NDArray[np.uint8]
Rle = Mapping[str, object]


@dataclass(frozen=True)
class Instance:
    """One labelled object of an image, in pixels of the original image.

    category: index into the data set's classes, >= 1.
    box_xyxy: 0 <= x1 <= x2 <= width, 0 <= y1 <= y2 <= height.
    rle: its mask as compressed COCO RLE, {"size": [height, width], "counts": str}; None for a box.
    crowd: True for a region of many objects without outlines of each.
    area: pixels, from the annotation; None where it has none.
    """

    category: int
    box_xyxy: tuple[float, float, float, float]
    rle: Rle | None = None
    crowd: bool = False
    area: float | None = None


@dataclass(frozen=True)
class Target:
    """The labels of one image at its original size.

    semantic: (height, width) class indices, or None where the set has no masks.
    instances: objects, or None where the set has only a semantic mask.
    image_id: the id of the image in the annotation, so that predictions can be compared with it.
    labels: of the image as a whole, indices into the set's `LabelNames`; None where it has no such labels.
    """

    semantic: Labels | None
    instances: tuple[Instance, ...] | None
    image_id: int | str | None = None
    labels: tuple[int, ...] | None = None

    def __repr__(self) -> str:
        mask = [] if self.semantic is None else [f"mask of {self.semantic.shape[0]}x{self.semantic.shape[1]}"]
        objects = [] if self.instances is None else [counted(len(self.instances), "object")]
        labels = [] if self.labels is None else [f"labels {self.labels}"]
        return f"Target({', '.join([*mask, *objects, *labels])})"


def encode_rle(mask: NDArray[np.bool_]) -> dict[str, object]:
    """Compressed COCO RLE of a (height, width) mask.

    >>> encode_rle(np.eye(3, dtype=bool))
    {'size': [3, 3], 'counts': '013000'}
    """
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(s) for s in rle["size"]], "counts": rle["counts"].decode("ascii")}


def encode_window(mask: NDArray[np.bool_], top: int, left: int, size: Size) -> dict[str, object]:
    """`encode_rle` of a mask of (height, width) that is empty but for a window, from what stands there alone.

    >>> mask = np.zeros((9, 10), dtype=bool)
    >>> mask[2:9, 3:10] = np.eye(7, dtype=bool)
    >>> encode_window(mask[2:9, 3:10], 2, 3, (9, 10)) == encode_rle(mask)
    True
    """
    inside = np.zeros(mask.shape[1] * size[0] + 2, dtype=bool)  # column by column, between two pixels that are none
    inside[1:-1].reshape(mask.shape[1], size[0])[:, top : top + mask.shape[0]] = mask.T
    edges = left * size[0] + np.flatnonzero(inside[1:] != inside[:-1])
    counts = np.diff(np.concatenate([[0], edges, [size[0] * size[1]]])).tolist()
    counts = counts[:-1] if counts[-1] == 0 and len(counts) > 1 else counts  # no run is empty but the first
    rle = coco_mask.frPyObjects({"size": list(size), "counts": counts}, *size)
    return {"size": [int(s) for s in size], "counts": rle["counts"].decode("ascii")}


def decode_rle(rle: Rle) -> NDArray[np.bool_]:
    """The (height, width) mask of a compressed COCO RLE."""
    return np.asarray(coco_mask.decode({"size": rle["size"], "counts": rle["counts"]}), dtype=bool)


def decode_window(rle: Rle) -> tuple[tuple[slice, slice], NDArray[np.bool_]]:
    """The rows and columns that the mask of a compressed COCO RLE covers, and the mask there.

    Only those columns are decoded: the runs of background before and after them (the first and the last number) are
    shortened in the string.

    >>> mask = np.zeros((90, 100), dtype=bool)
    >>> mask[20:22, 50:53] = True
    >>> decode_window(encode_rle(mask))
    ((slice(20, 22, None), slice(50, 53, None)), array([[ True,  True,  True],
           [ True,  True,  True]]))
    """
    whole: Any = rle
    (rows, columns), counts = whole["size"], whole["counts"]
    left, top, width, height = coco_mask.toBbox(whole).astype(int).tolist()
    window = slice(top, top + height), slice(left, left + width)
    if not width:
        return (slice(0, 0), slice(0, 0)), np.zeros((0, 0), dtype=bool)
    if left + width > columns:  # pycocotools makes a box of billions of columns if all runs are empty
        return (slice(0, rows), slice(0, columns)), decode_rle(rle)
    if left + width < columns:
        start = len(counts) - 1
        while start and ord(counts[start - 1]) - 48 & 32:
            start -= 1
        counts = counts[:start] + _digits(_number(counts[start:]) - (columns - left - width) * rows)
    if left:
        stop = next(i for i, digit in enumerate(counts, start=1) if not ord(digit) - 48 & 32)
        counts = _digits(_number(counts[:stop]) - left * rows) + counts[stop:]
    try:
        mask = coco_mask.decode({"size": [rows, width], "counts": counts})
    except ValueError:  # a run became negative: other programs may write empty first or last runs
        return window, decode_rle(rle)[window]
    return window, mask[window[0]].view(bool)


def _number(digits: str) -> int:
    """A number of a compressed RLE: five bits per character from "0" on, the lowest first; the last has the sign."""
    value = 0
    for place, digit in enumerate(digits):
        value |= (ord(digit) - 48 & 31) << 5 * place
    return value - (1 << 5 * len(digits)) if ord(digits[-1]) - 48 & 16 else value


def _digits(value: int) -> str:
    """The characters of a number, as `_number` reads them."""
    digits = ""
    while not -16 <= value < 16:
        digits += chr((value & 31 | 32) + 48)
        value >>= 5
    return digits + chr((value & 31) + 48)


def move_rle(rle: Rle, left: int, top: int, size: Size) -> dict[str, object]:
    """The mask of a tile at (left, top) of an image of (height, width), as a mask of the whole image.

    >>> mask = np.zeros((4, 5), dtype=bool)
    >>> mask[1:3, 2:5] = True
    >>> move_rle(encode_rle(np.ones((2, 3), dtype=bool)), 2, 1, (4, 5)) == encode_rle(mask)
    True
    """
    return encode_window(decode_rle(rle), top, left, size)


def cut_instances(instances: Sequence[Instance], part: Part) -> tuple[Instance, ...]:
    """The objects of an image that a part shows, in the part's pixels.

    Boxes are clipped. An object becomes a crowd, where neither object nor background is learnt, if the part shows less
    than LEAST_VISIBLE of it (of its mask's pixels, or of its box where it has no mask), or if the shown box is less
    than LEAST_SIDE pixels high or wide. An object that is not shown is left out.
    """
    found = []
    for instance in instances:
        x1, y1, x2, y2 = part.take_box(instance.box_xyxy)
        if x2 <= x1 or y2 <= y1:
            continue
        whole = instance.box_xyxy
        share = (x2 - x1) * (y2 - y1) / ((whole[2] - whole[0]) * (whole[3] - whole[1]))
        shown = replace(instance, box_xyxy=(x1, y1, x2, y2))
        if instance.rle is not None:
            mask = decode_rle(instance.rle)
            cut = part.take(mask)
            if not cut.any():
                continue
            pixels = int(mask.sum())
            shown = replace(shown, rle=encode_rle(cut))
            if cut.sum() < pixels:
                share = float(cut.sum()) / pixels
                shown = replace(shown, box_xyxy=_box_of(cut))
        if share < 1:
            x1, y1, x2, y2 = shown.box_xyxy
            sliver = share < LEAST_VISIBLE or min(x2 - x1, y2 - y1) < LEAST_SIDE
            shown = replace(shown, crowd=instance.crowd or sliver, area=None)
        found.append(shown)
    return tuple(found)


def _box_of(mask: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """x1 y1 x2 y2 of a mask's pixels."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def semantic_from_instances(instances: Sequence[Instance], size: Size) -> Labels | None:
    """Paint instances into one (height, width) mask of class indices.

    Where two overlap the smaller is on top; a crowd becomes 255. None when an instance has no mask.
    """
    if any(instance.rle is None for instance in instances):
        return None
    rles: list[Any] = [instance.rle for instance in instances]
    areas = [int(area) for area in coco_mask.area(rles)] if rles else []
    painted = np.zeros(size, dtype=np.uint8)  # (height, width)
    for i in sorted(range(len(rles)), key=lambda i: (-areas[i], i)):
        window, mask = decode_window(rles[i])  # most objects are small
        np.copyto(painted[window], IGNORE if instances[i].crowd else instances[i].category, where=mask)
    return painted


def components(labels: Labels, classes: int) -> tuple[Instance, ...]:
    """Objects from a (height, width) mask of class indices: the connected components per class but the background.

    Pixels that touch at a corner are connected. Each component of 255 is a crowd of every class.

    >>> found = components(np.array([[1, 0, 1], [0, 1, 0], [2, 0, 255]], np.uint8), 3)
    >>> [(i.category, i.box_xyxy) for i in found if not i.crowd]
    [(1, (0.0, 0.0, 3.0, 2.0)), (2, (0.0, 2.0, 1.0, 3.0))]
    """
    found, regions = [], regions_of(labels)
    for number, (value, area, box) in enumerate(
        zip(regions.value.tolist(), regions.area.tolist(), regions.boxes.tolist(), strict=True), start=1
    ):
        if value < classes or value == IGNORE:
            left, top, right, bottom = box
            rle = encode_window(regions.labels[top:bottom, left:right] == number, top, left, labels.shape)
            x1, y1, x2, y2 = map(float, box)
            one = Instance(value, (x1, y1, x2, y2), rle, crowd=value == IGNORE, area=float(area))
            found += [one] if value != IGNORE else [replace(one, category=c) for c in range(1, classes)]
    return tuple(found)


def encode_semantic(labels: Labels | None) -> bytes:
    """A (height, width) mask as the bytes of an 8-bit grey PNG; b"" for None."""
    if labels is None:
        return b""
    stream = io.BytesIO()
    Image.fromarray(labels).save(stream, format="PNG", compress_level=3)
    return stream.getvalue()


def decode_semantic(data: bytes, size: Size | None = None, classes: int | None = None) -> Labels:
    """The (height, width) mask in bytes that `encode_semantic` made. Raises DataError for other bytes.

    size: (height, width) of the image. classes: the number of classes. A mask of another size (checked before decoding)
    or with other labels is refused.
    """
    try:
        with picture(io.BytesIO(data), ("PNG",), "The mask") as image:
            if image.mode != "L" or size not in (None, (image.height, image.width)):
                wanted = f"{size[0]}x{size[1]} pixels (height x width), " if size else ""
                raise DataError(
                    f"The mask does not fit its image.\n  wanted  {wanted}8-bit grey\n"
                    f"  found   {image.height}x{image.width} pixels, {image.mode}"
                )
            labels = np.asarray(image, dtype=np.uint8)
    except (OSError, SyntaxError, ValueError, MemoryError) as error:
        raise DataError(f"The mask can't be decoded: {str(error)[:200]}.") from error
    if classes is not None:
        check_labels(labels, classes, "The mask")
    return labels


def encode_instances(instances: Sequence[Instance] | None, image_id: int | str | None = None) -> bytes:
    """Instances as UTF-8 JSON: {image_id, objects: [{category, box_xyxy, rle, crowd, area}]}; b"" for None."""
    if instances is None:
        return b""
    objects = [asdict(instance) for instance in instances]
    return json.dumps({"image_id": image_id, "objects": objects}, separators=(",", ":")).encode()


def decode_instances(
    data: bytes, size: Size | None = None, classes: int | None = None
) -> tuple[tuple[Instance, ...], int | str | None]:
    """The instances and the image's id in bytes that `encode_instances` made. Raises DataError for other bytes.

    size: (height, width) of the image. classes: the number of classes. Objects outside of the image or of other classes
    are refused.
    """
    try:
        values = parse_json(data)
        objects = tuple(Instance(**{**row, "box_xyxy": tuple(row["box_xyxy"])}) for row in values["objects"])
        texts = ((i, _fault_of(item, size)) for i, item in enumerate(objects, 1))
        faults = (f"Object {i} is bad: {text}." for i, text in texts if text)
        if fault := next(faults, ""):
            raise DataError(fault)
        if any(instance.category >= (classes or IGNORE) for instance in objects):
            raise DataError(
                f"Some objects have classes beyond the {classes or IGNORE} classes of the set (with the background)."
            )
        rles: list[Any] = [instance.rle for instance in objects if instance.rle is not None]
        if rles and not _runs_fit([rle["counts"] for rle in rles], [math.prod(rle["size"]) for rle in rles]):
            raise DataError("The runs of an object's mask do not fit its size.")
        return objects, _image_id(values)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise DataError(f"The objects can't be decoded: {type(error).__name__}: {str(error)[:200]}.") from error


def decode_image_id(data: bytes) -> int | str | None:
    """Only the image's id, without reading the instances. Raises DataError."""
    try:
        return _image_id(parse_json(data))
    except (ValueError, KeyError, TypeError, MemoryError) as error:
        raise DataError(f"The objects can't be decoded: {type(error).__name__}: {str(error)[:200]}.") from error


def _image_id(values: Any) -> int | str | None:
    image_id: int | str | None = values["image_id"]
    if not (image_id is None or type(image_id) in (int, str)):
        raise DataError(f"The image of the objects has the id {str(image_id)[:80]!r}. wanted: a number or a text.")
    return image_id


def _fault_of(instance: Instance, size: Size | None) -> str:
    """The fault of an object from a file, without its class and its runs; "" where it has none."""
    box, rle, area = instance.box_xyxy, instance.rle, instance.area
    if type(instance.category) is not int or instance.category < 1:
        return f"its class is {str(instance.category)[:80]}"
    if len(box) != 4 or not all(type(v) in (int, float) and math.isfinite(v) for v in box):
        return f"its box is {str(box)[:80]}"
    if not (0 <= box[0] <= box[2] and 0 <= box[1] <= box[3]) or (size and (box[2] > size[1] or box[3] > size[0])):
        return f"its box {str(box)[:80]} leaves the image"
    if type(instance.crowd) is not bool or not (area is None or (type(area) in (int, float) and math.isfinite(area))):
        return "its crowd or its area has a wrong type"
    if rle is None:
        return ""
    if not isinstance(rle, dict) or rle.keys() != {"size", "counts"} or type(rle["counts"]) is not str:
        return "its mask is not run lengths"
    found = rle["size"]
    if not isinstance(found, list) or len(found) != 2 or not all(type(v) is int and v > 0 for v in found):
        return f"its mask has the size {str(found)[:80]}"
    if size is not None and found != [*size]:
        return f"its mask has {found[0]}x{found[1]} pixels, its image {size[0]}x{size[1]}"
    return ""


def _runs_fit(texts: Sequence[str], pixels: Sequence[int]) -> bool:
    """Whether texts are compressed COCO RLE of masks, each of at most the given number of pixels."""
    found = run_lengths(texts)
    if found is None:
        return False
    runs, first = found
    return bool((runs >= 0).all() and (np.add.reduceat(runs, first) <= np.array(pixels)).all())


def run_lengths(texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.intp]] | None:
    """The runs of compressed COCO RLEs in pixels, the background first, and the index of each text's first run.

    All texts are read at once, because an image may have hundreds. None where a text is no RLE.

    >>> run_lengths(["013000", "4"])
    (array([0, 1, 3, 1, 3, 1, 4]), array([0, 6]))
    """
    joined = "".join(texts)
    sizes = np.array([len(text) for text in texts])
    if not joined.isascii() or not sizes.all():
        return None
    digits = np.frombuffer(joined.encode(), dtype=np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((digits & 32) == 0)
    stops = np.cumsum(sizes) - 1  # the last character of each text
    if digits.min() < 0 or digits.max() > 63 or not len(ends) or not np.isin(stops, ends).all():
        return None
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:  # no run of an image takes more digits
        return None
    places = np.arange(len(digits)) - np.repeat(starts, lengths)
    values = np.add.reduceat((digits & 31) << (5 * places), starts)
    values -= np.where(digits[ends] & 16, 1 << (5 * lengths), 0)
    first = np.searchsorted(starts, stops + 1 - sizes)
    count = np.diff(first, append=len(values))
    text = np.repeat(np.arange(len(texts)), count)
    within = np.arange(len(values)) - np.repeat(first, count)  # its text
    runs = values.copy()
    for even in (0, 1):  # from the fourth on, a run is stored as the difference to the run two before
        chain = np.flatnonzero((within % 2 == 1 - even) & (within > 0))
        summed = np.cumsum(values[chain])
        begins = np.flatnonzero(np.diff(text[chain], prepend=-1))
        before = np.where(begins > 0, summed[begins - 1], 0) if len(chain) else begins
        runs[chain] = summed - np.repeat(before, np.diff(begins, append=len(chain)))
    return runs, first


def labels_in_frame(labels: Labels, placement: Placement) -> Labels:
    """A mask placed in the frame by nearest pixel: (frame height, frame width); padding is 255."""
    if labels.shape != placement.original:
        raise ShapeError(f"A mask of {labels.shape} pixels does not fit an image of {placement.original}.")
    height, width = placement.content
    framed = np.full(placement.frame, IGNORE, dtype=np.uint8)
    if placement.content != placement.original:
        rows, columns = (
            np.minimum(((np.arange(c) + 0.5) * o / c).astype(np.intp), o - 1)
            for c, o in zip(placement.content, placement.original, strict=True)
        )
        labels = labels[np.ix_(rows, columns)]
    framed[:height, :width] = labels
    return framed


def equal_runs(values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.intp]]:
    """The value of each run of equal values of an array, row by row, and its length.

    A mask has far fewer runs than pixels, so that what it holds is known soonest from them.
    """
    flat = values.ravel()
    ends = np.flatnonzero(np.append(flat[1:] != flat[:-1], flat.size > 0))
    return flat[ends], np.diff(ends, prepend=-1)


def values_in(labels: Labels) -> list[int]:
    """The values that labels of any shape hold, ascending.

    >>> values_in(np.array([[0, 0, 3], [3, 255, 0]], dtype=np.uint8))
    [0, 3, 255]
    """
    found: list[int] = np.flatnonzero(np.bincount(equal_runs(labels)[0])).tolist()
    return found


def pixels_of_each(labels: Labels) -> NDArray[np.int64]:
    """(256,), how many pixels of labels of any shape have each value."""
    values, lengths = equal_runs(labels)
    return np.bincount(values, weights=lengths, minlength=256).astype(np.int64)


def numbered(values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.intp]]:
    """The values that an array holds, ascending, and the place of each pixel's value among them, of its shape.

    >>> numbered(np.array([[70, 70], [9, 70]]))
    (array([ 9, 70]), array([[1, 1],
           [0, 1]]))
    """
    own, lengths = equal_runs(values)
    found, place = np.unique(own, return_inverse=True)
    return found, np.repeat(place, lengths).reshape(values.shape)


def check_labels(labels: Labels, classes: int, where: str) -> None:
    """Raise DataError, naming `where`, when a label is neither a class nor 255."""
    if labels.max(initial=0) < classes:
        return
    found = values_in(labels)
    beyond = [value for value in found if classes <= value < IGNORE]
    if beyond:
        raise DataError(
            f"{where} holds labels {beyond}, beyond the classes.\n"
            f"  wanted  0 to {classes - 1}, or {IGNORE} for ignored pixels\n"
            f"  found   {found}\n"
            "Nothing was written. Name all classes in classes.txt or featprobe.toml, or correct the mask."
        )
