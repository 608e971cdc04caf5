"""The resources of this machine: memory and disk in bytes, cores."""

import ctypes
import os
import re
import resource
import shutil
import sys
from contextlib import suppress
from math import ceil
from pathlib import Path

from featprobe.errors import BackboneError

CONTROL_GROUPS = Path("/sys/fs/cgroup")
OF_GLIBC = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"}  # variables that set the same
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h; other C libraries have no mallopt
KEPT = 1 << 28  # bytes
DEVICES = ("cuda", "mps", "cpu")
"""Kinds of devices that compute, the best first."""
DRIVERS = ("nvidia", "nvhost", "nvmap", "nvgpu", "kfd", "dxg")
"""What the names of files in /dev begin with that lead to a GPU on Linux."""


def check_device(name: str) -> None:
    """Raise BackboneError for what is no name of a device, as cpu or cuda:1; whether it is here, torch knows."""
    if not re.fullmatch(rf"({'|'.join(DEVICES)})(:\d{{1,3}})?", name):
        raise BackboneError(no_device(name, f"{', '.join(DEVICES)}, or the second GPU as cuda:1"))


def lacks_accelerator(devices: Path = Path("/dev")) -> bool:
    """Whether this machine surely has nothing but its CPU that torch computes on: a Linux without a driver's files.

    Those are NVIDIA's (nvidia0, on boards nvhost or nvmap), AMD's (kfd), and that of Windows' subsystem (dxg).
    """
    try:
        names = os.listdir(devices)
    except OSError:
        return False
    return sys.platform == "linux" and not any(name.startswith(DRIVERS) for name in names)


def check_here(name: str) -> None:
    """Raise BackboneError for a device that surely is not here; torch, which takes seconds to load, knows the others.

    name: that of a device.
    """
    if name.partition(":")[0] != "cpu" and lacks_accelerator():
        raise BackboneError(no_device(name, "cpu"))


def no_device(name: str, present: str) -> str:
    """The text of an error. present: the devices that are here."""
    to_do = "Omit --device to use the best available device."
    return f"There is no device {name!r} here.\n  wanted  one of {present}\n{to_do}"


def launched() -> tuple[int, int]:
    """(number of this process from 0, number of processes) from torchrun; (0, 1) without torchrun."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


DEVICE_ERRORS = (
    "CUDA error", "CUDA driver error", "HIP error", "NCCL error", "cuDNN error", "CUBLAS_STATUS", "CUDNN_STATUS",
    "CUSOLVER_STATUS", "cusolver error",
)  # fmt: skip
"""Words in what torch says of errors that come from a device. It says "CUDA out of memory" of its own memory there."""


def is_of_device(error: BaseException) -> bool:
    """Whether an error comes from a device that computes, not from what it computed.

    >>> [is_of_device(RuntimeError(text)) for text in ("CUDA error: unspecified launch failure", "shapes differ")]
    [True, False]
    """
    named = type(error).__name__ == "AcceleratorError"  # of torch from 2.8 on
    return isinstance(error, RuntimeError) and (named or any(words in str(error) for words in DEVICE_ERRORS))


def available_memory(group: Path = CONTROL_GROUPS) -> int:
    """Bytes of main memory that this process can use without swapping, the page cache counted as free.

    It is the least of: the machine's available memory (half of all memory where the system does not report it), the
    rest of the limits of its control groups (v2 and v1), and the rest of RLIMIT_AS and RLIMIT_DATA. group: the folder
    where control groups are mounted.
    """
    return max(0, min(_left_on_machine(), _left_in_groups(group), _left_to_process()))


def _left_on_machine() -> int:
    try:
        return _field(Path("/proc/meminfo"), "MemAvailable") * 1024
    except (OSError, ValueError):  # not Linux: use POSIX
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _left_in_groups(group: Path) -> int:
    """The least of limit minus use over the memory groups of this process; sys.maxsize where none limits it."""
    least = sys.maxsize
    for folder in _own_groups(group):
        least = min(least, _left_in(folder, "memory.max", "memory.current", ""))
    for folder in _own_groups(group, "memory"):
        least = min(least, _left_in(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"))
    return least


def _left_in(folder: Path, limit: str, use: str, prefix: str) -> int:
    """Limit minus use of one group. Cached pages of files count as free, because the system gives them up."""
    try:
        left = int((folder / limit).read_text()) - int((folder / use).read_text())
        return left + sum(_field(folder / "memory.stat", f"{prefix}{kind}_file") for kind in ("active", "inactive"))
    except (OSError, ValueError):
        return sys.maxsize  # no such group, or its limit is the word "max"


def _left_to_process() -> int:
    """The rest of the limits of this process: on its address space and on its data."""
    least = sys.maxsize
    for kind, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        limit, _ = resource.getrlimit(kind)
        if limit != resource.RLIM_INFINITY:
            with suppress(OSError, ValueError):
                limit -= _field(Path("/proc/self/status"), used) * 1024
            least = min(least, limit)
    return least


def _field(path: Path, name: str) -> int:
    """The number after a name in a file of such lines. Raises OSError, or ValueError where there is none."""
    for line in path.read_text().splitlines():
        words = line.replace(":", " ").split()
        if words[:1] == [name]:
            return int(words[1])
    raise ValueError(f"{path} has no {name}")


def tune_memory() -> None:
    """Have this process take memory in large pages, and keep what it frees, unless the environment says otherwise.

    On a CPU a network whose layers come and go spends a fifth of its time and more on fresh pages of memory. torch asks
    for pages of 2 MiB in place of 4 KiB; this must be called before torch is imported, and helps on Linux with
    transparent_hugepage at madvise (the usual). glibc keeps up to 256 MB of freed memory that lies last; blocks above
    32 MiB it gives back at once, as before. For commands alone: a library leaves the process that it runs in as it is.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt") and not os.environ.keys() & OF_GLIBC:
        library.mallopt(M_MMAP_THRESHOLD, 1 << 25)
        library.mallopt(M_TRIM_THRESHOLD, KEPT)


