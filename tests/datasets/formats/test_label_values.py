"""Labels are read for what they say: values of another kind, slips of the pen, exceptions in a set, sets of labels."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_readers import (
    BOX,
    HEIGHT,
    POLYGON,
    PORE,
    RING,
    SIZE,
    SPLITS,
    WIDTH,
    YAML,
    coco_set,
    deeppcb_set,
    folder_set,
    gdxray_set,
    labelme_set,
    mask,
    objects_of,
    picture,
    refused,
    segmentation_set,
    severstal_set,
    shape,
    square,
    target_of,
    text,
    visa_set,
    voc_set,
    xml,
    yolo_set,
)

from featprobe.cli.main import cli
from featprobe.datasets import DataSet, read_data
from featprobe.datasets.formats.coco import same_id
from featprobe.datasets.samples import Sample
from featprobe.datasets.set_notes import unnamed_parts
from featprobe.datasets.splits import regroup
from featprobe.datasets.values import to_number, to_truth, to_whole
from featprobe.errors import DataError, FeatprobeError
from featprobe.stages.extraction.survey import survey
from featprobe.stages.study.study import read_study
from featprobe.stages.upkeep.describe import summarise
from featprobe.stages.workspace import Workspace

Edit = Callable[[dict[str, Any]], object]


def coco_with(root: Path, edit: Edit) -> Path:
    """The COCO set of test_readers after an edit of its value."""
    coco_set(root)
    value = json.loads((root / "all.json").read_text(encoding="utf-8"))
    edit(value)
    text(root / "all.json", json.dumps(value))
    return root


def first(value: dict[str, Any]) -> dict[str, Any]:
    """The first annotation, id 1, of a pore in p0.png."""
    found: dict[str, Any] = value["annotations"][0]
    return found


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli, ["--workspace", str(arguments[-1]), *map(str, arguments[:-1])])


# ---- values ----------------------------------------------------------------------------------------------------------


@given(number=st.integers(-(10**30), 10**30))
@settings(max_examples=100)
def test_a_whole_number_is_itself_however_it_is_written(number: int) -> None:
    for written in (number, str(number), f" {number} "):
        assert to_whole(written, "here", -(10**30)) == number
    assert same_id(str(number)) == same_id(number) == number or number < 0


anything = st.one_of(st.none(), st.booleans(), st.floats(), st.text(max_size=6), st.lists(st.integers(), max_size=2))


@given(value=anything)
@settings(max_examples=300)
def test_any_value_is_read_or_refused_with_its_place(value: Any) -> None:
    for read in (to_number, to_whole, to_truth):
        try:
            found = read(value, "all.json, image 3")
        except DataError as error:
            assert str(error).startswith("all.json, image 3: wanted ")
        else:
            assert isinstance(found, bool) == (read is to_truth) and (read is to_truth or not isinstance(value, bool))


@pytest.mark.parametrize("value", [True, "1_000", "", "0x10", "1:30", "١", "nan", "inf", None, [], "1,5"])
def test_what_is_no_number_is_none(value: Any) -> None:
    with pytest.raises(DataError, match="here: wanted a "):
        to_number(value, "here")


SAME: dict[str, Edit] = {
    "category ids as texts": lambda v: [a.update(category_id=str(a["category_id"])) for a in v["annotations"]],
    "listed ids as texts": lambda v: [c.update(id=str(c["id"])) for c in v["categories"]],
    "image ids as texts": lambda v: [i.update(id=str(i["id"])) for i in v["images"]],
    "ids as fractions": lambda v: [a.update(image_id=float(a["image_id"])) for a in v["annotations"]],
    "sizes as texts": lambda v: [i.update(height="12", width="16.0") for i in v["images"]],
    "sizes not known": lambda v: [i.update(height=0, width=None) for i in v["images"]],
    "boxes as texts": lambda v: first(v).update(bbox=["2.5", "1.7", "6.1", "5.9"]),
    "polygons as texts": lambda v: first(v).update(segmentation=[list("32828737")]),
    "areas as texts": lambda v: first(v).update(area="24.5"),
    "no crowd as a text": lambda v: first(v).update(iscrowd="0"),
    "no crowd as a word": lambda v: first(v).update(iscrowd="False"),
    "no crowd as null": lambda v: first(v).update(iscrowd=None),
    "a crowd as a text": lambda v: v["annotations"][1].update(iscrowd="1"),
    "a crowd as true": lambda v: v["annotations"][1].update(iscrowd=True),
    "a thing as a text": lambda v: v["categories"][0].update(isthing="1"),
    "no background as a text": lambda v: v["categories"][0].update(background="false"),
    "run lengths as texts": lambda v: v["annotations"][1]["segmentation"].update(size=["12", "16"]),
    "no group": lambda v: v["images"][0].update(group="part0 "),
}


@pytest.mark.parametrize("name", SAME)
def test_coco_values_of_another_kind_mean_what_they_plainly_say(tmp_path: Path, name: str) -> None:
    data, plain = read_data("set", coco_with(tmp_path / "a", SAME[name])), read_data("set", coco_set(tmp_path / "b"))
    for sample, other in zip(data.samples, plain.samples, strict=True):
        assert (sample.id, sample.group, sample.split) == (other.id, other.group, other.split)
        found, wanted = data.read_target(sample, SIZE), plain.read_target(other, SIZE)
        assert found.instances == wanted.instances and np.array_equal(found.semantic, wanted.semantic)
    assert data.classes == plain.classes and data.tasks == plain.tasks


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda v: v["images"][0].update(id=True), "images[0] can't be read"),
        (lambda v: v["images"][0].update(id=1.5), "images[0] can't be read"),
        (lambda v: v["images"][0].update(id=""), "images[0] can't be read"),
        (lambda v: v["images"][1].update(id="10"), "several images the same id"),
        (
            lambda v: v["images"][0].update(height="12 px"),
            "p0.png: what it states: wanted a whole number from 0 on, found",
        ),
        (lambda v: v["images"][0].update(height=True), "found True"),
        (lambda v: v["images"][0].update(height=12.5), "found 12.5"),
        (lambda v: v["images"][0].update(group=False), "p0.png, group: wanted a text or a whole number, found False"),
        (lambda v: v["images"][0].update(split=["train"]), "p0.png, split: wanted a text"),
        (lambda v: first(v).update(category_id="8"), "annotation 1: category '8' is not listed. Known: 7, 9"),
        (lambda v: first(v).update(category_id=True), "annotations[0] can't be read"),
        (lambda v: first(v).update(bbox=[1, 2, True, 4]), "annotation 1, bbox: wanted 4 numbers, found True"),
        (lambda v: first(v).update(area="1_000"), "annotation 1, area: wanted a number, found '1_000'"),
        (lambda v: first(v).update(iscrowd="perhaps"), "annotation 1, iscrowd: wanted 0 or 1, true or false"),
        (lambda v: first(v).update(iscrowd=2), "annotation 1, iscrowd: wanted 0 or 1"),
        (lambda v: first(v).update(isthing="x"), "annotation 1, isthing: wanted 0 or 1"),
        (lambda v: first(v).update(segmentation=False), "annotation 1 can't be read"),
        (lambda v: v["categories"][0].update(isthing="x"), "category 9, isthing: wanted 0 or 1"),
        (lambda v: v["categories"].append({"id": 9, "name": "dent"}), "lists the category 9 twice: crack, dent"),
    ],
)
def test_coco_values_that_mean_nothing_are_refused_with_their_place(tmp_path: Path, edit: Edit, said: str) -> None:
    found = refused(coco_with(tmp_path, edit))
    assert said in found and "all.json" in found


@pytest.mark.parametrize(
    ("word", "crowd"), [("0", False), ("1", True), ("true", True), ("False", False), ("", False), ("maybe", None)]
)
def test_voc_difficult_is_a_truth(tmp_path: Path, word: str, crowd: bool | None) -> None:
    voc_set(tmp_path, xml([PORE]).replace("<difficult>0<", f"<difficult>{word}<"))
    if crowd is None:
        assert "p0.xml, object 1, difficult: wanted 0 or 1" in refused(tmp_path)
    else:
        assert [i.crowd for i in objects_of(read_data("set", tmp_path), "JPEGImages/p0.jpg")] == [crowd]


def test_the_first_class_of_labelme_and_its_parts_are_read_for_what_they_say(tmp_path: Path) -> None:
    shapes = [shape("pore", RING, group_id=joined) for joined in ("", None, 1, "1", 1.0)]
    other = [[9, 8], [14, 8], [14, 11], [9, 11]]
    shapes += [shape("crack", other, group_id=0)]
    data = read_data("set", labelme_set(tmp_path, shapes, imageHeight="12", imageWidth=None))
    assert len(objects_of(data, "p0.png")) == 4, "two of no group, one of the group 1, one of the group 0"
    labelme_set(tmp_path, [shape("pore", RING, group_id=True)])
    assert "shapes[0], group_id: wanted a text or a whole number, found True" in refused(tmp_path)


def test_severstal_takes_classes_as_tables_write_them(tmp_path: Path) -> None:
    rows = ["ImageId,ClassId,EncodedPixels", "p0.jpg,1.0,1 4", "p1.jpg,,", " p2.jpg , 3 , 9 3 "]
    data = read_data("set", severstal_set(tmp_path, "\n".join(rows)))
    assert [int(target_of(data, f"p{i}.jpg").semantic.max()) for i in range(4)] == [1, 0, 3, 0]  # type: ignore[union-attr]
    severstal_set(tmp_path, "\n".join([rows[0], "p0.jpg,x,1 4", "p1.jpg,,1 4", "p2.jpg,1,9 3"]))
    said = refused(tmp_path)
    assert "row 2 can't be read" in said and "row 3 can't be read" in said and "row 4" not in said


# ---- YOLO ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        ("[no, yes, 010]", ["no", "yes", "010"]),
        ("[off, 1_000, 1:30]", ["off", "1_000", "1:30"]),
        ("[null, 1.0, 2024-01-01]", ["null", "1.0", "2024-01-01"]),
        ("{0: on, 1: ~, 2: 0x1f}", ["on", "~", "0x1f"]),
        ("{'0': 1, '1': 2, '2': 3}", ["1", "2", "3"]),
    ],
)
def test_yolo_names_are_the_texts_that_stand_there(tmp_path: Path, names: str, wanted: list[str]) -> None:
    yaml = YAML.replace("nc: 2", "nc: '3'").replace("[pore, crack]", names)
    assert list(read_data("set", yolo_set(tmp_path, data=yaml)).classes[1:]) == wanted


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (YAML + "kpt_shape: 3\n", "kpt_shape: wanted the number of points, and 2 or 3 numbers for each, found '3'"),
        (YAML + "kpt_shape: [3, 5]\n", "kpt_shape: wanted the number of points"),
        (YAML + "kpt_shape: [3, yes]\n", "kpt_shape: wanted a whole number from 1 on, found 'yes'"),
        (YAML + "kpt_shape: [3, 2]\n", "line 1: wanted a class, a box and 6 numbers of keypoints, found 9 words"),
        (YAML.replace("nc: 2", "nc: two"), "nc: wanted a whole number from 0 on, found 'two'"),
        (YAML.replace("nc: 2", "names: [a, b]"), "'names' is there twice"),
        (YAML.replace("[pore, crack]", "[pore, '']"), "wanted names as a list"),
        (YAML.replace("val:", "vall:"), "'vall' (did you mean 'val'?)"),
        (YAML.replace("names:", "name:"), "'name' (did you mean 'names'?)"),
        (YAML + "ktp_shape: [3, 2]\n", "'ktp_shape' (did you mean 'kpt_shape'?)"),
    ],
)
def test_a_yaml_that_says_something_else_is_refused(tmp_path: Path, data: str, said: str) -> None:
    found = refused(yolo_set(tmp_path, POLYGON, POLYGON, data))
    assert said in found and ("data.yaml" in found or "p0.txt" in found)


def test_yolo_keypoints_are_left_aside(tmp_path: Path) -> None:
    line = BOX.strip() + " 0.3 0.3 1 0.7 0.7 2\n"
    data = read_data("set", yolo_set(tmp_path, line + BOX.replace("0.25", "0.5"), line, YAML + "kpt_shape: [2, 3]\n"))
    assert data.tasks == ("detect",) and "keypoints (kpt_shape of data.yaml) are ignored" in data.notes[0]
    assert [i.box_xyxy for i in objects_of(data, "images/train/p0.png")] == [(6, 3, 10, 9), (4, 3, 12, 9)]


def test_yaml_words_for_nothing_name_no_split_and_other_keys_are_anybodys(tmp_path: Path) -> None:
    more = "download: null\nroboflow: {version: 3}\ndescription: a set\n"
    data = YAML.replace("val:", "validation:").replace("test: images/test", "test: ~") + more
    assert {s.split for s in read_data("set", yolo_set(tmp_path, data=data)).samples} == {"train", "val", "test"}


# ---- exceptions in a set ---------------------------------------------------------------------------------------------


def test_the_object_that_costs_a_set_its_masks_is_named(tmp_path: Path) -> None:
    data = read_data("set", coco_with(tmp_path / "coco", lambda v: v["annotations"][2].update(segmentation=[])))
    assert data.tasks == ("detect",)
    said = "no masks are read, only boxes: 1 of 3 objects without a segmentation (all.json, annotation 3)"
    assert said in data.notes
    polygons = read_data("set", yolo_set(tmp_path / "yolo", BOX + POLYGON))
    said = "no masks are read, only boxes: 1 of 7 objects as polygons (labels/train/p0.txt, line 2)"
    assert polygons.tasks == ("detect",) and said in polygons.notes
    boxes = read_data("set", yolo_set(tmp_path / "other", POLYGON + BOX, POLYGON)).notes
    assert any("6 of 7 objects as polygons (all but labels/train/p0.txt, line 2)" in note for note in boxes)
    shapes = [shape("crack", [[12, 9], [9, 5]], "rectangle")]
    drawn = read_data("set", labelme_set(tmp_path / "labelme", shapes)).notes
    assert "whole boxes are read as masks: 1 of 4 objects as rectangles (p0.json, shape 0)" in drawn
    (segmentation_set(tmp_path / "voc") / "SegmentationObject" / "p2.png").unlink()
    found = read_data("set", tmp_path / "voc")
    assert found.tasks == ("semseg",)
    assert "no objects are read: 1 of 4 images have no SegmentationObject: p2" in found.notes


def test_polygons_of_four_corners_may_be_rotated_boxes(tmp_path: Path) -> None:
    triangle = "0 0.25 0.25 0.75 0.25 0.75 0.75\n"
    assert any("(OBB)" in note for note in read_data("set", yolo_set(tmp_path / "a", POLYGON, POLYGON)).notes)
    assert not any("OBB" in n for n in read_data("set", yolo_set(tmp_path / "b", POLYGON + triangle, POLYGON)).notes)


@pytest.mark.parametrize(
    ("corners", "first_box", "said"),
    [
        ([(4, 3, 8, 7), (1, 1, 9, 9)], (3, 2, 8, 7), ""),
        ([(4, 3, 8, 7), (0, 2, 9, 9)], (4, 3, 8, 7), "count pixels from 0, and x2, y2 are where they end: 1 have"),
        ([(4, 3, 8, 7), (4.5, 2, 9, 9)], (4, 3, 8, 7), "a corner at 0 or between pixels (p0.xml, object 2)"),
        ([(4, 3, 8, 7), (0, 2, 9, 9), (1, 5, 9, 9)], (4, 3, 8, 7), "and 1 begin at 1 (p0.xml, object 3)"),
        (
            [(4, 3, 8, 7), (0, 2, 9, 9), (1, 5, 9, 9), (3, 1, 7, 7)],
            (3, 2, 8, 7),
            "from 1 and include their last; 1 have",
        ),
    ],
)
def test_voc_says_itself_what_it_counts_from(tmp_path: Path, corners: Any, first_box: Any, said: str) -> None:
    data = read_data("set", voc_set(tmp_path, xml([("pore", own) for own in corners])))
    assert objects_of(data, "JPEGImages/p0.jpg")[0].box_xyxy == first_box
    counting = [note for note in data.notes if "count pixels from" in note]
    assert (said in counting[0]) if said else not counting


def test_a_corner_at_0_of_gdxray_is_named(tmp_path: Path) -> None:
    notes = read_data("set", gdxray_set(tmp_path, "1 0 5 3 7\n")).notes
    assert any("with a corner at 0" in note and "C0001/ground_truth.txt, entry 1" in note for note in notes)


def test_one_mask_with_grey_edges_takes_no_class_from_the_others(tmp_path: Path) -> None:
    """It was resized, or saved as JPEG: that 255 is `ignore` in all others does not follow."""
    for i in range(4):
        for folder in ("images", "masks"):
            (tmp_path / folder).mkdir(exist_ok=True)
        mask = np.zeros((12, 12), np.uint8)
        mask[2:6, 2:6] = 255
        if i == 2:
            mask[1, 2:6] = 47
        Image.fromarray(mask).save(tmp_path / "masks" / f"p{i}.png")
        Image.fromarray(mask).save(tmp_path / "images" / f"p{i}.png")
    data = read_data("set", tmp_path)
    kept = [sample for sample in data.samples if sample.id != "p2.png"]
    assert [int((data.read_target(sample, (12, 12)).semantic == 1).sum()) for sample in kept] == [16] * 3
    (bad,) = [sample for sample in data.samples if sample.id == "p2.png"]
    with pytest.raises(DataError, match=r"p2\.png holds labels \[47\], beyond the classes"):
        data.read_target(bad, (12, 12))


def test_a_mask_of_an_object_says_itself_what_255_means(tmp_path: Path) -> None:
    for i in range(3):
        picture(tmp_path / "images" / f"p{i}.png", seed=i)
        mask(tmp_path / "masks" / f"p{i}_1.png", square(2, 3, 5) * (1 if i else 255))
    data = read_data("set", tmp_path)
    assert [objects_of(data, f"p{i}.png")[0].category for i in range(3)] == [1, 1, 1]


def test_a_mask_of_another_kind_than_a_formats_is_refused(tmp_path: Path) -> None:
    """The magnetic tiles' masks are 0 and 255 with smoothed edges: one of 0 and 1 would be empty."""
    for frame in (100, 3000, 9000):
        path = picture(tmp_path / "MT_Crack" / "Imgs" / f"exp1_num_{frame}.jpg", seed=frame)
        mask(path.with_suffix(".png"), square(2, 3, 5) * (1 if frame == 3000 else 255))
    assert "exp1_num_3000.png is a mask with levels up to 1" in refused(tmp_path)


