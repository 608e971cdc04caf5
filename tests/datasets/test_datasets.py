"""Data sets as people have them: COCO files, mask folders, splits, images of any depth; and what is wrong with them."""

import json
import struct
import zlib
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import recipe_of
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nst
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from featprobe.datasets import DataSet, read_data
from featprobe.datasets.formats.coco import _rle
from featprobe.datasets.images.reading import (
    bits_of,
    frame_image,
    hash_image,
    image_size,
    read_levels,
    to_unit,
    training_window,
)
from featprobe.datasets.objects import polygon_instance
from featprobe.datasets.samples import Sample
from featprobe.datasets.splits import SHARES, carve_validation, complete_splits, split_by_group
from featprobe.errors import DataError, OutOfImageError
from featprobe.geometry import place
from featprobe.intensity import Intensity
from featprobe.stages.extraction.survey import choose_intensity, survey
from featprobe.targets import Instance, Target, decode_rle, decode_window, encode_rle, semantic_from_instances

HEIGHT, WIDTH = SIZE = (12, 16)
SPLITS = ("train", "val", "test")
FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


# ---- COCO ------------------------------------------------------------------------------------------------------------


def picture(path: Path, size: tuple[int, int] = SIZE) -> None:
    """An 8-bit grey image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.arange(size[0] * size[1], dtype=np.uint8).reshape(size)).save(path)


def square(top: int, left: int, side: int) -> NDArray[np.bool_]:
    mask = np.zeros(SIZE, dtype=bool)
    mask[top : top + side, left : left + side] = True
    return mask


def polygon(top: int, left: int, side: int) -> list[list[int]]:
    return [[left, top, left + side, top, left + side, top + side, left, top + side]]


def uncompressed(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """COCO's run lengths as a list: column by column, beginning with the background."""
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges.tolist(), len(flat)]).tolist()
    return {"size": list(mask.shape), "counts": [0, *runs] if flat[0] else runs}


def annotation(segmentation: Any = None, **more: Any) -> dict[str, Any]:
    return {"id": 7, "image_id": 1, "category_id": 3, "segmentation": segmentation, **more}


def coco(annotations: list[dict[str, Any]], images: list[dict[str, Any]] | None = None, **more: Any) -> dict[str, Any]:
    entry = {"id": 1, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}
    categories = [{"id": 3, "name": "pore"}, {"id": 9, "name": "crack"}]
    return {"images": images or [entry], "annotations": annotations, "categories": categories, **more}


