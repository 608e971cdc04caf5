"""One contract for every head, whatever its task: levels, sizes, padding, empty targets, gradients, saving."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import recipe_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.roi_heads import project_masks_on_boxes
from torchvision.ops import nms

from featprobe.backbones.backbone import load_backbone
from featprobe.errors import ProbeError
from featprobe.features import Features
from featprobe.geometry import Placement
from featprobe.image_labels import OF_PARTS
from featprobe.kinds import KINDS
from featprobe.levels import FeatureLevel
from featprobe.probes import (
    DenseHead,
    Detections,
    HeadRecipe,
    ObjectHead,
    ObjectTarget,
    build_head,
    detections,
    execution,
    fingerprint,
    load_head,
    objects_at_original,
    parameter_count,
    paste,
    predict_classes,
    save_head,
)
from featprobe.probes.detections import (
    Candidates,
    ObjectBatch,
    anchor_sizes,
    detection_strides,
    found_at_once,
    object_sides,
    on_host,
    packed,
    sampled,
    side_ranges,
    suppress,
    survivors,
    unpacked,
)
from featprobe.probes.fcos import assign, grid_of
from featprobe.probes.heads import BUILDERS
from featprobe.probes.operations.norms import PaddedGroupNorm
from featprobe.probes.paste import paste_mask
from featprobe.probes.pyramid import Pyramid, TopDown, cells_inside, maps_of
from featprobe.probes.rcnn.region_heads import RegionPool, half_pixel_later
from featprobe.scores import SCORES
from featprobe.specs import BackboneSpec
from featprobe.stages.tasks.detection import MaskStore
from featprobe.targets import components, decode_rle, encode_rle

FOUR = tuple(FeatureLevel(f"stride{s}", c, s) for s, c in ((4, 6), (8, 9), (16, 12), (32, 15)))
ONE = FOUR[1:2]
VIT = tuple(FeatureLevel(f"block{b}", 10, 16) for b in (2, 5, 8, 11))
FRAMES = {"four levels": (FOUR, (64, 96)), "one level": (ONE, (56, 40)), "one stride": (VIT, (48, 80))}
CLASSES = ("background", "pore", "crack")
EVERY = sorted(own for own in KINDS if SCORES[own[0]].on in OF_PARTS)
"""Heads of pixels and objects; those of whole images are held by tests/probes/verdicts."""
SMALL = {"width": 32, "sides": (9.0, 15.0, 50.0)}


def recipe_for(task: str, kind: str) -> HeadRecipe:
    recipe = HeadRecipe(task, kind, CLASSES)
    if not KINDS[task, kind].width:
        return recipe
    return replace(recipe, **(SMALL if task != "semseg" else {"width": 32}))  # type: ignore[arg-type]


def random_features(
    levels: Sequence[FeatureLevel], frame: tuple[int, int], content: list[list[int]] | None = None, seed: int = 0
) -> Features:
    rng = torch.Generator().manual_seed(seed)
    maps = {v.name: torch.randn(2, v.channels, *v.cells(frame), generator=rng) for v in levels}
    return Features(maps, frame, None if content is None else torch.tensor(content, dtype=torch.int32))


def some_targets(frame: tuple[int, int]) -> list[ObjectTarget]:
    """Two objects in the first image, none in the second."""
    masks = torch.zeros(2, *frame, dtype=torch.uint8)
    masks[0, 4:20, 3:21] = 1
    masks[1, 16:34, 12:30] = 1
    boxes = torch.tensor([[3.0, 4.0, 21.0, 20.0], [12.0, 16.0, 30.0, 34.0]])
    nothing = torch.zeros(0, 4)
    return [
        ObjectTarget(boxes, torch.tensor([1, 2]), masks, nothing),
        ObjectTarget(nothing, torch.zeros(0, dtype=torch.int64), masks[:0], nothing),
    ]


def loss_of(head: nn.Module, task: str, features: Features, targets: list[ObjectTarget] | None = None) -> Tensor:
    if task != "semseg":
        return head(features, targets or some_targets(features.frame))
    logits = head(features)
    return torch.nn.functional.cross_entropy(logits, torch.arange(logits[:, 0].numel()).view(logits[:, 0].shape) % 3)


@pytest.fixture(params=EVERY, ids=["-".join(kind) for kind in EVERY])
def kind(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.mark.parametrize("levels_name", FRAMES)
@pytest.mark.parametrize("padded", [False, True])
def test_a_loss_is_finite_and_moves_every_parameter(kind: tuple[str, str], levels_name: str, padded: bool) -> None:
    levels, frame = FRAMES[levels_name]
    content = [[frame[0], frame[1] - 7], [frame[0] - 9, frame[1]]] if padded else None
    torch.manual_seed(0)
    head = build_head(recipe_for(*kind), levels)
    features = random_features(levels, frame, content)
    loss = loss_of(head.train(), kind[0], features)
    assert loss.ndim == 0 and loss.isfinite()
    loss.backward()
    still = [n for n, p in head.named_parameters() if p.grad is None or not p.grad.any() or not p.grad.isfinite().all()]
    assert still == []
    taken: Any = head.levels
    assert set(taken) <= set(levels) and parameter_count(head) > 0


def test_what_comes_out_has_the_shape_of_the_frame(kind: tuple[str, str]) -> None:
    for levels, frame in FRAMES.values():
        head = build_head(recipe_for(*kind), levels).eval()
        with torch.inference_mode():
            found: Any = head(random_features(levels, frame))
        if kind[0] == "semseg":
            assert found.shape == (2, 3, frame[0] // head.stride, frame[1] // head.stride)  # type: ignore[operator]
            continue
        assert len(found) == 2
        for own in found:
            assert own.boxes.shape == (len(own.scores), 4) and len(own.labels) == len(own.scores) <= 100
            assert (own.boxes[:, :2] >= 0).all() and (own.boxes[:, 2:] <= torch.tensor([frame[1], frame[0]])).all()
            assert (own.scores[:-1] >= own.scores[1:]).all() and set(own.labels.tolist()) <= {1, 2}
            assert (own.masks is not None) == (kind[0] == "instseg")


@pytest.mark.parametrize("training", [True, False])
def test_what_lies_in_the_padding_changes_nothing(kind: tuple[str, str], training: bool) -> None:
    levels, frame = FRAMES["four levels"]
    content = [[64, 40], [32, 96]]
    features = random_features(levels, frame, content)
    other = {}
    for level in levels:
        inside = cells_inside(features.content, level.cells(frame), level.stride)
        assert inside is not None
        other[level.name] = torch.where(inside[:, None], features.maps[level.name], 1000.0)
    torch.manual_seed(0)
    head = build_head(recipe_for(*kind), levels)
    start = {name: value.clone() for name, value in head.state_dict().items()}
    found = []
    for maps in (features.maps, other):
        head.load_state_dict(start)
        head.train(training)
        torch.manual_seed(1)
        given = Features(maps, frame, features.content)
        with torch.inference_mode():
            if kind[0] == "semseg":
                values = head(given)
                values = [
                    torch.cat([v[:, : h // 4, : w // 4].flatten() for v, (h, w) in zip(values, content, strict=True)])
                ]
            elif training:
                values = [head(given, some_targets(frame))]
            else:
                values = [part for own in head(given) for part in (own.boxes, own.scores, own.labels.float())]
        found.append([*values, *(v for n, v in head.state_dict().items() if "running" in n)])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def crowded_targets(frame: tuple[int, int]) -> list[ObjectTarget]:
    """The objects of `some_targets` beside crowds, two in one image and one in the other."""
    crowds = torch.tensor([[40.0, 8.0, 70.0, 40.0], [0.0, 44.0, 12.0, 60.0]])
    return [replace(t, crowds=crowds[: 2 - i]) for i, t in enumerate(some_targets(frame))]


class InOrder:
    """Takes the first candidates instead of random ones, as torchvision's sampler is asked for them."""

    def __init__(self, sampler: Any) -> None:
        self.batch_size_per_image, self.positive_fraction = sampler.batch_size_per_image, sampler.positive_fraction

    def __call__(self, labels: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        most = int(self.batch_size_per_image * self.positive_fraction)
        positive = [(own >= 1) & ((own >= 1).cumsum(0) <= most) for own in labels]
        left = [self.batch_size_per_image - own.sum() for own in positive]
        negative = [(own == 0) & ((own == 0).cumsum(0) <= n) for own, n in zip(labels, left, strict=True)]
        return [own.to(torch.uint8) for own in positive], [own.to(torch.uint8) for own in negative]


def keys_in_order(batch: ObjectBatch, name: str, *shape: int) -> Tensor:
    """Keys for the same choice, see ObjectBatch.keys."""
    return torch.linspace(0.9, 0.1, shape[-1]).expand(shape)


@pytest.fixture
def in_order(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes heads with regions learn from the first candidates, whichever way they compute."""

    def of(head: Any) -> Any:
        monkeypatch.setattr(ObjectBatch, "keys", keys_in_order)
        for part in (getattr(head, "rpn", None), getattr(head, "regions", None)):
            if part is not None:
                part.fg_bg_sampler = InOrder(part.fg_bg_sampler)
        return head

    return of


@pytest.mark.parametrize("levels_name", FRAMES)
@pytest.mark.parametrize("padded", ["whole", "cells end with the image", "cells end within"])
@pytest.mark.parametrize(
    ("kind", "wide"),
    [(kind, wide) for kind in EVERY for wide in (1, 8) if wide == 1 or kind[1] != "maskrcnn"],
    ids=lambda own: "-".join(own) if isinstance(own, tuple) else "as they are" if own == 1 else "more channels",
)
def test_few_operations_and_pieces_are_the_same_function(
    kind: tuple[str, str], levels_name: str, padded: str, wide: int, in_order: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Value, every gradient, running statistics, and what comes out in evaluation, in float64.

    wide: times the channels; the pyramid of Mask R-CNN, which sees them, is that of Faster R-CNN.
    """
    levels, frame = FRAMES[levels_name]
    levels = tuple(replace(level, channels=wide * level.channels) for level in levels)
    contents = {
        "whole": None, "cells end with the image": [[frame[0], frame[1] - 8], [frame[0] - 16, frame[1]]],
        "cells end within": [[frame[0], frame[1] - 7], [frame[0] - 9, frame[1]]],
    }  # fmt: skip
    features = random_features(levels, frame, contents[padded]).to("cpu", torch.float64)
    torch.manual_seed(0)
    head = in_order(build_head(recipe_for(*kind), levels).double())
    start = {name: value.clone() for name, value in head.state_dict().items()}
    every: list[dict[str, Tensor]] = []
    for whole in (False, True):
        monkeypatch.setattr(execution, "whole_batches", lambda device, whole=whole: whole)
        head.load_state_dict(start)
        head.zero_grad()
        torch.manual_seed(1)
        targets = [replace(t, boxes=t.boxes.double()) for t in crowded_targets(frame)]
        loss = loss_of(head.train(), kind[0], features, targets)
        loss.backward()
        found = {"loss": loss.detach(), **{n: p.grad.clone() for n, p in head.named_parameters() if p.grad is not None}}
        found |= {name: value.clone() for name, value in head.named_buffers() if "running" in name}
        with torch.inference_mode():
            found |= {f"found {i}": own for i, own in enumerate(parts_of(head.eval()(features)))}
        every.append(found)
    assert every[0].keys() == every[1].keys()
    for name, value in every[0].items():
        assert torch.allclose(every[1][name].double(), value.double(), rtol=1e-6, atol=1e-9), name


@pytest.mark.parametrize("kind", [("detect", "fasterrcnn"), ("instseg", "maskrcnn")], ids=lambda own: own[1])
@pytest.mark.parametrize("count", [3, 20])
def test_heads_with_regions_learn_from_few_and_many_objects_either_way(
    kind: tuple[str, str], count: int, in_order: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a frame whose rows are no whole bytes, with masks at its border; 16 objects are the most that are sampled."""
    levels, frame = (FeatureLevel("block", 10, 14),), (56, 84)
    rng, features = torch.Generator().manual_seed(0), random_features(levels, frame).to("cpu", torch.float64)
    targets = []
    for own in (count, count // 2):
        corners = torch.rand(own, 2, generator=rng, dtype=torch.float64) * 40
        boxes = torch.cat([corners, corners + 14], 1)
        boxes[0] = torch.tensor([60.0, 30.0, 84.0, 56.0])
        masks = torch.zeros(own, *frame, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.round().int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = torch.rand(y2 - y1, x2 - x1, generator=rng) < 0.7
        targets.append(ObjectTarget(boxes, torch.randint(1, 3, (own,), generator=rng), masks, torch.zeros(0, 4)))
    torch.manual_seed(0)
    head = in_order(build_head(recipe_for(*kind), levels).double()).train()
    every = []
    for whole in (False, True):
        monkeypatch.setattr(execution, "whole_batches", lambda device, whole=whole: whole)
        head.zero_grad()
        loss = head(features, targets)
        loss.backward()
        every.append([loss.detach(), *(p.grad.clone() for p in head.parameters())])
    for pieces, few in zip(*every, strict=True):
        assert torch.allclose(few, pieces, rtol=1e-6, atol=1e-9)


def test_the_finest_map_need_not_be_made() -> None:
    """A level joined with the 3x3 convolution that follows, at whichever stride, equals one after the other."""
    torch.manual_seed(0)
    frame, weight = (64, 96), torch.randn(16, 8, 3, 3, dtype=torch.float64)
    for levels in (FOUR, FOUR[::-1], FOUR[1:], (FOUR[0], FOUR[2])):
        pyramid = TopDown(levels, 8).double()
        for content in (None, [[64, 64], [32, 96]]):
            features = random_features(levels, frame, content).to("cpu", torch.float64)
            plain = Pyramid.convolved(pyramid, features, weight, pyramid.strides[:1])[0]
            inside = torch.ones(2, *plain[0].shape[2:], dtype=torch.bool) if plain[1] is None else plain[1]
            for base in range(1, len(levels)):
                above = pyramid._maps(features, pyramid.strides[base:], ())[0]
                found, _ = pyramid._at_finest(features, weight, above, base)
                assert torch.allclose((found - plain[0]) * inside[:, None], torch.zeros(()).double(), atol=1e-10)


def test_objects_of_a_batch_in_tensors_of_one_shape_train_as_lists_do() -> None:
    levels, frame = FRAMES["four levels"]
    torch.manual_seed(0)
    head: Any = build_head(recipe_for("detect", "fcos"), levels).train()
    features, targets = random_features(levels, frame), crowded_targets(frame)
    every = ObjectBatch.of([targets[1], targets[0], *targets])
    assert every.boxes.shape == (4, 2, 4) and every.labels[:, 0].tolist() == [0, 1, 1, 0]
    assert head.batch_loss(features, every.at(torch.tensor([1, 0]))).item() == pytest.approx(
        head(features, targets).item()
    )


@pytest.mark.parametrize("masks", [False, True])
def test_detections_survive_the_one_copy_that_takes_them_off_a_device(masks: bool) -> None:
    made = [
        Detections(
            torch.rand(n, 4), torch.randint(1, 200, (n,)), torch.rand(n), torch.rand(n, 28, 28) if masks else None
        )
        for n in (3, 0, 2)
    ]
    for a, b in zip(made, on_host(made), strict=True):
        assert [x.dtype for x in parts_of([a])] == [x.dtype for x in parts_of([b])]
        assert all(torch.equal(x, y) for x, y in zip(parts_of([a]), parts_of([b]), strict=True))


def test_a_batch_without_any_object_has_a_finite_loss_with_a_gradient(kind: tuple[str, str]) -> None:
    if kind[0] == "semseg":
        pytest.skip("dense losses of nothing are tested with the losses")
    levels, frame = FRAMES["four levels"]
    head = build_head(recipe_for(*kind), levels).train()
    empty = [some_targets(frame)[1]] * 2
    loss = head(random_features(levels, frame), empty)
    loss.backward()
    assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in head.parameters())


def test_a_crowd_is_neither_object_nor_background(kind: tuple[str, str]) -> None:
    """Where a crowd covers a whole empty image nothing of it is learnt: the loss of classes there is 0."""
    if kind[1] != "fcos":
        pytest.skip("region heads draw samples: their crowds are tested by their labels")
    levels, frame = FRAMES["four levels"]
    head = build_head(recipe_for(*kind), levels).train()
    nothing = torch.zeros(0, 4)
    crowd = torch.tensor([[0.0, 0.0, float(frame[1]), float(frame[0])]])
    target = ObjectTarget(nothing, torch.zeros(0, dtype=torch.int64), None, crowd)
    assert float(head(random_features(levels, frame), [target] * 2).detach()) == 0


def test_region_heads_take_no_background_from_crowds_or_padding() -> None:
    head: Any = build_head(recipe_for("detect", "fasterrcnn"), FOUR).train()
    anchors = [torch.tensor([[0.0, 0.0, 8.0, 8.0], [50.0, 40.0, 58.0, 48.0], [80.0, 8.0, 88.0, 16.0]])]
    target = {
        "boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64),
        "crowds": torch.tensor([[45.0, 35.0, 60.0, 50.0]]), "content": torch.tensor([70.0, 64.0]),
    }  # fmt: skip
    labels, _ = head.rpn.assign_targets_to_anchors(anchors, [target])
    assert labels[0].tolist() == [0, -1, -1]
    head.regions.crowds = [target["crowds"]]
    _, classes = head.regions.assign_targets_to_proposals(anchors, [target["boxes"]], [target["labels"]])
    assert classes[0].tolist() == [0, -1, 0]


@pytest.fixture(scope="module")
def two_images() -> tuple[Features, tuple[FeatureLevel, ...], list[ObjectTarget], Tensor]:
    """Features of a bright disc on a rough ground under a network, the discs as objects and as masks."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:128, :128]
    pictures, masks = [], []
    for i in range(2):
        disc = (x - 50 - 20 * i) ** 2 + (y - 60) ** 2 < 24**2
        grey = 0.3 + 0.05 * rng.standard_normal(disc.shape) + 0.4 * disc
        pictures.append(np.repeat(grey[None], 3, 0))
        masks.append(disc)
    backbone = load_backbone(BackboneSpec("tiny", "test_efficientnet", "random"))
    with torch.inference_mode():
        maps = backbone(torch.tensor(np.stack(pictures), dtype=torch.float32)).maps
    labels = torch.tensor(np.stack(masks), dtype=torch.uint8)
    targets = []
    for mask in labels:
        (found,) = components(mask.numpy(), 2)
        targets.append(ObjectTarget(torch.tensor([found.box_xyxy]), torch.tensor([1]), mask[None], torch.zeros(0, 4)))
    return Features({n: m.clone() for n, m in maps.items()}, (128, 128)), backbone.levels, targets, labels


@pytest.mark.slow
def test_a_head_overfits_two_images(kind: tuple[str, str], two_images: Any) -> None:
    if kind[1] == "ridge":
        pytest.skip("solved, not trained: see test_ridge.py")
    features, levels, targets, labels = two_images
    torch.manual_seed(0)
    sides = object_sides(torch.cat([t.boxes for t in targets])) if kind[0] != "semseg" else ()
    head = build_head(HeadRecipe(*kind, ("background", "disc"), width=32, sides=sides), levels).train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=5e-3 if kind[1] == "linear" else 1e-3)
    for _ in range(120 if kind[0] == "semseg" else 50):
        if kind[0] == "semseg":
            logits = head(features)
            loss = torch.nn.functional.cross_entropy(logits, labels[:, 2::4, 2::4].long())
        else:
            loss = head(features, targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 10.0)
        optimizer.step()
    head.eval()
    placed = Placement((128, 128), (128, 128), (128, 128))
    with torch.inference_mode():
        found: Any = head(features)
    for own, target, mask in zip(found, targets, labels.numpy().astype(bool), strict=True):
        if kind[0] == "semseg":
            said = predict_classes(own, 4, placed).numpy().astype(bool)
        else:
            (best, score), *_ = objects_at_original(own, placed)
            assert score > 0.4 and iou_of(np.array(best.box_xyxy), target.boxes[0].numpy()) > 0.7
            said = mask if best.rle is None else decode_rle(best.rle)
        assert (said & mask).sum() / (said | mask).sum() > 0.75


def iou_of(a: np.ndarray, b: np.ndarray) -> float:
    shared = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None).prod()
    return float(shared / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - shared))


