"""A loss of power while features are written: what the disk could hold afterwards, and what is made of it.

    python benchmarks/power_loss.py --states 1000

One extraction is recorded: every write, every sync, every change of a name, on a disk whose syncs are slow, so that
groups of several blocks form. Then states are built that a loss of power at a random moment could have left. Of what
was written to a file and not brought to the disk by a sync that began later, any sector may be old or new; of names
that changed since their folder was synced, any may be lost. In each state the file, where it has its name, must open,
and each row that says it is whole must hold the bytes of an undisturbed extraction; in some, the same command again
must complete it to those very bytes. A control whose `fdatasync` does nothing shows that these checks see what they
are for. What a disk does that lies about syncs is not shown.
"""

import argparse
import json
import os
import random
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from _bench import positive
from kill9 import BLOCK, IMAGES, PoolingBackbone, RowBytes, faults_of, find_file, row_bytes, write_set

from featprobe.cache import WHOLE, Cache, CacheWriter, read_contents
from featprobe.cache import writer as writer_module
from featprobe.stages.extraction.extract_options import ExtractOptions
from featprobe.stages.extraction.make_cache import extract_with
from featprobe.stages.workspace import Workspace

SECTOR = 512  # bytes that a disk writes whole or not at all
SYNC_SECONDS = 0.01
SIDE = 32  # of the images, pixels
RERUN_SHARE = 0.2  # of the states in which the same command is run again
DEAD = 1 << 22  # above every process's number


@dataclass(frozen=True)
class Write:
    """Bytes that came to a file."""

    inode: int
    offset: int
    data: bytes


@dataclass(frozen=True)
class Sync:
    """A file is on the disk as far as it was written before event `begun`; content: of a file written in other ways."""

    inode: int
    begun: int
    content: bytes | None


@dataclass(frozen=True)
class Name:
    """A path now means an inode, or nothing."""

    path: Path
    inode: int | None


@dataclass(frozen=True)
class FolderSync:
    """The names in a folder are on the disk."""

    path: Path


@dataclass
class Recording:
    """What an extraction did to the files below a folder, in order; groups: rows that each mark called whole."""

    folder: Path
    events: list[Write | Sync | Name | FolderSync] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)

    def add(self, event: Write | Sync | Name | FolderSync) -> None:
        with self.lock:
            self.events.append(event)

    def known(self, inode: int) -> bool:
        """Whether a file was synced before: from then on it is written by positioned writes alone."""
        return any(isinstance(event, Sync) and event.inode == inode for event in self.events)


@contextmanager
def recorded(folder: Path, syncs: bool = True) -> Iterator[Recording]:
    """Record what happens to the files below a folder. syncs: else `fdatasync` does nothing, which is the control."""
    result = Recording(folder.resolve())
    write, put = writer_module.write_some, CacheWriter._put
    real = {name: getattr(os, name) for name in ("fsync", "fdatasync", "link", "unlink", "replace")}

    def inside(path: Any) -> bool:
        return Path(os.path.abspath(path)).is_relative_to(result.folder)

    def writing(handle: int, data: memoryview, offset: int) -> int:
        count = write(handle, data, offset)
        result.add(Write(os.fstat(handle).st_ino, offset, bytes(data[:count])))
        return count

    def syncing(name: str) -> Callable[[int], None]:
        def call(handle: int) -> None:
            path, begun = Path(os.readlink(f"/proc/self/fd/{handle}")), len(result.events)
            real[name](handle)
            time.sleep(SYNC_SECONDS)
            if inside(path):
                inode = os.fstat(handle).st_ino
                content = None if path.is_dir() or result.known(inode) else path.read_bytes()
                result.add(FolderSync(path) if path.is_dir() else Sync(inode, begun, content))

        return call

    def link(source: Any, target: Any) -> None:
        real["link"](source, target)
        if inside(target):
            result.add(Name(Path(os.path.abspath(target)), os.stat(target).st_ino))

    def replace(source: Any, target: Any) -> None:
        real["replace"](source, target)
        if inside(target):
            result.add(Name(Path(os.path.abspath(target)), os.stat(target).st_ino))
            result.add(Name(Path(os.path.abspath(source)), None))

    def unlink(path: Any, **how: Any) -> None:
        real["unlink"](path, **how)
        if not how.get("dir_fd") and inside(path):
            result.add(Name(Path(os.path.abspath(path)), None))

    def putting(writer: CacheWriter, name: str, row: int, data: Any) -> None:
        put(writer, name, row, data)
        if name == "done":
            result.groups.append(int((data == WHOLE).sum()))

    with ExitStack() as stack:
        for target, name, value in (
            (writer_module, "write_some", writing),
            (writer_module, "sync", syncing("fdatasync") if syncs else lambda handle: time.sleep(SYNC_SECONDS)),
            (CacheWriter, "_put", putting),
            (os, "fsync", syncing("fsync")),
            (os, "link", link),
            (os, "replace", replace),
            (os, "unlink", unlink),
        ):
            stack.enter_context(patch.object(target, name, value))
        yield result


def extract(root: Path, data: Path) -> Path:
    """Run an extraction with a stand-in for a network, in this process; returns its file."""
    workspace = Workspace(root)
    options = ExtractOptions(batch_size=BLOCK, workers=1, quiet=True)
    backbone: Any = PoolingBackbone()
    extract_with(workspace, backbone, workspace.data_set(str(data)), options, torch.device("cpu"))
    return find_file(root)


