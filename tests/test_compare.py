"""The comparison: the numbers of its tables by hand, which results meet, what is marked, and a page that holds all."""

import base64
import json
import re
import shlex
import shutil
import subprocess
import warnings
from collections.abc import Sequence
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from helpers import PoolingBackbone
from helpers import extract as extract_into
from numpy.typing import NDArray
from PIL import Image

from featprobe.cli.main import cli
from featprobe.errors import FeatprobeError, ProbeError
from featprobe.metrics import (
    FEW_GROUPS,
    ResampledAp,
    average_precision,
    grouped,
    holm,
    iou_scores,
    iou_statistic,
    jackknifed,
    mean_of,
    modality_gap,
    paired_difference,
    score_interval,
)
from featprobe.probes import TrainRecipe, append_row, plain
from featprobe.probes.saved import read_card
from featprobe.report import comparison
from featprobe.report.answer import answer_of
from featprobe.report.page import efficiency_of
from featprobe.report.plots import Dot, Series, dot_plot, line_plot
from featprobe.specs import digest
from featprobe.stages.compare import Comparison, compare
from featprobe.stages.convergence import Curve, late_rise, still_rising
from featprobe.stages.probe import probe
from featprobe.stages.probe_options import ProbeOptions
from featprobe.stages.workspace import Workspace, make_generated

GROUPS = 24
AUGMENTED = {"smallest": 0.5}
TUNING = {"regime": "full", "augment": True, "backbone_lr": 0.1, "layer_decay": 1.0, "bn": "frozen", "clip": 1.0,
          "accumulate": 1, "ema": 0.0, "precision": "fp32", "init_head": None}  # fmt: skip
FULL = {"regime": "full", "tuning": TUNING, "augmentation": AUGMENTED, "recipe_key": "f0000000"}
ONLINE = {**FULL, "regime": "frozen-online", "recipe_key": "o0000000"}
PLAIN = {**FULL, "augmentation": None, "recipe_key": "p0000000"}
RISING = (0.1, 0.2, 0.3, 0.4, 0.5)
FLAT = (0.1, 0.4, 0.48, 0.5, 0.5)


