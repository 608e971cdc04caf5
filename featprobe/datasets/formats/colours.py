"""Reader for masks that code their classes as colours, in images/ and masks/ or NAME_images/ and NAME_masks/."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath

import numpy as np
from numpy.typing import NDArray

from featprobe.datasets.files import (
    files_below,
    files_in,
    folders_in,
    leads_out,
    other_images,
    own_table,
    paired,
    stem_of,
)
from featprobe.datasets.images.pages import group_of
from featprobe.datasets.images.reading import SUFFIXES
from featprobe.datasets.labelmap import read_labelmap
from featprobe.datasets.objects import check_classes, check_size, class_lines, read_pixels
from featprobe.datasets.samples import SPLIT_WORDS, DataSet, Sample, listed, splits_below, tasks_of
from featprobe.datasets.values import to_numbers
from featprobe.errors import DataError
from featprobe.geometry import Size
from featprobe.io.pictures import MASK_FORMATS, picture
from featprobe.io.threads import in_threads
from featprobe.machine import usable_cores
from featprobe.targets import IGNORE, Labels, Target, equal_runs, numbered

COLOURED = ("RGB", "RGBA")
LEFT_OUT = "ignore"  # a colour of this name is ignored


@dataclass(frozen=True)
class Pair:
    """A folder of images and the folder of their masks. split: by its name or its parent's name, "" for none."""

    images: Path
    masks: Path
    split: str


def find_pairs(root: Path) -> list[Pair]:
    """Folders of images beside their masks, at the top or one folder down, where the first mask is coloured."""
    if not root.is_dir():
        return []
    inside = [path for path in folders_in(root) if not path.is_symlink()]
    pairs = [pair for folder in (root, *inside) for pair in _pairs_in(folder, root)]
    masks = (path for pair in pairs for path in files_in(pair.masks))
    first = next((path for path in masks if path.suffix.lower() in SUFFIXES and not leads_out(root, path)), None)
    return pairs if first is not None and is_coloured(first) else []


def read_colours(name: str, root: Path, lines: Sequence[str] | None = None) -> DataSet:
    """The data set of coloured masks with the same stems as their images.

    classes.txt names the colours, one `R,G,B name` per line, the background first. Without it the colours that occur
    are the classes, sorted, black first where there is black. samples.csv (image,split,group) is optional. The pages
    of a file are images of one group, and match the pages of its mask.
    """
    pairs = find_pairs(root)
    table = own_table(root)
    several = len({pair.split for pair in pairs}) > 1
    samples: list[Sample] = []
    notes: list[str] = []
    for pair in pairs:
        files = files_below(root, pair.images)
        images, mask_of = paired(files, pair.images, files_below(root, pair.masks), pair.masks)
        inner = {} if pair.split else splits_below(images, pair.images)
        for image in images:
            identity = image.relative_to(root).as_posix()
            own = group_of(identity, image)
            row = table.row(identity, own, PurePath(own).name)
            split = pair.split if several else row.get("split") or inner.get(image, "")
            stem = stem_of(image, pair.images)
            mask = mask_of.pop(stem, pair.masks / f"{stem}.png")
            samples.append(Sample(identity, image, row.get("group") or own, split, str(mask)))
        if mask_of:
            notes.append(f"{len(mask_of)} masks have no image: {listed(sorted(mask_of))}")
    if not samples:
        raise DataError(f"{root} holds no images beside coloured masks.")
    read = [folder for pair in pairs for folder in (pair.images, pair.masks)]
    notes += [*other_images(root, read), *table.notes()]
    return colour_targets(name, root, samples, notes, lines)


def colour_targets(
    name: str, root: Path, samples: Sequence[Sample], notes: Sequence[str], lines: Sequence[str] | None
) -> DataSet:
    """The data set of samples whose labels are paths of coloured masks. lines: they name colours, see `read_colours`.

    Without such lines CVAT's labelmap.txt names the colours.
    """
    named, notes = _read_colour_names(root, lines), [*notes]
    labelmap = read_labelmap(root) if named is None else None
    if named is None and not labelmap:
        named = _colours_in([Path(sample.labels) for sample in samples], root)
        notes.append(
            f"the colours {', '.join(named.values())} are the classes, and {next(iter(named.values()))} counts as "
            "background; name them in classes.txt or featprobe.toml, one `R,G,B name` per line, the background first"
        )
    if labelmap:
        classes, read = labelmap.classes, labelmap.read
    else:
        own = named or {}
        classes = check_classes([n for n in own.values() if n != LEFT_OUT], f"{root}: its colours")
        read = partial(_labels, own, classes)

    def read_target(sample: Sample, size: Size) -> Target:
        mask = Path(sample.labels)
        labels = read(mask)
        check_size((labels.shape[0], labels.shape[1]), size, mask)
        return Target(labels, None)

    tasks = tasks_of(masks=True, instances=False)
    return DataSet(name, root, classes, samples, tasks, read_target, tuple(notes))


