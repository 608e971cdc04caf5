"""The training loop, for features from any source, for one head or for many over the same batches."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from math import cos, isfinite, isnan, pi
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from featprobe.errors import DivergedError, ProbeError
from featprobe.features import Features
from featprobe.kinds import TrainRecipe
from featprobe.machine import is_of_device
from featprobe.probes import execution
from featprobe.probes.operations.adamw import AdamW
from featprobe.probes.resumed import Wanted, check_state, restore_moments
from featprobe.processes import check_batch, check_norms, count, is_main, own_part, sum_gradients, summed
from featprobe.specs import Rows

Feed = Callable[[Iterable[Rows]], Iterator[tuple[Rows, Features]]]
"""Yields (rows, their features) for each array of row indices that it is given."""
TrainingFeed = Callable[[Iterable[Rows], int], Generator[tuple[Any, Features]]]
"""From arrays of row indices, and the number of the first of them in a training, to (what the loss takes beside the
features: the rows, or rows with labels of their own; features). Of several processes each yields its own part of every
array, `processes.own_part`."""
Resident = Callable[[Tensor], Features]
"""From places among the sorted rows of a training, (batch,), to their features; all on the device."""
Loss = Callable[[Features, Any], Tensor]
"""From features, and what the feed gives with them or their places as `Resident` takes them, to losses, (heads,)."""
WARM_UP = 3  # steps before a step is recorded: libraries choose their ways, the optimizer makes its state


@dataclass(frozen=True)
class CurvePoint:
    """Training loss (mean since the last point) and validation scores after some iterations."""

    iteration: int
    loss: float
    scores: dict[str, float]


def learning_rate(step: int, recipe: TrainRecipe) -> float:
    """The factor of the learning rate at a step: linear warm-up, then half a cosine down to 0.

    >>> recipe = TrainRecipe(iterations=100, warmup=0.1)
    >>> [round(learning_rate(step, recipe), 2) for step in (0, 9, 54, 99)]
    [0.1, 1.0, 0.5, 0.0]
    """
    warmup = max(1, round(recipe.warmup * recipe.iterations))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + cos(pi * (step + 1 - warmup) / max(1, recipe.iterations - warmup)))


def evaluation_points(recipe: TrainRecipe) -> tuple[int, ...]:
    """The iterations after which heads are scored on validation: the last one, and earlier ones in steps of √2.

    >>> evaluation_points(TrainRecipe(iterations=1000))
    (88, 125, 177, 250, 354, 500, 707, 1000)
    """
    return tuple(sorted({max(1, round(recipe.iterations * 2 ** (-k / 2))) for k in range(recipe.evaluations)}))


def kept_point(curve: Sequence[CurvePoint], recipe: TrainRecipe, score: str) -> CurvePoint:
    """The point of a validation curve whose weights are kept: the best by a score (the last of equal ones), or without
    a score the last.

    nan is below all other scores.
    """
    if recipe.weights_from == "end":
        return curve[-1]
    return max(curve, key=lambda point: (_rank(point.scores[score]), point.iteration))


def _rank(score: float) -> float:
    return -1.0 if isnan(score) else score


def batches_of(rows: Rows, recipe: TrainRecipe, seed: int) -> Iterator[Rows]:
    """The row indices of each iteration: a new random order of all rows per pass, the same for the same seed.

    A batch may continue from one pass into the next, so every batch is full and every row is used equally often.
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
    """Keeps the state of a training, so that a stopped training can continue."""

    def load(self, check: Callable[[Any], None]) -> dict[str, Any] | None:
        """The last saved state; None where there is none. Raises ProbeError where `check` raises ValueError for it."""
        ...

    def save(self, step: int, state: Callable[[], dict[str, Any]]) -> None:
        """Called after every step; keeps the state that `state` returns when one is due."""
        ...


