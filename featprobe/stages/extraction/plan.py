"""The cost of an extraction, before it runs."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from featprobe.backbones.backbone import Backbone, load_backbone
from featprobe.backbones.precision import computing
from featprobe.cache.quantised import decode
from featprobe.datasets.images.reading import read_levels
from featprobe.machine import available_memory, free_disk
from featprobe.processes import pick_device
from featprobe.specs import BackboneSpec, CacheDtype, FeatureRecipe
from featprobe.stages.extraction.extract_options import ExtractOptions, configured
from featprobe.stages.extraction.frames import Framing
from featprobe.stages.extraction.job import Job, prepare, read_set
from featprobe.stages.memory import failing, largest_that_fits, too_small
from featprobe.stages.workspace import Workspace

TIMED_BATCHES = 3


@dataclass(frozen=True)
class Plan:
    """Cost of a cache: bytes, and seconds as timed on a few batches of this machine.

    rows: of the cache: the images, or their tiles and views. bytes_of: see the function.
    epoch_live: seconds that one pass over all images would take with the backbone run every time;
    epoch_cached: one pass over the cached features, as this memory copies them. break_even: passes from
    which on the cache is the quicker way, extraction included.
    """

    path: str
    exists: bool
    images: int
    rows: int
    frame: tuple[int, int]
    levels: tuple[str, ...]
    feature_bytes: int
    bytes_of: dict[str, int]
    free_disk: int
    memory: int
    gpu_memory: int | None
    extract_seconds: float
    epoch_live: float
    epoch_cached: float
    device: str

    @property
    def fits_disk(self) -> bool:
        """Whether the disk can hold the features."""
        return self.exists or self.feature_bytes < self.free_disk

    @property
    def fits_memory(self) -> bool:
        """Whether all features fit the available memory."""
        return self.feature_bytes < self.memory

    @property
    def fits_gpu(self) -> bool | None:
        """Whether all features fit the GPU's free memory; None without a GPU."""
        return None if self.gpu_memory is None else self.feature_bytes < self.gpu_memory

    @property
    def break_even(self) -> float:
        """Number of passes from which on the cache pays."""
        saved = self.epoch_live - self.epoch_cached
        return self.extract_seconds / saved if saved > 0 else float("inf")


def plan(workspace: Workspace, spec: BackboneSpec, data_name: str, options: ExtractOptions | None = None) -> Plan:
    """Time a few batches of a data set under a backbone, and say what its cache would cost."""
    options = configured(options or ExtractOptions(), workspace.data_options(data_name))
    data = read_set(workspace, data_name, options)
    device = pick_device(options.device)
    backbone = load_backbone(spec, options.levels, device)
    job = prepare(workspace, backbone, data, options, device)
    readable = [i for i, row in enumerate(job.rows) if not row.reason][: options.batch_size]
    begun = time.perf_counter()
    shown = [job.rows[i].show(read_levels(job.images[i])) for i in readable]
    batch = Framing(job.recipe, device).together(shown, [job.rows[i].placement for i in readable])
    decoding = (time.perf_counter() - begun) / len(readable)
    compute = _compute_seconds(job, backbone, batch, device) / len(readable)
    copy = _median_seconds(_reading(job.recipe, len(readable)), torch.device("cpu")) / len(readable)
    count = len(job.rows)
    live = count * max(compute, decoding / max(1, options.workers))
    return Plan(
        path=str(job.path),
        exists=job.path.exists(),
        images=len(job.whole or job.rows),
        rows=count,
        frame=job.recipe.frame,
        levels=tuple(level.name for level in job.recipe.levels),
        feature_bytes=job.feature_bytes,
        bytes_of=bytes_of(job.recipe, count),
        free_disk=free_disk(job.path.parent),
        memory=available_memory(),
        gpu_memory=torch.cuda.mem_get_info(device.index)[0] if device.type == "cuda" else None,
        extract_seconds=live + count * copy,
        epoch_live=live,
        epoch_cached=count * copy,
        device=str(device),
    )


def _compute_seconds(job: Job, backbone: Backbone, batch: Tensor, device: torch.device) -> float:
    """Seconds of a batch; raises BackboneError where the memory does not hold it, with the size that it holds."""

    def seconds(images: int) -> float:
        with computing(job.recipe.precision, device):
            return _median_seconds(lambda: backbone(batch[:images]), device)

    try:
        with failing(device, "Nothing was written. Run the same command again."):
            return seconds(len(batch))
    except torch.cuda.OutOfMemoryError as error:
        found = str(error)
    # out here nothing holds the tensors of the batch that failed any more
    fits = largest_that_fits(len(batch), seconds)
    where = f"under {job.recipe.label}, at {job.recipe.frame[0]}x{job.recipe.frame[1]} pixels"
    raise too_small(device, where, len(batch), found, fits, f"run the same command with --batch-size {fits}")


def bytes_of(recipe: FeatureRecipe, rows: int) -> dict[str, int]:
    """What the features of so many rows would take, by the dtype of maps, and pooled."""
    dtypes: tuple[CacheDtype, ...] = ("fp32", "fp16", "int8")
    maps: dict[str, int] = {dtype: rows * replace(recipe, dtype=dtype, store="maps").row_bytes for dtype in dtypes}
    return {**maps, "pooled": rows * replace(recipe, store="pooled").row_bytes}


def _reading(recipe: FeatureRecipe, rows: int) -> Callable[[], object]:
    """A function that reads rows of a cache in memory: it copies them, and decodes those of int8."""
    if recipe.dtype != "int8":
        block = np.ones(rows * recipe.row_bytes, dtype=np.uint8)
        target = np.empty_like(block)
        return lambda: np.copyto(target, block)
    shapes = [(rows, level.channels, *level.cells(recipe.frame)) for level in recipe.levels]
    coded = [(torch.ones(shape, dtype=torch.uint8), torch.ones(*shape[:2], 2)) for shape in shapes]
    values = [torch.empty(shape, dtype=torch.float16) for shape in shapes]
    return lambda: [decode(*own, out=out) for own, out in zip(coded, values, strict=True)]


@torch.inference_mode()
def _median_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Median wall time of a call, after one that warms up."""
    seconds = []
    for _ in range(TIMED_BATCHES + 1):
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begun)
    return float(np.median(seconds[1:]))
