"""Ctrl-C: the first ends a command with one paragraph, the next one kills it."""

import os
import signal
import threading
import time
from collections.abc import Mapping
from types import FrameType

CODE = 130
"""The exit code of a command that Ctrl-C ended, as shells have it: 128 + SIGINT."""
RELAYED = 1.0  # seconds in which a launcher passes on the Ctrl-C that its processes got from the terminal, too

GOES_ON = "The same command goes on from there."
KEPT: Mapping[str, str] = {
    "extract": f"Rows of the cache that were written stay. {GOES_ON}",
    "probe": "Heads and results of trainings that ended stay in probes/, and caches stay as far as they were made. The "
    "same command trains all its heads anew; a study omits what is there:  featprobe study",
    "finetune": "Heads and results of trainings that ended stay in probes/, and so does the last checkpoint of the one "
    f"that ran. {GOES_ON}",
    "study": "Rows of caches that were written stay, and heads and results of trainings that ended, and the last "
    f"checkpoint of one that trained a backbone. {GOES_ON}",
    "try": f"The plan, rows of caches that were written and heads that were trained stay. {GOES_ON}",
    "demo": "Rows of caches that were written stay, and heads of trainings that ended. Run the same command again.",
}
"""What a command leaves when it is stopped, and how it goes on."""
NOT_HALF = "What was written before stays, and no file is half-written. Run the same command again."
"""The same for other commands."""

_first: float | None = None  # when Ctrl-C came first


def listen() -> None:
    """Have the first Ctrl-C raise KeyboardInterrupt and the next one kill this process.

    Where it is ignored it stays so, and so does what another program that calls this one has made of it.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)


def is_asked() -> bool:
    """Whether Ctrl-C came. Errors after that are consequences: other processes end, imports break off."""
    return _first is not None


def farewell(command: str) -> str:
    """What to say of a command that is stopped: what is kept, and how to go on."""
    return f"Stopped by Ctrl-C. {KEPT.get(command, NOT_HALF)}"


def _stop(number: int, frame: FrameType | None) -> None:
    global _first
    if _first is not None:  # only among processes of a launcher
        if time.monotonic() - _first > RELAYED:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        return
    _first = time.monotonic()
    if "RANK" not in os.environ:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the system kills, whatever Python is busy with
    raise KeyboardInterrupt
