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
from helpers import PoolingBackbone, no_plots
from helpers import extract as extract_into
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from featprobe.cli.main import cli
from featprobe.errors import FeatprobeError, ProbeError
from featprobe.kinds import TrainRecipe
from featprobe.metrics import (
    ResampledAp,
    average_precision,
    grouped,
    holm,
    iou_scores,
    jackknifed,
    mean_of,
    modality_gap,
    paired_difference,
    pixel_statistic,
    procedure_difference,
    procedure_gap,
    score_interval,
    seed_spread,
)
from featprobe.probes import append_row, plain, save_head
from featprobe.probes.saved import read_card
from featprobe.report import comparison
from featprobe.report.answer import answer_of
from featprobe.report.page import efficiency_of
from featprobe.report.plots import Dot, Series, dot_plot, line_plot
from featprobe.specs import digest
from featprobe.stages.comparison.compare import Comparison, compare
from featprobe.stages.comparison.convergence import Curve, best_so_far, late_rise, still_rising
from featprobe.stages.training.probe import probe
from featprobe.stages.training.probe_options import ProbeOptions
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
        scores = iou_scores(confusions.sum(0), given.get("absent_classes", self.base("semseg")["absent_classes"]))
        iou = dict(zip(given["classes"], scores.per_class, strict=True))
        test = {"miou": scores.miou, "miou_foreground": scores.miou_foreground, "iou": iou}
        stream = BytesIO()
        kept = {"ids": np.array(names), "groups": np.array(groups or [f"g{i // 2}" for i in range(len(confusions))])}
        np.savez(stream, confusion=confusions, **kept)
        val = {"miou": curve[-1], "miou_foreground": curve[-1]}
        return self.save({**given, "test": test, "val": val}, curve, {"scores.npz": stream.getvalue()}, "semseg")

    def tell_seeds(self, hit: float, first: int = 0, count: int = 3, spread: float = 0.05, **changed: Any) -> None:
        """Save so many seeds of a result that finds about this share of the scratched pixels."""
        for seed in range(count):
            self.tell(confusions(hit, first + seed, spread=spread), seed=seed, **changed)

    def recipe(self, **changed: Any) -> dict[str, Any]:
        """The training recipe of the real result, changed."""
        return {**self.base("semseg")["recipe"], **changed}

    def said(self, **more: Any) -> str:
        """All sentences of the answer."""
        return "\n".join(sentence for _, sentences in self.compare(**more).answer for sentence in sentences)

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
        card["backbone"] = {**card["backbone"], "source": "random" if row["backbone"].endswith("-random") else "hub"}
        row["folder"] = f"told/{digest([row[k] for k in sorted(row) if k not in ('test', 'folder', 'time')])[:12]}"
        name = "miou_foreground" if task == "semseg" else "box_ap50"
        points = [{"iteration": 10 * (i + 1), "loss": 1.0, "scores": {name: v}} for i, v in enumerate(curve)]
        curves = [{"lr": 1.0, "weight_decay": 0.0, "chosen": chosen, "curve": points} for chosen in (True, False)]
        curves[1]["curve"] = []
        beside = {**files, "curves.json": json.dumps(curves).encode()}
        save_head(self.probes / row["folder"], nn.Linear(1, 1), card | {"result": row}, beside)
        append_row(self.probes / "results.jsonl", row)
        return row

    def compare(self, **more: Any) -> Comparison:
        """The comparison; there are no plots on its page."""
        with no_plots():
            return self.drawn(**more)

    def drawn(self, **more: Any) -> Comparison:
        """The comparison with its whole page."""
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
        how = {"show": 2} if task == "semseg" else {"width": 16}
        probe(workspace, task, options=ProbeOptions(recipe=brief, seeds=1, quiet=True, **how))
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
    return pixel_statistic(array, [f"g{i // 2}" for i in range(len(array))], score)


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
            limits = (wanted.low, wanted.high) if wanted.has_interval else (np.nan, np.nan)  # all was found by "a"
            column = f"box_{name}"
            assert (line[column], line[f"{column}_low"], line[f"{column}_high"]) == pytest.approx(
                (wanted.estimate, *limits), abs=0, rel=0, nan_ok=True
            )
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
    for name in ("old", "wrong"):  # as of an older featprobe, whose cards say nothing of the files beside them
        path = told.probes / rows[name]["folder"] / "card.json"
        card = {key: value for key, value in read_card(path.parent).items() if key != "files"}
        path.write_text(json.dumps(card | {"card_sha256": digest(card)}))
    append_row(told.probes / "results.jsonl", {**rows["other"], "recipe_key": "x"})
    ancient = {k: v for k, v in rows["other"].items() if k != "regime"}
    append_row(told.probes / "results.jsonl", {**ancient, "folder": "ancient"})
    with (told.probes / "results.jsonl").open("a") as stream:
        stream.write('{"version": 99}\n[1]\n{"version": 1, "tor')
    report = told.drawn()
    assert sorted(line["backbone"] for line in report.sets[0].lines) == ["good", "other"]
    reasons = [item.reason for item in report.unusable]
    for said in ("not here any more", "scores.npz is not beside its head", "names no images and groups",
                 "written again since", "gives miou_foreground"):  # fmt: skip
        assert sum(said in reason for reason in reasons) == 1, (said, reasons)
    assert len(reasons) == 5
    for said in ("is torn", "is of version 99", "is not a JSON object", "(ancient): it holds no regime"):
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
    assert lines["a"]["late_rise"] == pytest.approx(0.1)


