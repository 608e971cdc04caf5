"""The threshold above which a unit is called, from the scores of good units of validation."""

from collections.abc import Sequence
from math import isnan

from featprobe.errors import counted
from featprobe.image_labels import Unit
from featprobe.metrics.thresholds import threshold_at, units_needed

CALLED, PASSED = "called", "passed"
"""What a threshold says of an image: it is taken for one with a defect, or for a good one."""


def verdict(score: float, threshold: float) -> str:
    """CALLED or PASSED; "" without a threshold, which is nan.

    >>> verdict(2.0, 1.5)
    'called'
    """
    return "" if isnan(threshold) else CALLED if score > threshold else PASSED


def settled(good: Sequence[float], rate: float, unit: Unit) -> tuple[float, str]:
    """The threshold for a wanted rate of false calls, and what a user should know about it, "" for nothing.

    good: scores of the good units of validation. Where they are too few for the rate, the threshold is the highest of
    them, and the note says how many it takes; without any it is nan.
    """
    least, sure = units_needed(rate)
    found = counted(len(good), f"good validation {unit}")
    if not good:
        return float("nan"), (
            f"no threshold: it is set on good {unit}s of validation, and there are none; scores that need one are "
            "empty. Another --split may bring some there"
        )
    if len(good) < least:
        return threshold_at(good, 0), (
            f"{found} can't carry a false-call rate of {rate:.3g}: that takes {least}, and {sure} to be 95 % sure. The "
            "threshold is the highest score among them. Give validation more, or ask for a higher --false-calls"
        )
    if len(good) < sure:
        return threshold_at(good, rate), (
            f"the false-call rate of {rate:.3g} was set on {found}; with {sure} it would be sure at 95 %"
        )
    return threshold_at(good, rate), ""
