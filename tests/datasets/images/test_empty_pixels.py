"""What a header says of its own pixels: empty ones, bands, colours; and DICOM data sets without a preamble."""

import json
import struct
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import tifffile
import torch
from click.testing import CliRunner
from helpers import CPU, PoolingBackbone, extract, opened
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nst
from numpy.typing import NDArray
from PIL import Image
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from test_images import FEW, by_sorting, write_dicom

from featprobe.cache import Cache, read_contents
from featprobe.cli.main import cli
from featprobe.datasets import DataSet, read_data
from featprobe.datasets.duplicates import look_of
from featprobe.datasets.images.pages import page_path, pages_of
from featprobe.datasets.images.reading import (
    bits_of,
    hash_image,
    header_of,
    image_size,
    read_levels,
    to_unit,
    training_window,
    write_levels,
)
from featprobe.datasets.objects import stored_pixels
from featprobe.errors import DataError
from featprobe.geometry import TURNS, Part
from featprobe.intensity import Intensity
from featprobe.stages.training.live import LiveFeatures
from featprobe.stages.upkeep.check import check
from featprobe.stages.upkeep.convert import convert
from featprobe.stages.upkeep.describe import contact_sheet, summarise

NODATA = 42113
NAN, MOST = float("nan"), float(np.finfo(np.float32).max)


def write_tiff(path: Path, values: NDArray[Any], nodata: str | None = None, **more: Any) -> Path:
    """A TIFF; nodata: the text of its GDAL_NODATA."""
    tags = [] if nodata is None else [(NODATA, "s", 0, nodata, False)]
    colour = {"photometric": "minisblack"} | more
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, values, metadata=None, extratags=tags, **colour)
    return path


def empty_in(levels: NDArray[Any]) -> NDArray[np.bool_]:
    """(height, width): which pixels were found empty."""
    mask = np.ma.getmaskarray(levels)
    return mask if mask.ndim == 2 else mask.all(axis=2)


# ---- TIFF ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "value", "nodata"),
    [
        (np.float32, -9999.0, "-9999"),
        (np.float32, -9999.9, "-9999.9"),
        (np.float32, -9999.0, " -9999.0 \0"),
        (np.float32, NAN, "nan"),
        (np.float32, NAN, "NaN"),
        (np.float32, float("-inf"), "-inf"),
        (np.float32, -MOST, "-3.4028234663852886e+38"),
        (np.float32, -MOST, "-3.40282e+38"),
        (np.float32, -3.4028230607370965e38, "-3.40282306074e+38"),
        (np.float32, -MOST, "-1.79769313486232e+308"),
        (np.float32, 1.70141e38, "1.70141e+38"),
        (np.float64, -1.7976931348623157e308, "-1.79769313486232e+308"),
        (np.float64, NAN, "nan"),
        (np.float16, -9999.0, "-9999"),
        (np.int16, -32768, "-32768"),
        (np.int16, -9999, "-9999.0"),
        (np.uint16, 65535, "65535"),
        (np.uint16, 0, "0"),
        (np.uint8, 255, "255"),
        (np.int32, 0, "0"),
    ],
)
def test_the_level_that_gdal_calls_empty_is_masked_and_no_other(
    tmp_path: Path, dtype: Any, value: float, nodata: str
) -> None:
    values = np.arange(40, 60).reshape(4, 5).astype(dtype)
    values[1:3, 2] = value
    levels = read_levels(write_tiff(tmp_path / "a.tif", values, nodata))
    wanted = np.zeros((4, 5), dtype=bool)
    wanted[1:3, 2] = True
    assert np.array_equal(empty_in(levels), wanted)
    assert np.array_equal(np.asarray(levels)[~wanted], values[~wanted].astype(np.float64))
    assert (np.asarray(levels)[wanted] == 40).all(), "beneath the mask lies the lowest level"
    assert header_of(tmp_path / "a.tif").empty.startswith("GDAL_NODATA ")
    unit = to_unit(levels, (45.0, 55.0))
    assert (unit[wanted] == 0).all() and unit[3, 4] == 1


