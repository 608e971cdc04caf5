"""The commands. Each parses, calls one stage, and prints one thing."""

import errno
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from featprobe import __version__
from featprobe.cli.cache import cache
from featprobe.cli.data import data
from featprobe.cli.options import (
    as_json,
    columns,
    device,
    echo,
    feature_options,
    head_options,
    log,
    names,
    quiet,
    show_json,
    terminal_width,
    workspace_of,
)
from featprobe.errors import FeatprobeError, counted
from featprobe.kinds import KINDS, kinds_of
from featprobe.texts import printable

if TYPE_CHECKING:
    from featprobe.stages.comparison.compare import Comparison
    from featprobe.stages.extraction.extract_options import ExtractOptions
    from featprobe.stages.training.probe import ProbeReport
    from featprobe.stages.training.probe_options import ProbeOptions, Tuning
    from featprobe.stages.workspace import Workspace


REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
"""Of a disk that is full, read-only or failing."""


class _Printable(logging.Formatter):
    """What libraries log without being asked, with its control characters shown."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        return printable(super().format(record))


class _Cli(click.Group):
    """Shows our own errors as one paragraph, exit code 1; `--debug` shows where they come from."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (FeatprobeError, OSError, RuntimeError) as error:
            said = str(error) if isinstance(error, FeatprobeError) else _refusal(error)
            if ctx.params.get("debug") or not said:
                raise
            rank = os.environ.get("RANK", "0")  # of the processes that torchrun started
            echo(f"featprobe{'' if rank == '0' else f', process {rank}'}: {said}", err=True)
            ctx.exit(1)


def _refusal(error: OSError | RuntimeError) -> str:
    """What is said of a machine that refuses where no command had words of its own; "" for other errors."""
    if isinstance(error, OSError) and error.errno in REFUSALS:
        file = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        return f"{file}{error.strerror}. Make room, or choose another disk, and run the same command again."
    if "can't start new thread" in str(error):
        return "No more threads can be started here. Allow more processes or memory (ulimit), or take fewer --workers."
    return ""


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


cli.add_command(data)
cli.add_command(cache)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; ends the process with its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may be no text
    sys.excepthook = lambda *raised: echo("".join(traceback.format_exception(*raised)), err=True)
    plain = warnings.formatwarning
    warnings.formatwarning = lambda *told, **more: printable(
        plain(*told, **more)
    )  # libraries quote the files they read
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Printable())
    cli.main(args=None if arguments is None else list(arguments), prog_name="featprobe")


def _to_stderr(line: str) -> None:
    echo(line, err=True)


@cli.command()
@feature_options
@click.option("--shard", metavar="I/N", help="Make the I-th of N parts, 1 <= I <= N; parts may run at once.")
@click.option("--rehash", is_flag=True, help="Read every file of the set, whatever sizes and times say.")
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
    from featprobe.stages.extraction.extract import extract as run
    from featprobe.stages.extraction.extract import speed_text

    workspace = workspace_of(ctx)
    report = run(workspace, _backbone(workspace, options), options["data"], _extract_options(options))
    if json_:
        return show_json(asdict(report))
    for note in report.notes:
        echo(f"note: {note}")
    for name, reason in report.unreadable:
        echo(f"left out: {name}: {reason}")
    echo(speed_text(report))


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
    from featprobe.stages.extraction.plan import plan as run

    workspace = workspace_of(ctx)
    cost = run(workspace, _backbone(workspace, options), options["data"], _extract_options(options))
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
        ("features", f"{human_bytes(cost.feature_bytes)}, {human_bytes(cost.feature_bytes / cost.rows)} a row"),
        ("by dtype", ", ".join(f"{dtype} {human_bytes(size)}" for dtype, size in cost.bytes_of.items())),
        ("disk", f"{fits(cost.fits_disk)} ({human_bytes(cost.free_disk)} free)"),
        ("memory", f"{fits(cost.fits_memory)} ({human_bytes(cost.memory)} available)"),
        ("GPU", f"{fits(cost.fits_gpu)}{gpu}"),
        ("extract", f"{cost.extract_seconds:.0f} s on {cost.device}"),
        ("one epoch", f"{cost.epoch_live:.1f} s with the backbone, {cost.epoch_cached:.2f} s from the cache"),
        ("pays from", f"{cost.break_even:.1f} epochs on, extraction included"),
    ]
    echo(columns(rows, ("what", "cost")))


