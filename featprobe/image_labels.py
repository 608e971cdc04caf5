"""Labels of whole images: their names, and what is known of the images of a set, or of the tiles of its images."""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from featprobe.io.fields import Fault, limits, made
from featprobe.io.texts import are_whole
from featprobe.scores import SCORES

Unit = Literal["image", "tile"]
"""What gets a label: a whole image, or a tile of it."""
ImageLabels = Literal["own", "defect", "classes"]
"""Where labels come from: the set's own labels of images; whether there is a defect; which classes there are."""
UNKNOWN = 255
"""The value of a label that is not known."""
MOST_NAMES = 1000
"""The most names of labels that a set may have."""
OF_PARTS = ("pixels", "boxes", "masks")
"""What tasks score that need labels of pixels or of objects; all others need no more than labels of images."""


@dataclass(frozen=True)
class LabelNames:
    """The labels that the images of a set may have.

    names: distinct, in a fixed order. multi: whether an image may have several of them, or none: then it is good. good:
    the name that says that there is no defect, never with `multi`; None where nothing is known of good images.
    """

    names: tuple[str, ...]
    multi: bool = False
    good: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, as a cache keeps them."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: object) -> "LabelNames":
        """The names that `to_json` wrote; raises FieldError that names every wrong field."""
        return made(cls, data, "The labels of images")

    def faults(self) -> list[Fault]:
        """Values that no data set has: see `from_json`."""
        distinct = 0 < len(set(self.names)) == len(self.names) <= MOST_NAMES and all(self.names)
        wanted = "null where an image may have several labels, else null or one of the names"
        fits = self.good is None or (not self.multi and self.good in self.names)
        return limits({
            "names": (distinct and are_whole(*self.names), f"1 to {MOST_NAMES} different names", self.names),
            "good": (fits, wanted, self.good),
        })  # fmt: skip

    @property
    def says_good(self) -> bool:
        """Whether the labels of an image say if it is good."""
        return self.multi or self.good is not None


DEFECT = LabelNames(("good", "defect"), good="good")
"""The labels that only say whether there is a defect."""


def names_by(labels: ImageLabels, own: LabelNames | None, classes: Sequence[str]) -> LabelNames:
    """The labels that images get from one of these places.

    own: what the set's images are called; needed for `own`. classes: of its pixels and objects, the background first.

    >>> names_by("classes", None, ("background", "crack", "dent"))
    LabelNames(names=('crack', 'dent'), multi=True, good=None)
    """
    if labels == "classes":
        return LabelNames(tuple(classes[1:]), multi=True)
    return own if labels == "own" and own is not None else DEFECT


@dataclass(frozen=True, eq=False)
class ImageTruth:
    """What is known of units, which are images or tiles.

    values: (units, names), 1 where a label holds, 0 where it does not, UNKNOWN in the whole row of a unit of which
    nothing is known.
    """

    names: LabelNames
    values: NDArray[np.uint8]

    @property
    def known(self) -> NDArray[np.bool_]:
        """(units,), whether the labels of a unit are known."""
        return self.values[:, 0] != UNKNOWN

    @property
    def good(self) -> NDArray[np.uint8]:
        """(units,), 1 for a good unit, 0 for one with a defect, UNKNOWN where nothing is known of that.

        >>> ImageTruth(LabelNames(("a", "b"), multi=True), encode([(), (1,), None], 2)).good
        array([  1,   0, 255], dtype=uint8)
        """
        if not self.names.says_good:
            return np.full(len(self.values), UNKNOWN, dtype=np.uint8)
        if self.names.good is None:
            found = (self.values != 1).all(1)
        else:
            found = self.values[:, self.names.names.index(self.names.good)] == 1
        return np.where(self.known, found, UNKNOWN).astype(np.uint8)


def encode(held: Sequence[Collection[int] | None], count: int) -> NDArray[np.uint8]:
    """(units, names) as `ImageTruth.values`, from the labels of each unit; None where they are unknown.

    count: of names.
    """
    values = np.zeros((len(held), count), dtype=np.uint8)
    for row, own in zip(values, held, strict=True):
        row[slice(None) if own is None else list(own)] = UNKNOWN if own is None else 1
    return values


def tasks_served(tasks: Sequence[str], names: LabelNames | None) -> tuple[str, ...]:
    """The tasks that a set serves: those of its labels of pixels and objects, then those of whole images.

    tasks: the former. names: its labels of images. Labels of any kind say something of whole images.
    """
    of_images = tuple(task for task, scores in SCORES.items() if scores.on not in OF_PARTS)
    return (*tasks, *(of_images if tasks or names else ()))
