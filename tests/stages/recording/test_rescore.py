"""Records from cache and head alone are those that scoring writes; what can't be made again is said."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featprobe.kinds import TrainRecipe
from featprobe.metrics.defects.records import NOTHING, FoundRule, Records
from featprobe.probes.saved import read_card
from featprobe.result_rows import ResultRow
from featprobe.stages.extraction.extract import extract
from featprobe.stages.extraction.extract_options import ExtractOptions
from featprobe.stages.recording.base import PROBABILITIES
from featprobe.stages.recording.record_file import RECORDS, read_records
from featprobe.stages.recording.rescore import rescore
from featprobe.stages.training.finetune import finetune
from featprobe.stages.training.probe import probe
from featprobe.stages.training.probe_options import ProbeOptions, Tuning
from featprobe.stages.workspace import Workspace, make_generated

SHORT = TrainRecipe(iterations=2, batch_size=4, evaluations=1)
SOLVED: dict[str, Any] = {"recipe": None}


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with a cache of a small set, in tiles."""
    workspace = Workspace(tmp_path_factory.mktemp("space"))
    make_generated("xray", workspace.data / "xray", images=12, size=(32, 56))
    how = ExtractOptions(dtype="fp16", tile=32, batch_size=8, quiet=True, device="cpu")
    extract(workspace, workspace.backbone("embedded"), "xray", how)
    return workspace


def trained(workspace: Workspace, task: str, **changed: Any) -> list[ResultRow]:
    """The rows of heads trained for two steps, or solved."""
    options = ProbeOptions(**({"recipe": SHORT, "seeds": 1, "quiet": True, "device": "cpu"} | changed))
    work = finetune if options.tuning else probe
    return [ResultRow.from_json(row) for row in work(workspace, task, ["xray"], [], options).rows]


def files_of(workspace: Workspace, rows: Sequence[ResultRow]) -> list[Path]:
    return [workspace.probes / row.folder / RECORDS for row in rows]


def records_of(workspace: Workspace, row: ResultRow) -> Records:
    folder = workspace.probes / row.folder
    return read_records(folder, read_card(folder)["head_sha256"])


def remade(workspace: Workspace, rows: Sequence[ResultRow], rule: FoundRule | None = None) -> list[str]:
    return rescore(workspace, rows, rule, device="cpu", quiet=True)


@pytest.fixture(scope="module")
def ridge(space: Workspace) -> ResultRow:
    """The row of a solved head of pixels."""
    (row,) = trained(space, "semseg", head="ridge", **SOLVED)
    return row


@pytest.mark.parametrize(
    ("task", "asked"),
    [
        ("semseg", {"seeds": 2}),
        ("semseg", {"head": "ridge", "split": "group:3", **SOLVED}),
        ("semseg", {"tuning": Tuning(), "recipe": replace(SHORT, lr=0.01, iterations=12)}),
        ("detect", {}),
        ("anomaly", {"head": "patchcore", **SOLVED}),
        ("anomaly", {"head": "knn", **SOLVED}),
        ("anomaly", {"head": "gaussian", "unit": "tile", **SOLVED}),
        ("anomaly", {"head": "knn", "unit": "tile", **SOLVED}),
        ("classify", {"labels": "defect"}),
        ("classify", {"labels": "defect", "unit": "tile"}),
    ],
    ids=["seeds", "folds", "fine-tuned", "boxes", "maps", "pooled", "tiles of maps", "pooled tiles", "labels", "tiles"],
)
def test_records_made_again_are_those_of_scoring(task: str, asked: dict[str, Any], space: Workspace) -> None:
    rows = trained(space, task, **asked)
    before = [path.read_bytes() for path in files_of(space, rows)]
    for path in files_of(space, rows):
        path.unlink()
    assert remade(space, rows) == []
    assert [path.read_bytes() for path in files_of(space, rows)] == before
    for row in rows:
        found = records_of(space, row)
        counts = [found.images.splits.count(split) for split in ("val", "test")]
        assert counts == [row.images.val, row.images.test] and len(found.images) == sum(counts)
        assert found.about.base_from == ("validation" if task == "semseg" or asked.get("head") == "patchcore" else "")
        assert np.isfinite(found.about.base) == (found.about.base_from == "validation")
        if task == "semseg" and "head" not in asked:
            assert found.about.base in [float(np.float32(base)) for base in PROBABILITIES]
        of_images = asked.get("unit") != "tile" and (task == "classify" or asked.get("head") == "knn")
        assert found.about.pooled == of_images and (of_images or len(found.defects))
        assert np.isfinite(found.images.score).all() if of_images else np.isnan(found.images.score).all()
        assert len(found.calls) > 0 or of_images
        if "unit" in asked:  # each tile is a call
            assert len(found.calls) == 2 * len(found.images)
            assert (found.calls.touched == NOTHING).any() and len(found.finds)


