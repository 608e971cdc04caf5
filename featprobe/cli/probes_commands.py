"""The commands of `featprobe probes`."""

from typing import TYPE_CHECKING, Any

import click

from featprobe.cli.help import InOrder
from featprobe.cli.options import agreed, as_json, columns, echo, show_json, workspace_of
from featprobe.errors import as_usage, counted

if TYPE_CHECKING:
    from featprobe.stages.upkeep.saved_heads import HeadFolder


@click.group(cls=InOrder)
def probes() -> None:
    """List or remove saved heads.

    \b
    Example:
      featprobe probes ls
      featprobe probes rm xray --dry-run
    """


@probes.command("ls")
@as_json
@click.pass_context
def probes_ls(ctx: click.Context, json_: bool) -> None:
    """List the saved heads of the workspace, with the main score of each.

    \b
    Example:
      featprobe probes ls
    """
    from featprobe.machine import human_bytes
    from featprobe.stages.upkeep.saved_heads import head_folders

    workspace = workspace_of(ctx)
    found = head_folders(workspace)
    if json_:
        return show_json([_head_json(head) for head in found])
    if not found:
        return echo(f"No heads in {workspace.probes}. Train some:  featprobe probe")
    rows = [(head.name, _score_text(head), human_bytes(head.bytes)) for head in found]
    echo(columns(rows, ("head", "test", "size")))


@probes.command("rm")
@click.argument("names", nargs=-1, required=True, metavar="NAME…")
@click.option("--dry-run", is_flag=True, help="Only list what would be removed.")
@click.option("--yes", is_flag=True, help="Remove without asking.")
@as_json
@click.pass_context
def probes_rm(ctx: click.Context, names: tuple[str, ...], dry_run: bool, yes: bool, json_: bool) -> None:
    """Remove saved heads, and their rows from probes/results.jsonl.

    NAME is a head's folder, a folder above it in probes/, or a part of its name as `probes ls` prints it. The
    command asks first. If a training is writing one of the heads, or a folder holds files of yours, nothing is removed.
    Caches stay.

    \b
    Example:
      featprobe probes rm xray --dry-run
      featprobe probes rm probes/SET/BACKBONE/HEAD/seed0 --yes
    """
    from featprobe.machine import human_bytes
    from featprobe.stages.upkeep.saved_heads import check_removable, find_heads, remove_heads

    workspace = workspace_of(ctx)
    with as_usage():
        heads = find_heads(workspace, names)
    check_removable(heads)
    for head in heads if not json_ else ():
        echo(f"{head.path}  {human_bytes(head.bytes)}{'' if head.row else ', without a row'}")
    if not (dry_run or yes):
        agreed(f"Remove {counted(len(heads), 'head')}?", err=json_)
    freed = 0 if dry_run else remove_heads(workspace, heads)
    if json_:
        return show_json({"heads": [_head_json(head) for head in heads], "removed": not dry_run, "freed": freed})
    echo(f"{counted(len(heads), 'head')}; nothing was removed" if dry_run else f"{human_bytes(freed)} freed")


def _score_text(head: "HeadFolder") -> str:
    """The main score of a head on test, percent; or why there is none."""
    if head.row is None:
        return "stopped training" if not head.whole else "no row"
    score = head.row.scores.main
    value = score.of(head.row.test)
    return f"{score.label} {'–' if value is None else format(100 * value, '.1f')}"


def _head_json(head: "HeadFolder") -> dict[str, Any]:
    row = head.row
    own = {} if row is None else {"task": row.task, "head": row.head, "backbone": row.backbone, "data": row.data}
    score = {} if row is None else {row.scores.main.name: row.scores.main.of(row.test)}
    return {"folder": head.name, "bytes": head.bytes, "whole": head.whole, **own, **score}
