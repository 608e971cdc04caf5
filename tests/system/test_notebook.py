"""The notebook of examples/, run from the first cell to the last as a user runs it, in a process of this Python."""

import base64
import io
import json
import os
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "own_model.ipynb"


def test_the_notebook_is_kept_without_outputs() -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


def test_the_notebook_runs_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a kernel of this interpreter, whatever kernels the user has, and without a model hub."""
    kernel = tmp_path / "jupyter" / "kernels" / "here"
    kernel.mkdir(parents=True)
    launch = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": launch, "display_name": "here", "language": "python"}))
    for name in ("JUPYTER_PATH", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, kernel_name="here", timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [own for cell in notebook.cells if cell.cell_type == "code" for own in cell.outputs]
    shown = "\n".join(str(own.get("data", own).get("text/plain", own.get("text", ""))) for own in outputs)
    for part in ("60 images (36 train, 12 val, 12 test)", "spots", "random", "linear", "twolayers", "60 computed"):
        assert part in shown, shown
    pictures = [base64.b64decode(own.data["image/png"]) for own in outputs if "image/png" in own.get("data", {})]
    assert len(pictures) == 2
    assert all(np.asarray(Image.open(io.BytesIO(data)).convert("L")).std() > 10 for data in pictures)
