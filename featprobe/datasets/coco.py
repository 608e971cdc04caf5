"""Reader for COCO JSON: polygons, uncompressed and compressed RLE, boxes, crowds, groups."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask

from featprobe.datasets.files import named_below, read_json, start_of
from featprobe.datasets.names import first_there, visible
from featprobe.datasets.pages import group_of, page_of
from featprobe.datasets.samples import DataSet, Sample, listed, tasks_of
from featprobe.errors import DataError, LabelSizeError, OutOfImageError
from featprobe.geometry import Size
from featprobe.targets import IGNORE, Instance, Labels, Rle, Target, decode_rle, semantic_from_instances

SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
FIELDS = {"images": ("id", "file_name"), "annotations": ("image_id", "category_id"), "categories": ("id", "name")}
READ = {"id", "file_name", "height", "width", "category_id", "segmentation", "bbox", "area", "iscrowd", "isthing"}
SLACK = 1.0  # pixels by which a coordinate may pass the image's edge: rounding of common exporters


@dataclass(frozen=True)
class Category:
    """One category. thing: whether its annotations are objects, not regions; background: whether it is class 0."""

    name: str
    thing: bool
    background: bool


def find_coco(root: Path) -> list[Path]:
    """COCO JSON files of a folder: at its top, in annotations/, or in one folder per split."""
    if root.is_file():
        return [root] if root.suffix == ".json" else []
    found = visible(root, [*root.glob("*.json"), *root.glob("annotations/*.json")])
    found += visible(root, (path for path in root.glob("*/*.json") if path.parent.name in SPLIT_WORDS))
    instances = [path for path in found if path.name.startswith("instances")]
    return [path for path in instances or found if _looks_like_coco(path)]


def read_coco(name: str, root: Path, files: Sequence[Path]) -> DataSet:
    """The data set of one or more COCO files, one per split or one in all.

    A file's split is named by its stem or folder (train, val, test); an image's entry may also carry
    `split` and `group`. What is `isthing` 0, itself or by its category, is painted over the objects and is none; a
    set whose categories all are has no objects. A category that is `background`, or called so, is class 0. Raises
    DataError when the files disagree on their categories.
    """
    loaded = [(path, _load(path)) for path in files]
    categories = _categories(loaded)
    classes, index = _class_index(categories)
    samples: list[Sample] = []
    known: set[str] = set()
    named: set[tuple[str, str]] = set()
    first_of: dict[Path, str] = {}
    things = any(category.thing for category in categories.values() if not category.background)
    masks, annotated = True, not things
    for number, (path, data) in enumerate(loaded):
        by_image: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
        for annotation in data["annotations"]:
            by_image[annotation["image_id"]].append(annotation)
            masks &= bool(annotation.get("segmentation"))
            annotated = True
        ids = {image["id"] for image in data["images"]}
        unknown = sorted(str(own) for own in by_image.keys() - ids)
        if unknown:
            raise DataError(f"{path} has annotations of images that it does not list: {listed(unknown)}.")
        if len(ids) < len(data["images"]):
            raise DataError(f"{path} gives several images the same id, so that their annotations can't be told apart.")
        for image in data["images"]:
            split = str(image.get("split") or _split_word(path, root))
            place = find_image(root if root.is_dir() else root.parent, path, split, str(image["file_name"]))
            identity = str(image["file_name"])
            if (split, identity) in named:
                raise DataError(f"{path} lists the image {identity} twice.")
            named.add((split, identity))
            if identity in known:
                identity = f"{split}/{identity}"
            known.add(identity)
            file, _ = page_of(place)  # a file that stands in two splits is one group: it leaks
            own = first_of.setdefault(file, group_of(identity, place))
            group = own if image.get("group") is None else str(image["group"])
            labels = json.dumps(
                [number, _kept(image), [_kept(a) for a in by_image[image["id"]]]], separators=(",", ":")
            )
            samples.append(Sample(identity, place, group, split, labels))
    if not samples:
        raise DataError(f"{root} lists no images.")

    def read_target(sample: Sample, size: Size) -> Target:
        number, image, annotations = json.loads(sample.labels)
        where = f"{files[number]}, image {image['file_name']}"
        if (image.get("height"), image.get("width")) not in (size, (None, None)):
            raise LabelSizeError(
                f"{where}: the annotation is of another size than the image.\n"
                f"  wanted  {size[0]}x{size[1]} pixels, as the image has (height x width)\n"
                f"  found   {image.get('height')}x{image.get('width')}"
            )
        read = [(_read_instance(a, index, size, where), _is_thing(a, categories)) for a in annotations]
        instances = tuple(instance for instance, thing in read if thing)
        semantic = _painted(instances, [instance for instance, thing in read if not thing], size) if masks else None
        return Target(semantic, instances if things else None, image["id"])

    if not (masks or things):
        raise DataError(
            f"{root} has regions (isthing 0) without a segmentation, and no objects. Nothing can be learnt."
        )
    tasks = tasks_of(masks=masks and annotated, instances=things)
    category_ids = tuple(own for own, i in sorted(index.items(), key=lambda item: item[1]) if i)
    return DataSet(name, root, classes, samples, tasks, read_target, category_ids=category_ids)


def find_image(root: Path, annotations: Path, split: str, file_name: str) -> Path:
    """Where an image of a COCO file lies; the first place tried when it lies nowhere.

    PIDray's and CVAT's images lie in folders of the last word of a file's name, RarePlanes' in PS-RGB_tiled of a
    split's. Raises DataError for a name that is absolute, or leads out of the data folder by `..` from every place.
    """
    last = annotations.stem.rpartition("_")[2]
    folders = ["images", f"images/{annotations.stem}", f"images/{last}", ".", "data", last]
    if split:
        folders[1:1] = [f"images/{split}", split, f"{split}2017", f"{split}/PS-RGB_tiled"]
    places = []
    for base in [*(root / folder for folder in folders), annotations.parent]:
        with suppress(DataError):
            places.append(named_below(root, file_name, annotations, base))
    if not places:
        named_below(root, file_name, f"{annotations}, file_name")
    return first_there(root, places) or places[0]


def _kept(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What is read of an image's entry, or of an annotation."""
    return {name: value for name, value in entry.items() if name in READ}


