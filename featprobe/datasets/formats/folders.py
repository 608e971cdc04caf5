"""Reader for folders of images and masks with the same stems, or with one mask per object."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featprobe.datasets.files import files_in, folders_in, kept_below, other_images, own_table, paired, stem_of
from featprobe.datasets.images.decode import called_empty
from featprobe.datasets.images.pages import group_of
from featprobe.datasets.images.reading import SUFFIXES
from featprobe.datasets.labelmap import read_labelmap
from featprobe.datasets.names import meant
from featprobe.datasets.objects import Tally, check_size, mask_instance, read_classes, stored_pixels
from featprobe.datasets.samples import SPLIT_WORDS, DataSet, Sample, listed, split_of, splits_below, tasks_of
from featprobe.errors import DataError, counted
from featprobe.geometry import Size
from featprobe.io.threads import each
from featprobe.targets import IGNORE, Instance, Labels, Target, check_labels, semantic_from_instances, values_in

PLAIN = ("train", "val", "valid", "validation", "test")
"""Names of split folders, of which a set needs one; a set with only other words (Train/) is read as `pairs`."""

Reader = Callable[[Path], tuple[Labels, NDArray[np.bool_] | None]]
"""Reads the labels of a mask, and which pixels its header calls empty, both (height, width); None where it calls none
empty."""


@dataclass(frozen=True)
class Masks:
    """Mask files of whole images and of objects, by id. free: id of an image without masks -> its mask's usual path."""

    of_images: list[Path] = field(default_factory=list)
    of_objects: list[Path] = field(default_factory=list)
    free: dict[str, Path] = field(default_factory=dict)


def find_folders(root: Path) -> dict[str, Path]:
    """Folders that hold images/ and masks/, by the beginning of ids in them: the root (""), or folders of splits.

    For folders of splits it is the split, or the folder's name where several folders are of one split. At least one of
    them must have a name in PLAIN.
    """

    def holds_both(folder: Path) -> bool:
        return (folder / "images").is_dir() and (folder / "masks").is_dir()

    if holds_both(root):
        return {"": root}
    if not any(holds_both(root / word) for word in PLAIN):
        return {}
    words = list(SPLIT_WORDS)
    inside = [path for path in folders_in(root) if path.name.lower() in words and holds_both(path)]
    count = Counter(split_of(path.name) for path in inside)
    inside.sort(key=lambda path: words.index(path.name.lower()))
    return {path.name if count[split_of(path.name)] > 1 else split_of(path.name): path for path in inside}


def meet(places: Sequence[tuple[Path, Path]]) -> bool:
    """Whether, in these pairs of folders, a mask has the name of an image or of an object in an image.

    True also for folders without an image: reading them raises the error.
    """
    any_images = False
    for images, masks in places:
        stems = {stem_of(path, images) for path in files_in(images) if path.suffix.lower() in SUFFIXES}
        drawn = [stem_of(path, masks) for path in files_in(masks)]
        if not stems.isdisjoint(meant(drawn, stems).values()) or _take_objects(dict.fromkeys(drawn, masks), stems):
            return True
        any_images = any_images or bool(stems)
    return bool(places) and not any_images


def read_folders(name: str, root: Path, named: Sequence[str] | None = None) -> DataSet:
    """The data set of images/ and masks/ with the same stems, or with masks NAME_1, NAME_2, … of the objects of NAME.

    Masks hold class indices (also as a palette), or only 0 and 255 in all masks for one class. Classes are the named
    ones, the background first; without names there is one class, defect. samples.csv (image,split,group) is optional.
    If there is one mask per object, an image without masks has no objects. The pages of a file are images of one group,
    and match the pages of its mask. Raises DataError where some masks are of objects and some of whole images, or where
    pages do not match.
    """
    folders = find_folders(root)
    table = own_table(root)
    samples: list[Sample] = []
    found = Masks()
    notes: list[str] = []
    for start, folder in folders.items():
        for inside in ("images", "masks"):
            kept_below(root, folder / inside)
        files = [path for path in files_in(folder / "images") if path.suffix.lower() in SUFFIXES]
        drawn = [path for path in files_in(folder / "masks") if path.is_file()]
        for path in (*files, *drawn):
            if path.is_symlink() and path.exists():  # a link to itself stays: reading it raises the error
                kept_below(root, path)
        images, mask_of = paired(files, folder / "images", drawn, folder / "masks")
        bare = {stem_of(image, folder / "images") for image in images} - mask_of.keys()
        objects_of = _take_objects(mask_of, bare)
        inner = {} if start else splits_below(images, folder / "images")
        for image in images:
            own = image.relative_to(folder / "images").as_posix()
            identity = f"{start}/{own}" if start else own
            names = (identity, image.relative_to(root).as_posix(), own)
            row = table.row(*names, *(group_of(name, image) for name in names))
            stem = stem_of(image, folder / "images")
            masks = objects_of.get(stem, []) if stem in bare else [mask_of.pop(stem, folder / "masks" / f"{stem}.png")]
            if not masks:
                found.free[identity] = folder / "masks" / f"{stem}.png"
            (found.of_objects if stem in bare else found.of_images).extend(masks)
            labels = json.dumps([str(path) for path in masks])
            group = row.get("group") or group_of(identity, image)
            samples.append(
                Sample(identity, image, group, split_of(start) or row.get("split") or inner.get(image, ""), labels)
            )
        if mask_of:
            notes.append(f"{len(mask_of)} masks have no image: {listed(sorted(mask_of))}")
    if not samples:
        raise DataError(f"{root} holds no images. wanted: files ending in {', '.join(SUFFIXES)} in images/.")
    read = [folder / inside for folder in folders.values() for inside in ("images", "masks")]
    notes += [*other_images(root, read), *table.notes()]
    return index_targets(name, root, samples, found, notes, named)


