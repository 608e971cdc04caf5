"""The parts of a graph compute what featprobe computes, before any exporter sees them."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from featprobe.cache.quantised import as_read
from featprobe.datasets.images.reading import frame_image, to_unit
from featprobe.features import Features, pool
from featprobe.geometry import Placement
from featprobe.intensity import Intensity
from featprobe.levels import FeatureLevel
from featprobe.probes import logits_at_original
from featprobe.probes.verdicts.heat_maps import maps_at_original
from featprobe.probes.verdicts.neighbours import nearest
from featprobe.specs import FeatureRecipe
from featprobe.stages.export import search
from featprobe.stages.export.export import OPSET, silence
from featprobe.stages.export.graph import AtOriginal, Differences, Framed, Raw, Unit, placement_of, relative, rounded
from featprobe.stages.export.image_output import Vectors
from featprobe.stages.export.parity import Parity
from featprobe.stages.export.search import Nearest

RECIPE = FeatureRecipe(
    label="b", backbone="b", weights_sha256="0", levels=(FeatureLevel("stride4", 3, 4),), final_norm=False,
    size=(40, 56), frame=(40, 56), fit="resize", intensity="none", window=None, mean=(0.4, 0.5, 0.6),
    std=(0.2, 0.2, 0.2), interpolation="bicubic", dtype="fp16",
)  # fmt: skip
PLACEMENT = Placement((50, 33), (37, 21), (48, 32))


def levels_of(dtype: str, size: tuple[int, ...], seed: int = 0) -> Any:
    """Levels all over a number format."""
    random = np.random.default_rng(seed)
    if dtype == "float32":
        return random.normal(size=size).astype(np.float32)
    return random.integers(0, np.iinfo(dtype).max, size, dtype=dtype, endpoint=True)


@pytest.mark.parametrize(
    ("dtype", "policy", "window"),
    [
        ("uint8", "none", None),
        ("uint16", "none", None),
        ("uint16", "percentile:0.01:99.99", (1234.0, 45678.0)),
        ("uint8", "window:20:20.5", (20.0, 20.5)),
        ("uint16", "percentile:0.01:99.99:log", (17.0, 45678.0)),
        ("uint16", "minmax", (9.0, 9.0)),
        ("float32", "window:-1:1.5", (-1.0, 1.5)),
        ("float32", "window:0.1:1.5:log", (0.1, 1.5)),
    ],
)
def test_levels_become_the_numbers_of_to_unit(dtype: str, policy: str, window: tuple[float, float] | None) -> None:
    recipe = replace(RECIPE, intensity=policy, window=window)
    levels = levels_of(dtype, (2, 30, 40))
    found = Unit(recipe, Raw(dtype, 1, (30, 40)))(torch.from_numpy(levels))
    assert found.dtype == torch.float32 and found.shape == (2, 1, 30, 40)
    exact = not (dtype == "float32" and "log" in policy)  # torch's logarithm is not numpy's, bit for bit
    wanted = to_unit(levels, window, Intensity.parse(policy))
    np.testing.assert_allclose(found[:, 0].numpy(), wanted, rtol=0 if exact else 1e-6)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("fit", ["resize", "letterbox"])
@pytest.mark.parametrize("size", [(40, 56), (90, 61), (20, 100)])
def test_frames_are_those_of_frame_image(channels: int, fit: Any, size: tuple[int, int]) -> None:
    recipe = replace(RECIPE, fit=fit, frame=(64, 64))
    raw = Raw("uint8", channels, size)
    levels = levels_of("uint8", (2, *raw.shape))
    placement = placement_of(recipe, size)
    found = Framed(recipe, placement)(Unit(recipe, raw)(torch.from_numpy(levels)))
    wanted = np.stack([frame_image(own, placement, recipe) for own in levels])
    np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32", "int8"])
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(1e-4, 2e4))
def test_features_are_rounded_as_in_a_cache(dtype: Any, seed: int, scale: float) -> None:
    m = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed)).clamp(-3, 3) * scale
    m[0, 0] = m[0, 0, 0, 0]  # a channel of one value
    m[0, 1] = m[0, 1].relu()
    assert torch.equal(rounded(m, dtype), as_read({"own": m}, dtype)["own"].float())


class Rounding(nn.Module):
    """Maps in the number formats of caches, behind a product: runtimes join neighbouring operators."""

    def forward(self, maps: torch.Tensor) -> tuple[torch.Tensor, ...]:
        own = maps * 2
        return own, *(rounded(own, dtype) for dtype in FORMATS)


FORMATS = ("fp16", "bf16", "int8")


def test_features_are_rounded_in_every_runtime(tmp_path: Path) -> None:
    """Halves between two numbers too, and those below the smallest of full precision."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'featprobe[onnx]'")
    pytest.importorskip("onnxscript", reason="pip install 'featprobe[onnx]'")
    random = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 4, 16, 16, generator=random)
    steps = torch.randint(-2, 3, maps[:, 1:3].shape, generator=random)  # of half a number's distance to the next
    maps[:, 1] = maps[:, 1].half().float() * (1 + 2.0**-11 * steps[:, 0])
    maps[:, 2] = maps[:, 2].bfloat16().float() * (1 + 2.0**-8 * steps[:, 1])
    maps[:, 3] *= 2.0 ** torch.randint(-26, 14, maps[:, 3].shape, generator=random)
    with silence():
        program = torch.onnx.export(Rounding(), (maps,), dynamo=True, opset_version=OPSET, verbose=False)
    assert program is not None
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    found = {"onnxruntime": session.run(None, {session.get_inputs()[0].name: maps.numpy()})}
    if find_spec("openvino") is not None:
        import openvino

        compiled = openvino.Core().compile_model(tmp_path / "model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        answers = compiled([maps.numpy()])
        found["openvino"] = [answers[place].copy() for place in range(len(FORMATS) + 1)]
    for answers in found.values():
        own = torch.from_numpy(answers[0])
        for dtype, values in zip(FORMATS, answers[1:], strict=True):
            assert torch.equal(torch.from_numpy(values), as_read({"own": own}, dtype)["own"].float())


@pytest.mark.parametrize("shown", [logits_at_original, maps_at_original])
@pytest.mark.parametrize("original", [(50, 33), (200, 90), (37, 21)])
def test_maps_are_brought_to_the_original_as_predict_does(shown: Any, original: tuple[int, int]) -> None:
    placement = replace(PLACEMENT, original=original)
    maps = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0))
    found = AtOriginal(shown, 4, placement)(maps)
    torch.testing.assert_close(found, shown(maps, 4, placement), rtol=0, atol=1e-5)


