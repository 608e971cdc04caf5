"""Images of every kind. The content of a file shows its kind. Pillow's kinds and numpy files are read here."""

import io
import logging
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from featprobe.datasets.images.dicom import open_dicom
from featprobe.datasets.images.pages import LOOKED_AT_FIRST, TIFF_STARTS, is_dicom, opened_file, page_of
from featprobe.datasets.images.pixels import (
    Levels,
    Opened,
    bits_of_dtype,
    check_page,
    several,
    to_levels,
    turned,
    unusable,
    without_alpha,
    without_empty,
)
from featprobe.datasets.images.tiff import NODATA, open_tiff
from featprobe.datasets.names import not_there
from featprobe.errors import DataError
from featprobe.io.pictures import DENSEST, IMAGE_FORMATS, MASK_FORMATS, check_claim, check_held, picture, size_of

NPY_START = b"\x93NUMPY"
PNG_DEPTH, PNG_CHUNKS = 24, 8  # byte offsets in a PNG
JPEG_START, JPEG_SCAN, JPEG_END = b"\xff\xd8\xff", 0xFFDA, b"\xff\xd9"
JPEG_FRAMES = (0xFFC0, 0xFFC1, 0xFFC2)  # baseline, extended and progressive, by Huffman's code
JPEG_PLAIN = (0xFFC4, 0xFFDB, 0xFFDD, 0xFFE0, 0xFFFE)  # tables, restarts, JFIF, comments: nothing else to know
PNG_MODES = ("L", "LA", "RGB", "RGBA", "I;16", "I")  # Pillow's, where the channels are levels
PNG_ORIENTATIONS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")  # texts that may hold one
ORIENTATION = 0x0112  # EXIF's tag

HEADER = 8192  # first bytes of a file, which show its kind, and the header of most JPEGs
AT_ONCE = 1 << 26  # bytes of the largest file that is read before its header is

Opener = Callable[[Path, BinaryIO, int | None], AbstractContextManager[Opened]]

for library in ("tifffile", "pydicom", "imagecodecs"):  # featprobe's error holds what they log
    logging.getLogger(library).addHandler(logging.NullHandler())


@contextmanager
def opened(path: Path, *, whole: bool = False) -> Iterator[Opened]:
    """Open an image file by its content, whatever its suffix, or a page of one (see `pages`); it is closed at the end.

    whole: whether its pixels will be read. A file of a kind that Pillow knows is then read in one call: at each call of
    the system a thread gives Python's lock away, and sixteen threads wait longer to have it back than they decode.

    Every error, here or in `read`, becomes a DataError, because libraries raise many kinds of errors on damaged files.
    """
    file, page = page_of(path)
    try:
        with opened_file(file, buffering=0) as raw:
            kind = _kind(os.pread(raw.fileno(), HEADER, 0))
            at_once = whole and kind not in (open_tiff, open_dicom, _open_npy)
            size = os.fstat(raw.fileno()).st_size if at_once else 0
            held = io.BytesIO(raw.read(size)) if 0 < size <= AT_ONCE else io.BufferedReader(cast(io.FileIO, raw))
            with held as stream, kind(path, cast(BinaryIO, stream), page) as image:
                yield image
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(f"{path} needs more memory than there is. Cut it into smaller images.") from error
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            raise DataError(not_there(path) or f"{path} can't be read as an image: {error.strerror}.") from error
        raise DataError(f"{path} is truncated or damaged: {' '.join(str(error).split())[:300]}.") from error


def stored_page(path: Path) -> tuple[str, NDArray[Any]]:
    """The pixel format of a TIFF page, by Pillow's name, and its stored values. Raises DataError."""
    with opened(path) as image:
        if image.stored is None:
            raise DataError(f"{path} can't be read as a mask. wanted: a page of a TIFF.")
        return image.stored()[:2]


def called_empty(path: Path) -> NDArray[np.bool_] | None:
    """The pixels that the header of a mask calls empty, (height, width), bool; None where it calls none empty.

    Raises DataError, and OSError where there is no image.
    """
    if page_of(path)[1] is None:
        with opened_file(path) as stream:
            if stream.read(4) not in TIFF_STARTS:
                return None
        with picture(path, MASK_FORMATS) as image:
            if NODATA not in getattr(image, "tag_v2", ()):
                return None
    with opened(path) as image:
        return image.stored()[2] if image.empty and image.stored else None


