"""Heads, losses, training, saved heads: held against the plain formula, and against live features."""

import errno
import itertools
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import PoolingBackbone, filled_cache, make_cache, options, recipe_of
from helpers import extract as extract_into
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix as sklearn_confusion
from sklearn.metrics import jaccard_score
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, cross_entropy, interpolate, one_hot

from featprobe.backbones.backbone import load_backbone
from featprobe.cache import Cache
from featprobe.cache.reader import FeatureLoader
from featprobe.datasets.images.reading import frame_image, read_levels
from featprobe.datasets.names import name_of
from featprobe.errors import CacheError, CacheIncompleteError, DiskError, ProbeError, ShapeError
from featprobe.features import Features, cell_shares
from featprobe.geometry import Placement, place
from featprobe.kinds import TrainRecipe
from featprobe.levels import FeatureLevel
from featprobe.metrics import confusion_matrix, iou_scores
from featprobe.probes import (
    CurvePoint,
    HeadRecipe,
    LinearHead,
    append_row,
    build_head,
    fingerprint,
    image_loss,
    inverse_sqrt_weights,
    level_loss,
    load_head,
    logits_at_original,
    parameter_count,
    predict_classes,
    save_head,
    start_at_prior,
)
from featprobe.probes.linear import EPSILON, MOMENTUM
from featprobe.probes.train import batches_of, learning_rate, train
from featprobe.specs import BackboneSpec, FeatureRecipe
from featprobe.stages.extraction.make_cache import extract_with
from featprobe.stages.extraction.run_log import extraction_seconds
from featprobe.stages.training.forecast import rehearsed
from featprobe.stages.training.probe import find_caches, probe
from featprobe.stages.training.probe_options import ProbeOptions
from featprobe.stages.workspace import Workspace, make_generated
from featprobe.targets import IGNORE

LEVELS = (FeatureLevel("stride4", 5, 4), FeatureLevel("stride8", 7, 8), FeatureLevel("stride16", 11, 16))
FRAME = (32, 48)
CLASSES = ("background", "pore", "crack")
SEMSEG = HeadRecipe("semseg", "linear", CLASSES)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_features(batch: int = 3, content: list[list[int]] | None = None, seed: int = 0) -> Features:
    """float64 features whose channels differ in mean and spread."""
    rng = generator(seed)
    maps = {}
    for level in LEVELS:
        x = torch.randn(batch, level.channels, *level.cells(FRAME), generator=rng, dtype=torch.float64)
        spread = torch.rand(2, level.channels, 1, 1, generator=rng, dtype=torch.float64)
        maps[level.name] = x * (0.2 + 2 * spread[0]) + 4 * spread[1] - 2
    return Features(maps, FRAME, None if content is None else torch.tensor(content, dtype=torch.int32))


def trained_looking(seed: int = 0) -> LinearHead:
    """A float64 head none of whose parameters is still what it was initialised to."""
    head = LinearHead(LEVELS, len(CLASSES)).double()
    rng = generator(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng, dtype=torch.float64))
        for norm in head.norms.children():
            norm.running_mean.copy_(torch.randn(norm.running_mean.shape, generator=rng))  # type: ignore[operator,union-attr]
            norm.running_var.copy_(0.5 + torch.rand(norm.running_var.shape, generator=rng))  # type: ignore[operator,union-attr]
    return head


def twin(head: LinearHead) -> tuple[dict[str, nn.BatchNorm2d], nn.Parameter, nn.Parameter]:
    """torch's own BatchNorm per level, one weight over all channels and one bias, of the same values."""
    norms = {}
    for level in LEVELS:
        norm, own = nn.BatchNorm2d(level.channels).double(), head.norms[level.name]
        norm.load_state_dict(own.state_dict(), strict=False)
        norms[level.name] = norm.train(head.training)
    weight = nn.Parameter(torch.cat([head.weights[level.name].detach() for level in LEVELS], 1).clone())
    return norms, weight, nn.Parameter(head.bias.detach().clone())


def concatenate_then_convolve(
    norms: dict[str, nn.BatchNorm2d], weight: Tensor, bias: Tensor, features: Features
) -> Tensor:
    """The linear head as papers write it."""
    grid = LEVELS[0].cells(FRAME)
    upsampled = [
        interpolate(norms[level.name](features.maps[level.name]), grid, mode="bilinear", align_corners=False)
        for level in LEVELS
    ]
    return conv2d(torch.cat(upsampled, 1), weight[:, :, None, None], bias)


# ---- the linear head -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_the_linear_head_is_concatenate_then_convolve_in_value_and_gradient(training: bool) -> None:
    head, features = trained_looking().train(training), random_features()
    norms, weight, bias = twin(head)
    found, wanted = head(features), concatenate_then_convolve(norms, weight, bias, features)
    assert found.shape == (3, len(CLASSES), 8, 12)
    assert (found - wanted).abs().max() < 1e-10
    slope = torch.randn(wanted.shape, generator=generator(5), dtype=torch.float64)
    (found * slope).sum().backward()
    (wanted * slope).sum().backward()
    assert weight.grad is not None and bias.grad is not None and head.bias.grad is not None
    assert (head.bias.grad - bias.grad).abs().max() < 1e-10
    split = weight.grad.split([level.channels for level in LEVELS], 1)
    for level, own in zip(LEVELS, split, strict=True):
        assert (head.weights[level.name].grad - own).abs().max() < 1e-10
        for name in ("weight", "bias"):
            mine, theirs = (getattr(norm[level.name], name).grad for norm in (head.norms, norms))
            assert (mine - theirs).abs().max() < 1e-10
        for name in ("running_mean", "running_var"):
            mine, theirs = (getattr(norm[level.name], name) for norm in (head.norms, norms))
            assert (mine - theirs).abs().max() < 1e-10


def test_gradients_reach_the_features_too_for_fine_tuning() -> None:
    head, features = trained_looking().train(), random_features()
    for m in features.maps.values():
        m.requires_grad_(True)
    head(features).square().sum().backward()
    found = {name: m.grad for name, m in features.maps.items()}
    for m in features.maps.values():
        m.grad = None
    concatenate_then_convolve(*twin(head), features).square().sum().backward()
    for name, m in features.maps.items():
        assert m.grad is not None
        assert (found[name] - m.grad).abs().max() < 1e-8 * m.grad.abs().max()  # type: ignore[operator]


