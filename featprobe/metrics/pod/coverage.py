"""What the bounds of a90 cover, as benchmarks/pod.py measures it: the least of its simulated worlds.

A test simulates some of it again.
"""

ENOUGH = 0.90  # coverage below which no bound is given
CLUSTERS = 20  # with fewer clusters no bound was found that covers enough
ALONE_COVERS = {60: 0.90, 120: 0.92, 300: 0.93}
CLUSTERED_COVERS = {20: 0.90, 40: 0.92, 100: 0.93}
"""Number of targets or of clusters from which on: share of simulated sets in which the bound was above the true a90."""


def coverage_of(targets: int, clusters: int) -> float | None:
    """What a bound from so many targets in so many clusters covers; None where it was not simulated."""
    table, there = (ALONE_COVERS, targets) if clusters == targets else (CLUSTERED_COVERS, clusters)
    known = [covers for least, covers in table.items() if least <= there]
    return known[-1] if known else None
