"""Modules that a caller gave as backbones, for as long as the call lasts. No torch is imported here."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from featprobe.specs import BackboneSpec

if TYPE_CHECKING:
    from torch import nn

_at_hand: "ContextVar[tuple[tuple[BackboneSpec, nn.Module], ...]]" = ContextVar("_at_hand", default=())


@contextmanager
def given(pairs: "Sequence[tuple[BackboneSpec, nn.Module]]") -> Iterator[None]:
    """Let these modules be found for as long as the context is open, beside those of contexts around it."""
    token = _at_hand.set((*pairs, *_at_hand.get()))
    try:
        yield
    finally:
        _at_hand.reset(token)


def modules_at_hand() -> "tuple[tuple[BackboneSpec, nn.Module], ...]":
    """The modules that can be found here, each with its description."""
    return _at_hand.get()


def spec_at_hand(name: str) -> BackboneSpec | None:
    """The description of the module at hand that is called so; None where there is none."""
    return next((spec for spec, _ in _at_hand.get() if spec.label == name), None)
