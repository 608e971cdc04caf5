"""Heads hand what they find to a watch on the pass that scores them, and a recorder makes records of it."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import extract
from numpy.typing import NDArray
from PIL import Image

from featprobe.cache import Cache, open_cache
from featprobe.cache.reader import FeatureLoader
from featprobe.kinds import TrainRecipe
from featprobe.metrics.defects.records import DEFECT, GOOD, IGNORED, NOTHING, TOUCHES, UNKNOWN, About, FoundRule
from featprobe.probes import HeadRecipe, build_head, execution
from featprobe.specs import Rows
from featprobe.stages.recording.recorder import Recorder, SplitTruth
from featprobe.stages.recording.truth import defects_of
from featprobe.stages.recording.watch import Watch
from featprobe.stages.stitch import Objects
from featprobe.stages.tasks.detection import Detection
from featprobe.stages.tasks.segmentation import Segmentation
from featprobe.targets import Labels

CPU = torch.device("cpu")
RULE = FoundRule()
ABOUT = About("semseg", "linear", "", ("background", "defect"), RULE, 0.5, "validation", parts=False)
SIZES = ((64, 64), (40, 64), (64, 64), (90, 61))


def write_parts(root: Path) -> Path:
    """Images of three sizes: two defects and an ignored corner; one defect; nothing; an ignored corner."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(5)
    for i in range(12):
        mask = np.zeros(SIZES[i % 4], dtype=np.uint8)
        if i % 4 < 2:
            mask[4:12, 6:20] = 1
            mask[25 : 25 + 10 * (i % 4 == 0), 30:40] = 1
        if i % 4 in (0, 3):
            mask[-6:, -6:] = 255
        pixels = rng.integers(0, 256, (*mask.shape, 3), dtype=np.uint8)
        Image.fromarray(np.where(mask[..., None] == 1, np.uint8(255), pixels)).save(root / "images" / f"part{i:02}.png")
        Image.fromarray(mask).save(root / "masks" / f"part{i:02}.png")
    return root


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("set") / "parts")


