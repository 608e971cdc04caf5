"""The log of runs beside a cache, a JSON line per run: what extraction cost, and on which device it computed."""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featprobe.cache import WHOLE, Cache, read_contents
from featprobe.errors import FileKindError, counted
from featprobe.io.disk import append_line, parse_json, read_regular

LARGEST_LOG = 1 << 26  # bytes
LONGEST_RUN = 1e10  # seconds, which are three hundred years


def log_path(path: Path) -> Path:
    """The path of the log of a cache file."""
    return path.with_suffix(".runs.jsonl")


def log_run(path: Path, values: Mapping[str, Any]) -> None:
    """Add a run that has just ended to the log of a cache file. values: the fields of its ExtractReport."""
    line = {**values, "path": path.name, "ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    append_line(log_path(path), json.dumps(line).encode())


def extraction_seconds(cache: Cache) -> float | None:
    """Seconds that extraction took over all its runs; None where they were not kept, or not all of them."""
    try:
        lines = read_regular(log_path(cache.path), LARGEST_LOG).splitlines()
        each = [parse_json(line)["seconds"]["run"] for line in lines]
        return sum(each) if all(type(own) in (int, float) and 0 <= own <= LONGEST_RUN for own in each) else None
    except (OSError, ValueError, KeyError, TypeError, FileKindError):  # a kill can tear a line
        return None


@dataclass(frozen=True)
class Doubt:
    """Why a cache of the precision fp32 may hold TF32. on_record: whether a run on CUDA is known, or only possible."""

    text: str
    on_record: bool


def tf32_doubt(path: Path) -> Doubt | None:
    """Why a cache may hold TF32 where its recipe says fp32; None where it doesn't.

    Versions that kept no device in `provenance` allowed TF32 on CUDA. The log of runs beside
    the file says on which device they computed, in one line for each run that ended normally.
    """
    return doubt_of(Cache(path, read_contents(path)))


def doubt_of(cache: Cache) -> Doubt | None:
    """The same for an open cache."""
    contents = cache.contents
    if kept := contents.provenance.get("may_hold_tf32"):
        return Doubt(str(kept), False)
    if contents.recipe.precision != "fp32" or "device" in contents.provenance:
        return None
    runs = _recorded_runs(cache.path)
    on_cuda = sum(run["computed"] for run in runs if str(run["device"]).startswith("cuda"))
    if on_cuda:
        return Doubt(
            f"{counted(on_cuda, 'row')} computed on CUDA by featprobe {contents.provenance['featprobe']}", True
        )
    unknown = int((cache.done == WHOLE).sum()) - sum(run["computed"] for run in runs)
    if unknown > 0:
        return Doubt(f"{counted(unknown, 'row')} that no run recorded, so their device is unknown", False)
    return None


def _recorded_runs(path: Path) -> list[dict[str, Any]]:
    """The runs in the log of a cache, without lines that their process did not finish; [] without a log."""
    try:
        lines = read_regular(log_path(path), LARGEST_LOG).splitlines()
    except (OSError, FileKindError):
        return []
    found = []
    for line in lines:
        with suppress(ValueError):
            found.append(parse_json(line))
    return [run for run in found if isinstance(run, dict) and type(run.get("computed")) is int and "device" in run]
