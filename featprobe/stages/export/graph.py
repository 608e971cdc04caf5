"""From raw levels to a head's answer in one module, which an exporter turns into a graph."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from featprobe.backbones.precision import computing
from featprobe.cache.quantised import CODES, TORCH_DTYPE, as_read
from featprobe.datasets.images.pixels import Levels
from featprobe.datasets.images.reading import RESAMPLING, to_unit
from featprobe.features import Features
from featprobe.geometry import Placement, Size, place, place_tile
from featprobe.specs import FeatureRecipe
from featprobe.stages.export.resampling import weights_of
from featprobe.stages.findings import Threshold
from featprobe.stages.outputs import Piece
from featprobe.stages.predictor import Predictor

ROWS_OF_BLOCK = 64  # of a banded matrix
FORMAT = {"fp16": (11, 2.0**-14), "bf16": (8, 2.0**-126)}
"""Significant bits of a number format, and its smallest number that has them all."""
SPLIT_16 = 2.0**8 + 1
"""Dekker's factor: it splits off the upper 16 of float32's 24 significant bits."""


@dataclass(frozen=True)
class Raw:
    """The images that a graph takes: their number format, 1 or 3 channels, and (height, width) in pixels."""

    dtype: str
    channels: int
    size: Size

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image."""
        return self.size if self.channels == 1 else (*self.size, self.channels)

    @property
    def layout(self) -> str:
        """The shape of a batch, for people."""
        sides = ", ".join(map(str, self.shape))
        return f"{self.dtype} (n, {sides})"


@dataclass(frozen=True)
class Differences:
    """How far a graph's answers lie from featprobe's own. Those of several batches add up.

    logits: the largest difference of a logit. largest_logit: its size. scores: the largest relative difference of a
    score. Each is None where a task has none. pixels, objects, verdicts: how many were compared, and of these how many
    are equal. near: verdicts that differ where the score lies within NEAR of the threshold; they are no fault, and not
    among the others.
    """

    logits: float | None = None
    largest_logit: float | None = None
    scores: float | None = None
    pixels: int = 0
    equal_pixels: int = 0
    objects: int = 0
    equal_objects: int = 0
    verdicts: int = 0
    equal_verdicts: int = 0
    near: int = 0

    def __add__(self, other: "Differences") -> "Differences":
        largest: dict[str, Any] = {
            name: largest_of(getattr(self, name), getattr(other, name))
            for name in ("logits", "largest_logit", "scores")
        }
        counts = ("pixels", "equal_pixels", "objects", "equal_objects", "verdicts", "equal_verdicts", "near")
        return replace(self, **largest, **{name: getattr(self, name) + getattr(other, name) for name in counts})


def largest_of(*values: float | None) -> float | None:
    """The largest of those that there are; nan where one of them is, which `max` may pass over."""
    there = [value for value in values if value is not None]
    return float(np.max(there)) if there else None


NEAR = 1e-3
"""A score so close to the threshold may fall on either side of it."""
SMALL = 1e-3
"""A score below it is as good as none: float32 can't tell 1 - 1e-7 and its neighbours apart."""


def compared_verdicts(said: NDArray[Any], wanted: NDArray[Any], apart: NDArray[Any]) -> dict[str, Any]:
    """Counts of verdicts for Differences. said, wanted: (n,), bool. apart: (n,), from each score to the threshold."""
    near = (said != wanted) & (np.abs(apart) <= NEAR)
    return {"verdicts": int((~near).sum()), "equal_verdicts": int((said == wanted).sum()), "near": int(near.sum())}


def compared_logits(found: NDArray[Any], wanted: NDArray[Any]) -> dict[str, Any]:
    """The figures of logits in Differences."""
    return {"logits": float(np.abs(found - wanted).max()), "largest_logit": float(np.abs(wanted).max())}


