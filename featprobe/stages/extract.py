"""Images to cache: decode ahead, compute on the device, write behind; stop and go on at will."""

import json
import platform
import queue
import shlex
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from tqdm import tqdm

from featprobe import __version__
from featprobe.backbones.backbone import Backbone, load_backbone
from featprobe.cache import (
    MISSING,
    UNREADABLE,
    WHOLE,
    Cache,
    CacheWriter,
    Row,
    RowLocks,
    create_file,
    make_temporary,
    read_contents,
    remove_leftovers,
    replace_file,
)
from featprobe.cache.reader import TORCH_DTYPE
from featprobe.datasets import DataSet
from featprobe.datasets.images import frame_image, read_levels
from featprobe.errors import BackboneError, CacheError, DataError, OverflowsDtypeError, counted
from featprobe.geometry import Size
from featprobe.machine import free_disk, human_bytes
from featprobe.processes import launched, pick_device
from featprobe.specs import BackboneSpec, DataInfo, FeatureRecipe
from featprobe.stages.options import ExtractOptions, check_turns, configured
from featprobe.stages.survey import Survey, describe, make_recipe, make_rows, skippable, survey
from featprobe.stages.workspace import Workspace

EXPONENT = {
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float32: (torch.int32, 0x7F800000),
}
"""Number format -> integers of its size, and the bits of its exponent."""
AHEAD = 3  # blocks that are decoded before they are needed
IMAGES_KEPT = 4  # decoded, for their next tiles
BEHIND = 2  # blocks that may wait for the disk
DISK_RESERVE = 64_000_000  # bytes left free beside the features


@dataclass(frozen=True)
class ExtractReport:
    """What an extraction did. seconds: load, look, run, and what `run` waited for: images, disk.

    rows: tiles and views, or else images; images: that they show.
    """

    path: Path
    rows: int
    computed: int
    copied: int
    missing: int
    unreadable: tuple[tuple[str, str], ...]
    bytes_written: int
    seconds: dict[str, float]
    notes: tuple[str, ...]
    device: str
    images: int


@dataclass(frozen=True)
class Job:
    """All that is known of an extraction before anything is computed.

    images: the file of each row. whole: the images that rows are parts of; none where rows are images. read_as: options
    that say how the data set was read, of those that were given.
    """

    path: Path
    recipe: FeatureRecipe
    info: DataInfo
    rows: tuple[Row, ...]
    images: tuple[Path, ...]
    surveyed: Survey
    command: str
    spec: BackboneSpec
    whole: tuple[Row, ...] = ()
    read_as: Mapping[str, str] = field(default_factory=dict)

    def size_of(self, row: int) -> Size:
        """(height, width) of the whole image that a row shows."""
        return (self.whole[self.rows[row].image_index] if self.whole else self.rows[row]).placement.original

    @property
    def feature_bytes(self) -> int:
        """Bytes of all features."""
        return self.recipe.row_bytes * len(self.rows)


def extract(
    workspace: Workspace, spec: BackboneSpec, data_name: str, options: ExtractOptions | None = None
) -> ExtractReport:
    """Make, go on with, repair or refresh the cache of a data set under a backbone.

    Raises FeatprobeError; whatever was whole before stays whole.
    """
    options = configured(options or ExtractOptions(), workspace.data_options(data_name))
    if launched()[0]:
        options = replace(options, quiet=True)  # one progress bar is enough
    begun = time.perf_counter()
    data = workspace.data_set(data_name, options.format, options.group_from, options.split_file)
    device = pick_device(options.device)
    backbone = load_backbone(spec, options.levels, device)
    return extract_with(workspace, backbone, data, options, device, load_seconds=time.perf_counter() - begun)


def prepare(workspace: Workspace, backbone: Backbone, data: DataSet, options: ExtractOptions) -> Job:
    """Look at the whole data set and settle the recipe, the rows and the file's name."""
    options.check()
    tiling = options.tiling
    surveyed = survey(data, workers=options.workers, skip_bad=options.skip_bad, quiet=options.quiet)
    recipe = make_recipe(
        surveyed,
        backbone,
        size=options.size,
        fit="letterbox" if tiling else options.fit or "resize",
        intensity=options.intensity,
        dtype=options.dtype,
        precision=options.precision,
        tiling=tiling,
        views=options.views or (),
    )
    check_turns(recipe.views, recipe.size, recipe.fit)
    path = workspace.cache_folder(data) / f"{recipe.label}-{recipe.key[:8]}.h5"
    rows, whole = make_rows(surveyed, recipe, backbone.multiple)
    images = [data.samples[row.image_index if whole else i].image for i, row in enumerate(rows)]
    command = command_of(backbone.spec, workspace.data_argument(data), options)
    how = {name: getattr(options, name) for name in ("format", "group_from", "split_file")}
    return Job(
        path, recipe, describe(surveyed, recipe), tuple(rows), tuple(images), surveyed, command,
        _placed(backbone.spec), tuple(whole), {name: value for name, value in how.items() if value},
    )  # fmt: skip


