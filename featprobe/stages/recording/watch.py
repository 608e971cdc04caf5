"""The seam between scoring and recording: while heads are scored, each hands over what it finds, image by image."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from featprobe.stages.stitch import Objects
from featprobe.targets import Labels

Handed = Literal["probabilities", "values", "objects", "scores", "nothing"]
"""What heads hand to a watch: maps of probabilities, or of other values; objects; scores of whole images; or nothing,
where nothing says which images are good."""


class Watch:
    """What `Task.evaluate` hands the findings of heads to, on the same forward pass that scores them.

    A watch overrides what it wants to see; the rest is ignored.

    head: place among the heads that are scored together. image: index among the images of the cache. Of each head and
    image one of the three is called, once, in the process that scores the image. What is handed over must not be
    changed afterwards.
    """

    def pixels(self, head: int, image: int, values: NDArray[np.float32], classes: Labels | None) -> None:
        """A score and a class, >= 1, of each pixel of the original image, (height, width); no classes for one class.

        values: of segmentation the largest probability of a class but the background, whose class `classes` has; of
        anomaly heads the map.
        """

    def objects(self, head: int, image: int, objects: Objects) -> None:
        """The detections in an image, in pixels of the original image, however low their scores are."""

    def image_score(self, head: int, image: int, score: float) -> None:
        """The score of an image as a whole, of heads that know no place in it; the higher, the surer of a defect."""
