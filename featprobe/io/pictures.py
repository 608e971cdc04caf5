"""The one place where Pillow opens anything. It always gets the list of formats that a file may have.

Left to itself Pillow tries all that it knows by the bytes, and for one of them (EPS) starts Ghostscript.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from featprobe.errors import DataError, FileKindError
from featprobe.io.disk import open_regular
from featprobe.machine import available_memory, human_bytes

IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "PPM")
"""Formats of images that Pillow opens; other modules read TIFF, DICOM and the files of numpy."""
MASK_FORMATS = (*IMAGE_FORMATS, "TIFF")
MAX_PIXELS = 178_956_970  # Pillow's own limit, held for every format
DENSEST = 8 * 1032  # pixels that a byte can hold: of one bit, deflated as far as that goes; no format but WebP beats it
COMPRESSION = 259  # TIFF's tag
DENSEST_TIFF = {1: 64, 5: 8 * 1400, 8: DENSEST, 32773: 512, 32946: DENSEST}  # the same of those that have a bound
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # scans are large
PER_PIXEL = 4  # bytes that an image takes at least while it is read
UNASKED = 1 << 24  # pixels for which no memory is looked up


@contextmanager
def picture(source: Path | BinaryIO, formats: tuple[str, ...], where: object = None) -> Iterator[Image.Image]:
    """An image of one of these formats, as its header tells it; closed in the end.

    where: what it is called in errors; the path by default. Raises DataError for a file that is none of them, is no
    regular file, or claims more pixels than it can hold or than there is memory; OSError, ValueError and SyntaxError as
    Pillow does.
    """
    where = source if where is None else where
    try:
        named = open(source, "rb", opener=open_regular) if isinstance(source, Path) else nullcontext(source)
    except FileKindError as error:
        raise DataError(str(error)) from error
    with named as stream:
        try:
            image = Image.open(stream, formats=formats)
        except UnidentifiedImageError as error:
            if not size_of(stream):
                raise DataError(f"{where} is an empty file (0 bytes). wanted: an image.") from error
            said = "can't be read as a mask" if formats is MASK_FORMATS else "is not an image that can be read"
            raise DataError(f"{where} {said}. wanted: {', '.join(formats)}.") from error
        except Image.DecompressionBombError as error:
            raise DataError(too_large(where, "more, by its header")) from error
        with image:
            check_claim(where, image.height, image.width)
            packed = getattr(image, "tag_v2", {}).get(COMPRESSION, 1)
            densest = {"WEBP": 0, "TIFF": DENSEST_TIFF.get(packed, 0)}.get(str(image.format), DENSEST)
            if densest:
                check_held(where, image.height * image.width, size_of(stream), densest)
            yield image


def size_of(stream: BinaryIO) -> int:
    """The bytes of a file or of a buffer; it stays at its place."""
    place = stream.tell()
    size = stream.seek(0, os.SEEK_END)
    stream.seek(place)
    return size


def check_claim(where: object, height: int, width: int) -> None:
    """Raise DataError for an image of no pixels, of too many, or of more than there is memory for."""
    if height < 1 or width < 1:
        raise DataError(f"{where} has {width}x{height} pixels. wanted: at least one.")
    if height * width > MAX_PIXELS:
        raise DataError(too_large(where, f"{width}x{height} = {height * width}"))
    if height * width > UNASKED and height * width * PER_PIXEL > (free := available_memory()):
        raise DataError(
            f"{where} has {width}x{height} pixels, more than the memory holds ({human_bytes(free)} free).\n"
            "Nothing of it was decoded. Cut it into smaller images."
        )


def check_held(where: object, wanted: int, held: int, densest: int) -> None:
    """Raise DataError where `held` bytes can't hold what a header claims, at most `densest` of it in each."""
    if wanted > held * densest:
        raise DataError(
            f"{where} is truncated or damaged: its {held} bytes can't hold what its header claims.\n"
            f"  wanted  at most {densest} in a byte\n  found   {wanted}\nNothing of it was decoded."
        )


def too_large(where: object, found: str) -> str:
    """The message for an image of too many pixels."""
    return (
        f"{where} is too large, or its header is damaged. Nothing of it was decoded.\n"
        f"  wanted  at most {MAX_PIXELS} pixels\n  found   {found}\nCut it into smaller images."
    )
