"""Image files of every kind: size and depth from the header, levels from the pixels, nothing lost in silence."""

import logging
import math
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from featprobe.errors import DataError
from featprobe.geometry import Size

Levels = NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.float32]

MAX_PIXELS = 178_956_970  # Pillow's own limit, held for every format
PILLOW_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "PPM")
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PNG_DEPTH, PNG_CHUNKS = 24, 8  # byte offsets in a PNG
PNG_MODES = ("L", "LA", "RGB", "RGBA", "I;16", "I")  # Pillow's, of channels that are levels as they are
ORIENTATION = 0x0112  # EXIF's and TIFF's tag
PLAIN = ("MINISBLACK", "MINISWHITE", "RGB")  # what a TIFF says of its samples that are levels as they are
CONVERTED = ("PALETTE", "SEPARATED", "YCBCR")  # and that become RGB, of 8 bits
DICOM_COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
DEFLATED = "1.2.840.10008.1.2.1.99"  # the transfer syntax that packs all of a DICOM file, without a bound

for library in ("tifffile", "pydicom"):  # what they log of a damaged file stands in our error
    logging.getLogger(library).addHandler(logging.NullHandler())


@dataclass(frozen=True)
class Opened:
    """An image file that is open.

    size: (height, width) in pixels, as it is to be looked at. bits: of a channel as `load` gives it: 8, 16, or 32 for
    float32. load: the pixels, (height, width) or (height, width, 3), in the stored orientation. turn: EXIF's
    orientation, 1 to 8.
    """

    size: Size
    bits: int
    load: Callable[[], Levels]
    turn: int = 1

    def read(self) -> Levels:
        """The pixels as they are to be looked at."""
        return oriented(self.load(), self.turn)


@contextmanager
def opened(path: Path) -> Iterator[Opened]:
    """An image file by its content, whatever its suffix; closed in the end.

    All that goes wrong, here or in `read`, is a DataError: libraries raise whatever they like on damaged files.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(132)
            stream.seek(0)
            with _kind(start)(path, stream) as image:
                yield image
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{path} is not an image that can be read.") from error
    except Image.DecompressionBombError as error:
        raise DataError(_too_large(path, "more, by its header")) from error
    except MemoryError as error:
        raise DataError(f"{path} asks for more memory than there is. Cut it into smaller images.") from error
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            raise DataError(f"{path} can't be read as an image: {error.strerror}.") from error
        raise DataError(f"{path} is truncated or damaged: {' '.join(str(error).split())[:300]}.") from error


def oriented(levels: NDArray[Any], turn: int) -> NDArray[Any]:
    """An image turned as EXIF's orientation (1 to 8) asks; any other number leaves it as it is."""
    if turn in (5, 6, 7, 8):
        levels = levels.swapaxes(0, 1)
    if turn in (2, 3, 6, 7):
        levels = levels[:, ::-1]
    if turn in (3, 4, 7, 8):
        levels = levels[::-1]
    return np.ascontiguousarray(levels)


def _turned(height: int, width: int, turn: int) -> Size:
    return (width, height) if turn in (5, 6, 7, 8) else (height, width)


def _kind(start: bytes) -> Callable[[Path, BinaryIO], AbstractContextManager[Opened]]:
    """What opens a file that begins like this."""
    if start[:4] in TIFF_STARTS:
        return _open_tiff
    if start.startswith(b"\x93NUMPY"):
        return _open_npy
    return _open_dicom if start[128:] == b"DICM" else _open_pillow


# ---- Pillow: PNG, JPEG, BMP, WebP ------------------------------------------------------------------------------------


