"""Thresholds that let a wanted share of good units through as false calls."""

from math import ceil

import numpy as np
from numpy.typing import ArrayLike

from featprobe.errors import DataError, counted

CLOSE = 1e-9  # rounding of a rate times a number of units


def units_needed(rate: float) -> tuple[int, int]:
    """The number of good units that a rate of false calls needs at least, and to be 95 % sure of it (rule of three).

    For a rate of 0 both are 1: with any number of good units only the highest score of theirs is known.

    >>> units_needed(0.05)
    (20, 60)
    """
    return (1, 1) if rate == 0 else (ceil(1 / rate - CLOSE), ceil(3 / rate - CLOSE))


def threshold_at(good_scores: ArrayLike, rate: float) -> float:
    """The lowest score of a good unit above which no more than this share of the good units lies.

    A unit is called where its score is above the threshold. good_scores: (units,), of units without defects that no
    head was trained on. rate: in [0, 1). Raises DataError for fewer units than `units_needed` says, and for scores that
    are not finite.

    >>> threshold_at([0.1, 0.2, 0.3, 0.9], 0.25)
    0.3
    """
    scores = np.sort(np.asarray(good_scores, dtype=float))[::-1]
    if not np.isfinite(scores).all():
        raise DataError("Scores of good images are not finite, so no threshold can be set from them.")
    least, sure = units_needed(rate)
    if len(scores) < least:
        there = counted(len(scores), "good validation image")
        raise DataError(
            f"A false-call rate of {100 * rate:g} % can't be set with {there}.\n"
            f"  wanted  {least} or more (one false call among them), {sure} to be 95 % sure of the rate\n"
            "Give validation more good images, or ask for a higher rate with --false-calls."
        )
    return float(scores[int(rate * len(scores) + CLOSE)])
