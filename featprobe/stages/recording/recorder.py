"""Recording while heads are scored: their calls, what these touch, and which defects they find."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from featprobe.cache import Cache
from featprobe.metrics.defects.overlaps import Overlaps, finds, touched
from featprobe.metrics.defects.records import (
    GOOD,
    IGNORED,
    SIZES,
    About,
    Calls,
    Floats,
    FoundRule,
    Indices,
    Records,
    found_scores,
)
from featprobe.processes import from_main, gathered
from featprobe.regions import Regions, Runs
from featprobe.specs import Rows
from featprobe.stages.recording.map_calls import calls_of_map
from featprobe.stages.recording.meetings import Ground, overlaps_of_map, overlaps_of_objects
from featprobe.stages.recording.sizes import Outlines, Spacing, outlines_of, outlines_of_runs
from featprobe.stages.recording.truth import Source, Truth, defects_of, table_of
from featprobe.stages.recording.watch import Watch
from featprobe.stages.stitch import Objects
from featprobe.targets import Labels

RUNS_AT_ONCE = 1 << 14  # of pixels, that sizes are measured of


class SplitTruth:
    """The defects of the images of a split, which all processes know together.

    images: indices among those of the cache. table: of these images, in the same order. source, pixel_size: see
    `truth.table_of`.
    """

    def __init__(
        self,
        cache: Cache,
        images: Rows,
        split: str,
        source: Source = "own",
        *,
        pixel_size: Spacing | None = None,
        quiet: bool = False,
    ) -> None:
        self.cache, self.images, self.source = cache, images, source
        self.table: Truth = from_main(
            lambda: table_of(cache, images, source, pixel_size=pixel_size, split=split, quiet=quiet)
        )
        self._place = {image: i for i, image in enumerate(images.tolist())}
        self._last: tuple[int, Ground] | None = None  # many heads are recorded at many bases, image by image

    def ground(self, image: int) -> Ground:
        """The truth of an image, to compare calls with."""
        if self._last is None or self._last[0] != image:
            found = defects_of(self.cache, image, self.source)
            self._last = image, Ground.of(found.objects, found.ignored)
        return self._last[1]

    def spacing(self, image: int) -> Spacing:
        """Millimetres per pixel of an image, down and across; nan where unknown."""
        down, across = self.table.images.spacing[self._place[image]].tolist()
        return down, across

    def judged(self, image: int, overlaps: Overlaps) -> NDArray[np.uint8]:
        """What each call in an image touches, (calls,).

        Where an image is not known to be good, and nothing says where its defect is, no call is a false one.
        """
        ground = self.ground(image)
        unplaced = self.table.images.good[self._place[image]] != GOOD and not ground.defects and not ground.ignored
        found = touched(overlaps)
        return np.full_like(found, IGNORED) if unplaced else found


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
    """A watch that keeps the calls of heads on the images of a split, and no maps.

    bases: of each head, the threshold at which the pixels of its maps are joined to calls; nan for heads without maps.
    rule: when a call has found a defect. seconds: that recording took so far. What is handed over again takes the place
    of the first.
    """

    def __init__(self, truth: SplitTruth, bases: Sequence[float], rule: FoundRule) -> None:
        self.truth = truth
        self.bases, self.rule = tuple(bases), rule
        self.seconds = 0.0
        self._found: list[dict[int, _Found]] = [{} for _ in bases]
        self._scores: list[dict[int, float]] = [{} for _ in bases]
        self._waiting: list[tuple[int, int, Regions]] = []  # head, image, its calls without sizes

    def pixels(self, head: int, image: int, values: Floats, classes: Labels | None) -> None:
        """See `Watch`."""
        begun = time.perf_counter()
        calls = calls_of_map(values, self.bases[head], classes)
        overlaps = overlaps_of_map(calls, self.truth.ground(image))
        self._keep(head, image, overlaps, calls.boxes, calls.score)
        self._waiting.append((head, image, calls.regions))
        if sum(len(regions.region) for *_, regions in self._waiting) > RUNS_AT_ONCE:
            self._measure()
        self.seconds += time.perf_counter() - begun

    def objects(self, head: int, image: int, objects: Objects) -> None:
        """See `Watch`."""
        begun = time.perf_counter()
        found = [instance for instance, _ in objects]
        overlaps = overlaps_of_objects(found, self.truth.ground(image))
        boxes = np.array([one.box_xyxy for one in found], np.float32).reshape(-1, 4)
        scores = np.array([score for _, score in objects], np.float32)
        self._keep(head, image, overlaps, boxes, scores)
        self._size(outlines_of(found), [(head, image, len(found))])
        self.seconds += time.perf_counter() - begun

    def image_score(self, head: int, image: int, score: float) -> None:
        """See `Watch`."""
        self._scores[head][image] = score

    def _keep(self, head: int, image: int, overlaps: Overlaps, boxes: Floats, score: Floats) -> None:
        judged, pairs = self.truth.judged(image, overlaps), finds(overlaps, self.rule)
        self._found[head][image] = _Found(overlaps.call_class, boxes, _SIZES, _SIZES, score, judged, pairs)

    def _measure(self) -> None:
        """The sizes of the calls of maps, of many images at once."""
        counts = [(head, image, len(regions)) for head, image, regions in self._waiting]
        first = np.cumsum([0, *(count for *_, count in counts)])
        owner = [regions.region + at for at, (*_, regions) in zip(first[:-1], self._waiting, strict=True)]
        runs = Runs.joined([regions.runs for *_, regions in self._waiting])
        self._size(outlines_of_runs(runs, np.concatenate([np.zeros(0, np.intp), *owner]), first[-1]), counts)
        self._waiting.clear()

    def _size(self, outlines: Outlines, counts: Sequence[tuple[int, int, int]]) -> None:
        """Keep the sizes of calls. counts: (head, image, calls) of each image, one after another."""
        calls = [count for *_, count in counts]
        spacing = np.repeat([self.truth.spacing(image) for _, image, _ in counts], calls, axis=0)
        known = ~np.isnan(spacing[:, 0])
        pixels = outlines.sizes()
        millimetres = np.full_like(pixels, np.nan)
        if known.any():
            millimetres[known] = outlines.sizes(spacing)[known]
        ends = np.cumsum(calls)[:-1]
        for (head, image, _), *sizes in zip(counts, np.split(pixels, ends), np.split(millimetres, ends), strict=True):
            own = self._found[head][image]
            self._found[head][image] = replace(own, pixels=sizes[0], millimetres=sizes[1])

    def records(self, abouts: Sequence[About]) -> list[Records]:
        """The records of each head, from what all processes recorded; each of them gets all."""
        if self._waiting:
            self._measure()
        parts = gathered([(self._found, self._scores)])
        return [self._records(about, k, parts) for k, about in enumerate(abouts)]

    def _records(
        self, about: About, head: int, parts: Sequence[tuple[list[dict[int, _Found]], list[dict[int, float]]]]
    ) -> Records:
        images, defects, _ = self.truth.table
        found = {image: own for calls, _ in parts for image, own in calls[head].items()}
        scores = {image: score for _, every in parts for image, score in every[head].items()}
        order = self.truth.images.tolist()
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
        score = found_scores(pairs, calls.score, len(defects))
        return Records(about, images, replace(defects, score=score), calls, pairs)


_OF_CALLS = tuple(field.name for field in fields(Calls) if field.name != "image")
_SIZES = np.zeros((0, len(SIZES)), np.float32)  # before they are known
_NONE = _Found(
    np.zeros(0, np.uint8), np.zeros((0, 4), np.float32), _SIZES, _SIZES, np.zeros(0, np.float32), np.zeros(0, np.uint8),
    np.zeros((0, 2), np.intp),
)  # fmt: skip