@contextmanager
def _open_pillow(path: Path, stream: BinaryIO) -> Iterator[Opened]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large scans are usual here
        image = Image.open(stream, formats=PILLOW_FORMATS)
    with image:
        _check_size(path, image.height, image.width)
        _check_count(
            path, 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        )  # MPO: a photo and its previews
        turn = _orientation(image)
        size = _turned(image.height, image.width, turn)
        if image.format == "PNG" and image.mode in PNG_MODES and _png_depth(stream) in (8, 16):
            yield Opened(size, _png_depth(stream), lambda: _png_levels(image, stream, path, turn), turn)
        else:
            bits = 32 if image.mode == "F" else 16 if image.mode.startswith("I") else 8
            yield Opened(size, bits, lambda: _pillow_levels(image, path, turn), turn)


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, as far as the header tells it."""
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & set(map(str, image.info)):
        return 1  # Pillow would decode the whole image to look for it behind the pixels
    turn = image.getexif().get(ORIENTATION, 1)
    return turn if turn in range(1, 9) else 1


def _png_depth(stream: BinaryIO) -> int:
    """Bits per channel, from the header: Pillow reads 16-bit colour as 8-bit and does not tell."""
    place = stream.tell()
    stream.seek(PNG_DEPTH)
    depth = stream.read(1)[0]
    stream.seek(place)
    return depth


def _png_levels(image: Image.Image, stream: BinaryIO, path: Path, turn: int) -> Levels:
    """Pixels of a PNG of plain channels, at their depth: all in one call, in which other threads can run."""
    stream.seek(0)
    data = stream.read()
    if _tells_behind_pixels(data):
        stream.seek(0)
        return _pillow_levels(Image.open(stream, formats=("PNG",)), path, turn)
    return _without_alpha(imagecodecs.png_decode(data))


def _tells_behind_pixels(data: bytes) -> bool:
    """Whether a PNG has a chunk behind its pixels that may hold an orientation."""
    place, seen = PNG_CHUNKS, False
    while place + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, place)
        if seen and name in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
            return True
        seen |= name == b"IDAT"
        place += length + 12
    return False


def _pillow_levels(image: Image.Image, path: Path, turn: int) -> Levels:
    image.load()
    if image.format == "PNG" and _orientation(image) != turn:
        raise DataError(f"{path} has its orientation tag behind its pixels, where few programs look. Write it before.")
    if image.mode in ("L", "RGB", "F") or image.mode.startswith("I"):
        return to_levels(np.asarray(image), path)
    if image.mode in ("P", "PA"):
        return _without_alpha(np.asarray(image.convert("RGBA")))  # by RGB Pillow would warn of some palettes
    if image.mode in ("RGBA", "RGBX", "CMYK", "YCbCr"):
        return np.asarray(image.convert("RGB"))
    if image.mode in ("1", "LA", "La"):
        return np.asarray(image.convert("L"))
    raise DataError(_unusable(path, image.mode))


# ---- TIFF, numpy's files, DICOM --------------------------------------------------------------------------------------


@contextmanager
def _open_tiff(path: Path, stream: BinaryIO) -> Iterator[Opened]:
    with tifffile.TiffFile(stream) as file:
        page: Any = file.pages.first
        _check_size(path, page.imagelength, page.imagewidth)
        _check_count(path, _count_pages(file, path), f", as by libtiff:  tiffsplit {path.name} {path.stem}-")
        _check_segments(path, page)
        kind = getattr(page.photometric, "name", str(page.photometric))
        known = kind in PLAIN or (page.bitspersample <= 8 and kind in CONVERTED)
        if not known or page.dtype is None or page.samplesperpixel > 4 or page.imagedepth > 1:
            raise DataError(_unusable(path, f"{kind}, {page.samplesperpixel} x {page.bitspersample} bits"))
        turn = page.tags.valueof("Orientation", default=1)
        turn = turn if turn in range(1, 9) else 1
        size = _turned(page.imagelength, page.imagewidth, turn)
        yield Opened(size, bits_of_dtype(page.dtype, path), lambda: _tiff_levels(page, kind, path), turn)


def _tiff_levels(page: Any, kind: str, path: Path) -> Levels:
    """Pixels of a page, palettes and CMYK as RGB, levels of which 0 is white turned over."""
    values = page.asarray(maxworkers=1)
    if page.planarconfig == 2 and page.samplesperpixel > 1:
        values = np.moveaxis(values, 0, -1)
    if kind == "SEPARATED":
        return np.asarray(Image.fromarray(np.ascontiguousarray(values), mode="CMYK").convert("RGB"))
    if kind == "PALETTE":
        colours = page.colormap  # (3, 256), uint16
        if (colours & 255).any() and (colours & 255 != colours >> 8).any():
            raise DataError(_unusable(path, "a palette of 16 bits"))
        return np.moveaxis((colours >> 8).astype(np.uint8)[:, values.astype(np.intp)], 0, -1)
    levels = to_levels(_without_alpha(values), path)
    if page.bitspersample in (2, 4):
        levels = levels * np.uint8(255 // (2**page.bitspersample - 1))
    if kind != "MINISWHITE":
        return levels
    if levels.dtype == np.float32:
        raise DataError(f"{path} holds fractions of which 0 is white. wanted: 0 is black (MinIsBlack).")
    return levels.dtype.type(largest(levels)) - levels


def _count_pages(file: tifffile.TiffFile, path: Path) -> int:
    """Images in a TIFF: its full-size pages, or what ImageJ says of a stack behind one page."""
    count, seen = 0, set[int]()
    with suppress(IndexError):  # tifffile's own count does not end where pages lead in a circle
        while (page := file.pages[len(seen)]).offset not in seen:
            seen.add(page.offset)
            count += not getattr(page, "is_reduced", False)
        raise DataError(f"{path} is truncated or damaged: its pages lead in a circle.")
    stack = int((file.imagej_metadata or {}).get("images", 1)) if file.is_imagej else 1
    return max(stack, count)


def _check_segments(path: Path, page: Any) -> None:
    """Raise DataError where strips or tiles are missing, or claim what is not in the file, or are huge."""
    if math.prod(page.chunks) > 4 * MAX_PIXELS:
        raise DataError(_too_large(path, f"tiles of {math.prod(page.chunks)}"))
    length = page.parent.filehandle.size
    wanted = math.prod(page.chunked)
    found = sum(
        0 < count and offset + count <= length
        for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False)
    )
    if found < wanted:
        raise DataError(f"{path} is truncated or damaged: {wanted - found} of {wanted} strips or tiles are not there.")


@contextmanager
def _open_npy(path: Path, stream: BinaryIO) -> Iterator[Opened]:
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)  # no more of it is read than the header
    except ValueError as error:
        raise DataError(f"{path} can't be read as an array of numbers: {error}") from error
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (1, 3)):
        raise DataError(
            f"{path} holds an array of the shape {values.shape}.\n"
            "  wanted  (height, width), (height, width, 1) or (height, width, 3)"
        )
    _check_size(path, *values.shape[:2])
    plane = values[:, :, 0] if values.shape[2:] == (1,) else values
    size, bits = (values.shape[0], values.shape[1]), bits_of_dtype(values.dtype, path)
    yield Opened(size, bits, lambda: to_levels(np.array(plane), path))  # a copy: the file may change under a map


@contextmanager
def _open_dicom(path: Path, stream: BinaryIO) -> Iterator[Opened]:
    try:
        from pydicom import dcmread
        from pydicom.filereader import read_file_meta_info
    except ImportError as error:
        raise DataError(
            f"{path} is a DICOM file, and the package that reads it is not installed.\n"
            "Install it:  pip install 'featprobe[dicom]'"
        ) from error
    syntax = read_file_meta_info(path).get("TransferSyntaxUID")
    if syntax == DEFLATED:
        raise DataError(f"{path} is deflated as a whole. Store it as Explicit VR Little Endian.")
    header = dcmread(path, stop_before_pixels=True)
    if not {"Rows", "Columns", "BitsAllocated", "PhotometricInterpretation"} <= set(header.dir()):
        raise DataError(f"{path} is a DICOM file without an image.")
    _check_size(path, header.Rows, header.Columns)
    _check_count(path, int(header.get("NumberOfFrames") or 1))
    photometric, bits = header.PhotometricInterpretation, header.BitsAllocated
    if photometric not in ("MONOCHROME1", "MONOCHROME2", *DICOM_COLOURS) or bits not in (8, 16):
        raise DataError(_unusable(path, f"{photometric}, {bits} bits"))
    _check_decoder(path, syntax)
    signed = bool(header.get("PixelRepresentation", 0)) or _is_rescaled(header)
    yield Opened((header.Rows, header.Columns), 32 if signed else bits, lambda: _dicom_levels(dcmread(path), path))


def _is_rescaled(header: Any) -> bool:
    slope, intercept = header.get("RescaleSlope"), header.get("RescaleIntercept")
    return "ModalityLUTSequence" in header or float(slope or 1) != 1 or float(intercept or 0) != 0


def _check_decoder(path: Path, syntax: Any) -> None:
    """Raise DataError where a DICOM file is compressed in a way that nothing installed can undo."""
    from pydicom.pixels import get_decoder

    if syntax is None or not syntax.is_compressed:
        return
    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError:
        available = False
    if not available:
        raise DataError(
            f"{path} is compressed as {syntax.name}, and no decoder of that is installed.\n"
            "Install pydicom's plugins (pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg),\n"
            "or store it uncompressed:  gdcmconv --raw IN OUT"
        )


def _dicom_levels(data: Any, path: Path) -> Levels:
    """Stored values, turned over where 0 is white, then through the modality's rescaling."""
    from pydicom.pixels import apply_modality_lut, pixel_array

    if "PixelData" not in data:
        raise DataError(f"{path} is a DICOM file without pixel data.")
    values = pixel_array(data)  # bits beyond those stored are cleared
    if data.PhotometricInterpretation == "MONOCHROME1":
        stored = int(data.get("BitsStored", data.BitsAllocated))
        low = -(1 << stored - 1) if data.get("PixelRepresentation") else 0
        high = low + (1 << stored) - 1
        values = (low + high - values.astype(np.int32)).astype(values.dtype)
    if not _is_rescaled(data):
        return to_levels(values, path)
    rescaled = np.asarray(apply_modality_lut(values, data), dtype=np.float64)
    slope = abs(float(data.get("RescaleSlope") or 1))
    if "ModalityLUTSequence" not in data and not np.spacing(np.float32(np.abs(rescaled).max(initial=0.0))) < slope:
        raise DataError(f"{path}: its rescaling (slope {slope:g}) makes levels that float32 can't tell apart.")
    return to_levels(rescaled.astype(np.float32), path)


