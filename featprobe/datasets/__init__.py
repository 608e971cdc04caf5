"""Data sets on the disk: readers per format, splits, images, and two generated sets (datasets.generated)."""

from typing import TYPE_CHECKING, Any

from featprobe.datasets.samples import GENERATED, DataSet, Sample

if TYPE_CHECKING:
    from featprobe.datasets.formats import FORMATS, Format, read_data


__all__ = ["FORMATS", "GENERATED", "DataSet", "Format", "Sample", "read_data"]


def __getattr__(name: str) -> Any:
    """What the formats define: their modules take time, and most words of a command line need none of them."""
    if name not in __all__:
        raise AttributeError(f"module 'featprobe.datasets' has no attribute {name!r}")
    from featprobe.datasets import formats

    return getattr(formats, name)
