"""In which precision features are made: settled with the file, followed by whoever goes on, and what is in doubt."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers import CPU, PoolingBackbone, change_provenance, extract, opened, options, write_set

from featprobe.backbones.precision import computing, resolve
from featprobe.cache import MISSING, CacheWriter, RowLocks
from featprobe.cli.main import cli
from featprobe.errors import BackboneError, CacheError
from featprobe.stages.extraction import job as jobs
from featprobe.stages.extraction.run_log import tf32_doubt
from featprobe.stages.upkeep.caches import describe_cache
from featprobe.stages.workspace import Workspace

CUDA = torch.device("cuda")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_set(tmp_path / "set", 6)
    return tmp_path / "set"


def info(root: Path, path: Path) -> str:
    return (
        CliRunner().invoke(cli, ["--workspace", str(root), "cache", "info", str(path)], catch_exceptions=False).output
    )


def set_missing(path: Path, row: int) -> None:
    with RowLocks(path) as locks, CacheWriter(path) as writer:
        locks.claim_all()
        writer.mark_missing(row)


def as_amp(path: Path, monkeypatch: pytest.MonkeyPatch, data: Path, root: Path) -> Path:
    """The file that a machine with CUDA would have made: the same, but that its recipe says amp."""
    with monkeypatch.context() as patched:
        patched.setattr("featprobe.stages.extraction.cache_precision.resolve", lambda asked, device: "amp")
        patched.setattr(jobs, "resolve", lambda asked, device: "amp")
        return extract(root, data).path


def as_older(path: Path, *runs: tuple[str, int]) -> None:
    """Make a file one of a version that kept no device; runs: device and rows of each that came to its end."""
    change_provenance(path, lambda said: {k: v for k, v in said.items() if k not in ("device", "tf32")})
    lines = [json.dumps({"device": device, "computed": rows}) + "\n" for device, rows in runs]
    path.with_suffix(".runs.jsonl").write_text("".join(lines))


def test_what_auto_means_follows_from_the_device() -> None:
    assert [resolve("auto", device) for device in ("cuda", "cpu", "mps")] == ["amp", "fp32", "fp32"]
    assert [resolve(kind, "cuda") for kind in ("fp32", "tf32", "amp", "bf16")] == ["fp32", "tf32", "amp", "bf16"]
    for kind in ("tf32", "amp"):
        with pytest.raises(BackboneError, match=f"--precision {kind} needs a CUDA device; this is cpu"):
            resolve(kind, "cpu")


@pytest.mark.parametrize("before", [True, False])
def test_tf32_is_allowed_only_where_it_is_asked_for_and_then_as_it_was(before: bool) -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    usual = matmul.allow_tf32, cudnn.allow_tf32
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = before
        for kind, allowed in (("fp32", False), ("tf32", True)):
            with pytest.raises(ZeroDivisionError), computing(kind, CUDA):
                assert (matmul.allow_tf32, cudnn.allow_tf32) == (allowed, allowed)
                raise ZeroDivisionError
            assert (matmul.allow_tf32, cudnn.allow_tf32) == (before, before)
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = usual


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="this torch has one setting for TF32")
def test_tf32_is_what_is_asked_for_beside_the_settings_of_new_versions_of_torch() -> None:
    """Beside these torch does not say what the old settings are, and what those forbid a general one allows."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", NEW_SETTINGS], check=True)


NEW_SETTINGS = """
import torch
from featprobe.backbones.precision import computing
matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
kinds = [matmul, cudnn.conv, cudnn.rnn]
allowed = lambda: [kind.fp32_precision == "tf32" for kind in kinds]
for own in (torch.backends, matmul, cudnn.conv):
    for value in ("tf32", "ieee"):
        own.fp32_precision = value
        before = allowed()
        for precision in ("fp32", "tf32", "amp"):
            with computing(precision, torch.device("cuda")):
                assert allowed() == [precision != "fp32"] * 3, (own, value, precision)
            assert allowed() == before and own.fp32_precision == value, (own, value, precision)
"""


def test_threads_that_compute_in_float32_never_get_tf32_from_others() -> None:
    cudnn = torch.backends.cudnn
    before, first, second = cudnn.allow_tf32, computing("fp32", CUDA), computing("tf32", CUDA)
    first.__enter__()
    second.__enter__()  # as another thread does, whose context ends later
    assert not cudnn.allow_tf32
    first.__exit__(None, None, None)
    assert cudnn.allow_tf32
    second.__exit__(None, None, None)
    assert cudnn.allow_tf32 == before


def test_only_bf16_leaves_float32_on_a_cpu() -> None:
    for kind, dtype in (
        ("fp32", torch.float32),
        ("tf32", torch.float32),
        ("amp", torch.float32),
        ("bf16", torch.bfloat16),
    ):
        with computing(kind, CPU):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_auto_on_a_cpu_makes_the_file_that_fp32_makes(data: Path, tmp_path: Path) -> None:
    path = extract(tmp_path, data).path
    assert opened(path).recipe.precision == "fp32"
    assert extract(tmp_path, data, precision="fp32").path == path
    assert "--precision" not in opened(path).contents.command
    assert opened(path).contents.provenance["device"] == "cpu" and not opened(path).contents.provenance["tf32"]


