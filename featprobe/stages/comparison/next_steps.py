"""What to do after a comparison: commands that would tell more, and those that use the best head."""

import shlex
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

from featprobe.kinds import SEEDS, kind_of, kinds_of
from featprobe.metrics.defects.froc import Per
from featprobe.metrics.defects.operating import OperatingPoint
from featprobe.report.inspection_text import place_of
from featprobe.scores import FEW_GROUPS
from featprobe.stages.commands import level_command
from featprobe.stages.comparison.differences import Table, budget_unchecked
from featprobe.stages.comparison.results import Result
from featprobe.stages.workspace import Workspace

Step = tuple[str, str]
USUAL_RATE = 0.05  # false calls per part or image


def next_steps(
    workspace: Workspace,
    table: Table,
    lead: Mapping[str, Any] | None,
    points: Sequence[OperatingPoint],
    missing: Sequence[str],
) -> list[Step]:
    """Reasons and commands. lead: the finding that the answer begins with; points: its operating points. missing: heads
    without records."""
    row = table.results[0].row
    steps = _steps_to_know_more(table, ["--task", row.task, "--data", row.data])
    if missing:
        steps.insert(0, ("See defects and parts for the heads without records", "featprobe inspect --rescore"))
    if lead:
        folder, whole = (_from_here(workspace, Path(own)) for own in (lead["folder"], place_of(lead)))
        uses = {
            "Choose how many false calls you accept; this is then kept with the head": [
                "inspect", whole, "--false-calls", _rate(points, lead["parts_known"]),
            ],
            "Look at new images with this head": ["predict", folder, "new_images", "--out", "found"],
            "Take it to a machine without featprobe": ["export", folder, "--out", "model.onnx"],
        }  # fmt: skip
        steps += [(why, shlex.join(["featprobe", *words])) for why, words in uses.items()]
    return steps


def _steps_to_know_more(table: Table, options: Sequence[str]) -> list[Step]:
    results = table.results
    trained = [result for result in results if not result.solved]
    steps = []
    task = results[0].row.task
    live = [name for name in (*(r.row.head for r in results), *kinds_of(task)) if kind_of(task, name).live]
    if live and not any(result.row.regime == "full" for result in results):
        command = ["featprobe", "finetune", *options, "--head", live[0]]
        steps.append(("See whether frozen is enough", shlex.join(command)))
    if trained and all(len(result.runs) == 1 for result in trained):
        command_of_seeds = level_command(trained[0].runs[0].card, range(SEEDS), backbones=_backbones(trained))
        steps.append(("Make verdicts hold for other seeds too", command_of_seeds))
    if trained and all(budget_unchecked(result) for result in trained) and trained[0].row.iterations:
        command = ["featprobe", "probe", *options, "--head", trained[0].row.head, "--iterations", "auto"]
        steps.append(("Check whether more iterations give more", shlex.join(command)))
    first = results[0]
    groups = sum(first.score(first.main).sizes)
    if groups < FEW_GROUPS and not first.row.choice.folds:
        command = ["featprobe", "probe", *options, "--head", first.row.head, "--split", "group:5"]
        steps.append((f"Test on all groups instead of {groups}: a cross-validation", shlex.join(command)))
    return steps


def _rate(points: Sequence[OperatingPoint], parts_known: bool) -> str:
    """A number of false calls to begin with: 0.05, or the least that validation carries, of folds the smallest."""
    per: Per = "part" if parts_known else "image"
    least = ceil(100 / max(1, min(point.validation.over(per) for point in points))) / 100
    return f"{max(USUAL_RATE, least):g}/{per}"


def _backbones(results: Sequence[Result]) -> list[str]:
    """The backbones of the results that are of the head and regime of the first."""
    kind = results[0].cell[2:]
    return list(dict.fromkeys(result.row.backbone for result in results if result.cell[2:] == kind))


def _from_here(workspace: Workspace, folder: Path) -> str:
    """A folder as somebody in the workspace names it."""
    inside = folder.is_relative_to(workspace.root)
    return str(folder.relative_to(workspace.root) if inside else folder)
