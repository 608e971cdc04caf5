"""What a bug report needs: versions, device, disk, hub, workspace and environment, in words.

Nothing here imports torch: a child process does, so that this works where torch is broken or missing.
"""

import getpass
import mmap
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from importlib import metadata
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit

from featprobe import __version__
from featprobe.cache import WHOLE, read_states
from featprobe.errors import FeatprobeError, FileKindError, counted
from featprobe.io.disk import parse_json, read_regular
from featprobe.io.locks import lock_bytes
from featprobe.io.plugins import BACKBONES, DATASETS, HEADS, names_in
from featprobe.io.texts import without_login
from featprobe.machine import available_memory, free_disk, human_bytes, usable_cores
from featprobe.stages.upkeep.saved_heads import RESULTS, head_folders, row_of
from featprobe.stages.workspace import CONFIG, Workspace

HUB, HUB_SECONDS = "https://huggingface.co", 4.0
TORCH_SECONDS = 120.0
CHILD = Path(__file__).with_name("device_child.py")
MATTERS = re.compile(
    r"FEATPROBE_\w+|HF_\w+|HUGGINGFACE_\w+|CUDA_\w+|NVIDIA_VISIBLE_DEVICES|PYTORCH_\w+|TORCH_\w+|OMP_\w+|MKL_\w+"
    r"|OPENBLAS_\w+|KMP_\w+|RANK|LOCAL_RANK|WORLD_SIZE|SLURM_JOB_ID|TMPDIR|\w+_proxy|\w+_PROXY"
)
"""Names of environment variables that change what featprobe does."""
SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|PROXY|AUTH|CREDENTIAL", re.IGNORECASE)
"""Names of variables whose values are never shown."""
SET = re.compile(r"""(\bdata\.|'data', )("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[\w-]+)""")
"""A data set in a message on featprobe.toml, as `data.NAME` or `('data', 'NAME')`."""
FOR_WORK = ("dev", "docs")  # extras of those who change featprobe
IN_MEMORY = 4  # bytes that a byte of results takes at most, when its lines are parsed


@dataclass(frozen=True)
class Fact:
    """One line of a report. part: the heading that it stands under. unusable: whether featprobe can't work so."""

    part: str
    name: str
    value: str
    unusable: bool = False


def examine(root: Path, *, offline: bool = False) -> list[Fact]:
    """Facts about this installation, this machine and the workspace in a folder. offline: do not ask the hub.

    Home folders are shortened to ~, the name of the user to USER; names of data sets, logins in addresses and values
    of secret variables do not occur. It writes one temporary file into the workspace, and removes it.
    """
    facts = [*_versions(), *_device(), *_machine(), *_disk(root), *_hub(offline), *_workspace(root), *_environment()]
    return [Fact(fact.part, fact.name, private(fact.value), fact.unusable) for fact in facts]


def private(text: str, home: str | None = None, user: str | None = None) -> str:
    """A text without the user's home and name, and without logins in web addresses.

    >>> private("/home/jane/scans and /data/jane/x", "/home/jane", "jane")
    '~/scans and /data/USER/x'
    """
    text = without_login(text)
    home = home or os.path.expanduser("~")
    with suppress(OSError, KeyError):
        user = user or getpass.getuser()
    if len(home) > 1:
        text = re.sub(rf"{re.escape(home.rstrip('/'))}(?![\w.-])", "~", text)
    return re.sub(rf"(?<![\w.-]){re.escape(user)}(?![\w-])", "USER", text) if user and user != "root" else text


# ---- the installation ------------------------------------------------------------------------------------------------


def _versions() -> Iterator[Fact]:
    part = "versions"
    yield Fact(part, "featprobe", __version__)
    yield Fact(part, "python", f"{platform.python_version()} ({platform.python_implementation()})")
    yield Fact(part, "system", platform.platform())
    needed, extras = _requirements()
    if not needed:
        yield Fact(part, "packages", "featprobe is not installed as a package, so its requirements are not known")
    for name in needed:
        found = _version(name)
        yield Fact(part, name, found or "MISSING", not found)
    for name, extra in extras.items():
        yield Fact("optional packages", name, _version(name) or f"not installed (extra {extra})")
    for group in (DATASETS, BACKBONES, HEADS):  # names alone: nothing of other packages is imported
        yield Fact("added by other packages", group.rpartition(".")[2], ", ".join(names_in(group)) or "none")


