"""The commands. Each parses, calls one stage, and prints one thing."""

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from featprobe import __version__
from featprobe.cli.options import (
    as_json,
    columns,
    data_format,
    device,
    feature_options,
    group_from,
    head_options,
    intensity,
    log,
    names,
    quiet,
    show_json,
    split_file,
)
from featprobe.errors import FeatprobeError

if TYPE_CHECKING:
    from featprobe.stages.compare import Comparison
    from featprobe.stages.extract import ExtractOptions
    from featprobe.stages.probe import ProbeReport
    from featprobe.stages.trials import ProbeOptions, Tuning
    from featprobe.stages.workspace import Workspace


class _Cli(click.Group):
    """Shows our own errors as one paragraph, exit code 1; `--debug` shows where they come from."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except FeatprobeError as error:
            if ctx.params.get("debug"):
                raise
            rank = os.environ.get("RANK", "0")  # of the processes that torchrun started
            click.echo(f"featprobe{'' if rank == '0' else f', process {rank}'}: {error}", err=True)
            ctx.exit(1)


@click.group(cls=_Cli, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--workspace",
    "workspace_root",
    type=click.Path(file_okay=False, path_type=Path),
    default=".",
    envvar="FEATPROBE_WORKSPACE",
    help="The folder that holds cache/, probes/ and featprobe.toml. Default: where you stand.",
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(__version__, prog_name="featprobe")
@click.pass_context
def cli(ctx: click.Context, workspace_root: Path, debug: bool) -> None:
    """Which pretrained backbone suits my inspection images, and is it enough to freeze it?

    \b
    Example:
      featprobe extract --backbone embedded --data xray    # images -> cache/
      featprobe probe --task semseg                        # cache/ -> probes/, and a table
    """
    ctx.obj = workspace_root


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; ends the process with its exit code."""
    cli.main(args=None if arguments is None else list(arguments), prog_name="featprobe")


def _to_stderr(line: str) -> None:
    click.echo(line, err=True)


def _workspace(ctx: click.Context) -> "Workspace":
    from featprobe.stages.workspace import Workspace

    return Workspace(ctx.obj)


@cli.command()
@feature_options
@click.option("--shard", metavar="I/N", help="Make the I-th of N parts, 1 <= I <= N; parts may run at once.")
@as_json
@click.pass_context
def extract(ctx: click.Context, json_: bool, **options: Any) -> None:
    """Compute feature maps once and keep them in cache/.

    Run it again to go on after an interruption, to repair rows that `cache verify` found bad, or after the
    data set changed. Under torchrun each process makes its share of the same file.

    \b
    Example:
      featprobe extract --backbone convnext_dinov3 --data xray
      featprobe extract --backbone embedded --data path/to/set --size 256x640
      featprobe extract --backbone embedded --data path/to/scans --tile 512 --overlap 64 --views hflip,crop:2
      torchrun --nproc-per-node 4 -m featprobe extract --backbone convnext_in1k --data path/to/set
    """
    from featprobe.stages.extract import extract as run
    from featprobe.stages.extract import speed_text

    workspace = _workspace(ctx)
    report = run(workspace, _backbone(workspace, options), options["data"], _extract_options(options))
    if json_:
        return show_json(asdict(report))
    for note in report.notes:
        click.echo(f"note: {note}")
    for name, reason in report.unreadable:
        click.echo(f"left out: {name}: {reason}")
    click.echo(speed_text(report))


@cli.command()
@feature_options
@as_json
@click.pass_context
def plan(ctx: click.Context, json_: bool, **options: Any) -> None:
    """Say what an extraction would cost, from a few timed batches, before it runs.

    \b
    Example:
      featprobe plan --backbone convnext_dinov3 --data xray
    """
    from featprobe.machine import human_bytes
    from featprobe.stages.plan import plan as run

    workspace = _workspace(ctx)
    cost = run(workspace, _backbone(workspace, options), options["data"], _extract_options(options))
    if json_:
        derived = {name: getattr(cost, name) for name in ("fits_disk", "fits_memory", "fits_gpu", "break_even")}
        return show_json(asdict(cost) | derived)

    def fits(held: bool | None) -> str:
        return "no GPU" if held is None else "fits" if held else "does not fit"

    gpu = "" if cost.gpu_memory is None else f" ({human_bytes(cost.gpu_memory)} free)"
    rows = [
        ("file", f"{cost.path}{' (exists)' if cost.exists else ''}"),
        ("images", f"{cost.images} at {cost.frame[0]}x{cost.frame[1]}, levels {', '.join(cost.levels)}"),
        ("features", f"{human_bytes(cost.feature_bytes)}, {human_bytes(cost.feature_bytes / cost.images)} an image"),
        ("disk", f"{fits(cost.fits_disk)} ({human_bytes(cost.free_disk)} free)"),
        ("memory", f"{fits(cost.fits_memory)} ({human_bytes(cost.memory)} available)"),
        ("GPU", f"{fits(cost.fits_gpu)}{gpu}"),
        ("extract", f"{cost.extract_seconds:.0f} s on {cost.device}"),
        ("one epoch", f"{cost.epoch_live:.1f} s with the backbone, {cost.epoch_cached:.2f} s from the cache"),
        ("pays from", f"{cost.break_even:.1f} epochs on, extraction included"),
    ]
    click.echo(columns(rows, ("what", "cost")))


