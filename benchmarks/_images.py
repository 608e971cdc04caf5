"""The world of benchmarks/coverage.py in which whole images are scored: good ones and ones with a defect.

Parts with several images; a part may have a defect, which most of its images show. A system gives each image a score:
higher with a defect, with what is the part's own, what the image's own, and what the system makes of either. The scores
look as those of a head for images do, so that the intervals are those that `compare` makes. Equal systems differ in
their own shares alone; trained ones also have a part per seed, in how well they tell defects.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from featprobe.metrics import (
    IMAGE_SCORES,
    ScoredImages,
    Statistic,
    decide,
    image_statistic,
    paired_difference,
    procedure_difference,
    score_interval,
    seed_spread,
)
from featprobe.metrics.images import one_group, value_of

SIZES = (12, 24, 48, 100)  # groups of a test split
SEEDS = (2, 3, 5)
WORLDS = {"common": 0.5, "rare": 0.15}  # share of parts with a defect
LOOKED_AT = ("auroc", "average_precision", "balanced_accuracy", "macro_f1", "recall")
EQUALS, NONE = "equals found to differ", "no interval of the AUROC"
TRUE_GROUPS = 40_000
RESAMPLES, CHUNK = 999, 50  # of one interval; test splits of one task of the pool
LEAST = {12: 0.90, 48: 0.93, 100: 0.93}  # coverage of the AUROC that must be reached in the common world
REJECTED = 0.05  # p value up to which equals count as found to differ
MOST = {"": 0.065, "x2": 0.075, "x3": 0.065, "x5": 0.065}  # of equals that may differ; none, or so many seeds
AT, FEWEST = 100, {"": 0.035, "x2": 0.02, "x3": 0.035, "x5": 0.035}  # and how many must, at so many groups

LIFT, SHOWN = 2.0, 0.7  # of a defect, on the logit; share of a part's images that show it
PART_SD, IMAGE_SD = (0.7, 0.4), (0.6, 0.5)  # of all systems; of each: of a part's logit, of an image's
SEED_SD, SEED_PART_SD = 0.1, 0.3  # of a seed's lift; of seed x part
CALLED = 0.8  # logit above which an image is called

Floats = NDArray[np.float64]
Key = tuple[str, str, str]  # world, what was looked at, groups (x seeds)


@dataclass(frozen=True)
class Parts:
    """Images of parts: the part of each, whether it has a defect, and what all systems see in it, (images,) each."""

    part: NDArray[np.intp]
    defect: NDArray[np.bool_]
    shared: Floats


def draw_parts(rng: np.random.Generator, groups: int, share: float) -> Parts:
    """So many parts, with two to six images each."""
    part = np.repeat(np.arange(groups), rng.integers(2, 7, groups))
    defect = (rng.random(groups) < share)[part] & (rng.random(len(part)) < SHOWN)
    shared = rng.normal(0, PART_SD[0], groups)[part] + rng.normal(0, IMAGE_SD[0], len(part))
    return Parts(part, defect, shared)


def seen(rng: np.random.Generator, parts: Parts, *, lift: float = LIFT, own: Floats | None = None) -> ScoredImages:
    """What a system makes of them. own: what it makes of each part, (groups,); None: drawn."""
    groups = int(parts.part.max()) + 1
    own = rng.normal(0, PART_SD[1], groups) if own is None else own
    logit = lift * (parts.defect - 0.5) + parts.shared + own[parts.part] + rng.normal(0, IMAGE_SD[1], len(parts.part))
    shares = np.stack([expit(-logit), expit(logit)], axis=1).astype(np.float32)
    return ScoredImages(
        ids=tuple(map(str, range(len(logit)))),
        groups=tuple(f"{number:06}" for number in parts.part.tolist()),
        probabilities=shares,
        truth=np.stack([~parts.defect, parts.defect], axis=1).astype(np.uint8),
        decided=decide(shares, np.array([0.5, 0.5]), multi=False),
        thresholds=np.full(len(logit), expit(CALLED)),
        good=0,
    )


@dataclass
class Tally:
    """How often a thing was looked at, how often it was so, and the sum of the intervals' widths."""

    looks: int = 0
    times: int = 0
    width: float = 0.0

    def add(self, times: int, width: float = 0.0, looks: int = 1) -> None:
        """Count a look, or those of another tally. times: how often it was so."""
        self.looks, self.times, self.width = self.looks + looks, self.times + times, self.width + width

    @property
    def share(self) -> float:
        """Of the looks, how often it was so."""
        return self.times / max(1, self.looks)


@dataclass(frozen=True)
class Task:
    """Some test splits of a world whose scores are `truth`."""

    world: str
    groups: int
    truth: Mapping[str, float]
    splits: int
    seed: tuple[int, ...]


