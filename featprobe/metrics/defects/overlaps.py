"""When a call has found a defect: one rule for detections, for masks and for components of pixel maps.

Boxes and masks enter as sparse overlaps of the calls and the defects of one image, so that the rule itself knows
nothing of shapes.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from featprobe.errors import ProbeError
from featprobe.metrics.defects.records import IGNORED, NOTHING, TOUCHES, FoundRule, Indices

AREA_SHARE = 0.1
"""Share of the area of a defect from which on a call that covers it has found it, by the usual rule."""
USUAL_IOU = 0.1
"""IoU from which on a call has found a defect, by the usual rule."""
Areas = NDArray[np.float64]


@dataclass(frozen=True)
class Overlaps:
    """The calls and the defects of one image, and where they meet.

    call, defect: (pairs,), indices of those that share area, or of which the call covers the center of the defect; each
    pair once, in any order. shared, call_area, defect_area: (pairs,), pixels that both cover, and that each covers.
    covers_center: (pairs,). call_class, defect_class: (calls,), (defects,), class indices; of a call 0 where its class
    is not known. touches_ignored: (calls,), whether it shares area with an ignored region.

    Where both have masks these are compared, else the boxes of both. The center of a box is its middle; that of a mask
    is the pixel of it that is nearest to its centroid.
    """

    call: Indices
    defect: Indices
    shared: Areas
    call_area: Areas
    defect_area: Areas
    covers_center: NDArray[np.bool_]
    call_class: NDArray[np.uint8]
    defect_class: NDArray[np.uint8]
    touches_ignored: NDArray[np.bool_]

    def some(self, kept: NDArray[np.bool_]) -> "Overlaps":
        """The same with some of the pairs. kept: (pairs,)."""
        pairs = ("call", "defect", "shared", "call_area", "defect_area", "covers_center")
        return replace(self, **{name: getattr(self, name)[kept] for name in pairs})


def finds(overlaps: Overlaps, rule: FoundRule) -> Indices:
    """The pairs of a call and a defect that it finds, (found, 2), by call and then by defect."""
    with np.errstate(divide="ignore", invalid="ignore"):  # a box without area
        iou = overlaps.shared / (overlaps.call_area + overlaps.defect_area - overlaps.shared)
        covered = overlaps.shared / overlaps.defect_area
    if rule.iou is None:
        found = overlaps.covers_center | (covered >= AREA_SHARE) | (iou >= USUAL_IOU)
    else:
        found = iou >= rule.iou
    if rule.same_class:
        found &= overlaps.call_class[overlaps.call] == overlaps.defect_class[overlaps.defect]
    pairs = np.stack([overlaps.call[found], overlaps.defect[found]], axis=1)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def touched(overlaps: Overlaps) -> NDArray[np.uint8]:
    """What each call touches, (calls,): TOUCHES for a defect of any class, else IGNORED, else NOTHING."""
    found = np.where(overlaps.touches_ignored, IGNORED, NOTHING).astype(np.uint8)
    found[overlaps.call] = TOUCHES
    return found


def rule_of(text: str | None, *, same_class: bool = False) -> FoundRule:
    """The rule that a user names: None or "usual" for the usual one, "iou:0.5" for IoU alone. Raises ProbeError.

    >>> rule_of("iou:0.5")
    FoundRule(iou=0.5, same_class=False)
    """
    if text in (None, "usual"):
        return FoundRule(None, same_class)
    name, _, value = str(text).partition(":")
    try:
        iou = float(value) if name == "iou" else math.nan
    except ValueError:
        iou = math.nan
    if not 0 < iou <= 1:
        raise ProbeError(
            f"There is no rule {str(text)[:80]!r} of when a defect is found. Nothing was computed.\n"
            "  wanted  usual, or iou:X with 0 < X <= 1, as iou:0.5\n"
            "The usual rule: a call covers the center of a defect or a tenth of its area, or their IoU is at least 0.1."
        )
    return FoundRule(iou, same_class)


def rule_text(rule: FoundRule) -> str:
    """A rule for people.

    >>> rule_text(FoundRule(0.5, same_class=True))
    'IoU at least 0.5, classes agree'
    """
    said = (
        f"center covered, or at least {AREA_SHARE:g} of the area, or IoU at least {USUAL_IOU:g}"
        if rule.iou is None
        else f"IoU at least {rule.iou:g}"
    )
    return f"{said}, classes agree" if rule.same_class else said
