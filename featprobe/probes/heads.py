"""Heads by name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from featprobe.errors import ProbeError
from featprobe.kinds import PAGE, builder_of, kind_of
from featprobe.levels import FeatureLevel, pick_levels
from featprobe.probes.cards import HeadRecipe, least_classes
from featprobe.probes.fcos import FcosHead
from featprobe.probes.head import (
    AnomalyHead,
    DenseHead,
    Head,
    ImageHead,
    ObjectHead,
    PooledAnomalyHead,
    faults_of,
)
from featprobe.probes.linear import LinearHead
from featprobe.probes.upsample import UpsampleHead
from featprobe.probes.verdicts.anomaly_knn import AnomalyKnnHead
from featprobe.probes.verdicts.classifiers import KnnClassifier, LinearClassifier
from featprobe.probes.verdicts.gaussian import GaussianHead
from featprobe.probes.verdicts.map_heads import default_levels
from featprobe.probes.verdicts.patchcore import PatchCoreHead
from featprobe.scores import SCORES, On

Build = Callable[[Sequence[FeatureLevel], HeadRecipe], Head]


def _width(recipe: HeadRecipe) -> int:
    return recipe.width or kind_of(recipe.task, recipe.kind).width


def _linear(levels: Sequence[FeatureLevel], recipe: HeadRecipe) -> Head:
    return LinearHead(levels, len(recipe.classes))


def _upsample(levels: Sequence[FeatureLevel], recipe: HeadRecipe) -> Head:
    return UpsampleHead(levels, len(recipe.classes), _width(recipe), recipe.pyramid)


def _fcos(levels: Sequence[FeatureLevel], recipe: HeadRecipe) -> Head:
    return FcosHead(
        levels,
        len(recipe.classes),
        _width(recipe),
        sides=recipe.sides,
        pyramid=recipe.pyramid,
    )


def _rcnn(levels: Sequence[FeatureLevel], recipe: HeadRecipe) -> Head:
    from featprobe.probes.rcnn.rcnn_head import RcnnHead  # torchvision takes seconds, and few commands need it

    masks = SCORES[recipe.task].on == "masks"
    return RcnnHead(levels, len(recipe.classes), _width(recipe), recipe.sides, recipe.pyramid, masks)


def _patchcore(levels: Sequence[FeatureLevel], recipe: HeadRecipe) -> Head:
    return PatchCoreHead(levels if recipe.levels else default_levels(levels))


def _gaussian(levels: Sequence[FeatureLevel], recipe: HeadRecipe) -> Head:
    return GaussianHead(levels if recipe.levels else default_levels(levels))


def _anomaly_knn(levels: Sequence[FeatureLevel], recipe: HeadRecipe) -> Head:
    return AnomalyKnnHead(levels)


def _classifier(levels: Sequence[FeatureLevel], recipe: HeadRecipe) -> Head:
    return LinearClassifier(levels, len(recipe.classes))


def _nearest_labels(levels: Sequence[FeatureLevel], recipe: HeadRecipe) -> Head:
    return KnnClassifier(levels, len(recipe.classes))


OF_IMAGES: Mapping[str, Build] = {"linear": _classifier, "knn": _nearest_labels}
OF_ANOMALIES: Mapping[str, Build] = {"patchcore": _patchcore, "gaussian": _gaussian, "knn": _anomaly_knn}
BUILDERS: Mapping[On, Mapping[str, Build]] = {
    "pixels": {"linear": _linear, "upsample": _upsample, "ridge": _linear},
    "boxes": {"fcos": _fcos, "fasterrcnn": _rcnn},
    "masks": {"maskrcnn": _rcnn},
    "images": OF_IMAGES,
    "anomalies": OF_ANOMALIES,
}
"""What a task is scored on -> kind -> what builds it; a test compares the names with `kinds.KINDS`."""


def build_head(recipe: HeadRecipe, levels: Sequence[FeatureLevel]) -> Head:
    """A new head for features of these levels, whether they come from a cache or from a live backbone.

    Raises ProbeError for an unknown task or kind, fewer than two classes, or a level that does not exist; and for a
    head of your own that is not what `probes.head` defines.
    """
    kind = kind_of(recipe.task, recipe.kind)
    if len(recipe.classes) < least_classes(recipe.task):
        raise ProbeError(f"A head needs the background and at least one class. found: {list(recipe.classes)}")
    if recipe.width is not None and recipe.width < 1:
        raise ProbeError(f"A head {recipe.width} channels wide can't be built. wanted: --width 1 or more.")
    chosen = pick_levels(levels, recipe.levels)
    own = builder_of(recipe.task, recipe.kind)
    if own is None:
        return BUILDERS[SCORES[recipe.task].on][recipe.kind](chosen, recipe)
    head: Head = _built(own, chosen, replace(recipe, width=recipe.width or kind.width or None))
    wanted = CLASS_OF[SCORES[recipe.task].on, kind.pooled]
    faults = faults_of(head, wanted, chosen, len(recipe.classes))
    if faults:
        raise ProbeError(
            "\n  ".join(
                [f"The {recipe.task} head {recipe.kind} is not what a head must be. Nothing was computed.", *faults]
            )
            + f"\n{PAGE}"
        )
    return head


CLASS_OF: Mapping[tuple[On, bool], type[Head]] = {
    ("pixels", False): DenseHead,
    ("boxes", False): ObjectHead,
    ("masks", False): ObjectHead,
    ("images", True): ImageHead,
    ("anomalies", False): AnomalyHead,
    ("anomalies", True): PooledAnomalyHead,
}
"""What a task is scored on, and whether its head reads pooled features -> the class that defines such heads."""


def _built(build: Callable[..., Any], levels: Sequence[FeatureLevel], recipe: HeadRecipe) -> Any:
    """What a builder of your own gives; raises ProbeError where it fails."""
    try:
        return build(levels, recipe)
    except ProbeError:
        raise
    except Exception as error:  # it may raise anything
        raise ProbeError(
            f"The {recipe.task} head {recipe.kind} can't be built. Nothing was computed.\n"
            f"  wanted  a head from the levels {', '.join(level.name for level in levels)} and a HeadRecipe\n"
            f"  found   {type(error).__name__}: {error}\n{PAGE}"
        ) from error


def parameter_count(head: nn.Module) -> int:
    """The number of trainable parameters."""
    return sum(p.numel() for p in head.parameters() if p.requires_grad)
