"""Every command that writes, run in a child process on a tiny set, with writes that are counted, refused or killed.

A write is any call that can change what lies below the workspace: a file opened for writing, bytes put into it, a sync,
a rename, a link, a new folder, a removal. The set is twelve images of 32x32 pixels under timm's smallest network with
random weights; a run takes about a second. The workspace lies at one path for all runs, since caches are named by the
path of their set.
"""

import builtins
import errno
import gc
import io
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from itertools import product
from pathlib import Path
from typing import Any

from kill9 import write_set

CONTEXT = multiprocessing.get_context("forkserver")  # the slow imports are done once, for all children
CONTEXT.set_forkserver_preload([
    "featprobe.cli.main", "featprobe.stages.extraction.make_cache", "featprobe.stages.training.finetune",
    "featprobe.stages.study.study", "featprobe.stages.study.run_study", "featprobe.stages.study.grid",
    "featprobe.stages.study.cluster", "featprobe.stages.comparison.compare", "featprobe.stages.inspection.inspect",
    "featprobe.stages.inspection.lines", "featprobe.stages.recording.rescore", "featprobe.stages.predict",
    "featprobe.stages.export.export", "featprobe.stages.try_out", "featprobe.stages.upkeep.check",
    "featprobe.stages.upkeep.convert", "featprobe.stages.upkeep.describe", "featprobe.stages.upkeep.caches",
    "featprobe.stages.upkeep.saved_heads", "featprobe.stages.upkeep.starter", "featprobe.datasets.generated",
    "featprobe.backbones.backbone", "timm", "h5py", "onnxscript", "onnxruntime", "imagecodecs._png",
    "matplotlib.backends.backend_svg", "pandas.core.arrays.arrow.extension_types", "pandas.io.formats.csvs",
    "pyarrow.pandas_compat", "pyarrow.parquet", "pydantic.dataclasses", "torch.utils.serialization",
])  # fmt: skip
IMAGES, SIDE = 12, 32
ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO}
REMOVALS = ("unlink", "remove", "rmdir")
BYTES = ("write", "pwrite", "pwritev", "sendfile", "copy_file_range", "ftruncate", "posix_fallocate")
SYNCS = ("fsync", "fdatasync")
RENAMES = ("replace", "rename", "link")
SECONDS = 300  # that a command may take
ARCHIVE = Path(__file__).parents[1] / "tests" / "archives" / "images-8775eda"
BRIEF = ("--iterations", "2", "--batch-size", "2", "--quiet", "--device", "cpu")
STUDY = """data = ["set"]
backbones = ["test_efficientnet_gn-random"]
regimes = ["frozen"]
sizes = ["32x32"]
seeds = 2
show = 1
[train.all]
iterations = 2
batch_size = 2
"""
MODEL = "test_efficientnet_gn"  # timm's smallest; few tensors, and so few writes of a checkpoint
EXTRACT = ["extract", "--backbone", MODEL, "--random-init", "--data", "set", "--size", "32x32", "--batch-size", "4",
           "--workers", "1", "--quiet", "--device", "cpu"]  # fmt: skip
