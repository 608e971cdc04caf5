"""Arrays in numpy's format that others may have made."""

import tokenize
from typing import IO, Any

import numpy as np


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
