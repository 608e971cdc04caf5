"""Reader for labelme: one JSON file per image, polygons and rectangles. Also reads BSData's image_data.json."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featprobe.datasets.files import Table, below, files_below, kept_below, own_table, read_json, start_of
from featprobe.datasets.grouping import components
from featprobe.datasets.images.pages import group_of, is_page_name, page_of
from featprobe.datasets.images.reading import SUFFIXES
from featprobe.datasets.names import first_there, visible
from featprobe.datasets.objects import (
    Tally,
    check_classes,
    check_known,
    check_stated,
    partly,
    polygon_instance,
    read_classes,
)
from featprobe.datasets.samples import DataSet, Sample, listed, tasks_of
from featprobe.datasets.values import check_names, gathered, shown, to_name, to_numbers
from featprobe.errors import DataError, counted
from featprobe.geometry import Size
from featprobe.targets import Instance, Target, semantic_from_instances

BSDATA = "image_data.json"
IMAGE_FOLDERS = (".", "images", "data", "imgs", "JPEGImages")
FIELDS = ("version", "flags", "shapes", "imagePath", "imageData", "imageHeight", "imageWidth")
SHAPE_FIELDS = ("label", "points", "group_id", "shape_type", "flags", "description", "mask")
IGNORED, BACKGROUND = "__ignore__", "_background_"  # labelme's names
LOOKED_AT = 1 << 24  # bytes that are searched for "shapes"; the picture may come before it


@dataclass(frozen=True)
class Shape:
    """One drawn shape. part_of: a text that shapes of one object share; points: (points, 2), x y in pixels."""

    label: str
    part_of: str
    points: NDArray[np.float64]
    kind: str = "polygon"


@dataclass(frozen=True)
class Drawing:
    """One labelme file. named: its imagePath; size: the stated (height, width), None for a side that is not stated."""

    path: Path
    named: Any
    size: tuple[Any, Any]
    shapes: tuple[Shape, ...]


def is_labelme(root: Path) -> bool:
    """Whether a folder holds a labelme file, at its top or up to two folders down."""
    if not root.is_dir():
        return False
    files = (p for pattern in ("*.json", "*/*.json", "*/*/*.json") for p in visible(root, root.glob(pattern))[:20])
    return any(_looks_like_labelme(path, root) for path in files)


def is_bsdata(root: Path) -> bool:
    """Whether a folder is BSData: image_data.json beside labelme files in label/."""
    return (root / BSDATA).is_file() and (root / "label").is_dir()


def read_labelme(name: str, root: Path, named: Sequence[str] | None = None) -> DataSet:
    """The data set of labelme files. Their image is where imagePath says, or at the usual places.

    Shapes with the same label and group_id are one object; `__ignore__` is ignored. Classes are the labels, sorted, or
    the named ones. samples.csv (image,split,group) or BSData's image_data.json gives splits and groups.
    """
    images = files_below(root, root)
    stems = {path.stem for path in images}  # a JSON file of such a name is labelme's, or damaged
    files = [p for p in files_below(root, root, (".json",)) if p.stem in stems or _looks_like_labelme(p, root)]
    drawings, file_of, damaged = _read_drawings(root, files, images)
    if is_bsdata(root):
        here = [image.name for image in file_of if image.is_file()]
        table, notes = _read_bsdata(kept_below(root, root / BSDATA), here)
        file_of = {image: path for image, path in file_of.items() if image.is_file()}
    else:
        table, notes = own_table(root), []
    if not file_of:
        raise DataError(f"{root} holds no labelme files with their images.")
    classes = _classes(root, drawings, named)
    drawn = {page_of(image)[0] for image in file_of}
    rectangles, polygons = Tally(), Tally()
    for drawing in drawings:
        for shape in drawing.shapes:
            kind = rectangles if shape.kind == "rectangle" else polygons
            kind.add(f"{drawing.path.name}, {shape.part_of}")
    notes += partly("whole boxes are read as masks", rectangles, "as rectangles", polygons)
    notes += ["every shape is a rectangle: masks are whole boxes"] if rectangles.count and not polygons.count else []
    bare = [path.name for path in images if path not in drawn]
    if bare:
        counts = counted(len(bare), "image has no labelme file and is", "images have no labelme file and are")
        notes.append(f"{counts} left out: {listed(bare)}")

    def read_target(sample: Sample, size: Size) -> Target:
        drawing = _read_drawing(Path(sample.labels))
        if drawing.path in damaged:
            _image_of(drawing, root)
        check_stated(*drawing.size, size, f"{drawing.path}: the drawing")
        instances = tuple(_instances(drawing, classes, size))
        return Target(semantic_from_instances(instances, size), instances)

    samples = []
    for image, path in file_of.items():
        identity = image.relative_to(root).as_posix()
        whole = group_of(identity, image)
        row = table.row(identity, whole, image.name)
        samples.append(Sample(identity, image, row.get("group") or whole, row.get("split") or "", str(path)))
    notes += [] if is_bsdata(root) else table.notes()
    tasks = tasks_of(masks=True, instances=True)
    return DataSet(name, root, classes, samples, tasks, read_target, tuple(notes))


def _looks_like_labelme(path: Path, root: Path) -> bool:
    return re.search(rb'"shapes"\s*:', start_of(path, LOOKED_AT, root)) is not None


def _read_drawings(
    root: Path, files: Sequence[Path], images: Sequence[Path]
) -> tuple[list[Drawing], dict[Path, Path], set[Path]]:
    """The drawings, the labelme file of each image, and the damaged files, which belong to the images of their names.

    Reading the labels of a damaged file raises the error. Raises DataError where there is no image of its name.
    """
    by_stem: dict[str, list[Path]] = defaultdict(list)
    for image in images:
        by_stem[image.stem].append(image)
    damaged: set[Path] = set()
    drawings: list[Drawing] = []
    file_of: dict[Path, Path] = {}
    for path in files:
        try:
            drawing = _read_drawing(path)
            image = _image_of(drawing, root)
            drawings.append(drawing)
        except DataError:
            alike = by_stem.get(path.stem, [])
            if len(alike) != 1:
                raise
            image = alike[0]
            damaged.add(path)
        if image in file_of:
            raise DataError(f"{path} and {file_of[image]} name the same image. wanted: one labelme file per image.")
        file_of[image] = path
    if files and not drawings:
        _image_of(_read_drawing(files[0]), root)
    return drawings, file_of, damaged


def _read_drawing(path: Path) -> Drawing:
    data = read_json(path)
    if not isinstance(data, dict) or not isinstance(data.get("shapes"), list):
        raise DataError(f"{path} is not a labelme file. wanted: a list called shapes.")
    check_names(data, FIELDS, path)
    shapes = gathered(partial(_shape, entry, f"{path}, shapes[{i}]", i) for i, entry in enumerate(data["shapes"]))
    return Drawing(path, data.get("imagePath"), (data.get("imageHeight"), data.get("imageWidth")), tuple(shapes))


def _image_of(drawing: Drawing, root: Path) -> Path:
    """The path of the image of a labelme file; the first possible path where it is nowhere."""
    path, named = drawing.path, drawing.named
    text = named if isinstance(named, str) and named else path.stem
    first = below(root, text, f"{path}, imagePath", path.parent)
    folders = [base / folder for base in (path.parent, path.parent.parent, root) for folder in IMAGE_FOLDERS]
    own = Path(*first.parts[-2 if is_page_name(first.name) else -1 :])
    places = [first, *(folder / own for folder in folders if folder.is_relative_to(root))]
    places += [path.with_suffix(suffix) for suffix in SUFFIXES]
    found = first_there(root, places) or first
    return below(root, found.relative_to(root).as_posix(), path)


def _shape(entry: Any, where: str, number: int) -> Shape:
    if isinstance(entry, dict):
        check_names(entry, SHAPE_FIELDS, where)
    label = entry.get("label") if isinstance(entry, dict) else None
    if not isinstance(label, str) or not label.strip() or not entry.get("points"):
        raise DataError(f"{where} can't be read. wanted: label, a text, and points. found: {str(entry)[:200]}")
    kind = entry.get("shape_type") or "polygon"
    if kind not in ("polygon", "rectangle"):
        raise DataError(f"{where} is a {kind}. wanted: polygon or rectangle.")
    drawn = entry["points"]
    if not isinstance(drawn, list) or any(not isinstance(point, list) or len(point) != 2 for point in drawn):
        raise DataError(f"{where}: wanted points of two numbers, found {shown(drawn)}.")
    points = np.array(to_numbers([value for point in drawn for value in point], where)).reshape(-1, 2)
    if kind == "rectangle":
        (x1, y1), (x2, y2) = points.min(axis=0), points.max(axis=0)
        if not (x1 < x2 and y1 < y2):
            raise DataError(f"{where}: the rectangle is empty. found: {shown(drawn)}")
        points = np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)])
    joined = to_name(entry.get("group_id"), f"{where}, group_id")
    return Shape(label, f"group {joined}" if joined else f"shape {number}", points, kind)


def _classes(root: Path, drawings: Sequence[Drawing], named: Sequence[str] | None) -> tuple[str, ...]:
    labels = {shape.label for drawing in drawings for shape in drawing.shapes} - {IGNORED}
    given = read_classes(root, named)
    if given is None:
        return check_classes(["background", *sorted(labels - {BACKGROUND, "background"})], f"{root}: its labels")
    check_known(labels - {BACKGROUND}, given, root)
    return given


def _instances(drawing: Drawing, classes: Sequence[str], size: Size) -> list[Instance]:
    """The objects of a drawing. Background is no object; an ignored shape becomes a crowd of every class."""
    parts: dict[tuple[str, str], list[NDArray[np.float64]]] = {}
    for shape in drawing.shapes:
        if shape.label not in (BACKGROUND, classes[0]):
            parts.setdefault((shape.label, shape.part_of), []).append(shape.points)

    def read(label: str, part_of: str, points: list[NDArray[np.float64]]) -> list[Instance]:
        if label not in (IGNORED, *classes):
            raise DataError(f"{drawing.path}, {part_of}: {label!r} is not among the classes {', '.join(classes)}.")
        category = 1 if label == IGNORED else classes.index(label)
        one = polygon_instance(category, points, size, f"{drawing.path}, {part_of} ({label})")
        crowds = [replace(one, category=c, crowd=True) for c in range(1, len(classes))]
        return crowds if label == IGNORED else [one]

    found = gathered(partial(read, *named, points) for named, points in parts.items())
    return [instance for of_shape in found for instance in of_shape]


def _read_bsdata(path: Path, here: Sequence[str]) -> tuple[Table, list[str]]:
    """Split and group by image name from BSData's list, and notes on listed images that are not here.

    Wear chains that share an image show one place and are one group; an image in no chain is in one group with the
    other crops of its photograph.
    """
    data = read_json(path)
    listed_images = data.get("images") if isinstance(data, dict) else None
    if not isinstance(listed_images, list):
        raise DataError(f"{path} can't be read. wanted: a list called images.")
    entries = [entry for entry in listed_images if _checked(entry, path)["train_test_split"]]
    chains = [entry["wear_dev"] for entry in entries]
    place = components((c for chain in chains for c in chain), (pair for chain in chains for pair in pairwise(chain)))
    table = {
        entry["filename"]: {
            "split": entry["train_test_split"],
            "group": place[entry["wear_dev"][0]] if entry["wear_dev"] else entry["filename"].split("_crop_")[0],
        }
        for entry in entries
    }
    missing = table.keys() - set(here)
    notes = ["groups are the places on the screw, from the wear chains of image_data.json"]
    if missing:
        notes.append(f"image_data.json lists {len(table)} annotated images; {len(missing)} of them are not here")
    unlisted = sorted(set(here) - table.keys())
    if unlisted:
        raise DataError(f"{path} does not list the annotated images {listed(unlisted)}.")
    return Table(path, table), notes


def _checked(entry: Any, path: Path) -> Mapping[str, Any]:
    """An entry of image_data.json, which has all fields that are read. Raises DataError."""
    known = isinstance(entry, dict) and isinstance(entry.get("filename"), str)
    split = entry.get("train_test_split", "") if known else ""
    chains = entry.get("wear_dev") if known else None
    texts = isinstance(chains, list) and all(isinstance(chain, str) for chain in chains)
    if split not in (None, "train", "test") or not (texts or split is None):
        raise DataError(
            f"{path} has an entry that can't be read.\n"
            "  wanted  filename, train_test_split (train, test or null), wear_dev (a list of names)\n"
            f"  found   {str(entry)[:200]}"
        )
    return {"filename": entry["filename"], "train_test_split": split, "wear_dev": chains or []}
