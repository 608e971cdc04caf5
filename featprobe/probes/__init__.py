"""Heads, their losses, the training loop, and saved heads (probes/README.md)."""

from featprobe.io.fields import plain
from featprobe.probes.bank import LinearBank
from featprobe.probes.detections import Detections, ObjectTarget, object_sides
from featprobe.probes.fcos import FcosHead
from featprobe.probes.head import DenseHead, Head, ObjectHead
from featprobe.probes.heads import HeadRecipe, build_head, parameter_count
from featprobe.probes.linear import LinearHead
from featprobe.probes.losses import image_loss, inverse_sqrt_weights, level_loss, start_at_prior
from featprobe.probes.paste import objects_at_original
from featprobe.probes.pixel_classes import best_classes, logits_at_original, predict_classes
from featprobe.probes.saved import append_row, fingerprint, load_head, make_folder, save_head
from featprobe.probes.train import CurvePoint, kept_point, train
from featprobe.probes.upsample import UpsampleHead

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
    "train",
]
