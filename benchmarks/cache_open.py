"""Opening a cache of many rows, and listing many caches: seconds, and memory for each row.

    python benchmarks/cache_open.py

A cache of 100,000 whole images, and one of as many tiles, are opened with `open_cache`, in turn with reading and
hashing the bytes of the same parts, which is the least that a reader can do that checks them. Seconds are also given
as those of the processor, for a machine that does other work. Memory is what stays when a cache is open, beside the
characters of its texts. Then `featprobe cache ls` lists 50 caches in a process of its own, in turn with a Python that
imports numpy. The ratio is the least of wanted over measured: 0.5 s, 100 bytes a row, 1 s.
"""

import argparse
import gc
import hashlib
import os
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

from _bench import interleave, positive, report, timed

from featprobe.cache import Row, create_file, open_cache
from featprobe.cache.contents import LABELS
from featprobe.geometry import Part, Placement
from featprobe.levels import FeatureLevel
from featprobe.specs import RECIPE_VERSION, DataInfo, FeatureRecipe

SECONDS, ROW_BYTES, LIST_SECONDS = 0.5, 100.0, 1.0  # at most: to open, to keep of a row, to list
CACHES = 50
SIDE, PER_IMAGE = 32, 20  # pixels of a frame; tiles of an image
LABEL = b'{"image_id":1,"objects":[{"category":1,"box_xyxy":[1,2,3,4],"rle":null,"crowd":false,"area":4}]}'
LS = "from featprobe.cli.main import main; import sys; main(sys.argv[1:])"


def recipe_of(tile: int | None) -> FeatureRecipe:
    """One level of two bytes a row."""
    return FeatureRecipe(
        label="some", backbone="some", weights_sha256="0" * 64, levels=(FeatureLevel("stride32", 1, 32),),
        final_norm=False, size=(SIDE, SIDE), frame=(SIDE, SIDE), fit="letterbox", intensity="none", window=None,
        mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", dtype="fp16", tile=tile,
        version=RECIPE_VERSION if tile else 1,
    )  # fmt: skip


def row_of(name: str, number: int, placement: Placement, part: Part | None = None) -> Row:
    """A row of an image, or the image itself, whose texts are as long as those of a real set."""
    split, image = ("train", "val", "test")[number % 3], f"images/casting{number:06}.png"
    index = -1 if part is None else number
    return Row(
        name, f"part{number // 4}", split, image, f"{number:032x}", placement, b"", LABEL, part=part, image_index=index
    )


def make(path: Path, count: int, tiles: bool) -> None:
    """A cache without features, of whole images, or of tiles that are PER_IMAGE to an image."""
    frame, wide = (SIDE, SIDE), (SIDE, SIDE * PER_IMAGE)
    place, whole = Placement(frame, frame, frame), Placement(wide, wide, wide)
    if tiles:
        parts = [(i // PER_IMAGE, Part(SIDE * (i % PER_IMAGE), 0, SIDE, SIDE)) for i in range(count)]
        rows = [row_of(f"casting{k:06}.png@{part.left},0", k, place, part) for k, part in parts]
        images = [row_of(f"casting{k:06}.png", k, whole) for k in range(parts[-1][0] + 1)]
    else:
        rows, images = [row_of(f"casting{i:06}.png", i, place) for i in range(count)], []
    data = DataInfo("parts", "parts", ("background", "defect"), ("detect",), "f" * 64)
    create_file(path, recipe_of(SIDE if tiles else None), data, rows, {"command": "featprobe extract"}, images)


def reading_parts(path: Path) -> Callable[[], object]:
    """Reads and hashes what is read and hashed when a cache is opened, and nothing else."""
    parts = open_cache(path).contents.index.parts
    places = [(entry.offset, entry.size) for name, entry in parts.items() if name not in LABELS]

    def read() -> None:
        with path.open("rb") as stream:
            for offset, size in places:
                stream.seek(offset)
                hashlib.sha256(stream.read(size)).digest()

    return read


def cpu_seconds(work: Callable[[], object]) -> float:
    """Seconds of the processor that a piece of work takes, here and in processes that it waits for."""
    begun = os.times()
    work()
    return sum(os.times()[:4]) - sum(begun[:4])


def kept_bytes(path: Path) -> float:
    """Bytes of memory that an open cache keeps for each row, beside the characters of its texts."""
    gc.collect()
    tracemalloc.start()
    cache = open_cache(path)
    gc.collect()
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    tables = [cache.rows, *([cache.images] if cache.recipe.in_parts else [])]
    characters = sum(len("".join(table.column(name))) for table in tables for name in table.texts)
    return (kept - characters) / len(cache)


def command(code: str, *words: str) -> Callable[[], object]:
    """A process of Python's own; raises where it fails."""
    return lambda: subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=positive, default=100_000)
    parser.add_argument("--rounds", type=positive, default=5)
    options = parser.parse_args()
    table, figures = [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in ("images", "tiles"):
            path = folder / f"{kind}.h5"
            make(path, options.rows, kind == "tiles")
            arms = {"open": timed(lambda p=path: open_cache(p)), "read": timed(reading_parts(path))}
            timings = interleave(arms, options.rounds)
            own = {"seconds": timings.median("open"), "bytes_per_row": kept_bytes(path)}
            own["over_read"] = timings.ratio("open", "read")
            own["cpu_seconds"] = cpu_seconds(lambda p=path: open_cache(p))
            figures |= {f"{kind}_{name}": value for name, value in own.items()}
            table.append(
                {
                    "what": f"{options.rows} {kind}",
                    "seconds": f"{own['seconds']:.3f}",
                    "CPU": f"{own['cpu_seconds']:.2f}",
                    "wanted": f"{SECONDS}",
                    "bytes/row": f"{own['bytes_per_row']:.0f}",
                    "beside": f"{own['over_read']:.1f} x reading and hashing",
                }
            )
        for i in range(CACHES):
            make(folder / "ws" / "cache" / "parts-000000" / f"some-{i:08}.h5", 500, tiles=False)
        ls = command(LS, "--workspace", str(folder / "ws"), "cache", "ls")
        timings = interleave({"ls": timed(ls), "numpy": timed(command("import numpy"))}, options.rounds)
        figures["list_cpu_seconds"] = cpu_seconds(ls)
    figures |= {"list_seconds": timings.median("ls"), "list_over_numpy": timings.ratio("ls", "numpy")}
    table.append(
        {
            "what": f"ls of {CACHES} caches",
            "seconds": f"{figures['list_seconds']:.3f}",
            "CPU": f"{figures['list_cpu_seconds']:.2f}",
            "wanted": f"{LIST_SECONDS}",
            "bytes/row": "",
            "beside": f"{figures['list_over_numpy']:.1f} x importing numpy",
        }
    )
    ratios = [LIST_SECONDS / figures["list_seconds"]]
    ratios += [SECONDS / figures[f"{kind}_seconds"] for kind in ("images", "tiles")]
    ratios += [ROW_BYTES / figures[f"{kind}_bytes_per_row"] for kind in ("images", "tiles")]
    report("cache_open", min(ratios), 1.0, table, cached_rows=options.rows, **figures)


if __name__ == "__main__":
    main()
