"""Readers for Pascal VOC: boxes from XML (NEU-DET's and GC10-DET's folders too), and pairs of images and masks.

GC10-DET (Lv et al., 2020) has lable/*.xml (this spelling) beside the folders 1/ to 10/ of its classes; some of these
hold the same image.
"""

import json
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from xml.parsers import expat

import numpy as np

from featprobe.datasets.files import below, files_below, folders_in, own_table, read_text
from featprobe.datasets.images.reading import hash_image
from featprobe.datasets.labelmap import Labelmap, codes_of, read_labelmap
from featprobe.datasets.names import renamed, visible
from featprobe.datasets.objects import (
    Tally,
    box_instance,
    check_classes,
    check_known,
    check_size,
    check_stated,
    mask_instance,
    read_classes,
    read_pixels,
)
from featprobe.datasets.samples import SPLIT_WORDS, DataSet, Sample, listed, tasks_of
from featprobe.datasets.values import check_names, gathered, to_numbers, to_truth
from featprobe.errors import DataError
from featprobe.geometry import Size
from featprobe.targets import IGNORE, Instance, Labels, Target, check_labels

LARGEST, DEEPEST, MOST_ELEMENTS = 1 << 24, 50, 1 << 20  # bytes, levels and elements of an XML file
VOC_CLASSES = tuple(
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor".split()
)
GC10 = "lable"
ANNOTATIONS = ("annotations", "annotation", GC10)  # folders, in any case
IMAGES = ("jpegimages", "images", "imgs", "image")
LISTS = ("train", "val", "test")
CLASS_MASKS, OBJECT_MASKS = "SegmentationClass", "SegmentationObject"


@dataclass(frozen=True)
class Place:
    """A folder of XML files and the folders of their images. split: by the folder around them, "" for none.

    by_class: whether there is one folder of images per class; an image of several classes is in several.
    """

    annotations: Path
    images: Path
    split: str
    by_class: bool = False


@dataclass(frozen=True)
class Drawn:
    """One XML file. boxes: class name, x1 y1 x2 y2 as written, and whether the object is marked difficult.

    size: height and width as texts, if stated.
    """

    path: Path
    size: tuple[str, str] | None
    boxes: tuple[tuple[str, tuple[float, ...], bool], ...]


def find_voc(root: Path) -> list[Place]:
    """Folders of XML files beside their images: at the top, in the last VOCdevkit/VOC*, or in one folder per split."""
    if not root.is_dir():
        return []
    tops = [root, *sorted(root.glob("VOCdevkit/VOC*")), *sorted(root.glob("VOC2*"))]
    places = next((found for top in reversed(tops) if (found := _places_in(top, ""))), [])
    for folder in folders_in(root):
        if folder.name.lower() in SPLIT_WORDS:
            places += _places_in(folder, SPLIT_WORDS[folder.name.lower()])
    return places


def read_voc(name: str, root: Path, named: Sequence[str] | None = None) -> DataSet:
    """The data set of VOC's XML files. An image is found by the stem of its XML file, never by the text in it.

    Boxes count pixels from 1 and include their last, unless their corners show that they count from 0, see
    `counts_from`. A `difficult` object becomes a crowd: it is ignored in training and scoring. ImageSets/Main/*.txt
    names the splits where it exists, else folders do; samples.csv (image,split,group) may name splits and groups.
    Classes are the names of objects, sorted, or the named ones.
    """
    table = own_table(root)
    samples: list[Sample] = []
    drawings: list[Path] = []
    notes: list[str] = []
    for place in find_voc(root):
        split_of = _split_lists(root, place.annotations.parent / "ImageSets" / "Main")
        found = files_below(root, place.images)
        copies, differing = _copies(found) if place.by_class else ([], set())
        image_of = _by_stem([path for path in found if path not in copies and path.stem not in differing])
        every = files_below(root, place.annotations, (".xml",))
        files = renamed({path.stem: path for path in every if path.stem not in differing}, image_of)
        split_of = renamed(split_of, files)
        for stem, path in files.items():
            image = image_of.pop(stem, place.images / f"{stem}.jpg")
            identity = image.relative_to(root).as_posix()
            row = table.row(identity, image.name)
            split = split_of.get(stem) or place.split or row.get("split") or ""
            if not split_of or stem in split_of:
                samples.append(Sample(identity, image, row.get("group") or identity, split, str(path)))
                drawings.append(path)
        unlisted = sorted(files.keys() - split_of.keys()) if split_of else []
        left_out = {
            "images are in several folders and are counted once": sorted(path.stem for path in copies),
            "names have several images but one XML file and are left out": sorted(differing),
            "images have no XML file and are left out": sorted(image_of),
            "XML files are in no list of ImageSets/Main and are left out": unlisted,
            "names of ImageSets/Main have no XML file": sorted(split_of.keys() - files.keys()),
        }
        notes += [f"{len(stems)} {what}: {listed(stems)}" for what, stems in left_out.items() if stems]
    if not samples:
        raise DataError(f"{root} holds no XML files of VOC, or none that its lists name.")
    if len({sample.id for sample in samples}) < len(samples):
        raise DataError(f"{root} has several XML files for one image. wanted: one XML file per image.")
    notes += table.notes()
    drawn = _read_all(drawings)
    classes = _classes(root, drawn, named)
    first, note = counts_from(drawn)
    notes += note

    def read_target(sample: Sample, size: Size) -> Target:
        one = read_xml(Path(sample.labels))
        if one.size:
            check_stated(*one.size, size, f"{one.path}: the drawing")
        boxes = (
            partial(
                box_instance, classes.index(kind), (x1 - first, y1 - first, x2, y2), size,
                f"{one.path}, object {i} ({kind})", difficult,
            )
            for i, (kind, (x1, y1, x2, y2), difficult) in enumerate(one.boxes, start=1)
        )  # fmt: skip
        return Target(None, tuple(gathered(boxes)))

    tasks = tasks_of(masks=False, instances=True)
    return DataSet(name, root, classes, samples, tasks, read_target, tuple(notes))


