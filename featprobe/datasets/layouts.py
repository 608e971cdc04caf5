"""Finding where a set's images and masks are, from the names of its folders and files.

Three kinds of places are searched in turn, and the first kind that gives pairs is used: a folder of images beside a
folder of masks, where both names say so; a folder of masks in or beside a folder of images with another name; images
and masks in one folder. Words for splits may be folders above or below these, or parts of their names.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress, product
from posixpath import basename, dirname, splitext

from featprobe.datasets.images.reading import SUFFIXES
from featprobe.datasets.names import plain
from featprobe.datasets.patterns import MASK_SUFFIXES, SPLIT_WORDS, Description, Pairs, Pattern, pair
from featprobe.errors import DataError

IMAGE_WORDS = {"image", "images", "img", "imgs", "jpegimages", "data", "src"}
MASK_WORDS = {
    "mask", "masks", "label", "labels", "lab", "annotation", "annotations", "annot", "ann", "seg", "segmentation",
    "segmentations", "semantic", "gt", "groundtruth", "truth", "manual",
}  # fmt: skip
DRAWN_WORDS = {"visualization", "visualisation", "vis", "viz", "overlay", "overlays", "preview", "previews"}
WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+")
SPLIT = re.compile("|".join(SPLIT_WORDS), re.IGNORECASE)
LOSSY = (".jpg", ".jpeg")
ENOUGH = 0.5  # least share of images with a mask, or of masks with an image
SAMPLE = 1000  # most images whose names are read to find prefixes and suffixes
COMMON = 0.2  # least share of names with a prefix or suffix, for it to be tried

Parts = tuple[str, ...]  # names in a folder's path below the data folder
Name = tuple[Parts, str, str]  # a file: the parts that its folder shares with that of its mask or image, stem, suffix


@dataclass(frozen=True)
class Candidate:
    """A description that fits the files, and the pairs that it gives."""

    description: Description
    pairs: Pairs

    @property
    def enough(self) -> bool:
        """Whether enough images have masks, or masks images, to believe this description."""
        masks = sum(map(len, self.pairs.masks.values()))
        return self.pairs.count >= ENOUGH * min(len(self.pairs.masks), masks + len(self.pairs.free))


def find_layouts(files: Iterable[str]) -> list[Candidate]:
    """The descriptions that fit the files, those with most pairs first. files: paths relative to the data folder.

    There are several where the names allow more than one. Descriptions that pair few files are returned only where
    there are no others. Raises DataError where nothing fits because two images would have the same masks.
    """
    files = [f for f in files if splitext(f)[1].lower() in {*SUFFIXES, *MASK_SUFFIXES}]
    folders = _folders(file for file in files if can_stand(dirname(file)))
    few: dict[str, Candidate] = {}
    for look in (_named_places, _unnamed_places, _shared_places):
        found: dict[str, Candidate] = {}
        faults: list[DataError] = []
        for description in look(folders, files):
            try:
                candidate = _of_splits_with_masks(Candidate(description, pair(description, files)), files)
                found[str(candidate.description)] = candidate
            except DataError as error:  # this description gives two images one mask, or one image two
                faults.append(error)
        fitting = sorted((layout for layout in found.values() if layout.pairs.count), key=lambda fit: -fit.pairs.count)
        if enough := [layout for layout in fitting if layout.enough]:
            return [layout for layout in enough if not _of_drawings(layout)] or enough
        if faults:
            raise faults[0]
        few |= {str(layout.description): layout for layout in fitting}
    return list(few.values())


def can_stand(text: str) -> bool:
    """Whether a text can stand in a pattern and means only itself there."""
    return not re.search(r"[*{}\\]", text)


def _of_drawings(candidate: Candidate) -> bool:
    """Whether its images or masks are pictures for a report, judged by their names."""
    described = candidate.description
    names = [re.sub(r"{\w+}", " ", basename(pattern.text)) for pattern in (described.images, described.masks)]
    return any(_words(name) & DRAWN_WORDS for name in (*names, *map(basename, candidate.pairs.bare)))


def role_of(folder: str) -> str:
    """The kind of a folder by its name: "masks", "images", or "" for another name.

    >>> [role_of(name) for name in ("img_dir", "JPEGImages", "{split}_lab", "groundTruth", "Mask_images", "depth")]
    ['images', 'images', 'masks', 'masks', 'masks', '']
    """
    words = _words(folder)
    if words & DRAWN_WORDS:
        return ""
    return "masks" if words & MASK_WORDS else "images" if words & IMAGE_WORDS else ""


def _words(text: str) -> set[str]:
    return {word.lower() for word in WORD.findall(text.replace("{split}", " "))}


# ---- folders ---------------------------------------------------------------------------------------------------------


def _folders(files: Iterable[str]) -> set[Parts]:
    """The folders that hold files. {split} replaces a part that is a word for a split, or in which two differ."""
    paths = {tuple(filter(None, folder.split("/"))) for folder in {dirname(file) for file in files}}
    seen: dict[Parts, set[str]] = defaultdict(set)  # parts up to one with {split} -> the splits there
    for start in {path[:end] for path in paths for end in range(1, len(path) + 1)}:
        for text, split in _with_split(start[-1]):
            seen[(*start[:-1], text.lower())].add(split)

    def general(path: Parts) -> Parts:
        choices = [
            (text != "{split}", at, text)
            for at, part in enumerate(path)
            for text, _ in _with_split(part)
            if text == "{split}" or len(seen[(*path[:at], text.lower())]) > 1
        ]
        _, at, text = min(choices, default=(False, len(path), ""))
        return (*path[:at], *([text] if text else []), *path[at + 1 :])

    return {general(path) for path in paths}


def _with_split(part: str) -> Iterator[tuple[str, str]]:
    """A folder's name with {split} in place of the word for a split in it, and that split."""
    for found in SPLIT.finditer(part):
        before = part[: found.start()]
        if not before[-1:].isalpha() or (before[-1].islower() and found[0][0].isupper()):
            yield f"{before}{{split}}{part[found.end() :]}", SPLIT_WORDS[found[0].lower()]


