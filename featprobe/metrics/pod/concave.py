"""Concave log-likelihoods: their maximum, and how small a linear function of the parameters may be beside the data.

A likelihood ratio bound of t(theta) = direction . theta is the least t among all parameters whose log-likelihood is at
most `drop` below the maximum. The set of these parameters is convex, so the bound is found by Lagrange's rule: the
maximum of the log-likelihood minus price * t moves to the bound as the price rises (Venzon and Moolgavkar, 1988).
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Likelihood = Callable[[Floats], tuple[float, Floats, Floats]]
"""Parameters (k,) -> log-likelihood, its gradient (k,), its second derivatives (k, k); -inf outside its domain."""
STEPS = 200
ACCURACY = 1e-8


class NoMaximumError(ArithmeticError):
    """A log-likelihood grows without end."""


def maximum(likelihood: Likelihood, start: Floats) -> Floats:
    """The parameters, (k,), at which a concave log-likelihood is largest, by Newton's steps, halved where they
    overshoot. start: within its domain. Raises NoMaximumError where it has no maximum."""
    at = start
    value, gradient, hessian = likelihood(at)
    for _ in range(STEPS):
        try:
            step = np.linalg.solve(hessian, -gradient)
        except np.linalg.LinAlgError:
            break
        gain = float(gradient @ step)
        if not math.isfinite(gain):
            break
        if gain < ACCURACY**2 * (1 + abs(value)):
            return at
        new = likelihood(at + step)
        while not new[0] > value - ACCURACY * (1 + abs(value)) and np.abs(step).max() > 0:
            step = step / 2
            new = likelihood(at + step)
        at, (value, gradient, hessian) = at + step, new
    raise NoMaximumError


def least(likelihood: Likelihood, best: Floats, direction: Floats, drop: float) -> float:
    """The least direction . theta among the parameters theta whose log-likelihood is at most `drop` below the maximum.

    best: the parameters of the maximum, (k,). direction: (k,), not 0. drop: > 0. Raises NoMaximumError where rounding
    leaves nothing to compute with.
    """
    top, _, hessian = likelihood(best)
    aim = math.sqrt(2 * drop)
    variance = -float(direction @ np.linalg.solve(hessian, direction))
    if not 0 < variance < math.inf:  # rounding: the likelihood is nearly flat in some direction
        raise NoMaximumError
    price, low, high = aim / math.sqrt(variance), 0.0, math.inf
    at = best
    for _ in range(STEPS):
        try:
            at = maximum(_less(likelihood, price * direction), at)
        except NoMaximumError:
            high, price, at = price, (low + price) / 2, best
            continue
        value, _, hessian = likelihood(at)
        fall = math.sqrt(2 * max(top - value, 0.0))
        if abs(fall - aim) <= ACCURACY * aim or high - low <= ACCURACY * price:
            return float(direction @ at)
        low, high = (price, high) if fall < aim else (low, price)
        rise = -price * float(direction @ np.linalg.solve(hessian, direction)) / max(fall, ACCURACY)
        price = price + (aim - fall) / rise
        if not low < price < high:
            price = 2 * low if math.isinf(high) else (low + high) / 2
    return float(direction @ at)


def _less(likelihood: Likelihood, slope: Floats) -> Likelihood:
    """A log-likelihood minus slope . theta."""

    def tilted(at: Floats) -> tuple[float, Floats, Floats]:
        value, gradient, hessian = likelihood(at)
        return value - float(slope @ at), gradient - slope, hessian

    return tilted
