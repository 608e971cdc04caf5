"""The world of benchmarks/coverage.py in which systems are trained: each seed has a part of its own.

Tables of results of procedures that are equal; each was run with several seeds, all scored on the same parts. The
seeds' true scores and what a seed does on a part differ as on the set `surface` (see benchmarks/seeds.py). Parts score
independently, so that only the way is looked at in which seeds and groups are counted together.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ttest_ind

from featprobe.metrics import Statistic, procedure_difference, seed_spread

GROUPS, SEEDS, RESULTS = (24, 48, 100, 300), (2, 3, 5), (2, 6)
SEED_SD, ON_GROUP_SD, GROUP_SD = 0.0030, 0.0172, 0.08  # of a seed; of seed x group, for a group; of a group
PROCEDURES = (0.0, 0.0172)  # of procedure x group, for a group
LEAD = 0.01  # that is to be found, where power is looked at
RESAMPLES, CHUNK = 999, 200  # of one table; tables of one task of the pool
TABLES, AGAIN = 2400, 10_000  # of a cell; of one at its limit
REJECTED = 0.05
POWER = {2: -0.03, 6: 0.10}  # results -> by how much more power than Student's t is the least

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Cell:
    """Tables alike. results: that are pooled.

    Standard deviations: procedure_sd of procedure x group, on_group_sd of seed x group, both for a group; seed_sd.
    """

    groups: int
    seeds: int
    results: int
    procedure_sd: float
    seed_sd: float = SEED_SD
    on_group_sd: float = ON_GROUP_SD

    @property
    def name(self) -> str:
        """Of a cell among those of its world and size of table."""
        return f"{self.groups}x{self.seeds}"

    @property
    def limits(self) -> tuple[float, float]:
        """The least and the largest share of equals that may be found to differ."""
        sure = self.seeds > 2 and (self.procedure_sd > 0 or self.results > 2)
        return 0.035 if sure else 0.02, 0.075 if self.seeds == 2 else 0.065


CELLS = tuple(Cell(*values) for values in product(GROUPS, SEEDS, RESULTS, PROCEDURES))


@dataclass(frozen=True)
class Count:
    """Tables that were drawn; those in which equals were found to differ, a lead was found, and was by Student's t."""

    tables: int = 0
    equals: int = 0
    leads: int = 0
    leads_by_t: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(
            self.tables + other.tables,
            self.equals + other.equals,
            self.leads + other.leads,
            self.leads_by_t + other.leads_by_t,
        )

    @property
    def share(self) -> float:
        """Of equals that are found to differ."""
        return self.equals / self.tables

    def near(self, limits: Sequence[float]) -> bool:
        """Whether the share is within a standard error of a limit."""
        error = (self.share * (1 - self.share) / self.tables) ** 0.5
        return any(abs(self.share - limit) <= error for limit in limits)


def mean_score(scores: Floats, lead: float = 0.0) -> Statistic:
    """The mean over groups of scores, (groups,), and a lead on each."""
    names, parts = tuple(map(str, range(len(scores)))), (scores + lead) / len(scores)
    return Statistic(lambda w: w @ parts, lambda w: parts - (w @ parts)[:, None] / len(scores), (names,))


def draw_table(rng: np.random.Generator, cell: Cell) -> Floats:
    """Scores of equals, (results, seeds, groups)."""
    groups = 0.5 + rng.normal(0, GROUP_SD, cell.groups)
    procedures = rng.normal(0, cell.procedure_sd, (cell.results, 1, cell.groups))
    seeds = rng.normal(0, cell.seed_sd, (cell.results, cell.seeds, 1))
    return groups + procedures + seeds + rng.normal(0, cell.on_group_sd, (cell.results, cell.seeds, cell.groups))


@dataclass(frozen=True)
class Task:
    """Some tables of a cell. counted: whether seeds are; else groups alone, which this world must find out."""

    cell: Cell
    tables: int
    seed: tuple[int, ...]
    counted: bool = True


def look(task: Task) -> Count:
    """The counts of a task; power where procedures differ in nothing but their mean."""
    rng, cell = np.random.default_rng(task.seed), task.cell
    total = Count()
    for _ in range(task.tables):
        scores, seed = draw_table(rng, cell), int(rng.integers(2**31))
        first, second, *others = [[mean_score(own) for own in result] for result in scores]
        spread = seed_spread([first, second, *others]) if task.counted else None
        equals = procedure_difference(first, second, spread, resamples=RESAMPLES, seed=seed)
        lead = by_t = 1.0
        if cell.procedure_sd == 0:
            ahead = [mean_score(own, LEAD) for own in scores[0]]
            lead = procedure_difference(ahead, second, spread, resamples=RESAMPLES, seed=seed).p_value
            by_t = float(ttest_ind(scores[0].mean(1) + LEAD, scores[1].mean(1)).pvalue)
        total += Count(1, equals.p_value <= REJECTED, lead <= REJECTED, by_t <= REJECTED)
    return total


