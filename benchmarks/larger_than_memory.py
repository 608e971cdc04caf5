"""Random rows of a cache of twice the memory that a process may use, against raw reads of the same disk.

    python benchmarks/larger_than_memory.py
    systemd-run --scope -p MemoryMax=1500M python benchmarks/larger_than_memory.py

A cache of ConvNeXt-T's levels at 512x512 pixels, random bits, is made twice as large as --memory. Another process,
which may take that much beside its libraries (RLIMIT_DATA; or less where its control group leaves less), takes random
batches from a FeatureLoader, which chooses by itself how to read, in turn with raw O_DIRECT reads of as many rows of
each level, by one thread and by as many as the loader has; `ratio` is against the faster. `first pass` hashes each row,
too. What the process holds in memory is sampled meanwhile. Before the clock starts, both must bring the same
bytes.
"""

import argparse
import json
import mmap
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from _bench import interleave, positive, print_table, quartile_text

TARGET = 0.8
FLAT = 16 * 2**20  # bytes, at most, that the second half of a run may hold beyond the first
SAMPLED = 0.05  # seconds between two looks at what it holds
ALIGNMENT = 4096
Span = tuple[int, int, int]
"""Of a row of a level: aligned offset in the file, aligned length, where the row begins in it. Bytes."""


class RawDisk:
    """Reads spans of a file past the page cache, each into the same memory."""

    def __init__(self, path: Path, most: int, threads: int) -> None:
        self.handle = os.open(path, os.O_RDONLY | os.O_DIRECT)
        self.buffers = [mmap.mmap(-1, most) for _ in range(threads)]
        self.pool = ThreadPoolExecutor(threads)

    def read(self, span: Span, buffer: mmap.mmap) -> None:
        """Read one span to the start of a buffer."""
        offset, length, _ = span
        held = 0
        while held < length and (count := os.preadv(self.handle, [memoryview(buffer)[held:length]], offset + held)):
            held += count

    def read_all(self, spans: list[Span], threads: int) -> None:
        """Read spans by some threads, each its share of them."""

        def share(index: int) -> None:
            for span in spans[index::threads]:
                self.read(span, self.buffers[index])

        list(self.pool.map(share, range(threads)))


def memory_held() -> int:
    """Bytes that this process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@contextmanager
def sampled() -> Iterator[list[int]]:
    """A list that fills with what the process holds in memory."""
    held, ended = list[int](), threading.Event()

    def look() -> None:
        while not ended.wait(SAMPLED):
            held.append(memory_held())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    yield held
    ended.set()
    thread.join()


def limit_memory(more: int) -> None:
    """Let this process take so many bytes beside those that it has."""
    lines = Path("/proc/self/status").read_text().splitlines()
    taken = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (taken + more, taken + more))


def measure(path: Path, options: argparse.Namespace) -> dict[str, object]:
    """What a process finds that may not hold the cache in memory; raises RuntimeError where it could."""
    from featprobe.cache import open_cache, store
    from featprobe.cache.reader import READERS, FeatureLoader
    from featprobe.cache.row_reader import choose_mode
    from featprobe.machine import available_memory

    limit_memory(options.memory * 2**20)
    cache = open_cache(path)
    size, may, mode = cache.recipe.row_bytes * len(cache), available_memory(), choose_mode(cache, cache.levels)
    if size < 2 * may or mode == "memmap":
        raise RuntimeError(f"The cache has {size} bytes, {may} may be used, and it is read by {mode}: no such case.")
    extents = [cache.contents.extents[f"features/{level.name}"] for level in cache.levels]
    orders = np.random.default_rng(1)

    def spans(rows: list[int]) -> list[Span]:
        starts = [(extent.offset + row * extent.row_bytes, extent.row_bytes) for row in rows for extent in extents]
        below = [start % ALIGNMENT for start, _ in starts]
        return [
            (start - under, -(-(under + count) // ALIGNMENT) * ALIGNMENT, under)
            for (start, count), under in zip(starts, below, strict=True)
        ]

    disk = RawDisk(path, (max(extent.row_bytes for extent in extents) // ALIGNMENT + 2) * ALIGNMENT, READERS)

    def raw_arm(threads: int) -> Callable[[], float]:
        def arm() -> float:
            wanted = spans(orders.permutation(len(cache))[: options.rows].tolist())
            begun = time.perf_counter()
            disk.read_all(wanted, threads)
            return time.perf_counter() - begun

        return arm

    def loader_arm(*, first: bool) -> Callable[[], float]:
        def arm() -> float:
            store._hashed(cache).fill(not first)
            rows = orders.permutation(len(cache))[: options.rows]
            begun = time.perf_counter()
            for _ in loader.batches(rows[i : i + options.batch_size] for i in range(0, len(rows), options.batch_size)):
                pass
            return time.perf_counter() - begun

        return arm

    with FeatureLoader(cache) as loader:
        for rows, features in loader.batches([np.arange(options.batch_size)]):
            brought = [m[i].numpy().tobytes() for i in range(len(rows)) for m in features.maps.values()]
            for own, span in zip(brought, spans(rows.tolist()), strict=True):
                disk.read(span, disk.buffers[0])
                if disk.buffers[0][span[2] : span[2] + len(own)] != own:
                    raise RuntimeError("the loader brings other bytes than a raw read")
        raws = {"raw": raw_arm(1), f"raw, {READERS} threads": raw_arm(READERS)}
        arms = {**raws, "loader": loader_arm(first=False), "first pass": loader_arm(first=True)}
        with sampled() as held:
            timings = interleave(arms, options.rounds)
    best = min(raws, key=timings.median)
    moved = options.rows * cache.recipe.row_bytes
    print_table([
        {
            "arm": name,
            "GB/s": f"{moved / timings.median(name) / 1e9:.2f}",
            f"of {best}": quartile_text(timings.quartiles(best, name)),
        }
        for name in arms
    ])  # fmt: skip
    ratio, half = timings.ratio(best, "loader"), len(held) // 2
    grown = max(held[half:]) - max(held[:half])
    return {
        "name": "larger_than_memory", "ratio": ratio, "target": TARGET, "holds": ratio >= TARGET and grown <= FLAT,
        "cpus": os.cpu_count(), "first_pass": timings.ratio(best, "first pass"),
        "of_one_thread": timings.ratio("raw", "loader"), "mode": mode, "cache_bytes": size, "may_use_bytes": may,
        "held_bytes": max(held), "grown_bytes": grown, "raw_bytes_per_second": moved / timings.median(best),
        "rounds": options.rounds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", type=positive, default=1024, help="MiB that the process may take")
    parser.add_argument("--rows", type=positive, default=96, help="6 MB each, that an arm reads in a round")
    parser.add_argument("--batch-size", type=positive, default=8)
    parser.add_argument("--rounds", type=positive, default=11)
    parser.add_argument("--folder", type=Path, help="where to write; the disk that is to be tested")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        found = measure(options.measure, options)
        print(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in found.items()}))
        return
    from cache_read import FRAME, LEVELS, write_cache

    row_bytes = sum(2 * level.channels * level.cells(FRAME)[0] * level.cells(FRAME)[1] for level in LEVELS)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = write_cache(Path(folder) / "features.h5", -(-2 * options.memory * 2**20 // row_bytes)).path
        sys.exit(subprocess.run([sys.executable, __file__, *sys.argv[1:], "--measure", str(path)]).returncode)


if __name__ == "__main__":
    main()
