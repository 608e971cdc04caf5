"""Operating points against a plain search over all thresholds; what validation can't carry; what users write."""

from dataclasses import replace
from math import isnan

import numpy as np
import pytest
from drawn_records import drawn_records, plain_counts
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from featprobe.errors import DataError, UsageError
from featprobe.metrics.defects.operating import Wanted, choose, counts_at
from featprobe.metrics.defects.records import GOOD, NOTHING, Records
from featprobe.metrics.thresholds import units_needed

SEEDS = st.integers(0, 2**32 - 1)
QUICK = settings(max_examples=30, deadline=None)
WANTED = st.sampled_from(
    [
        *(Wanted("false_calls", rate, "image") for rate in (0, 0.1, 0.5, 1, 2.5)),
        *(Wanted("false_calls", rate, "part") for rate in (0, 0.5, 1, 2.5)),
        *(Wanted("recall", rate) for rate in (0.1, 0.5, 0.9, 1)),
        *(Wanted("cost", miss=miss, call=call) for miss in (1, 3) for call in (1, 2)),
    ]
)


def units(records: Records, wanted: Wanted) -> int:
    """Images or parts that false calls are divided by, one by one."""
    good = [not records.about.pooled or own == GOOD for own in records.images.good]
    held = [group for group, own in zip(records.images.groups, good, strict=True) if own]
    return len(held) if wanted.per == "image" else len(set(held))


@given(SEEDS, WANTED, st.booleans(), st.sampled_from([1, 60]))
@QUICK
def test_the_threshold_is_the_one_a_plain_search_finds(
    seed: int, wanted: Wanted, pooled: bool, least_area: int
) -> None:
    records = drawn_records(seed, 14, pooled=pooled)
    own = records.with_least_area(least_area).judged()
    defects = len(own.defects)
    try:
        point = choose(records, wanted, least_area)
    except DataError:
        reached = plain_counts(own, -np.inf)[0]
        few = units(records, wanted) if wanted.kind == "false_calls" else defects
        rate = {"false_calls": wanted.rate, "recall": 1 - wanted.rate, "cost": 0}[wanted.kind]
        assert few < units_needed(rate)[0] or (wanted.kind == "recall" and reached < wanted.rate * defects)
        return
    found, false, calls = plain_counts(own, point.threshold)
    counts = point.validation
    assert (counts.found, counts.false_calls, counts.calls, counts.defects) == (found, false, calls, defects)
    every = [plain_counts(own, t) for t in (np.inf, *own.calls.score)]
    if wanted.kind == "false_calls":
        allowed = [entry for entry in every if entry[1] <= wanted.rate * units(records, wanted) + 1e-9]
        assert (found, false, calls) == max(allowed, key=lambda entry: entry[2])
    elif wanted.kind == "recall":
        assert (found, false, calls) == min(
            (e for e in every if e[0] >= wanted.rate * defects - 1e-9), key=lambda e: e[2]
        )
    else:
        costs = [wanted.miss * (defects - entry[0]) + wanted.call * entry[1] for entry in every]
        best = [entry for entry, cost in zip(every, costs, strict=True) if cost == min(costs)]
        assert (found, false, calls) == min(best, key=lambda entry: entry[2])


@given(SEEDS, WANTED, st.booleans())
@QUICK
def test_reaching_and_exceeding_the_threshold_say_the_same_on_validation(
    seed: int, wanted: Wanted, pooled: bool
) -> None:
    records = replace(
        drawn_records(seed, 14, pooled=pooled), about=replace(drawn_records(0, pooled=pooled).about, base=0.05)
    )
    try:
        point = choose(records, wanted)
    except DataError:
        assume(False)
    scores = records.judged().calls.score
    assert np.float32(point.threshold) == point.threshold
    assert np.array_equal(scores >= np.float32(point.threshold), scores > np.float32(point.threshold))
    assert point.threshold >= 0.05 or pooled


def test_neighbouring_numbers_leave_the_higher_one() -> None:
    low = np.float32(0.5)
    records = drawn_records(2, 20)
    records.calls.score[:] = np.where(records.calls.touched == NOTHING, low, np.nextafter(low, np.float32(1)))
    records = records.with_least_area(1)
    point = choose(records, Wanted("false_calls", 0))
    assert point.threshold == np.nextafter(low, np.float32(1)) and point.validation.false_calls == 0
    assert point.validation.found == sum(records.defects.score > 0)


