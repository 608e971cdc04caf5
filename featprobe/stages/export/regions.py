"""What a Faster or Mask R-CNN head finds, for a whole batch at once.

torchvision goes through a batch image by image, which a graph for batches of any size can't. These functions take its
layers and its settings; a test compares them with the head itself.
"""

import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers

from featprobe.features import Features
from featprobe.probes.detections import Candidates, clip_to
from featprobe.probes.pyramid import maps_of
from featprobe.probes.rcnn import RcnnHead
from featprobe.stages.export.suppression import best_of

LEAST_PROPOSAL, LEAST_BOX = 1e-3, 1e-2  # pixels of a side, torchvision's


def maps_by_stride(head: RcnnHead, features: Features) -> dict[str, Tensor]:
    """The head's pyramid: "stride" -> (batch, width, rows, columns)."""
    found = maps_of(head.pyramid, head.strides, features)
    return {str(stride): x for stride, (x, _) in zip(head.strides, found, strict=True)}


def region_candidates(head: RcnnHead, maps: dict[str, Tensor], features: Features) -> Candidates:
    """A candidate for each proposal and each class."""
    proposed, there = _proposals(head, maps, features)
    batch, count = proposed.shape[:2]
    image = torch.arange(batch, dtype=proposed.dtype)[:, None, None].expand(-1, count, -1)
    regions = torch.cat([image, proposed], 2).flatten(0, 1)  # (batch * proposals, 5)
    own = head.regions
    logits, deltas = own.box_predictor(own.box_head(own.box_roi_pool.pooled(maps, regions)))
    decoded = own.box_coder.decode_single(deltas, regions[:, 1:])  # (batch * proposals, classes * 4)
    boxes = decoded.view(batch, count, head.classes, 4)[:, :, 1:].flatten(1, 2)
    boxes = clip_to(boxes, features.content, features.frame)
    scores = logits.softmax(1).view(batch, count, head.classes)[:, :, 1:] * there[:, :, None]
    scores = scores.flatten(1) * _large(boxes, LEAST_BOX)
    labels = torch.arange(1, head.classes).repeat(count).expand(batch, -1)
    return Candidates(boxes, labels, scores)


def masks_of(head: RcnnHead, maps: dict[str, Tensor], boxes: Tensor, image: Tensor, labels: Tensor) -> Tensor:
    """Probabilities within each box, (boxes, side, side).

    boxes: (boxes, 4), frame pixels. image, labels: (boxes,), the number of each box's image in the batch and its class.
    """
    own = head.regions
    regions = torch.cat([image[:, None].to(boxes.dtype), boxes], 1)
    logits = own.mask_predictor(own.mask_head(own.mask_roi_pool.pooled(maps, regions)))  # (boxes, classes, side, side)
    which = labels[:, None, None, None].expand(-1, -1, *logits.shape[2:])
    return logits.sigmoid().gather(1, which)[:, 0]


def _proposals(head: RcnnHead, maps: dict[str, Tensor], features: Features) -> tuple[Tensor, Tensor]:
    """Regions that may hold an object: boxes, (batch, most, 4), and whether each is one, (batch, most)."""
    rpn, levels = head.rpn, list(maps.values())
    said, deltas = rpn.head(levels)
    counts = [int(m.shape[1] * m.shape[2] * m.shape[3]) for m in said]
    anchors = rpn.anchor_generator(ImageList(levels[0], [features.frame]), levels)[0]  # (anchors, 4)
    said, deltas = concat_box_prediction_layers(said, deltas)
    batch = levels[0].shape[0]
    said, deltas = said.view(batch, -1), deltas.view(batch, -1, 4)
    most = rpn.pre_nms_top_n()
    chosen, start = [], 0
    for count in counts:
        chosen.append(said[:, start : start + count].topk(min(most, count))[1] + start)
        start += count
    sizes = [own.shape[1] for own in chosen]
    place = torch.cat(chosen, 1)  # (batch, chosen)
    deltas = deltas.gather(1, place[:, :, None].expand(-1, -1, 4))
    boxes = rpn.box_coder.decode_single(deltas.flatten(0, 1), anchors[place.flatten()]).view(batch, -1, 4)
    boxes = clip_to(boxes, features.content, features.frame)
    level = torch.cat([torch.full((size,), i) for i, size in enumerate(sizes, start=1)]).expand(batch, -1)
    candidates = Candidates(boxes, level, said.gather(1, place).sigmoid() * _large(boxes, LEAST_PROPOSAL))
    values, where = best_of(candidates, len(sizes), rpn.post_nms_top_n(), rpn.nms_thresh, 0.0)
    return boxes.gather(1, where[:, :, None].expand(-1, -1, 4)), values > 0


def _large(boxes: Tensor, least: float) -> Tensor:
    """Whether both sides of each box have this many pixels. boxes: (…, 4)."""
    return (boxes[..., 2:] - boxes[..., :2] >= least).all(-1)
