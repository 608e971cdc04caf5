"""Networks of your own as backbones: modules given as objects, and those that other packages name.

A backbone's `model` says how its network is built: `module:PACKAGE.CLASS` is an object that the caller gives,
`package:NAME` an entry point of the group `featprobe.backbones`; all else is a name of timm.
"""

import copy
from pathlib import Path

from torch import nn

from featprobe.backbones.adapted import Adapted, adapted
from featprobe.backbones.catalog import check_own
from featprobe.backbones.given import class_of, modules_at_hand
from featprobe.backbones.weights import load_strictly, read_weights
from featprobe.errors import BackboneError
from featprobe.io.plugins import BACKBONES, clash, loaded, points_of, refusal
from featprobe.specs import MODULE, PACKAGE, BackboneSpec

BUILDER = "a function or a class that returns a torch.nn.Module"


def create_own(spec: BackboneSpec) -> Adapted:
    """The network of a backbone of your own, with the weights that its spec names; raises BackboneError."""
    check_own(spec)
    module = _given(spec) if spec.model.startswith(MODULE) else _from_package(spec)
    if spec.source == "file":
        load_strictly(module, read_weights(Path(str(spec.weights))), str(spec.weights))
    return adapted(module.eval().requires_grad_(False), spec.label)


def identity_of(spec: BackboneSpec, model: nn.Module) -> str:
    """What a network is, for keys: timm's name, or the class of your own."""
    if not isinstance(model, Adapted) or spec.model.startswith(MODULE):
        return spec.model
    return f"{spec.model} ({class_of(model.module)})"


def _given(spec: BackboneSpec) -> nn.Module:
    """A copy of the module at hand that a spec describes; raises BackboneError where there is none."""
    alike = [pair for pair in modules_at_hand() if pair[0].model == spec.model]
    found = [pair for pair in alike if pair[0].label == spec.label] or (alike if len(alike) == 1 else [])
    if not found:
        there = ", ".join(own.model.removeprefix(MODULE) for own, _ in modules_at_hand())
        raise BackboneError(
            f"{spec.label} is a module that was given as an object: it must be given again. Nothing was computed.\n"
            f"  wanted  an object of the class {spec.model.removeprefix(MODULE)}\n  found   {there or 'none'}\n"
            "Give it from Python: backbones=[module] to finetune and probe, backbone=module to Predictor and predict.\n"
            "One that a package names with an entry point is found by its name everywhere: docs/add-a-backbone.md."
        )
    try:
        return copy.deepcopy(found[0][1])
    except Exception as error:  # a module's own attributes may refuse
        raise BackboneError(
            f"{spec.label} can't be copied, and the object itself must stay as it is. Nothing was computed.\n"
            f"  found   {type(error).__name__}: {error}\nRemove what can't be copied from the module."
        ) from error


def _from_package(spec: BackboneSpec) -> nn.Module:
    """A new module of the entry point that a spec names; raises BackboneError."""
    name = spec.model.removeprefix(PACKAGE)
    points = points_of(BACKBONES, name)
    if not points:
        raise BackboneError(
            f"The backbone {name} is not installed here. Nothing was computed.\n"
            f"  wanted  a package with the entry point {name} in the group {BACKBONES}\nInstall that package."
        )
    if len(points) > 1:
        raise BackboneError(clash(points, "backbone"))
    point = points[0]
    build = loaded(point, "backbone", BUILDER, BackboneError)
    if not callable(build) or isinstance(build, nn.Module):
        found = "a module, which all would share" if isinstance(build, nn.Module) else f"a {type(build).__name__}"
        raise BackboneError(refusal(point, "backbone", "is not built by a function", BUILDER, found))
    try:
        module = build()
    except Exception as error:  # the package's own code may raise anything
        found = f"{type(error).__name__}: {error}"
        raise BackboneError(refusal(point, "backbone", "can't be built", BUILDER, found)) from error
    if not isinstance(module, nn.Module):
        raise BackboneError(refusal(point, "backbone", "is no module", BUILDER, f"a {type(module).__name__}"))
    return module
