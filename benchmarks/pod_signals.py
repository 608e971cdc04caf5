"""How often a90/95 of a signal response lies above the true a90: it should in 95 of 100 sets.

    python benchmarks/pod_signals.py

Sizes are drawn evenly in ln size from 2 to 40, signals from ln signal = -3 + 1.5 ln a + e, e normal with sd 1; the
threshold is 0, signals are censored at -2 and at 3. With several targets of a part, half of the variance of e is the
part's. Infinite bounds count as covering, and are counted apart.
"""

import argparse

import numpy as np
from _bench import positive, report

from featprobe.metrics.pod.signal_line import FARTHEST, HIGH, fitted_line

SETS = (
    (40, 1),
    (60, 1),
    (120, 1),
    (300, 1),
    (60, 3),
    (75, 3),
    (120, 3),
    (300, 3),
    (120, 6),
    (250, 10),
    (300, 6),
)  # targets, per part
FLOOR = 0.91  # of the coverage of the likelihood ratio bound, one target per part


def one_set(rng: np.random.Generator, targets: int, per_part: int) -> tuple[bool, bool, bool]:
    """Whether the likelihood ratio and the delta bound are above the true a90, and whether the first is infinite."""
    sizes = np.exp(rng.uniform(np.log(2), np.log(40), targets))
    part = np.arange(targets) // per_part
    shared = 0.5 if per_part > 1 else 0.0
    scatter = np.sqrt(shared) * rng.normal(size=targets)[part] + np.sqrt(1 - shared) * rng.normal(size=targets)
    line = fitted_line(sizes, np.clip(-3 + 1.5 * np.log(sizes) + scatter, -2, 3), 0.0, -2.0, 3.0, part)
    true = (HIGH + 3) / 1.5  # ln a90
    covers = line.bound(true - line.middle, 1.0) <= HIGH  # the same as upper() >= the true a90, in one search
    return covers, line.delta() >= np.exp(true), line.bound(FARTHEST, 1.0) < HIGH


def main() -> int:
    """Print coverages; 1 where that of the likelihood ratio bound is below its floor."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--sets", type=positive, default=2000)
    asked = options.parse_args()
    rows, least = [], 1.0
    for targets, per_part in SETS:
        rng = np.random.default_rng(7)
        found = np.array([one_set(rng, targets, per_part) for _ in range(asked.sets)])
        ratio, delta, infinite = found.mean(axis=0)
        least = min(least, float(ratio)) if per_part == 1 else least
        rows.append({
            "targets": str(targets), "per part": str(per_part), "likelihood ratio": f"{100 * ratio:.1f} %",
            "delta method": f"{100 * delta:.1f} %", "infinite": f"{100 * infinite:.1f} %",
        })  # fmt: skip
    report("pod_signals", least, FLOOR, rows)
    return 0 if least >= FLOOR else 1


if __name__ == "__main__":
    raise SystemExit(main())
