"""Names of files: hidden ones are no data, other forms of a name are found, and names that are no text are refused."""

import os
import re
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from test_readers import MADE, YAML, coco_set, folder_set, picture, text, yolo_set

from featprobe.cli.main import cli
from featprobe.datasets import FORMATS, DataSet, read_data
from featprobe.datasets.images.reading import hash_image, image_size, read_levels
from featprobe.datasets.names import as_on_disk, is_hidden, meant
from featprobe.datasets.split_file import read_split_file
from featprobe.errors import DataError
from featprobe.stages.predict import find_images
from featprobe.stages.upkeep.convert import convert
from featprobe.stages.upkeep.describe import summarise

COMPOSED, DECOMPOSED = unicodedata.normalize("NFC", "ü"), unicodedata.normalize("NFD", "ü")
IMAGES = (".png", ".jpg", ".JPG", ".bmp")
JUNK = b"\0\5\x16\7\0\2\0\0Mac OS X" + b"\0" * 60


def told_of(data: DataSet) -> dict[str, Any]:
    """All that a set says of itself and of each image."""
    found: dict[str, Any] = {"": (data.classes, data.tasks, data.notes)}
    for sample in data.samples:
        target = data.read_target(sample, image_size(sample.image))
        found[sample.id] = sample.split, sample.group, repr(target)
    return found


def litter(root: Path) -> None:
    """What notebooks, macOS, Windows and a NAS leave in every folder: copies, previews, lists of their own."""
    folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
    whole = root.parent / "whole"
    shutil.copytree(root, whole)
    for folder in folders:
        files = [path for path in folder.iterdir() if path.is_file()]
        for name in (".ipynb_checkpoints", "@eaDir", ".git"):
            (folder / name).mkdir()
        for path in files:
            (folder / f"._{path.name}").write_bytes(JUNK)
            shutil.copy(path, folder / f".{path.name}")
            shutil.copy(path, folder / ".ipynb_checkpoints" / f"{path.stem}-checkpoint{path.suffix}")
            shutil.copy(path, folder / "@eaDir" / path.name)
        for name in ("Thumbs.db", "desktop.ini", ".DS_Store"):
            (folder / name).write_bytes(JUNK)
    shutil.copytree(whole, root / "__MACOSX")
    shutil.copytree(whole, root / ".Trash")


def renamed(root: Path, written: str, on_disk: str) -> None:
    """Every image's name begins with a letter, in one form in texts, and in another one on the disk."""
    for path in [path for path in root.rglob("*") if path.is_file()]:
        if path.suffix not in IMAGES:
            named = re.sub(r"(\w+\.(?:png|jpg|JPG))", rf"{written}\1", path.read_text())
            path.write_text(named, encoding="utf-8")
        of_labels = {"masks", "labels", "Annotations", "SegmentationClass", "SegmentationObject"} & set(path.parts)
        if of_labels or (path.suffix == ".json" and path.stem.startswith("p")):
            path.rename(path.with_name(COMPOSED + path.name))
        elif path.suffix in IMAGES:
            path.rename(path.with_name(on_disk + path.name))


@pytest.mark.parametrize("made", MADE)
def test_hidden_files_are_no_data_in_any_format(tmp_path: Path, made: str) -> None:
    root = tmp_path / "set"
    root.mkdir()
    MADE[made](root)
    fitting, told = [name for name, known in FORMATS.items() if known.fits(root)], told_of(read_data("set", root))
    litter(root)
    assert [name for name, known in FORMATS.items() if known.fits(root)] == fitting
    assert told_of(read_data("set", root)) == told


def test_hidden_files_are_neither_converted_nor_predicted_but_where_they_are_named(tmp_path: Path) -> None:
    root = tmp_path / "set"
    root.mkdir()
    folder_set(root)
    litter(root)
    convert(read_data("set", root), tmp_path / "out", quiet=True)
    assert {path.name for path in (tmp_path / "out" / "images").iterdir()} == {f"p{i}.png" for i in range(4)}
    found = find_images([root / "images"])
    assert [name for _, name in found] == [f"p{i}" for i in range(4)]
    named = root / "images" / ".ipynb_checkpoints"
    assert len(find_images([named])) == 4 and len(find_images([named / "p0-checkpoint.png"])) == 1


