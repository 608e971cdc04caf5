"""The test of lack of fit: how often it rejects curves that are right, and curves that level off."""

import numpy as np
import pytest
from scipy.special import expit

from featprobe.metrics.pod.clustered import Clusters
from featprobe.metrics.pod.hit_miss import hit_miss
from featprobe.metrics.pod.lack_of_fit import lack_of_fit
from featprobe.metrics.pod.maximum_likelihood import LINKS, Model, fit
from featprobe.metrics.pod.pod_values import Pod

SETS = 500


def rejected(seed: int, floor: float, ceiling: float, clusters: Clusters | None = None, number: int = 120) -> float:
    """Share of sets in which the logit is rejected at 5 %. P(x) = floor + (ceiling - floor) expit(4 x)."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1.5, 1.5, (SETS, number))
    found = rng.random((SETS, number)) < floor + (ceiling - floor) * expit(4 * x)
    model = Model(LINKS["logit"], np.where(found, 1.0, -1.0), np.stack([np.ones_like(x), x], -2))
    return float(np.mean(lack_of_fit(model, fit(model, np.zeros((SETS, 2))), clusters) < 0.05))


@pytest.mark.parametrize("clusters", [None, Clusters(np.full(40, 3))])
def test_right_curves_are_rejected_as_often_as_said(clusters: Clusters | None) -> None:
    assert rejected(1, 0, 1, clusters) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / SETS)


@pytest.mark.parametrize(("floor", "ceiling"), [(0, 0.9), (0.1, 1), (0.1, 0.9)])
def test_curves_that_level_off_are_rejected_more_often(floor: float, ceiling: float) -> None:
    assert rejected(2, floor, ceiling, number=300) > 0.35


def test_two_sizes_leave_nothing_to_test() -> None:
    sizes = np.repeat([1.0, 2.0], 40)
    pod = hit_miss(sizes, np.arange(80) % 40 < np.where(sizes == 1, 10, 30))
    assert isinstance(pod, Pod) and pod.lack_of_fit is None


def test_a_curve_that_levels_off_has_a_note() -> None:
    rng = np.random.default_rng(3)
    sizes = np.exp(rng.uniform(-1.5, 1.5, 2000))
    pod = hit_miss(sizes, rng.random(2000) < 0.9 * expit(4 * np.log(sizes)))
    assert isinstance(pod, Pod) and pod.lack_of_fit is not None and pod.lack_of_fit < 0.01
    assert "does not fit" in pod.notes[0]
