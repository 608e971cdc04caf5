"""A training step of the upsampling head and of FCOS, against an earlier version of this project.

    git worktree add ../before <commit>
    python benchmarks/heads.py --before ../before
    python benchmarks/heads.py --floor

Both versions run in processes of their own and take steps in turn: fp16 features of one batch that lies in memory,
256x256 pixels, levels as the `embedded` backbone and as ConvNeXt-T have them; forward, loss, back, AdamW. Before the
clock starts both must have the same loss and gradients from the same weights. What is timed is processor time: the
machine's other work then weighs little.

`--floor` counts the floating-point operations of a step of this version, and sets its time beside the time that they
take at the speed of this machine's best product of matrices.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _bench import interleave, positive, print_table, quartile_text, report
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from featprobe import machine
from featprobe.features import Features, cell_shares
from featprobe.levels import FeatureLevel
from featprobe.probes import FcosHead, ObjectTarget, UpsampleHead, level_loss

TARGETS = {"upsample": 2.0, "fcos": 1.5}
CHANNELS = {"embedded": (24, 40, 112, 320), "ConvNeXt-T": (96, 192, 384, 768)}
CLASSES, OBJECTS, BATCH = 6, 3, 8  # with the background; an image; images
TOLERANCE = {"loss": 1e-5, "gradients": 1e-3}  # relative; gradients by L2: a ReLU's kink may fall to either side
CASES = tuple(itertools.product(TARGETS, CHANNELS, ("whole", "padded")))


def make(head_name: str, channels: str, frames: str, side: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A head and what computes its loss on a batch; the same in every version."""
    torch.manual_seed(0)
    levels = [FeatureLevel(f"stride{s}", c, s) for s, c in zip((4, 8, 16, 32), CHANNELS[channels], strict=True)]
    maps = {level.name: torch.randn(BATCH, level.channels, *level.cells((side, side))).half() for level in levels}
    content = torch.tensor([[side, 3 * side // 4], [3 * side // 4, side]], dtype=torch.int32).repeat(BATCH // 2, 1)
    features = Features(maps, (side, side), content if frames == "padded" else None)
    if head_name == "upsample":
        labels = torch.randint(CLASSES, (BATCH, side, side), dtype=torch.uint8)
        shares, head = cell_shares(labels, CLASSES, 4), UpsampleHead(levels, CLASSES).train()
        return head, lambda: level_loss(head(features), shares)
    targets = []
    for _ in range(BATCH):
        corner, size = torch.rand(OBJECTS, 2) * side * 0.7, torch.rand(OBJECTS, 2) * side * 0.2 + 8
        labels = torch.randint(1, CLASSES, (OBJECTS,))
        targets.append(ObjectTarget(torch.cat([corner, corner + size], 1), labels, None, torch.zeros(0, 4)))
    finder = FcosHead(levels, CLASSES, sides=(10.0, 30.0, 60.0)).train()
    return finder, lambda: finder(features, targets)


def work(side: int) -> None:
    """Answer questions from standard input: "case" takes a step, "case path" saves loss and gradients there."""
    torch.set_num_threads(1)
    getattr(machine, "tune_memory", lambda: None)()  # as commands of a version that has it
    made: dict[str, tuple[nn.Module, Callable[[], Tensor], torch.optim.Optimizer]] = {}
    for line in sys.stdin:
        case, _, path = line.strip().partition("\t")
        if case not in made:
            head, loss_of = make(*case.split(", "), side)
            made[case] = head, loss_of, torch.optim.AdamW(head.parameters(), 1e-4, fused=True)
        head, loss_of, optimizer = made[case]
        begun = time.process_time()
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        if path:
            torch.save({"loss": loss.detach(), **{name: p.grad for name, p in head.named_parameters()}}, path)
        else:
            optimizer.step()
        print(json.dumps(time.process_time() - begun), flush=True)


class Work(TorchDispatchMode):
    """Counts and times what is computed inside.

    flops: of convolutions and products, by direction. seconds: of processor time, in these and in all else.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = dict.fromkeys(("forward", "to weights", "to inputs", "other products back"), 0.0)
        self.seconds = {"products": 0.0, "else": 0.0}
        self.direction = "forward"

    def __torch_dispatch__(self, function: Any, _: Any, given: Any = (), named: Any = None) -> Any:
        begun = time.process_time()
        found = function(*given, **(named or {}))
        taken = time.process_time() - begun
        flops = self._count(function.overloadpacket.__name__, given, found)
        self.seconds["products" if flops else "else"] += taken
        return found

    def _count(self, name: str, given: Any, found: Any) -> float:
        """Add the floating-point operations of an operator to those counted, and return them; 0 for all others."""
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            flops = 2.0 * found.numel() * given[-2].shape[-1]
            self.flops[self.direction] += flops
            return flops
        if name == "convolution":
            return self._convolved(given[0], given[1], found, transposed=given[6], ways=("forward",))
        if name == "convolution_backward":
            ways = [way for way, own in zip(("to inputs", "to weights"), given[-1], strict=False) if own]
            return self._convolved(given[1], given[2], given[0], transposed=given[7], ways=ways)
        return 0.0

    def _convolved(self, x: Tensor, weight: Tensor, out: Tensor, *, transposed: bool, ways: Sequence[str]) -> float:
        flops = 2.0 * (x if transposed else out).numel() * weight[0].numel()
        for way in ways:
            self.flops[way] += flops
        return flops * len(ways)


def fastest_product() -> float:
    """Floating-point operations per second of processor time, the most of a few products."""
    best = 0.0
    for rows, inner, columns in ((4096, 1152, 128), (4096, 576, 128), (2048, 2048, 2048)):
        a, b = torch.randn(rows, inner), torch.randn(inner, columns)
        for _ in range(5):
            begun = time.process_time()
            torch.mm(a, b)
            best = max(best, 2 * rows * inner * columns / (time.process_time() - begun))
    return best


def floor(side: int, rounds: int) -> None:
    """Print what a step of each head computes on whole frames, and how long that takes at the best speed."""
    torch.set_num_threads(1)
    rows, shares = [], {}
    for case in [", ".join(case) for case in CASES if case[2] == "whole"]:
        head, loss_of = make(*case.split(", "), side)
        optimizer = torch.optim.AdamW(head.parameters(), 1e-4, fused=True)
        steps, peak = [], 0.0
        for _ in range(rounds + 1):
            peak = max(peak, fastest_product())
            optimizer.zero_grad()
            with Work() as work:
                loss = loss_of()
                work.direction = "other products back"
                loss.backward()
                optimizer.step()
            steps.append(work)
        flops = steps[-1].flops
        products, rest = (float(np.median([s.seconds[n] for s in steps[1:]])) for n in ("products", "else"))
        least = sum(flops.values()) / peak
        shares[case] = least / (products + rest)
        rows.append({
            "a step": case, **{f"{way} GFLOP": f"{value / 1e9:.1f}" for way, value in flops.items()},
            "peak GFLOP/s": f"{peak / 1e9:.0f}", "at peak ms": f"{least * 1e3:.0f}",
            "in products ms": f"{products * 1e3:.0f}", "all else ms": f"{rest * 1e3:.0f}",
        })  # fmt: skip
    print_table(rows)
    print(json.dumps({"name": "heads_floor", **{case: float(f"{v:.3g}") for case, v in shares.items()}}))


class Version:
    """A checkout of this project, at work in a process of its own."""

    def __init__(self, root: Path, side: int) -> None:
        environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        if any(name in (root / "featprobe" / "machine.py").read_text() for name in ("take_large_pages", "tune_memory")):
            environment["THP_MEM_ALLOC_ENABLE"] = "1"  # as its commands do
        command = [sys.executable, __file__, "--work", "--size", str(side)]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, question: str) -> float:
        """Seconds of processor time that a step took."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(question + "\n")
        self.process.stdin.flush()
        return float(json.loads(self.process.stdout.readline()))

    def leave(self) -> None:
        """End the process."""
        self.process.communicate()


def apart(before: Version, now: Version, case: str) -> float:
    """The largest relative L2 distance of a gradient.

    Raises RuntimeError where it, or the distance of the losses, is too large.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for name, version in (("before", before), ("now", now)):
            version.ask(f"{case}\t{folder}/{name}")
            found.append(torch.load(f"{folder}/{name}"))
    distances = {name: float((found[1][name] - v).norm() / v.norm().clamp(min=1e-12)) for name, v in found[0].items()}
    loss, worst = distances.pop("loss"), max(distances.values())
    if not (loss < TOLERANCE["loss"] and worst < TOLERANCE["gradients"]):
        raise RuntimeError(f"{case}: the versions differ by {loss:.1e} in the loss, {worst:.1e} in a gradient")
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="a checkout of the earlier version")
    parser.add_argument("--rounds", type=positive, default=9)
    parser.add_argument("--size", type=positive, default=256, help="of the square images, pixels")
    parser.add_argument("--cases", default="", metavar="WORDS", help="only those whose names begin so: fcos, embedded")
    parser.add_argument("--floor", action="store_true", help="print what a step computes, and the time of that alone")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.size)
        return
    if options.floor:
        floor(options.size, options.rounds)
        return
    if options.before is None or not (options.before / "featprobe").is_dir():
        parser.error("--before must name a checkout of an earlier version:  git worktree add ../before <commit>")
    before, now = (Version(root.resolve(), options.size) for root in (options.before, Path(__file__).parents[1]))
    cases = [case for case in map(", ".join, CASES) if case.startswith(options.cases)]
    distances = {case: apart(before, now, case) for case in cases}
    arms = {}
    for case in cases:
        arms[f"{case}: before"] = lambda case=case: before.ask(case)
        arms[f"{case}: now"] = lambda case=case: now.ask(case)
    timings = interleave(arms, options.rounds)
    before.leave()
    now.leave()
    rows, ratios = [], {}
    for case in cases:
        ratios[case] = timings.ratio(f"{case}: before", f"{case}: now")
        rate = {name: f"{BATCH / timings.median(f'{case}: {name}'):.0f}" for name in ("before", "now")}
        ratio = quartile_text(timings.quartiles(f"{case}: before", f"{case}: now"))
        rows.append({"samples/s": case, **rate, "ratio": ratio, "apart": f"{distances[case]:.0e}"})
    # a case that was left out has not reached its target
    least = min(ratios.get(f"{head}, embedded, whole", 0.0) / target for head, target in TARGETS.items())
    report("heads", least, 1.0, rows, rounds=options.rounds, size=options.size, cases=options.cases, **ratios)


if __name__ == "__main__":
    main()
