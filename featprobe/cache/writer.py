"""Writing rows: positioned writes past HDF5, so that a killed process leaves a file that opens.

Order per group of rows: features and checksums, then fdatasync, then `done`. Even if a process dies in between, a
row that is marked whole is whole.
"""

import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from featprobe.cache.contents import read_contents
from featprobe.cache.layout import MISSING, UNREADABLE, WHOLE, encode_reason, row_tables
from featprobe.cache.rows import checksum
from featprobe.errors import CacheBusyError, CacheError, ShapeError
from featprobe.io.disk import make_folders, open_regular
from featprobe.io.locks import lock_bytes, unlock_bytes

CREATION_BYTE = 1 << 40  # of the lock file: past every row's byte
GROUP_BYTES = 256 << 20  # of rows that are written but not marked: from this size on the next write marks them
GROUP_SECONDS = 5.0  # since the first row of a group was written: after this time the next write marks them
_seek_lock = threading.Lock()


def _seek_and_write(handle: int, data: memoryview, offset: int) -> int:
    with _seek_lock:
        os.lseek(handle, offset, os.SEEK_SET)
        return os.write(handle, data)


def _positioned_write(handle: int, data: memoryview, offset: int) -> int:
    return os.pwritev(handle, [data], offset)


write_some: Callable[[int, memoryview, int], int] = _positioned_write if hasattr(os, "pwritev") else _seek_and_write
"""Write some of the data at an offset and return the number of bytes written."""

sync: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)
"""Bring what was written to the disk."""


