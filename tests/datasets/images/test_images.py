"""Images of every kind: nothing lost in decoding, one intensity policy wherever they are read, and hostile files."""

import os
import struct
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
import tifffile
from helpers import extract, recipe_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nst
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLosslessSV1,
    generate_uid,
)

from featprobe.datasets import DataSet, read_data
from featprobe.datasets.images.reading import (
    bits_of,
    frame_image,
    image_size,
    image_window,
    read_levels,
    to_unit,
    training_window,
)
from featprobe.errors import DataError
from featprobe.geometry import place
from featprobe.intensity import Intensity
from featprobe.io.pictures import MAX_PIXELS
from featprobe.stages.extraction.survey import choose_intensity, survey
from featprobe.stages.predict import find_images

FEW = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SIDES = st.integers(1, 24)
DEEP = nst.arrays(np.uint16, st.tuples(SIDES, SIDES))
FRACTIONS = nst.arrays(
    np.float32, st.tuples(SIDES, SIDES), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
)


def write_dicom(path: Path, values: NDArray[Any], syntax: str = ExplicitVRLittleEndian, **more: Any) -> None:
    """A DICOM file of a grey or RGB image; `more` are further attributes, None to leave one out."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = Dataset()
    data.file_meta, data.preamble = meta, b"\0" * 128
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.Rows, data.Columns = values.shape[:2]
    data.SamplesPerPixel = 1 if values.ndim == 2 else 3
    data.PhotometricInterpretation = "MONOCHROME2" if values.ndim == 2 else "RGB"
    if values.ndim == 3:
        data.PlanarConfiguration = 0
    data.BitsAllocated = data.BitsStored = 8 * values.dtype.itemsize
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(values.dtype.kind == "i")
    big = syntax == ExplicitVRBigEndian
    data.PixelData = values.astype(values.dtype.newbyteorder(">" if big else "<")).tobytes()
    data["PixelData"].VR = "OB" if values.dtype.itemsize == 1 else "OW"
    for name, value in more.items():
        if value is None:
            delattr(data, name)
        else:
            setattr(data, name, value)
    pydicom.dcmwrite(path, data, enforce_file_format=True)


WRITERS: dict[str, Callable[[Path, NDArray[Any]], Any]] = {
    "a.png": lambda path, levels: Image.fromarray(levels).save(path),
    "a.tif": lambda path, levels: tifffile.imwrite(path, levels, photometric="minisblack"),
    "big.tif": lambda path, levels: tifffile.imwrite(path, levels, byteorder=">", photometric="minisblack"),
    "bigtiff.tif": lambda path, levels: tifffile.imwrite(path, levels, bigtiff=True, photometric="minisblack"),
    "lzw.tif": lambda path, levels: tifffile.imwrite(path, levels, compression="lzw", predictor=True),
    "zlib.tif": lambda path, levels: tifffile.imwrite(path, levels, compression="zlib", rowsperstrip=3),
    "tiled.tif": lambda path, levels: tifffile.imwrite(path, levels, tile=(16, 16), byteorder=">", compression="zstd"),
    "a.npy": lambda path, levels: np.save(path, levels),
    "big.npy": lambda path, levels: np.save(path, levels.astype(levels.dtype.newbyteorder(">"))),
    "channel.npy": lambda path, levels: np.save(path, levels[:, :, None]),
    "fortran.npy": lambda path, levels: np.save(path, np.asfortranarray(levels)),
    "a.dcm": write_dicom,
    "implicit.dcm": lambda path, levels: write_dicom(path, levels, ImplicitVRLittleEndian),
    "big.dcm": lambda path, levels: write_dicom(path, levels, ExplicitVRBigEndian),
}


# ---- nothing is lost in decoding -------------------------------------------------------------------------------------


@FEW
@given(levels=DEEP)
def test_16_bit_levels_arrive_as_they_are_from_every_format(tmp_path: Path, levels: NDArray[np.uint16]) -> None:
    for name, write in WRITERS.items():
        write(tmp_path / name, levels)
        read = read_levels(tmp_path / name)
        assert read.dtype == np.uint16 and np.array_equal(read, levels), name
        assert (image_size(tmp_path / name), bits_of(tmp_path / name)) == (levels.shape, 16)


@pytest.mark.parametrize("policy", ["none", "percentile:1:99", "minmax:log", "percentile:1:99:image", "log:image"])
def test_a_ramp_is_the_same_picture_in_every_format(tmp_path: Path, policy: str) -> None:
    ramp = np.arange(1000, 61_000, 20, dtype=np.uint16).reshape(50, 60)
    parsed, pictures = Intensity.parse(policy), {}
    for name, write in WRITERS.items():
        write(tmp_path / name, ramp)
        window = training_window([tmp_path / name], parsed)
        placement = place(ramp.shape, (64, 64), "resize", 32)
        recipe = recipe_of(intensity=policy, window=window)
        pictures[name] = frame_image(read_levels(tmp_path / name), placement, recipe)
    assert all(np.array_equal(picture, pictures["a.png"]) for picture in pictures.values())
    assert np.ptp(pictures["a.png"]) > 0.8


@FEW
@given(levels=FRACTIONS)
def test_float32_levels_that_differ_in_the_file_differ_when_read(tmp_path: Path, levels: NDArray[np.float32]) -> None:
    for name in set(WRITERS) - {"a.png", "a.dcm", "implicit.dcm", "big.dcm"}:
        WRITERS[name](tmp_path / name, levels)
        read = read_levels(tmp_path / name)
        assert read.dtype == np.float32 and bits_of(tmp_path / name) == 32
        assert np.array_equal(read.view(np.uint32), levels.view(np.uint32)), name


@FEW
@given(
    levels=DEEP,
    slope=st.floats(1e-4, 1e4),
    intercept=st.floats(-3e4, 3e4),
    inverted=st.booleans(),
)
def test_rescaled_dicom_levels_stay_apart_and_in_order(
    tmp_path: Path, levels: NDArray[np.uint16], slope: float, intercept: float, inverted: bool
) -> None:
    path = tmp_path / "a.dcm"
    slope, intercept = float(f"{slope:.5g}"), float(f"{intercept:.5g}")  # DICOM's decimal texts are of 16 characters
    kind = "MONOCHROME1" if inverted else "MONOCHROME2"
    write_dicom(path, levels, RescaleSlope=slope, RescaleIntercept=intercept, PhotometricInterpretation=kind)
    stored = 65535 - levels if inverted else levels
    try:
        read = read_levels(path)
    except DataError as error:
        assert "can't tell apart" in str(error) and slope < np.spacing(np.float32(abs(intercept) + slope * 65535))
        return
    if (slope, intercept) == (1, 0):
        assert np.array_equal(read, stored)
        return
    assert read.dtype == np.float32 and bits_of(path) == 32
    assert np.allclose(read, stored * slope + intercept, rtol=1e-6, atol=1e-6 * max(1, abs(intercept)))
    assert len(np.unique(read)) == len(np.unique(levels))
    assert np.array_equal(np.argsort(read, axis=None, kind="stable"), np.argsort(stored, axis=None, kind="stable"))


def test_dicom_of_every_photometric_interpretation(tmp_path: Path) -> None:
    path = tmp_path / "a.dcm"
    grey = np.arange(0, 4096, 16, dtype=np.uint16).reshape(16, 16)
    write_dicom(path, grey, PhotometricInterpretation="MONOCHROME1", BitsStored=12, HighBit=11)
    assert np.array_equal(read_levels(path), 4095 - grey)
    signed = (grey.astype(np.int32) - 2000).astype(np.int16)
    write_dicom(path, signed)
    assert bits_of(path) == 32 and np.array_equal(read_levels(path), signed.astype(np.float32))
    write_dicom(path, signed, PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(read_levels(path), -1.0 - signed)
    colour = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    write_dicom(path, colour)
    assert bits_of(path) == 8 and np.array_equal(read_levels(path), colour)
    write_dicom(path, grey | 0xF000, PhotometricInterpretation="MONOCHROME1", BitsStored=12, HighBit=11)
    assert np.array_equal(read_levels(path), 4095 - grey), "bits beyond those stored belong to no pixel"
    write_dicom(path, grey, PhotometricInterpretation="PALETTE COLOR")
    with pytest.raises(DataError, match="pixel format PALETTE COLOR"):
        read_levels(path)


def test_without_pydicom_a_dicom_file_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dicom(tmp_path / "a.dcm", np.zeros((4, 4), np.uint16))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(DataError, match=r"pip install 'featprobe\[dicom\]'"):
        image_size(tmp_path / "a.dcm")


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.webp", "deep.tif"])
def test_images_are_turned_as_their_orientation_asks(tmp_path: Path, name: str, tag: int) -> None:
    path = tmp_path / name
    shown = np.zeros((24, 40), dtype=np.uint8)  # an F, upright
    shown[4:20, 8:14] = shown[4:8, 8:30] = shown[11:14, 8:24] = 200
    turned: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {  # the camera's picture, whose orientation is `tag`
        1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: np.transpose,
        6: np.rot90, 7: lambda a: np.rot90(a, 2).T, 8: lambda a: np.rot90(a, -1),
    }  # fmt: skip
    stored = np.ascontiguousarray(turned[tag](shown))
    if name == "deep.tif":
        tifffile.imwrite(path, stored.astype(np.uint16) * 256, extratags=[(274, 3, 1, tag, True)])
        shown = shown.astype(np.uint16) * 256
    else:
        exif = Image.Exif()
        exif[274] = tag
        Image.fromarray(stored).save(path, exif=exif, **({"lossless": True} if name == "a.webp" else {"quality": 100}))
    read = read_levels(path)
    read = read[:, :, 0] if name == "a.webp" else read
    assert image_size(path) == read.shape == (24, 40)
    assert np.abs(read.astype(int) - shown).max() <= (8 if name == "a.jpg" else 0)


@pytest.mark.parametrize("transparent", [False, True])
@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1"])
def test_a_png_is_read_as_by_pillow(tmp_path: Path, mode: str, transparent: bool) -> None:
    path = tmp_path / "a.png"
    colours = np.random.default_rng(0).integers(0, 256, (9, 7, 4), dtype=np.uint8)
    transparency = {"L": 3, "P": 3, "RGB": (3, 4, 5)}.get(mode) if transparent else None
    options = {} if transparency is None else {"transparency": transparency}
    Image.fromarray(colours).convert(mode).save(path, **options)
    with Image.open(path) as stored:
        grey = mode in ("L", "LA", "1")
        wanted = np.asarray(stored.convert("L")) if grey else np.asarray(stored.convert("RGBA"))[:, :, :3]
    assert np.array_equal(read_levels(path), wanted)


@pytest.mark.parametrize("text", [b"date:create\x002024", b"XML:com.adobe.xmp\x00<x/>"])
@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3), (4, 5, 4)])
def test_a_text_behind_the_pixels_of_a_png_costs_no_depth(tmp_path: Path, shape: tuple[int, ...], text: bytes) -> None:
    levels = np.random.default_rng(0).integers(0, 1 << 16, shape).astype(np.uint16)
    path = tmp_path / "a.png"
    data = imagecodecs.png_encode(levels)
    path.write_bytes(data[:-12] + chunk(b"tEXt", text) + data[-12:])
    found = read_levels(path)
    assert found.dtype == np.uint16
    assert np.array_equal(found, levels if levels.ndim == 2 else levels[:, :, :3])


def test_an_orientation_behind_the_pixels_of_a_png_is_refused(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    path = tmp_path / "a.png"
    Image.fromarray(np.eye(9, dtype=np.uint8)).save(path)
    data = path.read_bytes()
    path.write_bytes(data[:-12] + chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + data[-12:])
    with pytest.raises(DataError, match="orientation tag after its pixels"):
        read_levels(path)


@pytest.mark.parametrize(
    ("write", "shape", "bits"),
    [
        ({"photometric": "rgb"}, (9, 8, 3), 8),
        ({"photometric": "rgb", "compression": "lzw"}, (9, 8, 3), 16),
        ({"photometric": "rgb", "planarconfig": "separate"}, (9, 8, 3), 16),
        ({"photometric": "rgb", "extrasamples": ["unassalpha"]}, (9, 8, 4), 16),
        ({"photometric": "minisblack", "planarconfig": "contig", "extrasamples": ["unassalpha"]}, (9, 8, 2), 16),
    ],
)
def test_colour_and_alpha_of_a_tiff(tmp_path: Path, write: dict[str, Any], shape: tuple[int, ...], bits: int) -> None:
    values = np.random.default_rng(0).integers(0, 1 << bits, shape).astype(f"uint{bits}")
    stored = np.moveaxis(values, 2, 0) if "separate" in write.values() else values
    tifffile.imwrite(tmp_path / "a.tif", stored, **write)
    read = read_levels(tmp_path / "a.tif")
    assert bits_of(tmp_path / "a.tif") == bits and read.dtype == values.dtype
    assert np.array_equal(read, values[:, :, 0] if shape[2] == 2 else values[:, :, :3])


def test_tiffs_of_fewer_bits_palettes_and_white_that_is_0(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    tifffile.imwrite(path, grey, photometric="miniswhite")
    assert np.array_equal(read_levels(path), 255 - grey)
    tifffile.imwrite(path, grey.astype(np.uint16) * 99, photometric="miniswhite")
    assert np.array_equal(read_levels(path), 65535 - grey.astype(np.uint16) * 99)
    for bits in (1, 2, 4):
        few = grey % (1 << bits)
        tifffile.imwrite(path, few == 1 if bits == 1 else few, bitspersample=bits, photometric="minisblack")
        assert bits_of(path) == 8 and np.array_equal(read_levels(path), few * (255 // ((1 << bits) - 1)))
    tifffile.imwrite(path, (grey * 16).astype(np.uint16), bitspersample=12)
    assert np.array_equal(read_levels(path), (grey * 16).astype(np.uint16))
    colours = np.random.default_rng(0).integers(0, 256, (3, 256), dtype=np.uint8)
    tifffile.imwrite(path, grey, photometric="palette", colormap=colours.astype(np.uint16) * 257)
    assert np.array_equal(read_levels(path), colours.T[grey])
    tifffile.imwrite(path, grey, photometric="palette", colormap=colours.astype(np.uint16) * 251)
    with pytest.raises(DataError, match="palette of 16 bits"):
        read_levels(path)
    Image.fromarray(np.dstack([grey] * 4), mode="CMYK").save(path)
    assert read_levels(path).shape == (16, 16, 3)


@pytest.mark.parametrize("stack", [{}, {"imagej": True}, {"compression": "zlib"}, {"ome": True}])
def test_a_tiff_of_several_pages_says_how_many_and_how_to_cut_it(tmp_path: Path, stack: dict[str, Any]) -> None:
    path = tmp_path / "scan.tif"
    tifffile.imwrite(path, np.zeros((3, 8, 8), np.uint16), photometric="minisblack", **stack)
    for look in (read_levels, image_size, bits_of):
        with pytest.raises(DataError, match=r"(?s)holds 3 images.*tiffsplit scan\.tif scan-"):
            look(path)


# ---- the intensity policy --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "full"),
    [
        *((old, old) for old in ("percentile:0.01:99.99", "percentile:2:98", "window:10:200", "minmax", "none")),
        ("log", "percentile:0.01:99.99:log"),
        ("log:image", "percentile:0.01:99.99:log:image"),
        ("percentile:1:99:image", "percentile:1.0:99.0:image"),
        ("minmax:image", "minmax:image"),
        ("window:20:60000:log", "window:20.0:60000.0:log"),
        ("window:-1:0.5", "window:-1:0.5"),
        ("window:0.12345678:0.12345679", "window:0.12345678:0.12345679"),
    ],
)
def test_a_policy_is_written_as_it_is_read(text: str, full: str) -> None:
    assert str(Intensity.parse(text)) == full and Intensity.parse(full) == Intensity.parse(text)


@pytest.mark.parametrize("text", ["none:log", "none:image", "window:1:2:image", "window:0:9:log", "log:log", "image",
                                  "minmax:image:log", "percentile:log", "log:1:99", "window:0:1e999"])  # fmt: skip
def test_a_policy_whose_parts_do_not_go_together_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="not an intensity policy"):
        Intensity.parse(text)


def by_sorting(levels: NDArray[Any], low: float, high: float) -> tuple[float, float]:
    """The window of a percentile policy, from the pixels in order: the levels that that share lies below, and up to."""
    pixels = np.sort(levels, axis=None)
    first = min(int(low / 100 * len(pixels)), len(pixels) - 1)
    return float(pixels[first]), float(pixels[max(0, int(np.ceil(high / 100 * len(pixels))) - 1)])


@FEW
@given(
    images=st.lists(nst.arrays(np.float32, (5, 7), elements=st.floats(-1e6, 1e6, width=32)), min_size=1, max_size=3),
    percent=st.sampled_from([(0.0, 100.0), (1.0, 99.0), (20.0, 60.0)]),
    log=st.booleans(),
)
def test_windows_of_fractions_are_exact(
    tmp_path: Path, images: list[NDArray[np.float32]], percent: tuple[float, float], log: bool
) -> None:
    paths = [tmp_path / f"{i}.npy" for i in range(len(images))]
    for path, levels in zip(paths, images, strict=True):
        np.save(path, levels)
    pixels = np.concatenate([levels.ravel() for levels in images])
    pixels = pixels[pixels > 0] if log else pixels
    policy = Intensity("percentile", *percent, log=log)
    wanted = by_sorting(pixels, *percent) if pixels.size else (1.0, 1.0)
    if not wanted[0] < wanted[1]:
        with pytest.raises(DataError, match=r"no percentile:.* window can be set"):
            training_window(paths, policy)
    else:
        assert training_window(paths, policy) == wanted
    assert image_window(pixels, policy) == wanted


@FEW
@given(levels=DEEP, low=st.sampled_from([0.0, 0.01, 5.0]), high=st.sampled_from([60.0, 99.99, 100.0]))
def test_a_set_of_one_image_has_that_images_window(
    tmp_path: Path, levels: NDArray[np.uint16], low: float, high: float
) -> None:
    Image.fromarray(levels).save(tmp_path / "a.png")
    own = image_window(levels, Intensity("percentile", low, high, image=True))
    assert own == by_sorting(levels, low, high)
    if own[0] < own[1]:
        assert training_window([tmp_path / "a.png"], Intensity("percentile", low, high)) == own


@FEW
@given(
    levels=st.one_of(DEEP, FRACTIONS),
    policy=st.sampled_from(["log:image", "percentile:1:99:image", "minmax:image", "minmax:log:image"]),
)
def test_an_images_own_policy_is_monotone_and_fills_0_to_1(levels: NDArray[Any], policy: str) -> None:
    parsed = Intensity.parse(policy)
    unit = to_unit(levels, None, parsed)
    assert unit.dtype == np.float32 and np.isfinite(unit).all() and unit.min() >= 0 and unit.max() <= 1
    assert (np.diff(unit.ravel()[np.argsort(levels, axis=None, kind="stable")]) >= 0).all()
    low, high = image_window(levels, parsed)
    assert (unit[levels <= low] == 0).all() and (low == high or np.allclose(unit[levels >= high], 1, atol=1e-6))


def test_a_logarithm_makes_thickness_linear() -> None:
    thickness = np.linspace(0, 3, 100)
    levels = (60_000 * np.exp(-thickness)).astype(np.uint16)[None]
    unit = to_unit(levels, (float(levels.min()), float(levels.max())), Intensity.parse("minmax:log"))
    assert np.allclose(unit[0], 1 - thickness / 3, atol=1e-3)
    dimmed = to_unit(levels // 2, None, Intensity.parse("log:image"))
    assert np.allclose(dimmed, to_unit(levels, None, Intensity.parse("log:image")), atol=1e-3)


def test_an_image_of_one_level_is_0_and_sparse_defects_are_1() -> None:
    levels = np.full((40, 40), 77, dtype=np.uint16)
    assert (to_unit(levels, None, Intensity.parse("percentile:1:99:image")) == 0).all()
    levels[3, 4] = 99
    unit = to_unit(levels, None, Intensity.parse("percentile:1:99:image"))
    assert unit[3, 4] == 1 and unit.sum() == 1


def test_fractions_need_a_window() -> None:
    with pytest.raises(DataError, match="need an intensity window"):
        to_unit(np.zeros((2, 2), np.float32), None)
    assert np.array_equal(to_unit(np.array([[-1, 0.25, 2]], np.float32), (0.0, 1.0)), [[0, 0.25, 1]])


def mask_set(root: Path, images: dict[str, Callable[[Path], Any]], size: tuple[int, int]) -> DataSet:
    """Folders of images, each written by its function, and of masks of this size."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for name, write in images.items():
        write(root / "images" / name)
        Image.fromarray(np.eye(*size, dtype=np.uint8)).save((root / "masks" / name).with_suffix(".png"))
    return read_data("set", root)


