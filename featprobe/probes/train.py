"""The one training loop, wherever features come from, for one head or for many over the same batches."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from math import cos, isfinite, isnan, pi
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from featprobe.errors import DivergedError, ProbeError
from featprobe.features import Features
from featprobe.probes.losses import parse_loss
from featprobe.processes import check_batch, check_norms, is_main, sum_gradients, summed
from featprobe.specs import Rows

Feed = Callable[[Iterable[Rows]], Iterator[tuple[Rows, Features]]]
"""Yields (rows, their features) for each array of row indices that it is given."""
TrainingFeed = Callable[[Iterable[Rows], int], Generator[tuple[Any, Features]]]
"""From arrays of row indices, and the number of the first of them in a training, to (what the loss takes beside the
features: the rows, or rows with labels of their own; features). Of several processes each yields its own part of every
array, `processes.own_part`."""


@dataclass(frozen=True)
class TrainRecipe:
    """How a head is trained; equal for every backbone that is compared.

    batch_size: images a step, of all processes together. warmup: share of the iterations over which the learning rate
    rises from 0. loss, loss_at, class_weights: of dense
    heads. clip: largest L2 norm of a head's gradient, 0 for no limit. evaluations: how many points the validation
    curve has, see `evaluation_points`. weights_from: the point of that curve whose weights are kept, the best or the
    last.
    """

    iterations: int = 1000
    batch_size: int = 16
    lr: float = 5e-3
    weight_decay: float = 1e-3
    warmup: float = 0.05
    loss: str = "ce"
    loss_at: Literal["level", "image"] = "level"
    class_weights: Literal["none", "inverse-sqrt"] = "inverse-sqrt"
    clip: float = 0.0
    evaluations: int = 8
    weights_from: Literal["best", "end"] = "best"

    def __post_init__(self) -> None:
        limits = {
            "iterations": self.iterations >= 1,
            "batch_size": self.batch_size >= 1,
            "lr": 0 < self.lr < float("inf"),
            "weight_decay": 0 <= self.weight_decay < float("inf"),
            "clip": 0 <= self.clip < float("inf"),
            "evaluations": self.evaluations >= 1,
            "weights_from": self.weights_from in ("best", "end"),
        }
        wrong = [f"{name} = {getattr(self, name)}" for name, holds in limits.items() if not holds]
        if wrong:
            raise ProbeError(
                f"This can't be trained: {', '.join(wrong)}.\n"
                "wanted: at least one iteration, image and evaluation, positive rates, weights_from best or end."
            )
        parse_loss(self.loss)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as cards keep them. Weights of the end are not named, as in rows from before any choice."""
        values = asdict(self)
        return values if self.weights_from == "best" else {k: v for k, v in values.items() if k != "weights_from"}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TrainRecipe":
        """The recipe that a row or a card keeps."""
        return cls(**{"weights_from": "end", **values})


DEFAULT_RECIPES = {
    "linear": TrainRecipe(loss_at="image"),
    "ridge": TrainRecipe(iterations=1, evaluations=1, weights_from="end"),
    "upsample": TrainRecipe(iterations=300, batch_size=8, lr=1e-3),
    "fcos": TrainRecipe(iterations=400, batch_size=8, lr=2e-3, clip=10.0, evaluations=4),
    "fasterrcnn": TrainRecipe(iterations=300, batch_size=4, lr=1e-3, clip=10.0, evaluations=4),
    "maskrcnn": TrainRecipe(iterations=300, batch_size=4, lr=1e-3, clip=10.0, evaluations=4),
}
"""How each kind of head is trained where the user says nothing."""


@dataclass(frozen=True)
class CurvePoint:
    """Training loss (mean since the last point) and validation scores after some iterations."""

    iteration: int
    loss: float
    scores: dict[str, float]


def learning_rate(step: int, recipe: TrainRecipe) -> float:
    """Factor on the learning rate at a step: linear warm-up, then a half cosine down to 0.

    >>> recipe = TrainRecipe(iterations=100, warmup=0.1)
    >>> [round(learning_rate(step, recipe), 2) for step in (0, 9, 54, 99)]
    [0.1, 1.0, 0.5, 0.0]
    """
    warmup = max(1, round(recipe.warmup * recipe.iterations))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + cos(pi * (step + 1 - warmup) / max(1, recipe.iterations - warmup)))


def evaluation_points(recipe: TrainRecipe) -> tuple[int, ...]:
    """Iterations after which heads are scored on validation: the last one, and earlier ones, each by a factor of √2.

    >>> evaluation_points(TrainRecipe(iterations=1000))
    (88, 125, 177, 250, 354, 500, 707, 1000)
    """
    return tuple(sorted({max(1, round(recipe.iterations * 2 ** (-k / 2))) for k in range(recipe.evaluations)}))


def kept_point(curve: Sequence[CurvePoint], recipe: TrainRecipe, score: str) -> CurvePoint:
    """The point of a validation curve whose weights are kept: the best by a score, the last of equals; or the last.

    A score of nan is below all others.
    """
    if recipe.weights_from == "end":
        return curve[-1]
    return max(curve, key=lambda point: (_rank(point.scores[score]), point.iteration))


