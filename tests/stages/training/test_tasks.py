"""The probe stage for every task: scores as stock tools compute them, trials, fractions, new images, bad input."""

import json
import shutil
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from helpers import PoolingBackbone
from helpers import extract as extract_into
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from featprobe.cache import open_cache
from featprobe.cache.reader import FeatureLoader
from featprobe.datasets.images.reading import read_levels, write_levels
from featprobe.errors import DataError, ProbeError
from featprobe.image_labels import ImageLabels
from featprobe.kinds import KINDS, HeadKind, TrainRecipe, kinds_of
from featprobe.probes import HeadRecipe, build_head, execution, load_head
from featprobe.probes.detections import ObjectBatch
from featprobe.report.tables import result_table
from featprobe.result_rows import ResultRow
from featprobe.scores import SCORES
from featprobe.specs import BackboneSpec
from featprobe.stages.extraction.extract import extract as extract_for_real
from featprobe.stages.extraction.extract_options import ExtractOptions
from featprobe.stages.memory import largest_that_fits
from featprobe.stages.partition import training_subset
from featprobe.stages.predict import find_images, predict
from featprobe.stages.predictor import Predictor
from featprobe.stages.tasks import detection
from featprobe.stages.training.probe import find_caches, probe
from featprobe.stages.training.probe_options import ProbeOptions, settings_of
from featprobe.stages.workspace import Workspace, make_generated

BRIEF = TrainRecipe(iterations=6, batch_size=4, lr=2e-3, evaluations=2, clip=10.0)
FILES = {"train": 8, "val": 4, "test": 9}
NARROW = 16  # channels of heads that find objects, where no law depends on how many there are


def write_coco(root: Path) -> Path:
    """Non-square images of two sizes with bright and dark boxes; category ids 3 and 7, a crowd, empty images."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    (root / "annotations").mkdir()
    annotation = 1
    for split, count in FILES.items():
        images, annotations = [], []
        for i in range(count):
            height, width = ((48, 96), (80, 56))[i % 2]
            number = 100 * list(FILES).index(split) + 10 + i
            name = f"{split}{i}.png"
            pixels = (rng.random((height, width)) * 60 + 90).astype(np.uint8)
            for k in range(0 if i % 4 == 3 else 1 + i % 3):
                w, h = (int(v) for v in rng.integers(9, 30, 2))
                x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
                pixels[y : y + h, x : x + w] = (235, 10)[k % 2]
                mask = np.zeros((height, width), dtype=np.uint8, order="F")
                mask[y : y + h, x : x + w] = 1
                rle = coco_mask.encode(mask)
                annotations.append({
                    "id": annotation, "image_id": number, "category_id": (3, 7)[k % 2], "bbox": [x, y, w, h],
                    "segmentation": {"size": [height, width], "counts": rle["counts"].decode()},
                    "iscrowd": int(k == 2 or (split == "test" and i == 4 and k == 1)), "area": 0.9 * w * h,
                })  # fmt: skip
                annotation += 1
            Image.fromarray(pixels).save(root / "images" / name)
            images.append({"id": number, "file_name": name, "height": height, "width": width})
        categories = [{"id": 3, "name": "bright"}, {"id": 7, "name": "dark"}]
        coco = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(coco))
    return root


@pytest.fixture(scope="module")
def coco_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("coco") / "parts")


@pytest.fixture(scope="module", params=["resize", "letterbox"])
def objects(request: pytest.FixtureRequest, coco_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with a cache of the COCO set under a stand-in for a network."""
    workspace = Workspace(tmp_path_factory.mktemp(request.param))
    extract_into(workspace.root, coco_set, size=(64, 96), fit=request.param)
    return workspace


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("dense"))
    make_generated("surface", workspace.data / "surface", images=24, size=(64, 64))
    extract_into(workspace.root, workspace.data / "surface", PoolingBackbone())
    return workspace


