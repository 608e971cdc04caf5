"""From image file to a buffer that is used again, as extraction does it, against the bare decoding by Pillow.

    python benchmarks/decode.py

Images that need no resizing are decoded by two threads each way, in turn: by Pillow into a new array, and by the
product into the places of a batch's buffer, from where they cross to the device. For a GPU the product decodes by
processes that share the buffer; two of them are the third way. Before that all must give the same levels. The ratio is
that of the kind of file that gains least, by threads.

Python's lock is measured apart, by sixteen threads, or processes, whose decoder only waits, for as long as a core needs
for a JPEG. Of the images per second that they could reach, `lock` is the share that the one Python leaves them that all
of them need, however many cores there are.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import _only_wait
import numpy as np
import torch
from _bench import interleave, positive, quartile_text, report, timed
from data import pillow
from extract import texture
from PIL import Image

from featprobe.datasets.images import decode
from featprobe.datasets.images.framing import ImageKind, Wanted
from featprobe.datasets.images.reading import header_of
from featprobe.geometry import place
from featprobe.levels import FeatureLevel
from featprobe.specs import FeatureRecipe
from featprobe.stages.extraction import decoding
from featprobe.stages.extraction.decoding import AHEAD, DecodedAhead, Decoders, processes_decode
from featprobe.stages.extraction.extract_options import ExtractOptions
from featprobe.stages.extraction.frames import Framing, ImageBuffer

TARGET = 0.9
THREADS = 2
HERE = str(Path(__file__).parent)
CPU = torch.device("cpu")
KINDS = ("rgb.jpg", "deep.png")
MANY = 16  # threads or processes


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


def recipe_of(side: int) -> FeatureRecipe:
    """A recipe of square frames that need neither resizing nor padding."""
    return FeatureRecipe(
        label="none", backbone="none", weights_sha256="", levels=(FeatureLevel("none", 32, 1),), final_norm=False,
        size=(side, side), frame=(side, side), fit="resize", intensity="none", window=None, mean=(0.0,) * 3,
        std=(1.0,) * 3, interpolation="bicubic", dtype="fp16",
    )  # fmt: skip


def wanted_of(path: Path, side: int) -> Wanted:
    """A whole image of this size."""
    placement = place((side, side), (side, side), "resize", 32)
    return Wanted(path, placement, (side, side), ImageKind.of(header_of(path), placement))


class Batches:
    """Decodes batches of images of one kind and size into one buffer, by the threads of a pool or by processes."""

    def __init__(
        self, paths: Sequence[Path], side: int, batch_size: int, by: ThreadPoolExecutor | Decoders, device: torch.device
    ) -> None:
        self.batch_size, self.by, self.framing = batch_size, by, Framing(recipe_of(side), device)
        self.wanted = {path: wanted_of(path, side) for path in paths}
        self.layout = self.framing.layout([self.wanted[paths[0]].kind])
        image_bytes = self.layout.image_bytes((side, side))
        if isinstance(by, Decoders):
            (self.buffer,) = by.buffers(self.framing, 1, batch_size, image_bytes)
        else:
            self.buffer = ImageBuffer(batch_size, image_bytes, device)
        self.buffer.begin(batch_size, self.layout, (side, side))

    def run(self, paths: Sequence[Path]) -> None:
        """Decode all, each into the next place, from the last on into the first again."""
        places = [(i % self.batch_size, self.wanted[path]) for i, path in enumerate(paths)]
        if isinstance(self.by, Decoders):
            numbers = [self.by.submit(self.buffer, k, wanted) for k, wanted in places]
            for number in numbers:
                self.by.seconds(number)
        else:
            list(self.by.map(lambda place: self.framing.decode(self.buffer, *place), places))

    def check(self, paths: Sequence[Path]) -> None:
        """Raise RuntimeError where the buffer holds other levels than Pillow gives."""
        self.buffer.levels[:] = 0
        self.run(paths[: self.batch_size])
        for own, path in zip(self.buffer.levels, paths, strict=False):
            if not np.array_equal(own.squeeze(), pillow(path)):
                raise RuntimeError(f"{path.name}: the buffer holds other levels than Pillow gives")


def lock_shares(paths: Sequence[Path], options: argparse.Namespace) -> dict[str, float]:
    """Images per second of many whose decoder only waits, over what they could reach, as far as Python's lock goes.

    threads: as measured, the median of the rounds. processes: this process's processor time is all that they wait for
    in turn; their own is theirs, but on a machine of few cores the clock would count that too.
    """
    how, rounds = (options.size, options.batch_size), options.rounds
    libraries, code, many, found = decode.imagecodecs, decoding.CHILD, paths * 4, {}
    bound = _only_wait.SECONDS / MANY * len(many)
    paths_first = f"import sys; sys.path[:] = [*sys.argv[5:], {HERE!r}]"
    decoding.CHILD = f"{paths_first}; import _only_wait; _only_wait.begin()\n{code}"
    try:
        with ThreadPoolExecutor(MANY) as pool:
            batches = Batches(paths, *how, pool, CPU)
            _only_wait.begin()
            run = timed(lambda: batches.run(many))
            found["threads"] = bound / float(np.median([run() for _ in range(rounds + 1)][1:]))
            decode.imagecodecs = libraries
        with closing(Decoders(MANY)) as processes:
            batches = Batches(paths, *how, processes, CPU)
            batches.run(many)
            begun = time.process_time()
            for _ in range(rounds):
                batches.run(many)
            found["processes"] = min(1.0, bound / (taken := (time.process_time() - begun) / rounds))
            found["microseconds in turn"] = taken / len(many) * 1e6
    finally:
        decode.imagecodecs, decoding.CHILD = libraries, code
    return found


def rate(paths: Sequence[Path], side: int, batch_size: int, device: torch.device, workers: int) -> float:
    """Images per second from files to framed batches on the device, as extraction makes them, once all are warm.

    The files are read three times; the first does not count, nor what may be decoded ahead when it ends.
    """
    options = ExtractOptions(workers=workers)
    parts = [paths[i : i + batch_size] for i in range(0, len(paths) - batch_size + 1, batch_size)]
    batches = [[wanted_of(path, side) for path in part] for part in parts]

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with ExitStack() as stack:
        processes = stack.enter_context(closing(Decoders(workers))) if processes_decode(options, device) else None
        framing = Framing(recipe_of(side), device)
        images = DecodedAhead(framing, workers, processes)
        layouts = [framing.layout([wanted.kind for wanted in own]) for own in batches] * 3
        begun = 0.0
        for number, (buffer, _) in enumerate(images.batches(layouts, batches * 3, batch_size)):
            framing.images(buffer)
            if number + 1 == len(parts):
                wait()
                begun = time.perf_counter()
        wait()
        return (2 * len(parts) - AHEAD) * batch_size / (time.perf_counter() - begun)


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
            with closing(Decoders(THREADS)) as processes:
                own = {
                    name: Batches(paths, options.size, options.batch_size, by, CPU)
                    for name, by in (("threads", pool), ("processes", processes))
                }
                for batches in own.values():
                    batches.check(paths)
                arms = {"bare": timed(lambda paths=paths: list(pool.map(pillow, paths)))}  # type: ignore[misc]
                for name, batches in own.items():
                    arms[name] = timed(lambda paths=paths, batches=batches: batches.run(paths))  # type: ignore[misc]
                timings = interleave(arms, options.rounds)
            ratios[kind] = timings.ratio("bare", "threads")
            speeds[kind] = {name: options.images / timings.median(name) for name in own}
            lock[kind] = lock_shares(paths, options)
            rows.append(
                {
                    "file": kind,
                    "Pillow, images/s": f"{options.images / timings.median('bare'):.0f}",
                    "threads": f"{speeds[kind]['threads']:.0f}",
                    "of Pillow": quartile_text(timings.quartiles("bare", "threads")),
                    "processes": f"{speeds[kind]['processes']:.0f}",
                    "lock": ", ".join(f"{name} {share:.2f}" for name, share in lock[kind].items()),
                }
            )
    report("decode", min(ratios.values()), TARGET, rows, ratios=ratios, images_per_second=speeds, lock=lock,
           threads=THREADS, images=options.images, size=options.size, rounds=options.rounds)  # fmt: skip


if __name__ == "__main__":
    main()
