"""Random warm batches from the feature cache, against a plain copy in memory and what else one could do.

    python benchmarks/cache_read.py

A cache of ConvNeXt-T's levels at 512x512 pixels is filled with random bits. Every arm brings the same
number of random rows into memory that is used again and again. `memcpy` copies them from an array of the
same size; `memmap` is the cache's RowReader, which has checked all rows before, and gives the ratio;
`unchecked` is one that checks nothing, `first pass` one that hashes each row that it reads; `prefetch` is
the FeatureLoader, for a consumer that takes batches and does nothing, and `pooling` for one that pools every
level, as image labels want them. Each arm draws its own rows, so that
none finds what the arm before it has left in the processor's caches. All arms are first proved to bring the
same bytes, and the disk to be asked for none of them. Then a linear head is trained for one epoch, with two
classes and the loss at the levels' grid, the least work that a probe can have, with hashing and without. Last it says
how large the file of a pooled cache of the same rows is.
"""

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import h5py
import numpy as np
import torch
from _bench import Timings, interleave, positive, quartile_text, report, timed
from linear_head import random_labels
from numpy.typing import NDArray

from featprobe.cache import Cache, CacheWriter, Row, create_file, open_cache, store
from featprobe.cache.reader import RING, FeatureLoader
from featprobe.cache.row_reader import RowReader
from featprobe.features import Features, cell_shares, pool
from featprobe.geometry import Placement
from featprobe.kinds import TrainRecipe
from featprobe.levels import FeatureLevel
from featprobe.probes import LinearHead, level_loss
from featprobe.probes.train import train
from featprobe.specs import CacheDtype, CacheStore, DataInfo, FeatureRecipe
from featprobe.stages.pooled import in_one_thread

LEVELS = tuple(FeatureLevel(f"stride{stride}", 24 * stride, stride) for stride in (4, 8, 16, 32))  # ConvNeXt-T's
FRAME = (512, 512)
TARGET = 0.9
EPOCH_TARGET = 1.10  # at most, seconds of a first epoch over those of one without hashing
CLASSES = 2
CHECKED = 3  # batches whose bytes are compared between the arms
COLD_SHARE = 0.01  # of what is read, may come from the disk and still count as warm
BLOCK = 16  # rows that are written at once

Rows = NDArray[np.intp]
Maps = Mapping[str, NDArray[np.uint8]]  # level name -> (rows, row bytes)
Read = Callable[[Rows, Maps], None]
"""Copies rows, in the order given, into buffers of level name -> (rows, row bytes)."""


def make_empty(path: Path, count: int, dtype: CacheDtype = "fp16", store: CacheStore = "maps") -> None:
    """A cache whose rows are all missing."""
    recipe = FeatureRecipe(
        label="random", backbone="random", weights_sha256="0" * 64, levels=LEVELS, final_norm=False, size=FRAME,
        frame=FRAME, fit="resize", intensity="none", window=None, mean=(0.5,) * 3, std=(0.5,) * 3,
        interpolation="bicubic", dtype=dtype, store=store,
    )  # fmt: skip
    place = Placement(FRAME, FRAME, FRAME)
    rows = [Row(f"{i}.png", f"{i}", "train", f"images/{i}.png", f"{i:032}", place) for i in range(count)]
    create_file(path, recipe, DataInfo("random", "", ("background",), (), "0" * 64), rows, {})


def write_cache(path: Path, count: int) -> Cache:
    """A complete cache of random finite fp16 values."""
    make_empty(path, count)
    rng = np.random.default_rng(0)
    with CacheWriter(path) as writer:
        for start in range(0, count, BLOCK):
            writer.write(start, random_maps(rng, min(BLOCK, count - start)))
    return open_cache(path)


def random_maps(rng: np.random.Generator, rows: int) -> dict[str, NDArray[np.float16]]:
    """Rows of random fp16 values in (-2, 2): level name -> (rows, channels, height, width)."""
    shapes = {level.name: (rows, level.channels, *level.cells(FRAME)) for level in LEVELS}
    bits = {name: rng.integers(0, 1 << 16, shape, dtype=np.uint16) for name, shape in shapes.items()}
    return {name: (values & 0xBFFF).view(np.float16) for name, values in bits.items()}  # top exponent bit off


def write_tensors(cache: Cache, folder: Path) -> dict[tuple[int, str], Path]:
    """One .pt file per row and level: (row, level name) -> path."""
    folder.mkdir()
    paths = {(row, level.name): folder / f"{row}-{level.name}.pt" for row in range(len(cache)) for level in LEVELS}
    for row in range(len(cache)):
        for level in LEVELS:
            torch.save(torch.from_numpy(cache.read_row(row, level).copy()), paths[row, level.name])
    return paths


def make_buffers(reader: RowReader, rows: int) -> dict[str, NDArray[np.uint8]]:
    """Memory for this many rows, every page of it touched."""
    return {level.name: np.full((rows, reader.row_bytes(level)), 1, dtype=np.uint8) for level in LEVELS}


