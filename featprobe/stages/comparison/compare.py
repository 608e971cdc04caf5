"""Scored heads to an answer: tables with intervals, paired differences, curves, a page."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featprobe import __version__
from featprobe.cache import open_cache
from featprobe.errors import FeatprobeError, ProbeError, counted
from featprobe.io.disk import write_together
from featprobe.io.fields import plain
from featprobe.metrics import score_interval
from featprobe.metrics.images import value_of
from featprobe.probes.saved import head_folder
from featprobe.report.answer import SURE, answer_of, behind_sentences, gap_sentences
from featprobe.report.comparison import difference_frame, result_frame
from featprobe.report.facts import cost_sentence, data_sentence, point_sentence
from featprobe.report.findings.defect_answer import defect_sentences, leading
from featprobe.report.page import Answer, PageSet, page_text
from featprobe.report.tables import csv_text
from featprobe.scores import FEW_GROUPS, SCORES
from featprobe.specs import digest
from featprobe.stages.commands import commands_of, level_command, unusual_settings
from featprobe.stages.comparison.convergence import SHARES, iterations_to, late_rise, still_rising
from featprobe.stages.comparison.differences import (
    Line,
    Table,
    budget_unchecked,
    corrected,
    differences_of,
    modality_gaps,
)
from featprobe.stages.comparison.found import Findings, findings_of, names_without_records, pictures_of, probability_of
from featprobe.stages.comparison.next_steps import next_steps
from featprobe.stages.comparison.recipes import told_apart
from featprobe.stages.comparison.results import Result, Unusable, comparable_sets, load_results
from featprobe.stages.comparison.supervision import behind_supervised
from featprobe.stages.comparison.tested import good_units
from featprobe.stages.partition import partition_of
from featprobe.stages.progress import Progress
from featprobe.stages.workspace import Workspace

FEW_OF_A_SIDE = 8  # test groups with a defect, or with a good image


@dataclass(frozen=True)
class ComparedSet:
    """Results that may stand in one table.

    lines: a dict per result, scores in [0, 1]. differences: a dict per pair that was asked about, p values corrected
    for those of all sets together. sheets: captions and picture sheets that are there. commands: that made the results.
    findings: a dict per head that has records of what it finds. found_differences: of what two of them find.
    """

    title: str
    lines: tuple[Line, ...]
    differences: tuple[Line, ...]
    sheets: tuple[tuple[str, Path], ...]
    commands: tuple[str, ...]
    findings: tuple[Line, ...] = ()
    found_differences: tuple[Line, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """What all results of a workspace say.

    answer: titles, and sentences in plain language of each. gaps: modality gaps that were asked for. behind: how far
    heads that saw good images alone stand behind supervised ones. unusable: rows that could not be used, and why.
    files: that were written.
    """

    answer: tuple[tuple[str, tuple[str, ...]], ...]
    sets: tuple[ComparedSet, ...]
    gaps: tuple[Line, ...]
    behind: tuple[Line, ...]
    unusable: tuple[Unusable, ...]
    notes: tuple[str, ...]
    files: tuple[Path, ...]

    def __repr__(self) -> str:
        lines = counted(sum(len(own.lines) for own in self.sets), "result")
        left = f", {len(self.unusable)} unusable" if self.unusable else ""
        page = f"; {str(self.files[0])!r}" if self.files else ""
        return f"Comparison({lines} in {counted(len(self.sets), 'table')}{left}{page})"


def compare(
    workspace: Workspace,
    out: Path | None = None,
    gap: Sequence[str] = (),
    on: Sequence[str] = (),
    quiet: bool = False,
    folders: Collection[str] | None = None,
    across_recipes: bool = False,
) -> Comparison:
    """Put the results of probes/results.jsonl side by side; write tables and a page into a folder.

    out: the folder, probes/report by default. gap: two backbones, on: two data sets; by how much more the first
    backbone is ahead of the second on the first set than on the second set; unasked where all results are of two
    backbones on two sets. quiet: no progress bar; average precision
    takes minutes where a test split has hundreds of groups. folders: of the results to compare, as rows name them; None
    for all. across_recipes: give verdicts also where the recipes of two results differ.
    Raises ProbeError when there is no result, or none that can be used, or no gap can be made of those that there are.
    """
    results, unusable, notes = load_results(workspace.probes, folders)
    if not results:
        reasons = "\n".join(f"  {item.folder}: {item.reason}" for item in unusable)
        raise ProbeError(f"None of the results in {workspace.probes} can be compared.\n{reasons}\nRun them again.")
    together = _met(workspace, comparable_sets(results))
    tables = [Table.of(title, own) for title, own in zip(_titles(together), together, strict=True)]
    with Progress(len(results), "intervals", "result", quiet=quiet) as bar:
        found = [findings_of(workspace, table) for table in tables]
        corrected(line for own in found for line in own.differences)
        sets = [_compared(workspace, table, own, bar, across_recipes) for table, own in zip(tables, found, strict=True)]
    gaps = modality_gaps(tables, gap, on, across_recipes)
    family = [*(line for item in sets for line in item.differences), *gaps]
    corrected(family)
    notes += _of_the_family(family)
    notes += [note for table in tables for note in _notes(workspace, table)]
    notes += [f"{table.title}: {note}" for table, own in zip(tables, found, strict=True) for note in own.notes]
    notes += names_without_records(found)
    answers = [_answer(item, table) for item, table in zip(sets, tables, strict=True)]
    answers += [Answer("Modality gap", said=gap_sentences(gaps))] if gaps else []
    behind = behind_supervised(tables)
    answers += [Answer("Good images alone", said=behind_sentences(behind))] if behind else []
    pages = [_page_set(workspace, i, *own) for i, own in enumerate(zip(sets, tables, found, strict=True), start=1)]
    failed = [(item.folder, item.reason) for item in unusable]
    page = page_text(_stamp(results), answers, pages, gaps, failed, notes)
    files = _write(out or workspace.probes / "report", page, sets, gaps)
    answer = [(own.title, (*own.found, *own.said)) for own in answers]
    return Comparison(
        tuple(answer), tuple(sets), tuple(gaps), tuple(behind), tuple(unusable), tuple(notes), tuple(files)
    )


def plain_json(report: Comparison) -> dict[str, Any]:
    """A comparison as JSON can hold it: what is nan becomes null, paths become text; `behind` and what heads find only
    where there is something."""
    values = {name: own for name, own in asdict(report).items() if name != "behind" or own}
    for item in values["sets"]:
        item["sheets"] = [str(path) for _, path in item["sheets"]]
        for name in ("findings", "found_differences"):
            if not item[name]:
                del item[name]
    return plain(values | {"files": [str(path) for path in report.files]})


def _met(workspace: Workspace, tables: Sequence[list[Result]]) -> list[list[Result]]:
    """The tables, those whose splits are one partition under several names as one.

    Rows keep the images that were tested, not those that were trained and chosen on: their caches tell. Where a cache
    is not here any more, or is not what it was, the split stands alone.
    """
    alike = Counter(table[0].tested_alike for table in tables)
    found: dict[str, list[Result]] = {}
    for table in tables:
        key = _partition(workspace, table[0]) if alike[table[0].tested_alike] > 1 else table[0].comparable
        found.setdefault(key, []).extend(table)
    return list(found.values())


def _partition(workspace: Workspace, result: Result) -> str:
    """The same for results of one table, by what their splits are where the cache tells, else by their names."""
    row = result.row
    place = "/".join(Path(row.folder).parts[:2])  # as of its cache
    try:
        cache = open_cache(workspace.cache / f"{place}.h5")
        partition, tested = partition_of(cache, row.choice)
    except FeatprobeError:
        return result.comparable
    known = cache.data.fingerprint == row.data_fingerprint and tested == set(result.runs[0].test.ids)
    return digest([partition, result.tested_alike]) if known else result.comparable


def _titles(tables: Sequence[Sequence[Result]]) -> list[str]:
    """What people call each table; where two would be called alike, what tells them apart is added."""
    rows = [table[0].row for table in tables]
    plain = [_title(table) for table in tables]
    titles = []
    for table, row, title in zip(tables, rows, plain, strict=True):
        alike = [other for other, its in zip(tables, plain, strict=True) if its == title]
        images = counted(row.images.test, "test image")
        more = f" [data {row.data_fingerprint[:6]}, {images}]" if len(alike) > 1 else ""
        same = [other for other in alike if other[0].row.data_fingerprint == row.data_fingerprint]
        more += f" [set {table[0].comparable[:6]}]" if len(same) > 1 else ""
        titles.append(title + more)
    return titles


def _title(table: Sequence[Result]) -> str:
    row = table[0].row
    splits: dict[str, str] = {}
    for result in table:
        splits.setdefault(result.row.choice.key, result.row.choice.text)
    first, *others = splits.values()
    parts = [row.data, row.task, f"{first} (also {', '.join(others)})" if others else first]
    parts += ["connected components"] if row.instances != "own" else []
    parts += row.settings.of_units if row.settings else []
    return ", ".join(parts)


def _notes(workspace: Workspace, table: Table) -> list[str]:
    """What a reader of a table should know of it."""
    said = [*_of_the_split(table), *_of_the_scores(table), *_of_the_seeds(table), *_of_the_budgets(workspace, table)]
    if len(table.chosen) < len(table.results):
        said.append(
            "where a backbone has several results that differ in recipe, input size, dtype or the name of one split "
            "alone, differences are taken at the recipe and size that most of them have, then of the one best on "
            "validation (marked *)"
        )
    return [f"{table.title}: {text}" for text in said]


def _of_the_family(lines: Sequence[Line]) -> list[str]:
    """That so many differences are corrected together that resamples are too few for any of them to be sure."""
    tested = [line for line in lines if not np.isnan(line["p"])]
    scores = {line["score"] for line in tested}
    return [
        f"{task}: p values of {kind.resamples} resamples are corrected for {len(tested)} differences and gaps, so that "
        "none can be sure. Compare fewer results at once: a study compares only its own"
        for task, kind in SCORES.items()
        if kind.main.name in scores and len(tested) > SURE * (1 + kind.resamples)
    ]


def _of_the_split(table: Table) -> list[str]:
    first = table.results[0]
    groups = sum(first.runs[0].scores[first.main].sizes)
    choice = first.row.choice
    said = []
    if groups < FEW_GROUPS:
        said.append(
            f"{counted(groups, 'test group')}. Intervals from fewer than {FEW_GROUPS} rest on guesses about "
            "groups that nobody has seen"
        )
    if choice.folds:
        what = "images" if choice.by == "image" else "groups"
        by = first.row.scores.ranked
        ranked = f"; {by} ranks what the heads of all folds found together" if by else ""
        said.append(
            f"{choice.folds} heads, each scored on the {what} that it was not trained on; all images together "
            f"are one test set{ranked}. Intervals draw its groups again for these heads, and do not cover that folds "
            "share training images"
        )
    if choice.by == "image" and groups < first.row.images.test:
        said.append("a split by image of parts with several images; test holds parts that training saw")
    return said


def _of_the_scores(table: Table) -> list[str]:
    """The rule by which they are taken, if the rows of the results differ in it, or if it may surprise."""
    first = table.results[0]
    if first.row.scores.objects:
        return [
            f"{first.row.scores.main.label} is what trials are chosen by and what is compared: inspection asks whether "
            "a flaw is found, and labels of flaws that are a few pixels wide do not tell outlines apart at an IoU of "
            "0.75"
        ]
    zero = sum(result.row.absent_classes == "zero" for result in table.results)
    lacking = [name for name, value in class_scores(first).items() if np.isnan(value)]
    only = "" if first.row.scores.dense else ", or nothing else"
    said = [f"the test split holds no {', '.join(lacking)}{only}: no mean counts it"] if lacking else []
    said += _of_few_sides(first)
    if zero and lacking:
        said.append(
            f"{zero} of {counted(len(table.results), 'result')} scored with --absent-classes zero, so that a class "
            "that the test split lacks counts as 0 there once it is predicted; here it does not"
        )
    return said


def _of_few_sides(result: Result) -> list[str]:
    """That few groups have a good unit, or one with a defect, where both are needed: few of them show no others."""
    test = result.runs[0].test
    good, groups = good_units(test), np.array(test.groups)
    sides = {} if good is None else {"a defect": groups[~good], "a good image": groups[good]}
    counts = {what: len(set(own.tolist())) for what, own in sides.items()}
    return [
        f"only {counted(count, 'test group')} with {what}: intervals rest on what few of them show of others"
        for what, count in counts.items()
        if 0 < count < min(FEW_OF_A_SIDE, len(set(test.groups)))
    ]


def _of_the_seeds(table: Table) -> list[str]:
    said = []
    if any(result.row.fraction < 1 and not result.own_subsets for result in table.results):
        said.append(
            "some heads on a share of the training images had the same images for all seeds: their spread over seeds "
            "holds no other choice of images: there is no verdict on backbones or regimes. Run them again to have one"
        )
    if any(result.row.shared_order and not result.solved for result in table.results):
        said.append(
            "heads of --shared-order saw the images in one order for all seeds: their spread over seeds is too narrow "
            "for a verdict on backbones or regimes"
        )
    return said


def _of_the_budgets(workspace: Workspace, table: Table) -> list[str]:
    """Budgets that were found and are too small, each with the command that mends it."""
    said = []
    for result, needed in table.short.items():
        beside = [r for r in table.results if r.budget and r.compared_budgets == result.compared_budgets]
        if any(r.cell == result.cell and r.scale == result.scale and r not in table.short for r in beside):
            continue  # it was brought level since
        had = result.row.recipe.iterations
        what = f"{table.names[result.backbone]}, {result.variant}, {result.row.head}"
        backbones = list(dict.fromkeys(r.row.backbone for r in beside))
        if had < needed:
            command = level_command(result.runs[0].card, result.seeds, backbones=backbones)
            said.append(f"{what} had {had} iterations, and {needed} are needed. To bring it level:  {command}")
        else:
            command = level_command(result.runs[0].card, result.seeds, backbones=backbones, iterations=2 * had)
            said.append(
                f"{what} still gained, or found nothing yet, when the search for its iterations ended at {had}. To "
                f"train all backbones with a given number, more than that:  {command}"
            )
    return said


# ---- one table -------------------------------------------------------------------------------------------------------


def _compared(workspace: Workspace, table: Table, found: Findings, bar: Progress, across: bool) -> ComparedSet:
    lines = []
    for result in table.results:
        lines.append(line_of(result, table))
        bar.update()
    _name_recipes(table, lines)
    sheets = [sheet for result in table.results for sheet in _sheet(workspace, result, table)]
    commands = dict.fromkeys(c for result in table.results for c in commands_of(*_described(workspace, result)))
    differences = tuple(differences_of(table, across))
    return ComparedSet(
        table.title, tuple(lines), differences, tuple(sheets), tuple(commands), found.lines, found.differences
    )


def _name_recipes(table: Table, lines: Sequence[Line]) -> None:
    """Name in what lines differ that are alike but for their recipes."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    for place, result in enumerate(table.results):
        alike.setdefault((*result.cell, result.size, result.dtype), []).append(place)
    for places in alike.values():
        own = [(table.results[place].row, table.results[place].head) for place in places]
        for place, text in zip(places, told_apart(own), strict=True):
            if text:
                lines[place]["differs"] = text


