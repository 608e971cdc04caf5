"""`data check`: what would spoil a study is found, named and told by the exit code; what would not is not."""

import io
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

from featprobe.cli.main import cli
from featprobe.datasets.duplicates import ENOUGH, look_of, near_copies

SIDE = 96
SPLITS = ("train", "val", "test")
REAL = Path(os.environ.get("FEATPROBE_SHARED_DATA", Path(__file__).parents[4] / "shared" / "data"))


def texture(seed: int, side: int = SIDE) -> NDArray[np.uint8]:
    """A picture with structure at every scale, as surfaces have it."""
    rng = np.random.default_rng(seed)
    levels = sum(scale * gaussian_filter(rng.normal(size=(side, side)), scale) for scale in (1, 3, 8, 20))
    levels = (levels - levels.min()) / np.ptp(levels)
    return (255 * levels).astype(np.uint8)


def write(path: Path, levels: NDArray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(levels).save(path)
    return path


def make_set(root: Path, each: int = 3) -> Path:
    """train/, val/ and test/ of images and masks; two squares of class 1, of 6 and 24 pixels, and one of class 2."""
    labels = np.zeros((SIDE, SIDE), dtype=np.uint8)
    labels[4:10, 4:10], labels[20:44, 20:44], labels[60:72, 60:72] = 1, 1, 2
    for number, split in enumerate(SPLITS):
        for i in range(each):
            write(root / split / "images" / f"{split}{i}.png", texture(100 * number + i))
            write(root / split / "masks" / f"{split}{i}.png", labels)
    (root / "classes.txt").write_text("background\npore\ncrack\n", encoding="utf-8")
    return root


def check(root: Path, *more: str) -> Result:
    arguments = ["--workspace", str(root.parent), "data", "check", str(root), "--quiet", *more]
    return CliRunner().invoke(cli, arguments, catch_exceptions=False)


def checked(root: Path, *more: str) -> tuple[dict[str, Any], int]:
    """What is printed for a machine, and the exit code."""
    result = check(root, "--json", *more)
    return json.loads(result.stdout), result.exit_code


def kinds(found: dict[str, Any]) -> dict[str, bool]:
    """Kinds of findings, and whether each spoils a study."""
    return {finding["kind"]: finding["spoils"] for finding in found["findings"]}


def test_a_sound_set_ends_with_0_and_its_numbers(tmp_path: Path) -> None:
    found, code = checked(make_set(tmp_path / "set"))
    assert (code, found["spoiled"], found["findings"]) == (0, False, [])
    assert set(found) == {
        "name", "root", "classes", "tasks", "images", "instances", "splits", "sizes", "depths", "objects", "findings",
        "notes", "spoiled", "serves", "labels",
    }  # fmt: skip
    assert (found["images"], found["instances"], found["depths"]) == (9, None, {"8-bit grey": 9})
    assert found["sizes"] == [[SIDE, SIDE], [SIDE, SIDE]]
    own = found["splits"]["val"]
    assert (own["images"], own["groups"], own["without_objects"]) == (3, 3, 0)
    pore = 6 * 6 + 24 * 24
    assert own["classes"]["pore"] == {"images": 3, "instances": None, "pixels": pytest.approx(pore / SIDE**2)}
    text = check(tmp_path / "set").stdout
    assert "Nothing was found that would spoil a study." in text
    assert re.search(r"pore +3 / 3 / 3 +6\.64% / 6\.64% / 6\.64%", text), text


def test_objects_are_held_against_the_cells_of_each_level(tmp_path: Path) -> None:
    found, _ = checked(make_set(tmp_path / "set"))
    assert found["objects"] == {
        "of": "components", "count": 27, "frame": [SIDE, SIDE], "tile": None, "median": 12.0,
        "smaller_than_cell": {"4": 0, "8": 9, "16": 18, "32": 27},
    }  # fmt: skip
    found, _ = checked(tmp_path / "set", "--size", f"{SIDE // 2}x{SIDE * 2}")
    assert found["objects"]["median"] == 12 and found["objects"]["frame"] == [SIDE // 2, SIDE * 2]
    found, _ = checked(tmp_path / "set", "--size", f"{SIDE // 2}x{SIDE // 2}")
    assert found["objects"]["smaller_than_cell"] == {"4": 9, "8": 18, "16": 27, "32": 27}


def test_objects_are_as_large_as_the_configurations_tiles_show_them(tmp_path: Path) -> None:
    make_set(tmp_path / "set")
    entry = f"[data.parts]\npath = 'set'\ntile = {SIDE // 4}\n"

    def objects(text: str, *more: str) -> Any:
        (tmp_path / "featprobe.toml").write_text(text)
        words = ["--workspace", str(tmp_path), "data", "check", "parts", "--quiet", "--json", *more]
        return json.loads(CliRunner().invoke(cli, words).stdout)["objects"]

    own = objects(entry)
    assert (own["frame"], own["tile"], own["median"]) == ([SIDE // 4] * 2, SIDE // 4, 12)
    half = f"{SIDE // 8}x{SIDE // 8}"
    for found in (objects(entry, "--size", half), objects(f"{entry}size = '{half}'\n")):
        assert (found["frame"], found["median"]) == ([SIDE // 8] * 2, 6)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-400])


def grouped(root: Path) -> None:
    rows = [f"{split}{i}.png,part{i}" for split in SPLITS for i in range(3)]
    (root / "samples.csv").write_text("image,group\n" + "\n".join(rows), encoding="utf-8")


def copied(root: Path, split: str = "test") -> None:
    (root / split / "images" / f"{split}1.png").write_bytes((root / "train/images/train0.png").read_bytes())


def resaved(root: Path, split: str = "test") -> None:
    darker = Image.open(root / "train/images/train0.png").point(lambda level: level * 3 // 4)
    darker.save(root / split / "images" / f"{split}1.png")


def without(root: Path, split: str) -> None:
    (root / split).rename(root / f"no-{split}")


SPOILING: dict[str, Callable[[Path], object]] = {
    "unreadable_image": lambda root: cut(root / "val/images/val1.png"),
    "label_size": lambda root: write(root / "test/masks/test2.png", np.zeros((SIDE, SIDE + 1), np.uint8)),
    "bad_labels": lambda root: (root / "test/masks/test2.png").unlink(),
    "group_leak": grouped,
    "copy_leak": copied,
    "near_copy_leak": resaved,
    "no_splits": lambda root: (without(root, "val"), without(root, "test")),
    "mixed_depths": lambda root: write(root / "val/images/val1.png", texture(7).astype(np.uint16) * 257),
}
HARMLESS: dict[str, Callable[[Path], object]] = {
    "missing_class": lambda root: [
        write(root / f"val/masks/val{i}.png", np.eye(SIDE, dtype=np.uint8)) for i in range(3)
    ],
    "copies": lambda root: copied(root, "train"),
    "near_copies": lambda root: resaved(root, "train"),
}


def test_near_copies_of_one_group_are_meant_to_be(tmp_path: Path) -> None:
    root = make_set(tmp_path / "set")
    resaved(root, "train")
    (root / "samples.csv").write_text("image,group\ntrain0.png,part\ntrain1.png,part\n", encoding="utf-8")
    assert kinds(checked(root)[0]) == {}


@pytest.mark.parametrize("kind", [*SPOILING, *HARMLESS])
def test_each_thing_is_found_alone(tmp_path: Path, kind: str) -> None:
    root = make_set(tmp_path / "set")
    (SPOILING | HARMLESS)[kind](root)
    found, code = checked(root)
    assert kinds(found) == {kind: kind in SPOILING} and code == (3 if kind in SPOILING else 0)
    text = check(root)
    assert text.exit_code == code and found["findings"][0]["text"].splitlines()[0] in text.stdout


def test_findings_name_what_they_concern(tmp_path: Path) -> None:
    root = make_set(tmp_path / "set")
    for spoil in (SPOILING["unreadable_image"], SPOILING["label_size"], copied, grouped):
        spoil(root)
    found, code = checked(root)
    entries = {finding["kind"]: finding["entries"] for finding in found["findings"]}
    assert code == 3 and set(entries) == {"unreadable_image", "label_size", "copy_leak", "group_leak"}
    assert (
        entries["unreadable_image"][0][0] == "val/val1.png" and "val1.png is trunc" in entries["unreadable_image"][0][1]
    )
    assert "found   96x97" in entries["label_size"][0][1]
    assert entries["copy_leak"] == [["test: test/test1.png", "train: train/train0.png"]] or entries["copy_leak"] == [
        ["train: train/train0.png", "test: test/test1.png"]
    ]
    assert entries["group_leak"] == [[f"part{i}", "test, train, val"] for i in range(3)]


@pytest.mark.parametrize(
    ("line", "kind"), [("0 0.5 0.5 0.25 0.5", ""), ("0 0.9 0.5 0.5 0.5", "out_of_image"), ("0 x", "bad_labels")]
)
def test_boxes_that_leave_their_image_are_told_from_other_bad_labels(tmp_path: Path, line: str, kind: str) -> None:
    root = tmp_path / "set"
    for number, split in enumerate(SPLITS):
        for i in range(2):
            write(root / "images" / split / f"{i}.png", texture(10 * number + i))
            (root / "labels" / split).mkdir(parents=True, exist_ok=True)
            (root / "labels" / split / f"{i}.txt").write_text("0 0.5 0.5 0.25 0.5\n", encoding="utf-8")
    (root / "labels" / "val" / "1.txt").write_text(line, encoding="utf-8")
    names = "".join(f"{split}: images/{split}\n" for split in SPLITS)
    (root / "data.yaml").write_text(f"{names}names: [pore]\n", encoding="utf-8")
    found, code = checked(root)
    assert (kinds(found), code) == (({kind: True}, 3) if kind else ({}, 0))
    assert found["instances"] == (5 if kind else 6)


def test_the_page_holds_all_it_shows(tmp_path: Path) -> None:
    root = make_set(tmp_path / "set")
    resaved(root)
    cut(root / "val" / "images" / "val1.png")
    page = tmp_path / "pages" / "check.html"
    assert check(root, "--html", str(page)).exit_code == 3
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"https?://|<script|<link rel=\"stylesheet|url\(", text)
    assert text.count('src="data:image/png;base64,') == text.count("<img") == 2  # the contact sheet, and the pair
    for said in ("Would spoil a study: 1 of 9 images can&#39;t be read", "val1.png", "3 / 2 / 3",
                 "1 pair of images that look the same", "objects smaller than a cell"):  # fmt: skip
        assert said in text, said
    assert "can't be written" in check(root, "--out", str(root / "classes.txt" / "page.html")).stderr


@pytest.mark.parametrize("deep", [False, True])
def test_a_set_of_which_nothing_can_be_read_has_its_page_too(tmp_path: Path, deep: bool) -> None:
    root = make_set(tmp_path / "set", each=1)
    for split in SPLITS:
        image = root / split / "images" / f"{split}0.png"
        if deep:
            write(image, np.full((SIDE, SIDE), 700, np.uint16))  # one grey level: no window can be set
        else:
            image.write_bytes(b"no image")
    found, code = checked(root, "--html", str(tmp_path / "page.html"))
    assert (tmp_path / "page.html").is_file()
    assert (code, kinds(found)) == ((3, {"copy_leak": True}) if deep else (3, {"unreadable_image": True}))


def test_extract_notes_the_same_bytes_in_two_splits(tmp_path: Path) -> None:
    root = make_set(tmp_path / "set")
    copied(root)
    arguments = "extract --backbone test_efficientnet --random-init --levels stride32 --quiet --json --data".split()
    result = CliRunner().invoke(cli, ["--workspace", str(tmp_path), *arguments, str(root)], catch_exceptions=False)
    notes = json.loads(result.stdout)["notes"]
    assert any("1 image stands in more than one split, byte for byte: " in note for note in notes)


# ---- near copies -----------------------------------------------------------------------------------------------------


def jpeg(levels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    stream = io.BytesIO()
    Image.fromarray(levels).save(stream, "JPEG", quality=60)
    return np.asarray(Image.open(stream))


@pytest.mark.parametrize(
    "change",
    [
        jpeg,
        lambda levels: np.asarray(Image.fromarray(levels).resize((200, 150))),
        lambda levels: (0.6 * levels + 20).astype(np.uint8),
        lambda levels: levels.astype(np.uint16) * 100,
        lambda levels: np.stack([levels] * 3, axis=2),
    ],
)
@pytest.mark.parametrize("count", [6, 2 * ENOUGH])
def test_a_picture_that_was_saved_anew_is_a_near_copy(change: Callable[[Any], Any], count: int) -> None:
    pictures = [texture(seed, 160) for seed in range(count)]
    assert near_copies([look_of(levels) for levels in pictures]) == []
    looks = [look_of(levels) for levels in [*pictures, change(pictures[3])]]
    assert near_copies(looks) == [(3, count)]


def test_what_a_fixed_camera_sees_in_every_picture_makes_no_copy() -> None:
    """One part under one light, with defects of its own in each picture."""
    part, looks = texture(0, 160).astype(int), []
    for seed in range(ENOUGH):
        own = np.where(texture(seed + 1, 160) > 225, 40, 0)
        looks.append(look_of((part // 2 + 60 + own).astype(np.uint8)))
    assert near_copies(looks) == []
    assert near_copies([*looks, looks[4]]) == [(4, ENOUGH)]


def test_pictures_of_one_grey_are_copies_of_nothing() -> None:
    grey = [look_of(np.full((64, 64), level, np.uint8)) for level in range(ENOUGH)]
    assert near_copies(grey) == near_copies(grey[:3]) == near_copies(grey[:1]) == near_copies([]) == []


def test_many_pictures_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = [look_of(texture(seed % 30, 64)) for seed in range(40)]
    wanted = [(i, i + 30) for i in range(10)]
    assert near_copies(looks) == wanted
    monkeypatch.setattr("featprobe.datasets.duplicates.CHUNK", 7)
    assert near_copies(looks) == wanted


def test_a_split_that_is_written_tells_of_copies_across_it(tmp_path: Path) -> None:
    root = make_set(tmp_path / "set")
    resaved(root, "train")
    cut(root / "val/images/val1.png")
    pair = ["train/train0.png", "train/train1.png"]

    def split(name: str, *more: str) -> Result:
        words = [
            "--workspace",
            str(tmp_path),
            "data",
            "split",
            str(root),
            "--out",
            str(tmp_path / name),
            "--quiet",
            *more,
        ]
        return CliRunner().invoke(cli, words, catch_exceptions=False)

    own = json.loads(split("own.csv", "--json").stdout)
    assert own["near_copies"] == [] and own["notes"] == ["1 image can't be read"]
    found = json.loads(split("folds.csv", "--split", "image:9", "--json").stdout)
    assert found["near_copies"] == [pair]
    places = dict(line.split(",")[::2] for line in (tmp_path / "folds.csv").read_text().splitlines())
    told = " and ".join(f"{name} ({places[name]})" for name in pair)
    assert (
        f"note: 1 pair of images that look the same in two splits: {told}"
        in split("again.csv", "--split", "image:9").stdout.splitlines()
    )


# ---- real sets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "images", "instances", "found"),
    [
        ("bsdata", 145, 181, {"group_leak", "near_copy_leak", "near_copies"}),
        ("deeppcb", 1050, 7151, {"group_leak"}),
        ("mt_defect", 710, None, set()),  # its near copies are pictures of one tile
        ("sandstone_xrm", 9, None, set()),
    ],
)
def test_the_real_sets(name: str, images: int, instances: int | None, found: set[str]) -> None:
    if not (REAL / name).is_dir():
        pytest.skip(f"{REAL / name} is missing (FEATPROBE_SHARED_DATA names another folder)")
    value, code = checked(REAL / name)
    assert (value["images"], value["instances"], set(kinds(value))) == (images, instances, found)
    assert code == (3 if "group_leak" in found else 0)


# ---- labels of whole images ------------------------------------------------------------------------------------------


def class_set(root: Path, splits: Sequence[str] = ("train", "train", "val", "test")) -> Path:
    """Good and dented images of parts, two of each; the split of a part."""
    shots = [
        (part, split, name, shot) for part, split in enumerate(splits) for name in ("good", "dent") for shot in (0, 1)
    ]
    for number, (part, split, name, shot) in enumerate(shots):
        write(root / split / name / f"part{part}_{shot}.png", texture(number))
    return root


def test_labels_of_images_are_counted_by_split_and_a_sound_set_ends_with_0(tmp_path: Path) -> None:
    root = class_set(tmp_path / "set")
    found, code = checked(root, "--group-from", "(part.)_")
    assert (code, found["findings"], found["tasks"], found["objects"]) == (0, [], [], None)
    assert found["labels"] == {
        split: {"dent": count, "good": count} for split, count in (("train", 4), ("val", 2), ("test", 2))
    }
    assert found["serves"] and not set(found["serves"]) & set(found["tasks"])
    said = check(root, "--html", str(tmp_path / "page.html")).stdout
    assert re.search(r"label +train +val +test\n +dent +4 +2 +2\n +good +4 +2 +2\n", said)
    assert "without objects" not in said and "Labels of images" in (tmp_path / "page.html").read_text()


def test_what_spoils_labels_of_images_is_found(tmp_path: Path) -> None:
    root = class_set(tmp_path / "set")
    shutil.copy(root / "train" / "good" / "part0_0.png", root / "train" / "dent" / "again.png")
    for path in (root / "val" / "dent").iterdir():
        path.unlink()
    shutil.copytree(root / "test" / "dent", root / "val" / "scratch")
    found, code = checked(root, "--group-from", "(part.)_")
    entries = {finding["kind"]: finding["entries"] for finding in found["findings"]}
    assert code == 3 and kinds(found)["two_labels"] and not kinds(found)["missing_label"]
    assert ["train/dent/again.png (dent)", "train/good/part0_0.png (good)"] in entries["two_labels"]
    assert {("dent", "val"), ("scratch", "train")} <= {*map(tuple, entries["missing_label"])}


def test_one_label_for_all_images_spoils_a_study(tmp_path: Path) -> None:
    root = class_set(tmp_path / "set")
    for folder in root.glob("*/dent"):
        shutil.rmtree(folder)
    found, code = checked(root)
    (only,) = [finding for finding in found["findings"] if finding["kind"] == "one_label"]
    assert code == 3 and only["spoils"] and "all images have the label good" in only["text"]


def test_groups_of_both_verdicts_in_two_splits_are_named_as_a_note(tmp_path: Path) -> None:
    found, code = checked(class_set(tmp_path / "set"), "--group-from", "_(.)")
    (mixed,) = [finding for finding in found["findings"] if finding["kind"] == "mixed_verdicts"]
    assert not mixed["spoils"]
    assert "2 groups with good and bad images stand in more than one split (0, 1)" in mixed["text"]
    assert code == 3, "the groups themselves leak"


def test_a_split_of_labels_of_images_is_written_with_its_labels(tmp_path: Path) -> None:
    root = class_set(tmp_path / "set")
    arguments = ["data", "split", str(root), "--group-from", "(part.)_", "--split", "stratified", "--json", "--quiet"]
    result = CliRunner().invoke(cli, [*arguments, "--out", str(tmp_path / "split.csv")], catch_exceptions=False)
    holders = json.loads(result.stdout)["holders"]
    assert holders == {split: {"dent": n, "good": n} for split, n in (("train", 4), ("val", 2), ("test", 2))}


def test_a_converted_set_says_what_it_can_not_keep_of_what_is_good(tmp_path: Path) -> None:
    root = class_set(tmp_path / "set")
    for folder in sorted(root.glob("*/good")):
        folder.rename(folder.with_name("ok_front"))
    (tmp_path / "featprobe.toml").write_text(f"[data.caps]\npath = '{root}'\ngood = 'ok_front'\n")
    arguments = ["--workspace", str(tmp_path), "data", "convert", "caps", "--out", str(tmp_path / "out"), "--quiet"]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0 and 'needs  good = "ok_front"' in result.stdout
