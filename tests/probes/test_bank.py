"""A bank of linear heads is those heads one by one: in loss, gradients, statistics, training and saving."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from featprobe.errors import ShapeError
from featprobe.features import Features
from featprobe.levels import FeatureLevel
from featprobe.probes import LinearBank, LinearHead, level_loss
from featprobe.probes.bank import all_linear, every_logits

SEVERAL = tuple(FeatureLevel(f"stride{s}", c, s) for s, c in ((4, 5), (8, 7), (16, 11)))
UNIFORM = tuple(FeatureLevel(f"block{b}", 6, 8) for b in (5, 11))
FRAME = (48, 80)


def features_of(levels: Any, padded: bool, seed: int = 0, dtype: torch.dtype = torch.float64) -> Features:
    rng = torch.Generator().manual_seed(seed)
    maps = {v.name: (1 + 2 * torch.randn(3, v.channels, *v.cells(FRAME), generator=rng)).to(dtype) for v in levels}
    content = torch.tensor([[48, 80], [20, 80], [48, 31]], dtype=torch.int32) if padded else None
    return Features(maps, FRAME, content)


def shares_of(levels: Any, classes: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Class shares of cells, parts of them ignored."""
    rng = torch.Generator().manual_seed(seed)
    grid = levels[0].cells(FRAME)
    shares = torch.rand(3, classes, *grid, generator=rng).softmax(1) * torch.rand(3, 1, *grid, generator=rng).round()
    return shares.to(dtype)


def heads_of(levels: Any, classes: int, count: int, dtype: torch.dtype = torch.float64) -> list[LinearHead]:
    torch.manual_seed(1)
    heads = [LinearHead(levels, classes).to(dtype).train() for _ in range(count)]
    with torch.no_grad():
        for head in heads:
            for parameter in head.parameters():
                parameter.normal_()
    return heads