def _described(workspace: Workspace, result: Result) -> tuple[Any, ...]:
    """The values from which the commands are made that give a result again, in this workspace."""
    card = result.runs[0].card
    name, root = card["data"]["name"], card["data"]["root"]
    known = name in workspace.config.get("data", {}) or Path(root).resolve() == (workspace.data / name).resolve()
    return card, result.seeds, name if known else root, workspace.data_options(name) if known else {}


def _sheet(workspace: Workspace, result: Result, table: Table) -> list[tuple[str, Path]]:
    paths = [head_folder(workspace.probes, run.row) / "sheet.png" for run in result.runs]
    caption = f"{table.names[result.backbone]}, {result.variant}, {result.row.head}, {result.size}"
    return [(caption, path) for path in paths if path.is_file()][:1]


def line_of(result: Result, table: Table) -> Line:
    """A result as a line of its table. Scores in [0, 1]; low and high are of the 95 % interval; nan for what is not."""
    row, curve = result.row, result.kept
    train, extract, total = result.seconds()
    reached = {share: iterations_to(curve, share * curve.final) if result.budget else None for share in SHARES}
    return {
        "set": table.title,
        "data": row.data,
        "task": row.task,
        "split": row.split,
        "backbone": table.names[result.backbone],
        "model": row.model,
        "random_weights": result.random_weights,
        "regime": result.variant,
        "head": row.head,
        "size": result.size,
        "dtype": result.dtype or None,
        "fraction": row.fraction,
        "train_images": row.images.train,
        "seeds": len(result.runs),
        **_score_values(result),
        "test_images": row.images.test,
        "groups": sum(result.score(result.main).sizes),
        "trials": row.trials,
        "head_parameters": row.parameters,
        "backbone_parameters": row.backbone_parameters,
        "iterations": row.iterations,
        "iterations_found": result.budget is not None,
        "iterations_needed": table.short.get(result),
        "budget_unchecked": budget_unchecked(result),
        "weights_from": result.weights_from,
        **{f"iterations_{share:.0%}".rstrip("%"): value for share, value in reached.items()},
        "late_rise": late_rise(curve),
        "not_converged": still_rising(curve),
        "train_seconds": train,
        "extract_seconds": extract,
        "total_seconds": total,
        "recipe_key": row.recipe_key,
        **({"settings": unusual_settings(row)} if row.settings else {}),
        "chosen": result in table.chosen,
        "classes": class_scores(result),
        "curve": {"iterations": list(result.curve.iterations), "values": list(result.curve.values)},
    }