def memory_copier(source: Maps) -> Read:
    """Copies rows of arrays in memory: what no read of a file can beat."""

    def read(rows: Rows, out: Maps) -> None:
        for name, rows_of_level in source.items():
            for target, row in zip(out[name], rows.tolist(), strict=True):
                np.copyto(target, rows_of_level[row])

    return read


def h5py_reader(file: h5py.File) -> Read:
    """Reads row by row as any HDF5 tool can: `ds[i]`."""
    datasets = {level.name: file[f"features/{level.name}"] for level in LEVELS}

    def read(rows: Rows, out: Maps) -> None:
        for name, dataset in datasets.items():
            for target, row in zip(out[name], rows.tolist(), strict=True):
                target[:] = dataset[row].reshape(-1).view(np.uint8)

    return read


def tensor_reader(paths: Mapping[tuple[int, str], Path]) -> Read:
    """Loads a .pt file per row and level."""

    def read(rows: Rows, out: Maps) -> None:
        for name, targets in out.items():
            for target, row in zip(targets, rows.tolist(), strict=True):
                target[:] = torch.load(paths[row, name], weights_only=True).numpy().reshape(-1).view(np.uint8)

    return read


def random_batches(rows: int, batch_size: int, arm: str) -> Iterator[Rows]:
    """Random rows without end, each at most once in a batch; every arm has an order of its own."""
    rng = np.random.default_rng(list(arm.encode()))
    while True:
        yield rng.choice(rows, batch_size, replace=False)


def check_equal(readers: Mapping[str, Read], loader: FeatureLoader, orders: Sequence[Rows]) -> None:
    """Raise RuntimeError when a reader or the loader brings other bytes than the copy in memory."""
    wanted, found = (make_buffers(loader.reader, len(orders[0])) for _ in range(2))
    for rows, (_, features) in zip(orders, loader.batches(orders), strict=True):
        readers["memcpy"](rows, wanted)
        brought = {name: m.flatten(1).view(torch.uint8).numpy() for name, m in features.maps.items()}
        _compare("prefetch", wanted, brought)
        for arm, read in readers.items():
            for buffer in found.values():
                buffer.fill(0)
            read(rows, found)
            _compare(arm, wanted, found)


def _compare(arm: str, wanted: Maps, found: Maps) -> None:
    different = [name for name in wanted if not np.array_equal(wanted[name], found[name])]
    if different:
        raise RuntimeError(f"{arm} brings other bytes than memcpy: {', '.join(different)}")


