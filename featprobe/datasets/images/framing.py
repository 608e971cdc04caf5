"""Raw levels in their places of a batch: the part of framing that is done image by image on the host, with numpy alone.

What lies there then is framed by whole batches on the device: see stages/extraction/frames.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featprobe.datasets.images.pixels import DTYPE_OF, Levels, largest
from featprobe.datasets.images.reading import Header, image_window, put_image, read_levels
from featprobe.errors import DataError
from featprobe.geometry import Part, Placement, Size
from featprobe.specs import FeatureRecipe

FACT_BYTES = 4 * 8  # of each image: window's lower level, factor, height and width of the content
ALIGNED = 64  # bytes
STEEP = 1e300  # a window of one level: what lies above it becomes 1


@dataclass(frozen=True)
class ImageKind:
    """The facts about an image before it is decoded. resized: whether its frame shows it at another size."""

    dtype: str
    channels: int
    empty: bool
    resized: bool

    @classmethod
    def of(cls, image: Header | Levels, placement: Placement) -> "ImageKind":
        """The kind of an image by its header, or by its levels."""
        resized = placement.content != placement.original
        if isinstance(image, Header):
            return cls(str(DTYPE_OF[image.bits]), image.channels, bool(image.empty), resized)
        return cls(str(image.dtype), 1 if image.ndim == 2 else 3, isinstance(image, np.ma.MaskedArray), resized)


@dataclass(frozen=True)
class Layout:
    """How a batch lies in its places.

    raw: levels as they were read, (images, height, width, channels); or else values in [0, 1], float32, (images,
    channels, height, width).
    """

    raw: bool
    dtype: str
    channels: int

    def shape(self, frame: tuple[int, int]) -> tuple[int, int, int]:
        """The shape of one image."""
        return (*frame, self.channels) if self.raw else (self.channels, *frame)

    def image_bytes(self, frame: tuple[int, int]) -> int:
        """Bytes of one image."""
        return frame[0] * frame[1] * self.channels * np.dtype(self.dtype).itemsize


class Places:
    """Places for the images of a batch on the host, in memory that is used again for the next.

    levels: (images, …), see Layout. facts: (images, 4), float64. memory: (bytes,), uint8: from start on it has
    bytes_of(capacity, …), the facts of as many images as the capacity says, then levels.
    """

    layout: Layout
    levels: NDArray[Any]
    facts: NDArray[np.float64]

    def __init__(self, memory: NDArray[np.uint8], capacity: int, start: int = 0) -> None:
        self.memory, self.capacity, self.start = memory, capacity, start

    @staticmethod
    def bytes_of(images: int, image_bytes: int) -> int:
        """Bytes of the memory for so many images of so many bytes."""
        return -(-images * FACT_BYTES // ALIGNED) * ALIGNED + images * image_bytes

    def begin(self, images: int, layout: Layout, frame: Size) -> None:
        """Make places for a batch."""
        facts = self.memory[self.start :][: images * FACT_BYTES]
        levels = self.memory[self.start + self.bytes_of(self.capacity, 0) :][: images * layout.image_bytes(frame)]
        self.layout, self.facts = layout, facts.view(np.float64).reshape(images, -1)
        self.levels = levels.view(layout.dtype).reshape(images, *layout.shape(frame))


@dataclass(frozen=True)
class Wanted:
    """An image to be decoded. size, kind: of the whole image, as its header had them when the data set was looked at.

    part: of it that is shown, None for the whole image.
    """

    path: Path
    placement: Placement
    size: Size
    kind: ImageKind
    part: Part | None = None


class HostFraming:
    """Brings raw levels to their places, so that the frames of a recipe can be made of them."""

    def __init__(self, recipe: FeatureRecipe) -> None:
        self.recipe, self.frame = recipe, recipe.frame

    def layout(self, kinds: Sequence[ImageKind]) -> Layout:
        """How a batch of images lies in a buffer: raw where all can be framed from their levels on the device."""
        channels, dtypes = max(kind.channels for kind in kinds), {kind.dtype for kind in kinds}
        (dtype,) = dtypes if len(dtypes) == 1 else ("mixed",)
        recipe, below = self.recipe, self.recipe.window is not None and self.recipe.window[0] < 0
        logs = recipe.policy.log and (recipe.policy.image or dtype == "float32")  # no table serves those
        held = any(kind.empty for kind in kinds) and below and dtype != "float32"  # no level below the window
        raw = not (dtype == "mixed" or logs or held or any(kind.resized for kind in kinds))
        return Layout(True, dtype, channels) if raw else Layout(False, "float32", channels)

    def place_of(self, places: Places, k: int, placement: Placement) -> NDArray[Any] | None:
        """The place that the levels of image k can be decoded to; None if they need work first."""
        if not places.layout.raw:
            return None
        shown = places.levels[k, : placement.content[0], : placement.content[1]]
        return shown[:, :, 0] if shown.shape[2] == 1 else shown

    def put(
        self,
        places: Places,
        k: int,
        levels: Levels,
        placement: Placement,
        window: tuple[float, float] | None = None,
    ) -> None:
        """Write image k, where it was not decoded there. levels: of what is shown of it. window: None for the recipe's.

        Raises DataError for levels that the recipe's policy has no values for.
        """
        recipe, policy = self.recipe, self.recipe.policy
        if not places.layout.raw:
            put_image(places.levels[k], levels, placement, recipe)
            places.facts[k] = 0, 1, *placement.content
            return
        if window is None:
            window = image_window(levels, policy) if policy.image else recipe.window
        fractions = levels.dtype == np.float32
        low, high = window if window is not None else (0.0, float(largest(levels)))
        factor = 1.0 / (high - low) if low < high else STEEP if fractions else 1.0
        places.facts[k] = low, factor, *placement.content
        shown: Any = places.levels[k, : placement.content[0], : placement.content[1]]
        place = shown[:, :, 0] if levels.ndim == 2 and shown.shape[2] == 1 else shown
        if not np.may_share_memory(place, levels):
            whole = np.ma.getdata(levels)
            np.copyto(place, whole if place.ndim == whole.ndim else whole[:, :, None])
        if isinstance(levels, np.ma.MaskedArray):
            mask = np.ma.getmaskarray(levels)
            lowest: Any = -np.inf if fractions else 0
            np.copyto(place, place.dtype.type(lowest), where=mask if place.ndim == mask.ndim else mask[:, :, None])

    def blank(self, places: Places, k: int) -> None:
        """Have image k be 0 all over its frame."""
        places.levels[k] = 0
        places.facts[k] = 0, 1, *self.frame

    def decode(self, places: Places, k: int, wanted: Wanted, read: Callable[..., Levels] = read_levels) -> None:
        """Bring what is shown of an image to place k. Raises DataError, also for an image that has changed."""
        place = None if wanted.part else self.place_of(places, k, wanted.placement)
        levels = read(wanted.path) if place is None else read(wanted.path, place)
        found = ImageKind.of(levels, wanted.placement)
        same = (found.dtype, found.channels) == (wanted.kind.dtype, wanted.kind.channels)
        if levels.shape[:2] != wanted.size or not same:
            raise DataError(f"{wanted.path} changed while features were made. Run the same command again.")
        self.put(places, k, wanted.part.take(levels) if wanted.part else levels, wanted.placement)
