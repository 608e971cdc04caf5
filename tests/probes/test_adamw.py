"""Our AdamW is torch's, bit for bit, but for the wrappers that load torch's compiler."""

import copy
from inspect import signature
from typing import Any

import pytest
import torch
from torch import nn

from featprobe.probes.operations.adamw import AdamW

TORCHS: Any = torch.optim.AdamW


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.Linear(4, 2))


def groups_of(module: nn.Module) -> list[dict[str, Any]]:
    """Two groups of other rates, as a head and a backbone are."""
    first, *others = module.parameters()
    return [{"params": [first], "lr": 1e-2, "weight_decay": 0.0}, {"params": others, "lr": 3e-3, "weight_decay": 0.1}]


def move(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Some steps; the last parameter has no gradient in the first of them."""
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        for index, parameter in enumerate(module.parameters()):
            if step or index < 5:
                noise = torch.Generator().manual_seed(31 * step + index)
                parameter.grad = torch.randn(parameter.shape, generator=noise)
        optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        optimizer.step()


def plain(state: Any) -> Any:
    """A state with lists in place of tensors, so that it can be compared."""
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    if isinstance(state, list):
        return [plain(value) for value in state]
    return (state.dtype, state.tolist()) if isinstance(state, torch.Tensor) else state


@pytest.mark.parametrize("fused", [True, False])
def test_it_gives_the_bits_and_the_states_of_torchs_own(fused: bool) -> None:
    pairs = []
    for kind in (TORCHS, AdamW):
        module = network()
        optimizer = kind(groups_of(module), fused=fused)
        move(module, optimizer, 3)
        pairs.append((module, optimizer))
    (theirs, their), (ours, our) = pairs
    assert plain(our.state_dict()) == plain(their.state_dict())
    exchanged = copy.deepcopy(our.state_dict()), copy.deepcopy(their.state_dict())
    for (module, optimizer), state in zip(reversed(pairs), reversed(exchanged), strict=True):
        optimizer.load_state_dict(state)
        move(module, optimizer, 2)
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    assert plain(our.state_dict()) == plain(their.state_dict())
    moved = zip(network().parameters(), ours.parameters(), strict=True)
    assert not any(torch.equal(before, after) for before, after in moved)


def test_gradients_are_on_again_after_a_step_and_hooks_are_called() -> None:
    module, called = network(), list[str]()
    optimizer = AdamW(groups_of(module), fused=True)
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    optimizer.register_state_dict_post_hook(lambda own, state: {**state, "more": 1})
    move(module, optimizer, 1)
    assert torch.is_grad_enabled() and called == ["before", "after"] and optimizer.state_dict()["more"] == 1
    assert all(parameter.is_leaf and parameter.requires_grad for parameter in module.parameters())


def test_every_method_that_torch_wraps_is_the_one_inside() -> None:
    """Of a torch that wraps more of them, the first call would load the compiler again."""
    from torch._compile import _disable_dynamo

    wrapped = _disable_dynamo(lambda: None).__code__
    for name in dir(torch.optim.AdamW):
        own, theirs = getattr(AdamW, name), getattr(torch.optim.AdamW, name)
        if getattr(theirs, "__code__", None) is wrapped:
            assert own.__code__ is not wrapped, name
            assert signature(own) == signature(theirs)
    assert torch.optim.AdamW.zero_grad.__code__ is wrapped
