"""Pooled features of a cache: the mean and the maximum of each level over an image's own cells."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from featprobe.cache import Cache
from featprobe.cache.reader import FeatureLoader
from featprobe.features import Pooled, filled_cells, pool
from featprobe.levels import FeatureLevel
from featprobe.specs import Rows

Unit = Literal["image", "tile"]
BYTES_AT_ONCE = 1 << 24  # about, of features that are read together

Table = NDArray[np.float32]
"""Mean and maximum of one level, (rows, 2, channels)."""


def pooled_vectors(cache: Cache, levels: Sequence[FeatureLevel], unit: Unit, rows: Rows) -> NDArray[np.float32]:
    """The pooled features of the units that some rows show: (units, 2 * channels of all levels), float32.

    rows: usable rows of the cache. unit: "image" joins the rows of an image; "tile" takes each row for itself. Units
    are in ascending order. A unit has the mean, then the maximum, level by level; see `features.pool`. Raises
    CacheError for a damaged row.
    """
    rows = np.unique(rows)
    units, index = np.unique(cache.image_of[rows] if unit == "image" else rows, return_inverse=True)
    tables = _computed(cache, levels, rows)
    content = torch.tensor(cache.rows.content[rows])
    pooled = Pooled(
        {level.name: torch.from_numpy(tables[level.name][:, 0]) for level in levels},
        {level.name: torch.from_numpy(tables[level.name][:, 1]) for level in levels},
        {level.name: filled_cells(content, level.stride) for level in levels},
    )
    if len(units) < len(rows):
        pooled = pooled.joined(torch.from_numpy(index.astype(np.int64)), len(units))
    return pooled.vectors(levels).numpy()


def _computed(cache: Cache, levels: Sequence[FeatureLevel], rows: Rows) -> dict[str, Table]:
    """The tables of some rows, in one pass over their features."""
    tables = {level.name: np.empty((len(rows), 2, level.channels), dtype=np.float32) for level in levels}
    with FeatureLoader(cache, levels) as loader, torch.inference_mode():
        step = max(1, BYTES_AT_ONCE // sum(loader.reader.row_bytes(level) for level in levels))
        start = 0
        for batch, features in loader.batches(rows[i : i + step] for i in range(0, len(rows), step)):
            pooled = pool(features, levels)
            for name, table in tables.items():
                table[start : start + len(batch), 0] = pooled.mean[name].numpy()
                table[start : start + len(batch), 1] = pooled.maximum[name].numpy()
            start += len(batch)
    return tables
