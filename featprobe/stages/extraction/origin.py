"""The origin of a cache: its backbone, how its data set was read, how its rows were put into blocks."""

import re
import shlex
from typing import Any

from featprobe.cache import Cache
from featprobe.errors import ProbeError
from featprobe.specs import BackboneSpec
from featprobe.stages.extraction.extract_options import READ_AS, ExtractOptions


def spec_of(cache: Cache) -> BackboneSpec:
    """The description of the network that made a cache; raises ProbeError if the cache does not have it."""
    values = cache.contents.provenance.get("backbone")
    if values is None:
        raise ProbeError(f"{cache.path} does not say where its backbone comes from. Extract it again.")
    return BackboneSpec.from_json(values)


def read_as_of(cache: Cache) -> dict[str, Any]:
    """How the data set of a cache was read, by the names of ExtractOptions."""
    kept = cache.contents.provenance.get("read_as")
    found = kept if isinstance(kept, dict) else {}
    return {name: found[name] for name in READ_AS if isinstance(found.get(name), str)}


def batch_size_of(cache: Cache) -> int:
    """The batch size of the command that made a cache: the bytes of its rows follow from it."""
    try:
        words = shlex.split(cache.contents.command)
    except ValueError:  # a file may say anything
        words = []
    given = words[words.index("--batch-size") + 1] if "--batch-size" in words[:-1] else ""
    return int(given) if re.fullmatch("[1-9][0-9]{0,8}", given) else ExtractOptions.batch_size
