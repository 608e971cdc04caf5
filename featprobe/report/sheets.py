"""Picture sheets: images beside their labels and predictions."""

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont

from featprobe.io.disk import write_whole
from featprobe.report.heat import Heat, draw_scale, paint
from featprobe.targets import IGNORE, Instance, Labels, semantic_from_instances

COLOURS = np.array(
    [(0, 0, 0), (230, 60, 50), (60, 150, 255), (255, 200, 0), (60, 200, 90), (200, 90, 230), (255, 140, 40),
     (0, 200, 210), (250, 130, 180), (150, 110, 60), (160, 220, 60), (110, 110, 220)],
    dtype=np.uint8,
)  # fmt: skip
IGNORED = (150, 150, 150)
WRONG = (200, 0, 0)
NARROWEST = 120  # pixels of a strip of text below a picture
TILE, GAP, LINE = 256, 6, 18  # pixels
FONT = ImageFont.load_default(13)


@dataclass(frozen=True)
class Panel:
    """One picture of a sheet: a grey or colour image in [0, 1], and what is drawn over it.

    Of objects the boxes are drawn, and their masks where all have one. text: lines below the picture, which go on in
    the next line where they are longer than its width; in red where what they say is wrong. heat: a map of the image's
    pixels, whose scale stands below a sheet.
    """

    image: NDArray[np.float32]
    labels: Labels | None = None
    instances: tuple[Instance, ...] = ()
    text: tuple[str, ...] = ()
    wrong: bool = False
    heat: Heat | None = None


