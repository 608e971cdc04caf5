"""HDF5's process (featprobe.cache.legacy), forked from a server that has loaded h5py, which takes most of its time.

The server is a bare interpreter with the environment of that process, and each question gets a child of its own, with
the limits that it sets itself. What a test says about how the process is started, or about the limits that it
inherits, needs a new one.
"""

import fcntl
import importlib.util
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CHILD = Path(__file__).parents[1] / "featprobe" / "cache" / "hdf5_child.py"
QUIET = {"HDF5_PLUGIN_PRELOAD": "::", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class _Forked:
    """A running child, with the part of `subprocess.Popen` that featprobe.cache.legacy uses."""

    def __init__(self, server: socket.socket, words: Sequence[str], stdin: Any, env: Mapping[str, str]) -> None:
        assert [*words[:3]] == [sys.executable, "-P", str(CHILD)]
        assert QUIET.items() <= env.items()
        answer, out = os.pipe()
        self._keeper, keepers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with keepers:
            handles = [stdin.fileno(), out, int(words[4]), keepers.fileno()]
            socket.send_fds(server, [" ".join(words[3:]).encode()], handles)
        os.close(out)
        self.stdout = open(answer, "rb")
        self.pid = int(self._keeper.recv(20))
        self._code: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, or the signal that ended it as a negative number."""
        if self._code is None:
            if not select.select([self._keeper], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("HDF5's process", timeout or 0.0)
            self._code = int(self._keeper.recv(20))
        return self._code

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)  # the keeper reaps it later: its number is still its own

    def __enter__(self) -> "_Forked":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        self.stdout.close()
        self._keeper.close()


@contextmanager
def forked() -> Iterator[None]:
    """Let featprobe.cache.legacy fork its processes from a server, until the context ends."""
    from featprobe.cache import legacy

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        server = subprocess.Popen([sys.executable, "-P", __file__], stdin=theirs, env=os.environ | QUIET)

    def started(words: Sequence[str], *, stdin: Any, env: Mapping[str, str], **_: Any) -> _Forked:
        return _Forked(ours, words, stdin, env)

    plain = legacy.subprocess
    known = {name: getattr(plain, name) for name in ("PIPE", "DEVNULL", "TimeoutExpired")}
    legacy.subprocess = SimpleNamespace(Popen=started, **known)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        legacy.subprocess = plain  # type: ignore[attr-defined]
        ours.close()
        server.wait()


def _serve() -> None:
    """Fork a keeper for each question, until nobody can ask."""
    spec = importlib.util.spec_from_file_location("hdf5_child", CHILD)
    assert spec and spec.loader
    child = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(child)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers end by themselves
    asked = socket.socket(fileno=0)
    while True:
        words, handles, *_ = socket.recv_fds(asked, 100, 4)
        if not words:
            return
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _keep(child, words.decode().split(), handles)
        for handle in handles:
            os.close(handle)


def _keep(child: Any, words: list[str], handles: list[int]) -> None:
    """Fork the child, report its number and its end, and reap it once the answer is done with."""
    *inputs, own = (fcntl.fcntl(handle, fcntl.F_DUPFD, 1000) for handle in handles)
    pid = os.fork()
    if not pid:
        _answer(child, words, inputs)
    os.closerange(0, own)
    with socket.socket(fileno=own) as asker:
        asker.send(str(pid).encode())
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert ended
        asker.send(str(ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status).encode())
        asker.recv(1)
    os._exit(0)


def _answer(child: Any, words: list[str], inputs: list[int]) -> None:
    """What `python hdf5_child.py` does with these words."""
    code, number = 1, int(words[1])
    try:
        stdin, stdout, file = inputs
        places = {0: stdin, 1: stdout, 2: os.open(os.devnull, os.O_WRONLY), number: file}
        for place, handle in places.items():
            os.dup2(handle, place)
        os.closerange(3, number)
        os.closerange(number + 1, 1100)
        child.main(words[0], number)
        code = 0
    finally:
        os._exit(code)


if __name__ == "__main__":
    _serve()
