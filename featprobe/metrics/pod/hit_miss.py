"""Probability of detection from hits and misses."""

from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featprobe.errors import DataError, ShapeError, counted
from featprobe.metrics.pod.bounds import ALONE, DETECTED, TOGETHER, Inflation, band, upper_a90
from featprobe.metrics.pod.clustered import Clusters, clustered_a90, inflation_of, robust_a90
from featprobe.metrics.pod.coverage import CLUSTERED_COVERS, ENOUGH, coverage_of
from featprobe.metrics.pod.lack_of_fit import lack_of_fit
from featprobe.metrics.pod.maximum_likelihood import LINKS, Fit, Floats, Model, fit
from featprobe.metrics.pod.pod_values import Curve, Link, Pod, Refused
from featprobe.metrics.pod.refusals import barely_overlap, refusal

POINTS = 101  # of a curve
DOUBT = 0.05  # p-value of lack of fit below which a note warns
DRAWS, WORK = (199, 999), 2_000_000  # of clusters: the least and the most; fewer of many targets, so many in all
SEED = 0
BEYOND = 2.0  # times the smallest and the largest size, between which a curve is drawn


def hit_miss(
    sizes: ArrayLike, found: ArrayLike, clusters: Iterable[Hashable] | None = None, link: Link = "logit"
) -> Pod | Refused:
    """The POD curve of targets that were found or missed: P(a) = F(b0 + b1 ln a), by maximum likelihood.

    sizes: (targets,), > 0, in any unit. found: (targets,), whether each was found. clusters: (targets,), equal for
    targets that resemble each other, such as defects of one part; None where each stands for itself. a90_95 follows
    from the profile likelihood ratio of a90. Raises ShapeError when lengths differ, DataError for sizes that are not
    finite or not above 0.

    >>> rng = np.random.default_rng(0)
    >>> sizes = rng.uniform(1, 9, 120)
    >>> pod = hit_miss(sizes, rng.random(120) < sizes**3 / (sizes**3 + 4**3))  # in truth a50 is 4 and a90 8.3
    >>> round(pod.a50, 1), round(pod.a90, 1), round(pod.a90_95, 1)
    (4.6, 7.9, 9.7)

    MIL-HDBK-1823A, appendix G; for the joint set Cheng and Iles, Confidence bands for cumulative distribution functions
    of continuous random variables (1983).
    """
    size, hit, groups = _checked(sizes, found, clusters)
    refused = refusal(size, hit, None if groups is None else len(groups))
    if refused:
        return refused
    logs = np.log(size)
    scale = _Scale(float(logs.mean()), float(logs.std()))
    model = Model(LINKS[link], np.where(hit, 1.0, -1.0), np.stack([np.ones_like(logs), scale.x(logs)]))
    fitted = fit(model, np.zeros(2))
    if not fitted.converged:
        return barely_overlap(size, hit)
    return _Answer(link, size, hit, groups, scale, model, fitted).pod()


@dataclass(frozen=True)
class _Scale:
    """From ln sizes to x with mean 0 and standard deviation 1, and back."""

    middle: float
    spread: float

    def x(self, logs: Floats) -> Floats:
        return (logs - self.middle) / self.spread

    def size(self, x: float | Floats) -> Floats:
        with np.errstate(over="ignore"):
            return np.asarray(np.exp(self.middle + self.spread * np.asarray(x)))


@dataclass(frozen=True)
class _Answer:
    """A fit, and what is read off it. groups: None where each target stands for itself."""

    link: Link
    sizes: Floats
    found: NDArray[np.bool_]
    groups: Clusters | None
    scale: _Scale
    model: Model
    fitted: Fit

    def pod(self) -> Pod:
        a50, a90 = (self._size_at(share) for share in (0.5, DETECTED))
        number = len(self.sizes) if self.groups is None else len(self.groups)
        coverage, simulated = coverage_of(len(self.sizes), number)
        no_bound = _no_bound(number, coverage)
        x, reach, inflation = _bound(self.model, self.fitted, self.groups, wanted=not no_bound)
        wide = upper_a90(self.model, self.fitted, reach * TOGETHER / ALONE, inflation)
        bound, joint = float(self.scale.size(x)), float(self.scale.size(wide))
        misfit = float(lack_of_fit(self.model, self.fitted, self.groups))
        slope = float(self.fitted.weights[1]) / self.scale.spread
        return Pod(
            kind="hit/miss",
            link=self.link,
            intercept=float(self.fitted.weights[0]) - slope * self.scale.middle,
            slope=slope,
            a50=a50,
            a90=a90,
            a90_95=None if no_bound else bound,
            no_bound=no_bound,
            joint_a90_95=None if no_bound else joint,
            curve=self._curve([a50, a90] if no_bound else [a50, a90, bound], reach, inflation),
            lack_of_fit=None if np.isnan(misfit) else misfit,
            targets=len(self.sizes),
            hits=int(self.found.sum()),
            clusters=number,
            clustered=self.groups is not None,
            coverage=None if no_bound else coverage,
            simulated="" if no_bound else simulated,
            notes=tuple(_notes(self.sizes, a50, a90, None if no_bound else bound, misfit)),
        )

    def _size_at(self, share: float) -> float:
        b0, b1 = self.fitted.weights
        return float(self.scale.size((self.model.link.quantile(share) - b0) / b1))

    def _curve(self, shown: list[float], reach: Floats | float, inflation: Inflation | None) -> Curve:
        """Over the sizes of the targets, and as far as twice beyond them where that shows more."""
        smallest, largest = self.sizes.min(), self.sizes.max()
        first = max(min(smallest, *shown), smallest / BEYOND)
        last = min(max(largest, *shown), largest * BEYOND)
        sizes = np.geomspace(first, last, POINTS)
        x = self.scale.x(np.log(sizes))
        low, high = band(self.model, self.fitted, x, reach, inflation)
        cdf = self.model.link.cdf
        return Curve(sizes, cdf(self.fitted.weights[0] + self.fitted.weights[1] * x), cdf(low), cdf(high))


