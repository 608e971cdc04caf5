"""Looking after cache files."""

import errno
import os
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers import filled_cache, flip_byte

from featprobe.cache import RowLocks
from featprobe.cli.main import cli
from featprobe.errors import CacheBusyError
from featprobe.stages.extraction.run_log import log_path
from featprobe.stages.extraction.settled import look_path
from featprobe.stages.upkeep import caches
from featprobe.stages.upkeep.caches import list_cache, remove_caches


@pytest.mark.parametrize("refused", range(3))
def test_a_removal_that_the_disk_refuses_can_be_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: int
) -> None:
    path = filled_cache(tmp_path / "some.h5").path
    beside = (look_path(path), log_path(path))
    for made in beside:
        made.write_text("\n")
    target, unlink = (*beside, path)[refused], Path.unlink

    def refuse(own: Path, *, missing_ok: bool = False) -> None:
        if own == target:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(own))
        unlink(own, missing_ok=missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refuse)
        with pytest.raises(OSError, match="Input/output error"):
            remove_caches([path])
    assert path.exists(), "the cache goes last"
    assert remove_caches([path]) and not any(own.exists() for own in (*beside, path))


def test_only_rows_that_were_marked_are_said_to_be_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(locks: RowLocks) -> None:
        raise CacheBusyError("another process has it")

    cache = filled_cache(tmp_path / "some.h5")
    extent = cache.contents.extents[f"features/{cache.levels[0].name}"]
    flip_byte(cache.path, extent.offset + 2 * extent.row_bytes)
    with monkeypatch.context() as patched:
        patched.setattr(RowLocks, "claim_all", busy)
        said = CliRunner().invoke(cli, ["cache", "verify", str(cache.path)]).stdout
    assert "row 2 is not marked as missing: run this command again first" in said and "now marked" not in said
    said = CliRunner().invoke(cli, ["cache", "verify", str(cache.path)]).stdout
    assert "row 2 is now marked as missing" in said and "not marked" not in said


def test_of_several_caches_all_are_removed_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [filled_cache(tmp_path / name).path for name in ("a.h5", "b.h5")]
    claim = RowLocks.claim_all

    def busy(locks: RowLocks) -> None:
        if locks.path == paths[1]:
            raise CacheBusyError("Nothing was changed.")
        claim(locks)

    with monkeypatch.context() as patched:
        patched.setattr(RowLocks, "claim_all", busy)
        with pytest.raises(CacheBusyError):
            remove_caches(paths)
    assert all(path.exists() for path in paths)
    assert remove_caches(paths) and not any(path.exists() for path in paths)


def test_an_upgrade_of_what_is_no_cache_leaves_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    result = CliRunner().invoke(cli, ["cache", "upgrade", str(tmp_path / "notes.txt")])
    assert result.exit_code == 1 and "not a feature cache" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_cache_that_is_removed_while_it_is_listed_has_no_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read = filled_cache(tmp_path / "some.h5").path, caches.read_states

    def removing(own: Path) -> object:
        found = read(own)
        own.unlink()
        return found

    monkeypatch.setattr(caches, "read_states", removing)
    assert list_cache(path)["bytes"] == 0
