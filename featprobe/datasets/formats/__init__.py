"""The formats that can be read, and finding the format of a folder."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from featprobe.datasets.files import FOLLOW_LINKS, folders_in, leads_out, links_followed
from featprobe.datasets.formats.coco import find_coco, read_coco
from featprobe.datasets.formats.coco_sets import (
    PLANE_LABELS,
    TEST_SETS,
    find_pidray,
    find_rareplanes,
    read_pidray,
    read_rareplanes,
)
from featprobe.datasets.formats.colours import find_pairs, read_colours
from featprobe.datasets.formats.deeppcb import is_deeppcb, read_deeppcb
from featprobe.datasets.formats.folders import find_folders, meet, read_folders
from featprobe.datasets.formats.gdxray import find_series, find_welds, read_gdxray, read_welds
from featprobe.datasets.formats.labelled import (
    find_classes,
    find_tables,
    read_classes_of_folders,
    read_labels,
)
from featprobe.datasets.formats.labelme import is_bsdata, is_labelme, read_labelme
from featprobe.datasets.formats.magnetic_tile import is_magnetic_tile, read_magnetic_tile
from featprobe.datasets.formats.pairs import EXAMPLE, has_pairs, read_pairs
from featprobe.datasets.formats.severstal import is_severstal, read_severstal
from featprobe.datasets.formats.surfaces import (
    is_commutators,
    is_kolektor,
    is_mvtec,
    read_commutators,
    read_kolektor,
    read_mvtec,
)
from featprobe.datasets.formats.visa import SHOTS, find_visa, read_visa
from featprobe.datasets.formats.voc import find_segmentation, find_voc, read_segmentation, read_voc
from featprobe.datasets.formats.yolo import find_yolo, read_yolo
from featprobe.datasets.label_sets import with_good
from featprobe.datasets.names import visible
from featprobe.datasets.nearness import Near, nearest_pairs, seek
from featprobe.datasets.patterns import Description
from featprobe.datasets.samples import DataSet, Sample, listed
from featprobe.datasets.set_notes import alike_classes, unnamed_parts
from featprobe.datasets.split_file import pin, read_split_file
from featprobe.datasets.splits import complete_splits, group_pattern, regroup
from featprobe.errors import DataError, nearest
from featprobe.geometry import Size
from featprobe.io.plugins import DATASETS, clash, loaded, names_in, points_of, refusal
from featprobe.targets import Target


@dataclass(frozen=True)
class Format:
    """One format of data sets.

    layout: the files and folders that it looks for, as a text for users. fits: whether a path has this format.
    read: reads the set, from its name and path. read_named: reads it with classes that the user names (their lines are
    the third argument); None where the format names its classes itself.
    gives_way_to: formats that are preferred, unless this one is named, where a path fits them too.
    parts: readers of one part, or of one kind of labels, which FORMAT:PART names.
    near: which of the things it looks for a path has, and which it lacks first, for error messages; None without that.
    last: whether it is tried only where no other format fits.
    """

    layout: str
    fits: Callable[[Path], bool]
    read: Callable[[str, Path], DataSet]
    read_named: Callable[[str, Path, Sequence[str]], DataSet] | None = None
    gives_way_to: tuple[str, ...] = ()
    parts: Mapping[str, Callable[[str, Path], DataSet]] = field(default_factory=dict)
    near: Callable[[Path], Near] | None = None
    last: bool = False


def _fits_folders(root: Path) -> bool:
    """Whether images and masks have the same stems. Coloured masks in such folders are another format."""
    places = [(place / "images", place / "masks") for place in find_folders(root).values()]
    return root.is_dir() and meet(places) and not find_pairs(root)


def _fits_colours(root: Path) -> bool:
    return meet([(pair.images, pair.masks) for pair in find_pairs(root)])


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
        near=seek("images|train/images", "masks|train/masks", then="masks with the stems of the images"),
    ),
    "pidray": Format(
        "PIDray: annotations/xray_train.json and xray_test_*.json beside train/, easy/, hard/, hidden/",
        lambda root: bool(find_pidray(root)),
        read_pidray,
        parts={part: partial(read_pidray, test_sets=(part,)) for part in TEST_SETS},
        near=seek("annotations/xray_train.json", "annotations/xray_test_*.json", "train"),
    ),
    "rareplanes": Format(
        "RarePlanes: metadata_annotations/instances_{train,test}_role.json beside {train,test}/PS-RGB_tiled/",
        lambda root: bool(find_rareplanes(root)),
        read_rareplanes,
        parts={part: partial(read_rareplanes, labels=(part,)) for part in PLANE_LABELS},
        near=seek("metadata_annotations/instances_train_role.json", "train/PS-RGB_tiled"),
    ),
    "coco": Format(
        "COCO JSON: *.json, annotations/*.json, or in one folder per split",
        _fits_coco,
        _read_coco,
        gives_way_to=("pidray",),
        near=seek("*.json|annotations/*.json|train/*.json", then="JSON files with images, annotations and categories"),
    ),
    "colours": Format(
        "coloured masks: images/ and masks/, or NAME_images/ and NAME_masks/, and classes.txt of `R,G,B name`",
        _fits_colours,
        read_colours,
        read_colours,
        gives_way_to=("coco",),
        near=seek("images|*images|*/*images", "masks|*masks|*/*masks", then="RGB masks with the stems of the images"),
    ),
    "labelme": Format(
        "labelme: one JSON file per image, with shapes",
        is_labelme,
        read_labelme,
        read_labelme,
        near=seek("*.json|*/*.json|*/*/*.json", then="JSON files with shapes and imagePath"),
    ),
    "deeppcb": Format(
        "DeepPCB: trainval.txt and test.txt, with or without PCBData/",
        is_deeppcb,
        read_deeppcb,
        near=seek("trainval.txt|PCBData/trainval.txt", "test.txt|PCBData/test.txt"),
    ),
    "magnetic-tile": Format(
        "magnetic tile: MT_<class>/Imgs/NAME.jpg with NAME.png",
        is_magnetic_tile,
        read_magnetic_tile,
        near=seek("MT_*", "MT_*/Imgs"),
    ),
    "voc": Format(
        "Pascal VOC: Annotations/*.xml beside JPEGImages/ or images/, NEU-DET's and GC10-DET's folders too",
        lambda root: bool(find_voc(root)),
        read_voc,
        read_voc,
        near=seek("Annotations/*.xml|*/Annotations/*.xml", "JPEGImages|images|*/JPEGImages|*/images"),
    ),
    "voc-segmentation": Format(
        "Pascal VOC: SegmentationClass/ beside JPEGImages/",
        lambda root: find_segmentation(root) is not None,
        read_segmentation,
        read_segmentation,
        near=seek("JPEGImages|*/JPEGImages", "SegmentationClass|*/SegmentationClass"),
    ),
    "yolo": Format(
        "YOLO: data.yaml, images/ and labels/ with the same stems",
        lambda root: find_yolo(root) is not None,
        read_yolo,
        near=seek("images", "labels/*.txt|labels/*/*.txt", "*.yaml|*.yml", then="a YAML file with names and train"),
    ),
    "severstal": Format(
        "Severstal: train.csv with EncodedPixels, train_images/",
        is_severstal,
        read_severstal,
        near=seek("train_images", "train.csv", then="train.csv with the columns of Severstal"),
    ),
    "gdxray": Format(
        "GDXray: SERIES/SERIES_NNNN.png and SERIES/ground_truth.txt, or the welds W0001 with their masks W0002",
        lambda root: bool(find_series(root)) or find_welds(root) is not None,
        read_gdxray,
        parts={"masks": read_welds},
        near=seek("*/ground_truth.txt|*/*/ground_truth.txt", then="images SERIES_NNNN.png in the folder SERIES"),
    ),
    "kolektorsdd": Format(
        "KolektorSDD: kosNN/PartN.jpg with PartN_label.bmp",
        is_commutators,
        read_commutators,
        near=seek("kos*", "kos*/*_label.bmp"),
    ),
    "kolektorsdd2": Format(
        "KolektorSDD2: train/ and test/ with ID.png and ID_GT.png",
        is_kolektor,
        read_kolektor,
        near=seek("train/*_GT.png", "test/*_GT.png"),
    ),
    "mvtec-ad": Format(
        "MVTec AD: a category's train/good/, test/ and ground_truth/",
        is_mvtec,
        read_mvtec,
        parts={"published": partial(read_mvtec, published=True)},
        near=seek("ground_truth", "train/good", "test"),
    ),
    "visa": Format(
        "VisA: split_csv/2cls_*.csv, and OBJECT/Data/Images, or the folder of one object beside split_csv/",
        lambda root: find_visa(root) is not None,
        read_visa,
        parts={part: partial(read_visa, shots=(part,)) for part in SHOTS},
        near=seek("split_csv/2cls_*.csv", "*/Data/Images|Data/Images"),
    ),
    "pairs": Format(
        "images and masks in any folders whose names say so, or where `images` and `masks` say",
        has_pairs,
        read_pairs,
        read_pairs,
        near=nearest_pairs,
        last=True,
    ),
    "class-csv": Format(
        "labels of whole images: labels.csv of image,label[,split,group], or metadata.csv of file_name,label",
        lambda root: bool(find_tables(root)),
        read_labels,
        gives_way_to=("pairs",),
        near=seek("labels.csv|metadata.csv|*/metadata.csv", then="a table with the columns image and label"),
        last=True,
    ),
    "class-folders": Format(
        "labels of whole images: a folder of images for each class, alone or inside train/, val/ and test/",
        lambda root: bool(find_classes(root)),
        read_classes_of_folders,
        gives_way_to=("pairs", "class-csv"),
        last=True,
    ),
}
"""The formats by name, in the order in which they are tried. Where several fit a folder, the user must name one."""

MOST_INSIDE = 20  # most subfolders that are searched where the named folder holds no set


def read_data(
    name: str,
    root: Path,
    format_name: str | None = None,
    group_from: str | None = None,
    split_file: Path | None = None,
    complete: bool = True,
    classes: Sequence[str] | None = None,
    images: str | None = None,
    masks: str | None = None,
    follow_links: bool = False,
    good: str | None = None,
) -> DataSet:
    """Read the data set at a path, in a named format or in the format that fits, and complete its splits.

    format_name: FORMAT, or FORMAT:PART for one part of the set or one kind of its labels. Formats of other packages
    are tried last, and loaded only then or when they are named. group_from: a regular expression that finds groups in
    ids, instead of the format's groups. split_file: its splits and groups replace those of the set. complete=False
    keeps the splits as they are. classes: the lines of a classes.txt, instead of that file. images, masks: patterns
    that describe the set, see `datasets.patterns`; its format is then `pairs`. follow_links: also read files outside of
    the folder to which links in it lead; otherwise such a link is an error. good: the label of images without a defect,
    where labels of images do not say it by a usual name.
    Raises DataError when no format fits (with the nearest format and what is missing), and when several fit.
    """
    with links_followed(follow_links):
        described = check_reading(format_name, group_from, images, masks)
        format_name = "pairs" if described else format_name
        named_format, _, part = (format_name or "").partition(":")
        known: Mapping[str, Format] = FORMATS if format_name is None else {named_format: find_format(named_format)}
        if not root.exists():
            raise DataError(f"There is no folder or file {root} (data set {name}).")
        broken: list[str] = []
        fitting = [named_format] if described else _fitting(known, root, last=format_name is not None)
        if not fitting and format_name is None:
            added, broken = added_formats()
            fitting, known = _fitting(added, root), {**known, **added}
            fitting = fitting or _fitting(FORMATS, root, last=True)
        if len(fitting) > 1:
            each = "\n          ".join(f"{name}: {known[name].layout}" for name in fitting)
            raise DataError(
                f"{root} can be read in {len(fitting)} formats.\n  wanted  one\n  found   {each}\n"
                f"Nothing was read. Name one of them:  --format {' or --format '.join(fitting)}"
            )
        if fitting == ["class-folders"] and format_name is None and (inside := _set_inside(root)):
            raise DataError(
                f"{root} is a folder of folders of images, and one of these is a data set.\n"
                f"  found   {inside[0]}, in {inside[1]}\n"
                "Nothing was read. Use that folder; or, if each folder is a class:  --format class-folders"
            )
        if not fitting:
            raise DataError(_refusal(known, named_format, root) + "".join(f"\n{message}" for message in broken))
        for message in broken:
            warnings.warn(message, stacklevel=2)
        if described:
            data = read_pairs(name, root, classes, described)
        else:
            data = _read(known[fitting[0]], part, fitting[0], name, root, classes)
        how = data.description or {"format": format_name or fitting[0]}
        how = {**how, **({} if classes is None else {"classes": [*classes]}), **({"good": good} if good else {})}
        data = with_good(data, good)
        if group_from:
            data, how = regroup(data, group_from), {**how, "group_from": group_from}
        if split_file is not None:
            data, how = pin(data, read_split_file(split_file)), {**how, "split_file": str(split_file.resolve())}
        notes = [*alike_classes(data), *([] if group_from else unnamed_parts(data))]
        data = replace(data, description=how, notes=(*data.notes, *notes))
        called = "its own split" if split_file is None else f"the split of {split_file.name}"
        data = complete_splits(data, called) if complete else data
    return _following(data) if follow_links else data


def _following(data: DataSet) -> DataSet:
    """The same set, whose labels are also read where links lead out of its folder."""
    read = data.read_target

    def read_target(sample: Sample, size: Size) -> Target:
        with links_followed(True):
            return read(sample, size)

    return replace(data, read_target=read_target, description={**data.description, "follow_links": True})


def places_of(root: Path) -> list[Path]:
    """The folders from which a set is read: its own folder, and the tables that VisA's objects share."""
    beside = root.resolve().parent / "split_csv"
    return [root, *([beside] if beside.exists() else [])]


