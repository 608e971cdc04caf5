"""What needs a card: equality with the CPU within stated bounds, kills, the captured step, features that lie there."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import training_of
from PIL import Image
from safetensors.torch import load_file

from featprobe.cache import WHOLE, Cache, open_cache, read_contents, reader, verify
from featprobe.kinds import TrainRecipe
from featprobe.probes.train import train
from featprobe.specs import BackboneSpec
from featprobe.stages.extraction.extract import extract
from featprobe.stages.extraction.extract_options import ExtractOptions
from featprobe.stages.extraction.frames import ImageBuffer
from featprobe.stages.pooled import pooled_vectors
from featprobe.stages.predict import predict
from featprobe.stages.training.finetune import finetune
from featprobe.stages.training.prepared import keep_on_device, prepare, source_of, trials_of
from featprobe.stages.training.probe import checked, probe
from featprobe.stages.training.probe_options import ProbeOptions, Tuning
from featprobe.stages.workspace import Workspace, make_generated

pytestmark = pytest.mark.gpu

SPEC = BackboneSpec("tiny", "convnext_atto", "random", arguments=("--backbone", "convnext_atto", "--random-init"))
BOUNDS = {"fp32": (np.inf, 1e-4), "tf32": (2, 1e-3), "amp": (2, 1e-3)}
"""How far each precision may be from the CPU's fp32, in which norm, relative to the level: see cache/README.md."""


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with a small 16-bit set, not yet extracted."""
    workspace = Workspace(tmp_path_factory.mktemp("gpu"))
    make_generated("xray", workspace.data / "xray", images=40, size=(96, 96))
    return workspace


@pytest.fixture(scope="module")
def extracted(space: Workspace) -> Workspace:
    """The same workspace with a cache that the card made."""
    extract(space, SPEC, "xray", ExtractOptions(quiet=True, device="cuda"))
    return space


def features_of(workspace: Workspace, root: Path, device: str, **how: Any) -> dict[str, np.ndarray]:
    """Every level of a cache that is made anew in a folder."""
    own = Workspace(root)
    own.root.mkdir()
    own.data.symlink_to(workspace.data)
    made = extract(own, SPEC, "xray", ExtractOptions(quiet=True, dtype="fp32", device=device, **how))
    cache = open_cache(made.path)
    return {level.name: np.stack([cache.read_row(i, level) for i in range(len(cache))]) for level in cache.levels}


@pytest.mark.parametrize("precision", list(BOUNDS))
def test_a_card_computes_what_a_cpu_computes_within_the_precision_s_bound_and_twice_the_same(
    precision: str, space: Workspace, tmp_path: Path
) -> None:
    wanted = features_of(space, tmp_path / "cpu", "cpu", precision="fp32")
    found = features_of(space, tmp_path / "card", "cuda", precision=precision)
    again = features_of(space, tmp_path / "again", "cuda", precision=precision)
    for name, level in wanted.items():
        order, bound = BOUNDS[precision]
        away = np.linalg.norm((found[name] - level).ravel(), order)
        assert away <= bound * np.linalg.norm(level.ravel(), order), name
        assert np.array_equal(found[name], again[name]), name


def test_processes_decode_into_locked_memory_and_threads_bring_the_same_features(
    space: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[bool] = []
    real = ImageBuffer.to
    monkeypatch.setattr(
        ImageBuffer, "to", lambda own, *where: (pinned.append(own._shown.is_pinned()), real(own, *where))[1]
    )
    found = {workers: features_of(space, tmp_path / str(workers), "cuda", workers=workers) for workers in (1, 4)}
    assert pinned and all(pinned)
    assert all(np.array_equal(level, found[1][name]) for name, level in found[4].items())


def test_an_extraction_that_is_killed_on_a_card_goes_on_to_a_sound_cache(space: Workspace, tmp_path: Path) -> None:
    own = Workspace(tmp_path / "killed")
    own.root.mkdir()
    own.data.symlink_to(space.data)
    words = ["--workspace", str(own.root), "extract", *SPEC.arguments, "--data", "xray", "--batch-size", "2", "--quiet"]
    command = [sys.executable, "-m", "featprobe", *words, "--device", "cuda"]
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any((Cache(p, read_contents(p)).done == WHOLE).any() for p in own.cache_files()):
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    subprocess.run(command, check=True, timeout=300)
    (path,) = own.cache_files()
    assert all(isinstance(found, int) for found in verify(path))
    assert (open_cache(path).done == WHOLE).all()


def trained(
    workspace: Workspace, head: str, task: str = "semseg", lr: tuple[float, ...] = (), **how: Any
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The row and the weights of a short training on the card."""
    recipe = TrainRecipe(iterations=40, batch_size=8, lr=1e-3, evaluations=2, weights_from="end", **how)
    instances = "own" if task == "semseg" else "components"
    options = ProbeOptions(
        head=head,
        recipe=recipe,
        seeds=1,
        quiet=True,
        device="cuda",
        lr=lr,
        instances=instances,  # type: ignore[arg-type]
    )
    (row,) = probe(workspace, task, options=options).rows
    return row, load_file(workspace.probes / row["folder"] / "head.safetensors")