@dataclass(frozen=True)
class Tuned:
    """A backbone that is trained together with a head.

    groups: its parameters, as an optimizer needs them. clip: largest L2 norm of its gradient, 0 for no limit.
    accumulate: the number of parts of a batch that are computed one after another, each weighted by its images. ema:
    decay of the running mean of all weights, which is scored and kept; 0 for the weights themselves.
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
    loss: Loss,
    seed: int,
    evaluate: Callable[[], Sequence[dict[str, float]]],
    progress: Callable[[int, float], None] = lambda step, loss: None,
    tuned: Tuned | None = None,
    keeper: Keeper | None = None,
    best_by: str | None = None,
    *,
    resident: Resident | None = None,
    fixed: bool = False,
    taken: Callable[[Tensor], None] = lambda losses: None,
) -> list[list[CurvePoint]]:
    """Train heads on the same batches of a feed and return the validation curve of each.

    recipes: one per head; they may differ only in learning rate and weight decay. loss: from features and the feed's
    other values to the losses, (heads,). seed: of the order of rows. evaluate: gives the validation scores of every
    head. tuned: the backbone of the feed, if it is trained too. progress: called with the step and the mean loss.
    best_by: the validation score whose best point gives the weights of each head (and of its backbone), where the
    recipe takes them from there, see `kept_point`; None for the last weights. taken: called with the losses of every
    step, (heads,), on their device.
    With several processes each computes its part of every batch: losses are summed, and all end with the same weights.

    fixed: the loss also accepts places of rows on the device, and does the same work for every batch of one shape; so a
    GPU records a step of frozen features once and replays it (`execution.recorded`). resident: gives the features of
    rows that all lie on the device; None if features come from the feed.

    A head whose loss is no longer finite is given up: its curve ends, the others continue. Raises DivergedError when
    no head is left.
    """
    recipe = recipes[0]
    loop = _Loop(heads, recipes, seed, tuned, best_by, fixed)
    loop.restore(keeper.load(loop.check) if keeper else None)
    marks = set(evaluation_points(recipe))
    loop.mode(training=True)
    check_norms(loop.moving)
    with closing(_steps(loop, feed, rows, loss, seed, resident)) as steps:
        while loop.step < recipe.iterations:
            loop.take(steps)
            taken(loop.losses[-1])
            if loop.step in marks:
                loop.mode(training=False)
                with loop.averaged():
                    progress(loop.step, loop.mark(evaluate))
                loop.mode(training=True)
            if keeper and is_main():
                keeper.save(loop.step, loop.state)
    loop.finish()
    return loop.curves


def seconds_per_step(
    heads: Sequence[nn.Module],
    recipes: Sequence[TrainRecipe],
    feed: TrainingFeed,
    rows: Rows,
    loss: Loss,
    tuned: Tuned | None = None,
    *,
    resident: Resident | None = None,
    fixed: bool = False,
    counted: int,
) -> float:
    """The seconds of a step of `train`: the mean of some steps after the warm-up.

    counted: how many; 0 for the steps of the warm-up themselves. All of them train the heads and the backbone.
    """
    first = WARM_UP + 1 if _is_recorded(heads, tuned, fixed) else 1
    timed = counted or first
    recipes = [replace(recipe, iterations=first + counted) for recipe in recipes]
    loop = _Loop(heads, recipes, 0, tuned, None, fixed)
    loop.mode(training=True)
    begun = 0.0
    with closing(_steps(loop, feed, rows, loss, 0, resident)) as steps:
        for step in range(first + counted):
            if step == first + counted - timed:
                begun = _now(loop.device)
            next(steps)
        return (_now(loop.device) - begun) / timed


def _now(device: torch.device) -> float:
    """The time in seconds, after the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _parts(batch: Rows, tuned: Tuned | None) -> list[Rows]:
    """The parts of a batch that are computed one after another."""
    return np.array_split(batch, min(tuned.accumulate, len(batch))) if tuned else [batch]


