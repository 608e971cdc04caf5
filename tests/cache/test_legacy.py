"""Old caches: read in a process of its own, that may fail; copied into version 3. HDF5's view of new ones."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from archives.make import MADE, held_by
from helpers import data_info, flip_byte, random_maps, recipe_of, rows_of
from hostile_caches import ROWS, header_of, labelled, parts_of, sealed, write_sound, zeroed_sector
from old_caches import write_old
from test_archives import ARCHIVES, cache_of, head_of, state_of
from test_cli import call, refusal

from featprobe.cache import MISSING, UNREADABLE, WHOLE, Cache, RowLocks, legacy, open_cache, read_contents, verify
from featprobe.cache.store import Damage
from featprobe.errors import CacheBusyError, CacheError
from featprobe.stages.upkeep.caches import upgrade_cache

MADE_BY = {"command": "featprobe extract --backbone some --data parts", "created": "then", "featprobe": "0.1.0"}


def old_cache(path: Path, dtype: str = "fp16", parts: bool = False) -> Path:
    """An old cache with rows of all three states."""
    recipe, rows, images = recipe_of(dtype=dtype), labelled(rows_of(ROWS)), []
    if parts:
        recipe, rows, images = parts_of(rows)
        recipe = replace(recipe, dtype=dtype)
    rows[5] = replace(rows[5], reason="part5.png is cut off: größe")
    write_old(path, recipe, data_info(), rows, MADE_BY, images, random_maps(recipe, ROWS), missing=[7])
    return path


def held(path: Path) -> list[object]:
    """All that a reader gets of a file."""
    cache = open_cache(path)
    done = cache.done.tolist()
    features = [
        {lv.name: cache.read_row(i, lv).tobytes() for lv in cache.levels} if done[i] == WHOLE else cache.reason(i)
        for i in range(len(cache))
    ]
    sums = [row for row, state in zip(cache.stored_checksums().tolist(), done, strict=True) if state == WHOLE]
    rows = list(cache.rows), list(cache.images), cache.recipe, cache.data, dict(cache.contents.provenance)
    return [*rows, done, features, sums]


# Reading


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("dtype", ["fp16", "fp32", "bf16"])
def test_an_old_cache_is_read_and_copied_into_version_3_as_it_is(tmp_path: Path, dtype: str, parts: bool) -> None:
    path = old_cache(tmp_path / "cache.h5", dtype, parts)
    before, contents = held(path), read_contents(path)
    assert contents.version == (2 if parts else 1) and contents.is_intact()
    assert before[5] == [UNREADABLE if i == 5 else MISSING if i == 7 else WHOLE for i in range(ROWS)]
    assert upgrade_cache(path, quiet=True)
    assert read_contents(path).version == 3 and held(path) == before
    assert not [item for item in verify(path) if isinstance(item, Damage)]
    assert not upgrade_cache(path, quiet=True)
    assert sorted(os.listdir(tmp_path)) == [".cache.lock", "cache.h5"]


def test_who_opens_an_old_cache_never_enters_hdf5(tmp_path: Path) -> None:
    path = old_cache(tmp_path / "cache.h5")
    code = (
        "import sys; from featprobe.stages.upkeep.caches import describe_cache; from pathlib import Path\n"
        "print(describe_cache(Path(sys.argv[1]))['rows'], 'h5py' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(ROWS), "False"]


def test_the_child_imports_nothing_that_is_worth_having() -> None:
    code = f"import runpy, sys; runpy.run_path({str(legacy.CHILD)!r}); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout
    assert "h5py" in modules and not {"torch", "featprobe", "PIL", "timm"} & set(modules.split())


def test_a_cache_that_is_opened_again_is_read_once_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, started = old_cache(tmp_path / "cache.h5"), []
    view = legacy._view
    monkeypatch.setattr(legacy, "_view", lambda *words: started.append(words) or view(*words))
    monkeypatch.setattr(legacy, "SETTLED_SECONDS", 0.0)
    assert read_contents(path).identity_sha256 == read_contents(path).identity_sha256 and len(started) == 1
    with h5py.File(path, "r+") as file:
        file.attrs["provenance"] = json.dumps(MADE_BY | {"created": "later"})
    assert read_contents(path).provenance["created"] == "later" and len(started) == 2
    monkeypatch.setattr(legacy, "SETTLED_SECONDS", 3600.0)  # what was changed just now may change again unseen
    os.utime(path)
    assert read_contents(path) and read_contents(path) and len(started) == 4


STUBS = {
    "sleeps": ("import time; time.sleep(60)", "did not finish"),
    "says too much": ("print(1 << 60, flush=True); import time; time.sleep(60)", "more than a cache"),
    "says nothing": ("", "exit code 0"),
    "stops in the middle": ("print(100); print('x')", "without a whole answer"),
    "says one line for ever": ("while True: print('1', end=' ', flush=True)", "more than a cache"),
    "breaks down": ("import os; os.kill(os.getpid(), 11)", "SIGSEGV"),
    "fails": ("raise ImportError('h5py')", "exit code 1"),
    "answers nonsense": ("print(1, 1, 1); print('abc', end='')", "not a feature cache"),
}


@pytest.mark.parametrize("name", STUBS)
def test_a_child_that_fails_ends_in_words_and_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    code, words = STUBS[name]
    stub = tmp_path / "stub.py"
    stub.write_text(code)
    monkeypatch.setattr(legacy, "CHILD", stub)
    monkeypatch.setattr(legacy, "WALL_SECONDS", 0.5 if name == "sleeps" else 60.0)
    before = children()
    with pytest.raises(CacheError, match=words):
        read_contents(old_cache(tmp_path / "cache.h5"))
    assert children() == before


def test_where_no_process_can_be_started_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    old, new = old_cache(tmp_path / "cache.h5"), new_cache(tmp_path / "new")
    monkeypatch.setattr(subprocess, "Popen", refuse)
    said = r"can't be started: Cannot allocate memory\nIt may be sound\. Allow the process more"
    with pytest.raises(CacheError, match=said) as caught:
        read_contents(old)
    assert "cache rm" not in str(caught.value), "nobody is told to remove what nobody looked at"
    contents = read_contents(new)
    with pytest.raises(CacheError, match=said):
        legacy.disagreements(contents.file, contents.index)


def test_a_cache_for_which_there_is_no_memory_may_be_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = new_cache(tmp_path / "new")

    def refuse(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("featprobe.cache.contents._parse", refuse)
    with pytest.raises(CacheError, match=r"found   no memory\nIt may be sound") as caught:
        read_contents(path)
    assert "cache rm" not in str(caught.value)


def children() -> list[str]:
    """Processes that this one has started and that are there still."""
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def test_ctrl_c_ends_a_command_that_waits_for_hdf5(tmp_path: Path) -> None:
    path, child = old_cache(tmp_path / "cache.h5"), tmp_path / "hdf5.py"
    child.write_text("import time; time.sleep(600)")  # a damaged file may end its child by a limit, at any time
    code = (
        "import sys; from featprobe.cache import legacy, read_contents; from pathlib import Path\n"
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have ignored it\n"
        "legacy.CHILD = Path(sys.argv[2])\nprint('ready', flush=True)\nread_contents(Path(sys.argv[1]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path), str(child)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    tasks = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (started := tasks.read_text().split()) or "hdf5" not in Path("/proc", started[0], "cmdline").read_text():
        time.sleep(0.01)
    time.sleep(0.2)  # until it is waited for
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in said
    assert not any(Path("/proc", child).exists() for child in started)


def test_a_zeroed_sector_ends_in_words(tmp_path: Path) -> None:
    (tmp_path / "cache" / "set-0").mkdir(parents=True)
    path = old_cache(tmp_path / "cache" / "set-0" / "cache.h5")
    shutil.copy(path, path.with_name("sound.h5"))
    zeroed_sector(path)
    result = call(tmp_path, "cache", "ls")
    assert "sound.h5" in result.stdout and "not a feature cache that can be opened" in result.stderr


# Copying into version 3


def test_a_damaged_row_is_not_copied_and_the_file_stays(tmp_path: Path) -> None:
    path = old_cache(tmp_path / "cache.h5")
    extent = read_contents(path).extents["features/stride4"]
    flip_byte(path, extent.offset + 2 * extent.row_bytes)
    before = path.read_bytes()
    said = refusal(tmp_path, "cache", "upgrade", path)
    assert "features of 1 row are not what was written, 'part2.png' first" in said and "cache verify" in said
    assert path.read_bytes() == before and sorted(os.listdir(tmp_path)) == [".cache.lock", "cache.h5"]
    assert call(tmp_path, "cache", "verify", path).exit_code == 3  # the row is marked as missing
    assert "now of version 3" in call(tmp_path, "cache", "upgrade", path).stdout
    assert np.flatnonzero(open_cache(path).done == MISSING).tolist() == [2, 7]


def test_damaged_labels_and_identities_are_refused(tmp_path: Path) -> None:
    path = old_cache(tmp_path / "cache.h5")
    with h5py.File(path) as file:
        place = file["targets/semantic"].id.get_offset()
    flip_byte(path, place + 40)
    before = path.read_bytes()
    assert "its rows or targets are not what was written" in refusal(tmp_path, "cache", "upgrade", path)
    assert path.read_bytes() == before


def test_a_cache_that_is_being_written_is_not_copied(tmp_path: Path) -> None:
    path = old_cache(tmp_path / "cache.h5")
    code = (
        "import sys; from featprobe.cache import RowLocks; from pathlib import Path\n"
        "locks = RowLocks(Path(sys.argv[1])); locks.claim(3, 4); print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with pytest.raises(CacheBusyError):
        upgrade_cache(path, quiet=True)
    holder.communicate()
    assert read_contents(path).version == 1 and upgrade_cache(path, quiet=True)
    with RowLocks(path) as locks:
        locks.claim_all()


@pytest.mark.parametrize("name", sorted(MADE))
def test_after_copying_nothing_is_computed_or_trained_again(name: str, tmp_path: Path) -> None:
    space = tmp_path / name
    shutil.copytree(ARCHIVES / name, space)
    shutil.copytree(ARCHIVES / "set", space / "set")
    expected = json.loads((space / "expected.json").read_text())
    log = cache_of(space).with_suffix(".runs.jsonl").read_bytes()
    call(space, "cache", "upgrade", "parts")
    path = cache_of(space)
    assert held_by(path) == expected | {"version": 3}
    assert path.with_suffix(".runs.jsonl").read_bytes() == log
    _, views, (extract, *_) = MADE[name]
    before = state_of(space)
    report = json.loads(call(space, *extract, "--json").stdout)
    assert (report["computed"], report["copied"], report["missing"]) == (0, 0, 0)
    if views:
        assert "1 training is there already" in call(space, "study", space / "study.toml").output
    assert state_of(space) == before
    assert json.loads(call(space, "compare", "--json").stdout)["sets"][0]["lines"][0]["miou"] > 0.5
    assert head_of(space).is_dir()


# HDF5's view of a file of version 3


def new_cache(folder: Path) -> Path:
    path = folder / "cache.h5"
    folder.mkdir(exist_ok=True)
    write_sound(path, 3)
    return path


def test_hdf5_sees_what_the_header_says(tmp_path: Path) -> None:
    path = new_cache(tmp_path)
    contents = read_contents(path)
    assert legacy.disagreements(contents.file, contents.index) == []
    assert "sound" in call(tmp_path, "cache", "verify", path, "--hdf5").stdout


def renamed(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.move("rows/affine", "rows/other")


def another_key(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs["recipe_key"] = np.bytes_("0" * 64)


def copied_elsewhere(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        held = file["done"][...]
        del file["done"]
        file["filler"] = held
        file["done"] = held


def linked(path: Path) -> None:
    shutil.copy(path, path.with_name("other.h5"))
    with h5py.File(path, "r+") as file:
        del file["checksum"]
        file["checksum"] = h5py.ExternalLink("other.h5", "checksum")


def another_place(path: Path) -> None:
    data = bytearray(path.read_bytes())
    header = header_of(data)
    entry = header["tables"]["checksum"]
    data += bytes(entry["rows"] * entry["row_bytes"])
    entry["offset"] = len(data) - entry["rows"] * entry["row_bytes"]
    path.write_bytes(sealed(header, data))


def no_hdf5(path: Path) -> None:
    block = header_of(path.read_bytes())["user_block"]
    with path.open("r+b") as stream:
        stream.seek(block)
        stream.write(bytes(96))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (renamed, "'rows/affine' is missing"),
        (another_key, "recipe_key"),
        (copied_elsewhere, "the place of 'done'"),
        (linked, "'checksum' is a link that leads elsewhere"),
        (another_place, "the place of 'checksum'"),
        (no_hdf5, "HDF5 can't open the file"),
    ],
)
def test_where_hdf5_sees_something_else_it_is_said(tmp_path: Path, change: object, words: str) -> None:
    path = new_cache(tmp_path)
    change(path)  # type: ignore[operator]
    result = call(tmp_path, "cache", "verify", path, "--hdf5")
    assert result.exit_code == 3 and re.search(f"HDF5 reads it differently: .*{words}", result.stdout), result.stdout


def test_an_old_cache_has_one_view_alone(tmp_path: Path) -> None:
    path = old_cache(tmp_path / "cache.h5")
    assert "sound" in call(tmp_path, "cache", "verify", path, "--hdf5").stdout
    assert "older: featprobe cache upgrade" in call(tmp_path, "cache", "info", path).stdout
    assert len(Cache(path, read_contents(path))) == ROWS
