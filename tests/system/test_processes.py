"""Two real processes against one: losses, gradients, moments, trainings, scores, and a job whose process fails."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import launch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from featprobe import processes
from featprobe.backbones.backbone import load_backbone
from featprobe.cache import Cache
from featprobe.cache.reader import FeatureLoader
from featprobe.errors import BackboneError, DivergedError, ProbeError
from featprobe.features import Features, cell_shares
from featprobe.kinds import KINDS, TrainRecipe
from featprobe.levels import FeatureLevel
from featprobe.metrics.defects.records import Records
from featprobe.probes import (
    HeadRecipe,
    LinearBank,
    LinearHead,
    ObjectTarget,
    build_head,
    image_loss,
    level_loss,
    load_head,
    plain,
)
from featprobe.probes.saved import Checkpoint, read_card, read_rows
from featprobe.probes.train import _Loop, train
from featprobe.result_rows import ResultRow
from featprobe.specs import BackboneSpec
from featprobe.stages.extraction.extract import extract
from featprobe.stages.extraction.extract_options import ExtractOptions
from featprobe.stages.partition import Partition
from featprobe.stages.recording.record_file import RECORDS, read_records
from featprobe.stages.recording.rescore import rescore
from featprobe.stages.training import fit
from featprobe.stages.training.finetune import finetune
from featprobe.stages.training.prepared import Prepared, prepare
from featprobe.stages.training.probe import checked, find_caches, probe
from featprobe.stages.training.probe_options import ProbeOptions, Tuning
from featprobe.stages.training.training import Training
from featprobe.stages.workspace import Workspace, make_generated

CPU = torch.device("cpu")
LEVELS = tuple(FeatureLevel(f"stride{s}", c, s) for s, c in ((4, 5), (8, 7), (16, 11)))
FRAME, IMAGES, CLASSES = (64, 96), 4, 3
SPEC = BackboneSpec("tiny", "test_efficientnet", "random", arguments=("--backbone", "tiny", "--random-init"))
DETECT = TrainRecipe(iterations=6, batch_size=4, lr=2e-3, clip=10.0, evaluations=1)
LIVE = TrainRecipe(iterations=6, batch_size=4, lr=1e-3, evaluations=1)


def prepared(space: Workspace, cache: Cache, task: str, options: ProbeOptions) -> Prepared:
    """The training of seed 0 with its labels read."""
    return prepare(Training(space, Partition(cache, options.choice), task, options, (0,)))


def torchrun(program: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a program in two processes on the CPU, by torchrun itself, which ends all when one fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with an exact cache of a small 16-bit set, whose test images fill two evaluation batches."""
    workspace = Workspace(tmp_path_factory.mktemp("several"))
    make_generated("xray", workspace.data / "xray", images=48, size=(64, 64))
    extract(workspace, SPEC, "xray", ExtractOptions(dtype="fp32", batch_size=4, quiet=True))
    return workspace


def beside(space: Workspace, folder: Path) -> Workspace:
    """A workspace of its own on the same cache."""
    folder.mkdir()
    (folder / "cache").symlink_to(space.cache.resolve())
    return Workspace(folder)


def only_row(workspace: Workspace) -> tuple[dict[str, Any], Path]:
    """The one result of a workspace, and its folder."""
    ((row, *others), faults) = read_rows(workspace.probes / "results.jsonl")
    assert not others and not faults
    return row, workspace.probes / row["folder"]


def records_of(folder: Path) -> Records:
    """The records beside a head."""
    return read_records(folder, read_card(folder)["head_sha256"])


def largest_difference(one: Path, other: Path) -> float:
    """Between the tensors of two files."""
    first, second = load_file(one), load_file(other)
    assert set(first) == set(second)
    return max(float((value - second[name]).abs().max()) for name, value in first.items())


# ---- trainings -------------------------------------------------------------------------------------------------------


