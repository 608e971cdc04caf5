"""Scores as the field computes them."""

from featprobe.metrics.boxes import ApScores, TruthImage, average_precision, truth_of
from featprobe.metrics.resampled import ResampledAp, ResampledScores
from featprobe.metrics.semantic import IouScores, confusion_matrix, iou_scores

__all__ = [
    "ApScores",
    "IouScores",
    "ResampledAp",
    "ResampledScores",
    "TruthImage",
    "average_precision",
    "confusion_matrix",
    "iou_scores",
    "truth_of",
]
