"""The closed-form head against plain weighted least squares, and its choice on validation."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from torch import Tensor
from torch.nn.functional import interpolate

from featprobe.features import Features
from featprobe.levels import FeatureLevel
from featprobe.probes import ridge
from featprobe.probes.linear import EPSILON, LinearHead
from featprobe.probes.ridge import STRENGTHS, RidgeSums, choose, foreground_iou

SEVERAL = tuple(FeatureLevel(f"stride{s}", c, s) for s, c in ((4, 5), (8, 7), (16, 4)))
UNIFORM = tuple(FeatureLevel(f"block{b}", 6, 8) for b in (5, 11))
FRAME = (32, 48)


def made(
    levels: Sequence[FeatureLevel], classes: int, seed: int, padded: bool = False, images: int = 3
) -> tuple[Features, Tensor]:
    """Features of any mean and spread, and class shares with ignored parts (and padding)."""
    rng = torch.Generator().manual_seed(seed)
    maps = {}
    for level in levels:
        x = torch.randn(images, level.channels, *level.cells(FRAME), generator=rng)
        maps[level.name] = x * (0.3 + torch.rand(level.channels, 1, 1, generator=rng)) + 2
    grid = levels[0].cells(FRAME)
    shares = torch.rand(images, classes, *grid, generator=rng).softmax(1) * torch.rand(images, 1, *grid, generator=rng)
    content = None
    if padded:
        content = torch.tensor([[FRAME[0], 24]] * images, dtype=torch.int32)
        shares[..., 24 // levels[0].stride :] = 0
    return Features(maps, FRAME, content), shares


def concatenated(levels: Sequence[FeatureLevel], features: Features) -> np.ndarray:
    """(cells, channels) of the finest grid, coarse levels by nearest neighbour, float64."""
    grid = levels[0].cells(FRAME)
    maps = [interpolate(features.maps[level.name].double(), grid, mode="nearest") for level in levels]
    return torch.cat(maps, 1).movedim(1, -1).flatten(0, 2).numpy()


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 100), levels=st.sampled_from([SEVERAL, UNIFORM, SEVERAL[1:2]]), padded=st.booleans(),
    strength=st.sampled_from(STRENGTHS[2:]),
)  # fmt: skip
def test_the_solution_is_that_of_weighted_ridge_regression_on_the_upsampled_features(
    seed: int, levels: tuple[FeatureLevel, ...], padded: bool, strength: float
) -> None:
    features, shares = made(levels, 3, seed, padded)
    weights = torch.tensor([0.5, 2.0, 4.0])
    sums = RidgeSums(levels, 3, weights)
    sums.add(features, shares)
    (head,) = sums.solve([strength])

    x = concatenated(levels, features)
    per_class = (shares * weights[:, None, None]).movedim(1, -1).flatten(0, 2).double().numpy()  # (cells, classes)
    cell = per_class.sum(1)
    mean = (cell[:, None] * x).sum(0) / cell.sum()
    variance = (cell[:, None] * (x - mean) ** 2).sum(0) / cell.sum()
    standard = (x - mean) / np.sqrt(variance + EPSILON)
    targets = per_class / np.maximum(cell[:, None], 1e-12)
    rival = Ridge(alpha=strength * cell.sum(), solver="cholesky").fit(standard, targets, sample_weight=cell)
    found = torch.cat([head.weights[level.name] for level in levels], 1).detach().numpy()
    assert np.abs(found - rival.coef_).max() < 1e-4 * max(1e-2, np.abs(rival.coef_).max()) + 1e-6
    assert head.bias.detach().numpy() == pytest.approx(rival.intercept_, abs=1e-5)


def test_one_batch_or_several_give_the_same() -> None:
    features, shares = made(SEVERAL, 3, 0)
    whole, parts = (RidgeSums(SEVERAL, 3, torch.ones(3)) for _ in range(2))
    whole.add(features, shares)
    for i in range(3):
        parts.add(Features({n: m[i : i + 1] for n, m in features.maps.items()}, FRAME), shares[i : i + 1])
    for a, b in zip(whole.solve(), parts.solve(), strict=True):
        for name, value in a.state_dict().items():
            assert torch.allclose(value, b.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_a_class_without_an_example_and_a_channel_without_a_spread_stay_finite() -> None:
    features, shares = made(SEVERAL, 3, 1)
    shares[:, 2] = 0
    features.maps["stride8"][:, 0] = 7.0
    sums = RidgeSums(SEVERAL, 3, torch.ones(3))
    sums.add(features, shares)
    for head in sums.solve():
        assert all(value.isfinite().all() for value in head.state_dict().values())
        assert head(features).isfinite().all()


def separable() -> tuple[Features, Tensor]:
    """A class wherever the first channel of the finest level is positive: rare, one cell in ten."""
    features, _ = made(SEVERAL, 2, 2)
    defect = torch.rand(3, *SEVERAL[0].cells(FRAME), generator=torch.Generator().manual_seed(3)) < 0.1
    features.maps["stride4"][:, 0] = torch.where(defect, 3.0, -3.0)
    return features, torch.stack([~defect, defect], 1).float()


def test_what_is_separable_is_learnt() -> None:
    features, shares = separable()
    sums = RidgeSums(SEVERAL, 2, torch.tensor([1.0, 3.0]))
    sums.add(features, shares)
    index, offsets, score = choose(sums.solve(), [(features, shares)])
    assert score == 1 and 0 <= index < len(STRENGTHS) and offsets.shape == (2,)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), step=st.sampled_from([1, 3]))
def test_offsets_never_lower_the_score_on_validation(seed: int, step: int) -> None:
    features, shares = made(SEVERAL, 3, seed)
    torch.manual_seed(seed)
    heads = [LinearHead(SEVERAL, 3).eval() for _ in range(2)]
    index, offsets, score = choose(heads, [(features, shares)], step)
    truth = shares.movedim(1, -1).reshape(-1, 3)
    chosen = torch.randperm(len(truth), generator=torch.Generator().manual_seed(0))[: -(-len(truth) // step)]
    truth = truth[chosen]
    with torch.inference_mode():
        plain = [foreground_iou(h(features).movedim(1, -1).reshape(-1, 3)[chosen], truth) for h in heads]
        moved = heads[index](features).movedim(1, -1).reshape(-1, 3)[chosen] + offsets
    assert score >= max(plain) and score == pytest.approx(foreground_iou(moved, truth))
    assert offsets[0] == 0


def test_the_choice_is_the_best_of_all_heads_searched_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """After one round another head may be ahead."""
    changed = 0
    for seed in range(20):
        features, shares = made(SEVERAL, 5, seed)
        torch.manual_seed(seed)
        heads = [LinearHead(SEVERAL, 5).eval() for _ in range(4)]
        each = [choose([head], [(features, shares)])[2] for head in heads]
        index, _, score = choose(heads, [(features, shares)])
        assert (index, score) == (int(np.argmax(each)), max(each))
        with monkeypatch.context() as short:
            short.setattr(ridge, "ROUNDS", 1)
            changed += choose(heads, [(features, shares)])[0] != index
    assert changed  # so this looked at cases where it matters


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_offsets_do_not_depend_on_how_many_cells_are_looked_at_at_once(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, shares = made(SEVERAL, 3, 4)
    torch.manual_seed(4)
    heads = [LinearHead(SEVERAL, 3).eval() for _ in range(2)]
    index, offsets, score = choose(heads, [(features, (shares * 64).round() / 64)])
    monkeypatch.setattr(ridge, "CELLS_AT_ONCE", at_once)
    again = choose(heads, [(features, (shares * 64).round() / 64)])
    assert (again[0], again[1].tolist(), again[2]) == (index, offsets.tolist(), score) and offsets.any()


def test_foreground_iou_by_hand() -> None:
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    truth = torch.tensor([[0.5, 0.5], [0.0, 1.0], [0.25, 0.0]])  # the last cell is mostly ignored
    assert foreground_iou(logits, truth) == pytest.approx(1 / (1 + 0.5 + 0.25))
    assert foreground_iou(logits, torch.tensor([[1.0, 0.0]] * 3)) == 0
