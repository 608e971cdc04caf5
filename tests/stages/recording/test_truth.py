"""The defects of a cache's images as all tasks know them, and the file that keeps what was measured of them."""

import io
import json
import os
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import filled_cache, make_cache, recipe_of, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from featprobe.cache import Cache, Row
from featprobe.datasets.images.decode import opened
from featprobe.datasets.images.reading import hash_image
from featprobe.geometry import Placement
from featprobe.image_labels import LabelNames
from featprobe.metrics.defects.records import DEFECT, GOOD, UNKNOWN
from featprobe.specs import DataInfo
from featprobe.stages.recording import truth as stage
from featprobe.stages.recording.kept_truth import kept, truth_path
from featprobe.stages.recording.sizes import outlines_of
from featprobe.stages.recording.truth import defects_of, table_of
from featprobe.stages.upkeep.caches import remove_caches
from featprobe.stages.workspace import Workspace, pixel_size_of
from featprobe.targets import IGNORE, Instance, encode_instances, encode_rle, encode_semantic

CLASSES = ("background", "pore", "crack")
SIZE, FRAME = (40, 60), (64, 64)


def mask_of(*regions: tuple[int, int, int, int, int]) -> np.ndarray:
    """A mask with some rectangles: top, left, height, width, label."""
    mask = np.zeros(SIZE, np.uint8)
    for top, left, height, width, label in regions:
        mask[top : top + height, left : left + width] = label
    return mask


MASKS = (
    mask_of((10, 10, 6, 8, 1), (16, 18, 3, 3, 1), (30, 0, 5, 12, 2), (0, 50, 4, 4, IGNORE)),  # two meet at a corner
    mask_of(),
    mask_of((5, 5, 9, 9, IGNORE)),
    mask_of((20, 20, 1, 1, 2)),
)
OBJECTS = (
    Instance(1, (4.0, 4.0, 20.0, 12.0)),
    Instance(2, (30.0, 20.0, 50.0, 30.0), encode_rle(mask_of((20, 30, 10, 20, 1)).astype(bool))),
    Instance(2, (0.0, 30.0, 8.0, 40.0), crowd=True),
)


def image_at(folder: Path, number: int) -> Path:
    path = folder / "images" / f"{number}.png"
    path.parent.mkdir(exist_ok=True, parents=True)
    levels = np.random.default_rng(number).normal(100, 6, SIZE).round().astype(np.uint8)
    Image.fromarray(levels).save(path)
    return path


def row_at(folder: Path, number: int, **labels: bytes) -> Row:
    path = image_at(folder, number)
    plain = replace(rows_of(number + 1)[number], semantic=b"", instances=b"")
    placement = Placement(SIZE, SIZE, FRAME)
    image = {"image": f"images/{path.name}", "image_hash": hash_image(path)}
    return replace(plain, id=path.name, placement=placement, **image, **labels)


def cache_of(folder: Path, rows: list[Row], **data: Any) -> Cache:
    info = DataInfo(
        **{"name": "set", "root": str(folder), "classes": CLASSES, "tasks": ("semseg",), "fingerprint": "f" * 64} | data
    )
    return make_cache(folder / "set.h5", recipe_of(frame=FRAME), rows, info)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """Four images with the masks."""
    return cache_of(tmp_path, [row_at(tmp_path, i, semantic=encode_semantic(own)) for i, own in enumerate(MASKS)])


EVERY = np.arange(len(MASKS))


def test_defects_of_masks_are_their_components_and_what_is_ignored_is_known_once(cache: Cache) -> None:
    found = [defects_of(cache, image) for image in EVERY.tolist()]
    assert [[(one.category, one.box_xyxy) for one in own.objects] for own in found] == [
        [(1, (10, 10, 21, 19)), (2, (0, 30, 12, 35))], [], [], [(2, (20, 20, 21, 21))],
    ]  # fmt: skip
    assert [[one.box_xyxy for one in own.ignored] for own in found] == [[(50, 0, 54, 4)], [], [(5, 5, 14, 14)], []]
    assert [own.good for own in found] == [DEFECT, GOOD, UNKNOWN, DEFECT]


