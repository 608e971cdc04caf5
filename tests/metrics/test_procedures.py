"""Differences of procedures hold their seeds: cases counted by hand, laws, and equals that should not differ."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from featprobe.errors import ShapeError
from featprobe.metrics import (
    Difference,
    SeedSpread,
    Statistic,
    difference_of,
    mean_of,
    modality_gap,
    paired_difference,
    pixel_statistic,
    procedure_difference,
    procedure_gap,
    seed_spread,
)

SEEDS = st.integers(0, 2**32 - 1)
QUICK = settings(max_examples=30, deadline=None)
FEW_DRAWS = 199  # resamples, where a law holds with any number of them

Floats = NDArray[np.float64]
Runs = list[Statistic]


def mean_score(scores: Sequence[float] | Floats) -> Statistic:
    """The mean over groups of scores, (groups,)."""
    parts = np.asarray(scores, dtype=float) / len(scores)
    names = tuple(f"part{i:03}" for i in range(len(parts)))
    return Statistic(lambda w: w @ parts, lambda w: parts - (w @ parts)[:, None] / len(parts), (names,))


def drawn(seed: int, groups: int = 24, seeds: Sequence[int] = (3, 3), seed_sd: float = 0.003) -> list[Runs]:
    """Results of procedures that are equal; each seed has a part of its own, and one on each group."""
    rng = np.random.default_rng(seed)
    of_groups = 0.5 + rng.normal(0, 0.08, groups)
    return [
        [mean_score(of_groups + rng.normal(0, seed_sd) + rng.normal(0, 0.0172, groups)) for _ in range(count)]
        for count in seeds
    ]


def ends(found: Difference) -> tuple[float, float, float]:
    return found.low, found.estimate, found.high


def width(found: Difference) -> float:
    return found.high - found.low


def compared(results: Sequence[Runs], spread: SeedSpread | None, same_seeds: bool = False) -> Difference:
    return procedure_difference(results[0], results[1], spread, same_seeds=same_seeds, resamples=FEW_DRAWS)


# What seeds do


def test_the_spread_over_seeds_counted_by_hand() -> None:
    """Seeds that differ by as much on each group, 0.1 and 0.3 in two results: groups explain nothing of it."""
    base = np.array([0.2, 0.5, 0.3])
    pair, three = [mean_score(base), mean_score(base + 0.1)], [mean_score(base + shift) for shift in (0, 0, 0.3)]
    found = seed_spread([pair, three]).own
    assert found.between == pytest.approx((2 * 0.05**2 + 2 * 0.1**2 + 0.2**2) / 3)
    assert found.by_groups == pytest.approx(0, abs=1e-15) and found.degrees == 3
    assert found.of_seeds == pytest.approx(found.between)


def test_what_groups_explain_counted_by_hand() -> None:
    """Each seed is better on another group, and both are equally good: all that seeds do is seed x group."""
    found = seed_spread([[mean_score([0.2, 0.4]), mean_score([0.4, 0.2])]]).own
    assert found.between == pytest.approx(0, abs=1e-15)
    assert found.by_groups == pytest.approx(4 * 0.1**2 / 2)  # the mean square, with one degree of freedom, for a group
    assert found.of_seeds == 0


def test_what_a_seed_does_to_all_results_is_no_part_of_what_they_differ_in() -> None:
    both = np.array([0.0, 0.1, -0.1])
    first, second = ([mean_score(np.full(4, 0.5) + common + own) for common, own in zip(both, part, strict=True)]
                     for part in ((0.02, 0, 0), (0, 0, 0)))  # fmt: skip
    shared = seed_spread([first, second]).shared[3]
    assert shared.degrees == 2
    assert shared.between == pytest.approx(np.var([0.02, 0, 0], ddof=1) / 2)
    assert seed_spread([first, second]).own.between > 10 * shared.between


def test_a_result_of_one_seed_says_nothing_of_seeds_nor_does_a_seed_without_a_score() -> None:
    first, second = drawn(1)
    plain = seed_spread([first, second])
    nothing = replace(mean_score(np.zeros(24)), value=lambda weights: np.full(len(weights), np.nan))
    assert seed_spread([first, drawn(2, seeds=(1,))[0], second]) == plain
    assert seed_spread([[*first, nothing], second]) == plain
    assert seed_spread([[nothing, nothing], [first[0]]]).own.degrees == 0


def test_variances_of_iou_come_from_its_influences() -> None:
    """Heads with the same pixels wrong on other parts: their scores agree, their groups do not."""
    rng = np.random.default_rng(5)
    hits = rng.integers(40, 60, 24)
    runs = [
        pixel_statistic(np.array([[[500, 0], [100 - hit, hit]] for hit in rng.permutation(hits)])) for _ in range(3)
    ]
    found = seed_spread([runs]).own
    assert found.between == pytest.approx(0, abs=1e-15)
    assert found.by_groups == pytest.approx(np.var(hits / 100, ddof=1) / 24, rel=0.3)


# Differences


@given(seed=SEEDS)
@QUICK
def test_without_seed_variance_it_is_the_difference_of_the_means(seed) -> None:
    first, second = drawn(seed)
    assert compared([first, second], None) == paired_difference(mean_of(first), mean_of(second), resamples=FEW_DRAWS)
    solved = [[run] * 2 for run in (first[0], second[0])]
    assert compared(solved, seed_spread(solved)) == paired_difference(first[0], second[0], resamples=FEW_DRAWS)


@given(seed=SEEDS, counts=st.lists(st.integers(2, 5), min_size=2, max_size=4))
@QUICK
def test_a_difference_turns_round_and_holds_what_its_p_value_does_not_exclude(seed, counts) -> None:
    results = drawn(seed, seeds=counts, seed_sd=0.01)
    spread = seed_spread(results)
    there, back = compared(results, spread), compared(results[1::-1], spread)
    assert ends(there) == pytest.approx((-back.high, -back.estimate, -back.low))
    assert there.p_value == back.p_value
    assert -1 < there.low < there.estimate < there.high < 1 and there.has_interval
    assert (there.low > 0 or there.high < 0) == (there.p_value <= 0.05)


@given(seed=SEEDS, shift=st.floats(-0.2, 0.2))
@QUICK
def test_neither_the_order_of_seeds_nor_what_all_share_changes_it(seed, shift) -> None:
    results = drawn(seed, seeds=(3, 4, 2))
    mixed = [[runs[i] for i in np.random.default_rng(seed).permutation(len(runs))] for runs in results]
    parts = [[run.value(np.eye(24) * 24) for run in runs] for runs in results]  # each group alone: its score
    moved = [[mean_score(part + shift) for part in runs] for runs in parts]
    plain = compared(results, seed_spread(results))
    for others in (mixed, moved):
        found = compared(others, seed_spread(others))
        assert ends(found) == pytest.approx(ends(plain), abs=1e-9)
        assert found.p_value == pytest.approx(plain.p_value, abs=2 / FEW_DRAWS)


@given(seed=SEEDS, counts=st.tuples(st.integers(2, 4), st.integers(2, 4)))
@QUICK
def test_nothing_is_surer_of_procedures_than_of_the_heads_that_they_made(seed, counts) -> None:
    results = drawn(seed, seeds=counts)
    found, heads = compared(results, seed_spread(results)), compared(results, None)
    assert found.estimate == heads.estimate
    assert found.p_value >= heads.p_value
    assert found.low <= heads.low and found.high >= heads.high


def test_the_farther_seeds_lie_apart_and_the_fewer_they_are_the_wider_it_is() -> None:
    widths = [width(compared(results, seed_spread(results))) for sd in (0.001, 0.004, 0.016, 0.064)
              for results in [drawn(3, seed_sd=sd)]]  # fmt: skip
    assert widths == sorted(widths) and widths[-1] > 5 * widths[0]
    results = drawn(4, seeds=(8, 8), seed_sd=0.01)
    spread = seed_spread(results)
    fewer = [width(compared([runs[:count] for runs in results], spread)) for count in (8, 4, 2)]
    assert fewer == sorted(fewer)
    uneven = width(compared([results[0][:2], results[1]], spread))
    assert fewer[0] < uneven < fewer[2]


def test_more_results_tell_more_of_seeds() -> None:
    """With two results of two seeds their variance has two degrees of freedom, with eight of them eight."""
    results = drawn(6, groups=300, seeds=(2,) * 8, seed_sd=0.01)
    few, many = seed_spread(results[:2]), seed_spread(results)
    alike = replace(few, own=replace(many.own, degrees=few.own.degrees))
    assert width(compared(results, many)) < width(compared(results, alike)) / 1.3


def test_what_the_same_seeds_do_to_both_cancels() -> None:
    """Subsets of the training images: good or bad for both, by three points."""
    rng = np.random.default_rng(7)
    common = rng.normal(0, 0.03, 5)
    results = [
        [mean_score(0.5 + part + rng.normal(0, 0.003) + rng.normal(0, 0.0172, 48)) for part in common] for _ in range(3)
    ]
    spread = seed_spread(results)
    assert width(compared(results, spread, same_seeds=True)) < width(compared(results, spread)) / 4


def test_equals_that_differ_in_their_seeds_alone_are_seldom_found_to_differ() -> None:
    tables = [drawn(seed, groups=48) for seed in range(250)]
    found = np.mean([compared(table, seed_spread(table)).p_value <= 0.05 for table in tables])
    heads = np.mean([compared(table, None).p_value <= 0.05 for table in tables])
    assert found <= 0.075 and heads >= 0.15  # the heads do differ


def test_a_lead_that_is_larger_than_what_seeds_do_is_found() -> None:
    first, second = drawn(8, groups=48, seeds=(5, 5))
    ahead = [replace(run, value=lambda w, run=run: run.value(w) + 0.03) for run in first]
    found = procedure_difference(ahead, second, seed_spread([first, second]), resamples=999)
    assert found.low > 0 and found.p_value <= 0.001


def test_three_groups_can_not_say_more_than_three_coins() -> None:
    first, second = drawn(9, groups=3, seeds=(5, 5))
    ahead = [replace(run, value=lambda w, run=run: run.value(w) + 0.4) for run in first]
    assert procedure_difference(ahead, second, seed_spread([first, second])).p_value >= 0.25


def test_equal_heads_do_not_differ_whatever_seeds_do() -> None:
    (runs,) = drawn(10, seeds=(3,))
    same = [mean_score(np.full(24, 0.4))] * 3
    found, none = compared([runs, runs], seed_spread([runs, runs])), compared([same, same], seed_spread([same, same]))
    assert (found.estimate, found.p_value) == (0, 1) and found.low < 0 < found.high
    assert (*ends(none), none.p_value) == (0, 0, 0, 1)


def test_a_difference_on_which_all_groups_agree_is_as_sure_as_seeds_are() -> None:
    """Groups say nothing; the interval is Student's, with four degrees of freedom."""
    shifts = np.array([-0.01, 0, 0.01])
    first, second = ([mean_score(np.linspace(0.3, 0.6, 24) + lead + own) for own in shifts] for lead in (0.02, 0))
    found = procedure_difference(first, second, seed_spread([first, second]))
    reach = 2.776 * 0.01 * math.sqrt(2 / 3)
    assert ends(found) == pytest.approx((0.02 - reach, 0.02, 0.02 + reach), rel=0.05)
    assert found.p_value == pytest.approx(0.0705, abs=0.01)


