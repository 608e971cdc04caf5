"""Masks as polygons: exact along the edges of pixels, near them where shorter, and one polygon a part, holes too."""

import numpy as np
import pytest
import scipy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from featprobe.report import outlines
from featprobe.report.outlines import TOLERANCE, polygons_of, rings
from featprobe.targets import encode_rle

MASKS = st.tuples(st.integers(1, 12), st.integers(1, 12)).flatmap(lambda size: arrays(np.bool_, size))


def drawn(polygons: list[list[float]], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Polygons as pycocotools fills them."""
    return np.asarray(coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, *size))), dtype=bool)


@given(MASKS.filter(np.any))
@settings(max_examples=200, deadline=None)
def test_outlines_along_the_edges_of_pixels_fill_to_the_mask(mask: NDArray[np.bool_]) -> None:
    exact = pytest.MonkeyPatch()
    with exact.context() as patch:
        patch.setattr(outlines, "_shorter", lambda ring: ring)
        polygons = polygons_of(encode_rle(mask))
    assert np.array_equal(drawn(polygons, mask.shape), mask)
    assert len(polygons) == scipy.ndimage.label(mask, structure=np.ones((3, 3)))[1]


@given(MASKS.filter(np.any))
def test_the_areas_of_the_rings_are_that_of_the_mask(mask: NDArray[np.bool_]) -> None:
    assert sum(outlines._area(ring) for ring in rings(mask)) == mask.sum()


@pytest.mark.parametrize("radius", [1, 2, 5, 20, 70])
def test_a_shorter_outline_keeps_the_shape(radius: int) -> None:
    y, x = np.mgrid[:150, :150]
    mask = (y - 75) ** 2 + (x - 75) ** 2 <= radius**2
    (polygon,) = polygons_of(encode_rle(mask))
    found = drawn([polygon], mask.shape)
    assert (found & mask).sum() / (found | mask).sum() > 0.9
    points = np.array(polygon).reshape(-1, 2)
    (exact,) = rings(mask)
    assert {tuple(point) for point in points} <= {tuple(point) for point in exact}, "no point is made up"
    assert radius < 20 or len(points) < len(exact) / 2


def test_a_line_of_one_pixel_keeps_its_width() -> None:
    mask = np.zeros((20, 40), dtype=bool)
    mask[7, 3:33] = True
    assert polygons_of(encode_rle(mask)) == [[3.0, 7.0, 33.0, 7.0, 33.0, 8.0, 3.0, 8.0]]
    assert TOLERANCE < 1


def test_the_largest_part_is_first() -> None:
    mask = np.zeros((10, 10), dtype=bool)
    mask[0, 0] = mask[4:8, 4:8] = True
    large, small = polygons_of(encode_rle(mask))
    assert small == [0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0] and large[:2] == [4.0, 4.0]


def test_an_empty_mask_has_no_outline() -> None:
    """As that of a detection none of whose pixels is more likely than not."""
    assert polygons_of(encode_rle(np.zeros((10, 20), dtype=bool))) == []
