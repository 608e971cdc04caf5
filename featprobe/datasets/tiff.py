"""TIFF: files of one image, and pages of a stack (see datasets.pages)."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from featprobe.datasets.pages import tiff_images, tiff_images_in
from featprobe.datasets.pixels import (
    MAX_PIXELS,
    Levels,
    Opened,
    bits_of_dtype,
    check_extent,
    check_page,
    largest,
    to_levels,
    too_large,
    turned,
    unusable,
    without_alpha,
)
from featprobe.errors import DataError

PLACES = (273, 324, 330)  # tags that say where in the file something lies: strips, tiles, further IFDs
STK_PLANES = 33629  # MetaMorph's tag with an entry for each plane behind an IFD
PLAIN = ("MINISBLACK", "MINISWHITE", "RGB")  # what a TIFF says of its samples that are levels as they are
CONVERTED = ("PALETTE", "SEPARATED", "YCBCR")  # and that become RGB, of 8 bits


@contextmanager
def open_tiff(path: Path, stream: BinaryIO, number: int | None) -> Iterator[Opened]:
    """A TIFF that holds one image, or a page of one, named by the path."""
    offsets = tiff_images_in(stream, path) if number is None else tiff_images(path.parent)
    stream.seek(0)
    check_page(path, number, len(offsets), f", as by libtiff:  tiffsplit {path.name} {path.stem}-")
    number = number or 0
    behind_one = offsets.count(offsets[0]) > 1
    plane = number if behind_one else 0
    with tifffile.TiffFile(stream) as file:
        page: Any = file.pages.first
        if page.offset != offsets[number]:
            file.filehandle.seek(offsets[number])
            page = tifffile.TiffPage(file, number)
        check_extent(path, page.imagelength, page.imagewidth)
        _check_planes(path, page, plane, behind_one)
        kind = getattr(page.photometric, "name", str(page.photometric))
        known = kind in PLAIN or (page.bitspersample <= 8 and kind in CONVERTED)
        if not known or page.dtype is None or page.samplesperpixel > 4 or page.imagedepth > 1:
            raise DataError(unusable(path, f"{kind}, {page.samplesperpixel} x {page.bitspersample} bits"))
        turn = page.tags.valueof("Orientation", default=1)
        turn = turn if turn in range(1, 9) else 1
        yield Opened(
            turned(page.imagelength, page.imagewidth, turn),
            bits_of_dtype(page.dtype, path),
            lambda: _levels(page, _values(page, plane), kind, path),
            turn,
            lambda: _bytes(page, plane),
            lambda: _mask(page, _values(page, plane), kind),
        )


def _values(page: Any, plane: int) -> NDArray[Any]:
    """Values of a page as they are stored, (height, width) or (height, width, samples)."""
    if plane:
        values = np.frombuffer(_plane_bytes(page, plane), page.parent.byteorder + page.dtype.char).reshape(page.shape)
    else:
        values = page.asarray(maxworkers=1)
    if page.planarconfig == 2 and page.samplesperpixel > 1:
        values = np.moveaxis(values, 0, -1)
    return values


def _levels(page: Any, values: NDArray[Any], kind: str, path: Path) -> Levels:
    """Pixels of a page, palettes and CMYK as RGB, levels of which 0 is white turned over."""
    if kind == "SEPARATED":
        return np.asarray(Image.fromarray(np.ascontiguousarray(values), mode="CMYK").convert("RGB"))
    if kind == "PALETTE":
        colours = page.colormap  # (3, 256), uint16
        if (colours & 255).any() and (colours & 255 != colours >> 8).any():
            raise DataError(unusable(path, "a palette of 16 bits"))
        return np.moveaxis((colours >> 8).astype(np.uint8)[:, values.astype(np.intp)], 0, -1)
    levels = to_levels(without_alpha(values), path)
    if page.bitspersample in (2, 4):
        levels = levels * np.uint8(255 // (2**page.bitspersample - 1))
    if kind != "MINISWHITE":
        return levels
    if levels.dtype == np.float32:
        raise DataError(f"{path} holds fractions of which 0 is white. wanted: 0 is black (MinIsBlack).")
    return levels.dtype.type(largest(levels)) - levels


def _mask(page: Any, values: NDArray[Any], kind: str) -> tuple[str, NDArray[Any]]:
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


def _bytes(page: Any, plane: int) -> Iterator[bytes]:
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
        raise DataError(too_large(path, f"tiles of {math.prod(page.chunks)}"))
    length = page.parent.filehandle.size
    wanted = math.prod(page.chunked)
    found = sum(
        0 < count and offset + count <= length
        for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False)
    )
    if found < wanted:
        raise DataError(f"{path} is truncated or damaged: {wanted - found} of {wanted} strips or tiles are not there.")
