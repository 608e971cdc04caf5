"""Results of image labels and of anomalies: what lies beside their heads, tables, words, supervised against not."""

import io
import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import no_plots, stored_rows, words_of
from numpy.typing import NDArray
from torch import nn

from featprobe.cli.main import cli
from featprobe.metrics import (
    PixelCounter,
    ScoredAnomalies,
    ScoredImages,
    anomaly_scores,
    anomaly_statistic,
    decide,
    histograms,
    image_scores,
    image_statistic,
    mean_of,
    paired_difference,
    procedure_difference,
    score_interval,
    seed_spread,
)
from featprobe.probes import append_row, plain, save_head
from featprobe.probes.saved import read_card
from featprobe.report.answer import answer_of
from featprobe.report.tables import result_text
from featprobe.result_rows import ResultRow
from featprobe.specs import digest
from featprobe.stages.comparison import compare as comparing
from featprobe.stages.comparison.compare import Comparison, compare, plain_json
from featprobe.stages.workspace import Workspace

STORED = Path(__file__).parents[2] / "golden" / "stored" / "probes"
UNITS, GROUPS = 96, 24
NAMES = ("good", "defect")
SETTINGS = {"unit": "image", "false_calls": 0.05}


def is_good(units: int = UNITS) -> NDArray[np.bool_]:
    """Two good units, then two with a defect, and so on."""
    return np.arange(units) // 2 % 2 == 0


def names_of(units: int = UNITS, first: int = 0) -> dict[str, tuple[str, ...]]:
    numbers = range(first, first + units)
    return {"ids": tuple(f"u{i:03}" for i in numbers), "groups": tuple(f"g{i * GROUPS // UNITS:02}" for i in numbers)}


def labelled(seed: int = 0, lift: float = 1.0, first: int = 0, units: int = UNITS, threshold: float = 0.6) -> Any:
    """What a classification head says that finds defects the surer the higher the lift."""
    good = is_good(units)
    logits = np.random.default_rng(seed).normal(0, 1, units) + lift * np.where(good, -1, 1)
    shares = np.stack([1 / (1 + np.exp(logits)), 1 / (1 + np.exp(-logits))], axis=1).astype(np.float32)
    truth = np.stack([good, ~good], axis=1).astype(np.uint8)
    decided = decide(shares, np.array([0.5, 0.5]), multi=False)
    return ScoredImages(**names_of(units, first), probabilities=shares, truth=truth, decided=decided,
                        thresholds=np.full(units, threshold), good=0)  # fmt: skip


def watched(seed: int = 0, lift: float = 1.0, *, pixels: bool = True, units: int = UNITS, **more: Any) -> Any:
    """The same of an anomaly head, with maps of 4 x 4 pixels, of which the corner is the defect."""
    rng, good = np.random.default_rng(seed), is_good(units)
    scores = rng.normal(0, 1, units) + lift * np.where(good, -1, 1)
    counter = PixelCounter()
    for unit in range(units):
        defect = np.zeros((4, 4), bool)
        defect[:2, :2] = not good[unit]
        counter.add(unit, (rng.normal(0, 1, (4, 4)) + lift * defect).astype(np.float32), defect)
    found = histograms(range(units), counter.units.items()) if pixels else None
    return ScoredAnomalies(**names_of(units), scores=scores, good=good, thresholds=np.full(units, 0.5),
                           pixels=found, **more)  # fmt: skip


