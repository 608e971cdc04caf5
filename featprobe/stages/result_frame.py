"""The result rows of a workspace as a table for notebooks: a line for each row, in plain columns."""

import warnings
from dataclasses import asdict
from typing import Any

import pandas as pd

from featprobe.errors import ProbeError
from featprobe.probes.saved import read_results
from featprobe.result_rows import ResultRow
from featprobe.stages.workspace import Workspace

GROUPS = ("val_", "test_", "recipe_", "images_", "groups_")
"""What the names of columns begin with that stand together, in this order, behind all others."""


def results(workspace: Workspace) -> pd.DataFrame:
    """The rows of probes/results.jsonl, in their order: one for each training of a seed, and of a fold where there are.

    Columns:

    - task, data, backbone, head, regime, seed, split, fold (from 1 on), fraction (of the training split);
    - levels (joined by commas), parameters, seconds (of training), device, time (UTC), folder (of the head, below
      `workspace.probes`);
    - val_NAME, test_NAME: the scores of the task by the names that results.jsonl has, in [0, 1]; test_iou_CLASS,
      test_ap_CLASS, test_auroc_CLASS: those of each class. nan: the score of another task, or one that does not exist;
    - recipe_NAME: how it was trained; images_SPLIT, groups_SPLIT: how many there were.

    A training that was repeated is there as often as it was run; `compare` counts the last. Rows of older versions are
    read. A line that can't be read is skipped with a warning that names it. Raises ProbeError where there is no row.
    """
    path = workspace.probes / "results.jsonl"
    rows, notes = read_results(path)
    for note in notes:
        warnings.warn(note, stacklevel=2)
    if not rows:
        raise ProbeError(
            f"There is no result in {path}.\nMake some:  featprobe probe --task semseg\n"
            "or:         featprobe.probe(workspace, 'semseg')"
        )
    frame = pd.DataFrame([_line(row) for row in rows])
    frame["fold"] = frame["fold"].astype("Int64")
    frame["time"] = pd.to_datetime(frame["time"], utc=True, errors="coerce")
    return frame[sorted(frame.columns, key=_place)]


def _place(column: object) -> int:
    """The place of a column among the groups; sorting by it keeps the order inside of each."""
    return next((i for i, start in enumerate(GROUPS, start=1) if str(column).startswith(start)), 0)


def _line(row: ResultRow) -> dict[str, Any]:
    return {
        **{name: getattr(row, name) for name in ("task", "data", "backbone", "head", "regime", "seed", "split")},
        "fold": row.fold,
        "fraction": row.fraction,
        "levels": ",".join(row.levels),
        "parameters": row.parameters,
        "seconds": row.seconds.train,
        "device": row.device,
        "time": row.time,
        "folder": row.folder,
        **{f"val_{name}": value for name, value in row.val.items()},
        **(_scores(row) if row.is_known else {}),  # a newer featprobe may have other tasks
        **{f"recipe_{name}": value for name, value in row.recipe.to_json().items()},
        **{f"images_{split}": count for split, count in asdict(row.images).items()},
        **{f"groups_{split}": count for split, count in (asdict(row.groups) if row.groups else {}).items()},
    }


def _scores(row: ResultRow) -> dict[str, Any]:
    """The test scores of a row, then those of its classes."""
    each = {f"test_{score.name}": score.of(row.test) for score in row.scores.every}
    title, _ = row.scores.per_class
    return each | {f"test_{title.lower()}_{name}": value for name, value in row.scores.of_classes(row.test).items()}