def apart(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Largest relative L2 distance of two heads' tensors."""
    return max(float((a - second[name]).norm() / a.norm().clamp(min=1e-3)) for name, a in first.items())


HEADS = [
    ("semseg", "linear", {"loss_at": "image"}), ("semseg", "linear", {"loss_at": "level"}), ("semseg", "upsample", {}),
    ("detect", "fcos", {"clip": 10.0}),
]  # fmt: skip


@pytest.mark.parametrize(("task", "head", "how"), HEADS)
def test_a_recorded_step_trains_what_one_that_is_taken_anew_trains(
    task: str, head: str, how: dict[str, Any], extracted: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, recorded = trained(extracted, head, task, **how)
    monkeypatch.setenv("FEATPROBE_RECORD", "0")
    _, anew = trained(extracted, head, task, **how)
    assert apart(recorded, anew) <= 2e-2


@pytest.mark.parametrize(("task", "head"), [("detect", "fasterrcnn"), ("instseg", "maskrcnn")])
def test_heads_with_regions_train_on_a_card_recorded_or_not(
    task: str, head: str, extracted: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They draw their samples at random, in another order where a step is recorded: the losses are near each other."""
    losses = []
    for record in ("1", "0"):
        monkeypatch.setenv("FEATPROBE_RECORD", record)
        row, weights = trained(extracted, head, task)
        assert all(bool(value.isfinite().all()) for value in weights.values())
        card = json.loads((extracted.probes / row["folder"] / "card.json").read_text())
        losses.append([point["loss"] for point in card["curve"]])
    assert losses[0][-1] < losses[0][0] and losses[1] == pytest.approx(losses[0], rel=0.2)


def test_a_recorded_bank_trains_what_one_that_is_taken_anew_trains(
    extracted: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = (1e-3, 3e-3, 1e-2)
    row, recorded = trained(extracted, "linear", lr=rates)
    monkeypatch.setenv("FEATPROBE_RECORD", "0")
    other, anew = trained(extracted, "linear", lr=rates)
    assert row["recipe"]["lr"] == other["recipe"]["lr"] and apart(recorded, anew) <= 2e-2


@pytest.mark.parametrize(("task", "head", "how"), HEADS)
def test_features_that_stream_train_what_features_that_lie_on_the_card_train(
    task: str, head: str, how: dict[str, Any], extracted: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, resident = trained(extracted, head, task, **how)
    monkeypatch.setattr(reader, "DEVICE_SHARE", 0.0)
    other, streamed = trained(extracted, head, task, **how)
    assert apart(resident, streamed) <= 2e-2
    assert row["images"] == other["images"]


@pytest.mark.parametrize(("task", "head", "how"), HEADS[:3])
def test_a_card_trains_and_scores_as_the_few_operations_of_a_cpu_do(
    task: str, head: str, how: dict[str, Any], extracted: Workspace
) -> None:
    """In bfloat16 products on the card and float32 on the CPU: the losses of the curve are near each other."""
    row, _ = trained(extracted, head, task, **how)
    recipe = TrainRecipe(iterations=40, batch_size=8, lr=1e-3, evaluations=2, weights_from="end", **how)
    (other,) = probe(
        extracted, task, options=ProbeOptions(head=head, recipe=recipe, seeds=1, quiet=True, device="cpu")
    ).rows
    for score in ("miou", "miou_foreground"):
        assert row["test"][score] == pytest.approx(other["test"][score], abs=0.03)


def test_a_step_on_a_card_waits_for_nothing(extracted: Workspace) -> None:
    """Between validation points: torch raises where a step would make the host wait for the card."""
    (path,) = extracted.cache_files()
    recipe = TrainRecipe(iterations=12, batch_size=8, evaluations=1)
    options = checked("semseg", ProbeOptions(recipe=recipe, seeds=1, quiet=True, device="cuda"))
    ready = prepare(training_of(extracted, open_cache(path), "semseg", options))
    (trial,) = trials_of(ready)
    with source_of(ready, trial.head) as source:
        keep_on_device(ready, source)
        loss = ready.task.start([trial.head])
        resident = source.resident(ready.rows["train"])
        assert resident is not None
        modes = iter(["error"])

        def taken(losses: torch.Tensor) -> None:
            if next(modes, None):  # from the first step on, which prepares nothing more
                torch.cuda.set_sync_debug_mode("error")

        def evaluate() -> list[dict[str, float]]:
            torch.cuda.set_sync_debug_mode("default")
            return [{"miou_foreground": 0.0}]

        try:
            train(
                [trial.head], [recipe], source.training, ready.rows["train"], loss, 0, evaluate, resident=resident,
                fixed=True, taken=taken,
            )  # fmt: skip
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("task", ["semseg", "detect", "instseg"])
def test_fine_tuning_on_a_card_ends_with_finite_scores(task: str, extracted: Workspace) -> None:
    recipe = TrainRecipe(iterations=6, batch_size=4, lr=1e-3, evaluations=1, clip=0.0 if task == "semseg" else 10.0)
    instances = "own" if task == "semseg" else "components"
    options = ProbeOptions(
        recipe=recipe,
        seeds=1,
        quiet=True,
        device="cuda",
        tuning=Tuning(),
        instances=instances,  # type: ignore[arg-type]
    )
    (row,) = finetune(extracted, task, ("xray",), (), options).rows
    assert row["tuning"]["precision"] == "bf16" and np.isfinite(row["val_loss"] if "val_loss" in row else 0.0)
    assert all(np.isfinite(v) for v in row["val"].values() if v is not None)


def test_predictions_of_a_card_are_those_of_a_cpu_but_for_a_few_pixels(extracted: Workspace, tmp_path: Path) -> None:
    row, _ = trained(extracted, "linear")
    cache = open_cache(next(iter(extracted.cache_files())))
    images = [Path(cache.data.root) / cache.rows[i].image for i in cache.usable("test")]
    for device in ("cuda", "cpu"):
        predict(extracted.probes / row["folder"], images, tmp_path / device, device=device, quiet=True)
    masks = [
        np.stack([np.asarray(Image.open(p)) for p in sorted((tmp_path / device / "masks").iterdir())])
        for device in ("cuda", "cpu")
    ]
    assert (masks[0] != masks[1]).mean() < 0.02


@pytest.mark.parametrize("fit", ["resize", "letterbox"])
def test_features_that_a_card_pools_are_those_pooled_from_its_maps(fit: Any, space: Workspace, tmp_path: Path) -> None:
    own = Workspace(tmp_path)
    own.data.symlink_to(space.data)
    found = []
    for store in ("maps", "pooled"):
        how = ExtractOptions(quiet=True, device="cuda", store=store, fit=fit, size=(64, 96))  # type: ignore[arg-type]
        cache = open_cache(extract(own, SPEC, "xray", how).path)
        found.append([pooled_vectors(cache, [level], "image", cache.usable()) for level in cache.levels])
    for maps, pooled in zip(*found, strict=True):
        np.testing.assert_allclose(pooled, maps, rtol=0, atol=1e-5 * np.abs(maps).max())