def _score_values(result: Result) -> Line:
    """Mean over seeds, standard deviation over seeds and interval over test groups of each score of the task."""
    values: Line = {}
    for name in (score.name for score in result.row.scores.compared):
        every = [value_of(run.scores[name]) for run in result.runs]
        interval = score_interval(result.score(name), resamples=result.row.scores.resamples)
        spread = float(np.std(every, ddof=1)) if len(every) > 1 else float("nan")
        low, high = (interval.low, interval.high) if interval.has_interval else (float("nan"), float("nan"))
        values |= {name: interval.estimate, f"{name}_sd": spread, f"{name}_low": low, f"{name}_high": high}
    return values


def class_scores(result: Result) -> dict[str, float]:
    """Mean over seeds of the score of each class; nan for a class that the test split lacks."""
    every = [run.test.per_class(run.row) for run in result.runs]
    return {name: float(np.mean([own[name] for own in every])) for name in result.row.classes if name in every[0]}


# ---- the page --------------------------------------------------------------------------------------------------------


def _answer(item: ComparedSet, table: Table) -> Answer:
    """What is said first of a set."""
    tuned = any(line["regime"].startswith("full") for line in item.lines)
    lead = leading(item.findings) if item.findings else None
    found = defect_sentences(item.findings, item.found_differences, tuned)
    said = [text for text in answer_of(item.lines, item.differences) if text not in found]
    folds, unreadable = table.results[0].row.choice.folds, max(own.row.unreadable for own in table.results)
    facts = [data_sentence(item.lines, lead, folds, unreadable), *point_sentence(lead)]
    facts.append(cost_sentence(item.lines))
    return Answer(item.title, found, said, [fact for fact in facts if fact])


