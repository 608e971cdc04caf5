"""Images of a live backbone: what a GPU draws from raw levels is what the CPU draws, and nothing waits for a device."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CPU, PoolingBackbone, write_set
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from featprobe.backbones.backbone import load_backbone
from featprobe.cache import Cache, open_cache
from featprobe.datasets.images.reading import read_levels, write_levels
from featprobe.errors import BackboneError, ProbeError
from featprobe.features import Features
from featprobe.probes import execution
from featprobe.specs import BackboneSpec
from featprobe.stages.extraction.crops import Augmentation
from featprobe.stages.extraction.extract_options import ExtractOptions
from featprobe.stages.extraction.make_cache import extract_with
from featprobe.stages.training.live import LiveFeatures, Views
from featprobe.stages.training.probe_options import Tuning
from featprobe.stages.workspace import Workspace, make_generated

ROUNDING = 2e-6  # of values in [0, 1]
SPEC = BackboneSpec("tiny", "test_efficientnet", "random", arguments=("--backbone", "tiny", "--random-init"))
TINY = BackboneSpec("tiny", "test_efficientnet_gn", "random")


class Looking(nn.Module):
    """In the place of a backbone: keeps the images that it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor, content: Tensor | None = None) -> Features:
        self.seen.append(images)
        return Features({"stride4": images[:, :, ::4, ::4]}, (images.shape[2], images.shape[3]), content)


def cache_of(folder: Path, kind: str, **how: Any) -> Cache:
    """A cache of 8-bit colours, of 16-bit grey levels, or of fractions some of which are empty."""
    workspace = Workspace(folder)
    if kind == "colour":
        data = write_set(folder / "parts", 8, (40, 56))
    else:
        data = make_generated("xray", folder / "xray", images=8, size=(48, 64))
    if kind == "fractions":
        for path in sorted((data / "images").rglob("*.*")):
            levels = np.ma.masked_array(read_levels(path).astype(np.float32) - 1000, mask=False)
            levels[3:9, 5:20] = np.ma.masked
            path.unlink()
            write_levels(path, levels)
    options = ExtractOptions(batch_size=4, workers=1, quiet=True, **how)
    return open_cache(extract_with(workspace, PoolingBackbone(), workspace.data_set(str(data)), options, CPU).path)


def shown(cache: Cache, augmented: bool) -> tuple[list[Tensor], list[Any]]:
    """The images of two batches as a backbone sees them, and what a feed gives with them."""
    backbone, rows = Looking(), np.arange(len(cache))

    def truth(row: int) -> Any:
        return cache.semantic(row), cache.instances(row) if "instseg" in cache.data.tasks else None

    how = Augmentation() if augmented else None
    with LiveFeatures(cache, backbone, CPU, truth, masks=True, augmentation=how, seed=3) as live:  # type: ignore[arg-type]
        return backbone.seen, [batch for batch, _ in live.training([rows[:5], rows[5:]])]


@pytest.mark.parametrize("augmented", [True, False], ids=["augmented", "plain"])
@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("colour", {}),
        ("colour", {"size": (64, 64), "fit": "letterbox"}),
        ("grey", {}),
        ("grey", {"intensity": "log"}),
        ("grey", {"intensity": "percentile:1:99:image", "size": (96, 64)}),
        ("grey", {"tile": 32, "overlap": 8}),
        ("fractions", {"intensity": "window:0:50000"}),
        ("fractions", {"intensity": "percentile:1:99:image"}),
    ],
    ids=str,
)
def test_a_gpus_views_are_the_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, how: dict[str, Any], augmented: bool
) -> None:
    cache = cache_of(tmp_path, kind, **how)
    images, given = shown(cache, augmented)
    monkeypatch.setattr(execution, "whole_batches", lambda device: True)
    others, found = shown(cache, augmented)
    for one, other in zip(images, others, strict=True):
        assert one.shape == other.shape and float((one - other).abs().max()) <= ROUNDING
    assert len(torch.unique(images[0])) > 100
    for batch, twin in zip(given, found, strict=True):
        if not augmented:
            assert np.array_equal(batch, twin)
            continue
        assert isinstance(batch, Views) and torch.equal(batch.labels, twin.labels)
        for own, its in zip(batch.objects or (), twin.objects or (), strict=True):
            assert all(torch.equal(getattr(own, n), getattr(its, n)) for n in ("boxes", "labels", "masks", "crowds"))


