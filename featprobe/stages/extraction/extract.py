"""Images to cache: decode ahead, compute on the device, write behind; stop and go on at will."""

import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from featprobe.backbones.backbone import Backbone, load_backbone
from featprobe.backbones.given import at_hand
from featprobe.cache import (
    MISSING,
    UNREADABLE,
    WHOLE,
    Cache,
    CacheWriter,
    Row,
    RowLocks,
    checksum,
    create_file,
    make_temporary,
    read_contents,
    replace_file,
)
from featprobe.datasets import DataSet
from featprobe.errors import CacheError, FeatprobeError, counted
from featprobe.io.disk import remove_leftovers
from featprobe.machine import human_bytes
from featprobe.processes import launched, pick_device
from featprobe.specs import BackboneSpec
from featprobe.stages.extraction import cache_precision
from featprobe.stages.extraction.extract_options import ExtractOptions, configured
from featprobe.stages.extraction.job import Job, check_disk, prepare, provenance, read_already, read_set
from featprobe.stages.extraction.pipeline import Filler, runs
from featprobe.stages.extraction.run_log import log_run, tf32_doubt
from featprobe.stages.extraction.same_network import check_same
from featprobe.stages.extraction.settled import Asked, Settled, answers_to, ask, keep
from featprobe.stages.memory import failing
from featprobe.stages.workspace import AnySet, Workspace


