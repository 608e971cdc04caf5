"""Average precision: held against numbers counted by hand, and against pycocotools run on files."""

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import astuple, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from featprobe.errors import DataError, ShapeError
from featprobe.metrics.boxes import ApKind, ApScores, TruthImage, average_precision, truth_of
from featprobe.targets import Instance, encode_rle

KINDS: tuple[ApKind, ...] = ("bbox", "segm")
SIDE = 160  # pixels of the random images: room for large objects
CLASSES = ("background", "pore", "crack", "scratch", "never there")
IDS = (11, 3, 7, 2)  # out of order, as COCO's own numbers may be
STATS = tuple(field.name for field in fields(ApScores))[:12]


def ellipse(box: Sequence[float]) -> dict[str, object]:
    """The mask that fills a box [x, y, width, height] as an ellipse."""
    x, y, width, height = box
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    inside = ((columns - x - width / 2) / (width / 2)) ** 2 + ((rows - y - height / 2) / (height / 2)) ** 2 <= 1
    return encode_rle(inside)


def moved(box: Sequence[float], rng: np.random.Generator, by: float) -> list[float]:
    x, y, width, height = (float(v + by * rng.normal()) for v in box)
    return [x, y, max(width, 2.0), max(height, 2.0)]


def instance(box: Sequence[float], category: int = 1, crowd: bool = False, masked: bool = True) -> Instance:
    x, y, width, height = box
    return Instance(category, (x, y, x + width, y + height), ellipse(box) if masked else None, crowd)


def random_truth(rng: np.random.Generator, images: int = 8) -> dict[str, Any]:
    """Images of small, medium and large objects, some of them crowds, every third image empty."""
    every = []
    for number in range(images):
        objects = []
        for _ in range(0 if number % 3 == 2 else int(rng.integers(1, 7))):
            width, height = rng.choice([8, 20, 50, 110]) * rng.uniform(0.8, 1.25, 2)
            x, y = rng.uniform(0, SIDE - width), rng.uniform(0, SIDE - height)
            objects.append(instance((x, y, width, height), int(rng.integers(1, 4)), crowd=rng.random() < 0.2))
        every.append(TruthImage(100 - 7 * number, (SIDE, SIDE), tuple(objects)))
    return truth_of(every, CLASSES, IDS)


def random_results(rng: np.random.Generator, truth: dict[str, Any]) -> list[dict[str, Any]]:
    """Each object found up to three times, more or less well, at times as another class; and some of nothing."""
    found = []
    for annotation in truth["annotations"]:
        for _ in range(int(rng.integers(0, 4))):
            category = annotation["category_id"] if rng.random() < 0.8 else int(rng.choice(IDS))
            found.append((annotation["image_id"], category, moved(annotation["bbox"], rng, rng.choice([0, 1, 4]))))
    for _ in range(20):
        image = truth["images"][int(rng.integers(len(truth["images"])))]["id"]
        found.append((image, int(rng.choice(IDS)), moved([60, 60, 30, 30], rng, 15)))
    return [
        {"image_id": i, "category_id": c, "bbox": b, "score": round(float(rng.random()), 2), "segmentation": ellipse(b)}
        for i, c, b in found
    ]


def perfect_results(truth: dict[str, Any], score: float = 0.5) -> list[dict[str, Any]]:
    parts = ("image_id", "category_id", "bbox", "segmentation")
    return [{part: a[part] for part in parts} | {"score": score} for a in truth["annotations"]]


def results(*found: tuple[Sequence[float], float], category: int = 5) -> list[dict[str, Any]]:
    """Results in image 1, from (box, score)."""
    return [
        {"image_id": 1, "category_id": category, "bbox": list(b), "score": s, "segmentation": ellipse(b)}
        for b, s in found
    ]


def one_image(*instances: Instance) -> dict[str, Any]:
    return truth_of([TruthImage(1, (SIDE, SIDE), instances)], ("background", "pore"), (5,))


def without(part: str, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in result.items() if name != part} for result in found]


