"""Lines of a comparison as tables: whole for machines, readable for people."""

from collections.abc import Mapping, Sequence
from math import isnan
from typing import Any

import pandas as pd

from featprobe.report.text import table_text
from featprobe.scores import FEW_GROUPS, LABELS, SCORES

NOT_KEPT = ("curve", "classes", "differs")  # parts of a line that are no column
NONE = "–"
VERDICTS_ON = {"procedures": "any seed", "heads": "these heads", "none": "none"}
"""For people, what a difference may be claimed of."""
NO_INTERVAL = "no interval"
REACHED = "iterations to 90/95/99 %"
Line = Mapping[str, Any]


def result_frame(lines: Sequence[Line]) -> pd.DataFrame:
    """One row per result, all values as they are: scores in [0, 1], seconds; another task's scores are nan."""
    return pd.DataFrame([{k: v for k, v in line.items() if k not in NOT_KEPT} for line in lines]).convert_dtypes()


def difference_frame(lines: Sequence[Line]) -> pd.DataFrame:
    """One row per difference, modality gaps (kind `gap`) included: differences in [-1, 1]."""
    columns = ["set", "kind", "within", "head", "fraction", "score", "a", "b", "difference", "low", "high", "p",
               "p_holm", "groups", "claim", "of_heads", "seeds", "recipes", "named", "scale_a", "scale_b",
               "iterations_a", "iterations_b", "confounded", "not_converged", "budget_unchecked", "budget_small",
               "a_reaches_b", "b_reaches_a"]  # fmt: skip
    gaps = {"kind": "gap"}
    rows = [line if "kind" in line else gaps | {**line, "set": f"{line['first']} - {line['second']}"} for line in lines]
    return pd.DataFrame([{name: row.get(name) for name in columns} for row in rows], columns=columns).convert_dtypes()


def scores_of(line: Line) -> list[str]:
    """The names of the scores in a line, the main one first."""
    return [score.name for score in SCORES[line["task"]].compared if score.name in line]


def marks_of(line: Line) -> list[str]:
    """Warnings that a reader needs before believing a line of either table."""
    needed = line.get("iterations_needed")
    more = f"needs {needed} iterations" if needed != line.get("iterations") else f"needs more than {needed} iterations"
    marks = {
        f"recipes differ: {line.get('recipes')}": line.get("recipes"),
        f"of these heads alone: {line.get('of_heads')}": line.get("claim") == "heads",
        str(line.get("named")): line.get("named"),
        str(line.get("settings")): line.get("settings"),
        "not converged": line.get("not_converged"),
        "budget not checked": line.get("budget_unchecked"),
        more: needed,
        "too few iterations": line.get("budget_small"),
        "confounded by augmentation": line.get("confounded"),
        "another input size": line.get("scale_a") != line.get("scale_b"),
        f"few groups ({line['groups']})": line["groups"] < FEW_GROUPS,
    }
    return [name for name, holds in marks.items() if holds]


def result_table(lines: Sequence[Line], brief: bool = False) -> pd.DataFrame:
    """The results of one set as text for people, scores in percent.

    brief: for a terminal: without the interval of the second score, and without columns that hold one value.
    """
    table = pd.DataFrame([_result_cells(line, brief) for line in lines])
    usual = {"of train": {"100 %"}, "*": {"*"}, "split": set(table["split"][:1]), "recipe": {""}}
    usual |= {"size": set(table["size"][:1])} if brief else {}
    usual[REACHED] = {"–/–/–"}
    if len(set(table["dtype"]) - {NONE}) < 2:
        usual["dtype"] = set(table["dtype"])
    for name in scores_of(lines[0])[1:]:  # those that a task has only on some sets
        parts = [(LABELS[name], NONE), (f"sd {LABELS[name]}", NONE), (f"95 % {LABELS[name]}", NO_INTERVAL)]
        usual |= {column: {value} for column, value in parts if set(table[LABELS[name]]) == {NONE} and column in table}
    table = table.drop(columns=[name for name, values in usual.items() if set(table[name]) == values])
    return table if table["marks"].any() or not brief else table.drop(columns="marks")


def _result_cells(line: Line, brief: bool) -> dict[str, str]:
    cells = {"backbone": line["backbone"], "regime": line["regime"], "head": line["head"],
             "recipe": line.get("differs", ""), "split": line["split"], "size": line["size"],
             "dtype": line["dtype"] or NONE, "of train": f"{100 * line['fraction']:g} %",
             "*": "*" if line["chosen"] else "", "seeds": str(line["seeds"])}  # fmt: skip
    for i, name in enumerate(scores_of(line)):
        cells[LABELS[name]] = number(100 * line[name])
        if i == 0 or not brief:
            cells["sd" if i == 0 else f"sd {LABELS[name]}"] = number(100 * line[f"{name}_sd"])
            cells["95 %" if i == 0 else f"95 % {LABELS[name]}"] = interval_text(
                line[f"{name}_low"], line[f"{name}_high"]
            )
    cells |= {"groups": str(line["groups"]), "trials": str(line["trials"])}
    cells |= {"head params": str(line["head_parameters"]), "backbone params": str(line["backbone_parameters"])}
    cells["iterations"] = f"{_whole(line['iterations'])}{', found' if line['iterations_found'] else ''}"
    cells[REACHED] = "/".join(_whole(line[f"iterations_{share}"]) for share in (90, 95, 99))
    cells |= {f"{part} s": number(line[f"{part}_seconds"]) for part in ("train", "extract", "total")}
    return cells | {"marks": ", ".join(marks_of(line))}