def _load(path: Path) -> dict[str, Any]:
    data = read_json(path)
    if not isinstance(data, dict) or any(not isinstance(data.get(part), list) for part in FIELDS):
        raise DataError(f"{path} is not COCO JSON. wanted: lists called {', '.join(FIELDS)}.")
    for part, names in FIELDS.items():
        for i, entry in enumerate(data[part]):
            if not isinstance(entry, dict) or not all(isinstance(entry.get(n), int | float | str) for n in names):
                raise DataError(
                    f"{path}, {part}[{i}] can't be read.\n"
                    f"  wanted  {', '.join(names)}, each a number or a text\n  found   {str(entry)[:200]}"
                )
    return data


def _looks_like_coco(path: Path) -> bool:
    start = start_of(path, 1 << 20)
    return b'"images"' in start or b'"annotations"' in start or b'"categories"' in start


def _split_word(path: Path, root: Path) -> str:
    """The split that a file's stem names, or its folder where that lies inside of the data set."""
    words = path.stem.lower().replace("-", "_").split("_")
    if root not in (path, path.parent):
        words.append(path.parent.name.lower())
    stripped = [word.rstrip("0123456789") for word in words]
    return next((SPLIT_WORDS[word] for word in stripped if word in SPLIT_WORDS), "")


def _categories(loaded: Sequence[tuple[Path, Mapping[str, Any]]]) -> dict[int, Category]:
    first_path, first = loaded[0]
    categories = _categories_of(first)
    for path, data in loaded[1:]:
        others = _categories_of(data)
        if others != categories:
            raise DataError(
                f"{path} and {first_path} name other categories:\n"
                f"  {', '.join(map(str, others.values()))}\n  {', '.join(map(str, categories.values()))}"
            )
    return categories


def _categories_of(data: Mapping[str, Any]) -> dict[int, Category]:
    """Categories by id. Where none is marked as the background, one called so is."""
    marked = any(entry.get("background") is True for entry in data["categories"])
    found = {}
    for entry in data["categories"]:
        named = not marked and str(entry["name"]).lower() == "background"
        name = "background" if named else str(entry["name"])
        found[entry["id"]] = Category(name, entry.get("isthing", 1) != 0, named or entry.get("background") is True)
    return found


def _class_index(categories: Mapping[int, Category]) -> tuple[tuple[str, ...], dict[int, int]]:
    """Class names, the background first, and the class index of each category id."""
    try:
        order = sorted(categories)
    except TypeError as error:
        raise DataError(
            f"The category ids {list(categories)[:20]} are numbers and texts. wanted: all of a kind."
        ) from error
    named = [number for number in order if not categories[number].background]
    index = dict.fromkeys(order, 0) | {number: i for i, number in enumerate(named, start=1)}
    if len(named) >= IGNORE:
        raise DataError(f"{len(named)} categories do not fit a mask of 8 bits. wanted: at most {IGNORE - 1}.")
    background = next((categories[number].name for number in order if categories[number].background), "background")
    return (background, *(categories[number].name for number in named)), index


