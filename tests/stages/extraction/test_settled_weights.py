"""An extraction with nothing to do loads no network where the files of its weights lie as they lay, and none else."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import write_set
from safetensors.torch import save_file
from torch import nn

from featprobe.backbones import weight_files
from featprobe.backbones.backbone import load_backbone
from featprobe.backbones.given import at_hand
from featprobe.errors import BackboneError
from featprobe.specs import BackboneSpec
from featprobe.stages.extraction import extract as door
from featprobe.stages.extraction import make_cache, settled
from featprobe.stages.extraction.extract import extract
from featprobe.stages.extraction.extract_options import ExtractOptions
from featprobe.stages.extraction.run_log import ExtractReport
from featprobe.stages.extraction.settled import look_path
from featprobe.stages.workspace import Workspace

MODEL = "test_efficientnet"
OPTIONS = ExtractOptions(size=(32, 32), levels=("stride8",), device="cpu", workers=1, quiet=True)
CODE = """
import sys
from featprobe.stages.extraction import settled
settled.RACY_SECONDS = 0.0  # files that were written just now count as old
from featprobe.cli.main import cli
cli(sys.argv[1:], standalone_mode=False)
print(sorted(sys.modules))
"""


@pytest.fixture(autouse=True)
def as_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without timm at first; files that were written just now count as old."""
    monkeypatch.setattr(weight_files, "sys", SimpleNamespace(modules={}))
    monkeypatch.setattr(settled, "RACY_SECONDS", 0.0)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[BackboneSpec]:
    """A list that fills with the backbones that are loaded."""
    found: list[BackboneSpec] = []

    def noting(spec: BackboneSpec, *others: Any) -> Any:
        found.append(spec)
        return load_backbone(spec, *others)

    monkeypatch.setattr(make_cache, "load_backbone", noting)
    return found


def write_weights(path: Path, seed: int) -> None:
    save_file(load_backbone(BackboneSpec("a", MODEL, "random", seed=seed)).tensors(), path)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    write_weights(tmp_path / "own.safetensors", 0)
    return tmp_path / "own.safetensors"


@pytest.fixture
def run(tmp_path: Path, weights: Path) -> Callable[..., ExtractReport]:
    data = write_set(tmp_path / "set", 3, (32, 32))

    def call(backbone: Any = None, **changed: Any) -> ExtractReport:
        time.sleep(0.01)  # a tick of the file system's clock
        space = Workspace(tmp_path / "workspace")
        spec = space.backbone(MODEL, str(weights)) if backbone is None else backbone
        return extract(space, spec, str(data), replace(OPTIONS, **changed))

    return call


def test_a_complete_cache_is_known_without_a_network(run, loads):
    first = run()
    assert len(loads) == 1
    for again in (run(), run(workers=2, batch_size=3)):
        same = replace(again, computed=3, seconds={}, bytes_written=first.bytes_written, by_times=False)
        assert (same, again.by_times) == (replace(first, seconds={}), True)
    assert len(loads) == 1
    assert not run(rehash=True).by_times and len(loads) == 2


def test_it_loads_neither_torch_nor_timm_nor_any_large_package(run, tmp_path, weights):
    path = run().path
    words = ["--workspace", tmp_path / "workspace", "extract", "--backbone", MODEL, "--weights", weights, "--data",
             tmp_path / "set", "--size", "32x32", "--levels", "stride8", "--device", "cpu"]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", CODE, *words], capture_output=True, text=True, timeout=120, check=True)
    *said, loaded = done.stdout.splitlines()
    assert said[-1] == (
        f"{path}: complete (3 images); nothing to do: files have the sizes and times of last time (--rehash reads them)"
    )
    heavy = "torch torchvision timm huggingface_hub h5py scipy pandas pyarrow matplotlib pydantic".split()
    assert [name for name in heavy if f"'{name}'" in loaded] == []
    assert "'featprobe.cache.contents'" in loaded


def replaced(path: Path) -> None:
    """By another file of the same size and time of modification."""
    status = path.stat()
    write_weights(path.with_suffix(".new"), 1)
    path.with_suffix(".new").replace(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size


def overwritten(path: Path) -> None:
    """In place, with the same size and time of modification."""
    status = path.stat()
    write_weights(path.with_suffix(".new"), 1)
    path.write_bytes(path.with_suffix(".new").read_bytes())
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_ino) == (status.st_size, status.st_ino)


def link_turned(path: Path) -> None:
    """The name becomes a link to other weights."""
    write_weights(path.with_name("other.safetensors"), 1)
    path.unlink()
    path.symlink_to("other.safetensors")


@pytest.mark.parametrize("change", [replaced, overwritten, link_turned], ids=lambda change: change.__name__)
def test_other_weights_make_another_cache(run, weights, loads, change):
    first = run()
    change(weights)
    other = run()
    assert (other.by_times, other.computed) == (False, 3) and other.path != first.path
    assert run().path == other.path and len(loads) == 2


def touched(weights: Path, code: Path) -> None:
    os.utime(weights)


def copied(weights: Path, code: Path) -> None:
    content = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(content)


def code_written(weights: Path, code: Path) -> None:
    """timm of the same version, installed again from its sources."""
    (code / "models" / "net.py").write_text("# other")


def code_added(weights: Path, code: Path) -> None:
    (code / "models" / "new.py").touch()


