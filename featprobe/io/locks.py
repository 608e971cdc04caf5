"""Locks on ranges of a file's bytes, which end with the process that took them.

On Linux a lock belongs to one opening of the file (`F_OFD_SETLK`), so that two threads which open it exclude each other
as two processes do. Elsewhere, and on file systems that refuse such locks, it belongs to the process (`F_SETLK`): its
threads all hold it, and closing the file once ends it. Locks of both kinds exclude each other.
"""

import errno
import fcntl
import os
import struct
import sys

_OWN = sys.platform == "linux" and hasattr(fcntl, "F_OFD_SETLK")
_NONE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a system says that knows no locks of an opening."""


def lock_bytes(handle: int, start: int = 0, length: int = 0, *, wait: bool = True) -> None:
    """Lock bytes of a file that is open for writing, against all others that lock them. length: 0 for all that follow.

    wait: until others have unlocked them; else raise BlockingIOError where they are locked. Raises OSError where the
    file system knows no locks.
    """
    try:
        _set(handle, fcntl.F_WRLCK, start, length, wait=wait)
    except PermissionError as error:  # as some systems say it
        raise BlockingIOError(error.errno, error.strerror) from error


def unlock_bytes(handle: int, start: int = 0, length: int = 0) -> None:
    """End locks on bytes of a file. length: 0 for all that follow."""
    _set(handle, fcntl.F_UNLCK, start, length, wait=False)


def _set(handle: int, kind: int, start: int, length: int, *, wait: bool) -> None:
    if _OWN:
        asked = struct.pack("hhqqi0q", kind, os.SEEK_SET, start, length, 0)  # struct flock
        try:
            fcntl.fcntl(handle, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, asked)
            return
        except OSError as error:
            if error.errno not in _NONE:
                raise
    operation = fcntl.LOCK_UN if kind == fcntl.F_UNLCK else fcntl.LOCK_EX
    fcntl.lockf(handle, operation if wait or kind == fcntl.F_UNLCK else operation | fcntl.LOCK_NB, length, start)
