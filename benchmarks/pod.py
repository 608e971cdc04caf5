"""One-sided bounds of a90 that should lie above the true a90 in 95 of 100 sets of targets.

    python benchmarks/pod.py

Sets of targets that are found or missed are drawn from curves that are known, and for each the bounds of a90 are made
by the functions that `hit_miss` calls. Counted is how often a bound is above the true a90. An infinite bound is, and
the share of infinite ones stands in brackets. Sets that are refused are not counted; their share stands beside it.

In worlds of clusters the targets of a cluster have something in common, normal on the scale of the logit; the true a90
is that of all clusters together. There several kinds of bounds are compared on the same sets.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from _bench import positive, print_table
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import norm

from featprobe.metrics.pod.bounds import ALONE, DETECTED, TOGETHER, upper_a90
from featprobe.metrics.pod.clustered import Clusters, a90_of, resampled_a90, robust_a90, studentised
from featprobe.metrics.pod.coverage import ALONE_COVERS, CLUSTERED_COVERS
from featprobe.metrics.pod.lack_of_fit import lack_of_fit
from featprobe.metrics.pod.maximum_likelihood import LINKS, Fit, Floats, Model, fit, solved
from featprobe.metrics.pod.pod_values import Link
from featprobe.metrics.pod.refusals import OF_EACH

LEAST, MOST = {60: 0.905, 120: 0.920, 300: 0.935}, 0.97  # coverage by number of targets
DRAWS = 199
MANY = 330  # targets, beyond which a world of clusters takes too long
CHUNK = 100  # sets of one bootstrap


@dataclass(frozen=True)
class World:
    """P(x) = F(b0 + b1 x), x the logarithm of a size, uniform between two ends. clusters: their sizes, repeated until
    there are as many as wanted; none for single targets. spread: sd of what a cluster has in common, on the argument
    of F. alike: correlation of the sizes in a cluster.
    """

    b0: float
    b1: float
    ends: tuple[float, float]
    link: Link = "logit"
    clusters: tuple[int, ...] = ()
    spread: float = 0.0
    alike: float = 0.0

    def true_a90(self) -> float:
        nodes, weights = np.polynomial.hermite_e.hermegauss(80)

        def above(x: float) -> float:
            each = LINKS[self.link].cdf(self.b0 + self.b1 * x + self.spread * nodes)
            return float(each @ weights / weights.sum()) - DETECTED

        return float(brentq(above, -50, 50))

    def draw(self, rng: np.random.Generator, sets: int, sizes: NDArray[np.intp]) -> tuple[Floats, NDArray[np.bool_]]:
        """x and whether each target is found, (sets, targets) both. sizes: of clusters, (clusters,)."""
        targets, shape = int(sizes.sum()), (sets, len(sizes))
        common = np.repeat(rng.normal(size=shape), sizes, -1)
        place = norm.cdf(np.sqrt(self.alike) * common + np.sqrt(1 - self.alike) * rng.normal(size=(sets, targets)))
        x = self.ends[0] + (self.ends[1] - self.ends[0]) * place
        shared = np.repeat(rng.normal(0, self.spread, shape), sizes, -1)
        return x, rng.random(x.shape) < LINKS[self.link].cdf(self.b0 + self.b1 * x + shared)


WORLDS = {
    "usual": World(0, 2, (-1.5, 1.5)),
    "steep": World(0, 4, (-1.5, 1.5)),
    "few small targets": World(0, 3, (-1, 2)),
    "slow growth": World(0, 1, (-2, 3)),
    "usual, probit": World(0, 1.2, (-1.5, 1.5), "probit"),
}
HARDLY_GROWS = {"hardly any growth": World(0.5, 0.4, (-1.5, 1.5))}
CLUSTERED = {
    "threes, sd 1.5": World(0, 3, (-1.5, 1.5), "logit", (3,), 1.5),
    "threes, sd 1.5, sizes alike": World(0, 3, (-1.5, 1.5), "logit", (3,), 1.5, 0.9),
    "threes, sd 3, sizes alike": World(0, 5, (-1.5, 1.5), "logit", (3,), 3.0, 0.9),
    "one to nine, sd 1.5": World(0, 3, (-1.5, 1.5), "logit", (1, 1, 2, 3, 9), 1.5, 0.5),
    "tens, sd 1.5": World(0, 3, (-1.5, 1.5), "logit", (10,), 1.5, 0.5),
    "threes, independent": World(0, 2, (-1.5, 1.5), "logit", (3,)),
}


@dataclass(frozen=True)
class Drawn:
    """Sets that are not refused, their fits, and the share that is refused."""

    model: Model
    fitted: Fit
    refused: float


def drawn(world: World, seed: tuple[int, int], sets: int, sizes: NDArray[np.intp]) -> Drawn:
    """Sets of a world, each refused by the rules of `refusal`."""
    x, found = world.draw(np.random.default_rng(seed), sets, sizes)
    hits, misses = np.where(found, x, np.nan), np.where(found, np.nan, x)
    enough = np.minimum(found.sum(-1), (~found).sum(-1)) >= OF_EACH
    x, found, hits, misses = x[enough], found[enough], hits[enough], misses[enough]
    overlap = (np.nanmax(misses, -1) > np.nanmin(hits, -1)) & (np.nanmax(hits, -1) > np.nanmin(misses, -1))
    kept = overlap & (np.nanmean(hits, -1) > np.nanmean(misses, -1))
    x, found = x[kept], found[kept]
    model = Model(LINKS[world.link], np.where(found, 1.0, -1.0), np.stack([np.ones_like(x), x], -2))
    return Drawn(model, fit(model, np.zeros((len(x), 2))), 1 - len(x) / sets)


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def covered(bounds: Floats, true: float) -> str:
    """Share of bounds above the truth; share that is infinite, in brackets."""
    return f"{percent(float(np.mean(bounds >= true)))} ({percent(float(np.mean(np.isinf(bounds))))})"


def look_at_single(sets: int) -> tuple[list[dict[str, str]], dict[int, list[float]]]:
    """A row for each world and number of targets; coverage by number of targets of the worlds that count."""
    rows: list[dict[str, str]] = []
    shares: dict[int, list[float]] = {targets: [] for targets in LEAST}
    for place, (name, world) in enumerate((WORLDS | HARDLY_GROWS).items()):
        for targets in LEAST:
            one = drawn(world, (place, targets), sets, np.ones(targets, int))
            true, bounds = world.true_a90(), upper_a90(one.model, one.fitted, ALONE)
            joint = upper_a90(one.model, one.fitted, TOGETHER)
            p_values = lack_of_fit(one.model, one.fitted)
            rows.append({
                "single targets": name,
                "targets": str(targets),
                "a90/95 (infinite)": covered(bounds, true),
                "joint set (infinite)": covered(joint, true),
                "rejected at 5 %": percent(float(np.mean(p_values < 0.05))),
                "at 1 %": percent(float(np.mean(p_values < 0.01))),
                "refused": percent(one.refused),
            })  # fmt: skip
            if name in WORLDS:
                shares[targets].append(float(np.mean(bounds >= true)))
    return rows, shares


def bca(a90: Floats, influences: Floats, resampled: Floats) -> Floats:
    """The BCa bound of a bootstrap over clusters. influences: of each cluster on a90, (sets, clusters)."""
    draws = resampled.shape[-1]
    below = (resampled < a90[:, None]).mean(-1) + (resampled == a90[:, None]).mean(-1) / 2
    bias, z = norm.ppf(np.clip(below, 0.5 / draws, 1 - 0.5 / draws)), norm.ppf(0.95)
    bend = (influences**3).sum(-1) / (6 * (influences**2).sum(-1) ** 1.5)
    level = norm.cdf(bias + (bias + z) / (1 - bend * (bias + z)))
    return at_level(resampled, level)


def at_level(resampled: Floats, level: Floats) -> Floats:
    """The value of each set's resamples below which a share of them lies."""
    place = np.clip((level * resampled.shape[-1]).astype(int), 0, resampled.shape[-1] - 1)
    return np.take_along_axis(np.sort(resampled, -1), place[:, None], -1)[:, 0]


