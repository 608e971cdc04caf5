"""What this machine has: memory and disk, in bytes, and devices to compute on."""

import os
import re
import shutil
from pathlib import Path

import torch

from featprobe.errors import BackboneError


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


def pick_device(name: str | None) -> torch.device:
    """The device of this name, or the best there is; under torchrun, the GPU of the local rank.

    Raises BackboneError when the device that is asked for is not here.
    """
    kind = name or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not re.fullmatch(r"[a-z]+(:\d+)?", kind) or not present.get(kind.split(":")[0], False):
        raise BackboneError(
            f"There is no device {kind!r} here.\n"
            f"  wanted  one of {', '.join(k for k, here in present.items() if here)}\n"
            "Leave --device away to take the best there is."
        )
    if kind == "cuda" and "LOCAL_RANK" in os.environ:
        kind = f"cuda:{os.environ['LOCAL_RANK']}"
    return torch.device(kind)
