"""Intervals that should cover 95 times of 100, and a test of equals that should reject 5 times of 100.

    python benchmarks/coverage.py

Test splits are drawn from a world of parts whose scores are known, from 100,000 of its parts: several images a part, a
background and three defects that some parts have and others lack, areas from a lognormal distribution, and parts on
which a defect is hard to find or false alarms are frequent. From each split every kind of interval is made, and it is
counted how often it holds the world's score. Two systems that are equal in distribution, but not on any one part, are
tested for a difference on the same images; and two such pairs, each on a test set of its own, for a modality gap.

In another world systems are trained: each seed has a part of its own. There procedures that are equal, each with a few
seeds, are tested for a difference by the function that `compare` calls (see _seeds.py). --groups-only counts groups
alone there, as if seeds did nothing: a control, which must fail. A third world has scores of whole images (see
_images.py); --world images looks at that one alone.
"""

import argparse
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain
from multiprocessing import get_context

import numpy as np
from _bench import positive, print_table
from _images import EQUALS, images_hold, json_of_images, look_at_images, rows_of_images
from _seeds import RESULTS, TABLES, json_of_seeds, look_at_seeds, power, rows_of_seeds, seeds_hold
from numpy.typing import NDArray
from scipy.stats import t as student

from featprobe.metrics import (
    Resamples,
    Statistic,
    bca_interval,
    difference_of,
    grouped,
    groups_with_truth,
    iou_scores,
    jackknifed,
    modality_gap,
    paired_difference,
    percentile_interval,
    pixel_statistic,
    resample,
    studentised_interval,
)

SIZES = (12, 24, 48, 100)  # groups of a test split
FEW = (12, 24)  # where it matters what becomes of a class that a resample lacks
TRUE_GROUPS = 100_000
PIXELS = 512 * 512  # of an image
RESAMPLES = 999
CHUNK = 100  # replications of one task of the pool
LEAST = {12: 0.90, 48: 0.93, 100: 0.93}  # coverage that must be reached
REJECTED, WITHIN, AT = 0.05, 0.015, 48  # share of rejections, how far it may be off, at how many groups

FAR = 1e6  # standard errors: beyond any bound
FOREGROUND, MEAN = "mIoU of the foreground", "mIoU"
COMPLETE = "the same, where the split shows every class"
DIFFERENCE, GAP = "equals found to differ", "equals found to have a gap"
RATIO, HOLD, LEAVE_OUT = RULES = "jackknifed, ratio", "jackknifed, hold", "jackknifed, leave out"  # see iou_by_rule

Floats = NDArray[np.float64]
Ends = tuple[float, float]
Key = tuple[str, str, int, str]  # world, what was looked at, groups, method


@dataclass(frozen=True)
class World:
    """Parts, and systems that look for three kinds of defects on them.

    presence: share of the parts that have a defect of each kind. The other figures are the same in all worlds.
    """

    presence: tuple[float, float, float]
    in_image: float = 0.7  # share of a part's images that show a defect which the part has
    area: tuple[float, float, float] = (2000, 800, 3000)  # pixels, median of a defect
    area_spread: tuple[float, float] = (0.6, 0.9)  # of the log area: between parts, between a part's images
    found: tuple[float, float, float] = (1.5, 0.7, 0.3)  # logit of the share of a defect's pixels that is found
    found_spread: tuple[float, float, float] = (0.7, 0.5, 0.7)  # between parts; a system's own part of it; images
    mistaken: float = 0.25  # most of what is missed that is taken for another defect
    fringe: float = 0.3  # most of a defect's area that is found around it
    alarms: float = 0.25  # share of images with a false alarm of a kind
    alarm_area: float = 100  # pixels, median
    alarm_spread: tuple[float, float, float] = (0.7, 0.5, 1.0)  # of the log area: as of found_spread


WORLDS = {"common": World((0.8, 0.6, 0.4)), "rare": World((0.8, 0.4, 0.15))}


@dataclass(frozen=True)
class Split:
    """A test split: confusion matrices of each system, (systems, images, 4, 4), and each image's part."""

    confusions: NDArray[np.int64]
    groups: tuple[str, ...]


