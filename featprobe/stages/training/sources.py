"""Where features come from: a cache's file, or its images and the backbone that it was made with."""

from typing import Any

from featprobe.cache import Cache
from featprobe.cache.reader import FeatureLoader
from featprobe.errors import ProbeError
from featprobe.processes import own_part
from featprobe.specs import BackboneSpec
from featprobe.stages.training.live import LiveFeatures

Source = FeatureLoader | LiveFeatures


def feed_of(source: Source) -> Any:
    """What a source gives to training, see probes.train.TrainingFeed."""
    if isinstance(source, LiveFeatures):
        return source.training
    return lambda orders, first: source.batches(rows[own_part(len(rows))] for rows in orders)


def spec_of(cache: Cache) -> BackboneSpec:
    """What loads the network that a cache was made with; raises ProbeError where it does not say."""
    values = cache.contents.provenance.get("backbone")
    if values is None:
        raise ProbeError(f"{cache.path} does not say where its backbone comes from. Extract it again.")
    return BackboneSpec.from_json(values)