@pytest.mark.parametrize("change", [touched, copied, code_written, code_added], ids=lambda change: change.__name__)
def test_where_files_changed_the_network_is_loaded_and_asked_once(run, weights, loads, tmp_path, monkeypatch, change):
    (tmp_path / "timm" / "models").mkdir(parents=True)
    (tmp_path / "timm" / "models" / "net.py").touch()
    monkeypatch.setattr(weight_files, "timm_folder", lambda: tmp_path / "timm")
    run()
    change(weights, tmp_path / "timm")
    assert [(run().by_times, len(loads)) for _ in range(2)] == [(True, 2), (True, 2)]


@pytest.mark.parametrize("package", ["timm", "torch", "featprobe"])
def test_another_version_of_a_package_reads_all_again(run, loads, monkeypatch, package):
    run()
    if package == "featprobe":
        monkeypatch.setattr(settled, "__version__", "9.9")
    plain = settled.version
    monkeypatch.setattr(settled, "version", lambda name: "9.9" if name == package else plain(name))
    assert (run().by_times, len(loads)) == (False, 2)
    assert (run().by_times, len(loads)) == (True, 2)


@pytest.mark.parametrize("other", [{"levels": ("stride16",)}, {"precision": "fp32"}, {"dtype": "fp32"}, {"tile": 16}])
def test_another_request_reads_all_again(run, loads, other):
    run()
    assert (run(**other).by_times, len(loads)) == (False, 2)


def test_on_another_device_the_network_is_asked_once(run, loads, monkeypatch):
    first = run()
    monkeypatch.setattr(door, "_device", lambda name: "cuda:0")
    assert (run().by_times, len(loads)) == (False, 2)
    again = run()
    assert (again.by_times, again.device, again.path, len(loads)) == (True, "cuda:0", first.path, 2)


def test_torch_is_asked_for_the_device_unless_it_surely_is_the_cpu(monkeypatch):
    monkeypatch.setattr("featprobe.processes.pick_device", lambda name: f"torch's own {name}")
    for sure, unnamed in ((True, "cpu"), (False, "torch's own None")):
        monkeypatch.setattr(door, "lacks_accelerator", lambda sure=sure: sure)
        assert [door._device(name) for name in (None, "cpu", "cuda:1")] == [unnamed, "cpu", "torch's own cuda:1"]


def test_weights_that_are_others_only_while_they_are_read_are_not_known(run, weights, loads, monkeypatch):
    """A link that is turned to other weights, and back after the run, leads to a file that nobody has changed."""
    mine, other = (weights.with_name(f"{name}.safetensors") for name in ("mine", "other"))
    weights.rename(mine)
    write_weights(other, 1)
    weights.symlink_to(mine)
    counting = make_cache.load_backbone

    def turn(*arguments: Any) -> Any:
        weights.unlink()
        weights.symlink_to(other)
        return counting(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(make_cache, "load_backbone", turn)
        first = run()
    weights.unlink()
    weights.symlink_to(mine)
    again = run()
    assert (again.by_times, len(loads)) == (False, 2) and again.path != first.path


def test_weights_that_are_gone_are_named(run, weights):
    run()
    weights.unlink()
    with pytest.raises(BackboneError, match="There is no weights file"):
        run()


@pytest.mark.parametrize("changed", ["version", "weights", "identity_sha256"])
def test_what_is_kept_of_another_version_or_cache_is_ignored(run, loads, changed):
    look = look_path(run().path)
    said = json.loads(look.read_text())
    look.write_text(json.dumps(said | {changed: 1 if changed == "version" else "0" * 64}))
    run()
    assert len(loads) == 2 and json.loads(look.read_text()) == said
    run()
    assert len(loads) == 2


def test_a_damaged_cache_is_not_known(run, loads):
    path = run().path
    path.write_bytes(path.read_bytes().replace(b"part01", b"part91"))
    assert not run().by_times and len(loads) == 2


class Net(nn.Module):
    """A network of a user's own."""

    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 8, stride=8)

    def forward(self, images: Any) -> list[Any]:
        return [self.layer(images)]


def test_a_precision_that_needs_cuda_is_refused_before_anything_is_read(run, loads, monkeypatch):
    monkeypatch.setattr(make_cache, "read_set", lambda *_: pytest.fail("the set was read"))
    with pytest.raises(BackboneError, match="--precision amp needs a CUDA device; this is cpu"):
        run(precision="amp")
    assert loads == []


def test_networks_of_your_own_and_random_weights_are_asked_each_time(run, loads):
    net = Net()
    with at_hand([net]) as (name,):
        own = Workspace().backbone(name)
        for spec in (own, Workspace().backbone(MODEL, random_init=True)):
            loads.clear()
            path = run(spec).path
            assert [(run(spec).by_times, len(loads)) for _ in range(2)] == [(True, 2), (True, 3)]
            assert json.loads(look_path(path).read_text())["weights"] == ""


def test_a_process_that_has_loaded_timm_asks_the_network_and_keeps_nothing_of_its_files(run, loads, monkeypatch):
    """What loaded it may have changed it."""
    with monkeypatch.context() as patch:
        patch.setattr(weight_files, "sys", sys)
        run()
        run()
    assert len(loads) == 2
    assert [(run().by_times, len(loads)) for _ in range(2)] == [(True, 3), (True, 3)]