def test_a_complete_cache_of_either_precision_is_taken_and_the_unfinished_one_is_named(data, tmp_path, monkeypatch):
    fast = as_amp(tmp_path, monkeypatch, data, tmp_path)
    assert opened(fast).recipe.precision == "amp" and "--precision amp" in opened(fast).contents.command
    report = extract(tmp_path, data)
    assert (report.path, report.computed, report.missing) == (fast, 0, 0)
    exact = extract(tmp_path, data, precision="fp32").path
    assert exact != fast and extract(tmp_path, data).path == exact  # both complete: what the device would choose
    set_missing(exact, 3)
    report = extract(tmp_path, data)
    assert (report.path, report.missing) == (fast, 0)
    assert report.notes[-1] == f"{exact} is not complete; --precision fp32 goes on with it"
    assert extract(tmp_path, data, precision="fp32").computed == 1


def test_an_unfinished_cache_that_needs_cuda_is_not_gone_on_with_elsewhere(data, tmp_path, monkeypatch):
    fast = as_amp(tmp_path, monkeypatch, data, tmp_path)
    set_missing(fast, 0)
    with pytest.raises(BackboneError) as caught:
        extract(tmp_path, data)
    assert str(fast) in str(caught.value) and "--precision fp32" in str(caught.value) and "amp" in str(caught.value)
    assert opened(fast).done[0] == MISSING
    assert extract(tmp_path, data, precision="fp32").missing == 0


def test_a_cache_of_cuda_that_is_complete_of_the_set_as_it_was_is_not_called_unfinished(data, tmp_path, monkeypatch):
    fast = as_amp(tmp_path, monkeypatch, data, tmp_path)
    write_set(data, 7)
    with pytest.raises(BackboneError) as caught:
        extract(tmp_path, data)
    assert "in the precision amp, and holds the data set as it was before it changed." in str(caught.value)
    assert "not complete" not in str(caught.value)
    extract(tmp_path, data, precision="fp32")
    goes_on = f"{fast} holds the data set as it was before it changed; --precision amp goes on with it"
    assert extract(tmp_path, data).notes[-1] == goes_on


def test_what_was_begun_is_gone_on_with_whatever_the_device_would_choose(data, tmp_path, monkeypatch):
    path = extract(tmp_path, data, shard=(1, 2)).path
    monkeypatch.setattr("featprobe.stages.extraction.cache_precision.resolve", lambda asked, device: "amp")
    job = jobs.prepare(Workspace(tmp_path), PoolingBackbone(), Workspace(tmp_path).data_set(str(data)), options(), CPU)
    assert (job.path, job.recipe.precision) == (path, "fp32")


@pytest.mark.parametrize(
    ("runs", "cuda_here", "refused"),
    [
        ([("cuda", 6)], False, True),
        ([("cpu", 3), ("cuda:1", 3)], False, True),
        ([("cpu", 6)], True, False),
        ([], True, True),  # killed before it could tell
        ([], False, False),
    ],
)
def test_an_unfinished_fp32_cache_that_may_hold_tf32_is_refused(data, tmp_path, monkeypatch, runs, cuda_here, refused):
    path = extract(tmp_path, data).path
    as_older(path, *runs)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda_here)
    assert extract(tmp_path, data).computed == 0  # complete: it is taken as it is
    assert bool(tf32_doubt(path)) == (runs != [("cpu", 6)])
    set_missing(path, 5)
    before = path.read_bytes()
    if not refused:
        assert extract(tmp_path, data).computed == 1
        return
    with pytest.raises(CacheError) as caught:
        extract(tmp_path, data)
    assert f"featprobe cache rm {path} --yes && featprobe extract" in str(caught.value)
    assert path.read_bytes() == before


def test_a_doubt_stays_with_rows_that_are_copied_where_no_card_is(data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = extract(tmp_path, data).path
    as_older(path, ("cpu", 4))  # of six rows: two are in doubt
    for name in ("part00.png", "part01.png"):
        for folder in ("images", "masks"):
            (data / folder / name).unlink()
    assert extract(tmp_path, data).copied == 4
    assert tf32_doubt(path) is not None and "2 rows" in tf32_doubt(path).text


def test_rows_that_may_hold_tf32_are_not_copied_into_the_cache_of_a_changed_set(data, tmp_path):
    path = extract(tmp_path, data).path
    as_older(path, ("cuda", 6))
    for folder in ("images", "masks"):
        (data / folder / "part00.png").unlink()
    with pytest.raises(CacheError, match="TF32"):
        extract(tmp_path, data)


def test_cache_info_says_what_may_hold_tf32(data, tmp_path):
    path = extract(tmp_path, data).path
    assert describe_cache(path)["may_hold_tf32"] == ""
    assert re.search(r"^precision  +fp32$", info(tmp_path, path), re.M)
    as_older(path, ("cuda", 4), ("cpu", 2))
    shown = info(tmp_path, path)
    assert "fp32; may hold TF32: 4 rows computed on CUDA by featprobe" in shown
    as_older(path)
    assert "6 rows that no run recorded" in info(tmp_path, path)
