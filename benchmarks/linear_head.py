"""One training step of the linear head, against concatenating all levels and then convolving.

    python benchmarks/linear_head.py

A step takes a batch of fp16 features of ConvNeXt-T at 512x512 pixels that lies in memory, converts it to
fp32, normalises each level by the batch's statistics, and goes forward, through the loss, and back to the
gradients of all parameters. The rival brings every level to the finest grid, concatenates and convolves.
Both are first proved to be the same head: equal in the loss and in each gradient, in fp64 on smaller maps
and in fp32 on the very batch that is timed.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from _bench import Timings, interleave, positive, quartile_text, report, timed
from torch import Tensor, nn
from torch.nn.functional import interpolate

from featprobe.features import Features, cell_shares
from featprobe.levels import FeatureLevel
from featprobe.probes.linear import LinearHead
from featprobe.probes.losses import image_loss, level_loss
from featprobe.targets import IGNORE

LEVELS = tuple(FeatureLevel(f"stride{stride}", 24 * stride, stride) for stride in (4, 8, 16, 32))  # ConvNeXt-T's
TARGET = 5.0
LOSS_TOLERANCE = 1e-5  # relative distance of the losses, in either number format
GRADIENT_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative L2
SMALL_SIDE = 128  # pixels, where fp64 is compared
BLOB = 16  # pixels, side of the squares that labels are made of
IGNORED = 0.02  # share of the pixels


class ConcatHead(nn.Module):
    """What is usually done: BatchNorm per level, all levels upsampled and concatenated, one 1x1 convolution."""

    def __init__(self, head: LinearHead) -> None:
        super().__init__()
        self.levels = head.levels
        channels = [level.channels for level in self.levels]
        self.norms = nn.ModuleDict({level.name: nn.BatchNorm2d(level.channels) for level in self.levels})
        self.conv = nn.Conv2d(sum(channels), head.classes, 1)
        self._copy(head)

    @torch.no_grad()
    def _copy(self, head: LinearHead) -> None:
        weights = torch.cat([head.weights[level.name] for level in self.levels], 1)  # (classes, channels)
        self.conv.weight.copy_(weights[:, :, None, None])
        self.conv.bias.copy_(head.bias)
        for level in self.levels:
            self.norms[level.name].weight.copy_(head.norms[level.name].weight)
            self.norms[level.name].bias.copy_(head.norms[level.name].bias)

    def forward(self, features: Features) -> Tensor:
        """Logits at the finest level's grid: (batch, classes, height / stride, width / stride)."""
        grid = self.levels[0].cells(features.frame)
        maps = []
        for level in self.levels:
            m = self.norms[level.name](features.maps[level.name].to(self.conv.weight.dtype))
            same = m.shape[2:] == grid
            maps.append(m if same else interpolate(m, grid, mode="bilinear", align_corners=False))
        return self.conv(torch.cat(maps, 1))


Head = LinearHead | ConcatHead
Step = Callable[[Head], Tensor]
"""Goes forward, through the loss and back; returns the loss."""


@dataclass(frozen=True)
class Case:
    """How many classes, and where the loss is taken: at the finest level's grid, or at the image's."""

    classes: int
    loss_at: str

    def __str__(self) -> str:
        return f"{self.classes} classes, loss at {self.loss_at}"


def make_heads(case: Case) -> tuple[LinearHead, ConcatHead]:
    """Both heads with the same weights, none of them at a value that hides an error."""
    head = LinearHead(LEVELS, case.classes)
    with torch.no_grad():
        head.bias.normal_()
        for norm in head.norms.values():
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_()
    return head.train(), ConcatHead(head).train()


def random_features(batch: int, side: int) -> Features:
    """Maps of fp16 values whose channels have different means and spreads."""
    maps = {}
    for level in LEVELS:
        spread = torch.rand(level.channels, 1, 1) + 0.5
        mean = torch.randn(level.channels, 1, 1)
        noise = torch.randn(batch, level.channels, *level.cells((side, side)))
        maps[level.name] = (spread * (noise + mean)).half()  # (batch, channels, height, width)
    return Features(maps, (side, side))