class Told:
    """A workspace whose results are told, not trained: a real one of each task, repeated with other scores."""

    def __init__(self, root: Path, bases: Path) -> None:
        self.workspace = Workspace(root)
        self.bases = bases
        self.probes = self.workspace.probes

    def base(self, task: str) -> dict[str, Any]:
        rows = [json.loads(line) for line in (self.bases / "probes" / "results.jsonl").read_text().splitlines()]
        return next(row for row in rows if row["task"] == task)

    def tell(self, confusions: NDArray[np.int64], curve: Sequence[float] = FLAT, groups: Sequence[str] = (),
             **changed: Any) -> dict[str, Any]:  # fmt: skip
        """Save a segmentation result with these confusions of test images; returns its row."""
        names = [f"part{i:03}" for i in range(len(confusions))]
        given = {"classes": ["background", "scratch"], **changed}
        scores = iou_scores(confusions.sum(0), changed.get("absent_classes", "zero"))
        iou = dict(zip(given["classes"], scores.per_class, strict=True))
        test = {"miou": scores.miou, "miou_foreground": scores.miou_foreground, "iou": iou}
        stream = BytesIO()
        kept = {"ids": np.array(names), "groups": np.array(groups or [f"g{i // 2}" for i in range(len(confusions))])}
        np.savez(stream, confusion=confusions, **kept)
        val = {"miou": curve[-1], "miou_foreground": curve[-1]}
        return self.save({**given, "test": test, "val": val}, curve, {"scores.npz": stream.getvalue()}, "semseg")

    def tell_objects(self, truth: dict[str, Any], found: list[dict[str, Any]], **changed: Any) -> dict[str, Any]:
        scores = average_precision(truth, found, "bbox")
        names = [category["name"] for category in truth["categories"]]
        box = {**vars(scores), "per_class": dict(zip(names, scores.per_class, strict=True))}
        given = {"classes": ["background", *names], "test": {"box": box}, "val": {"box_ap": 0.5, "box_ap50": 0.5}}
        files = {"truth.json": json.dumps(truth).encode(), "predictions.json": json.dumps(found).encode()}
        return self.save({**given, **changed}, FLAT, files, "detect")

    def save(
        self, changed: dict[str, Any], curve: Sequence[float], files: dict[str, bytes], task: str
    ) -> dict[str, Any]:
        base = self.base(task)
        card = read_card(self.bases / "probes" / base["folder"])
        card["features"] = {**card["features"], **changed.pop("features", {})}
        row = plain({**base, **changed})
        row["folder"] = f"told/{digest([row[k] for k in sorted(row) if k not in ('test', 'folder', 'time')])[:12]}"
        folder = self.probes / row["folder"]
        folder.mkdir(parents=True, exist_ok=True)
        name = "miou_foreground" if task == "semseg" else "box_ap50"
        points = [{"iteration": 10 * (i + 1), "loss": 1.0, "scores": {name: v}} for i, v in enumerate(curve)]
        curves = [{"lr": 1.0, "weight_decay": 0.0, "chosen": chosen, "curve": points} for chosen in (True, False)]
        curves[1]["curve"] = []
        for file, data in {**files, "curves.json": json.dumps(curves).encode()}.items():
            (folder / file).write_bytes(data)
        card |= {"result": row}
        (folder / "card.json").write_text(json.dumps(card | {"card_sha256": digest(card)}))
        append_row(self.probes / "results.jsonl", row)
        return row

    def compare(self, **more: Any) -> Comparison:
        return compare(self.workspace, quiet=True, **more)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with one real result of each task under a stand-in for a network."""
    root = tmp_path_factory.mktemp("real")
    workspace = Workspace(root)
    make_generated("surface", workspace.data / "surface", images=24, size=(64, 64))
    extract_into(root, workspace.data / "surface", PoolingBackbone())
    brief = TrainRecipe(iterations=4, batch_size=4, lr=2e-3, clip=10.0, evaluations=2)
    for task in ("semseg", "detect", "instseg"):
        probe(workspace, task, options=ProbeOptions(recipe=brief, seeds=1, quiet=True, show=2 * (task == "semseg")))
    return root


@pytest.fixture
def told(tmp_path: Path, real: Path) -> Told:
    return Told(tmp_path, real)


def confusions(hit: float, seed: int = 0, images: int = 2 * GROUPS, spread: float = 0.05) -> NDArray[np.int64]:
    """(images, 2, 2): a thousand pixels an image, a hundred of them scratched, of which about a share is found."""
    rng = np.random.default_rng(seed)
    found = np.clip(rng.normal(100 * hit, 100 * spread, images), 0, 100).astype(np.int64)
    false = rng.integers(0, 20, images)
    return np.stack([np.stack([900 - false, false], 1), np.stack([100 - found, found], 1)], 1)


def statistic(array: NDArray[np.int64], score: Any = "miou_foreground") -> Any:
    return iou_statistic(array, [f"g{i // 2}" for i in range(len(array))], score)


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_the_numbers_of_a_line_are_those_of_the_metrics(told: Told) -> None:
    seeds = [confusions(0.5, 0), confusions(0.6, 1), confusions(0.7, 2)]
    for seed, array in enumerate(seeds):
        told.tell(array, seed=seed)
    (one,) = told.compare().sets
    (line,) = one.lines
    for name in ("miou_foreground", "miou"):
        every = [getattr(iou_scores(array.sum(0)), name) for array in seeds]
        by_hand = score_interval(mean_of([statistic(array, name) for array in seeds]))
        assert line[name] == pytest.approx(np.mean(every), abs=1e-12) == by_hand.estimate
        assert line[f"{name}_sd"] == pytest.approx(np.std(every, ddof=1), abs=1e-12)
        assert (line[f"{name}_low"], line[f"{name}_high"]) == (by_hand.low, by_hand.high)
    assert line["seeds"] == 3 and line["groups"] == GROUPS
    assert line["classes"]["scratch"] == pytest.approx(line["miou_foreground"])


def test_differences_are_paired_and_corrected_over_the_whole_set(told: Told) -> None:
    arrays = {"a": confusions(0.7, 0), "b": confusions(0.5, 1), "c": confusions(0.49, 2)}
    for name, array in arrays.items():
        told.tell(array, backbone=name, feature_key=name)
    told.tell(confusions(0.8, 3), backbone="a", feature_key="a", **FULL)
    (one,) = told.compare().sets
    found = {(d["a"], d["b"]): d for d in one.differences}
    assert list(found) == [("a", "b"), ("a", "c"), ("b", "c"), ("full", "frozen")]
    for (a, b), line in found.items():
        first = confusions(0.8, 3) if a == "full" else arrays[a]
        by_hand = paired_difference(statistic(first), statistic(arrays["a" if b == "frozen" else b]))
        assert (line["difference"], line["low"], line["high"]) == (by_hand.estimate, by_hand.low, by_hand.high)
        assert line["p"] == by_hand.p_value
    assert [line["p_holm"] for line in one.differences] == list(holm([line["p"] for line in one.differences]))


def objects(found_share: float, seed: int = 0, images: int = 12) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Truth of two groups of images and what was found in them."""
    rng = np.random.default_rng(seed)
    truth: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "pore"}]}
    found = []
    for i in range(1, images + 1):
        truth["images"].append({"id": i, "height": 64, "width": 64, "file_name": f"i{i}.png", "group": f"g{i // 2}"})
        box = {"image_id": i, "category_id": 1, "bbox": [4.0, 4.0, 20.0, 20.0]}
        truth["annotations"].append(box | {"id": i, "area": 400.0, "iscrowd": 0})
        shift = 0.0 if rng.random() < found_share else 30.0
        found.append({**box, "bbox": [4.0 + shift, 4.0, 20.0, 20.0], "score": float(rng.random())})
    return truth, found


