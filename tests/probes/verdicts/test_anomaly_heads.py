"""Anomaly heads: what a plain reference finds, padding, batches, seeds, files."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from scipy.ndimage import gaussian_filter
from sklearn.covariance import OAS
from torch import Tensor
from torch.nn.functional import interpolate

from featprobe.errors import ProbeError, ShapeError
from featprobe.features import Features
from featprobe.geometry import Placement
from featprobe.levels import FeatureLevel
from featprobe.probes import execution
from featprobe.probes.cards import HeadRecipe
from featprobe.probes.head import AnomalyHead
from featprobe.probes.heads import build_head
from featprobe.probes.verdicts import coreset, map_heads, neighbours, patchcore
from featprobe.probes.verdicts.anomaly_knn import AnomalyKnnHead
from featprobe.probes.verdicts.coreset import Draw, farthest_first, projected_columns
from featprobe.probes.verdicts.gaussian import CellSums, GaussianHead
from featprobe.probes.verdicts.heat_maps import SIGMA, maps_at_original
from featprobe.probes.verdicts.map_heads import MapAnomalyHead
from featprobe.probes.verdicts.neighbours import nearest
from featprobe.probes.verdicts.patchcore import PatchCoreHead

LEVELS = (FeatureLevel("stride8", 5, 8), FeatureLevel("stride16", 7, 16))
FRAME = (48, 64)
CPU = torch.device("cpu")
HEADS: tuple[type[MapAnomalyHead], ...] = (PatchCoreHead, GaussianHead)


def some_features(images: int, seed: int, content: Sequence[Sequence[int]] | None = None) -> Features:
    random = torch.Generator().manual_seed(seed)
    maps = {v.name: torch.randn(images, v.channels, *v.cells(FRAME), generator=random) + 3 for v in LEVELS}
    return Features(maps, FRAME, None if content is None else torch.tensor(content, dtype=torch.int32))


def rows_of(features: Features, rows: slice) -> Features:
    content = None if features.content is None else features.content[rows]
    return Features({name: m[rows] for name, m in features.maps.items()}, features.frame, content)


def in_batches(features: Features, size: int) -> Callable[[], Iterator[Features]]:
    return lambda: (rows_of(features, slice(i, i + size)) for i in range(0, features.batch, size))


def fitted(
    kind: type[MapAnomalyHead], features: Features, size: int = 3, seed: int = 0, **more: bool
) -> MapAnomalyHead:
    head = kind(LEVELS)
    head.fit(in_batches(features, size), seed, coreset=0.1, remove_position=more.get("remove_position", False))
    return head.eval()


def plain_farthest_first(points: Tensor, count: int, start: int) -> list[int]:
    chosen, bounds = [start], (points - points[start]).square().sum(1)
    while len(chosen) < count:
        bounds[chosen[-1]] = -1
        chosen.append(int(bounds.argmax()))
        bounds = bounds.minimum((points - points[chosen[-1]]).square().sum(1))
        bounds[chosen] = -1
    return chosen


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), points=st.integers(1, 200), share=st.floats(0, 1), few=st.sampled_from([1, 5, 30]))
def test_the_coreset_is_that_of_comparing_every_point_with_every_centre(
    seed: int, points: int, share: float, few: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(points, 6, generator=random, dtype=torch.float64) * 3 + 100
    count, start = max(1, int(share * points)), seed % points
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coreset, "FEWEST_ACTIVE", few)
        patch.setattr(coreset, "AT_ONCE", 64)
        found = farthest_first(values.clone(), count, start).tolist()
    assert found == plain_farthest_first(values, count, start)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), few=st.sampled_from([1, 4, 1000]))
def test_each_centre_is_as_far_as_any_point_where_many_are_the_same(seed: int, few: int) -> None:
    random = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 3, (60, 3), generator=random).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coreset, "FEWEST_ACTIVE", few)
        found = farthest_first(values.clone(), 60, 7)
    assert sorted(found.tolist()) == list(range(60)) and found[0] == 7
    for number in range(1, 60):
        apart = torch.cdist(values, values[found[:number]]).amin(1)
        assert float(apart[found[number]]) == pytest.approx(float(apart.max()), abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000), queries=st.integers(0, 70), bank=st.integers(1, 90), count=st.integers(1, 12),
    at_once=st.sampled_from([64, 500, 2**21]), beside=st.sampled_from([1, 7, 2**13]),
)  # fmt: skip
def test_search_in_blocks_is_brute_force(
    seed: int, queries: int, bank: int, count: int, at_once: int, beside: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, 8, generator=random) + 20 for n in (queries, bank))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "AT_ONCE", at_once)
        patch.setattr(neighbours, "MOST_BESIDE", beside)
        distances, places = nearest(x, y, count)
    every = torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist")
    wanted, order = every.sort(dim=1)
    assert distances.numpy() == pytest.approx(wanted[:, :count].numpy(), rel=1e-5)
    assert torch.equal(places, order[:, : min(count, bank)])


def test_an_example_of_the_bank_is_at_distance_zero() -> None:
    bank = torch.randn(50, 30, generator=torch.Generator().manual_seed(0)) + 1000
    distances, places = nearest(bank, bank, 1)
    assert not distances.any() and torch.equal(places[:, 0], torch.arange(50))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), cells=st.integers(2, 80), batch=st.integers(1, 40), dead=st.booleans())
def test_streamed_sums_are_the_covariance_of_all_cells(seed: int, cells: int, batch: int, dead: bool) -> None:
    random = np.random.default_rng(seed)
    values = random.normal(size=(cells, 6)) @ random.normal(size=(6, 6)) + 50
    values[:, 0] = 3.0 if dead else values[:, 0]
    sums = CellSums(6, CPU)
    for part in torch.from_numpy(values).split(batch):
        sums.add(part)
    covariance, share = sums.covariance()
    rival = OAS().fit(values)
    assert sums.mean().numpy() == pytest.approx(values.mean(0), rel=1e-12)
    assert share == pytest.approx(rival.shrinkage_, rel=1e-6)
    assert covariance.numpy() == pytest.approx(rival.covariance_, rel=1e-6, abs=1e-9)


def test_the_gaussian_map_is_the_mahalanobis_distance_of_independent_levels() -> None:
    features, other = some_features(6, 0), some_features(2, 1)
    found = fitted(GaussianHead, features)(other)
    wanted = torch.zeros(2, *LEVELS[0].cells(FRAME))
    for level in LEVELS:
        cells = features.maps[level.name].movedim(1, -1).flatten(0, 2).double().numpy()
        rival = OAS().fit(cells)
        apart = rival.mahalanobis(other.maps[level.name].movedim(1, -1).flatten(0, 2).double().numpy())
        own = torch.from_numpy(apart / 12).float().view(2, 1, *level.cells(FRAME))
        wanted += interpolate(own, LEVELS[0].cells(FRAME), mode="bilinear")[:, 0]
    assert found.maps is not None and torch.allclose(found.maps, wanted.sqrt(), rtol=1e-4)
    assert torch.equal(found.scores, found.maps.amax((1, 2)))


def plain_patchcore(train: Features, test: Features, bank: Tensor) -> tuple[Tensor, Tensor]:
    """Maps and scores, cell by cell and neighbour by neighbour, in float64."""

    def averaged(m: Tensor) -> Tensor:
        out = torch.zeros_like(m)
        for row in range(m.shape[1]):
            for column in range(m.shape[2]):
                out[:, row, column] = m[:, max(0, row - 1) : row + 2, max(0, column - 1) : column + 2].sum((1, 2)) / 9
        return out

    maps, scores = [], []
    for image in range(test.batch):
        fine, coarse = (averaged(test.maps[v.name][image].double()) for v in LEVELS)
        coarse = interpolate(coarse[None], fine.shape[1:], mode="bilinear")[0]
        cells = torch.cat([fine, coarse]).flatten(1).T
        apart = torch.cdist(cells, bank, compute_mode="donot_use_mm_for_euclid_dist")
        own = apart.amin(1)
        worst = int(own.argmax())
        near = int(apart[worst].argmin())
        beside = torch.cdist(bank[near : near + 1], bank)[0].argsort()[: patchcore.NEIGHBOURS]
        around = apart[worst][beside]
        scores.append((1 - around[0].exp() / around.exp().sum()) * own[worst])
        maps.append(own.view(fine.shape[1:]))
    return torch.stack(maps), torch.stack(scores)


def test_patchcore_is_the_papers_steps_one_by_one() -> None:
    features, other = some_features(6, 0), some_features(3, 1)
    head = fitted(PatchCoreHead, features)
    assert isinstance(head, PatchCoreHead) and len(head.bank) == int(0.1 * 6 * 48)
    maps, scores = plain_patchcore(features, other, head.bank.double())
    found = head(other)
    assert found.maps is not None and torch.allclose(found.maps.double(), maps, rtol=1e-4)
    assert torch.allclose(found.scores.double(), scores, rtol=1e-4)


def test_every_cell_of_the_bank_is_a_cell_of_a_good_image() -> None:
    features = some_features(6, 0)
    head = fitted(PatchCoreHead, features)
    assert isinstance(head, PatchCoreHead)
    cells = head.cells_of(features)[0]
    distances, places = nearest(head.bank, cells, 1)
    assert distances.max() < 1e-5 and len(places.unique()) == len(places)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("remove", [False, True])
@pytest.mark.parametrize("content", [(32, 48), (30, 41)], ids=["whole cells", "parts of cells"])
def test_padding_changes_nothing(kind: type[MapAnomalyHead], remove: bool, content: tuple[int, int]) -> None:
    """Neither what lies in it, nor that it is there: images cut to their cells have the same maps and scores."""
    features = some_features(6, 0, [content] * 6)
    other = {}
    for level in LEVELS:
        share = features.valid_share(level.stride)
        assert share is not None
        other[level.name] = features.maps[level.name].masked_fill(share[:, None] == 0, float("inf"))
    padded = Features(other, FRAME, features.content)
    found = [fitted(kind, own, remove_position=remove)(own) for own in (features, padded, features.cut(content))]
    rows, columns = (-(-side // 8) for side in content)
    for one in found:
        assert one.maps is not None and found[0].maps is not None
        assert torch.allclose(one.maps[:, :rows, :columns], found[0].maps[:, :rows, :columns], rtol=1e-4, atol=1e-5)
        assert torch.allclose(one.scores, found[0].scores, rtol=1e-4)
        assert not one.maps[:, rows:].any() and not one.maps[:, :, columns:].any()


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("remove", [False, True])
def test_batches_of_any_size_give_the_same(kind: type[MapAnomalyHead], remove: bool) -> None:
    features = some_features(7, 0, [[48, 64]] * 3 + [[24, 40]] * 4)
    heads = [fitted(kind, features, size, remove_position=remove) for size in (1, 3, 7)]
    for head in heads[1:]:
        for name, value in heads[0].state_dict().items():
            assert torch.equal(value.nan_to_num(), head.state_dict()[name].nan_to_num()), name
    whole = heads[0](features)
    parts = [heads[0](own) for own in in_batches(features, 2)()]
    assert torch.equal(whole.scores, torch.cat([own.scores for own in parts]))


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("at_once", [2**26, 2000])
def test_few_operations_and_images_one_by_one_are_the_same(
    kind: type[MapAnomalyHead], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, and on a CPU."""
    features = some_features(7, 0, [[48, 64]] * 3 + [[24, 40]] * 4)
    head = fitted(kind, features, remove_position=True)
    found = head(features)
    monkeypatch.setattr(execution, "whole_batches", lambda device: True)
    monkeypatch.setattr(map_heads, "AT_ONCE", at_once)
    other = fitted(kind, features, remove_position=True)
    for name, value in head.state_dict().items():
        assert torch.allclose(value, other.state_dict()[name], rtol=1e-4, atol=1e-5, equal_nan=True), name
    assert torch.allclose(found.scores, other(features).scores, rtol=1e-4)