def relative(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """The largest difference of scores relative to the wanted one; to SMALL where that is smaller."""
    return float((np.abs(found.astype(float) - wanted) / np.maximum(np.abs(wanted), SMALL)).max(initial=0))


class GraphOutput(nn.Module, ABC):
    """What a graph gives for one kind of head.

    names: of the outputs, in the order of `forward`. batched: those whose first axis is that of the images; others are
    flat lists of objects. threshold: that verdicts are by; None where there are none, or they need none.
    """

    names: tuple[str, ...]
    threshold: Threshold | None = None

    @property
    def limit(self) -> float | None:
        """The value of the threshold."""
        return None if self.threshold is None else self.threshold.value

    @property
    def above(self) -> float:
        """The number above which a score of an image is called."""
        return float("nan") if self.threshold is None else self.threshold.above

    @property
    def batched(self) -> tuple[str, ...]:
        """All of them, for a head that finds no objects."""
        return self.names

    @abstractmethod
    def forward(self, features: Features) -> tuple[Tensor, ...]:
        """The outputs. features: of images of one placement, as the head gets them from a cache, float32."""

    @abstractmethod
    def compare(self, found: Mapping[str, NDArray[Any]], predictor: Predictor, levels: Sequence[Levels]) -> Differences:
        """How far a runtime's outputs lie from what the predictor's head says of the same images or tiles.

        found: outputs of the graph by name. levels: raw levels of each image, of the size that the graph takes.
        """


class Banded(nn.Module):
    """A product with a matrix of which each row holds few values that are not 0, in blocks of rows without the rest.

    weights: (wanted, length), along the rows (axis -2) or the columns (axis -1) of maps.
    """

    def __init__(self, weights: Tensor, axis: int) -> None:
        super().__init__()
        self.axis, self.spans = axis, list[tuple[int, int]]()
        for number, block in enumerate(weights.split(ROWS_OF_BLOCK)):
            held = block.ne(0).any(0).nonzero()[:, 0].tolist() or [0]
            self.spans.append((held[0], held[-1] + 1 - held[0]))
            own = block[:, held[0] : held[-1] + 1]
            self.register_buffer(f"block{number}", (own if axis == -2 else own.T).contiguous())

    def forward(self, maps: Tensor) -> Tensor:
        """maps: (…, rows, columns), of the weights' number format."""
        parts = []
        for number, (first, length) in enumerate(self.spans):
            shown, block = maps.narrow(self.axis, first, length), self.get_buffer(f"block{number}")
            parts.append(block @ shown if self.axis == -2 else shown @ block)
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.axis)


