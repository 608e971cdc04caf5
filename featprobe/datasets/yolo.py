"""Reader for YOLO: data.yaml, images/ and labels/ with the same stems, boxes and polygons in shares of the image."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

import numpy as np
import yaml

from featprobe.datasets.files import below, files_below, kept_below, own_table, read_text, start_of
from featprobe.datasets.images import SUFFIXES
from featprobe.datasets.names import visible
from featprobe.datasets.objects import box_instance, check_classes, polygon_instance, to_numbers
from featprobe.datasets.pages import group_of
from featprobe.datasets.samples import DataSet, Sample, listed, tasks_of
from featprobe.errors import DataError, counted
from featprobe.geometry import Size
from featprobe.targets import Instance, Target, semantic_from_instances

SPLIT_KEYS = {"train": "train", "val": "val", "valid": "val", "test": "test"}
BOX_WORDS = 5  # class, centre x, centre y, width, height


def find_yolo(root: Path) -> Path | None:
    """The YAML file of a folder that names classes and a training split; data.yaml before others."""
    if not root.is_dir():
        return None
    found = [path for path in visible(root, root.iterdir()) if path.suffix in (".yaml", ".yml") and path.is_file()]
    found.sort(key=lambda path: path.stem not in ("data", "dataset"))
    return next((path for path in found if not path.is_symlink() and _names_a_set(path)), None)


def read_yolo(name: str, root: Path) -> DataSet:
    """The data set of a YOLO folder. A label line is `class x y width height` (centre), or `class x1 y1 x2 y2 …`.

    Paths begin at `path` where that is a folder in the data folder, else at the data folder itself. An image without a
    label file has no objects. With a polygon for every object the set serves masks, else boxes. samples.csv
    (image,split,group) may name groups.
    """
    path = find_yolo(root)
    if path is None:
        raise DataError(f"{root} holds no YAML file that names classes and a training split.")
    data = _read_yaml(path)
    classes = _classes(data, path)
    table = own_table(root)
    samples: list[Sample] = []
    label_of: dict[str, Path] = {}  # by the image's id
    for key, split in SPLIT_KEYS.items():
        for image in _images(root, data, key, path):
            own = image.relative_to(root).as_posix()
            identity = f"{split}/{own}" if own in label_of else own
            if identity in label_of:
                raise DataError(f"{path} lists the image {own} twice in {split}.")
            whole = group_of(own, image)
            row = table.row(own, whole, image.name)
            label_of[identity] = kept_below(root, _label_path(root, image))
            samples.append(Sample(identity, image, row.get("group") or whole, split, str(label_of[identity])))
    if not samples:
        raise DataError(
            f"{path} names no image that is here. wanted: train, val and test as folders or lists below it."
        )
    bare = [identity for identity, label in label_of.items() if not label.is_file()]
    if len(bare) == len(label_of):
        raise DataError(f"{root} has no label files. wanted: {label_of[bare[0]]} and its like.")
    counts = counted(len(bare), "image has no label file and counts", "images have no label file and count")
    notes = [f"{counts} as free of objects: {listed(bare)}"] if bare else []
    notes += table.notes()
    masks = _all_polygons(label_of.values())

    def read_target(sample: Sample, size: Size) -> Target:
        label = Path(sample.labels)
        lines = read_text(label).splitlines() if label.is_file() else []
        instances = tuple(
            _instance(line.split(), classes, size, f"{label}, line {number}")
            for number, line in enumerate(lines, start=1)
            if line.strip()
        )
        return Target(semantic_from_instances(instances, size) if masks else None, instances)

    tasks = tasks_of(masks=masks, instances=True)
    return DataSet(name, root, classes, samples, tasks, read_target, tuple(notes))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{path} can't be read as YAML: {error}.") from error
    if not isinstance(data, dict):
        raise DataError(f"{path} is not a YOLO file. wanted: names, train, val, test.")
    return data


def _names_a_set(path: Path) -> bool:
    lines = start_of(path, 1 << 16).splitlines()
    return all(any(line.startswith(word) for line in lines) for word in (b"names", b"train"))


def _classes(data: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """Class names, the background first. Raises DataError."""
    names = data.get("names")
    if isinstance(names, dict) and set(names) == set(range(len(names))):
        names = [names[i] for i in range(len(names))]
    if not isinstance(names, list) or not all(_is_name(name) for name in names):
        raise DataError(f"{path}: wanted names as a list, or by number from 0 on. found: {_shown(names)}")
    if data.get("nc", len(names)) != len(names):
        raise DataError(f"{path}: nc is {_shown(data['nc'])}, and {len(names)} names are given.")
    return check_classes(["background", *map(str, names)], path)


def _shown(value: Any) -> str:
    """A YAML value, shortened: one of a few lines can stand for a text of gigabytes."""
    try:
        return shortened(value)
    except ValueError:  # Python writes no number of thousands of digits
        return "a number of thousands of digits"


def _is_name(value: Any) -> bool:
    """Whether a YAML value can be a class's name; `1` is one, too."""
    return isinstance(value, str) or (isinstance(value, int) and abs(value) < 1 << 31)