def usable_cores(group: Path = CONTROL_GROUPS) -> int:
    """How many cores this process may use, at least 1.

    It is the least of: the machine's cores, the cores that the process is bound to, and the quota of its control groups
    (v2), rounded up. In a container this is often a few of many. group: the folder where control groups are mounted.
    """
    bound = getattr(os, "sched_getaffinity", None)  # only on Linux
    cores = len(bound(0)) if bound else os.cpu_count() or 1
    return max(1, ceil(min(cores, _granted(group))))


def _granted(group: Path) -> float:
    """The cores' worth of time that the control groups of this process grant; infinity where none limits it."""
    least = float("inf")
    for folder in _own_groups(group):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
            least = min(least, int(quota) / int(period))
        except (OSError, ValueError):
            continue  # no such group, or its quota is the word "max"
    return least


def _own_groups(group: Path, controller: str = "") -> list[Path]:
    """The folders of this process's control groups, the innermost first; some may not exist.

    controller: the v1 controller; in v1 each has its own tree, v2 has one tree for all.
    """
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []  # not Linux
    named = [line.split(":", 2)[1:] for line in lines]
    inside = next((path for names, path in named if controller in names.split(",")), "/")
    inner = group / controller / inside.lstrip("/")
    return [inner, *(folder for folder in inner.parents if folder.is_relative_to(group))]


def free_disk(folder: Path) -> int:
    """Free bytes on the disk of a folder, or of its nearest existing parent."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def minutes_text(seconds: float, most: float | None = None) -> str:
    """A predicted time, from seconds to `most` seconds, for people, who need no more of less than a minute.

    >>> minutes_text(90), minutes_text(20, 90), minutes_text(2)
    ('about 1.5 min', 'about 0.3 to 1.5 min', 'under a minute')
    """
    if (seconds if most is None else most) < 60:
        return "under a minute"
    return f"about {seconds / 60:.1f}{'' if most is None else f' to {most / 60:.1f}'} min"


def time_text(seconds: float) -> str:
    """A time that passed, or is left, for people.

    >>> time_text(42), time_text(192), time_text(7000)
    ('42 s', '3.2 min', '1.9 h')
    """
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"


def human_bytes(count: float) -> str:
    """A number of bytes as text, in decimal units.

    >>> human_bytes(5_900_000)
    '5.9 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
