"""Verdicts: what `predict` says of each image in all of its files, its exit codes, and files for programs of labels."""

import csv
import http.server
import json
import re
import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import replace
from http.server import ThreadingHTTPServer
from io import StringIO
from math import nan
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import numpy as np
import pytest
from click.testing import CliRunner
from jsonschema import validate
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from featprobe.cli.main import cli
from featprobe.errors import FeatprobeError, ProbeError, UsageError
from featprobe.io.texts import uncell
from featprobe.kinds import TrainRecipe
from featprobe.metrics.defects.operating import Counts, OperatingPoint, Wanted, choose
from featprobe.specs import BackboneSpec
from featprobe.stages.extraction.extract import extract
from featprobe.stages.extraction.extract_options import ExtractOptions
from featprobe.stages.findings import Threshold, joined_pixels
from featprobe.stages.predict import predict
from featprobe.stages.predictor import Predictor
from featprobe.stages.recording.operating_file import write_point
from featprobe.stages.recording.record_file import read_records
from featprobe.stages.training.probe import probe
from featprobe.stages.training.probe_options import ProbeOptions
from featprobe.stages.workspace import Workspace, make_generated
from featprobe.targets import components

SPEC = BackboneSpec("tiny", "test_efficientnet", "random", arguments=("--backbone", "tiny", "--random-init"))
COLUMNS = ["image", "verdict", "findings", "area", "score", "threshold", "milliseconds", "reason"]
TRAINED, IMAGES = 24, 10

NUMBER = {"type": "number"}
COCO_LAYOUT = {
    "type": "object",
    "required": ["info", "licenses", "images", "annotations", "categories"],
    "properties": {
        "info": {"type": "object"},
        "licenses": {"type": "array"},
        "categories": {
            "type": "array",
            "minItems": 1,
            "items": {
                "required": ["id", "name", "supercategory"],
                "properties": {"id": {"type": "integer", "minimum": 1}, "name": {"type": "string", "minLength": 1}},
            },
        },
        "images": {
            "type": "array",
            "items": {
                "required": ["id", "file_name", "height", "width", "verdict"],
                "properties": {
                    "id": {"type": "integer", "minimum": 1},
                    "file_name": {"type": "string", "pattern": "^[^/]"},
                    "height": {"type": "integer", "minimum": 1},
                    "width": {"type": "integer", "minimum": 1},
                    "verdict": {"enum": ["called", "passed"]},
                },
            },
        },
        "annotations": {
            "type": "array",
            "items": {
                "required": ["id", "image_id", "category_id", "bbox", "area", "segmentation", "iscrowd", "score"],
                "properties": {
                    "id": {"type": "integer", "minimum": 1},
                    "iscrowd": {"const": 0},
                    "area": {"type": "number", "exclusiveMinimum": 0},
                    "bbox": {"type": "array", "items": NUMBER, "minItems": 4, "maxItems": 4},
                    "segmentation": {
                        "type": "array",
                        "items": {"type": "array", "items": NUMBER, "minItems": 6, "multipleOf": 2},
                    },
                },
            },
        },
    },
}
"""What CVAT's importer (Datumaro's, "coco_instances") and Label Studio's converter read: `segmentation` must be there,
polygons of three points or more, or empty for a rectangle; an id of 0 would be no class."""


def brief(**changed: Any) -> ProbeOptions:
    return ProbeOptions(**{"seeds": 1, "quiet": True, "device": "cpu"} | changed)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    found = Workspace(tmp_path_factory.mktemp("verdicts"))
    make_generated("surface", found.data / "surface", images=TRAINED, size=(64, 64))
    return found


@pytest.fixture(scope="module")
def heads(workspace: Workspace) -> dict[str, Path]:
    """A head for each task; its scores don't matter."""
    extract(workspace, SPEC, "surface", ExtractOptions(batch_size=8, quiet=True, device="cpu"))
    few = TrainRecipe(iterations=12, batch_size=4, evaluations=1)
    asked = {
        "semseg": brief(recipe=TrainRecipe(iterations=60, batch_size=8, lr=5e-2, evaluations=1)),
        "detect": brief(recipe=few),
        "classify": brief(labels="defect"),
        "anomaly": brief(head="gaussian"),
    }
    return {task: folder_of(workspace, task, options) for task, options in asked.items()}


