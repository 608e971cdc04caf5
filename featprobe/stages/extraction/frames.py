"""Images on their way to a backbone: raw levels in buffers that are used again, framed by whole batches on the device.

What `frame_image` computes image by image on the host, in the same numbers: images are decoded into the buffer, or
resized into it; grey levels are stretched and padding is laid where the network runs.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featprobe.datasets.images.framing import HostFraming, ImageKind, Layout, Places
from featprobe.datasets.images.pixels import Levels
from featprobe.datasets.images.reading import to_unit
from featprobe.geometry import Placement, Size
from featprobe.specs import FeatureRecipe

ON_DEVICE = {"uint8": torch.uint8, "uint16": torch.int16, "float32": torch.float32}  # uint16 knows few operators


class ImageBuffer(Places):
    """Places whose levels go to a device as they are; page-locked where a CUDA device takes them.

    memory: (bytes,), uint8, in which they lie from start on; None for new memory.
    """

    def __init__(
        self, images: int, image_bytes: int, device: torch.device, memory: Tensor | None = None, start: int = 0
    ) -> None:
        if memory is None:
            size = self.bytes_of(images, image_bytes)
            memory = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        super().__init__(memory.numpy(), images, start)
        self._bytes = memory
        self._sent: torch.cuda.Event | None = None

    def begin(self, images: int, layout: Layout, frame: Size) -> None:
        """Make places for a batch; waits until the one before has left."""
        if self._sent is not None:
            self._sent.synchronize()
        super().begin(images, layout, frame)
        levels = self._bytes[self.start + self.bytes_of(self.capacity, 0) :][: self.levels.nbytes]
        self._shown = levels.view(ON_DEVICE[layout.dtype]).view(self.levels.shape)
        self._facts = self._bytes[self.start :][: self.facts.nbytes].view(torch.float64).view(self.facts.shape)

    def to(self, device: torch.device, stream: Any = None) -> tuple[Tensor, Tensor]:
        """Levels and facts on the device; on CUDA copied by a stream, which the current one waits for."""
        if stream is None:
            return self._shown.to(device), self._facts.to(device)
        current = torch.cuda.current_stream(device)
        with torch.cuda.stream(stream):
            facts = self._facts.to(device, non_blocking=True)
            sent = self._shown.to(device, non_blocking=True), facts
            self._sent = torch.cuda.Event()
            self._sent.record(stream)
        current.wait_stream(stream)
        for one in sent:
            one.record_stream(current)
        return sent


class Framing(HostFraming):
    """Makes a recipe's frames of raw levels: what must be done image by image on the host, the rest on the device.

    stream: that brings images to a CUDA device.
    """

    def __init__(self, recipe: FeatureRecipe, device: torch.device) -> None:
        super().__init__(recipe)
        self.device = device if device.type == "cuda" else torch.device("cpu")  # MPS has no float64
        self.target = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._mean = torch.tensor(recipe.mean, dtype=torch.float32, device=self.device).view(1, 3, 1, 1)
        self._tables: dict[str, Tensor] = {}

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
