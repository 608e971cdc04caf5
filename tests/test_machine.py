"""What this machine has."""

import os
from pathlib import Path

import pytest

from featprobe.machine import usable_cores


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