# Gaps


def test_a_gap_has_the_variance_of_both_sets() -> None:
    first, second = drawn(11, groups=48, seeds=(3, 4), seed_sd=0.01), drawn(12, groups=24, seeds=(5, 3), seed_sd=0.01)
    spreads = [seed_spread(results) for results in (first, second)]
    gap = procedure_gap(tuple(first), tuple(second), tuple(spreads))
    turned = procedure_gap(tuple(second), tuple(first), tuple(spreads[::-1]))
    on = [procedure_difference(*results, spread) for results, spread in zip((first, second), spreads, strict=True)]
    assert gap.estimate == pytest.approx(on[0].estimate - on[1].estimate)
    assert width(gap) == pytest.approx(math.hypot(*map(width, on)), rel=0.15)
    assert gap.groups == 24 and gap.bounds == (-2, 2)
    assert turned.estimate == pytest.approx(-gap.estimate)
    assert turned.p_value == pytest.approx(gap.p_value, abs=0.03)  # other random numbers for each set
    assert (gap.low > 0 or gap.high < 0) == (gap.p_value <= 0.05)


def test_a_gap_without_seed_variance_is_the_modality_gap_and_one_set_alone_may_have_some() -> None:
    first, second = drawn(13, groups=48), drawn(14)
    heads = modality_gap(*[(mean_of(a), mean_of(b)) for a, b in (first, second)], resamples=FEW_DRAWS)
    pairs = tuple(first), tuple(second)
    assert procedure_gap(*pairs, (None, None), resamples=FEW_DRAWS) == heads
    half = procedure_gap(*pairs, (seed_spread(first), None), resamples=FEW_DRAWS)
    whole = procedure_gap(*pairs, (seed_spread(first), seed_spread(second)), resamples=FEW_DRAWS)
    assert width(heads) < width(half) < width(whole)