def stock(folder: Path, truth: dict[str, Any], found: list[dict[str, Any]], kind: ApKind) -> COCOeval:
    """pycocotools as its own demo runs it, on two files."""
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "results.json").write_text(json.dumps(found))
    true = COCO(str(folder / "truth.json"))
    evaluation = COCOeval(true, true.loadRes(str(folder / "results.json")), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def same(a: ApScores, b: ApScores) -> bool:
    """Equal to the last bit, nan in the same places."""
    return all(np.array_equal(x, y, equal_nan=True) for x, y in zip(astuple(a), astuple(b), strict=True))


def stats(scores: ApScores) -> list[float]:
    return [getattr(scores, name) for name in STATS]


def check_against_stock(folder: Path, truth: dict[str, Any], found: list[dict[str, Any]], kind: ApKind) -> ApScores:
    scores = average_precision(truth, found, kind)
    evaluation = stock(folder, truth, found, kind)
    assert [-1 if math.isnan(value) else value for value in stats(scores)] == pytest.approx(
        evaluation.stats.tolist(), abs=1e-9, rel=0
    )
    for category, own, own_50 in zip(truth["categories"], scores.per_class, scores.per_class_50, strict=True):
        column = evaluation.eval["precision"][:, :, sorted(IDS).index(category["id"]), 0, 2]
        known = bool((column > -1).all())
        assert known or bool((column == -1).all())
        assert own == pytest.approx(column.mean() if known else math.nan, abs=1e-9, rel=0, nan_ok=True)
        assert own_50 == pytest.approx(column[0].mean() if known else math.nan, abs=1e-9, rel=0, nan_ok=True)
    return scores


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("parts", ["both", "no bbox", "no segmentation"])
def test_the_numbers_are_those_of_pycocotools_on_files(tmp_path: Path, seed: int, kind: ApKind, parts: str) -> None:
    rng = np.random.default_rng(seed)
    truth = random_truth(rng)
    found = random_results(rng, truth)
    if parts != "both":
        found = without(parts.removeprefix("no "), found)
    scores = check_against_stock(tmp_path, truth, found, kind)
    assert 0.05 < scores.ap < 0.95
    assert math.isnan(scores.per_class[3]) and not math.isnan(scores.per_class[0])


def test_the_area_of_a_mask_is_that_of_its_box_where_there_is_one(tmp_path: Path) -> None:
    """A false alarm along the diagonal of a box of 40x40 is a small mask in a medium box."""
    thin = np.zeros((SIDE, SIDE), dtype=bool)
    thin[range(40), range(40)] = True
    found = results(((0, 0, 40, 40), 0.9), ((100, 100, 10, 10), 0.5), ((60, 60, 50, 50), 0.4))
    found[0]["segmentation"] = encode_rle(thin)
    truth = truth_of(
        [TruthImage(1, (SIDE, SIDE), (instance((100, 100, 10, 10), 2), instance((60, 60, 50, 50), 2)))], CLASSES, IDS
    )
    found = [result | {"category_id": 3} for result in found]
    boxed = check_against_stock(tmp_path, truth, found, "segm")
    unboxed = check_against_stock(tmp_path, truth, without("bbox", found), "segm")
    assert (boxed.ap_small, boxed.ap_medium) == (pytest.approx(1), pytest.approx(0.5))
    assert (unboxed.ap_small, unboxed.ap_medium) == (pytest.approx(0.5), pytest.approx(1))


def test_a_case_counted_by_hand() -> None:
    """Two objects, three predictions: a hit at IoU 0.8, a false alarm, a hit at IoU 1.

    At IoU 0.50 to 0.80 the precision is 1 up to recall 1/2 (51 of the 101 points of recall), then 2/3.
    Above, the first prediction is a second false alarm, and the last finds half at a precision of 1/3.
    """
    truth = one_image(instance((0, 0, 10, 10)), instance((50, 50, 20, 20)))
    found = results(((0, 0, 10, 8), 0.9), ((100, 100, 10, 10), 0.8), ((50, 50, 20, 20), 0.7))
    scores = average_precision(truth, found, "bbox")
    lower, upper = (51 + 50 * 2 / 3) / 101, 51 * (1 / 3) / 101
    assert scores.ap50 == scores.per_class_50[0] == pytest.approx(lower)
    assert scores.ap75 == pytest.approx(lower)
    assert scores.ap == scores.per_class[0] == scores.ap_small == pytest.approx((7 * lower + 3 * upper) / 10)
    assert math.isnan(scores.ap_medium) and math.isnan(scores.ar_large)
    assert scores.ar1 == pytest.approx(0.5 * 7 / 10)
    assert scores.ar10 == scores.ar100 == scores.ar_small == pytest.approx((7 * 1 + 3 * 0.5) / 10)


@pytest.mark.parametrize("kind", KINDS)
def test_a_crowd_swallows_what_is_found_in_it(kind: ApKind) -> None:
    crowd, alone = (0, 0, 60, 60), (100, 100, 20, 20)
    found = results(((20, 20, 8, 8), 0.9), ((30, 30, 8, 8), 0.8), (alone, 0.7))
    swallowed = average_precision(one_image(instance(crowd, crowd=True), instance(alone)), found, kind)
    counted = average_precision(one_image(instance(alone)), found, kind)
    assert swallowed.ap == pytest.approx(1)
    assert counted.ap == pytest.approx(1 / 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("missed", [False, True])
def test_a_crowd_need_not_be_found(kind: ApKind, missed: bool) -> None:
    truth = one_image(instance((0, 0, 60, 60), crowd=True), instance((100, 100, 20, 20)))
    found = perfect_results(truth)[1:] if missed else perfect_results(truth)
    assert average_precision(truth, found, kind).ap == pytest.approx(1)
    only = one_image(instance((0, 0, 60, 60), crowd=True))
    assert all(math.isnan(value) for value in stats(average_precision(only, perfect_results(only), kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_perfect_prediction_scores_one(kind: ApKind) -> None:
    boxes = [(10, 10, 10, 10), (30, 30, 50, 50), (20, 30, 130, 120)]
    pairs = [(box, category) for box in boxes for category in (1, 2, 3)]
    truth = truth_of([TruthImage(n, (SIDE, SIDE), (instance(*pair),)) for n, pair in enumerate(pairs)], CLASSES, IDS)
    scores = average_precision(truth, perfect_results(truth), kind)
    assert stats(scores) == pytest.approx([1.0] * 12)
    for per_class in (scores.per_class, scores.per_class_50):
        assert per_class == pytest.approx((1, 1, 1, math.nan), nan_ok=True)


@pytest.mark.parametrize("kind", KINDS)
def test_no_prediction_scores_zero_where_there_is_truth(kind: ApKind) -> None:
    scores = average_precision(one_image(instance((0, 0, 10, 10))), [], kind)
    small = {"ap", "ap50", "ap75", "ap_small", "ar1", "ar10", "ar100", "ar_small"}
    for name in STATS:
        value = getattr(scores, name)
        assert value == 0 if name in small else math.isnan(value)
    assert scores.per_class == scores.per_class_50 == (0.0,)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("found", [[], results(((0, 0, 10, 10), 0.9))], ids=["none found", "one found"])
def test_no_truth_scores_nan(kind: ApKind, found: list[dict[str, Any]]) -> None:
    scores = average_precision(one_image(), found, kind)
    assert all(math.isnan(value) for value in (*stats(scores), *scores.per_class, *scores.per_class_50))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("classes", "ids"), [(("background",), ()), (("background", "pore"), (5,))])
def test_no_image_at_all_scores_nan(kind: ApKind, classes: tuple[str, ...], ids: tuple[int, ...]) -> None:
    scores = average_precision(truth_of([], classes, ids), [], kind)
    assert all(math.isnan(value) for value in stats(scores)) and len(scores.per_class) == len(ids)


def test_each_class_has_its_own_score_in_the_order_of_the_categories() -> None:
    """pycocotools sorts by category id; the truth lists 11, 3, 7, 2."""
    boxes = {1: (0, 0, 10, 10), 2: (50, 50, 20, 20), 3: (100, 100, 30, 30)}
    truth = truth_of([TruthImage(1, (SIDE, SIDE), tuple(instance(b, c) for c, b in boxes.items()))], CLASSES, IDS)
    found = results((boxes[1], 0.9), category=11) + results((boxes[2], 0.9), ((52, 50, 20, 20), 0.95), category=3)
    scores = average_precision(truth, found, "bbox")
    half = (7 + 3 * 0.5) / 10  # moved by 2 of 20 pixels: IoU 18 / 22, a hit up to 0.80, then a false alarm ahead
    assert scores.per_class == pytest.approx((1, half, 0, math.nan), nan_ok=True)
    assert scores.per_class_50 == pytest.approx((1, 1, 0, math.nan), nan_ok=True)
    assert scores.ap == pytest.approx((1 + half + 0) / 3)


@settings(max_examples=15, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from(KINDS))
def test_the_order_of_predictions_of_different_scores_does_not_matter(random: Any, kind: ApKind) -> None:
    rng = np.random.default_rng(5)
    truth = random_truth(rng, images=4)
    found = random_results(rng, truth)
    found = [result | {"score": (i + 1) / (len(found) + 1)} for i, result in enumerate(found)]
    random.shuffle(found)
    ordered = sorted(found, key=lambda result: -result["score"])
    assert same(average_precision(truth, found, kind), average_precision(truth, ordered, kind))


@settings(max_examples=15, deadline=None)
@given(st.floats(0.1, 8), st.floats(-5, 5), st.floats(0.01, 100), st.sampled_from(KINDS))
def test_only_the_order_of_the_scores_matters(power: float, shift: float, scale: float, kind: ApKind) -> None:
    """Of equal scores too: they stay equal."""
    rng = np.random.default_rng(6)
    truth = random_truth(rng, images=4)
    found = random_results(rng, truth)
    grid = sorted({result["score"] for result in found})
    mapped = [shift + scale * (0.2 + score) ** power for score in grid]
    assert all(a < b for a, b in pairwise(mapped))
    other = [result | {"score": mapped[grid.index(result["score"])]} for result in found]
    assert same(average_precision(truth, found, kind), average_precision(truth, other, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_given_is_changed_and_nothing_is_printed(kind: ApKind, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(7)
    truth = random_truth(rng, images=4)
    found = random_results(rng, truth)
    before = copy.deepcopy((truth, found))
    first = average_precision(truth, found, kind)
    assert (truth, found) == before
    assert same(first, average_precision(truth, found, kind))
    average_precision(truth, [], kind)
    assert truth == before[0]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("kind", KINDS)
def test_other_spellings_of_the_same_prediction_score_the_same(kind: ApKind) -> None:
    rng = np.random.default_rng(8)
    truth = random_truth(rng, images=4)
    found = random_results(rng, truth)
    as_bytes = [
        result
        | {"bbox": tuple(result["bbox"]), "score": np.float64(result["score"])}
        | {"segmentation": result["segmentation"] | {"counts": result["segmentation"]["counts"].encode()}}
        for result in found
    ]
    arrays = [result | {"bbox": np.array(result["bbox"])} for result in found]
    scores = average_precision(truth, found, kind)
    assert same(scores, average_precision(truth, as_bytes, kind))
    assert same(scores, average_precision(truth, arrays, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_images_may_be_called_by_text(kind: ApKind) -> None:
    rng = np.random.default_rng(9)
    truth = random_truth(rng, images=4)
    found = random_results(rng, truth)
    named = truth | {
        "images": [image | {"id": f"{image['id']:04d}.png"} for image in truth["images"]],
        "annotations": [a | {"image_id": f"{a['image_id']:04d}.png"} for a in truth["annotations"]],
    }
    others = [result | {"image_id": f"{result['image_id']:04d}.png"} for result in found]
    assert same(average_precision(truth, found, kind), average_precision(named, others, kind))


def test_a_prediction_of_an_image_that_is_not_in_the_truth_is_refused() -> None:
    found = [result | {"image_id": 2} for result in results(((0, 0, 10, 10), 0.9))]
    with pytest.raises(DataError, match="such as 2"):
        average_precision(one_image(instance((0, 0, 10, 10))), found, "bbox")


def test_masks_of_a_truth_without_masks_are_refused() -> None:
    truth = one_image(instance((0, 0, 10, 10)), instance((20, 20, 10, 10), masked=False))
    found = results(((0, 0, 10, 10), 0.9), ((20, 20, 10, 10), 0.9))
    assert average_precision(truth, found, "bbox").ap == pytest.approx(1)
    with pytest.raises(DataError, match="1 of 2 objects have no mask"):
        average_precision(truth, found, "segm")


def test_the_truth_is_the_coco_dict_of_the_instances() -> None:
    rle = ellipse((10, 20, 30, 40))
    instances = (
        Instance(2, (10.5, 20.0, 40.5, 60.0), rle, crowd=True),
        Instance(0, (0.0, 0.0, 5.0, 5.0)),
        Instance(1, (1.0, 2.0, 4.0, 8.0)),
        Instance(1, (10.0, 20.0, 40.0, 60.0), rle, area=12.5),
        Instance(1, (10.0, 20.0, 40.0, 60.0), rle, area=0.0),
    )
    images = [TruthImage("a", (SIDE, SIDE), instances), TruthImage("b", (10, 20), ())]
    truth = truth_of([*images, TruthImage("c", (5, 6), instances[2:3])], ("background", "pore", "crack"), (9, 4))
    assert truth["images"] == [
        {"id": "a", "height": SIDE, "width": SIDE},
        {"id": "b", "height": 10, "width": 20},
        {"id": "c", "height": 5, "width": 6},
    ]
    assert truth["categories"] == [{"id": 9, "name": "pore"}, {"id": 4, "name": "crack"}]
    own = {"image_id": "a", "category_id": 9, "iscrowd": 0}
    box = [10.0, 20.0, 30.0, 40.0]
    mask_area = float(coco_mask.decode(rle).sum())
    assert truth["annotations"] == [
        own
        | {"id": 1, "category_id": 4, "bbox": [10.5, 20.0, 30.0, 40.0], "area": mask_area, "iscrowd": 1}
        | {"segmentation": rle},
        own | {"id": 2, "bbox": [1.0, 2.0, 3.0, 6.0], "area": 18.0},
        own | {"id": 3, "bbox": box, "area": 12.5, "segmentation": rle},
        own | {"id": 4, "bbox": box, "area": 0.0, "segmentation": rle},
        own | {"id": 5, "image_id": "c", "bbox": [1.0, 2.0, 3.0, 6.0], "area": 18.0},
    ]
    assert json.loads(json.dumps(truth)) == truth


def test_classes_and_category_ids_that_disagree_are_refused() -> None:
    with pytest.raises(ShapeError, match="3 category ids do not fit the 2 classes"):
        truth_of([], ("background", "pore", "crack"), (0, 1, 2))