class AtOriginal(nn.Module):
    """Maps of cells at every pixel of the original image, as two matrix products.

    shown: a function that does this linearly along each axis, of maps (batch, rows, columns), their stride and a
    placement, as `logits_at_original`.
    """

    def __init__(self, shown: Callable[[Tensor, int, Placement], Tensor], stride: int, placement: Placement) -> None:
        super().__init__()
        self.cells = tuple(-(-content // stride) for content in placement.content)
        products = []
        for axis in (-2, -1):
            original, content, each = placement.original[axis], placement.content[axis], torch.eye(self.cells[axis])
            along = shown(each[:, :, None], stride, Placement((original, 1), (content, 1), (content, 1)))
            products.append(Banded(along[:, :, 0].T, axis))  # (original, cells)
        self.rows, self.columns = products

    def forward(self, maps: Tensor) -> Tensor:
        """(…, original height, original width). maps: (…, rows, columns) of the frame's cells."""
        return self.rows(self.columns(maps[..., : self.cells[0], : self.cells[1]]))


class Graph(nn.Module):
    """Window, logarithm, resizing, padding, normalisation, backbone, the cache's number format, and what follows."""

    content: Tensor | None

    def __init__(self, predictor: Predictor, raw: Raw, output: GraphOutput) -> None:
        super().__init__()
        recipe, placement = predictor.recipe, placement_of(predictor.recipe, raw.size)
        self.unit = Unit(recipe, raw)
        self.frame = Framed(recipe, placement)
        self.backbone, self.output = predictor.backbone, output
        self.dtype, self.size = recipe.dtype, recipe.frame
        whole = placement.content == placement.frame
        self.register_buffer("content", None if whole else torch.tensor([placement.content], dtype=torch.int32))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """images: raw levels, (batch, height, width) or (batch, height, width, 3)."""
        maps = self.backbone(self.frame(self.unit(images))).maps
        stored = {name: rounded(m, self.dtype) for name, m in maps.items()}
        content = None if self.content is None else self.content.expand(images.shape[0], 2)
        return self.output(Features(stored, self.size, content))


class Unit(nn.Module):
    """Raw levels in [0, 1], (batch, channels, height, width), float32; in the numbers of `reading.to_unit`.

    The intensity policy is one for all images. Where it is no plain stretch, each integer level has its place in a
    table of values.
    """

    table: Tensor | None

    def __init__(self, recipe: FeatureRecipe, raw: Raw) -> None:
        super().__init__()
        self.raw, self.log = raw, recipe.policy.log
        fractions = raw.dtype == "float32"
        self.low, self.high = recipe.window or (0.0, 0.0 if fractions else float(np.iinfo(raw.dtype).max))
        self.whole = not fractions and self.low <= 0 and self.high >= np.iinfo(raw.dtype).max  # no level lies outside
        table = None
        if not fractions and (self.log or not self.low < self.high):
            every = np.arange(np.iinfo(raw.dtype).max + 1, dtype=raw.dtype)
            table = torch.from_numpy(to_unit(every, recipe.window, recipe.policy))
        self.register_buffer("table", table)
        self.number = torch.float64 if fractions else torch.float32

    def forward(self, images: Tensor) -> Tensor:
        """images: raw levels."""
        levels = images[:, None] if self.raw.channels == 1 else images.permute(0, 3, 1, 2)
        if self.table is not None:
            return self.table[levels.to(torch.int32)]
        low, high = self.low, self.high
        values = levels.to(self.number)
        if not low < high:
            return (values > low).to(torch.float32)
        if self.log:
            values, low, high = values.clamp(min=low).log(), float(np.log(low)), float(np.log(high))
        stretched = (values - low if low else values) * (1.0 / (high - low))
        return (stretched if self.whole else stretched.clamp(0.0, 1.0)).to(torch.float32)


class Framed(nn.Module):
    """Images in their frame, (batch, 3, frame height, frame width): resized, padded with the mean, grey repeated."""

    mean: Tensor

    def __init__(self, recipe: FeatureRecipe, placement: Placement) -> None:
        super().__init__()
        self.placement = placement
        self.products = _products(placement, recipe.interpolation)
        self.frame = placement.frame
        self.below, self.right = (f - c for f, c in zip(placement.frame, placement.content, strict=True))
        mean = torch.tensor(recipe.mean, dtype=torch.float32).view(1, -1, 1, 1)
        self.register_buffer("mean", mean)

    def forward(self, unit: Tensor) -> Tensor:
        """unit: (batch, 1 or 3, height, width), in [0, 1]."""
        shown = unit
        for product in self.products:  # in float32, which takes half the time and lies within 1e-6 of Pillow
            shown = product(shown)
        shown = (shown.clamp(0.0, 1.0) if len(self.products) else shown).expand(-1, 3, -1, -1)
        if not self.below and not self.right:
            return shown
        padded = nn.functional.pad(shown, (0, self.right, 0, self.below))
        rows = torch.arange(self.frame[0])[:, None] < self.placement.content[0]
        columns = torch.arange(self.frame[1]) < self.placement.content[1]
        return torch.where(rows & columns, padded, self.mean)


def _products(placement: Placement, interpolation: str) -> nn.ModuleList:
    """The products that resize an image, in Pillow's order: it begins with one axis or the other, by version and size.

    Which of them is found by trying.
    """
    (height, width), (rows, columns) = placement.original, placement.content
    weights = {-2: (height, rows), -1: (width, columns)}
    own = {
        axis: Banded(torch.from_numpy(weights_of(length, wanted, interpolation)), axis)
        for axis, (length, wanted) in weights.items()
        if length != wanted
    }
    image = np.random.default_rng(0).random((height, width), dtype=np.float32)
    resized = np.asarray(Image.fromarray(image).resize((columns, rows), RESAMPLING[interpolation]))
    orders = [nn.ModuleList(own[axis] for axis in order if axis in own) for order in ((-1, -2), (-2, -1))]
    return max(orders, key=lambda order: (_as_pillow(order, torch.from_numpy(image)).numpy() == resized).sum()).float()


def _as_pillow(products: nn.ModuleList, maps: Tensor) -> Tensor:
    """(…, rows, columns), float32. Pillow sums in float64 and rounds after each product."""
    for product in products:
        maps = product(maps.to(torch.float64)).to(torch.float32)
    return maps


def rounded(m: Tensor, dtype: str) -> Tensor:
    """A map as it comes back from a cache of this number format, in float32: (batch, channels, rows, columns)."""
    if dtype == "int8":
        return _coded(m)
    return m if dtype == "fp32" else _nearest(m, *FORMAT[dtype])


def _coded(m: Tensor) -> Tensor:
    """What `quantised.decode` gives of the codes of `quantised.quantise`, in operators that graphs have.

    The scale is rounded up to 16 significant bits there by its bits; here by Dekker's product, which rounds to the
    nearest such number, and a step up where that lies below.
    """
    x = _nearest(m, *FORMAT["fp16"])
    low = x.amin((2, 3), keepdim=True)
    scale = (x.amax((2, 3), keepdim=True) - low) / CODES
    nearest = _upper_bits(scale)
    above = _upper_bits(nearest * (1 + 0.75 * 2.0**-15))  # the next of them: 0.75 to 1.5 steps on, rounded
    scale = torch.where(nearest < scale, above, nearest)
    codes = ((x - low) / torch.where(scale > 0, scale, 1.0)).round()
    return _nearest(low + codes * scale, *FORMAT["fp16"])


def _nearest(x: Tensor, bits: int, least: float) -> Tensor:
    """The nearest numbers of so many significant bits, of two as near the even one.

    By sums in float32: OpenVINO computes all in float32 on a CPU and removes what only converts there and back. A sum
    with a power of two (one and a half of it, so that signs don't matter) is rounded at the place where the wanted
    bits end. The power of two below x: Rump, Ogita and Oishi (2008), algorithm 3.5.
    """
    product = x * (2.0**23 + 1)
    power = (product - (product - product * 2.0**-24)).abs().clamp(min=least)  # exporters drop a factor of 1 - 2**-24
    shift = power * (1.5 * 2.0 ** (24 - bits))
    return (x + shift) - shift


def _upper_bits(x: Tensor) -> Tensor:
    """The nearest numbers of 16 significant bits."""
    product = x * SPLIT_16
    return product - (product - x)


def placement_of(recipe: FeatureRecipe, size: Size) -> Placement:
    """Where an image of (height, width), or a tile where the recipe cuts images, lies in its frame."""
    if recipe.tile is None:
        placed = place(size, recipe.size, recipe.fit, 1)
    else:
        placed = place_tile(size, recipe.tile, recipe.size, 1)
    return replace(placed, frame=recipe.frame)


def pieces_of_size(predictor: Predictor, levels: Sequence[Levels]) -> tuple[list[Piece], Size]:
    """Images or tiles of one size as pieces that are images themselves, and that size."""
    size = (levels[0].shape[0], levels[0].shape[1])
    placement = placement_of(predictor.recipe, size)
    return [Piece(i, own, None, placement) for i, own in enumerate(levels)], size


@torch.inference_mode()
def reference(predictor: Predictor, levels: Sequence[Levels]) -> Features:
    """The features that a head gets of images or tiles of one size, as `predict` computes them on this device.

    In float32, which is what `predict` takes on a CPU for all precisions but bf16.
    """
    recipe = predictor.recipe
    placements = [piece.placement for piece in pieces_of_size(predictor, levels)[0]]
    with computing("fp32", predictor.device):
        maps = predictor.backbone(predictor.framing.together(levels, placements)).maps
    stored = {name: m.to(TORCH_DTYPE[recipe.dtype]) for name, m in maps.items()}
    content = torch.tensor([placement.content for placement in placements], dtype=torch.int32, device=predictor.device)
    whole = placements[0].content == recipe.frame
    return Features(as_read(stored, recipe.dtype), recipe.frame, None if whole else content)