def test_average_precision_has_the_interval_of_a_jackknifed_resampling(told: Told) -> None:
    every = {name: objects(share, seed) for seed, (name, share) in enumerate({"a": 0.9, "b": 0.4}.items())}
    for name, (truth, found) in every.items():
        told.tell_objects(truth, found, backbone=name, feature_key=name)
    (one,) = told.compare().sets
    by_hand = {}
    for line in one.lines:
        truth, found = every[line["backbone"]]
        names, index = grouped([image["group"] for image in truth["images"]])
        ap = ResampledAp(truth, found, "bbox")
        for name in ("ap50", "ap"):
            score = jackknifed(ap.by_group(name, index, "hold"), names)  # type: ignore[arg-type]
            wanted = score_interval(score, resamples=1000)
            column = f"box_{name}"
            assert (line[column], line[f"{column}_low"], line[f"{column}_high"]) == (
                wanted.estimate, wanted.low, wanted.high,
            )  # fmt: skip
            by_hand.setdefault(name, []).append(score)
    (difference,) = one.differences
    wanted_difference = paired_difference(*by_hand["ap50"], resamples=1000)
    assert (difference["difference"], difference["p"]) == (wanted_difference.estimate, wanted_difference.p_value)


def test_a_modality_gap_is_that_of_the_metrics(told: Told) -> None:
    arrays = {(d, b): confusions(0.3 + 0.1 * i, i) for i, (d, b) in enumerate([(d, b) for d in "rx" for b in "ab"])}
    for (data, backbone), array in arrays.items():
        told.tell(array, data=data, data_fingerprint=data, backbone=backbone, feature_key=data + backbone)
    (gap,) = told.compare(gap=("a", "b"), on=("r", "x")).gaps
    every = {key: statistic(array) for key, array in arrays.items()}
    wanted = modality_gap((every["r", "a"], every["r", "b"]), (every["x", "a"], every["x", "b"]))
    assert (gap["difference"], gap["low"], gap["high"], gap["p"]) == (
        wanted.estimate, wanted.low, wanted.high, wanted.p_value,
    )  # fmt: skip
    assert told.compare().gaps == (gap,), "unasked where there are only two backbones and two sets"
    with pytest.raises(ProbeError, match="no result of the backbone 'c'"):
        told.compare(gap=("a", "c"), on=("r", "x"))
    with pytest.raises(ProbeError, match="no result of the data set 'y'"):
        told.compare(gap=("a", "b"), on=("r", "y"))
    with pytest.raises(ProbeError, match="--gap A,B"):
        told.compare(gap=("a",), on=("r", "x"))
    told.tell(confusions(0.4), data="z", data_fingerprint="z", backbone="a", feature_key="za")
    assert told.compare().gaps == (), "three sets: which two is for the user to say"
    with pytest.raises(ProbeError, match="No gap can be made"):
        told.compare(gap=("a", "b"), on=("r", "z"))