@pytest.mark.parametrize(
    ("dtype", "nodata"),
    [(np.float32, "-9998"), (np.float32, "-9999.01"), (np.uint16, "-9999"), (np.uint16, "0.5"), (np.uint8, "nan"),
     (np.uint8, "256"), (np.float32, "nan"), (np.float32, ""), (np.uint16, "1e+20")],
)  # fmt: skip
def test_a_tag_that_fits_no_pixel_masks_none(tmp_path: Path, dtype: Any, nodata: str) -> None:
    values = np.arange(12).reshape(3, 4).astype(dtype)
    if dtype == np.float32:
        values[0, 0] = -9999
    levels = read_levels(write_tiff(tmp_path / "a.tif", values, nodata))
    assert type(levels) is np.ndarray and np.array_equal(levels, values)
    fits = np.dtype(dtype).kind == "f" and bool(nodata)
    assert bool(header_of(tmp_path / "a.tif").empty) == fits


def test_a_tag_that_is_no_number_is_named(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", np.eye(4, dtype=np.uint16), "none")
    for look in (read_levels, image_size, bits_of):
        with pytest.raises(DataError, match=r"(?s)a\.tif calls 'none' the level of its empty pixels.*wanted  a number"):
            look(path)


def test_nan_is_empty_only_where_the_tag_says_so(tmp_path: Path) -> None:
    values = np.ones((3, 4), np.float32)
    values[0, 0] = NAN
    with pytest.raises(DataError, match="holds 1 values that are not finite"):
        read_levels(write_tiff(tmp_path / "a.tif", values, "-9999"))


@FEW
@given(data=st.data(), dtype=st.sampled_from([np.uint8, np.uint16, np.int16, np.float32]))
def test_windows_are_those_of_the_pixels_that_are_not_empty(tmp_path: Path, data: st.DataObject, dtype: Any) -> None:
    elements = st.floats(-1e4, 1e4, width=32) if dtype == np.float32 else st.integers(0, 120)
    values = data.draw(nst.arrays(dtype, st.tuples(st.integers(2, 9), st.integers(2, 9)), elements=elements))
    empty = data.draw(nst.arrays(bool, values.shape))
    nodata = {np.uint8: 255, np.uint16: 65535, np.int16: -32768, np.float32: -3.4e38}[dtype]
    path = write_tiff(tmp_path / "a.tif", np.where(empty, np.asarray(nodata, dtype), values), str(nodata))
    levels, own = read_levels(path), values[~empty]
    assert np.array_equal(empty_in(levels), empty)
    for policy in (Intensity("percentile", 10, 90), Intensity("minmax")):
        one = replace(policy, image=True)
        if len(np.unique(own)) > 1:
            low, high = by_sorting(own, *policy.percent)
            if low < high:
                assert training_window([path], policy) == (low, high)
                assert np.array_equal(
                    to_unit(levels, None, one)[~empty], to_unit(np.array(levels), (low, high))[~empty]
                )
        assert (to_unit(levels, None, one)[empty] == 0).all()
    if empty.all():
        with pytest.raises(DataError, match="hold no pixel that is not empty"):
            training_window([path], Intensity("minmax"))
    write_levels(tmp_path / "b.tif", levels)
    again = read_levels(tmp_path / "b.tif")
    assert np.array_equal(empty_in(again), empty) and again.dtype == levels.dtype
    assert np.array_equal(np.asarray(again)[~empty], np.asarray(levels)[~empty])


def test_empty_pixels_of_every_kind_of_tiff(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    grey = np.arange(20, dtype=np.uint8).reshape(4, 5)
    levels = read_levels(write_tiff(path, grey, "0", photometric="miniswhite"))
    assert np.array_equal(empty_in(levels), grey == 0) and np.asarray(levels)[0, 0] == 255 - 19
    colour = np.dstack([grey, grey, grey * 2])
    assert np.array_equal(empty_in(read_levels(write_tiff(path, colour, "0", photometric="rgb"))), grey == 0)
    colour[0, 0, 1] = 7
    assert not empty_in(read_levels(write_tiff(path, colour, "0", photometric="rgb"))).any(), "one band holds a level"
    alpha = np.dstack([grey, grey, grey, np.full_like(grey, 255)])
    assert np.array_equal(empty_in(read_levels(write_tiff(path, alpha, "3", photometric="rgb"))), grey == 3)
    planes = np.moveaxis(np.dstack([grey] * 3), 2, 0)
    separate = write_tiff(path, planes, "3", photometric="rgb", planarconfig="separate")
    assert np.array_equal(empty_in(read_levels(separate)), grey == 3)
    colours = np.random.default_rng(0).integers(0, 256, (3, 256), dtype=np.uint16) * 257
    assert np.array_equal(
        empty_in(read_levels(write_tiff(path, grey, "3", photometric="palette", colormap=colours))), grey == 3
    )
    few = write_tiff(path, grey % 16, "15", bitspersample=4)
    assert np.array_equal(empty_in(read_levels(few)), grey == 15)
    tags = [(NODATA, "s", 0, "1", True), (274, 3, 1, 6, True)]
    tifffile.imwrite(path, grey, photometric="minisblack", metadata=None, extratags=tags)
    assert np.array_equal(empty_in(read_levels(path)), np.rot90(grey == 1, -1))


def test_each_page_has_its_own_empty_pixels(tmp_path: Path) -> None:
    path = tmp_path / "stack.tif"
    grey = np.arange(20, dtype=np.uint16).reshape(4, 5)
    shown = np.ones((4, 5), dtype=bool)
    shown[2] = False
    with tifffile.TiffWriter(path) as stack:
        stack.write(grey, photometric="minisblack", metadata=None, extratags=[(NODATA, "s", 0, "3", True)])
        stack.write(grey[::2, ::2], photometric="minisblack", metadata=None, subfiletype=1)
        stack.write(shown[::2, ::2], photometric="mask", metadata=None, subfiletype=5)
        stack.write(grey, photometric="minisblack", metadata=None)
        stack.write(grey, photometric="minisblack", metadata=None)
        stack.write(grey[::2, ::2], photometric="minisblack", metadata=None, subfiletype=1)
        stack.write(shown, photometric="mask", metadata=None, subfiletype=4)
    pages = pages_of(path)
    assert [header_of(page).empty for page in pages] == ["GDAL_NODATA 3", "", "a transparency mask"]
    found = [empty_in(read_levels(page)) for page in pages]
    assert np.array_equal(found[0], grey == 3) and not found[1].any() and np.array_equal(found[2], ~shown)
    assert len({hash_image(page) for page in pages}) == 3


def test_a_transparency_mask_of_another_size_is_refused(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(np.zeros((4, 5), np.uint8), photometric="minisblack", metadata=None)
        file.write(np.ones((3, 5), bool), photometric="mask", metadata=None, subfiletype=4)
    with pytest.raises(DataError, match=r"a\.tif has a transparency mask that does not fit its image"):
        read_levels(tmp_path / "a.tif")


def test_what_a_mask_calls_empty_is_ignored_but_its_background(tmp_path: Path) -> None:
    labels = np.array([[0, 1, 2], [1, 7, 7]], dtype=np.int16)
    _, values = stored_pixels(write_tiff(tmp_path / "a.tif", labels, "7"))
    assert values.tolist() == [[0, 1, 2], [1, 255, 255]]
    assert stored_pixels(write_tiff(tmp_path / "a.tif", labels, "0"))[1].tolist() == labels.tolist()
    write_tiff(tmp_path / "b.tif", np.stack([labels, labels]), "1")
    assert stored_pixels(page_path(tmp_path / "b.tif", 1))[1].tolist() == [[0, 255, 2], [255, 7, 7]]


def masks_of(root: Path, masks: list[tuple[list[int], str | None]]) -> DataSet:
    """A set of images of 1x4 pixels, and of TIFF masks of these labels and this GDAL_NODATA."""
    (root / "images").mkdir(parents=True)
    for i, (labels, nodata) in enumerate(masks):
        Image.fromarray(np.full((1, 4), i, np.uint8)).save(root / "images" / f"p{i}.png")
        write_tiff(root / "masks" / f"p{i}.tif", np.array([labels], np.uint8), nodata)
    return read_data("set", root, complete=False)


def labels_in(data: DataSet) -> list[list[int]]:
    found = [data.read_target(sample, (1, 4)).semantic for sample in data.samples]
    return [labels[0].tolist() for labels in found if labels is not None]


def test_what_a_mask_calls_empty_is_never_its_one_class(tmp_path: Path) -> None:
    data = masks_of(tmp_path / "alone", [([0, 255, 255, 0], "255"), ([0, 0, 0, 0], "255")])
    assert labels_in(data) == [[0, 255, 255, 0], [0, 0, 0, 0]]
    assert "no mask holds a class: 1 mask has pixels that a header calls empty, which are ignored (masks/p0.tif)" in (
        data.notes
    )
    data = masks_of(tmp_path / "of classes", [([0, 255, 255, 0], "255"), ([0, 1, 1, 0], None)])
    assert labels_in(data) == [[0, 255, 255, 0], [0, 1, 1, 0]] and not data.notes
    data = masks_of(tmp_path / "of 0 and 255", [([0, 255, 7, 0], "7"), ([0, 255, 255, 0], None)])
    assert labels_in(data) == [[0, 1, 255, 0], [0, 1, 1, 0]] and not data.notes


def test_what_a_page_of_a_mask_calls_empty_is_never_its_one_class(tmp_path: Path) -> None:
    labels = np.array([[[0, 255, 7, 0]], [[0, 0, 255, 7]]], np.uint8)
    write_tiff(tmp_path / "images" / "a.tif", labels[:, :, ::-1])
    write_tiff(tmp_path / "masks" / "a.tif", labels, "7")
    assert labels_in(read_data("set", tmp_path, complete=False)) == [[0, 1, 255, 0], [0, 0, 1, 255]]


BANDS = {
    "grey and one more": (2, {"extrasamples": ["unspecified"], "planarconfig": "contig"}),
    "grey and one more, apart": (2, {"extrasamples": ["unspecified"], "planarconfig": "separate"}),
    "two and an alpha": (3, {"extrasamples": ["unspecified", "unassalpha"], "planarconfig": "contig"}),
    "an alpha and one more": (3, {"extrasamples": ["unassalpha", "unspecified"], "planarconfig": "contig"}),
    "four": (4, {"extrasamples": ["unspecified"] * 3, "planarconfig": "contig"}),
    "five": (5, {"extrasamples": ["unspecified"] * 4, "planarconfig": "contig"}),
    "colour and one more": (4, {"photometric": "rgb", "extrasamples": ["unspecified"]}),
    "colour and two more": (5, {"photometric": "rgb", "extrasamples": ["unspecified", "assocalpha"]}),
}


@pytest.mark.parametrize("kind", BANDS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_no_band_is_dropped_but_an_alpha_channel(tmp_path: Path, kind: str, dtype: Any) -> None:
    count, write = BANDS[kind]
    values = np.random.default_rng(0).integers(0, 99, (6, 7, count)).astype(dtype)
    if write.get("planarconfig") == "separate":
        values = np.moveaxis(values, 2, 0)
    path = write_tiff(tmp_path / "a.tif", values, **write)
    for look in (read_levels, image_size, bits_of):
        with pytest.raises(DataError, match=rf"(?s)a\.tif holds {count} bands: .*would be dropped"):
            look(path)


@pytest.mark.parametrize("alpha", ["unassalpha", "assocalpha"])
def test_three_bands_without_colours_are_three_channels_and_told(tmp_path: Path, alpha: str) -> None:
    values = np.random.default_rng(0).integers(0, 9999, (6, 7, 4), dtype=np.uint16)
    path = write_tiff(tmp_path / "a.tif", values[..., :3], planarconfig="contig", extrasamples=["unspecified"] * 2)
    assert header_of(path).unnamed and np.array_equal(read_levels(path), values[..., :3])
    write_tiff(path, values, planarconfig="contig", extrasamples=["unspecified", "unspecified", alpha])
    assert header_of(path).unnamed and np.array_equal(read_levels(path), values[..., :3])
    assert not header_of(write_tiff(path, values, photometric="rgb", extrasamples=[alpha])).unnamed


def test_colours_that_can_not_be_converted_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    inks = np.zeros((6, 7, 4), np.uint8)
    assert read_levels(write_tiff(path, inks, photometric="separated")).shape == (6, 7, 3)
    refused = {
        "SEPARATED": lambda: tifffile.imwrite(path, inks, photometric="separated", extratags=[(332, 3, 1, 2, True)]),
        "YCBCR": lambda: tifffile.imwrite(path, inks[..., :3], photometric="ycbcr"),
        "CIELAB": lambda: tifffile.imwrite(path, inks[..., :3], photometric="cielab"),
        "CFA": lambda: tifffile.imwrite(path, inks[..., 0], photometric="cfa"),
        "5 bands: SEPARATED": lambda: tifffile.imwrite(
            path, np.zeros((6, 7, 5), np.uint8), photometric="separated", extrasamples=["unassalpha"]
        ),
    }
    for found, write in refused.items():
        write()
        with pytest.raises(DataError, match=found):
            read_levels(path)
    tifffile.imwrite(path, inks[..., :3] + 90, photometric="ycbcr", compression="jpeg")
    assert read_levels(path).shape == (6, 7, 3)


@pytest.mark.parametrize("bits", [(8, 8, 8), (8, 8, 16)])
def test_bands_of_unlike_depths_are_refused(tmp_path: Path, bits: tuple[int, ...]) -> None:
    path = write_tiff(tmp_path / "a.tif", np.zeros((4, 4, 3), np.uint8), photometric="rgb")
    with tifffile.TiffFile(path) as file:
        place = file.pages.first.tags[258].valueoffset
    with path.open("r+b") as stream:
        stream.seek(place)
        stream.write(struct.pack("<3H", *bits))
    if len(set(bits)) == 1:
        assert read_levels(path).shape == (4, 4, 3)
        return
    with pytest.raises(DataError, match=r"pixel format RGB, \(8, 8, 16\) bits"):
        read_levels(path)


# ---- PNG, JPEG -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_what_a_png_calls_transparent_is_empty(tmp_path: Path, dtype: Any) -> None:
    grey = np.arange(20, dtype=dtype).reshape(4, 5) * (3 if dtype == np.uint8 else 999)
    Image.fromarray(grey).save(tmp_path / "a.png", transparency=int(grey[1, 2]))
    levels = read_levels(tmp_path / "a.png")
    assert np.array_equal(empty_in(levels), grey == grey[1, 2]) and levels.dtype == dtype
    assert header_of(tmp_path / "a.png").empty == f"tRNS {grey[1, 2]}"


def test_a_jpeg_of_four_inks_is_read_where_it_says_which_end_is_white(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    assert read_levels(tmp_path / "a.jpg").min() > 250
    start = data.index(b"\xff\xee")
    length = struct.unpack(">H", data[start + 2 : start + 4])[0]
    (tmp_path / "a.jpg").write_bytes(data[:start] + data[start + 2 + length :])
    with pytest.raises(DataError, match="CMYK without Adobe's marker"):
        read_levels(tmp_path / "a.jpg")


# ---- DICOM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize(
    ("dtype", "padding", "limit", "tagged"),
    [
        (np.uint16, 63536, None, ("US", None)),
        (np.int16, -2000, None, ("SS", None)),
        (np.int16, -2000, None, ("US", 63536)),
        (np.uint16, 40000, 40005, ("US", None)),
        (np.int16, -2005, -2000, ("SS", None)),
        (np.uint8, 255, None, ("US", None)),
    ],
)
def test_padding_of_a_dicom_file_is_empty(
    tmp_path: Path, syntax: Any, dtype: Any, padding: int, limit: int | None, tagged: tuple[str, int | None]
) -> None:
    values = np.arange(100, 120).reshape(4, 5).astype(dtype)
    ends = (padding, padding if limit is None else limit)
    values[1, :2] = ends
    path = tmp_path / "a.dcm"
    write_dicom(path, values, syntax)
    data = pydicom.dcmread(path)
    kind, written = tagged
    data.add_new(0x00280120, kind, padding if written is None else written)
    if limit is not None:
        data.add_new(0x00280121, kind, limit)
    pydicom.dcmwrite(path, data)
    wanted = np.zeros((4, 5), bool)
    wanted[1, :2] = True
    assert np.array_equal(empty_in(read_levels(path)), wanted)
    assert header_of(path).empty.startswith(f"PixelPaddingValue {min(ends)}")
    data.RescaleSlope, data.RescaleIntercept = 2, -50
    data.PhotometricInterpretation = "MONOCHROME1"
    pydicom.dcmwrite(path, data)
    levels = read_levels(path)
    assert np.array_equal(empty_in(levels), wanted), "the padding is told before levels are turned and rescaled"
    low = -(1 << 15) if dtype == np.int16 else 0
    top = 255 if dtype == np.uint8 else low + 65535
    turned = (low + top - values.astype(float)) * 2 - 50
    assert np.array_equal(np.asarray(levels)[~wanted], turned[~wanted])


def test_padding_that_no_pixel_can_have_is_refused(tmp_path: Path) -> None:
    write_dicom(tmp_path / "a.dcm", np.ones((4, 4), np.uint16), BitsStored=12, HighBit=11, PixelPaddingValue=63536)
    with pytest.raises(DataError, match=r"(?s)a\.dcm pads its picture.*of 0 to 4095.*found   63536"):
        image_size(tmp_path / "a.dcm")


def test_samples_that_the_colours_do_not_need_are_refused(tmp_path: Path) -> None:
    write_dicom(tmp_path / "a.dcm", np.ones((4, 4, 3), np.uint8), PhotometricInterpretation="MONOCHROME2")
    with pytest.raises(DataError, match="MONOCHROME2, 3 x 8 bits"):
        image_size(tmp_path / "a.dcm")


def bare(path: Path, implicit: bool) -> None:
    """The data set of a DICOM file, without preamble and file meta information."""
    whole = pydicom.dcmread(path)
    data = pydicom.Dataset()
    data.update({own.tag: own for own in whole})
    pydicom.dcmwrite(path, data, implicit_vr=implicit, little_endian=True, enforce_file_format=False)


@pytest.mark.parametrize("implicit", [True, False])
@pytest.mark.parametrize("name", ["a.dcm", "a.png"])
def test_a_data_set_without_preamble_is_read(tmp_path: Path, implicit: bool, name: str) -> None:
    path = tmp_path / name
    values = np.arange(20, dtype=np.uint16).reshape(4, 5)
    write_dicom(path, values, RescaleSlope=2, RescaleIntercept=1)
    bare(path, implicit)
    assert path.read_bytes()[:1] == b"\x08"
    assert np.array_equal(read_levels(path), values * 2.0 + 1) and bits_of(path) == 32


@pytest.mark.parametrize("implicit", [True, False])
def test_frames_of_a_data_set_without_preamble(tmp_path: Path, implicit: bool) -> None:
    path = tmp_path / "a.dcm"
    values = np.arange(60, dtype=np.uint16).reshape(3, 4, 5)
    write_dicom(path, values.reshape(12, 5), Rows=4, NumberOfFrames=3)
    bare(path, implicit)
    pages = pages_of(path)
    assert len(pages) == 3 and len({hash_image(page) for page in pages}) == 3
    assert all(np.array_equal(read_levels(page), own) for page, own in zip(pages, values, strict=True))


def test_file_meta_information_without_preamble(tmp_path: Path) -> None:
    values = np.arange(20, dtype=np.uint16).reshape(4, 5)
    write_dicom(tmp_path / "a.dcm", values)
    (tmp_path / "a.dcm").write_bytes((tmp_path / "a.dcm").read_bytes()[132:])
    assert np.array_equal(read_levels(tmp_path / "a.dcm"), values)


def test_bytes_that_begin_like_dicom_are_no_dicom(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for start in (b"\x08\0", b"\x02\0", b"\x08\0\x05\0", b"\x08\0\x05\0CS"):
        for _ in range(50):
            (tmp_path / "a.png").write_bytes(start + random.bytes(400))
            with pytest.raises(DataError, match="is not an image that can be read"):
                read_levels(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(b"\x08\0\x05\0CS\x02\0AB\x08\0\x16\0UI\x02\0" + bytes(200))
    with pytest.raises(DataError, match="DICOM"):
        read_levels(tmp_path / "a.png")


# ---- sets ------------------------------------------------------------------------------------------------------------


def scans(root: Path, nodata: str | None = "-9999", count: int = 8, stack: bool = False) -> DataSet:
    """Float32 scans with a bright square, their last columns empty, and masks of the square."""
    pages = []
    for i in range(count):
        values = np.random.default_rng(i).normal(100, 10, (48, 64)).astype(np.float32)
        values[10:30, 10:30] += 40
        values[:, 56:] = -9999 if nodata else 90
        pages.append(values)
        mask = np.zeros((48, 64), np.uint8)
        mask[10:30, 10:30] = 1
        mask[2:4, 54:60] = 1  # partly on empty pixels
        (root / "masks").mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(root / "masks" / f"{i}.png")
        if not stack:
            write_tiff(root / "images" / f"{i}.tif", values, nodata)
    if stack:
        for path in (root / "masks").iterdir():
            path.unlink()
        write_tiff(root / "images" / "a.tif", np.stack(pages), nodata)
        tifffile.imwrite(root / "masks" / "a.tif", np.stack([mask] * count), metadata=None, photometric="minisblack")
    return read_data("set", root, complete=not stack)


def test_a_set_with_empty_pixels_has_a_window_a_key_and_a_note_of_its_own(tmp_path: Path) -> None:
    scans(tmp_path / "set")
    scans(tmp_path / "plain", None)
    report = extract(tmp_path, tmp_path / "set")
    cache = opened(report.path)
    low, high = cache.recipe.window
    assert 50 < low < high < 200 and cache.recipe.empty_pixels == "0"
    assert cache.data.clipped < 0.01, "empty pixels are not clipped ones"
    told = "8 images name a level of empty pixels (GDAL_NODATA -9999)"
    assert any(told in note and "0.tif" in note for note in cache.data.notes)
    plain = opened(extract(tmp_path, tmp_path / "plain").path)
    assert "empty_pixels" not in plain.recipe.to_json() and not any("empty" in note for note in plain.data.notes)
    assert replace(plain.recipe, window=cache.recipe.window, empty_pixels="0").key == cache.recipe.key


@pytest.mark.parametrize("view", ["identity", *TURNS])
def test_tiles_and_turned_views_keep_what_is_empty(view: str) -> None:
    levels = np.ma.MaskedArray(np.arange(20, dtype=np.uint16).reshape(4, 5), np.eye(4, 5, dtype=bool))
    shown = Part(1, 0, 3, 4, view).take(levels)
    assert np.array_equal(empty_in(shown), Part(1, 0, 3, 4, view).take(np.eye(4, 5, dtype=bool)))
    assert isinstance(shown, np.ma.MaskedArray) and shown.flags.c_contiguous


def test_check_show_and_info_leave_empty_pixels_aside(tmp_path: Path) -> None:
    data = scans(tmp_path / "set")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = check(data, workers=1, page=tmp_path / "check.html", quiet=True)
        contact_sheet(data, tmp_path / "sheet.png")
    assert not {"near_copies", "near_copy_leak"} & {finding.kind for finding in found.findings}
    assert (
        [note for note in found.notes if "empty pixels" in note]
        == [note for note in summarise(data).notes if "empty pixels" in note]
        != []
    )
    shown = np.asarray(Image.open(tmp_path / "sheet.png").convert("L"))
    assert shown.std() > 20


def test_huge_levels_do_not_overflow_where_pictures_are_compared() -> None:
    levels = np.random.default_rng(0).normal(100, 10, (48, 64)).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        usual = look_of(levels)
        levels[0, 0] = -MOST
        assert np.isfinite(look_of(levels).detail).all() and np.isfinite(usual.detail).all()


def test_converted_pages_keep_what_is_empty(tmp_path: Path) -> None:
    data = scans(tmp_path / "set", stack=True)
    data = replace(data, samples=[replace(sample, split="train") for sample in data.samples])
    convert(data, tmp_path / "out", quiet=True)
    again = read_data("set", tmp_path / "out", complete=False)
    for old, new in zip(
        sorted(data.samples, key=lambda s: s.id), sorted(again.samples, key=lambda s: s.id), strict=True
    ):
        levels = read_levels(old.image), read_levels(new.image)
        assert np.array_equal(empty_in(levels[0]), empty_in(levels[1])) and empty_in(levels[1]).any()
        assert np.array_equal(levels[0].compressed(), levels[1].compressed())


def test_predict_treats_empty_pixels_as_training_did(tmp_path: Path) -> None:
    scans(tmp_path / "set")
    run = lambda *words: CliRunner().invoke(cli, ["--workspace", str(tmp_path), *words])  # noqa: E731
    assert run("extract", "--backbone", "embedded", "--data", str(tmp_path / "set"), "--quiet").exit_code == 0
    assert run("probe", "--head", "ridge", "--quiet").exit_code == 0
    row = json.loads((tmp_path / "probes" / "results.jsonl").read_text().splitlines()[0])
    for nodata in ("-9999", "-777"):
        values = tifffile.imread(tmp_path / "set" / "images" / "0.tif")
        values[values == -9999] = float(nodata)
        write_tiff(tmp_path / "new" / f"{nodata}.tif", values, nodata)
    said = run(
        "predict", str(tmp_path / "probes" / row["folder"]), str(tmp_path / "new"), "--out", str(tmp_path / "out")
    )
    assert said.exit_code == 0 and "2 images name a level of empty pixels" in said.output
    assert "more than" not in said.output, "empty pixels do not lie outside of the window"
    masks = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "out" / "masks").iterdir())]
    assert np.array_equal(*masks)


def test_live_features_refuse_a_cache_that_took_empty_pixels_for_levels(tmp_path: Path) -> None:
    scans(tmp_path / "set")
    path = extract(tmp_path, tmp_path / "set").path
    contents = read_contents(path)
    for empty in ("0", ""):
        cache = Cache(path, replace(contents, recipe=replace(contents.recipe, empty_pixels=empty)))
        with LiveFeatures(cache, PoolingBackbone(), CPU, lambda row: (None, None)) as live, torch.no_grad():
            batches = live.batches([np.array([0], dtype=np.intp)])
            if empty:
                found = next(batches)[1].maps["stride4"].numpy()[0].astype(np.float16)
                assert np.array_equal(found, cache.read_row(0, cache.levels[0]))
            else:
                with pytest.raises(DataError, match="pixels that its header calls empty"):
                    next(batches)


@pytest.mark.parametrize("few", ["16-bit", "colour"])
def test_the_one_image_that_differs_is_named(tmp_path: Path, few: str) -> None:
    (tmp_path / "set" / "images").mkdir(parents=True)
    (tmp_path / "set" / "masks").mkdir()
    for i in range(6):
        levels = np.random.default_rng(i).integers(0, 256, (48, 64), dtype=np.uint8)
        odd = levels.astype(np.uint16) if few == "16-bit" else np.dstack([levels] * 3)
        Image.fromarray(odd if i == 3 else levels).save(tmp_path / "set" / "images" / f"p{i}.png")
        Image.fromarray(np.eye(48, 64, dtype=np.uint8)).save(tmp_path / "set" / "masks" / f"p{i}.png")
    data = read_data("set", tmp_path / "set")
    text = (
        "1 image is of 16 bits, where 5 are of 8: p3.png"
        if few == "16-bit"
        else "1 image is in colour, where 5 are grey: p3.png"
    )
    assert text in summarise(data).notes
    if few == "colour":
        assert text in check(data, workers=1, quiet=True).notes
        assert text in extract(tmp_path, tmp_path / "set").notes
        return
    with pytest.raises(DataError, match=text):
        extract(tmp_path, tmp_path / "set")
    assert ("p3.png",) in [finding.entries for finding in check(data, workers=1, quiet=True).findings]
