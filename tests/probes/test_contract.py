"""Heads of your own: what is registered, what a package names, what the contract finds, and saved heads of them."""

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import featprobe
from featprobe import FeatureLevel, HeadKind, HeadRecipe, ProbeOptions, TrainRecipe, Workspace, check_head
from featprobe import kinds as kinds_module
from featprobe.cli.main import cli
from featprobe.errors import ProbeError
from featprobe.features import Features
from featprobe.kinds import KINDS, SOLVED_ONCE, head_names, kind_of, kinds_of, loaded_kinds, register_head
from featprobe.probes.head import DenseHead, over_padding
from featprobe.probes.heads import build_head
from featprobe.probes.saved import read_results
from featprobe.specs import BackboneSpec
from featprobe.stages.study.study import Study
from featprobe.stages.study.study_file import faults_of
from featprobe.stages.workspace import make_generated

ROOT = Path(__file__).parents[2]
LEVELS = (FeatureLevel("stride4", 5, 4), FeatureLevel("stride8", 7, 8))
RECIPE = TrainRecipe(iterations=3, batch_size=4, loss_at="level")


@pytest.fixture(autouse=True)
def only_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is forgotten after it."""
    kinds, builders = dict(kinds_module._kinds), dict(kinds_module._builders)
    yield
    for own, was in ((kinds_module._kinds, kinds), (kinds_module._builders, builders)):
        own.clear()  # type: ignore[attr-defined]
        own.update(was)  # type: ignore[attr-defined, arg-type]


class Line(DenseHead):
    """A 1x1 convolution on the finest level."""

    def __init__(self, levels: Sequence[FeatureLevel], classes: int, width: int | None = None) -> None:
        super().__init__()
        self.levels, self.classes, self.width = tuple(levels[:1]), classes, width
        self.conv = nn.Conv2d(levels[0].channels, classes, 1)
        self.bias = self.conv.bias  # type: ignore[assignment]

    @property
    def stride(self) -> int:
        return self.levels[0].stride

    def forward(self, features: Features) -> Tensor:
        maps = features.maps[self.levels[0].name].to(self.conv.weight.dtype)
        return over_padding(self.conv(maps), features.content, self.stride)


def line(levels: Sequence[FeatureLevel], recipe: HeadRecipe) -> Line:
    return Line(levels, len(recipe.classes), recipe.width)


def like(**own: Any) -> Any:
    """A builder of heads like Line with other methods and attributes."""
    kind = type("Line", (Line,), own)
    return lambda levels, recipe: kind(levels, len(recipe.classes), recipe.width)


def registered(build: Any, name: str = "line", **more: Any) -> None:
    register_head(HeadKind("semseg", name, RECIPE, **more), build)


# ---- registering -----------------------------------------------------------------------------------------------------


def test_a_registered_head_is_a_kind_like_others() -> None:
    registered(line, width=24)
    registered(line, width=32)  # the cell of a notebook is run again
    assert kinds_of("semseg") == ["linear", "upsample", "ridge", "line"] and "line" in head_names()
    assert KINDS["semseg", "line"].width == 32 and kind_of("semseg", "line") in loaded_kinds("semseg")
    head: Any = build_head(HeadRecipe("semseg", "line", ("background", "a")), LEVELS)
    assert head.width == 32 and isinstance(head, Line)
    head = build_head(HeadRecipe("semseg", "line", ("background", "a"), ("stride8",), 5), LEVELS)
    assert head.width == 5 and head.levels == LEVELS[1:]
    check_head("semseg", "line")
    assert not faults_of(Study, {"data": ["x"], "backbones": ["y"], "heads": ["line"], "train": {"line": {"lr": 0.1}}})
    assert faults_of(Study, {"data": ["x"], "backbones": ["y"], "heads": ["lime"]})


@pytest.mark.parametrize(
    ("kind", "build", "said"),
    [
        (3, line, "kind: wanted a HeadKind, found 3"),
        (HeadKind("semseg", "x", RECIPE), 3, "build: wanted a function of levels and a HeadRecipe, found 3"),
        (HeadKind("semsg", "x", RECIPE), line, "task: there is none called 'semsg'. Did you mean semseg"),
        (HeadKind("semseg", "linear", RECIPE), line, "name: featprobe has a semseg head linear"),
        (HeadKind("semseg", "two-layer", RECIPE), line, "name: wanted a lower-case identifier"),
        (HeadKind("semseg", "all", RECIPE), line, "name: wanted a lower-case identifier"),
        (HeadKind("semseg", "x", SOLVED_ONCE, solved=True), line, "solved: heads of semseg are trained"),
        (HeadKind("detect", "x", RECIPE, pooled=True), line, "pooled: heads of detect read maps"),
        (HeadKind("classify", "x", RECIPE), line, "pooled: heads of classify read pooled features"),
        (HeadKind("anomaly", "x", RECIPE), line, "solved, live: heads of anomaly are fitted to good images"),
        (HeadKind("semseg", "x", RECIPE, pyramid=True), line, "pyramid: a head on a pyramid needs the width of it"),
    ],
)
def test_what_can_not_be_registered_is_refused_with_all_its_faults(kind: Any, build: Any, said: str) -> None:
    before = dict(KINDS)
    with pytest.raises(ProbeError, match=re.escape(said)):
        register_head(kind, build)
    assert dict(KINDS) == before


def test_another_head_of_a_registered_name_is_refused() -> None:
    registered(line)
    with pytest.raises(ProbeError, match=r"test_contract\.line was registered as the semseg head line"):
        registered(like())


# ---- the contract ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "name"), [kind for kind in KINDS if kind[1] not in ("upsample", "fasterrcnn", "maskrcnn")]
)
def test_featprobes_own_heads_keep_the_contract(task: str, name: str) -> None:
    """The others take many seconds; tests/probes/test_heads.py holds all of them to more."""
    check_head(task, name)


def off_by_one(self: Line, features: Features) -> Tensor:
    return Line.forward(self, features)[:, :, 1:]


def sees_padding(self: Line, features: Features) -> Tensor:
    return Line.forward(self, features) + features.maps[self.levels[0].name].float().mean()


def keeps_a_secret(self: Line, features: Features) -> Tensor:
    if not hasattr(self, "secret"):
        self.secret = torch.rand(())
    return Line.forward(self, features) + self.secret


def stops_gradients(self: Line, features: Features) -> Tensor:
    return Line.forward(self, features).detach() + self.bias[:, None, None]


def looks_at_a_value(self: Line, features: Features) -> Tensor:
    logits = Line.forward(self, features)
    return logits if logits.detach().max().item() < 1e9 else logits * 0


BROKEN = {
    "waiting": (like(forward=looks_at_a_value), "a step would wait for a GPU: no .item(), no bool of a tensor"),
    "shape": (like(forward=off_by_one), "wanted finite logits (2, 3, 16, 24), float32"),
    "padding": (like(forward=sees_padding), "what lies in the padding changes its logits"),
    "saved": (like(forward=keeps_a_secret), "loaded from what was saved of it, it finds something else"),
    "gradient": (like(forward=stops_gradients), "no gradient reaches conv.weight"),
    "error": (like(forward=lambda self, features: 1 / 0), "logits: ZeroDivisionError: division by zero"),
    "start_at": (like(start_at=lambda self, prior: None), "start_at changes nothing"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_the_contract_finds_what_a_head_does_not_keep(case: str) -> None:
    build, said = BROKEN[case]
    registered(build)
    with pytest.raises(ProbeError, match=re.escape(said)) as caught:
        check_head("semseg", "line")
    assert str(caught.value).startswith("The semseg head line does not keep the contract of heads.")


def with_another_bias(levels: Sequence[FeatureLevel], recipe: HeadRecipe) -> Line:
    head = line(levels, recipe)
    head.bias = nn.Parameter(torch.zeros(3))
    return head


NO_HEAD: dict[str, tuple[Any, str]] = {
    "another class": (
        lambda levels, recipe: nn.Linear(1, 1), "wanted a featprobe.probes.head.DenseHead, found a Linear",
    ),
    "nothing": (lambda levels: None, "can't be built. Nothing was computed.\n  wanted  a head from the levels stri"),
    "levels": (lambda levels, recipe: Line([FeatureLevel("a", 5, 4)], 2), "levels: wanted a tuple of some of those"),
    "classes": (lambda levels, recipe: Line(levels, 3), "classes: wanted 2, the background counted; found 3"),
    "stride": (like(stride=3), "stride: wanted the stride of one of its levels, or a divisor of one; found 3"),
    "bias": (with_another_bias, "bias: wanted a parameter of shape (2,), or a method start_at; found one of shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_HEAD)
def test_a_builder_that_gives_no_head_is_refused_before_anything_is_computed(case: str) -> None:
    build, said = NO_HEAD[case]
    registered(build)
    with pytest.raises(ProbeError, match=re.escape(said)):
        build_head(HeadRecipe("semseg", "line", ("background", "a")), LEVELS)


# ---- saved heads -----------------------------------------------------------------------------------------------------


def test_a_saved_head_loads_again_once_it_is_registered(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    make_generated("xray", tmp_path / "data" / "xray", images=12, size=(64, 64))
    spec = BackboneSpec("tiny", "test_convnext.r160_in1k", "random")
    featprobe.extract(workspace, spec, "xray", featprobe.ExtractOptions(quiet=True))
    registered(line)
    how = ProbeOptions(head="line", seeds=1, quiet=True)
    (row,) = featprobe.probe(workspace, "semseg", ["xray"], options=how).rows
    folder = workspace.probes / row["folder"]
    head, _ = featprobe.load_head(folder)
    assert isinstance(head, Line)
    del kinds_module._builders["semseg", "line"], kinds_module._kinds["semseg", "line"]  # type: ignore[attr-defined]
    with pytest.raises(ProbeError) as caught:
        featprobe.load_head(folder)
    said = str(caught.value)
    assert said.startswith(
        f"{folder} holds a head that is not known here. Nothing was computed.\n  wanted  one of linear"
    )
    assert "register_head(HeadKind('semseg', 'line', …), build)" in said and "entry point semseg-line" in said
    found, faults = read_results(workspace.probes / "results.jsonl")
    assert not found and 'one of your own, registered or installed, found "line"; it was skipped' in faults[0]
    registered(line)
    assert isinstance(featprobe.load_head(folder)[0], Line)
    assert len(read_results(workspace.probes / "results.jsonl")[0]) == 1


# ---- heads of other packages -----------------------------------------------------------------------------------------

PACKAGE = """
import torch
from test_contract import Line, line
from featprobe import HeadKind, TrainRecipe

