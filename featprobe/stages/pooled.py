"""Pooled features of a cache: the mean and the maximum of each level over an image's own cells."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray

from featprobe.cache import WHOLE, Cache
from featprobe.cache.held_file import HeldFile
from featprobe.cache.pooled_file import read_pooled, rows_digest, write_pooled
from featprobe.cache.reader import FeatureLoader
from featprobe.cache.row_reader import RowReader
from featprobe.errors import CacheIncompleteError, DiskError
from featprobe.features import Pooled, filled_cells, pool
from featprobe.image_labels import Unit
from featprobe.levels import FeatureLevel
from featprobe.specs import Rows
from featprobe.stages.image_truth import units_of
from featprobe.stages.progress import Progress

Tables = dict[str, NDArray[np.float32]]
"""Level name -> (rows, 2, channels): mean and maximum."""
BYTES_AT_ONCE = 1 << 24  # about, of maps that are read together
_known: WeakKeyDictionary[HeldFile, tuple[str, Tables]] = WeakKeyDictionary()
"""What was pooled from the cache that was asked for last, and the digest of its rows then."""


def pooled_vectors(
    cache: Cache,
    levels: Sequence[FeatureLevel],
    unit: Unit,
    rows: Rows,
    *,
    quiet: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> NDArray[np.float32]:
    """The pooled features of the units that some rows show: (units, 2 * channels of all levels), float32.

    A unit has the mean, then the maximum, level by level; see `features.pool`. Units are in ascending order. unit:
    "image" joins the rows of an image; "tile" takes each row for itself. rows: usable rows of the cache.

    Maps are read once, in one pass over all whole rows, and what was pooled is kept beside the cache. quiet: show no
    progress of that pass. say: gets a line where nothing could be kept. Raises CacheError for a damaged row,
    CacheIncompleteError for one that is not whole, ProbeError for tiles of a cache that has none.
    """
    rows = np.unique(rows)
    _check_whole(cache, rows)
    if cache.recipe.store == "pooled":
        tables = _stored(cache, levels, rows)
    else:
        tables = {name: table[rows] for name, table in _pooled(cache, levels, quiet, say).items()}
    units, index = np.unique(units_of(cache, rows, unit), return_inverse=True)
    mean, maximum = ({name: torch.from_numpy(table[:, i]) for name, table in tables.items()} for i in (0, 1))
    content = torch.from_numpy(cache.rows.content[rows])
    pooled = Pooled(mean, maximum, {level.name: filled_cells(content, level.stride) for level in levels})
    if len(units) < len(rows):
        pooled = pooled.joined(torch.from_numpy(index), len(units))
    return pooled.vectors(levels).numpy()


def _check_whole(cache: Cache, rows: Rows) -> None:
    missing = int((cache.done[rows] != WHOLE).sum())
    if missing:
        raise CacheIncompleteError(
            f"{cache.path} is not complete: {missing} of {len(rows)} rows are missing or unreadable.\n"
            f"To finish it, run:  {cache.contents.command}"
        )


def _stored(cache: Cache, levels: Sequence[FeatureLevel], rows: Rows) -> Tables:
    """Some rows of a pooled cache."""
    tables = {level.name: np.empty((len(rows), 2, level.channels), np.float32) for level in levels}
    with RowReader(cache, levels) as reader:
        reader.read(rows, {name: table.reshape(len(rows), -1).view(np.uint8) for name, table in tables.items()})
    return tables


def _pooled(cache: Cache, levels: Sequence[FeatureLevel], quiet: bool, say: Callable[[str], None]) -> Tables:
    """All rows of a cache of maps, as `pooled_file.Tables` has them: known, kept beside it, or pooled now."""
    digest, file = rows_digest(cache), cache.contents.file
    before, known = _known.get(file, ("", {}))
    known = dict(known) if before == digest else {}
    missing = [level for level in levels if level.name not in known]
    known |= read_pooled(cache, missing, digest) if missing else {}
    missing = [level for level in missing if level.name not in known]
    if missing:
        known |= _pool_all(cache, missing, quiet)
        _keep(cache, known, digest, say)
    _known.clear()
    _known[file] = digest, known
    return {level.name: known[level.name] for level in levels}


def _keep(cache: Cache, tables: Tables, digest: str, say: Callable[[str], None]) -> None:
    """Keep tables beside their cache, with those of other levels that are there, where that can be."""
    if rows_digest(cache) != digest or not cache.is_in_place():
        return  # rows were made anew meanwhile
    others = [level for level in cache.levels if level.name not in tables]
    try:
        write_pooled(cache, {**read_pooled(cache, others, digest), **tables}, digest)
    except DiskError as error:
        say(
            f"pooled features of {cache.path} are not kept, so the next command pools them again: "
            f"{str(error).splitlines()[0]}"
        )


@contextmanager
def in_one_thread() -> Iterator[None]:
    """Inside, torch computes in the calling thread alone: pooling is as fast as reading, and waits for nobody.

    Threads that share each small operation wait for each other after every one; beside other load that is most of the
    time.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _pool_all(cache: Cache, levels: Sequence[FeatureLevel], quiet: bool) -> Tables:
    """Pool every whole row, in one pass over the file."""
    tables = {level.name: np.zeros((len(cache), 2, level.channels), np.float32) for level in levels}
    rows = np.flatnonzero(cache.done == WHOLE)
    bar = Progress(len(rows), f"pooling {cache.path.stem}", "row", quiet=quiet)
    with bar, in_one_thread(), FeatureLoader(cache, levels) as loader, torch.inference_mode():
        step = max(1, BYTES_AT_ONCE // sum(loader.reader.row_bytes(level) for level in levels))
        for batch, features in loader.batches(rows[i : i + step] for i in range(0, len(rows), step)):
            pooled = pool(features, levels)
            for name, table in tables.items():
                table[batch, 0], table[batch, 1] = pooled.mean[name].numpy(), pooled.maximum[name].numpy()
            bar.update(len(batch))
    return tables