def disk_bytes() -> int:
    """Bytes that this process has had the disk read so far (0 where the system does not count them)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_inblock * 512


def warm_up(paths: Sequence[Path]) -> None:
    """Read files until they lie in memory; raises RuntimeError when they do not stay there."""
    os.sync()  # what was just written must not go to the disk while arms are timed
    _read_all(paths)
    before = disk_bytes()
    size = _read_all(paths)
    if disk_bytes() - before > COLD_SHARE * size:
        raise RuntimeError(f"{size} bytes of files do not stay in memory. Choose fewer --rows.")


def _read_all(paths: Sequence[Path]) -> int:
    buffer, size = bytearray(1 << 20), 0
    for path in paths:
        with path.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                size += count
    return size


def nothing(features: Features) -> None:
    """The work of a consumer that only takes batches."""


@torch.inference_mode()
def pool_all(features: Features) -> None:
    """The work of one that pools them."""
    with in_one_thread():
        pool(features, LEVELS)


def loader_arm(
    loader: FeatureLoader, batches: Iterator[Rows], count: int, work: Callable[[Features], None] = nothing
) -> Callable[[], float]:
    """Seconds of `count` batches of the loader and of a consumer's work, once it runs and its memory is touched.

    A consumer that does nothing is always the one that waits, so what was read ahead when the clock starts is nothing.
    """

    def arm() -> float:
        stream = loader.batches(list(islice(batches, RING + count)))
        for _ in range(RING):
            work(next(stream)[1])
        begun = time.perf_counter()
        for _, features in stream:
            work(features)
        return time.perf_counter() - begun

    return arm


def reader_arm(read: Read, batches: Iterator[Rows], count: int, out: Maps) -> Callable[[], float]:
    """Seconds of `count` batches of a reader."""

    def work() -> None:
        for rows in islice(batches, count):
            read(rows, out)

    return timed(work)


def first_pass_arm(reader: RowReader, batch_size: int, count: int, out: Maps) -> Callable[[], float]:
    """Seconds of `count` batches of a reader to whom every row is new."""
    rng = np.random.default_rng(7)

    def arm() -> float:
        store._hashed(reader.cache).fill(False)
        rows = rng.permutation(len(reader.cache))
        begun = time.perf_counter()
        for start in range(0, count * batch_size, batch_size):
            reader.read(rows[start : start + batch_size], out)
        seconds = time.perf_counter() - begun
        store._hashed(reader.cache).fill(True)  # for the other arms
        return seconds

    return arm


def epoch_arm(cache: Cache, batch_size: int, *, verify: bool) -> Callable[[], float]:
    """Seconds of a linear head's first epoch, from the loader on."""
    labels = random_labels(len(cache), FRAME[0], CLASSES)
    shares = cell_shares(labels, CLASSES, LEVELS[0].stride)
    recipe = TrainRecipe(len(cache) // batch_size, batch_size, lr=1e-3, evaluations=1, weights_from="end")

    def arm() -> float:
        head = LinearHead(LEVELS, CLASSES)

        def loss(features: Features, rows: Rows) -> torch.Tensor:
            return level_loss(head(features), shares[torch.from_numpy(rows)])[None]

        store._hashed(cache).fill(False)
        begun = time.perf_counter()
        with FeatureLoader(cache, mode="memmap", verify=verify) as loader:
            train([head], [recipe], lambda orders, first: loader.batches(orders), np.arange(len(cache)), loss, 0,
                  lambda: [{}])  # fmt: skip
        return time.perf_counter() - begun

    return arm


def measure(folder: Path, options: argparse.Namespace) -> tuple[Timings, Timings, int, float]:
    """Seconds of each arm, those of first epochs, bytes that came from the disk meanwhile; and how many times larger
    than a pooled cache of the same rows the cache is."""
    cache = write_cache(folder / "features.h5", options.rows)
    make_empty(folder / "pooled.h5", options.rows, store="pooled")
    larger = cache.path.stat().st_size / (folder / "pooled.h5").stat().st_size
    paths = write_tensors(cache, folder / "tensors")
    warm_up([cache.path, *paths.values()])
    with (
        RowReader(cache, mode="memmap") as reader,
        RowReader(cache, mode="memmap", verify=False) as unchecked,
        FeatureLoader(cache, mode="memmap") as loader,
    ):
        source = make_buffers(reader, options.rows)
        reader.read(np.arange(options.rows), source)
        with h5py.File(cache.path, "r", locking=False) as file:
            readers = {
                "memcpy": memory_copier(source),
                "memmap": reader.read,
                "unchecked": unchecked.read,
                "h5py ds[i]": h5py_reader(file),
                "one .pt per level": tensor_reader(paths),
            }
            draw = partial(random_batches, options.rows, options.batch_size)
            check_equal(readers, loader, list(islice(draw("check"), CHECKED)))
            out = make_buffers(reader, options.batch_size)
            arms = {name: reader_arm(read, draw(name), options.batches, out) for name, read in readers.items()}
            arms["first pass"] = first_pass_arm(reader, options.batch_size, options.batches, out)
            arms["prefetch"] = loader_arm(loader, draw("prefetch"), options.batches)
            arms["pooling"] = loader_arm(loader, draw("pooling"), options.batches, pool_all)
            before = disk_bytes()
            timings = interleave(arms, options.rounds)
            epochs = {
                name: epoch_arm(cache, options.batch_size, verify=verify)
                for name, verify in (("epoch", False), ("epoch, checked", True))
            }
            return timings, interleave(epochs, options.epochs), disk_bytes() - before, larger


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=positive, default=200, help="of the cache; 6 MB each, held three times")
    parser.add_argument("--batch-size", type=positive, default=16)
    parser.add_argument("--batches", type=positive, default=8, help="that an arm reads in a round")
    parser.add_argument("--rounds", type=positive, default=21)
    parser.add_argument("--epochs", type=positive, default=9, help="first epochs of each kind that are timed")
    parser.add_argument("--folder", type=Path, help="where to write; the file system that is to be tested")
    options = parser.parse_args()
    if options.batches * options.batch_size > options.rows:
        parser.error("the first pass needs as many --rows as --batches of --batch-size hold")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        timings, epochs, from_disk, larger = measure(Path(folder), options)
    values = sum(level.channels * level.cells(FRAME)[0] * level.cells(FRAME)[1] for level in LEVELS)
    moved = 2 * values * options.batch_size * options.batches  # bytes that an arm reads in a round
    rows = [
        {
            "arm": arm,
            "ms per batch": f"{1000 * timings.median(arm) / options.batches:.1f}",
            "GB/s": f"{moved / timings.median(arm) / 1e9:.2f}",
            "of memcpy": quartile_text(timings.quartiles("memcpy", arm)),
        }
        for arm in timings.seconds
    ]
    low, epoch, high = epochs.quartiles("epoch, checked", "epoch")
    ratio = timings.ratio("memcpy", "memmap")
    report(
        "cache_read",
        ratio,
        TARGET,
        rows,
        holds=ratio >= TARGET and epoch <= EPOCH_TARGET,
        first_epoch=epoch,
        first_epoch_quartiles=[round(low, 3), round(high, 3)],
        first_epoch_target=EPOCH_TARGET,
        epoch_seconds=epochs.median("epoch"),
        first_pass=timings.ratio("unchecked", "first pass"),
        later_passes=timings.ratio("unchecked", "memmap"),
        prefetch=timings.ratio("memcpy", "prefetch"),
        pooling=timings.ratio("pooling", "prefetch"),
        times_larger_than_pooled=larger,
        h5py=timings.ratio("memcpy", "h5py ds[i]"),
        pt=timings.ratio("memcpy", "one .pt per level"),
        bytes_per_round=moved,
        rounds=options.rounds,
        bytes_from_disk=from_disk,
    )


if __name__ == "__main__":
    main()
