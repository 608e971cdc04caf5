"""Average precision under image weights: held against pycocotools on data sets whose images are really repeated."""

import copy
import math
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_average_precision import (
    CLASSES,
    IDS,
    KINDS,
    SIDE,
    ellipse,
    instance,
    one_image,
    perfect_results,
    random_results,
    random_truth,
    results,
    stock,
)

from featprobe.errors import DataError, ShapeError
from featprobe.metrics import ResampledAp, ResampledScores, TruthImage, average_precision, truth_of
from featprobe.metrics.boxes import ApKind

IMAGES = 6
seeds = st.integers(0, 10_000)
kinds = st.sampled_from(KINDS)
decimals = st.sampled_from([0, 1, 2])  # of the scores: the fewer, the more of them tie
one_resample = st.lists(st.integers(0, 4), min_size=IMAGES, max_size=IMAGES)


def random_set(seed: int, places: int = 2) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Truth and predictions of a few images, with crowds, empty images and a class that is never there."""
    rng = np.random.default_rng(seed)
    truth = random_truth(rng, IMAGES)
    return truth, [found | {"score": round(found["score"], places)} for found in random_results(rng, truth)]


def repeated(
    truth: dict[str, Any], found: list[dict[str, Any]], weights: Sequence[int]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The data set in which each image stands as often as it counts: by id, its copies side by side."""
    copies = sorted((image["id"], i) for i, image in enumerate(truth["images"]) for _ in range(weights[i]))
    whole: dict[str, Any] = {"images": [], "annotations": [], "categories": truth["categories"]}
    predictions = []
    for number, (image_id, i) in enumerate(copies):
        whole["images"].append(truth["images"][i] | {"id": number})
        whole["annotations"] += [a | {"image_id": number} for a in truth["annotations"] if a["image_id"] == image_id]
        predictions += [p | {"image_id": number} for p in found if p["image_id"] == image_id]
    whole["annotations"] = [a | {"id": i} for i, a in enumerate(whole["annotations"], start=1)]
    return whole, predictions


def row(scores: ResampledScores, i: int) -> list[float]:
    """All numbers of one resample."""
    return [*(float(a[i]) for a in astuple(scores)[:3]), *scores.per_class[i], *scores.per_class_50[i]]


def by_pycocotools(truth: dict[str, Any], found: list[dict[str, Any]], kind: ApKind) -> list[float]:
    """The same numbers of a data set as it is."""
    scores = average_precision(truth, found, kind)
    return [scores.ap, scores.ap50, scores.ap75, *scores.per_class, *scores.per_class_50]


def near(wanted: Sequence[float] | NDArray[np.float64]) -> Any:
    return pytest.approx(wanted, abs=1e-9, rel=0, nan_ok=True)


def identical(a: ResampledScores, b: ResampledScores) -> bool:
    """Equal to the last bit, nan in the same places."""
    return all(np.array_equal(x, y, equal_nan=True) for x, y in zip(astuple(a), astuple(b), strict=True))


@settings(max_examples=20, deadline=None)
@given(seeds, decimals, kinds)
def test_weights_of_one_give_the_scores_of_the_data_set(seed: int, places: int, kind: ApKind) -> None:
    truth, found = random_set(seed, places)
    scores = ResampledAp(truth, found, kind).scores(np.ones((1, IMAGES), dtype=int))
    assert row(scores, 0) == near(by_pycocotools(truth, found, kind))


