"""Features of a cache's rows from their images and a live backbone: what fine-tuning trains on."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from featprobe.cache import Cache
from featprobe.datasets.images import frame_image, hash_image, read_levels, to_unit
from featprobe.errors import DataError
from featprobe.features import Features
from featprobe.probes import ObjectTarget
from featprobe.processes import own_part
from featprobe.specs import Rows
from featprobe.stages.augment import Augmentation, View, augment
from featprobe.targets import Instance, Labels

if TYPE_CHECKING:
    from featprobe.backbones.backbone import Backbone

AHEAD = 2  # batches that are decoded before they are needed
IMAGES_KEPT = 4  # decoded, for their next tiles
Truth = tuple[Labels | None, Sequence[Instance] | None]


@dataclass(frozen=True)
class Views:
    """A batch of augmented views and their labels.

    labels: (batch, frame height, frame width), uint8. objects: one an image. Each None where the task has none.
    """

    rows: Rows
    labels: Tensor | None
    objects: tuple[ObjectTarget, ...] | None


class LiveFeatures:
    """Batches of features as FeatureLoader gives them, made by a backbone from the images.

    backbone: it may be exchanged between batches; gradients reach it while it is in training mode. truth: labels of a
    row, at its original size, for the augmented views; masks: whether objects are wanted with theirs. augmentation: of
    training batches, None for the images as they are; its randomness follows from the seed, the number of the batch
    and the image's place in it, whichever process makes it, so that a training that goes on sees what it would have
    seen. precision: "bf16" computes the backbone in bfloat16 where autocast holds that to be safe.

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
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        self.cache, self.backbone, self.device, self.truth, self.masks = cache, backbone, device, truth, masks
        self.augmentation, self.seed, self.precision = augmentation, seed, precision
        self.pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="image-reader")
        self._known: set[str] = set()  # images that were found to be the cache's
        fits = augmentation is None or cache.recipe.fit == "resize"  # a crop may have another shape than its image
        self._whole = fits and all(row.placement.content == cache.recipe.frame for row in cache.rows)
        self._levels = lru_cache(maxsize=IMAGES_KEPT if cache.recipe.in_parts else 0)(read_levels)

    def __enter__(self) -> "LiveFeatures":
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def batches(self, orders: Iterable[Rows]) -> Generator[tuple[Rows, Features]]:
        """(rows, their features) for each array of row indices, the images framed as extraction frames them."""
        for rows, views in self._ahead(((rows, 0) for rows in orders), lambda row, number, place: self._framed(row), 0):
            yield rows, self._features(views)

    def training(self, orders: Iterable[Rows], first: int = 0) -> Generator[tuple[Any, Features]]:
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
        self, parts: Iterable[tuple[Rows, int]], work: Callable[[int, int, int], View], first: int
    ) -> Iterator[tuple[Rows, list[View]]]:
        """Batches whose images are made ahead, by threads. parts: rows, and the place of the first in its batch."""
        waiting: deque[tuple[Rows, list[Future[View]]]] = deque()
        try:
            for number, (rows, start) in enumerate(parts, first):
                jobs = [partial(work, row, number, place) for place, row in enumerate(rows.tolist(), start)]
                waiting.append((rows, [self.pool.submit(job) for job in jobs]))
                if len(waiting) > AHEAD:
                    done, futures = waiting.popleft()
                    yield done, [future.result() for future in futures]
            while waiting:
                done, futures = waiting.popleft()
                yield done, [future.result() for future in futures]
        finally:
            for _, futures in waiting:
                for future in futures:
                    future.cancel()

    def _read(self, row: int) -> Any:
        """Raw levels of what a row shows of its image."""
        own = self.cache.rows[row]
        path = Path(self.cache.data.root) / own.image
        if own.image not in self._known:
            if hash_image(path) != own.image_hash:
                raise DataError(
                    f"{path} is not the image that {self.cache.path} was made from.\n"
                    f"Extract again, and probe again, before you compare with it:  {self.cache.contents.command}"
                )
            self._known.add(own.image)
        levels = self._levels(path)
        if isinstance(levels, np.ma.MaskedArray) and not self.cache.recipe.empty_pixels:
            raise DataError(
                f"{path} has pixels that its header calls empty, and {self.cache.path} was made\n"
                "by a featprobe that took them for levels.\n"
                f"Extract again, and probe again, before you compare with it:  {self.cache.contents.command}"
            )
        return own.show(levels)

    def _framed(self, row: int) -> View:
        recipe, placement = self.cache.recipe, self.cache.rows[row].placement
        levels = self._read(row)
        image = frame_image(levels, placement, recipe.window, recipe.interpolation, recipe.mean, recipe.policy)
        return View(torch.from_numpy(image), placement.content, None, None)

    def _augmented(self, row: int, number: int, place: int) -> View:
        assert self.augmentation is not None
        labels, instances = self.truth(row)
        unit = to_unit(self._read(row), self.cache.recipe.window, self.cache.recipe.policy)
        random = np.random.default_rng([self.seed, number, place])
        return augment(unit, labels, instances, self.cache.recipe, self.augmentation, random, masks=self.masks)

    def _features(self, views: Sequence[View]) -> Features:
        """Features of a batch of framed images, on the device."""
        images = torch.stack([view.image for view in views])  # (batch, 3, height, width)
        content = torch.tensor([view.content for view in views], dtype=torch.int32)
        if self.device.type == "cuda":
            images, content = images.pin_memory(), content.pin_memory()
        images = images.to(self.device, non_blocking=True)
        moved = None if self._whole else content.to(self.device, non_blocking=True)
        learns = torch.is_grad_enabled() and self.backbone.training
        with torch.set_grad_enabled(learns), self._autocast():
            features: Features = self.backbone(images, moved)
        if learns:
            return features
        return replace(features, maps={name: m.contiguous() for name, m in features.maps.items()})  # as a cache's are

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")
