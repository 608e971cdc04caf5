"""Whether a graph says in onnxruntime what featprobe says itself, and how long each takes."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from featprobe.backbones.models import first_line
from featprobe.datasets.images.pixels import Levels
from featprobe.errors import BackboneError, counted
from featprobe.stages.export.graph import NEAR, Differences, GraphOutput, pieces_of_size, reference
from featprobe.stages.export.known_images import KnownImages
from featprobe.stages.predictor import Predictor

TOLERANCE = 1e-3
"""The largest difference of logits, or of scores, relative, in tasks without logits, unless another is asked for."""
LEAST_EQUAL = 0.9999
"""The least share of pixels of equal class."""
TOGETHER = 4  # images of a batch, behind a first one alone: batches of both sizes must work


@dataclass(frozen=True)
class Parity:
    """How far a graph is from featprobe on some images.

    images: how many, and what they are in words. others: images beside them, which the graph does not take.
    graph_ms, featprobe_ms: milliseconds per image, without reading files, with so many threads. tolerance: see
    TOLERANCE.
    """

    images: int
    words: str
    others: int
    differences: Differences
    runtime: str
    threads: int
    graph_ms: float
    featprobe_ms: float
    tolerance: float = TOLERANCE

    @property
    def faults(self) -> list[str]:
        """The limits that are missed, for people."""
        found, own = [], self.differences
        if own.logits is not None:
            if not own.logits <= self.tolerance:
                found.append(
                    f"logits, of up to {own.largest_logit:.3g}, differ by {own.logits:.3g}; "
                    f"at most {self.tolerance:g} is wanted"
                )
        elif own.scores is not None and not own.scores <= self.tolerance:
            found.append(f"scores differ by {own.scores:.2g} of their value; at most {self.tolerance:g} is wanted")
        if own.equal_pixels < LEAST_EQUAL * own.pixels:
            share = own.equal_pixels / own.pixels
            found.append(f"{share:.4%} of the pixels have the same class; at least {LEAST_EQUAL:.2%} are wanted")
        if own.equal_objects < own.objects:
            found.append(f"{own.objects - own.equal_objects} of {counted(own.objects, self._thing)} differ")
        if own.equal_verdicts < own.verdicts:
            found.append(f"{own.verdicts - own.equal_verdicts} of {counted(own.verdicts, 'verdict')} differ")
        return found

    @property
    def lines(self) -> list[str]:
        """The report, for people."""
        own = self.differences
        beside = f"; {counted(self.others, 'other')} of another size or kind" if self.others else ""
        found = [f"compared on {self.images} {self.words}{beside}"]
        if own.logits is not None:
            found.append(f"largest difference of a logit: {own.logits:.2g} (logits to {own.largest_logit:.3g})")
        if own.scores is not None:
            found.append(f"largest relative difference of a score: {own.scores:.2g}")
        if own.pixels:
            found.append(f"pixels of the same class: {own.equal_pixels / own.pixels:.4%}")
        if own.objects:
            found.append(f"equal {self._thing}s: {own.equal_objects} of {own.objects}")
        elif own.logits is None and own.scores is None and not own.near:
            found.append("neither finds an object in any of them, so none was compared")
        if own.verdicts or own.near:
            near = f"; {own.near} differ within {NEAR:g} of the threshold" if own.near else ""
            found.append(f"equal verdicts: {own.equal_verdicts} of {own.verdicts}{near}")
        found.append(
            f"ms per image with {counted(self.threads, 'thread')}: {self.graph_ms:.1f} {self.runtime}, "
            f"{self.featprobe_ms:.1f} featprobe"
        )
        return found

    @property
    def _thing(self) -> str:
        """What is counted: labels come from logits, and objects are compared without."""
        return "object" if self.differences.logits is None else "label"

    def to_json(self) -> dict[str, Any]:
        """Plain values, as the file beside the graph keeps them."""
        limits = {"logits": self.tolerance, "scores": self.tolerance, "equal_pixels": LEAST_EQUAL, "near": NEAR}
        return {**asdict(self), "limits": limits, "faults": self.faults}


def compare_graph(
    model: bytes, predictor: Predictor, output: GraphOutput, known: KnownImages, tolerance: float
) -> Parity:
    """Run a graph and featprobe on the same images. Both take as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads = torch.get_num_threads()
    runtime = f"onnxruntime {onnxruntime.__version__}"
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own classes, one for each cause
        raise BackboneError(
            f"{runtime} can't run {predictor.backbone.spec.model} with this head. No model was written.\n"
            f"  found   {first_line(error)}\n"
            "Another --opset, or another backbone, may do."
        ) from error
    differences, seconds = Differences(), np.zeros(2)
    images = len(known.shown)
    starts = [0, *range(1, images, TOGETHER)]
    for first, end in zip(starts, [*starts[1:], images], strict=True):
        levels = [known.levels(place) for place in range(first, end)]
        batch = np.stack(levels)
        if first == 0:  # both make what they keep for later
            session.run(None, {"images": batch})
            _as_predicted(predictor, levels)
        begun = time.perf_counter()
        found = session.run(list(output.names), {"images": batch})
        between = time.perf_counter()
        _as_predicted(predictor, levels)
        seconds += between - begun, time.perf_counter() - between
        differences += output.compare(dict(zip(output.names, found, strict=True)), predictor, levels)
    graph_ms, featprobe_ms = (1000 * seconds / images).tolist()
    return Parity(images, known.words, known.others, differences, runtime, threads, graph_ms, featprobe_ms, tolerance)


@torch.inference_mode()
def _as_predicted(predictor: Predictor, levels: Sequence[Levels]) -> list[Any]:
    """What `predict` finds in images or tiles, each taken for an image."""
    pieces, size = pieces_of_size(predictor, levels)
    return list(predictor.output.found(iter([(pieces, reference(predictor, levels))]), [size] * len(levels)))
