"""What is known of images and tiles of a cache: from masks, objects, labels of images; and caches of such sets."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import PoolingBackbone, data_info, extract, make_cache, opened, recipe_of, rows_of, spy_on_writes, stored
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from featprobe.cache import Cache, Row, create_file, open_cache
from featprobe.errors import DataError, ProbeError
from featprobe.geometry import Part, Placement, tiles_of
from featprobe.image_labels import DEFECT, UNKNOWN, LabelNames
from featprobe.specs import DataInfo
from featprobe.splitting import SplitChoice
from featprobe.stages import image_truth
from featprobe.stages.extraction.parts import parts_of
from featprobe.stages.image_truth import defect_regions, truth_of, unit_names, units_of
from featprobe.stages.partition import Partition, split_notes
from featprobe.targets import (
    IGNORE,
    Instance,
    components,
    encode_instances,
    encode_semantic,
)

CLASSES = ("background", "pore", "crack")
SIDE = 24  # pixels of generated images
FOLDER = pytest.TempPathFactory


@st.composite
def masks(draw: st.DrawFn) -> np.ndarray:
    """A mask with up to three rectangles of a class or of what is ignored."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    for _ in range(draw(st.integers(0, 3))):
        top, left = draw(st.integers(0, SIDE - 1)), draw(st.integers(0, SIDE - 1))
        height, width = draw(st.integers(1, SIDE - top)), draw(st.integers(1, SIDE - left))
        mask[top : top + height, left : left + width] = draw(st.sampled_from([1, 2, IGNORE, 1, 2]))
    return mask


SETS = st.lists(masks(), min_size=1, max_size=4)


def whole(mask: np.ndarray, number: int, *, masked: bool, objects: bool) -> Row:
    """The row of a whole image with its mask, its objects, or both."""
    own = components(mask, len(CLASSES)) if objects else None
    return replace(
        rows_of(number + 1)[number],
        placement=Placement((SIDE, SIDE), (SIDE, SIDE), (SIDE, SIDE)),
        semantic=encode_semantic(mask if masked else None),
        instances=encode_instances(own),
    )


def cache_of(folder: Path, drawn: Sequence[np.ndarray], tile: int | None = None, **kinds: bool) -> Cache:
    """A cache, without features, of images with these masks; in tiles where a side is given."""
    kinds = {"masked": True, "objects": False} | kinds
    images = [whole(mask, number, **kinds) for number, mask in enumerate(drawn)]
    tasks = ("semseg",) * kinds["masked"] + ("detect",) * kinds["objects"]
    data = DataInfo("set", "set", CLASSES, tasks, "f" * 64)
    if tile is None:
        return make_cache(folder / "whole.h5", recipe_of(frame=(SIDE, SIDE)), images, data)
    recipe = recipe_of(frame=(16, 16), version=2, tile=tile, overlap=0, views=("identity", "hflip"))
    rows = [part for i, image in enumerate(images) for part in parts_of(image, recipe, 16, i)]
    assert create_file(folder / "tiles.h5", recipe, data, rows, {}, images)
    return open_cache(folder / "tiles.h5")


@settings(max_examples=40, deadline=None)
@given(drawn=SETS)
def test_truth_from_masks_is_that_from_their_objects_and_that_of_the_pixels(
    drawn: list, tmp_path_factory: FOLDER
) -> None:
    folder = tmp_path_factory.mktemp("truth")
    of_masks = cache_of(folder, drawn)
    of_objects = cache_of(tmp_path_factory.mktemp("truth"), drawn, masked=False, objects=True)
    for labels in ("defect", "classes"):
        one, other = (truth_of(cache, labels, "image") for cache in (of_masks, of_objects))
        assert one.names == other.names and np.array_equal(one.values, other.values)
    present = np.array([[(mask == kind).any() for kind in (1, 2)] for mask in drawn])
    ignored = np.array([(mask == IGNORE).any() for mask in drawn]) & ~present.any(1)
    classes, defect = truth_of(of_masks, "classes", "image"), truth_of(of_masks, "defect", "image")
    assert classes.names == LabelNames(("pore", "crack"), multi=True) and defect.names == DEFECT
    assert np.array_equal(classes.known, ~ignored) and np.array_equal(classes.values[~ignored], present[~ignored])
    assert np.array_equal(defect.good, np.where(ignored, UNKNOWN, ~present.any(1)))
    assert np.array_equal(classes.good, defect.good)


