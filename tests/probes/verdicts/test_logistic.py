"""Logistic regression over a path of strengths: scikit-learn's solutions, laws, hard cases, the choice."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from featprobe.errors import ProbeError, ShapeError
from featprobe.probes.verdicts.logistic import NEVER, STRENGTHS, Path, Solution, choose, standard

FEW = STRENGTHS[3::9]
MODES = ("two", "several", "multi")


def made(mode: str, seed: int, images: int = 60, values: int = 8, *, separable: bool = False) -> tuple[Tensor, Tensor]:
    """(vectors of unequal scale, correlated, one of them constant; labels, each with and without some image)."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(images, values)) @ random.normal(size=(values, values)) * random.lognormal(0, 2, values)
    x[:, 0] = 3.7
    names = {"two": 2, "several": 4, "multi": 3}[mode]
    told = x[:, 1:] / x[:, 1:].std(0) @ random.normal(size=(values - 1, names))
    told = told + (0 if separable else 3) * random.gumbel(size=told.shape)
    if mode == "multi":
        labels = (told > np.median(told, axis=0) + np.arange(names)).astype(np.uint8)
        labels[:2] = [[0] * names, [1] * names]
    else:
        labels = np.eye(names, dtype=np.uint8)[told.argmax(1)]
        labels[:names] = np.eye(names)
    return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(labels)


def path_of(vectors: Tensor, labels: Tensor, mode: str) -> Path:
    return Path(vectors, labels, *standard(vectors), multi=mode == "multi")


def standardised(vectors: Tensor) -> np.ndarray:
    mean, scale = standard(vectors)
    return ((vectors.double() - mean) * scale).numpy()


def said(solution: Solution, vectors: Tensor, mode: str) -> Tensor:
    logits = torch.from_numpy(standardised(vectors)) @ solution.weight.T + solution.bias
    return logits.sigmoid() if mode == "multi" else logits.softmax(1)


def sklearns(vectors: Tensor, labels: Tensor, mode: str, c: float) -> tuple[np.ndarray, np.ndarray]:
    """(weight, bias) as scikit-learn finds them; of two labels those of the second."""
    x, y = standardised(vectors), labels.numpy()
    fits = [y[:, i] for i in range(y.shape[1])] if mode == "multi" else [y.argmax(1)]
    models = [LogisticRegression(C=c, tol=1e-10, max_iter=100_000).fit(x, own) for own in fits]
    weight, bias = (np.concatenate([getattr(m, name) for m in models]) for name in ("coef_", "intercept_"))
    return weight, bias - bias.mean() if mode == "several" else bias


@settings(max_examples=24, deadline=None)
@given(
    mode=st.sampled_from(MODES), seed=st.integers(0, 1000), sizes=st.sampled_from([(60, 8), (200, 5), (25, 40)]),
    c=st.sampled_from([1e-3, 0.1, 1.0, 30.0]),
)  # fmt: skip
def test_solutions_are_those_of_scikit_learn(mode: str, seed: int, sizes: tuple[int, int], c: float) -> None:
    vectors, labels = made(mode, seed, *sizes)
    path = path_of(vectors, labels, mode)
    (found,) = path.solutions([c])
    found = path.polished(found)
    weight, bias = sklearns(vectors, labels, mode, c)
    own, own_bias = found.weight.numpy(), found.bias.numpy()
    if mode == "two":
        own, own_bias = own[1:] - own[:1], own_bias[1:] - own_bias[:1]
    assert np.linalg.norm(own - weight) <= 1e-3 * np.linalg.norm(weight)
    assert np.allclose(own_bias, bias, rtol=1e-3, atol=1e-3)


