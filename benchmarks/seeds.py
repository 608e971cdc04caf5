"""Twelve seeds of one backbone, compared as if they were two backbones.

    python benchmarks/seeds.py

A linear head is trained with twelve seeds on features of `embedded`, on the generated set `surface`. Three of its seeds
are compared with three others by the function that `compare` calls, as a table of two results: whatever it finds is a
false alarm. Pairs of subsets have seeds in common, so that the share of false alarms scatters a great deal from one
backbone to another: beside it stands what it is in simulated worlds with the variances that were found.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from _bench import positive, print_table
from _seeds import Cell, draw_table, mean_score

from featprobe.kinds import KINDS
from featprobe.metrics import SeedVariance, Statistic, procedure_difference, seed_spread
from featprobe.stages.comparison.results import load_results
from featprobe.stages.extraction.extract import extract
from featprobe.stages.extraction.extract_options import ExtractOptions
from featprobe.stages.training.probe import probe
from featprobe.stages.training.probe_options import ProbeOptions
from featprobe.stages.workspace import Workspace

BACKBONE, DATA, SIZE, ITERATIONS = "embedded", "surface", (256, 256), 1000
SCORE = "miou_foreground"
SEEDS, EACH, PAIRS = 12, 3, 60  # seeds, of each side, pairs of subsets
TARGET = 0.12  # share of the pairs that may be beyond chance
LEVEL, RESAMPLES = 0.05, 999

Pair = tuple[tuple[int, ...], tuple[int, ...]]


def train(workspace: Workspace) -> list[Statistic]:
    """The score of each seed, over the groups of the test split."""
    spec = workspace.backbone(BACKBONE)
    extract(workspace, spec, DATA, ExtractOptions(size=SIZE, quiet=True))
    recipe = replace(KINDS["semseg", "linear"].recipe, iterations=ITERATIONS, loss_at="level")
    options = ProbeOptions(head="linear", recipe=recipe, seeds=SEEDS, quiet=True)
    rows = probe(workspace, "semseg", [DATA], [spec.label], options).rows
    (result,), _, _ = load_results(workspace.probes, {row["folder"] for row in rows})
    return [run.scores[SCORE] for run in result.runs]


def disjoint_pairs(seed: int) -> list[Pair]:
    """Different pairs of disjoint subsets of the seeds."""
    rng, found = np.random.default_rng(seed), dict[Pair, None]()
    while len(found) < PAIRS:
        order = rng.permutation(SEEDS)[: 2 * EACH].tolist()
        a, b = sorted((tuple(sorted(order[:EACH])), tuple(sorted(order[EACH:]))))
        found[a, b] = None
    return list(found)


def false_alarms(seeds: Sequence[Statistic], pairs: Sequence[Pair], counted: bool = True) -> float:
    """The share of pairs that are beyond chance. counted: whether seeds are; else groups alone."""
    found = 0
    for pair in pairs:
        a, b = ([seeds[i] for i in side] for side in pair)
        spread = seed_spread([a, b]) if counted else None
        found += procedure_difference(a, b, spread, resamples=RESAMPLES).p_value <= LEVEL
    return found / len(pairs)


@dataclass(frozen=True)
class Task:
    """Simulated worlds, each with as many seeds of one procedure."""

    cell: Cell
    worlds: int
    pairs: tuple[Pair, ...]
    seed: tuple[int, ...]


def simulate(task: Task) -> list[float]:
    """The share of false alarms in each world."""
    rng = np.random.default_rng(task.seed)
    tables = [draw_table(rng, task.cell)[0] for _ in range(task.worlds)]
    return [false_alarms([mean_score(own) for own in seeds], task.pairs) for seeds in tables]


def simulated(found: SeedVariance, groups: int, pairs: Sequence[Pair], worlds: int, seed: int) -> np.ndarray:
    """The share of false alarms in worlds with the variances that were found, (worlds,)."""
    on_group = (found.by_groups * groups) ** 0.5
    cell = Cell(groups, SEEDS, 1, 0.0, seed_sd=found.of_seeds**0.5, on_group_sd=on_group)
    workers = os.cpu_count() or 1
    tasks = [Task(cell, len(part), tuple(pairs), (seed, i)) for i, part in enumerate(np.array_split(range(worlds), 4))]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        return np.concatenate(list(pool.map(simulate, tasks)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workspace", type=Path, help="a folder that keeps features and heads; else a temporary one")
    parser.add_argument("--worlds", type=positive, default=200, help="that are simulated")
    parser.add_argument("--seed", type=int, default=0, help="of the pairs and the worlds")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that simulate
    with tempfile.TemporaryDirectory() as folder:
        seeds = train(Workspace(options.workspace or folder))
    found, (groups,), pairs = seed_spread([seeds]).own, seeds[0].sizes, disjoint_pairs(options.seed)
    scores = np.array([float(one.value(np.ones((1, groups)))[0]) for one in seeds])
    share, groups_only = false_alarms(seeds, pairs), false_alarms(seeds, pairs, counted=False)
    chance = simulated(found, groups, pairs, options.worlds, options.seed)
    on_group = (found.by_groups * groups) ** 0.5
    print_table([
        {"what, in points or percent": name, "found": f"{100 * value:.2f}"}
        for name, value in {
            "foreground mIoU, mean over seeds": scores.mean(),
            "standard deviation over seeds": scores.std(ddof=1),
            "of it: sd of a seed's true score": found.of_seeds**0.5,
            "seed x group, sd for a group": on_group,
            "beyond chance": share,
            "beyond chance, groups alone counted": groups_only,
            "beyond chance in simulated worlds, mean": chance.mean(),
            "beyond chance in simulated worlds, sd": chance.std(ddof=1),
        }.items()
    ])  # fmt: skip
    result = {
        "name": "seeds",
        "ratio": round(share, 4),
        "target": TARGET,
        "holds": share <= TARGET,
        "cpus": os.cpu_count(),
        "groups": groups,
        "seed_sd": round(found.of_seeds**0.5, 5),
        "seed_group_sd": round(on_group, 5),
        "groups_only": round(groups_only, 4),
        "simulated": {"mean": round(float(chance.mean()), 4), "sd": round(float(chance.std(ddof=1)), 4),
                      "above_target": round(float((chance > TARGET).mean()), 4), "worlds": options.worlds},
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