def left_by_a_loss(recording: Recording, upto: int, rng: random.Random) -> dict[Path, bytes]:
    """The files, by path, of one state that a loss of power after so many events could leave."""
    contents: dict[int, bytearray] = {}
    waiting: dict[int, list[tuple[int, Write]]] = defaultdict(list)  # by file: written, and perhaps not on the disk
    names: dict[Path, list[int | None]] = defaultdict(list)  # what each path has meant since its folder was synced
    meaning: dict[Path, int | None] = {}
    for number, event in enumerate(recording.events[:upto]):
        if isinstance(event, Write):
            waiting[event.inode].append((number, event))
        elif isinstance(event, Name):
            names[event.path].append(event.inode)
        elif isinstance(event, FolderSync):
            for path in [path for path in names if path.parent == event.path]:
                meaning[path] = names.pop(path)[-1]
        else:
            if event.content is not None:
                contents[event.inode] = bytearray(event.content)
            for begun, write in waiting[event.inode]:
                if begun < event.begun:
                    contents[event.inode][write.offset : write.offset + len(write.data)] = write.data
            waiting[event.inode] = [pair for pair in waiting[event.inode] if pair[0] >= event.begun]
    for path, options in names.items():
        meaning[path] = rng.choice([meaning.get(path), *options])
    for inode, writes in waiting.items():
        if inode in contents:
            _lose_some(contents[inode], [write for _, write in writes], rng)
    return {path: bytes(contents.get(inode, b"")) for path, inode in meaning.items() if inode is not None}


def _lose_some(content: bytearray, writes: Sequence[Write], rng: random.Random) -> None:
    """Let some of what waits for the disk reach it: some sectors, some writes, or all but a few and the end."""
    how = rng.choice(("sectors", "writes", "most"))
    for number, write in enumerate(writes):
        last = number == len(writes) - 1
        if (how == "writes" and rng.random() < 0.5) or (how == "most" and not last and rng.random() < 0.2):
            continue
        end = write.offset + len(write.data)
        for sector in range(write.offset // SECTOR, -(-end // SECTOR)):
            low, high = max(write.offset, sector * SECTOR), min(end, (sector + 1) * SECTOR)
            if (how == "writes" or (how == "most" and not last)) or rng.random() < 0.5:
                content[low:high] = write.data[low - write.offset : high - write.offset]


@dataclass(frozen=True)
class Found:
    """What the states showed: how many had what, and the first faults of each kind."""

    counts: Counter[str]
    faults: Mapping[str, str]


def try_states(folder: Path, recording: Recording, data: Path, whole: RowBytes, states: int, seed: int) -> Found:
    """Build so many states and look at each."""
    rng, counts = random.Random(seed), Counter({"no file": 0, "right": 0, "wrong": 0, "again": 0, "not the same": 0})
    faults: dict[str, str] = {}
    made = find_file(recording.folder).relative_to(recording.folder)
    for state in range(states):
        upto = rng.randrange(len(recording.events) + 1)
        root = folder / f"state{state}"
        for path, content in left_by_a_loss(recording, upto, rng).items():
            place = root / path.relative_to(recording.folder)
            place = place.with_name(place.name.replace(f"-{os.getpid()}-", f"-{DEAD}-"))
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
        again = rng.random() < RERUN_SHARE
        if not (root / made).exists():
            counts["no file"] += 1
        else:
            said = faults_of(root / made, whole)
            counts["wrong" if said else "right"] += 1
            faults |= {"wrong": f"state {state}: {said[0]}"} if said and "wrong" not in faults else {}
        if again:
            counts["again"] += 1
            path = extract(root, data)
            said = faults_of(path, whole)
            said += [] if (Cache(path, read_contents(path)).done == WHOLE).all() else ["rows are missing"]
            said += [f"{name} is left" for name in path.parent.glob(".*.tmp")]
            counts["not the same"] += bool(said)
            faults |= {"not the same": f"state {state}: {said[0]}"} if said and "not the same" not in faults else {}
    return Found(counts, faults)


def run_losses(folder: Path, states: int, seed: int = 0, *, syncs: bool = True) -> tuple[Recording, Found]:
    """Record one extraction below a folder, and look at states that a loss of power could leave of it."""
    data = write_set(folder / "set", IMAGES, (SIDE, SIDE))
    path = extract(folder / "undisturbed", data)
    whole = row_bytes(Cache(path, read_contents(path)))
    with recorded(folder / "recorded", syncs) as recording:
        extract(folder / "recorded", data)
    return recording, try_states(folder, recording, data, whole, states, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--states", type=positive, default=1000)
    parser.add_argument("--controls", type=positive, default=100, help="states of the writer that does not sync")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recording, found = run_losses(Path(folder), options.states, options.seed)
    with tempfile.TemporaryDirectory() as folder:
        _, control = run_losses(Path(folder), options.controls, options.seed, syncs=False)
    for what, result in (("with syncs", found), ("control, without", control)):
        print(f"{what}: " + ", ".join(f"{count} {name}" for name, count in result.counts.items()))
        for fault in result.faults.values():
            print(f"  {fault}")
    good = options.states - found.counts["wrong"] - found.counts["not the same"]
    groups = [rows for rows in recording.groups if rows]
    print(
        json.dumps(
            {
                "name": "power_loss",
                "ratio": good / options.states,
                "target": 1.0,
                "holds": good == options.states and control.counts["wrong"] > 0 and max(groups) > BLOCK,
                **{name.replace(" ", "_"): count for name, count in found.counts.items()},
                "rows_per_group": groups,
                "controls": options.controls,
                "controls_wrong": control.counts["wrong"],
            }
        )
    )


if __name__ == "__main__":
    main()