CONTENT = [[32, 48], [16, 48], [32, 16]]  # whole cells at every stride


def test_statistics_under_padding_are_batch_norms_over_the_cells_of_the_images_alone() -> None:
    head, features = trained_looking().train(), random_features(content=CONTENT)
    before = {name: norm.running_mean.clone() for name, norm in head.norms.items()}  # type: ignore[union-attr,operator]
    head(features)
    for level in LEVELS:
        cells = [
            features.maps[level.name][i, :, : height // level.stride, : width // level.stride].flatten(1)
            for i, (height, width) in enumerate(CONTENT)
        ]
        valid = torch.cat(cells, 1)  # (channels, cells)
        norm: Any = head.norms[level.name]
        mean = (1 - MOMENTUM) * before[level.name] + MOMENTUM * valid.mean(1)
        assert (norm.running_mean - mean).abs().max() < 1e-10
        scale, shift = norm(features.maps[level.name].flatten(2), features.valid_share(level.stride).flatten(1))  # type: ignore[union-attr]
        by_hand = norm.weight / (valid.var(1, unbiased=False) + EPSILON).sqrt()
        assert (scale - by_hand).abs().max() < 1e-10
        assert (shift - (norm.bias - valid.mean(1) * by_hand)).abs().max() < 1e-10


def test_a_cell_that_is_half_padding_counts_half() -> None:
    norm: Any = LinearHead([FeatureLevel("stride4", 1, 4)], 2).norms["stride4"]
    x = torch.tensor([[[1.0, 2.0, 6.0, 100.0]]])
    norm(x, torch.tensor([[1.0, 1.0, 0.5, 0.0]]))
    assert float(norm.running_mean) == pytest.approx(MOMENTUM * (1 + 2 + 3) / 2.5)


sides = st.tuples(st.integers(1, FRAME[0]), st.integers(1, FRAME[1]))


@settings(max_examples=25, deadline=None)
@given(
    content=st.lists(sides, min_size=2, max_size=3), training=st.booleans(), loss_at=st.sampled_from(["level", "image"])
)
def test_what_lies_in_the_padding_has_no_influence(
    content: list[tuple[int, int]], training: bool, loss_at: str
) -> None:
    features = random_features(len(content), [list(size) for size in content])
    labels = torch.randint(0, 3, (len(content), *FRAME), generator=generator(1)).to(torch.uint8)
    for image, (height, width) in zip(labels, content, strict=True):
        image[height:] = IGNORE
        image[:, width:] = IGNORE
    changed = {}
    for level in LEVELS:
        share = features.valid_share(level.stride)
        assert share is not None
        changed[level.name] = torch.where(share[:, None] == 0, 1000.0, features.maps[level.name])
    results = []
    for maps in (features.maps, changed):
        head = trained_looking().train(training)
        logits = head(Features(maps, FRAME, features.content))
        if loss_at == "level":
            value = level_loss(logits, cell_shares(labels, 3, 4).double())
        else:
            value = image_loss(logits, labels)
        value.backward()
        tensors = [value.detach(), *head.buffers(), *(p.grad for p in head.parameters())]
        at_original = [
            logits_at_original(own, 4, Placement(size, size, FRAME)) for own, size in zip(logits, content, strict=True)
        ]
        results.append([*tensors, *at_original])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-9, rtol=1e-9)  # type: ignore[arg-type]


def test_half_precision_features_are_taken_as_they_are() -> None:
    head = trained_looking().float().eval()
    features = random_features()
    half = features.to("cpu", torch.float16)
    assert torch.equal(head(half), head(half.to("cpu", torch.float32)))


def test_a_head_says_what_training_moves() -> None:
    head = build_head(SEMSEG, LEVELS)
    channels = 5 + 7 + 11
    assert parameter_count(head) == 3 * channels + 3 + 2 * channels
    assert head.levels == LEVELS and head.stride == 4
    some = build_head(replace(SEMSEG, levels=("stride16", "stride8")), LEVELS)
    assert some.levels == LEVELS[1:] and some.stride == 8


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"task": "semsg"}, "no task 'semsg'. Did you mean semseg"),
        ({"kind": "linnear"}, "no semseg head 'linnear'. Did you mean linear"),
        ({"classes": ("background",)}, "at least one class"),
        ({"levels": ("stride2",)}, "no level 'stride2' here"),
    ],
)
def test_a_head_that_can_not_be_built_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ProbeError) as error:
        build_head(replace(SEMSEG, **change), LEVELS)
    assert said in str(error.value)


# ---- losses and labels -----------------------------------------------------------------------------------------------

label_maps = st.tuples(st.integers(0, 10**6), st.sampled_from([2, 4, 8]), st.integers(1, 4), st.floats(0, 1))


def random_labels(seed: int, stride: int, classes: int, ignored: float) -> Tensor:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, (2, 2 * stride, 3 * stride), dtype=np.uint8)
    labels[rng.random(labels.shape) < ignored] = IGNORE
    return torch.from_numpy(labels)


@given(made=label_maps)
def test_shares_of_a_cell_are_areas_and_sum_to_what_is_not_ignored(made: tuple[int, int, int, float]) -> None:
    seed, stride, classes, ignored = made
    labels = random_labels(seed, stride, classes, ignored)
    shares = cell_shares(labels, classes, stride)
    assert shares.shape == (2, classes, 2, 3) and shares.dtype == torch.float32
    one = one_hot(labels.long().clamp(max=classes), classes + 1).movedim(-1, 1).float()
    assert torch.equal(shares, avg_pool2d(one, stride)[:, :classes])
    valid = avg_pool2d((labels != IGNORE).float()[:, None], stride)[:, 0]
    assert torch.allclose(shares.sum(1), valid, atol=1e-6)


def test_labels_that_do_not_tile_are_refused() -> None:
    with pytest.raises(ShapeError, match="do not tile"):
        cell_shares(torch.zeros(1, 6, 8, dtype=torch.uint8), 2, 4)


