"""When an image is called: the rule of each task as numbers, and components cut out before they are encoded."""

from math import nan

import numpy as np
import pytest
import scipy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from featprobe.geometry import Part
from featprobe.probes import best_classes
from featprobe.stages.findings import (
    AT_LEAST,
    Threshold,
    joined_pixels,
    judged_map,
    judged_objects,
    judged_pixels,
    judged_score,
    judged_tiles,
    surest,
)
from featprobe.stages.recording.map_calls import calls_of_map
from featprobe.stages.tasks.settle import CALLED, PASSED
from featprobe.targets import IGNORE, Instance, components, decode_rle, encode_rle

DEFAULT = Threshold(nan, "default")
LOGITS = st.tuples(st.integers(2, 5), st.integers(1, 9), st.integers(1, 9)).flatmap(
    lambda shape: arrays(np.float32, shape, elements=st.sampled_from([-3.0, -1.0, 0.0, 0.5, 2.0, 4.0]))
)


@given(LOGITS)
@settings(deadline=None)
def test_without_a_threshold_findings_are_the_components_of_the_class_map(values: NDArray[np.float32]) -> None:
    logits = torch.from_numpy(values)
    labels, judged = judged_pixels(logits, DEFAULT)
    assert np.array_equal(labels, best_classes(logits).numpy())
    whole = sum(scipy.ndimage.label(labels == value, structure=np.ones((3, 3)))[1] for value in range(1, len(values)))
    assert judged.findings is not None and len(judged.findings) == whole
    assert judged.area == (labels > 0).sum() and judged.verdict == (CALLED if whole else PASSED)
    assert judged.score == pytest.approx(float(logits.softmax(0)[1:].max()), abs=1e-6)
    painted = np.zeros_like(labels)
    for finding in judged.findings:
        assert finding.rle is not None
        painted[decode_rle(finding.rle)] = finding.category
        assert finding.score <= judged.score
    assert np.array_equal(painted, labels)


@given(LOGITS, st.floats(0, 1, width=32))
@settings(deadline=None)
def test_with_a_threshold_findings_are_made_of_pixels_that_reach_it(values: NDArray[np.float32], least: float) -> None:
    logits = torch.from_numpy(values)
    shares, classes = surest(logits)
    labels, judged = judged_pixels(logits, Threshold.given(least))
    assert np.array_equal(labels, np.where(shares.numpy() >= least, classes.numpy(), 0))
    assert (judged.verdict == CALLED) == bool(judged.score is not None and judged.score >= least)
    assert torch.allclose(shares, logits.softmax(0)[1:].max(0).values, atol=1e-6)


@given(LOGITS, st.sampled_from([0.05, 0.3, 0.5]), st.sampled_from([0.5, 0.7, 0.9]), st.integers(1, 4))
@settings(deadline=None, max_examples=50)
def test_at_an_operating_point_findings_are_the_calls_of_records(
    values: NDArray[np.float32], base: float, value: float, least_area: int
) -> None:
    logits = torch.from_numpy(values)
    shares, classes = (own.numpy() for own in surest(logits))
    calls = calls_of_map(shares, base, classes)
    wanted = sorted(
        (int(category), float(score), int(area))
        for category, score, area in zip(calls.category, calls.score, calls.area, strict=True)
        if score >= np.float32(value) and area >= least_area
    )
    at = point_at(value, base, least_area)
    labels, judged = judged_pixels(logits, at)
    assert judged.findings is not None
    assert sorted((own.category, own.score, int(own.area)) for own in judged.findings) == wanted
    assert (labels > 0).sum() == sum(area for _, _, area in wanted) and (judged.verdict == CALLED) == bool(wanted)
    of_map = judged_map(shares, at)
    assert of_map.findings is not None and {own.category for own in of_map.findings} <= {0}
    assert sum(own.area for own in of_map.findings) == joined_pixels(shares, None, at).sum()
    assert of_map.score == shares.max()


def point_at(value: float, base: float = nan, least_area: int = 1) -> Threshold:
    return Threshold(float(np.float32(value)), "operating_point", base, least_area)