def test_a_hidden_file_that_a_table_names_is_used(tmp_path: Path) -> None:
    coco_set(tmp_path)
    (tmp_path / "images" / "p0.png").rename(tmp_path / "images" / ".p0.png")
    path = tmp_path / "all.json"
    path.write_text(path.read_text().replace('"p0.png"', '".p0.png"'))
    assert ".p0.png" in [sample.id for sample in read_data("set", tmp_path).samples]


@pytest.mark.parametrize("name", [".a", "._a.png", "__MACOSX", "THUMBS.DB", "Desktop.ini", "@eaDir", ".DS_Store"])
def test_what_is_hidden(name: str) -> None:
    assert is_hidden(name) and not is_hidden(f"a{name}")


@pytest.mark.parametrize("written", [COMPOSED, "%C3%BC", "u%CC%88"])
@pytest.mark.parametrize(
    "made", ["folders", "coco", "colours", "labelme", "deeppcb", "voc", "voc-segmentation", "yolo", "severstal", "visa"]
)
def test_names_of_another_form_are_found_in_every_format(tmp_path: Path, made: str, written: str) -> None:
    for root in (tmp_path / "old", tmp_path / "new"):
        root.mkdir()
        MADE[made](root)
    renamed(tmp_path / "new", written, DECOMPOSED)
    old, new = (read_data("set", tmp_path / name, complete=False) for name in ("old", "new"))
    assert len(new.samples) == len(old.samples)
    assert [re.sub(f"{written}|{COMPOSED}", "", note) for note in new.notes] == list(old.notes)
    for before, after in zip(old.samples, new.samples, strict=True):
        assert np.array_equal(read_levels(after.image), read_levels(before.image)) and after.split == before.split
        size = image_size(after.image)
        assert repr(new.read_target(after, size)) == repr(old.read_target(before, size))


def test_tables_lists_and_split_files_name_images_in_another_form(tmp_path: Path) -> None:
    folder_set(tmp_path)
    renamed(tmp_path, COMPOSED, DECOMPOSED)
    rows = [f"{COMPOSED}p{i}.png,{split},part{i}" for i, split in enumerate(("train", "train", "val", "test"))]
    text(tmp_path / "samples.csv", "\n".join(["image,split,group", *rows]))
    data = read_data("set", tmp_path)
    assert [(s.split, s.group) for s in data.samples] == [tuple(row.split(",")[1:]) for row in rows]
    assert not data.notes
    own = text(tmp_path / "split.csv", "id,split\n" + "\n".join(f"%C3%BCp{i}.png,{1 + i % 2}" for i in range(4)))
    _, splits = read_split_file(own).placed([s.id for s in data.samples], [s.group for s in data.samples])
    assert splits == ["1", "2", "1", "2"]
    (tmp_path / "samples.csv").unlink()
    shutil.copy(tmp_path / f"images/{DECOMPOSED}p0.png", tmp_path / f"images/{COMPOSED}p0.png")
    text(tmp_path / "samples.csv", f"image,group\n{COMPOSED}p0.png,whole\nu%CC%88p0.png,none\n")
    shutil.copy(tmp_path / f"masks/{COMPOSED}p0.png", tmp_path / f"masks/{DECOMPOSED}p0.png")
    with pytest.raises(DataError, match="look like that"):
        read_data("set", tmp_path)


def test_a_list_of_yolo_names_images_in_another_form(tmp_path: Path) -> None:
    yolo_set(tmp_path, data=YAML.replace("images/train", "train.txt"))
    (tmp_path / "images/train/p0.png").rename(tmp_path / f"images/train/{DECOMPOSED}.png")
    (tmp_path / "labels/train/p0.txt").rename(tmp_path / f"labels/train/{COMPOSED}.txt")
    text(tmp_path / "train.txt", f"images/train/{COMPOSED}.png\nimages/train/p1.png\n")
    data = read_data("set", tmp_path)
    assert not data.notes and len(data.in_split("train")) == 2
    assert summarise(data).instances == {"pore": 0, "crack": 6}


