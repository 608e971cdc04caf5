"""Exported models say in OpenVINO what featprobe says, within the limits that hold for onnxruntime."""

from pathlib import Path

import numpy as np
import pytest

from featprobe import ExtractOptions, ProbeOptions, TrainRecipe, Workspace, extract, probe
from featprobe.datasets.generated import generate
from featprobe.stages.export.export import made, output_of
from featprobe.stages.export.graph import Differences
from featprobe.stages.export.known_images import find_known
from featprobe.stages.export.parity import Parity
from featprobe.stages.predictor import Predictor

openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")
pytest.importorskip("onnxscript", reason="pip install 'featprobe[onnx]'")

IMAGES = 4
BRIEF = TrainRecipe(iterations=20, batch_size=4, lr=1e-2, evaluations=1)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Images of 16 bits that are resized into frames with padding, under a tiny network."""
    found = Workspace(tmp_path_factory.mktemp("openvino"))
    generate("xray", found.data / "xray", images=24, size=(64, 80))
    how = ExtractOptions(quiet=True, workers=1, device="cpu", size=(90, 104), fit="letterbox")
    extract(found, found.backbone("test_resnet", random_init=True), "xray", how)
    return found


@pytest.mark.parametrize(("task", "kind"), [("semseg", "linear"), ("anomaly", "patchcore")], ids=lambda word: word)
def test_openvino_says_what_featprobe_says(workspace: Workspace, task: str, kind: str, tmp_path: Path) -> None:
    """Heads that find objects are held by test_object_output."""
    options = ProbeOptions(head=kind, recipe=BRIEF, seeds=1, quiet=True, device="cpu")
    (row,) = probe(workspace, task, ["xray"], (), options).rows
    folder = workspace.probes / row["folder"]
    predictor = Predictor(folder, device="cpu")
    known = find_known(predictor, folder, workspace, (), None, IMAGES)
    output = output_of(predictor, known.raw)
    model = tmp_path / "model.onnx"
    model.write_bytes(made(predictor, known.raw, output, 20).SerializeToString())
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    total = Differences()
    for start, end in ((0, 1), (1, IMAGES)):  # batches of two sizes
        levels = [known.levels(place) for place in range(start, end)]
        answers = compiled([np.stack(levels)])
        found = {name: answers[name].copy() for name in output.names}
        total += output.compare(found, predictor, levels)
    assert Parity(IMAGES, "", 0, total, "", 1, 0, 0).faults == []
    assert total.verdicts + total.near >= IMAGES or task == "semseg"
    assert total.pixels or task != "semseg"