def _requirements() -> tuple[list[str], dict[str, str]]:
    """Names of the packages that featprobe needs, and of those that an extra brings, with the extra."""
    try:
        lines = metadata.requires("featprobe") or []
    except metadata.PackageNotFoundError:
        lines = []
    needed, extras = [], {}
    for line in lines:
        name = re.match(r"[\w.-]+", line)
        extra = re.search(r"extra\s*==\s*[\"']([\w-]+)", line)
        if name and not extra:
            needed.append(name[0])
        elif name and extra and extra[1] not in FOR_WORK:
            extras[name[0]] = extra[1]
    return needed, {name: extra for name, extra in extras.items() if name not in needed}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _device() -> Iterator[Fact]:
    part = "device"
    try:
        asked = subprocess.run(
            [sys.executable, "-P", str(CHILD)], capture_output=True, text=True, check=False, timeout=TORCH_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        yield Fact(part, "torch", f"UNUSABLE: {type(error).__name__}: importing it did not end", True)
    else:
        try:
            found = parse_json(asked.stdout.splitlines()[-1])
            yield from (Fact(part, name, str(value)) for name, value in found.items())
        except (ValueError, IndexError, AttributeError):
            said = asked.stderr.strip().splitlines()[-1:] or [f"its process ended with {asked.returncode}"]
            yield Fact(part, "torch", f"UNUSABLE: {said[0]}", True)
    with suppress(OSError):
        yield Fact(part, "driver", Path("/proc/driver/nvidia/version").read_text().splitlines()[0])


# ---- the machine -----------------------------------------------------------------------------------------------------


def _machine() -> Iterator[Fact]:
    yield Fact("machine", "cores", f"{usable_cores()} usable of {os.cpu_count()}")
    yield Fact("machine", "memory", f"{human_bytes(available_memory())} available")


def _disk(root: Path) -> Iterator[Fact]:
    part, place = "disk", root.resolve()
    while not os.path.isdir(place):  # also below a folder that may not be read
        place = place.parent
    yield Fact(part, "folder", f"{root.resolve()}{'' if os.path.isdir(root) else ' (not there yet)'}")
    yield Fact(part, "file system", _file_system(place))
    yield Fact(part, "free", human_bytes(free_disk(place)))
    try:
        with tempfile.NamedTemporaryFile(dir=place) as stream:
            stream.write(bytes(4096))
            stream.flush()
            for name, (attempt, unusable) in _ATTEMPTS.items():
                said = _outcome(attempt, Path(stream.name))
                yield Fact(part, name, said or "works", bool(said) and unusable)
    except OSError as error:
        yield Fact(part, "writing", f"UNUSABLE: {error.strerror}", True)


def _outcome(attempt: Callable[[Path], None], path: Path) -> str:
    """What an attempt on a file is refused with; "" where it works."""
    try:
        attempt(path)
    except (OSError, ValueError) as error:
        return f"does not work: {getattr(error, 'strerror', None) or error}"
    return ""


def _map(path: Path) -> None:
    with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        _ = mapped[0]


def _direct(path: Path) -> None:
    if not hasattr(os, "O_DIRECT"):
        raise OSError(0, "this system has none")
    handle = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        os.preadv(handle, [mmap.mmap(-1, 4096)], 0)
    finally:
        os.close(handle)


def _lock(path: Path) -> None:
    handle = os.open(path, os.O_RDWR)
    try:
        lock_bytes(handle, wait=False)
    finally:
        os.close(handle)


_ATTEMPTS: Mapping[str, tuple[Callable[[Path], None], bool]] = {
    "memory maps": (_map, True),
    "O_DIRECT": (_direct, False),  # else features are read through the page cache
    "locks": (_lock, True),
}
"""What features and results are read and written with, and whether featprobe can't do without it."""


def _file_system(place: Path) -> str:
    """The kind of the file system that a folder lies on; "not known" where the system does not say."""
    best, kind = "", "not known"
    with suppress(OSError):
        for line in Path("/proc/self/mounts").read_text(errors="surrogateescape").splitlines():
            _, mounted, own, *_ = line.split(" ")
            mounted = mounted.replace("\\040", " ")
            if place.is_relative_to(mounted) and len(mounted) >= len(best):
                best, kind = mounted, own
    return kind


def _hub(offline: bool) -> Iterator[Fact]:
    part, address = "model hub", os.environ.get("HF_ENDPOINT") or HUB
    host = None
    with suppress(ValueError):
        host = urlsplit(address).hostname
    yield Fact(part, "address", host or "not a web address")
    if offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        yield Fact(part, "reachable", f"not asked ({'--offline' if offline else 'HF_HUB_OFFLINE is set'})")
        return
    said: list[str] = []
    asking = threading.Thread(target=lambda: said.append(_asked(address)), daemon=True)
    asking.start()
    asking.join(HUB_SECONDS + 1)  # looking up a name has no time limit of its own
    yield Fact(part, "reachable", said[0] if said else f"no answer in {HUB_SECONDS + 1:.0f} s")


def _asked(address: str) -> str:
    """Whether a web address answers."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=HUB_SECONDS):
            return "yes"
    except HTTPError as error:
        return f"yes, with status {error.code}"
    except (OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        return f"no: {getattr(reason, 'strerror', None) or reason}"


# ---- the workspace ---------------------------------------------------------------------------------------------------


def _workspace(root: Path) -> Iterator[Fact]:
    part = "workspace"
    try:
        workspace = Workspace(root)
    except FeatprobeError as error:
        faults = SET.sub(r"\1SET", " ".join(str(error).split()))
        yield Fact(part, CONFIG, f"UNUSABLE: {faults}", True)
        return
    named = {name: len(entries) for name, entries in workspace.config.items()}
    there = f"data sets: {named.get('data', 0)}, backbones: {named.get('backbones', 0)}"
    yield Fact(part, CONFIG, there if os.path.exists(root / CONFIG) else "none")
    try:
        yield Fact(part, "caches", _caches(workspace))
        heads = head_folders(workspace)
        yield Fact(part, "heads", f"{len(heads)}, {human_bytes(sum(head.bytes for head in heads))}")
        yield Fact(part, "results", _results(workspace.probes / RESULTS))
    except (OSError, FileKindError) as error:
        yield Fact(part, "contents", f"UNUSABLE: {error}", True)


def _caches(workspace: Workspace) -> str:
    files, size, incomplete, broken = workspace.cache_files(), 0, 0, 0
    for path in files:
        try:
            _, states, _ = read_states(path)
            size += path.stat().st_size
            incomplete += int((states != WHOLE).any())
        except (FeatprobeError, OSError):
            broken += 1
    said = [f"{len(files)}, {human_bytes(size)}"]
    said += [f"{counted(incomplete, 'is', 'are')} incomplete: run the same `featprobe extract` again"] * bool(
        incomplete
    )
    said += [f"{broken} can't be opened: featprobe cache ls says why"] * bool(broken)
    return "; ".join(said)


def _results(path: Path) -> str:
    if not os.path.lexists(path):
        return "none"
    lines = [line for line in read_regular(path, available_memory() // IN_MEMORY).split(b"\n") if line.strip()]
    rows = sum(row_of(line) is not None for line in lines)
    faults = len(lines) - rows
    return f"{counted(rows, 'row')}" + (
        f"; {counted(faults, 'line')} without a row: see `featprobe compare`" * bool(faults)
    )


def _environment() -> Iterator[Fact]:
    for name in sorted(os.environ):
        if MATTERS.fullmatch(name):
            yield Fact("environment", name, "set" if SECRET.search(name) else os.environ[name])


def as_json(facts: list[Fact]) -> dict[str, object]:
    """The facts of each part by their names, and the names of those that are unusable."""
    parts: dict[str, dict[str, str]] = {}
    for fact in facts:
        parts.setdefault(fact.part, {})[fact.name] = fact.value
    return {**parts, "unusable": [f"{fact.part}: {fact.name}" for fact in facts if fact.unusable]}
