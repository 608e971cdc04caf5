"""An inspection as text for a terminal: what is found, what is called by mistake, which parts are rejected."""

from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import PurePath
from typing import Any

import pandas as pd

from featprobe.errors import counted, figures
from featprobe.report.comparison import NONE
from featprobe.report.text import table_text

Line = Mapping[str, Any]
SIZE_NAMES = {
    "root_area": "square root of the area",
    "area": "area",
    "longest": "longest side",
    "shortest": "shortest side",
}
LARGE = 4  # times the area of a defect, from which on a call that finds it says little of where it is
MISSED_SHOWN = 5  # of the defects that are missed


def inspection_text(line: Line, width: int | None = None) -> str:
    """One head: sentences, then tables. line: as `stages.inspection.lines.whole_line` makes it."""
    blocks = ["\n".join([title_of(line), place_of(line)]), "\n".join(sentences(line))]
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


def place_of(line: Line) -> str:
    """The folder of a head; of a cross-validation the one above its folds."""
    folder = PurePath(line["folder"])
    return str(folder.parents[1] if line["folds"] > 1 else folder)


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
        f"{_share(line['validation_recall'])}, {_number(line['validation_false_calls_per_' + line['per']])} "
        f"false calls per {_per(line)}.",
    ]
    return (
        said if line["pooled"] else [*said, f"A defect counts as found by a call with: {line['rule']}.", *_large(line)]
    )


def _large(line: Line) -> list[str]:
    """How large calls are beside what they find, which the usual rule does not limit."""
    times = line["times_as_large"]
    if isnan(times):
        return []
    outlines = "; --found iou:0.5 asks for outlines" if times >= LARGE and "IoU at least 0.1" in line["rule"] else ""
    large = "as large as it" if (said := figures(times, 2)) == "1" else f"{said} times as large as it"
    return [f"Calls that find a defect are {large}, in the median{outlines}."]


def _false_calls(line: Line) -> str:
    said = f"False calls: {line['false_calls']} on {counted(line['over_images'], _per_image(line))}"
    said += f", {_number(line['false_calls_per_image'])} per {_per_image(line)}"
    if line["parts_known"] and line["good_parts"]:
        said += f"; {_number(100 * line['false_calls_on_good_parts'] / line['good_parts'])} per 100 good parts"
    if line["per"] == "part":
        said += f"; {_number(line['false_calls_per_part'])} per {_per(line)}"
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
    if line["parts_known"] and line["good_images"] and not line["pooled"]:
        said.append(f"Good images: {line['good_images_called']} of {line['good_images']} with a call.")
    return said


def _threshold(line: Line) -> str:
    at = f"Threshold {line['threshold']:.4g}" if line["threshold"] is not None else "Thresholds, one of each fold"
    least = f", calls of {line['least_area']} pixels or more" if line["least_area"] > 1 else ""
    kept = (
        "kept beside the head, for predict and export"
        if line["kept"]
        else "not kept, as --false-calls, --recall or --cost would"
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
            "best score": NONE if line["score"] is None else f"{figures(line['score'])}",
        }
        for line in lines
    ])  # fmt: skip


def overview_text(lines: Sequence[Line], width: int | None = None) -> str:
    """Several heads side by side, and what is the same of all."""
    wanted = list(dict.fromkeys(line["wanted"] for line in lines))
    rules = list(dict.fromkeys(line["rule"] for line in lines if not line["pooled"]))
    chosen = f" for {wanted[0]}." if len(wanted) == 1 else ", for different aims: do not compare them."
    said = [f"Test images, each head at its own threshold, chosen on validation{chosen}"]
    said += [f"Found by a call with: {rules[0]}."] if len(rules) == 1 else []
    said += ["Found by different rules: do not compare these heads."] if len(rules) > 1 else []
    table = overview(lines)
    alike = {name for name in ("split", "chosen for", "found by") if table[name].nunique() == 1}
    alike |= {"of train"} if set(table["of train"]) == {"100 %"} else set()
    table = table.drop(columns=sorted(alike | ({"found by"} if len(rules) < 2 else set())))
    return "\n".join([*said, "", table_text(table, width)])


def notes_text(lines: Sequence[Line]) -> list[str]:
    """The notes of all heads, each once, with the heads that it is about where it is not about all."""
    folders: dict[str, list[str]] = {}
    for line in lines:
        for note in line["notes"]:
            folders.setdefault(note, []).append(line["folder"])
    return [
        f"note: {note}" if len(own) == len(lines) else "\n  ".join([f"note: {note}", *own])
        for note, own in folders.items()
    ]


def overview(lines: Sequence[Line]) -> pd.DataFrame:
    """Several heads as text for people, those of one data set and task together."""
    return pd.DataFrame([
        {
            "data": line["data"], "task": line["task"], "backbone": line["backbone"], "regime": line["regime"],
            "head": line["head"], "split": line["split"],
            "of train": f"{100 * line['fraction']:g} %",
            "seed": str(line["seed"]) + (f" of {line['seeds']}" if line["seeds"] > 1 else ""),
            "found": _fraction(line["found"], line["defects"]) + (" images" if line["pooled"] else ""),
            "%": _percent(line["recall"]),
            "95 %": _interval(line["recall_low"], line["recall_high"]),
            "false calls/image": _number(line["false_calls_per_image"]),
            "escapes": _fraction(line["escaped"], line["bad_parts"]),
            "overkill": _fraction(line["stopped"], line["good_parts"]),
            "threshold": "by fold" if line["threshold"] is None else f"{line['threshold']:.4g}",
            "chosen for": line["wanted"], "found by": NONE if line["pooled"] else line["rule"],
            "kept": "yes" if line["kept"] else "no",
        }
        for line in sorted(lines, key=lambda own: (own["data"], own["task"]))
    ])  # fmt: skip


def _of(part: int, whole: int, one: str, many: str = "") -> str:
    return f"{part} of {counted(whole, one, many)}"


def _fraction(part: int, whole: int) -> str:
    return f"{part}/{whole}" if whole else NONE


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


def _number(value: float) -> str:
    return NONE if isnan(value) else figures(value)


def _unit(size: str, unit: str) -> str:
    return f"{unit}²" if size == "area" else unit
