"""Heads from a prepared training: they are trained, or solved, and the best of each seed on validation is chosen."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featprobe.errors import DivergedError, ProbeError, counted
from featprobe.probes import CurvePoint, kept_point, parameter_count
from featprobe.probes.saved import Checkpoint
from featprobe.probes.train import train
from featprobe.processes import from_main
from featprobe.specs import digest
from featprobe.stages.memory import filled
from featprobe.stages.progress import Progress
from featprobe.stages.tasks.task import Solution, Source
from featprobe.stages.training.forecast import Forecast, forecast_text, foresee
from featprobe.stages.training.logs import Recorder
from featprobe.stages.training.prepared import Prepared, Trial, keep_on_device, placed, tuned
from featprobe.stages.training.training import Training

Say = Callable[[str], None]
Curves = Sequence[Sequence[CurvePoint]]
LADDERS = "ladders"  # folder of the states of searches for iterations, below probes/
CHECKPOINT_SECONDS = 60.0  # at least, between two states that are kept


@dataclass(frozen=True)
class Fitted:
    """What a training gives.

    trials: trained. curves: of each trial, on validation; empty for one whose loss was not finite. chosen: the place of
    each seed's best trial. solutions: of heads that were solved, what was decided for each trial. backbone: of the
    chosen trial, the tensors of the backbone that it was trained with; empty where that stayed as it was.
    backbone_parameters: how many values of it moved. seconds_before: that were spent on the training before it was
    stopped, and went on.
    """

    trials: tuple[Trial, ...]
    curves: tuple[Sequence[CurvePoint], ...]
    chosen: tuple[int, ...] = ()
    solutions: tuple[Mapping[str, Any], ...] = ()
    backbone: Mapping[str, Tensor] | None = None
    backbone_parameters: int = 0
    seconds_before: float = 0.0

    @property
    def best(self) -> list[Trial]:
        """The chosen trial of each seed."""
        return [self.trials[index] for index in self.chosen]


def fit(
    prepared: Prepared,
    trials: Sequence[Trial],
    source: Source,
    say: Say,
    forecast: Forecast | None = None,
    *,
    rehearsal: bool = False,
) -> Fitted:
    """Train or solve, and choose on validation. Raises FeatprobeError.

    All heads go over the same features, or one after another with a backbone each. say: gets how long it will take, if
    no forecast is given. rehearsal: whether the heads are not to be kept.
    """
    training, where = prepared.training, keep_on_device(prepared, source)
    if prepared.solver is not None:
        if where:
            say(f"{training.title}: {where}")
        fitted = _solve(prepared, trials, source, prepared.solver)
    else:
        if forecast is None:
            text = forecast_text(training, foresee(prepared, trials, source))
            say(f"{text}; {where}" if where else text)
        work = _train_apart if training.regime == "full" else _train
        fitted = work(prepared, trials, source, rehearsal)
    return replace(fitted, chosen=tuple(choose(training, trials, fitted.curves, seed) for seed in training.seeds))


def choose(training: Training, trials: Sequence[Trial], curves: Curves, seed: int) -> int:
    """The place of the trial of a seed that scores highest on validation, the first of equals; raises DivergedError.

    curves: of the trials that have ended so far.
    """
    scores = _scores(training, trials, curves, seed)
    if not scores:
        raise DivergedError(f"No trial of seed {seed} ended with a finite loss. Try smaller --lr.")
    return max(scores, key=lambda i: (-1.0 if np.isnan(scores[i]) else scores[i], -i))


def _scores(training: Training, trials: Sequence[Trial], curves: Curves, seed: int) -> dict[int, float]:
    """Validation score of the weights that are kept, of each trial of a seed that has ended, by its place."""
    return {
        i: kept(training, trials[i], curve).scores[training.chooses_by]
        for i, curve in enumerate(curves)
        if trials[i].seed == seed and curve and curve[-1].iteration == training.recipe.iterations
    }


def kept(training: Training, trial: Trial, curve: Sequence[CurvePoint]) -> CurvePoint:
    """The point of a trial's curve whose weights are kept."""
    return kept_point(curve, trial.recipe, training.chooses_by)