def _rank(score: float) -> float:
    return -1.0 if isnan(score) else score


def grid_of(recipe: TrainRecipe, rates: Sequence[float], decays: Sequence[float]) -> list[TrainRecipe]:
    """The recipe with every combination of learning rate and weight decay; its own where none is given."""
    return [
        replace(recipe, lr=lr, weight_decay=wd) for lr in rates or [recipe.lr] for wd in decays or [recipe.weight_decay]
    ]


def batches_of(rows: Rows, recipe: TrainRecipe, seed: int) -> Iterator[Rows]:
    """Row indices of each iteration: a new random order of all rows per pass, the same for one seed.

    Batches run on from one pass into the next, so every batch is full and every row is used equally often.
    """
    order = np.random.default_rng(seed)
    left = np.empty(0, dtype=np.intp)
    size = min(recipe.batch_size, len(rows))
    for _ in range(recipe.iterations):
        if len(left) < size:
            left = np.concatenate([left, order.permutation(rows)])
        yield left[:size]
        left = left[size:]


class Keeper(Protocol):
    """Where the state of a training is kept, so that one that was stopped goes on from there."""

    def load(self) -> dict[str, Any] | None:
        """What was saved last; None for nothing."""
        ...

    def save(self, step: int, state: Callable[[], dict[str, Any]]) -> None:
        """Told after every step; keeps what `state` gives when it is time to."""
        ...


@dataclass(frozen=True)
class Tuned:
    """A backbone that moves beside a head.

    groups: its parameters, as an optimizer takes them. clip: largest L2 norm of its gradient, 0 for no limit.
    accumulate: parts of a batch that go forward and back one after another, each weighing by its images. ema: decay of
    the running mean of all weights that is scored and kept, 0 for the weights themselves.
    """

    backbone: nn.Module
    groups: Sequence[dict[str, Any]]
    clip: float = 0.0
    accumulate: int = 1
    ema: float = 0.0


def train(
    heads: Sequence[nn.Module],
    recipes: Sequence[TrainRecipe],
    feed: TrainingFeed,
    rows: Rows,
    loss: Callable[[Features, Any], Tensor],
    seed: int,
    evaluate: Callable[[], Sequence[dict[str, float]]],
    progress: Callable[[int, float], None] = lambda step, loss: None,
    tuned: Tuned | None = None,
    keeper: Keeper | None = None,
    best_by: str | None = None,
) -> list[list[CurvePoint]]:
    """Train heads on the same batches of a feed and return the validation curve of each.

    recipes: one a head, which may differ in learning rate and weight decay alone. loss: from features and what the feed
    gives with them to the losses, (heads,). seed: of the order of rows. evaluate: scores of every head on validation.
    tuned: the backbone behind the feed, where it is trained as well. progress: told the step and the mean loss.
    best_by: the validation score whose best point gives each head its weights (and the backbone its own), see
    `kept_point`; None for the weights of the end. Several processes take their part of each batch: losses add up over
    them, and every one ends with the same weights.

    A head whose loss is not finite any more is given up: its curve ends, the others go on. Raises DivergedError when
    that holds for all of them.
    """
    recipe = recipes[0]
    loop = _Loop(heads, recipes, seed, tuned, best_by)
    loop.restore(keeper.load() if keeper else None)
    marks = set(evaluation_points(recipe))
    sizes = [len(part) for part in _parts(next(batches_of(rows, recipe, seed)), tuned)]
    left = islice(batches_of(rows, recipe, seed), loop.step, None)
    loop.mode(training=True)
    check_batch(sum(sizes), len(sizes))
    check_norms(loop.moving)
    with closing(feed((part for batch in left for part in _parts(batch, tuned)), loop.step * len(sizes))) as fed:
        while loop.step < recipe.iterations:
            loop.take(fed, sizes, loss)
            if loop.step in marks:
                loop.mode(training=False)
                with loop.averaged():
                    progress(loop.step, loop.mark(evaluate))
                loop.mode(training=True)
            if keeper and is_main():
                keeper.save(loop.step, loop.state)
    loop.finish()
    return loop.curves


def _parts(batch: Rows, tuned: Tuned | None) -> list[Rows]:
    """The parts of a batch that go forward one after another."""
    return np.array_split(batch, min(tuned.accumulate, len(batch))) if tuned else [batch]


