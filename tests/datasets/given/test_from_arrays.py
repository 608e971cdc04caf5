"""Sets from arrays: what is given comes back, whole or not at all, and every fault is said at once."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from featprobe import DataSet
from featprobe.datasets import read_data
from featprobe.datasets.given import writing
from featprobe.datasets.images.reading import image_size, read_levels
from featprobe.datasets.samples import Sample
from featprobe.errors import DataError, DiskError
from featprobe.image_labels import LabelNames
from featprobe.targets import IGNORE, Target, decode_rle

SIZE = (6, 7)
RNG = np.random.default_rng(7)
GREY = RNG.integers(0, 1 << 16, (10, *SIZE), dtype=np.uint16)
MASKS = (np.arange(10 * 42).reshape(10, *SIZE) % 5 == 0).astype(np.int64)


def target_of(data: DataSet, sample: Sample) -> Target:
    return data.read_target(sample, image_size(sample.image))


def files_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of each file."""
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


@st.composite
def given_sets(draw: st.DrawFn) -> dict[str, Any]:
    """Images of any sizes and kinds with masks of three classes."""
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    images, masks = [], []
    for _ in range(draw(st.integers(6, 9))):
        height, width = draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
        dtype = draw(st.sampled_from([np.uint8, np.uint16, np.dtype(">u2")]))
        shape = (height, width, 3) if draw(st.booleans()) else (height, width)
        images.append(rng.integers(0, np.iinfo(dtype).max, shape, endpoint=True).astype(dtype))
        masks.append(rng.choice([0, 1, 2, IGNORE], (height, width)).astype(draw(st.sampled_from(["u1", "i8", "u2"]))))
    masks[0][0, 0] = 1
    count = len(images)
    own = draw(st.booleans())
    splits = [
        "train",
        "val",
        "test",
        *draw(st.lists(st.sampled_from(["Train", "val"]), min_size=count, max_size=count)),
    ]
    return {
        "images": images,
        "masks": masks,
        "groups": [f"part {i}" for i in range(count)],
        "splits": splits[:count] if own else None,
        "names": draw(st.sampled_from([None, [f"line 1/scan.{i}" for i in range(count)]])),
        "classes": ["steel", "background", "ä, |b"],
    }


@settings(max_examples=5, deadline=None)
@given(arrays=given_sets())
def test_images_and_masks_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, arrays: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("given") / "set"
    data = DataSet.from_arrays(folder, **arrays)
    names = arrays["names"] or [f"{i:06d}" for i in range(len(arrays["images"]))]
    assert [sample.id for sample in data.samples] == [f"{name}.tif" for name in names]
    assert (data.classes, data.tasks) == (tuple(arrays["classes"]), ("semseg",))
    assert [sample.group for sample in data.samples] == arrays["groups"]
    if arrays["splits"]:
        assert [sample.split for sample in data.samples] == [split.lower() for split in arrays["splits"]]
    for sample, image, mask in zip(data.samples, arrays["images"], arrays["masks"], strict=True):
        found = read_levels(sample.image)
        assert found.dtype == image.dtype.newbyteorder("=") and np.array_equal(found, image)
        assert np.array_equal(target_of(data, sample).semantic, mask)
    before = files_of(folder)
    again = DataSet.from_arrays(folder, **{**arrays, "images": iter(arrays["images"])})
    assert again.samples == data.samples and files_of(folder) == before, "the same set is only read"
    assert read_data("set", folder).samples == data.samples, "and by every command, without the name of a format"


def test_boxes_and_masks_of_objects_come_back(tmp_path: Path) -> None:
    boxes = [[[1, 1, 4, 5.5], [0, 0, 7, 6]], [], [[2, 2, 3, 3]]] * 2
    data = DataSet.from_arrays(tmp_path / "boxes", GREY[:6], boxes=boxes, labels=[[2, 1], [], [2]] * 2,
                               classes=["background", "pore", "crack"])  # fmt: skip
    assert data.tasks == ("detect",)
    for sample, own, labels in zip(data.samples, boxes, [[2, 1], [], [2]] * 2, strict=True):
        found = target_of(data, sample).instances
        assert found is not None and [list(one.box_xyxy) for one in found] == own
        assert [one.category for one in found] == labels
    drawn = [np.stack([mask == 1, mask == 0]) for mask in MASKS[:6]]
    data = DataSet.from_arrays(tmp_path / "masks", GREY[:6], masks=drawn, labels=np.array([[1, 2]] * 6),
                               classes=("background", "pore", "steel"))  # fmt: skip
    assert data.tasks == ("semseg", "detect", "instseg")
    for sample, masks in zip(data.samples, drawn, strict=True):
        found = target_of(data, sample).instances
        assert found is not None and [one.category for one in found] == [1, 2]
        assert all(np.array_equal(decode_rle(one.rle or {}), mask) for one, mask in zip(found, masks, strict=True))
    one = DataSet.from_arrays(tmp_path / "one", GREY[:6], boxes=[own[:1] for own in boxes])
    assert one.classes == ("background", "defect"), "one class needs no labels"