def _read_all(files: Sequence[Path]) -> list[Drawn]:
    """The readable files. The others are skipped: reading their labels raises. Raises DataError where none is left."""
    drawn = []
    for path in files:
        with suppress(DataError):
            drawn.append(read_xml(path))
    if not drawn:
        read_xml(files[0])
    return drawn


def _classes(root: Path, drawn: Sequence[Drawn], named: Sequence[str] | None) -> tuple[str, ...]:
    """Class names, the background first."""
    names = {box[0] for one in drawn for box in one.boxes}
    given = read_classes(root, named)
    if given is None:
        return check_classes(["background", *sorted(names)], f"{root}: its names")
    check_known(names, given[1:], root)
    return given


def counts_from(drawn: Sequence[Drawn]) -> tuple[int, list[str]]:
    """The number of the first pixel, 1 or 0, and a note where boxes point to 0.

    A corner at 0, or between two pixels, points to 0; a first corner at 1 points to 1. Where one box is at an image's
    edge, many are. The majority decides; without any such box it is 1, as in VOC.
    """
    from_0, from_1 = Tally(), Tally()
    for one in drawn:
        for i, (_, corners, _) in enumerate(one.boxes, start=1):
            if min(corners[:2]) < 1 or any(not v.is_integer() for v in corners):
                from_0.add(f"{one.path.name}, object {i}")
            elif 1 in corners[:2]:
                from_1.add(f"{one.path.name}, object {i}")
    if not from_0.count:
        return 1, []
    said = f"{from_0.count} have a corner at 0 or between pixels ({from_0})"
    against = f", and {from_1.count} begin at 1 ({from_1})" if from_1.count else ""
    if from_0.count < from_1.count:
        return 1, [f"boxes count pixels from 1 and include their last; {said}, which does not fit{against}"]
    return 0, [f"boxes count pixels from 0, and x2, y2 are where they end: {said}{against}"]


class _Tree:
    """Elements and their texts, without attributes, while a text is read.

    Refuses XML that is nested deeper than any annotation, or has far more elements: the tree of either takes seconds
    and much memory. Names of namespaces stay as they are written, since each use of a long one would be a copy of it.
    """

    def __init__(self) -> None:
        self.builder, self.depth, self.count = ET.TreeBuilder(), 0, 0

    def read(self, text: str) -> ET.Element:
        """The outermost element of an XML text. Raises ValueError, ExpatError."""
        parser = expat.ParserCreate()
        parser.buffer_text = True
        parser.StartDoctypeDeclHandler = self._doctype
        parser.StartElementHandler, parser.EndElementHandler = self._start, self._end
        parser.CharacterDataHandler = self.builder.data
        parser.Parse(text, True)
        return self.builder.close()

    def _doctype(self, *_: Any) -> None:
        raise ValueError("it declares a document type or entities, which no annotation needs. It was not read")

    def _start(self, tag: str, _: Any) -> None:
        self.depth, self.count = self.depth + 1, self.count + 1
        if self.depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} deep")
        if self.count > MOST_ELEMENTS:
            raise ValueError(f"it has more than {MOST_ELEMENTS} elements")
        self.builder.start(tag, {})

    def _end(self, tag: str) -> None:
        self.depth -= 1
        self.builder.end(tag)