def test_the_level_loss_by_hand_with_ignore_and_class_weights() -> None:
    logits = torch.log(torch.tensor([[[[0.5, 0.9]], [[0.5, 0.1]]]]))  # two cells, two classes
    shares = torch.tensor([[[[0.25, 0.5]], [[0.5, 0.0]]]])  # a quarter of the first ignored, half of the second
    weights = torch.tensor([1.0, 3.0])
    wanted = (0.25 * np.log(2) + 3 * 0.5 * np.log(2) + 0.5 * -np.log(0.9)) / (0.25 + 1.5 + 0.5)
    assert float(level_loss(logits, shares, weights)) == pytest.approx(wanted, rel=1e-6)


@given(made=label_maps, weighted=st.booleans())
def test_the_level_loss_is_the_pixel_loss_of_nearest_upsampling(
    made: tuple[int, int, int, float], weighted: bool
) -> None:
    seed, stride, classes, ignored = made
    labels = random_labels(seed, stride, classes, ignored)
    logits = torch.randn(2, classes, 2, 3, generator=generator(seed), dtype=torch.float64, requires_grad=True)
    weights = torch.rand(classes, generator=generator(seed), dtype=torch.float64) + 0.1 if weighted else None
    found = level_loss(logits, cell_shares(labels, classes, stride).double(), weights)
    (gradient,) = torch.autograd.grad(found, logits)
    if bool((labels == IGNORE).all()):
        assert float(found.detach()) == 0 and not gradient.any()
        return
    upsampled = interpolate(logits, labels.shape[1:], mode="nearest")
    wanted = cross_entropy(upsampled, labels.long(), weights, ignore_index=IGNORE)
    assert torch.allclose(found, wanted, atol=1e-9)
    assert torch.allclose(gradient, torch.autograd.grad(wanted, logits)[0], atol=1e-9)


def test_dice_and_focal_by_hand_and_their_sums() -> None:
    logits = torch.log(torch.tensor([[[[0.5, 0.9]], [[0.5, 0.1]]]], dtype=torch.float64))
    shares = torch.tensor([[[[0.25, 1.0]], [[0.5, 0.0]]]], dtype=torch.float64)
    weights = torch.tensor([1.0, 3.0], dtype=torch.float64)
    first = 1 - 2 * (0.5 * 0.25 + 0.9) / (0.5 * 0.75 + 0.9 + 1.25)
    second = 1 - 2 * (0.5 * 0.5) / (0.5 * 0.75 + 0.1 + 0.5)
    assert float(level_loss(logits, shares, None, "dice")) == pytest.approx((first + second) / 2, rel=1e-9)
    focal = (0.25 * 0.25 * np.log(2) + 3 * 0.5 * 0.25 * np.log(2) + 0.01 * -np.log(0.9)) / (0.25 + 1.5 + 1.0)
    assert float(level_loss(logits, shares, weights, "focal")) == pytest.approx(focal, rel=1e-9)
    parts = [float(level_loss(logits, shares, weights, term)) for term in ("ce", "dice", "focal")]
    assert float(level_loss(logits, shares, weights, "ce+dice+focal")) == pytest.approx(sum(parts), rel=1e-9)


@given(made=label_maps, loss=st.sampled_from(["dice", "focal", "ce+dice"]))
def test_every_loss_at_the_level_is_that_of_nearest_upsampling_at_the_image(
    made: tuple[int, int, int, float], loss: str
) -> None:
    seed, stride, classes, ignored = made
    labels = random_labels(seed, stride, classes, ignored)
    logits = torch.randn(2, classes, 2, 3, generator=generator(seed), dtype=torch.float64)
    weights = torch.rand(classes, generator=generator(seed), dtype=torch.float64) + 0.1
    found = level_loss(logits, cell_shares(labels, classes, stride).double(), weights, loss)
    upsampled = interpolate(logits, labels.shape[1:], mode="nearest")
    assert float(found) == pytest.approx(float(image_loss(upsampled, labels, weights, loss)), abs=1e-9)


def test_a_class_that_a_batch_lacks_takes_no_part_in_dice() -> None:
    logits = torch.randn(1, 3, 2, 2, generator=generator(0))
    shares = torch.zeros(1, 3, 2, 2)
    shares[:, 0] = 1
    assert torch.isclose(level_loss(logits, shares, None, "dice"), 1 - 2 * logits.softmax(1)[:, 0].sum() /
                         (logits.softmax(1)[:, 0].sum() + 4))  # fmt: skip
    assert float(level_loss(logits, torch.zeros(1, 3, 2, 2), None, "ce+dice+focal")) == 0


def test_torchs_loss_with_class_probabilities_would_be_another() -> None:
    """The reason for a loss of our own."""
    labels = random_labels(3, 4, 3, 0.4)
    logits = torch.randn(2, 3, 2, 3, generator=generator(0))
    shares = cell_shares(labels, 3, 4)
    assert abs(float(level_loss(logits, shares) - cross_entropy(logits, shares))) > 0.1


@given(made=label_maps)
def test_the_image_loss_is_the_mean_over_labelled_pixels(made: tuple[int, int, int, float]) -> None:
    seed, stride, classes, ignored = made
    labels = random_labels(seed, stride, classes, ignored)
    logits = torch.randn(2, classes, 2, 3, generator=generator(seed), dtype=torch.float64)
    weights = torch.rand(classes, generator=generator(seed), dtype=torch.float64) + 0.1
    found = float(image_loss(logits, labels, weights))
    likelihood = interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False).log_softmax(1)
    counted = labels != IGNORE
    true = labels.long()[counted]
    picked = likelihood.movedim(1, -1)[counted].gather(1, true[:, None])[:, 0]
    total = float(weights[true].sum())
    assert found == pytest.approx(float(-(weights[true] * picked).sum()) / total if total else 0.0, abs=1e-9)


