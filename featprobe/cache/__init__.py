"""The feature cache, format versions 1 and 2 (cache/README.md). The only part that imports h5py.

Handing features to torch is featprobe.cache.reader's: looking after caches needs none of it.
"""

from featprobe.cache.layout import (
    MISSING,
    UNREADABLE,
    WHOLE,
    Row,
    create_file,
    make_temporary,
    read_contents,
    remove_leftovers,
    replace_file,
)
from featprobe.cache.store import Cache, Damage, damaged_rows, open_cache, verify
from featprobe.cache.writer import CacheWriter, RowLocks

__all__ = [
    "MISSING",
    "UNREADABLE",
    "WHOLE",
    "Cache",
    "CacheWriter",
    "Damage",
    "Row",
    "RowLocks",
    "create_file",
    "damaged_rows",
    "make_temporary",
    "open_cache",
    "read_contents",
    "remove_leftovers",
    "replace_file",
    "verify",
]