def class_table(lines: Sequence[Line]) -> pd.DataFrame:
    """The score of each class as text for people, in percent; a dash for one that takes no part."""
    dtypes = ["dtype"] if len({line["dtype"] for line in lines} - {None}) > 1 else []
    kinds = ("backbone", "regime", "head", "size", *dtypes)
    return pd.DataFrame([
        {**{name: line[name] or NONE for name in kinds}, "of train": f"{100 * line['fraction']:g} %"}
        | {name: number(100 * value) for name, value in line["classes"].items()}
        for line in lines
    ])  # fmt: skip


def difference_table(lines: Sequence[Line]) -> pd.DataFrame:
    """Differences as text for people, in points (percent). Iterations: the first's before the bar."""
    table = pd.DataFrame([
        {
            "within": line["within"] + ("" if line["fraction"] == 1 else f", {100 * line['fraction']:g} % of train"),
            "difference": f"{line['a']} − {line['b']}",
            f"{LABELS[line['score']]}": f"{100 * line['difference']:+.1f}",
            "95 %": interval_text(line["low"], line["high"], "+.1f"),
            "p": number(line["p"], ".3g"),
            "p (Holm)": number(line["p_holm"], ".3g"),
            "verdict on": VERDICTS_ON[line["claim"]],
            "iterations to the rival's end": f"{_whole(line['a_reaches_b'])} | {_whole(line['b_reaches_a'])}",
            "marks": ", ".join(marks_of(line)),
        }
        for line in lines
    ])  # fmt: skip
    reached = "iterations to the rival's end"
    return table.drop(columns=reached) if set(table[reached]) == {"– | –"} else table


def gap_table(lines: Sequence[Line]) -> pd.DataFrame:
    """Modality gaps as text for people, in points (percent)."""
    return pd.DataFrame([
        {
            "task": line["task"], "regime": line["regime"], "head": line["head"],
            "of train": f"{100 * line['fraction']:g} %",
            "gap": f"({line['a']} − {line['b']} on {line['first']}) − (the same on {line['second']})",
            f"{LABELS[line['score']]}": f"{100 * line['difference']:+.1f}",
            "95 %": interval_text(line["low"], line["high"], "+.1f"),
            "p": number(line["p"], ".3g"), "p (Holm)": number(line["p_holm"], ".3g"),
            "verdict on": VERDICTS_ON[line["claim"]],
            "marks": ", ".join(marks_of(line)),
        }
        for line in lines
    ])  # fmt: skip


def number(value: float | None, form: str = ".1f") -> str:
    """A number, or a dash for none.

    >>> number(12.345), number(float("nan"))
    ('12.3', '–')
    """
    return NONE if value is None or isnan(value) else format(value, form)


def interval_text(low: float, high: float, form: str = ".1f") -> str:
    """An interval of shares in percent; nan where there is none, or where it would reach to a bound of the scale.

    >>> interval_text(0.1, 0.25), interval_text(float("nan"), float("nan"))
    ('10.0 to 25.0', 'no interval')
    """
    return NO_INTERVAL if isnan(low) else f"{100 * low:{form}} to {100 * high:{form}}"


def budget_text(iterations: Sequence[int | None]) -> str:
    """Numbers of iterations for people, those of the frozen regime first.

    >>> budget_text([400, 400]), budget_text([400, 50])
    ('400 iterations', '400 and 50 iterations')
    """
    numbers = dict.fromkeys(str(value) for value in iterations if value is not None)
    return f"{' and '.join(numbers)} iteration{'' if list(numbers) == ['1'] else 's'}"


def _whole(value: int | None) -> str:
    return NONE if value is None else str(value)


def comparison_text(
    sets: Sequence[tuple[str, Sequence[Line], Sequence[Line]]], gaps: Sequence[Line], width: int | None = None
) -> str:
    """All tables as text for a terminal: of each set its title, its results, its differences; see `table_text`."""
    blocks = []
    for title, lines, differences in sets:
        blocks.append(f"{title}\n{table_text(result_table(lines, brief=True), width)}")
        if differences:
            blocks.append(table_text(difference_table(differences), width))
    if gaps:
        blocks.append(f"Modality gaps\n{table_text(gap_table(gaps), width)}")
    return "\n\n".join(blocks)
