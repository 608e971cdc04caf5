"""How often a90/95 of a signal response lies above the true a90: it should in 95 of 100 sets.

    python benchmarks/pod_signals.py

Sizes are drawn evenly in ln size from 2 to 40, signals from ln signal = -3 + 1.5 ln a + e, e normal with sd 1; the
threshold is 0, signals are censored at -2 and at 3. With several targets of a part, half of the variance of e is the
part's. Infinite bounds count as covering, and are counted apart.
"""

import argparse

import numpy as np
from _bench import positive, print_table

from featprobe.metrics.pod.signal_line import HIGH, fitted_line

SETS = ((40, 1), (60, 1), (120, 1), (300, 1), (60, 3), (120, 3), (300, 3), (120, 6), (300, 6))  # targets, per part
FLOOR = 0.91  # of the coverage of the likelihood ratio bound, one target per part


def one_set(rng: np.random.Generator, targets: int, per_part: int) -> tuple[float, float]:
    """Likelihood ratio and delta bound of a90, each divided by the true a90."""
    sizes = np.exp(rng.uniform(np.log(2), np.log(40), targets))
    part = np.arange(targets) // per_part
    shared = 0.5 if per_part > 1 else 0.0
    scatter = np.sqrt(shared) * rng.normal(size=targets)[part] + np.sqrt(1 - shared) * rng.normal(size=targets)
    signals = np.clip(-3 + 1.5 * np.log(sizes) + scatter, -2, 3)
    fit = fitted_line(sizes, signals, 0.0, -2.0, 3.0, part)
    return fit.upper() / np.exp((HIGH + 3) / 1.5), fit.delta() / np.exp((HIGH + 3) / 1.5)


def main() -> int:
    """Print coverages; 1 where that of the likelihood ratio bound is below its floor."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--sets", type=positive, default=2000)
    asked = options.parse_args()
    rows, held = [], True
    for targets, per_part in SETS:
        rng = np.random.default_rng(7)
        ratios = np.array([one_set(rng, targets, per_part) for _ in range(asked.sets)])
        ratio, delta = (ratios >= 1).mean(axis=0)
        held = held and (per_part > 1 or ratio >= FLOOR)
        infinite = np.isinf(ratios[:, 0]).sum()
        rows.append({
            "targets": str(targets), "per part": str(per_part), "likelihood ratio": f"{100 * ratio:.1f} %",
            "delta method": f"{100 * delta:.1f} %", "infinite": str(infinite),
        })  # fmt: skip
    print_table(rows)
    return 0 if held else 1


if __name__ == "__main__":
    raise SystemExit(main())