def draw_split(rng: np.random.Generator, world: World, groups: int, systems: int) -> Split:
    """So many parts of a world, with two to six images each, seen by systems that are equal in distribution."""
    own = np.repeat(np.arange(groups), rng.integers(2, 7, groups))  # (images,), the part of each
    shape = (len(own), 3)  # images, kinds of defects
    has = (rng.random((groups, 3)) < world.presence)[own] & (rng.random(shape) < world.in_image)
    parts, images = world.area_spread
    spread = rng.normal(0, parts, (groups, 3))[own] + rng.normal(0, images, shape)
    area = np.where(has, np.minimum(np.rint(world.area * np.exp(spread)), PIXELS / 10), 0).astype(np.int64)
    hard, noisy = rng.normal(0, world.found_spread[0], groups), rng.normal(0, world.alarm_spread[0], groups)
    seen = [_seen_by_one(rng, world, own, area, hard, noisy) for _ in range(systems)]
    return Split(np.stack(seen), tuple(f"{group:06}" for group in own))


def _seen_by_one(
    rng: np.random.Generator, world: World, own: NDArray[np.intp], area: NDArray[np.int64], hard: Floats, noisy: Floats
) -> NDArray[np.int64]:
    """Confusion matrices of one system, (images, 4, 4). hard, noisy: of each part, for all systems."""

    def of_parts(shared: Floats, spread: float) -> Floats:
        return (shared + rng.normal(0, spread, len(shared)))[own][:, None]  # (images, 1)

    def pixels(values: Floats) -> NDArray[np.int64]:
        return np.rint(values).astype(np.int64)

    _, system, image = world.found_spread
    share = world.found + of_parts(hard, system) + rng.normal(0, image, area.shape)
    hit = pixels(area / (1 + np.exp(-share)))
    mistaken = pixels((area - hit) * world.mistaken * rng.random(area.shape))
    _, system, image = world.alarm_spread
    alarm = world.alarm_area * np.exp(of_parts(noisy, system) + rng.normal(0, image, area.shape))
    alarm = pixels((rng.random(area.shape) < world.alarms) * alarm) + pixels(
        area * world.fringe * rng.random(area.shape)
    )
    matrices = np.zeros((len(area), 4, 4), dtype=np.int64)
    kinds = np.arange(1, 4)
    matrices[:, kinds, kinds] = hit
    matrices[:, kinds, kinds % 3 + 1] = mistaken
    matrices[:, 1:, 0] = area - hit - mistaken
    matrices[:, 0, 1:] = alarm
    matrices[:, 0, 0] = PIXELS - area.sum(1) - alarm.sum(1)
    return matrices


def textbook_t(sample: Resamples) -> Ends:
    """The bootstrap-t interval on the score's own scale, with two tails (Efron and Tibshirani, 1993, chapter 12)."""
    off = sample.values - sample.estimate
    distances = np.divide(off, sample.standard_errors, out=np.sign(off) * FAR, where=sample.standard_errors > 0)
    low, high = sample.estimate - np.quantile(distances, (0.975, 0.025)) * sample.standard_error
    return max(low, sample.bounds[0]), min(high, sample.bounds[1])


def plain_t(sample: Resamples) -> Ends:
    """Student's t on estimate and standard error: no resampling at all."""
    reach = student.ppf(0.975, len(sample.influence) - 1) * sample.standard_error
    return sample.estimate - reach, sample.estimate + reach


METHODS: Mapping[str, Callable[[Resamples], Ends]] = {
    "plain t": plain_t,
    "percentile": percentile_interval,
    "bca": bca_interval,
    "textbook t": textbook_t,
    "studentised": studentised_interval,
}
DEFAULT = "studentised"  # what score_interval and paired_difference use


def iou_by_rule(confusions: NDArray[np.int64], groups: Sequence[str], rule: str) -> Statistic:
    """Foreground mIoU, jackknifed, by another rule for a class that a resample's truth lacks and the split's has.

    rule: RATIO is that of pixel_statistic; HOLD takes the class's IoU on the whole split; LEAVE_OUT takes the mean over
    the other classes.
    """
    names, index = grouped(groups)
    sums = np.zeros((len(names), 4, 4))
    np.add.at(sums, index, confusions)
    hit, truth = np.diagonal(sums, axis1=1, axis2=2)[:, 1:], sums.sum(2)[:, 1:]  # (groups, classes)
    union = truth + sums.sum(1)[:, 1:] - hit
    counted = union.sum(0) > 0
    hit, truth, union = hit[:, counted], truth[:, counted], union[:, counted]
    whole, labelled = hit.sum(0) / union.sum(0), truth.sum(0) > 0

    def value(weights: Floats) -> Floats:
        unions, lacking = weights @ union, (weights @ truth == 0) & labelled  # (resamples, classes)
        iou = np.where(unions > 0, weights @ hit / np.maximum(unions, 1), whole)
        if rule == HOLD:
            return np.where(lacking, whole, iou).mean(1)
        known = ~lacking if rule == LEAVE_OUT else np.ones_like(lacking)
        return np.divide((iou * known).sum(1), known.sum(1), out=np.full(len(iou), np.nan), where=known.any(1))

    return jackknifed(value, names)


