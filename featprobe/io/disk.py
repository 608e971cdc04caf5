"""Files that are written whole or not at all, and safe reading of regular files.

Every file but caches is written here: beside its place, brought to the disk, renamed. Every file that others may have
made is opened here, so that featprobe never waits for a pipe or a device.
"""

import errno
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from featprobe.errors import DiskError, FeatprobeError, FileKindError
from featprobe.io.locks import lock_bytes
from featprobe.machine import available_memory

Content = bytes | str
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
"""Errors of a disk that is full, read-only or failing."""
MOST_PACKED = 4  # most unpacked bytes per byte of an archive of tensors, which hardly compress
UNASKED = 1 << 22  # bytes of a JSON text for which no memory is looked up
PER_TABLE, PER_VALUE = 80, 40  # bytes that an empty list or table takes, and any other value at least
MOST_DOTS = 200  # in a name of a TOML file
_TOML_TEXT = re.compile(
    rb'"""(?:[^"\\]|\\.|"{1,2}(?!"))*+(?:"{3,5}|\Z)|"(?:[^"\\\n]|\\.)*+"?'
    rb"|'''(?:[^']|'{1,2}(?!'))*+(?:'{3,5}|\Z)|'[^'\n]*+'?|#[^\n]*+",
    re.DOTALL,
)
"""Texts and comments of a TOML file, and to their line's or the file's end those that do not end."""
LONGEST_NAME = 200  # bytes: systems allow 255, and temporary names are longer
_swept = set[tuple[int, Path]]()  # (process, folder) where leftovers of killed processes were removed


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A stream whose bytes become the file `path` when the block ends: all of them, or none if the block fails.

    Then the bytes, the name and the names of new folders are on the disk. A link at the path is replaced, never
    followed. The file's mode follows the umask. Raises DiskError where the disk refuses, and leaves nothing behind.
    The next process that writes into the folder removes the leftovers of a killed process.
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
    """Write a file whose whole content is these bytes, or this text as UTF-8; see `replacing`."""
    with replacing(path) as stream:
        stream.write(_bytes_of(data))


def write_together(
    files: Mapping[Path, Content], seal: Path | None = None, stale: Iterable[Path] = (), *, fresh: bool = False
) -> None:
    """Write files that belong together: each as by `replacing`, and none changes before all are on the disk.

    seal: one of them, whose presence shows that the others are complete; it is removed first and written last. stale:
    files to remove. fresh: none of the files was there, so after an error none is. Raises DiskError.
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
        for made in files if fresh else ():
            with suppress(OSError):
                made.unlink(missing_ok=True)
        raise _refused(path, error, kept=kept or fresh) from error
    finally:
        for temporary in written.values():
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends, with all its content on the disk.

    `path` must not exist, or be an empty folder. Modes follow the umask. If the block fails nothing is left behind.
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
        _sync_or_undo(path, temporary)
    except OSError as error:
        raise DiskError(
            f"{path} can't be written: {error.strerror or error}.\n"
            f"Nothing was left behind. {to_do(error)}, then run the same command again."
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def append_line(path: Path, line: bytes) -> None:
    """Append a line to a file, whole and on the disk, or not at all. Several processes may do so at once.

    An incomplete last line, left by a killed process, gets a line end first, so that it spoils no other line. A link is
    not followed. Raises DiskError; then the file is unchanged.
    """
    try:
        make_folders(path.parent)
        with _locked(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW) as file:
            handle, size = file.fileno(), file.seek(0, os.SEEK_END)
            torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
            try:
                _write_all(handle, b"\n" * torn + line + b"\n")
                os.fsync(handle)
                sync_folder(path.parent)  # also of a file with lines: who made it may have been killed before this
            except OSError:
                with suppress(OSError):
                    os.ftruncate(handle, size)
                raise
    except OSError as error:
        raise _refused(path, error) from error


def filter_lines(path: Path, keep: Callable[[bytes], bool]) -> int:
    """Remove the lines of a file that `append_line` writes which are not to be kept; returns how many went.

    The file is replaced whole or not at all, while no other process appends to it; kept lines stay as they are, byte
    for byte. A link is not followed. Raises DiskError, FileKindError; then the file is unchanged.
    """
    try:
        with _locked(path, os.O_RDWR | os.O_NOFOLLOW) as file:
            if (size := os.fstat(file.fileno()).st_size) > available_memory() // 2:
                raise FileKindError(f"{path} has {size} bytes, more than fit the memory. Nothing was removed.")
            lines = file.read().split(b"\n")
            kept = [line for line in lines if not line.strip() or keep(line)]
            if len(kept) < len(lines):
                write_whole(path, b"\n".join(kept))
            return len(lines) - len(kept)
    except OSError as error:
        raise _refused(path, error) from error


@contextmanager
def _locked(path: Path, flags: int) -> Iterator[BinaryIO]:
    """A file that nobody else appends to or filters meanwhile. Raises OSError, FileKindError."""
    while True:
        handle, now = open_regular(path, flags), None
        with open(handle, "rb", buffering=0) as file:
            lock_bytes(handle)
            with suppress(FileNotFoundError):
                now = os.stat(path, follow_symlinks=False)
            if now is not None and os.path.samestat(os.fstat(handle), now):
                yield file
                return
        # another process has replaced or removed it meanwhile


@contextmanager
def in_use(folder: Path, *, alone: bool = False) -> Iterator[None]:
    """Mark a folder as in use by this process; several processes may use it at once.

    alone: raise BlockingIOError where another process uses it. Where the file system knows no locks of folders, nothing
    is marked. Raises OSError where there is no such folder.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
        except BlockingIOError:
            raise
        except OSError:
            pass  # no locks here
        yield
    finally:
        os.close(handle)