@settings(max_examples=40, deadline=None)
@given(drawn=SETS, tile=st.integers(7, 16))
def test_the_truth_of_tiles_together_is_that_of_their_image(drawn: list, tile: int, tmp_path_factory: FOLDER) -> None:
    cache = cache_of(tmp_path_factory.mktemp("tiles"), drawn, tile)
    shown = np.flatnonzero(np.array(cache.rows.column("view")) == "identity")
    for labels in ("defect", "classes"):
        of_tiles, of_images = truth_of(cache, labels, "tile"), truth_of(cache, labels, "image")
        assert len(of_tiles.values) == len(cache) and len(of_images.values) == len(drawn)
        for image in range(len(drawn)):
            rows = shown[cache.image_of[shown] == image]
            own = of_tiles.values[rows]
            known = own[of_tiles.known[rows]]
            joined = known.max(0, initial=0) if labels == "classes" else known[:, 1].max(initial=0)
            found = of_images.values[image] if labels == "classes" else of_images.values[image][1]
            if of_images.known[image]:
                assert np.array_equal(joined, found)
            else:
                assert not np.any(joined) and not of_tiles.known[rows].all()
        others = np.setdiff1d(np.arange(len(cache)), shown)
        assert not of_tiles.known[others].any(), "another view takes no part"


@settings(max_examples=30, deadline=None)
@given(drawn=SETS, tile=st.integers(7, 16))
def test_regions_of_defects_are_the_pixels_of_masks_in_images_and_tiles(
    drawn: list, tile: int, tmp_path_factory: FOLDER
) -> None:
    cache = cache_of(tmp_path_factory.mktemp("regions"), drawn, tile)
    for image, mask in enumerate(drawn):
        defect, ignored = defect_regions(cache, image, "image") or (None, None)
        assert np.array_equal(defect, (mask > 0) & (mask < IGNORE)) and np.array_equal(ignored, mask == IGNORE)
    for row, part in ((row, cache.rows.part_of(row)) for row in range(len(cache))):
        defect, ignored = defect_regions(cache, row, "tile") or (None, None)
        shown = part.take(drawn[cache.image_of[row]])
        assert np.array_equal(defect, (shown > 0) & (shown < IGNORE)) and np.array_equal(ignored, shown == IGNORE)


def test_boxes_are_filled_crowds_ignored_and_a_row_without_labels_is_unknown(tmp_path: Path) -> None:
    own = (Instance(1, (2.5, 3.0, 6.0, 5.2)), Instance(2, (5.0, 4.0, 9.0, 9.0), crowd=True))
    rows = [
        replace(row, semantic=b"", instances=encode_instances(objects) if objects is not None else b"",
                placement=Placement((12, 12), (32, 32), (32, 32)))
        for row, objects in zip(rows_of(4), [own, (), own[1:], None], strict=True)
    ]  # fmt: skip
    cache = make_cache(tmp_path / "boxes.h5", rows=rows, data=replace(data_info(), classes=CLASSES, tasks=("detect",)))
    assert truth_of(cache, "defect", "image").good.tolist() == [0, 1, UNKNOWN, UNKNOWN]
    assert truth_of(cache, "classes", "image").values.tolist() == [[1, 0], [0, 0], [UNKNOWN] * 2, [UNKNOWN] * 2]
    defect, ignored = defect_regions(cache, 0, "image") or (None, None)
    wanted = np.zeros((2, 12, 12), bool)
    wanted[0, 3:6, 2:6] = True
    wanted[1, 4:9, 5:9] = True
    assert np.array_equal(defect, wanted[0]) and np.array_equal(ignored, wanted[1] & ~wanted[0])
    assert defect_regions(cache, 3, "image") is None


