"""Whether backbones and regimes differ: which results are paired, what may be claimed of a pair, p values over all of
them.

A difference is claimed of the procedures (a backbone with its head and recipe, whatever the seed) where both sides have
several seeds, or need none; of the trained heads alone where they don't; and of nothing where the recipes differ.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from featprobe.errors import ProbeError
from featprobe.metrics import (
    Difference,
    SeedSpread,
    holm,
    modality_gap,
    paired_difference,
    procedure_difference,
    procedure_gap,
    seed_spread,
)
from featprobe.stages.comparison.convergence import iterations_to, still_rising
from featprobe.stages.comparison.gap_names import check_gap
from featprobe.stages.comparison.recipes import Field, fields_that_differ
from featprobe.stages.comparison.results import REGIMES, Result, representatives, shortfalls

Line = dict[str, Any]
Kind = Literal["backbones", "regimes"]
Names = Mapping[tuple[str, str], str]
ONE_SEED, ONE_ORDER = "one seed", "one order of the images for all seeds"  # why a claim is of the heads alone
ONE_SHARE = "one share of the training images for all seeds"


@dataclass(frozen=True)
class Table:
    """Results that may stand in one table.

    chosen: one of each cell, in order. short: those whose budget was found and is too small, with the iterations that
    are known to be needed. names: what people call each backbone.
    """

    title: str
    results: tuple[Result, ...]
    chosen: tuple[Result, ...]
    short: Mapping[Result, int]
    names: Names

    @classmethod
    def of(cls, title: str, results: Sequence[Result]) -> "Table":
        """The table of some results."""
        chosen = tuple(representatives(results).values())
        return cls(title, tuple(results), chosen, shortfalls(results), backbone_names(results))


def backbone_names(results: Sequence[Result]) -> dict[tuple[str, str], str]:
    """The printed name of each backbone; if a name stands for several weights, their hash is added."""
    every = sorted({result.backbone for result in results})
    labels = [label for label, _ in every]
    return {(label, sha): label if labels.count(label) == 1 else f"{label} ({sha[:8]})" for label, sha in every}


def corrected(lines: Iterable[Line]) -> None:
    """Fill in the p values of differences that are corrected for all of them; those without a verdict do not count."""
    every = list(lines)
    for line, value in zip(every, holm([line["p"] for line in every]), strict=True):
        line["p_holm"] = value


# ---- what may be claimed of a pair -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Two results of one table whose scores are taken from each other. fields: in which their recipes differ."""

    kind: Kind
    a: Result
    b: Result
    table: Table
    fields: tuple[Field, ...]

    @classmethod
    def of(cls, kind: Kind, a: Result, b: Result, table: Table) -> "Pair":
        """A pair; of two regimes, the one that trains or varies more comes first."""
        rank = [(REGIMES[result.row.regime], result.augmented) for result in (a, b)]
        first, second = (b, a) if kind == "regimes" and rank[1] > rank[0] else (a, b)
        return cls(kind, first, second, table, _fields(kind, first, second))

    @property
    def sides(self) -> tuple[Result, Result]:
        """Both results."""
        return self.a, self.b

    @property
    def of_heads(self) -> str:
        """Why a difference says something of these trained heads alone; empty where it is of the procedures."""
        trained = [result for result in self.sides if not result.solved]
        if any(len(result.runs) == 1 for result in trained):
            return ONE_SEED
        if any(result.row.shared_order for result in trained):
            return ONE_ORDER
        return ONE_SHARE if any(result.row.fraction < 1 and not result.own_subsets for result in self.sides) else ""

    @property
    def same_seeds(self) -> bool:
        """Whether both were trained on the same shares of the training images, one a seed."""
        return all(result.own_subsets for result in self.sides) and self.a.seeds == self.b.seeds

    def scores(self) -> tuple[list[Any], list[Any]]:
        """The main score of each side, a statistic per seed."""
        return self.a.each(self.a.main), self.b.each(self.a.main)

    def spread(self) -> SeedSpread | None:
        """The effect of seeds on the score, pooled over results that are like the two; None for solved heads.

        Pooled are results of the table that stand for a cell and share head, fraction, regime and recipe with one of
        the two. Between regimes they are those of backbones that have both, so that each regime counts alike: seeds do
        more to a backbone that is trained. A control with random weights finds next to nothing, whatever the seed, and
        is pooled only where it is a side.
        """
        if all(result.solved for result in self.sides):
            return None
        variants = [result.variant for result in self.sides]
        recipes = {result.shared_recipe for result in self.sides}
        alike = [
            result for result in self.table.chosen
            if result.cell[-2:] == self.a.cell[-2:] and result.variant in variants and result.shared_recipe in recipes
            and result.own_subsets in {side.own_subsets for side in self.sides} and not result.row.shared_order
            and (not result.random_weights or any(side.random_weights for side in self.sides))
            and (not self.same_seeds or result.seeds == self.a.seeds)
        ]  # fmt: skip
        both = [own for own in alike if {r.variant for r in alike if r.backbone == own.backbone} == set(variants)]
        return seed_spread([result.each(result.main) for result in (both if self.kind == "regimes" else alike)])


