"""Semantic segmentation from a feed: labels on cells, the loss of many heads at once, scores at the original size."""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import product
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from featprobe.cache import Cache
from featprobe.cache.reader import device_room
from featprobe.features import Features, cell_shares
from featprobe.geometry import Placement
from featprobe.kinds import TrainRecipe
from featprobe.metrics import confusion_matrix, iou_scores, pixel_scores
from featprobe.metrics.semantic import Absent
from featprobe.probes import (
    DenseHead,
    LinearBank,
    execution,
    image_loss,
    inverse_sqrt_weights,
    level_loss,
    start_at_prior,
)
from featprobe.probes.bank import all_linear, every_logits
from featprobe.probes.pixel_classes import VALUES_AT_ONCE, best_classes, count_pairs, logits_at_original
from featprobe.probes.train import Feed
from featprobe.processes import gathered
from featprobe.report.sheets import Panel
from featprobe.specs import Rows
from featprobe.stages.findings import surest
from featprobe.stages.recording.watch import Handed, Watch
from featprobe.stages.row_images import by_image, images_of
from featprobe.stages.stitch import whole_logits
from featprobe.stages.tasks.labels import encode, shelf_of
from featprobe.stages.tasks.task import (
    Batch,
    Draw,
    Outcome,
    Truth,
    Views,
    evaluation_batches,
    scored_here,
    spread_over,
)
from featprobe.targets import Labels

Counts = NDArray[np.int64]
SENT_AT_ONCE = 64  # masks
DEVICE_MEMORY_SHARE = 0.2  # of a GPU's free memory, for labels of training that are kept there; and as much for masks


