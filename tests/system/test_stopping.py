"""Ctrl-C: one paragraph, exit code 130, what was written stays; the next Ctrl-C kills at once."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers import find_file, write_set

from featprobe.cache import WHOLE, open_cache
from featprobe.cli.main import cli

HEARD = """
import os, signal, sys
signal.signal(signal.SIGINT, getattr(signal, sys.argv[1]))  # a shell has its background jobs ignore it
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""
SECONDS = 120  # that a process may take


@contextmanager
def started(words: Sequence[str], how: str = "SIG_DFL", **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A Python of its own with these words."""
    command = [sys.executable, "-c", HEARD, how, *words]
    env = {**os.environ, **environment}
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as process:
        try:
            yield process
        finally:
            process.kill()


def test_an_extraction_that_is_stopped_says_what_is_kept_and_goes_on(tmp_path: Path) -> None:
    images = 120
    write_set(tmp_path / "parts", images, (32, 32))
    words = ["--workspace", str(tmp_path), "extract", "--backbone", "test_efficientnet", "--random-init"]
    words += ["--data", str(tmp_path / "parts"), "--size", "64x64", "--batch-size", "2", "--device", "cpu"]
    with started(["-m", "featprobe", *words, "--quiet"]) as process:
        begun = time.monotonic()
        while not _rows(tmp_path) and process.poll() is None and time.monotonic() < begun + SECONDS:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, said = process.communicate(timeout=SECONDS)
    assert (process.returncode, out) == (130, "")
    assert said == (
        "featprobe: Stopped by Ctrl-C. Rows of the cache that were written stay. The same command goes on from there.\n"
    )
    kept = _rows(tmp_path)
    assert 0 < kept < images
    again = CliRunner().invoke(cli, [*words, "--quiet"])
    assert again.exit_code == 0 and f"{images - kept} of {images} images computed" in again.stdout, again.output


def _rows(workspace: Path) -> int:
    """Whole rows of the only cache; 0 where there is none yet."""
    if not list(workspace.glob("cache/*/*.h5")):
        return 0
    return int((open_cache(find_file(workspace)).done == WHOLE).sum())


def test_a_stop_while_torch_is_loaded_is_no_traceback(tmp_path: Path) -> None:
    words = ["-X", "importtime", "-m", "featprobe", "--workspace", str(tmp_path), "demo"]
    with started(words) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "torch" in line:
                break
        process.send_signal(signal.SIGINT)
        out, said = process.communicate(timeout=SECONDS)
    left = [line for line in said.splitlines() if not line.startswith("import time:")]
    assert (process.returncode, out, len(left)) == (130, "", 1), said[-2000:]
    assert left[0].startswith("featprobe: Stopped by Ctrl-C. ") and left[0].endswith("Run the same command again.")


STUBBORN = """
import sys, time
from featprobe.cli import stopping
stopping.listen()
while True:
    try:
        print("ready", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("once" if stopping.is_asked() else "unasked", flush=True)
"""


@pytest.mark.parametrize("launched", [False, True])
def test_the_next_one_kills_at_once(launched: bool) -> None:
    """A launcher passes on the Ctrl-C that its processes got from the terminal: that is no second one."""
    with started(["-c", STUBBORN], **({"RANK": "0"} if launched else {})) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "once\n"
        assert process.stdout.readline() == "ready\n"
        if launched:
            process.send_signal(signal.SIGINT)
            time.sleep(1.1)
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=SECONDS) == -signal.SIGINT


def test_where_ctrl_c_is_ignored_it_stays_so() -> None:
    code = "import signal; from featprobe.cli import stopping as s; s.listen(); print(int(signal.getsignal(2)))"
    with started(["-c", code], how="SIG_IGN") as process:
        assert process.communicate(timeout=SECONDS)[0] == f"{int(signal.SIG_IGN)}\n"


def test_debug_shows_where_a_command_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*words: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("featprobe.stages.workspace.Workspace.cache_files", stop)
    words = ["--workspace", str(tmp_path), "cache", "ls"]
    plain, debug = CliRunner().invoke(cli, words), CliRunner().invoke(cli, ["--debug", *words])
    assert plain.exit_code == debug.exit_code == 130
    assert "Traceback" in debug.stderr and "Traceback" not in plain.stderr
    assert plain.stderr.endswith("no file is half-written. Run the same command again.\n")
