"""Files of several images: pages of TIFF stacks and DICOM frames, read, listed, paired with masks, converted."""

import io
import json
import os
import re
import shutil
import struct
import time
import tracemalloc
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nst
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)
from test_images import DEEP, FEW, GREY_TIFF, SIDES, WRITERS, tiff, write_dicom
from test_readers import BLUE, MADE, RED, RING, SIZE, drawing, mask, objects_of, picture, refused, shape, square, text

from featprobe.datasets import FORMATS, read_data
from featprobe.datasets.images.pages import pages_of, tiff_images
from featprobe.datasets.images.reading import (
    bits_of,
    hash_image,
    image_size,
    read_levels,
)
from featprobe.datasets.objects import stored_pixels
from featprobe.errors import DataError
from featprobe.stages.extraction.survey import survey
from featprobe.stages.upkeep.convert import convert
from featprobe.stages.upkeep.describe import summarise

# ---- files of several pages ------------------------------------------------------------------------------------------

LAYOUTS: dict[str, dict[str, Any]] = {
    "little": {},
    "big": {"byteorder": ">"},
    "bigtiff": {"bigtiff": True},
    "big bigtiff": {"bigtiff": True, "byteorder": ">"},
    "lzw": {"compression": "lzw", "predictor": True},
    "strips": {"compression": "zlib", "rowsperstrip": 3},
    "tiles": {"compression": "zstd", "tile": (16, 16), "byteorder": ">"},
}
PAGES = st.lists(
    st.one_of(DEEP, nst.arrays(np.uint8, st.tuples(SIDES, SIDES)), nst.arrays(np.uint8, (7, 5, 3))),
    min_size=2,
    max_size=5,
)


def write_pages(path: Path, pages: list[NDArray[Any]], **layout: Any) -> None:
    """A TIFF of a page for each array, of whatever sizes, with a smaller copy and a transparency mask behind each."""
    with tifffile.TiffWriter(
        path, **{name: layout.pop(name) for name in ("bigtiff", "byteorder") & layout.keys()}
    ) as t:
        for values in pages:
            colour = "rgb" if values.ndim == 3 else "minisblack"
            t.write(values, photometric=colour, metadata=None, **layout)
            t.write(values[::2, ::2], photometric=colour, metadata=None, subfiletype=1, **layout)
            opaque = np.ones(values.shape[:2], dtype=bool)
            t.write(opaque, photometric="mask", metadata=None, subfiletype=4)


@FEW
@given(pages=PAGES, layout=st.sampled_from(list(LAYOUTS)))
def test_page_i_of_a_stack_is_array_i(tmp_path: Path, pages: list[NDArray[Any]], layout: str) -> None:
    path = tmp_path / "stack.tif"
    write_pages(path, pages[:-1], **LAYOUTS[layout])
    before = [hash_image(page) for page in pages_of(path)] if len(pages) > 2 else []
    write_pages(path, pages, **LAYOUTS[layout])
    found = pages_of(path)
    assert [page.relative_to(tmp_path).as_posix() for page in found] == [
        f"stack.tif/{i:04d}" for i in range(len(pages))
    ]
    for page, values in zip(found, pages, strict=True):
        read = read_levels(page)
        assert read.dtype == values.dtype and np.array_equal(read, values)
        assert (image_size(page), bits_of(page)) == (values.shape[:2], 8 * values.dtype.itemsize)
        tifffile.imwrite(tmp_path / "one.tif", values, photometric="rgb" if values.ndim == 3 else "minisblack")
        mode, labels = stored_pixels(page)
        alone, wanted = stored_pixels(tmp_path / "one.tif")
        assert mode == alone and np.array_equal(labels, wanted)
    hashes = [hash_image(page) for page in found]
    assert hashes[: len(before)] == before, "a page's hash is its own, whatever follows"
    for i, j in combinations(range(len(pages)), 2):
        same = pages[i].dtype == pages[j].dtype and np.array_equal(pages[i], pages[j])
        assert (hashes[i] == hashes[j]) == same
    for look in (read_levels, image_size, bits_of):
        with pytest.raises(DataError, match=f"holds {len(pages)} images"):
            look(path)
    said = "can't be read as a mask" if layout == "big bigtiff" else f"holds {len(pages)} images"  # beyond Pillow
    with pytest.raises(DataError, match=said):
        stored_pixels(path)


