"""The commands that make features: extract, plan, backbones."""

import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from featprobe.cli.help import Grouped
from featprobe.cli.options import (
    as_json,
    columns,
    computing,
    echo,
    feature_options,
    show_json,
    workspace_of,
)
from featprobe.errors import UsageError, as_usage

if TYPE_CHECKING:
    from featprobe.specs import BackboneSpec
    from featprobe.stages.extraction.extract_options import ExtractOptions
    from featprobe.stages.workspace import Workspace


@click.command(cls=Grouped)
@feature_options
@computing("--shard", metavar="I/N", help="Compute only part I of N, 1 <= I <= N. Parts can run at the same time.")
@computing("--rehash", is_flag=True, help="Read every file again, even if its size and time have not changed.")
@as_json
@click.pass_context
def extract(ctx: click.Context, json_: bool, **options: Any) -> None:
    """Compute feature maps once and keep them in cache/.

    Run the same command again to continue after an interruption, to repair rows that `cache verify` found damaged, or
    to update the cache after the data set changed. Under torchrun each process computes its share of the same file.

    \b
    Example:
      featprobe extract --backbone convnext_dinov3 --data xray
      featprobe extract --backbone embedded --data path/to/set --size 256x640
      featprobe extract --backbone embedded --data scans --tile 512 --views hflip
      torchrun --nproc-per-node 4 -m featprobe extract --backbone convnext_in1k \\
        --data path/to/set
    """
    workspace, spec, how = _asked(ctx, options)
    from featprobe.stages.extraction.extract import extract as run
    from featprobe.stages.extraction.run_log import speed_text

    report = run(workspace, spec, options["data"], how)
    if json_:
        return show_json(asdict(report))
    for note in report.notes:
        echo(f"note: {note}")
    for name, reason in report.unreadable:
        echo(f"left out: {name}: {reason}")
    echo(speed_text(report))


@click.command(cls=Grouped)
@feature_options
@as_json
@click.pass_context
def plan(ctx: click.Context, json_: bool, **options: Any) -> None:
    """Estimate what an extraction will cost, before you run it.

    It times a few batches, and predicts bytes, disk, memory and minutes. Nothing is written.

    \b
    Example:
      featprobe plan --backbone convnext_dinov3 --data xray
    """
    workspace, spec, how = _asked(ctx, options)
    from featprobe.machine import human_bytes
    from featprobe.stages.extraction.plan import plan as run

    cost = run(workspace, spec, options["data"], how)
    if json_:
        derived = {name: getattr(cost, name) for name in ("fits_disk", "fits_memory", "fits_gpu", "break_even")}
        return show_json(asdict(cost) | derived)

    def fits(held: bool | None) -> str:
        return "no GPU" if held is None else "fits" if held else "does not fit"

    gpu = "" if cost.gpu_memory is None else f" ({human_bytes(cost.gpu_memory)} free)"
    parts = "" if cost.rows == cost.images else f" in {cost.rows} tiles and views"
    rows = [
        ("file", f"{cost.path}{' (exists)' if cost.exists else ''}"),
        ("images", f"{cost.images}{parts} at {cost.frame[0]}x{cost.frame[1]}, levels {', '.join(cost.levels)}"),
        ("features", f"{human_bytes(cost.feature_bytes)}, {human_bytes(cost.feature_bytes / cost.rows)} per row"),
        ("by dtype", ", ".join(f"{kind} {human_bytes(size)}" for kind, size in cost.bytes_of.items())),
        ("disk", f"{fits(cost.fits_disk)} ({human_bytes(cost.free_disk)} free)"),
        ("memory", f"{fits(cost.fits_memory)} ({human_bytes(cost.memory)} available)"),
        ("GPU", f"{fits(cost.fits_gpu)}{gpu}"),
        ("extract", f"{cost.extract_seconds:.0f} s on {cost.device}"),
        ("one epoch", f"{cost.epoch_live:.1f} s with the backbone, {cost.epoch_cached:.2f} s from the cache"),
        ("pays from", f"{cost.break_even:.1f} epochs on, extraction included"),
    ]
    echo(columns(rows, ("what", "cost")))


@click.command()
@click.argument("pattern", required=False)
@as_json
@click.pass_context
def backbones(ctx: click.Context, json_: bool, pattern: str | None) -> None:
    """List backbones and the licences of their weights.

    Those of other packages stand beside featprobe's own. With PATTERN, list the pretrained models of timm whose names
    match it.

    \b
    Example:
      featprobe backbones
      featprobe backbones "*dinov3*"
    """
    from featprobe.backbones.catalog import find_backbone, licence_of, matching_models, shadowed

    workspace = workspace_of(ctx)
    specs = (
        [find_backbone(n) for n in matching_models(pattern)]
        if pattern
        else [workspace.backbone(name) for name in workspace.backbone_names()]
    )
    rows = [
        {"name": s.label, "model": s.model, "weights": s.weights or s.source, "licence": licence_of(s)} for s in specs
    ]
    for message in () if pattern else shadowed():
        echo(f"warning: {message}", err=True)
    if json_:
        return show_json(rows)
    if not rows:
        raise UsageError(f"No pretrained model of timm matches {pattern!r}. Try a shorter one: '*dinov3*'.")
    echo(columns([tuple(row.values()) for row in rows], ("name", "model", "weights", "licence")))


def _asked(ctx: click.Context, options: Mapping[str, Any]) -> "tuple[Workspace, BackboneSpec, ExtractOptions]":
    """The workspace, the backbone and the options of an extraction, checked before torch is loaded."""
    from featprobe.stages.extraction.extract_options import ExtractOptions

    workspace, shard = workspace_of(ctx), options.get("shard")
    with as_usage():
        if options["weights"] and options["random_init"]:
            raise UsageError("--weights and --random-init exclude each other.")
        how = ExtractOptions.of({**options, "shard": None if shard is None else _parse_shard(shard)})
        spec = workspace.backbone(
            options["backbone"], options["weights"], options["random_init"], options["final_norm"]
        )
        workspace.check_extraction(spec, options["data"], how)
    return workspace, spec, how


def _parse_shard(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UsageError(f"There is no shard {text[:60]}. wanted: I/N with 1 <= I <= N, as 3/16.")
    return int(found[1]), int(found[2])
