"""Intervals, paired differences, modality gaps and Holm's correction: hand-counted cases, and laws that must hold."""

import math
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from featprobe.errors import DataError, ShapeError
from featprobe.metrics import (
    Resamples,
    Statistic,
    bca_interval,
    difference_of,
    groups_with_truth,
    holm,
    iou_scores,
    jackknifed,
    mean_of,
    modality_gap,
    paired_difference,
    percentile_interval,
    pixel_statistic,
    resample,
    score_interval,
    studentised_interval,
)
from featprobe.metrics.intervals import INTERVALS, draw_weights, grouped
from featprobe.scores import FEW_GROUPS

SEEDS = st.integers(0, 2**32 - 1)
QUICK = settings(max_examples=40, deadline=None)
FEW_DRAWS = 199  # resamples, where a law holds with any number of them


def random_confusions(seed: int, images: int = 24, classes: int = 4) -> NDArray[np.int64]:
    """Counts of an imperfect system, in which an image may lack any class: (images, classes, classes)."""
    rng = np.random.default_rng(seed)
    matrices = rng.poisson(20, (images, classes, classes)) * (rng.random((images, classes, 1)) < 0.6)
    matrices += np.eye(classes, dtype=int) * rng.poisson(60, (images, 1, 1)) * (rng.random((images, 1, classes)) < 0.6)
    return matrices.astype(np.int64)


def parts(images: int, each: int = 2) -> list[str]:
    return [f"part{i // each:03}" for i in range(images)]


def binary(hit: int, missed: int, alarm: int, rest: int = 100) -> list[list[int]]:
    """The confusion matrix of background and one defect."""
    return [[rest, alarm], [missed, hit]]


def of_values(values: list[float]) -> Resamples:
    """Resamples around 0.5, each with a standard error of 0.1, of groups without skewness."""
    errors, influence = np.full(len(values), 0.1), np.array([-0.1, 0.1]) / math.sqrt(2)
    return Resamples(0.5, 0.1, influence, np.array(values), errors, (0.0, 1.0))


# The statistic


def test_mean_iou_under_weights_counted_by_hand() -> None:
    score = pixel_statistic(np.array([binary(30, 10, 10), binary(10, 30, 10), binary(0, 0, 0)]), ["b", "a", "c"])
    weights = np.array([[1, 1, 1], [2, 1, 0], [0, 3, 0], [0, 0, 3]], dtype=float)  # of a, b, c
    assert score.value(weights) == pytest.approx([40 / 100, 50 / 150, 30 / 50, 40 / 100])
    assert score.sets == (("a", "b", "c"),)


def test_a_resample_without_a_class_keeps_its_iou_on_the_whole_split() -> None:
    """Class 1 stands in one group; class 2 in all, with an IoU of 1/2 throughout."""
    confusions = np.zeros((3, 3, 3), dtype=np.int64)
    confusions[:, 2, 2] = confusions[:, 2, 0] = 10
    confusions[0, 1, 1] = 9
    confusions[0, 1, 0] = 1
    score = pixel_statistic(confusions)
    held = score.value(np.array([[0.0, 2, 1], [0, 0, 3], [3, 0, 0], [1, 1, 1]]))
    assert held == pytest.approx([(0.9 + 0.5) / 2] * 4)
    assert groups_with_truth(confusions) == (0, 1, 3)


def test_a_class_that_a_resample_lacks_and_predicts_all_the_same_scores_0_there() -> None:
    score = pixel_statistic(np.array([binary(50, 0, 0), binary(0, 0, 5)]))
    assert score.value(np.array([[1.0, 1], [0, 2]])) == pytest.approx([50 / 55, 0])


@pytest.mark.parametrize("absent", ["zero", "ignore"])
@pytest.mark.parametrize("name", ["miou", "miou_foreground"])
@given(seed=SEEDS, images=st.integers(2, 6))
@QUICK
def test_the_estimate_is_the_score_of_the_whole_split(absent, name, seed, images) -> None:
    confusions = random_confusions(seed, images)
    found = score_interval(pixel_statistic(confusions, score=name, absent=absent), resamples=FEW_DRAWS)
    expected = getattr(iou_scores(confusions.sum(0), absent), name)
    assert found.estimate == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("of", ["one", "mean", "difference"])
