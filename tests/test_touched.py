"""`make check` runs the tests that a change touches, and only begins a test while there is time."""

import subprocess
import sys
from pathlib import Path

import pytest
import touched
from conftest import LONG

ROOT = Path(__file__).parents[1]


def test_the_tests_of_a_module_come_from_its_place_and_from_who_imports_it() -> None:
    found = touched.touched(["featprobe/cache/writer.py"])
    assert found[: len(touched.ALWAYS) + 1] == [*touched.ALWAYS, "tests/cache/test_writer.py"]
    assert "featprobe/cache/writer.py" in found, "its doctests"
    through_package = {
        str(p.relative_to(ROOT)) for p in ROOT.glob("tests/**/test_*.py") if "CacheWriter" in p.read_text()
    }
    assert through_package and through_package <= {*found, "tests/test_touched.py"}
    assert len(found) < len(list(ROOT.glob("tests/**/test_*.py"))) / 2
    assert all((ROOT / name).is_file() for name in found)


def test_changed_tests_come_before_those_that_only_import_a_changed_module() -> None:
    found = touched.touched(["featprobe/cache/writer.py", "tests/report/test_text.py", "tests/gone/test_gone.py"])
    assert found[len(touched.ALWAYS) :][:2] == ["tests/cache/test_writer.py", "tests/report/test_text.py"]
    assert "tests/gone/test_gone.py" not in found
    assert "tests/cache/test_cache.py" in touched.touched(["tests/helpers.py"]), "what imports a changed helper"
    assert touched.touched([]) == list(touched.ALWAYS)


def test_a_change_is_what_the_branch_and_the_folder_hold_more_than_its_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    def write(name: str, text: str) -> None:
        (tmp_path / name).write_text(text)

    git("init", "-q", "-b", "main")
    for name in ("same.py", "committed.py", "uncommitted.py", ".gitignore"):
        write(name, "ignored.py" if name == ".gitignore" else "1")
    git("add", "-A")
    git("commit", "-qm", "base")
    git("checkout", "-qb", "work")
    write("committed.py", "2")
    git("commit", "-qam", "work")
    for name in ("uncommitted.py", "new.py", "ignored.py"):
        write(name, "2")
    monkeypatch.setattr(touched, "ROOT", tmp_path)
    assert sorted(touched.changed()) == ["committed.py", "new.py", "uncommitted.py"]
    assert sorted(touched.changed("work")) == ["new.py", "uncommitted.py"]
    with pytest.raises(SystemExit, match="There is no commit other to compare with"):
        touched.changed("other")


def test_tests_that_have_not_begun_in_time_are_skipped_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_two.py").write_text("import time\ndef test_a(): time.sleep(0.6)\ndef test_b(): raise OSError\n")
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path]
    done = subprocess.run([*command, "--within", "0.5"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
    assert "1 passed, 1 skipped" in done.stdout and "make test runs it" in done.stdout
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 1


def test_the_files_that_the_suite_begins_with_are_there() -> None:
    assert {*LONG} <= {path.stem for path in ROOT.glob("tests/**/test_*.py")}
