"""Semantic segmentation from a feed: labels on cells, the loss of many heads at once, scores at the original size."""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from featprobe.cache import Cache
from featprobe.features import Features, cell_shares
from featprobe.machine import available_memory
from featprobe.metrics import confusion_matrix, iou_scores
from featprobe.metrics.semantic import Absent
from featprobe.probes import (
    LinearBank,
    LinearHead,
    TrainRecipe,
    image_loss,
    inverse_sqrt_weights,
    level_loss,
    start_at_prior,
)
from featprobe.probes.train import Feed
from featprobe.processes import count, gathered
from featprobe.report.sheets import Panel
from featprobe.specs import Rows
from featprobe.stages.live import Truth, Views
from featprobe.stages.outcome import Batch, Outcome, evaluation_batches, scored_here
from featprobe.stages.rows import by_image, images_of
from featprobe.stages.stitch import stitched_classes
from featprobe.targets import labels_in_frame

LABEL_MEMORY_SHARE = 0.3  # of the available memory, for labels kept ready


class Segmentation:
    """The labels of a cache's rows as dense heads are trained and scored on them.

    train: rows that heads are trained on. views: whether they are trained on augmented views, which bring labels of
    their own. chooses_by: the validation score that trials and weights are chosen by.
    """

    chooses_by = "miou_foreground"
    masks = False

    def __init__(
        self,
        cache: Cache,
        train: Rows,
        recipe: TrainRecipe,
        device: torch.device,
        absent: Absent,
        *,
        views: bool = False,
    ) -> None:
        self.cache, self.train, self.recipe, self.device, self.absent = cache, train, recipe, device, absent
        self.views = views
        self.classes = cache.data.classes
        self._stores: dict[int, _LabelStore] = {}

    def truth_of(self, row: int) -> Truth:
        """What augmented views of a row are labelled from."""
        return self.cache.semantic(row), None

    def start(self, heads: Sequence[nn.Module], *, fresh: bool = True) -> Callable[[Features, Batch], Tensor]:
        """Set the biases of fresh heads to the class prior; returns their losses on a batch, (heads,).

        A batch is rows, augmented views, or places among the sorted training rows, (batch,), on the device.
        """
        stride = _stride(heads[0])
        store, weights = self.store(stride), self.weights(stride)
        for head in heads if fresh else ():
            start_at_prior(head, store.pixels, weights)
        # heads with 3x3 convolutions stay apart: these are what costs, and stacked by vmap they took 1.6 times as long
        bank = LinearBank([h for h in heads if isinstance(h, LinearHead)]) if _banked(heads) else None
        at_level, loss_of = self.recipe.loss_at == "level", level_loss if self.recipe.loss_at == "level" else image_loss
        if len(heads) > 1 and not at_level:  # one head's pixels at a time, or many would not fit the memory
            loss_of = partial(checkpoint, image_loss, use_reentrant=False, preserve_rng_state=False)

        def loss(features: Features, batch: Batch | Tensor) -> Tensor:
            if isinstance(batch, Tensor):
                labels = store.on_device(batch)
            else:
                labels = store.encoded(batch.labels) if isinstance(batch, Views) else store(batch)  # type: ignore[arg-type]
                labels = labels.to(self.device, non_blocking=True)
            if bank is not None and self.recipe.loss == "ce":
                return (bank.loss if at_level else bank.image_loss)(features, labels, weights)
            every = bank.logits(features) if bank is not None else (head(features) for head in heads)
            return torch.stack([loss_of(logits, labels, weights, self.recipe.loss) for logits in every])

        return loss

    def store(self, stride: int) -> "_LabelStore":
        """The training labels on a grid of this stride, read once."""
        if stride not in self._stores:
            self._stores[stride] = _LabelStore(
                self.cache, self.train, len(self.classes), self.recipe.loss_at, stride, ready=not self.views
            )
        return self._stores[stride]

    def weights(self, stride: int) -> Tensor | None:
        """Class weights of the loss, (classes,); None for none."""
        if self.recipe.class_weights == "none":
            return None
        return inverse_sqrt_weights(self.store(stride).pixels).to(self.device)

    def shares(self, rows: Rows, stride: int) -> Tensor:
        """Class shares of the cells of any rows: (rows, classes, height / stride, width / stride), float32."""
        labels = [labels_in_frame(self.cache.semantic(r), self.cache.rows[r].placement) for r in rows.tolist()]
        return cell_shares(torch.from_numpy(np.stack(labels)), len(self.classes), stride).to(self.device)

    def train_counts(self, stride: int) -> dict[str, int]:
        """Labelled pixels of each class in the training rows, at frame size."""
        return dict(zip(self.classes, self.store(stride).pixels.long().tolist(), strict=True))

    @torch.inference_mode()
    def predictions(
        self, heads: Sequence[nn.Module], feed: Feed, rows: Rows
    ) -> Iterator[tuple[int, list[NDArray[np.uint8]]]]:
        """(image, each head's class of every pixel of the original image) for each image that the rows show."""
        stride = _stride(heads[0])

        def logits() -> Iterator[tuple[int, list[Tensor]]]:
            for batch, features in feed(evaluation_batches(rows)):
                every = [head(features) for head in heads]
                for i, row in enumerate(batch.tolist()):
                    yield row, [own[i] for own in every]

        for image, found in by_image(self.cache, logits()):
            pieces = ((own, self.cache.rows[row].placement, self.cache.rows[row].part) for row, own in found)
            classes = stitched_classes(pieces, stride, self.cache.images[image].placement.original)
            yield image, [own.cpu().numpy() for own in classes]

    def evaluate(self, heads: Sequence[nn.Module], feed: Feed, rows: Rows) -> list[Outcome]:
        """Scores of each head on the images that the rows show, which several processes share out among them."""
        classes, here = len(self.classes), scored_here(self.cache, rows)
        matrices = np.zeros((len(heads), len(images_of(self.cache, here)), classes, classes), dtype=np.int64)
        for i, (image, found) in enumerate(self.predictions(heads, feed, here)):
            truth = self.cache.image_semantic(image)
            for own, predicted in zip(matrices, found, strict=True):
                own[i] = confusion_matrix(truth, predicted, classes)
        images = images_of(self.cache, rows)
        return [self._outcome(own, images) for own in np.concatenate(gathered([matrices]), axis=1)]

    def panels(self, head: nn.Module, feed: Feed, rows: Rows) -> Iterable[tuple[int, Callable[..., list[Panel]]]]:
        """(image, what draws truth and prediction over it) for each image that the rows show."""
        for image, (predicted,) in self.predictions([head], feed, rows):
            truth = self.cache.image_semantic(image)
            yield image, lambda pixels, t=truth, p=predicted: [Panel(pixels, t), Panel(pixels, p)]

    def fullness(self, image: int) -> int:
        """How much there is to see in an image: labelled foreground pixels."""
        labels = self.cache.image_semantic(image)
        return int(((labels > 0) & (labels < len(self.classes))).sum())

    def _outcome(self, confusions: NDArray[np.int64], images: Rows) -> Outcome:
        scores = iou_scores(confusions.sum(0), self.absent)
        iou = dict(zip(self.classes, scores.per_class, strict=True))
        means: dict[str, Any] = {"miou": scores.miou, "miou_foreground": scores.miou_foreground}
        stream = io.BytesIO()
        own = [self.cache.images[image] for image in images.tolist()]
        np.savez_compressed(
            stream, confusion=confusions, ids=np.array([r.id for r in own]), groups=np.array([r.group for r in own])
        )
        return Outcome(means | {"iou": iou}, means, {"scores.npz": stream.getvalue()})


