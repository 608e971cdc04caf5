"""In which numbers a backbone computes: float32, NVIDIA's TF32, or half precision where autocast holds it safe."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

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
    """Have CUDA compute float32 in this precision alone for as long as the context is open: "fp32" without TF32."""
    if device.type != "cuda":
        yield
        return
    import torch

    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    was = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = precision != "fp32"
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = was