def test_two_processes_train_the_head_that_one_trains_and_score_each_image_once(
    space: Workspace, tmp_path: Path
) -> None:
    one, two = beside(space, tmp_path / "one"), beside(space, tmp_path / "two")
    recipe = replace(KINDS["semseg", "linear"].recipe, iterations=20, batch_size=5)
    probe(one, "semseg", options=ProbeOptions(recipe=recipe, seeds=1, quiet=True))
    asked = ["probe", "--iterations", "20", "--batch-size", "5", "--seeds", "1", "--show", "2", "--json"]
    ended = launch(["-m", "featprobe", "--workspace", str(two.root), *asked])
    assert ended.returncode == 0, ended.stderr
    (row, own), (same, other) = only_row(one), only_row(two)
    (printed,) = json.loads(ended.stdout)  # once, by the main process
    assert printed["folder"] == row["folder"] == same["folder"] and same["processes"] == 2
    assert (other / "sheet.png").is_file() and not list(two.probes.rglob("*.tmp"))
    assert largest_difference(own / "head.safetensors", other / "head.safetensors") <= 1e-5
    with np.load(own / "scores.npz") as wanted, np.load(other / "scores.npz") as found:
        assert len(wanted["ids"]) > 8, "more than one evaluation batch"
        for name in ("ids", "groups", "confusion"):
            assert np.array_equal(wanted[name], found[name]), name
    assert {**row["test"], **row["val"]} == {**same["test"], **same["val"]}
    mine, theirs = records_of(own), records_of(other)
    assert mine.images.ids == theirs.images.ids and mine.about.base == theirs.about.base
    assert np.array_equal(mine.calls.image, theirs.calls.image) and np.array_equal(mine.finds, theirs.finds)
    np.testing.assert_allclose(mine.defects.score, theirs.defects.score, atol=1e-4)
    losses = [[p["loss"] for p in json.loads((f / "curves.json").read_text())[0]["curve"]] for f in (own, other)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_two_processes_share_out_what_an_anomaly_head_is_scored_on(space: Workspace, tmp_path: Path) -> None:
    """One process fits it; scores, counts of pixels and thresholds come from both."""
    one, two = beside(space, tmp_path / "one"), beside(space, tmp_path / "two")
    asked = ["probe", "--task", "anomaly", "--head", "gaussian", "--device", "cpu", "--json"]
    ended = launch(["-m", "featprobe", "--workspace", str(two.root), *asked])
    assert ended.returncode == 0, ended.stderr
    probe(one, "anomaly", options=ProbeOptions(head="gaussian", device="cpu", quiet=True))
    (row, own), (same, other) = only_row(one), only_row(two)
    assert same["processes"] == 2 and row["test"] == same["test"] and row["val"] == same["val"]
    for name in ("head.safetensors", RECORDS):
        assert (own / name).read_bytes() == (other / name).read_bytes()
    with np.load(own / "scores.npz") as wanted, np.load(other / "scores.npz") as found:
        assert len(wanted["ids"]) > 8 and set(wanted) == set(found)
        assert all(np.array_equal(wanted[name], found[name]) for name in wanted)
    assert (own / RECORDS).read_bytes() == (other / RECORDS).read_bytes()


IMAGE_LABELS = """
import sys
from pathlib import Path
from featprobe.kinds import TrainRecipe
from featprobe.stages.training.finetune import finetune
from featprobe.stages.training.probe import probe
from featprobe.stages.training.probe_options import ProbeOptions, Tuning
from featprobe.stages.workspace import Workspace
workspace = Workspace(Path(sys.argv[1]))
probe(workspace, "classify", options=ProbeOptions(labels="defect", split="group", quiet=True, device="cpu", show=2))
recipe = TrainRecipe(iterations=3, batch_size=4, lr=1e-3, evaluations=1)
options = ProbeOptions(
    recipe=recipe, seeds=1, labels="defect", split="group", quiet=True, device="cpu", show=2, tuning=Tuning()
)
finetune(workspace, "classify", options=options)
"""


def test_two_processes_solve_and_fine_tune_heads_of_images_as_one_does(space: Workspace, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(IMAGE_LABELS)
    found = []
    for count in (1, 2):
        own = beside(space, tmp_path / str(count))
        ended = launch([str(tmp_path / "program.py"), str(own.root)], count=count)
        assert ended.returncode == 0, ended.stderr
        rows, faults = read_rows(own.probes / "results.jsonl")
        assert [(row["regime"], row["processes"]) for row in rows] == [
            ("frozen", count),
            ("full", count),
        ] and not faults
        assert len(list(own.probes.rglob("sheet.png"))) == 2, "the main process draws, and waits for nobody"
        found.append((own, rows))
    (one, first), (two, second) = found
    for row, same in zip(first, second, strict=True):
        heads = [space.probes / own["folder"] / "head.safetensors" for space, own in ((one, row), (two, same))]
        assert largest_difference(*heads) <= 1e-4
        files = [np.load(head.parent / "scores.npz") for head in heads]
        assert np.array_equal(files[0]["ids"], files[1]["ids"]) and len(files[0]["ids"]) > 8
        assert files[0]["probabilities"] == pytest.approx(files[1]["probabilities"], abs=1e-3)


DETECTIONS = """
import sys
from pathlib import Path
from featprobe.kinds import TrainRecipe
from featprobe.stages.training.finetune import finetune
from featprobe.stages.training.probe import probe
from featprobe.stages.training.probe_options import ProbeOptions
from featprobe.stages.workspace import Workspace
workspace = Workspace(Path(sys.argv[1]))
recipe = TrainRecipe(iterations=6, batch_size=4, lr=2e-3, clip=10.0, evaluations=1)
(row,) = probe(workspace, "detect", options=ProbeOptions(recipe=recipe, width=16, seeds=1, quiet=True)).rows
probe(workspace, "semseg", options=ProbeOptions(head="ridge", quiet=True))
(full,) = finetune(workspace, options=ProbeOptions(quiet=True)).rows
assert (row["regime"], full["regime"], full["head"]) == ("frozen", "full", "fcos")
"""


def test_predictions_of_two_processes_are_complete_and_counterparts_are_found(space: Workspace, tmp_path: Path) -> None:
    one, two = beside(space, tmp_path / "one"), beside(space, tmp_path / "two")
    (tmp_path / "program.py").write_text(DETECTIONS)
    ended = launch([str(tmp_path / "program.py"), str(two.root)])
    assert ended.returncode == 0, ended.stderr
    rows, faults = read_rows(two.probes / "results.jsonl")
    assert [(r["head"], r["regime"]) for r in rows] == [("fcos", "frozen"), ("ridge", "frozen"), ("fcos", "full")]
    assert not faults and all(row["processes"] == 2 for row in rows)
    folder = two.probes / rows[0]["folder"]
    found = json.loads((folder / "predictions.json").read_text())
    head, _ = load_head(folder)
    (cache,), _ = find_caches(one, "detect", (), ())
    options = checked("detect", ProbeOptions(recipe=DETECT, width=16, device="cpu"))
    ready = prepared(one, cache, "detect", options)
    with FeatureLoader(cache) as loader:
        (outcome,) = ready.task.evaluate([head], loader.batches, ready.rows["test"])
    assert found == json.loads(outcome.files["predictions.json"]), "those of the same head in one process, in order"
    assert (folder / "truth.json").read_bytes() == outcome.files["truth.json"]
    assert rows[0]["test"] == json.loads(json.dumps(plain(outcome.scores)))
    tested = [cache.image_id(r) for r in ready.rows["test"].tolist()]
    assert list(dict.fromkeys(p["image_id"] for p in found)) == tested, "each image, and each in one place"
    (alone,) = probe(one, "semseg", options=ProbeOptions(head="ridge", quiet=True)).rows
    assert alone["test"] == rows[1]["test"] and alone["ridge"] == rows[1]["ridge"]
    kept = [(two.probes / row["folder"] / RECORDS).read_bytes() for row in rows[:2]]
    assert rescore(two, [ResultRow.from_json(row) for row in rows[:2]], device="cpu", quiet=True) == []
    assert [(two.probes / row["folder"] / RECORDS).read_bytes() for row in rows[:2]] == kept, "by one process alone"


STOPPED = """
import sys
from pathlib import Path
from featprobe.kinds import TrainRecipe
from featprobe.errors import ProbeError
from featprobe.probes.saved import Checkpoint
from featprobe.processes import is_main
from featprobe.stages.training import fit
from featprobe.stages.training.finetune import finetune
from featprobe.stages.training.live import LiveFeatures
from featprobe.stages.training.probe_options import ProbeOptions, Tuning
from featprobe.stages.workspace import Workspace
fit.CHECKPOINT_SECONDS = 0.0
framed = LiveFeatures._augmented
def failing(self, row, number, place):
    if number >= 4 and place >= 2:  # which the second process alone comes to
        assert not is_main()
        raise ProbeError("the image of one process alone")
    return framed(self, row, number, place)
LiveFeatures._augmented = failing
recipe = TrainRecipe(iterations=6, batch_size=4, lr=1e-3, evaluations=1)
options = ProbeOptions(recipe=recipe, seeds=1, quiet=True, tuning=Tuning(ema=0.5))
finetune(Workspace(Path(sys.argv[1])), "semseg", options=options)
"""


def test_a_process_that_fails_ends_the_job_and_one_process_goes_on_from_its_state(
    space: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "checkpoint_of", every_step(fit.checkpoint_of))
    one, two = beside(space, tmp_path / "one"), beside(space, tmp_path / "two")
    program = STOPPED.replace("finetune(Workspace", f"{EVERY_STEP}\nfinetune(Workspace")
    (tmp_path / "program.py").write_text(program)
    ended = torchrun([str(tmp_path / "program.py"), str(two.root)])
    assert ended.returncode != 0 and "the image of one process alone" in ended.stderr
    (kept,) = two.probes.rglob("checkpoint0.pt")
    step = torch.load(kept, weights_only=True)["state"]["step"]
    assert 0 < step < LIVE.iterations and not (two.probes / "results.jsonl").exists()
    options = ProbeOptions(recipe=LIVE, seeds=1, quiet=True, tuning=Tuning(ema=0.5))
    taken: list[int] = []
    take = _Loop.take
    monkeypatch.setattr(_Loop, "take", lambda self, *given: (take(self, *given), taken.append(self.step)))
    finetune(two, "semseg", options=options)
    assert taken == list(range(step + 1, LIVE.iterations + 1)), "only what was left"
    finetune(one, "semseg", options=options)
    (_, own), (row, other) = only_row(one), only_row(two)
    assert row["processes"] == 1 and not list(other.glob("checkpoint*"))
    for part in ("head", "backbone"):
        first, second = (load_file(f / f"{part}.safetensors") for f in (own, other))
        for name, value in first.items():
            assert (value.double() - second[name].double()).norm() <= 5e-3 * value.double().norm() + 1e-4, name


EVERY_STEP = """
make = fit.checkpoint_of
def every_step(prepared, index, *, rehearsal=False):
    checkpoint = make(prepared, index, rehearsal=rehearsal)
    checkpoint.every = 1
    return checkpoint
fit.checkpoint_of = every_step
"""


def every_step(make: Callable[..., Checkpoint | None]) -> Callable[..., Checkpoint | None]:
    """Checkpoints that keep every step."""

    def made(prepared: Prepared, index: int, *, rehearsal: bool = False) -> Checkpoint | None:
        checkpoint = make(prepared, index, rehearsal=rehearsal)
        assert checkpoint is not None
        checkpoint.every = 1
        return checkpoint

    return made


# ---- parts of a batch ------------------------------------------------------------------------------------------------


def test_losses_gradients_and_moments_of_parts_are_those_of_the_whole_batch() -> None:
    ended = launch([str(Path(__file__))])
    assert ended.returncode == 0, ended.stderr
    assert sorted(ended.stdout.split()) == sorted(2 * list(CASES)), "each process has compared each case"


def features_of(dtype: torch.dtype) -> Features:
    """A batch whose images differ in size, on a backbone that learns."""
    rng = torch.Generator().manual_seed(0)
    maps = {v.name: (1 + 2 * torch.randn(IMAGES, v.channels, *v.cells(FRAME), generator=rng)).to(dtype) for v in LEVELS}
    content = torch.tensor([[64, 96], [40, 96], [64, 60], [30, 80]], dtype=torch.int32)
    return Features({name: m.requires_grad_() for name, m in maps.items()}, FRAME, content)


def part_of(features: Features, own: slice) -> Features:
    maps = {name: m.detach()[own].requires_grad_(m.requires_grad) for name, m in features.maps.items()}
    assert features.content is not None
    return Features(maps, FRAME, features.content[own])


def labels_of() -> Tensor:
    """Labels of which the second process has few: one of its images is ignored throughout."""
    labels = torch.randint(0, CLASSES, (IMAGES, *FRAME), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    labels[2] = 255
    labels[3, :50] = 255
    return labels


def targets_of(*, crowded: bool) -> list[ObjectTarget]:
    """Objects of which the second process has fewer; or none, and not even background."""
    box = torch.tensor([[3.0, 4.0, 21.0, 20.0], [12.0, 16.0, 42.0, 38.0], [30.0, 6.0, 50.0, 30.0]])
    found = []
    for image, count in enumerate([3, 1, 0, 0 if crowded else 1]):
        masks = torch.zeros(count, *FRAME, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, box[:count].long().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        crowd = torch.tensor([[0.0, 0.0, FRAME[1], FRAME[0]]])[: int(crowded and image > 1)]
        found.append(ObjectTarget(box[:count], torch.arange(count) % (CLASSES - 1) + 1, masks, crowd))
    return found


class FirstSampler(BalancedPositiveNegativeSampler):
    """The first of the positive and negative examples, and not any of them."""

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        found: tuple[list[Tensor], list[Tensor]] = ([], [])
        for labels in matched_idxs:
            most = int(self.batch_size_per_image * self.positive_fraction)
            positive = (labels >= 1).nonzero()[:most, 0]
            negative = (labels == 0).nonzero()[: self.batch_size_per_image - len(positive), 0]
            for own, chosen in zip(found, (positive, negative), strict=True):
                own.append(torch.zeros_like(labels, dtype=torch.uint8).index_fill(0, chosen, 1))
        return found


Case = Callable[[Features, slice], Tensor]


def dense(kind: str, loss: str, loss_at: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Case]:
    """A segmentation head, and its loss on some of the images."""
    head = build_head(HeadRecipe("semseg", kind, ("a", "b", "c"), width=8), LEVELS).to(dtype)
    weights = torch.tensor([0.5, 1.0, 2.0], dtype=dtype)

    def case(features: Features, own: slice) -> Tensor:
        logits, labels = head(features), labels_of()[own]
        if loss_at == "image":
            return image_loss(logits, labels, weights, loss)
        return level_loss(logits, cell_shares(labels, CLASSES, 4).to(dtype), weights, loss)

    return head, case


def banked(*, padded: bool, loss_at: str = "level") -> tuple[nn.Module, Case]:
    """Two linear heads as a bank; at the level, without padding, in its fused form."""
    heads = nn.ModuleList(LinearHead(LEVELS, CLASSES).double() for _ in range(2))

    def case(features: Features, own: slice) -> Tensor:
        frozen = {name: m.detach() for name, m in features.maps.items()}
        features = Features(frozen, FRAME, features.content if padded else None)
        bank = LinearBank(list(heads))  # type: ignore[arg-type]
        if loss_at == "image":  # computed again on the way back, sums over processes too
            every = [checkpoint(image_loss, z, labels_of()[own], use_reentrant=False) for z in bank.logits(features)]
            return torch.stack(every).sum()
        return bank.loss(features, cell_shares(labels_of()[own], CLASSES, 4).double()).sum()

    return heads, case


def objects(task: str, kind: str, *, crowded: bool = False) -> tuple[nn.Module, Case]:
    """A detection or instance head, and its loss on some of the images."""
    head = build_head(HeadRecipe(task, kind, ("a", "b", "c"), width=8, sides=(18.0, 22.0, 30.0)), LEVELS)
    for part in (getattr(head, "rpn", None), getattr(head, "regions", None)):
        if part is not None:
            sampler = part.fg_bg_sampler
            part.fg_bg_sampler = FirstSampler(sampler.batch_size_per_image, sampler.positive_fraction)

    def case(features: Features, own: slice) -> Tensor:
        return head(features, targets_of(crowded=crowded)[own])

    return head, case


CASES: dict[str, Callable[[], tuple[nn.Module, Case]]] = {
    "linear-ce-level": lambda: dense("linear", "ce", "level"),
    "linear-ce-image": lambda: dense("linear", "ce", "image"),
    "linear-sum-image": lambda: dense("linear", "ce+dice+focal", "image"),
    "upsample-sum-level": lambda: dense("upsample", "ce+dice+focal", "level"),
    "bank-fused": lambda: banked(padded=False),
    "bank-padded": lambda: banked(padded=True),
    "bank-image": lambda: banked(padded=True, loss_at="image"),
    "fcos": lambda: objects("detect", "fcos"),
    "fcos-crowded": lambda: objects("detect", "fcos", crowded=True),
    "fasterrcnn": lambda: objects("detect", "fasterrcnn"),
    "maskrcnn": lambda: objects("instseg", "maskrcnn"),
    "maskrcnn-crowded": lambda: objects("instseg", "maskrcnn", crowded=True),
}


def compute(name: str, own: slice) -> dict[str, Tensor | None]:
    """The loss of some images, its gradients, and the head's moments after it."""
    torch.manual_seed(0)
    head, case = CASES[name]()
    head.train()
    features = part_of(features_of(next(head.parameters()).dtype), own)
    loss = case(features, slice(own.start, own.stop))
    loss.backward()
    processes.sum_gradients(head.parameters())
    found: dict[str, Tensor | None] = {"loss": processes.summed(loss.detach())}
    found |= {f"gradient of {n}": p.grad for n, p in head.named_parameters()} | dict(head.named_buffers())
    return found | {f"gradient of the map {n}": m.grad for n, m in features.maps.items()}


def compare() -> None:
    """In each process: the whole batch alone, then its part together with the other process."""
    whole = {name: compute(name, slice(0, IMAGES)) for name in CASES}
    with processes.together(CPU):
        own = processes.own_part(IMAGES)
        assert (processes.count(), own.stop - own.start) == (2, 2)
        for name, wanted in whole.items():
            for what, found in compute(name, own).items():
                value = wanted[what]
                if value is not None and what.startswith("gradient of the map"):
                    value = value[own]
                assert (found is None) == (value is None), f"{name}: {what}"
                if found is not None and value is not None:
                    exact = found.dtype == torch.float64
                    error = float((found - value).norm())
                    assert error <= (1e-9 if exact else 1e-4) * float(value.norm()) + (1e-12 if exact else 1e-6), (
                        f"{name}: {what}: {error}"
                    )
            sys.stdout.write(f"{name}\n")
            sys.stdout.flush()
        check_sums()


def check_sums() -> None:
    """What has no gradient anywhere keeps none; things come in the order of the processes; all diverge at once."""
    main = processes.is_main()
    first, second, idle = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    first.grad = torch.ones(2) if main else None
    second.grad = torch.full((2,), 1.0 if main else 2.0)
    processes.sum_gradients([first, second, idle])
    assert idle.grad is None and first.grad is not None
    assert first.grad.tolist() == [1.0, 1.0] and second.grad.tolist() == [3.0, 3.0]
    assert processes.gathered(["a", "b"] if main else []) == ["a", "b"]
    assert processes.from_main(lambda: "main" if main else "other") == "main"
    rows, head = np.arange(4), nn.Linear(1, 1)

    def feed(orders: Any, number: int) -> Iterator[tuple[Any, Features]]:
        for order in orders:
            part = torch.zeros(2, 1, 1, 1)
            yield order[processes.own_part(len(order))], Features({"stride8": part}, (8, 8))

    def loss(features: Features, own: Any) -> Tensor:
        return head(torch.zeros(1, 1)).sum()[None] * (float("nan") if 3 in own else 1.0)

    try:
        train([head], [TrainRecipe(iterations=1, batch_size=4)], feed, rows, loss, 0, lambda: [{}])  # type: ignore[arg-type]
    except DivergedError:
        return
    raise AssertionError("a loss that is not finite in one process is not finite in any")


# ---- one process as one of several -----------------------------------------------------------------------------------


@given(total=st.integers(0, 60), count=st.integers(1, 9))
def test_parts_are_whole_and_even(total: int, count: int) -> None:
    parts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "_count", count)
        for rank in range(count):
            patch.setattr(processes, "_rank", rank)
            parts.append(list(range(total))[processes.own_part(total)])
    assert [thing for part in parts for thing in part] == list(range(total))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_what_several_processes_can_not_do_is_refused_before_anything_is_trained(
    space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache,), _ = find_caches(space, "semseg", (), ())
    backbone = load_backbone(SPEC)
    monkeypatch.setattr(processes, "_count", 3)
    for options, words in (
        (ProbeOptions(recipe=replace(LIVE, batch_size=2)), "2 images can't be cut for 3 processes"),
        (ProbeOptions(recipe=LIVE, tuning=Tuning(accumulate=2)), "3 processes in 2 parts"),
    ):
        with pytest.raises(ProbeError, match=words):
            prepared(space, cache, "semseg", checked("semseg", options))
    with pytest.raises(ProbeError, match="SyncBatchNorm"):
        backbone.unfreeze(batch_norm="train")
    backbone.unfreeze(batch_norm="frozen")
    processes.check_norms(backbone.train())
    with pytest.raises(ProbeError, match="at least 3 images"):
        processes.check_batch(2, 1)


def test_a_device_that_processes_can_not_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for device in ("mps", "cuda:0", "cuda:1"):
        with pytest.raises(BackboneError, match=r"cuda:1\n  found   1 GPUs"), processes.together(torch.device(device)):
            pass
    assert processes.count() == 1


def test_processes_that_would_each_train_everything_are_refused(
    space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache,), _ = find_caches(space, "semseg", (), ())
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ProbeError, match="process 1 of 2"):
        prepared(space, cache, "semseg", checked("semseg", ProbeOptions()))


if __name__ == "__main__":
    compare()
