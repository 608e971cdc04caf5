"""What is known of the images of a cache, or of their tiles: from labels of images, from masks or from objects."""

from collections.abc import Iterator, Sequence
from typing import Literal
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from featprobe.cache import Cache
from featprobe.cache.held_file import HeldFile
from featprobe.errors import ProbeError
from featprobe.geometry import IDENTITY
from featprobe.image_labels import UNKNOWN, ImageLabels, ImageTruth, LabelNames, Unit, encode, names_by
from featprobe.io.threads import each
from featprobe.specs import Rows
from featprobe.targets import IGNORE, Instance, decode_rle, values_in

_held: WeakKeyDictionary[HeldFile, dict[Unit, NDArray[np.uint8]]] = WeakKeyDictionary()
"""The classes of each unit, per open file: a cache under another split has the same labels."""
_values: WeakKeyDictionary[HeldFile, dict[str, dict[int, tuple[int, ...]]]] = WeakKeyDictionary()
"""The values in the masks of whole images and of rows, likewise."""


def mask_values(cache: Cache, of: Literal["images", "rows"], indices: Sequence[int]) -> list[tuple[int, ...]]:
    """The values that the mask of each of these images or rows holds, ascending.

    Each mask is decoded once per open file, in several threads. Raises CacheError where one is damaged or has no mask.
    """
    whole = of == "images" or not cache.recipe.in_parts
    known = _values.setdefault(cache.contents.file, {}).setdefault("images" if whole else "rows", {})
    read = cache.image_semantic if whole else cache.semantic
    lacking = [i for i in indices if i not in known]
    found = each(lambda i: tuple(values_in(read(i))), lacking)
    known.update(zip(lacking, found, strict=True))
    return [known[i] for i in indices]


def units_of(cache: Cache, rows: Rows, unit: Unit) -> Rows:
    """The unit that each row shows: the index of its image, or of the row itself. Raises ProbeError without tiles."""
    _check_unit(cache, unit)
    return cache.image_of[rows] if unit == "image" else np.asarray(rows, dtype=np.intp)


def unit_names(cache: Cache, units: Rows, unit: Unit) -> tuple[list[str], list[str]]:
    """The id and the group of each of some units."""
    table = cache.images if unit == "image" else cache.rows
    ids, groups = table.column("id"), table.column("group")
    return [ids[i] for i in units.tolist()], [groups[i] for i in units.tolist()]


def names_of(cache: Cache, labels: ImageLabels, unit: Unit) -> LabelNames:
    """The labels that units of a cache may have; raises ProbeError where the cache holds no such labels."""
    _check_unit(cache, unit)
    own, tasks = cache.data.label_names, cache.data.tasks
    if labels == "own" and (own is None or cache.image_labels is None):
        raise ProbeError(_lacks_own(cache))
    if labels == "own" and own is not None and unit != "image":
        raise ProbeError(
            f"{cache.path} holds labels of whole images. They do not say which tiles of an image they hold for.\n"
            "  wanted  images as units, or a set with masks or objects\n"
            f"  found   the labels {', '.join(own.names)}\n"
            "Nothing was trained. Omit --unit tile."
        )
    if labels != "own" and not says_good(cache, labels, unit) and (not tasks or len(cache.data.classes) < 2):
        raise ProbeError(_lacks_regions(cache, labels, unit))
    return names_by(labels, own, cache.data.classes)


def truth_of(cache: Cache, labels: ImageLabels, unit: Unit) -> ImageTruth:
    """The truth about each unit of a cache.

    labels: `own`, the set's labels of images. `defect`, whether there is a defect: from labels of images that say what
    is good, else from masks, else from objects. `classes`, which classes there are, from masks or objects. A unit that
    holds no defect but an ignored region is unknown, and so are rows of other views than the image as it is.
    Raises ProbeError where the cache holds no such labels, CacheError where they are damaged.
    """
    names, own = names_of(cache, labels, unit), cache.image_labels
    if labels == "own" and own is not None:
        return ImageTruth(names, own)
    if own is not None and cache.data.label_names is not None and says_good(cache, labels, unit):
        good = ImageTruth(cache.data.label_names, own).good
    else:
        held = _classes_held(cache, unit)
        if labels == "classes":
            return ImageTruth(names, held)
        found = held.max(1)
        good = np.where(found == UNKNOWN, UNKNOWN, found == 0).astype(np.uint8)
    defect = np.where(good == UNKNOWN, UNKNOWN, good == 0).astype(np.uint8)
    return ImageTruth(names, np.stack([good, defect], axis=1))


def says_good(cache: Cache, labels: ImageLabels, unit: Unit) -> bool:
    """Whether the set's own labels of images say which units have a defect, and that is asked for."""
    names = cache.data.label_names
    return labels == "defect" and unit == "image" and names is not None and names.says_good


