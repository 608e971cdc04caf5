"""Readers of the formats that inspection sets come in: small sets of the true layout, hostile ones, the real ones."""

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image

from featprobe.cli.main import cli
from featprobe.datasets import FORMATS, DataSet, read_data
from featprobe.datasets.images.reading import image_size
from featprobe.errors import DataError
from featprobe.stages.upkeep.describe import DataSummary, summarise
from featprobe.stages.workspace import Workspace
from featprobe.targets import Instance, Target, decode_rle

ROOT = Path(__file__).parents[3]
HEIGHT, WIDTH = SIZE = (12, 16)
SPLITS = ("train", "val", "test")
REAL = Path(os.environ.get("FEATPROBE_SHARED_DATA", Path(__file__).parents[4] / "shared" / "data"))


def picture(path: Path, size: tuple[int, int] = SIZE, seed: int = 0) -> Path:
    """An 8-bit grey image of random levels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    Image.fromarray(levels).save(path)
    return path


def mask(path: Path, values: NDArray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8)).save(path)
    return path


def text(path: Path, value: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value, encoding="utf-8")
    return path


def square(top: int, left: int, side: int) -> NDArray[np.bool_]:
    drawn = np.zeros(SIZE, dtype=bool)
    drawn[top : top + side, left : left + side] = True
    return drawn


def target_of(data: DataSet, identity: str) -> Target:
    sample = next(sample for sample in data.samples if sample.id == identity)
    return data.read_target(sample, image_size(sample.image))


def objects_of(data: DataSet, identity: str) -> tuple[Instance, ...]:
    instances = target_of(data, identity).instances
    assert instances is not None
    return instances


def refused(root: Path, format_name: str | None = None) -> str:
    """What is said of a set that can't be read, or whose labels can't."""
    with pytest.raises(DataError) as error:
        summarise(read_data("set", root, format_name))
    return str(error.value)


def real(name: str) -> DataSummary:
    """A real set, read as it lies on the disk, all its labels looked at."""
    if not (REAL / name).is_dir():
        pytest.skip(f"{REAL / name} is missing (FEATPROBE_SHARED_DATA names another folder)")
    return summarise(read_data(name, REAL / name))


# ---- naming a format -------------------------------------------------------------------------------------------------


def test_an_unknown_format_lists_the_known_ones(tmp_path: Path) -> None:
    said = refused(tmp_path, "labelmee")
    assert "Did you mean labelme?" in said and all(name in said for name in FORMATS)


def test_a_named_format_that_does_not_fit_says_what_it_would_be(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    said = refused(tmp_path, "labelme")
    assert "read as labelme" in said and "shapes" in said and "found   a.png" in said and "COCO" not in said


def test_the_format_may_be_named_on_the_command_line_or_in_the_workspace(tmp_path: Path) -> None:
    labelme_set(tmp_path / "parts")
    text(tmp_path / "parts" / "all.json", json.dumps({"images": [], "annotations": [], "categories": []}))
    call = ["--workspace", str(tmp_path), "data", "info"]
    assert CliRunner().invoke(cli, [*call, str(tmp_path / "parts")]).exit_code == 1  # an empty COCO file
    assert CliRunner().invoke(cli, [*call, str(tmp_path / "parts"), "--format", "labelme"]).exit_code == 0
    text(tmp_path / "featprobe.toml", '[data.parts]\npath = "parts"\nformat = "labelme"\n')
    assert CliRunner().invoke(cli, [*call, "parts"]).exit_code == 0
    assert Workspace(tmp_path).data_options("parts") == {"format": "labelme"}
    sheet = str(tmp_path / "sheet.png")
    show = ["--workspace", str(tmp_path), "data", "show", str(tmp_path / "parts"), "--out", sheet]
    assert CliRunner().invoke(cli, [*show, "--format", "labelme"]).exit_code == 0


def test_the_page_about_formats_lists_them_in_the_order_in_which_they_are_looked_for() -> None:
    page = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    table = page[page.index("| `--format` |") :].split("\n\n")[0]
    assert re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE)[1:] == list(FORMATS)


# ---- labelme ---------------------------------------------------------------------------------------------------------


def shape(label: str, points: list[Any], kind: str = "polygon", **more: Any) -> dict[str, Any]:
    return {"label": label, "points": points, "shape_type": kind, "group_id": None, "flags": {}, **more}


def drawing(image: str, shapes: list[Any], **more: Any) -> str:
    size = {"imageHeight": HEIGHT, "imageWidth": WIDTH}
    return json.dumps({"version": "5.0", "shapes": shapes, "imagePath": image, "imageData": None, **size, **more})


RING = [[3, 2], [8, 2], [8, 7], [3, 7]]


def labelme_set(root: Path, first: list[Any] | None = None, **more: Any) -> Path:
    """Four images, the first with the given shapes, the others with a pore each."""
    for i in range(4):
        picture(root / f"p{i}.png", seed=i)
        shapes = first if first is not None and not i else [shape("pore", RING)]
        text(root / f"p{i}.json", drawing(f"p{i}.png", shapes, **({} if i else more)))
    return root


def test_labelme_polygons_and_rectangles(tmp_path: Path) -> None:
    first = [shape("pore", RING), shape("crack", [[12, 9], [9, 5]], "rectangle")]
    data = read_data("set", labelme_set(tmp_path, first))
    assert data.classes == ("background", "crack", "pore") and data.tasks == ("semseg", "detect", "instseg")
    assert [(s.id, s.group) for s in data.samples] == [(f"p{i}.png", f"p{i}.png") for i in range(4)]
    pore, crack = objects_of(data, "p0.png")
    assert (pore.category, pore.box_xyxy, crack.category, crack.box_xyxy) == (2, (3, 2, 8, 7), 1, (9, 5, 12, 9))
    assert pore.rle is not None and np.array_equal(decode_rle(pore.rle), square(2, 3, 5))
    assert target_of(data, "p0.png").semantic is not None


def test_labelme_parts_of_one_group_are_one_object(tmp_path: Path) -> None:
    other = [[10, 8], [14, 8], [14, 11], [10, 11]]
    first = [shape("pore", RING, group_id=1), shape("pore", other, group_id=1), shape("pore", other)]
    found = objects_of(read_data("set", labelme_set(tmp_path, first)), "p0.png")
    assert [instance.box_xyxy for instance in found] == [(3, 2, 14, 11), (10, 8, 14, 11)]


def test_labelme_ignored_regions_are_ignored_and_background_is_none(tmp_path: Path) -> None:
    first = [shape("__ignore__", RING), shape("_background_", RING)]
    data = read_data("set", labelme_set(tmp_path, first))
    assert [instance.crowd for instance in objects_of(data, "p0.png")] == [True]
    assert np.array_equal(target_of(data, "p0.png").semantic, square(2, 3, 5) * np.uint8(255))


def test_labelme_names_classes_splits_and_groups_where_they_are_given(tmp_path: Path) -> None:
    labelme_set(tmp_path)
    text(tmp_path / "classes.txt", "background\ncrack\npore\n")
    rows = [f"p{i}.png,{(*SPLITS, 'train')[i]},part{i % 3}" for i in range(4)]
    text(tmp_path / "samples.csv", "image,split,group\n" + "\n".join(rows))
    data = read_data("set", tmp_path)
    assert data.classes == ("background", "crack", "pore")
    assert [(s.split, s.group) for s in data.samples] == [
        ("train", "part0"), ("val", "part1"), ("test", "part2"), ("train", "part0")
    ]  # fmt: skip


@pytest.mark.parametrize("named", ["p0.png", "../images/p0.png", "..\\images\\p0.png"])
def test_labelme_files_may_lie_beside_the_folder_of_images(tmp_path: Path, named: str) -> None:
    for i in range(3):
        picture(tmp_path / "images" / f"p{i}.png")
        text(tmp_path / "label" / f"p{i}.json", drawing(named.replace("p0", f"p{i}"), [shape("pore", RING)]))
    picture(tmp_path / "images" / "bare.png")
    data = read_data("set", tmp_path)
    assert [sample.id for sample in data.samples] == [f"images/p{i}.png" for i in range(3)]
    assert "1 image has no labelme file and is left out: bare.png" in data.notes


@pytest.mark.parametrize("named", ["/etc/passwd", "C:\\scans\\a.png", "../../a.png", "a/../../b.png", "a\0.png"])
def test_labelme_never_leads_out_of_the_folder(tmp_path: Path, named: str) -> None:
    picture(tmp_path / "a.png")
    labelme_set(tmp_path / "in" / "set", imagePath=named)
    said = refused(tmp_path / "in" / "set")
    assert "p0.json, imagePath names a path that is not below the data folder" in said


def test_links_out_of_the_folder_or_to_themselves_are_refused(tmp_path: Path) -> None:
    outside = picture(tmp_path / "secret.png")
    labelme_set(tmp_path / "set")
    (tmp_path / "set" / "p0.png").unlink()
    (tmp_path / "set" / "p0.png").symlink_to(outside)
    assert "is a link out of the data folder" in refused(tmp_path / "set")
    (tmp_path / "set" / "p0.png").unlink()
    (tmp_path / "set" / "p0.png").symlink_to("p0.png")
    assert "links to itself" in refused(tmp_path / "set")


@pytest.mark.parametrize("name", ["classes.txt", "samples.csv"])
def test_tables_outside_of_the_folder_are_not_read(tmp_path: Path, name: str) -> None:
    for root in (labelme_set(tmp_path / "a"), voc_set(tmp_path / "b"), colour_set(tmp_path / "c")):
        (root / name).symlink_to(text(tmp_path / "secret", "image,split,group\n"))
        assert "is a link out of the data folder" in refused(root)


def test_a_folder_that_links_to_its_parent_is_not_entered(tmp_path: Path) -> None:
    labelme_set(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path)
    assert len(read_data("set", tmp_path).samples) == 4


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ([shape("pore", RING[:2])], "a polygon of 2 points"),
        ([shape("pore", [[0, 0], [40, 0], [40, 9]])], "leaves the image"),
        ([shape("pore", [[0, 0], [float("nan"), 0], [4, 9]])], "finite numbers"),
        ([shape("pore", [[0, 0], ["x", 0], [4, 9]])], "wanted numbers"),
        ([shape("pore", [[0, 0], [10**400, 0], [4, 9]])], "wanted numbers"),
        ([shape("pore", [[0, 0], [1], [4, 9]])], "points of two numbers"),
        ([shape("pore", [1, 2, 3])], "points of two numbers"),
        ([shape("pore", [[3, 3], [3, 9]], "rectangle")], "the rectangle is empty"),
        ([shape("pore", RING, "linestrip")], "is a linestrip. wanted: polygon or rectangle"),
        ([{"points": RING}], "shapes[0] can't be read"),
        (["pore"], "shapes[0] can't be read"),
    ],
)
def test_a_bad_labelme_shape_is_named(tmp_path: Path, shapes: list[Any], said: str) -> None:
    found = refused(labelme_set(tmp_path, shapes))
    assert said in found and "p0.json" in found


def test_a_bad_labelme_file_is_named(tmp_path: Path) -> None:
    path = labelme_set(tmp_path) / "p0.json"
    whole = path.read_bytes()
    for value, said in [
        (whole[:-30], "can't be read as JSON"),
        (b"", "can't be read as JSON"),
        (whole.replace(b"pore", b"p\xf6re"), "wanted: UTF-8"),
        (b'{"shapes": 3}', "wanted: a list called shapes"),
        (whole.replace(b'"imageWidth": 16', b'"imageWidth": 17'), "found   12x17"),
        (whole.replace(b"p0.png", b"p1.png"), "name the same image"),
    ]:
        path.write_bytes(value)
        assert said in refused(tmp_path)
    path.write_bytes(whole)
    (tmp_path / "p0.png").unlink()
    assert "p0.png can't be read" in refused(tmp_path)


def bsdata_set(root: Path) -> list[dict[str, Any]]:
    """Five crops, of which the last is not here; the first two share a wear chain."""
    chains = [["c1", "c2"], ["c2"], [], ["c3"], ["c4"]]
    entries = []
    for i, own in enumerate(chains):
        entry = {"filename": f"photo{i}_crop_0.jpg", "wear_dev": own, "type": 2, "annotations": f"photo{i}_crop_0.json"}
        entries.append({**entry, "train_test_split": "test" if i in (1, 3) else "train"})
        if i < 4:
            picture(root / "data" / f"photo{i}_crop_0.jpg", seed=i)
            text(root / "label" / f"photo{i}_crop_0.json", drawing(f"photo{i}_crop_0.jpg", [shape("Pitting", RING)]))
    entries.append({"filename": "clean.jpg", "train_test_split": None, "wear_dev": None, "annotations": None})
    text(root / "image_data.json", json.dumps({"images": entries}))
    return entries


def test_bsdata_lists_its_splits_and_groups(tmp_path: Path) -> None:
    bsdata_set(tmp_path)
    data = read_data("set", tmp_path)
    assert [s.group for s in data.samples] == ["c1", "c1", "photo2", "c3"]
    assert Counter(s.split for s in data.samples) == {"test": 2, "train": 1, "val": 1}
    assert any(note == "image_data.json lists 5 annotated images; 1 of them are not here" for note in data.notes)


@pytest.mark.parametrize(
    "spoiled",
    [{"filename": 3}, {"train_test_split": "holdout"}, {"wear_dev": "c1"}, {"wear_dev": [1]}, {"train_test_split": 7}],
)
def test_a_bad_entry_of_bsdata_is_refused(tmp_path: Path, spoiled: dict[str, Any]) -> None:
    entries = bsdata_set(tmp_path)
    text(tmp_path / "image_data.json", json.dumps({"images": [{**entries[0], **spoiled}, *entries[1:]]}))
    assert "image_data.json has an entry that can't be read" in refused(tmp_path)
    text(tmp_path / "image_data.json", json.dumps({"images": entries[1:]}))
    assert "does not list the annotated images photo0_crop_0.jpg" in refused(tmp_path)
    text(tmp_path / "image_data.json", "[1, 2")
    assert "can't be read as JSON" in refused(tmp_path)


def test_the_real_bsdata() -> None:
    found = real("bsdata")
    assert (sum(found.images.values()), found.images["test"], found.instances) == (145, 70, {"Pitting": 181})
    assert found.tasks == ("semseg", "detect", "instseg") and found.groups["test"] == 30
    assert any("leaks: 13 of 42 groups" in note for note in found.notes)
    assert "image_data.json lists 394 annotated images; 249 of them are not here" in found.notes


# ---- DeepPCB ---------------------------------------------------------------------------------------------------------

BOXES = "1 2 5 6 1\n3,4,9,10,6\n\n"


def deeppcb_set(root: Path, boxes: str = BOXES) -> Path:
    """Four boards of one tile each, and an image that is named and not here."""
    lines = []
    for i in range(4):
        picture(root / f"PCBData/group{i}/{i}/{i}000_test.jpg", seed=i)
        text(root / f"PCBData/group{i}/{i}_not/{i}000.txt", boxes if not i else BOXES)
        lines.append(f"group{i}/{i}/{i}000.jpg group{i}/{i}_not/{i}000.txt")
    gone = "group9/9/9000.jpg group9/9_not/9000.txt"
    text(root / "PCBData/trainval.txt", "\n".join([*lines[:3], gone]))
    text(root / "PCBData/test.txt", lines[3])
    return root


@pytest.mark.parametrize("inside", ["", "PCBData"])
def test_deeppcb_lists(tmp_path: Path, inside: str) -> None:
    data = read_data("set", deeppcb_set(tmp_path) / inside)
    assert data.tasks == ("detect",) and data.classes[1:] == tuple("open short mousebite spur copper pin-hole".split())
    assert [s.group for s in data.samples] == [f"group{i}" for i in range(4)]
    assert [s.split for s in data.samples].count("test") == 1 and data.samples[3].split == "test"
    found = objects_of(data, "group0/0/0000_test.jpg")
    assert [(i.category, i.box_xyxy) for i in found] == [(1, (1, 2, 5, 6)), (6, (3, 4, 9, 10))]
    assert "the lists name 5 images; 1 of them are not here: group9/9/9000.jpg" in data.notes


@pytest.mark.parametrize(
    ("boxes", "said"),
    [
        ("1 2 5 6", "entry 1: wanted 5 values"),
        ("1 2 5 6 7", "a type of 1 to 6"),
        ("1 2 5 6 0", "a type of 1 to 6"),
        ("1 2 5 x 1", "wanted numbers"),
        ("5 2 1 6 1", "the box is empty or leaves the image"),
        ("1 2 50 6 1", "the box is empty or leaves the image"),
        ("1 2 nan 6 1", "finite numbers"),
    ],
)
def test_a_bad_deeppcb_box_is_named(tmp_path: Path, boxes: str, said: str) -> None:
    found = refused(deeppcb_set(tmp_path, boxes))
    assert said in found and "0000.txt, entry 1" in found


def test_a_bad_deeppcb_list_is_named(tmp_path: Path) -> None:
    path = deeppcb_set(tmp_path) / "PCBData" / "trainval.txt"
    whole = path.read_bytes()
    for value, said in [
        (whole[:-30], "wanted 2 values"),
        (whole.replace(b"group1/1/1000.jpg", b"../../../1000.jpg"), "not below the data folder"),
        (whole.replace(b"group1/1_not/1000.txt", b"/etc/hosts"), "not below the data folder"),
        (whole.replace(b"group1/1/", b"group0/0/").replace(b"1000.jpg", b"0000.jpg"), "lists the image"),
        (whole.replace(b"group9", b"gro\xfcp9"), "wanted: UTF-8"),
        (b"a.jpg a.txt\n", "none"),
    ]:
        path.write_bytes(value)
        if said != "none":
            assert said in refused(tmp_path)
    path.write_bytes(whole)
    (tmp_path / "PCBData/group0/0_not/0000.txt").unlink()
    assert "0000.txt can't be read" in refused(tmp_path)


def test_the_real_deeppcb() -> None:
    found = real("deeppcb")
    assert found.images["test"] == 500 and sum(found.images.values()) == 1050
    assert found.instances is not None and sum(found.instances.values()) == 7151
    assert any(note.startswith("the lists name 1500 images; 450 of them are not here") for note in found.notes)


# ---- magnetic tile ---------------------------------------------------------------------------------------------------


def tile_set(root: Path) -> Path:
    """Frames 100 and 350 are one tile, 3000 looks like 9000."""
    frames = {"Crack": [100, 3000], "Free": [350, 9000], "Uneven": [20000, 40000]}
    for kind, own in frames.items():
        for frame in own:
            path = root / f"MT_{kind}" / "Imgs" / f"exp1_num_{frame}.jpg"
            picture(path, seed=3000 if frame == 9000 else frame)
            mask(path.with_suffix(".png"), square(2, 3, 5) * 255 + square(0, 0, 2) * 100)
    return root


def test_magnetic_tiles(tmp_path: Path) -> None:
    data = read_data("set", tile_set(tmp_path))
    assert data.classes == ("background", "crack", "uneven") and data.tasks == ("semseg",)
    groups = {s.image.stem.removeprefix("exp1_num_"): s.group for s in data.samples}
    assert groups == {
        "100": "tile-100", "350": "tile-100", "3000": "tile-3000", "9000": "tile-3000", "20000": "tile-20000",
        "40000": "tile-40000",
    }  # fmt: skip
    assert np.array_equal(target_of(data, "MT_Crack/Imgs/exp1_num_100.jpg").semantic, square(2, 3, 5))
    assert np.array_equal(target_of(data, "MT_Uneven/Imgs/exp1_num_20000.jpg").semantic, square(2, 3, 5) * 2)
    assert not np.any(target_of(data, "MT_Free/Imgs/exp1_num_350.jpg").semantic)


def test_a_bad_magnetic_tile_is_named(tmp_path: Path) -> None:
    path = tile_set(tmp_path) / "MT_Crack" / "Imgs" / "exp1_num_100.png"
    whole = path.read_bytes()
    for value, said in [
        (whole[:-30], "can't be read as a mask"),
        (b"no mask", "can't be read as a mask"),
    ]:
        path.write_bytes(value)
        assert said in refused(tmp_path) and path.name in refused(tmp_path)
    mask(path, np.zeros((HEIGHT, WIDTH + 1)))
    assert "found   12x17" in refused(tmp_path)
    path.unlink()
    assert "There is no mask" in refused(tmp_path)
    path.symlink_to("/etc/hosts")
    assert "link out of the data folder" in refused(tmp_path)
    path.unlink()
    path.symlink_to(path.name)
    assert "links to itself" in refused(tmp_path)
    path.with_suffix(".jpg").write_bytes(b"no image")
    assert "is not an image" in refused(tmp_path)


def test_the_real_magnetic_tiles() -> None:
    found = real("mt_defect")
    assert sum(found.images.values()) == 710 and sum(found.groups.values()) == 168
    assert found.classes == ("background", "blowhole", "break", "crack", "fray", "uneven")


# ---- coloured masks --------------------------------------------------------------------------------------------------

RED, BLUE = (255, 0, 0), (0, 0, 255)


def colour_set(root: Path, images: str = "images", masks: str = "masks", classes: str = "") -> Path:
    """Four images with red squares on blue."""
    for i in range(4):
        picture(root / images / f"p{i}.png", seed=i)
        mask(root / masks / f"p{i}.png", np.where(square(2, 3, 5)[..., None], RED, BLUE))
    if classes:
        text(root / "classes.txt", classes)
    return root


def test_colours_without_names_are_classes_and_are_told(tmp_path: Path) -> None:
    data = read_data("set", colour_set(tmp_path))
    assert data.classes == ("#0000ff", "#ff0000") and data.tasks == ("semseg",)
    assert np.array_equal(target_of(data, "images/p0.png").semantic, square(2, 3, 5))
    assert any("#0000ff, #ff0000 are the classes, and #0000ff counts as background" in note for note in data.notes)


@pytest.mark.parametrize(
    ("images", "masks"), [("Train_images", "Train_masks"), ("x/Train_images", "x/Train_masks"), ("a/images", "a/masks")]
)
def test_colours_named_in_classes_txt(tmp_path: Path, images: str, masks: str) -> None:
    data = read_data("set", colour_set(tmp_path, images, masks, "255,0,0 rock\n0,0,255 open pore\n1,1,1 ignore\n"))
    assert data.classes == ("rock", "open pore")
    assert np.array_equal(target_of(data, f"{images}/p0.png").semantic, ~square(2, 3, 5))


def test_colours_left_out_are_ignored(tmp_path: Path) -> None:
    data = read_data("set", colour_set(tmp_path, classes="0,0,255 rock\n1,1,1 pore\n255,0,0 ignore\n"))
    assert np.array_equal(target_of(data, "images/p0.png").semantic, square(2, 3, 5) * np.uint8(255))


@pytest.mark.parametrize("places", ["{}/{}", "{}_{}"])
@pytest.mark.parametrize("folders", [("train", "val", "test"), ("training", "Validation", "testing")])
def test_folders_of_several_splits_are_the_splits(tmp_path: Path, folders: tuple[str, ...], places: str) -> None:
    for folder in folders:
        colour_set(tmp_path, places.format(folder, "images"), places.format(folder, "masks"))
    assert Counter(s.split for s in read_data("set", tmp_path).samples) == dict.fromkeys(SPLITS, 4)


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        ("0,0,255 rock\n0,255,0 pore\n", "colours that belong to no class"),
        ("0,0,255 rock\n", "names 1 class ("),
        ("0,0,255 rock\n255,0,0 rock\n", "each once"),
        ("0,0,255 rock\n0,0,255 pore\n", "names the colour 0,0,255 again"),
        ("0,0,256 rock\n", "line 1: wanted R,G,B"),
        ("0,0 rock\n", "line 1: wanted R,G,B"),
        ("rock\npore\n", "line 1: wanted numbers"),
        ("0,0,255\n", "line 1: wanted R,G,B"),
    ],
)
def test_a_bad_list_of_colours_is_refused(tmp_path: Path, classes: str, said: str) -> None:
    assert said in refused(colour_set(tmp_path, classes=classes))


def test_a_bad_coloured_mask_is_named(tmp_path: Path) -> None:
    path = colour_set(tmp_path) / "masks" / "p1.png"
    path.write_bytes(path.read_bytes()[:-30])
    assert "p1.png can't be read as a mask" in refused(tmp_path)
    mask(path, np.zeros(SIZE))
    assert "p1.png is a mask of the pixel format L. wanted: RGB colours" in refused(tmp_path)
    mask(path, np.zeros((HEIGHT, WIDTH + 1, 3)))
    assert "found   12x17" in refused(tmp_path)
    path.unlink()
    assert "There is no mask" in refused(tmp_path)
    path.symlink_to("/etc/hosts.png")
    assert "link out of the data folder" in refused(tmp_path)
    path.unlink()
    mask(path, np.random.default_rng(0).integers(0, 256, (*SIZE, 3)))
    mask(path.with_name("p2.png"), np.random.default_rng(1).integers(0, 256, (*SIZE, 3)))
    assert "Smoothed or JPEG-compressed" in refused(tmp_path)


def test_the_real_sandstone() -> None:
    found = real("sandstone_xrm")
    assert sum(found.images.values()) == sum(found.groups.values()) == 9
    assert found.classes == ("#0000ff", "#00ff00", "#ff0000", "#ffff00")
    assert found.pixels is not None and found.pixels["#00ff00"] == pytest.approx(0.0402, abs=1e-4)


# ---- Pascal VOC, NEU-DET ---------------------------------------------------------------------------------------------


def xml(boxes: list[tuple[str, tuple[Any, ...]]], difficult: int = 0, size: tuple[int, int] = SIZE) -> str:
    objects = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{b[0]}</xmin><ymin>{b[1]}</ymin>"
        f"<xmax>{b[2]}</xmax><ymax>{b[3]}</ymax></bndbox></object>"
        for name, b in boxes
    )
    stated = f"<size><width>{size[1]}</width><height>{size[0]}</height><depth>1</depth></size>"
    return f"<annotation><filename>/etc/hosts</filename>{stated}{objects}</annotation>"


PORE = ("pore", (4, 3, 8, 7))


def voc_set(root: Path, first: str = "", annotations: str = "Annotations", images: str = "JPEGImages") -> Path:
    for i in range(4):
        picture(root / images / f"p{i}.jpg", seed=i)
        text(root / annotations / f"p{i}.xml", first if first and not i else xml([PORE]))
    return root


@pytest.mark.parametrize(
    ("annotations", "images"),
    [("Annotations", "JPEGImages"), ("ANNOTATIONS", "IMAGES"), ("annotations", "images/pore"),
     ("VOCdevkit/VOC2007/Annotations", "VOCdevkit/VOC2007/JPEGImages")],
)  # fmt: skip
def test_voc_boxes_count_from_1(tmp_path: Path, annotations: str, images: str) -> None:
    first = xml([PORE, ("crack", (1, 1, WIDTH, HEIGHT))])
    data = read_data("set", voc_set(tmp_path, first, annotations, images))
    assert data.classes == ("background", "crack", "pore") and data.tasks == ("detect",)
    found = objects_of(data, f"{images}/p0.jpg")
    assert [(i.category, i.box_xyxy) for i in found] == [(2, (3, 2, 8, 7)), (1, (0, 0, WIDTH, HEIGHT))]


def test_voc_difficult_objects_are_crowds(tmp_path: Path) -> None:
    data = read_data("set", voc_set(tmp_path, xml([PORE], difficult=1)))
    assert [i.crowd for i in objects_of(data, "JPEGImages/p0.jpg")] == [True]


def test_voc_lists_name_the_splits_and_leave_images_out(tmp_path: Path) -> None:
    voc_set(tmp_path)
    for i, split in enumerate(SPLITS):
        text(tmp_path / "ImageSets" / "Main" / f"{split}.txt", f"p{i} 1\n")
    data = read_data("set", tmp_path)
    assert [(s.image.stem, s.split) for s in data.samples] == [("p0", "train"), ("p1", "val"), ("p2", "test")]
    assert "1 XML files are in no list of ImageSets/Main and are left out: p3" in data.notes
    text(tmp_path / "ImageSets" / "Main" / "val.txt", "p1\ngone\n")
    assert "1 names of ImageSets/Main have no XML file: gone" in read_data("set", tmp_path).notes
    text(tmp_path / "ImageSets" / "Main" / "val.txt", "p0\n")
    assert "val.txt lists p0, which train.txt lists too" in refused(tmp_path)


@pytest.mark.parametrize("splits", [("train", "validation"), ("Training", "testing")])
def test_neu_det_as_it_is_passed_on(tmp_path: Path, splits: tuple[str, str]) -> None:
    """train/ and validation/, images in a folder a class, XML files in one."""
    for split in splits:
        for kind in ("crazing", "patches"):
            for i in range(3):
                picture(tmp_path / split / "images" / kind / f"{kind}_{i}.jpg", seed=i)
                text(tmp_path / split / "annotations" / f"{kind}_{i}.xml", xml([(kind, (1, 1, 5, 5))]))
    data = read_data("set", tmp_path)
    assert data.classes == ("background", "crazing", "patches") and len(data.samples) == 12
    assert Counter(s.split for s in data.samples)["test"] == 6
    assert objects_of(data, f"{splits[0]}/images/patches/patches_1.jpg")[0].category == 2


@pytest.mark.parametrize(
    ("first", "said"),
    [
        (xml([PORE])[:-9], "can't be read as XML"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>', "It was not read"),
        (xml([("pore", (4, 3, 4000, 7))]), "the box is empty or leaves the image"),
        (xml([("pore", (9, 3, 4, 7))]), "the box is empty or leaves the image"),
        (xml([("pore", ("x", 3, 4, 7))]), "wanted numbers"),
        (xml([("pore", ("inf", 3, 4, 7))]), "finite numbers"),
        (xml([("", (1, 3, 4, 7))]), "wanted: a name and a bndbox"),
        (xml([PORE]).replace("xmin", "left"), "wanted: xmin"),
        (xml([PORE], size=(9, 9)), "found   9x9"),
    ],
)
def test_a_bad_xml_file_is_named(tmp_path: Path, first: str, said: str) -> None:
    found = refused(voc_set(tmp_path, first))
    assert said in found and "p0.xml" in found


def test_a_bad_voc_folder_is_named(tmp_path: Path) -> None:
    voc_set(tmp_path)
    path = tmp_path / "Annotations" / "p0.xml"
    path.write_bytes(xml([("pöre", (1, 1, 5, 5))]).encode("utf-16"))
    assert "wanted: UTF-8" in refused(tmp_path)
    text(path, xml([PORE]))
    text(tmp_path / "classes.txt", "background\ncrack\n")
    assert "does not name pore" in refused(tmp_path)
    (tmp_path / "classes.txt").unlink()
    picture(tmp_path / "JPEGImages" / "again" / "p0.jpg")
    assert "have the same name" in refused(tmp_path)
    (tmp_path / "JPEGImages" / "again" / "p0.jpg").unlink()
    (tmp_path / "JPEGImages" / "p0.jpg").unlink()
    assert "p0.jpg can't be read" in refused(tmp_path)
    path.unlink()
    path.symlink_to("/etc/hosts.xml")
    assert "link out of the data folder" in refused(tmp_path)


def segmentation_set(root: Path) -> Path:
    """Four images; two objects of class 1 that touch, one of class 2."""
    classes = square(0, 0, 4) * 1 + square(6, 8, 3) * 2 + square(9, 0, 3) * 255
    numbers = square(0, 0, 4) * 1 + square(6, 8, 3) * 3 + square(9, 0, 3) * 255
    numbers[:4, 2:4] = 2
    for i in range(4):
        picture(root / "JPEGImages" / f"p{i}.jpg", seed=i)
        mask(root / "SegmentationClass" / f"p{i}.png", classes)
        mask(root / "SegmentationObject" / f"p{i}.png", numbers)
    return root


def test_voc_segmentation_pairs(tmp_path: Path) -> None:
    data = read_data("set", segmentation_set(tmp_path))
    assert data.tasks == ("semseg", "detect", "instseg") and data.classes[:3] == ("background", "aeroplane", "bicycle")
    found = target_of(data, "JPEGImages/p0.jpg")
    assert found.semantic is not None and sorted(np.unique(found.semantic)) == [0, 1, 2, 255]
    assert [(i.category, i.box_xyxy) for i in found.instances or ()] == [
        (1, (0, 0, 2, 4)), (1, (2, 0, 4, 4)), (2, (8, 6, 11, 9))
    ]  # fmt: skip
    assert any(note.startswith("classes have the names of VOC's twenty") for note in data.notes)
    (tmp_path / "SegmentationObject" / "p3.png").unlink()
    text(tmp_path / "classes.txt", "background\npore\ncrack\n")
    data = read_data("set", tmp_path)
    assert not any("VOC" in note for note in data.notes)
    assert data.tasks == ("semseg",) and data.classes == ("background", "pore", "crack")


def test_a_bad_segmentation_pair_is_named(tmp_path: Path) -> None:
    numbers = segmentation_set(tmp_path) / "SegmentationObject" / "p0.png"
    whole = numbers.read_bytes()
    mask(numbers, np.ones(SIZE))
    assert "p0.png: object 1 covers the classes [0, 1, 2]" in refused(tmp_path)
    numbers.write_bytes(whole)
    classes = tmp_path / "SegmentationClass" / "p0.png"
    mask(classes, np.zeros((*SIZE, 3)))
    assert "pixel format RGB" in refused(tmp_path)
    mask(classes, np.full(SIZE, 77))
    assert "beyond the classes" in refused(tmp_path)
    mask(classes, np.zeros((HEIGHT, WIDTH + 1)))
    assert "found   12x17" in refused(tmp_path)


# ---- YOLO ------------------------------------------------------------------------------------------------------------

YAML = "path: ../datasets/parts\ntrain: images/train\nval: images/val\ntest: images/test\nnc: 2\nnames: [pore, crack]\n"
BOX, POLYGON = "1 0.5 0.5 0.25 0.5\n", "0 0.25 0.25 0.75 0.25 0.75 0.75 0.25 0.75\n"


def yolo_set(root: Path, first: str = BOX, rest: str = BOX, data: str = YAML) -> Path:
    text(root / "data.yaml", data)
    for split in SPLITS:
        for i in range(2):
            picture(root / "images" / split / f"p{i}.png", seed=i)
            text(root / "labels" / split / f"p{i}.txt", rest if i or split != "train" else first)
    return root


def test_yolo_boxes(tmp_path: Path) -> None:
    data = read_data("set", yolo_set(tmp_path, BOX + POLYGON))
    assert data.tasks == ("detect",) and data.classes == ("background", "pore", "crack")
    assert Counter(s.split for s in data.samples) == dict.fromkeys(SPLITS, 2)
    found = objects_of(data, "images/train/p0.png")
    assert [(i.category, i.box_xyxy) for i in found] == [(2, (6, 3, 10, 9)), (1, (4, 3, 12, 9))]
    assert target_of(data, "images/train/p0.png").semantic is None


def test_yolo_polygons_and_images_without_labels(tmp_path: Path) -> None:
    yolo_set(tmp_path, POLYGON, POLYGON)
    (tmp_path / "labels" / "val" / "p0.txt").unlink()
    data = read_data("set", tmp_path)
    assert data.tasks == ("semseg", "detect", "instseg")
    wanted = np.zeros(SIZE)
    wanted[3:9, 4:12] = 1
    assert np.array_equal(target_of(data, "images/train/p0.png").semantic, wanted)
    assert objects_of(data, "images/val/p0.png") == ()
    assert "1 image has no label file and counts as free of objects: images/val/p0.png" in data.notes


@pytest.mark.parametrize(
    "data",
    [
        "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnames: {0: pore, 1: crack}\n",
        "train: [train/images]\nval: valid.txt\ntest: test/images/\nnames:\n- pore\n- crack\n",
    ],
)
def test_yolo_splits_may_be_folders_lists_or_several(tmp_path: Path, data: str) -> None:
    for split in ("train", "valid", "test"):
        picture(tmp_path / split / "images" / "p0.png")
        text(tmp_path / split / "labels" / "p0.txt", BOX)
    text(tmp_path / "valid.txt", "./valid/images/p0.png\n")
    text(tmp_path / "data.yaml", data)
    found = read_data("set", tmp_path)
    assert {(s.id, s.split) for s in found.samples} == {
        ("train/images/p0.png", "train"), ("valid/images/p0.png", "val"), ("test/images/p0.png", "test")
    }  # fmt: skip
    assert objects_of(found, "valid/images/p0.png")[0].category == 2


def test_yolo_paths_begin_at_a_folder_that_is_named(tmp_path: Path) -> None:
    yolo_set(tmp_path / "parts")
    text(tmp_path / "data.yaml", YAML.replace("../datasets/parts", "parts"))
    assert "parts/images/train/p0.png" in {s.id for s in read_data("set", tmp_path).samples}


def test_yolo_images_in_two_splits_are_told_as_a_leak(tmp_path: Path) -> None:
    data = read_data("set", yolo_set(tmp_path, data=YAML.replace("images/val", "images/train")))
    assert any("leaks: 2 of 4 groups" in note for note in data.notes)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("1 0.5 0.5 0.25", "wanted a class and 4 numbers"),
        ("1 0.5 0.5 0.25 0.5 0.9", "wanted a class and 4 numbers"),
        ("2 0.5 0.5 0.25 0.5", "a class of 0 to 1"),
        ("-1 0.5 0.5 0.25 0.5", "a class of 0 to 1"),
        ("0.5 0.5 0.5 0.25 0.5", "a class of 0 to 1"),
        ("1 0.5 0.5 0 0.5", "the box is empty or leaves the image"),
        ("1 50 50 25 50", "the box is empty or leaves the image"),
        ("1 x 0.5 0.25 0.5", "wanted numbers"),
        ("1 nan 0.5 0.25 0.5", "finite numbers"),
        ("0 0 0 9 0 9 9", "leaves the image"),
    ],
)
def test_a_bad_yolo_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    found = refused(yolo_set(tmp_path, BOX + line))
    assert said in found and "p0.txt, line 2" in found


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(f'*{a}' for _ in range(10))}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (YAML.replace("[pore, crack]", "[pore"), "can't be read as YAML"),
        (YAML.replace("[pore, crack]", "{1: pore, 2: crack}"), "wanted names as a list"),
        (YAML.replace("[pore, crack]", "!!python/object/apply:os.getcwd []"), "can't be read as YAML"),
        (YAML.replace("nc: 2", "nc: 3"), "nc is 3, but it lists 2 names"),
        (BOMB + YAML.replace("[pore, crack]", "*j"), "wanted names as a list"),
        (BOMB + YAML.replace("images/train", "*j"), "wanted train as a path"),
        (YAML.replace("[pore, crack]", "\n  0: pore\n  ? 0x" + "f" * 9999 + "\n  : crack"), "wanted names as a list"),
        (YAML.replace("images/train", "/etc"), "not below the data folder"),
        (YAML.replace("images/train", "../../etc"), "not below the data folder"),
        (YAML.replace("images/train", "images/nowhere"), "there is no"),
        (YAML.replace("images/train", "list.txt"), "not below the data folder"),
    ],
)
def test_a_bad_yaml_is_named(tmp_path: Path, data: str, said: str) -> None:
    text(tmp_path / "list.txt", "/etc/hosts.png\n")
    assert said in refused(yolo_set(tmp_path, data=data))


def test_a_yolo_set_without_labels_is_refused(tmp_path: Path) -> None:
    yolo_set(tmp_path)
    (tmp_path / "labels").rename(tmp_path / "annotated")
    assert "has no label files" in refused(tmp_path)
    (tmp_path / "labels").symlink_to("/etc")
    assert "link out of the data folder" in refused(tmp_path)


# ---- Severstal -------------------------------------------------------------------------------------------------------


def runs_of(drawn: NDArray[np.bool_]) -> str:
    """Run lengths, column by column, from pixel 1."""
    flat = [False, *drawn.flatten(order="F").tolist(), False]
    edges = [i for i in range(1, len(flat)) if flat[i] != flat[i - 1]]
    return " ".join(f"{a} {b - a}" for a, b in zip(edges[::2], edges[1::2], strict=True))


def severstal_set(root: Path, table: str) -> Path:
    for i in range(4):
        picture(root / "train_images" / f"p{i}.jpg", seed=i)
    text(root / "train.csv", table)
    return root


@pytest.mark.parametrize(
    "table",
    [
        "ImageId,ClassId,EncodedPixels\np0.jpg,1,{}\np0.jpg,3,{}\ngone.jpg,2,1 1\n",
        "ImageId_ClassId,EncodedPixels\np0.jpg_1,{}\np0.jpg_2,\np0.jpg_3,{}\np0.jpg_4,\np1.jpg_1,\ngone.jpg_1,1 1\n",
    ],
)
def test_severstal_in_both_its_forms(tmp_path: Path, table: str) -> None:
    large, small = square(0, 0, 8), square(2, 3, 4)
    data = read_data("set", severstal_set(tmp_path, table.format(runs_of(small), runs_of(large))))
    assert data.classes == ("background", "class 1", "class 2", "class 3", "class 4") and data.tasks == ("semseg",)
    assert np.array_equal(target_of(data, "p0.jpg").semantic, np.where(small, 1, large * 3))
    assert not np.any(target_of(data, "p1.jpg").semantic)
    assert "train.csv has defects of 1 images that are not here: gone.jpg" in data.notes


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("p0.jpg,1,1", "wanted pairs"),
        ("p0.jpg,1,1 x", "wanted pairs"),
        ("p0.jpg,1,1 -4", "wanted pairs"),
        ("p0.jpg,1,0 4", "do not fit the image"),
        ("p0.jpg,1,1 0", "do not fit the image"),
        (f"p0.jpg,1,{HEIGHT * WIDTH} 2", "do not fit the image"),
        ("p0.jpg,1,1 4 3 4", "do not fit the image"),
        ("p0.jpg,1,99999999999 1", "do not fit the image"),
        ("p0.jpg,0,1 4", "row 2 can't be read"),
        ("p0.jpg,x,1 4", "row 2 can't be read"),
        ("p0.jpg,1", "row 2 can't be read"),
        ("p0.jpg,1,1 4\np0.jpg,1,9 4", "row 3 has the class 1 of p0.jpg again"),
    ],
)
def test_a_bad_severstal_row_is_named(tmp_path: Path, row: str, said: str) -> None:
    assert said in refused(severstal_set(tmp_path, f"ImageId,ClassId,EncodedPixels\n{row}\n"))


# ---- GDXray ----------------------------------------------------------------------------------------------------------


def gdxray_set(root: Path, rows: str) -> Path:
    """Three series of two images with a ground truth, the first with these rows, and one without."""
    for number in range(1, 5):
        for i in (1, 2):
            picture(root / f"C000{number}" / f"C000{number}_000{i}.png", seed=i)
        if number < 4:
            text(root / f"C000{number}" / "ground_truth.txt", rows if number == 1 else "1 2 5 3 7\n")
    return root


@pytest.mark.parametrize("folder", ["", "Castings"])
def test_gdxray_series(tmp_path: Path, folder: str) -> None:
    rows = "   1.0000000e+00   2.0e+00   5.0e+00   3.0e+00   7.0e+00\n1 1 16 12 1\n9 1 2 1 2\n"
    gdxray_set(tmp_path / folder, rows)
    data = read_data("set", tmp_path)
    first = f"{folder}/C0001/C0001_0001.png".lstrip("/")
    assert [i.box_xyxy for i in objects_of(data, first)] == [(1, 2, 5, 7), (0, 0, WIDTH, HEIGHT)]
    assert objects_of(data, first.replace("_0001", "_0002")) == ()
    assert {s.group for s in data.samples} == {"C0001", "C0002", "C0003"} and len(data.samples) == 6
    for note in (
        "1 boxes had their sides in the wrong order and were corrected",
        "1 boxes belong to images that are not here",
        "1 series have no ground_truth.txt and are left out: C0004",
    ):
        assert note in data.notes


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("1 2 5 3", "wanted 5 values"),
        ("1 2 5 3 x", "wanted numbers"),
        ("0 2 5 3 7", "an image's number from 1 on"),
        ("1.5 2 5 3 7", "an image's number from 1 on"),
        ("1 2 500 3 7", "leaves the image"),
        ("1 nan 5 3 7", "finite numbers"),
    ],
)
def test_a_bad_row_of_gdxray_is_named(tmp_path: Path, rows: str, said: str) -> None:
    found = refused(gdxray_set(tmp_path, rows))
    assert said in found and "ground_truth.txt, entry 1" in found


# ---- KolektorSDD2, MVTec AD ------------------------------------------------------------------------------------------


def test_kolektorsdd2(tmp_path: Path) -> None:
    for split, count in (("train", 4), ("test", 2)):
        for i in range(count):
            path = picture(tmp_path / split / f"1000{i}.png", seed=i)
            mask(path.with_name(f"1000{i}_GT.png"), square(2, 3, 5) * 255)
    data = read_data("set", tmp_path)
    assert Counter(s.split for s in data.samples) == {"train": 3, "val": 1, "test": 2} and data.tasks == ("semseg",)
    assert np.array_equal(target_of(data, "train/10000.png").semantic, square(2, 3, 5))
    (tmp_path / "train" / "10000_GT.png").unlink()
    assert "There is no mask" in refused(tmp_path)


def mvtec_set(root: Path) -> Path:
    for i in range(4):
        picture(root / "train" / "good" / f"00{i}.png", seed=i)
        picture(root / "test" / "good" / f"00{i}.png", seed=i)
        for kind in ("cut", "dent"):
            picture(root / "test" / kind / f"00{i}.png", seed=i)
            mask(root / "ground_truth" / kind / f"00{i}_mask.png", square(2, 3, 5) * 255)
    return root


def test_mvtec_ad(tmp_path: Path) -> None:
    data = read_data("set", mvtec_set(tmp_path / "tile"))
    assert len(data.samples) == 16 and data.classes == ("background", "cut", "dent")
    assert np.array_equal(target_of(data, "test/dent/000.png").semantic, square(2, 3, 5) * 2)
    assert not np.any(target_of(data, "test/good/000.png").semantic)
    assert any("its own training split has no defects" in note for note in data.notes)
    assert "the folder of one\n  found   tile" in refused(tmp_path)
    (tmp_path / "tile" / "ground_truth" / "cut" / "000_mask.png").unlink()
    assert "There is no mask" in refused(tmp_path / "tile")


# ---- the sets of test_readers_inspection.py --------------------------------------------------------------------------


def coco_file(path: Path, names: list[str], categories: tuple[str, ...]) -> Path:
    """A COCO file of images with a square of the first category each."""
    images = [{"id": i, "file_name": name, "height": HEIGHT, "width": WIDTH} for i, name in enumerate(names, start=1)]
    each = {"category_id": 1, "bbox": [3, 2, 5, 5], "iscrowd": 0, "segmentation": [[3, 2, 8, 2, 8, 7, 3, 7]]}
    annotations = [{"id": image["id"], "image_id": image["id"], **each} for image in images]
    kinds = [{"id": k, "name": name} for k, name in enumerate(categories, start=1)]
    return text(path, json.dumps({"images": images, "annotations": annotations, "categories": kinds}))


def pidray_set(root: Path) -> Path:
    for folder, count in (("train", 5), ("easy", 1), ("hard", 2), ("hidden", 3)):
        stem, part = ("", "train") if folder == "train" else (folder, f"test_{folder}")
        names = [f"xray_{stem}{i:05d}.png" for i in range(count)]
        for i, name in enumerate(names):
            picture(root / folder / name, seed=i)
        coco_file(root / "annotations" / f"xray_{part}.json", names, ("Baton", "Pliers"))
    return root


def rareplanes_set(root: Path) -> Path:
    """Two tiles of each scene; the scene 1_A is in both splits."""
    for split, first, scenes in (("train", 0, ["1_A", "2_B", "3_C"]), ("test", 2, ["4_D", "1_A"])):
        names = [f"{scene}_tile_{first + i}.png" for scene in scenes for i in range(2)]
        for i, name in enumerate(names):
            picture(root / split / "PS-RGB_tiled" / name, seed=i)
        for label, kinds in (("role", ("Small Civil", "Military Fighter")), ("aircraft", ("aircraft",))):
            coco_file(root / "metadata_annotations" / f"instances_{split}_{label}.json", names, kinds)
    return root


def visa_set(root: Path) -> Path:
    """Two objects of five images each, three of them to train on, by few shots two; masks hold 1 or 3."""
    header = "object,split,label,image,mask\n"
    tables = {"1cls": header, "2cls_highshot": header, "2cls_fewshot": header}
    for thing in ("candle", "pcb1"):
        for i in range(5):
            kind = "Anomaly" if i % 2 else "Normal"
            image, drawn = f"{thing}/Data/Images/{kind}/{i:03d}.JPG", f"{thing}/Data/Masks/{kind}/{i:03d}.png"
            picture(root / image, seed=i)
            if i % 2:
                mask(root / drawn, square(2, 3, 5) * i)
            for name, count in (("2cls_highshot", 3), ("2cls_fewshot", 2)):
                split = "train" if i < count else "test"
                tables[name] += f"{thing},{split},{kind.lower()},{image},{drawn if i % 2 else ''}\n"
    for name, table in tables.items():
        text(root / "split_csv" / f"{name}.csv", table)
    return root


def commutator_set(root: Path) -> Path:
    for number in range(1, 4):
        for part in range(2):
            path = picture(root / f"kos0{number}" / f"Part{part}.jpg", seed=number + part)
            mask(path.with_name(f"Part{part}_label.bmp"), square(2, 3, 5) * 255 * part)
    return root


# ---- every format ----------------------------------------------------------------------------------------------------


def kolektor_set(root: Path) -> Path:
    for split in ("train", "test"):
        for i in range(3):
            mask(picture(root / split / f"{i}.png", seed=i).with_name(f"{i}_GT.png"), square(2, 3, 5) * 255)
    return root


def test_a_coco_set_stays_one_beside_coloured_pictures(tmp_path: Path) -> None:
    colour_set(tmp_path, "x_images", "x_masks")
    images = [{"id": i, "file_name": f"x_images/p{i}.png"} for i in range(4)]
    value = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "pore"}]}
    text(tmp_path / "all.json", json.dumps(value))
    assert read_data("set", tmp_path).classes == ("background", "pore")
    assert read_data("set", tmp_path, "colours").classes == ("#0000ff", "#ff0000")


def bsdata_folder(root: Path) -> Path:
    bsdata_set(root)
    return root


def folder_set(root: Path) -> Path:
    """Four images with class indices and ignored pixels."""
    for i in range(4):
        picture(root / "images" / f"p{i}.png", seed=i)
        mask(root / "masks" / f"p{i}.png", square(2, 3, 5) + square(9, 0, 3) * 255 + square(0, 12, 3) * 2)
    text(root / "classes.txt", "rock\npore\ncrack\n")
    return root


def coco_set(root: Path) -> Path:
    """Four images with a polygon, a box that is not its mask's, a crowd and a gap in the ids."""
    for i in range(4):
        picture(root / "images" / f"p{i}.png", seed=i)
    images = [{"id": 10 + i, "file_name": f"p{i}.png", "group": f"part{i}"} for i in range(4)]
    polygon = {"segmentation": [[3, 2, 8, 2, 8, 7, 3, 7]], "category_id": 7, "area": 24.5}
    crowd = {"segmentation": {"size": list(SIZE), "counts": [100, 12, 80]}, "category_id": 9, "iscrowd": 1}
    annotations = [
        {"id": 1, "image_id": 10, "bbox": [2.5, 1.7, 6.1, 5.9], **polygon},
        {"id": 2, "image_id": 10, **crowd},
        {"id": 3, "image_id": 12, **polygon},
    ]
    categories = [{"id": 9, "name": "crack"}, {"id": 7, "name": "pore"}]
    text(root / "all.json", json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return root


def pairs_set(root: Path) -> Path:
    """Images and masks in folders and of names that no other format has."""
    for i, split in enumerate(SPLITS * 2):
        picture(root / f"{split}_img" / f"p{i}.jpg", seed=i)
        mask(root / f"{split}_lab" / f"p{i}_gt.png", square(2, 3, 5) * 255)
    return root


def class_table(root: Path) -> Path:
    """The first three fifths end within the name of an image."""
    labels = ("ok", "ok", "ok", "dent", "dent", "dent")
    rows = "".join(f"a_long_name_of_a_folder/p{i}.png,{label}\n" for i, label in enumerate(labels))
    for i in range(len(labels)):
        picture(root / "a_long_name_of_a_folder" / f"p{i}.png", seed=i)
    text(root / "labels.csv", f"image,label\n{rows}")
    return root


def class_folders(root: Path) -> Path:
    for i in range(8):
        picture(root / ("good", "dent")[i % 2] / f"p{i}.png", seed=i)
    return root


MADE = {
    "folders": folder_set,
    "coco": coco_set,
    "colours": lambda root: colour_set(root, classes="0,0,255 rock\n255,0,0 pore\n"),
    "labelme": labelme_set,
    "labelme of BSData": bsdata_folder,
    "deeppcb": deeppcb_set,
    "magnetic-tile": tile_set,
    "voc": voc_set,
    "voc-segmentation": segmentation_set,
    "yolo": yolo_set,
    "severstal": lambda root: severstal_set(root, "ImageId,ClassId,EncodedPixels\np0.jpg,1,1 4 9 3\n"),
    "gdxray": lambda root: gdxray_set(root, "1 2 5 3 7\n"),
    "kolektorsdd2": kolektor_set,
    "mvtec-ad": mvtec_set,
    "pidray": pidray_set,
    "rareplanes": rareplanes_set,
    "visa": visa_set,
    "kolektorsdd": commutator_set,
    "pairs": pairs_set,
    "class-csv": class_table,
    "class-folders": class_folders,
}
