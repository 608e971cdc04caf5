"""`kill -9` while features are written: what the file holds afterwards, and what the same command makes of it.

    python benchmarks/kill9.py --kills 50

A child process extracts with a stand-in for a network. From outside, its file's `done` bytes are watched,
and it is killed at a moment drawn evenly over its progress: after so many blocks and a part of the next.
Then the file must open, each row that says it is whole must hold the bytes of an extraction that nobody
disturbed, and the same command again must complete the file to those very bytes. A control writer, which
says `done` before the data, shows that these checks see what they are for. Only the death of a process is
tested, not the loss of power.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import avg_pool2d
from tqdm import tqdm

from featprobe.cache import MISSING, WHOLE, Cache, CacheWriter, read_contents
from featprobe.errors import CacheError
from featprobe.features import Features
from featprobe.levels import FeatureLevel
from featprobe.specs import BackboneSpec, digest
from featprobe.stages.extraction.extract_options import ExtractOptions
from featprobe.stages.extraction.make_cache import extract_with
from featprobe.stages.workspace import Workspace

IMAGES, BLOCK, SIDE = 24, 2, 128  # images of a set, images per block, pixels
BLOCKS = IMAGES // BLOCK
CHANNELS = (192, 384)  # makes a block 1.2 MB, so that writing it takes a share of the time
PAUSE = 0.005  # seconds that the stand-in takes for a block
CONTROL_PAUSE = 0.2  # seconds between a control writer's `done` and its data
MIDWAY_SHARE = 0.8  # of the kills that must meet a file that is neither empty nor complete

CONTEXT = multiprocessing.get_context("forkserver")  # the slow imports are done once, for all children
CONTEXT.set_forkserver_preload(["featprobe.stages.extraction.make_cache"])

RowBytes = Mapping[str, NDArray[np.uint8]]  # level name -> (rows, bytes)


class PoolingBackbone:
    """Stands in for a network: the mean colour of each cell, times the channel's number.

    A feature depends on the pixels of its own cell alone. pause: seconds that a batch takes; gain: a factor
    of every feature; both are the only things that tell two of them apart, and gain alone is in the key.
    """

    mean, std = (0.25, 0.5, 0.75), (1.0, 1.0, 1.0)
    interpolation = "bilinear"
    final_norm = False
    multiple = 8
    sized = False
    identity = "pooling"

    def __init__(self, pause: float = 0.0, gain: float = 1.0, channels: tuple[int, int] = (6, 9)) -> None:
        self.pause, self.gain = pause, gain
        self.spec = BackboneSpec("pooling", "pooling", "random")
        self.identity = self.spec.model
        self.sha256 = digest(["pooling", gain])
        self.levels = (FeatureLevel("stride4", channels[0], 4), FeatureLevel("stride8", channels[1], 8))

    def __call__(self, images: torch.Tensor, content: torch.Tensor | None = None) -> Features:
        time.sleep(self.pause)
        maps = {}
        for level in self.levels:
            cells = avg_pool2d(images, level.stride).repeat(1, level.channels // 3, 1, 1)
            factors = self.gain * (1 + torch.arange(level.channels) // 3)
            maps[level.name] = cells * factors[:, None, None]  # (batch, channels, rows, columns)
        return Features(maps, (images.shape[2], images.shape[3]), content)

    def fit(self, frame: tuple[int, int], sized: bool | None = None) -> None:
        """Any frame will do."""


def write_set(root: Path, count: int, size: tuple[int, int] = (SIDE, SIDE), seed: int = 0) -> Path:
    """Write images/ and masks/ of 8-bit colour noise with a square defect; returns the folder."""
    rng = np.random.default_rng(seed)
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        mask = np.zeros(size, dtype=np.uint8)
        mask[: 1 + i % size[0], : size[1] // 2] = 1
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / "images" / f"part{i:02}.png")
        Image.fromarray(mask).save(root / "masks" / f"part{i:02}.png")
    return root


def run_extraction(root: str, data: str, pause: float, done_first: bool) -> None:
    """What a child does: extract a set into a workspace."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a killed process would leave behind
    if done_first:
        CacheWriter.write = _write_done_first  # type: ignore[method-assign]
        CacheWriter._set_back = lambda *_: None  # type: ignore[method-assign]  # it would take back what is said too early
    workspace = Workspace(root)
    options = ExtractOptions(batch_size=BLOCK, workers=1, quiet=True)
    backbone = PoolingBackbone(pause, channels=CHANNELS)
    extract_with(workspace, backbone, workspace.data_set(data), options, torch.device("cpu"))  # type: ignore[arg-type]


