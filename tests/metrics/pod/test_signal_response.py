"""Signal response: closed forms, an independent profile likelihood, laws that must hold, and data that are refused."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize
from scipy.stats import chi2, norm

from featprobe.errors import ShapeError
from featprobe.metrics.pod.censored import CensoredLine
from featprobe.metrics.pod.concave import NoMaximumError, least, maximum
from featprobe.metrics.pod.line_checks import checks_of, worst
from featprobe.metrics.pod.pod_values import Refused
from featprobe.metrics.pod.signal_line import fitted_line
from featprobe.metrics.pod.signal_response import SignalPod, signal_response

Floats = NDArray[np.float64]
SEEDS = st.integers(0, 2**32 - 1)
QUICK = settings(max_examples=6, deadline=None)
HIGH = norm.ppf(0.9)


def drawn(seed: int, number: int = 80, scatter: float = 0.5) -> tuple[Floats, Floats]:
    """Sizes from 2 to 40, and signals: 0.1 a ** 1.2, times a normal scatter of the logarithm."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.uniform(np.log(2), np.log(40), number))
    return sizes, 0.1 * sizes**1.2 * np.exp(scatter * rng.normal(size=number))


def fitted(sizes: Floats, signals: Floats, threshold: float = 1.0, **options: object) -> SignalPod:
    pod = signal_response(sizes, signals, threshold, **options)  # type: ignore[arg-type]
    assert isinstance(pod, SignalPod), pod
    return pod


@QUICK
@given(SEEDS)
def test_without_censoring_the_line_is_that_of_least_squares(seed: int) -> None:
    sizes, signals = drawn(seed)
    slope, intercept = np.polyfit(np.log(sizes), np.log(signals), 1)
    sigma = np.std(np.log(signals) - intercept - slope * np.log(sizes))
    pod = fitted(sizes, signals)
    assert pod.line == pytest.approx((intercept, slope, sigma))
    assert pod.a50 == pytest.approx(math.exp(-intercept / slope))
    assert pod.a90 == pytest.approx(math.exp((HIGH * sigma - intercept) / slope))
    assert (pod.slope, pod.intercept) == pytest.approx((slope / sigma, intercept / sigma))


def profile_bound(x: Floats, y: Floats, noise: float, saturation: float) -> float:
    """The one-sided 95 % bound of ln a90 at threshold 0, from a search over slope and ln sigma at each a90."""

    def minus(slope: float, sigma: float, intercept: float) -> float:
        mean = intercept + slope * x
        each = norm.logpdf(y, mean, sigma)
        each = np.where(y <= noise, norm.logcdf(noise, mean, sigma), each)
        return -float(np.where(y >= saturation, norm.logsf(saturation, mean, sigma), each).sum())

    def found(function: object, start: list[float]) -> tuple[float, Floats]:
        best = minimize(function, start, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-11, "maxiter": 9999})
        return float(best.fun), best.x

    low, at = found(lambda b: minus(b[0], math.exp(b[1]), b[2]), [1.0, 0.0, -2.0])
    a90 = (HIGH * math.exp(at[1]) - at[2]) / at[0]

    def beyond(where: float) -> float:
        value, _ = found(lambda b: minus(b[0], math.exp(b[1]), HIGH * math.exp(b[1]) - b[0] * where), list(at[:2]))
        return 2 * (value - low) - chi2.ppf(0.9, 1)

    return float(brentq(beyond, a90 + 1e-6, a90 + 2))


@pytest.mark.parametrize("seed", [1])
def test_the_bound_is_that_of_a_profile_likelihood_with_censored_signals(seed: int) -> None:
    sizes, signals = drawn(seed, 60)
    noise, saturation = 0.4, 4.0
    pod = fitted(sizes, signals, noise=noise, saturation=saturation)
    assert pod.below > 3 and pod.above > 3
    y = np.log(np.clip(signals, noise, saturation))
    assert pod.a90_95 == pytest.approx(math.exp(profile_bound(np.log(sizes), y, math.log(noise), math.log(saturation))))


@QUICK
@given(SEEDS, st.floats(0.001, 1000), st.floats(0.001, 1000))
def test_units_of_sizes_and_signals_do_not_matter(seed: int, unit: float, gain: float) -> None:
    sizes, signals = drawn(seed, 50)
    one = fitted(sizes, signals, noise=0.4)
    other = fitted(sizes * unit, signals * gain, gain, noise=0.4 * gain)
    for name in ("a50", "a90", "a90_95", "joint_a90_95", "delta_a90_95"):
        assert getattr(other, name) == pytest.approx(unit * getattr(one, name), rel=1e-5), name
    assert other.lack_of_fit == pytest.approx(one.lack_of_fit, abs=1e-4)


