"""Writing COCO JSON that `read_coco` reads back as it was.

What COCO cannot express is written so that the reader of this package finds it again: `split` and `group` of an
image, `isthing` 0 for what belongs to the mask of classes and is no object, `background` for a class 0 with another
name.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from featprobe.errors import DataError
from featprobe.geometry import Size
from featprobe.targets import IGNORE, Instance, Labels, Target, decode_rle, encode_rle, semantic_from_instances

Annotation = dict[str, Any]


class CocoFiles:
    """What the annotation files of a set will hold: one for each split, or one for all. Images are numbered from 1 over
    all of them.

    images, annotations: their entries by file.
    """

    def __init__(self, files: Iterable[str]) -> None:
        """files: the splits that have a file; "" for one of all others."""
        self.images: dict[str, list[Annotation]] = {file: [] for file in files}
        self.annotations: dict[str, list[Annotation]] = {split: [] for split in self.images}
        self._number = 0

    def add(self, identity: str, size: Size, found: Sequence[Annotation], split: str, group: str) -> None:
        """Add an image below images/ with its `annotations_of`. split, group: "" where nothing is known of them."""
        self._number += 1
        height, width = size
        known = {name: value for name, value in (("split", split), ("group", group)) if value}
        entry = {"id": self._number, "file_name": identity, "height": height, "width": width, **known}
        file = split if split in self.images else ""
        self.images[file].append(entry)
        self.annotations[file] += [{"image_id": self._number, **annotation} for annotation in found]

    def texts(self, classes: Sequence[str], *, things: bool) -> dict[str, str]:
        """The text of each file by its path. classes: the background first. things: whether the set has objects."""
        used = {annotation["category_id"] for own in self.annotations.values() for annotation in own}
        categories = _categories(classes, things, used)
        found = {}
        for file, images in self.images.items():
            numbered = [{"id": i, **annotation} for i, annotation in enumerate(self.annotations[file], start=1)]
            value = {"images": images, "annotations": numbered, "categories": categories}
            found[f"annotations/instances{f'_{file}' if file else ''}.json"] = json.dumps(value)
        return found


def _categories(classes: Sequence[str], things: bool, used: set[int]) -> list[dict[str, Any]]:
    """COCO categories, numbered as the classes; the background only where something needs it."""
    thing = {} if things else {"isthing": 0}
    categories = [{"id": i, "name": name, **thing} for i, name in enumerate(classes) if i]
    if classes[0] != "background" or 0 in used or "background" in map(str.lower, classes[1:]):
        categories.insert(0, {"id": 0, "name": classes[0], "background": True})
    return categories


def annotations_of(target: Target, size: Size, where: str) -> list[Annotation]:
    """COCO annotations of an image's labels, without ids: the objects, then what only the mask of classes knows.

    Those last are `isthing` 0, one per class, where the mask is not what its objects make when they are painted. Raises
    DataError, naming `where`, for a mask of classes beside objects without masks, which COCO can't hold.
    """
    objects = target.instances or ()
    annotations = [_object(instance) for instance in objects]
    if target.semantic is not None:
        painted = semantic_from_instances(objects, size)
        if painted is None:
            raise DataError(
                f"{where} has a mask of classes and objects without masks, which COCO can't hold side by side."
            )
        annotations += _regions(target.semantic, painted != target.semantic)
    return annotations


def _object(instance: Instance) -> Annotation:
    x1, y1, x2, y2 = instance.box_xyxy
    area = instance.area
    if area is None:
        area = (x2 - x1) * (y2 - y1) if instance.rle is None else float(decode_rle(instance.rle).sum())
    mask = {} if instance.rle is None else {"segmentation": instance.rle}
    box = [x1, y1, x2 - x1, y2 - y1]
    return {"category_id": instance.category, "bbox": box, "area": area, "iscrowd": int(instance.crowd), **mask}


def _regions(labels: Labels, inside: np.ndarray) -> list[Annotation]:
    """One region for every label that is found where `inside` holds; 255 as a crowd of class 1."""
    found = []
    for label in np.unique(labels[inside]).tolist():
        drawn = (labels == label) & inside
        rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
        x, y, right, bottom = (int(v) for v in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
        found.append(
            {
                "category_id": 1 if label == IGNORE else label,
                "bbox": [x, y, right - x, bottom - y],
                "area": int(drawn.sum()),
                "iscrowd": int(label == IGNORE),
                "isthing": 0,
                "segmentation": encode_rle(drawn),
            }
        )
    return found
