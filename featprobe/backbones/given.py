"""Modules that a caller gives as backbones, found by their names for as long as the call lasts.

torch is imported only once there is such a module.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from featprobe.backbones.catalog import is_taken
from featprobe.errors import BackboneError
from featprobe.io.disk import plain_name
from featprobe.specs import MODULE, BackboneSpec

if TYPE_CHECKING:
    from torch import nn

Pairs = tuple[tuple[BackboneSpec, "nn.Module"], ...]
_at_hand: ContextVar[Pairs] = ContextVar("_at_hand", default=())


@contextmanager
def at_hand(backbones: "Sequence[str | nn.Module] | str | nn.Module") -> Iterator[tuple[str, ...]]:
    """Let the modules among these be found by their names, for as long as the context is open; gives all names.

    One name or module stands for itself, also a module that has a length, as a Sequential. Raises BackboneError for
    what is neither a name nor a module, and for two modules of one name.
    """
    several: list[Any] = [*backbones] if isinstance(backbones, (list, tuple)) else [backbones]
    pairs = tuple((spec_of_module(one), one) for one in several if not isinstance(one, str))
    labels = [spec.label for spec, _ in pairs]
    for label in labels:
        if labels.count(label) > 1:
            raise BackboneError(f"Several of these modules are called {label}. Give each a `name` of its own.")
    token = _at_hand.set((*pairs, *_at_hand.get()))
    try:
        coming = iter(labels)
        yield tuple(one if isinstance(one, str) else next(coming) for one in several)
    finally:
        _at_hand.reset(token)


def modules_at_hand() -> Pairs:
    """The modules that can be found here, each with its description."""
    return _at_hand.get()


def spec_at_hand(name: str) -> BackboneSpec | None:
    """The description of the module at hand that is called so; None where there is none."""
    return next((spec for spec, _ in _at_hand.get() if spec.label == name), None)


def spec_of_module(module: "nn.Module") -> BackboneSpec:
    """The description of a module that is given as an object; raises BackboneError where it can't be named.

    Without a `name`, it is called by its class and the first digits of the hash of its weights.
    """
    from torch import nn  # it takes a second

    from featprobe.backbones.weights import weights_sha256

    if not isinstance(module, nn.Module):
        raise BackboneError(f"A backbone is a torch.nn.Module, or a name. found: {type(module).__name__}")
    label = getattr(module, "name", None) or f"{type(module).__name__}-{weights_sha256(module)[:6]}"
    if not isinstance(label, str) or not plain_name(label):
        raise BackboneError(
            f"The `name` of {type(module).__name__} names tables and files. Nothing was computed.\n"
            f"  wanted  a text without / and \\\n  found   {label!r}"
        )
    if is_taken(label):
        raise BackboneError(
            f"featprobe, timm or a package has a backbone {label}, and tables could not tell the two apart. Nothing "
            "was computed.\nGive the module another `name`, or none: it is then called by its class."
        )
    model = MODULE + class_of(module)
    return BackboneSpec(label, model, "own", arguments=("--backbone", model))


def class_of(module: "nn.Module") -> str:
    """The qualified name of a module's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def check_needed(spec: BackboneSpec) -> None:
    """Raise BackboneError where modules are at hand, and the network of a spec is none of them."""
    there = [own.model for own, _ in _at_hand.get()]
    if there and spec.model not in there:
        raise BackboneError(
            f"The module that was given is not the network of {spec.label}. Nothing was computed.\n"
            f"  wanted  {spec.model}\n  found   {', '.join(there)}\n"
            + ("Give an object of that class." if spec.model.startswith(MODULE) else "Omit the module.")
        )