def write_json(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def three_splits(root: Path, train: dict[str, Any]) -> Path:
    """A set whose training file is given; val and test hold an image each without any annotation."""
    write_json(root / "annotations" / "train.json", train)
    picture(root / "images" / "a.png")
    for split in ("val", "test"):
        write_json(root / "annotations" / f"{split}.json", coco([], [{"id": 1, "file_name": f"{split}.png"}]))
        picture(root / "images" / f"{split}.png")
    return root


def target_of(root: Path, annotations: list[dict[str, Any]], size: tuple[int, int] = SIZE) -> Target:
    """The labels of the one training image of a set with these annotations."""
    data = read_data("set", three_splits(root, coco(annotations)))
    return data.read_target(data.in_split("train")[0], size)


def test_the_three_forms_of_a_mask_are_the_same_mask(tmp_path: Path) -> None:
    forms = [polygon(2, 3, 5), uncompressed(square(2, 3, 5)), encode_rle(square(2, 3, 5))]
    targets = [target_of(tmp_path / str(i), [annotation(form)]) for i, form in enumerate(forms)]
    for target in targets:
        assert target.semantic is not None and target.instances is not None
        assert np.array_equal(target.semantic, square(2, 3, 5))
        assert target.instances[0].box_xyxy == (3, 2, 8, 7)
        assert target.instances[0].category == 1
        assert target.instances[0].rle == encode_rle(square(2, 3, 5))


def test_the_parts_of_one_object_are_joined(tmp_path: Path) -> None:
    target = target_of(tmp_path, [annotation(polygon(0, 0, 3) + polygon(6, 8, 4))])
    assert np.array_equal(target.semantic, square(0, 0, 3) | square(6, 8, 4))


@pytest.mark.parametrize("small_first", [True, False])
def test_the_smaller_of_two_lies_on_top_in_whichever_order_they_stand(tmp_path: Path, small_first: bool) -> None:
    pair = [annotation(polygon(3, 3, 3), category_id=9), annotation(polygon(1, 1, 9))]
    target = target_of(tmp_path, pair if small_first else pair[::-1])
    assert np.array_equal(target.semantic, square(1, 1, 9) + square(3, 3, 3).astype(np.uint8))


def test_a_crowd_is_ignored_and_a_single_object_on_it_is_not(tmp_path: Path) -> None:
    target = target_of(tmp_path, [annotation(polygon(0, 0, 8), iscrowd=1), annotation(polygon(2, 2, 2))])
    assert target.semantic is not None and target.instances is not None
    assert Counter(target.semantic.ravel().tolist()) == {255: 60, 1: 4, 0: HEIGHT * WIDTH - 64}
    assert [instance.crowd for instance in target.instances] == [True, False]


def test_boxes_without_masks_serve_detection_only(tmp_path: Path) -> None:
    data = read_data("set", three_splits(tmp_path, coco([annotation(bbox=[1, 2, 3, 4])])))
    target = data.read_target(data.in_split("train")[0], SIZE)
    assert data.tasks == ("detect",)
    assert target.semantic is None and target.instances is not None
    assert target.instances[0].box_xyxy == (1, 2, 4, 6)


def test_a_category_called_background_is_class_0(tmp_path: Path) -> None:
    categories = [{"id": 1, "name": "crack"}, {"id": 0, "name": "Background"}]
    data = read_data("set", write_json(tmp_path / "all.json", folds(coco([], categories=categories))))
    assert data.classes == ("background", "crack")


def folds(value: dict[str, Any], count: int = 5, **fields: Any) -> dict[str, Any]:
    """The same file with images of as many groups as splits need."""
    images = [{"id": i, "file_name": f"p{i}.png", "height": HEIGHT, "width": WIDTH, **fields} for i in range(count)]
    return {**value, "images": images}


@pytest.mark.parametrize(
    "names",
    [
        ["annotations/train.json", "annotations/val.json", "annotations/test.json"],
        ["annotations/instances_train2017.json", "annotations/instances_val2017.json", "instances_test.json"],
        ["train/_annotations.coco.json", "valid/_annotations.coco.json", "test/_annotations.coco.json"],
        ["Training/all.json", "VAL/all.json", "testing/all.json"],
        ["set-training.json", "set-validation.json", "set-test.json"],
    ],
)
def test_the_split_is_named_by_the_files_stem_or_folder(tmp_path: Path, names: list[str]) -> None:
    for name, split in zip(names, SPLITS, strict=True):
        write_json(tmp_path / name, coco([], [{"id": 1, "file_name": f"{split}.png"}]))
    data = read_data("set", tmp_path)
    assert {sample.id: sample.split for sample in data.samples} == {f"{split}.png": split for split in SPLITS}


def test_a_folder_above_the_set_does_not_name_its_split(tmp_path: Path) -> None:
    """`/scans/training/all.json` is no set of training images only."""
    for root in (write_json(tmp_path / "training" / "all.json", folds(coco([]))), tmp_path / "training"):
        assert {sample.split for sample in read_data("set", root).samples} == set(SPLITS)


def test_images_may_carry_their_split_and_group(tmp_path: Path) -> None:
    images = [{"id": i, "file_name": f"{s}{i}.png", "split": s, "group": i % 3} for i, s in enumerate(SPLITS * 2)]
    data = read_data("set", write_json(tmp_path / "all.json", coco([], images)))
    assert [sample.split for sample in data.samples] == list(SPLITS * 2)
    assert [sample.group for sample in data.samples] == ["0", "1", "2"] * 2


def test_an_image_without_a_group_is_its_own(tmp_path: Path) -> None:
    data = read_data("set", write_json(tmp_path / "all.json", folds(coco([]), group=None)))
    assert [sample.group for sample in data.samples] == [sample.id for sample in data.samples]


def test_images_of_one_name_in_two_splits_are_told_apart(tmp_path: Path) -> None:
    for split in SPLITS:
        write_json(tmp_path / "annotations" / f"{split}.json", coco([]))
        picture(tmp_path / split / "a.png")
    data = read_data("set", tmp_path)
    assert [sample.id for sample in data.samples] == ["a.png", "train/a.png", "val/a.png"]
    assert {sample.image for sample in data.samples} == {tmp_path / split / "a.png" for split in SPLITS}


def test_a_file_that_two_splits_list_is_told_as_a_leak(tmp_path: Path) -> None:
    for split in SPLITS:
        write_json(tmp_path / "annotations" / f"{split}.json", coco([], [{"id": 1, "file_name": f"{split}.png"}]))
        picture(tmp_path / "images" / f"{split}.png")
    write_json(tmp_path / "annotations" / "val.json", coco([], [{"id": 1, "file_name": "train.png"}]))
    data = read_data("set", tmp_path)
    assert [sample.image.name for sample in data.samples] == ["test.png", "train.png", "train.png"]
    assert any("leaks: 1 of 2 groups" in note for note in data.notes)


def test_images_are_found_where_exporters_put_them(tmp_path: Path) -> None:
    for place_of in ("images/{}", "images/train/{}", "{}", "train2017/{}", "annotations/{}"):
        root = tmp_path / place_of.format("x").replace("/", "-")
        picture(root / place_of.format("a.png"))
        write_json(root / "annotations" / "train.json", coco([]))
        write_json(root / "annotations" / "val.json", coco([], [{"id": 1, "file_name": "b.png"}]))
        write_json(root / "annotations" / "test.json", coco([], [{"id": 1, "file_name": "c.png"}]))
        assert read_data("set", root).in_split("train")[0].image == root / place_of.format("a.png")


def test_images_of_cvat_lie_in_a_folder_of_the_subset(tmp_path: Path) -> None:
    images = [{"id": i, "file_name": f"part {i}.png"} for i in range(3)]
    write_json(tmp_path / "annotations" / "instances_default.json", coco([], images))
    for i in range(3):
        picture(tmp_path / "images" / "default" / f"part {i}.png")
    assert all(sample.image.is_file() for sample in read_data("set", tmp_path).samples)


def refusal(root: Path, *annotations: dict[str, Any], size: tuple[int, int] = SIZE) -> str:
    """The message that the labels of an image with these annotations are refused with; it names file and image."""
    with pytest.raises(DataError) as error:
        target_of(root, list(annotations), size)
    text = str(error.value)
    assert "train.json" in text and "a.png" in text
    return text


def test_a_box_outside_of_the_image_is_named_with_both(tmp_path: Path) -> None:
    text = refusal(tmp_path, annotation(bbox=[10, 2, 9, 4]))
    assert "annotation 7" in text and "x2 <= 16" in text and "10, 2, 19, 6" in text


def test_a_box_that_passes_the_edge_by_rounding_is_clipped(tmp_path: Path) -> None:
    target = target_of(tmp_path, [annotation(bbox=[-0.5, 11.2, 16.9, 1.3])])
    assert target.instances is not None
    assert target.instances[0].box_xyxy == (0.0, 11.2, 16.0, 12.0)


def test_an_annotation_of_another_size_than_the_image_is_refused(tmp_path: Path) -> None:
    assert "wanted  24x16" in refusal(tmp_path, size=(24, 16))


@pytest.mark.parametrize(
    ("segmentation", "said"),
    [
        (polygon(3, 3, 14), "leaves the image"),
        ([[1, 1, float("nan"), 5, 6, 6]], "wanted finite numbers"),
        ([[1, 1, float("inf"), 5, 6, 6]], "wanted finite numbers"),
        ([[2, 2, 5, 5]], "a polygon of 4 numbers"),
        ([[1, 1, 5, 5, 9, 9, 3]], "a polygon of 7 numbers"),
        ([[]], "a polygon of 0 numbers"),
        ([["a", "b", "c", "d", "e", "f"]], "wanted numbers"),
        ([1, 2, 3, 4, 5, 6], "can't be read"),
        ("a string", "can't be read"),
        ({"counts": [HEIGHT * WIDTH]}, "can't be read"),
        ({"size": [HEIGHT, WIDTH]}, "can't be read"),
        ({"size": [HEIGHT, WIDTH], "counts": None}, "can't be read"),
        ({"size": [WIDTH, HEIGHT], "counts": [HEIGHT * WIDTH]}, "has another size"),
        ({"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH - 1]}, "covers 191 pixels, wanted 192"),
        ({"size": [HEIGHT, WIDTH], "counts": [-8, HEIGHT * WIDTH + 8]}, "covers 192 pixels"),
        ({"size": [HEIGHT, WIDTH], "counts": ["x"]}, "wanted a whole number"),
        ({"size": [HEIGHT, WIDTH], "counts": encode_rle(square(2, 3, 5))["counts"][:-1]}, "damaged"),
        ({"size": [HEIGHT, WIDTH], "counts": "\0" + encode_rle(square(2, 3, 5))["counts"]}, "damaged"),
        ({"size": [HEIGHT, WIDTH], "counts": "é" * 20}, "damaged"),
    ],
)
def test_a_damaged_mask_is_named_and_never_decoded(tmp_path: Path, segmentation: Any, said: str) -> None:
    assert said in refusal(tmp_path, annotation(segmentation))


def test_a_zero_byte_does_not_hide_that_pixels_are_missing(tmp_path: Path) -> None:
    """pycocotools stops at it and would leave the mask's last pixels as whatever lay in memory."""
    runs = [100, 20, HEIGHT * WIDTH - 124]  # a zero byte, read as a difference of -16 to 20, would be the last four
    short = coco_mask.frPyObjects({"size": [1, sum(runs)], "counts": runs}, 1, sum(runs))["counts"].decode()
    assert "holds the byte 0" in refusal(tmp_path, annotation({"size": [HEIGHT, WIDTH], "counts": f"{short}\0"}))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"bbox": [1, 2, 3]}, "wanted 4 numbers"),
        ({"bbox": "box"}, "wanted 4 numbers"),
        ({"bbox": [1, 2, float("nan"), 3]}, "wanted 4 finite numbers"),
        ({"bbox": [5, 5, -2, 3]}, "the box is empty or leaves the image"),
        ({"category_id": 4, "bbox": [1, 2, 3, 4]}, "category 4 is not listed. Known: 3, 9"),
        ({}, "neither a box nor a mask"),
    ],
)
def test_an_annotation_that_means_nothing_is_named(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    assert said in refusal(tmp_path, annotation(**fields))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (["images"], "not COCO JSON"),
        ({"images": [], "annotations": []}, "lists called images, annotations, categories"),
        (coco([{"id": 1, "category_id": 3}]), "annotations[0]"),
        (coco([], [{"file_name": "a.png"}]), "images[0]"),
        (coco([], ["a.png"]), "images[0]"),  # type: ignore[list-item]
        (coco([], categories=[{"id": 3}]), "categories[0]"),
        (coco([annotation(image_id=5)]), "does not list: 5"),
        (coco([], [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "a.png"}]), "a.png twice"),
        (coco([], [{"id": 1, "file_name": "a.png"}, {"id": 1, "file_name": "b.png"}]), "same id"),
        (coco([], categories=[{"id": i, "name": f"c{i}"} for i in range(300)]), "at most 254"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_named(tmp_path: Path, value: Any, said: str) -> None:
    path = write_json(tmp_path / "train.json", value)
    with pytest.raises(DataError) as error:
        read_data("set", path)
    assert said in str(error.value)


def test_broken_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "all.json").write_text('{"images": [')
    with pytest.raises(DataError, match=r"all\.json can't be read as JSON"):
        read_data("set", tmp_path)