def read_xml(path: Path) -> Drawn:
    """The size and the boxes of a VOC XML file. Raises DataError. Entities are never expanded."""
    text = read_text(path, LARGEST)
    try:
        top = _Tree().read(text)
    except (expat.ExpatError, ValueError, RecursionError) as error:
        raise DataError(f"{path} can't be read as XML: {error}.") from error
    size = top.find("size")
    stated = None if size is None else _texts(size, ("height", "width"), f"{path}, size")
    objects = enumerate(top.findall("object"), start=1)
    boxes = gathered(partial(_box, thing, f"{path}, object {i}") for i, thing in objects)
    return Drawn(path, None if stated is None else (stated[0], stated[1]), tuple(boxes))


def _box(thing: ET.Element, where: str) -> tuple[str, tuple[float, ...], bool]:
    check_names({part.tag: part for part in thing}, ("name", "difficult", "bndbox"), where)
    kind = (thing.findtext("name") or "").strip()
    corners = thing.find("bndbox")
    if not kind or corners is None:
        raise DataError(f"{where} can't be read. wanted: a name and a bndbox.")
    box = to_numbers(_texts(corners, ("xmin", "ymin", "xmax", "ymax"), f"{where}, bndbox"), f"{where}, bndbox")
    return kind, tuple(box), to_truth(thing.findtext("difficult"), f"{where}, difficult")


def _texts(element: ET.Element, names: Sequence[str], where: str) -> list[str]:
    check_names({part.tag: part for part in element}, names, where)
    found = [element.findtext(name) for name in names]
    if any(text is None for text in found):
        raise DataError(f"{where} can't be read. wanted: {', '.join(names)}.")
    return [text or "" for text in found]


def _places_in(folder: Path, split: str) -> list[Place]:
    if not folder.is_dir():
        return []
    inside = {path.name.lower(): path for path in folders_in(folder)}
    annotations = next((inside[name] for name in ANNOTATIONS if name in inside), None)
    images = next((inside[name] for name in IMAGES if name in inside), None)
    by_class = annotations is not None and annotations.name.lower() == GC10
    images = folder if by_class and images is None else images
    if annotations is None or images is None or not visible(annotations, annotations.rglob("*.xml")):
        return []
    return [Place(annotations, images, split, by_class)]


def _copies(paths: Sequence[Path]) -> tuple[list[Path], set[str]]:
    """Images that are exact copies of an earlier file of the same stem, and the stems whose files differ."""
    first: dict[str, Path] = {}
    again = [path for path in paths if first.setdefault(path.stem, path) is not path]
    differing = {path.stem for path in again if not _same_bytes(path, first[path.stem])}
    return [path for path in again if path.stem not in differing], differing


def _same_bytes(path: Path, other: Path) -> bool:
    with suppress(DataError):
        return hash_image(path) == hash_image(other)
    return False


def _by_stem(paths: Sequence[Path]) -> dict[str, Path]:
    """Images by stem. Raises DataError when two share a stem, so that their XML file could belong to either."""
    found: dict[str, Path] = {}
    for path in paths:
        if path.stem in found:
            raise DataError(f"{path} and {found[path.stem]} have the same name, so their XML file fits both.")
        found[path.stem] = path
    return found


def _split_lists(root: Path, folder: Path) -> dict[str, str]:
    """The split of each stem in train.txt, val.txt and test.txt of an ImageSets folder; {} without these lists.

    A second word in a line (VOC's lists of one class have it) is ignored. Raises DataError.
    """
    found: dict[str, str] = {}
    for split in LISTS:
        path = folder / f"{split}.txt"
        if not path.is_file():
            continue
        for line in read_text(below(root, path.relative_to(root).as_posix(), folder)).splitlines():
            stem = line.split()[0] if line.strip() else ""
            if stem and found.setdefault(stem, split) != split:
                raise DataError(f"{path} lists {stem}, which {found[stem]}.txt lists too.")
    return found


# ---- segmentation ----------------------------------------------------------------------------------------------------