def clustered_bounds(model: Model, fitted: Fit, clusters: Clusters, rng: np.random.Generator) -> dict[str, Floats]:
    """Each kind of bound of some sets."""
    (a90, error), (others, errors) = a90_of(model, fitted, clusters), resampled_a90(model, fitted, clusters, DRAWS, rng)
    robust, _ = robust_a90(model, fitted, clusters)
    student = studentised(a90, error, others, errors)
    scores, bend = model.derivatives(fitted.weights)
    sums = clusters.sums(scores[..., None, :] * model.columns)
    direction = np.stack([np.ones_like(a90), a90], -1)
    influences = -np.einsum("sk,skg->sg", solved(model.information(bend), direction), sums)
    return {
        "plain": upper_a90(model, fitted),
        "Wald, robust": a90 + norm.ppf(0.95) * error,
        "percentile": at_level(others, np.full(len(a90), 0.95)),
        "BCa": bca(a90, influences, others),
        "likelihood, robust": robust,
        "studentised": student,
        "given": np.where(np.isinf(robust), np.inf, student),
    }


def look_at_clusters(sets: int) -> tuple[list[dict[str, str]], dict[int, list[float]]]:
    """A row for each world of clusters and number of them; coverage of what is given, by number of clusters."""
    rows: list[dict[str, str]] = []
    shares: dict[int, list[float]] = {clusters: [] for clusters in CLUSTERED_COVERS}
    for place, (name, world) in enumerate(CLUSTERED.items()):
        for number in CLUSTERED_COVERS:
            sizes = np.resize(world.clusters, number)
            if not min(LEAST) <= sizes.sum() <= MANY:
                continue
            one, true = drawn(world, (place, number), sets, sizes), world.true_a90()
            rng, parts = np.random.default_rng((place, number)), []
            for begin in range(0, len(one.model.signs), CHUNK):
                cut = slice(begin, begin + CHUNK)
                model = Model(one.model.link, one.model.signs[cut], one.model.columns[cut])
                fitted = Fit(one.fitted.weights[cut], one.fitted.log_likelihood[cut], one.fitted.converged[cut])
                parts.append(clustered_bounds(model, fitted, Clusters(sizes), rng))
            bounds = {kind: np.concatenate([part[kind] for part in parts]) for kind in parts[0]}
            p_values = lack_of_fit(one.model, one.fitted, Clusters(sizes))
            cells = {kind: covered(values, true) for kind, values in bounds.items()}
            rows.append({
                "clusters": name,
                "number": f"{number} ({sizes.sum()})",
                **cells,
                "rejected at 5 %": percent(float(np.mean(p_values < 0.05))),
                "refused": percent(one.refused),
            })  # fmt: skip
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            shares[number].append(float(np.mean(bounds["given"] >= true)))
    return rows, shares


