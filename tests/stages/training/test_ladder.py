"""Iterations found by doubling, weights of the best validation point, subsets that follow the seed."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import PoolingBackbone, training_of
from helpers import extract as extract_into
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from featprobe import kinds
from featprobe.cache.reader import FeatureLoader
from featprobe.cli.main import cli
from featprobe.errors import DataError, ProbeError
from featprobe.features import Features
from featprobe.kinds import KINDS, TrainRecipe
from featprobe.probes import CurvePoint, kept_point
from featprobe.probes.saved import append_row, read_rows
from featprobe.probes.train import evaluation_points, train
from featprobe.specs import BackboneSpec
from featprobe.stages.extraction.extract import extract
from featprobe.stages.extraction.extract_options import ExtractOptions
from featprobe.stages.partition import Partition
from featprobe.stages.study.grid import run_grid
from featprobe.stages.study.study import read_study
from featprobe.stages.training import ladder as ladder_module
from featprobe.stages.training.finetune import finetune, missing_counterparts
from featprobe.stages.training.forecast import Forecast
from featprobe.stages.training.ladder import GAIN, Ladder, budget_of, next_rung, rungs_of
from featprobe.stages.training.probe import checked, find_caches, probe
from featprobe.stages.training.probe_options import ProbeOptions, Tuning
from featprobe.stages.training.training import Training
from featprobe.stages.workspace import Workspace, make_generated

BRIEF = TrainRecipe(iterations=4, batch_size=4, evaluations=2)
AUTO = ProbeOptions(recipe=BRIEF, budget="auto", seeds=2, quiet=True)


# ---- the rule --------------------------------------------------------------------------------------------------------

scores_of_rungs = st.lists(st.floats(0, 1) | st.just(float("nan")), min_size=9, max_size=9)


def climbed(usual: int, rungs: tuple[int, ...], given_: list[float]) -> dict[int, float]:
    scores: dict[int, float] = {}
    while (rung := next_rung(rungs, usual, scores)) is not None:
        scores[rung] = given_[rungs.index(rung)]
    return scores


@given(given_=scores_of_rungs)
def test_a_ladder_ends_after_two_rungs_that_gain_nothing_and_answers_with_the_smallest_that_is_as_good(
    given_: list[float],
) -> None:
    rungs = rungs_of(1000, 4)
    assert rungs == (62, 125, 250, 500, 1000, 2000, 4000, 8000, 16000)
    scores = climbed(1000, rungs, given_)
    known = [-1.0 if np.isnan(score) else score for score in scores.values()]
    assert list(scores) == list(rungs[: len(scores)]) and len(scores) >= 6, "the usual rung and one more, at least"

    def gains(k: int) -> bool:
        return known[k] - max([-1.0, *known[:k]]) >= GAIN

    assert len(scores) == 9 or not (gains(len(known) - 1) or gains(len(known) - 2))
    assert not any(not gains(k) and not gains(k - 1) for k in range(5, len(known) - 1)), "and no rung too many"
    found = budget_of(rungs, scores)
    best = max(known)
    assert scores[found.needed] >= best - GAIN or best == -1.0
    assert all(known[rungs.index(r)] < best - GAIN for r in scores if r < found.needed)
    assert found.open == (found.needed == 16000 or best == 0)


def test_a_detector_that_finds_nothing_for_long_still_climbs_to_where_it_does() -> None:
    rungs = rungs_of(400, 2)
    scores = climbed(400, rungs, [0.0, 0.0, 0.0, 0.4, 0.41])
    assert list(scores) == [100, 200, 400, 800, 1600] and budget_of(rungs, scores).needed == 1600


# ---- the weights of the best point -----------------------------------------------------------------------------------


def test_rungs_that_no_ladder_has_decide_nothing() -> None:
    """Anybody can append a line to ladders.jsonl."""
    scores = {250: 0.3, 500: 0.4, 3: 0.4, -5: 0.4, 10**9: 1.0}
    assert budget_of((250, 500), scores).needed == 500
    assert next_rung((250, 500), 250, scores) is None


def peaked(scores: dict[int, list[float]], weights_from: Any) -> tuple[list[nn.Linear], dict[int, list[torch.Tensor]]]:
    """Two heads trained together whose scores are as given by iteration; and their weights at each point."""
    torch.manual_seed(0)
    heads = [nn.Linear(3, 1), nn.Linear(3, 1)]
    recipe = TrainRecipe(iterations=8, batch_size=2, lr=0.1, evaluations=4, weights_from=weights_from)
    seen: dict[int, list[torch.Tensor]] = {}
    points = iter(evaluation_points(recipe))

    def evaluate() -> list[dict[str, float]]:
        point = next(points)
        seen[point] = [head.weight.detach().clone() for head in heads]
        return [{"score": scores[point][i]} for i in range(2)]

    def feed(batches: Any, first: int) -> Iterator[Any]:
        for rows in batches:
            yield rows, Features({}, (4, 4))

    generator = torch.Generator().manual_seed(1)
    images = torch.randn(6, 3, generator=generator)

    def loss(features: Features, rows: Any) -> torch.Tensor:
        return torch.stack([head(images[rows]).mean() for head in heads])

    best_by = "score" if weights_from == "best" else None
    train(heads, [recipe, recipe], feed, np.arange(6), loss, 0, evaluate, best_by=best_by)
    return heads, seen


def test_each_head_of_a_pass_keeps_the_weights_of_its_own_best_point() -> None:
    nan = float("nan")
    scores = {3: [0.1, nan], 4: [0.7, 0.0], 6: [0.7, 0.9], 8: [0.2, nan]}
    heads, seen = peaked(scores, "best")
    assert torch.equal(heads[0].weight, seen[6][0]), "of equals the one that was trained longer"
    assert torch.equal(heads[1].weight, seen[6][1])
    assert not torch.equal(seen[6][0], seen[8][0]), "a difference that can be seen"
    heads, seen = peaked(scores, "end")
    assert torch.equal(heads[0].weight, seen[8][0]) and torch.equal(heads[1].weight, seen[8][1])


@given(scores=st.lists(st.floats(0, 1) | st.just(float("nan")), min_size=1, max_size=6))
def test_the_point_that_is_kept_is_the_best_or_the_last(scores: list[float]) -> None:
    curve = [CurvePoint(k + 1, 0.0, {"score": score}) for k, score in enumerate(scores)]
    known = [score for score in scores if not np.isnan(score)]
    best = kept_point(curve, TrainRecipe(), "score")
    assert (best.scores["score"] == max(known)) if known else best is curve[-1]
    assert kept_point(curve, TrainRecipe(weights_from="end"), "score") is curve[-1]


@given(iterations=st.integers(1, 5000), evaluations=st.integers(1, 12))
def test_validation_points_are_spaced_by_a_factor_and_end_with_the_last_iteration(
    iterations: int, evaluations: int
) -> None:
    points = evaluation_points(TrainRecipe(iterations=iterations, evaluations=evaluations))
    assert points[-1] == iterations and min(points) >= 1 and len(points) <= evaluations
    if iterations >= 100 * evaluations:
        ratios = np.divide(points[1:], points[:-1])
        assert len(points) == evaluations and np.all(np.abs(ratios - 2**0.5) < 0.1)


def test_old_recipes_mean_the_weights_of_the_end() -> None:
    old = TrainRecipe(weights_from="end").to_json()
    assert "weights_from" not in old, "as rows from before the choice: they keep their keys"
    assert TrainRecipe.from_json(old).weights_from == "end"
    assert TrainRecipe.from_json(TrainRecipe().to_json()) == TrainRecipe()
    with pytest.raises(ProbeError, match="weights_from = best validation"):
        TrainRecipe(weights_from="best validation")  # type: ignore[arg-type]


# ---- on cached features ----------------------------------------------------------------------------------------------


@pytest.fixture
def pooled(tmp_path: Path) -> Workspace:
    """A workspace with the cache of a stand-in for a network."""
    workspace = Workspace(tmp_path / "pooled")
    make_generated("surface", workspace.data / "surface", images=20, size=(64, 64))
    extract_into(workspace.root, workspace.data / "surface", PoolingBackbone())
    return workspace


def ladder_rows(workspace: Workspace) -> list[dict[str, Any]]:
    return read_rows(workspace.probes / "ladders.jsonl")[0]


def test_a_ladder_is_climbed_once_and_looks_at_no_test_image(
    pooled: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed: list[str] = []
    plain, validated = FeatureLoader.batches, ladder_module.validated

    def spying(self: FeatureLoader, orders: Any) -> Any:
        for rows, features in plain(self, orders):
            fed.extend(self.cache.rows[row].split for row in rows.tolist())
            yield rows, features

    def watched(training: Training, forecast: Forecast) -> list[float]:
        fed.clear()
        scores = validated(training, forecast)
        assert fed and "test" not in fed
        return scores

    monkeypatch.setattr(FeatureLoader, "batches", spying)
    monkeypatch.setattr(ladder_module, "validated", watched)
    said: list[str] = []
    rows = probe(pooled, options=AUTO, say=said.append).rows
    known = ladder_rows(pooled)
    rungs = list(dict.fromkeys(row["iterations"] for row in known))
    assert rungs == [1, 2, 4, 8, 16, 32, 64][: len(rungs)] and len(rungs) >= 4
    assert "looking for the iterations it needs" in said[0] and "min" in said[0], "the cost comes first"
    scores = {row["iterations"]: row["score"] for row in known}
    answer = budget_of(rungs_of(4, 4), scores)
    assert {row["recipe"]["iterations"] for row in rows} == {answer.needed}
    assert all(row["budget"]["needed"] == answer.needed and row["budget"]["rule"] == "ladder" for row in rows)
    assert all(len(row["seed_scores"]) == 2 for row in known)
    found = next(row for row in known if row["iterations"] == answer.needed)
    assert [row["val"]["miou_foreground"] for row in rows] == found["seed_scores"], (
        "a rung is a training like any other"
    )

    monkeypatch.setattr(ladder_module, "validated", lambda *_: pytest.fail("every rung is known"))
    again = probe(pooled, options=AUTO).rows
    assert [row["folder"] for row in again] == [row["folder"] for row in rows]
    assert len(ladder_rows(pooled)) == len(known)


def test_a_ladder_that_was_killed_goes_on_with_the_rung_it_was_at(
    pooled: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe(pooled, options=AUTO)
    path = pooled.probes / "ladders.jsonl"
    whole = ladder_rows(pooled)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:50])  # as a kill leaves it
    climbed: list[int] = []
    validated = ladder_module.validated

    def counting(training: Training, forecast: Forecast) -> list[float]:
        climbed.append(training.recipe.iterations)
        return validated(training, forecast)

    monkeypatch.setattr(ladder_module, "validated", counting)
    probe(pooled, options=AUTO)
    assert climbed == [whole[-1]["iterations"]] * 2, "its two seeds"
    assert [(row["iterations"], row["score"]) for row in ladder_rows(pooled)] == [
        (row["iterations"], row["score"]) for row in whole
    ]


def test_all_backbones_get_what_the_neediest_needs_and_older_results_are_named(pooled: Workspace) -> None:
    (first,) = {row["recipe"]["iterations"] for row in probe(pooled, options=AUTO).rows}
    other = PoolingBackbone(gain=2.0)
    other.spec = replace(other.spec, label="hungry")
    extract_into(pooled.root, pooled.data / "surface", other)
    (cache,), _ = find_caches(pooled, "semseg", (), ("hungry",))
    ladder = Ladder(pooled, Partition(cache, AUTO.choice), "semseg", checked("semseg", AUTO), 1.0)
    for rung, score in zip((1, 2, 4, 8, 16, 32, 64), (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.6), strict=True):
        append_row(pooled.probes / "ladders.jsonl", {
            "ladder": ladder.key, "comparison": ladder.comparison, "iterations": rung, "score": score,
            "seed_scores": [score, score], "backbone": "hungry",
        })  # fmt: skip
    assert first < 32
    report = probe(pooled, backbones=("hungry",), options=AUTO)
    assert {row["recipe"]["iterations"] for row in report.rows} == {32}
    (note,) = [note for note in report.notes if "bring it level" in note]
    assert f"{first} iterations" in note and "needs 32" in note
    command = note.partition("featprobe ")[2].split()
    assert command[0] == "probe" and "--iterations auto" in note and "pooling" in note
    said: list[str] = []
    level = probe(pooled, options=AUTO, say=said.append)
    assert any("pooling on surface" in line and "trained with 32, as hungry needs" in line for line in said)
    assert {row["recipe"]["iterations"] for row in level.rows} == {32} and not any("level" in n for n in level.notes)
    needs = {row["backbone"]: row["budget"]["needed"] for row in level.rows}
    assert needs["hungry"] == 32 and set(needs.values()) == {first, 32}


def test_a_ladder_of_fewer_seeds_is_climbed_again_and_one_of_more_is_not(pooled: Workspace) -> None:
    probe(pooled, options=replace(AUTO, seeds=1))
    first = len(ladder_rows(pooled))
    probe(pooled, options=AUTO)
    more = ladder_rows(pooled)[first:]
    assert more and all(len(row["seed_scores"]) == 2 for row in more)
    probe(pooled, options=replace(AUTO, seeds=1))
    assert len(ladder_rows(pooled)) == first + len(more)


def test_a_ladder_without_any_score_is_an_error_however_often_it_is_asked_for(
    pooled: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ladder_module, "validated", lambda training, _: [float("nan")] * len(training.seeds))
    for _ in range(2):
        with pytest.raises(ProbeError, match=r"no score at any rung.*--iterations N"):
            probe(pooled, options=AUTO)


def test_a_result_that_was_removed_is_not_brought_level(pooled: Workspace) -> None:
    rows = probe(pooled, options=AUTO).rows
    shutil.rmtree((pooled.probes / rows[0]["folder"]).parent)
    append_row(pooled.probes / "ladders.jsonl", {
        "ladder": "of another", "comparison": rows[0]["budget"]["comparison"], "iterations": 1, "score": 0.1,
        "seed_scores": [0.1, 0.1],
    })  # fmt: skip
    report = probe(pooled, options=AUTO)
    assert len(report.rows) == 2 and not any("level" in note for note in report.notes)


def test_ladders_of_two_devices_and_of_two_ways_to_say_a_rate_are_one(pooled: Workspace) -> None:
    (cache,), _ = find_caches(pooled, "semseg", (), ())

    def comparison(**changed: Any) -> str:
        options = checked("semseg", replace(AUTO, **changed))
        return training_of(pooled, cache, "semseg", options).comparison

    assert comparison(lr=(2e-2,)) == comparison(recipe=replace(BRIEF, lr=2e-2)) != comparison()
    grid = ((1e-3, 2e-2), ())
    chosen = [comparison(recipe=replace(BRIEF, lr=lr), chosen_from=grid) for lr in (1e-3, 2e-2)]
    assert chosen[0] == chosen[1] != comparison(recipe=replace(BRIEF, lr=1e-3))


def test_what_no_ladder_can_be_climbed_for_is_refused(pooled: Workspace) -> None:
    with pytest.raises(ProbeError, match=r"test images of others(.|\n)*--iterations N"):
        probe(pooled, options=replace(AUTO, split="group:3"))
    with pytest.raises(ProbeError, match="ridge is solved"):
        probe(pooled, options=ProbeOptions(head="ridge", budget="auto"))
    for text in ("0", "-3", "many", "1.5"):
        answer = CliRunner().invoke(cli, ["--workspace", str(pooled.root), "probe", "--iterations", text])
        assert answer.exit_code == 2 and "auto" in answer.output
    assert not pooled.probes.exists() or not list(pooled.probes.rglob("*.jsonl"))


def test_a_ladder_is_the_default_where_few_images_are_trained_on_and_nothing_is_said() -> None:
    usual = checked("semseg", ProbeOptions(fractions=(0.1, 1.0)))
    assert usual.climbs(0.1) and not usual.climbs(1.0)
    fixed = replace(usual, budget="fixed")
    said = checked("semseg", ProbeOptions(recipe=replace(KINDS["semseg", "linear"].recipe, iterations=60)))
    assert not fixed.climbs(0.1) and not said.climbs(0.1)
    assert replace(usual, budget="auto").climbs(1.0)
    assert not checked("semseg", ProbeOptions(head="ridge")).climbs(0.1)


def test_seeds_draw_their_own_part_of_the_training_split(pooled: Workspace) -> None:
    fixed = ProbeOptions(recipe=BRIEF, fractions=(0.3,), seeds=3, quiet=True)
    rows = probe(pooled, options=fixed).rows
    counts = {json.dumps(row["train_counts"]) for row in rows}
    assert len(counts) > 1 and {row["subset"] for row in rows} == {"by seed"}
    shared = probe(pooled, options=replace(fixed, shared_order=True)).rows
    assert len({json.dumps(row["train_counts"]) for row in shared}) == 1 and {row["subset"] for row in shared} == {None}


# ---- with a live backbone, and in a study ----------------------------------------------------------------------------

SPEC = BackboneSpec("tiny", "test_efficientnet", "random", arguments=("--backbone", "tiny", "--random-init"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("live"))
    make_generated("surface", workspace.data / "surface", images=20, size=(64, 64))
    extract(workspace, SPEC, "surface", ExtractOptions(quiet=True))
    return workspace


@pytest.fixture
def space(made: Workspace, tmp_path: Path) -> Workspace:
    shutil.copytree(made.root, tmp_path / "space")
    return Workspace(tmp_path / "space")


def test_finetune_climbs_a_ladder_of_its_own_for_what_a_ladder_trained(
    space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(kinds._kinds, ("semseg", "linear"), replace(KINDS["semseg", "linear"], recipe=BRIEF))
    probe(space, options=replace(AUTO, seeds=1))
    said: list[str] = []
    finetune(space, options=ProbeOptions(quiet=True), say=said.append, dry_run=True)
    assert "full: looking for the iterations it needs, 1 to at most 16, 1 seed" in said[0].replace("linear, ", "")
    report = finetune(space, options=ProbeOptions(quiet=True))
    own = [row for row in ladder_rows(space) if row["regime"] == "full"]
    assert {row["iterations"] for row in own} <= {1, 2, 4, 8, 16} and len(own) >= 4
    (row,) = report.rows
    assert row["budget"]["needed"] == row["recipe"]["iterations"] and not list(space.probes.rglob("checkpoint*"))
    with pytest.raises(ProbeError, match="has its counterpart"):
        finetune(space, options=ProbeOptions(quiet=True))


def test_a_fixed_result_does_not_stand_for_one_whose_iterations_are_looked_for(space: Workspace) -> None:
    fixed = ProbeOptions(recipe=BRIEF, seeds=1, quiet=True, tuning=Tuning(regime="frozen-online", augment=False))
    finetune(space, "semseg", options=fixed)
    report = finetune(space, "semseg", options=replace(fixed, budget="auto"))
    assert [row["budget"]["rule"] for row in report.rows] == ["ladder"] and ladder_rows(space)


def test_counterparts_compare_by_the_rates_that_were_tried(space: Workspace) -> None:
    (frozen,) = probe(space, options=ProbeOptions(recipe=BRIEF, lr=(1e-3, 2e-2), seeds=1, quiet=True)).rows
    (full,) = finetune(space, options=ProbeOptions(quiet=True)).rows
    assert full["recipe"]["lr"] == frozen["recipe"]["lr"]
    assert full["chosen_from"] == frozen["grid"] and frozen["chosen_from"] is None


def test_weights_of_the_end_are_those_of_the_counterpart_too(space: Workspace) -> None:
    recipe = replace(BRIEF, weights_from="end")
    (frozen,) = probe(space, options=ProbeOptions(recipe=recipe, seeds=1, quiet=True)).rows
    assert (frozen["weights_from"], frozen["weights_at"]) == ("end of training", 4)
    (full,) = finetune(space, options=ProbeOptions(quiet=True)).rows
    assert full["weights_from"] == "end of training"


def test_a_part_of_the_training_split_that_followed_no_seed_has_no_counterpart(space: Workspace) -> None:
    probe(space, options=ProbeOptions(recipe=BRIEF, fractions=(0.4,), shared_order=True, seeds=1, quiet=True))
    with pytest.raises(ProbeError, match="does not follow the seed"):
        missing_counterparts(space, ProbeOptions(tuning=Tuning()))


STUDY = """
data = ["surface"]
backbones = ["test_efficientnet-random", "mobilenetv2_100-random"]
heads = ["linear"]
regimes = ["frozen"]
seeds = 2
sizes = ["64x64"]
[train.linear]
iterations = "auto"
batch_size = 4
evaluations = 2
"""


def test_a_study_finds_the_iterations_of_all_backbones_before_it_trains_one(
    space: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(kinds._kinds, ("semseg", "linear"), replace(KINDS["semseg", "linear"], recipe=BRIEF))
    file = tmp_path / "study.toml"
    file.write_text(STUDY)
    study = read_study(file, space)
    plan = run_grid(space, study, dry_run=True)
    assert len(plan.missing) == 4 and len(plan.ladders) == 2 and not plan.rows
    report = run_grid(space, study)
    assert not report.failed and len(report.rows) == 4
    ladders = ladder_rows(space)
    most = max(
        budget_of(rungs_of(4, 4), {r["iterations"]: r["score"] for r in ladders if r["ladder"] == key}).needed
        for key in {row["ladder"] for row in ladders}
    )
    assert len({row["ladder"] for row in ladders}) == 2 and {r["recipe"]["iterations"] for r in report.rows} == {most}
    again = run_grid(space, study)
    assert again.done == 4 and not again.rows and len(ladder_rows(space)) == len(ladders)
    assert not run_grid(space, study, dry_run=True).ladders
    file.write_text(STUDY.replace('sizes = ["64x64"]', 'sizes = ["64x64"]\nsplit = "group:3"'))
    with pytest.raises(DataError, match="cross-validation finds no number of iterations"):
        read_study(file, space)
