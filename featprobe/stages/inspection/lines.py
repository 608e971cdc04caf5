"""Inspections as plain values: lines for tables, text, CSV files and JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from featprobe.io.disk import write_together
from featprobe.io.fields import plain
from featprobe.metrics.defects.overlaps import rule_text
from featprobe.metrics.defects.records import GOOD, NOTHING, SIZES
from featprobe.report.tables import csv_text
from featprobe.stages.inspection.inspect import Inspection, Inspections

Line = dict[str, Any]


def head_line(own: Inspection) -> Line:
    """An inspection as one flat line: the head, the operating point, and what it gives on test and on validation."""
    row, test, said, parts, point = own.row, own.test, own.validation, own.parts, own.points[0]
    return {
        **{name: getattr(row, name) for name in ("data", "task", "backbone", "head", "regime", "split", "fraction")},
        "seed": row.seed,
        "seeds": own.seeds,
        "fold": row.fold if len(own.points) == 1 else None,
        "folds": len(own.points),
        "folder": str(own.folder),
        "pooled": own.records.about.pooled,
        "rule": rule_text(own.records.about.rule),
        "wanted": str(point.wanted),
        "per": point.wanted.per,
        "threshold": point.threshold if own.point else None,
        "base": point.base if own.point else None,
        "least_area": point.least_area,
        "kept": own.kept,
        "defects": test.defects,
        "found": test.found,
        "recall": test.recall,
        "recall_low": own.recall.low,
        "recall_high": own.recall.high,
        "images": test.images,
        "over_images": test.over_images,
        "over_parts": test.over_parts,
        "calls": test.calls,
        "good_images": test.good_images,
        "false_calls": test.false_calls,
        "false_calls_per_image": test.false_calls_per("image"),
        "false_calls_per_part": test.false_calls_per("part"),
        "parts_known": own.records.about.parts,
        "bad_parts": parts.bad,
        "escaped": parts.escaped,
        "escapes": parts.escapes,
        "escapes_low": parts.escapes_low,
        "escapes_high": parts.escapes_high,
        "good_parts": parts.good,
        "stopped": parts.stopped,
        "overkill": parts.overkill,
        "overkill_low": parts.overkill_low,
        "overkill_high": parts.overkill_high,
        "false_calls_on_good_parts": test.stray,
        "times_as_large": _times_as_large(own),
        "good_images_called": int(np.sum(_called_images(own) & (own.records.images.good == GOOD))),
        **{
            f"validation_{name}": getattr(said, name)
            for name in ("defects", "found", "recall", "images", "false_calls")
        },
        "validation_false_calls_per_image": said.false_calls_per("image"),
        "validation_false_calls_per_part": said.false_calls_per("part"),
    }


def _called_images(own: Inspection) -> NDArray[np.bool_]:
    """Whether each image holds a call, (images,)."""
    calls = own.records.calls.image[own.records.called(own.thresholds)]
    return np.bincount(calls, minlength=len(own.records.images)) > 0


def _times_as_large(own: Inspection) -> float:
    """Area of a call that finds a defect over that of the defect, in the median; nan where nothing is found."""
    call, defect = own.records.finds[own.records.called(own.thresholds)[own.records.finds[:, 0]]].T
    areas = own.records.defects.size("area")[defect]
    return float(np.median(own.records.calls.size("area")[call] / areas)) if len(call) else float("nan")


def size_lines(own: Inspection) -> list[Line]:
    """Recall by size, a line for each octave."""
    named = {"size": own.size, "unit": own.unit}
    return [{**named, **asdict(each), "recall": each.recall} for each in own.by_size]


def froc_lines(own: Inspection) -> list[Line]:
    """The FROC curve with its band, a line for each rate of false calls at which the band is known."""
    curve = own.froc
    return [
        {"false_calls": rate, "per": curve.per, "recall": curve.recall_at(rate), "low": low, "high": high}
        for rate, low, high in zip(curve.rates.tolist(), curve.low.tolist(), curve.high.tolist(), strict=True)
    ]


def class_lines(own: Inspection) -> list[Line]:
    """What is missed by class."""
    return [{"class": each.name, **{k: v for k, v in asdict(each).items() if k != "name"}} for each in own.missed]


def missed_lines(own: Inspection, most: int | None = None) -> list[Line]:
    """The defects that are missed, the largest first. most: of them, so many at most."""
    defects, images = own.records.defects, own.records.images
    missed = np.flatnonzero(~own.found)
    sizes = np.nan_to_num(defects.size(own.size, own.unit)[missed], nan=-1.0)
    return [
        {
            **_place(own, int(defects.image[i])),
            "class": _class_of(own, int(defects.category[i])),
            **_shape(defects.boxes[i], defects.pixels[i], defects.millimetres[i]),
            "contrast": float(defects.contrast[i]),
            "cut": bool(defects.cut[i]),
            "score": None if np.isneginf(defects.score[i]) else float(defects.score[i]),
            "part": images.groups[int(defects.image[i])],
        }
        for i in missed[np.argsort(-sizes, kind="stable")][:most].tolist()
    ]


def false_call_lines(own: Inspection) -> list[Line]:
    """The false calls at the operating point, the highest score first."""
    calls = own.records.calls
    false = np.flatnonzero((calls.touched == NOTHING) & own.records.called(own.thresholds))
    return [
        {
            **_place(own, int(calls.image[i])),
            "class": _class_of(own, int(calls.category[i])),
            **_shape(calls.boxes[i], calls.pixels[i], calls.millimetres[i]),
            "score": float(calls.score[i]),
            "part": own.records.images.groups[int(calls.image[i])],
        }
        for i in false[np.argsort(-calls.score[false], kind="stable")].tolist()
    ]


def part_lines(own: Inspection) -> list[Line]:
    """The parts that escape, then the good parts that are stopped."""
    each = (("escaped", own.parts.escaped_parts), ("stopped", own.parts.stopped_parts))
    return [{"part": name, "what": what} for what, names in each for name in names]


def _place(own: Inspection, image: int) -> Line:
    return {"image": own.records.images.ids[image], "file": own.records.images.files[image]}


def _class_of(own: Inspection, category: int) -> str:
    classes = own.records.about.classes
    return classes[category] if 0 < category < len(classes) else ""


def _shape(box: Any, pixels: Any, millimetres: Any) -> Line:
    sizes: Line = {name: float(value) for name, value in zip(map(str, SIZES), pixels, strict=True)}
    sizes |= {f"{name}_mm": float(value) for name, value in zip(SIZES, millimetres, strict=True)}
    return {**dict(zip(("x1", "y1", "x2", "y2"), map(float, box), strict=True)), **sizes}


def whole_line(own: Inspection, most: int | None = None) -> Line:
    """An inspection with all its tables, for text and JSON. most: of the defects that are missed, so many at most."""
    return {
        **head_line(own),
        "by_size": size_lines(own),
        "froc": froc_lines(own),
        "without_defect": own.froc.without,
        "by_class": class_lines(own),
        "missed": missed_lines(own, most),
        "parts": part_lines(own),
        "pod": None if own.pod is None else _listed(asdict(own.pod)),
        "notes": list(own.notes),
    }


def _listed(value: Any) -> Any:
    """A value whose arrays are lists."""
    if isinstance(value, dict):
        return {name: _listed(own) for name, own in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value


def plain_json(found: Inspections) -> dict[str, Any]:
    """Inspections as JSON can hold them: what is nan becomes null."""
    return plain({
        "inspections": [whole_line(own) for own in found.each],
        "left": [asdict(own) for own in found.left],
        "notes": list(found.notes),
    })  # fmt: skip


def tables_of(found: Inspections) -> dict[str, list[Line]]:
    """Name of a CSV file -> its lines; behind the first, each line begins with the folder of its head."""
    parts: dict[str, Any] = {
        "by_size": size_lines, "froc": froc_lines, "by_class": class_lines, "missed": missed_lines,
        "false_calls": false_call_lines, "parts": part_lines,
    }  # fmt: skip
    return {"heads": [head_line(own) for own in found.each]} | {
        name: _under(found.each, of) for name, of in parts.items()
    }


def _under(each: Sequence[Inspection], of: Any) -> list[Line]:
    return [{"folder": str(own.folder), **line} for own in each for line in of(own)]


def pod_text(own: Inspection) -> list[str]:
    """Sentences on the probability of detection; none where it was not asked for."""
    if own.pod is None:
        return []
    from featprobe.stages.inspection.pod import pod_lines

    return [*pod_lines(own.pod, own.test), ""]


def write_tables(found: Inspections, out: Path) -> list[Path]:
    """Write all tables as CSV files into a folder; returns their paths. Raises DiskError.

    A table without a line is not written, and a file of its name from before is removed.
    """
    tables = {out / f"{name}.csv": lines for name, lines in tables_of(found).items()}
    files = {path: csv_text(pd.DataFrame(lines)) for path, lines in tables.items() if lines}
    write_together(files, out / "heads.csv", [path for path, lines in tables.items() if not lines])
    return list(files)
