"""Data sets on the disk: readers per format, splits, images, and two generated sets (datasets.generated)."""

from featprobe.datasets.formats import FORMATS, Format, read_data
from featprobe.datasets.given.from_arrays import from_arrays
from featprobe.datasets.given.from_torch import from_torch
from featprobe.datasets.samples import GENERATED, DataSet, Sample

DataSet.from_arrays, DataSet.from_torch = from_arrays, from_torch

__all__ = ["FORMATS", "GENERATED", "DataSet", "Format", "Sample", "read_data"]
