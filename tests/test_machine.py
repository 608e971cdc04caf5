"""What this machine has."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from featprobe.machine import available_memory, lacks_accelerator, usable_cores


@pytest.fixture
def many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is bound to eight cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)


def granting(folder: Path, text: str) -> Path:
    """A folder of control groups that grants so much."""
    folder.mkdir(exist_ok=True)
    (folder / "cpu.max").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000\n", 8), ("200000 100000\n", 2), ("150000 100000\n", 2), ("10000 100000\n", 1), ("a b c\n", 8)],
)
def test_the_quota_of_a_container_counts(many_cores: None, tmp_path: Path, quota: str, cores: int) -> None:
    assert usable_cores(granting(tmp_path / "cgroup", quota)) == cores


def test_cores_are_those_of_the_affinity_where_no_quota_is(many_cores: None, tmp_path: Path) -> None:
    assert usable_cores(tmp_path / "absent") == 8


def test_no_more_cores_than_there_are(tmp_path: Path) -> None:
    assert 1 <= usable_cores(granting(tmp_path / "cgroup", "6400000 100000")) <= (os.cpu_count() or 1)


# Memory


def limiting(folder: Path, files: dict[str, object]) -> None:
    """A control group with these files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(f"{text}\n")


@pytest.mark.parametrize(
    ("limit", "used", "left"),
    [(2**30, 2**28, 2**30 - 2**28 + 300), (2**28, 2**29, 0), ("max", 2**28, None), (2**30, "torn", None)],
)
def test_the_memory_that_a_container_has_left_counts_with_pages_of_files_as_free(
    tmp_path: Path, limit: object, used: object, left: int | None
) -> None:
    stat = "anon 77\nfile 400\ninactive_file 200\nactive_file 100\nfile_mapped 5"
    limiting(tmp_path / "two", {"memory.max": limit, "memory.current": used, "memory.stat": stat})
    old = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used}
    stat = "inactive_file 9\ntotal_active_file 100\ntotal_inactive_file 200"
    limiting(tmp_path / "one" / "memory", {**old, "memory.stat": stat})
    free = available_memory(tmp_path / "absent")
    for group in (tmp_path / "one", tmp_path / "two"):
        assert available_memory(group) == pytest.approx(free if left is None else left, rel=0.1 if left is None else 0)


def test_memory_is_what_the_machine_has_left_where_nothing_limits_it(tmp_path: Path) -> None:
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < available_memory(tmp_path / "absent") <= whole


LIMITED = """
import resource, sys
from featprobe.machine import available_memory
kind = getattr(resource, sys.argv[1])
resource.setrlimit(kind, (2**30, resource.RLIM_INFINITY))
before = available_memory()
held = bytearray(2**28)
print(before, available_memory())
"""


@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_the_limits_of_a_process_count_less_what_it_has_taken(kind: str) -> None:
    command = [sys.executable, "-c", LIMITED, kind]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    before, after = map(int, done.stdout.split())
    assert 2**29 < before < 2**30 and before - after == pytest.approx(2**28, rel=0.05)


PAGES = """
import resource, sys
from featprobe.cli import main
try:
    main(["--version"])
except SystemExit:
    import torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.empty(2**26, dtype=torch.uint8).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(code: str, **environment: str) -> int:
    """The number that a process prints last. environment: its variables, beside those that say nothing of memory."""
    own = {"THP_MEM_ALLOC_ENABLE", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"}
    here = {name: value for name, value in os.environ.items() if name not in own}
    here |= {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=here)
    return int(done.stdout.split()[-1])


def test_commands_take_large_pages_unless_the_environment_says_otherwise() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[madvise]" not in setting.read_text():
        pytest.skip("needs transparent_hugepage at madvise")
    assert 8 * faults(PAGES) < faults(PAGES, THP_MEM_ALLOC_ENABLE="0")


KEPT = """
import resource
from featprobe.cli import main
try:
    main(["--version"])
except SystemExit:
    import numpy as np
def step():
    for held in [np.ones(2 << 20) for _ in range(4)]:  # 64 MiB in blocks of 16
        del held
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_commands_keep_the_memory_that_they_free_unless_the_environment_says_otherwise() -> None:
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("needs glibc")
    assert 8 * faults(KEPT) < faults(KEPT, MALLOC_TRIM_THRESHOLD_=str(1 << 17))


@pytest.mark.parametrize("file", ["nvidiactl", "nvidia0", "nvhost-gpu", "nvmap", "kfd", "dxg", ""])
def test_only_a_linux_without_any_file_of_a_gpu_surely_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    for name in ("null", "nvme0", "nvram", "kmsg", *filter(None, [file])):
        (tmp_path / name).touch()
    monkeypatch.setattr(sys, "platform", "linux")
    assert lacks_accelerator(tmp_path) is (file == "")
    assert not lacks_accelerator(tmp_path / "nowhere")
    for other in ("darwin", "win32"):
        monkeypatch.setattr(sys, "platform", other)
        assert not lacks_accelerator(tmp_path)