# ---- labelmap.txt ----------------------------------------------------------------------------------------------------

LABELMAP = (
    "# label:color_rgb:parts:actions\npore:250,50,83::\nbackground:0,0,0::\nignored:224,224,192::\ncrack:1,2,3::\n"
)
COLOURS = {0: (0, 0, 0), 1: (250, 50, 83), 2: (1, 2, 3), 255: (224, 224, 192)}
LINES = {1: 0, 0: 1, 255: 2, 2: 3}  # class -> line


def cvat_set(root: Path, how: str, labelmap: str = LABELMAP) -> Any:
    """Class masks of a pore, a crack and an ignored square, and masks of their objects; returns the class indices."""
    classes = (square(0, 0, 4) * 1 + square(6, 8, 3) * 2).astype(np.uint8) + square(9, 0, 3) * np.uint8(255)
    numbers = square(0, 0, 4) * 1 + square(6, 8, 3) * 2
    lines = np.vectorize(LINES.get)(classes).astype(np.uint8)
    for i in range(3):
        picture(root / "JPEGImages" / f"p{i}.jpg", seed=i)
        place, other = (root / folder / f"p{i}.png" for folder in ("SegmentationClass", "SegmentationObject"))
        if how == "colours":
            mask(place, np.array([COLOURS[c] for c in classes.ravel()]).reshape(*SIZE, 3))
            mask(other, np.array([COLOURS[c] for c in numbers.ravel()]).reshape(*SIZE, 3))
            continue
        mask(other, numbers)
        mask(place, lines)
        if how == "palette":  # its indices are of another order than the lines
            drawn = Image.fromarray(classes).convert("P")
            palette = np.zeros((256, 3), np.uint8)
            for index, colour in COLOURS.items():
                palette[index] = colour
            drawn.putpalette(palette.ravel().tolist())
            drawn.save(place)
    text(root / "labelmap.txt", labelmap)
    return classes