def make_folders(folder: Path) -> None:
    """Make a folder and its missing parents, and bring their names to the disk. Raises OSError."""
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


def sync_files(paths: Iterable[Path]) -> None:
    """Bring files that other packages wrote, and their names, to the disk. Raises OSError."""
    folders = dict[Path, None]()
    for path in paths:
        _sync_path(path)
        folders[path.parent] = None
    for folder in folders:
        sync_folder(folder)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove from a folder the temporary files of dead processes of this host. name: only those for this file."""
    begin = r"\..*" if name is None else re.escape(f".{name}")
    temporary = re.compile(rf"{begin}\.{re.escape(socket.gethostname())}-([0-9]+)-[0-9a-f]{{8}}\.tmp", re.DOTALL)
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            found = temporary.fullmatch(entry.name)
            if found is None or _alive(int(found[1])):
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                with suppress(OSError):
                    os.unlink(entry.path)


def _temporary(path: Path) -> Path:
    """A name beside a path that no other process uses. Leftovers of dead processes in the folder are removed first."""
    here = (os.getpid(), path.parent)
    if here not in _swept:
        _swept.add(here)
        remove_leftovers(path.parent)
    return path.parent / temporary_name(path.name[:40])


def temporary_name(name: str) -> str:
    """A name for a file while this process writes it. No other process uses it, and `remove_leftovers` finds it."""
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
    """Rename temporary files to their final names."""
    for path, temporary in written:
        temporary.replace(path)
    for folder in dict.fromkeys(path.parent for path, _ in written):
        sync_folder(folder)


def _sync_or_undo(path: Path, temporary: Path) -> None:
    """Bring the new name of a folder to the disk. Where that fails it has that name no more. Raises OSError."""
    try:
        sync_folder(path.parent)
    except OSError:
        try:
            path.rename(temporary)
        except OSError:  # a full disk may refuse names too, but it removes
            shutil.rmtree(path, ignore_errors=True)
        raise


def _remove(paths: Iterable[Path]) -> None:
    """Remove files, where they exist."""
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
        pass  # another user's process, or no process number
    return True


def _refused(path: Path, error: OSError, *, kept: bool = True) -> DiskError:
    before = "What was there before is unchanged." if kept else "The new files may be lost."
    return DiskError(
        f"{path} can't be written: {error.strerror or error}.\n"
        f"{before} {to_do(error)}, then run the same command again."
    )


def to_do(error: OSError) -> str:
    """What helps where the system refuses to write."""
    if error.errno in (errno.EROFS, errno.EIO):  # room helps neither
        return "Choose another disk"
    return "Make room or choose another disk" if error.errno in REFUSALS else "Correct the path or its rights"


def listable(folder: Path) -> Path:
    """The same folder, there or not. Raises FeatprobeError where its names may not be read: then a search finds nothing
    in it, and says nothing.
    """
    if not may_be_listed(folder):
        raise FeatprobeError(f"{folder} can't be looked into: {os.strerror(errno.EACCES)}. Correct its rights.")
    return folder


def may_be_listed(folder: Path) -> bool:
    """Whether the rights of a folder, there or not, let its names be read."""
    with suppress(FileNotFoundError, NotADirectoryError):
        try:
            os.scandir(folder).close()
        except PermissionError:
            return False
    return True


def is_there(path: Path) -> bool:
    """Whether anything has this path, a link too. Raises OSError where its folder can't be looked into."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def open_regular(path: str | os.PathLike[str], flags: int = os.O_RDONLY) -> int:
    """Open a regular file and return its descriptor. Raises FileKindError at once for any other kind; else OSError.

    The mode of a new file follows the umask.
    """
    with suppress(FileNotFoundError):  # even opening may change a device
        _check_regular(path, os.stat(path, follow_symlinks=not flags & os.O_NOFOLLOW))
    handle = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY, 0o666)
    try:
        _check_regular(path, os.fstat(handle))
    except (FileKindError, OSError):
        os.close(handle)
        raise
    return handle


