"""Reader for images and masks in any folders, by a description or from their names, see `layouts`."""

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from featprobe.datasets.files import files_below, mask_pages, own_table
from featprobe.datasets.formats.colours import colour_targets, is_coloured
from featprobe.datasets.formats.folders import Masks, index_targets
from featprobe.datasets.images.pages import group_of, pages_of
from featprobe.datasets.images.reading import SUFFIXES
from featprobe.datasets.layouts import Candidate, find_layouts
from featprobe.datasets.nearness import linked_folders, nearest_pairs
from featprobe.datasets.patterns import MASK_SUFFIXES, Description, Pairs, pair
from featprobe.datasets.samples import DataSet, Sample, listed
from featprobe.errors import DataError, counted

EXAMPLE = "--images 'shots/*/*.jpg' --masks 'seg/{stem}_m.png'"


def found_pairs(root: Path) -> list[Candidate]:
    """The descriptions that fit the names of a folder's files; several where the names allow more than one."""
    return find_layouts(_files(root)) if root.is_dir() else []


def has_pairs(root: Path) -> bool:
    """Whether the names of a folder's files pair images with masks, also where reading them would raise an error."""
    try:
        return bool(found_pairs(root))
    except DataError:
        return True


def choose(root: Path, found: Sequence[Candidate]) -> Description:
    """The only description that fits. Raises DataError where none fits, or several (with the pairs of each)."""
    if not found:
        raise DataError(
            f"No names of folders and files pair images of {root} with masks.\n"
            f"  lacks   {nearest_pairs(root).lacks}\nNothing was read. Describe where they lie:  {EXAMPLE}"
        )
    each = [f"{counted(own.pairs.count, 'pair')} of {options_of(own.description)}" for own in found]
    if len(found) > 1:
        raise DataError(
            f"{root} can be read in {len(found)} ways.\n  wanted  one\n  found   " + "\n          ".join(each) + "\n"
            "Nothing was read. Use the two options of one of them, or set images and masks in featprobe.toml."
        )
    pairs = found[0].pairs
    if not found[0].enough:
        raise DataError(
            f"{root} has masks for only a few of its images.\n"
            f"  wanted  {counted(len(pairs.masks), 'mask')}: {pairs.bare[0]} needs {pairs.wanted[pairs.bare[0]]}\n"
            f"  found   {each[0]}\nNothing was read. If this is right, use these two options."
        )
    return found[0].description


def options_of(description: Description) -> str:
    """The command line options that describe a set.

    >>> options_of(Description.of("a/*.jpg", "b/{stem}.png"))
    "--images 'a/*.jpg' --masks 'b/{stem}.png'"
    """
    return f"--images {shlex.quote(description.images.text)} --masks {shlex.quote(description.masks.text)}"


def read_pairs(
    name: str, root: Path, named: Sequence[str] | None = None, description: Description | None = None
) -> DataSet:
    """The data set of images and masks by a description, or by the names of folders and files.

    Masks hold class indices or colours, as those of `folders` and `colours` do, or each mask is an object. An image's
    id is its path. A split where no image has a mask is omitted. samples.csv (image,split,group) is optional.
    Raises DataError where no description fits, or several do.
    """
    described = description or choose(root, found_pairs(root))
    pairs = pair(described, _files(root, described))
    if not pairs.count:
        raise DataError(_no_pairs(root, described, pairs))
    bare_splits = {*pairs.splits.values()} - {pairs.splits[image] for image, masks in pairs.masks.items() if masks}
    omitted = Counter(pairs.splits[image] for image in pairs.masks if pairs.splits[image] in bare_splits)
    coloured = not described.of_objects and is_coloured(root / next(own[0] for own in pairs.masks.values() if own))
    table = own_table(root)
    samples: list[Sample] = []
    masks = Masks()
    for text, own in pairs.masks.items():
        if pairs.splits[text] in bare_splits:
            continue
        drawn = [root / mask for mask in own or ([pairs.wanted[text]] if coloured else [])]
        for page, of_page in _by_page(root / text, drawn):
            identity = page.relative_to(root).as_posix()
            group = group_of(identity, page)
            row = table.row(identity, group, PurePosixPath(group).name)
            split = pairs.splits[text] or row.get("split") or ""
            labels = str(of_page[0]) if coloured else json.dumps([str(path) for path in of_page])
            samples.append(Sample(identity, page, row.get("group") or group, split, labels))
            (masks.of_objects if described.of_objects else masks.of_images).extend(of_page)
            if not of_page:
                masks.free[identity] = root / pairs.wanted[text]
    notes = [] if description else [f"images and masks were found by their names: {described}"]
    for split, count in sorted(omitted.items()):
        notes.append(f"no image of the split {split} has a mask: it is omitted, with {counted(count, 'image')}")
    notes += (
        [f"{counted(len(pairs.free), 'mask has', 'masks have')} no image: {listed(pairs.free)}"] if pairs.free else []
    )
    notes += [*_aside(root, pairs), *table.notes()]
    data = (
        colour_targets(name, root, samples, notes, named)
        if coloured
        else index_targets(name, root, samples, masks, notes, named)
    )
    return replace(data, description={"images": described.images.text, "masks": described.masks.text})


def _files(root: Path, description: Description | None = None) -> list[str]:
    """All files that may be images or masks, relative to the data folder. Raises DataError for links out of it."""
    more = (*description.images.suffixes, *description.masks.suffixes) if description else ()
    return [path.relative_to(root).as_posix() for path in files_below(root, root, {*SUFFIXES, *MASK_SUFFIXES, *more})]


def _by_page(image: Path, masks: Sequence[Path]) -> list[tuple[Path, list[Path]]]:
    """(page, its mask pages) for each page of an image."""
    pages = pages_of(image)
    of_masks = [mask_pages(image, pages, mask) for mask in masks]
    return [(page, [of_mask[i] for of_mask in of_masks]) for i, page in enumerate(pages)]


def _no_pairs(root: Path, described: Description, pairs: Pairs) -> str:
    images, free = list(pairs.masks), pairs.free
    linked = linked_folders(root)
    to_do = f"  linked  {listed(linked)}: linked folders are not entered\n" if linked else ""
    to_do += "Nothing was read. Correct the pattern: * is any text in a name, ** any folders, {stem} the image's name."
    if not images:
        others = dict.fromkeys([*free, *_files(root, described)])
        found = listed([*others]) or "no images"
        return (
            f"images = {described.images.text!r} fits no file of {root}.\n"
            f"  wanted  images, relative to that folder\n  found   {found}\n{to_do}"
        )
    found = listed(list(free)) or f"no file that fits {described.masks.text!r}"
    return (
        f"masks = {described.masks.text!r} gives none of {counted(len(images), 'image')} of {root} a mask.\n"
        f"  wanted  {pairs.wanted[images[0]]} for {images[0]}\n  found   {found}\n{to_do}"
    )


def _aside(root: Path, pairs: Pairs) -> list[str]:
    """A note on images that are in no pair and are no mask, by folder."""
    used = {*pairs.masks, *pairs.free, *(mask for masks in pairs.masks.values() for mask in masks)}
    left = Counter(PurePosixPath(file).parent.as_posix() for file in _files(root) if file not in used)
    each = [f"{count} of {folder}/" for folder, count in sorted(left.items())]
    return [f"{counted(left.total(), 'other image was', 'other images were')} not read: {listed(each)}"] if left else []