def check_reading(
    format_name: str | None, group_from: str | None, images: str | None, masks: str | None
) -> Description | None:
    """The description that two patterns give, if there are any. Nothing is looked at but these words.

    Raises DataError for a format, a part of it, a regular expression or a pattern that can't be, as for `read_data`.
    """
    named_format, _, part = (format_name or "").partition(":")
    if format_name is not None and part not in ("", *(parts := find_format(named_format).parts)):
        raise DataError(f"The format {named_format} has no part {part!r}. wanted: {', '.join(parts) or 'none'}.")
    if group_from is not None:
        group_pattern(group_from)
    return _described(images, masks, format_name)


def _described(images: str | None, masks: str | None, format_name: str | None) -> Description | None:
    """The description from two patterns; None without patterns. Raises DataError for one alone, and for two patterns
    beside another format."""
    if images is None and masks is None:
        return None
    if images is None or masks is None:
        there, lacking = ("images", "masks") if masks is None else ("masks", "images")
        raise DataError(
            f"A set is described by two patterns, and {lacking} is missing beside {there} = {images or masks!r}.\n"
            f"  wanted  both, as  {EXAMPLE}"
        )
    if format_name not in (None, "pairs"):
        raise DataError(
            f"images = {images!r} describes a set of the format pairs, and the format {format_name} was named too.\n"
            "Nothing was read. Omit one of the two."
        )
    return Description.of(images, masks)