def _is_thing(annotation: Mapping[str, Any], categories: Mapping[int, Category]) -> bool:
    return categories[annotation["category_id"]].thing and annotation.get("isthing", 1) != 0


def _painted(objects: Sequence[Instance], regions: Sequence[Instance], size: Size) -> Labels | None:
    """The (height, width) mask of objects with regions over it, in their order."""
    painted = semantic_from_instances(objects, size)
    for region in regions:
        if painted is not None and region.rle is not None:
            painted[decode_rle(region.rle)] = IGNORE if region.crowd else region.category
    return painted


def _read_instance(annotation: Mapping[str, Any], index: Mapping[int, int], size: Size, where: str) -> Instance:
    """One annotation, checked; whatever is wrong with it is a DataError."""
    where = f"{where}, annotation {annotation.get('id')}"
    try:
        return _instance(annotation, index, size, where)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DataError(f"{where} can't be read: {type(error).__name__}: {error}.") from error


def _instance(annotation: Mapping[str, Any], index: Mapping[int, int], size: Size, where: str) -> Instance:
    if annotation["category_id"] not in index:
        raise DataError(f"{where}: category {annotation['category_id']} is not listed. Known: {sorted(index)}.")
    rle = _rle(annotation.get("segmentation"), size, where)
    if annotation.get("bbox"):
        x, y, w, h = (float(v) for v in annotation["bbox"])
    elif rle is not None:
        x, y, w, h = (float(v) for v in coco_mask.toBbox(rle))
    else:
        raise DataError(f"{where} has neither a box nor a mask.")
    height, width = size
    box = (x, y, x + w, y + h)
    if not (w >= 0 and h >= 0 and -SLACK <= x and x + w <= width + SLACK and -SLACK <= y and y + h <= height + SLACK):
        raise OutOfImageError(
            f"{where}: the box lies outside of the image.\n"
            f"  wanted  0 <= x1 <= x2 <= {width}, 0 <= y1 <= y2 <= {height} pixels\n"
            f"  found   x1, y1, x2, y2 = {', '.join(f'{v:g}' for v in box)}"
        )
    x1, x2 = (min(max(v, 0.0), float(width)) for v in (box[0], box[2]))
    y1, y2 = (min(max(v, 0.0), float(height)) for v in (box[1], box[3]))
    area = None if annotation.get("area") is None else float(annotation["area"])
    return Instance(index[annotation["category_id"]], (x1, y1, x2, y2), rle, bool(annotation.get("iscrowd", 0)), area)


def _rle(segmentation: Any, size: Size, where: str) -> Rle | None:
    """Compressed RLE of any of COCO's three forms of a mask; None when there is none."""
    if not segmentation:
        return None
    height, width = size
    if isinstance(segmentation, list):
        short = [len(polygon) for polygon in segmentation if len(polygon) < 6 or len(polygon) % 2]
        if short:  # pycocotools would take four numbers for a box
            raise DataError(f"{where}: a polygon of {short[0]} numbers. wanted: x y of three points or more.")
        inside = (
            -SLACK <= x <= width + SLACK and -SLACK <= y <= height + SLACK
            for polygon in segmentation
            for x, y in zip(polygon[::2], polygon[1::2], strict=True)
        )
        if not all(inside):
            raise OutOfImageError(f"{where}: the polygon leaves the image of {width}x{height} pixels (width x height).")
        merged = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    else:
        if list(segmentation["size"]) != [height, width]:
            raise LabelSizeError(
                f"{where}: the RLE mask is of another size than the image.\n"
                f"  wanted  {[height, width]} (height, width)\n  found   {segmentation['size']}"
            )
        counts = segmentation["counts"]
        if isinstance(counts, list):
            if sum(counts) != height * width or min(counts) < 0:
                raise DataError(f"{where}: the RLE covers {sum(counts)} pixels, wanted {height * width}.")
            merged = coco_mask.frPyObjects(segmentation, height, width)
        else:
            _check_compressed(counts, height * width, where)
            merged = segmentation
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
        if not 0 <= bits < 64:  # pycocotools would stop at a 0, and take what is beyond as something else
            raise DataError(f"{where}: the RLE holds the byte {character}. The string is damaged.")
        value |= (bits & 0x1F) << shift
        shift += 5
        if not bits & 0x20:
            if bits & 0x10:
                value |= -1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift or sum(runs) != pixels or min(runs, default=0) < 0:
        raise DataError(f"{where}: the RLE covers {sum(runs)} pixels, wanted {pixels}. The string is damaged.")