def index_targets(
    name: str, root: Path, samples: Sequence[Sample], masks: Masks, notes: Sequence[str], named: Sequence[str] | None
) -> DataSet:
    """The data set of samples whose labels are the paths of their masks, as a JSON list.

    Raises DataError where some masks are of objects and some of whole images, and for bad classes.
    """
    of_images, of_objects, free, notes = masks.of_images, masks.of_objects, masks.free, [*notes]
    given = read_classes(root, named)
    labelmap = None if given else read_labelmap(root)
    classes = given or (labelmap.classes if labelmap else ("background", "defect"))
    stored = partial(_with_empty, read_mask)
    read = partial(_with_empty, labelmap.read) if labelmap else stored
    if of_objects and of_images:
        raise DataError(
            f"{root} has masks of objects and of whole images.\n  wanted  one kind for all images\n"
            f"  found   {of_objects[0].name} of an object, and the mask of {listed([m.name for m in of_images])}"
        )
    if of_objects and free:
        counts = counted(len(free), "image has no mask and counts", "images have no mask and count")
        notes.append(f"{counts} as free of objects: {listed([*free])}")
    elif free:
        counts = counted(len(free), "image has no mask", "images have no mask")
        notes.append(f"{counts}, which is an error where labels are read (--skip-bad omits them): {listed([*free])}")
    instances_too = bool(of_objects)
    binary = False
    if not of_objects and len(classes) == 2:
        binary, note = _is_binary(of_images, root, stored)
        notes += note
    elif not of_objects:
        _check_classes_drawn(of_images, root, classes, read)

    def read_labels(path: Path, size: Size) -> Labels:
        labels, empty = stored(path) if binary else read(path)
        check_size((labels.shape[0], labels.shape[1]), size, path)
        if binary:
            check_labels(labels, len(classes), str(path))  # grey edges have labels that are too high
        if binary or (instances_too and len(classes) == 2 and _drawn(labels, empty) <= {IGNORE}):
            labels = (labels > 0).view(np.uint8)
            if empty is not None:
                labels[empty] = IGNORE
        check_labels(labels, len(classes), str(path))
        return labels

    def read_target(sample: Sample, size: Size) -> Target:
        masks = [Path(text) for text in json.loads(sample.labels)]
        if instances_too:
            instances = tuple(_object(read_labels(path, size), path) for path in masks)
            return Target(semantic_from_instances(instances, size), instances)
        if not masks:
            raise DataError(
                f"There is no mask {free[sample.id]} for the image of that name.\n"
                f"  wanted  {counted(len(samples), 'mask')}\n  found   {len(samples) - len(free)}\n"
                "Draw one, with only background where there is no defect. Or omit such images:  --skip-bad"
            )
        return Target(read_labels(masks[0], size), None)

    tasks = tasks_of(masks=True, instances=instances_too)
    return DataSet(name, root, classes, samples, tasks, read_target, tuple(notes))


def read_mask(path: Path) -> Labels:
    """The class indices of a mask, (height, width); a palette PNG gives its indices, not its colours.

    Raises DataError for a missing, unreadable or coloured mask.
    """
    mode, values = stored_pixels(path)
    if mode not in ("P", "L", "1") and not mode.startswith("I"):
        raise DataError(f"{path} is a coloured mask ({mode}). wanted: class indices, as grey levels or a palette.")
    if values.dtype != np.uint8 and (values.max(initial=0) > 255 or values.min(initial=0) < 0):
        raise DataError(f"{path} holds labels up to {values.max()}. wanted: 0 to 255.")
    return values.astype(np.uint8)