def test_a_late_rise_is_read_from_the_points_there_are() -> None:
    last_tenth = (1 - 0.9 - np.sin(0.9 * np.pi) / np.pi) / (1 - 0.8 - np.sin(0.8 * np.pi) / np.pi)  # of the last fifth
    assert late_rise(Curve((90, 100), (0.2, 0.3))) != late_rise(Curve((80, 100), (0.2, 0.3))) == pytest.approx(0.1)
    assert late_rise(Curve((70, 90, 100), (0.3, 0.3, 0.4))) == pytest.approx(0.1) and last_tenth < 0.2
    assert not still_rising(Curve((40, 80, 100), (0.2, 0.3, 0.309))) and still_rising(Curve((80, 100), (0.3, 0.311)))
    for curve in (Curve((), ()), Curve((5,), (0.5,)), Curve((90, 100), (0.1, 0.9))):
        assert np.isnan(late_rise(curve)) and not still_rising(curve)


@given(levels=st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_a_late_rise_of_points_by_powers_of_two_lies_within_that_of_the_last_two(levels: list[float]) -> None:
    curve = Curve((125, 250, 500, 1000), tuple(levels))
    rise = levels[3] - levels[2]
    assert late_rise(curve) == pytest.approx(0.071 * rise, abs=2e-4)  # what a cosine leaves from 80 % on
    kept = best_so_far(curve)
    assert late_rise(kept) >= 0 and kept.final == max(levels)


def test_weights_of_the_best_point_are_not_held_to_rise_when_the_end_is_worse(told: Told) -> None:
    curve = (0.1, 0.6, 0.3, 0.3, 0.5)  # ends rising, below its best
    told.tell(confusions(0.5), curve, backbone="end", feature_key="a", weights_from="end of training")
    told.tell(confusions(0.5), curve, backbone="best", feature_key="b", weights_from="best validation")
    lines = {line["backbone"]: line for line in told.compare().sets[0].lines}
    assert lines["end"]["not_converged"] and not lines["best"]["not_converged"]
    assert lines["best"]["curve"]["values"] == list(curve), "the page shows what was measured"


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


def test_the_dtype_is_named_where_results_differ_in_it(told: Told) -> None:
    told.tell(confusions(0.5), backbone="a", feature_key="a16", features={"dtype": "fp16"})
    told.tell(confusions(0.6), backbone="b", feature_key="b16", features={"dtype": "fp16"})
    alike = told.compare()
    assert "dtype" not in comparison.result_table(alike.sets[0].lines)
    told.tell(confusions(0.7), curve=(0.1, 0.9), backbone="a", feature_key="a8", features={"dtype": "int8"})
    report = told.compare()
    table = comparison.result_table(report.sets[0].lines, brief=True)
    assert sorted(zip(table["backbone"], table["dtype"], strict=True)) == [("a", "fp16"), ("a", "int8"), ("b", "fp16")]
    assert "dtype" in comparison.class_table(report.sets[0].lines)
    assert any("input size, dtype or" in note for note in report.notes)
    (difference,) = report.sets[0].differences
    assert "dtype int8 | fp16" in comparison.marks_of(difference)


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
    told.tell(confusions(0.5), backbone="many")
    told.tell(confusions(0.5, images=10), backbone="few", data_fingerprint="few", feature_key="few")
    report = told.compare()
    marks = {line["backbone"]: comparison.marks_of(line) for one in report.sets for line in one.lines}
    assert marks == {"many": ["budget not checked"], "few": ["budget not checked", "few groups (5)"]}
    assert sum("5 test groups" in note for note in report.notes) == 1
    assert ["take it as a hint" in " ".join(said) for _, said in report.answer].count(True) == 1


@pytest.mark.parametrize(
    ("full", "spread", "said"),
    [
        (0.8, 0.05, "gains more than 2 points"),
        (0.2, 0.05, "loses"),
        (0.51, 0.004, "gains less than 2 points"),
        (0.5, 0.005, "no difference beyond 2 points"),
        (0.53, 0.4, "cannot show whether fine-tuning pooling helps"),
    ],
)
def test_the_answer_says_what_the_interval_says(told: Told, full: float, spread: float, said: str) -> None:
    told.tell_seeds(0.5, 0, spread=spread)
    told.tell_seeds(full, 0 if spread == 0.004 else 5, spread=spread, **FULL)
    sentences = told.said()
    assert said in sentences and "augmentation" in sentences, sentences


def test_the_answer_names_the_best_backbone_and_whom_it_can_not_be_told_from(told: Told) -> None:
    for name, hit, seed in (("a", 0.7, 0), ("b", 0.3, 10), ("c", 0.7, 20)):
        told.tell_seeds(hit, seed, backbone=name, feature_key=name)
    ((_, sentences),) = told.compare().answer
    assert re.search(
        r"linear at 4 iterations: (a|c) scores highest.*ahead of b \(.*beyond chance; not distinguishable from (a|c)",
        sentences[0],
    )
    assert "make a full result beside the frozen one: featprobe finetune --task semseg" in sentences[1]


def test_the_answer_asks_for_the_regime_that_lacks(told: Told) -> None:
    told.tell_seeds(0.5, 0, **FULL)
    assert "make a frozen result beside the full one: featprobe probe --task semseg" in told.said()
    told.tell_seeds(0.5, 5, backbone="other", feature_key="other")
    assert "make a frozen and a full result of one backbone: featprobe finetune --task semseg" in told.said()


def test_a_lead_that_is_sure_alone_but_not_among_many_is_said_to_be_so(told: Told) -> None:
    told.tell_seeds(0.514, 0, spread=0.03, backbone="a", feature_key="a")
    for i, name in enumerate("bcdefg"):
        told.tell_seeds(0.5, 3 * i + 3, spread=0.03, backbone=name, feature_key=name)
    report = told.compare()
    among = [d for d in report.sets[0].differences if "a" in (d["a"], d["b"])]
    wanted = sum(d["p"] <= 0.05 < d["p_holm"] for d in among)
    said = re.search(r"ahead of ([^;]*) before, but not after, correction for multiple", report.answer[0][1][0])
    assert wanted and said and said[1].count("points") == wanted


def test_one_group_and_classes_that_are_nowhere_have_no_interval(told: Told) -> None:
    none = np.tile(np.array([[100, 0], [0, 0]]), (6, 1, 1))
    told.tell(none, backbone="a", feature_key="a", data_fingerprint="none")
    told.tell(none, backbone="b", feature_key="b", data_fingerprint="none", **FULL)
    told.tell(confusions(0.5, images=6), groups=["g"] * 6, data_fingerprint="one")
    report = told.drawn()
    said = " ".join(sentence for _, sentences in report.answer for sentence in sentences)
    assert "there is no fg mIoU" in said and "no interval: one test group" in said and "nan" not in said
    page = report.files[0].read_text()
    assert not re.search(r">[^<]*\bnan\b[^<]*<", page)


def test_where_nothing_was_found_nothing_is_told(told: Told) -> None:
    told.tell(confusions(0.0, spread=0.0), backbone="a")
    told.tell(confusions(0.0, spread=0.0), backbone="b", feature_key="b")
    ((_, sentences),) = told.compare().answer
    assert "is 0 for every result" in sentences[0]
    assert answer_of(*[getattr(told.compare().sets[0], part) for part in ("lines", "differences")]) == sentences


def test_label_efficiency_is_drawn_where_there_are_several_fractions(told: Told) -> None:
    for fraction, hit in ((0.1, 0.3), (1, 0.6), (0.3, 0.5)):
        told.tell(confusions(hit), fraction=fraction, recipe_key=f"k{fraction}")
    told.tell(confusions(0.4), backbone="once")
    report = told.drawn()
    (series,) = efficiency_of(report.sets[0].lines, "miou_foreground")
    assert list(series.x) == [0.1, 0.3, 1] and series.y == sorted(series.y)
    assert "Label efficiency" in report.files[0].read_text()


# ---- what may be claimed ---------------------------------------------------------------------------------------------


def test_a_difference_of_several_seeds_is_claimed_of_the_procedures_and_holds_their_spread(told: Told) -> None:
    every = {name: [confusions(hit, 10 * i + s) for s in range(3)]
             for i, (name, hit) in enumerate({"a": 0.6, "b": 0.58, "c": 0.5, "c-random": 0.01}.items())}  # fmt: skip
    for name, arrays in every.items():
        for seed, array in enumerate(arrays):
            told.tell(array, seed=seed, backbone=name, feature_key=name)
    found = {(d["a"], d["b"]): d for d in told.compare().sets[0].differences}
    scores = {name: [statistic(array) for array in arrays] for name, arrays in every.items()}
    for pair in (("a", "b"), ("a", "c-random")):
        pooled = [own for name, own in scores.items() if "-random" not in name or name in pair]
        wanted = procedure_difference(*(scores[name] for name in pair), seed_spread(pooled))
        own = found[pair]
        assert (own["difference"], own["low"], own["high"], own["p"]) == (
            wanted.estimate, wanted.low, wanted.high, wanted.p_value,
        )  # fmt: skip
        assert own["claim"] == "procedures"


def test_equal_procedures_differ_by_nothing(told: Told) -> None:
    for name in "ab":
        for seed in range(2):
            told.tell(confusions(0.5, spread=0), seed=seed, backbone=name, feature_key=name)
    (found,) = told.compare().sets[0].differences
    assert (found["difference"], found["low"], found["high"], found["p"]) == (0, 0, 0, 1)


def test_between_regimes_the_spread_is_that_of_both(told: Told) -> None:
    every = {}
    for i, (name, more) in enumerate(
        {"frozen": {}, "full": FULL, "other": {"backbone": "b", "feature_key": "b"}}.items()
    ):
        every[name] = [confusions(0.5 + 0.1 * i, 10 * i + s, spread=0.05 + 0.1 * i) for s in range(3)]
        for seed, array in enumerate(every[name]):
            told.tell(array, seed=seed, **more)
    scores = {name: [statistic(array) for array in arrays] for name, arrays in every.items()}
    (found,) = [d for d in told.compare().sets[0].differences if d["kind"] == "regimes"]
    wanted = procedure_difference(scores["full"], scores["frozen"], seed_spread([scores["full"], scores["frozen"]]))
    assert (found["difference"], found["p"]) == (wanted.estimate, wanted.p_value)


def test_one_seed_tells_of_two_heads_and_which_seeds_would_tell_more(told: Told) -> None:
    told.tell(confusions(0.7, 0), backbone="a", feature_key="a")
    told.tell(confusions(0.5, 1), backbone="b", feature_key="b")
    told.tell(confusions(0.8, 2), backbone="a", feature_key="a", **FULL)
    report = told.compare()
    sentences = "\n".join(report.answer[0][1])
    assert "beyond chance" not in sentences and "enough" not in sentences
    assert "among the trained heads (seed 0 each), the head on a is ahead of the head on b (" in sentences
    assert "with these two heads (seed 0 each), fine-tuning a gained" in sentences
    assert sentences.count("A verdict needs --seeds 3") == 2
    assert {d["claim"] for d in report.sets[0].differences} == {"heads"}
    assert all("of these heads alone: one seed" in comparison.marks_of(d) for d in report.sets[0].differences)


def test_three_seeds_against_one_are_still_two_groups_of_heads(told: Told) -> None:
    told.tell_seeds(0.7, 0, backbone="a", feature_key="a")
    told.tell(confusions(0.5, 9), backbone="b", feature_key="b")
    (found,) = told.compare().sets[0].differences
    assert found["claim"] == "heads" and found["named"] == "seeds 3 | 1" and found["recipes"] == ""
    assert "(seeds 0, 1, 2 and seed 0)" in told.said()


def test_a_solved_head_needs_one_seed_on_all_images_and_more_on_a_share_that_the_seed_picks(told: Told) -> None:
    ridge = {"head": "ridge", "weights_from": "closed form"}
    told.tell(confusions(0.7, 0), backbone="a", feature_key="a", **ridge)
    told.tell(confusions(0.5, 1), backbone="b", feature_key="b", **ridge)
    share = {**ridge, "fraction": 0.1, "subset": "by seed", "recipe_key": "share"}
    told.tell(confusions(0.6, 2), backbone="a", feature_key="a", **share)
    told.tell(confusions(0.4, 3), backbone="b", feature_key="b", **share)
    report = told.compare()
    claims = {d["fraction"]: d for d in report.sets[0].differences}
    assert claims[1]["claim"] == "procedures" and claims[0.1]["claim"] == "heads"
    wanted = paired_difference(statistic(confusions(0.7, 0)), statistic(confusions(0.5, 1)))
    assert claims[1]["p"] == wanted.p_value
    assert "beyond chance" in report.answer[0][1][0] and "iterations" not in report.answer[0][1][0]
    assert not any("budget" in mark for line in report.sets[0].lines for mark in comparison.marks_of(line))


def test_seeds_in_one_order_give_no_verdict_on_procedures(told: Told) -> None:
    for i, name in enumerate("ab"):
        for seed in range(3):
            more = {"backbone": name, "feature_key": name, "spread": "initialisation"}
            told.tell(confusions(0.7 - 0.2 * i, 9 * i + seed), seed=seed, **more)
    report = told.compare()
    (found,) = report.sets[0].differences
    assert found["claim"] == "heads" and "one order of the images" in found["of_heads"]
    assert "A verdict needs the same seeds without --shared-order" in told.said() and "beyond chance" not in told.said()
    assert any("too narrow" in note for note in report.notes)


@pytest.mark.parametrize("rule", ["by seed", None])
def test_the_same_shares_of_the_images_are_told_from_one_share_for_all(told: Told, rule: str | None) -> None:
    every = {}
    for i, (name, hit) in enumerate({"a": 0.6, "b": 0.5}.items()):
        every[name] = [confusions(hit - 0.1 * s, 10 * i + s) for s in range(3)]  # another seed, other images
        for seed, array in enumerate(every[name]):
            more = {"backbone": name, "feature_key": name, "fraction": 0.1, **({"subset": rule} if rule else {})}
            told.tell(array, seed=seed, **more)
    report = told.compare()
    scores = [[statistic(array) for array in arrays] for arrays in every.values()]
    (found,) = report.sets[0].differences
    if rule:
        wanted = procedure_difference(*scores, seed_spread(scores), same_seeds=True)
        assert (found["low"], found["high"], found["p"]) == (wanted.low, wanted.high, wanted.p_value)
        assert found["p"] < 0.05 < procedure_difference(*scores, seed_spread(scores)).p_value, "what both share cancels"
    assert found["claim"] == ("procedures" if rule else "heads")
    assert any("no other choice of images" in note for note in report.notes) is (rule is None)


def with_stray_pixel(array: NDArray[np.int64]) -> NDArray[np.int64]:
    """One pixel of class 1 is predicted as the last class, which the truth lacks."""
    stray = array.copy()
    stray[0, 1, 1] -= 1
    stray[0, 1, -1] += 1
    return stray


@pytest.mark.parametrize("rule", ["zero", "ignore"])
def test_a_stray_pixel_of_a_class_that_test_lacks_costs_one_pixel(told: Told, rule: str) -> None:
    rng = np.random.default_rng(1)
    array = np.zeros((2 * GROUPS, 5, 5), dtype=np.int64)
    for c in range(4):  # of four classes of defects the test split holds three
        hit = rng.integers(40, 70, 2 * GROUPS)
        array[:, c, c], array[:, c, 0] = array[:, c, c] + hit, array[:, c, 0] + 100 - hit
    classes = ["background", "scratch", "dent", "pore", "crack"]
    same = {"classes": classes, "absent_classes": rule}
    told.tell(array, backbone="a", feature_key="a", **same)
    row = told.tell(with_stray_pixel(array), backbone="b", feature_key="b", **same)
    other = "ignore" if rule == "zero" else "zero"
    told.tell(array, backbone="c", feature_key="c", **{**same, "absent_classes": other})
    report = told.compare()
    (one,) = report.sets
    found = {(d["a"], d["b"]): d["difference"] for d in one.differences}
    assert 0 < found["a", "b"] < 0.0002, "the pixel counts against the class that it was taken from, and no more"
    assert found["a", "c"] == 0
    lines = {line["backbone"]: line for line in one.lines}
    wanted = iou_scores(with_stray_pixel(array).sum(0), "ignore")
    assert lines["b"]["miou_foreground"] == pytest.approx(wanted.miou_foreground, abs=1e-12)
    assert np.isnan(lines["b"]["classes"]["crack"]) and lines["b"]["classes"]["scratch"] > 0
    stated = row["test"]["miou_foreground"] - lines["b"]["miou_foreground"]
    assert (stated < -0.1) is (rule == "zero")
    assert any("holds no crack" in note for note in report.notes)
    assert any("--absent-classes zero" in note for note in report.notes)


def test_1000_iterations_with_12_seeds_against_20_with_one_get_no_verdict_unasked(told: Told) -> None:
    told.tell_seeds(0.7, 0, 12, backbone="a", feature_key="a", recipe=told.recipe(iterations=1000), recipe_key="long")
    short = {"recipe": told.recipe(iterations=20, batch_size=2), "recipe_key": "short"}
    told.tell(confusions(0.4, 20), backbone="b", feature_key="b", **short)
    report = told.compare()
    (found,) = report.sets[0].differences
    assert found["difference"] > 0.2 and found["low"] > 0.1, "it is shown"
    assert found["claim"] == "none" and np.isnan(found["p"]) and np.isnan(found["p_holm"])
    assert found["recipes"] == "iterations 1000 | 20; batch size 4 | 2" and found["named"] == "seeds 12 | 1"
    said = report.answer[0][1][0] + report.answer[0][1][1]
    assert "no verdict on a against b" in said and "iterations 1000 | 20; batch size 4 | 2" in said
    assert "--across-recipes" in said and "ahead" not in said and "beyond chance" not in said
    assert "recipes differ: iterations 1000 | 20; batch size 4 | 2" in comparison.marks_of(found)
    asked = told.drawn(across_recipes=True)
    assert asked.sets[0].differences[0]["claim"] == "heads" and "ahead of the head on b" in asked.answer[0][1][1]
    assert "recipes differ: iterations" in asked.files[0].read_text()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"grid": {"lr": [0.001, 0.01], "weight_decay": []}, "trials": 2}, "lr 0.001,0.01 | 0.002; trials 2 | 1"),
        ({"weights_from": "end of training"}, "weights from end of training | best validation"),
        ({"loss": "ce+dice"}, "loss ce+dice | ce"),
        ({"lr": 0.5, "grid": {"lr": [0.001, 0.5], "weight_decay": []}}, "lr 0.001,0.5 | 0.002"),
        ({"augmentation": {"views": ["hflip"]}}, ""),
        ({"budget": {"rule": "ladder", "needed": 4, "open": False}}, ""),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_differs_in_the_recipe_is_named(told: Told, changed: dict[str, Any], named: str) -> None:
    of_row = {k: v for k, v in changed.items() if k not in ("loss", "lr")}
    loop = {k: v for k, v in changed.items() if k in ("loss", "lr")}
    told.tell(confusions(0.6), backbone="a", feature_key="a", **{"recipe": told.recipe(**loop), **of_row})
    told.tell(confusions(0.5), backbone="b", feature_key="b")
    found = [d["recipes"] for d in told.compare().sets[0].differences]
    assert found == ([named] if "augmentation" not in changed else []), "another variant is another question"


