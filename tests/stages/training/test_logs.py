"""Curves of a training while it runs: what a log holds is what happened, and logging changes nothing."""

import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from featprobe.cli.main import cli
from featprobe.errors import ProbeError
from featprobe.kinds import TrainRecipe
from featprobe.probes.saved import read_rows
from featprobe.probes.train import _Loop, learning_rate
from featprobe.specs import BackboneSpec
from featprobe.stages.extraction.extract import extract
from featprobe.stages.extraction.extract_options import ExtractOptions
from featprobe.stages.study.grid import run_grid
from featprobe.stages.study.study import Study
from featprobe.stages.training import fit
from featprobe.stages.training.finetune import finetune
from featprobe.stages.training.probe import probe
from featprobe.stages.training.probe_options import ProbeOptions, Tuning
from featprobe.stages.workspace import Workspace, make_generated

NETWORK = "test_efficientnet-random"
RECIPE = TrainRecipe(iterations=9, batch_size=4, evaluations=3)
OPTIONS = ProbeOptions(recipe=RECIPE, seeds=1, quiet=True, log=("tensorboard",))
Curve = list[tuple[int, float]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace of a small set with its cache."""
    workspace = Workspace(tmp_path_factory.mktemp("logs"))
    make_generated("surface", workspace.data / "surface", images=24, size=(64, 64))
    spec = BackboneSpec(NETWORK, NETWORK.removesuffix("-random"), "random", arguments=("--backbone", "x"))
    extract(workspace, spec, "surface", ExtractOptions(quiet=True))
    return workspace.root


@pytest.fixture
def space(made: Path, tmp_path: Path) -> Workspace:
    """A workspace with the small set's cache, and no result yet."""
    for name in ("data", "cache"):
        (tmp_path / name).symlink_to(made / name)
    return Workspace(tmp_path)


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """The loss of every head at every training step from here on."""
    noted: list[list[float]] = []
    take = _Loop.take

    def noting(self: _Loop, *arguments: Any) -> None:
        take(self, *arguments)
        noted.append(self.losses[-1].tolist())

    monkeypatch.setattr(_Loop, "take", noting)
    return noted


def curves_in(folder: Path) -> dict[str, Curve]:
    """What TensorBoard shows of a folder: tag -> (step, value)."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def check(curves: dict[str, Curve], losses: list[float], recipe: TrainRecipe, saved: list[dict[str, Any]]) -> None:
    """Curves hold every step's loss and rate, and the scores of the validation curve that is saved."""
    steps = list(range(1, recipe.iterations + 1))
    rates = [recipe.lr * learning_rate(step - 1, recipe) for step in steps]
    for tag, wanted in (("train/loss", losses), ("train/lr", rates)):
        assert [step for step, _ in curves[tag]] == steps
        assert [value for _, value in curves[tag]] == pytest.approx(wanted, rel=1e-5)
    for name in saved[0]["scores"]:
        wanted = [(p["iteration"], np.nan if p["scores"][name] is None else p["scores"][name]) for p in saved]
        found = curves[f"val/{name}"]
        assert [step for step, _ in found] == [step for step, _ in wanted]
        assert [v for _, v in found] == pytest.approx([v for _, v in wanted], rel=1e-5, nan_ok=True)


def test_each_trial_of_a_probe_has_its_curves_and_the_result_is_the_same(
    space: Workspace, losses: list[list[float]]
) -> None:
    options = replace(OPTIONS, lr=(1e-3, 1e-2))
    (row,) = probe(space, options=options).rows
    folder = space.probes / row["folder"]
    kept = json.loads((folder / "curves.json").read_text())
    for trial, rate in enumerate(options.lr):
        curves = curves_in(folder / "log" / f"trial{trial}")
        check(curves, [step[trial] for step in losses], replace(RECIPE, lr=rate), kept[trial]["curve"])
    assert (folder / "card.json").is_file()
    (plain,) = probe(space, options=replace(options, log=())).rows
    for ever_new in ("time", "seconds"):
        del row[ever_new], plain[ever_new]
    assert plain == row, "logging is no part of what a result is"


def test_a_training_in_parts_that_is_stopped_and_goes_on_leaves_one_curve(
    space: Workspace, losses: list[list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "CHECKPOINT_SECONDS", 0.0)
    options = replace(OPTIONS, tuning=Tuning(accumulate=3))
    noting = _Loop.take

    def stopping(self: _Loop, *arguments: Any) -> None:
        if self.step == 7:
            raise KeyboardInterrupt
        noting(self, *arguments)

    monkeypatch.setattr(_Loop, "take", stopping)
    with pytest.raises(KeyboardInterrupt):
        finetune(space, "semseg", options=options)
    stopped = len(losses)
    (kept,) = space.probes.rglob("checkpoint*.pt")
    step = torch.load(kept, weights_only=True)["state"]["step"]
    monkeypatch.setattr(_Loop, "take", noting)
    (row,) = finetune(space, "semseg", options=options).rows
    whole = losses[:step] + losses[stopped:]
    folder = space.probes / row["folder"]
    (saved,) = json.loads((folder / "curves.json").read_text())
    assert stopped == 7 and 0 < step < 7 and len(list((folder / "log").iterdir())) == 2
    check(curves_in(folder / "log"), [value for (value,) in whole], RECIPE, saved["curve"])


def test_a_study_logs_and_ridge_which_has_no_steps_does_not(space: Workspace) -> None:
    train = {"all": {"iterations": 4, "batch_size": 4, "evaluations": 1}}
    study = Study(("surface",), (NETWORK,), heads=("linear", "ridge"), regimes=("frozen",), seeds=1, train=train)
    assert not run_grid(space, replace(study, log=("tensorboard",))).failed
    rows, _ = read_rows(space.probes / "results.jsonl")
    logged = {row["head"]: (space.probes / row["folder"] / "log").is_dir() for row in rows}
    assert logged == {"linear": True, "ridge": False}
    with pytest.raises(ProbeError, match="--log would change nothing"):
        probe(space, options=ProbeOptions(head="ridge", log=("tensorboard",)))


@pytest.mark.parametrize("words", [["probe"], ["finetune"], ["finetune", "--task", "semseg"], ["study", "STUDY"]])
def test_what_is_not_installed_is_told_before_anything_is_trained(
    words: list[str], space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = space.root / "study.toml"
    study.write_text(f'data = ["surface"]\nbackbones = ["{NETWORK}"]\n')
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    words = [str(study) if word == "STUDY" else word for word in words]
    answer = CliRunner().invoke(cli, ["--workspace", str(space.root), *words, "--log", "tensorboard"])
    assert answer.exit_code == 1 and "pip install 'featprobe[tensorboard]'" in answer.stderr
    assert not space.probes.exists()


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_weights_and_biases_keeps_a_run_offline(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    (row,) = probe(space, options=replace(OPTIONS, log=("wandb", "tensorboard"))).rows
    log = space.probes / row["folder"] / "log"
    (run,) = (log / "wandb").glob("offline-run-*/run-*.wandb")
    assert all(name in run.read_bytes() for name in (b"train/loss", b"train/lr", b"val/miou"))
    assert len(curves_in(log)["train/loss"]) == RECIPE.iterations