_write_rows = CacheWriter.write


def _write_done_first(writer: CacheWriter, start: int, maps: Mapping[str, NDArray]) -> None:
    rows = len(next(iter(maps.values())))
    writer._put("done", start, np.full(rows, WHOLE, dtype=np.uint8))
    time.sleep(CONTROL_PAUSE)
    _write_rows(writer, start, maps)


def start_child(root: Path, data: Path, *, pause: float = PAUSE, done_first: bool = False) -> BaseProcess:
    """Start an extraction in a process of its own."""
    child = CONTEXT.Process(target=run_extraction, args=(str(root), str(data), pause, done_first))
    child.start()
    return child


def complete(root: Path, data: Path) -> Path:
    """Run an extraction to its end, undisturbed; returns its file."""
    child = start_child(root, data, pause=0.0)
    child.join(120)
    if child.exitcode != 0:
        raise RuntimeError(f"an undisturbed extraction ended with {child.exitcode}")
    return find_file(root)


def find_file(root: Path) -> Path:
    """The one cache file of a workspace."""
    (path,) = root.glob("cache/*/*.h5")
    return path


def row_bytes(cache: Cache) -> RowBytes:
    """All features of a cache as bytes."""
    rows = {
        level.name: [cache.stored(i, level)[level.name].tobytes() for i in range(len(cache))] for level in cache.levels
    }
    return {name: np.stack([np.frombuffer(row, dtype=np.uint8) for row in parts]) for name, parts in rows.items()}


def watch(root: Path, child: BaseProcess, rows: int) -> Cache:
    """Wait until a child's file has so many rows that say they are whole; returns the file."""
    deadline = time.monotonic() + 60
    while not any(root.glob("cache/*/*.h5")):
        _wait(child, deadline)
    cache = Cache(find_file(root), read_contents(find_file(root)))
    while (cache.done != MISSING).sum() < rows:
        _wait(child, deadline)
    return cache


def _wait(child: BaseProcess, deadline: float) -> None:
    if child.exitcode not in (None, 0) or time.monotonic() > deadline:
        raise RuntimeError(f"the extraction came to a halt (exit code {child.exitcode})")
    time.sleep(0.0003)


def kill_at(root: Path, data: Path, rows: int, delay: float, *, done_first: bool = False) -> int:
    """Kill an extraction `delay` seconds after so many rows were whole; returns how many said so in the end."""
    child = start_child(root, data, done_first=done_first)
    cache = watch(root, child, rows)
    time.sleep(delay)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    return int((cache.done != MISSING).sum())


def block_seconds(root: Path, data: Path) -> float:
    """Seconds that one block takes an extraction that nobody disturbs."""
    child = start_child(root, data)
    watch(root, child, BLOCK)
    begun = time.perf_counter()
    watch(root, child, IMAGES)
    seconds = time.perf_counter() - begun
    child.join()
    return seconds / (BLOCKS - 1)


def faults_of(path: Path, whole: RowBytes) -> list[str]:
    """What is wrong with a file after a kill; whole: the features of an undisturbed extraction."""
    try:
        contents = read_contents(path)
    except CacheError as error:
        return [f"does not open: {error}"]
    cache = Cache(path, contents)
    found = [] if contents.is_intact() else ["rows or targets are damaged"]
    checksums, held = cache.stored_checksums(), row_bytes(cache)
    for row in np.flatnonzero(cache.done == WHOLE):
        for column, level in enumerate(cache.levels):
            if not np.array_equal(held[level.name][row], whole[level.name][row]):
                found.append(f"row {row} says it is whole, and its {level.name} is not")
            elif checksums[row, column] != xxhash.xxh3_64_intdigest(whole[level.name][row]):
                found.append(f"row {row} has another checksum than its {level.name}")
    return found


def is_torn(path: Path) -> bool:
    """Whether a row that does not say it is whole holds some features all the same: died while writing it."""
    cache = Cache(path, read_contents(path))
    missing = cache.done == MISSING
    return any(bool(rows[missing].any()) for rows in row_bytes(cache).values())


