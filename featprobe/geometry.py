"""Where an image lies in its frame: resize or letterbox, then pad right and bottom.

Pixel coordinates are continuous, (x, y), with (0, 0) the top-left corner of the top-left pixel.
"""

import re
from dataclasses import dataclass
from typing import Literal

from featprobe.errors import DataError

Fit = Literal["resize", "letterbox"]
Size = tuple[int, int]


@dataclass(frozen=True)
class Placement:
    """An image's place in a frame; all sizes are (height, width) in pixels.

    original: the image as it lies on the disk; content: the same image after scaling, at the frame's
    top left; frame: content plus padding.
    """

    original: Size
    content: Size
    frame: Size

    @property
    def affine(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Rows of the 2x3 matrix that takes (x, y, 1) of the original image into the frame."""
        scale_y, scale_x = (c / o for c, o in zip(self.content, self.original, strict=True))
        return (scale_x, 0.0, 0.0), (0.0, scale_y, 0.0)


def place(original: Size, asked: Size, fit: Fit, multiple: int) -> Placement:
    """Place an image into the frame that the asked size and the backbone's largest stride give.

    resize stretches to the asked size; letterbox keeps the aspect ratio. The frame is the asked size
    rounded up to a multiple of `multiple`, the same for every image of a data set.

    >>> place((250, 330), (250, 330), "resize", 32).frame
    (256, 352)
    >>> place((100, 400), (256, 256), "letterbox", 32).content
    (64, 256)
    """
    content = asked
    if fit == "letterbox":
        scale = min(a / o for a, o in zip(asked, original, strict=True))
        content = (max(1, round(original[0] * scale)), max(1, round(original[1] * scale)))
    frame = (-(-asked[0] // multiple) * multiple, -(-asked[1] // multiple) * multiple)
    return Placement(original, content, frame)


def default_size(originals: list[Size]) -> Size:
    """The images' own size when all agree and no side passes 512 pixels, otherwise 512x512."""
    sizes = set(originals)
    if len(sizes) == 1 and max(originals[0]) <= 512:
        return originals[0]
    return 512, 512


def parse_size(text: str) -> Size:
    """(height, width) in pixels, written HxW; raises DataError.

    >>> parse_size("256x640")
    (256, 640)
    """
    found = re.fullmatch(r"(\d+)x(\d+)", text.strip())
    if not found or 0 in map(int, found.groups()):
        raise DataError(f"{text!r} is not a size. wanted: HxW in pixels, as 256x640 (height x width).")
    return int(found[1]), int(found[2])
