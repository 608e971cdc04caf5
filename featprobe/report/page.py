"""The report, or a data set's check, as one HTML page that holds all it shows.

No script, no request; readable on a phone, light and dark.
"""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from featprobe.errors import FileKindError
from featprobe.io.disk import below, read_regular, write_whole
from featprobe.io.texts import printable
from featprobe.report.comparison import class_table, difference_table, gap_table, result_table, scores_of
from featprobe.report.plots import Dot, Series, dot_plot, line_plot
from featprobe.scores import LABELS, SCORES

Line = Mapping[str, Any]
PNG_START, LARGEST_PICTURE = b"\x89PNG\r\n\x1a\n", 1 << 26  # bytes
STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --page: #ffffff; --soft: #f3f5f7; --line: #d5dae0; --mark: #a04100; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --page: #14171a; --soft: #1e2328; --line: #3a424a; --mark: #ffb070; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 74rem;
  margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-top: 1px solid var(--line);
  padding-top: 1rem; } h3 { font-size: 1rem; margin-bottom: .3rem; }
.answer { background: var(--soft); padding: .6rem 1rem; border-radius: 8px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap;
  vertical-align: top; }
th { font-weight: 600; white-space: normal; vertical-align: bottom; }
 th:first-child, td:first-child, td.words, th.words { text-align: left; }