def test_a_saved_head_comes_back_equal_and_refuses_other_levels(kind: tuple[str, str], tmp_path: Path) -> None:
    recipe = recipe_of(FOUR, (64, 96))
    head_recipe = recipe_for(*kind)
    head = build_head(head_recipe, recipe.levels)
    head.train()
    features = random_features(FOUR, (64, 96))
    loss_of(head, kind[0], features)  # moves the running statistics
    head.eval()
    card = {
        "format": "featprobe-head", "version": 1, "head": head_recipe.to_json(), "fingerprint": fingerprint(recipe)
    }  # fmt: skip
    save_head(tmp_path, head, card, {})
    loaded, _ = load_head(tmp_path, recipe)
    with torch.inference_mode():
        for a, b in zip(parts_of(head(features)), parts_of(loaded(features)), strict=True):
            assert torch.equal(a, b)
    with pytest.raises(ProbeError, match="levels"):
        load_head(tmp_path, replace(recipe, levels=(*FOUR[:3], FeatureLevel("stride32", 16, 32))))


def parts_of(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
        return
    for own in found:
        yield from (v for v in (own.boxes, own.labels, own.scores, own.masks) if v is not None)


def test_every_kind_has_a_builder() -> None:
    assert {(task, kind) for task, own in SCORES.items() for kind in BUILDERS[own.on]} == set(KINDS)
    assert all(kind.isidentifier() for _, kind in KINDS)  # names of tables in a study file


@pytest.mark.parametrize("sides", [(), (9.0, 15.0, 50.0), (70.0, 100.0, 150.0), (300.0, 400.0, 500.0)])
@pytest.mark.parametrize("levels", [FOUR, ONE, VIT, FOUR[3:]], ids=["four", "one", "one stride", "coarse"])
def test_every_map_that_detects_has_the_stride_that_it_stands_for(
    levels: Sequence[FeatureLevel], sides: tuple[float, ...]
) -> None:
    frame = (256, 192)
    for kind in (("detect", "fcos"), ("detect", "fasterrcnn")):
        head: Any = build_head(HeadRecipe(*kind, CLASSES, width=8, sides=sides), levels)
        maps = maps_of(head.pyramid, head.strides, random_features(levels, frame))
        assert [(m.shape[2] * s, m.shape[3] * s) for (m, _), s in zip(maps, head.strides, strict=True)] == [
            frame for _ in head.strides
        ]


def test_regions_are_pooled_from_where_they_lie() -> None:
    strides = (4, 8)
    maps = {}
    for stride in strides:  # each cell holds the pixel coordinates of its centre
        y, x = torch.meshgrid([(torch.arange(256 // stride) + 0.5) * stride] * 2, indexing="ij")
        maps[str(stride)] = torch.stack([x, y])[None]
    boxes = torch.tensor([[40.0, 60.0, 68.0, 88.0], [30.0, 20.0, 170.0, 160.0]])  # one for each level
    pooled = RegionPool(strides, 7)(maps, [boxes], [(256, 256)])
    for own, (x1, y1, x2, y2) in zip(pooled, boxes.tolist(), strict=True):
        bins = (torch.arange(7) + 0.5) / 7
        assert torch.allclose(own[0], (x1 + (x2 - x1) * bins).expand(7, 7), atol=0.01)
        assert torch.allclose(own[1], (y1 + (y2 - y1) * bins)[:, None].expand(7, 7), atol=0.01)


@pytest.mark.parametrize("grown", [0.0, 1.5, 3.0])
def test_a_perfect_mask_comes_back_where_it_was(grown: float) -> None:
    mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
    mask[0, 20:32, 30:44] = 1
    box = torch.tensor([[30.0 - grown, 20.0 - grown, 44.0 + grown, 32.0 + grown]])
    wanted = project_masks_on_boxes(half_pixel_later(mask), box, torch.zeros(1, dtype=torch.int64), 28)
    found = paste_mask(wanted[0], box[0].tolist(), (64, 64))
    assert (found & mask[0].numpy().astype(bool)).sum() / (found | mask[0].numpy().astype(bool)).sum() > 0.97


@pytest.mark.parametrize("kind", ["fasterrcnn", "maskrcnn"])
def test_a_batch_that_is_nothing_but_crowd_has_a_finite_loss(kind: str) -> None:
    task = "instseg" if kind == "maskrcnn" else "detect"
    frame = (64, 96)
    crowd = torch.tensor([[-999.0, -999.0, 999.0, 999.0]])
    nothing = ObjectTarget(
        torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, *frame, dtype=torch.uint8), crowd
    )
    head = build_head(recipe_for(task, kind), FOUR).train()
    loss = loss_of(head, task, random_features(FOUR, frame), [nothing, nothing])
    assert loss.isfinite()
    loss.backward()


@pytest.mark.parametrize(
    ("change", "said"),
    [({"width": 0}, "0 channels wide"), ({"pyramid": "simple"}, "one stride"), ({"levels": ("stride2",)}, "--levels")],
)
def test_a_head_that_makes_no_sense_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ProbeError) as error:
        build_head(replace(recipe_for("detect", "fcos"), **change), FOUR)
    assert said in str(error.value)


def test_a_head_keeps_the_contract_of_its_task(kind: tuple[str, str]) -> None:
    """What those who train, score, save and predict ask of any head: see probes/head.py."""
    task, name = kind
    levels, frame = FRAMES["four levels"]
    torch.manual_seed(0)
    head = build_head(recipe_for(task, name), levels)
    assert head.classes == len(CLASSES) and set(head.levels) <= set(levels)
    assert [level.stride for level in head.levels] == sorted(level.stride for level in head.levels)
    if not SCORES[task].dense:
        assert isinstance(head, ObjectHead) and head.assignment
        return
    assert isinstance(head, DenseHead) and not head.assignment
    prior = torch.tensor([0.9, 0.07, 0.03])
    head.start_at(prior)
    said = head.train()(random_features(levels, frame)).softmax(1)
    assert said.shape == (2, 3, frame[0] // head.stride, frame[1] // head.stride)
    assert torch.allclose(said.mean((0, 2, 3)), prior, rtol=0.15)


def test_width_and_pyramid_change_the_kinds_that_have_them_and_no_other(kind: tuple[str, str]) -> None:
    """`probe` refuses --width and --pyramid where the table says that they change nothing."""
    task, name = kind

    def size(**change: Any) -> int:
        return parameter_count(build_head(replace(HeadRecipe(task, name, CLASSES, width=16), **change), VIT))

    assert (size(width=16) != size(width=24)) == bool(KINDS[kind].width)
    assert (size(pyramid="simple") != size(pyramid="levels")) == KINDS[kind].pyramid


def test_a_vits_levels_become_a_pyramid_or_stay_as_they_are() -> None:
    simple: Any = build_head(HeadRecipe("detect", "fcos", CLASSES), VIT)
    assert simple.strides == (4, 8, 16, 32) and simple.levels == VIT[-1:]
    plain: Any = build_head(HeadRecipe("detect", "fcos", CLASSES, pyramid="levels"), VIT)
    assert plain.strides == (16,) and plain.levels == VIT
    of_14: Any = build_head(HeadRecipe("detect", "fcos", CLASSES), [FeatureLevel("block11", 10, 14)])
    assert of_14.strides == (7, 14, 28)


# ---- what is sampled, and what stays ---------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.sampled_from([-1, 0, 0, 1]), min_size=1, max_size=40), most=st.integers(1, 12),
    share=st.sampled_from([0.25, 0.5]), seed=st.integers(0, 99),
)  # fmt: skip
def test_samples_are_as_many_as_torchvision_draws(labels: list[int], most: int, share: float, seed: int) -> None:
    torch.manual_seed(seed)
    own, positive = torch.tensor(labels), int(most * share)
    place, is_positive, counted = sampled(own[None] == 1, own[None] == 0, torch.rand(1, len(own)), positive, most)
    theirs = [part[0].sum() for part in BalancedPositiveNegativeSampler(most, share)([own.float()])]
    assert [is_positive.sum(), (counted & ~is_positive).sum()] == theirs
    assert (own[place[is_positive]] == 1).all() and (own[place[counted & ~is_positive]] == 0).all()
    assert len(set(place[counted].tolist())) == int(counted.sum()), "each at most once"
    assert not is_positive[:, positive:].any(), "positive ones come first"


def test_every_candidate_is_sampled_as_often_as_the_others() -> None:
    torch.manual_seed(0)
    labels = torch.tensor([1, 1, 1, 0, 0, 0, 0, -1]).expand(4000, -1)
    place, _, counted = sampled(labels == 1, labels == 0, torch.rand(4000, 8), 2, 4)
    often = torch.bincount(place[counted], minlength=8) / 4000
    assert torch.allclose(often, torch.tensor([2 / 3] * 3 + [1 / 2] * 4 + [0.0]), atol=0.04)


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 60), spread=st.floats(1, 40), iou=st.sampled_from([0.3, 0.5, 0.7]), seed=st.integers(0, 99))
def test_boxes_that_stay_are_those_of_greedy_suppression(count: int, spread: float, iou: float, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    corners = spread * torch.rand(2, count, 2, generator=rng, dtype=torch.float64)
    boxes = torch.cat([corners, corners + 5 + 10 * torch.rand(2, count, 2, generator=rng)], 2)
    real, scores = torch.rand(2, count, generator=rng) < 0.8, torch.linspace(1, 0.5, count, dtype=torch.float64)
    every, some = (survivors(boxes, real, iou, rounds).bool() for rounds in (None, 63))
    for group in range(2):
        own = real[group].nonzero()[:, 0]
        wanted = own[nms(boxes[group, own], scores[own], iou)]
        assert every[group].nonzero()[:, 0].tolist() == sorted(wanted.tolist())
    assert torch.equal(some, every), "no chain is so long"


def test_of_a_long_chain_of_boxes_only_those_that_are_settled_stay() -> None:
    start = 2.0 * torch.arange(100)
    chain = torch.stack([start, 0 * start, start + 10, 0 * start + 10], 1)[None]  # each overlaps the next by two thirds
    real = torch.ones(1, 100, dtype=torch.bool)
    every, some = (survivors(chain, real, 0.5, rounds)[0] for rounds in (None, 21))
    assert every.tolist() == [1, 0] * 50
    assert some[:20].tolist() == [1, 0] * 10 and not some[22:].any()


@pytest.mark.parametrize("at_once", [10**6, 0])
@pytest.mark.parametrize("first", [1000, 250, 20])
@pytest.mark.parametrize("floor", [0.3, 1.0], ids=["some", "nothing"])
def test_detections_of_a_batch_are_those_of_its_images(
    at_once: int, first: int, floor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detections, "PAIRED_AT_ONCE", at_once)
    monkeypatch.setattr(detections, "BEST_FIRST", first)
    rng = torch.Generator().manual_seed(0)
    corners = 60 * torch.rand(3, 400, 2, generator=rng)
    boxes = torch.cat([corners, corners + 20 * torch.rand(3, 400, 2, generator=rng) - 1], 2)  # some without an area
    labels = torch.randint(1, 4, (3, 400), generator=rng)
    scores = torch.rand(3, 400, generator=rng) * torch.tensor([[1.0], [0.0], [1.0]])  # nothing in the second
    found = found_at_once(Candidates(boxes, labels, scores, 0.4, floor))
    for one, own, label, score in zip(found, boxes, labels, scores, strict=True):
        kept = suppress(own, score, label, 0.4, floor)
        assert torch.equal(one.boxes, own[kept]) and torch.equal(one.scores, score[kept])
        assert torch.equal(one.labels, label[kept]) and one.masks is None
    assert (len(found[0].boxes) > 20) == (floor < 1)


@pytest.mark.parametrize("of_boxes", [True, False], ids=["boxes", "scores"])
def test_candidates_of_nan_are_none_and_change_no_others(of_boxes: bool) -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 9, 9], [1, 1, 9, 9], [50, 50, 60, 60]])
    scores, labels = torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.ones(4, dtype=torch.int64)
    (boxes if of_boxes else scores)[1] = torch.nan
    (found,) = found_at_once(Candidates(boxes[None], labels[None], scores[None], 0.3, 0.1))
    assert torch.equal(found.boxes, boxes[[0, 3]]) and torch.equal(found.scores, scores[[0, 3]])


