"""The command line as a whole: its commands, its errors and its exit codes."""

import errno
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from featprobe import __version__
from featprobe.cli import stopping, streams
from featprobe.cli.answer_commands import compare, study
from featprobe.cli.cache import cache
from featprobe.cli.data import data
from featprobe.cli.export_commands import export
from featprobe.cli.feature_commands import backbones, extract, plan
from featprobe.cli.head_commands import demo, finetune, predict, probe
from featprobe.cli.help import InOrder
from featprobe.cli.inspect_commands import inspect
from featprobe.cli.options import echo
from featprobe.cli.probes_commands import probes
from featprobe.cli.start_commands import config, doctor, init, try_
from featprobe.errors import FeatprobeError
from featprobe.io.disk import REFUSALS, to_do
from featprobe.io.texts import beyond_locale, printable
from featprobe.machine import tune_memory

LACKS = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)
"""Errors of a process that may not have more memory or more files."""
LONGEST = 300  # letters of a path or a reason that are shown


class _Printable(logging.Formatter):
    """Log lines of libraries, with control characters shown."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        return printable(super().format(record))


class _Cli(InOrder):
    """Shows an error of featprobe, or Ctrl-C, as one paragraph; `--debug` shows where it comes from.

    The exit code is that of the error's class, and 130 for Ctrl-C.
    """

    def make_context(self, *given: Any, **named: Any) -> click.Context:
        """The context of a command line, which --help and --version end here."""
        try:
            return super().make_context(*given, **named)
        except OSError as error:
            if error.errno not in REFUSALS:
                raise
            streams.drop(sys.stdout)
            echo(f"featprobe: {streams.OUTPUT}: {error.strerror}.", err=True)
            raise click.exceptions.Exit(FeatprobeError.exit_code) from error

    def invoke(self, ctx: click.Context) -> Any:
        rank = os.environ.get("RANK", "0")  # of the processes that torchrun started
        try:
            _check_folder()
            return super().invoke(ctx)
        except (KeyboardInterrupt, Exception) as error:
            stopped = isinstance(error, KeyboardInterrupt) or stopping.is_asked()
            if stopped and ctx.params.get("debug"):
                echo(traceback.format_exc(), err=True)
            if stopped:
                line = "\n" if sys.stderr and sys.stderr.isatty() else ""  # below ^C, or a bar
                if rank == "0":
                    echo(f"{line}featprobe: {stopping.farewell(ctx.invoked_subcommand or '')}", err=True)
                ctx.exit(stopping.CODE)
            said = str(error) if isinstance(error, FeatprobeError) else _refusal(error)
            said = said or _of_device(error, ctx.invoked_subcommand or "")
            if ctx.params.get("debug") or not said:
                raise
            echo(f"featprobe{'' if rank == '0' else f', process {rank}'}: {said}", err=True)
            ctx.exit(error.exit_code if isinstance(error, FeatprobeError) else 1)


def _refusal(error: BaseException) -> str:
    """The message for what the system refuses, where no command has a message for it; "" for other errors."""
    named = isinstance(error, OSError) and isinstance(error.filename, str | bytes)
    file = f"{os.fsdecode(error.filename)[:LONGEST]}: " if isinstance(error, OSError) and named else ""
    if isinstance(error, OSError) and error.errno in REFUSALS:
        return f"{file}{error.strerror}. {to_do(error)}, then run the same command again."
    if isinstance(error, OSError) and error.errno in LACKS:
        return f"{file}{error.strerror}. Allow the process more (ulimit), then run the same command again."
    if file and isinstance(error, OSError):
        return f"{file}{error.strerror}. Nothing further was done. Correct the path or its rights, then run it again."
    if isinstance(error, OSError) and error.errno not in (None, errno.EPIPE):  # click ends where a reader leaves
        return f"{error.strerror}. Nothing further was done. --debug, before the command, shows where it happened."
    if isinstance(error, UnicodeEncodeError) and (remedy := beyond_locale()):
        return f"{ascii(error.object)[:LONGEST]} can't be the name of a file here. Nothing further was done.{remedy}"
    if isinstance(error, MemoryError):
        why = f" {str(error)[:LONGEST].rstrip('.')}." if str(error) else ""
        return f"The memory does not hold what was asked for.{why} Ask for less, as smaller images or batches."
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return "No more threads can be started here. Allow more processes or memory (ulimit), or use fewer --workers."
    return ""


def _of_device(error: BaseException, command: str) -> str:
    """The message for a device that fails, or whose memory is full, where no stage has one; "" for other errors."""
    if "torch" not in sys.modules:
        return ""
    from featprobe.stages.memory import said_of  # loads torch

    said = said_of(error)
    return f"{said}\n{stopping.KEPT.get(command, stopping.NOT_HALF)}" if said else ""


def _check_folder() -> None:
    """Raise FeatprobeError where the current folder was removed: there, libraries end the process."""
    try:
        os.getcwd()
    except OSError as error:
        raise FeatprobeError(
            f"The current folder can't be used: {error.strerror}. Nothing was done. Change into another one."
        ) from error


@click.group(cls=_Cli, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--workspace",
    "workspace_root",
    type=click.Path(file_okay=False, path_type=Path),
    default=".",
    envvar="FEATPROBE_WORKSPACE",
    help="The folder that holds cache/, probes/ and featprobe.toml.  [default: the current folder]",
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(__version__, prog_name="featprobe")
@click.pass_context
def cli(ctx: click.Context, workspace_root: Path, debug: bool) -> None:
    """Which pretrained backbone suits my inspection images, and is it enough to freeze it?

    \b
    Example:
      featprobe extract --backbone embedded --data xray   # images -> cache/
      featprobe probe --task semseg                       # cache/ -> probes/
      featprobe compare                                   # probes/ -> an answer
    """
    ctx.obj = workspace_root


for _command in (
    try_, init, extract, plan, probe, finetune, compare, inspect, study, predict, export, data, cache, probes,
    backbones, demo, config, doctor,
):  # fmt: skip
    cli.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; ends the process with its exit code."""
    streams.hold()
    stopping.listen()
    tune_memory()
    sys.excepthook = lambda *raised: echo("".join(traceback.format_exception(*raised)), err=True)
    plain = warnings.formatwarning
    warnings.formatwarning = lambda *warning, **more: printable(
        plain(*warning, **more)
    )  # libraries quote the files they read
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Printable())
    cli.main(args=None if arguments is None else list(arguments), prog_name="featprobe")
