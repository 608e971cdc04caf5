"""Files of versions 1 and 2, and HDF5's view of any cache file: both through a process that may fail, hang or grow.

HDF5 trusts what a file says: one flipped byte makes it run in circles past Ctrl-C, and a malicious file leads it into
other files. So this process never opens a cache with HDF5. A child process does (hdf5_child.py), within limits on
memory and time and after a check of the structure, and answers only the question.
"""

import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

from featprobe.cache.header import FILE_VERSION, FormatFault, Index, NewerFormat
from featprobe.cache.held_file import HeldFile, Span, unknown
from featprobe.cache.layout import FORMAT, Extent
from featprobe.cache.rows import TARGET_KINDS, TEXT_FIELDS, Blob, RowTable
from featprobe.errors import CacheError
from featprobe.specs import DataInfo, FeatureRecipe

CHILD = Path(__file__).with_name("hdf5_child.py")
MOST_LINE = 100  # bytes: of an answer's first line
SPARE = 64 << 20  # bytes by which an answer may be longer than its file
PIECE = 1 << 20  # bytes that are read from the child at once
WALL_SECONDS = 60.0  # for a small file
BYTES_PER_SECOND = 20 << 20  # of a large file: the child gets more time by its size
TOO_LONG = "HDF5's process answered more than a cache of this size holds"
LACK = "lack"  # kind of a refusal that says nothing of the file
SETTLED_SECONDS = 2.0  # longer than the steps in which most file systems count time


class ViewRefused(Exception):
    """HDF5 found no cache in a file; the text says what it found. kind: as in the child's `Refused`, or LACK."""

    kind = ""


_views: dict[tuple[int, ...], list[bytes] | ViewRefused] = {}  # the answer for the old file that was read last


def read_old(file: HeldFile) -> tuple[dict[str, Any], dict[str, Blob]]:
    """The header that a file of version 1 or 2 would have in version 3, with its real places, and its parts.

    The header also holds `version`. Nothing in it has been compared with the recipe yet. Raises FormatFault,
    NewerFormat, and CacheError for an HDF5 file that is no cache.
    """
    try:
        said, texts, provenance = _old_view(file)
        values = json.loads(said)
    except ViewRefused as refusal:
        if refusal.kind == LACK:
            raise unknown(file.path, str(refusal)) from refusal
        if refusal.kind == "other":
            raise CacheError(
                f"{file.path} is HDF5, but not a feature cache.\n  wanted  format {FORMAT}\n  found   {refusal}"
            ) from refusal
        if refusal.kind == "newer":
            raise NewerFormat(f"version {FILE_VERSION} or older", str(refusal)) from refusal
        raise FormatFault("a file of version 1 or 2", str(refusal)) from refusal
    placed = Index.of(values, values["version"]).parts
    parts: dict[str, Blob] = {name: Span(file, entry) for name, entry in placed.items()}
    return values, {**parts, "texts": texts, "provenance": provenance}


def old_identity(
    recipe: FeatureRecipe, data: DataInfo, extents: Mapping[str, Extent], tables: Sequence[RowTable]
) -> str:
    """sha256 over all that is written once in versions 1 and 2, and over the places of the tables.

    tables: of the rows, and of the images where rows are parts of them. The places count because HDF5 does not check
    its own bookkeeping: with a flipped address other rows would be read.
    """
    running = hashlib.sha256()
    places = {name: asdict(extent) for name, extent in extents.items()}
    said = {name: value for name, value in data.to_json().items() if name != "bits" or value}  # older lack it
    head = {"recipe": recipe.to_json(), "data": said, "extents": places}
    running.update(json.dumps(head, sort_keys=True, separators=(",", ":")).encode())
    for row in (table.unchecked(i) for table in tables for i in range(len(table))):
        text = [getattr(row, name) for name in TEXT_FIELDS]
        sizes = [row.placement.original, row.placement.content, row.placement.frame]
        parts = [] if row.part is None else [astuple(row.part), row.image_index]
        running.update(json.dumps([text, sizes, *parts]).encode())
        for kind in TARGET_KINDS:
            blob = getattr(row, kind)
            running.update(len(blob).to_bytes(8, "little"))
            running.update(blob)
    return running.hexdigest()


