"""What each kind of head gives in a graph, in one table."""

from collections.abc import Callable, Mapping

from featprobe.scores import On
from featprobe.stages.export.anomaly_output import anomaly_output
from featprobe.stages.export.graph import GraphOutput
from featprobe.stages.export.image_output import LabelOutput
from featprobe.stages.export.object_output import ObjectOutput
from featprobe.stages.export.pixel_output import PixelOutput

EXPORTS: Mapping[On, Callable[..., GraphOutput]] = {
    "pixels": PixelOutput,
    "boxes": ObjectOutput,
    "masks": ObjectOutput,
    "images": LabelOutput,
    "anomalies": anomaly_output,
}
"""What a task is scored on -> the end of its graph, from a head, its card, the placement of an image, and the
threshold that a user gave, or the operating point that is kept beside the head, or None."""