PROBE = ["probe", "--data", "set", "--seeds", "2", "--show", "1", *BRIEF]
INSPECT = ["inspect", "{head}", "--false-calls", "1", "--out", "tables", "--quiet", "--device", "cpu"]
SLURM = {
    "sbatch": 'echo $(($(cat "$0.taken") + 1)) > "$0.taken"; echo Submitted batch job $(cat "$0.taken")',
    "squeue": 'for i in $(seq $(cat "${0%squeue}sbatch.taken")); do for t in 0 1; do echo ${i}_$t None; done; done',
    "scontrol": "echo MaxArraySize = 1000",
    "srun": "exit 1",
}
"""Programs of a SLURM that takes every job, each an array of two at most, and runs none."""
HEAD = "{head}"  # stands for the folder of the first head
COMMANDS: Mapping[str, tuple[tuple[str, ...], list[str]]] = {
    "extract": ((), EXTRACT),
    "extract again": (("extract", "damage", "cache verify"), EXTRACT),
    "extract changed": (("extract", "change"), EXTRACT),
    "extract int8": ((), [*EXTRACT, "--dtype", "int8"]),
    "extract pooled": ((), [*EXTRACT, "--store", "pooled"]),
    "plan": ((), ["plan", *EXTRACT[1:]]),
    "probe": (("extract",), PROBE),
    "probe again": (("extract", "probe"), PROBE),
    "finetune": (("extract",), ["finetune", "--data", "set", "--seeds", "1", "--workers", "1", *BRIEF]),
    "study": (("extract",), ["study", "study.toml"]),
    "study --launcher slurm": (("extract", "slurm"), ["study", "study.toml", "--launcher", "slurm"]),
    "compare": (("extract", "probe"), ["compare", "--quiet"]),
    "inspect": (("extract", "probe"), INSPECT),
    "inspect --rescore": (("extract", "probe"), [*INSPECT, "--rescore"]),
    "predict": (("extract", "probe"), ["predict", HEAD, "set/images", "--out", "found", "--quiet", "--device", "cpu"]),
    "export": (("extract", "probe"), ["export", HEAD, "--out", "model.onnx", "--test-images", "1"]),
    "probes ls": (("extract", "probe"), ["probes", "ls"]),
    "probes rm": (("extract", "probe"), ["probes", "rm", "set", "--yes"]),
    "init": ((), "--workspace new init set --quiet".split()),
    "try": ((), ["try", "set", "--backbone", f"{MODEL}-random", "--size", "32x32", "--minutes", "1", "--yes",
                 "--no-open", "--quiet", "--device", "cpu"]),
    "data info": ((), "data info set".split()),
    "data split": ((), "data split set --out split.csv --quiet --workers 1".split()),
    "data convert": ((), "data convert set --out coco --quiet".split()),
    "data convert --link": ((), "data convert set --out coco --link --quiet".split()),
    "data check": ((), "data check set --html check.html --quiet --workers 1".split()),
    "data show": ((), "data show set --out sheet.png".split()),
    "data make": ((), "data make xray --images 12 --size 32x32".split()),
    "cache ls": (("extract",), ["cache", "ls"]),
    "cache info": (("extract",), "cache info set".split()),
    "cache verify": (("extract", "damage"), "cache verify set --quiet".split()),
    "cache upgrade": (("archive",), "cache upgrade embedded --quiet".split()),
    "cache audit": (("extract",), "cache audit set --seeds 1 --iterations 2 --quiet --device cpu".split()),
    "cache rm": (("extract",), "cache rm set --yes".split()),
    "backbones": ((), ["backbones"]),
    "config": ((), ["config"]),
    "doctor": ((), ["doctor", "--offline"]),
}  # fmt: skip
"""Command -> what must have run before it, and its words. Those that write nothing are here to show it."""


@dataclass(frozen=True)
class Fault:
    """What becomes of a write, counted from 0: an error of this name (ENOSPC also of all after it), or SIGKILL."""

    at: int = -1
    kind: str = ""


@dataclass(frozen=True)
class Ran:
    """How a command ended: its exit code (negative: the signal), what it printed, the writes that it came to."""

    code: int | None
    out: str
    err: str
    writes: tuple[str, ...]

    @property
    def refused(self) -> bool:
        """Whether it ended in words of ours."""
        said = self.err.rpartition("\r")[2]
        words = any(text in said for text in ("featprobe: ", "failed: ", "not marked as missing: "))
        return self.code in (1, 3) and "Traceback" not in self.err and words


