"""The formats that can be read, and finding which one a folder holds."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from featprobe.datasets.coco import find_coco, read_coco
from featprobe.datasets.coco_sets import (
    PLANE_LABELS,
    TEST_SETS,
    find_pidray,
    find_rareplanes,
    read_pidray,
    read_rareplanes,
)
from featprobe.datasets.colours import find_pairs, read_colours
from featprobe.datasets.deeppcb import is_deeppcb, read_deeppcb
from featprobe.datasets.folders import find_folders, read_folders
from featprobe.datasets.gdxray import find_series, find_welds, read_gdxray, read_welds
from featprobe.datasets.labelme import is_bsdata, is_labelme, read_labelme
from featprobe.datasets.magnetic_tile import is_magnetic_tile, read_magnetic_tile
from featprobe.datasets.samples import DataSet, listed
from featprobe.datasets.set_notes import alike_classes, unnamed_parts
from featprobe.datasets.severstal import is_severstal, read_severstal
from featprobe.datasets.split_file import pin, read_split_file
from featprobe.datasets.splits import complete_splits, regroup
from featprobe.datasets.surfaces import (
    is_commutators,
    is_kolektor,
    is_mvtec,
    read_commutators,
    read_kolektor,
    read_mvtec,
)
from featprobe.datasets.visa import SHOTS, find_visa, read_visa
from featprobe.datasets.voc import find_segmentation, find_voc, read_segmentation, read_voc
from featprobe.datasets.yolo import find_yolo, read_yolo
from featprobe.errors import DataError, nearest


@dataclass(frozen=True)
class Format:
    """One format: what is looked for, whether a path has it, and its reader (of a set's name and path).

    read_named: the reader where classes are named beside the set (their lines last), None where a format names its own.
    gives_way_to: formats that are meant, unless this one is named, where a path has theirs too.
    parts: readers of a part or a kind of its labels alone, which FORMAT:PART names.
    """

    layout: str
    fits: Callable[[Path], bool]
    read: Callable[[str, Path], DataSet]
    read_named: Callable[[str, Path, Sequence[str]], DataSet] | None = None
    gives_way_to: tuple[str, ...] = ()
    parts: Mapping[str, Callable[[str, Path], DataSet]] = field(default_factory=dict)


def _fits_folders(root: Path) -> bool:
    """Coloured masks in the same folders are another format."""
    return root.is_dir() and bool(find_folders(root)) and not find_pairs(root)


def _fits_coco(root: Path) -> bool:
    return not is_bsdata(root) and bool(find_coco(root))


def _read_coco(name: str, root: Path) -> DataSet:
    return read_coco(name, root, find_coco(root))


FORMATS: Mapping[str, Format] = {
    "folders": Format(
        "images/ and masks/ with the same stems, or the same inside train/, val/ and test/",
        _fits_folders,
        read_folders,
        read_folders,
    ),
    "pidray": Format(
        "PIDray: annotations/xray_train.json and xray_test_*.json beside train/, easy/, hard/, hidden/",
        lambda root: bool(find_pidray(root)),
        read_pidray,
        parts={part: partial(read_pidray, test_sets=(part,)) for part in TEST_SETS},
    ),
    "rareplanes": Format(
        "RarePlanes: metadata_annotations/instances_{train,test}_role.json beside {train,test}/PS-RGB_tiled/",
        lambda root: bool(find_rareplanes(root)),
        read_rareplanes,
        parts={part: partial(read_rareplanes, labels=(part,)) for part in PLANE_LABELS},
    ),
    "coco": Format(
        "COCO JSON: *.json, annotations/*.json, or in one folder per split",
        _fits_coco,
        _read_coco,
        gives_way_to=("pidray",),
    ),
    "colours": Format(
        "coloured masks: images/ and masks/, or NAME_images/ and NAME_masks/, and classes.txt of `R,G,B name`",
        lambda root: bool(find_pairs(root)),
        read_colours,
        read_colours,
        gives_way_to=("coco",),
    ),
    "labelme": Format("labelme: one JSON file an image, with shapes", is_labelme, read_labelme, read_labelme),
    "deeppcb": Format("DeepPCB: trainval.txt and test.txt, with or without PCBData/", is_deeppcb, read_deeppcb),
    "magnetic-tile": Format(
        "magnetic tile: MT_<class>/Imgs/NAME.jpg with NAME.png", is_magnetic_tile, read_magnetic_tile
    ),
    "voc": Format(
        "Pascal VOC: Annotations/*.xml beside JPEGImages/ or images/, NEU-DET's and GC10-DET's folders too",
        lambda root: bool(find_voc(root)),
        read_voc,
        read_voc,
    ),
    "voc-segmentation": Format(
        "Pascal VOC: SegmentationClass/ beside JPEGImages/",
        lambda root: find_segmentation(root) is not None,
        read_segmentation,
        read_segmentation,
    ),
    "yolo": Format(
        "YOLO: data.yaml, images/ and labels/ with the same stems", lambda root: find_yolo(root) is not None, read_yolo
    ),
    "severstal": Format("Severstal: train.csv with EncodedPixels, train_images/", is_severstal, read_severstal),
    "gdxray": Format(
        "GDXray: SERIES/SERIES_NNNN.png and SERIES/ground_truth.txt, or the welds W0001 with their masks W0002",
        lambda root: bool(find_series(root)) or find_welds(root) is not None,
        read_gdxray,
        parts={"masks": read_welds},
    ),
    "kolektorsdd": Format("KolektorSDD: kosNN/PartN.jpg with PartN_label.bmp", is_commutators, read_commutators),
    "kolektorsdd2": Format("KolektorSDD2: train/ and test/ with ID.png and ID_GT.png", is_kolektor, read_kolektor),
    "mvtec-ad": Format("MVTec AD: a category's train/good/, test/ and ground_truth/", is_mvtec, read_mvtec),
    "visa": Format(
        "VisA: split_csv/2cls_*.csv, and OBJECT/Data/Images, or the folder of one object beside split_csv/",
        lambda root: find_visa(root) is not None,
        read_visa,
        parts={part: partial(read_visa, shots=(part,)) for part in SHOTS},
    ),
}
"""In the order in which they are looked for; what several of them fit has to be named."""

ENTRY_POINTS = "featprobe.datasets"
"""The group under which another package names a Format of its own."""


def read_data(
    name: str,
    root: Path,
    format_name: str | None = None,
    group_from: str | None = None,
    split_file: Path | None = None,
    complete: bool = True,
    classes: Sequence[str] | None = None,
) -> DataSet:
    """The data set that lies at a path, in a named format or in the one found by looking, its splits completed.

    format_name: FORMAT, or FORMAT:PART for a part or a kind of labels that the format has. Formats of other packages
    are looked for last, and loaded only then or when they are named. group_from: a regular expression that finds the
    groups in the ids, in place of the format's. split_file: whose splits and groups take the place of the set's own.
    complete=False leaves the splits as they are. classes: what stands in classes.txt otherwise, line by line.
    Raises DataError, with what is known to be read, when no format fits, and with their names when several do.
    """
    own, _, part = (format_name or "").partition(":")
    known: Mapping[str, Format] = FORMATS if format_name is None else {own: find_format(own)}
    if part and part not in known[own].parts:
        raise DataError(f"The format {own} has no part {part!r}. wanted: {', '.join(known[own].parts) or 'none'}.")
    if not root.exists():
        raise DataError(f"There is no folder or file {root} (data set {name}).")
    broken: list[str] = []
    fitting = _fitting(known, root)
    if not fitting and format_name is None:
        added, broken = added_formats()
        fitting, known = _fitting(added, root), {**known, **added}
    if len(fitting) > 1:
        each = "\n          ".join(f"{name}: {known[name].layout}" for name in fitting)
        raise DataError(
            f"{root} can be read in {len(fitting)} formats.\n  wanted  one\n  found   {each}\n"
            f"Nothing was read. Name the one that is meant:  --format {' or --format '.join(fitting)}"
        )
    if fitting:
        for letter in broken:
            warnings.warn(letter, stacklevel=2)
        entry = known[fitting[0]]
        data = _read(entry, part, fitting[0], name, root, classes)
        data = regroup(data, group_from) if group_from else data
        pinned = None if split_file is None else read_split_file(split_file)
        data = data if pinned is None else pin(data, pinned)
        data = replace(data, notes=(*data.notes, *alike_classes(data), *([] if group_from else unnamed_parts(data))))
        if split_file is None:
            return complete_splits(data) if complete else data
        return complete_splits(data, f"the split of {split_file.name}") if complete else data
    inside = listed(sorted(p.name for p in root.iterdir()), 8) if root.is_dir() else "a file, and no folder"
    wanted = known[own].layout if own else f"one of the formats {', '.join(known)}"
    to_do = "" if own else f"\nWhat each looks for is told by naming it:  featprobe data info {root} --format NAME"
    raise DataError(
        f"{root} holds no data set that can be read{f' as {own}' if own else ''}.\n"
        f"  found   {inside or 'nothing: it is empty'}\n  wanted  {wanted}{to_do}"
        + "".join(f"\n{letter}" for letter in broken)
    )


def _read(entry: Format, part: str, format_name: str, name: str, root: Path, classes: Sequence[str] | None) -> DataSet:
    if classes is None:
        return (entry.parts[part] if part else entry.read)(name, root)
    if entry.read_named is None or part:
        named = [name for name, known in FORMATS.items() if known.read_named]
        raise DataError(
            f"The classes of {root} were named, but its format {format_name} says itself what they are called.\n"
            f"  wanted  no names, or one of the formats {', '.join(named)}\nNothing was read. Leave the names away."
        )
    return entry.read_named(name, root, classes)


def _fitting(known: Mapping[str, Format], root: Path) -> list[str]:
    """The formats that a folder can be read in."""
    found = [name for name, entry in known.items() if entry.fits(root)]
    return [name for name in found if not set(known[name].gives_way_to) & set(found)]


def find_format(name: str) -> Format:
    """The format of a name, ours or another package's. Raises DataError when there is none, or it can't be loaded."""
    if name in FORMATS:
        return FORMATS[name]
    points = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if name not in points:
        known = [*FORMATS, *points]
        raise DataError(f"There is no format {name!r}. {nearest(name, known)}\n  wanted  {', '.join(known)}")
    return _load(points[name])


def added_formats() -> tuple[dict[str, Format], list[str]]:
    """The formats of other packages by name, and a letter for each that can't be loaded. Ours keep their names."""
    added: dict[str, Format] = {}
    broken = []
    for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda point: point.name):
        try:
            if point.name not in FORMATS:
                added[point.name] = _load(point)
        except DataError as error:
            broken.append(str(error))
    return added, broken


def _load(point: EntryPoint) -> Format:
    where = f"The format {point.name} of the package {point.dist.name if point.dist else '?'}"
    wanted = f"  wanted  {point.value}, a featprobe.datasets.Format\n"
    to_do = "Mend that package, or remove it; every other format can be read without it."
    try:
        value = point.load()
    except Exception as error:  # what another package's import may raise is anything
        found = f"  found   {type(error).__name__}: {error}\n"
        raise DataError(f"{where} can't be loaded.\n{wanted}{found}{to_do}") from error
    if not isinstance(value, Format):
        raise DataError(f"{where} is no format.\n{wanted}  found   a {type(value).__name__}\n{to_do}")
    return value
