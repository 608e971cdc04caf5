"""Exported models: they say what featprobe says, run without it, and are written whole or not at all."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from featprobe import ExtractOptions, ProbeOptions, TrainRecipe, Workspace, extract, predict, probe
from featprobe.cli.main import cli
from featprobe.datasets.generated import generate
from featprobe.datasets.images.reading import read_levels
from featprobe.errors import FeatprobeError, ProbeError
from featprobe.features import Features
from featprobe.intensity import Intensity
from featprobe.metrics.defects.operating import Counts, OperatingPoint, Wanted
from featprobe.probes import logits_at_original
from featprobe.probes.paste import paste_mask
from featprobe.stages.export import export as exporting
from featprobe.stages.export import parity
from featprobe.stages.export.export import export, output_of
from featprobe.stages.export.graph import NEAR, Differences, Graph, GraphOutput, pieces_of_size, reference, rounded
from featprobe.stages.export.known_images import KnownImages, find_known
from featprobe.stages.findings import Threshold, joined_pixels
from featprobe.stages.predictor import Predictor
from featprobe.stages.recording.operating_file import write_point

onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'featprobe[onnx]'")
pytest.importorskip("onnxscript", reason="pip install 'featprobe[onnx]'")

RUNNER = Path(__file__).parents[3] / "examples" / "runner.py"
SIZE = (64, 80)
ALONE = ("onnxruntime", "numpy", "numpy.libs", "PIL", "pillow.libs")
"""All of site-packages that the small program needs."""
BRIEF = TrainRecipe(iterations=6, batch_size=4, lr=1e-2, evaluations=2)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Grey images of 16 bits in frames with padding, colour images of 8 bits, and tiles, under a tiny network."""
    found = Workspace(tmp_path_factory.mktemp("export"))
    network = found.backbone("test_resnet", random_init=True)
    how = ExtractOptions(quiet=True, workers=1, device="cpu")
    for name in ("xray", "surface"):
        generate(name, found.data / name, images=24, size=SIZE)
    extract(found, network, "xray", replace(how, size=(44, 72), fit="letterbox"))
    extract(found, network, "surface", replace(how, size=SIZE, dtype="int8"))
    return found


def head(workspace: Workspace, task: str, data: str, kind: str, **options: Any) -> Path:
    """The folder of a head that was trained for a moment."""
    asked = ProbeOptions(head=kind, recipe=BRIEF, seeds=1, quiet=True, device="cpu", **options)
    (row,) = probe(workspace, task, [data], (), asked).rows
    return workspace.probes / row["folder"]


@pytest.mark.parametrize(
    ("task", "kind", "data", "options"),
    [
        ("semseg", "upsample", "xray", {}),
        ("semseg", "ridge", "surface", {}),
        ("classify", "linear", "xray", {"labels": "classes"}),
        ("classify", "knn", "surface", {"labels": "defect"}),
        ("anomaly", "patchcore", "xray", {"remove_position": True}),
        ("anomaly", "gaussian", "surface", {}),
        ("anomaly", "knn", "xray", {}),
    ],
)
def test_graphs_say_what_heads_say(workspace: Workspace, task: str, kind: str, data: str, options: Any) -> None:
    """In torch; that runtimes say what torch says is found in every export."""
    folder = head(workspace, task, data, kind, **options)
    for threshold in (None, 0.3):
        predictor = Predictor(folder, device="cpu", threshold=threshold)
        known = find_known(predictor, folder, workspace, (), None, 4)
        output = output_of(predictor, known.raw)
        levels = [known.levels(place) for place in range(4)]
        with torch.no_grad():
            answers = Graph(predictor, known.raw, output)(torch.from_numpy(np.stack(levels)))
        found = {name: own.numpy() for name, own in zip(output.names, answers, strict=True)}
        differences = output.compare(found, predictor, levels)
        own = parity.Parity(4, "", 0, differences, "", 1, 0, 0)
        assert own.faults == []
        assert ("verdict" in found) == (predictor.output.threshold.source != "none")
        if "verdict" in found:
            assert differences.verdicts + differences.near == 4


def with_point(folder: Path, place: Path, **values: Any) -> Path:
    """A copy of a head with an operating point beside it."""
    copied = Path(shutil.copytree(folder, place))
    counts = Counts(values["threshold"], 40, 30, 8, 6, 20, 18, 25, 2, 1, 40, 8)
    point = OperatingPoint(**values, wanted=Wanted.parse("0.05/part"), validation=counts, sure=True, needed=60)
    write_point(copied, json.loads((copied / "card.json").read_text())["head_sha256"], point)
    return copied


