"""Reading images: 8-bit and 16-bit, grey and colour, into [0, 1] by a stated policy."""

import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, TiffImageFile

from featprobe.errors import DataError
from featprobe.geometry import Placement, Size
from featprobe.specs import Intensity

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}
PNG_DEPTH = 24  # byte offset in a PNG's header
READ_AS_8_BIT = ("RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LA", "La")  # by PIL, whatever depth the file has

Levels = NDArray[np.uint8] | NDArray[np.uint16]


def hash_image(path: Path) -> str:
    """xxh3_128 of the file's bytes: 32 hex digits. Raises DataError when it can't be read or is empty."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}.") from error
    if not data:
        raise DataError(f"{path} is an empty file (0 bytes). wanted: an image.")
    return xxhash.xxh3_128_hexdigest(data)


def image_size(path: Path) -> Size:
    """(height, width) in pixels, from the file's header. Raises DataError."""
    with _opened(path) as image:
        return image.height, image.width


def is_16bit(path: Path) -> bool:
    """Whether an image holds 16-bit grey levels. Raises DataError."""
    with _opened(path) as image:
        return image.mode.startswith("I")


def read_levels(path: Path) -> Levels:
    """Raw levels of an image: (height, width) or (height, width, 3), uint8 or uint16.

    Palettes become their colours and an alpha channel is dropped. Raises DataError for a file that is
    no image, is truncated, or is of a kind that would lose its depth in silence.
    """
    with _opened(path) as image:
        try:
            image.load()
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{path} is truncated or damaged: {error}.") from error
        if image.mode.startswith("I"):
            levels = np.asarray(image)
            if levels.min() < 0 or levels.max() > 65535:
                raise DataError(f"{path} holds grey levels {levels.min()} to {levels.max()}. wanted: 0 to 65535.")
            return levels.astype(np.uint16)
        if image.mode in ("L", "RGB"):
            return np.asarray(image)
        if image.mode in ("P", "RGBA", "RGBX", "CMYK", "YCbCr", "PA"):
            return np.asarray(image.convert("RGB"))
        if image.mode in ("1", "LA", "La"):
            return np.asarray(image.convert("L"))
        raise DataError(
            f"{path} has the pixel format {image.mode}, which would lose depth when read.\n"
            "  wanted  8-bit or 16-bit grey, or 8-bit colour"
        )


def training_window(paths: Iterable[Path], policy: Intensity) -> tuple[float, float] | None:
    """The raw levels that become 0 and 1, one window for a whole data set; None for policy `none`.

    percentile and minmax are taken over every pixel of the images given, which are the training ones.
    """
    if policy.kind == "none":
        return None
    if policy.kind == "window":
        return policy.low, policy.high
    counts = np.zeros(65536, dtype=np.int64)  # (raw levels,)
    for path in paths:
        counts += np.bincount(read_levels(path).ravel(), minlength=65536)
    low, high = (0.0, 100.0) if policy.kind == "minmax" else (policy.low, policy.high)
    cumulated = np.cumsum(counts)
    below, above = low / 100 * cumulated[-1], high / 100 * cumulated[-1]
    window = float(np.searchsorted(cumulated, below, "right")), float(np.searchsorted(cumulated, above, "left"))
    if not window[0] < window[1]:
        raise DataError(f"The training images hold one grey level only ({window[0]:g}): no {policy} window can be set.")
    return window


def to_unit(levels: Levels, window: tuple[float, float] | None) -> NDArray[np.float32]:
    """Raw levels as float32 in [0, 1]: (height, width) or (height, width, 3).

    With a window, its lower level becomes 0 and its upper 1, and what lies outside is clipped. Without
    one, levels are divided by the largest value of their number format.
    """
    low, high = window if window is not None else (0.0, float(np.iinfo(levels.dtype).max))
    unit = (levels.astype(np.float32) - np.float32(low)) * np.float32(1.0 / (high - low))
    return np.clip(unit, 0.0, 1.0, out=unit)


def frame_image(
    levels: Levels,
    placement: Placement,
    window: tuple[float, float] | None,
    interpolation: str,
    fill: tuple[float, ...],
) -> NDArray[np.float32]:
    """An image in its frame as a backbone takes it: (3, frame height, frame width), float32, [0, 1].

    Grey is repeated into three channels. Padding holds `fill`, per channel. Resampling is done on the
    window's float values, never on clipped 8-bit ones.
    """
    unit = to_unit(levels, window)
    height, width = placement.content
    framed = np.empty((3, *placement.frame), dtype=np.float32)  # (channel, height, width)
    framed[:] = np.asarray(fill, dtype=np.float32)[:, None, None]
    for channel in range(3 if unit.ndim == 3 else 1):
        plane = unit if unit.ndim == 2 else np.ascontiguousarray(unit[:, :, channel])
        if placement.content != placement.original:
            resized = Image.fromarray(plane).resize((width, height), RESAMPLING[interpolation])
            plane = np.clip(np.asarray(resized), 0.0, 1.0)
        framed[channel : channel + 1 if unit.ndim == 3 else 3, :height, :width] = plane
    return framed


class _opened:
    """PIL's image of a path, closed in the end; what can't be opened is a DataError."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Image.Image:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large scans are usual here
                self.image = Image.open(self.path)
        except UnidentifiedImageError as error:
            raise DataError(f"{self.path} is not an image that can be read.") from error
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{self.path} can't be read as an image: {error}.") from error
        if self.image.width < 1 or self.image.height < 1:
            raise DataError(f"{self.path} has {self.image.width}x{self.image.height} pixels. wanted: at least one.")
        if self.image.mode in READ_AS_8_BIT and self._depth() > 8:
            self.image.close()
            raise DataError(f"{self.path} is 16-bit colour, which can't be read without losing depth.")
        return self.image

    def _depth(self) -> int:
        """Bits per channel, from the header."""
        if isinstance(self.image, TiffImageFile):
            return max(self.image.tag_v2.get(BITSPERSAMPLE, (1,)))
        if self.image.format == "PNG":
            with self.path.open("rb") as header:
                return header.read(PNG_DEPTH + 1)[PNG_DEPTH]
        return 8

    def __exit__(self, *_: object) -> None:
        self.image.close()
