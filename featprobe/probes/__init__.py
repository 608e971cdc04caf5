"""Heads, their losses, the training loop, and saved heads (probes/README.md)."""

from featprobe.probes.heads import HEADS, HeadRecipe, build_head, parameter_count
from featprobe.probes.linear import LinearHead
from featprobe.probes.losses import image_loss, inverse_sqrt_weights, level_loss, start_at_prior
from featprobe.probes.predict import logits_at_original, predict_classes
from featprobe.probes.saved import append_row, fingerprint, load_head, make_folder, save_head
from featprobe.probes.train import CurvePoint, TrainRecipe, train

__all__ = [
    "HEADS",
    "CurvePoint",
    "HeadRecipe",
    "LinearHead",
    "TrainRecipe",
    "append_row",
    "build_head",
    "fingerprint",
    "image_loss",
    "inverse_sqrt_weights",
    "level_loss",
    "load_head",
    "logits_at_original",
    "make_folder",
    "parameter_count",
    "predict_classes",
    "save_head",
    "start_at_prior",
    "train",
]
