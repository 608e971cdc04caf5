"""A training from its labels to saved heads: it is fitted, the best on validation is scored on test once, and kept."""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from featprobe.datasets.images.reading import hash_image, read_levels, unit_of
from featprobe.errors import DataError
from featprobe.io.disk import in_use, remove_leftovers
from featprobe.metrics.defects.records import Records
from featprobe.probes import Head, append_row, make_folder, plain, save_head
from featprobe.processes import from_main, is_main
from featprobe.report.sheets import Panel, save_sheet
from featprobe.specs import CacheDtype
from featprobe.stages.extraction.run_log import extraction_seconds
from featprobe.stages.recording.base import record_validation
from featprobe.stages.recording.record_file import RECORDS, record_bytes
from featprobe.stages.row_images import rows_showing
from featprobe.stages.tasks.task import Outcome, Source
from featprobe.stages.training.fit import Fitted, Say, checkpoint_of, fit, kept
from featprobe.stages.training.forecast import Forecast, foresee
from featprobe.stages.training.prepared import Prepared, guarded, keep_on_device, prepare, source_of, trials_of
from featprobe.stages.training.row_and_card import card_of, curve_json, row_of
from featprobe.stages.training.training import Training


@dataclass(frozen=True)
class Finished:
    """A training that was run. rows: what is kept of each seed in results.jsonl."""

    prepared: Prepared
    fitted: Fitted
    rows: list[dict[str, Any]]

    @property
    def notes(self) -> list[str]:
        """What a user should know."""
        return self.prepared.notes


@dataclass(frozen=True)
class Scored:
    """What the heads of a training score on test. records: of each, None where nothing says what a defect is. seconds:
    of scoring, without recording.
    """

    outcomes: Sequence[Outcome]
    records: Sequence[Records | None]
    seconds: float


def run(training: Training, say: Say = lambda line: None, forecast: Forecast | None = None) -> Finished:
    """Train on train, choose on val, score the chosen on test once; write heads, cards, curves, result rows.

    Several processes do that together; the main one alone writes. say: gets how long it will take, where no forecast is
    given. Raises FeatprobeError.
    """
    with guarded(training), ExitStack() as held:
        prepared = prepare(training)
        begun = time.perf_counter()
        for seed in training.seeds if is_main() else ():
            make_folder(training.folder / f"seed{seed}")  # now, and not after an hour of training
            held.enter_context(in_use(training.folder / f"seed{seed}"))
        trials = trials_of(prepared)
        _note_absent(prepared, trials[0].head)
        with source_of(prepared, trials[0].head) as source:
            fitted = fit(prepared, trials, source, say, forecast)
            sha256 = _take_backbone(source, fitted)
            prepared.notes.extend(settle(prepared, fitted, source))
            trained = time.perf_counter()
            scored = score(prepared, fitted, source)
        seconds = {
            "train": trained - begun + fitted.seconds_before,
            "test": scored.seconds,
            "extract": extraction_seconds(prepared.cache) if training.regime == "frozen" else None,
        }
        rows = from_main(lambda: keep(prepared, fitted, scored, seconds, sha256))
        return Finished(prepared, fitted, rows)


def validated(training: Training, forecast: Forecast | None = None) -> list[float]:
    """Train, choose on validation, and return each seed's score there; keeps no head, scores nothing on test."""
    with guarded(training):
        prepared = prepare(training)
        trials = trials_of(prepared)
        with source_of(prepared, trials[0].head) as source:
            fitted = fit(prepared, trials, source, lambda line: None, forecast, rehearsal=True)
        states = [checkpoint_of(prepared, index, rehearsal=True) for index in range(len(trials))]
        for state in states if is_main() else ():
            if state is not None:
                state.path.unlink(missing_ok=True)
        points = [kept(training, trials[i], fitted.curves[i]) for i in fitted.chosen]
        return [point.scores[training.chooses_by] for point in points]


def judged(training: Training, as_dtype: CacheDtype | None = None) -> list[Outcome]:
    """Train on cached features, choose on validation, and score each seed's head there, image by image.

    Keeps no head, and looks at no label of test. as_dtype: what the features are brought to first.
    """
    with guarded(training):
        prepared = prepare(training)
        trials = trials_of(prepared)
        with source_of(prepared, trials[0].head, as_dtype) as source:
            fitted = fit(prepared, trials, source, lambda line: None)
            return prepared.evaluate([trial.head for trial in fitted.best], source, prepared.rows["val"])


def foreseen(training: Training) -> Forecast:
    """How long training will take, from a few steps; raises ProbeError where one does not fit the memory."""
    with guarded(training):
        prepared = prepare(training)
        trials = trials_of(prepared)
        with source_of(prepared, trials[0].head) as source:
            keep_on_device(prepared, source)
            return foresee(prepared, trials, source)


