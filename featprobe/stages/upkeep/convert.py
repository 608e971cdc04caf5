"""A data set of any format as COCO: one JSON file per split, masks as run lengths, images copied or linked.

Each page of a file becomes a TIFF file with the same grey levels, in the place that the name of the page says.

What COCO cannot express is written so that the reader of this package finds it again: `split` and `group` of an
image, `isthing` 0 for what belongs to the mask of classes and is no object, `background` for a class 0 with another
name.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featprobe.datasets import DataSet, Sample
from featprobe.datasets.files import named_below
from featprobe.datasets.formats.labelled import SEVERAL, TABLE, write_labels
from featprobe.datasets.images.pages import page_of
from featprobe.datasets.images.reading import image_size, read_levels, write_levels
from featprobe.datasets.label_sets import check_held
from featprobe.datasets.samples import SPLITS, listed
from featprobe.errors import DataError
from featprobe.geometry import Size
from featprobe.image_labels import LabelNames
from featprobe.io.disk import new_folder
from featprobe.stages.progress import counting
from featprobe.targets import IGNORE, Instance, Labels, Target, decode_rle, encode_rle, semantic_from_instances

Annotation = dict[str, Any]


@dataclass(frozen=True)
class Converted:
    """The written data set. images, annotations: counts by split."""

    path: Path
    images: dict[str, int]
    annotations: dict[str, int]


def convert(data: DataSet, out: Path, *, link: bool = False, quiet: bool = False) -> Converted:
    """Write a data set as COCO JSON: annotations/instances_SPLIT.json and images/, whole or not at all.

    A set that has labels of whole images alone becomes labels.csv (image,label,split,group) and its images.

    Ids, splits, groups, classes, boxes and masks come back as they were; images and categories are numbered from 1.
    link: make symbolic links to the images instead of copies; pages are written all the same. Raises DataError for a
    sample that can't be used, and for a folder that holds something; DiskError where it can't be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} is there and not an empty folder. Nothing was changed. Name another one.")
    if data.label_names and data.tasks:
        raise DataError(
            f"{data.root} has labels of images beside masks or objects, which COCO can't hold together.\n"
            "Nothing was changed."
        )
    if data.label_names:
        return _convert_labels(data, data.label_names, out, link, quiet)
    with new_folder(out) as temporary:
        images: dict[str, list[Annotation]] = {split: [] for split in SPLITS}
        annotations: dict[str, list[Annotation]] = {split: [] for split in SPLITS}
        samples = counting(data.samples, len(data.samples), "converting", "img", quiet=quiet)
        for number, sample in enumerate(samples, start=1):
            size = image_size(sample.image)
            where = f"{data.root}, image {sample.id}"
            found = annotations_of(data.read_target(sample, size), size, where)
            images[sample.split].append(_image(sample, number, size))
            annotations[sample.split] += [{"image_id": number, **annotation} for annotation in found]
            _place(sample.image, named_below(temporary, sample.id, where, temporary / "images"), link)
        categories = _categories(data, {a["category_id"] for own in annotations.values() for a in own})
        for split in SPLITS:
            numbered = [{"id": i, **annotation} for i, annotation in enumerate(annotations[split], start=1)]
            value = {"images": images[split], "annotations": numbered, "categories": categories}
            _write(temporary / "annotations" / f"instances_{split}.json", value)
    counts = ({split: len(values) for split, values in own.items()} for own in (images, annotations))
    return Converted(out, *counts)


def _convert_labels(data: DataSet, names: LabelNames, out: Path, link: bool, quiet: bool) -> Converted:
    """Write a set of labels of whole images as `convert` does: its images, and a table of their labels."""
    odd = [name for name in names.names if SEVERAL in name]
    if odd:
        raise DataError(
            f"{data.root} has labels with a {SEVERAL} in them, which separates labels in {TABLE}: {listed(odd)}.\n"
            "Nothing was changed. Rename them."
        )
    rows, counts = [], dict.fromkeys(SPLITS, 0)
    with new_folder(out) as temporary:
        for sample in counting(data.samples, len(data.samples), "converting", "img", quiet=quiet):
            where = f"{data.root}, image {sample.id}"
            held = data.read_target(sample, image_size(sample.image)).labels
            check_held(held, names, where)
            if held is None:
                raise DataError(f"{where} has no label. Nothing was changed. Give it one, or remove the image.")
            rows.append((sample.id, [names.names[own] for own in held], sample.split, sample.group))
            counts[sample.split] += 1
            _place(sample.image, named_below(temporary, sample.id, where), link)
        write_labels(temporary / TABLE, rows, multi=names.multi)
    return Converted(out, counts, dict.fromkeys(SPLITS, 0))


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


def _categories(data: DataSet, used: set[int]) -> list[dict[str, Any]]:
    """COCO categories, numbered as the classes; the background only where something needs it."""
    thing = {} if data.has_objects else {"isthing": 0}
    categories = [{"id": i, "name": name, **thing} for i, name in enumerate(data.classes) if i]
    if data.classes[0] != "background" or 0 in used or "background" in map(str.lower, data.classes[1:]):
        categories.insert(0, {"id": 0, "name": data.classes[0], "background": True})
    return categories


def _image(sample: Sample, number: int, size: Size) -> dict[str, Any]:
    height, width = size
    known = {"split": sample.split, "group": sample.group}
    return {"id": number, "file_name": sample.id, "height": height, "width": width, **known}


def _place(image: Path, place: Path, link: bool) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    if page_of(image)[1] is not None:
        write_levels(place, read_levels(image))
    elif link:
        place.symlink_to(image.resolve())
    else:
        shutil.copyfile(image, place)


def _write(path: Path, value: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