def test_files_that_disagree_on_categories_are_both_named(tmp_path: Path) -> None:
    three_splits(tmp_path, coco([]))
    write_json(tmp_path / "annotations" / "val.json", coco([], categories=[{"id": 3, "name": "scratch"}]))
    with pytest.raises(DataError) as error:
        read_data("set", tmp_path)
    assert all(text in str(error.value) for text in ("val.json", "test.json", "scratch", "pore"))


def test_a_missing_image_is_named_when_it_is_looked_at(tmp_path: Path) -> None:
    three_splits(tmp_path, coco([]))
    (tmp_path / "images" / "a.png").unlink()
    with pytest.raises(DataError, match=r"images/a\.png can't be read: No such file"):
        survey(read_data("set", tmp_path), workers=1, skip_bad=False, quiet=True)


def test_what_is_no_data_set_is_answered_with_what_would_be(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(DataError, match=r"found   notes\.txt\n  wanted  images and their labels, in a format that "):
        read_data("set", tmp_path)
    for name, layout in (("folders", "images/ and masks/"), ("coco", "COCO JSON")):
        with pytest.raises(DataError, match=rf"found   notes\.txt\n  wanted  {layout}"):
            read_data("set", tmp_path, name)
    with pytest.raises(DataError, match="no folder or file"):
        read_data("set", tmp_path / "nowhere")


masks = nst.arrays(np.bool_, st.tuples(st.integers(1, 40), st.integers(1, 40)))


@given(mask=masks)
def test_a_mask_comes_back_from_rle(mask: NDArray[np.bool_]) -> None:
    assert np.array_equal(decode_rle(encode_rle(mask)), mask)
    for form in (encode_rle(mask), uncompressed(mask)):
        rle = _rle(form, mask.shape, "here")  # type: ignore[arg-type]
        assert rle is not None and np.array_equal(decode_rle(rle), mask)


@settings(max_examples=250, deadline=None)
@given(mask=masks, edit=st.tuples(st.floats(0, 1), st.integers(0, 3), st.text(max_size=6)), plain=st.booleans())
@example(mask=np.ones((1, 1), dtype=bool), edit=(0.0, 0, "\0"), plain=False)
def test_a_damaged_rle_is_refused_or_is_a_mask_of_the_image(
    mask: NDArray[np.bool_], edit: tuple[float, int, str], plain: bool
) -> None:
    """Cutting and inserting in the string; what passes is decoded by pycocotools, which would crash on a bad one."""
    counts = str(encode_rle(mask)["counts"])
    share, cut, text = edit
    start = int(share * len(counts))
    text = "".join(chr(48 + ord(c) % 64) for c in text) if plain else text
    damaged = counts[:start] + text + counts[start + cut :]
    try:
        rle = _rle({"size": list(mask.shape), "counts": damaged}, mask.shape, "here")  # type: ignore[arg-type]
    except DataError:
        return
    decoded = decode_rle(rle)  # type: ignore[arg-type]
    area = sum(runs_of(damaged)[1::2])
    assert decoded.shape == mask.shape and int(decoded.sum()) == area


def runs_of(counts: str) -> list[int]:
    """Run lengths of a compressed RLE, as COCO's maskApi.c reads them."""
    runs: list[int] = []
    position = 0
    while position < len(counts):
        value = shift = 0
        while True:
            bits = ord(counts[position]) - 48
            value |= (bits & 31) << shift
            shift, position = shift + 5, position + 1
            if not bits & 32:
                break
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    return runs


@given(mask=masks, margins=st.tuples(*[st.integers(0, 70)] * 4))
def test_a_mask_is_what_its_window_holds(mask: NDArray[np.bool_], margins: tuple[int, int, int, int]) -> None:
    whole = np.pad(mask, (margins[:2], margins[2:]))
    window, shown = decode_window(encode_rle(whole))
    found = np.zeros_like(whole)
    found[window] = shown
    assert np.array_equal(found, whole)
    assert (
        all(edge.any() for edge in (shown[0], shown[-1], shown[:, 0], shown[:, -1])) if mask.any() else shown.size == 0
    )


@given(rows=st.integers(1, 7), runs=st.lists(st.integers(0, 9), min_size=1, max_size=12))
def test_a_window_holds_a_mask_of_any_runs_empty_ones_too(rows: int, runs: list[int]) -> None:
    size = rows, -(-max(1, sum(runs)) // rows)
    runs = [*runs, rows * size[1] - sum(runs)]
    counts = coco_mask.frPyObjects({"size": size, "counts": runs}, *size)["counts"].decode()
    window, shown = decode_window({"size": list(size), "counts": counts})
    found = np.zeros(size, dtype=bool)
    found[window] = shown
    assert np.array_equal(found, np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(size, order="F"))


@pytest.mark.parametrize("place", range(6))
def test_a_polygon_of_no_number_is_out_of_its_image(place: int) -> None:
    points = np.array([[1.0, 1.0], [5.0, 1.0], [5.0, 5.0]])
    points.flat[place] = np.nan
    with pytest.raises(OutOfImageError):
        polygon_instance(1, [points], (20, 20), "here")


@given(seed=st.integers(0, 999), count=st.integers(1, 6))
def test_painting_order_depends_on_area_alone(seed: int, count: int) -> None:
    """Every pixel belongs to the smallest object that covers it."""
    rng = np.random.default_rng(seed)
    found = [rng.random((9, 9)) < rng.uniform(0.1, 0.9) for _ in range(count)]
    areas = [int(mask.sum()) for mask in found]
    if len(set(areas)) < count:
        return
    instances = [Instance(i + 1, (0, 0, 9, 9), encode_rle(mask)) for i, mask in enumerate(found)]
    painted = semantic_from_instances(instances, (9, 9))
    wanted = np.zeros((9, 9), dtype=int)
    for y, x in np.ndindex(9, 9):
        covering = [i for i in range(count) if found[i][y, x]]
        wanted[y, x] = 1 + min(covering, key=lambda i: areas[i]) if covering else 0
    assert np.array_equal(painted, wanted)  # type: ignore[arg-type]
    assert all(np.array_equal(coco_mask.decode(i.rle), m) for i, m in zip(instances, found, strict=True))


# ---- folders of masks ------------------------------------------------------------------------------------------------


def mask_set(root: Path, masks: dict[str, NDArray], classes: str = "", folder: str = "") -> Path:
    """images/ and masks/ of these stems; classes: lines of classes.txt."""
    for stem, mask in masks.items():
        picture(root / folder / "images" / f"{stem}.png", mask.shape)
        (root / folder / "masks").mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(root / folder / "masks" / f"{stem}.png")
    if classes:
        (root / "classes.txt").write_text(classes)
    return root


def labels_of(data: DataSet, identity: str) -> NDArray[np.uint8]:
    sample = next(sample for sample in data.samples if sample.id == identity)
    semantic = data.read_target(sample, SIZE).semantic
    assert semantic is not None
    return semantic


def grid(*values: int) -> NDArray[np.uint8]:
    return np.resize(np.array(values, dtype=np.uint8), SIZE)


def test_index_masks_are_read_as_they_are_and_255_is_ignored(tmp_path: Path) -> None:
    mask = grid(0, 1, 2, 255)
    data = read_data("set", mask_set(tmp_path, {f"p{i}": mask for i in range(3)}, "background\nscratch\ndent\n"))
    assert data.classes == ("background", "scratch", "dent")
    assert np.array_equal(labels_of(data, "p0.png"), mask)
    assert data.tasks == ("semseg",)


def test_a_palette_mask_gives_indices_and_not_colours(tmp_path: Path) -> None:
    mask_set(tmp_path, {f"p{i}": grid(0, 1) for i in range(3)}, "background\nscratch\ndent\n")
    image = Image.fromarray(grid(0, 2, 1), "P")
    image.putpalette([250, 10, 10, 3, 200, 7, 99, 98, 97] + [0] * (256 - 3) * 3)
    image.save(tmp_path / "masks" / "p1.png")
    assert np.array_equal(labels_of(read_data("set", tmp_path), "p1.png"), grid(0, 2, 1))


def test_masks_of_0_and_255_throughout_mean_one_class(tmp_path: Path) -> None:
    data = read_data("set", mask_set(tmp_path, {"a": grid(0, 255), "b": grid(0), "c": grid(255)}))
    assert data.classes == ("background", "defect")
    assert np.array_equal(labels_of(data, "a.png"), grid(0, 1))
    assert np.array_equal(labels_of(data, "c.png"), grid(1))


def test_a_mask_of_1_and_255_makes_255_mean_ignore_in_the_whole_set(tmp_path: Path) -> None:
    data = read_data("set", mask_set(tmp_path, {"a": grid(0, 255), "b": grid(0, 1, 255), "c": grid(0, 1)}))
    assert np.array_equal(labels_of(data, "a.png"), grid(0, 255))
    said = "1 mask holds 255 and no class (masks/a.png): it is ignored, as by 1 and 255 in one mask (masks/b.png)"
    assert said in data.notes


def test_masks_of_0_and_255_beside_masks_of_0_and_1_are_refused_with_both_names(tmp_path: Path) -> None:
    mask_set(tmp_path, {"a": grid(0, 255), "b": grid(0, 1), "c": grid(0)})
    with pytest.raises(DataError, match=r"0 and 255 in masks/a\.png; 0 and 1 in masks/b\.png"):
        read_data("set", tmp_path)


@pytest.mark.parametrize("last", [0, 255])
def test_masks_of_0_and_255_beside_several_classes_are_refused_where_no_class_is_drawn(
    tmp_path: Path, last: int
) -> None:
    mask_set(tmp_path, {"a": grid(0, 255), "b": grid(0), "c": grid(last)}, "background\nscratch\ndent\n")
    with pytest.raises(DataError, match=r"(?s)3 classes are named: .*255 and no class in masks/a\.png"):
        read_data("set", tmp_path)
    Image.fromarray(grid(0, 2, 255)).save(tmp_path / "masks" / "c.png")
    assert np.array_equal(labels_of(read_data("set", tmp_path), "a.png"), grid(0, 255))


def test_masks_of_one_bit_are_read(tmp_path: Path) -> None:
    mask_set(tmp_path, {f"p{i}": grid(0, 1) for i in range(3)})
    Image.fromarray(grid(0, 1).astype(bool)).save(tmp_path / "masks" / "p1.png")
    assert np.array_equal(labels_of(read_data("set", tmp_path), "p1.png"), grid(0, 1))


def test_masks_of_16_bits_are_read_where_their_labels_fit(tmp_path: Path) -> None:
    mask_set(tmp_path, {f"p{i}": grid(0, 1) for i in range(3)})
    Image.fromarray(grid(0, 1).astype(np.uint16)).save(tmp_path / "masks" / "p1.png")
    assert np.array_equal(labels_of(read_data("set", tmp_path), "p1.png"), grid(0, 1))
    Image.fromarray(grid(0, 1).astype(np.uint16) * 300).save(tmp_path / "masks" / "p1.png")
    with pytest.raises(DataError, match=r"p1\.png holds labels up to 300"):
        labels_of(read_data("set", tmp_path), "p1.png")


def test_samples_csv_names_splits_and_groups(tmp_path: Path) -> None:
    mask_set(tmp_path, {f"p{i}": grid(0, 1) for i in range(6)})
    rows = [f"p{i}.png,{SPLITS[i % 3]},chain{i // 2}" for i in range(6)]
    (tmp_path / "samples.csv").write_text("\ufeffimage,split,group\n" + "\n".join(rows), encoding="utf-8")
    data = read_data("set", tmp_path)
    assert [sample.split for sample in data.samples] == list(SPLITS * 2)
    assert [sample.group for sample in data.samples] == ["chain0"] * 2 + ["chain1"] * 2 + ["chain2"] * 2
    assert any("leaks: 3 of 3 groups" in note for note in data.notes)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("file,split\np0.png,train\n", "columns file, split. wanted: image"),
        ("image,split\np0.png,train\n", "of some images only; without one: p1.png, p2.png"),
        ("image,split\np0.png,train\np1.png,val\np2.png,holdout\n", "names splits holdout. wanted: train, val, test"),
        ("image,split\np0.png,train\np1.png,train\np2.png,train\n", "found   train"),
        ("image,split\np0.png,val\np1.png,val\np2.png,test\n", "found   test, val"),
    ],
)
def test_a_table_that_can_not_be_used_is_refused(tmp_path: Path, table: str, said: str) -> None:
    mask_set(tmp_path, {f"p{i}": grid(0, 1) for i in range(3)})
    (tmp_path / "samples.csv").write_text(table)
    with pytest.raises(DataError) as error:
        read_data("set", tmp_path)
    assert said in str(error.value)


