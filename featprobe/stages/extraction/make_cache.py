"""Images to cache: decode ahead, compute on the device, write behind; stop and go on at will."""

import shlex
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from featprobe.backbones.backbone import Backbone, load_backbone
from featprobe.backbones.models import takes_named_file
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
from featprobe.errors import CacheError
from featprobe.io.disk import remove_leftovers
from featprobe.machine import launched
from featprobe.processes import pick_device
from featprobe.specs import BackboneSpec
from featprobe.stages.extraction.decoding import Decoders, processes_decode
from featprobe.stages.extraction.extract_options import ExtractOptions
from featprobe.stages.extraction.job import Job, check_disk, prepare, provenance, read_set
from featprobe.stages.extraction.pipeline import Filler, runs
from featprobe.stages.extraction.run_log import ExtractReport, log_run, tf32_doubt
from featprobe.stages.extraction.same_network import check_same
from featprobe.stages.extraction.settled import (
    Asked,
    answers_to,
    keep,
    keep_weights,
    listing_of,
    nothing_to_do,
    open_whole,
)
from featprobe.stages.memory import failing
from featprobe.stages.workspace import AnySet, Workspace


def make(
    workspace: Workspace,
    spec: BackboneSpec,
    data: AnySet,
    options: ExtractOptions,
    asked: Asked | None,
    begun: float,
) -> ExtractReport:
    """`extract`, with the network loaded. asked: what is asked for, None for a set that was read already.

    options: with what featprobe.toml says. begun: on `time.perf_counter`.
    """
    device = pick_device(options.device)
    with failing(device, "Rows that were whole stay whole. Run the same command again."):
        if asked and not takes_named_file(spec):
            asked = replace(asked, weights_listing="")
        backbone = None
        if asked and not options.rehash:
            for found in answers_to(asked):
                if held := open_whole(found, options.precision, str(device)):
                    cache, notes = held
                    backbone = backbone or load_backbone(spec, options.levels, device)
                    if (cache.recipe.weights_sha256, cache.levels) == (backbone.sha256, backbone.levels):
                        check_same(cache, backbone, device)
                        keep_weights(asked, found)
                        return nothing_to_do(found, cache, notes, str(device), begun)
        if asked and not asked.listing:  # files that were made just before are older after torch is loaded
            asked = replace(asked, listing=listing_of(asked.places))
        data = data if isinstance(data, DataSet) else read_set(workspace, workspace.data_called(data), options)
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
    with ExitStack() as stack:  # they get ready while the data set is looked at
        decoders = None
        if processes_decode(options, device):
            decoders = stack.enter_context(closing(Decoders(options.workers)))
        return _extract(workspace, backbone, data, options, device, load_seconds, asked, decoders)


def _extract(
    workspace: Workspace,
    backbone: Backbone,
    data: DataSet,
    options: ExtractOptions,
    device: torch.device,
    load_seconds: float,
    asked: Asked | None,
    decoders: Decoders | None,
) -> ExtractReport:
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
            filler = Filler(job, writer, backbone, options, device, decoders)
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
            "wait_images": filler.images.waited,
            "wait_disk": filler.waited_disk,
            **filler.busy.alone(max(1, options.workers)),
        },
        notes=(*job.info.notes, *job.notes, *filler.images.notes),
        device=str(device),
        images=len(job.surveyed.found),
    )
    if report.computed:
        log_run(report.path, asdict(report))
    if asked and (done == WHOLE).all():  # what can't be read may be readable next time
        keep(asked, cache, data, job.info.notes)
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


def _own_shard() -> tuple[int, int]:
    """This process's shard under torchrun."""
    rank, count = launched()
    return rank + 1, count
