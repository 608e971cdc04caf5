"""Some seconds of what `make attack` does in full: mutated caches of every version."""

import json
from pathlib import Path

import pytest
from forked import run

FUZZ = Path(__file__).parents[2] / "benchmarks" / "attack" / "cache_fuzz.py"
SEED = 15


@pytest.mark.parametrize(("version", "seconds", "least"), [(1, 4, 1), (2, 4, 1), (3, 7, 10)])
def test_mutated_caches_harm_nobody(version: int, seconds: int, least: int) -> None:
    words = ["--version", str(version), "--seconds", str(seconds), "--seed", str(SEED)]
    done = run([FUZZ, *words], timeout=300)
    assert done.stderr == ""
    result = json.loads(done.stdout)
    assert result["examples"] == {} and result["bad"] == done.returncode == 0
    assert result["trials"] >= least
