"""The streams of a command: open, closed, or of a kind that refuses what is written, as a file on a full disk."""

import errno
import io
import os
import sys
from contextlib import suppress
from typing import TextIO

NAMES = ("stdin", "stdout", "stderr")  # by the numbers that the system gives them
OUTPUT = "the standard output"


def hold() -> None:
    """Open standard streams that are closed, as nothing: a file would get their numbers, and what libraries print."""
    for number, name in enumerate(NAMES):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            mode = "w" if number else "r"
            setattr(sys, name, open(number, mode, encoding="utf-8", errors="backslashreplace", closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may be no text


def refused(error: OSError, *, err: bool) -> None:
    """What follows from an error of writing to stdout, or to stderr; raises it for stdout.

    What stderr refuses is lost: nobody can be told, and a line of progress ends no training.
    """
    drop(sys.stderr if err else sys.stdout)
    if not err:
        error.filename = OUTPUT if error.errno != errno.EPIPE else None  # a reader that leaves is no error
        raise error


def drop(stream: TextIO | None) -> None:
    """Lead a stream nowhere from now on: what it still holds would be refused again when Python ends."""
    with suppress(OSError, ValueError, AttributeError):
        number, nothing = stream.fileno(), os.open(os.devnull, os.O_WRONLY)  # type: ignore[union-attr]
        os.dup2(nothing, number)
        os.close(nothing)
