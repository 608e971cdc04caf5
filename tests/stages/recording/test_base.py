"""The choice of the base threshold, by the area under the curve of validation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featprobe.stages.recording.base import area_under_froc

LEVELS = st.sampled_from([0.125, 0.25, 0.5, 0.75])


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.lists(st.one_of(LEVELS, st.just(-np.inf)), min_size=1, max_size=6),
    st.lists(LEVELS, max_size=12),
    st.integers(1, 6),
)
def test_the_area_is_that_of_the_steps(defects: list[float], false_calls: list[float], images: int) -> None:
    """Against every threshold: the share found at the most that no more than k calls are false, for each k < images."""
    thresholds = sorted({0.0, *false_calls, *defects, np.inf} - {-np.inf})
    area = 0.0
    for k in range(images):
        area += max(
            sum(score >= t for score in defects) / len(defects)
            for t in thresholds
            if sum(score >= t for score in false_calls) <= k
        )
    found = area_under_froc(np.array(defects, np.float32), np.array(false_calls, np.float32), images)
    assert found == pytest.approx(area / images)