# ---- what all have in common -----------------------------------------------------------------------------------------


def bits_of_dtype(dtype: np.dtype[Any], path: Path) -> int:
    """Bits of a channel, as `to_levels` gives values of this kind: 8, 16, or 32 for float32. Raises DataError."""
    if dtype == np.bool_ or dtype == np.uint8:
        return 8
    if dtype.kind == "f" or dtype in (np.int8, np.int16):
        return 32
    if dtype.kind in "iu":
        return 16
    raise DataError(_unusable(path, str(dtype)))


def to_levels(values: NDArray[Any], path: Path) -> Levels:
    """Values of any number format as uint8, uint16 or float32, every two that differ still different.

    Bits become 0 and 255. Integers of 32 bits and more must fit 16, those of 64-bit fractions must fit float32.
    Raises DataError where they do not, and for values that are not finite.
    """
    bits = bits_of_dtype(values.dtype, path)
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype in (np.uint8, np.uint16):
        return np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("="))
    if bits == 16:
        if values.min() < 0 or values.max() > 65535:
            raise DataError(f"{path} holds grey levels {values.min()} to {values.max()}. wanted: 0 to 65535.")
        return values.astype(np.uint16)
    if not _is_finite(values):
        bad = int((~np.isfinite(values)).sum())
        raise DataError(
            f"{path} holds {bad} values that are not finite (NaN or infinite), of {values.size}.\n"
            "Replace them by a level that means what they mean, or leave the image out."
        )
    if values.dtype.itemsize <= 4:
        return np.ascontiguousarray(values, dtype=np.float32)
    with np.errstate(over="ignore"):
        levels = np.ascontiguousarray(values, dtype=np.float32)
    if not np.array_equal(levels, values):
        raise DataError(f"{path} holds {values.dtype} values that float32 can't hold. Round them:  a.astype('float32')")
    return levels