class Told:
    """A workspace with made-up results: a stored head that was solved, with other scores."""

    def __init__(self, root: Path) -> None:
        self.workspace = Workspace(root)
        self.row = next(own for own in stored_rows() if own["head"] == "ridge" and own["fraction"] == 1)

    def tell(self, found: Any, head: str, file: bytes | None = None, **changed: Any) -> dict[str, Any]:
        """Save a result of one seed with what a head found; returns its row. file: instead of its scores.npz."""
        images = isinstance(found, ScoredImages)
        task, main = ("classify", "auroc") if images else ("anomaly", "image_auroc")
        asked = {"labels": "defect"} if images else {}
        test = image_scores(found, changed.get("classes", NAMES)) if images else anomaly_scores(found)
        given = {
            "task": task, "head": head, "classes": list(NAMES), "test": test, "val": {main: test[main]},
            "settings": {**SETTINGS, **asked}, "split": "own", "fold": None, "train_counts": None, "asked": None,
            "absent_classes": "ignore", "chosen_by": main,
        }  # fmt: skip
        row = plain({**{k: v for k, v in self.row.items() if k != "ridge"}, **given, **changed})
        row["images"] = {"train": 5, "val": 4, "test": len(found.ids)}
        told = {k: v for k, v in row.items() if k not in ("test", "folder", "time")}
        row["folder"] = f"told/{digest(told)[:12]}/seed{row['seed']}"
        card = read_card(STORED / self.row["folder"])
        card["head"] = {"task": task, "kind": head, "classes": list(NAMES)}
        curves = json.dumps([{"chosen": True, "curve": []}]).encode()
        beside = {"scores.npz": found.to_npz() if file is None else file, "curves.json": curves}
        probes = self.workspace.probes
        save_head(probes / row["folder"], nn.Linear(1, 1), card | {"result": row}, beside)
        append_row(probes / "results.jsonl", row)
        return row

    def compare(self, **more: Any) -> Comparison:
        """The comparison; there are no plots on its page."""
        with no_plots():
            return self.drawn(**more)

    def drawn(self, **more: Any) -> Comparison:
        """The comparison with its whole page."""
        return compare(self.workspace, quiet=True, **more)

    def said(self) -> str:
        return "\n".join(text for _, sentences in self.compare().answer for text in sentences)


@pytest.fixture
def told(tmp_path: Path) -> Told:
    return Told(tmp_path)


def test_the_numbers_of_a_line_are_those_of_the_metrics(told: Told) -> None:
    images, maps = labelled(), watched()
    told.tell(images, "linear")
    told.tell(maps, "gaussian")
    lines = {item.lines[0]["task"]: item.lines[0] for item in told.compare().sets}
    for found, task, of, resamples in (
        (images, "classify", image_statistic, 10_000), (maps, "anomaly", anomaly_statistic, 1_000),
    ):  # fmt: skip
        for name in (name for name in lines[task] if f"{name}_low" in lines[task]):
            interval = score_interval(of(found, name), resamples=resamples)
            assert lines[task][name] == interval.estimate
            ends = (interval.low, interval.high) if interval.has_interval else (np.nan, np.nan)
            assert (lines[task][f"{name}_low"], lines[task][f"{name}_high"]) == pytest.approx(ends, nan_ok=True)
    assert lines["classify"]["classes"] == image_scores(images, NAMES)["per_class"]
    assert lines["anomaly"]["classes"] == {} and lines["anomaly"]["groups"] == GROUPS


def test_backbones_are_told_apart_by_image_auroc(told: Told) -> None:
    for seed, (name, lift) in enumerate((("strong", 1.0), ("weak", 0.2))):
        told.tell(labelled(seed, lift), "linear", backbone=name, feature_key=name)
        told.tell(watched(seed, lift), "gaussian", backbone=name, feature_key=name)
    said = told.said()
    assert "frozen, linear: strong scores highest" in said and "% AUROC" in said
    assert "frozen, gaussian: strong scores highest" in said and "% image AUROC" in said
    assert said.count("ahead of weak (") == 2 and said.count("beyond chance") == 2


