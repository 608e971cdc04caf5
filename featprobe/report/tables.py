"""Result rows as tables."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd


def result_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One line per backbone, data set, head and recipe: scores in percent, averaged over seeds.

    Columns: backbone, data, head, n (seeds), mIoU, fg mIoU and its standard deviation over seeds (with two or
    more), seconds of training, head parameters, IoU of each class.
    """
    frame = pd.DataFrame(
        {
            "backbone": row["backbone"],
            "data": row["data"] if row["split"] == "own" else f"{row['data']} ({row['split']} split)",
            "head": row["head"],
            "recipe": row["recipe_key"],
            "mIoU": percent(row["test"]["miou"]),
            "fg mIoU": percent(row["test"]["miou_foreground"]),
            "seconds": row["seconds"]["train"],
            "head params": row["parameters"],
            **{f"IoU {name}": percent(row["test"]["iou"][name]) for name in row["classes"]},
        }
        for row in rows
    )
    keys = ["backbone", "data", "head", "recipe"]
    grouped = frame.groupby(keys, sort=False, dropna=False)
    table = grouped.mean()
    table.insert(0, "n", grouped.size())
    if (table["n"] > 1).any():
        table.insert(list(table.columns).index("fg mIoU") + 1, "fg sd", grouped["fg mIoU"].std())
    return table.reset_index().drop(columns=["recipe"])


def percent(share: float | None) -> float:
    """A share as percent; nan where there is none."""
    return float("nan") if share is None else 100 * share


def show_table(table: pd.DataFrame) -> str:
    """A table as text, one block per data set, so that each shows its own classes only."""
    blocks = []
    for data, block in table.groupby("data", sort=False):
        shown = block.dropna(axis="columns", how="all").drop(columns=["data"])
        formats = dict.fromkeys(("n", "head params"), "{:.0f}".format) | {"seconds": "{:.1f}".format}
        scores = {name: "{:.1f}".format for name in shown.columns if "IoU" in name or name.endswith(" sd")}
        text = shown.to_string(index=False, formatters={**scores, **formats}, na_rep="–")
        blocks.append(f"{data}\n{text}")
    return "\n\n".join(blocks)
