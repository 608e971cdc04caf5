"""How long training will take, and whether it fits the memory: a few steps, timed before it starts."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from featprobe.errors import ProbeError, counted
from featprobe.kinds import TrainRecipe
from featprobe.machine import minutes_text
from featprobe.probes.train import Tuned, evaluation_points, seconds_per_step
from featprobe.processes import count, own_part
from featprobe.stages.memory import filled, largest_that_fits
from featprobe.stages.row_images import images_of, rows_showing
from featprobe.stages.tasks.task import Source, scored_here
from featprobe.stages.training.prepared import Prepared, Trial, placed, tuned
from featprobe.stages.training.training import Training

REHEARSED = 3  # training steps that are taken before a training, at most; the first is timed only where it is alone
SHOWN = 4  # validation images that are scored before a training of usual length


@dataclass(frozen=True)
class Forecast:
    """How long the trials of a training take together. iteration, evaluation: seconds of one."""

    iteration: float
    evaluation: float

    def seconds(self, recipe: TrainRecipe) -> float:
        """Seconds of a whole training."""
        return self.iteration * recipe.iterations + self.evaluation * len(evaluation_points(recipe))


def rehearsed(recipe: TrainRecipe) -> int:
    """How many steps are taken before a training: at most a tenth of its own, and at least one.

    >>> [rehearsed(TrainRecipe(iterations=n)) for n in (2, 12, 25, 30, 1000)]
    [1, 1, 2, 3, 3]
    """
    return max(1, min(REHEARSED, recipe.iterations // 10))


def foresee(prepared: Prepared, trials: Sequence[Trial], source: Source) -> Forecast:
    """How long training will take, from a few steps, whose effect is undone.

    Raises ProbeError where a step does not fit the memory.
    """
    training = prepared.training
    together = [trial.head for trial in (trials[:1] if training.regime == "full" else trials)]
    moved = tuned(training, source, training.recipe)
    moving = nn.ModuleList([*together, *([moved.backbone] if moved else [])])
    before = {name: value.clone() for name, value in moving.state_dict().items()}
    step = _rehearse(prepared, trials[: len(together)], source, moved)
    moving.load_state_dict(before)
    for parameter in moving.parameters():
        parameter.grad = None
    moving.eval()
    val = prepared.rows["val"]
    shown = SHOWN if rehearsed(training.recipe) == REHEARSED else 1
    few = rows_showing(prepared.cache, val, images_of(prepared.cache, val[:shown]))  # whole images
    begun = time.perf_counter()
    prepared.evaluate(together, source, few)
    evaluation = (time.perf_counter() - begun) * len(scored_here(prepared.cache, val)) / len(few)
    times = len(trials) / len(together)
    return Forecast(times * step, times * evaluation)


def forecast_text(training: Training, forecast: Forecast) -> str:
    """How long training will take, for a person."""
    count = len(training.seeds) * len(training.grid)
    how = "one after another" if training.regime == "full" else "at once"
    many = f", {count} heads {how}" if count > 1 else ""
    regime = "" if training.regime == "frozen" else f", {training.regime}"
    split = "" if training.choice.by == "own" or training.choice.fold else f", {training.choice.text}"
    return (
        f"{training.title} ({training.partition.source.path}): {training.task} {training.kind.name}{regime}{many}"
        f"{split}, {training.recipe.iterations} iterations, {minutes_text(forecast.seconds(training.recipe))} on "
        f"{training.device}"
    )


def _rehearse(prepared: Prepared, trials: Sequence[Trial], source: Source, moved: Tuned | None) -> float:
    """Seconds of a training step; raises ProbeError with a batch size that fits where this one does not."""
    training, train = prepared.training, prepared.rows["train"]
    parts = training.parts
    rows = train[: -(-min(training.recipe.batch_size, len(train)) // parts)]
    heads = [trial.head for trial in trials]
    loss = prepared.task.start(heads, fresh=training.is_fresh)
    one_part = replace(moved, accumulate=1, ema=0.0) if moved else None

    def step(images: int, counted: int = rehearsed(training.recipe) - 1) -> float:
        recipes = [replace(trial.recipe, batch_size=images) for trial in trials]
        return seconds_per_step(
            heads,
            recipes,
            source.training,
            rows[:images],
            loss,
            one_part,
            counted=counted,
            **placed(prepared, source, heads[0]),
        )

    try:
        with filled():
            return parts * step(len(rows))
    except torch.cuda.OutOfMemoryError as error:
        found = str(error).splitlines()[0]
    # out here, where nothing holds the tensors of the step that failed any more
    # several processes would wait for each other in steps that do not fit all of them
    fits = 0 if count() > 1 else largest_that_fits(len(rows), lambda images: step(images, 1))
    advice = f"--batch-size {fits * parts}" if fits else "fewer --levels, a smaller --width, or --device cpu"
    if count() > 1:
        advice = "a smaller --batch-size, more processes, or --device cpu"
    elif training.regime == "full":
        advice = f"--accumulate {-(-parts * len(rows) // fits)}" if fits else "--checkpointing, or --device cpu"
    raise ProbeError(
        f"{training.title}: the memory of {training.device} does not hold a training step.\n"
        f"  wanted  {counted(len(rows[own_part(len(rows))]), 'image')} at once\n"
        f"  found   {found}\nNothing was trained. What fits:  {advice}"
    )