@given(seed=SEEDS)
@QUICK
def test_the_influence_is_the_derivative_and_sums_to_0(of, seed) -> None:
    one, other = (pixel_statistic(random_confusions(s, 6), score="miou") for s in (seed, seed + 1))
    score = {"one": one, "mean": mean_of([one, other]), "difference": difference_of(one, other)}[of]
    weights = next(draw_weights([6], 5, seed))
    influence = score.influence(weights)
    assert (weights * influence).sum(1) == pytest.approx(np.zeros(5), abs=1e-12)
    for group in np.flatnonzero(weights[0]):
        step = 1e-5 * np.eye(6)[group]
        slope = (score.value(weights[:1] + step) - score.value(weights[:1] - step)) / 2e-5
        assert influence[0, group] == pytest.approx(slope[0], abs=1e-7)


def test_a_jackknifed_score_has_nearly_the_interval_of_its_derivative() -> None:
    score = pixel_statistic(random_confusions(5, 120), parts(120, 3))
    asked = []

    def value(weights):
        asked.append(weights)
        return score.value(weights)

    by_derivative = score_interval(score, resamples=499)
    by_leaving_out = score_interval(jackknifed(value, score.sets[0]), resamples=499)
    assert by_leaving_out.estimate == by_derivative.estimate
    assert by_leaving_out.low == pytest.approx(by_derivative.low, abs=2e-3)
    assert by_leaving_out.high == pytest.approx(by_derivative.high, abs=2e-3)
    every = np.concatenate(asked)
    assert np.all(every >= 0) and np.all(every == np.floor(every)) and np.all(every.sum(1) >= 39)


def test_the_jackknife_of_a_mean_gives_its_standard_error() -> None:
    values = np.array([0.1, 0.4, 0.2, 0.7, 0.6])
    mean = jackknifed(lambda weights: weights @ values / weights.sum(1), "abcde")
    assert resample(mean, 9).standard_error == pytest.approx(values.std(ddof=1) / math.sqrt(5))


def test_a_score_that_some_resamples_lack_still_has_an_interval() -> None:
    """Resamples of such groups alone say nothing of the spread; the studentised interval grows, none becomes nan."""
    values = np.array([np.nan, 0.5, 0.6, 0.4, 0.55])

    def mean_of_known(weights):
        known = weights[:, 1:]
        drawn = known.sum(1)
        return np.divide(known @ values[1:], drawn, out=np.full(len(weights), np.nan), where=drawn > 0)

    score = jackknifed(mean_of_known, "abcde")
    assert np.isfinite(score.influence(np.array([[4.0, 1, 0, 0, 0]]))).all()  # without b it has no score
    found = {name: score_interval(score, name) for name in INTERVALS}
    assert all(0 <= f.low < f.estimate < f.high <= 1 for f in found.values())
    assert found["studentised"].high - found["studentised"].low > found["bca"].high - found["bca"].low


# Drawing groups


def test_every_resample_draws_as_many_groups_as_each_set_has() -> None:
    weights = np.concatenate(list(draw_weights([7, 3], 1000, 0)))
    assert weights.shape == (1000, 10)
    assert np.all(weights[:, :7].sum(1) == 7) and np.all(weights[:, 7:].sum(1) == 3)
    assert weights.mean(0) == pytest.approx(np.ones(10), abs=0.15)


def test_a_set_is_drawn_alike_whatever_stands_beside_it_and_however_many_at_once(monkeypatch) -> None:
    alone = np.concatenate(list(draw_weights([7], 50, 3)))
    monkeypatch.setattr("featprobe.metrics.intervals.AT_ONCE", 60)
    assert np.array_equal(np.concatenate(list(draw_weights([7, 3], 50, 3)))[:, :7], alone)


@given(seed=SEEDS)
@QUICK
def test_the_same_seed_gives_the_same_interval_and_another_one_another(seed) -> None:
    score = pixel_statistic(random_confusions(1), parts(24))
    first, again, other = (score_interval(score, resamples=FEW_DRAWS, seed=s) for s in (seed, seed, seed + 1))
    assert first == again
    assert first.estimate == other.estimate and first.low != other.low


# Intervals from resamples


def test_the_percentile_interval_lies_between_quantiles() -> None:
    assert percentile_interval(of_values(np.linspace(0, 1, 1001).tolist())) == pytest.approx((0.025, 0.975))


def test_bca_is_the_percentile_interval_without_bias_and_skewness_and_moves_against_bias() -> None:
    even = of_values(np.linspace(0, 1, 1001).tolist())
    assert bca_interval(even) == pytest.approx(percentile_interval(even), abs=1e-3)
    low, high = bca_interval(of_values(np.linspace(-0.1, 0.9, 1001).tolist()))  # 600 of 1001 lie below the estimate
    assert low == pytest.approx(-0.1 + 0.0730, abs=2e-3)  # Phi(2 * 0.2533 - 1.96) and Phi(2 * 0.2533 + 1.96)
    assert high == pytest.approx(-0.1 + 0.9932, abs=2e-3)


