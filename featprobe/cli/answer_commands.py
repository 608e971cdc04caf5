"""The commands that answer: compare, study."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from featprobe.cli.head_commands import show_probe
from featprobe.cli.options import (
    as_json,
    echo,
    log,
    names,
    quiet,
    show_json,
    terminal_width,
    to_stderr,
    workspace_of,
)
from featprobe.errors import UsageError, as_usage

if TYPE_CHECKING:
    from featprobe.stages.comparison.compare import Comparison
    from featprobe.stages.study.run_study import StudyAnswer


@click.command()
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="The folder to write to.  [default: probes/report]"
)
@click.option("--gap", metavar="A,B", help="Two backbones. Measure how their difference depends on the data set.")
@click.option("--on", metavar="RGBSET,XRAYSET", help="The two data sets for --gap.")
@click.option(
    "--across-recipes", is_flag=True, help="Give a verdict even if two results differ in how they were trained."
)
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
    """Compare all results: an answer in words, tables, a page.

    Each table holds results on the same test images. Two results that were trained in different ways get no verdict
    without --across-recipes. The command writes index.html, results.csv, differences.csv and results.parquet.

    \b
    Example:
      featprobe compare
      featprobe compare --gap convnext_dinov3,convnext_in1k --on surface,xray
    """
    workspace = workspace_of(ctx)
    _check_gap(workspace.probes, gap, on)
    from featprobe.report.comparison import comparison_text
    from featprobe.stages.comparison.compare import compare as run
    from featprobe.stages.comparison.compare import plain_json

    report = run(workspace, out, names(gap), names(on), quiet, across_recipes=across_recipes)
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


@as_usage()
def _check_gap(probes: Path, gap: str | None, on: str | None) -> None:
    """Refuse names that no result has, before torch is loaded; without any result, the comparison says so."""
    if (gap is None) != (on is None):
        raise UsageError("--gap and --on belong together: --gap A,B --on RGBSET,XRAYSET")
    if gap is not None:
        from featprobe.stages.comparison.gap_names import check_gap, named_in

        backbones, sets = named_in(probes / "results.jsonl")
        if backbones:
            check_gap(names(gap), names(on), backbones, sets)


def _study_file(ctx: click.Context, option: click.Parameter, asked: bool) -> None:
    """Print what a study file may hold, as a file with comments or as a JSON schema, and end."""
    if asked and not ctx.resilient_parsing:
        from featprobe.stages.study.study import Study
        from featprobe.stages.study.study_file import schema, template

        show_json(schema(Study)) if option.name == "schema" else echo(template(Study), nl=False)
        ctx.exit()


_printed: dict[str, Any] = {"is_flag": True, "is_eager": True, "expose_value": False, "callback": _study_file}


@click.command()
@click.argument("file", metavar="STUDY.toml", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--template", **_printed, help="Only print a study file with every key, its default and its meaning.")
@click.option("--schema", **_printed, help="Only print the JSON schema of study files, which editors can use.")
@click.option("--dry-run", is_flag=True, help="Only print the plan and the predicted times.")
@click.option("--verify", is_flag=True, help="Check all bytes of the saved heads, and train damaged heads again.")
@click.option(
    "--launcher",
    type=click.Choice(["local", "slurm"]),
    default="local",
    show_default=True,
    help="Where to run. slurm submits what is missing to a cluster as job arrays, and returns.",
)
@click.option(
    "--slurm",
    metavar="KEY=VALUE",
    multiple=True,
    help="A parameter of all SLURM jobs, as partition=gpu. Can be repeated.  [default: time=240, in minutes]",
)
@log
@as_json
@click.pass_context
def study(ctx: click.Context, file: Path, json_: bool, dry_run: bool, verify: bool, **options: Any) -> None:
    """Run a whole grid of trainings from one file.

    The file lists backbones, data sets, tasks, heads, regimes, seeds and fractions, and how features are made. What is
    finished is skipped, so run the same command again to continue after a stop. A head that is missing or damaged is
    trained again. If one training fails, the others go on, and the exit code is 3. At the end, the results of this
    study are compared as `featprobe compare` does, on a page in probes/report/STUDY. With SLURM, run the same command
    again to see what failed and to submit what is still missing.

    \b
    Example:
      featprobe study --template > study.toml
      featprobe study examples/embedded.toml --dry-run
      featprobe study examples/embedded.toml
      featprobe study examples/embedded.toml --launcher slurm \\
        --slurm partition=gpu --slurm gpus_per_node=1
    """
    from featprobe.stages.study.study import read_study

    on_slurm = options["launcher"] == "slurm"
    if options["slurm"] and not on_slurm:
        raise UsageError("--slurm belongs to --launcher slurm.")
    workspace = workspace_of(ctx)
    read_study(file, workspace)  # its faults, before torch is loaded
    from featprobe.stages.study.run_study import run_study
    from featprobe.stages.training.probe import ProbeReport

    answer = run_study(
        workspace,
        file,
        to_stderr,
        dry_run=dry_run,
        verify=verify,
        log=options["log"],
        slurm=options["slurm"] if on_slurm else None,
        quiet=json_,
    )
    report = answer.report
    if json_:
        show_json(_study_json(answer))
    elif report.rows:
        show_probe(ProbeReport(report.rows, (), report.notes), json_, workspace.probes)
    else:
        for note in report.notes:
            echo(f"note: {note}")
    if answer.comparison and not json_:
        echo()
        _show_answer(answer.comparison)
        echo(f"page: {answer.page}")
    for reason in dict.fromkeys(reason for _, reason in report.failed if not json_):
        cells = "\n".join(f"failed: {cell}" for cell, own in report.failed if own == reason)
        echo("\n  ".join([cells, *reason.splitlines()]), err=True)
    if report.failed:
        ctx.exit(3)


def _study_json(answer: "StudyAnswer") -> dict[str, Any]:
    """The result of a study, for a machine."""
    report = answer.report
    handed = {} if answer.submitted is None else {"handed_over": answer.submitted, "queued": answer.queued}
    return {
        "cells": len(report.cells),
        "trained": len(report.rows),
        "done": report.done,
        "failed": [{"cell": str(cell), "reason": reason} for cell, reason in report.failed],
        **handed,
        "page": str(answer.page) if answer.page else None,
    }


def _show_answer(report: "Comparison") -> None:
    for title, sentences in report.answer:
        echo("\n  ".join([title, *sentences]) + "\n")