@pytest.mark.parametrize("how", ["colours", "palette", "lines"])
def test_cvat_names_its_classes_and_their_colours(tmp_path: Path, how: str) -> None:
    wanted = cvat_set(tmp_path, how)
    data = read_data("set", tmp_path)
    assert data.classes == ("background", "pore", "crack") and data.tasks == ("semseg", "detect", "instseg")
    assert not any("twenty" in note for note in data.notes)
    found = target_of(data, "JPEGImages/p0.jpg")
    assert np.array_equal(found.semantic, wanted)
    assert [(i.category, i.box_xyxy) for i in found.instances or ()] in (
        [(1, (0, 0, 4, 4)), (2, (8, 6, 11, 9))],
        [(2, (8, 6, 11, 9)), (1, (0, 0, 4, 4))],
    )


@pytest.mark.parametrize("how", ["colours", "palette", "lines"])
@pytest.mark.parametrize("folders", [("images", "masks"), ("img", "annotation"), ("images", "SegmentationClass")])
def test_a_labelmap_names_classes_in_any_folders(tmp_path: Path, folders: tuple[str, str], how: str) -> None:
    wanted = cvat_set(tmp_path, how)
    for i in range(3):
        (tmp_path / "SegmentationObject" / f"p{i}.png").unlink()
    for old, new in zip(("JPEGImages", "SegmentationClass"), folders, strict=True):
        (tmp_path / old).rename(tmp_path / new)
    data = read_data("set", tmp_path)
    assert data.classes == ("background", "pore", "crack")
    assert all(np.array_equal(target_of(data, s.id).semantic, wanted) for s in data.samples)
    assert not any("are the classes, and" in note for note in data.notes)
    names = (
        ["0,0,0 ground", "250,50,83 hole", "1,2,3 rift", "224,224,192 ignore"] if how == "colours" else ["a", "b", "c"]
    )
    text(tmp_path / "classes.txt", "\n".join([*names, *(["d"] if how != "colours" else [])]))
    assert read_data("set", tmp_path).classes[1] in ("hole", "b")
    (tmp_path / "classes.txt").unlink()
    text(tmp_path / "labelmap.txt", "pore\n")
    assert "line 1: wanted name:R,G,B::, found 'pore'" in refused(tmp_path)


