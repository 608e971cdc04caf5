"""Pictures of what a head misses or calls for nothing: a place enlarged, beside the whole image with a frame there."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from featprobe.geometry import Box, Size
from featprobe.report.sheets import png

SIDE, GAP = 320, 8  # pixels: of the square that each of the two pictures fits, and between them
AROUND, LEAST_SHOWN = 1.6, 48  # the side of what is enlarged: of the box's longer side, and least, in pixels
FRAME, EDGE = (255, 200, 0), (20, 20, 20)  # yellow with a dark edge stands out of dark and bright images
TICK = 0.3  # of a side of a box: the length of its marks, which are corners, so that nothing of the defect is hidden
CLEAR = 3  # pixels between a box and its marks
PERCENT = (0.5, 99.5)  # of the pixels near a grey box: what becomes black and white
NEAR, LEAST_NEAR = 0.25, 4  # how far that is: of the box's longer side, and least, in pixels
PLAIN = 0.8  # of the scale: a place that fills so much of it is shown as it is


@dataclass(frozen=True)
class Drawn:
    """A picture. png: the bytes of its file. stretched: whether the contrast of the enlarged place is."""

    png: bytes
    stretched: bool = False


def draw_closeup(image: NDArray[np.float32], box: Box | None) -> Drawn:
    """Draw an image and one place of it.

    image: (height, width) or (height, width, 3), in [0, 1]. box: x1 y1 x2 y2, pixels of the image; None for the image
    alone. A grey place without much contrast is stretched to the darkest and brightest level in and near the box.
    """
    size: Size = image.shape[0], image.shape[1]
    whole = _fitted(_picture(image))
    if box is None:
        return Drawn(png(whole))
    left, top, right, bottom = window = place_of(box, size)
    shown, stretched = _stretched(image[top:bottom, left:right], _near(image, box))
    place = _fitted(_picture(shown))
    scale = place.width / (right - left)
    _corners(place, ((box[0] - left) * scale, (box[1] - top) * scale, (box[2] - left) * scale, (box[3] - top) * scale))
    _frame(whole, tuple(value * whole.width / size[1] for value in window))
    both = Image.new("RGBA", (whole.width + GAP + place.width, max(whole.height, place.height)))  # clear between them
    both.paste(whole, (0, 0))
    both.paste(place, (whole.width + GAP, 0))
    return Drawn(png(both), stretched)


def place_of(box: Box, size: Size) -> tuple[int, int, int, int]:
    """What is shown of an image of (height, width) around a box: x1 y1 x2 y2, a square where the image has room.

    >>> place_of((100, 40, 110, 50), (400, 600)), place_of((0, 0, 300, 20), (200, 900))
    ((81, 21, 129, 69), (0, 0, 480, 200))
    """
    x1, y1, x2, y2 = box
    side = max(LEAST_SHOWN, round(AROUND * max(x2 - x1, y2 - y1)))
    spans = []
    for low, high, limit in ((x1, x2, size[1]), (y1, y2, size[0])):
        length = min(side, limit)
        start = min(max(0, round((low + high - length) / 2)), limit - length)
        spans.append((start, start + length))
    (left, right), (top, bottom) = spans
    return left, top, right, bottom


def _near(image: NDArray[np.float32], box: Box) -> NDArray[np.float32]:
    """The pixels in a box and close to it."""
    x1, y1, x2, y2 = box
    more = max(LEAST_NEAR, NEAR * max(x2 - x1, y2 - y1))
    top, left = max(0, round(y1 - more)), max(0, round(x1 - more))
    return image[top : round(y2 + more), left : round(x2 + more)]


def _stretched(place: NDArray[np.float32], near: NDArray[np.float32]) -> tuple[NDArray[np.float32], bool]:
    low, high = np.percentile(near, PERCENT).tolist() if near.ndim == 2 and near.size else (0.0, 1.0)
    if not 0 < high - low < PLAIN:
        return place, False
    return np.clip((place - np.float32(low)) / np.float32(high - low), 0, 1), True


def _picture(image: NDArray[np.float32]) -> Image.Image:
    values = image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2)
    return Image.fromarray((values * 255).round().astype(np.uint8))


def _fitted(picture: Image.Image) -> Image.Image:
    """A picture with its longer side SIDE pixels."""
    scale = SIDE / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.BOX)


def _frame(picture: Image.Image, box: tuple[float, ...]) -> None:
    """Draw a frame round a box, no smaller than can be seen."""
    x1, y1, x2, y2 = box
    more = max(0.0, 6 - (x2 - x1)) / 2, max(0.0, 6 - (y2 - y1)) / 2
    corners = x1 - more[0], y1 - more[1], x2 + more[0] - 1, y2 + more[1] - 1
    draw = ImageDraw.Draw(picture)
    for grown, colour in ((1, EDGE), (-2, EDGE), (0, FRAME), (-1, FRAME)):
        sides = (corners[0] - grown, corners[1] - grown, corners[2] + grown, corners[3] + grown)
        inside = [_inside(value, picture.size[i % 2]) for i, value in enumerate(sides)]
        draw.rectangle(inside, outline=colour)


def _corners(picture: Image.Image, box: Box) -> None:
    """Mark the four corners of a box, a little outside of it."""
    draw = ImageDraw.Draw(picture)
    x1, y1, x2, y2 = box[0] - CLEAR, box[1] - CLEAR, box[2] + CLEAR, box[3] + CLEAR
    across, down = (max(5.0, TICK * length) for length in (x2 - x1, y2 - y1))
    x1, x2 = _inside(x1, picture.width), _inside(x2, picture.width)
    y1, y2 = _inside(y1, picture.height), _inside(y2, picture.height)
    for width, colour in ((4, EDGE), (2, FRAME)):
        for x, along in ((x1, across), (x2, -across)):
            for y, upright in ((y1, down), (y2, -down)):
                draw.line([(x + along, y), (x, y), (x, y + upright)], fill=colour, width=width)


def _inside(value: float, side: int) -> float:
    return min(max(0.0, value), side - 1.0)
