"""Reader for YOLO: data.yaml, images/ and labels/ with the same stems, boxes and polygons as shares of the image."""

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from featprobe.datasets.files import below, files_below, leads_out, own_table, read_text, start_of
from featprobe.datasets.images.pages import group_of
from featprobe.datasets.images.reading import SUFFIXES
from featprobe.datasets.lookup import Lookup
from featprobe.datasets.names import visible
from featprobe.datasets.objects import Tally, box_instance, check_classes, partly, polygon_instance
from featprobe.datasets.samples import DataSet, Sample, listed, tasks_of
from featprobe.datasets.values import check_names, gathered, shown, to_numbers, to_whole
from featprobe.errors import DataError, counted, looks_like
from featprobe.geometry import Size
from featprobe.targets import Instance, Target, semantic_from_instances

SPLIT_KEYS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
KEYS = (*SPLIT_KEYS, "names", "path", "nc", "kpt_shape")
LARGEST, DEEPEST = 1 << 18, 50  # bytes and levels of a YAML file
EMPTY = ("", "~", "null", "Null", "NULL")  # YAML's words for null
BOX_WORDS = 5  # class, centre x, centre y, width, height
ROTATED_WORDS = 9  # class, four corners


class PlainLoader(yaml.SafeLoader):
    """YAML where every plain word is a text: `no`, `010`, `1_000` and `null` are names of classes.

    A key that a mapping has twice is an error.
    """

    yaml_implicit_resolvers = {"<": [("tag:yaml.org,2002:merge", re.compile("^<<$"))]}  # noqa: RUF012

    def fetch_flow_collection_start(self, kind: Any) -> None:
        """A list or a mapping in brackets begins. Raises YAMLError where it is nested deeper than any annotation."""
        if self.flow_level > DEEPEST:
            raise yaml.YAMLError(f"it is nested more than {DEEPEST} deep")
        super().fetch_flow_collection_start(kind)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        again = next((key for key, count in Counter(keys).items() if count > 1), None)
        if again is not None:
            raise yaml.constructor.ConstructorError(problem=f"{shown(again)} is there twice")
        return super().construct_mapping(node, deep)


def find_yolo(root: Path) -> Path | None:
    """The YAML file of a folder that names classes and a training split; data.yaml before others."""
    if not root.is_dir():
        return None
    found = [path for path in visible(root, root.iterdir()) if path.suffix in (".yaml", ".yml") and path.is_file()]
    found.sort(key=lambda path: path.stem not in ("data", "dataset"))
    return next((path for path in found if not leads_out(root, path) and _names_a_set(path)), None)