def test_the_studentised_interval_reaches_as_far_as_95_of_100_draws_lie() -> None:
    """19 draws: with the estimate 20, so that 95 % of them is the farthest of the draws."""
    low, high = studentised_interval(of_values([0.5] * 18 + [0.8]))
    reach = math.log(0.8 / 0.2) * (0.8 * 0.2) / 0.1  # standard errors on the logit's scale
    end = reach * 0.1 / 0.25
    assert (low, high) == pytest.approx((1 / (1 + math.exp(end)), 1 / (1 + math.exp(-end))))
    assert studentised_interval(of_values([0.5] * 17 + [0.8])) == (0, 1)  # too few to say


def test_draws_that_say_nothing_of_their_spread_widen_the_studentised_interval_to_the_bounds() -> None:
    draws = of_values([0.5] * 90 + [0.6] * 9)
    draws.standard_errors[90:] = 0
    assert studentised_interval(draws) == (0, 1)


@given(seed=SEEDS, images=st.integers(4, 40))
@QUICK
def test_the_default_interval_holds_the_estimate_and_stays_within_0_and_1(seed, images) -> None:
    found = score_interval(pixel_statistic(random_confusions(seed, images), parts(images)), resamples=FEW_DRAWS)
    assert 0 <= found.low <= found.estimate <= found.high <= 1
    assert found.groups == (images + 1) // 2
    assert found.few_groups == (found.groups < FEW_GROUPS)


def test_more_groups_and_a_lower_level_make_it_narrower() -> None:
    few, many = (pixel_statistic(random_confusions(2, images), parts(images)) for images in (24, 240))

    def width(score: Statistic, level: float = 0.95) -> float:
        found = score_interval(score, level=level, resamples=999)
        return found.high - found.low

    assert width(many) < width(few) / 2
    assert width(many, 0.8) < width(many) < width(many, 0.99)


# Groups and images


@given(seed=SEEDS)
@QUICK
def test_the_order_of_the_images_changes_nothing(seed) -> None:
    confusions, groups = random_confusions(seed), parts(24)
    order = np.random.default_rng(seed).permutation(24)
    moved = pixel_statistic(confusions[order], [groups[i] for i in order])
    whole = pixel_statistic(confusions, groups)
    assert score_interval(moved, resamples=FEW_DRAWS) == score_interval(whole, resamples=FEW_DRAWS)


@given(seed=SEEDS)
@QUICK
def test_the_names_of_the_groups_change_no_more_than_another_seed_does(seed) -> None:
    confusions = random_confusions(seed)
    renamed = [f"{name:03}" for name in np.random.default_rng(seed).permutation(12).repeat(2)]
    here, there = (resample(pixel_statistic(confusions, groups), 9) for groups in (parts(24), renamed))
    assert here.estimate == pytest.approx(there.estimate)
    assert here.standard_error == pytest.approx(there.standard_error)
    assert sorted(here.influence) == pytest.approx(sorted(there.influence))


def test_a_group_for_each_image_is_the_bootstrap_over_images() -> None:
    confusions = random_confusions(3)
    each = score_interval(pixel_statistic(confusions, parts(24, each=1)), resamples=FEW_DRAWS)
    assert each == score_interval(pixel_statistic(confusions), resamples=FEW_DRAWS)


def test_copies_of_the_images_within_their_groups_make_nothing_surer() -> None:
    confusions = random_confusions(4)
    once, twice = (
        pixel_statistic(confusions, parts(24)),
        pixel_statistic(confusions.repeat(2, axis=0), parts(48, each=4)),
    )
    assert score_interval(once, resamples=FEW_DRAWS) == score_interval(twice, resamples=FEW_DRAWS)
    as_images = score_interval(pixel_statistic(confusions.repeat(2, axis=0)), resamples=FEW_DRAWS)
    found = score_interval(once, resamples=FEW_DRAWS)
    assert as_images.high - as_images.low < found.high - found.low  # which would be surer than it should


def test_the_mean_of_equal_runs_is_the_run_and_of_others_lies_between() -> None:
    a, b = (pixel_statistic(random_confusions(seed), parts(24)) for seed in (6, 7))
    assert score_interval(mean_of([a, a]), resamples=FEW_DRAWS) == score_interval(a, resamples=FEW_DRAWS)
    both, alone = resample(mean_of([a, b]), FEW_DRAWS), [resample(run, FEW_DRAWS) for run in (a, b)]
    assert both.values == pytest.approx((alone[0].values + alone[1].values) / 2)
    assert both.standard_error < max(run.standard_error for run in alone)


