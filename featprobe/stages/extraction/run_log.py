"""What runs of an extraction did: the report of one, and the log of all beside a cache, a JSON line per run."""

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
from featprobe.machine import human_bytes

LARGEST_LOG = 1 << 26  # bytes
LONGEST_RUN = 1e10  # seconds, which are three hundred years


@dataclass(frozen=True)
class ExtractReport:
    """The report of an extraction. seconds: load, look, run, and what `run` waited for: images, disk.

    On CUDA the memory that waits for the disk is held while features are computed, too: that time counts there as well.
    And how long each part of `run` would have taken with nothing to wait for: network, decoding, copying (from the
    device, 0 where there is none), writing.
    rows: tiles and views, or else images; images: that they show. by_times: the data set was not read, since its files
    have the sizes and times of last time.
    """

    path: Path
    rows: int
    computed: int
    copied: int
    missing: int
    unreadable: tuple[tuple[str, str], ...]
    bytes_written: int
    seconds: dict[str, float]
    notes: tuple[str, ...]
    device: str
    images: int
    by_times: bool = False

    def __repr__(self) -> str:
        states = {"computed": self.computed, "copied": self.copied, "missing": self.missing}
        said = [f"{count} {state}" for state, count in states.items() if count]
        said += [f"{len(self.unreadable)} unreadable"] if self.unreadable else []
        done = ", ".join(said) or "nothing to do"
        return f"ExtractReport({counted(self.rows, 'row')}: {done}; {str(self.path)!r})"


def speed_text(report: ExtractReport) -> str:
    """The report of an extraction, for a person: counts, speed, and what waited for what."""
    counts = counted(report.rows, "image")
    if report.rows != report.images:
        counts = f"{counted(report.rows, 'part')} of {counted(report.images, 'image')}"
    bad = f", {len(report.unreadable)} unreadable" if report.unreadable else ""
    copied = f"; {report.copied} copied from the cache of the set as it was" if report.copied else ""
    if not report.computed and not report.missing:
        if copied:
            return f"{report.path}: complete ({counts}{bad}); the set changed: written anew, none computed{copied}"
        text = f"{report.path}: complete ({counts}{bad}); nothing to do"
        return f"{text}: files have the sizes and times of last time (--rehash reads them)" if report.by_times else text
    run = report.seconds["run"]
    lines = [
        f"{report.path}: {report.computed} of {counts} computed in {run:.1f} s on {report.device} "
        f"({report.computed / run:.1f} img/s, {human_bytes(report.bytes_written / run)}/s){copied}; "
        f"before that {report.seconds['load']:.1f} s for weights, {report.seconds['look']:.1f} s to look at the data"
    ]
    lines += [_limit_text(report)] if report.computed else []
    if report.missing:
        lines.append(
            f"{counted(report.missing, 'row is', 'rows are')} still missing: other shards make them, "
            "or run this again without --shard."
        )
    return "\n".join(lines)


TIMED = {"network": "the backbone", "decoding": "decoding", "copying": "copying to the host", "writing": "the disk"}


def _limit_text(report: ExtractReport) -> str:
    """The part of an extraction that was its limit, and the rate of each part without waiting."""

    def rate(part: str) -> str:
        seconds = report.seconds[part]
        if part in ("network", "decoding"):
            return f"{TIMED[part]} at {report.computed / seconds:.0f} img/s"
        return f"{TIMED[part]} at {human_bytes(report.bytes_written / seconds)}/s"

    known = sorted((part for part in TIMED if report.seconds[part]), key=lambda part: -report.seconds[part])
    more = "; try more --workers" if known[0] == "decoding" else ""
    return f"The limit was {rate(known[0])}{more}. By themselves: {', '.join(rate(part) for part in known[1:])}."


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