def build(levels, recipe):
    return Line(levels, len(recipe.classes))

HEAD = HeadKind("semseg", "packed", TrainRecipe(iterations=3, batch_size=4)), build

class Object:
    kind = HeadKind("semseg", "object", TrainRecipe())
    build = staticmethod(build)

class Empty: pass
"""
ENTRIES = {"packed": "HEAD", "object": "Object", "other": "HEAD", "empty": "Empty", "gone": "gone", "ridge": "HEAD"}
NO_NAMES = ("nothing", "semseg-", "semseg-my-head", "semseg-all", "semseg-class", "semseg-Mine", "other-mine")
"""Entry points that name no head of a task, and spoil nothing."""


def install(site: Path) -> Path:
    """A package as an installer lays it down: a module, and what its metadata names."""
    about, names = site / "ourheads-1.0.dist-info", [f"semseg-{name} = ourheads:{own}" for name, own in ENTRIES.items()]
    about.mkdir(parents=True)
    (site / "ourheads.py").write_text(PACKAGE)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: ourheads\nVersion: 1.0\n")
    names += [f"{name} = ourheads:HEAD" for name in NO_NAMES]
    (about / "entry_points.txt").write_text("\n".join(["[featprobe.heads]", *names]) + "\n")
    return site


def test_a_packages_heads_are_known_by_name_and_loaded_when_they_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(install(tmp_path))
    assert kinds_of("semseg") == ["linear", "upsample", "ridge", "empty", "gone", "object", "other", "packed"]
    assert "ourheads" not in sys.modules and ("semseg", "packed") not in KINDS
    assert not faults_of(
        Study, {"data": ["a"], "backbones": ["b"], "heads": ["packed"], "train": {"packed": {"lr": 0.1}}}
    )
    assert "packed" in head_names() and kinds_of("detect") == ["fcos", "fasterrcnn"]
    assert kind_of("semseg", "ridge").solved  # featprobe's own name comes first
    assert kind_of("semseg", "packed").recipe.iterations == 3 and kind_of("semseg", "object").recipe.iterations == 1000
    check_head("semseg", "packed")
    broken = {
        "other": "a semseg head packed, under the name of a semseg head other",
        "empty": "kind: wanted a HeadKind, found None",
        "gone": "can't be loaded",
    }
    for name, said in broken.items():
        with pytest.raises(ProbeError, match=f"The head semseg-{name} of the package ourheads") as caught:
            kind_of("semseg", name)
        assert said in str(caught.value)
    with pytest.raises(ProbeError, match="name: an installed package has a semseg head packed"):
        registered(line, "packed")


def test_the_command_knows_a_packages_head_without_loading_it(tmp_path: Path) -> None:
    """In a process of its own, in which its module can't be imported at all."""
    site = install(tmp_path / "site")
    (site / "ourheads.py").write_text("raise SystemExit('imported')")
    code = (
        "import sys; from click.testing import CliRunner; from featprobe.cli.main import cli\n"
        "done = CliRunner().invoke(cli, ['probe', '--head', 'packd', '--task', 'semseg'])\n"
        "helped = CliRunner().invoke(cli, ['probe', '--help'])\n"
        "print(done.exit_code, done.output, 'torch' in sys.modules); print(helped.output)"
    )
    path = os.pathsep.join([str(site), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True,
                          env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path)  # fmt: skip
    said = " ".join(done.stdout.split())
    assert "Did you mean packed?" in said and "False" in said.partition("Usage")[0]
    assert "semseg: linear, upsample, ridge, empty, gone, object, other, packed; detect" in said


def test_a_packages_head_is_trained_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(install(tmp_path / "site"))
    monkeypatch.chdir(tmp_path)
    make_generated("xray", tmp_path / "data" / "xray", images=12, size=(64, 64))
    spec = BackboneSpec("tiny", "test_convnext.r160_in1k", "random")
    featprobe.extract(Workspace(), spec, "xray", featprobe.ExtractOptions(quiet=True))
    done = CliRunner().invoke(cli, ["probe", "--task", "semseg", "--head", "packed", "--seeds", "1"])
    assert done.exit_code == 0 and " packed " in done.stdout, done.output
    for own in (kinds_module._kinds, kinds_module._builders):
        del own["semseg", "packed"]  # type: ignore[attr-defined]
    (tmp_path / "site" / "ourheads.py").write_text("raise OSError('no licence')")
    monkeypatch.delitem(sys.modules, "ourheads")
    importlib.invalidate_caches()
    rows, faults = read_results(Path("probes") / "results.jsonl")
    assert not rows and "The head semseg-packed of the package ourheads can't be loaded." in faults[0]