def test_a_rate_that_was_chosen_from_one_grid_is_no_difference(told: Told) -> None:
    for name, chosen in (("a", 0.001), ("b", 0.01)):
        grid = {"grid": {"lr": [0.001, 0.01], "weight_decay": []}, "trials": 2, "recipe": told.recipe(lr=chosen)}
        told.tell(confusions(0.6), backbone=name, feature_key=name, **grid)
    (found,) = told.compare().sets[0].differences
    assert found["recipes"] == found["named"] == ""


def test_what_belongs_to_a_regime_bars_nothing_and_the_rest_does(told: Told) -> None:
    told.tell_seeds(0.5, 0)
    rates = {"grid": {"lr": [0.1, 0.2], "weight_decay": []}, "trials": 2}
    told.tell_seeds(0.7, 5, **{**FULL, **rates})
    (found,) = told.compare().sets[0].differences
    assert found["claim"] == "procedures" and found["recipes"] == "" and found["confounded"]
    assert found["named"] == "lr 0.1,0.2 | 0.002; trials 2 | 1"
    told.tell_seeds(0.6, 9, **{**ONLINE, "recipe": told.recipe(iterations=50)})
    found = {(d["a"], d["b"]): d["recipes"] for d in told.compare().sets[0].differences}
    assert found["frozen-online", "frozen"] == "iterations 50 | 4" and found["full", "frozen"] == ""


