"""Examples of MIL-HDBK-1823A and what others publish for them: README.md of this folder names the sources.

mh1823 fits the signals themselves over ln size, and bounds a90 by the delta method; it fits hits over the size itself,
and takes for a90/95 the two-sided 95 % limit of the profile likelihood ratio. Here each is computed by its definition.
"""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import chi2

from featprobe.metrics.pod.bounds import upper_a90
from featprobe.metrics.pod.hit_miss import hit_miss
from featprobe.metrics.pod.maximum_likelihood import LINKS, Fit, Model, fit
from featprobe.metrics.pod.pod_values import Link, Pod
from featprobe.metrics.pod.signal_line import fitted_line
from featprobe.metrics.pod.signal_response import SignalPod, signal_response

HERE = Path(__file__).parent
TWO_SIDED = float(chi2.ppf(0.95, 1))


def table(name: str) -> NDArray[np.void]:
    return np.asarray(np.genfromtxt(HERE / name, delimiter=",", names=True))


SIGNALS, HITS = table("handbook_signals.csv"), table("handbook_hits.csv")
INSPECTIONS = np.column_stack([SIGNALS[f"test_{name}"] for name in "abcd"])  # (targets, inspections)


def test_example_1_of_the_handbook() -> None:
    pod = signal_response(SIGNALS["size"], SIGNALS["test_b"], 200, log=False)
    assert isinstance(pod, SignalPod)
    assert pod.line == pytest.approx((-960.133810550508, 535.524842802072, math.exp(4.99910576573732)), rel=1e-6)
    figures = (pod.a50, pod.a90, pod.delta_a90_95)
    assert figures == pytest.approx((8.72636752410674, 12.4434661804576, 13.3703423497973), rel=1e-5)
    assert pod.a90_95 == pytest.approx(13.3703423497973, rel=0.01)  # the likelihood ratio is another definition


def test_example_2_of_the_handbook() -> None:
    """Four inspections of each target, which mh1823 counts as one: four times the covariance of single targets."""
    sizes, signals = np.repeat(SIGNALS["size"], 4), INSPECTIONS.ravel()
    line = fitted_line(sizes, signals, 250, 200, 600, np.arange(len(sizes)))
    assert line.size(line.at(0.0)) == pytest.approx(10.3041304652723, rel=1e-6)
    pod = signal_response(sizes, signals, 250, 200, 600, clusters=np.repeat(np.arange(92), 4), log=False)
    assert isinstance(pod, SignalPod)
    assert pod.line == pytest.approx((-1183.68098621906, 614.642414254625, math.exp(5.01706880232402)), rel=1e-5)
    assert pod.a90 == pytest.approx(14.1161401310149, rel=1e-6)
    assert replace(line, wide=4 * line.covariance).delta() == pytest.approx(15.3153637799242, rel=1e-6)
    assert pod.delta_a90_95 == pytest.approx(15.3153637799242, rel=0.02)  # by the variance over clusters


def over_length(link: Link) -> tuple[Model, Fit]:
    columns = np.stack([np.ones(len(HITS)), HITS["length"]])
    model = Model(LINKS[link], np.where(HITS["hit"] == 1, 1.0, -1.0), columns)
    return model, fit(model, np.zeros(2))


EXAMPLE_3 = {
    "logit": ((-4.59736656561765, 39.7654286840476), -38.7469053178524, (0.115612146473903, 0.170866789767052)),
    "probit": ((-2.62399656581323, 22.6110314461234), -38.5781741891977, (0.116049397041686, 0.17272755294971)),
}
EXAMPLE_3_BOUNDS = {"logit": 0.197340414521742, "probit": 0.197278947840819}


@pytest.mark.parametrize("link", EXAMPLE_3)
def test_example_3_of_the_handbook_over_length(link: Link) -> None:
    model, fitted = over_length(link)
    weights, likelihood, sizes = EXAMPLE_3[link]
    assert fitted.weights == pytest.approx(weights, rel=1e-4)
    assert fitted.log_likelihood == pytest.approx(likelihood)
    assert upper_a90(model, fitted, TWO_SIDED) == pytest.approx(EXAMPLE_3_BOUNDS[link], rel=1e-3)
    pod = hit_miss(np.exp(HITS["length"]), HITS["hit"] == 1, link=link)  # over ln of that, which is the length
    assert isinstance(pod, Pod)
    assert (math.log(pod.a50), math.log(pod.a90)) == pytest.approx(sizes, rel=1e-4)
    assert pod.a90_95 is not None and pod.joint_a90_95 is not None
    assert math.log(pod.a90_95) < EXAMPLE_3_BOUNDS[link] < math.log(pod.joint_a90_95)


def test_example_3_of_the_handbook_over_ln_depth() -> None:
    """The fit that the tests of jaspQualityControl publish; targets without a depth are omitted there too."""
    measured = HITS["depth"] > 0
    pod = hit_miss(HITS["depth"][measured], HITS["hit"][measured] == 1)
    assert isinstance(pod, Pod)
    intercept, slope = 17.6573206618451, 4.39007841700679
    assert (pod.intercept, pod.slope) == pytest.approx((intercept, slope), rel=1e-5)
    assert pod.a90 == pytest.approx(math.exp((math.log(9) - intercept) / slope), rel=1e-5)


EARLY_HITS = (
    0.842,
    0.943,
    1.138,
    1.153,
    1.228,
    1.324,
    1.34,
    1.445,
    1.501,
    1.701,
    1.789,
    1.858,
    1.881,
    1.978,
    2.003,
    2.054,
    2.08,
)
LATE_MISSES = (
    *(2.328, 2.358, 2.418, 2.448, 2.479, 2.741, 2.846, 2.919, 3.069, 3.108, 3.436, 3.523, 3.705, 3.847),
    *(4.361, 4.472, 4.586, 5.07),
)
R_FITS = {
    "logit": ((-2.28894719412785, 2.97137434702254), (2.16048519708012, 4.52581149888312, 5.85893182113469)),
    "probit": ((-1.32037385730287, 1.71239275047137), (2.16207740412456, 4.56979191065402, 5.81158645740395)),
}


@pytest.mark.parametrize("link", R_FITS)
def test_a_fit_of_r_over_ln_size(link: Link) -> None:
    """glm of R 4.5.0 and a profile of its likelihood, on 240 simulated targets (OpenPOD 0.1)."""
    logs = np.linspace(-1, 2, 240)  # all up to 2.12 are missed, and all above found, but for those that are listed
    hits = np.exp(logs) > 2.12
    others = [int(np.abs(np.exp(logs) - size).argmin()) for size in EARLY_HITS + LATE_MISSES]
    hits[others] = ~hits[others]
    weights, (a50, a90, bound) = R_FITS[link]
    pod = hit_miss(np.exp(logs), hits, link=link)
    assert isinstance(pod, Pod)
    assert (pod.intercept, pod.slope) == pytest.approx(weights, rel=1e-4)
    assert (pod.a50, pod.a90) == pytest.approx((a50, a90), rel=1e-4)
    model = Model(LINKS[link], np.where(hits, 1.0, -1.0), np.stack([np.ones(240), logs]))
    assert math.exp(float(upper_a90(model, fit(model, np.zeros(2)), TWO_SIDED))) == pytest.approx(bound, rel=1e-4)
