"""The choice of the base threshold, by the area under the curve of validation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featprobe.metrics.defects.overlaps import Overlaps, touched
from featprobe.metrics.defects.records import FoundRule
from featprobe.stages.recording.base import QUANTILES, Trials, _Sample, area_under_froc
from featprobe.stages.recording.meetings import Ground
from featprobe.targets import Instance, encode_rle

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


class _OneDefect:
    """The truth of images that each hold one defect of 6 x 6 pixels."""

    def ground(self, image: int) -> Ground:
        mask = np.zeros((32, 32), dtype=bool)
        mask[4:10, 4:10] = True
        return Ground.of([Instance(1, (4.0, 4.0, 10.0, 10.0), encode_rle(mask))], [])

    def judged(self, image: int, overlaps: Overlaps) -> np.ndarray:
        return touched(overlaps)


def test_a_base_at_which_one_call_covers_the_image_does_not_win() -> None:
    """At 0.1 the whole image is one call, which finds the defect by the usual rule; at 0.5 the defect itself is."""
    trials = Trials(_OneDefect(), [(0.1, 0.5, 0.9)], FoundRule())  # type: ignore[arg-type]
    values = np.full((32, 32), 0.2, np.float32)
    values[4:9, 4:9] = 0.8
    for image in range(3):
        trials.pixels(0, image, values, np.ones((32, 32), np.uint8))
    assert trials.best() == (0.5,)
    assert [np.isfinite(defects).all() for defects in trials.found[0, 0][0]] == [False, True, False]


def test_quantiles_are_those_of_all_maps_of_a_head_each_counted_once() -> None:
    rng = np.random.default_rng(0)
    maps = {
        (head, image): rng.normal(size=(5, 4 + image)).astype(np.float32) for head in range(2) for image in range(3)
    }
    sample = _Sample(3)
    for (head, image), values in [*maps.items(), *maps.items()]:  # some are handed over again
        sample.pixels(head, image, values, None)
    for head, found in enumerate(sample.quantiles(2)):
        pixels = np.concatenate([own.ravel() for (of, _), own in maps.items() if of == head])
        assert found == tuple(np.quantile(pixels, QUANTILES, method="higher").tolist())