@cli.command()
@click.option("--task", default="semseg", show_default=True, help="semseg, detect or instseg.")
@head_options
@click.option("--no-verify", is_flag=True, help="Do not hash each row's features when they are first read.")
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
      featprobe probe --extract --data xray --backbone embedded
    """
    from featprobe.processes import is_main
    from featprobe.stages.training.probe import probe as run

    report = run(
        workspace_of(ctx),
        options["task"],
        names(options["data"]),
        names(options["backbone"]),
        _probe_options(options),
        _to_stderr,
        extract=options["extract"],
    )
    if is_main():
        _show_probe(report, json_, workspace_of(ctx).probes)


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
    "--precision",
    type=click.Choice(["fp32", "tf32", "amp", "bf16"]),
    help="Of backbone and head. fp32: without TF32; tf32, amp: on CUDA alone, amp for a frozen backbone.  "
    "[default: bf16 on a GPU that has it, else fp32; frozen-online: as its cache]",
)
@click.option("--compile", is_flag=True, help="Let torch compile the backbone: slow to start, then faster on a GPU.")
@click.option("--init-head", type=click.Path(exists=True, file_okay=False), help="A saved head to start from.")
@click.option(
    "--workers",
    type=click.IntRange(1),
    help="Threads that decode images.  [default: the cores that may be used, at most 16]",
)
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
    from featprobe.stages.training.finetune import finetune as run
    from featprobe.stages.training.probe_options import Tuning

    given = {name: options[name] for name in Tuning.__dataclass_fields__ if options[name] is not None}
    tuning = Tuning(**given)
    report = run(
        workspace_of(ctx),
        options["task"],
        names(options["data"]),
        names(options["backbone"]),
        _probe_options(options, tuning),
        _to_stderr,
        dry_run,
        extract=options["extract"],
    )
    if not is_main():
        return
    if report.rows or json_:
        return _show_probe(report, json_, workspace_of(ctx).probes)
    for note in report.notes:
        echo(f"note: {note}")


def _study_file(ctx: click.Context, option: click.Parameter, asked: bool) -> None:
    """Print what a study file may hold, as a file with comments or as a JSON schema, and end."""
    if asked and not ctx.resilient_parsing:
        from featprobe.stages.study.study import Study
        from featprobe.stages.study.study_file import schema, template

        show_json(schema(Study)) if option.name == "schema" else echo(template(Study), nl=False)
        ctx.exit()


_printed: dict[str, Any] = {"is_flag": True, "is_eager": True, "expose_value": False, "callback": _study_file}


@cli.command()
@click.argument("file", metavar="STUDY.toml", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--template", **_printed, help="Print a study file with every key, its default and its meaning, and end.")
@click.option("--schema", **_printed, help="Print the JSON schema of study files, for editors, and end.")
@click.option("--dry-run", is_flag=True, help="Print the plan and the predicted times, and run nothing.")
@click.option("--verify", is_flag=True, help="Read all bytes of the heads that are there; train damaged ones again.")
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
def study(ctx: click.Context, file: Path, json_: bool, dry_run: bool, verify: bool, **options: Any) -> None:
    """Run a grid of backbones, data sets, their features, tasks, heads, regimes, seeds and fractions from one file.

    What is done already is skipped, so the same command goes on after a stop, and a head that is gone or damaged is
    trained again; a cell that fails does not stop the others, and makes the exit code 3. In the end the results of its
    cells are put side by side, as `compare` does with all of the workspace, on a page in probes/report/STUDY. With
    SLURM, the same command again tells what failed, and hands over what is missing and not in the queue.

    \b
    Example:
      featprobe study --template > study.toml
      featprobe study examples/embedded.toml --dry-run
      featprobe study examples/embedded.toml
      featprobe study examples/embedded.toml --launcher slurm --slurm partition=gpu --slurm gpus_per_node=1
    """
    from featprobe.stages.comparison.compare import compare as compare_all
    from featprobe.stages.study.study import read_study, run_study

    if options["slurm"] and options["launcher"] == "local":
        raise click.UsageError("--slurm belongs to --launcher slurm.")
    workspace = workspace_of(ctx)
    asked = read_study(file, workspace)
    asked = replace(asked, log=tuple(dict.fromkeys(asked.log + options["log"])))
    handed: dict[str, int] = {}
    if options["launcher"] == "slurm" and not dry_run:
        from featprobe.stages.study import cluster

        sent = cluster.submit_study(workspace, asked, cluster.parameters(options["slurm"]), _to_stderr, verify=verify)
        report, handed = sent.plan, {"handed_over": len(sent.jobs), "queued": len(sent.queued)}
    else:
        report = run_study(workspace, asked, _to_stderr, dry_run=dry_run, verify=verify)
    page = workspace.probes / "report" / file.stem
    due = report.rows or (report.folders and not (dry_run or report.missing))
    told = compare_all(workspace, page, quiet=json_, folders=report.folders) if due else None
    if json_:
        show_json({
            "cells": len(report.cells), "trained": len(report.rows), "done": report.done,
            "failed": [{"cell": str(cell), "reason": reason} for cell, reason in report.failed], **handed,
            "page": str(told.files[0]) if told else None,
        })  # fmt: skip
    elif report.rows:
        from featprobe.stages.training.probe import ProbeReport

        _show_probe(ProbeReport(report.rows, (), report.notes), json_, workspace.probes)
    else:
        for note in report.notes:
            echo(f"note: {note}")
    if told and not json_:
        echo()
        _show_answer(told)
        echo(f"page: {told.files[0]}")
    for cell, reason in report.failed if not json_ else ():
        echo(f"failed: {cell}\n  {reason}", err=True)
    if report.failed:
        ctx.exit(3)


@cli.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Default: probes/report.")
@click.option("--gap", metavar="A,B", help="Two backbones: how their difference depends on the images.")
@click.option("--on", metavar="RGBSET,XRAYSET", help="The two data sets that --gap is about.")
@click.option("--across-recipes", is_flag=True, help="Give a verdict also where the recipes of two results differ.")
@quiet
@as_json
@click.pass_context
def compare(
    ctx: click.Context,
    json_: bool,
    out: Path | None,
    gap: str | None,
    on: str | None,
    across_recipes: bool,
    quiet: bool,
) -> None:
    """Put all results side by side: intervals, differences, a page with plots, the answer in words.

    Only results on the same test images stand in one table. Differences between recipes get no verdict unasked. Writes
    index.html, results.csv, results.parquet and differences.csv.

    \b
    Example:
      featprobe compare
      featprobe compare --gap convnext_dinov3,convnext_in1k --on surface,xray
    """
    from featprobe.report.comparison import comparison_text
    from featprobe.stages.comparison.compare import compare as run
    from featprobe.stages.comparison.compare import plain_json

    if (gap is None) != (on is None):
        raise click.UsageError("--gap and --on belong together: --gap A,B --on RGBSET,XRAYSET")
    report = run(workspace_of(ctx), out, names(gap), names(on), quiet, across_recipes=across_recipes)
    if json_:
        return show_json(plain_json(report))
    _show_answer(report)
    for note in (*report.notes, *(f"could not be used: {item.folder}: {item.reason}" for item in report.unusable)):
        echo(f"note: {note}")
    echo(
        "\nTest split, percent. 95 % of a score: other test groups, these heads. Verdict on any seed: other seeds "
        "too.\n"
    )
    echo(comparison_text([(s.title, s.lines, s.differences) for s in report.sets], report.gaps, terminal_width()))
    echo(f"\nreport: {report.files[0]}")


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
        echo(f"left out: {name}: {reason}")
    for note in report.notes:
        echo(f"note: {note}")
    echo(f"{report.out}: {counted(report.images, 'image')}, {', '.join(report.files)}")


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

    workspace = workspace_of(ctx)
    _show_probe(run(workspace, lambda line: echo(line, err=json_), device), json_, workspace.probes)


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
    from featprobe.backbones.catalog import find_backbone, licence_of, matching_models

    workspace = workspace_of(ctx)
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
    echo(columns([tuple(row.values()) for row in rows], ("name", "timm model", "weights", "licence")))


def _show_answer(report: "Comparison") -> None:
    for title, sentences in report.answer:
        echo("\n  ".join([title, *sentences]) + "\n")


def _probe_options(options: dict[str, Any], tuning: "Tuning | None" = None) -> "ProbeOptions":
    from featprobe.stages.training.probe_options import ProbeOptions

    kinds = kinds_of(options["task"] or "semseg")
    default = KINDS.get(options["head"] or kinds[0], KINDS[kinds[0]]).recipe
    trained = ("iterations", "batch_size", "class_weights", "loss", "loss_at", "weights_from")
    given = {name: options[name] for name in trained if options[name] not in (None, "auto")}
    return ProbeOptions(
        head=options["head"],
        levels=names(options["levels"]),
        width=options["width"],
        pyramid=options["pyramid"],
        recipe=replace(default, **given) if given else None,
        lr=options["lr"],
        weight_decay=options["weight_decay"],
        budget="auto" if options["iterations"] == "auto" else "fixed" if options["iterations"] else None,
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
        verify=not options.get("no_verify", False),
    )


def _backbone(workspace: "Workspace", options: dict[str, Any]) -> Any:
    if options["weights"] and options["random_init"]:
        raise click.UsageError("--weights and --random-init exclude each other.")
    return workspace.backbone(options["backbone"], options["weights"], options["random_init"], options["final_norm"])


def _extract_options(options: dict[str, Any]) -> "ExtractOptions":
    from featprobe.stages.extraction.extract_options import ExtractOptions

    return ExtractOptions.of({**options, "shard": _parse_shard(options.get("shard"))})


def _parse_shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    try:
        i, n = (int(part) for part in text.split("/"))
    except ValueError:
        raise click.BadParameter(f"{text!r}. wanted: I/N, as 3/16", param_hint="--shard") from None
    return i, n


def _show_probe(report: "ProbeReport", json_: bool, probes: Path) -> None:
    if json_:
        return show_json(report.rows)
    from featprobe.report.tables import result_text
    from featprobe.result_rows import ResultRow
    from featprobe.stages.training.saved_results import card_beside

    rows = [ResultRow.from_json(row) for row in report.rows]
    dtypes = [card_beside(probes, row)["features"]["dtype"] if row.regime == "frozen" else "" for row in rows]
    for note in report.notes:
        echo(f"note: {note}")
    echo("Test split, percent; IoU over all its pixels, AP as COCO defines it.\n")
    echo(result_text(rows, terminal_width(), dtypes))
    echo()
    heads = [Path(row.folder) for row in rows]
    for folder in dict.fromkeys(head.parent for head in heads):
        seeds = ", ".join(head.name for head in heads if head.parent == folder)
        echo(f"heads: {probes / folder}/ {seeds}")
    for sheet in report.sheets:
        echo(f"pictures: {sheet}")
