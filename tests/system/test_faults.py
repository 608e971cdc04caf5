"""Damage and refusing disks: what is bad is named, what was whole stays whole, and mending gives the same bits."""

import errno
import itertools
import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers import extract, flip_byte, opened, row_bytes, spy_on_writes, stored, write_set

from featprobe.cache import WHOLE, CacheWriter, Damage, damaged_rows, open_cache, verify
from featprobe.cache import writer as writer_module
from featprobe.errors import CacheBusyError, CacheError, ShapeError
from featprobe.levels import FeatureLevel
from featprobe.stages.upkeep.caches import verify_cache

ROWS = 6
WRITES = 10  # at least: 3 blocks of stride4, stride8 and checksum, then `done`


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_set(tmp_path / "set", ROWS, (32, 40))


@pytest.fixture
def path(data: Path, tmp_path: Path) -> Path:
    """A complete cache."""
    return extract(tmp_path, data).path


def damages(path: Path) -> list[Damage]:
    return [found for found in verify(path) if isinstance(found, Damage)]


def offset_of(path: Path, name: str, row: int) -> int:
    extent = opened(path).contents.extents[name]
    return extent.offset + row * extent.row_bytes


def byte_of_text(path: Path, text: str) -> int:
    return path.read_bytes().index(text.encode())


def byte_of_target(path: Path, row: int) -> int:
    with h5py.File(path, "r") as file:
        return file["targets/semantic"].id.get_offset() + int(file["targets/semantic_offset"][row]) + 30


# Damage is named


def test_a_sound_file_has_no_damage_and_every_byte_is_read(path):
    found = list(verify(path))
    assert sum(found) == sum(rows.nbytes for rows in row_bytes(opened(path)).values())


@pytest.mark.parametrize("level", ["stride4", "stride8"])
@pytest.mark.parametrize("row", [0, 3, 5])
@pytest.mark.parametrize("place", ["first", "last"])
def test_a_flipped_bit_of_a_feature_is_named_by_row_and_level(path, level, row, place):
    extent = opened(path).contents.extents[f"features/{level}"]
    flip_byte(path, offset_of(path, f"features/{level}", row) + (0 if place == "first" else extent.row_bytes - 1))
    assert damages(path) == [Damage(row, f"part0{row}.png", f"features/{level}")]


def test_a_flipped_bit_of_a_checksum_is_named_too(path):
    flip_byte(path, offset_of(path, "checksum", 2) + 8)  # of the second level
    assert damages(path) == [Damage(2, "part02.png", "features/stride8")]


def test_a_flipped_bit_of_a_target_is_named_and_the_row_refused(path):
    flip_byte(path, byte_of_target(path, 4))
    assert damages(path) == [Damage(4, "part04.png", "targets")]
    cache = open_cache(path)
    for used in (cache.semantic, cache.rows.__getitem__):
        with pytest.raises(CacheError, match=r"labels of row 4, part04\.png, are damaged"):
            used(4)
        used(3)


@pytest.mark.parametrize("what", ["id", "image_hash", "split"])
def test_a_flipped_bit_of_a_rows_fields_is_named(path, what):
    flip_byte(path, byte_of_text(path, getattr(opened(path).rows[1], what)))
    (found,) = damages(path)
    assert found.part.startswith("identity")
    with pytest.raises(CacheError, match="is damaged"):
        open_cache(path)


def test_several_damages_are_all_named(path):
    for row, level in ((1, "stride4"), (1, "stride8"), (4, "stride8")):
        flip_byte(path, offset_of(path, f"features/{level}", row))
    flip_byte(path, byte_of_target(path, 2))
    found = damages(path)
    assert {(d.row, d.part) for d in found} == {
        (1, "features/stride4"), (1, "features/stride8"), (4, "features/stride8"), (2, "targets"),
    }  # fmt: skip
    assert damaged_rows(found) == [1, 4]


@pytest.mark.parametrize("state", [3, 0x81, 255])
def test_a_state_that_no_writer_writes_counts_as_missing(path, data, tmp_path, state):
    before = stored(path)
    with path.open("r+b") as stream:
        stream.seek(offset_of(path, "done", 3))
        stream.write(bytes([state]))
    assert opened(path).done.tolist() == [1, 1, 1, 0, 1, 1]
    assert extract(tmp_path, data).computed == 1
    assert stored(path) == before


# Damage is mended


