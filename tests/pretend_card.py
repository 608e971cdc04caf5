"""A CUDA device that is none: tensors say that they lie there, their values lie in the CPU's memory.

With `pretended` code goes every way that it goes on a card, by its own choice, and real numbers come out. What a card
would refuse is refused: operators on tensors of two devices, and in a step that is recorded as a CUDA graph whatever
waits for the device, reads the host's memory or makes a tensor of unknown size. A graph is replayed operator by
operator, on the memory that it was recorded with; memory that nobody holds any more, which a card would have given to
others, is an error. There are no streams: everything is done at once, in order.
"""

import contextlib
import gc
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as v2

aten = torch.ops.aten
DEVICE = torch.device("cuda:0")
MEMORY = 2**36  # bytes that the device says it has
HOST = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero, aten.equal, aten._unique2)
"""Operators whose result the host must wait for."""
locked: set[int] = set()
"""Where memory begins whose pages are locked."""
DEVICE_BY_DEVICE = (aten.copy_, aten._to_copy)
"""Operators that may join two devices."""


class CardError(RuntimeError):
    """What a real device would not have done."""


class Card(Tensor):
    """A tensor on the device; inner: its values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Card":
        with torch.inference_mode(False):
            made = Tensor._make_wrapper_subclass(
                cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
                layout=inner.layout, device=DEVICE,
            )  # fmt: skip
        made.inner = inner
        owners.setdefault(_storage(inner), weakref.WeakSet()).add(made)
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **_: Any) -> str:
        return f"Card({self.inner!r})"

    def tolist(self) -> Any:
        """torch gives no numbers of such tensors."""
        return self.cpu().tolist()

    def new_tensor(self, data: Any, *, dtype: Any = None, device: Any = None) -> Tensor:
        """torch makes it there without a copy that could be seen."""
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or DEVICE)

    def numpy(self, *, force: bool = False) -> Any:
        """As a tensor of a device says it."""
        raise TypeError("can't convert cuda:0 device type tensor to numpy.")

    def as_subclass(self, cls: Any) -> Any:
        """It stays what it is."""
        return self

    def record_stream(self, stream: Any) -> None:
        """There are no streams."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _carded, (self.inner,)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(function, args, kwargs or {})


owners: dict[int, "weakref.WeakSet[Card]"] = {}  # by storage: who holds memory of the device
generator = torch.Generator()  # the device's random numbers


class State(threading.local):
    """recording: the graph that a thread records; what other threads do meanwhile is no part of it.

    waited: whether the thread has waited for the device since it locked memory.
    """

    recording: "Graph | None" = None
    waited = True


now = State()


def _carded(inner: Tensor) -> Card:
    return Card(inner)


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, Card) else x


def _computed(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operator, of which one argument at least lies on the device."""
    packet = function.overloadpacket
    flat = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    away = kwargs.get("device") is not None and torch.device(kwargs["device"]).type != DEVICE.type
    if away:
        kwargs = {**kwargs, "device": None} if packet is aten._to_copy else {**kwargs, "device": torch.device("cpu")}
    elif kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    to_host = packet is aten.copy_ and not isinstance(args[0], Card)
    _check(function, flat, waits=away or to_host or packet in HOST or _by_mask(packet, args))
    takes = [a.name for a in function._schema.arguments]
    if "generator" in takes and kwargs.get("generator") is None:
        kwargs = {**kwargs, "generator": generator}
    inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
    if now.recording is not None:
        now.recording.keep_before(function, inner_args, inner_kwargs)
    found = _called(function, inner_args, inner_kwargs)
    if away:
        return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, found)
    cards = {id(x.inner): x for x in flat if isinstance(x, Card)}
    host = {id(x): x for x in flat if not isinstance(x, Card)}
    if now.recording is not None:
        now.recording.add(function, inner_args, inner_kwargs, found, [x for x in flat if isinstance(x, Card)])

    def wrapped(x: Any) -> Any:
        if not isinstance(x, Tensor) or id(x) in host:
            return x
        own = cards.get(id(x))
        if own is None:
            return Card(x)
        if own.shape != x.shape:
            raise NotImplementedError(f"{function} gave memory another shape")
        return own

    return tree_map(wrapped, found)


def _called(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute on the CPU, which lacks products of half-precision numbers that are summed in float32."""
    if function is aten.bmm.dtype:
        a, b, dtype = args
        return torch.bmm(a.to(dtype), b.to(dtype))
    with torch.inference_mode(False), torch.no_grad():
        return function(*args, **kwargs)


def _by_mask(packet: Any, args: Any) -> bool:
    indices = args[1] if packet in (aten.index, aten.index_put, aten.index_put_) else ()
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices)


