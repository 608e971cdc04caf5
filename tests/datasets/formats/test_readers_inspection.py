"""Readers of inspection sets with quirks, of their true layout; masks of objects; several formats at once."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from test_readers import (
    PORE,
    colour_set,
    commutator_set,
    gdxray_set,
    labelme_set,
    mask,
    objects_of,
    picture,
    pidray_set,
    rareplanes_set,
    refused,
    segmentation_set,
    square,
    target_of,
    text,
    visa_set,
    voc_set,
    xml,
    yolo_set,
)

from featprobe.datasets import DataSet, read_data
from featprobe.stages.upkeep.describe import summarise


def splits_of(data: DataSet) -> dict[str, int]:
    """Images by split. No group stands in two."""
    held = {split: {sample.group for sample in data.in_split(split)} for split in ("train", "val", "test")}
    assert not held["train"] & held["val"] and not (held["train"] | held["val"]) & held["test"]
    return dict(Counter(sample.split for sample in data.samples))


# ---- several formats at once -----------------------------------------------------------------------------------------


def test_a_folder_of_several_formats_is_refused_with_their_names(tmp_path: Path) -> None:
    segmentation_set(tmp_path)
    voc_set(tmp_path)
    said = refused(tmp_path)
    assert "can be read in 2 formats" in said and "--format voc or --format voc-segmentation" in said
    assert read_data("set", tmp_path, "voc").tasks == ("detect",)
    assert "semseg" in read_data("set", tmp_path, "voc-segmentation").tasks
    labelme_set(yolo_set(tmp_path / "both"))
    assert all(name in refused(tmp_path / "both") for name in ("labelme", "yolo"))


def test_an_unknown_part_of_a_format_lists_the_known_ones(tmp_path: Path) -> None:
    assert "no part 'medium'. wanted: easy, hard, hidden" in refused(pidray_set(tmp_path), "pidray:medium")
    assert "no part 'easy'. wanted: none" in refused(tmp_path, "coco:easy")
    assert "There is no format ''" in refused(tmp_path, ":easy")


# ---- GC10-DET --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["", "images/"])
def test_gc10_det_reads_an_image_in_two_class_folders_once(tmp_path: Path, place: str) -> None:
    """img_1 lies in two folders; two images are called img_9."""
    for folder, number, seed in ((1, 1, 1), (2, 1, 1), (2, 2, 2), (10, 3, 3), (1, 9, 4), (2, 9, 5)):
        picture(tmp_path / f"{place}{folder}" / f"img_{number}.jpg", seed=seed)
    kinds = {1: ["1_chongkong", "2_hanfeng"], 2: ["2_hanfeng"], 3: ["10_yaozhed"], 9: ["1_chongkong"]}
    for number, own in kinds.items():
        text(tmp_path / "lable" / f"img_{number}.xml", xml([(kind, PORE[1]) for kind in own]))
    data = read_data("set", tmp_path)
    assert {s.id for s in data.samples} == {f"{place}{name}.jpg" for name in ("1/img_1", "2/img_2", "10/img_3")}
    assert data.classes == ("background", "10_yaozhed", "1_chongkong", "2_hanfeng")
    assert [i.category for i in objects_of(data, f"{place}1/img_1.jpg")] == [2, 3]
    assert "1 images are in several folders and are counted once: img_1" in data.notes
    assert "1 names have several images but one XML file and are left out: img_9" in data.notes


# ---- VisA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("part", "train", "test"), [("", 6, 4), (":highshot", 6, 4), (":fewshot", 4, 6)])
def test_visa_has_two_splits_of_its_own(tmp_path: Path, part: str, train: int, test: int) -> None:
    data = read_data("set", visa_set(tmp_path), f"visa{part}")
    found = splits_of(data)
    assert (found["train"] + found["val"], found["test"]) == (train, test)
    assert data.classes == ("background", "anomaly") and data.tasks == ("semseg",)


def test_visa_masks_of_every_kind_are_anomalies(tmp_path: Path) -> None:
    data = read_data("set", visa_set(tmp_path))
    for i in (1, 3):  # the masks hold 1 and 3
        found = target_of(data, f"pcb1/Data/Images/Anomaly/00{i}.JPG").semantic
        assert np.array_equal(found, square(2, 3, 5))
    assert not np.any(target_of(data, "pcb1/Data/Images/Normal/000.JPG").semantic)


def test_one_object_of_visa_is_a_set(tmp_path: Path) -> None:
    data = read_data("set", visa_set(tmp_path) / "pcb1")
    assert len(data.samples) == 5 and data.samples[0].id == "Data/Images/Normal/000.JPG"
    assert np.any(target_of(data, "Data/Images/Anomaly/001.JPG").semantic)


def test_objects_of_visa_that_are_not_here_are_told(tmp_path: Path) -> None:
    (visa_set(tmp_path) / "candle").rename(tmp_path / "elsewhere")
    data = read_data("set", tmp_path)
    assert len(data.samples) == 5 and "1 objects of 2cls_highshot.csv are not here: candle" in data.notes


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("pcb1,train,anomaly,pcb1/Data/Images/Anomaly/009.JPG,", "wanted a mask for each image that isn't normal"),
        ("pcb1,train,normal,pcb1/Data/Images/Normal/002.JPG,", "again"),
        ("pcb1,train,normal,../x.JPG,", "not below the data folder"),
        ("pcb1,train,normal", "can't be read"),
        ("pcb1,dev,normal,pcb1/x.JPG,", "names splits dev"),
    ],
)
def test_a_bad_row_of_visa_is_named(tmp_path: Path, row: str, said: str) -> None:
    table = visa_set(tmp_path) / "split_csv" / "2cls_highshot.csv"
    table.write_text(table.read_text() + row + "\n")
    assert said in refused(tmp_path)


# ---- PIDray, RarePlanes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("part", "tests"), [("", 6), (":easy", 1), (":hard", 2), (":hidden", 3)])
def test_pidray_is_tested_on_all_its_test_sets_or_on_one(tmp_path: Path, part: str, tests: int) -> None:
    data = read_data("set", pidray_set(tmp_path), f"pidray{part}" if part else None)
    assert splits_of(data) == {"train": 4, "val": 1, "test": tests} and data.tasks == ("semseg", "detect", "instseg")
    assert data.classes == ("background", "Baton", "Pliers")
    found = summarise(data).instances
    assert found is not None and found["Baton"] == 5 + tests
    assert f"the test split is PIDray's {part[1:] or 'easy, hard, hidden'}" in data.notes


def test_pidray_may_be_here_in_part(tmp_path: Path) -> None:
    (pidray_set(tmp_path) / "annotations" / "xray_test_hidden.json").unlink()
    assert splits_of(read_data("set", tmp_path))["test"] == 3
    assert "lacks xray_train.json or xray_test_hidden.json" in refused(tmp_path, "pidray:hidden")


@pytest.mark.parametrize(("part", "classes"), [("", ("Small Civil", "Military Fighter")), (":aircraft", ("aircraft",))])
def test_rareplanes_is_grouped_by_scene_and_its_leaks_are_told(
    tmp_path: Path, part: str, classes: tuple[str, ...]
) -> None:
    data = read_data("set", rareplanes_set(tmp_path), f"rareplanes{part}")
    assert data.classes == ("background", *classes) and len(data.in_split("test")) == 4
    assert {s.group for s in data.samples} == {"1_A", "2_B", "3_C", "4_D"}
    assert not {s.group for s in data.in_split("train")} & {s.group for s in data.in_split("val")}
    assert any("leaks: 1 of 4 groups stand in more than one split (1_A)" in note for note in data.notes)
    found = summarise(data).instances
    assert found is not None and found[classes[0]] == 10


# ---- KolektorSDD, GDXray's welds -------------------------------------------------------------------------------------


def test_kolektorsdd_is_grouped_by_commutator(tmp_path: Path) -> None:
    data = read_data("set", commutator_set(tmp_path))
    assert set(splits_of(data)) == {"train", "val", "test"} and len(data.samples) == 6
    assert {s.group for s in data.samples} == {"kos01", "kos02", "kos03"}
    assert np.array_equal(target_of(data, "kos01/Part1.jpg").semantic, square(2, 3, 5))
    assert not np.any(target_of(data, "kos01/Part0.jpg").semantic)
    (tmp_path / "kos01" / "Part0_label.bmp").unlink()
    assert "There is no mask" in refused(tmp_path)


def welds_set(root: Path) -> Path:
    for i in range(1, 6):
        picture(root / "W0001" / f"W0001_000{i}.png", seed=i)
        mask(root / "W0002" / f"W0002_000{i}.png", square(2, 3, i) * 255)
    text(root / "W0001" / "ground_truth.txt", "1 4 4 3 3\n")
    text(root / "W0001" / "W0001_readme.txt", "welds\n")
    return root


@pytest.mark.parametrize("folder", ["", "Welds"])
def test_gdxrays_welds_have_masks(tmp_path: Path, folder: str) -> None:
    welds_set(tmp_path / folder)
    data = read_data("set", tmp_path)
    assert set(splits_of(data)) == {"train", "val", "test"} and len(data.samples) == 5 and data.tasks == ("semseg",)
    found = target_of(data, f"{folder}/W0001/W0001_0003.png".lstrip("/")).semantic
    assert np.array_equal(found, square(2, 3, 3))
    (tmp_path / folder / "W0002" / "W0002_0001.png").unlink()
    assert "There is no mask" in refused(tmp_path)


def test_masks_of_welds_beside_other_series_are_read_where_they_are_named(tmp_path: Path) -> None:
    gdxray_set(tmp_path / "Castings", "1 2 5 3 7\n")
    welds_set(tmp_path / "Welds")
    data = read_data("set", tmp_path)
    assert data.tasks == ("detect",) and "W0001" in {s.group for s in data.samples}
    assert any("--format gdxray:masks" in note for note in data.notes)
    assert len(read_data("set", tmp_path, "gdxray:masks").samples) == 5
    assert "holds no welds with masks" in refused(tmp_path / "Castings", "gdxray:masks")


# ---- a mask an object ------------------------------------------------------------------------------------------------


def object_masks(root: Path, value: int = 255, classes: str = "") -> Path:
    """Images p0 to p3, of which p0 has two objects, p1 and p2 one, p3 none."""
    for i in range(4):
        picture(root / "images" / f"p{i}.png", seed=i)
    for name, drawn in {"p0_2": square(0, 0, 4), "p0_10": square(2, 2, 3), "p1_1": square(6, 6, 3)}.items():
        mask(root / "masks" / f"{name}.png", drawn * value)
    mask(root / "masks" / "p2_1.png", square(6, 6, 3) * value)
    if classes:
        text(root / "classes.txt", classes)
    return root


def test_masks_of_objects_are_objects(tmp_path: Path) -> None:
    data = read_data("set", object_masks(tmp_path))
    assert data.tasks == ("semseg", "detect", "instseg") and len(data.samples) == 4
    found = objects_of(data, "p0.png")
    assert [(i.category, i.box_xyxy, i.area) for i in found] == [(1, (0, 0, 4, 4), 16.0), (1, (2, 2, 5, 5), 9.0)]
    assert np.array_equal(target_of(data, "p0.png").semantic, square(0, 0, 4) | square(2, 2, 3))
    assert objects_of(data, "p3.png") == ()
    assert "1 image has no mask and counts as free of objects: p3.png" in data.notes


def test_masks_of_objects_hold_their_class(tmp_path: Path) -> None:
    data = read_data("set", object_masks(tmp_path, 2, "background\npore\ncrack\n"))
    assert [i.category for i in objects_of(data, "p0.png")] == [2, 2]
    mask(tmp_path / "masks" / "p0_2.png", square(0, 0, 4) * 1 + square(0, 0, 2))
    assert "p0_2.png is not the mask of one object. wanted: 0 and one class. found: [1, 2]" in refused(tmp_path)
    mask(tmp_path / "masks" / "p0_2.png", np.zeros((12, 16)))
    assert "found: []" in refused(tmp_path)


def test_masks_of_objects_and_of_images_do_not_mix(tmp_path: Path) -> None:
    mask(object_masks(tmp_path) / "masks" / "p3.png", square(0, 0, 4) * 255)
    assert "of an object, and the mask of p3.png" in refused(tmp_path)


def test_an_image_called_like_an_object_keeps_its_mask(tmp_path: Path) -> None:
    for name in ("part", "part_1", "part_2"):
        picture(tmp_path / "images" / f"{name}.png")
        mask(tmp_path / "masks" / f"{name}.png", square(0, 0, 4) * 255)
    data = read_data("set", tmp_path)
    assert data.tasks == ("semseg",) and len(data.samples) == 3


# ---- coloured masks --------------------------------------------------------------------------------------------------


def test_a_colour_that_is_not_named_is_an_error_that_lists_it(tmp_path: Path) -> None:
    said = refused(colour_set(tmp_path, classes="0,0,255 rock\n0,255,0 pore\n"))
    assert "#0000ff rock, #00ff00 pore" in said and "found   #ff0000" in said