@given(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="/\0%"), min_size=1, max_size=8))
def test_a_name_means_itself_before_any_other(name: str) -> None:
    forms = {unicodedata.normalize(form, name) for form in ("NFC", "NFD")}
    assert meant([name], [*forms, name]) == {name: name}
    for form in forms:
        assert meant([form], [name]) == {form: name}


def test_a_file_that_is_there_comes_first_and_two_that_look_alike_are_refused(tmp_path: Path) -> None:
    both = [picture(tmp_path / f"{form}.png") for form in (COMPOSED, DECOMPOSED)]
    assert [as_on_disk(tmp_path, path) for path in both] == both
    with pytest.raises(DataError, match=r"several names look like that: 'u.u0308\.png', '.xfc\.png'"):
        as_on_disk(tmp_path, tmp_path / "%C3%BC.png")
    assert as_on_disk(tmp_path, tmp_path / "%61.png") == tmp_path / "%61.png"
    with pytest.raises(DataError, match="several names"):
        meant([COMPOSED, "%C3%BC"], [DECOMPOSED])


def test_a_name_in_other_letters_is_told_and_not_taken(tmp_path: Path) -> None:
    coco_set(tmp_path)
    (tmp_path / "images/p0.png").rename(tmp_path / "images/P0.PNG")
    data = read_data("set", tmp_path)
    for read in (hash_image, image_size):
        with pytest.raises(DataError, match=r"There is no .*p0\.png\. Did you mean P0\.PNG\?"):
            read(data.samples[0].image)


def test_half_a_character_in_json_is_refused(tmp_path: Path) -> None:
    coco_set(tmp_path)
    path = tmp_path / "all.json"
    whole = path.read_text()
    path.write_text(whole.replace("crack", "\\ud83d\\ude00"))
    assert read_data("set", tmp_path).classes[2] == "\N{GRINNING FACE}"
    path.write_text(whole.replace("crack", "cr\\udcffck"))
    with pytest.raises(DataError, match="half a character"):
        read_data("set", tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="names are bytes on POSIX alone")
@pytest.mark.parametrize("command", ["info", "show", "check", "split", "convert", "extract"])
@pytest.mark.parametrize("where", ["image", "mask", "folder", "root"])
def test_a_name_that_is_no_text_ends_every_command_with_an_error_or_a_result(
    tmp_path: Path, where: str, command: str
) -> None:
    folder_set(tmp_path / "set")
    old, new = {
        "image": (b"set/images/p0.png", b"set/images/p\xff0.png"),
        "mask": (b"set/masks/p0.png", b"set/masks/p\xff0.png"),
        "folder": (b"set/images", b"set/images"),
        "root": (b"set", b"s\xfft"),
    }[where]
    place = os.fsencode(tmp_path) + b"/"
    os.rename(place + old, place + new)
    if where == "folder":
        os.mkdir(place + b"set/images/\xff")
        shutil.copy(tmp_path / "set/images/p0.png", os.fsdecode(place + b"set/images/\xff/q.png"))
    data = os.fsdecode(place + new) if where == "root" else str(tmp_path / "set")
    out = (
        []
        if command in ("info", "check", "extract")
        else ["--out", str(tmp_path / ("out.png" if command == "show" else "out.csv"))]
    )
    words = ["extract", "--backbone", "embedded", "--data"] if command == "extract" else ["data", command]
    result = CliRunner().invoke(cli, ["--workspace", str(tmp_path), *words, data, *out])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in {"check": (1, 3), "show": (0, 1)}.get(command, (1,))
    assert result.exit_code == 0 or "udcff" in result.output or "There is no mask" in result.output


@pytest.mark.skipif(os.name == "nt", reason="names are bytes on POSIX alone")
def test_a_name_that_is_no_text_is_refused_by_predict(tmp_path: Path) -> None:
    picture(tmp_path / "p0.png")
    os.rename(os.fsencode(tmp_path) + b"/p0.png", os.fsencode(tmp_path) + b"/\xff.png")
    with pytest.raises(DataError, match=r"udcff\.png' is no UTF-8 text"):
        find_images([tmp_path])
