"""Images of every kind: size and depth from the header, levels from the pixels, nothing lost in silence."""

import json
import logging
import math
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from featprobe.datasets.pages import (
    MAX_PAGES,
    TIFF_STARTS,
    misnamed,
    once_a_file,
    page_of,
    page_path,
    tiff_images,
    tiff_images_in,
    too_many,
)
from featprobe.errors import DataError
from featprobe.geometry import Size

Levels = NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.float32]

MAX_PIXELS = 178_956_970  # Pillow's own limit, held for every format
PILLOW_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "PPM")
PNG_DEPTH, PNG_CHUNKS = 24, 8  # byte offsets in a PNG
PNG_MODES = ("L", "LA", "RGB", "RGBA", "I;16", "I")  # Pillow's, of channels that are levels as they are
PNG_ORIENTATIONS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")  # texts that may hold one
ORIENTATION = 0x0112  # EXIF's and TIFF's tag
PLACES = (273, 324, 330)  # a TIFF's tags that say where in the file something lies: strips, tiles, further IFDs
STK_PLANES = 33629  # MetaMorph's tag with an entry for each plane behind an IFD
PLAIN = ("MINISBLACK", "MINISWHITE", "RGB")  # what a TIFF says of its samples that are levels as they are
CONVERTED = ("PALETTE", "SEPARATED", "YCBCR")  # and that become RGB, of 8 bits
DICOM_COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
DEFLATED = "1.2.840.10008.1.2.1.99"  # the transfer syntax that packs all of a DICOM file, without a bound

for library in ("tifffile", "pydicom", "imagecodecs"):  # what they log of a damaged file stands in our error
    logging.getLogger(library).addHandler(logging.NullHandler())


@dataclass(frozen=True)
class Opened:
    """An image that is open: a file, or a page of one.

    size: (height, width) in pixels, as it is to be looked at. bits: of a channel as `load` gives it: 8, 16, or 32 for
    float32. load: the pixels, (height, width) or (height, width, 3), in the stored orientation. turn: EXIF's
    orientation, 1 to 8. raw: the bytes of its file that make a page what it is. stored: of a page of a TIFF, its pixel
    format as Pillow calls it, and its values as they are stored, palette indices for a palette.
    """

    size: Size
    bits: int
    load: Callable[[], Levels]
    turn: int = 1
    raw: Callable[[], Iterable[bytes]] = tuple
    stored: Callable[[], tuple[str, NDArray[Any]]] | None = None

    def read(self) -> Levels:
        """The pixels as they are to be looked at."""
        return oriented(self.load(), self.turn)


@contextmanager
def opened(path: Path) -> Iterator[Opened]:
    """An image file by its content, whatever its suffix, or a page of one (see datasets.pages); closed in the end.

    All that goes wrong, here or in `read`, is a DataError: libraries raise whatever they like on damaged files.
    """
    file, page = page_of(path)
    try:
        with file.open("rb") as stream:
            start = stream.read(132)
            stream.seek(0)
            with _kind(start)(path, stream, page) as image:
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
            raise DataError(misnamed(path) or f"{path} can't be read as an image: {error.strerror}.") from error
        raise DataError(f"{path} is truncated or damaged: {' '.join(str(error).split())[:300]}.") from error


def stored_page(path: Path) -> tuple[str, NDArray[Any]]:
    """The pixel format of a TIFF's page, as Pillow calls it, and its values as they are stored. Raises DataError."""
    with opened(path) as image:
        if image.stored is None:
            raise DataError(f"{path} can't be read as a mask. wanted: a page of a TIFF.")
        return image.stored()


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


def _kind(start: bytes) -> Callable[[Path, BinaryIO, int | None], AbstractContextManager[Opened]]:
    """What opens a file that begins like this, or a page of it, named by the path."""
    if start[:4] in TIFF_STARTS:
        return _open_tiff
    if start.startswith(b"\x93NUMPY"):
        return _open_npy
    return _open_dicom if start[128:] == b"DICM" else _open_pillow


# ---- Pillow: PNG, JPEG, BMP, WebP ------------------------------------------------------------------------------------


