"""Reader for folders of images and masks with the same stems, or with a mask an object."""

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from featprobe.datasets.files import paired, read_table, stem_of
from featprobe.datasets.images import SUFFIXES
from featprobe.datasets.objects import Tally, check_size, mask_instance, read_classes, stored_pixels
from featprobe.datasets.pages import group_of
from featprobe.datasets.samples import DataSet, Sample, listed, tasks_of
from featprobe.errors import DataError, counted
from featprobe.geometry import Size
from featprobe.targets import IGNORE, Instance, Labels, Target, check_labels, semantic_from_instances

SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "test": "test"}


def find_folders(root: Path) -> dict[str, Path]:
    """Folders that hold images/ and masks/, by split: the root ("" for no split), or train/, val/, test/."""
    if (root / "images").is_dir() and (root / "masks").is_dir():
        return {"": root}
    inside = [(split, root / name) for name, split in SPLIT_FOLDERS.items()]
    return {split: path for split, path in inside if (path / "images").is_dir() and (path / "masks").is_dir()}


def read_folders(name: str, root: Path, named: Sequence[str] | None = None) -> DataSet:
    """The data set of images/ and masks/ with the same stems, or with masks NAME_1, NAME_2, … of the objects of NAME.

    Masks hold class indices, palette masks included, or 0 and 255 throughout for one class. Classes are those named,
    the background first; without them one defect. samples.csv (image,split,group) is optional. Where a
    mask is an object, an image without any has none. The pages of a file are images of one group, and go with the pages
    of its mask. Raises DataError where some masks are objects and some are not, or pages do not match.
    """
    folders = find_folders(root)
    table = read_table(root / "samples.csv")
    samples: list[Sample] = []
    of_images: list[Path] = []
    of_objects: list[Path] = []
    free: list[str] = []
    notes: list[str] = []
    for split, folder in folders.items():
        files = sorted(p for p in (folder / "images").rglob("*") if p.suffix.lower() in SUFFIXES)
        drawn = sorted(p for p in (folder / "masks").rglob("*") if p.is_file())
        images, mask_of = paired(files, folder / "images", drawn, folder / "masks")
        bare = {stem_of(image, folder / "images") for image in images} - mask_of.keys()
        objects_of = _take_objects(mask_of, bare)
        for image in images:
            own = image.relative_to(folder / "images").as_posix()
            identity = f"{split}/{own}" if split else own
            names = (identity, image.relative_to(root).as_posix(), own)
            row = table.row(*names, *(group_of(name, image) for name in names))
            stem = stem_of(image, folder / "images")
            masks = objects_of.get(stem, []) if stem in bare else [mask_of.pop(stem, folder / "masks" / f"{stem}.png")]
            free += [] if masks else [identity]
            (of_objects if stem in bare else of_images).extend(masks)
            labels = json.dumps([str(path) for path in masks])
            group = row.get("group") or group_of(identity, image)
            samples.append(Sample(identity, image, group, split or row.get("split") or "", labels))
        if mask_of:
            notes.append(f"{len(mask_of)} masks have no image: {listed(sorted(mask_of))}")
    if not samples:
        raise DataError(f"{root} holds no images. wanted: files ending in {', '.join(SUFFIXES)} in images/.")
    notes += table.notes()
    classes = read_classes(root, named) or ("background", "defect")
    if of_objects and of_images:
        raise DataError(
            f"{root} has masks of objects and of whole images.\n  wanted  one kind for all images\n"
            f"  found   {of_objects[0].name} of an object, and the mask of {listed([m.name for m in of_images])}"
        )
    if of_objects and free:
        counts = counted(len(free), "image has no mask and counts", "images have no mask and count")
        notes.append(f"{counts} as free of objects: {listed(free)}")
    instances_too = bool(of_objects)
    binary, said = (False, []) if of_objects or len(classes) > 2 else _is_binary(of_images, root)
    notes += said

    def read_labels(path: Path, size: Size) -> Labels:
        labels = read_mask(path)
        check_size((labels.shape[0], labels.shape[1]), size, path)
        if binary or (instances_too and len(classes) == 2 and set(np.unique(labels).tolist()) <= {0, IGNORE}):
            labels = (labels > 0).astype(np.uint8)
        check_labels(labels, len(classes), str(path))
        return labels

    def read_target(sample: Sample, size: Size) -> Target:
        masks = [Path(text) for text in json.loads(sample.labels)]
        if instances_too:
            instances = tuple(_object(read_labels(path, size), path) for path in masks)
            return Target(semantic_from_instances(instances, size), instances)
        return Target(read_labels(masks[0] if masks else _missing_mask(sample.image, folders.values()), size), None)

    tasks = tasks_of(masks=True, instances=instances_too)
    return DataSet(name, root, classes, samples, tasks, read_target, tuple(notes))