def _check(function: Any, tensors: Sequence[Tensor], *, waits: bool) -> None:
    packet = function.overloadpacket
    beside = [x for x in tensors if not isinstance(x, Card)]
    if now.recording is not None and (waits or beside):
        raise CardError(f"{function} is not permitted when a stream is recorded: it needs the host")
    if packet in DEVICE_BY_DEVICE:
        return
    if packet is aten.index:
        beside = [] if isinstance(tensors[0], Card) else beside
    if any(x.dim() for x in beside):
        shapes = [(x.device.type, tuple(x.shape)) for x in tensors]
        raise CardError(f"Expected all tensors to be on the same device: {function} of {shapes}")


class Graph:
    """torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.steps: list[tuple[Any, Any, Any, Any]] = []
        self.own: set[int] = set()  # storages that were made as it was recorded
        self.outside: dict[int, str] = {}  # the others that are read or written, and where first
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # what stood in those that are written

    def keep_before(self, function: Any, args: Any, kwargs: Any) -> None:
        """Remember memory that an operator writes to: recording is not computing."""
        schema = function._schema.arguments
        written = [args[i] if i < len(args) else kwargs.get(a.name) for i, a in enumerate(schema)
                   if a.alias_info is not None and a.alias_info.is_write]  # fmt: skip
        for x in tree_flatten(written)[0]:
            if isinstance(x, Tensor) and _storage(x) not in self.own and _storage(x) not in self.before:
                whole = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())  # type: ignore[call-overload]
                self.before[_storage(x)] = whole, whole.clone()

    def add(self, function: Any, args: Any, kwargs: Any, found: Any, given: Sequence[Card]) -> None:
        """Record an operator."""
        read = {_storage(x.inner) for x in given}
        for key in read - self.own:
            self.outside.setdefault(key, str(function))
        made = [x for x in tree_flatten(found)[0] if isinstance(x, Tensor)]
        fresh = [x if _storage(x) not in read else None for x in made]
        self.own |= {_storage(x) for x in fresh if x is not None}
        self.steps.append((function, args, kwargs, fresh))

    def replay(self) -> None:
        """Compute all that was recorded, in the same memory."""
        for key, first in self.outside.items():
            if not owners.get(key):
                raise CardError(f"The graph reads memory that was given back; {first} was the first that did")
        with torch.no_grad():
            for function, args, kwargs, fresh in self.steps:
                found = [x for x in tree_flatten(_called(function, args, kwargs))[0] if isinstance(x, Tensor)]
                for old, new in zip(fresh, found, strict=True):
                    if old is not None:
                        old.copy_(new)


class Recording:
    """torch.cuda.graph."""

    modes: ClassVar[list[str]] = []

    def __init__(self, graph: Graph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global") -> None:
        self.graph = graph
        self.modes.append(capture_error_mode)

    def __enter__(self) -> None:
        gc.collect()
        self.random, now.recording = generator.get_state(), self.graph

    def __exit__(self, *_: Any) -> None:
        now.recording = None
        generator.set_state(self.random)
        for whole, was in self.graph.before.values():
            whole.copy_(was)


class Stream:
    """torch.cuda.Stream and torch.cuda.Event, for whom there is nothing to wait."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def record_event(self, event: Any = None) -> "Stream":
        return self

    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 1.0


def _waited(device: Any = None) -> None:
    """torch.cuda.synchronize."""
    now.waited = True