td:first-child, th:first-child { position: sticky; left: 0; background: var(--page); }
th.marks, td.marks { text-align: left; white-space: normal; min-width: 9rem; } td.marks { color: var(--mark); }
.plots { margin-top: 1.2rem; display: flex; flex-wrap: wrap; gap: 1rem 2rem; align-items: flex-start; }
.plots figure { margin: 0; width: 460px; max-width: 100%; } figcaption { font-size: .9rem; font-weight: 600; }
svg, img { max-width: 100%; height: auto; }
pre { background: var(--soft); padding: .6rem; overflow-x: auto; font-size: .8rem; border-radius: 8px; }
li, p { overflow-wrap: anywhere; } .small { font-size: .85rem; }
"""
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
WORDS = {"backbone", "regime", "head", "within", "difference", "gap", "task", "verdict on"}
"""Columns that are read, not compared."""
LISTED = 200  # entries of a finding on a page


@dataclass(frozen=True)
class PageSet:
    """The contents of the page for one set: lines and differences as a comparison makes them, sheets with captions."""

    title: str
    lines: Sequence[Line]
    differences: Sequence[Line]
    sheets: Sequence[tuple[str, Path]]
    commands: Sequence[str]


def page_text(
    answer: Sequence[tuple[str, Sequence[str]]],
    sets: Sequence[PageSet],
    gaps: Sequence[Line],
    unusable: Sequence[tuple[str, str]],
    notes: Sequence[str],
) -> str:
    """The page of a comparison. answer: titles and sentences of each, shown first. unusable: folder and reason of rows
    that could not be used.
    """
    body = [
        "<h1>Which backbone, and is it enough to freeze it?</h1>",
        f'<div class="answer">{"".join(f"<h3>{escape(t)}</h3>{_paragraphs(said)}" for t, said in answer)}</div>',
        *[_section(item, number) for number, item in enumerate(sets, start=1)],
    ]
    if gaps:
        body += ["<h2>Modality gaps</h2>", _table(gap_table(gaps))]
    if notes or unusable:
        rows = [*notes, *(f"could not be used: {folder}: {reason}" for folder, reason in unusable)]
        body += ["<h2>Notes</h2>", f"<ul>{''.join(f'<li>{escape(row)}</li>' for row in rows)}</ul>"]
    shown = [line["task"] for item in sets for line in item.lines]
    of_scores = dict.fromkeys(own.why for task, own in SCORES.items() if task in shown)
    first, *rest = HOW_TO_READ
    how = [" ".join([first, *of_scores]), *rest]
    body += ["<h2>How to read this</h2>", f'<div class="small">{_paragraphs(how)}</div>']
    return _page("comparison", body)


def write_check_page(
    path: Path,
    title: str,
    facts: Sequence[str],
    findings: Sequence[tuple[bool, str, Sequence[str]]],
    tables: Sequence[tuple[str, pd.DataFrame]],
    notes: Sequence[str],
    sheets: Sequence[tuple[str, Path]],
) -> None:
    """Write what was found in a data set. findings: whether it would spoil a study, what it is, its entries.

    Raises DiskError where it can't be written.
    """
    found = [
        _entries(f"{'Would spoil a study: ' if spoils else 'To know: '}{text}", entries)
        for spoils, text, entries in findings
    ]
    body = [
        f"<h1>{escape(title)}</h1>",
        _paragraphs(facts),
        f'<div class="answer">{"".join(found) or _paragraphs(["Nothing was found that would spoil a study."])}</div>',
        *(f"<h2>{escape(heading)}</h2>{_table(table)}" for heading, table in tables),
        *(f"<h2>{escape(caption)}</h2>{_picture(caption, sheet)}" for caption, sheet in sheets),
        *([f"<h2>Notes</h2><ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>"] if notes else []),
    ]
    write_whole(path, _page(title, body))


def _page(title: str, body: Sequence[str]) -> str:
    head = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; img-src data:\">"
        f'<link rel="icon" href="data:,"><title>featprobe: {escape(title)}</title><style>{STYLE}</style></head><body>\n'
    )
    return head + "\n".join(body) + "\n</body></html>\n"


def escape(text: str) -> str:
    """A text as HTML that shows it, and what it does not show as such."""
    return html.escape(printable(text))


def _entries(text: str, entries: Sequence[str]) -> str:
    if not entries:
        return _paragraphs([text])
    rows = "".join(f"<li>{escape(entry)}</li>" for entry in entries[:LISTED])
    more = f"<p>and {len(entries) - LISTED} more: --json lists all</p>" if len(entries) > LISTED else ""
    return f"<details><summary>{escape(text)}</summary><ul>{rows}</ul>{more}</details>"


def _paragraphs(texts: Sequence[str]) -> str:
    return "".join(f"<p>{escape(text)}</p>" for text in texts)


def _section(item: PageSet, number: int) -> str:
    parts = [f"<h2>{escape(item.title)}</h2>", _table(result_table(item.lines)), _plots(item, number)]
    if item.differences:
        parts += ["<h3>Differences, in points</h3>", _table(difference_table(item.differences))]
    if any(line["classes"] for line in item.lines):
        parts += ["<h3>Classes, mean over seeds</h3>", _table(class_table(item.lines))]
    parts += [_sheet(caption, path) for caption, path in item.sheets]
    commands = escape("\n".join(item.commands))
    parts.append(f"<details><summary>The commands that made these results</summary><pre>{commands}</pre></details>")
    return "\n".join(parts)


def _table(table: pd.DataFrame) -> str:
    classes = [' class="marks"' if c == "marks" else ' class="words"' if c in WORDS else "" for c in table.columns]
    head = "".join(f"<th{k}>{escape(str(name))}</th>" for k, name in zip(classes, table.columns, strict=True))
    rows = [
        "".join(f"<td{k}>{escape(str(cell))}</td>" for k, cell in zip(classes, row, strict=True))
        for row in table.itertuples(index=False)
    ]
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _plots(item: PageSet, number: int) -> str:
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
    figures = (f"<figure><figcaption>{escape(title)}</figcaption>{plot}</figure>" for title, plot in found)
    return f'<div class="plots">{"".join(figures)}</div>'


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
    varying = [name for name in ("regime", "head", "size", "dtype") if len({other[name] for other in lines}) > 1]
    share = [f"{100 * line['fraction']:g} % of train"] if len({other["fraction"] for other in lines}) > 1 else []
    alike = [other for other in lines if all(other[k] == line[k] for k in ("backbone", "fraction", *varying))]
    recipe = [f"recipe {line['recipe_key']}"] if len(alike) > 1 else []
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


def _sheet(caption: str, path: Path) -> str:
    picture = _picture(f"Test images, truth and prediction: {caption}", path)
    return f"<details><summary>Pictures: {escape(caption)}</summary>{picture}</details>"


def _picture(caption: str, path: Path) -> str:
    try:
        found = read_regular(below(path.parent, path.name, "The picture"), LARGEST_PICTURE)
        if not found.startswith(PNG_START):
            raise FileKindError(f"{path} is no PNG.")
    except FileKindError as error:
        return f"<p>{escape(caption)}: not shown. {escape(str(error))}</p>"
    data = base64.b64encode(found).decode()
    return f'<img loading="lazy" alt="{escape(caption)}" src="data:image/png;base64,{data}">'
