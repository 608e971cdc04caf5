"""Reader for COCO JSON: polygons, uncompressed and compressed RLE, boxes, crowds, groups."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

from pycocotools import mask as coco_mask

from featprobe.datasets.files import kept_below, leads_out, named_below, read_json, start_of
from featprobe.datasets.images.pages import group_of, page_of
from featprobe.datasets.lookup import Lookup
from featprobe.datasets.names import first_there, visible
from featprobe.datasets.objects import SLACK, Tally, box_instance, check_stated, drawn, partly
from featprobe.datasets.samples import SPLIT_WORDS, DataSet, Sample, listed, tasks_of
from featprobe.datasets.values import (
    NOTHING,
    Faults,
    check_names,
    gathered,
    shown,
    to_name,
    to_number,
    to_numbers,
    to_truth,
    to_whole,
)
from featprobe.errors import DataError, LabelSizeError, OutOfImageError, looks_like
from featprobe.geometry import Size
from featprobe.targets import IGNORE, Instance, Labels, Rle, Target, decode_rle, semantic_from_instances

FIELDS = {"images": ("id", "file_name"), "annotations": ("image_id", "category_id"), "categories": ("id", "name")}
OPTIONAL = {
    "images": ("height", "width", "split", "group"),
    "annotations": ("id", "segmentation", "bbox", "area", "iscrowd", "isthing"),
    "categories": ("isthing", "background", "supercategory"),
}
READ = {"id", "file_name", "height", "width", "category_id", "segmentation", "bbox", "area", "iscrowd", "isthing"}


LONGEST_RUN = 60  # bits of a run length
PLAIN_NUMBER = re.compile(r"0|-?[1-9]\d{0,99}", re.ASCII)
T = TypeVar("T")
Id = int | str
"""The id of an image or a category in a file; `same_id` makes equal ids equal values."""


@dataclass(frozen=True)
class Category:
    """One category. thing: whether its annotations are objects and not regions; background: whether it is class 0."""

    name: str
    thing: bool
    background: bool


def find_coco(root: Path) -> list[Path]:
    """COCO JSON files of a folder: at its top, in annotations/, or in one folder per split."""
    if root.is_file():
        return [root] if root.suffix == ".json" else []
    found = visible(root, [*root.glob("*.json"), *root.glob("annotations/*.json")])
    found += visible(root, (path for path in root.glob("*/*.json") if path.parent.name.lower() in SPLIT_WORDS))
    instances = [path for path in found if path.name.startswith("instances")]
    return [path for path in instances or found if _looks_like_coco(path, root)]


def read_coco(name: str, root: Path, files: Sequence[Path]) -> DataSet:
    """The data set of one or more COCO files, one per split or one for all.

    The stem or folder of a file names its split (train, val, test); an image's entry may also have `split` and `group`.
    An annotation with `isthing` 0, itself or by its category, is a region and no object: it is painted over the objects
    in the mask. A set where all categories have `isthing` 0 has no objects. A category with `background`, or of that
    name, is class 0. Among categories of one name those without annotations are left out. Numbers may be written as
    texts. Raises DataError when files have different categories, or two categories of one name have annotations.
    """
    folder = root if root.is_dir() else root.parent
    loaded = [(path, _load(path if path == root else kept_below(folder, path))) for path in files]
    used = {same_id(annotation["category_id"]) for _, data in loaded for annotation in data["annotations"]}
    categories, notes = _once_each(_categories(loaded), used, root)
    classes, index = _class_index(categories)
    read_one = partial(_read_one, categories, {same_id(own): own for own in categories}, index)
    samples: list[Sample] = []
    known: set[str] = set()
    look = Lookup(folder)
    inside: set[Path] = set()  # folders that no link leads out of
    named: set[tuple[str, str]] = set()
    first_of: dict[Path, str] = {}
    things = any(category.thing for category in categories.values() if not category.background)
    outlined, bare = Tally(), Tally()
    for number, (path, data) in enumerate(loaded):
        by_image = _by_image(path, data, outlined, bare)
        for image in data["images"]:
            where = f"{path}, image {image['file_name']}"
            split = to_name(image.get("split"), f"{where}, split") or _split_word(path, root)
            place = find_image(look, path, split, str(image["file_name"]))
            if place.parent not in inside or place.is_symlink():
                inside.add(kept_below(folder, place).parent)
            identity = str(image["file_name"])
            if (split, identity) in named:
                raise DataError(f"{path} lists the image {identity} twice.")
            named.add((split, identity))
            if identity in known:
                identity = f"{split}/{identity}"
            known.add(identity)
            file, _ = page_of(place)  # a file that stands in two splits is one group: it leaks
            own = first_of.setdefault(file, group_of(identity, place))
            group = to_name(image.get("group"), f"{where}, group") or own
            annotations = [_kept(a) for a in by_image[same_id(image["id"])]]
            labels = json.dumps([number, _kept(image), annotations], separators=(",", ":"))
            samples.append(Sample(identity, place, group, split, labels))
    if not samples:
        raise DataError(f"{root} lists no images.")

    masks = not bare.count
    notes += partly("no masks are read, only boxes", bare, "without a segmentation", outlined)

    def read_target(sample: Sample, size: Size) -> Target:
        number, image, annotations = json.loads(sample.labels)
        where = f"{files[number]}, image {image['file_name']}"
        check_stated(image.get("height"), image.get("width"), size, f"{where}: what it states")
        each = (partial(_read, read_one, a, size, f"{where}, annotation {a.get('id')}") for a in annotations)
        read = gathered(each)
        instances = tuple(instance for instance, thing in read if thing)
        semantic = _painted(instances, [instance for instance, thing in read if not thing], size) if masks else None
        return Target(semantic, instances if things else None, image["id"])

    if not (masks or things):
        raise DataError(
            f"{root} has regions (isthing 0) without a segmentation, and no objects. Nothing can be learnt.\n"
            f"  wanted  a segmentation for each\n  found   none for {bare}"
        )
    tasks = tasks_of(masks=masks and (bool(outlined.count) or not things), instances=things)
    category_ids: tuple[Any, ...] = tuple(own for own, i in sorted(index.items(), key=lambda item: item[1]) if i)
    return DataSet(name, root, classes, samples, tasks, read_target, tuple(notes), category_ids)


def _by_image(
    path: Path, data: Mapping[str, Any], outlined: Tally, bare: Tally
) -> Mapping[Id, list[Mapping[str, Any]]]:
    """The annotations of each image of a file by its id. Raises DataError where they can't be assigned.

    outlined, bare: where annotations with and without a segmentation are counted.
    """
    by_image: dict[Id, list[Mapping[str, Any]]] = defaultdict(list)
    for i, annotation in enumerate(data["annotations"]):
        by_image[same_id(annotation["image_id"])].append(annotation)
        kind = bare if annotation.get("segmentation") in NOTHING else outlined
        kind.add(f"{path.name}, annotation {annotation.get('id', f'at place {i}')}")
    ids = {same_id(image["id"]) for image in data["images"]}
    unknown = sorted(map(shown, by_image.keys() - ids))
    if unknown:
        raise DataError(f"{path} has annotations for images that it does not list: {listed(unknown)}.")
    if len(ids) < len(data["images"]):
        raise DataError(f"{path} gives several images the same id, so their annotations can't be assigned.")
    return by_image


def _read_one(
    categories: Mapping[Id, Category],
    known_as: Mapping[Id, Id],
    index: Mapping[Id, int],
    annotation: Mapping[str, Any],
    size: Size,
    where: str,
) -> tuple[Instance, bool]:
    """The object of an annotation, and whether it is an object, not a region. known_as: category ids by `same_id`."""
    category = known_as.get(same_id(annotation["category_id"]))
    if category is None:
        listed_ids = ", ".join(map(shown, sorted(categories)))
        raise DataError(f"{where}: category {shown(annotation['category_id'])} is not listed. Known: {listed_ids}.")
    thing = categories[category].thing and to_truth(annotation.get("isthing"), f"{where}, isthing", default=True)
    return _instance(annotation, index[category], size, where), thing


def same_id(value: Any) -> Id:
    """The value by which ids are compared: 7, 7.0 and "7" are the same id.

    >>> same_id("7"), same_id(7.0), same_id("07")
    (7, 7, '07')
    """
    if isinstance(value, str):
        return int(value) if PLAIN_NUMBER.fullmatch(value) else value
    return int(value)


def find_image(look: Lookup, annotations: Path, split: str, file_name: str) -> Path:
    """The path of an image of a COCO file; the first possible path where it is nowhere.

    PIDray's and CVAT's images are in a folder with the last word of the JSON file's name, RarePlanes' in PS-RGB_tiled
    of a split's folder. Raises DataError for a name that is absolute, or leads out of the data folder by `..`.
    """
    root, bases = look.root, _image_folders(look.root, annotations, split)
    exact = look.exact(file_name, bases)
    if exact is not None:
        return exact[0]
    places = []
    for base in bases:
        with suppress(DataError):
            places.append(named_below(root, file_name, annotations, base))
    if not places:
        named_below(root, file_name, f"{annotations}, file_name")
    return first_there(root, places) or places[0]


@lru_cache(256)
def _image_folders(root: Path, annotations: Path, split: str) -> tuple[Path, ...]:
    """The folders where the images of a COCO file may lie, in the order in which they are looked at."""
    last = annotations.stem.rpartition("_")[2]
    folders = ["images", f"images/{annotations.stem}", f"images/{last}", ".", "data", last]
    if split:
        folders[1:1] = [f"images/{split}", split, f"{split}2017", f"{split}/PS-RGB_tiled"]
    return (*(root / folder for folder in folders), annotations.parent)


def _kept(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an image's entry or an annotation that are read later."""
    return {name: value for name, value in entry.items() if name in READ}


