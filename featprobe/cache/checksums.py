"""The checksum of a row's level, and which of them this process has found to hold."""

import os
from typing import TypeAlias
from weakref import WeakValueDictionary

import numpy as np
import xxhash
from numpy.typing import NDArray

Hashed: TypeAlias = NDArray[np.bool_]
_files: WeakValueDictionary[tuple[int, int], Hashed] = WeakValueDictionary()


def row_checksum(*parts: bytes | memoryview) -> int:
    """xxh3_64 over all that is stored of a row's level, one part after another."""
    running = xxhash.xxh3_64()
    for part in parts:
        running.update(part)
    return running.intdigest()


def hashed_of(handle: int, rows: int, levels: int) -> Hashed:
    """Which rows of an open file this process has found to hold their checksums: (rows, levels), False at first.

    The same array for all that have the file open, under whatever name; gone when none has.
    """
    status = os.fstat(handle)
    return _files.setdefault((status.st_dev, status.st_ino), np.zeros((rows, levels), dtype=np.bool_))