@dataclass
class _Kind:
    """Folders with one name and the same parts below it. bases: parts above them -> whether {dir} is below."""

    name: str
    below: Parts
    bases: dict[Parts, bool]

    def place(self, base: Parts, deep: bool) -> str:
        """The pattern of these folders, with a / at its end."""
        below = [] if "{dir}" in base else [*self.below]
        below += ["{dir}"] if deep and "{dir}" not in (*base, *below) else []
        return "".join(f"{part}/" for part in (*base, self.name, *below) if part)


def _kinds(split: Iterable[tuple[Parts, str, Parts]]) -> list[_Kind]:
    """Folders by their name, in any case. Each is given as (parts above, name, parts below)."""
    found: dict[tuple[str, Parts], _Kind] = {}
    for above, name, below in split:
        at = below.index("{split}") if "{split}" in below else -1
        way = () if at < 0 else ("{split}",) if at == 0 else ("{dir}", "{split}")
        kind = found.setdefault((name.lower(), way), _Kind(name, way, {}))
        kind.bases[above] = kind.bases.get(above, False) or len(below) > len(way)
    return list(found.values())


def _of_role(folders: Iterable[Parts], role: str) -> list[_Kind]:
    """Folders where the last part with a role (see `role_of`) has this role."""
    split = []
    for path in sorted(folders):
        at = next((i for i in reversed(range(len(path))) if role_of(path[i])), None)
        if at is not None and role_of(path[at]) == role:
            split.append((path[:at], path[at], path[at + 1 :]))
    return _kinds(split)


def _merged(bases: Iterable[Parts]) -> Parts:
    """One path for several: the parts that they share at both ends, and {dir} between.

    >>> _merged([("Class1", "{split}"), ("Class2", "{split}")])
    ('{dir}', '{split}')
    """
    found = sorted(bases)
    first, least = found[0], min(map(len, found))
    if len(found) == 1:
        return first
    head = next((i for i in range(least) if len({base[i] for base in found}) > 1), least)
    tail = next((i for i in range(least - head) if len({base[-1 - i] for base in found}) > 1), least - head)
    return (*first[:head], "{dir}", *first[len(first) - tail :])


def _beside(images: _Kind, masks: _Kind, files: Sequence[str]) -> Iterator[Description]:
    """Descriptions of images and masks below the same folders."""
    bases = images.bases.keys() & masks.bases.keys()
    if bases:
        base = _merged(bases)
        deep, deep_masks = (any(kind.bases[base] for base in bases) for kind in (images, masks))
        found = [*_described(images.place(base, deep or deep_masks), masks.place(base, deep or deep_masks), files)]
        if deep and not deep_masks and not found:  # the masks of many folders are in one folder
            found += _described(images.place(base, True).replace("{dir}", "**"), masks.place(base, False), files)
        yield from found


def _named_places(folders: set[Parts], files: Sequence[str]) -> Iterator[Description]:
    """Descriptions of folders that are called images and masks. Other words of the two names must be equal, or only one
    name may have some."""
    for images, masks in product(_of_role(folders, "images"), _of_role(folders, "masks")):
        one, other = (
            _words(kind.name) - MASK_WORDS - IMAGE_WORDS - {"jpeg", "ground", "dir"} for kind in (images, masks)
        )
        if one == other or not one or not other:
            yield from _beside(images, masks, files)