class _Writes:
    """Counts the writes of this process below a folder, notes each in a file, and lets one of them fail."""

    def __init__(self, root: Path, log: Path, fault: Fault) -> None:
        self.root, self.fault, self.count, self.lock = str(root), fault, 0, threading.Lock()
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.write = os.write

    def note(self, what: str, target: Any, source: Any = None) -> None:
        """Count a write to a path or a descriptor; raises OSError where it is to fail. A full disk still removes.

        source: the path that gets the name of the target.
        """
        handle = isinstance(target, int)
        path = os.readlink(f"/proc/self/fd/{target}") if handle else os.path.abspath(os.fsdecode(target))
        if not path.startswith(self.root):
            return
        with self.lock:
            number, self.count = self.count, self.count + 1
            own = "" if source is None else f"\t{os.path.relpath(os.fsdecode(source), self.root)}"
            self.write(self.log, f"{what} {os.path.relpath(path, self.root)}{own}\n".encode())
        if number < self.fault.at or self.fault.at < 0:
            return
        if self.fault.kind == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        if what in REMOVALS and self.fault.kind == "ENOSPC":
            return
        if number == self.fault.at or self.fault.kind == "ENOSPC":
            code = ERRORS[self.fault.kind]
            raise OSError(code, os.strerror(code), path)

    def watch(self) -> None:
        """Put itself before every call that writes."""
        for name in (*BYTES, *SYNCS):
            self._before(os, name, lambda handle, *_, **__: (handle if isinstance(handle, int) else handle.fileno(),))
        for name in RENAMES:
            self._before(os, name, lambda source, target, *_, **__: (target, source))
        self._before(os, "symlink", lambda source, target, *_, **__: (target,))
        self._before(os, "mkdir", lambda path, *_, **__: (path,))
        for name in REMOVALS:
            self._before(os, name, lambda *words, **named: (_removed(*words, **named),))
        writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
        self._before(os, "open", lambda path, flags, *_, **__: (path if flags & writing else "/",))
        plain = io.open

        def opened(file: Any, mode: str = "r", buffering: int = -1, *more: Any, **named: Any) -> Any:
            if not set(mode) & set("wax+") or not named.get("closefd", True):
                return plain(file, mode, buffering, *more, **named)
            if not isinstance(file, int):
                self.note("open", file)
            raw = _Raw(file, mode.replace("b", "").replace("t", ""), opener=named.pop("opener", None))
            raw.writes = self
            if buffering == 0:
                return raw
            stream = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return stream if "b" in mode else io.TextIOWrapper(stream, *more, **named)

        io.open = builtins.open = opened  # type: ignore[assignment]

    def _before(self, owner: Any, name: str, noted: Callable[..., tuple[Any, ...]]) -> None:
        """Note each call of a function first. noted: what `note` gets, by the arguments of the call."""
        plain = getattr(owner, name)

        @wraps(plain)
        def call(*words: Any, **named: Any) -> Any:
            self.note(name, *noted(*words, **named))
            return plain(*words, **named)

        setattr(owner, name, call)


def _removed(path: Any, *_: Any, dir_fd: int | None = None, **__: Any) -> Any:
    """What is removed; "/" for temporary files, since those that can't be removed stay."""
    folder = "" if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
    whole = os.path.join(folder, os.fsdecode(path))
    temporary = any(part.endswith(".tmp") for part in Path(whole).parts)
    return "/" if temporary or Path(os.path.abspath(whole)).is_relative_to(os.environ["TMPDIR"]) else whole


class _Raw(io.FileIO):
    """A file whose writes are counted, also those of the buffer before it."""

    writes: _Writes

    def write(self, data: Any) -> int:
        """Write what the buffer has gathered."""
        self.writes.note("stream", self.fileno())
        return super().write(data)


