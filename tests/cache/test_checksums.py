"""Features are hashed when a process first reads them: nothing is trained on damage, and what is sound costs once."""

import errno
import gc
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from helpers import data_info, filled_cache, flip_byte, make_cache, opened, random_maps, recipe_of, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from old_caches import write_old

from featprobe.cache import Cache, CacheWriter, store
from featprobe.cache.reader import FeatureLoader
from featprobe.cache.row_reader import RowReader, _direct_works
from featprobe.cli.main import cli
from featprobe.errors import CacheError, CacheIncompleteError, DataError
from featprobe.kinds import KINDS
from featprobe.probes.saved import read_card, read_rows
from featprobe.stages.extraction.extract import extract
from featprobe.stages.extraction.extract_options import ExtractOptions
from featprobe.stages.study.grid import run_grid
from featprobe.stages.study.study import read_study
from featprobe.stages.training.probe import probe
from featprobe.stages.training.probe_options import ProbeOptions
from featprobe.stages.workspace import Workspace, make_generated

ROWS = 12
MODES = ("memmap", "preadv", "direct")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """A complete cache of two levels, which nothing has read."""
    return filled_cache(tmp_path / "cache.h5", rows=rows_of(ROWS))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Counter[bytes]:
    """How often each row's level has been hashed, by its bytes."""
    counted: Counter[bytes] = Counter()
    own = store.checksum

    def counting(kept: Sequence[NDArray]) -> int:
        counted[b"".join(part.tobytes() for part in kept)] += 1
        return own(kept)

    monkeypatch.setattr(store, "checksum", counting)
    return counted


def loader_of(cache: Cache, mode: str, *, staged: bool = False, verify: bool = True) -> FeatureLoader:
    """A loader; staged: that copies as for a GPU, with several reading threads."""
    if mode == "direct" and not _direct_works(cache):
        pytest.skip("this file system has no O_DIRECT")
    loader = FeatureLoader(cache, mode=mode, verify=verify)
    if staged:
        loader.staged, loader.reader = True, RowReader(cache, mode=mode, threads=3, verify=verify)
    return loader


def read(loader: FeatureLoader, *orders: list[int]) -> None:
    """Take all batches, and let go of the file."""
    with loader:
        for _ in loader.batches([np.array(order) for order in orders]):
            pass


def epochs(count: int) -> list[list[int]]:
    """Batches of three rows, every row once in an epoch, in other orders."""
    random = np.random.default_rng(5)
    orders = [random.permutation(ROWS) for _ in range(count)]
    return [order[i : i + 3].tolist() for order in orders for i in range(0, ROWS, 3)]


def place(path: Path, name: str, row: int) -> int:
    extent = opened(path).contents.extents[name]
    return extent.offset + row * extent.row_bytes


def overwrite(path: Path, name: str, row: int, data: bytes | None = None) -> None:
    """Write bytes at a row's place in a table, zeros unless they are given."""
    with path.open("r+b") as stream:
        stream.seek(place(path, name, row))
        stream.write(data or bytes(opened(path).contents.extents[name].row_bytes))


# One file is not taken for another


def in_place(path: Path, other: Path, damaged: str) -> None:
    """Give a file the bytes of another cache, the first byte of a level changed: the number of the file stays."""
    flip_byte(other, place(other, f"features/{damaged}", 0))
    path.write_bytes(other.read_bytes())


def test_a_file_with_the_number_of_a_closed_one_is_checked(cache: Cache, tmp_path: Path) -> None:
    cache.features("stride4")
    cache.close()
    in_place(cache.path, filled_cache(tmp_path / "other.h5", rows=rows_of(ROWS)).path, "stride4")
    with pytest.raises(CacheError, match="is damaged"):
        opened(cache.path).features("stride4")
    with pytest.raises(CacheError, match="was closed"):
        cache.check(np.array([0]), cache.levels[0], np.zeros((1, 1), np.uint8))


def test_another_cache_with_the_number_of_an_open_one_is_checked(cache: Cache, tmp_path: Path) -> None:
    cache.features("stride4")
    rows = [replace(row, id=f"other{row.id}") for row in rows_of(ROWS)]
    in_place(cache.path, filled_cache(tmp_path / "other.h5", rows=rows).path, "stride4")
    with pytest.raises(CacheError, match="is damaged"):
        opened(cache.path).features("stride4")


