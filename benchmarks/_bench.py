"""What the benchmarks of speed share: arms timed in turn, a table, one JSON object as the last line."""

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Timings:
    """Seconds of each arm in each round: arm -> (rounds,), in the order of the rounds."""

    seconds: Mapping[str, Sequence[float]]

    def median(self, arm: str) -> float:
        """Median seconds of an arm."""
        return float(np.median(self.seconds[arm]))

    def quartiles(self, slow: str, fast: str) -> tuple[float, float, float]:
        """Quartiles of how many times faster one arm is than another, in the same round each time.

        Ratios are taken within a round and then their median, not the other way round: whatever else the
        machine does for a while slows both.
        """
        ratios = np.divide(self.seconds[slow], self.seconds[fast])
        low, middle, high = np.percentile(ratios, (25, 50, 75)).tolist()
        return low, middle, high

    def ratio(self, slow: str, fast: str) -> float:
        """Median of how many times faster one arm is than another, in the same round each time."""
        return self.quartiles(slow, fast)[1]


def timed(work: Callable[[], object]) -> Callable[[], float]:
    """An arm that does some work and returns the seconds it took."""

    def arm() -> float:
        begun = time.perf_counter()
        work()
        return time.perf_counter() - begun

    return arm


def interleave(arms: Mapping[str, Callable[[], float]], rounds: int) -> Timings:
    """Run all arms in turn, A B C A B C …, after a round that is not counted.

    arms: name -> what does that arm's work once and returns its seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds + 1):
        for name, arm in arms.items():
            seconds[name].append(arm())
    return Timings({name: values[1:] for name, values in seconds.items()})


def positive(text: str) -> int:
    """A command line's integer >= 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer >= 1")
    return int(text)


def quartile_text(quartiles: tuple[float, float, float]) -> str:
    """Median and quartiles of a ratio, for a table.

    >>> quartile_text((0.9, 1.0, 1.25))
    '1.00 (0.90-1.25)'
    """
    low, middle, high = quartiles
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def report(name: str, ratio: float, target: float, rows: Sequence[Mapping[str, str]], **extra: object) -> None:
    """Print a table and, last, one JSON object that says whether the target holds.

    rows: each maps column titles to cells, all with the same titles. extra: further figures for the JSON.
    """
    print_table(rows)
    result = {"name": name, "ratio": ratio, "target": target, "holds": ratio >= target, "cpus": os.cpu_count()}
    print(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in (result | extra).items()}))


def print_table(rows: Sequence[Mapping[str, str]]) -> None:
    """Print rows, each of which maps the same column titles to cells; the first column is set to the left."""
    titles = list(rows[0])
    widths = {title: max(len(title), *(len(row[title]) for row in rows)) for title in titles}
    for row in [{title: title for title in titles}, *rows]:
        first, *others = titles
        print(row[first].ljust(widths[first]), *(row[title].rjust(widths[title]) for title in others), sep="  ")
