"""Result rows as a table: every row, old ones too, in plain columns; what can't be read is said."""

import json
import warnings
from pathlib import Path

import pandas as pd
import pytest
from helpers import stored_rows

from featprobe import Workspace, results
from featprobe.errors import ProbeError

HERE = Path(__file__).parents[1]


def test_each_row_is_a_line_of_plain_columns() -> None:
    frame, rows = results(Workspace(HERE / "golden" / "stored")), stored_rows()
    assert len(frame) == len(rows) and list(frame.columns[:9]) == [
        "task", "data", "backbone", "head", "regime", "seed", "split", "fold", "fraction",
    ]  # fmt: skip
    for (_, line), row in zip(frame.iterrows(), rows, strict=True):
        for name in ("task", "data", "backbone", "head", "regime", "seed", "split", "fraction", "device", "folder"):
            assert line[name] == row[name]
        assert line["recipe_iterations"] == row["recipe"]["iterations"]
        assert pd.isna(line["fold"]) if row["fold"] is None else line["fold"] == row["fold"]
        assert line["images_train"] == row["images"]["train"] and str(line["time"].date()) == row["time"][:10]
        if "miou" in row["test"]:
            assert line["test_miou"] == row["test"]["miou"] and line["val_miou"] == row["val"]["miou"]
            assert line["test_iou_pore"] == row["test"]["iou"]["pore"] and pd.isna(line.get("test_box_ap50"))
        if "box" in row["test"]:
            assert line["test_box_ap50"] == row["test"]["box"]["ap50"]
    assert frame.groupby(["task", "head"])["seed"].count().sum() == len(rows)
    assert not any(isinstance(value, dict | list) for value in frame.to_numpy().ravel())


@pytest.mark.parametrize("archive", sorted(path.parents[1].name for path in HERE.glob("archives/*/probes/*.jsonl")))
def test_rows_of_older_versions_are_read(archive: str) -> None:
    space = Workspace(HERE / "archives" / archive)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frame = results(space)
    lines = (space.probes / "results.jsonl").read_text().splitlines()
    assert len(frame) == len(lines) and frame["folder"].tolist() == [json.loads(line)["folder"] for line in lines]


def test_lines_that_can_not_be_read_are_named_and_the_others_stay(tmp_path: Path) -> None:
    rows = stored_rows()[:3]
    lines = [json.dumps(rows[0]), "not JSON", json.dumps({**rows[1], "seed": "one"}), json.dumps(rows[2]), '{"tor']
    (tmp_path / "probes").mkdir()
    (tmp_path / "probes" / "results.jsonl").write_text("\n".join(lines))
    with pytest.warns(UserWarning) as said:
        frame = results(Workspace(tmp_path))
    assert frame["folder"].tolist() == [rows[0]["folder"], rows[2]["folder"]]
    texts = [str(one.message) for one in said]
    assert [f"line {number} " in text for number, text in zip((2, 3, 5), texts, strict=True)] == [True] * 3
    assert 'seed: wanted a whole number, found "one"' in texts[1]


def test_a_task_that_is_not_known_yet_has_no_scores_here(tmp_path: Path) -> None:
    row = {**stored_rows()[0], "task": "inpaint", "test": {"quality": 0.5}}
    (tmp_path / "probes").mkdir()
    (tmp_path / "probes" / "results.jsonl").write_text(json.dumps(row))
    frame = results(Workspace(tmp_path))
    assert frame["task"].tolist() == ["inpaint"] and not [name for name in frame if name.startswith("test_")]


def test_a_workspace_without_results_says_how_to_make_some(tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match=r"There is no result in .*results\.jsonl(.|\n)*featprobe probe"):
        results(Workspace(tmp_path))
