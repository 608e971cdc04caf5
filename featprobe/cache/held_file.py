"""A cache file that is held open, and parts of it whose bytes are read when they are asked for."""

import hashlib
import os
import shlex
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featprobe.cache.header import Entry
from featprobe.errors import CacheError, FileKindError
from featprobe.io.disk import open_regular

PIECE = 1 << 22  # bytes that are hashed at once


class HeldFile:
    """A regular file that stays open as long as this object lives, also when another file takes its name.

    hashed: (rows, levels), those of a cache that this process has hashed; None where nobody has asked, and once the
    file is closed, since its number may then be another's.
    """

    def __init__(self, path: Path) -> None:
        """Raises CacheError where there is no such file, or it can't be read."""
        self.path = path
        try:
            self.handle = open_regular(path)
        except FileNotFoundError as error:
            raise CacheError(f"There is no cache {path}.") from error
        except (OSError, FileKindError) as error:
            raise CacheError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}") from error
        self._open = weakref.finalize(self, os.close, self.handle)
        self.status = os.fstat(self.handle)
        self.hashed: NDArray[np.bool_] | None = None

    def close(self) -> None:
        """Close the file now, for all that read it."""
        self._open()
        self.handle = -1  # the number may soon be another file's
        self.hashed = None

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset` on.

        Raises CacheError where the file ends earlier, where it was closed, and UnreadableError where the disk refuses.
        """
        if self.handle < 0:
            raise was_closed(self.path)
        data = self._some(count, offset)
        while len(data) < count:
            more = self._some(count - len(data), offset + len(data))
            if not more:
                end = offset + len(data)
                raise CacheError(
                    f"{self.path} ended while it was read, at byte {end}. Was it cut short?\n{removal(self.path)}"
                )
            data += more
        return data

    def _some(self, count: int, offset: int) -> bytes:
        try:
            return os.pread(self.handle, count, offset)
        except OSError as error:
            raise unreadable(self.path, offset, error) from error


@dataclass(frozen=True)
class Span:
    """A part of a file. Its bytes are read only when they are needed."""

    file: HeldFile
    entry: Entry

    def __len__(self) -> int:
        return self.entry.size

    def __getitem__(self, index: slice, /) -> bytes:
        start, stop, _ = index.indices(self.entry.size)
        return self.file.read(self.entry.offset + start, max(0, stop - start))

    def sha256(self) -> str:
        """The sha256 over the whole part, which is read in pieces."""
        running = hashlib.sha256()
        for start in range(0, len(self), PIECE):
            running.update(self[start : start + PIECE])
        return running.hexdigest()


class UnreadableError(CacheError):
    """The disk does not give bytes of a cache."""


def unreadable(path: Path, offset: int, error: OSError, mending: str = "featprobe extract …") -> UnreadableError:
    """The error that a disk refuses to give the bytes at an offset. mending: the command that makes the file."""
    return UnreadableError(
        f"{path} can't be read at byte {offset}: {error.strerror}. Nothing was changed.\n"
        f"If the disk is failing, make the file anew on another:  {mending}"
    )


def was_closed(path: Path) -> CacheError:
    """The error that a file is used which was closed."""
    return CacheError(f"{path} was closed. Open it again:  open_cache(path)")


def unknown(path: Path, found: str) -> CacheError:
    """The error that nothing can be said of a cache file, for want of memory or processes; it may be sound."""
    return CacheError(
        f"{path} can't be looked into. Nothing was changed.\n  found   {found}\n"
        "It may be sound. Allow the process more memory and processes (ulimit), then run the same command again."
    )


def removal(path: Path) -> str:
    """Advice about a cache file that can't be used, for a message."""
    return f"Remove it: featprobe cache rm {shlex.quote(str(path))} --yes. Then run the extract command again."