def test_labels_are_decoded_once_for_all_splits_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_of(tmp_path, [np.eye(SIDE, dtype=np.uint8)] * 3)
    read: list[int] = []
    plain = Cache.image_semantic
    monkeypatch.setattr(Cache, "image_semantic", lambda self, image: (read.append(image), plain(self, image))[1])
    regrouped = Cache(cache.path, replace(cache.contents, rows=cache.rows.grouped(["a", "a", "b"])))
    for one in (cache, regrouped):
        for labels in ("defect", "classes", "defect"):
            truth_of(one, labels, "image")
    assert read == [0, 1, 2]
    assert unit_names(regrouped, np.array([2, 0]), "image") == (["part2.png", "part0.png"], ["b", "a"])


def test_units_are_images_or_rows(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, [np.zeros((SIDE, SIDE), np.uint8)] * 2, 12)
    rows = np.arange(len(cache))
    assert np.array_equal(units_of(cache, rows, "tile"), rows)
    assert np.array_equal(units_of(cache, rows, "image"), cache.image_of)
    ids, groups = unit_names(cache, rows[:1], "tile")
    assert (ids, groups) == (["part0.png@0,0"], ["part0"])


# ---- labels of images ------------------------------------------------------------------------------------------------


def class_set(root: Path, names: Sequence[str], count: int = 6, seed: int = 0) -> Path:
    """Folders of classes with images of random levels."""
    random = np.random.default_rng(seed)
    for name in names:
        for i in range(count):
            path = root / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (32, 32), dtype=np.uint8)).save(path)
    return root


def test_a_set_of_classes_is_extracted_and_its_cache_serves_without_the_images(tmp_path: Path) -> None:
    root = class_set(tmp_path / "set", ["good", "dent", "scratch"])
    cache = open_cache(extract(tmp_path / "w", root).path)
    moved = cache.path.rename(tmp_path / "passed_on.h5")
    cache = open_cache(moved)
    truth = truth_of(cache, "own", "image")
    assert truth.names == LabelNames(("dent", "good", "scratch"), good="good") and truth.known.all()
    assert [name.split("/")[0] for name in cache.images.column("id")] == [
        truth.names.names[own] for own in truth.values.argmax(1)
    ]
    defect = truth_of(cache, "defect", "image")
    assert defect.names == DEFECT and np.array_equal(defect.good, truth.good) and truth.good.sum() == 6
    assert (
        cache.data.tasks == () and cache.data.classes == ("background",) and defect_regions(cache, 0, "image") is None
    )


def test_another_label_of_an_image_copies_its_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = class_set(tmp_path / "set", ["0", "1"])
    rows = [f"{i % 2}/{i // 2}.png" for i in range(12)]
    table = root / "labels.csv"

    def extracted(labels: Sequence[str]) -> tuple[Any, Cache]:
        lines = [f"{name},{label},g{i % 6}" for i, (name, label) in enumerate(zip(rows, labels, strict=True))]
        table.write_text("\n".join(["image,label,group", *lines]))
        report = extract(tmp_path / "w", root)
        return report, open_cache(report.path)

    first, before = extracted(["good", "dent"] * 6)
    kept = stored(before.path)
    assert first.computed == 12
    backbone = PoolingBackbone()
    monkeypatch.setattr(type(backbone), "forward", None, raising=False)
    written = spy_on_writes(monkeypatch)
    second, after = extracted(["good", "dent"] * 5 + ["dent", "dent"])
    assert (second.computed, second.copied) == (0, 12) and sorted(written) == list(range(12))
    assert before.data.fingerprint != after.data.fingerprint and before.path == after.path
    assert truth_of(after, "own", "image").values[-2:].tolist() == [[1, 0], [1, 0]]
    assert stored(after.path) == kept
    third, _ = extracted(["good", "dent"] * 5 + ["dent", "dent"])
    assert (third.computed, third.copied) == (0, 0)


def test_an_image_in_two_classes_is_refused_or_left_out(tmp_path: Path) -> None:
    root = class_set(tmp_path / "set", ["good", "dent"])
    (root / "dent" / "copy.png").write_bytes((root / "good" / "3.png").read_bytes())
    with pytest.raises(DataError, match=r"1 image in two classes(.|\n)*dent/copy.png \(dent\) and good/3"):
        extract(tmp_path / "w", root)
    assert not list((tmp_path / "w").rglob("*.h5"))
    report = extract(tmp_path / "w", root, skip_bad=True)
    assert {own for own, _ in report.unreadable} == {"good/3.png", "dent/copy.png"} and report.computed == 11


