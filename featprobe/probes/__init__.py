"""Heads, their losses, the training loop, and saved heads (probes/README.md).

The names are loaded when they are first asked for: who reads cards and results needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featprobe.io.fields import plain
    from featprobe.probes.bank import LinearBank
    from featprobe.probes.cards import HeadRecipe
    from featprobe.probes.detections import Detections, ObjectTarget, object_sides
    from featprobe.probes.fcos import FcosHead
    from featprobe.probes.head import DenseHead, Head, ObjectHead
    from featprobe.probes.heads import build_head, parameter_count
    from featprobe.probes.linear import LinearHead
    from featprobe.probes.losses import image_loss, inverse_sqrt_weights, level_loss, start_at_prior
    from featprobe.probes.paste import objects_at_original
    from featprobe.probes.pixel_classes import best_classes, logits_at_original, predict_classes
    from featprobe.probes.saved import append_row, fingerprint, load_head, make_folder, save_head
    from featprobe.probes.train import CurvePoint, kept_point
    from featprobe.probes.upsample import UpsampleHead

_PUBLIC = {
    "CurvePoint": "featprobe.probes.train",
    "DenseHead": "featprobe.probes.head",
    "Detections": "featprobe.probes.detections",
    "FcosHead": "featprobe.probes.fcos",
    "Head": "featprobe.probes.head",
    "HeadRecipe": "featprobe.probes.cards",
    "LinearBank": "featprobe.probes.bank",
    "LinearHead": "featprobe.probes.linear",
    "ObjectHead": "featprobe.probes.head",
    "ObjectTarget": "featprobe.probes.detections",
    "UpsampleHead": "featprobe.probes.upsample",
    "append_row": "featprobe.probes.saved",
    "best_classes": "featprobe.probes.pixel_classes",
    "build_head": "featprobe.probes.heads",
    "fingerprint": "featprobe.probes.saved",
    "image_loss": "featprobe.probes.losses",
    "inverse_sqrt_weights": "featprobe.probes.losses",
    "kept_point": "featprobe.probes.train",
    "level_loss": "featprobe.probes.losses",
    "load_head": "featprobe.probes.saved",
    "logits_at_original": "featprobe.probes.pixel_classes",
    "make_folder": "featprobe.probes.saved",
    "object_sides": "featprobe.probes.detections",
    "objects_at_original": "featprobe.probes.paste",
    "parameter_count": "featprobe.probes.heads",
    "plain": "featprobe.io.fields",
    "predict_classes": "featprobe.probes.pixel_classes",
    "save_head": "featprobe.probes.saved",
    "start_at_prior": "featprobe.probes.losses",
}

__all__ = [
    "CurvePoint",
    "DenseHead",
    "Detections",
    "FcosHead",
    "Head",
    "HeadRecipe",
    "LinearBank",
    "LinearHead",
    "ObjectHead",
    "ObjectTarget",
    "UpsampleHead",
    "append_row",
    "best_classes",
    "build_head",
    "fingerprint",
    "image_loss",
    "inverse_sqrt_weights",
    "kept_point",
    "level_loss",
    "load_head",
    "logits_at_original",
    "make_folder",
    "object_sides",
    "objects_at_original",
    "parameter_count",
    "plain",
    "predict_classes",
    "save_head",
    "start_at_prior",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'featprobe.probes' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