@pytest.mark.parametrize(
    ("task", "kind", "base", "least_area"),
    [
        ("semseg", "ridge", 0.25, 1),
        ("semseg", "ridge", 0.25, 6),
        ("anomaly", "gaussian", 0.8, 1),
        ("anomaly", "gaussian", 0.8, 6),
        ("anomaly", "knn", nan, 1),
        ("detect", "fcos", nan, 60),
    ],
)
def test_graphs_decide_at_the_operating_point(
    workspace: Workspace, tmp_path: Path, task: str, kind: str, base: float, least_area: int
) -> None:
    folder = head(workspace, task, "surface", kind)
    plain = Predictor(folder, device="cpu")
    known = find_known(plain, folder, workspace, (), None, 4)
    levels = [known.levels(place) for place in range(4)]
    threshold = 0.375
    if task != "semseg":  # a threshold that parts the images
        scores = sorted(float(np.float32(own.score)) for own in plain([level.copy() for level in levels]))
        threshold = (scores[1] + scores[2]) / 2
        base = base * threshold
    threshold = float(np.float32(threshold))
    folder = with_point(folder, tmp_path / "head", threshold=threshold, base=base, least_area=least_area)
    predictor = Predictor(folder, device="cpu")
    output = output_of(predictor, known.raw)
    with torch.no_grad():
        answers = Graph(predictor, known.raw, output)(torch.from_numpy(np.stack(levels)))
    found = {name: own.numpy() for name, own in zip(output.names, answers, strict=True)}
    differences = output.compare(found, predictor, levels)
    assert parity.Parity(4, "", 0, differences, "", 1, 0, 0).faults == []
    assert ("verdict" in found) == (least_area == 1 or task == "detect")
    assert differences.verdicts + differences.near >= 4
    said = exporting.described(predictor, known.raw, output)
    assert (said["threshold_from"], said["operating_point"]) == (
        "operating_point",
        "at most 0.05 false calls per part",
    )
    assert json.loads(said["least_area"]) == least_area and (said["base"] == "null") == np.isnan(base)


@pytest.fixture(scope="module")
def exported(workspace: Workspace) -> tuple[Path, Path]:
    """A model of 16-bit images with padded frames, and its head."""
    folder, model = head(workspace, "semseg", "xray", "ridge"), workspace.root / "models" / "model.onnx"
    small = workspace.data / "xray" / "images" / "part000_view0.png"
    with Image.open(small) as image:
        image.resize((50, 40), Image.Resampling.NEAREST).save(small)  # a set of several sizes
    said = CliRunner().invoke(
        cli, ["--workspace", str(workspace.root), "export", str(folder / "card.json"), "--out", str(model), "--json"]
    )
    assert said.exit_code == 0, said.output
    report = json.loads(said.output)
    assert report["input"] == "uint16 (n, 64, 80)" and report["bytes"] == model.stat().st_size
    assert report["parity"]["differences"]["equal_pixels"] == report["parity"]["differences"]["pixels"] > 0
    assert sorted(path.name for path in model.parent.iterdir()) == ["model.onnx", "model.parity.json"]
    assert json.loads((model.parent / "model.parity.json").read_text())["faults"] == []
    return model, folder


def test_a_model_says_what_it_is(exported: tuple[Path, Path], workspace: Workspace) -> None:
    session = onnxruntime.InferenceSession(exported[0])
    meta = session.get_modelmeta().custom_metadata_map
    card = json.loads((exported[1] / "card.json").read_text())
    assert json.loads(meta["classes"]) == card["head"]["classes"]
    assert (meta["task"], meta["head"], meta["weights_licence"]) == ("semseg", "ridge", "none needed (random weights)")
    assert (meta["input_dtype"], json.loads(meta["image_size"])) == ("uint16", [64, 80])
    assert (meta["threshold"], meta["threshold_from"]) == ("null", "default")
    assert json.loads(meta["preprocessing"])["window"] == card["features"]["window"]
    assert (meta["data_fingerprint"], meta["head_sha256"]) == (card["data"]["fingerprint"], card["head_sha256"])
    (taken,) = session.get_inputs()
    assert taken.shape[1:] == [64, 80] and isinstance(taken.shape[0], str)  # any number of images
    assert [own.name for own in session.get_outputs()] == ["classes", "probabilities", "score", "verdict", "logits"]