class _Noting(TorchDispatchMode):
    """Collects the names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_batch_is_drawn_without_a_look_at_its_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "whole_batches", lambda device: True)
    cache = cache_of(tmp_path, "grey")
    live = LiveFeatures(
        cache, Looking(), CPU, lambda row: (cache.semantic(row), None), augmentation=Augmentation()  # type: ignore[arg-type]
    )  # fmt: skip
    with live:
        raw = [live._augmented(row, 0, row) for row in range(4)]
        with _Noting() as noting:
            live._features([live._drawn(one) for one in raw])
    waits = [name for name in noting.names if "local_scalar" in name or "nonzero" in name or "item" in name]
    assert noting.names and not waits


def test_heads_get_half_precision_on_a_gpu_and_what_they_got_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_of(tmp_path, "grey")
    found = []
    for whole in (False, True):
        monkeypatch.setattr(execution, "whole_batches", lambda device, whole=whole: whole)
        with LiveFeatures(cache, Looking(), CPU, lambda row: (None, None), precision="bf16") as live:  # type: ignore[arg-type]
            found.append(next(live.batches([np.arange(2)]))[1].maps["stride4"].dtype)
    assert found == [torch.float32, torch.bfloat16]


def test_precisions_that_can_not_be_are_refused() -> None:
    with pytest.raises(ProbeError, match="amp is for a frozen backbone"):
        Tuning(precision="amp")
    with pytest.raises(ProbeError, match="compile would change nothing"):
        Tuning(regime="frozen-online", compile=True)
    assert Tuning(regime="frozen-online", precision="amp").to_json()["precision"] == "amp"
    assert "compile" not in Tuning(compile=True).to_json() and "workers" not in Tuning().to_json()


def test_a_machine_without_a_compiler_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()  # another test's shapes would make these symbols, which take their time
    backbone = load_backbone(TINY, ("stride4", "stride8"))
    backbone.unfreeze()
    backbone.fit((32, 32))
    backbone.compiled = True
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    backbone.eval()
    plain = backbone(images).maps["stride4"]  # evaluation takes no compiler
    assert plain.isfinite().all()
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kernels"))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (str(tmp_path / "no-compiler"),))
    backbone.train()
    with pytest.raises(BackboneError, match="torch can't compile test_efficientnet_gn here") as caught:
        backbone(images)
    assert "Omit --compile" in str(caught.value) and len(str(caught.value).splitlines()) == 4


def test_a_failure_after_the_first_compiled_step_is_not_the_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def compiled(call: Any) -> Any:
        def run(*given: Any) -> Any:
            calls.append(len(calls))
            if len(calls) > 2:
                raise RuntimeError("CUDA error: unspecified launch failure")
            return call(*given)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    backbone = load_backbone(SPEC)
    backbone.unfreeze()
    backbone.compiled = True
    backbone.train()
    images = torch.zeros(2, 3, 32, 32)
    backbone(images), backbone(images)
    with pytest.raises(RuntimeError, match=r"^CUDA error: unspecified launch failure$"):
        backbone(images)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_backbone_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda call: torch._dynamo.optimize("aot_eager")(call))  # no minute of C++
    torch._dynamo.reset()
    backbone = load_backbone(TINY, ("stride4", "stride8"))
    backbone.unfreeze()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    backbone.train()
    found = []
    for compiled in (False, True):
        backbone.compiled = compiled
        maps = backbone(images).maps
        sum(m.square().mean() for m in maps.values()).backward()
        weight = next(p for p in backbone.parameters() if p.grad is not None)
        found.append([*(m.detach() for m in maps.values()), weight.grad.clone()])
        backbone.zero_grad(set_to_none=True)
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)
