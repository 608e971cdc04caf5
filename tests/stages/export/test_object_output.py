"""Graphs of heads that find objects say what the heads say, for batches of any size, in two runtimes."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from featprobe.errors import ProbeError
from featprobe.features import Features
from featprobe.geometry import Placement
from featprobe.levels import FeatureLevel
from featprobe.probes import Detections, FcosHead, ObjectHead, objects_at_original
from featprobe.probes.detections import Candidates, best_of, suppress
from featprobe.probes.paste import paste_mask
from featprobe.probes.rcnn.rcnn_head import RcnnHead
from featprobe.stages.export.export import silence
from featprobe.stages.export.graph import NEAR, Differences
from featprobe.stages.export.object_output import ObjectOutput, at_original, matched, translations
from featprobe.stages.findings import Threshold

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")

LEVELS = tuple(FeatureLevel(f"stride{s}", c, s) for s, c in ((8, 12), (16, 20), (32, 24)))
OF_A_VIT = (FeatureLevel("block0", 16, 16), FeatureLevel("block1", 16, 16))
PADDED = Placement((67, 150), (44, 98), (64, 128))
SMALLEST = Placement((26, 32), (13, 16), (16, 16))  # one cell of stride 16, a quarter of one of its coarser map
WHOLE = Placement((64, 96), (64, 96), (64, 96))
BATCHES = (1, 2, 5)


def lively(head: FcosHead | RcnnHead) -> FcosHead | RcnnHead:
    """An untrained head that finds objects of all classes in random maps, and none in maps of zeros."""
    with torch.no_grad():
        if isinstance(head, FcosHead):
            head.class_out.bias.fill_(-12)
            head.class_out.weight.mul_(200)
            head.box_out.weight.mul_(20)
        else:
            head.rpn.head.cls_logits.weight.mul_(20)
            head.rpn.head.bbox_pred.weight.mul_(10)
            of_box, out = head.regions.box_head, head.regions.box_predictor
            for bias in (of_box.fc6.bias, of_box.fc7.bias, out.cls_score.bias):
                bias.zero_()
            out.cls_score.bias[0] = 6
            out.cls_score.weight.mul_(30)
            out.bbox_pred.weight.mul_(3)
    return head.eval().requires_grad_(False)


def output_of(head: FcosHead | RcnnHead, placement: Placement) -> ObjectOutput:
    return ObjectOutput(head, card_of(head.classes), placement, None).eval()


def card_of(classes: int) -> dict[str, Any]:
    return {"head": {"classes": list(map(str, range(classes)))}}


def features_of(head: ObjectHead, placement: Placement, batch: int) -> Features:
    rng = torch.Generator().manual_seed(batch)
    maps = {v.name: torch.randn(batch, v.channels, *v.cells(placement.frame), generator=rng) for v in head.levels}
    whole = placement.content == placement.frame
    contents = None if whole else torch.tensor([placement.content], dtype=torch.int32).expand(batch, 2).contiguous()
    return Features(maps, placement.frame, contents)


class FromMaps(nn.Module):
    """The end of a graph alone, behind maps instead of images."""

    def __init__(self, output: ObjectOutput, features: Features) -> None:
        super().__init__()
        self.output, self.names, self.frame = output, list(features.maps), features.frame
        self.register_buffer("content", None if features.content is None else features.content[:1])

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, ...]:
        content = None if self.content is None else self.content.expand(maps[0].shape[0], 2)
        return self.output(Features(dict(zip(self.names, maps, strict=True)), self.frame, content))


Run = Callable[[Features], Mapping[str, NDArray[Any]]]


def runtimes(output: ObjectOutput, path: Path) -> dict[str, Run]:
    """What runs a graph in each runtime that is installed."""
    import onnxruntime

    example = features_of(output.head, output.placement, 2)
    dynamic = {0: torch.export.Dim.DYNAMIC}
    with silence(), torch.no_grad():
        program = torch.onnx.export(
            FromMaps(output, example).eval(), (list(example.maps.values()),), dynamo=True, opset_version=20,
            verbose=False, input_names=list(example.maps), output_names=list(output.names),
            custom_translation_table=translations(), dynamic_shapes=([dynamic] * len(example.maps),),
        )  # fmt: skip
    assert program is not None
    program.save(path)
    session = onnxruntime.InferenceSession(path)
    found: dict[str, Run] = {
        "onnxruntime": lambda features: dict(zip(output.names, session.run(None, arrays(features)), strict=True))
    }
    if find_spec("openvino") is not None:
        import openvino

        compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

        def run(features: Features) -> dict[str, NDArray[Any]]:
            answers = compiled(arrays(features))
            return {name: answers[name].copy() for name in output.names}

        found["openvino"] = run
    return found


def arrays(features: Features) -> dict[str, NDArray[np.float32]]:
    return {name: m.numpy() for name, m in features.maps.items()}


HEADS: Mapping[str, tuple[Callable[[], FcosHead | RcnnHead], Placement]] = {
    "fcos in the smallest frame": (lambda: FcosHead(OF_A_VIT, 3, 16, convs=1), SMALLEST),
    "maskrcnn in padded frames": (lambda: RcnnHead(LEVELS[:2], 4, 16, masks=True), PADDED),
}


@pytest.fixture(scope="module", params=HEADS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ObjectOutput, Any]:
    torch.manual_seed(21)
    build, placement = HEADS[request.param]
    output = output_of(lively(build()), placement)
    return output, runtimes(output, tmp_path_factory.mktemp("graph") / "model.onnx")


def agreement(output: ObjectOutput, found: Mapping[str, NDArray[Any]], features: Features) -> Differences:
    """How a graph's answer agrees with the head itself."""
    with torch.inference_mode():
        wanted = [at_original(own, output.placement) for own in output.head(features)]
    assert found["score"].shape == found["verdict"].shape == (features.batch,)
    assert found["score"] == pytest.approx([max(own.scores.tolist(), default=0) for own in wanted], abs=1e-5)
    assert found["verdict"].tolist() == [bool((own.scores >= output.limit).any()) for own in wanted]
    total = Differences()
    for image, own in enumerate(wanted):
        total += matched(output.detections(found, image), own, output.limit, output.floor)
    return total


