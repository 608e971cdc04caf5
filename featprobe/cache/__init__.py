"""The feature cache (cache/README.md). Only this part imports h5py, and only to make files and to read old ones.

featprobe.cache.reader gives features to torch. Commands that look after caches don't need torch.
"""

from featprobe.cache.contents import Contents, read_contents, read_states
from featprobe.cache.layout import (
    MISSING,
    UNREADABLE,
    WHOLE,
    Extent,
    create_file,
    make_temporary,
    replace_file,
)
from featprobe.cache.rows import Row, RowTable, checksum
from featprobe.cache.store import Cache, Damage, damaged_rows, open_cache, verify
from featprobe.cache.writer import CacheWriter, RowLocks

__all__ = [
    "MISSING",
    "UNREADABLE",
    "WHOLE",
    "Cache",
    "CacheWriter",
    "Contents",
    "Damage",
    "Extent",
    "Row",
    "RowLocks",
    "RowTable",
    "checksum",
    "create_file",
    "damaged_rows",
    "make_temporary",
    "open_cache",
    "read_contents",
    "read_states",
    "replace_file",
    "verify",
]