def test_a_loss_refuses_shares_of_another_grid() -> None:
    with pytest.raises(ShapeError, match="disagree"):
        level_loss(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 2, 2))


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=6).filter(any))
def test_class_weights_leave_the_average_pixels_weight_at_1(counts: list[int]) -> None:
    pixels = torch.tensor(counts, dtype=torch.float64)
    weights = inverse_sqrt_weights(pixels).double()
    assert float((weights * pixels).sum() / pixels.sum()) == pytest.approx(1, rel=1e-5)
    order = sorted((count, float(w)) for count, w in zip(counts, weights, strict=True) if count)
    assert all(a[1] >= b[1] for a, b in pairwise(order))


def test_a_head_begins_by_predicting_how_often_classes_occur() -> None:
    head = build_head(SEMSEG, LEVELS)
    start_at_prior(head, torch.tensor([900.0, 90.0, 10.0]))
    assert torch.allclose(head.bias.softmax(0), torch.tensor([0.9, 0.09, 0.01]))  # type: ignore[operator,union-attr]
    start_at_prior(head, torch.tensor([1000.0, 0.0, 10.0]), torch.tensor([1.0, 1.0, 5.0]))
    assert head.bias.isfinite().all()  # type: ignore[operator,union-attr]


# ---- back to the original image --------------------------------------------------------------------------------------


@given(
    rows=st.integers(1, 5), columns=st.integers(1, 5), stride=st.sampled_from([4, 8, 14]), scale=st.sampled_from([1, 2])
)
def test_logits_at_the_original_are_bilinear_where_the_image_fills_the_frame(
    rows: int, columns: int, stride: int, scale: int
) -> None:
    logits = torch.randn(3, rows, columns, generator=generator(rows * 7 + columns))
    frame = (rows * stride, columns * stride)
    original = (frame[0] * scale, frame[1] * scale)
    found = logits_at_original(logits, stride, Placement(original, frame, frame))
    wanted = interpolate(logits[None], original, mode="bilinear", align_corners=False)[0]
    assert torch.allclose(found, wanted, atol=1e-5)