def test_objects_tiles_and_scores_reach_an_operating_point() -> None:
    small, large = (Instance(1, (0.0, 0.0, side, side)) for side in (2.0, 3.0))
    judged = judged_objects([(large, 0.6), (small, 0.9), (large, 0.59)], point_at(0.6, least_area=9))
    assert judged.findings is not None and [own.score for own in judged.findings] == [0.6]
    unseen = Instance(1, (0.0, 0.0, 5.0, 5.0), encode_rle(np.zeros((5, 5), dtype=bool)))
    assert judged_objects([(unseen, 0.9)], point_at(0.6)).verdict == CALLED  # it counts as its box, as in records
    assert judged_objects([(Instance(1, (0.0, 0.0, 0.5, 0.5)), 0.9)], point_at(0.6)).verdict == PASSED
    assert [judged_score(score, point_at(0.7)).verdict for score in (0.69, 0.7, 0.71)] == [PASSED, CALLED, CALLED]
    tiles = [(0.7, Part(0, 0, 8, 8)), (0.9, Part(8, 0, 8, 4))]
    own = judged_tiles(tiles, point_at(0.7, least_area=40))
    assert own.findings is not None and [one.score for one in own.findings] == [0.7]


def test_a_threshold_means_the_same_in_float32() -> None:
    """0.7 as float64 lies above the float32 that stands for it: a score of just that must reach it."""
    score = float(np.float32(0.7))
    assert score < 0.7
    box = Instance(1, (0.0, 0.0, 4.0, 5.0))
    assert judged_objects([(box, score)], Threshold.given(0.7)).verdict == CALLED
    logits = torch.log(torch.tensor([0.5, 0.5])).view(2, 1, 1)
    assert judged_pixels(logits, Threshold.given(0.5))[1].verdict == CALLED


def test_detections_that_reach_the_threshold_are_findings_best_first() -> None:
    low, high = (Instance(c, (0.0, 0.0, 4.0, 5.0)) for c in (1, 2))
    default = Threshold(AT_LEAST, "default")
    judged = judged_objects([(low, 0.5), (high, 0.9), (low, 0.49)], default)
    assert judged.findings is not None
    assert [(own.category, own.score, own.area) for own in judged.findings] == [(2, 0.9, 20.0), (1, 0.5, 20.0)]
    assert (judged.verdict, judged.score, judged.area) == (CALLED, 0.9, 40.0)
    passed = judged_objects([(low, 0.49)], default)
    assert (passed.verdict, passed.score, passed.findings) == (PASSED, 0.49, ())
    assert judged_objects([], default).score is None


def test_the_area_of_an_object_with_a_mask_is_that_of_the_mask() -> None:
    mask = np.eye(5, dtype=bool)
    one = Instance(1, (0.0, 0.0, 5.0, 5.0), encode_rle(mask))
    assert judged_objects([(one, 0.8)], Threshold(AT_LEAST, "default")).area == 5


def test_a_score_is_called_above_the_threshold_and_says_nothing_without_one() -> None:
    at = Threshold.of_head(2.0)
    assert [judged_score(score, at).verdict for score in (1.9, 2.0, 2.1)] == [PASSED, PASSED, CALLED]
    assert judged_score(1.0, Threshold.of_head(nan)).verdict == judged_score(None, at).verdict == ""
    assert [Threshold.of_head(nan).said, at.said, DEFAULT.said] == [None, 2.0, "default"]


def test_an_image_of_tiles_is_called_if_one_of_them_is() -> None:
    tiles = [(3.0, Part(0, 0, 8, 8)), (1.0, Part(8, 0, 8, 4)), (5.0, Part(0, 8, 8, 8))]
    judged = judged_tiles(tiles, Threshold.given(2.0))
    assert judged.findings is not None
    assert [own.score for own in judged.findings] == [5.0, 3.0] and judged.area == 128
    assert judged_tiles(tiles, Threshold.given(9.0)).verdict == PASSED
    unknown = judged_tiles(tiles, Threshold.of_head(nan))
    assert (unknown.verdict, unknown.score, unknown.findings) == ("", 5.0, None)


@given(arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.sampled_from([0, 1, 2, IGNORE])))
@settings(deadline=None)
def test_components_are_what_they_are_when_encoded_whole(labels: NDArray[np.uint8]) -> None:
    for one in components(labels, 3):
        value = IGNORE if one.crowd else one.category
        numbered, count = scipy.ndimage.label(labels == value, structure=np.ones((3, 3)))
        assert one.rle in [encode_rle(numbered == number) for number in range(1, count + 1)]
        assert one.rle is not None and one.area == decode_rle(one.rle).sum()