def test_a_seed_decides_the_bank() -> None:
    features = some_features(6, 0)
    banks = [fitted(PatchCoreHead, features, seed=seed).get_buffer("bank") for seed in (0, 0, 1)]
    assert torch.equal(banks[0], banks[1]) and not torch.equal(banks[0], banks[2])


@pytest.mark.parametrize("kind", HEADS)
def test_without_the_mean_map_a_place_tells_nothing(kind: type[MapAnomalyHead]) -> None:
    """What all good images have at one place is as good as anything; without it, only what differs there counts."""
    features = some_features(8, 0)
    place = torch.zeros(1, 1, 3, 4)
    place[..., 0, 0] = 50
    features.maps["stride16"].add_(place)
    head = fitted(kind, features, remove_position=True)
    moved = {v.name: features.maps[v.name] - features.maps[v.name].mean(0) for v in LEVELS}
    plain = fitted(kind, Features(moved, FRAME))
    found, wanted = head(features), plain(Features(moved, FRAME))
    assert torch.allclose(found.scores, wanted.scores, rtol=1e-3)
    with pytest.raises(ShapeError, match="48x64 pixels, and these frames have 64x48"):
        head(Features({n: m.transpose(2, 3) for n, m in features.maps.items()}, (64, 48)))


@pytest.mark.parametrize("kind", ["patchcore", "gaussian", "knn"])
@pytest.mark.parametrize("remove", [False, True])
def test_a_saved_head_needs_its_recipe_alone(kind: str, remove: bool) -> None:
    features = some_features(6, 0)
    vectors = torch.randn(6, 2 * 12, generator=torch.Generator().manual_seed(2))
    recipe = HeadRecipe("anomaly", kind, ("good", "defect"))
    head, copy = build_head(recipe, LEVELS), build_head(recipe, LEVELS)
    if isinstance(head, AnomalyHead):
        head.fit(in_batches(features, 4), 0, coreset=0.1, remove_position=remove)
        given: Features | Tensor = features
    else:
        assert isinstance(head, AnomalyKnnHead)
        head.fit(lambda: vectors.split(4), 0)
        given = vectors
    with pytest.raises(ProbeError, match="knows no good image"):
        copy(given)
    copy.load_state_dict(load(save(head.state_dict())))
    assert torch.equal(head(given).scores, copy(given).scores)


