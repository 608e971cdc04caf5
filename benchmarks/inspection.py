"""What `featprobe inspect` takes for a head with records of 10,000 images and 50 calls each, in time and memory.

    python benchmarks/inspection.py

A head is trained for a moment, and records are drawn and written beside it, as defects.parquet: half of the images in
each split, parts of five images, a defect in every fourth image. `featprobe inspect HEAD --false-calls 0.05/part
--min-area 4` then runs in a process of its own. `ratio` is the least of allowed over measured, of its largest memory
and of its seconds: those of the processor, because other load does not lengthen them. Another process says how long
the steps take.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from _bench import positive, print_table, report

from featprobe.metrics.defects.froc import froc
from featprobe.metrics.defects.operating import Wanted, choose, counts_at
from featprobe.metrics.defects.part_verdicts import part_verdicts
from featprobe.metrics.defects.recall_by_size import recall_by_size, recall_of
from featprobe.metrics.defects.records import (
    DEFECT,
    GOOD,
    NOTHING,
    SIZES,
    TOUCHES,
    About,
    Calls,
    Defects,
    FoundRule,
    Images,
    Records,
    found_scores,
)
from featprobe.stages.recording.record_file import read_records, write_records

SECONDS, BYTES = 5.0, 1e9  # allowed
PART = 5  # images of a part


def trained(root: Path) -> Path:
    """The folder of a head of a workspace."""
    from featprobe import ExtractOptions, ProbeOptions, Workspace, extract, probe
    from featprobe.stages.workspace import make_generated

    workspace = Workspace(root)
    make_generated("surface", workspace.data / "surface", images=24, size=(64, 64))
    extract(
        workspace, workspace.backbone("embedded"), "surface", ExtractOptions(quiet=True, device="cpu", size=(64, 64))
    )
    asked = ProbeOptions(head="ridge", seeds=1, quiet=True, device="cpu")
    (row,) = probe(workspace, "semseg", ["surface"], (), asked).rows
    return workspace.probes / row["folder"]


def drawn(images: int, calls: int, head_sha256: str, seed: int = 0) -> Records:
    """Records of a head that finds most defects."""
    rng = np.random.default_rng(seed)
    held = np.flatnonzero(rng.random(images) < 0.25)
    of_defect = np.sort(rng.choice(held, 2 * len(held)))
    of_call = np.repeat(np.arange(images), calls)
    score = rng.beta(1, 6, len(of_call)).astype(np.float32)
    found = np.flatnonzero(rng.random(len(of_defect)) < 0.9)
    by_call = of_defect[found] * calls + rng.integers(0, calls, len(found))
    score[by_call] = rng.beta(4, 2, len(found))
    finds = np.unique(np.stack([by_call, found], axis=1), axis=0)
    touched = np.full(len(of_call), NOTHING, dtype=np.uint8)
    touched[by_call] = TOUCHES
    good = np.full(images, GOOD, dtype=np.uint8)
    good[of_defect] = DEFECT
    ids = tuple(f"line2/part{i // PART:05}/view{i % PART}" for i in range(images))
    about = About("semseg", "ridge", head_sha256, ("background", "crack"), FoundRule(), 0.05, "validation", True)
    return Records(
        about,
        Images(
            ids,
            tuple(f"line2/part{i // PART:05}" for i in range(images)),
            tuple("val" if i < images // 2 else "test" for i in range(images)),
            tuple(f"{name}.png" for name in ids),
            tuple(f"{i:064x}" for i in range(images)),
            good,
            np.full(images, np.nan, dtype=np.float32),
            np.full((images, 2), 0.1, dtype=np.float32),
            np.full((images, 2), 1024),
        ),
        Defects(
            **objects(rng, of_defect),
            score=found_scores(finds, score, len(of_defect)),
            contrast=rng.random(len(of_defect), dtype=np.float32),
            cut=np.zeros(len(of_defect), dtype=bool),
        ),
        Calls(**objects(rng, of_call), score=score, touched=touched),
        finds,
    )


def objects(rng: np.random.Generator, image: np.ndarray) -> dict[str, np.ndarray]:
    """What defects and calls share, with sizes over six octaves."""
    side = np.exp2(rng.uniform(1, 7, len(image))).astype(np.float32)
    area = np.ceil(side) ** 2
    pixels = np.stack([np.sqrt(area), area, 1.5 * side, side / 1.5], axis=1).astype(np.float32)
    x, y = rng.uniform(0, 900, (2, len(image)))
    return {
        "image": image,
        "category": np.ones(len(image), dtype=np.uint8),
        "boxes": np.stack([x, y, x + side, y + side], axis=1).astype(np.float32),
        "pixels": pixels,
        "millimetres": (pixels * np.array([0.1, 0.01, 0.1, 0.1])).astype(np.float32),
    }


def prepare(root: Path, images: int, calls: int) -> None:
    """A head with its records; the last line is a JSON object."""
    folder = trained(root)
    records = drawn(images, calls, sha256_of(folder))
    write_records(folder / "defects.parquet", records)
    counts = {"images": len(records.images), "calls": len(records.calls), "defects": len(records.defects)}
    print(json.dumps({"folder": str(folder), "file_bytes": (folder / "defects.parquet").stat().st_size, **counts}))


def steps(folder: Path) -> None:
    """The seconds of each step, as a JSON object in the last line."""
    seconds: dict[str, float] = {}

    def step(name: str, work: Callable[[], object]) -> object:
        begun = time.process_time()
        made = work()
        seconds[name] = time.process_time() - begun
        return made

    records = step("reading", lambda: read_records(folder, sha256_of(folder)))
    assert isinstance(records, Records)
    val, test = (records.of(split).with_least_area(4) for split in ("val", "test"))
    t = step("operating point", lambda: choose(val, Wanted("false_calls", 0.05, "part"), 4).threshold)
    step("counts", lambda: (counts_at(val, t), counts_at(test, t), recall_of(test, t)))
    step("FROC per image, band", lambda: froc(test))
    step("FROC per part, band", lambda: froc(test, "part"))
    step("recall by size", lambda: [recall_by_size(test, t, size, unit) for size in SIZES for unit in ("px", "mm")])
    step("parts", lambda: part_verdicts(test, t))
    print(json.dumps(seconds))


def sha256_of(folder: Path) -> str:
    """The hash of a head, as its card has it."""
    return str(json.loads((folder / "card.json").read_text())["head_sha256"])


def run(*command: object) -> tuple[str, float, float, float]:
    """Output, seconds by the clock and of the processor, and bytes of memory of a process."""
    begun = time.perf_counter()
    child = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    said = child.stdout.read()
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{command} ended with exit code {child.returncode}")
    return said, time.perf_counter() - begun, used.ru_utime + used.ru_stime, 1024.0 * used.ru_maxrss


def main() -> None:
    """Print the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=positive, default=10_000, help="of both splits (default 10000)")
    parser.add_argument("--calls", type=positive, default=50, help="per image (default 50)")
    parser.add_argument("--steps", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.steps:
        return steps(given.steps)
    if given.prepare:
        return prepare(given.prepare, given.images, given.calls)
    with tempfile.TemporaryDirectory() as root:
        # in a process of its own: what this one has held would count as memory of those that it starts
        told, *_ = run(__file__, "--prepare", root, "--images", given.images, "--calls", given.calls)
        prepared = json.loads(told.splitlines()[-1])
        folder = prepared.pop("folder")
        wanted = "--false-calls", "0.05/part", "--min-area", 4
        _, clock, seconds, memory = run("-m", "featprobe", "--workspace", root, "inspect", folder, *wanted, "--json")
        each = json.loads(run(__file__, "--steps", folder)[0].splitlines()[-1])
    print_table([{"step": name, "seconds": f"{own:.2f}"} for name, own in each.items()])
    print()
    report(
        "inspection",
        min(SECONDS / seconds, BYTES / memory),
        1,
        [
            {"": "seconds of the processor", "measured": f"{seconds:.1f}", "allowed": f"{SECONDS:.0f}"},
            {"": "seconds by the clock", "measured": f"{clock:.1f}", "allowed": ""},
            {"": "largest memory, MB", "measured": f"{memory / 1e6:.0f}", "allowed": f"{BYTES / 1e6:.0f}"},
            {"": "defects.parquet, MB", "measured": f"{prepared['file_bytes'] / 1e6:.0f}", "allowed": ""},
        ],
        seconds=seconds,
        clock=clock,
        bytes=memory,
        **prepared,
    )


if __name__ == "__main__":
    main()