def _steps(
    loop: "_Loop", feed: TrainingFeed, rows: Rows, loss: Loss, seed: int, resident: Resident | None
) -> Generator[None]:
    """Takes a step of the optimizer each time it is asked for one, from where the loop stands to its end."""
    if loop.placed:
        yield from _placed_steps(loop, feed, rows, loss, seed, resident)
        return
    recipe = loop.recipes[0]
    sizes = [len(part) for part in _parts(next(batches_of(rows, recipe, seed)), loop.tuned)]
    check_batch(sum(sizes), len(sizes))
    left = islice(batches_of(rows, recipe, seed), loop.step, None)
    with closing(feed((p for batch in left for p in _parts(batch, loop.tuned)), loop.step * len(sizes))) as fed:
        for _ in range(loop.step, recipe.iterations):
            loop.note(loop.advance(((size / sum(sizes), *next(fed)) for size in sizes), loss))
            yield


def _placed_steps(
    loop: "_Loop", feed: TrainingFeed, rows: Rows, loss: Loss, seed: int, resident: Resident | None
) -> Generator[None]:
    """The same where the order of all rows lies on the device, and a step finds its batch there."""
    batches = np.stack(list(batches_of(rows, loop.recipes[0], seed)))  # (iterations, batch)
    check_batch(batches.shape[1], 1)
    own = np.searchsorted(np.sort(rows), batches[:, own_part(batches.shape[1])])
    order = torch.from_numpy(own).to(loop.device)

    def advance(features: Features | None) -> None:
        places = order.index_select(0, loop.place)[0]  # (batch,)
        given = features if resident is None else resident(places)
        assert given is not None  # they come from the one or from the other
        loop.advance([(1.0, places, given)], loss)

    step = _Recorded(advance, loop.device) if loop.recorded else advance
    if resident is not None:
        for number in range(loop.step, len(batches)):
            step(None)
            loop.note(loop.gathered[number])
            yield
        return
    with closing(feed(iter(batches[loop.step :]), loop.step)) as fed:
        for number, (_, features) in enumerate(fed, loop.step):
            step(features)
            loop.note(loop.gathered[number])
            yield


