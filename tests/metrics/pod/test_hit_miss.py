"""POD from hits and misses: the fit, its bounds, and the laws that they keep."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import chi2, logistic, norm
from sklearn.linear_model import LogisticRegression

from featprobe.errors import DataError, ShapeError
from featprobe.metrics.pod.bounds import upper_a90
from featprobe.metrics.pod.clustered import Clusters, clustered_a90
from featprobe.metrics.pod.coverage import ALONE_COVERS, CLUSTERED_COVERS
from featprobe.metrics.pod.hit_miss import hit_miss
from featprobe.metrics.pod.maximum_likelihood import LINKS, Model, fit
from featprobe.metrics.pod.pod_values import Link, Pod, Refused

NAMES: tuple[Link, ...] = ("logit", "probit")
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def targets(seed: int, number: int = 90, slope: float = 2.5, middle: float = 4.0) -> tuple[Floats, Bools]:
    """Sizes around a50 = middle, and which are found after a logit."""
    rng = np.random.default_rng(seed)
    sizes = middle * np.exp(rng.uniform(-1.5, 1.5, number))
    return sizes, rng.random(number) < logistic.cdf(slope * np.log(sizes / middle))


def carried(*given: object, **options: object) -> Pod:
    answer = hit_miss(*given, **options)  # type: ignore[arg-type]
    assert isinstance(answer, Pod), answer
    return answer


def test_a_logit_is_that_of_scikit_learn() -> None:
    sizes, found = targets(1, 200)
    other = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(np.log(sizes)[:, None], found)
    pod = carried(sizes, found)
    assert pod.intercept == pytest.approx(float(other.intercept_[0]), rel=1e-5)
    assert pod.slope == pytest.approx(float(other.coef_[0, 0]), rel=1e-5)
    assert pod.a50 == pytest.approx(math.exp(-pod.intercept / pod.slope))
    assert pod.a90 == pytest.approx(math.exp((math.log(9) - pod.intercept) / pod.slope))
    assert (pod.targets, pod.hits, pod.misses, pod.clusters, pod.clustered) == (
        200,
        found.sum(),
        (~found).sum(),
        200,
        False,
    )


@pytest.mark.parametrize("link", NAMES)
def test_bounds_are_those_of_a_search_over_curves(link: Link) -> None:
    """One weight of all curves with one a90 is searched for, and then the a90 at which the ratio is what is allowed."""
    sizes, found = targets(2)
    logs, law = np.log(sizes), {"logit": logistic, "probit": norm}[link]
    signs = np.where(found, 1, -1)
    pod = carried(sizes, found, link=link)

    def best(a90: float) -> float:
        def loss(slope: float) -> float:
            return -float(law.logcdf(signs * (law.ppf(0.9) + slope * (logs - a90))).sum())

        return -float(minimize_scalar(loss, bounds=(0, 50), options={"xatol": 1e-10}, method="bounded").fun)

    highest = best(math.log(pod.a90))
    assert highest == pytest.approx(float(law.logcdf(signs * (pod.intercept + pod.slope * logs)).sum()), abs=1e-8)
    for bound, allowed in ((pod.a90_95, norm.ppf(0.95) ** 2), (pod.joint_a90_95, chi2.ppf(0.95, 2))):
        searched = brentq(lambda a, c=allowed: 2 * (highest - best(a)) - c, math.log(pod.a90), math.log(pod.a90) + 9)
        assert bound == pytest.approx(math.exp(searched), rel=1e-6)


@pytest.mark.parametrize("link", NAMES)
@pytest.mark.parametrize("shared", [False, True])
def test_the_band_reaches_90_percent_at_the_bound(link: Link, shared: bool) -> None:
    sizes, found = targets(3, 120)
    pod = carried(sizes, found, np.arange(120) // 3 if shared else None, link)
    curve = pod.curve
    assert pod.clustered is shared
    assert np.interp(0.9, curve.low, curve.sizes) == pytest.approx(pod.a90_95, rel=1e-3)
    assert np.interp(0.5, curve.pod, curve.sizes) == pytest.approx(pod.a50, rel=1e-3)
    assert (np.diff(curve.sizes) > 0).all() and (curve.low < curve.pod).all() and (curve.pod < curve.high).all()
    assert pod.a50 < pod.a90 < pod.a90_95 < pod.joint_a90_95  # type: ignore[operator]


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000), factor=st.floats(1e-6, 1e6), link=st.sampled_from(NAMES), shared=st.booleans())
def test_sizes_in_another_unit_give_the_same_curve_in_that_unit(
    seed: int, factor: float, link: Link, shared: bool
) -> None:
    sizes, found = targets(seed, 72)
    clusters = np.arange(72) // 3 if shared else None
    one, other = hit_miss(sizes, found, clusters, link), hit_miss(sizes * factor, found, clusters, link)
    if isinstance(one, Refused) or isinstance(other, Refused):
        assert type(one) is type(other)
        return
    for name in ("a50", "a90", "a90_95", "joint_a90_95"):
        assert getattr(other, name) == pytest.approx(getattr(one, name) * factor, rel=1e-6)
    assert other.slope == pytest.approx(one.slope, rel=1e-6)
    assert other.lack_of_fit == pytest.approx(one.lack_of_fit, rel=1e-5)
    assert other.curve.low == pytest.approx(one.curve.low, abs=1e-6)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000), shared=st.booleans())
def test_neither_the_order_of_targets_nor_names_of_clusters_matter(seed: int, shared: bool) -> None:
    sizes, found = targets(seed, 72)
    clusters = np.arange(72) // 3
    order = np.random.default_rng(seed).permutation(72)
    one = carried(sizes, found, clusters if shared else None)
    other = carried(sizes[order], found[order], [f"part {c}" for c in clusters[order]] if shared else None)
    for name in ("a50", "a90", "a90_95", "joint_a90_95", "lack_of_fit"):
        assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-6)


def test_clusters_of_one_are_no_clusters() -> None:
    sizes, found = targets(4)
    alone, named = carried(sizes, found), carried(sizes, found, range(len(sizes)))
    assert (named.a90_95, named.clustered, named.coverage) == (alone.a90_95, False, alone.coverage)
    assert alone.simulated == "60 targets"


@pytest.mark.parametrize(
    ("clusters", "published"), [(None, ALONE_COVERS[60]), (Clusters(np.full(20, 3)), CLUSTERED_COVERS[20])]
)
def test_bounds_cover_what_is_published(clusters: Clusters | None, published: float) -> None:
    """Steep curves, and for clusters of three, what a cluster has in common has the sd 1.5."""
    rng, sets = np.random.default_rng(10), 400 if clusters is None else 100
    x = rng.uniform(-1.5, 1.5, (sets, 60))
    shared = np.zeros((sets, 60)) if clusters is None else np.repeat(rng.normal(0, 1.5, (sets, 20)), 3, -1)
    found = rng.random(x.shape) < logistic.cdf(4 * x + shared)
    model = Model(LINKS["logit"], np.where(found, 1.0, -1.0), np.stack([np.ones_like(x), x], -2))
    fitted = fit(model, np.zeros((sets, 2)))
    if clusters is None:
        bounds = upper_a90(model, fitted)
    else:
        bounds, _ = clustered_a90(model, fitted, clusters, 99, rng)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    spread = 0 if clusters is None else 1.5
    true = brentq(lambda a: logistic.cdf(4 * a + spread * nodes) @ weights / weights.sum() - 0.9, 0, 3)
    assert np.mean(bounds >= true) >= published - 3 * np.sqrt(published * (1 - published) / sets)


def test_targets_counted_three_times_say_no_more_in_clusters() -> None:
    sizes, found = targets(5, 150)
    once = carried(sizes, found)
    blind, known = (carried(np.repeat(sizes, 3), np.repeat(found, 3), c) for c in (None, np.arange(450) // 3))
    assert blind.a90 == pytest.approx(once.a90) == pytest.approx(known.a90)
    assert blind.a90_95 < 0.95 * once.a90_95  # type: ignore[operator]
    assert known.a90_95 == pytest.approx(once.a90_95, rel=0.1) and known.a90_95 > blind.a90_95  # type: ignore[operator]


def test_without_proof_of_growth_the_bound_is_infinite() -> None:
    rng = np.random.default_rng(6)
    sizes = np.exp(rng.uniform(-1, 1, 80))
    found = np.r_[np.ones(40, bool), np.zeros(40, bool)]
    sizes[:40] *= 1.001 * np.exp(np.log(sizes[40:]).mean() - np.log(sizes[:40]).mean())  # hits are 0.1 % larger
    pod = carried(sizes, found)
    assert pod.a90_95 == math.inf == pod.joint_a90_95
    assert "infinite" in pod.notes[0] and not pod.no_bound


def test_few_clusters_give_a_curve_and_no_bound() -> None:
    sizes, found = targets(7)
    pod = carried(sizes, found, np.arange(90) // 11)
    assert (pod.a90_95, pod.joint_a90_95, pod.coverage, pod.simulated) == (None, None, None, "")
    assert "9 clusters" in pod.no_bound and pod.a90 > 0
    assert (pod.curve.low <= carried(sizes, found).curve.low + 1e-9).all()
    assert isinstance(hit_miss(sizes, found, np.arange(90) // 45), Refused)


def test_a_curve_beyond_the_targets_is_said_to_be() -> None:
    sizes, found = targets(8, 150)
    small = sizes < 5
    pod = carried(sizes[small], found[small])
    assert any("beyond the largest target" in note for note in pod.notes)


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf])
def test_sizes_that_are_none_are_named(wrong: float) -> None:
    sizes, found = targets(9)
    sizes[7] = wrong
    with pytest.raises(DataError, match=r"(?s)1 size of 90 targets.*target 7"):
        hit_miss(sizes, found)


def test_lengths_must_agree() -> None:
    sizes, found = targets(9)
    with pytest.raises(ShapeError):
        hit_miss(sizes, found[:-1])
    with pytest.raises(ShapeError):
        hit_miss(sizes, found, [0, 1])