def extract_with(
    workspace: Workspace,
    backbone: Backbone,
    data: DataSet,
    options: ExtractOptions,
    device: torch.device,
    load_seconds: float = 0.0,
) -> ExtractReport:
    """`extract` with a backbone and a data set that are loaded already."""
    if options.precision == "amp" and device.type != "cuda":
        raise BackboneError(f"--precision amp needs a CUDA device; this is {device}. Leave it away.")
    begun = time.perf_counter()
    job = prepare(workspace, backbone, data, options)
    start, stop = share_of(len(job.rows), options.batch_size, options.shard or _own_shard())
    look_seconds = time.perf_counter() - begun
    with RowLocks(job.path) as locks:
        locks.wait_for_creation()
        copied = _ensure_file(job, locks)
        locks.release()
        locks.claim(start, stop)
        locks.end_creation()
        begun = time.perf_counter()
        with CacheWriter(job.path) as writer:
            filler = _Filler(job, writer, backbone, options, device)
            filler.fill(start, stop)
        run_seconds = time.perf_counter() - begun
    cache = Cache(job.path, read_contents(job.path))
    done = cache.done
    report = ExtractReport(
        path=job.path,
        rows=len(job.rows),
        computed=filler.computed,
        copied=copied,
        missing=int((done == MISSING).sum()),
        unreadable=tuple((job.rows[i].id, cache.reason(i)) for i in np.flatnonzero(done == UNREADABLE).tolist()),
        bytes_written=filler.computed * job.recipe.row_bytes,
        seconds={
            "load": load_seconds,
            "look": look_seconds,
            "run": run_seconds,
            "wait_images": filler.waited_images,
            "wait_disk": filler.waited_disk,
        },
        notes=job.info.notes,
        device=str(device),
        images=len(job.surveyed.found),
    )
    if report.computed:
        _log_run(report)
    return report


