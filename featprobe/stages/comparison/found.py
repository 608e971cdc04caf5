"""What the heads of a comparison find, by the records beside them, and whether one finds more than another."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from featprobe.errors import FeatprobeError
from featprobe.metrics import Statistic, grouped, paired_difference
from featprobe.metrics.defects.overlaps import rule_text
from featprobe.metrics.images import value_of
from featprobe.report.page import Probability
from featprobe.report.pod_plot import pod_plot
from featprobe.report.rendering import Picture
from featprobe.stages.comparison.differences import Line, Table, kind_of_pair
from featprobe.stages.comparison.results import Result
from featprobe.stages.inspection.inspect import Inspection, inspect_head
from featprobe.stages.inspection.lines import class_lines, froc_lines, head_line, size_lines
from featprobe.stages.inspection.pod import drawing_of, pod_lines, pod_of
from featprobe.stages.inspection.worst import worst
from featprobe.stages.workspace import Workspace

Floats = NDArray[np.float64]
PICTURES = 4  # of misses, and as many of false calls


@dataclass(frozen=True)
class Findings:
    """What the heads of a table find.

    lines: of each result on the most training data that stands for its backbone, the seed that is best on validation.
    inspections: of which the lines are. differences: between two of them that differ in one thing, of the share of the
    defects that they find. missing: a sentence for each head that could not be inspected.
    """

    lines: tuple[Line, ...]
    inspections: tuple[Inspection, ...]
    differences: tuple[Line, ...]
    missing: tuple[str, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader should know of the inspections, each sentence once."""
        rules = dict.fromkeys(rule_text(own.records.about.rule) for own in self.inspections)
        apart = f"records follow different rules of what is found ({'; '.join(rules)}), so only heads of one rule are "
        apart += "compared by what they find. To make all by one rule:  featprobe inspect --rescore --found usual"
        notes = [note for own in self.inspections for note in own.notes]
        return tuple(dict.fromkeys([*([apart] if len(rules) > 1 else []), *notes]))


def findings_of(workspace: Workspace, table: Table) -> Findings:
    """Inspect the heads of a table."""
    most = max(result.row.fraction for result in table.results)
    every: list[tuple[Result, Inspection]] = []
    missing = []
    for result in table.chosen:
        if result.row.fraction == most:
            best = max(result.runs, key=lambda run: (_validation(run.row.validation), -run.row.seed)).row
            try:
                every.append((result, inspect_head(workspace, best)))
            except FeatprobeError as error:
                missing.append(f"{table.names[result.backbone]}, {result.variant}, {result.row.head}: {error}")
    pairs = [_difference(a, b, kind) for a, b in combinations(every, 2) if (kind := kind_of_pair(a[0], b[0]))]
    lines = [_line(result, own, table) for result, own in every]
    found = [pair for pair in pairs if pair]
    return Findings(tuple(lines), tuple(own for _, own in every), tuple(found), tuple(missing))


def _validation(score: float | None) -> float:
    return -1.0 if score is None else score


def _line(result: Result, own: Inspection, table: Table) -> Line:
    statistic = result.score(result.main)
    return {
        **head_line(own),
        "backbone": table.names[result.backbone],
        "regime": result.variant,
        "classes": list(result.row.classes[0 if result.row.scores.on == "images" else 1 :]),
        **{"size": result.size, "dtype": result.dtype or None, "recipe_key": result.row.recipe_key},
        "score": value_of(statistic),
        "validation": result.validation,
        "groups": sum(statistic.sizes),
        "by_size": size_lines(own),
        "froc": froc_lines(own),
        "without_defect": own.froc.without,
        "by_class": class_lines(own),
    }


def _difference(a: tuple[Result, Inspection], b: tuple[Result, Inspection], kind: str) -> Line | None:
    """The share of the defects that the first finds minus that of the second; None where these are not the same, or
    found by different rules, or where their operating points were chosen for different things."""
    one, other = a[1], b[1]
    counts = [_defects_by_image(own) for own in (one, other)]
    asked = [(own.records.about.rule, own.points[0].wanted) for own in (one, other)]
    if counts[0] != counts[1] or asked[0] != asked[1]:
        return None
    first, second = _recall(one), _recall(other)
    if not first or not second:
        return None
    found = paired_difference(first, second)
    low, high = (found.low, found.high) if found.has_interval else (np.nan, np.nan)
    return {
        **{"kind": kind, "folder_a": str(one.folder), "folder_b": str(other.folder)},
        **{"difference": found.estimate, "low": low, "high": high, "p": found.p_value, "p_holm": np.nan},
    }


def _defects_by_image(own: Inspection) -> dict[str, int]:
    counts = np.bincount(own.records.defects.image, minlength=len(own.records.images))
    return dict(zip(own.records.images.ids, counts.tolist(), strict=True))


def _recall(own: Inspection) -> Statistic | None:
    """The share of the defects that are found as a function of how often each group counts; None without a defect."""
    names, index = grouped(own.records.images.groups)
    of = index[own.records.defects.image]
    hits = np.bincount(of, weights=own.found, minlength=len(names)).astype(np.float64)
    defects = np.bincount(of, minlength=len(names)).astype(np.float64)
    return _ratio(hits, defects, tuple(names)) if len(of) else None


def _ratio(hits: Floats, trials: Floats, names: tuple[str, ...]) -> Statistic:
    """A share of trials by group, (groups,)."""

    def value(weights: Floats) -> Floats:
        with np.errstate(invalid="ignore"):
            return (weights @ hits) / (weights @ trials)

    def influence(weights: Floats) -> Floats:
        with np.errstate(invalid="ignore"):
            return (hits - value(weights)[:, None] * trials) / (weights @ trials)[:, None]

    return Statistic(value, influence, (names,))


def probability_of(own: Inspection, number: int) -> Probability:
    """The probability of detection of a head at its operating point, or why the test images carry none.

    number: of the set on its page, where each plot needs a name of its own.
    """
    answer = pod_of(own.records, own.found, tuple(point.threshold for point in own.points), own.size, own.unit)
    drawing = drawing_of(answer)
    said: list[tuple[str, list[str]]] = []
    for line in pod_lines(answer, own.test):
        if line.startswith(" ") and said:  # of what is above it
            below = said[-1][1]
            if below and below[-1].endswith(":"):
                below[-1] += f" {line.strip()}"
            else:
                below.append(line.strip())
        else:
            said.append((line, []))
    return Probability(pod_plot(drawing, f"probability of detection {number}") if drawing else "", said)


def pictures_of(own: Inspection) -> list[Picture]:
    """The worst misses and the worst false calls of a head, each enlarged beside its whole image."""
    return [
        Picture.of(shown.caption, shown.png) if shown.png else Picture(shown.caption, fault=shown.fault)
        for shown in worst(own, PICTURES)
    ]


def names_without_records(each: Sequence[Findings]) -> list[str]:
    """A note on the heads that could not be inspected, with what to run."""
    missing = [text for own in each for text in own.missing]
    if not missing:
        return []
    first, *others = missing
    more = f" (and {len(others)} more)" if others else ""
    return [f"without records of what they find, for the answer in scores alone: {first}{more}. "
            "To make them:  featprobe inspect --rescore"]  # fmt: skip
