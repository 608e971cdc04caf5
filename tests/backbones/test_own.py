"""Networks of your own: objects given from Python, and those of other packages; what is refused, and in which words."""

import copy
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from click.testing import CliRunner
from helpers import options
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import featprobe
from featprobe import ExtractOptions, FeatureLevel, ProbeOptions, TrainRecipe, Workspace, open_cache
from featprobe.backbones.adapted import adapted
from featprobe.backbones.backbone import Backbone, load_backbone
from featprobe.backbones.given import at_hand, spec_of_module
from featprobe.backbones.weights import weights_sha256
from featprobe.cli.main import cli
from featprobe.errors import BackboneError, CacheError, FeatprobeError, ProbeError
from featprobe.specs import BackboneSpec
from featprobe.stages.export.export import described, output_of
from featprobe.stages.export.graph import Raw
from featprobe.stages.training.probe_options import Tuning
from featprobe.stages.workspace import make_generated

ROOT = Path(__file__).parents[2]
QUICK = ProbeOptions(seeds=1, quiet=True, recipe=TrainRecipe(iterations=3, batch_size=4, loss_at="level"))


class Net(nn.Module):
    """Two maps, of strides 4 and 8; with dropout, in training mode as modules are when they are new."""

    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU())
            self.deep = nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1), nn.Dropout(0.5))

    def forward(self, images: Tensor) -> list[Tensor]:
        fine = self.stem(images)
        return [fine, self.deep(fine)]