def share_of(rows: int, block: int, shard: tuple[int, int] | None) -> tuple[int, int]:
    """Rows [start, stop) of a shard: whole blocks, as even as blocks allow.

    >>> [share_of(100, 16, (i, 3)) for i in (1, 2, 3)]
    [(0, 32), (32, 64), (64, 100)]
    """
    i, n = shard or (1, 1)
    if not 1 <= i <= n:
        raise CacheError(f"There is no shard {i}/{n}. wanted: i/n with 1 <= i <= n.")
    blocks = -(-rows // block)
    return min(rows, (i - 1) * blocks // n * block), min(rows, i * blocks // n * block)


def check_disk(job: Job) -> None:
    """Raise CacheError when the disk can't hold the features of a job."""
    free = free_disk(job.path.parent)
    if job.feature_bytes + DISK_RESERVE > free:
        raise CacheError(
            f"The disk of {job.path.parent} can't hold these features. Nothing was started.\n"
            f"  wanted  {human_bytes(job.feature_bytes)} for {len(job.rows)} images at "
            f"{job.recipe.frame[0]}x{job.recipe.frame[1]}, {job.recipe.dtype}\n"
            f"  found   {human_bytes(free)} free\n"
            "Choose fewer levels (--levels), a smaller --size, or another disk (featprobe --workspace DIR extract …)."
        )


def _ensure_file(job: Job, locks: RowLocks) -> int:
    """Have the job's file in place, of this very data set; returns how many rows were copied over."""
    remove_leftovers(job.path)
    if not job.path.exists():
        check_disk(job)
        create_file(job.path, job.recipe, job.info, job.rows, _provenance(job), job.whole)
    old = read_contents(job.path)
    if old.recipe.key != job.recipe.key:
        raise CacheError(
            f"{job.path} was made by another recipe.\n  wanted  key {job.recipe.key}\n  found   key {old.recipe.key}\n"
            "Nothing was changed. Remove it:  featprobe cache rm FILE"
        )
    same_parts = [row.part for row in old.rows] == [row.part for row in job.rows]
    if old.data.fingerprint == job.info.fingerprint and same_parts and old.is_intact():
        return 0
    locks.claim_all()
    check_disk(job)
    temporary = make_temporary(job.path, job.recipe, job.info, job.rows, _provenance(job), job.whole)
    try:
        copied = _copy_rows(Cache(job.path, old), temporary, job.rows)
        replace_file(temporary, job.path)
    finally:
        temporary.unlink(missing_ok=True)
    return copied


def _copy_rows(old: Cache, target: Path, rows: Sequence[Row]) -> int:
    """Copy features of images that did not change, where their bytes still hash to what was written."""
    done, stored = old.done, old.stored_checksums()
    known = {(row.image_hash, row.part, row.placement): i for i, row in enumerate(old.rows) if done[i] == WHOLE}
    wanted = [i for i, row in enumerate(rows) if (row.image_hash, row.part, row.placement) in known and not row.reason]
    copied = 0
    with CacheWriter(target) as writer:
        for start, stop in runs(np.array(wanted, dtype=np.intp), most=16):
            maps: dict[str, list[NDArray]] = {level.name: [] for level in old.levels}
            sound = []
            for i in range(start, stop):
                source = known[rows[i].image_hash, rows[i].part, rows[i].placement]
                parts = [old.read_row(source, level) for level in old.levels]
                sound.append([xxhash.xxh3_64_intdigest(p.tobytes()) for p in parts] == stored[source].tolist())
                for level, part in zip(old.levels, parts, strict=True):
                    maps[level.name].append(part)
            for a, b in runs(np.flatnonzero(sound)):
                writer.write(start + a, {name: np.stack(parts[a:b]) for name, parts in maps.items()})
                copied += b - a
    return copied


def runs(indices: NDArray[np.intp], most: int | None = None) -> Iterator[tuple[int, int]]:
    """Consecutive runs [start, stop) of ascending indices, none longer than `most`.

    >>> list(runs(np.array([1, 2, 3, 7]), most=2))
    [(1, 3), (3, 4), (7, 8)]
    """
    for run in np.split(indices, np.flatnonzero(np.diff(indices) > 1) + 1):
        step = most or max(1, len(run))
        for first in range(0, len(run), step):
            part = run[first : first + step]
            yield int(part[0]), int(part[-1]) + 1


class _Filler:
    """Computes the missing rows of a range and counts what it waits for."""

    def __init__(
        self, job: Job, writer: CacheWriter, backbone: Backbone, options: ExtractOptions, device: torch.device
    ) -> None:
        self.job, self.writer, self.backbone, self.options, self.device = job, writer, backbone, options, device
        self.done = Cache(job.path, read_contents(job.path)).done
        self.computed, self.waited_images, self.waited_disk = 0, 0.0, 0.0
        self.read = lru_cache(maxsize=IMAGES_KEPT)(read_levels)

    def fill(self, start: int, stop: int) -> None:
        """Compute every block of [start, stop) that misses a row, and write the rows it misses."""
        size = self.options.batch_size
        blocks = [(a, min(a + size, stop)) for a in range(start, stop, size)]
        blocks = [(a, b) for a, b in blocks if (self.done[a:b] == MISSING).any()]
        missing = sum(int((self.done[a:b] == MISSING).sum()) for a, b in blocks)
        bar = tqdm(total=missing, desc=self.job.recipe.label, unit="img", disable=self.options.quiet or not missing)
        behind = _WriteBehind(self.writer, self.job)
        with bar, ThreadPoolExecutor(max(1, self.options.workers)) as pool:
            try:
                for (a, b), images in self._decoded(blocks, pool):
                    wanted = np.flatnonzero(self.done[a:b] == MISSING)
                    maps, finite, ready = self._compute(a, b, images)
                    begun = time.perf_counter()
                    behind.put(a, wanted, maps, finite, ready)
                    self.waited_disk += time.perf_counter() - begun
                    self.computed += len(wanted)
                    bar.update(len(wanted))
                    rate = self.job.recipe.row_bytes * (bar.format_dict["rate"] or 0.0)
                    bar.set_postfix_str(f"{rate / 1e6:.0f} MB/s", refresh=False)
                begun = time.perf_counter()
                behind.finish()
                self.waited_disk += time.perf_counter() - begun
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                behind.stop()

    def _decoded(
        self, blocks: Sequence[tuple[int, int]], pool: ThreadPoolExecutor
    ) -> Iterator[tuple[tuple[int, int], torch.Tensor]]:
        """Blocks with their images: (block, 3, frame height, frame width), decoded ahead."""
        ahead: deque[tuple[tuple[int, int], list[Future[NDArray[np.float32]]]]] = deque()
        coming = iter(blocks)
        while True:
            while len(ahead) < AHEAD and (block := next(coming, None)) is not None:
                ahead.append((block, [pool.submit(self._decode, row) for row in range(*block)]))
            if not ahead:
                return
            block, futures = ahead.popleft()
            begun = time.perf_counter()
            images = torch.from_numpy(np.stack([self._result(block[0] + k, f) for k, f in enumerate(futures)]))
            self.waited_images += time.perf_counter() - begun
            yield block, images

    def _decode(self, row: int) -> NDArray[np.float32]:
        recipe, placement = self.job.recipe, self.job.rows[row].placement
        if self.done[row] == UNREADABLE:
            return self._blank()
        levels = self.read(self.job.images[row])
        if levels.shape[:2] != self.job.size_of(row):
            raise DataError(f"{self.job.images[row]} changed while features were made. Run the same command again.")
        shown = self.job.rows[row].show(levels)
        return frame_image(shown, placement, recipe.window, recipe.interpolation, recipe.mean, recipe.policy)

    def _result(self, row: int, future: Future[NDArray[np.float32]]) -> NDArray[np.float32]:
        """An image, or a blank in its place (so that its block stays what it is) when it can't be read."""
        try:
            return future.result()
        except DataError as error:
            if not self.options.skip_bad:
                raise skippable(error) from error
            self.writer.mark_unreadable(row, str(error))
            self.done[row] = UNREADABLE
            return self._blank()

    def _blank(self) -> NDArray[np.float32]:
        return np.zeros((3, *self.job.recipe.frame), dtype=np.float32)

    @torch.inference_mode()
    def _compute(
        self, start: int, stop: int, images: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.cuda.Event | None]:
        """Maps of a block on the host in the stored dtype, whether each row is finite, and when they are there."""
        cuda = self.device.type == "cuda"
        if cuda:
            images = images.pin_memory().to(self.device, non_blocking=True)
        else:
            images = images.to(self.device)
        amp: AbstractContextManager[Any] = nullcontext()
        if self.options.precision == "amp":
            amp = torch.autocast(self.device.type, torch.float16)
        with amp:
            features = self.backbone(images)
        dtype = TORCH_DTYPE[self.job.recipe.dtype]
        nchw = torch.contiguous_format
        maps = {n: m.to(dtype, memory_format=nchw).contiguous() for n, m in features.maps.items()}  # on the device
        finite = torch.stack([finite_rows(m) for m in maps.values()]).all(0)  # (block,)
        if not cuda:
            return {n: m.cpu() for n, m in maps.items()}, finite.cpu(), None
        host = {n: torch.empty(m.shape, dtype=dtype, pin_memory=True) for n, m in maps.items()}
        for name, m in maps.items():
            host[name].copy_(m, non_blocking=True)
        host_finite = torch.empty(finite.shape, dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return host, host_finite, ready


class _WriteBehind:
    """One thread that writes blocks while the device computes the next; its errors reach the caller."""

    def __init__(self, writer: CacheWriter, job: Job) -> None:
        self.writer, self.job = writer, job
        self.waiting: queue.Queue[tuple | None] = queue.Queue(maxsize=BEHIND)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._work, name="cache-writer", daemon=True)
        self.thread.start()

    def put(self, *block: Any) -> None:
        """Hand a block over; waits when the disk is behind. Raises what writing an earlier one raised."""
        if self.error:
            raise self.error
        self.waiting.put(block)

    def finish(self) -> None:
        """Wait until all is written; raises what writing raised."""
        self.stop()
        if self.error:
            raise self.error

    def stop(self) -> None:
        """Write what was handed over, then end the thread."""
        if self.thread.is_alive():
            self.waiting.put(None)
            self.thread.join()

    def _work(self) -> None:
        while (block := self.waiting.get()) is not None:
            if self.error is None:
                try:
                    self._write(*block)
                except BaseException as error:  # kept for the thread that computes
                    self.error = error

    def _write(
        self,
        start: int,
        wanted: NDArray[np.intp],
        maps: dict[str, torch.Tensor],
        finite: torch.Tensor,
        ready: torch.cuda.Event | None,
    ) -> None:
        if ready is not None:
            ready.synchronize()
        bad = [int(k) for k in wanted if not finite[k]]
        if bad:
            dtype = self.job.recipe.dtype
            raise OverflowsDtypeError(
                f"Features of {self.job.rows[start + bad[0]].id} are not finite in {dtype}"
                f"{', whose largest value is 65504' if dtype == 'fp16' else ''}.\n"
                "Its block was not written; rows that were whole stay whole.\n"
                "Store them in a wider format:  featprobe extract … --dtype bf16   (or fp32)"
            )
        arrays = {name: stored_array(m) for name, m in maps.items()}
        for a, b in runs(wanted):
            self.writer.write(start + a, {name: array[a:b] for name, array in arrays.items()})


def finite_rows(m: torch.Tensor) -> torch.Tensor:
    """Whether each row holds finite values only: (rows,), bool.

    m: (rows, …), fp16, bf16 or fp32. A value is infinite or nan when all bits of its exponent are set;
    testing them is several times faster on CPUs than torch.isfinite.
    """
    integer, exponent = EXPONENT[m.dtype]
    return ((m.view(integer) & exponent) != exponent).flatten(1).all(1)


def stored_array(m: torch.Tensor) -> NDArray:
    """A map as the cache stores it; bf16 as the 16 bits it is made of."""
    return (m.view(torch.int16) if m.dtype == torch.bfloat16 else m).numpy()


def speed_text(report: ExtractReport) -> str:
    """What an extraction did, for a person: counts, speed, and what waited for what."""
    counts = counted(report.rows, "image")
    if report.rows != report.images:
        counts = f"{counted(report.rows, 'part')} of {counted(report.images, 'image')}"
    if report.copied:
        counts += f", {report.copied} copied from the cache of the set as it was"
    if not report.computed and not report.missing:
        return f"{report.path}: complete ({counts}); nothing to do"
    run = report.seconds["run"]
    lines = [
        f"{report.path}: {report.computed} of {counts} computed in {run:.1f} s on {report.device} "
        f"({report.computed / run:.1f} img/s, {human_bytes(report.bytes_written / run)}/s); "
        f"before that {report.seconds['load']:.1f} s for weights, {report.seconds['look']:.1f} s to look at the data"
    ]
    if report.seconds["wait_disk"] > 0.1 * run:
        lines.append(f"The disk was what waited: {report.seconds['wait_disk'] / run:.0%} of the time.")
    if report.seconds["wait_images"] > 0.1 * run:
        share = report.seconds["wait_images"] / run
        lines.append(f"Decoding images was what waited: {share:.0%} of the time; try more --workers.")
    if report.missing:
        lines.append(
            f"{counted(report.missing, 'row is', 'rows are')} still missing: other shards make them, "
            "or run this again without --shard."
        )
    return "\n".join(lines)


def _own_shard() -> tuple[int, int]:
    """This process's shard under torchrun."""
    rank, count = launched()
    return rank + 1, count


def command_of(spec: BackboneSpec, data: str, options: ExtractOptions) -> str:
    """The command line that makes the same cache.

    >>> command_of(BackboneSpec("embedded", "m"), "xray", ExtractOptions(size=(64, 96), skip_bad=True))
    'featprobe extract --backbone embedded --data xray --size 64x96 --skip-bad'
    """
    words = ["featprobe", "extract", *(spec.arguments or ("--backbone", spec.label)), "--data", data]
    if options.levels:
        words += ["--levels", ",".join(options.levels)]
    if options.size:
        words += ["--size", f"{options.size[0]}x{options.size[1]}"]
    names = ("format", "group_from", "split_file", "fit", "intensity", "batch_size", "dtype", "precision")
    for name in (*names, "tile", "overlap", "empty_tiles"):
        value = getattr(options, name)
        if value != getattr(ExtractOptions, name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    words += [] if options.views is None else ["--views", ",".join(options.views) or "none"]
    return shlex.join([*words, *(["--skip-bad"] if options.skip_bad else [])])


def _placed(spec: BackboneSpec) -> BackboneSpec:
    """The spec with a weights file's whole path, so that it can be found from anywhere."""
    return spec if spec.weights is None else replace(spec, weights=str(Path(spec.weights).resolve()))


def _provenance(job: Job) -> dict[str, Any]:
    packages = ("torch", "timm", "numpy", "h5py")
    return {
        "command": job.command,
        "read_as": dict(job.read_as),
        "backbone": asdict(job.spec),
        "featprobe": __version__,
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _log_run(report: ExtractReport) -> None:
    """Keep what an extraction cost beside its file, a JSON line a run."""
    values = asdict(report) | {"path": report.path.name, "ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    with report.path.with_suffix(".runs.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(values) + "\n")