def _check_regular(path: str | os.PathLike[str], found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode) and not may_be_listed(Path(path)):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISLNK(found.st_mode):  # opening refuses a link
        raise FileKindError(
            f"{os.fspath(path)} is not a regular file, but a folder, pipe, device or socket. It was not read."
        )


def read_regular(path: Path, most: int) -> bytes:
    """The bytes of a regular file. Raises FileKindError, also for one of more than `most` bytes; else OSError."""
    with open(path, "rb", opener=open_regular) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > most:
            raise FileKindError(f"{path} has {size} bytes, more than the {most} that such a file may have.")
        return stream.read(size)


@contextmanager
def packed(path: Path, *, sums: bool = False) -> Iterator[BinaryIO]:
    """An archive in torch's format, opened once: what was checked is what is read.

    sums: also check the checksum of each part, which torch writes and does not look at. Raises ValueError for an
    archive that would unpack to far more bytes than it holds, and with `sums` for one that is damaged or of another
    kind; FileKindError where there is no regular file, and OSError.
    """
    with open(path, "rb", opener=open_regular) as stream:
        if zipfile.is_zipfile(stream):
            held = os.fstat(stream.fileno()).st_size
            with zipfile.ZipFile(stream) as archive:
                claimed = sum(entry.file_size for entry in archive.infolist())
                if claimed > MOST_PACKED * held:
                    raise ValueError(f"its {held} bytes would unpack to {claimed}")
                if sums and archive.testzip() is not None:
                    raise ValueError("it is damaged: a checksum in it is of other bytes")
        elif sums:
            raise ValueError("it is cut, or no file of torch's")
        stream.seek(0)
        yield stream


def below(folder: Path, path: str | Path, where: str) -> Path:
    """The path of a file in a folder. Raises FileKindError, naming `where`, for one that leads out, also by links."""
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
    """Whether a text can be the name of a file or folder: one part of a path, without control characters.

    >>> plain_name("bottle, 2nd"), plain_name("../evil"), plain_name("a\\x1bb"), plain_name("..")
    (True, False, False, False)
    """
    return (
        name not in ("", ".", "..")
        and not re.search(r"[/\\\x00-\x1f\x7f-\x9f]", name)
        and len(os.fsencode(name)) <= LONGEST_NAME
    )


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises only ValueError, also for text that is nested too deeply.

    A value of two characters takes 30 times their memory, so a large text whose values don't fit it is not parsed.
    """
    if len(text) > UNASKED:
        marks = [text.count(mark) for mark in "[{,"] if isinstance(text, str) else [text.count(mark) for mark in b"[{,"]
        if (marks[0] + marks[1]) * PER_TABLE + marks[2] * PER_VALUE > available_memory():
            raise ValueError("its values would take more memory than there is")
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: Path, most: int) -> Any:
    """The value of a JSON file of at most `most` bytes. Raises FileKindError, OSError, ValueError."""
    return parse_json(read_regular(path, most))


def read_toml(path: Path, most: int = 1 << 20) -> dict[str, Any]:
    """The value of a TOML file of at most `most` bytes. Raises FileKindError, OSError, ValueError."""
    data = read_regular(path, most)
    bare = _TOML_TEXT.sub(b"", data)
    if any(part.count(b".") > MOST_DOTS for part in re.split(rb"[=,\n]", bare)):
        raise ValueError(f"a name in it has more than {MOST_DOTS} parts")  # which take tomllib their square in time
    try:
        return tomllib.loads(data.decode("utf-8-sig"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
