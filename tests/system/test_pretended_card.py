"""The ways that a card takes, on a card that is pretended: where none is, they run too. See pretend_card.py."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pretend_card
import pytest
import torch
from helpers import stored, training_of
from overhead import Pyramid
from pretend_card import Card, CardError, pretended
from safetensors.torch import load_file

from featprobe.cache import open_cache, reader, verify
from featprobe.kinds import KINDS, TrainRecipe
from featprobe.probes.train import train
from featprobe.specs import BackboneSpec
from featprobe.stages.extraction import pipeline
from featprobe.stages.extraction.decoding import Decoders
from featprobe.stages.extraction.extract import extract
from featprobe.stages.extraction.extract_options import ExtractOptions
from featprobe.stages.extraction.make_cache import extract_with
from featprobe.stages.predict import predict
from featprobe.stages.training.finetune import finetune
from featprobe.stages.training.prepared import keep_on_device, placed, prepare, source_of, trials_of
from featprobe.stages.training.probe import checked, probe
from featprobe.stages.training.probe_options import ProbeOptions, Tuning
from featprobe.stages.workspace import Workspace, make_generated

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or not hasattr(torch._C, "_ensureCUDADeviceGuardSet"),
    reason="there is a card, or this torch can't go without one",
)
SPEC = BackboneSpec("tiny", "test_efficientnet", "random", arguments=("--backbone", "tiny", "--random-init"))
FRAMES: dict[str, dict[str, Any]] = {"whole": {}, "padded": {"fit": "letterbox", "size": (64, 96)}}
TRAINED = [
    ("semseg", "linear", "padded", {"loss_at": "image"}, ()),
    ("semseg", "linear", "padded", {"loss_at": "level", "clip": 1.0}, ()),
    ("semseg", "linear", "whole", {"loss": "ce+dice"}, ()),
    ("semseg", "linear", "padded", {}, (1e-2, 1e-3)),
    ("semseg", "upsample", "padded", {}, ()),
    ("detect", "fcos", "padded", {}, ()),
    ("detect", "fasterrcnn", "whole", {}, ()),
    ("instseg", "maskrcnn", "padded", {}, ()),
]
"""Task, head, frames, changes of its recipe, learning rates that are tried at once."""
SOLVED = [own for own in KINDS if own not in {(task, head) for task, head, *_ in TRAINED}]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """There is a card, whose random numbers begin alike; a step is recorded after one that is not."""
    with pretended():
        monkeypatch.setattr("featprobe.probes.train.WARM_UP", 1)
        pretend_card.generator.manual_seed(0)
        yield


@pytest.fixture(scope="module")
def spaces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Workspace]:
    """For images that fill their frames, and for others, a workspace with a cache."""
    found = {}
    for name, how in FRAMES.items():
        found[name] = Workspace(tmp_path_factory.mktemp(name))
        make_generated("xray", found[name].data / "xray", images=16, size=(64, 64))
        data, cpu = found[name].data_set("xray"), torch.device("cpu")
        extract_with(found[name], Pyramid(), data, ExtractOptions(quiet=True, **how), cpu)  # type: ignore[arg-type]
    return found


def options_of(task: str, head: str, **how: Any) -> ProbeOptions:
    """A narrow head on the pretended card, one seed."""
    objects: dict[str, Any] = {"instances": "components"} if task in ("detect", "instseg") else {}
    width = 8 if KINDS[task, head].width else None
    return ProbeOptions(**{"head": head, "seeds": 1, "quiet": True, "device": "cuda", "width": width, **objects, **how})


def trained(workspace: Workspace, task: str, head: str, **how: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The row and the weights of a training."""
    (row,) = probe(workspace, task, options=options_of(task, head, **how)).rows
    return row, load_file(workspace.probes / row["folder"] / "head.safetensors")


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(("task", "head", "frames", "changes", "rates"), TRAINED)
def test_a_recorded_step_trains_what_plain_steps_train_of_features_that_stream_or_lie_there(
    task: str,
    head: str,
    frames: str,
    changes: dict[str, Any],
    rates: tuple[float, ...],
    spaces: dict[str, Workspace],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Replays read and write the same memory: a number of the host that a step keeps would show as other weights.

    Recorded steps read features that lie on the card or, padded ones, that stream; plain steps the other way round.
    """
    recipe = replace(KINDS[task, head].recipe, iterations=3, batch_size=2, evaluations=2, **changes)
    replays: list[int] = []
    real = pretend_card.Graph.replay
    monkeypatch.setattr(pretend_card.Graph, "replay", lambda self: (replays.append(len(self.steps)), real(self)))
    shares = (0.5, 0.0) if frames == "whole" else (0.0, 0.5)  # of the memory, for features
    monkeypatch.setattr(reader, "DEVICE_SHARE", shares[0])
    row, recorded = trained(spaces[frames], task, head, recipe=recipe, lr=rates)
    assert len(replays) >= 2 and set(pretend_card.Recording.modes) == {"thread_local"}
    done = len(replays)
    monkeypatch.setenv("FEATPROBE_RECORD", "0")
    monkeypatch.setattr(reader, "DEVICE_SHARE", shares[1])
    pretend_card.generator.manual_seed(0)
    other, anew = trained(spaces[frames], task, head, recipe=recipe, lr=rates)
    assert len(replays) == done
    assert all(torch.equal(value, anew[name]) for name, value in recorded.items())
    assert row["test"] == other["test"] and row["val"] == other["val"]


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(("task", "head"), SOLVED)
def test_heads_that_are_solved_score_as_on_a_cpu(task: str, head: str, spaces: dict[str, Workspace]) -> None:
    labels = {"labels": "defect"} if task == "classify" else {}
    found = [trained(spaces["padded"], task, head, device=device, **labels)[0] for device in ("cuda", "cpu")]
    for name, value in found[1]["test"].items():
        if isinstance(value, float):
            assert found[0]["test"][name] == pytest.approx(value, abs=0.02), name


@pytest.mark.usefixtures("card")
def test_a_recorded_training_goes_on_from_its_state_as_if_it_had_never_stopped(
    spaces: dict[str, Workspace], tmp_path: Path
) -> None:
    """Step counters, moments, the place in the schedule, random numbers and the best weights all come back."""
    task, head = "detect", "fasterrcnn"
    recipe = replace(KINDS[task, head].recipe, iterations=6, batch_size=2, evaluations=4)
    options = checked(task, options_of(task, head, recipe=recipe))
    kept: dict[str, Any] = {}

    class At:
        """Keeps the state of a step, as a file would, and continues from it."""

        def __init__(self, step: int, *, stop: bool) -> None:
            self.step, self.stop = step, stop

        def load(self, check: Any) -> Any:
            if kept:
                check(kept["state"])
            return kept.get("state")

        def save(self, step: int, state: Any) -> None:
            if step == self.step and self.stop:
                torch.save(on_the_host(state()), tmp_path / "state.pt")
                kept["state"] = torch.load(tmp_path / "state.pt")
                raise KeyboardInterrupt

    def run(keeper: At) -> list[Any]:
        pretend_card.generator.manual_seed(0)
        cache = open_cache(spaces["padded"].cache_files()[0])
        ready = prepare(training_of(spaces["padded"], cache, task, options))
        (trial,) = trials_of(ready)
        with source_of(ready, trial.head) as source:
            keep_on_device(ready, source)
            loss, where = ready.task.start([trial.head]), placed(ready, source, trial.head)
            scores = [{"score": 1.0}, {"score": 2.0}, {"score": 0.5}, {"score": 0.0}]
            left = iter(scores[2:] if kept else scores)
            curves = train(
                [trial.head], [recipe], source.training, ready.rows["train"], loss, 0, lambda: [next(left)],
                keeper=keeper, best_by="score", **where,
            )  # fmt: skip
        return [curves, {name: value.cpu() for name, value in trial.head.state_dict().items()}]

    whole = run(At(3, stop=False))
    with pytest.raises(KeyboardInterrupt):
        run(At(3, stop=True))
    curves, weights = run(At(3, stop=False))
    assert curves == whole[0]
    assert all(torch.equal(value, weights[name]) for name, value in whole[1].items())


def on_the_host(x: Any) -> Any:
    """A state as its file holds it: see probes.saved."""
    if isinstance(x, torch.Tensor):
        return x.detach().cpu()
    if isinstance(x, dict):
        return {name: on_the_host(own) for name, own in x.items()}
    return [on_the_host(own) for own in x] if isinstance(x, (list, tuple)) else x


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("frames", list(FRAMES))
@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_a_card_writes_the_features_that_a_cpu_writes(
    dtype: Literal["fp16", "int8"],
    frames: str,
    spaces: dict[str, Workspace],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Processes decode for it, into memory that is locked as long as they do."""
    found, locked = [], []
    real = Decoders.submit
    monkeypatch.setattr(Decoders, "submit", lambda *task: (locked.append(len(pretend_card.locked)), real(*task))[1])
    for device in ("cuda", "cpu"):
        own = Workspace(tmp_path / device)
        own.root.mkdir()
        own.data.symlink_to(spaces[frames].data)
        how = ExtractOptions(quiet=True, device=device, dtype=dtype, precision="fp32", workers=2, **FRAMES[frames])
        path = extract(own, SPEC, "xray", how).path
        assert all(isinstance(count, int) for count in verify(path))
        found.append(stored(path))
    assert found[0] == found[1]
    assert locked == [1] * 16 and not pretend_card.locked


@pytest.mark.usefixtures("card")
def test_little_memory_for_features_on_their_way_stops_no_extraction(
    tmp_path: Path, spaces: dict[str, Workspace], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, slots = Workspace(tmp_path / "space"), list[int]()
    own.root.mkdir()
    own.data.symlink_to(spaces["whole"].data)
    real = pipeline._WriteBehind.__init__

    def counted(self: Any, writer: Any, job: Any, busy: Any, given: Any) -> None:
        slots.append(len(given))
        real(self, writer, job, busy, given)

    monkeypatch.setattr(pipeline._WriteBehind, "__init__", counted)
    for memory in (0, 2**40):
        monkeypatch.setattr(pipeline, "available_memory", lambda memory=memory: memory)
        how = ExtractOptions(quiet=True, device="cuda", batch_size=2, dtype="fp32" if memory else "fp16")
        assert extract(own, SPEC, "xray", how).missing == 0
    assert slots == [2, pipeline.BEHIND + pipeline.WRITERS + 1]


@pytest.mark.usefixtures("card")
def test_threads_decode_where_shared_memory_cant_be_locked(
    tmp_path: Path, spaces: dict[str, Workspace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretend_card.Runtime, "cudaHostRegister", lambda *_: 801)
    own = Workspace(tmp_path / "space")
    own.root.mkdir()
    own.data.symlink_to(spaces["whole"].data)
    report = extract(own, SPEC, "xray", ExtractOptions(quiet=True, device="cuda", workers=2))
    assert report.missing == 0 and "decoded by threads, which is slower: CUDA can't lock" in report.notes[-1]
    assert "(error 801)" in report.notes[-1] and not pretend_card.locked


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(("task", "precision"), [("semseg", None), ("detect", "tf32")])
def test_a_backbone_is_trained_and_predicts_there(
    task: str, precision: Literal["tf32"] | None, spaces: dict[str, Workspace], tmp_path: Path
) -> None:
    own = Workspace(tmp_path / "space")
    own.root.mkdir()
    own.data.symlink_to(spaces["padded"].data)
    extract(own, SPEC, "xray", ExtractOptions(quiet=True, device="cuda", fit="letterbox", size=(32, 64)))
    (path,) = own.cache_files()
    assert open_cache(path).recipe.precision == "amp"
    head = "linear" if task == "semseg" else "fcos"
    recipe = TrainRecipe(iterations=2, batch_size=2, evaluations=1, clip=1.0)
    options = options_of(task, head, recipe=recipe, tuning=Tuning(accumulate=2, ema=0.5, precision=precision))
    (row,) = finetune(own, task, ("xray",), (), options).rows
    assert row["tuning"]["precision"] == (precision or "bf16")
    cache = open_cache(path)
    images = [Path(cache.data.root) / cache.rows[i].image for i in cache.usable("test")[:2]]
    assert predict(own.probes / row["folder"], images, tmp_path / "out", device="cuda", quiet=True).images == 2


@pytest.mark.usefixtures("card")
def test_the_pretended_card_refuses_what_a_card_refuses() -> None:
    x = torch.ones(3, device="cuda")
    assert isinstance(x, Card) and x.is_cuda and (x + 1).tolist() == [2, 2, 2]
    with pytest.raises(CardError, match="on the same device"):
        x + torch.ones(3)
    with pytest.raises(TypeError, match="can't convert cuda"):
        x.numpy()
    for step in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: x.add_(torch.ones(3).to("cuda"))):
        with pytest.raises(CardError, match="not permitted"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            step()


@pytest.mark.usefixtures("card")
def test_a_graph_computes_when_it_is_replayed_and_on_memory_that_is_there() -> None:
    x, steps, graph = torch.ones(3, device="cuda"), torch.zeros(1, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x * 2
        steps += 1
    assert steps.item() == 0
    x.fill_(4)
    graph.replay()
    graph.replay()
    assert y.tolist() == [8, 8, 8] and steps.item() == 2
    del x
    with pytest.raises(CardError, match="given back"):
        graph.replay()
