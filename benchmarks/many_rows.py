"""What commands cost for each row of a large cache: seconds and memory.

    python benchmarks/many_rows.py

A set of --images pictures of 32x32 pixels with masks, and one of a tenth as many, are extracted (embedded backbone, two
levels). Then each command runs over both, in processes of its own, --rounds times in turn; what it costs per row is the
difference of the medians of the two, in processor seconds and in the peak of its memory, over the difference of their
rows. Beside it stand the whole figures of the large set, and what part of the peak is the process's own, without the
pages of files that it maps (RssAnon, read every 20 ms). The commands are also proved to have looked at all rows.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _bench import positive, report
from PIL import Image

SIDE = 32  # pixels
NETWORK = ("--backbone", "embedded", "--levels", "stride8,stride16")
COMMANDS: Mapping[str, Sequence[str]] = {
    "extract, nothing to do": ("extract", *NETWORK, "--data", "set", "--quiet"),
    "extract --rehash": ("extract", *NETWORK, "--data", "set", "--quiet", "--rehash"),
    "cache verify": ("cache", "verify", "--quiet"),
    "cache ls": ("cache", "ls"),
    "data info": ("data", "info", "set"),
    "probe": ("probe", "--iterations", "100", "--seeds", "1", "--loss-at", "level", "--quiet"),
    "probe --head ridge": ("probe", "--head", "ridge", "--quiet"),
}
ALLOWED = 4096  # bytes of memory for each row, of whichever command takes most
SETTLED = 3.0  # seconds after which files count as unchanged where they have the times that they had
TICK = 0.02  # seconds between two looks at a command's memory
THREADS = {"OMP_NUM_THREADS": "1"}  # whose own memory is not the rows'


@dataclass(frozen=True)
class Cost:
    """Of one run of a command: seconds of the processor and by the clock, and the most bytes that it had in memory.

    own: of them, those of no file.
    """

    cpu: float
    wall: float
    peak: int
    own: int


def write_set(root: Path, count: int) -> None:
    """images/ of noise and masks/ with one square each."""
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for i in range(count):
        top, left = rng.integers(0, SIDE - 8, 2)
        mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
        mask[top : top + 8, left : left + 8] = 1
        pixels = rng.integers(0, 200, (SIDE, SIDE, 3), dtype=np.uint8) + 50 * mask[:, :, None]
        Image.fromarray(pixels).save(root / "images" / f"part{i:06}.png", compress_level=1)
        Image.fromarray(mask).save(root / "masks" / f"part{i:06}.png", compress_level=1)


def run(workspace: Path, words: Sequence[str]) -> tuple[Cost, str]:
    """Run a command in a workspace; what it cost, and what it printed. Raises RuntimeError when it fails."""
    command = [sys.executable, "-m", "featprobe", *words]
    with tempfile.TemporaryFile("w+") as out:
        begun = time.perf_counter()
        process = subprocess.Popen(command, cwd=workspace, stdout=out, stderr=out, env={**os.environ, **THREADS})
        own, ended = 0, 0
        while not ended:
            own = max(own, own_memory(process.pid))
            time.sleep(TICK)
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        wall = time.perf_counter() - begun
        out.seek(0)
        printed = out.read()
    if status:
        raise RuntimeError(f"featprobe {' '.join(words)} ended with {os.waitstatus_to_exitcode(status)}:\n{printed}")
    return Cost(usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss * 1024, own), printed


def own_memory(process: int) -> int:
    """Bytes of a process that are in memory and of no file; 0 where the system does not say."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def make_workspace(root: Path, count: int) -> None:
    """A set and its cache."""
    write_set(root / "set", count)
    time.sleep(SETTLED)
    _, printed = run(root, ["extract", *NETWORK, "--data", "set", "--quiet", "--batch-size", "64"])
    if f"{count} of {count} images computed" not in printed:
        raise RuntimeError(printed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=positive, default=20_000)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--folder", type=Path, help="where to write")
    options = parser.parse_args()
    few, many = options.images // 10, options.images
    costs: dict[tuple[str, int], list[Cost]] = {(name, count): [] for name in COMMANDS for count in (few, many)}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for count in (few, many):
            make_workspace(Path(folder) / str(count), count)
        for _ in range(options.rounds):
            for name, count in costs:
                cost, printed = run(Path(folder) / str(count), COMMANDS[name])
                costs[name, count].append(cost)
                if name in ("extract --rehash", "cache ls") and str(count) not in printed:
                    raise RuntimeError(f"{name} says nothing of {count} rows:\n{printed}")
    rows, per_row, own_per_row = [], {}, {}
    for name in COMMANDS:
        cpu, wall, peak, own = (
            {count: float(np.median([getattr(c, what) for c in costs[name, count]])) for count in (few, many)}
            for what in ("cpu", "wall", "peak", "own")
        )
        per_row[name], own_per_row[name] = ((m[many] - m[few]) / (many - few) for m in (peak, own))
        rows.append({
            "command": name,
            "CPU s": f"{cpu[many]:.1f}",
            "clock s": f"{wall[many]:.1f}",
            "peak MB": f"{peak[many] / 1e6:.0f}",
            "us per row": f"{(cpu[many] - cpu[few]) / (many - few) * 1e6:.0f}",
            "bytes per row": f"{per_row[name]:.0f}",
            "of no file": f"{own_per_row[name]:.0f}",
        })  # fmt: skip
    report("many_rows", ALLOWED / max(per_row.values()), 1.0, rows, images=many, rounds=options.rounds,
           bytes_per_row=per_row, own_bytes_per_row=own_per_row)  # fmt: skip


if __name__ == "__main__":
    main()
