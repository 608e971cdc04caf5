"""What this machine has: memory and disk in bytes, cores."""

import os
import shutil
from math import ceil
from pathlib import Path


def available_memory() -> int:
    """Bytes of main memory that can be used without swapping, the page cache counted as free.

    Half of the whole memory where the system does not tell.
    """
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: fall through to what POSIX knows
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def usable_cores(group: Path = Path("/sys/fs/cgroup")) -> int:
    """How many cores this process may use, at least 1.

    That is the fewest of the machine's cores, those that the process is bound to, and what the control groups (v2)
    that it is in grant, rounded up: in a container often a few of many. group: where these are mounted.
    """
    bound = getattr(os, "sched_getaffinity", None)  # Linux alone
    cores = len(bound(0)) if bound else os.cpu_count() or 1
    return max(1, ceil(min(cores, _granted(group))))


def _granted(group: Path) -> float:
    """Cores' worth of time that the control groups of this process grant; infinity where none limits it."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []  # not Linux
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    least = float("inf")
    for folder in (group / own, *(group / own).parents):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
            least = min(least, int(quota) / int(period))
        except (OSError, ValueError):
            continue  # no such group, or its quota is the word "max"
    return least


def free_disk(folder: Path) -> int:
    """Bytes free on the disk of a folder, or of its nearest parent that exists."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def human_bytes(count: float) -> str:
    """Bytes for people, in decimal units.

    >>> human_bytes(5_900_000)
    '5.9 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