def checkpoint_of(prepared: Prepared, index: int, *, rehearsal: bool = False) -> Checkpoint | None:
    """Where a training with a live backbone keeps its state, at the end of a pass over the training rows.

    index: of the first of the trials that are trained together.
    """
    training = prepared.training
    if training.tuning is None:
        return None
    identity = digest([training.recipe_key, training.features.key, training.data.fingerprint, training.seeds, index])
    path = training.folder / f"seed{training.seeds[0]}" / f"checkpoint{index}.pt"
    if rehearsal:
        path = training.workspace.probes / LADDERS / f"checkpoint-{identity[:16]}.pt"
    every = max(1, len(prepared.rows["train"]) // training.recipe.batch_size)
    return Checkpoint(path, identity, every, training.recipe.iterations, CHECKPOINT_SECONDS)


def _solve(prepared: Prepared, trials: Sequence[Trial], source: Source, solver: Callable[..., Solution]) -> Fitted:
    """Solve for heads that are not trained: for each where something is drawn, else once; the main process does."""
    rows, solutions, curves = prepared.rows, list[Solution](), list[Sequence[CurvePoint]]()

    def solved(trial: Trial) -> Solution:
        found: Solution = prepared.portions.do(
            lambda batches: solver(trial.head, trial.seed, batches, rows["train"], rows["val"]), source.batches
        )
        return found

    for trial in trials:
        fresh = prepared.training.kind.drawn or not solutions
        if fresh:
            solutions.append(from_main(partial(solved, trial)))
        trial.head.load_state_dict(solutions[-1].state)
        trial.head.eval()
        if fresh:
            brief = prepared.evaluate([trial.head], source, rows["val"])[0].brief
        curves.append([CurvePoint(1, 0.0, brief)])
    chosen = [solutions[min(index, len(solutions) - 1)].chosen for index in range(len(trials))]
    return Fitted(tuple(trials), tuple(curves), solutions=tuple(chosen))


def _train_apart(prepared: Prepared, trials: Sequence[Trial], source: Source, rehearsal: bool) -> Fitted:
    """Train one head after another, each with a backbone of its own; the best one's is kept."""
    backbone, training = source.backbone, prepared.training
    assert backbone is not None  # the full regime has one
    curves, seconds = list[Sequence[CurvePoint]](), 0.0
    fresh, best = backbone.tensors(), dict[str, Tensor]()
    for index, trial in enumerate(trials):
        backbone.model.load_state_dict(fresh)
        try:
            found = _train(prepared, [trial], source, rehearsal, index)
        except DivergedError:
            curves.append([])
            continue
        curves += found.curves
        seconds += found.seconds_before
        ended = index in _scores(training, trials, curves, trial.seed)
        if ended and choose(training, trials, curves, trial.seed) == index:
            best = backbone.tensors()
    return Fitted(
        tuple(trials), tuple(curves), backbone=best, backbone_parameters=parameter_count(backbone),
        seconds_before=seconds,
    )  # fmt: skip


def _train(prepared: Prepared, trials: Sequence[Trial], source: Source, rehearsal: bool, index: int = 0) -> Fitted:
    """Train heads over the same features; raises ProbeError where the memory is too small. index: of the first head."""
    training = prepared.training
    try:
        with filled():
            return _trained(prepared, trials, source, checkpoint_of(prepared, index, rehearsal=rehearsal), index)
    except torch.cuda.OutOfMemoryError as error:  # of a batch that holds more than those of the forecast
        found = str(error).splitlines()[0]
    images, half = -(-training.recipe.batch_size // training.parts), training.recipe.batch_size // 2
    advice = f"--accumulate {2 * training.parts}" if training.regime == "full" else f"--batch-size {half}"
    few = "Take fewer --levels, a smaller --size, or --device cpu."
    raise ProbeError(
        f"{training.title}: the memory of {training.device} does not hold every training step, though the first ones "
        f"fit.\n  wanted  {counted(images, 'image')} at once\n  found   {found}\n"
        f"Heads that were written stay. {f'Half as many at once:  {advice}' if images > 1 else few}"
    )


def _trained(
    prepared: Prepared, trials: Sequence[Trial], source: Source, checkpoint: Checkpoint | None, index: int
) -> Fitted:
    training, heads = prepared.training, [trial.head for trial in trials]
    loss = prepared.task.start(heads, fresh=training.is_fresh)
    bar = Progress(training.recipe.iterations, training.title, "it", quiet=training.options.quiet)
    with bar, _recorder(training, trials, index) as recorder:

        def taken(losses: Tensor) -> None:
            bar.update()
            recorder.take(losses)

        def evaluate() -> list[dict[str, float]]:
            scores = [outcome.brief for outcome in prepared.evaluate(heads, source, prepared.rows["val"])]
            recorder.scores = scores
            return scores

        def progress(step: int, mean: float) -> None:
            bar.note(f"loss {mean:.3f}")
            recorder.mark(step)

        curves = train(
            heads, [trial.recipe for trial in trials], source.training, prepared.rows["train"], loss, training.seeds[0],
            evaluate, progress, tuned(training, source, trials[0].recipe), checkpoint,
            training.chooses_by, taken=taken,
            **placed(prepared, source, heads[0]),
        )  # fmt: skip
    return Fitted(tuple(trials), tuple(curves), seconds_before=checkpoint.before if checkpoint else 0.0)


def _recorder(training: Training, trials: Sequence[Trial], first: int) -> Recorder:
    """What logs a training; each trial beside its head, in a folder of its own where there are several."""
    grid, places = len(training.grid), []
    what = {"task": training.task, "head": training.kind.name, "regime": training.regime, "fraction": training.fraction}
    for index, trial in enumerate(trials, first):
        folder = training.folder / f"seed{trial.seed}" / "log" / (f"trial{index % grid}" if grid > 1 else "")
        config = {**what, "backbone": training.features.label, "data": training.data.name, "seed": trial.seed}
        name = f"{training.title}: {training.kind.name}, {training.regime}"
        places.append((folder, name, {**config, **trial.recipe.to_json(), "tuning": training.treatment}))
    return Recorder(training.options.log, places, [trial.recipe for trial in trials])