@cli.command()
@click.option("--task", default="semseg", show_default=True, help="semseg, detect or instseg.")
@head_options
@as_json
@click.pass_context
def probe(ctx: click.Context, json_: bool, **options: Any) -> None:
    """Train heads on cached features, score them on test once, and print a table.

    \b
    Example:
      featprobe probe --task semseg
      featprobe probe --data xray --backbone embedded --lr 1e-3,5e-3 --show 4
      featprobe probe --task detect --data surface
      featprobe probe --task semseg --head upsample --fraction 0.1,0.3,1
      torchrun --nproc-per-node 2 -m featprobe probe --task detect --data surface
      featprobe probe --data xray --split group:5
    """
    from featprobe.processes import is_main
    from featprobe.stages.probe import probe as run

    report = run(
        _workspace(ctx),
        options["task"],
        names(options["data"]),
        names(options["backbone"]),
        _probe_options(options),
        lambda line: click.echo(line, err=True),
    )
    if is_main():
        _show_probe(report, json_, _workspace(ctx).probes)


@cli.command()
@click.option("--task", help="semseg, detect or instseg.  [default: as each frozen result; semseg with --data]")
@click.option(
    "--regime",
    type=click.Choice(["full", "frozen-online"]),
    default="full",
    show_default=True,
    help="full: the backbone is trained too. frozen-online: it is not, but the images are augmented.",
)
@click.option("--augment/--no-augment", default=True, show_default=True, help="Crops, flips, grey levels.")
@click.option("--backbone-lr", type=float, default=0.1, show_default=True, help="As a multiple of the head's --lr.")
@click.option(
    "--layer-decay", type=float, default=1.0, show_default=True, help="Of the rate, layer by layer downwards."
)
@click.option(
    "--bn",
    type=click.Choice(["frozen", "train"]),
    default="frozen",
    show_default=True,
    help="BatchNorm of the backbone.",
)
@click.option("--clip", type=float, default=1.0, show_default=True, help="Largest norm of the backbone's gradient.")
@click.option("--accumulate", type=click.IntRange(1), default=1, show_default=True, help="Parts of a batch.")
@click.option("--ema", type=float, default=0.0, show_default=True, help="Decay of a running mean of the weights.")
@click.option("--checkpointing", is_flag=True, help="Compute activations again on the way back, to save memory.")
@click.option(
    "--precision", type=click.Choice(["fp32", "bf16"]), help="[default: bf16 on a GPU that has it, else fp32]"
)
@click.option("--init-head", type=click.Path(exists=True, file_okay=False), help="A saved head to start from.")
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Threads that decode images.")
@click.option("--dry-run", is_flag=True, help="Print what would be trained, and how long it would take.")
@head_options
@as_json
@click.pass_context
def finetune(ctx: click.Context, json_: bool, dry_run: bool, **options: Any) -> None:
    """Train the same heads with the backbone unfrozen: the full regime, from the images.

    Without --task, --data and --backbone: the counterpart of every frozen result that has none yet. A training
    that was stopped goes on when the same command is run again.

    \b
    Example:
      featprobe finetune --dry-run
      featprobe finetune
      featprobe finetune --regime frozen-online
      featprobe finetune --task detect --data surface --backbone embedded --backbone-lr 0.3
      torchrun --nproc-per-node 4 -m featprobe finetune
    """
    from featprobe.processes import is_main
    from featprobe.stages.finetune import finetune as run
    from featprobe.stages.trials import Tuning

    tuning = Tuning(**{name: options[name] for name in Tuning.__dataclass_fields__})
    report = run(
        _workspace(ctx),
        options["task"],
        names(options["data"]),
        names(options["backbone"]),
        _probe_options(options, tuning),
        lambda line: click.echo(line, err=True),
        dry_run,
    )
    if not is_main():
        return
    if report.rows or json_:
        return _show_probe(report, json_, _workspace(ctx).probes)
    for note in report.notes:
        click.echo(f"note: {note}")


