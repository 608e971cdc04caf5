"""Nine linear heads trained as one bank, against one head nine times.

    python benchmarks/bank.py

A step takes a batch of fp16 features of ConvNeXt-T at 512x512 pixels from a cache file (in the page cache, read
ahead by the loader's thread), converts it to fp32, normalises each level by the batch's statistics, and goes
forward, through the loss, back, and through AdamW. One arm trains one head by the product's path for a single
head, the other nine heads (three learning rates by three weight decays) as a bank. Before the clock starts,
each of the nine must end where the head trained alone ends, from the same weights over the same batches.
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch
from _bench import Timings, interleave, positive, quartile_text, report
from cache_read import FRAME, LEVELS, write_cache
from linear_head import Case
from torch import Tensor

from featprobe.cache import Cache
from featprobe.cache.reader import FeatureLoader
from featprobe.features import Features, cell_shares
from featprobe.probes import LinearBank, LinearHead, image_loss, level_loss

RATES = tuple(product((1e-4, 1e-3, 1e-2), (1e-4, 1e-3, 1e-2)))  # learning rate, weight decay
TARGET = 3.6
STEPS, TOLERANCE = 20, 1e-4  # relative L2 of each head's weights after these steps
BATCHES = 3  # different ones, taken in turn
ROWS = 32  # of the cache
TIMED = 8  # steps of an arm in a round, after one that is not counted
BLOB = 16  # pixels, side of the squares that labels are made of


Batch = tuple[Features, Tensor]


def make_target(case: Case, batch: int) -> Tensor:
    """Labels of squares, as the case's loss wants them."""
    coarse = torch.randint(case.classes, (batch, FRAME[0] // BLOB, FRAME[1] // BLOB), dtype=torch.uint8)
    labels = coarse.repeat_interleave(BLOB, 1).repeat_interleave(BLOB, 2)
    return cell_shares(labels, case.classes, LEVELS[0].stride) if case.loss_at == "level" else labels


def make_batches(case: Case, batch: int) -> list[Batch]:
    """Random features whose channels differ in mean and spread, and labels of squares."""
    made = []
    for _ in range(BATCHES):
        maps = {}
        for level in LEVELS:
            spread, mean = torch.rand(level.channels, 1, 1) + 0.5, torch.randn(level.channels, 1, 1)
            noise = torch.randn(batch, level.channels, *level.cells(FRAME))
            maps[level.name] = (spread * (noise + mean)).half()  # (batch, channels, height, width)
        made.append((Features(maps, FRAME), make_target(case, batch)))
    return made


def arm_of(cache: Cache, step: Callable[[Batch], None], target: Tensor) -> Callable[[], float]:
    """Seconds of some training steps from a cache, the first, which fills the loader's ring, not counted."""
    orders = [np.random.default_rng(i).permutation(ROWS)[: len(target)] for i in range(TIMED + 1)]

    def arm() -> float:
        begun = 0.0
        with FeatureLoader(cache) as loader:
            for i, (_, features) in enumerate(loader.batches(orders)):
                if i == 1:
                    begun = time.perf_counter()
                step((features, target))
        return time.perf_counter() - begun

    return arm


def optimizer_of(heads: Sequence[LinearHead], rates: Sequence[tuple[float, float]]) -> torch.optim.Optimizer:
    """AdamW with each head's own rates, as the product trains them."""
    groups = [
        {"params": list(head.parameters()), "lr": lr, "weight_decay": decay}
        for head, (lr, decay) in zip(heads, rates, strict=True)
    ]
    return torch.optim.AdamW(groups, fused=True)


def trainer(case: Case, heads: Sequence[LinearHead], rates: Sequence[tuple[float, float]]) -> Callable[[Batch], None]:
    """What does one training step of one head, or of a bank of several."""
    optimizer = optimizer_of(heads, rates)
    bank = LinearBank(heads) if len(heads) > 1 else None

    def losses(features: Features, target: Tensor) -> Tensor:
        if case.loss_at == "level":
            return level_loss(heads[0](features), target) if bank is None else bank.loss(features, target)
        return image_loss(heads[0](features), target) if bank is None else bank.image_loss(features, target)

    def step(batch: Batch) -> None:
        optimizer.zero_grad(set_to_none=True)
        losses(*batch).sum().backward()
        optimizer.step()

    return step


def largest_difference(case: Case, batches: Sequence[Batch]) -> float:
    """The largest relative L2 distance between a head of the bank and the same head trained alone.

    Raises RuntimeError when it passes what is tolerated.
    """
    start = LinearHead(LEVELS, case.classes).train()
    together = [copy.deepcopy(start) for _ in RATES]
    step = trainer(case, together, RATES)
    for i in range(STEPS):
        step(batches[i % BATCHES])
    worst = 0.0
    for head, rates in zip(together, RATES, strict=True):
        alone = copy.deepcopy(start)
        own_step = trainer(case, [alone], [rates])
        for i in range(STEPS):
            own_step(batches[i % BATCHES])
        a, b = (torch.cat([v.detach().flatten() for v in h.weights.values()]) for h in (head, alone))
        worst = max(worst, float((a - b).norm() / b.norm()))
    if not worst < TOLERANCE:
        raise RuntimeError(f"{case}: a head of the bank ends {worst:.1e} away from the head trained alone")
    return worst


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=positive, default=4)
    parser.add_argument("--rounds", type=positive, default=9)
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="that torch computes with")
    return parser.parse_args()


def quartiles(case: Case, timings: Timings) -> tuple[float, float, float]:
    """Quartiles of nine single steps' time over the bank's."""
    low, middle, high = timings.quartiles(f"{case}: one", f"{case}: bank")
    return len(RATES) * low, len(RATES) * middle, len(RATES) * high


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    cases = [Case(6, "level"), Case(2, "level"), Case(21, "level"), Case(6, "image")]
    apart = largest_difference(cases[0], make_batches(cases[0], options.batch_size))
    rows, ratios = [], {}
    with tempfile.TemporaryDirectory() as folder:
        cache = write_cache(Path(folder) / "cache.h5", ROWS)
        for case in cases:
            target = make_target(case, options.batch_size)
            steps = {
                "one": trainer(case, [LinearHead(LEVELS, case.classes).train()], RATES[4:5]),
                "bank": trainer(case, [LinearHead(LEVELS, case.classes).train() for _ in RATES], RATES),
            }
            arms = {f"{case}: {name}": arm_of(cache, step, target) for name, step in steps.items()}
            timings = interleave(arms, options.rounds if case == cases[0] else 3)
            ratios[str(case)] = quartiles(case, timings)[1]
            rows.append({
                "case": str(case),
                "one, ms": f"{1000 * timings.median(f'{case}: one') / TIMED:.0f}",
                "bank of nine, ms": f"{1000 * timings.median(f'{case}: bank') / TIMED:.0f}",
                "ratio": quartile_text(quartiles(case, timings)),
            })  # fmt: skip
    ratio, *others = ratios.values()
    report(
        "bank", ratio, TARGET, rows, **dict(zip(list(ratios)[1:], others, strict=True)),
        largest_difference=apart, batch_size=options.batch_size, threads=options.threads,
    )  # fmt: skip


if __name__ == "__main__":
    main()
