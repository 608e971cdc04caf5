"""Recording while heads are scored: their calls, what these touch, and which defects they find."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import isnan
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from featprobe.cache import Cache
from featprobe.metrics.defects.overlaps import Overlaps, finds, touched
from featprobe.metrics.defects.records import SIZES, About, Calls, Defects, Floats, FoundRule, Images, Indices, Records
from featprobe.processes import gathered
from featprobe.specs import Rows
from featprobe.stages.recording.map_calls import calls_of_map
from featprobe.stages.recording.meetings import Ground, overlaps_of_map, overlaps_of_objects
from featprobe.stages.recording.sizes import Outline, outline_of, outline_of_mask
from featprobe.stages.recording.truth import Source, Truth, defects_of
from featprobe.stages.recording.watch import Watch
from featprobe.stages.stitch import Objects
from featprobe.targets import Labels


_grounds: WeakKeyDictionary[Cache, tuple[int, Source, Ground]] = WeakKeyDictionary()
"""The image of a cache that was asked for last: many heads, at many bases, are recorded image by image."""


def _ground(cache: Cache, image: int, source: Source) -> Ground:
    """The truth of an image, to compare calls with."""
    known = _grounds.get(cache)
    if known is None or known[:2] != (image, source):
        found = defects_of(cache, image, source)
        known = _grounds[cache] = image, source, Ground.of(found.objects, found.ignored)
    return known[2]


@dataclass(frozen=True)
class _Found:
    """The calls of a head in one image, as `records.Calls` has them. finds: (pairs, 2), a call and a defect of it."""

    category: NDArray[np.uint8]
    boxes: Floats
    pixels: Floats
    millimetres: Floats
    score: Floats
    touched: NDArray[np.uint8]
    finds: Indices


class Recorder(Watch):
    """A watch that keeps the calls of heads on some images, and no maps.

    table: the defects of these images, see `truth.table_of`. images: their indices in the cache, in the same order.
    source: of the defects. bases: of each head, the threshold at which the pixels of its maps are joined to calls; nan
    for heads without maps. rule: when a call has found a defect. What is handed over again takes the place of the first.
    """

    def __init__(
        self, cache: Cache, table: Truth, images: Rows, source: Source, bases: Sequence[float], rule: FoundRule
    ) -> None:
        self.cache, self.table, self.images, self.source = cache, table, images, source
        self.bases, self.rule = tuple(bases), rule
        self._spacing = dict(zip(images.tolist(), map(tuple, table.images.spacing.tolist()), strict=True))
        self._found: list[dict[int, _Found]] = [{} for _ in bases]
        self._scores: list[dict[int, float]] = [{} for _ in bases]

    def pixels(self, head: int, image: int, values: Floats, classes: Labels | None) -> None:
        """See `Watch`."""
        calls = calls_of_map(values, self.bases[head], classes)
        overlaps = overlaps_of_map(calls, _ground(self.cache, image, self.source))
        outlines = [
            outline_of_mask(calls.labels[window] == k, (window[1].start, window[0].start))
            for k, window in enumerate(calls.windows, start=1)
        ]
        self._keep(head, image, overlaps, calls.boxes, outlines, calls.score)

    def objects(self, head: int, image: int, objects: Objects) -> None:
        """See `Watch`."""
        found = [instance for instance, _ in objects]
        overlaps = overlaps_of_objects(found, _ground(self.cache, image, self.source))
        boxes = np.array([one.box_xyxy for one in found], np.float32).reshape(-1, 4)
        scores = np.array([score for _, score in objects], np.float32)
        self._keep(head, image, overlaps, boxes, [outline_of(one) for one in found], scores)

    def image_score(self, head: int, image: int, score: float) -> None:
        """See `Watch`."""
        self._scores[head][image] = score

    def _keep(
        self, head: int, image: int, overlaps: Overlaps, boxes: Floats, outlines: Sequence[Outline], score: Floats
    ) -> None:
        spacing = self._spacing[image]
        pixels = _sizes([one.sizes() for one in outlines])
        unknown = isnan(spacing[0])
        millimetres = np.full_like(pixels, np.nan) if unknown else _sizes([one.sizes(spacing) for one in outlines])
        self._found[head][image] = _Found(
            overlaps.call_class, boxes, pixels, millimetres, score, touched(overlaps), finds(overlaps, self.rule)
        )

    def records(self, abouts: Sequence[About]) -> list[Records]:
        """The records of each head, from what all processes recorded; each of them gets all."""
        parts = gathered([(self._found, self._scores)])
        return [self._records(about, k, parts) for k, about in enumerate(abouts)]

    def _records(
        self, about: About, head: int, parts: Sequence[tuple[list[dict[int, _Found]], list[dict[int, float]]]]
    ) -> Records:
        images, defects, _ = self.table
        found = {image: own for calls, _ in parts for image, own in calls[head].items()}
        scores = {image: own for _, own in parts for image, own in own[head].items()}
        order = self.images.tolist()
        if scores:
            score = np.array([scores[image] for image in order], np.float32)
            images, about = replace(images, score=score), replace(about, pooled=True)
            found = dict.fromkeys(order, _NONE)
        each = [found[image] for image in order]
        counts = np.array([len(own.score) for own in each], np.intp)
        calls = Calls(
            np.repeat(np.arange(len(order)), counts),
            **{name: np.concatenate([getattr(own, name) for own in (_NONE, *each)]) for name in _OF_CALLS},
        )
        first = np.searchsorted(defects.image, np.arange(len(order)))
        starts = np.stack([np.cumsum(counts) - counts, first], axis=1)
        pairs = np.concatenate([_NONE.finds, *(own.finds + at for own, at in zip(each, starts, strict=True))])
        return Records(about, images, scored(defects, calls, pairs), calls, pairs)


def scored(defects: Defects, calls: Calls, pairs: Indices) -> Defects:
    """Defects with the score of the highest of the calls that find each. pairs: (pairs, 2), a call and a defect."""
    score = np.full(len(defects), -np.inf, np.float32)
    np.maximum.at(score, pairs[:, 1], calls.score[pairs[:, 0]])
    return replace(defects, score=score)


def joined(first: Records, second: Records) -> Records:
    """The records of one head on two splits as one."""
    by = len(first.images)
    parts = [first, replace(
        second,
        defects=replace(second.defects, image=second.defects.image + by),
        calls=replace(second.calls, image=second.calls.image + by),
        finds=second.finds + (len(first.calls), len(first.defects)),
    )]  # fmt: skip

    def both(kind: type, name: str) -> Any:
        own = [getattr(part, name) for part in parts]
        values = {field.name: [getattr(one, field.name) for one in own] for field in fields(kind)}
        return kind(**{k: v[0] + v[1] if isinstance(v[0], tuple) else np.concatenate(v) for k, v in values.items()})

    return Records(
        first.about, both(Images, "images"), both(Defects, "defects"), both(Calls, "calls"),
        np.concatenate([part.finds for part in parts]),
    )  # fmt: skip


def _sizes(rows: Sequence[Floats]) -> Floats:
    return np.array(rows, np.float32).reshape(-1, len(SIZES))


_OF_CALLS = tuple(field.name for field in fields(Calls) if field.name != "image")
_NONE = _Found(
    np.zeros(0, np.uint8), np.zeros((0, 4), np.float32), _sizes([]), _sizes([]), np.zeros(0, np.float32),
    np.zeros(0, np.uint8), np.zeros((0, 2), np.intp),
)  # fmt: skip