@settings(max_examples=60, deadline=None)
@given(seeds, decimals, kinds, st.lists(one_resample, min_size=1, max_size=3))
def test_a_weight_is_a_number_of_copies(seed: int, places: int, kind: ApKind, weights: list[list[int]]) -> None:
    truth, found = random_set(seed, places)
    scores = ResampledAp(truth, found, kind).scores(weights)
    for i, own in enumerate(weights):
        assert row(scores, i) == near(by_pycocotools(*repeated(truth, found, own), kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("places", [0, 1, 2])
def test_the_numbers_are_those_of_stock_pycocotools_on_files(tmp_path: Path, places: int, kind: ApKind) -> None:
    truth, found = random_set(11, places)
    weights = [3, 0, 1, 2, 1, 4]
    scores = ResampledAp(truth, found, kind).scores([weights])
    evaluation = stock(tmp_path, *repeated(truth, found, weights), kind)
    assert row(scores, 0)[:3] == near(evaluation.stats[:3].tolist())
    assert 0.05 < scores.ap[0] < 0.95


@settings(max_examples=20, deadline=None)
@given(seeds, kinds, one_resample)
def test_an_image_of_weight_zero_might_as_well_not_be_there(seed: int, kind: ApKind, weights: list[int]) -> None:
    truth, found = random_set(seed, 1)
    kept = {image["id"] for image, weight in zip(truth["images"], weights, strict=True) if weight}
    fewer = truth | {
        "images": [image for image in truth["images"] if image["id"] in kept],
        "annotations": [a for a in truth["annotations"] if a["image_id"] in kept],
    }
    scores = ResampledAp(truth, found, kind).scores([weights])
    alone = ResampledAp(fewer, [p for p in found if p["image_id"] in kept], kind).scores([[w for w in weights if w]])
    assert row(scores, 0) == near(row(alone, 0))


@settings(max_examples=20, deadline=None)
@given(seeds, kinds, one_resample, st.integers(2, 1000))
def test_weights_may_be_scaled_where_no_image_ties_with_itself(
    seed: int, kind: ApKind, weights: list[int], factor: int
) -> None:
    """Images tie with one another here: the n-th prediction of each has the same score."""
    truth, found = random_set(seed)
    position: dict[int, int] = {}
    for prediction in found:
        position[prediction["image_id"]] = position.get(prediction["image_id"], 0) + 1
        prediction["score"] = 1 / (1 + position[prediction["image_id"]])
    scores = ResampledAp(truth, found, kind).scores([weights, [factor * weight for weight in weights]])
    assert row(scores, 0) == near(row(scores, 1))


def test_a_hit_and_a_false_alarm_that_tie_in_one_image_alternate_from_copy_to_copy() -> None:
    """Once: hit, alarm. Twice: hit, alarm, hit, alarm, so that the second half is found at a precision of 2/3."""
    truth = one_image(instance((0, 0, 10, 10)))
    found = results(((0, 0, 10, 10), 0.5), ((50, 50, 10, 10), 0.5))
    scores = ResampledAp(truth, found, "bbox").scores([[1], [2], [3]])
    assert scores.ap == pytest.approx([1, (51 + 50 * 2 / 3) / 101, (34 + 33 * 2 / 3 + 34 * 3 / 5) / 101])
    for i, weight in enumerate([1, 2, 3]):
        assert row(scores, i) == near(by_pycocotools(*repeated(truth, found, [weight]), "bbox"))


@settings(max_examples=20, deadline=None)
@given(seeds, kinds, one_resample, st.permutations(range(IMAGES)))
def test_weights_go_with_the_images_however_they_are_ordered(
    seed: int, kind: ApKind, weights: list[int], order: list[int]
) -> None:
    truth, found = random_set(seed, 1)
    shuffled = truth | {"images": [truth["images"][i] for i in order]}
    scores = ResampledAp(truth, found, kind).scores([weights])
    assert identical(scores, ResampledAp(shuffled, found, kind).scores([[weights[i] for i in order]]))


def test_a_hundred_predictions_of_a_class_count_in_an_image() -> None:
    """The hit is the 101st of its class, then the 100th; of the other class it is the first."""
    box = (100, 100, 20, 20)
    truth = truth_of([TruthImage(1, (SIDE, SIDE), (instance(box, 1), instance(box, 2)))], CLASSES[:3], IDS[:2])
    wrong = [((i % 10, i // 10, 5, 5), 0.9) for i in range(100)]
    found = results(*wrong, (box, 0.5), category=IDS[0]) + results((box, 0.5), category=IDS[1])
    scores = ResampledAp(truth, found, "bbox").scores([[1], [3]])
    assert scores.per_class.tolist() == [[0, pytest.approx(1)]] * 2
    fewer = ResampledAp(truth, found[1:], "bbox").scores([[1], [3]])
    assert fewer.per_class[:, 0] == pytest.approx([1 / 100, 1 / 100])


@pytest.mark.parametrize("objects", [7, 50, 100])
def test_recall_is_compared_as_pycocotools_does(objects: int) -> None:
    """57 of 100 do not reach the recall of 0.57 there: its steps are rounded upwards in places."""
    boxes = [(16.0 * (i % 10), 16.0 * (i // 10), 8.0, 8.0) for i in range(objects)]
    truth = one_image(*(instance(box) for box in boxes))
    hits = results(*((box, 1 - i / 200) for i, box in enumerate(boxes)))
    alarms = results(*(((120 + i / 10, 150, 5, 5), 1 - i / 200 - 1 / 400) for i in range(objects)))
    found = [one for pair in zip(hits, alarms, strict=True) for one in pair]
    scores = ResampledAp(truth, found, "bbox").scores([[1], [3]])
    for i, weight in enumerate([1, 3]):
        assert row(scores, i) == near(by_pycocotools(*repeated(truth, found, [weight]), "bbox"))


def two_classes() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A class in both images, one that is found at IoU 0.8 in the second, and one that is nowhere, though predicted."""
    easy, hard = (10, 10, 20, 20), (100, 100, 10, 10)
    images = [
        TruthImage(1, (SIDE, SIDE), (instance(easy, 1),)),
        TruthImage(2, (SIDE, SIDE), (instance(easy, 1), instance(hard, 2))),
    ]
    truth = truth_of(images, CLASSES[:4], IDS[:3])
    found = perfect_results(truth)
    found[-1]["bbox"] = [100, 100, 10, 8]
    return truth, [*found, *results((easy, 0.5), category=IDS[2])]


def test_a_class_that_a_resample_lacks_is_left_out_or_held() -> None:
    truth, found = two_classes()
    ap = ResampledAp(truth, found, "bbox")
    weights = [[1, 1], [2, 0], [0, 2]]
    ignored, held = ap.scores(weights), ap.scores(weights, absent="hold")
    assert ignored.per_class == near(np.array([[1, 0.7, math.nan], [1, math.nan, math.nan], [1, 0.7, math.nan]]))
    assert np.array_equal(ignored.per_class, held.per_class, equal_nan=True)
    assert ignored.ap == near([0.85, 1, 0.85]) and held.ap == near([0.85, 0.85, 0.85])
    assert ignored.ap75 == near([1, 1, 1]) and held.ap75 == near([1, 1, 1])
    for absent, scores in (("ignore", ignored), ("hold", held)):
        for name in ("ap", "ap50", "ap75"):
            values = ap.by_group(name, [0, 1], absent)(weights)  # type: ignore[arg-type]
            assert np.array_equal(values, getattr(scores, name))


@pytest.mark.parametrize("kind", KINDS)
def test_where_nothing_is_scored_is_nan_and_where_nothing_is_found_zero(kind: ApKind) -> None:
    truth = one_image(instance((0, 0, 10, 10)))
    assert row(ResampledAp(truth, [], kind).scores([[2]]), 0) == [0] * 5
    assert np.isnan(row(ResampledAp(truth, perfect_results(truth), kind).scores([[0]], absent="ignore"), 0)).all()
    only_crowd = one_image(instance((0, 0, 60, 60), crowd=True))
    assert np.isnan(row(ResampledAp(only_crowd, perfect_results(only_crowd), kind).scores([[1]], "hold"), 0)).all()
    nothing = ResampledAp(truth_of([], CLASSES, IDS), [], kind).scores(np.empty((3, 0)))
    assert nothing.per_class.shape == (3, 4) and np.isnan(nothing.ap).all()
    assert ResampledAp(truth, [], kind).scores(np.empty((0, 1), dtype=int)).ap.shape == (0,)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.float64])
def test_a_score_by_group_weighs_all_images_of_a_group(dtype: Any) -> None:
    """Of the bootstrap, and of the jackknife, which leaves one group out."""
    truth, found = random_set(3, 1)
    groups = np.array([2, 0, 1, 0, 2, 2])
    ap = ResampledAp(truth, found, "bbox")
    drawn = np.random.default_rng(0).multinomial(3, [1 / 3] * 3, 5)
    weights = np.concatenate([drawn, 1 - np.eye(3)]).astype(dtype)
    for absent in ("ignore", "hold"):
        scores = ap.scores(weights[:, groups], absent)
        for name in ("ap", "ap50", "ap75"):
            values = ap.by_group(name, groups.tolist(), absent)(weights)  # type: ignore[arg-type]
            assert values == near(getattr(scores, name))


def test_a_resample_has_the_same_scores_in_any_company(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit: alone, beside others, or when memory is had for one resample at a time."""
    truth, found = random_set(4, 1)
    ap = ResampledAp(truth, found, "segm")
    weights = np.random.default_rng(1).multinomial(IMAGES, [1 / IMAGES] * IMAGES, 40)
    together = ap.scores(weights)
    assert identical(together, ap.scores(weights)) and identical(
        together, ResampledAp(truth, found, "segm").scores(weights)
    )
    alone = [ap.scores(own[None]) for own in weights]
    assert [row(scores, 0) for scores in alone] == [near(row(together, i)) for i in range(40)]
    monkeypatch.setattr("featprobe.metrics.resampled.AT_ONCE", 1)
    assert identical(together, ap.scores(weights))
    assert together.ap.std() > 0


def test_images_may_be_called_by_text() -> None:
    truth, found = random_set(5, 1)
    named = truth | {
        "images": [image | {"id": f"{image['id']:04d}.png"} for image in truth["images"]],
        "annotations": [a | {"image_id": f"{a['image_id']:04d}.png"} for a in truth["annotations"]],
    }
    others = [prediction | {"image_id": f"{prediction['image_id']:04d}.png"} for prediction in found]
    weights = [[1, 2, 0, 3, 1, 1]]
    assert identical(
        ResampledAp(truth, found, "bbox").scores(weights), ResampledAp(named, others, "bbox").scores(weights)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_given_is_changed_and_nothing_is_printed(kind: ApKind, capsys: pytest.CaptureFixture[str]) -> None:
    truth, found = random_set(6, 0)
    weights: NDArray[np.int64] = np.array([[1, 2, 3, 0, 1, 2]])
    before = copy.deepcopy((truth, found, weights.tolist()))
    ap = ResampledAp(truth, found, kind)
    ap.scores(weights)
    ap.by_group("ap", range(IMAGES))(weights)
    assert (truth, found, weights.tolist()) == before
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("value", [0.5, -1, math.nan, math.inf])
def test_weights_that_are_not_whole_numbers_are_refused(value: float) -> None:
    truth, found = random_set(7)
    ap = ResampledAp(truth, found, "bbox")
    with pytest.raises(ShapeError, match="whole numbers >= 0"):
        ap.scores([[value] + [1] * (IMAGES - 1)])


@pytest.mark.parametrize("shape", [(IMAGES,), (1, IMAGES - 1), (1, 1, IMAGES)])
def test_weights_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    truth, found = random_set(7)
    ap = ResampledAp(truth, found, "bbox")
    weights = np.ones(shape, dtype=int)
    with pytest.raises(ShapeError, match=rf"are not \(resamples, {IMAGES}\)"):
        ap.scores(weights)
    with pytest.raises(ShapeError, match=rf"are not \(resamples, {IMAGES}\)"):
        ap.by_group("ap", range(IMAGES))(weights)


@pytest.mark.parametrize("groups", [[0] * (IMAGES - 1), [[0] * IMAGES], [-1] * IMAGES, [0.0] * IMAGES, ["a"] * IMAGES])
def test_groups_that_are_no_index_for_each_image_are_refused(groups: Any) -> None:
    truth, found = random_set(8)
    ap = ResampledAp(truth, found, "bbox")
    with pytest.raises(ShapeError, match=f"for each of {IMAGES} images"):
        ap.by_group("ap", groups)
    with pytest.raises(ShapeError, match=r"\(1, 3\) are not \(resamples, 2\)"):
        ap.by_group("ap", [0, 1] * (IMAGES // 2))([[1, 1, 1]])


def test_what_cannot_be_scored_is_refused_as_by_average_precision() -> None:
    truth = one_image(instance((0, 0, 10, 10), masked=False))
    with pytest.raises(DataError, match="1 of 1 objects have no mask"):
        ResampledAp(truth, [], "segm")
    stray = [
        {"image_id": 2, "category_id": 5, "bbox": [0, 0, 9, 9], "score": 1.0, "segmentation": ellipse((0, 0, 9, 9))}
    ]
    with pytest.raises(DataError, match="such as 2"):
        ResampledAp(truth, stray, "bbox")
