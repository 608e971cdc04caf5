"""Recall by size against plain loops; what its intervals cover where defects come in parts."""

from dataclasses import replace
from math import floor, log2

import numpy as np
import pytest
from drawn_records import drawn_records
from hypothesis import given, settings
from hypothesis import strategies as st

from featprobe.errors import DataError
from featprobe.metrics.defects.recall_by_size import recall_by_size, recall_of
from featprobe.metrics.defects.records import Size
from featprobe.metrics.defects.shares import clustered_interval, exact_interval

SEEDS = st.integers(0, 2**32 - 1)


@given(SEEDS, st.integers(0, 12), st.sampled_from(["root_area", "area", "longest", "shortest"]))
@settings(max_examples=30, deadline=None)
def test_octaves_are_those_of_plain_loops(seed: int, images: int, size: Size) -> None:
    records = drawn_records(seed, images)
    bins, sizes = recall_by_size(records, 0.5, size), records.defects.size(size)
    octaves = [floor(log2(float(own))) for own in sizes]
    assert (
        [own.least for own in bins] == [2.0**k for k in range(min(octaves), max(octaves) + 1)] if octaves else not bins
    )
    for own in bins:
        inside = [j for j, value in enumerate(sizes) if own.least <= value < own.below]
        found = [j for j in inside if any(d == j and records.calls.score[c] >= 0.5 for c, d in records.finds)]
        groups = {records.images.groups[records.defects.image[j]] for j in inside}
        assert (own.defects, own.found, own.groups) == (len(inside), len(found), len(groups))
        assert (own.low <= own.recall <= own.high) if inside else np.isnan(own.low) and np.isnan(own.recall)
    whole = recall_of(records, 0.5)
    assert (whole.defects, whole.found) == (len(sizes), sum(own.found for own in bins))


def test_sizes_in_mm_need_a_pixel_size() -> None:
    records = drawn_records(4)
    with pytest.raises(DataError, match=r"(?s)not known in mm.*pixel_size"):
        recall_by_size(records, 0.5, unit="mm")
    known = replace(records, defects=replace(records.defects, millimetres=records.defects.pixels / 16))
    assert [own.found for own in recall_by_size(known, 0.5, unit="mm")] == [
        own.found for own in recall_by_size(records, 0.5)
    ]


def test_images_with_one_score_have_no_sizes() -> None:
    records = drawn_records(4, pooled=True)
    assert recall_by_size(records, 0.5) == ()
    assert recall_of(records, 0.5).defects == np.sum(records.images.good == 0)


@given(SEEDS)
@settings(max_examples=30, deadline=None)
def test_defects_of_one_part_never_say_more_than_as_many_of_different_parts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    trials = rng.integers(0, 4, (5, 8)).astype(float)
    hits = np.floor(trials * rng.random((5, 8)))
    low, high = clustered_interval(hits, trials)
    alone_low, alone_high = exact_interval(hits.sum(1), trials.sum(1))
    some = trials.sum(1) > 0
    assert np.all(low[some] <= alone_low[some] + 1e-9) and np.all(high[some] >= alone_high[some] - 1e-9)
    assert np.isnan(low[~some]).all()


def test_intervals_cover_where_defects_of_a_part_are_found_or_missed_together() -> None:
    rng = np.random.default_rng(20)
    recall, groups, repetitions = 0.8, 20, 2000
    trials = (1 + rng.poisson(3, (repetitions, groups))).astype(float)
    hits = rng.binomial(trials.astype(int), rng.beta(recall, 1 - recall, (repetitions, groups))).astype(float)
    low, high = clustered_interval(hits, trials)
    alone_low, alone_high = exact_interval(hits.sum(1), trials.sum(1))
    assert np.mean((low <= recall) & (recall <= high)) > 0.93
    assert np.mean((alone_low <= recall) & (recall <= alone_high)) < 0.85
