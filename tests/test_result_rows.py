"""Result rows travel as values, and come back as the very text that was read."""

import json
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from helpers import result_row, stored_rows

from featprobe.kinds import TASKS
from featprobe.metrics import PIXEL_SCORES, pixel_scores, pixel_statistic
from featprobe.metrics.anomalies import ANOMALY_SCORES
from featprobe.metrics.images import IMAGE_SCORES
from featprobe.metrics.resampled import THRESHOLDS
from featprobe.result_rows import ResultRow
from featprobe.scores import SCORES

PACKAGE = Path(__file__).parents[1] / "featprobe"
NOT_YET_A_ROW = {"probes/saved.py", "stages/training/ladder.py"}
"""What parses lines; what has rungs of ladders in the place of rows."""
LATER = {"model", "tile", "asked", "chosen_from", "chosen_by", "budget", "weights_at", "fold", "subset", "groups",
         "train_counts", "head_precision"}  # fmt: skip


@pytest.mark.parametrize("row", stored_rows(), ids=lambda row: row["folder"])
def test_a_stored_row_is_written_as_it_was_read(row: dict[str, object]) -> None:
    version, *_ = row
    assert version == "version"
    assert json.dumps({"version": row["version"], **ResultRow.from_json(row).to_json()}) == json.dumps(row)


def test_a_row_of_an_older_featprobe_is_what_its_page_says_that_it_means() -> None:
    (row, *_) = stored_rows()
    old = {name: value for name, value in row.items() if name not in {*LATER, "weights_from", "processes"}}
    old["recipe"] = {name: value for name, value in row["recipe"].items() if name != "weights_from"}
    read = ResultRow.from_json(old)
    assert read.weights_from == "end of training" and read.recipe.weights_from == "end" and read.processes == 1
    assert read.verified and not read.shared_order and read.chosen_with == read.scores.chosen_before
    assert all(read.to_json()[name] in (None, []) for name in LATER)


def test_nan_is_null_in_a_row() -> None:
    row = result_row(val={"miou": float("nan")})
    assert row.to_json()["val"] == {"miou": None}
    assert ResultRow.from_json(row.to_json()).validation is None


def test_keys_of_a_row_are_texts_in_its_own_module_alone() -> None:
    keys = "|".join(own.name for own in fields(ResultRow))
    text = re.compile(rf"""\b(row|card\["result"\])(\[|\.get\()["']({keys})["']""")
    own = [path for part in ("stages", "report", "cli", "probes") for path in (PACKAGE / part).rglob("*.py")]
    found = {path.relative_to(PACKAGE).as_posix() for path in own if text.search(path.read_text())}
    assert found <= NOT_YET_A_ROW


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_every_task_has_its_scores_and_the_main_one_is_shown() -> None:
    assert set(SCORES) == set(TASKS)
    for scores in SCORES.values():
        assert scores.main.name in [score.name for score in scores.shown]
        assert scores.chosen_before in [score.name for score in scores.compared]


def test_every_score_that_is_compared_can_be_computed() -> None:
    for scores in SCORES.values():
        names = [score.name for score in scores.every]
        counted = {"pixels": PIXEL_SCORES, "images": IMAGE_SCORES, "anomalies": ANOMALY_SCORES}.get(scores.on)
        if counted is not None:
            assert set(names) == set(counted) and all(score.place == (score.name,) for score in scores.every)
        else:
            assert all(score.place[0] == scores.main.place[0] for score in scores.compared)
            assert all(score.place[-1] in THRESHOLDS for score in scores.compared)


@pytest.mark.parametrize("name", PIXEL_SCORES)
@pytest.mark.parametrize("absent", ["ignore", "zero"])
def test_a_score_is_the_value_of_its_own_statistic(name: str, absent: str) -> None:
    rng = np.random.default_rng(11)
    confusions = rng.integers(0, 50, (12, 4, 4))
    confusions[:, 3] = 0  # a class that is found and not there
    statistic = pixel_statistic(confusions, score=name, absent=absent)  # type: ignore[arg-type]
    weights = np.vstack([np.ones(12), rng.integers(0, 3, 12)]).astype(float)
    for value, own in zip(statistic.value(weights), weights, strict=True):
        counted = (own[:, None, None] * confusions).sum(0).astype(np.int64)
        assert value == pytest.approx(pixel_scores(counted, absent)[name])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PIXEL_SCORES)
def test_the_influence_of_a_score_is_its_slope(name: str) -> None:
    statistic = pixel_statistic(np.random.default_rng(12).integers(1, 50, (9, 3, 3)), score=name)
    weights, step = np.full((1, 9), 2.0), 1e-6
    (influence,) = statistic.influence(weights)
    for group in range(9):
        more = weights.copy()
        more[0, group] += step
        slope = (statistic.value(more)[0] - statistic.value(weights)[0]) / step
        assert influence[group] == pytest.approx(slope, abs=1e-4)
