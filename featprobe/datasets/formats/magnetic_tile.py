"""Reader for the magnetic tile set: MT_<class>/Imgs/NAME.jpg with its mask NAME.png."""

import re
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from featprobe.datasets.files import files_below, kept_below
from featprobe.datasets.grouping import components
from featprobe.datasets.images.reading import read_levels
from featprobe.datasets.names import visible
from featprobe.datasets.objects import check_classes, check_size, read_binary
from featprobe.datasets.samples import DataSet, Sample, tasks_of
from featprobe.errors import DataError
from featprobe.geometry import Size
from featprobe.targets import Target

FREE = "free"
BRIGHT = 127  # masks should be 0 and 255 but have smoothed edges: brighter pixels are the defect
NO_FRAME = 1 << 40
FRAME_GAP = 400  # frames; pictures further apart look no more alike than any others
SAME_PICTURE = 0.985  # correlation of thumbnails; for pictures far apart the median is 0.33, one in 1000 has 0.945
SIDE = 32  # pixels of a thumbnail


def is_magnetic_tile(root: Path) -> bool:
    """Whether a folder holds MT_<class>/Imgs."""
    return root.is_dir() and any(path.is_dir() for path in visible(root, root.glob("MT_*/Imgs")))


def read_magnetic_tile(name: str, root: Path) -> DataSet:
    """The data set of the MT_ folders. A mask's class is that of its folder; MT_Free has only background.

    The group is the tile: names hold a running frame number, and pictures up to 400 frames apart are of one tile, as
    are pictures that are nearly identical. A picture without a frame number is grouped only by its look.
    """
    folders = [path for path in visible(root, root.glob("MT_*/Imgs")) if path.is_dir()]
    images = [path for folder in folders for path in files_below(root, folder, (".jpg", ".jpeg"))]
    if not images:
        raise DataError(f"{root} holds no images. wanted: MT_<class>/Imgs/NAME.jpg with NAME.png.")
    kinds = sorted({_kind(folder) for folder in folders} - {FREE})
    classes = check_classes(["background", *kinds], f"{root}: its MT_ folders")
    identities = {path.relative_to(root).as_posix(): path for path in images}
    tiles = tile_groups(images)
    samples = [Sample(i, path, tiles[path]) for i, path in identities.items()]

    def read_target(sample: Sample, size: Size) -> Target:
        path = kept_below(root, sample.image.with_suffix(".png"))
        labels = read_binary(path, BRIGHT)
        check_size((labels.shape[0], labels.shape[1]), size, path)
        kind = _kind(sample.image.parent)
        return Target(labels * np.uint8(0 if kind == FREE else classes.index(kind)), None)

    notes = (f"groups are tiles: pictures up to {FRAME_GAP} frames apart, or nearly identical, are one",)
    return DataSet(name, root, classes, samples, tasks_of(masks=True, instances=False), read_target, notes)


def tile_groups(images: Sequence[Path]) -> dict[Path, str]:
    """The tile of each image. An unreadable image has a tile too: reading it later raises the error."""
    items = {path: (_frame(path), path) for path in images}
    frames = sorted(item for item in items.values() if item[0] < NO_FRAME)
    links = [(a, b) for a, b in pairwise(frames) if b[0] - a[0] <= FRAME_GAP]
    seen, thumbnails = [], []
    for path in images:
        with suppress(DataError):
            thumbnails.append(_thumbnail(path))
            seen.append(items[path])
    if seen:
        rows = np.stack(thumbnails)  # (images, pixels)
        alike = np.argwhere(np.triu(rows @ rows.T > SAME_PICTURE, k=1))
        links += [(seen[a], seen[b]) for a, b in alike]
    first = components(items.values(), links)
    firsts = {path: first[item] for path, item in items.items()}
    return {path: f"tile-{number if number < NO_FRAME else own.stem}" for path, (number, own) in firsts.items()}


def _frame(path: Path) -> int:
    """The running frame number of a picture's name."""
    number = re.search(r"num_(\d{1,9})", path.name)
    return int(number[1]) if number else NO_FRAME


def _kind(folder: Path) -> str:
    """The class of an Imgs folder, from the name of the folder around it."""
    return folder.parent.name.removeprefix("MT_").lower()


def _thumbnail(path: Path) -> np.ndarray:
    """(SIDE * SIDE,) grey levels of mean 0 and norm 1; zeros for a picture of one grey."""
    image = Image.fromarray(read_levels(path)).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    levels = np.asarray(image, dtype=float).ravel()
    levels -= levels.mean()
    return levels / max(float(np.linalg.norm(levels)), 1e-9)