def test_labels_of_images_are_names_or_numbers_of_classes(tmp_path: Path) -> None:
    named = DataSet.from_arrays(tmp_path / "named", GREY, labels=["ok", "dent"] * 5)
    numbers = DataSet.from_arrays(tmp_path / "numbers", GREY, labels=np.array([1, 0] * 5), classes=["dent", "ok"])
    assert named.label_names == numbers.label_names == LabelNames(("dent", "ok"), good="ok")
    held = [[target_of(data, sample).labels for sample in data.samples] for data in (named, numbers)]
    assert held[0] == held[1] == [(1,), (0,)] * 5
    several = DataSet.from_arrays(tmp_path / "several", GREY, labels=[[], ["a", "b"]] * 5)
    assert several.label_names == LabelNames(("a", "b"), multi=True)
    assert [target_of(several, sample).labels for sample in several.samples] == [(), (0, 1)] * 5
    good = DataSet.from_arrays(tmp_path / "good", GREY, labels=["good"] * 10)
    assert good.label_names == LabelNames(("good",), good="good"), "which serves heads of anomalies"


def test_a_stream_is_held_one_image_at_a_time(tmp_path: Path) -> None:
    alive: list[int] = []

    class Counted(np.ndarray):
        def __del__(self) -> None:
            alive.remove(1)

    def stream() -> Iterator[NDArray[np.uint16]]:
        for image in GREY:
            alive.append(1)
            yield image.copy().view(Counted)
            assert len(alive) <= 3, "the one that is written, the one that is yielded, and a view"

    data = DataSet.from_arrays(tmp_path / "set", stream(), masks=(mask for mask in MASKS))
    assert len(data) == 10 and str(tmp_path) in repr(data) and len(repr(data)) < 200 + len(str(tmp_path))