@dataclass
class Tally:
    """How often a thing was looked at, how often it was so, and the sum of the intervals' widths."""

    looks: int = 0
    times: int = 0
    width: float = 0.0

    def add(self, other: "Tally") -> None:
        """Count what the other has counted, too."""
        self.looks += other.looks
        self.times += other.times
        self.width += other.width

    @property
    def share(self) -> float:
        """Of the looks, how often it was so."""
        return self.times / self.looks

    def __str__(self) -> str:
        return f"{100 * self.share:.1f} ({100 * self.width / self.looks:.1f})"


Looks = Iterator[tuple[str, str, Tally]]  # what was looked at, method


def look_at_scores(world: str, split: Split, truth: Mapping[str, float], seed: int) -> Looks:
    """Whether the intervals of the first system's scores hold the world's."""
    confusions, groups = split.confusions[0], split.groups
    statistics = {FOREGROUND: pixel_statistic(confusions, groups)}
    lacks_some = world == "rare" and len(set(groups)) in FEW
    if lacks_some:
        statistics |= {rule: iou_by_rule(confusions, groups, rule) for rule in RULES}
    if world == "common":
        statistics[MEAN] = pixel_statistic(confusions, groups, "miou")
    complete = lacks_some and min(groups_with_truth(confusions, groups)) > 0
    for what, statistic in statistics.items():
        sample = resample(statistic, RESAMPLES, seed)
        for method, interval in METHODS.items():
            low, high = interval(sample)
            tally = Tally(1, low <= truth[MEAN if what == MEAN else FOREGROUND] <= high, high - low)
            yield what, method, tally
            if what == FOREGROUND and complete:
                yield COMPLETE, method, tally


def look_at_equals(first: Split, second: Split, seed: int) -> Looks:
    """Whether two systems that are equal are found to differ, on one test set, and on one more than on another."""
    pairs = [
        [pixel_statistic(confusions, split.groups) for confusions in split.confusions] for split in (first, second)
    ]
    sample = resample(difference_of(*pairs[0]), RESAMPLES, seed)
    for method, interval in METHODS.items():
        low, high = interval(sample)
        if method != DEFAULT:
            yield DIFFERENCE, method, Tally(1, not low <= 0 <= high, high - low)
    found = paired_difference(*pairs[0], resamples=RESAMPLES, seed=seed)
    yield DIFFERENCE, DEFAULT, Tally(1, found.p_value <= REJECTED, found.high - found.low)
    gap = modality_gap((pairs[0][0], pairs[0][1]), (pairs[1][0], pairs[1][1]), resamples=RESAMPLES, seed=seed)
    yield GAP, DEFAULT, Tally(1, gap.p_value <= REJECTED, gap.high - gap.low)


@dataclass(frozen=True)
class Task:
    """Some replications: test splits of so many groups of a world whose scores are `truth`."""

    world: str
    groups: int
    truth: Mapping[str, float]
    replications: int
    seed: tuple[int, int]


def look_often(task: Task) -> dict[Key, Tally]:
    """The tallies of a task."""
    rng = np.random.default_rng(task.seed)
    tallies: dict[Key, Tally] = defaultdict(Tally)
    for _ in range(task.replications):
        first, second = (draw_split(rng, WORLDS[task.world], task.groups, 2) for _ in range(2))
        seed = int(rng.integers(2**31))
        looks = chain(look_at_scores(task.world, first, task.truth, seed), look_at_equals(first, second, seed))
        for what, method, tally in looks:
            tallies[task.world, what, task.groups, method].add(tally)
    return dict(tallies)


