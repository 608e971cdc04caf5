"""Hits and misses that carry no POD curve: why not, and what is missing."""

import numpy as np
from numpy.typing import NDArray

from featprobe.errors import counted
from featprobe.metrics.pod.pod_values import Kind, Refused

TARGETS = 60  # the least number for hit/miss, MIL-HDBK-1823A
OF_EACH = 5  # hits, and misses: fewer say nearly nothing of one end of the curve
OF_CLUSTERS = 3  # with fewer there is no variance between them to speak of
SAME = 1e-6  # of ln size: sizes closer than that are one
HIT_MISS: Kind = "hit/miss"

Fault = tuple[str, str]
"""A reason, and what is missing."""


def refusal(sizes: NDArray[np.float64], found: NDArray[np.bool_], clusters: int | None = None) -> Refused | None:
    """Why these targets carry no hit/miss curve; None where they do. sizes, found: (targets,). clusters: their number,
    None for targets that stand each for itself.
    """
    faults = [*_too_few(found), *_no_maximum(sizes, found)]
    if clusters is not None:
        faults += few_clusters(clusters)
    if not faults:
        return None
    reasons, missing = zip(*faults, strict=True)
    return Refused(HIT_MISS, reasons, missing, len(found), int(found.sum()))


def few_clusters(clusters: int) -> list[Fault]:
    """Whether targets lie in so few clusters that nothing is known of the variance between them."""
    if clusters >= OF_CLUSTERS:
        return []
    reason = f"All targets lie in {counted(clusters, 'cluster')}, which say nothing of others."
    return [(reason, f"targets in {OF_CLUSTERS} clusters or more")]


def barely_overlap(sizes: NDArray[np.float64], found: NDArray[np.bool_]) -> Refused:
    """Hits and misses overlap by so little that no curve can be computed."""
    low, high = sizes[found].min(), sizes[~found].max()
    reason = f"Hits and misses overlap only between {low:.7g} and {high:.7g}: too little for a curve to be computed."
    return Refused(HIT_MISS, (reason,), (f"targets of sizes near {low:.4g}",), len(found), int(found.sum()))


def _too_few(found: NDArray[np.bool_]) -> list[Fault]:
    targets, hits = len(found), int(found.sum())
    misses = targets - hits
    faults = []
    if targets < TARGETS:
        reason = f"There are {counted(targets, 'target')}; a hit/miss curve needs {TARGETS} or more (MIL-HDBK-1823A)."
        faults.append((reason, f"{counted(TARGETS - targets, 'more target')}"))
    if misses < OF_EACH:
        reason = (
            f"Of {counted(targets, 'target')} {counted(misses, 'was', 'were')} missed; {OF_EACH} misses are needed."
        )
        faults.append((reason, f"targets that are hard to find, until {OF_EACH} are missed"))
    if hits < OF_EACH:
        reason = f"Of {counted(targets, 'target')} {counted(hits, 'was', 'were')} found; {OF_EACH} hits are needed."
        faults.append((reason, f"targets that are easy to find, until {OF_EACH} are found"))
    return faults


def _no_maximum(sizes: NDArray[np.float64], found: NDArray[np.bool_]) -> list[Fault]:
    """Whether the likelihood has no maximum, or has it at a curve that does not grow.

    It has one if and only if hits and misses overlap in both directions (Albert and Anderson, 1984); touching at one
    size is not enough. The fitted curve grows if and only if the mean ln size of the hits is above that of the misses.
    """
    hits, misses = sizes[found], sizes[~found]
    if not len(hits) or not len(misses):
        return []
    if np.log(sizes.max() / sizes.min()) < SAME:
        return [(f"All targets have the size {sizes[0]:.4g}.", "targets of other sizes")]
    if misses.max() <= hits.min():
        return [
            (_separated(misses.max(), hits.min()), f"targets of sizes near {_middle(misses.max(), hits.min()):.4g}")
        ]
    if hits.max() <= misses.min() or np.log(hits).mean() <= np.log(misses).mean():
        reason = (
            "Large targets are not found more often than small ones: the typical size (geometric mean) is "
            f"{np.exp(np.log(hits).mean()):.4g} of hits and {np.exp(np.log(misses).mean()):.4g} of misses."
        )
        return [(reason, "targets over a wider range of sizes, or a size that decides whether a defect is found")]
    return []


def _separated(largest_miss: float, smallest_hit: float) -> str:
    if largest_miss == smallest_hit:
        beyond = f"of the size {smallest_hit:.4g} some are found, all larger ones are found and all smaller ones missed"
    else:
        beyond = f"all targets up to {largest_miss:.4g} are missed, and all from {smallest_hit:.4g} on are found"
    return f"Hits and misses do not overlap: {beyond}, so the curve could be as steep as one likes."


def _middle(low: float, high: float) -> float:
    return float(np.sqrt(low * high))