def test_labels_are_in_the_frame_of_the_picture_as_it_is_looked_at(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    lying = Image.fromarray(np.arange(24 * 40, dtype=np.uint8).reshape(24, 40))  # of a camera held upright
    data = mask_set(tmp_path, {f"{i}.jpg": lambda path: lying.save(path, exif=exif) for i in range(5)}, (40, 24))
    assert {found.size for found in survey(data, workers=1, skip_bad=False, quiet=True).found} == {(40, 24)}


def test_fractions_are_stretched_by_default_and_never_divided(tmp_path: Path) -> None:
    ramp = np.linspace(-3, 5, 64, dtype=np.float32).reshape(8, 8)
    writers = {f"{i}.tif": lambda path: tifffile.imwrite(path, ramp) for i in range(5)}
    looked = survey(mask_set(tmp_path, writers, (8, 8)), workers=1, skip_bad=False, quiet=True)
    policy, window = choose_intensity(looked, None)
    assert str(policy) == "percentile:0.01:99.99" and window == (-3.0, 5.0)
    with pytest.raises(DataError, match=r"(?s)no largest value.*window:0:1"):
        choose_intensity(looked, Intensity("none"))
    WRITERS["a.tif"](tmp_path / "images" / "0.tif", np.zeros((8, 8), np.uint16))
    mixed = survey(read_data("set", tmp_path), workers=1, skip_bad=False, quiet=True)
    with pytest.raises(DataError, match="mixes 16-bit and 32-bit images"):
        choose_intensity(mixed, None)


def test_a_link_to_itself_is_named_or_set_aside(tmp_path: Path) -> None:
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    writers: dict[str, Callable[[Path], Any]] = {f"{i}.png": grey.save for i in range(5)}
    data = mask_set(tmp_path / "set", writers | {"5.png": lambda path: path.symlink_to(path.name)}, (8, 8))
    with pytest.raises(DataError, match=r"5\.png can't be read: Too many levels of symbolic links"):
        extract(tmp_path, tmp_path / "set")
    report = extract(tmp_path, tmp_path / "set", skip_bad=True)
    assert [name for name, _ in report.unreadable] == ["5.png"] and len(data.samples) == 6
    assert len(find_images([tmp_path / "set" / "images"], tmp_path / "out")) == 6


# ---- hostile files ---------------------------------------------------------------------------------------------------


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def tiff(entries: dict[int, int], data: bytes = b"", following: int = 0) -> bytes:
    """A little-endian TIFF of one page: tag -> one 32-bit value; then where the next page is said to be, and `data`."""
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + fields + struct.pack("<I", following) + data


GREY_TIFF = {256: 8, 257: 8, 258: 16, 259: 1, 262: 1, 273: 200, 277: 1, 278: 8, 279: 128}


def hostile_files(folder: Path) -> dict[Path, str]:
    """Files that are no image, or claim to be a huge one, or hold what is no level; and what is said of each."""
    levels = np.random.default_rng(0).integers(0, 65536, (64, 64), dtype=np.uint16)
    files: dict[str, tuple[Callable[[Path], Any], str]] = {
        "bomb.png": (
            lambda p: p.write_bytes(
                b"\x89PNG\r\n\x1a\n"
                + chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 16, 0, 0, 0, 0))
                + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
                + chunk(b"IEND", b"")
            ),
            "too large",
        ),
        "huge.tif": (lambda p: p.write_bytes(tiff(GREY_TIFF | {256: 2**31, 257: 2**31})), "too large"),
        "claims.tif": (lambda p: p.write_bytes(tiff(GREY_TIFF | {256: 12_000, 257: 12_000, 279: 2**31})), "not there"),
        "tile.tif": (
            lambda p: p.write_bytes(tiff(GREY_TIFF | {322: 2**16, 323: 2**16, 324: 200, 325: 128}, b"\0" * 300)),
            "too large",
        ),
        "no strips.tif": (lambda p: p.write_bytes(tiff({256: 8, 257: 8, 258: 16})), "no strips.tif"),
        "many strips.tif": (
            lambda p: p.write_bytes(b"II*\0" + struct.pack("<IHHHII", 8, 1, 273, 4, 2**31, 8) + b"\0" * 50),
            "many strips.tif",
        ),
        "loop.tif": (lambda p: p.write_bytes(tiff(GREY_TIFF, b"\0" * 500, following=8)), "lead in a circle"),
        "cut.tif": (lambda p: (tifffile.imwrite(p, levels), os.truncate(p, 5000)), "not there"),
        "cut.npy": (lambda p: (np.save(p, levels), os.truncate(p, 5000)), "cut.npy"),
        "cut.dcm": (lambda p: (write_dicom(p, levels), os.truncate(p, 5000)), "cut.dcm"),
        "cut.png": (lambda p: (Image.fromarray(levels).save(p), os.truncate(p, 500)), "truncated or damaged"),
        "nan.tif": (lambda p: tifffile.imwrite(p, np.full((4, 4), np.nan, np.float32)), "holds 16 values that are not"),
        "inf.npy": (lambda p: np.save(p, np.array([[1.0, np.inf]])), "holds 1 values that are not finite"),
        "double.npy": (lambda p: np.save(p, np.array([[0.1, 1.0]])), "values that float32 can't hold"),
        "object.npy": (lambda p: np.save(p, np.array([[{}]], dtype=object), allow_pickle=True), "object.npy"),
        "struct.npy": (lambda p: np.save(p, np.zeros((2, 2), [("a", "u1")])), "pixel format"),
        "complex.npy": (lambda p: np.save(p, np.zeros((2, 2), complex)), "pixel format complex128"),
        "claims.npy": (
            lambda p: p.write_bytes(
                b"\x93NUMPY\x01\0" + struct.pack("<H", 118)
                + b"{'descr': '<f4', 'fortran_order': False, 'shape': (9999999, 9999999), }".ljust(117) + b"\n"
            ),
            "claims.npy",
        ),
        "empty.npy": (lambda p: np.save(p, np.zeros((0, 5), np.uint8)), "0 pixels"),
        "flat.npy": (lambda p: np.save(p, np.zeros(5, np.uint8)), "shape (5,)"),
        "no pixels.dcm": (lambda p: write_dicom(p, levels, PixelData=None), "without pixel data"),
        "no image.dcm": (lambda p: write_dicom(p, levels, Rows=None, PixelData=None), "without an image"),
        "deflated.dcm": (lambda p: write_dicom(p, levels, DeflatedExplicitVRLittleEndian), "deflated"),
        "frames.dcm": (lambda p: write_dicom(p, levels, NumberOfFrames=4), "holds 4 images"),
        "claims.dcm": (lambda p: write_dicom(p, levels, Rows=65535, Columns=65535), "too large"),
        "text.tif": (lambda p: p.write_text("not an image"), "not an image that can be read"),
        "half.tif": (lambda p: p.write_bytes(b"II*\0"), "half.tif"),
        "half.npy": (lambda p: p.write_bytes(b"\x93NUMPY\x01\0\xff\xff"), "half.npy"),
        "half.dcm": (lambda p: p.write_bytes(b"\0" * 128 + b"DICM"), "half.dcm"),
        "ghost.png": (lambda p: p.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "not an image"),
        "itself.png": (lambda p: p.symlink_to(p.name), "can't be read"),
        "missing.png": (lambda p: None, "can't be read"),
        "zero.png": (lambda p: p.write_bytes(b""), "is an empty file (0 bytes)"),
    }  # fmt: skip
    for name, (write, _) in files.items():
        write(folder / name)
    return {folder / name: said for name, (_, said) in files.items()}


