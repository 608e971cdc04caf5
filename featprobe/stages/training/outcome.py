"""What scoring a head gives, whatever its task."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from featprobe.cache import Cache
from featprobe.processes import own_part
from featprobe.specs import Rows
from featprobe.stages.row_images import images_of, rows_of
from featprobe.stages.training.live import Views

EVALUATION_BATCH = 8
Batch = Rows | Views
"""Rows, whose labels the task knows, or augmented views with labels of their own."""


@dataclass(frozen=True)
class Outcome:
    """Scores of one head on one split.

    scores: as the result row keeps them. brief: the means alone, as the validation curve keeps them. files: what each
    image contributed, name -> bytes, kept beside the head.
    """

    scores: Mapping[str, Any]
    brief: dict[str, float]
    files: Mapping[str, bytes]


def evaluation_batches(rows: Rows) -> list[Rows]:
    """Rows in order, a few at a time."""
    return [rows[i : i + EVALUATION_BATCH] for i in range(0, len(rows), EVALUATION_BATCH)] if len(rows) else []


def scored_here(cache: Cache, rows: Rows) -> Rows:
    """The rows that this process scores of those that several score together: whole batches, as one process has.

    Where rows show parts of images, whole images.
    """
    if cache.recipe.in_parts:
        images = images_of(cache, rows)
        return rows_of(cache, rows, images[own_part(len(images))])
    own = evaluation_batches(rows)[own_part(-(-len(rows) // EVALUATION_BATCH))]
    return np.concatenate([rows[:0], *own])


def spread_over(rows: Rows, fullness: Callable[[int], int], count: int) -> Rows:
    """Some of the rows, from the fullest to the emptiest."""
    order = sorted(rows.tolist(), key=lambda row: (-fullness(row), row))
    return np.array(order[:: max(1, len(order) // count)][:count], dtype=np.intp)