def _fields(kind: Kind, a: Result, b: Result) -> tuple[Field, ...]:
    """In what two results differ beside what is compared; numbers of seeds are named alone."""
    found = fields_that_differ(kind, (a.row, a.head), (b.row, b.head))
    if a.dtype and b.dtype and a.dtype != b.dtype:
        found = (*found, Field("dtype", a.dtype, b.dtype, bars=False))
    alike = a.solved or b.solved or len(a.runs) == len(b.runs)
    return found if alike else (*found, Field("seeds", str(len(a.runs)), str(len(b.runs)), bars=False))


def _seed_text(results: Sequence[Result]) -> str:
    """The seeds of the heads of results, for people."""
    every = list(dict.fromkeys(result.seeds for result in results))
    texts = [f"seed{'s' if len(own) > 1 else ''} {', '.join(map(str, own))}" for own in every]
    return f"{texts[0]} each" if len(texts) == 1 else " and ".join(texts)


def _claim(of_heads: str, fields: Sequence[Field], across: bool, sides: Sequence[Result]) -> Line:
    """The kind of claim that a difference supports: `procedures`, `heads`, or `none` of the two."""
    barring = [str(field) for field in fields if field.bars]
    return {
        "claim": "none" if barring and not across else "heads" if of_heads else "procedures",
        "of_heads": of_heads,
        "seeds": _seed_text(sides),
        "recipes": "; ".join(dict.fromkeys(barring)),
        "named": "; ".join(dict.fromkeys(str(field) for field in fields if not field.bars)),
    }


def _found(claim: Line, found: Difference) -> Line:
    """A difference with its interval; no p value where nothing is claimed. A limit at a bound of the scale is none."""
    low, high = (found.low, found.high) if found.has_interval else (float("nan"), float("nan"))
    p_value = float("nan") if claim["claim"] == "none" else found.p_value
    values = {"difference": found.estimate, "low": low, "high": high, "p": p_value, "p_holm": float("nan")}
    return {**values, "groups": found.groups, **claim}


# ---- differences within a table --------------------------------------------------------------------------------------


def differences_of(table: Table, across: bool = False) -> list[Line]:
    """Differences of the main score between backbones and between regimes. across: also where recipes differ."""
    pairs = [Pair.of(kind, a, b, table) for a, b in combinations(table.chosen, 2) if (kind := kind_of_pair(a, b))]
    pairs.sort(key=lambda pair: (pair.a.row.head, -pair.a.row.fraction, pair.kind))
    return [_line(pair, across) for pair in pairs]


def kind_of_pair(a: Result, b: Result) -> Kind | None:
    """The one thing in which two results of a table differ, if it is one that is asked about."""
    if (a.row.head, a.row.fraction) != (b.row.head, b.row.fraction):
        return None
    if a.variant == b.variant and a.backbone != b.backbone:
        return "backbones"
    return "regimes" if a.backbone == b.backbone and a.variant != b.variant else None


def _line(pair: Pair, across: bool) -> Line:
    a, b, names = pair.a, pair.b, pair.table.names
    row, backbones = a.row, pair.kind == "backbones"
    checked = all(result.budget for result in pair.sides)
    claim = _claim(pair.of_heads, pair.fields, across, pair.sides)
    return {
        "set": pair.table.title,
        "kind": pair.kind,
        "within": f"{a.variant if backbones else names[a.backbone]}, {row.head}",
        "head": row.head,
        "fraction": row.fraction,
        "score": a.main,
        "a": names[a.backbone] if backbones else a.variant,
        "b": names[b.backbone] if backbones else b.variant,
        **_found(claim, _difference(pair, claim)),
        "scale_a": a.scale,
        "scale_b": b.scale,
        "iterations_a": a.row.iterations,
        "iterations_b": b.row.iterations,
        "confounded": not backbones and confounded(a, b, pair.table.chosen),
        "not_converged": still_rising(a.kept) or still_rising(b.kept),
        "budget_unchecked": any(budget_unchecked(result) for result in pair.sides),
        "budget_small": any(result in pair.table.short for result in pair.sides),
        "a_reaches_b": iterations_to(a.kept, b.kept.final) if checked else None,
        "b_reaches_a": iterations_to(b.kept, a.kept.final) if checked else None,
    }


def _difference(pair: Pair, claim: Line) -> Difference:
    resamples, (a, b) = pair.a.row.scores.resamples, pair.scores()
    if claim["claim"] == "procedures":
        fixed = (pair.a.solved, pair.b.solved)
        return procedure_difference(a, b, pair.spread(), same_seeds=pair.same_seeds, fixed=fixed, resamples=resamples)
    return paired_difference(pair.a.score(pair.a.main), pair.b.score(pair.a.main), resamples=resamples)


def budget_unchecked(result: Result) -> bool:
    """Whether nobody has looked if more iterations would give more."""
    return not result.row.is_solved and not result.budget


