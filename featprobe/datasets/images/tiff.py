"""TIFF: files of one image, and pages of a stack (see `pages`)."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from featprobe.datasets.images.pages import tiff_images, tiff_images_in, tiff_mask_behind
from featprobe.datasets.images.pixels import (
    Levels,
    Opened,
    bits_of_dtype,
    check_page,
    largest,
    to_levels,
    turned,
    unusable,
    without_alpha,
    without_empty,
)
from featprobe.errors import DataError
from featprobe.io.disk import parse_json
from featprobe.io.pictures import MAX_PIXELS, check_claim, check_held, too_large
from featprobe.targets import IGNORE

PLACES = (273, 324, 330)  # tags with places in the file: strips, tiles, further IFDs
STK_PLANES = 33629  # MetaMorph's tag with one entry per plane of an IFD
PLAIN = ("MINISBLACK", "MINISWHITE", "RGB")  # kinds of samples that are levels
CONVERTED = ("PALETTE", "SEPARATED", "YCBCR")  # kinds of samples that become RGB, of 8 bits
BANDS = {"RGB": 3, "YCBCR": 3, "SEPARATED": 4}  # samples that a kind needs; other kinds need one
BITS, INKS, NODATA = 258, 332, 42113  # tags
DENSEST = {1: 8, 5: 1400, 8: 1032, 32773: 64, 32946: 1032}  # compressions: most bytes that one compressed byte gives
CMYK, JPEG = 1, (6, 7)  # an ink set, and compressions that decode to RGB
ALPHA = (1, 2)  # ExtraSamples' values for an alpha channel: premultiplied, or not
EXTREME, NEAR = 1e30, 1e-5  # above EXTREME levels are no chance, and agree within a relative NEAR


@contextmanager
def open_tiff(path: Path, stream: BinaryIO, number: int | None) -> Iterator[Opened]:
    """Open a TIFF of one image, or the page of one that the path names."""
    import tifffile  # it takes time, and most words of a command line need none of it

    offsets = tiff_images_in(stream, path) if number is None else tiff_images(path.parent)
    stream.seek(0)
    check_page(path, number, len(offsets), f", for example with libtiff:  tiffsplit {path.name} {path.stem}-")
    number = number or 0
    behind_one = offsets.count(offsets[0]) > 1
    plane = number if behind_one else 0
    mask_at = 0 if behind_one else tiff_mask_behind(stream, path, offsets[number])
    stream.seek(0)
    with tifffile.TiffFile(stream) as file:
        page: Any = file.pages.first
        if page.offset != offsets[number]:
            file.filehandle.seek(offsets[number])
            page = tifffile.TiffPage(file, number)
        check_claim(path, page.imagelength, page.imagewidth)
        _check_planes(path, page, plane, behind_one)
        kind = getattr(page.photometric, "name", str(page.photometric))
        each = page.tags.valueof(BITS, default=page.bitspersample)
        bits = page.bitspersample if not isinstance(each, tuple) or len(set(each)) == 1 else None
        known = kind in PLAIN or (kind in CONVERTED and bits is not None and bits <= 8)
        other_colours = (kind == "SEPARATED" and page.tags.valueof(INKS, default=CMYK) != CMYK) or (
            kind == "YCBCR" and page.compression not in JPEG
        )
        if not known or other_colours or bits is None or page.dtype is None or page.imagedepth > 1:
            depths = each if bits is None else f"{page.samplesperpixel} x {bits}"
            raise DataError(unusable(path, f"{kind}, {depths} bits"))
        bands = _bands(page, kind, path)
        turn = page.tags.valueof("Orientation", default=1)
        turn = turn if turn in range(1, 9) else 1
        nodata = _nodata(page, path)
        shown = _mask_at(file, mask_at, page, path)
        called = [f"GDAL_NODATA {nodata:g}"] if nodata is not None else []
        called += ["a transparency mask"] if shown else []
        yield Opened(
            turned(page.imagelength, page.imagewidth, turn),
            bits_of_dtype(page.dtype, path),
            1 if kind in PLAIN and bands == 1 else 3,
            lambda: _levels(page, _values(page, plane), kind, nodata, shown, path),
            turn,
            lambda: (piece for part in (page, shown) if part for piece in _bytes(part, plane)),
            lambda: _mask(page, _values(page, plane), kind, nodata),
            empty=" and ".join(called),
            unnamed=kind != "RGB" and kind in PLAIN and bands == 3,
        )


def _bands(page: Any, kind: str, path: Path) -> int:
    """The number of samples per pixel that hold levels: all but an alpha channel (by ExtraSamples) after them.

    Raises DataError for another number than one for grey, three for colour, or as many as its kind of colours needs.
    """
    count, wanted = page.samplesperpixel, BANDS.get(kind, 1)
    extra = [int(code) for code in page.extrasamples][: count - wanted]
    extra = [0] * (count - wanted - len(extra)) + extra
    alpha = bool(extra) and extra[-1] in ALPHA
    bands = count - alpha
    grey_or_three = bands == wanted or (kind in ("MINISBLACK", "MINISWHITE") and bands == 3)
    if not grey_or_three or any(code in ALPHA for code in extra[:-1]) or (alpha and kind in CONVERTED):
        kinds = ", ".join({0: "unspecified", 1: "alpha", 2: "alpha"}.get(code, str(code)) for code in extra)
        raise DataError(
            f"{path} holds {count} bands: {kind}, and after it {len(extra)} that ExtraSamples calls {kinds}.\n"
            "  wanted  1 band of grey or 3 of colour, and at most one alpha channel after them, named in ExtraSamples\n"
            f"  found   {bands} bands that hold data\n"
            "Nothing was read, because a band would be dropped. Write the bands that you need into another file\n"
            "(gdal_translate -b 1 IN OUT), or set ExtraSamples to 2 (alpha) where the last band is alpha."
        )
    return bands


def _nodata(page: Any, path: Path) -> float | None:
    """The stored value that GDAL_NODATA calls empty; None without the tag, and for a value that no pixel can have.

    Raises DataError for a text that is no number.
    """
    value = page.tags.valueof(NODATA, default="")
    text = (value.decode("latin-1") if isinstance(value, bytes) else str(value)).strip("\0 ")
    if not text:
        return None
    try:
        number = float(text)
    except ValueError as error:
        raise DataError(
            f"{path} calls {text[:80]!r} the level of its empty pixels (tag GDAL_NODATA).\n  wanted  a number, or nan\n"
            "So it is unknown which pixels are empty. Correct the tag, or remove it:  gdal_edit.py -unsetnodata FILE"
        ) from error
    if np.isinf(number) and "inf" not in text.lower():  # the lowest float64, rounded to fifteen digits
        number = math.copysign(np.finfo(float).max, number)
    if page.dtype.kind == "f":
        return number
    low, high = (0, 1) if page.dtype.kind == "b" else (np.iinfo(page.dtype).min, np.iinfo(page.dtype).max)
    return number if number.is_integer() and low <= number <= high else None


def _mask_at(file: Any, offset: int, page: Any, path: Path) -> Any:
    """The page of a transparency mask, which is 0 where the image is empty; None for offset 0. Raises DataError."""
    if not offset:
        return None
    import tifffile

    file.filehandle.seek(offset)
    mask = tifffile.TiffPage(file, 0)
    found = mask.imagelength, mask.imagewidth, mask.samplesperpixel, mask.imagedepth
    if found != (page.imagelength, page.imagewidth, 1, 1) or mask.dtype is None:
        size = f"{page.imagelength}x{page.imagewidth} pixels (height x width)"
        raise DataError(
            f"{path} has a transparency mask that does not fit its image.\n  wanted  {size}, one band\n"
            f"  found   {found[0]}x{found[1]}, {found[2]} bands"
        )
    _check_segments(path, mask)
    return mask


def _empty(values: NDArray[Any], nodata: float | None) -> NDArray[np.bool_] | None:
    """(height, width), bool: pixels where all bands hold the empty value; None where there are none.

    Above 1e30 the values need not agree in all digits, because GDAL_NODATA is a text.
    """
    if nodata is None:
        return None
    if np.isnan(nodata):
        found = np.isnan(values)
    elif values.dtype.kind == "f" and np.isfinite(nodata) and abs(nodata) > EXTREME:
        most = float(np.finfo(values.dtype).max)
        wanted, upwards = min(abs(nodata), most), values if nodata > 0 else -values
        found = (upwards >= wanted * (1 - NEAR)) & (upwards <= min(wanted * (1 + NEAR), most))
    else:
        with np.errstate(over="ignore"):
            found = values == np.asarray(nodata).astype(values.dtype)
    return found if found.ndim == 2 else found.all(axis=2)


def _values(page: Any, plane: int) -> NDArray[Any]:
    """The stored values of a page, (height, width) or (height, width, samples)."""
    if plane:
        values = np.frombuffer(_plane_bytes(page, plane), page.parent.byteorder + page.dtype.char).reshape(page.shape)
    else:
        values = page.asarray(maxworkers=1)
    if page.planarconfig == 2 and page.samplesperpixel > 1:
        values = np.moveaxis(values, 0, -1)
    return values


def _levels(page: Any, values: NDArray[Any], kind: str, nodata: float | None, shown: Any, path: Path) -> Levels:
    """Pixels of a page. Palettes and CMYK become RGB, levels are inverted where 0 is white, empty pixels are masked.

    shown: the page of its transparency mask, None without one.
    """
    levels = values if kind == "SEPARATED" else without_alpha(values)
    empty = _empty(levels, nodata)
    if shown:
        hidden = shown.asarray(maxworkers=1) == 0
        empty = hidden if empty is None else empty | hidden
    return without_empty(levels, empty, lambda filled: _converted(page, filled, kind, path))


def _converted(page: Any, values: NDArray[Any], kind: str, path: Path) -> Levels:
    if kind == "SEPARATED":
        return np.asarray(Image.fromarray(np.ascontiguousarray(values), mode="CMYK").convert("RGB"))
    if kind == "PALETTE":
        colours = page.colormap  # (3, 256), uint16
        if (colours & 255).any() and (colours & 255 != colours >> 8).any():
            raise DataError(unusable(path, "a palette of 16 bits"))
        return np.moveaxis((colours >> 8).astype(np.uint8)[:, values.astype(np.intp)], 0, -1)
    levels = to_levels(values, path)
    if page.bitspersample in (2, 4):
        levels = levels * np.uint8(255 // (2**page.bitspersample - 1))
    if kind != "MINISWHITE":
        return levels
    if levels.dtype == np.float32:
        raise DataError(f"{path} holds float32 levels where 0 is white. wanted: 0 is black (MinIsBlack).")
    return levels.dtype.type(largest(levels)) - levels


def _mask(
    page: Any, values: NDArray[Any], kind: str, nodata: float | None
) -> tuple[str, NDArray[Any], NDArray[np.bool_] | None]:
    """The pixel format and values of a page, as Pillow would give them for a file of this page alone; and empty pixels.

    Empty pixels become IGNORE, except where 0 is the empty value, which is a mask's background.
    """
    mode, found = _as_pillow(page, values, kind)
    empty = _empty(values, nodata) if nodata and values.ndim == 2 and values.dtype.kind in "iu" else None
    return mode, found if empty is None else np.where(empty, IGNORE, found), empty


def _as_pillow(page: Any, values: NDArray[Any], kind: str) -> tuple[str, NDArray[Any]]:
    if kind == "PALETTE":
        return "P", values
    if values.ndim == 3:
        return {2: "LA", 3: "RGB", 4: "RGBA"}.get(values.shape[2], kind) if kind != "SEPARATED" else "CMYK", values
    if page.bitspersample in (2, 4):
        values = values * np.uint8(255 // (2**page.bitspersample - 1))
    if kind == "MINISWHITE" and values.dtype in (np.bool_, np.uint8):
        values = ~values
    modes = {np.dtype(np.bool_): "1", np.dtype(np.uint8): "L", np.dtype(np.uint16): "I;16"}
    return modes.get(values.dtype, "F" if values.dtype.kind == "f" else "I"), values


def _bytes(page: Any, plane: int) -> Iterator[bytes]:
    """The bytes of a page: its tags, without places in the file, and its strips or tiles."""
    stream = page.parent.filehandle
    yield page.parent.byteorder.encode()
    for tag in page.tags:
        if tag.code not in PLACES:
            stream.seek(tag.valueoffset)
            yield f"{tag.code} {int(tag.dtype)} {tag.count} ".encode() + stream.read(tag.valuebytecount)
    if plane:
        yield _plane_bytes(page, plane)
        return
    wanted = math.prod(page.chunked)
    for offset, count in zip(page.dataoffsets[:wanted], page.databytecounts[:wanted], strict=True):
        stream.seek(offset)
        yield stream.read(count)


def _plane_bytes(page: Any, plane: int) -> bytes:
    page.parent.filehandle.seek(page.dataoffsets[0] + plane * page.nbytes)
    return bytes(page.parent.filehandle.read(page.nbytes))


def _check_planes(path: Path, page: Any, plane: int, behind_one: bool) -> None:
    """Raise DataError for pages that are not in the file, and for planes after one IFD, where only the first is read.

    behind_one: whether all images are planes after one IFD, as in ImageJ's stacks beyond 4 GB, which can be read.
    """
    _check_segments(path, page)
    shaped = page.shaped_description or ""
    hidden = '"truncated": true' in shaped and math.prod(parse_json(shaped)["shape"]) > page.size
    planes = page.tags.get(STK_PLANES)
    if hidden or (planes is not None and planes.count > 1) or (behind_one and not page.is_contiguous):
        raise DataError(
            f"{path} holds several images in one page (as MetaMorph and tifffile's truncate write them). Only\n"
            "the first would be read. Save it as a TIFF with one page per image."
        )
    if page.dataoffsets[0] + (plane + 1) * page.nbytes > page.parent.filehandle.size and behind_one:
        raise DataError(f"{path} is truncated or damaged: it is not in the file.")


def _check_segments(path: Path, page: Any) -> None:
    """Raise DataError where strips or tiles are missing, are not in the file, or are huge."""
    if math.prod(page.chunks) > 4 * MAX_PIXELS:
        raise DataError(too_large(path, f"tiles of {math.prod(page.chunks)}"))
    length = page.parent.filehandle.size
    wanted = math.prod(page.chunked)
    found = sum(
        0 < count and offset + count <= length
        for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False)
    )
    if found < wanted:
        raise DataError(f"{path} is truncated or damaged: {wanted - found} of {wanted} strips or tiles are not there.")
    if page.compression in DENSEST:
        check_held(path, page.nbytes, sum(page.databytecounts[:wanted]), DENSEST[page.compression])
