"""Where features come from: a cache's file, or its images and the backbone that it was made with."""

from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

from featprobe.cache import Cache
from featprobe.errors import ProbeError
from featprobe.features import Features
from featprobe.probes.train import Resident
from featprobe.specs import BackboneSpec, Rows
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


def spec_of(cache: Cache) -> BackboneSpec:
    """What loads the network that a cache was made with; raises ProbeError where it does not say."""
    values = cache.contents.provenance.get("backbone")
    if values is None:
        raise ProbeError(f"{cache.path} does not say where its backbone comes from. Extract it again.")
    return BackboneSpec.from_json(values)
