"""Readers for two public sets of COCO JSON in folders of their own: PIDray and RarePlanes' tiles.

PIDray (Wang et al., 2021): annotations/xray_train.json beside train/, xray_test_easy.json beside easy/, and so on.
RarePlanes (Shermeyer et al., 2020), its folder real/: metadata_annotations/instances_train_role.json beside
train/PS-RGB_tiled/, the same for test, with files of other labels beside.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from featprobe.datasets.files import is_missing
from featprobe.datasets.formats.coco import read_coco
from featprobe.datasets.samples import DataSet, Sample
from featprobe.errors import DataError

TEST_SETS = ("easy", "hard", "hidden")
PLANE_LABELS = ("role", "aircraft")
TILES = "PS-RGB_tiled"


def find_pidray(root: Path, test_sets: Sequence[str] = TEST_SETS) -> list[Path]:
    """PIDray's training file and the files of its test sets that exist; [] where either is missing."""
    train = root / "annotations" / "xray_train.json"
    tests = [train.with_name(f"xray_test_{name}.json") for name in test_sets]
    here = [path for path in tests if path.is_file()]
    return [train, *here] if train.is_file() and here else []


def read_pidray(name: str, root: Path, test_sets: Sequence[str] = TEST_SETS) -> DataSet:
    """The data set of PIDray in its published split. Its test sets are read together, or only the named one."""
    files = find_pidray(root, test_sets)
    if not files:
        raise DataError(f"{root / 'annotations'} lacks xray_train.json or xray_test_{' or '.join(test_sets)}.json.")
    tests = [path.stem.removeprefix("xray_test_") for path in files[1:]]
    notes = (f"the test split is PIDray's {', '.join(tests)}", "it names no parts to group by")
    data = read_coco(name, root, files)
    return replace(data, notes=(*notes, *data.notes))


def find_rareplanes(root: Path, labels: Sequence[str] = PLANE_LABELS) -> list[Path]:
    """RarePlanes' training and test file of the first kind of labels that exists; [] where there are no tiles."""
    if not (root / "train" / TILES).is_dir():
        return []
    folder = root / "metadata_annotations"
    pairs = [[folder / f"instances_{split}_{label}.json" for split in ("train", "test")] for label in labels]
    return next((pair for pair in pairs if not any(is_missing(path) for path in pair)), [])


def read_rareplanes(name: str, root: Path, labels: Sequence[str] = PLANE_LABELS) -> DataSet:
    """The data set of RarePlanes' tiles in its published split. The group is the scene, the first part of a tile's
    name."""
    files = find_rareplanes(root, labels)
    if not files:
        wanted = " or ".join(f"instances_{{train,test}}_{label}.json" for label in labels)
        raise DataError(f"{root / 'metadata_annotations'} lacks {wanted}, or {root / 'train'} lacks {TILES}/.")
    data = read_coco(name, root, files)
    label = files[0].stem.rpartition("_")[2]
    notes = (f"classes are those of instances_*_{label}.json", "groups are the scenes, PLACE_SCENE of a tile's name")
    return replace(data, samples=tuple(replace(s, group=_scene(s)) for s in data.samples), notes=(*notes, *data.notes))


def _scene(sample: Sample) -> str:
    """`100_1040010029990A00` of `100_1040010029990A00_tile_319.png`."""
    return re.sub(r"_tile_\d+$", "", sample.image.stem)