@pytest.mark.parametrize(("top", "separator"), [("", ";"), ("images/", "\t"), ("images\\", ",")])
def test_tables_are_read_as_spreadsheets_write_them(tmp_path: Path, top: str, separator: str) -> None:
    mask_set(tmp_path, {f"p{i}": grid(0, 1) for i in range(3)})
    rows = [["image", "split", "group"], *([f"{top}p{i}.png", SPLITS[i], f"c{i}"] for i in range(3))]
    table = "\ufeff" + "".join(separator.join(row) + "\r\n" for row in rows)
    (tmp_path / "samples.csv").write_bytes(table.encode())
    data = read_data("set", tmp_path)
    assert [(s.split, s.group) for s in data.samples] == [(SPLITS[i], f"c{i}") for i in range(3)]
    assert data.notes == ()


def test_a_table_of_folders_per_split_names_images_with_or_without_them(tmp_path: Path) -> None:
    for folder in SPLITS:
        mask_set(tmp_path, {"a": grid(0)}, folder=folder)
    (tmp_path / "samples.csv").write_text("image,group\ntrain/a.png,one\nval/images/a.png,two\na.png,other\n")
    assert [s.group for s in read_data("set", tmp_path).samples] == ["one", "two", "other"]


def test_rows_of_a_table_and_images_that_do_not_meet_are_told(tmp_path: Path) -> None:
    mask_set(tmp_path, {f"p{i}": grid(0, 1) for i in range(5)})
    (tmp_path / "samples.csv").write_text("image,group\np0.png,a\np1.png,a\np9.png,b\n")
    notes = read_data("set", tmp_path).notes
    assert "samples.csv names 1 image that is not here: p9.png" in notes
    assert "samples.csv has no row for 3 images: p2.png, p3.png, p4.png" in notes


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("part/p0.png,train\npart/p1.png,test\n", "names no image of this data set"),
        ("p0.png,train\np1.png,test\np0.png,test\n", "image 3: p0.png is there twice"),
        ("p0.png,train\n,test\n", "image 2: it has no name"),
    ],
)
def test_a_table_of_other_images_is_refused(tmp_path: Path, rows: str, said: str) -> None:
    mask_set(tmp_path, {f"p{i}": grid(0, 1) for i in range(3)})
    (tmp_path / "samples.csv").write_text("image,split\n" + rows)
    with pytest.raises(DataError) as error:
        read_data("set", tmp_path)
    assert said in str(error.value)