@pytest.mark.parametrize(
    ("dtype", "write"),
    [
        (bool, {"photometric": "minisblack"}),
        (bool, {"photometric": "miniswhite"}),
        (np.uint8, {"photometric": "miniswhite"}),
        (np.uint8, {"photometric": "minisblack", "bitspersample": 4}),
        (np.uint8, {"photometric": "palette", "colormap": np.arange(768, dtype=np.uint16).reshape(3, 256)}),
        (np.int16, {"photometric": "minisblack"}),
        (np.int32, {"photometric": "minisblack"}),
        (np.float32, {"photometric": "minisblack"}),
    ],
)
def test_a_page_of_masks_is_read_like_a_mask_of_its_own(tmp_path: Path, dtype: Any, write: dict[str, Any]) -> None:
    masks = np.random.default_rng(0).integers(0, 2 if dtype is bool else 16, (3, 8, 10)).astype(dtype)
    tifffile.imwrite(tmp_path / "masks.tif", masks, metadata=None, **write)
    for page, values in zip(pages_of(tmp_path / "masks.tif"), masks, strict=True):
        tifffile.imwrite(tmp_path / "one.tif", values, metadata=None, **write)
        (mode, found), (alone, wanted) = stored_pixels(page), stored_pixels(tmp_path / "one.tif")
        assert mode == alone and np.array_equal(found, wanted)
    with pytest.raises(DataError, match="holds 3 images"):
        stored_pixels(tmp_path / "masks.tif")
    with pytest.raises(DataError, match=r"frames\.dcm/0001 can't be read as a mask"):
        stored_pixels(frames_of(tmp_path / "frames.dcm", np.zeros((2, 4, 4), np.uint8))[1])


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("colour", [False, True])
def test_imagej_stacks_behind_one_ifd_are_read_plane_by_plane(tmp_path: Path, order: str, colour: bool) -> None:
    path = tmp_path / "stack.tif"
    kind = (np.uint8, (6, 9, 8, 3)) if colour else (np.uint16, (6, 9, 8))
    stack = np.random.default_rng(0).integers(0, 256, kind[1]).astype(kind[0])
    photometric = "rgb" if colour else "minisblack"
    tifffile.imwrite(path, stack, imagej=True, truncate=True, byteorder=order, photometric=photometric)
    with tifffile.TiffFile(path) as file:
        assert len(file.pages) == 1
    pages = pages_of(path)
    assert len(pages) == 6 and len({hash_image(page) for page in pages}) == 6
    for page, values in zip(pages, stack, strict=True):
        assert np.array_equal(read_levels(page), values) and np.array_equal(stored_pixels(page)[1], values)
    os.truncate(path, path.stat().st_size - values.nbytes - 1)
    assert np.array_equal(read_levels(pages[3]), stack[3])
    with pytest.raises(DataError, match=r"0005 is truncated or damaged"):
        read_levels(pages[5])


@pytest.mark.parametrize("count", [1, 5])
def test_images_that_hide_behind_a_page_are_refused(tmp_path: Path, count: int) -> None:
    stack = np.zeros((count, 8, 9), np.uint16)
    tifffile.imwrite(tmp_path / "shaped.tif", stack, truncate=True, photometric="minisblack")
    planes = (33629, 5, count, (1, 1) * count, True)
    tifffile.imwrite(tmp_path / "a.stk", stack[0], photometric="minisblack", metadata=None, extratags=[planes])
    for name in ("shaped.tif", "a.stk"):
        if count == 1:
            assert np.array_equal(read_levels(tmp_path / name), stack[0])
            continue
        with pytest.raises(DataError, match="several images in one page"):
            read_levels(tmp_path / name)


@pytest.mark.parametrize("name", ["a\0b.png", "\ud800.png"])
def test_what_is_no_path_is_refused_in_words(tmp_path: Path, name: str) -> None:
    for look in (read_levels, hash_image, image_size):
        with pytest.raises(DataError, match=r"can't be the path of a file|is truncated or damaged"):
            look(tmp_path / name)