def test_page_and_terminal_speak_of_labels_and_of_nothing_that_is_not_there(told: Told) -> None:
    told.tell(labelled(), "linear")
    page = words_of(told.drawn().files[0])
    assert "50 % is chance" in page and "Classes, mean over seeds" in page and "labels: defect" in page
    others = page[page.index("Other scores, with 95 % intervals") : page.index("Training and cost")]
    assert "<th>false calls</th>" in others, "recall is nothing without them"
    assert re.search(r"<td>\d+\.\d \(\d+\.\d to \d+\.\d\)</td>", others)
    for word in ("IoU", "AP50", "anomaly", "AUPRO"):
        assert word not in page
    told.tell(watched(pixels=False), "gaussian")
    text = CliRunner().invoke(cli, ["--workspace", str(told.workspace.root), "compare"], env={"COLUMNS": "400"})
    assert text.exit_code == 0, text.output
    assert "image F1" in text.output and "AUPRO" not in text.output and "pixel AUROC" not in text.output
    stored = (told.workspace.probes / "results.jsonl").read_text().splitlines()
    rows = [ResultRow.from_json(json.loads(line)) for line in stored]
    tables = result_text(rows)
    assert "AUROC defect" in tables and "false calls" in tables and "AUPRO" not in tables
    assert "AUROC good" not in tables, "the same figure as that of defect"
    assert "labels: defect" in tables


def test_a_page_of_anomalies_with_masks_has_their_scores_and_no_table_of_classes(told: Told) -> None:
    told.tell(watched(), "gaussian")
    page = told.drawn().files[0].read_text()
    assert "AUPRO" in page and "pixel AUROC" in page and "Classes, mean" not in page


def test_other_coresets_bar_a_verdict_and_other_rates_of_false_calls_are_named(told: Told) -> None:
    for name, coreset, rate in (("a", 0.01, 0.05), ("b", 0.1, 0.01)):
        asked = {**SETTINGS, "false_calls": rate, "coreset": coreset, "remove_position": coreset == 0.1}
        told.tell(watched(), "patchcore", backbone=name, feature_key=name, settings=asked)
    (found,) = told.compare().sets[0].differences
    assert found["claim"] == "none" and found["recipes"] == "coreset 0.01 | 0.1; position removed False | True"
    assert found["named"] == "false calls 0.05 | 0.01"
    lines = {line["backbone"]: line["settings"] for line in told.compare().sets[0].lines}
    assert lines == {"a": "", "b": "false calls 0.01, coreset 0.1, position removed"}
    assert any("--coreset 0.1 --remove-position" in command for command in told.compare().sets[0].commands)


def test_results_with_other_labels_stand_in_tables_of_their_own(told: Told) -> None:
    told.tell(labelled(), "linear")
    told.tell(labelled(), "linear", settings={**SETTINGS, "labels": "own"})
    own, defect = sorted((item.title for item in told.compare().sets), key=len)
    assert defect == f"{own}, labels: defect"


def test_one_label_that_images_have_or_not_is_enough(told: Told) -> None:
    whole = labelled()
    one = {name: getattr(whole, name)[:, 1:] for name in ("probabilities", "truth", "decided")}
    found = replace(whole, **one, multi=True, good=None)
    settings = {**SETTINGS, "labels": "classes"}
    told.tell(found, "linear", classes=["dent"], settings=settings)
    (line,) = told.compare().sets[0].lines
    assert line["classes"] == {"dent": line["auroc"]} and line["auroc"] == image_scores(whole, NAMES)["auroc"]


# ---- what is refused -------------------------------------------------------------------------------------------------


