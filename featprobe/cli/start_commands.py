"""The commands to begin with: try, init, config, doctor."""

import math
import os
import shlex
import sys
import webbrowser
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from featprobe.cli.help import Grouped
from featprobe.cli.options import (
    as_json,
    at_workspace,
    columns,
    computing,
    device,
    echo,
    features,
    names,
    output,
    quiet,
    read_options,
    show_json,
    under,
    workspace_of,
)
from featprobe.errors import UsageError, as_usage

if TYPE_CHECKING:
    from featprobe.stages.try_out import Tried
    from featprobe.stages.upkeep.check import DataCheck
    from featprobe.stages.upkeep.doctor import Fact

READ_BY = ("format", "images", "masks", "group_from", "split_file")
LONG = 180  # seconds from which on a try asks before it begins


@click.command("try", cls=Grouped)
@click.argument("folder", metavar="FOLDER")
@under("Backbone")(
    "--backbone",
    metavar="LIST",
    default="embedded,embedded-random",
    show_default=True,
    help="Backbones to compare, separated by commas. NAME-random is NAME with seeded random weights.",
)
@read_options
@features("--size", metavar="HxW", help="Height x width in pixels of the images.  [default: chosen by --minutes]")
@computing(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    metavar="N",
    default=10.0,
    show_default=True,
    help="How long it may take. The size of the images follows from it.",
)
@device
@output("--yes", is_flag=True, help="Do not ask before it begins.")
@output("--no-open", is_flag=True, help="Do not open the page in a browser.")
@quiet
@as_json
@click.pass_context
def try_(ctx: click.Context, folder: str, json_: bool, **options: Any) -> None:
    """Answer a first question on a folder of images, in minutes.

    It looks at the folder, checks it, extracts features under two backbones, trains a head on each, and writes a page:
    which of the two is ahead, and how surely. By default these are the embedded backbone and the same network with
    random weights. Task, head, split and size follow from the images and labels. The plan and its minutes come first.
    Run the same command again to continue after an interruption. FOLDER is a path, or a name from `featprobe data`.

    \b
    Example:
      featprobe try path/to/my_set
      featprobe try path/to/my_set --backbone convnext_dinov3 --minutes 30
    """
    from featprobe.geometry import parse_size
    from featprobe.stages.workspace import backbone_of

    workspace, chosen = workspace_of(ctx), names(options["backbone"])
    how = {name: options[name] for name in READ_BY}
    with as_usage():
        if options["size"]:
            parse_size(options["size"])
        if not chosen:
            raise UsageError("--backbone names no backbone.")
        if not options["minutes"] < math.inf:
            raise UsageError(f"--minutes {options['minutes']:g} is no time. wanted: minutes, as 10")
        for name in chosen:
            backbone_of(workspace, name)
        workspace.check_reading(folder, how)
    from featprobe.stages.try_out import TryOptions, try_out

    own = TryOptions(
        backbones=chosen,
        minutes=options["minutes"],
        size=options["size"],
        device=options["device"],
        quiet=options["quiet"],
        read_as=how,
    )
    asks = not (options["yes"] or json_) and _is_terminal()

    def say(line: str) -> None:
        echo(line, err=json_)

    def agree(seconds: float) -> bool:
        return not asks or seconds <= LONG or click.confirm("Go on?", default=True)

    tried = try_out(workspace, folder, own, say, agree, lambda found: None if json_ else _show_check(found))
    if tried is None:
        return echo("Stopped, as you said. What was computed is kept.", err=json_)
    if json_:
        return show_json(_tried_json(tried))
    _show_tried(tried)
    if not options["no_open"] and _has_screen():
        webbrowser.open(tried.page.resolve().as_uri())


@click.command(cls=Grouped)
@click.argument("folder", metavar="FOLDER")
@read_options
@quiet
@as_json
@click.pass_context
def init(ctx: click.Context, folder: str, quiet: bool, json_: bool, **how: str | None) -> None:
    """Write a featprobe.toml and a study for a folder of images.

    It reads and checks the data set in the folder, and writes two files into the workspace: featprobe.toml, which names
    the set, and study.toml. Comments say what was found, and which choices there are. Files that are there are never
    overwritten. A folder that fits no format is refused; then --images and --masks can say where they lie.

    \b
    Example:
      featprobe init path/to/my_set
      featprobe study study.toml --dry-run
    """
    workspace = workspace_of(ctx)
    with as_usage():
        workspace.check_reading(folder, how)
    from featprobe.stages.upkeep.check import check
    from featprobe.stages.upkeep.starter import check_free, start

    check_free(workspace)  # before everything is read
    data = workspace.data_set(folder, how.pop("format"), complete=False, **how)
    started = start(workspace, data, check(data, quiet=quiet))
    if json_:
        return show_json({
            "data": started.name, "files": [str(path) for path in started.files], "task": started.aim.kind.task,
            "head": started.aim.kind.name, "split": started.aim.split, "labels": started.aim.labels,
            "reasons": started.aim.reasons,
        })  # fmt: skip
    _show_check(started.checked)
    for path in started.files:
        echo(f"written: {path}")
    words = ["featprobe", *at_workspace(ctx), "study", str(started.files[-1]), "--dry-run"]
    echo(f"Read both, then see the plan:  {shlex.join(words)}")


