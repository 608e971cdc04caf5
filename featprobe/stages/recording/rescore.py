"""Records of heads that were scored without them, or by another rule: made from the cache and the saved head alone."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from featprobe.cache import Cache
from featprobe.errors import CacheError, FeatprobeError, ProbeError
from featprobe.metrics.defects.records import FoundRule
from featprobe.probes import Head, load_head
from featprobe.probes.saved import head_folder
from featprobe.processes import pick_device
from featprobe.result_rows import ResultRow
from featprobe.stages.extraction.command_line import command_of_card
from featprobe.stages.memory import fitting
from featprobe.stages.partition import Partition, single_splits
from featprobe.stages.recording.base import USUAL_RULE, record_validation
from featprobe.stages.recording.record_file import RECORDS, write_records
from featprobe.stages.tasks.task import Source
from featprobe.stages.training.asked import as_trained, caches_by_key, no_cache
from featprobe.stages.training.prepared import Prepared, prepare, source_of
from featprobe.stages.training.probe_options import ProbeOptions, Tuning
from featprobe.stages.training.saved_results import card_beside
from featprobe.stages.training.training import Training
from featprobe.stages.workspace import Workspace

KEPT = "Records that were written stay. The same command makes them all again."


@dataclass(frozen=True)
class _Saved:
    """A saved head, whole. card: beside it."""

    row: ResultRow
    folder: Path
    card: Mapping[str, Any]

    @property
    def pass_over(self) -> tuple[Any, ...]:
        """The same for heads that are scored in one pass: of one training, unless each has a backbone of its own."""
        own = self.row.seed if self.row.tuning else None
        return self.folder.parent, own


def rescore(
    workspace: Workspace,
    rows: Sequence[ResultRow],
    rule: FoundRule | None = None,
    *,
    device: str | None = None,
    quiet: bool = False,
) -> list[str]:
    """Write defects.parquet beside the head of each row, as scoring writes it; returns notes.

    Features come from the cache, or for a head with a live backbone from the images and that backbone. rule: of when a
    defect is found; None for the usual one. A head whose cache, images or backbone are not here is passed over, and a
    note says what it lacks.
    """
    caches, passes, notes = caches_by_key(workspace), dict[Any, list[_Saved]](), list[str]()
    for row in rows:
        try:
            one = _Saved(row, head_folder(workspace.probes, row), card_beside(workspace.probes, row, hashes=True))
            passes.setdefault(one.pass_over, []).append(one)
        except FeatprobeError as error:
            notes.append(_left_aside(row, error))
    for saved in passes.values():
        row = saved[0].row
        try:
            cache = _cache_of(workspace, caches, saved[0])
            training = _training(workspace, cache, saved, device, quiet)
            with fitting(training.device, KEPT):
                notes += _rescored(training, saved, rule or USUAL_RULE)
        except FeatprobeError as error:
            notes += [_left_aside(one.row, error) for one in saved]
    return list(dict.fromkeys(notes))


def _rescored(training: Training, saved: Sequence[_Saved], rule: FoundRule) -> list[str]:
    """Write the records of heads of one training; returns notes."""
    prepared, features = prepare(training), training.features if training.regime != "full" else None
    known = len(prepared.notes)
    heads = [load_head(one.folder, features, whole=True)[0].to(training.device) for one in saved]
    with _source(prepared, saved[0], heads[0]) as source:
        recording = record_validation(prepared, heads, source, rule)
        if recording is None:
            raise ProbeError(
                "no label of its images says which are good, so it has no score of a defect. Name the good one, "
                'good = "NAME" in featprobe.toml, extract again (features are copied), and train the head again'
            )
        prepared.evaluate(heads, source, prepared.rows["test"], recording.test)
    for one, records in zip(saved, recording.records(), strict=True):
        about = replace(records.about, head_sha256=one.card["head_sha256"])
        write_records(one.folder / RECORDS, replace(records, about=about))
    return [*prepared.notes[known:], *recording.notes]


def _source(prepared: Prepared, saved: _Saved, head: Head) -> AbstractContextManager[Source]:
    """Where the features for a head come from: the cache's file, or its images and the head's own backbone."""
    training = prepared.training
    if training.tuning is None:
        return source_of(prepared, head)
    from featprobe.stages.predictor import backbone_of  # timm and torchvision, which stored features do not need
    from featprobe.stages.training.live import LiveFeatures

    return LiveFeatures(
        prepared.cache, backbone_of(saved.folder, saved.card, head.levels, None, training.device), training.device,
        prepared.task.truth_of, masks=prepared.task.masks, workers=training.tuning.workers,
        precision=training.precision,
    )  # fmt: skip


def _training(workspace: Workspace, cache: Cache, saved: Sequence[_Saved], device: str | None, quiet: bool) -> Training:
    """The training that made some heads, as far as scoring them goes."""
    row = saved[0].row
    options = ProbeOptions(
        device=device, quiet=quiet, shared_order=row.shared_order, tuning=_tuning(row, pick_device(device))
    )
    (choice,) = single_splits(row.choice)
    return Training(
        workspace, Partition(cache, choice), row.task, as_trained(row, saved[0].card, options),
        tuple(one.row.seed for one in saved), row.fraction,
    )  # fmt: skip


def _tuning(row: ResultRow, device: torch.device) -> Tuning | None:
    """What is done with images and backbone; on another kind of device than trained it, in float32."""
    if row.tuning is None:
        return None
    there = row.device.split(":")[0] == device.type
    precision = row.tuning.precision if there else "fp32"
    values: dict[str, Any] = {"regime": row.tuning.regime, "augment": row.tuning.augment, "precision": precision}
    return Tuning(**values)


def _cache_of(workspace: Workspace, caches: Mapping[tuple[str, str], Cache], saved: _Saved) -> Cache:
    """The cache that a head was trained from; raises CacheError where it is not here, or not whole."""
    row = saved.row
    cache = caches.get((row.feature_key, row.data_fingerprint))
    if cache is None:
        again = command_of_card(saved.card, row.data, {})
        raise CacheError(f"{no_cache(workspace)}. Make it again:  {again}")
    cache.usable()
    return cache


def _left_aside(row: ResultRow, error: FeatprobeError) -> str:
    return f"no records of {row.folder}: {' '.join(str(error).splitlines())}"