def look(task: Task) -> dict[Key, Tally]:
    """The tallies of a task."""
    rng = np.random.default_rng(task.seed)
    tallies: dict[Key, Tally] = defaultdict(Tally)
    for _ in range(task.splits):
        parts, seed = draw_parts(rng, task.groups, WORLDS[task.world]), int(rng.integers(2**31))
        one, other, score_known = seen(rng, parts), seen(rng, parts), False
        for name in LOOKED_AT:
            found = score_interval(image_statistic(one, name), resamples=RESAMPLES, seed=seed)
            if found.has_interval:
                so = found.low <= task.truth[name] <= found.high
                tallies[task.world, name, str(task.groups)].add(so, found.high - found.low)
            score_known |= name == "auroc" and found.has_interval
        difference = paired_difference(
            image_statistic(one, "auroc"), image_statistic(other, "auroc"), resamples=RESAMPLES, seed=seed
        )
        if not np.isnan(difference.p_value):
            width = difference.high - difference.low
            tallies[task.world, EQUALS, str(task.groups)].add(difference.p_value <= REJECTED, width)
        tallies[task.world, NONE, str(task.groups)].add(not score_known)
        for what, rejected in _of_procedures(rng, parts, seed) if task.world == "common" else ():
            tallies[task.world, EQUALS, f"{task.groups}x{what}"].add(rejected)
    return dict(tallies)


def _of_procedures(rng: np.random.Generator, parts: Parts, seed: int) -> Iterator[tuple[int, bool]]:
    """Whether equal procedures with so many seeds are found to differ, by the functions that `compare` calls."""
    most = max(SEEDS)
    groups = int(parts.part.max()) + 1
    every = [[_run(rng, parts, own) for _ in range(most)] for own in rng.normal(0, PART_SD[1], (2, groups))]
    for count in SEEDS:
        one, other = (own[:count] for own in every)
        if not np.isnan(value_of(one[0])):
            spread = seed_spread([one, other])
            found = procedure_difference(one, other, spread, resamples=RESAMPLES, seed=seed)
            yield count, found.p_value <= REJECTED


def _run(rng: np.random.Generator, parts: Parts, own: Floats) -> Statistic:
    """The AUROC of one seed of a procedure that makes this of each part."""
    lift = LIFT + rng.normal(0, SEED_SD)
    return image_statistic(seen(rng, parts, lift=lift, own=own + rng.normal(0, SEED_PART_SD, len(own))), "auroc")


def true_scores(world: str, seed: int) -> dict[str, float]:
    """The scores of a great many parts of a world."""
    rng = np.random.default_rng([seed, TRUE_GROUPS])
    images = seen(rng, draw_parts(rng, TRUE_GROUPS, WORLDS[world]))
    every = one_group(len(images.ids))
    return {name: value_of(IMAGE_SCORES[name](images, every)) for name in LOOKED_AT}


def look_at_images(pool: ProcessPoolExecutor, splits: int, seed: int) -> dict[Key, Tally]:
    """All tallies: so many test splits of each size and world."""
    tasks: list[Task] = []
    for world in WORLDS:
        truth = true_scores(world, seed)
        for groups in reversed(SIZES):  # the longest first
            for begin in range(0, splits, CHUNK):
                tasks.append(Task(world, groups, truth, min(CHUNK, splits - begin), (seed, len(tasks), 7)))
    tallies: dict[Key, Tally] = defaultdict(Tally)
    for part in pool.map(look, tasks):
        for key, own in part.items():
            tallies[key].add(own.times, own.width, own.looks)
    return dict(tallies)


def images_hold(tallies: Mapping[Key, Tally]) -> bool:
    """Whether the AUROC of the common world is covered, and equals differ no more often than they may.

    With few groups they differ less often, for which there is no limit.
    """
    covered = all(tallies["common", "auroc", str(n)].share >= least for n, least in LEAST.items())
    share = {(n, seeds): tallies["common", EQUALS, f"{n}{seeds}"].share for n in SIZES for seeds in MOST}
    within = all(own <= MOST[seeds] for (_, seeds), own in share.items())
    return covered and within and all(share[AT, seeds] >= least for seeds, least in FEWEST.items())


def rows_of_images(tallies: Mapping[Key, Tally]) -> list[dict[str, str]]:
    """A line for each world and number of groups: percent of the splits, mean width in points."""
    rows = []
    for world in WORLDS:
        for groups in SIZES:
            row = {"world": world, "groups": str(groups)}
            row[NONE] = f"{100 * tallies.get((world, NONE, str(groups)), Tally()).share:.1f}"
            for what in (*LOOKED_AT, EQUALS):
                own = tallies.get((world, what, str(groups)), Tally())
                row[what] = f"{100 * own.share:.1f} ({100 * own.width / max(1, own.looks):.1f})"
            for count in SEEDS:
                own = tallies.get((world, EQUALS, f"{groups}x{count}"))
                row[f"equals, {count} seeds"] = f"{100 * own.share:.1f}" if own else ""
            rows.append(row)
    return rows


def json_of_images(tallies: Mapping[Key, Tally]) -> dict[str, object]:
    """Shares by world, what was looked at, and groups."""
    shares: dict[str, dict[str, float]] = defaultdict(dict)
    for (world, what, groups), own in tallies.items():
        shares[f"{world}: {what}"][groups] = round(own.share, 4)
    return {"image_world": dict(shares), "image_holds": images_hold(tallies)}
