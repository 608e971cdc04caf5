"""Processes of Python, forked from a server that has loaded torch, timm and featprobe: real ones, but for the imports.

`run` and `Process` take the words after `python`, as `subprocess` does. What a test says about a new interpreter
(which modules it loads, how it ends on a signal of the shell) needs a new one.
"""

import atexit
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from _commands import CONTEXT


class Process:
    """A running process, with the part of `subprocess.Popen` that tests use. Its output goes to files."""

    def __init__(self, words: Sequence[Any], env: Mapping[str, str] | None = None, cwd: Path | None = None) -> None:
        self._said = tempfile.mkdtemp()
        weakref.finalize(self, shutil.rmtree, self._said, True)
        environment = {**(os.environ if env is None else env)}
        words = [os.fspath(word) for word in words]
        self._child = CONTEXT.Process(target=_main, args=(words, environment, cwd or Path.cwd(), self._said))
        self._child.start()
        assert self._child.pid is not None
        self.pid = self._child.pid

    @property
    def returncode(self) -> int | None:
        return self._child.exitcode

    def poll(self) -> int | None:
        return self._child.exitcode

    def wait(self, timeout: float = 120) -> int:
        self._child.join(timeout)
        code = self._child.exitcode
        if code is None:
            raise subprocess.TimeoutExpired("a forked process", timeout)
        return code

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._child.kill()

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        self.wait(timeout)
        return self.output("out"), self.output("err")

    def output(self, name: str) -> str:
        """What it has printed so far. name: out or err."""
        path = Path(self._said, name)
        return path.read_text(errors="replace") if path.exists() else ""


def run(
    words: Sequence[Any], *, env: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run to its end."""
    process = Process(words, env, cwd)
    try:
        out, err = process.communicate(timeout)
    finally:
        process.kill()
    assert process.returncode is not None
    return subprocess.CompletedProcess([*words], process.returncode, out, err)


def launch(words: Sequence[Any], count: int = 2, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run a program in several processes on the CPU, with the variables that torchrun gives to each.

    The output is that of all, one after the other, and the exit code the largest.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        Process(words, {**os.environ, **{k: str(v) for k, v in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()}})
        for rank in range(count)
    ]
    try:
        ended = [process.communicate(timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    code = max(abs(process.returncode or 0) for process in started)
    return subprocess.CompletedProcess([*words], code, *("".join(own) for own in zip(*ended, strict=True)))


def _main(words: Sequence[str], environment: Mapping[str, str], cwd: Path, said: str) -> None:
    """What the child does: what `python` does with these words."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(said, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    sys.stdin = open(os.devnull)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    paths = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [path for path in paths if path and path not in sys.path]
    try:
        if words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            sys.modules["__main__"] = module = ModuleType("__main__")
            exec(compile(words[1], "<string>", "exec"), module.__dict__)
        elif words[0] == "-m":
            sys.argv = [*words[1:]]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [*words]
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