@given(
    original=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    asked=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    fit=st.sampled_from(["resize", "letterbox"]),
    stride=st.sampled_from([4, 16]),
)
def test_padded_cells_never_reach_the_original(
    original: tuple[int, int], asked: tuple[int, int], fit: Any, stride: int
) -> None:
    placed = place(original, asked, fit, 16)
    rows, columns = (side // stride for side in placed.frame)
    logits = torch.full((2, rows, columns), float("nan"))
    held = [-(-side // stride) for side in placed.content]
    logits[:, : held[0], : held[1]] = torch.randn(2, held[0], held[1], generator=generator(1))
    found = logits_at_original(logits, stride, placed)
    assert found.shape == (2, *original) and found.isfinite().all()
    assert torch.equal(predict_classes(logits, stride, placed).long(), found.argmax(0))


def test_a_coarse_map_comes_back_where_it_was() -> None:
    """A left half of one class, letterboxed into the upper part of the frame, is the left half of the original."""
    placed = place((50, 100), (64, 64), "letterbox", 32)
    logits = torch.zeros(2, 16, 16)
    logits[1, :, :8] = 5
    logits[0, :, 8:] = 5
    predicted = predict_classes(logits, 4, placed)
    assert predicted.dtype == torch.uint8 and predicted.shape == (50, 100)
    assert (predicted[:, :50] == 1).all() and (predicted[:, 50:] == 0).all()


# ---- training --------------------------------------------------------------------------------------------------------


@given(iterations=st.integers(1, 400), warmup=st.floats(0, 0.9))
def test_the_learning_rate_rises_to_its_peak_once_and_falls_to_0(iterations: int, warmup: float) -> None:
    recipe = TrainRecipe(iterations=iterations, warmup=warmup)
    factors = [learning_rate(step, recipe) for step in range(iterations)]
    peak = factors.index(max(factors))
    assert max(factors) == 1
    assert all(0 <= factor <= 1 for factor in factors)
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert factors[0] > 0
    assert factors[-1] == pytest.approx(0, abs=1e-9) or peak == iterations - 1


@given(count=st.integers(1, 40), size=st.integers(1, 50), iterations=st.integers(1, 60), seed=st.integers(0, 5))
def test_batches_use_every_row_equally_often_in_an_order_of_the_seed(
    count: int, size: int, iterations: int, seed: int
) -> None:
    rows = np.arange(count, dtype=np.intp) * 3 + 1
    recipe = TrainRecipe(iterations=iterations, batch_size=size)
    batches = [batch.tolist() for batch in batches_of(rows, recipe, seed)]
    assert len(batches) == iterations
    assert {len(batch) for batch in batches} == {min(size, count)}
    used = Counter(row for batch in batches for row in batch)
    assert set(used) <= set(rows.tolist())
    assert max(used.values()) - min(used[row] for row in rows.tolist()) <= 1
    assert batches == [batch.tolist() for batch in batches_of(rows, recipe, seed)]


def test_another_seed_gives_another_order() -> None:
    rows = np.arange(50, dtype=np.intp)
    orders = {str([b.tolist() for b in batches_of(rows, TrainRecipe(iterations=5), seed)]) for seed in range(10)}
    assert len(orders) == 10


@pytest.mark.parametrize(
    "wrong", [{"iterations": 0}, {"batch_size": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"lr": float("inf")},
              {"weight_decay": -1.0}, {"weight_decay": float("nan")}],
)  # fmt: skip
def test_a_recipe_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ProbeError, match=next(iter(wrong))):
        TrainRecipe(**wrong)


def feed_of(features: Features, rows: int) -> Any:
    """A feed that gives the same features for every batch."""

    def feed(orders: Iterable[NDArray[np.intp]], first: int = 0) -> Iterator[tuple[NDArray[np.intp], Features]]:
        for order in orders:
            yield order, features

    return feed


def train_one(
    head: nn.Module,
    feed: Any,
    rows: NDArray[np.intp],
    loss: Callable[[Tensor, NDArray[np.intp]], Tensor],
    recipe: TrainRecipe,
    evaluate: Callable[[nn.Module], dict[str, float]] = lambda head: {},
) -> list[CurvePoint]:
    """Train one head; its loss is of logits and rows."""
    (curve,) = train(
        [head], [recipe], feed, rows, lambda features, batch: loss(head(features), batch)[None], 0,
        lambda: [evaluate(head)],
    )  # fmt: skip
    return curve


def test_a_loss_that_is_not_finite_any_more_stops_training_with_advice() -> None:
    head = build_head(SEMSEG, LEVELS).double()
    with pytest.raises(ProbeError, match=r"smaller --lr than 0\.25"):
        train_one(head, feed_of(random_features(), 3), np.arange(3), lambda logits, rows: logits.sum() * float("nan"),
                  TrainRecipe(iterations=8, lr=0.25))  # fmt: skip


def test_a_trial_that_diverges_is_given_up_and_the_others_go_on() -> None:
    heads = [build_head(SEMSEG, LEVELS).double() for _ in range(2)]
    recipes = [TrainRecipe(iterations=8, lr=lr, evaluations=2) for lr in (0.1, 0.01)]

    def loss(features: Features, rows: NDArray[np.intp]) -> Tensor:
        return torch.stack([heads[0](features).sum() * float("nan"), heads[1](features).square().mean()])

    feed = feed_of(random_features(), 3)
    curves = train(heads, recipes, feed, np.arange(3), loss, 0, lambda: [{"miou": 0.5}] * 2)
    assert [len(curve) for curve in curves] == [0, 2]
    assert all(parameter.isfinite().all() for parameter in heads[1].parameters())


def test_the_curve_has_its_points_and_evaluates_in_eval_mode() -> None:
    head = build_head(SEMSEG, LEVELS).double()
    modes: list[bool] = []

    def evaluate(h: nn.Module) -> dict[str, float]:
        modes.append(h.training)
        return {"miou": 0.5}

    curve = train_one(head, feed_of(random_features(), 3), np.arange(3), lambda logits, rows: logits.square().mean(),
                      TrainRecipe(iterations=20, evaluations=4), evaluate)  # fmt: skip
    assert [point.iteration for point in curve] == [7, 10, 14, 20]
    assert modes == [False] * 4 and not head.training
    assert curve[-1].loss < curve[0].loss


def disc_images(count: int, size: int = 128) -> tuple[Tensor, Tensor]:
    """Bright discs on a dark rough ground, and their masks."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size]
    pictures, masks = [], []
    for i in range(count):
        disc = (x - 50 - 20 * i) ** 2 + (y - 60) ** 2 < 30**2
        grey = 0.3 + 0.05 * rng.standard_normal((size, size)) + 0.4 * disc
        pictures.append(np.repeat(grey[None], 3, 0))
        masks.append(disc)
    return torch.tensor(np.stack(pictures), dtype=torch.float32), torch.tensor(np.stack(masks), dtype=torch.uint8)


@pytest.mark.parametrize("loss_at", ["level", "image"])
def test_a_head_overfits_two_images(loss_at: str) -> None:
    backbone = load_backbone(BackboneSpec("tiny", "test_efficientnet", "random"))
    pictures, masks = disc_images(2)
    with torch.inference_mode():
        features = backbone(pictures)
    features = Features({name: m.clone() for name, m in features.maps.items()}, features.frame)
    head = build_head(HeadRecipe("semseg", "linear", ("background", "disc")), backbone.levels)
    shares = cell_shares(masks, 2, 4)

    def loss(logits: Tensor, rows: NDArray[np.intp]) -> Tensor:
        return level_loss(logits, shares) if loss_at == "level" else image_loss(logits, masks)

    train_one(head, feed_of(features, 2), np.arange(2), loss, TrainRecipe(iterations=150, lr=0.01))
    placed = Placement((128, 128), (128, 128), (128, 128))
    with torch.inference_mode():
        predicted = [predict_classes(logits, 4, placed).numpy() for logits in head(features)]
    matrix = sum(confusion_matrix(m.numpy(), p, 2) for m, p in zip(masks, predicted, strict=True))
    assert iou_scores(matrix).per_class[1] > 0.9  # type: ignore[arg-type]


# ---- live and cached features ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with a small generated set under a real network, once in fp32 and once in fp16."""
    workspace = Workspace(tmp_path_factory.mktemp("space"))
    make_generated("surface", workspace.data / "surface", images=18, size=(96, 128))
    backbone = load_backbone(BackboneSpec("tiny", "test_efficientnet", "random"))
    for dtype in ("fp32", "fp16"):
        data = workspace.data_set("surface")
        extract_with(workspace, backbone, data, options(batch_size=8, dtype=dtype), torch.device("cpu"))
    return workspace


def test_a_head_can_not_tell_cached_features_from_live_ones(tiny_space: Workspace) -> None:
    caches = {cache.recipe.dtype: cache for cache in find_caches(tiny_space, "semseg", (), ())[0]}
    exact = caches["fp32"]
    head = build_head(HeadRecipe("semseg", "linear", exact.data.classes), exact.levels)
    rows = exact.usable("train")
    labels = {r: torch.from_numpy(np.array(exact.semantic(r))) for r in rows.tolist()}
    assert all(label.shape == exact.recipe.frame for label in labels.values())

    def loss(logits: Tensor, batch: NDArray[np.intp]) -> Tensor:
        return level_loss(logits, cell_shares(torch.stack([labels[r] for r in batch.tolist()]), head.classes, 4))  # type: ignore[arg-type]

    with FeatureLoader(exact) as loader:
        train_one(
            head,
            lambda orders, first: loader.batches(orders),
            rows,
            loss,
            TrainRecipe(iterations=60, lr=0.01, batch_size=8),
        )
    everything = np.arange(len(exact))
    live = load_backbone(BackboneSpec("tiny", "test_efficientnet", "random"))
    pictures = [
        frame_image(read_levels(Path(exact.data.root) / row.image), row.placement, exact.recipe) for row in exact.rows
    ]
    with torch.inference_mode():
        wanted = head(live(torch.from_numpy(np.stack(pictures))))
        found = {}
        for dtype, cache in caches.items():
            with FeatureLoader(cache) as loader:
                ((_, features),) = list(loader.batches([everything]))
                assert {m.dtype for m in features.maps.values()} == {getattr(torch, f"float{dtype[2:]}")}
                found[dtype] = head(features)
    assert wanted.std() > 0.5, "the logits are not degenerate"
    error = {dtype: float((logits - wanted).norm() / wanted.norm()) for dtype, logits in found.items()}
    assert error["fp32"] < 1e-5
    assert error["fp16"] < 2e-3
    same = [
        (predict_classes(a, 4, row.placement) == predict_classes(b, 4, row.placement)).float().mean()
        for a, b, row in zip(found["fp16"], wanted, exact.rows, strict=True)
    ]
    assert float(torch.stack(same).mean()) >= 0.999


# ---- the probe stage -------------------------------------------------------------------------------------------------

BRIEF = TrainRecipe(iterations=12, batch_size=4, evaluations=3)


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with a cache of a stand-in for a network."""
    workspace = Workspace(tmp_path_factory.mktemp("pooled"))
    make_generated("surface", workspace.data / "surface", images=18, size=(64, 64))
    extract_into(workspace.root, workspace.data / "surface", PoolingBackbone())
    return workspace


def test_the_test_split_is_read_once_and_never_in_training(
    pooled: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fed: list[list[int]] = []
    plain = FeatureLoader.batches

    def spying(self: FeatureLoader, orders: Any) -> Any:
        for rows, features in plain(self, orders):
            fed.append(rows.tolist())
            yield rows, features

    monkeypatch.setattr(FeatureLoader, "batches", spying)
    report = probe(pooled, options=ProbeOptions(recipe=BRIEF, seeds=1, quiet=True, device="cpu"))
    (cache,), _ = find_caches(pooled, "semseg", (), ())
    split_of = [row.split for row in cache.rows]
    kinds = ["".join(sorted({split_of[row][0:2] for row in batch})) for batch in fed]
    assert set(kinds) == {"tr", "va", "te"}, "no batch mixes splits"
    assert kinds.count("tr") == rehearsed(BRIEF) + BRIEF.iterations
    first_test = kinds.index("te")
    assert set(kinds[first_test:]) == {"te"}
    tested = [row for batch in fed[first_test:] for row in batch]
    assert sorted(tested) == cache.usable("test").tolist()
    validated = Counter(row for batch, kind in zip(fed, kinds, strict=True) if kind == "va" for row in batch)
    timed = Counter(cache.usable("val")[:1].tolist())  # before training, to predict how long it takes
    recorded = 1  # pass after training: bases are tried; memory holds its maps for the calls at the chosen one
    assert validated == timed + Counter(dict.fromkeys(cache.usable("val").tolist(), BRIEF.evaluations + recorded))
    assert report.rows[0]["images"] == {s: len(cache.usable(s)) for s in ("train", "val", "test")}


def test_labels_outside_of_training_never_reach_the_loss(pooled: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test masks painted over change the test score only: weights, curve and validation stay."""
    first = probe(pooled, options=ProbeOptions(recipe=BRIEF, seeds=1, quiet=True, device="cpu")).rows[0]
    first_head, first_card = load_head(pooled.probes / first["folder"])
    plain = Cache.semantic

    def spoiled(self: Cache, row: int) -> NDArray[np.uint8]:
        labels = plain(self, row)
        return np.ones_like(labels) if self.rows[row].split == "test" else labels

    monkeypatch.setattr(Cache, "semantic", spoiled)
    second = probe(pooled, options=ProbeOptions(recipe=BRIEF, seeds=1, quiet=True, device="cpu")).rows[0]
    second_head, second_card = load_head(pooled.probes / second["folder"])
    assert second["test"] != first["test"]
    assert second_card["curve"] == first_card["curve"] and second["train_counts"] == first["train_counts"]
    for name, tensor in first_head.state_dict().items():
        assert torch.equal(tensor, second_head.state_dict()[name])


def test_scores_of_a_row_are_those_of_the_saved_confusion_matrices(pooled: Workspace) -> None:
    row = probe(pooled, options=ProbeOptions(recipe=BRIEF, seeds=1, quiet=True)).rows[0]
    folder = pooled.probes / row["folder"]
    confusions = np.load(folder / "scores.npz")["confusion"]
    assert confusions.shape == (row["images"]["test"], len(row["classes"]), len(row["classes"]))
    scores = iou_scores(confusions.sum(0))
    assert row["test"]["miou"] == scores.miou and row["test"]["miou_foreground"] == scores.miou_foreground
    card = json.loads((folder / "card.json").read_text())
    assert card["result"]["test"]["miou"] == scores.miou
    last = json.loads((pooled.probes / "results.jsonl").read_text().splitlines()[-1])
    assert last["test"]["miou"] == scores.miou and last["version"] == 1


def test_seeds_and_recipes_have_folders_of_their_own_and_heads_differ(pooled: Workspace) -> None:
    rows = [*probe(pooled, options=ProbeOptions(recipe=BRIEF, quiet=True, seeds=2)).rows]
    for changed in (
        {"recipe": replace(BRIEF, lr=0.1)},
        {"split": "group"},
        {"absent": "zero"},
        {"levels": ("stride8",)},
    ):
        rows += probe(pooled, options=ProbeOptions(**{"recipe": BRIEF, "seeds": 1, "quiet": True, **changed})).rows  # type: ignore[arg-type]
    assert len({row["folder"] for row in rows}) == len(rows) == 6
    biases = [load_head(pooled.probes / row["folder"])[0].weights["stride8"] for row in rows[:2]]  # type: ignore[index,union-attr]
    assert not torch.equal(*biases)  # type: ignore[arg-type]
    assert rows[-1]["levels"] == ["stride8"]


def test_a_place_that_can_not_be_written_is_met_before_training(
    pooled: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "probes").write_text("a file where a folder should be")
    monkeypatch.setattr(pooled, "probes", tmp_path / "probes")
    monkeypatch.setattr("featprobe.stages.training.fit.train", None)
    with pytest.raises(ProbeError, match=r"can't be written \(.*\)\. Nothing was trained"):
        probe(pooled, options=ProbeOptions(recipe=BRIEF, seeds=1, quiet=True))


def test_a_torn_log_of_extractions_makes_their_seconds_unknown_and_nothing_else(pooled: Workspace) -> None:
    (cache,), _ = find_caches(pooled, "semseg", (), ())
    log = cache.path.with_suffix(".runs.jsonl")
    whole = log.read_text()
    seconds = extraction_seconds(cache)
    assert seconds is not None and seconds > 0
    try:
        log.write_text(whole + whole[:40])
        assert extraction_seconds(cache) is None
        for forged in ("1e400", "NaN", "-1", "true", "9" * 400, '"x"', "[1]"):
            log.write_text(whole + '{"seconds": {"run": ' + forged + "}}\n")
            assert extraction_seconds(cache) is None, forged
        log.unlink()
        assert extraction_seconds(cache) is None
    finally:
        log.write_text(whole)


# ---- saved heads -----------------------------------------------------------------------------------------------------


def saved(folder: Path, recipe: FeatureRecipe | None = None) -> tuple[nn.Module, FeatureRecipe]:
    """A head of two levels in a folder, with the card that belongs to it."""
    recipe = recipe or recipe_of()
    torch.manual_seed(0)
    head = build_head(SEMSEG, recipe.levels).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    card = {"format": "featprobe-head", "version": 1, "head": SEMSEG.to_json(), "fingerprint": fingerprint(recipe)}
    save_head(folder, head, card, {"scores.npz": b"scores"})
    return head, recipe


def features_of(recipe: FeatureRecipe) -> Features:
    rng = generator(0)
    maps = {v.name: torch.randn(2, v.channels, *v.cells(recipe.frame), generator=rng) for v in recipe.levels}
    return Features(maps, recipe.frame)


def test_a_saved_head_comes_back_equal(tmp_path: Path) -> None:
    head, recipe = saved(tmp_path / "head")
    loaded, card = load_head(tmp_path / "head", recipe)
    features = features_of(recipe)
    assert not loaded.training
    assert torch.equal(loaded(features), head(features))
    assert HeadRecipe(**{k: tuple(v) if isinstance(v, list) else v for k, v in card["head"].items()}) == SEMSEG
    assert sorted(path.name for path in (tmp_path / "head").iterdir()) == [
        "card.json",
        "head.safetensors",
        "scores.npz",
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"backbone": "other"},
        {"weights_sha256": "1" * 64},
        {"levels": (FeatureLevel("stride4", 6, 4), FeatureLevel("stride8", 10, 8))},
        {"final_norm": True},
        {"channels": "grey"},
        {"mean": (0.4, 0.5, 0.5)},
        {"std": (0.4, 0.5, 0.5)},
        {"intensity": "minmax"},
    ],
)
def test_a_head_refuses_features_of_another_kind(tmp_path: Path, change: dict[str, Any]) -> None:
    _, recipe = saved(tmp_path)
    with pytest.raises(ProbeError) as error:
        load_head(tmp_path, replace(recipe, **change))
    assert "was trained on other features" in str(error.value) and next(iter(change)) in str(error.value)