def _unnamed_places(folders: set[Parts], files: Sequence[str]) -> Iterator[Description]:
    """Descriptions with a folder that is called masks, in the folder of the images or beside it."""
    others = {path for path in folders if not any(role_of(p) == "masks" or _words(p) & DRAWN_WORDS for p in path)}
    for masks in _of_role(folders, "masks"):
        around = {base: False for base in masks.bases if base in others}
        kinds = [_Kind("", masks.below, around)] if around else []
        kinds += _kinds(
            (path[:at], path[at], path[at + 1 :])
            for path in sorted(others)
            for at in range(len(path))
            if path[:at] in masks.bases
        )
        for images in kinds:
            yield from _beside(images, masks, files)


def _shared_places(folders: set[Parts], files: Sequence[str]) -> Iterator[Description]:
    """Descriptions of images and masks in one folder. The names of masks begin or end with a word for masks, or the
    masks are no JPEGs."""
    if not folders:
        return
    place = "".join(f"{part}/" for part in _merged(folders))
    names = _names(place, files, ("dir", "split"))
    words = Counter(word for _, stem, _ in names for word in _mask_words(stem))
    for word in words:
        drawn = [word in _mask_words(stem) for _, stem, _ in names]
        images = [name for name, is_mask in zip(names, drawn, strict=True) if not is_mask]
        yield from _affixed(place, images, place, [*compress(names, drawn)])
    lossy = [name for name in names if name[2] in LOSSY]
    yield from _affixed(place, lossy, place, [name for name in names if name[2] not in LOSSY])


def _mask_words(stem: str) -> set[str]:
    """The words for masks with which a file's name begins or ends; a number at its end is ignored."""
    ends = (*_ends(stem)[:1], *_ends(stem.rstrip("0123456789"))[:1], *_starts(stem)[:1])
    marks = {end for end in ends if len(_words(end)) == 1 and _words(end) <= MASK_WORDS}
    return marks | ({stem} if stem.lower() in MASK_WORDS else set())


# ---- names of files --------------------------------------------------------------------------------------------------


def _described(image_place: str, mask_place: str, files: Sequence[str]) -> Iterator[Description]:
    """Descriptions of images and masks in folders of these patterns."""
    shared = [name for name in ("dir", "split") if all(f"{{{name}}}" in place for place in (image_place, mask_place))]
    masks = _names(mask_place, files, shared)
    inside = Pattern(f"{mask_place}*", "masks")
    images = _names(image_place, [file for file in files if inside.match(file) is None], shared)
    yield from _affixed(image_place, images, mask_place, masks)


def _names(place: str, files: Sequence[str], shared: Sequence[str]) -> list[Name]:
    pattern = Pattern(f"{place}*", "images")
    found = []
    for file in files:
        fields = pattern.match(file)
        if fields is not None:
            key = tuple(
                SPLIT_WORDS.get(fields.get(n, "").lower(), "") if n == "split" else plain(fields.get(n, ""))
                for n in shared
            )
            stem, suffix = splitext(basename(file))
            found.append((key, stem, suffix.lower()))
    return found