def _take_objects(mask_of: dict[str, Path], images: Collection[str]) -> dict[str, list[Path]]:
    """Image NAME -> its masks NAME_<number>, by number, where it has no other mask. Removes them from `mask_of`."""
    found: dict[str, list[tuple[int, str]]] = defaultdict(list)
    named = meant(dict.fromkeys(stem.rpartition("_")[0] for stem in mask_of), images)
    for stem in mask_of:
        image, _, number = stem.rpartition("_")
        image = named[image]
        if image in images and number.isascii() and number.isdecimal():
            found[image].append((int(number), stem))
    return {image: [mask_of.pop(stem) for _, stem in sorted(stems)] for image, stems in found.items()}


def _object(labels: Labels, path: Path) -> Instance:
    """The object in a mask that holds one class beside the background. Raises DataError for other masks."""
    kinds = np.unique(labels[labels > 0])
    if len(kinds) != 1 or kinds[0] == IGNORE:
        raise DataError(f"{path} is not the mask of one object. wanted: 0 and one class. found: {kinds.tolist()}.")
    return mask_instance(int(kinds[0]), labels > 0)


def _with_empty(read: Callable[[Path], Labels], path: Path) -> tuple[Labels, NDArray[np.bool_] | None]:
    """(height, width) labels of a mask, and which pixels its header calls empty: 255 there is not drawn."""
    return read(path), called_empty(path)


def _drawn(labels: Labels, empty: NDArray[np.bool_] | None) -> set[int]:
    """The labels above 0 that are drawn in a mask."""
    return set(values_in(labels if empty is None else labels[~empty])) - {0}


def _check_classes_drawn(paths: Sequence[Path], root: Path, classes: Sequence[str], read: Reader) -> None:
    """Raise DataError where masks hold 255, which is ignored beside several classes, but none of the classes.

    Unreadable masks do not count. The search ends at the first mask that holds a class.
    """
    full = Tally()
    for path in paths:
        with suppress(DataError):
            seen = _drawn(*read(path))
            if seen - {IGNORE}:
                return
            if seen:
                full.add(path.relative_to(root))
    if full.count:
        raise DataError(
            f"The masks of {root} hold only 0 and 255, but {len(classes)} classes are named: {listed(classes)}.\n"
            f"  wanted  the number of a class, 1 to {len(classes) - 1}, where it is drawn; 255 is ignored\n"
            f"  found   255 and no class in {full}\n"
            "Nothing was read. If 255 is the one class, name two classes, the background first. Or correct the masks."
        )


def _is_binary(paths: Sequence[Path], root: Path, read: Reader) -> tuple[bool, list[str]]:
    """Whether all masks hold only 0 and 255, so that 255 is the one class and not `ignore`; and notes.

    Pixels that a header calls empty do not count; where nothing else is drawn a note reports them. Unreadable masks do
    not count either: reading their labels raises the error. Raises DataError where some masks hold 0 and 255, others 0
    and 1, and none holds both, so that 255 may mean either.
    """
    full, index, both, hidden = Tally(), Tally(), Tally(), Tally()

    def look(path: Path) -> tuple[set[int], bool]:
        with suppress(DataError):
            labels, empty = read(path)
            seen = _drawn(labels, empty)
            return seen, not seen and empty is not None and bool((labels[empty] == IGNORE).any())
        return set(), False

    for path, (seen, under_empty) in zip(paths, each(look, paths), strict=True):
        if IGNORE in seen and seen - {1, IGNORE}:  # a mask with grey edges does not count; reading it raises
            continue
        if seen:
            kind = full if seen == {IGNORE} else both if IGNORE in seen else index
            kind.add(path.relative_to(root))
        elif under_empty:
            hidden.add(path.relative_to(root))
    if hidden.count and not full.count + index.count + both.count:
        held = counted(hidden.count, "mask has", "masks have")
        return False, [f"no mask holds a class: {held} pixels that a header calls empty, which are ignored ({hidden})"]
    if full.count and both.count:
        held = counted(full.count, "mask holds", "masks hold")
        return False, [f"{held} 255 and no class ({full}): it is ignored, as by 1 and 255 in one mask ({both})"]
    if full.count and index.count:
        raise DataError(
            f"{root} has masks of 0 and 255 beside masks of 0 and 1, so 255 may be the class or `ignore`.\n"
            f"  wanted  masks of one kind: 0 and 1 where 255 means `ignore`, or 0 and 255 in all masks\n"
            f"  found   0 and 255 in {full}; 0 and 1 in {index}\nNothing was read. Correct the fewer ones."
        )
    return bool(full.count), []
