"""Detection and instance segmentation from a feed: targets in the frame, COCO's scores at the original size."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featprobe.cache import Cache
from featprobe.cache.reader import device_room
from featprobe.errors import ShapeError
from featprobe.features import Features
from featprobe.geometry import Placement
from featprobe.machine import available_memory
from featprobe.metrics import ApScores, TruthImage, average_precision, truth_of
from featprobe.probes import ObjectHead, ObjectTarget, object_sides, objects_at_original
from featprobe.probes.detections import ObjectBatch, on_host, packed
from featprobe.probes.head import BatchedObjectHead, all_batched
from featprobe.probes.train import Feed
from featprobe.processes import count, from_main, gathered
from featprobe.report.sheets import Panel
from featprobe.specs import Rows
from featprobe.stages.recording.watch import Handed, Watch
from featprobe.stages.row_images import by_image, images_of
from featprobe.stages.stitch import Objects, stitched_objects
from featprobe.stages.tasks.labels import shelf_of
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
from featprobe.targets import Instance, Labels, Rle, components, decode_window

SHOWN_FROM = 0.3  # least score of a detection in a picture
MASK_MEMORY_SHARE = 0.2  # of the memory where the head trains, for masks kept ready


class Detection:
    """The objects of a cache's rows as detection and instance heads are trained and scored on them.

    masks: whether masks are trained and scored too. source: "own" for the set's objects, "components" for connected
    components of its masks. See `task.Task`.
    """

    handed: Handed = "objects"

    def __init__(
        self, cache: Cache, train: Rows, device: torch.device, *, masks: bool, source: Literal["own", "components"]
    ) -> None:
        self.cache, self.device, self.masks, self.source = cache, device, masks, source
        self.classes = self.colours = cache.data.classes
        own_ids = cache.data.category_ids if source == "own" else ()
        self.category_ids = own_ids or tuple(range(1, len(self.classes)))
        self._instances = shelf_of(cache).objects.setdefault(source, {})
        self.targets = {row: target_of(self.instances(row), cache.rows.placement(row)) for row in train.tolist()}

    @property
    def sides(self) -> tuple[float, ...]:
        """Percentiles of the training objects' sides, see probes.detections.object_sides."""
        return object_sides(torch.cat([target.boxes for target in self.targets.values()]))

    def train_counts(self, head: ObjectHead) -> dict[str, int]:
        """Training objects of each class but the background, crowds not counted."""
        labels = torch.cat([target.labels for target in self.targets.values()])
        counts = torch.bincount(labels, minlength=len(self.classes)).tolist()
        return dict(list(zip(self.classes, counts, strict=True))[1:])

    def instances(self, row: int) -> tuple[Instance, ...]:
        """A row's objects, in pixels of what it shows; the background is none."""
        if row not in self._instances:
            self._instances[row] = self._objects(row, self.cache.semantic, self.cache.instances)
        return self._instances[row]

    def image_instances(self, image: int) -> tuple[Instance, ...]:
        """A whole image's objects, in its pixels; the background is none."""
        if not self.cache.recipe.in_parts:
            return self.instances(image)
        return self._objects(image, self.cache.image_semantic, self.cache.image_instances)

    def _objects(
        self, index: int, semantic: Callable[[int], Labels], own: Callable[[int], tuple[Instance, ...]]
    ) -> tuple[Instance, ...]:
        found = components(semantic(index), len(self.classes)) if self.source == "components" else own(index)
        return tuple(instance for instance in found if instance.category > 0)

    def truth_of(self, row: int) -> Truth:
        """The objects of a cache row, before augmentation."""
        return None, self.instances(row)

    def fixed(self, head: ObjectHead) -> bool:
        """Whether the loss of such a head also takes places of rows, and always does the same; see probes.train."""
        return bool(self._batched([head]))

    def _batched(self, heads: Sequence[ObjectHead]) -> list[BatchedObjectHead]:
        """The heads, where they take the objects of all images at once; else none of them."""
        return [] if self.masks and not self._masks_fit else all_batched(heads, self.device)

    def start(self, heads: Sequence[ObjectHead], *, fresh: bool = True) -> Callable[[Features, Batch], Tensor]:
        """The heads' losses on a batch, (heads,), one head after the other."""
        batched = self._batched(heads)
        return self._batch_losses(batched) if batched else self._losses(heads)

    def _batch_losses(self, heads: Sequence[BatchedObjectHead]) -> Callable[[Features, Batch], Tensor]:
        """Losses of heads that take the objects of all images at once."""
        rows = np.array(sorted(self.targets), dtype=np.intp)

        def wanted(batch: Batch) -> ObjectBatch:
            match batch:
                case Tensor():
                    places = batch.to(self.device, non_blocking=True)
                case Views():
                    return ObjectBatch.of(batch.objects or ()).to(self.device)
                case own:
                    places = torch.from_numpy(np.searchsorted(rows, own)).to(self.device, non_blocking=True)
            return self._all_targets.at(places)

        def loss(features: Features, batch: Batch) -> Tensor:
            targets = wanted(batch)
            return torch.stack([head.batch_loss(features, targets) for head in heads])

        return loss

    def _losses(self, heads: Sequence[ObjectHead]) -> Callable[[Features, Batch], Tensor]:
        """Losses of heads that take the objects of each image by themselves, and sample at random."""
        every = {row: target.to(self.device) for row, target in self.targets.items()}

        def wanted(batch: Batch) -> list[ObjectTarget]:
            match batch:
                case Tensor():
                    raise TypeError("The loss of these heads takes rows, not their places: see `fixed`.")
                case Views():
                    return [target.to(self.device) for target in batch.objects or ()]
                case rows:
                    targets = [every[row] for row in rows.tolist()]
            if not self.masks:
                return targets
            places = [(row, self.instances(row), self.cache.rows.placement(row)) for row in rows.tolist()]
            masks = [self._masks.of(row, partial(framed_masks, own, place)) for row, own, place in places]
            return [replace(t, masks=m) for t, m in zip(targets, masks, strict=True)]

        def loss(features: Features, batch: Batch) -> Tensor:
            targets, others = wanted(batch), []
            for head in heads[:-1]:  # all draw the same samples, whichever heads they are trained beside
                with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                    others.append(head(features, targets))
            return torch.stack([*others, heads[-1](features, targets)])

        return loss

    @torch.inference_mode()
    def predictions(self, heads: Sequence[ObjectHead], feed: Feed, rows: Rows) -> Iterable[tuple[int, list[Objects]]]:
        """(image, what each head finds in it) for each image that the rows show, in pixels of the original image."""

        def objects() -> Iterator[tuple[int, list[Objects]]]:
            for batch, features in feed(evaluation_batches(rows)):
                every = on_host([own for head in heads for own in head(features)])  # those of a head side by side
                for i, row in enumerate(batch.tolist()):
                    placement = self.cache.rows.placement(row)
                    yield row, [objects_at_original(own, placement) for own in every[i :: len(batch)]]

        for image, found in by_image(self.cache, objects()):
            pieces = [(self.cache.rows.part_of(row), own) for row, own in found]
            size = self.cache.images.placement(image).original
            yield image, [stitched_objects([(own[k], part) for part, own in pieces], size) for k in range(len(heads))]

    def evaluate(
        self, heads: Sequence[ObjectHead], feed: Feed, rows: Rows, watch: Watch | None = None
    ) -> list[Outcome]:
        """COCO's scores of each head on the images that the rows show, which several processes share out among them."""
        results: list[list[dict[str, Any]]] = [[] for _ in heads]
        for image, found in self.predictions(heads, feed, scored_here(self.cache, rows)):
            for k, (own, objects) in enumerate(zip(results, found, strict=True)):
                own += coco_results(objects, self.cache.image_id(image), self.category_ids)
                if watch is not None:
                    watch.objects(k, image, objects)
        every = [gathered(own) for own in results]
        return from_main(lambda: [self._outcome(truth, own) for truth in [self.truth(rows)] for own in every])

    def truth(self, rows: Rows) -> dict[str, Any]:
        """The objects of the images that rows show, as COCO JSON holds them."""
        shown = images_of(self.cache, rows).tolist()
        images = [
            TruthImage(self.cache.image_id(i), self.cache.images.placement(i).original, self.image_instances(i))
            for i in shown
        ]
        truth = truth_of(images, self.classes, self.category_ids)
        for image, index in zip(truth["images"], shown, strict=True):
            texts = self.cache.images.texts
            image |= {"file_name": texts["id"][index], "group": texts["group"][index]}
        return truth

    def settle(self, heads: Sequence[ObjectHead], feed: Feed, val: Rows) -> list[str]:
        """Nothing: what these heads find needs no threshold here."""
        return []

    def panels(self, head: ObjectHead, feed: Feed, rows: Rows) -> Iterable[tuple[int, Draw]]:
        """(image, what draws truth and prediction over it) for each image that the rows show."""
        for image, (objects,) in self.predictions([head], feed, rows):
            shown = tuple(instance for instance, score in objects if score >= SHOWN_FROM)
            truth = self.image_instances(image)
            yield image, partial(_panels, truth, shown)

    def shown(self, head: ObjectHead, feed: Feed, rows: Rows, count: int) -> Rows:
        """Some of the images that the rows show, from those with most to see to those with least."""
        return spread_over(images_of(self.cache, rows), self._fullness, count)

    def _fullness(self, image: int) -> int:
        """How much there is to see in an image: its objects."""
        return len(self.image_instances(image))

    def _outcome(self, truth: dict[str, Any], results: list[dict[str, Any]]) -> Outcome:
        kinds: dict[str, Literal["bbox", "segm"]] = {"box": "bbox"}
        if self.masks:
            kinds["mask"] = "segm"
        scores = {name: self._named(average_precision(truth, results, kind)) for name, kind in kinds.items()}
        brief = {f"{name}_{part}": own[part] for name, own in scores.items() for part in ("ap", "ap50")}
        files = {"predictions.json": json.dumps(results).encode(), "truth.json": json.dumps(truth).encode()}
        return Outcome(scores, brief, files)

    def _named(self, scores: ApScores) -> dict[str, Any]:
        values = asdict(scores)
        for name in ("per_class", "per_class_50"):
            values[name] = dict(zip(self.classes[1:], values[name], strict=True))
        return values

    @cached_property
    def _all_targets(self) -> ObjectBatch:
        """The objects of all training rows, in order, on the device."""
        rows = sorted(self.targets)
        masks = None
        if self.masks:
            every = (framed_masks(self.instances(row), self.cache.rows.placement(row)) for row in rows)
            masks = [packed(torch.from_numpy(own)).to(self.device) for own in every]
        return ObjectBatch.of([self.targets[row] for row in rows], masks).to(self.device)

    @cached_property
    def _masks_fit(self) -> bool:
        """Whether the masks of all training rows fit on the device at once, a bit per pixel."""
        frames = ((len(t.labels), *self.cache.rows.placement(row).frame) for row, t in self.targets.items())
        return sum(objects * height * -(-width // 8) for objects, height, width in frames) <= room_for_masks(
            self.device
        )

    @cached_property
    def _masks(self) -> "MaskStore":
        return MaskStore(self.device)


def target_of(instances: Sequence[Instance], placement: Placement) -> ObjectTarget:
    """Boxes, labels and crowds of an image's objects in frame pixels; the masks wait until they are needed."""
    own = [i for i in instances if not i.crowd and _sized(i)]
    crowds = [i for i in instances if i.crowd]
    labels = torch.tensor([i.category for i in own], dtype=torch.int64)
    return ObjectTarget(_boxes(own, placement), labels, None, _boxes(crowds, placement))


def framed_masks(instances: Sequence[Instance], placement: Placement) -> NDArray[np.uint8]:
    """The masks of an image's objects, crowds left out: (objects, frame height, frame width), 0 or 1."""
    rles = [i.rle for i in instances if not i.crowd and _sized(i)]
    masks = np.zeros((len(rles), *placement.frame), dtype=np.uint8)
    for mask, rle in zip(masks, rles, strict=True):
        covered, own = _mask_in_frame(rle, placement)
        mask[covered] = own
    return masks


def room_for_masks(device: torch.device) -> float:
    """The bytes that masks may take of the memory where heads train."""
    room = device_room(device)
    return MASK_MEMORY_SHARE * (available_memory() / count() if room is None else room)


class MaskStore:
    """Masks of rows' objects, each decoded once and then kept where the head trains, cut out around its object.

    Where the memory holds no more of them, a row's are decoded each time.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.room = device, room_for_masks(device)
        self.kept: dict[int, tuple[tuple[int, ...], list[tuple[int, int, Tensor]]]] = {}

    def of(self, row: int, decode: Callable[[], NDArray[np.uint8]]) -> Tensor:
        """The masks of a row, (objects, frame height, frame width), uint8, on the device."""
        if row not in self.kept:
            masks = torch.from_numpy(decode())
            crops = [_crop(mask) for mask in masks]
            size = sum(crop.nbytes for _, _, crop in crops)
            if size > self.room:
                return masks.to(self.device, non_blocking=True)
            self.room -= size
            moved = [(top, left, crop.to(self.device, non_blocking=True)) for top, left, crop in crops]
            self.kept[row] = tuple(masks.shape), moved
        shape, crops = self.kept[row]
        found = torch.zeros(shape, dtype=torch.uint8, device=self.device)
        for mask, (top, left, crop) in zip(found, crops, strict=True):
            mask[top : top + crop.shape[0], left : left + crop.shape[1]] = crop
        return found


def _panels(truth: tuple[Instance, ...], found: tuple[Instance, ...], pixels: NDArray[np.float32]) -> list[Panel]:
    return [Panel(pixels, instances=truth), Panel(pixels, instances=found)]


def _crop(mask: Tensor) -> tuple[int, int, Tensor]:
    """(top, left, the part of a mask that holds all that is set in it)."""
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    if not len(rows):
        return 0, 0, mask[:0, :0].clone()
    top, left = int(rows[0]), int(columns[0])
    return top, left, mask[top : int(rows[-1]) + 1, left : int(columns[-1]) + 1].clone()


def coco_results(objects: Objects, image_id: int | str, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Objects of one image as COCO's results format has them: boxes as x, y, width, height."""
    results = []
    for instance, score in objects:
        x1, y1, x2, y2 = instance.box_xyxy
        result: dict[str, Any] = {
            "image_id": image_id,
            "category_id": category_ids[instance.category - 1],
            "bbox": [round(v, 4) for v in (x1, y1, x2 - x1, y2 - y1)],
            "score": round(score, 6),
        }
        results.append(result if instance.rle is None else result | {"segmentation": dict(instance.rle)})
    return results


def _mask_in_frame(rle: Rle | None, placement: Placement) -> tuple[tuple[slice, slice], NDArray[np.bool_]]:
    """The part of a frame that a mask covers, by nearest pixel as `labels_in_frame` has it, and the mask there."""
    assert rle is not None  # a cache for this task holds a mask for each object
    size: Any = rle["size"]
    if tuple(size) != placement.original:
        raise ShapeError(f"A mask of {tuple(size)} pixels does not fit an image of {placement.original}.")
    window, mask = decode_window(rle)
    covered, taken = [], []
    for content, original, own in zip(placement.content, placement.original, window, strict=True):
        places = np.minimum(((np.arange(content) + 0.5) * original / content).astype(np.intp), original - 1)
        start, stop = np.searchsorted(places, [own.start, own.stop]).tolist()
        covered.append(slice(start, stop))
        taken.append(places[start:stop] - own.start)
    return (covered[0], covered[1]), mask[np.ix_(*taken)]


def _sized(instance: Instance) -> bool:
    """Whether an object's box has an area; one without can't be learnt."""
    x1, y1, x2, y2 = instance.box_xyxy
    return x2 > x1 and y2 > y1


def _boxes(instances: Sequence[Instance], placement: Placement) -> Tensor:
    scale_y, scale_x = (c / o for c, o in zip(placement.content, placement.original, strict=True))
    boxes = torch.tensor([i.box_xyxy for i in instances], dtype=torch.float64).reshape(-1, 4)
    return (boxes * torch.tensor([scale_x, scale_y, scale_x, scale_y], dtype=torch.float64)).float()