def test_a_labelmap_of_one_class_names_it_for_masks_of_0_and_255(tmp_path: Path) -> None:
    for i in range(3):
        picture(tmp_path / "images" / f"p{i}.png", seed=i)
        mask(tmp_path / "masks" / f"p{i}.png", square(2, 3, 5) * 255)
    lines = ["background:0,0,0::", "pore:250,50,83::"]
    for order in (lines, lines[::-1]):
        text(tmp_path / "labelmap.txt", "\n".join(order))
        data = read_data("set", tmp_path)
        assert data.classes == ("background", "pore")
        assert np.array_equal(target_of(data, "p0.png").semantic, square(2, 3, 5))
    text(tmp_path / "labelmap.txt", "\n".join([*lines, "crack:1,2,3::"]))
    assert "hold only 0 and 255, but 3 classes are named: background, pore, crack" in refused(tmp_path)


def test_names_of_the_user_stand_before_those_of_a_labelmap(tmp_path: Path) -> None:
    cvat_set(tmp_path, "colours")
    text(tmp_path / "classes.txt", "ground\nhole\nrift\n")
    assert read_data("set", tmp_path).classes == ("ground", "hole", "rift")
    text(tmp_path / "classes.txt", "ground\nhole\n")
    assert "names 3 classes with the background, and 2 are named" in refused(tmp_path)