def npz(found: Any, drop: str = "", **changed: Any) -> bytes:
    """scores.npz with some arrays changed."""
    with np.load(io.BytesIO(found.to_npz()), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files if name != drop} | changed
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def zipped(array: bytes, packing: int = zipfile.ZIP_DEFLATED) -> bytes:
    """scores.npz whose probabilities are these bytes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", packing) as archive:
        archive.writestr("probabilities.npy", array)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("found", "file", "said"),
    [
        (labelled, lambda own: zipped(b"\x93NUMPY\x01\x00\x01\x00("), "header can't be read"),
        (labelled, lambda own: zipped(b"\x93NUMPY\x02\x00" + bytes([0, 0, 0, 2]) + bytes(1 << 25)), "version 1.0"),
        (labelled, lambda own: zipped(bytes(100), zipfile.ZIP_LZMA), "in another way"),
        (labelled, lambda own: labelled(lift=0.2).to_npz(), "gives auroc"),
        (labelled, lambda own: npz(own, threshold=np.float64(0.99)), "gives recall"),
        (labelled, lambda own: npz(own, drop="truth"), "KeyError"),
        (labelled, lambda own: npz(own, ids=np.array(["one"])), "of different units"),
        (labelled, lambda own: npz(own, truth=np.full((UNITS, 2), 255, np.uint8)), "not all 0 or 1"),
        (labelled, lambda own: npz(own, probabilities=np.full((UNITS, 2), np.nan)), "finite"),
        (labelled, lambda own: npz(own, good=np.int64(5)), "no label 5"),
        (watched, lambda own: watched(lift=0.2).to_npz(), "gives image_auroc"),
        (watched, lambda own: npz(own, normal=own.pixels.normal[:, ::-1]), "gives pixel_auroc"),
        (watched, lambda own: npz(own, overlap=2 * own.pixels.overlap), "do not add up"),
        (watched, lambda own: npz(own, threshold=np.float64(9)), "gives image_f1"),
        (watched, lambda own: npz(own, good=np.full(UNITS, 255, np.uint8)), "not all 0 or 1"),
        (watched, lambda own: npz(own, edges=own.pixels.edges[:1]), "do not fit together"),
        (watched, lambda own: b"no archive", "BadZipFile"),
    ],
)
def test_a_row_that_its_file_does_not_bear_out_is_not_used(
    told: Told,
    found: Callable[[], Any],
    file: Callable[[Any], bytes],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No interval is looked at: few resamples will do."""
    monkeypatch.setattr(
        comparing, "score_interval", lambda statistic, resamples: score_interval(statistic, resamples=9)
    )
    told.tell(found(), "linear" if found is labelled else "gaussian", backbone="sound")
    told.tell(found(), "linear" if found is labelled else "gaussian", file=file(found()), backbone="other")
    report = told.compare()
    assert [line["backbone"] for item in report.sets for line in item.lines] == ["sound"]
    (unusable,) = report.unusable
    assert said in unusable.reason and "featprobe probe --task" in unusable.reason


def test_a_file_with_more_labels_than_its_row_is_not_used(told: Told) -> None:
    told.tell(labelled(), "linear", backbone="sound")
    three = replace(
        labelled(),
        **{
            name: np.hstack([getattr(labelled(), name), np.zeros((UNITS, 1))]).astype(kind)
            for name, kind in (("probabilities", np.float32), ("truth", np.uint8), ("decided", np.uint8))
        },
    )
    told.tell(labelled(), "linear", file=three.to_npz(), backbone="other")
    assert "3 labels, its row 2" in told.compare().unusable[0].reason


# ---- folds -----------------------------------------------------------------------------------------------------------


def test_folds_are_one_test_set_with_the_threshold_of_each(told: Told) -> None:
    half = UNITS // 2
    parts = [labelled(7, first=half * fold, units=half, threshold=0.5 + 0.2 * fold) for fold in (0, 1)]
    for fold, part in enumerate(parts, start=1):
        told.tell(part, "linear", split="group:2", fold=fold)
    report = told.compare()
    (line,) = report.sets[0].lines
    whole = image_scores(ScoredImages.joined(parts), NAMES)
    assert line["recall"] == whole["recall"] and line["auroc"] == pytest.approx(whole["auroc"])
    assert line["test_images"] == UNITS
    assert any("AUROC ranks what the heads of all folds found together" in note for note in report.notes)


# ---- good images alone against labels --------------------------------------------------------------------------------