@click.command()
@as_json
@click.pass_context
def config(ctx: click.Context, json_: bool) -> None:
    """Show what is in force here, and where it comes from.

    These are the workspace, every entry of featprobe.toml with its line, defaults, and environment variables that
    change what featprobe does.

    \b
    Example:
      featprobe config
    """
    from featprobe.stages.upkeep.in_force import ROOT_VARIABLE, in_force

    source = ctx.find_root().get_parameter_source("workspace_root")
    names_of_sources = {
        click.core.ParameterSource.COMMANDLINE: "--workspace",
        click.core.ParameterSource.ENVIRONMENT: f"environment: {ROOT_VARIABLE}",
    }
    said = names_of_sources.get(source, "the current folder") if source else "the current folder"
    settings = in_force(workspace_of(ctx), said)
    if json_:
        return show_json([asdict(setting) for setting in settings])
    echo(columns([(own.name, own.value, own.source) for own in settings], ("setting", "value", "from")))


@click.command()
@click.option("--offline", is_flag=True, help="Do not ask whether the model hub can be reached.")
@as_json
@click.pass_context
def doctor(ctx: click.Context, json_: bool, offline: bool) -> None:
    """Report versions, devices and workspace for a bug report.

    Paste the text into the report. Home folders are shortened to ~ and your user name to USER. Names of data sets and
    values of secret variables are omitted. Read it before you send it. If something is unusable, the exit code is 3.

    \b
    Example:
      featprobe doctor
      featprobe doctor --offline --json
    """
    from featprobe.stages.upkeep.doctor import as_json as plain
    from featprobe.stages.upkeep.doctor import examine

    facts = examine(ctx.obj, offline=offline)
    if json_:
        show_json(plain(facts))
    else:
        _show_facts(facts)
    if any(fact.unusable for fact in facts):
        ctx.exit(3)


def _show_facts(facts: "Sequence[Fact]") -> None:
    """A report as plain text, part by part."""
    echo("featprobe doctor (home folders are shortened to ~)")
    width = max(len(fact.name) for fact in facts)
    for part in dict.fromkeys(fact.part for fact in facts):
        echo(f"\n{part}")
        for fact in facts:
            if fact.part == part:
                echo(f"  {fact.name.ljust(width)}  {fact.value}")
    unusable = [f"{fact.part}: {fact.name}" for fact in facts if fact.unusable]
    echo(f"\n{'Unusable: ' + ', '.join(unusable) if unusable else 'Nothing is unusable.'}")


def _show_check(found: "DataCheck") -> None:
    """What the check of a try found, in a few lines."""
    from featprobe.stages.upkeep.check import head_lines

    echo(f"{found.name}: {found.root}")
    echo("\n".join(f"  {line}" for line in head_lines(found)))
    for finding in found.findings:
        echo(f"{'spoils a study' if finding.spoils else 'to know'}: {finding.text}")
    echo()


def _show_tried(tried: "Tried") -> None:
    echo("\nThe same by hand:")
    for command in tried.commands:
        echo(f"  {command}")
    echo("Next:")
    for what, command in tried.further:
        echo(f"  {what}\n    {command}")
    echo(f"\npage: {tried.page}  ({tried.seconds / 60:.1f} min)")
    echo(f"answer: {tried.answer}".replace("\n", "\n  "))


def _tried_json(tried: "Tried") -> dict[str, Any]:
    """A try, for a machine."""
    outline = asdict(tried.outline) | {"seconds": tried.outline.seconds}
    del outline["asked"]
    return {
        "page": str(tried.page),
        "answer": tried.answer,
        "plan": outline,
        "seconds": tried.seconds,
        "commands": tried.commands,
        "next": [{"what": what, "command": command} for what, command in tried.further],
        "spoils": [finding.text for finding in tried.checked.findings if finding.spoils],
    }


def _is_terminal() -> bool:
    """Whether a person reads this and can answer."""
    return bool(sys.stdin and sys.stdin.isatty() and sys.stdout and sys.stdout.isatty())


def _has_screen() -> bool:
    """Whether a person sits before this terminal, and a browser can show them a page."""
    if not _is_terminal() or os.environ.get("SSH_CONNECTION"):
        return False
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