def _base(root: Path, data: Mapping[str, Any]) -> Path:
    """Where the paths of a YAML file begin: `path`, where that is a folder below its own, else its own."""
    named = data.get("path")
    if isinstance(named, str):
        with suppress(DataError):
            base = below(root, named, "path")
            return base if base.is_dir() else root
    return root


def _images(root: Path, data: Mapping[str, Any], key: str, path: Path) -> list[Path]:
    """The images of a split: of one folder or list, or of several. Raises DataError."""
    base = _base(root, data)
    named = data.get(key) or []
    texts = named if isinstance(named, list) else [named]
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"{path}: wanted {key} as a path or a list of paths, found {_shown(named)}.")
    images: list[Path] = []
    for text in texts:
        place = _place(root, base, text, f"{path}, {key}")
        if place.is_dir():
            images += files_below(root, place)
        elif place.suffix.lower() in SUFFIXES:
            images.append(place)
        elif place.is_file():
            lines = [line.strip() for line in read_text(place).splitlines() if line.strip()]
            images += [below(root, line, f"{place}: {line[:80]!r}", base) for line in lines]
        elif key != "test":
            raise DataError(f"{path}: {key} names {text!r}, and there is no {place}.")
    return images


def _place(root: Path, base: Path, text: str, where: str) -> Path:
    """What a split names. Exports of Roboflow write `../train/images` for a folder beside the YAML file."""
    plain = text.replace("\\", "/")
    inside = plain.removeprefix("../")
    return below(root, inside if plain != inside and (base / inside).is_dir() else plain, where, base)


def _label_path(root: Path, image: Path) -> Path:
    """The label file of an image: in labels/ where the image is in images/, else beside it."""
    parts = list(image.relative_to(root).with_suffix(".txt").parts)
    if "images" in parts[:-1]:
        last = len(parts) - 2 - parts[-2::-1].index("images")
        parts[last] = "labels"
    return root.joinpath(*parts)


def _all_polygons(paths: Iterable[Path]) -> bool:
    """Whether every object is a polygon, and there is one. Files that can't be read are met again, by name."""
    counts: set[bool] = set()
    for path in paths:
        with suppress(DataError):
            counts |= {len(line.split()) > BOX_WORDS for line in read_text(path).splitlines() if line.strip()}
    return counts == {True}


def _instance(words: Sequence[str], classes: Sequence[str], size: Size, where: str) -> Instance:
    kind, *values = to_numbers(words, where)
    if kind not in range(len(classes) - 1):
        raise DataError(f"{where}: wanted a class of 0 to {len(classes) - 2}, found {words[0]}.")
    height, width = size
    if len(words) == BOX_WORDS:
        x, y, w, h = (v * side for v, side in zip(values, (width, height) * 2, strict=True))
        return box_instance(int(kind) + 1, (x - w / 2, y - h / 2, x + w / 2, y + h / 2), size, where)
    if len(values) % 2 or len(values) < 6:
        raise DataError(
            f"{where}: wanted a class and 4 numbers, or x y of three points or more, found {len(words)} words."
        )
    points = np.array(values).reshape(-1, 2) * (width, height)  # (points, 2), pixels, x y
    return polygon_instance(int(kind) + 1, [points], size, where)
