"""Data sets as they lie on the disk: readers, splits, images, and two generated sets."""

from featprobe.datasets.formats import FORMATS, Format, read_data
from featprobe.datasets.generated import GENERATED, generate
from featprobe.datasets.samples import DataSet, Sample

__all__ = ["FORMATS", "GENERATED", "DataSet", "Format", "Sample", "generate", "read_data"]