@cli.command()
@click.argument("file", metavar="STUDY.toml", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--dry-run", is_flag=True, help="Print the plan and the predicted times, and run nothing.")
@click.option(
    "--launcher",
    type=click.Choice(["local", "slurm"]),
    default="local",
    show_default=True,
    help="slurm: hand what is missing over to a cluster, as job arrays, and return.",
)
@click.option(
    "--slurm",
    metavar="KEY=VALUE",
    multiple=True,
    help="Of every SLURM job, as partition=gpu; may be repeated.  [default: time=240, in minutes]",
)
@log
@as_json
@click.pass_context
def study(ctx: click.Context, file: Path, json_: bool, dry_run: bool, **options: Any) -> None:
    """Run a grid of backbones, data sets, tasks, heads, regimes, seeds, fractions and sizes from one file.

    What is done already is skipped, so the same command goes on after a stop; a cell that fails does not stop the
    others, and makes the exit code 3. In the end all results of the workspace are put side by side on a page, as
    `compare` does. With SLURM, the same command again tells what failed, and hands over what is
    missing and not in the queue.

    \b
    Example:
      featprobe study examples/embedded.toml --dry-run
      featprobe study examples/embedded.toml
      featprobe study examples/embedded.toml --launcher slurm --slurm partition=gpu --slurm gpus_per_node=1
    """
    from featprobe.stages.compare import compare as compare_all
    from featprobe.stages.study import read_study, run_study

    if options["slurm"] and options["launcher"] == "local":
        raise click.UsageError("--slurm belongs to --launcher slurm.")
    workspace = _workspace(ctx)
    asked = read_study(file, workspace)
    asked = replace(asked, log=tuple(dict.fromkeys(asked.log + options["log"])))
    handed: dict[str, int] = {}
    if options["launcher"] == "slurm" and not dry_run:
        from featprobe.stages import cluster

        sent = cluster.submit_study(workspace, asked, cluster.parameters(options["slurm"]), _to_stderr)
        report, handed = sent.plan, {"handed_over": len(sent.jobs), "queued": len(sent.queued)}
    else:
        report = run_study(workspace, asked, _to_stderr, dry_run=dry_run)
    told = compare_all(workspace, quiet=json_) if report.rows else None
    if json_:
        show_json({
            "cells": len(report.cells), "trained": len(report.rows), "done": report.done,
            "failed": [{"cell": str(cell), "reason": reason} for cell, reason in report.failed], **handed,
            "page": str(told.files[0]) if told else None,
        })  # fmt: skip
    elif report.rows:
        from featprobe.stages.probe import ProbeReport

        _show_probe(ProbeReport(report.rows, (), report.notes), json_, workspace.probes)
    else:
        for note in report.notes:
            click.echo(f"note: {note}")
    if told and not json_:
        click.echo()
        _show_answer(told)
        click.echo(f"page: {told.files[0]}")
    for cell, reason in report.failed if not json_ else ():
        click.echo(f"failed: {cell}\n  {reason}", err=True)
    if report.failed:
        ctx.exit(3)


@cli.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Default: probes/report.")
@click.option("--gap", metavar="A,B", help="Two backbones: how their difference depends on the images.")
@click.option("--on", metavar="RGBSET,XRAYSET", help="The two data sets that --gap is about.")
@quiet
@as_json
@click.pass_context
def compare(ctx: click.Context, json_: bool, out: Path | None, gap: str | None, on: str | None, quiet: bool) -> None:
    """Put all results side by side: intervals, differences, a page with plots, the answer in words.

    Only results on the same test images stand in one table. Writes index.html, results.csv, results.parquet and
    differences.csv.

    \b
    Example:
      featprobe compare
      featprobe compare --gap convnext_dinov3,convnext_in1k --on surface,xray
    """
    from featprobe.report.comparison import comparison_text
    from featprobe.stages.compare import compare as run
    from featprobe.stages.compare import plain_json

    if (gap is None) != (on is None):
        raise click.UsageError("--gap and --on belong together: --gap A,B --on RGBSET,XRAYSET")
    report = run(_workspace(ctx), out, names(gap), names(on), quiet)
    if json_:
        return show_json(plain_json(report))
    _show_answer(report)
    for note in (*report.notes, *(f"could not be used: {item.folder}: {item.reason}" for item in report.unusable)):
        click.echo(f"note: {note}")
    click.echo("\nTest split, percent; 95 %: over groups of test images.\n")
    click.echo(comparison_text([(s.title, s.lines, s.differences) for s in report.sets], report.gaps))
    click.echo(f"\nreport: {report.files[0]}")


@cli.command()
@click.argument("head", type=click.Path(exists=True, path_type=Path))
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="The folder to write to.")
@click.option(
    "--weights", type=click.Path(dir_okay=False), help="The backbone's weights, where they lie elsewhere now."
)
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Images at once.")
@click.option("--skip-bad", is_flag=True, help="Go on without images that can't be used, and list them.")
@device
@quiet
@as_json
def predict(head: Path, images: Sequence[Path], out: Path, json_: bool, **options: Any) -> None:
    """Run a saved HEAD on IMAGES (files and folders): masks or COCO JSON, and overlays.

    HEAD: a folder that `probe` has written. Its card names the backbone and the preprocessing.

    \b
    Example:
      featprobe predict probes/xray-1a46e6/embedded-5672e3c4/semseg-linear-0a1b2c3d/seed0 new_scans/ --out found
    """
    from featprobe.stages.predict import predict as run

    report = run(head if head.is_dir() else head.parent, images, out, **options)
    if json_:
        return show_json(asdict(report))
    for name, reason in report.left_out:
        click.echo(f"left out: {name}: {reason}")
    click.echo(f"{report.out}: {report.images} images, {', '.join(report.files)}")


