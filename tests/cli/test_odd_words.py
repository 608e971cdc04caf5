"""Whatever a user or a shell writes ends in words: no traceback, no hang, nothing written where a stream was closed."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from featprobe.cli import options
from featprobe.cli.main import LONGEST, _refusal, cli
from featprobe.cli.streams import hold
from featprobe.errors import BackboneError, DataError, FeatprobeError
from featprobe.geometry import parse_size
from featprobe.machine import check_device
from featprobe.splitting import SplitChoice
from featprobe.stages.progress import Progress
from featprobe.tiling import parse_views

ROOT = Path(__file__).parents[2]
MANY_DIGITS = "9" * 5000  # more than Python turns into a number
LONG = "a" * 5000  # more than a path may have


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["data", "info", LONG], 1),
        (["data", "check", LONG], 1),
        (["extract", "--backbone", "embedded", "--data", LONG], 2),
        (["extract", "--backbone", "embedded", "--data", "xray", "--weights", LONG], 2),
        (["extract", "--backbone", "embedded", "--data", "xray", "--shard", f"1/{MANY_DIGITS}"], 2),
        (["extract", "--backbone", "embedded", "--data", "xray", "--size", f"{MANY_DIGITS}x8"], 2),
        (["extract", "--backbone", "embedded", "--data", "xray", "--views", f"crop:{MANY_DIGITS}"], 2),
        (["probe", "--iterations", MANY_DIGITS], 2),
        (["probe", "--split", f"group:{MANY_DIGITS}"], 2),
        (["probe", "--seeds", "1000000000000"], 2),
        (["data", "make", "xray", "--size", f"8x{MANY_DIGITS}"], 2),
        (["data", "split", "xray", "--out", "x.csv", "--split", "group:99999999999999999999"], 2),
        (["try", LONG], 2),
        (["init", LONG], 2),
    ],
    ids=lambda words: " ".join(words)[:50] if isinstance(words, list) else str(words),
)
def test_long_words_end_in_words(words: list[str], code: int, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["--workspace", str(tmp_path), *words], prog_name="featprobe")
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in (1, 2) and "Traceback" not in result.stderr and result.stderr
    assert result.exit_code == code or "There is no" in result.stderr, result.stderr[-300:]
    assert not list(tmp_path.iterdir())


def test_numbers_of_too_many_digits_are_none() -> None:
    """They also come from study files and from rows of others."""
    with pytest.raises(DataError):
        parse_size(f"8x{MANY_DIGITS}")
    for text in (f"group:{MANY_DIGITS}", "group:10000", f"group:5/{MANY_DIGITS}"):
        with pytest.raises(DataError):
            SplitChoice.parse(text)
    with pytest.raises(FeatprobeError):
        parse_views("crop:10000")
    with pytest.raises(BackboneError):
        check_device(f"cuda:{MANY_DIGITS}")


@pytest.mark.parametrize("name", ["cpu", "mps", "cuda", "cuda:1", "cuda:127"])
def test_names_of_devices_are_taken(name: str) -> None:
    check_device(name)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENAMETOOLONG, "File name too long", LONG), "File name too long. Nothing further was done."),
        (PermissionError(errno.EACCES, "Permission denied", b"some"), "some: Permission denied. Nothing further"),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files. Allow the process more (ulimit)"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "Cannot allocate memory. Allow the process more (ulimit)"),
        (MemoryError("Unable to allocate 9 TiB."), "Unable to allocate 9 TiB. Ask for less"),
        (MemoryError(), "The memory does not hold what was asked for. Ask for less"),
    ],
)
def test_what_the_system_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception, said: str) -> None:
    def refused(*_: object) -> None:
        raise error

    monkeypatch.setattr("featprobe.cli.cache.workspace_of", refused)
    result = CliRunner().invoke(cli, ["cache", "ls"], prog_name="featprobe")
    assert result.exit_code == 1 and said in result.stderr and len(result.stderr) < LONGEST + 200
    result = CliRunner().invoke(cli, ["--debug", "cache", "ls"], prog_name="featprobe")
    assert result.exception is error


def test_an_error_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr("featprobe.cli.cache.workspace_of", refused)
    assert isinstance(CliRunner().invoke(cli, ["cache", "ls"]).exception, KeyError)


def test_a_file_never_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """Libraries print warnings to number 2, which a cache would have."""
    code = (
        "import os, sys; from featprobe.cli.streams import hold; hold()\n"
        "handle = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR); os.write(2, b'warning'); sys.exit(handle)"
    )
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", code, str(tmp_path / "file")]
    assert subprocess.run(closed, check=False, timeout=120).returncode == 3
    assert (tmp_path / "file").read_bytes() == b""


def test_streams_that_are_open_stay_as_they_are() -> None:
    before = [os.fstat(number) for number in (0, 1, 2)]
    hold()
    assert all(os.path.samestat(own, os.fstat(number)) for number, own in enumerate(before))


def test_a_closed_output_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from featprobe.cli.start_commands import _is_terminal

    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stdin", None)
    assert options.terminal_width() is None and not _is_terminal()


def run(words: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command line of a shell, where featprobe is "$F"."""
    given = {**os.environ, "F": f"{sys.executable} -m featprobe", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(words, shell=True, cwd=folder, env=given, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("$F cache ls >/dev/full", 1, "featprobe: the standard output: No space left on device."),
        ("$F --version >/dev/full", 1, "featprobe: the standard output: No space left on device."),
        ("$F cache ls </dev/null 1</dev/null", 1, "featprobe: the standard output: Bad file descriptor."),
        ("$F cache ls 2>/dev/full", 0, ""),
        ("$F cache ls >/dev/full 2>/dev/full", 1, ""),
        ("$F cache ls <&- >&- 2>&-", 0, ""),
        ("$F nothing 2>&-", 2, ""),
        ("mkdir gone && cd gone && rmdir ../gone && $F compare", 1, "featprobe: The current folder can't be used:"),
    ],
)
def test_streams_and_folders_that_can_not_be_used_end_in_one_line(
    words: str, code: int, said: str, tmp_path: Path
) -> None:
    ended = run(words, tmp_path)
    assert ended.returncode == code
    assert ended.stderr.startswith(said) and ended.stderr.count("\n") == bool(said), ended.stderr


def test_progress_that_can_not_be_written_ends_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featprobe.stages.progress.EVERY", 0.0)
    with open("/dev/full", "w") as full:
        for stream in (None, full):
            monkeypatch.setattr(sys, "stderr", stream)
            with Progress(2, "steps", "step") as bar:
                bar.update()
                options.to_stderr("a note")
            monkeypatch.undo()


@pytest.mark.parametrize(
    ("error", "locale", "said"),
    [
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"), "utf-8", "No usable"),
        (UnicodeEncodeError("ascii", "caf\xe9", 3, 4, "no"), "ascii", "export PYTHONUTF8=1"),
        (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "no"), "utf-8", ""),
    ],
)
def test_what_the_environment_refuses_is_said_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, error: Exception, locale: str, said: str
) -> None:
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: locale)
    found = _refusal(error)
    assert said in found and bool(found) is bool(said)