@pytest.mark.parametrize("content", [(48, 32), (37, 21)])
def test_vectors_are_pooled_features(content: tuple[int, int]) -> None:
    levels = [FeatureLevel("stride4", 5, 4), FeatureLevel("stride8", 7, 8)]
    random = torch.Generator().manual_seed(0)
    maps = {v.name: torch.randn(2, v.channels, *v.cells((48, 32)), generator=random) for v in levels}
    placement = replace(PLACEMENT, content=content)
    given = None if content == (48, 32) else torch.tensor([content, content])
    features = Features(maps, (48, 32), given)
    wanted = pool(features, levels).vectors(levels)
    torch.testing.assert_close(Vectors(levels, placement)(features), wanted, rtol=1e-5, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 10**6))
def test_the_search_finds_what_nearest_finds(size: int, count: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    bank, queries = torch.randn(size, 4, generator=random), torch.randn(5, 4, generator=random)
    queries[0] = bank[0]
    wanted, places = nearest(queries, bank, count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "AT_ONCE", 70)  # several blocks
        found, own = Nearest(bank, count, 5)(queries)
    assert torch.equal(own, places) and found[0, 0] == 0
    torch.testing.assert_close(found, wanted)


def test_scores_are_compared_relatively_but_for_the_smallest() -> None:
    assert relative(np.array([2.0, 1e-7]), np.array([1.0, 0.0])) == 1.0
    assert relative(np.array([0.0, 1e-5]), np.array([0.0, 0.0])) == pytest.approx(1e-2)


def test_a_comparison_without_any_object_says_so() -> None:
    none, some = Differences(verdicts=2, equal_verdicts=2), Differences(objects=3, equal_objects=2)
    assert "neither finds an object in any of them, so none was compared" in Parity(2, "", 0, none, "", 1, 0, 0).lines
    assert Parity(2, "", 0, some, "", 1, 0, 0).faults == ["1 of 3 objects differ"]
    assert Parity(2, "", 0, replace(some, logits=0.0), "", 1, 0, 0).faults == ["1 of 3 labels differ"]


def test_what_is_no_number_in_one_batch_stays_so_in_all() -> None:
    for order in ((0.1, np.nan), (np.nan, 0.1)):
        total = sum((Differences(scores=value) for value in order), Differences())
        assert Parity(2, "", 0, total, "", 1, 0, 0).faults == [
            "scores differ by nan of their value; at most 0.001 is wanted"
        ]
