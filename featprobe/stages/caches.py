"""Looking after cache files: list, describe, verify, remove."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from featprobe.cache import (
    MISSING,
    UNREADABLE,
    WHOLE,
    Cache,
    CacheWriter,
    Damage,
    RowLocks,
    damaged_rows,
    read_contents,
    verify,
)
from featprobe.errors import CacheError
from featprobe.stages.settled import look_path


def describe_cache(path: Path) -> dict[str, Any]:
    """What a cache file holds, as plain values."""
    cache = Cache(path, read_contents(path))
    done = cache.done
    return {
        "path": str(path),
        "bytes": path.stat().st_size,
        "rows": len(cache),
        "whole": int((done == WHOLE).sum()),
        "missing": int((done == MISSING).sum()),
        "unreadable": {cache.rows[i].id: cache.reason(i) for i in np.flatnonzero(done == UNREADABLE).tolist()},
        "intact": cache.contents.is_intact(),
        "key": cache.recipe.key,
        "recipe": cache.recipe.to_json(),
        "data": asdict(cache.data),
        "command": cache.contents.command,
        "provenance": dict(cache.contents.provenance),
    }


def verify_cache(path: Path, quiet: bool = False) -> list[Damage]:
    """Hash every row, level and target again; rows whose features are bad are marked missing.

    `extract` then computes exactly those rows anew. A file whose targets or identity are damaged is left as
    it is: `extract` makes it anew from the data set and copies over the features that are sound. A file
    that can't be opened is damage too.
    """
    found: list[Damage] = []
    try:
        contents = read_contents(path)
    except CacheError as error:
        return [Damage(-1, "", f"the whole file: {str(error).splitlines()[0]}")]
    total = contents.recipe.row_bytes * len(contents.rows)
    with tqdm(total=total, desc=path.name, unit="B", unit_scale=True, disable=quiet, leave=False) as bar:
        for item in verify(path):
            if isinstance(item, Damage):
                found.append(item)
            else:
                bar.update(item)
    bad = damaged_rows(found)
    if bad and contents.is_intact():  # else `extract` makes a new file, and this one's addresses can't be trusted
        with RowLocks(path) as locks, CacheWriter(path) as writer:
            locks.claim_all()
            for row in bad:
                writer.mark_missing(row)
    return found


def remove_cache(path: Path) -> int:
    """Delete a cache file and what lies beside it; returns the bytes set free.

    Raises CacheBusyError when a process is writing into it.
    """
    with RowLocks(path) as locks:
        locks.claim_all()
        size = path.stat().st_size
        path.unlink()
        path.with_suffix(".runs.jsonl").unlink(missing_ok=True)
        look_path(path).unlink(missing_ok=True)
    (path.parent / f".{path.stem}.lock").unlink(missing_ok=True)
    if not any(path.parent.iterdir()):
        path.parent.rmdir()
    return size
