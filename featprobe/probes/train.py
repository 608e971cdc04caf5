"""The one training loop, wherever features come from, for one head or for many over the same batches."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import cos, isfinite, pi
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from featprobe.errors import ProbeError
from featprobe.levels import Features
from featprobe.probes.losses import parse_loss

Rows = NDArray[np.intp]
Feed = Callable[[Iterable[Rows]], Iterator[tuple[Rows, Features]]]
"""Yields (rows, their features) for each array of row indices that it is given."""


@dataclass(frozen=True)
class TrainRecipe:
    """How a head is trained; equal for every backbone that is compared.

    warmup: share of the iterations over which the learning rate rises from 0. loss, loss_at, class_weights: of dense
    heads. clip: largest L2 norm of a head's gradient, 0 for no limit. evaluations: how many points the validation
    curve has. Weights are kept from the end of training.
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

    def __post_init__(self) -> None:
        limits = {
            "iterations": self.iterations >= 1,
            "batch_size": self.batch_size >= 1,
            "lr": 0 < self.lr < float("inf"),
            "weight_decay": 0 <= self.weight_decay < float("inf"),
            "clip": 0 <= self.clip < float("inf"),
        }
        wrong = [f"{name} = {getattr(self, name)}" for name, holds in limits.items() if not holds]
        if wrong:
            raise ProbeError(
                f"This can't be trained: {', '.join(wrong)}. wanted: at least one iteration and image, positive rates."
            )
        parse_loss(self.loss)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as cards keep them."""
        return asdict(self)


DEFAULT_RECIPES = {
    "linear": TrainRecipe(),
    "ridge": TrainRecipe(iterations=1, evaluations=1),
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


def train(
    heads: Sequence[nn.Module],
    recipes: Sequence[TrainRecipe],
    feed: Feed,
    rows: Rows,
    loss: Callable[[Features, Rows], Tensor],
    seed: int,
    evaluate: Callable[[], Sequence[dict[str, float]]],
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> list[list[CurvePoint]]:
    """Train heads on the same batches of a feed and return the validation curve of each.

    recipes: one a head, which may differ in learning rate and weight decay alone. loss: from a batch's features and
    rows to the losses, (heads,). seed: of the order of rows. evaluate: scores of every head on validation.

    A head whose loss is not finite any more is given up: its curve ends, the others go on. Raises ProbeError when
    that holds for all of them.
    """
    recipe = recipes[0]
    groups = [
        {"params": list(head.parameters()), "lr": own.lr, "weight_decay": own.weight_decay}
        for head, own in zip(heads, recipes, strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, fused=True)  # many small parameters: one call instead of thousands
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, recipe))
    marks = {round(recipe.iterations * (k + 1) / recipe.evaluations) for k in range(recipe.evaluations)}
    curves: list[list[CurvePoint]] = [[] for _ in heads]
    alive = [True] * len(heads)
    losses: list[Tensor] = []
    for head in heads:
        head.train()
    for step, (batch, features) in enumerate(feed(batches_of(rows, recipe, seed)), start=1):
        values = loss(features, batch)  # (heads,)
        optimizer.zero_grad(set_to_none=True)
        values.sum().backward()
        if recipe.clip:
            for head in heads:
                nn.utils.clip_grad_norm_(head.parameters(), recipe.clip)
        optimizer.step()
        schedule.step()
        losses.append(values.detach())
        if step in marks:
            means = torch.stack(losses).mean(0).tolist()
            alive = [was and isfinite(mean) for was, mean in zip(alive, means, strict=True)]
            if not any(alive):
                rates = ", ".join(f"{r.lr:g}" for r in recipes)
                raise ProbeError(f"The loss is {means[0]} after {step} iterations. Try a smaller --lr than {rates}.")
            for head in heads:
                head.eval()
            for curve, mean, scores, is_alive in zip(curves, means, evaluate(), alive, strict=True):
                if is_alive:
                    curve.append(CurvePoint(step, mean, scores))
            for head in heads:
                head.train()
            losses.clear()
            progress(step, float(np.mean([mean for mean, own in zip(means, alive, strict=True) if own])))
    for head in heads:
        head.eval()
    return curves