def test_what_is_there_is_never_written_over(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    DataSet.from_arrays(folder, GREY, masks=MASKS)
    before, changed = files_of(folder), GREY.copy()
    changed[3, 0, 0] ^= 1
    for arrays, said in (
        ({"images": changed, "masks": MASKS}, r"1 file differs: images/000003\.tif"),
        ({"images": GREY, "masks": 1 - MASKS}, r"1 file differs: annotations/instances\.json"),
        ({"images": GREY[:9], "masks": MASKS[:9]}, r"2 files differ: annotations/.*000009\.tif \(not given\)"),
        ({"images": GREY, "labels": ["a", "b"] * 5}, "holds something else"),
    ):
        with pytest.raises(DataError, match=said) as caught:
            DataSet.from_arrays(folder, **arrays)
        assert "Nothing was changed" in str(caught.value) and files_of(folder) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    for place in (tmp_path / "other", tmp_path / "other" / "thesis.tex"):
        with pytest.raises(DataError, match="Nothing was changed"):
            DataSet.from_arrays(place, GREY, masks=MASKS)
    assert files_of(tmp_path / "other")["thesis.tex"][0] == b"years of work"


def test_a_set_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[NDArray[np.uint16]]:
        yield GREY[0]
        raise RuntimeError("the camera is gone")

    with pytest.raises(RuntimeError, match="the camera is gone"):
        DataSet.from_arrays(tmp_path / "set", broken(), masks=MASKS)
    with pytest.raises(DataError, match=r"could not be read back(.|\n)*empty split"):
        DataSet.from_arrays(tmp_path / "set", GREY, masks=MASKS, splits=["test"] * 10)
    with pytest.raises(DataError, match="nothing could be told apart"):
        DataSet.from_arrays(tmp_path / "set", GREY, labels=["dent"] * 10)

    def full(path: Path, levels: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(writing, "write_levels", full)
    with pytest.raises(DiskError, match="No space left"):
        DataSet.from_arrays(tmp_path / "set", GREY, masks=MASKS)
    assert list(tmp_path.iterdir()) == []


def test_all_faults_stand_in_one_message(tmp_path: Path) -> None:
    images: list[Any] = [*GREY]
    images[1], images[2], images[3] = GREY[1][:4], GREY[2] / 65535, GREY[3].astype(np.int32)
    images[4], images[5] = np.zeros((3, *SIZE), np.uint8), Image.fromarray(GREY[5].astype(np.uint8)).convert("P")
    masks = MASKS.copy()
    masks[6, 0, 0], masks[7, 0, 0] = 9, -1
    with pytest.raises(DataError) as caught:
        DataSet.from_arrays(tmp_path / "set", images, masks=masks, splits=["train"] * 8 + ["trian", "test"])
    said = str(caught.value)
    assert list(tmp_path.iterdir()) == [] and said.startswith(f"{tmp_path / 'set'} was not written: 8 of 10 images")
    for part in (
        "images[1]: a mask of the shape (6, 7). wanted: (4, 7), as its image",
        "images[2]: float64, 0.0", "bits=16 for level / 65535", "images[3]: int32,", "image.astype(np.uint8)",
        "images[4]: the shape (3, 6, 7)", "Its channels stand first", "images[5]: an image of mode P",
        "images[6]: a mask with 9. wanted: 0 to 1", "images[7]: a mask with -1",
        "images[8], split: 'trian'. Did you mean train?",
    ):  # fmt: skip
        assert part in said, said


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"images": GREY, "masks": MASKS[:9]}, "images 10, masks 9"),
        ({"images": iter(GREY), "masks": MASKS[:9]}, "9 of masks, and more of images"),
        ({"images": GREY[0], "masks": MASKS[0]}, "looks like one image"),
        ({"images": [], "masks": []}, "No image was given"),
        ({"images": GREY}, "no labels"),
        ({"images": GREY, "masks": MASKS, "labels": [1] * 10}, "Omit labels"),
        ({"images": GREY, "masks": MASKS, "boxes": [[]] * 10}, "those of objects"),
        ({"images": GREY, "masks": MASKS * 255}, "255 is the one class: masks == 255"),
        ({"images": GREY, "masks": MASKS, "classes": ["defect"]}, "the background first"),
        ({"images": GREY, "masks": MASKS, "classes": "defect"}, "wanted: a list of names"),
        ({"images": GREY, "masks": MASKS / 1.0}, "float64. wanted: whole numbers"),
        ({"images": GREY, "masks": MASKS, "bits": 12}, "wanted: 8, 16, or 32"),
        ({"images": GREY, "masks": MASKS, "bits": 8}, "levels of 16 bits. wanted: 8"),
        ({"images": GREY, "masks": MASKS, "names": ["a"] * 10}, "which an image before it has"),
        ({"images": GREY, "masks": MASKS, "names": ["../a"] * 10}, "below the data folder"),
        ({"images": GREY, "masks": MASKS, "names": [".a"] * 10}, "visible file"),
        ({"images": GREY, "masks": MASKS, "groups": [float("nan")] * 10}, "nan. wanted: a text that can be printed"),
        ({"images": GREY, "masks": MASKS, "groups": "a" * 10}, "wanted: one entry for each image"),
        ({"images": GREY, "masks": MASKS, "groups": np.zeros((10, 2))}, "a text that can be printed, or a number"),
        ({"images": GREY, "boxes": [5] * 10}, r"boxes of the shape \(\). wanted: \(objects, 4\)"),
        ({"images": GREY * 1e300, "masks": MASKS, "bits": 32}, "values that float32 holds, up to 3.4e"),
        ({"images": GREY, "labels": [0, 1] * 5}, "no names of classes"),
        ({"images": GREY, "labels": [0, 2] * 5, "classes": ["a", "b"]}, "the label 2. wanted: 0 to 1"),
        ({"images": GREY, "labels": ["a|b", "c"] * 5, "classes": ["a|b", "c"]}, "without | and blanks"),
        ({"images": GREY, "labels": [np.array([0, 1])] * 10, "classes": ["a", "b"]}, "a name, or the number"),
        ({"images": GREY, "boxes": [[[0, 0, 99, 2]]] * 10}, "9 more, object 0: the box is empty or leaves the image"),
        ({"images": GREY, "boxes": [[[0, 0, 1]]] * 10}, r"\(objects, 4\)"),
        ({"images": GREY, "boxes": [[[0, 0, 1, 1]]] * 10, "labels": [[3]] * 10}, "objects of the classes 3"),
        ({"images": GREY, "boxes": [[[0, 0, 1, 1]]] * 10, "classes": list("abc")}, "no labels for its 1 object"),
        ({"images": GREY, "masks": np.zeros((10, 1, *SIZE), bool)}, "its mask is empty"),
        ({"images": None, "masks": MASKS}, "images=None. wanted: one entry"),
        ({"images": ["a.png"] * 10, "masks": MASKS}, "str 'a.png'. wanted: an array of levels"),
        ({"images": GREY, "masks": [*MASKS[:9], None]}, r"images\[9\], mask: None. wanted: one for each image"),
        ({"images": GREY, "masks": [[[0, 1], [0]]] * 10}, "mask: lists of uneven lengths"),
        ({"images": GREY, "boxes": [[[0, 1], [0]]] * 10}, "boxes: lists of uneven lengths"),
        ({"images": np.ma.masked_equal(GREY, 0), "masks": MASKS}, "a masked array"),
    ],
    ids=lambda own: own if isinstance(own, str) else "",
)  # fmt: skip
def test_what_can_not_be_meant_is_refused(tmp_path: Path, arrays: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        DataSet.from_arrays(tmp_path / "set", **arrays)
    assert any(text in str(caught.value) for text in ("Nothing was written", "not written"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("bits", "dtype"), [(8, np.uint8), (16, np.uint16)])
def test_fractions_are_turned_back_into_their_levels_or_refused(tmp_path: Path, bits: int, dtype: type) -> None:
    levels = RNG.integers(0, (1 << bits) - 1, (6, *SIZE), endpoint=True).astype(dtype)
    fractions = levels.astype(np.float32) / np.float32((1 << bits) - 1)
    data = DataSet.from_arrays(tmp_path / "set", fractions, masks=MASKS[:6], bits=bits)
    assert all(np.array_equal(read_levels(s.image), own) for s, own in zip(data.samples, levels, strict=True))
    normalised = (fractions - 0.449) / 0.226
    with pytest.raises(DataError, match="Normalised, resized or augmented images can't be turned back"):
        DataSet.from_arrays(tmp_path / "other", normalised, masks=MASKS[:6], bits=bits)


def test_fractions_that_never_were_levels_are_kept(tmp_path: Path) -> None:
    values = RNG.normal(0, 3, (6, *SIZE)).astype(np.float32)
    data = DataSet.from_arrays(tmp_path / "set", values, masks=MASKS[:6], bits=32)
    assert all(np.array_equal(read_levels(s.image), own) for s, own in zip(data.samples, values, strict=True))
    values[2, 0, 0] = np.nan
    with pytest.raises(DataError, match=r"images\[2\]: pixels that are not finite"):
        DataSet.from_arrays(tmp_path / "other", values, masks=MASKS[:6], bits=32)


NAMES = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), min_size=1, max_size=12)