@pytest.mark.parametrize(
    ("labelmap", "said"),
    [
        ("pore:250,50,83::\ncrack:1,2\nrift\n", "line 2: wanted name:R,G,B::"),
        ("pore:250,50,83::\ncrack:1,2\nrift\n", "line 3: wanted name:R,G,B::"),
        ("pore:250,50,300::\n", "wanted R,G,B of 0 to 255"),
        ("pore:a,b,c::\n", "line 1: wanted a whole number from 0 on, found 'a'"),
        ("pore:1,1,1::\npore:2,2,2::\n", "names pore twice"),
        ("pore:1,1,1::\ncrack:1,1,1::\n", "twice. wanted: each name and each colour once"),
        ("# nothing\n", "labelmap.txt names 1 class ("),
        (LABELMAP.replace("1,2,3", "3,2,1"), "found   #010203"),
    ],
)
def test_a_bad_labelmap_is_refused(tmp_path: Path, labelmap: str, said: str) -> None:
    cvat_set(tmp_path, "colours", labelmap)
    assert said in refused(tmp_path) and "labelmap.txt" in refused(tmp_path)


# ---- tables and slips of the pen -------------------------------------------------------------------------------------

HEADERS = [
    "image,split,group",
    "image, split, group",
    " Image ,SPLIT,Group",
    "\ufeffimage\tsplit\tgroup",
    "group;note;image;split",
    "sep=;\nimage;split;group",
]


@pytest.mark.parametrize("header", HEADERS)
def test_headers_are_known_in_any_case_and_with_blanks(tmp_path: Path, header: str) -> None:
    folder_set(tmp_path)
    mark, columns = next(m for m in ";\t," if m in header), header.rpartition("\n")[2]
    places = {"image": "p{i}.png", "split": "Train", "group": "part", "note": "x, y"}
    rows = [header]
    for i in range(4):
        cells = {**places, "split": ("Train", "training", "VALID", " test")[i], "group": f"part{i // 2}"}
        names = [name.strip("\ufeff ").lower() for name in columns.split(mark)]
        rows.append(f"{mark} ".join(cells[name].format(i=i) for name in names))
    text(tmp_path / "samples.csv", "\n".join([*rows, mark * 2, ""]))
    data = read_data("set", tmp_path)
    assert [(s.split, s.group) for s in data.samples] == [
        ("train", "part0"),
        ("train", "part0"),
        ("val", "part1"),
        ("test", "part1"),
    ]


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("image,spilt\np0.png,train\n", "'spilt', which looks like 'split'"),
        ("image,groups\np0.png,a\n", "'groups', which looks like 'group'"),
        ("imgae,splt\np0.png,a\n", "'imgae', which looks like 'image'; 'splt', which looks like 'split'"),
        ("image,split,Split\np0.png,train,test\n", "'split' twice"),
        ("image,group\np0.png,a,b\n", "row 2 has more cells than there are columns"),
        ("split,image\ntrain\n", "row 2 can't be read"),
        ("image,group\n,a\np0.png,a\np0.png,b\n", "image 3: p0.png is there twice"),
        ("image,group\n,a\np0.png,a\np0.png,b\n", "image 1: it has no name"),
    ],
)
def test_a_table_with_a_slip_is_refused(tmp_path: Path, table: str, said: str) -> None:
    text(folder_set(tmp_path) / "samples.csv", table)
    assert said in refused(tmp_path) and "samples.csv" in refused(tmp_path)


def test_other_columns_and_fields_are_anybodys(tmp_path: Path) -> None:
    rows = "".join(f"p{i}.png,a{i},7,x,y\n" for i in range(4))
    text(folder_set(tmp_path / "a") / "samples.csv", "image,group,camera,splits of the day,\n" + rows)
    assert read_data("set", tmp_path / "a").samples[0].group == "a0"
    more = {"license": 1, "coco_url": "x", "flickr_url": "", "date_captured": "", "video_id": 3}
    data = read_data("set", coco_with(tmp_path / "b", lambda v: v["images"][0].update(more)))
    assert data.notes == read_data("set", coco_set(tmp_path / "c")).notes