def test_objects_of_a_set_are_its_defects_and_its_masks_give_what_is_ignored(tmp_path: Path) -> None:
    both = {"instances": encode_instances(OBJECTS), "semantic": encode_semantic(MASKS[0])}
    rows = [
        row_at(tmp_path, 0, **both),
        row_at(tmp_path, 1, instances=encode_instances(OBJECTS[2:])),
        row_at(tmp_path, 2),
    ]
    cache = cache_of(tmp_path, rows, tasks=("semseg", "detect"))
    own = defects_of(cache, 0)
    assert own.objects == OBJECTS[:2] and {one.box_xyxy for one in own.ignored} == {(0, 30, 8, 40), (50, 0, 54, 4)}
    assert defects_of(cache, 0, "components").objects == defects_of(cache_of_masks(tmp_path), 0).objects
    assert [defects_of(cache, image).good for image in (1, 2)] == [UNKNOWN, UNKNOWN], "a crowd; nothing at all"


def cache_of_masks(tmp_path: Path) -> Cache:
    folder = tmp_path / "masks"
    return cache_of(folder, [row_at(folder, 0, semantic=encode_semantic(MASKS[0]))])


def test_labels_of_images_say_what_is_good_where_nothing_is_outlined(tmp_path: Path) -> None:
    names = LabelNames(("ok", "scratch"), good="ok")
    labels = [(0,), (1,), None, (0,)]
    rows = [replace(row_at(tmp_path, i), labels=own) for i, own in enumerate(labels)]
    rows[3] = replace(rows[3], semantic=encode_semantic(MASKS[3]))
    cache = cache_of(tmp_path, rows, label_names=names)
    assert [defects_of(cache, image).good for image in range(4)] == [GOOD, DEFECT, UNKNOWN, DEFECT]


def test_a_table_holds_what_each_image_holds_in_its_order(cache: Cache) -> None:
    images, defects, notes = table_of(cache, np.array([3, 0, 1]), split="test", quiet=True)
    assert images.ids == ("3.png", "0.png", "1.png") and images.splits == ("test",) * 3 and notes == ()
    assert images.files[0] == "images/3.png" and images.hashes == tuple(cache.images[i].image_hash for i in (3, 0, 1))
    assert images.sizes.tolist() == [[*SIZE]] * 3 and np.isnan(images.spacing).all() and np.isnan(images.score).all()
    assert images.good.tolist() == [DEFECT, DEFECT, GOOD]
    outlined = outlines_of([one for image in (3, 0) for one in defects_of(cache, image).objects])
    assert np.array_equal(defects.pixels, outlined.sizes())
    assert defects.image.tolist() == [0, 1, 1] and defects.category.tolist() == [2, 1, 2]
    assert defects.cut.tolist() == [False, False, True] and (defects.score == -np.inf).all()
    assert np.isfinite(defects.contrast).all() and np.isnan(defects.millimetres).all()


def test_millimetres_follow_from_the_size_of_a_pixel_and_nothing_else_does(cache: Cache) -> None:
    plain = table_of(cache, EVERY, quiet=True)
    kept_bytes = truth_path(cache.path).read_bytes()
    sized = table_of(cache, EVERY, pixel_size=(0.5, 0.1), quiet=True)
    outlines = outlines_of([one for image in EVERY.tolist() for one in defects_of(cache, image).objects])
    assert sized.defects.millimetres == pytest.approx(outlines.sizes((0.5, 0.1)))
    assert np.array_equal(plain.defects.pixels, sized.defects.pixels)
    assert np.array_equal(sized.images.spacing, np.float32([[0.5, 0.1]] * len(MASKS)))
    assert truth_path(cache.path).read_bytes() == kept_bytes


