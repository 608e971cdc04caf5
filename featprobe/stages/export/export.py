"""A saved head as one ONNX file, which is written once it was compared with featprobe itself."""

import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from featprobe import __version__
from featprobe.backbones.catalog import licence_of
from featprobe.backbones.models import first_line
from featprobe.errors import BackboneError, ProbeError, UsageError
from featprobe.geometry import Size
from featprobe.io.disk import write_together
from featprobe.scores import SCORES
from featprobe.specs import BackboneSpec
from featprobe.stages.export.exports import EXPORTS
from featprobe.stages.export.graph import Graph, GraphOutput, Raw, placement_of
from featprobe.stages.export.known_images import find_known
from featprobe.stages.export.object_output import translations
from featprobe.stages.export.parity import TOLERANCE, Parity, compare_graph
from featprobe.stages.findings import point_note
from featprobe.stages.predictor import Predictor
from featprobe.stages.workspace import Workspace

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
FIRST_OPSET, LAST_OPSET = 18, 23
OPSET = 20
LARGEST = 2**31  # bytes of a file of protobuf
IMAGES = "images"


@dataclass(frozen=True)
class ExportReport:
    """What was written. model, parity_file: paths. outputs: names and shapes. notes: facts that a user should know."""

    model: Path
    parity_file: Path
    bytes: int
    input: str
    outputs: tuple[str, ...]
    parity: Parity
    notes: tuple[str, ...]


def export(
    folder: Path,
    out: Path,
    workspace: Workspace,
    *,
    weights: str | None = None,
    image_size: Size | None = None,
    opset: int = OPSET,
    threshold: float | None = None,
    test_images: int = 20,
    images: Sequence[Path] = (),
    tolerance: float = TOLERANCE,
    backbone: nn.Module | None = None,
) -> ExportReport:
    """Write a saved head, with its backbone and its preprocessing, as an ONNX file, and its parity report beside it.

    image_size: (height, width) of the images that it takes; None for the commonest among the images that it is
    compared on: at most `test_images` of those that the head was tested on, or of `images`. threshold: of verdicts, in
    place of the operating point that is kept beside the head, or of the head's own. tolerance: how far logits, or
    scores, may lie apart. backbone: as `Predictor` takes it.
    Raises FeatprobeError; nothing is written then, also where the comparison fails.
    """
    check_installed()
    check_opset(opset)
    if out.is_dir():
        raise ProbeError(f"{out} is a folder. Name a file, as {out / 'model.onnx'}. Nothing was computed.")
    predictor = Predictor(folder, weights=weights, device="cpu", threshold=threshold, backbone=backbone)
    check_policy(predictor)
    known = find_known(predictor, folder, workspace, images, image_size, test_images)
    output = output_of(predictor, known.raw)
    model = made(predictor, known.raw, output, opset)
    say(model, predictor, known.raw, output)
    data = checked(model)
    parity = compare_graph(data, predictor, output, known, tolerance)
    if parity.faults:
        raise ProbeError(
            f"The graph of {folder} does not say what featprobe says. No model was written.\n"
            + "".join(f"  found   {fault}\n" for fault in parity.faults)
            + f"Images: {parity.images} {parity.words}; {parity.runtime}. Another --opset may help; so does a cache of "
            "--dtype fp32, whose features are not rounded. --tolerance X lets logits, or scores, lie further apart."
        )
    beside = out.with_name(f"{out.stem}.parity.json")
    write_together({out: data, beside: json.dumps(parity.to_json(), indent=1) + "\n"})
    return ExportReport(
        out, beside, len(data), known.raw.layout, output.names, parity, tuple(notes_on(predictor, output))
    )


