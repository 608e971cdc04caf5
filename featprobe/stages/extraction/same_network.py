"""Whether a network of your own still computes what a cache of it holds: its code is in no hash of its weights."""

import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featprobe.backbones.backbone import Backbone
from featprobe.backbones.precision import computing
from featprobe.cache import WHOLE, Cache
from featprobe.datasets.images.reading import hash_image, read_levels
from featprobe.errors import CacheError, DataError
from featprobe.stages.extraction.frames import Framing
from featprobe.stages.extraction.pipeline import stored_features

TINY = 1e-30
SAME = 0.02  # of a level's largest value: more than number formats, precisions and devices change


@torch.inference_mode()
def check_same(cache: Cache, backbone: Backbone, device: torch.device) -> None:
    """Compute a row of a cache again; raise CacheError where a network of your own gives something else.

    It is the first whole row whose image is still the same. Nothing is computed for timm's networks, whose name says
    what they compute, and where there is no such row: then none is kept.
    """
    row = _first_known(cache) if backbone.spec.is_own else None
    if row is None:
        return
    own, recipe = cache.rows[row], cache.recipe
    shown = own.show(read_levels(Path(cache.data.root) / own.image))
    kept = {level.name: _values(cache.read_row(row, level), recipe.dtype) for level in backbone.levels}
    with computing(recipe.precision, device):
        features = backbone(Framing(recipe, device).together([shown], [own.placement]))
    features = replace(features, content=torch.tensor([own.placement.content], device=device))
    found, _ = stored_features(features, replace(recipe, dtype="fp32", levels=backbone.levels))
    for name, values in kept.items():
        off = float((values - found[name][0].cpu()).abs().max() / values.abs().max().clamp(min=TINY))
        if not off <= SAME:
            raise CacheError(
                f"{cache.path} holds other features than {backbone.identity} computes now, with the same weights. "
                "Nothing was changed.\n"
                f"  wanted  {name} of {own.id}, within {SAME:.0%} of its largest value\n"
                f"  found   {off:.0%} off\n"
                "The code of the network has changed since. Give its class another name, or remove the cache:\n"
                f"  featprobe cache rm {shlex.quote(str(cache.path))} --yes"
            )


def _first_known(cache: Cache) -> int | None:
    """The first whole row whose image is as it was, and whose features are sound; None where there is none."""
    for row in map(int, np.flatnonzero(cache.done == WHOLE)):
        own = cache.rows[row]
        try:
            if hash_image(Path(cache.data.root) / own.image) == own.image_hash:
                for level in cache.levels:
                    cache.read_row(row, level)
                return row
        except (DataError, CacheError):
            continue  # both are reported where that row is needed
    return None


def _values(stored: NDArray, dtype: str) -> Tensor:
    """A stored row of a level in float32."""
    if dtype == "bf16" and stored.dtype == np.uint16:
        return torch.from_numpy(stored.view(np.int16).copy()).view(torch.bfloat16).float()
    return torch.from_numpy(stored.copy()).float()
