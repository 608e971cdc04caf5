"""Scored heads to an answer: tables with intervals, paired differences, curves, a page."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from featprobe.cache import open_cache
from featprobe.errors import FeatprobeError, ProbeError, counted, nearest
from featprobe.metrics import FEW_GROUPS, Difference, Statistic, holm, modality_gap, paired_difference, score_interval
from featprobe.probes.saved import plain
from featprobe.report.answer import SURE, answer_of
from featprobe.report.comparison import difference_frame, result_frame
from featprobe.report.page import PageSet, write_page
from featprobe.specs import SplitChoice, digest
from featprobe.stages.commands import commands_of
from featprobe.stages.convergence import SHARES, iterations_to, late_rise, still_rising
from featprobe.stages.partition import partition_of
from featprobe.stages.results import (
    REGIMES,
    SCORES,
    Result,
    Unusable,
    comparable_sets,
    load_results,
    representatives,
)
from featprobe.stages.workspace import Workspace

RESAMPLES = {"semseg": 10_000, "detect": 1_000, "instseg": 1_000}
"""Of the groups of a test split. Those of average precision are dear: each leaves every group out once."""
Line = dict[str, Any]


@dataclass(frozen=True)
class ComparedSet:
    """Results that may stand in one table.

    lines: a dict per result, scores in [0, 1]. differences: a dict per pair that was asked about, p values corrected
    together. sheets: captions and picture sheets that are there. commands: that made the results.
    """

    title: str
    lines: tuple[Line, ...]
    differences: tuple[Line, ...]
    sheets: tuple[tuple[str, Path], ...]
    commands: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """What all results of a workspace say.

    answer: titles, and sentences in plain language of each. gaps: modality gaps that were asked for. unusable: rows
    that could not be used, and why. files: that were written.
    """

    answer: tuple[tuple[str, tuple[str, ...]], ...]
    sets: tuple[ComparedSet, ...]
    gaps: tuple[Line, ...]
    unusable: tuple[Unusable, ...]
    notes: tuple[str, ...]
    files: tuple[Path, ...]


def compare(
    workspace: Workspace,
    out: Path | None = None,
    gap: Sequence[str] = (),
    on: Sequence[str] = (),
    quiet: bool = False,
    folders: Collection[str] | None = None,
) -> Comparison:
    """Put the results of probes/results.jsonl side by side; write tables and a page into a folder.

    out: the folder, probes/report by default. gap: two backbones, on: two data sets; by how much more the first
    backbone is ahead of the second on the first set than on the second set; unasked where all results are of two
    backbones on two sets. quiet: no progress bar; average precision
    takes minutes where a test split has hundreds of groups. folders: of the results to compare, as rows name them; None
    for all.
    Raises ProbeError when there is no result, or none that can be used, or no gap can be made of those that there are.
    """
    results, unusable, notes = load_results(workspace.probes, folders)
    if not results:
        reasons = "\n".join(f"  {item.folder}: {item.reason}" for item in unusable)
        raise ProbeError(f"None of the results in {workspace.probes} can be compared.\n{reasons}\nRun them again.")
    tables = _met(workspace, comparable_sets(results))
    titles = _titles(tables)
    with tqdm(total=len(results), desc="intervals", unit="result", disable=quiet, leave=False) as bar:
        sets = [_compared(workspace, title, table, bar) for title, table in zip(titles, tables, strict=True)]
    if not gap and not on:
        gap, on = _only_gap(results)
        gaps = _all_gaps(tables, gap, on) if gap else []
    else:
        gaps = modality_gaps(tables, gap, on)
    notes += [note for title, table in zip(titles, tables, strict=True) for note in _notes(title, table)]
    answer = [(item.title, answer_of(item.lines, item.differences)) for item in sets]
    answer += [("Modality gap", tuple(_gap_sentences(gaps)))] if gaps else []
    files = _write(workspace, out or workspace.probes / "report", answer, sets, gaps, unusable, notes)
    return Comparison(tuple(answer), tuple(sets), tuple(gaps), tuple(unusable), tuple(notes), tuple(files))


def plain_json(report: Comparison) -> dict[str, Any]:
    """A comparison as JSON can hold it: what is nan becomes null, paths become text."""
    values = asdict(report)
    for item in values["sets"]:
        item["sheets"] = [str(path) for _, path in item["sheets"]]
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
    place = "/".join(Path(row["folder"]).parts[:2])  # as of its cache
    try:
        cache = open_cache(workspace.cache / f"{place}.h5")
        partition, tested = partition_of(cache, row["split"])
    except FeatprobeError:
        return result.comparable
    known = cache.data.fingerprint == row["data_fingerprint"] and tested == set(result.runs[0].test.ids)
    return digest([partition, result.tested_alike]) if known else result.comparable


def _titles(tables: Sequence[Sequence[Result]]) -> list[str]:
    """What people call each table; where two would be called alike, what tells them apart is added."""
    rows = [table[0].row for table in tables]
    plain = [_title(table) for table in tables]
    titles = []
    for table, row, title in zip(tables, rows, plain, strict=True):
        alike = [other for other, its in zip(tables, plain, strict=True) if its == title]
        images = counted(row["images"]["test"], "test image")
        more = f" [data {row['data_fingerprint'][:6]}, {images}]" if len(alike) > 1 else ""
        same = [other for other in alike if other[0].row["data_fingerprint"] == row["data_fingerprint"]]
        more += f" [set {table[0].comparable[:6]}]" if len(same) > 1 else ""
        titles.append(title + more)
    return titles


def _title(table: Sequence[Result]) -> str:
    row = table[0].row
    splits: dict[str, str] = {}
    for choice in (SplitChoice.parse(result.row["split"]) for result in table):
        splits.setdefault(choice.key, choice.text)
    first, *others = splits.values()
    parts = [row["data"], row["task"], f"{first} (also {', '.join(others)})" if others else first]
    parts += ["connected components"] if row["instances"] != "own" else []
    parts += ["absent classes left out"] if row["absent_classes"] != "zero" else []
    return ", ".join(parts)


def _notes(title: str, table: Sequence[Result]) -> list[str]:
    """What a reader of a table should know of it."""
    first = table[0]
    groups = sum(first.runs[0].scores[SCORES[first.row["task"]][0]].sizes)
    notes = []
    if groups < FEW_GROUPS:
        notes.append(
            f"{title}: {counted(groups, 'test group')}. Intervals from fewer than {FEW_GROUPS} rest on guesses about "
            "groups that nobody has seen"
        )
    choice = SplitChoice.parse(first.row["split"])
    if choice.folds:
        what = "images" if choice.by == "image" else "groups"
        ranked = "" if first.row["task"] == "semseg" else "; AP ranks what the heads of all folds found together"
        notes.append(
            f"{title}: {choice.folds} heads, each scored on the {what} that it was not trained on; all images together "
            f"are one test set{ranked}. Intervals draw its groups again for these heads, and do not cover that folds "
            "share training images"
        )
    if choice.by == "image" and groups < first.row["images"]["test"]:
        notes.append(f"{title}: a split by image of parts with several images; test holds parts that training saw")
    if len({result.row["trials"] for result in table if result.row["head"] != "ridge"}) > 1:
        notes.append(f"{title}: not all results were chosen from equally many trials; see the column")
    if len(representatives(table)) < len(table):
        notes.append(
            f"{title}: where a backbone has several results that differ in recipe, input size or the name of one split "
            "alone, differences are taken at the size that most of them have, then of the one best on validation "
            "(marked *)"
        )
    return notes


# ---- one table -------------------------------------------------------------------------------------------------------


def _compared(workspace: Workspace, title: str, table: Sequence[Result], bar: tqdm) -> ComparedSet:
    names = backbone_names(table)
    chosen = representatives(table)
    lines = []
    for result in table:
        lines.append(line_of(result, title, names, result is chosen[result.cell]))
        bar.update()
    differences = paired(title, list(chosen.values()), names)
    sheets = [sheet for result in table for sheet in _sheet(workspace, result, names)]
    commands = dict.fromkeys(command for result in table for command in _commands(workspace, result))
    return ComparedSet(title, tuple(lines), tuple(differences), tuple(sheets), tuple(commands))


def _commands(workspace: Workspace, result: Result) -> tuple[str, ...]:
    """What extracts features and trains heads for a result again, in this workspace."""
    card = result.runs[0].card
    name, root = card["data"]["name"], card["data"]["root"]
    known = name in workspace.config.get("data", {}) or Path(root).resolve() == (workspace.data / name).resolve()
    seeds = [run.row["seed"] for run in result.runs]
    return commands_of(card, seeds, name if known else root, workspace.data_options(name) if known else {})


def backbone_names(table: Sequence[Result]) -> dict[tuple[str, str], str]:
    """What people call each backbone; where a name stands for several weights, their hash is added."""
    every = sorted({result.backbone for result in table})
    labels = [label for label, _ in every]
    return {(label, sha): label if labels.count(label) == 1 else f"{label} ({sha[:8]})" for label, sha in every}


def _sheet(workspace: Workspace, result: Result, names: Mapping[tuple[str, str], str]) -> list[tuple[str, Path]]:
    paths = [workspace.probes / run.row["folder"] / "sheet.png" for run in result.runs]
    caption = f"{names[result.backbone]}, {result.variant}, {result.row['head']}, {result.size}"
    return [(caption, path) for path in paths if path.is_file()][:1]


def line_of(result: Result, title: str, names: Mapping[tuple[str, str], str], chosen: bool = True) -> Line:
    """A result as a line of its table. Scores in [0, 1]; low and high are of the 95 % interval; nan for what is not.

    chosen: whether it stands for its backbone, regime, head and fraction in differences.
    """
    row, curve = result.row, result.curve
    train, extract, total = result.seconds()
    return {
        "set": title,
        **{name: row[name] for name in ("data", "task", "split")},
        "backbone": names[result.backbone],
        "regime": result.variant,
        "head": row["head"],
        "size": result.size,
        "fraction": row["fraction"],
        "train_images": row["images"]["train"],
        "seeds": len(result.runs),
        **_score_values(result),
        "test_images": row["images"]["test"],
        "groups": sum(result.score(SCORES[row["task"]][0]).sizes),
        "trials": row["trials"],
        "head_parameters": row["parameters"],
        "backbone_parameters": row["backbone_parameters"],
        "iterations": row["recipe"]["iterations"] if row["head"] != "ridge" else None,
        **{f"iterations_{share:.0%}".rstrip("%"): iterations_to(curve, share * curve.final) for share in SHARES},
        "late_rise": late_rise(curve),
        "not_converged": still_rising(curve),
        "train_seconds": train,
        "extract_seconds": extract,
        "total_seconds": total,
        "recipe_key": row["recipe_key"],
        "chosen": chosen,
        "classes": class_scores(result),
        "curve": {"iterations": list(curve.iterations), "values": list(curve.values)},
    }


def _score_values(result: Result) -> Line:
    """Mean over seeds, standard deviation over seeds and interval over test groups of each score of the task."""
    values: Line = {}
    for name in SCORES[result.row["task"]]:
        every = [_estimate(run.scores[name]) for run in result.runs]
        interval = score_interval(result.score(name), resamples=RESAMPLES[result.row["task"]])
        spread = float(np.std(every, ddof=1)) if len(every) > 1 else float("nan")
        values |= {name: interval.estimate, f"{name}_sd": spread}
        values |= {f"{name}_low": interval.low, f"{name}_high": interval.high}
    return values


def class_scores(result: Result) -> dict[str, float]:
    """Mean over seeds of the IoU (semseg) or the AP of each class; nan for a class that takes no part."""
    task = result.row["task"]
    part = {"detect": "box", "instseg": "mask"}.get(task)
    every = [run.row["test"][part]["per_class"] if part else run.row["test"]["iou"] for run in result.runs]
    return {
        name: float(np.mean([np.nan if own[name] is None else own[name] for own in every]))
        for name in result.row["classes"]
        if name in every[0]
    }


def _estimate(statistic: Statistic) -> float:
    return float(statistic.value(np.ones((1, sum(statistic.sizes))))[0])


# ---- differences -----------------------------------------------------------------------------------------------------


def paired(title: str, chosen: Sequence[Result], names: Mapping[tuple[str, str], str]) -> list[Line]:
    """Differences of the main score between backbones and between regimes; p values corrected over all of them."""
    pairs = [(kind, *_in_order(kind, a, b)) for a, b in combinations(chosen, 2) if (kind := _kind(a, b))]
    pairs.sort(key=lambda pair: (pair[1].row["head"], -pair[1].row["fraction"], pair[0]))
    lines = [_difference_line(title, kind, a, b, chosen, names) for kind, a, b in pairs]
    for line, corrected in zip(lines, holm([line["p"] for line in lines]), strict=True):
        line["p_holm"] = corrected
    return lines


def _kind(a: Result, b: Result) -> str | None:
    """What two results of a table differ in, where it is one thing only that is asked about."""
    if (a.row["head"], a.row["fraction"]) != (b.row["head"], b.row["fraction"]):
        return None
    if a.variant == b.variant and a.backbone != b.backbone:
        return "backbones"
    return "regimes" if a.backbone == b.backbone and a.variant != b.variant else None


def _in_order(kind: str, a: Result, b: Result) -> tuple[Result, Result]:
    """Of regimes the one that trains or varies more is first."""
    rank = [(REGIMES[result.row["regime"]], result.augmented) for result in (a, b)]
    return (b, a) if kind == "regimes" and rank[1] > rank[0] else (a, b)


def _difference_line(
    title: str,
    kind: str,
    a: Result,
    b: Result,
    chosen: Sequence[Result],
    names: Mapping[tuple[str, str], str],
) -> Line:
    row = a.row
    score = SCORES[row["task"]][0]
    found = paired_difference(a.score(score), b.score(score), resamples=RESAMPLES[row["task"]])
    within = {"backbones": f"{a.variant}, {row['head']}", "regimes": f"{names[a.backbone]}, {row['head']}"}[kind]
    return {
        "set": title,
        "kind": kind,
        "within": within,
        "head": row["head"],
        "fraction": row["fraction"],
        "score": score,
        "a": names[a.backbone] if kind == "backbones" else a.variant,
        "b": names[b.backbone] if kind == "backbones" else b.variant,
        **_difference_values(found),
        "scale_a": a.scale,
        "scale_b": b.scale,
        "confounded": kind == "regimes" and confounded(a, b, chosen),
        "not_converged": still_rising(a.curve) or still_rising(b.curve),
        "a_reaches_b": iterations_to(a.curve, b.curve.final),
        "b_reaches_a": iterations_to(b.curve, a.curve.final),
    }


def _difference_values(found: Difference) -> Line:
    return {
        "difference": found.estimate,
        "low": found.low,
        "high": found.high,
        "p": found.p_value,
        "p_holm": float("nan"),
        "groups": found.groups,
    }


def confounded(full: Result, frozen: Result, chosen: Sequence[Result]) -> bool:
    """Whether full - frozen may be augmentation's doing, and no result beside the two tells how much.

    One that tells is a frozen backbone on augmented images, or a full one without augmentation.
    """
    if (full.row["regime"], frozen.row["regime"]) != ("full", "frozen") or full.augmented == frozen.augmented:
        return False
    beside = [r for r in chosen if (*r.backbone, r.cell[-2:]) == (*full.backbone, full.cell[-2:])]
    return not any((r.row["regime"] != "full") == r.augmented for r in beside)


# ---- modality gap ----------------------------------------------------------------------------------------------------


def modality_gaps(tables: Sequence[Sequence[Result]], gap: Sequence[str], on: Sequence[str]) -> list[Line]:
    """(A - B on the first set) - (A - B on the second) for each task, regime, head and fraction that has all four.

    gap: names of A and B; on: names of the two sets. P values are corrected over all gaps. Raises ProbeError where
    names are not known, or no four results fit together.
    """
    if len(set(gap)) != 2 or len(set(on)) != 2:
        raise ProbeError("A modality gap is of two backbones on two data sets. wanted: --gap A,B --on RGBSET,XRAYSET")
    results = [result for table in tables for result in table]
    for asked, key, what in ((gap, "backbone", "backbone"), (on, "data", "data set")):
        known = {result.row[key] for result in results}
        for name in asked:
            if name not in known:
                raise ProbeError(f"There is no result of the {what} {name!r}. {nearest(name, known)}")
    lines = _all_gaps(tables, gap, on)
    if not lines:
        raise ProbeError(
            f"No gap can be made: {' and '.join(gap)} on {' and '.join(on)} have no task, split, regime, head and "
            "fraction in common.\nMake what is missing:  featprobe extract, then  featprobe probe"
        )
    return lines


def _only_gap(results: Sequence[Result]) -> tuple[list[str], list[str]]:
    """The two backbones and the two data sets that all results are of; nothing where there are more or fewer."""
    named = [list(dict.fromkeys(result.row[key] for result in results)) for key in ("backbone", "data")]
    return (named[0], named[1]) if all(len(names) == 2 for names in named) else ([], [])


def _all_gaps(tables: Sequence[Sequence[Result]], gap: Sequence[str], on: Sequence[str]) -> list[Line]:
    chosen = [result for table in tables for result in representatives(table).values()]
    lines = [line for first in tables for second in tables for line in _gaps_between(first, second, gap, on, chosen)]
    for line, corrected in zip(lines, holm([line["p"] for line in lines]), strict=True):
        line["p_holm"] = corrected
    return lines


def _gaps_between(
    first: Sequence[Result], second: Sequence[Result], gap: Sequence[str], on: Sequence[str], chosen: Sequence[Result]
) -> list[Line]:
    """The gaps of two tables, where these are of the two sets that are asked for."""
    if not any(r.row["data"] == on[0] for r in first) or not any(r.row["data"] == on[1] for r in second):
        return []
    cells = [{_gap_cell(r): r for r in table if r in chosen and r.row["backbone"] in gap} for table in (first, second)]
    lines = []
    for cell in cells[0]:
        four = [own.get((*cell[:-1], name)) for own in cells for name in gap]
        if cell[-1] == gap[0] and all(four):
            lines.append(_gap_line(four, gap, on))  # type: ignore[arg-type]
    return lines


def _gap_cell(result: Result) -> tuple[Any, ...]:
    row = result.row
    same = tuple(row[name] for name in ("task", "absent_classes", "instances", "head", "fraction"))
    split = SplitChoice.parse(row["split"])
    return (*same, "a file's" if split.file else split.key, result.variant, row["backbone"])


def _gap_line(four: Sequence[Result], gap: Sequence[str], on: Sequence[str]) -> Line:
    row = four[0].row
    score = SCORES[row["task"]][0]
    a1, b1, a2, b2 = (result.score(score) for result in four)
    found = modality_gap((a1, b1), (a2, b2), resamples=RESAMPLES[row["task"]])
    named = {"a": gap[0], "b": gap[1], "first": on[0], "second": on[1]}
    cell = {"task": row["task"], "split": row["split"], "regime": four[0].variant, "head": row["head"]}
    return {**cell, "fraction": row["fraction"], "score": score, **named, **_difference_values(found)}


def _gap_sentences(gaps: Sequence[Line]) -> list[str]:
    """Each gap in words. Where it is not told from none, that is said."""
    sentences = []
    for g in gaps:
        share = "" if g["fraction"] == 1 else f", {100 * g['fraction']:g} % of train"
        what = f"{g['task']}, {g['regime']}, {g['head']}{share}: the lead of {g['a']} over {g['b']}"
        found = f"{100 * g['difference']:+.1f} points, {100 * g['low']:+.1f} to {100 * g['high']:+.1f}"
        larger = "larger" if g["difference"] > 0 else "smaller"
        if g["p_holm"] <= SURE:
            sentences.append(f"{what} is {larger} on {g['first']} than on {g['second']} ({found}).")
        else:
            sentences.append(f"{what} is not shown to differ between {g['first']} and {g['second']} ({found}).")
    return sentences


# ---- files -----------------------------------------------------------------------------------------------------------


def _write(
    workspace: Workspace,
    out: Path,
    answer: Sequence[tuple[str, Sequence[str]]],
    sets: Sequence[ComparedSet],
    gaps: Sequence[Line],
    unusable: Sequence[Unusable],
    notes: Sequence[str],
) -> list[Path]:
    """Write the tables and the page; returns their paths. Raises FeatprobeError where that can't be done."""
    results = result_frame([line for item in sets for line in item.lines])
    differences = difference_frame([*(line for item in sets for line in item.differences), *gaps])
    files = [out / name for name in ("index.html", "results.csv", "differences.csv", "results.parquet")]
    try:
        out.mkdir(parents=True, exist_ok=True)
        pages = [PageSet(s.title, s.lines, s.differences, s.sheets, s.commands) for s in sets]
        write_page(files[0], answer, pages, gaps, [(item.folder, item.reason) for item in unusable], notes)
        results.to_csv(files[1], index=False)
        differences.to_csv(files[2], index=False)
        results.to_parquet(files[3], index=False)
    except OSError as error:
        raise FeatprobeError(f"The report can't be written to {out}: {error.strerror or error}.") from error
    return files