def test_a_graph_finds_what_its_head_finds(exported: Any) -> None:
    output, runs = exported
    for run in runs.values():
        for batch in BATCHES:
            features = features_of(output.head, output.placement, batch)
            total = agreement(output, run(features), features)
            assert total.objects >= 3 * batch and total.equal_objects == total.objects and total.near <= 2, total


def test_a_batch_without_any_object_is_an_empty_list(exported: Any) -> None:
    output, runs = exported
    for run in runs.values():
        for batch in BATCHES:
            features = features_of(output.head, output.placement, batch)
            found = run(replace(features, maps={name: torch.zeros_like(m) for name, m in features.maps.items()}))
            assert found["boxes"].shape == (0, 4) and found["labels"].shape == found["image"].shape == (0,)
            assert not found["verdict"].any() and not found["score"].any() and len(found["score"]) == batch
            assert not output.masks or found["masks"].shape == (0, 28, 28)


def test_an_image_without_any_object_is_not_called_by_a_threshold_of_0() -> None:
    """As `predict` says it."""
    torch.manual_seed(23)
    head = lively(FcosHead(LEVELS, 3, 16))
    output = ObjectOutput(head, card_of(3), WHOLE, Threshold.given(0.0))
    features = features_of(head, WHOLE, 2)
    maps = {name: torch.stack([m[0], torch.zeros_like(m[0])]) for name, m in features.maps.items()}
    *_, score, verdict = output(replace(features, maps=maps))
    assert score[0] > 0 and score[1] == 0 and verdict.tolist() == [True, False]


