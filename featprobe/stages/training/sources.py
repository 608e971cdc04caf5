"""Where features come from: a cache's file, or its images and the backbone that it was made with."""

from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

from featprobe.features import Features
from featprobe.probes.train import Resident
from featprobe.specs import Rows
from featprobe.stages.training.live import Views

if TYPE_CHECKING:
    from featprobe.backbones.backbone import Backbone


class Source(Protocol):
    """What gives features of a cache's rows: `cache.reader.FeatureLoader`, or `LiveFeatures`."""

    @property
    def backbone(self) -> "Backbone | None":
        """The backbone that makes them, which may be trained; None where they are stored and stay what they are."""

    def batches(self, orders: Iterable[Rows]) -> Iterator[tuple[Rows, Features]]:
        """(rows, their features) for each array of row indices, for scoring. A batch is valid until the next."""

    def training(self, orders: Iterable[Rows], first: int = 0) -> Generator[tuple[Rows | Views, Features]]:
        """What a training takes, see `probes.train.TrainingFeed`: of several processes each gets its part of a batch.

        first: the number of the first batch, from which augmentation draws.
        """

    def keep_on_device(self, splits: Mapping[str, Rows]) -> str:
        """Move what fits of some splits to the device; returns what lies there, for a person, "" for nothing to say."""

    def resident(self, rows: Rows) -> Resident | None:
        """From places among ascending rows to features, where all of these lie on the device; else None."""
