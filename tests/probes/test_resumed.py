"""A training goes on from its own state alone: what is damaged, or made by others, is refused before anything moves."""

import copy
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from featprobe.errors import DivergedError, ProbeError
from featprobe.features import Features
from featprobe.kinds import TrainRecipe
from featprobe.probes.saved import Checkpoint
from featprobe.probes.train import CurvePoint, Tuned, train

RECIPE = TrainRecipe(iterations=8, batch_size=2, lr=0.1, evaluations=4)  # scored after 3, 4, 6 and 8 steps
AT = 5  # the step whose state is kept
State = dict[str, Any]


class Stop(Exception):
    """A kill after the state was kept."""


def trained(path: Path, stop: int = 0, recipe: TrainRecipe = RECIPE) -> tuple[list[Tensor], list[list[CurvePoint]]]:
    """All weights, and the curves, of two heads and a backbone that are trained with a checkpoint; one layer of the
    backbone gets no gradient. stop: the step after whose losses the training is killed; 0 for none."""
    torch.manual_seed(0)
    heads = [nn.Linear(3, 1), nn.Linear(3, 1)]
    backbone = nn.ModuleDict({"moves": nn.Linear(3, 3), "idle": nn.Linear(2, 2)})
    images = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    steps = iter(range(1, 99))

    def feed(batches: Any, first: int) -> Iterator[Any]:
        for rows in batches:
            yield rows, Features({}, (4, 4))

    def loss(features: Features, rows: Any) -> Tensor:
        seen = backbone["moves"](images[rows]) + 0.1 * torch.rand(len(rows), 3)  # it draws
        return torch.stack([heads[0](seen).mean(), heads[1](seen.detach()).mean()])

    def taken(losses: Tensor) -> None:
        if next(steps) == stop:
            raise Stop

    tuned = Tuned(backbone, [{"params": list(backbone.parameters()), "lr": 0.01}], ema=0.5)
    keeper = Checkpoint(path, "same", AT, recipe.iterations, 0.0)
    scores = iter([0.1, 0.7, 0.3, 0.2] if not path.exists() else [0.3, 0.2])
    curves = train(
        heads, [recipe, recipe], feed, np.arange(6), loss, 0, lambda: [{"score": next(scores)}] * 2, tuned=tuned,
        keeper=keeper, best_by="score", taken=taken,
    )  # fmt: skip
    return [value.clone() for own in (*heads, backbone) for value in own.state_dict().values()], curves


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of a training that was killed after its fifth step."""
    path = tmp_path_factory.mktemp("kept") / "checkpoint0.pt"
    with pytest.raises(Stop):
        trained(path, stop=AT + 1)
    return path.read_bytes()


@pytest.fixture
def path(kept: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "a b" / "checkpoint0.pt"
    path.parent.mkdir()
    path.write_bytes(kept)
    return path


def changed(path: Path, change: Callable[[State], Any]) -> None:
    """Make the state in a file another."""
    held = torch.load(path, weights_only=True)
    assert held["state"]["step"] == AT
    change(held["state"])
    torch.save(held, path)


def refused(path: Path) -> str:
    """What is said of a file; it, and what the training would have moved, stay as they are."""
    before = path.read_bytes()
    with pytest.raises(ProbeError) as caught:
        trained(path, stop=1)
    assert path.read_bytes() == before
    said = str(caught.value)
    assert f"{path} can't be gone on from" in said and f"rm '{path}'" in said and len(said) < 600
    return said


def test_a_training_goes_on_as_if_it_had_not_been_stopped(path: Path, tmp_path: Path) -> None:
    whole, curves = trained(tmp_path / "other.pt")
    again, own = trained(path)
    assert own == curves and all(map(torch.equal, again, whole))


def test_a_training_that_had_ended_has_its_result(path: Path) -> None:
    first, curves = trained(path)
    again, own = trained(path)
    assert own == curves and all(map(torch.equal, again, first))


def moment(state: State, name: str = "exp_avg") -> Tensor:
    value: Tensor = state["optimizer"]["state"][0][name]
    return value


def put(*way: Any) -> Callable[[State], Any]:
    """What puts the last of some values where the others lead."""

    def change(state: State) -> None:
        held: Any = state
        for step in way[:-2]:
            held = held[step]
        held[way[-2]] = way[-1]

    return change


NAN = float("nan")
WEIGHT = "0.weight"  # of the first head
CHANGES: dict[str, Callable[[State], Any]] = {
    "step of 0": put("step", 0),
    "step below 0": put("step", -3),
    "step of a bool": put("step", True),
    "step of a float": put("step", 5.0),
    "huge step": put("step", 10**30),
    "step behind the end": put("step", 9),
    "another step": put("step", 4),
    "step of a tensor": put("step", torch.tensor(5)),
    "no weights": lambda state: state.pop("weights"),
    "more": put("more", 1),
    "weights of a list": put("weights", [1]),
    "weight gone": lambda state: state["weights"].pop(WEIGHT),
    "weight too many": put("weights", "more", torch.ones(1)),
    "weight of another shape": put("weights", WEIGHT, torch.ones(3)),
    "weight of another type": put("weights", WEIGHT, torch.ones(1, 3, dtype=torch.float64)),
    "weight of text": put("weights", WEIGHT, "x"),
    "weight without values": put("weights", WEIGHT, torch.ones(1, 3, device="meta")),
    "sparse weight": put("weights", WEIGHT, torch.ones(1, 3).to_sparse()),
    "huge weight": put("weights", WEIGHT, torch.ones(1).expand(10**9, 3)),
    "no average": put("average", None),
    "average of another step": lambda state: state["average"]["n_averaged"].fill_(4),
    "average of another shape": put("average", f"module.{WEIGHT}", torch.ones(3)),
    "optimizer of a list": put("optimizer", []),
    "no moments": put("optimizer", "state", {}),
    "moments of a parameter gone": lambda state: state["optimizer"]["state"].pop(1),
    "moments too many": put("optimizer", "state", 99, {}),
    "moment gone": lambda state: state["optimizer"]["state"][0].pop("exp_avg_sq"),
    "moment of another shape": put("optimizer", "state", 0, "exp_avg", torch.ones(1, 4)),
    "moment of another type": put("optimizer", "state", 0, "exp_avg", torch.ones(1, 3, dtype=torch.int64)),
    "moment of nan": lambda state: moment(state).fill_(NAN),
    "second moment of nan": lambda state: moment(state, "exp_avg_sq").fill_(NAN),
    "second moment below 0": lambda state: moment(state, "exp_avg_sq").fill_(-1),
    "optimizer of another step": lambda state: moment(state, "step").fill_(99),
    "optimizer of no step": lambda state: moment(state, "step").fill_(NAN),
    "groups gone": put("optimizer", "param_groups", []),
    "groups of others": put("optimizer", "param_groups", 0, "params", [1, 0]),
    "curve gone": lambda state: state["curves"].pop(),
    "points gone": put("curves", 0, []),
    "point at another step": put("curves", 0, 0, "iteration", 2),
    "point of text": put("curves", 0, 0, "loss", "x"),
    "loss of nan": put("curves", 0, 0, "loss", NAN),
    "no such score": put("curves", 0, 1, "scores", {"other": 0.5}),
    "score of a list": put("curves", 0, 1, "scores", {"score": [0.5]}),
    "point with more": put("curves", 0, 0, "more", 1),
    "no head alive": put("alive", [False, False]),
    "alive of numbers": put("alive", [1, 1]),
    "a head that has died is alive": lambda state: state["curves"][1].pop(),
    "losses gone": put("losses", []),
    "losses of others": put("losses", [torch.ones(3)]),
    "losses of whole numbers": put("losses", [torch.ones(2, dtype=torch.int64)]),
    "many losses": put("losses", [torch.ones(2)] * 1000),
    "no best": lambda state: state.pop("best"),
    "best of nothing": put("best", 0, {}),
    "best of another shape": put("best", 0, WEIGHT, torch.ones(3)),
    "no random": put("random", []),
    "random cut": lambda state: put("random", 0, state["random"][0][:100])(state),
    "random of others": put("random", 0, torch.full((5056,), 255, dtype=torch.uint8)),
    "random of floats": lambda state: put("random", 0, state["random"][0].float())(state),
    "random of text": put("random", ["x"]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_state_that_is_not_of_this_training_is_refused(path: Path, change: Callable[[State], Any]) -> None:
    changed(path, change)
    refused(path)


@pytest.mark.parametrize("seconds", [-1.0, NAN, float("inf"), "x", None, True, torch.ones(2)], ids=repr)
def test_seconds_that_are_no_time_are_refused(path: Path, seconds: Any) -> None:
    held = torch.load(path, weights_only=True)
    torch.save({**held, "seconds": seconds}, path)
    assert "seconds" in refused(path)


class Hostile:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo run >&2",)


def test_a_file_that_is_none_of_ours_is_refused(path: Path) -> None:
    held = torch.load(path, weights_only=True)
    whole = path.read_bytes()
    middle = bytearray(whole)
    place = whole.index(held["state"]["weights"][WEIGHT].numpy().tobytes())
    middle[place] ^= 1
    for data in (b"", b"x", whole[:-100], bytes(middle), pickle.dumps([1])):
        path.write_bytes(data)
        refused(path)
    for value in ([1], 5, {"identity": "same"}, {**held, "state": None}, {**held, "state": [1]}):
        torch.save(value, path)
        refused(path)
    torch.save(Hostile(), path)
    assert "more than tensors and plain values" in refused(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ProbeError, match="not a regular file"):
        trained(path)


def test_the_state_of_another_training_is_left_aside(path: Path, tmp_path: Path) -> None:
    held = torch.load(path, weights_only=True)
    torch.save({"identity": "other", "seconds": "x", "state": None}, path)
    assert Checkpoint(path, "same", 1, 8, 0.0).load() is None
    torch.save(held, path)
    checkpoint = Checkpoint(path, "same", 1, 8, 0.0)
    assert checkpoint.load() and checkpoint.before == held["seconds"] > 0


def test_moments_that_share_memory_are_taken_as_their_values(path: Path, tmp_path: Path) -> None:
    """The optimizer reads and writes memory one value after another."""
    values = []
    for shared in (False, True):
        own = tmp_path / f"{shared}.pt"
        own.write_bytes(path.read_bytes())
        moments = torch.full((1, 1), 0.25).expand(1, 3)
        changed(own, put("optimizer", "state", 0, "exp_avg", moments if shared else moments.clone()))
        values.append(trained(own)[0])
    assert all(map(torch.equal, *values))


def test_a_state_of_a_gpu_goes_on_elsewhere(path: Path, tmp_path: Path) -> None:
    whole, _ = trained(tmp_path / "other.pt")
    changed(path, lambda state: state["random"].append(torch.zeros(16, dtype=torch.uint8)))
    assert all(map(torch.equal, trained(path)[0], whole))


def test_a_head_that_was_given_up_stays_so(path: Path) -> None:
    """Its weights may be no numbers, and its curve ends early."""

    def given_up(state: State) -> None:
        state["alive"][1] = False
        state["curves"][1].pop()
        for name in ("weight", "bias"):
            state["weights"][f"1.{name}"].fill_(NAN)
        for index in (2, 3):
            state["optimizer"]["state"][index]["exp_avg"].fill_(NAN)

    changed(path, given_up)
    _, curves = trained(path)
    assert [[point.iteration for point in curve] for curve in curves] == [[3, 4, 6, 8], [3]]


def test_weights_that_are_no_numbers_end_in_words(path: Path) -> None:
    changed(path, lambda state: [state["weights"][f"{head}.weight"].fill_(NAN) for head in (0, 1)])
    with pytest.raises(DivergedError, match="The loss is nan after 6 iterations"):
        trained(path)


def test_weights_of_the_end_need_no_best_ones(tmp_path: Path) -> None:
    path, recipe = tmp_path / "checkpoint0.pt", replace(RECIPE, weights_from="end")
    with pytest.raises(Stop):
        trained(path, AT + 1, recipe)
    state = copy.deepcopy(torch.load(path, weights_only=True)["state"])
    assert state["best"] == [{}, {}]
    whole = path.read_bytes()
    changed(path, put("curves", 0, 1, "scores", {"other": 0.5}))
    with pytest.raises(ProbeError, match="a curve has other points"):
        trained(path, 0, recipe)
    path.write_bytes(whole)
    changed(path, lambda state: state.pop("best"))  # as older ones
    assert trained(path, 0, recipe)[1][0][-1].iteration == 8