@pytest.mark.parametrize("twin", ["images/p1.bmp", "masks/p1.tif"])
def test_two_files_of_one_name_are_refused(tmp_path: Path, twin: str) -> None:
    mask_set(tmp_path, {f"p{i}": grid(0, 1) for i in range(3)})
    Image.fromarray(grid(1, 0)).save(tmp_path / twin)
    with pytest.raises(DataError, match="have the same name"):
        read_data("set", tmp_path)


def test_a_note_beside_a_mask_is_no_mask(tmp_path: Path) -> None:
    mask_set(tmp_path, {f"p{i}": grid(0, 1) for i in range(3)})
    (tmp_path / "masks" / "p1.txt").write_text("drawn by hand")
    assert np.array_equal(labels_of(read_data("set", tmp_path), "p1.png"), grid(0, 1))


def test_a_table_that_is_no_text_is_refused(tmp_path: Path) -> None:
    mask_set(tmp_path, {f"p{i}": grid(0, 1) for i in range(3)})
    (tmp_path / "samples.csv").write_bytes("image,group\np0.png,Gehäuse\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"samples\.csv can't be read as text: .* wanted: UTF-8"):
        read_data("set", tmp_path)


@pytest.mark.parametrize("val", ["val", "valid"])
def test_folders_per_split_keep_same_names_apart(tmp_path: Path, val: str) -> None:
    for value, folder in enumerate(("train", val, "test")):
        mask_set(tmp_path, {"a": grid(value)}, "background\nx\ny\n", folder)
    data = read_data("set", tmp_path)
    assert [(s.id, s.split) for s in data.samples] == [(f"{s}/a.png", s) for s in SPLITS]
    assert [int(labels_of(data, f"{s}/a.png").max()) for s in SPLITS] == [0, 1, 2]


def test_images_in_folders_meet_the_masks_of_the_same_folder(tmp_path: Path) -> None:
    for part in "ab":
        (tmp_path / "masks" / part).mkdir(parents=True)
    mask_set(tmp_path, {f"{part}/p{i}": grid(part == "b") for part in "ab" for i in range(2)}, "background\nx\ny\n")
    data = read_data("set", tmp_path)
    assert {s.id: int(labels_of(data, s.id).max()) for s in data.samples} == {
        "a/p0.png": 0, "a/p1.png": 0, "b/p0.png": 1, "b/p1.png": 1,
    }  # fmt: skip


def bad_mask(root: Path, spoil: str) -> None:
    path = root / "masks" / "p1.png"
    if spoil == "missing":
        path.unlink()
    elif spoil == "size":
        Image.fromarray(np.zeros((HEIGHT, WIDTH + 1), dtype=np.uint8)).save(path)
    elif spoil == "beyond":
        Image.fromarray(grid(0, 3, 255)).save(path)
    elif spoil == "coloured":
        Image.fromarray(np.zeros((*SIZE, 3), dtype=np.uint8)).save(path)
    elif spoil == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    elif spoil == "garbage":
        path.write_bytes(b"no image")


@pytest.mark.parametrize("classes", ["", "background\nscratch\ndent\n"])
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ("missing", "There is no mask"),
        ("size", "wanted  12x16 pixels (height x width)\n  found   12x17"),
        ("beyond", "holds labels [3], beyond the classes"),
        ("coloured", "is a coloured mask (RGB)"),
        ("truncated", "can't be read as a mask"),
        ("garbage", "can't be read as a mask"),
    ],
)
def test_a_bad_mask_is_named_and_may_be_set_aside(tmp_path: Path, spoil: str, said: str, classes: str) -> None:
    mask_set(tmp_path, {f"p{i}": grid(0, 1) if classes else grid(0, 255) for i in range(8)}, classes)
    bad_mask(tmp_path, spoil)
    with pytest.raises(DataError) as error:
        survey(read_data("set", tmp_path), workers=1, skip_bad=False, quiet=True)
    assert said in str(error.value) and str(tmp_path / "masks" / "p1") in str(error.value)
    looked = survey(read_data("set", tmp_path), workers=1, skip_bad=True, quiet=True)
    assert [found.sample.id for found in looked.bad] == ["p1.png"]


