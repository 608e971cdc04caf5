"""The commands to begin with: try, init, config, doctor."""

import os
import sys
import webbrowser
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from featprobe.cli.options import (
    as_json,
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
from featprobe.cli.help import Grouped

if TYPE_CHECKING:
    from featprobe.stages.try_out import Tried
    from featprobe.stages.upkeep.check import DataCheck

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
    random weights. Task, head, split and size follow from the images and labels. The plan and its minutes come first. Run
    the same command again to continue after an interruption. FOLDER is a path, or a name from `featprobe data`.

    \b
    Example:
      featprobe try path/to/my_set
      featprobe try path/to/my_set --backbone convnext_dinov3,resnet50 --minutes 30
    """
    from featprobe.stages.try_out import TryOptions, try_out

    own = TryOptions(
        backbones=names(options["backbone"]),
        minutes=options["minutes"],
        size=options["size"],
        device=options["device"],
        quiet=options["quiet"],
        read_as={name: options[name] for name in ("format", "images", "masks", "group_from", "split_file")},
    )
    asks = not (options["yes"] or json_) and sys.stdin.isatty() and sys.stdout.isatty()

    def say(line: str) -> None:
        echo(line, err=json_)

    def agree(seconds: float) -> bool:
        return not asks or seconds <= LONG or click.confirm("Go on?", default=True)

    tried = try_out(workspace_of(ctx), folder, own, say, agree, lambda found: None if json_ else _show_check(found))
    if tried is None:
        return echo("Stopped, as you said. What was computed is kept.", err=json_)
    if json_:
        return show_json(_tried_json(tried))
    _show_tried(tried)
    if not options["no_open"] and _has_screen():
        webbrowser.open(tried.page.resolve().as_uri())


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
    echo(f"answer: {tried.answer}")


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


def _has_screen() -> bool:
    """Whether a person sits before this terminal, and a browser can show them a page."""
    if not sys.stdout.isatty() or os.environ.get("SSH_CONNECTION"):
        return False
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