def test_images_are_read_once_for_all_tables(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    first = table_of(cache, EVERY[:2], quiet=True)
    read: list[int] = []
    measure = stage._read
    monkeypatch.setattr(stage, "_read", lambda cache, image, truth: read.append(image) or measure(cache, image, truth))
    whole = table_of(cache, EVERY, quiet=True)
    assert sorted(read) == [2, 3], "the others are kept"
    again = table_of(cache, EVERY, quiet=True)
    assert sorted(read) == [2, 3] and same(again, whole) and same(table_of(cache, EVERY[:2], quiet=True), first)


def same(one: stage.Truth, other: stage.Truth) -> bool:
    """Whether two tables hold the same, and both have no note."""
    values = [
        np.array_equal(a, b, equal_nan=np.asarray(a).dtype.kind == "f")
        for x, y in ((one.images, other.images), (one.defects, other.defects))
        for a, b in zip(vars(x).values(), vars(y).values(), strict=True)
    ]
    return all(values) and one.notes == other.notes == ()


def test_components_and_own_objects_are_kept_side_by_side(tmp_path: Path) -> None:
    both = {"instances": encode_instances(OBJECTS), "semantic": encode_semantic(MASKS[0])}
    cache = cache_of(tmp_path, [row_at(tmp_path, 0, **both)], tasks=("semseg", "detect"))
    own, parts = table_of(cache, EVERY[:1], quiet=True), table_of(cache, EVERY[:1], "components", quiet=True)
    assert len(kept(cache, "own")) == len(kept(cache, "components")) == 1
    assert same(own, table_of(cache, EVERY[:1], quiet=True)) and own.defects.pixels.shape == parts.defects.pixels.shape
    assert not np.array_equal(own.defects.boxes, parts.defects.boxes)


def test_images_that_are_gone_or_others_give_no_contrast_and_one_note_until_they_are_back(cache: Cache) -> None:
    root = Path(cache.data.root)
    (root / "images" / "0.png").rename(root / "aside.png")
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(root / "images" / "3.png")
    found = table_of(cache, EVERY, quiet=True)
    (note,) = found.notes
    assert "the contrast of defects is unknown in 2 of 4 images" in note and "0.png" in note
    assert np.isnan(found.defects.contrast).all() and np.isfinite(found.defects.pixels).all()
    assert sorted(kept(cache, "own")) == [1, 2]
    (root / "aside.png").rename(root / "images" / "0.png")
    image_at(root, 3)
    assert np.isfinite(table_of(cache, EVERY, quiet=True).defects.contrast).all()


@pytest.mark.parametrize("damage", ["cut", "empty", "packed", "folder", "pipe", "twice", "pickle", "large"])
def test_a_file_that_does_not_fit_is_made_anew(cache: Cache, damage: str) -> None:
    wanted = table_of(cache, EVERY, quiet=True)
    path = truth_path(cache.path)
    data = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "pipe":
        os.mkfifo(path)
    elif damage == "packed":
        np.savez_compressed(path, **np.load(io.BytesIO(data)))
    elif damage == "pickle":
        np.savez(path, header=np.array([{"version": 1}], object), allow_pickle=True)
    elif damage == "large":
        with open(path, "wb") as stream:
            stream.truncate(1 << 40)
    elif damage == "twice":
        path.write_bytes(data)
        with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning):
            archive.writestr("header.npy", b"")
    else:
        path.write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
    assert kept(cache, "own") == {}
    found = table_of(cache, EVERY, quiet=True)
    if damage == "folder":
        assert "are not kept" in found.notes[0] and not list(path.iterdir())
        found = found._replace(notes=())
    else:
        assert len(kept(cache, "own")) == len(MASKS)
    assert same(found, wanted)


