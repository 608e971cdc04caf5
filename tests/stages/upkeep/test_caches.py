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
from featprobe.stages.upkeep.caches import remove_cache


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
            remove_cache(path)
    assert path.exists(), "the cache goes last"
    assert remove_cache(path) and not any(own.exists() for own in (*beside, path))


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
