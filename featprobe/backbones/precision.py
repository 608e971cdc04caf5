"""In which numbers a backbone computes: float32, NVIDIA's TF32, or half precision where autocast holds it safe."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

from featprobe.errors import BackboneError
from featprobe.specs import Precision

if TYPE_CHECKING:
    import torch

ONLY_ON_CUDA = ("tf32", "amp")


def resolve(asked: Precision | Literal["auto"], device: str) -> Precision:
    """The precision that a request means on a device: auto is amp on CUDA, fp32 elsewhere.

    device: cpu, cuda or mps. Raises BackboneError for tf32 and amp on a device other than CUDA.
    """
    if asked == "auto":
        return "amp" if device == "cuda" else "fp32"
    if asked in ONLY_ON_CUDA and device != "cuda":
        raise BackboneError(
            f"--precision {asked} needs a CUDA device; this is {device}. Nothing was computed. Omit it, or take fp32."
        )
    return asked


@contextmanager
def computing(precision: Precision, device: "torch.device") -> Iterator[None]:
    """Compute in this precision for as long as the context is open; then TF32 is allowed where it was before.

    What needs CUDA (tf32, amp) is float32 on other devices, which is nearer to the true values.
    """
    import torch  # it takes seconds, and to resolve a precision needs none of it

    if device.type != "cuda":
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            yield
        return
    half = torch.bfloat16 if precision == "bf16" else torch.float16
    with float32_as(precision, device), torch.autocast("cuda", half, enabled=precision in ("amp", "bf16")):
        yield


@contextmanager
def float32_as(precision: Precision, device: "torch.device") -> Iterator[None]:
    """Have CUDA compute float32 in this precision alone for as long as the context is open: "fp32" without TF32.

    torch has one setting for the whole process: while several threads compute, TF32 is allowed where all of them allow
    it. When the last context is closed it is allowed where it was before.
    """
    if device.type != "cuda":
        yield
        return
    allowed = precision != "fp32"
    with _lock:
        _open.append(allowed)
        _settle()
    try:
        yield
    finally:
        with _lock:
            _open.remove(allowed)
            _settle()


_lock = Lock()
_open: list[bool] = []  # of contexts that are open in any thread: whether they allow TF32
_back: list[Callable[[], None]] = []  # what brings back the setting from before the first of them


def _settle() -> None:
    """Set what all open contexts allow, on top of what was set before them."""
    while _back:
        _back.pop()()
    if _open:
        _back.extend(_allow(all(_open)))


def _allow(allowed: bool) -> Iterator[Callable[[], None]]:
    """Allow TF32 or forbid it; yields what brings back each setting that was changed, the last one last.

    torch 2.9 has a second setting, per kind of operator, beside which the first can't be read where somebody has used
    the second alone; and what the first forbids, a general value of the second may still allow.
    """
    import torch

    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    for part in (matmul, cudnn):
        try:
            was = part.allow_tf32
        except RuntimeError:
            continue
        if was != allowed:
            part.allow_tf32 = allowed
            yield partial(setattr, part, "allow_tf32", was)
    for kind in (matmul, cudnn.conv, cudnn.rnn) if hasattr(cudnn, "conv") else ():
        value = kind.fp32_precision
        if (value == "tf32") != allowed:
            kind.fp32_precision = "tf32" if allowed else "ieee"
            yield partial(setattr, kind, "fp32_precision", value)
