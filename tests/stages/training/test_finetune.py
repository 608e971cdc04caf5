"""The full regime: the same heads and loop as the frozen one, views with their labels, counterparts, kills."""

import json
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import Process
from helpers import training_of, watch_memory
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from featprobe.backbones.backbone import load_backbone
from featprobe.cache import CacheWriter, open_cache
from featprobe.cache.reader import FeatureLoader
from featprobe.datasets.images.reading import read_levels, to_unit
from featprobe.errors import BackboneError, DataError, ProbeError
from featprobe.intensity import Intensity
from featprobe.kinds import TrainRecipe
from featprobe.probes import execution, load_head
from featprobe.probes.saved import read_rows
from featprobe.probes.train import _Loop, batches_of
from featprobe.report.sheets import GAP, LINE, TILE, Panel, draw_panel
from featprobe.specs import BackboneSpec, FeatureRecipe
from featprobe.stages.comparison.results import load_results
from featprobe.stages.extraction.crops import Augmentation, choose_crop
from featprobe.stages.extraction.extract import extract
from featprobe.stages.extraction.extract_options import ExtractOptions
from featprobe.stages.predict import predict
from featprobe.stages.predictor import Predictor
from featprobe.stages.training import agenda
from featprobe.stages.training import finetune as finetune_module
from featprobe.stages.training.augment import augment
from featprobe.stages.training.finetune import finetune
from featprobe.stages.training.forecast import Forecast
from featprobe.stages.training.live import LiveFeatures
from featprobe.stages.training.prepared import prepare
from featprobe.stages.training.probe import checked, find_caches, probe
from featprobe.stages.training.probe_options import ProbeOptions, Tuning
from featprobe.stages.workspace import Workspace, make_generated
from featprobe.targets import Instance, encode_rle

SPEC = BackboneSpec("tiny", "test_efficientnet", "random", arguments=("--backbone", "tiny", "--random-init"))
STEPS = 10
RECIPES = {
    "semseg": TrainRecipe(iterations=STEPS, batch_size=4, evaluations=2),
    "detect": TrainRecipe(iterations=STEPS, batch_size=4, lr=2e-3, clip=10.0, evaluations=2),
    "instseg": TrainRecipe(iterations=STEPS, batch_size=4, lr=1e-3, clip=10.0, evaluations=2),
}
PLAIN = Tuning(regime="frozen-online", augment=False)
TASKS = list(RECIPES)


def options_for(task: str, tuning: Tuning | None = None, **changed: Any) -> ProbeOptions:
    """On the CPU, whose bits these tests compare; heads that find objects are narrow."""
    width = None if task == "semseg" else 16
    return ProbeOptions(recipe=RECIPES[task], width=width, seeds=1, quiet=True, tuning=tuning, device="cpu", **changed)


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with an exact cache of a small 16-bit set under a real network, in batches as training takes them."""
    workspace = Workspace(tmp_path_factory.mktemp("live"))
    make_generated("xray", workspace.data / "xray", images=24, size=(64, 64))
    extract(workspace, SPEC, "xray", ExtractOptions(dtype="fp32", batch_size=4, quiet=True, device="cpu"))
    return workspace


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The loss of every training step from here on."""
    noted: list[float] = []
    take = _Loop.take

    def noting(self: _Loop, *arguments: Any) -> None:
        take(self, *arguments)
        noted.append(float(self.losses[-1].sum()))

    monkeypatch.setattr(_Loop, "take", noting)
    return noted


def weights_of(workspace: Workspace, row: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load_file(workspace.probes / row["folder"] / "head.safetensors")


# ---- one loop --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_frozen_backbone_without_augmentation_trains_what_the_cache_trains(
    task: str, space: Workspace, losses: list[float]
) -> None:
    (cached,) = probe(space, task, options=options_for(task)).rows
    first = list(losses)
    losses.clear()
    (live,) = finetune(space, task, options=options_for(task, PLAIN)).rows
    assert losses == pytest.approx(first, rel=1e-4) and len(first) == STEPS
    for name, own in weights_of(space, cached).items():
        other = weights_of(space, live)[name]
        assert (own - other).norm() <= 1e-3 * own.norm() + 1e-6, name
    assert live["regime"] == "frozen-online" and live["augmentation"] is None and live["backbone_parameters"] == 0
    scores = [row["test"]["box"]["ap50"] if task != "semseg" else row["test"]["miou"] for row in (cached, live)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)


