"""Scores, as the field defines them, and their intervals."""

from featprobe.metrics.boxes import ApScores, TruthImage, average_precision, truth_of
from featprobe.metrics.dense import PIXEL_SCORES, PixelScore, groups_with_truth, pixel_scores, pixel_statistic
from featprobe.metrics.intervals import (
    Difference,
    Interval,
    Resamples,
    Statistic,
    bca_interval,
    difference_of,
    grouped,
    holm,
    jackknifed,
    mean_of,
    modality_gap,
    paired_difference,
    percentile_interval,
    resample,
    score_interval,
    studentised_interval,
)
from featprobe.metrics.procedures import (
    SeedSpread,
    SeedVariance,
    procedure_difference,
    procedure_gap,
    seed_spread,
)
from featprobe.metrics.resampled import ResampledAp, ResampledScores
from featprobe.metrics.semantic import IouScores, confusion_matrix, iou_scores

__all__ = [
    "PIXEL_SCORES",
    "ApScores",
    "Difference",
    "Interval",
    "IouScores",
    "PixelScore",
    "ResampledAp",
    "ResampledScores",
    "Resamples",
    "SeedSpread",
    "SeedVariance",
    "Statistic",
    "TruthImage",
    "average_precision",
    "bca_interval",
    "confusion_matrix",
    "difference_of",
    "grouped",
    "groups_with_truth",
    "holm",
    "iou_scores",
    "jackknifed",
    "mean_of",
    "modality_gap",
    "paired_difference",
    "percentile_interval",
    "pixel_scores",
    "pixel_statistic",
    "procedure_difference",
    "procedure_gap",
    "resample",
    "score_interval",
    "seed_spread",
    "studentised_interval",
    "truth_of",
]