def read_mask(path: Path) -> Labels:
    """A mask's class indices, (height, width); a palette PNG gives its indices, not its colours.

    Raises DataError for a missing, unreadable or coloured mask.
    """
    mode, values = stored_pixels(path)
    if mode not in ("P", "L", "1") and not mode.startswith("I"):
        raise DataError(f"{path} is a coloured mask ({mode}). wanted: class indices, as grey levels or a palette.")
    if values.max(initial=0) > 255 or values.min(initial=0) < 0:
        raise DataError(f"{path} holds labels up to {values.max()}. wanted: 0 to 255.")
    return values.astype(np.uint8)


def _take_objects(mask_of: dict[str, Path], images: Collection[str]) -> dict[str, list[Path]]:
    """Masks NAME_<number> of the images NAME that have no other, by number; they are taken out of `mask_of`."""
    found: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for stem in mask_of:
        image, _, number = stem.rpartition("_")
        if image in images and number.isascii() and number.isdecimal():
            found[image].append((int(number), stem))
    return {image: [mask_of.pop(stem) for _, stem in sorted(own)] for image, own in found.items()}


def _object(labels: Labels, path: Path) -> Instance:
    """The object of a mask that holds one class beside the background. Raises DataError for another."""
    kinds = np.unique(labels[labels > 0])
    if len(kinds) != 1 or kinds[0] == IGNORE:
        raise DataError(f"{path} is not the mask of one object. wanted: 0 and one class. found: {kinds.tolist()}.")
    return mask_instance(int(kinds[0]), labels > 0)


def _missing_mask(image: Path, folders: Iterable[Path]) -> Path:
    """Where the mask of an image that has none would be."""
    folder = next(folder for folder in folders if image.is_relative_to(folder / "images"))
    return folder / "masks" / f"{stem_of(image, folder / 'images')}.png"


def _is_binary(paths: Sequence[Path], root: Path) -> tuple[bool, list[str]]:
    """Whether masks use 0 and 255 only, all of them: then 255 is the one class and not `ignore`; and a note on others.

    Masks that can't be read have no say; they are met again, by name, when their labels are wanted. Raises DataError
    where some masks hold 0 and 255 and others 0 and 1, and none holds both, so that 255 may mean either.
    """
    full, index, both = Tally(), Tally(), Tally()
    for path in paths:
        with suppress(DataError):
            seen = set(np.flatnonzero(np.bincount(read_mask(path).ravel(), minlength=256)).tolist()) - {0}
            if seen:
                kind = full if seen == {IGNORE} else both if IGNORE in seen else index
                kind.add(path.relative_to(root))
    if full.count and both.count:
        held = counted(full.count, "mask holds", "masks hold")
        return False, [f"{held} 255 and no class ({full}): it is ignored, as by 1 and 255 in one mask ({both})"]
    if full.count and index.count:
        raise DataError(
            f"{root} has masks of 0 and 255 beside masks of 0 and 1, so that 255 may be the class or `ignore`.\n"
            f"  wanted  masks of one kind: 0 and 1 where 255 is to be ignored, or 0 and 255 throughout\n"
            f"  found   0 and 255 in {full}; 0 and 1 in {index}\nNothing was read. Mend the fewer ones."
        )
    return bool(full.count), []