@pytest.mark.parametrize("loss_at", ["level", "image"])
def test_fine_tuning_in_few_large_operations_takes_the_same_steps(
    loss_at: str, space: Workspace, losses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(RECIPES["semseg"], iterations=3, evaluations=1, loss_at=loss_at)  # type: ignore[arg-type]
    options = replace(options_for("semseg", Tuning()), recipe=recipe)
    (row,) = finetune(space, "semseg", ("xray",), (), options).rows
    shutil.rmtree(space.probes / row["folder"])
    pieces = list(losses)
    losses.clear()
    monkeypatch.setattr(execution, "whole_batches", lambda device: True)
    finetune(space, "semseg", ("xray",), (), options)
    assert len(pieces) == 3 and losses == pytest.approx(pieces, rel=1e-3)


def test_one_training_takes_one_backbone_and_says_how_long_it_takes(
    space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, taken, said = list[str](), list[int](), list[str]()

    def loading(spec: BackboneSpec, *more: Any) -> Any:
        loaded.append(spec.label)
        return load_backbone(spec, *more)

    monkeypatch.setattr("featprobe.backbones.backbone.load_backbone", loading)
    advance = _Loop.advance

    def advancing(self: _Loop, *given: Any) -> Any:
        taken.append(self.step)
        return advance(self, *given)

    monkeypatch.setattr(_Loop, "advance", advancing)
    recipe = TrainRecipe(iterations=2, batch_size=2, evaluations=1)
    options = replace(options_for("semseg", Tuning(clip=0.9)), recipe=recipe)
    finetune(space, "semseg", options=options, say=said.append)
    assert loaded == ["tiny"] and taken == [0, 0, 1], "a step to foretell two"
    (line,) = said
    assert "tiny on xray, seed 0" in line and line.endswith("semseg linear, full, 2 iterations, under a minute on cpu")


def test_one_batch_that_is_swapped_does_not_pass_for_the_same(
    space: Workspace, losses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(options_for("semseg"), recipe=replace(RECIPES["semseg"], evaluations=1))
    probe(space, "semseg", options=options)
    first = list(losses)
    losses.clear()
    plain = LiveFeatures.training

    def swapped(self: LiveFeatures, orders: Any, first: int = 0) -> Any:
        every = list(orders)
        if len(every) > 5:  # not in the rehearsal
            every[2] = (every[2] + 1) % len(self.cache)
        yield from plain(self, every, first)

    monkeypatch.setattr(LiveFeatures, "training", swapped)
    finetune(space, "semseg", options=replace(options, tuning=PLAIN))
    assert losses[:2] == pytest.approx(first[:2], rel=1e-4)
    assert losses[2] != pytest.approx(first[2], rel=1e-4)


def test_the_full_regime_moves_the_backbone_and_keeps_it_beside_the_head(space: Workspace, tmp_path: Path) -> None:
    (row,) = finetune(space, "semseg", options=options_for("semseg", Tuning(), show=1)).rows
    folder = space.probes / row["folder"]
    fresh = load_backbone(SPEC).model.state_dict()
    tuned = load_file(folder / "backbone.safetensors")
    moved = {name for name, value in fresh.items() if not torch.equal(value, tuned[name])}
    norms = {name for name in fresh if ".bn" in name or name.startswith("bn")}
    assert moved and not moved & norms, "frozen BatchNorms stay what they were"
    assert row["regime"] == "full" and row["backbone_parameters"] > 7e4 and row["augmentation"]["defect"] == 0.7
    assert (folder / "sheet.png").is_file()
    _, card = load_head(folder)
    assert card["fingerprint"]["weights_sha256"] != row["weights_sha256"]
    (cache,), _ = find_caches(space, "semseg", (), ())
    tested = cache.usable("test").tolist()
    images = [Path(cache.data.root) / cache.rows[r].image for r in tested]
    assert predict(folder, images, tmp_path / "out", quiet=True).images == len(images)
    with pytest.raises(ProbeError, match="weights_sha256"):
        load_head(folder, cache.recipe)
    assert not list(space.probes.rglob("checkpoint*")), "nothing is left of an ended training"


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_fine_tuned_on_augmented_views(task: str, space: Workspace, losses: list[float]) -> None:
    tuning = Tuning(accumulate=2, ema=0.5, layer_decay=0.8)
    (row,) = finetune(space, task, options=options_for(task, tuning)).rows
    assert np.isfinite(losses).all() and len(losses) == STEPS
    assert row["tuning"]["ema"] == 0.5 and np.isfinite(list(row["val"].values())).all()


@pytest.mark.slow
def test_trials_have_a_backbone_each_and_the_best_is_kept(space: Workspace) -> None:
    options = options_for("semseg", Tuning(), lr=(1e-3, 1e-2))
    (row,) = finetune(space, "semseg", options=options).rows
    assert row["trials"] == 2
    curves = json.loads((space.probes / row["folder"] / "curves.json").read_text())
    ends = [c["curve"][-1]["scores"]["miou_foreground"] for c in curves]
    (chosen,) = [c for c in curves if c["chosen"]]
    assert chosen["curve"][-1]["scores"]["miou_foreground"] == max(ends)
    (alone,) = finetune(space, "semseg", options=replace(options, lr=(chosen["lr"],))).rows
    assert alone["test"]["miou"] == pytest.approx(row["test"]["miou"], abs=1e-6)


def test_a_training_may_start_from_a_saved_head(space: Workspace, losses: list[float]) -> None:
    (row,) = probe(space, "semseg", options=options_for("semseg")).rows
    losses.clear()
    start = str(space.probes / row["folder"])
    finetune(space, "semseg", options=options_for("semseg", replace(PLAIN, init_head=start)))
    head, _ = load_head(space.probes / row["folder"])
    (cache,), _ = find_caches(space, "semseg", (), ())
    ready = prepare(training_of(space, cache, "semseg", checked("semseg", options_for("semseg"))))
    batch = next(batches_of(ready.rows["train"], RECIPES["semseg"], 0))
    loss = ready.task.start([head.train()], fresh=False)
    with FeatureLoader(cache) as loader:
        ((_, features),) = list(loader.batches([batch]))
        assert losses[0] == pytest.approx(float(loss(features, batch).detach()), rel=1e-4)
    with pytest.raises(ProbeError, match="another head"):
        finetune(space, "semseg", options=options_for("semseg", replace(PLAIN, init_head=start), head="upsample"))


def test_no_training_starts_from_a_head_that_may_know_its_test_images(space: Workspace) -> None:
    rows = probe(space, "semseg", options=options_for("semseg", split="group:3")).rows
    start = str(space.probes / rows[0]["folder"])
    online = replace(PLAIN, init_head=start)
    (row,) = finetune(space, "semseg", options=options_for("semseg", online, split="group:3/1")).rows
    assert row["fold"] == 1
    for split in ("group:3/2", "own", "stratified"):
        with pytest.raises(ProbeError, match="may know its test images"):
            finetune(space, "semseg", options=options_for("semseg", online, split=split))


def test_an_image_that_changed_since_is_refused(space: Workspace, tmp_path: Path) -> None:
    (cache,), _ = find_caches(space, "semseg", (), ())
    path = Path(cache.data.root) / cache.rows[0].image
    kept = path.read_bytes()
    try:
        path.write_bytes(kept + b" ")
        with pytest.raises(DataError, match="not the image that"):
            finetune(space, "semseg", options=options_for("semseg", Tuning(clip=0.7)))
    finally:
        path.write_bytes(kept)


# ---- counterparts ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_without_arguments_the_missing_counterparts_are_trained_once(
    space: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace(tmp_path)
    workspace.cache.symlink_to(space.cache.resolve())
    with pytest.raises(ProbeError, match="no frozen result"):
        finetune(workspace)
    probe(workspace, "semseg", options=options_for("semseg", lr=(1e-3, 1e-2)))
    probe(workspace, "semseg", options=ProbeOptions(head="ridge", quiet=True))
    probe(workspace, "detect", options=options_for("detect"))
    said: list[str] = []
    finetune(workspace, options=ProbeOptions(quiet=True), say=said.append, dry_run=True)
    assert len(said) == 3 and "2 trainings" in said[-1] and "min" in said[-1]
    (cache,) = workspace.cache_files()
    for line, task in zip(said, ("semseg linear", "detect fcos"), strict=False):
        assert f"tiny on xray, seed 0 ({cache}): {task}, full" in line, line
    with monkeypatch.context() as patch:
        seconds = {"semseg": 90, "detect": 30}
        patch.setattr(agenda, "foreseen", lambda training: Forecast(0.0, seconds[training.task] / 2))
        finetune(workspace, options=ProbeOptions(quiet=True), say=said.append, dry_run=True)
    assert ["about 1.5 min" in said[3], "under a minute" in said[4], "about 2.0 min in all" in said[5]] == [True] * 3
    rows = finetune(workspace, options=ProbeOptions(quiet=True)).rows
    frozen = [r for r in read_rows(workspace.probes / "results.jsonl")[0] if r["regime"] == "frozen"]
    assert [(r["task"], r["recipe"]["lr"]) for r in rows] == [
        (r["task"], r["recipe"]["lr"]) for r in frozen if r["head"] != "ridge"
    ]
    state = workspace.probes / rows[0]["folder"] / "checkpoint0.pt"
    state.write_bytes(b"")  # as a kill between the row and its removal leaves it
    for dry_run in (True, False):
        with pytest.raises(ProbeError, match="has its counterpart"):
            finetune(workspace, options=ProbeOptions(quiet=True), dry_run=dry_run)
        assert state.exists() is dry_run
    (workspace.probes / rows[0]["folder"] / "backbone.safetensors").write_bytes(b"")  # as a loss of power may leave it
    (reason,) = [item.reason for item in load_results(workspace.probes)[1]]
    assert reason.endswith("Train it again:  featprobe finetune"), "with the rate that its frozen result has chosen"
    again = finetune(workspace, options=ProbeOptions(quiet=True)).rows
    assert [row["folder"] for row in again] == [rows[0]["folder"]] and not load_results(workspace.probes)[1]
    with pytest.raises(ProbeError, match="takes split from its frozen result"):
        finetune(workspace, options=ProbeOptions(split="group"))
    shutil.rmtree(workspace.probes / next(r["folder"] for r in frozen if r["task"] == "detect"))
    plain = finetune(workspace, options=ProbeOptions(quiet=True, tuning=Tuning(augment=False)))
    assert [r["task"] for r in plain.rows] == ["semseg"] and plain.rows[0]["augmentation"] is None
    assert any("left aside" in note for note in plain.notes)


def test_a_result_whose_cache_lacks_rows_by_now_is_left_aside_with_what_completes_it(
    space: Workspace, tmp_path: Path
) -> None:
    workspace = Workspace(tmp_path)
    shutil.copytree(space.cache, workspace.cache)
    probe(workspace, "semseg", options=options_for("semseg"))
    (path,) = workspace.cache_files()
    with CacheWriter(path) as writer:
        writer.mark_missing(0)
    with pytest.raises(ProbeError, match=r"left aside: .* 1 of 24 rows are missing\. To finish .*featprobe extract"):
        finetune(workspace, options=ProbeOptions(quiet=True))


def test_nothing_of_a_training_is_held_while_the_next_one_runs(
    space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = watch_memory(monkeypatch, finetune_module)
    recipe = TrainRecipe(iterations=1, batch_size=2, evaluations=1)
    options = replace(options_for("semseg", replace(PLAIN, workers=1)), recipe=recipe, seeds=2)
    assert len(finetune(space, "semseg", options=options).rows) == len(runs) == 2


def test_what_is_there_already_is_not_trained_again(space: Workspace) -> None:
    options = options_for("semseg", Tuning(clip=0.5))
    (row,) = finetune(space, "semseg", options=options).rows
    state = space.probes / row["folder"] / "checkpoint0.pt"
    state.write_bytes(b"")  # as a kill between the row and its removal leaves it
    finetune(space, "semseg", options=options, dry_run=True)
    assert state.exists()
    again = finetune(space, "semseg", options=options)
    assert not again.rows and any("there already" in note for note in again.notes) and not state.exists()


def test_weights_that_were_replaced_are_named_with_the_way_out(tmp_path: Path) -> None:
    """Two caches of one label: that of the weights of now is named beside that of the old ones, which is refused."""
    weights, workspace = tmp_path / "own.safetensors", Workspace(tmp_path)
    make_generated("xray", workspace.data / "xray", images=12, size=(32, 32))
    how, paths = ExtractOptions(size=(32, 32), levels=("stride8",), quiet=True, device="cpu"), []
    options = replace(options_for("semseg", Tuning()), recipe=replace(RECIPES["semseg"], iterations=2))
    for seed in (0, 1):
        save_file(load_backbone(replace(SPEC, seed=seed)).tensors(), weights)
        if paths:
            with pytest.raises(ProbeError, match=rf"remove this one:\n  featprobe extract .*\n  .*rm {paths[0]} --yes"):
                finetune(workspace, "semseg", options=options)
        paths.append(extract(workspace, replace(SPEC, source="file", weights=str(weights)), "xray", how).path)
    with pytest.raises(ProbeError, match=rf"{paths[1]} was made from .*\n  featprobe cache rm {paths[0]} --yes"):
        finetune(workspace, "semseg", options=options)


def test_options_that_would_change_nothing_are_refused() -> None:
    for idle in ({"ema": 0.9}, {"accumulate": 2}, {"bn": "train"}, {"backbone_lr": 1.0}):
        with pytest.raises(ProbeError, match="would change nothing"):
            Tuning(regime="frozen-online", **idle)  # type: ignore[arg-type]
    with pytest.raises(ProbeError, match="ema = 1"):
        Tuning(ema=1.0)


def test_a_backbone_moves_where_it_should_and_nowhere_else() -> None:
    backbone = load_backbone(SPEC, ["stride8"])
    backbone.unfreeze()
    moving = {name for name, p in backbone.model.named_parameters() if p.requires_grad}
    assert any("blocks.0" in name for name in moving) and not any("blocks.5" in name for name in moving)
    assert not any("classifier" in name or "bn" in name for name in moving)
    groups = backbone.parameter_groups(1.0, 0.1, layer_decay=0.5)
    assert sum(len(g["params"]) for g in groups) == len(moving) and len({g["lr"] for g in groups}) > 2
    backbone.unfreeze(batch_norm="train")
    backbone.train()
    before = backbone.model.bn1.running_mean.clone()  # type: ignore[union-attr,operator]
    backbone(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert not torch.equal(backbone.model.bn1.running_mean, before)  # type: ignore[union-attr,arg-type]
    with pytest.raises(BackboneError, match="twice"):
        backbone.unfreeze(batch_norm="train", checkpointing=True)


# ---- kills -----------------------------------------------------------------------------------------------------------

CHILD = """
import sys
import featprobe.stages.training.fit
featprobe.stages.training.fit.CHECKPOINT_SECONDS = 0.0
from pathlib import Path
from featprobe.kinds import TrainRecipe
from featprobe.stages.training.finetune import finetune
from featprobe.stages.training.probe_options import ProbeOptions, Tuning
from featprobe.stages.workspace import Workspace
recipe = TrainRecipe(iterations=12, batch_size=4, lr=1e-3, clip=10.0, evaluations=3)
tuning = Tuning(ema=0.9, accumulate=2)
options = ProbeOptions(head="fasterrcnn", recipe=recipe, width=16, seeds=1, quiet=True, device="cpu", tuning=tuning)
finetune(Workspace(sys.argv[1]), "detect", options=options)
"""


@pytest.mark.slow
def test_a_killed_training_ends_with_the_weights_of_one_that_was_not(space: Workspace, tmp_path: Path) -> None:
    ended = []
    for name, kills in (("whole", 0), ("killed", 2)):
        workspace = Workspace(tmp_path / name)
        workspace.root.mkdir()
        workspace.cache.symlink_to(space.cache.resolve())
        for _ in range(kills):
            kill_after_checkpoint(workspace)
        start(workspace).wait(timeout=300)
        ((row, *others), faults) = read_rows(workspace.probes / "results.jsonl")
        assert not others and not faults
        folder = workspace.probes / row["folder"]
        ended.append([load_file(folder / f"{part}.safetensors") for part in ("head", "backbone")])
        assert not list(folder.glob("checkpoint*"))
    for whole, killed in zip(*ended, strict=True):
        assert all(torch.equal(value, killed[name]) for name, value in whole.items())


def start(workspace: Workspace) -> Process:
    return Process(["-c", CHILD, workspace.root])


def kill_after_checkpoint(workspace: Workspace) -> None:
    """Kill a training some time after it has kept a state that no earlier one has."""
    before = {p: p.stat().st_mtime_ns for p in workspace.probes.rglob("checkpoint*.pt")}
    process = start(workspace)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        now = {p: p.stat().st_mtime_ns for p in workspace.probes.rglob("checkpoint*.pt")}
        if now and now != before:
            break
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(workspace.probes.rglob("checkpoint*.pt"))


# ---- views -----------------------------------------------------------------------------------------------------------


def recipe_for(frame: tuple[int, int], fit: str) -> FeatureRecipe:
    from helpers import recipe_of

    return replace(recipe_of(frame=frame), fit=fit, interpolation="bilinear")  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    size=st.tuples(st.integers(20, 90), st.integers(20, 90)),
    fit=st.sampled_from(["resize", "letterbox"]),
    corner=st.tuples(st.floats(0, 0.7), st.floats(0, 0.7)),
)
def test_masks_boxes_and_pixels_of_a_view_lie_on_each_other(
    seed: int, size: tuple[int, int], fit: str, corner: tuple[float, float]
) -> None:
    y, x = (int(c * s) for c, s in zip(corner, size, strict=True))
    height, width = max(6, size[0] // 4), max(6, size[1] // 4)
    mask = np.zeros(size, dtype=np.uint8)
    mask[y : y + height, x : x + width] = 1
    box = (float(x), float(y), float(min(x + width, size[1])), float(min(y + height, size[0])))
    thing = Instance(1, box, encode_rle(mask.astype(bool)))
    recipe, how = recipe_for((96, 64), fit), Augmentation(contrast=0.0, brightness=0.0)
    random = [np.random.default_rng(seed) for _ in range(2)]
    view = augment(mask.astype(np.float32), mask, (thing,), recipe, how, random[0], masks=True)
    assert view.image.shape == (3, 96, 64) and view.labels is not None and view.objects is not None
    inside = torch.zeros(96, 64, dtype=torch.bool)
    inside[: view.content[0], : view.content[1]] = True
    assert bool((view.labels[~inside] == 255).all()) and bool((view.labels[inside] < 2).all())
    bright = view.image[0] > 0.5
    assert float((bright ^ (view.labels == 1))[inside].float().mean()) < 0.06
    if len(view.objects.boxes):
        assert view.objects.masks is not None
        assert torch.equal(view.objects.masks[0] == 1, view.labels == 1)
        rows, columns = (view.labels == 1).nonzero().unbind(1)
        x1, y1, x2, y2 = view.objects.boxes[0].tolist()
        seen = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
        assert [x1, y1, x2, y2] == pytest.approx(seen, abs=1.01)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), shape=st.sampled_from(["bent", "ring", "two", "diagonal"]))
def test_objects_of_a_view_are_what_is_seen_of_them(seed: int, shape: str) -> None:
    y, x = np.mgrid[:80, :80]
    mask = {
        "bent": (x < 8) | (y > 72),
        "ring": np.abs(np.hypot(x - 40, y - 40) - 35) < 4,
        "two": (np.maximum(x, y) < 10) | (np.minimum(x, y) > 70),
        "diagonal": np.abs(x - y) < 4,
    }[shape]
    rows, columns = np.where(mask)
    box = (float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1))
    thing = Instance(1, box, encode_rle(mask))
    how = Augmentation(smallest=0.3)
    recipe = recipe_for((64, 64), "resize")
    unit = mask.astype(np.float32)
    for masks in (True, False):
        view = augment(unit, mask.astype(np.uint8), (thing,), recipe, how, np.random.default_rng(seed), masks=masks)
        assert view.objects is not None and view.labels is not None
        if len(view.objects.boxes):
            seen = (view.labels == 1).nonzero()
            tight = [*seen.amin(0).flip(0).tolist(), *(seen.amax(0).flip(0) + 1).tolist()]
            assert view.objects.boxes[0].tolist() == pytest.approx(tight, abs=1.01)
        elif bool((view.labels == 1).any()):
            assert len(view.objects.crowds) == 1, "a sliver is neither object nor background"


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), x=st.floats(0, 80), y=st.floats(0, 50), side=st.floats(1, 60))
def test_a_crop_that_is_to_hold_a_defect_holds_it(seed: int, x: float, y: float, side: float) -> None:
    size = (60, 100)
    box = (x, y, min(x + side, 100.0), min(y + side, 60.0))
    how = Augmentation(defect=1.0)
    random = np.random.default_rng(seed)
    top, left, height, width = choose_crop(size, None, (Instance(1, box),), how, random)
    assert 0 <= top <= size[0] - height and 0 <= left <= size[1] - width
    for low, length, begin, end in ((left, width, box[0], box[2]), (top, height, box[1], box[3])):
        shown = min(low + length, end) - max(low, begin)
        assert shown >= min(end - begin, length) - 1 - 1e-6, "whole, or as much of it as fits"


