"""The rule of what counts as found, on areas alone: limits are met exactly, and classes count where asked for."""

import numpy as np
import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from featprobe.errors import ProbeError
from featprobe.metrics.defects.overlaps import Overlaps, finds, rule_of, rule_text, touched
from featprobe.metrics.defects.records import IGNORED, NOTHING, TOUCHES, FoundRule

USUAL = FoundRule()


def pair(
    shared: float, call: float, defect: float, *, center: bool = False, classes: tuple[int, int] = (1, 1)
) -> Overlaps:
    """One call and one defect of these areas."""
    return Overlaps(
        np.array([0]), np.array([0]), np.array([shared]), np.array([call]), np.array([defect]), np.array([center]),
        np.array(classes[:1], np.uint8), np.array(classes[1:], np.uint8), np.array([False]),
    )  # fmt: skip


def is_found(overlaps: Overlaps, rule: FoundRule) -> bool:
    return bool(len(finds(overlaps, rule)))


@settings(deadline=None, max_examples=200)
@seed(5)
@given(st.integers(1, 10**6), st.integers(1, 30))
def test_a_tenth_of_the_area_is_enough_exactly(tenth: int, more: int) -> None:
    far_too_large = 10**9  # an IoU of nearly nothing
    assert is_found(pair(tenth, far_too_large, 10 * tenth), USUAL)
    assert not is_found(pair(tenth, far_too_large, 10 * tenth + more), USUAL)


@settings(deadline=None, max_examples=200)
@seed(6)
@given(st.integers(1, 10**6))
def test_an_iou_that_is_asked_for_is_enough_exactly(part: int) -> None:
    half = pair(part, part, 2 * part)
    assert is_found(half, FoundRule(iou=0.5)) and not is_found(half, FoundRule(iou=0.5000001))
    tenth = pair(part, part, 10 * part)
    assert is_found(tenth, FoundRule(iou=0.1))
    assert is_found(pair(part, part, 19 * part, center=True), USUAL)
    assert not is_found(pair(part, part, 19 * part, center=True), FoundRule(iou=0.1)), "the center counts by no IoU"


def test_classes_must_agree_only_where_asked_for() -> None:
    other = pair(5, 5, 5, classes=(1, 2))
    assert is_found(other, USUAL) and not is_found(other, FoundRule(same_class=True))
    assert is_found(pair(5, 5, 5, classes=(2, 2)), FoundRule(0.9, same_class=True))
    assert touched(other).tolist() == [TOUCHES], "a call of another class touches the defect: it is no false call"


def test_a_box_without_area_has_no_iou_and_is_found_by_its_center() -> None:
    assert not is_found(pair(0, 0, 0), FoundRule(iou=0.1)) and not is_found(pair(0, 4, 0), USUAL)
    assert is_found(pair(0, 4, 0, center=True), USUAL)


def test_a_defect_counts_before_an_ignored_region_and_that_before_nothing() -> None:
    overlaps = Overlaps(
        np.array([0]), np.array([0]), np.array([1.0]), np.array([4.0]), np.array([4.0]), np.array([False]),
        np.array([1, 1, 1], np.uint8), np.array([1], np.uint8), np.array([True, True, False]),
    )  # fmt: skip
    assert touched(overlaps).tolist() == [TOUCHES, IGNORED, NOTHING]


def test_rules_are_read_and_said() -> None:
    assert rule_of(None) == rule_of("usual") == USUAL and rule_of("usual", same_class=True) == FoundRule(None, True)
    assert rule_of("iou:1") == FoundRule(1.0)
    assert rule_text(USUAL) == "center covered, or at least 0.1 of the area, or IoU at least 0.1"


@pytest.mark.parametrize("text", ["iou", "iou:", "iou:0", "iou:1.1", "iou:nan", "iou:-1", "giou:0.5", "0.5", "iou:inf"])
def test_a_rule_that_is_none_is_refused_with_those_that_are(text: str) -> None:
    with pytest.raises(ProbeError, match=r"iou:X with 0 < X <= 1"):
        rule_of(text)
