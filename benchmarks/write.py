"""Features from memory to a cache file, against bare writes of the same bytes with the same syncs.

    python benchmarks/write.py

The cache writer takes checksums, locks byte ranges, keeps the order of writes of cache/README.md and marks its rows;
as in an extraction, two threads call it. The bare arm is one thread with `pwrite`, into a file that was reserved in
the same way, and an `fdatasync` after as many blocks as the writer puts into a group. Rows are those of ConvNeXt-T's
four levels at 512x512 pixels, in fp16. Both arms end when all is on the disk. Each file is made anew, which is not
timed; on a disk and in memory (tmpfs). The ratio is the least of what was measured over what is wanted there.
"""

import argparse
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from _bench import Timings, interleave, positive, quartile_text, report
from cache_read import BLOCK, FRAME, LEVELS, make_empty
from numpy.typing import NDArray

from featprobe.cache import WHOLE, CacheWriter, open_cache, verify
from featprobe.cache.writer import GROUP_BYTES
from featprobe.stages.extraction.pipeline import WRITERS

TARGETS = {"disk": 0.9, "memory": 0.8}
KEPT = 2  # blocks of features that are written in turn

Block = dict[str, NDArray[np.uint8]]  # level name -> (BLOCK, row bytes)


def make_blocks() -> list[Block]:
    """Blocks of random bits."""
    rng = np.random.default_rng(0)
    sizes = {level.name: 2 * level.channels * level.cells(FRAME)[0] * level.cells(FRAME)[1] for level in LEVELS}
    return [{n: rng.integers(0, 256, (BLOCK, size), dtype=np.uint8) for n, size in sizes.items()} for _ in range(KEPT)]


def write_rows(path: Path, blocks: list[Block], count: int, threads: int) -> float:
    """Fill a new cache, which is open, with so many blocks; returns the seconds until all is on the disk."""
    make_empty(path, BLOCK * count)
    with CacheWriter(path) as writer, ThreadPoolExecutor(threads) as pool:
        begun = time.perf_counter()
        list(pool.map(lambda i: writer.write(BLOCK * i, blocks[i % KEPT]), range(count)))
    seconds = time.perf_counter() - begun
    if not (open_cache(path).done == WHOLE).all():
        raise RuntimeError("rows are missing")
    return seconds


def write_bare(path: Path, blocks: list[Block], count: int) -> float:
    """Write the same bytes level by level, with a sync a group; returns the seconds until all is on the disk."""
    parts = {name: part.nbytes for name, part in blocks[0].items()}
    group = -(-GROUP_BYTES // sum(parts.values()))  # blocks
    starts = dict(zip(parts, np.cumsum([0, *(size * count for size in parts.values())]).tolist(), strict=False))
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        os.posix_fallocate(handle, 0, sum(parts.values()) * count)
        os.fsync(handle)
        begun = time.perf_counter()
        for i in range(count):
            for name, part in blocks[i % KEPT].items():
                data, offset = part.reshape(-1).data, starts[name] + i * parts[name]
                while data:
                    written = os.pwrite(handle, data, offset)
                    data, offset = data[written:], offset + written
            if (i + 1) % group == 0:
                os.fdatasync(handle)
        os.fsync(handle)
        return time.perf_counter() - begun
    finally:
        os.close(handle)


def measure(parent: Path, blocks: list[Block], count: int, rounds: int) -> Timings:
    """Seconds of each arm below a folder; nothing is left there."""
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        path = Path(folder) / "cache.h5"

        def anew(seconds: float) -> float:
            path.unlink()
            return seconds

        arms = {
            "bare": lambda: anew(write_bare(path, blocks, count)),
            "writer": lambda: anew(write_rows(path, blocks, count, WRITERS)),
            "writer, 1 thread": lambda: anew(write_rows(path, blocks, count, 1)),
        }
        write_rows(path, blocks, KEPT, WRITERS)
        anew(0.0 if all(isinstance(found, int) for found in verify(path)) else damaged())
        return interleave(arms, rounds)


def damaged() -> float:
    raise RuntimeError("the cache that was written is not sound")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=positive, default=8, help=f"of {BLOCK} rows, 94 MB each, that an arm writes")
    parser.add_argument("--rounds", type=positive, default=9)
    parser.add_argument("--disk", type=Path, default=Path.cwd(), help="a folder on a disk. Default: where you stand")
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"), help="a folder in memory (tmpfs)")
    options = parser.parse_args()
    blocks = make_blocks()
    moved = options.blocks * sum(part.nbytes for part in blocks[0].values())
    rows, found = [], {}
    for kind, target in TARGETS.items():
        timings = measure(getattr(options, kind), blocks, options.blocks, options.rounds)
        found[kind] = timings.ratio("bare", "writer")
        rows += [
            {
                "arm": f"{kind}: {arm}",
                "GB/s": f"{moved / timings.median(arm) / 1e9:.2f}",
                "of bare": quartile_text(timings.quartiles("bare", arm)),
                "target": f"{target}" if arm == "writer" else "",
            }
            for arm in timings.seconds
        ]
    ratio = min(found[kind] / target for kind, target in TARGETS.items())
    report("write", ratio, 1.0, rows, **found, bytes_per_round=moved, threads=WRITERS, rounds=options.rounds)


if __name__ == "__main__":
    main()
