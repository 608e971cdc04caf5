"""Arrays in numpy's format that others may have made."""

import tokenize
import zipfile
from math import prod
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray


def array_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether columns lie together, and type of an array, from the header with which a stream begins.

    Raises ValueError for a header that is none, or not of numpy's version 1.0: it may have 65535 bytes, and numpy takes
    memory for one of any length before it refuses it.
    """
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError("its header is not of version 1.0")
        return np.lib.format.read_array_header_1_0(stream)
    except (tokenize.TokenError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"its header can't be read: {error}") from error


def open_entry(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    """An entry of an archive; raises ValueError for a packed one, which could take any memory."""
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is packed")
    return archive.open(name)


def read_entry(
    archive: zipfile.ZipFile, name: str, dtype: str, shape: tuple[int, ...], *, rows: bool = False
) -> NDArray[Any]:
    """An array of an archive, of this type and shape; with `rows`, of any number of rows of this shape.

    Raises ValueError for any other before memory is taken for it, and for one that is cut short or damaged.
    """
    with open_entry(archive, name) as packed:
        found, columns_first, own = array_header(packed)
        wanted = (*found[:1], *shape) if rows else shape
        size = prod(wanted) * np.dtype(dtype).itemsize
        if (found, columns_first, own) != (wanted, False, np.dtype(dtype)) or size > archive.getinfo(name).file_size:
            raise ValueError(f"{name} is of another type or shape")
        data = packed.read(size)
        if len(data) < size or packed.read(1):  # reading to the end checks the CRC
            raise ValueError(f"{name} has another length")
    return np.frombuffer(data, dtype).reshape(wanted)
