"""Data that carry no POD curve: which they are, and what is said of them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featprobe.metrics.pod.hit_miss import hit_miss
from featprobe.metrics.pod.pod_values import Refused
from featprobe.metrics.pod.refusals import OF_EACH

SIZES = np.geomspace(1, 10, 80)


def refused(sizes: object, found: object) -> Refused:
    answer = hit_miss(sizes, found)  # type: ignore[arg-type]
    assert isinstance(answer, Refused), answer
    assert len(answer.reasons) == len(answer.missing)
    return answer


def test_nothing_at_all_is_refused() -> None:
    assert refused([], []).targets == 0


def test_all_reasons_are_given_at_once() -> None:
    answer = refused([1, 2, 3], [True, True, True])
    assert [reason.split(";")[0] for reason in answer.reasons] == [
        "There are 3 targets",
        "Of 3 targets 0 were missed",
        "Of 3 targets 3 were found",
    ]
    assert answer.missing[0] == "57 more targets"
    assert (answer.targets, answer.hits) == (3, 3)


@pytest.mark.parametrize("hits", [True, False])
def test_too_few_of_one_kind(hits: bool) -> None:
    few = np.isin(np.arange(80), np.linspace(5, 75, OF_EACH - 1).astype(int))
    answer = refused(SIZES, few if hits else ~few)
    assert any(f"4 were {'found' if hits else 'missed'}" in reason for reason in answer.reasons)


def test_complete_separation() -> None:
    answer = refused(SIZES, SIZES > 4)
    assert "do not overlap: all targets up to" in answer.reasons[0]
    assert answer.missing == ("targets of sizes near 3.993",)


def test_quasi_complete_separation() -> None:
    """Hits and misses meet at one size, where the likelihood still has no maximum."""
    sizes, found = SIZES.copy(), SIZES > 4
    sizes[found.argmax()] = sizes[found.argmax() - 1]
    answer = refused(sizes, found)
    assert "some are found, all larger ones are found and all smaller ones missed" in answer.reasons[0]


def test_no_growth() -> None:
    assert "not found more often" in refused(SIZES, SIZES < 4).reasons[0]
    wave = np.arange(80) % 2 == 0  # the hits are a little smaller than the misses
    assert "not found more often" in refused(SIZES, wave).reasons[0]
    for apart in (0, 1e-9):  # sizes that differ by rounding are one
        assert "All targets have the size 3" in refused(3 + apart * SIZES, wave).reasons[0]


def test_an_overlap_too_small_to_compute_with() -> None:
    sizes, found = SIZES.copy(), SIZES > 4
    last = int(found.argmax())
    sizes[last], sizes[last - 1] = 4.0, 4.0 * (1 + 1e-14)
    assert "too little for a curve" in refused(sizes, found).reasons[0]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=60, max_size=70))
def test_a_curve_is_fitted_exactly_where_one_exists(drawn: list[tuple[int, bool]]) -> None:
    """Few distinct sizes, so that hits and misses often only touch."""
    sizes, found = np.array([size for size, _ in drawn], float), np.array([hit for _, hit in drawn])
    answer = hit_miss(sizes, found)
    hits, misses = sizes[found], sizes[~found]
    exists = min(len(hits), len(misses)) >= OF_EACH and misses.max() > hits.min() and hits.max() > misses.min()
    grows = exists and np.log(hits).mean() > np.log(misses).mean() + 1e-12
    assert isinstance(answer, Refused) is not grows
