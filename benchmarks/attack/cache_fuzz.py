"""Mutated cache files: what becomes of whoever opens them.

    python benchmarks/attack/cache_fuzz.py --trials 20000 --version 3
    python benchmarks/attack/cache_fuzz.py --trials 2000 --version 1 --keep found/

Each trial mutates a complete, sound cache and, in a forked child, describes it, opens it, reads it in both ways, uses
its labels and verifies it. The caches are those of tests/archives, of version 1 (whole images) and 2 (tiles), or both
copied into version 3. Some kinds of mutation seal the file anew, as anybody can: then what it says of its rows may be
another, but features must still be those of the file.

Must be 0: `crash` (a signal), `traceback` (no FeatprobeError), `hang` (2 s of a processor in the process that opens the
file, or 2 minutes in all), `memory` (more than twice the file and 256 MB) and `wrong` (rows or labels that differ from
the truth, and that neither open_cache nor verify minds). `found late` counts rows that are served wrong and that only
`verify` finds. Prints JSON.
"""

import argparse
import collections
import hashlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featprobe.cache import WHOLE, legacy, open_cache, read_contents, verify
from featprobe.cache.row_reader import RowReader
from featprobe.errors import FeatprobeError
from featprobe.stages.upkeep.caches import describe_cache, upgrade_cache

ARCHIVES = Path(__file__).parents[2] / "tests" / "archives"
SOUND = {1: ("images-8775eda",), 2: ("tiles-9f0d5d9", "views-8775eda"), 3: ("images-8775eda", "tiles-9f0d5d9")}
"""Version -> the archives whose caches are mutated; those of version 3 are copied into it first."""
CPU_SECONDS = 2  # of a trial, which takes about 0.02
WALL_SECONDS = 120
HANGS = {signal.SIGPROF: "hang", signal.SIGALRM: "hang by the clock"}  # which runs while the process is stopped, too
SPARE = 256 << 20  # bytes of memory beside twice the file
SIGNS = (b"OHDR", b"TREE", b"HEAP", b"SNOD", b"GCOL", b"OCHK")  # what HDF5 puts before its own bookkeeping
NASTY = (0, 1, 2, 0x7F, 0xFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, 4096)
NUMBERS = (-1, 0, 1, 3, 2**31, 2**40, 2**63, 10**30, 1.5, -0.0, 1e308)
LISTS: tuple[Any, ...] = ([], {}, [[]], [-1], [2**40, 2], {"a": 1})
VALUES = (None, True, *NUMBERS, "", "x", "../x", "<u8", "u1", "\x1b[8m", *LISTS)
FIXED = struct.Struct("<8sII32s")
BAD = ("crash", "traceback", "hang", "memory", "wrong")


@dataclass(frozen=True)
class Sound:
    """A file that is sound, and what is where in it.

    free: bytes that are no features; features: the rest. signs: where HDF5 has bookkeeping. states: of done, checksum
    and reason. front: bytes at the front that say where all else is. texts: what is JSON or text.
    """

    path: Path
    whole: bytes
    truth: dict[str, Any]
    free: Sequence[int]
    features: Sequence[int]
    signs: Sequence[int]
    states: Sequence[range]
    front: Sequence[range]
    texts: Sequence[range]
    sealed: bool


