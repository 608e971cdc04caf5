"""What `inspect` computes from the records of 10,000 images with 50 calls each, in time and memory.

    python benchmarks/inspection.py

Records are drawn and written as defects.parquet: half of the images in each split, parts of five images, a defect in
every fourth image. A process of its own then reads the file and computes all that an inspection shows but the
probability of detection: the operating point on validation, and on test its counts, the curve with its band per image
and per part, recall by size, and the verdicts of parts. `ratio` is the least of allowed over measured, of bytes and
of seconds: those of the processor, with starting Python, because other load does not lengthen them.
"""

import argparse
import json
import resource
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
HEAD = "0" * 64
PART = 5  # images of a part


def drawn(images: int, calls: int, seed: int = 0) -> Records:
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
    about = About("semseg", "linear", HEAD, ("background", "crack"), FoundRule(), 0.05, "validation", True)
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


def inspect(folder: Path) -> None:
    """Everything, with the seconds of each step; the last line is a JSON object."""
    seconds: dict[str, float] = {}

    def step(name: str, work: Callable[[], object]) -> object:
        begun = time.process_time()
        made = work()
        seconds[name] = time.process_time() - begun
        return made

    records = step("reading", lambda: read_records(folder, HEAD))
    assert isinstance(records, Records)
    val, test = (records.of(split).with_least_area(4) for split in ("val", "test"))
    t = step("operating point", lambda: choose(val, Wanted("false_calls", 0.05, "part"), 4).threshold)
    step("counts", lambda: (counts_at(val, t), counts_at(test, t), recall_of(test, t)))
    step("FROC per image, band", lambda: froc(test))
    step("FROC per part, band", lambda: froc(test, "part"))
    step("recall by size", lambda: [recall_by_size(test, t, size, unit) for size in SIZES for unit in ("px", "mm")])
    step("parts", lambda: part_verdicts(test, t))
    own = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"steps": seconds, "bytes": 1024 * own.ru_maxrss, "processor": own.ru_utime + own.ru_stime}))


def main() -> None:
    """Print the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=positive, default=10_000, help="of both splits (default 10000)")
    parser.add_argument("--calls", type=positive, default=50, help="per image (default 50)")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        return inspect(arguments.inside)
    with tempfile.TemporaryDirectory() as folder:
        records = drawn(arguments.images, arguments.calls)
        write_records(Path(folder) / "defects.parquet", records)
        size = (Path(folder) / "defects.parquet").stat().st_size
        begun = time.perf_counter()
        child = subprocess.run(
            [sys.executable, __file__, "--inside", folder], check=True, capture_output=True, text=True
        )
        whole = time.perf_counter() - begun
    found = json.loads(child.stdout.splitlines()[-1])
    print_table([{"step": name, "seconds": f"{own:.2f}"} for name, own in found["steps"].items()])
    print()
    report(
        "inspection",
        min(SECONDS / found["processor"], BYTES / found["bytes"]),
        1,
        [
            {"": "seconds of the processor", "measured": f"{found['processor']:.1f}", "allowed": f"{SECONDS:.0f}"},
            {"": "seconds by the clock", "measured": f"{whole:.1f}", "allowed": ""},
            {"": "peak memory, MB", "measured": f"{found['bytes'] / 1e6:.0f}", "allowed": f"{BYTES / 1e6:.0f}"},
            {"": "defects.parquet, MB", "measured": f"{size / 1e6:.0f}", "allowed": ""},
        ],
        seconds=found["processor"],
        clock=whole,
        bytes=found["bytes"],
        images=len(records.images),
        calls=len(records.calls),
        defects=len(records.defects),
    )


if __name__ == "__main__":
    main()
