"""The choice of the base threshold, by the area under the curve of validation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featprobe.metrics.defects.records import (
    DEFECT,
    GOOD,
    IGNORED,
    NOTHING,
    TOUCHES,
    About,
    Calls,
    Defects,
    FoundRule,
    Images,
    Records,
)
from featprobe.stages.recording.base import area_under_froc, best

LEVELS = st.sampled_from([0.125, 0.25, 0.5, 0.75])


def records(images: int, defects: list[float], calls: list[tuple[float, int]], base: float = 0.5) -> Records:
    """Records of so many images. defects: the score of each. calls: score and what it touches."""
    about = About("semseg", "linear", "", ("background", "crack"), FoundRule(), base, "validation", parts=False)
    names = tuple(f"image{i}" for i in range(images))
    kind = np.full(images, GOOD, np.uint8)
    kind[: len(defects)] = DEFECT
    values = {"good": kind, "score": np.full(images, np.nan, np.float32)}
    shown = Images(names, names, ("val",) * images, names, names, **values, spacing=np.full((images, 2), np.nan),
                   sizes=np.full((images, 2), 64, np.intp))  # fmt: skip

    def objects(scores: list[float]) -> dict[str, np.ndarray]:
        count = len(scores)
        return {
            "image": np.zeros(count, np.intp), "category": np.ones(count, np.uint8),
            "boxes": np.zeros((count, 4), np.float32), "pixels": np.ones((count, 4), np.float32),
            "millimetres": np.full((count, 4), np.nan, np.float32), "score": np.array(scores, np.float32),
        }  # fmt: skip

    return Records(
        about, shown,
        Defects(**objects(defects), contrast=np.full(len(defects), np.nan), cut=np.zeros(len(defects), bool)),
        Calls(**objects([score for score, _ in calls]), touched=np.array([t for _, t in calls], np.uint8)),
        np.zeros((0, 2), np.intp),
    )  # fmt: skip


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.integers(1, 6),
    st.lists(st.one_of(LEVELS, st.just(-np.inf)), min_size=1, max_size=6),
    st.lists(st.tuples(LEVELS, st.sampled_from([NOTHING, TOUCHES, IGNORED])), max_size=12),
)
def test_the_area_is_that_of_the_steps(images: int, defects: list[float], calls: list[tuple[float, int]]) -> None:
    """Against every threshold: the share found at the most that no more than k calls are false, for each k < images."""
    thresholds = sorted({0.0, *(score for score, _ in calls), *defects, np.inf} - {-np.inf})
    area = 0.0
    for k in range(images):
        area += max(
            sum(score >= t for score in defects) / len(defects)
            for t in thresholds
            if sum(score >= t and touched == NOTHING for score, touched in calls) <= k
        )
    assert area_under_froc(records(images, defects, calls)) == pytest.approx(area / images)


def test_of_equal_areas_the_highest_base_is_taken() -> None:
    found = [records(4, [0.9, 0.8], [(0.5, NOTHING)], base) for base in (0.05, 0.3, 0.1)]
    assert best(found).about.base == 0.3
    worse = records(4, [0.9, 0.4], [(0.5, NOTHING)] * 4, 0.7)
    assert best([*found, worse]).about.base == 0.3


def test_there_is_no_area_without_a_defect() -> None:
    assert np.isnan(area_under_froc(records(3, [], [(0.5, NOTHING)])))
    assert np.isnan(area_under_froc(records(0, [], [])))
