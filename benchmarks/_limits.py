"""What `gpu.py` holds its figures against, and the set of images that both are measured on."""

import os
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from featprobe.backbones.backbone import Backbone, load_backbone
from featprobe.backbones.catalog import find_backbone
from featprobe.backbones.precision import computing
from featprobe.cache import open_cache
from featprobe.cache.row_reader import RowReader


def picture(job: tuple[Path, int, int]) -> None:
    """Write an image with three dark flaws, and its mask. job: folder of the set, number, side in pixels."""
    root, number, side = job
    random = np.random.default_rng(number)
    clouds = np.zeros((side, side), np.float32)
    for octave in range(5):
        coarse = random.standard_normal((2 << octave, 2 << octave), dtype=np.float32)
        clouds += np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)) / 2**octave
    noise = random.standard_normal((side, side, 3), dtype=np.float32)
    image = np.clip(128 + 32 * clouds[..., None] + 6 * noise, 0, 255).astype(np.uint8)
    mask = np.zeros((side, side), np.uint8)
    for _ in range(3):
        top, left = random.integers(0, side - side // 6, 2)
        height, width = random.integers(side // 20 + 2, side // 6, 2)
        mask[top : top + height, left : left + width] = 255
        image[top : top + height, left : left + width] //= 2
    Image.fromarray(image).save(root / "images" / f"part{number:05}.jpg", quality=95)
    Image.fromarray(mask).save(root / "masks" / f"part{number:05}.png")


@dataclass
class Bench:
    """What all lines share, and the lines so far."""

    root: Path
    device: torch.device
    backbone: str
    small: bool
    seconds: float
    begun: float = field(default_factory=time.perf_counter)
    lines: list[dict[str, Any]] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Images of the set."""
        return 32 if self.small else 1024

    @property
    def side(self) -> int:
        """Of the images, pixels."""
        return 64 if self.small else 512

    @property
    def data(self) -> Path:
        """The set's folder."""
        return self.root / "set"

    def network(self) -> Backbone:
        """The network with random weights, on the device."""
        return load_backbone(replace(find_backbone(self.backbone), source="random"), device=self.device)

    def left(self) -> float:
        """Seconds left."""
        return self.seconds - (time.perf_counter() - self.begun)

    def sync(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def line(
        self, work: str, figure: float, unit: str, target: float, limit: float | None = None, *, at_most: bool = False
    ) -> None:
        """Add a line. target: a share of the limit where there is one, else in the figure's unit."""
        ratio = (target / figure) if at_most else (figure / limit if limit else figure) / target
        self.lines.append(
            {"work": work, "figure": figure, "unit": unit, "limit": limit, "target": target, "ratio": ratio}
        )
        beside = f", limit {limit:.1f}, share {figure / limit:.2f}" if limit else ""
        wanted = f"{'<=' if at_most else '>='} {target:g}"
        print(f"[{time.perf_counter() - self.begun:6.1f} s] {work}: {figure:.2f} {unit}{beside} ({wanted})", flush=True)

    def note(self, what: str, figure: float, unit: str) -> None:
        """Print a figure that has no target: a limit."""
        print(f"[{time.perf_counter() - self.begun:6.1f} s]   {what}: {figure:.1f} {unit}", flush=True)

    def part(self, measure: Callable[[], None], *names: str, need: float = 10.0) -> None:
        """Measure the lines of these names; a failure, or too little time, ends them alone, and they count as 0."""
        before = len(self.lines)
        try:
            if self.left() < need and not self.small:
                raise TimeoutError(f"{self.left():.0f} s are left, and it needs {need:.0f}")
            with ended_after(None if self.small else self.left()):
                measure()
        except Exception as error:
            text = "".join(traceback.format_exception(error)) if not isinstance(error, TimeoutError) else str(error)
            print(f"{', '.join(names)}: not measured\n{text}", flush=True)
        there = {line["work"] for line in self.lines[before:]}
        for name in names:
            if name not in there:
                self.line(name, 0.0, "not measured", 1.0)

    def rate(self, call: Callable[[], object], images: int, times: int) -> float:
        """Images per second of a call that treats so many, once warm: the median of the calls."""
        call()
        self.sync()
        found = []
        for _ in range(times):
            begun = time.perf_counter()
            call()
            self.sync()
            found.append(images / (time.perf_counter() - begun))
        return statistics.median(found)


@contextmanager
def ended_after(seconds: float | None) -> Iterator[None]:
    """Raise TimeoutError in what takes longer; None for no end. For the main thread."""

    def end(number: int, frame: object) -> None:
        raise TimeoutError("the time ended")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds or 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def disk_rate(folder: Path, megabytes: int) -> float:
    """Bytes per second of plain writes of 64 MB each, synced each."""
    block = np.random.default_rng(0).integers(0, 255, 64_000_000 if megabytes > 64 else 1_000_000, np.uint8).tobytes()
    times = max(1, megabytes * 1_000_000 // len(block))
    path = folder / "plain.bin"
    begun = time.perf_counter()
    with path.open("wb", buffering=0) as stream:
        for _ in range(times):
            stream.write(block)
            os.fdatasync(stream.fileno())
    seconds = time.perf_counter() - begun
    path.unlink()
    return times * len(block) / seconds


def bare_forward(bench: Bench, backbone: Backbone, precision: str, batch: int = 16) -> float:
    """Images per second of the network alone, its images on the device."""
    images = torch.rand(batch, 3, bench.side, bench.side, device=bench.device)

    def call() -> None:
        with torch.inference_mode(), computing(precision, bench.device):  # type: ignore[arg-type]
            for _ in range(1 if bench.small else 8):
                backbone(images)

    return bench.rate(call, batch * (1 if bench.small else 8), 5)


def one_core_decoding(bench: Bench) -> float:
    """Images per second of Pillow in one thread, the files in the page cache."""
    paths = sorted((bench.data / "images").iterdir())[: 8 if bench.small else 128]

    def call() -> None:
        for path in paths:
            with Image.open(path) as image:
                np.asarray(image)

    return bench.rate(call, len(paths), 3)


def by_hand(bench: Bench, backbone: Backbone, batch: int) -> float:
    """Images per second of a hand-written loop over network and linear head, bf16, its images on the device."""
    backbone.requires_grad_(True).train()
    head = nn.Conv2d(sum(level.channels for level in backbone.levels), 2, 1).to(bench.device)
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], 1e-4, fused=True)
    images = torch.rand(batch, 3, bench.side, bench.side, device=bench.device)
    labels = torch.randint(0, 2, (batch, bench.side // 4, bench.side // 4), device=bench.device)

    def call() -> None:
        for _ in range(1 if bench.small else 10):
            with torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.device.type == "cuda"):
                maps = list(backbone(images).maps.values())
                size = maps[0].shape[2:]
                joined = torch.cat([nn.functional.interpolate(m, size=size, mode="bilinear") for m in maps], 1)
                loss = nn.functional.cross_entropy(head(joined).float(), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return bench.rate(call, batch * (1 if bench.small else 10), 3)


def read_rate(bench: Bench, path: Path) -> float:
    """Rows per second of the train split from the cache's file into page-locked memory, in batches at random."""
    cache = open_cache(path)
    rows, batch = cache.usable("train"), 16
    order = np.random.default_rng(0).permutation(rows)
    pinned = bench.device.type == "cuda"
    with RowReader(cache) as rows_of:
        buffers = {
            level.name: torch.empty((batch, rows_of.row_bytes(level)), dtype=torch.uint8, pin_memory=pinned).numpy()
            for level in cache.levels
        }
        full = [order[i : i + batch] for i in range(0, len(order) - batch + 1, batch)]

        def call() -> None:
            for part in full:
                rows_of.read(part, buffers)

        return bench.rate(call, len(full) * batch, 2)


def copy_rate(bench: Bench, row_bytes: int) -> float:
    """Rows per second of copies of a batch from page-locked memory to the device."""
    batch = torch.empty(16 * row_bytes, dtype=torch.uint8, pin_memory=bench.device.type == "cuda")
    there = torch.empty_like(batch, device=bench.device)

    def call() -> None:
        for _ in range(8):
            there.copy_(batch, non_blocking=True)

    return bench.rate(call, 8 * 16, 5)
