"""The masks of a cache as training and scoring want them, decoded once for all runs over it."""

from dataclasses import dataclass
from math import prod
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featprobe.cache import Cache
from featprobe.features import cell_counts
from featprobe.io.threads import each, single_threaded
from featprobe.machine import available_memory, usable_cores
from featprobe.processes import count
from featprobe.specs import Rows
from featprobe.targets import Instance, Labels, labels_in_frame

MEMORY_SHARE = 0.3  # of the available memory, for masks that are kept
PIXELS_AT_ONCE = 2**20  # that a thread decodes and encodes together
_shelves: WeakKeyDictionary[Cache, "LabelShelf"] = WeakKeyDictionary()


@dataclass(frozen=True)
class Encoded:
    """The masks of some rows, laid into the frame.

    rows: ascending. labels: at "level" pixels of each class in each cell, int16, (rows, classes, height / stride, width
    / stride); at "image" uint8, (rows, height, width); None where they are not kept. pixels: (classes,), how many are
    labelled.
    """

    rows: Rows
    labels: Tensor | None
    pixels: Tensor


class LabelShelf:
    """The decoded labels of one cache: its objects, and as many masks as MEMORY_SHARE of the memory holds."""

    def __init__(self) -> None:
        self.left = int(MEMORY_SHARE * available_memory() / count())  # bytes
        self.objects: dict[str, dict[int, tuple[Instance, ...]]] = {}  # of rows, by where they come from
        self._truths: dict[int, Labels] = {}
        self._pixels: Tensor | None = None  # labelled, (rows of the cache, classes); -1 where they are not counted yet
        self._encoded: dict[tuple[str, int, bytes], Encoded] = {}

    def truths(self, cache: Cache, images: Rows) -> list[Labels]:
        """The masks of whole images at their own size: (height, width), uint8."""
        missing = [image for image in images.tolist() if image not in self._truths]
        read = dict(zip(missing, each(cache.image_semantic, missing, count()), strict=True))
        size = sum(own.nbytes for own in read.values())
        if size <= self.left:
            self.left -= size
            self._truths |= read
        return [read[image] if image in read else self._truths[image] for image in images.tolist()]

    def encoded(self, cache: Cache, rows: Rows, loss_at: str, stride: int, *, keep: bool) -> Encoded:
        """The masks of ascending rows. keep: the labels too, where there is room, and not only how many there are."""
        key = (loss_at, stride, rows.tobytes())
        if keep and key in self._encoded:
            return self._encoded[key]
        labels = self._room_for(cache, rows, loss_at, stride) if keep else None
        if self._pixels is None:
            self._pixels = torch.full((len(cache), len(cache.data.classes)), -1)
        index = torch.from_numpy(rows.astype(np.int64))
        if labels is None:
            lacking = (self._pixels[index, 0] < 0).numpy()
        else:
            lacking = self._fill_in(labels, rows, loss_at, stride)
        places = np.flatnonzero(lacking)
        self._pixels[index[places]] = _encode(cache, rows, places, labels, loss_at, stride)
        found = Encoded(rows, labels, self._pixels[index].sum(0))
        if labels is not None:
            self._encoded[key] = found
        return found

    def _fill_in(self, labels: Tensor, rows: Rows, loss_at: str, stride: int) -> NDArray[np.bool_]:
        """Copy the labels of rows that are kept already; returns which rows are not, (rows,)."""
        lacking = np.ones(len(rows), dtype=bool)
        for (at, of_stride, _), kept in self._encoded.items():
            if (at, of_stride) == (loss_at, stride) and kept.labels is not None:
                wanted = np.flatnonzero(lacking)
                _, here, there = np.intersect1d(rows[wanted], kept.rows, assume_unique=True, return_indices=True)
                for place, other in zip(wanted[here].tolist(), there.tolist(), strict=True):
                    labels[place] = kept.labels[other]
                lacking[wanted[here]] = False
        return lacking

    def _room_for(self, cache: Cache, rows: Rows, loss_at: str, stride: int) -> Tensor | None:
        """Memory for the labels of rows, for which others are forgotten where that helps; None where it does not."""
        size, dtype = _shape_of(cache, len(rows), loss_at, stride)
        wanted = prod(size) * dtype.itemsize
        if wanted > self.left:
            self.left += sum(own.labels.nbytes for own in self._encoded.values() if own.labels is not None)
            self._encoded.clear()
        if wanted > self.left:
            return None
        self.left -= wanted
        return torch.empty(size, dtype=dtype)


def shelf_of(cache: Cache) -> LabelShelf:
    """The decoded labels of a cache; those of any other cache are dropped."""
    if cache not in _shelves:
        _shelves.clear()
        _shelves[cache] = LabelShelf()
    return _shelves[cache]


def encode(cache: Cache, rows: Rows, loss_at: str, stride: int) -> Tensor:
    """The masks of rows, in the order given, as `Encoded.labels` has them."""
    size, dtype = _shape_of(cache, len(rows), loss_at, stride)
    labels = torch.empty(size, dtype=dtype)
    _encode(cache, rows, np.arange(len(rows)), labels, loss_at, stride)
    return labels


def _shape_of(cache: Cache, rows: int, loss_at: str, stride: int) -> tuple[tuple[int, ...], torch.dtype]:
    height, width = cache.recipe.frame
    if loss_at == "image":
        return (rows, height, width), torch.uint8
    return (rows, len(cache.data.classes), height // stride, width // stride), torch.int16


def _encode(cache: Cache, rows: Rows, places: Rows, labels: Tensor | None, loss_at: str, stride: int) -> Tensor:
    """The labelled pixels in the rows at some places, (places, classes); fills in their labels if given."""
    height, width = cache.recipe.frame

    def work(part: Rows) -> Tensor:
        masks = (labels_in_frame(cache.semantic(row), cache.rows.placement(row)) for row in rows[part].tolist())
        framed = torch.from_numpy(np.stack(list(masks)))
        cells = cell_counts(framed, len(cache.data.classes), stride)
        if labels is not None:
            shown = cells if loss_at == "level" else framed
            labels.index_copy_(0, torch.from_numpy(part.astype(np.int64)), shown.to(labels.dtype))
        return cells.sum((2, 3), dtype=torch.int64)

    step = max(1, PIXELS_AT_ONCE // (height * width))
    parts = [places[start : start + step] for start in range(0, len(places), step)]
    threads = min(usable_cores() // count(), len(parts)) if len(parts) > 1 else 1
    none = torch.zeros((0, len(cache.data.classes)), dtype=torch.int64)
    if threads < 2:
        return torch.cat([none, *map(work, parts)])
    with single_threaded(threads, "label-reader") as pool:
        return torch.cat([none, *pool.map(work, parts)])
