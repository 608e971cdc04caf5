"""Writing rows: positioned writes past HDF5, so that a killed process leaves a file that opens.

Order per block: features and checksums, then fdatasync, then `done`. Whatever dies in between, a row
that says it is whole is whole.
"""

import fcntl
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np
import xxhash
from numpy.typing import NDArray

from featprobe.cache.layout import MISSING, UNREADABLE, WHOLE, encode_reason, read_contents
from featprobe.errors import CacheBusyError, CacheError, ShapeError

CREATION_BYTE = 1 << 40  # of the lock file: past every row's byte
_seek_lock = threading.Lock()


def _seek_and_write(handle: int, data: memoryview, offset: int) -> int:
    with _seek_lock:
        os.lseek(handle, offset, os.SEEK_SET)
        return os.write(handle, data)


def _positioned_write(handle: int, data: memoryview, offset: int) -> int:
    return os.pwritev(handle, [data], offset)


write_some: Callable[[int, memoryview, int], int] = _positioned_write if hasattr(os, "pwritev") else _seek_and_write
"""Write a part of the data at an offset and return how many bytes that was."""

sync: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)
"""Bring what was written to the disk."""


class CacheWriter:
    """Writes rows of an existing cache; any number of processes may write disjoint rows of one file."""

    def __init__(self, path: Path) -> None:
        contents = read_contents(path)
        self.path = path
        self.recipe = contents.recipe
        self.extents = contents.extents
        try:
            self.handle = os.open(path, os.O_RDWR)
        except OSError as error:
            raise CacheError(f"{path} can't be written: {error.strerror}. Nothing was changed.") from error

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Bring what was written to the disk and let go of the file."""
        try:
            with self._refusal("at its end"):
                os.fsync(self.handle)
        finally:
            os.close(self.handle)

    def write(self, start: int, maps: Mapping[str, NDArray]) -> None:
        """Write consecutive whole rows, from row `start` on.

        maps: level name -> (rows, channels, height, width), C-contiguous, in the cache's stored dtype.
        Raises CacheError when the disk refuses; rows that were whole stay whole.
        """
        counts = {array.shape[0] for array in maps.values()}
        if set(maps) != {level.name for level in self.recipe.levels} or len(counts) != 1:
            raise ShapeError(f"A row needs every level of the cache, and as many of each: got {sorted(maps)}.")
        rows = counts.pop()
        checksums = np.empty((rows, len(self.recipe.levels)), dtype="<u8")
        for column, level in enumerate(self.recipe.levels):
            flat = np.ascontiguousarray(maps[level.name]).reshape(rows, -1).view(np.uint8)  # (rows, bytes)
            if flat.shape[1] != self.extents[f"features/{level.name}"].row_bytes:
                raise ShapeError(
                    f"Rows of level {level.name} have {flat.shape[1]} bytes, another size than the cache's."
                )
            checksums[:, column] = [xxhash.xxh3_64_intdigest(row.data) for row in flat]
            self._put(f"features/{level.name}", start, flat)
        self._put("checksum", start, checksums)
        self._sync(start)
        self._put("done", start, np.full(rows, WHOLE, dtype=np.uint8))

    def mark_unreadable(self, row: int, reason: str) -> None:
        """Set a row aside, and keep why."""
        size = self.extents["reason"].row_bytes
        self._put("reason", row, np.frombuffer(encode_reason(reason).ljust(size, b"\0"), dtype=np.uint8))
        self._sync(row)
        self._put("done", row, np.array([UNREADABLE], dtype=np.uint8))

    def mark_missing(self, row: int) -> None:
        """Have a row computed again by the next `extract`."""
        self._put("done", row, np.array([MISSING], dtype=np.uint8))

    def _put(self, name: str, row: int, data: NDArray) -> None:
        extent = self.extents[name]
        view = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        first = offset = extent.offset + row * extent.row_bytes
        fcntl.lockf(self.handle, fcntl.LOCK_EX, data.nbytes, first)  # makes NFS clients write through
        try:
            with self._refusal(f"at row {row}, {name}"):
                while view:
                    written = write_some(self.handle, view, offset)
                    view, offset = view[written:], offset + written
        finally:
            fcntl.lockf(self.handle, fcntl.LOCK_UN, data.nbytes, first)

    def _sync(self, row: int) -> None:
        with self._refusal(f"at row {row}"):
            sync(self.handle)

    @contextmanager
    def _refusal(self, where: str) -> Iterator[None]:
        """Turn what the disk refuses into a CacheError that says where."""
        try:
            yield
        except OSError as error:
            raise CacheError(
                f"{self.path} can't be written, {where}: {error.strerror}.\n"
                "Rows that were whole stay whole. Make room, then run the same command again: it goes on from here."
            ) from error


class RowLocks:
    """Which process works on which rows of a cache: byte ranges of a lock file beside it, a byte a row.

    The locks belong to the process and vanish with it, however it ends. The cache file itself is never
    locked as a whole, so that readers are free.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.handle = os.open(path.parent / f".{path.stem}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CacheError(
                f"The folder {path.parent} can't be written ({error.strerror}). Nothing was changed.\n"
                "Choose another place:  featprobe --workspace DIR extract …"
            ) from error

    def __enter__(self) -> "RowLocks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.handle)

    def wait_for_creation(self) -> None:
        """Wait until no other process is making or replacing the file, and keep others from it."""
        fcntl.lockf(self.handle, fcntl.LOCK_EX, 1, CREATION_BYTE)

    def end_creation(self) -> None:
        """Let others make or replace the file."""
        fcntl.lockf(self.handle, fcntl.LOCK_UN, 1, CREATION_BYTE)

    def claim_all(self) -> None:
        """Keep every row, whatever their number; raises CacheBusyError when another has some of them."""
        self.claim(0, CREATION_BYTE)

    def release(self) -> None:
        """Let go of all rows."""
        fcntl.lockf(self.handle, fcntl.LOCK_UN, CREATION_BYTE, 0)

    def claim(self, start: int, stop: int) -> None:
        """Keep rows [start, stop) for this process; raises CacheBusyError when another has some of them."""
        if start >= stop:
            return
        try:
            fcntl.lockf(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB, stop - start, start)
        except OSError as error:
            raise CacheBusyError(
                f"Another process is extracting into {self.path} just now, into the same rows.\n"
                "Nothing was changed. Wait for it; or let several share the work:  featprobe extract … --shard 1/2"
            ) from error
