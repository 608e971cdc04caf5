"""Features of a cache's rows from their images and a live backbone: what fine-tuning trains on."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featprobe.backbones.precision import computing, float32_as
from featprobe.cache import Cache
from featprobe.datasets.images.framing import ImageKind, Layout
from featprobe.datasets.images.pixels import Levels
from featprobe.datasets.images.reading import frame_image, hash_image, image_window, read_levels, unit_of
from featprobe.errors import DataError
from featprobe.features import Features
from featprobe.geometry import Placement, Size
from featprobe.probes import ObjectTarget, execution
from featprobe.processes import own_part
from featprobe.specs import Precision, Rows
from featprobe.stages.extraction.crops import Augmentation
from featprobe.stages.extraction.frames import Framing, ImageBuffer
from featprobe.stages.tasks.task import Truth, Views
from featprobe.stages.training.augment import (
    FramedImage,
    ViewPlan,
    augment,
    draw_image,
    draw_labels,
    draw_objects,
    padding_of,
    plan_view,
)

if TYPE_CHECKING:
    from featprobe.backbones.backbone import Backbone

AHEAD = 2  # batches that are decoded before they are needed
TORCH_OF = {"uint8": torch.uint8, "int32": torch.int32}
IMAGES_KEPT = 4  # decoded, for their next tiles
HALF = {"bf16": torch.bfloat16, "amp": torch.float16}  # number format of the maps, by precision


@dataclass(frozen=True)
class Raw:
    """An image on its way to a device that draws views itself: its levels, page-locked, and what is shown of them.

    plan: None for all of it, framed as extraction frames it; buffer: else of the crop alone. labels: of the crop.
    """

    buffer: ImageBuffer
    content: Size
    plan: ViewPlan | None = None
    labels: Tensor | None = None
    objects: ObjectTarget | None = None


class _RowImages:
    """The parts of their images that the rows of a cache show; the images are compared with those it was made from."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.known: set[str] = set()  # images that were found to be the cache's
        self.read = lru_cache(maxsize=IMAGES_KEPT if cache.recipe.in_parts else 0)(read_levels)

    def levels(self, row: int) -> Levels:
        """Raw levels of what a row shows; raises DataError for another image than the cache's."""
        own = self.cache.rows[row]
        path = Path(self.cache.data.root) / own.image
        if own.image not in self.known:
            if hash_image(path) != own.image_hash:
                raise DataError(
                    f"{path} is not the image that {self.cache.path} was made from.\n"
                    f"Extract again, and probe again, before you compare with it:  {self.cache.contents.command}"
                )
            self.known.add(own.image)
        levels = self.read(path)
        if np.ma.isMaskedArray(levels) and not self.cache.recipe.empty_pixels:
            raise DataError(
                f"{path} has pixels that its header calls empty, and {self.cache.path} was made\n"
                "by a featprobe that took them for levels.\n"
                f"Extract again, and probe again, before you compare with it:  {self.cache.contents.command}"
            )
        return own.show(levels)