def find_segmentation(root: Path) -> Path | None:
    """The folder that holds SegmentationClass/ and JPEGImages/: the top, or the last of VOCdevkit/VOC*."""
    if not root.is_dir():
        return None
    tops = [root, *sorted(root.glob("VOC2*")), *sorted(root.glob("VOCdevkit/VOC*"))]
    fitting = [top for top in tops if (top / CLASS_MASKS).is_dir() and (top / "JPEGImages").is_dir()]
    return fitting[-1] if fitting else None


def read_segmentation(name: str, root: Path, named: Sequence[str] | None = None) -> DataSet:
    """The data set of SegmentationClass/ masks and, where all images have them, SegmentationObject/ masks.

    Palette masks are read as class indices; 255 is ignored. ImageSets/Segmentation/*.txt names the splits where it
    exists. Classes are the named ones, the background first; without names those of CVAT's labelmap.txt, whose colours
    masks may have too; without that file VOC's twenty.
    """
    top = find_segmentation(root) or root
    split_of = _split_lists(root, top / "ImageSets" / "Segmentation")
    masks = {path.stem: path for path in files_below(root, top / CLASS_MASKS, (".png",))}
    numbered = {}
    if (top / OBJECT_MASKS).is_dir():
        numbered = {path.stem: path for path in files_below(root, top / OBJECT_MASKS, (".png",))}
    image_of = _by_stem(files_below(root, top / "JPEGImages"))
    masks, numbered = renamed(masks, image_of), renamed(numbered, image_of)
    split_of = renamed(split_of, {*image_of, *masks})
    stems = sorted(split_of or masks)
    table = own_table(root)
    samples = []
    for stem in stems:
        image = image_of.get(stem, top / "JPEGImages" / f"{stem}.jpg")
        identity = image.relative_to(root).as_posix()
        row = table.row(identity, image.name)
        split = split_of.get(stem) or row.get("split") or ""
        labels = json.dumps([str(masks.get(stem, top / CLASS_MASKS / f"{stem}.png")), str(numbered.get(stem, ""))])
        samples.append(Sample(identity, image, row.get("group") or identity, split, labels))
    if not samples:
        raise DataError(f"{top} holds no masks. wanted: PNG files in SegmentationClass/.")
    notes = table.notes()
    given, labelmap = read_classes(root, named), read_labelmap(root, top)
    classes = given or (labelmap.classes if labelmap else ("background", *VOC_CLASSES))
    if labelmap and len(classes) != len(labelmap.classes):
        raise DataError(
            f"{labelmap.path} names {len(labelmap.classes)} classes with the background, "
            f"and {len(classes)} are named for {root}.\n"
            f"  wanted  as many\n  found   {', '.join(labelmap.classes)}; {', '.join(classes)}"
        )
    if not given and not labelmap:
        notes.append("classes have the names of VOC's twenty; name yours in classes.txt or featprobe.toml")
    bare = [stem for stem in stems if stem not in numbered]
    if numbered and bare:
        notes.append(f"no objects are read: {len(bare)} of {len(stems)} images have no {OBJECT_MASKS}: {listed(bare)}")

    def read_target(sample: Sample, size: Size) -> Target:
        path, objects = map(Path, json.loads(sample.labels))
        labels = _indices(path, size, labelmap)
        check_labels(labels, len(classes), str(path))
        return Target(labels, None if bare else _objects(labels, objects, size))

    tasks = tasks_of(masks=True, instances=not bare)
    return DataSet(name, root, classes, samples, tasks, read_target, tuple(notes))


def _indices(path: Path, size: Size, labelmap: Labelmap | None) -> Labels:
    wanted = "class indices, as grey levels or a palette; colours where labelmap.txt names them"
    labels = labelmap.read(path) if labelmap else read_pixels(path, ("P", "L"), wanted)
    check_size((labels.shape[0], labels.shape[1]), size, path)
    return labels


def _objects(labels: Labels, path: Path, size: Size) -> tuple[Instance, ...]:
    """One object per number, or per colour, of a SegmentationObject mask. Its class is from the other mask.

    Raises DataError when a number covers several classes.
    """
    numbers, void = codes_of(path)
    check_size((numbers.shape[0], numbers.shape[1]), size, path)
    found = []
    for number in np.unique(numbers[(numbers > 0) & (numbers != void)]):
        covered = numbers == number
        kinds = np.unique(labels[covered & (labels != IGNORE)])
        if len(kinds) != 1 or kinds[0] == 0:
            raise DataError(
                f"{path}: object {number} covers the classes {kinds.tolist()} of the other mask. "
                "wanted: one class, not the background"
            )
        found.append(mask_instance(int(kinds[0]), covered))
    return tuple(found)
