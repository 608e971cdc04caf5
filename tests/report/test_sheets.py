"""Picture sheets and overlays: what their colours mean stands below, whole."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw

from featprobe.report.sheets import (
    COLOURS,
    FONT,
    GAP,
    IGNORED,
    LINE,
    TILE,
    Panel,
    colour_of,
    draw_legend,
    draw_overlay,
    save_sheet,
)
from featprobe.targets import IGNORE, Instance


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


def test_classes_that_are_named_by_a_colour_are_drawn_in_it() -> None:
    classes = ["#000000", "#0000ff", "crack", "#FF0000", "white", "#12"]
    wanted = [(0, 0, 255), colour_of(2), (255, 0, 0), (255, 255, 255), colour_of(5)]
    image: NDArray[np.float32] = np.full((40, 60), 0.5, np.float32)
    for index, colour in enumerate(wanted, start=1):
        labels = np.zeros((40, 60), np.uint8)
        labels[5:30, 5:30] = index
        panels = Panel(image, labels), Panel(image, instances=(Instance(index, (5, 5, 30, 30)),))
        for panel in panels:
            whole = draw_overlay(panel, classes)
            assert whole.getpixel((5, 5)) == colour
            assert colour in colours_in(whole.crop((0, 40, whole.width, whole.height))), "its legend"


@pytest.mark.parametrize("caption", ["short", "line 3, belt 7, taken 2024-03-05 at 13:45 " * 4, "no_space_in_it" * 30])
def test_captions_and_titles_are_shown_whole(tmp_path: Path, caption: str) -> None:
    image: NDArray[np.float32] = np.zeros((20, 30), np.float32)

    def sheet(caption: str, title: str) -> Image.Image:
        save_sheet(tmp_path / "sheet.png", [(caption, [Panel(image)] * 2)] * 2, ["image", title], ["ground", "pore"])
        with Image.open(tmp_path / "sheet.png") as picture:
            return picture.convert("RGB")

    def ink(picture: Image.Image) -> int:
        return int((np.asarray(ImageChops.invert(picture)).max(2) > 0).sum())

    plain, written = sheet("", ""), sheet(caption, caption)
    right = np.asarray(written)[:, -3:]
    assert (right == 255).all(), "nothing is cut at the right"
    lines = -(-FONT.getlength(caption) // (TILE + GAP))
    assert plain.height < written.height or lines == 1
    one_line = Image.new("RGB", (int(FONT.getlength(caption)) + 20, LINE), "white")
    ImageDraw.Draw(one_line).text((2, 0), caption, fill="black", font=FONT)
    assert ink(written) - ink(plain) == pytest.approx(3 * ink(one_line), rel=0.02), "twice as caption, once as title"


def test_a_caption_stands_below_its_own_picture_where_another_has_text(tmp_path: Path) -> None:
    image: NDArray[np.float32] = np.full((20, 20), 0.5, np.float32)
    panels = [Panel(image), Panel(image, text=("good", "(good 81%)"), wrong=True)]
    save_sheet(tmp_path / "sheet.png", [("part026.png", panels)] * 2, ["image", "prediction"], ["ground"])
    with Image.open(tmp_path / "sheet.png") as picture:
        shown = np.asarray(picture.convert("RGB")).astype(int)
    top, row = LINE + GAP, TILE + 2 * LINE + GAP
    assert len(shown) == top + 2 * row, "no line for it below the row"
    for start in (top, top + row):
        below = shown[start + TILE : start + row]
        assert (below[:LINE, GAP : GAP + TILE] < 128).any() and (below[LINE:, GAP : GAP + TILE] == 255).all()
        assert (below[:, GAP + TILE + GAP :].min(2) < 128).any(), "the text of the other"


def test_a_sheet_names_what_is_ignored_where_something_is(tmp_path: Path) -> None:
    image: NDArray[np.float32] = np.full((20, 30), 1.0, np.float32)
    heights = []
    for value in (1, IGNORE):
        labels = np.full((20, 30), value, np.uint8)
        save_sheet(tmp_path / "sheet.png", [("one", [Panel(image, labels)])], ["labels"], ["ground", "p" * 60])
        with Image.open(tmp_path / "sheet.png") as sheet:
            heights.append(sheet.height)
    assert heights[1] == heights[0] + LINE
