"""A data set of any format as COCO: one JSON file per split, masks as run lengths, images copied or linked.

Each page of a file becomes a TIFF file with the same grey levels, in the place that the name of the page says.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from featprobe.datasets import DataSet
from featprobe.datasets.files import named_below
from featprobe.datasets.formats.coco_files import CocoFiles, annotations_of
from featprobe.datasets.formats.labelled import SEVERAL, TABLE, write_labels
from featprobe.datasets.images.pages import page_of
from featprobe.datasets.images.reading import image_size, read_levels, write_levels
from featprobe.datasets.label_sets import check_held
from featprobe.datasets.samples import SPLITS, listed
from featprobe.errors import DataError
from featprobe.image_labels import LabelNames
from featprobe.io.disk import new_folder, write_whole
from featprobe.stages.progress import counting
from featprobe.stages.upkeep.describe import one_of_all


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
    with one_of_all(data), new_folder(out) as temporary:
        files = CocoFiles(SPLITS)
        for sample in counting(data.samples, len(data.samples), "converting", "img", quiet=quiet):
            size = image_size(sample.image)
            where = f"{data.root}, image {sample.id}"
            found = annotations_of(data.read_target(sample, size), size, where)
            files.add(sample.id, size, found, sample.split, sample.group)
            _place(sample.image, named_below(temporary, sample.id, where, temporary / "images"), link)
        for name, text in files.texts(data.classes, things=data.has_objects).items():
            write_whole(temporary / name, text)
    counts = ({split: len(values) for split, values in own.items()} for own in (files.images, files.annotations))
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
    with one_of_all(data), new_folder(out) as temporary:
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


def _place(image: Path, place: Path, link: bool) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    if page_of(image)[1] is not None:
        write_levels(place, read_levels(image))
    elif link:
        place.symlink_to(image.resolve())
    else:
        shutil.copyfile(image, place)
