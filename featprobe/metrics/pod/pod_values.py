"""What is said of a probability of detection (POD): a curve with its bounds, or why the data carry none."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["hit/miss", "signal response"]
Link = Literal["logit", "probit"]


@dataclass(frozen=True)
class Curve:
    """Points of a POD curve, (n,) each. sizes: increasing, in the unit of the targets' sizes. pod: in [0, 1].
    low, high: one-sided 95 % bounds at each size from below and from above, together a band of 90 % at each size.
    """

    sizes: NDArray[np.float64]
    pod: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


@dataclass(frozen=True)
class Pod:
    """A POD curve and what follows from it. Sizes are in the unit in which the targets' sizes were given.

    P(a) = F(intercept + slope * ln a), where F is the distribution function that `link` names: logistic for logit,
    normal for probit (which is the one of a signal response). No field is nan.

    a50, a90: sizes that are found in 50 and 90 % of all cases. a90_95: the one-sided 95 % bound of a90 from above;
    math.inf where the data exclude no size; None where none is given, and then `no_bound` says why. joint_a90_95: the
    same from the joint set of both parameters (Cheng and Iles), which is larger and covers more than 95 %; None where
    none is given. lack_of_fit: p-value of a test that the curve fits; small where it does not. targets, hits, clusters:
    their numbers. clustered: whether some targets share a cluster, which widens the bounds. coverage: share of
    simulated sets like this one in which a90_95 was above the true a90; None where it is not known.
    simulated: how many targets or clusters those sets have, such as "60 targets": as many as here or fewer. notes:
    sentences that belong beside the figures.
    """

    kind: Kind
    link: Link
    intercept: float
    slope: float
    a50: float
    a90: float
    a90_95: float | None
    no_bound: str
    joint_a90_95: float | None
    curve: Curve
    lack_of_fit: float | None
    targets: int
    hits: int
    clusters: int
    clustered: bool
    coverage: float | None
    simulated: str = ""
    notes: tuple[str, ...] = ()

    @property
    def misses(self) -> int:
        """Number of targets that were not found."""
        return self.targets - self.hits


@dataclass(frozen=True)
class Refused:
    """Data that carry no POD curve. reasons: a sentence each. missing: what would be needed, one for each reason.
    targets, hits: their numbers.
    """

    kind: Kind
    reasons: tuple[str, ...]
    missing: tuple[str, ...]
    targets: int
    hits: int
