"""Few large operations compute what pieces compute: heads, losses, training; and how few they are."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import overhead
import pytest
import torch
from _operators import WAITS, operators
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from featprobe.features import Features, cell_shares
from featprobe.kinds import KINDS, TrainRecipe
from featprobe.levels import FeatureLevel
from featprobe.probes import (
    HeadRecipe,
    LinearBank,
    LinearHead,
    ObjectTarget,
    build_head,
    execution,
    image_loss,
    level_loss,
    losses,
)
from featprobe.probes.detections import ObjectBatch
from featprobe.probes.losses import image_losses, level_losses
from featprobe.probes.train import Tuned, evaluation_points, seconds_per_step, train
from featprobe.scores import SCORES
from featprobe.targets import IGNORE

LEVELS = tuple(FeatureLevel(f"stride{s}", c, s) for s, c in ((4, 5), (8, 7), (16, 11)))
ODD = tuple(FeatureLevel(f"stride{s}", c, s) for s, c in ((4, 5), (6, 4)))  # no stride is a multiple of another
FRAME, CLASSES, BATCH = (48, 96), 3, 4
CONTENT = [[48, 96], [20, 96], [48, 31], [1, 50]]
LOSSES = ("ce", "dice", "focal", "ce+dice+focal")
DENSE = [kind.name for kind in KINDS.values() if SCORES[kind.task].dense]


def features_of(levels: Any, padded: bool, dtype: torch.dtype = torch.float64, seed: int = 0) -> Features:
    rng = torch.Generator().manual_seed(seed)
    maps = {v.name: (1 + 2 * torch.randn(BATCH, v.channels, *v.cells(FRAME), generator=rng)).to(dtype) for v in levels}
    return Features(maps, FRAME, torch.tensor(CONTENT, dtype=torch.int32) if padded else None)


def labels_of(padded: bool, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (BATCH, *FRAME), dtype=torch.uint8, generator=rng)
    labels[torch.rand(labels.shape, generator=rng) < 0.1] = IGNORE
    for label, (height, width) in zip(labels, CONTENT if padded else (), strict=padded):
        label[height:] = IGNORE
        label[:, width:] = IGNORE
    return labels


def heads_of(levels: Any, count: int, dtype: torch.dtype = torch.float64) -> list[LinearHead]:
    torch.manual_seed(1)
    heads = [LinearHead(levels, CLASSES).to(dtype).train() for _ in range(count)]
    with torch.no_grad():
        for head in heads:
            for parameter in head.parameters():
                parameter.normal_()
    return heads


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU computes as a GPU does, in one number format."""
    monkeypatch.setattr(execution, "whole_batches", lambda device: True)