@pytest.mark.parametrize("width", [1, 16, 21])
def test_masks_come_back_from_a_bit_a_pixel(width: int) -> None:
    masks = (torch.rand(3, 5, width, generator=torch.Generator().manual_seed(0)) < 0.5).to(torch.uint8)
    assert packed(masks).shape == (3, 5, -(-width // 8)) and torch.equal(unpacked(packed(masks), width), masks)


def test_heads_that_train_on_one_batch_draw_the_same_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "whole_batches", lambda device: True)
    levels, frame = FRAMES["four levels"]
    torch.manual_seed(0)
    head: Any = build_head(recipe_for("detect", "fasterrcnn"), levels).train()
    features, every = random_features(levels, frame), ObjectBatch.of(some_targets(frame))
    first, again, other = (
        head.batch_loss(features, batch).item() for batch in (every, every, every.at(torch.tensor([0, 1])))
    )
    assert first == again != other


# ---- objects and levels ----------------------------------------------------------------------------------------------


@given(sides=st.lists(st.floats(1, 400), min_size=3, max_size=3).map(sorted))
def test_levels_follow_the_objects(sides: list[float]) -> None:
    strides = detection_strides((4, 8, 16, 32), sides)
    assert strides == tuple(sorted(set(strides))) and set(strides) <= {4, 8, 16, 32}
    if strides[0] > 4:
        assert 2 * strides[0] <= sides[0], "a small object spans two cells"
    ranges = side_ranges(strides)
    assert ranges[0][0] == 0 and ranges[-1][1] == float("inf")
    assert all(a[1] == b[0] for a, b in pairwise(ranges))
    for own, (low, high) in zip(anchor_sizes(strides, sides), ranges, strict=True):
        assert own and all(size > 0 for size in own) and list(own) == sorted(own)
        assert own[0] >= low and (own[0] <= high or own[0] <= 2 * low)


boxes_in_frame = st.lists(
    st.tuples(st.floats(0, 90), st.floats(0, 58), st.floats(0.5, 60), st.floats(0.5, 60)), min_size=1, max_size=5
)


@settings(max_examples=50)
@given(made=boxes_in_frame)
def test_cells_answer_for_boxes_that_hold_them(made: list[tuple[float, float, float, float]]) -> None:
    boxes = torch.tensor([(x, y, min(96.0, x + w), min(64.0, y + h)) for x, y, w, h in made])
    grid = grid_of((4, 8), (64, 96), torch.device("cpu"))
    index = assign(grid, boxes[None], torch.ones(1, len(boxes), dtype=torch.bool))[0]
    centres, stride = grid.centres, grid.strides[grid.level]
    low, high = torch.tensor(side_ranges((4, 8)))[grid.level].unbind(1)
    hit = (index >= 0).nonzero()[:, 0]
    own = boxes[index[hit]]
    slack = stride[hit, None] / 2
    assert ((centres[hit] >= own[:, :2] - slack) & (centres[hit] <= own[:, 2:] + slack)).all()
    side = (own[:, 2:] - own[:, :2]).prod(1).sqrt()
    assert ((side >= low[hit]) & (side < high[hit])).all()
    if len(boxes) == 1 and bool((boxes[0, 2:] < torch.tensor([96.0, 64.0])).all()):
        assert len(hit), "no box is lost, however small"


def test_group_norm_without_padding_is_torchs_and_with_it_that_of_the_image_alone() -> None:
    torch.manual_seed(0)
    norm = PaddedGroupNorm(4, 8)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    x = torch.randn(2, 8, 6, 5)
    plain = nn.GroupNorm(4, 8)
    plain.load_state_dict(norm.state_dict())
    assert torch.allclose(norm(x), plain(x))
    assert torch.allclose(norm(x, torch.ones(2, 6, 5, dtype=torch.bool)), plain(x), atol=1e-5)
    inside = cells_inside(torch.tensor([[12, 20], [24, 8]]), (6, 5), 4)
    found = norm(x, inside)
    assert torch.allclose(found[0, :, :3], plain(x[:1, :, :3])[0], atol=1e-5)
    assert torch.allclose(found[1, :, :, :2], plain(x[1:, :, :, :2])[0], atol=1e-5)


def test_a_pasted_mask_fills_its_box_and_nothing_else() -> None:
    mask = paste_mask(torch.ones(28, 28), [10.2, 5.0, 30.0, 18.7], (40, 50))
    assert mask[5:19, 10:30].all() and mask.sum() == 14 * 20
    half = torch.zeros(28, 28)
    half[:, :14] = 1
    left = paste_mask(half, [0.0, 0.0, 40.0, 20.0], (20, 40))
    assert left[:, :20].all() and not left[:, 20:].any()
    assert not paste_mask(torch.ones(28, 28), [50.0, 5.0, 60.0, 9.0], (40, 50)).any()


def test_long_thin_boxes_are_pasted_as_one_by_one_in_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated: list[int] = []
    plain = paste._within

    def within(values: Tensor, boxes: Tensor, starts: Tensor, most: list[int]) -> Any:
        allocated.append(len(values) * most[0] * most[1])
        return plain(values, boxes, starts, most)

    monkeypatch.setattr(paste, "_within", within)
    values = torch.rand(12, 28, 28, generator=torch.Generator().manual_seed(5))
    across = [[3.0, 40.0 * i, 1990.5, 40.0 * i + 6 + i] for i in range(6)]
    boxes = torch.tensor(
        [box if lying else [box[1], box[0], box[3], box[2]] for box in across for lying in (True, False)]
    )
    found = paste.rles_of(values, boxes.double(), (2000, 2000))
    assert max(allocated) <= paste.PIXELS_AT_ONCE
    alone = [encode_rle(paste_mask(v, box.tolist(), (2000, 2000))) for v, box in zip(values, boxes, strict=True)]
    assert found == alone


def test_detections_come_back_to_the_original_image() -> None:
    placed = Placement((100, 400), (64, 256), (256, 256))
    found = Detections(
        torch.tensor([[16.0, 8.0, 300.0, 70.0]]), torch.tensor([2]), torch.tensor([0.5]), torch.ones(1, 28, 28)
    )
    ((instance, score),) = objects_at_original(found, placed)
    assert instance.box_xyxy == (25.0, 12.5, 400.0, 100.0) and instance.category == 2 and score == 0.5
    assert instance.rle is not None
    mask = decode_rle(instance.rle)
    assert mask.shape == (100, 400) and mask[12:, 25:].all() and not mask[:12].any()


@pytest.mark.parametrize("room", [10**6, 0])
def test_masks_that_are_kept_are_those_that_were_decoded(room: int) -> None:
    rng = np.random.default_rng(0)
    masks = np.zeros((4, 20, 30), dtype=np.uint8)
    masks[0, 3:9, 5:30] = rng.integers(0, 2, (6, 25))
    masks[1], masks[2, 19, 29] = 1, 1  # the last is empty: its object lies outside of the frame
    store, decoded = MaskStore(torch.device("cpu")), []
    store.room = room
    for _ in range(3):
        found = store.of(7, lambda: decoded.append(7) or masks.copy())  # type: ignore[func-returns-value]
        assert found.dtype == torch.uint8 and np.array_equal(found.numpy(), masks)
    assert len(decoded) == (1 if room else 3)