def _load(path: Path) -> dict[str, Any]:
    """The value of a COCO file, whose entries have the fields they need. Raises DataError with all faults."""
    data = read_json(path)
    if not isinstance(data, dict) or any(not isinstance(data.get(part), list) for part in FIELDS):
        alike = looks_like(data, FIELDS) if isinstance(data, dict) else {}
        said = "".join(f" {name!r} looks like {own!r}: rename it." for name, own in alike.items())
        raise DataError(f"{path} is not COCO JSON. wanted: lists called {', '.join(FIELDS)}.{said}")
    faults = Faults()

    def bad(part: str, names: Sequence[str], i: int, entry: object) -> str:
        wanted = f"{', '.join(names)}, each a whole number or a text"
        return f"{path}, {part}[{i}] can't be read.\n  wanted  {wanted}\n  found   {shown(entry)[:200]}"

    for part, names in FIELDS.items():
        for i, entry in enumerate(data[part]):
            if not isinstance(entry, dict) or not all(_is_id(entry.get(name)) for name in names):
                faults.say(partial(bad, part, names, i, entry))
    faults.raise_all()
    for part, names in FIELDS.items():
        known = (*names, *OPTIONAL[part])
        if looks_like(set().union(*data[part]) - set(known), known):  # rare, so only then each entry is checked
            each = (partial(check_names, entry, known, f"{path}, {part}[{i}]") for i, entry in enumerate(data[part]))
            gathered(each)
    return data