def test_another_rule_finds_no_more_at_the_same_base(space: Workspace, ridge: ResultRow) -> None:
    usual = records_of(space, ridge)
    assert remade(space, [ridge], FoundRule(iou=0.5)) == []
    strict = records_of(space, ridge)
    assert strict.about.rule == FoundRule(iou=0.5) and usual.about.rule == FoundRule()
    if strict.about.base == usual.about.base:
        assert (strict.defects.score <= usual.defects.score).all() and len(strict.calls) == len(usual.calls)
    assert remade(space, [ridge]) == []
    assert np.array_equal(records_of(space, ridge).defects.score, usual.defects.score)


def test_what_can_not_be_made_again_is_said_and_the_others_are_made(
    space: Workspace, ridge: ResultRow, tmp_path: Path
) -> None:
    """A cache that is gone, a head that is damaged, one that is gone: each with what to do; sound heads get theirs."""
    root = Path(shutil.copytree(space.root, tmp_path / "copy"))
    workspace = Workspace(root)
    rows = [ridge, *trained(workspace, "anomaly", head="knn", **SOLVED), *trained(workspace, "detect")]
    for path in files_of(workspace, rows):
        path.unlink()
    head = workspace.probes / rows[1].folder / "head.safetensors"
    head.write_bytes(head.read_bytes()[:-1] + b"x")
    shutil.rmtree(workspace.probes / rows[2].folder)
    damaged, gone = remade(workspace, rows)
    assert damaged.startswith(f"no records of {rows[1].folder}: ") and "Train it again:" in damaged
    assert gone.startswith(f"no records of {rows[2].folder}: ") and "not here any more" in gone
    assert [path.is_file() for path in files_of(workspace, rows)] == [True, False, False]
    files_of(workspace, rows)[0].unlink()
    (cache,) = workspace.cache_files()
    cache.unlink()
    (lost,) = remade(workspace, rows[:1])
    assert "its cache is not here any more. " in lost and "featprobe extract --backbone embedded --data xray" in lost
    cache.write_bytes(b"x")
    (shut,) = remade(workspace, rows[:1])
    assert f"not here any more, or is one that can't be opened ({cache} is not" in shut, "it is not taken for absent"
    assert not files_of(workspace, rows)[0].exists()


def test_a_head_of_labels_that_name_no_good_one_has_no_records(space: Workspace, tmp_path: Path) -> None:
    """Nothing says which images are good, so there is no score of a defect."""
    from PIL import Image

    random = np.random.default_rng(0)
    for kind in ("oak", "pine"):
        (tmp_path / "data" / "wood" / kind).mkdir(parents=True)
        for i in range(12):
            pixels = random.integers(0, 120 if kind == "oak" else 255, (32, 32), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / "wood" / kind / f"{i}.png")
    workspace = Workspace(tmp_path)
    how = ExtractOptions(batch_size=8, quiet=True, device="cpu")
    extract(workspace, workspace.backbone("embedded"), str(tmp_path / "data" / "wood"), how)
    options = ProbeOptions(recipe=SHORT, seeds=1, quiet=True, device="cpu", split="image")
    (row,) = [ResultRow.from_json(own) for own in probe(workspace, "classify", options=options).rows]
    assert not files_of(workspace, [row])[0].exists()
    (said,) = remade(workspace, [row])
    assert 'good = "NAME"' in said and not files_of(workspace, [row])[0].exists()
