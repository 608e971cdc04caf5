"""Regions as runs of pixels, against a labelling of every pixel."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy import ndimage

from featprobe.regions import Regions, regions_of, runs_of

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 11))
SHOWN = SIZES.flatmap(lambda size: arrays(np.uint8, size, elements=st.sampled_from([0, 0, 1, 2, 255])))


def labelled(shown: NDArray[np.uint8]) -> tuple[NDArray[np.int64], list[int]]:
    """The number of the region of each pixel, and the value of each, by value and then by first pixels."""
    labels, values = np.zeros(shown.shape, np.int64), list[int]()
    for value in sorted({*shown.ravel().tolist()} - {0}):
        own, count = ndimage.label(shown == value, structure=np.ones((3, 3)))
        labels[own > 0] = own[own > 0] + len(values)
        values += [value] * count
    return labels, values


@settings(max_examples=150, deadline=None, derandomize=True)
@given(SHOWN)
def test_regions_are_those_of_a_labelling_of_every_pixel(shown: NDArray[np.uint8]) -> None:
    found, (labels, values) = regions_of(shown), labelled(shown)
    assert np.array_equal(found.labels, labels) and found.labels.dtype == np.int32
    assert found.value.tolist() == values and len(found) == len(values)
    assert found.area.tolist() == np.bincount(labels.ravel())[1:].tolist()
    assert found.first.tolist() == [int(np.flatnonzero(labels == k + 1)[0]) for k in range(len(values))]
    windows = ndimage.find_objects(labels)
    assert found.boxes.tolist() == [[x.start, y.start, x.stop, y.stop] for y, x in windows]
    assert found.at(np.arange(shown.size)).tolist() == (labels.ravel() - 1).tolist()
    assert found.at(np.array([-3, shown.size])).tolist() == [-1, -1]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(SHOWN, st.lists(st.tuples(st.integers(0, 98), st.integers(1, 40)), max_size=4), st.integers(0, 9))
def test_intervals_meet_the_regions_of_their_pixels(
    shown: NDArray[np.uint8], intervals: list[tuple[int, int]], seed: int
) -> None:
    found, (labels, values) = regions_of(shown), labelled(shown)
    start = np.array([at for at, _ in intervals], np.intp)
    stop = np.array([at + length for at, length in intervals], np.intp)
    shared = np.zeros((len(intervals), len(values) + 1), np.int64)
    for own, (i, region, pixels) in enumerate(zip(*(part.tolist() for part in found.meet(start, stop)), strict=True)):
        assert pixels > 0, own
        shared[i, region + 1] += pixels
    for i, (a, b) in enumerate(zip(start, stop, strict=True)):
        assert shared[i, 1:].tolist() == np.bincount(labels.ravel()[a:b], minlength=len(values) + 1)[1:].tolist()
    highest = np.random.default_rng(seed).random(shown.shape, np.float32)
    wanted = [float(highest[labels == k + 1].max()) for k in range(len(values))]
    assert found.highest(highest).tolist() == wanted
    which = np.arange(len(values)) % 2 == 0
    every = [one if asked else -np.inf for one, asked in zip(wanted, which, strict=True)]
    assert found.highest(highest, which).tolist() == every


def test_an_image_without_pixels_or_without_regions_has_none() -> None:
    for size in ((0, 0), (0, 5), (4, 0), (4, 5)):
        found: Regions = regions_of(np.zeros(size, bool))
        assert len(found) == 0 and found.boxes.shape == (0, 4) and not found.labels.any() and found.labels.shape == size
        assert found.highest(np.zeros(size, np.float32)).shape == (0,)


def test_a_run_ends_with_its_row() -> None:
    runs, value = runs_of(np.ones((3, 4), bool))
    assert runs.row.tolist() == [0, 1, 2] and runs.left.tolist() == [0] * 3 and runs.right.tolist() == [4] * 3
    assert value.tolist() == [1] * 3
    assert len(regions_of(np.array([[0, 0, 1], [0, 0, 0], [1, 0, 0]], np.uint8))) == 2, "rows that are apart"
    assert len(regions_of(np.array([[0, 0, 1], [1, 0, 0]], np.uint8))) == 2, "the end of a row and the next one's start"
