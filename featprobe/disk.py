"""Files that are whole or not there, and files that are what their name says: regular ones.

Every file that is not a cache is written here: beside its place, brought to the disk, renamed. Every file that others
may have made is opened here, so that no pipe and no device is ever waited for.
"""

import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from featprobe.errors import DiskError, FileKindError


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A stream whose bytes become the file `path` when the block ends: all of them, or none where it fails.

    They are on the disk by then, with the name. A link at the path is replaced, never followed. The file's mode follows
    the umask. Raises DiskError where the disk refuses; nothing is left behind then.
    """
    temporary = path.parent / f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"
    try:
        handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        with open(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(handle)
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise DiskError(
            f"{path} can't be written: {error.strerror or error}.\n"
            "What was there before is as it was. Make room or choose another disk, then run the same command again."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes | str) -> None:
    """Make bytes, or a text as UTF-8, the whole content of a file; see `replacing`."""
    with replacing(path) as stream:
        stream.write(data.encode() if isinstance(data, str) else data)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_regular(path: str | os.PathLike[str], flags: int = os.O_RDONLY) -> int:
    """A descriptor of a regular file. Raises FileKindError for any other kind, without waiting; else OSError.

    The mode of one that is created follows the umask.
    """
    handle = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise FileKindError(
            f"{os.fspath(path)} is no regular file, but a folder, pipe, device or socket. It was not read."
        )
    return handle


def read_regular(path: Path, most: int) -> bytes:
    """The bytes of a regular file. Raises FileKindError, also for one of more than `most` bytes; else OSError."""
    with open(open_regular(path), "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > most:
            raise FileKindError(f"{path} has {size} bytes, more than the {most} that are read of such a file.")
        return stream.read(most)
