"""What graphs of segmentation heads give: the class of each pixel, and probabilities."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featprobe.datasets.images.pixels import Levels
from featprobe.features import Features
from featprobe.geometry import Placement
from featprobe.probes import DenseHead, logits_at_original
from featprobe.stages.export.graph import (
    AtOriginal,
    Differences,
    GraphOutput,
    compared_logits,
    compared_verdicts,
    pieces_of_size,
    reference,
    relative,
)
from featprobe.stages.predictor import Predictor
from featprobe.stages.tasks.settle import CALLED


class PixelOutput(GraphOutput):
    """The pixels of an image as it is given.

    classes (n, height, width), uint8: the class of each finding's pixels, 0 elsewhere. probabilities (n, classes,
    height, width). score (n,): the largest probability of a class other than the background. verdict (n,), bool:
    whether there is a finding. logits (n, classes, rows, columns): of the head's cells, from which all else follows.

    threshold: pixels are part of a finding where their largest probability of a class other than the background is at
    least so large; None: where such a class is the most probable.
    """

    names = ("classes", "probabilities", "score", "verdict", "logits")

    def __init__(self, head: DenseHead, card: Mapping[str, Any], placement: Placement, threshold: float | None) -> None:
        super().__init__()
        self.head, self.limit = head, threshold
        self.pixels = AtOriginal(logits_at_original, head.stride, placement)

    def forward(self, features: Features) -> tuple[Tensor, ...]:
        """See the class."""
        cells = self.head(features)
        background, *others = self.pixels(cells).unbind(1)  # class by class: reductions over them are slow in runtimes
        best, classes = others[0], torch.ones_like(background, dtype=torch.uint8)
        for index, own in enumerate(others[1:], start=2):
            classes = torch.where(own > best, index, classes)
            best = torch.maximum(best, own)
        highest = torch.maximum(best, background)
        shares = [(own - highest).exp() for own in (background, *others)]
        total = shares[0]
        for own in shares[1:]:
            total = total + own
        surest = (best - highest).exp() / total
        found = best > background if self.limit is None else surest >= self.limit
        probabilities = torch.stack([own / total for own in shares], 1)
        return torch.where(found, classes, 0), probabilities, surest.amax((1, 2)), found.flatten(1).any(1), cells

    @torch.inference_mode()
    def compare(self, found: Mapping[str, NDArray[Any]], predictor: Predictor, levels: Sequence[Levels]) -> Differences:
        """Masks are compared with those of `predict`, logits with those of the head's cells."""
        pieces, size = pieces_of_size(predictor, levels)
        features = reference(predictor, levels)
        masks, judged = zip(*predictor.output.found(iter([(pieces, features)]), [size] * len(levels)), strict=True)
        cells = predictor.head(features)
        scores = np.array([own.score for own in judged])
        logits = logits_at_original(cells, self.head.stride, pieces[0].placement)
        margin = (logits[:, 1:].amax(1) - logits[:, 0]).amax((1, 2)).numpy()
        apart = margin if self.limit is None else scores - self.limit
        return Differences(
            scores=relative(found["score"], scores),
            pixels=np.stack(masks).size,
            equal_pixels=int((found["classes"] == np.stack(masks)).sum()),
            **compared_logits(found["logits"], cells.numpy()),
            **compared_verdicts(found["verdict"], np.array([own.verdict == CALLED for own in judged]), apart),
        )