@QUICK
@given(SEEDS)
def test_bounds_and_band_are_in_order(seed: int) -> None:
    pod = fitted(*drawn(seed, 60))
    assert pod.a90_95 is not None and pod.joint_a90_95 is not None
    assert pod.a50 < pod.a90 < pod.a90_95 < pod.joint_a90_95
    curve = pod.curve
    assert (curve.low <= curve.pod).all() and (curve.pod <= curve.high).all()
    assert (np.diff(curve.sizes) > 0).all() and (np.diff(curve.pod) >= 0).all()
    if pod.a90_95 < curve.sizes[-1]:
        assert np.interp(pod.a90_95, curve.sizes, curve.low) == pytest.approx(0.9, abs=0.01)


def test_limits_that_no_signal_reaches_change_nothing() -> None:
    sizes, signals = drawn(3)
    one, other = fitted(sizes, signals), fitted(sizes, signals, noise=1e-6, saturation=1e6)
    assert (other.a90, other.a90_95) == pytest.approx((one.a90, one.a90_95))
    assert (other.below, other.above) == (0, 0)


def test_a_signal_that_is_a_logarithm_is_taken_as_it_is() -> None:
    sizes, signals = drawn(4)
    one, other = fitted(sizes, signals), fitted(sizes, np.log(signals), 0.0, log=False)
    assert (other.a90, other.a90_95) == pytest.approx((one.a90, one.a90_95))


def test_targets_without_a_signal_are_below_the_noise() -> None:
    sizes, signals = drawn(5)
    lost = np.where(signals <= 0.4, -np.inf, signals)
    assert fitted(sizes, lost, noise=0.4).a90_95 == pytest.approx(fitted(sizes, signals, noise=0.4).a90_95)


def test_a_target_counted_three_times_is_one_cluster_and_says_no_more() -> None:
    sizes, signals = drawn(6, 100)
    one = fitted(sizes, signals)
    same = fitted(np.repeat(sizes, 3), np.repeat(signals, 3), clusters=np.repeat(np.arange(100), 3))
    apart = fitted(np.repeat(sizes, 3), np.repeat(signals, 3))
    assert same.clustered and same.clusters == 100 and same.joint_a90_95 is None
    assert same.a90 == pytest.approx(one.a90)
    width, naive = math.log(one.a90_95 / one.a90), math.log(apart.a90_95 / apart.a90)  # type: ignore[operator]
    assert math.log(same.a90_95 / same.a90) == pytest.approx(width, rel=0.25)  # type: ignore[operator]
    assert naive < 0.7 * width


@pytest.mark.parametrize(
    ("bend", "widen", "skew", "fault"),
    [
        (0.6, 0.0, False, "straight line"),
        (0.0, 0.5, False, "changes with size"),
        (0.0, 0.0, True, "not normal"),
    ],
)
def test_a_line_that_does_not_fit_is_named(bend: float, widen: float, skew: bool, fault: str) -> None:
    rng = np.random.default_rng(7)
    x = rng.uniform(0, 3, 150)
    scatter = rng.exponential(size=150) - 1 if skew else rng.normal(size=150)
    y = x + bend * (x - 1.5) ** 2 + 0.4 * np.exp(widen * (x - 1.5)) * scatter
    pod = fitted(np.exp(x), y, 1.0, log=False)
    assert pod.lack_of_fit is not None and pod.lack_of_fit < 0.01
    assert any(fault in note for note in pod.notes), pod.notes


def test_a_line_that_fits_is_not_doubted_more_often_than_it_says() -> None:
    rng = np.random.default_rng(11)
    doubted = 0
    for _ in range(100):
        x = rng.normal(size=60)
        line = CensoredLine(np.column_stack([np.ones(60), x]), x + rng.normal(size=60), np.zeros(60, np.int8))
        doubted += worst(checks_of(line, line.fitted())) < 0.05
    assert doubted <= 12  # more than 12 of 100 at a rate of 5 %: 1 in 700


def test_an_a90_outside_the_sizes_is_named() -> None:
    sizes, signals = drawn(8)
    assert any("beyond the largest" in note for note in fitted(sizes, signals, threshold=20.0).notes)
    assert any("below the smallest" in note for note in fitted(sizes, signals, threshold=0.05).notes)


