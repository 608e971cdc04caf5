"""Progress of a loop: a bar on a terminal, a line a minute in a log, nothing from other processes."""

import io
import sys

import pytest

from featprobe.stages import progress
from featprobe.stages.progress import EVERY, Progress, counting


class Terminal(io.StringIO):
    """What a terminal would show."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_a_minute_with_the_time_gone_and_left(
    now: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(400, "net\x1b[31m", "img") as bar:
        for second in range(200):
            now[0] = second + 1.0
            bar.update()
            bar.note("7 MB/s")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "net\\u001b[31m: 60 of 400 img, 60 s gone, about 5.7 min left, 7 MB/s",
        "net\\u001b[31m: 120 of 400 img, 2.0 min gone, about 4.7 min left, 7 MB/s",
        "net\\u001b[31m: 180 of 400 img, 3.0 min gone, about 3.7 min left, 7 MB/s",
    ]


def test_a_short_loop_says_nothing_in_a_log(now: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    assert list(counting("abc", 3, "looking", "img")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("silent", ["quiet", "another process", "nothing to do"])
def test_where_nothing_is_to_be_shown_nothing_is(
    silent: str, now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    if silent == "another process":
        monkeypatch.setenv("RANK", "1")
    for stream in (io.StringIO(), Terminal()):
        monkeypatch.setattr(sys, "stderr", stream)
        with Progress(0 if silent == "nothing to do" else 5, "x", "img", quiet=silent == "quiet") as bar:
            now[0] += 2 * EVERY
            bar.update()
        assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(5, "x", "img", leave=True) as bar:
        bar.update(5)
    assert "5/5" in terminal.getvalue() and "\r" in terminal.getvalue()


def test_bytes_are_written_as_people_read_them(now: list[float]) -> None:
    bar = Progress(8_000_000, "cache", progress.BYTES)
    now[0] = 2.0
    bar.update(2_000_000)
    assert bar.line == "cache: 2.0 MB of 8.0 MB, 2 s gone, about 6 s left"