def confounded(full: Result, frozen: Result, chosen: Sequence[Result]) -> bool:
    """Whether full - frozen may be augmentation's doing, and no result beside the two tells how much.

    One that tells is a frozen backbone on augmented images, or a full one without augmentation.
    """
    if (full.row.regime, frozen.row.regime) != ("full", "frozen") or full.augmented == frozen.augmented:
        return False
    beside = [r for r in chosen if (*r.backbone, r.cell[-2:]) == (*full.backbone, full.cell[-2:])]
    return not any((r.row.regime != "full") == r.augmented for r in beside)


# ---- modality gap ----------------------------------------------------------------------------------------------------


def modality_gaps(
    tables: Sequence[Table], gap: Sequence[str] = (), on: Sequence[str] = (), across: bool = False
) -> list[Line]:
    """(A - B on the first set) - (A - B on the second) for each task, regime, head and fraction that has all four.

    gap: names of A and B; on: names of the two sets. Where neither is given they are those of all results, if these are
    of two backbones on two sets; else there is no gap. Raises ProbeError where names are not known, or no four results
    fit together.
    """
    results = [result for table in tables for result in table.results]
    if not gap and not on:
        gap, on = _only_gap(results)
        return _all_gaps(tables, gap, on, across) if gap else []
    check_gap(gap, on, *_named(results))
    lines = _all_gaps(tables, gap, on, across)
    if not lines:
        raise ProbeError(
            f"No gap can be made: {' and '.join(gap)} on {' and '.join(on)} have no task, split, regime, head and "
            "fraction in common.\nMake what is missing:  featprobe extract, then  featprobe probe"
        )
    return lines


def _named(results: Sequence[Result]) -> tuple[list[str], list[str]]:
    """The backbones and the data sets of results, in their order."""
    rows = [result.row for result in results]
    return list(dict.fromkeys(row.backbone for row in rows)), list(dict.fromkeys(row.data for row in rows))


def _only_gap(results: Sequence[Result]) -> tuple[list[str], list[str]]:
    """The two backbones and the two data sets that all results are of; nothing where there are more or fewer."""
    backbones, sets = _named(results)
    return (backbones, sets) if len(backbones) == len(sets) == 2 else ([], [])


def _all_gaps(tables: Sequence[Table], gap: Sequence[str], on: Sequence[str], across: bool) -> list[Line]:
    return [line for one in tables for two in tables for line in _gaps_between((one, two), gap, on, across)]


def _gaps_between(tables: tuple[Table, Table], gap: Sequence[str], on: Sequence[str], across: bool) -> list[Line]:
    """The gaps of two tables, where these are of the two sets that are asked for."""
    if any(name not in {r.row.data for r in table.results} for table, name in zip(tables, on, strict=True)):
        return []
    cells = [{_gap_cell(r): r for r in table.chosen if r.row.backbone in gap} for table in tables]
    lines = []
    for cell in cells[0]:
        four = [own.get((*cell[:-1], name)) for own in cells for name in gap]
        if cell[-1] == gap[0] and all(four):
            a1, b1, a2, b2 = (result for result in four if result)
            pairs = (Pair.of("backbones", a1, b1, tables[0]), Pair.of("backbones", a2, b2, tables[1]))
            lines.append(_gap_line(pairs, gap, on, across))
    return lines


def _gap_cell(result: Result) -> tuple[Any, ...]:
    row = result.row
    split = "a file's" if row.choice.file else row.choice.key
    return row.task, row.instances, row.head, row.fraction, split, result.variant, row.backbone


def _gap_line(pairs: tuple[Pair, Pair], gap: Sequence[str], on: Sequence[str], across: bool) -> Line:
    first, second = pairs
    row, sides = first.a.row, [*first.sides, *second.sides]
    fields = [*first.fields, *second.fields, *_fields("backbones", first.a, second.a)]
    claim = _claim(first.of_heads or second.of_heads, fields, across, sides)
    return {
        "task": row.task,
        "split": row.split,
        "regime": first.a.variant,
        "head": row.head,
        "fraction": row.fraction,
        "score": first.a.main,
        **{"a": gap[0], "b": gap[1], "first": on[0], "second": on[1]},
        **_found(claim, _gap(first, second, claim)),
        "iterations_a": first.a.row.iterations,
        "iterations_b": second.a.row.iterations,
        "not_converged": any(still_rising(result.kept) for result in sides),
        "budget_unchecked": any(budget_unchecked(result) for result in sides),
        "budget_small": any(result in pair.table.short for pair in pairs for result in pair.sides),
    }


def _gap(first: Pair, second: Pair, claim: Line) -> Difference:
    resamples = first.a.row.scores.resamples
    if claim["claim"] == "procedures":
        return procedure_gap(
            first.scores(), second.scores(), (first.spread(), second.spread()),
            same_seeds=first.same_seeds and second.same_seeds, resamples=resamples,
        )  # fmt: skip
    a1, b1, a2, b2 = (side.score(side.main) for pair in (first, second) for side in pair.sides)
    return modality_gap((a1, b1), (a2, b2), resamples=resamples)