@dataclass(frozen=True)
class ExtractReport:
    """The report of an extraction. seconds: load, look, run, and what `run` waited for: images, disk.

    On CUDA the memory that waits for the disk is held while features are computed, too: that time counts there as well.
    And how long each part of `run` would have taken with nothing to wait for: network, decoding, copying (from the
    device, 0 where there is none), writing.
    rows: tiles and views, or else images; images: that they show. by_times: the data set was not read, since its files
    have the sizes and times of last time.
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
    by_times: bool = False

    def __repr__(self) -> str:
        states = {"computed": self.computed, "copied": self.copied, "missing": self.missing}
        said = [f"{count} {state}" for state, count in states.items() if count]
        said += [f"{len(self.unreadable)} unreadable"] if self.unreadable else []
        done = ", ".join(said) or "nothing to do"
        return f"ExtractReport({counted(self.rows, 'row')}: {done}; {str(self.path)!r})"


def extract(
    workspace: Workspace,
    backbone: BackboneSpec | nn.Module | str,
    data: AnySet,
    options: ExtractOptions | None = None,
) -> ExtractReport:
    """Make, go on with, repair or refresh the cache of a data set under a backbone.

    backbone: a name, what `Workspace.backbone` gives, or a module of your own, see `backbones.adapted.OwnBackbone`. A
    copy of the module is used: it stays as it is. data: a name, a path, or a data set, which is taken as it is. Raises
    FeatprobeError; whatever was whole before stays whole.
    """
    if isinstance(backbone, BackboneSpec):
        return _extract(workspace, backbone, data, options)
    with at_hand(backbone) as (name,):
        return _extract(workspace, workspace.backbone(name), data, options)


def _extract(workspace: Workspace, spec: BackboneSpec, data: AnySet, options: ExtractOptions | None) -> ExtractReport:
    data_name, options = workspace.data_called(data), options or ExtractOptions()
    if isinstance(data, DataSet):
        options = read_already(options, data)
    options = configured(options, workspace.data_options(data_name))
    if launched()[0]:
        options = replace(options, quiet=True)  # one progress bar is enough
    begun = time.perf_counter()
    device = pick_device(options.device)
    with failing(device, "Rows that were whole stay whole. Run the same command again."):
        return _extract_on(device, workspace, spec, data, options, begun)


def _extract_on(
    device: torch.device,
    workspace: Workspace,
    spec: BackboneSpec,
    data: AnySet,
    options: ExtractOptions,
    begun: float,
) -> ExtractReport:
    data_name = workspace.data_called(data)
    asked = None if isinstance(data, DataSet) else ask(workspace, spec, data_name, options, device.type)
    backbone = None
    for found in [] if options.rehash or asked is None else answers_to(asked):
        backbone = backbone or load_backbone(spec, options.levels, device)
        if report := _nothing_to_do(found, backbone, options, device, begun):
            return report
    data = data if isinstance(data, DataSet) else read_set(workspace, data_name, options)
    backbone = backbone or load_backbone(spec, options.levels, device)
    return extract_with(workspace, backbone, data, options, device, time.perf_counter() - begun, asked)


def extract_with(
    workspace: Workspace,
    backbone: Backbone,
    data: DataSet,
    options: ExtractOptions,
    device: torch.device,
    load_seconds: float = 0.0,
    asked: Asked | None = None,
) -> ExtractReport:
    """`extract` with a backbone and a data set that are loaded already.

    asked: where given, and all rows are whole in the end, it is kept that this was the answer.
    """
    begun = time.perf_counter()
    job = prepare(workspace, backbone, data, options, device)
    start, stop = share_of(len(job.rows), options.batch_size, options.shard or _own_shard())
    look_seconds = time.perf_counter() - begun
    with RowLocks(job.path) as locks:
        locks.wait_for_creation()
        if backbone.spec.is_own and job.path.exists():
            check_same(Cache(job.path, read_contents(job.path)), backbone, device)
        copied = _ensure_file(job, locks)
        locks.release()
        locks.claim(start, stop)
        locks.end_creation()
        begun = time.perf_counter()
        with CacheWriter(job.path) as writer:
            filler = Filler(job, writer, backbone, options, device)
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
            **filler.busy.alone(max(1, options.workers)),
        },
        notes=(*job.info.notes, *job.notes),
        device=str(device),
        images=len(job.surveyed.found),
    )
    if report.computed:
        log_run(report.path, asdict(report))
    if asked and (done == WHOLE).all():  # what can't be read may be readable next time
        keep(asked, cache, data, job.info.notes)
    return report


def _nothing_to_do(
    found: Settled, backbone: Backbone, options: ExtractOptions, device: torch.device, begun: float
) -> ExtractReport | None:
    """The report on a cache that is whole, intact, of this backbone, and in the precision that is meant, else None."""
    try:
        cache = Cache(found.path, read_contents(found.path))
        contents, folder = cache.contents, found.path.parent
        data = contents.data.fingerprint
        meant, notes = cache_precision.settle_precision(cache.recipe, options.precision, device, folder, data)
    except FeatprobeError:  # reading the set tells more of it
        return None
    same = (contents.identity_sha256, cache.recipe.weights_sha256, cache.levels) == (
        found.identity_sha256,
        backbone.sha256,
        backbone.levels,
    )
    if meant != cache.recipe or not same or not (cache.done == WHOLE).all() or not contents.is_intact():
        return None
    check_same(cache, backbone, device)
    return ExtractReport(
        path=found.path,
        rows=len(cache),
        computed=0,
        copied=0,
        missing=0,
        unreadable=(),
        bytes_written=0,
        seconds={"load": time.perf_counter() - begun, "look": 0.0, "run": 0.0, "wait_images": 0.0, "wait_disk": 0.0},
        notes=(*found.notes, *notes),
        device=str(device),
        images=len(cache.images),
        by_times=True,
    )


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


def _ensure_file(job: Job, locks: RowLocks) -> int:
    """Have the job's file in place, of this very data set; returns how many rows were copied over."""
    remove_leftovers(job.path.parent, job.path.stem)
    if not job.path.exists():
        check_disk(job)
        create_file(job.path, job.recipe, job.info, job.rows, provenance(job), job.whole)
    old = read_contents(job.path)
    if old.recipe.key != job.recipe.key:
        raise CacheError(
            f"{job.path} was made by another recipe.\n  wanted  key {job.recipe.key}\n  found   key {old.recipe.key}\n"
            "Nothing was changed. Remove it:  featprobe cache rm FILE"
        )
    same_parts = [old.rows.part_of(i) for i in range(len(old.rows))] == [row.part for row in job.rows]
    same = old.data.fingerprint == job.info.fingerprint and same_parts and old.is_intact()
    if not same or (Cache(job.path, old).done == MISSING).any():
        _refuse_tf32(job)
    if same:
        return 0
    locks.claim_all()
    check_disk(job)
    made, doubt = provenance(job), tf32_doubt(job.path)
    if doubt:  # rows that are copied stay what they are
        made["may_hold_tf32"] = doubt.text
    temporary = make_temporary(job.path, job.recipe, job.info, job.rows, made, job.whole)
    try:
        copied = _copy_rows(Cache(job.path, old), temporary, job.rows)
        replace_file(temporary, job.path)
    finally:
        temporary.unlink(missing_ok=True)
    return copied