# ---- which results meet ----------------------------------------------------------------------------------------------


def test_of_a_repeated_run_the_last_counts(told: Told) -> None:
    told.tell(confusions(0.2), seed=0, time="2026-01-01T00:00:00Z")
    last = told.tell(confusions(0.7), seed=0, time="2026-01-02T00:00:00Z")
    report = told.compare()
    (line,) = report.sets[0].lines
    assert line["miou_foreground"] == pytest.approx(last["test"]["miou_foreground"]) and line["seeds"] == 1
    assert report.unusable == ()


@pytest.mark.parametrize(
    "changed",
    [
        {"data_fingerprint": "other"},
        {"split": "group"},
        {"absent_classes": "ignore"},
        {"instances": "components"},
        {"classes": ["background", "dent"]},
        {"groups": [f"h{i // 2}" for i in range(2 * GROUPS)]},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_what_is_not_comparable_stands_apart(told: Told, changed: dict[str, Any]) -> None:
    told.tell(confusions(0.5), backbone="a", feature_key="a")
    told.tell(confusions(0.6), backbone="b", feature_key="b")
    told.tell(confusions(0.7), backbone="c", feature_key="c", **changed)
    sets = told.compare().sets
    assert sorted(sorted(line["backbone"] for line in one.lines) for one in sets) == [["a", "b"], ["c"]]
    assert len({one.title for one in sets}) == 2
    assert sum(len(one.differences) for one in sets) == 1


def test_rows_that_can_not_be_used_are_listed_with_the_reason(told: Told) -> None:
    told.tell(confusions(0.5), backbone="good")
    rows = {name: told.tell(confusions(0.5), backbone=name) for name in ("gone", "bare", "old", "other", "wrong")}
    shutil.rmtree(told.probes / rows["gone"]["folder"])
    (told.probes / rows["bare"]["folder"] / "scores.npz").unlink()
    np.savez(told.probes / rows["old"]["folder"] / "scores.npz", confusion=confusions(0.5))
    kept = np.load(told.probes / rows["wrong"]["folder"] / "scores.npz")
    spoiled = {name: kept[name] for name in kept.files} | {"confusion": confusions(0.1)}
    np.savez(told.probes / rows["wrong"]["folder"] / "scores.npz", **spoiled)
    append_row(told.probes / "results.jsonl", {**rows["other"], "recipe_key": "x"})
    ancient = {k: v for k, v in rows["other"].items() if k != "regime"}
    append_row(told.probes / "results.jsonl", {**ancient, "folder": "ancient"})
    with (told.probes / "results.jsonl").open("a") as stream:
        stream.write('{"version": 99}\n[1]\n{"version": 1, "tor')
    report = told.compare()
    assert sorted(line["backbone"] for line in report.sets[0].lines) == ["good", "other"]
    reasons = [item.reason for item in report.unusable]
    for said in ("not here any more", "scores.npz is not beside its head", "names no images and groups",
                 "written again since", "gives miou_foreground", "holds no regime"):  # fmt: skip
        assert sum(said in reason for reason in reasons) == 1, (said, reasons)
    assert len(reasons) == 6
    for said in ("is torn", "is of version 99", "is no JSON object"):
        assert sum(said in note for note in report.notes) == 1
    page = report.files[0].read_text()
    assert all(item.folder in page for item in report.unusable) and "version 99" in page


def test_without_results_it_is_said_what_to_run(told: Told) -> None:
    with pytest.raises(ProbeError, match="featprobe probe --task semseg"):
        told.compare()
    row = told.tell(confusions(0.5))
    shutil.rmtree(told.probes / row["folder"])
    with pytest.raises(ProbeError, match=r"None of the results .* can be compared") as caught:
        told.compare()
    assert row["folder"] in str(caught.value)


def test_of_several_recipes_the_best_on_validation_is_paired(told: Told) -> None:
    told.tell(confusions(0.9), curve=(0.1, 0.2), backbone="a", recipe_key="weak")
    told.tell(confusions(0.5), curve=(0.1, 0.4), backbone="a", recipe_key="strong")
    told.tell(confusions(0.6), curve=(0.1, 0.3), backbone="b", feature_key="b")
    report = told.compare()
    (difference,) = report.sets[0].differences
    assert difference["difference"] < 0
    assert {line["recipe_key"]: line["chosen"] for line in report.sets[0].lines if line["backbone"] == "a"} == {
        "weak": False, "strong": True,
    }  # fmt: skip
    assert any("best on validation" in note for note in report.notes)


def test_backbones_meet_at_one_input_size_and_where_there_is_none_it_is_marked(told: Told) -> None:
    told.tell(confusions(0.9), curve=(0.1, 0.9), backbone="a", feature_key="large", features={"size": [128, 128]})
    told.tell(confusions(0.3), curve=(0.1, 0.2), backbone="a", feature_key="small", features={"size": [64, 64]})
    told.tell(confusions(0.6), curve=(0.1, 0.3), backbone="b", feature_key="b", features={"size": [64, 64]})
    (difference,) = told.compare().sets[0].differences
    assert difference["difference"] < 0 and difference["scale_a"] == difference["scale_b"] == "64x64"
    told.tell(confusions(0.5), curve=(0.1, 0.3), backbone="c", feature_key="c", features={"size": [32, 32]})
    report = told.compare()
    marks = {frozenset((d["a"], d["b"])): comparison.marks_of(d) for d in report.sets[0].differences}
    assert [pair for pair, own in marks.items() if "another input size" in own] == [
        pair for pair in marks if "c" in pair
    ]
    ((_, sentences),) = report.answer
    assert any("at another input size" in sentence for sentence in sentences)


# ---- marks and words -------------------------------------------------------------------------------------------------


def test_curves_that_still_rise_are_marked_and_others_not(told: Told) -> None:
    told.tell(confusions(0.5), curve=RISING, backbone="a")
    told.tell(confusions(0.5), curve=FLAT, backbone="b", feature_key="b")
    lines = {line["backbone"]: line for line in told.compare().sets[0].lines}
    assert lines["a"]["not_converged"] and not lines["b"]["not_converged"]
    assert "not converged" in comparison.marks_of(lines["a"])
    assert [lines["b"][f"iterations_{share}"] for share in (90, 95, 99)] == [30, 30, 40]
    assert lines["a"]["late_rise"] == pytest.approx(0.1)


def test_a_late_rise_is_read_from_the_points_there_are() -> None:
    assert late_rise(Curve((50, 100), (0.2, 0.3))) == pytest.approx(0.04)  # 0.26 at 80
    assert not still_rising(Curve((40, 80, 100), (0.2, 0.3, 0.309))) and still_rising(Curve((80, 100), (0.3, 0.311)))
    for curve in (Curve((), ()), Curve((5,), (0.5,)), Curve((90, 100), (0.1, 0.9))):
        assert np.isnan(late_rise(curve)) and not still_rising(curve)


@pytest.mark.parametrize(
    ("beside", "marked"), [([], True), ([ONLINE], False), ([PLAIN], False), ([{**ONLINE, "augmentation": None}], True)]
)
def test_full_minus_frozen_is_confounded_unless_augmentation_is_told_apart(
    told: Told, beside: list[dict[str, Any]], marked: bool
) -> None:
    for row in ({}, FULL, *beside):
        told.tell(confusions(0.5), **row)
    found = {(d["a"], d["b"]): d["confounded"] for d in told.compare().sets[0].differences}
    assert found.pop(("full", "frozen")) is marked
    assert not any(found.values())


def test_frozen_features_of_stored_views_are_a_variant_and_tell_augmentation_apart(told: Told) -> None:
    stored = {"augmentation": {"views": ["hflip"]}, "feature_key": "views", "recipe_key": "v0000000"}
    for row in ({}, FULL, stored):
        told.tell(confusions(0.5), **row)
    report = told.compare()
    found = {(d["a"], d["b"]): d["confounded"] for d in report.sets[0].differences}
    stored_name = "frozen, augmented"
    assert found == {("full", "frozen"): False, ("full", stored_name): False, (stored_name, "frozen"): False}
    said = " ".join(sentence for _, sentences in report.answer for sentence in sentences)
    assert "fine-tuning" in said and "against frozen features of augmented views" in said


def test_stored_views_are_named_where_they_were_trained_on(told: Told) -> None:
    cached = {"features": {"views": ["identity", "hflip", "crop:2"], "tile": 32, "overlap": 4, "empty_tiles": 1.0}}
    told.tell(confusions(0.5), augmentation={"views": ["hflip", "crop:2"]}, **cached)
    told.tell(confusions(0.6), **FULL, **cached)
    sizes = {line["regime"]: line["size"] for line in told.compare().sets[0].lines}
    assert sizes == {"frozen, augmented": "64x64 from tiles of 32, overlap 4, hflip, crop:2",
                     "full": "64x64 from tiles of 32, overlap 4"}  # fmt: skip


def test_long_labels_leave_the_plots_their_room() -> None:
    labels = [f"backbone{i}, frozen, augmented, 512x512 from tiles of 512, overlap 64, hflip, vflip" for i in range(8)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a layout that finds no room
        drawn = dot_plot([Dot(label, 5.0, 0.0, 10.0, label) for label in labels], "x", "dots")
        lines = line_plot([Series(label, [1, 2], [3, 4]) for label in labels], "x", "y", "lines")
    for i in range(8):
        assert f"backbone{i}" in drawn and f"backbone{i}" in lines


def test_few_groups_are_warned_of(told: Told) -> None:
    assert comparison.FEW_GROUPS == FEW_GROUPS
    told.tell(confusions(0.5), backbone="many")
    told.tell(confusions(0.5, images=10), backbone="few", data_fingerprint="few", feature_key="few")
    report = told.compare()
    marks = {line["backbone"]: comparison.marks_of(line) for one in report.sets for line in one.lines}
    assert marks == {"many": [], "few": ["few groups (5)"]}
    assert sum("5 test groups" in note for note in report.notes) == 1
    assert ["take it as a hint" in " ".join(said) for _, said in report.answer].count(True) == 1


@pytest.mark.parametrize(
    ("full", "spread", "said"),
    [
        (0.8, 0.05, "frozen is not enough"),
        (0.2, 0.05, "loses"),
        (0.515, 0.004, "gains less than 2 points"),
        (0.5, 0.005, "no difference beyond 2 points"),
        (0.53, 0.4, "do not tell"),
    ],
)
def test_the_answer_says_what_the_interval_says(told: Told, full: float, spread: float, said: str) -> None:
    told.tell(confusions(0.5, 0, spread=spread))
    told.tell(confusions(full, 0 if spread == 0.004 else 5, spread=spread), **FULL)
    ((_, sentences),) = told.compare().answer
    assert said in " ".join(sentences), sentences
    assert "augmentation" in " ".join(sentences)


def test_the_answer_names_the_best_backbone_and_whom_it_can_not_be_told_from(told: Told) -> None:
    for name, hit, seed in (("a", 0.7, 0), ("b", 0.3, 1), ("c", 0.7, 2)):
        told.tell(confusions(hit, seed), backbone=name, feature_key=name)
    ((_, sentences),) = told.compare().answer
    assert re.search(r"(a|c) scores highest.*ahead of b \(.*beyond chance; not to be told from (a|c)", sentences[0])
    assert "needs a frozen and a full result" in sentences[1]


def test_a_lead_that_is_sure_alone_but_not_among_many_is_only_perhaps_one(told: Told) -> None:
    told.tell(confusions(0.53, 3, spread=0.03), backbone="a", feature_key="a")
    for i, name in enumerate("bcdefg"):
        told.tell(confusions(0.5, i + 4, spread=0.03), backbone=name, feature_key=name)
    report = told.compare()
    among = [d for d in report.sets[0].differences if "a" in (d["a"], d["b"])]
    wanted = sum(d["p"] <= 0.05 < d["p_holm"] for d in among)
    said = re.search(r"perhaps ahead of (.*), not surely", report.answer[0][1][0])
    assert wanted and said and said[1].count("points") == wanted


def test_one_group_and_classes_that_are_nowhere_have_no_interval(told: Told) -> None:
    none = np.tile(np.array([[100, 0], [0, 0]]), (6, 1, 1))
    told.tell(none, backbone="a", feature_key="a", data_fingerprint="none")
    told.tell(none, backbone="b", feature_key="b", data_fingerprint="none", **FULL)
    told.tell(confusions(0.5, images=6), groups=["g"] * 6, data_fingerprint="one")
    report = told.compare()
    said = " ".join(sentence for _, sentences in report.answer for sentence in sentences)
    assert "no fg mIoU exists" in said and "no interval: one test group" in said and "nan" not in said
    page = report.files[0].read_text()
    assert not re.search(r">[^<]*\bnan\b[^<]*<", page)


def test_where_nothing_was_found_nothing_is_told(told: Told) -> None:
    told.tell(confusions(0.0, spread=0.0), backbone="a")
    told.tell(confusions(0.0, spread=0.0), backbone="b", feature_key="b")
    ((_, sentences),) = told.compare().answer
    assert "0 throughout" in sentences[0]
    assert answer_of(*[getattr(told.compare().sets[0], part) for part in ("lines", "differences")]) == sentences


def test_label_efficiency_is_drawn_where_there_are_several_fractions(told: Told) -> None:
    for fraction, hit in ((0.1, 0.3), (1, 0.6), (0.3, 0.5)):
        told.tell(confusions(hit), fraction=fraction, recipe_key=f"k{fraction}")
    told.tell(confusions(0.4), backbone="once")
    report = told.compare()
    (series,) = efficiency_of(report.sets[0].lines, "miou_foreground")
    assert list(series.x) == [0.1, 0.3, 1] and series.y == sorted(series.y)
    assert "Label efficiency" in report.files[0].read_text()


# ---- the page --------------------------------------------------------------------------------------------------------


class Parsed(HTMLParser):
    """The tags of a page, whether they close, and the addresses that it names."""

    VOID = frozenset({"meta", "link", "img", "br", "use"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [str(value) for name, value in attrs if name == "id"]
        self.addresses += [str(v) for name, v in attrs if name in ("src", "href", "xlink:href", "srcset", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


HOSTILE = "<script>alert('&\"$x_1$')</script>"


@pytest.fixture
def rich(told: Told) -> Told:
    """Results of two backbones, several regimes and fractions, hostile names, a picture sheet."""
    classes = ["background", HOSTILE]
    for name, hit in (("convnext_dinov3", 0.6), (HOSTILE, 0.5)):
        told.tell(confusions(hit), classes=classes, backbone=name, feature_key=name)
        told.tell(confusions(hit - 0.2), classes=classes, backbone=name, feature_key=name, fraction=0.1, recipe_key="t")
    row = told.tell(confusions(0.7), RISING, classes=classes, backbone="convnext_dinov3", **FULL)
    Image.new("RGB", (40, 30), "red").save(told.probes / row["folder"] / "sheet.png")
    truth, found = objects(0.8)
    told.tell_objects(truth, found)
    return told


def test_the_page_holds_all_it_shows_and_escapes_every_text(rich: Told) -> None:
    report = rich.compare()
    text = report.files[0].read_text(encoding="utf-8")
    page = Parsed(text)
    assert "script" not in page.tags and page.tags.count("svg") >= 5
    assert all(address.startswith(("data:", "#")) for address in page.addresses), page.addresses
    assert not re.search(r"""(src|href|url\()\s*=?\s*["']?https?:""", text)
    assert len(page.ids) == len(set(page.ids))
    assert {f"#{i}" for i in page.ids} >= {address for address in page.addresses if address.startswith("#")}
    assert HOSTILE not in text and "&lt;script&gt;" in text
    (picture,) = [address for address in page.addresses if address.startswith("data:image/png")]
    with Image.open(BytesIO(base64.b64decode(picture.partition(",")[2]))) as sheet:
        assert sheet.size == (40, 30)
    assert "featprobe finetune --task semseg" in text


def test_the_same_results_give_the_same_files(rich: Told, tmp_path: Path) -> None:
    first, second = (rich.compare(out=tmp_path / name).files for name in ("first", "second"))
    assert [file.name for file in first] == ["index.html", "results.csv", "differences.csv", "results.parquet"]
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes()
    table, parquet = pd.read_csv(first[1]), pd.read_parquet(first[3])
    assert list(table.columns) == list(parquet.columns) and len(table) == len(parquet) == 6
    assert table["miou_foreground"].to_numpy() == pytest.approx(
        parquet["miou_foreground"].astype(float).to_numpy(), nan_ok=True
    )


def test_a_report_that_can_not_be_written_is_said(told: Told) -> None:
    told.tell(confusions(0.5))
    (told.probes / "report").write_text("in the way")
    with pytest.raises(FeatprobeError, match="can't be written"):
        told.compare()


CHROMIUM = shutil.which("chromium")
OWN = ("google.com", "googleapis.com", "gvt1.com")  # hosts that the browser asks for itself


def opened(page: Path, folder: Path) -> tuple[list[str], list[str]]:
    """(what a browser says of a page on its console, the hosts that the page asked for)."""
    log = folder / "net.json"
    quiet = "--headless --no-sandbox --disable-gpu --no-first-run --enable-logging=stderr --disable-component-update"
    more = [f"--user-data-dir={folder / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND", f"--log-net-log={log}"]
    command = [str(CHROMIUM), *quiet.split(), "--disable-background-networking", *more, "--dump-dom", page.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    console = [line for line in result.stderr.splitlines() if ":CONSOLE:" in line]
    urls = [str((event.get("params") or {}).get("url", "")) for event in json.loads(log.read_text())["events"]]
    hosts = {urlsplit(url).hostname or "" for url in urls if url.startswith(("http", "ws"))}
    return console, sorted(host for host in hosts if not host.endswith(OWN))


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here to open the page with")
def test_a_browser_opens_the_page_without_a_word_or_a_request(rich: Told, tmp_path: Path) -> None:
    page = rich.compare().files[0]
    assert opened(page, tmp_path) == ([], [])
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    page.write_text(text)  # nothing hides behind what the policy forbids
    assert opened(page, tmp_path) == ([], [])
    page.write_text(text.replace("<h1>", '<script>console.error("x")</script><img src="http://away.test/a.png"><h1>'))
    console, hosts = opened(page, tmp_path)
    assert console and hosts == ["away.test"], "the check sees neither errors nor requests"


# ---- the command -----------------------------------------------------------------------------------------------------


def call(root: Path, *arguments: str) -> Any:
    return CliRunner().invoke(cli, ["--workspace", str(root), *arguments], prog_name="featprobe")


def test_real_results_of_every_task_are_compared_by_the_command(real: Path, tmp_path: Path) -> None:
    shown = call(real, "compare", "--out", str(tmp_path))
    assert shown.exit_code == 0, shown.output
    for said in ("surface, detect", "surface, instseg", "surface, semseg", "fg mIoU", f"report: {tmp_path}/index.html"):
        assert said in shown.stdout
    value = json.loads(call(real, "compare", "--out", str(tmp_path), "--json").stdout)
    assert [one["lines"][0]["task"] for one in value["sets"]] == ["detect", "instseg", "semseg"]
    assert value["unusable"] == [] and len(value["files"]) == 4
    assert Parsed((tmp_path / "index.html").read_text()).addresses.count("data:,") == 1


def test_wrong_calls_are_answered_in_one_paragraph(tmp_path: Path, real: Path) -> None:
    empty = call(tmp_path, "compare")
    assert empty.exit_code == 1 and empty.stderr.startswith("featprobe: There is no result in") and not empty.stdout
    assert call(real, "compare", "--gap", "a,b").exit_code == 2
    assert "no result of the backbone 'a'" in call(real, "compare", "--gap", "a,b", "--on", "x,y").stderr


def test_the_commands_on_the_page_make_the_same_results_again(real: Path, tmp_path: Path) -> None:
    shutil.copytree(real / "cache", tmp_path / "cache")
    asked = ("--iterations 6 --batch-size 4 --lr 1e-3,5e-3 --weight-decay 0.01 --seeds 2 --fraction 0.5 --loss ce+dice "
             "--split group --absent-classes ignore --levels stride8 --shared-order")  # fmt: skip
    made = call(tmp_path, "probe", "--quiet", *asked.split())
    assert made.exit_code == 0, made.output
    (one,) = compare(Workspace(tmp_path), quiet=True).sets
    extracting, probing = one.commands
    assert shlex.split(extracting)[:2] == ["featprobe", "extract"] and "--size 64x64" in extracting
    again = call(tmp_path, *shlex.split(probing)[1:], "--quiet")
    assert again.exit_code == 0, again.output
    rows = [json.loads(line) for line in (tmp_path / "probes" / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and [row["folder"] for row in rows[:2]] == [row["folder"] for row in rows[2:]]
    assert [row["test"] for row in rows[:2]] == [row["test"] for row in rows[2:]]
    assert len(compare(Workspace(tmp_path), quiet=True).sets[0].lines) == 1
