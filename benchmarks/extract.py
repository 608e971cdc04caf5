"""Extraction of image files to cache, end to end, against the backbone's bare forward pass.

    python benchmarks/extract.py

Shards of a set of PNG files are extracted, and in turn with each, as many images that lie in memory go
through the same backbone in the same batches. A shard's seconds count its reading, decoding, computing,
checksums, writing and syncing; each pays for filling and draining the pipeline. What comes before (loading
weights, looking at the whole set) is shown apart. The features in the cache are proved to be those of the
bare forward pass. The weights are random: they cost the same time.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from _bench import Timings, interleave, positive, quartile_text, report, timed
from numpy.typing import NDArray
from PIL import Image

from featprobe.backbones.backbone import Backbone, load_backbone
from featprobe.backbones.catalog import find_backbone
from featprobe.cache import open_cache
from featprobe.stages.extraction.extract_options import ExtractOptions
from featprobe.stages.extraction.make_cache import extract_with
from featprobe.stages.extraction.run_log import ExtractReport
from featprobe.stages.workspace import Workspace

TARGET = 0.95
TOLERANCE = 1e-3  # relative L2 distance of cached fp16 features from those of the bare forward pass
OCTAVES = 5
CPU = torch.device("cpu")


def texture(rng: np.random.Generator, side: int) -> NDArray[np.uint8]:
    """A cloudy grey surface with sensor noise in each colour: (side, side, 3), uint8."""
    clouds = np.zeros((side, side), dtype=np.float32)
    for octave in range(OCTAVES):
        coarse = rng.standard_normal((2 << octave, 2 << octave), dtype=np.float32)
        clouds += np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)) / 2**octave
    noise = rng.standard_normal((side, side, 3), dtype=np.float32)
    return np.clip(128 + 32 * clouds[:, :, None] + 6 * noise, 0, 255).astype(np.uint8)


def write_set(root: Path, count: int, side: int) -> Path:
    """Write images/ and masks/ with one square defect each; returns the folder."""
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    mask = np.zeros((side, side), dtype=np.uint8)
    mask[: side // 4, : side // 4] = 1
    for i in range(count):
        Image.fromarray(texture(rng, side)).save(root / "images" / f"part{i:05}.png")
        Image.fromarray(mask).save(root / "masks" / f"part{i:05}.png")
    return root


def load_images(data: Path, count: int) -> torch.Tensor:
    """The first images of a set as the backbone takes them: (count, 3, side, side), float32, [0, 1]."""
    paths = sorted((data / "images").iterdir())[:count]
    return torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in paths])).permute(0, 3, 1, 2) / 255


class Extraction:
    """Extracts one shard of a set after the other. reports: what each of them did."""

    def __init__(self, root: Path, data: Path, backbone: Backbone, shards: int, batch_size: int) -> None:
        self.workspace, self.backbone, self.batch_size = Workspace(root), backbone, batch_size
        self.data = self.workspace.data_set(str(data))
        self.shards: Iterator[tuple[int, int]] = ((i + 1, shards) for i in range(shards))
        self.reports: list[ExtractReport] = []

    def next_shard(self) -> float:
        """Extract the next shard; returns the seconds of its run."""
        options = ExtractOptions(batch_size=self.batch_size, shard=next(self.shards), quiet=True)
        self.reports.append(extract_with(self.workspace, self.backbone, self.data, options, CPU))
        return self.reports[-1].seconds["run"]

    def mean(self, name: str) -> float:
        """Mean seconds of a part of the shards that count: all but the first."""
        return float(np.mean([done.seconds[name] for done in self.reports[1:]]))


@torch.inference_mode()
def forward(backbone: Backbone, images: torch.Tensor, batches: int) -> None:
    """Compute the features of one batch so many times."""
    for _ in range(batches):
        backbone(images)


@torch.inference_mode()
def check_equal(path: Path, backbone: Backbone, images: torch.Tensor) -> None:
    """Raise RuntimeError when a cache is not complete, or holds other features of the first images."""
    cache = open_cache(path)
    cache.usable()
    for name, live in backbone(images).maps.items():
        (level,) = (level for level in cache.levels if level.name == name)
        cached = torch.from_numpy(np.stack([cache.read_row(i, level) for i in range(len(images))])).float()
        error = float((cached - live).norm() / live.norm())
        if not error < TOLERANCE:
            raise RuntimeError(f"cached features of {name} are {error:.1e} from those of the forward pass")


def measure(folder: Path, options: argparse.Namespace) -> tuple[Timings, Extraction, float]:
    """Seconds of both arms, what the extraction reports, and the seconds that loading the backbone took."""
    per_round = options.images // options.rounds
    data = write_set(folder / "set", options.images + per_round, options.size)  # the first shard is a warm-up
    begun = time.perf_counter()
    backbone = load_backbone(replace(find_backbone(options.backbone), source="random"))
    load_seconds = time.perf_counter() - begun
    extraction = Extraction(folder, data, backbone, options.rounds + 1, options.batch_size)
    images = load_images(data, options.batch_size)
    bare = timed(lambda: forward(backbone, images, per_round // options.batch_size))
    timings = interleave({"bare forward": bare, "extract": extraction.next_shard}, options.rounds)
    check_equal(extraction.reports[-1].path, backbone, images)
    return timings, extraction, load_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=positive, default=128, help="whose extraction is timed")
    parser.add_argument("--batch-size", type=positive, default=16)
    parser.add_argument("--rounds", type=positive, default=4, help="shards that the images are cut into")
    parser.add_argument("--backbone", default="convnext_in1k", help="with random weights")
    parser.add_argument("--size", type=positive, default=224, help="of the square images, pixels")
    options = parser.parse_args()
    if options.images % (options.rounds * options.batch_size) or options.size % 32:
        parser.error("--images must be a multiple of rounds times batch size, and --size of 32")
    with tempfile.TemporaryDirectory() as folder:
        timings, extraction, load_seconds = measure(Path(folder), options)
    per_round = options.images // options.rounds
    rows = [
        {
            "arm": arm,
            "images/s": f"{per_round / timings.median(arm):.2f}",
            "of bare forward": quartile_text(timings.quartiles("bare forward", arm)),
        }
        for arm in timings.seconds
    ]
    run, wait_images, wait_disk = (extraction.mean(name) for name in ("run", "wait_images", "wait_disk"))
    print(f"before the run: {load_seconds:.1f} s to load, {extraction.mean('look'):.1f} s to look at the data")
    print(f"of a shard's {run:.1f} s: {wait_images:.2f} s waiting for images, {wait_disk:.2f} s for the disk")
    report(
        "extract",
        timings.ratio("bare forward", "extract"),
        TARGET,
        rows,
        ratio_of_sums=sum(timings.seconds["bare forward"]) / sum(timings.seconds["extract"]),
        images_per_second=per_round / timings.median("extract"),
        load_seconds=load_seconds,
        look_seconds=extraction.mean("look"),
        wait_images_share=wait_images / run,
        wait_disk_share=wait_disk / run,
        images=options.images,
        rounds=options.rounds,
        backbone=options.backbone,
        size=options.size,
        threads=torch.get_num_threads(),
    )


if __name__ == "__main__":
    main()
