"""Records from cache and head alone are those that scoring writes; what can't be made again is said."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featprobe.kinds import TrainRecipe
from featprobe.metrics.defects.records import FoundRule, Records
from featprobe.probes.saved import read_card
from featprobe.result_rows import ResultRow
from featprobe.specs import BackboneSpec
from featprobe.stages.extraction.extract import extract
from featprobe.stages.extraction.extract_options import ExtractOptions
from featprobe.stages.recording.base import PROBABILITIES
from featprobe.stages.recording.record_file import RECORDS, read_records
from featprobe.stages.recording.rescore import rescore
from featprobe.stages.training.finetune import finetune
from featprobe.stages.training.probe import probe
from featprobe.stages.training.probe_options import ProbeOptions, Tuning
from featprobe.stages.workspace import Workspace, make_generated

SHORT = TrainRecipe(iterations=8, batch_size=4, evaluations=1)


def options(**changed: Any) -> ProbeOptions:
    return ProbeOptions(**({"recipe": SHORT, "seeds": 1, "quiet": True, "device": "cpu"} | changed))


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with caches of a small set: whole images, and tiles."""
    workspace = Workspace(tmp_path_factory.mktemp("space"))
    make_generated("xray", workspace.data / "xray", images=18, size=(64, 64))
    for tile in (0, 32):
        how = ExtractOptions(dtype="fp16", tile=tile or None, batch_size=8, quiet=True, device="cpu")
        extract(workspace, workspace.backbone("embedded"), "xray", how)
    return workspace


def records_of(workspace: Workspace, row: ResultRow) -> Records:
    folder = workspace.probes / row.folder
    return read_records(folder, read_card(folder)["head_sha256"])


def written(workspace: Workspace, rows: Any) -> dict[Path, bytes]:
    return {path: path.read_bytes() for row in rows for path in [workspace.probes / row.folder / RECORDS]}


TRAINED: dict[str, Any] = {
    "semseg": ("semseg", options(seeds=2), None),
    "semseg by folds": ("semseg", options(head="ridge", recipe=None, split="group:3"), None),
    "detect": ("detect", options(), None),
    "instseg": ("instseg", options(), None),
    "anomaly": ("anomaly", options(head="patchcore", recipe=None), None),
    "anomaly of pooled features": ("anomaly", options(head="knn", recipe=None), None),
    "anomaly of tiles": ("anomaly", options(head="gaussian", recipe=None, unit="tile"), None),
    "classify": ("classify", options(labels="defect"), None),
    "classify tiles": ("classify", options(labels="defect", unit="tile", head="ridge", recipe=None), None),
    "semseg, fine-tuned": ("semseg", options(tuning=Tuning()), None),
}
if __name__ == "__main__":
    import tempfile, time
    class F:
        def mktemp(self, n): return Path(tempfile.mkdtemp())
    ws = Workspace(Path(tempfile.mkdtemp()))
    make_generated("xray", ws.data / "xray", images=18, size=(64, 64))
    for tile in (0, 32):
        how = ExtractOptions(dtype="fp16", tile=tile or None, batch_size=8, quiet=True, device="cpu")
        extract(ws, ws.backbone("embedded"), "xray", how)
    print(ws.cache_files())
    for name, (task, o, _) in TRAINED.items():
        t = time.time()
        try:
            rep = (finetune if o.tuning else probe)(ws, task, ["xray"] , [], o)
        except Exception as e:
            import traceback; traceback.print_exc(); continue
        rows = [ResultRow.from_json(r) for r in rep.rows]
        t1 = time.time()
        before = written(ws, rows)
        for p in before: p.unlink()
        notes = rescore(ws, rows, device="cpu", quiet=True)
        t2 = time.time()
        after = written(ws, rows)
        print(name, len(rows), before == after, round(t1-t,2), round(t2-t1,2), notes)
        for row in rows:
            r = records_of(ws, row)
            print("   ", row.folder.split("/")[-2:], r.about.base, r.about.base_from, r.about.pooled, len(r.images), len(r.defects), len(r.calls), len(r.finds))
