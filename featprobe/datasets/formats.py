"""The formats that can be read, and finding which one a folder holds."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from featprobe.datasets.coco import find_coco, read_coco
from featprobe.datasets.colours import find_pairs, read_colours
from featprobe.datasets.deeppcb import is_deeppcb, read_deeppcb
from featprobe.datasets.folders import find_folders, read_folders
from featprobe.datasets.gdxray import find_series, read_gdxray
from featprobe.datasets.labelme import is_bsdata, is_labelme, read_labelme
from featprobe.datasets.magnetic_tile import is_magnetic_tile, read_magnetic_tile
from featprobe.datasets.samples import DataSet
from featprobe.datasets.severstal import is_severstal, read_severstal
from featprobe.datasets.splits import complete_splits
from featprobe.datasets.surfaces import is_kolektor, is_mvtec, read_kolektor, read_mvtec
from featprobe.datasets.voc import find_segmentation, find_voc, read_segmentation, read_voc
from featprobe.datasets.yolo import find_yolo, read_yolo
from featprobe.errors import DataError, nearest


@dataclass(frozen=True)
class Format:
    """One format: what is looked for, whether a path has it, and its reader (of a set's name and path).

    gives_way_to: formats that are meant, unless this one is named, where a path has theirs too.
    """

    layout: str
    fits: Callable[[Path], bool]
    read: Callable[[str, Path], DataSet]
    gives_way_to: tuple[str, ...] = ()


def _fits_folders(root: Path) -> bool:
    """Coloured masks in the same folders are another format."""
    return root.is_dir() and bool(find_folders(root)) and not find_pairs(root)


def _read_folders(name: str, root: Path) -> DataSet:
    return read_folders(name, root, find_folders(root))


def _fits_coco(root: Path) -> bool:
    return not is_bsdata(root) and bool(find_coco(root))


def _read_coco(name: str, root: Path) -> DataSet:
    return read_coco(name, root, find_coco(root))


FORMATS: Mapping[str, Format] = {
    "folders": Format(
        "images/ and masks/ with the same stems, or the same inside train/, val/ and test/",
        _fits_folders,
        _read_folders,
    ),
    "coco": Format("COCO JSON: *.json, annotations/*.json, or in one folder per split", _fits_coco, _read_coco),
    "colours": Format(
        "coloured masks: images/ and masks/, or NAME_images/ and NAME_masks/, and classes.txt of `R,G,B name`",
        lambda root: bool(find_pairs(root)),
        read_colours,
        gives_way_to=("coco",),
    ),
    "labelme": Format("labelme: one JSON file an image, with shapes", is_labelme, read_labelme),
    "deeppcb": Format("DeepPCB: trainval.txt and test.txt, with or without PCBData/", is_deeppcb, read_deeppcb),
    "magnetic-tile": Format(
        "magnetic tile: MT_<class>/Imgs/NAME.jpg with NAME.png", is_magnetic_tile, read_magnetic_tile
    ),
    "voc": Format(
        "Pascal VOC: Annotations/*.xml beside JPEGImages/ or images/, NEU-DET's folders too",
        lambda root: bool(find_voc(root)),
        read_voc,
    ),
    "voc-segmentation": Format(
        "Pascal VOC: SegmentationClass/ beside JPEGImages/",
        lambda root: find_segmentation(root) is not None,
        read_segmentation,
    ),
    "yolo": Format(
        "YOLO: data.yaml, images/ and labels/ with the same stems", lambda root: find_yolo(root) is not None, read_yolo
    ),
    "severstal": Format("Severstal: train.csv with EncodedPixels, train_images/", is_severstal, read_severstal),
    "gdxray": Format(
        "GDXray: SERIES/SERIES_NNNN.png and SERIES/ground_truth.txt", lambda root: bool(find_series(root)), read_gdxray
    ),
    "kolektorsdd2": Format("KolektorSDD2: train/ and test/ with ID.png and ID_GT.png", is_kolektor, read_kolektor),
    "mvtec-ad": Format("MVTec AD: a category's train/good/, test/ and ground_truth/", is_mvtec, read_mvtec),
}
"""In the order in which they are looked for; what several of them fit has to be named."""


def read_data(name: str, root: Path, format_name: str | None = None) -> DataSet:
    """The data set that lies at a path, in a named format or in the one found by looking, its splits completed.

    Raises DataError, with what is known to be read, when no format fits, and with their names when several do.
    """
    if format_name is not None and format_name not in FORMATS:
        raise DataError(
            f"There is no format {format_name!r}. {nearest(format_name, FORMATS)}\n  wanted  {', '.join(FORMATS)}"
        )
    if not root.exists():
        raise DataError(f"There is no folder or file {root} (data set {name}).")
    asked = [format_name] if format_name else list(FORMATS)
    fitting = [known for known in asked if FORMATS[known].fits(root)]
    fitting = [known for known in fitting if not set(FORMATS[known].gives_way_to) & set(fitting)]
    if len(fitting) > 1:
        each = "\n          ".join(f"{known:<16} {FORMATS[known].layout}" for known in fitting)
        raise DataError(
            f"{root} can be read in {len(fitting)} formats.\n  wanted  one\n  found   {each}\n"
            f"Nothing was read. Name the one that is meant:  --format {fitting[0]}"
        )
    if fitting:
        return complete_splits(FORMATS[fitting[0]].read(name, root))
    layouts = "\n          or ".join(FORMATS[known].layout for known in asked)
    raise DataError(
        f"{root} holds no data set that can be read{f' as {format_name}' if format_name else ''}.\n"
        f"  wanted  {layouts}\n"
        f"  found   {', '.join(sorted(p.name for p in root.iterdir())[:8]) if root.is_dir() else root.name}"
    )
