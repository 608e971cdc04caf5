"""How far a long loop is, on stderr: a bar on a terminal, a line a minute in a log, from the first process alone."""

import io
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

from featprobe.io.texts import printable
from featprobe.machine import human_bytes, time_text

EVERY = 60.0  # seconds between two lines
BYTES = "B"  # the unit that is written as kB, MB or GB
T = TypeVar("T")


class Progress:
    """The progress of one loop, in steps that are counted; nothing is shown where `quiet`, or where there is no step.

    total: how many steps. what: whose they are. unit: of a step. leave: a bar stays on the terminal when it is full.
    """

    def __init__(self, total: int, what: str, unit: str, *, quiet: bool = False, leave: bool = False) -> None:
        self.total, self.what, self.unit = total, printable(what), unit
        self.done, self._note = 0, ""
        self._begun = self._said = time.monotonic()
        self._silent = quiet or not total or os.environ.get("RANK", "0") != "0"
        self._bar: tqdm | None = None
        if not self._silent and sys.stderr and sys.stderr.isatty():
            self._bar = tqdm(total=total, desc=self.what, unit=unit, unit_scale=unit == BYTES, leave=leave)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, steps: int = 1) -> None:
        """Count steps that were done."""
        self.done += steps
        if self._bar is not None:
            self._bar.update(steps)
        elif not self._silent and time.monotonic() - self._said >= EVERY:
            self._said = time.monotonic()
            with suppress(OSError):  # a log that can't be written ends no training
                print(self.line, file=sys.stderr or io.StringIO(), flush=True)

    def note(self, text: str) -> None:
        """Say something beside the count, from the next time on."""
        self._note = text
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    @property
    def rate(self) -> float:
        """Steps per second so far."""
        return self.done / max(time.monotonic() - self._begun, 1e-9)

    @property
    def line(self) -> str:
        """The state as a line of a log."""
        done, total = (human_bytes(n) if self.unit == BYTES else str(n) for n in (self.done, self.total))
        unit = "" if self.unit == BYTES else f" {self.unit}"
        left = f", about {time_text((self.total - self.done) / self.rate)} left" if self.done else ""
        gone = time_text(time.monotonic() - self._begun)
        return f"{self.what}: {done} of {total}{unit}, {gone} gone{left}{self._note and f', {self._note}'}"


def counting(items: Iterable[T], total: int, what: str, unit: str, *, quiet: bool = False) -> Iterator[T]:
    """The items, each counted once it was used."""
    with Progress(total, what, unit, quiet=quiet) as progress:
        for item in items:
            yield item
            progress.update()