def random_labels(batch: int, side: int, classes: int) -> Tensor:
    """Squares of labels, single pixels of them ignored: (batch, side, side), uint8."""
    coarse = torch.randint(classes, (batch, side // BLOB, side // BLOB), dtype=torch.uint8)
    labels = coarse.repeat_interleave(BLOB, 1).repeat_interleave(BLOB, 2)
    return labels.masked_fill(torch.rand(labels.shape) < IGNORED, IGNORE)


def make_step(case: Case, features: Features) -> Step:
    """A training step without the optimiser, on random labels."""
    labels = random_labels(features.batch, features.frame[0], case.classes)
    shares = cell_shares(labels, case.classes, LEVELS[0].stride)

    def step(head: Head) -> Tensor:
        head.zero_grad(set_to_none=True)
        logits = head(features)
        loss = level_loss(logits, shares) if case.loss_at == "level" else image_loss(logits, labels)
        loss.backward()
        return loss.detach()

    return step


def gradients(head: Head) -> dict[str, Tensor]:
    """Gradients of every parameter, under the same names for both heads."""
    channels = [level.channels for level in LEVELS]
    if isinstance(head, LinearHead):
        bias, weights = head.bias.grad, [head.weights[level.name].grad for level in LEVELS]
    else:
        bias, weights = head.conv.bias.grad, head.conv.weight.grad.flatten(1).split(channels, 1)
    found = {"bias": bias}
    for level, weight in zip(LEVELS, weights, strict=True):
        norm = head.norms[level.name]
        found |= {f"{level.name} weight": weight, f"{level.name} gamma": norm.weight.grad}
        found |= {f"{level.name} beta": norm.bias.grad}
    return found


def difference(case: Case, features: Features, dtype: torch.dtype) -> float:
    """The largest relative L2 distance between both heads' gradients of one parameter.

    Raises RuntimeError when it, or the distance of their losses, passes what is tolerated.
    """
    step, heads = make_step(case, features), [head.to(dtype) for head in make_heads(case)]
    (ours, ours_by_name), (theirs, theirs_by_name) = ((step(head), gradients(head)) for head in heads)
    errors = {name: float((ours_by_name[name] - g).norm() / g.norm()) for name, g in theirs_by_name.items()}
    worst = max(errors, key=lambda name: errors[name])
    loss_error = float((ours - theirs).abs() / theirs.abs())
    if not (errors[worst] < GRADIENT_TOLERANCE[dtype] and loss_error < LOSS_TOLERANCE):
        raise RuntimeError(
            f"{case}, {dtype}: the heads differ by {loss_error:.1e} in the loss, "
            f"by {errors[worst]:.1e} in the gradient of {worst}"
        )
    return errors[worst]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=positive, default=4)
    parser.add_argument("--classes", type=positive, default=21)
    parser.add_argument("--size", type=positive, default=512, help="of the square images, pixels")
    parser.add_argument("--rounds", type=positive, default=9)
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="that torch computes with")
    options = parser.parse_args()
    if options.size % 32:
        parser.error("--size must be a multiple of 32")
    return options


def table(cases: Sequence[Case], timings: Timings, apart: Mapping[Case, tuple[float, float]]) -> list[dict[str, str]]:
    """A row per case: milliseconds of both arms, their ratio, the largest distance of a gradient in fp64 and fp32."""
    return [
        {
            "case": str(case),
            "concat, ms": f"{1000 * timings.median(f'{case}: concat'):.0f}",
            "ours, ms": f"{1000 * timings.median(f'{case}: ours'):.0f}",
            "ratio": quartile_text(timings.quartiles(f"{case}: concat", f"{case}: ours")),
            "fp64 apart": f"{apart[case][0]:.0e}",
            "fp32 apart": f"{apart[case][1]:.0e}",
        }
        for case in cases
    ]


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    cases = [Case(options.classes, "level"), Case(options.classes, "image"), Case(2, "level")]
    features, small = random_features(options.batch_size, options.size), random_features(2, SMALL_SIDE)
    apart = {
        case: (difference(case, small, torch.float64), difference(case, features, torch.float32)) for case in cases
    }
    arms = {}
    for case in cases:
        step, (ours, concat) = make_step(case, features), make_heads(case)
        arms[f"{case}: concat"] = timed(lambda step=step, head=concat: step(head))
        arms[f"{case}: ours"] = timed(lambda step=step, head=ours: step(head))
    timings = interleave(arms, options.rounds)
    ratio, *others = (timings.ratio(f"{case}: concat", f"{case}: ours") for case in cases)
    report(
        "linear_head",
        ratio,
        TARGET,
        table(cases, timings, apart),
        **{str(case): other for case, other in zip(cases[1:], others, strict=True)},
        largest_difference_fp64=max(fp64 for fp64, _ in apart.values()),
        largest_difference_fp32=max(fp32 for _, fp32 in apart.values()),
        batch_size=options.batch_size,
        size=options.size,
        rounds=options.rounds,
        threads=options.threads,
    )


if __name__ == "__main__":
    main()