def stock_scores(annotations: Path, predictions: Path, kind: str) -> list[float]:
    """The twelve numbers that pycocotools prints."""
    with redirect_stdout(StringIO()):
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(str(predictions)), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["detect", "instseg"])
def test_stock_pycocotools_on_the_sets_own_file_gives_the_rows_numbers(
    task: str, objects: Workspace, coco_set: Path
) -> None:
    recipe = replace(BRIEF, iterations=40, evaluations=1)
    (row,) = probe(objects, task, options=ProbeOptions(recipe=recipe, width=2 * NARROW, seeds=1, quiet=True)).rows
    predictions = objects.probes / row["folder"] / "predictions.json"
    assert len(json.loads(predictions.read_text())) > 20
    names = ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
             "ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"]  # fmt: skip
    for part, kind in {"box": "bbox", "mask": "segm"}.items():
        if part in row["test"]:
            stock = stock_scores(coco_set / "annotations" / "instances_test.json", predictions, kind)
            ours = [-1.0 if row["test"][part][name] is None else row["test"][part][name] for name in names]
            assert ours == pytest.approx(stock, abs=1e-6)
    assert ("mask" in row["test"]) == (task == "instseg")
    assert row["test"]["box"]["ap50"] > 0, "a comparison of zeros would hold nothing"


@pytest.mark.parametrize("kind", [own for own in KINDS.values() if own.name != kinds_of(own.task)[0]],
                         ids=lambda kind: f"{kind.task}-{kind.name}")  # fmt: skip
def test_every_head_that_is_no_default_goes_all_the_way(kind: HeadKind, objects: Workspace) -> None:
    labels: ImageLabels = "defect" if "labels" in settings_of(kind) else "own"
    width = NARROW if kind.width else None
    options = ProbeOptions(head=kind.name, recipe=BRIEF, width=width, seeds=1, quiet=True, show=2, labels=labels)
    report = probe(objects, kind.task, options=options)
    (row,) = report.rows
    assert row["head"] == kind.name and np.isfinite(row["val"][SCORES[kind.task].main.name])
    (sheet,) = report.sheets
    with Image.open(sheet) as picture:
        assert picture.width > 700
    head, card = load_head(objects.probes / row["folder"])
    assert [v.name for v in head.levels] == row["levels"] and card["result"]["test"].keys() == row["test"].keys()


# ---- trials ----------------------------------------------------------------------------------------------------------


def test_all_trials_are_kept_and_the_best_on_validation_is_scored_once(
    dense: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed: list[str] = []
    plain = FeatureLoader.batches

    def spying(self: FeatureLoader, orders: Any) -> Iterator[Any]:
        for rows, features in plain(self, orders):
            fed.append(self.cache.rows[int(rows[0])].split)
            yield rows, features

    monkeypatch.setattr(FeatureLoader, "batches", spying)
    recipe = TrainRecipe(iterations=10, batch_size=4, evaluations=2)
    options = ProbeOptions(recipe=recipe, lr=(1e-5, 1e-2), weight_decay=(0.0, 1e-2), seeds=2, quiet=True, device="cpu")
    rows = probe(dense, options=options).rows
    assert [row["seed"] for row in rows] == [0, 1] and {row["trials"] for row in rows} == {4}
    trained = fed.count("train")
    assert trained == 2 * recipe.iterations + 1, "each batch was read once for all heads of a seed, 1 for a forecast"
    for row in rows:
        curves = json.loads((dense.probes / row["folder"] / "curves.json").read_text())
        assert [(c["lr"], c["weight_decay"]) for c in curves] == [(1e-5, 0.0), (1e-5, 1e-2), (1e-2, 0.0), (1e-2, 1e-2)]
        assert all(len(curve["curve"]) == 2 for curve in curves)
        ends = [curve["curve"][-1]["scores"]["miou_foreground"] for curve in curves]
        (chosen,) = [curve for curve in curves if curve["chosen"]]
        assert chosen["curve"][-1]["scores"]["miou_foreground"] == max(ends)
        assert (chosen["lr"], chosen["weight_decay"]) == (row["recipe"]["lr"], row["recipe"]["weight_decay"])
        assert row["val"] == chosen["curve"][-1]["scores"]


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True], ids=["pieces", "few operations"])
def test_a_detection_trial_ends_the_same_beside_whichever_others(
    dense: Workspace, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "whole_batches", lambda device: whole)
    options = ProbeOptions(head="fasterrcnn", recipe=BRIEF, width=NARROW, seeds=1, quiet=True, device="cpu")
    heads = []
    for rates in ((2e-3,), (2e-3, 1e-9), (1e-9, 2e-3)):
        (row,) = probe(dense, "detect", options=replace(options, lr=rates)).rows
        heads.append(json.loads((dense.probes / row["folder"] / "curves.json").read_text()))
    own = [next(c["curve"] for c in curves if c["lr"] == 2e-3) for curves in heads]
    assert own[0] == own[1] == own[2]


