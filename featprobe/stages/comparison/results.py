"""Scored heads as a comparison takes them: the rows that count, what each test image contributed, validation curves."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from featprobe.errors import FeatprobeError, ProbeError
from featprobe.intensity import DEFAULT_16BIT
from featprobe.io.disk import parse_json
from featprobe.io.fields import built
from featprobe.metrics import Statistic, mean_of
from featprobe.probes import HeadRecipe
from featprobe.probes.saved import head_folder, read_files, read_results
from featprobe.result_rows import Counts, FoundBudget, ResultRow
from featprobe.specs import digest
from featprobe.stages.comparison.convergence import Curve, best_so_far, curve_of, mean_curve
from featprobe.stages.comparison.recipes import shared_recipe
from featprobe.stages.comparison.tested import Tested, read_test
from featprobe.stages.training.saved_results import UNREADABLE, card_beside, damaged
from featprobe.tiling import Tiling

REGIMES = {"full": 2, "frozen-online": 1, "frozen": 0}  # by how much is trained or varied


@dataclass(frozen=True)
class ReadResult:
    """One result row of one seed that can be used.

    test: what its test images gave. scores: name -> the score as a function of how often each group of test images
    counts, over the classes of the truth. curve: the main score on validation, of the trial that was chosen.
    """

    row: ResultRow
    card: Mapping[str, Any]
    test: Tested
    scores: Mapping[str, Statistic]
    curve: Curve

    @property
    def tested(self) -> str:
        """Digest over ids and groups of its test images."""
        return digest(sorted(zip(self.test.ids, self.test.groups, strict=True)))


@dataclass(frozen=True)
class Unusable:
    """A result row that no comparison can use, and why."""

    folder: str
    reason: str


@dataclass(frozen=True, eq=False)
class Result:
    """The seeds of one run: what a line of the comparison stands for. Each is equal to itself alone."""

    runs: tuple[ReadResult, ...]

    @property
    def row(self) -> ResultRow:
        """The row of the first seed; the others differ in seed, scores, and the trial that was chosen."""
        return self.runs[0].row

    @cached_property
    def shared_recipe(self) -> str:
        """The same for results whose recipes meet, whatever the regime."""
        return shared_recipe(self.row, self.head)

    @cached_property
    def head(self) -> HeadRecipe:
        """The recipe of its head."""
        found: HeadRecipe = built(HeadRecipe, self.runs[0].card["head"])
        return found

    @property
    def comparable(self) -> str:
        """The same for results that may stand in one table, as far as the names of their splits tell."""
        return digest([self.row.choice.key, self.tested_alike])

    @property
    def tested_alike(self) -> str:
        """The same for results with the same test images, groups, labels and rules of scoring, whatever the split."""
        return digest([*self.row.test_set, self.runs[0].tested])

    @property
    def backbone(self) -> tuple[str, str]:
        """Short name and weights."""
        return self.row.backbone, self.row.weights_sha256

    @property
    def augmented(self) -> bool:
        """Whether training looked at augmented images."""
        return self.row.augmentation is not None

    @property
    def variant(self) -> str:
        """The regime, and whether augmentation is as usual there: none in `frozen`, some in the others."""
        usual = self.augmented == (self.row.regime != "frozen")
        return f"{self.row.regime}{'' if usual else ', augmented' if self.augmented else ', not augmented'}"

    @property
    def cell(self) -> tuple[Any, ...]:
        """The parts other than the recipe in which results of one table differ: backbone, variant, head, share."""
        return (*self.backbone, self.variant, self.row.head, self.row.fraction)

    @property
    def scale(self) -> str:
        """Height x width that images, or tiles of so many pixels, were brought to."""
        features = self.runs[0].card["features"]
        tiles = f" from tiles of {features['tile']}" if features.get("tile") else ""
        return "x".join(map(str, features["size"])) + tiles

    @property
    def dtype(self) -> str:
        """In which its features were stored; "" where none were, as of a backbone that is trained."""
        return self.runs[0].card["features"].get("dtype", "") if self.row.regime == "frozen" else ""

    @property
    def size(self) -> str:
        """The scale, and what else tells results of one backbone apart: how tiles were cut, stored views, intensity."""
        features = self.runs[0].card["features"]
        tiling = Tiling.in_json(features)
        parts = [self.scale, *(tiling.manner if tiling else ()), *self.row.views]
        usual = ("none", str(DEFAULT_16BIT))
        return ", ".join([*parts, *{features["intensity"]}.difference(usual)])

    @property
    def validation(self) -> float:
        """Mean over seeds of the main score on validation; -1 where there is none."""
        values = [run.row.validation for run in self.runs]
        return float(np.mean([-1.0 if value is None else value for value in values]))

    @cached_property
    def curve(self) -> Curve:
        """Mean over seeds of the main score on validation."""
        return mean_curve([run.curve for run in self.runs])

    @cached_property
    def kept(self) -> Curve:
        """The same of the weights that each seed would have kept if its training had ended at that point."""
        best = self.weights_from == "best validation"
        return mean_curve([best_so_far(run.curve) if best else run.curve for run in self.runs])

    @property
    def main(self) -> str:
        """The score that decides."""
        return self.row.scores.main.name

    @property
    def seeds(self) -> tuple[int, ...]:
        """Numbers of its seeds, ascending."""
        return tuple(run.row.seed for run in self.runs)

    @property
    def weights_from(self) -> str:
        """The point of the validation curve that the weights come from; in rows of an older featprobe, its end."""
        return self.row.weights_from

    @property
    def own_subsets(self) -> bool:
        """Whether each seed was trained on a share of the training images of its own."""
        return self.row.fraction < 1 and self.row.subset == "by seed"

    @property
    def solved(self) -> bool:
        """Whether another seed would give the same head: it is solved, nothing is drawn, and it has the same images."""
        return self.row.is_solved and not self.row.kind.drawn and self.row.fraction == 1

    @property
    def random_weights(self) -> bool:
        """Whether its backbone was never trained: a control."""
        spec = self.runs[0].card["backbone"] or {}
        return spec.get("source") == "random" or self.row.backbone.endswith("-random")

    @property
    def budget(self) -> FoundBudget | None:
        """How its number of iterations was found; None where it was fixed, and no one knows whether it is enough."""
        return self.row.budget

    @property
    def compared_budgets(self) -> tuple[Any, ...]:
        """The same for results whose numbers of iterations were found for one comparison."""
        return (*self.cell[-2:], self.row.regime, self.budget.comparison if self.budget else None)

    def each(self, name: str) -> list[Statistic]:
        """A score of each seed."""
        return [run.scores[name] for run in self.runs]

    def score(self, name: str) -> Statistic:
        """Mean over seeds of a score."""
        return mean_of(self.each(name))

    def seconds(self) -> tuple[float, float, float]:
        """Seconds of training (mean over the seeds' passes), of extraction, and of both; nan where not kept.

        A live backbone needs no extraction.
        """
        train = float(np.mean([run.row.seconds.train for run in self.runs]))
        extract = self.row.seconds.extract if self.row.regime == "frozen" else 0.0
        taken = float("nan") if extract is None else float(extract)
        return train, taken, train + taken


def load_results(
    probes: Path, folders: Collection[str] | None = None
) -> tuple[list[Result], list[Unusable], list[str]]:
    """Results in a stable order, rows that can't be used, and what is wrong with lines of results.jsonl.

    Of rows that are the same run of the same seed the last counts. folders: of the rows that are looked at, None for
    all. Raises ProbeError where there is no row at all.
    """
    rows, notes = read_results(probes / "results.jsonl")
    rows = [row for row in rows if folders is None or row.folder in folders]
    last: dict[str, ResultRow] = {}
    unusable, found = [], list[ReadResult]()
    for row in rows:
        last[digest([row.run, row.seed, row.fold])] = row
    for counted in last.values():
        try:
            found.append(read_result(probes, counted))
        except FeatprobeError as error:
            unusable.append(Unusable(counted.folder, str(error)))
    if not rows:
        raise ProbeError(
            f"There is no result in {probes} to compare.\n" + "".join(f"{note}\n" for note in notes)
            + "Make some:  featprobe extract --backbone embedded --data xray\n"
            "            featprobe probe --task semseg"
        )  # fmt: skip
    results: dict[tuple[str, str], list[ReadResult]] = {}
    for run in _joined(found, unusable):
        results.setdefault((digest(run.row.run), run.tested), []).append(run)
    whole = [Result(tuple(sorted(runs, key=lambda run: run.row.seed))) for runs in results.values()]
    return sorted(whole, key=_order), unusable, notes


def _joined(runs: Sequence[ReadResult], unusable: list[Unusable]) -> list[ReadResult]:
    """Runs with the folds of each cross-validation and seed as one; those that lack a fold become unusable."""
    whole = [run for run in runs if run.row.fold is None]
    validations: dict[str, dict[int, ReadResult]] = {}
    for run in runs:
        if run.row.fold is not None:
            key = digest([run.row.run, run.row.seed])
            validations.setdefault(key, {})[run.row.fold] = run
    for folds in validations.values():
        needed = next(iter(folds.values())).row.choice.folds
        missing = [str(fold) for fold in range(1, needed + 1) if fold not in folds]
        if missing:
            reason = f"a cross-validation needs all {needed} folds; without a usable result: {', '.join(missing)}"
            unusable += [Unusable(run.row.folder, reason) for run in folds.values()]
        else:
            whole.append(joined([folds[fold] for fold in sorted(folds)]))
    return whole


def joined(folds: Sequence[ReadResult]) -> ReadResult:
    """All folds of a cross-validation as one run. Its test set is all images, each scored by the head of its own fold.

    Confusions are summed over all images, and objects found in any image are ranked together: a score is what it is on
    one test set, no mean over folds. Validation scores, curves and counts of training images are means over folds,
    seconds of training are sums.
    """
    row = folds[0].row
    every = [fold.row for fold in folds]
    test: Tested = type(folds[0].test).joined([fold.test for fold in folds])
    whole = replace(
        row,
        images=_of_all([own.images for own in every]),
        groups=_of_all([own.groups for own in every if own.groups]) if row.groups else None,
        fold=None,
        seconds=replace(row.seconds, train=sum(own.seconds.train for own in every)),
        val={name: _mean([own.val.get(name) for own in every]) for name in row.val},
        test=test.scores(row),
    )
    return ReadResult(whole, folds[0].card, test, test.statistics(row), mean_curve([fold.curve for fold in folds]))


def _of_all(counts: Sequence[Counts]) -> Counts:
    """Over the folds of a cross-validation: sums of what was tested, means of what was trained and chosen on."""
    train, val, test = (sum(own) for own in zip(*((c.train, c.val, c.test) for c in counts), strict=True))
    return Counts(train // len(counts), val // len(counts), test)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def _order(result: Result) -> tuple[Any, ...]:
    row = result.row
    return (row.data, row.task, row.split, result.comparable, row.head, row.backbone, row.fraction,
            REGIMES[row.regime], result.variant, result.size, result.dtype, row.recipe_key)  # fmt: skip


def read_result(probes: Path, row: ResultRow) -> ReadResult:
    """A row with what lies in its folder; raises ProbeError, saying why, where it can't be used.

    What is read is what the card says, byte for byte.
    """
    folder = head_folder(probes, row)
    if not row.is_known or row.regime not in REGIMES:
        raise ProbeError(f"{row.task} in the regime {row.regime} is not known here")
    card = card_beside(probes, row)
    try:
        test, scores = read_test(folder, card, row)
        (curves,) = map(parse_json, read_files(folder, card, ["curves.json"]))
        (chosen,) = [trial["curve"] for trial in curves if trial["chosen"]]
        curve = Curve((), ()) if row.is_solved else curve_of(chosen, row.scores.main.name)
    except ProbeError as error:
        raise damaged(row, str(error)) from error
    except UNREADABLE as error:
        raise damaged(row, f"what lies beside its head can't be read: {type(error).__name__}: {error}") from error
    return ReadResult(row, card, test, scores, curve)


def comparable_sets(results: Sequence[Result]) -> list[list[Result]]:
    """Results that may stand in one table, in their order."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.comparable, []).append(result)
    return list(found.values())


def representatives(results: Sequence[Result]) -> dict[tuple[Any, ...], Result]:
    """One result for each cell of a table; the results of a cell differ in recipe or input size.

    Backbones and regimes are to meet: results of one head and share are taken at the recipe and scale that most of
    their cells have, of several such the best on validation. Where a cell has none of these, one of that recipe comes
    before one of that scale; and of what is left the best on validation, a budget that was found small last.
    """
    found: dict[tuple[Any, ...], Result] = {}
    for part in dict.fromkeys(result.cell[-2:] for result in results):
        own = [result for result in results if result.cell[-2:] == part]
        recipe, scale = _meeting(own)
        short = shortfalls(own)

        def fit(result: Result, recipe: str = recipe, scale: str = scale, short: Any = short) -> tuple[Any, ...]:
            same = (result.shared_recipe == recipe, result.scale == scale)
            return (all(same), *same, result not in short, result.validation)

        for result in own:
            if result.cell not in found or fit(result) > fit(found[result.cell]):
                found[result.cell] = result
    return {result.cell: found[result.cell] for result in results}


def _meeting(results: Sequence[Result]) -> tuple[str, str]:
    """The recipe and scale that most cells of these results have, of several the best on validation."""
    places: dict[tuple[str, str], dict[tuple[Any, ...], float]] = {}
    for result in results:
        own = places.setdefault((result.shared_recipe, result.scale), {})
        own[result.cell] = max(own.get(result.cell, -1.0), result.validation)
    return max(places, key=lambda place: (len(places[place]), np.mean(list(places[place].values()))))


def shortfalls(results: Sequence[Result]) -> dict[Result, int]:
    """Results of a table whose number of iterations was found and is too small, and how many are known to be needed.

    Another backbone of the same head, share, regime and recipe needed more; or the search ended at its top, and more
    than that is needed: then the number is the one that was trained.
    """
    most: dict[tuple[Any, ...], int] = {}
    kinds = {result: result.compared_budgets for result in results if result.budget}
    for result, kind in kinds.items():
        most[kind] = max(most.get(kind, 0), result.budget.needed if result.budget else 0)
    return {
        result: max(most[kind], result.row.recipe.iterations)
        for result, kind in kinds.items()
        if result.row.recipe.iterations < most[kind] or (result.budget and result.budget.open)
    }