# What can't be said, and what it costs


def test_one_seed_each_one_group_or_no_score_has_a_difference_without_an_interval() -> None:
    single = drawn(15, seeds=(1, 1))
    one_group = drawn(16, groups=1)
    blank = [[replace(run, value=lambda w: np.full(len(w), np.nan)) for run in runs] for runs in drawn(17)]
    for results in (single, one_group, blank):
        found = compared(results, seed_spread(results))
        assert all(map(math.isnan, (found.low, found.high, found.p_value))) and not found.has_interval
        expected = difference_of(mean_of(results[0]), mean_of(results[1])).value(np.ones((1, found.groups)))[0]
        assert found.estimate == pytest.approx(expected, nan_ok=True)
    first, second = drawn(18, seeds=(3, 4))
    found = compared([first, second[:3]], seed_spread([first, second]), same_seeds=True)
    assert math.isnan(found.p_value)  # no two results with as many seeds


@pytest.mark.parametrize(
    "make",
    [
        lambda: seed_spread([]),
        lambda: seed_spread([[]]),
        lambda: seed_spread([drawn(0)[0], drawn(0, groups=12)[0]]),
        lambda: compared([drawn(0)[0], []], seed_spread(drawn(0))),
        lambda: compared(drawn(0), seed_spread(drawn(0, groups=12))),
        lambda: compared([drawn(0)[0], drawn(0, groups=12)[0]], None),
        lambda: compared(drawn(0, seeds=(3, 2)), seed_spread(drawn(0)), same_seeds=True),
    ],
)
def test_what_does_not_fit_together_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ShapeError):
        make()


def test_a_dear_score_is_asked_for_no_more_resamples_than_the_difference_of_the_means_asks_for() -> None:
    asked: dict[bytes, int] = {}

    def watched(run: Statistic) -> Statistic:
        def count(function: Callable[[Floats], Floats], weights: Floats) -> Floats:
            asked[weights.tobytes()] = len(weights)
            return function(weights)

        return replace(run, value=lambda w: count(run.value, w), influence=lambda w: count(run.influence, w))

    results = [[watched(run) for run in runs] for runs in drawn(19)]
    compared(results, None)
    before = dict(asked)
    compared(results, seed_spread(results), same_seeds=True)
    assert asked == before and sum(asked.values()) == 1 + FEW_DRAWS
