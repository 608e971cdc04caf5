"""operating.json: the operating point of a head, beside it. Format: probes/README.md."""

import json
from dataclasses import asdict, dataclass, fields
from math import nan
from pathlib import Path
from typing import Literal

import numpy as np

from featprobe.errors import FieldError, FileKindError, ProbeError, UsageError
from featprobe.io.disk import below, read_json, write_whole
from featprobe.io.fields import Fault, limits, made, plain
from featprobe.metrics.defects.froc import Per
from featprobe.metrics.defects.operating import Counts, Kind, OperatingPoint, Wanted

OPERATING = "operating.json"
FORMAT, VERSION = "featprobe-operating-point", 1
LARGEST = 1 << 20  # bytes


@dataclass(frozen=True)
class _Wanted:
    """`Wanted` as JSON has it: None for nan."""

    kind: Kind
    rate: float | None
    per: Per
    miss: float | None
    call: float | None

    @property
    def value(self) -> Wanted:
        """Raises UsageError for values out of their limits."""
        rate, miss, call = (nan if own is None else own for own in (self.rate, self.miss, self.call))
        return Wanted(self.kind, rate, self.per, miss, call)


@dataclass(frozen=True)
class _File:
    """What the file holds. base: None for nan."""

    format: Literal["featprobe-operating-point"]
    version: Literal[1]
    head_sha256: str
    threshold: float
    base: float | None
    least_area: int
    wanted: _Wanted
    validation: Counts
    sure: bool
    needed: int

    def faults(self) -> list[Fault]:
        """The faults of values out of their limits, or in conflict with each other."""
        counts, base, threshold = self.validation, self.base, self.threshold
        lowest = base is None or _narrow(base) <= threshold
        found = limits({
            "threshold": (_fits(threshold), "a number of the format float32", threshold),
            "base": (lowest, f"a number of at most the threshold, {threshold:.9g}", base),
            "least_area": (self.least_area >= 1, "1 pixel or more", self.least_area),
            "needed": (self.needed >= 1, "1 or more", self.needed),
        })  # fmt: skip
        negative = [own.name for own in fields(Counts) if own.name != "threshold" and getattr(counts, own.name) < 0]
        own_limits = {
            "threshold": (counts.threshold == threshold, f"that of the file, {threshold:.9g}", counts.threshold),
            "found": (counts.found <= counts.defects, f"at most {counts.defects}, its defects", counts.found),
            "false_calls": (
                counts.false_calls <= counts.calls,
                f"at most {counts.calls}, its calls",
                counts.false_calls,
            ),
            **{name: (False, "0 or more", getattr(counts, name)) for name in negative},
        }
        found += [fault.below("validation") for fault in limits(own_limits)]
        try:
            _ = self.wanted.value
        except UsageError as error:
            found.append(Fault(("wanted",), str(error)))
        return found


def write_point(folder: Path, head_sha256: str, point: OperatingPoint) -> None:
    """Write the operating point of a head beside it, in place of another. Raises DiskError.

    head_sha256: the hash of its head.safetensors, as its card has it.
    """
    said = {"format": FORMAT, "version": VERSION, "head_sha256": head_sha256, **asdict(point)}
    write_whole(folder / OPERATING, json.dumps(plain(said), indent=1, allow_nan=False) + "\n")


def read_point(folder: Path, head_sha256: str) -> OperatingPoint | None:
    """The operating point that is kept beside a head; None where there is none.

    Raises ProbeError for a file that can't be used, or that is of another head.
    """
    path = folder / OPERATING
    try:
        kept = made(_File, read_json(below(folder, OPERATING, "The folder of a head"), LARGEST), "It")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError, FileKindError, FieldError) as error:
        fault = error.strerror if isinstance(error, OSError) and error.strerror else str(error).rstrip(".")
        raise ProbeError(f"{path} can't be used. Nothing was computed.\n  {fault}\n{_to_do(folder)}") from error
    if kept.head_sha256 != head_sha256:
        raise ProbeError(
            f"{path} is of another head than lies beside it. Nothing was computed.\n"
            f"  wanted  sha256 {head_sha256[:16]}…\n  found   sha256 {kept.head_sha256[:16]}…\n{_to_do(folder)}"
        )
    base = nan if kept.base is None else kept.base
    return OperatingPoint(
        kept.threshold, base, kept.least_area, kept.wanted.value, kept.validation, kept.sure, kept.needed
    )


def _to_do(folder: Path) -> str:
    return (
        f"Choose it again:  featprobe inspect {folder} --false-calls 0.1\n"
        f"or remove it, and the usual thresholds count:  rm {folder / OPERATING}"
    )


def _narrow(value: float) -> float:
    """A number as float32 has it; inf for one that is too large."""
    with np.errstate(over="ignore"):
        return float(np.float32(value))


def _fits(value: float) -> bool:
    """Whether float32 holds a number."""
    return _narrow(value) == value