def alone(place: Path, model: Path) -> list[str]:
    """A command that runs the small program and sees nothing but onnxruntime, numpy and Pillow."""
    packages = Path(np.__file__).parents[1]
    (place / "site").mkdir()
    for name in ALONE:
        if (packages / name).exists():
            (place / "site" / name).symlink_to(packages / name)
    start = (
        "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); del sys.argv[0];"
        "runpy.run_path(sys.argv[0], None, '__main__'); assert not {'torch', 'featprobe'} & {*sys.modules}"
    )
    return [sys.executable, "-I", "-S", "-c", start, *map(str, (place / "site", RUNNER, model, place / "out"))]


@torch.inference_mode()
def ties(folder: Path, images: list[Path]) -> NDArray[np.bool_]:
    """Pixels where one feature that is rounded to the neighbouring fp16 may give another class: (n, height, width).

    There two classes, or the best of them and the base of the operating point, are equally probable within NEAR.
    """
    predictor = Predictor(folder, device="cpu")
    levels = [read_levels(path) for path in images]
    placement = pieces_of_size(predictor, levels)[0][0].placement
    logits = logits_at_original(predictor.head(reference(predictor, levels)), predictor.head.stride, placement)
    shares = logits.softmax(1)
    first, second = shares.topk(2, 1).values.unbind(1)
    base = predictor.output.threshold.base if predictor.point else np.nan
    return ((first - second < NEAR) | ((shares[:, 1:].amax(1) - base).abs() < NEAR)).numpy()


def check_masks(folder: Path, images: list[Path], lines: list[dict[str, Any]], place: Path) -> int:
    """Compare the masks and verdicts of the small program with those of `predict`; returns how many are called."""
    predict(folder, images, place / "predicted", device="cpu", quiet=True)
    undecided = ties(folder, images)
    assert undecided.mean() < 0.02
    for path, line, either in zip(images, lines, undecided, strict=True):
        own, wanted = (np.asarray(Image.open(place / at / f"{path.stem}.png")) for at in ("out", "predicted/masks"))
        assert not ((own != wanted) & ~either).any()
        assert line["verdict"] == ("called" if wanted.any() else "passed")
    return sum(line["verdict"] == "called" for line in lines)