SLIPS: dict[str, tuple[Callable[[Path], object], str]] = {
    "coco, top": (
        lambda r: coco_with(r, lambda v: v.update(catagories=v.pop("categories"))),
        "'catagories' looks like",
    ),
    "coco, image": (
        lambda r: coco_with(r, lambda v: v["images"][2].update(spilt="train")),
        "images[2] has an unknown field that",
    ),
    "coco, annotation": (
        lambda r: coco_with(r, lambda v: first(v).update(is_crowd=1)),
        "'is_crowd' (did you mean 'iscrowd'?)",
    ),
    "coco, category": (
        lambda r: coco_with(r, lambda v: v["categories"][0].update(isThing=0)),
        "'isThing' (did you mean 'isthing'?)",
    ),
    "voc, box": (lambda r: voc_set(r, xml([PORE]).replace("bndbox", "bnbox")), "'bnbox' (did you mean 'bndbox'?)"),
    "voc, corner": (lambda r: voc_set(r, xml([PORE]).replace("xmin", "xMin")), "'xMin' (did you mean 'xmin'?)"),
    "voc, difficult": (lambda r: voc_set(r, xml([PORE]).replace("difficult", "dificult")), "'dificult' (did you mean"),
    "voc, size": (lambda r: voc_set(r, xml([PORE]).replace("height", "heigth")), "'heigth' (did you mean 'height'?)"),
    "labelme, shape": (
        lambda r: labelme_set(r, [{**shape("pore", RING), "points": None, "point": RING}]),
        "shapes[0] can't be read",
    ),
    "labelme, group": (
        lambda r: labelme_set(r, [{"label": "pore", "points": RING, "groupid": 3}]),
        "'groupid' (did you mean 'group_id'?)",
    ),
    "severstal": (
        lambda r: severstal_set(r, "ImageID,Class_Id,EncodedPixels\np0.jpg,1,1 4\n"),
        "'Class_Id', which looks like",
    ),
    "visa": (
        lambda r: text(visa_set(r) / "split_csv" / "2cls_highshot.csv", "object,splits,label,image,mask\n"),
        "'splits', which looks like 'split'",
    ),
}


@pytest.mark.parametrize("name", SLIPS)
def test_a_field_that_looks_like_a_known_one_is_refused_with_its_name(tmp_path: Path, name: str) -> None:
    make, said = SLIPS[name]
    make(tmp_path)
    assert said in refused(tmp_path, name.split(",")[0])


def test_a_slip_in_a_split_file_is_refused(tmp_path: Path) -> None:
    folder_set(tmp_path / "set")
    text(tmp_path / "mine.csv", "id,split,gruop\n" + "".join(f"p{i}.png,train,a\n" for i in range(4)))
    with pytest.raises(DataError, match="'gruop', which looks like 'group'"):
        read_data("set", tmp_path / "set", split_file=tmp_path / "mine.csv")


def test_all_that_is_wrong_in_a_configuration_is_said_at_once(tmp_path: Path) -> None:
    text(
        tmp_path / "featprobe.toml",
        "[data.x]\npath = ''\ntile = true\nspit_file = 'a.csv'\n[data.y]\npath = 'a'\nsize = '64'\nviews = 'sideways'\n"
        "[backbones.z]\nmodel = 'resnet18'\nrandom_init = 'true'\n",
    )
    with pytest.raises(FeatprobeError) as error:
        Workspace(tmp_path)
    said = str(error.value)
    for part in (
        'data.x.path: wanted a text that is not empty, found ""',
        "data.x.tile: wanted a whole number, found true",
        "data.x.spit_file: unknown. Did you mean split_file?",
        "data.y.size: '64' is not a size",
        "data.y.views: 'sideways' is not a list of views",
        'backbones.z.random_init: wanted true or false, found "true"',
    ):
        assert part in said, part


def test_a_study_takes_no_number_for_a_text_and_no_truth_for_a_number(tmp_path: Path) -> None:
    text(
        tmp_path / "study.toml",
        "data = ['']\nbackbones = ['resnet18']\nseeds = true\nfractions = [nan]\ntrain.all = {iterations = '400', "
        "batch_size = true, loss_at = 'pixel'}\ntrain.linear = 5\ntuning = {augment = 'no', accumulate = 1.5}\n",
    )
    with pytest.raises(DataError) as error:
        read_study(tmp_path / "study.toml", Workspace(tmp_path))
    said = str(error.value)
    for part in (
        'data[0]: wanted a text that is not empty, found ""',
        "seeds: wanted a whole number, found true",
        "fractions[0]: wanted a finite number, found NaN",
        "train.linear: wanted a table, found 5",
        'tuning.augment: wanted true or false, found "no"',
        "tuning.accumulate: wanted a whole number, found 1.5",
    ):
        assert part in said, part
    text(
        tmp_path / "study.toml",
        "data = ['xray']\nbackbones = ['resnet18']\n[train.all]\niterations = '400'\nbatch_size = true\nlr = 1\n"
        "loss_at = 'pixel'\n",
    )
    with pytest.raises(DataError) as error:
        read_study(tmp_path / "study.toml", Workspace(tmp_path))
    said = str(error.value)
    assert 'iterations: wanted a whole number or auto, found "400"' in said
    assert "batch_size: wanted a whole number, found true" in said
    assert 'loss_at: wanted level or image, found "pixel"' in said and "train.all.lr" not in said


# ---- objects ---------------------------------------------------------------------------------------------------------

EMPTY: dict[str, tuple[Callable[[Path], object], str]] = {
    "coco, a box": (
        lambda r: coco_with(r, lambda v: first(v).update(bbox=[3, 3, 0, 4])),
        "annotation 1: the box is empty",
    ),
    "coco, a mask": (
        lambda r: coco_with(r, lambda v: first(v).update(segmentation={"size": [*SIZE], "counts": [HEIGHT * WIDTH]})),
        "annotation 1: the mask is empty",
    ),
    "coco, a line": (
        lambda r: coco_with(r, lambda v: first(v).update(segmentation=[[2, 2, 8, 2, 5, 2]])),
        "annotation 1: the mask is",
    ),
    "coco, beyond the edge": (
        lambda r: coco_with(r, lambda v: first(v).update(bbox=[-1, 3, 0.5, 4])),
        "annotation 1: the box is empty",
    ),
    "voc": (lambda r: voc_set(r, xml([("pore", (5, 3, 4, 7))])), "object 1 (pore): the box is empty"),
    "yolo, a box": (lambda r: yolo_set(r, "1 0.5 0.5 0 0.5\n"), "line 1: the box is empty"),
    "yolo, a line": (
        lambda r: yolo_set(r, "0 0.2 0.2 0.8 0.2 0.5 0.2\n", POLYGON),
        "line 1: the polygon covers no pixel",
    ),
    "yolo, two points": (lambda r: yolo_set(r, "0 .2 .2 .8 .8 .2 .2\n", POLYGON), "found   2 distinct points"),
    "labelme, a line": (
        lambda r: labelme_set(r, [shape("pore", [[2, 2], [8, 2], [5, 2]])]),
        "the polygon covers no pixel",
    ),
    "labelme, a rectangle": (
        lambda r: labelme_set(r, [shape("pore", [[3, 3], [3, 9]], "rectangle")]),
        "the rectangle is empty",
    ),
    "deeppcb": (lambda r: deeppcb_set(r, "4 2 4 6 1\n"), "entry 1: the box is empty"),
    "folders": (
        lambda r: [
            mask(picture(r / f"images/p{i}.png", seed=i).parents[1] / f"masks/p{i}_1.png", square(2, 3, 5) * bool(i))
            for i in range(4)
        ],
        "p0_1.png is not the mask of one object",
    ),
}