def read_codes(path: Path) -> NDArray[np.int32]:
    """(height, width) colours of a mask as 65536 R + 256 G + B. Raises DataError for a mask without colours."""
    values = read_pixels(path, COLOURED, "RGB colours")[..., :3].astype(np.int32)
    return np.asarray(values @ np.array([0x10000, 0x100, 1], dtype=np.int32))


def _labels(named: Mapping[int, str], classes: Sequence[str], path: Path) -> Labels:
    """(height, width) class indices of a mask; raises DataError for a colour without a name."""
    codes = read_codes(path)
    found, places = numbered(codes)
    unknown = [_hex(int(code)) for code in found if int(code) not in named]
    if unknown:
        raise DataError(
            f"{path} holds colours that belong to no class.\n"
            f"  wanted  {', '.join(f'{_hex(code)} {name}' for code, name in named.items())}\n"
            f"  found   {listed(unknown)}\n"
            "Nothing was written. Name them in classes.txt or featprobe.toml, or correct the mask."
        )
    names = [named[int(code)] for code in found]
    index = np.array([IGNORE if n == LEFT_OUT else classes.index(n) for n in names], dtype=np.uint8)
    return index[places]


def _colours_in(paths: Sequence[Path], root: Path) -> dict[int, str]:
    """The colours in all masks, with hex codes as names. Unreadable masks are skipped: reading their labels raises."""
    found: set[int] = set()

    def look(path: Path) -> list[int]:
        with suppress(DataError):
            return np.unique(equal_runs(read_codes(path))[0]).tolist()
        return []

    with in_threads(look, paths, usable_cores()) as results:
        for path, own in zip(paths, results, strict=True):
            found.update(own)
            if len(found) >= IGNORE:
                raise DataError(
                    f"{path} and the masks before it hold {len(found)} colours or more. wanted: at most {IGNORE - 1}, "
                    "one per class. Smoothed or JPEG-compressed masks can't be read."
                )
    return {code: _hex(code) for code in sorted(found)}


def _read_colour_names(root: Path, given: Sequence[str] | None) -> dict[int, str] | None:
    """Names by colour, from lines `R,G,B name`; None when there are no such lines. Raises DataError."""
    found = class_lines(root, given)
    if found is None:
        return None
    named: dict[int, str] = {}
    for number, line in enumerate(found[0], start=1):
        where = f"{found[1]}, line {number}"
        colour, _, name = line.partition(" ")
        parts = to_numbers(colour.split(","), where)
        if len(parts) != 3 or not all(v in range(256) for v in parts) or not name.strip():
            raise DataError(f"{where}: wanted R,G,B of 0 to 255 and a name, found {line[:200]!r}.")
        code = int(parts[0]) << 16 | int(parts[1]) << 8 | int(parts[2])
        if code in named:
            raise DataError(f"{where} names the colour {colour} again.")
        named[code] = name.strip()
    return named


def _pairs_in(folder: Path, root: Path) -> list[Pair]:
    pairs = []
    inside = [path for path in folders_in(folder) if not path.is_symlink()]
    for images in (path for path in inside if path.name.lower().endswith("images")):
        masks = images.with_name(images.name[: -len("images")] + {"I": "M", "i": "m"}[images.name[-6]] + "asks")
        if masks.is_dir() and not masks.is_symlink():
            words = [images.name.lower()[: -len("images")].strip("_-"), folder.name.lower() if folder != root else ""]
            pairs.append(Pair(images, masks, next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "")))
    return pairs


def is_coloured(path: Path) -> bool:
    """Whether a mask's pixel format has colours."""
    try:
        with picture(path, MASK_FORMATS) as image:
            return image.mode in COLOURED
    except (DataError, OSError, SyntaxError, ValueError):
        return False


def _hex(code: int) -> str:
    return f"#{code:06x}"
