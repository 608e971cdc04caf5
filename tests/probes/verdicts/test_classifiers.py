"""Heads for labels of images: what they choose, begin at, find and keep in files."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from featprobe.errors import ProbeError
from featprobe.levels import FeatureLevel
from featprobe.probes.cards import HeadRecipe
from featprobe.probes.head import ImageHead
from featprobe.probes.heads import OF_ANOMALIES, OF_IMAGES, build_head
from featprobe.probes.verdicts.classifiers import NEIGHBOURS, KnnClassifier, LinearClassifier

LEVELS = (FeatureLevel("stride8", 3, 8), FeatureLevel("stride16", 2, 16))
VALUES = 10
NAMES = ("good", "scratch", "pore")
KINDS = sorted(OF_IMAGES)


def new(kind: str, names: int = 3) -> ImageHead:
    head = build_head(HeadRecipe("classify", kind, NAMES[:names]), LEVELS)
    assert isinstance(head, ImageHead)
    return head


def some(images: int, seed: int, multi: bool = False, names: int = 3) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    vectors = torch.randn(images, VALUES, generator=random) * torch.arange(1, VALUES + 1) + 5
    told = (vectors - 5)[:, :names] / torch.arange(1, names + 1) + 0.5 * torch.randn(images, names, generator=random)
    labels = (told > 0.3).byte() if multi else torch.eye(names, dtype=torch.uint8)[told.argmax(1)]
    return vectors, labels


def accuracy(labels: Tensor) -> Callable[[Tensor], float]:
    return lambda logits: balanced_accuracy_score(labels.argmax(1).numpy(), logits.argmax(1).numpy())


def hits(labels: Tensor) -> Callable[[Tensor], float]:
    return lambda logits: float(((logits > 0) == labels.bool()).double().mean())


def solved(kind: str, multi: bool = False, seed: int = 0, images: int = 80) -> tuple[ImageHead, Tensor]:
    head = new(kind)
    vectors, labels = some(images, seed, multi)
    val, val_labels = some(40, seed + 1, multi)
    head.solve(vectors, labels, val, hits(val_labels) if multi else accuracy(val_labels), multi=multi)
    return head, val


@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_head_says_the_same_and_keeps_all_that_it_knows(kind: str, multi: bool) -> None:
    head, val = solved(kind, multi)
    head.threshold.fill_(0.25)
    other = new(kind)
    other.load_state_dict(load(save(head.state_dict())))
    assert torch.equal(other(val), head(val)) and head(val).dtype == torch.float32
    assert torch.equal(other.prior, head.prior) and other.threshold == 0.25


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_judged_for_itself_and_the_prior_is_that_of_training(kind: str) -> None:
    head, val = solved(kind)
    _, labels = some(80, 0)
    assert torch.allclose(head.prior, labels.float().mean(0))
    assert torch.allclose(torch.cat([head(part) for part in val.split(7)]), head(val), atol=1e-5)
    assert torch.equal(head(val[:0]), torch.zeros(0, 3))


@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_learnt(kind: str, multi: bool) -> None:
    head, val = solved(kind, multi, images=400)
    _, labels = some(40, 1, multi)
    score = hits if multi else accuracy
    always = head.prior.logit() if multi else head.prior.log()
    assert score(labels)(head(val)) > score(labels)(always.expand(40, 3)) + 0.1


@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_features_that_do_not_change_and_labels_that_nobody_has_do_no_harm(kind: str, multi: bool) -> None:
    vectors, labels = some(30, 3, multi, names=2)
    labels = torch.cat([labels, torch.zeros(30, 1, dtype=torch.uint8)], 1)
    vectors[:, 4] = 1e4
    head = new(kind)
    head.solve(vectors, labels, vectors, lambda logits: 0.0, multi=multi)
    moved = vectors.clone()
    moved[:, 4] = -7
    assert head(vectors).isfinite().all() and torch.allclose(head(moved), head(vectors), atol=1e-5)
    shares = head(vectors).sigmoid() if multi else head(vectors).softmax(1)
    assert shares[:, 2].max() < 1e-6


def test_the_solution_is_what_scikit_learn_finds_at_the_chosen_strength() -> None:
    vectors, labels = some(120, 5)
    val, val_labels = some(60, 6)
    head = LinearClassifier(LEVELS, 3)
    found = head.solve(vectors, labels, val, accuracy(val_labels), multi=False)
    x = head.standardised(vectors).numpy()
    model = LogisticRegression(C=found["C"], tol=1e-10, max_iter=10_000).fit(x, labels.argmax(1).numpy())
    assert np.allclose(head.weight.detach(), model.coef_, atol=1e-3 * np.linalg.norm(model.coef_))
    shares = model.predict_proba(head.standardised(val).numpy())
    assert np.allclose(head(val).softmax(1).detach(), shares, atol=1e-4)


@pytest.mark.parametrize("multi", [False, True])
def test_training_begins_at_the_frequencies_of_the_labels(multi: bool) -> None:
    vectors, labels = some(50, 2, multi)
    labels[:, 2] = 0
    labels[:, 0] = 1 - labels[:, 1] if not multi else labels[:, 0]
    head = LinearClassifier(LEVELS, 3)
    head.begin(vectors, labels, multi=multi)
    logits = head(vectors)
    shares = logits.sigmoid() if multi else logits.softmax(1)
    assert torch.allclose(shares, torch.tensor([*labels.float().mean(0)[:2].tolist(), 0.01]), atol=0.01)
    assert torch.allclose(head.standardised(vectors).mean(0), torch.zeros(VALUES), atol=1e-5)
    assert torch.allclose(head.standardised(vectors).std(0, correction=0), torch.ones(VALUES), atol=1e-5)
    logits.sum().backward()
    assert head.weight.grad is not None and head.bias.grad is not None
    with pytest.raises(ProbeError, match="Take the head linear"):
        KnnClassifier(LEVELS, 3).begin(vectors, labels, multi=multi)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), images=st.integers(6, 60), copies=st.integers(0, 10), multi=st.booleans())
def test_votes_are_those_of_scikit_learns_neighbours(seed: int, images: int, copies: int, multi: bool) -> None:
    vectors, labels = some(images, seed, multi)
    copied = torch.cat([vectors, vectors[:copies]]), torch.cat([labels, labels[:copies].roll(1, 1)])
    queries, _ = some(20, seed + 1)
    queries = torch.cat([queries, vectors[:copies]])
    head = KnnClassifier(LEVELS, 3)
    head.solve(*copied, queries, lambda logits: math.nan, multi=multi)
    bank = head.standardised(copied[0]).double().numpy()
    asked = head.standardised(queries).double().numpy()
    for count in (k for k in NEIGHBOURS if k <= len(bank)):
        head.neighbours.fill_(count)
        shares = head(queries).sigmoid() if multi else head(queries).exp()
        votes = shares * (count + 1) - head.prior
        model = KNeighborsClassifier(count, metric="cosine", algorithm="brute").fit(bank, np.zeros(len(bank)))
        _, places = model.kneighbors(asked)
        wanted = copied[1].numpy()[places].sum(1)
        distances, _ = model.kneighbors(asked, min(count + 1, len(bank)))
        sure = distances[:, -1] - distances[:, count - 1] > 1e-6 if count < len(bank) else np.ones(len(asked), bool)
        assert np.allclose(votes.numpy()[sure], wanted[sure], atol=1e-3 * count)
        assert np.allclose(votes.sum(1), count, atol=1e-3 * count) or multi  # also where images are equally near


@pytest.mark.parametrize(
    "scores, chosen",
    [
        ((0.1, 0.4, 0.4, 0.2), 5),
        ((math.nan, 0.1, float("nan"), 0.0), 3),
        (tuple(float("nan") for _ in range(4)), 9),  # of which none is another
        ((0.5, 0.2, 0.2, 0.2), 1),
    ],
)
def test_the_best_number_of_neighbours_is_chosen_the_most_of_equals(scores: tuple[float, ...], chosen: int) -> None:
    vectors, labels = some(12, 0)
    head, left = KnnClassifier(LEVELS, 3), list(scores)
    found = head.solve(vectors, labels, vectors, lambda logits: left.pop(0), multi=False)
    assert found == {"neighbours": chosen, "tried": 4, "bank": 12, "bank_bytes": 12 * VALUES * 4} and not left
    assert head.neighbours == chosen


@pytest.mark.parametrize(
    ("task", "kind"), [*(("classify", kind) for kind in OF_IMAGES), *(("anomaly", kind) for kind in OF_ANOMALIES)]
)
def test_no_number_of_64_bits_moves_to_a_device_that_may_not_have_them(task: str, kind: str) -> None:
    head = build_head(HeadRecipe(task, kind, NAMES), LEVELS).to("meta")
    left = {name for name, own in head.state_dict().items() if own.device.type == "cpu"}
    wide = {name for name, own in head.state_dict().items() if own.dtype == torch.float64}
    assert left == wide and "threshold" in left


def test_damaged_banks_and_empty_ones_are_refused() -> None:
    head, val = solved("knn")
    good = head.state_dict()
    for damage in (
        {"bank": good["bank"][1:]},
        {"bank": good["bank"][:, 1:]},
        {"votes": good["votes"].float()},
        {"neighbours": torch.tensor(0)},
        {"bank": good["bank"] * math.nan},
    ):
        with pytest.raises(RuntimeError, match=r"bank|votes|neighbours"):
            KnnClassifier(LEVELS, 3).load_state_dict(good | damage)
    with pytest.raises(ProbeError, match="bank is empty"):
        KnnClassifier(LEVELS, 3)(val)