def test_few_clusters_have_a_curve_and_no_bound() -> None:
    sizes, signals = drawn(12, 96)
    pod = fitted(sizes, signals, clusters=np.arange(96) // 4)
    assert pod.clusters == 24 and "24 clusters" in pod.no_bound
    assert pod.a90_95 is pod.joint_a90_95 is pod.delta_a90_95 is pod.coverage is None
    assert fitted(*drawn(12, 100), clusters=np.arange(100) // 4).coverage == 0.91


@pytest.mark.parametrize(("targets", "each", "least"), [(60, 1, 0.86), (90, 3, 0.86)])
def test_the_bound_covers_as_often_as_it_says(targets: int, each: int, least: float) -> None:
    """Of 150 sets; at the published 92 and 91 % fewer than 86 % are seen once in 200 runs or less often."""
    rng = np.random.default_rng(targets)
    part = np.arange(targets) // each
    covered = 0
    for _ in range(150):
        x = rng.uniform(0, 3, targets)
        scatter = (
            rng.normal(size=targets)
            if each == 1
            else (rng.normal(size=targets) + rng.normal(size=targets)[part]) / 2**0.5
        )
        y = np.clip(1.5 * x - 3 + scatter, -2, None)
        line = fitted_line(np.exp(x), y, 0.0, -2.0, None, part)
        covered += line.bound((3 + HIGH) / 1.5 - line.middle, 1.0) <= HIGH  # at the true a90
    assert covered >= least * 150


def test_growth_that_could_be_none_has_no_bound() -> None:
    rng = np.random.default_rng(9)
    x = np.linspace(0, 3, 40)
    scatter = rng.normal(size=40)
    scatter -= np.polyval(np.polyfit(x, scatter, 1), x)
    scatter /= scatter.std()  # so that the fitted line is the stated one: its likelihood ratio to a level one is 2.2
    pod = fitted(np.exp(x), 0.27 * x + scatter, 0.0, log=False)
    assert pod.a90_95 == pod.joint_a90_95 == math.inf
    assert "hardly grow" in refused(np.exp(x), 0.02 * x + scatter - 1, threshold=0.0, log=False)


def refused(sizes: Floats, signals: Floats, **options: object) -> str:
    answer = signal_response(sizes, signals, **{"threshold": 1.0, **options})  # type: ignore[arg-type]
    assert isinstance(answer, Refused), answer
    assert len(answer.reasons) == len(answer.missing) > 0
    return " ".join(answer.reasons + answer.missing)


def test_data_that_carry_no_curve_are_refused() -> None:
    sizes, signals = drawn(10)
    assert "31 targets" in refused(sizes[:31], signals[:31]) and "9 more targets" in refused(sizes[:31], signals[:31])
    assert "0 of 80 signals are measured" in refused(sizes, signals, noise=1e9, threshold=1e9)
    assert "below the noise" in refused(sizes, signals, noise=2.0)
    assert "above the saturation" in refused(sizes, signals, saturation=0.5)
    assert "2 different sizes" in refused(np.where(sizes > 9, 9.0, 3.0), signals)
    assert "do not grow" in refused(sizes, 1 / signals)
    for scatter in (0, 1e-9, 1e-7):
        assert "no scatter" in refused(sizes, sizes**2 * (1 + scatter * np.sin(np.arange(len(sizes)))))
    assert "All targets lie in 1 cluster" in refused(sizes, signals, clusters=["casting"] * len(sizes))
    assert "1 different size;" in refused(9 + 1e-9 * sizes, signals)


@pytest.mark.parametrize(
    ("sizes", "signals", "options"),
    [
        ([1.0, 2.0], [1.0], {}),
        ([1.0, 0.0], [1.0, 2.0], {}),
        ([1.0, np.nan], [1.0, 2.0], {}),
        ([1.0, 2.0], [1.0, np.nan], {}),
        ([1.0, 2.0], [1.0, -np.inf], {"log": False}),
        ([1.0, 2.0], [1.0, np.inf], {}),
        ([1.0, 2.0], [1.0, -1.0], {}),
        ([1.0, 2.0], [1.0, 2.0], {"noise": -1.0}),
        ([1.0, 2.0], [1.0, 2.0], {"noise": 0.0}),
        ([1.0, 2.0], [1.0, 2.0], {"clusters": [1]}),
    ],
)
def test_values_that_are_no_signals_are_an_error(sizes: list[float], signals: list[float], options: dict) -> None:
    with pytest.raises(ShapeError):
        signal_response(sizes, signals, 1.0, **options)


def test_the_least_value_of_a_quadratic_likelihood_is_known() -> None:
    middle, bend = np.array([1.0, -2.0]), np.array([[3.0, 1.0], [1.0, 2.0]])

    def likelihood(at: Floats) -> tuple[float, Floats, Floats]:
        away = at - middle
        return -float(away @ bend @ away) / 2, -bend @ away, -bend

    best = maximum(likelihood, np.zeros(2))
    assert best == pytest.approx(middle)
    direction = np.array([0.5, 3.0])
    width = math.sqrt(2 * 1.7 * direction @ np.linalg.inv(bend) @ direction)
    assert least(likelihood, best, direction, 1.7) == pytest.approx(direction @ middle - width)


def test_a_likelihood_that_grows_without_end_is_an_error() -> None:
    with pytest.raises(NoMaximumError):
        maximum(lambda at: (float(at[0]), np.ones(1), np.array([[-1e-9]])), np.zeros(1))