@pytest.mark.parametrize("name", ["3", "003", "00003", "+003", " 003", "-001", "0x03", "000a", "٠٠٠٣"])
def test_a_page_has_one_name(tmp_path: Path, name: str) -> None:
    write_pages(tmp_path / "stack.tif", [np.eye(9, dtype=np.uint8)] * 4)
    for look in (read_levels, hash_image, image_size):
        with pytest.raises(DataError, match=r"is no page of stack\.tif\.\n  wanted .* of four digits, as 0003"):
            look(tmp_path / "stack.tif" / name)
    with pytest.raises(DataError, match=r"0004 is not there: stack\.tif holds 4 pages\. wanted: 0000 to 0003"):
        read_levels(tmp_path / "stack.tif" / "0004")
    for alone in ("a.tif", "a.png", "a.npy", "a.dcm"):
        WRITERS[alone](tmp_path / alone, np.eye(9, dtype=np.uint16))
        with pytest.raises(DataError, match=r"holds one image\. Name only the file"):
            read_levels(tmp_path / alone / "0000")


def test_a_folder_that_is_called_like_a_stack_holds_files(tmp_path: Path) -> None:
    levels = np.arange(81, dtype=np.uint16).reshape(9, 9)
    (tmp_path / "stack.tif").mkdir()
    Image.fromarray(levels).save(tmp_path / "stack.tif" / "0003", format="PNG")
    assert np.array_equal(read_levels(tmp_path / "stack.tif" / "0003"), levels)


def test_what_is_remembered_of_a_stack_is_forgotten_with_it(tmp_path: Path) -> None:
    path = tmp_path / "stack.tif"
    for pages, compression in ((3, None), (5, "zlib"), (2, "lzw")):
        stack = np.random.default_rng(pages).integers(0, 999, (pages, 20, 30), dtype=np.uint16)
        tifffile.imwrite(path, stack, compression=compression, photometric="minisblack")
        for age in (0, 10_000 * pages, -10_000 * pages):
            os.utime(path, (time.time() - age,) * 2)
            assert all(np.array_equal(read_levels(p), own) for p, own in zip(pages_of(path), stack, strict=True))


@pytest.mark.parametrize("age", [10_000, -10_000])
def test_a_stack_is_looked_at_once_in_the_future_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age: float
) -> None:
    path = tmp_path / "stack.tif"
    tifffile.imwrite(path, np.zeros((3, 20, 30), np.uint16), photometric="minisblack")
    os.utime(path, (time.time() - age,) * 2)
    found = tiff_images(path)
    monkeypatch.setattr("featprobe.datasets.images.pages._Tiff", None)
    assert tiff_images(path) == found and len(found) == 3


def test_listing_looks_at_nothing_but_ifds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, layout in LAYOUTS.items():
        write_pages(tmp_path / f"{name}.tif", [np.zeros((64, 64), np.uint16)] * 3, **layout)
        tifffile.imwrite(tmp_path / f"{name} alone.tif", np.zeros((64, 64), np.uint16), **layout)
    monkeypatch.setattr(tifffile, "TiffFile", None)
    read: list[int] = []
    plain = io.FileIO.read

    class Counting(io.FileIO):
        def read(self, count: int | None = -1) -> bytes:
            data = plain(self, count)
            read.append(len(data))
            return data

    monkeypatch.setattr(Path, "open", lambda path, mode, buffering=-1: Counting(path, mode))
    for name in LAYOUTS:
        assert len(pages_of(tmp_path / f"{name}.tif")) == 3
        read.clear()
        assert pages_of(tmp_path / f"{name} alone.tif") == [tmp_path / f"{name} alone.tif"]
        assert len(read) <= 4 and sum(read) < 2000, name


def frames_of(path: Path, frames: NDArray[Any], syntax: str = ExplicitVRLittleEndian, **more: Any) -> list[Path]:
    """A DICOM file of several frames, and its pages."""
    big = syntax == ExplicitVRBigEndian
    stored = frames.astype(frames.dtype.newbyteorder(">" if big else "<")).tobytes()
    more = {"PixelData": stored + b"\0" * (len(stored) % 2), "NumberOfFrames": len(frames)} | more
    write_dicom(path, frames[0], syntax, **more)
    return pages_of(path)


def rescaling(slope: float, intercept: float) -> Dataset:
    """A functional group of DICOM that rescales."""
    group, transformation = Dataset(), Dataset()
    transformation.RescaleSlope, transformation.RescaleIntercept, transformation.RescaleType = slope, intercept, "US"
    group.PixelValueTransformationSequence = [transformation]
    return group


