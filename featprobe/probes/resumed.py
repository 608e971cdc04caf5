"""Whether a training can go on from a kept state: its file may be damaged, of another training, or made by others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, like their parameter
LONGEST = 60  # characters of a value in a message


@dataclass(frozen=True)
class Wanted:
    """What a state must fit.

    fresh: the state before the first step. parameters: (name among the weights, value before the first step) in the
    order of the optimizer. best: of each head, the tensors that are kept at its best point; None where none are. marks:
    the steps after which heads are scored, ascending, up to the last one. score: that each point of a curve must have;
    None for any.
    """

    fresh: Mapping[str, Any]
    parameters: Sequence[tuple[str, Tensor]]
    best: Sequence[Mapping[str, Any]] | None
    marks: Sequence[int]
    score: str | None


def check_state(found: Any, wanted: Wanted) -> None:
    """Raise ValueError, saying what is wrong, unless a training can go on from a state. No large memory is taken."""
    names = {*found, "best"} if isinstance(found, dict) else ()  # older states have no best
    _check(set(names) == set(wanted.fresh), "it holds no state of a training, or of another version")
    step = found["step"]
    _check(
        type(step) is int and 1 <= step <= wanted.marks[-1],
        f"step is {_shown(step)}, wanted is one from 1 to {wanted.marks[-1]}",
    )
    _check_tensors(found["weights"], wanted.fresh["weights"], "weights")
    if wanted.fresh["average"] is not None or found["average"] is not None:
        _check_tensors(found["average"], wanted.fresh["average"] or {}, "average")
        _check(int(found["average"]["n_averaged"]) == step, "average is of another step")
    _check_optimizer(found, wanted, step)
    _check_curves(found, wanted, step)
    _check_random(found["random"])


def restore_moments(optimizer: torch.optim.Optimizer, kept: Mapping[int, Mapping[str, Tensor]]) -> None:
    """Give an optimizer its moments, laid out as its parameters: that is how it reads and writes their memory.

    kept: of a state that was checked. The groups stay as they are.
    """
    parameters = [own for group in optimizer.param_groups for own in group["params"]]
    state = {
        index: {**one, **{name: torch.empty_like(parameters[index]).copy_(one[name]) for name in MOMENTS}}
        for index, one in kept.items()
    }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _check_optimizer(found: Mapping[str, Any], wanted: Wanted, step: int) -> None:
    """The moments of each parameter that has moved; the groups must be ours, and their rates are not read."""
    optimizer, weights = found["optimizer"], found["weights"]
    _check(isinstance(optimizer, dict) and set(optimizer) == {"state", "param_groups"}, "optimizer has other parts")
    groups, every = optimizer["param_groups"], optimizer["state"]
    own = [group["params"] for group in wanted.fresh["optimizer"]["param_groups"]]
    is_ours = isinstance(groups, list) and all(isinstance(group, dict) for group in groups)
    _check(is_ours and [group.get("params") for group in groups] == own, "optimizer has other groups of parameters")
    _check(isinstance(every, dict) and set(every) <= set(range(len(wanted.parameters))), "optimizer has other parts")
    for index, (name, before) in enumerate(wanted.parameters):
        if index not in every:
            _check(torch.equal(weights[name], before.cpu()), f"optimizer has nothing of {name}, which has moved")
            continue
        one = every[index]
        _check(isinstance(one, dict) and set(one) == {"step", *MOMENTS}, f"optimizer has other parts of {name}")
        taken = one["step"]
        is_count = _is_plain(taken) and taken.shape == () and taken.dtype == torch.float32
        _check(is_count and 1 <= taken.item() <= step, f"optimizer has another step of {name}")
        for part in MOMENTS:
            _check_like(one[part], before, f"optimizer: {part} of {name}")
            lost = one[part].isnan() & ~weights[name].isnan()  # a weight is lost with its moment
            _check(not lost.any(), f"optimizer: {part} of {name} is not a number")
        _check(not (one["exp_avg_sq"] < 0).any(), f"optimizer: exp_avg_sq of {name} is negative")


def _check_curves(found: Mapping[str, Any], wanted: Wanted, step: int) -> None:
    """Curves, the losses since their last point, which heads are still trained, and the best weights."""
    curves, alive, losses = found["curves"], found["alive"], found["losses"]
    heads = len(wanted.fresh["curves"])
    best = found.get("best", [{}] * heads)
    for name, own in (("curves", curves), ("alive", alive), ("best", best)):
        _check(isinstance(own, list) and len(own) == heads, f"{name} is not of {heads} heads")
    _check(all(type(own) is bool for own in alive) and any(alive), "alive names no head that is still trained")
    passed = [mark for mark in wanted.marks if mark <= step]
    names = {wanted.score} if wanted.score else set()
    for index, (curve, is_alive) in enumerate(zip(curves, alive, strict=True)):
        _check(isinstance(curve, list) and all(_is_point(point, names) for point in curve), "a curve has other points")
        count = len(passed) if is_alive else min(len(curve), max(len(passed) - 1, 0))
        _check([point["iteration"] for point in curve] == passed[:count], "a curve has points at other steps")
        wants_best = wanted.best is not None and curve
        _check_tensors(best[index], wanted.best[index] if wanted.best and wants_best else {}, "best")
    since = step - (passed[-1] if passed else 0)
    _check(isinstance(losses, list) and len(losses) == since, f"losses are not those of {since} steps")
    _check(
        all(_is_plain(own) and own.shape == (heads,) and own.is_floating_point() for own in losses),
        f"losses are not those of {heads} heads",
    )


def _is_point(point: Any, names: set[str]) -> bool:
    """Whether a value is a point of a curve, with scores of these names at least."""
    if not isinstance(point, dict) or set(point) != {"iteration", "loss", "scores"}:
        return False
    loss, scores = point["loss"], point["scores"]
    if type(point["iteration"]) is not int or type(loss) is not float or not isfinite(loss):
        return False
    return isinstance(scores, dict) and names <= {*scores} and all(type(own) in (int, float) for own in scores.values())


def _check_random(found: Any) -> None:
    """The state of the CPU's generator, and of a GPU's where one was used."""
    _check(isinstance(found, list) and len(found) in (1, 2) and all(map(_is_plain, found)), "random has other parts")
    try:
        torch.Generator().set_state(found[0])
    except (RuntimeError, TypeError) as error:
        raise ValueError("random is no state of a generator") from error


def _check_tensors(found: Any, own: Mapping[str, Any], what: str) -> None:
    """Tensors by name, as ours: of the same names, shapes and types."""
    _check(isinstance(found, Mapping) and found.keys() == own.keys(), f"{what} has other names")
    for name, value in own.items():
        if isinstance(value, Tensor):
            _check_like(found[name], value, f"{what}: {name}")
        else:
            _check(type(found[name]) is type(value), f"{what}: {name} is of another type")


def _check_like(found: Any, like: Tensor, what: str) -> None:
    fits = _is_plain(found) and found.shape == like.shape and found.dtype == like.dtype
    _check(fits, f"{what} is of another shape or type")


def _is_plain(found: Any) -> bool:
    """Whether a value is a tensor that holds its values in the memory of the host."""
    return isinstance(found, Tensor) and found.layout == torch.strided and found.device.type == "cpu"


def _shown(value: Any) -> str:
    return repr(value)[:LONGEST] if isinstance(value, (int, float, str)) else type(value).__name__


def _check(holds: Any, fault: str) -> None:
    if not holds:
        raise ValueError(fault)