@cli.command()
@device
@as_json
@click.pass_context
def demo(ctx: click.Context, json_: bool, device: str | None) -> None:
    """Generate both built-in sets, extract, probe, and show the table: a few minutes on a CPU.

    \b
    Example:
      featprobe --workspace /tmp/demo demo
    """
    from featprobe.stages.demo import demo as run

    workspace = _workspace(ctx)
    _show_probe(run(workspace, lambda line: click.echo(line, err=json_), device), json_, workspace.probes)


@cli.command()
@click.argument("pattern", required=False)
@as_json
@click.pass_context
def backbones(ctx: click.Context, json_: bool, pattern: str | None) -> None:
    """List backbones with the licence of their weights; with PATTERN, timm's pretrained models.

    \b
    Example:
      featprobe backbones
      featprobe backbones "*dinov3*"
    """
    from featprobe.backbones import find_backbone, licence_of, matching_models

    workspace = _workspace(ctx)
    specs = (
        [find_backbone(n) for n in matching_models(pattern)]
        if pattern
        else [workspace.backbone(name) for name in workspace.backbone_names()]
    )
    rows = [
        {"name": s.label, "model": s.model, "weights": s.weights or s.source, "licence": licence_of(s)} for s in specs
    ]
    if json_:
        return show_json(rows)
    if not rows:
        raise FeatprobeError(f"No pretrained model of timm matches {pattern!r}. Try a shorter one: '*dinov3*'.")
    click.echo(columns([tuple(row.values()) for row in rows], ("name", "timm model", "weights", "licence")))


@cli.group(invoke_without_command=True)
@click.pass_context
def data(ctx: click.Context) -> None:
    """List data sets; describe, check, draw, split or convert one.

    \b
    Example:
      featprobe data
      featprobe data info xray
      featprobe data show xray --out xray.png
    """
    if ctx.invoked_subcommand is not None:
        return
    from featprobe.datasets.formats import FORMATS, added_formats

    workspace = _workspace(ctx)
    added, broken = added_formats()
    entries = workspace.config.get("data", {})
    rows = [
        (name, str(workspace.data / name), "built in, there" if (workspace.data / name).is_dir() else "built in")
        if name not in entries
        else (name, entries[name]["path"], "featprobe.toml")
        for name in workspace.data_names()
    ]
    click.echo(columns(rows, ("name", "path", "from")))
    click.echo(f"A path serves as well, to one of the formats {', '.join([*FORMATS, *added])}.")
    for letter in broken:
        click.echo(f"warning: {letter}", err=True)


