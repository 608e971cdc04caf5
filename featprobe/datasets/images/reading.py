"""Reading images of every kind, grey and colour, and mapping their levels to [0, 1] by an intensity policy."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL import Image

from featprobe.datasets.images.decode import opened
from featprobe.datasets.images.pages import opened_file, page_of
from featprobe.datasets.images.pixels import Levels, counted_levels, largest
from featprobe.datasets.images.tiff import NODATA
from featprobe.datasets.names import not_there
from featprobe.datasets.samples import listed
from featprobe.errors import DataError, counted
from featprobe.geometry import Placement, Size
from featprobe.intensity import Intensity
from featprobe.specs import FeatureRecipe

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".npy", ".dcm", ".dicom")
RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}
GREY_LEVELS = 1 << 16


def hash_image(path: Path) -> str:
    """xxh3_128 over the bytes of a file, or over the bytes of one page: 32 hex digits.

    Appending pages does not change the hash of a TIFF's page, except for page 0 of an ImageJ stack, whose header stores
    the number of pages. Raises DataError when the file can't be read or is empty.
    """
    if page_of(path)[1] is not None:
        with opened(path) as image:
            running = xxhash.xxh3_128()
            for data in image.raw():
                running.update(data)
            return running.hexdigest()
    try:
        with opened_file(path) as stream:
            data = stream.read()
    except OSError as error:
        raise DataError(not_there(path) or f"{path} can't be read: {error.strerror}.") from error
    if not data:
        raise DataError(f"{path} is an empty file (0 bytes). wanted: an image.")
    return xxhash.xxh3_128_hexdigest(data)


@dataclass(frozen=True)
class Header:
    """Values of an image's header; see pixels.Opened."""

    size: Size
    bits: int
    channels: int
    empty: str
    unnamed: bool


def header_of(path: Path) -> Header:
    """Read the header of an image. Raises DataError."""
    with opened(path) as image:
        return Header(image.size, image.bits, image.channels, image.empty, image.unnamed)


def pixel_notes(headers: Sequence[tuple[str, Header]]) -> list[str]:
    """Notes on a set's pixels, from (id, header) of its images: images that differ from most, and empty pixels."""
    notes = []
    for what in ("bits", "channels"):
        by_kind: dict[int, list[str]] = defaultdict(list)
        for identity, header in headers:
            by_kind[getattr(header, what)].append(identity)
        kinds = sorted(by_kind.items(), key=lambda kind: len(kind[1]), reverse=True)
        for value, names in kinds[1:]:
            texts = {"bits": f"of {value} bits", "channels": "in colour" if value == 3 else "grey"}
            usual = {"bits": f"of {kinds[0][0]}", "channels": "in colour" if kinds[0][0] == 3 else "grey"}
            count = counted(len(names), "image is", "images are")
            notes.append(f"{count} {texts[what]}, where {len(kinds[0][1])} are {usual[what]}: {listed(names)}")
    unnamed = [identity for identity, header in headers if header.unnamed]
    if unnamed:
        bands = counted(len(unnamed), "image holds", "images hold")
        notes.append(f"{bands} three bands without colours, which are read as red, green and blue: {listed(unnamed)}")
    empty = [identity for identity, header in headers if header.empty]
    if empty:
        tags = listed(sorted({header.empty for _, header in headers if header.empty}), 3)
        names_level = counted(len(empty), "image names", "images name")
        notes.append(
            f"{names_level} a level of empty pixels ({tags}): they take no part in the intensity window, and become 0: "
            f"{listed(empty)}"
        )
    return notes


def image_size(path: Path) -> Size:
    """(height, width) in pixels, in the orientation for viewing, from the file's header. Raises DataError."""
    with opened(path) as image:
        return image.size


def bits_of(path: Path) -> int:
    """Bits per channel of an image's levels, from its header: 8, 16, or 32 for fractions. Raises DataError."""
    with opened(path) as image:
        return image.bits


def read_levels(path: Path, out: NDArray[Any] | None = None) -> Levels:
    """Raw levels of an image: (height, width) or (height, width, 3), uint8, uint16 or float32.

    The content shows the format. The image is turned by its orientation tag; levels grow with brightness; palettes and
    CMYK become RGB; an alpha channel is dropped; signed levels and those that DICOM rescales become float32. Where the
    header calls pixels empty, and some are, the result is a masked array (numpy.ma). Raises DataError for a file that
    is no image, holds several images, is truncated, has pixels that are not finite, or would lose depth or a band
    without notice.

    out: an array to decode into and to return; see pixels.Opened.read for when it is used.
    """
    with opened(path, whole=True) as image:
        return image.read(out)