def test_hostile_files_end_with_the_clear_error_and_little_memory(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said_of = hostile_files(tmp_path)
    capfd.readouterr()
    tracemalloc.start()
    for path, said in said_of.items():
        for look in (image_size, read_levels):
            try:
                look(path)
            except DataError as error:
                told = str(error)
        assert said in told and str(path) in told
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50_000_000, "the claims are of gigabytes"
    assert capfd.readouterr().err == ""


def test_a_compressed_dicom_file_without_a_decoder_names_what_is_missing(tmp_path: Path) -> None:
    if pydicom.pixels.get_decoder(JPEGLosslessSV1).is_available:
        pytest.skip("a decoder of JPEG Lossless is installed")
    path = tmp_path / "a.dcm"
    frame = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xd9"])
    write_dicom(path, np.zeros((4, 4), np.uint16))
    data = pydicom.dcmread(path)
    data.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    data.PixelData = frame
    data["PixelData"].VR = "OB"
    data.save_as(path)
    with pytest.raises(DataError, match=r"(?s)compressed as JPEG Lossless.*no decoder.*pylibjpeg"):
        read_levels(path)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["a.tif", "lzw.tif", "tiled.tif", "a.npy", "a.dcm", "zlib.tif"]),
    places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.floats(0.1, 1),
)
def test_damaged_files_of_every_kind_are_read_or_refused_and_nothing_else(
    tmp_path: Path, name: str, places: list[tuple[float, int]], cut: float
) -> None:
    path = tmp_path / name
    WRITERS[name](path, np.arange(20 * 30, dtype=np.uint16).reshape(20, 30))
    data = bytearray(path.read_bytes())
    for share, value in places:
        data[int(share * min(len(data), 1200))] = value
    path.write_bytes(data[: max(1, int(cut * len(data)))])
    try:
        read = read_levels(path)
    except DataError as error:
        assert str(path) in str(error)
    else:
        assert read.ndim in (2, 3) and read.dtype in (np.uint8, np.uint16, np.float32)
        assert image_size(path) == read.shape[:2] and read[..., 0].size <= MAX_PIXELS