def settle(prepared: Prepared, fitted: Fitted, source: Source) -> list[str]:
    """Set what the chosen heads choose on validation; returns notes."""
    heads, val = [trial.head for trial in fitted.best], prepared.rows["val"]
    return prepared.portions.do(lambda batches: prepared.task.settle(heads, batches, val), source.batches)


def score(prepared: Prepared, fitted: Fitted, source: Source) -> Scored:
    """What the head of each seed finds on validation, and then on test, where the same pass scores it."""
    heads, test = [trial.head for trial in fitted.best], prepared.rows["test"]
    recording = record_validation(prepared, heads, source)
    begun = time.perf_counter()
    outcomes = prepared.evaluate(heads, source, test, recording.test if recording else None)
    seconds = time.perf_counter() - begun
    if recording is None:
        return Scored(outcomes, [None] * len(heads), seconds)
    prepared.notes.extend(recording.notes)
    return Scored(outcomes, recording.records(), seconds - recording.test.seconds)


def keep(
    prepared: Prepared, fitted: Fitted, scored: Scored, seconds: Mapping[str, Any], sha256: str = ""
) -> list[dict[str, Any]]:
    """Write the chosen heads and their rows; returns the rows. sha256: of the backbone that was trained."""
    training, rows = prepared.training, []
    for index, outcome, records in zip(fitted.chosen, scored.outcomes, scored.records, strict=True):
        trial = fitted.trials[index]
        row = row_of(prepared, fitted, index, outcome, seconds)
        own = [i for i, other in enumerate(fitted.trials) if other.seed == trial.seed]
        curves = [curve_json(fitted.trials[i].recipe, fitted.curves[i], i == index) for i in own]
        files = {**outcome.files, "curves.json": json.dumps(plain(curves)).encode()}
        card = card_of(prepared, fitted, index, row, sha256)
        beside = partial(_beside, records)
        save_head(training.folder / f"seed{trial.seed}", trial.head, card, files, fitted.backbone, beside)
        append_row(training.workspace.probes / "results.jsonl", row)
        rows.append(row)
    forget(training)
    return rows


def _beside(records: Records | None, head_sha256: str) -> dict[str, bytes]:
    """The files that lie beside a head without being part of it."""
    if records is None:
        return {}
    return {RECORDS: record_bytes(replace(records, about=replace(records.about, head_sha256=head_sha256)))}


def forget(training: Training) -> None:
    """Remove what a kill right after the end of trainings leaves: their state, and what was being written."""
    for folder in training.folders:
        forget_in(training.workspace.probes / folder)


def forget_in(folder: Path) -> None:
    """The same in the folder of a head that is whole."""
    for path in folder.glob("checkpoint*"):
        path.unlink(missing_ok=True)
    remove_leftovers(folder)


def draw_sheet(finished: Finished, count: int) -> Path:
    """Write a sheet image | truth | prediction of test images, as the task chooses them."""
    prepared, head = finished.prepared, finished.fitted.best[0].head
    training, cache = prepared.training, prepared.cache
    with guarded(training), source_of(prepared, head) as source:
        _take_backbone(source, finished.fitted)
        test = prepared.rows["test"]
        chosen = prepared.task.shown(head, source.batches, test, count)
        panels = []
        for image, draw in prepared.task.panels(head, source.batches, rows_showing(cache, test, chosen)):
            path = Path(cache.data.root) / cache.images.texts["image"][image]
            if hash_image(path) != cache.images.texts["image_hash"][image]:
                raise DataError(f"{path} is not the image that {cache.path} was made from")
            pixels = unit_of(read_levels(path), cache.recipe)
            panels.append((cache.images.texts["id"][image], [Panel(pixels), *draw(pixels)]))
    path = training.folder / f"seed{training.seeds[0]}" / "sheet.png"
    save_sheet(path, panels, ["image", "truth", f"prediction ({cache.recipe.label})"], prepared.task.colours)
    return path


def _note_absent(prepared: Prepared, head: Head) -> None:
    absent = [name for name, count in prepared.task.train_counts(head).items() if not count]
    if absent:
        prepared.notes.append(f"{prepared.cache.data.name}: no training example of {', '.join(absent)}")


def _take_backbone(source: Source, fitted: Fitted) -> str:
    """Let a source compute with the backbone that was trained, and hash it; "" where none was."""
    if not fitted.backbone or source.backbone is None:
        return ""
    from featprobe.backbones.weights import weights_sha256

    source.backbone.model.load_state_dict(fitted.backbone)
    source.backbone.eval()
    return weights_sha256(source.backbone.model)
