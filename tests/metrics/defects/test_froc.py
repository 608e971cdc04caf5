"""FROC against plain loops over objects and resamples, with ties, unfound defects and empty sets."""

import numpy as np
import pytest
from drawn_records import drawn_records, plain_counts
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from featprobe.errors import DataError
from featprobe.metrics.defects import froc as module
from featprobe.metrics.defects.froc import Per, froc
from featprobe.metrics.defects.records import DEFECT, GOOD, NOTHING, Records
from featprobe.metrics.intervals import draw_weights, grouped

SEEDS = st.integers(0, 2**32 - 1)
QUICK = settings(max_examples=25, deadline=None)
PERS = st.sampled_from(["image", "part"])


def plain_recall(records: Records, per: Per, rate: float, times: NDArray[np.float64]) -> float:
    """The highest recall with no more false calls than that, of any threshold; each group counts so many times."""
    _, group = grouped(records.images.groups)
    units = sum((times[g] for g in group), 0.0) if per == "image" else sum(times)
    defects = sum(times[group[i]] for i in records.defects.image)
    best = 0.0
    for threshold in [np.inf, *records.calls.score]:
        false = sum(
            times[group[image]]
            for image, score, touched in zip(
                records.calls.image, records.calls.score, records.calls.touched, strict=True
            )
            if score >= threshold and touched == NOTHING
        )
        found = sum(
            times[group[image]]
            for image, score in zip(records.defects.image, records.defects.score, strict=True)
            if score >= threshold
        )
        if false <= rate * units + 1e-9:
            best = max(best, found / defects if defects else np.nan)
    return best if defects else np.nan


@given(SEEDS, PERS, st.integers(0, 10), st.integers(0, 3))
@QUICK
def test_the_curve_is_that_of_plain_loops(seed: int, per: Per, images: int, most_defects: int) -> None:
    records = drawn_records(seed, images, most_defects=most_defects)
    curve = froc(records, per, resamples=2)
    units = images if per == "image" else len(set(records.images.groups))
    assert (curve.units, curve.defects) == (units, len(records.defects))
    assert np.all(np.diff(curve.false_calls) >= 0) and np.all(np.diff(curve.thresholds) < 0)
    for threshold, false_calls, recall in zip(curve.thresholds, curve.false_calls, curve.recall, strict=True):
        found, false, _ = plain_counts(records, threshold)
        assert false_calls == pytest.approx(false / max(units, 1))
        assert recall == pytest.approx(found / curve.defects if curve.defects else np.nan, nan_ok=True)
    once = np.ones(len(set(records.images.groups)))
    for rate in (*curve.rates, 0.3, 1.7, 100):
        assert curve.recall_at(rate) == pytest.approx(plain_recall(records, per, rate, once), nan_ok=True)


@given(SEEDS, PERS)
@settings(max_examples=10, deadline=None)
def test_the_curves_of_resamples_are_those_of_plain_loops(seed: int, per: Per) -> None:
    records = drawn_records(seed, images=8, groups=4)
    names, group = grouped(records.images.groups)
    units = module.units_of(records, per, group, len(names))
    steps = module._Steps.of(records, group, len(names), records.calls.touched == NOTHING)
    rates = np.array([0, 0.25, 0.5, 1, 3])
    for weights in draw_weights((len(names),), 5, seed):
        values = steps._recall(weights, rates, units)
        for times, own in zip(weights, values, strict=True):
            plain = [plain_recall(records, per, rate, times) for rate in rates]
            assert own == pytest.approx(plain, nan_ok=True)


@given(SEEDS, PERS)
@QUICK
def test_the_band_holds_the_curve(seed: int, per: Per) -> None:
    curve = froc(drawn_records(seed, images=15, groups=6), per, resamples=200)
    for rate, low, high in zip(curve.rates, curve.low, curve.high, strict=True):
        assert np.isnan(low) == np.isnan(high) == (curve.defects == 0 or curve.groups < 2)
        assert np.isnan(low) or 0 <= low <= curve.recall_at(rate) <= high <= 1


def test_many_false_calls_are_thinned_out_and_the_band_stays_near(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = np.linspace(0.1, 1, 5000, dtype=np.float32)
    records = drawn_records(5, images=200, groups=40, most_calls=20, levels=levels)
    thinned = froc(records, resamples=300)
    monkeypatch.setattr(module, "STEPS", 10**6)
    whole = froc(records, resamples=300)
    assert len(np.unique(records.calls.score)) > 4 * 256
    assert np.abs(thinned.low - whole.low).max() < 0.02 and np.abs(thinned.high - whole.high).max() < 0.02


def test_all_found_in_few_groups_is_no_certainty() -> None:
    records = drawn_records(3, images=6, groups=3)
    records.defects.score[:] = 1
    curve = froc(records)
    assert curve.recall_at(0) == 1 and curve.low[0] < 0.5 and curve.high[0] == 1


@given(SEEDS)
@QUICK
def test_whole_images_stand_for_defects_and_good_ones_for_false_calls(seed: int) -> None:
    records = drawn_records(seed, pooled=True)
    curve, good = froc(records, resamples=10), records.images.good
    assert (curve.units, curve.defects) == (np.sum(good == GOOD), np.sum(good == DEFECT))
    for threshold, false, recall in zip(curve.thresholds, curve.false_calls, curve.recall, strict=True):
        called = records.images.score >= threshold
        assert curve.defects == 0 or recall == pytest.approx(np.mean(called[good == DEFECT]))
        assert curve.units == 0 or false == pytest.approx(np.mean(called[good == GOOD]))


def test_parts_that_are_not_known_have_no_curve() -> None:
    from dataclasses import replace

    records = drawn_records(1)
    with pytest.raises(DataError, match="per part can't be counted"):
        froc(replace(records, about=replace(records.about, parts=False)), "part")