def write_levels(path: Path, levels: Levels) -> None:
    """Write raw levels as a TIFF that reads back equal, with its empty pixels, whatever the suffix of the path."""
    more: dict[str, Any] = {}
    if isinstance(levels, np.ma.MaskedArray):
        value = "nan" if levels.dtype == np.float32 else str(_unused(levels, path))
        levels, more = levels.filled(float(value)), {"extratags": [(NODATA, "s", 0, value, True)]}
    photometric = "rgb" if levels.ndim == 3 else "minisblack"
    import tifffile  # it takes time

    tifffile.imwrite(path, levels, photometric=photometric, compression="zlib", predictor=True, metadata=None, **more)


def _unused(levels: "np.ma.MaskedArray[Any, Any]", path: Path) -> int:
    """A level that no pixel has in all channels, to mark empty pixels. Raises DataError where all levels are in use."""
    bands = levels.reshape(levels.shape[0] * levels.shape[1], -1)
    filled = bands.data[~np.ma.getmaskarray(bands).any(axis=1)]
    counts = np.bincount(filled[(filled == filled[:, :1]).all(axis=1), 0], minlength=largest(levels) + 1)
    if counts.all():
        raise DataError(
            f"{path} can't be written: its pixels have all {len(counts)} levels, none is left for empty ones."
        )
    return int(counts.argmin())


def training_window(paths: Iterable[Path], policy: Intensity) -> tuple[float, float] | None:
    """The raw levels that become 0 and 1: one window for a whole data set, or None where the policy needs no window.

    percentile and minmax are computed over all pixels, but empty ones, of the given images (the training images).
    """
    if policy.kind == "none" or policy.image:
        return None
    if policy.kind == "window":
        return policy.low, policy.high
    window = _window_of_all(list(paths), policy)
    if not window[0] < window[1]:
        raise DataError(f"The training images hold one grey level only ({window[0]:g}): no {policy} window can be set.")
    return window


def image_window(levels: Levels, policy: Intensity) -> tuple[float, float]:
    """The raw levels that become 0 and 1 in one image, by a policy that uses only the pixels of this image."""
    pixels = _counted(levels, policy)
    if not pixels.size:
        return 1.0, 1.0  # no level above 0 has a logarithm: the whole image becomes 0
    low, high = policy.percent
    ranks = int(low / 100 * pixels.size), max(0, int(np.ceil(high / 100 * pixels.size)) - 1)
    first, last = min(ranks[0], pixels.size - 1), ranks[1]
    chosen = np.partition(pixels, (first, last))
    return float(chosen[first]), float(chosen[last])


def _window_of_all(paths: list[Path], policy: Intensity) -> tuple[float, float]:
    """Exact percentiles over the pixels of many images. For float32 the images are read a second time, to find the
    levels near the two percentiles."""
    fractions = bool(paths) and bits_of(paths[0]) == 32
    shift = 16 if fractions else 0

    def ordered(path: Path) -> NDArray[np.uint32]:
        levels = read_levels(path)
        if (levels.dtype == np.float32) != fractions:
            raise DataError(f"{path} and {paths[0]} hold levels of two kinds: no single intensity window fits both.")
        return _ordered(_counted(levels, policy))

    counts = np.zeros(GREY_LEVELS, dtype=np.int64)  # (raw levels,), or the upper halves of float32's bits
    for path in paths:
        counts += np.bincount(ordered(path) >> shift, minlength=GREY_LEVELS)
    cumulated = np.cumsum(counts)
    if not cumulated[-1]:
        level = "level above 0" if policy.log else "pixel that is not empty"
        raise DataError(f"The training images hold no {level}: no {policy} window can be set.")
    below, above = (percent / 100 * cumulated[-1] for percent in policy.percent)
    low, high = int(np.searchsorted(cumulated, below, "right")), int(np.searchsorted(cumulated, above, "left"))
    low = min(low, GREY_LEVELS - 1)
    if not fractions:
        return float(low), float(high)
    inside = np.zeros((2, GREY_LEVELS), dtype=np.int64)  # (low and high, lower halves of the bits)
    for path in paths:
        keys = ordered(path)
        for end, half in enumerate((low, high)):
            inside[end] += np.bincount(keys[keys >> 16 == half] & 0xFFFF, minlength=GREY_LEVELS)
    before = below - (cumulated[low] - counts[low]), above - (cumulated[high] - counts[high])
    rest = (
        int(np.searchsorted(np.cumsum(inside[0]), before[0], "right")),
        int(np.searchsorted(np.cumsum(inside[1]), before[1], "left")),
    )
    return _fraction(low << 16 | rest[0]), _fraction(high << 16 | rest[1])


