"""Pictures of what anomaly heads say: the verdict in words, the map as colours, boxes round tiles that are called."""

from collections.abc import Sequence
from math import isnan

import numpy as np
from numpy.typing import NDArray

from featprobe.errors import counted
from featprobe.image_labels import Unit
from featprobe.metrics.pixel_counts import Mask
from featprobe.report.heat import Heat
from featprobe.report.sheets import Panel
from featprobe.stages.tasks.seen import Seen
from featprobe.stages.tasks.settle import CALLED, verdict
from featprobe.targets import IGNORE, Instance, Labels


def panel_of(
    pixels: NDArray[np.float32], seen: Seen, threshold: float, map_threshold: float, unit: Unit, *, wrong: bool = False
) -> Panel:
    """An image under its heat map, with the verdict below. threshold, map_threshold: of units, and of pixels of maps.

    wrong: whether the verdict is known to be wrong.
    """
    heat = None if seen.map is None else Heat(seen.map.cpu().numpy(), map_threshold)
    boxes = called_boxes(seen, threshold) if unit == "tile" else ()
    return Panel(pixels, instances=boxes, text=verdict_text(seen, threshold, unit), wrong=wrong, heat=heat)


def verdict_text(seen: Seen, threshold: float, unit: Unit) -> tuple[str, ...]:
    """The verdict on an image, or on its tiles, for people."""
    if isnan(threshold):
        return (f"score {seen.score:.3g}, no threshold",)
    below = f"threshold of {unit}s {threshold:.3g}"
    if unit == "tile":
        calls = sum(called_tiles(seen, threshold))
        return f"{calls} of {counted(len(seen.tiles), 'tile')} {CALLED}, highest score {seen.score:.3g}", below
    return f"{verdict(seen.score, threshold)}: score {seen.score:.3g}", below


def called_tiles(seen: Seen, threshold: float) -> list[bool]:
    """Whether each tile of an image is called."""
    return [verdict(score, threshold) == CALLED for score, _ in seen.tiles]


def called_boxes(seen: Seen, threshold: float) -> tuple[Instance, ...]:
    """A box round each tile that is called, of the class of defects."""
    called = zip(seen.tiles, called_tiles(seen, threshold), strict=True)
    return tuple(
        Instance(1, (float(p.left), float(p.top), float(p.left + p.width), float(p.top + p.height)))
        for (_, p), own in called
        if own
    )


def labels_of(regions: tuple[Mask, Mask] | None) -> Labels | None:
    """Regions as labels: 1 for a defect, 255 for what is ignored."""
    if regions is None:
        return None
    defect, ignored = regions
    return np.where(ignored, IGNORE, defect).astype(np.uint8)


def truth_panel(pixels: NDArray[np.float32], regions: tuple[Mask, Mask] | None, good: Sequence[int]) -> Panel:
    """An image with its regions of defects, and what is known of it. good: of its units, as `ImageTruth.good`."""
    known = [own for own in good if own in (0, 1)]
    text = "unknown" if not known else "defect" if 0 in known else "good"
    if len(known) > 1:
        text = f"{known.count(0)} of {counted(len(known), 'tile')} with a defect"
    return Panel(pixels, labels_of(regions), text=(text,))