@settings(max_examples=30, deadline=None)
@given(
    mode=st.sampled_from(MODES), seed=st.integers(0, 1000), separable=st.booleans(),
    sizes=st.sampled_from([(60, 8), (25, 40), (9, 3)]),
)  # fmt: skip
def test_the_gradient_is_zero_along_the_whole_path(
    mode: str, seed: int, separable: bool, sizes: tuple[int, int]
) -> None:
    vectors, labels = made(mode, seed, *sizes, separable=separable)
    path = path_of(vectors, labels, mode)
    x, y = torch.from_numpy(standardised(vectors)), labels.double()
    for solution in map(path.polished, path.solutions(FEW)):
        residual = said(solution, vectors, mode) - y
        twice = 2 if mode == "two" else 1  # two labels share one weight: its square is half of that of both
        gradient = solution.c * x.T @ residual + twice * solution.weight.T
        assert gradient.abs().max() <= 1e-6 * max(1.0, float(solution.weight.abs().max())) + 1e-9 * solution.c
        assert residual.sum(0).abs().max() <= 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_the_path_as_it_goes_says_what_polished_solutions_say(mode: str) -> None:
    for separable in (False, True):
        vectors, labels = made(mode, 5, 150, 30, separable=separable)
        others, _ = made(mode, 6, 50, 30)
        path = path_of(vectors, labels, mode)
        mean, scale = standard(vectors)
        for solution in path.solutions():
            x = ((others.double() - mean) * scale).clamp(-5, 5)
            one, other = (x @ s.weight.T + s.bias for s in (solution, path.polished(solution)))
            for link in (torch.sigmoid,) if mode == "multi" else (lambda v: v.softmax(1),):
                assert (link(one) - link(other)).abs().max() < 0.005


@settings(max_examples=15, deadline=None)
@given(mode=st.sampled_from(MODES), seed=st.integers(0, 1000), separable=st.booleans())
def test_order_and_repetition_of_images_change_nothing(mode: str, seed: int, separable: bool) -> None:
    vectors, labels = made(mode, seed, 40, 6, separable=separable)
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(40, generator=random)
    values, names = torch.randperm(6, generator=random), torch.randperm(labels.shape[1], generator=random)
    c = 0.5
    (plain,) = map((first := path_of(vectors, labels, mode)).polished, first.solutions([c]))
    (moved,) = map(
        (second := path_of(vectors[order][:, values], labels[order][:, names], mode)).polished, second.solutions([c])
    )
    (thrice,) = map(
        (third := path_of(vectors.repeat(3, 1), labels.repeat(3, 1), mode)).polished, third.solutions([c / 3])
    )
    assert torch.allclose(moved.weight, plain.weight[names][:, values], atol=1e-6)
    assert torch.allclose(moved.bias, plain.bias[names], atol=1e-6)
    assert torch.allclose(thrice.weight, plain.weight, atol=1e-6)


def test_several_labels_are_solved_each_for_itself() -> None:
    vectors, labels = made("multi", 8, 80, 6)
    path = path_of(vectors, labels, "multi")
    for together in map(path.polished, path.solutions(FEW)):
        for place in range(3):
            alone = path_of(vectors, labels[:, [place]], "multi")
            (own,) = map(alone.polished, alone.solutions([together.c]))
            assert torch.allclose(together.weight[place], own.weight[0], rtol=1e-5, atol=1e-8)


def test_a_noisy_label_does_not_stop_the_search_for_one_that_can_be_separated() -> None:
    noisy, labels = made("multi", 9, 300, 12)
    told = torch.from_numpy(standardised(noisy))[:, 3] > 1
    labels[:, 0] = told.to(torch.uint8)
    path = path_of(noisy, labels, "multi")
    for solution in path.solutions():
        exact = path.polished(solution)
        assert (said(solution, noisy, "multi") - said(exact, noisy, "multi")).abs().max() < 0.005


def test_a_path_is_the_same_each_time() -> None:
    vectors, labels = made("several", 2)
    one, other = (list(path_of(vectors, labels, "several").solutions()) for _ in range(2))
    assert all(torch.equal(a.weight, b.weight) and torch.equal(a.bias, b.bias) for a, b in zip(one, other, strict=True))