@pytest.fixture(scope="module")
def whole(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return open_cache(extract(tmp_path_factory.mktemp("whole"), parts, size=(64, 64), fit="letterbox").path)


@pytest.fixture(scope="module")
def tiled(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return open_cache(extract(tmp_path_factory.mktemp("tiled"), parts, tile=32, overlap=8).path)


class Seen(Watch):
    """Keeps all that is handed over."""

    def __init__(self) -> None:
        self.found: dict[tuple[int, int], Any] = {}

    def pixels(self, head: int, image: int, values: NDArray[np.float32], classes: Labels | None) -> None:
        assert (head, image) not in self.found and classes is not None
        assert values.dtype == np.float32 and classes.dtype == np.uint8 and values.shape == classes.shape
        self.found[head, image] = values, classes

    def objects(self, head: int, image: int, objects: Objects) -> None:
        assert (head, image) not in self.found
        self.found[head, image] = objects


def task_and_heads(cache: Cache, task: str) -> tuple[Any, list[Any]]:
    torch.manual_seed(0)
    rows = cache.usable()
    own: Any = (
        Segmentation(cache, rows, TrainRecipe(), CPU, "ignore")
        if task == "semseg"
        else Detection(cache, rows, CPU, masks=task == "instseg", source="components")
    )
    kind = {"semseg": "linear", "detect": "fcos", "instseg": "maskrcnn"}[task]
    recipe = HeadRecipe(task, kind, cache.data.classes, width=16, sides=own.sides)
    heads = [build_head(recipe, cache.levels) for _ in range(2)]
    for head in heads:
        for name, parameter in head.named_parameters():
            parameter.data += 0.2 * torch.randn_like(parameter) * ("bias" not in name)
    return own, [head.eval() for head in heads]


@pytest.mark.parametrize(
    ("task", "tiles", "way"),
    [
        ("semseg", False, "cpu"), ("semseg", False, "device"), ("semseg", True, "cpu"), ("semseg", True, "device"),
        ("detect", False, "cpu"), ("instseg", False, "cpu"), ("instseg", True, "cpu"),
    ],
)  # fmt: skip
def test_a_watch_sees_each_image_on_the_one_pass_that_scores_it(
    task: str, tiles: bool, way: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache: Cache = request.getfixturevalue("tiled" if tiles else "whole")
    own, heads = task_and_heads(cache, task)
    rows, read = cache.usable(), list[int]()
    rows = rows[cache.image_of[rows] < (4 if task == "semseg" else 2)]
    monkeypatch.setattr(execution, "whole_batches", lambda device: way == "device")
    with FeatureLoader(cache, heads[0].levels) as loader:

        def feed(orders: Iterable[Rows]) -> Iterator[Any]:
            for batch, features in loader.batches(orders):
                read.extend(batch.tolist())
                yield batch, features

        plain, once = own.evaluate(heads, feed, rows), sorted(read)
        watch = Seen()
        watched, twice = own.evaluate(heads, feed, rows, watch), sorted(read)
    assert once == sorted(rows.tolist()) and twice == sorted(once * 2)
    assert [outcome.files for outcome in watched] == [outcome.files for outcome in plain]
    images = sorted(set(cache.image_of[rows].tolist()))
    assert sorted(watch.found) == [(head, image) for head in range(2) for image in images]
    for (_, image), found in watch.found.items():
        if task == "semseg":
            assert found[0].shape == cache.images.placement(image).original and set(np.unique(found[1])) == {1}
            assert 0 <= found[0].min() <= found[0].max() <= 1
        else:
            assert all((one.rle is not None) == (task == "instseg") for one, _ in found)
    assert task == "semseg" or any(watch.found.values())


def test_values_are_those_by_which_the_score_decides(whole: Cache) -> None:
    """Of two classes the predicted one is the more probable: the map at 0.5 is the map that is scored."""
    own, heads = task_and_heads(whole, "semseg")
    watch = Seen()
    with FeatureLoader(whole, heads[0].levels) as loader:
        own.evaluate(heads, loader.batches, whole.usable(), watch)
        for image, classes in own.predictions(heads, loader.batches, whole.usable()):
            for head, predicted in enumerate(classes):
                values = watch.found[head, image][0]
                sure = np.abs(values - 0.5) > 1e-6
                np.testing.assert_array_equal((values > 0.5)[sure], (predicted == 1)[sure])


# ---- records ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def truth(whole: Cache) -> SplitTruth:
    return SplitTruth(whole, whole.image_of[whole.usable()], "test", quiet=True)


def recorder(truth: SplitTruth, base: float = 0.5) -> Recorder:
    return Recorder(truth, [base], RULE)


def map_of(truth: SplitTruth, image: int) -> NDArray[np.float32]:
    return (truth.cache.image_semantic(image) == 1).astype(np.float32)


def test_maps_of_the_truth_find_all_and_call_nothing_else(truth: SplitTruth) -> None:
    own = recorder(truth)
    for image in truth.images.tolist():
        own.pixels(0, image, 0.75 * map_of(truth, image), np.ones(SIZES[image % 4], np.uint8))
    (found,) = own.records([ABOUT])
    assert np.bincount(found.defects.image, minlength=12).tolist() == [2, 1, 0, 0] * 3
    assert (found.defects.score == 0.75).all() and (found.calls.touched == TOUCHES).all()
    assert np.array_equal(found.calls.image, found.defects.image) and len(found.finds) == len(found.calls) == 9
    for name in ("boxes", "pixels", "category"):
        np.testing.assert_array_equal(getattr(found.calls, name), getattr(found.defects, name))
    assert found.images.good.tolist() == [DEFECT, DEFECT, GOOD, UNKNOWN] * 3 and not found.about.pooled
    assert set(found.images.splits) == {"test"} and own.seconds > 0


def test_detections_of_the_truth_find_all_with_the_best_of_their_scores(truth: SplitTruth) -> None:
    own = recorder(truth, float("nan"))
    for image in truth.images.tolist():
        real = defects_of(truth.cache, image).objects
        own.objects(0, image, [(one, score) for one in real for score in (0.25, 0.875, 0.5)])
    (found,) = own.records([ABOUT])
    assert (found.defects.score == 0.875).all() and len(found.calls) == 27 and len(found.finds) == 27


def test_a_map_of_everything_is_false_on_good_images_and_not_where_pixels_are_ignored(truth: SplitTruth) -> None:
    own = recorder(truth)
    for image in truth.images.tolist():
        own.pixels(0, image, np.ones(SIZES[image % 4], np.float32), None)
    (found,) = own.records([ABOUT])
    assert found.calls.touched.tolist() == [TOUCHES, TOUCHES, NOTHING, IGNORED] * 3
    assert (found.calls.category == 0).all() and np.isfinite(found.defects.score).all()


def test_nothing_called_leaves_all_unfound_and_a_second_look_takes_the_place_of_the_first(truth: SplitTruth) -> None:
    own = recorder(truth)
    for image in truth.images.tolist() * 2:
        first = bool(own._found[0].get(image) is None)
        own.pixels(0, image, np.full(SIZES[image % 4], 0.9 if first else 0.4, np.float32), None)
    (found,) = own.records([ABOUT])
    assert len(found.calls) == len(found.finds) == 0 and np.isneginf(found.defects.score).all()
    assert len(found.defects) == 9


def test_scores_of_images_are_kept_without_calls(truth: SplitTruth) -> None:
    own = recorder(truth, float("nan"))
    for image in truth.images.tolist():
        own.image_score(0, image, image / 10)
    (found,) = own.records([ABOUT])
    assert (
        found.about.pooled
        and len(found.calls) == 0
        and found.images.score.tolist() == pytest.approx([image / 10 for image in truth.images.tolist()])
    )


def test_sizes_are_in_millimetres_where_the_size_of_a_pixel_is_stated(whole: Cache) -> None:
    """Pixels twice as high as wide: an area of 8 x 14 pixels."""
    truth = SplitTruth(whole, np.array([0, 1]), "val", pixel_size=(0.2, 0.1), quiet=True)
    own = recorder(truth)
    for image in (0, 1):
        own.pixels(0, image, map_of(truth, image), None)
    (found,) = own.records([ABOUT])
    for objects in (found.calls, found.defects):
        assert objects.size("area", "mm").tolist() == pytest.approx([112 * 0.02, 100 * 0.02, 112 * 0.02])
        assert objects.size("shortest", "mm").tolist() == pytest.approx([1.4, 1.0, 1.4])
