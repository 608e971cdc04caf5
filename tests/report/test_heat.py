"""Heat maps: one scale for all pictures of a head, clear where values are usual, another colour above the threshold."""

import numpy as np
import pytest
from PIL import Image

from featprobe.report.heat import Heat, draw_scale, paint
from featprobe.report.sheets import FONT, Panel, draw_overlay, save_sheet

GREY = Image.new("RGB", (64, 8), (100, 100, 100))


def ramp(threshold: float, top: float) -> Heat:
    """A map whose values rise from 0 at the left to `top` at the right."""
    return Heat(np.broadcast_to(np.linspace(0, top, 64, dtype=np.float32), (8, 64)), threshold)


def test_the_colour_changes_at_the_threshold_and_nothing_is_drawn_far_below_it() -> None:
    pixels = np.asarray(paint(GREY, ramp(3.0, 6.0)))[4].astype(int)  # (64, 3)
    assert (pixels[:15] == 100).all()  # below half of the threshold
    assert (pixels[17:31, 2] > pixels[17:31, 0]).all()  # blue below it
    assert (pixels[33:, 0] > pixels[33:, 2]).all()  # yellow to red above


def test_one_scale_serves_maps_of_any_values() -> None:
    low, high = Heat(np.full((4, 4), 2.0, np.float32), 3.0), Heat(np.full((4, 4), 99.0, np.float32), 3.0)
    assert low.scale == high.scale and low.top == high.top == 6.0 and "3" in low.scale
    end = np.asarray(paint(Image.new("RGB", (4, 4)), Heat(np.full((4, 4), 6.0, np.float32), 3.0)))
    assert np.array_equal(np.asarray(paint(Image.new("RGB", (4, 4)), high)), end)


@pytest.mark.parametrize("values", [np.zeros((4, 4), np.float32), np.full((4, 4), 5.0, np.float32)])
def test_a_map_without_a_threshold_has_a_scale_of_its_own(values: np.ndarray) -> None:
    heat = Heat(values, float("nan"))
    assert heat.top == max(values.max(), np.finfo(np.float32).tiny) and "no threshold" in heat.scale
    assert paint(GREY, heat).size == GREY.size


def test_a_sheet_and_an_overlay_name_the_scale_below_the_pictures(tmp_path) -> None:
    pixels = np.zeros((8, 64), np.float32)
    panel, plain = Panel(pixels, heat=ramp(3.0, 6.0)), Panel(pixels)
    assert draw_overlay(panel, ()).height > draw_overlay(plain, ()).height
    save_sheet(tmp_path / "heat.png", [("one", [panel])], ["image"], ("good", "defect"))
    save_sheet(tmp_path / "plain.png", [("one", [plain])], ["image"], ("good", "defect"))
    with Image.open(tmp_path / "heat.png") as heat, Image.open(tmp_path / "plain.png") as other:
        assert heat.height - other.height == draw_scale(ramp(3.0, 6.0), 0, FONT).height
