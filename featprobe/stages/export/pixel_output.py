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
from featprobe.stages.findings import Threshold, joined_pixels, surest
from featprobe.stages.predictor import Predictor
from featprobe.stages.tasks.settle import CALLED
from featprobe.targets import Labels


class PixelOutput(GraphOutput):
    """The pixels of an image as it is given.

    classes (n, height, width), uint8: the class of each finding's pixels, 0 elsewhere. probabilities (n, classes,
    height, width). score (n,): the largest probability of a class other than the background. verdict (n,), bool:
    whether there is a finding. logits (n, classes, rows, columns): of the head's cells, from which all else follows.

    threshold: pixels are part of a finding where their largest probability of a class other than the background is at
    least so large; None: where such a class is the most probable. At an operating point `classes` are those of all
    pixels that reach its base: a graph joins no pixels, so which of them belong to a finding follows from `classes` and
    `probabilities`. With a least area there is no verdict.
    """

    def __init__(
        self, head: DenseHead, card: Mapping[str, Any], placement: Placement, threshold: Threshold | None
    ) -> None:
        super().__init__()
        self.head, self.threshold = head, threshold
        self.least = (
            None if threshold is None else float(np.float32(threshold.base if threshold.on_maps else threshold.value))
        )
        verdict = ("verdict",) if threshold is None or threshold.in_graphs else ()
        self.names = ("classes", "probabilities", "score", *verdict, "logits")
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
        found = best > background if self.least is None else surest >= self.least
        probabilities = torch.stack([own / total for own in shares], 1)
        score = surest.amax((1, 2))
        called = found.flatten(1).any(1) if self.limit is None else score >= self.limit
        verdict = (called,) if "verdict" in self.names else ()
        return torch.where(found, classes, 0), probabilities, score, *verdict, cells

    @torch.inference_mode()
    def compare(self, found: Mapping[str, NDArray[Any]], predictor: Predictor, levels: Sequence[Levels]) -> Differences:
        """Masks are compared with `predict`'s before pixels are joined, logits with those of the head's cells."""
        pieces, size = pieces_of_size(predictor, levels)
        features = reference(predictor, levels)
        masks, judged = zip(*predictor.output.found(iter([(pieces, features)]), [size] * len(levels)), strict=True)
        cells = predictor.head(features)
        scores = np.array([own.score for own in judged])
        logits = logits_at_original(cells, self.head.stride, pieces[0].placement)
        margin = (logits[:, 1:].amax(1) - logits[:, 0]).amax((1, 2)).numpy()
        apart = margin if self.limit is None else scores - self.limit
        called, wanted = np.array([own.verdict == CALLED for own in judged]), np.stack(masks)
        if self.threshold is not None and self.threshold.on_maps:
            wanted = np.stack([_reaching(own, self.threshold.base) for own in logits])
            pairs = zip(found["probabilities"][:, 1:].max(1), found["classes"], strict=True)
            verdicts = np.array([joined_pixels(*pair, self.threshold).any() for pair in pairs])
        else:
            verdicts = found["verdict"]
        return Differences(
            scores=relative(found["score"], scores),
            pixels=wanted.size,
            equal_pixels=int((found["classes"] == wanted).sum()),
            **compared_logits(found["logits"], cells.numpy()),
            **compared_verdicts(verdicts, called, apart),
        )


def _reaching(logits: Tensor, base: float) -> Labels:
    """The class of each pixel that reaches a base, 0 elsewhere."""
    shares, classes = surest(logits)
    found: Labels = torch.where(shares >= float(np.float32(base)), classes, 0).numpy()
    return found