def test_the_small_program_gives_the_masks_of_predict(exported: tuple[Path, Path], tmp_path: Path) -> None:
    model, folder = exported
    images = sorted((folder.parents[3].parent / "data" / "xray" / "images").glob("*view1.png"))[:4]
    with Image.open(images[0]) as image:
        image.save(tmp_path / "scan.tif")
        tifffile.imwrite(tmp_path / "other_order.tif", np.asarray(image), byteorder=">")
    images += [tmp_path / "scan.tif", tmp_path / "other_order.tif"]
    command = alone(tmp_path, model)
    said = subprocess.run([*command, *map(str, images)], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    lines = [json.loads(line) for line in said.stdout.splitlines()]
    assert [line["image"] for line in lines] == [str(path) for path in images]
    assert check_masks(folder, images, lines, tmp_path)
    odd = tmp_path / "odd.png"
    Image.fromarray(np.zeros((30, 30), dtype=np.uint8)).save(odd)
    said = subprocess.run([*command, str(odd)], capture_output=True, text=True)
    assert said.returncode == 1 and "uint8 (30, 30); the model takes uint16 (64, 80)" in said.stderr


def test_the_small_program_joins_pixels_at_an_operating_point(
    exported: tuple[Path, Path], workspace: Workspace, tmp_path: Path
) -> None:
    folder = with_point(exported[1], tmp_path / "head", threshold=0.5, base=0.25, least_area=12)
    report = export(folder, tmp_path / "model.onnx", workspace, test_images=3)
    assert "verdict" not in report.outputs and any("runner.py" in note for note in report.notes)
    images = sorted((workspace.data / "xray" / "images").glob("*view1.png"))[:8]
    said = subprocess.run(
        [*alone(tmp_path, report.model), *map(str, images)], capture_output=True, text=True, check=True
    )
    lines = [json.loads(line) for line in said.stdout.splitlines()]
    assert 0 < check_masks(folder, images, lines, tmp_path)


class Together(GraphOutput):
    """What several heads on one cache give, in one graph."""

    def __init__(self, outputs: dict[str, GraphOutput]) -> None:
        super().__init__()
        self.heads = nn.ModuleDict(outputs)
        self.names = tuple(f"{kind}.{name}" for kind, own in outputs.items() for name in own.names)

    def forward(self, features: Features) -> tuple[torch.Tensor, ...]:
        return tuple(answer for own in self.heads.values() for answer in own(features))

    def compare(self, found: Any, predictor: Any, levels: Any) -> Differences:
        raise NotImplementedError


class BehindMaps(nn.Module):
    """The end of a graph alone, behind maps of levels as the backbone gives them."""

    def __init__(self, graph: Graph, levels: list[str]) -> None:
        super().__init__()
        self.output, self.levels, self.dtype, self.size = graph.output, levels, graph.dtype, graph.size
        self.register_buffer("content", graph.content)

    def forward(self, *maps: torch.Tensor) -> tuple[torch.Tensor, ...]:
        stored = {name: rounded(m, self.dtype) for name, m in zip(self.levels, maps, strict=True)}
        return self.output(Features(stored, self.size, self.get_buffer("content").expand(len(maps[0]), 2)))


def heads_together(
    workspace: Workspace, heads: dict[str, dict[str, str]]
) -> tuple[dict[str, Predictor], Together, KnownImages]:
    """Heads on the 16-bit images, by their names, and what they give in one graph."""
    predictors = {}
    for name, options in heads.items():
        task, kind = name.split("-")
        folder = head(workspace, task, "xray", kind, **options)
        predictors[name] = Predictor(folder, device="cpu")
    known = find_known(predictors[name], folder, workspace, (), None, 4)
    return predictors, Together({name: output_of(own, known.raw) for name, own in predictors.items()}), known


def compared(
    predictors: dict[str, Predictor], output: Together, answers: Any, levels: list[Any]
) -> dict[str, Differences]:
    """How each head of a graph lies from featprobe."""
    found = {name: answers[name].copy() for name in output.names}
    return {
        kind: own.compare({name: found[f"{kind}.{name}"] for name in own.names}, predictors[kind], levels)
        for kind, own in output.heads.items()
    }


def faults(differences: Differences) -> list[str]:
    """What exceeds the limits of an export."""
    return parity.Parity(4, "", 0, differences, "", 1, 0, 0).faults


def test_openvino_says_what_featprobe_says(workspace: Workspace, tmp_path: Path) -> None:
    """Within the limits that hold for onnxruntime. Heads that find objects are held by test_object_output."""
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")
    predictors, output, known = heads_together(workspace, {"semseg-ridge": {}, "anomaly-patchcore": {}})
    model = tmp_path / "model.onnx"
    model.write_bytes(
        exporting.made(predictors["semseg-ridge"], known.raw, output, exporting.OPSET).SerializeToString()
    )
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    totals = dict.fromkeys(predictors, Differences())
    for start, end in ((0, 1), (1, 4)):  # batches of two sizes
        levels = [known.levels(place) for place in range(start, end)]
        for kind, own in compared(predictors, output, compiled([np.stack(levels)]), levels).items():
            totals[kind] += own
    assert not any(map(faults, totals.values()))
    assert totals["semseg-ridge"].pixels and totals["anomaly-patchcore"].verdicts >= 4


def test_openvino_says_of_the_other_heads_what_featprobe_says(workspace: Workspace, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")
    of_labels = {"labels": "classes"}
    heads = {"semseg-upsample": {}, "classify-linear": of_labels, "classify-knn": of_labels, "anomaly-gaussian": {}}
    predictors, output, known = heads_together(workspace, {**heads, "anomaly-knn": {}})
    predictor, levels = predictors["semseg-upsample"], [known.levels(place) for place in range(4)]
    graph = Graph(predictor, known.raw, output).eval()
    with exporting.silence(), torch.no_grad():
        maps = predictor.backbone(graph.frame(graph.unit(torch.from_numpy(np.stack(levels))))).maps
        end, given = BehindMaps(graph, list(maps)).eval(), tuple(maps.values())
        program = torch.onnx.export(
            end, given, dynamo=True, output_names=list(output.names), opset_version=exporting.OPSET
        )
    assert program is not None
    program.save(tmp_path / "model.onnx")
    compiled = openvino.Core().compile_model(tmp_path / "model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compared(predictors, output, compiled([own.numpy() for own in given]), levels)
    assert not any(map(faults, found.values()))
    assert found["semseg-upsample"].pixels and found["classify-knn"].logits is not None


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.4, 0.6, 1.0]), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_the_small_program_joins_pixels_as_featprobe_does(seed: int, threshold: float, least: int) -> None:
    rng = np.random.default_rng(seed)
    size = rng.integers(1, 20, 2)
    values = rng.choice(np.linspace(0, 1, 6, dtype=np.float32), size)
    classes = rng.integers(1, 3, size).astype(np.uint8)
    at = Threshold(float(np.float32(threshold)), "operating_point", 0.4, least)
    program = RUNNER.read_text()
    space: dict[str, Any] = {"np": np, "threshold": at.value, "least": least}
    exec(program[program.index("def joined") : program.index("model, out, *images")], space)
    shown = np.where(values >= np.float32(0.4), classes, 0)
    assert np.array_equal(shown * space["joined"](values, shown), joined_pixels(values, classes, at))


@given(st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_the_small_program_measures_objects_as_featprobe_does(seed: int) -> None:
    program = RUNNER.read_text()
    space: dict[str, Any] = {"np": np}
    exec(program[program.index("def area_of") : program.index("model, out, *images")], space)
    rng = np.random.default_rng(seed)
    mask = rng.random((14, 14)).astype(np.float32) * rng.choice([0.4, 1.0])
    (x1, x2), (y1, y2) = np.sort(rng.uniform(0, (60, 40), (2, 2)), 0).T
    box = [float(x1), float(y1), min(float(x2) + 0.1, 60), min(float(y2) + 0.1, 40)]
    pixels = int(paste_mask(torch.from_numpy(mask), box, (40, 60)).sum())
    whole = (box[2] - box[0]) * (box[3] - box[1])
    assert abs(space["area_of"](box, mask, 40, 60) - (pixels or whole)) <= 1  # a pixel at 0.5 may round either way
    assert space["area_of"](box, None, 40, 60) == whole


def test_a_graph_that_differs_is_not_written(exported: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures are real: a model whose weights were changed fails."""
    import onnx
    from onnx import numpy_helper

    model, folder = exported
    broken = onnx.load(model)
    for tensor in broken.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.ndim == 4 and values.size > 100:
            tensor.CopyFrom(numpy_helper.from_array(values * np.float32(1.01), tensor.name))
    workspace = Workspace(folder.parents[3].parent)
    monkeypatch.setattr(exporting, "made", lambda *_: broken)
    out = workspace.root / "other" / "model.onnx"
    with pytest.raises(
        ProbeError, match=r"(?s)does not say what featprobe says. No model was written.*logits, .* differ by"
    ):
        export(folder, out, workspace)
    assert not out.parent.exists()


def test_what_can_not_be_exported_is_said_before_anything_is_computed(
    exported: tuple[Path, Path], workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = exported[1], tmp_path / "model.onnx"

    def refused(text: str, **options: Any) -> None:
        with pytest.raises(FeatprobeError, match=text):
            export(folder, options.pop("out", out), workspace, **options)
        assert not list(tmp_path.iterdir())

    refused(r"(?s)--opset 7 can't be written.*18 to", opset=7)
    refused("is a folder. Name a file", out=tmp_path)
    refused(r"(?s)None of the test images of xray fits.*11x12 pixels.*--images", image_size=(11, 12))
    refused(r"(?s)None of the images of .* fits.*16 bits.*uint8", images=[workspace.data / "surface" / "images"])
    with monkeypatch.context() as patch:
        patch.setattr(torch.onnx, "export", lambda *_, **__: 1 / 0)
        refused(r"(?s)test_resnet with this head can't be exported. Nothing was written.*ZeroDivisionError: division")
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "find_spec", lambda name: None)
        refused(r"(?s)needs onnx, onnxruntime, onnxscript.*pip install 'featprobe\[onnx\]'")
    moved = workspace.data.rename(workspace.root / "elsewhere")
    monkeypatch.setattr(Workspace, "generated", lambda self, name: self.data / name)  # it would be made again
    refused(r"(?s)test images of .* can't be found.*--images FOLDER")
    known = find_known(Predictor(folder, device="cpu"), folder, workspace, [moved / "xray" / "images"], None, 5)
    assert (known.raw.size, len(known.shown), known.others) == (SIZE, 5, 1)
    moved.rename(workspace.data)


def test_policies_of_each_image_and_pooled_tiles_are_refused(workspace: Workspace) -> None:
    folder = head(workspace, "classify", "surface", "linear", labels="defect")
    predictor = Predictor(folder, device="cpu")
    predictor.card["features"]["tile"] = 32
    known = find_known(predictor, folder, workspace, (), None, 1)
    with pytest.raises(ProbeError, match=r"pools the features of all tiles.*sees one tile"):
        output_of(predictor, known.raw)
    predictor.recipe = replace(predictor.recipe, intensity=str(Intensity.parse("minmax:image")))
    with pytest.raises(ProbeError, match=r"(?s)minmax:image.*which a graph does not do"):
        exporting.check_policy(predictor)
