"""How long a training takes to converge, estimated from the few points of its validation curve."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SHARES = (0.90, 0.95, 0.99)
"""Shares of the final value of a curve. For each, the iterations that reach it are reported."""
LAST_PART, POINT = 0.2, 0.01
"""A curve that rises by more than a point over this last share of the iterations has not converged."""


@dataclass(frozen=True)
class Curve:
    """A validation score after some iterations, ascending; nan where it does not exist."""

    iterations: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def final(self) -> float:
        """The last value; nan where there is none."""
        return self.values[-1] if self.values else float("nan")


def curve_of(points: Sequence[Mapping[str, Any]], score: str) -> Curve:
    """A score of a curve as curves.json holds it."""
    values = (point["scores"].get(score) for point in points)
    return Curve(
        tuple(point["iteration"] for point in points),
        tuple(float("nan") if value is None else float(value) for value in values),
    )


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Mean over seeds at the iterations that all of them have.

    >>> mean_curve([Curve((1, 2), (0.0, 0.5)), Curve((2,), (0.25,))])
    Curve(iterations=(2,), values=(0.375,))
    """
    every = [dict(zip(curve.iterations, curve.values, strict=True)) for curve in curves]
    shared = sorted(set.intersection(*(set(own) for own in every)))
    return Curve(tuple(shared), tuple(float(np.mean([own[i] for own in every])) for i in shared))


def best_so_far(curve: Curve) -> Curve:
    """At each point the best score up to there: that of the weights kept, where those of the best point are.

    >>> best_so_far(Curve((1, 2, 3), (0.2, 0.5, 0.4)))
    Curve(iterations=(1, 2, 3), values=(0.2, 0.5, 0.5))
    """
    return Curve(curve.iterations, tuple(np.fmax.accumulate(np.array(curve.values, dtype=float)).tolist()))


def iterations_to(curve: Curve, value: float) -> int | None:
    """The first point of a curve that is not below a value; None where none reaches it, or the value is 0.

    It was reached there or since the point before: nothing is read between points.

    >>> iterations_to(Curve((10, 20, 30), (0.2, 0.5, 0.5)), 0.45)
    20
    """
    reached = [i for i, own in zip(curve.iterations, curve.values, strict=True) if own >= value > 0]
    return reached[0] if reached else None


def late_rise(curve: Curve) -> float:
    """By how much a curve rises over the last 20 % of its iterations; nan where its points do not reach back so far.

    Points may lie far apart there. Between them a score is taken to grow as the learning that was done does, the sum of
    the learning rates: a half cosine, of which the last fifth holds little.

    >>> round(late_rise(Curve((50, 100), (0.2, 0.3))), 3)  # 0.293 at 80 iterations
    0.007
    """
    if len(curve.iterations) < 2:
        return float("nan")
    end = curve.iterations[-1]
    if (1 - LAST_PART) * end < curve.iterations[0]:
        return float("nan")
    before = np.interp(_learned(1 - LAST_PART), _learned(np.array(curve.iterations) / end), curve.values)
    return curve.final - float(before)


def _learned(share: Any) -> Any:
    """The sum of a half cosine's rates up to a share of the iterations, as a share of the whole sum."""
    return share + np.sin(np.pi * np.asarray(share)) / np.pi


def still_rising(curve: Curve) -> bool:
    """Whether a training had not converged when it ended."""
    return late_rise(curve) > POINT
