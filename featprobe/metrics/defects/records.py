"""Records of defects and calls, from which every curve of inspection follows without another look at an image.

A defect is one labelled object. A call is one object that a head reports, with a score. A threshold drops the calls
below it whole, so one pass over the records gives the numbers at every threshold. A part is a group of images.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

GOOD, DEFECT, UNKNOWN = 1, 0, 2
"""What is known of an image: it holds no defect; it holds one; it holds an ignored region and no defect."""
NOTHING, TOUCHES, IGNORED = 0, 1, 2
"""What a call touches: no defect and no ignored region, which makes it a false call; a defect; an ignored region."""
Size = Literal["root_area", "area", "longest", "shortest"]
"""Sizes of objects: square root of the area, area, longest and shortest caliper."""
SIZES: tuple[Size, ...] = ("root_area", "area", "longest", "shortest")
Unit = Literal["px", "mm"]
Indices = NDArray[np.intp]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class FoundRule:
    """When a call has found a defect.

    iou: from this IoU on; None for the usual rule: the call covers the center of the defect, or at least a tenth of its
    area, or their IoU is at least 0.1. same_class: whether their classes must agree.
    """

    iou: float | None = None
    same_class: bool = False


@dataclass(frozen=True)
class About:
    """What records are of.

    base: the threshold at which the pixels of a map are joined to calls; nan where calls are detections, or where
    images have one score. base_from: "validation", "default", or "" for none. parts: whether groups of images are known
    to be parts; else each image is its own. pooled: whether images have one score, and there are no calls.
    """

    task: str
    head: str
    head_sha256: str
    classes: tuple[str, ...]
    rule: FoundRule
    base: float
    base_from: Literal["validation", "default", ""]
    parts: bool
    pooled: bool = False


@dataclass(frozen=True)
class Images:
    """Images of the records, (n,) each. good: GOOD, DEFECT or UNKNOWN. score: of the image as a whole; nan where it
    has none. spacing: (n, 2), mm per pixel down and across; nan where unknown. sizes: (n, 2), height and width.
    files, hashes: its place below the root of its set, and the hash of its bytes in the cache.
    """

    ids: tuple[str, ...]
    groups: tuple[str, ...]
    splits: tuple[str, ...]
    files: tuple[str, ...]
    hashes: tuple[str, ...]
    good: NDArray[np.uint8]
    score: Floats
    spacing: Floats
    sizes: Indices

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Objects:
    """Defects or calls. image: (n,), index of its image. category: (n,), index of its class; 0 for a class that is not
    known. boxes: (n, 4), x1 y1 x2 y2, pixels of the original image. pixels, millimetres: (n, 4), its sizes in the order
    of SIZES; nan where unknown. score: (n,); of a defect the highest of the calls that find it, -inf for none.
    """

    image: Indices
    category: NDArray[np.uint8]
    boxes: Floats
    pixels: Floats
    millimetres: Floats
    score: Floats

    def __len__(self) -> int:
        return len(self.image)

    def size(self, name: Size = "root_area", unit: Unit = "px") -> Floats:
        """One size of each, (n,)."""
        return (self.pixels if unit == "px" else self.millimetres)[:, SIZES.index(name)]


@dataclass(frozen=True)
class Defects(Objects):
    """Defects. contrast: (n,), contrast to noise; nan where unknown. cut: (n,), whether an image border cuts it."""

    contrast: Floats
    cut: NDArray[np.bool_]


@dataclass(frozen=True)
class Calls(Objects):
    """Calls. touched: (n,), NOTHING, TOUCHES or IGNORED."""

    touched: NDArray[np.uint8]


@dataclass(frozen=True)
class Records:
    """All defects and calls of some images. finds: (m, 2), a call and a defect that it finds, as indices."""

    about: About
    images: Images
    defects: Defects
    calls: Calls
    finds: Indices