# What the disk does not give


@pytest.fixture
def bad_sector(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """The cache, where row 3 of the first level can't be read."""
    own, bad = os.pread, place(cache.path, "features/stride4", 3)

    def read(handle: int, count: int, offset: int) -> bytes:
        if offset <= bad < offset + count:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return own(handle, count, offset)

    monkeypatch.setattr(os, "pread", read)
    return cache


def test_a_row_that_the_disk_does_not_give_is_an_error_of_the_cache(bad_sector: Cache) -> None:
    with pytest.raises(CacheError, match=r"can't be read at byte \d+: Input/output error"):
        bad_sector.read_row(3, bad_sector.levels[0])


def test_verify_names_a_row_that_the_disk_does_not_give_and_marks_it(bad_sector: Cache) -> None:
    result = CliRunner().invoke(cli, ["cache", "verify", str(bad_sector.path)])
    assert result.exit_code == 3
    assert "row 3 part3.png: features/stride4, which the disk does not give" in result.stdout
    assert "row 3 is now marked as missing" in result.stdout


# Files are closed


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_reader_that_can_t_begin_leaves_no_file_open(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(threads: int, name: str) -> None:
        raise RuntimeError("can't start new thread")

    gc.collect()
    whole, before = cache.path.stat().st_size, descriptors()
    os.truncate(cache.path, whole // 2)
    for mode in ("memmap", "preadv"):
        with pytest.raises(CacheError, match="cut short"):
            RowReader(cache, mode=mode)
    gc.collect()
    assert descriptors() == before
    os.truncate(cache.path, whole)
    monkeypatch.setattr("featprobe.cache.row_reader.ThreadPoolExecutor", refused)
    for _ in range(2):
        with pytest.raises((RuntimeError, TypeError)):
            RowReader(cache, mode="preadv", threads=2)
    gc.collect()
    assert descriptors() == before


def test_a_reader_that_was_closed_reads_no_other_file(cache: Cache) -> None:
    reader = RowReader(cache, mode="preadv", verify=False)
    reader.close()
    reader.close()
    out = {name: np.zeros((1, own.row_bytes), np.uint8) for name, own in reader.buffers(cache.levels[0]).items()}
    with pytest.raises(CacheError, match="was closed"):
        reader.read(np.array([0]), out)


@pytest.mark.parametrize("error", [OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), ValueError("mmap length")])
def test_a_map_that_the_system_refuses_is_an_error_of_the_cache(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refused(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(np, "memmap", refused)
    with pytest.raises(CacheError, match="can't be mapped into memory"):
        RowReader(cache, mode="memmap")
    with pytest.raises(CacheError, match="can't be mapped into memory"):
        cache.features("stride4")


# Damage is found before it is used


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("level", ["stride4", "stride8"])
def test_a_flipped_bit_ends_the_reading_with_the_rows_name(cache: Cache, mode: str, level: str, staged: bool) -> None:
    flip_byte(cache.path, place(cache.path, f"features/{level}", 8) - 1)  # the last byte of row 7
    seen = []
    with loader_of(cache, mode, staged=staged) as loader, pytest.raises(CacheError) as caught:
        for rows, _ in loader.batches([np.array([i]) for i in range(ROWS)]):
            seen += rows.tolist()
    assert seen == list(range(7)), "rows before it are served, it is not"
    text = str(caught.value)
    assert "row 7, 'part7.png'" in text and level in text and str(cache.path) in text
    assert f"featprobe cache verify {cache.path}\n  {cache.contents.command}" in text


@pytest.mark.parametrize("mode", MODES)
def test_rows_of_zeros_that_say_they_are_whole_are_not_served(cache: Cache, mode: str) -> None:
    for name in ("features/stride4", "features/stride8", "checksum"):
        overwrite(cache.path, name, 3)
    assert cache.done[3] == 1 and not cache.stored_checksums()[3].any()
    with pytest.raises(CacheError, match=r"row 3, 'part3.png'"):
        read(loader_of(cache, mode), [1, 3])


def test_a_flipped_bit_of_a_checksum_is_damage_too(cache: Cache) -> None:
    flip_byte(cache.path, place(cache.path, "checksum", 2) + 8)  # of the second level
    with pytest.raises(CacheError, match=r"wanted  stride8, xxh3_64 [0-9a-f]{16}\n  found   [0-9a-f]{16}"):
        read(loader_of(cache, "memmap"), [2])


def test_a_row_that_is_read_alone_is_checked_as_well(cache: Cache) -> None:
    flip_byte(cache.path, place(cache.path, "features/stride8", 4))
    assert cache.read_row(4, cache.levels[0]).shape == (6, 8, 8)
    with pytest.raises(CacheError, match="row 4"):
        cache.read_row(4, cache.levels[1])
    assert cache.stored(4, cache.levels[1])["stride8"].shape == (9, 4, 4)


def test_rows_that_move_to_a_device_whole_are_checked_on_their_way(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featprobe.cache.reader.device_room", lambda device: 1 << 30)
    flip_byte(cache.path, place(cache.path, "features/stride4", 11))
    splits = {"train": np.arange(6), "test": np.arange(6, ROWS)}
    with loader_of(cache, "memmap", staged=True) as loader, pytest.raises(CacheError, match="row 11"):
        loader.keep_on_device(splits)
    with loader_of(cache, "memmap", staged=True, verify=False) as loader:
        assert "train, test lie on" in loader.keep_on_device(splits)


@settings(max_examples=40, deadline=None)
@given(
    st.sets(st.tuples(st.integers(0, 5), st.integers(0, 1)), max_size=3),
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=5), min_size=1, max_size=6),
    st.sampled_from(["memmap", "preadv"]),
    st.sampled_from([(0,), (1,), (0, 1)]),
)
def test_batches_are_served_up_to_the_first_that_holds_damage(
    bad: set[tuple[int, int]], orders: list[list[int]], mode: str, columns: tuple[int, ...]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cache = filled_cache(Path(folder) / "cache.h5", rows=rows_of(6))
        expected = {n: m.view(np.float16) for n, m in random_maps(cache.recipe, 6).items()}
        for row, column in bad:
            flip_byte(cache.path, place(cache.path, f"features/{cache.levels[column].name}", row) + row)
        levels = [cache.levels[column] for column in columns]
        sound = [not any((row, column) in bad for row in order for column in columns) for order in orders]
        served = 0
        with FeatureLoader(cache, levels, mode=mode) as loader:
            try:
                for rows, features in loader.batches([np.array(order) for order in orders]):
                    served += 1
                    for level in levels:
                        np.testing.assert_array_equal(features.maps[level.name].numpy(), expected[level.name][rows])
            except CacheError:
                assert not all(sound)
        assert served == [*sound, False].index(False)


@pytest.mark.parametrize("mode", MODES)
def test_a_file_of_version_1_is_checked_as_well(tmp_path: Path, mode: str) -> None:
    path, recipe = tmp_path / "old.h5", recipe_of()
    write_old(path, recipe, data_info(), rows_of(ROWS), {})
    with CacheWriter(path) as writer:
        writer.write(0, random_maps(recipe, ROWS))
    cache = opened(path)
    read(loader_of(cache, mode), [0, 1, 2])
    flip_byte(path, place(path, "features/stride8", 4))
    with pytest.raises(CacheError, match=r"row 4, 'part4.png'"):
        read(loader_of(cache, mode), [3, 4])


@pytest.mark.parametrize("mode", ["preadv", "direct"])
def test_a_disk_that_fails_to_read_is_named_with_the_place(
    cache: Cache, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = loader_of(cache, mode)

    def failing(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(CacheError, match=r"can't be read at byte \d+: Input/output error(.|\n)*featprobe extract"):
        read(loader, [1])


# Once


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_each_row_is_hashed_once_in_three_passes_by_however_many_readers(
    cache: Cache, hashed: Counter[bytes], mode: str, staged: bool
) -> None:
    read(loader_of(cache, mode, staged=staged), *epochs(3))
    read(loader_of(cache, "preadv"), [0, 0, 5])
    again = opened(cache.path)  # the same file
    read(loader_of(again, "memmap"), *epochs(1))
    again.read_row(3, again.levels[0])
    assert len(hashed) == sum(hashed.values()) == ROWS * len(cache.levels)
    assert sum(map(len, hashed)) == ROWS * cache.recipe.row_bytes


def test_a_reader_of_some_levels_hashes_those_alone(cache: Cache, hashed: Counter[bytes]) -> None:
    with FeatureLoader(cache, cache.levels[1:]) as loader:
        list(loader.batches([np.arange(5)]))
    assert {len(data) for data in hashed} == {9 * 4 * 4 * 2} and sum(hashed.values()) == 5


def test_without_checks_nothing_is_hashed_and_damage_is_served(cache: Cache, hashed: Counter[bytes]) -> None:
    flip_byte(cache.path, place(cache.path, "features/stride4", 2))
    for staged in (False, True):
        read(loader_of(cache, "memmap", staged=staged, verify=False), *epochs(2))
    assert not hashed
    with pytest.raises(CacheError, match="row 2"):
        read(loader_of(cache, "memmap"), *epochs(1))


@pytest.mark.parametrize("mode", MODES)
def test_damage_after_the_first_pass_is_found_once_the_file_is_opened_anew(tmp_path: Path, mode: str) -> None:
    cache = filled_cache(tmp_path / "cache.h5")
    path = cache.path
    read(loader_of(cache, mode), [0, 1, 2, 3])
    flip_byte(path, place(path, "features/stride4", 1))
    read(loader_of(cache, mode), [0, 1, 2, 3])
    del cache
    gc.collect()  # readers refer to themselves; then none has the file open
    with pytest.raises(CacheError, match="row 1"):
        read(loader_of(opened(path), mode), [0, 1, 2, 3])


def test_what_is_known_of_a_file_is_not_said_of_one_that_takes_its_name(tmp_path: Path) -> None:
    path = tmp_path / "cache.h5"
    old = filled_cache(path)
    read(loader_of(old, "memmap"), [0, 1, 2, 3])
    filled_cache(tmp_path / "new.h5").path.replace(path)
    new = opened(path)
    flip_byte(path, place(path, "features/stride4", 1))
    read(loader_of(old, "preadv"), [1])
    with pytest.raises(CacheError, match="row 1"):
        read(loader_of(new, "preadv"), [1])


# Beside an extraction


@pytest.mark.parametrize("mode", ["memmap", "preadv"])
def test_rows_that_appear_while_a_reader_is_open_are_compared_with_what_was_then_written(
    tmp_path: Path, mode: str
) -> None:
    cache = make_cache(tmp_path / "cache.h5")
    maps = random_maps(cache.recipe, 4)
    with loader_of(cache, mode) as loader, CacheWriter(cache.path) as writer:
        writer.write(0, {name: m[:2] for name, m in maps.items()})
        writer.commit()
        list(loader.batches([np.array([0, 1])]))
        with pytest.raises(CacheIncompleteError, match=r"row 2, 'part2.png', is missing(.|\n)*featprobe extract"):
            list(loader.batches([np.array([1, 2])]))
        writer.write(2, {name: m[2:] for name, m in maps.items()})
        writer.commit()
        list(loader.batches([np.array([1, 2, 3])]))


def test_a_row_that_is_written_anew_while_it_is_read_is_called_missing_and_not_damaged(cache: Cache) -> None:
    with CacheWriter(cache.path) as writer:
        writer.mark_missing(5)
    overwrite(cache.path, "features/stride4", 5, b"half written")
    with pytest.raises(CacheIncompleteError, match=r"row 5, 'part5.png', is missing at the moment"):
        read(loader_of(cache, "memmap"), [5])


def test_a_row_that_was_set_aside_is_not_served(cache: Cache) -> None:
    with CacheWriter(cache.path) as writer:
        writer.mark_unreadable(5, "torn")
    overwrite(cache.path, "checksum", 5)
    with pytest.raises(CacheIncompleteError, match="is unreadable at the moment"):
        read(loader_of(cache, "preadv"), [5])


# The commands


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a workspace with a complete cache of a small set."""
    workspace = Workspace(tmp_path_factory.mktemp("checked"))
    make_generated("xray", workspace.data / "xray", images=24, size=(64, 64))
    extract(
        workspace,
        workspace.backbone("test_efficientnet", random_init=True),
        "xray",
        ExtractOptions(size=(32, 32), batch_size=8, quiet=True),
    )
    return workspace.root


@pytest.fixture
def space(extracted: Path, tmp_path: Path) -> Workspace:
    """A copy of that workspace."""
    return Workspace(shutil.copytree(extracted, tmp_path / "space"))


def damage(space: Workspace, split: str) -> tuple[Path, int]:
    """Flip a bit of a feature in the last row of a split."""
    (path,) = space.cache_files()
    cache = opened(path)
    row = int(cache.usable(split)[-1])
    flip_byte(path, place(path, f"features/{cache.levels[-1].name}", row) + 5)
    return path, row


def call(space: Workspace, words: Sequence[str]) -> Result:
    """`featprobe …` in the workspace, in this process."""
    return CliRunner().invoke(cli, ["--workspace", str(space.root), *words], prog_name="featprobe")


SHORT = replace(KINDS["semseg", "linear"].recipe, iterations=4, batch_size=8, evaluations=1, loss_at="level")


@pytest.mark.parametrize("head", ["ridge", "linear"])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_no_head_is_trained_or_scored_on_a_damaged_row(space: Workspace, head: str, split: str) -> None:
    path, row = damage(space, split)
    recipe = None if head == "ridge" else SHORT
    with pytest.raises(CacheError, match=f"row {row}, ") as caught:
        probe(space, options=ProbeOptions(head=head, recipe=recipe, seeds=1, quiet=True))
    assert f"cache verify {path}" in str(caught.value)
    assert not (space.probes / "results.jsonl").exists()


def test_the_commands_that_the_error_names_mend_the_file_and_the_same_probe_then_works(space: Workspace) -> None:
    _, row = damage(space, "train")
    words = ["probe", "--head", "ridge", "--quiet"]
    command = [sys.executable, "-m", "featprobe", "--workspace", str(space.root), *words]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    failed = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert (failed.returncode, failed.stdout) == (1, "") and "Traceback" not in failed.stderr
    assert failed.stderr.startswith("featprobe: ") and f"row {row}, " in failed.stderr
    verify, mend = (shlex.split(line) for line in failed.stderr.splitlines()[-2:])
    assert verify[:3] == ["featprobe", "cache", "verify"] and mend[:2] == ["featprobe", "extract"]
    assert call(space, verify[1:]).exit_code == 3
    again = call(space, words)
    assert again.exit_code == 1 and "1 of 24 rows are missing" in again.stderr
    assert ": 1 of 24 images computed" in call(space, [*mend[1:], "--quiet"]).stdout
    assert call(space, words).exit_code == call(space, verify[1:]).exit_code == 0


def test_no_verify_trains_all_the_same_says_so_and_changes_no_key(space: Workspace) -> None:
    words = ["probe", "--head", "ridge", "--quiet"]
    damage(space, "train")
    assert call(space, words).exit_code == 1
    done = call(space, [*words, "--no-verify"])
    assert done.exit_code == 0 and "features are not hashed" in done.stdout, done.output
    ((row,), _) = read_rows(space.probes / "results.jsonl")
    assert row["verified"] is False and read_card(space.probes / row["folder"])["result"]["verified"] is False
    assert call(space, ["cache", "verify"]).exit_code == 3
    (path,) = space.cache_files()
    assert call(space, [*shlex.split(opened(path).contents.command)[1:], "--quiet"]).exit_code == 0
    assert call(space, words).exit_code == 0
    ((_, checked), _) = read_rows(space.probes / "results.jsonl")
    assert "verified" not in checked and "verified" not in read_card(space.probes / checked["folder"])["result"]
    assert (checked["folder"], checked["recipe_key"]) == (row["folder"], row["recipe_key"])


STUDY = """
data = ["xray"]
backbones = ["test_efficientnet-random"]
heads = ["ridge"]
regimes = ["frozen"]
sizes = ["32x32"]
seeds = 1
show = 0
"""


def test_a_cell_of_a_study_fails_on_damage_unless_it_is_told_not_to_look(space: Workspace, tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text(STUDY)
    _, row = damage(space, "test")
    report = run_grid(space, read_study(file, space))
    ((_, reason),) = report.failed
    assert f"row {row}, " in reason and "cache verify" in reason and not report.rows
    file.write_text(f"no_verify = true\n{STUDY}")
    assert not run_grid(space, read_study(file, space)).failed
    ((kept,), _) = read_rows(space.probes / "results.jsonl")
    assert kept["verified"] is False
    file.write_text(f"no_verify = 1\n{STUDY}")
    with pytest.raises(DataError, match="no_verify"):
        read_study(file, space)