def test_a_head_on_good_images_is_held_against_a_supervised_one_on_the_same_units(told: Told) -> None:
    images, maps = labelled(lift=1.6), watched(lift=0.4)
    told.tell(images, "linear")
    told.tell(labelled(lift=0.2, seed=3), "knn")
    told.tell(maps, "gaussian")
    report = told.drawn()
    (line,) = report.behind
    lead = paired_difference(
        image_statistic(images, "auroc"), anomaly_statistic(maps, "image_auroc"), resamples=1_000
    )  # fmt: skip
    assert (line["behind"], line["low"], line["high"]) == (lead.estimate, lead.low, lead.high) and lead.low > 0
    assert (line["anomaly_head"], line["supervised_head"]) == ("gaussian", "linear"), "the better on validation"
    title, (sentence,) = report.answer[-1]
    assert title == "Good images alone"
    assert f"stands {100 * lead.estimate:.1f} points of image AUROC behind linear, which saw labels too" in sentence
    assert sentence in words_of(report.files[0])
    assert plain_json(report)["behind"][0]["behind"] == lead.estimate


def test_a_frozen_supervised_head_is_taken_before_a_fine_tuned_one(told: Told) -> None:
    """An anomaly head is frozen: a backbone that was trained would say nothing of labels alone."""
    full = {"regime": "full", "tuning": {"augment": True, "precision": "fp32"}}
    told.tell(labelled(lift=1.0), "linear")
    told.tell(labelled(lift=2.5), "linear", **full)
    told.tell(watched(lift=0.4), "gaussian")
    (line,) = told.compare().behind
    assert line["supervised_regime"] == "frozen"


def test_the_better_on_good_images_is_ahead_and_what_is_not_sure_is_said(told: Told) -> None:
    told.tell(labelled(lift=0.2), "linear")
    told.tell(watched(lift=1.5), "gaussian")
    told.tell(labelled(lift=1.0), "linear", backbone="b", feature_key="b")
    told.tell(watched(seed=0, lift=1.0), "gaussian", backbone="b", feature_key="b")
    ahead, level = sorted(told.compare().answer[-1][1], key=lambda text: ", b:" in text)
    assert "points of image AUROC ahead of linear" in ahead and "do not tell" not in ahead
    assert "do not tell it from 0" in level


@pytest.mark.parametrize(
    ("other", "changed"),
    [
        (labelled(first=1), {}),
        (replace(labelled(), groups=tuple(f"g{i % GROUPS}" for i in range(UNITS))), {}),
        (replace(labelled(), truth=labelled().truth[:, ::-1]), {}),
        (labelled(), {"data_fingerprint": "other"}),
        (labelled(), {"split": "group"}),
        (labelled(), {"fraction": 0.5}),
        (labelled(), {"weights_sha256": "other"}),
        (replace(labelled(), good=None), {}),
    ],
)
def test_other_test_units_other_truth_or_another_backbone_give_no_sentence(
    told: Told, other: ScoredImages, changed: dict[str, Any]
) -> None:
    told.tell(other, "linear", **changed)
    told.tell(watched(), "gaussian")
    report = told.compare()
    assert len(report.sets) == 2 and not report.behind and "behind" not in plain_json(report)


# ---- words -----------------------------------------------------------------------------------------------------------


def test_a_head_that_is_solved_frozen_is_held_against_one_that_is_trained_with_its_backbone(told: Told) -> None:
    tuning = {"regime": "full", "augment": True, "backbone_lr": 0.1, "layer_decay": 1.0, "bn": "frozen", "clip": 1.0,
              "accumulate": 1, "ema": 0.0, "precision": "fp32", "init_head": None}  # fmt: skip
    recipe = {**told.row["recipe"], "iterations": 300, "evaluations": 4, "batch_size": 8, "weights_from": "best"}
    live = {"regime": "full", "tuning": tuning, "augmentation": {"smallest": 0.5}, "recipe": recipe}
    told.tell(labelled(0, lift=0.3), "linear")
    for seed in range(3):
        told.tell(labelled(seed, lift=1.2 + 0.05 * seed), "linear", seed=seed, weights_from="best validation", **live)
    report = told.compare()
    (found,) = report.sets[0].differences
    assert found["claim"] == "procedures" and found["p"] < 0.05 and not found["recipes"] and not found["named"]
    said = told.said()
    assert "linear, solved frozen and at 300 iterations fine-tuned: fine-tuning" in said


