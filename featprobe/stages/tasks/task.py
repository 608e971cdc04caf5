"""The contracts of tasks and of feature sources, and the result of scoring a head."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from featprobe.cache import Cache
from featprobe.features import Features
from featprobe.probes import ObjectTarget
from featprobe.probes.train import Feed, Resident
from featprobe.processes import own_part
from featprobe.report.sheets import Panel
from featprobe.specs import Rows
from featprobe.stages.recording.watch import Handed, Watch
from featprobe.stages.row_images import images_of, rows_showing
from featprobe.targets import Instance, Labels

if TYPE_CHECKING:
    from featprobe.backbones.backbone import Backbone

EVALUATION_BATCH = 8
Truth = tuple[Labels | None, Sequence[Instance] | None]
"""Labels and objects of an image."""


@dataclass(frozen=True)
class Views:
    """A batch of augmented views and their labels.

    labels: (batch, frame height, frame width), uint8. objects: one an image. Each None where the task has none.
    """

    rows: Rows
    labels: Tensor | None
    objects: tuple[ObjectTarget, ...] | None


Batch = Rows | Views | Tensor
"""Rows, whose labels the task knows; augmented views with labels of their own; or, for heads whose loss is `fixed`,
places among the sorted training rows, (batch,), int64, on the device."""
Draw = Callable[[NDArray[np.float32]], list[Panel]]
"""From an image's pixels, in [0, 1], to pictures of them under the truth and under a prediction."""
H = TypeVar("H", contravariant=True)


@dataclass(frozen=True)
class Outcome:
    """Scores of one head on one split.

    scores: as the result row keeps them. brief: the means alone, as the validation curve keeps them. files: what each
    image contributed, name -> bytes, kept beside the head.
    """

    scores: Mapping[str, Any]
    brief: dict[str, float]
    files: Mapping[str, bytes]


@dataclass(frozen=True)
class Solution:
    """A head that was solved.

    state: its tensors, in the host's memory. chosen: what was decided, as a result row keeps it: of ridge the strength
    of the regularisation, what is added to the classes' logits, and how many strengths were tried.
    """

    state: dict[str, Tensor]
    chosen: dict[str, Any]


class Source(Protocol):
    """A source of the features of a cache's rows: `cache.reader.FeatureLoader`, or `LiveFeatures`."""

    @property
    def backbone(self) -> "Backbone | None":
        """The backbone that makes them, which may be trained; None where they are stored and stay what they are."""

    def batches(self, orders: Iterable[Rows]) -> Iterator[tuple[Rows, Features]]:
        """(rows, their features) for each array of row indices, for scoring. A batch is valid until the next."""

    def training(self, orders: Iterable[Rows], first: int = 0) -> Generator[tuple[Rows | Views, Features]]:
        """The feed of a training, see `probes.train.TrainingFeed`: each of several processes gets its part of a batch.

        first: the number of the first batch, from which augmentation draws.
        """

    def keep_on_device(self, splits: Mapping[str, Rows]) -> str:
        """Move what fits of some splits to the device; returns what lies there, for a person, "" for nothing to say."""

    def resident(self, rows: Rows) -> Resident | None:
        """From places among ascending rows to features, where all of these lie on the device; else None."""


class Task(Protocol[H]):
    """The labels of a cache's rows as heads of one kind, H, are trained and scored on them.

    Segmentation is the task of `probes.head.DenseHead`, Detection that of `probes.head.ObjectHead`.
    """

    @property
    def masks(self) -> bool:
        """Whether objects are wanted with their masks."""

    @property
    def sides(self) -> tuple[float, ...]:
        """Percentiles of the training objects' sides, frame pixels, which decide the strides of heads that find
        objects; empty where no objects are looked for. See `probes.object_sides`."""

    @property
    def colours(self) -> Sequence[str]:
        """What pictures have a colour for, the background first; empty where they have words alone."""

    @property
    def handed(self) -> Handed:
        """What `evaluate` hands a watch of each head."""

    def truth_of(self, row: int) -> Truth:
        """Labels and objects of a row, at its own size, as augmented views of it are made from them."""

    def train_counts(self, head: H) -> dict[str, int]:
        """Training examples of each class, as this head sees them: pixels at frame size, or objects."""

    def start(self, heads: Sequence[H], *, fresh: bool = True) -> Callable[[Features, Batch], Tensor]:
        """Make heads ready for training; returns their losses on a batch, (heads,). fresh: they begin at random."""

    def fixed(self, head: H) -> bool:
        """Whether the loss of such a head also takes places of rows, and always does the same; see probes.train."""

    def evaluate(self, heads: Sequence[H], feed: Feed, rows: Rows, watch: Watch | None = None) -> list[Outcome]:
        """Scores of each head on the images that the rows show, which several processes share out among them.

        watch: gets what each head finds in the images that this process scores, from the same forward pass.
        """

    def settle(self, heads: Sequence[H], feed: Feed, val: Rows) -> list[str]:
        """Set what is chosen on validation for heads that are kept, before test is looked at; returns notes."""

    def panels(self, head: H, feed: Feed, rows: Rows) -> Iterable[tuple[int, Draw]]:
        """(image, what draws truth and prediction over it) for each image that the rows show."""

    def shown(self, head: H, feed: Feed, rows: Rows, count: int) -> Rows:
        """Which of the images that the rows show, at most so many, a picture sheet shows, the most telling first."""


def evaluation_batches(rows: Rows) -> list[Rows]:
    """Rows in order, a few at a time."""
    return [rows[i : i + EVALUATION_BATCH] for i in range(0, len(rows), EVALUATION_BATCH)] if len(rows) else []


def scored_here(cache: Cache, rows: Rows) -> Rows:
    """The rows that this process scores of those that several score together: whole batches, as one process has.

    Where rows show parts of images, whole images.
    """
    if cache.recipe.in_parts:
        images = images_of(cache, rows)
        return rows_showing(cache, rows, images[own_part(len(images))])
    own = evaluation_batches(rows)[own_part(-(-len(rows) // EVALUATION_BATCH))]
    return np.concatenate([rows[:0], *own])


def spread_over(rows: Rows, fullness: Callable[[int], int], count: int) -> Rows:
    """Some of the rows, from the fullest to the emptiest. fullness: how much there is to see in a row."""
    order = sorted(rows.tolist(), key=lambda row: (-fullness(row), row))
    return np.array(order[:: max(1, len(order) // count)][:count], dtype=np.intp)