def _affixed(image_place: str, images: Sequence[Name], mask_place: str, masks: Sequence[Name]) -> Iterator[Description]:
    """Descriptions of the text before and after the stems, those that pair most images.

    Among descriptions of the same masks the shortest is given; there are several where masks are of several kinds. Text
    without a letter stays in the stem even where all images share it, because numbers distinguish images. Where few
    images are paired, names must be equal: then the text around the stems is chance.
    """
    masks = [name for name in masks if name[2] in MASK_SUFFIXES]
    if not images or not masks:
        return
    some, others = sorted(images)[:SAMPLE], sorted(masks)[: SAMPLE * (1 + len(masks) // len(images))]
    best, met = _best_affixes(some, others)
    fixed = any(mask[-1].isdecimal() for _, mask in best)  # other masks may have other numbers: then they are objects
    if len(images) > SAMPLE and (not best or fixed):
        best, met = _best_affixes(images, masks)
    enough = met >= ENOUGH * min(len(some), len(others))
    for image, mask in best if enough else [names for names in best if names == ("{stem}", "{stem}")]:
        yield Description.of(f"{image_place}{image}{_suffix(images)}", f"{mask_place}{mask}{_suffix(masks)}")
    in_folders = "{dir}" in image_place and "{dir}" in mask_place
    keys = Counter(key for key, _, _ in images)
    alone = max(keys.values()) == 1 and not keys.keys().isdisjoint(key for key, _, _ in masks)
    if in_folders and alone and not enough:  # a folder is an image
        stems = {stem for _, stem, _ in masks}
        mask = stems.pop() if len(stems) == 1 and can_stand(masks[0][1]) else "*"
        yield Description.of(f"{image_place}{{stem}}{_suffix(images)}", f"{mask_place}{mask}{_suffix(masks)}")


def _best_affixes(images: Sequence[Name], masks: Sequence[Name]) -> tuple[list[tuple[str, str]], int]:
    """Patterns of the names of images and of masks, and the number of pairs; the shortest patterns of those that pair
    the same files.

    One number at the end of all masks is a part of their names, not the number of an object.
    """
    around = [
        ends for ends in _affixes([stem for _, stem, _ in images]) if all(_has_letter(text) for text in ends if text)
    ]
    drawn = [(*ends, "") for ends in _affixes([stem for _, stem, _ in masks])]
    numbered = [stem.rstrip("0123456789") for _, stem, _ in masks if stem[-1:].isdecimal()]
    if len(numbered) == len(masks):
        drawn += [(*ends, "*") for ends in _affixes(numbered) if ends[1]]
    inner = {
        (left, right, number): [
            (key, plain(_inner(stem.rstrip("0123456789") if number else stem, left, right))) for key, stem, _ in masks
        ]
        for left, right, number in drawn
    }
    best: dict[int, tuple[str, int, str, str]] = {}  # pairs -> "*" or "", length, both names
    most = (0, 0)
    for before, after in around:
        cores = {(key, plain(_inner(stem, before, after))): i for i, (key, stem, _) in enumerate(images)}
        for (left, right, number), mask_cores in inner.items():
            paired = tuple((i, cores[core]) for i, core in enumerate(mask_cores) if core[1] and core in cores)
            pairs = len({image for _, image in paired}), len(paired)
            if not paired or pairs < most:
                continue
            best, most = (best if pairs == most else {}), pairs
            length = len(before + after + left + right + number)
            found = (number, length, f"{before}{{stem}}{after}", f"{left}{{stem}}{right}{number}")
            best[hash(paired)] = min(best.get(hash(paired), found), found)
    return [(image, mask) for *_, image, mask in best.values()], most[0]


def _has_letter(text: str) -> bool:
    return any(character.isalpha() for character in text)


def _suffix(names: Iterable[Name]) -> str:
    """The suffix that all files have, else `.*`."""
    found = {suffix for _, _, suffix in names}
    return found.pop() if len(found) == 1 else ".*"


def _affixes(stems: Sequence[str]) -> list[tuple[str, str]]:
    """(text before, text after) that many of the stems have, whole words; also ("", "")."""
    starts, ends = (Counter(text for stem in stems for text in cut(stem)) for cut in (_starts, _ends))
    common = (["", *(t for t, count in found.items() if count >= COMMON * len(stems))] for found in (starts, ends))
    before, after = ([*filter(can_stand, texts)] for texts in common)
    return list(product(before, after))


def _inner(stem: str, before: str, after: str) -> str:
    """A stem without the given text before and after; "" where its ends are others."""
    fits = stem.startswith(before) and stem.endswith(after) and len(stem) > len(before) + len(after)
    return stem[len(before) : len(stem) - len(after)] if fits else ""


def _ends(stem: str) -> list[str]:
    """The ends of a name that are whole words, with the separator before them; shorter ones first.

    >>> _ends("ISIC_001_mask")
    ['_mask', '_001_mask']
    """
    starts = [found.start() for found in re.finditer(r"[\W_]*(?:[^\W\d_]+|\d+)", stem)]
    return [stem[start:] for start in reversed(starts[1:])] + ([] if stem[-1:].isalnum() else _lone_end(stem))


def _lone_end(stem: str) -> list[str]:
    found = re.search(r"[\W_]+$", stem)
    return [found[0]] if found and found.start() else []


def _starts(stem: str) -> list[str]:
    """The beginnings of a name that are whole words, with the separator after them; shorter ones first.

    >>> _starts("gt_001_a")
    ['gt_', 'gt_001_']
    """
    return [stem[: found.end()] for found in re.finditer(r"(?:[^\W\d_]+|\d+)[\W_]*", stem)][:-1]


# ---- splits ----------------------------------------------------------------------------------------------------------


def _of_splits_with_masks(candidate: Candidate, files: Sequence[str]) -> Candidate:
    """The candidate for the one split with masks, where no other split has masks to train or to score on."""
    images, masks, splits = candidate.description.images, candidate.description.masks, candidate.pairs.splits
    drawn = [image for image, masks in candidate.pairs.masks.items() if masks]
    named = {splits[image] for image in drawn}
    if "split" not in images.fields or {"train"} < named or not drawn:
        return candidate
    words = {word for image in drawn if (found := images.match(image)) for word in [found["split"]]}
    if len(words) > 1:
        return candidate
    word = words.pop()
    first = candidate.pairs.masks[drawn[0]][0]
    other = (masks.match(first) or {}).get("split", word)
    description = Description.of(images.text.replace("{split}", word), masks.text.replace("{split}", other))
    return Candidate(description, pair(description, files))