def _checked(
    sizes: ArrayLike, found: ArrayLike, clusters: Iterable[Hashable] | None
) -> tuple[Floats, NDArray[np.bool_], Clusters | None]:
    """Sizes, hits and clusters; targets in the order of their clusters. No clusters where each has one target."""
    size, hit = np.asarray(sizes, dtype=float), np.asarray(found, dtype=bool)
    labels = list(range(len(size)) if clusters is None else clusters)
    if size.ndim != 1 or hit.shape != size.shape or len(labels) != len(size):
        raise ShapeError(f"Targets have {size.shape} sizes, {hit.shape} hits and {len(labels)} clusters; wanted: (n,).")
    wrong = np.flatnonzero(~(np.isfinite(size) & (size > 0)))
    if len(wrong):
        raise DataError(
            f"{counted(len(wrong), 'size')} of {counted(len(size), 'target')} can't be used.\n"
            "  wanted  above 0 and finite\n"
            f"  found   {size[wrong[0]]} (the first, target {wrong[0]})\n"
            "Leave out targets without a size, or choose another kind of size."
        )
    members = defaultdict(list)
    for label, one in zip(labels, zip(size.tolist(), hit.tolist(), strict=True), strict=True):
        members[label].append(one)
    if len(members) == len(size):
        return size, hit, None
    ordered = sorted(sorted(cluster) for cluster in members.values())  # neither names nor the order given matter
    together = np.array([one for cluster in ordered for one in cluster])
    return together[:, 0], together[:, 1] > 0, Clusters(np.array([len(cluster) for cluster in ordered]))


def _bound(
    model: Model, fitted: Fit, groups: Clusters | None, wanted: bool
) -> tuple[Floats, Floats | float, Inflation | None]:
    """The bound of the x of a90, and what it allows of a likelihood ratio: so much, times the inflation by clusters.

    Where it is not wanted, for the band alone, clusters are not resampled.
    """
    if groups is None:
        return upper_a90(model, fitted), ALONE, None
    inflation = inflation_of(model, fitted, groups)
    if not wanted:
        return *robust_a90(model, fitted, groups), inflation
    draws = int(np.clip(WORK // model.signs.size, *DRAWS))
    return *clustered_a90(model, fitted, groups, draws, np.random.default_rng(SEED)), inflation


def _no_bound(clusters: int, coverage: float | None) -> str:
    """Why no bound of a90 is given; "" where one is."""
    if coverage is None:
        return (
            f"The targets lie in {counted(clusters, 'cluster')}; what a bound covers is known from "
            f"{min(CLUSTERED_COVERS)} clusters on. Inspect more parts."
        )
    if coverage < ENOUGH:
        return (
            f"From {counted(clusters, 'cluster')} the bound covers a90 in {100 * coverage:.1f} % of simulated sets; "
            f"{100 * ENOUGH:.0f} % are wanted. Inspect more parts."
        )
    return ""


def _notes(sizes: Floats, a50: float, a90: float, bound: float | None, misfit: float) -> list[str]:
    notes = []
    if misfit < DOUBT:
        notes.append(
            f"The curve does not fit (p = {misfit:.2g}): it may level off below 1 or above 0, or depend on more than "
            "size, and then neither a90 nor its bound holds."
        )
    largest, smallest = sizes.max(), sizes.min()
    if bound == np.inf:
        notes.append("The bound of a90 is infinite: the data do not show that any size is found in 90 % of all cases.")
    if a90 > largest or (bound is not None and largest < bound < np.inf):
        which = "a90 lies" if a90 > largest else "The bound of a90 lies"
        notes.append(f"{which} beyond the largest target ({largest:.4g}): it rests on the shape of the curve alone.")
    if a50 < smallest:
        notes.append(f"a50 lies below the smallest target ({smallest:.4g}): there are too few small targets.")
    return notes
