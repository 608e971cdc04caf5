"""An inspection as text for a terminal: what is found, what is called by mistake, which parts are rejected."""

from collections.abc import Mapping, Sequence
from math import isnan
from typing import Any

import pandas as pd

from featprobe.errors import counted
from featprobe.report.comparison import NONE
from featprobe.report.text import table_text

Line = Mapping[str, Any]
SIZE_NAMES = {
    "root_area": "square root of the area",
    "area": "area",
    "longest": "longest side",
    "shortest": "shortest side",
}
MISSED_SHOWN = 5  # of the defects that are missed


def inspection_text(line: Line, width: int | None = None) -> str:
    """One head: sentences, then tables. line: as `stages.inspection.lines.whole_line` makes it."""
    blocks = ["\n".join([title_of(line), line["folder"]]), "\n".join(sentences(line))]
    if line["by_size"]:
        first = line["by_size"][0]
        title = f"By size: {SIZE_NAMES[first['size']]}, {_unit(first['size'], first['unit'])}"
        blocks.append(f"{title}\n{table_text(size_table(line['by_size']), width)}")
    if len(line["by_class"]) > 1:
        blocks.append(f"By class, most missed first\n{table_text(class_table(line['by_class']), width)}")
    if line["missed"] and not line["pooled"]:
        title = f"Missed: the largest of {len(line['missed'])}" if len(line["missed"]) > MISSED_SHOWN else "Missed"
        blocks.append(f"{title}\n{table_text(missed_table(line['missed'][:MISSED_SHOWN]), width)}")
    return "\n\n".join(blocks)


def title_of(line: Line) -> str:
    """What the head is."""
    seed = f"all {line['folds']} folds, seed {line['seed']}" if line["folds"] > 1 else f"seed {line['seed']}"
    seed += f", fold {line['fold']}" if line["fold"] else ""
    best = f" (the best of {line['seeds']} on validation)" if line["seeds"] > 1 else ""
    share = "" if line["fraction"] == 1 else f", {100 * line['fraction']:g} % of train"
    return (
        f"{line['data']}, {line['task']}: {line['head']} on {line['backbone']}, {line['regime']}{share}, {seed}{best}"
    )


def sentences(line: Line) -> list[str]:
    """What is found and what is called by mistake, at which threshold, and what validation said before."""
    what, found = ("image with a defect", "called") if line["pooled"] else ("defect", "found")
    many = "images with a defect" if line["pooled"] else ""
    said = [
        f"{found.capitalize()} {_of(line['found'], line['defects'], what, many)}"
        f"{_share(line['recall'], line['recall_low'], line['recall_high'])}.",
        _false_calls(line),
        *_parts(line),
        _threshold(line),
        f"Validation had said: {_of(line['validation_found'], line['validation_defects'], what, many)} {found}"
        f"{_share(line['validation_recall'])}, {_rate(line['validation_false_calls_per_' + line['per']])} "
        f"false calls per {_per(line)}.",
    ]
    return said if line["pooled"] else [*said, f"A defect counts as found by a call with: {line['rule']}."]


def _false_calls(line: Line) -> str:
    said = f"False calls: {line['false_calls']} on {counted(line['images'], _per_image(line))}"
    said += f", {_rate(line['false_calls_per_image'])} per {_per_image(line)}"
    if line["parts_known"] and line["good_parts"]:
        said += f"; {_number(100 * line['false_calls_on_good_parts'] / line['good_parts'])} per 100 good parts"
    share = "" if line["pooled"] else f" ({100 * line['without_defect']:.0f} % of the {line['per']}s hold no defect)"
    return f"{said}{share}."


def _parts(line: Line) -> list[str]:
    """Escapes and overkill; a part is an image where groups are not known to be parts."""
    part = "part" if line["parts_known"] else "image"
    said = []
    if line["bad_parts"]:
        share = _share(line["escapes"], line["escapes_low"], line["escapes_high"])
        said.append(
            f"Escapes: {line['escaped']} of {counted(line['bad_parts'], f'bad {part}')} without any call{share}."
        )
    if line["good_parts"]:
        share = _share(line["overkill"], line["overkill_low"], line["overkill_high"])
        said.append(f"Overkill: {line['stopped']} of {counted(line['good_parts'], f'good {part}')} stopped{share}.")
    return said


