"""Hostile files in every format: cut, of another encoding, missing, leading out of the folder."""

from pathlib import Path

import pytest
from click.testing import CliRunner
from test_readers import MADE

from featprobe.cli.main import cli
from featprobe.datasets import read_data
from featprobe.stages.upkeep.describe import summarise

HOSTILE = {
    "folders": {"cut": "masks/p0.png", "latin": "classes.txt", "gone": "masks/p0.png"},
    "coco": {"cut": "all.json", "latin": "all.json", "gone": "images/p0.png", "paths": ("all.json", "p0.png")},
    "colours": {"cut": "masks/p0.png", "latin": "classes.txt", "gone": "masks/p0.png"},
    "labelme": {"cut": "p0.json", "latin": "p0.json", "gone": "p0.png", "paths": ("p0.json", "p0.png")},
    "labelme of BSData": {
        "cut": "image_data.json", "latin": "image_data.json",
        "paths": ("label/photo0_crop_0.json", "photo0_crop_0.jpg"),
    },
    "deeppcb": {
        "cut": "PCBData/trainval.txt", "latin": "PCBData/trainval.txt", "gone": "PCBData/group0/0_not/0000.txt",
        "paths": ("PCBData/trainval.txt", "group0/0_not/0000.txt"),
    },
    "magnetic-tile": {"cut": "MT_Crack/Imgs/exp1_num_100.png", "gone": "MT_Crack/Imgs/exp1_num_100.png"},
    "voc": {"cut": "Annotations/p0.xml", "latin": "Annotations/p0.xml", "gone": "JPEGImages/p0.jpg"},
    "voc-segmentation": {"cut": "SegmentationClass/p0.png", "gone": "JPEGImages/p0.jpg"},
    "yolo": {"cut": "labels/train/p0.txt", "latin": "labels/train/p0.txt", "paths": ("data.yaml", "images/train")},
    "severstal": {"cut": "train.csv", "latin": "train.csv"},
    "gdxray": {"cut": "C0001/ground_truth.txt", "latin": "C0001/ground_truth.txt"},
    "kolektorsdd2": {"cut": "train/0_GT.png", "gone": "train/0_GT.png"},
    "mvtec-ad": {"cut": "ground_truth/cut/000_mask.png", "gone": "ground_truth/cut/000_mask.png"},
    "pidray": {
        "cut": "annotations/xray_train.json", "latin": "annotations/xray_train.json", "gone": "train/xray_00000.png",
        "paths": ("annotations/xray_train.json", "xray_00000.png"),
    },
    "rareplanes": {
        "cut": "metadata_annotations/instances_train_role.json", "gone": "train/PS-RGB_tiled/1_A_tile_0.png",
        "latin": "metadata_annotations/instances_train_role.json",
        "paths": ("metadata_annotations/instances_train_role.json", "1_A_tile_0.png"),
    },
    "visa": {
        "cut": "candle/Data/Masks/Anomaly/001.png", "latin": "split_csv/2cls_highshot.csv",
        "gone": "candle/Data/Masks/Anomaly/001.png",
        "paths": ("split_csv/2cls_highshot.csv", "candle/Data/Images/Normal/000.JPG"),
    },
    "kolektorsdd": {"cut": "kos01/Part0_label.bmp", "gone": "kos01/Part0_label.bmp"},
    "pairs": {"cut": "train_lab/p0_gt.png", "gone": "train_lab/p0_gt.png"},
    "class-csv": {
        "cut": "labels.csv", "latin": "labels.csv", "paths": ("labels.csv", "a_long_name_of_a_folder/p0.png"),
    },
    "class-folders": {},
}  # fmt: skip
"""By format: a file that is cut off, one in another encoding, one that is missing, a file and the path it names.

What is left out has no such file, or says in a note what is not there.
"""


OUTSIDE = ("/etc/hosts", "../../../secret", "C:/a")


def test_every_format_is_tried_with_hostile_files() -> None:
    assert set(HOSTILE) == set(MADE)


@pytest.mark.parametrize(("name", "how"), [(name, how) for name, own in HOSTILE.items() for how in own])
def test_a_hostile_file_is_answered_by_its_name(tmp_path: Path, name: str, how: str) -> None:
    root = MADE[name](tmp_path / "in" / "set")
    file, named = HOSTILE[name][how], ""
    if how == "paths":
        file, named = HOSTILE[name][how]
    path = root / file
    whole = path.read_bytes()
    damaged: list[bytes] = {
        "cut": [whole[: len(whole) * 3 // 5]],
        "latin": [whole + b"\n\xf6\xff"],
        "gone": [],
        "paths": [whole.replace(named.encode(), f"{aim}{Path(named).suffix}".encode()) for aim in OUTSIDE],
    }[how]
    for value in damaged:
        path.write_bytes(value)
        answered(root, name, "below the data folder" if how == "paths" else path.name)
    for aim in [path.name, *([] if how == "paths" else ["/etc/hosts"])]:
        path.unlink()
        path.symlink_to(aim)
        answered(root, name, "")
    if how == "gone":
        path.unlink()
        answered(root, name, path.stem.removesuffix("_GT"))


def answered(root: Path, name: str, said: str) -> None:
    """The command line ends with 1 and one paragraph of ours that says this, whether the format is named or not."""
    for named in ([], ["--format", name.split()[0]]):
        result = CliRunner().invoke(cli, ["--workspace", str(root.parent), "data", "info", str(root), *named])
        assert (result.exit_code, result.stdout) == (1, ""), result.output
        assert isinstance(result.exception, SystemExit), result.exception
        assert result.stderr.startswith("featprobe: ") and said in result.stderr


@pytest.mark.parametrize("name", MADE)
def test_a_folder_that_links_to_itself_or_its_parent_ends(tmp_path: Path, name: str) -> None:
    root = MADE[name](tmp_path / "set")
    whole = summarise(read_data("set", root))
    for folder in [root, *(path for path in sorted(root.rglob("*")) if path.is_dir())]:
        (folder / "again").symlink_to(folder)
        (folder / "loop").symlink_to("loop")
    assert summarise(read_data("set", root)).images == whole.images