@settings(max_examples=12, deadline=None)
@given(
    labels=st.lists(NAMES, min_size=2, max_size=2, unique=True),
    names=st.lists(NAMES, min_size=4, max_size=4, unique=True),
    groups=st.lists(NAMES, min_size=4, max_size=4),
    several=st.booleans(),
)
def test_any_names_come_back_or_are_refused(
    tmp_path_factory: pytest.TempPathFactory, labels: list[str], names: list[str], groups: list[str], several: bool
) -> None:
    folder = tmp_path_factory.mktemp("named") / "set"
    held: list[Any] = [[labels[i % 2]] if several else labels[i % 2] for i in range(4)]
    splits = ["train", "train", "val", "test"]
    try:
        data = DataSet.from_arrays(folder, GREY[:4], labels=held, names=names, groups=groups, splits=splits)
    except DataError:
        assert not folder.exists()
        return
    assert data.label_names is not None and set(data.label_names.names) == set(labels)
    found = [
        (s.group, s.split, [data.label_names.names[i] for i in target_of(data, s).labels or ()]) for s in data.samples
    ]
    assert found == [(g, s, [labels[i % 2]]) for i, (g, s) in enumerate(zip(groups, splits, strict=True))]
    assert all(np.array_equal(read_levels(s.image), own) for s, own in zip(data.samples, GREY, strict=False))
