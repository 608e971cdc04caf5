"""What a comparison says of heads that have records: in defects and parts first, and nothing new of heads without."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from golden.make_golden import stand_in
from helpers import words_of
from hypothesis import given, settings
from hypothesis import strategies as st
from inspected_space import drawn, keep, rows_of, stored_space, with_about

from featprobe.cli.main import cli
from featprobe.metrics.defects.records import FoundRule
from featprobe.metrics.intervals import draw_weights
from featprobe.report.pod_plot import PodLine, PodPicture
from featprobe.stages.comparison import found
from featprobe.stages.comparison.compare import Comparison, compare, plain_json
from featprobe.stages.comparison.found import _ratio, probability_of
from featprobe.stages.inspection.inspect import inspect_head
from featprobe.stages.workspace import Workspace

KINDS = ("semseg-linear-710d9304", "semseg-linear-full-a15bd6d0")  # frozen and fine-tuned, two seeds each
SMALL = 200  # pixels


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Frozen heads that find what they call, fine-tuned ones that call nothing small; their truth is the same."""
    space = stored_space(tmp_path_factory.mktemp("space"), KINDS)
    stand_in(space.root)
    for row in rows_of(space):
        val, test = drawn(1, "val"), drawn(2, "test")
        if row.regime == "full":
            val, test = val.with_least_area(SMALL), test.with_least_area(SMALL)
        keep(space.probes / row.folder, val, test, classes=("background", "pore"))
    return space


@pytest.fixture(scope="module")
def report(space: Workspace) -> Comparison:
    return compare(space, quiet=True)


def test_the_answer_begins_with_what_the_seed_that_is_best_on_validation_finds(
    space: Workspace, report: Comparison
) -> None:
    (item,), ((_, sentences),) = report.sets, report.answer
    assert [own["regime"] for own in item.findings] == ["frozen", "full"]
    for own in item.findings:
        rows = [row for row in rows_of(space) if row.regime == own["regime"]]
        best = max(rows, key=lambda row: (row.validation or -1.0, -row.seed))
        assert own["folder"] == str(space.probes / best.folder) and own["seed"] == best.seed
        wanted = inspect_head(space, best)
        assert (own["found"], own["defects"]) == (wanted.test.found, wanted.test.defects)
        assert (own["stopped"], own["escaped"]) == (wanted.parts.stopped, wanted.parts.escaped)
    frozen, full = item.findings
    assert sentences[0].startswith(f"embedded finds {frozen['found']} of {frozen['defects']} defects (")
    assert any(f"finds {full['found']} of {full['defects']}" in text for text in sentences)


def test_heads_are_compared_by_the_defects_that_both_were_shown(report: Comparison) -> None:
    (item,) = report.sets
    (line,) = item.found_differences
    frozen, full = item.findings
    assert (line["folder_a"], line["folder_b"]) == (frozen["folder"], full["folder"]) and line["kind"] == "regimes"
    assert line["difference"] == pytest.approx((frozen["found"] - full["found"]) / frozen["defects"])
    assert line["difference"] != 0 and line["p_holm"] == line["p"], "it is the only one"


def test_heads_are_not_compared_by_different_rules_of_what_is_found(space: Workspace) -> None:
    rows = {row.regime: row for row in rows_of(space)}
    one, other = (inspect_head(space, rows[regime]) for regime in ("frozen", "full"))
    strict = replace(other, records=with_about(other.records, rule=FoundRule(0.5)))
    assert found._difference((None, one), (None, other), "regimes")
    assert found._difference((None, one), (None, strict), "regimes") is None
    (note, *_) = found.Findings((), (one, strict), (), ()).notes
    assert "different rules" in note and "IoU at least 0.5" in note and "--rescore --found usual" in note
    assert not any("different rules" in text for text in found.Findings((), (one, other), (), ()).notes)


