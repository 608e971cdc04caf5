"""What another user of a shared machine may not read is named: it is not taken for absent, damaged or torn."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import filled_cache
from inspected_space import rows_of, stored_space

from featprobe.cache import open_cache, read_contents
from featprobe.errors import CacheError, DiskError, FeatprobeError
from featprobe.io.disk import write_whole
from featprobe.probes.saved import read_results
from featprobe.stages.comparison.results import load_results
from featprobe.stages.training.asked import _opened
from featprobe.stages.upkeep.caches import check_removable
from featprobe.stages.upkeep.saved_heads import head_folders, last_rows
from featprobe.stages.workspace import Workspace

NOBODY = 65534


@contextmanager
def shut(path: Path) -> Iterator[None]:
    """As a user who may not look into a file or folder."""
    mode = path.stat().st_mode
    path.chmod(0)
    if os.getuid() == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(os.getuid())
        path.chmod(mode)


@pytest.fixture
def space() -> Iterator[Workspace]:
    """A workspace with a cache and heads in a folder that everybody may look into."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        made = stored_space(Path(folder) / "space")
        (made.cache / "parts").mkdir(parents=True)
        filled_cache(made.cache / "parts" / "some.h5")
        yield made


@pytest.mark.parametrize(
    ("name", "look"),
    [
        ("cache", lambda space: space.cache_files()),
        ("probes", head_folders),
        ("probes", lambda space: last_rows(space.probes / "results.jsonl")),
        ("probes", lambda space: read_results(space.probes / "results.jsonl")),
        ("probes/results.jsonl", lambda space: read_results(space.probes / "results.jsonl")),
        (".", lambda space: Workspace(space.root)),
        ("cache/parts/some.h5", lambda space: read_contents(space.cache / "parts" / "some.h5")),
    ],
)
def test_what_may_not_be_read_is_not_taken_for_absent(
    space: Workspace, name: str, look: Callable[[Workspace], object]
) -> None:
    assert look(space), "it is there"
    with shut(space.root / name), pytest.raises((FeatprobeError, PermissionError), match="Permission denied") as caught:
        look(space)
    assert "cache rm" not in str(caught.value)


def test_a_head_that_may_not_be_read_takes_no_other_one_with_it(space: Workspace) -> None:
    """None of the stored heads has its weights, so all of them have something that is wrong."""
    first = rows_of(space)[0].folder
    found, unusable, _ = load_results(space.probes)
    with shut(space.probes / first):
        again, others, _ = load_results(space.probes)
        listed = head_folders(space)
    reasons, changed = ({item.folder: item.reason for item in own} for own in (unusable, others))
    assert len(listed) == len(rows_of(space)) and len(found) == len(again)
    assert {name for name in changed if changed[name] != reasons.get(name)} == {first}
    assert "Permission denied. It may be sound" in changed[first]


def test_a_place_that_may_not_be_written_is_not_a_full_disk(space: Workspace) -> None:
    with shut(space.cache), pytest.raises(DiskError, match=r"Permission denied\.\n.*Correct the path or its rights"):
        write_whole(space.cache / "x", b"x")


def test_a_folder_of_caches_that_may_not_be_read_is_reported_beside_the_others(space: Workspace) -> None:
    (space.cache / "others").mkdir()
    filled_cache(space.cache / "others" / "other.h5")
    shut_folder = space.cache / "parts"
    with shut(shut_folder):
        files = space.cache_files()
        assert files == [space.cache / "others" / "other.h5", shut_folder]
        with pytest.raises(CacheError, match=r"parts can't be read: Permission denied"):
            open_cache(files[1])
        found, broken = _opened(space)
        assert [cache.path for cache in found] == files[:1] and len(broken) == 1
        with pytest.raises(FeatprobeError, match="can't be looked into"):
            check_removable(space, shut_folder)