@dataclass(frozen=True)
class Kill:
    """One kill: at which block (a fraction: within it), rows whole then, data of other rows, faults then and later."""

    block: float
    rows: int
    torn: bool
    faults: tuple[str, ...]
    faults_after: tuple[str, ...]

    @property
    def midway(self) -> bool:
        """Whether it met a file neither empty nor complete."""
        return 0 < self.rows < IMAGES

    @property
    def good(self) -> bool:
        """Whether nothing was wrong, neither at once nor after the same command again."""
        return not self.faults and not self.faults_after


def kill_and_resume(root: Path, data: Path, whole: RowBytes, block: float, seconds: float) -> Kill:
    """Kill an extraction within a block that takes so many seconds, look at what is left, run it again, look again."""
    rows = kill_at(root, data, int(block) * BLOCK, block % 1 * seconds)
    path = find_file(root)
    faults, torn = faults_of(path, whole), is_torn(path)
    complete(root, data)
    after = faults_of(path, whole)
    if not (Cache(path, read_contents(path)).done == WHOLE).all():
        after.append("the file is not complete")
    shutil.rmtree(root)
    return Kill(block, rows, torn, tuple(faults), tuple(after))


def draw_blocks(count: int, seed: int) -> list[float]:
    """Where to kill, from the first block's end to the last's: one from each of `count` equal parts."""
    rng = random.Random(seed)
    return [1 + (BLOCKS - 1) * (i + rng.random()) / count for i in range(count)]


def run_kills(folder: Path, count: int, seed: int = 0) -> list[Kill]:
    """Kill as many extractions, each into its own workspace below a folder."""
    data = write_set(folder / "set", IMAGES, (SIDE, SIDE))
    whole = whole_rows(folder, data)
    seconds = block_seconds(folder / "timed", data)
    blocks = draw_blocks(count, seed)
    return [kill_and_resume(folder / f"kill{i}", data, whole, b, seconds) for i, b in enumerate(blocks)]


def run_controls(folder: Path, count: int) -> list[list[str]]:
    """Faults found after killing writers that say `done` before they write the data."""
    data = write_set(folder / "set", IMAGES, (SIDE, SIDE))
    whole = whole_rows(folder, data)
    found = []
    for i in range(count):
        root = folder / f"control{i}"
        kill_at(root, data, (1 + i % (BLOCKS - 1)) * BLOCK, CONTROL_PAUSE / 4, done_first=True)
        found.append(faults_of(find_file(root), whole))
    return found


def whole_rows(folder: Path, data: Path) -> RowBytes:
    """The features of an extraction that nobody disturbed."""
    path = complete(folder / "undisturbed", data)
    return row_bytes(Cache(path, read_contents(path)))


def print_table(kills: Sequence[Kill], controls: Sequence[Sequence[str]]) -> None:
    """What the kills left, by how far the file was."""
    print(f"{'rows whole':>12} {'kills':>6} {'half a block':>13} {'sound at once':>14} {'completed bit-exactly':>22}")
    step = IMAGES // 4
    for low in range(0, IMAGES + 1, step):
        part = [kill for kill in kills if low <= kill.rows < low + step]
        if part:
            torn, sound = sum(kill.torn for kill in part), sum(not kill.faults for kill in part)
            after = sum(not kill.faults_after for kill in part)
            print(f"{f'{low}-{min(low + step - 1, IMAGES)}':>12} {len(part):>6} {torn:>13} {sound:>14} {after:>22}")
    print(f"control, `done` before the data: {sum(map(bool, controls))} of {len(controls)} kills found out")
    for kill in kills:
        for fault in (*kill.faults, *kill.faults_after):
            print(f"  killed at block {kill.block:.2f}: {fault}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--controls", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to write; the disk that is to be tested")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        kills = run_kills(Path(folder), options.kills, options.seed)
        controls = run_controls(Path(folder), options.controls)
    print_table(kills, controls)
    ratio = sum(k.good for k in kills) / len(kills)
    midway = sum(k.midway for k in kills) / len(kills)
    caught = sum(map(bool, controls))
    result = {
        "name": "kill9",
        "ratio": ratio,
        "target": 1.0,
        "holds": ratio >= 1.0 and midway >= MIDWAY_SHARE and caught == len(controls),
        "kills": len(kills),
        "midway": midway,
        "half_written": sum(k.torn for k in kills),
        "controls": len(controls),
        "controls_caught": caught,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
