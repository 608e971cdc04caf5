"""What scoring a head gives, whatever its task."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from featprobe.levels import Features
from featprobe.probes.train import Feed, Rows
from featprobe.report.sheets import Panel

EVALUATION_BATCH = 8


@dataclass(frozen=True)
class Outcome:
    """Scores of one head on one split.

    scores: as the result row keeps them. brief: the means alone, as the validation curve keeps them. files: what each
    image contributed, name -> bytes, kept beside the head.
    """

    scores: Mapping[str, Any]
    brief: dict[str, float]
    files: Mapping[str, bytes]


class Task(Protocol):
    """What the trials need of a task: a loss from a batch, scores of heads, pictures.

    chooses_by: the name in `Outcome.brief` that the best trial is chosen by.
    """

    chooses_by: str

    def start(self, heads: Sequence[nn.Module]) -> Callable[[Features, Rows], Tensor]:
        """Make new heads ready for training; returns their losses on a batch, (heads,)."""
        ...

    def evaluate(self, heads: Sequence[nn.Module], feed: Feed, rows: Rows) -> list[Outcome]:
        """Scores of each head on rows."""
        ...

    def panels(self, head: nn.Module, feed: Feed, rows: Rows) -> Iterable[tuple[int, Callable[..., list[Panel]]]]:
        """(row, what draws truth and prediction over its image) for each row."""
        ...

    def fullness(self, row: int) -> int:
        """How much there is to see in a row."""
        ...


def evaluation_batches(rows: Rows) -> list[Rows]:
    """Rows in order, a few at a time."""
    return [rows[i : i + EVALUATION_BATCH] for i in range(0, len(rows), EVALUATION_BATCH)] if len(rows) else []


def spread_over(rows: Rows, fullness: Callable[[int], int], count: int) -> Rows:
    """Some of the rows, from the fullest to the emptiest."""
    order = sorted(rows.tolist(), key=lambda row: (-fullness(row), row))
    return np.array(order[:: max(1, len(order) // count)][:count], dtype=np.intp)
