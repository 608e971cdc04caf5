"""The generated data sets: their files, their masks, and that a defect is really in the picture."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from featprobe.datasets.generated import GENERATED, KINDS, View, generate, render, split_parts
from featprobe.errors import DataError

SMALL = (64, 80)
SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module", params=GENERATED)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp(request.param)
    generate(request.param, out, images=12, size=SMALL)
    return request.param, out


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read(folder: Path) -> dict[str, dict]:
    return {split: json.loads((folder / "annotations" / f"{split}.json").read_text()) for split in SPLITS}


def test_the_same_arguments_give_the_same_bytes(written: tuple[str, Path], tmp_path: Path) -> None:
    name, out = written
    generate(name, tmp_path / "again", images=12, size=SMALL)
    assert digests(out) == digests(tmp_path / "again")


def test_another_seed_gives_other_pictures_and_masks(written: tuple[str, Path], tmp_path: Path) -> None:
    name, out = written
    generate(name, tmp_path, images=12, size=SMALL, seed=1)
    first, second = digests(out), digests(tmp_path)
    assert first.keys() == second.keys()
    assert all(first[path] != second[path] for path in first)


def test_a_picture_does_not_depend_on_how_many_are_asked(written: tuple[str, Path], tmp_path: Path) -> None:
    name, out = written
    generate(name, tmp_path, images=7, size=SMALL)
    few, many = digests(tmp_path / "images"), digests(out / "images")
    assert len(few) == 7
    assert few.items() <= many.items()


def test_splits_share_no_group_and_each_has_a_defect(written: tuple[str, Path]) -> None:
    files = read(written[1])
    groups = {split: {image["group"] for image in coco["images"]} for split, coco in files.items()}
    assert all(groups.values())
    assert sum(len(names) for names in groups.values()) == len(set.union(*groups.values())) == 6
    assert all(coco["annotations"] for coco in files.values())
    ids = [image["id"] for coco in files.values() for image in coco["images"]]
    assert sorted(ids) == list(range(1, 13))


@given(parts=st.integers(3, 400), seed=st.integers(0, 99))
def test_split_parts_deals_every_part_once(parts: int, seed: int) -> None:
    split = split_parts(parts, seed)
    assert tuple(split) == SPLITS
    assert all(split.values())
    assert sorted(part for dealt in split.values() for part in dealt) == list(range(parts))


def test_the_default_set_has_24_test_parts() -> None:
    assert [len(split_parts(120, 0)[name]) for name in SPLITS] == [72, 24, 24]


def test_masks_agree_with_boxes_and_areas_and_do_not_overlap(written: tuple[str, Path]) -> None:
    name, out = written
    for coco in read(out).values():
        assert [category["name"] for category in coco["categories"]] == [kind.name for kind in KINDS[name]]
        sizes = {image["id"]: (image["height"], image["width"]) for image in coco["images"]}
        covered = {number: np.zeros(SMALL, dtype=int) for number in sizes}
        for annotation in coco["annotations"]:
            mask = coco_mask.decode(annotation["segmentation"]).astype(bool)
            assert mask.shape == sizes[annotation["image_id"]] == SMALL
            rows, columns = np.nonzero(mask)
            corner = [columns.min(), rows.min()]
            assert annotation["bbox"] == [*corner, np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert annotation["area"] == mask.sum() > 0
            assert annotation["category_id"] in (1, 2, 3)
            covered[annotation["image_id"]] += mask
        assert all(count.max() <= 1 for count in covered.values())


def test_files_have_the_promised_pixels(written: tuple[str, Path]) -> None:
    name, out = written
    for coco in read(out).values():
        for entry in coco["images"]:
            with Image.open(out / "images" / entry["file_name"]) as image:
                assert image.mode == ("I;16" if name == "xray" else "RGB")
                pixels = np.asarray(image)
            assert pixels.shape[:2] == SMALL
            if name == "xray":
                assert pixels.dtype == np.uint16
                assert 2_000 < pixels.min() < pixels.max() < 65_000
    assert "CC0" in (out / "README.txt").read_text()


def changes(name: str) -> dict[int, list[float]]:
    """Mean noise-free change of the signal over each defect's mask, by category."""
    found: dict[int, list[float]] = {1: [], 2: [], 3: []}
    for part in range(12):
        view = View(name, 0, part, 0, (128, 128))
        pixels, defects = render(view, noise=False)
        clean, none = render(view, with_defects=False, noise=False)
        assert none == []
        difference = pixels.astype(float) - clean
        for defect in defects:
            found[defect.category].append(float(difference[defect.mask].mean()))
    assert all(len(values) >= 3 for values in found.values())
    return found


def test_voids_and_cracks_let_more_through_and_inclusions_less() -> None:
    change = changes("xray")
    assert min(change[1]) > 50
    assert max(change[2]) < -50
    assert min(change[3]) > 50


@pytest.mark.parametrize("name", GENERATED)
def test_pixels_change_in_the_masks_and_hardly_elsewhere(name: str) -> None:
    for part in range(8):
        view = View(name, 0, part, 0, (128, 128))
        pixels, defects = render(view, noise=False)
        clean, _ = render(view, with_defects=False, noise=False)
        difference = np.abs(pixels.astype(float) - clean).reshape(128, 128, -1).mean(axis=2)
        marked = np.any([defect.mask for defect in defects], axis=0)
        assert difference[marked].mean() > 10 * difference[~marked].mean()


@pytest.mark.parametrize("name", GENERATED)
def test_two_views_of_a_part_differ_and_about_a_quarter_shows_no_defect(name: str) -> None:
    shown = [render(View(name, 0, part, index, (32, 32))) for part in range(40) for index in (0, 1)]
    assert all(not np.array_equal(shown[k][0], shown[k + 1][0]) for k in range(0, 80, 2))
    assert 10 <= sum(not defects for _, defects in shown) <= 30
    assert all(len(defects) <= 4 for _, defects in shown)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"name": "xrey"}, "xray"),
        ({"images": 4}, "4 images"),
        ({"size": (256, 31)}, "31"),
        ({"seed": -1}, "-1"),
    ],
)
def test_arguments_that_cannot_be_are_refused(tmp_path: Path, arguments: dict, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        generate(**({"name": "xray", "out": tmp_path / "new"} | arguments))
    assert not (tmp_path / "new").exists()


def test_an_out_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(DataError, match="not a folder"):
        generate("surface", tmp_path / "taken")
