"""Files that are whole or not there, and files that are what their name says: regular ones.

Every file that is not a cache is written here: beside its place, brought to the disk, renamed. Every file that others
may have made is opened here, so that no pipe and no device is ever waited for.
"""

import errno
import json
import os
import re
import stat
import tomllib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from featprobe.errors import DiskError, FileKindError

LONGEST_NAME = 200  # bytes: systems take 255, and names get more behind them


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
    with suppress(FileNotFoundError):  # opening alone may do things to a device
        _check_regular(path, os.stat(path, follow_symlinks=not flags & os.O_NOFOLLOW))
    handle = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY, 0o666)
    try:
        _check_regular(path, os.fstat(handle))
    except FileKindError:
        os.close(handle)
        raise
    return handle


def _check_regular(path: str | os.PathLike[str], found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISLNK(found.st_mode):  # a link is refused by what opens it
        raise FileKindError(
            f"{os.fspath(path)} is no regular file, but a folder, pipe, device or socket. It was not read."
        )


def read_regular(path: Path, most: int) -> bytes:
    """The bytes of a regular file. Raises FileKindError, also for one of more than `most` bytes; else OSError."""
    with open(path, "rb", opener=open_regular) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > most:
            raise FileKindError(f"{path} has {size} bytes, more than the {most} that are read of such a file.")
        return stream.read(most)


def open_append(path: Path) -> IO[bytes]:
    """A regular file to be read and appended to, made where there is none. Raises FileKindError for a link; OSError."""
    try:
        handle = open_regular(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise FileKindError(f"{path} is a link, which is never written through. Nothing was changed.") from error
        raise
    return open(handle, "a+b")


def below(folder: Path, path: str | Path, where: str) -> Path:
    """The path of what lies in a folder. Raises FileKindError, naming `where`, where it leads out, by links too."""
    found = folder / path
    try:
        inside = found.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # a link to itself, a NUL
        inside = False
    if not inside:
        raise FileKindError(
            f"{where} names a path that is not below its folder. It was not opened.\n"
            f"  wanted  below {folder}\n  found   {str(path)[:200]!r}"
        )
    return found


def plain_name(name: str) -> bool:
    """Whether a name is one part of a path that a file or a folder can be called by.

    >>> plain_name("bottle, 2nd"), plain_name("../evil"), plain_name("a\\x1bb"), plain_name("..")
    (True, False, False, False)
    """
    return (
        name not in ("", ".", "..")
        and not re.search(r"[/\\\x00-\x1f\x7f-\x9f]", name)
        and len(os.fsencode(name)) <= LONGEST_NAME
    )


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; ValueError is all that it raises, also for one that is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: Path, most: int) -> Any:
    """The value of a JSON file of at most `most` bytes. Raises FileKindError, OSError, ValueError."""
    return parse_json(read_regular(path, most))


def read_toml(path: Path, most: int = 1 << 22) -> dict[str, Any]:
    """The value of a TOML file of at most `most` bytes. Raises FileKindError, OSError, ValueError."""
    try:
        return tomllib.loads(read_regular(path, most).decode("utf-8-sig"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
