"""What labels hold is what numpy finds by looking at every pixel."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray

from featprobe.errors import DataError
from featprobe.targets import check_labels, equal_runs, numbered, pixels_of_each, values_in

LABELS = arrays(np.uint8, array_shapes(min_dims=1, max_dims=2, min_side=0, max_side=9))


@given(LABELS)
def test_values_and_pixels_are_those_of_every_pixel(labels: NDArray[np.uint8]) -> None:
    every = np.bincount(labels.ravel(), minlength=256)
    assert values_in(labels) == np.flatnonzero(every).tolist()
    assert np.array_equal(pixels_of_each(labels), every)
    values, lengths = equal_runs(labels)
    assert np.array_equal(np.repeat(values, lengths), labels.ravel())


@given(arrays(np.int32, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(0, 1 << 24)))
def test_numbers_stand_for_the_values_of_every_pixel(codes: NDArray[np.int32]) -> None:
    found, places = numbered(codes)
    assert np.array_equal(found, np.unique(codes)) and np.array_equal(found[places], codes)


@given(LABELS, st.integers(2, 254))
def test_a_label_that_is_no_class_is_refused_with_all_of_its_kind(labels: NDArray[np.uint8], classes: int) -> None:
    beyond = sorted({int(value) for value in labels.ravel() if classes <= value < 255})
    if not beyond:
        check_labels(labels, classes, "mask.png")
        return
    with pytest.raises(DataError) as refused:
        check_labels(labels, classes, "mask.png")
    assert f"mask.png holds labels {beyond}, beyond" in str(refused.value)
    assert f"found   {np.unique(labels).tolist()}" in str(refused.value)
