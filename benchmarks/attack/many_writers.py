"""Sixteen shards on one file, some of them killed.

    python benchmarks/attack/many_writers.py --rounds 10

Each round forks processes that run `extract --shard i/N` at once, kills some with -9 at random and starts them again:
from one process that has imported everything, so that they meet. In every third round the data set changes before, so
that the file is replaced while sixteen want it. Blocks are of one image.

Must be 0: `lost` (rows that are not whole), `wrong` (rows that are not those of one process), `damaged` (verify),
`left` (temporary files) and `failed`. Prints JSON. --data takes a folder of another set than the one that is made.
"""

import argparse
import collections
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm  # noqa: F401  before the forks
import torchvision  # noqa: F401
from PIL import Image

import featprobe.stages.extraction.make_cache  # noqa: F401
from featprobe.cache import WHOLE, open_cache, verify
from featprobe.cli.main import main as featprobe_main

MUST_BE_ZERO = ("lost", "wrong", "damaged", "left", "failed")
KILLED_WITHIN = 12.0  # seconds of a round


def write_set(folder: Path, images: int) -> None:
    """Grey images of 32x32 pixels, and masks."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for i in range(images):
        mask = np.zeros((32, 32), np.uint8)
        mask[i % 24 : i % 24 + 8, 8:16] = 1
        Image.fromarray(rng.integers(0, 256, (32, 32), dtype=np.uint8)).save(folder / "images" / f"part{i}.png")
        Image.fromarray(mask).save(folder / "masks" / f"part{i}.png")


def start(space: Path, data: Path, *rest: str) -> int:
    """A process that extracts."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(space / "errors", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        words = (
            "--backbone",
            "embedded",
            "--data",
            str(data),
            "--size",
            "32x32",
            "--batch-size",
            "1",
            "--workers",
            "1",
        )
        try:
            featprobe_main(["--workspace", str(space), "extract", *words, "--device", "cpu", "--quiet", *rest])
        except SystemExit as end:
            os._exit(end.code if isinstance(end.code, int) else 0)
        except BaseException as error:
            os.write(2, repr(error).encode())
        os._exit(9)
    return pid


def stored(space: Path) -> dict[str, Any]:
    """What the cache of a workspace holds."""
    (path,) = space.glob("cache/*/*.h5")
    cache = open_cache(path)
    rows = [
        hashlib.sha256(
            b"".join(own.tobytes() for level in cache.levels for own in cache.stored(i, level).values())
        ).hexdigest()
        for i in range(len(cache))
    ]
    bad = sum(not isinstance(item, int) for item in verify(path))
    return {"rows": rows, "done": cache.done.tolist(), "bad": bad}


def run_round(
    space: Path, data: Path, writers: int, kills: list[float], changed: bool, rng: random.Random
) -> collections.Counter[str]:
    """Shards at once, some of them killed at these seconds and started again; how often what happened."""
    total: collections.Counter[str] = collections.Counter()
    running = {i: start(space, data, "--shard", f"{i + 1}/{writers}") for i in range(writers)}
    total["starts"] += writers
    begun, kills = time.monotonic(), sorted(kills)
    while running:
        if kills and time.monotonic() - begun > kills[0]:
            kills.pop(0)
            i = rng.choice(list(running))
            os.kill(running[i], signal.SIGKILL)
            os.waitpid(running[i], 0)
            total["kills"] += 1
            total["starts"] += 1
            running[i] = start(space, data, "--shard", f"{i + 1}/{writers}")
        for i, pid in list(running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                busy = changed and os.waitstatus_to_exitcode(status) == 1  # rows are held while the file is replaced
                total["refused while replaced" if busy else "failed"] += status != 0
                del running[i]
                if busy:
                    running[i] = start(space, data, "--shard", f"{i + 1}/{writers}")
        time.sleep(0.01)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder of images in images/; it is copied")
    parser.add_argument("--images", type=int, default=48, help="of the set that is made where --data names none")
    parser.add_argument("--writers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--kills", type=int, default=24, help="in a round")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    root, rng = Path(tempfile.mkdtemp()), random.Random(asked.seed)
    data = root / "set"
    if asked.data:
        shutil.copytree(asked.data, data)
    else:
        write_set(data, asked.images)
    total: collections.Counter[str] = collections.Counter()
    errors = []
    for number in range(asked.rounds):
        single, space = root / f"single{number}", root / f"round{number}"
        single.mkdir()
        space.mkdir()
        changed = number % 3 == 2
        victim = sorted((data / "images").rglob("*.png"))[number % 3]
        content = victim.read_bytes()
        if changed:  # rows of the old set lie there already: the file is to be replaced, and rows copied over
            os.waitpid(start(space, data), 0)
            victim.write_bytes(content + b"\0")
        os.waitpid(start(single, data), 0)
        truth = stored(single)
        kills = [rng.uniform(0.1, KILLED_WITHIN) for _ in range(asked.kills)]
        total += run_round(space, data, asked.writers, kills, changed, rng)
        found = stored(space)
        total["rounds"] += 1
        total["lost"] += sum(state != WHOLE for state in found["done"]) + abs(len(found["rows"]) - len(truth["rows"]))
        total["wrong"] += sum(a != b for a, b in zip(found["rows"], truth["rows"], strict=False))
        total["damaged"] += found["bad"]
        total["left"] += len(list(space.glob("cache/*/.*.tmp")))
        if (space / "errors").stat().st_size:
            errors.append((space / "errors").read_text()[-300:])
        victim.write_bytes(content)
    shutil.rmtree(root)
    counts = {name: total[name] for name in ("rounds", "starts", "kills", *MUST_BE_ZERO)}
    bad = sum(total[name] for name in MUST_BE_ZERO)
    print(json.dumps({"name": "many_writers", "bad": bad, **counts, **total, "errors": errors[:4]}, indent=1))
    sys.exit(3 if bad else 0)


if __name__ == "__main__":
    main()