class Segmentation:
    """The labels of a cache's rows as dense heads are trained and scored on them.

    train: rows that heads are trained on. views: whether they are trained on augmented views, which bring labels of
    their own. See `task.Task`.
    """

    masks = False
    sides: tuple[float, ...] = ()
    handed: Handed = "probabilities"

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
        self.classes = self.colours = cache.data.classes
        self._stores: dict[tuple[str, int, bytes], _LabelStore] = {}
        self._truths = _DeviceMasks(cache, device)

    def truth_of(self, row: int) -> Truth:
        """The mask of a cache row, before augmentation."""
        return self.cache.semantic(row), None

    def start(self, heads: Sequence[DenseHead], *, fresh: bool = True) -> Callable[[Features, Batch], Tensor]:
        """Set the biases of fresh heads to the class prior; returns their losses on a batch, (heads,).

        A batch is rows, augmented views, or places among the sorted training rows, (batch,), on the device.
        """
        stride = heads[0].stride
        store, weights = self.store(stride), self.weights(stride)
        for head in heads if fresh else ():
            start_at_prior(head, store.pixels, weights)
        # heads with 3x3 convolutions stay apart: these are what costs, and stacked by vmap they took 1.6 times as long
        linear = all_linear(heads) if len(heads) > 1 or execution.whole_batches(self.device) else []
        bank = LinearBank(linear) if linear else None  # on a CPU one head alone is faster without
        at_level, loss_of = self.recipe.loss_at == "level", level_loss if self.recipe.loss_at == "level" else image_loss
        if len(heads) > 1 and not at_level and self.recipe.loss != "ce":  # or many would not fit the memory
            loss_of = partial(checkpoint, image_loss, use_reentrant=False, preserve_rng_state=False)

        def loss(features: Features, batch: Batch) -> Tensor:
            labels = self._labels(store, batch)
            if bank is not None and self.recipe.loss == "ce":
                return (bank.loss if at_level else bank.image_loss)(features, labels, weights)
            every = bank.logits(features) if bank is not None else (head(features) for head in heads)
            return torch.stack([loss_of(logits, labels, weights, self.recipe.loss) for logits in every])

        return loss

    def fixed(self, head: DenseHead) -> bool:
        """Whether the loss of such a head also takes places of rows, and always does the same; see probes.train."""
        return not self.views and self.store(head.stride).resident

    def _labels(self, store: "_LabelStore", batch: Batch) -> Tensor:
        """A batch's labels as the loss wants them, on the device. A tensor: places among the training rows, there."""
        match batch:
            case Tensor():
                return store.on_device(batch)
            case Views():
                assert batch.labels is not None  # which views of this task bring
                return store.encoded(batch.labels.to(self.device, non_blocking=True))
            case rows:
                return store(rows).to(self.device, non_blocking=True)

    def store(self, stride: int) -> "_LabelStore":
        """The training labels on a grid of this stride, read once."""
        return self._store(self.train, self.recipe.loss_at, stride)

    def _store(self, rows: Rows, loss_at: str, stride: int) -> "_LabelStore":
        key = (loss_at, stride, rows.tobytes())
        if key not in self._stores:
            ready = not self.views or rows is not self.train
            self._stores[key] = _LabelStore(self.cache, rows, loss_at, stride, self.device, ready=ready)
        return self._stores[key]

    def weights(self, stride: int) -> Tensor | None:
        """Class weights of the loss, (classes,); None for none."""
        if self.recipe.class_weights == "none":
            return None
        return inverse_sqrt_weights(self.store(stride).pixels).to(self.device)

    def shares(self, rows: Rows, stride: int) -> Callable[[Rows], Tensor]:
        """From some of these rows to the class shares of their cells, read once.

        What it gives: (batch, classes, height / stride, width / stride), float32, on the device.
        """
        store = self._store(rows, "level", stride)
        return lambda batch: store(batch).to(self.device, non_blocking=True)

    def train_counts(self, head: DenseHead) -> dict[str, int]:
        """Labelled pixels of each class in the training rows, at frame size."""
        return dict(zip(self.classes, self.store(head.stride).pixels.long().tolist(), strict=True))

    def predictions(
        self, heads: Sequence[DenseHead], feed: Feed, rows: Rows
    ) -> Iterator[tuple[int, list[NDArray[np.uint8]]]]:
        """(image, each head's class of every pixel of the original image) for each image that the rows show."""
        for image, classes in self._classes(heads, feed, rows):
            yield image, [own.cpu().numpy() for own in classes]

    @torch.inference_mode()
    def _classes(
        self, heads: Sequence[DenseHead], feed: Feed, rows: Rows, watch: Watch | None = None
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """`predictions`, on the device: image by image, of many tiles or of one piece."""
        stride = heads[0].stride

        def logits() -> Iterator[tuple[int, list[Tensor]]]:
            for batch, features in feed(evaluation_batches(rows)):
                every = [head(features) for head in heads]
                for i, row in enumerate(batch.tolist()):
                    yield row, [own[i] for own in every]

        for image, found in by_image(self.cache, logits()):
            pieces = ((own, self.cache.rows.placement(row), self.cache.rows.part_of(row)) for row, own in found)
            classes = []
            for k, own in enumerate(whole_logits(pieces, stride, self.cache.images.placement(image).original)):
                classes.append(best_classes(own))
                _show(watch, k, [image], own[None, None])
            yield image, classes

    def evaluate(self, heads: Sequence[DenseHead], feed: Feed, rows: Rows, watch: Watch | None = None) -> list[Outcome]:
        """Scores of each head on the images that the rows show, which several processes share out among them."""
        here = scored_here(self.cache, rows)
        counted = self._counted_there if execution.whole_batches(self.device) else self._counted
        matrices = counted(heads, feed, here, watch)
        images = images_of(self.cache, rows)
        return [self._outcome(own, images) for own in np.concatenate(gathered([matrices]), axis=1)]

    def _counted(self, heads: Sequence[DenseHead], feed: Feed, rows: Rows, watch: Watch | None = None) -> Counts:
        """Confusion matrices, (heads, images, classes, classes), image by image: what suits a CPU."""
        classes, images = len(self.classes), images_of(self.cache, rows)
        matrices = np.zeros((len(heads), len(images), classes, classes), dtype=np.int64)
        for i, (image, found) in enumerate(self._classes(heads, feed, rows, watch)):
            (truth,) = shelf_of(self.cache).truths(self.cache, np.array([image]))
            for own, predicted in zip(matrices, found, strict=True):
                own[i] = confusion_matrix(truth, predicted.cpu().numpy(), classes)
        return matrices

    def _counted_there(self, heads: Sequence[DenseHead], feed: Feed, rows: Rows, watch: Watch | None = None) -> Counts:
        """The same in few operations on the device, which is waited for once, at the end.

        Masks that were kept there are given up, and none is kept any more, where its memory is too small.
        """
        try:
            return self._counted_whole(heads, feed, rows, watch)
        except torch.cuda.OutOfMemoryError:
            self._truths.give_up()
            raise

    @torch.inference_mode()
    def _counted_whole(self, heads: Sequence[DenseHead], feed: Feed, rows: Rows, watch: Watch | None = None) -> Counts:
        """Images go through together where they are of one size and come whole; tiles are stitched image by image."""
        images, classes = images_of(self.cache, rows), len(self.classes)
        index = torch.arange(classes, device=self.device)
        found = torch.empty((len(images), classes, len(heads), classes), dtype=torch.int64, device=self.device)
        order, done = images.tolist(), 0
        if self.cache.recipe.in_parts:
            for i, (image, every) in enumerate(self._classes(heads, feed, rows, watch)):
                count_pairs(self._truths.sent(np.array([image])), torch.stack(every)[None], index, found[i : i + 1])
        else:
            groups = _of_one_size(self.cache, rows)
            order = [row for group in groups for row in group.tolist()]
            fed = feed([batch for group in groups for batch in evaluation_batches(group)])
            for group in groups:
                masks, start = self._truths.of(group), done
                while done < start + len(group):
                    batch, features = next(fed)
                    stop = done + len(batch)
                    placement = self.cache.rows.placement(int(batch[0]))
                    truth = masks(done - start, stop - start)
                    _count(heads, features, placement, truth, index, found[done:stop], batch.tolist(), watch)
                    done = stop
        place = {image: i for i, image in enumerate(order)}
        return found.permute(2, 0, 1, 3).cpu().numpy()[:, [place[image] for image in images.tolist()]]

    def settle(self, heads: Sequence[DenseHead], feed: Feed, val: Rows) -> list[str]:
        """Nothing: what these heads find needs no threshold here."""
        return []

    def panels(self, head: DenseHead, feed: Feed, rows: Rows) -> Iterable[tuple[int, Draw]]:
        """(image, what draws truth and prediction over it) for each image that the rows show."""
        for image, (predicted,) in self.predictions([head], feed, rows):
            yield image, partial(_panels, self.cache.image_semantic(image), predicted)

    def shown(self, head: DenseHead, feed: Feed, rows: Rows, count: int) -> Rows:
        """Some of the images that the rows show, from those with most to see to those with least."""
        return spread_over(images_of(self.cache, rows), self._fullness, count)

    def _fullness(self, image: int) -> int:
        """How much there is to see in an image: labelled foreground pixels."""
        labels = self.cache.image_semantic(image)
        return int(((labels > 0) & (labels < len(self.classes))).sum())

    def _outcome(self, confusions: NDArray[np.int64], images: Rows) -> Outcome:
        whole = confusions.sum(0)
        iou = dict(zip(self.classes, iou_scores(whole, self.absent).per_class, strict=True))
        means = pixel_scores(whole, self.absent)
        stream = io.BytesIO()
        texts = self.cache.images.texts
        ids, groups = (np.array([texts[name][image] for image in images.tolist()]) for name in ("id", "group"))
        np.savez_compressed(stream, confusion=confusions, ids=ids, groups=groups)
        return Outcome(means | {"iou": iou}, means, {"scores.npz": stream.getvalue()})


class _LabelStore:
    """Labels of some rows as the loss wants them, kept ready where they fit: on the device that trains, or beside it.

    loss_at "level": shares of each class per cell, float32 (batch, classes, rows, columns).
    loss_at "image": frame labels, uint8 (batch, height, width).
    """

    def __init__(
        self, cache: Cache, rows: Rows, loss_at: str, stride: int, device: torch.device, *, ready: bool
    ) -> None:
        self.cache, self.rows, self.loss_at, self.stride = cache, np.unique(rows), loss_at, stride
        self.device = device
        found = shelf_of(cache).encoded(cache, self.rows, loss_at, stride, keep=ready)
        self.pixels = found.pixels.double()
        self.kept, room = found.labels, device_room(device)
        if self.kept is not None and room is not None and self.kept.nbytes < DEVICE_MEMORY_SHARE * room:
            self.kept = self.kept.to(device)

    def __call__(self, rows: Rows) -> Tensor:
        if self.kept is None:
            return self._decoded(encode(self.cache, rows, self.loss_at, self.stride))
        index = torch.from_numpy(np.searchsorted(self.rows, rows).astype(np.int64))
        return self.on_device(index.to(self.kept.device, non_blocking=True))

    @property
    def resident(self) -> bool:
        """Whether all labels lie on the device that trains, as `on_device` wants them."""
        return self.kept is not None and self.kept.device.type == self.device.type

    def on_device(self, index: Tensor) -> Tensor:
        """Labels at places among the ascending rows: (batch,), int64, where they lie. Pure work of that device."""
        assert self.kept is not None  # as `resident` says
        return self._decoded(self.kept.index_select(0, index))

    def encoded(self, labels: Tensor) -> Tensor:
        """Labels of views, uint8 (batch, height, width), as the loss wants them."""
        if self.loss_at == "image":
            return labels
        return cell_shares(labels, len(self.cache.data.classes), self.stride)

    def _decoded(self, labels: Tensor) -> Tensor:
        return labels.float() / self.stride**2 if self.loss_at == "level" else labels


class _DeviceMasks:
    """Masks of whole images on the device that scores heads, each sent there once where they fit."""

    def __init__(self, cache: Cache, device: torch.device) -> None:
        self.cache, self.device = cache, device
        self.kept: dict[bytes, Tensor] = {}  # by the images
        self.left: float | None = None  # bytes, for more of them; None until the first are asked for

    def of(self, images: Rows) -> Callable[[int, int], Tensor]:
        """From a start and a stop to the masks of some of these images, which are of one size.

        These are (images, height, width), uint8.
        """
        size, key = self.cache.images.placement(int(images[0])).original, images.tobytes()
        if self.left is None:
            self.left = DEVICE_MEMORY_SHARE * (device_room(self.device) or 0)
        if key not in self.kept:
            if len(images) * prod(size) > self.left:
                return lambda start, stop: self.sent(images[start:stop])
            whole = torch.empty((len(images), *size), dtype=torch.uint8, device=self.device)
            for start in range(0, len(images), SENT_AT_ONCE):
                whole[start : start + SENT_AT_ONCE] = self.sent(images[start : start + SENT_AT_ONCE])
            self.kept[key] = whole
            self.left -= whole.nbytes
        return lambda start, stop: self.kept[key][start:stop]

    def sent(self, images: Rows) -> Tensor:
        """The masks of images of one size, on their way to the device: (images, height, width), uint8."""
        masks = torch.from_numpy(np.stack(shelf_of(self.cache).truths(self.cache, images)))
        return (masks.pin_memory() if self.device.type == "cuda" else masks).to(self.device, non_blocking=True)

    def give_up(self) -> None:
        """Keep none any more."""
        self.kept.clear()
        self.left = 0


def _panels(truth: Labels, predicted: Labels, pixels: NDArray[np.float32]) -> list[Panel]:
    return [Panel(pixels, truth), Panel(pixels, predicted)]


def _of_one_size(cache: Cache, rows: Rows) -> list[Rows]:
    """The rows in groups of one placement, each in order."""
    groups: dict[Placement, list[int]] = {}
    for row in rows.tolist():
        groups.setdefault(cache.rows.placement(row), []).append(row)
    return [np.array(group, dtype=np.intp) for group in groups.values()]


def _count(
    heads: Sequence[DenseHead],
    features: Features,
    placement: Placement,
    truth: Tensor,
    index: Tensor,
    out: Tensor,
    rows: Sequence[int],
    watch: Watch | None,
) -> None:
    """Fill in the confusion matrices of images of one placement; truth, index, out: as for `count_pairs`.

    rows: of these images, which come whole. watch: see `task.Task.evaluate`.
    """
    logits = every_logits(heads, features.cut(placement.content))
    images, classes = len(truth), len(index)
    size = prod(placement.original) * classes  # values of one image and head
    at_once = max(1, min(images, VALUES_AT_ONCE // size))
    beside = max(1, min(len(heads), VALUES_AT_ONCE // (size * at_once)))
    for i, k in product(range(0, images, at_once), range(0, len(heads), beside)):
        own = slice(i, i + at_once), slice(k, k + beside)
        found = logits_at_original(logits[own], heads[0].stride, placement)  # (images, heads, classes, height, width)
        count_pairs(truth[own[0]], found.argmax(2), index, out[own[0], :, own[1]])
        _show(watch, k, rows[own[0]], found)


def _show(watch: Watch | None, first: int, images: Sequence[int], logits: Tensor) -> None:
    """Let a watch see what heads, from a first one on, say of images of one size.

    logits: (images, heads, classes, height, width), at the originals' pixels.
    """
    if watch is None:
        return
    shown = [[found.cpu().numpy() for found in surest(own.transpose(0, 1))] for own in logits.unbind(1)]
    for i, image in enumerate(images):
        for head, (values, classes) in enumerate(shown, start=first):
            watch.pixels(head, image, values[i], classes[i])
