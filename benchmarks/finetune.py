"""A training step of the full regime against a hand-written loop over the same network and head.

    python benchmarks/finetune.py

One arm is `featprobe finetune`'s own loop: images from PNG files, decoded ahead, through the backbone and a linear
head, the level loss, back through both, gradient clipping, AdamW. The other is what one would write by hand on timm's
bare model: the same images in memory, the same head, loss, clipping and optimizer. The weights are random: they cost
the same time. The losses of the first steps of both must be the same.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import timm
import torch
from _bench import interleave, positive, quartile_text, report
from extract import CPU, load_images, write_set
from torch import nn

from featprobe.backbones.backbone import load_backbone
from featprobe.backbones.catalog import find_backbone
from featprobe.cache import Cache, open_cache
from featprobe.features import Features, cell_shares
from featprobe.kinds import TrainRecipe
from featprobe.probes import LinearHead, level_loss
from featprobe.probes.train import Tuned, train
from featprobe.stages.extraction.extract_options import ExtractOptions
from featprobe.stages.extraction.make_cache import extract_with
from featprobe.stages.training.live import LiveFeatures
from featprobe.stages.workspace import Workspace

TARGET = 0.95
TOLERANCE = 1e-3  # relative, of the losses of the two arms
LR, BACKBONE_LR, DECAY, CLIP = 1e-3, 1e-4, 1e-3, 1.0


def targets_of(cache: Cache, rows: np.ndarray) -> torch.Tensor:
    """Class shares of the finest level's cells: (rows, classes, height / stride, width / stride)."""
    labels = torch.from_numpy(np.stack([cache.semantic(row) for row in rows.tolist()]))
    return cell_shares(labels, len(cache.data.classes), cache.levels[0].stride)


def ours(cache: Cache, options: argparse.Namespace, losses: list[float]) -> Callable[[], float]:
    """Seconds of some steps of the product's loop."""
    backbone = load_backbone(replace(find_backbone(options.backbone), source="random"))
    backbone.unfreeze()
    torch.manual_seed(0)
    head = LinearHead(cache.levels, len(cache.data.classes))
    rows = np.arange(options.batch_size)
    shares = targets_of(cache, rows)
    recipe = TrainRecipe(iterations=options.steps, batch_size=options.batch_size, lr=LR, weight_decay=DECAY, warmup=0.0)
    groups = backbone.parameter_groups(BACKBONE_LR, DECAY)

    def arm() -> float:
        def loss(features: Features, batch: np.ndarray) -> torch.Tensor:
            value = level_loss(head(features), shares[batch])
            losses.append(float(value.detach()))
            return value[None]

        with LiveFeatures(cache, backbone, CPU, lambda row: (None, None)) as live:
            begun = time.perf_counter()
            train([head], [recipe], live.training, rows, loss, 0, lambda: [{}], tuned=Tuned(backbone, groups, CLIP))
            return time.perf_counter() - begun

    return arm


def by_hand(
    cache: Cache, images: torch.Tensor, options: argparse.Namespace, losses: list[float]
) -> Callable[[], float]:
    """Seconds of some steps of a loop on timm's bare model."""
    spec = find_backbone(options.backbone)
    with torch.random.fork_rng():
        torch.manual_seed(spec.seed)
        model = timm.create_model(spec.model, pretrained=False).to(memory_format=torch.channels_last)
    torch.manual_seed(0)
    head = LinearHead(cache.levels, len(cache.data.classes))
    config = model.pretrained_cfg
    mean, std = (torch.tensor(config[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    shares = targets_of(cache, np.arange(len(images)))
    indices = [i for i, entry in enumerate(model.feature_info) if entry["reduction"] in (4, 8, 16, 32)]

    def arm() -> float:
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval().requires_grad_(False)
        head.train()
        tuned = [p for p in model.parameters() if p.requires_grad]
        begun = time.perf_counter()
        optimizer = torch.optim.AdamW(
            [{"params": head.parameters()}, {"params": tuned, "lr": BACKBONE_LR}], lr=LR, weight_decay=DECAY, fused=True
        )
        for step in range(options.steps):
            for group, lr in zip(optimizer.param_groups, (LR, BACKBONE_LR), strict=True):
                group["lr"] = lr * 0.5 * (1 + np.cos(np.pi * step / max(1, options.steps - 1)))
            x = ((images - mean) / std).contiguous(memory_format=torch.channels_last)
            maps = model.forward_intermediates(x, indices=indices, stop_early=True, intermediates_only=True)
            names = [level.name for level in cache.levels]
            features = Features(dict(zip(names, maps, strict=True)), cache.recipe.frame)
            loss = level_loss(head(features), shares)
            losses.append(float(loss.detach()))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(tuned, CLIP)
            optimizer.step()
        return time.perf_counter() - begun

    return arm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="embedded", help="with random weights")
    parser.add_argument("--size", type=positive, default=256, help="of the square images, pixels")
    parser.add_argument("--batch-size", type=positive, default=8)
    parser.add_argument("--steps", type=positive, default=10, help="of an arm in a round")
    parser.add_argument("--rounds", type=positive, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = write_set(Path(folder) / "set", options.batch_size, options.size)
        backbone = load_backbone(replace(find_backbone(options.backbone), source="random"))
        workspace = Workspace(folder)
        made = extract_with(workspace, backbone, workspace.data_set(str(data)), ExtractOptions(quiet=True), CPU)
        cache = open_cache(made.path)
        losses: dict[str, list[float]] = {"by hand": [], "finetune": []}
        arms = {
            "by hand": by_hand(cache, load_images(data, options.batch_size), options, losses["by hand"]),
            "finetune": ours(cache, options, losses["finetune"]),
        }
        timings = interleave(arms, options.rounds)
    first = [np.array(values[: options.steps // 2]) for values in losses.values()]
    apart = float(np.abs(first[0] - first[1]).max() / np.abs(first[0]).max())
    if not apart < TOLERANCE:
        raise RuntimeError(f"the losses of the two arms differ by {apart:.1e}: {first}")
    rows = [
        {
            "arm": arm,
            "images/s": f"{options.steps * options.batch_size / timings.median(arm):.2f}",
            "of by hand": quartile_text(timings.quartiles("by hand", arm)),
        }
        for arm in timings.seconds
    ]
    report(
        "finetune", timings.ratio("by hand", "finetune"), TARGET, rows, largest_difference=apart,
        backbone=options.backbone, size=options.size, batch_size=options.batch_size, threads=torch.get_num_threads(),
    )  # fmt: skip


if __name__ == "__main__":
    main()