@data.command("info")
@click.argument("name")
@data_format
@group_from
@split_file
@as_json
@click.pass_context
def data_info(
    ctx: click.Context, name: str, format: str | None, group_from: str | None, split_file: str | None, json_: bool
) -> None:
    """Describe a data set: images, groups, classes, sizes, splits.

    \b
    Example:
      featprobe data info surface
    """
    from featprobe.stages.data import summarise

    summary = summarise(_workspace(ctx).data_set(name, format, group_from, split_file))
    if json_:
        return show_json(asdict(summary))
    low, high = ("x".join(map(str, size)) for size in summary.sizes)
    click.echo(f"{summary.name}: {summary.root}")
    sizes = low if low == high else f"{low} to {high}"
    click.echo(f"  {sum(summary.images.values())} images, {summary.depth}-bit, {sizes} (height x width)")
    click.echo(f"  labels for {', '.join(summary.tasks)}")
    for split, count in summary.images.items():
        click.echo(f"  {split:<6} {count} images, {summary.groups[split]} groups")
    header = ["class", *(["pixels"] if summary.pixels else []), *(["instances"] if summary.instances else [])]
    rows = [
        [
            name,
            *([f"{summary.pixels[name]:.2%}"] if summary.pixels else []),
            *([summary.instances.get(name, "")] if summary.instances else []),
        ]
        for name in summary.classes
    ]
    click.echo(columns(rows, header))
    for note in summary.notes:
        click.echo(f"note: {note}")


@data.command("show")
@click.argument("name")
@data_format
@group_from
@split_file
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="The PNG to write.")
@click.option("--count", type=click.IntRange(1), default=8, show_default=True, help="How many images.")
@click.option("--split", type=click.Choice(["train", "val", "test"]), default="train", show_default=True)
@intensity
@click.pass_context
def data_show(
    ctx: click.Context,
    name: str,
    format: str | None,
    group_from: str | None,
    split_file: str | None,
    out: Path,
    count: int,
    split: str,
    intensity: str | None,
) -> None:
    """Draw images of a data set beside their labels.

    \b
    Example:
      featprobe data show xray --out xray.png
    """
    from featprobe.stages.data import contact_sheet

    workspace = _workspace(ctx)
    policy = intensity or workspace.data_options(name).get("intensity")
    shown = contact_sheet(workspace.data_set(name, format, group_from, split_file), out, count, split, policy)
    click.echo(f"{out}: {len(shown)} images of {split}")


@data.command("check")
@click.argument("name")
@data_format
@group_from
@split_file
@click.option("--size", metavar="HxW", help="What images are resized to, for object sizes. Default: as of `extract`.")
@click.option(
    "--html", "--out", type=click.Path(dir_okay=False, path_type=Path), help="A page to write, with pictures."
)
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Threads that decode images.")
@quiet
@as_json
@click.pass_context
def data_check(
    ctx: click.Context,
    name: str,
    format: str | None,
    group_from: str | None,
    split_file: str | None,
    size: str | None,
    html: Path | None,
    workers: int,
    quiet: bool,
    json_: bool,
) -> None:
    """Look through a data set; exit code 3 when something would spoil a study.

    That is: a part, a picture or a near copy of it in two splits, an empty split, files that can't be read, masks of
    another size than their image, boxes out of range, other bad labels, 8-bit and 16-bit images in one set.

    \b
    Example:
      featprobe data check path/to/my_set --html check.html
    """
    from featprobe.geometry import parse_size
    from featprobe.stages.check import check, class_table, entry_texts, head_lines, object_line, object_table

    named = _workspace(ctx).data_set(name, format, group_from, split_file, complete=False)
    found = check(named, size=parse_size(size) if size else None, page=html, workers=workers, quiet=quiet)
    if json_:
        show_json(asdict(found))
    else:
        click.echo(f"{found.name}: {found.root}")
        click.echo("\n".join(f"  {line}" for line in head_lines(found)))
        click.echo(f"\n{_frame_text(class_table(found))}\n")
        if found.objects:
            click.echo(f"{object_line(found.objects)}\n{_frame_text(object_table(found.objects))}\n")
        for note in found.notes:
            click.echo(f"note: {note}")
        for finding in found.findings:
            _show_finding("spoils a study" if finding.spoils else "to know", finding.text, entry_texts(finding))
        if not found.spoiled:
            click.echo("Nothing was found that would spoil a study.")
    if found.spoiled:
        ctx.exit(3)