FORGED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "version": lambda a: a["header"].update(version=2),
    "identity": lambda a: a["header"].update(identity_sha256="0" * 64),
    "image": lambda a: a["own/images"].__setitem__(3, 4),
    "order": lambda a: a["own/images"].__setitem__(slice(2), (1, 0)),
    "count": lambda a: a["own/defects"].__setitem__(slice(2), (-1, 3)),
    "many": lambda a: a["own/defects"].__setitem__(0, 2**31 - 1),
    "class": lambda a: a["own/category"].__setitem__(0, 3),
    "corner": lambda a: a["own/corners"].__setitem__(slice(2), (1, 7)),
    "points": lambda a: a.update({"own/points": a["own/points"][1:]}),
    "nan": lambda a: a["own/pixels"].__setitem__((0, 0), np.nan),
    "negative": lambda a: a["own/pixels"].__setitem__((0, 1), -4),
    "corners": lambda a: a.update(
        {
            "own/corners": np.int32([1 << 16, *a["own/corners"][1:]]),
            "own/points": np.concatenate([np.zeros(((1 << 16) - a["own/corners"][0], 2), "<f4"), a["own/points"]]),
        }
    ),
    "spacing": lambda a: a["own/spacing"].__setitem__(0, -1),
    "endless": lambda a: a["own/spacing"].__setitem__(0, np.inf),
    "cut": lambda a: a["own/cut"].view(np.uint8).__setitem__(0, 2),
    "good": lambda a: a["own/good"].__setitem__(0, 7),
    "type": lambda a: a.update({"own/boxes": a["own/boxes"].astype(float)}),
    "shape": lambda a: a.update({"own/boxes": a["own/boxes"][:, :3]}),
    "missing": lambda a: a.pop("own/cut"),
}


@pytest.mark.parametrize("forge", FORGED)
def test_values_that_no_measurement_gives_are_not_taken(cache: Cache, forge: str) -> None:
    wanted = table_of(cache, EVERY, quiet=True)
    arrays: dict[str, Any] = dict(np.load(truth_path(cache.path)))
    arrays["header"] = json.loads(arrays["header"].tobytes())
    FORGED[forge](arrays)
    arrays["header"] = np.frombuffer(json.dumps(arrays["header"]).encode(), np.uint8)
    np.savez(truth_path(cache.path), **arrays)
    assert kept(cache, "own") == {}
    assert same(table_of(cache, EVERY, quiet=True), wanted)


