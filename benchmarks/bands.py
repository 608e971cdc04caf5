"""How often the intervals of `inspect` hold the true recall, where defects and false calls come in parts.

    python benchmarks/bands.py

Recall by size: groups of a few defects, all with a probability of their own of being found, of which recall and
correlation are known (beta-binomial). Two intervals are made of each set: that of `clustered_interval`, and the plain
exact one, as if defects were independent (a control, which must fail where they are not).

FROC: parts of four images, some hard, some noisy, so that defects of a part are missed together and false calls come
together. The true curve is that of 20,000 parts. It is counted how often the band of `froc` holds its recall, at four
numbers of false calls per image. `ratio` is the least coverage of all.
"""

import argparse
import itertools
import json
import os

import numpy as np
from _bench import positive, print_table

from featprobe.metrics.defects.froc import froc
from featprobe.metrics.defects.records import (
    DEFECT,
    GOOD,
    NOTHING,
    TOUCHES,
    About,
    Calls,
    Defects,
    FoundRule,
    Images,
    Records,
)
from featprobe.metrics.defects.shares import clustered_interval, exact_interval

GROUPS, PER_GROUP, RECALLS, CORRELATIONS = (5, 10, 20, 40), (1.5, 4.0), (0.5, 0.8, 0.95), (0.0, 0.2, 0.5)
PARTS, RATES, TRUE_PARTS, VIEWS = (12, 24, 48, 100), (0.05, 0.1, 0.2, 0.5), 20_000, 4
RESAMPLES = 400
LEAST = 0.93  # as for other intervals, see coverage.py


def shares(sets: int) -> list[dict[str, float]]:
    """Coverage of both intervals for each number of groups, defects per group, recall and correlation."""
    found = []
    for groups, mean, recall, correlation in itertools.product(GROUPS, PER_GROUP, RECALLS, CORRELATIONS):
        rng = np.random.default_rng(1)
        trials = 1 + rng.poisson(mean - 1, (sets, groups))
        each = np.full(trials.shape, recall)
        if correlation:
            strength = (1 - correlation) / correlation
            each = rng.beta(recall * strength, (1 - recall) * strength, trials.shape)
        hits = rng.binomial(trials, each).astype(float)
        ends = clustered_interval(hits, trials.astype(float)), exact_interval(hits.sum(1), trials.sum(1))
        own, plain = (float(np.mean((low <= recall) & (recall <= high))) for low, high in ends)
        found.append({"groups": groups, "per group": mean, "recall": recall, "correlation": correlation}
                     | {"covers": own, "plain": plain})  # fmt: skip
    return found


def parts(rng: np.random.Generator, count: int) -> Records:
    """Records of some parts: a defect is found at its score, and every other call is false."""
    hard, noisy = rng.normal(0, 1.2, count), rng.gamma(1, 1, count)
    defects, false = rng.poisson(1.5, count), rng.poisson(3 * noisy)
    of_defect, of_false = (
        np.sort(np.repeat(np.arange(count), own) * VIEWS + rng.integers(0, VIEWS, own.sum()))
        for own in (defects, false)
    )
    logits = rng.normal(0.8, 1, len(of_defect)) - hard[of_defect // VIEWS]
    scores = [1 / (1 + np.exp(-own)) for own in (logits, rng.normal(-1, 1.2, len(of_false)))]
    image, score = np.concatenate([of_defect, of_false]), np.concatenate(scores).astype(np.float32)
    images = count * VIEWS
    good = np.full(images, GOOD, dtype=np.uint8)
    good[of_defect] = DEFECT
    names, none = tuple(f"{i:07}" for i in range(images)), np.full((images, 2), np.nan, dtype=np.float32)
    groups = tuple(f"{i // VIEWS:07}" for i in range(images))
    touched = np.repeat(np.array([TOUCHES, NOTHING], dtype=np.uint8), [len(of_defect), len(of_false)])
    own, pairs = np.arange(len(of_defect)), np.zeros(len(of_defect), dtype=np.float32)
    return Records(
        About("detect", "fcos", "", ("background", "crack"), FoundRule(), np.nan, "", True),
        Images(names, groups, ("test",) * images, names, names, good, none[:, 0], none, np.zeros((images, 2), int)),
        Defects(**_objects(of_defect), score=score[: len(own)], contrast=pairs, cut=pairs > 0),
        Calls(**_objects(image), score=score, touched=touched),
        np.stack([own, own], axis=1),
    )


def _objects(image: np.ndarray) -> dict[str, np.ndarray]:
    sizes = np.ones((len(image), 4), dtype=np.float32)
    category = np.ones(len(image), dtype=np.uint8)
    return {"image": image, "category": category, "boxes": sizes, "pixels": sizes, "millimetres": sizes}


def curves(sets: int) -> list[dict[str, float]]:
    """Coverage and mean width of the band for each number of parts and of false calls."""
    rng = np.random.default_rng(0)
    truth, found = froc(parts(rng, TRUE_PARTS), resamples=2), []
    for count in PARTS:
        inside = {rate: list[tuple[bool, float]]() for rate in RATES}
        for _ in range(sets):
            curve = froc(parts(rng, count), resamples=RESAMPLES)
            for rate in RATES:  # the band is known at some rates: at the nearest below
                at = int(np.searchsorted(curve.rates, rate + 1e-9, "right")) - 1
                low, high = curve.low[at], curve.high[at]
                inside[rate].append((bool(low <= truth.recall_at(curve.rates[at]) <= high), high - low))
        for rate, own in inside.items():
            covers, width = np.mean(own, axis=0).tolist()
            found.append({"parts": count, "false calls per image": rate, "covers": covers, "width": width})
    return found


def main() -> None:
    """Print the tables and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=positive, default=2000, help="of each kind for recalls (default 2000)")
    parser.add_argument("--curves", type=positive, default=400, help="of each number of parts (default 400)")
    given = parser.parse_args()
    by_size, by_rate = shares(given.sets), curves(given.curves)
    for table in (by_size, by_rate):
        print_table([{name: f"{value:.3g}" for name, value in row.items()} for row in table])
        print()
    least, of_band = (min(row["covers"] for row in table) for table in (by_size, by_rate))
    plain = min(row["plain"] for row in by_size)
    ratio = min(least, of_band)
    said = {"name": "bands", "ratio": ratio, "target": LEAST, "holds": ratio >= LEAST, "cpus": os.cpu_count()}
    print(json.dumps(said | {"clustered": least, "plain": plain, "band": of_band, "sets": given.sets}))


if __name__ == "__main__":
    main()
