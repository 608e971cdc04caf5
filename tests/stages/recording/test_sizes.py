"""Sizes against every corner of every pixel, contrast against what was planted."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nst

from featprobe.datasets.images.pixels import Levels
from featprobe.metrics.defects.records import SIZES
from featprobe.stages.recording.contrast import GAP, NARROWEST, contrasts
from featprobe.stages.recording.sizes import is_cut, outlines_of, pixels_of
from featprobe.targets import Instance, encode_rle

SPACINGS = st.floats(0.01, 20.0)
MASKS = nst.arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12)))
AREA, LONGEST, SHORTEST = SIZES.index("area"), SIZES.index("longest"), SIZES.index("shortest")


def corners_of(mask: np.ndarray, down: float, across: float) -> np.ndarray:
    """All corners of all pixels of a mask, x y in millimetres."""
    rows, columns = np.nonzero(mask)
    every = [(columns + right, rows + below) for right in (0, 1) for below in (0, 1)]
    return np.unique(np.concatenate([np.stack(one, axis=1) for one in every]), axis=0) * (across, down)


def plain_calipers(points: np.ndarray) -> tuple[float, float]:
    """The largest distance of two points, and the least width of all over every direction of two of them."""
    apart = points[:, None] - points
    lengths = np.hypot(apart[..., 0], apart[..., 1])
    first, second = np.nonzero(lengths)
    along = apart[first, second] / lengths[first, second, None]
    across = np.stack([-along[:, 1], along[:, 0]], axis=1) @ points.T  # (pairs, points)
    return float(lengths.max()), float(np.ptp(across, axis=1).min())


def plain_hull(mask: np.ndarray) -> set[tuple[int, int]]:
    """x y of the corners of the convex hull, by turning around all corners of all pixels (gift wrapping)."""
    points = [(int(x), int(y)) for x, y in corners_of(mask, 1, 1)]
    found, at = set(), min(points)
    while at not in found:
        found.add(at)
        best = next(point for point in points if point != at)
        for x, y in points:
            turn = (best[0] - at[0]) * (y - at[1]) - (best[1] - at[1]) * (x - at[0])
            nearer = abs(best[0] - at[0]) + abs(best[1] - at[1]) < abs(x - at[0]) + abs(y - at[1])
            if turn < 0 or (turn == 0 and nearer):
                best = x, y
        at = best
    return found


def instance_of(mask: np.ndarray) -> Instance:
    return Instance(1, (0.0, 0.0, float(mask.shape[1]), float(mask.shape[0])), encode_rle(mask))


@settings(max_examples=40, deadline=None)
@given(mask=MASKS, down=SPACINGS, across=SPACINGS)
def test_sizes_of_a_mask_are_those_of_all_corners_of_its_pixels(mask: np.ndarray, down: float, across: float) -> None:
    assume(mask.any())
    (found,) = outlines_of([instance_of(np.pad(mask, ((3, 1), (5, 0))))]).sizes((down, across))
    area = float(mask.sum()) * down * across
    longest, shortest = plain_calipers(corners_of(mask, down, across))
    assert found == pytest.approx([area**0.5, area, longest, shortest], rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(masks=st.lists(MASKS, min_size=1, max_size=5), spacing=st.tuples(SPACINGS, SPACINGS))
def test_hulls_of_several_objects_are_those_of_each_alone(
    masks: list[np.ndarray], spacing: tuple[float, float]
) -> None:
    """An empty mask counts as its box, also between others; no corner lies between two others on a line."""
    objects = [instance_of(mask) for mask in masks]
    found = outlines_of(objects)
    each = np.split(found.points, np.cumsum(found.corners)[:-1])
    for mask, own in zip(masks, each, strict=True):
        assert len({*map(tuple, own.tolist())}) == len(own)
        wanted = plain_hull(mask) if mask.any() else {(0, 0), mask.shape[::-1]}
        assert {(int(x), int(y)) for x, y in own} == wanted
    alone = [outlines_of([one]).sizes(spacing) for one in objects]
    assert np.array_equal(found.sizes(spacing), np.concatenate(alone))
    spacings = np.outer(np.arange(1.0, len(objects) + 1), spacing)
    alone = [outlines_of([one]).sizes(tuple(own)) for one, own in zip(objects, spacings.tolist(), strict=True)]
    assert np.array_equal(found.sizes(spacings), np.concatenate(alone))


def test_sizes_of_a_large_shape_are_those_of_the_shape() -> None:
    rows, columns = np.mgrid[:400, :400]
    disk = (rows - 200) ** 2 + (columns - 200) ** 2 <= 150**2
    ((root_area, area, longest, shortest),) = outlines_of([instance_of(disk)]).sizes()
    assert area == disk.sum() and root_area == pytest.approx(np.sqrt(np.pi) * 150, rel=0.01)
    assert longest == pytest.approx(301, abs=1.5) and shortest == pytest.approx(301, abs=1.5)


def test_a_long_row_takes_the_corners_of_a_round_shape_above_it() -> None:
    """Each corner that goes makes the next one none."""
    rows, columns = np.mgrid[:200, :400]
    mask = (rows - 100) ** 2 + (columns - 200) ** 2 <= 100**2
    mask[199] = True
    found = outlines_of([instance_of(mask)])
    assert {(int(x), int(y)) for x, y in found.points} == plain_hull(mask)


def test_a_box_has_its_sides_and_a_mask_comes_before_it() -> None:
    box = Instance(1, (2.0, 3.0, 12.5, 7.0))
    mask = np.zeros((20, 20), bool)
    mask[3, 2:6] = True
    full, empty = replace(box, rle=encode_rle(mask)), replace(box, rle=encode_rle(mask & False))
    found = outlines_of([box, full, empty])
    assert found.sizes()[0].tolist() == pytest.approx([42**0.5, 42, 10.5, 4])
    assert found.sizes((0.5, 0.1))[0].tolist() == pytest.approx([2.1**0.5, 2.1, 2.0, 1.05])
    assert found.sizes()[:, AREA].tolist() == [42, 4, 42]
    assert np.isnan(found.sizes((float("nan"), float("nan")))).all()
    assert outlines_of([]).sizes().shape == (0, len(SIZES))


@pytest.mark.parametrize(
    ("box", "cut"),
    [
        ((1, 1, 9, 19), False),
        ((0, 4, 3, 9), True),
        ((4, 0.5, 8, 9), True),
        ((4, 4, 9.5, 9), True),
        ((4, 4, 8, 20), True),
    ],
)
def test_a_defect_is_cut_where_it_comes_within_a_pixel_of_a_border(box: tuple, cut: bool) -> None:
    assert is_cut(Instance(1, box), (20, 10)) is cut


def test_pixels_of_a_box_are_all_that_it_touches_in_the_image() -> None:
    (rows, columns), mask = pixels_of(Instance(1, (1.5, 0.0, 4.2, 2.0)), (2, 5))
    assert (rows, columns) == (slice(0, 2), slice(1, 5)) and mask.shape == (2, 4) and mask.all()


def noisy(seed: int, mean: float = 100.0, deviation: float = 5.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, deviation, (80, 80)).astype(np.float32)


def planted(*boxes: tuple[int, int, int, int]) -> list[Instance]:
    return [Instance(1, tuple(map(float, box))) for box in boxes]


@pytest.mark.parametrize("kind", ["float32", "uint8", "uint16", "colour"])
def test_contrast_is_what_was_planted_over_the_noise(kind: str) -> None:
    levels: Levels = noisy(1)
    levels[30:50, 30:50] += 40
    if kind == "colour":
        levels = np.repeat(levels[:, :, None], 3, axis=2).round().astype(np.uint8)
    elif kind != "float32":
        levels = levels.round().astype(kind)
    (found,) = contrasts(levels, planted((30, 30, 50, 50)), [])
    assert found == pytest.approx(8, rel=0.1)
    dark = contrasts((levels.max() - levels).astype(levels.dtype), planted((30, 30, 50, 50)), [])
    assert dark[0] == pytest.approx(found, rel=1e-3), "how a dark one stands out"


def test_other_defects_ignored_regions_and_empty_pixels_are_in_no_ring() -> None:
    levels = noisy(2)
    defects = planted((30, 30, 50, 50), (52, 30, 60, 50), (30, 54, 50, 60))
    (plain,) = contrasts(levels + 0, defects[:1], [])
    levels[30:50, 52:60] = 4000  # another defect
    levels[54:60, 30:50] = 9000  # an ignored region
    levels[22:27, 30:50] = -9000  # no part of the picture
    empty = np.ma.MaskedArray(levels, levels < 0)
    found = contrasts(empty, defects[:2], defects[2:])
    assert found[0] == pytest.approx(plain, abs=0.2) and found[1] > 100
    assert contrasts(levels, defects[:1], [])[0] != pytest.approx(plain, abs=0.01), "they would have counted"


def test_contrast_is_unknown_where_nothing_can_be_compared() -> None:
    levels = noisy(3)
    whole, flat = planted((0, 0, 80, 80)), np.full((80, 80), 7, np.uint8)
    assert np.isnan(contrasts(levels, whole, [])).all(), "no ring"
    assert np.isnan(contrasts(flat, planted((30, 30, 40, 40)), [])).all(), "no noise"
    assert np.isnan(contrasts(np.ma.MaskedArray(levels, levels == levels), planted((30, 30, 40, 40)), [])).all()
    assert contrasts(levels, [], whole).shape == (0,)


def test_the_edge_of_a_defect_counts_nowhere() -> None:
    levels, box = noisy(4), planted((30, 30, 34, 34))
    sharp = contrasts(levels, box, [])[0]
    levels[29, 30:34] = levels[34, 30:34] = levels[30:34, 29] = levels[30:34, 34] = 1e6  # the next pixels
    assert contrasts(levels, box, [])[0] == sharp
    levels[30:34, 34 + GAP + NARROWEST] = 1e6  # beyond the ring
    assert contrasts(levels, box, [])[0] == sharp
    levels[30:34, 34 + GAP] = 1e6
    assert contrasts(levels, box, [])[0] != sharp


@settings(max_examples=25, deadline=None)
@given(factor=st.floats(0.1, 50), offset=st.floats(-1000, 1000), seed=st.integers(0, 99))
def test_contrast_does_not_know_the_scale_of_levels(factor: float, offset: float, seed: int) -> None:
    levels = noisy(seed)
    plain = contrasts(levels, planted((3, 0, 20, 40)), [])
    other = contrasts((levels.astype(np.float64) * factor + offset).astype(np.float32), planted((3, 0, 20, 40)), [])
    assert other == pytest.approx(plain, rel=1e-2, abs=1e-3)
