"""Nine linear heads trained as one bank, against one head nine times.

    python benchmarks/bank.py

A step takes a batch of fp16 features of ConvNeXt-T at 512x512 pixels that lies in memory, converts it to fp32,
normalises each level by the batch's statistics, and goes forward, through the loss, back, and through AdamW. One arm
trains one head by the product's path for a single head, the other nine heads (three learning rates by three weight
decays) as a bank. Before the clock starts, each of the nine must end where the head trained alone ends, from the same
weights over the same batches.
"""

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from _bench import Timings, interleave, positive, quartile_text, report, timed
from torch import Tensor

from featprobe.levels import FeatureLevel, Features
from featprobe.probes import LinearBank, LinearHead, image_loss, level_loss
from featprobe.targets import cell_shares

LEVELS = tuple(FeatureLevel(f"stride{stride}", 24 * stride, stride) for stride in (4, 8, 16, 32))  # ConvNeXt-T's
RATES = tuple(product((1e-4, 1e-3, 1e-2), (1e-4, 1e-3, 1e-2)))  # learning rate, weight decay
TARGET = 3.6
STEPS, TOLERANCE = 20, 1e-4  # relative L2 of each head's weights after these steps
BATCHES = 3  # different ones, taken in turn
BLOB = 16  # pixels, side of the squares that labels are made of


@dataclass(frozen=True)
class Case:
    """How many classes, and where the loss is taken: at the finest level's grid, or at the image's."""

    classes: int
    loss_at: str

    def __str__(self) -> str:
        return f"{self.classes} classes, loss at {self.loss_at}"


Batch = tuple[Features, Tensor]


def make_batches(case: Case, batch: int, side: int) -> list[Batch]:
    """Random features whose channels differ in mean and spread, and labels of squares."""
    made = []
    for _ in range(BATCHES):
        maps = {}
        for level in LEVELS:
            spread, mean = torch.rand(level.channels, 1, 1) + 0.5, torch.randn(level.channels, 1, 1)
            noise = torch.randn(batch, level.channels, *level.cells((side, side)))
            maps[level.name] = (spread * (noise + mean)).half()  # (batch, channels, height, width)
        coarse = torch.randint(case.classes, (batch, side // BLOB, side // BLOB), dtype=torch.uint8)
        labels = coarse.repeat_interleave(BLOB, 1).repeat_interleave(BLOB, 2)
        target = cell_shares(labels, case.classes, LEVELS[0].stride) if case.loss_at == "level" else labels
        made.append((Features(maps, (side, side)), target))
    return made


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
        every = [heads[0](features)] if bank is None else bank.logits(features)
        return torch.stack([image_loss(logits, target) for logits in every])

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
    parser.add_argument("--size", type=positive, default=512, help="of the square images, pixels")
    parser.add_argument("--rounds", type=positive, default=9)
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="that torch computes with")
    options = parser.parse_args()
    if options.size % 32:
        parser.error("--size must be a multiple of 32")
    return options


def quartiles(case: Case, timings: Timings) -> tuple[float, float, float]:
    """Quartiles of nine single steps' time over the bank's."""
    low, middle, high = timings.quartiles(f"{case}: one", f"{case}: bank")
    return len(RATES) * low, len(RATES) * middle, len(RATES) * high


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    cases = [Case(6, "level"), Case(2, "level"), Case(21, "level"), Case(6, "image")]
    apart = largest_difference(cases[0], make_batches(cases[0], options.batch_size, options.size))
    rows, ratios = [], {}
    for case in cases:
        batch = make_batches(case, options.batch_size, options.size)[0]
        steps = {
            "one": trainer(case, [LinearHead(LEVELS, case.classes).train()], RATES[4:5]),
            "bank": trainer(case, [LinearHead(LEVELS, case.classes).train() for _ in RATES], RATES),
        }
        arms = {f"{case}: {name}": timed(lambda step=step, batch=batch: step(batch)) for name, step in steps.items()}
        timings = interleave(arms, options.rounds if case.loss_at == "level" else 3)
        ratios[str(case)] = quartiles(case, timings)[1]
        rows.append({
            "case": str(case),
            "one, ms": f"{1000 * timings.median(f'{case}: one'):.0f}",
            "bank of nine, ms": f"{1000 * timings.median(f'{case}: bank'):.0f}",
            "ratio": quartile_text(quartiles(case, timings)),
        })  # fmt: skip
    ratio, *others = ratios.values()
    report(
        "bank", ratio, TARGET, rows, **dict(zip(list(ratios)[1:], others, strict=True)),
        largest_difference=apart, batch_size=options.batch_size, size=options.size, threads=options.threads,
    )  # fmt: skip


if __name__ == "__main__":
    main()