def stored_array(path: Path) -> tuple[str, NDArray[Any]]:
    """The pixel format of a numpy file of indices, by Pillow's name, and its stored values, (height, width).

    Raises DataError for values that are no whole numbers or don't fit Pillow's formats, and for other shapes.
    """
    with opened(path):  # raises for a damaged file
        values = np.load(path, allow_pickle=False)
    plane = values[:, :, 0] if values.shape[2:] == (1,) else values
    if plane.ndim != 2 or plane.dtype.kind not in "bui":
        raise DataError(
            f"{path} can't be read as a mask: it holds {values.dtype} of the shape {values.shape}.\n"
            "  wanted  whole numbers, (height, width) or (height, width, 1): class indices, or 0 and one of an object"
        )
    if plane.dtype.kind == "b" or (plane.min(initial=0) >= 0 and plane.max(initial=0) < 256):
        return "L", plane.astype(np.uint8)
    return "I", plane


def _kind(start: bytes) -> Opener:
    """The function that opens a file with these first bytes, or a page of it, named by the path."""
    if start[:4] in TIFF_STARTS:
        return open_tiff
    if start.startswith(NPY_START):
        return _open_npy
    if is_dicom(start[:LOOKED_AT_FIRST]):
        return open_dicom
    plain = _plain_jpeg(start)
    return _open_pillow if plain is None else partial(_open_plain_jpeg, *plain)


@contextmanager
def _open_pillow(path: Path, stream: BinaryIO, page: int | None) -> Iterator[Opened]:
    check_page(path, page, 1)
    with picture(stream, IMAGE_FORMATS, path) as image:
        count = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # MPO: a photo and its previews
        if count > 1:
            raise DataError(f"{several(path, count)}Cut it into one file per image.")
        turn = _orientation(image)
        size = turned(image.height, image.width, turn)
        channels = 1 if image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I") else 3
        if image.format == "PNG" and image.mode in PNG_MODES and _png_depth(stream) in (8, 16):
            shown = image.info.get("transparency")
            yield Opened(
                size,
                _png_depth(stream),
                channels,
                lambda out=None: _png_levels(image, stream, path, turn, out),
                turn,
                empty="" if shown is None else f"tRNS {shown}",
                into=shown is None and image.mode not in ("LA", "RGBA"),
            )
        elif image.format == "JPEG" and image.mode in ("L", "RGB"):
            yield Opened(size, 8, channels, lambda out=None: _jpeg_levels(stream, path, out), turn, into=True)
        else:
            if image.format == "JPEG" and image.mode == "CMYK" and "adobe" not in image.info:
                raise DataError(unusable(path, "CMYK without Adobe's marker, which says whether 0 is full ink"))
            bits = 32 if image.mode == "F" else 16 if image.mode.startswith("I") else 8
            yield Opened(size, bits, channels, lambda: _pillow_levels(image, path, turn), turn)


@contextmanager
def _open_plain_jpeg(
    height: int, width: int, channels: int, path: Path, stream: BinaryIO, page: int | None
) -> Iterator[Opened]:
    """What `_open_pillow` gives for such a JPEG, in a tenth of the time."""
    check_page(path, page, 1)
    check_claim(path, height, width)
    check_held(path, height * width, size_of(stream), DENSEST)

    def load(out: NDArray[np.uint8] | None = None) -> Levels:
        return _jpeg_levels(stream, path, out)

    yield Opened((height, width), 8, channels, load, into=True)