def test_results_meet_at_the_recipe_that_most_have(told: Told) -> None:
    told.tell_seeds(0.9, 0, backbone="a", feature_key="a", recipe=told.recipe(iterations=50), recipe_key="alone")
    for i, name in enumerate("abc"):
        told.tell_seeds(0.6 - 0.1 * i, 3 * i, backbone=name, feature_key=name)
    report = told.compare()
    chosen = {(line["backbone"], line["iterations"]): line["chosen"] for line in report.sets[0].lines}
    assert chosen == {("a", 4): True, ("a", 50): False, ("b", 4): True, ("c", 4): True}
    assert {d["recipes"] for d in report.sets[0].differences} == {""}
    assert any("at the recipe and size that most of them have" in note for note in report.notes)


@pytest.mark.parametrize(
    ("frozen", "full", "curve"),
    [(0.003, 0.016, FLAT), (0.003, 0.005, FLAT), (0.55, 0.5, RISING)],
    ids=["floor, and a sure gain", "floor, and no gain", "a loss of what had not converged"],
)
def test_frozen_is_not_said_to_be_enough_where_that_is_not_known(
    told: Told, frozen: float, full: float, curve: Sequence[float]
) -> None:
    for first, hit, more in ((0, frozen, {}), (5, full, {**FULL, "curve": curve})):
        for seed in range(3):
            rng = np.random.default_rng(first + seed)
            found = rng.binomial(10_000, hit, 2 * GROUPS)
            sure = np.tile([90_000, 0], (len(found), 1))
            array = np.stack([sure, np.stack([10_000 - found, found], 1)], 1)
            told.tell(array, seed=seed, **more)
    (found,) = told.compare().sets[0].differences
    assert found["p_holm"] < 0.05
    said = told.said().partition("\n")[2]
    assert "no verdict on fine-tuning" in said and "frozen is" not in said.replace("frozen is not shown", "")
    assert ("had not converged" in said) is (curve is RISING) and ("may have found nothing" in said) is (curve is FLAT)