@pytest.mark.parametrize("fault", ["other channels", "other numbers", "not finite", "one axis less"])
def test_a_bank_that_is_none_is_refused(fault: str) -> None:
    head = fitted(PatchCoreHead, some_features(6, 0))
    state = head.state_dict()
    bank = state["bank"]
    state["bank"] = {
        "other channels": bank[:, :-1], "other numbers": bank.to(torch.uint8), "not finite": bank / 0,
        "one axis less": bank[0],
    }[fault]  # fmt: skip
    with pytest.raises(RuntimeError, match="bank"):
        PatchCoreHead(LEVELS).load_state_dict(state)


def test_levels_are_those_of_stride_8_and_16_where_none_are_named() -> None:
    levels = [FeatureLevel(f"stride{s}", s, s) for s in (4, 8, 16, 32)]
    vit = [FeatureLevel(f"block{b}", 6, 14) for b in (5, 11)]
    classes = ("good", "defect")
    for kind in ("patchcore", "gaussian"):
        own = build_head(HeadRecipe("anomaly", kind, classes), levels)
        assert [level.stride for level in own.levels] == [8, 16]
        named = build_head(HeadRecipe("anomaly", kind, classes, ("stride4", "stride32")), levels)
        assert [level.stride for level in named.levels] == [4, 32]
        assert build_head(HeadRecipe("anomaly", kind, classes), vit).levels == tuple(vit)