def _plain_jpeg(start: bytes) -> tuple[int, int, int] | None:
    """Height, width and channels of a JPEG by its first bytes; None where they are no JPEG, or not all is known to be
    plain: no orientation, no further pictures, no colours other than grey and libjpeg's RGB.
    """
    found, place = None, 2
    while start.startswith(JPEG_START) and place + 10 <= len(start):
        marker, length, precision, height, width, channels = struct.unpack_from(">HHBHHB", start, place)
        if marker == JPEG_SCAN:
            return found
        if marker in JPEG_FRAMES and found is None and precision == 8 and channels in (1, 3) and height and width:
            found = height, width, channels
        elif marker not in JPEG_PLAIN:
            return None
        place += 2 + length
    return None


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, as far as it is in the header."""
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & set(map(str, image.info)):
        return 1  # Pillow would decode the whole image to find one after the pixels
    turn = image.getexif().get(ORIENTATION, 1)
    return turn if turn in range(1, 9) else 1


def _png_depth(stream: BinaryIO) -> int:
    """Bits per channel, from the header, because Pillow reads 16-bit colour as 8-bit without a warning."""
    place = stream.tell()
    stream.seek(PNG_DEPTH)
    depth = stream.read(1)[0]
    stream.seek(place)
    return depth


def _jpeg_levels(stream: BinaryIO, path: Path, out: NDArray[np.uint8] | None = None) -> Levels:
    """Pixels of a JPEG, equal to Pillow's: both use libjpeg, and here no copy is made.

    libjpeg fills the missing pixels of a truncated file with grey, so a file without an end marker is left to Pillow,
    which raises an error.
    """
    stream.seek(0)
    data = stream.read()
    if data.rfind(JPEG_END, _jpeg_scan(data)) < 0:
        stream.seek(0)
        with picture(stream, ("JPEG",), path) as again:
            return _pillow_levels(again, path, 1)
    return imagecodecs.jpeg8_decode(data, out=out)


def _jpeg_scan(data: bytes) -> int:
    """The offset of a JPEG's first scan, after headers that may hold a preview; the file's length without a scan."""
    place = 2
    while place + 4 <= len(data):
        marker, length = struct.unpack_from(">HH", data, place)
        if marker == JPEG_SCAN:
            return place
        place += 1 if marker >> 8 != 0xFF or marker == 0xFFFF else 2 + length
    return len(data)


def _png_levels(image: Image.Image, stream: BinaryIO, path: Path, turn: int, out: NDArray[Any] | None = None) -> Levels:
    """Pixels of a PNG without a palette, at their depth, decoded in one call while other threads can run.

    The level or colour that tRNS calls transparent is empty; an alpha channel is dropped.
    """
    stream.seek(0)
    data = stream.read()
    if _turned_after_pixels(data):
        stream.seek(0)
        with picture(stream, ("PNG",), path) as again:
            _pillow_levels(again, path, turn)  # raises for a file with one; Pillow would cut colours to 8 bits
    values = imagecodecs.png_decode(data, out=out)  # tRNS comes as an alpha channel
    empty = values[:, :, -1] == 0 if "transparency" in image.info else None
    return without_empty(without_alpha(values), empty, lambda levels: levels)


def _turned_after_pixels(data: bytes) -> bool:
    """Whether a PNG has a chunk after its pixels that may hold an orientation."""
    place, seen = PNG_CHUNKS, False
    while place + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, place)
        text = name in (b"tEXt", b"zTXt", b"iTXt") and data.startswith(PNG_ORIENTATIONS, place + 8)
        if seen and (text or name == b"eXIf"):
            return True
        seen |= name == b"IDAT"
        place += length + 12
    return False


def _pillow_levels(image: Image.Image, path: Path, turn: int) -> Levels:
    image.load()
    if image.format == "PNG" and _orientation(image) != turn:
        raise DataError(f"{path} has its orientation tag after its pixels, where few programs look. Write it before.")
    if image.mode in ("L", "RGB", "F") or image.mode.startswith("I"):
        return to_levels(np.asarray(image), path)
    if image.mode in ("P", "PA"):
        return without_alpha(np.asarray(image.convert("RGBA")))  # with RGB Pillow would warn about some palettes
    if image.mode in ("RGBA", "RGBX", "CMYK", "YCbCr"):
        return np.asarray(image.convert("RGB"))
    if image.mode in ("1", "LA", "La"):
        return np.asarray(image.convert("L"))
    raise DataError(unusable(path, image.mode))


@contextmanager
def _open_npy(path: Path, stream: BinaryIO, page: int | None) -> Iterator[Opened]:
    check_page(path, page, 1)
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)  # only the header is read
    except ValueError as error:
        raise DataError(f"{path} can't be read as an array of numbers: {error}") from error
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (1, 3)):
        raise DataError(
            f"{path} holds an array of the shape {values.shape}.\n"
            "  wanted  (height, width), (height, width, 1) or (height, width, 3)"
        )
    check_claim(path, *values.shape[:2])
    plane = values[:, :, 0] if values.shape[2:] == (1,) else values
    size, bits = (values.shape[0], values.shape[1]), bits_of_dtype(values.dtype, path)
    channels = 1 if plane.ndim == 2 else 3
    yield Opened(size, bits, channels, lambda: to_levels(np.array(plane), path))  # a copy: the file may change
