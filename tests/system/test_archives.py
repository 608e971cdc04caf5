"""Workspaces that earlier states left (archives/): every later state reads them, and makes nothing in them anew."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archives.make import MADE, held_by, sums
from PIL import Image
from test_cli import call

from featprobe.cache import Cache, open_cache, verify
from featprobe.cache.store import Damage

pytestmark = pytest.mark.usefixtures("forked_hdf5")
ARCHIVES = Path(__file__).parents[1] / "archives"
SAME_PIXELS = 0.98  # of the predicted masks: versions of torch round otherwise


@pytest.fixture(params=sorted(MADE))
def archive(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of an archive, with its images."""
    space = tmp_path / request.param
    shutil.copytree(ARCHIVES / request.param, space)
    shutil.copytree(ARCHIVES / "set", space / "set")
    return space


def cache_of(space: Path) -> Path:
    (path,) = space.glob("cache/*/*.h5")
    return path


def head_of(space: Path) -> Path:
    (card,) = space.glob("probes/*/*/*/*/card.json")
    return card.parent


def state_of(space: Path) -> dict[str, tuple[int, str]]:
    """Time of modification and sum of every cache and every file of a head, and of the rows."""
    kept = [path for name in ("cache/*/*.h5", "probes/*/*/*/*/*", "probes/results.jsonl") for path in space.glob(name)]
    return {
        path.relative_to(space).as_posix(): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in kept
    }


def served_by(cache: Cache) -> dict[str, Any]:
    """What an open cache serves, as `expected.json` has it."""
    done = cache.done.tolist()
    rows = []
    for i, row in enumerate(cache.rows):
        kept = {level.name: cache.stored(i, level)[level.name] for level in cache.levels}
        assert done[i] != 1 or all((cache.read_row(i, level) == kept[level.name]).all() for level in cache.levels)
        features = {name: hashlib.sha256(own.tobytes()).hexdigest() for name, own in kept.items()}
        rows.append(
            {"id": row.id, "group": row.group, "split": row.split, "image": row.image, "image_hash": row.image_hash,
             "done": done[i], "features": features,
             **{kind: hashlib.sha256(getattr(row, kind)).hexdigest() for kind in ("semantic", "instances")}}
        )  # fmt: skip
    return {"rows": rows}


def test_the_archives_are_those_that_were_made() -> None:
    assert (ARCHIVES / "sums.txt").read_text() == sums(), (
        "an archive was changed, added or removed: see archives/README.md"
    )


def test_every_row_is_what_it_was(archive: Path) -> None:
    expected = json.loads((archive / "expected.json").read_text())
    path = cache_of(archive)
    assert held_by(path) == expected  # by h5py alone
    cache = open_cache(path)
    assert served_by(cache)["rows"] == expected["rows"]
    assert not [found for found in verify(path) if isinstance(found, Damage)]
    unreadable = [i for i, row in enumerate(expected["rows"]) if row["done"] == 2]
    assert unreadable == [len(cache) - 1] and "is truncated or damaged" in cache.reason(unreadable[0])


def test_a_cache_is_described_and_found_sound(archive: Path) -> None:
    (described,) = json.loads(call(archive, "cache", "info", "parts", "--json").stdout)
    rows = json.loads((archive / "expected.json").read_text())["rows"]
    assert described["intact"] and described["rows"] == len(rows) == described["whole"] + 1
    assert described["key"][:8] in cache_of(archive).name
    assert "sound" in call(archive, "cache", "verify").stdout
    assert "embedded" in call(archive, "cache", "ls").stdout


def test_an_extraction_computes_nothing(archive: Path) -> None:
    before = state_of(archive)
    commit, _, (extract, *_) = MADE[archive.name]
    report = json.loads(call(archive, *extract, "--json").stdout)
    assert (report["computed"], report["copied"], report["missing"]) == (0, 0, 0), commit
    assert state_of(archive) == before


def test_its_results_are_compared(archive: Path) -> None:
    head = json.loads((head_of(archive) / "card.json").read_text())
    (compared,) = json.loads(call(archive, "compare", "--json").stdout)["sets"]
    (line,) = compared["lines"]
    assert line["miou"] == pytest.approx(head["result"]["test"]["miou"], abs=1e-9) and line["miou"] > 0.5


def test_its_head_predicts_what_it_predicted(archive: Path, tmp_path: Path) -> None:
    call(archive, "predict", head_of(archive), archive / "set" / "images", "--out", tmp_path / "out", "--skip-bad")
    for known in sorted(archive.glob("predicted/masks/*.png")):
        then, now = (np.array(Image.open(path)) for path in (known, tmp_path / "out" / "masks" / known.name))
        assert then.shape == now.shape and (then == now).mean() > SAME_PIXELS, known.name


@pytest.mark.parametrize("name", [name for name, (_, views, _) in MADE.items() if views])
def test_a_study_is_there_already(name: str, tmp_path: Path) -> None:
    space = tmp_path / name
    shutil.copytree(ARCHIVES / name, space)
    shutil.copytree(ARCHIVES / "set", space / "set")
    before = state_of(space)
    result = call(space, "study", space / "study.toml")
    assert "1 training is there already" in result.output
    assert state_of(space) == before
