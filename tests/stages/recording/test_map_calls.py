"""Calls of maps: components at a base threshold, against a plain flood fill."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from featprobe.stages.recording.map_calls import MapCalls, calls_at_bases, calls_of_map

Pixels = frozenset[tuple[int, int]]


def flooded(values: NDArray[np.float32], base: float, classes: NDArray[np.uint8]) -> set[Pixels]:
    """The components of each class, pixel by pixel."""
    left = {(r, c) for r, c in np.ndindex(values.shape) if values[r, c] >= np.float32(base)}
    found = set()
    while left:
        todo, own = [left.pop()], set[tuple[int, int]]()
        while todo:
            r, c = todo.pop()
            own.add((r, c))
            beside = {(r + i, c + k) for i in (-1, 0, 1) for k in (-1, 0, 1)} & left
            beside = {pixel for pixel in beside if classes[pixel] == classes[r, c]}
            left -= beside
            todo += beside
        found.add(frozenset(own))
    return found


def pixels_of(found: MapCalls, call: int) -> Pixels:
    return frozenset(zip(*(side.tolist() for side in np.nonzero(found.labels == call + 1)), strict=True))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    arrays(np.float32, (7, 9), elements=st.sampled_from([0.0, 0.25, 0.5, 0.75, float("nan")])),
    arrays(np.uint8, (7, 9), elements=st.sampled_from([1, 2, 7])),
    st.sampled_from([0.25, 0.5, 0.7]),
    st.booleans(),
)
def test_calls_are_the_components_of_each_class(
    values: NDArray[np.float32], classes: NDArray[np.uint8], base: float, known: bool
) -> None:
    found = calls_of_map(values, base, classes if known else None)
    every = [pixels_of(found, i) for i in range(len(found))]
    assert set(every) == flooded(values, base, classes if known else np.ones_like(classes))
    for i, own in enumerate(every):
        rows, columns = zip(*own, strict=True)
        assert found.category[i] == (classes[rows[0], columns[0]] if known else 0)
        assert found.score[i] == max(values[pixel] for pixel in own) and found.area[i] == len(own)
        assert found.boxes[i].tolist() == [min(columns), min(rows), max(columns) + 1, max(rows) + 1]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(arrays(np.float32, (8, 8), elements=st.floats(0, 1, width=32)), st.floats(0, 1, width=32))
def test_raising_the_threshold_drops_whole_calls(values: NDArray[np.float32], threshold: float) -> None:
    """A call at the base is called at a higher threshold exactly if one of its pixels reaches it."""
    found = calls_of_map(values, 0.25)
    reached = {int(label) for label in found.labels[values >= np.float32(max(threshold, 0.25))]}
    assert {i + 1 for i in range(len(found)) if found.score[i] >= np.float32(max(threshold, 0.25))} == reached


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    arrays(np.float32, (6, 7), elements=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, float("nan")])),
    arrays(np.uint8, (6, 7), elements=st.sampled_from([1, 1, 4])),
    st.lists(st.sampled_from([0.1, 0.2, 0.25, 0.5, 0.7, 0.9]), min_size=1, max_size=6).map(sorted),
    st.booleans(),
)
def test_calls_at_several_bases_are_those_at_each(
    values: NDArray[np.float32], classes: NDArray[np.uint8], bases: list[float], known: bool
) -> None:
    every = calls_at_bases(values, bases, classes if known else None)
    assert every.layers == len(bases) and every.rows == 7
    for k, base in enumerate(bases):
        one, own = calls_of_map(values, base, classes if known else None), every.layer == k
        assert every.score[own].tolist() == one.score.tolist() and every.area[own].tolist() == one.area.tolist()
        assert every.category[own].tolist() == one.category.tolist()
        assert (every.boxes[own] - np.float32([0, 7 * k, 0, 7 * k])).tolist() == one.boxes.tolist()


@pytest.mark.parametrize("values", [np.zeros((4, 5), np.float32), np.full((4, 5), np.nan, np.float32)])
def test_a_map_below_the_base_has_no_calls(values: NDArray[np.float32]) -> None:
    found = calls_of_map(values, 0.5, np.ones((4, 5), np.uint8))
    assert len(found) == 0 and found.boxes.shape == (0, 4) and found.labels.shape == (4, 5) and not found.labels.any()