@contextmanager
def _open_pillow(path: Path, stream: BinaryIO, page: int | None) -> Iterator[Opened]:
    _check_page(path, page, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large scans are usual here
        image = Image.open(stream, formats=PILLOW_FORMATS)
    with image:
        _check_size(path, image.height, image.width)
        count = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # MPO: a photo and its previews
        if count > 1:
            raise DataError(f"{_several(path, count)}Cut it into one file an image.")
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
        _pillow_levels(Image.open(stream, formats=("PNG",)), path, turn)  # refuses one; it would cut colours to 8 bits
    return _without_alpha(imagecodecs.png_decode(data))


def _tells_behind_pixels(data: bytes) -> bool:
    """Whether a PNG has a chunk behind its pixels that may hold an orientation."""
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
def _open_tiff(path: Path, stream: BinaryIO, number: int | None) -> Iterator[Opened]:
    offsets = tiff_images_in(stream, path) if number is None else tiff_images(path.parent)
    stream.seek(0)
    _check_page(path, number, len(offsets), f", as by libtiff:  tiffsplit {path.name} {path.stem}-")
    number = number or 0
    behind_one = offsets.count(offsets[0]) > 1
    plane = number if behind_one else 0
    with tifffile.TiffFile(stream) as file:
        page: Any = file.pages.first
        if page.offset != offsets[number]:
            file.filehandle.seek(offsets[number])
            page = tifffile.TiffPage(file, number)
        _check_size(path, page.imagelength, page.imagewidth)
        _check_planes(path, page, plane, behind_one)
        kind = getattr(page.photometric, "name", str(page.photometric))
        known = kind in PLAIN or (page.bitspersample <= 8 and kind in CONVERTED)
        if not known or page.dtype is None or page.samplesperpixel > 4 or page.imagedepth > 1:
            raise DataError(_unusable(path, f"{kind}, {page.samplesperpixel} x {page.bitspersample} bits"))
        turn = page.tags.valueof("Orientation", default=1)
        turn = turn if turn in range(1, 9) else 1
        yield Opened(
            _turned(page.imagelength, page.imagewidth, turn),
            bits_of_dtype(page.dtype, path),
            lambda: _tiff_levels(page, _tiff_values(page, plane), kind, path),
            turn,
            lambda: _tiff_bytes(page, plane),
            lambda: _tiff_mask(page, _tiff_values(page, plane), kind),
        )


def _tiff_values(page: Any, plane: int) -> NDArray[Any]:
    """Values of a page as they are stored, (height, width) or (height, width, samples)."""
    if plane:
        values = np.frombuffer(_plane_bytes(page, plane), page.parent.byteorder + page.dtype.char).reshape(page.shape)
    else:
        values = page.asarray(maxworkers=1)
    if page.planarconfig == 2 and page.samplesperpixel > 1:
        values = np.moveaxis(values, 0, -1)
    return values


def _tiff_levels(page: Any, values: NDArray[Any], kind: str, path: Path) -> Levels:
    """Pixels of a page, palettes and CMYK as RGB, levels of which 0 is white turned over."""
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


def _tiff_mask(page: Any, values: NDArray[Any], kind: str) -> tuple[str, NDArray[Any]]:
    """The pixel format and the values of a page as Pillow would give them, were it a file of its own."""
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


def _tiff_bytes(page: Any, plane: int) -> Iterator[bytes]:
    """The bytes of a page: its tags, those left out that say where it lies, and its strips or tiles."""
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
    """Raise DataError for pages that are not in the file, and for such of which only the first could be read.

    behind_one: whether the file's images all are planes behind one IFD, as ImageJ writes stacks beyond 4 GB.
    """
    _check_segments(path, page)
    shaped = page.shaped_description or ""
    hidden = '"truncated": true' in shaped and math.prod(json.loads(shaped)["shape"]) > page.size
    planes = page.tags.get(STK_PLANES)
    if hidden or (planes is not None and planes.count > 1) or (behind_one and not page.is_contiguous):
        raise DataError(
            f"{path} holds several images behind one page (as MetaMorph and tifffile's truncate write them), of which\n"
            "only the first would be read. Save it as a TIFF with a page for each image."
        )
    if page.dataoffsets[0] + (plane + 1) * page.nbytes > page.parent.filehandle.size and behind_one:
        raise DataError(f"{path} is truncated or damaged: it is not in the file.")


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
def _open_npy(path: Path, stream: BinaryIO, page: int | None) -> Iterator[Opened]:
    _check_page(path, page, 1)
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
def _open_dicom(path: Path, stream: BinaryIO, page: int | None) -> Iterator[Opened]:
    file = path if page is None else path.parent
    header, start = _dicom_header(file)
    if not {"Rows", "Columns", "BitsAllocated", "PhotometricInterpretation"} <= set(header.dir()):
        raise DataError(f"{path} is a DICOM file without an image.")
    _check_size(path, header.Rows, header.Columns)
    _check_page(path, page, int(header.get("NumberOfFrames") or 1))
    photometric, bits = header.PhotometricInterpretation, header.BitsAllocated
    if photometric not in ("MONOCHROME1", "MONOCHROME2", *DICOM_COLOURS) or bits not in (8, 16):
        raise DataError(_unusable(path, f"{photometric}, {bits} bits"))
    _check_decoder(path, header.file_meta.get("TransferSyntaxUID"))
    rescale = _rescale(header, page or 0)
    signed = bool(header.get("PixelRepresentation", 0)) or rescale is not None
    yield Opened(
        (header.Rows, header.Columns),
        32 if signed else bits,
        lambda: _dicom_levels(_dicom_values(file, stream, page), header, rescale, path),
        raw=lambda: _dicom_bytes(stream, start, header, page or 0),
    )


@once_a_file(8)
def _dicom_header(file: Path) -> tuple[Any, int]:
    """All of a DICOM file but its pixel data, and where that begins, bytes."""
    try:
        from pydicom import dcmread
        from pydicom.filereader import read_file_meta_info
    except ImportError as error:
        raise DataError(
            f"{file} is a DICOM file, and the package that reads it is not installed.\n"
            "Install it:  pip install 'featprobe[dicom]'"
        ) from error
    if read_file_meta_info(file).get("TransferSyntaxUID") == DEFLATED:
        raise DataError(f"{file} is deflated as a whole. Store it as Explicit VR Little Endian.")
    with file.open("rb") as stream:
        return dcmread(stream, stop_before_pixels=True), stream.tell()


def _rescale(header: Any, frame: int) -> Any:
    """What holds the modality's rescaling of a frame: its functional group, the one of all frames, or the data set.

    None where levels are stored as they are. Where frames are rescaled one by one, all of them are, by 1 and 0 too:
    a file's levels are of one kind.
    """
    each, common = (header.get(f"{whose}FunctionalGroupsSequence") or [] for whose in ("PerFrame", "Shared"))
    own = each[frame].get("PixelValueTransformationSequence") if frame < len(each) else None
    if own:
        return own[0]
    of_all = common[0].get("PixelValueTransformationSequence") if common else None
    found = of_all[0] if of_all else header
    return found if _changes(found) else None


def _changes(rescale: Any) -> bool:
    slope, intercept = rescale.get("RescaleSlope"), rescale.get("RescaleIntercept")
    return "ModalityLUTSequence" in rescale or float(slope or 1) != 1 or float(intercept or 0) != 0


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


def _dicom_values(file: Path, stream: BinaryIO, frame: int | None) -> NDArray[Any]:
    """Stored values of a file, or of one of its frames, of which no more is read. Bits beyond those stored are 0."""
    from pydicom import dcmread
    from pydicom.pixels import pixel_array

    if frame is not None:
        return pixel_array(stream, index=frame)
    data = dcmread(file)
    if "PixelData" not in data:
        raise DataError(f"{file} is a DICOM file without pixel data.")
    return pixel_array(data)


def _dicom_levels(values: NDArray[Any], header: Any, rescale: Any, path: Path) -> Levels:
    """Stored values, turned over where 0 is white, then through the modality's rescaling."""
    from pydicom.pixels import apply_modality_lut

    if header.PhotometricInterpretation == "MONOCHROME1":
        stored = int(header.get("BitsStored", header.BitsAllocated))
        low = -(1 << stored - 1) if header.get("PixelRepresentation") else 0
        high = low + (1 << stored) - 1
        values = (low + high - values.astype(np.int32)).astype(values.dtype)
    if rescale is None:
        return to_levels(values, path)
    rescaled = np.asarray(apply_modality_lut(values, rescale), dtype=np.float64)
    slope = abs(float(rescale.get("RescaleSlope") or 1))
    if "ModalityLUTSequence" not in rescale and not np.spacing(np.float32(np.abs(rescaled).max(initial=0.0))) < slope:
        raise DataError(f"{path}: its rescaling (slope {slope:g}) makes levels that float32 can't tell apart.")
    return to_levels(rescaled.astype(np.float32), path)


def _dicom_bytes(stream: BinaryIO, start: int, header: Any, frame: int) -> Iterator[bytes]:
    """The bytes of a frame: all of the file before the pixel data, its number, and its part of the pixel data."""
    from pydicom.encaps import get_frame

    stream.seek(0)
    yield stream.read(start)
    yield f" {frame} ".encode()
    syntax = header.file_meta.TransferSyntaxUID
    element = stream.read(8 if syntax.is_implicit_VR else 12)  # DICOM PS3.5, 7.1.2: tag, VR, length
    frames = int(header.NumberOfFrames)
    if syntax.is_compressed:
        tables = header.get("ExtendedOffsetTable"), header.get("ExtendedOffsetTableLengths")
        yield get_frame(stream, frame, extended_offsets=tables if all(tables) else None, number_of_frames=frames)
        return
    length = int.from_bytes(element[-4:], "little" if syntax.is_little_endian else "big") // frames
    stream.seek(length * frame, 1)
    yield stream.read(length)


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


def _check_page(path: Path, page: int | None, count: int, how: str = "") -> None:
    """Raise DataError where a path doesn't name one of the `count` images of its file. how: to cut it, as a command."""
    if page is None and count == 1:
        return
    if count > MAX_PAGES:
        raise DataError(too_many(path, str(count)))
    file = path if page is None else path.parent
    first, last = page_path(Path(file.name), 0), page_path(Path(file.name), count - 1)
    if page is None:
        raise DataError(
            f"{_several(path, count)}"
            f"Name one as if the file were a folder, from {first.as_posix()} to {last.as_posix()};\n"
            "put it into images/ and its masks, page for page, into masks/ (formats folders and colours);\n"
            f"or cut it into one file an image{how}"
        )
    if count == 1:
        raise DataError(f"{path} is no page: {file.name} holds one image. Name the file alone.")
    if page >= count:
        raise DataError(f"{path} is not there: {file.name} holds {count} pages. wanted: {first.name} to {last.name}")


def _several(path: Path, count: int) -> str:
    return f"{path} holds {count} images (pages, slices or frames).\n  wanted  one image, with labels of its own\n"


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