def look_at_cells(
    pool: ProcessPoolExecutor, cells: Sequence[Cell], tables: int, seed: Sequence[int], counted: bool
) -> dict[Cell, Count]:
    """So many tables of each cell."""
    tasks = [
        Task(cell, min(CHUNK, tables - begin), (*seed, CELLS.index(cell), begin), counted)
        for cell in sorted(cells, key=lambda cell: -cell.groups)  # the longest first
        for begin in range(0, tables, CHUNK)
    ]
    counts = {cell: Count() for cell in cells}
    for task, count in zip(tasks, pool.map(look, tasks), strict=True):
        counts[task.cell] += count
    return counts


def look_at_seeds(pool: ProcessPoolExecutor, tables: int, seed: int, counted: bool = True) -> dict[Cell, Count]:
    """All cells; those within a standard error of a limit are looked at again, with more tables, which then count."""
    counts = look_at_cells(pool, CELLS, tables, (seed, 0), counted)
    near = [cell for cell, count in counts.items() if count.near(cell.limits)]
    return counts | (look_at_cells(pool, near, AGAIN * tables // TABLES, (seed, 1), counted) if near else {})


def power(counts: Mapping[Cell, Count], results: int) -> tuple[float, float]:
    """Mean share of tables in which a lead is found, and is by Student's t over the means of the seeds."""
    alike = [count for cell, count in counts.items() if cell.results == results and cell.procedure_sd == 0]
    shares = [(count.leads / count.tables, count.leads_by_t / count.tables) for count in alike]
    ours, by_t = np.mean(shares, axis=0).tolist()
    return ours, by_t


def seeds_hold(counts: Mapping[Cell, Count]) -> bool:
    """Whether every share of equals is within its limits, and leads are found often enough."""
    within = all(cell.limits[0] <= count.share <= cell.limits[1] for cell, count in counts.items())
    powers = {results: power(counts, results) for results in RESULTS}
    return within and all(powers[results][0] >= powers[results][1] + more for results, more in POWER.items())


def rows_of_seeds(counts: Mapping[Cell, Count]) -> list[dict[str, str]]:
    """A line for each number of groups and seeds: percent of the tables; beside those looked at again stands a +."""
    rows = []
    for groups, seeds in product(GROUPS, SEEDS):
        row = {"groups x seeds": f"{groups}x{seeds}"}
        for procedure_sd, results in product(PROCEDURES, RESULTS):
            cell = Cell(groups, seeds, results, procedure_sd)
            count = counts[cell]
            again = "+" if count.tables > min(other.tables for other in counts.values()) else ""
            outside = "" if cell.limits[0] <= count.share <= cell.limits[1] else "!"
            row[f"P {100 * procedure_sd:g}, {results} results"] = f"{100 * count.share:.1f}{again}{outside}"
        for results in RESULTS:
            count = counts[Cell(groups, seeds, results, 0.0)]
            row[f"lead found, {results} (t)"] = (
                f"{100 * count.leads / count.tables:.0f} ({100 * count.leads_by_t / count.tables:.0f})"
            )
        rows.append(row)
    return rows


def json_of_seeds(counts: Mapping[Cell, Count]) -> dict[str, object]:
    """Shares of equals found to differ, of procedures alike on all groups and of two results first; power."""
    tables: dict[str, dict[str, float]] = {}
    for cell, count in counts.items():
        plain = cell.procedure_sd == 0 and cell.results == RESULTS[0]
        name = f"procedure x group {cell.procedure_sd:g}, {cell.results} results"
        tables.setdefault("seed_world" if plain else name, {})[cell.name] = round(count.share, 4)
    powers = {results: [round(share, 4) for share in power(counts, results)] for results in RESULTS}
    return {
        "seed_world": tables.pop("seed_world"),
        "seed_world_others": tables,
        "seed_power": {f"{results} results": ours for results, (ours, _) in powers.items()},
        "seed_power_of_t": {f"{results} results": by_t for results, (_, by_t) in powers.items()},
        "seed_holds": seeds_hold(counts),
    }