@pytest.mark.parametrize("name", EMPTY)
def test_an_object_that_nothing_can_match_is_refused_in_every_format(tmp_path: Path, name: str) -> None:
    make, said = EMPTY[name]
    make(tmp_path / "set")
    assert said in refused(tmp_path / "set")
    found = run("data", "check", tmp_path / "set", "--quiet", "--json", tmp_path)
    assert found.exit_code == 3 and {"out_of_image", "bad_labels"} & {
        f["kind"] for f in json.loads(found.stdout)["findings"]
    }


TWICE: dict[str, tuple[Callable[[Path], object], str]] = {
    "coco": (lambda r: coco_with(r, lambda v: v["annotations"].append({**first(v), "id": 9})), "pore"),
    "voc": (lambda r: voc_set(r, xml([PORE, PORE])), "pore"),
    "yolo": (lambda r: yolo_set(r, BOX + POLYGON + BOX), "crack"),
    "yolo, polygons": (lambda r: yolo_set(r, POLYGON + POLYGON, POLYGON), "pore"),
    "labelme": (lambda r: labelme_set(r, [shape("pore", RING), shape("pore", RING)]), "pore"),
    "deeppcb": (lambda r: deeppcb_set(r, "1 2 5 6 1\n3 4 9 10 6\n1 2 5 6 1\n"), "open"),
    "gdxray": (lambda r: gdxray_set(r, "1 2 5 3 7\n1 2 5 3 7\n"), "defect"),
    "folders": (
        lambda r: [
            mask(picture(r / f"images/p{i}.png", seed=i).parents[1] / f"masks/p{i}_{k}.png", square(2, 3, 5))
            for i in range(4)
            for k in range(2 if not i else 1)
        ],
        "defect",
    ),
}


@pytest.mark.parametrize("name", TWICE)
def test_copies_of_an_object_are_found_in_every_format(tmp_path: Path, name: str) -> None:
    make, kind = TWICE[name]
    make(tmp_path / "set")
    found = run("data", "check", tmp_path / "set", "--quiet", "--json", tmp_path)
    (finding,) = (f for f in json.loads(found.stdout)["findings"] if f["kind"] == "object_copies")
    assert found.exit_code == 3 and finding["spoils"] and len(finding["entries"]) == 1
    data = read_data("set", tmp_path / "set")
    assert finding["entries"][0][1].startswith(f"{kind}, 2 times at x1, y1, x2, y2 = ")
    said = f"1 image holds an object more than once: {finding['entries'][0][0]} ({kind}, 2 times"
    assert any(said in note for note in summarise(data).notes)
    looked = survey(data, workers=1, skip_bad=False, quiet=True)
    assert [f.sample.id for f in looked.found if f.copies] == [finding["entries"][0][0]]


def test_crowds_and_objects_of_two_classes_are_no_copies(tmp_path: Path) -> None:
    labelme_set(tmp_path, [shape("__ignore__", RING), shape("pore", RING), shape("crack", RING)])
    assert not any("more than once" in note for note in summarise(read_data("set", tmp_path)).notes)


ALIKE: dict[str, Callable[[Path], object]] = {
    "coco": lambda r: coco_with(r, lambda v: v["categories"][0].update(name="Pore ")),
    "voc": lambda r: voc_set(r, xml([PORE, ("Pore", (2, 2, 9, 9))])),
    "yolo": lambda r: yolo_set(r, data=YAML.replace("crack", "PORE")),
    "labelme": lambda r: labelme_set(r, [shape("Pore", RING)]),
    "folders": lambda r: text(folder_set(r) / "classes.txt", "rock\npore\nPore\n"),
}


@pytest.mark.parametrize("name", ALIKE)
def test_classes_that_differ_in_blanks_or_case_are_told_in_every_format(tmp_path: Path, name: str) -> None:
    ALIKE[name](tmp_path)
    assert any("differ in blanks or case alone" in note for note in read_data("set", tmp_path).notes)


@pytest.mark.parametrize("used", [False, True])
def test_two_categories_of_one_name(tmp_path: Path, used: bool) -> None:
    def edit(value: dict[str, Any]) -> None:
        value["categories"].append({"id": 0, "name": "pore", "supercategory": "none"})
        value["annotations"][2].update(category_id=0 if used else 7)

    coco_with(tmp_path, edit)
    if used:
        assert "2 categories of the name 'pore' with annotations" in refused(tmp_path) and "7, 0" in refused(tmp_path)
    else:
        data = read_data("set", tmp_path)
        assert data.classes == ("background", "pore", "crack") and data.category_ids == (7, 9)
        assert any(note.startswith("the category 0 (pore) has another's name but no annotation") for note in data.notes)