def test_masks_without_an_image_are_told(tmp_path: Path) -> None:
    mask_set(tmp_path, {f"p{i}": grid(0, 1) for i in range(4)})
    (tmp_path / "images" / "p3.png").unlink()
    assert any(note == "1 masks have no image: p3" for note in read_data("set", tmp_path).notes)


@pytest.mark.parametrize("classes", ["background\n", "background\nx\nx\n"])
def test_class_names_must_be_two_or_more_and_differ(tmp_path: Path, classes: str) -> None:
    mask_set(tmp_path, {f"p{i}": grid(0, 1) for i in range(3)}, classes)
    with pytest.raises(DataError, match=r"classes\.txt names"):
        read_data("set", tmp_path)


def test_empty_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        read_data("set", tmp_path)


# ---- splits ----------------------------------------------------------------------------------------------------------

group_lists = st.lists(st.integers(0, 30), min_size=3, max_size=120).map(lambda n: [f"g{i}" for i in n])


def splits_of_groups(groups: list[str], splits: list[str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for group, split in zip(groups, splits, strict=True):
        found[group].add(split)
    return found


@given(groups=group_lists, data=st.data())
def test_a_split_by_group_parts_no_group_and_depends_on_names_alone(groups: list[str], data: st.DataObject) -> None:
    if len(set(groups)) < 3:
        with pytest.raises(DataError, match="at least 3 groups"):
            split_by_group(groups)
        return
    splits = split_by_group(groups)
    assert all(len(found) == 1 for found in splits_of_groups(groups, splits).values())
    assert set(splits) == set(SPLITS)
    order = data.draw(st.permutations(range(len(groups))))
    assert split_by_group([groups[i] for i in order]) == [splits[i] for i in order]


@settings(max_examples=30)
@given(prefix=st.text(max_size=5), count=st.integers(100, 300), most=st.integers(1, 4), seed=st.integers(0, 99))
def test_shares_of_many_groups_are_near_those_asked(prefix: str, count: int, most: int, seed: int) -> None:
    sizes = np.random.default_rng(seed).integers(1, most + 1, count).tolist()
    groups = [f"{prefix}{i}" for i, size in enumerate(sizes) for _ in range(size)]
    splits = Counter(split_by_group(groups))
    for split, share in SHARES.items():
        assert abs(splits[split] / len(groups) - share) <= 2 * most / len(groups) + 1e-9


def test_the_split_by_group_is_the_same_on_every_machine_and_day() -> None:
    """The names alone decide: changing this would silently change every published score."""
    assert "".join(split[1] for split in split_by_group([f"part{i}" for i in range(20)])) == STABLE


STABLE = "erarreaaarrrerrrrrer"


def data_set(*samples: tuple[str, str]) -> DataSet:
    """A set of (group, split) samples."""
    made = tuple(Sample(f"i{i}", Path(f"i{i}"), group, split) for i, (group, split) in enumerate(samples))
    return DataSet("set", Path("set"), ("background", "x"), made, ("semseg",), lambda sample, size: Target(None, None))


def test_a_split_of_the_sets_own_that_leaks_is_kept_and_told() -> None:
    own = [("a", "train"), ("b", "train"), ("b", "test"), ("c", "val"), ("d", "test")]
    data = complete_splits(data_set(*own))
    assert [sample.split for sample in data.samples] == [split for _, split in own]
    assert data.notes == (
        "its own split leaks: 1 of 4 groups stand in more than one split (b); --split group makes one that does not",
    )


def test_a_split_that_does_not_leak_has_no_note() -> None:
    assert complete_splits(data_set(("a", "train"), ("c", "val"), ("d", "test"))).notes == ()


@given(groups=group_lists.filter(lambda names: len(set(names)) > 1), tests=st.integers(1, 9))
def test_validation_is_carved_from_train_only_and_by_group(groups: list[str], tests: int) -> None:
    own = [(group, "train") for group in groups] + [(f"t{i}", "test") for i in range(tests)]
    data = complete_splits(data_set(*own))
    splits = [sample.split for sample in data.samples]
    assert splits[len(groups) :] == ["test"] * tests
    assert set(splits[: len(groups)]) == {"train", "val"}
    assert all(len(found) == 1 for found in splits_of_groups(groups, splits[: len(groups)]).values())
    assert any(note.startswith("validation was carved from train") for note in data.notes)


def test_carving_takes_near_a_fifth_of_many_groups() -> None:
    groups = [f"g{i}" for i in range(200)]
    assert abs(carve_validation(groups, ["train"] * 200).count("val") - 40) <= 1


def test_a_set_without_test_has_its_val_scored_as_test() -> None:
    own = [(f"a{i}", "train") for i in range(10)] + [("v1", "val"), ("v2", "val")]
    data = complete_splits(data_set(*own))
    assert [sample.group for sample in data.in_split("test")] == ["v1", "v2"]
    assert len(data.in_split("val")) == 2 and len(data.in_split("train")) == 8
    assert data.notes[0] == "the set has the splits train and val only: its val is scored as test"


def test_one_training_group_can_not_give_a_validation_split() -> None:
    with pytest.raises(DataError, match="can't be split into train, val"):
        complete_splits(data_set(("a", "train"), ("a", "train"), ("t", "test")))


# ---- images ----------------------------------------------------------------------------------------------------------


def deep(size: tuple[int, int] = SIZE, seed: int = 0, low: int = 0, high: int = 65536) -> NDArray[np.uint16]:
    return np.random.default_rng(seed).integers(low, high, size, dtype=np.uint16)


@pytest.mark.parametrize("suffix", ["png", "tif", "big.tif"])
def test_16_bit_levels_are_read_without_clipping(tmp_path: Path, suffix: str) -> None:
    levels = deep()
    levels[0, 0], levels[0, 1] = 0, 65535
    path = tmp_path / f"a.{suffix}"
    big = suffix == "big.tif"
    image = (
        Image.frombytes("I;16B", (WIDTH, HEIGHT), levels.astype(">u2").tobytes()) if big else Image.fromarray(levels)
    )
    image.save(path)
    assert bits_of(path) == 16
    assert image_size(path) == SIZE
    read = read_levels(path)
    assert read.dtype == np.uint16 and np.array_equal(read, levels)
    assert np.allclose(to_unit(read, None), levels / 65535, atol=1e-6)


def test_8_bit_images_of_every_mode_become_grey_or_colour(tmp_path: Path) -> None:
    colour = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    image = Image.fromarray(colour)
    for mode, shape in {
        "L": SIZE,
        "1": SIZE,
        "LA": SIZE,
        "RGB": (*SIZE, 3),
        "RGBA": (*SIZE, 3),
        "P": (*SIZE, 3),
    }.items():
        path = tmp_path / f"{mode}.png"
        image.convert(mode).save(path)
        read = read_levels(path)
        assert read.dtype == np.uint8 and read.shape == shape and bits_of(path) == 8
    assert np.array_equal(read_levels(tmp_path / "RGB.png"), colour)
    image.convert("CMYK").save(tmp_path / "cmyk.jpg")
    assert read_levels(tmp_path / "cmyk.jpg").shape == (*SIZE, 3)


@given(
    levels=nst.arrays(np.uint16, st.integers(1, 30)),
    low=st.integers(0, 65534),
    width=st.integers(1, 65535),
)
def test_a_window_is_monotone_and_clips_to_0_and_1(levels: NDArray[np.uint16], low: int, width: int) -> None:
    window = (float(low), float(low + width))
    unit = to_unit(levels, window)
    assert unit.dtype == np.float32 and unit.min() >= 0 and unit.max() <= 1
    order = np.argsort(levels, kind="stable")
    assert (np.diff(unit[order]) >= 0).all()
    assert (unit[levels <= window[0]] == 0).all() and np.allclose(unit[levels >= window[1]], 1, atol=1e-6)
    assert np.allclose(unit, np.clip((levels - window[0]) / width, 0, 1), atol=1e-4)


@pytest.mark.parametrize("policy", ["percentile:0.01:99.99", "percentile:2:98", "percentile:0:50", "minmax"])
def test_the_window_is_the_percentile_of_all_training_pixels(tmp_path: Path, policy: str) -> None:
    pixels = [deep((40, 50), seed, 1000 * seed, 20_000 + 9000 * seed) for seed in range(4)]
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for path, levels in zip(paths, pixels, strict=True):
        Image.fromarray(levels).save(path)
    parsed = Intensity.parse(policy)
    low, high = (0.0, 100.0) if parsed.kind == "minmax" else (parsed.low, parsed.high)
    window = training_window(paths, parsed)
    assert window is not None
    everything = np.concatenate([levels.ravel() for levels in pixels])
    above = np.percentile(everything, high, method="inverted_cdf")
    below = np.percentile(everything, low, method="inverted_cdf"), np.percentile(everything, low, method="higher")
    assert window[1] == above and below[0] <= window[0] <= max(below)


def test_a_given_window_needs_no_image_and_none_means_the_number_formats() -> None:
    assert training_window([Path("nowhere.png")], Intensity.parse("window:10:200")) == (10.0, 200.0)
    assert training_window([Path("nowhere.png")], Intensity.parse("none")) is None


def test_a_window_of_one_grey_level_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full(SIZE, 77, dtype=np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"one grey level only \(77\)"):
        training_window([tmp_path / "a.png"], Intensity.parse("minmax"))


@pytest.mark.parametrize("text", ["", "percentile", "percentile:5", "percentile:9:2", "percentile:0:101", "window:a:b",
                                  "window:1:1", "window:e:+", "MINMAX"])  # fmt: skip
def test_an_intensity_policy_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="not an intensity policy"):
        Intensity.parse(text)


def deep_set(root: Path, bright: str = "") -> DataSet:
    """16-bit images in three splits; those of the split `bright` reach far higher levels."""
    mask_set(root, {f"p{i}": grid(0, 1) for i in range(9)})
    rows = ["image,split"]
    for i in range(9):
        split = SPLITS[i % 3]
        top = 60_000 if split == bright else 5000
        Image.fromarray(deep(seed=i, low=1000, high=top)).save(root / "images" / f"p{i}.png")
        rows.append(f"p{i}.png,{split}")
    (root / "samples.csv").write_text("\n".join(rows))
    return read_data("set", root)


def test_the_window_comes_from_training_images_only(tmp_path: Path) -> None:
    windows = {}
    for bright in ("", "val", "test", "train"):
        looked = survey(deep_set(tmp_path / f"set{bright}", bright), workers=1, skip_bad=False, quiet=True)
        policy, windows[bright] = choose_intensity(looked, None)
        assert str(policy) == "percentile:0.01:99.99"
    assert windows[""] == windows["val"] == windows["test"] != windows["train"]
    assert windows[""] is not None and windows[""][1] < 5000


def test_a_set_of_8_and_16_bit_images_is_refused(tmp_path: Path) -> None:
    deep_set(tmp_path)
    picture(tmp_path / "images" / "p4.png")
    looked = survey(read_data("set", tmp_path), workers=1, skip_bad=False, quiet=True)
    with pytest.raises(DataError, match="mixes 8-bit and 16-bit"):
        choose_intensity(looked, None)


def write_png_16bit(path: Path, channels: int) -> None:
    """A PNG of 16 bits per channel, by hand: PIL can't write one in colour."""
    kind = {2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + bytes(range(2 * channels * 4)) for _ in range(3))

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 4, 3, 16, kind, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def write_tiff_16bit(path: Path) -> None:
    """An RGB TIFF of 16 bits per channel, by hand."""
    data = bytes(range(3 * 4 * 6))
    fields = [
        (256, 4),
        (257, 3),
        (258, -1),
        (259, 1),
        (262, 2),
        (273, -2),
        (277, 3),
        (278, 3),
        (279, len(data)),
        (284, 1),
    ]
    after = 8 + 2 + 12 * len(fields) + 4
    out = b"II*\0" + struct.pack("<IH", 8, len(fields))
    for tag, value in fields:
        count = 3 if tag == 258 else 1
        out += struct.pack("<HHII", tag, 3 if count == 3 else 4, count, {-1: after, -2: after + 6}.get(value, value))
    path.write_bytes(out + struct.pack("<I", 0) + struct.pack("<HHH", 16, 16, 16) + data)


@pytest.mark.parametrize("kind", ["rgb.png", "rgba.png", "la.png", "rgb.tif"])
def test_16_bit_colour_is_not_clipped_to_8_bits(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    channels = {"la": 2, "rgb": 3, "rgba": 4}[path.stem]
    if kind.endswith("tif"):
        write_tiff_16bit(path)
        stored = np.arange(3 * 4 * 6, dtype=np.uint8).view("<u2").reshape(3, 4, 3)
    else:
        write_png_16bit(path, channels)
        stored = np.tile(np.arange(2 * channels * 4, dtype=np.uint8).view(">u2"), 3).reshape(3, 4, channels)
    with Image.open(path) as image:  # PIL itself reads it, as 8 bits
        assert image.size == (4, 3)
    read = read_levels(path)
    assert read.dtype == np.uint16 and bits_of(path) == 16 and image_size(path) == (3, 4)
    assert np.array_equal(read, stored[:, :, 0] if channels == 2 else stored[:, :, :3])


def test_32_bit_levels_are_read_where_they_fit_16_and_refused_where_not(tmp_path: Path) -> None:
    Image.fromarray(deep().astype(np.int32)).save(tmp_path / "a.tif")
    assert np.array_equal(read_levels(tmp_path / "a.tif"), deep())
    Image.fromarray(deep().astype(np.int32) + 40_000).save(tmp_path / "b.tif")
    with pytest.raises(DataError, match=r"b\.tif holds grey levels"):
        read_levels(tmp_path / "b.tif")


def spoiled(path: Path, how: str) -> Path:
    picture(path, (64, 64))
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "no pixels":
        header = b"IHDR" + struct.pack(">IIBBBBB", 0, 0, 8, 0, 0, 0, 0)
        path.write_bytes(data[:8] + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + data[33:])
    elif how == "text":
        path.write_text("not an image")
    elif how == "folder":
        path.unlink()
        path.mkdir()
    return path


@pytest.mark.parametrize("how", ["truncated", "empty", "no pixels", "text", "folder"])
def test_a_file_that_is_no_whole_image_is_named(tmp_path: Path, how: str) -> None:
    path = spoiled(tmp_path / "part.png", how)
    with pytest.raises(DataError) as error:
        hash_image(path)
        read_levels(path)
    assert str(path) in str(error.value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    suffix=st.sampled_from(["png", "jpg", "tif", "bmp", "webp"]),
    deep_one=st.booleans(),
    places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.floats(0.1, 1),
)
def test_a_damaged_image_is_read_or_refused_and_nothing_else(
    tmp_path: Path, suffix: str, deep_one: bool, places: list[tuple[float, int]], cut: float
) -> None:
    path = tmp_path / f"a.{suffix}"
    levels = deep() if deep_one and suffix in ("png", "tif") else deep((*SIZE, 3), 1).astype(np.uint8)
    Image.fromarray(levels).save(path)
    data = bytearray(path.read_bytes())
    for share, value in places:
        data[int(share * min(len(data), 400))] = value
    path.write_bytes(data[: max(1, int(cut * len(data)))])
    try:
        read = read_levels(path)
    except DataError as error:
        assert str(path) in str(error)
    else:
        assert read.ndim in (2, 3) and read.dtype in (np.uint8, np.uint16)


def test_letterboxing_fills_the_padding_and_leaves_the_image_alone() -> None:
    levels = np.full((20, 40), 200, dtype=np.uint8)
    framed = frame_image(levels, place((20, 40), (64, 64), "letterbox", 32), recipe_of(mean=(0.1, 0.2, 0.3)))
    assert framed.shape == (3, 64, 64) and framed.dtype == np.float32
    for channel, fill in enumerate((0.1, 0.2, 0.3)):
        assert np.allclose(framed[channel, 32:], fill)
        assert np.allclose(framed[channel, :32], 200 / 255, atol=1e-5)


def test_resizing_fills_the_asked_size_and_pads_right_and_below_only() -> None:
    recipe = recipe_of(interpolation="bilinear", mean=(0,) * 3)
    framed = frame_image(np.full((9, 7), 255, np.uint8), place((9, 7), (40, 50), "resize", 32), recipe)
    assert framed.shape == (3, 64, 64)
    assert (framed[:, :40, :50] == 1).all() and (framed[:, 40:] == 0).all() and (framed[:, :, 50:] == 0).all()


def test_grey_is_repeated_and_colour_keeps_its_order() -> None:
    recipe = recipe_of(window=(0, 65535), intensity="window:0:65535")
    grey = frame_image(deep((32, 32)), place((32, 32), (32, 32), "resize", 32), recipe)
    assert np.array_equal(grey[0], grey[1]) and np.array_equal(grey[0], grey[2])
    colour = np.zeros((32, 32, 3), dtype=np.uint8)
    colour[:] = (255, 128, 0)
    framed = frame_image(colour, place((32, 32), (32, 32), "resize", 32), recipe_of())
    assert [float(framed[c].mean()) for c in range(3)] == pytest.approx([1, 128 / 255, 0])


def test_16_bit_levels_are_resampled_at_full_depth() -> None:
    """Two levels that any 8-bit step would merge stay apart through window and resampling."""
    levels = np.full((16, 16), 30_000, dtype=np.uint16)
    levels[:, 8:] = 30_010
    recipe = recipe_of(window=(0.0, 65535.0), intensity="window:0:65535")
    framed = frame_image(levels, place((16, 16), (32, 32), "resize", 32), recipe)
    assert framed[0, 0, -1] - framed[0, 0, 0] == pytest.approx(10 / 65535, rel=1e-2)


@FEW
@given(
    original=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    asked=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    fit=st.sampled_from(["resize", "letterbox"]),
    multiple=st.sampled_from([8, 14, 32]),
)
def test_an_image_lies_in_its_frame(original: tuple[int, int], asked: tuple[int, int], fit: Any, multiple: int) -> None:
    placed = place(original, asked, fit, multiple)
    assert all(f % multiple == 0 and 0 <= f - a < multiple for f, a in zip(placed.frame, asked, strict=True))
    assert all(1 <= c <= a for c, a in zip(placed.content, asked, strict=True))
    if fit == "resize":
        assert placed.content == asked
    else:
        assert any(c == a for c, a in zip(placed.content, asked, strict=True))
        scale = min(a / o for a, o in zip(asked, original, strict=True))
        assert all(abs(c - max(1, o * scale)) <= 0.5 + 1e-9 for c, o in zip(placed.content, original, strict=True))