# Degenerate splits


def test_a_limit_at_the_bound_of_the_scale_is_no_interval() -> None:
    a, b = (pixel_statistic(random_confusions(seed), parts(24)) for seed in (1, 2))
    two = pixel_statistic(np.array([binary(50, 5, 0), binary(30, 30, 2)]))
    one = pixel_statistic(random_confusions(0, 3), ["only"] * 3)
    assert score_interval(a).has_interval and paired_difference(a, b).has_interval
    assert modality_gap((a, b), (b, a)).has_interval
    for unknown in (score_interval(two), score_interval(one), paired_difference(one, one)):
        assert not unknown.has_interval
    other = pixel_statistic(np.array([binary(51, 5, 0), binary(30, 35, 2)]))
    found = paired_difference(two, other)
    assert (found.low, found.high) == (-1, 1) and not found.has_interval
    gap = modality_gap((two, other), (other, two))
    assert (gap.low, gap.high) == gap.bounds == (-2, 2) and not gap.has_interval


def test_one_group_has_a_score_and_no_interval() -> None:
    score = pixel_statistic(random_confusions(0, 3), ["only"] * 3)
    found, difference = score_interval(score), paired_difference(score, score)
    assert found.estimate == pytest.approx(iou_scores(random_confusions(0, 3).sum(0)).miou_foreground)
    assert math.isnan(found.low) and math.isnan(found.high) and math.isnan(difference.p_value)
    assert found.groups == 1 and found.few_groups
    with pytest.raises(DataError, match="two groups or more"):
        resample(score)


@pytest.mark.parametrize("method", INTERVALS)
def test_groups_that_all_score_alike_leave_no_room(method) -> None:
    found = score_interval(pixel_statistic(np.array([binary(30, 10, 10)] * 8)), method)
    assert (found.low, found.high) == pytest.approx((0.6, 0.6))


@pytest.mark.parametrize(("hit", "missed", "score"), [(50, 0, 1.0), (0, 50, 0.0)])
def test_scores_of_0_and_1_have_an_interval(hit, missed, score) -> None:
    perfect = pixel_statistic(np.array([binary(hit, missed, 0)] * 8))
    assert score_interval(perfect).estimate == score_interval(perfect).low == score_interval(perfect).high == score


def test_a_split_of_background_alone_has_no_foreground_score() -> None:
    empty = pixel_statistic(np.array([binary(0, 0, 0)] * 8))
    found, difference = score_interval(empty), paired_difference(empty, empty)
    assert all(math.isnan(value) for value in (found.estimate, found.low, found.high, difference.p_value))
    assert score_interval(pixel_statistic(np.array([binary(0, 0, 0)] * 8), score="miou")).estimate == 1


def test_two_groups_that_differ_say_next_to_nothing() -> None:
    found = score_interval(pixel_statistic(np.array([binary(50, 5, 0), binary(30, 30, 2)])))
    assert (found.low, found.high) == (0, 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: pixel_statistic(np.zeros((0, 2, 2), dtype=np.int64)),
        lambda: pixel_statistic(np.zeros((4, 2, 3), dtype=np.int64)),
        lambda: pixel_statistic(np.zeros((2, 2), dtype=np.int64)),
        lambda: pixel_statistic(random_confusions(0, 4), ["a", "b"]),
        lambda: mean_of([]),
        lambda: difference_of(pixel_statistic(random_confusions(0, 4)), pixel_statistic(random_confusions(0, 5))),
        lambda: paired_difference(
            pixel_statistic(random_confusions(0, 4), ["a", "a", "b", "b"]),
            pixel_statistic(random_confusions(0, 4), ["a", "a", "c", "c"]),
        ),
        lambda: holm([0.5, 1.5]),
        lambda: holm([[0.5]]),
    ],
)
def test_what_does_not_fit_together_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ShapeError):
        make()


# Differences


@given(seed=SEEDS)
@QUICK
def test_a_system_does_not_differ_from_itself(seed) -> None:
    score = pixel_statistic(random_confusions(seed), parts(24))
    found = paired_difference(score, score, resamples=FEW_DRAWS)
    assert (found.estimate, found.low, found.high, found.p_value) == (0, 0, 0, 1)