def check_installed() -> None:
    """Raise ProbeError where a package that exporting needs is not installed."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ProbeError(
            f"Exporting needs {', '.join(missing)}, which is not installed. Nothing was computed.\n"
            "Install it:  pip install 'featprobe[onnx]'"
        )


def check_opset(opset: int) -> None:
    """Raise UsageError for a version of ONNX's operators that can't be written."""
    if not FIRST_OPSET <= opset <= LAST_OPSET:
        raise UsageError(
            f"--opset {opset} can't be written. Nothing was computed.\n"
            f"  wanted  {FIRST_OPSET} to {LAST_OPSET}\n"
            f"Omit it for {OPSET}."
        )


def check_policy(predictor: Predictor) -> None:
    """Raise ProbeError for an intensity policy that is computed anew from each image."""
    if predictor.recipe.policy.image:
        raise ProbeError(
            f"The head's intensity policy, {predictor.recipe.intensity}, sorts the levels of each image, which a graph "
            "does not do. Nothing was written.\n"
            "  wanted  one window for all images\n"
            "Extract again with --intensity percentile:0.01:99.99 or window:LO:HI, and train a head on that."
        )


def output_of(predictor: Predictor, raw: Raw) -> GraphOutput:
    """The end of the graph. Raises ProbeError for a head that has none."""
    card, threshold = predictor.card, predictor.output.threshold
    given = threshold if threshold.source == "given" or threshold.is_point else None
    build = EXPORTS.get(SCORES[card["head"]["task"]].on)
    if build is None:
        raise ProbeError(f"Heads of {card['head']['task']} can't be exported yet. Nothing was written.")
    return build(predictor.head, card, placement_of(predictor.recipe, raw.size), given)


def made(predictor: Predictor, raw: Raw, output: GraphOutput, opset: int) -> Any:
    """The ONNX model (a ModelProto). Raises BackboneError where the network has operators that ONNX lacks."""
    graph = Graph(predictor, raw, output).eval()
    weights = sum(value.numel() * value.element_size() for value in graph.state_dict().values())
    if weights >= LARGEST:
        raise BackboneError(
            f"{predictor.backbone.spec.model} and its head have {weights / 2**30:.1f} GiB of weights; one ONNX file "
            "holds 2. Nothing was written. Take a smaller backbone."
        )
    example = torch.zeros(2, *raw.shape, dtype=getattr(torch, raw.dtype))
    try:
        with silence(), torch.no_grad():
            program = torch.onnx.export(
                graph, (example,), dynamo=True, input_names=[IMAGES], output_names=list(output.names),
                dynamic_shapes=({0: torch.export.Dim("n")},), opset_version=opset, verbose=False,
                custom_translation_table=translations(),
            )  # fmt: skip
    except Exception as error:  # the exporter raises many kinds of errors; the cause is kept for --debug
        raise BackboneError(
            f"{predictor.backbone.spec.model} with this head can't be exported. Nothing was written.\n"
            f"  found   {type(error).__name__}: {first_line(error)}\n"
            "Another --opset or another backbone may do; --debug shows where it happened."
        ) from error
    assert program is not None
    model = program.model_proto
    if not model.graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        raise BackboneError(
            f"{predictor.backbone.spec.model} with this head was exported for batches of one size alone: something in "
            "it takes the number of images for a constant. Nothing was written. Take another backbone."
        )
    return model


def say(model: Any, predictor: Predictor, raw: Raw, output: GraphOutput) -> None:
    """Write into a model what a program, or a person, must know of it."""
    from onnx import helper

    helper.set_model_props(model, dict(described(predictor, raw, output)))
    model.producer_name, model.producer_version = "featprobe", __version__


def described(predictor: Predictor, raw: Raw, output: GraphOutput) -> Mapping[str, str]:
    """The texts of `metadata_props`, by their names; those that are no plain words are JSON."""
    card, recipe = predictor.card, predictor.recipe
    spec, point = BackboneSpec.from_json(card["backbone"]), predictor.point
    values: dict[str, Any] = {
        "featprobe_version": __version__,
        "task": card["head"]["task"],
        "head": card["head"]["kind"],
        "classes": list(card["head"]["classes"]),
        "backbone": spec.model,
        "weights_licence": predictor.backbone.licence if spec.is_own else licence_of(spec),
        "weights_sha256": recipe.weights_sha256,
        "head_sha256": card["head_sha256"],
        "feature_key": recipe.key,
        "data": card["data"]["name"],
        "data_fingerprint": card["data"]["fingerprint"],
        "threshold": output.limit,
        "threshold_from": predictor.output.threshold.source,
        "rule": predictor.output.rule,
        "operating_point": None if point is None else str(point.wanted),
        "base": None if point is None or isnan(point.base) else float(np.float32(point.base)),
        "least_area": 1 if point is None else point.least_area,
        "input_dtype": raw.dtype,
        "input_layout": "NHW" if raw.channels == 1 else "NHWC, red green blue",
        "image_size": list(raw.size),
        "frame_size": list(recipe.frame),
        "tile": recipe.tile,
        "overlap": recipe.overlap if recipe.tile is not None else None,
        "preprocessing": {
            name: recipe.to_json()[name]
            for name in ("intensity", "window", "size", "fit", "interpolation", "mean", "std", "dtype")
        },
    }
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def checked(model: Any) -> bytes:
    """The bytes of a model that `onnx.checker` passes. Raises ProbeError for one that it does not."""
    import onnx

    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:
        raise ProbeError(f"onnx.checker refuses the graph: {str(error)[:300]}. Nothing was written.") from error
    data: bytes = model.SerializeToString()
    return data


def notes_on(predictor: Predictor, output: GraphOutput) -> Iterator[str]:
    """Facts about a graph that a user should know."""
    recipe, point = predictor.recipe, predictor.point
    yield from point_note(point)
    if point is not None and "verdict" not in output.names:
        yield "a graph does not count the pixels of a finding: it gives no verdict, examples/runner.py does"
    if recipe.tile is not None:
        yield (
            f"the graph takes one tile: cut images into tiles of {recipe.tile} pixels that overlap by {recipe.overlap} "
            "or more, and join what it says of them"
        )
    if recipe.precision != "fp32":
        yield f"the head was trained on features in {recipe.precision}; the graph computes in float32"
    if recipe.empty_pixels:
        yield "pixels that a header calls empty must be set to 0 before the graph gets them"


@contextmanager
def silence() -> Iterator[None]:
    """Keep what exporters print off the terminal: errors are raised all the same."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(before)