def test_grey_levels_of_16_bits_stay_apart_in_a_view() -> None:
    ramp = np.linspace(0.2, 0.6, 64 * 64, dtype=np.float32).reshape(64, 64)
    how = Augmentation(smallest=1.0, hflip=0.0, vflip=0.0)
    view = augment(ramp, None, None, recipe_for((64, 64), "resize"), how, np.random.default_rng(0))
    assert len(torch.unique(view.image[0])) > 4000


@pytest.mark.parametrize("policy", ["log", "percentile:1:99:image"])
def test_every_reader_of_an_image_keeps_to_the_policy(tmp_path: Path, policy: str, losses: list[float]) -> None:
    """Extraction, live training, prediction and pictures: one intensity policy, which the card tells."""
    workspace = Workspace(tmp_path)
    make_generated("xray", workspace.data / "xray", images=12, size=(32, 32))
    data = ExtractOptions(dtype="fp32", batch_size=4, quiet=True, intensity=policy, device="cpu")
    cache = open_cache(extract(workspace, SPEC, "xray", data).path)
    plain = open_cache(extract(workspace, SPEC, "xray", replace(data, intensity=None)).path)
    full = str(Intensity.parse(policy))
    assert cache.recipe.intensity == full and cache.recipe.key != plain.recipe.key
    assert (cache.recipe.window is None) == policy.endswith("image")
    level = cache.levels[0]
    assert not np.allclose(cache.read_row(0, level), plain.read_row(0, level), rtol=1e-2)
    plain.path.unlink()
    (cached,) = probe(workspace, "semseg", options=options_for("semseg", show=1)).rows
    first = list(losses)
    losses.clear()
    finetune(workspace, "semseg", options=options_for("semseg", PLAIN))
    assert losses == pytest.approx(first, rel=1e-4)
    folder = workspace.probes / cached["folder"]
    predictor = Predictor(folder, device="cpu")
    assert predictor.card["fingerprint"]["intensity"] == full
    row = cache.rows[0]
    image = Path(cache.data.root) / row.image
    unit = to_unit(read_levels(image), cache.recipe.window, Intensity.parse(policy))
    assert np.array_equal(predictor.picture(image), unit)
    seen: list[Any] = []
    predictor.head.register_forward_pre_hook(lambda head, arguments: seen.append(arguments[0].maps))
    predictor.predict([(image, "a")])
    for own in cache.levels:
        there = torch.from_numpy(cache.read_row(0, own).copy())
        assert torch.allclose(seen[0][own.name][0], there, atol=1e-4 * float(there.abs().max()))
    with Image.open(folder / "sheet.png") as sheet:
        shown = np.asarray(sheet)
    names = [cache.rows[i] for i in cache.usable("test")]
    tiles = [draw_panel(Panel(predictor.picture(Path(cache.data.root) / own.image)), TILE) for own in names]
    corner = shown[LINE + GAP : LINE + GAP + TILE, GAP : GAP + TILE]
    assert any(np.array_equal(corner, np.asarray(tile)) for tile in tiles)
