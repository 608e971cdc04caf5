"""The GPU path, each figure beside its limit, which is measured in the same run: one command under five minutes.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --small --device cpu

ConvNeXt-T with random weights (they cost the same time), four levels, 512x512 pixels, 1024 JPEGs of quality 95 with
masks. Limits: the bare forward pass in the same precision and batches; Pillow's decoding on one core, times the cores;
plain writes with fdatasync; copies to the device; a training loop by hand with its images in memory. Speeds of training
are differences of two trainings of different length, so that what is done once takes no part. Every line is printed as
soon as it is known. `ratio` is the least of figure over target; the targets are meant for an H100-class card. A line
that fails, or that the time did not reach, counts as 0; the others stand. `--small` shows on any machine that the
script runs.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import decode
import numpy as np
import torch
from _bench import report
from _limits import Bench, bare_forward, by_hand, copy_rate, disk_rate, one_core_decoding, picture, read_rate
from PIL import Image

from featprobe.backbones.backbone import Backbone
from featprobe.backbones.precision import resolve
from featprobe.cache import open_cache, reader
from featprobe.kinds import KINDS
from featprobe.machine import usable_cores
from featprobe.stages.extraction.extract_options import ExtractOptions
from featprobe.stages.extraction.make_cache import extract_with
from featprobe.stages.extraction.run_log import ExtractReport
from featprobe.stages.partition import Partition
from featprobe.stages.training.finetune import finetune
from featprobe.stages.training.prepared import keep_on_device, prepare, source_of, trials_of
from featprobe.stages.training.probe import checked, probe
from featprobe.stages.training.probe_options import ProbeOptions, Tuning
from featprobe.stages.training.training import Training
from featprobe.stages.workspace import Workspace

RATES, DECAYS = (1e-3, 5e-3, 1e-2), (1e-4, 1e-3, 1e-2)  # of the bank of nine


def extraction(bench: Bench, backbone: Backbone, folder: Path, images: int) -> tuple[ExtractReport, float]:
    """Extract a share of the set into a folder; its report and images per second."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    workspace = Workspace(folder)
    shard = None if images == bench.count else (1, bench.count // images)
    options = ExtractOptions(quiet=True, device=bench.device.type, shard=shard)
    done = extract_with(workspace, backbone, workspace.data_set(str(bench.data)), options, bench.device)
    return done, done.computed / done.seconds["run"]


@contextmanager
def streaming() -> Iterator[None]:
    """No rows move to the device whole."""
    kept, reader.DEVICE_SHARE = reader.DEVICE_SHARE, 0.0
    try:
        yield
    finally:
        reader.DEVICE_SHARE = kept


class Trainings:
    """Trainings from the cache of a workspace, and how fast their steps are."""

    def __init__(self, bench: Bench, folder: Path) -> None:
        self.bench, self.workspace = bench, Workspace(folder)

    def seconds(self, task: str, iterations: int, **how: Any) -> tuple[float, dict[str, Any]]:
        """Seconds of a training of so many iterations, and its row."""
        head = how["head"]
        recipe = replace(KINDS[task, head].recipe, iterations=iterations, evaluations=1, **how.pop("loop", {}))
        recipe = replace(recipe, batch_size=2) if self.bench.small else recipe
        tuning = how.pop("tuning", None)
        options = ProbeOptions(
            recipe=recipe, seeds=1, quiet=True, budget="fixed", device=self.bench.device.type, tuning=tuning, **how
        )
        if tuning is None:
            row = probe(self.workspace, task, [], [], options).rows[0]
        else:
            row = finetune(self.workspace, task, [], [], options).rows[0]
        return row["seconds"]["train"], row

    def rate(self, task: str, short: int, long: int, **how: Any) -> float:
        """Samples per second of the steps between a short and a long training."""
        if self.bench.small:  # too short to tell steps from what is done once
            seconds, row = self.seconds(task, 1, **how)
            return row["recipe"]["batch_size"] / seconds
        first = self.seconds(task, short, **dict(how))[0]
        second, row = self.seconds(task, long, **dict(how))
        if second <= first:
            raise RuntimeError(f"{long} iterations took {second:.2f} s, {short} took {first:.2f} s")
        return (long - short) * row["recipe"]["batch_size"] / (second - first)

    def evaluation(self) -> float:
        """Images per second of scoring a linear head on the test images, the labels known."""
        cache = open_cache(next(iter(self.workspace.cache_files())))
        options = checked("semseg", ProbeOptions(seeds=1, quiet=True, device=self.bench.device.type))
        ready = prepare(Training(self.workspace, Partition(cache, options.choice), "semseg", options, (0,)))
        (trial,) = trials_of(ready)
        trial.head.eval()
        rows = ready.rows["test"]
        with source_of(ready, trial.head) as source:
            keep_on_device(ready, source)
            return self.bench.rate(lambda: ready.task.evaluate([trial.head], source.batches, rows), len(rows), 5)


@dataclass
class Limits:
    """Images per second of what an extraction can't exceed, measured when they are first asked for."""

    bench: Bench

    @cached_property
    def backbone(self) -> Backbone:
        """The network."""
        return self.bench.network()

    @cached_property
    def forward(self) -> float:
        """Of the network alone."""
        precision = resolve("auto", self.bench.device.type)
        found = bare_forward(self.bench, self.backbone, precision)
        self.bench.note(f"bare forward, {precision}, batch 16", found, "images/s")
        return found

    @cached_property
    def one_core(self) -> float:
        """Of Pillow."""
        found = one_core_decoding(self.bench)
        self.bench.note("Pillow on one core", found, "images/s")
        return found

    @property
    def decoding(self) -> float:
        """Of all cores."""
        return self.one_core * usable_cores()


def measure(bench: Bench) -> None:
    """Every line, in an order that leaves the costly ones for the end."""
    (bench.data / "images").mkdir(parents=True)
    (bench.data / "masks").mkdir()
    jobs = [(bench.data, number, bench.side) for number in range(bench.count)]
    with ProcessPoolExecutor(usable_cores()) as pool:
        list(pool.map(picture, jobs, chunksize=8))
    limits, folder = Limits(bench), bench.root / "workspace"
    bench.part(lambda: extract_line(bench, folder, "extract, disk", limits), "extract, disk")
    memory = Path("/dev/shm" if Path("/dev/shm").is_dir() else tempfile.gettempdir()) / f"gpu-benchmark-{os.getpid()}"
    try:
        bench.part(lambda: extract_line(bench, memory, "extract, tmpfs", limits), "extract, tmpfs")
    finally:
        shutil.rmtree(memory, ignore_errors=True)
    bench.part(lambda: decoding_line(bench, limits), "decoding to the device")
    training = Trainings(bench, folder)
    bench.part(
        lambda: linear_lines(bench, training, limits), "linear probe, resident", "linear probe, of the bare forward"
    )
    bench.part(lambda: level_line(bench, training), "linear probe, level loss")
    bench.part(lambda: bank_line(bench, training), "bank of nine, resident")
    bench.part(lambda: whole_line(bench, training), "1000 iterations, to the row")
    bench.part(lambda: bench.line("dense evaluation", training.evaluation(), "images/s", 2500), "dense evaluation")
    bench.part(lambda: ridge_line(bench, training), "ridge")
    for task, head, target, short, long in (
        ("semseg", "upsample", 1000, 50, 450), ("detect", "fcos", 800, 50, 850),
        ("detect", "fasterrcnn", 250, 20, 220), ("instseg", "maskrcnn", 120, 20, 120),
    ):  # fmt: skip
        objects = {} if task == "semseg" else {"instances": "components"}
        line = partial(head_line, bench, training, task, head, target, short, long, objects)
        bench.part(line, head, need=15)
    bench.part(lambda: streamed_line(bench, training), "linear probe, streamed", need=20)
    bench.part(lambda: finetune_line(bench, training), "finetune", need=25)


def extract_line(bench: Bench, folder: Path, work: str, limits: Limits) -> None:
    """All images to the disk, or half of them to memory, whose cache the caller removes."""
    least = min(limits.forward, limits.decoding)  # before, so that the network is warm
    done, rate = extraction(
        bench, limits.backbone, folder, bench.count if work == "extract, disk" else bench.count // 2
    )
    written = disk_rate(folder, 64 if bench.small else 2048) / (done.bytes_written / done.computed)
    bench.note(f"plain writes, {work.split()[1]}", written, "images/s")
    alone = ", ".join(
        f"{part} {done.computed / done.seconds[part]:.0f}"
        for part in ("network", "decoding", "copying", "writing")
        if done.seconds[part]
    )
    print(f"             by themselves, images/s: {alone}; look {done.seconds['look']:.2f} s", flush=True)
    bench.line(work, rate, "images/s", 0.9, min(least, written))


def decoding_line(bench: Bench, limits: Limits) -> None:
    """As many processes of Pillow as there are cores show what these give together: hyper-threads are no cores."""
    paths = [str(path) for path in sorted((bench.data / "images").iterdir())]
    with ProcessPoolExecutor(usable_cores()) as pool:
        rate = bench.rate(lambda: list(pool.map(pillow, paths, chunksize=8)), len(paths), 2)
    bench.note(f"Pillow in {usable_cores()} processes", rate, "images/s")
    found = decode.rate([Path(path) for path in paths], bench.side, 16, bench.device, usable_cores())
    bench.line("decoding to the device", found, "images/s", 0.7, limits.decoding)


def pillow(path: str) -> int:
    """Decode an image; a byte of it."""
    with Image.open(path) as image:
        return int(np.asarray(image)[0, 0, 0])


def linear_lines(bench: Bench, training: Trainings, limits: Limits) -> None:
    """In samples, and in passes of the network that the cache spares."""
    rate = training.rate("semseg", 200, 2200, head="linear")
    bench.line("linear probe, resident", rate, "samples/s", 5000)
    bench.line("linear probe, of the bare forward", rate, "samples/s", 3, limits.forward)


def level_line(bench: Bench, training: Trainings) -> None:
    """The loss at the grid of the finest level."""
    rate = training.rate("semseg", 200, 2200, head="linear", loop={"loss_at": "level"})
    bench.line("linear probe, level loss", rate, "samples/s", 5000)


def bank_line(bench: Bench, training: Trainings) -> None:
    """Nine heads over the same batches."""
    how: dict[str, Any] = {"lr": RATES, "weight_decay": DECAYS, "loop": {"loss_at": "level"}}
    bench.line("bank of nine, resident", training.rate("semseg", 100, 600, head="linear", **how), "samples/s", 2000)


def whole_line(bench: Bench, training: Trainings) -> None:
    """With labels, validation, records of defects and files."""
    begun = time.perf_counter()
    training.seconds("semseg", 20 if bench.small else 1000, head="linear")
    bench.line("1000 iterations, to the row", time.perf_counter() - begun, "s", 8, at_most=True)


def ridge_line(bench: Bench, training: Trainings) -> None:
    """From start to end of what stands for a training."""
    bench.line("ridge", training.seconds("semseg", 1, head="ridge")[0], "s", 2, at_most=True)


def head_line(
    bench: Bench, training: Trainings, task: str, head: str, target: float, short: int, long: int, how: dict[str, Any]
) -> None:
    """Another head."""
    bench.line(head, training.rate(task, short, long, head=head, **how), "samples/s", target)


def streamed_line(bench: Bench, training: Trainings) -> None:
    """A linear head whose features stay in the file."""
    path = next(iter(training.workspace.cache_files()))
    reading, copying = read_rate(bench, path), copy_rate(bench, open_cache(path).recipe.row_bytes)
    bench.note("file to page-locked memory", reading, "rows/s")
    bench.note("copy to the device", copying, "rows/s")
    with streaming():
        rate = training.rate("semseg", 50, 150, head="linear")
    bench.line("linear probe, streamed", rate, "samples/s", 0.8, min(reading, copying))


def finetune_line(bench: Bench, training: Trainings) -> None:
    """Images are decoded and augmented."""
    hand = by_hand(bench, bench.network(), 16)
    rate = training.rate("semseg", 15, 60, head="linear", tuning=Tuning(), loop={"batch_size": 16})
    bench.line("finetune", rate, "images/s", 0.9, hand)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backbone", default="convnext_in1k", help="of strides 4 to 32, with random weights")
    parser.add_argument("--small", action="store_true", help="few small images, to see that the script runs")
    parser.add_argument("--seconds", type=float, default=290.0, help="that the run may take; later lines are left out")
    parser.add_argument("--folder", help="on the disk that is measured; 15 GB free")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("There is no CUDA device here. To see that it runs:  python benchmarks/gpu.py --small --device cpu")
    device = torch.device(options.device)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        bench = Bench(Path(folder), device, options.backbone, options.small, options.seconds)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        print(f"{name}, {usable_cores()} cores, torch {torch.__version__}", flush=True)
        measure(bench)
    rows = [
        {
            "work": line["work"],
            "figure": f"{line['figure']:.2f} {line['unit']}",
            "limit": f"{line['limit']:.1f}" if line["limit"] else "",
            "share": f"{line['figure'] / line['limit']:.2f}" if line["limit"] else "",
            "target": f"{line['target']:g}",
            "of target": f"{line['ratio']:.2f}",
        }
        for line in bench.lines
    ]
    memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
    figures = {line["work"]: float(f"{line['figure']:.4g}") for line in bench.lines}
    report(
        "gpu", min(line["ratio"] for line in bench.lines), 1.0, rows,
        card=name, torch=torch.__version__, small=options.small, largest_memory_gb=memory, figures=figures,
    )  # fmt: skip


if __name__ == "__main__":
    main()