class _Recorded:
    """A training step on a GPU: after a few plain steps it is recorded as a CUDA graph, and then replayed.

    Features from outside are copied to the memory that the recorded step reads.
    """

    def __init__(self, step: Callable[[Features | None], None], device: torch.device) -> None:
        self.step, self.device, self.before = step, device, 0
        self.stream = torch.cuda.Stream(device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.given: Features | None = None

    def __call__(self, features: Features | None) -> None:
        """Take the step."""
        if self.before < WARM_UP:
            self.before += 1
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                self.step(features)
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
            return
        if self.graph is None:
            self.graph = self._record(features)
        elif features is not None and self.given is not None:
            for name, m in features.maps.items():
                self.given.maps[name].copy_(m)
            if features.content is not None and self.given.content is not None:
                self.given.content.copy_(features.content)
        self.graph.replay()

    def _record(self, features: Features | None) -> torch.cuda.CUDAGraph:
        if features is not None:
            content = None if features.content is None else features.content.clone()
            maps = {name: m.clone() for name, m in features.maps.items()}
            self.given = replace(features, maps=maps, content=content)
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:  # thread_local: the thread that reads ahead may ask for memory meanwhile
            with (
                torch.cuda.device(self.device),
                torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"),
            ):
                self.step(self.given)
        except RuntimeError as error:
            torch.cuda.set_stream(before)  # a recording that fails at its end leaves its own behind
            first = error if error.__context__ is None else error.__context__  # what ended the step ends the recording
            if isinstance(error, torch.cuda.OutOfMemoryError) or isinstance(first, torch.cuda.OutOfMemoryError):
                raise torch.cuda.OutOfMemoryError(str(first)) from error
            if not isinstance(first, Exception) or (is_of_device(first) and "captur" not in str(first)):
                raise first from None  # Ctrl-C, or what would end a step that is not recorded too
            raise ProbeError(
                f"{self.device} could not record a training step to replay it.\n"
                f"  found   {(str(first).splitlines() or [type(first).__name__])[0]}\n"
                "Run again with FEATPROBE_RECORD=0 in the environment: then no step is recorded, and the\n"
                "training takes longer. The result is the same but for rounding, and for samples that a head draws."
            ) from error
        return graph


def _clip(heads: Sequence[nn.Module], limit: float) -> None:
    """torch.nn.utils.clip_grad_norm_ per head, in few operations for all heads."""
    gradients = [[p.grad for p in head.parameters() if p.grad is not None] for head in heads]
    (each,) = {len(own) for own in gradients}  # heads that train together are of one kind
    norms = torch.stack(torch._foreach_norm(list(chain(*gradients)))).view(len(heads), each)
    factors = (limit / (torch.linalg.vector_norm(norms, dim=1) + 1e-6)).clamp(max=1.0)
    for own, factor in zip(gradients, factors.unbind(), strict=True):
        torch._foreach_mul_(own, factor)


def _is_recorded(heads: Sequence[nn.Module], tuned: Tuned | None, fixed: bool) -> bool:
    """Whether the steps of this training are recorded and replayed: only in a single process, with frozen features."""
    return fixed and tuned is None and count() == 1 and execution.recorded(next(heads[0].parameters()).device)


class _Rates:
    """The learning rates of an optimizer's groups, as `learning_rate` has them step by step.

    For a device that takes whole batches they lie there, so that no step waits for the host.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, recipe: TrainRecipe, device: torch.device, *, recorded: bool
    ) -> None:
        self.optimizer, self.recipe, self.recorded = optimizer, recipe, recorded
        self.whole = execution.whole_batches(device)
        self.full: list[float] = [group["lr"] for group in optimizer.param_groups]
        if self.whole:
            factors = [learning_rate(step, recipe) for step in range(recipe.iterations)]
            self.factors = torch.tensor(factors, dtype=torch.float32, device=device)
            self.full_there = torch.tensor(self.full, dtype=torch.float32, device=device)
            self.there = self.full_there.clone()
        self.link()

    def link(self) -> None:
        """Let the optimizer read each group's rate where it lies on the device."""
        for index, group in enumerate(self.optimizer.param_groups if self.whole else ()):
            group |= {"lr": self.there[index], "fused": True, "capturable": self.recorded}

    def set(self, step: int, place: Tensor) -> None:
        """Give every group the rate of a step. place: (1,), the same number on the device."""
        if self.whole:
            torch.mul(self.full_there, self.factors.index_select(0, place), out=self.there)
            return
        factor = learning_rate(step, self.recipe)
        for group, rate in zip(self.optimizer.param_groups, self.full, strict=True):
            group["lr"] = rate * factor


class _Loop:
    """The state of a training, and what a step does to it."""

    def __init__(
        self,
        heads: Sequence[nn.Module],
        recipes: Sequence[TrainRecipe],
        seed: int,
        tuned: Tuned | None,
        best_by: str | None,
        fixed: bool = False,
    ) -> None:
        self.heads, self.recipes, self.tuned, self.step = heads, recipes, tuned, 0
        self.score, self.best_by = best_by, best_by if recipes[0].weights_from == "best" else None
        self.device = next(heads[0].parameters()).device
        self.whole = execution.whole_batches(self.device)
        self.placed, self.recorded = fixed and self.whole and tuned is None, _is_recorded(heads, tuned, fixed)
        self.best: list[dict[str, Tensor]] = [{} for _ in heads]  # of each head, and of the backbone that moves with it
        torch.manual_seed(seed)
        groups: list[dict[str, Any]] = [
            {"params": list(head.parameters()), "lr": own.lr, "weight_decay": own.weight_decay}
            for head, own in zip(heads, recipes, strict=True)
        ]
        self.optimizer = AdamW(  # many small parameters: fused is one call instead of thousands
            [*groups, *(tuned.groups if tuned else ())], fused=True, capturable=self.recorded
        )
        self.optimizer._warned_capturable_if_run_uncaptured = True  # as the first steps do
        self.rates = _Rates(self.optimizer, recipes[0], self.device, recorded=self.recorded)
        self.place = torch.zeros(1, dtype=torch.long, device=self.device)  # the step, where the device can read it
        if self.whole:  # losses lie there too, so that no step waits for the host
            self.ones = groups[0]["params"][0].new_ones(len(heads), requires_grad=False)
            self.gathered = groups[0]["params"][0].new_zeros((recipes[0].iterations, len(heads)), requires_grad=False)
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

    def take(self, steps: Iterator[None]) -> None:
        """One step of the optimizer."""
        next(steps)

    def advance(self, parts: Iterable[tuple[float, Any, Features]], loss: Loss) -> Tensor:
        """Compute a step, over a batch that comes in parts; returns its losses, (heads,).

        parts: (share of the batch, what the loss takes, features).
        """
        self.optimizer.zero_grad(set_to_none=True)
        total: Tensor | None = None
        for share, batch, features in parts:
            values = loss(features, batch)  # (heads,)
            if share != 1:
                values = values * share
            # of a sum the gradients are the same; torch loads sympy where it is given what they begin with
            torch.autograd.backward(*((values, self.ones) if self.placed else (values.sum(),)))
            total = values.detach() if total is None else total + values.detach()
        assert total is not None
        sum_gradients(p for group in self.optimizer.param_groups for p in group["params"])
        if self.recipes[0].clip and self.whole:
            _clip(self.heads, self.recipes[0].clip)
        elif self.recipes[0].clip:
            for head in self.heads:
                nn.utils.clip_grad_norm_(head.parameters(), self.recipes[0].clip)
        if self.tuned and self.tuned.clip:
            nn.utils.clip_grad_norm_(self.tuned.backbone.parameters(), self.tuned.clip)
        self.rates.set(self.step, self.place)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.moving)
        total = summed(total)
        if not self.whole:
            return total
        self.gathered.index_copy_(0, self.place, total[None].to(self.gathered))
        self.place += 1
        return self.gathered[self.step]

    def note(self, losses: Tensor) -> None:
        """Count a step that was taken. losses: its own, (heads,)."""
        self.losses.append(losses)
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
            if best:  # heads of a bank share statistics while they train; what they keep is each one's own
                self._with_backbone(index).load_state_dict(best, assign=len(self.heads) > 1)
        self.optimizer.zero_grad(set_to_none=True)
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
            "curves": [[asdict(point) for point in curve] for curve in self.curves],
            "alive": self.alive,
            "losses": [losses.clone() for losses in self.losses],
            "best": self.best,
            "random": [torch.get_rng_state(), *cuda],
        }

    def check(self, state: Any) -> None:
        """Raise ValueError for a value that is no state of this training. The training has not begun."""
        names = {own: name for name, own in self.moving.named_parameters()}
        parameters = [(names[own], own) for group in self.optimizer.param_groups for own in group["params"]]
        best = [self._with_backbone(index).state_dict() for index in range(len(self.heads))]
        marks = evaluation_points(self.recipes[0])
        check_state(state, Wanted(self.state(), parameters, best if self.best_by else None, marks, self.score))

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go back to a saved state that was checked; do nothing for None."""
        if state is None:
            return
        self.step = state["step"]
        self.moving.load_state_dict(state["weights"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        restore_moments(self.optimizer, state["optimizer"]["state"])
        self.rates.link()
        self.place.fill_(self.step)
        self.curves = [[CurvePoint(**point) for point in curve] for curve in state["curves"]]
        self.alive = list(state["alive"])
        self.losses = [values.to(next(self.moving.parameters()).device) for values in state["losses"]]
        self.best = [
            {name: value.to(self.device, copy=True) for name, value in own.items()}
            for own in state.get("best", self.best)
        ]
        own, *cuda = state["random"]
        torch.set_rng_state(own)
        for kept in cuda if self.device.type == "cuda" else ():  # it may have begun on a GPU
            torch.cuda.set_rng_state(kept, self.device)
