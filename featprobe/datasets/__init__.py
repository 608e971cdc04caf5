"""Data sets as they lie on the disk: readers, splits, images, and two generated sets."""

from pathlib import Path

from featprobe.datasets.coco import find_coco, read_coco
from featprobe.datasets.folders import find_folders, read_folders
from featprobe.datasets.generated import GENERATED, generate
from featprobe.datasets.samples import DataSet, Sample
from featprobe.datasets.splits import complete_splits
from featprobe.errors import DataError

__all__ = ["GENERATED", "DataSet", "Sample", "generate", "read_data"]


def read_data(name: str, root: Path) -> DataSet:
    """The data set that lies at a path, its format found by looking, its splits completed.

    Raises DataError, with what is known to be read, when no format fits.
    """
    if not root.exists():
        raise DataError(f"There is no folder or file {root} (data set {name}).")
    folders = find_folders(root) if root.is_dir() else {}
    files = [] if folders else find_coco(root)
    if folders:
        return complete_splits(read_folders(name, root, folders))
    if files:
        return complete_splits(read_coco(name, root, files))
    raise DataError(
        f"{root} holds no data set that can be read.\n"
        "  wanted  images/ and masks/ with the same stems, or the same inside train/, val/ and test/\n"
        "          or COCO JSON: *.json, annotations/*.json, or in one folder per split\n"
        f"  found   {', '.join(sorted(p.name for p in root.iterdir())[:8]) if root.is_dir() else root.name}"
    )