def _main(root: Path, words: Sequence[str], said: Path, fault: Fault, umask: int) -> None:
    """What a child does: one command, its output in files."""
    gc.freeze()  # what was imported for all children is not looked through again and again
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(said / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    os.chdir(root)
    os.umask(umask)
    os.environ["TMPDIR"] = str(root / "tmp")
    os.environ["PATH"] = f"{root / 'programs'}:{os.environ['PATH']}"
    from featprobe.cli.main import main

    _Writes(root, said / "writes", fault).watch()
    main(words)


def unsynced(writes: Sequence[str]) -> list[str]:
    """What a loss of power could take of what a command wrote, by its writes in order.

    A file, and all files of a folder, must be on the disk before it gets its name, its name when the command ends, and
    both before a line is appended to a file of lines, which may name them. Files in the folder of temporary files,
    and those that are removed again, don't count.
    """
    bytes_of, names, faults = set[str](), set[str](), list[str]()
    for line in writes:
        what, _, paths = line.partition(" ")
        path, _, source = paths.partition("\t")
        if path.startswith("tmp/"):
            continue
        if what in BYTES or what == "stream":
            waiting = (bytes_of | names) - {path} if path.endswith(".jsonl") else ()
            faults += [f"{path} gets a line before {other} is on the disk" for other in sorted(waiting)]
            bytes_of.add(path)
        elif what in SYNCS:
            bytes_of.discard(path)
            names = {name for name in names if os.path.dirname(name) != ("" if path == "." else path)}
        elif what in REMOVALS:
            bytes_of, names = ({own for own in waiting if not _lies_at(own, path)} for waiting in (bytes_of, names))
        elif what in (*RENAMES, "symlink", "mkdir"):
            named = {own for own in bytes_of | (names - {source}) if source and _lies_at(own, source)}
            faults += [f"{path} gets its name before {own} is on the disk" for own in sorted(named)]
            moved = {path + own[len(source) :] for own in named & bytes_of}
            bytes_of, names = bytes_of - named | moved, names - named - {source} | {path}
    left = {own for own in bytes_of | names if ".tmp" not in own and not own.endswith(" (deleted)")}
    return faults + [f"{path} is not on the disk at the end" for path in sorted(left)]


def _lies_at(path: str, place: str) -> bool:
    """Whether a path is a place, or below it."""
    return path == place or path.startswith(f"{place}/")


class Bench:
    """A workspace at one path, and its states before each command. said: where children print, outside of it."""

    def __init__(self, folder: Path) -> None:
        self.root, self.states, self.said = folder / "work", folder / "states", folder / "said"
        for made in (self.root, self.states, self.said):
            made.mkdir(parents=True)
        write_set(self.root / "set", IMAGES, (SIDE, SIDE))
        (self.root / "study.toml").write_text(STUDY)
        (self.root / "tmp").mkdir()
        self.changes = {"damage": self._damage, "change": self._change, "archive": self._archive, "slurm": self._slurm}
        shutil.copytree(self.root, self.states / "start", symlinks=True)

    def before(self, name: str) -> None:
        """Bring the workspace to the state before a command."""
        needed = COMMANDS[name][0]
        state = self.states / ("-".join(needed) or "start")
        if not state.exists():
            self._become(self.states / "start")
            for own in needed:
                if own in self.changes:
                    self.changes[own]()
                elif (ran := self.run(own)).code not in (0, 3):
                    raise RuntimeError(f"{own}: {ran.code} {ran.err[-2000:]}")
            shutil.copytree(self.root, state, symlinks=True)
        self._become(state)

    def _become(self, state: Path) -> None:
        shutil.rmtree(self.root)
        shutil.copytree(state, self.root, symlinks=True)

    def _damage(self) -> None:
        """Flip bits of the last rows of the features, so that `cache verify` has something to mark."""
        from featprobe.cache import Cache, read_contents

        (path,) = self.root.glob("cache/*/*.h5")
        cache = Cache(path, read_contents(path))
        level = cache.levels[0]
        last = cache.read_row(len(cache) - 1, level).tobytes()
        whole = path.read_bytes()
        assert whole.count(last) == 1
        path.write_bytes(whole.replace(last, bytes(byte ^ 1 for byte in last)))

    def _change(self) -> None:
        """Remove an image, so that `extract` copies the rows of the others into a new file."""
        for folder in ("images", "masks"):
            (self.root / "set" / folder / "part03.png").unlink()

    def _archive(self) -> None:
        """A workspace of an earlier state, with a cache of an older version."""
        shutil.copytree(ARCHIVE / "cache", self.root / "cache")

    def _slurm(self) -> None:
        """Programs of SLURM."""
        (self.root / "programs").mkdir()
        for name, script in SLURM.items():
            path = self.root / "programs" / name
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(0o755)
        (self.root / "programs" / "sbatch.taken").write_text("0\n")

    def start(self, name: str, fault: Fault = Fault(), umask: int = 0o022) -> Any:
        """Start a command in a child."""
        for path in self.said.iterdir():
            path.unlink()
        words = [self.head() if word == HEAD else word for word in COMMANDS[name][1]]
        child = CONTEXT.Process(target=_main, args=(self.root, words, self.said, fault, umask))
        child.start()
        return child

    def ended(self, child: Any) -> Ran:
        """Wait for a child's end."""
        child.join(SECONDS)
        if child.exitcode is None:
            child.kill()
            child.join()
            return Ran(None, "", "it did not end", ())
        out, err, writes = (
            (self.said / name).read_text(errors="replace") if (self.said / name).exists() else ""
            for name in ("out", "err", "writes")
        )
        return Ran(child.exitcode, out, err, tuple(writes.splitlines()))

    def run(self, name: str, fault: Fault = Fault(), umask: int = 0o022) -> Ran:
        """Run a command to its end."""
        return self.ended(self.start(name, fault, umask))

    def head(self) -> str:
        """The folder of the first head of the workspace."""
        return str(sorted(self.root.glob("probes/*/*/*/seed0"))[0].relative_to(self.root))

    def leftovers(self) -> list[str]:
        """Files of processes that are gone."""
        found = [*self.root.rglob(".*.tmp"), *self.root.rglob("*.tmp"), *(self.root / "tmp").iterdir()]
        return sorted({path.relative_to(self.root).as_posix() for path in found})

    def files(self) -> dict[str, bytes]:
        """Every file of the workspace but caches, what is kept of looks and logs of runs, which hold times."""
        return {
            path.relative_to(self.root).as_posix(): path.read_bytes()
            for path in sorted(self.root.rglob("*"))
            if path.is_file() and path.suffix not in (".h5", ".look", ".jsonl", ".lock")
        }

    def scores(self) -> list[Any]:
        """What result rows say of each head, in order of folders; the last row of a folder counts."""
        path = self.root / "probes" / "results.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        last = {row["folder"]: (row["seed"], row["val"], row["test"]) for row in rows}
        return sorted(last.items())

    def jobs(self) -> list[Any]:
        """What has been handed over to SLURM, in order of its keys, and whether the jobs find it."""
        path = self.root / "jobs" / "jobs.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        last = {row["what"]: path.with_name(f"{row['job']}_submitted.pkl").is_file() for row in rows}
        return sorted(last.items())

    def features(self, *, damaged: bool = False) -> list[bytes]:
        """The rows of every cache, with their states. damaged: allow damaged rows, which are named as such."""
        from featprobe.cache import WHOLE, Cache, read_contents
        from featprobe.errors import CacheError

        found = []
        for path in sorted(self.root.glob("cache/*/*.h5")):
            cache = Cache(path, read_contents(path))
            found.append(cache.done.tobytes())
            for level, row in product(cache.levels, (cache.done == WHOLE).nonzero()[0].tolist()):
                try:
                    found.append(cache.read_row(row, level).tobytes())
                except CacheError:
                    if not damaged:
                        raise
                    found.append(b"damaged")
        return found

    def rows(self) -> set[bytes]:
        """The sound rows of every cache that can be read, whatever file they are in."""
        from featprobe.cache import WHOLE, Cache, read_contents
        from featprobe.errors import CacheError

        found = set()
        for path in sorted(self.root.glob("cache/*/*.h5")):
            with suppress(CacheError):
                cache = Cache(path, read_contents(path))
                for level, row in product(cache.levels, (cache.done == WHOLE).nonzero()[0].tolist()):
                    with suppress(CacheError):
                        found.add(cache.read_row(row, level).tobytes())
        return found

    def result(self) -> tuple[Any, ...]:
        """What a command has made, less what differs from run to run: names of files, scores, jobs, features.

        Without the picture sheets of heads, which a study draws once, after the row, and what submitit writes.
        """
        spared = [name for name in self.files() if name.endswith("/sheet.png") or name.startswith("jobs/")]
        files = sorted(self.files().keys() - spared)
        return files, self.scores(), self.jobs(), self.features(damaged=True)