def disagreements(file: HeldFile, index: Index) -> list[str]:
    """The differences between a file of version 3 as HDF5 reads it and its header, in words; [] where both agree.

    Names, places, types and shapes are compared, and the bytes of all that is written once. Raises CacheError where
    HDF5's process can't be started.
    """
    said = index.to_json() | {"version": index.version}
    try:
        (lines,) = _view("agrees", file.handle, json.dumps(said).encode())
        return [ascii(line)[1:-1] for line in json.loads(lines)]
    except (ViewRefused, ValueError) as error:
        if isinstance(error, ViewRefused) and error.kind == LACK:
            raise unknown(file.path, str(error)) from error
        return [f"HDF5 can't open the file: {error}"]


def _old_view(file: HeldFile) -> list[bytes]:
    """The child's answer for an old file. The last answer is kept, and used again while the file is unchanged.

    A command opens a cache several times. A file that changed less than SETTLED_SECONDS ago may change again without
    another time stamp, so its answer is not kept.
    """
    status = os.fstat(file.handle)
    key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    view = _views.get(key)
    if view is None:
        settled = time.time() - status.st_ctime > SETTLED_SECONDS
        try:
            view = _view("old", file.handle)
        except ViewRefused as refusal:
            view = refusal
        _views.clear()
        if settled and not (isinstance(view, ViewRefused) and view.kind == LACK):
            _views[key] = view
    if isinstance(view, ViewRefused):
        raise view
    return view


def _view(kind: str, handle: int, request: bytes = b"") -> list[bytes]:
    """The child's answer. Raises ViewRefused, also where the child does not end within its limits."""
    size = os.fstat(handle).st_size
    end = time.monotonic() + WALL_SECONDS + size / BYTES_PER_SECOND
    quiet = {"HDF5_PLUGIN_PRELOAD": "::", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # "::": no plug-ins
    try:
        with tempfile.TemporaryFile() if request else open(os.devnull, "r+b") as stdin:
            stdin.write(request)
            stdin.seek(0)
            child = subprocess.Popen(
                [sys.executable, "-P", str(CHILD), kind, str(handle)], stdin=stdin, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, pass_fds=(handle,), env=os.environ | quiet,
            )  # fmt: skip
    except OSError as error:
        refusal = ViewRefused(f"HDF5's process can't be started: {error.strerror or error}")
        refusal.kind = LACK
        raise refusal from error
    with child:
        try:
            parts = _parts(child.stdout.fileno() if child.stdout else -1, end, 2 * size + SPARE)
            if parts is None:
                raise ViewRefused(_fate(child.wait(max(0.0, end - time.monotonic()))))
        except (TimeoutError, subprocess.TimeoutExpired) as error:
            raise ViewRefused("HDF5 did not finish with it") from error
        finally:
            child.kill()
    if not parts[0]:
        refusal = ViewRefused(ascii(parts[1].decode(errors="replace"))[1:-1])
        refusal.kind = parts[2].decode(errors="replace")
        raise refusal
    return parts


def _parts(pipe: int, end: float, most: int) -> list[bytes] | None:
    """The parts of an answer; None where it ends too early. Raises ViewRefused for a long answer, TimeoutError."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = _read_up_to(pipe, end, 1)
        if not byte:
            return None
        line += byte
        if len(line) > MOST_LINE:
            raise ViewRefused(TOO_LONG)
    sizes = [int(size) for size in line.split()]
    if sum(sizes) > most:
        raise ViewRefused(TOO_LONG)
    parts = []
    for size in sizes:
        part = bytearray()
        while len(part) < size:
            piece = _read_up_to(pipe, end, min(PIECE, size - len(part)))
            if not piece:
                return None
            part += piece
        parts.append(bytes(part))
    return parts


def _read_up_to(pipe: int, end: float, most: int) -> bytes:
    """Up to `most` bytes of the pipe, as soon as it holds any; b"" at its end. Raises TimeoutError at time `end`."""
    waiting = select.poll()
    waiting.register(pipe, select.POLLIN)
    if not waiting.poll(max(0.0, end - time.monotonic()) * 1000):
        raise TimeoutError
    return os.read(pipe, most)


def _fate(code: int) -> str:
    """How a child process ended that gave no answer, in words."""
    if code >= 0:
        return f"HDF5's process ended with exit code {code} and without a whole answer"
    if -code in (signal.SIGXCPU, signal.SIGKILL):
        return "HDF5 did not finish with it, or took more memory than twice the file and 256 MB"
    return f"HDF5 crashed on it ({signal.Signals(-code).name})"