def _is_id(value: Any) -> bool:
    """Whether a value can be an id or a name: a whole number, or a text that is not blank."""
    if isinstance(value, float):
        return value.is_integer()
    return isinstance(value, int | str) and not isinstance(value, bool) and bool(str(value).strip())


def _looks_like_coco(path: Path, root: Path) -> bool:
    if leads_out(root, path):  # not opened here; reading it raises the error
        return path.name.startswith("instances") or path.parent.name == "annotations"
    start = start_of(path, 1 << 20)
    return b'"images"' in start or b'"annotations"' in start or b'"categories"' in start


def _split_word(path: Path, root: Path) -> str:
    """The split that a file's stem names, or its folder where that is inside the data set."""
    words = path.stem.lower().replace("-", "_").split("_")
    if root not in (path, path.parent):
        words.append(path.parent.name.lower())
    stripped = [word.rstrip("0123456789") for word in words]
    return next((SPLIT_WORDS[word] for word in stripped if word in SPLIT_WORDS), "")


def _categories(loaded: Sequence[tuple[Path, Mapping[str, Any]]]) -> dict[Id, Category]:
    first_path, first = loaded[0]
    categories = _categories_of(first, first_path)
    for path, data in loaded[1:]:
        others = _categories_of(data, path)
        if others != categories:
            raise DataError(
                f"{path} and {first_path} have different categories:\n"
                f"  {listed([*map(str, others.values())], 20)}\n  {listed([*map(str, categories.values())], 20)}"
            )
    return categories


