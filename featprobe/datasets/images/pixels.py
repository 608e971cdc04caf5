"""An open image of any kind: its size, its depth, and its levels; different levels stay different."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featprobe.datasets.images.pages import MAX_PAGES, page_path, too_many
from featprobe.errors import DataError
from featprobe.geometry import Size, Spacing

Levels = NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.float32]
"""(height, width) or (height, width, 3). Where the header calls pixels empty, a masked array (`numpy.ma`) that masks
them; below the mask is the lowest level of the other pixels."""

DTYPE_OF = {8: np.dtype(np.uint8), 16: np.dtype(np.uint16), 32: np.dtype(np.float32)}
"""Bits per channel -> the number format of the levels."""


@dataclass(frozen=True)
class Opened:
    """An open image: a file, or a page of one.

    size: (height, width) in pixels, in the orientation for viewing. bits: per channel of the levels that `load` gives:
    8, 16, or 32 for float32. channels: 1 or 3. load: gives the pixels, (height, width) or (height, width, 3), in the
    stored orientation; with `into`, it takes an array of this shape and number format to decode into, or None for a new
    array. turn: EXIF's orientation, 1 to 8. raw: the bytes of the file that define this page. stored: for a page of a
    TIFF, its pixel format by Pillow's name, its stored values (indices for a palette), and which of these are called
    empty, (height, width), or None. empty: the header's entry on empty pixels, as `GDAL_NODATA -9999`; "" without one.
    unnamed: whether its three channels are bands without colours in the header. spacing: millimetres per pixel, down
    and across, where the header says it.
    """

    size: Size
    bits: int
    channels: int
    load: Callable[..., Levels]
    turn: int = 1
    raw: Callable[[], Iterable[bytes]] = tuple
    stored: Callable[[], tuple[str, NDArray[Any], NDArray[np.bool_] | None]] | None = None
    empty: str = ""
    unnamed: bool = False
    into: bool = False
    spacing: Spacing | None = None

    def read(self, out: NDArray[Any] | None = None) -> Levels:
        """The pixels, in the orientation for viewing.

        out: an array to decode into and to return. It is used only where the image's reader can do that and the array
        is C-contiguous and has the pixels' shape and number format.
        """
        shape = self.size if self.channels == 1 else (*self.size, self.channels)
        if out is not None and self.into and self.turn == 1 and out.flags.c_contiguous:
            if out.shape == shape and out.dtype == DTYPE_OF[self.bits]:
                return self.load(out)
        return oriented(self.load(), self.turn)


def oriented(levels: NDArray[Any], turn: int) -> NDArray[Any]:
    """An image turned by EXIF's orientation (1 to 8); unchanged for any other number."""
    if turn in (5, 6, 7, 8):
        levels = levels.swapaxes(0, 1)
    if turn in (2, 3, 6, 7):
        levels = levels[:, ::-1]
    if turn in (3, 4, 7, 8):
        levels = levels[::-1]
    return np.asanyarray(levels, order="C")  # a masked array stays one


def turned(height: int, width: int, turn: int) -> Size:
    """(height, width) after the turn of an orientation (1 to 8)."""
    return (width, height) if turn in (5, 6, 7, 8) else (height, width)


def bits_of_dtype(dtype: np.dtype[Any], path: Path) -> int:
    """Bits per channel of the levels that `to_levels` makes: 8, 16, or 32 for float32. Raises DataError."""
    if dtype == np.bool_ or dtype == np.uint8:
        return 8
    if dtype.kind == "f" or dtype in (np.int8, np.int16):
        return 32
    if dtype.kind in "iu":
        return 16
    raise DataError(unusable(path, str(dtype)))


def to_levels(values: NDArray[Any], path: Path) -> Levels:
    """Values of any number format as uint8, uint16 or float32; different values stay different.

    Bits become 0 and 255. Integers of 32 bits and more must fit 16 bits, 64-bit fractions must fit float32. Raises
    DataError where they do not, and for values that are not finite.
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
            "Replace them by a level with the same meaning, or omit the image."
        )
    if values.dtype.itemsize <= 4:
        return np.ascontiguousarray(values, dtype=np.float32)
    with np.errstate(over="ignore"):
        levels = np.ascontiguousarray(values, dtype=np.float32)
    if not np.array_equal(levels, values):
        raise DataError(f"{path} holds {values.dtype} values that float32 can't hold. Round them:  a.astype('float32')")
    return levels


def without_empty(
    values: NDArray[Any], empty: NDArray[np.bool_] | None, convert: Callable[[NDArray[Any]], Levels]
) -> Levels:
    """Levels that `convert` makes from stored values, with the pixels masked that are `empty`, (height, width).

    `convert` gets 0 in place of empty values. Where none is empty, its result is returned. See Levels.
    """
    if empty is None or not empty.any():
        return convert(values)
    filled = values.copy()
    filled[empty] = 0
    levels = convert(filled)
    mask = empty if levels.ndim == 2 else np.repeat(empty[:, :, None], levels.shape[2], axis=2)
    masked = np.ma.MaskedArray(levels, mask)
    masked.data[mask] = 0 if empty.all() else masked.min()
    return masked


def counted_levels(levels: Levels) -> Levels:
    """The levels that are not empty, (values,)."""
    return levels.compressed() if isinstance(levels, np.ma.MaskedArray) else levels.ravel()


def _is_finite(values: NDArray[Any]) -> bool:
    """Whether no value is NaN or infinite. For most arrays the sum of squares shows it in one fast pass."""
    flat = values.ravel()
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(np.dot(flat, flat))) or bool(np.isfinite(flat).all())


def largest(levels: Levels) -> int:
    """The largest value of a number format, uint8 or uint16."""
    return 255 if levels.dtype == np.uint8 else 65535


def without_alpha(values: NDArray[Any]) -> NDArray[Any]:
    """Levels without the alpha channel, of grey or of colour."""
    if values.ndim == 3 and values.shape[2] in (2, 4):
        values = values[:, :, : values.shape[2] - 1]
    return values[:, :, 0] if values.ndim == 3 and values.shape[2] == 1 else values


def check_page(path: Path, page: int | None, count: int, how: str = "") -> None:
    """Raise DataError where a path doesn't name one of the `count` images of its file. how: a command that cuts it."""
    if page is None and count == 1:
        return
    if count > MAX_PAGES:
        raise DataError(too_many(path, str(count)))
    file = path if page is None else path.parent
    first, last = page_path(Path(file.name), 0), page_path(Path(file.name), count - 1)
    if page is None:
        raise DataError(
            f"{several(path, count)}"
            f"Name one as if the file were a folder, from {first.as_posix()} to {last.as_posix()};\n"
            "put the file into images/ and its masks, page for page, into masks/ (formats folders and colours);\n"
            f"or cut it into one file per image{how}"
        )
    if count == 1:
        raise DataError(f"{path} is no page: {file.name} holds one image. Name only the file.")
    if page >= count:
        raise DataError(f"{path} is not there: {file.name} holds {count} pages. wanted: {first.name} to {last.name}")


def several(path: Path, count: int) -> str:
    """The beginning of the error text for a file of several images."""
    return f"{path} holds {count} images (pages, slices or frames).\n  wanted  one image, with labels of its own\n"


def unusable(path: Path, found: str) -> str:
    """The error for a pixel format that can't be read."""
    return (
        f"{path} has the pixel format {found}, which can't be read without losing depth or meaning.\n"
        "  wanted  grey or RGB of 8 or 16 bits, or float32"
    )
