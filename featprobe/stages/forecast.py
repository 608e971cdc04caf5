"""How long training will take, and whether it fits the memory: a few steps, timed before it starts."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from featprobe.errors import ProbeError
from featprobe.features import Features
from featprobe.probes import TrainRecipe
from featprobe.probes.train import evaluation_points
from featprobe.processes import count, own_part
from featprobe.stages.outcome import scored_here
from featprobe.stages.rows import images_of, rows_of
from featprobe.stages.sources import Source, feed_of

if TYPE_CHECKING:
    from featprobe.stages.trials import Run, Trial

REHEARSED = 3  # training steps that are timed before training starts, the first not counted


@dataclass(frozen=True)
class Forecast:
    """How long the trials of a run take together. iteration, evaluation: seconds of one."""

    iteration: float
    evaluation: float

    def seconds(self, recipe: TrainRecipe) -> float:
        """Of a whole training."""
        return self.iteration * recipe.iterations + self.evaluation * len(evaluation_points(recipe))


def foresee(run: "Run", trials: Sequence["Trial"], source: Source) -> Forecast:
    """How long training will take, from a few steps, whose effect is undone.

    Raises ProbeError where a step does not fit the memory.
    """
    together = [trial.head for trial in (trials[:1] if run.regime == "full" else trials)]
    tuned = run.tuned(source, run.recipe)
    moving = nn.ModuleList([*together, *([tuned.backbone] if tuned else [])])
    before = {name: value.clone() for name, value in moving.state_dict().items()}
    step = _rehearse(run, moving, run.task.start(together, fresh=run.fresh), source)
    moving.load_state_dict(before)
    for parameter in moving.parameters():
        parameter.grad = None
    moving.eval()
    val = run.rows["val"]
    few = rows_of(run.cache, val, images_of(run.cache, val[:4]))  # whole images
    begun = time.perf_counter()
    run.task.evaluate(together, source.batches, few)
    evaluation = (time.perf_counter() - begun) * len(scored_here(run.cache, val)) / len(few)
    times = len(trials) / len(together)
    return Forecast(times * step, times * evaluation)


def _rehearse(run: "Run", moving: nn.Module, loss: Callable[[Features, Any], Tensor], source: Source) -> float:
    """Seconds of a training step; raises ProbeError with a batch size that fits where this one does not."""
    parts = run.parts
    rows = run.rows["train"][: -(-min(run.recipe.batch_size, len(run.rows["train"])) // parts)]
    moving.train()

    def steps(count: int, times: int) -> Iterator[float]:
        optimizer = torch.optim.AdamW(moving.parameters(), lr=0.0, fused=True)
        begun = time.perf_counter()
        for batch, features in feed_of(source)([rows[:count]] * times, 0):
            optimizer.zero_grad(set_to_none=True)
            loss(features, batch).sum().backward()
            optimizer.step()
            if run.device.type == "cuda":
                torch.cuda.synchronize(run.device)
            now = time.perf_counter()
            yield now - begun
            begun = now

    try:
        return parts * float(np.mean(list(steps(len(rows), REHEARSED))[1:]))
    except torch.OutOfMemoryError as error:
        found = str(error).splitlines()[0]
    # out here, where nothing holds the tensors of the step that failed any more
    # several processes would wait for each other in steps that do not fit all of them
    fits = 0 if count() > 1 else largest_that_fits(len(rows), lambda images: sum(steps(images, 1)))
    advice = f"--batch-size {fits * parts}" if fits else "fewer --levels, a smaller --width, or --device cpu"
    if count() > 1:
        advice = "a smaller --batch-size, more processes, or --device cpu"
    elif run.regime == "full":
        advice = f"--accumulate {-(-parts * len(rows) // fits)}" if fits else "--checkpointing, or --device cpu"
    raise ProbeError(
        f"{run.title}: the memory of {run.device} does not hold a training step.\n"
        f"  wanted  {len(rows[own_part(len(rows))])} images at once\n"
        f"  found   {found}\nNothing was trained. What fits:  {advice}"
    )


def largest_that_fits(count: int, step: Callable[[int], object]) -> int:
    """The largest half, quarter, … of a batch of `count` images whose step does not run out of memory; 0 for none."""
    while count := count // 2:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            step(count)
            return count
        except torch.OutOfMemoryError:
            continue
    return 0