def look_at(path: Path) -> Sound:
    """A sound file as mutations need it."""
    contents, whole = read_contents(path), path.read_bytes()
    spans = {n: range(e.offset, e.offset + e.row_bytes * e.rows) for n, e in contents.extents.items()}
    inside = np.zeros(len(whole), bool)
    for name, span in spans.items():
        inside[span.start : span.stop] |= name.startswith("features/")
    signs = [i for sign in SIGNS for i in range(0, len(whole), 8) if whole[i : i + 4] == sign]
    front, texts = [range(96)], []
    if contents.version == 3:
        header = header_of(whole)
        size = FIXED.unpack_from(whole)[2]
        front = [range(FIXED.size), range(FIXED.size + size), range(header["user_block"], header["user_block"] + 96)]
        texts = [range(FIXED.size, FIXED.size + size)]
        texts += [
            range(p["offset"], p["offset"] + p["bytes"]) for p in map(header["parts"].get, ("texts", "provenance"))
        ]
    return Sound(
        path=path,
        whole=whole,
        truth=served(path),
        free=np.flatnonzero(~inside).tolist(),
        features=np.flatnonzero(inside).tolist(),
        signs=signs or [0],
        states=[spans[name] for name in ("done", "checksum", "reason")],
        front=front,
        texts=texts,
        sealed=contents.version == 3,
    )


# Mutations


def flip(data: bytearray, rng: random.Random, sound: Sound) -> None:
    """Some bytes are others."""
    for _ in range(rng.choice((1, 1, 2, 4, 16, 64))):
        data[rng.choice(sound.free)] = rng.randrange(256)


def front(data: bytearray, rng: random.Random, sound: Sound) -> None:
    """Bytes at the front of the file, of the header or of HDF5's superblock."""
    for _ in range(rng.choice((1, 2, 4))):
        data[rng.choice(rng.choice(sound.front))] = rng.randrange(256)


def head(data: bytearray, rng: random.Random, sound: Sound) -> None:
    """Bytes of HDF5's bookkeeping."""
    base = rng.choice(sound.signs)
    for _ in range(rng.choice((1, 2, 4))):
        data[min(len(data) - 1, base + rng.randrange(256))] = rng.choice((0, 1, 0xFF, rng.randrange(256)))


def word(data: bytearray, rng: random.Random, sound: Sound) -> None:
    """A number that readers may stumble over."""
    size = rng.choice((1, 2, 4, 8))
    place = min(rng.choice(sound.free), len(data) - 8) // size * size
    value = rng.choice((*NASTY, len(data), len(data) - 1))
    data[place : place + size] = (value % (1 << 8 * size)).to_bytes(size, "little")