@data.command("convert")
@click.argument("name")
@data_format
@group_from
@split_file
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="A new or empty folder.")
@click.option("--link", is_flag=True, help="Link to the images instead of copying them.")
@quiet
@as_json
@click.pass_context
def data_convert(
    ctx: click.Context,
    name: str,
    format: str | None,
    group_from: str | None,
    split_file: str | None,
    out: Path,
    link: bool,
    quiet: bool,
    json_: bool,
) -> None:
    """Write a data set as COCO JSON, one file a split, with the same ids, splits, groups, masks and boxes.

    \b
    Example:
      featprobe data convert path/to/my_set --out my_set_coco
    """
    from featprobe.stages.convert import convert

    done = convert(_workspace(ctx).data_set(name, format, group_from, split_file), out, link=link, quiet=quiet)
    if json_:
        return show_json(asdict(done))
    counts = ", ".join(f"{count} of {split}" for split, count in done.images.items())
    click.echo(f"{done.path}: images: {counts}; {sum(done.annotations.values())} annotations")


@data.command("split")
@click.argument("name")
@data_format
@group_from
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="The CSV file to write.")
@click.option(
    "--split",
    metavar="SPLIT",
    default="own",
    show_default=True,
    help="own, group, stratified (by group, heeding classes) or image; group:5 for the folds of a cross-validation.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the order of the groups.")
@as_json
@click.pass_context
def data_split(
    ctx: click.Context,
    name: str,
    format: str | None,
    group_from: str | None,
    out: Path,
    split: str,
    seed: int,
    json_: bool,
) -> None:
    """Write a split to a CSV file with the columns id, group, split, to be edited and used.

    \b
    Example:
      featprobe data split xray --out split.csv --split stratified
      featprobe probe --data xray --split split.csv
    """
    from featprobe.stages.data import write_split

    report = write_split(_workspace(ctx).data_set(name, format, group_from), out, split, seed)
    if json_:
        return show_json(asdict(report))
    rows = [[part, count, report.groups[part], *report.holders[part].values()] for part, count in report.images.items()]
    click.echo(columns(rows, ("split", "images", "groups", *next(iter(report.holders.values())))))
    for note in report.notes:
        click.echo(f"note: {note}")
    click.echo(f"{out}: {sum(report.images.values())} images; use it:  featprobe probe --data {name} --split {out}")