def test_a_control_with_random_weights_says_whether_frozen_found_something(told: Told) -> None:
    told.tell_seeds(0.2, 0)
    told.tell_seeds(0.5, 5, **FULL)
    control = {"backbone": "pooling-random", "weights_sha256": "r", "feature_key": "r"}
    assert "frozen is not enough for the best score" in told.said(), "no control, and clear of the floor"
    told.tell_seeds(0.2, 10, **control)
    (found,) = [d for d in told.compare().sets[0].differences if d["kind"] == "backbones"]
    assert found["p_holm"] > 0.05
    said = told.said()
    assert "frozen is not enough" in said and "not shown to be ahead of random weights (pooling-random)" in said
    told.tell_seeds(0.2, 20, **FULL)
    assert "frozen cannot be called enough" in told.said(), "of the repeated run the last counts: full is alike"
    told.tell_seeds(0.02, 10, **control)
    assert "there is nothing" not in told.said() and "fine-tuning pooling" in told.said()


def test_a_tenth_of_the_higher_score_is_the_margin_where_that_is_less(told: Told) -> None:
    told.tell_seeds(0.100, 0, spread=0.001)
    told.tell_seeds(0.104, 0, spread=0.001, **FULL)
    assert re.search(r"less than 0\.\d+ points \(a tenth of the higher score\).*frozen is nearly enough", told.said())


