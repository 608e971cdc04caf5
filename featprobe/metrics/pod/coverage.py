"""What the bounds of a90 cover, as benchmarks/pod.py measures it and holds it."""

ENOUGH = 0.90  # coverage below which no bound is given
ALONE_COVERS = {60: 0.918, 120: 0.922, 300: 0.938}
CLUSTERED_COVERS = {10: 0.92, 20: 0.93, 40: 0.93, 100: 0.94}
"""Number of targets, or of clusters, from which on: the share of simulated sets in which the bound was above the true
a90, in the world in which that share was least.
"""


def coverage_of(targets: int, clusters: int) -> tuple[float | None, str]:
    """What a bound from so many targets in so many clusters covers, and in which sets; None where it is not known."""
    alone = clusters == targets
    table, there, unit = (ALONE_COVERS, targets, "targets") if alone else (CLUSTERED_COVERS, clusters, "clusters")
    known = [least for least in table if least <= there]
    return (table[known[-1]], f"{known[-1]} {unit}") if known else (None, "")
