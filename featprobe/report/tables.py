"""Result rows as tables."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from featprobe.errors import counted
from featprobe.report.comparison import NONE
from featprobe.report.text import table_text
from featprobe.splitting import SplitChoice
from featprobe.texts import cell

SCORES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "semseg": {"mIoU": ("miou",), "fg mIoU": ("miou_foreground",)},
    "detect": {"AP": ("box", "ap"), "AP50": ("box", "ap50"), "AP75": ("box", "ap75"), "AR100": ("box", "ar100")},
    "instseg": {
        "mask AP": ("mask", "ap"),
        "mask AP50": ("mask", "ap50"),
        "box AP": ("box", "ap"),
        "box AP50": ("box", "ap50"),
    },
}
"""Columns of each task's table, and where a row's `test` holds them."""
SPREAD_OF = {"semseg": "fg mIoU", "detect": "AP50", "instseg": "mask AP50"}
PER_CLASS = {
    "semseg": ("IoU", ("iou",)),
    "detect": ("AP", ("box", "per_class")),
    "instseg": ("AP", ("mask", "per_class")),
}


def result_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One line per task, backbone, data set, regime, head, cache and recipe: scores in percent, averaged over seeds.

    Of a cross-validation the scores are averaged over folds too, and n counts a seed once for each fold.

    Columns: task, backbone, data, regime (where one is not frozen), head, cache (its key, dtype, tiles and views, where
    lines would look alike), n (seeds), the task's scores, the standard deviation over seeds of the first that counts
    the defects alone (with two or more), seconds of training, head parameters, the score of each class. A task's
    columns are nan for the others.
    """
    frame = pd.DataFrame([_line(row) for row in _told_apart(rows)])
    keys = ["task", "backbone", "data", "regime", "head", "cache", "recipe"]
    grouped = frame.groupby(keys, sort=False, dropna=False)
    table = grouped.mean()
    table.insert(0, "n", grouped.size())
    if (table["n"] > 1).any():
        for column in dict.fromkeys(SPREAD_OF[str(row["task"])] for row in rows):
            name = f"{column.removesuffix(' mIoU')} sd"
            table.insert(list(table.columns).index(column) + 1, name, grouped[column].std())
    table = table.reset_index().drop(columns=["recipe"])
    if (table["regime"] == "frozen").all():
        table = table.drop(columns=["regime"])
    alike = table.duplicated([key for key in keys[:5] if key in table], keep=False)
    return table if alike.any() else table.drop(columns=["cache"])


def _line(row: Mapping[str, Any]) -> dict[str, Any]:
    task = row["task"]
    prefix, place = PER_CLASS[task]
    per_class = _at(row["test"], place)
    return {
        "task": task,
        "backbone": row["backbone"],
        "data": _data_text(row),
        "regime": row["regime"],
        "head": row["head"],
        "cache": _cache_text(row),
        "recipe": row["recipe_key"],
        **{name: percent(_at(row["test"], own)) for name, own in SCORES[task].items()},
        "seconds": row["seconds"]["train"],
        "head params": row["parameters"],
        **{f"{prefix} {name}": percent(per_class[name]) for name in row["classes"] if name in per_class},
    }


def _told_apart(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows whose data set has a name of its own: that of its folder where one name stands for several sets."""
    folder_of = [str(row["folder"]).partition("/")[0] for row in rows]
    sets = {(row["data"], folder) for row, folder in zip(rows, folder_of, strict=True)}
    several = {name for name, count in Counter(name for name, _ in sets).items() if count > 1}
    return [{**r, "data": f} if r["data"] in several else r for r, f in zip(rows, folder_of, strict=True)]


def _data_text(row: Mapping[str, Any]) -> str:
    notes = [] if row["split"] == "own" else [SplitChoice.parse(row["split"]).text]
    images = counted(row["images"]["train"], "image")
    notes += [] if row["fraction"] == 1 else [f"{row['fraction']:g} of train: {images}"]
    notes += [] if row["instances"] == "own" else ["connected components"]
    notes += ["absent classes 0"] if row["task"] == "semseg" and row.get("absent_classes") == "zero" else []
    return f"{row['data']} ({', '.join(notes)})" if notes else str(row["data"])


def _cache_text(row: Mapping[str, Any]) -> str:
    tiles = [f"tiles of {row['tile']}"] if row.get("tile") else []  # rows of an older featprobe do not say
    dtype = [row["dtype"]] if row.get("dtype") else []  # of the card
    return ", ".join([row["feature_key"][:8], *dtype, *tiles, *(row["augmentation"] or {}).get("views", [])])


def _at(values: Any, place: Sequence[str]) -> Any:
    for name in place:
        values = values[name]
    return values


def percent(share: float | None) -> float:
    """A share as percent; nan where there is none."""
    return float("nan") if share is None else 100 * share


def result_text(rows: Sequence[Mapping[str, Any]], width: int | None = None) -> str:
    """Result rows as text: a table per task and data set, with the classes in its own order; see `table_text`."""
    blocks: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in _told_apart(rows):
        blocks.setdefault((row["task"], _data_text(row)), []).append(row)
    return "\n\n".join(f"{data}\n{table_text(_texts(result_table(own)), width)}" for (_, data), own in blocks.items())


def _texts(table: pd.DataFrame) -> pd.DataFrame:
    """A result table of one task and data set for people, without columns that have no value."""
    shown = table.dropna(axis="columns", how="all").drop(columns=["data"])
    whole = ("n", "head params")

    def text(name: str, value: Any) -> str:
        if isinstance(value, str):
            return value
        return NONE if pd.isna(value) else format(value, ".0f" if name in whole else ".1f")

    return pd.DataFrame({name: [text(name, value) for value in shown[name]] for name in shown.columns})


def csv_text(table: pd.DataFrame) -> str:
    """A table as CSV, its texts as `texts.cell` makes them safe in a spreadsheet."""
    safe = {cell(name): column.map(cell) for name, column in table.items()}
    return pd.DataFrame(safe, index=table.index).to_csv(index=False)
