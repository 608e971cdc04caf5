"""Result rows as tables."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from featprobe.errors import counted
from featprobe.io.texts import cell
from featprobe.report.comparison import NONE
from featprobe.report.text import table_text
from featprobe.result_rows import ResultRow


def result_table(rows: Sequence[ResultRow], dtypes: Sequence[str] = ()) -> pd.DataFrame:
    """One line per task, backbone, data set, regime, head, cache and recipe: scores in percent, averaged over seeds.

    Of a cross-validation the scores are averaged over folds too, and n counts a seed once for each fold.
    dtypes: in which the features of each row were stored, where that is known; "" for a backbone that was trained.

    Columns: task, backbone, data, regime (where one is not frozen), head, cache (its key, dtype, tiles and views, where
    lines would look alike), n (seeds), the task's scores, the standard deviation over seeds of the main one (with two
    or more), seconds of training, head parameters, the score of each class. A task's columns are nan for the others.
    """
    every = zip(_told_apart(rows), dtypes or [""] * len(rows), strict=True)
    frame = pd.DataFrame([_line(row, dtype) for row, dtype in every])
    keys = ["task", "backbone", "data", "regime", "head", "cache", "recipe"]
    grouped = frame.groupby(keys, sort=False, dropna=False)
    table = grouped.mean()
    table.insert(0, "n", grouped.size())
    if (table["n"] > 1).any():
        for column in dict.fromkeys(_main_column(row) for row in rows):
            name = f"{column.removesuffix(' mIoU')} sd"
            table.insert(list(table.columns).index(column) + 1, name, grouped[column].std())
    table = table.reset_index().drop(columns=["recipe"])
    if (table["regime"] == "frozen").all():
        table = table.drop(columns=["regime"])
    alike = table.duplicated([key for key in keys[:5] if key in table], keep=False)
    return table if alike.any() else table.drop(columns=["cache"])


def _main_column(row: ResultRow) -> str:
    """The column of the score that decides."""
    return next(score.title for score in row.scores.shown if score.name == row.scores.main.name)


def _line(row: ResultRow, dtype: str) -> dict[str, Any]:
    prefix, _ = row.scores.per_class
    per_class = row.scores.of_classes(row.test)
    return {
        "task": row.task,
        "backbone": row.backbone,
        "data": _data_text(row),
        "regime": row.regime,
        "head": row.head,
        "cache": _cache_text(row, dtype),
        "recipe": row.recipe_key,
        **{score.title: percent(score.of(row.test)) for score in row.scores.shown},
        "seconds": row.seconds.train,
        "head params": row.parameters,
        **{f"{prefix} {name}": percent(per_class[name]) for name in row.classes if name in per_class},
    }


def _told_apart(rows: Sequence[ResultRow]) -> list[ResultRow]:
    """Rows whose data set has a name of its own: that of its folder where one name stands for several sets."""
    folder_of = [row.folder.partition("/")[0] for row in rows]
    sets = {(row.data, folder) for row, folder in zip(rows, folder_of, strict=True)}
    several = {name for name, count in Counter(name for name, _ in sets).items() if count > 1}
    return [replace(r, data=f) if r.data in several else r for r, f in zip(rows, folder_of, strict=True)]


def _data_text(row: ResultRow) -> str:
    notes = [] if row.split == "own" else [replace(row.choice, fold=0).text]
    images = counted(row.images.train, "image")
    notes += [] if row.fraction == 1 else [f"{row.fraction:g} of train: {images}"]
    notes += [] if row.instances == "own" else ["connected components"]
    notes += row.settings.of_units if row.settings else []
    notes += ["absent classes 0"] if row.scores.dense and row.absent_classes == "zero" else []
    return f"{row.data} ({', '.join(notes)})" if notes else row.data


def _cache_text(row: ResultRow, dtype: str) -> str:
    tiles = [f"tiles of {row.tile}"] if row.tile else []  # rows of an older featprobe do not say
    return ", ".join([row.feature_key[:8], *([dtype] if dtype else []), *tiles, *row.views])


def percent(share: float | None) -> float:
    """A share as percent; nan where there is none."""
    return float("nan") if share is None else 100 * share


def result_text(rows: Sequence[ResultRow], width: int | None = None, dtypes: Sequence[str] = ()) -> str:
    """Result rows as text: a table per task and data set, with the classes in its own order; see `table_text`."""
    blocks: dict[tuple[str, str], list[tuple[ResultRow, str]]] = {}
    for row, dtype in zip(_told_apart(rows), dtypes or [""] * len(rows), strict=True):
        blocks.setdefault((row.task, _data_text(row)), []).append((row, dtype))
    tables = [(data, result_table(*zip(*own, strict=True))) for (_, data), own in blocks.items()]
    return "\n\n".join(f"{data}\n{table_text(_texts(table), width)}" for data, table in tables)


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
