"""Labels of whole images: folders of classes and tables; what is good; bad input, each with what was found."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from test_readers import MADE, SIZE, class_folders, mvtec_set, picture, refused, text

from featprobe.cli.main import cli
from featprobe.datasets import DataSet, read_data
from featprobe.datasets.formats.labelled import write_labels
from featprobe.datasets.label_sets import check_held, held_text
from featprobe.errors import DataError
from featprobe.image_labels import LabelNames
from featprobe.stages.workspace import Workspace


def held(data: DataSet) -> dict[str, tuple[str, ...]]:
    """The labels of each image as names."""
    assert data.label_names is not None
    found = {}
    for sample in data.samples:
        target = data.read_target(sample, SIZE)
        assert target.semantic is None and target.instances is None and target.labels is not None
        found[sample.id] = tuple(data.label_names.names[own] for own in target.labels)
    return found


def table(root: Path, rows: str, images: int = 8, name: str = "labels.csv") -> Path:
    """A table beside the images 0.png to N.png."""
    for i in range(images):
        picture(root / f"{i}.png", seed=i)
    text(root / name, rows)
    return root


def lines(header: str, row: Callable[[int], str], count: int = 8) -> str:
    return "\n".join([header, *(row(i) for i in range(count)), ""])


# ---- folders of classes ----------------------------------------------------------------------------------------------


def test_the_folder_of_an_image_is_its_label_and_what_is_good_follows_from_its_name(tmp_path: Path) -> None:
    for i in range(12):
        picture(tmp_path / ("OK", "dent", "scratch")[i % 3] / f"{i}.png", seed=i)
    data = read_data("set", tmp_path)
    assert data.label_names == LabelNames(("OK", "dent", "scratch"), good="OK")
    assert held(data) == {f"{name}/{i}.png": (name,) for i in range(12) for name in [("OK", "dent", "scratch")[i % 3]]}
    assert (data.tasks, data.classes) == ((), ("background",)) and data.description == {"format": "class-folders"}


def test_folders_of_splits_are_the_splits_and_validation_is_carved_where_there_is_none(tmp_path: Path) -> None:
    for split in ("Train", "testing"):
        for i in range(10):
            picture(tmp_path / split / ("good", "nok")[i % 2] / f"{i}.png", seed=i)
    data = read_data("set", tmp_path)
    assert {s.id for s in data.in_split("test")} == {f"testing/{('good', 'nok')[i % 2]}/{i}.png" for i in range(10)}
    assert (len(data.in_split("train")), len(data.in_split("val"))) == (8, 2)


def test_groups_and_splits_of_folders_come_from_samples_csv_and_pages_are_one_group(tmp_path: Path) -> None:
    root = class_folders(tmp_path)
    rows = "".join(f"{('good', 'dent')[i % 2]}/p{i}.png,part{i // 4},{('train', 'test')[i // 4]}\n" for i in range(8))
    text(root / "samples.csv", f"image,group,split\n{rows}")
    data = read_data("set", root, complete=False)
    assert {(s.group, s.split) for s in data.samples} == {("part0", "train"), ("part1", "test")}
    picture(root / "good" / "inside" / "deep.png", seed=9)
    assert held(read_data("set", root, complete=False))["good/inside/deep.png"] == ("good",)


@pytest.mark.parametrize("name", sorted(set(MADE) - {"class-csv", "class-folders"}))
def test_no_set_of_another_format_becomes_folders_of_classes_or_a_table(tmp_path: Path, name: str) -> None:
    data = read_data("set", MADE[name](tmp_path / "set"))
    assert data.description.get("format") not in ("class-csv", "class-folders") and data.label_names is None


def test_folders_whose_names_say_that_they_are_no_classes_are_none(tmp_path: Path) -> None:
    for name, folders in {
        "one": ["pictures"], "roles": ["images", "previous"], "splits": ["train", "val"], "none": ["."],
        "coco": ["train2017", "val2017"], "more": ["train", "test", "extra"],
    }.items():  # fmt: skip
        for i, folder in enumerate(folders):
            picture(tmp_path / name / folder / f"{i}.png", seed=i)
        said = refused(tmp_path / name)
        assert "holds no data set" in said and "a folder of images for each class, or labels.csv" in said
    for folder in ("good", "dent"):
        picture(tmp_path / "boxes" / folder / "0.png").with_suffix(".xml").write_text("<annotation/>")
        picture(tmp_path / "deep" / folder / "inside" / "0.png").with_suffix(".json").write_text("{}")
    assert all("holds no data set" in refused(tmp_path / name) for name in ("boxes", "deep"))


def test_sets_side_by_side_are_no_classes(tmp_path: Path) -> None:
    for name in ("coco", "voc"):
        MADE[name](tmp_path / name)
    said = refused(tmp_path)
    assert f"coco, in {tmp_path / 'coco'}" in said and "Use that folder" in said
    assert read_data("set", tmp_path, "class-folders", complete=False).label_names.names == ("coco", "voc")


def test_linked_folders_of_classes_are_named_and_not_entered(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "set")
    shutil.move(root / "dent", tmp_path / "elsewhere")
    picture(root / "scratch" / "a.png", seed=50)
    (root / "dent").symlink_to(tmp_path / "elsewhere")
    data = read_data("set", root, complete=False)
    assert data.label_names.names == ("good", "scratch")
    assert "linked folders are not entered: dent" in data.notes


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_a_table_gives_labels_splits_and_groups(tmp_path: Path) -> None:
    rows = lines("Image;LABEL;split;group", lambda i: f"{i}.png;{'ok' if i % 2 else 'crack'};Train;g{i // 2}")
    root = table(
        tmp_path, rows.replace("6.png;crack;Train", "6.png;crack;test").replace("7.png;ok;Train", "7.png;ok;test")
    )
    data = read_data("set", root)
    assert data.label_names == LabelNames(("crack", "ok"), good="ok")
    assert [(s.group, s.split) for s in data.samples if s.id in ("6.png", "7.png")] == [("g3", "test")] * 2
    assert held(data)["0.png"] == ("crack",) and held(data)["1.png"] == ("ok",)


def test_several_labels_stand_in_one_cell_and_an_empty_one_is_good(tmp_path: Path) -> None:
    root = table(tmp_path, lines("image,label", lambda i: f"{i}.png,{('', 'a', 'a|b', 'b | a')[i % 4]}"))
    data = read_data("set", root)
    assert data.label_names == LabelNames(("a", "b"), multi=True)
    assert [held(data)[f"{i}.png"] for i in range(4)] == [(), ("a",), ("a", "b"), ("b", "a")]
    assert held_text(data.label_names, ()) == "good (no label)"
    for command in ("info", "check"):
        said = CliRunner().invoke(cli, ["--workspace", str(tmp_path / "space"), "data", command, str(root)]).output
        assert "good (no label)" in said


def test_a_table_of_any_name_is_found_and_paths_may_begin_at_images(tmp_path: Path) -> None:
    for i in range(6):
        picture(tmp_path / "images" / f"{i}.png", seed=i)
    text(
        tmp_path / "verdicts.csv", lines("image,label,operator", lambda i: f"{i}.png,{'io' if i % 2 else 'nio'},me", 6)
    )
    data = read_data("set", tmp_path)
    assert data.label_names.good == "io" and held(data)["images/0.png"] == ("nio",)
    shutil.copy(tmp_path / "verdicts.csv", tmp_path / "verdicts2.csv")
    assert "several tables of labels" in refused(tmp_path) and "verdicts2.csv" in refused(tmp_path)
    shutil.copy(tmp_path / "verdicts.csv", tmp_path / "labels.csv")
    assert len(read_data("set", tmp_path).samples) == 6


def test_an_image_folder_of_hugging_face_is_read(tmp_path: Path) -> None:
    for split in ("train", "test"):
        rows = lines("file_name,label,text", lambda i: f"{i}.png,{i % 2},some", 6)
        table(tmp_path / split, rows, 6, "metadata.csv")
    data = read_data("set", tmp_path)
    assert data.label_names == LabelNames(("0", "1")) and held(data)["test/1.png"] == ("1",)
    assert len(data.in_split("test")) == 6
    assert [note for note in data.notes if note.startswith("nothing says which of the labels 0, 1 means")]


def test_what_a_table_does_not_name_and_what_is_not_there_is_noted(tmp_path: Path) -> None:
    root = table(tmp_path, lines("image,label", lambda i: f"{i + 1}.png,{('good', 'dent')[i % 2]}"))
    notes = " ".join(read_data("set", root).notes)
    assert "labels.csv names 1 image that can't be found: 8.png" in notes
    assert "labels.csv has no row for 1 image, which was not read: 0.png" in notes


def test_where_missing_images_leave_one_label_they_are_named_first(tmp_path: Path) -> None:
    rows = lines("image,label", lambda i: f"{i}.png,{'good' if i < 8 else 'dent'}", 11)
    first, *_, found, _ = refused(table(tmp_path, rows)).splitlines()
    assert "labels.csv names 3 images that can't be found, and the others have 1 label." in first
    assert found.split() == ["found", "8.png,", "9.png,", "10.png"]


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.tuples(st.text("ab=-'\"", min_size=1), st.sampled_from(["g1", "=g"])), min_size=2, max_size=8),
    multi=st.booleans(),
)
def test_a_written_table_reads_as_it_was(
    rows: list[tuple[str, str]], multi: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("table")
    labels = [[name] if i or not multi else [] for i, (name, _) in enumerate([*rows, ("x", "g1"), ("y", "g1")])]
    every = [*rows, ("x", "g1"), ("y", "g1")]
    for i in range(len(every)):
        picture(root / f"{i}.png", seed=i)
    write_labels(
        root / "labels.csv",
        [(f"{i}.png", own, "train", group) for i, (own, (_, group)) in enumerate(zip(labels, every, strict=True))],
        multi=multi,
    )
    data = read_data("set", root, complete=False)
    assert held(data) == {f"{i}.png": tuple(own) for i, own in enumerate(labels)}
    assert [s.group for s in data.samples] == [group for _, group in every]
    assert data.label_names.multi is multi


# ---- what is good ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["good", "OK", "Normal", "no_defect", "Defect-Free", "nondefect", "i.O.", "PASS", "negative"]
)
def test_usual_names_say_that_an_image_is_good(tmp_path: Path, name: str) -> None:
    for i in range(4):
        picture(tmp_path / (name, "bad")[i % 2] / f"{i}.png", seed=i)
    assert read_data("set", tmp_path).label_names.good == name


def test_a_name_of_the_workspace_says_good_where_no_usual_name_does(tmp_path: Path) -> None:
    for i in range(6):
        picture(tmp_path / "caps" / ("def_front", "ok_front")[i % 2] / f"{i}.png", seed=i)
    assert read_data("caps", tmp_path / "caps").label_names.good is None
    toml = "[data.caps]\npath = 'caps'\ngood = '{}'\n"
    text(tmp_path / "featprobe.toml", toml.format("ok_front"))
    data = Workspace(tmp_path).data_set("caps")
    assert data.label_names.good == "ok_front" and data.description["good"] == "ok_front"
    assert not [note for note in data.notes if "nothing says" in note]
    text(tmp_path / "featprobe.toml", toml.format("ok_frnt"))
    with pytest.raises(DataError, match=r"good = 'ok_frnt' is no label(.|\n)*Did you mean ok_front"):
        Workspace(tmp_path).data_set("caps")


def test_good_is_refused_where_it_can_mean_nothing(tmp_path: Path) -> None:
    table(tmp_path / "multi", lines("image,label", lambda i: f"{i}.png,{('a', 'a|b')[i % 2]}"))
    with pytest.raises(DataError, match="several labels for an image, where an image without any is good"):
        read_data("multi", tmp_path / "multi", good="a")
    with pytest.raises(DataError, match="found   no labels of images"):
        read_data("masks", mvtec_set(tmp_path / "masks"), good="good")


def test_several_labels_that_say_good_must_be_told_apart(tmp_path: Path) -> None:
    for i in range(9):
        picture(tmp_path / ("ok", "normal", "bad")[i % 3] / f"{i}.png", seed=i)
    said = refused(tmp_path)
    assert "several labels that could say that an image is good" in said and "normal, ok" in said
    assert read_data("set", tmp_path, good="ok").label_names.good == "ok"


# ---- bad input -------------------------------------------------------------------------------------------------------

BAD = {
    "one class only": (
        "image,label",
        lambda i: f"{i}.png,dent",
        ["1 label: nothing could be told apart", "dent (8 images)"],
    ),
    "a row without a label": (
        "image,label",
        lambda i: f"{i}.png,{'' if i == 3 else 'ab'[i % 2]}",
        ["row 5: 3.png has no label", "a|b"],
    ),
    "an unknown split": (
        "image,label,split",
        lambda i: f"{i}.png,{'ab'[i % 2]},{'hold' if i == 3 else 'train'}",
        ["row 5: the split 'hold' is unknown"],
    ),
    "an image twice in one class": (
        "image,label",
        lambda i: f"{i // 2}.png,{'ab'[i // 2 % 2]}",
        ["0.png is there twice, first in row 2", "Keep one row"],
    ),
    "an image in two classes": (
        "image,label",
        lambda i: f"{i // 2}.png,{'ab'[i % 2]}",
        ["as a and as b: an image in two classes", "a|b"],
    ),
    "one image under two names": (
        "image,label",
        lambda i: f"{['', 'x/../'][i % 2]}{i // 2}.png,{'ab'[i % 2]}",
        ["labels in several rows", "0.png (a, b)"],
    ),
    "a label that says good among several": (
        "image,label",
        lambda i: f"{i}.png,{('good', 'a|b')[i % 2]}",
        ["Leave the label of these images empty", "good (4 images)"],
    ),
    "names of no image": (
        "image,label",
        lambda i: f"x{i}.png,{'ab'[i % 2]}",
        ["names no image that is there", "x0.png"],
    ),
    "a path that leads out": ("image,label", lambda i: f"../{i}.png,{'ab'[i % 2]}", ["not below the data folder"]),
    "a missing column": ("image,lable", lambda i: f"{i}.png,{'ab'[i % 2]}", ["'lable', which looks like 'label'"]),
    "a quotation mark that never closes": (
        "image,label",
        lambda i: f"{i}.png,{['', 'x' * 300][i == 4]}{'ab'[i % 2]}",
        ["labels of more than 200 characters", "… of 301 characters", "quotation mark"],
    ),
    "too many labels": (
        "image,label",
        lambda i: f"{i}.png,label{i}",
        ["1001 labels.", "2 to 1000 labels", "Join some of them"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_table_that_can_not_be_meant_is_refused_with_what_was_found(tmp_path: Path, name: str) -> None:
    header, row, wanted = BAD[name]
    count = 1001 if name == "too many labels" else 8
    root = table(tmp_path, lines(header, row, count), 8)
    if count > 8:
        for i in range(8, count):
            shutil.copy(root / "0.png", root / f"{i}.png")
    for said in [refused(root), refused(root, "class-csv")]:
        assert all(part in said for part in wanted), said


def test_one_class_alone_in_folders_is_refused(tmp_path: Path) -> None:
    for i in range(4):
        picture(tmp_path / "dent" / f"{i}.png", seed=i)
    said = refused(tmp_path, "class-folders")
    assert "found   dent" in said and "a folder of images for each class" in said


# ---- published split of MVTec AD -------------------------------------------------------------------------------------


def test_mvtec_ad_in_its_published_split_trains_on_good_images_alone(tmp_path: Path) -> None:
    root = mvtec_set(tmp_path / "tile")
    data = read_data("tile", root, "mvtec-ad:published")
    assert {s.id.split("/")[0] for s in data.in_split("test")} == {"test"} and len(data.in_split("test")) == 12
    learnt = [*data.in_split("train"), *data.in_split("val")]
    assert len(learnt) == 4 and all(s.id.startswith("train/good/") for s in learnt)
    assert not any(data.read_target(s, SIZE).semantic.any() for s in learnt)
    assert data.description["format"] == "mvtec-ad:published"
    assert any("heads of anomalies alone" in note for note in data.notes)


# ---- labels of other readers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [(2,), (), (0, 1)])
def test_labels_that_a_reader_of_another_package_gets_wrong_are_named(tmp_path: Path, own: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"wanted: one number from 0 to 1. found: "):
        check_held(own, LabelNames(("a", "b")), "set, image 1")
    with pytest.raises(DataError, match="wanted: no labels"):
        check_held(own, None, "set, image 1")
    check_held(None, None, "set, image 1")
