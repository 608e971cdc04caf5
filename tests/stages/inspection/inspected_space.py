"""A workspace of stored heads, beside which records lie that are drawn at random."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from drawn_records import drawn_records

from featprobe.metrics.defects.records import About, Images, Records
from featprobe.result_rows import ResultRow
from featprobe.stages.inspection.scored_heads import head_in
from featprobe.stages.recording.record_file import write_records
from featprobe.stages.workspace import Workspace

STORED = Path(__file__).parents[2] / "golden" / "stored"


def stored_space(root: Path, kinds: tuple[str, ...] = ("semseg-linear-",), records: bool = True) -> Workspace:
    """The stored results of some training folders, with records beside each head; of seed 0 and 1 others."""
    workspace = Workspace(root)
    lines = []
    for line in (STORED / "probes" / "results.jsonl").read_text().splitlines():
        folder = json.loads(line)["folder"]
        if any(f"/{kind}" in folder for kind in kinds):
            shutil.copytree(STORED / "probes" / folder, workspace.probes / folder, dirs_exist_ok=True)
            lines.append(line)
            if records:
                seed = json.loads(line)["seed"]
                keep(workspace.probes / folder, drawn(seed, "val"), drawn(seed + 100, "test"))
    workspace.probes.mkdir(exist_ok=True)
    (workspace.probes / "results.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return workspace


def drawn(seed: int, split: str, images: int = 40, **more: Any) -> Records:
    """Records of a split whose images have names of their own."""
    found = drawn_records(seed, images, groups=12, split=split, **more)
    return with_images(found, ids=tuple(f"{split}{name}" for name in found.images.ids))


def with_images(records: Records, **changed: Any) -> Records:
    """Records some columns of whose images are changed."""
    images: Images = replace(records.images, **changed)
    return replace(records, images=images)


def with_about(records: Records, **changed: Any) -> Records:
    """Records that say something else of themselves."""
    about: About = replace(records.about, **changed)
    return replace(records, about=about)


def keep(folder: Path, val: Records, test: Records, **about: Any) -> Records:
    """Write records beside the head in a folder; returns them."""
    head = head_in(folder)
    both = Records.joined([val, test])
    own = {"task": head.row.task, "head": head.row.head, "head_sha256": head.head_sha256}
    whole = with_about(both, **own, **about)
    write_records(folder / "defects.parquet", whole)
    return whole


def rows_of(workspace: Workspace) -> list[ResultRow]:
    """The rows of a workspace."""
    lines = (workspace.probes / "results.jsonl").read_text().splitlines()
    return [ResultRow.from_json(json.loads(line)) for line in lines]