def test_groups_with_both_verdicts_in_two_splits_are_noted(tmp_path: Path) -> None:
    root = class_set(tmp_path / "set", ["good", "dent"])
    splits = ["train", "train", "val", "val", "test", "test"]
    lines = [f"{name}/{i}.png,{splits[i]},part{i % 2}" for name in ("good", "dent") for i in range(6)]
    (root / "samples.csv").write_text("\n".join(["image,split,group", *lines]))
    report = extract(tmp_path / "w", root)
    wanted = "2 groups with good and bad images stand in more than one split (part0, part1)"
    assert any(note.startswith("its own split: ") and wanted in note for note in report.notes)
    notes = split_notes(open_cache(report.path), SplitChoice.parse("own"))
    assert any(wanted in note for note in notes)


def test_a_stratified_split_of_labels_of_images_gives_each_split_each_label(tmp_path: Path) -> None:
    root = class_set(tmp_path / "set", ["good", "a", "b", "c"], count=5)
    cache = open_cache(extract(tmp_path / "w", root).path)
    truth = truth_of(cache, "own", "image")
    rows = Partition(cache, SplitChoice.parse("stratified")).rows
    assert all((truth.values[own] == 1).any(0).all() for own in rows.values())
    assert not [note for note in split_notes(cache, SplitChoice.parse("stratified")) if " holds " in note]
    lacking = {
        (split, name)
        for split, own in Partition(cache, SplitChoice.parse("own")).rows.items()
        for name, there in zip(truth.names.names, (truth.values[own] == 1).any(0), strict=True)
        if not there
    }
    notes = [note for note in split_notes(cache, SplitChoice.parse("own")) if " holds " in note]
    assert len(notes) == len({split for split, _ in lacking})
    assert all(
        any(f"no {split} image holds" in note and f"{name} (5 groups" in note for note in notes)
        for split, name in lacking
    )


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_labels_that_a_cache_does_not_hold_are_refused_with_what_would_do(tmp_path: Path) -> None:
    masks_only = cache_of(tmp_path / "a", [np.zeros((SIDE, SIDE), np.uint8)])
    with pytest.raises(ProbeError, match=r"no labels of images(.|\n)*--labels defect\n  --labels classes"):
        truth_of(masks_only, "own", "image")
    with pytest.raises(ProbeError, match=r"whole images, and no tiles(.|\n)*--tile N"):
        truth_of(masks_only, "defect", "tile")
    unnamed = open_cache(extract(tmp_path / "w", class_set(tmp_path / "set", ["a", "b"])).path)
    assert set(truth_of(unnamed, "own", "image").good.tolist()) == {UNKNOWN}
    with pytest.raises(ProbeError, match=r"nothing says which of its images are good(.|\n)*good = \"NAME\""):
        truth_of(unnamed, "defect", "image")
    with pytest.raises(ProbeError, match="no masks and no objects, from which --labels classes would follow"):
        truth_of(unnamed, "classes", "image")
    tiles = open_cache(extract(tmp_path / "w", class_set(tmp_path / "good", ["good", "b"]), tile=16).path)
    assert truth_of(tiles, "own", "image").known.all()
    with pytest.raises(ProbeError, match="do not say which tiles of an image they hold for"):
        truth_of(tiles, "own", "tile")


def test_tiles_can_not_be_thinned_where_nothing_says_which_are_empty(tmp_path: Path) -> None:
    root = class_set(tmp_path / "set", ["good", "b"])
    with pytest.raises(DataError, match=r"--empty-tiles 0.5(.|\n)*labels of whole images alone"):
        extract(tmp_path / "w", root, tile=16, empty_tiles=0.5)


def test_only_what_is_asked_for_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = open_cache(extract(tmp_path / "w", class_set(tmp_path / "set", ["good", "b"])).path)
    monkeypatch.setattr(image_truth, "_each_held", lambda *_: pytest.fail("labels of pixels were read"))
    for labels in ("own", "defect"):
        assert truth_of(cache, labels, "image").known.all()
    assert opened(cache.path).image_labels is not None and tiles_of((8, 8), 4, 0)[0] == Part(0, 0, 4, 4)