def _categories_of(data: Mapping[str, Any], path: Path) -> dict[Id, Category]:
    """Categories by id. Where none is marked as background, the one of that name is. Raises DataError."""

    def says(entry: Mapping[str, Any], field: str, default: bool) -> bool:
        return to_truth(entry.get(field), f"{path}, category {entry['id']}, {field}", default)

    marked = any(says(entry, "background", False) for entry in data["categories"])
    found: dict[Id, Category] = {}
    for entry in data["categories"]:
        named = not marked and str(entry["name"]).lower() == "background"
        name = "background" if named else str(entry["name"])
        if entry["id"] in found:
            raise DataError(f"{path} lists the category {shown(entry['id'])} twice: {found[entry['id']].name}, {name}.")
        found[entry["id"]] = Category(name, says(entry, "isthing", True), named or says(entry, "background", False))
    return found


def _once_each(
    categories: Mapping[Id, Category], used: Collection[Id], root: Path
) -> tuple[dict[Id, Category], list[str]]:
    """Categories with different names, and a note per category without annotations that was left out for its name.

    Raises DataError where two categories of one name have annotations.
    """
    kept, notes = dict(categories), []
    by_name: dict[str, list[Id]] = defaultdict(list)
    for number, c in categories.items():
        by_name[c.name] += [] if c.background else [number]
    for name, own in by_name.items():
        drawn = [number for number in own if same_id(number) in used]
        if len(drawn) > 1:
            raise DataError(
                f"{root} has {len(drawn)} categories of the name {name!r} with annotations, so "
                f"they can't be distinguished.\n  wanted  a name for each\n  found   {', '.join(map(shown, drawn))}\n"
                "Nothing was read. Rename one, or give its annotations to the other."
            )
        for number in own:
            if number != (drawn or own)[0]:
                del kept[number]
                notes.append(f"the category {number} ({name}) has another's name but no annotation, and is left out")
    return kept, notes


def _class_index(categories: Mapping[Id, Category]) -> tuple[tuple[str, ...], dict[Id, int]]:
    """Class names, the background first, and the class index of each category id."""
    try:
        order = sorted(categories)
    except TypeError as error:
        raise DataError(
            f"The category ids {list(categories)[:20]} are numbers and texts. wanted: only numbers, or only texts."
        ) from error
    named = [number for number in order if not categories[number].background]
    index = dict.fromkeys(order, 0) | {number: i for i, number in enumerate(named, start=1)}
    if len(named) >= IGNORE:
        raise DataError(f"{len(named)} categories do not fit a mask of 8 bits. wanted: at most {IGNORE - 1}.")
    background = next((categories[number].name for number in order if categories[number].background), "background")
    return (background, *(categories[number].name for number in named)), index


def _painted(objects: Sequence[Instance], regions: Sequence[Instance], size: Size) -> Labels | None:
    """The (height, width) mask of objects, with regions painted over it in their order."""
    painted = semantic_from_instances(objects, size)
    for region in regions:
        if painted is not None and region.rle is not None:
            painted[decode_rle(region.rle)] = IGNORE if region.crowd else region.category
    return painted


