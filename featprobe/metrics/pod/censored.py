"""A straight line with normal scatter through signals, some of which are only known to be below or above a limit.

The likelihood is written in 1 / sigma and the coefficients divided by sigma, in which it is concave: it has one maximum
(Olsen, Note on the uniqueness of the maximum likelihood estimator for the Tobit model, 1978).
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr

from featprobe.metrics.pod.concave import maximum

Floats = NDArray[np.float64]
BELOW, MEASURED, ABOVE = -1, 0, 1
"""What is known of a signal: that it is at most the limit, its value, that it is at least the limit."""
HALF_LOG = np.log(2 * np.pi) / 2


@dataclass(frozen=True)
class CensoredLine:
    """Log-likelihood of y = columns . b + e, e normal with sd sigma, at theta = (1 / sigma, b / sigma).

    columns: (n, k). y: (n,), the value or the limit. known: (n,), BELOW, MEASURED or ABOVE.
    """

    columns: Floats
    y: Floats
    known: NDArray[np.int8]

    def __call__(self, theta: Floats) -> tuple[float, Floats, Floats]:
        """Log-likelihood, gradient and second derivatives; -inf where 1 / sigma is not above 0."""
        if not theta[0] > 0:
            return -np.inf, np.zeros_like(theta), -np.eye(len(theta))
        each, slopes, bends = self._parts(theta)
        hessian = -(self._rows * bends[:, None]).T @ self._rows
        hessian[0, 0] -= np.sum(self.known == MEASURED) / theta[0] ** 2
        return float(each.sum()), self._scores(theta, slopes).sum(axis=0), hessian

    def scores(self, theta: Floats) -> Floats:
        """The gradient of the part of each signal, (n, 1 + k)."""
        return self._scores(theta, self._parts(theta)[1])

    def fitted(self) -> Floats:
        """The parameters of largest likelihood, (1 + k,). Raises NoMaximumError where there are none."""
        coefficients = np.linalg.lstsq(self.columns, self.y, rcond=None)[0]
        sigma = float(np.std(self.y - self.columns @ coefficients)) or 1.0
        return maximum(self, np.array([1.0, *coefficients]) / sigma)

    @cached_property
    def _rows(self) -> Floats:
        """(n, 1 + k): rows . theta are the standardised deviations from the line."""
        return np.column_stack([self.y, -self.columns])

    def _parts(self, theta: Floats) -> tuple[Floats, Floats, Floats]:
        """Log-likelihood of each signal, its derivative by the deviation, and minus the second one, (n,) each."""
        deviation, measured = self._rows @ theta, self.known == MEASURED
        each = np.where(measured, np.log(theta[0]) - deviation**2 / 2 - HALF_LOG, 0.0)
        slopes, bends = np.where(measured, -deviation, 0.0), np.ones_like(deviation)
        for known, sign in ((BELOW, 1.0), (ABOVE, -1.0)):
            those = self.known == known
            inside = sign * deviation[those]
            each[those] = log_ndtr(inside)
            ratio = np.exp(-(inside**2) / 2 - HALF_LOG - each[those])
            slopes[those], bends[those] = sign * ratio, ratio * (ratio + inside)
        return each, slopes, bends

    def _scores(self, theta: Floats, slopes: Floats) -> Floats:
        scores = self._rows * slopes[:, None]
        scores[:, 0] += (self.known == MEASURED) / theta[0]
        return scores