@pytest.mark.parametrize(
    "change",
    [{"label": "renamed"}, {"dtype": "fp32"}, {"size": (64, 64), "frame": (64, 64)}, {"views": ("mirror",)}],
)
def test_a_head_takes_features_of_another_size_format_or_label(tmp_path: Path, change: dict[str, Any]) -> None:
    _, recipe = saved(tmp_path)
    load_head(tmp_path, replace(recipe, **change))


def edit_card(folder: Path, path: str, value: object) -> None:
    card = json.loads((folder / "card.json").read_text())
    *parents, last = path.split(".")
    place_of = card
    for name in parents:
        place_of = place_of[name]
    if value is None:
        del place_of[last]
    else:
        place_of[last] = value
    (folder / "card.json").write_text(json.dumps(card))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("format", "something"),
        ("version", 2),
        ("version", "one"),
        ("head_sha256", "0" * 64),
        ("head_sha256", None),
        ("head.classes", ["background", "pore"]),
        ("head.classes", 7),
        ("head.kind", "fancy"),
        ("head.levels", ["stride4"]),
        ("head", ["semseg"]),
        ("fingerprint.levels", [{"name": "stride4", "channels": 6, "stride": 4}]),
        ("fingerprint.levels", ["stride4"]),
        ("fingerprint.mean", [0, 0, 0]),
        ("fingerprint.std", None),
        ("fingerprint", None),
        ("note", "a word added"),
        ("card_sha256", None),
    ],
)
def test_an_edited_card_is_refused(tmp_path: Path, path: str, value: object) -> None:
    _, recipe = saved(tmp_path)
    edit_card(tmp_path, path, value)
    with pytest.raises(ProbeError, match=str(tmp_path)):
        load_head(tmp_path, recipe)