def _page_set(workspace: Workspace, number: int, item: ComparedSet, table: Table, found: Findings) -> PageSet:
    lead = leading(item.findings) if item.findings else None
    own = found.inspections[found.lines.index(lead)] if lead else None
    return PageSet(
        item.title,
        item.lines,
        item.differences,
        item.sheets,
        item.commands,
        item.findings,
        worst=pictures_of(own) if own else (),
        pod=probability_of(own, number) if own else None,
        steps=next_steps(workspace, table, lead, own.points if own else (), found.missing),
    )


def _stamp(results: Sequence[Result]) -> str:
    """The version of featprobe, and when the results were made."""
    days = sorted({run.row.time[:10] for result in results for run in result.runs if run.row.time})
    when = "" if not days else f" of {days[0]}" if len(days) == 1 else f" of {days[0]} to {days[-1]}"
    return f"featprobe {__version__}, {counted(len(results), 'result')}{when}"


# ---- files -----------------------------------------------------------------------------------------------------------


def _write(out: Path, page: str, sets: Sequence[ComparedSet], gaps: Sequence[Line]) -> list[Path]:
    """Write the tables, and last the page, which says that they are there; returns their paths. Raises DiskError."""
    results = result_frame([line for item in sets for line in item.lines])
    differences = difference_frame([*(line for item in sets for line in item.differences), *gaps])
    files: dict[Path, bytes | str] = {
        out / "index.html": page,
        out / "results.csv": csv_text(results),
        out / "differences.csv": csv_text(differences),
        out / "results.parquet": results.to_parquet(index=False),
    }
    write_together(files, out / "index.html")
    return list(files)
