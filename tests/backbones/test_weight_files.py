"""Which files decide a backbone's weights: those that are really read, and none where other things decide."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from safetensors.torch import save_file

from featprobe.backbones import weight_files as named
from featprobe.backbones.backbone import load_backbone
from featprobe.backbones.catalog import find_backbone
from featprobe.backbones.models import takes_named_file
from featprobe.specs import BackboneSpec

SMALL = "test_efficientnet.r160_in1k"


@pytest.fixture(autouse=True)
def without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not loaded timm."""
    monkeypatch.setattr(named, "sys", SimpleNamespace(modules={}))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub's cache in which nothing is, without a network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def into_cache(hub: Path, commit: str, seed: int) -> Path:
    """Weights as the hub's client leaves them, under a commit that is now the newest."""
    repository = hub / f"models--timm--{SMALL}"
    path = repository / "snapshots" / commit / "model.safetensors"
    path.parent.mkdir(parents=True)
    save_file(load_backbone(BackboneSpec("a", SMALL, "random", seed=seed)).tensors(), path)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    return path


def test_the_file_of_the_hub_is_the_one_that_timm_reads(hub: Path) -> None:
    spec = BackboneSpec("a", SMALL)
    assert named.weight_files(spec) == () and takes_named_file(spec)
    for seed, commit in enumerate(("a" * 40, "b" * 40)):
        path = into_cache(hub, commit, seed)
        assert named.weight_files(spec)[0] == path
        assert load_backbone(spec).sha256 == load_backbone(replace(spec, source="random", seed=seed)).sha256
        assert load_backbone(replace(spec, source="file", weights=str(path))).sha256 == load_backbone(spec).sha256


@pytest.mark.parametrize(
    ("model", "taken"),
    [
        ("convnext_tiny.dinov3_lvd1689m", True),
        ("resnet50.a1_in1k", True),
        ("davit_base_fl.msft_florence2", False),
        ("resnet50", False),
        ("none", False),
    ],
)
def test_timm_says_which_weights_of_the_hub_lie_elsewhere(model: str, taken: bool) -> None:
    assert takes_named_file(BackboneSpec("a", model)) is taken
    assert takes_named_file(BackboneSpec("a", model, "embedded"))


def test_the_code_that_makes_the_network_is_among_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.pth").touch()
    files = named.weight_files(BackboneSpec("a", SMALL, "file", str(tmp_path / "a.pth")))
    assert files[0] == tmp_path / "a.pth"
    ends = {"timm/models/convnext.py", "timm/layers/norm.py", "backbones/backbone.py", "backbones/weights.py"}
    assert {end for end in ends if any(path.as_posix().endswith(end) for path in files)} == ends
    assert named.weight_files(find_backbone("embedded"))[0].suffix == ".pth"


@pytest.mark.parametrize(
    "spec",
    [
        BackboneSpec("a", SMALL, "random"),
        BackboneSpec("a", "module:package.Net", "own"),
        BackboneSpec("a", "package:net", "file", __file__),
        BackboneSpec("a", SMALL, "file", "nowhere.pth"),
        BackboneSpec("a", SMALL, "file", "a\0b"),
        BackboneSpec("a", "hf-hub:somebody/net"),
        BackboneSpec("a", "x" * 300),
    ],
    ids=lambda spec: f"{spec.source} {spec.model[:20]} {str(spec.weights)[-11:]}",
)
def test_no_file_is_named_where_other_things_decide(spec: BackboneSpec, hub: Path) -> None:
    assert named.weight_files(spec) == ()


def test_no_file_is_named_where_timm_is_loaded_or_told_to_look_elsewhere(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    into_cache(hub, "a" * 40, 0)
    assert named.weight_files(BackboneSpec("a", SMALL))
    with monkeypatch.context() as patch:
        patch.setenv("TIMM_USE_OLD_CACHE", "1")
        assert named.weight_files(BackboneSpec("a", SMALL)) == ()
    assert "timm" in sys.modules
    monkeypatch.setattr(named, "sys", sys)
    assert named.weight_files(BackboneSpec("a", SMALL)) == ()


def test_a_hub_s_cache_that_may_not_be_read_names_no_file(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    into_cache(hub, "a" * 40, 0)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", refuse)
    assert named.weight_files(BackboneSpec("a", SMALL)) == ()