@pytest.fixture(scope="module")
def products() -> Iterator[None]:
    """CPUs have products of half-precision numbers in float32, as GPUs have."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("bmm.dtype", lambda a, b, dtype: torch.bmm(a.to(dtype), b.to(dtype)), "CPU")
    yield
    library._destroy()


def taken(heads: list[LinearHead], features: Features, padded: bool, at: str, loss: str, weights: Any) -> list[Tensor]:
    """Losses of heads as one bank, and what a step makes of them: gradients, running statistics."""
    labels, bank = labels_of(padded), LinearBank(heads)
    logits = bank.logits(features).transpose(0, 1)  # (batch, heads, classes, rows, columns)
    if at == "level":
        shares = cell_shares(labels, CLASSES, 4).to(logits.dtype)
        found = bank.loss(features, shares, weights) if loss == "ce" else level_losses(logits, shares, weights, loss)
    else:
        found = image_losses(logits, labels, weights, loss)
    (found * torch.arange(1, len(heads) + 1)).sum().backward()
    return [found.detach(), *(p.grad for h in heads for p in h.parameters()), *(b for h in heads for b in h.buffers())]


# ---- the linear head and the bank ------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [LEVELS, LEVELS[:1], ODD])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("at", ["level", "image"])
@pytest.mark.parametrize("count", [1, 3])
def test_heads_have_the_same_losses_gradients_and_statistics_either_way(
    levels: Any, padded: bool, at: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = torch.tensor([0.5, 1.5, 3.0], dtype=torch.float64)
    heads, features = heads_of(levels, count), features_of(levels, padded)
    for loss in LOSSES if levels is LEVELS else ("ce",):
        pair = []
        for way in (False, True):
            monkeypatch.setattr(execution, "whole_batches", lambda device, way=way: way)
            pair.append(taken(copy.deepcopy(heads), features, padded, at, loss, weights))
        apart = 1e-5 if padded and levels is ODD else 1e-8  # shares of cells are float32, which has no sixths
        for pieces, few in zip(*pair, strict=True):
            assert torch.allclose(few, pieces, rtol=apart, atol=apart / 10), loss


@pytest.mark.parametrize("padded", [False, True])
def test_logits_of_evaluation_and_gradients_of_live_features_are_the_same_either_way(
    padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (head,) = heads_of(LEVELS, 1)
    pair = []
    for way in (False, True):
        monkeypatch.setattr(execution, "whole_batches", lambda device, way=way: way)
        own, features = copy.deepcopy(head), features_of(LEVELS, padded)
        for m in features.maps.values():
            m.requires_grad_()
        image_loss(own(features), labels_of(padded)).backward()
        pair.append([*(m.grad for m in features.maps.values()), own.eval()(features).detach()])
    for pieces, few in zip(*pair, strict=True):
        assert torch.allclose(few, pieces, rtol=1e-8, atol=1e-10)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("dtype", "apart"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_maps_give_the_same_to_their_rounding(
    padded: bool, dtype: torch.dtype, apart: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads, features = heads_of(LEVELS, 2, torch.float32), features_of(LEVELS, padded, dtype)
    with torch.no_grad():
        for head in heads:  # logits of the size that trained heads have
            for weight in head.weights.values():
                weight.mul_(0.1)
    pair = []
    for way in (False, True):
        monkeypatch.setattr(execution, "whole_batches", lambda device, way=way: way)
        monkeypatch.setattr(execution, "mixed", lambda device, way=way: way)
        pair.append(taken(copy.deepcopy(heads), features, padded, "image", "ce", None))
    for pieces, few in zip(*pair, strict=True):
        assert few.dtype == torch.float32 and (few - pieces).norm() <= apart * pieces.norm() + 1e-7


@pytest.mark.usefixtures("products", "whole")
def test_small_gradients_survive_half_precision_and_a_diverged_head_disturbs_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(execution, "mixed", lambda device: True)
    heads, features = heads_of(LEVELS, 2, torch.float32), features_of(LEVELS, False, torch.float16)
    wanted = taken(copy.deepcopy(heads), features, False, "level", "ce", None)
    small = copy.deepcopy(heads)
    (LinearBank(small).loss(features, cell_shares(labels_of(False), CLASSES, 4)) * 1e-12).sum().backward()
    for own, theirs in zip(small[0].parameters(), wanted[1:], strict=False):
        assert torch.allclose(own.grad * 1e12, theirs, rtol=1e-2, atol=1e-3 * float(theirs.abs().max()))
    with torch.no_grad():
        heads[0].weights["stride8"].fill_(float("nan"))
    found = taken(heads, features, False, "level", "ce", None)
    alone = len(list(heads[0].parameters()))
    assert found[0][0].isnan() and found[0][1] == wanted[0][1]
    for own, theirs in zip(found[1 + alone : 1 + 2 * alone], wanted[1 + alone : 1 + 2 * alone], strict=True):
        assert torch.equal(own, theirs)


# ---- the loss at the image's size ------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 7), st.integers(1, 7)), stride=st.integers(1, 9), piece=st.integers(1, 4000),
    ignored=st.sampled_from([0.0, 0.3, 1.0]), scale=st.sampled_from([1.0, 100.0, 3e4]), weighted=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_the_image_loss_in_pieces_is_that_of_upsampled_logits(
    grid: tuple[int, int], stride: int, piece: int, ignored: float, scale: float, weighted: bool, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(2, 4, *grid, generator=rng, dtype=torch.float64)).requires_grad_()
    size = (grid[0] * stride, grid[1] * stride)
    labels = torch.randint(4, (2, *size), dtype=torch.uint8, generator=rng)
    labels[torch.rand(labels.shape, generator=rng) < ignored] = IGNORE
    weights = torch.rand(4, dtype=torch.float64, generator=rng) + 0.1 if weighted else None
    total = cross_entropy(
        interpolate(logits, size, mode="bilinear"), labels.long(), weights, ignore_index=IGNORE, reduction="sum"
    )
    every = torch.cat([torch.ones(4) if weights is None else weights, torch.zeros(252)]).double()
    wanted = total / every[labels.long()].sum().clamp(min=1e-12)
    (gradient,) = torch.autograd.grad(wanted, logits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "CACHED", piece)
        found = image_loss(logits, labels, weights)
        (own,) = torch.autograd.grad(found * 2, logits)
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)
    assert torch.allclose(own, 2 * gradient, rtol=1e-7, atol=1e-12)


def test_the_image_loss_of_several_threads_has_the_bits_of_one() -> None:
    logits, labels = torch.randn(BATCH, 4, 12, 24, requires_grad=True), labels_of(True)
    before, pair = torch.get_num_threads(), []
    for threads in (1, 3):
        try:
            torch.set_num_threads(threads)
            loss = image_loss(logits, labels)
            pair.append([loss.detach(), *torch.autograd.grad(loss, logits)])
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(one, several) for one, several in zip(*pair, strict=True))


# ---- training --------------------------------------------------------------------------------------------------------

ROWS = np.array([3, 5, 6, 8, 11, 12, 15])  # of a cache, the training split
RECIPE = TrainRecipe(iterations=9, batch_size=BATCH, lr=1e-2, warmup=0.3, clip=0.5, evaluations=2, weights_from="end")


class Held:
    """Training rows that lie in memory, as features and labels."""

    def __init__(self, padded: bool) -> None:
        rng = torch.Generator().manual_seed(7)
        self.maps = {v.name: torch.randn(len(ROWS), v.channels, *v.cells(FRAME), generator=rng) for v in LEVELS}
        sizes = torch.stack([torch.randint(9, side, (len(ROWS),), generator=rng) for side in FRAME], 1).int()
        self.content = sizes if padded else None
        self.labels = torch.randint(CLASSES, (len(ROWS), *FRAME), dtype=torch.uint8, generator=rng)
        self.given: list[type] = []  # what batches the loss was asked for

    def features(self, places: Tensor) -> Features:
        content = None if self.content is None else self.content.index_select(0, places)
        return Features({n: m.index_select(0, places) for n, m in self.maps.items()}, FRAME, content)

    def feed(self, orders: Any, first: int) -> Any:
        for rows in orders:
            yield rows, self.features(torch.from_numpy(np.searchsorted(ROWS, rows)))

    def loss(self, heads: list[LinearHead]) -> Any:
        bank = LinearBank(heads)

        def loss(features: Features, batch: Any) -> Tensor:
            self.given.append(type(batch))
            places = batch if isinstance(batch, Tensor) else torch.from_numpy(np.searchsorted(ROWS, batch))
            return bank.image_loss(features, self.labels.index_select(0, places))

        return loss


class Kept:
    """Keeps the state after a step."""

    def __init__(self, at: int, state: Any = None) -> None:
        self.at, self.state = at, state

    def load(self, check: Any) -> Any:
        if self.state is not None:
            check(self.state)
        return self.state

    def save(self, step: int, state: Any) -> None:
        if step == self.at:
            self.state = copy.deepcopy(state())


def trained(held: Held, **how: Any) -> tuple[list[LinearHead], list[Any], list[Tensor]]:
    heads = heads_of(LEVELS, 2, torch.float32)
    recipes, steps = [RECIPE, replace(RECIPE, lr=1e-3, weight_decay=0.1)], list[Tensor]()
    scores = [{"score": 0.0}, {"score": 0.0}]
    curves = train(
        heads, recipes, held.feed, ROWS, held.loss(heads), 5, lambda: scores, taken=steps.append, **how
    )  # fmt: skip
    return heads, curves, steps


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("resident", [False, True])
def test_a_training_that_finds_its_batches_on_the_device_ends_where_the_plain_one_ends(
    padded: bool, resident: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(padded)
    plain, curves, steps = trained(held)
    assert set(held.given) == {np.ndarray}
    held.given.clear()
    monkeypatch.setattr(execution, "whole_batches", lambda device: True)
    heads, own_curves, own_steps = trained(held, fixed=True, resident=held.features if resident else None)
    assert set(held.given) == {Tensor}, "places, not rows"
    assert torch.allclose(torch.stack(own_steps), torch.stack(steps), rtol=1e-4)
    for curve, own in zip(curves, own_curves, strict=True):
        assert [p.iteration for p in own] == list(evaluation_points(RECIPE))
        assert [p.loss for p in own] == pytest.approx([p.loss for p in curve], rel=1e-4)
    for head, own in zip(plain, heads, strict=True):
        for name, value in head.state_dict().items():
            assert (own.state_dict()[name] - value).norm() <= 2e-3 * value.norm() + 1e-6, name


@pytest.mark.usefixtures("whole")
def test_a_training_that_was_stopped_goes_on_as_if_it_had_not_been() -> None:
    held = Held(False)
    how = {"fixed": True, "resident": held.features}
    kept = Kept(4)
    heads, curves, steps = trained(held, keeper=kept, **how)
    again, others, late = trained(held, keeper=Kept(0, kept.state), **how)
    assert len(late) == RECIPE.iterations - 4 and torch.equal(torch.stack(late), torch.stack(steps[4:]))
    assert others == curves
    for head, own in zip(heads, again, strict=True):
        assert all(torch.equal(own.state_dict()[name], value) for name, value in head.state_dict().items())


@pytest.mark.usefixtures("whole")
def test_a_moving_backbone_is_trained_from_its_feed_in_parts() -> None:
    """Where the backbone moves, nothing lies on the device in advance, whatever else is said."""
    held = Held(False)
    heads, backbone = heads_of(LEVELS, 1, torch.float32), nn.Linear(1, 1)
    groups = [{"params": list(backbone.parameters()), "lr": 1e-3}]
    tuned, loss = Tuned(backbone, groups, clip=1.0, accumulate=2, ema=0.5), held.loss(heads)
    before = backbone.weight.detach().clone()

    def moved(features: Features, batch: Any) -> Tensor:
        return loss(features, batch) * backbone(torch.ones(1)).exp()

    def feed(orders: Any, first: int) -> Any:
        yield from held.feed(orders, first)

    (curve,) = train(heads, [RECIPE], feed, ROWS, moved, 5, lambda: [{}], tuned=tuned, fixed=True)
    assert set(held.given) == {np.ndarray} and len(held.given) == 2 * RECIPE.iterations
    assert np.isfinite([point.loss for point in curve]).all() and not torch.equal(backbone.weight, before)


def test_a_step_is_timed_on_the_way_that_training_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(False)
    heads = heads_of(LEVELS, 1, torch.float32)
    for way, kind in ((False, np.ndarray), (True, Tensor)):
        held.given.clear()
        monkeypatch.setattr(execution, "whole_batches", lambda device, way=way: way)
        seconds = seconds_per_step(
            heads, [RECIPE], held.feed, ROWS, held.loss(heads), fixed=True, resident=held.features, counted=2
        )
        assert seconds > 0 and held.given == [kind] * 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("resident", [False, True])
def test_a_recorded_step_is_the_step(resident: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    held, pair = Held(True), []
    held.maps = {name: m.half().cuda() for name, m in held.maps.items()}
    held.labels, held.content = held.labels.cuda(), held.content.cuda()
    order = torch.from_numpy(np.arange(len(ROWS))).cuda()

    def feed(orders: Any, first: int) -> Any:
        for rows in orders:
            yield rows, held.features(order[np.searchsorted(ROWS, rows).tolist()])

    for recorded in (True, False):
        monkeypatch.setattr(execution, "recorded", lambda device, recorded=recorded: recorded)
        heads = [head.cuda() for head in heads_of(LEVELS, 2, torch.float32)]
        held.given.clear()
        steps: list[Tensor] = []
        train(
            heads, [RECIPE, RECIPE], feed, ROWS, held.loss(heads), 5, lambda: [{}, {}], taken=steps.append,
            fixed=True, resident=held.features if resident else None,
        )  # fmt: skip
        assert len(held.given) == (4 if recorded else RECIPE.iterations), "three steps before it is recorded"
        pair.append([torch.stack(steps), *(p.detach() for head in heads for p in head.parameters())])
    for own, plain in zip(*pair, strict=True):
        assert torch.allclose(own, plain, rtol=1e-4, atol=1e-6)


# ---- how few they are ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", list(overhead.SIZES))
def test_no_step_dispatches_more_operators_than_it_may_or_waits_for_the_device(frames: str) -> None:
    every = overhead.counted(overhead.ARMS, frames, width=32)  # as many operators as of wide heads
    for arm, found in zip(overhead.ARMS, every.values(), strict=True):
        assert 0 < found.total() - found[WAITS] <= getattr(arm, frames), f"{arm.name}: {found.most_common()}"
        assert arm.count != "step" or not found[WAITS], f"{arm.name}: {found.most_common()}"


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", [*DENSE, "fcos"])
def test_a_step_over_levels_of_one_stride_waits_for_no_device(kind: str, padded: bool, whole: None) -> None:
    levels = tuple(FeatureLevel(f"block{i}", 8, 16) for i in range(3))
    task = "detect" if kind == "fcos" else "semseg"
    head: Any = build_head(HeadRecipe(task, kind, ("background", "a", "b"), (), 16), levels).train()
    features, labels = features_of(levels, padded, torch.float32), labels_of(padded)
    boxes = ObjectTarget(torch.tensor([[2.0, 2.0, 40.0, 30.0]]), torch.tensor([1]), None, torch.zeros(0, 4))
    objects = ObjectBatch.of([boxes] * BATCH)

    def step() -> None:
        loss = head.batch_loss(features, objects) if kind == "fcos" else image_loss(head(features), labels)
        loss.backward()

    step()  # what is kept for later steps is made by the first
    found = operators(step)
    assert found.total() > 20 and not found[WAITS], found.most_common()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("objects", [False, True])
def test_boxes_of_objects_alone_train_fcos_as_those_of_all_cells_do(
    padded: bool, objects: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(2)
    recipe = HeadRecipe("detect", "fcos", ("background", "a", "b"), width=16, sides=(9.0, 15.0, 50.0))
    head: Any = build_head(recipe, LEVELS).double().train()
    boxes, crowd = torch.tensor([[1.0, 2, 9, 12], [4, 3, 40, 38], [3, 4, 20, 17]]), torch.tensor([[20.0, 1, 47, 30]])
    some = ObjectTarget(boxes.double(), torch.tensor([1, 2, 2]), None, crowd.double())
    none = ObjectTarget(boxes[:0].double(), torch.zeros(0, dtype=torch.int64), None, crowd[:0].double())
    targets, pair = ObjectBatch.of([some, none, some, none] if objects else [none] * BATCH), []
    for way in (False, True):
        monkeypatch.setattr(execution, "whole_batches", lambda device, way=way: way)
        own, features = copy.deepcopy(head), features_of(LEVELS, padded)
        for m in features.maps.values():
            m.requires_grad_()
        loss = own.batch_loss(features, targets)
        loss.backward()
        pair.append([loss.detach(), *(p.grad for p in own.parameters()), *(m.grad for m in features.maps.values())])
    for pieces, few in zip(*pair, strict=True):
        assert torch.allclose(few, pieces, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("padded", [False, True])
def test_a_variance_that_is_small_beside_its_mean_is_found_either_way(
    padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some channels of large networks are far from 0 everywhere, and their squares leave float32 little room."""
    features = features_of(LEVELS, padded, torch.float32)
    features = replace(features, maps={name: 300 + m for name, m in features.maps.items()})
    found = []
    for way in (False, True):
        monkeypatch.setattr(execution, "whole_batches", lambda device, way=way: way)
        (head,) = heads_of(LEVELS, 1, torch.float32)
        head(features)
        found.append(torch.cat([norm.running_var for norm in head.norms.values()]))  # type: ignore[misc]
    assert torch.allclose(found[1], found[0], rtol=2e-2) and bool((found[0] > 0.9).all())


def test_a_loss_of_several_heads_is_that_of_each() -> None:
    rng = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 3, CLASSES, 6, 12, generator=rng, dtype=torch.float64)
    labels, weights = labels_of(False)[:2, :24], torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    labels = labels[:, :24, :48]
    shares = cell_shares(labels, CLASSES, 4).double()
    for loss in LOSSES:
        at_level, at_image = level_losses(logits, shares, weights, loss), image_losses(logits, labels, weights, loss)
        for head in range(3):
            own = logits[:, head]
            assert torch.isclose(at_level[head], level_loss(own, shares, weights, loss))
            assert torch.isclose(at_image[head], image_loss(own, labels, weights, loss))
