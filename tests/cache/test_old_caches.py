"""Caches of versions 1 and 2: read as they are, gone on with, and followed by a new file when the set changes."""

from pathlib import Path
from typing import Any

import pytest
from helpers import data_info, extract, filled_cache, opened, recipe_of, rows_of, stored, write_set
from old_caches import write_old

from featprobe.cache import CacheWriter, open_cache, verify
from featprobe.errors import CacheError
from featprobe.stages.training.probe import probe
from featprobe.stages.training.probe_options import ProbeOptions
from featprobe.stages.workspace import Workspace

pytestmark = pytest.mark.usefixtures("forked_hdf5")
IMAGES = 12


def as_old(path: Path) -> Path:
    """Make a cache's file one of version 1 or 2, with the same rows and features, and nothing else changed."""
    cache = open_cache(path)
    contents, states = cache.contents, cache.done
    images = list(cache.images) if cache.recipe.in_parts else []
    old = path.with_suffix(".old")
    write_old(old, cache.recipe, cache.data, list(cache.rows), contents.provenance, images)
    with CacheWriter(old) as writer:
        for row in (states == 1).nonzero()[0].tolist():
            kept = {k: v[None] for level in cache.levels for k, v in cache.stored(row, level).items()}
            writer.write(row, kept)
    old.replace(path)
    return path


# What the version before wrote of these very rows: cache/README.md promises that it is read for ever
IDENTITY_OF_VERSION_1 = "44148c6f5e0d70b19148c67d7a71db542aae4b5eff41444f7db7bcb127988abb"


def test_a_file_of_version_1_has_the_identity_it_had_and_reads_like_one_of_version_3(tmp_path: Path) -> None:
    new = filled_cache(tmp_path / "new.h5")
    old = open_cache(as_old(filled_cache(tmp_path / "old.h5").path))
    assert (old.contents.version, new.contents.version) == (1, 3)
    assert list(old.rows) == list(new.rows) and old.data == new.data and old.recipe == new.recipe
    assert stored(old.path) == stored(new.path) and old.contents.is_intact()
    assert old.contents.provenance == new.contents.provenance
    assert [found for found in verify(old.path) if not isinstance(found, int)] == []


def test_the_identity_of_version_1_is_what_it_was(tmp_path: Path) -> None:
    write_old(tmp_path / "old.h5", recipe_of(), data_info(), rows_of(4), {})
    assert open_cache(tmp_path / "old.h5").contents.identity_sha256 == IDENTITY_OF_VERSION_1


def test_damage_of_an_old_file_is_named_and_refused(tmp_path: Path) -> None:
    path = as_old(filled_cache(tmp_path / "old.h5").path)
    content = path.read_bytes()
    mask = opened(path).rows.unchecked(1).semantic
    path.write_bytes(content.replace(mask, mask[:-20] + bytes(20), 1))
    assert [found.part for found in verify(path) if not isinstance(found, int)] == ["targets"]
    with pytest.raises(CacheError, match=r"is damaged.*\(identity\)"):
        open_cache(path)
    path.write_bytes(content.replace(b"part3.png", b"part9.png"))
    with pytest.raises(CacheError, match=r"is damaged.*\(identity\)"):
        open_cache(path)


@pytest.mark.parametrize("how", [{}, {"tile": 24, "overlap": 8}])
def test_an_unfinished_old_file_is_completed_in_place(tmp_path: Path, how: dict[str, Any]) -> None:
    data = write_set(tmp_path / "set", IMAGES, (32, 40))
    whole = extract(tmp_path / "whole", data, **how)
    path = as_old(extract(tmp_path / "own", data, shard=(1, 2), **how).path)
    version, inode = opened(path).contents.version, path.stat().st_ino
    report = extract(tmp_path / "own", data, **how)
    assert version == (2 if how else 1) and opened(path).contents.version == version and path.stat().st_ino == inode
    assert 0 < report.computed < whole.rows and not report.copied and not report.missing
    assert stored(path) == stored(whole.path)
    assert extract(tmp_path / "own", data, **how).computed == 0


@pytest.mark.parametrize("how", [{}, {"tile": 24, "overlap": 8}])
def test_a_changed_set_makes_a_file_of_version_3_with_the_rows_of_the_old_one(
    tmp_path: Path, how: dict[str, Any]
) -> None:
    data = write_set(tmp_path / "set", IMAGES, (32, 40))
    path = as_old(extract(tmp_path / "own", data, **how).path)
    (data / "images" / "part02.png").write_bytes((data / "images" / "part01.png").read_bytes() + b"\0")
    report = extract(tmp_path / "own", data, **how)
    assert report.path == path and opened(path).contents.version == 3
    own = sum(row.image.endswith("part02.png") for row in opened(path).rows)
    assert (report.copied, report.computed) == (report.rows - own, own) and own >= 1
    assert stored(path) == stored(extract(tmp_path / "anew", data, **how).path)


def test_what_was_trained_from_an_old_file_is_that_of_a_new_one(tmp_path: Path) -> None:
    data = write_set(tmp_path / "set", 24, (32, 32))
    path = extract(tmp_path, data).path
    options = ProbeOptions(head="ridge", quiet=True, device="cpu")
    (new,) = probe(Workspace(tmp_path), options=options).rows
    as_old(path)
    (old,) = probe(Workspace(tmp_path), options=options).rows
    differ = {name for name in new if new[name] != old[name]}
    assert differ <= {"time", "seconds"}
    assert new["feature_key"] == opened(path).recipe.key and opened(path).contents.version == 1