def test_p_values_are_corrected_for_all_sentences_of_the_answer(told: Told) -> None:
    for data in "rx":
        for i, backbone in enumerate("ab"):
            more = {"data": data, "data_fingerprint": data, "backbone": backbone, "feature_key": data + backbone}
            told.tell_seeds(0.5 + 0.02 * i, 7 * i, **more)
    report = told.compare()
    every = [*(d for one in report.sets for d in one.differences), *report.gaps]
    assert len(every) == 3
    assert [line["p_holm"] for line in every] == list(holm([line["p"] for line in every]))


def test_it_is_said_where_resamples_are_too_few_for_so_many_differences(told: Told) -> None:
    truth, found = objects(0.8)
    for i in range(11):
        told.tell_objects(truth, found, backbone=f"b{i:02}", feature_key=str(i))
        assert i < 9 or any("none can be sure" in note for note in told.compare().notes) is (i == 10)  # 45, 55 pairs


def test_gaps_are_of_procedures_where_there_are_seeds_and_of_nothing_across_recipes(told: Told) -> None:
    scores: dict[str, list[list[Any]]] = {"r": [], "x": []}
    for i, (data, backbone) in enumerate([(d, b) for d in "rx" for b in "ab"]):
        arrays = [confusions(0.3 + 0.1 * i, 10 * i + s) for s in range(3)]
        scores[data].append([statistic(array) for array in arrays])
        for seed, array in enumerate(arrays):
            more = {"data": data, "data_fingerprint": data, "backbone": backbone, "feature_key": data + backbone}
            told.tell(array, seed=seed, **more)
    (gap,) = told.compare().gaps
    wanted = procedure_gap(*map(tuple, scores.values()), tuple(seed_spread(own) for own in scores.values()))
    assert gap["claim"] == "procedures" and gap["p"] == wanted.p_value
    for seed in range(3):
        more = {"data": "x", "data_fingerprint": "x", "backbone": "b", "feature_key": "xb"}
        told.tell(confusions(0.6, seed), seed=seed, recipe=told.recipe(iterations=9), **more)
    (gap,) = told.compare().gaps
    assert gap["claim"] == "none" and gap["recipes"] == "iterations 4 | 9" and "no verdict" in told.said()