def defect_regions(cache: Cache, unit_index: int, unit: Unit) -> tuple[NDArray[np.bool_], NDArray[np.bool_]] | None:
    """Where a unit has a defect, and which of its pixels are ignored: (height, width) each, of the image or tile.

    From its mask, else from its objects, whose boxes are filled where they have no masks; crowds are ignored. None
    where it has neither. Raises CacheError for damaged labels.
    """
    table = cache.images if unit == "image" else cache.rows
    row = table[unit_index]
    if row.semantic:
        labels = cache.image_semantic(unit_index) if unit == "image" else cache.semantic(unit_index)
        return (labels > 0) & (labels != IGNORE), labels == IGNORE
    if not row.instances:
        return None
    height, width = row.placement.original
    defect, ignored = np.zeros((height, width), bool), np.zeros((height, width), bool)
    for instance in cache.image_instances(unit_index) if unit == "image" else cache.instances(unit_index):
        _fill(ignored if instance.crowd else defect, instance)
    return defect, ignored & ~defect


def _fill(pixels: NDArray[np.bool_], instance: Instance) -> None:
    """Set the pixels of an object: of its mask, or of its box, in which each pixel counts that the box touches."""
    if instance.rle is not None:
        pixels |= decode_rle(instance.rle)
        return
    x1, y1, x2, y2 = instance.box_xyxy
    pixels[int(np.floor(y1)) : int(np.ceil(y2)), int(np.floor(x1)) : int(np.ceil(x2))] = True


def _check_unit(cache: Cache, unit: Unit) -> None:
    if unit == "tile" and cache.recipe.tile is None:
        raise ProbeError(
            f"{cache.path} holds whole images, and no tiles.\n  wanted  a cache of tiles\n  found   whole images\n"
            "Nothing was trained. Omit --unit tile, or extract tiles:  featprobe extract --tile N"
        )


def _classes_held(cache: Cache, unit: Unit) -> NDArray[np.uint8]:
    """(units, classes without the background), as `ImageTruth.values`. All labels are decoded once per open file."""
    known = _held.setdefault(cache.contents.file, {})
    if unit not in known:
        known[unit] = encode(list(_each_held(cache, unit)), len(cache.data.classes) - 1)
    return known[unit]


def _each_held(cache: Cache, unit: Unit) -> Iterator[set[int] | None]:
    """The classes of each unit, counted from 0 without the background; None where nothing is known."""
    of_tiles = unit == "tile"
    table = cache.rows if of_tiles else cache.images
    plain = [view == IDENTITY for view in cache.rows.column("view")] if of_tiles else [True] * len(table)
    drawn, listed = (table.labelled(kind) for kind in ("semantic", "instances"))
    masked = np.flatnonzero(drawn & np.array(plain, dtype=bool)).tolist()
    values = dict(zip(masked, mask_values(cache, "rows" if of_tiles else "images", masked), strict=True))
    for i, as_it_is in enumerate(plain):
        if i in values:
            yield _of_mask(values[i])
        elif as_it_is and listed[i]:
            yield _of_objects(cache.instances(i) if of_tiles else cache.image_instances(i))
        else:
            yield None


def _of_mask(values: tuple[int, ...]) -> set[int] | None:
    """The classes in a mask of these values; None where it holds no class, but an ignored region."""
    held = {value - 1 for value in values if value not in (0, IGNORE)}
    return held if held or IGNORE not in values else None


def _of_objects(instances: tuple[Instance, ...]) -> set[int] | None:
    """The classes of objects; None where all of them are crowds."""
    held = {instance.category - 1 for instance in instances if not instance.crowd}
    return held if held or not instances else None


def _lacks_own(cache: Cache) -> str:
    holds = "masks or objects" if cache.data.tasks else "no labels"
    return (
        f"{cache.path} holds no labels of images.\n  wanted  a set whose images have labels\n"
        f"  found   {holds}, {len(cache.data.classes) - 1} classes\n"
        "Nothing was trained. Make them from the labels that are there, by one of these: whether an image has a "
        "defect; which classes it shows.\n  --labels defect\n  --labels classes"
    )


def _lacks_regions(cache: Cache, labels: ImageLabels, unit: Unit) -> str:
    names = cache.data.label_names
    found = f"the labels of images {', '.join(names.names)}" if names else "no labels"
    if labels == "defect" and unit == "image":
        return (
            f"{cache.path}: nothing says which of its images are good.\n"
            f"  wanted  a label that means no defect\n  found   {found}\n"
            'Nothing was trained. Name it in featprobe.toml, good = "NAME", and extract again: features are copied.'
        )
    return (
        f"{cache.path} holds no masks and no objects, from which --labels {labels} would follow.\n"
        f"  wanted  masks or objects\n  found   {found}\nNothing was trained. Omit --labels and --unit."
    )
