"""Hit/miss curves that do not go from 0 to 1: hits at any size (a floor), or misses at any size (a ceiling).

P(a) = floor + (ceiling - floor) * logistic(b0 + b1 ln a). It is fitted for a picture alone, to see what the usual model
misses. It has no bounds here, and no a90 of a qualification follows from it (Annis, mh1823: floor and ceiling).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import expit, logit

Floats = NDArray[np.float64]
EDGE = 1e-6  # least distance of a probability to 0 and 1
CLEAR = 2.0  # the least gain of AIC at which the curve is worth a line in the picture
STARTS = ((0.0, 1.0), (0.0, 0.9), (0.1, 1.0), (0.1, 0.9), (0.3, 0.7))  # floors and ceilings


@dataclass(frozen=True)
class FloorCeiling:
    """floor, ceiling: in [0, 1]. sizes, pod: (n,), points of the curve. gain: by how much Akaike's criterion (AIC) is
    smaller than that of the curve from 0 to 1."""

    floor: float
    ceiling: float
    sizes: Floats
    pod: Floats
    gain: float


def floor_ceiling(sizes: ArrayLike, found: ArrayLike, at: ArrayLike) -> FloorCeiling | None:
    """The curve with floor and ceiling, where Akaike's criterion clearly prefers it; None where it does not.

    sizes, found: (targets,), > 0, and whether each was found; hits and misses must overlap. at: sizes of the points.
    """
    x, hit = np.log(np.asarray(sizes, dtype=float)), np.asarray(found, dtype=bool)
    middle, spread = float(x.mean()), float(x.std()) or 1.0
    x = (x - middle) / spread
    plain = min((_fit(x, hit, start, fixed=True) for start in STARTS[:1]), key=lambda best: best[0])
    free = min((_fit(x, hit, start, fixed=False) for start in STARTS), key=lambda best: best[0])
    moved = int(free[1][0] > EDGE) + int(free[1][1] < 1 - EDGE)
    gain = 2 * (plain[0] - free[0]) - 2 * moved
    if not moved or gain < CLEAR:
        return None
    points = np.asarray(at, dtype=float)
    return FloorCeiling(
        float(free[1][0]), float(free[1][1]), points, _share(free[1], (np.log(points) - middle) / spread), float(gain)
    )


def _share(at: Floats, x: Floats) -> Floats:
    """at: floor, ceiling, the x of the middle, ln of the slope."""
    return np.asarray(at[0] + (at[1] - at[0]) * expit(np.exp(at[3]) * (x - at[2])))


def _fit(x: Floats, hit: NDArray[np.bool_], start: tuple[float, float], *, fixed: bool) -> tuple[float, Floats]:
    """Minus the largest log-likelihood, and where it is."""

    def minus(at: Floats) -> float:
        share = np.clip(_share(at, x), EDGE, 1 - EDGE)
        return -float(np.log(np.where(hit, share, 1 - share)).sum())

    inner = np.clip((hit.mean() - start[0]) / max(start[1] - start[0], EDGE), 0.02, 0.98)
    limits = [(0.0, 0.0), (1.0, 1.0)] if fixed else [(0.0, 0.5), (0.5, 1.0)]
    bounds = [*limits, (-20.0, 20.0), (-4.0, 4.0)]
    best = minimize(minus, np.array([*start, -float(logit(inner)), 0.5]), method="L-BFGS-B", bounds=bounds)
    return float(best.fun), np.asarray(best.x)
