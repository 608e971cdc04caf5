"""Parts of records, and several as one: what belongs together stays together."""

import numpy as np
import pytest
from drawn_records import drawn_records
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from featprobe.metrics.defects.records import Records, found_scores

SEEDS = st.integers(0, 2**32 - 1)
Listed = list[tuple[str, list[tuple[float, int, list[float]]], list[tuple[float, float]]]]


def listed(records: Records) -> Listed:
    """Images by name, with their calls and what each finds, and their defects."""
    calls, defects = records.calls, records.defects
    return [
        (
            name,
            [
                (
                    float(calls.score[k]),
                    int(calls.touched[k]),
                    sorted(float(defects.pixels[d, 1]) for c, d in records.finds if c == k),
                )
                for k in np.flatnonzero(calls.image == i)
            ],
            [(float(defects.pixels[j, 1]), float(defects.score[j])) for j in np.flatnonzero(defects.image == i)],
        )
        for i, name in enumerate(records.images.ids)
    ]


@given(SEEDS, SEEDS, st.integers(0, 6), st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_joined_records_come_apart_again(seed: int, other: int, images: int, more: int) -> None:
    val, test = drawn_records(seed, images), drawn_records(other, more, split="test")
    both = Records.joined([val, test])
    assert listed(both) == listed(val) + listed(test)
    assert listed(both.of("val")) == listed(val) and listed(both.of("test")) == listed(test)
    assert len(both.of("train").images) == 0


@given(SEEDS, st.sampled_from([0, 1, 50, 1000]))
@settings(max_examples=25, deadline=None)
def test_small_calls_are_dropped_with_what_they_find(seed: int, least: int) -> None:
    records = drawn_records(seed)
    kept = records.with_least_area(least)
    large = [k for k in range(len(records.calls)) if records.calls.size("area")[k] >= least]
    assert np.array_equal(kept.calls.score, records.calls.score[large])
    for j in range(len(records.defects)):
        scores = [records.calls.score[c] for c, d in records.finds if d == j and c in large]
        assert kept.defects.score[j] == max(scores, default=-np.inf)
    assert np.array_equal(found_scores(kept.finds, kept.calls.score, len(kept.defects)), kept.defects.score)


def test_a_defect_that_no_call_finds_is_found_at_no_threshold() -> None:
    none = np.empty((0, 2), dtype=int)
    assert found_scores(none, np.empty(0, dtype=np.float32), 2).tolist() == [-np.inf, -np.inf]
    records = drawn_records(3, most_calls=0)
    assert not records.found(-1e30).any()


@pytest.mark.parametrize("threshold", [0.5, np.full(12, 0.5)])
def test_a_threshold_is_one_or_one_for_each_image(threshold: ArrayLike) -> None:
    records = drawn_records(9, 12)
    assert np.array_equal(records.called(threshold), records.calls.score >= 0.5)