class Runtime:
    """torch.cuda.cudart, which locks pages."""

    cudaError = SimpleNamespace(success=0)

    def cudaGetErrorString(self, status: int) -> str:
        return f"error {status}"

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
        now.waited = False
        locked.add(pointer)
        return 0

    def cudaHostUnregister(self, pointer: int) -> int:
        if not now.waited:
            raise CardError("The device may still copy from this memory")
        locked.remove(pointer)
        return 0


def _backward(
    tensors: Any, grad_tensors: Any = None, retain_graph: Any = None, create_graph: bool = False, **more: Any
) -> None:
    """torch.autograd.backward: torch's engine asks a device for its streams."""
    tensors = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
    if not any(isinstance(x, Card) for x in tensors):
        return ENGINE(tensors, grad_tensors, retain_graph, create_graph, **more)
    given = [None] * len(tensors) if grad_tensors is None else grad_tensors
    given = (given,) if isinstance(given, Tensor) else tuple(given)
    left: dict[Any, int] = {}  # of each node: those that give it a gradient
    stack, seen = [x.grad_fn for x in tensors], set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            if following is not None:
                left[following] = left.get(following, 0) + 1
                stack.append(following)
    sums: dict[Any, dict[int, Tensor]] = {}
    with torch.no_grad():
        for x, gradient in zip(tensors, given, strict=True):
            _sum_up(sums, x.grad_fn, x.output_nr, torch.ones_like(x) if gradient is None else gradient)
        ready = [node for node in {x.grad_fn: None for x in tensors} if node not in left]
        while ready:
            node = ready.pop()
            found = _passed(node, sums.pop(node, {}))
            for (following, number), gradient in zip(node.next_functions, found, strict=True):
                if following is None:
                    continue
                if gradient is not None:
                    _sum_up(sums, following, number, gradient)
                left[following] -= 1
                if not left[following]:
                    ready.append(following)
    return None


EMPTY = torch.empty
ENGINE: Callable[..., None] = torch.autograd.backward


def _sum_up(sums: dict[Any, dict[int, Tensor]], node: Any, number: int, gradient: Tensor) -> None:
    meta, own = node._input_metadata[number], sums.setdefault(node, {})
    if gradient.device != meta.device:
        raise CardError(f"{node.name()} got a gradient on {gradient.device}, wanted is one on {meta.device}")
    gradient = gradient.to(meta.dtype)
    if gradient.shape != meta.shape:
        gradient = gradient.sum_to_size(meta.shape)
    own[number] = own[number] + gradient if number in own else gradient


def _passed(node: Any, own: dict[int, Tensor]) -> Sequence[Tensor | None]:
    """The gradients that a node gives to those before it."""
    if not own:
        return [None] * len(node.next_functions)
    if hasattr(node, "variable"):
        leaf, gradient = node.variable, own[0]
        leaf.grad = torch.empty_like(leaf).copy_(gradient) if leaf.grad is None else leaf.grad + gradient
        return ()
    metas = node._input_metadata
    is_ours = isinstance(node, torch.autograd.function.BackwardCFunction)
    given = [
        own.get(i, torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device) if is_ours else None)
        for i, meta in enumerate(metas)
    ]
    found = node.apply(*given) if is_ours else node(*given)
    found = found if isinstance(found, tuple) else (found,)
    return [x for x, is_tensor in zip(found, node.given, strict=True) if is_tensor] if is_ours else found


APPLY = inspect.getattr_static(torch.autograd.Function, "apply")


def _applied(cls: Any, *args: Any) -> Any:
    """torch.autograd.Function.apply, which does not say afterwards what it was given."""
    found = APPLY.__get__(None, cls)(*args)
    for x in found if isinstance(found, tuple) else (found,):
        if isinstance(x, Tensor) and x.grad_fn is not None:
            x.grad_fn.given = [isinstance(own, Tensor) for own in args]
    return found