def true_scores(world: World, seed: int) -> dict[str, float]:
    """mIoU with and without the background over a great many parts of a world."""
    split = draw_split(np.random.default_rng([seed, TRUE_GROUPS]), world, TRUE_GROUPS, 1)
    scores = iou_scores(split.confusions[0].sum(0))
    return {FOREGROUND: scores.miou_foreground, MEAN: scores.miou}


def run(pool: ProcessPoolExecutor, replications: int, seed: int) -> dict[Key, Tally]:
    """All tallies of the worlds of parts."""
    tasks: list[Task] = []
    for name, world in WORLDS.items():
        truth = true_scores(world, seed)
        for groups in reversed(SIZES):  # the longest first
            for begin in range(0, replications, CHUNK):
                tasks.append(Task(name, groups, truth, min(CHUNK, replications - begin), (seed, len(tasks))))
    tallies: dict[Key, Tally] = defaultdict(Tally)
    for part in pool.map(look_often, tasks):
        for key, tally in part.items():
            tallies[key].add(tally)
    return dict(tallies)


def rows_of(tallies: Mapping[Key, Tally]) -> list[dict[str, str]]:
    """A line for each world, thing and number of groups: percent of the replications, mean width in points."""
    rows = []
    for world in WORLDS:
        for what in (FOREGROUND, COMPLETE, MEAN, *RULES, DIFFERENCE, GAP):
            for groups in SIZES:
                cells = {method: str(tallies.get((world, what, groups, method), "")) for method in METHODS}
                if any(cells.values()):
                    rows.append({"world: what": f"{world}: {what}", "groups": str(groups)} | cells)
    return rows


def shares(tallies: Mapping[Key, Tally]) -> dict[str, dict[str, dict[int, float]]]:
    """World and what was looked at -> method -> groups -> share of the replications."""
    result: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for (world, what, groups, method), tally in tallies.items():
        result[f"{world}: {what}"][method][groups] = round(tally.share, 4)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replications", type=positive, default=TABLES, help="test splits of each size")
    parser.add_argument("--workers", type=positive, default=os.cpu_count(), help="processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--groups-only", action="store_true", help="count no seeds; a control that must fail")
    parser.add_argument("--world", choices=["all", "images"], default="all", help="the world of whole images alone")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the children: their matrices are too small to be shared out
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        images = look_at_images(pool, options.replications, options.seed)
        print("whole images: percent of the test splits whose interval holds the score, or that show equals to differ")
        print_table(rows_of_images(images))
        if options.world == "images":
            result = {
                "name": "coverage of image scores",
                "ratio": round(images["common", "auroc", str(AT)].share, 4),
                "target": LEAST[AT],
                "holds": images_hold(images),
                "cpus": os.cpu_count(),
                "replications": options.replications,
                "resamples": RESAMPLES,
                "rejected": round(images["common", EQUALS, str(AT)].share, 4),
                **json_of_images(images),
            }
            return print(json.dumps(result))
        tallies = run(pool, options.replications, options.seed)
        counts = look_at_seeds(pool, options.replications, options.seed, counted=not options.groups_only)
    print("percent of the test splits whose interval holds the score, or that show a difference (mean width in points)")
    print_table(rows_of(tallies))
    print("\npercent of the tables that show equal procedures to differ, and that show a lead of a point")
    print("P: sd of procedure x group in points; +: looked at again with more tables; !: outside its limits")
    print_table(rows_of_seeds(counts))
    for results in RESULTS:
        ours, by_t = power(counts, results)
        print(f"mean power with {results} results: {100 * ours:.1f} (Student's t over seed means {100 * by_t:.1f})")
    covered = {groups: tallies["common", FOREGROUND, groups, DEFAULT].share for groups in SIZES}
    rejected = tallies["common", DIFFERENCE, AT, DEFAULT].share
    parts_hold = all(covered[n] >= least for n, least in LEAST.items()) and abs(rejected - REJECTED) <= WITHIN
    result = {
        "name": "coverage",
        "ratio": round(covered[AT], 4),
        "target": LEAST[AT],
        "holds": parts_hold and seeds_hold(counts) and images_hold(images),
        "cpus": os.cpu_count(),
        "replications": options.replications,
        "resamples": RESAMPLES,
        "rejected": round(rejected, 4),
        "shares": shares(tallies),
        **json_of_seeds(counts),
        **json_of_images(images),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