class CacheWriter:
    """Writes rows of an existing cache. Any number of threads and processes may write different rows of one file.

    Rows are written in groups: `write` leaves them missing; `commit` brings them to the disk and then marks them whole.
    A full group commits by itself, and closing commits.
    """

    def __init__(self, path: Path) -> None:
        contents = read_contents(path)
        self.path = path
        self.recipe = contents.recipe
        self.inode, self.identity_sha256 = contents.inode, contents.identity_sha256
        self.extents = contents.extents
        self._turn = threading.Condition()  # guards the four below
        self._held: set[int] = set()  # rows that a thread is writing or marking
        self._group: dict[int, int] = {}  # written row -> its new state, which is not in the file yet
        self._bytes, self._since = 0, 0.0  # of the group: features in it, and when it began
        self._one_sync = threading.RLock()  # taken before `_turn`; who has it waits for no row
        self._lost: OSError | None = None  # the disk's error when it could not keep what was written
        try:
            self.handle = open_regular(path, os.O_RDWR)
        except OSError as error:
            raise CacheError(f"{path} can't be written: {error.strerror}. Nothing was changed.") from error
        if os.fstat(self.handle).st_ino != contents.inode:
            os.close(self.handle)
            raise CacheError(f"{path} was replaced by a newer one while it was opened. Run the same command again.")

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Commit, bring everything to the disk and close the file."""
        try:
            if self._lost is None:  # otherwise the thread that had the error has raised it
                self.commit()
                with self._refusal("at its end"):
                    os.fsync(self.handle)
        finally:
            os.close(self.handle)

    def write(self, start: int, maps: Mapping[str, NDArray]) -> None:
        """Write consecutive rows, from row `start` on; they are whole after the next `commit`.

        maps: level name -> (rows, channels, height, width), C-contiguous, in the cache's stored dtype; and the other
        tables of `row_tables` by their key. Raises CacheError when the disk refuses; rows that were whole stay whole.
        """
        tables = row_tables(self.recipe)
        wanted = {table.key: table for of_level in tables.values() for table in of_level}
        counts = {array.shape[0] for array in maps.values()}
        if set(maps) != set(wanted) or len(counts) != 1:
            raise ShapeError(f"A row needs every level of the cache, and as many of each: got {sorted(maps)}.")
        rows = counts.pop()
        flat = {}
        for key, table in wanted.items():
            flat[key] = np.ascontiguousarray(maps[key]).reshape(rows, -1).view(np.uint8)  # (rows, bytes)
            if flat[key].shape[1] != table.row_bytes:
                raise ShapeError(f"Rows of {key} have {flat[key].shape[1]} bytes, another size than the cache's.")
        if not rows:
            return  # a lock of no bytes is one up to the file's end
        with self._alone(start, start + rows, WHOLE):
            self._set_back(start, rows)
            checksums = np.empty((rows, len(tables)), dtype="<u8")
            for column, of_level in enumerate(tables.values()):
                kept = [flat[table.key] for table in of_level]
                checksums[:, column] = [checksum([data[row] for data in kept]) for row in range(rows)]
                for table in of_level:
                    self._put(table.name, start, flat[table.key])
            self._put("checksum", start, checksums)
        if self._is_due():
            with self._one_sync:
                if self._is_due():  # asked again: the thread that committed before may have marked these rows too
                    self.commit()

    def commit(self) -> None:
        """Bring the written rows to the disk, then mark them whole.

        One group at a time: the next group fills meanwhile, so that at most two groups are unmarked. Raises CacheError
        when the disk refuses; this writer then never marks the rows that it wrote but did not mark.
        """
        with self._one_sync:
            with self._turn:
                group, self._group, self._bytes = self._group, {}, 0
                self._held.update(group)
            try:
                if group:
                    self._sync(min(group))
                for first, states in _runs(group):
                    self._put("done", first, np.array(states, dtype=np.uint8))
            finally:
                self._let_go(group)

    def _is_due(self) -> bool:
        with self._turn:
            old = time.monotonic() - self._since >= GROUP_SECONDS
            return bool(self._group) and (old or self._bytes >= GROUP_BYTES)

    def mark_unreadable(self, row: int, reason: str) -> None:
        """Mark a row unreadable and keep the reason; commits."""
        size = self.extents["reason"].row_bytes
        with self._alone(row, row + 1, UNREADABLE):
            self._put("reason", row, np.frombuffer(encode_reason(reason).ljust(size, b"\0"), dtype=np.uint8))
        self.commit()

    def mark_missing(self, row: int) -> None:
        """Mark a row missing, so that the next `extract` computes it again."""
        with self._alone(row, row + 1):
            self._put("done", row, np.array([MISSING], dtype=np.uint8))

    @contextmanager
    def _alone(self, start: int, stop: int, state: int | None = None) -> Iterator[None]:
        """Keep other threads from rows [start, stop), which afterwards join the group with their new state.

        They leave the group first, so that no commit can mark a half-written row.
        """
        rows = range(start, stop)
        with self._turn:
            self._turn.wait_for(lambda: self._held.isdisjoint(rows))
            self._held.update(rows)
            for row in rows:
                self._group.pop(row, None)
        joins = False
        try:
            yield
            joins = state is not None
        finally:
            self._let_go(rows, state if joins else None)

    def _let_go(self, rows: Collection[int], state: int | None = None) -> None:
        with self._turn:
            self._held.difference_update(rows)
            if state is not None:
                self._since = self._since if self._group else time.monotonic()
                self._group.update(dict.fromkeys(rows, state))
                self._bytes += len(rows) * self.recipe.row_bytes
            self._turn.notify_all()

    def _set_back(self, start: int, rows: int) -> None:
        """Mark rows missing in the file before their bytes change."""
        done = self.extents["done"]
        if WHOLE in os.pread(self.handle, rows, done.offset + start):
            self._put("done", start, np.full(rows, MISSING, dtype=np.uint8))
            self._sync(start)

    def _put(self, name: str, row: int, data: NDArray) -> None:
        extent = self.extents[name]
        view = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        if row < 0 or row * extent.row_bytes + view.nbytes > extent.rows * extent.row_bytes:
            raise ShapeError(f"{self.path} has {extent.rows} rows: none can be written at row {row}, {name}.")
        first = offset = extent.offset + row * extent.row_bytes
        lock_bytes(self.handle, first, data.nbytes)  # makes NFS clients write through
        try:
            with self._refusal(f"at row {row}, {name}"):
                while view:
                    written = write_some(self.handle, view, offset)
                    view, offset = view[written:], offset + written
        finally:
            unlock_bytes(self.handle, first, data.nbytes)

    def _sync(self, row: int) -> None:
        """Bring the written bytes to the disk. After one failure every later call fails too.

        The system reports a lost write only once, to one of the threads that ask.
        """
        with self._one_sync, self._refusal(f"at row {row}"):
            if self._lost is not None:
                raise OSError(self._lost.errno, self._lost.strerror)
            try:
                sync(self.handle)
            except OSError as error:
                self._lost = error
                raise

    @contextmanager
    def _refusal(self, where: str) -> Iterator[None]:
        """The CacheError for an OSError of the disk, with its place."""
        try:
            yield
        except OSError as error:
            raise CacheError(
                f"{self.path} can't be written, {where}: {error.strerror}.\n"
                "Rows that were whole stay whole. Make room, then run the same command again: it continues from here."
            ) from error


def _runs(group: Mapping[int, int]) -> Iterator[tuple[int, list[int]]]:
    """(first row, states) per run of consecutive rows."""
    rows = np.array(sorted(group), dtype=np.intp)
    for run in np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1) if len(rows) else []:
        yield int(run[0]), [group[row] for row in run.tolist()]


class RowLocks:
    """Locks on the rows of a cache: ranges of bytes, one byte per row, of a lock file beside the cache.

    Locks belong to this object, on Linux also among the threads of a process (see `featprobe.io.locks`), and end with
    the process, however it ends. The lock file stays, also when the cache is removed: a process that had opened it
    before would otherwise hold locks that nobody else sees. The cache file itself is never locked as a whole, so that
    readers are free.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            make_folders(path.parent)
            self.handle = open_regular(path.parent / f".{path.stem}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        except OSError as error:
            raise CacheError(
                f"The folder {path.parent} can't be written ({error.strerror}). Nothing was changed.\n"
                "Correct its rights, or choose another workspace:  featprobe --workspace DIR …"
            ) from error

    def __enter__(self) -> "RowLocks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):
            unlock_bytes(self.handle)  # a process that was forked meanwhile has the file open, too
        os.close(self.handle)

    def wait_for_creation(self) -> None:
        """Wait until nobody else makes or replaces the file, and then keep others from doing so."""
        self._lock(CREATION_BYTE, 1, wait=True)

    def end_creation(self) -> None:
        """Allow others to make or replace the file."""
        unlock_bytes(self.handle, CREATION_BYTE, 1)

    def claim_all(self) -> None:
        """Lock every row, whatever their number. Raises CacheBusyError where somebody else holds some of them."""
        self.claim(0, CREATION_BYTE)

    def release(self) -> None:
        """Unlock all rows."""
        unlock_bytes(self.handle, 0, CREATION_BYTE)

    def claim(self, start: int, stop: int) -> None:
        """Lock rows [start, stop). Raises CacheBusyError where somebody else holds some of them."""
        if start < stop:
            self._lock(start, stop - start, wait=False)

    def _lock(self, start: int, length: int, *, wait: bool) -> None:
        try:
            lock_bytes(self.handle, start, length, wait=wait)
        except BlockingIOError as error:
            raise CacheBusyError(
                f"Another extraction is writing into {self.path} right now, into the same rows.\n"
                "Nothing was changed. Wait for it, or let several share the work:  featprobe extract … --shard 1/2"
            ) from error
        except OSError as error:
            raise CacheError(
                f"The rows of {self.path} can't be locked ({error.strerror}). Nothing was changed.\n"
                "The folder needs a file system with locks, as `featprobe doctor` looks for:  "
                "featprobe --workspace DIR extract …"
            ) from error