def test_damaged_features_are_mended_exactly_and_no_other_row_is_written(path, data, tmp_path, monkeypatch):
    before = path.read_bytes()
    for row, level in ((1, "stride4"), (4, "stride8")):
        flip_byte(path, offset_of(path, f"features/{level}", row) + 5)
    with CacheWriter(path) as writer:
        for row in damaged_rows(damages(path)):
            writer.mark_missing(row)
    written = spy_on_writes(monkeypatch)
    assert extract(tmp_path, data).computed == 2
    assert written == [1, 4]
    assert path.read_bytes() == before
    assert damages(path) == []


def test_damaged_targets_are_mended_by_extract_with_every_row_copied(path, data, tmp_path, monkeypatch):
    before, mask = stored(path), open_cache(path).semantic(4)
    flip_byte(path, byte_of_target(path, 4))
    written = spy_on_writes(monkeypatch)
    report = extract(tmp_path, data)
    assert (report.copied, report.computed, written) == (ROWS, 0, list(range(ROWS)))
    assert stored(path) == before and damages(path) == []
    np.testing.assert_array_equal(open_cache(path).semantic(4), mask)


def test_a_rebuild_copies_sound_rows_and_computes_damaged_ones(path, data, tmp_path):
    before = stored(path)
    flip_byte(path, byte_of_target(path, 4))
    flip_byte(path, offset_of(path, "features/stride8", 2) + 7)
    report = extract(tmp_path, data)
    assert (report.copied, report.computed) == (ROWS - 1, 1)
    assert stored(path) == before and damages(path) == []


@pytest.mark.parametrize("what", ["id", "split", "image_hash"])
def test_a_damaged_identity_is_mended_by_extract_that_copies_nothing_by_it(path, data, tmp_path, what):
    before, rows = stored(path), list(open_cache(path).rows)
    flip_byte(path, byte_of_text(path, getattr(rows[1], what)))
    report = extract(tmp_path, data)
    assert (report.copied, report.computed) == (0, ROWS)
    assert stored(path) == before and list(open_cache(path).rows) == rows


def test_a_file_that_does_not_open_is_left_alone_and_a_way_out_named(path, data, tmp_path):
    os.truncate(path, 5000)
    with pytest.raises(CacheError, match="not a feature cache that can be opened") as caught:
        extract(tmp_path, data)
    assert "featprobe cache rm" in str(caught.value)
    assert path.stat().st_size == 5000


# The disk refuses