def _threshold(line: Line) -> str:
    at = f"Threshold {line['threshold']:.4g}" if line["threshold"] is not None else "Thresholds, one of each fold"
    least = f", calls of {line['least_area']} pixels or more" if line["least_area"] > 1 else ""
    kept = (
        "it lies beside the head, for predict and export"
        if line["kept"]
        else "it is not kept; --false-calls, --recall or --cost choose one that is"
    )
    return f"{at}{least}, chosen on validation for {line['wanted']}; {kept}."


def size_table(lines: Sequence[Line]) -> pd.DataFrame:
    """Recall by size as text for people."""
    return pd.DataFrame([
        {
            "from": _number(line["least"]), "below": _number(line["below"]), "defects": str(line["defects"]),
            "found": str(line["found"]), "%": _percent(line["recall"]), "95 %": _interval(line["low"], line["high"]),
        }
        for line in lines
    ])  # fmt: skip


def class_table(lines: Sequence[Line]) -> pd.DataFrame:
    """What is missed by class as text for people."""
    return pd.DataFrame([
        {
            "class": line["class"], "defects": str(line["defects"]), "missed": str(line["missed"]),
            "missed %": _percent(line["missed"] / line["defects"]),
        }
        for line in lines
    ])  # fmt: skip


def missed_table(lines: Sequence[Line]) -> pd.DataFrame:
    """Defects that are missed as text for people."""
    return pd.DataFrame([
        {
            "image": line["image"], "class": line["class"] or NONE, "longest px": _number(line["longest"]),
            "shortest px": _number(line["shortest"]), "area px²": _number(line["area"]),
            "contrast/noise": _number(line["contrast"]), "at x, y": f"{line['x1']:.0f}, {line['y1']:.0f}",
            "best score": NONE if line["score"] is None else f"{line['score']:.3g}",
        }
        for line in lines
    ])  # fmt: skip


def overview(lines: Sequence[Line]) -> pd.DataFrame:
    """Several heads side by side as text for people, those of one data set and task together."""
    return pd.DataFrame([
        {
            "data": line["data"], "task": line["task"], "backbone": line["backbone"], "regime": line["regime"],
            "head": line["head"], "seed": str(line["seed"]) + (f" of {line['seeds']}" if line["seeds"] > 1 else ""),
            "found": f"{line['found']}/{line['defects']}", "%": _percent(line["recall"]),
            "95 %": _interval(line["recall_low"], line["recall_high"]),
            "false calls/image": _rate(line["false_calls_per_image"]),
            "escapes": f"{line['escaped']}/{line['bad_parts']}", "overkill": f"{line['stopped']}/{line['good_parts']}",
            "threshold": "by fold" if line["threshold"] is None else f"{line['threshold']:.4g}",
            "chosen for": line["wanted"], "kept": "yes" if line["kept"] else "no",
        }
        for line in sorted(lines, key=lambda own: (own["data"], own["task"]))
    ])  # fmt: skip


def _of(part: int, whole: int, one: str, many: str = "") -> str:
    return f"{part} of {counted(whole, one, many)}"


def _per_image(line: Line) -> str:
    return "good image" if line["pooled"] else "image"


def _per(line: Line) -> str:
    return f"good {line['per']}" if line["pooled"] else str(line["per"])


def _share(value: float, low: float = float("nan"), high: float = float("nan")) -> str:
    """A share behind its numbers; "" where there is none."""
    if isnan(value):
        return ""
    return f", {100 * value:.1f} %" + ("" if isnan(low) else f" ({100 * low:.1f} to {100 * high:.1f})")


def _percent(value: float) -> str:
    return NONE if isnan(value) else f"{100 * value:.1f}"


def _interval(low: float, high: float) -> str:
    return NONE if isnan(low) else f"{100 * low:.1f} to {100 * high:.1f}"


def _rate(value: float) -> str:
    return NONE if isnan(value) else f"{value:.3g}"


def _number(value: float) -> str:
    return NONE if isnan(value) else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _unit(size: str, unit: str) -> str:
    return f"{unit}²" if size == "area" else unit