def _read(
    read: Callable[[Mapping[str, Any], Size, str], T], annotation: Mapping[str, Any], size: Size, where: str
) -> T:
    """The result of reading an annotation. Any error becomes a DataError."""
    try:
        return read(annotation, size, where)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DataError(f"{where} can't be read: {type(error).__name__}: {error}.") from error


def _instance(annotation: Mapping[str, Any], category: int, size: Size, where: str) -> Instance:
    rle = _rle(annotation.get("segmentation"), size, where)
    stated = annotation.get("bbox")
    if stated in NOTHING and rle is None:
        raise DataError(f"{where} has neither a box nor a mask.")
    x, y, w, h = coco_mask.toBbox(rle).tolist() if stated in NOTHING else to_numbers(stated, f"{where}, bbox", 4)
    area = annotation.get("area")
    return box_instance(
        category, (x, y, x + w, y + h), size, where,
        crowd=to_truth(annotation.get("iscrowd"), f"{where}, iscrowd"),
        rle=rle, area=None if area in NOTHING else to_number(area, f"{where}, area"),
    )  # fmt: skip


def _rle(segmentation: Any, size: Size, where: str) -> Rle | None:
    """Compressed RLE from any of COCO's three forms of a mask; None where there is no mask."""
    if segmentation in NOTHING:
        return None
    height, width = size
    if isinstance(segmentation, list):
        short = [len(polygon) for polygon in segmentation if len(polygon) < 6 or len(polygon) % 2]
        if short:  # pycocotools would read four numbers as a box
            raise DataError(f"{where}: a polygon of {short[0]} numbers. wanted: x y of three points or more.")
        polygons = [to_numbers(polygon, f"{where}, segmentation") for polygon in segmentation]
        inside = (
            -SLACK <= x <= width + SLACK and -SLACK <= y <= height + SLACK
            for polygon in polygons
            for x, y in zip(polygon[::2], polygon[1::2], strict=True)
        )
        if not all(inside):
            raise OutOfImageError(f"{where}: the polygon leaves the image of {width}x{height} pixels (width x height).")
        merged = drawn(polygons, size, where)
    else:
        if [to_whole(side, f"{where}, segmentation, size") for side in segmentation["size"]] != [height, width]:
            raise LabelSizeError(
                f"{where}: the RLE mask has another size than the image.\n"
                f"  wanted  {[height, width]} (height, width)\n  found   {segmentation['size']}"
            )
        counts = segmentation["counts"]
        if isinstance(counts, list):
            if any(type(count) is not int for count in counts):
                counts = [to_whole(count, f"{where}, segmentation, counts") for count in counts]
            if sum(counts) != height * width or min(counts) < 0:
                raise DataError(f"{where}: the RLE covers {sum(counts)} pixels, wanted {height * width}.")
            merged = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        else:
            _check_compressed(counts, height * width, where)
            merged = {"size": [height, width], "counts": counts}
    counts = merged["counts"]
    return {"size": [height, width], "counts": counts if isinstance(counts, str) else counts.decode("ascii")}


def _check_compressed(counts: str, pixels: int, where: str) -> None:
    """Raise DataError when compressed RLE does not cover exactly the image's pixels.

    pycocotools trusts its input and would write past the end of the mask. Runs are LEB128-like, six
    bits a character from "0" on, each from the fourth on as the difference to the run two before (COCO's
    maskApi.c).
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts.encode():
        bits = character - 48
        if not 0 <= bits < 64:  # pycocotools would stop at a 0, and misread others
            raise DataError(f"{where}: the RLE holds the byte {character}. The string is damaged.")
        if shift > LONGEST_RUN:  # a number that grows with each character would take their square in time
            raise DataError(f"{where}: the RLE holds a run of more pixels than any image. The string is damaged.")
        value |= (bits & 0x1F) << shift
        shift += 5
        if not bits & 0x20:
            if bits & 0x10:
                value |= -1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift or sum(runs) != pixels or min(runs, default=0) < 0:
        raise DataError(f"{where}: the RLE covers {sum(runs)} pixels, wanted {pixels}. The string is damaged.")
