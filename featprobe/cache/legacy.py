"""Files of versions 1 and 2, and HDF5's view of any cache file: both through a process that may fail, hang or grow.

HDF5 does not guard itself against what a file says: one flipped byte makes it walk in circles past Ctrl-C, and a file
made on purpose leads it into other files. So this process never opens a cache with it. A child does (hdf5_child.py),
within limits on memory and on time, after a look at the structure, and answers with the little that is asked for.
"""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featprobe.errors import CacheError

CHILD = Path(__file__).with_name("hdf5_child.py")
MOST_LINE = 100  # bytes: of an answer's first line
SPARE = 64 << 20  # bytes that an answer may be longer than its file
PIECE = 1 << 20  # bytes that are taken from the child at once
WALL_SECONDS = 60.0  # for a small file
BYTES_PER_SECOND = 20 << 20  # of a large one, in which the child is given so much more time


class ViewRefused(Exception):
    """HDF5 found no cache in a file; the text says what it found."""


def read_old(path: Path, handle: int) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What a file of version 1 or 2 would say as one of version 3, and the parts of it that have no place in the file.

    handle: of the file, open for reading. The first is a header's JSON with the places that the file has, with
    `version` and `inode`; the second are `texts` and `provenance`. Nothing in it has been checked against the recipe.
    Raises CacheError.
    """
    try:
        said, texts, provenance = _view("old", handle)
        return json.loads(said), {"texts": texts, "provenance": provenance}
    except (ViewRefused, ValueError) as error:
        raise CacheError(
            f"{path} is not a feature cache that can be opened.\n  wanted  a file of version 1 or 2\n"
            f"  found   {error}\nNothing was changed. Remove it and extract again:  featprobe cache rm FILE"
        ) from error


def disagreements(handle: int, header: Mapping[str, Any]) -> list[str]:
    """Where HDF5's view of a file of version 3 differs from that of its header, in words; [] where both agree.

    header: its JSON, with `version`. Names, places, types and shapes are compared, and bytes of all that is written once.
    """
    try:
        (said,) = _view("agrees", handle, json.dumps(header).encode())
        return [str(line) for line in json.loads(said)]
    except (ViewRefused, ValueError) as error:
        return [f"HDF5 can't open the file: {error}"]


def _view(kind: str, handle: int, request: bytes = b"") -> list[bytes]:
    """What the child answers. Raises ViewRefused, also where it came to no end within its limits."""
    size = os.fstat(handle).st_size
    end = time.monotonic() + WALL_SECONDS + size / BYTES_PER_SECOND
    quiet = {"HDF5_PLUGIN_PRELOAD": "::", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # "::": no plug-ins
    pipe, answers = os.pipe()
    with tempfile.TemporaryFile() as stdin, open(pipe, "rb", buffering=0):
        stdin.write(request)
        stdin.seek(0)
        child = subprocess.Popen(
            [sys.executable, "-P", str(CHILD), kind, str(handle)], stdin=stdin, stdout=answers,
            stderr=subprocess.DEVNULL, pass_fds=(handle,), env=os.environ | quiet,
        )  # fmt: skip
        os.close(answers)
        try:
            parts = _parts(pipe, end, 2 * size + SPARE)
            if parts is None:
                raise ViewRefused(_fate(child.wait(max(0.0, end - time.monotonic()))))
        except (TimeoutError, subprocess.TimeoutExpired) as error:
            raise ViewRefused("HDF5 came to no end with it") from error
        finally:
            child.kill()
            child.wait()
    if not parts[0]:
        raise ViewRefused(ascii(parts[-1].decode(errors="replace"))[1:-1])
    return parts


def _parts(pipe: int, end: float, most: int) -> list[bytes] | None:
    """The parts of an answer; None where it ends too early or is longer than allowed. Raises TimeoutError."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = _some(pipe, end, 1)
        if not byte or len(line) == MOST_LINE:
            return None
        line += byte
    sizes = [int(size) for size in line.split()]
    if sum(sizes) > most:
        return None
    parts = []
    for size in sizes:
        part = bytearray()
        while len(part) < size:
            piece = _some(pipe, end, min(PIECE, size - len(part)))
            if not piece:
                return None
            part += piece
        parts.append(bytes(part))
    return parts


def _some(pipe: int, end: float, most: int) -> bytes:
    """What the pipe holds, up to so many bytes; b"" at its end. Raises TimeoutError."""
    waiting = select.poll()
    waiting.register(pipe, select.POLLIN)
    if not waiting.poll(max(0.0, end - time.monotonic()) * 1000):
        raise TimeoutError
    return os.read(pipe, most)


def _fate(code: int) -> str:
    """How a child ended that did not answer."""
    if code >= 0:
        return f"HDF5's process ended with exit code {code} and without a whole answer"
    if -code in (signal.SIGXCPU, signal.SIGKILL):
        return "HDF5 came to no end with it, or took more memory than twice the file and 256 MB"
    return f"HDF5 broke down over it ({signal.Signals(-code).name})"