def save_sheet(
    path: Path, rows: Iterable[tuple[str, Sequence[Panel]]], columns: Sequence[str], classes: Sequence[str]
) -> None:
    """Write a sheet as a PNG: a caption and panels per row, a title per column, the classes' colours below.

    Labels are drawn as translucent colour with a full outline; class 0 is left clear. Captions and titles that are
    longer than their place go on in the next line. Where panels have text, the caption stands below the first picture,
    before that text; else below the row. Of the rows, which an iterator may make, one is held at a time. Raises
    DiskError.
    """
    width = max(len(columns) * (TILE + GAP) + GAP, 480)
    ignored = False
    heats: list[Heat] = []
    drawn: list[tuple[str, list[Image.Image]]] = []
    for name, (first, *others) in rows:
        below = not (first.text or any(panel.text for panel in others))
        panels = [first if below else replace(first, text=(name, *first.text)), *others]
        ignored = ignored or any(panel.labels is not None and IGNORE in panel.labels for panel in panels)
        heats += [panel.heat for panel in panels if panel.heat and not heats]
        drawn.append((name if below else "", [draw_panel(panel, TILE, classes) for panel in panels]))
    legend = draw_legend(classes, width, ignored=ignored)
    if heats:
        legend = _below(legend, draw_scale(heats[0], legend.width, FONT))
    titles = [_lines(title, TILE) for title in columns]
    tiles = [(_lines(name, legend.width - 2 * GAP) if name else [], row) for name, row in drawn]
    heights = [max(tile.height for tile in row) + LINE * len(caption) + GAP for caption, row in tiles]
    top = LINE * max(map(len, titles), default=1) + GAP
    sheet = Image.new("RGB", (legend.width, top + sum(heights) + legend.height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        _write(draw, (GAP + column * (TILE + GAP), 2), title)
    for (caption, row), height in zip(tiles, heights, strict=True):
        for column, tile in enumerate(row):
            sheet.paste(tile, (GAP + column * (TILE + GAP), top))
        _write(draw, (GAP, top + height - LINE * len(caption) - GAP + 1), caption)
        top += height
    sheet.paste(legend, (0, top))
    write_whole(path, png(sheet))


def png(picture: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file."""
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return stream.getvalue()


def colour_of(index: int, classes: Sequence[str] = ()) -> tuple[int, int, int]:
    """A class's colour: the one that it is named by, as #ff0000 or red, else its own among COLOURS.

    Those repeat after the eleventh class, the background is never among them.

    >>> colour_of(2, ("#000000", "crack", "#ff0000")), colour_of(1, ("#000000", "crack", "#ff0000"))
    ((255, 0, 0), (230, 60, 50))
    """
    name = classes[index].strip().lower() if index < len(classes) else ""
    if name in ImageColor.colormap or re.fullmatch("#[0-9a-f]{6}", name):
        red, green, blue = ImageColor.getrgb(name)[:3]
    else:
        red, green, blue = COLOURS[index if index < len(COLOURS) else 1 + (index - 1) % (len(COLOURS) - 1)].tolist()
    return red, green, blue


def _lines(text: str, width: int) -> list[str]:
    """A text in lines of at most this many pixels, broken between words, or within one that is longer itself."""
    lines = [""]
    for word in re.findall(r"\S+\s*", text):
        if FONT.getlength((lines[-1] + word).rstrip()) > width and lines[-1]:
            lines.append("")
        for letter in word:
            if FONT.getlength((lines[-1] + letter).rstrip()) > width and lines[-1]:
                lines.append("")
            lines[-1] += letter
    return [line.rstrip() for line in lines]


def _write(
    draw: ImageDraw.ImageDraw, place: tuple[int, int], lines: Sequence[str], colour: tuple[int, int, int] = (0, 0, 0)
) -> None:
    for number, line in enumerate(lines):
        draw.text((place[0], place[1] + number * LINE), line, fill=colour, font=FONT)


def draw_legend(classes: Sequence[str], width: int, *, ignored: bool = False) -> Image.Image:
    """The colours of the classes but the background, in lines of this many pixels, or of as many as the longest takes.

    ignored: whether the colour of what is ignored is among them.
    """
    entries = [(name, colour_of(index, classes)) for index, name in enumerate(classes) if index]
    entries += [("ignored", IGNORED)] if ignored else []
    lengths = [int(FONT.getlength(name)) + 28 for name, _ in entries]
    width = max([width, *(GAP + length for length in lengths)])
    places: list[tuple[int, int]] = []  # x, y of each
    x, y = GAP, 0
    for length in lengths:
        if x + length > width:
            x, y = GAP, y + LINE
        places.append((x, y))
        x += length
    strip = Image.new("RGB", (width, y + LINE if entries else 0), "white")
    draw = ImageDraw.Draw(strip)
    for (name, colour), (x, y) in zip(entries, places, strict=True):
        draw.rectangle((x, y + 3, x + 12, y + 13), fill=colour)
        draw.text((x + 17, y), name, fill="black", font=FONT)
    return strip


def _below(upper: Image.Image, lower: Image.Image) -> Image.Image:
    """Two pictures, one below the other, on white."""
    whole = Image.new("RGB", (max(upper.width, lower.width), upper.height + lower.height), "white")
    whole.paste(upper, (0, 0))
    whole.paste(lower, (0, upper.height))
    return whole


def draw_overlay(panel: Panel, classes: Sequence[str]) -> Image.Image:
    """A panel at its image's own size, with the classes' colours on a strip below it."""
    picture = draw_panel(panel, classes=classes)
    whole = _below(picture, draw_legend(classes, picture.width))
    return _below(whole, draw_scale(panel.heat, whole.width, FONT)) if panel.heat else whole


def draw_panel(panel: Panel, longest: int | None = None, classes: Sequence[str] = ()) -> Image.Image:
    """A panel as a picture, at its image's own size or with its longest side this many pixels.

    classes: their names, for the colours of those that are named by one.
    """
    image = panel.image if panel.image.ndim == 3 else np.repeat(panel.image[:, :, None], 3, axis=2)
    scale = 1.0 if longest is None else longest / max(image.shape[:2])
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    picture = Image.fromarray((image * 255).round().astype(np.uint8))
    if longest is not None:
        picture = picture.resize(size, Image.Resampling.BILINEAR)
    if panel.heat is not None:
        picture = paint(picture, panel.heat)
    if panel.labels is not None:
        picture = _overlay(picture, panel.labels, classes)
    painted = semantic_from_instances(panel.instances, image.shape[:2]) if panel.instances else None
    if painted is not None:
        picture = _overlay(picture, painted, classes)
    draw = ImageDraw.Draw(picture)
    for instance in panel.instances:
        draw.rectangle([v * scale for v in instance.box_xyxy], outline=colour_of(instance.category, classes))
    return _with_text(picture, panel) if panel.text else picture


def _with_text(picture: Image.Image, panel: Panel) -> Image.Image:
    """A picture with its panel's text below it, on a strip that is at least as wide as a word."""
    lines = [line for text in panel.text for line in _lines(text, max(picture.width, NARROWEST))]
    width = max([picture.width, *(int(FONT.getlength(line)) + 1 for line in lines)])
    whole = Image.new("RGB", (width, picture.height + LINE * len(lines)), "white")
    whole.paste(picture, (0, 0))
    _write(ImageDraw.Draw(whole), (0, picture.height + 1), lines, WRONG if panel.wrong else (0, 0, 0))
    return whole


def _overlay(tile: Image.Image, labels: Labels, classes: Sequence[str]) -> Image.Image:
    small = np.asarray(Image.fromarray(labels).resize(tile.size, Image.Resampling.NEAREST))
    pixels = np.asarray(tile).astype(np.float32)
    for index in np.unique(small):
        if index == 0:
            continue
        colour = np.array(IGNORED if index == IGNORE else colour_of(int(index), classes), dtype=np.float32)
        inside = small == index
        padded = np.pad(inside, 1)
        core = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        pixels[inside] = 0.7 * pixels[inside] + 0.3 * colour
        pixels[inside & ~core] = colour
    return Image.fromarray(pixels.astype(np.uint8))
