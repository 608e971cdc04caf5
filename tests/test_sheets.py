"""Picture sheets and overlays: what their colours mean stands below, whole."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from featprobe.report.sheets import COLOURS, IGNORED, LINE, Panel, colour_of, draw_legend, draw_overlay, save_sheet
from featprobe.targets import IGNORE


def colours_in(picture: Image.Image) -> set[tuple[int, ...]]:
    return {tuple(colour) for colour in np.asarray(picture).reshape(-1, 3).tolist()}


@pytest.mark.parametrize("width", [8, 64, 300, 2000])
@pytest.mark.parametrize("count", [1, 5, 11])
def test_a_legend_shows_the_colour_of_each_class_but_the_background(width: int, count: int) -> None:
    classes = ["background", *(f"a kind of defect, number {i}" for i in range(count))]
    strip = draw_legend(classes, width)
    assert strip.width >= width and strip.height % LINE == 0
    wanted = {colour_of(index) for index in range(1, len(classes))}
    assert colours_in(strip) & {tuple(c) for c in COLOURS[1:].tolist()} == wanted
    assert IGNORED in colours_in(draw_legend(classes, width, ignored=True))
    right = np.asarray(strip)[:, -1]
    assert (right == 255).all(), "no name is cut"


def test_an_overlay_keeps_the_images_pixels_in_their_place() -> None:
    image: NDArray[np.float32] = np.full((20, 30), 0.5, np.float32)
    labels = np.zeros((20, 30), np.uint8)
    labels[5:10, 5:10] = 1
    whole = draw_overlay(Panel(image, labels), ["ground", "pore"])
    assert whole.height == 20 + LINE and whole.width >= 30
    assert whole.getpixel((0, 0)) == (128, 128, 128) and whole.getpixel((5, 5)) == colour_of(1)
    assert colour_of(1) in colours_in(whole.crop((0, 20, whole.width, whole.height)))


def test_a_sheet_names_what_is_ignored_where_something_is(tmp_path: Path) -> None:
    image: NDArray[np.float32] = np.full((20, 30), 1.0, np.float32)
    heights = []
    for value in (1, IGNORE):
        labels = np.full((20, 30), value, np.uint8)
        save_sheet(tmp_path / "sheet.png", [("one", [Panel(image, labels)])], ["labels"], ["ground", "p" * 60])
        with Image.open(tmp_path / "sheet.png") as sheet:
            heights.append(sheet.height)
    assert heights[1] == heights[0] + LINE
