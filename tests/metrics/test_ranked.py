"""Scores of images and of anomaly maps against scikit-learn and plain references, with ties and weights; influences."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import scipy
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
    multilabel_confusion_matrix,
    roc_auc_score,
)
from sklearn.metrics import confusion_matrix as sklearn_confusion

from featprobe.errors import DataError, ShapeError
from featprobe.metrics import (
    ANOMALY_SCORES,
    IMAGE_SCORES,
    PixelCounter,
    ScoredAnomalies,
    ScoredImages,
    Statistic,
    anomaly_scores,
    anomaly_statistic,
    aupro,
    decide,
    histograms,
    image_scores,
    image_statistic,
    pixel_auroc,
    resample,
    threshold_at,
    units_needed,
)
from featprobe.metrics.pixel_counts import FEW, FEWEST, counted_pixels
from featprobe.metrics.ranked import Ranking, area_to, precision_curve

SEEDS = st.integers(0, 2**32 - 1)
QUICK = settings(max_examples=30, deadline=None)


def drawn_images(seed: int, *, multi: bool = False, labels: int = 3, units: int = 24, groups: int = 6) -> ScoredImages:
    """Units whose probabilities tie often; of exclusive labels the first says good."""
    rng = np.random.default_rng(seed)
    truth = (rng.random((units, labels)) < 0.4) if multi else np.eye(labels)[rng.integers(0, labels, units)]
    lifted = rng.random((units, labels)) + 0.5 * truth
    shares = np.round(lifted / (1.6 if multi else lifted.sum(1, keepdims=True)), 1).astype(np.float32)
    names = tuple(f"unit{i}" for i in range(units))
    own = tuple(f"group{i}" for i in (*range(groups), *rng.integers(0, groups, units - groups)))
    decided = decide(shares, np.full(labels, 0.4 if multi else 1 / labels), multi)
    thresholds = np.full(units, 0.5)
    return ScoredImages(
        names, own, shares, truth.astype(np.uint8), decided, thresholds, multi, good=None if multi else 0
    )


def repeated(images: ScoredImages, times: NDArray[np.intp]) -> ScoredImages:
    """Each unit so many times."""
    index = np.repeat(np.arange(len(times)), times)
    arrays = {name: getattr(images, name)[index] for name in ("probabilities", "truth", "decided", "thresholds")}
    ids, groups = (tuple(own[i] for i in index) for own in (images.ids, images.groups))
    return replace(images, ids=ids, groups=groups, **arrays)


def sklearn_scores(images: ScoredImages) -> dict[str, float]:
    """The scores by scikit-learn."""
    truth, said, shares = images.truth, images.decided, images.probabilities
    both = [j for j in range(truth.shape[1]) if 0 < truth[:, j].sum() < len(truth)]
    ranked = [j for j in both if images.multi or truth.shape[1] > 2 or j != images.good]
    one, other = truth.argmax(1), said.argmax(1)
    good = (truth.sum(1) == 0) if images.multi else truth[:, 0] > 0
    alarm = shares.max(1) if images.multi else 1 - shares[:, 0].astype(float)
    called = alarm > images.thresholds
    held = np.flatnonzero(truth.sum(0)).tolist()
    return {
        "auroc": np.mean([roc_auc_score(truth[:, j], shares[:, j]) for j in ranked]),
        "average_precision": np.mean([average_precision_score(truth[:, j], shares[:, j]) for j in ranked]),
        "balanced_accuracy": (
            np.mean([balanced_accuracy_score(truth[:, j], said[:, j]) for j in both])
            if images.multi
            else balanced_accuracy_score(one, other)
        ),
        "macro_f1": (
            np.mean([f1_score(truth[:, j], said[:, j], zero_division=0) for j in held])
            if images.multi
            else f1_score(one, other, labels=held, average="macro", zero_division=0)
        ),
        "recall": called[~good].mean(),
        "false_calls": called[good].mean(),
    }


def all_kinds(images: ScoredImages) -> bool:
    """Whether each label is held by some units and not by others, and so is being good."""
    held = images.truth.sum(0)
    return bool(((held > 0) & (held < len(images.truth))).all() and 0 < images.is_good.sum() < len(images.truth))


@pytest.mark.parametrize(("multi", "labels"), [(False, 2), (False, 3), (True, 1), (True, 3)])
@given(seed=SEEDS)
@QUICK
def test_scores_of_images_are_those_of_scikit_learn_with_ties_and_weights(multi, labels, seed) -> None:
    images = drawn_images(seed, multi=multi, labels=labels)
    names, index = np.unique(images.groups, return_inverse=True)
    weights = np.random.default_rng(seed + 1).integers(0, 3, len(names))
    drawn = repeated(images, weights[index])
    for own, times in ((images, np.ones(len(names))), (drawn, weights)):
        if not all_kinds(images) or not len(own.ids) or not all_kinds(own):
            continue
        wanted = sklearn_scores(own)
        found = {name: image_statistic(images, name).value(times[None].astype(float))[0] for name in IMAGE_SCORES}
        assert found == pytest.approx(wanted, abs=1e-6)
        stated = image_scores(own, [f"label{j}" for j in range(labels)])
        assert {name: stated[name] for name in wanted} == pytest.approx(wanted, abs=1e-6)


@given(seed=SEEDS)
@QUICK
def test_both_ways_to_an_auroc_count_pairs(seed) -> None:
    rng = np.random.default_rng(seed)
    scores, found, group = rng.integers(0, 5, 20) / 4, rng.random(20) < 0.5, rng.integers(0, 4, 20)
    group[:4] = range(4)
    weights = rng.integers(0, 3, (3, 4)).astype(float)
    ranking, names = Ranking.of(scores, found, group), ("a", "b", "c", "d")
    one, other = ranking._of_pairs(names), ranking.statistic(area_to(1.0), names)
    assert one.value(weights) == pytest.approx(other.value(weights), abs=1e-12, nan_ok=True)
    assert one.influence(weights) == pytest.approx(other.influence(weights), abs=1e-12)
    for row in weights:
        times = row[group]
        pairs = [
            (times[i] * times[j], float(scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]))
            for i in np.flatnonzero(found)
            for j in np.flatnonzero(~found)
        ]
        every = sum(count for count, _ in pairs)
        if every:
            wanted = sum(count * above for count, above in pairs) / every
            assert one.value(row[None])[0] == pytest.approx(wanted, abs=1e-12)


def test_a_resample_without_defects_has_no_score() -> None:
    ranking = Ranking.of(np.array([0.9, 0.2, 0.5, 0.1]), np.array([True, False, True, False]), np.array([0, 0, 0, 1]))
    for statistic in (ranking._of_pairs(("a", "b")), ranking.statistic(precision_curve, ("a", "b"))):
        without = np.array([[0.0, 2.0]])
        assert np.isnan(statistic.value(without)).all() and not statistic.influence(without).any()


def test_a_label_that_a_resample_lacks_has_its_score_on_the_whole_split_in_a_mean() -> None:
    images = drawn_images(8)
    truth = images.truth.copy()
    truth[:, 1:] = [1, 0]
    truth[:4, 1:] = [0, 1]  # the last label: in the groups of four units alone
    truth[truth[:, 0] > 0, 1:] = 0
    images = replace(images, truth=truth, groups=tuple(f"group{i // 4}" for i in range(24)))
    statistic, weights = image_statistic(images, "auroc"), np.array([[0.0, 1, 1, 1, 1, 2]])
    whole = [image_scores(images, "abc")["per_class"][name] for name in "abc"]
    index = np.repeat(np.arange(24), weights[0].astype(int).repeat(4))
    part = image_scores(repeated(images, weights[0].astype(int).repeat(4)), "abc")["per_class"]
    assert len(index) == 24 and np.isnan(part["c"])
    assert statistic.value(weights)[0] == pytest.approx((part["a"] + part["b"] + whole[2]) / 3)


def slope(statistic: Statistic, weights: NDArray[np.float64], group: int) -> float:
    step = 1e-5 * np.eye(weights.shape[1])[group]
    return ((statistic.value(weights + step) - statistic.value(weights - step)) / 2e-5)[0]


def check_influence(statistic: Statistic, weights: NDArray[np.float64]) -> None:
    """That influences are derivatives, and sum to 0."""
    influence = statistic.influence(weights)
    assert (weights * influence).sum(1) == pytest.approx(np.zeros(len(weights)), abs=1e-9)
    for group in np.flatnonzero(weights[0]):
        assert influence[0, group] == pytest.approx(slope(statistic, weights[:1], group), abs=1e-6)


@pytest.mark.parametrize("score", IMAGE_SCORES)
@pytest.mark.parametrize("multi", [False, True])
@given(seed=SEEDS)
@settings(max_examples=10, deadline=None)
def test_influences_of_image_scores_are_derivatives(score, multi, seed) -> None:
    statistic = image_statistic(drawn_images(seed, multi=multi), score)
    check_influence(statistic, 1.0 + np.random.default_rng(seed).integers(0, 3, (1, 6)))


@given(seed=SEEDS)
@QUICK
def test_influences_of_curves_are_derivatives_also_where_groups_are_many(seed) -> None:
    rng = np.random.default_rng(seed)
    scores, found, group = rng.integers(0, 9, 30), rng.random(30) < 0.5, np.arange(30) % 10
    ranking, names = Ranking.of(scores, found, group), tuple(map(str, range(10)))
    weights = 1.0 + rng.integers(0, 3, (1, 10))
    for curve in (area_to(1.0), area_to(1 / np.pi), precision_curve):  # no share of units is 1 / pi: there is no kink
        check_influence(ranking.statistic(curve, names), weights)


def test_a_head_that_knows_nothing_of_good_has_no_recall_and_labels_that_none_has_take_no_part() -> None:
    images = replace(drawn_images(5), good=None)
    found = image_scores(images, ["a", "b", "c"])
    assert np.isnan(found["recall"]) and np.isnan(found["false_calls"])
    more = replace(
        images,
        probabilities=np.hstack([images.probabilities, np.full((24, 1), 0.9, np.float32)]),
        truth=np.hstack([images.truth, np.zeros((24, 1), np.uint8)]),
        decided=np.hstack([images.decided, np.zeros((24, 1), np.uint8)]),
    )
    again = image_scores(more, ["a", "b", "c", "d"])
    for name in ("auroc", "average_precision", "balanced_accuracy", "macro_f1"):
        assert again[name] == found[name]
    assert np.isnan(again["per_class"]["d"])


@pytest.mark.parametrize("multi", [False, True])
def test_confusions_are_scikit_learns(multi: bool) -> None:
    images = drawn_images(3, multi=multi)
    found = image_scores(images, ["a", "b", "c"])["confusion"]
    if multi:
        wanted = multilabel_confusion_matrix(images.truth, images.decided)
    else:
        wanted = sklearn_confusion(images.truth.argmax(1), images.decided.argmax(1), labels=range(3))
    assert found == wanted.tolist()


def test_decisions_take_the_largest_multiple_of_the_prior() -> None:
    shares, prior = np.array([[0.5, 0.3, 0.2]]), np.array([0.7, 0.3, 0.0])
    assert decide(shares, prior, multi=False).tolist() == [[0, 1, 0]]
    assert decide(shares, prior, multi=True).tolist() == [[0, 1, 0]]


# Thresholds


@given(st.lists(st.integers(0, 8), min_size=10, max_size=60), st.sampled_from([0.1, 0.25, 0.5]))
@QUICK
def test_a_threshold_lets_no_more_than_its_rate_through_and_no_lower_one_does(scores, rate) -> None:
    found = threshold_at(scores, rate)
    kept = np.array(scores)
    assert (kept > found).mean() <= rate + 1e-9
    lower = kept[kept < found]
    assert not len(lower) or (kept > lower.max()).mean() > rate


def test_too_few_good_images_are_refused_with_the_number_that_a_rate_needs() -> None:
    assert units_needed(0.01) == (100, 300)
    with pytest.raises(DataError, match=r"1 % can't be set with 40 good validation images(?s:.*)100 or more(?s:.*)300"):
        threshold_at(np.arange(40), 0.01)
    assert threshold_at(np.arange(40), 0.0) == 39
    with pytest.raises(DataError, match="not finite"):
        threshold_at([0.1, np.nan], 0.5)


# Anomalies


def maps_of(
    seed: int, *, side: int = 12, count: int = 6, steps: int = 16
) -> tuple[list[NDArray[np.float32]], list[NDArray[np.bool_]]]:
    """Maps whose scores tie often, and the defects of every second image, some of which touch at a corner."""
    rng = np.random.default_rng(seed)
    maps, defects = [], []
    for image in range(count):
        defect = np.zeros((side, side), bool)
        for _ in range(rng.integers(1, 5) if image % 2 else 0):
            top, left, size = [*rng.integers(0, side, 2).tolist(), rng.integers(1, max(2, side // 4))]
            defect[top : top + size, left : left + size] = True
        maps.append((np.round(steps * (rng.random((side, side)) + 0.5 * defect)) / steps - 0.4).astype(np.float32))
        defects.append(defect)
    return maps, defects


def counted(maps, defects, groups=None, ignored=None) -> ScoredAnomalies:
    """The same as a head's results; a unit's score is the largest of its map."""
    counter = PixelCounter()
    for unit, (scores, defect) in enumerate(zip(maps, defects, strict=True)):
        counter.add(unit, scores, defect, None if ignored is None else ignored[unit])
    names = tuple(f"unit{i}" for i in range(len(maps)))
    return ScoredAnomalies(
        names, tuple(groups or names), np.array([own.max() for own in maps], float),
        np.array([not own.any() for own in defects]), np.full(len(maps), 0.9),
        histograms(range(len(maps)), counter.units.items()),
    )  # fmt: skip


def plain_aupro(maps, defects, limit: float) -> float:
    """Threshold by threshold: the mean share of each region that is called, over the share of good pixels called."""
    regions = []
    for scores, defect in zip(maps, defects, strict=True):
        numbered, count = scipy.ndimage.label(defect, structure=np.ones((3, 3)))
        regions += [scores[numbered == i] for i in range(1, count + 1)]
    good = np.concatenate([scores[~defect] for scores, defect in zip(maps, defects, strict=True)])
    points = [(0.0, 0.0)]
    for threshold in sorted({float(v) for own in maps for v in own.ravel()}, reverse=True):
        points.append(((good >= threshold).mean(), np.mean([(own >= threshold).mean() for own in regions])))
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 >= limit:
            break
        end = min(x1, limit)
        y = y1 if x1 <= limit else y0 + (y1 - y0) * (end - x0) / (x1 - x0)
        area += (end - x0) * (y0 + y) / 2
    return area / limit


@given(seed=SEEDS, limit=st.sampled_from([0.05, 0.3, 1.0]))
@QUICK
def test_areas_of_maps_are_those_of_plain_references(seed, limit) -> None:
    maps, defects = maps_of(seed)
    assert aupro(maps, defects, limit) == pytest.approx(plain_aupro(maps, defects, limit), abs=1e-9)
    flat = (np.concatenate([own.ravel() for own in every]) for every in (defects, maps))
    assert pixel_auroc(maps, defects) == pytest.approx(roc_auc_score(*flat), abs=1e-9)
    scores = anomaly_scores(counted(maps, defects))
    assert scores["aupro"] == pytest.approx(plain_aupro(maps, defects, 0.3), abs=1e-9)
    assert scores["pixel_auroc"] == pytest.approx(pixel_auroc(maps, defects), abs=1e-9)


@pytest.mark.parametrize("side", [64, 160])  # 160 x 160 pixels are more than FEW
@given(seed=SEEDS)
@settings(max_examples=5, deadline=None)
def test_histograms_agree_with_whole_maps_to_1e_4(side, seed) -> None:
    maps, defects = maps_of(seed, side=side, steps=10**6)
    found = counted(maps, defects)
    assert FEWEST < found.pixels.normal.shape[1] < 20_000 and (side**2 > FEW) == (side == 160)
    scores = anomaly_scores(found)
    assert scores["pixel_auroc"] == pytest.approx(pixel_auroc(maps, defects), abs=1e-4)
    assert scores["aupro"] == pytest.approx(aupro(maps, defects), abs=1e-4)


@given(seed=SEEDS)
@settings(max_examples=15, deadline=None)
def test_weighted_scores_of_anomalies_are_those_of_images_that_often(seed) -> None:
    maps, defects = maps_of(seed)
    groups = ["a", "b", "c", "a", "b", "c"]
    found = counted(maps, defects, groups)
    weights = np.random.default_rng(seed).integers(1, 3, 3)
    index = np.repeat(np.arange(6), np.tile(weights, 2))
    again = counted([maps[i] for i in index], [defects[i] for i in index])
    wanted = anomaly_scores(again)
    for name in ANOMALY_SCORES:
        value = anomaly_statistic(found, name).value(weights[None].astype(float))[0]
        assert value == pytest.approx(wanted[name], abs=1e-9, nan_ok=True)
    truth = ~again.good
    assert wanted["image_auroc"] == pytest.approx(roc_auc_score(truth, again.scores))
    assert wanted["image_f1"] == pytest.approx(f1_score(truth, again.scores > 0.9, zero_division=0))


@pytest.mark.parametrize("score", ANOMALY_SCORES)
@given(seed=SEEDS)
@settings(max_examples=8, deadline=None)
def test_influences_of_anomaly_scores_are_derivatives(score, seed) -> None:
    maps, defects = maps_of(seed)
    statistic = anomaly_statistic(counted(maps, defects), score)
    check_influence(statistic, 1.0 + np.random.default_rng(seed).integers(0, 3, (1, 6)))
    assert resample(statistic, 9, 0).values.shape == (9,)


def test_ignored_pixels_count_nowhere() -> None:
    maps, defects = maps_of(11)
    ignored = [np.random.default_rng(i).random(own.shape) < 0.3 for i, own in enumerate(maps)]
    scores = anomaly_scores(counted(maps, defects, ignored=ignored))
    kept = [own & ~left for own, left in zip(defects, ignored, strict=True)]
    flat = [np.concatenate([own[~left] for own, left in zip(every, ignored, strict=True)]) for every in (kept, maps)]
    assert scores["pixel_auroc"] == pytest.approx(roc_auc_score(*flat))


def test_images_that_several_processes_counted_come_together_in_one_kind_of_bins() -> None:
    maps, defects = maps_of(4, side=40, steps=10**6)
    whole = counted(maps, defects).pixels
    parts = [PixelCounter(), PixelCounter(most=2000)]  # the second has to drop bits
    for unit, (scores, defect) in enumerate(zip(maps, defects, strict=True)):
        parts[unit % 2].add(unit, scores, defect)
    assert sum(len(own.codes) for own in parts[1].units.values()) <= 2000
    found = histograms(range(6), [pair for part in parts[::-1] for pair in part.units.items()])
    assert (found.normal.sum(1) == whole.normal.sum(1)).all() and (found.defect.sum(1) == whole.defect.sum(1)).all()
    assert (found.regions == whole.regions).all()


def test_folds_with_bins_of_their_own_are_joined_to_one_test_set() -> None:
    maps, defects = maps_of(9, side=24, count=8)
    parts = [counted(maps[:4], defects[:4]), counted(maps[4:], defects[4:])]
    scores = anomaly_scores(ScoredAnomalies.joined(parts))
    assert scores["aupro"] == pytest.approx(aupro(maps, defects))
    assert scores["pixel_auroc"] == pytest.approx(pixel_auroc(maps, defects))


def test_sets_without_masks_defects_or_thresholds_have_the_scores_that_exist() -> None:
    maps, defects = maps_of(2)
    found = replace(counted(maps, defects), pixels=None, thresholds=np.full(6, np.nan))
    scores = anomaly_scores(found)
    assert {name for name in ANOMALY_SCORES if not np.isnan(scores[name])} == {"image_auroc"}
    assert scores["confusion"] is None and scores["regions"] is None
    good = anomaly_scores(counted(maps[::2], defects[::2]))
    assert {name for name in ANOMALY_SCORES if not np.isnan(good[name])} == {"false_calls"}


# Files


def arrays_of(data: bytes, tmp_path) -> dict[str, NDArray]:
    path = tmp_path / "scores.npz"
    path.write_bytes(data)
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def test_what_was_packed_is_read_again(tmp_path) -> None:
    images = drawn_images(1)
    again = ScoredImages.from_arrays(arrays_of(images.to_npz(), tmp_path))
    assert again.to_npz() == images.to_npz() and again.good == 0
    found = counted(*maps_of(1))
    read = ScoredAnomalies.from_arrays(arrays_of(found.to_npz(), tmp_path))
    assert anomaly_scores(read) == anomaly_scores(found)
    assert ScoredAnomalies.from_arrays(arrays_of(replace(found, pixels=None).to_npz(), tmp_path)).pixels is None


@pytest.mark.parametrize(
    "broken",
    [
        lambda: replace(drawn_images(1), ids=("one",)),
        lambda: replace(drawn_images(1), truth=np.full((24, 3), 255, np.uint8)),
        lambda: replace(drawn_images(1), truth=np.ones((24, 3), np.uint8)),
        lambda: replace(drawn_images(1), good=7),
        lambda: replace(drawn_images(1), thresholds=np.arange(24.0)).to_npz(),
        lambda: replace(counted(*maps_of(1)), scores=np.zeros(2)),
        lambda: replace(counted(*maps_of(1)).pixels, regions=np.zeros(6, np.int32)),
        lambda: replace(counted(*maps_of(1)).pixels, edges=np.zeros(counted(*maps_of(1)).pixels.edges.shape)),
        lambda: PixelCounter().add(0, np.zeros((2, 2), np.float32), np.zeros((3, 2), bool)),
        lambda: histograms([0], [(1, counted_pixels(np.zeros((2, 2), np.float32), np.zeros((2, 2), bool)))]),
    ],
)
def test_what_does_not_fit_together_is_refused(broken: Callable[[], object]) -> None:
    with pytest.raises(ShapeError):
        broken()


def test_maps_that_are_not_finite_are_refused() -> None:
    with pytest.raises(DataError, match="not finite"):
        PixelCounter().add(0, np.full((2, 2), np.nan, np.float32), np.zeros((2, 2), bool))
