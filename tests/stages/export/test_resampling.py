"""Resizing as two matrix products is Pillow's."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from featprobe.stages.export.resampling import FILTERS, weights_of

SIDES = st.integers(1, 70)


@settings(max_examples=60, deadline=None)
@given(st.tuples(SIDES, SIDES), st.tuples(SIDES, SIDES), st.sampled_from([*FILTERS, "nearest"]), st.integers(0, 99))
def test_two_products_are_pillows_resize(size: tuple[int, int], wanted: tuple[int, int], name: str, seed: int) -> None:
    image = np.random.default_rng(seed).random(size, dtype=np.float32)
    resized = np.asarray(Image.fromarray(image).resize(wanted[::-1], Image.Resampling[name.upper()]))
    rows, columns = (weights_of(own, new, name) for own, new in zip(size, wanted, strict=True))
    between = (image @ columns.T).astype(np.float32)
    np.testing.assert_allclose(rows @ between, resized, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [*FILTERS, "nearest"])
def test_grey_stays_grey(name: str) -> None:
    np.testing.assert_allclose(weights_of(300, 77, name).sum(1), 1, atol=1e-6)