def _counted(levels: Levels, policy: Intensity) -> Levels:
    """The levels for the percentiles, (pixels,): all that are not empty; for logarithms only those above 0."""
    flat = counted_levels(levels)
    return flat[flat > 0] if policy.log else flat


def _ordered(levels: Levels) -> NDArray[np.uint32]:
    """Integers in the order of the levels: integers unchanged; fractions as their bits, inverted for negative ones."""
    if levels.dtype != np.float32:
        return levels.astype(np.uint32)
    bits = (levels + np.float32(0)).view(np.uint32)  # + 0: there is one zero only
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def _fraction(key: int) -> float:
    """The float32 for a number from `_ordered`."""
    bits = key ^ (1 << 31) if key >> 31 else ~key & 0xFFFFFFFF
    return float(np.uint32(bits).view(np.float32))


def to_unit(levels: Levels, window: tuple[float, float] | None, policy: Intensity | None = None) -> NDArray[np.float32]:
    """Raw levels as float32 in [0, 1]: (height, width) or (height, width, 3).

    With a window, its lower level becomes 0 and its upper level 1, and levels outside are clipped. Without a window,
    levels are divided by the largest value of their number format. policy: whether the window is computed per image
    (if it is a single level, higher levels become 1), and whether logarithms are used; None for neither. Empty pixels
    become 0.
    """
    if policy is not None and policy.image:
        window = image_window(levels, policy)
    if isinstance(levels, np.ma.MaskedArray):
        whole: Levels = levels.data
        filled = to_unit(whole, window, replace(policy, image=False) if policy is not None else None)
        filled[np.ma.getmaskarray(levels)] = 0.0
        return filled
    if window is None and levels.dtype == np.float32:
        raise DataError("Images of float32 levels have no largest value to divide by: they need an intensity window.")
    low, high = window if window is not None else (0.0, float(largest(levels)))
    if not low < high:
        return (levels > low).astype(np.float32)
    log = policy is not None and policy.log
    number = np.float64 if log or levels.dtype == np.float32 else np.float32  # a difference of fractions might overflow
    values: Any = levels.astype(number)
    if log:
        values, low, high = np.log(np.maximum(values, low)), float(np.log(low)), float(np.log(high))
    unit: NDArray[Any] = (values - number(low)) * number(1.0 / (high - low))
    return np.clip(unit, 0.0, 1.0, out=unit).astype(np.float32, copy=False)


def unit_of(levels: Levels, recipe: FeatureRecipe) -> NDArray[np.float32]:
    """Raw levels as a recipe's backbone needs them, see `to_unit`."""
    return to_unit(levels, recipe.window, recipe.policy)


def frame_image(levels: Levels, placement: Placement, recipe: FeatureRecipe) -> NDArray[np.float32]:
    """An image in its frame, as a recipe's backbone needs it: (3, frame height, frame width), float32, [0, 1].

    Grey is repeated in three channels. Padding has the recipe's mean, per channel. Resampling uses the window's float
    values, never values clipped to 8 bits.
    """
    framed = np.empty((3, *placement.frame), dtype=np.float32)  # (channel, height, width)
    framed[:] = np.asarray(recipe.mean, dtype=np.float32)[:, None, None]
    put_image(framed, levels, placement, recipe)
    return framed


def put_image(framed: NDArray[np.float32], levels: Levels, placement: Placement, recipe: FeatureRecipe) -> None:
    """Write an image into its place in a frame, (3, frame height, frame width), or (1, …) for grey; see frame_image."""
    unit = unit_of(levels, recipe)
    height, width = placement.content
    for channel in range(3 if unit.ndim == 3 else 1):
        plane = unit if unit.ndim == 2 else np.ascontiguousarray(unit[:, :, channel])
        shown = framed[channel : channel + 1 if unit.ndim == 3 else None, :height, :width]
        if placement.content == placement.original:
            shown[:] = plane
        else:
            resized = Image.fromarray(plane).resize((width, height), RESAMPLING[recipe.interpolation])
            np.clip(np.asarray(resized), 0.0, 1.0, out=shown)
