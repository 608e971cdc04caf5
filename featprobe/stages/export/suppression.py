"""Non-maximum suppression of a whole batch, in torch and as one operator of an ONNX graph."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import nms

from featprobe.probes.detections import Candidates


@torch.library.custom_op("featprobe::suppressed", mutates_args=())
def suppressed(boxes: Tensor, scores: Tensor, most: int, iou: float, floor: float) -> Tensor:
    """The boxes that stay: (kept, 3), int64, the image, the class and the box of each, as ONNX's NonMaxSuppression.

    boxes: (batch, boxes, 4), x1 y1 x2 y2. scores: (batch, classes, boxes); what scores no more than the floor is
    dropped, and of what overlaps by more than `iou` all but the best. most: of one class in one image.
    """
    found = []
    for image in range(boxes.shape[0]):
        for category in range(scores.shape[1]):
            own = scores[image, category]
            chosen = (own > floor).nonzero()[:, 0]
            kept = chosen[nms(boxes[image][chosen], own[chosen], iou)[:most]]
            found.append(torch.stack([torch.full_like(kept, image), torch.full_like(kept, category), kept], 1))
    return torch.cat(found)


@suppressed.register_fake
def _(boxes: Tensor, scores: Tensor, most: int, iou: float, floor: float) -> Tensor:
    return boxes.new_empty((torch.library.get_ctx().new_dynamic_size(), 3), dtype=torch.int64)


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What `torch.onnx.export` must know of operators that are ours: a `custom_translation_table`."""
    from onnxscript import opset18

    op: Any = opset18

    def translated(boxes: Any, scores: Any, most: int, iou: float, floor: float) -> Any:
        limits = op.Constant(value_float=iou), op.Constant(value_float=floor)
        return op.NonMaxSuppression(boxes, scores, op.Constant(value_int=most), *limits)

    return {torch.ops.featprobe.suppressed.default: translated}


def best_of(candidates: Candidates, classes: int, most: int, iou: float, floor: float) -> tuple[Tensor, Tensor]:
    """Scores and places of the candidates of each image that stay, best first: (batch, most) each.

    A score of 0 stands where an image has no more. classes: labels run from 1 to `classes`. Candidates of different
    classes don't suppress each other; those without an area are dropped. No shape of what comes out depends on values.
    """
    boxes, labels = candidates.boxes, candidates.labels
    scores = candidates.scores * (boxes[..., 2:] > boxes[..., :2]).all(-1)
    every = torch.arange(1, classes + 1, device=labels.device)[:, None]
    of_class = scores[:, None] * (labels[:, None] == every)  # (batch, classes, candidates)
    stay = torch.ops.featprobe.suppressed(boxes, of_class, min(most, scores.shape[1]), iou, floor)
    place = stay[:, 0] * scores.shape[1] + stay[:, 2]
    flat = scores.flatten()
    kept = torch.zeros_like(flat).scatter(0, place, flat[place]).view_as(scores)
    values, where = kept.topk(min(most, scores.shape[1]))
    return values, where