def _refuse_tf32(job: Job) -> None:
    """Raise CacheError where rows that are there may hold TF32, beside which none without it may stand."""
    doubt = tf32_doubt(job.path)
    if doubt and (doubt.on_record or torch.cuda.is_available()):
        raise CacheError(
            f"{job.path} is not complete, and holds rows that an older featprobe may have computed in TF32.\n"
            f"  wanted  rows of fp32 without TF32, within 1e-4 of their true values\n  found   {doubt.text}\n"
            f"Nothing was changed. Begin anew:  featprobe cache rm {shlex.quote(str(job.path))} --yes && {job.command}"
        )


def _copy_rows(old: Cache, target: Path, rows: Sequence[Row]) -> int:
    """Copy features of images that did not change, where their bytes still hash to what was written.

    None where what says which row is which is damaged: all that is hashed on opening. Damaged labels do no harm.
    """
    if old.contents.damaged:
        return 0
    done, expected = old.done, old.stored_checksums()
    hashes = old.rows.column("image_hash")
    of = {i: (hashes[i], old.rows.part_of(i), old.rows.placement(i)) for i in np.flatnonzero(done == WHOLE).tolist()}
    known = {shown: i for i, shown in of.items()}
    source = [known.get((row.image_hash, row.part, row.placement), -1) if not row.reason else -1 for row in rows]
    copied = 0
    with CacheWriter(target) as writer:
        for start, stop in runs(np.flatnonzero(np.array(source) >= 0), most=16):
            maps: dict[str, list[NDArray]] = {}
            sound = []
            for row in source[start:stop]:
                kept = [old.stored(row, level) for level in old.levels]
                sound.append([checksum(list(own.values())) for own in kept] == expected[row].tolist())
                for key, array in (pair for own in kept for pair in own.items()):
                    maps.setdefault(key, []).append(array)
            for a, b in runs(np.flatnonzero(sound)):
                writer.write(start + a, {name: np.stack(parts[a:b]) for name, parts in maps.items()})
                copied += b - a
    return copied


def speed_text(report: ExtractReport) -> str:
    """The report of an extraction, for a person: counts, speed, and what waited for what."""
    counts = counted(report.rows, "image")
    if report.rows != report.images:
        counts = f"{counted(report.rows, 'part')} of {counted(report.images, 'image')}"
    bad = f", {len(report.unreadable)} unreadable" if report.unreadable else ""
    copied = f"; {report.copied} copied from the cache of the set as it was" if report.copied else ""
    if not report.computed and not report.missing:
        if copied:
            return f"{report.path}: complete ({counts}{bad}); the set changed: written anew, none computed{copied}"
        text = f"{report.path}: complete ({counts}{bad}); nothing to do"
        return f"{text}: files have the sizes and times of last time (--rehash reads them)" if report.by_times else text
    run = report.seconds["run"]
    lines = [
        f"{report.path}: {report.computed} of {counts} computed in {run:.1f} s on {report.device} "
        f"({report.computed / run:.1f} img/s, {human_bytes(report.bytes_written / run)}/s){copied}; "
        f"before that {report.seconds['load']:.1f} s for weights, {report.seconds['look']:.1f} s to look at the data"
    ]
    lines += [_limit_text(report)] if report.computed else []
    if report.missing:
        lines.append(
            f"{counted(report.missing, 'row is', 'rows are')} still missing: other shards make them, "
            "or run this again without --shard."
        )
    return "\n".join(lines)


TIMED = {"network": "the backbone", "decoding": "decoding", "copying": "copying to the host", "writing": "the disk"}


def _limit_text(report: ExtractReport) -> str:
    """The part of an extraction that was its limit, and the rate of each part without waiting."""

    def rate(part: str) -> str:
        seconds = report.seconds[part]
        if part in ("network", "decoding"):
            return f"{TIMED[part]} at {report.computed / seconds:.0f} img/s"
        return f"{TIMED[part]} at {human_bytes(report.bytes_written / seconds)}/s"

    known = sorted((part for part in TIMED if report.seconds[part]), key=lambda part: -report.seconds[part])
    more = "; try more --workers" if known[0] == "decoding" else ""
    return f"The limit was {rate(known[0])}{more}. By themselves: {', '.join(rate(part) for part in known[1:])}."


def _own_shard() -> tuple[int, int]:
    """This process's shard under torchrun."""
    rank, count = launched()
    return rank + 1, count