def test_values_that_do_not_change_have_no_weight() -> None:
    vectors, labels = made("two", 1)
    vectors[:, 2] = 1000 + 1e-4 * torch.rand(len(vectors))
    mean, scale = standard(vectors)
    assert scale[0] == scale[2] == 0 and (scale[[1, 3]] > 0).all()
    (found,) = Path(vectors, labels, mean, scale, multi=False).solutions([1e5])
    assert (found.weight[:, [0, 2]] == 0).all() and found.weight.isfinite().all()
    nothing = Path(torch.ones(6, 3), labels[:6], *standard(torch.ones(6, 3)), multi=False)
    (prior,) = nothing.solutions([1.0])
    assert torch.allclose(prior.bias.softmax(0), labels[:6].double().mean(0))


def test_labels_that_no_training_image_has_are_never_found() -> None:
    vectors, labels = made("several", 3)
    wide = torch.cat([labels, torch.zeros(len(labels), 1, dtype=torch.uint8)], 1)
    for mode in ("several", "multi"):
        for own, other in zip(
            path_of(vectors, wide, mode).solutions(FEW), path_of(vectors, labels, mode).solutions(FEW), strict=True
        ):
            assert torch.equal(own.weight[:-1], other.weight) and (own.weight[-1] == 0).all()
            assert own.bias[-1] == -NEVER and (said(own, vectors, mode)[:, -1] == 0).all()
    every = torch.cat([labels, torch.ones(len(labels), 1, dtype=torch.uint8)], 1)
    (own,) = path_of(vectors, every, "multi").solutions([1.0])
    assert (said(own, vectors, "multi")[:, -1] == 1).all()


def test_one_image_of_a_label_is_enough() -> None:
    vectors, _ = made("two", 4)
    labels = torch.zeros(len(vectors), 2, dtype=torch.uint8)
    labels[:, 0] = 1
    labels[7] = torch.tensor([0, 1])
    path = path_of(vectors, labels, "two")
    for solution in path.solutions():
        assert said(solution, vectors, "two")[:, 1].argmax() == 7


def test_labels_that_can_not_be_learnt_are_refused() -> None:
    vectors, labels = made("two", 4)
    with pytest.raises(ProbeError, match="same labels"):
        path_of(vectors, torch.tensor([[0, 1]]).repeat(len(vectors), 1), "two")
    with pytest.raises(ProbeError, match="same labels"):
        path_of(vectors, torch.zeros(len(vectors), 2), "multi")
    with pytest.raises(ProbeError, match="same labels"):
        Path(vectors[:0], labels[:0], *standard(vectors), multi=False)
    with pytest.raises(ShapeError, match="several labels, or none"):
        path_of(vectors, torch.ones(len(vectors), 2), "two")
    with pytest.raises(ShapeError, match="255"):
        path_of(vectors, torch.full((len(vectors), 2), 255), "multi")
    with pytest.raises(ShapeError, match="wanted labels of 60 images"):
        path_of(vectors, labels[1:], "two")
    vectors[3, 3] = math.inf
    with pytest.raises(ProbeError, match="not finite"):
        standard(vectors)


@pytest.mark.parametrize(
    "scores, chosen, end",
    [
        ({0: 0.5, 1: 0.7, 2: 0.7, 3: 0.6}, 1, None),
        ({0: 0.7, 1: 0.7, 2: 0.7, 3: 0.7}, 0, "strongest"),
        ({0: 0.1, 1: math.nan, 2: math.nan, 3: 0.2}, 3, "weakest"),
        ({0: math.nan, 1: -0.3, 2: math.nan, 3: math.nan}, 1, None),
        ({0: math.nan, 1: math.nan, 2: math.nan, 3: math.nan}, 2, None),
    ],
)
def test_the_best_of_the_path_is_chosen_the_strongest_of_equals(
    scores: dict[int, float], chosen: int, end: str | None
) -> None:
    strengths = (1e-4, 1e-2, 0.9, 1e3)
    vectors, labels = made("two", 0)
    path = path_of(vectors, labels, "two")
    found, decided = choose(path, lambda s: scores[strengths.index(s.c)], strengths)
    assert decided == {"C": strengths[chosen], "tried": 4, "end": end}
    assert found.c == strengths[chosen]


def test_strengths_are_a_path_from_strong_to_weak() -> None:
    assert len(STRENGTHS) == 40 and np.allclose(STRENGTHS, np.logspace(-6, 5, 40), rtol=1e-12)