class _LabelStore:
    """Training labels as the loss wants them, kept ready in memory where they fit.

    loss_at "level": shares of each class per cell, float32 (batch, classes, rows, columns).
    loss_at "image": frame labels, uint8 (batch, height, width).
    """

    def __init__(self, cache: Cache, rows: Rows, classes: int, loss_at: str, stride: int, *, ready: bool) -> None:
        self.cache, self.classes, self.loss_at, self.stride = cache, classes, loss_at, stride
        self.pixels = torch.zeros(classes, dtype=torch.float64)
        frame = cache.recipe.frame
        per_row = frame[0] * frame[1] * (2 * classes / stride**2 if loss_at == "level" else 1)
        keep = ready and per_row * len(rows) < LABEL_MEMORY_SHARE * available_memory() / count()
        self.kept: dict[int, Tensor] = {}
        for row in rows.tolist():
            labels = self._labels(row)
            self.pixels += torch.bincount(labels.flatten().long(), minlength=256)[:classes]
            if keep:
                self.kept[row] = self._encode(labels)

    def __call__(self, rows: Rows) -> Tensor:
        encoded = [self.kept[r] if r in self.kept else self._encode(self._labels(r)) for r in rows.tolist()]
        stacked = torch.stack(encoded)
        return stacked.float() / self.stride**2 if self.loss_at == "level" else stacked

    def encoded(self, labels: Tensor) -> Tensor:
        """Labels of views, uint8 (batch, height, width), as the loss wants them."""
        return cell_shares(labels, self.classes, self.stride) if self.loss_at == "level" else labels

    def _labels(self, row: int) -> Tensor:
        labels = labels_in_frame(self.cache.semantic(row), self.cache.rows[row].placement)
        return torch.from_numpy(labels)

    def _encode(self, labels: Tensor) -> Tensor:
        if self.loss_at == "image":
            return labels
        counts = cell_shares(labels[None], self.classes, self.stride)[0] * self.stride**2
        return counts.round().to(torch.int16)  # pixels of each class in a cell, at most stride²


def _banked(heads: Sequence[nn.Module]) -> bool:
    return len(heads) > 1 and all(isinstance(head, LinearHead) for head in heads)


def _stride(head: nn.Module) -> int:
    stride = head.stride
    assert isinstance(stride, int)  # every dense head states it
    return stride