def _refusal(known: Mapping[str, Format], named_format: str, root: Path) -> str:
    """The error text for a folder that no format, or not the named format, fits: the nearest one and what it lacks."""
    inside = listed([p.name for p in visible(root, root.iterdir())], 8) if root.is_dir() else "a file, not a folder"
    said = (
        f"{root} holds no data set that can be read{f' as {named_format}' if named_format else ''}.\n"
        f"  found   {inside or 'nothing: it is empty'}\n"
    )
    links = _links_out(root) if root.is_dir() else []
    if links:
        said += f"  links   {listed(links, 3)}: they lead out of it and were not followed ({FOLLOW_LINKS})\n"
    if named_format:
        near = known[named_format].near
        lacks = near(root).lacks if near else ""
        return f"{said}  wanted  {known[named_format].layout}" + (f"\n  lacks   {lacks}" if lacks else "")
    if root.is_file():
        return f"{said}  wanted  the folder of images and labels\nNothing was read. Name the folder: {root.parent}"
    if found := _set_inside(root):
        return f"{said}  nearest {found[0]}, in {found[1]}\nNothing was read. Use that folder."
    nears = {name: entry.near(root) for name, entry in known.items() if entry.near and root.is_dir()}
    name = max(nears, key=lambda name: (len(nears[name].found), name == "pairs"), default="")
    if name and nears[name].found:
        said += f"  nearest {name}: {known[name].layout}\n  there   {', '.join(nears[name].found)}\n"
        said += f"  lacks   {nears[name].lacks}\n"
    else:
        said += "  wanted  images and their labels, in a format that `featprobe data` lists\n"
    return (
        f"{said}Nothing was read. Masks in any folders can be described:  {EXAMPLE}\n"
        "Labels of whole images can be a folder of images for each class, or labels.csv of image,label.\n"
        f"To see what a format looks for, name it:  featprobe data info {root} --format NAME"
    )