@settings(max_examples=25)
@given(st.integers(2, 8), st.integers(0, 2**31))
def test_the_share_of_a_resample_and_its_influence_are_those_of_the_groups_drawn(groups: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    trials = rng.integers(1, 9, groups).astype(float)
    hits = rng.integers(0, trials + 1).astype(float)
    statistic = _ratio(hits, trials, tuple(map(str, range(groups))))
    for weights in draw_weights((groups,), 5, seed):
        values = statistic.value(weights)
        drawn_groups = [np.repeat(np.arange(groups), own.astype(int)) for own in weights]
        assert values == pytest.approx([hits[own].sum() / trials[own].sum() for own in drawn_groups])
        influence = statistic.influence(weights)
        assert (weights * influence).sum(1) == pytest.approx(np.zeros(len(weights)), abs=1e-9)
        step = 1e-6
        for group in range(groups):
            more = weights.copy()
            more[:, group] += step
            assert (statistic.value(more) - values) / step == pytest.approx(influence[:, group], abs=1e-4)


def test_the_page_has_the_answer_then_pictures_plots_tables_and_what_to_do_next(report: Comparison) -> None:
    text = words_of(report.files[0])
    order = [
        "embedded finds", "In scores", "trained on", "Cost:", "Worst misses", "Defects found against false calls",
        "Defects found by size", "fg mIoU, 95 % interval", "Probability of detection of", "Defects and parts, at",
        ">Scores<", "Training and cost", "What to do next", "--false-calls 0.", "How to read this",
        "A defect is found by a call with: center covered",
    ]  # fmt: skip
    places = [text.find(part) for part in order]
    assert -1 not in places and places == sorted(places), dict(zip(order, places, strict=True))
    assert re.search(r"<th[^>]*>backbone</th><th[^>]*>fg mIoU</th><th[^>]*>95 %</th>", text)
    assert re.search(r"<th[^>]*>backbone</th><th[^>]*>found</th><th[^>]*>95 %</th>", text)
    head = Path(report.sets[0].findings[0]["folder"]).relative_to(report.files[0].parents[2])
    assert f"featprobe predict {head} new_images --out found" in text, "as it is called in the workspace"
    assert re.search(r"featprobe \d+\.\d+\.\d+, 2 results of \d{4}-\d\d-\d\d", text)


def test_the_same_records_give_the_same_page(space: Workspace, report: Comparison, tmp_path: Path) -> None:
    again = compare(space, tmp_path, quiet=True)
    assert again.files[0].read_bytes() == report.files[0].read_bytes()


def test_json_has_what_heads_find(report: Comparison) -> None:
    (item,) = json.loads(json.dumps(plain_json(report)))["sets"]
    assert [own["found"] for own in item["findings"]] == [own["found"] for own in report.sets[0].findings]
    assert set(item["found_differences"][0]) >= {"folder_a", "folder_b", "difference", "low", "high", "p_holm"}


def test_heads_without_records_keep_the_answer_in_scores_and_are_named(space: Workspace, tmp_path: Path) -> None:
    bare = stored_space(tmp_path / "bare", KINDS, records=False)
    stand_in(bare.root)
    without = compare(bare, quiet=True)
    ((_, said),) = without.answer
    assert not any(" finds " in text for text in said) and not without.sets[0].findings
    (note,) = [note for note in without.notes if "without records" in note]
    assert "embedded, frozen, linear" in note and "and 1 more" in note and "featprobe inspect --rescore" in note
    (item,) = plain_json(without)["sets"]
    assert "findings" not in item and "found_differences" not in item
    text = without.files[0].read_text()
    assert "featprobe inspect --rescore" in text and "In scores" not in text and "Worst misses" not in text
    keep(bare.probes / rows_of(bare)[0].folder, drawn(1, "val"), drawn(2, "test"))
    damaged = bare.probes / rows_of(bare)[0].folder / "defects.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    assert not compare(bare, quiet=True).sets[0].findings, "nor of records that are damaged"


def call(root: Path, *arguments: str) -> Any:
    return CliRunner().invoke(cli, ["--workspace", str(root), *arguments], prog_name="featprobe")


def test_the_command_says_the_same_in_a_terminal(space: Workspace, report: Comparison, tmp_path: Path) -> None:
    shown = call(space.root, "compare", "--quiet", "--out", str(tmp_path))
    assert shown.exit_code == 0, shown.output
    assert report.answer[0][1][0] in shown.stdout


def test_the_operating_point_that_the_page_proposes_can_be_chosen(
    space: Workspace, report: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (command,) = re.findall(r"featprobe (inspect [^<]+ --false-calls [^<]+)</code>", report.files[0].read_text())
    copy = shutil.copytree(space.root, tmp_path / "copy")
    monkeypatch.chdir(copy)
    done = CliRunner().invoke(cli, ["--workspace", str(copy), *command.split()])
    assert done.exit_code == 0 and "; kept beside the head" in done.output, done.output
    over = inspect_head(space, rows_of(space)[0]).points[0].validation.over("part")
    assert 0 < over < 20 and command.endswith(f"{math.ceil(100 / over) / 100:g}/part"), "0.05 would be refused"


def test_plots_of_several_sets_share_no_id(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    curve = PodLine("by hits and misses", (1.0, 9.0), (0.1, 0.9))
    picture = PodPicture((curve,), hits=(9.0,), misses=(1.0,), a90=9.0, bound=None, axis="px")
    monkeypatch.setattr(found, "drawing_of", lambda answer: picture)
    own = inspect_head(space, rows_of(space)[0])
    one, other = (set(re.findall(r'\bid="([^"]+)"', probability_of(own, number).plot)) for number in (1, 2))
    assert one and other and not one & other