class _Loop:
    """The state of a training, and what a step does to it."""

    def __init__(
        self,
        heads: Sequence[nn.Module],
        recipes: Sequence[TrainRecipe],
        seed: int,
        tuned: Tuned | None,
        best_by: str | None,
    ) -> None:
        self.heads, self.recipes, self.tuned, self.step = heads, recipes, tuned, 0
        self.best_by = best_by
        self.best: list[dict[str, Tensor]] = [{} for _ in heads]  # of each head, and of the backbone that moves with it
        torch.manual_seed(seed)
        groups: list[dict[str, Any]] = [
            {"params": list(head.parameters()), "lr": own.lr, "weight_decay": own.weight_decay}
            for head, own in zip(heads, recipes, strict=True)
        ]
        self.optimizer = torch.optim.AdamW(  # many small parameters: fused is one call instead of thousands
            [*groups, *(tuned.groups if tuned else ())], fused=True
        )
        self.schedule = LambdaLR(self.optimizer, lambda step: learning_rate(step, recipes[0]))
        self.curves: list[list[CurvePoint]] = [[] for _ in heads]
        self.alive = [True] * len(heads)
        self.losses: list[Tensor] = []  # (heads,) of each step since the last mark
        self.moving = nn.ModuleList([*heads, *([tuned.backbone] if tuned else [])])
        self.average: AveragedModel | None = None
        if tuned and tuned.ema:
            averaging = get_ema_multi_avg_fn(tuned.ema)
            self.average = AveragedModel(self.moving, multi_avg_fn=averaging, use_buffers=True)

    def mode(self, *, training: bool) -> None:
        """Set training or evaluation mode."""
        self.moving.train(training)

    def take(
        self, fed: Iterator[tuple[Any, Features]], sizes: Sequence[int], loss: Callable[[Features, Any], Tensor]
    ) -> None:
        """One step of the optimizer, over a batch that comes in parts of these sizes."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros(())
        for size in sizes:
            batch, features = next(fed)
            values = loss(features, batch) * (size / sum(sizes))  # (heads,)
            values.sum().backward()
            total = total.to(values.device) + values.detach()
        sum_gradients(p for group in self.optimizer.param_groups for p in group["params"])
        for head in self.heads:
            if self.recipes[0].clip:
                nn.utils.clip_grad_norm_(head.parameters(), self.recipes[0].clip)
        if self.tuned and self.tuned.clip:
            nn.utils.clip_grad_norm_(self.tuned.backbone.parameters(), self.tuned.clip)
        self.optimizer.step()
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.moving)
        self.losses.append(summed(total))
        self.step += 1

    def mark(self, evaluate: Callable[[], Sequence[dict[str, float]]]) -> float:
        """Add a point to the curve of every head that is still alive; returns their mean loss since the last."""
        means = torch.stack(self.losses).mean(0).tolist()
        self.alive = [was and isfinite(mean) for was, mean in zip(self.alive, means, strict=True)]
        if not any(self.alive):
            rates = ", ".join(f"{r.lr:g}" for r in self.recipes)
            raise DivergedError(f"The loss is {means[0]} after {self.step} iterations. Try smaller --lr than {rates}.")
        for i, (mean, scores, is_alive) in enumerate(zip(means, evaluate(), self.alive, strict=True)):
            if is_alive:
                self.curves[i].append(CurvePoint(self.step, mean, scores))
                self._keep_best(i)
        self.losses.clear()
        return float(np.mean([mean for mean, own in zip(means, self.alive, strict=True) if own]))

    def _keep_best(self, index: int) -> None:
        """Keep the weights of a head's last point where it is its best."""
        if self.best_by is not None:
            curve = self.curves[index]
            if kept_point(curve, self.recipes[index], self.best_by) is curve[-1]:
                own = self._with_backbone(index).state_dict()
                self.best[index] = {name: value.clone() for name, value in own.items()}

    def _with_backbone(self, index: int) -> nn.ModuleList:
        """A head and what moves with it."""
        return nn.ModuleList([self.heads[index], *([self.tuned.backbone] if self.tuned else [])])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """With the running mean of the weights in the place of the weights, where one is kept."""
        if self.average is None:
            yield
            return
        own = {name: value.clone() for name, value in self.moving.state_dict().items()}
        self.moving.load_state_dict(self.average.module.state_dict())
        yield
        self.moving.load_state_dict(own)

    def finish(self) -> None:
        """Leave the weights that are kept, in evaluation mode."""
        if self.average is not None:
            self.moving.load_state_dict(self.average.module.state_dict())
        for index, best in enumerate(self.best):
            if best:
                self._with_backbone(index).load_state_dict(best)
        self.mode(training=False)

    def state(self) -> dict[str, Any]:
        """All that `restore` needs, as tensors and plain values."""
        device = next(self.moving.parameters()).device
        cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
        return {
            "step": self.step,
            "weights": self.moving.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "curves": [[asdict(point) for point in curve] for curve in self.curves],
            "alive": self.alive,
            "losses": self.losses,
            "best": self.best,
            "random": [torch.get_rng_state(), *cuda],
        }

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go back to a saved state; nothing for None."""
        if state is None:
            return
        self.step = state["step"]
        self.moving.load_state_dict(state["weights"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.curves = [[CurvePoint(**point) for point in curve] for curve in state["curves"]]
        self.alive = list(state["alive"])
        self.losses = [values.to(next(self.moving.parameters()).device) for values in state["losses"]]
        self.best = state.get("best", self.best)
        own, *cuda = state["random"]
        torch.set_rng_state(own)
        for kept in cuda:
            torch.cuda.set_rng_state(kept, next(self.moving.parameters()).device)
