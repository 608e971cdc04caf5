"""Anomalies: the task of heads that know good units alone, scored against the truth of units and of their pixels.

A unit is an image, or a tile. Of its pixels only counts are kept.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featprobe.cache import Cache
from featprobe.errors import ProbeError, counted
from featprobe.features import Features
from featprobe.geometry import Part
from featprobe.image_labels import DEFECT, Unit
from featprobe.metrics.anomalies import ScoredAnomalies, anomaly_scores
from featprobe.metrics.pixel_counts import Mask, PixelCounter, UnitPixels, histograms
from featprobe.probes.head import AnomalyHead, Fit, PooledAnomalyHead, VerdictHead
from featprobe.probes.train import Feed
from featprobe.processes import from_main, gathered
from featprobe.report.sheets import Panel
from featprobe.scores import TaskScores
from featprobe.specs import Rows
from featprobe.stages.image_truth import defect_regions, truth_of, unit_names, units_of
from featprobe.stages.memory import Batches
from featprobe.stages.pooled import pooled_vectors
from featprobe.stages.recording.watch import Handed, Watch
from featprobe.stages.row_images import images_of
from featprobe.stages.tasks.heat_panels import called_tiles, panel_of, truth_panel
from featprobe.stages.tasks.seen import Seen, hand_over, of_tiles, seen_on_maps, seen_on_vectors
from featprobe.stages.tasks.settle import settled
from featprobe.stages.tasks.task import Batch, Draw, Outcome, Solution, Truth, evaluation_batches, scored_here

Pixels = NDArray[np.float32]
MAP_THRESHOLD = "map_threshold"  # a buffer of heads with maps


@dataclass(frozen=True)
class AnomalyAsked:
    """How anomaly heads are fitted and scored, as `stages.training.probe_options` has it.

    scores: of the task. pooled: whether heads read one vector per unit, and no maps.
    """

    unit: Unit
    false_calls: float
    coreset: float
    remove_position: bool
    scores: TaskScores
    pooled: bool


class Anomaly:
    """The truth of a cache's units as heads that know good ones alone are fitted and scored on it.

    train: rows of good units. notes: what fitting has to say; `settle` returns it. See `task.Task`.
    """

    masks = False
    sides: tuple[float, ...] = ()
    colours = DEFECT.names

    def __init__(self, cache: Cache, train: Rows, device: torch.device, asked: AnomalyAsked) -> None:
        self.cache, self.train, self.device, self.asked = cache, train, device, asked
        self.good = truth_of(cache, "defect", asked.unit).good
        self.notes: list[str] = []

    def truth_of(self, row: int) -> Truth:
        """Nothing: these heads are not trained on views."""
        return None, None

    def train_counts(self, head: VerdictHead) -> dict[str, int]:
        """Good units that it is fitted to."""
        return {str(DEFECT.good): len(set(units_of(self.cache, self.train, self.asked.unit).tolist()))}

    def start(self, heads: Sequence[VerdictHead], *, fresh: bool = True) -> Callable[[Features, Batch], Tensor]:
        """Raises ProbeError: these heads are fitted, and have no loss."""
        raise ProbeError("An anomaly head is fitted to stored features. It has no loss to train a backbone by.")

    def fixed(self, head: VerdictHead) -> bool:
        """Nothing is trained."""
        return False

    def solve(self, head: AnomalyHead, seed: int, batches: Batches, train: Rows, val: Rows) -> Solution:
        """Fit a head to the maps of good units. One process computes it; nothing is chosen on validation."""

        def passes() -> Iterator[Features]:
            return (features for _, features in batches(evaluation_batches(train)))

        return self._solution(
            head, head.fit(passes, seed, coreset=self.asked.coreset, remove_position=self.asked.remove_position)
        )

    def solve_pooled(self, head: PooledAnomalyHead, seed: int, batches: Batches, train: Rows, val: Rows) -> Solution:
        """The same for a head of one vector per unit."""
        unit, say = self.asked.unit, self.notes.append
        vectors = torch.from_numpy(pooled_vectors(self.cache, head.levels, unit, train, quiet=True, say=say))
        return self._solution(head, head.fit(lambda: [vectors], seed))

    def _solution(self, head: VerdictHead, fit: Fit) -> Solution:
        self.notes += [f"{self.cache.data.name}: {note}" for note in fit.notes]
        return Solution({name: value.cpu() for name, value in head.state_dict().items()}, dict(fit.chosen))

    def evaluate(
        self, heads: Sequence[VerdictHead], feed: Feed, rows: Rows, watch: Watch | None = None
    ) -> list[Outcome]:
        """Scores of each head on the units that the rows show, which several processes share out among them.

        watch: gets what `handed` says.
        """
        counters = [PixelCounter() for _ in heads]
        scores: list[tuple[int, list[float]]] = []
        for unit, found in self._seen(heads, feed, scored_here(self.cache, rows)):
            scores.append((unit, [one.score for one in found]))
            truth = self._regions(unit) if any(one.map is not None for one in found) else None
            watched = watch if self.handed == "values" else None
            for i, (counter, one) in enumerate(zip(counters, found, strict=True)):
                if one.map is None or (truth is None and watched is None):
                    continue
                pixels = one.map.cpu().numpy()
                if truth is not None:
                    counter.add(unit, pixels, *truth)
                if watched is not None:
                    watched.pixels(i, unit, pixels, None)
        if watch is not None and self.handed != "values":
            hand_over(self.cache, [unit for unit, _ in scores], [own for _, own in scores], self.asked.unit, watch)
        every = dict(gathered(scores))
        counts = gathered([[counter.units for counter in counters]])

        def outcomes() -> list[Outcome]:
            return [
                self._outcome(head, {unit: own[i] for unit, own in every.items()}, [part[i] for part in counts])
                for i, head in enumerate(heads)
            ]

        return from_main(outcomes)

    @property
    def handed(self) -> Handed:
        """Maps where heads make them of whole images, and the set says where defects are."""
        if self.asked.unit == "tile":
            return "objects"
        return "values" if self.cache.data.tasks and not self.asked.pooled else "scores"

    def settle(self, heads: Sequence[VerdictHead], feed: Feed, val: Rows) -> list[str]:
        """Set each head's thresholds, of scores and of pixels of maps, from the good units of validation.

        By its map a unit is called where one of its pixels is over the threshold of maps.
        """
        rows = val[self.good[units_of(self.cache, val, self.asked.unit)] == 1]
        here = [
            [(one.score, None if one.map is None else float(one.map.max())) for one in found]
            for _, found in self._seen(heads, feed, scored_here(self.cache, rows))
        ]
        every, notes = gathered(here), list(self.notes)
        for i, head in enumerate(heads):
            found = [own[i] for own in every]
            value, note = settled([score for score, _ in found], self.asked.false_calls, self.asked.unit)
            head.threshold.fill_(value)
            if not self.asked.pooled:
                peaks = [peak for _, peak in found if peak is not None]
                head.get_buffer(MAP_THRESHOLD).fill_(settled(peaks, self.asked.false_calls, self.asked.unit)[0])
            notes += [f"{self.cache.data.name}: {note}"] if note else []
        return list(dict.fromkeys(notes))

    def shown(self, head: VerdictHead, feed: Feed, rows: Rows, count: int) -> Rows:
        """Some of the images that the rows show, from the worst mistake to the surest right answer.

        A mistake is as bad as the score is far on the wrong side of the threshold; without one, of the median.
        """
        found = {unit: one.score for unit, (one,) in self._seen([head], feed, rows, maps=False)}
        units, scores = np.array(list(found), dtype=np.intp), np.array(list(found.values()))
        middle = float(head.threshold)
        wrong = (scores - (np.median(scores) if np.isnan(middle) else middle)) * np.where(self.good[units] == 1, 1, -1)
        order = units[np.argsort(-wrong, kind="stable")]
        images = order if self.asked.unit == "image" else self.cache.image_of[order]
        return np.array(list(dict.fromkeys(images.tolist()))[:count], dtype=np.intp)

    def panels(self, head: VerdictHead, feed: Feed, rows: Rows) -> Iterable[tuple[int, Draw]]:
        """(image, what draws truth and heat map over it) for each image that the rows show."""
        of_maps = float("nan") if self.asked.pooled else float(head.get_buffer(MAP_THRESHOLD))
        for image, seen in self._seen_images(head, feed, rows):
            units = units_of(self.cache, rows[self.cache.image_of[rows] == image], self.asked.unit)
            good = self.good[list(dict.fromkeys(units.tolist()))].tolist()
            yield image, partial(self._panels, image, seen, good, float(head.threshold), of_maps)

    def _panels(
        self, image: int, seen: Seen, good: Sequence[int], threshold: float, of_maps: float, pixels: Pixels
    ) -> list[Panel]:
        """An image's truth, and what is said of it. good: of its units. of_maps: the threshold of pixels of maps."""
        called = called_tiles(seen, threshold) if self.asked.unit == "tile" else [seen.score > threshold]
        wrong = not np.isnan(threshold) and any(c == (g == 1) for c, g in zip(called, good, strict=True))
        truth = truth_panel(pixels, defect_regions(self.cache, image, "image"), good)
        return [truth, panel_of(pixels, seen, threshold, of_maps, self.asked.unit, wrong=wrong)]

    def _seen_images(self, head: VerdictHead, feed: Feed, rows: Rows) -> Iterator[tuple[int, Seen]]:
        """(image, what a head says of it, by its tiles where these are the units), in the order of the rows."""
        if not self.asked.pooled:
            yield from ((i, one) for i, (one,) in seen_on_maps(self.cache, [head], feed, rows, "image"))
            return
        found: dict[int, list[tuple[float, Part | None]]] = {
            image: [] for image in images_of(self.cache, rows).tolist()
        }
        for unit, (one,) in self._seen([head], feed, rows):
            of_tile = self.asked.unit == "tile"
            image = int(self.cache.image_of[unit]) if of_tile else unit
            found[image].append((one.score, self.cache.rows.part_of(unit) if of_tile else None))
        yield from ((image, of_tiles(own)) for image, own in found.items())

    def _seen(
        self, heads: Sequence[VerdictHead], feed: Feed, rows: Rows, *, maps: bool = True
    ) -> Iterator[tuple[int, list[Seen]]]:
        """(unit, what each head says of it), one after another."""
        if self.asked.pooled:
            return seen_on_vectors(self.cache, heads, rows, self.asked.unit)
        return seen_on_maps(self.cache, heads, feed, rows, self.asked.unit, maps=maps)

    def _regions(self, unit: int) -> tuple[Mask, Mask] | None:
        """Pixels of defects, and ignored ones, of a unit; None where the truth of its pixels is not known."""
        found = defect_regions(self.cache, unit, self.asked.unit)
        if found is not None or self.good[unit] != 1 or not self.cache.data.tasks:
            return found
        table = self.cache.images if self.asked.unit == "image" else self.cache.rows
        none = np.zeros(table.placement(unit).original, dtype=bool)
        return none, none

    def _outcome(
        self, head: VerdictHead, scores: Mapping[int, float], pixels: Sequence[Mapping[int, UnitPixels]]
    ) -> Outcome:
        units = np.array(list(scores), dtype=np.intp)
        ids, groups = unit_names(self.cache, units, self.asked.unit)
        counted_pixels = [pair for part in pixels for pair in part.items()]
        scored = ScoredAnomalies(
            tuple(ids), tuple(groups), np.array(list(scores.values())), self.good[units] == 1,
            np.full(len(units), float(head.threshold)),
            histograms(units.tolist(), counted_pixels) if counted_pixels else None,
        )  # fmt: skip
        found = anomaly_scores(scored)
        brief = {score.name: found[score.name] for score in self.asked.scores.compared}
        return Outcome(found, brief, {"scores.npz": scored.to_npz()})


