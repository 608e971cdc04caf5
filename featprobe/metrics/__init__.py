"""Scores as the field computes them."""

from featprobe.metrics.semantic import IouScores, confusion_matrix, iou_scores

__all__ = ["IouScores", "confusion_matrix", "iou_scores"]