def test_an_interval_to_the_end_of_the_scale_is_none(told: Told) -> None:
    found = np.tile(np.array([[900, 0], [50, 50]]), (2 * GROUPS, 1, 1))
    alone = found.copy()
    alone[0] = [[900, 0], [49, 51]]  # nearly equal: one group alone tells them apart
    told.tell(found, backbone="a", feature_key="a")
    told.tell(alone, backbone="b", feature_key="b")
    report = told.drawn()
    (line,) = report.sets[0].differences
    assert np.isnan(line["low"]) and np.isnan(line["high"])
    assert "no interval" in told.said() and "-100.0" not in report.files[0].read_text()


def ladder(needed: int, iterations: int, is_open: bool = False) -> dict[str, Any]:
    return {"budget": {"rule": "ladder", "needed": needed, "open": is_open}, "recipe_key": f"l{iterations}{is_open}",
            "fraction": 0.1, "subset": "by seed"} | {"iterations": iterations}  # fmt: skip


def test_budgets_that_were_found_are_alike_and_those_too_small_are_marked_with_a_command(told: Told) -> None:
    for i, (name, needed, had, is_open) in enumerate(
        (("a", 100, 100, False), ("b", 400, 400, False), ("c", 400, 400, True))
    ):
        more = ladder(needed, had, is_open)
        told.tell_seeds(
            0.5, 9 * i, backbone=name, feature_key=name, recipe=told.recipe(iterations=more.pop("iterations")), **more
        )
    report = told.compare()
    marks = {line["backbone"]: comparison.marks_of(line) for line in report.sets[0].lines}
    assert marks == {"a": ["needs 400 iterations"], "b": [], "c": ["needs more than 400 iterations"]}
    assert {d["recipes"] for d in report.sets[0].differences} == {""}
    assert all("too few iterations" in comparison.marks_of(d) for d in report.sets[0].differences)
    level, more = (note for note in report.notes if "iterations" in note)
    assert "a, frozen, linear had 100 iterations, and 400 are needed" in level
    assert "--backbone a,b,c" in level and "--iterations auto" in level and "--fraction 0.1" in level
    assert "--backbone a,b,c " in more and "--iterations 800" in more
    line = report.sets[0].lines[1]
    assert [line[f"iterations_{share}"] for share in (90, 95, 99)] == [30, 30, 40], "told where the budget was checked"