def good_rows(cache: Cache, train: Rows, unit: Unit) -> tuple[Rows, list[str]]:
    """The rows of the training split that show a good unit, and a note on those that are left aside.

    Raises ProbeError where there is none.
    """
    good, units = truth_of(cache, "defect", unit).good, units_of(cache, train, unit)
    kept = good[units] == 1
    aside = len(set(units[~kept].tolist()))
    if not kept.any():
        raise ProbeError(_no_good(cache, train, unit, aside))
    if not aside:
        return train, []
    many = len(set(units[kept].tolist()))
    return train[kept], [
        f"{cache.data.name}: train has {counted(many, f'good {unit}')}; "
        f"{counted(aside, unit)} with a defect {'is' if aside == 1 else 'are'} left aside"
    ]


def _no_good(cache: Cache, train: Rows, unit: Unit, aside: int) -> str:
    """What to say where no unit is good."""
    further = "Take another --split, or add images without defects."
    if unit == "image" and cache.recipe.tile is None:
        further += " Or let tiles be judged: those without a defect are good ones.\n  featprobe extract … --tile N"
        further += "\n  featprobe probe … --unit tile"
    elif unit == "image":
        tiles = int((truth_of(cache, "defect", "tile").good[train] == 1).sum()) if cache.data.tasks else 0
        further += f" {counted(tiles, 'tile')} of train have no defect:  --unit tile" if tiles else ""
    return (
        f"{cache.path}: no {unit} of the training split is good, and an anomaly head knows good ones alone.\n"
        f"Nothing was trained.\n  wanted  one {unit} without a defect, or more\n"
        f"  found   {counted(aside, unit)}, all with a defect\n{further}"
    )
