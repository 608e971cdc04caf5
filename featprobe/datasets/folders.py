"""Reader for folders of images and masks with the same stems."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from featprobe.datasets.files import read_table
from featprobe.datasets.images import SUFFIXES
from featprobe.datasets.samples import DataSet, Sample, listed, tasks_of
from featprobe.errors import DataError
from featprobe.geometry import Size
from featprobe.targets import Labels, Target, check_labels

SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "test": "test"}


def find_folders(root: Path) -> dict[str, Path]:
    """Folders that hold images/ and masks/, by split: the root ("" for no split), or train/, val/, test/."""
    if (root / "images").is_dir() and (root / "masks").is_dir():
        return {"": root}
    inside = {split: root / name for name, split in SPLIT_FOLDERS.items()}
    return {s: p for s, p in inside.items() if (p / "images").is_dir() and (p / "masks").is_dir()}


def read_folders(name: str, root: Path, folders: Mapping[str, Path]) -> DataSet:
    """The data set of images/ and masks/ with the same stems.

    Masks hold class indices, palette masks included, or 0 and 255 throughout for one class. Class names
    stand one a line in classes.txt, the background first. samples.csv (image,split,group) is optional.
    """
    table = read_table(root / "samples.csv")
    samples: list[Sample] = []
    masks: dict[str, Path] = {}
    notes: list[str] = []
    for split, folder in folders.items():
        images = sorted(p for p in (folder / "images").rglob("*") if p.suffix.lower() in SUFFIXES)
        mask_of = {_stem(p, folder / "masks"): p for p in sorted((folder / "masks").rglob("*")) if p.is_file()}
        for image in images:
            identity = image.relative_to(folder / "images").as_posix()
            row = table.get(identity, {})
            if split:
                identity = f"{split}/{identity}"
            samples.append(Sample(identity, image, row.get("group") or identity, split or row.get("split") or ""))
            stem = _stem(image, folder / "images")
            masks[identity] = mask_of.pop(stem, folder / "masks" / f"{stem}.png")
        if mask_of:
            notes.append(f"{len(mask_of)} masks have no image: {listed(sorted(mask_of))}")
    if not samples:
        raise DataError(f"{root} holds no images. wanted: files ending in {', '.join(SUFFIXES)} in images/.")
    classes = _read_classes(root / "classes.txt")
    binary = len(classes) == 2 and _is_binary(list(masks.values()))

    def read_target(sample: Sample, size: Size) -> Target:
        labels = read_mask(masks[sample.id])
        if labels.shape != size:
            raise DataError(
                f"{masks[sample.id]} is of another size than its image.\n"
                f"  wanted  {size[0]}x{size[1]} pixels (height x width)\n"
                f"  found   {labels.shape[0]}x{labels.shape[1]}"
            )
        if binary:
            labels = (labels > 0).astype(np.uint8)
        check_labels(labels, len(classes), str(masks[sample.id]))
        return Target(labels, None)

    tasks = tasks_of(masks=True, instances=False)
    return DataSet(name, root, classes, tuple(samples), tasks, read_target, tuple(notes))


def read_mask(path: Path) -> Labels:
    """A mask's class indices, (height, width); a palette PNG gives its indices, not its colours.

    Raises DataError for a missing, unreadable or coloured mask.
    """
    if not path.is_file():
        raise DataError(f"There is no mask {path} for the image of that name.")
    try:
        with Image.open(path) as image:
            mode, values = image.mode, np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path} can't be read as a mask: {error}.") from error
    if mode not in ("P", "L", "1") and not mode.startswith("I"):
        raise DataError(f"{path} is a coloured mask ({mode}). wanted: class indices, as grey levels or a palette.")
    if values.max(initial=0) > 255 or values.min(initial=0) < 0:
        raise DataError(f"{path} holds labels up to {values.max()}. wanted: 0 to 255.")
    return values.astype(np.uint8)


def _stem(path: Path, folder: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


def _read_classes(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        return "background", "defect"
    names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if not 2 <= len(names) <= 254 or len(set(names)) < len(names):
        raise DataError(f"{path} names {len(names)} classes. wanted: 2 to 254, each once, the background first.")
    return names


def _is_binary(paths: Sequence[Path]) -> bool:
    """Whether masks use 0 and 255 only, all of them: then 255 is the one class and not `ignore`.

    Masks that can't be read have no say; they are met again, by name, when their labels are wanted.
    """
    seen: set[int] = set()
    for path in paths:
        with suppress(DataError):
            seen |= set(np.flatnonzero(np.bincount(read_mask(path).ravel(), minlength=256)).tolist())
        if not seen <= {0, 255}:
            return False
    return 255 in seen