@FEW
@given(
    frames=nst.arrays(np.uint16, st.tuples(st.integers(2, 4), SIDES, SIDES))
    | nst.arrays(np.uint8, st.tuples(st.integers(2, 4), st.just(3), st.sampled_from([3, 5]))),
    syntax=st.sampled_from([ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian]),
    packed=st.booleans(),
)
def test_frame_i_of_a_dicom_file_is_array_i(tmp_path: Path, frames: NDArray[Any], syntax: str, packed: bool) -> None:
    path = tmp_path / "scan.dcm"
    pages = frames_of(path, frames, syntax)
    if packed and syntax == ExplicitVRLittleEndian:
        data = pydicom.dcmread(path)
        data.compress(RLELossless)
        data.save_as(path)
    assert [page.name for page in pages] == [f"{i:04d}" for i in range(len(frames))]
    for page, values in zip(pages, frames, strict=True):
        assert np.array_equal(read_levels(page), values) and image_size(page) == values.shape
        assert bits_of(page) == 8 * values.dtype.itemsize
    assert len({hash_image(page) for page in pages}) == len(pages)
    with pytest.raises(DataError, match=f"holds {len(frames)} images"):
        read_levels(path)


def test_frames_of_dicom_are_rescaled_one_by_one_or_all_alike(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 65536, (3, 8, 9), dtype=np.uint16)
    own = [(1.0, 0.0), (2.0, -7.0), (0.5, 3.0)]
    groups = [rescaling(*each) for each in own]
    pages = frames_of(tmp_path / "each.dcm", frames, PerFrameFunctionalGroupsSequence=groups)
    for page, values, (slope, intercept) in zip(pages, frames, own, strict=True):
        assert bits_of(page) == 32 and np.allclose(read_levels(page), values.astype(float) * slope + intercept)
    for shared, bits in (((2.0, -7.0), 32), ((1.0, 0.0), 16)):
        pages = frames_of(tmp_path / "all.dcm", frames, SharedFunctionalGroupsSequence=[rescaling(*shared)])
        assert {bits_of(page) for page in pages} == {bits}
        assert np.allclose(read_levels(pages[2]), frames[2].astype(float) * shared[0] + shared[1])
    write_dicom(tmp_path / "one.dcm", frames[0], SharedFunctionalGroupsSequence=[rescaling(2, 1)])
    assert np.allclose(read_levels(tmp_path / "one.dcm"), frames[0].astype(float) * 2 + 1)
    pages = frames_of(tmp_path / "white.dcm", frames, PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(read_levels(pages[1]), 65535 - frames[1])


def test_hostile_stacks_end_with_the_clear_error_soon_and_in_little_memory(tmp_path: Path) -> None:
    page = tiff(GREY_TIFF)[8:-4]  # an IFD without the pointer to the next
    size = len(page) + 4
    chain = b"".join(page + struct.pack("<I", 8 + (i + 1) * size) for i in range(20_000))
    long = b"II*\0" + struct.pack("<I", 8) + chain
    bigtiff = b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 1 << 60)
    counts = b"ImageJ=1.54f\nimages=4000000000\n\0"
    described = tiff(GREY_TIFF | {270: 0}, b"\0" * 500)
    at = described.index(struct.pack("<HHI", 270, 4, 1))
    described = (
        described[:at] + struct.pack("<HHII", 270, 2, len(counts), len(described)) + described[at + 12 :] + counts
    )
    files = {
        "long.tif": (long, "holds more than 10000 images"),
        "circle.tif": (long[: 8 + size * 9] + page + struct.pack("<I", 8 + size), "lead in a circle"),
        "cut.tif": (long[: 8 + size * 9], "one of its pages is not there"),
        "far.tif": (tiff(GREY_TIFF, b"\0" * 500, following=2**32 - 1), "one of its pages is not there"),
        "beyond.tif": (b"II+\0\x08\0\0\0" + b"\xff" * 99, "one of its pages is not there"),
        "tags.tif": (bigtiff + b"\0" * 99, "tags"),
        "imagej.tif": (described, "holds 4000000000 images"),
        "none.tif": (b"II*\0\0\0\0\0", "holds no page"),
    }
    tracemalloc.start()
    began = time.monotonic()
    for name, (data, said) in files.items():
        path = tmp_path / name
        path.write_bytes(data)
        assert pages_of(path) == [path]
        for image in (path, path / "0001"):
            with pytest.raises(DataError, match=said):
                read_levels(image)
    frames_of(tmp_path / "frames.dcm", np.zeros((2, 4, 4), np.uint16), NumberOfFrames=2_000_000_000)
    assert pages_of(tmp_path / "frames.dcm") == [tmp_path / "frames.dcm"]
    with pytest.raises(DataError, match="holds 2000000000 images"):
        read_levels(tmp_path / "frames.dcm" / "0001")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50_000_000 and time.monotonic() - began < 30