def read_yolo(name: str, root: Path) -> DataSet:
    """The data set of a YOLO folder. A line of labels is `class x y width height` (centre), or `class x1 y1 x2 y2 …`.

    Paths begin at `path` where that is a folder in the data folder, else at the data folder. An image without a label
    file has no objects. If every object has a polygon the set has masks, else only boxes. From labels with keypoints,
    which `kpt_shape` announces, only the boxes are read. samples.csv (image,split,group) may name groups.
    """
    path = find_yolo(root)
    if path is None:
        raise DataError(f"{root} holds no YAML file that names classes and a training split.")
    data = _read_yaml(path)
    check_names(data, KEYS, path)
    classes = _classes(data, path)
    keypoints = _keypoint_words(data, path)
    table = own_table(root)
    samples: list[Sample] = []
    label_of: dict[str, Path] = {}  # by the image's id
    look = Lookup(root)
    for key, split in SPLIT_KEYS.items():
        for image in _images(look, data, key, path):
            own = image.relative_to(root).as_posix()
            identity = f"{split}/{own}" if own in label_of else own
            if identity in label_of:
                raise DataError(f"{path} lists the image {own} twice in {split}.")
            whole = group_of(own, image)
            row = table.row(own, whole, image.name)
            label_of[identity] = look.path(_label_path(root, image), image)
            samples.append(Sample(identity, image, row.get("group") or whole, split, str(label_of[identity])))
    if not samples:
        raise DataError(
            f"{path} names no image of this folder. wanted: train, val and test as folders or lists below it."
        )
    bare = [identity for identity, label in label_of.items() if not label.is_file()]
    if len(bare) == len(label_of):
        raise DataError(f"{root} has no label files. wanted: {label_of[bare[0]]} and so on.")
    counts = counted(len(bare), "image has no label file and counts", "images have no label file and count")
    notes = [f"{counts} as free of objects: {listed(bare)}"] if bare else []
    notes += table.notes()
    masks = False
    if keypoints:
        notes.append(f"keypoints (kpt_shape of {path.name}) are ignored, only boxes are read")
    else:
        masks, kinds = _kinds(label_of.values(), root)
        notes += kinds

    def read_target(sample: Sample, size: Size) -> Target:
        label = Path(sample.labels)
        lines = read_text(label).splitlines() if label.is_file() else []
        each = (
            partial(_instance, line.split(), classes, size, f"{label}, line {number}", keypoints)
            for number, line in enumerate(lines, start=1)
            if line.strip()
        )
        instances = tuple(gathered(each))
        return Target(semantic_from_instances(instances, size) if masks else None, instances)

    tasks = tasks_of(masks=masks, instances=True)
    return DataSet(name, root, classes, samples, tasks, read_target, tuple(notes))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.load(read_text(path, LARGEST), PlainLoader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{path} can't be read as YAML: {error}.") from error
    if not isinstance(data, dict):
        raise DataError(f"{path} is not a YOLO file. wanted: names, train, val, test.")
    return {key: value for key, value in data.items() if key == "names" or value not in EMPTY}


def _names_a_set(path: Path) -> bool:
    """Whether a file names classes and a training split, or has misspelled ones beside a folder of labels."""
    lines = start_of(path, 1 << 16).splitlines()
    if all(any(line.startswith(word) for line in lines) for word in (b"names", b"train")):
        return True
    keys = [line.partition(b":")[0].decode(errors="replace").strip() for line in lines if b":" in line]
    slips = looks_like(keys, ("names", "train")).values()
    labelled = any(next(path.parent.glob(pattern), None) for pattern in ("labels", "*/labels"))
    return labelled and {"names", "train"} <= {*keys, *slips}


def _classes(data: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """Class names, the background first. Raises DataError."""
    names = data.get("names")
    if isinstance(names, dict):
        with suppress(DataError):
            numbered = {to_whole(number, path): name for number, name in names.items()}
            names = [numbered[i] for i in range(len(names))] if set(numbered) == set(range(len(names))) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise DataError(f"{path}: wanted names as a list, or by number from 0 on. found: {shown(names)}")
    if "nc" in data and to_whole(data["nc"], f"{path}, nc") != len(names):
        raise DataError(f"{path}: nc is {data['nc']}, but it lists {len(names)} names.")
    return check_classes(["background", *(name.strip() for name in names)], path)


def _keypoint_words(data: Mapping[str, Any], path: Path) -> int:
    """The number of words per line that are keypoints, by `kpt_shape`: points times 2 or 3; 0 without it.

    Raises DataError.
    """
    if "kpt_shape" not in data:
        return 0
    where, stated = f"{path}, kpt_shape", data["kpt_shape"]
    shape = [to_whole(v, where, 1) for v in stated] if isinstance(stated, list) else []
    if len(shape) != 2 or shape[1] not in (2, 3):
        raise DataError(f"{where}: wanted the number of points, and 2 or 3 numbers for each, found {shown(stated)}.")
    return shape[0] * shape[1]


def _base(root: Path, data: Mapping[str, Any]) -> Path:
    """The folder where the paths of a YAML file begin: `path`, if that is a folder in the data folder, else `root`."""
    named = data.get("path")
    if isinstance(named, str):
        with suppress(DataError):
            base = below(root, named, "path")
            return base if base.is_dir() else root
    return root


def _images(look: Lookup, data: Mapping[str, Any], key: str, path: Path) -> list[Path]:
    """The images of a split, from one or more folders or lists. Raises DataError."""
    root = look.root
    base = _base(root, data)
    named = data.get(key) or []
    texts = named if isinstance(named, list) else [named]
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"{path}: wanted {key} as a path or a list of paths, found {shown(named)}.")
    images: list[Path] = []
    for text in texts:
        place = _place(root, base, text, f"{path}, {key}")
        if place.is_dir():
            images += files_below(root, place)
        elif place.suffix.lower() in SUFFIXES:
            images.append(place)
        elif place.is_file():
            lines = [line.strip() for line in read_text(place).splitlines() if line.strip()]
            images += [look.path(line, f"{place}: {line[:80]!r}", base) for line in lines]
        elif key != "test":
            raise DataError(f"{path}: {key} names {text!r}, and there is no {place}.")
    return images


def _place(root: Path, base: Path, text: str, where: str) -> Path:
    """The path that a split names. Roboflow writes `../train/images` for a folder beside the YAML file."""
    plain = text.replace("\\", "/")
    inside = plain.removeprefix("../")
    return below(root, inside if plain != inside and (base / inside).is_dir() else plain, where, base)


def _label_path(root: Path, image: Path) -> str:
    """The label file of an image, relative to `root`: in labels/ where the image is in images/, else beside it."""
    parts = list(image.relative_to(root).with_suffix(".txt").parts)
    if "images" in parts[:-1]:
        last = len(parts) - 2 - parts[-2::-1].index("images")
        parts[last] = "labels"
    return "/".join(parts)


def _kinds(paths: Iterable[Path], root: Path) -> tuple[bool, list[str]]:
    """Whether there are objects and all are polygons; and notes on objects of another kind.

    Unreadable files are skipped: reading their labels raises.
    """
    boxes, polygons, rotated = Tally(), Tally(), Tally()
    for path in paths:
        with suppress(DataError):
            for number, line in enumerate(read_text(path).splitlines(), start=1):
                words = len(line.split())
                if words:
                    kind = boxes if words <= BOX_WORDS else polygons
                    kind.add(f"{path.relative_to(root)}, line {number}")
                    if words == ROTATED_WORDS:
                        rotated.add(path)
    notes = partly("no masks are read, only boxes", polygons, "as polygons", boxes)
    if rotated.count and rotated.count == polygons.count:
        notes.append(
            "every polygon has four corners, like rotated boxes (OBB): if they are boxes, masks show no outlines"
        )
    return bool(polygons.count) and not boxes.count, notes


def _instance(words: Sequence[str], classes: Sequence[str], size: Size, where: str, keypoints: int = 0) -> Instance:
    kind, *values = to_numbers(words, where)
    if kind not in range(len(classes) - 1):
        raise DataError(f"{where}: wanted a class of 0 to {len(classes) - 2}, found {words[0]}.")
    if keypoints and len(words) not in (BOX_WORDS, BOX_WORDS + keypoints):
        raise DataError(
            f"{where}: wanted a class, a box and {keypoints} numbers of keypoints, found {len(words)} words."
        )
    height, width = size
    if keypoints or len(words) == BOX_WORDS:
        x, y, w, h = (v * side for v, side in zip(values[:4], (width, height) * 2, strict=True))
        return box_instance(int(kind) + 1, (x - w / 2, y - h / 2, x + w / 2, y + h / 2), size, where)
    if len(values) % 2 or len(values) < 6:
        raise DataError(
            f"{where}: wanted a class and 4 numbers, or x y of three points or more, found {len(words)} words."
        )
    points = np.array(values).reshape(-1, 2) * (width, height)  # (points, 2), pixels, x y
    return polygon_instance(int(kind) + 1, [points], size, where)
