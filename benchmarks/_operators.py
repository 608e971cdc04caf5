"""Counting the operators that a computation dispatches: what a GPU would have to start, whatever runs it."""

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torchvision  # noqa: F401  (whose operators are counted too)
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
VIEWS = {
    aten.alias, aten.as_strided, aten.detach, aten.diagonal, aten.expand, aten.permute, aten.select, aten.slice,
    aten.split, aten.split_with_sizes, aten.squeeze, aten.t, aten.transpose, aten.unbind, aten.unfold, aten.unsqueeze,
    aten.view, aten._reshape_alias, aten._unsafe_view, aten.lift_fresh,
}  # fmt: skip
"""Operators that look at memory in another way and start nothing on a device."""

STOPS = (
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero, aten.unique_dim, aten._unique2,
    aten.equal, torch.ops.torchvision.nms,
)  # fmt: skip
WAITS = "waits for the device"
"""Counted beside an operator for which the host waits for a device, or which no recorded step can hold."""
COMPOSED = "CompositeImplicitAutograd"


class Counting(TorchDispatchMode):
    """Counts operators by name while it is entered, views left out, and the places in the package that wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.stops: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), COMPOSED):
            with self:  # such operators come whole in inference mode; what counts is what they are made of
                return function._op_dk(getattr(torch._C.DispatchKey, COMPOSED), *args, **(kwargs or {}))
        if function.overloadpacket in (aten.lift_fresh, *STOPS) or _by_mask(function, args):
            self.found[WAITS] += 1
            self.stops[f"{_place()}: {function.overloadpacket}"] += 1
        if function.overloadpacket not in VIEWS and function.namespace != "profiler":
            self.found[str(function.overloadpacket).removeprefix("aten.")] += 1
        return function(*args, **(kwargs or {}))


def _place() -> str:
    """The line of the package that is computing; "backward" where none is."""
    frame: Any = sys._getframe()
    while frame is not None:
        if "/featprobe/" in frame.f_code.co_filename:
            return f"{frame.f_code.co_filename.rsplit('/featprobe/')[-1]}:{frame.f_lineno}"
        frame = frame.f_back
    return "backward"


def _by_mask(function: Any, args: Any) -> bool:
    """Whether an operator looks for the places of a mask, which a device must be waited for to count."""
    indices = args[1] if function.overloadpacket in (aten.index, aten.index_put, aten.index_put_) else ()
    return any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices)


def operators(call: Callable[[], object], stops: Counter[str] | None = None) -> Counter[str]:
    """How often each operator is dispatched by a call, backward passes included. stops: gets the places that wait."""
    with Counting() as counting:
        call()
    if stops is not None:
        stops.update(counting.stops)
    return counting.found