def swap(data: bytearray, rng: random.Random, sound: Sound) -> None:
    """Two words change places."""
    a, b = (rng.choice(sound.free) // 8 * 8 for _ in range(2))
    if max(a, b) + 8 <= len(data):
        data[a : a + 8], data[b : b + 8] = data[b : b + 8], data[a : a + 8]


def copy(data: bytearray, rng: random.Random, sound: Sound) -> None:
    """Bytes lie over others."""
    a, b = rng.choice(sound.free), rng.choice(sound.free)
    size = min(rng.choice((16, 64, 512, 4096)), len(data) - a, len(data) - b)
    data[b : b + size] = data[a : a + size]


def cut(data: bytearray, rng: random.Random, sound: Sound) -> None:
    """The file ends early."""
    del data[rng.randrange(len(data)) :]


def grow(data: bytearray, rng: random.Random, sound: Sound) -> None:
    """The file goes on behind its end."""
    data += bytes(rng.randrange(1, 9000))


def text(data: bytearray, rng: random.Random, sound: Sound) -> None:
    """Characters of what is text are others."""
    for _ in range(rng.choice((1, 1, 3))):
        if sound.texts and rng.random() < 0.7:
            places = list(rng.choice(sound.texts))
        else:
            places = [i for i in (rng.choice(sound.free) for _ in range(400)) if 32 < data[i] < 127]
        if places:
            data[rng.choice(places)] = rng.choice(b'0123456789-.eE"\\{}[],:\x00\x1b<\xff ')


def zero(data: bytearray, rng: random.Random, sound: Sound) -> None:
    """A stretch is zeros or ones, as of a sector that was lost."""
    start = rng.choice(sound.free)
    size = min(rng.choice((8, 64, 512, 4096)), len(data) - start)
    data[start : start + size] = bytes([rng.choice((0, 0xFF))]) * size


def feature(data: bytearray, rng: random.Random, sound: Sound) -> None:
    """A bit of a feature."""
    data[rng.choice(sound.features)] ^= 1 << rng.randrange(8)


def state(data: bytearray, rng: random.Random, sound: Sound) -> None:
    """What says whether a row is whole, and its checksums, and a change elsewhere."""
    data[rng.choice(rng.choice(sound.states))] = rng.randrange(256)


def values(data: bytearray, rng: random.Random, sound: Sound) -> None:
    """The header says something else, under a hash that holds."""
    header = header_of(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        change_value(header, rng)
    seal(header, data)


def letters(data: bytearray, rng: random.Random, sound: Sound) -> None:
    """Characters of the header's JSON are others, under a hash that holds."""
    size = FIXED.unpack_from(data)[2]
    for _ in range(rng.choice((1, 1, 3, 10))):
        data[FIXED.size + rng.randrange(size)] = rng.choice(b'0123456789-.eE"\\{}[],:\x00\x1b<\xff ')
    seal(bytes(data[FIXED.size : FIXED.size + size]), data)


def parts(data: bytearray, rng: random.Random, sound: Sound) -> None:
    """A part that is written once says something else, under hashes that hold."""
    header = header_of(data)
    name = rng.choice(("texts", "texts", "provenance", *header["parts"]))
    entry = header["parts"][name]
    blob = bytearray(data[entry["offset"] : entry["offset"] + entry["bytes"]])
    if name in ("texts", "provenance"):
        said = json.loads(blob)
        for _ in range(rng.choice((1, 1, 2, 4))):
            change_value(said, rng)
        blob = bytearray(json.dumps(said).encode())
    else:
        for _ in range(rng.choice((1, 2, 8))):
            if blob:
                place, size = rng.randrange(len(blob)), rng.choice((1, 4, 8))
                blob[place : place + size] = (rng.choice(NASTY) % (1 << 8 * size)).to_bytes(size, "little")
    data += bytes(-len(data) % 4096) + blob
    entry |= {"offset": len(data) - len(blob), "bytes": len(blob), "sha256": hashlib.sha256(blob).hexdigest()}
    entry["shape"] = [len(blob)] if entry["dtype"] == "u1" else entry["shape"]
    seal(header, data)


PLAIN = (flip, front, head, word, swap, copy, cut, grow, text, zero, feature, state)
SEALED = (values, letters, parts)
KINDS: dict[str, Callable[[bytearray, random.Random, Sound], None]] = {kind.__name__: kind for kind in PLAIN + SEALED}


def change_value(tree: Any, rng: random.Random) -> None:
    """One value somewhere in a JSON tree is another, is gone, or stands for a neighbour."""
    places = list(places_of(tree))
    if not places:
        return
    holder, key = rng.choice(places)
    how = rng.random()
    if how < 0.6:
        holder[key] = rng.choice(VALUES)
    elif how < 0.75 and type(holder[key]) is int:
        holder[key] += rng.choice((-4096, -1, 1, 8, 4096))
    elif how < 0.85:
        del holder[key]
    else:
        other, from_ = rng.choice(places)
        with suppress(KeyError, IndexError):  # it is gone already
            holder[key] = json.loads(json.dumps(other[from_]))


def places_of(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every holder and key of a JSON tree."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], (dict, list)):
            yield from places_of(tree[key])


def header_of(data: bytes | bytearray) -> dict[str, Any]:
    """The JSON of a header of version 3."""
    found: dict[str, Any] = json.loads(data[FIXED.size : FIXED.size + FIXED.unpack_from(data)[2]])
    return found


def seal(header: Any, data: bytearray) -> None:
    """Put a header in front of a file, under an identity, a key and a sha256 that hold as far as they can."""
    if isinstance(header, dict):
        with suppress(KeyError, TypeError, AttributeError):
            own = {k: v for k, v in header["recipe"].items() if k != "label"}
            header["recipe_key"] = digest(own)
            kept = {n: [p["dtype"], p["shape"], p["sha256"]] for n, p in header["parts"].items() if n != "provenance"}
            said = {name: header[name] for name in ("recipe", "rows", "images")} | {"parts": kept}
            header["identity_sha256"] = digest(said)
    body = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    start = struct.pack("<8sII", b"\x89fpcach\n", 3, len(body))
    whole = start + hashlib.sha256(start + body).digest() + body
    data[: len(whole)] = whole


def digest(value: Any) -> str:
    """sha256 of JSON in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# A trial


def served(path: Path) -> dict[str, Any]:
    """All that a reader gets of a file: who rows are, features of whole rows, labels."""
    cache = open_cache(path)
    rows = np.flatnonzero(cache.done == WHOLE)
    out: dict[str, Any] = {
        "rows": [
            (r.id, r.group, r.split, r.image, r.image_hash, r.placement, r.part, r.image_index) for r in cache.rows
        ],
        "labels": [(r.semantic, r.instances) for r in (*cache.rows, *cache.images)],
        "recipe": cache.recipe,
        "data": cache.data,
    }
    for mode in ("memmap", "preadv"):
        with RowReader(cache, mode=mode) as reader:
            got = {level.name: np.empty((len(rows), reader.row_bytes(level)), np.uint8) for level in cache.levels}
            reader.read(rows, got)
        out[mode] = {
            name: {int(row): value.tobytes() for row, value in zip(rows, read, strict=True)}
            for name, read in got.items()
        }
    for i in range(len(cache)):
        for take in (cache.semantic, cache.instances):
            with suppress(FeatprobeError):  # no such label, or none that can be read
                take(i)
    return out


def take(path: Path, truth: dict[str, Any], resealed: bool) -> str:
    """How a mutated file is taken."""
    with suppress(FeatprobeError):
        json.dumps(describe_cache(path), default=str)
    now = None
    with suppress(FeatprobeError):
        now = served(path)
    try:
        found: list[Any] = [item for item in verify(path) if not isinstance(item, int)]
    except FeatprobeError:
        found = ["refused"]
    if now is None:
        return "refused"
    same = resealed or all(now[name] == truth[name] for name in ("rows", "labels", "recipe", "data"))
    for mode in ("memmap", "preadv"):
        for level in now[mode].keys() & truth[mode].keys():
            known = truth[mode][level]
            same &= all(known.get(row) == value for row, value in now[mode][level].items())
    fewer = len(next(iter(now["memmap"].values()))) < len(next(iter(truth["memmap"].values())))
    return ("right, rows missing" if fewer else "right") if same else "found late" if found else "wrong"


def run(trials: Iterator[int], prepare: Callable[[int], tuple[str, Sound]], path: Path, pipe: int) -> None:
    """In a forked child: trials one after another, a line each, until one of them ends the process."""
    page = resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    legacy.SETTLED_SECONDS = 0.0  # a file stays as it is while it is looked at
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    for trial in trials:
        kind, sound = prepare(trial)
        with open("/proc/self/statm", encoding="ascii") as stream:
            held = int(stream.read().split()[0]) * page
        resource.setrlimit(resource.RLIMIT_AS, (held + 2 * path.stat().st_size + SPARE, hard))
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # then the process ends
        signal.alarm(WALL_SECONDS)
        os.write(pipe, f"{trial}\t{kind}\t".encode())
        try:
            verdict = take(path, sound.truth, kind in {kind.__name__ for kind in SEALED})
        except MemoryError:
            verdict = "memory"
        except BaseException as error:
            frames = traceback.extract_tb(error.__traceback__)
            last = [f for f in frames if "featprobe" in f.filename and "cache_fuzz" not in f.filename]
            where = f"{Path(last[-1].filename).name}:{last[-1].name}" if last else "?"
            verdict = f"traceback {type(error).__name__} in {where}: {str(error)[:80]!r}"
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        os.write(pipe, f"{verdict}\n".encode())


def fuzz(
    sounds: Sequence[Sound], trials: range, seed: int, kinds: Sequence[str], seconds: float, keep: Path | None
) -> dict[str, Any]:
    """Counts of how mutated files were taken, and examples of what must not be."""
    counts: collections.Counter[str] = collections.Counter()
    total: collections.Counter[str] = collections.Counter()
    examples: dict[str, list[int]] = {}
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    path = folder / "cache.h5"

    def prepare(trial: int) -> tuple[str, Sound]:
        rng = random.Random(f"{seed} {trial}")
        sound, kind = rng.choice(list(sounds)), rng.choice(list(kinds))
        data = bytearray(sound.whole)
        KINDS[kind](data, rng, sound)
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        return kind, sound

    trial, end = trials.start, time.monotonic() + seconds
    while trial < trials.stop and time.monotonic() < end:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            left = itertools.takewhile(lambda _: time.monotonic() < end, range(trial, trials.stop))
            run(left, prepare, path, write)
            os._exit(0)
        os.close(write)
        ended = False
        with os.fdopen(read, errors="replace") as stream:
            for line in stream:
                number, kind, told = line.rstrip("\n").split("\t", 2)
                ended = not line.endswith("\n")
                if ended:
                    code = os.waitpid(pid, 0)[1]
                    by = os.WTERMSIG(code)
                    told = HANGS.get(by, f"crash {by}")
                trial = int(number) + 1
                short = told.split(":")[0] if told.startswith("traceback") else told
                counts[f"{kind} | {short}"] += 1
                total[short if short.startswith(("right", "found")) else short.split()[0]] += 1
                if told.split()[0] in BAD:
                    seen = examples.setdefault(f"{kind} | {told}", [])
                    if len(seen) < 3:
                        seen.append(int(number))
                if ended:
                    break
        if not ended:
            os.waitpid(pid, 0)
    for number in {number for seen in examples.values() for number in seen} if keep else ():
        prepare(number)
        keep.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, keep / f"{seed}-{number}.h5")
    shutil.rmtree(folder)
    return {
        "trials": sum(counts.values()),
        "bad": sum(total[name] for name in BAD),
        "total": dict(total),
        "by kind": dict(sorted(counts.items())),
        "examples": examples,
    }


def sound_files(version: int, folder: Path) -> list[Sound]:
    """The sound files of a version, copied into a folder."""
    found = []
    for name in SOUND[version]:
        (source,) = ARCHIVES.glob(f"{name}/cache/*/*.h5")
        path = folder / f"{name}.h5"
        shutil.copy(source, path)
        if version == 3:
            upgrade_cache(path, quiet=True)
        found.append(look_at(path))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", type=int, choices=(1, 2, 3), default=3, help="of the files")
    parser.add_argument("--cache", type=Path, help="a complete, sound cache to mutate instead")
    parser.add_argument("--trials", type=int, default=20000)
    parser.add_argument("--first", type=int, default=0, help="trial to begin with, to look at one again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", help=f"of mutations, separated by commas: {','.join(KINDS)}")
    parser.add_argument("--seconds", type=float, default=1e9, help="end after so long, whatever --trials says")
    parser.add_argument("--keep", type=Path, help="a folder for some files that did what must not be")
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        sounds = [look_at(asked.cache)] if asked.cache else sound_files(asked.version, folder)
        usual = PLAIN + (SEALED if sounds[0].sealed else ())
        kinds = asked.kinds.split(",") if asked.kinds else [kind.__name__ for kind in usual]
        trials = range(asked.first, asked.first + asked.trials)
        result = fuzz(sounds, trials, asked.seed, kinds, asked.seconds, asked.keep)
    finally:
        shutil.rmtree(folder)
    print(json.dumps({"name": "cache_fuzz", "version": asked.version, "seed": asked.seed, **result}, indent=1))
    sys.exit(3 if result["bad"] else 0)


if __name__ == "__main__":
    main()
