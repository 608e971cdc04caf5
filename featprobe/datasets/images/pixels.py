"""An open image of any kind: its size, its depth, its levels, of which no two that differ become one."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featprobe.datasets.images.pages import MAX_PAGES, page_path, too_many
from featprobe.errors import DataError
from featprobe.geometry import Size

Levels = NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.float32]
"""(height, width) or (height, width, 3). Where the header calls pixels empty, a masked array (`numpy.ma`) that masks
them; beneath the mask is the lowest level of the others."""

DTYPE_OF = {8: np.dtype(np.uint8), 16: np.dtype(np.uint16), 32: np.dtype(np.float32)}
"""Bits of a channel -> the number format of its levels."""


@dataclass(frozen=True)
class Opened:
    """An image that is open: a file, or a page of one.

    size: (height, width) in pixels, as it is to be looked at. bits: of a channel as `load` gives it: 8, 16, or 32 for
    float32. channels: 1 or 3. load: the pixels, (height, width) or (height, width, 3), in the stored orientation; with
    `into`, it takes an array of their shape and number format to decode into, or None for a new one. turn:
    EXIF's orientation, 1 to 8. raw: the bytes of its file that make a page what it is. stored: of a page of a TIFF, its
    pixel format as Pillow calls it, its values as they are stored, palette indices for a palette, and where these are
    called empty, (height, width), None for nowhere. empty: what the header calls empty, as `GDAL_NODATA -9999`; ""
    where it calls nothing so. unnamed: whether its three channels are bands that the header gives no colours.
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

    def read(self, out: NDArray[Any] | None = None) -> Levels:
        """The pixels as they are to be looked at.

        out: where they are decoded to, and what is returned, where the image's reader can do that and the array is
        C-contiguous, of their shape and number format.
        """
        shape = self.size if self.channels == 1 else (*self.size, self.channels)
        if out is not None and self.into and self.turn == 1 and out.flags.c_contiguous:
            if out.shape == shape and out.dtype == DTYPE_OF[self.bits]:
                return self.load(out)
        return oriented(self.load(), self.turn)


def oriented(levels: NDArray[Any], turn: int) -> NDArray[Any]:
    """An image turned as EXIF's orientation (1 to 8) asks; any other number leaves it as it is."""
    if turn in (5, 6, 7, 8):
        levels = levels.swapaxes(0, 1)
    if turn in (2, 3, 6, 7):
        levels = levels[:, ::-1]
    if turn in (3, 4, 7, 8):
        levels = levels[::-1]
    return np.asanyarray(levels, order="C")  # a masked array stays one


def turned(height: int, width: int, turn: int) -> Size:
    """(height, width) as an orientation (1 to 8) turns it."""
    return (width, height) if turn in (5, 6, 7, 8) else (height, width)


def bits_of_dtype(dtype: np.dtype[Any], path: Path) -> int:
    """Bits of a channel, as `to_levels` gives values of this kind: 8, 16, or 32 for float32. Raises DataError."""
    if dtype == np.bool_ or dtype == np.uint8:
        return 8
    if dtype.kind == "f" or dtype in (np.int8, np.int16):
        return 32
    if dtype.kind in "iu":
        return 16
    raise DataError(unusable(path, str(dtype)))


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


def without_empty(
    values: NDArray[Any], empty: NDArray[np.bool_] | None, convert: Callable[[NDArray[Any]], Levels]
) -> Levels:
    """What `convert` makes of stored values, those masked that are `empty`, (height, width); see Levels.

    It meets 0 in place of empty values, and is all that is done where there are none.
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
    """Whether no value is NaN or infinite. The sum of squares tells most arrays in a pass that is quicker than any."""
    flat = values.ravel()
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(np.dot(flat, flat))) or bool(np.isfinite(flat).all())


def largest(levels: Levels) -> int:
    """The largest value of the number format of uint8 or uint16."""
    return 255 if levels.dtype == np.uint8 else 65535


def without_alpha(values: NDArray[Any]) -> NDArray[Any]:
    """Grey of grey with alpha, colour of colour with alpha."""
    if values.ndim == 3 and values.shape[2] in (2, 4):
        values = values[:, :, : values.shape[2] - 1]
    return values[:, :, 0] if values.ndim == 3 and values.shape[2] == 1 else values


def check_page(path: Path, page: int | None, count: int, how: str = "") -> None:
    """Raise DataError where a path doesn't name one of the `count` images of its file. how: to cut it, as a command."""
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
            "put it into images/ and its masks, page for page, into masks/ (formats folders and colours);\n"
            f"or cut it into one file an image{how}"
        )
    if count == 1:
        raise DataError(f"{path} is no page: {file.name} holds one image. Name the file alone.")
    if page >= count:
        raise DataError(f"{path} is not there: {file.name} holds {count} pages. wanted: {first.name} to {last.name}")


def several(path: Path, count: int) -> str:
    """The begin of what is said of a file of several images."""
    return f"{path} holds {count} images (pages, slices or frames).\n  wanted  one image, with labels of its own\n"


def unusable(path: Path, found: str) -> str:
    """What is said of a pixel format that can't be read."""
    return (
        f"{path} has the pixel format {found}, which can't be read without losing depth or meaning.\n"
        "  wanted  grey or RGB of 8 or 16 bits, or float32"
    )