def _empty(
    size: Any, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None,
    memory_format: Any = None,
) -> Tensor:  # fmt: skip
    with torch.inference_mode(False):
        return _made(EMPTY(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _made(inner: Tensor) -> Tensor:
    if now.recording is not None:
        now.recording.own.add(_storage(inner))
    return Card(inner)


def _empty_strided(
    size: Any, stride: Any, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None
) -> Tensor:
    with torch.inference_mode(False):
        return _made(torch.empty_strided(size, stride, dtype=dtype))


def _as_on_the_host(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A factory whose operator would give the memory of its result another size."""

    def made(*args: Any, dtype: Any = None, **_: Any) -> Tensor:
        with torch.inference_mode(False):
            return _made(make(*args, dtype=dtype))

    return made


def _unpinned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of torch that makes tensors, without a driver that locks pages."""

    def made(*args: Any, pin_memory: bool = False, device: Any = None, **kwargs: Any) -> Tensor:
        if device is None:
            return make(*args, **kwargs)
        return make(*args, device="cpu", **kwargs).to(device)  # whatever device the context says

    return made


def _resized(image: Any, size: Any, interpolation: Any, *more: Any, **how: Any) -> Any:
    """torchvision's, whose tensors of images and masks can't be tensors of the device too."""
    if not isinstance(image, Card):
        return RESIZE(image, size, interpolation, *more, **how)
    own = v2.resize_mask if image.dim() == 2 else v2.resize_image
    return own(image, size, **{} if image.dim() == 2 else {"interpolation": interpolation})


RESIZE = v2.resize


def _plain(kind: Any) -> Callable[..., Any]:
    return lambda x, **how: x if isinstance(x, Card) else kind(x, **how)


@contextlib.contextmanager
def pretended() -> Iterator[None]:
    """Inside, there is a CUDA device."""
    torch._C._ensureCUDADeviceGuardSet()
    factories = torch.library.Library("aten", "IMPL")
    with contextlib.ExitStack() as patches:
        patches.callback(factories._destroy)
        for name, make in (
            ("empty.memory_format", _empty), ("empty_strided", _empty_strided),
            *((f"arange{kind}", _as_on_the_host(torch.arange)) for kind in ("", ".start", ".start_step")),
            *((f"eye{kind}", _as_on_the_host(torch.eye)) for kind in ("", ".m")),
        ):  # fmt: skip
            factories.impl(name, make, "CUDA", allow_override=True)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        patches.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        patches.callback(torch._C._set_cudnn_enabled, torch._C._get_cudnn_enabled())
        torch._C._set_cudnn_enabled(False)
        nothing, cuda = (lambda *_, **__: None), torch.cuda
        here: dict[str, Any] = {
            "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
            "_lazy_init": nothing, "get_device_capability": lambda device=None: (9, 0),
            "is_bf16_supported": lambda *_, **__: True, "get_device_name": lambda device=None: "pretended",
            "mem_get_info": lambda device=None: (MEMORY, MEMORY), "memory_reserved": lambda device=None: 0,
            "memory_allocated": lambda device=None: 0, "max_memory_allocated": lambda device=None: 0,
            "empty_cache": nothing, "synchronize": _waited, "Stream": Stream, "Event": Stream,
            "current_stream": Stream, "set_stream": nothing, "stream": lambda own: contextlib.nullcontext(),
            "device": lambda own: contextlib.nullcontext(), "graph": Recording, "CUDAGraph": Graph,
            "get_rng_state": lambda device=None: generator.get_state(),
            "set_rng_state": lambda state, device=None: generator.set_state(state),
            "is_current_stream_capturing": lambda: now.recording is not None,
            "manual_seed_all": lambda seed: generator.manual_seed(seed), "cudart": Runtime,
        }  # fmt: skip
        for name, own in here.items():
            patches.enter_context(mock.patch.object(cuda, name, own))
        for name in ("empty", "tensor"):
            patches.enter_context(mock.patch.object(torch, name, _unpinned(getattr(torch, name))))
        patches.enter_context(mock.patch.object(Tensor, "pin_memory", lambda self, device=None: self))
        patches.enter_context(mock.patch.object(torch.autograd, "backward", _backward))
        patches.enter_context(mock.patch.object(v2, "resize", _resized))
        for name in ("Image", "Mask"):
            patches.enter_context(mock.patch.object(tv_tensors, name, _plain(getattr(tv_tensors, name))))
        patches.enter_context(mock.patch.object(torch.autograd.Function, "apply", classmethod(_applied)))
        yield
