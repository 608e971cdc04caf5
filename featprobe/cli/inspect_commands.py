"""The command that speaks of defects, false calls and parts: inspect."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from featprobe.cli.help import ALL_TASKS, Grouped, under
from featprobe.cli.options import (
    as_json,
    device,
    echo,
    names,
    output,
    quiet,
    show_json,
    terminal_width,
    workspace_of,
)
from featprobe.errors import UsageError, as_usage

if TYPE_CHECKING:
    from featprobe.metrics.defects.operating import Wanted
    from featprobe.stages.inspection.inspect import Inspections

heads, point, rule, sizes = map(under, ("Heads", "Operating point", "What counts", "Sizes"))


@click.command(cls=Grouped)
@click.argument("folders", nargs=-1, metavar="[HEAD]…", type=click.Path(exists=True, path_type=Path))
@heads("--task", metavar="LIST", help=f"Results of these tasks: {ALL_TASKS}.  [default: all]")
@heads("--data", metavar="LIST", help="Results on these data sets, separated by commas.  [default: all]")
@heads("--backbone", metavar="LIST", help="Results of these backbones, separated by commas.  [default: all]")
@point(
    "--false-calls",
    metavar="RATE[/part]",
    help="Choose the lowest threshold with at most so many false calls per image, or per part: 0.1, 0.05/part.",
)
@point("--recall", metavar="SHARE", help="Choose the highest threshold that finds this share of the defects: 0.95.")
@point(
    "--cost",
    metavar="miss=M,call=C",
    help="Choose the threshold of least cost, where each missed defect costs M and each false call C.",
)
@point("--min-area", type=click.IntRange(1), metavar="PX", help="Drop calls of fewer pixels.  [default: 1]")
@rule(
    "--found",
    metavar="RULE",
    help="usual: a call has found a defect if it covers its center or a tenth of its area, or if their IoU is 0.1 or "
    "more. iou:0.5: if their IoU is 0.5 or more.  [default: the rule of the records]",
)
@rule("--same-class", is_flag=True, help="A call finds only defects of its own class.")
@rule(
    "--rescore",
    is_flag=True,
    help="First make the records anew, from cache and head: where a head has none, or for another rule.",
)
@sizes(
    "--size",
    type=click.Choice(["root_area", "area", "longest", "shortest"]),
    default="root_area",
    show_default=True,
    help="What the size of a defect is: the square root of its area, its area, its longest or its shortest side.",
)
@sizes("--unit", type=click.Choice(["px", "mm"]), default="px", show_default=True, help="The unit of sizes.")
@sizes("--pod", is_flag=True, help="Fit a probability of detection: from which size on 90 % are found.")
@output(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="Also write all tables as CSV files into a folder."
)
@device
@quiet
@as_json
@click.pass_context
def inspect(ctx: click.Context, folders: tuple[Path, ...], json_: bool, out: Path | None, **options: Any) -> None:
    """Say which defects heads find, and how many good parts they stop.

    HEAD is a folder that `probe` or `finetune` has written. A folder above such stands for all results below it, and
    without any all results of the workspace are inspected: of each the seed that is best on validation. The threshold
    is chosen on the validation images alone, then applied to the test images. With --false-calls, --recall or --cost it
    is kept beside the head, and `predict` and `export` use it.

    \b
    Example:
      featprobe inspect
      featprobe inspect probes/SET/BACKBONE/HEAD/seed0 --false-calls 0.05/part
      featprobe inspect --data xray --recall 0.95 --size longest --unit mm
      featprobe inspect --cost miss=100,call=1 --out tables
    """
    asked, least = _wanted(options), options["min_area"]
    with as_usage():
        from featprobe.metrics.defects.overlaps import rule_of

        given = options["found"] is not None or options["same_class"]
        found_by = rule_of(options["found"], same_class=options["same_class"]) if given else None
    only = {name: names(options[name]) for name in ("task", "data", "backbone")}
    if folders and any(only.values()):
        raise UsageError("--task, --data and --backbone choose among all results. Omit them, or omit HEAD.")
    from featprobe.stages.inspection.inspect import inspect as run
    from featprobe.stages.inspection.lines import write_tables

    found = run(
        workspace_of(ctx), [head if head.suffix != ".json" else head.parent for head in folders], wanted=asked,
        size=options["size"], unit=options["unit"], least_area=least, rule=found_by, pod=options["pod"],
        rescore=options["rescore"], only=only, device=options["device"], quiet=options["quiet"],
    )  # fmt: skip
    files = write_tables(found, out) if out else []
    _show(found, json_, details=bool(folders) or len(found.each) == 1)
    for file in files if not json_ else ():
        echo(f"table: {file}")


def _wanted(options: dict[str, Any]) -> "Wanted | None":
    """What the operating point is chosen for; raises UsageError."""
    given = [name for name in ("false_calls", "recall", "cost") if options[name] is not None]
    if len(given) > 1:
        both = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UsageError(f"{both} each choose a threshold, and a head has one. Give one of them.")
    if not given:
        return None
    from featprobe.metrics.defects.operating import Wanted

    parse = {"false_calls": Wanted.parse, "recall": Wanted.parse_recall, "cost": Wanted.parse_cost}[given[0]]
    with as_usage():
        return parse(options[given[0]])


def _show(found: "Inspections", json_: bool, *, details: bool) -> None:
    from featprobe.stages.inspection.lines import plain_json, pod_text, whole_line

    if json_:
        return show_json(plain_json(found))
    from featprobe.report.inspection_text import inspection_text, notes_text, overview_text, place_of

    width = terminal_width()
    lines = [whole_line(own) for own in found.each]
    if len(lines) > 1:
        echo(overview_text(lines, width) + "\n")
    for own, line in zip(found.each, lines, strict=True) if details else ():
        echo(inspection_text(line, width) + "\n")
        for sentence in pod_text(own):
            echo(sentence)
    for note in notes_text(lines):
        echo(note)
    for note in found.notes:
        echo(f"note: {note}")
    for left in found.left:
        echo(f"not inspected: {left.folder}: {left.reason}")
    if not details:
        echo("\nBy size, by class, and what is missed:  featprobe inspect HEAD, with one of these:")
        for line in sorted(lines, key=lambda own: (own["data"], own["task"])):
            echo(f"  {place_of(line)}")