@pytest.mark.parametrize("looked", [False, True], ids=["given iterations", "iterations found"])
def test_frozen_is_enough_only_where_the_iterations_of_fine_tuning_were_looked_for(told: Told, looked: bool) -> None:
    tuning = {"regime": "full", "augment": True, "backbone_lr": 0.1, "layer_decay": 1.0, "bn": "frozen", "clip": 1.0,
              "accumulate": 1, "ema": 0.0, "precision": "fp32", "init_head": None}  # fmt: skip
    recipe = {**told.row["recipe"], "iterations": 10, "evaluations": 4, "batch_size": 8, "weights_from": "best"}
    live = {"regime": "full", "tuning": tuning, "augmentation": {"smallest": 0.5}, "recipe": recipe}
    live |= {"budget": {"rule": "ladder", "needed": 10, "open": False}} if looked else {}
    told.tell(labelled(0, lift=2.0), "linear")
    for seed in range(3):
        told.tell(labelled(seed, lift=0.4 + 0.05 * seed), "linear", seed=seed, weights_from="best validation", **live)
    (found,) = told.compare().sets[0].differences
    assert found["p_holm"] < 0.05 and found["difference"] < 0
    said = told.said()
    assert ("frozen is enough" in said) is looked
    assert ("nobody has looked if 10 iterations are enough to fine-tune" in said) is not looked


def test_only_the_side_that_seeds_change_adds_to_their_variance() -> None:
    runs = [image_statistic(labelled(seed, lift=1.0), "auroc") for seed in range(3)]
    solved = [image_statistic(labelled(7, lift=1.0), "auroc")]
    spread = seed_spread([runs])
    both, one = (
        procedure_difference(runs, solved, spread, fixed=fixed, resamples=999)
        for fixed in ((False, False), (False, True))
    )
    alone = paired_difference(mean_of(runs), solved[0], resamples=999)
    assert both.high - both.low > one.high - one.low >= alone.high - alone.low


def test_a_frozen_backbone_at_chance_has_found_nothing(told: Told) -> None:
    told.tell(labelled(lift=0.02), "linear")
    report = told.compare()
    (line,) = report.sets[0].lines
    full = {**line, "regime": "full", "auroc": 0.55, "auroc_low": 0.51, "auroc_high": 0.6, "iterations": 300}
    difference = {
        "kind": "regimes", "within": f"{line['backbone']}, linear", "head": "linear", "fraction": 1.0, "a": "full",
        "b": "frozen", "difference": 0.05, "low": -0.01, "high": 0.1, "p": 0.2, "p_holm": 0.2, "claim": "procedures",
        "groups": 24, "iterations_a": 300, "iterations_b": None, "confounded": False, "scale_a": "", "scale_b": "",
        "recipes": "", "of_heads": "", "seeds": "seed 0",
    }  # fmt: skip
    said = "\n".join(answer_of([line, full], [difference]))
    assert "frozen may have found nothing" in said


def test_defects_in_few_groups_are_noted_and_one_group_gives_no_interval(told: Told) -> None:
    good = np.arange(UNITS) >= 4  # the first group alone has defects
    told.tell(replace(watched(), good=good, pixels=None), "gaussian")
    report = told.compare()
    assert any("only 1 test group with a defect" in note for note in report.notes)
    assert np.isnan(report.sets[0].lines[0]["image_auroc_low"])


def test_a_test_split_of_good_images_alone_has_no_auroc_and_says_so(told: Told) -> None:
    found = watched(pixels=False)
    told.tell(replace(found, good=np.ones(UNITS, bool)), "gaussian")
    assert "the test split does not hold both good and defect images, so there is no image AUROC" in told.said()
