"""Reader for Severstal's steel sheets: train_images/ and train.csv with run lengths, column by column from pixel 1."""

import json
from collections import defaultdict
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featprobe.datasets.files import files_below, kept_below, leads_out, read_text, rows_of, start_of
from featprobe.datasets.names import renamed
from featprobe.datasets.samples import DataSet, Sample, listed, tasks_of
from featprobe.datasets.values import gathered, to_whole
from featprobe.errors import DataError
from featprobe.geometry import Size
from featprobe.targets import IGNORE, Instance, Target, encode_rle, semantic_from_instances

CLASSES = 4


def is_severstal(root: Path) -> bool:
    """Whether a folder holds train.csv, of its columns, and train_images/."""
    path = root / "train.csv"
    if not (path.is_file() and (root / "train_images").is_dir()) or leads_out(root, path):
        return False
    return b"EncodedPixels" in start_of(path, 1000).partition(b"\n")[0]


def read_severstal(name: str, root: Path) -> DataSet:
    """The data set of train.csv, in the form ImageId,ClassId,EncodedPixels or ImageId_ClassId,EncodedPixels.

    An image without a row, or with empty rows, has no defect. Where classes overlap, the smaller area is on top.
    """
    path = kept_below(root, root / "train.csv")
    runs = _read_runs(path)
    images = {image.name: image for image in files_below(root, root / "train_images")}
    if not images:
        raise DataError(f"{root / 'train_images'} holds no images.")
    most = max([CLASSES, *(kind for of_image in runs.values() for kind in of_image)])
    classes = ("background", *(f"class {kind}" for kind in range(1, most + 1)))

    def read_target(sample: Sample, size: Size) -> Target:
        masks = [
            (int(kind), decode_runs(text, size, f"{path}, {sample.id}, class {kind}"))
            for kind, text in json.loads(sample.labels).items()
        ]
        box = (0.0, 0.0, float(size[1]), float(size[0]))
        layers = [Instance(kind, box, encode_rle(mask)) for kind, mask in masks]
        return Target(semantic_from_instances(layers, size), None)

    runs = renamed(runs, images)
    missing = sorted(runs.keys() - images.keys())
    notes = [f"train.csv has defects of {len(missing)} images that are not here: {listed(missing)}"] if missing else []
    samples = [Sample(own, image, own, labels=json.dumps(runs.get(own, {}))) for own, image in images.items()]
    tasks = tasks_of(masks=True, instances=False)
    return DataSet(name, root, classes, samples, tasks, read_target, tuple(notes))


def decode_runs(text: str, size: Size, where: str) -> NDArray[np.bool_]:
    """The (height, width) mask of a text `start length start length …`; starts count from 1, column by column.

    Raises DataError for runs that overlap, are empty, or leave the image.

    >>> decode_runs("2 1 3 2", (2, 2), "here").astype(int).tolist()
    [[0, 1], [1, 1]]
    """
    words = text.split()
    pixels = size[0] * size[1]
    if len(words) % 2 or not all(word.isascii() and word.isdecimal() and len(word) < 12 for word in words):
        raise DataError(f"{where}: wanted pairs of a start and a length, found {text[:80]!r}.")
    starts, lengths = np.array(words, dtype=np.int64).reshape(-1, 2).T
    order = np.argsort(starts)
    starts, lengths = starts[order] - 1, lengths[order]
    ends = starts + lengths
    if (starts < 0).any() or (lengths < 1).any() or (ends > pixels).any() or (starts[1:] < ends[:-1]).any():
        raise DataError(
            f"{where}: the run lengths do not fit the image.\n"
            f"  wanted  runs of one pixel or more within 1 to {pixels} that don't overlap\n  found   {text[:80]!r}"
        )
    steps = np.zeros(pixels + 1, dtype=np.int8)
    np.add.at(steps, starts, 1)
    np.add.at(steps, ends, -1)
    return np.cumsum(steps[:-1], dtype=np.int8).astype(bool).reshape(size, order="F")


def _read_runs(path: Path) -> dict[str, dict[int, str]]:
    """Run lengths by image and class; rows without any are skipped. Raises DataError with all bad rows."""
    text = read_text(path)
    joined = "imageid_classid" in text.partition("\n")[0].lower()
    rows = rows_of(text, path, (*(("ImageId_ClassId",) if joined else ("ImageId", "ClassId")), "EncodedPixels"))
    found: dict[str, dict[int, str]] = defaultdict(dict)

    def take(row: dict[str, str], where: str) -> None:
        image, kind = row.get("ImageId", ""), row.get("ClassId", "")
        if joined:
            image, _, kind = row["ImageId_ClassId"].rpartition("_")
        if image and not kind and not row["EncodedPixels"]:
            return  # no class and no pixels: an image without defects
        number = 0
        with suppress(DataError):
            number = to_whole(kind, where)
        if not image or not 0 < number < IGNORE - 1:
            raise DataError(
                f"{where} can't be read.\n"
                "  wanted  ImageId,ClassId,EncodedPixels or ImageId_ClassId,EncodedPixels, classes from 1 on\n"
                f"  found   {str(row)[:200]}"
            )
        if number in found[image]:
            raise DataError(f"{where} has the class {number} of {image} again.")
        found[image][number] = row["EncodedPixels"]

    gathered(partial(take, row, f"{path}, row {number}") for number, row in enumerate(rows, start=2))
    drawn = {image: {kind: runs for kind, runs in kinds.items() if runs} for image, kinds in found.items()}
    return {image: kinds for image, kinds in drawn.items() if kinds}
