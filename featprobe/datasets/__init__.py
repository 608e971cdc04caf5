"""Data sets on the disk: readers per format, splits, images, and two generated sets (datasets.generated)."""

from featprobe.datasets.formats import FORMATS, Format, read_data
from featprobe.datasets.samples import GENERATED, DataSet, Sample

__all__ = ["FORMATS", "GENERATED", "DataSet", "Format", "Sample", "read_data"]