def test_smaller_copies_of_a_page_are_no_pages(tmp_path: Path) -> None:
    levels = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(levels, tile=(16, 16), subifds=1)
        tiff.write(levels[::2, ::2], tile=(16, 16), subfiletype=1)
        tiff.write(levels[::4, ::4], subfiletype=1)
    assert np.array_equal(read_levels(tmp_path / "a.tif"), levels)


def test_a_suffix_means_nothing_and_the_content_all(tmp_path: Path) -> None:
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16) * 200
    for wrong, right in {"a.dcm": "a.png", "a.png": "a.tif", "a.jpg": "a.npy", "a.tif": "a.dcm"}.items():
        WRITERS[right](tmp_path / f"x{right[1:]}", levels)
        os.replace(tmp_path / f"x{right[1:]}", tmp_path / wrong)
        assert np.array_equal(read_levels(tmp_path / wrong), levels)


# ---- pages of files --------------------------------------------------------------------------------------------------


def stack(path: Path, pages: int, seed: int = 0, coloured: bool | None = None) -> Path:
    """A TIFF of 16-bit pages, of 0 and 1 where coloured is False, red on blue where it is True."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 65536, (pages, *SIZE), dtype=np.uint16)
    if coloured is not None:
        values = (values > 40_000).astype(np.uint8)
        values = np.where(values[..., None], RED, BLUE).astype(np.uint8) if coloured else values
    tifffile.imwrite(path, values, photometric="rgb" if coloured else "minisblack", compression="zlib")
    return path


def stack_set(root: Path, coloured: bool = False) -> Path:
    """Three stacks of three pages beside stacks of masks, and one image alone."""
    for i in range(3):
        stack(root / "images" / f"s{i}.tif", 3, seed=i)
        stack(root / "masks" / f"s{i}.tiff", 3, seed=i, coloured=coloured)
    tifffile.imwrite(root / "images" / "alone.tif", np.zeros(SIZE, np.uint16))
    mask(root / "masks" / "alone.png", np.where(square(2, 3, 5)[..., None], RED, BLUE) if coloured else square(2, 3, 5))
    if coloured:
        text(root / "classes.txt", "0,0,255 rock\n255,0,0 pore\n")
    return root


@pytest.mark.parametrize("name", ["folders", "colours"])
def test_pages_of_a_file_are_images_of_one_group(tmp_path: Path, name: str) -> None:
    data = read_data("set", stack_set(tmp_path, name == "colours"), name)
    top = "images/" if name == "colours" else ""
    assert [s.id for s in data.samples] == [
        f"{top}{file}" for file in ("alone.tif", *(f"s{i}.tif/{page:04d}" for i in range(3) for page in range(3)))
    ]
    assert [s.group for s in data.samples] == [
        f"{top}{file}" for file in ("alone.tif", *(f"s{i // 3}.tif" for i in range(9)))
    ]
    assert all(len({s.split for s in data.samples if s.group == f"{top}s{i}.tif"}) == 1 for i in range(3))
    for i in range(3):
        levels = np.random.default_rng(i).integers(0, 65536, (3, *SIZE), dtype=np.uint16)
        for page in range(3):
            sample = next(s for s in data.samples if s.id == f"{top}s{i}.tif/{page:04d}")
            assert np.array_equal(read_levels(sample.image), levels[page])
            assert np.array_equal(data.read_target(sample, SIZE).semantic, levels[page] > 40_000)
    assert len({f.image_hash for f in survey(data, workers=2, skip_bad=False, quiet=True).found}) == 10


@pytest.mark.parametrize("name", ["folders", "colours"])
def test_masks_of_another_number_of_pages_are_refused(tmp_path: Path, name: str) -> None:
    stack_set(tmp_path, name == "colours")
    stack(tmp_path / "masks" / "s1.tiff", 2, coloured=name == "colours")
    assert re.search(
        r"s1\.tiff is not the mask of .*s1\.tif: .*\n  wanted  3 pages.*\n  found   2", refused(tmp_path, name)
    )
    (tmp_path / "masks" / "s1.tiff").unlink()
    assert "There is no mask" in refused(tmp_path, name)
    stack(tmp_path / "masks" / "s1.tiff", 3, coloured=name == "colours")
    (tmp_path / "masks" / "alone.png").unlink()
    stack(tmp_path / "masks" / "alone.tif", 3, coloured=name == "colours")
    assert re.search(r"\n  wanted  1 page.*\n  found   3", refused(tmp_path, name))


@pytest.mark.parametrize("name", ["folders", "colours"])
@pytest.mark.parametrize(("torn", "left"), [("images/s1.tif", 7), ("masks/s1.tiff", 7)])
def test_a_damaged_stack_is_set_aside_alone(tmp_path: Path, name: str, torn: str, left: int) -> None:
    path = stack_set(tmp_path, name == "colours") / torn
    os.truncate(path, path.stat().st_size // 2)
    found = survey(read_data("set", tmp_path, name), workers=1, skip_bad=True, quiet=True)
    assert sum(not f.reason for f in found.found) == left and len(found.bad) == (1 if "images" in torn else 3)
    assert all(f"{Path(torn).name} is truncated or damaged" in f.reason for f in found.bad)


@pytest.mark.parametrize("name", ["folders", "colours"])
def test_a_table_names_pages_or_their_file(tmp_path: Path, name: str) -> None:
    top = "images/" if name == "colours" else ""
    rows = [f"{top}s0.tif,test,part", f"{top}s1.tif,train,part2", f"{top}s1.tif/0002,val,other"]
    text(stack_set(tmp_path, name == "colours") / "samples.csv", "\n".join(["image,split,group", *rows]))
    found = {s.id: (s.split, s.group) for s in read_data("set", tmp_path, name, complete=False).samples}
    assert found[f"{top}s0.tif/0001"] == ("test", "part") and found[f"{top}s1.tif/0001"] == ("train", "part2")
    assert found[f"{top}s1.tif/0002"] == ("val", "other") and found[f"{top}s2.tif/0000"] == ("", f"{top}s2.tif")


def test_pages_pair_with_a_folder_of_masks_and_their_objects(tmp_path: Path) -> None:
    stack(tmp_path / "images" / "part.tif", 3)
    for number in range(3):
        mask(tmp_path / "masks" / "part" / f"000{number}_1.png", square(number, 3, 5))
        picture(tmp_path / "images" / f"p{number}.png")
        mask(tmp_path / "masks" / f"p{number}_1.png", square(number, 3, 5))
    data = read_data("set", tmp_path)
    assert data.tasks == ("semseg", "detect", "instseg")
    assert objects_of(data, "part.tif/0002")[0].box_xyxy == (3, 2, 8, 7)


def named_pages(root: Path, name: str) -> Path:
    """A set that names pages of a stack, where its format names files."""
    stack(root / "images" / "part.tif", 3)
    pages = [f"part.tif/000{i}" for i in range(3)]
    for i in range(3):
        picture(root / "images" / f"p{i}.png", seed=i)
    names = [*pages, *(f"p{i}.png" for i in range(3))]
    if name == "coco":
        images = [{"id": i, "file_name": file} for i, file in enumerate(names)]
        boxes = [{"id": i + 1, "image_id": i, "category_id": 1, "bbox": [3, 2, 5, 5]} for i in range(len(names))]
        known = [{"id": 1, "name": "pore"}]
        text(root / "all.json", json.dumps({"images": images, "annotations": boxes, "categories": known}))
    elif name == "labelme":
        for i, file in enumerate(names):
            text(root / "images" / f"drawing{i}.json", drawing(file, [shape("pore", RING)]))
    else:
        text(root / "data.yaml", "train: all.txt\nnames: [pore]\n")
        text(root / "all.txt", "\n".join(f"images/{file}" for file in names))
        for file in names:
            text((root / "labels" / file).with_suffix(".txt"), "0 0.5 0.5 0.25 0.5\n")
    return root


@pytest.mark.parametrize("name", ["coco", "labelme", "yolo"])
def test_pages_may_be_named_where_a_format_names_files(tmp_path: Path, name: str) -> None:
    data = read_data("set", named_pages(tmp_path / "set", name), complete=False)
    top = "" if name == "coco" else "images/"
    groups = {s.id: s.group for s in data.samples}
    assert groups == {f"{top}part.tif/000{i}": f"{top}part.tif" for i in range(3)} | {
        f"{top}p{i}.png": f"{top}p{i}.png" for i in range(3)
    }
    levels = np.random.default_rng(0).integers(0, 65536, (3, *SIZE), dtype=np.uint16)
    for sample in (s for s in data.samples if s.group == f"{top}part.tif"):
        assert np.array_equal(read_levels(sample.image), levels[int(sample.image.name)])
        assert len(data.read_target(sample, SIZE).instances or ()) == 1
    assert not any("left out" in note for note in data.notes)
    if name != "coco":  # which has no samples.csv
        text(tmp_path / "set" / "samples.csv", "image,group\nimages/part.tif,casting\nimages/part.tif/0001,other\n")
        groups = {s.id: s.group for s in read_data("set", tmp_path / "set", complete=False).samples}
        assert [groups[f"images/part.tif/000{i}"] for i in range(3)] == ["casting", "other", "casting"]
    shutil.move(tmp_path / "set" / "images" / "part.tif", tmp_path / "secret.tif")
    (tmp_path / "set" / "images" / "part.tif").symlink_to(tmp_path / "secret.tif")
    assert "is a link out of the data folder" in refused(tmp_path / "set")
    followed = read_data("set", tmp_path / "set", complete=False, follow_links=True)
    assert followed.description["follow_links"] and {s.id for s in followed.samples} == {s.id for s in data.samples}


@pytest.mark.parametrize(
    ("drawing", "image"), [("part.json", "part.tif"), ("label/a.json", "images/part.tif"), ("label/a.json", "part.tif")]
)
def test_a_page_that_labelme_names_is_found_like_a_file(tmp_path: Path, drawing: str, image: str) -> None:
    stack(tmp_path / image, 3)
    shape = {"label": "crack", "points": [[1, 1], [5, 1], [5, 5]], "shape_type": "polygon"}
    text(tmp_path / drawing, json.dumps({"shapes": [shape], "imagePath": "part.tif/0002"}))
    found = read_data("set", tmp_path, "labelme", complete=False)
    assert [(s.id, s.group) for s in found.samples] == [(f"{image}/0002", image)]
    assert not found.notes


def test_a_page_that_is_not_there_is_named_by_its_format(tmp_path: Path) -> None:
    path = named_pages(tmp_path, "coco") / "all.json"
    plain = path.read_text()
    for page, said in {
        "0007": "0007 is not there: part.tif holds 3 pages",
        "7": "is no page of part.tif",
        "": "holds 3 images",
    }.items():
        path.write_text(plain.replace("part.tif/0001", f"part.tif/{page}".rstrip("/")))
        assert said in refused(tmp_path)
    path.write_text(plain.replace("part.tif/0001", "part.tif/../../../../../etc/0001"))
    assert "not below the data folder" in refused(tmp_path)


def test_a_stack_in_two_splits_of_coco_is_a_leak(tmp_path: Path) -> None:
    root = named_pages(tmp_path, "coco")
    value = json.loads((root / "all.json").read_text())
    (root / "all.json").unlink()
    for split, images in (("train", value["images"][1:]), ("test", value["images"][:1])):
        numbers = {image["id"] for image in images}
        own = [a for a in value["annotations"] if a["image_id"] in numbers]
        text(root / "annotations" / f"{split}.json", json.dumps(value | {"images": images, "annotations": own}))
    data = read_data("set", root)
    assert any("1 of 4 groups" in note for note in data.notes), data.notes


def test_pages_come_back_from_coco_as_images_of_their_own(tmp_path: Path) -> None:
    data = read_data("set", stack_set(tmp_path / "set"))
    rng = np.random.default_rng(0)
    tifffile.imwrite(
        tmp_path / "set" / "images" / "s0.tif", rng.random((3, *SIZE), np.float32), photometric="minisblack"
    )
    tifffile.imwrite(
        tmp_path / "set" / "images" / "s1.tif", rng.integers(0, 256, (3, *SIZE, 3), dtype=np.uint8), photometric="rgb"
    )
    for link in (False, True):
        out = tmp_path / f"out{link}"
        convert(data, out, link=link, quiet=True)
        made = read_data("set", out, follow_links=link)
        for back, sample in zip(made.in_split("train"), data.in_split("train"), strict=True):
            assert (back.id, back.group) == (sample.id, sample.group)
            before, after = read_levels(sample.image), read_levels(back.image)
            assert before.dtype == after.dtype and np.array_equal(before, after)
            labels = (data.read_target(sample, SIZE), made.read_target(back, SIZE))
            assert np.array_equal(*(target.semantic for target in labels))
        assert (out / "images" / "alone.tif").is_symlink() is link and (out / "images" / "s0.tif" / "0001").is_file()
    convert(read_data("set", tmp_path / "outFalse"), tmp_path / "again", quiet=True)
    assert {s.id for s in read_data("set", tmp_path / "again").samples} == {s.id for s in data.samples}


def test_every_format_is_tried_here() -> None:
    assert {name.split()[0] for name in MADE} == set(FORMATS)


@pytest.mark.parametrize("name", MADE)
def test_a_set_is_found_by_looking(tmp_path: Path, name: str) -> None:
    MADE[name](tmp_path)
    found = next(known for known, entry in FORMATS.items() if entry.fits(tmp_path))
    assert found == name.split()[0]
    assert summarise(read_data("set", tmp_path)) == summarise(read_data("set", tmp_path, found))


@pytest.mark.parametrize("name", MADE)
def test_a_set_is_the_same_from_wherever_it_is_named(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_data("set", MADE[name](tmp_path / "set"))
    (tmp_path / "link").symlink_to(tmp_path / "set")
    monkeypatch.chdir(tmp_path / "set")
    for root in (Path("."), Path("../set"), tmp_path / "set" / ".." / "set", tmp_path / "link"):
        found = read_data("set", root)
        assert [(s.id, s.group, s.split) for s in found.samples] == [(s.id, s.group, s.split) for s in whole.samples]
        assert summarise(found).pixels == summarise(whole).pixels


@pytest.mark.parametrize("name", MADE)
def test_damaged_files_are_read_or_refused_and_nothing_else(tmp_path: Path, name: str) -> None:
    """The first file of each kind: cut, emptied, overwritten, replaced by a folder, by a link to itself, removed."""
    MADE[name](tmp_path)
    kinds = {(path.parent, path.suffix): path for path in sorted(tmp_path.rglob("*"), reverse=True) if path.is_file()}
    rng = np.random.default_rng(0)
    for path in kinds.values():
        whole = path.read_bytes()
        damaged = [whole[: len(whole) * share // 8] for share in range(8)] + [b"\xff\xfe" + whole, whole + b"\0\xff"]
        for value in damaged:
            path.write_bytes(value)
            read_or_refused(tmp_path, name)
        for _ in range(12):
            bytes_ = bytearray(whole)
            for place in rng.integers(0, len(whole), 3):
                bytes_[place] = rng.choice([0, 34, 45, 46, 47, 57, 60, 92, 123, 255, rng.integers(256)])
            path.write_bytes(bytes_)
            read_or_refused(tmp_path, name, looked_for=False)
        path.unlink()
        read_or_refused(tmp_path, name)
        path.mkdir()
        read_or_refused(tmp_path, name)
        path.rmdir()
        for aim in (path.name, "/etc/hosts", "nowhere"):
            path.symlink_to(aim)
            read_or_refused(tmp_path, name)
            path.unlink()
        path.write_bytes(whole)


@pytest.mark.parametrize("name", ["labelme", "labelme of BSData", "voc", "yolo", "deeppcb", "kolektorsdd2"])
def test_one_bad_label_file_may_be_set_aside(tmp_path: Path, name: str) -> None:
    MADE[name](tmp_path)
    files = [p for suffix in (".json", ".xml", ".txt", "GT.png") for p in tmp_path.rglob(f"*0*{suffix}")]
    path = sorted(files)[0]
    path.write_bytes(b'{"\xff')
    looked = survey(read_data("set", tmp_path), workers=1, skip_bad=True, quiet=True)
    assert len(looked.bad) == 1 and path.name in looked.bad[0].reason and len(looked.found) > 2


def read_or_refused(root: Path, name: str, looked_for: bool = True) -> None:
    """looked_for: also without the name of its format."""
    for format_name in (name.split()[0], None) if looked_for else (name.split()[0],):
        with suppress(DataError):
            summarise(read_data("set", root, format_name))