class Disk:
    """Stands in for positioned writes: the n-th, from 0, writes half of what it is given, the next are refused."""

    def __init__(self, refused: int, error: int = errno.ENOSPC) -> None:
        self.refused, self.error, self.calls = refused, error, itertools.count(1)
        self.write = writer_module.write_some

    def __call__(self, handle: int, data: memoryview, offset: int) -> int:
        call = next(self.calls)
        if call <= self.refused:
            return self.write(handle, data, offset)
        if call == self.refused + 1 and len(data) > 1:
            return self.write(handle, data[: len(data) // 2], offset)
        raise OSError(self.error, os.strerror(self.error))


def assert_whole_rows_are_right(path: Path, expected: Path) -> int:
    """Compare the rows that say they are whole; returns how many they are."""
    cache, other = opened(path), opened(expected)
    whole = cache.done == WHOLE
    for name, rows in row_bytes(cache).items():
        np.testing.assert_array_equal(rows[whole], row_bytes(other)[name][whole])
    np.testing.assert_array_equal(cache.stored_checksums()[whole], other.stored_checksums()[whole])
    return int(whole.sum())


@pytest.mark.parametrize("n", range(WRITES))
def test_a_full_disk_at_any_write_leaves_whole_rows_whole_and_the_rest_to_do(path, data, tmp_path, monkeypatch, n):
    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "write_some", Disk(n))
        with pytest.raises(CacheError, match="No space left on device") as caught:
            extract(tmp_path / "full", data)
    assert "Rows that were whole stay whole" in str(caught.value)
    (half,) = (tmp_path / "full").rglob("*.h5")
    assert assert_whole_rows_are_right(half, path) < ROWS
    assert extract(tmp_path / "full", data).missing == 0
    assert stored(half) == stored(path)


def test_a_disk_that_does_not_sync_never_has_its_rows_called_whole(path, data, tmp_path, monkeypatch):
    def refuse(handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "sync", refuse)
        with pytest.raises(CacheError, match="Input/output error"):
            extract(tmp_path / "bad", data)
    (half,) = (tmp_path / "bad").rglob("*.h5")
    assert not opened(half).done.any()
    extract(tmp_path / "bad", data)
    assert stored(half) == stored(path)


def test_writes_of_one_byte_each_still_complete_the_file(path, data, tmp_path, monkeypatch):
    write, calls = writer_module.write_some, []

    def one_byte(handle: int, data: memoryview, offset: int) -> int:
        calls.append(offset)
        return write(handle, data[:1], offset)

    monkeypatch.setattr(writer_module, "write_some", one_byte)
    other = extract(tmp_path / "slow", data).path
    assert len(calls) == sum(len(part) for part in stored(path).values())
    assert stored(other) == stored(path)


def test_writing_without_pwritev_gives_the_same_file(path, data, tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "write_some", writer_module._seek_and_write)
    assert stored(extract(tmp_path / "other", data).path) == stored(path)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_cannot_hold_a_new_file_leaves_nothing_behind(data, tmp_path, monkeypatch, error):
    def refuse(*_: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(CacheError, match=r"(?s)can't be made.*of free disk.*Nothing was changed"):
        extract(tmp_path, data)
    assert not list(tmp_path.rglob("*.h5")) and not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("n", [0, 2, 5, 7])
def test_a_full_disk_while_a_changed_set_is_rebuilt_keeps_the_old_file(path, data, tmp_path, monkeypatch, n):
    before = path.read_bytes()
    for folder in ("images", "masks"):  # leaves a gap: two runs of rows are copied, 8 writes
        (data / folder / "part03.png").rename(data / folder / "part09.png")
    (data / "images" / "part02.png").write_bytes((data / "images" / "part01.png").read_bytes() + b"\0")
    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "write_some", Disk(n))
        with pytest.raises(CacheError, match="No space left"):
            extract(tmp_path, data)
    assert path.read_bytes() == before
    assert not list(path.parent.glob(".*.tmp"))
    assert extract(tmp_path, data).copied == ROWS - 1
    assert stored(path) == stored(extract(tmp_path / "anew", data).path)


def test_every_level_is_checked_on_its_own(path):
    flip_byte(path, offset_of(path, "features/stride4", 0))
    cache = open_cache(path)  # the damage is not in its identity
    sound = FeatureLevel("stride8", 9, 8)
    assert sound in cache.levels
    assert {found.part for found in damages(path)} == {"features/stride4"}


def address_of(path: Path, name: str) -> int:
    """Where the last digit of a table's offset stands in the header."""
    said = f'"{name}":{{"offset":{opened(path).contents.extents[name].offset}'.encode()
    content = path.read_bytes()
    assert content.count(said) == 1
    return content.index(said) + len(said) - 1


def test_a_flipped_address_of_a_level_is_found_and_answered_by_a_new_file(path, data, tmp_path):
    whole = stored(path)
    flip_byte(path, address_of(path, "features/stride4"))
    with pytest.raises(CacheError, match=r"damaged.*\(header\)"):
        open_cache(path)
    assert extract(tmp_path, data).missing == 0
    assert stored(path) == whole
    assert damages(path) == []


def test_verify_writes_nothing_into_a_file_whose_addresses_are_damaged(path):
    flip_byte(path, address_of(path, "features/stride4"))
    before = path.read_bytes()
    assert {found.part for found in verify_cache(path, quiet=True)} > {"features/stride4"}
    assert path.read_bytes() == before


def test_damage_is_reported_where_its_rows_can_not_be_marked(path, monkeypatch):
    def busy(self):
        raise CacheBusyError("another process has it")

    flip_byte(path, offset_of(path, "features/stride4", 2))
    before, said = path.read_bytes(), []
    monkeypatch.setattr(writer_module.RowLocks, "claim_all", busy)
    assert [found.row for found in verify_cache(path, quiet=True, say=said.append)] == [2]
    assert len(said) == 1 and "not marked" in said[0] and "another process has it" in said[0]
    assert path.read_bytes() == before


def test_no_row_is_marked_of_a_file_that_replaced_the_one_verified(path, monkeypatch):
    def replacing(self):
        shutil.copy(path, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    flip_byte(path, offset_of(path, "features/stride4", 2))
    said = []
    monkeypatch.setattr(writer_module.RowLocks, "claim_all", replacing)
    assert [found.row for found in verify_cache(path, quiet=True, say=said.append)] == [2]
    assert "was replaced" in said[0] and (opened(path).done == WHOLE).all()


@pytest.mark.parametrize("row", [-1, ROWS])
def test_a_row_that_a_cache_has_not_is_never_written(path, row):
    before = path.read_bytes()
    with CacheWriter(path) as writer, pytest.raises(ShapeError, match=f"{ROWS} rows"):
        writer.mark_missing(row)
    assert path.read_bytes() == before
