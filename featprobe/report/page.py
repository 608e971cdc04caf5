"""The report as one HTML page that holds all it shows; readable on a phone, in print, light and dark."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from featprobe.report.comparison import (
    NO_INTERVAL,
    REACHED,
    class_table,
    difference_table,
    gap_table,
    result_table,
    scores_of,
)
from featprobe.report.findings.defect_answer import leading
from featprobe.report.findings.finding_tables import finding_table, size_name, size_table
from featprobe.report.findings.inspection_plots import BANDS, FrocCurve, SizeCurve, froc_plot, size_plot
from featprobe.report.plots import Dot, Series, dot_plot, line_plot
from featprobe.report.rendering import Grid, Picture, render
from featprobe.scores import LABELS, SCORES

Line = Mapping[str, Any]
HOW_TO_READ = (
    "Scores are of the test split, in percent: the mean over seeds, and sd, the standard deviation over seeds. The 95"
    " % interval of a score is a bootstrap over groups of test images (a group is a part, a film, a series): what "
    "other test groups would have given to these trained heads. It does not hold what other seeds would have given. "
    "No interval: there is one test group, or the interval would reach to the end of the scale.",
    "Differences are paired over the same groups. A verdict on any seed holds what other test groups and what other "
    "seeds might have given: it is of the backbone or the regime with its head and recipe. Where a side has one seed,"
    " or all its seeds saw the images in one order, the verdict is on these heads, and says nothing of others. Where "
    "recipes differ there is none, unless --across-recipes asks for it. p (Holm) is corrected for all differences and"
    " modality gaps of this page. Frozen is called enough where fine-tuning gains less than 2 points, or less than a "
    "tenth of the higher score where that is less.",
    "Budget not checked: the number of iterations was given, and nobody has looked whether more would give more "
    "(--iterations auto does). Needs N iterations: that was looked at, and another backbone, or this one, needs more."
    " Not converged: over the last 20 % of its iterations the validation curve still rises by more than a point; "
    "between points it is taken to rise as the learning rates add up. Iterations to 90/95/99 % of the own final value"
    " are given where the budget was checked: the first point of the curve (mean over seeds, of the weights that were"
    " kept) that is not below it.",
    "Confounded by augmentation: fine-tuning saw augmented images and the frozen run did not, and no run that "
    "would tell the two apart stands beside them.",
    "Seconds: of one training pass with all its trials (mean over seeds), of the extraction of the features, and "
    "of both. Features are extracted once and serve every head.",
)
HOW_FOUND = (
    "Defects and parts are of one head each: of its seeds the one that is best on validation, at a threshold that was "
    "chosen on validation. A defect is found by a call with: {}. A false call touches no defect and no ignored area. A "
    "part is stopped, or does not pass, where any of its images holds a call. Intervals of defects allow for those of "
    "one part that are found or missed together. Differences between what two heads find are of these two heads, over "
    "the same test groups, corrected for all of this page (Holm)."
)
HOW_POD = (
    "Probability of detection: by the fitted curve, 50 and 90 % of the defects of the sizes a50 and a90 are found. "
    "a90/95 is an upper bound of a90, which holds in 95 of 100 experiments. Where there is none, the data exclude no "
    "size: more defects near a90 help most."
)
WORDS = {"backbone", "regime", "head", "recipe", "within", "difference", "gap", "task", "verdict on"}
PHRASES = {"operating point"}
"""Columns that are read, not compared: a word or two, and more."""
TRAINED = {"trials", "head params", "backbone params", "iterations", REACHED}
"""Columns that say how heads were trained."""


@dataclass(frozen=True)
class Answer:
    """What the page says first of one subject.

    found: in defects and parts. said: in scores. facts: what it rests on.
    """

    title: str
    found: Sequence[str] = ()
    said: Sequence[str] = ()
    facts: Sequence[str] = ()


@dataclass(frozen=True)
class Probability:
    """A probability of detection: its plot as SVG, "" where there is none; sentences, each with those that belong below
    it.
    """

    plot: str
    said: Sequence[tuple[str, Sequence[str]]]


@dataclass(frozen=True)
class PageSet:
    """The contents of the page for one set: lines and differences as a comparison makes them, sheets with captions.

    findings: what heads find, as `defect_answer` has them. worst: pictures of misses and false calls. steps: what to do
    next, and the command that does it. pod: of the head that leads.
    """

    title: str
    lines: Sequence[Line]
    differences: Sequence[Line]
    sheets: Sequence[tuple[str, Path]]
    commands: Sequence[str]
    findings: Sequence[Line] = ()
    worst: Sequence[Picture] = ()
    pod: Probability | None = None
    steps: Sequence[tuple[str, str]] = ()


def page_text(
    stamp: str,
    answers: Sequence[Answer],
    sets: Sequence[PageSet],
    gaps: Sequence[Line],
    unusable: Sequence[tuple[str, str]],
    notes: Sequence[str],
) -> str:
    """The page of a comparison. stamp: version and dates. answers: shown first. unusable: folder and reason of rows
    that could not be used.
    """
    shown = [line["task"] for item in sets for line in item.lines]
    of_scores = dict.fromkeys(own.why for task, own in SCORES.items() if task in shown)
    first, *rest = HOW_TO_READ
    rules = dict.fromkeys(own["rule"] for item in sets for own in item.findings)
    found = [HOW_FOUND.format("; or with: ".join(rules))] if rules else []
    curves = [HOW_POD] if any(item.pod and item.pod.plot for item in sets) else []
    own_notes = [note.removeprefix(f"{sets[0].title}: ") for note in notes] if len(sets) == 1 else notes
    return render(
        "comparison.html",
        stamp=stamp,
        answers=answers,
        sets=[_section(item, number) for number, item in enumerate(sets, start=1)],
        gaps=_grid(gap_table(gaps), "gap") if gaps else None,
        notes=[*own_notes, *(f"could not be used: {folder}: {reason}" for folder, reason in unusable)],
        how=[*found, *curves, " ".join([first, *of_scores]), *rest],
    )


def _section(item: PageSet, number: int) -> dict[str, Any]:
    classes = any(line["classes"] for line in item.lines)
    return {
        "title": item.title,
        "worst": item.worst,
        "plots": [*_finding_plots(item, number), *_plots(item, number)],
        "pod": item.pod,
        "leads": label_of(leading(item.findings), item.findings) if item.findings else "",
        "findings": _grid(finding_table(item.findings), "backbone") if item.findings else None,
        "sizes": _grid(size_table(item.findings)) if any(own["by_size"] for own in item.findings) else None,
        "results": _result_grids(item.lines),
        "differences": _grid(difference_table(item.differences), "difference") if item.differences else None,
        "classes": _grid(class_table(item.lines)) if classes else None,
        "sheets": [(c, Picture.read(f"Test images, truth and prediction: {c}", path)) for c, path in item.sheets],
        "steps": item.steps,
        "commands": "\n".join(item.commands),
    }


def _result_grids(lines: Sequence[Line]) -> list[tuple[str, Grid]]:
    """The results in tables that a page is wide enough for: the main score, other scores, how heads were trained."""
    table = result_table(lines)
    others = [LABELS[name] for name in scores_of(lines[0])[1:]]
    which = [name for name in ("backbone", "regime", "head", "recipe", "of train") if name in table]
    trained = [name for name in map(str, table) if name in TRAINED or name.endswith(" s")]
    of_others = [form.format(name) for name in others for form in ("{}", "sd {}", "95 % {}")]
    rest = [name for name in table if name not in {*which, *trained, *of_others}]
    more = {
        name: [value if NO_INTERVAL in interval else f"{value} ({interval})"
               for value, interval in zip(table[name], table[f"95 % {name}"], strict=True)]
        for name in others if name in table
    }  # fmt: skip
    grids = [("Scores", _grid(table[[*which, *rest]], "backbone"))]
    grids += [("Other scores, with 95 % intervals", _grid(table[which].assign(**more)))] if more else []
    return [*grids, ("Training and cost", _grid(table[[*which, *trained]]))]


def _grid(table: pd.DataFrame, first: str = "") -> Grid:
    """A table for the page. first: the column that stands first; the score and its interval follow it."""
    if first:
        scores = [name for name in table if name in (*LABELS.values(), "found")][:1]
        lead = [first, *scores, *(["95 %"] if "95 %" in table else [])]
        table = table[[*lead, *(name for name in table if name not in lead)]]
    return Grid.of(table, WORDS, PHRASES)


def _finding_plots(item: PageSet, number: int) -> list[tuple[str, str]]:
    """Of heads that find objects: defects against false calls, and by size."""
    shown = [own for own in item.findings if own["defects"]]
    if not shown:
        return []
    per = "part" if all(own["per"] == "part" for own in shown) else "image"
    lead = leading(shown)
    shown = [lead, *(own for own in shown if own["per"] == per and own is not lead)]
    curves = [froc_curve(own, shown) for own in shown]
    whose = "" if len(curves) <= BANDS else f" of {curves[0].label}"
    title = f"Defects found against false calls, with the 95 % band{whose}"
    found = [(title, froc_plot(curves, per, f"froc {number}"))]
    sized = [own for own in shown if own["by_size"]]
    if sized:
        unit = sized[0]["by_size"][0]["unit"]
        plot = size_plot([size_curve(own, sized) for own in sized], unit, f"sizes {number}")
        found.append(("Defects found by size, 95 % intervals", plot))
    return found


def froc_curve(finding: Line, findings: Sequence[Line]) -> FrocCurve:
    """The curve of a finding among others."""
    points = finding["froc"]
    x, y, low, high = ([point[name] for point in points] for name in ("false_calls", "recall", "low", "high"))
    at = (finding[f"false_calls_per_{finding['per']}"], finding["recall"])
    return FrocCurve(label_of(finding, findings), x, y, low, high, at)


def size_curve(finding: Line, findings: Sequence[Line]) -> SizeCurve:
    """Recall by size of a finding among others; sizes without a defect are no part of it."""
    sizes = [own for own in finding["by_size"] if own["defects"]]
    columns = ([own[name] for own in sizes] for name in ("defects", "found", "low", "high"))
    return SizeCurve(label_of(finding, findings), [size_name(own) for own in sizes], *columns)


def _plots(item: PageSet, number: int) -> list[tuple[str, str]]:
    score = scores_of(item.lines[0])[0]
    label = LABELS[score]
    found = [
        (f"{label}, 95 % interval over test groups",
         dot_plot(dots_of(item.lines, score), f"{label}, percent", f"scores {number}")),
    ]  # fmt: skip
    curves = curves_of(item.lines)
    if curves:
        plot = line_plot(curves, "iterations", f"{label} on validation, percent", f"validation curves {number}")
        found.append(("Validation curves, mean over seeds", plot))
    shares = efficiency_of(item.lines, score)
    if shares:
        plot = line_plot(shares, "share of the training split", f"{label}, percent", f"label efficiency {number}", True)
        found.append(("Label efficiency", plot))
    return found


def dots_of(lines: Sequence[Line], score: str) -> list[Dot]:
    """Results on the most training data as dots, those of one backbone in one colour."""
    lines = on_most_data(lines)
    return [Dot(label_of(line, lines), *_percents(line, score), hue=line["backbone"]) for line in lines]


def _percents(line: Line, score: str) -> tuple[float, float, float]:
    """A score and its interval, in percent."""
    return 100 * line[score], 100 * line[f"{score}_low"], 100 * line[f"{score}_high"]


def on_most_data(lines: Sequence[Line]) -> list[Line]:
    """Lines of the largest fraction of the training split; the others are for the plot of label efficiency."""
    most = max(line["fraction"] for line in lines)
    return [line for line in lines if line["fraction"] == most]


def label_of(line: Line, lines: Sequence[Line]) -> str:
    """The name that distinguishes a line from the others in a plot."""
    varying = [
        name for name in ("regime", "head", "size", "dtype") if len({other[name] for other in lines} - {None}) > 1
    ]
    share = [f"{100 * line['fraction']:g} % of train"] if len({other["fraction"] for other in lines}) > 1 else []
    alike = [other for other in lines if all(other[k] == line[k] for k in ("backbone", "fraction", *varying))]
    recipe = [line.get("differs") or f"recipe {line['recipe_key']}"] if len(alike) > 1 else []
    return ", ".join([line["backbone"], *(str(line[name]) for name in varying if line[name]), *share, *recipe])


def curves_of(lines: Sequence[Line]) -> list[Series]:
    """Validation curves in percent, of results on the most training data; none of heads that are solved."""
    shown = [line for line in on_most_data(lines) if line["curve"]["iterations"]]
    return [
        Series(label_of(line, shown), line["curve"]["iterations"], [100 * value for value in line["curve"]["values"]])
        for line in shown
    ]


def efficiency_of(lines: Sequence[Line], score: str) -> list[Series]:
    """Scores by share of the training split, of each backbone, regime and head that has several."""
    kinds: dict[tuple[str, ...], list[Line]] = {}
    for line in sorted(lines, key=lambda line: line["fraction"]):
        if line["chosen"]:
            kinds.setdefault((line["backbone"], line["regime"], line["head"]), []).append(line)
    return [
        Series(
            ", ".join(kind),
            [line["fraction"] for line in own],
            *([100 * line[part] for line in own] for part in (score, f"{score}_low", f"{score}_high")),
        )
        for kind, own in kinds.items()
        if len(own) > 1
    ]
