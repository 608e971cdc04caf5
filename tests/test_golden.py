"""What trainings and caches are called, and what is written of them, is what golden files say (golden/README.md)."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from golden.make_golden import (
    CONFIGURATIONS,
    HERE,
    OLD,
    SPACES,
    STUDIES,
    archived,
    compared,
    done,
    extracted,
    make_space,
    restored,
    text_of,
    trained,
)

ROUNDING = 1e-9  # of figures that are computed again


@pytest.fixture(scope="module")
def spaces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A workspace with each of the caches."""
    folder = tmp_path_factory.mktemp("golden")
    return {name: make_space(folder / name, name) for name in SPACES}


def held_against(name: str, found: Any) -> None:
    """Fail with the lines that differ from a golden file's; the order of keys counts."""
    golden = (HERE / name).read_text(encoding="utf-8")
    assert text_of(found).splitlines() == golden.splitlines(), f"golden/{name} says otherwise: see golden/README.md"


@pytest.mark.parametrize("name", SPACES)
def test_a_cache_is_called_and_described_as_ever(name: str, spaces: dict[str, Path]) -> None:
    held_against(f"cache-{name}.json", extracted(spaces[name]))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_training_is_called_and_kept_as_ever(name: str, spaces: dict[str, Path], tmp_path: Path) -> None:
    base, commands = CONFIGURATIONS[name]
    space = shutil.copytree(spaces[base], tmp_path / name)
    held_against(f"{name}.json", trained(space, commands))
    ladders = (space / "probes" / "ladders.jsonl").read_text()
    assert ladders == (HERE / "ladders.jsonl").read_text(), "the ladder of earlier is another one now: it climbed again"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stored workspace."""
    return restored(tmp_path_factory.mktemp("golden") / "stored")


@pytest.mark.parametrize("name", STUDIES)
def test_stored_results_are_the_trainings_of_their_studies(name: str, stored: Path) -> None:
    rows = (stored / "probes" / "results.jsonl").read_text()
    assert (stored / f"{name}.toml").read_text() == STUDIES[name]
    said = json.loads(done(stored, "study", f"{name}.toml", "--json").stdout)
    assert said["cells"] == said["done"] > 0 and not said["trained"] and not said["failed"]
    assert (stored / "probes" / "results.jsonl").read_text() == rows


def test_stored_results_compare_as_ever(stored: Path, tmp_path: Path) -> None:
    space = shutil.copytree(stored, tmp_path / "stored")  # whose cards go
    same(compared(space), json.loads((HERE / "compare.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", OLD)
def test_archived_results_compare_as_ever(name: str, tmp_path: Path) -> None:
    golden = (HERE / f"compare-{name}.json").read_text(encoding="utf-8")
    same(compared(archived(name, tmp_path / name)), json.loads(golden))


def same(found: Any, wanted: Any, place: str = "") -> None:
    """Fail where two JSON values differ in structure, in the order of keys, or in numbers by more than ROUNDING."""
    if isinstance(wanted, dict):
        assert isinstance(found, dict) and list(found) == list(wanted), place
        for name in wanted:
            same(found[name], wanted[name], f"{place}/{name}")
    elif isinstance(wanted, list):
        assert isinstance(found, list) and len(found) == len(wanted), place
        for i, (own, other) in enumerate(zip(found, wanted, strict=True)):
            same(own, other, f"{place}/{i}")
    else:
        assert found == (pytest.approx(wanted, abs=ROUNDING) if isinstance(wanted, float) else wanted), place
