"""The names of a modality gap: two backbones and two data sets that results are of. Nothing here imports torch."""

from collections.abc import Collection, Sequence
from pathlib import Path

from featprobe.errors import ProbeError, nearest
from featprobe.io.disk import parse_json, read_regular
from featprobe.machine import available_memory

IN_MEMORY = 16  # bytes that a byte of rows takes, about, when they are parsed


def check_gap(gap: Sequence[str], on: Sequence[str], backbones: Collection[str], sets: Collection[str]) -> None:
    """Raise ProbeError for names that make no gap. gap, on: as asked for; backbones, sets: those of the results."""
    if len(set(gap)) != 2 or len(set(on)) != 2:
        raise ProbeError("A modality gap is of two backbones on two data sets. wanted: --gap A,B --on RGBSET,XRAYSET")
    for asked, known, what in ((gap, backbones, "backbone"), (on, sets, "data set")):
        for name in asked:
            if name not in known:
                raise ProbeError(f"There is no result of the {what} {name!r}. {nearest(name, known)}")


def named_in(path: Path) -> tuple[set[str], set[str]]:
    """Backbones and data sets in the lines of results.jsonl, also of rows that no comparison can use."""
    backbones, sets = set[str](), set[str]()
    for line in read_regular(path, available_memory() // IN_MEMORY).split(b"\n") if path.exists() else ():
        try:
            row = parse_json(line)
        except ValueError:
            continue  # the comparison says so
        for key, found in (("backbone", backbones), ("data", sets)):
            if isinstance(row, dict) and isinstance(row.get(key), str):
                found.add(row[key])
    return backbones, sets
