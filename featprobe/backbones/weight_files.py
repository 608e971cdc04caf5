"""The files that decide a backbone's weights and levels, found without timm and torch, which take seconds to load."""

import os
import sys
from pathlib import Path

from featprobe.backbones.catalog import embedded_file
from featprobe.backbones.timm_names import timm_folder
from featprobe.specs import BackboneSpec

HUB_FILE = "model.safetensors"


def weight_files(spec: BackboneSpec) -> tuple[Path, ...]:
    """The file of a backbone's weights, and all code of timm and featprobe that makes a network of it.

    () where other things may decide: for random weights, networks of your own, weights that are not there, and where
    timm is loaded already, since what loaded it may have changed it. For weights of the hub it is the file in the
    hub's cache that timm would take now, if `takes_named_file` says so.
    """
    if "timm" in sys.modules or spec.is_own:
        return ()
    weights, timm = _weights_of(spec), timm_folder()
    if weights is None or timm is None:
        return ()
    return (weights, *sorted(timm.rglob("*.py")), *sorted(Path(__file__).parent.glob("*.py")))


def hub_repository(model: str) -> str:
    """The repository of the hub in which most of timm's weights lie, by their full name."""
    return f"timm/{model}"


def _weights_of(spec: BackboneSpec) -> Path | None:
    if spec.source == "file" and os.path.exists(str(spec.weights)):  # False for a name that no system takes
        return Path(str(spec.weights))
    if spec.source == "embedded":
        return embedded_file()
    return _in_hub_cache(spec.model) if spec.source == "hub" else None


def _in_hub_cache(model: str) -> Path | None:
    """The file of a model in the hub's cache; None where there is none, or where timm is set to look elsewhere."""
    if "TIMM_USE_OLD_CACHE" in os.environ:
        return None
    from huggingface_hub import try_to_load_from_cache  # it takes a fifth of a second

    try:
        found = try_to_load_from_cache(hub_repository(model), HUB_FILE)
    except (OSError, ValueError):  # a folder that may not be read, a name that no repository has
        return None
    return Path(found) if isinstance(found, str) else None
