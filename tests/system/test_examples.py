"""Each examples/prepare_*.py, run as a user runs it, on the real data set it is for."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from featprobe.datasets import read_data
from featprobe.datasets.images.reading import image_size
from featprobe.geometry import Part

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("FEATPROBE_SHARED_DATA", ROOT.parent / "shared" / "data"))
AS_THEY_LIE = {"bsdata": "bsdata", "mt_defect": "mt_defect", "deeppcb": "deeppcb", "sandstone": "sandstone_xrm"}
SOURCES = {**AS_THEY_LIE, "deeppcb_classes": "deeppcb"}
DEFECTS = ["open", "short", "mousebite", "spur", "copper", "pin-hole"]


def prepare(name, source, out):
    script = ROOT / "examples" / f"prepare_{name}.py"
    return subprocess.run(
        [sys.executable, script, source, out], check=False, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """prepared(name): the folder that the script makes, and what it printed; made once for each set."""
    made = {}

    def make(name):
        if not (DATA / SOURCES[name]).is_dir():
            pytest.skip(f"{DATA / SOURCES[name]} is missing (FEATPROBE_SHARED_DATA names another folder)")
        if name not in made:
            out = tmp_path_factory.mktemp(name)
            result = prepare(name, DATA / SOURCES[name], out)
            assert result.returncode == 0, result.stderr
            made[name] = out, result.stdout
        return made[name]

    return make


def read_coco(out):
    """{split: COCO}, every annotation checked to lie in its image."""
    splits = {path.stem: COCO(path) for path in (out / "annotations").glob("*.json")}
    for coco in splits.values():
        for image in coco.imgs.values():
            with Image.open(out / "images" / image["file_name"]) as picture:
                assert picture.size == (image["width"], image["height"])
            assert image["group"]
        for thing in coco.anns.values():
            image, (x, y, width, height) = coco.imgs[thing["image_id"]], thing["bbox"]
            assert 0 <= x < x + width <= image["width"] and 0 <= y < y + height <= image["height"]
            assert 0 < thing["area"] <= width * height and thing["category_id"] in coco.cats
    return splits


def read_mask_folder(out):
    """classes, samples.csv as dicts, {file name: mask}, every mask checked against classes and image."""
    classes = (out / "classes.txt").read_text().split()
    with open(out / "samples.csv", newline="") as file:
        samples = list(csv.DictReader(file))
    assert {row["image"] for row in samples} == {path.name for path in (out / "images").iterdir()}
    masks = {}
    for row in samples:
        with Image.open(out / "masks" / Path(row["image"]).with_suffix(".png")) as mask:
            assert mask.mode == "L"
            masks[row["image"]] = np.asarray(mask)
        with Image.open(out / "images" / row["image"]) as picture:
            assert masks[row["image"]].shape == (picture.height, picture.width)
        assert masks[row["image"]].max() < len(classes)
        assert row["split"] == "" and row["group"]
    return classes, samples, masks


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools on numpy 2
def test_bsdata(prepared):
    out, said = prepared("bsdata")
    splits = read_coco(out)
    assert {split: (len(coco.imgs), len(coco.anns)) for split, coco in splits.items()} == {
        "train": (75, 93),
        "test": (70, 88),
    }
    assert "groups that straddle the official split: 13 of 42" in said
    for coco in splits.values():
        for thing in coco.anns.values():  # the polygon, the box and the area are of one and the same thing
            x, y, width, height = thing["bbox"]
            (polygon,) = thing["segmentation"]
            assert (min(polygon[0::2]), min(polygon[1::2])) == (x, y)
            assert max(polygon[0::2]) == pytest.approx(x + width)
            assert max(polygon[1::2]) == pytest.approx(y + height)
            drawn = coco.annToMask(thing).sum()
            assert abs(drawn - thing["area"]) <= 2 * (width + height)  # pixels: the outline's width
    (coco, *_) = splits.values()
    image = next(iter(coco.imgs.values()))["file_name"]
    assert (out / "images" / image).read_bytes() == (DATA / "bsdata" / "data" / image).read_bytes()


def test_deeppcb(prepared):
    out, said = prepared("deeppcb")
    splits = read_coco(out)
    assert {split: (len(coco.imgs), len(coco.anns)) for split, coco in splits.items()} == {
        "train": (550, 4011),
        "test": (500, 3140),
    }
    assert "1500 pictures, of which 450 are not in SOURCE" in said
    train, test = ({image["group"] for image in splits[split].imgs.values()} for split in ("train", "test"))
    assert len(train | test) == 11
    assert train & test == {"group00041", "group13000", "group20085"}
    assert [category["name"] for category in splits["test"].dataset["categories"]] == [
        "open",
        "short",
        "mousebite",
        "spur",
        "copper",
        "pin-hole",
    ]


def test_deeppcb_classes(prepared):
    out, said = prepared("deeppcb_classes")
    data = read_data("crops", out)
    names = data.label_names
    assert names.good == "good" and set(names.names) == {"good", *DEFECTS} and "1500 pictures, of which 450" in said
    boards = read_data("deeppcb", DATA / "deeppcb")
    place_of = {sample.image.stem.removesuffix("_test"): sample for sample in boards.samples}
    assert {s.group for s in data.samples} == {s.group for s in boards.samples}
    seen = dict.fromkeys(names.names, 0)
    for number, sample in enumerate(data.samples):
        label = sample.id.split("/")[0]
        seen[label] += 1
        if number % 9:
            continue
        stem, left, top = sample.image.stem.rsplit("_", 2)
        board = place_of[stem]
        target = data.read_target(sample, image_size(sample.image))
        assert image_size(sample.image) == (64, 64) and [names.names[i] for i in target.labels] == [label]
        assert sample.group == board.group
        part = Part(int(left), int(top), 64, 64)
        boxes = [(i.category, part.take_box(i.box_xyxy)) for i in boards.read_target(board, (640, 640)).instances]
        touched = {DEFECTS[kind - 1] for kind, (x1, y1, x2, y2) in boxes if x2 > x1 and y2 > y1}
        assert touched == ({label} - {"good"})
    assert min(seen.values()) > 500 and seen["good"] > 2000
    test = {s.id.split("/")[1].rsplit("_", 2)[0] for s in data.in_split("test")}
    assert test == {stem for stem, board in place_of.items() if board.split == "test"} & test and len(test) > 450


def test_mt_defect(prepared):
    out, _ = prepared("mt_defect")
    classes, samples, masks = read_mask_folder(out)
    assert len(samples) == 710
    pictures_of = {
        name: sum(bool((mask == index).any()) for mask in masks.values()) for index, name in enumerate(classes)
    }
    assert pictures_of == {
        "background": 710,
        "blowhole": 115,
        "break": 85,
        "crack": 57,
        "fray": 32,
        "uneven": 99,
    }  # and four pictures of MT_Uneven with nothing marked
    group_of = {row["image"]: row["group"] for row in samples}
    assert len(set(group_of.values())) == 168
    six_exposures = ["exp1_num_4727.jpg", "exp2_num_4748.jpg", "exp6_num_4841.jpg"]
    labelled_twice = ["exp1_num_276355.jpg", "exp2_num_276373.jpg"]  # MT_Crack and MT_Break
    came_back = ["exp4_num_85602.jpg", "exp3_num_86892.jpg", "exp6_num_88201.jpg"]
    for tile in (six_exposures, labelled_twice, came_back):
        assert len({group_of[name] for name in tile}) == 1
    assert group_of["exp1_num_4727.jpg"] != group_of["exp1_num_276355.jpg"]


def test_sandstone(prepared):
    out, _ = prepared("sandstone")
    classes, samples, masks = read_mask_folder(out)
    assert classes == ["air", "mid-dark", "grain", "bright"]
    assert len(samples) == len({row["group"] for row in samples}) == 10
    for name, mask in masks.items():  # slice 0180 with its own codes included
        with Image.open(out / "images" / name) as picture:
            grey = np.asarray(picture)
        means = [grey[mask == index].mean() for index in range(4)]
        assert means == pytest.approx([14, 83, 125, 243], abs=9)


@pytest.mark.parametrize("name", SOURCES)
def test_a_wrong_source_is_refused(name, tmp_path):
    result = prepare(name, tmp_path, tmp_path / "out")
    assert result.returncode == 1
    assert "is not the data set" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", SOURCES)
def test_an_out_folder_that_is_not_empty_is_refused(name, tmp_path):
    if not (DATA / SOURCES[name]).is_dir():
        pytest.skip(f"{DATA / SOURCES[name]} is missing (FEATPROBE_SHARED_DATA names another folder)")
    (tmp_path / "mine.txt").write_text("kept")
    result = prepare(name, DATA / SOURCES[name], tmp_path)
    assert result.returncode == 1
    assert "not an empty folder" in result.stderr and "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("name", AS_THEY_LIE)
def test_the_set_as_it_lies_is_the_one_that_the_script_makes(prepared, name):
    """Groups, splits and labels; the script knows one slice of the sandstone more, so that its split differs."""
    whole = read_data(name, prepared(name)[0])
    made = {sample.image.name: sample for sample in whole.samples}
    data = read_data(name, DATA / SOURCES[name])
    assert len(data.samples) == len(made) - (name == "sandstone")
    for number, sample in enumerate(data.samples):
        other = made[sample.image.name]
        if name != "sandstone":
            assert (sample.group, sample.split) == (other.group, other.split)
        if number % 8 == 0:
            size = image_size(sample.image)
            ours, theirs = data.read_target(sample, size), whole.read_target(other, size)
            assert np.array_equal(ours.semantic, theirs.semantic)
            boxes = [[(i.category, *i.box_xyxy) for i in one.instances or ()] for one in (ours, theirs)]
            assert np.allclose(*boxes)