def as_published(published: Mapping[int, float], shares: Mapping[int, list[float]], sets: int) -> bool:
    """Whether the least share of each number is what `hit_miss` publishes, within three standard errors."""
    errors = {number: 3 * np.sqrt(share * (1 - share) / sets) for number, share in published.items()}
    return all(abs(min(shares[number]) - share) <= errors[number] for number, share in published.items())


def main() -> None:
    """Draw, print both tables, and the figures last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=positive, default=2000)
    parser.add_argument("--clustered-sets", type=positive, default=400)
    options = parser.parse_args()
    rows, single = look_at_single(options.sets)
    print_table(rows)
    print(flush=True)
    rows, clustered = look_at_clusters(options.clustered_sets)
    print_table(rows)
    means = {targets: float(np.mean(shares)) for targets, shares in single.items()}
    most = max(max(shares) for shares in single.values())
    published = as_published(ALONE_COVERS, single, options.sets)
    published &= as_published(CLUSTERED_COVERS, clustered, options.clustered_sets)
    ratio = min(min(single[targets]) / least for targets, least in LEAST.items())
    result = {
        "name": "pod",
        "ratio": round(ratio, 4),
        "target": 1.0,
        "holds": ratio >= 1 and most <= MOST and published,
        "cpus": os.cpu_count(),
        "covers": {targets: round(share, 4) for targets, share in means.items()},
        "least": {targets: round(min(shares), 4) for targets, shares in single.items()},
        "most": round(most, 4),
        "least_of_clusters": {number: round(min(shares), 4) for number, shares in clustered.items()},
        "as_published": bool(published),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