@given(SEEDS, st.booleans(), st.sampled_from([0.05, 0.3, 0.7, 2.0]))
@QUICK
def test_counts_are_those_of_plain_loops(seed: int, pooled: bool, threshold: float) -> None:
    records = drawn_records(seed, 10, pooled=pooled)
    counts, own = counts_at(records, threshold), records.judged()
    found, false, calls = plain_counts(own, threshold)
    parts = set(records.images.groups)
    good = [
        part
        for part in parts
        if all(g == GOOD for g, p in zip(records.images.good, records.images.groups, strict=True) if p == part)
    ]
    stray = sum(
        own.calls.score[k] >= threshold
        and own.calls.touched[k] == NOTHING
        and records.images.groups[own.calls.image[k]] in good
        for k in range(len(own.calls))
    )
    assert (counts.found, counts.false_calls, counts.calls, counts.stray) == (found, false, calls, stray)
    assert (counts.images, counts.parts, counts.good_parts) == (10, len(parts), len(good))
    assert counts.good_images == sum(own == GOOD for own in records.images.good)
    assert counts.over_images == units(records, Wanted("false_calls", 1))
    assert counts.over_parts == units(records, Wanted("false_calls", 1, "part"))


def test_each_image_may_have_a_threshold_of_its_own() -> None:
    records = drawn_records(11, 12)
    thresholds = np.where(np.arange(12) < 6, 0.3, 2).astype(np.float32)
    first = records._kept(np.arange(12) < 6)
    own, half = counts_at(records, thresholds), counts_at(first, 0.3)
    assert (own.found, own.false_calls, own.calls) == (half.found, half.false_calls, half.calls)
    assert isnan(own.threshold) and half.threshold == np.float32(0.3)


def test_what_validation_cannot_carry_is_said_with_how_many_it_takes() -> None:
    records = drawn_records(7, 12)
    with pytest.raises(DataError, match=r"(?s)0.05 false calls per image.*12 images.*wanted  20 .*60 to be 95 %"):
        choose(records, Wanted.parse("0.05"))
    with pytest.raises(DataError, match=r"(?s)recall of 0.99.*wanted  100 .*300"):
        choose(records, Wanted.parse_recall("0.99"))
    none = drawn_records(7, 12, most_defects=0)
    with pytest.raises(DataError, match="holds no defect"):
        choose(none, Wanted.parse_cost("miss=100,call=1"))
    silent = drawn_records(7, 12, most_calls=0)
    assert choose(silent, Wanted.parse("0.5")).threshold == np.float32(0.1)  # the base
    with pytest.raises(DataError, match="calls nothing"):
        choose(replace(silent, about=replace(silent.about, base=float("nan"))), Wanted.parse("0.5"))
    with pytest.raises(DataError, match=r"(?s)recall of 0.5 can't be reached.*found   0 at most"):
        choose(silent, Wanted.parse_recall("0.5"))
    with pytest.raises(DataError, match="not known"):
        choose(replace(records, about=replace(records.about, parts=False)), Wanted.parse("1/part"))


def test_test_images_choose_nothing() -> None:
    with pytest.raises(DataError, match="hold test images"):
        choose(drawn_records(7, split="test"), Wanted.parse("1"))


def test_enough_images_make_it_sure() -> None:
    sure, unsure = (choose(drawn_records(1, images), Wanted.parse("0.1")) for images in (30, 29))
    assert (sure.sure, sure.needed, unsure.sure) == (True, 30, False)


@pytest.mark.parametrize("text", ["", "x", "-1", "0.1/film", "nan", "inf", "1/"])
def test_wrong_numbers_of_false_calls_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--false-calls"):
        Wanted.parse(text)


@pytest.mark.parametrize("text", ["", "0", "1.1", "95 %"])
def test_wrong_recalls_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--recall"):
        Wanted.parse_recall(text)


@pytest.mark.parametrize("text", ["", "miss=100", "call=1", "miss=100,call=", "miss=0,call=1", "miss=1,call=1,x=2"])
def test_wrong_costs_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--cost"):
        Wanted.parse_cost(text)


def test_a_cost_without_a_side_names_it() -> None:
    with pytest.raises(UsageError, match="no number for call"):
        Wanted.parse_cost("miss=100")
