"""The precision of a cache: decided once, when its file is made; later runs follow the file."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from featprobe.backbones.precision import ONLY_ON_CUDA, resolve
from featprobe.cache import MISSING, Cache, read_contents
from featprobe.errors import BackboneError, CacheError
from featprobe.io.disk import plain_name
from featprobe.specs import CachePrecision, FeatureRecipe


def settle_precision(
    recipe: FeatureRecipe,
    asked: CachePrecision | Literal["auto"],
    device: str,
    folder: Path,
    data: str,
) -> tuple[FeatureRecipe, tuple[str, ...]]:
    """The recipe in the precision that a request means, and what the user should know of it.

    auto: that of a complete cache of the data set as it is now, computed wherever it was; else that of the file that
    was begun, the one that this device would choose before others; else what this device chooses. device: cpu, cuda or
    mps. folder: of the caches. data: fingerprint of the set. Raises BackboneError where the device can't compute it,
    or can't go on with what was begun.
    """
    own: Any = resolve(asked, device)
    kinds: dict[CachePrecision, FeatureRecipe] = {kind: replace(recipe, precision=kind) for kind in _in_order(own)}
    if asked != "auto":
        return kinds[asked], ()
    there = [kind for kind, one in kinds.items() if cache_path(folder, one).exists()]
    paths = {kind: cache_path(folder, kinds[kind]) for kind in there}
    lacks = {kind: _lack(path, data) for kind, path in paths.items()}
    complete = [kind for kind in there if not lacks[kind]]
    if complete:
        notes = [f"{paths[kind]} {lack}; --precision {kind} goes on with it" for kind, lack in lacks.items() if lack]
        return kinds[complete[0]], tuple(notes)
    able = [kind for kind in there if device == "cuda" or kind not in ONLY_ON_CUDA]
    if there and not able:
        raise BackboneError(
            f"{paths[there[0]]} was begun on CUDA, in the precision {there[0]}, and {lacks[there[0]]}.\n"
            f"  wanted  a CUDA device, to go on with it\n  found   {device}\n"
            "Nothing was computed. Go on where there is one, or begin another cache here:  --precision fp32"
        )
    return kinds[able[0] if able else own], ()


def cache_path(folder: Path, recipe: FeatureRecipe) -> Path:
    """The path of the cache of a recipe in the folder of its data set.

    Raises CacheError for a backbone whose name would lead out of it, as a cache of others may give it.
    """
    if not plain_name(recipe.label):
        raise CacheError(
            f"A cache can't be called after the backbone {recipe.label[:80]!r}. Nothing was computed.\n"
            "  wanted  a name without / and \\ and control characters"
        )
    return folder / f"{recipe.label}-{recipe.key[:8]}.h5"


def _in_order(first: CachePrecision) -> list[CachePrecision]:
    return sorted(get_args(CachePrecision), key=lambda kind: kind != first)


def _lack(path: Path, data: str) -> str:
    """Why a cache does not hold every row of the data set of this fingerprint; "" where it does. Raises CacheError."""
    contents = read_contents(path)
    if not contents.is_intact():
        return "is damaged"
    if contents.data.fingerprint != data:
        return "holds the data set as it was before it changed"
    return "is not complete" if (Cache(path, contents).done == MISSING).any() else ""
