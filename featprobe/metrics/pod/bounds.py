"""Bounds from likelihood ratios: of a90, and of the curve at each size.

A model here has two columns: 1 and x, the scaled logarithm of the size. a90 is the size at which b0 + b1 x = q, where
F(q) = 0.9. All curves with the same a90 are lines through one point, so the likelihood ratio of an a90 needs a fit of
one weight. A line is named by its angle: tan(angle) = the x of its a90, and a right angle is an infinite a90, where
the likelihood is that of a curve without growth. So infinite bounds need no rule of their own.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2

from featprobe.metrics.pod.maximum_likelihood import STEPS, Fit, Floats, Model, fit, solved

DETECTED = 0.9  # the share that a90 is about
ALONE = float(chi2.ppf(0.90, 1))  # of twice a log likelihood ratio: one-sided 95 % of one parameter
TOGETHER = float(chi2.ppf(0.95, 2))  # 95 % of both parameters at once (Cheng and Iles, 1983)
HALVINGS = 48  # of an angle
NEAR = 1e-9  # of what is allowed of a likelihood ratio, within which an end is found
Inflation = Callable[[Floats], Floats]
"""Of directions (..., 2), how many times larger the variance of b0 d0 + b1 d1 is than it is of independent targets."""


def direction_of(x: Floats) -> Floats:
    """The direction in which the curve's value at x lies, (..., 2), of length 1; that of b1 alone for an infinite x."""
    angle = np.arctan(x)
    return np.stack([np.cos(angle), np.sin(angle)], -1)


def ratio_at(model: Model, fitted: Fit, x: Floats) -> Floats:
    """Twice the log likelihood ratio of an a90 at x, (...,), among growing curves."""
    q = float(model.link.quantile(DETECTED))
    return 2 * (fitted.log_likelihood - _best_through(model, q, np.arctan(x), np.ones(np.shape(x)))[0])


def upper_a90(model: Model, fitted: Fit, reach: Floats | float = ALONE, inflation: Inflation | None = None) -> Floats:
    """The x up to which an a90 has a likelihood ratio within reach, (...,): inf where every one has.

    Of the curves that grow: fitted must. Twice the log likelihood ratio is allowed to be reach times the inflation.
    """
    q = float(model.link.quantile(DETECTED))
    b0, b1 = np.moveaxis(fitted.weights, -1, 0)
    inside, outside = np.arctan((q - b0) / b1), np.full(b0.shape, np.pi / 2)
    rise = np.hypot(b1, q - b0)

    def within(angle: Floats) -> NDArray[np.bool_]:
        nonlocal rise
        best, rise = _best_through(model, q, angle, rise)
        direction = np.stack([np.cos(angle), np.sin(angle)], -1)
        allowed = reach if inflation is None else reach * inflation(direction)
        return np.asarray(2 * (fitted.log_likelihood - best) <= allowed)

    infinite = within(outside)
    for _ in range(HALVINGS):
        middle = (inside + outside) / 2
        near = within(middle)
        inside, outside = np.where(near, middle, inside), np.where(near, outside, middle)
    return np.where(infinite, np.inf, np.tan(inside))


def _best_through(model: Model, q: float, angle: Floats, start: Floats) -> tuple[Floats, Floats]:
    """The highest log likelihood of the growing curves with one a90, and how far that curve is from b0 = q, b1 = 0."""
    turned = np.stack([-np.sin(angle), np.cos(angle)], -1)
    along = np.einsum("...k,...kn->...n", turned, model.columns)[..., None, :]
    line = Model(model.link, model.signs, along, q, model.counts)
    found = fit(line, start[..., None])
    rise = found.weights[..., 0]
    flat = line.log_likelihood(np.zeros((*rise.shape, 1)))
    return np.where(rise > 0, found.log_likelihood, flat), np.maximum(rise, 0)


def band(
    model: Model, fitted: Fit, at: Floats, reach: Floats | float = ALONE, inflation: Inflation | None = None
) -> tuple[Floats, Floats]:
    """Lower and upper ends of b0 + b1 x, (m,) each, within reach at each x. Of one set. at: (m,).

    Twice the log likelihood ratio is convex in each value of the curve, so that Newton's method finds both ends.
    """
    direction = np.stack([np.ones_like(at), at], -1)
    inflated = np.ones_like(at) if inflation is None else inflation(direction)
    middle = direction @ fitted.weights
    information = model.information(model.derivatives(fitted.weights)[1])
    variance = np.einsum("mk,mk->m", direction, solved(information[None], direction))
    far = np.sqrt(reach * inflated * variance)
    low, high = (_end(model, fitted, at, middle + side * far, reach * inflated) for side in (-1, 1))
    return low, high


def _end(model: Model, fitted: Fit, at: Floats, value: Floats, allowed: Floats) -> Floats:
    """The value of the curve at each x at which twice the log likelihood ratio is what is allowed; near a guess."""
    columns = (model.columns[1] - at[:, None])[:, None, :]
    slope = np.broadcast_to(fitted.weights[1:], (len(at), 1))
    for _ in range(STEPS):
        through = Model(model.link, model.signs, columns, value[:, None])
        best = fit(through, slope)
        slope = best.weights
        beyond = 2 * (fitted.log_likelihood - best.log_likelihood) - allowed
        value = value + beyond / (2 * through.derivatives(slope)[0].sum(-1))
        if np.all(np.abs(beyond) < NEAR * allowed):
            break
    return value