class Small(Net):
    """With all that a module may say of itself."""

    name, licence, size, interpolation = "small", "MIT", (64, 96), "bicubic"
    levels = (FeatureLevel("fine", 8, 4), FeatureLevel("deep", 12, 8))

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        return {"stem": "^stem", "blocks": "^deep"}

    def no_weight_decay(self) -> set[str]:
        return {"deep.0.weight"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a small set."""
    root = tmp_path_factory.mktemp("own")
    make_generated("xray", root / "data" / "xray", images=12, size=(64, 64))
    return root


def loaded(module: nn.Module, levels: Sequence[str] = ()) -> Backbone:
    with at_hand(module):
        return load_backbone(spec_of_module(module), levels)


def refused(work: Callable[[], object], kind: type[FeatprobeError] = BackboneError) -> str:
    with pytest.raises(kind) as caught:
        work()
    return str(caught.value)


# ---- the face of timm's models ---------------------------------------------------------------------------------------


def test_a_module_serves_as_timms_models_do() -> None:
    module = Net()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    backbone = loaded(module)
    assert backbone.levels == (FeatureLevel("stride4", 8, 4), FeatureLevel("stride8", 12, 8))
    assert (backbone.multiple, backbone.mean, backbone.std) == (8, module.mean, module.std)
    assert backbone.sha256 == weights_sha256(module)
    assert backbone.tensors().keys() == before.keys()  # the names are the module's own
    images = torch.rand(3, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    found = backbone(images).maps
    with torch.inference_mode():
        wanted = copy.deepcopy(module).eval()((images - 0.5) / 0.25)
    for m, own in zip(found.values(), wanted, strict=True):
        torch.testing.assert_close(m, own)
    assert list(loaded(module, ["stride8"])(images).maps) == ["stride8"]
    assert module.training and all(p.requires_grad for p in module.parameters())  # it stays as it was
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_a_module_may_say_its_levels_size_name_and_licence() -> None:
    backbone = loaded(Small())
    assert [level.name for level in backbone.levels] == ["fine", "deep"]
    assert (backbone.own, backbone.interpolation, backbone.licence) == ((64, 96), "bicubic", "MIT")
    assert loaded(Net()).licence == "not stated by the module"
    assert backbone.spec.label == "small" and spec_of_module(Net()).label.startswith("Net-")
    assert spec_of_module(Net()).label != spec_of_module(Net(1)).label  # tables tell their weights apart


@given(st.lists(st.tuples(st.sampled_from((1, 2, 3)), st.integers(1, 4)), min_size=1, max_size=3))
@settings(max_examples=15, deadline=None)
def test_the_trial_pass_finds_the_strides_and_channels_of_any_pyramid(steps: list[tuple[int, int]]) -> None:
    """Each step: how many times coarser a map is than the one before it, as a power of two, and its channels."""

    class Pyramid(nn.Module):
        mean, std = Net.mean, Net.std

        def forward(self, images: Tensor) -> list[Tensor]:
            found, m = [], images[:, :1]
            for power, channels in steps:
                m = nn.functional.avg_pool2d(m, 2**power).repeat(1, channels, 1, 1)[:, :channels]
                found.append(m)
            return found

    strides = list(accumulate((2**power for power, _ in steps), mul))
    module = Pyramid()
    if strides[-1] > 32:  # the trial pass takes 448x224 pixels
        module.size = (2 * strides[-1], strides[-1])  # type: ignore[assignment]
    backbone = loaded(module)
    assert [level.stride for level in backbone.levels] == strides
    assert [level.channels for level in backbone.levels] == [channels for _, channels in steps]
    frame = (strides[-1], 3 * strides[-1])
    for m, level in zip(backbone(torch.rand(1, 3, *frame)).maps.values(), backbone.levels, strict=True):
        assert m.shape == (1, level.channels, *level.cells(frame))


def test_a_network_of_timm_given_as_an_object_computes_what_it_computes_by_name() -> None:
    named = load_backbone(BackboneSpec("t", "test_convnext.r160_in1k", "random"))

    class Given(nn.Module):
        mean, std, interpolation = named.mean, named.std, named.interpolation

        def __init__(self) -> None:
            super().__init__()
            self.model = copy.deepcopy(named.model)

        def forward(self, images: Tensor) -> list[Tensor]:
            return list(self.model.forward_intermediates(images, intermediates_only=True))

    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    found = loaded(Given())
    assert found.levels == named.levels
    for own, wanted in zip(found(images).maps.values(), named(images).maps.values(), strict=True):
        assert torch.equal(own, wanted)


def test_maps_of_one_stride_are_levels_by_their_place() -> None:
    class Blocks(Net):
        def forward(self, images: Tensor) -> list[Tensor]:
            return [self.stem(images)] * 3

    assert [level.name for level in loaded(Blocks()).levels] == ["map0", "map1", "map2"]


def test_a_network_without_padding_states_its_levels() -> None:
    class Bare(nn.Module):
        mean, std = Net.mean, Net.std

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 5, 2)  # two cells are lacking

        def forward(self, images: Tensor) -> list[Tensor]:
            return [self.conv(images)]

    assert "no common stride" in refused(lambda: loaded(Bare()))
    bare = Bare()
    bare.levels = [FeatureLevel("half", 4, 2)]  # type: ignore[assignment]
    assert loaded(bare)(torch.rand(1, 3, 32, 48)).maps["half"].shape == (1, 4, 16, 24)


def test_what_can_be_trained_of_it_is_trained() -> None:
    backbone = loaded(Small())
    backbone.unfreeze()
    groups = backbone.parameter_groups(1.0, 0.1, layer_decay=0.5)
    assert sorted({group["lr"] for group in groups}) == [0.5, 1.0]
    moving = {name for name, p in backbone.network.named_parameters() if p.requires_grad}
    assert moving == {"stem.0.weight", "stem.0.bias", "deep.0.weight", "deep.0.bias"}  # BatchNorm stays
    undecayed = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    assert id(backbone.network.deep[0].weight) in undecayed
    plain = loaded(Net())
    plain.unfreeze()
    assert {group["weight_decay"] for group in plain.parameter_groups(1.0, 0.1)} == {0.0, 0.1}
    assert "no learning rate can decay by layer" in refused(lambda: plain.parameter_groups(1.0, 0.1, layer_decay=0.5))
    assert "has no activation checkpointing. Omit" in refused(lambda: plain.unfreeze(checkpointing=True))
    assert "no norm of it" in refused(lambda: load_backbone(BackboneSpec("n", "module:x", "own", final_norm=True)))
    assert "makes its own weights" in refused(lambda: load_backbone(BackboneSpec("n", "module:x", "random")))


# ---- what is refused -------------------------------------------------------------------------------------------------


def giving(forward: Callable[[Any, Tensor], Any], **own: Any) -> nn.Module:
    """A network like Net with another forward and other attributes."""
    return type("Net", (Net,), {"forward": forward, **own})()


def maps(module: Any, images: Tensor) -> list[Tensor]:
    return Net.forward(module, images)


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "a tensor": (giving(lambda self, x: self.stem(x)), r"found   one tensor \(2, 8, 112, 56\)\nReturn a list"),
    "a dict": (giving(lambda self, x: {"c2": self.stem(x)}), r"found   a dict with c2\nReturn a list"),
    "nothing": (giving(lambda self, x: []), "no map at all"),
    "tokens": (giving(lambda self, x: [self.stem(x).flatten(2)]), r"map 0 is \(2, 8, 6272\), .*\nTokens become a map"),
    "nan": (giving(lambda self, x: [self.stem(x) * float("nan")]), "map 0 holds values that are not finite"),
    "coarse first": (giving(lambda self, x: maps(self, x)[::-1]), r"strides 8, 4, in this order\nReturn them finest"),
    "stripes": (giving(lambda self, x: [self.stem(x)[:, :, ::2]]), "no common stride"),
    "two of one stride": (
        giving(lambda self, x: [*maps(self, x), self.deep(self.stem(x))]), r"strides 4, 8, 8\nReturn one map of each",
    ),
    "strides that do not fit": (
        giving(lambda self, x: [self.stem(x), nn.functional.avg_pool2d(x, 14)]), "4, 14: no frame fits them all",
    ),
    "chance": (giving(lambda self, x: [nn.functional.dropout(self.stem(x))]), "other values in map 0 each time"),
    "the batch": (giving(lambda self, x: [self.stem(x - x.mean(0))]), "map 0 of an image changes with the other"),
    "one channel": (giving(lambda self, x: [nn.functional.conv2d(x, torch.ones(4, 1, 4, 4), stride=4)]),
                    r"RuntimeError on images \(2, 3, 448, 224\).*\nImages always have three channels"),
    "one size": (giving(lambda self, x: [self.stem(x) + torch.zeros(1, 8, 56, 56)]), r"size = \(height, width\)"),
    "no mean": (giving(maps, mean=None, std=(1, 0, 1)), r"mean: wanted three numbers, found nothing\n  std: wanted"),
    "one mean": (giving(maps, mean=(0.5,)), r"mean: wanted three numbers, found \(0.5,\)"),
    "a size of one number": (giving(maps, size=(64,)), r"size: wanted \(height, width\)"),
    "other levels": (giving(maps, levels=["stride4"]), "its attribute `levels` means something else"),
    "wrong levels": (giving(maps, levels=[FeatureLevel("a", 12, 4), FeatureLevel("b", 8, 8)]), "Correct `levels`"),
    "a name of featprobe's": (giving(maps, name="embedded"), "timm or a package has a backbone embedded"),
    "a name of timm's": (giving(maps, name="resnet18"), "timm or a package has a backbone resnet18"),
    "a name with a slash": (giving(maps, name="a/b"), "names tables and files"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_module_that_can_not_serve_is_refused_before_anything_is_written(case: str, tmp_path: Path) -> None:
    module, said = REFUSED[case]
    with pytest.raises(BackboneError, match=said) as caught:
        featprobe.extract(Workspace(tmp_path), module, str(ROOT / "tests" / "golden" / "set"), options())
    assert "Nothing was computed" in str(caught.value) or "names tables" in str(caught.value)
    assert not list(tmp_path.rglob("*.h5"))


def test_tensors_that_no_hash_knows_are_refused() -> None:
    module = Net()
    module.stem.scale = torch.ones(1)  # type: ignore[assignment]
    assert "stem.scale: a tensor that is no parameter" in refused(lambda: loaded(module))

    class Extra(Net):
        def get_extra_state(self) -> object:
            return {"a": 1}

    assert "found   _extra_state: dict" in refused(lambda: loaded(Extra()))
    assert "found: the class Net: call it" in refused(lambda: featprobe.extract(Workspace(), Net, "xray"))  # type: ignore[arg-type]
    assert "found: int" in refused(lambda: featprobe.extract(Workspace(), 3, "xray"))  # type: ignore[arg-type]
    locked = Net()
    locked.guard = (_ for _ in ())  # type: ignore[assignment]
    assert "can't be copied" in refused(lambda: loaded(locked))


def test_a_network_that_gives_no_gradient_is_not_trained() -> None:
    backbone = loaded(giving(lambda self, x: [self.stem(x).detach()]))
    assert "no gradient for any parameter" in refused(backbone.unfreeze)


def test_a_frame_that_it_can_not_take_is_refused_by_its_size() -> None:
    backbone = loaded(giving(lambda self, x: [self.stem(x) + torch.zeros(1, 8, 16, 16)], size=(64, 64)))
    backbone.fit((64, 64))
    assert "such as its own, 64x64" in refused(lambda: backbone.fit((32, 32)))


def test_tensors_keep_their_names_wherever_the_face_is_saved() -> None:
    face = adapted(Net().eval(), "net")
    both = nn.ModuleList([face, nn.Linear(1, 1)])
    state = both.state_dict()
    assert "0.stem.0.weight" in state and not any(".module." in name for name in state)
    both.load_state_dict({name: torch.zeros_like(value) for name, value in state.items()})
    assert not face.module.state_dict()["stem.0.weight"].any()


# ---- extract, probe, finetune, predict with an object ----------------------------------------------------------------


def test_an_object_goes_from_images_to_predictions(place: Path) -> None:
    workspace, module = Workspace(place), Net()
    before = weights_sha256(module)
    report = featprobe.extract(workspace, module, "xray", ExtractOptions(quiet=True))
    cache = open_cache(report.path)
    assert cache.recipe.backbone == f"module:{__name__}.Net" and cache.recipe.weights_sha256 == before
    assert featprobe.extract(workspace, Net(), "xray", ExtractOptions(quiet=True)).computed == 0
    label = cache.recipe.label
    (frozen,) = featprobe.probe(workspace, "semseg", ["xray"], module, QUICK).rows
    (full,) = featprobe.finetune(workspace, "semseg", ["xray"], [module], QUICK).rows
    assert frozen["backbone"] == full["backbone"] == label and weights_sha256(module) == before
    images = [place / "data" / "xray" / "images"]
    for row in (frozen, full):
        folder = workspace.probes / row["folder"]
        said = refused(lambda folder=folder: featprobe.predict(folder, images, place / "none", quiet=True))  # type: ignore[misc]
        assert "was given as an object: it must be given again" in said and f"{__name__}.Net" in said
        assert not (place / "none").exists()
        found = featprobe.predict(folder, images, place / "found", backbone=module, quiet=True)
        assert found.images == 12
        predictor, raw = featprobe.Predictor(folder, backbone=module, device="cpu"), Raw("uint16", 1, (64, 64))
        said_in_file = described(predictor, raw, output_of(predictor, raw))
        assert said_in_file["weights_licence"] == "not stated by the module"
        said = refused(lambda folder=folder: featprobe.predict(folder, images, place / "none", backbone=nn.ReLU()))  # type: ignore[misc]
        assert f"wanted  module:{__name__}.Net\n  found   module:torch.nn.modules.activation.ReLU" in said
    other = workspace.probes / frozen["folder"]
    assert "weights_sha256" in refused(
        lambda: featprobe.predict(other, images, place / "n", backbone=Net(1)), ProbeError
    )
    tuned = workspace.probes / full["folder"]  # its own weights lie beside it: those of the object do not matter
    assert featprobe.predict(tuned, images, place / "found", backbone=Net(1), quiet=True).images == 12
    longer = replace(QUICK, recipe=TrainRecipe(iterations=2))
    said = refused(lambda: featprobe.finetune(workspace, "semseg", ["xray"], [label], longer))
    assert "it must be given again" in said
    tuning = Tuning(layer_decay=0.9)
    said = refused(
        lambda: featprobe.finetune(workspace, "semseg", ["xray"], [module], ProbeOptions(seeds=1, tuning=tuning))
    )
    assert "no learning rate can decay by layer" in said
    said = refused(lambda: workspace.backbone(f"module:{__name__}.Net"))
    assert "given as an object" in said and "extract(workspace, module, data)" in said


def test_a_class_whose_code_has_changed_does_not_take_the_cache_of_the_old_one(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    make_generated("xray", tmp_path / "data" / "xray", images=6, size=(64, 64))
    changed = giving(lambda self, x: [m * 1.5 for m in maps(self, x)])
    type(changed).__module__, type(changed).__qualname__ = Net.__module__, Net.__qualname__
    for dtype, store in (("fp16", "maps"), ("bf16", "maps"), ("int8", "maps"), ("fp16", "pooled")):
        how = ExtractOptions(quiet=True, dtype=dtype, store=store)  # type: ignore[arg-type]
        path = featprobe.extract(workspace, Net(), "xray", how).path
        kept = path.read_bytes()
        assert featprobe.extract(workspace, Net(), "xray", how).computed == 0
        said = refused(lambda how=how: featprobe.extract(workspace, changed, "xray", how), CacheError)  # type: ignore[misc]
        assert "holds other features than" in said and "50% off" in said and path.read_bytes() == kept
    cache = open_cache(path)
    first, second = (Path(cache.data.root) / own.image for own in cache.rows[:2])
    first.write_bytes(second.read_bytes())  # another image: the next one tells
    said = refused(lambda: featprobe.extract(workspace, changed, "xray", how), CacheError)
    assert "holds other features than" in said and path.read_bytes() == kept


def test_two_objects_of_one_name_are_refused() -> None:
    with pytest.raises(BackboneError, match="Several of these modules are called small"), at_hand([Small(), Small(1)]):
        pass


def test_an_unfinished_cache_of_an_object_is_left_aside_where_it_is_not_given(tmp_path: Path) -> None:
    workspace, said = Workspace(tmp_path), list[str]()
    make_generated("xray", tmp_path / "data" / "xray", images=8, size=(64, 64))
    featprobe.extract(workspace, Net(), "xray", ExtractOptions(quiet=True, shard=(1, 2), batch_size=2))
    with pytest.raises(FeatprobeError):
        featprobe.probe(workspace, "semseg", ["xray"], options=QUICK, say=said.append, extract=True)
    assert any("was made with a module that was given as an object" in line for line in said)
    (row,) = featprobe.probe(workspace, "semseg", ["xray"], Net(), QUICK, extract=True).rows
    assert row["model"].endswith(".Net")


# ---- of another package ----------------------------------------------------------------------------------------------

PACKAGE = """
import torch
from torch import nn

class Small(nn.Module):
    mean, std, licence = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "MIT"

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 8, 4, 4)

    def forward(self, images):
        return [self.conv(images).relu()]

