"""From image file to a buffer that is used again, as extraction does it, against the bare decoding by Pillow.

    python benchmarks/decode.py

Images that need no resizing are decoded by two threads each way, in turn: by Pillow into a new array, and by the
product into the places of a batch's buffer, from where they cross to the device. Before that both must give the same
levels. The ratio is that of the kind of file that gains least.

Python's lock is measured apart, by sixteen threads whose decoder only waits, for as long as a core needs for a JPEG. Of
the images per second that they could reach, `lock` is the share that Python leaves them, however many cores there are.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from _bench import interleave, positive, quartile_text, report, timed
from data import pillow
from extract import texture
from PIL import Image

from featprobe.datasets.images import decode
from featprobe.datasets.images.reading import header_of, read_levels
from featprobe.geometry import place
from featprobe.specs import FeatureRecipe
from featprobe.stages.extraction.frames import Framing, ImageBuffer, ImageKind

TARGET = 0.9
THREADS = 2
CPU = torch.device("cpu")
KINDS = ("rgb.jpg", "deep.png")
MANY, WAIT = 16, 0.0018  # threads, and seconds for a JPEG


def write(folder: Path, kind: str, count: int, side: int) -> list[Path]:
    """Write so many images of a kind: colour JPEGs of quality 95, or 16-bit grey PNGs."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{i:03}-{kind}" for i in range(count)]
    for path in paths:
        surface = texture(rng, side)
        if kind == "rgb.jpg":
            Image.fromarray(surface).save(path, quality=95)
        else:
            noise = rng.integers(0, 64, (side, side), dtype=np.uint16)  # a detector's
            Image.fromarray(surface[:, :, 0].astype(np.uint16) * 180 + noise).save(path)
    return paths


class Batches:
    """Decodes batches of images of one kind and size into one buffer."""

    def __init__(self, paths: Sequence[Path], side: int, batch_size: int) -> None:
        self.batch_size, self.placement = batch_size, place((side, side), (side, side), "resize", 32)
        recipe = FeatureRecipe(
            label="none", backbone="none", weights_sha256="", levels=(), final_norm=False, size=(side, side),
            frame=self.placement.frame, fit="resize", intensity="none", window=None, mean=(0.0,) * 3, std=(1.0,) * 3,
            interpolation="bicubic", dtype="fp16",
        )  # fmt: skip
        self.framing = Framing(recipe, CPU)
        self.layout = self.framing.layout([ImageKind.of(header_of(paths[0]), self.placement)])
        self.buffer = ImageBuffer(batch_size, self.layout.image_bytes(recipe.frame), CPU)

    def decode(self, path: Path, k: int) -> None:
        """Decode an image into place k."""
        levels = read_levels(path, self.framing.place_of(self.buffer, k, self.placement))
        self.framing.put(self.buffer, k, levels, self.placement)

    def run(self, paths: Sequence[Path], pool: ThreadPoolExecutor) -> None:
        """Decode all, each into the next place, from the last on into the first again."""
        self.buffer.begin(self.batch_size, self.layout, self.placement.frame)
        list(pool.map(self.decode, paths, (i % self.batch_size for i in range(len(paths)))))

    def check(self, paths: Sequence[Path], pool: ThreadPoolExecutor) -> None:
        """Raise RuntimeError where the buffer holds other levels than Pillow gives."""
        self.run(paths[: self.batch_size], pool)
        for own, path in zip(self.buffer.levels, paths, strict=False):
            if not np.array_equal(own.squeeze(), pillow(path)):
                raise RuntimeError(f"{path.name}: the buffer holds other levels than Pillow gives")


def lock_share(batches: Batches, paths: Sequence[Path], rounds: int) -> float:
    """Images per second of many threads whose decoder only waits, over what they could reach: median of the rounds."""

    def waiting(_: bytes, out: Any) -> Any:
        time.sleep(WAIT)
        return out

    libraries, decode.imagecodecs = decode.imagecodecs, SimpleNamespace(jpeg8_decode=waiting, png_decode=waiting)  # type: ignore[assignment]
    try:
        with ThreadPoolExecutor(MANY) as pool:
            run = timed(lambda: batches.run(paths, pool))
            return WAIT / MANY / float(np.median([run() for _ in range(rounds + 1)][1:])) * len(paths)
    finally:
        decode.imagecodecs = libraries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=positive, default=64, help="of each kind")
    parser.add_argument("--size", type=positive, default=512, help="of the square images, pixels")
    parser.add_argument("--batch-size", type=positive, default=16)
    parser.add_argument("--rounds", type=positive, default=9)
    options = parser.parse_args()
    if options.size % 32:
        parser.error("--size must be a multiple of 32, for images that need no padding")
    rows, ratios, speeds, lock = [], {}, {}, {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(THREADS) as pool:
        for kind in KINDS:
            paths = write(Path(folder), kind, options.images, options.size)
            batches = Batches(paths, options.size, options.batch_size)
            batches.check(paths, pool)
            arms = {
                "bare": timed(lambda paths=paths: list(pool.map(pillow, paths))),  # type: ignore[misc]
                "ours": timed(lambda paths=paths, batches=batches: batches.run(paths, pool)),  # type: ignore[misc]
            }
            timings = interleave(arms, options.rounds)
            ratios[kind], speeds[kind] = timings.ratio("bare", "ours"), options.images / timings.median("ours")
            lock[kind] = lock_share(batches, paths * 4, options.rounds)
            rows.append(
                {
                    "file": kind,
                    "Pillow, images/s": f"{options.images / timings.median('bare'):.0f}",
                    "into the buffer, images/s": f"{speeds[kind]:.0f}",
                    "of Pillow": quartile_text(timings.quartiles("bare", "ours")),
                    "lock": f"{lock[kind]:.2f}",
                }
            )
    report("decode", min(ratios.values()), TARGET, rows, ratios=ratios, images_per_second=speeds, lock=lock,
           threads=THREADS, images=options.images, size=options.size, rounds=options.rounds)  # fmt: skip


if __name__ == "__main__":
    main()
