"""The commands that train heads and use them: probe, finetune, predict, demo."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from featprobe.cli.help import ALL_TASKS, Grouped, under
from featprobe.cli.options import (
    as_json,
    at_workspace,
    computing,
    device,
    echo,
    head_options,
    names,
    output,
    quiet,
    show_json,
    terminal_width,
    to_stderr,
    wanted,
    workers,
    workspace_of,
)
from featprobe.errors import as_usage, counted
from featprobe.kinds import TASKS, kind_of, kinds_of

if TYPE_CHECKING:
    from featprobe.stages.training.probe import ProbeReport
    from featprobe.stages.training.probe_options import ProbeOptions
    from featprobe.stages.workspace import Workspace

live = under("Backbone and images")


@click.command(cls=Grouped)
@wanted("--task", metavar="TASK", default=TASKS[0], show_default=True, help=f"What the heads do: {ALL_TASKS}.")
@head_options
@computing("--no-verify", is_flag=True, help="Do not check the hash of features when they are first read.")
@as_json
@click.pass_context
def probe(ctx: click.Context, json_: bool, **options: Any) -> None:
    """Train heads on cached features and score them on test.

    It prints a table of the scores and adds them to probes/results.jsonl. Heads are saved in probes/.

    \b
    Example:
      featprobe probe --task semseg
      featprobe probe --data xray --backbone embedded --lr 1e-3,5e-3 --show 4
      featprobe probe --task detect --data surface
      featprobe probe --task semseg --head upsample --fraction 0.1,0.3,1
      torchrun --nproc-per-node 2 -m featprobe probe --task detect --data surface
      featprobe probe --data xray --split group:5
      featprobe probe --task classify --data xray --labels defect
      featprobe probe --extract --data xray --backbone embedded
    """
    workspace, how = _asked(ctx, options)
    from featprobe.processes import is_main
    from featprobe.stages.training.probe import probe as run

    data, backbones, extract = names(options["data"]), names(options["backbone"]), options["extract"]
    report = run(workspace, options["task"], data, backbones, how, to_stderr, extract=extract)
    if is_main():
        show_probe(report, json_, workspace.probes)


@click.command(cls=Grouped)
@wanted(
    "--task",
    metavar="TASK",
    help=f"What the heads do: {ALL_TASKS}.  [default: the task of each frozen result; {TASKS[0]} with --data]",
)
@wanted(
    "--regime",
    type=click.Choice(["full", "frozen-online"]),
    default="full",
    show_default=True,
    help="full trains the backbone too. frozen-online keeps it frozen, but augments the images.",
)
@live("--augment/--no-augment", default=True, show_default=True, help="Vary images by crops, flips and grey levels.")
@live(
    "--backbone-lr",
    type=float,
    metavar="FACTOR",
    default=0.1,
    show_default=True,
    help="Learning rate of the backbone, as a multiple of that of the head.",
)
@live(
    "--layer-decay",
    type=float,
    metavar="FACTOR",
    default=1.0,
    show_default=True,
    help="Multiply that rate by this factor at each layer further down.",
)
@live(
    "--bn",
    type=click.Choice(["frozen", "train"]),
    default="frozen",
    show_default=True,
    help="Keep the BatchNorm layers of the backbone as pretrained, or train them, which needs large batches.",
)
@live(
    "--clip",
    type=float,
    metavar="NORM",
    default=1.0,
    show_default=True,
    help="Largest norm of the backbone's gradient. 0 sets no limit.",
)
@live(
    "--accumulate",
    type=click.IntRange(1),
    metavar="N",
    default=1,
    show_default=True,
    help="Compute each batch in N parts, one after another, to save memory.",
)
@live(
    "--ema",
    type=float,
    metavar="DECAY",
    default=0.0,
    show_default=True,
    help="Keep a running mean of the weights with this decay. 0 keeps none.",
)
@live("--init-head", type=click.Path(exists=True, file_okay=False), help="A saved head to start from.")
@head_options
@computing("--checkpointing", is_flag=True, help="Compute activations twice instead of storing them, to save memory.")
@computing(
    "--precision",
    type=click.Choice(["fp32", "tf32", "amp", "bf16"]),
    help="How backbone and head compute. fp32 is float32 without TF32. tf32 and amp need CUDA, and amp needs a frozen "
    "backbone.  [default: bf16 on a GPU that has it, else fp32; with frozen-online, that of the cache]",
)
@computing("--compile", is_flag=True, help="Compile the backbone with torch: a slow start, then faster on a GPU.")
@workers
@output("--dry-run", is_flag=True, help="Only print what would be trained, and how long it would take.")
@as_json
@click.pass_context
def finetune(ctx: click.Context, json_: bool, dry_run: bool, **options: Any) -> None:
    """Train the same heads together with the backbone.

    This is the full regime: it learns from the images, not from the cache. Without --task, --data and --backbone it
    trains the counterpart of every frozen result that has none yet. Run the same command again to continue a training
    that was stopped.

    \b
    Example:
      featprobe finetune --dry-run
      featprobe finetune
      featprobe finetune --regime frozen-online
      featprobe finetune --task detect --data surface --backbone-lr 0.3
      torchrun --nproc-per-node 4 -m featprobe finetune
    """
    workspace, how = _asked(ctx, options, live=True)
    from featprobe.processes import is_main
    from featprobe.stages.training.finetune import finetune as run

    data, backbones, extract = names(options["data"]), names(options["backbone"]), options["extract"]
    report = run(workspace, options["task"], data, backbones, how, to_stderr, dry_run, extract=extract)
    if not is_main():
        return
    if report.rows or json_:
        return show_probe(report, json_, workspace.probes)
    for note in report.notes:
        echo(f"note: {note}")


@click.command()
@click.argument("head", type=click.Path(exists=True, path_type=Path))
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="The folder to write to.")
@click.option("--weights", type=click.Path(dir_okay=False), help="The weights of the backbone, if they have moved.")
@click.option(
    "--batch-size", type=click.IntRange(1), metavar="N", default=8, show_default=True, help="Images per batch."
)
@click.option(
    "--threshold",
    type=click.FloatRange(0),
    metavar="SCORE",
    help="From which score on something is a finding, or above which score an image is called.  [default: the "
    "operating point that `inspect` keeps beside the head; else that of the head; 0.5 for detections; for segmentation "
    "the class map]",
)
@click.option("--fail-on-defect", is_flag=True, help="End with exit code 3 if an image is called.")
@click.option("--skip-bad", is_flag=True, help="Omit images that can't be used, and list them.")
@device
@quiet
@as_json
@click.pass_context
def predict(
    ctx: click.Context, head: Path, images: Sequence[Path], out: Path, json_: bool, fail_on_defect: bool, **options: Any
) -> None:
    """Apply a saved head to new images.

    HEAD is a folder that `probe` or `finetune` has written; its card names the backbone and the preprocessing. IMAGES
    are files and folders. The command writes a summary with a verdict on each image, overlays, and what the task finds:
    masks, COCO JSON files, a CSV file of labels, or a CSV file of scores with heat maps.

    \b
    Example:
      featprobe predict probes/SET/BACKBONE/HEAD/seed0 new_scans --out found
      featprobe predict HEAD shot.png --out found --threshold 0.8 --fail-on-defect
    """
    from featprobe.stages.predict import predict as run

    report = run(head if head.is_dir() else head.parent, images, out, need_verdict=fail_on_defect, **options)
    if json_:
        show_json(asdict(report))
    else:
        for name, reason in report.left_out:
            echo(f"left out: {name}: {reason}")
        for note in report.notes:
            echo(f"note: {note}")
        echo(f"{report.out}: {counted(report.images, 'image')}, {', '.join(report.files)}")
        if report.called is not None:
            echo(f"called: {report.called} of {counted(report.images, 'image')}")
    if fail_on_defect and report.called:
        ctx.exit(3)


@click.command()
@device
@as_json
@click.pass_context
def demo(ctx: click.Context, json_: bool, device: str | None) -> None:
    """Try everything on two small built-in data sets.

    It generates the data sets, extracts features, trains heads and prints the table, in a few minutes on a CPU.

    \b
    Example:
      featprobe --workspace /tmp/demo demo
    """
    from featprobe.stages.demo import demo as run

    workspace = workspace_of(ctx)
    show_probe(run(workspace, lambda line: echo(line, err=json_), device), json_, workspace.probes)
    echo(
        f"Next, the answer in words, and a page:  {shlex.join(['featprobe', *at_workspace(ctx), 'compare'])}", err=json_
    )


def _asked(ctx: click.Context, options: dict[str, Any], *, live: bool = False) -> tuple["Workspace", "ProbeOptions"]:
    """The workspace and the options of a training, checked before torch is loaded."""
    how = _probe_options(options, live=live)
    from featprobe.stages.training.asked import check_asked

    workspace, data, backbones = workspace_of(ctx), names(options["data"]), names(options["backbone"])
    check_asked(workspace, options["task"], data, backbones, how, extract=options["extract"])
    return workspace, how


@as_usage()
def _probe_options(options: dict[str, Any], *, live: bool = False) -> "ProbeOptions":
    task = options["task"] or TASKS[0]
    kinds = kinds_of(task)
    if options["task"] and options["head"]:
        kind_of(task, options["head"])
    default = kind_of(task, options["head"] if options["head"] in kinds else kinds[0]).recipe
    trained = ("iterations", "batch_size", "class_weights", "loss", "loss_at", "weights_from")
    given = {name: options[name] for name in trained if options[name] not in (None, "auto")}
    from featprobe.stages.training.probe_options import ProbeOptions, Tuning

    tuned = {name: options[name] for name in Tuning.__dataclass_fields__ if options.get(name) is not None}
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
        labels=options["labels"],
        unit=options["unit"],
        false_calls=options["false_calls"],
        coreset=options["coreset"],
        remove_position=options["remove_position"],
        split=options["split"],
        absent=options["absent_classes"],
        device=options["device"],
        show=options["show"],
        quiet=options["quiet"],
        tuning=Tuning(**tuned) if live else None,
        log=tuple(dict.fromkeys(options["log"])),
        verify=not options.get("no_verify", False),
    )


def show_probe(report: "ProbeReport", json_: bool, probes: Path) -> None:
    """Print the results of trainings as a table, and where their heads are."""
    if json_:
        return show_json(report.rows)
    from featprobe.report.tables import result_text
    from featprobe.result_rows import ResultRow
    from featprobe.stages.training.saved_results import card_beside

    rows = [ResultRow.from_json(row) for row in report.rows]
    dtypes = [card_beside(probes, row)["features"]["dtype"] if row.regime == "frozen" else "" for row in rows]
    for note in report.notes:
        echo(f"note: {note}")
    how = dict.fromkeys(own for row in rows for own in row.scores.how_of(row.test))
    echo(f"Test split, percent{''.join(f'; {own}' for own in how)}.\n")
    echo(result_text(rows, terminal_width(), dtypes))
    echo()
    heads = [Path(row.folder) for row in rows]
    for folder in dict.fromkeys(head.parent for head in heads):
        seeds = ", ".join(head.name for head in heads if head.parent == folder)
        echo(f"heads: {probes / folder}/ {seeds}")
    for sheet in report.sheets:
        echo(f"pictures: {sheet}")
