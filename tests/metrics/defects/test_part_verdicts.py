"""Verdicts of parts against plain loops over images and calls; exact intervals against scipy."""

import numpy as np
import pytest
from drawn_records import drawn_records
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from featprobe.metrics.defects.part_verdicts import part_verdicts
from featprobe.metrics.defects.records import DEFECT, GOOD
from featprobe.metrics.defects.shares import exact_interval

SEEDS = st.integers(0, 2**32 - 1)


@given(SEEDS, st.integers(0, 12), st.sampled_from([0.05, 0.5, 0.9, 2.0]), st.booleans())
@settings(max_examples=30, deadline=None)
def test_verdicts_are_those_of_plain_loops(seed: int, images: int, threshold: float, pooled: bool) -> None:
    records = drawn_records(seed, images, pooled=pooled, most_calls=2)
    verdicts = part_verdicts(records, threshold)
    bad, good, unknown, escaped, stopped = [], [], [], [], []
    for part in sorted(set(records.images.groups)):
        own = [i for i, group in enumerate(records.images.groups) if group == part]
        if pooled:
            rejected = any(records.images.score[i] >= np.float32(threshold) for i in own)
        else:
            rejected = any(
                image in own and score >= np.float32(threshold)
                for image, score in zip(records.calls.image, records.calls.score, strict=True)
            )
        known = [records.images.good[i] for i in own]
        if DEFECT in known:
            bad.append(part)
            escaped += [] if rejected else [part]
        elif all(state == GOOD for state in known):
            good.append(part)
            stopped += [part] if rejected else []
        else:
            unknown.append(part)
    assert (verdicts.bad, verdicts.good, verdicts.unknown) == (len(bad), len(good), len(unknown))
    assert (verdicts.escaped_parts, verdicts.stopped_parts) == (tuple(escaped), tuple(stopped))
    assert verdicts.escapes == pytest.approx(len(escaped) / len(bad) if bad else np.nan, nan_ok=True)
    assert verdicts.overkill == pytest.approx(len(stopped) / len(good) if good else np.nan, nan_ok=True)
    assert np.isnan(verdicts.escapes_low) == (not bad) and np.isnan(verdicts.overkill_high) == (not good)


@pytest.mark.parametrize(("hits", "trials"), [(0, 1), (1, 1), (0, 30), (30, 30), (3, 17), (299, 300)])
def test_exact_intervals_are_those_of_scipy(hits: int, trials: int) -> None:
    found = binomtest(hits, trials).proportion_ci(0.95, "exact")
    assert exact_interval(hits, trials) == (pytest.approx(found.low, abs=1e-9), pytest.approx(found.high, abs=1e-9))
