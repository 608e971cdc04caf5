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
    Differences,
    GraphOutput,
    compared_verdicts,
    pieces_of_size,
    reference,
    relative,
)
from featprobe.stages.predictor import Predictor


class PixelOutput(GraphOutput):
    """The pixels of an image as it is given.

    classes (n, height, width), uint8: the class of each. probabilities (n, classes, height, width). score (n,): the
    largest probability of a class other than the background. verdict (n,), bool: whether there is a finding. logits
    (n, classes, rows, columns): of the head's cells, from which all else follows.

    threshold: a finding is a pixel whose probability of a class other than the background is at least so large; None:
    one that is of such a class.
    """

    names = ("classes", "probabilities", "score", "verdict", "logits")

    def __init__(self, head: DenseHead, card: Mapping[str, Any], placement: Placement, threshold: float | None) -> None:
        super().__init__()
        self.head, self.threshold = head, threshold
        sides = zip(placement.original, placement.content, strict=True)
        rows, columns = (_weights(head.stride, original, content) for original, content in sides)
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns)

    def forward(self, features: Features) -> tuple[Tensor, ...]:
        """See the class."""
        cells = self.head(features)
        shown = cells[:, :, : self.rows.shape[1], : self.columns.shape[1]]
        logits = self.rows @ (shown @ self.columns.T)
        probabilities, classes = logits.softmax(1), logits.argmax(1)
        score = probabilities[:, 1:].amax((1, 2, 3))
        verdict = (classes > 0).flatten(1).any(1) if self.threshold is None else score >= self.threshold
        return classes.to(torch.uint8), probabilities, score, verdict, cells

    @torch.inference_mode()
    def compare(self, found: Mapping[str, NDArray[Any]], predictor: Predictor, levels: Sequence[Levels]) -> Differences:
        """Masks are compared with those of `predict`, logits with those of the head's cells."""
        pieces, size = pieces_of_size(predictor, levels)
        features = reference(predictor, levels)
        masks = np.stack(list(predictor.output.found(iter([(pieces, features)]), [size] * len(levels))))
        cells = predictor.head(features)
        logits = logits_at_original(cells, self.head.stride, pieces[0].placement)
        scores = logits.softmax(1)[:, 1:].amax((1, 2, 3)).numpy()
        if self.threshold is None:
            wanted, apart = (masks > 0).any((1, 2)), (logits[:, 1:].amax(1) - logits[:, 0]).amax((1, 2)).numpy()
        else:
            wanted, apart = scores >= self.threshold, scores - self.threshold
        return Differences(
            logits=float(np.abs(found["logits"] - cells.numpy()).max()),
            scores=relative(found["score"], scores),
            pixels=masks.size,
            equal_pixels=int((found["classes"] == masks).sum()),
            **compared_verdicts(found["verdict"], wanted, apart),
        )


def _weights(stride: int, original: int, content: int) -> Tensor:
    """What a line of cells becomes in `logits_at_original`, along one axis: (original, cells)."""
    each = torch.eye(-(-content // stride))[:, :, None]  # (cells, cells, 1)
    along = Placement((original, 1), (content, 1), (content, 1))
    return logits_at_original(each, stride, along)[:, :, 0].T.contiguous()