def fails(): raise OSError("no licence")
def number(): return 3
shared = Small()
"""
ENTRIES = {
    "featprobe.backbones": ("small-net = ournets:Small", "resnet50 = ournets:Small", "fails = ournets:fails",
                            "number = ournets:number", "shared = ournets:shared", "gone = ournets:gone"),
}  # fmt: skip


def install(site: Path, module: str, code: str, entries: dict[str, tuple[str, ...]]) -> Path:
    """A package as an installer lays it down: a module, and what its metadata names."""
    about = site / f"{module}-1.0.dist-info"
    about.mkdir(parents=True)
    (site / f"{module}.py").write_text(code)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    groups = ("\n".join([f"[{group}]", *names]) for group, names in entries.items())
    (about / "entry_points.txt").write_text("\n".join(groups) + "\n")
    return site


def run(site: Path | None, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, where the packages of a folder are installed."""
    path = os.pathsep.join([*([str(site)] if site else []), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return forked.run(["-m", "featprobe", *words], env={**os.environ, "PYTHONPATH": path}, cwd=folder)


def test_a_backbone_of_another_package_works_by_its_name_in_every_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = install(tmp_path / "site", "ournets", PACKAGE, ENTRIES)
    make_generated("xray", tmp_path / "data" / "xray", images=12, size=(64, 64))
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as installed:
        installed.syspath_prepend(site)
        Path("study.toml").write_text(
            'data = ["xray"]\nbackbones = ["small-net"]\nseeds = 1\nshow = 0\n'
            "[train.all]\niterations = 2\nbatch_size = 4\n"
        )
        rows = featprobe.run_study(Workspace(), "study.toml").report.rows
    assert {row["regime"] for row in rows} == {"frozen", "full"}
    assert {row["model"] for row in rows} == {"package:small-net (ournets.Small)"}
    full = Path("probes") / next(row["folder"] for row in rows if row["regime"] == "full")
    done = run(site, tmp_path, "predict", str(full), "data/xray/images", "--out", "found", "--quiet")
    assert done.returncode == 0 and len(list(Path("found/masks").iterdir())) == 12, done.stderr
    said = refused(lambda: featprobe.predict(full, [Path("data/xray/images")], Path("none")))
    assert "The backbone small-net is not installed here" in said and not Path("none").exists()


def test_packages_that_are_broken_or_clash_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Path
) -> None:
    monkeypatch.syspath_prepend(install(tmp_path / "site", "ournets", PACKAGE, ENTRIES))
    workspace = Workspace(place)
    assert load_backbone(workspace.backbone("small-net")).licence == "MIT"
    assert workspace.backbone("resnet50").model.startswith("resnet50.")  # featprobe's own name comes first
    said = {name: refused(lambda name=name: load_backbone(workspace.backbone(name))) for name in  # type: ignore[misc]
            ("fails", "number", "shared", "gone")}  # fmt: skip
    start = "The backbone {} of the package ournets "
    assert (
        said["fails"].startswith(start.format("fails") + "can't be built.") and "OSError: no licence" in said["fails"]
    )
    assert said["number"].startswith(start.format("number") + "is no module.") and "found   a int" in said["number"]
    assert "found   a module, which all would share" in said["shared"]
    assert said["gone"].startswith(start.format("gone") + "can't be loaded.") and "AttributeError" in said["gone"]
    assert "Did you mean small-net" in refused(lambda: workspace.backbone("smal-net"))
    result = CliRunner().invoke(cli, ["--workspace", str(place), "backbones"])
    assert "small-net" in result.stdout and "see the package ournets" in result.stdout
    assert "resnet50 of the package ournets is not used" in result.stderr
    monkeypatch.syspath_prepend(
        install(tmp_path / "more", "others", PACKAGE, {"featprobe.backbones": ("small-net = others:Small",)})
    )
    assert "is named by several packages: others and ournets" in refused(
        lambda: load_backbone(workspace.backbone("small-net"))
    )


def test_own_weights_of_a_packages_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(install(tmp_path / "site", "ournets", PACKAGE, ENTRIES))
    workspace = Workspace(tmp_path)
    plain = load_backbone(workspace.backbone("small-net"))
    other = {name: value + 1 for name, value in plain.tensors().items()}
    torch.save(other, tmp_path / "ours.pth")
    found = load_backbone(workspace.backbone("small-net", weights=str(tmp_path / "ours.pth")))
    assert found.spec.label == "small-net-ours" and torch.equal(found.tensors()["conv.bias"], other["conv.bias"])
    torch.save({"conv.bias": other["conv.bias"]}, tmp_path / "part.pth")
    assert "missing (1 of 2)" in refused(
        lambda: load_backbone(workspace.backbone("small-net", str(tmp_path / "part.pth")))
    )