def _set_inside(root: Path) -> tuple[str, Path] | None:
    """The formats that fit a folder in a folder, and the first such folder; None without any."""
    for folder in folders_in(root)[:MOST_INSIDE] if root.is_dir() else []:
        fitting = [] if leads_out(root, folder) else _fitting(FORMATS, folder)
        if fitting:
            return " and ".join(fitting), folder
    return None


def _links_out(root: Path) -> list[str]:
    """Links that lead out of a folder, in it and in its subfolders, relative to it."""
    near = [*visible(root, root.iterdir()), *visible(root, root.glob("*/*"))]
    return [path.relative_to(root).as_posix() for path in near if path.is_symlink() and leads_out(root, path)]


def _read(entry: Format, part: str, format_name: str, name: str, root: Path, classes: Sequence[str] | None) -> DataSet:
    if classes is None:
        return (entry.parts[part] if part else entry.read)(name, root)
    if entry.read_named is None or part:
        named = [name for name, known in FORMATS.items() if known.read_named]
        raise DataError(
            f"The classes of {root} were named, but its format {format_name} names its classes itself.\n"
            f"  wanted  no names, or one of the formats {', '.join(named)}\nNothing was read. Omit the names."
        )
    return entry.read_named(name, root, classes)


def _fitting(known: Mapping[str, Format], root: Path, *, last: bool = False) -> list[str]:
    """The names of the formats that fit a folder. last: also try formats that are tried last."""
    found = [name for name, entry in known.items() if (last or not entry.last) and entry.fits(root)]
    return [name for name in found if not set(known[name].gives_way_to) & set(found)]