class LiveFeatures:
    """Batches of features as FeatureLoader gives them, made by a backbone from the images.

    backbone: it may be exchanged between batches; gradients reach it while it is in training mode. truth: labels of a
    row, at its original size, for the augmented views; masks: whether objects are wanted with theirs. augmentation: of
    training batches, None for the images as they are; its randomness follows from the seed, the number of the batch
    and the image's place in it, whichever process makes it, so that a training that goes on sees what it would have
    seen. precision: of the backbone, and of the float32 that the head computes in for as long as this is open; "bf16"
    gives its maps in bfloat16 on a GPU.

    Threads read images ahead. On a GPU they leave raw levels in page-locked memory, cut to what will be seen, and the
    device turns these into views: the same function as on the CPU, to rounding. What needs labels, the choice of a
    crop and what is left of each object, stays on the host.

    Raises DataError for an image that is not there any more, or not the one that the cache was made from.
    """

    def __init__(
        self,
        cache: Cache,
        backbone: "Backbone",
        device: torch.device,
        truth: Callable[[int], Truth],
        *,
        masks: bool = False,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        workers: int = 2,
        precision: Precision = "fp32",
    ) -> None:
        self.cache, self.backbone, self.device, self.truth, self.masks = cache, backbone, device, truth, masks
        self.augmentation, self.seed, self.precision = augmentation, seed, precision
        self.pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="image-reader")
        fits = augmentation is None or cache.recipe.fit == "resize"  # a crop may have another shape than its image
        self._whole = fits and bool((cache.rows.content == cache.recipe.frame).all())
        there = execution.whole_batches(device) and device.type != "mps"  # which has no float64
        self.framing = Framing(cache.recipe, device) if there else None
        self._padding = padding_of(cache.recipe, device)
        self._float32 = ExitStack()
        self._images = _RowImages(cache)

    def __enter__(self) -> "LiveFeatures":
        self._float32.enter_context(float32_as(self.precision, self.device))  # the way back too
        return self

    def __exit__(self, *_: object) -> None:
        self._float32.close()
        self.pool.shutdown(cancel_futures=True)

    def batches(self, orders: Iterable[Rows]) -> Generator[tuple[Rows, Features]]:
        """(rows, their features) for each array of row indices, the images framed as extraction frames them."""
        for rows, views in self._ahead(((rows, 0) for rows in orders), lambda row, number, place: self._framed(row), 0):
            yield rows, self._features(views)

    def keep_on_device(self, splits: Mapping[str, Rows]) -> str:
        """Nothing is kept: the backbone, or what an image shows, may change."""
        return ""

    def resident(self, rows: Rows) -> None:
        """No features lie on the device."""

    def training(self, orders: Iterable[Rows], first: int = 0) -> Generator[tuple[Rows | Views, Features]]:
        """(rows, or augmented views of them with their labels; features). first: number of the first batch.

        Of several processes each gets its part of every batch.
        """
        cut = ((rows, own_part(len(rows))) for rows in orders)
        parts = ((rows[own], own.start) for rows, own in cut)
        if self.augmentation is None:
            yield from self.batches(rows for rows, _ in parts)
            return
        for rows, views in self._ahead(parts, self._augmented, first):
            labels = [view.labels for view in views if view.labels is not None]
            objects = tuple(view.objects for view in views if view.objects is not None)
            yield Views(rows, torch.stack(labels) if labels else None, objects or None), self._features(views)

    def _ahead(
        self, parts: Iterable[tuple[Rows, int]], work: Callable[[int, int, int], FramedImage | Raw], first: int
    ) -> Iterator[tuple[Rows, list[FramedImage]]]:
        """Batches whose images are made ahead, by threads. parts: rows, and the place of the first in its batch."""
        waiting: deque[tuple[Rows, list[Future[FramedImage | Raw]]]] = deque()
        try:
            for number, (rows, start) in enumerate(parts, first):
                jobs = [partial(work, row, number, place) for place, row in enumerate(rows.tolist(), start)]
                waiting.append((rows, [self.pool.submit(job) for job in jobs]))
                if len(waiting) > AHEAD:
                    done, futures = waiting.popleft()
                    yield done, [self._drawn(future.result()) for future in futures]
            while waiting:
                done, futures = waiting.popleft()
                yield done, [self._drawn(future.result()) for future in futures]
        finally:
            for _, futures in waiting:
                for future in futures:
                    future.cancel()

    def _framed(self, row: int) -> FramedImage | Raw:
        placement = self.cache.rows.placement(row)
        levels = self._images.levels(row)
        if self.framing is not None:
            buffer = self._buffer(self.framing.layout([ImageKind.of(levels, placement)]), placement.frame)
            self.framing.put(buffer, 0, levels, placement)
            return Raw(buffer, placement.content)
        image = frame_image(levels, placement, self.cache.recipe)
        return FramedImage(torch.from_numpy(image), placement.content, None, None)

    def _augmented(self, row: int, number: int, place: int) -> FramedImage | Raw:
        assert self.augmentation is not None
        recipe, (labels, instances), levels = self.cache.recipe, self.truth(row), self._images.levels(row)
        random = np.random.default_rng([self.seed, number, place])
        if self.framing is None:
            unit = unit_of(levels, recipe)
            return augment(unit, labels, instances, recipe, self.augmentation, random, masks=self.masks)
        size = levels.shape[:2]
        plan = plan_view(size, labels, instances, recipe, self.augmentation, random)
        seen = None if labels is None else self._sent(plan.cut(labels))
        objects = None if instances is None else draw_objects(instances, size, plan, masks=self.masks)
        return Raw(self._crop_of(levels, plan), plan.placement.content, plan, seen, objects)

    def _crop_of(self, levels: Levels, plan: ViewPlan) -> ImageBuffer:
        """The crop of an image in page-locked memory: its raw levels where the device can stretch them."""
        recipe, crop = self.cache.recipe, plan.cut(levels)
        whole = Placement(crop.shape[:2], crop.shape[:2], crop.shape[:2])
        layout = self._framer.layout([ImageKind.of(crop, whole)])
        buffer = self._buffer(layout, whole.frame)
        if layout.raw:
            window = image_window(levels, recipe.policy) if recipe.policy.image else None
            self._framer.put(buffer, 0, crop, whole, window)
        else:
            unit = plan.cut(unit_of(levels, recipe))
            buffer.levels[0] = unit if unit.ndim == 2 else unit.transpose(2, 0, 1)
        return buffer

    def _buffer(self, layout: Layout, size: Size) -> ImageBuffer:
        """Memory for an image; torch keeps page-locked memory that was given back, and hands it out again."""
        buffer = ImageBuffer(1, layout.image_bytes(size), self.device)
        buffer.begin(1, layout, size)
        return buffer

    def _sent(self, values: NDArray[Any]) -> Tensor:
        """Labels, or sizes, from where the device can fetch them without a stop."""
        place = torch.empty(values.shape, dtype=TORCH_OF[values.dtype.name], pin_memory=self.device.type == "cuda")
        place.numpy()[:] = values
        return place

    def _drawn(self, image: FramedImage | Raw) -> FramedImage:
        """A view on the device of what a thread has left there; nothing here waits for the device."""
        match image:
            case FramedImage():
                return image
            case Raw():
                buffer, plan = image.buffer, image.plan
        if plan is None:
            return FramedImage(self._framer.images(buffer)[0], image.content, None, None)
        crop = self._framer.unit(buffer)[0][0]
        shown = draw_image(crop, plan, self.cache.recipe.interpolation, self._padding)
        labels = None if image.labels is None else image.labels.to(self.device, non_blocking=True)
        seen = None if labels is None else draw_labels(labels, plan)
        return FramedImage(shown, image.content, seen, image.objects)

    @property
    def _framer(self) -> Framing:
        """The framing that draws views on the device; only a device that does so gets raw images."""
        assert self.framing is not None
        return self.framing

    def _features(self, views: Sequence[FramedImage]) -> Features:
        """Features of a batch of framed images, on the device."""
        images = torch.stack([view.image for view in views]).to(self.device)  # (batch, 3, height, width)
        content = None
        if not self._whole:
            content = self._sent(np.array([view.content for view in views], dtype=np.int32))
            content = content.to(self.device, non_blocking=True)
        learns = torch.is_grad_enabled() and self.backbone.training
        with torch.set_grad_enabled(learns), computing(self.precision, self.device):
            features: Features = self.backbone(images, content)
        maps = features.maps
        half = HALF.get(self.precision)
        if half is not None and self.framing is not None:  # what heads then compute in
            maps = {name: m.to(half) for name, m in maps.items()}
        if not learns:
            maps = {name: m.contiguous() for name, m in maps.items()}  # as a cache's are
        return replace(features, maps=maps)