def folder_of(workspace: Workspace, task: str, options: ProbeOptions) -> Path:
    return workspace.probes / probe(workspace, task, options=options).rows[0]["folder"]


@pytest.fixture(scope="module")
def scans(workspace: Workspace) -> Path:
    """Some of the images."""
    folder = workspace.root / "scans"
    folder.mkdir()
    for image in sorted((workspace.data / "surface" / "images").glob("*.png"))[:IMAGES]:
        (folder / image.name).write_bytes(image.read_bytes())
    return folder


def lines_of(out: Path) -> list[dict[str, str]]:
    """summary.csv; the same is in summary.json."""
    with (out / "summary.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    said = json.loads((out / "summary.json").read_text())
    assert list(lines[0]) == COLUMNS
    assert [uncell(line["image"]) for line in lines] == [one["image"] for one in said["images"]]
    assert [line["verdict"] for line in lines] == [one["verdict"] for one in said["images"]]
    counts = said["counts"]
    assert counts["images"] == len(lines) and counts["called"] == sum(line["verdict"] == "called" for line in lines)
    assert counts["findings"] == sum(int(line["findings"] or 0) for line in lines)
    assert said["threshold"] == ("default" if lines[0]["threshold"] == "default" else said["threshold"])
    return lines


def findings_of(out: Path) -> dict[str, list[dict[str, Any]]]:
    """The annotations of findings.json by the names of images, of which those without are there too."""
    validate(values := json.loads((out / "findings.json").read_text()), COCO_LAYOUT)
    with redirect_stdout(StringIO()):
        loaded = COCO(str(out / "findings.json"))
    assert sorted(loaded.anns) == list(range(1, len(values["annotations"]) + 1))
    return {image["file_name"]: loaded.imgToAnns[image["id"]] for image in values["images"]}


def mask_of(out: Path, image: str) -> NDArray[np.uint8]:
    with Image.open(out / "masks" / f"{Path(image).stem}.png") as mask:
        return np.asarray(mask)


def test_masks_findings_and_summary_of_segmentation_agree(heads: dict[str, Path], scans: Path, tmp_path: Path) -> None:
    plain, given = tmp_path / "plain", tmp_path / "given"
    predict(heads["semseg"], [scans], plain, quiet=True, device="cpu")
    middle = float(np.float32(np.median([float(line["score"]) for line in lines_of(plain)])))
    report = predict(heads["semseg"], [scans], given, threshold=middle, quiet=True, device="cpu")
    assert {line["threshold"] for line in lines_of(plain)} == {"default"}
    assert {line["threshold"] for line in lines_of(given)} == {f"{middle:.6g}"}
    assert report.called == IMAGES // 2
    assert sum(int(line["findings"]) for out in (plain, given) for line in lines_of(out)) > IMAGES
    for out in (plain, given):
        found = findings_of(out)
        for line in lines_of(out):
            mask, own = mask_of(out, line["image"]), found[line["image"]]
            objects = components(mask, int(mask.max()) + 1)
            assert int(line["findings"]) == len(objects) == len(own)
            assert float(line["area"]) == (mask > 0).sum() == sum(one["area"] for one in own)
            assert (line["verdict"] == "called") == bool(objects)
            assert sorted(one["bbox"] for one in own) == sorted(boxes_xywh(objects))
            for one in own:
                shape = coco_mask.decode(coco_mask.frPyObjects(one["segmentation"], *mask.shape)).any(2)
                true = mask == one["category_id"]
                assert (shape & ~true).sum() <= 0.15 * one["area"] + 2, "an outline lies about where the mask ends"


def boxes_xywh(objects: Any) -> list[list[float]]:
    return [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in (own.box_xyxy for own in objects)]


def test_without_a_threshold_masks_are_the_class_map_and_with_a_higher_one_less(
    heads: dict[str, Path], scans: Path
) -> None:
    images = sorted(scans.glob("*.png"))[:6]
    maps = []
    for threshold in (0.1, 0.4, 0.8):
        with Predictor(heads["semseg"], device="cpu", threshold=threshold) as predictor:
            maps.append([result.class_map for result in predictor(images)])
    for low, middle, high in zip(*maps, strict=True):
        assert low is not None and middle is not None and high is not None
        assert ((high > 0) <= (middle > 0)).all() and ((middle > 0) <= (low > 0)).all()


def test_findings_of_detection_are_the_detections_that_reach_the_threshold(
    heads: dict[str, Path], scans: Path, tmp_path: Path
) -> None:
    predict(heads["detect"], [scans], tmp_path / "default", quiet=True, device="cpu")
    every = json.loads((tmp_path / "default" / "predictions.json").read_text())
    scores = sorted(one["score"] for one in every["annotations"])
    assert len(scores) > 20
    middle = float(np.float32((scores[-10] + scores[-9]) / 2))
    for out, least in ((tmp_path / "default", 0.5), (tmp_path / "given", middle)):
        if out.name == "given":
            predict(heads["detect"], [scans], out, threshold=least, quiet=True, device="cpu")
        lines, found = lines_of(out), findings_of(out)
        assert {line["threshold"] for line in lines} == {"default" if out.name == "default" else f"{least:.6g}"}
        assert sum(len(own) for own in found.values()) == sum(score >= least for score in scores)
        for line in lines:
            own = found[line["image"]]
            assert len(own) == int(line["findings"]) and (line["verdict"] == "called") == bool(own)
            assert all(one["segmentation"] == [] and one["score"] >= least for one in own)
            assert float(line["area"]) == pytest.approx(sum(one["area"] for one in own), rel=1e-4)
    assert {line["verdict"] for line in lines} == {"called", "passed"}


@pytest.mark.parametrize("task, table, score", [("classify", "labels.csv", "score of a defect"),
                                                ("anomaly", "scores.csv", "score")])  # fmt: skip
def test_images_are_called_by_the_heads_threshold_or_by_the_given_one(
    task: str, table: str, score: str, heads: dict[str, Path], scans: Path, tmp_path: Path
) -> None:
    for name, threshold in (("own", None), ("given", 0.3)):
        out = tmp_path / name
        predict(heads[task], [scans], out, threshold=threshold, quiet=True, device="cpu")
        with (out / table).open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        lines = lines_of(out)
        limits = {row["threshold"] for row in rows}
        assert len(limits) == 1 and float(limits.pop()) == pytest.approx(float(lines[0]["threshold"]), abs=1e-6)
        assert threshold is None or float(lines[0]["threshold"]) == pytest.approx(threshold)
        assert [row["verdict"] for row in rows] == [line["verdict"] for line in lines]
        assert [float(row[score]) for row in rows] == pytest.approx([float(line["score"]) for line in lines], abs=1e-5)
        assert all(line["findings"] == line["area"] == "" for line in lines)
        source = json.loads((out / "summary.json").read_text())["threshold_from"]
        assert source == ("head" if threshold is None else "given")


def test_a_head_of_tiles_finds_the_tiles_that_it_calls(workspace: Workspace, scans: Path, tmp_path: Path) -> None:
    tiled = Workspace(tmp_path / "tiles")
    options = ExtractOptions(tile=32, overlap=0, batch_size=16, quiet=True, device="cpu")
    extract(tiled, SPEC, str(workspace.data / "surface"), options)
    folder = folder_of(tiled, "classify", brief(labels="defect", unit="tile"))
    predict(folder, [scans], tmp_path / "out", threshold=0.5, quiet=True, device="cpu")
    with (tmp_path / "out" / "labels.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    lines = lines_of(tmp_path / "out")
    assert sum(int(line["findings"]) for line in lines) > 0
    for line in lines:
        called = [row for row in rows if row["image"] == line["image"] and row["verdict"] == "called"]
        assert len(called) == int(line["findings"]) and float(line["area"]) == 32 * 32 * len(called)
        assert (line["verdict"] == "called") == bool(called)
    with Predictor(folder, device="cpu", threshold=0.5) as predictor:
        (result,) = predictor([sorted(scans.glob("*.png"))[0]])
    assert result.probabilities is not None
    assert result.probabilities.shape == (4, 2) and len(result.labels) == len(result.tiles) == 4


# ---- exit codes ------------------------------------------------------------------------------------------------------


def test_a_defect_ends_the_command_with_3_and_none_with_0(heads: dict[str, Path], scans: Path, tmp_path: Path) -> None:
    def run(*more: str) -> tuple[int, str]:
        words = ["predict", str(heads["classify"]), str(scans), "--quiet", "--device", "cpu", *more]
        done = CliRunner().invoke(cli, words)
        return done.exit_code, done.output

    code, said = run("--out", str(tmp_path / "a"), "--threshold", "0.01", "--fail-on-defect")
    called = sum(line["verdict"] == "called" for line in lines_of(tmp_path / "a"))
    assert code == 3 and f"called: {called} of {IMAGES} images" in said and called > 0
    assert (tmp_path / "a" / "labels.csv").is_file()
    assert run("--out", str(tmp_path / "b"), "--threshold", "0.01")[0] == 0
    code, said = run("--out", str(tmp_path / "c"), "--threshold", "1", "--fail-on-defect", "--json")
    assert code == 0 and json.loads(said)["called"] == 0
    for wrong in ("1.5", "-1", "nan", "x"):
        code, said = run("--out", str(tmp_path / "d"), "--threshold", wrong)
        assert code == 2 and not (tmp_path / "d").exists(), said


def test_a_head_that_can_give_no_verdict_is_refused_before_anything_is_computed(
    workspace: Workspace, scans: Path, tmp_path: Path
) -> None:
    """Its validation has no good image, so nothing could be set there."""
    labels = [json.loads(file.read_text()) for file in (workspace.data / "surface" / "annotations").glob("*.json")]
    marked = [{a["image_id"] for a in own["annotations"]} for own in labels]
    named = [(i["file_name"], i["id"] in ids) for own, ids in zip(labels, marked, strict=True) for i in own["images"]]
    bad, good = ([name for name, defect in named if defect == kind] for kind in (True, False))
    splits = {**dict.fromkeys(good, "train"), **dict.fromkeys(bad[:4], "val"), **dict.fromkeys(bad[4:], "test")}
    file = tmp_path / "split.csv"
    file.write_text("id,split,group\n" + "".join(f"{name},{own},{name}\n" for name, own in splits.items()))
    folder = folder_of(workspace, "anomaly", brief(head="knn", split=str(file)))
    out = tmp_path / "out"
    with pytest.raises(ProbeError, match=r"gives no verdicts: it has no threshold\. Nothing was computed"):
        predict(folder, [scans], out, need_verdict=True, quiet=True, device="cpu")
    assert not out.exists()
    report = predict(folder, [scans], out, quiet=True, device="cpu")
    assert report.called is None and {line["verdict"] for line in lines_of(out)} == {""}
    assert {line["threshold"] for line in lines_of(out)} == {""}
    report = predict(folder, [scans], out, threshold=1e-6, need_verdict=True, quiet=True, device="cpu")
    assert report.called is not None and report.called > 0


def test_labels_that_say_nothing_of_good_take_no_threshold(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for i in range(24):
        folder = tmp_path / "set" / ("train", "train", "val", "test")[i % 4] / ("left", "right")[i // 4 % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (32, 32), dtype=np.uint8)).save(folder / f"{i}.png")
    own = Workspace(tmp_path)
    extract(own, SPEC, str(tmp_path / "set"), ExtractOptions(batch_size=8, quiet=True, device="cpu"))
    folder = folder_of(own, "classify", brief())
    with pytest.raises(ProbeError, match=r"none of its labels \(left, right\) says that an image is good"):
        Predictor(folder, device="cpu", threshold=0.5)
    with pytest.raises(ProbeError, match="gives no verdicts"):
        predict(folder, [tmp_path / "set"], tmp_path / "out", need_verdict=True, quiet=True, device="cpu")


# ---- what is bad, and much -------------------------------------------------------------------------------------------


def test_the_summary_has_a_line_for_an_unreadable_image_and_no_cell_is_a_formula(
    heads: dict[str, Path], scans: Path, tmp_path: Path
) -> None:
    images = tmp_path / "scans"
    (images / "left").mkdir(parents=True)
    source = sorted(scans.glob("*.png"))
    for name, path in (("=1+1.png", source[0]), ("left/a.png", source[1]), ("z.png", source[2])):
        (images / name).write_bytes(path.read_bytes())
    (images / "left" / "torn.png").write_bytes(source[3].read_bytes()[:300])
    with pytest.raises(FeatprobeError, match=r"torn\.png"):
        predict(heads["detect"], [images], tmp_path / "first", quiet=True, device="cpu")
    assert not list((tmp_path / "first").glob("*.*")), "files about all images are whole or not there"
    report = predict(heads["detect"], [images], tmp_path / "second", skip_bad=True, quiet=True, device="cpu")
    lines = lines_of(tmp_path / "second")
    assert [line["image"] for line in lines] == ["'=1+1.png", "left/a.png", "left/torn.png", "z.png"]
    torn = lines[2]
    assert torn["verdict"] == "unreadable" and torn["reason"] and not torn["score"] and not torn["milliseconds"]
    assert report.images == 3 and report.left_out == ((str(images / "left" / "torn.png"), torn["reason"]),)
    assert list(findings_of(tmp_path / "second")) == ["=1+1.png", "left/a.png", "z.png"]


def test_the_reason_is_whole_where_a_name_holds_the_end_of_a_line(heads: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / 'a,"b"\nc.png').write_bytes(b"no image")
    predict(heads["semseg"], [tmp_path / "scans"], tmp_path / "out", skip_bad=True, quiet=True, device="cpu")
    (line,) = lines_of(tmp_path / "out")
    assert line["image"] == 'a,"b"\nc.png' and "is not an image" in line["reason"]


def test_no_more_than_a_batch_of_findings_is_in_memory(
    heads: dict[str, Path], scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Any]] = []
    plain = Predictor.predict

    def watched(self: Predictor, images: Any) -> Any:
        assert sum(own() is not None for own in alive) <= 1, "what was found before is written and let go"
        found = plain(self, images)
        alive.extend(weakref.ref(own) for own in found)
        return found

    monkeypatch.setattr(Predictor, "predict", watched)
    for task in ("semseg", "detect", "anomaly"):
        images = sorted(scans.glob("*.png"))[:6]
        report = predict(heads[task], images, tmp_path / task, batch_size=2, quiet=True, device="cpu")
        assert report.images == 6
        alive.clear()


# ---- a predictor in a program ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["semseg", "detect", "classify", "anomaly"])
def test_a_predictor_says_of_arrays_what_predict_says_of_files(
    task: str, heads: dict[str, Path], scans: Path, tmp_path: Path
) -> None:
    images = sorted(scans.glob("*.png"))[:10]
    predict(heads[task], images, tmp_path, quiet=True, device="cpu", batch_size=8)
    lines = lines_of(tmp_path)
    with Predictor(heads[task], device="cpu") as predictor:
        arrays = [np.asarray(Image.open(image)) for image in images]
        results = predictor(arrays)
        assert [own.score for own in predictor([*images[:2], str(images[2])])] == [own.score for own in results[:3]]
        assert predictor([]) == []
        assert repr(predictor).startswith(f"<Predictor {task} ") and len(repr(predictor)) < 80
    for line, result, image in zip(lines, results, images, strict=True):
        assert result.verdict == line["verdict"] and len(repr(result)) < 80
        assert result.score == pytest.approx(float(line["score"]), rel=1e-5) and result.milliseconds > 0
        assert len(result.findings) == int(line["findings"] or 0)
        assert sum(own.area for own in result.findings) == pytest.approx(float(line["area"] or 0), rel=1e-5)
        assert all(own.name in predictor_names(task) for own in result.findings)
        if task == "semseg":
            assert result.class_map is not None and np.array_equal(result.class_map, mask_of(tmp_path, image.name))
            assert (
                sum(own.mask.sum() for own in result.findings if own.mask is not None) == (result.class_map > 0).sum()
            )
        if task == "classify":
            assert result.probabilities is not None and result.probabilities.sum() == pytest.approx(1, abs=1e-5)
            assert set(result.labels) <= {"good", "defect"}
        if task == "anomaly":
            with Image.open(tmp_path / "maps" / f"{image.stem}.tif") as kept:
                assert result.heat_map is not None and np.array_equal(result.heat_map, np.asarray(kept))


@pytest.fixture(scope="module")
def classifier(heads: dict[str, Path]) -> Predictor:
    return Predictor(heads["classify"], device="cpu")


def predictor_names(task: str) -> tuple[str, ...]:
    return ("scratch", "pit", "stain", "crack", "dent") if task in ("semseg", "detect") else ()


@pytest.mark.parametrize(
    "images, said",
    [
        ([np.zeros((8, 8), np.uint16)], r"images\[0\] is an image of 16 bits, and the head was trained on images of 8"),
        (
            [np.zeros((8, 8, 3), np.uint8), np.zeros((3, 8, 8), np.uint8)],
            r"(?s)images\[1\] can't be read.*\(3, 8, 8\) of uint8",
        ),
        ([np.zeros((8, 8, 4), np.uint8)], r"(?s)RGB order.*found   \(8, 8, 4\)"),
        ([np.zeros((8, 8), np.float64)], r"(?s)wanted .*float32.*of float64"),
        ([np.zeros((8, 8), np.int16)], "of int16"),
        ([np.zeros((0, 8), np.uint8)], r"found   \(0, 8\)"),
        ([np.zeros((8, 8), np.float32)], "is an image of 32 bits"),
        ([np.zeros((8, 8), ">u2")], "is an image of 16 bits"),
        ([[[0, 1], [1, 0]]], r"images\[0\] is a list. wanted: a numpy array"),
        (np.zeros((8, 8), np.uint8), r"takes a list of images. Give it \[image\]"),
        ("scan.png", "takes a list of images"),
        (["nowhere.png"], r"nowhere\.png"),
    ],
    ids=range(12),
)
def test_what_does_not_fit_is_refused_in_words(images: Any, said: str, classifier: Predictor) -> None:
    with pytest.raises(FeatprobeError, match=said):
        classifier(images)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_threshold_out_of_range_is_a_wrong_value(threshold: float, heads: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="wanted  a number from 0 to 1"):
        Predictor(heads["detect"], device="cpu", threshold=threshold)


def test_a_threshold_that_float32_can_not_hold_is_a_wrong_value(heads: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match=r"can't be 1e\+39"):
        Predictor(heads["anomaly"], device="cpu", threshold=1e39)


def test_a_view_of_an_array_is_read_as_its_copy(heads: dict[str, Path], scans: Path) -> None:
    levels = np.asarray(Image.open(sorted(scans.glob("*.png"))[0]))
    with Predictor(heads["semseg"], device="cpu") as predictor:
        first, second = predictor([levels, np.repeat(levels, 2, axis=1)[:, ::2]])
    assert first.class_map is not None and np.array_equal(first.class_map, second.class_map)


def test_threads_wait_for_each_other_and_a_closed_predictor_says_so(heads: dict[str, Path], scans: Path) -> None:
    images = sorted(scans.glob("*.png"))[:8]
    with Predictor(heads["semseg"], device="cpu") as predictor:
        alone = [result.score for result in predictor(images)]
        with ThreadPoolExecutor(4) as pool:
            each = list(pool.map(lambda image: predictor([image])[0].score, images))
        assert each == pytest.approx(alone, abs=1e-5)
    with pytest.raises(ProbeError, match="was closed"):
        predictor(images)
    predictor.close()
    assert predictor.classes and repr(predictor)


def test_a_predictor_may_be_closed_while_another_thread_has_its_answer(
    heads: dict[str, Path], scans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = Predictor(heads["semseg"], device="cpu")
    found: list[Any] = []

    class Closing:
        """Closes the predictor as soon as the lock is free."""

        def __enter__(self) -> None:
            return None

        def __exit__(self, *_: object) -> None:
            if not found:
                found.append(True)
                predictor.close()

    monkeypatch.setattr(predictor, "_lock", Closing())
    (result,) = predictor(sorted(scans.glob("*.png"))[:1])
    assert found and result.class_map is not None
    with pytest.raises(ProbeError, match="was closed"):
        predictor(sorted(scans.glob("*.png"))[:1])


def test_the_service_on_the_page_answers(heads: dict[str, Path], scans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "predicting.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    code = code.replace("probes/SET/BACKBONE/HEAD/seed0", str(heads["detect"])).replace("8000", "0")
    servers: Queue[ThreadingHTTPServer] = Queue()

    class Watched(ThreadingHTTPServer):
        def serve_forever(self, poll_interval: float = 0.1) -> None:
            servers.put(self)
            super().serve_forever(poll_interval)

    monkeypatch.setattr(http.server, "ThreadingHTTPServer", Watched)
    monkeypatch.setattr(http.server.BaseHTTPRequestHandler, "log_message", lambda *_: None)
    running = Thread(target=exec, args=(compile(code, "predicting.md", "exec"), {}), daemon=True)
    running.start()
    with servers.get(timeout=60) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        try:
            image = sorted(scans.glob("*.png"))[0]
            with urlopen(url, image.read_bytes(), timeout=60) as answer:
                said = json.loads(answer.read())
            assert said["verdict"] in ("called", "passed") and said["score"] > 0
            for wrong in (b"no image", b""):
                with pytest.raises(HTTPError) as error:
                    urlopen(url, wrong, timeout=60)
                assert error.value.code == 422 and "image" in json.loads(error.value.read())["error"]
        finally:
            server.shutdown()
            running.join(timeout=60)


# ---- operating points ------------------------------------------------------------------------------------------------


def with_point(folder: Path, place: Path, **changed: Any) -> Path:
    """A copy of a head with an operating point beside it."""
    copied = Path(shutil.copytree(folder, place))
    counts = Counts(0.5, 40, 30, 8, 6, 20, 18, 25, 2, 1, 40, 8)
    values = {"threshold": 0.5, "base": nan, "least_area": 1} | changed
    point = OperatingPoint(**values, wanted=Wanted.parse("0.05"), validation=counts, sure=True, needed=60)
    point = replace(point, validation=replace(counts, threshold=point.threshold))
    write_point(copied, json.loads((copied / "card.json").read_text())["head_sha256"], point)
    return copied


def test_the_operating_point_of_a_head_decides_unless_a_threshold_is_given(
    heads: dict[str, Path], scans: Path, tmp_path: Path
) -> None:
    folder = with_point(heads["semseg"], tmp_path / "head", base=0.25, threshold=0.375, least_area=3)
    report = predict(folder, [scans], tmp_path / "out", device="cpu", quiet=True)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["threshold_from"], summary["threshold"]) == ("operating_point", 0.375)
    wanted = "at most 0.05 false calls per image"
    assert summary["operating_point"] == {"wanted": wanted, "base": 0.25, "least_area": 3}
    assert any(f"{wanted}: threshold 0.375, findings of 3 pixels or more; --threshold" in note for note in report.notes)
    findings = [area for own in findings_of(tmp_path / "out").values() for area in (one["area"] for one in own)]
    assert findings and min(findings) >= 3
    for line in lines_of(tmp_path / "out"):
        mask = mask_of(tmp_path / "out", line["image"])
        assert (line["verdict"] == "called") == mask.any() == (line["findings"] != "0")
        assert len(components(mask, len(summary["classes"]))) == int(line["findings"])
    images = sorted(scans.glob("*.png"))
    with Predictor(folder, device="cpu") as predictor:
        assert predictor.point is not None and predictor.point.least_area == 3
        results = predictor(images)
    assert [own.verdict for own in results] == [line["verdict"] for line in lines_of(tmp_path / "out")]
    predict(folder, [scans], tmp_path / "given", device="cpu", quiet=True, threshold=0.4)
    predict(heads["semseg"], [scans], tmp_path / "plain", device="cpu", quiet=True, threshold=0.4)
    given, plain = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("given", "plain"))
    assert given["threshold_from"] == "given" and given["operating_point"] is None
    assert given["counts"] == plain["counts"]


def test_maps_of_anomalies_are_joined_at_an_operating_point(
    heads: dict[str, Path], scans: Path, tmp_path: Path
) -> None:
    with Predictor(heads["anomaly"], device="cpu") as plain:
        maps = [result.heat_map for result in plain(sorted(scans.glob("*.png")))]
    base, threshold = (float(np.float32(np.quantile(np.stack(maps), share))) for share in (0.9, 0.99))
    folder = with_point(heads["anomaly"], tmp_path / "head", base=base, threshold=threshold, least_area=5)
    with Predictor(folder, device="cpu") as predictor:
        results = predictor(sorted(scans.glob("*.png")))
    at = Threshold(threshold, "operating_point", base, 5)
    for values, result in zip(maps, results, strict=True):
        mask = joined_pixels(values, None, at)
        assert sum(one.area for one in result.findings) == mask.sum() and result.score == values.max()
        assert result.verdict == ("called" if mask.any() else "passed")
    assert {result.verdict for result in results} == {"called", "passed"}
    predict(folder, [scans], tmp_path / "out", device="cpu", quiet=True)
    with (tmp_path / "out" / "scores.csv").open() as stream:
        assert [row["verdict"] for row in csv.DictReader(stream)] == [result.verdict for result in results]


def test_objects_and_labels_reach_their_operating_points(heads: dict[str, Path], scans: Path, tmp_path: Path) -> None:
    images = sorted(scans.glob("*.png"))
    with Predictor(heads["detect"], device="cpu", threshold=0) as every:
        found = [result.findings for result in every(images)]
    scores = sorted(one.score for own in found for one in own)
    threshold, area = scores[len(scores) // 2], sorted(one.area for own in found for one in own)[len(scores) // 2]
    folder = with_point(heads["detect"], tmp_path / "boxes", threshold=threshold, least_area=int(area))
    with Predictor(folder, device="cpu") as predictor:
        kept = [[(one.box, one.score) for one in result.findings] for result in predictor(images)]
    fits = [[(one.box, one.score) for one in own if one.score >= threshold and one.area >= int(area)] for own in found]
    assert kept == fits and 0 < sum(map(len, kept)) < len(scores) / 2
    with Predictor(heads["classify"], device="cpu") as plain:
        highest = [result.score for result in plain(images)]
    middle = float(np.float32(sorted(highest)[len(highest) // 2]))
    with Predictor(with_point(heads["classify"], tmp_path / "labels", threshold=middle), device="cpu") as predictor:
        verdicts = [result.verdict for result in predictor(images)]
    assert verdicts == ["called" if np.float32(score) >= np.float32(middle) else "passed" for score in highest]


def test_an_operating_point_of_another_kind_or_head_is_refused(heads: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match=r"(?s)no operating point of this head.*wanted  base: a base threshold"):
        Predictor(with_point(heads["semseg"], tmp_path / "semseg"), device="cpu")
    with pytest.raises(ProbeError, match=r"(?s)wanted  base: none.*0.25"):
        Predictor(with_point(heads["detect"], tmp_path / "detect", base=0.25), device="cpu")
    folder = with_point(heads["semseg"], tmp_path / "moved", base=0.25)
    shutil.copy(tmp_path / "detect" / "operating.json", folder)
    with pytest.raises(ProbeError, match=r"(?s)of another head.*featprobe inspect"):
        Predictor(folder, device="cpu")
    assert Predictor(folder, device="cpu", threshold=0.5).point is None


@pytest.mark.parametrize("task", ["semseg", "detect", "classify", "anomaly"])
def test_predict_finds_at_the_operating_point_what_the_records_hold(
    heads: dict[str, Path], workspace: Workspace, tmp_path: Path, task: str
) -> None:
    """The law that makes a figure of `inspect` one of `predict`: the same calls in each image, those of test too."""
    folder = Path(shutil.copytree(heads[task], tmp_path / "head"))
    sha = json.loads((folder / "card.json").read_text())["head_sha256"]
    records = read_records(folder, sha)
    point = choose(records.of("val"), Wanted("false_calls", 2), least_area=3)
    write_point(folder, sha, point)
    records = records.with_least_area(3)
    with Predictor(folder, device="cpu") as predictor:
        results = predictor([workspace.data / "surface" / file for file in records.images.files])
    called = records.called(point.threshold)
    for image, result in enumerate(results):
        own = called & (records.calls.image == image)
        if records.about.pooled:
            own = records.images.score[[image]] >= np.float32(point.threshold)
        else:
            areas = sorted(one.area for one in result.findings)
            assert areas == pytest.approx(sorted(records.calls.size("area")[own]), abs=1e-2)
            assert sorted(one.score for one in result.findings) == pytest.approx(
                sorted(records.calls.score[own]), rel=1e-5
            )
        assert result.verdict == ("called" if own.any() else "passed")
    assert {*records.images.splits} == {"val", "test"} and (called.any() or records.about.pooled)