@data.command("make")
@click.argument("name", type=click.Choice(["xray", "surface"]))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Default: data/NAME of the workspace.")
@click.option("--images", type=click.IntRange(12), default=240, show_default=True, help="How many.")
@click.option("--size", default="256x256", show_default=True, metavar="HxW", help="Height x width, pixels.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.pass_context
def data_make(ctx: click.Context, name: str, out: Path | None, images: int, size: str, seed: int) -> None:
    """Generate a built-in set, in another size or with another seed than the default.

    \b
    Example:
      featprobe data make xray --images 480 --size 384x384 --out big_xray
    """
    from featprobe.geometry import parse_size
    from featprobe.stages.workspace import make_generated

    folder = out or _workspace(ctx).data / name
    there = (folder / "annotations").is_dir()
    if there:
        raise FeatprobeError(f"{folder} holds a data set already. Nothing was changed. Name another folder with --out.")
    make_generated(name, folder, images=images, size=parse_size(size), seed=seed)
    click.echo(f"{folder}: {images} images of {size}")


@cli.group()
def cache() -> None:
    """Look after feature caches: list, describe, verify, remove.

    \b
    Example:
      featprobe cache ls
      featprobe cache verify xray
    """


@cache.command("ls")
@as_json
@click.pass_context
def cache_ls(ctx: click.Context, json_: bool) -> None:
    """List the caches of the workspace.

    \b
    Example:
      featprobe cache ls
    """
    from featprobe.machine import human_bytes
    from featprobe.stages.caches import describe_cache

    workspace = _workspace(ctx)
    found, broken = [], []
    for path in workspace.cache_files():
        try:
            found.append(describe_cache(path))
        except FeatprobeError as error:
            broken.append({"path": str(path), "error": str(error)})
    if json_:
        return show_json(found + broken)
    rows = [
        (
            Path(c["path"]).relative_to(workspace.cache).as_posix(),
            c["recipe"]["label"],
            "x".join(map(str, c["recipe"]["frame"])),
            c["recipe"]["dtype"],
            f"{c['whole']} of {c['rows']}",
            human_bytes(c["bytes"]),
        )
        for c in found
    ]
    if rows:
        click.echo(columns(rows, ("file", "backbone", "frame", "dtype", "rows", "size")))
    elif not broken:
        click.echo(f"No caches in {workspace.cache}. Make one:  featprobe extract --backbone embedded --data xray")
    for entry in broken:
        click.echo(f"can't be opened: {entry['error'].splitlines()[0]}", err=True)


@cache.command("info")
@click.argument("name")
@as_json
@click.pass_context
def cache_info(ctx: click.Context, name: str, json_: bool) -> None:
    """Describe caches: recipe, levels, data set, provenance. NAME: a path, or part of a file's name.

    \b
    Example:
      featprobe cache info xray
    """
    from featprobe.machine import human_bytes
    from featprobe.stages.caches import describe_cache

    found = [describe_cache(path) for path in _workspace(ctx).find_caches(name)]
    if json_:
        return show_json(found)
    for c in found:
        recipe, origin = c["recipe"], c["data"]
        levels = ", ".join(f"{v['name']} ({v['channels']} ch)" for v in recipe["levels"])
        rows: list[tuple[str, object]] = [
            ("rows", f"{c['whole']} whole, {c['missing']} missing, {len(c['unreadable'])} unreadable of {c['rows']}"),
            ("size", human_bytes(c["bytes"])),
            ("backbone", f"{recipe['label']}: {recipe['backbone']}, weights sha256 {recipe['weights_sha256'][:12]}…"),
            ("levels", levels),
            ("final norm", recipe["final_norm"]),
            ("frame", f"{_size_text(recipe['frame'])} ({recipe['fit']} to {_size_text(recipe['size'])})"),
            ("shown", _parts_text(recipe)),
            ("dtype", recipe["dtype"]),
            ("intensity", f"{recipe['intensity']}{_window_text(recipe, origin)}"),
            ("data", f"{origin['name']}: {origin['root']}"),
            ("classes", ", ".join(origin["classes"])),
            ("tasks", ", ".join(origin["tasks"])),
            ("identity", "intact" if c["intact"] else "DAMAGED: run `featprobe cache verify`"),
            ("key", c["key"]),
            ("command", c["command"]),
            ("made", f"{c['provenance']['created']} by featprobe {c['provenance']['featprobe']}"),
        ]
        click.echo(columns(rows, (c["path"], "")))
        for name_, reason in c["unreadable"].items():
            click.echo(f"unreadable: {name_}: {reason}")


@cache.command("verify")
@click.argument("name", required=False)
@quiet
@as_json
@click.pass_context
def cache_verify(ctx: click.Context, name: str | None, quiet: bool, json_: bool) -> None:
    """Hash every row, level and target again; exit code 3 when something is bad.

    Rows whose features are bad are marked missing, so that `extract` computes exactly those anew.

    \b
    Example:
      featprobe cache verify xray
    """
    from featprobe.stages.caches import verify_cache

    workspace = _workspace(ctx)
    paths = workspace.find_caches(name) if name else workspace.cache_files()
    found = {str(path): verify_cache(path, quiet) for path in paths}
    if json_:
        show_json({path: [asdict(damage) for damage in damages] for path, damages in found.items()})
    else:
        for path, damages in found.items():
            click.echo(f"{path}: {'sound' if not damages else f'{len(damages)} bad'}")
            for damage in damages:
                click.echo(f"  row {damage.row} {damage.id}: {damage.part}" if damage.row >= 0 else f"  {damage.part}")
        if any(found.values()):
            click.echo("Mend them: run the `featprobe extract` command that made the file again.")
    if any(found.values()):
        ctx.exit(3)


@cache.command("rm")
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_context
def cache_rm(ctx: click.Context, name: str, yes: bool) -> None:
    """Delete caches. NAME: a path, or part of a file's name.

    \b
    Example:
      featprobe cache rm xray --yes
    """
    from featprobe.machine import human_bytes
    from featprobe.stages.caches import remove_cache

    paths = _workspace(ctx).find_caches(name)
    for path in paths:
        click.echo(f"{path}  {human_bytes(path.stat().st_size)}")
    if not yes:
        click.confirm(f"Delete {'this file' if len(paths) == 1 else f'these {len(paths)} files'}?", abort=True)
    click.echo(f"{human_bytes(sum(remove_cache(path) for path in paths))} set free")


def _show_answer(report: "Comparison") -> None:
    for title, sentences in report.answer:
        click.echo("\n  ".join([title, *sentences]) + "\n")


def _probe_options(options: dict[str, Any], tuning: "Tuning | None" = None) -> "ProbeOptions":
    from featprobe.probes import DEFAULT_RECIPES, kinds_of
    from featprobe.stages.trials import ProbeOptions

    kinds = kinds_of(options["task"] or "semseg")
    default = DEFAULT_RECIPES.get(options["head"] or kinds[0], DEFAULT_RECIPES[kinds[0]])
    trained = ("iterations", "batch_size", "class_weights", "loss", "loss_at")
    given = {name: options[name] for name in trained if options[name] is not None}
    return ProbeOptions(
        head=options["head"],
        levels=names(options["levels"]),
        width=options["width"],
        pyramid=options["pyramid"],
        recipe=replace(default, **given) if given else None,
        lr=options["lr"],
        weight_decay=options["weight_decay"],
        seeds=options["seeds"],
        shared_order=options["shared_order"],
        fractions=options["fraction"] or (1.0,),
        instances=options["instances"],
        split=options["split"],
        absent=options["absent_classes"],
        device=options["device"],
        show=options["show"],
        quiet=options["quiet"],
        tuning=tuning,
        log=tuple(dict.fromkeys(options["log"])),
    )


def _backbone(workspace: "Workspace", options: dict[str, Any]) -> Any:
    if options["weights"] and options["random_init"]:
        raise click.UsageError("--weights and --random-init exclude each other.")
    return workspace.backbone(options["backbone"], options["weights"], options["random_init"], options["final_norm"])


def _extract_options(options: dict[str, Any]) -> "ExtractOptions":
    from featprobe.geometry import parse_size
    from featprobe.stages.extract import ExtractOptions
    from featprobe.stages.parts import parse_views

    same = (
        "format",
        "group_from",
        "split_file",
        "fit",
        "intensity",
        "batch_size",
        "workers",
        "dtype",
        "precision",
        "device",
        "skip_bad",
        "quiet",
        "tile",
        "overlap",
        "empty_tiles",
    )
    return ExtractOptions(
        levels=names(options["levels"]),
        size=parse_size(options["size"]) if options["size"] else None,
        shard=_parse_shard(options.get("shard")),
        views=parse_views(options["views"]) if options["views"] else (),
        **{name: options[name] for name in same},
    )


def _parse_shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    try:
        i, n = (int(part) for part in text.split("/"))
    except ValueError:
        raise click.BadParameter(f"{text!r}. wanted: I/N, as 3/16", param_hint="--shard") from None
    return i, n


def _frame_text(table: Any) -> str:
    return columns(table.to_numpy().tolist(), list(table.columns))


def _show_finding(kind: str, text: str, entries: Sequence[str]) -> None:
    click.echo(f"{kind}: {text}")
    for entry in entries[:5]:
        click.echo("\n".join(f"  {line}" for line in entry.splitlines()))
    if len(entries) > 5:
        click.echo(f"  and {len(entries) - 5} more: --json lists all")


def _size_text(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"


def _parts_text(recipe: dict[str, Any]) -> str:
    tiles = "whole images"
    if recipe.get("tile"):
        tiles = (
            f"tiles of {recipe['tile']} pixels, overlap {recipe['overlap']}, {recipe['empty_tiles']:.0%} of the empty"
        )
    views = recipe["views"][1:]
    return f"{tiles}; of training images also {', '.join(views)}" if views else tiles


def _window_text(recipe: dict[str, Any], origin: dict[str, Any]) -> str:
    if recipe["window"] is None:
        return ""
    low, high = recipe["window"]
    clipped = "" if origin["clipped"] is None else f", clips {origin['clipped']:.2%} of the annotated pixels"
    return f", levels {low:g} to {high:g}{clipped}"


def _show_probe(report: "ProbeReport", json_: bool, probes: Path) -> None:
    from featprobe.report.tables import result_table, show_table

    if json_:
        return show_json(report.rows)
    for note in report.notes:
        click.echo(f"note: {note}")
    click.echo("Test split, percent; IoU over all its pixels, AP as COCO defines it.\n")
    click.echo(show_table(result_table(report.rows)))
    click.echo()
    for folder in dict.fromkeys(Path(row["folder"]).parent for row in report.rows):
        seeds = ", ".join(Path(r["folder"]).name for r in report.rows if Path(r["folder"]).parent == folder)
        click.echo(f"heads: {probes / folder}/ {seeds}")
    for sheet in report.sheets:
        click.echo(f"pictures: {sheet}")