@settings(max_examples=25, deadline=None)
@given(
    levels=st.sampled_from([SEVERAL, UNIFORM, SEVERAL[1:2]]), padded=st.booleans(), weighted=st.booleans(),
    count=st.integers(1, 3), classes=st.integers(2, 4), seed=st.integers(0, 50),
)  # fmt: skip
def test_losses_gradients_and_statistics_are_those_of_the_heads_alone(
    levels: Any, padded: bool, weighted: bool, count: int, classes: int, seed: int
) -> None:
    features, shares = features_of(levels, padded, seed), shares_of(levels, classes, seed)
    weights = (
        torch.rand(classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.1
        if weighted
        else None
    )
    heads = heads_of(levels, classes, count)
    alone = copy.deepcopy(heads)
    found = LinearBank(heads).loss(features, shares, weights)
    factors = torch.arange(1, count + 1, dtype=torch.float64)  # each head's loss may be weighted by the caller
    (found * factors).sum().backward()
    for head, twin, loss, factor in zip(heads, alone, found, factors, strict=True):
        wanted = level_loss(twin(features), shares, weights)
        (wanted * factor).backward()
        assert torch.allclose(loss, wanted, rtol=1e-10)
        for (name, own), theirs in zip(head.named_parameters(), twin.parameters(), strict=True):
            assert own.grad is not None and theirs.grad is not None
            assert torch.allclose(own.grad, theirs.grad, rtol=1e-8, atol=1e-10), name
        for (name, own), theirs in zip(head.named_buffers(), twin.buffers(), strict=True):
            assert torch.allclose(own, theirs, rtol=1e-10), f"{name}: updated once a step, for all heads"


@pytest.mark.parametrize("padded", [False, True])
def test_logits_are_those_of_the_heads_in_training_and_after(padded: bool) -> None:
    heads = heads_of(SEVERAL, 3, 2)
    features = features_of(SEVERAL, padded)
    bank = LinearBank(heads)
    for training in (True, False):
        for head in heads:
            head.train(training)
        twins = copy.deepcopy(heads)
        for own, twin in zip(bank.logits(features), twins, strict=True):
            assert torch.allclose(own, twin(features), atol=1e-10)


def test_twenty_steps_end_where_the_heads_alone_end() -> None:
    heads = heads_of(SEVERAL, 3, 3, torch.float32)
    alone = copy.deepcopy(heads)
    rates = [(1e-4, 1e-3), (1e-3, 1e-4), (1e-2, 1e-2)]
    groups = [
        {"params": list(h.parameters()), "lr": lr, "weight_decay": decay}
        for h, (lr, decay) in zip(heads, rates, strict=True)
    ]
    bank, optimizer = LinearBank(heads), torch.optim.AdamW(groups)
    singles = [torch.optim.AdamW(h.parameters(), lr, weight_decay=d) for h, (lr, d) in zip(alone, rates, strict=True)]
    for step in range(20):
        features = features_of(SEVERAL, False, step, torch.float16)
        shares = shares_of(SEVERAL, 3, step, torch.float32)
        optimizer.zero_grad()
        bank.loss(features, shares).sum().backward()
        optimizer.step()
        for twin, own in zip(alone, singles, strict=True):
            own.zero_grad()
            level_loss(twin(features), shares).backward()
            own.step()
    for head, twin in zip(heads, alone, strict=True):
        for name, value in head.state_dict().items():
            wanted = twin.state_dict()[name]
            assert float((value - wanted).norm() / wanted.norm()) < 1e-4, name


def test_a_head_that_has_diverged_disturbs_no_other() -> None:
    heads = heads_of(SEVERAL, 3, 2)
    with torch.no_grad():
        heads[0].weights["stride8"].fill_(float("nan"))
    twin = copy.deepcopy(heads[1])
    features, shares = features_of(SEVERAL, False), shares_of(SEVERAL, 3)
    losses = LinearBank(heads).loss(features, shares)
    losses.sum().backward()
    wanted = level_loss(twin(features), shares)
    wanted.backward()
    assert losses[0].isnan() and torch.allclose(losses[1], wanted)
    for own, theirs in zip(heads[1].parameters(), twin.parameters(), strict=True):
        assert torch.allclose(own.grad, theirs.grad)  # type: ignore[arg-type]


def test_large_logits_do_not_overflow() -> None:
    heads = heads_of(SEVERAL, 3, 2, torch.float32)
    with torch.no_grad():
        for head in heads:
            head.bias += torch.tensor([0.0, 300.0, -300.0])
    features, shares = features_of(SEVERAL, False, dtype=torch.float32), shares_of(SEVERAL, 3, dtype=torch.float32)
    losses = LinearBank(heads).loss(features, shares)
    losses.sum().backward()
    for loss, head in zip(losses, heads, strict=True):
        assert torch.allclose(loss, level_loss(head(features), shares), rtol=1e-4)
        assert all(p.grad.isfinite().all() for p in head.parameters())  # type: ignore[union-attr]


class Doubled(LinearHead):
    """A head that is built like a linear one and computes something else."""

    def forward(self, features: Features) -> Tensor:
        return 2 * super().forward(features)


def test_heads_derived_from_a_linear_one_are_computed_as_they_say() -> None:
    features, plain = features_of(SEVERAL, False), heads_of(SEVERAL, 3, 2)
    derived = [Doubled(SEVERAL, 3).double().train() for _ in plain]
    for own, other in zip(derived, plain, strict=True):
        own.load_state_dict(other.state_dict())
    assert all_linear(plain) == plain and all_linear([plain[0], *derived]) == []
    assert torch.allclose(every_logits(derived, features), 2 * every_logits(plain, features))


def test_what_is_no_bank_is_refused() -> None:
    with pytest.raises(ShapeError, match="same levels and classes"):
        LinearBank([LinearHead(SEVERAL, 3), LinearHead(SEVERAL, 4)])
    features = features_of(SEVERAL, False)
    features.maps["stride8"].requires_grad_(True)
    with pytest.raises(ShapeError, match="frozen features"):
        LinearBank(heads_of(SEVERAL, 3, 2)).loss(features, shares_of(SEVERAL, 3))