def test_without_good_images_nothing_is_fitted() -> None:
    for kind in HEADS:
        with pytest.raises(ProbeError, match="no good image"):
            kind(LEVELS).fit(lambda: iter(()), 0, coreset=0.01, remove_position=True)
        with pytest.raises(ProbeError, match="no good image"):
            kind(LEVELS).fit(lambda: iter(()), 0, coreset=0.01, remove_position=False)
    with pytest.raises(ProbeError, match="no good image"):
        AnomalyKnnHead(LEVELS).fit(lambda: iter(()), 0)


def test_the_knn_head_is_the_mean_distance_of_standardised_vectors() -> None:
    random = torch.Generator().manual_seed(0)
    good, other = (torch.randn(n, 24, generator=random) * 5 + 9 for n in (9, 4))
    good[:, 3] = other[:, 3] = 2.0
    other[0, 3] = 100  # a value that never changes says nothing
    head = AnomalyKnnHead(LEVELS)
    fit = head.fit(lambda: good.split(4), 0)
    moved = [(x - good.mean(0)) / good.std(0, correction=0).clamp(min=1e-9) for x in (other, good)]
    moved = [torch.cat([x[:, :3], x[:, 4:]], 1) for x in moved]
    wanted = torch.cdist(*moved).sort(1).values[:, :2].mean(1) / 24**0.5
    assert head(other).maps is None and torch.allclose(head(other).scores, wanted, rtol=1e-4)
    assert fit.chosen["bank"] == 9 and not fit.notes


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), cells=st.integers(1, 400), batch=st.integers(1, 90))
def test_a_draw_keeps_what_memory_holds_and_does_not_see_batches(seed: int, cells: int, batch: int) -> None:
    values = torch.arange(cells, dtype=torch.float32)[:, None].repeat(1, 3)
    draws = []
    for size in (batch, cells):
        draw = Draw(3, seed, CPU, 100 * 3 * 4)
        for part in values.split(size):
            draw.add(part)
        assert draw.seen == cells and draw.kept <= 100 and (draw.kept == cells or cells > 100)
        assert torch.equal(draw.values[:, 0].long(), draw.places) and (draw.places.diff() > 0).all()
        draws.append(draw.places)
    assert torch.equal(*draws)


