"""How many iterations a head needs: trainings of ever more of them, until the validation score gains no more.

A cosine ends every curve flat, so one training can't tell whether a longer one would have been better. Each rung of a
ladder is a whole training with a schedule of its own. Rungs are kept in probes/ladders.jsonl (probes/README.md), so
that a ladder that was stopped goes on, and its answer is known without training.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from featprobe.cache import Cache
from featprobe.errors import DivergedError, ProbeError, counted
from featprobe.io.fields import built
from featprobe.kinds import TrainRecipe
from featprobe.machine import minutes_text
from featprobe.probes import append_row, plain
from featprobe.probes.saved import head_folder, read_card, read_results, read_rows
from featprobe.processes import from_main, is_main
from featprobe.result_rows import LadderRow, ResultRow, ladder_faults
from featprobe.scores import SCORES
from featprobe.specs import digest
from featprobe.stages.commands import level_command
from featprobe.stages.partition import Partition
from featprobe.stages.training.forecast import Forecast
from featprobe.stages.training.probe_options import Budget, ProbeOptions
from featprobe.stages.training.run import Say, foreseen, validated
from featprobe.stages.training.saved_results import is_whole
from featprobe.stages.training.training import Training, state_of
from featprobe.stages.workspace import Workspace

GAIN = 0.005  # of the validation score, half a point: what a rung must gain, and how near to the best is as good
IDLE = 2  # rungs in a row that gain less end a ladder
OCTAVES = {"dense": 4, "others": 2}  # below and above the usual iterations
FILE = "ladders.jsonl"
Scores = Mapping[int, float]  # by iterations; nan for a rung without a score


def rungs_of(usual: int, octaves: int) -> tuple[int, ...]:
    """Iterations from so many halvings of the usual number to so many doublings.

    >>> rungs_of(1000, 2)
    (250, 500, 1000, 2000, 4000)
    """
    return tuple(sorted({max(1, round(usual * 2.0**k)) for k in range(-octaves, octaves + 1)}))


def next_rung(rungs: Sequence[int], usual: int, scores: Scores) -> int | None:
    """The rung to train next; None when the ladder has ended.

    It ends after two rungs in a row that gain less than half a point on all before; rungs below the usual number of
    iterations do not count, as a detector finds nothing for long.

    >>> next_rung((250, 500, 1000, 2000, 4000), 1000, {250: 0.0, 500: 0.0, 1000: 0.0})
    2000
    >>> next_rung((250, 500, 1000, 2000, 4000), 1000, {250: 0.3, 500: 0.4, 1000: 0.403, 2000: 0.404})
    """
    best, idle = -1.0, 0
    for rung in rungs:
        if rung not in scores:
            return rung
        gained = _known(scores[rung]) - best >= GAIN
        idle = 0 if gained or rung < usual else idle + 1
        best = max(best, _known(scores[rung]))
        if idle == IDLE:
            return None
    return None


def budget_of(rungs: Sequence[int], scores: Scores) -> Budget:
    """The answer of a ladder that has ended: the smallest rung within half a point of the best.

    Where all rungs score 0 more iterations might find something.

    >>> budget_of((250, 500, 1000, 2000, 4000), {250: 0.3, 500: 0.4, 1000: 0.403, 2000: 0.404})
    Budget(needed=500, open=False, comparison='')
    >>> budget_of((250, 500), {250: 0.3, 500: 0.4})
    Budget(needed=500, open=True, comparison='')
    """
    known = {rung: _known(scores[rung]) for rung in rungs if rung in scores}  # a file may name others
    best = max(known.values())
    needed = min(rung for rung, score in known.items() if best - score <= GAIN)
    return Budget(needed, needed == rungs[-1] or best == 0)


def _known(score: float) -> float:
    return -1.0 if np.isnan(score) else score


@dataclass(frozen=True)
class Ladder:
    """The ladder of a backbone, data set, task, head, regime and fraction. options: checked, with the usual recipe.

    Heads of segmentation on cached features climb with all seeds and from a sixteenth of the usual iterations to
    sixteen times as many; all others with one seed, from a quarter to four times.
    """

    workspace: Workspace
    partition: Partition
    task: str
    options: ProbeOptions
    fraction: float

    def __post_init__(self) -> None:
        if self.partition.choice.folds:
            raise ProbeError(
                "A cross-validation finds no number of iterations: the validation images of one fold are test images "
                "of others.\nNothing was trained. Give one:  --iterations N"
            )

    @property
    def cache(self) -> Cache:
        """The cache that it trains on."""
        return self.partition.source

    @cached_property
    def forecast(self) -> Forecast:
        """How long the usual rung takes."""
        return foreseen(self.training(self.usual, (0,)))

    @property
    def usual(self) -> int:
        """Iterations in the middle of the ladder."""
        assert self.options.recipe is not None  # filled in by checked
        return self.options.recipe.iterations

    @property
    def is_dense(self) -> bool:
        """Whether it climbs with all seeds, and far."""
        return SCORES[self.task].dense and self.options.tuning is None

    @property
    def rungs(self) -> tuple[int, ...]:
        """Iterations, ascending."""
        return rungs_of(self.usual, OCTAVES["dense" if self.is_dense else "others"])

    @cached_property
    def key(self) -> str:
        """The same for ladders that climb the same trainings."""
        return digest([self.comparison, self.cache.recipe.key, self.options.levels])

    @cached_property
    def comparison(self) -> str:
        """The same for ladders whose backbones are compared."""
        return self.training(self.usual, (0,)).comparison

    @property
    def title(self) -> str:
        """Backbone, data, head, regime and fraction, for a person."""
        regime = "" if self.options.tuning is None else f", {self.options.regime}"
        share = "" if self.fraction == 1 else f", {self.fraction:g} of train"
        return f"{self.cache.recipe.label} on {self.cache.data.name}: {self.task} {self.options.head}{regime}{share}"

    def climb(self, say: Say) -> None:
        """Train rung after rung until the ladder ends; rungs that are known are not trained again.

        Raises ProbeError where no rung has a score.
        """
        scores = dict(self.scores())
        rung = next_rung(self.rungs, self.usual, scores)
        if rung is not None:
            say(self.title)
        while rung is not None:
            begun = time.perf_counter()
            seeds = self._validated(rung)
            scores[rung] = float(np.mean(seeds))
            if is_main():
                self._keep(rung, seeds, time.perf_counter() - begun)
            name = self._score_name.replace("_", " ")
            say(f"  {rung} iterations: {name} {100 * scores[rung]:.1f} % on validation")
            rung = next_rung(self.rungs, self.usual, scores)
        self._check_scored(scores)

    def _check_scored(self, scores: Scores) -> None:
        if all(np.isnan(score) for score in scores.values()):
            raise ProbeError(f"{self.title}: validation has no score at any rung. Give a number:  --iterations N")

    def cost_text(self) -> str:
        """The cost of further rungs beyond those that are known, for a person."""
        scores = self.scores()
        left = [rung for rung in self.rungs if rung not in scores]
        seconds = [len(self._seeds()) * self.forecast.seconds(self._recipe(rung)) for rung in left]
        first = self.rungs[min(len(self.rungs), self.rungs.index(self.usual) + IDLE) - 1]  # the earliest end
        soon = sum(s for rung, s in zip(left, seconds, strict=True) if rung <= first)
        return (
            f"{self.title}: looking for the iterations it needs, {left[0]} to at most {left[-1]}, "
            f"{counted(len(self._seeds()), 'seed')}: {minutes_text(soon, sum(seconds))}"
        )

    def answer_text(self) -> str:
        """How many iterations are needed, why, and how many are trained, for a person."""
        scores, options = self.scores(), self.found()
        assert isinstance(options.budget, Budget) and options.recipe is not None
        needed, most = options.budget.needed, options.recipe.iterations
        best = max(scores, key=lambda rung: _known(scores[rung]))
        text = f"{self.title}: {needed} iterations, {100 * scores[needed]:.1f} % on validation"
        text += (
            ""
            if best == needed
            else f", the fewest within half a point of the best ({best}: {100 * scores[best]:.1f} %)"
        )
        text += "; fewer were not tried" if needed == self.rungs[0] else ""
        text += "; more might be better" if options.budget.open else ""
        if most == needed:
            return text
        asking = [name for name, own in self._needs(self._rows()).values() if own == most]
        return f"{text}; trained with {most}, as {', '.join(dict.fromkeys(asking))} needs"

    def scores(self) -> dict[int, float]:
        """Mean validation score of every rung that was trained with as many seeds as are asked for."""
        return self._own_scores(self._rows())

    def is_climbed(self) -> bool:
        """Whether the answer is known."""
        return next_rung(self.rungs, self.usual, self.scores()) is None

    def found(self) -> ProbeOptions:
        """The options with the largest number of iterations that any backbone of the comparison needs.

        Raises ProbeError before the ladder has ended.
        """
        rows = self._rows()
        scores = self._own_scores(rows)
        if next_rung(self.rungs, self.usual, scores) is not None:
            raise ProbeError(f"{self.title}: the ladder of its iterations has not ended. Run the same command again.")
        self._check_scored(scores)
        own = replace(budget_of(self.rungs, scores), comparison=self.comparison)
        most = max([own.needed, *(needed for key, (_, needed) in self._needs(rows).items() if key != self.key)])
        return replace(self.options, recipe=self._recipe(most), budget=own)

    def _needs(self, rows: Sequence[LadderRow]) -> dict[str, tuple[str, int]]:
        """(backbone, iterations that it needs) of every ladder of the comparison that has ended."""
        scores = self._scores_of(rows)
        named = {row.ladder: str(row.backbone) for row in rows if row.comparison == self.comparison}
        return {
            key: (name, budget_of(self.rungs, scores[key]).needed)
            for key, name in named.items()
            if next_rung(self.rungs, self.usual, scores[key]) is None
        }

    def _rows(self) -> list[LadderRow]:
        path = self.workspace.probes / FILE
        return from_main(lambda: _rungs(path, state_of(path)))

    def _own_scores(self, rows: Iterable[LadderRow]) -> dict[int, float]:
        seeds = len(self._seeds())
        whole = [row for row in rows if row.ladder == self.key and len(row.seed_scores) >= seeds]
        return {n: score for n, score in self._scores_of(whole).get(self.key, {}).items() if n in self.rungs}

    @staticmethod
    def _scores_of(rows: Iterable[LadderRow]) -> dict[str, dict[int, float]]:
        """Mean score of each rung by ladder; of rungs that were trained twice the last counts."""
        found: dict[str, dict[int, float]] = {}
        for row in rows:
            score = float("nan") if row.score is None else float(row.score)
            found.setdefault(row.ladder, {})[row.iterations] = score
        return found

    def _validated(self, rung: int) -> list[float]:
        """The validation score of each seed of a rung; nan where no trial ended with a finite loss."""
        found: list[float] = []
        every = self._seeds()
        for seeds in [every] if self.options.shared_order else [(seed,) for seed in every]:
            try:
                found += validated(self.training(rung, seeds), self.forecast)
            except DivergedError:
                found += [float("nan")] * len(seeds)
        return found

    def _keep(self, rung: int, seeds: Sequence[float], seconds: float) -> None:
        own = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "ladder": self.key,
            "comparison": self.comparison, "backbone": self.cache.recipe.label, "data": self.cache.data.name,
            "task": self.task, "head": self.options.head, "regime": self.options.regime, "fraction": self.fraction,
            "split": self.partition.choice.whole, "score_name": self._score_name, "iterations": rung,
            "score": float(np.mean(seeds)), "seed_scores": list(seeds), "seconds": seconds,
            **({} if self.options.verify else {"verified": False}),
        }  # fmt: skip
        append_row(self.workspace.probes / FILE, plain(own))

    @property
    def _score_name(self) -> str:
        return SCORES[self.task].main.name

    def _seeds(self) -> tuple[int, ...]:
        return tuple(range(self.options.seeds_at(self.fraction))) if self.is_dense else (0,)

    def _recipe(self, rung: int) -> TrainRecipe:
        assert self.options.recipe is not None
        return replace(self.options.recipe, iterations=rung)

    def training(self, rung: int, seeds: tuple[int, ...]) -> Training:
        """The training of some seeds at a rung."""
        options = replace(self.options, recipe=self._recipe(rung), budget="fixed", log=(), show=0)
        return Training(self.workspace, self.partition, self.task, options, seeds, self.fraction)


@lru_cache(1)
def _rungs(path: Path, state: tuple[int, ...]) -> list[LadderRow]:
    """The rows of a file of ladders, parsed once as long as its state is the same."""
    return [built(LadderRow, row) for row in read_rows(path, ladder_faults)[0]]


def left_behind(workspace: Workspace, ladders: Iterable[Ladder]) -> list[str]:
    """Notes on results of other backbones that were trained with fewer iterations than a later backbone needs."""
    most = {ladder.comparison: ladder.found().recipe for ladder in ladders}
    results: dict[tuple[str, str], list[ResultRow]] = {}
    for row in read_results(workspace.probes / "results.jsonl")[0] if most else ():
        if row.budget and row.budget.comparison in most:
            results.setdefault((row.budget.comparison, row.feature_key), []).append(row)
    notes = []
    for (comparison, _), rows in results.items():
        row = max(rows, key=lambda row: row.recipe.iterations)
        needed, has = most[comparison].iterations, row.recipe.iterations  # type: ignore[union-attr]
        if has < needed and is_whole(workspace.probes, row):  # else it is in no table either
            seeds = [own.seed for own in rows if own.recipe.iterations == has]
            again = level_command(read_card(head_folder(workspace.probes, row), whole=True), seeds)
            notes.append(
                f"{row.backbone} on {row.data} was trained with {has} iterations; a backbone that it is compared "
                f"with needs {needed}. To bring it level:  {again}"
            )
    return notes


def climb_all(ladders: Iterable[Ladder], say: Callable[[str], None], dry_run: bool = False) -> None:
    """Climb ladders, each once, after what all of them will cost is said. dry_run: say that alone."""
    every = {ladder.key: ladder for ladder in ladders}.values()
    for ladder in every:
        if not ladder.is_climbed():
            say(ladder.cost_text())
    for ladder in every if not dry_run else ():
        ladder.climb(say)
    for ladder in every if not dry_run else ():
        say(ladder.answer_text())
