"""Files that are whole or not there, and files that are what their name says: regular ones.

Every file that is not a cache is written here: beside its place, brought to the disk, renamed. Every file that others
may have made is opened here, so that no pipe and no device is ever waited for.
"""

import fcntl
import json
import os
import re
import shutil
import socket
import stat
import tomllib
import uuid
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from featprobe.errors import DiskError, FileKindError

Content = bytes | str
MOST_PACKED = 4  # times its bytes that an archive of tensors may become: they hardly get smaller
LONGEST_NAME = 200  # bytes: systems take 255, and names get more behind them
_swept = set[tuple[int, Path]]()  # (process, folder) that was looked through for what killed processes left there


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A stream whose bytes become the file `path` when the block ends: all of them, or none where it fails.

    They are on the disk by then, with the name, and with the names of folders that were made for it. A link at the path
    is replaced, never followed. The file's mode follows the umask. Raises DiskError where the disk refuses; nothing is
    left behind then. What a killed process left is removed by the next that writes into the folder.
    """
    temporary, kept = None, True
    try:
        make_folders(path.parent)
        temporary = _temporary(path)
        with _new_file(temporary) as stream:
            yield stream
            _sync(stream)
        temporary.replace(path)
        kept = False
        sync_folder(path.parent)
    except OSError as error:
        raise _refused(path, error, kept=kept) from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_whole(path: Path, data: Content) -> None:
    """Make bytes, or a text as UTF-8, the whole content of a file; see `replacing`."""
    with replacing(path) as stream:
        stream.write(_bytes_of(data))


def write_together(files: Mapping[Path, Content], seal: Path | None = None, stale: Iterable[Path] = ()) -> None:
    """Write files that belong together: each as by `replacing`, and none changes before all are on the disk.

    seal: the one of them that says that the others are there; it is removed before they change, and comes last. stale:
    files to be removed. Raises DiskError.
    """
    written: dict[Path, Path] = {}  # path -> its temporary file
    path, kept = next(iter(files)), True
    try:
        for path, data in files.items():
            make_folders(path.parent)
            written[path] = _temporary(path)
            with _new_file(written[path]) as stream:
                stream.write(_bytes_of(data))
                _sync(stream)
        kept = False
        _remove([seal, *stale] if seal is not None else stale)
        _put([pair for pair in written.items() if pair[0] != seal])
        _put([pair for pair in written.items() if pair[0] == seal])
    except OSError as error:
        raise _refused(path, error, kept=kept) from error
    finally:
        for temporary in written.values():
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` that becomes it when the block ends, with all that is in it on the disk.

    `path` is not there yet, or an empty folder. Modes follow the umask. Where the block fails nothing is left behind.
    Raises DiskError.
    """
    temporary = None
    try:
        make_folders(path.parent)
        temporary = _temporary(path)
        temporary.mkdir()
        yield temporary
        for folder, _, names in os.walk(temporary, topdown=False):
            for name in names:
                if not os.path.islink(file := os.path.join(folder, name)):
                    _sync_path(file)
            _sync_path(folder)
        temporary.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        raise DiskError(
            f"{path} can't be written: {error.strerror or error}.\n"
            "Nothing was left behind. Make room or choose another disk, then run the same command again."
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def append_line(path: Path, line: bytes) -> None:
    """Append a line to a file, whole and on the disk, or not at all; several processes may do so at once.

    A torn last line, left by a kill, is closed off first, so that it spoils no other. A link is not followed. Raises
    DiskError; what was there before is as it was then.
    """
    try:
        make_folders(path.parent)
        handle = open_regular(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW)
        with open(handle, "rb", buffering=0) as file:
            fcntl.lockf(handle, fcntl.LOCK_EX)
            size = file.seek(0, os.SEEK_END)
            torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
            try:
                _write_all(handle, b"\n" * torn + line + b"\n")
                os.fsync(handle)
                if not size:
                    sync_folder(path.parent)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(handle, size)
                raise
    except OSError as error:
        raise _refused(path, error) from error


def make_folders(folder: Path) -> None:
    """Make a folder and those above it that are missing, and bring their names to the disk. Raises OSError."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for made in reversed(missing):
        made.mkdir(exist_ok=True)
        sync_folder(made.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk. Raises OSError."""
    _sync_path(folder)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what processes of this host that are dead were writing into a folder; name: of one file alone."""
    begin = r"\..*" if name is None else re.escape(f".{name}")
    own = re.compile(rf"{begin}\.{re.escape(socket.gethostname())}-([0-9]+)-[0-9a-f]{{8}}\.tmp", re.DOTALL)
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            found = own.fullmatch(entry.name)
            if found is None or _alive(int(found[1])):
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                with suppress(OSError):
                    os.unlink(entry.path)


def _temporary(path: Path) -> Path:
    """A name beside a path that no other process takes; what dead processes left there is removed first."""
    own = (os.getpid(), path.parent)
    if own not in _swept:
        _swept.add(own)
        remove_leftovers(path.parent)
    return path.parent / temporary_name(path.name[:40])


def temporary_name(name: str) -> str:
    """A file's name while this process makes it, which no other takes; `remove_leftovers` knows it."""
    return f".{name}.{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"


def _new_file(path: Path) -> IO[bytes]:
    return open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666), "wb")


def _sync(stream: IO[bytes]) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _sync_path(path: str | Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put(written: list[tuple[Path, Path]]) -> None:
    """Give temporary files their names."""
    for path, temporary in written:
        temporary.replace(path)
    for folder in dict.fromkeys(path.parent for path, _ in written):
        sync_folder(folder)


def _remove(paths: Iterable[Path]) -> None:
    """Remove files that may be there."""
    there = [path for path in paths if os.path.lexists(path)]
    for path in there:
        path.unlink()
    for folder in dict.fromkeys(path.parent for path in there):
        sync_folder(folder)


def _write_all(handle: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(handle, left) :]


def _bytes_of(data: Content) -> bytes:
    return data.encode() if isinstance(data, str) else data


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass  # another user's; or no process's number
    return True


def _refused(path: Path, error: OSError, *, kept: bool = True) -> DiskError:
    before = "What was there before is as it was." if kept else "It, or what belongs to it, is new, and may not last."
    return DiskError(
        f"{path} can't be written: {error.strerror or error}.\n"
        f"{before} Make room or choose another disk, then run the same command again."
    )


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
        return stream.read(size)


def check_packed(path: Path) -> None:
    """Raise ValueError for an archive, as torch writes it, that is packed: it claims far more than it holds.

    Raises FileKindError where there is no regular file, and OSError.
    """
    with open(path, "rb", opener=open_regular) as stream:
        if not zipfile.is_zipfile(stream):
            return
        held = os.fstat(stream.fileno()).st_size
        with zipfile.ZipFile(stream) as archive:
            claimed = sum(entry.file_size for entry in archive.infolist())
    if claimed > MOST_PACKED * held:
        raise ValueError(f"its {held} bytes claim to be {claimed}")


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