def _is_finite(values: NDArray[Any]) -> bool:
    """Whether no value is NaN or infinite. The sum of squares tells most arrays in a pass that is quicker than any."""
    flat = values.ravel()
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(np.dot(flat, flat))) or bool(np.isfinite(flat).all())


def largest(levels: Levels) -> int:
    """The largest value of the number format of uint8 or uint16."""
    return 255 if levels.dtype == np.uint8 else 65535


def _without_alpha(values: NDArray[Any]) -> NDArray[Any]:
    """Grey of grey with alpha, colour of colour with alpha."""
    if values.ndim == 3 and values.shape[2] in (2, 4):
        values = values[:, :, : values.shape[2] - 1]
    return values[:, :, 0] if values.ndim == 3 and values.shape[2] == 1 else values


def _check_size(path: Path, height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise DataError(f"{path} has {width}x{height} pixels. wanted: at least one.")
    if height * width > MAX_PIXELS:
        raise DataError(_too_large(path, f"{width}x{height} = {height * width}"))


def _check_count(path: Path, images: int, how: str = "") -> None:
    if images > 1:
        raise DataError(
            f"{path} holds {images} images (pages, slices or frames).\n"
            "  wanted  one image a file, so that each has its own labels, group and split\n"
            f"Cut it into one file an image{how}"
        )


def _too_large(path: Path, found: str) -> str:
    return (
        f"{path} is too large, or its header is damaged. Nothing of it was decoded.\n"
        f"  wanted  at most {MAX_PIXELS} pixels\n  found   {found}\nCut it into smaller images."
    )


def _unusable(path: Path, found: str) -> str:
    return (
        f"{path} has the pixel format {found}, which can't be read without losing depth or meaning.\n"
        "  wanted  grey or RGB of 8 or 16 bits, or float32"
    )