@pytest.mark.parametrize("file", ["card.json", "head.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00garbage", b"[]", b"null"])
def test_a_damaged_folder_is_refused(tmp_path: Path, file: str, content: bytes | None) -> None:
    saved(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ProbeError, match=str(tmp_path)):
        load_head(tmp_path)


def test_a_folder_without_its_card_is_no_saved_head_while_it_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that dies between two files leaves nothing that could be taken for a head."""
    _, recipe = saved(tmp_path)
    moved = itertools.count()
    replace_one = Path.replace
    monkeypatch.setattr(Path, "replace", lambda *a: 1 / 0 if next(moved) == 1 else replace_one(*a))
    with pytest.raises(ZeroDivisionError):
        saved(tmp_path)
    with pytest.raises(ProbeError):
        load_head(tmp_path, recipe)


def test_a_head_stays_until_the_new_one_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, recipe = saved(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def refuse(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(DiskError, match="What was there before is unchanged"):
        saved(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    load_head(tmp_path, recipe)


# ---- result rows -----------------------------------------------------------------------------------------------------


def append_many(path: str, worker: int, count: int) -> None:
    for i in range(count):
        append_row(Path(path), {"worker": worker, "i": i, "text": "x" * (1 + 997 * i % 5000)})


def test_processes_that_append_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=append_many, args=(str(path), worker, 40)) for worker in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert Counter((row["worker"], row["i"]) for row in rows) == {(w, i): 1 for w in range(4) for i in range(40)}
    for worker in range(4):
        assert [row["i"] for row in rows if row["worker"] == worker] == list(range(40))


def test_a_torn_last_line_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append_row(path, {"a": 1})
    with path.open("a") as stream:
        stream.write('{"version":1,"a":')
    append_row(path, {"a": 2})
    append_row(path, {"a": 3})
    lines = path.read_text().splitlines()
    assert len(lines) == 4
    assert [json.loads(lines[i])["a"] for i in (0, 2, 3)] == [1, 2, 3]


def test_a_score_that_does_not_exist_is_null(tmp_path: Path) -> None:
    append_row(tmp_path / "r.jsonl", {"test": {"iou": {"a": float("nan"), "b": 0.5}, "list": [float("inf")]}})
    row = json.loads((tmp_path / "r.jsonl").read_text(), parse_constant=lambda text: pytest.fail(text))
    assert row["test"] == {"iou": {"a": None, "b": 0.5}, "list": [None]}


# ---- scores ----------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10**6), classes=st.integers(2, 5), absent=st.sampled_from(["zero", "ignore"]))
def test_scores_are_sklearns_also_with_absent_classes(seed: int, classes: int, absent: Any) -> None:
    rng = np.random.default_rng(seed)
    in_truth, in_prediction = (rng.choice(classes, rng.integers(1, classes + 1), replace=False) for _ in range(2))
    truth = rng.choice(in_truth, (6, 9)).astype(np.uint8)
    predicted = rng.choice(in_prediction, (6, 9)).astype(np.uint8)
    ignored = rng.random((6, 9)) < 0.2
    ignored[0, 0] = False
    matrix = confusion_matrix(np.where(ignored, IGNORE, truth).astype(np.uint8), predicted, classes)
    kept = ~ignored
    labels = range(classes)
    assert np.array_equal(matrix, sklearn_confusion(truth[kept], predicted[kept], labels=list(labels)))
    scores = iou_scores(matrix, absent)
    wanted = jaccard_score(truth[kept], predicted[kept], labels=list(labels), average=None, zero_division=0)
    here, there = (np.isin(labels, values[kept]) for values in (truth, predicted))
    counted = here | there if absent == "zero" else here
    assert np.array_equal(np.isnan(scores.per_class), ~counted)
    assert np.allclose(np.array(scores.per_class)[counted], wanted[counted])
    assert scores.miou == pytest.approx(wanted[counted].mean())
    foreground = counted.copy()
    foreground[0] = False
    if foreground.any():
        assert scores.miou_foreground == pytest.approx(wanted[foreground].mean())
    else:
        assert np.isnan(scores.miou_foreground)


def test_a_class_predicted_but_absent_scores_0_or_takes_no_part_as_asked() -> None:
    matrix = np.array([[8, 0, 2], [0, 0, 0], [0, 0, 0]])
    assert iou_scores(matrix, "zero").per_class[::2] == (0.8, 0.0)
    assert (
        iou_scores(matrix, "zero").miou == 0.4 and iou_scores(matrix).miou == iou_scores(matrix, "ignore").miou == 0.8
    )
    assert np.isnan(iou_scores(matrix).per_class[1])


def test_a_confusion_matrix_refuses_masks_of_two_sizes() -> None:
    with pytest.raises(ShapeError, match="disagree"):
        confusion_matrix(np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8), 2)


# ---- which caches ----------------------------------------------------------------------------------------------------


def test_an_incomplete_cache_is_a_note_unless_its_name_then_stands_for_none(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    whole = filled_cache(workspace.cache / "parts-000000" / "some-00000000.h5")
    begun = make_cache(workspace.cache / "parts-000000" / "other-00000000.h5", replace(recipe_of(), label="other"))
    for data, backbones in (((), ()), (("parts",), ()), ((), ("some",)), (("parts",), ("some",))):
        found, notes = find_caches(workspace, "semseg", data, backbones)
        assert [cache.path for cache in found] == [whole.path]
        wanted = [] if backbones else [f"left aside: {begun.path} is not complete: 4 of 4 rows are missing."]
        assert [note.partition(" To finish it")[0] for note in notes] == wanted
        assert all("featprobe extract --backbone other --data parts" in note for note in notes)
    for data, backbones in (((), ("other",)), ((), ("some", "other")), (("parts",), ("some", "other"))):
        with pytest.raises(CacheIncompleteError, match="featprobe extract --backbone other --data parts"):
            find_caches(workspace, "semseg", data, backbones)
    whole.path.unlink()
    for data in ((), ("parts",)):
        with pytest.raises(CacheIncompleteError, match="4 of 4 rows are missing"):
            find_caches(workspace, "semseg", data, ())


def test_a_path_means_the_set_that_lies_there_and_no_other_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace(tmp_path)
    roots = [tmp_path / place / "parts" for place in ("one", "two", "new parts")]
    folders = [workspace.cache_folder(name_of(root), root) for root in roots[:2]]
    for folder in folders:
        filled_cache(folder / "some-00000000.h5")
    for root, folder in zip(roots, folders, strict=False):
        found, _ = find_caches(workspace, "semseg", (str(root),), ())
        assert [cache.path.parent for cache in found] == [folder]
    assert len(find_caches(workspace, "semseg", ("parts",), ())[0]) == 2
    (tmp_path / "one").mkdir()
    monkeypatch.chdir(tmp_path / "one")
    assert [c.path.parent for c in find_caches(workspace, "semseg", ("parts",), ())[0]] == folders[:1], "it lies here"
    with pytest.raises(CacheError, match=r"no cache of the data set '.*new parts/parts'.*Known: parts"):
        find_caches(workspace, "semseg", (str(roots[2]),), ())


def test_a_task_that_no_cache_serves_names_each_set_once(tmp_path: Path) -> None:
    for label in ("some", "other"):
        path = Workspace(tmp_path).cache / "parts-000000" / f"{label}-00000000.h5"
        filled_cache(path, replace(recipe_of(), label=label))
    with pytest.raises(ProbeError, match=r"(?m)^  found   parts: semseg$"):
        find_caches(Workspace(tmp_path), "detect", (), ())