def find_format(name: str) -> Format:
    """The format with a name, of featprobe or of another package.

    Raises DataError when there is none, or it can't be loaded.
    """
    if name in FORMATS:
        return FORMATS[name]
    if not points_of(DATASETS, name):
        known = list(dict.fromkeys([*FORMATS, *names_in(DATASETS)]))
        raise DataError(f"There is no format {name!r}. {nearest(name, known)}\n  wanted  {', '.join(known)}")
    return _load(name)


def added_formats() -> tuple[dict[str, Format], list[str]]:
    """The formats of other packages by name, and an error message for each that can't be loaded.

    A format of another package with the name of one of featprobe's is ignored.
    """
    added: dict[str, Format] = {}
    broken = []
    for name in names_in(DATASETS):
        try:
            if name not in FORMATS:
                added[name] = _load(name)
        except DataError as error:
            broken.append(str(error))
    return added, broken


def _load(name: str) -> Format:
    """The format that another package names; raises DataError where several do, or it can't be loaded."""
    points, wanted = points_of(DATASETS, name), "a featprobe.datasets.Format"
    if len(points) > 1:
        raise DataError(clash(points, "format"))
    value = loaded(points[0], "format", wanted, DataError)
    if not isinstance(value, Format):
        raise DataError(refusal(points[0], "format", "is no format", wanted, f"a {type(value).__name__}"))
    return value