def test_masks_that_fit_on_a_device_and_those_that_do_not_give_one_loss(
    objects: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By places, by rows, and with masks that are decoded for each batch; samples are the first, not random ones."""
    monkeypatch.setattr(execution, "whole_batches", lambda device: True)
    monkeypatch.setattr(
        ObjectBatch, "keys", lambda self, name, *shape: torch.linspace(0.9, 0.1, shape[-1]).expand(shape)
    )
    cache = find_caches(objects, "instseg", (), ())[0][0]
    rows = cache.usable("train")
    torch.manual_seed(0)
    head: Any = build_head(HeadRecipe("instseg", "maskrcnn", cache.data.classes, width=16), cache.recipe.levels).train()
    own, losses = rows[[4, 0, 5, 2]], []
    places = torch.from_numpy(np.searchsorted(np.sort(rows), own))
    with FeatureLoader(cache) as loader:
        ((_, features),) = loader.batches([own])
        for room in (2**40, 0):
            monkeypatch.setattr(detection, "device_room", lambda device, room=room: room)
            task = detection.Detection(cache, rows, torch.device("cpu"), masks=True, source="own")
            assert task.fixed(head) == bool(room)
            loss = task.start([head, head])
            losses += [loss(features, batch) for batch in (own, *([places] if room else []))]
    assert all(torch.allclose(one, losses[0], rtol=1e-5) for one in losses) and losses[0][0] == losses[0][1]


def test_seeds_may_share_one_order_and_the_row_says_so(dense: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = TrainRecipe(iterations=6, batch_size=4, evaluations=1)
    apart = probe(dense, options=ProbeOptions(recipe=recipe, seeds=2, quiet=True)).rows
    shared = probe(dense, options=ProbeOptions(recipe=recipe, seeds=2, shared_order=True, quiet=True)).rows
    assert {row["spread"] for row in apart} == {"initialisation and order"}
    assert {row["spread"] for row in shared} == {"initialisation"}
    assert not {row["folder"] for row in apart} & {row["folder"] for row in shared}
    weights = [load_head(dense.probes / row["folder"])[0].state_dict()["weights.stride4"] for row in (*apart, *shared)]
    assert torch.allclose(weights[0], weights[2], rtol=1e-4), "seed 0 has its own order in both"
    assert not torch.allclose(weights[1], weights[3], rtol=1e-4)
    assert not torch.allclose(weights[2], weights[3], rtol=1e-4)


def test_every_head_has_three_seeds_but_one_that_is_the_same_for_all(dense: Workspace) -> None:
    """The closed form has no chance in it; its part of the training split has."""
    brief = TrainRecipe(iterations=1, batch_size=4, evaluations=1)
    counts = {
        (kind, fraction): len({
            json.dumps(row["val"]) + row["folder"]
            for row in probe(
                dense, task, options=ProbeOptions(head=kind, recipe=brief, fractions=(fraction,), quiet=True)
            ).rows
        })
        for task, kind, fraction in (
            ("semseg", "linear", 1.0), ("semseg", "ridge", 1.0), ("semseg", "ridge", 0.4), ("detect", "fcos", 1.0),
        )
    }  # fmt: skip
    assert counts == {("linear", 1.0): 3, ("ridge", 1.0): 1, ("ridge", 0.4): 3, ("fcos", 1.0): 3}


def test_the_predicted_time_is_told_before_training(dense: Workspace) -> None:
    said: list[str] = []
    probe(dense, "detect", options=ProbeOptions(recipe=BRIEF, seeds=1, quiet=True, device="cpu"), say=said.append)
    assert len(said) == 1 and said[0].endswith("6 iterations, under a minute on cpu")


def test_a_batch_that_the_memory_does_not_hold_names_one_that_fits(
    dense: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featprobe.stages.tasks import segmentation

    plain = segmentation.level_loss

    def narrow(logits: torch.Tensor, *others: Any) -> torch.Tensor:
        if len(logits) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return plain(logits, *others)

    monkeypatch.setattr(segmentation, "level_loss", narrow)
    with pytest.raises(ProbeError, match=r"--batch-size 3") as error:
        probe(dense, options=ProbeOptions(recipe=replace(BRIEF, batch_size=12), seeds=1, quiet=True, device="cpu"))
    assert "Nothing was trained" in str(error.value)
    assert largest_that_fits(9, lambda n: None) == 4


# ---- fractions -------------------------------------------------------------------------------------------------------

images_with_classes = st.lists(
    st.tuples(st.integers(0, 6), st.sets(st.integers(0, 4), min_size=1)), min_size=1, max_size=40
)


@given(
    made=images_with_classes,
    fractions=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
    seed=st.none() | st.integers(0, 9),
)
def test_smaller_fractions_of_a_seed_are_part_of_larger_ones_and_lack_no_class(
    made: list[tuple[int, set[int]]], fractions: tuple[float, float], seed: int | None
) -> None:
    ids, groups = [f"image{i}" for i in range(len(made))], [f"part{group}" for group, _ in made]
    classes = [own for _, own in made]
    small, large = (training_subset(ids, groups, classes, f, seed) for f in sorted(fractions))
    assert set(small.tolist()) <= set(large.tolist())
    assert training_subset(ids, groups, classes, 1.0, seed).tolist() == list(range(len(made)))
    for fraction, subset in zip(sorted(fractions), (small, large), strict=True):
        assert set().union(*(classes[i] for i in subset)) == set().union(*classes)
        assert len(subset) >= max(1, round(fraction * len(made)))
        if len(subset) > len(set().union(*classes)):
            assert len(subset) == max(1, round(fraction * len(made)))
            whole = [
                g for g in set(groups) if all(i in set(subset.tolist()) for i in range(len(ids)) if groups[i] == g)
            ]
            started = {groups[i] for i in subset}
            assert len(started) - len(whole) <= 1 + len(set().union(*classes)), "groups are taken one after another"


def test_fractions_train_on_fewer_images_at_equal_iterations(dense: Workspace) -> None:
    rows = probe(dense, options=ProbeOptions(recipe=BRIEF, seeds=1, fractions=(0.2, 1.0), quiet=True)).rows
    assert [row["fraction"] for row in rows] == [0.2, 1.0]
    assert (
        rows[0]["images"]["train"] < rows[1]["images"]["train"]
        and rows[0]["images"]["test"] == rows[1]["images"]["test"]
    )
    assert rows[0]["recipe"]["iterations"] == rows[1]["recipe"]["iterations"]
    assert all(count > 0 for count in rows[0]["train_counts"].values()), "no class is lost"


# ---- other sources of objects ----------------------------------------------------------------------------------------


def write_masks(root: Path, classes: int = 3) -> Path:
    """A folder of images and masks only: one square of each class in each image."""
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    rng = np.random.default_rng(1)
    for i in range(12):
        pixels = (rng.random((48, 48)) * 50 + 100).astype(np.uint8)
        mask = np.zeros((48, 48), dtype=np.uint8)
        for category in range(1, classes):
            y, x = (int(v) for v in rng.integers(0, 12, 2))
            mask[y + 20 * (category - 1) : y + 20 * (category - 1) + 10, x : x + 14] = category
            pixels[mask == category] = 40 + 160 * (category - 1)
        Image.fromarray(pixels).save(root / "images" / f"{i}.png")
        Image.fromarray(mask).save(root / "masks" / f"{i}.png")
    (root / "classes.txt").write_text("background\n" + "\n".join(f"kind{c}" for c in range(1, 4)))
    return root


def test_masks_alone_serve_as_objects_through_their_connected_parts(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "space")
    extract_into(workspace.root, write_masks(tmp_path / "plain"))
    with pytest.raises(ProbeError) as error:
        probe(workspace, "instseg", options=ProbeOptions(quiet=True))
    assert "found   plain: semseg" in str(error.value) and "--instances components" in str(error.value)
    options = ProbeOptions(recipe=BRIEF, width=NARROW, seeds=1, instances="components", quiet=True)
    report = probe(workspace, "instseg", options=options)
    (row,) = report.rows
    assert row["instances"] == "components" and row["train_counts"] == {"kind1": 7, "kind2": 7, "kind3": 0}
    assert row["test"]["mask"]["per_class"]["kind3"] is None
    assert any("no training example of kind3" in note for note in report.notes)


def test_nothing_is_trained_when_one_of_several_caches_can_not_be(dense: Workspace, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    coarse = PoolingBackbone()
    coarse.levels = coarse.levels[1:]
    for backbone in (PoolingBackbone(), coarse):
        extract_into(workspace.root, dense.data / "surface", backbone)
    with pytest.raises(ProbeError, match="stride4"):
        probe(workspace, options=ProbeOptions(levels=("stride4",), recipe=BRIEF, quiet=True))
    assert not list(workspace.probes.rglob("*")), "nothing was trained, and no folder made"


def test_a_cache_of_boxes_alone_has_no_components(objects: Workspace, tmp_path: Path) -> None:
    set_of_boxes = write_coco(tmp_path / "boxes")
    for path in set_of_boxes.glob("annotations/*.json"):
        coco = json.loads(path.read_text())
        coco["annotations"] = [{k: v for k, v in a.items() if k != "segmentation"} for a in coco["annotations"]]
        path.write_text(json.dumps(coco))
    workspace = Workspace(tmp_path / "space")
    extract_into(workspace.root, set_of_boxes)
    with pytest.raises(ProbeError, match="found   boxes: detect"):
        probe(workspace, "detect", options=ProbeOptions(instances="components", quiet=True))


def test_images_of_one_id_in_several_files_are_told_apart(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "parts")
    for path in root.glob("annotations/*.json"):  # each file counts its images from 0, as exports per split do
        coco = json.loads(path.read_text())
        own = {image["id"]: number for number, image in enumerate(coco["images"])}
        coco["images"] = [{**image, "id": own[image["id"]]} for image in coco["images"]]
        coco["annotations"] = [{**a, "image_id": own[a["image_id"]]} for a in coco["annotations"]]
        path.write_text(json.dumps(coco))
    workspace = Workspace(tmp_path / "space")
    extract_into(workspace.root, root, size=(64, 96))
    (cache,), _ = find_caches(workspace, "detect", (), ())
    assert not cache.own_ids and len({cache.image_id(row) for row in range(len(cache))}) == len(cache)
    report = probe(
        workspace, "detect", options=ProbeOptions(recipe=BRIEF, width=NARROW, seeds=1, split="image", quiet=True)
    )
    assert any("counts the images from 1" in note for note in report.notes)


def test_a_table_keeps_caches_apart(dense: Workspace) -> None:
    extract_into(dense.root, dense.data / "surface", PoolingBackbone(), size=(32, 32))
    try:
        rows = probe(dense, options=ProbeOptions(recipe=BRIEF, seeds=1, quiet=True)).rows
        table = result_table([ResultRow.from_json(row) for row in rows])
        assert list(table["n"]) == [1, 1] and table["cache"].nunique() == 2
        assert "cache" not in result_table([ResultRow.from_json(rows[0])])
    finally:
        (small,) = [p for p in dense.cache_files() if open_cache(p).recipe.size == (32, 32)]
        small.unlink()


@pytest.mark.parametrize(
    ("task", "options", "said"),
    [
        ("semseg", {"width": 32}, "--width would change nothing"),
        ("semseg", {"instances": "components"}, "--instances would change nothing"),
        ("detect", {"recipe": replace(BRIEF, loss="dice", class_weights="none")}, "--loss, --class-weights"),
        ("detekt", {}, "no task 'detekt'. Did you mean detect"),
        ("detect", {"head": "linear"}, "no detect head 'linear'"),
        ("semseg", {"levels": ("stride16",)}, "--levels stride4,stride8,stride16"),
        ("semseg", {"seeds": 0}, "--seeds from 1 to 10000"),
        ("semseg", {"fractions": (0.0, 1.0)}, "0 < F <= 1"),
        ("detect", {"pyramid": "simple"}, "one stride"),
    ],
)
def test_what_can_not_be_probed_is_said_before_anything_is_trained(
    dense: Workspace, task: str, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ProbeError) as error:
        probe(dense, task, options=ProbeOptions(**{"recipe": BRIEF, "quiet": True, **options}))
    assert said in str(error.value)


# ---- new images ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, dict[str, dict[str, Any]]]:
    """A head for each task on a small 16-bit set, under a real network."""
    workspace = Workspace(tmp_path_factory.mktemp("trained"))
    make_generated("xray", workspace.data / "xray", images=24, size=(64, 96))
    spec = BackboneSpec("lite0", "tf_efficientnet_lite0", "random", arguments=("--backbone", "lite0", "--random-init"))
    extract_for_real(workspace, spec, "xray", ExtractOptions(fit="letterbox", size=(64, 64), quiet=True))
    recipes = {
        "semseg": replace(BRIEF, iterations=60, lr=5e-2),
        "detect": replace(BRIEF, iterations=60),
        "instseg": replace(BRIEF, iterations=60),
    }
    rows = {}
    for task, recipe in recipes.items():
        width = None if task == "semseg" else NARROW
        options = ProbeOptions(recipe=recipe, width=width, seeds=1, quiet=True, device="cpu")
        (rows[task],) = probe(workspace, task, options=options).rows
    return workspace, rows


@pytest.mark.slow
@pytest.mark.parametrize("task", ["semseg", "detect", "instseg"])
def test_predict_on_the_test_images_scores_what_the_row_says(
    task: str, trained: tuple[Workspace, dict[str, dict[str, Any]]], tmp_path: Path
) -> None:
    workspace, rows = trained
    folder = workspace.probes / rows[task]["folder"]
    (cache,), _ = find_caches(workspace, "semseg", (), ())
    tested = cache.usable("test").tolist()
    images = [Path(cache.data.root) / cache.rows[row].image for row in tested]
    report = predict(folder, images, tmp_path / "out", quiet=True, device="cpu")
    assert report.images == len(images) and not report.left_out
    assert len(list((tmp_path / "out" / "overlays").glob("*.png"))) == len(images)
    if task == "semseg":
        confusion = np.load(folder / "scores.npz")["confusion"].sum(0)
        classes = len(cache.data.classes)
        found = np.zeros_like(confusion)
        for row, image in zip(tested, images, strict=True):
            with Image.open(tmp_path / "out" / "masks" / f"{image.stem}.png") as mask:
                pairs = cache.semantic(row).astype(int) * classes + np.asarray(mask)
            found += np.bincount(pairs.ravel(), minlength=classes**2).reshape(classes, classes)
        assert np.abs(found - confusion).sum() / confusion.sum() < 1e-3
        assert confusion[:, 1:].sum() > 100, "a comparison of empty masks would hold nothing"
        return
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())
    names = {image["id"]: image["file_name"] for image in written["images"]}
    ids = {Path(cache.rows[row].image).name: cache.image_id(row) for row in tested}
    results = [{**a, "image_id": ids[names[a["image_id"]]]} for a in written["annotations"]]
    (tmp_path / "results.json").write_text(json.dumps(results))
    kept = json.loads((folder / "predictions.json").read_text())
    assert len(kept) > 20, "a comparison of nothing would hold nothing"
    for image in ids.values():
        ours, theirs = ([r for r in own if r["image_id"] == image] for own in (results, kept))
        assert abs(len(ours) - len(theirs)) <= 0.05 * len(theirs) + 1
        for a, b in zip(sorted(ours, key=_by_score)[:10], sorted(theirs, key=_by_score)[:10], strict=True):
            assert a["score"] == pytest.approx(b["score"], abs=2e-3)
        best, own = min(ours, key=_by_score), min(theirs, key=_by_score)
        assert best["bbox"] == pytest.approx(own["bbox"], abs=0.5) and best["category_id"] == own["category_id"]
        if "segmentation" in best:
            masks = [coco_mask.decode(r["segmentation"]).astype(bool) for r in (best, own)]
            assert (masks[0] ^ masks[1]).sum() <= 0.05 * masks[1].sum() + 2
    source = next(Path(cache.data.root).glob("annotations/*test*.json"))
    for part, kind in {"box": "bbox", "mask": "segm"}.items():
        if part in rows[task]["test"]:
            stock = stock_scores(source, tmp_path / "results.json", kind)
            assert stock[:2] == pytest.approx([rows[task]["test"][part][n] for n in ("ap", "ap50")], abs=1e-3)


def _by_score(result: dict[str, Any]) -> float:
    return -float(result["score"])


def test_predict_takes_the_images_it_was_trained_on_whatever_the_window(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    make_generated("surface", workspace.data / "surface", images=24, size=(64, 64))
    spec = BackboneSpec("tiny", "test_efficientnet", "random", arguments=("--backbone", "tiny", "--random-init"))
    extract_for_real(workspace, spec, "surface", ExtractOptions(intensity="percentile:1:99", quiet=True))
    (row,) = probe(workspace, "detect", options=ProbeOptions(recipe=BRIEF, width=NARROW, seeds=1, quiet=True)).rows
    folder, images = workspace.probes / row["folder"], workspace.data / "surface" / "images"
    assert predict(folder, [images], tmp_path / "out", quiet=True).images == 24
    deep = np.full((64, 64), 4000, dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png is an image of 16 bits"):
        predict(folder, [tmp_path / "deep.png"], tmp_path / "out", quiet=True)


def test_predict_says_when_features_overflow(
    trained: tuple[Workspace, dict[str, dict[str, Any]]], tmp_path: Path
) -> None:
    workspace, rows = trained
    predictor = Predictor(workspace.probes / rows["detect"]["folder"])
    plain = predictor.backbone.forward

    def scaled(images: torch.Tensor, content: torch.Tensor | None = None) -> Any:
        features = plain(images, content)
        return replace(features, maps={name: m * 1e6 for name, m in features.maps.items()})

    predictor.backbone.forward = scaled  # type: ignore[method-assign]
    image = next((workspace.data / "xray" / "images").glob("*.png"))
    with pytest.raises(DataError, match="not finite in fp16"):
        predictor.predict([(image, "image")])


def test_what_predict_has_written_is_no_input_of_the_next_run(
    trained: tuple[Workspace, dict[str, dict[str, Any]]], tmp_path: Path
) -> None:
    workspace, rows = trained
    for i, path in enumerate(sorted((workspace.data / "xray" / "images").glob("*.png"))[:2]):
        (tmp_path / "scans" / str(i)).mkdir(parents=True)
        (tmp_path / "scans" / str(i) / "a.png").write_bytes(path.read_bytes())
    folder, out = workspace.probes / rows["instseg"]["folder"], tmp_path / "scans" / "found"
    for _ in range(2):
        assert predict(folder, [tmp_path / "scans"], out, quiet=True).images == 2
    written = json.loads((out / "predictions.json").read_text())
    assert [image["file_name"] for image in written["images"]] == ["0/a.png", "1/a.png"]
    for annotation in written["annotations"]:
        assert annotation["area"] == coco_mask.area(annotation["segmentation"])


def test_predict_takes_folders_keeps_names_apart_and_goes_on_past_bad_images(
    trained: tuple[Workspace, dict[str, dict[str, Any]]], tmp_path: Path
) -> None:
    workspace, rows = trained
    folder = workspace.probes / rows["semseg"]["folder"]
    scans = tmp_path / "scans"
    (scans / "left").mkdir(parents=True)
    source = sorted((workspace.data / "xray" / "images").glob("*.png"))
    for name, path in (("a.png", source[0]), ("left/a.png", source[1])):
        (scans / name).write_bytes(path.read_bytes())
    (scans / "torn.png").write_bytes(source[2].read_bytes()[:200])
    Image.fromarray(np.zeros((64, 96), np.uint8)).save(scans / "eight.png")
    with pytest.raises(DataError, match=r"eight\.png is an image of 8 bits|torn\.png"):
        predict(folder, [scans], tmp_path / "first", quiet=True)
    report = predict(folder, [scans], tmp_path / "second", skip_bad=True, quiet=True)
    assert report.images == 2 and sorted(Path(name).name for name, _ in report.left_out) == ["eight.png", "torn.png"]
    masks = tmp_path / "second" / "masks"
    assert {p.relative_to(masks).as_posix() for p in masks.rglob("*.png")} == {"a.png", "left/a.png"}
    (scans / "torn.png").unlink()
    (scans / "eight.png").unlink()
    Image.open(source[0]).save(scans / "a.tif")
    assert predict(folder, [scans], tmp_path / "third", quiet=True).images == 3
    masks = tmp_path / "third" / "masks"
    assert {p.relative_to(masks).as_posix() for p in masks.rglob("*.png")} == {"a.png.png", "a.tif.png", "left/a.png"}
    predict(workspace.probes / rows["detect"]["folder"], [scans], tmp_path / "fourth", quiet=True)
    written = json.loads((tmp_path / "fourth" / "predictions.json").read_text())
    assert [image["file_name"] for image in written["images"]] == ["a.png", "a.tif", "left/a.png"]
    with pytest.raises(DataError, match="no image or folder"):
        find_images([tmp_path / "nowhere"])
    with pytest.raises(DataError, match="would both be written as a"):
        find_images([scans / "a.png", scans / "left" / "a.png"])


def test_predict_tells_levels_that_the_head_has_not_seen(
    trained: tuple[Workspace, dict[str, dict[str, Any]]], tmp_path: Path
) -> None:
    workspace, rows = trained
    source = next((workspace.data / "xray" / "images").glob("*.png"))
    levels = read_levels(source)
    (tmp_path / "scans").mkdir()
    write_levels(tmp_path / "scans" / "same.tif", levels)
    folder = workspace.probes / rows["semseg"]["folder"]
    assert predict(folder, [tmp_path / "scans"], tmp_path / "first", quiet=True).notes == ()
    write_levels(tmp_path / "scans" / "darker.tif", levels // 50)
    (note,) = predict(folder, [tmp_path / "scans"], tmp_path / "second", quiet=True).notes
    assert note.startswith("more than 10% of the pixels lie outside") and " in 1 image, " in note
    assert "darker.tif" in note and "same.tif" not in note


def test_predict_takes_every_page_of_a_stack(
    trained: tuple[Workspace, dict[str, dict[str, Any]]], tmp_path: Path
) -> None:
    workspace, rows = trained
    images = sorted((workspace.data / "xray" / "images").glob("*.png"))[:3]
    path = tmp_path / "scans" / "stack.tif"
    path.parent.mkdir()
    tifffile.imwrite(path, np.stack([read_levels(image) for image in images]), photometric="minisblack")
    for asked, names in (
        (path, ["0000", "0001", "0002"]),
        (path.parent, ["0000", "0001", "0002"]),
        (path / "0001", ["0001"]),
    ):
        out = tmp_path / f"of {asked.name}"
        for task in ("semseg", "detect"):
            report = predict(workspace.probes / rows[task]["folder"], [asked], out, quiet=True)
            assert report.images == len(names)
        written = json.loads((out / "predictions.json").read_text())
        assert [image["file_name"] for image in written["images"]] == [f"stack.tif/{name}" for name in names]
        for folder in ("masks", "overlays"):
            assert sorted(p.relative_to(out / folder).as_posix() for p in (out / folder).rglob("*.png")) == [
                f"stack/{name}.png" for name in names
            ]
    predict(workspace.probes / rows["semseg"]["folder"], images, tmp_path / "alone", quiet=True)
    for i, image in enumerate(images):
        alone = (tmp_path / "alone" / "masks" / f"{image.stem}.png").read_bytes()
        assert (tmp_path / "of stack.tif" / "masks" / "stack" / f"{i:04d}.png").read_bytes() == alone
    with pytest.raises(DataError, match=r"is no page of stack\.tif"):
        find_images([path / "1"])
    (tmp_path / "pages" / "stack.tif").mkdir(parents=True)
    shutil.copy(images[0], tmp_path / "pages" / "stack.tif" / "0000")  # as `data convert` writes a page
    assert [name for _, name in find_images([tmp_path / "pages"])] == ["stack.tif/0000"]


def test_predict_refuses_a_backbone_of_other_weights(
    trained: tuple[Workspace, dict[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, rows = trained
    from featprobe.stages import predictor as stage

    plain = stage.load_backbone
    monkeypatch.setattr(stage, "load_backbone", lambda spec, *others: plain(replace(spec, seed=1), *others))
    with pytest.raises(ProbeError, match=r"trained on other features.*\n\s+weights_sha256[\s\S]*--weights FILE"):
        Predictor(workspace.probes / rows["semseg"]["folder"])
