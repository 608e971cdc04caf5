"""Close-ups: what is shown around a box, and where its frame lies in the whole image."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from featprobe.report.closeups import FRAME, GAP, LEAST_SHOWN, SIDE, draw_closeup, place_of

SIDES = st.integers(1, 700)
PLACES = st.floats(-20, 720)


def pixels_of(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def framed(pixels: np.ndarray) -> tuple[float, float, float, float]:
    """The box round all pixels of the frame's colour: x1 y1 x2 y2."""
    rows, columns = np.nonzero((np.abs(pixels - FRAME) < 8).all(axis=2))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


@settings(max_examples=50)
@given(height=SIDES, width=SIDES, corner=st.tuples(PLACES, PLACES), sides=st.tuples(PLACES, PLACES))
def test_what_is_shown_lies_in_the_image_and_holds_the_box(
    height: int, width: int, corner: tuple[float, float], sides: tuple[float, float]
) -> None:
    x1, y1 = (min(max(0.0, value), side - 1.0) for value, side in zip(corner, (width, height), strict=True))
    x2, y2 = (min(max(low, low + side), most) for low, side, most in zip((x1, y1), sides, (width, height), strict=True))
    left, top, right, bottom = place_of((x1, y1, x2, y2), (height, width))
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    assert left <= x1 and top <= y1 and x2 <= right and y2 <= bottom
    assert right - left >= min(LEAST_SHOWN, width) and bottom - top >= min(LEAST_SHOWN, height)


@pytest.mark.parametrize("box", [(100, 60, 140, 80), (0, 0, 5, 5), (390, 290, 400, 300)])
def test_the_frame_in_the_whole_image_is_round_what_is_enlarged(box: tuple[float, float, float, float]) -> None:
    image = np.zeros((300, 400), np.float32)
    pixels = pixels_of(draw_closeup(image, box).png)
    assert pixels.shape == (SIDE, 2 * SIDE + GAP, 3)
    scale = SIDE / 400
    wanted = np.array(place_of(box, (300, 400))) * scale
    assert framed(pixels[:, :SIDE]) == pytest.approx(wanted, abs=3)


def test_what_is_enlarged_is_the_box_with_marks_outside_of_it() -> None:
    image = np.zeros((300, 400, 3), np.float32)
    image[120:140, 200:230] = (0, 0, 1)  # blue
    place = pixels_of(draw_closeup(image, (200, 120, 230, 140)).png)[:, SIDE + GAP :]
    blue = place[..., 2] - place[..., 0] > 128
    left, top, right, _ = place_of((200, 120, 230, 140), (300, 400))
    scale = SIDE / (right - left)
    assert blue.sum() == pytest.approx(20 * 30 * scale**2, rel=0.02), "nothing of it is hidden"
    assert framed(place) == pytest.approx(
        [(200 - left) * scale, (120 - top) * scale, (230 - left) * scale, (140 - top) * scale], abs=6
    )


def test_a_grey_place_is_stretched_to_what_is_near_and_colour_is_not() -> None:
    image = np.full((200, 200), 0.1, np.float32)
    image[:, 110:] = 1.0  # far from the box
    image[90:100, 50:60] = 0.12
    drawn = draw_closeup(image, (50, 90, 60, 100))
    place = pixels_of(drawn.png)[:, SIDE + GAP :]
    assert drawn.stretched and place[SIDE // 2, SIDE // 2].tolist() == [255] * 3
    plain = draw_closeup(np.repeat(image[:, :, None], 3, axis=2), (50, 90, 60, 100))
    assert not plain.stretched
    assert abs(pixels_of(plain.png)[SIDE // 2, SIDE + GAP + SIDE // 2] - round(0.12 * 255)).max() <= 1
    flat = draw_closeup(np.full((200, 200), 0.1, np.float32), (50, 90, 60, 100))
    assert not flat.stretched


@settings(max_examples=8, deadline=None)
@given(height=st.integers(1, 80), width=st.integers(1, 900), corner=st.tuples(PLACES, PLACES), side=PLACES)
def test_any_image_and_any_box_can_be_drawn(height: int, width: int, corner: tuple[float, float], side: float) -> None:
    image = np.random.default_rng(0).random((height, width), np.float32)
    for box in (None, (*corner, corner[0] + side, corner[1] + 1), (*corner, 1e30, 1e30)):
        pixels = pixels_of(draw_closeup(image, box).png)
        assert pixels.shape[0] <= SIDE and pixels.shape[1] <= 2 * SIDE + GAP


def test_the_gap_between_the_two_has_the_colour_of_the_page() -> None:
    drawn = Image.open(io.BytesIO(draw_closeup(np.ones((200, 200), np.float32), (50, 50, 90, 90)).png))
    opaque = np.asarray(drawn.convert("RGBA"))[..., 3] == 255
    assert not opaque[:, SIDE : SIDE + GAP].any() and opaque[:, :SIDE].all() and opaque[:, SIDE + GAP :].all()