@pytest.mark.parametrize("placement", [PADDED, WHOLE], ids=["padded", "whole"])
def test_regions_of_a_whole_batch_are_those_of_each_image(placement: Placement) -> None:
    torch.manual_seed(22)
    head = lively(RcnnHead(LEVELS, 4, 16, masks=True))
    output = output_of(head, placement)
    features = features_of(head, placement, 3)
    with torch.inference_mode():
        wanted = head(features)
        boxes, scores, labels, image, masks, *_ = output(features)
    assert len(scores) == sum(len(own.scores) for own in wanted) > 30
    for index, own in enumerate(wanted):
        assert torch.equal(scores[image == index], own.scores) and torch.equal(labels[image == index], own.labels)
        torch.testing.assert_close(masks[image == index], own.masks)
        wide = [one.box_xyxy for one, _ in objects_at_original(own, placement)]
        torch.testing.assert_close(
            boxes[image == index].double(), torch.tensor(wide, dtype=torch.float64), rtol=1e-5, atol=1e-4
        )


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 30), st.integers(1, 4), st.integers(0, 2**31), st.sampled_from([5, 100]))
def test_suppression_of_a_batch_is_that_of_each_image(
    batch: int, boxes: int, classes: int, seed: int, most: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    corner = 20 * torch.rand(batch, boxes, 2, generator=rng)
    both = torch.cat([corner, corner + 12 * torch.rand(batch, boxes, 2, generator=rng)], 2).clamp(max=24)
    scores = torch.rand(batch, boxes, generator=rng).square()
    labels = torch.randint(1, classes + 1, (batch, boxes), generator=rng)
    values, where = best_of(Candidates(both, labels, scores, 0.5, 0.05), classes, most)
    for image in range(batch):
        wanted = suppress(both[image], scores[image], labels[image], 0.5, 0.05)[:most]
        found = where[image][values[image] > 0]
        assert found.tolist() == wanted.tolist()
        assert torch.equal(values[image][: len(found)], scores[image][found])


def detections(*objects: tuple[list[float], int, float, float]) -> Detections:
    """Of (box, label, score, probability of all of its mask) each."""
    boxes, labels, scores, masks = zip(*objects, strict=True) if objects else ([], [], [], [])
    return Detections(
        torch.tensor(boxes).view(-1, 4), torch.tensor(labels), torch.tensor(scores, dtype=torch.float64),
        torch.tensor(masks)[:, None, None].expand(-1, 2, 2),
    )  # fmt: skip


BOX = [0.0, 0.0, 40.0, 20.0]
ONE = (BOX, 1, 0.7, 0.9)


@pytest.mark.parametrize(
    ("others", "equal", "counted"),
    [
        ([ONE], 1, 1),
        ([(BOX, 1, 0.7 - NEAR * 0.9, 0.9)], 1, 1),
        ([(BOX, 1, 0.7 - NEAR * 1.1, 0.9)], 0, 2),
        ([([0.0, 0.0, 40.0, 20.1], 1, 0.7, 0.9)], 1, 1),
        ([([0.0, 0.0, 40.0, 20.4], 1, 0.7, 0.9)], 0, 2),
        ([(BOX, 2, 0.7, 0.9)], 0, 2),
        ([(BOX, 1, 0.7, 0.9 - NEAR * 1.1)], 0, 2),
        ([], 0, 1),
        ([ONE, ONE], 1, 2),
    ],
)
def test_objects_are_one_where_nothing_tells_them_apart(others: Any, equal: int, counted: int) -> None:
    for found, wanted in ((detections(*others), detections(ONE)), (detections(ONE), detections(*others))):
        total = matched(found, wanted, 0.5, 0.01)
        assert (total.equal_objects, total.objects, total.near) == (equal, counted, 0)


@pytest.mark.parametrize("score", [0.5 - NEAR / 2, 0.5 + NEAR / 2, 0.01 + NEAR / 2])
def test_an_object_at_a_threshold_is_counted_apart(score: float) -> None:
    total = matched(detections(ONE, ([0.0, 20.0, 40.0, 40.0], 1, score, 0.9)), detections(ONE), 0.5, 0.01)
    assert (total.equal_objects, total.objects, total.near) == (1, 1, 1)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31))
def test_the_pages_program_makes_the_masks_of_predict(seed: int) -> None:
    page = (Path(__file__).parents[3] / "docs" / "exporting.md").read_text()
    (program,) = re.findall(r"```python\n(def pixels_of.*?)```", page, re.S)
    space: dict[str, Any] = {"np": np}
    exec(program, space)
    rng = np.random.default_rng(seed)
    mask = rng.random((28, 28)).astype(np.float32)
    (x1, x2), (y1, y2) = np.sort(rng.uniform(0, (60, 40), (2, 2)), 0).T
    size, box = (40, 60), [float(v) for v in (x1, y1, x2 + 0.1, y2 + 0.1)]
    box[2:] = min(box[2], 60), min(box[3], 40)
    found, wanted = space["pixels_of"](mask, box, *size), paste_mask(torch.from_numpy(mask), box, size)
    assert (found != wanted).sum() <= 1 and wanted.shape == found.shape == size  # one at 0.5 may round either way


def test_another_kind_of_head_is_refused_in_words() -> None:
    class OwnHead(ObjectHead):
        @property
        def assignment(self) -> dict[str, str]:
            return {}

        def forward(self, features: Features, targets: Any = None) -> Any:
            return [Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0))]

    head = OwnHead()
    head.levels = LEVELS
    with pytest.raises(ProbeError, match=r"can't be exported[\s\S]*OwnHead"):
        ObjectOutput(head, card_of(2), WHOLE, None)