def test_a_budget_that_was_found_too_small_gives_no_verdict_on_frozen(told: Told) -> None:
    for more, first in (({}, 0), (FULL, 5)):
        budget = {"rule": "ladder", "needed": 4, "open": not more}
        told.tell_seeds(0.5, first, **more, budget=budget)
    assert (
        "no verdict on fine-tuning pooling" in told.said() and "the frozen result had too few iterations" in told.said()
    )


def test_fixed_budgets_are_marked_and_no_speed_is_read_from_them(told: Told) -> None:
    told.tell(confusions(0.5))
    report = told.compare()
    (line,) = report.sets[0].lines
    assert comparison.marks_of(line) == ["budget not checked"]
    assert [line[f"iterations_{share}"] for share in (90, 95, 99)] == [None, None, None]
    assert "linear at 4 iterations" in told.said()


def test_results_that_are_alike_are_told_apart_by_what_differs_in_their_recipes(told: Told) -> None:
    for count, loss in ((10, "ce"), (20, "ce+dice")):
        recipe = {"recipe": told.recipe(iterations=count, loss=loss), "recipe_key": f"digest{count}"}
        told.tell(confusions(0.5, count), backbone="a", feature_key="a", **recipe)
    told.tell(confusions(0.6), backbone="b", feature_key="b")
    report = told.drawn()
    said = {line["recipe_key"]: line.get("differs") for line in report.sets[0].lines}
    assert said["digest10"] == "iterations 10, loss ce" and said["digest20"] == "iterations 20, loss ce+dice"
    assert [line.get("differs") for line in report.sets[0].lines if line["backbone"] == "b"] == [None]
    text = report.files[0].read_text()
    assert "a, iterations 20, loss ce+dice" in text and "digest" not in text


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
    report = rich.drawn()
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
    first, second = (rich.drawn(out=tmp_path / name).files for name in ("first", "second"))
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


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here to open the page with")
def test_a_browser_opens_the_page_without_a_word_or_a_request(rich: Told, tmp_path: Path) -> None:
    page = rich.drawn().files[0]
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


def test_the_command_gives_verdicts_across_recipes_when_asked_and_files_name_the_claim(told: Told) -> None:
    for i, name in enumerate("ab"):
        told.tell_seeds(0.7 - 0.2 * i, 9 * i, backbone=name, feature_key=name, recipe=told.recipe(iterations=9 + i))
    root, probes = told.workspace.root, told.probes
    plain_ = call(root, "compare", "--quiet")
    assert plain_.exit_code == 0 and "no verdict on a against b" in plain_.stdout and "none" in plain_.stdout
    asked = call(root, "compare", "--quiet", "--across-recipes")
    assert asked.exit_code == 0 and "a scores highest" in asked.stdout and "beyond chance" in asked.stdout
    table = pd.read_csv(probes / "report" / "differences.csv")
    assert table[["claim", "recipes"]].to_numpy().tolist() == [["procedures", "iterations 9 | 10"]]
    value = json.loads(call(root, "compare", "--json").stdout)
    assert value["sets"][0]["differences"][0]["p"] is None and value["sets"][0]["differences"][0]["claim"] == "none"


def test_wrong_calls_are_answered_in_one_paragraph(tmp_path: Path, real: Path) -> None:
    empty = call(tmp_path, "compare")
    assert empty.exit_code == 1 and empty.stderr.startswith("featprobe: There is no result in") and not empty.stdout
    assert call(real, "compare", "--gap", "a,b").exit_code == 2
    assert "no result of the backbone 'a'" in call(real, "compare", "--gap", "a,b", "--on", "x,y").stderr


def test_the_commands_on_the_page_make_the_same_results_again(real: Path, tmp_path: Path) -> None:
    shutil.copytree(real / "cache", tmp_path / "cache")
    asked = ("--iterations 6 --batch-size 4 --lr 1e-3,5e-3 --weight-decay 0.01 --seeds 2 --fraction 0.5 --loss ce+dice "
             "--split group --absent-classes zero --levels stride8 --shared-order")  # fmt: skip
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