def test_a_draw_favours_no_cell() -> None:
    values = torch.zeros(1000, 1)
    counts = torch.zeros(1000)
    for seed in range(400):
        draw = Draw(1, seed, CPU, 200 * 4)
        draw.add(values)
        counts[draw.places] += 1
    thirds = [float(part.mean()) / 400 for part in counts.split(334)]
    assert max(thirds) - min(thirds) < 0.01 and 0.1 < sum(thirds) / 3 <= 0.2


def test_a_bank_of_drawn_cells_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    features = some_features(6, 0)
    monkeypatch.setattr(patchcore, "Draw", lambda *given: Draw(*given, 100 * 12 * 4))
    monkeypatch.setattr(patchcore, "MOST_BANK_BYTES", 4 * 12 * 4)
    head = PatchCoreHead(LEVELS)
    fit = head.fit(in_batches(features, 4), 0, coreset=0.2, remove_position=False)
    assert fit.chosen["cells"] == 288 and fit.chosen["drawn"] <= 100 and fit.chosen["bank"] == len(head.bank) == 4
    assert len(fit.notes) == 2 and "288 cells" in fit.notes[0] and "holds 4 cells" in fit.notes[1]


def test_a_projection_keeps_distances() -> None:
    values = torch.randn(300, 900, generator=torch.Generator().manual_seed(0))
    draw = Draw(900, 0, CPU)
    draw.add(values)
    assert projected_columns(10**5) < draw.values.shape[1] < 900
    ratio = torch.pdist(draw.values) / torch.pdist(values)
    assert 0.75 < ratio.min() and ratio.max() < 1.25 and abs(ratio.mean() - 1) < 0.02


@pytest.mark.parametrize("content", [(64, 96), (61, 50), (9, 96), (1, 5)])
def test_a_map_at_original_size_is_upsampled_smoothed_and_resized(content: tuple[int, int]) -> None:
    maps = torch.rand(2, 8, 12, generator=torch.Generator().manual_seed(0))
    rows, columns = (-(-side // 8) for side in content)
    frame = interpolate(maps[:, None, :rows, :columns], (rows * 8, columns * 8), mode="bilinear")
    frame = frame[:, 0, : content[0], : content[1]]
    smooth = [gaussian_filter(own.double().numpy(), SIGMA, mode="mirror", truncate=4.0) for own in frame]
    at_frame = torch.from_numpy(np.stack(smooth)).float()
    found = maps_at_original(maps, 8, Placement(content, content, (64, 96)))
    assert torch.allclose(found, at_frame, atol=1e-5)
    twice = (2 * content[0], content[1] + 7)
    wanted = interpolate(at_frame[:, None], twice, mode="bilinear")[:, 0]
    assert torch.allclose(maps_at_original(maps, 8, Placement(twice, content, (64, 96))), wanted, atol=1e-5)