@settings(max_examples=15, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_changes_no_table(place: float, bit: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "flipped"
    if not folder.exists():
        _made["cache"] = cache_of(folder, [row_at(folder, i, semantic=encode_semantic(m)) for i, m in enumerate(MASKS)])
        _made["wanted"] = table_of(_made["cache"], EVERY, quiet=True)
        _made["data"] = truth_path(_made["cache"].path).read_bytes()
    data = bytearray(_made["data"])
    data[int(place * len(data))] ^= 1 << bit
    truth_path(_made["cache"].path).write_bytes(data)
    assert same(table_of(_made["cache"], EVERY, quiet=True), _made["wanted"])


_made: dict[str, Any] = {}


def test_a_cache_takes_its_file_with_it_when_it_is_removed(cache: Cache) -> None:
    table_of(cache, EVERY, quiet=True)
    total = cache.path.stat().st_size + truth_path(cache.path).stat().st_size
    assert remove_caches([cache.path]) == total and not truth_path(cache.path).exists()


def test_features_say_nothing_of_what_was_measured(tmp_path: Path) -> None:
    cache = filled_cache(tmp_path / "some.h5")
    before = cache.path.read_bytes()
    images, defects, notes = table_of(cache, np.arange(4), quiet=True)
    assert len(images) == 4 and len(defects) == len(defects.millimetres) and len(notes) == 1
    assert cache.path.read_bytes() == before


def test_dicom_files_say_the_size_of_their_pixels(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    from pydicom.dataset import Dataset
    from test_images import write_dicom

    def spacing(**tags: Any) -> Any:
        path = tmp_path / f"{len([*tmp_path.iterdir()])}.dcm"
        write_dicom(path, np.arange(12, dtype=np.uint16).reshape(3, 4), **tags)
        with opened(path) as image:
            return image.spacing

    measures = Dataset()
    measures.PixelSpacing = [0.3, 0.4]
    shared = Dataset()
    shared.PixelMeasuresSequence = [measures]
    assert spacing() is None and spacing(PixelSpacing=[0.1, 0.2]) == (0.1, 0.2)
    assert spacing(PixelSpacing=[0.1, 0.2], ImagerPixelSpacing=[1, 1]) == (0.1, 0.2)
    assert spacing(ImagerPixelSpacing=[0.2, 0.2]) == (0.2, 0.2)
    assert spacing(ImagerPixelSpacing=[0.2, 0.2], EstimatedRadiographicMagnificationFactor=2) == (0.1, 0.1)
    assert spacing(NominalScannedPixelSpacing=[0.05, 0.06]) == (0.05, 0.06)
    assert spacing(SharedFunctionalGroupsSequence=[shared], PixelSpacing=[9, 9]) == (0.3, 0.4)
    for bad in ([0, 0.1], [-1, 1], [1e9, 1], [0.1], [0.1, 0.1, 0.1]):
        assert spacing(PixelSpacing=bad, NominalScannedPixelSpacing=[0.5, 0.5]) == (0.5, 0.5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "value"),
    [("DS", b"abc\\def "), ("DS", b"1e999\\1 "), ("DS", b"\xff\xfe"), ("FD", b"123"), ("OB", b"\1\2"), ("SQ", b"1234"),
     ("UN", b"1234"), ("PN", b"a^b ")],
)  # fmt: skip
def test_a_damaged_spacing_is_none_and_pixels_are_read_all_the_same(tmp_path: Path, kind: str, value: bytes) -> None:
    pytest.importorskip("pydicom")
    from test_images import write_dicom

    path, levels = tmp_path / "shot.dcm", np.arange(12, dtype=np.uint16).reshape(3, 4)
    write_dicom(path, levels)
    long = kind in ("OB", "SQ", "UN")
    length = struct.pack("<2xI" if long else "<H", len(value))
    data = path.read_bytes()
    pixels = data.index(struct.pack("<HH", 0x7FE0, 0x10))
    tag = struct.pack("<HH", 0x28, 0x30) + kind.encode() + length + value
    path.write_bytes(data[:pixels] + tag + data[pixels:])
    with opened(path) as image:
        assert image.spacing is None and np.array_equal(image.read(), levels)


def test_each_image_has_the_spacing_of_its_own_header(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    from test_images import write_dicom

    rows = [row_at(tmp_path, i, semantic=encode_semantic(MASKS[3])) for i in range(2)]
    path = tmp_path / "images" / "shot.dcm"
    write_dicom(path, np.random.default_rng(0).integers(0, 4000, SIZE).astype(np.uint16), PixelSpacing=[0.5, 0.25])
    rows[1] = replace(rows[1], image="images/shot.dcm", image_hash=hash_image(path))
    cache = cache_of(tmp_path, rows)
    for _ in range(2):  # measured, then kept
        images, defects, _notes = table_of(cache, EVERY[:2], quiet=True)
        assert np.isnan(images.spacing[0]).all() and images.spacing[1].tolist() == [0.5, 0.25]
        assert defects.millimetres[1] == pytest.approx([0.125**0.5, 0.125, np.hypot(0.5, 0.25), 0.25])
    assert table_of(cache, EVERY[:2], pixel_size=(2, 2), quiet=True).images.spacing.tolist() == [[2, 2]] * 2


def test_the_configuration_states_pixels_of_a_set_by_its_place_and_else_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "featprobe.toml").write_text(
        "[data.one]\npath = 'a'\npixel_size = 0.05\n"
        "[data.two]\npath = 'b'\npixel_size = [1, 0.5]\n[data.three]\npath = 'c'\n"
    )
    size = partial(pixel_size_of, Workspace(tmp_path))
    assert size("one", tmp_path / "a") == (0.05, 0.05) and size("two", tmp_path / "b") == (1.0, 0.5)
    assert size("b", tmp_path / "b") == (1.0, 0.5), "as it is called by its path"
    assert size("two", tmp_path / "elsewhere") == (1.0, 0.5) and size("one", tmp_path / "b") == (1.0, 0.5)
    assert size("three", tmp_path / "c") is None and size("four", tmp_path / "d") is None