@given(seed=SEEDS, shift=st.integers(0, 30))
@QUICK
def test_a_difference_turns_round_and_its_interval_agrees_with_its_p_value(seed, shift) -> None:
    first, second = random_confusions(seed), random_confusions(seed + 1)
    second[:, 1, 1] += shift
    a, b = (pixel_statistic(confusions, parts(24)) for confusions in (first, second))
    there, back = (paired_difference(*pair, resamples=FEW_DRAWS) for pair in ((a, b), (b, a)))
    assert there.estimate == score_interval(a).estimate - score_interval(b).estimate
    assert (there.estimate, there.low, there.high) == pytest.approx((-back.estimate, -back.high, -back.low))
    assert there.p_value == back.p_value
    assert -1 <= there.low <= there.estimate <= there.high <= 1
    assert (there.low > 0 or there.high < 0) == (there.p_value <= 0.05)


def test_a_small_lead_on_every_part_is_found_where_unpaired_intervals_overlap() -> None:
    rng = np.random.default_rng(0)
    hits = rng.integers(20, 80, 40)
    a = pixel_statistic(np.array([binary(hit, 100 - hit, 0) for hit in hits]))
    fewer = hits - rng.integers(1, 5, 40)
    b = pixel_statistic(np.array([binary(hit, 100 - hit, 0) for hit in fewer]))
    found, ahead, behind = paired_difference(a, b), score_interval(a), score_interval(b)
    assert behind.high > ahead.low
    assert 0 < found.low < found.estimate < found.high < 0.05
    assert found.p_value == pytest.approx(1 / 10_001)


def test_three_groups_can_not_say_more_than_three_coins() -> None:
    a = pixel_statistic(np.array([binary(80, 20, 0), binary(70, 30, 0), binary(75, 25, 0)]))
    b = pixel_statistic(np.array([binary(20, 80, 0), binary(10, 90, 0), binary(15, 85, 0)]))
    assert paired_difference(a, b).p_value >= 0.25


def test_a_difference_on_which_all_groups_agree_is_certain_as_far_as_groups_go() -> None:
    a, b = (pixel_statistic(np.array([binary(hit, 100 - hit, 0)] * 8)) for hit in (60, 50))
    found = paired_difference(a, b)
    assert (found.estimate, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    assert found.p_value == 2**-7


def test_the_modality_gap_is_the_difference_of_the_differences() -> None:
    first, second = (
        [pixel_statistic(random_confusions(seed, images), parts(images)) for seed in seeds]
        for images, seeds in ((48, (1, 2)), (24, (3, 4)))
    )
    gap, turned = modality_gap(tuple(first), tuple(second)), modality_gap(tuple(second), tuple(first))
    on_first, on_second = paired_difference(*first), paired_difference(*second)
    assert gap.estimate == pytest.approx(on_first.estimate - on_second.estimate)
    assert gap.groups == 12
    spread = math.hypot(on_first.high - on_first.low, on_second.high - on_second.low)
    assert gap.high - gap.low == pytest.approx(spread, rel=0.15)
    assert turned.estimate == pytest.approx(-gap.estimate)
    assert turned.p_value == pytest.approx(gap.p_value, abs=0.03)  # other random numbers for each set
    assert (gap.low > 0 or gap.high < 0) == (gap.p_value <= 0.05)


def test_there_is_no_gap_where_neither_set_shows_a_difference() -> None:
    a, b = (pixel_statistic(random_confusions(seed), parts(24)) for seed in (1, 2))
    found = modality_gap((a, a), (b, b), resamples=FEW_DRAWS)
    assert (found.estimate, found.low, found.high, found.p_value) == (0, 0, 0, 1)


# Holm


def test_holm_counted_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert holm([0.6, 0.9]) == (1, 1)
    assert holm([]) == ()


def test_holm_leaves_out_what_could_not_be_tested() -> None:
    low, untested, high = holm([0.01, math.nan, 0.03])
    assert (low, high) == (0.02, 0.03) and math.isnan(untested)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.randoms())
def test_holm_keeps_the_order_and_stays_between_the_p_value_and_bonferronis(p_values, random) -> None:
    adjusted = holm(p_values)
    assert all(p <= a <= min(1, p * len(p_values)) for p, a in zip(p_values, adjusted, strict=True))
    rising = [adjusted[i] for i in np.argsort(p_values, kind="stable")]
    assert rising == sorted(rising)
    order = random.sample(range(len(p_values)), len(p_values))
    assert holm([p_values[i] for i in order]) == tuple(adjusted[i] for i in order)


def test_one_long_name_does_not_widen_all_others() -> None:
    long, names = "a" * 1_000_000, [f"part{i % 7}" for i in range(100)]
    tracemalloc.start()
    found, index = grouped([*names, long])
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == (long, *sorted(set(names))) and [found[i] for i in index] == [*names, long]
    assert most < 1_000_000
