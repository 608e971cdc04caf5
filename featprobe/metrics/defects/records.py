"""Records of defects and calls, from which every curve of inspection follows without another look at an image.

A defect is one labelled object. A call is one object that a head reports, with a score. A threshold drops the calls
below it whole, so one pass over the records gives the numbers at every threshold. A part is a group of images.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featprobe.io.packed_texts import Texts

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
Part = TypeVar("Part", "Images", "Defects", "Calls")


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

    ids: Sequence[str]
    groups: Sequence[str]
    splits: Sequence[str]
    files: Sequence[str]
    hashes: Sequence[str]
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

    def of(self, split: str) -> "Records":
        """The records of the images of one split."""
        return self._kept(np.fromiter((own == split for own in self.images.splits), bool, len(self.images)))

    def with_least_area(self, pixels: float) -> "Records":
        """The records without calls of fewer pixels. What a defect is found at follows from the other calls."""
        return self._kept(np.ones(len(self.images), dtype=bool), self.calls.size("area") >= pixels)

    def judged(self) -> "Records":
        """What can be found and called: of images that have one score, the images themselves; else these records.

        An image with a defect then stands for the defect; a call on a good image is a false call.
        """
        if not self.about.pooled:
            return self
        score = self.images.score
        called, bad = np.flatnonzero(~np.isnan(score)), np.flatnonzero(self.images.good == DEFECT)
        touched = np.array([TOUCHES, NOTHING, IGNORED], dtype=np.uint8)[self.images.good[called]]
        finds = np.stack([np.searchsorted(called, bad), np.arange(len(bad))], axis=1)[~np.isnan(score[bad])]
        calls = Calls(**_of_images(called), score=score[called], touched=touched)
        unknown, uncut = np.full(len(bad), np.nan, dtype=np.float32), np.zeros(len(bad), dtype=bool)
        found = found_scores(finds, calls.score, len(bad))
        defects = Defects(**_of_images(bad), score=found, contrast=unknown, cut=uncut)
        return replace(self, defects=defects, calls=calls, finds=finds)

    @classmethod
    def joined(cls, parts: Sequence["Records"]) -> "Records":
        """The records of several heads, each about images of its own, as of one; `about` is that of the first."""
        numbers = [[len(p.images), len(p.calls), len(p.defects)] for p in parts]
        before = np.cumsum([[0, 0, 0], *numbers[:-1]], axis=0)
        moved = [
            (replace(p.defects, image=p.defects.image + shift), replace(p.calls, image=p.calls.image + shift))
            for p, (shift, _, _) in zip(parts, before, strict=True)
        ]
        return cls(
            parts[0].about,
            _joined([p.images for p in parts]),
            _joined([defects for defects, _ in moved]),
            _joined([calls for _, calls in moved]),
            np.concatenate([p.finds + more for p, more in zip(parts, before[:, 1:], strict=True)]),
        )

    def called(self, threshold: ArrayLike) -> NDArray[np.bool_]:
        """Whether each call counts, (calls,). threshold: of all images, or one for each, (images,)."""
        return self.calls.score >= self._of_image(threshold)[self.calls.image]

    def found(self, threshold: ArrayLike) -> NDArray[np.bool_]:
        """Whether each defect is found, (defects,). threshold: of all images, or one for each, (images,)."""
        return self.defects.score >= self._of_image(threshold)[self.defects.image]

    def _of_image(self, threshold: ArrayLike) -> Floats:
        return np.broadcast_to(np.asarray(threshold, dtype=np.float32), len(self.images))

    def _kept(self, images: NDArray[np.bool_], among: NDArray[np.bool_] | None = None) -> "Records":
        """The records of some images, (images,), and of their calls among some, (calls,); all indices made anew."""
        calls = images[self.calls.image] if among is None else images[self.calls.image] & among
        defects = images[self.defects.image]
        place, of_call, of_defect = (np.cumsum(own) - 1 for own in (images, calls, defects))
        call, defect = self.finds.T
        kept = calls[call] & defects[defect]
        finds = np.stack([of_call[call[kept]], of_defect[defect[kept]]], axis=1)
        left, found = _taken(self.calls, calls), _taken(self.defects, defects)
        return Records(
            self.about,
            _taken(self.images, images),
            replace(found, image=place[found.image], score=found_scores(finds, left.score, len(found))),
            replace(left, image=place[left.image]),
            finds,
        )


def found_scores(finds: Indices, scores: Floats, defects: int) -> Floats:
    """The highest score of the calls that find each defect, (defects,); -inf for none.

    finds: (m, 2), a call and a defect that it finds. scores: (calls,).

    >>> found_scores(np.array([[0, 1], [2, 1]]), np.array([0.5, 0.9, 0.75], dtype=np.float32), 2).tolist()
    [-inf, 0.75]
    """
    found = np.full(defects, -np.inf, dtype=np.float32)
    np.maximum.at(found, finds[:, 1], scores[finds[:, 0]])
    return found


def _taken(part: Part, kept: NDArray[np.bool_]) -> Part:
    """Some of the images, defects or calls. kept: one flag for each."""
    index = np.flatnonzero(kept)
    return _made(part, lambda name: _picked(getattr(part, name), index))


def _joined(parts: Sequence[Part]) -> Part:
    """Images, defects or calls one after another."""
    return _made(parts[0], lambda name: _chained([getattr(part, name) for part in parts]))


def _made(part: Part, value: Callable[[str], Any]) -> Part:
    return replace(part, **{own.name: value(own.name) for own in fields(part)})


def _picked(values: Any, index: Indices) -> Any:
    return values[index] if isinstance(values, np.ndarray) else Texts.of(values).some(index)


def _chained(values: Sequence[Any]) -> Any:
    if isinstance(values[0], np.ndarray):
        return np.concatenate(values)
    return Texts.joined([Texts.of(own) for own in values])


def _of_images(images: Indices) -> dict[str, NDArray[Any]]:
    """Whole images as objects, whose class and size are not known."""
    unknown = np.full((len(images), 4), np.nan, dtype=np.float32)
    category = np.zeros(len(images), dtype=np.uint8)
    return {"image": images, "category": category, "boxes": unknown, "pixels": unknown, "millimetres": unknown}
