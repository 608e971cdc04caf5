"""Images on their way to a backbone: raw levels in buffers that are used again, framed by whole batches on the device.

What `frame_image` computes image by image on the host, in the same numbers: threads decode into the buffer, or resize
into it; grey levels are stretched and padding is laid where the network runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featprobe.datasets.images.pixels import DTYPE_OF, Levels, largest
from featprobe.datasets.images.reading import Header, image_window, put_image, to_unit
from featprobe.geometry import Placement
from featprobe.specs import FeatureRecipe

STEEP = 1e300  # a window of one level: what lies above it becomes 1
ON_DEVICE = {"uint8": torch.uint8, "uint16": torch.int16, "float32": torch.float32}  # uint16 knows few operators
FACTS = 4  # of each image: window's lower level, factor, height and width of the content


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
    """How a batch lies in its buffer.

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


class ImageBuffer:
    """Memory for the images of one batch, page-locked where a CUDA device takes them; used again for the next.

    levels: (images, …), see Layout. facts: (images, 4), float64.
    """

    layout: Layout
    levels: NDArray[Any]
    facts: NDArray[np.float64]

    def __init__(self, images: int, image_bytes: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._bytes = torch.empty(images * image_bytes, dtype=torch.uint8, pin_memory=pinned)
        self._facts = torch.empty(images, FACTS, dtype=torch.float64, pin_memory=pinned)
        self._sent: torch.cuda.Event | None = None

    def begin(self, images: int, layout: Layout, frame: tuple[int, int]) -> None:
        """Make place for a batch; waits until the one before has left."""
        if self._sent is not None:
            self._sent.synchronize()
        shape = (images, *layout.shape(frame))
        self._shown = self._bytes[: images * layout.image_bytes(frame)].view(ON_DEVICE[layout.dtype]).view(shape)
        self.layout, self.levels = layout, self._shown.numpy().view(layout.dtype)
        self.facts = self._facts[:images].numpy()

    def to(self, device: torch.device, stream: Any = None) -> tuple[Tensor, Tensor]:
        """Levels and facts on the device; on CUDA copied by a stream, which the current one waits for."""
        if stream is None:
            return self._shown.to(device), self._facts[: len(self.levels)].to(device)
        current = torch.cuda.current_stream(device)
        with torch.cuda.stream(stream):
            facts = self._facts[: len(self.levels)].to(device, non_blocking=True)
            sent = self._shown.to(device, non_blocking=True), facts
            self._sent = torch.cuda.Event()
            self._sent.record(stream)
        current.wait_stream(stream)
        for one in sent:
            one.record_stream(current)
        return sent


class Framing:
    """Makes a recipe's frames of raw levels: what must be done image by image in threads, the rest on the device.

    stream: that brings images to a CUDA device.
    """

    def __init__(self, recipe: FeatureRecipe, device: torch.device) -> None:
        self.recipe, self.frame = recipe, recipe.frame
        self.device = device if device.type == "cuda" else torch.device("cpu")  # MPS has no float64
        self.target = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._mean = torch.tensor(recipe.mean, dtype=torch.float32, device=self.device).view(1, 3, 1, 1)
        self._tables: dict[str, Tensor] = {}

    def layout(self, kinds: Sequence[ImageKind]) -> Layout:
        """How a batch of images lies in a buffer: raw where all can be framed from their levels on the device."""
        channels, dtypes = max(kind.channels for kind in kinds), {kind.dtype for kind in kinds}
        (dtype,) = dtypes if len(dtypes) == 1 else ("mixed",)
        recipe, below = self.recipe, self.recipe.window is not None and self.recipe.window[0] < 0
        logs = recipe.policy.log and (recipe.policy.image or dtype == "float32")  # no table serves those
        held = any(kind.empty for kind in kinds) and below and dtype != "float32"  # no level below the window
        raw = not (dtype == "mixed" or logs or held or any(kind.resized for kind in kinds))
        return Layout(True, dtype, channels) if raw else Layout(False, "float32", channels)

    def place_of(self, buffer: ImageBuffer, k: int, placement: Placement) -> NDArray[Any] | None:
        """The place that the levels of image k can be decoded to; None if they need work first."""
        if not buffer.layout.raw:
            return None
        shown = buffer.levels[k, : placement.content[0], : placement.content[1]]
        return shown[:, :, 0] if shown.shape[2] == 1 else shown

    def put(
        self,
        buffer: ImageBuffer,
        k: int,
        levels: Levels,
        placement: Placement,
        window: tuple[float, float] | None = None,
    ) -> None:
        """Write image k, where it was not decoded there. levels: of what is shown of it. window: None for the recipe's.

        Raises DataError for levels that the recipe's policy has no values for.
        """
        recipe, policy = self.recipe, self.recipe.policy
        if not buffer.layout.raw:
            put_image(buffer.levels[k], levels, placement, recipe)
            buffer.facts[k] = 0, 1, *placement.content
            return
        if window is None:
            window = image_window(levels, policy) if policy.image else recipe.window
        fractions = levels.dtype == np.float32
        low, high = window if window is not None else (0.0, float(largest(levels)))
        factor = 1.0 / (high - low) if low < high else STEEP if fractions else 1.0
        buffer.facts[k] = low, factor, *placement.content
        shown: Any = buffer.levels[k, : placement.content[0], : placement.content[1]]
        place = shown[:, :, 0] if levels.ndim == 2 and shown.shape[2] == 1 else shown
        if not np.may_share_memory(place, levels):
            whole = np.ma.getdata(levels)
            np.copyto(place, whole if place.ndim == whole.ndim else whole[:, :, None])
        if isinstance(levels, np.ma.MaskedArray):
            mask = np.ma.getmaskarray(levels)
            lowest: Any = -np.inf if fractions else 0
            np.copyto(place, place.dtype.type(lowest), where=mask if place.ndim == mask.ndim else mask[:, :, None])

    def blank(self, buffer: ImageBuffer, k: int) -> None:
        """Have image k be 0 all over its frame."""
        buffer.levels[k] = 0
        buffer.facts[k] = 0, 1, *self.frame

    def images(self, buffer: ImageBuffer) -> Tensor:
        """The framed images of a buffer on the device: (images, 3, frame height, frame width), float32, [0, 1]."""
        whole = bool((buffer.facts[:, 2:] == self.frame).all())
        values, facts = self.unit(buffer)
        if not whole:
            height, width = facts[:, 2].view(-1, 1, 1, 1), facts[:, 3].view(-1, 1, 1, 1)
            rows = torch.arange(self.frame[0], device=self.device).view(1, 1, -1, 1)
            columns = torch.arange(self.frame[1], device=self.device).view(1, 1, 1, -1)
            values = torch.where((rows < height) & (columns < width), values, self._mean)
        return values.expand(-1, 3, -1, -1).to(self.target)

    def unit(self, buffer: ImageBuffer) -> tuple[Tensor, Tensor]:
        """The images of a buffer as they lie there, (images, channels, height, width), float32, [0, 1]; their facts."""
        levels, facts = buffer.to(self.device, self.stream)
        layout = buffer.layout
        return self._unit(levels, facts, layout.dtype).permute(0, 3, 1, 2) if layout.raw else levels, facts

    def together(self, levels: Sequence[Levels], placements: Sequence[Placement]) -> Tensor:
        """`images` of levels that are there already."""
        kinds = [ImageKind.of(own, placement) for own, placement in zip(levels, placements, strict=True)]
        layout = self.layout(kinds)
        buffer = ImageBuffer(len(levels), layout.image_bytes(self.frame), self.device)
        buffer.begin(len(levels), layout, self.frame)
        for k, (own, placement) in enumerate(zip(levels, placements, strict=True)):
            self.put(buffer, k, own, placement)
        return self.images(buffer)

    def _unit(self, levels: Tensor, facts: Tensor, dtype: str) -> Tensor:
        """Raw levels in [0, 1], in float32; in the numbers of `to_unit`, operator for operator."""
        if dtype == "uint16":
            levels = levels.to(torch.int32).bitwise_and_(0xFFFF)
        if self.recipe.policy.log:
            return self._table(dtype)[levels.to(torch.int32)]
        number = torch.float64 if dtype == "float32" else torch.float32
        low, factor = (facts[:, i].to(number).view(-1, 1, 1, 1) for i in range(2))
        return levels.to(number).sub_(low).mul_(factor).clamp_(0.0, 1.0).to(torch.float32)

    def _table(self, dtype: str) -> Tensor:
        """The value of each level of an integer format."""
        if dtype not in self._tables:
            every = np.arange(np.iinfo(dtype).max + 1, dtype=dtype)
            unit = to_unit(every, self.recipe.window, replace(self.recipe.policy, image=False))
            self._tables[dtype] = torch.from_numpy(unit).to(self.device)
        return self._tables[dtype]