FAULTY: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "coco": (
        lambda r: coco_with(r, lambda v: [a.update(bbox=[99, 1, 4, 4], area="x") for a in v["annotations"]]),
        ("annotation 1", "annotation 2"),
    ),
    "coco, entries": (lambda r: coco_with(r, lambda v: [i.pop("id") for i in v["images"]]), ("images[0]", "images[3]")),
    "voc": (lambda r: voc_set(r, xml([("pore", (9, 3, 4, 7)), ("pore", (99, 3, 4, 7))])), ("object 1", "object 2")),
    "voc, values": (
        lambda r: voc_set(r, xml([("pore", ("x", 3, 4, 7)), ("", (1, 3, 4, 7))])),
        ("object 1", "object 2"),
    ),
    "yolo": (lambda r: yolo_set(r, "7 .5 .5 .1 .1\n0 .5 .5 .1 x\n"), ("line 1", "line 2")),
    "labelme": (lambda r: labelme_set(r, [shape("", RING), shape("pore", RING, "line")]), ("shapes[0]", "shapes[1]")),
    "deeppcb": (lambda r: deeppcb_set(r, "4 2 4 6 1\n1 2 3 4 9\n"), ("entry 1", "entry 2")),
}


@pytest.mark.parametrize("name", FAULTY)
def test_all_faults_of_a_file_are_said_at_once(tmp_path: Path, name: str) -> None:
    make, said = FAULTY[name]
    make(tmp_path)
    found = refused(tmp_path)
    assert all(part in found for part in said), found


# ---- groups that names suggest ---------------------------------------------------------------------------------------


def named(*ids: str) -> DataSet:
    """A set of images of these ids, each its own group."""
    samples = tuple(Sample(own, Path(own), own) for own in ids)
    return DataSet("set", Path("set"), ("background", "pore"), samples, ("semseg",), lambda *_: None)  # type: ignore[arg-type,return-value]


PARTS = {
    "part and shot": ([f"part{i // 3}_{i}.png" for i in range(12)], 4),
    "series and number": ([f"images/train/C{i // 4:04d}-{i % 4}.tif" for i in range(16)], 4),
    "tiles of a scan": ([f"scan{k}_{y}_{x}.png" for k in range(4) for y in (0, 512) for x in (0, 512)], 4),
    "copies of Roboflow": ([f"p{i // 2}_jpg.rf.{i:032x}.jpg" for i in range(8)], 4),
    "folders of parts": ([f"part{i}/{view}.png" for i in range(5) for view in ("top", "side")], 5),
    "words before the number": ([f"cam_part{i}_{shot}.png" for i in range(4) for shot in range(3)], 4),
    "classes": ([f"{kind}_{i}.jpg" for kind in ("crazing", "patches", "scratches") for i in range(9)], 0),
    "folders of classes": ([f"{k}/img_{k * 9 + i}.jpg" for k in range(1, 5) for i in range(9)], 0),
    "running numbers": ([f"IMG_{i:04d}.png" for i in range(12)], 0),
    "plain numbers": ([f"{i:06d}.png" for i in range(12)], 0),
    "one part": ([f"part1_{i}.png" for i in range(12)], 0),
    "pairs of names": (["a.png", "b.png", "c.png"], 0),
    "mostly alone": ([f"part{i}_0.png" for i in range(12)] + ["part0_1.png"], 0),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_that_names_show_are_suggested_with_what_to_type(name: str) -> None:
    ids, parts = PARTS[name]
    notes = unnamed_parts(named(*ids))
    assert bool(notes) == bool(parts), notes
    if parts:
        assert f"names show {parts} parts" in notes[0]
        pattern = notes[0].partition("--group-from '")[2].partition("'")[0]
        grouped = regroup(named(*ids), pattern)
        assert len({s.group for s in grouped.samples}) == parts and not any("do not match" in n for n in grouped.notes)


def test_a_set_that_names_its_groups_is_asked_for_none(tmp_path: Path) -> None:
    for i in range(12):
        picture(tmp_path / "set" / "images" / f"part{i // 3}_{i}.png", seed=i)
        mask(tmp_path / "set" / "masks" / f"part{i // 3}_{i}.png", square(2, 3, 5))
    said = [note for note in read_data("set", tmp_path / "set").notes if "--group-from" in note]
    assert len(said) == 1
    pattern = said[0].partition("--group-from '")[2].partition("'")[0]
    found = run("data", "info", tmp_path / "set", "--group-from", pattern, "--json", tmp_path)
    assert sum(json.loads(found.stdout)["groups"].values()) == 4 and "own group" not in found.stdout
    rows = "".join(f"part{i // 3}_{i}.png,{SPLITS[i % 3]},part{i // 3}\n" for i in range(12))
    text(tmp_path / "set" / "samples.csv", "image,split,group\n" + rows)
    assert not any("own group" in note for note in read_data("set", tmp_path / "set").notes)


def test_a_byte_order_mark_is_no_part_of_a_configuration(tmp_path: Path) -> None:
    text(tmp_path / "featprobe.toml", "\ufeff[data.parts]\npath = 'set'\n")
    assert Workspace(tmp_path).data_names()[-1] == "parts"


def test_the_name_of_a_path_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    said = "names a path that is too long for any file"
    assert said in refused(yolo_set(tmp_path / "a", data=YAML.replace("images/val", "x" * 9999)))
    assert said in refused(labelme_set(tmp_path / "b", imagePath="x" * 300 + ".png"))


def test_rectangles_alone_are_told_to_be_no_outlines(tmp_path: Path) -> None:
    for i in range(3):
        picture(tmp_path / f"p{i}.png", seed=i)
        box = {"label": "pore", "points": [[3, 2], [8, 7]], "shape_type": "rectangle"}
        text(tmp_path / f"p{i}.json", json.dumps({"shapes": [box], "imagePath": f"p{i}.png"}))
    assert "every shape is a rectangle: masks are whole boxes" in read_data("set", tmp_path).notes
