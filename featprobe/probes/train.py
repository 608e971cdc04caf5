"""The one training loop, wherever features come from."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from math import cos, pi
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from featprobe.errors import ProbeError
from featprobe.levels import Features

Rows = NDArray[np.intp]
Feed = Callable[[Iterable[Rows]], Iterator[tuple[Rows, Features]]]
"""Yields (rows, their features) for each array of row indices that it is given."""


@dataclass(frozen=True)
class TrainRecipe:
    """How a head is trained; equal for every backbone that is compared.

    warmup: share of the iterations over which the learning rate rises from 0. evaluations: how many
    points the validation curve has. Weights are kept from the end of training.
    """

    iterations: int = 1000
    batch_size: int = 16
    lr: float = 5e-3
    weight_decay: float = 1e-3
    warmup: float = 0.05
    loss_at: Literal["level", "image"] = "level"
    class_weights: Literal["none", "inverse-sqrt"] = "inverse-sqrt"
    evaluations: int = 8

    def __post_init__(self) -> None:
        limits = {
            "iterations": self.iterations >= 1,
            "batch_size": self.batch_size >= 1,
            "lr": 0 < self.lr < float("inf"),
            "weight_decay": 0 <= self.weight_decay < float("inf"),
        }
        wrong = [f"{name} = {getattr(self, name)}" for name, holds in limits.items() if not holds]
        if wrong:
            raise ProbeError(
                f"This can't be trained: {', '.join(wrong)}. wanted: at least one iteration and image, positive rates."
            )

    def to_json(self) -> dict[str, Any]:
        """Plain values, as cards keep them."""
        return asdict(self)


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
    head: nn.Module,
    feed: Feed,
    rows: Rows,
    loss: Callable[[Tensor, Rows], Tensor],
    recipe: TrainRecipe,
    seed: int,
    evaluate: Callable[[nn.Module], dict[str, float]],
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> list[CurvePoint]:
    """Train a head on rows of a feed and return its validation curve.

    loss: from a batch's logits and rows to a scalar. evaluate: scores of the head on validation.
    Raises ProbeError when the loss is not finite any more.
    """
    optimizer = torch.optim.AdamW(head.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, recipe))
    marks = {round(recipe.iterations * (k + 1) / recipe.evaluations) for k in range(recipe.evaluations)}
    curve: list[CurvePoint] = []
    losses: list[Tensor] = []
    head.train()
    for step, (batch, features) in enumerate(feed(batches_of(rows, recipe, seed)), start=1):
        value = loss(head(features), batch)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        schedule.step()
        losses.append(value.detach())
        if step in marks:
            mean = float(torch.stack(losses).mean())
            if not np.isfinite(mean):
                raise ProbeError(f"The loss is {mean} after {step} iterations. Try a smaller --lr than {recipe.lr:g}.")
            head.eval()
            curve.append(CurvePoint(step, mean, evaluate(head)))
            head.train()
            losses.clear()
            progress(step, mean)
    head.eval()
    return curve
